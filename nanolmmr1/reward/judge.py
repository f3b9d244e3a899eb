"""The judge: scores responses, and sends slow or harmful work to worker processes.

Untrusted text meets sympy, the recipe's regular expressions and the user's reward functions only in a worker process.
A worker imports this package, installed libraries and the user's files, and nothing from the current folder. Its
environment holds no secrets. A built-in rule has a limit of CPU time, so that a busy host changes no verdict, and may
use 2 GiB of memory. A user function has a deadline. Workers end when the trainer ends.

Calls: Judge.score or verdicts, in threads Workers.ask, Worker.ask; and in the worker process worker.serve.

Next: worker.py, inside a worker process.
"""

import contextlib
import functools
import json
import math
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any, NamedTuple, NoReturn, Self, TypeVar

from nanolmmr1 import schema
from nanolmmr1.errors import UserError
from nanolmmr1.reward.choice import listed_options
from nanolmmr1.reward.extract import final_answer, gold_answer
from nanolmmr1.reward.formats import FORMATS, check_format, format_reward
from nanolmmr1.reward.parts import Node, tree
from nanolmmr1.reward.rules import NO_RULE, GoldRule, Verdict, decide, gold_problem
from nanolmmr1.reward.worker import Call, Message, Question

CACHE_SIZE = 8192  # verdicts
START_S = 120.0  # to import sympy and the user's files, perhaps from a slow network disk
PAUSE_S = 0.5  # between two calls of Workers.between
WALL = 10  # a built-in rule has this many seconds of wall time per second of CPU time, and at least this many in all
MOST_WORKERS = 16
PACKAGE = Path(__file__).resolve().parents[1]
# Variables that a worker inherits. Tokens, keys, proxies and PYTHON* are not among them.
ENVIRONMENT = {
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT",
    "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX",
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS",
    "OPENBLAS_CORETYPE", "XDG_CACHE_HOME",
}  # fmt: skip
# Loads this package from its own files, even if another one has its name, and keeps its parent folder off the path.
# Libraries of the trainer's path come last, so that they hide neither the standard library nor installed packages.
START = """
import importlib.util, json, sys
package, libraries, *arguments = sys.argv[1:]
spec = importlib.util.spec_from_file_location(
    "nanolmmr1", package + "/__init__.py", submodule_search_locations=[package])
sys.modules["nanolmmr1"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.path += [path for path in json.loads(libraries) if path not in sys.path]
from nanolmmr1.reward.worker import main
main(*arguments)
"""
Row = dict[str, Any]  # JSON-able, with the gold `answer`; see data.store.Row.public
Result = TypeVar("Result")
Request = TypeVar("Request", Question, Call)


class RewardError(UserError):
    """A user's reward function failed; the message names function, row and line."""


class WorkerDied(Exception):
    """A worker process, or its child, ended by itself."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status  # exit status; negative: number of the signal that killed it


class Judged(NamedTuple):
    """What the built-in rules say of a response."""

    answer: str  # the final answer that was read from it, normalised; "": none was found
    right: bool  # False if undecided
    reason: str  # the rule that decided: one of rules.REASONS
    undecided: bool  # no rule can tell right from wrong, a judge would have to
    format: bool  # it has the format


class Judge:
    """Scores responses. Use it as a context manager or close it; worker processes start when first needed."""

    cfg: schema.Reward
    functions: dict[str, tuple[str, float]]  # name -> "absolute path:name", weight
    workers: "Workers"
    cache: dict[Question, Verdict]  # of questions that a worker answered, least recently used first

    def __init__(self, cfg: schema.Reward) -> None:
        self.cfg, self.functions, self.cache = cfg, {}, {}
        for spec, weight in cfg.functions.items():
            path, _, name = spec.rpartition(":")
            if not path or not name.isidentifier():
                raise UserError(f"reward.functions: {spec!r} is not path/to/file.py:function")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise UserError(f"reward.functions: {spec} has weight {weight!r}; a number is needed")
            if name in self.functions or name in ("overall", "format", "accuracy", "timeout"):
                raise UserError(f"reward.functions: the name {name!r} of {spec} is taken; rename the function")
            self.functions[name] = (f"{os.path.realpath(os.path.expanduser(path))}:{name}", float(weight))
        self.workers = Workers(cfg, [spec for spec, _ in self.functions.values()])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes. A later call starts new ones."""
        self.workers.close()

    def check(self, rows: Sequence[Row]) -> None:
        """Test at start-up: the format is valid, and every user function loads and scores the first row's gold answer.

        Raises:
            UserError: the error and its place.
        """
        check_format(self.cfg.format)
        self._call_functions([(row["answer"], row) for row in rows[:1]])

    def gold_problems(self, rows: Sequence[Row]) -> list[str]:
        """Per row the reason why no response can earn the accuracy reward; "" if there is none."""
        return [gold_problem(gold_answer(row["answer"])) for row in rows]

    def score(self, pairs: Sequence[tuple[str, Row]]) -> list[dict[str, float]]:
        """Score responses.

        Args:
            pairs: (response, row)

        Returns:
            Per pair: overall (the weighted sum), format, accuracy, the value of every user function by its name (and
            further numbers as name/part), timeout (1 if a built-in rule was killed, which scores 0), and 1 for the
            reason of the accuracy, such as reason/parsed (see rules.REASONS). A part `accuracy` of a user function is
            the accuracy instead of the rules', with reason/function: of some tasks many answers are right.

        Raises:
            RewardError: a user function raised, returned no finite number or missed the deadline.
        """
        judgements, rules = [], self._apply_rules(pairs)
        for (_, format, accuracy), values in zip(rules, self._call_functions(pairs), strict=True):
            own = next((values[part] for name in self.functions if (part := f"{name}/accuracy") in values), None)
            right, why = (accuracy.score, accuracy.reason) if own is None else (own, "function")
            overall = self.cfg.format_weight * format.score + self.cfg.accuracy_weight * right
            overall += sum(weight * values[name] for name, (_, weight) in self.functions.items())
            scores = {"overall": overall, "format": format.score, "accuracy": right, **values}
            late = int("deadline" in (format.reason, accuracy.reason))
            judgements.append(scores | {"timeout": late, f"reason/{why}": 1.0})
        return judgements

    def verdicts(self, pairs: Sequence[tuple[str, Row]]) -> list[Judged]:
        """What the built-in rules say of (response, row) pairs, in their order. No user function is called."""
        return [Judged(answer, bool(accuracy.score), accuracy.reason, accuracy.undecided, bool(format.score))
                for answer, format, accuracy in self._apply_rules(pairs)]  # fmt: skip

    def _apply_rules(self, pairs: Sequence[tuple[str, Row]]) -> list[tuple[str, Verdict, Verdict]]:
        """Per pair the final answer, and the verdicts on format and accuracy."""
        formats = [Question("format", response, self.cfg.format) for response, _ in pairs]
        answers = [self._accuracy_question(response, row) for response, row in pairs]
        verdicts = self._verdicts(formats + answers)
        return [(answer.text, verdicts[format], verdicts[answer])
                for format, answer in zip(formats, answers, strict=True)]  # fmt: skip

    def _accuracy_question(self, response: str, row: Row) -> Question:
        gold, parts, options = _gold(row["answer"], row.get("problem", ""), tuple(map(str, row.get("options") or ())))
        options = options if self.cfg.option_value else ()
        return Question("accuracy", final_answer(response, parts), gold, options, _gold_rule(row.get("gold_rule")))

    def _verdicts(self, questions: Iterable[Question]) -> dict[Question, Verdict]:
        """Decide easy questions here; look others up in the cache, or ask the workers. Equal ones are asked once."""
        verdicts: dict[Question, Verdict] = {}
        hard = []
        for question in dict.fromkeys(questions):
            if question.rule == "accuracy":
                verdict = decide(question.text, question.expected, question.options, rule=question.gold_rule)
            elif question.expected in FORMATS:
                verdict = Verdict(format_reward(question.text, question.expected), "text")
            else:
                verdict = None
            if verdict is not None:
                verdicts[question] = verdict
            elif question in self.cache:
                verdicts[question] = self.cache[question] = self.cache.pop(question)  # now most recently used
            else:
                hard.append(question)
        for question, verdict in zip(hard, self.workers.map(self._ask_worker, hard), strict=True):
            verdicts[question] = self.cache[question] = verdict
        while len(self.cache) > CACHE_SIZE:
            del self.cache[next(iter(self.cache))]
        return verdicts

    def _ask_worker(self, question: Question) -> Verdict:
        try:
            reply = self.workers.ask(question)
        except WorkerDied as death:
            if death.status > 0:  # a crash, not a signal
                text = f"a judging process failed on {question.rule}; its traceback stands above"
                raise RuntimeError(text) from death
            reply = {}
        return Verdict(*reply["value"]) if "value" in reply else Verdict(0.0, "deadline", True)

    def _call_functions(self, pairs: Sequence[tuple[str, Row]]) -> list[dict[str, float]]:
        """{function: value, function/part: value} per pair."""
        specs = [spec for spec, _ in self.functions.values()]
        calls = [Call(spec, response, row) for response, row in pairs for spec in specs]
        values = iter(self.workers.map(self._call_function, calls))
        return [{name: value for _ in specs for name, value in next(values).items()} for _ in pairs]

    def _call_function(self, call: Call) -> dict[str, float]:
        try:
            reply = self.workers.ask(call)
        except WorkerDied as death:
            reply = {"error": f"it ended its process, status {death.status}"}
        if "value" in reply:
            return reply["value"]
        row = call.row.get("id") or call.row.get("problem", "")[:60]
        error = reply.get("error", f"it did not return within reward.timeout_s={self.cfg.timeout_s:g}")
        raise RewardError(f"reward function {call.function} failed on row {row!r}: {error}")


@functools.lru_cache(CACHE_SIZE)
def _gold(answer: str, problem: str, options: tuple[str, ...]) -> tuple[str, int, tuple[str, ...]]:
    """A gold answer, the number of its parts, and the options to choose from."""
    gold = gold_answer(answer)
    parts = tree(gold, True)
    return gold, len(parts.items) if isinstance(parts, Node) else 1, options or tuple(listed_options(problem))


def _gold_rule(given: dict[str, Any] | None) -> GoldRule:
    """The rule of a row; its keys are those of data.columns.GOLD_RULE."""
    if not given:
        return NO_RULE
    accept = tuple(gold_answer(text) for text in given.get("accept", ()))
    return GoldRule(accept, given.get("decimals"), tuple(given.get("tolerance", ())))


class Workers:
    """A pool of worker processes, started when needed.

    Args:
        functions: path/to/file.py:function each, loaded by every worker.
    """

    count: int  # most workers that run at the same time
    idle: "list[Worker]"
    between: Callable[[], None]  # called every PAUSE_S seconds while `map` waits; may raise to end it

    def __init__(self, cfg: schema.Reward, functions: Sequence[str]) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.count = cfg.workers or max(1, min(MOST_WORKERS, cores // ranks))
        self.cfg, self.functions, self.idle = cfg, functions, []
        self.between = lambda: None
        environment(cfg.env)  # raises now rather than when the first worker starts

    def close(self) -> None:
        """Kill the idle workers."""
        while self.idle:
            self.idle.pop().kill()

    def map(self, function: Callable[[Request], Result], requests: Iterable[Request]) -> list[Result]:
        """[function(request)], in `count` threads. The first failure is raised and cancels pending requests."""
        with ThreadPoolExecutor(self.count) as pool:
            futures = [pool.submit(function, request) for request in requests]
            try:
                while (waiting := wait(futures, PAUSE_S, FIRST_EXCEPTION)).not_done:
                    for future in waiting.done:
                        future.result()
                    self.between()
                return [future.result() for future in futures]
            finally:
                for future in futures:
                    future.cancel()

    def ask(self, request: Question | Call) -> Message:
        """The reply of an idle or new worker; {} if the child was killed for its time.

        Raises:
            WorkerDied: two workers ended by themselves on this request.
        """
        try:
            worker = self.idle.pop()
        except IndexError:
            worker = Worker(self.cfg, self.functions)
        try:
            reply = worker.ask(request)
        except WorkerDied:  # perhaps long ago and for another reason: retry
            worker = Worker(self.cfg, self.functions)
            reply = worker.ask(request)
        self.idle.append(worker)
        return reply


class Worker:
    """One worker process, ready when constructed. `kill`, garbage collection and exit of the trainer end it.

    Raises:
        UserError: a user function cannot be loaded, or the process does not start.
    """

    child: list[int]  # id of the process that answers requests, once it is known
    kill: Callable[[], object]

    def __init__(self, cfg: schema.Reward, functions: Sequence[str]) -> None:
        self.cfg, self.child = cfg, []
        python = [sys.executable, "-P", "-s", "-B", "-c", START]  # -B: no __pycache__ beside the user's files
        command = [*python, str(PACKAGE), json.dumps(libraries()), str(cfg.timeout_s), str(cfg.verify_s), *functions]
        self.process = Popen(command, env=environment(cfg.env), stdin=PIPE, stdout=PIPE, start_new_session=True)
        assert self.process.stdin and self.process.stdout
        self.requests, self.replies = self.process.stdin, self.process.stdout
        self.kill = weakref.finalize(self, _kill, self.process, self.child)
        hello, late = self._read(START_S)
        if hello is None or "error" in hello:
            self.kill()
            why = f"was not ready within {START_S:g} s" if late else "ended before it was ready; it said why above"
            raise UserError(hello["error"] if hello else f"a judging process ({sys.executable}) {why}")
        self.child[:] = [hello["child"]]

    def ask(self, request: Question | Call) -> Message:
        """The reply; {} if the child took too long and was killed.

        Raises:
            WorkerDied: the process or the child ended by itself; this worker is then killed.
        """
        limit = self.cfg.timeout_s if isinstance(request, Call) else WALL * max(1.0, self.cfg.verify_s)
        try:
            self.requests.write(json.dumps(request._asdict()).encode() + b"\n")
            self.requests.flush()
        except BrokenPipeError:
            self._die(self.process.wait())
        reply, late = self._read(limit)
        if late:
            while reply is not None and "child" not in reply:  # a reply that was sent just before the deadline
                reply, _ = self._read(START_S)
        if reply is None:
            self._die(self.process.wait())
        if "child" not in reply:
            return reply
        self.child[:] = [reply["child"]]  # the child was killed, and this is the next one
        if late or reply.get("signal") == signal.SIGPROF:
            return {}
        self._die(-reply["signal"])

    def _die(self, status: int) -> NoReturn:
        self.kill()
        raise WorkerDied(status)

    def _read(self, limit: float) -> tuple[Message | None, bool]:
        """Read a message, and kill the child if there is none within `limit` seconds.

        Returns:
            The message, or None if the process has ended; whether the child was killed.
        """
        late = threading.Event()

        def expire() -> None:
            late.set()
            _kill_group(self.child[0] if self.child else self.process.pid)

        timer = threading.Timer(limit, expire)
        timer.start()
        try:
            line = self.replies.readline()
        finally:
            timer.cancel()
            timer.join()
        return (json.loads(line) if line.endswith(b"\n") else None), late.is_set()


def environment(names: Iterable[str] = ()) -> dict[str, str]:
    """The environment of a worker process, with the variables that the recipe names for its functions.

    Raises:
        UserError: a variable is not set.
    """
    names = list(names)
    if absent := [name for name in names if name not in os.environ]:
        raise UserError(f"reward.env: the environment has no variable {', '.join(absent)}: set it, or leave it out")
    inherited = {name: value for name, value in os.environ.items() if name in ENVIRONMENT or name.startswith("LC_")}
    # A fixed hash seed fixes the order in which sympy visits terms, so all processes give the same verdict.
    return inherited | {name: os.environ[name] for name in names} | {"PYTHONHASHSEED": "0"}


def libraries() -> list[str]:
    """The trainer's import path, without the current folder and the checkout's root."""
    left_out = {os.path.realpath(path) for path in (os.curdir, PACKAGE.parent)}
    return [path for path in sys.path if os.path.isabs(path) and os.path.realpath(path) not in left_out]


def _kill(process: Popen[bytes], child: list[int]) -> None:
    for group in (*child, process.pid):
        _kill_group(group)
    process.wait()
    for pipe in filter(None, (process.stdout, process.stdin)):
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it is dead already (Linux, macOS)
        os.killpg(group, signal.SIGKILL)
