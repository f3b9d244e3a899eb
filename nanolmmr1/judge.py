"""Judging processes, from both ends: `Workers` and `Worker` hold them, `main` is what runs inside.

The two ends speak JSON, one line a message, over the process's stdin and stdout. Only in here does untrusted text
meet sympy, the recipe's regular expressions and the user's reward functions: a process is killed, with all that it
started, when a judgement misses its deadline; a built-in one may take 2 GiB; and it ends when its parent is gone.
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
MEMORY = 2 << 30  # bytes that a built-in judgement may map on top of what the process holds


class Workers:
    """Up to `count` judging processes, started when needed; the functions ("file.py:name") are loaded into each."""

    def __init__(self, count, timeout_s, functions):
        self.count, self.timeout_s, self.functions = count, timeout_s, functions
        self.idle = []
        self.between = lambda: None  # called while judgements are waited for; may raise, which ends the waiting

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
        """The reply; {} if the worker was killed on the deadline; {"status": exit status} if two died of themselves."""
        try:
            worker = self.idle.pop()
        except IndexError:
            worker = Worker(self.timeout_s, self.functions)
        reply, late = worker.ask(request, self.timeout_s)
        if reply is None and not late:  # it may have died long ago, of something else
            worker.kill()
            worker = Worker(self.timeout_s, self.functions)
            reply, late = worker.ask(request, self.timeout_s)
        if reply is None:
            worker.kill()
            return {} if late else {"status": worker.process.returncode}
        self.idle.append(worker)
        return reply


class Worker:
    """One judging process. Ready when constructed; dead after `kill`, which garbage collection and exit do as well."""

    def __init__(self, timeout_s, functions):
        home = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        # A fixed hash seed fixes the order in which sympy visits terms: every worker gives the same verdict.
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, home)), "PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen([sys.executable, "-m", "nanolmmr1.judge", str(timeout_s), *functions], env=env,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.kill = weakref.finalize(self, _kill, self.process)
        reply, late = self.ask(None, START_S)
        if reply != {}:
            self.kill()
            why = f"was not ready within {START_S:g} s" if late else "ended before it was ready; it said why above"
            raise UserError(reply["error"] if reply else f"a process of {sys.executable} -m nanolmmr1.judge {why}")

    def ask(self, request, timeout_s):
        """(reply, late). Without a reply the process is dead or dying; late: because it missed the deadline."""
        late = threading.Event()

        def expire():
            late.set()
            _signal_group(self.process)

        timer = threading.Timer(timeout_s, expire)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            timer.cancel()
            timer.join()
        return (json.loads(line) if line.endswith(b"\n") and not late.is_set() else None), late.is_set()


def _kill(process):
    _signal_group(process)
    process.wait()
    process.stdout.close()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def _signal_group(process):
    # The group's number cannot have been given away: the process is waited for only after this.
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it is dead already (Linux, macOS)
        os.killpg(process.pid, signal.SIGKILL)


def main(timeout_s, *specs):
    """Answers requests until stdin ends. The first is None: has everything been loaded?"""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the user's functions neither read requests
    os.dup2(2, 1)  # nor print into replies
    sys.stdout = sys.stderr
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are off
    import math_verify  # noqa: F401  now, so that no judgement's deadline pays for it

    # Not above: reward.py imports this file.
    from nanolmmr1.reward import format_reward, mathematical_accuracy

    rules = {"format": format_reward, "accuracy": mathematical_accuracy}
    functions, loaded = {}, {}
    try:
        functions = {spec: load_function(spec) for spec in specs}
    except UserError as error:
        loaded = {"error": str(error)}
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in requests:
        # Should the parent be killed amid a judgement, only this ends it: the default action stops even C code.
        signal.setitimer(signal.ITIMER_REAL, float(timeout_s) + GRACE_S)
        match json.loads(line):
            case None:
                reply = loaded
            case "function", spec, response, row:
                reply = call_function(functions[spec], spec, response, row)
            case kind, text, rule:
                reply = judge(rules[kind], text, rule)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply).encode() + b"\n")


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


if __name__ == "__main__":
    main(*sys.argv[1:])
