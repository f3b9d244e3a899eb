"""Scores responses: the easy ones here, the rest in worker processes that can be killed.

Only in a worker does untrusted text meet sympy, the recipe's regular expressions and the user's reward functions. A
worker runs this package, what is installed, and the user's files: nothing of the current folder, and no secret of the
environment. A built-in judgement has a limit of CPU time, so that a busy machine changes no verdict, and may take
2 GiB; a user function has a deadline. Both end when the trainer is gone.

The two ends speak JSON, one line a message, over the process's stdin and stdout. Each child begins by saying who it is:
{"child": process id, "signal": what killed the one before it, "error": why it cannot start}.

Next: worker.py, the other end.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from nanolmmr1.errors import UserError
from nanolmmr1.reward.rules import FORMATS, check_format, final_answer, format_reward, is_too_large, plain_accuracy

CACHE_SIZE = 8192
START_S = 120.0  # to import sympy and the user's files, perhaps from a cold network disk
PAUSE_S = 0.5  # between two looks at whether to go on waiting
WALL = 10  # seconds of the clock that a built-in judgement has for each of CPU time, at least as many in all
MOST_WORKERS = 16
PACKAGE = Path(__file__).resolve().parents[1]
# What a process needs of the environment. Neither tokens, keys and proxies nor PYTHON* are among it.
ENVIRONMENT = {
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT",
    "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX",
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS",
    "OPENBLAS_CORETYPE", "XDG_CACHE_HOME",
}  # fmt: skip
# The package is loaded from its own files, whatever else has its name, and without the folder around it on the path.
# Libraries of the trainer's path come last, so that they hide neither the standard library nor what is installed.
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


def environment(names=()):
    """The environment of a judging process, with the variables that the recipe names for its functions.

    Raises:
        UserError: one of these is not set.
    """
    if absent := [name for name in names if name not in os.environ]:
        raise UserError(f"reward.env: the environment has no variable {', '.join(absent)}: set it, or leave it out")
    kept = {name: value for name, value in os.environ.items() if name in ENVIRONMENT or name.startswith("LC_")}
    # A fixed hash seed fixes the order in which sympy visits terms: every process gives the same verdict.
    return kept | {name: os.environ[name] for name in names} | {"PYTHONHASHSEED": "0"}


def libraries():
    """The trainer's import path, less the current folder and the checkout's root."""
    left_out = {os.path.realpath(path) for path in (os.curdir, PACKAGE.parent)}
    return [path for path in sys.path if os.path.isabs(path) and os.path.realpath(path) not in left_out]


class RewardError(UserError):
    """A user's reward function failed: the message names function, row and line."""


class Judge:
    """Scores responses. Its worker processes start when first needed; close it, or use it as a context manager.

    By written rule a built-in judgement that is killed on the deadline, or runs out of memory, scores 0 with timeout 1;
    like every built-in verdict that took a worker, this one is remembered.
    """

    def __init__(self, cfg):
        self.cfg = cfg
        self.functions = {}  # name -> (absolute path:name, weight)
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
        self._known = OrderedDict()  # question -> (score, killed), least recently used first

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Ends the workers. A later judgement starts others."""
        self.workers.close()

    def check(self, rows):
        """A start-up test: the format is usable, and every user function loads and scores the first row's gold answer.

        Raises:
            UserError: what is wrong, and where.
        """
        check_format(self.cfg.format)
        self._call_functions([(row["answer"], row) for row in rows[:1]])

    def gold_answers_ok(self, rows):
        """[bool]: does each row's gold answer, given as the response, earn the accuracy reward? If not, nothing can.

        One that is too large to compute does not: only its own text could.
        """
        golds = [row["answer"] for row in rows]
        questions = [("accuracy", final_answer(f"<answer>{gold}</answer>"), final_answer(gold)) for gold in golds]
        scores = self._scores(questions)
        return [scores[question][0] == 1.0 and not is_too_large(question[2]) for question in questions]

    def score(self, pairs):
        """Judges [(response, row)]; a row is a JSON-able dict with `answer`.

        Returns a dict for each: overall (the weighted sum), format, accuracy, every user function by its name (and
        what else it logs as name/part), timeout (1: a built-in judgement was killed).

        Raises:
            RewardError: a user function raised, returned no finite number, or missed the deadline.
        """
        forms = [("format", response, self.cfg.format) for response, _ in pairs]
        answers = [("accuracy", final_answer(response), final_answer(row["answer"])) for response, row in pairs]
        scores = self._scores(forms + answers)
        results = []
        for form, answer, extra in zip(forms, answers, self._call_functions(pairs), strict=True):
            (form_score, form_killed), (accuracy, accuracy_killed) = scores[form], scores[answer]
            overall = self.cfg.format_weight * form_score + self.cfg.accuracy_weight * accuracy
            overall += sum(weight * extra[name] for name, (_, weight) in self.functions.items())
            results.append({"overall": overall, "format": form_score, "accuracy": accuracy, **extra,
                            "timeout": max(form_killed, accuracy_killed)})
        return results

    def _scores(self, questions):
        """{question: (score, killed)}. Equal questions are worked out once, the easy ones right here."""
        scores, hard = {}, []
        for question in dict.fromkeys(questions):
            kind, text, rule = question
            if kind == "accuracy":
                easy = plain_accuracy(text, rule)
            else:
                easy = format_reward(text, rule) if rule in FORMATS else None
            if easy is not None:
                scores[question] = easy, 0
            elif question in self._known:
                self._known.move_to_end(question)
                scores[question] = self._known[question]
            else:
                hard.append(question)
        for question, verdict in zip(hard, self.workers.map(self._rule, hard), strict=True):
            scores[question] = self._known[question] = verdict
        while len(self._known) > CACHE_SIZE:
            self._known.popitem(last=False)
        return scores

    def _rule(self, question):
        reply = self.workers.ask(question)
        if reply.get("status", 0) > 0:  # not a signal's doing: it crashed
            raise RuntimeError(f"a judging process failed on {question[0]}; its traceback stands above")
        return (reply["value"], 0) if "value" in reply else (0.0, 1)

    def _call_functions(self, pairs):
        """One dict a pair: {function: value, function/part: value}."""
        calls = [("function", spec, response, row) for response, row in pairs for spec, _ in self.functions.values()]
        values = iter(self.workers.map(self._call, calls))
        return [{key: value for _ in self.functions for key, value in next(values).items()} for _ in pairs]

    def _call(self, call):
        reply = self.workers.ask(call)
        if "value" in reply:
            return reply["value"]
        _, spec, _, row = call
        where = row.get("id") or row.get("problem", "")[:60]
        why = reply.get("error", f"it did not return within reward.timeout_s={self.cfg.timeout_s:g}")
        if "status" in reply:
            why = f"it ended its process, status {reply['status']}"
        raise RewardError(f"reward function {spec} failed on row {where!r}: {why}")


class Workers:
    """Judging processes, started when needed; the functions ("file.py:name") are loaded into each.

    Args:
        cfg: schema.Reward. functions: as above.
    """

    def __init__(self, cfg, functions):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.count = cfg.workers or max(1, min(MOST_WORKERS, cores // ranks))
        self.cfg, self.functions, self.idle = cfg, functions, []
        self.between = lambda: None  # called while judgements are waited for; may raise, which ends the waiting
        environment(cfg.env)  # whether it can be had

    def close(self):
        """Kills those that are not at work."""
        while self.idle:
            self.idle.pop().kill()

    def map(self, function, requests):
        """[function(request)], so many at a time as there may be workers. A failure cancels what has not begun."""
        with ThreadPoolExecutor(self.count) as pool:
            futures = [pool.submit(function, request) for request in requests]
            try:
                while (waiting := wait(futures, PAUSE_S, FIRST_EXCEPTION)).not_done:
                    for future in waiting.done:
                        future.result()  # the first failure is all that will be told
                    self.between()
                return [future.result() for future in futures]
            finally:
                for future in futures:
                    future.cancel()

    def ask(self, request):
        """The reply; {} if the judgement was killed for its time; {"status": exit status} if two died of themselves."""
        try:
            worker = self.idle.pop()
        except IndexError:
            worker = Worker(self.cfg, self.functions)
        reply = worker.ask(request)
        if reply is None:  # it may have died long ago, of something else
            worker.kill()
            worker = Worker(self.cfg, self.functions)
            reply = worker.ask(request)
        if reply is None:
            worker.kill()
            return {"status": worker.status}
        self.idle.append(worker)
        return reply


class Worker:
    """One judging process. Ready when constructed; dead after `kill`, which garbage collection and exit do as well.

    Attributes:
        child: id of the process that answers. status: exit status of the last one that ended of itself.
    """

    def __init__(self, cfg, functions):
        self.cfg, self.status = cfg, None
        python = [sys.executable, "-P", "-s", "-B"]  # -B: no __pycache__ beside the user's files
        command = [*python, "-c", START, str(PACKAGE), json.dumps(libraries()), str(cfg.timeout_s), str(cfg.verify_s),
                   *functions]  # fmt: skip
        self.process = subprocess.Popen(command, env=environment(cfg.env), stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, start_new_session=True)  # fmt: skip
        self.child = [None]
        self.kill = weakref.finalize(self, _kill, self.process, self.child)
        hello, late = self._read(START_S)
        if hello is None or "error" in hello:
            self.kill()
            why = f"was not ready within {START_S:g} s" if late else "ended before it was ready; it said why above"
            raise UserError(hello["error"] if hello else f"a judging process ({sys.executable}) {why}")
        self.child[0] = hello["child"]

    def ask(self, request):
        """The reply; {} if the judgement took too long and was killed; None if the process ended of itself."""
        limit = self.cfg.timeout_s if request[0] == "function" else WALL * max(1.0, self.cfg.verify_s)
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.status = self.process.wait()
            return None
        reply, late = self._read(limit)
        if late:
            while reply is not None and "child" not in reply:  # an answer that came with the deadline
                reply, _ = self._read(START_S)
        if reply is None:
            self.status = self.process.wait()
            return None
        if "child" not in reply:
            return reply
        self.child[0] = reply["child"]
        if late or reply.get("signal") == signal.SIGPROF:
            return {}
        self.status = -reply["signal"]
        return None

    def _read(self, limit):
        """(the next message, or None if the process has ended; whether the child was killed for being late)."""
        late = threading.Event()

        def expire():
            late.set()
            _signal_group(self.child[0] or self.process.pid)

        timer = threading.Timer(limit, expire)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
            timer.join()
        return (json.loads(line) if line.endswith(b"\n") else None), late.is_set()


def _kill(process, child):
    for group in (child[0], process.pid):
        if group:
            _signal_group(group)
    process.wait()
    process.stdout.close()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def _signal_group(group):
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it is dead already (Linux, macOS)
        os.killpg(group, signal.SIGKILL)
