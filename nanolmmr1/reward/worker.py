"""What runs inside a judging process: the verifier, the recipe's regular expressions and the user's functions.

The process imports and warms up the verifier once, then forks a child that answers. A child that takes too long is
killed, with all that it started, and another is forked within milliseconds. Where a child ends of itself, so does the
whole process, with its status.
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
import sys
import traceback
from pathlib import Path

from nanolmmr1.errors import UserError
from nanolmmr1.reward.rules import format_reward, mathematical_accuracy

GRACE_S = 2.0  # past the deadline, after which a process whose parent is gone ends itself
MEMORY = 2 << 30  # bytes that a built-in judgement may map on top of what the process holds


def main(timeout_s, verify_s, *specs):
    """Imports the verifier, then keeps one child at work until stdin ends."""
    requests, replies = os.dup(0), os.fdopen(os.dup(1), "wb", 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the user's functions neither read requests
    os.dup2(2, 1)  # nor print into replies
    sys.stdout = sys.stderr
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are off

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

