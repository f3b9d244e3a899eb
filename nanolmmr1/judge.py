"""Judging processes, from both ends: `Workers` and `Worker` hold them, `main` is what runs inside.

Only in here does untrusted text meet sympy, the recipe's regular expressions and the user's reward functions. A process
runs this package, what is installed, and the user's files: nothing of the current folder, and no secret of the
environment. It imports and warms up the verifier once, then forks a child that answers. A child that takes too long is
killed, with all that it started, and another is forked within milliseconds. A built-in judgement has a limit of CPU
time, so that a busy machine changes no verdict, and may take 2 GiB; a user function has a deadline. Both end when the
trainer is gone.

The two ends speak JSON, one line a message, over the process's stdin and stdout. Each child begins by saying who it is:
{"child": process id, "signal": what killed the one before it, "error": why it cannot start}. Where a child ends of
itself, so does the whole process, with its status.
"""

import contextlib
import functools
import importlib.util
import json
import logging
import math
import numbers
import os
import resource
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from nanolmmr1.config import UserError

START_S = 120.0  # to import sympy and the user's files, perhaps from a cold network disk
PAUSE_S = 0.5  # between two looks at whether to go on waiting
GRACE_S = 2.0  # past the deadline, after which a process whose parent is gone ends itself
WALL = 10  # seconds of the clock that a built-in judgement has for each of CPU time, at least as many in all
MEMORY = 2 << 30  # bytes that a built-in judgement may map on top of what the process holds
MOST_WORKERS = 16
PACKAGE = Path(__file__).resolve().parent
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
from nanolmmr1.judge import main
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


def main(timeout_s, verify_s, *specs):
    """Imports the verifier, then keeps one child at work until stdin ends."""
    requests, replies = os.dup(0), os.fdopen(os.dup(1), "wb", 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the user's functions neither read requests
    os.dup2(2, 1)  # nor print into replies
    sys.stdout = sys.stderr
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are off

    # Not above: reward.py imports this file.
    from nanolmmr1.reward import format_reward, mathematical_accuracy

    for answer, gold in ((r"\frac{1}{2}", "0.5"), ("x + 1", "$1+x$"), (r"2\sqrt{3}", r"\sqrt{12}"), ("(1,2]", "(1,2)")):
        mathematical_accuracy(answer, gold)  # imports sympy's parts and fills the parser's tables
    rules = {"format": format_reward, "accuracy": mathematical_accuracy}
    before = {}
    while True:
        child = os.fork()
        if not child:
            os.setpgid(0, 0)  # a group of its own, with all that it will start
            with contextlib.suppress(BrokenPipeError):  # the trainer is gone
                serve(os.fdopen(requests, "rb"), replies, rules, float(timeout_s), float(verify_s), specs, before)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status >= 0:
            os._exit(status)
        before = {"signal": -status}


def serve(requests, replies, rules, timeout_s, verify_s, specs, before):
    """In a child: say hello, then answer requests until there are no more."""

    def say(reply):
        replies.write(json.dumps(reply).encode() + b"\n")

    hello = {"child": os.getpid()} | before
    try:
        functions = {spec: load_function(spec) for spec in specs}
    except UserError as error:
        say(hello | {"error": str(error)})
        return
    say(hello)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in requests:
        match json.loads(line):
            case "function", spec, response, row:
                # Should the trainer be killed amid it, only this ends it: the default action stops even C code.
                signal.setitimer(signal.ITIMER_REAL, timeout_s + GRACE_S)
                reply = call_function(functions[spec], spec, response, row)
                signal.setitimer(signal.ITIMER_REAL, 0)
            case kind, text, rule:
                signal.setitimer(signal.ITIMER_PROF, verify_s)  # CPU time; its default action stops even C code
                reply = judge(rules[kind], text, rule)
                signal.setitimer(signal.ITIMER_PROF, 0)
        say(reply)


def judge(function, text, rule):
    """{"value": score} of a built-in rule, or {"memory": MEMORY} if it wanted more than that."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":  # elsewhere the deadline alone must do
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        # Relative and lifted again, for a user's function may need torch, which maps tens of GiB.
        limit = mapped + MEMORY if limits[0] == resource.RLIM_INFINITY else min(mapped + MEMORY, limits[0])
        resource.setrlimit(resource.RLIMIT_AS, (limit, limits[1]))
    try:
        return {"value": function(text, rule)}
    except MemoryError:
        return {"memory": MEMORY}
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def load_function(spec):
    """The function of "path/to/file.py:function".

    Raises:
        UserError: no such file or function, or the file fails.
    """
    path, _, name = spec.rpartition(":")
    function = getattr(_load_file(path), name, None)
    if not callable(function):
        raise UserError(f"reward function {spec}: the file has no function {name!r}")
    return function


@functools.cache
def _load_file(path):
    if not Path(path).is_file():
        raise UserError(f"reward functions: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path, path)
    if spec is None:
        raise UserError(f"reward functions: {path} is no Python file (.py)")
    if (folder := os.path.dirname(path)) not in sys.path:
        sys.path.append(folder)  # of modules beside it; last, so that they hide nothing
    # Registered first, as import does: dataclasses look their module up.
    sys.modules[path] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"reward functions: {path} cannot be loaded: {_explain(error, path)}") from error
    return module


def call_function(function, spec, response, row):
    """{"value": {name: weighted value, name/part: logged value}}, or {"error": message} with the line at fault."""
    path, _, name = spec.rpartition(":")
    try:
        value = function(response, row)
        parts = value if isinstance(value, dict) and value else {"overall": value}
        parts = {part: _number(number, value) for part, number in parts.items()}
        overall = parts.pop("overall", sum(parts.values()))
        return {"value": {name: overall} | {f"{name}/{part}": number for part, number in parts.items()}}
    except (Exception, SystemExit) as error:
        return {"error": _explain(error, path)}


def _number(value, returned):
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    raise TypeError(f"it returned {returned!r:.80}: a finite number, or a dict of them, is needed")


def _explain(error, path):
    lines = [f"line {f.lineno}: {f.line}" for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    if isinstance(error, SyntaxError):
        lines.append(f"line {error.lineno}: {(error.text or '').strip()}")
    what = traceback.format_exception_only(error)[-1].strip()
    return f"{what} ({lines[-1]})" if lines else what

