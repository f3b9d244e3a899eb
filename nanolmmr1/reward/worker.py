"""The worker process: the verifier, the recipe's regular expressions and the user's reward functions.

The process imports and warms up the verifier once, then forks a child that answers requests. A child that takes too
long is killed with everything that it started, and the next one is forked within milliseconds. If a child exits
without being killed, the worker exits with the child's status.

Messages are JSON, one line each. A new child sends {"child": process id}, with "signal" if a signal killed the child
before it, and "error" if it cannot start. To a Question or a Call it replies {"value": result}, {"error": message} or
{"memory": limit}.

Next: ../update/objective.py, advantages and losses.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple

from nanolmmr1.errors import UserError
from nanolmmr1.reward.algebra import equal_expressions
from nanolmmr1.reward.formats import format_reward
from nanolmmr1.reward.rules import NO_RULE, GoldRule, Verdict, decide

GRACE_S = 2.0  # after the deadline of a user function, a child ends itself: its trainer is gone
MEMORY = 2 << 30  # bytes that a built-in rule may map in addition to those already mapped
WARM_UP = ((r"\frac{1}{2}", "0.5"), ("x + 1", "1+x"), (r"2\sqrt{3}", r"\sqrt{12}"), ("(1,2]", "(1,2)"))
Message = dict[str, Any]
Rule = Callable[[], Verdict]


class Question(NamedTuple):
    """A built-in rule applied to a text. Equal questions have equal answers."""

    rule: str  # "format" or "accuracy"
    text: str  # the response, or its final answer
    expected: str  # the format, or gold's final answer
    options: tuple[str, ...] = ()  # of a multiple-choice problem
    gold_rule: GoldRule = NO_RULE


class Call(NamedTuple):
    """A call of a user's reward function."""

    function: str  # path/to/file.py:function
    response: str
    row: dict[str, Any]


def main(timeout_s: str, verify_s: str, *functions: str) -> None:
    """Import the verifier, then keep one child running until stdin is closed.

    Args:
        timeout_s: deadline of a user function. verify_s: CPU seconds of a built-in rule.
        functions: path/to/file.py:function each.
    """
    requests, replies = os.dup(0), os.fdopen(os.dup(1), "wb", 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # user functions must not read requests
    os.dup2(2, 1)  # or print into replies
    sys.stdout = sys.stderr
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off

    for answer, gold in WARM_UP:
        equal_expressions(answer, gold)  # imports sympy's modules and fills the parser's tables
    hello: Message = {}
    while True:
        child = os.fork()
        if not child:
            os.setpgid(0, 0)  # a process group, to be killed with everything that it starts
            with contextlib.suppress(BrokenPipeError):  # the trainer is gone
                serve(os.fdopen(requests, "rb"), replies, float(timeout_s), float(verify_s), functions, hello)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status >= 0:
            os._exit(status)
        hello = {"signal": -status}


def serve(
    requests: IO[bytes], replies: IO[bytes], timeout_s: float, verify_s: float, functions: Sequence[str], hello: Message
) -> None:
    """In the child: load the user's functions, send the first message, and answer requests until there are no more."""

    def send(message: Message) -> None:
        replies.write(json.dumps(message).encode() + b"\n")

    hello = {"child": os.getpid()} | hello
    try:
        loaded = {function: load_function(function) for function in functions}
    except UserError as error:
        send(hello | {"error": str(error)})
        return
    send(hello)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in requests:
        # The default action of both timers' signals ends the process, even inside C code.
        match json.loads(line):
            case {"function": function, "response": response, "row": row}:
                # The trainer kills a child on the deadline. This timer ends it if the trainer was killed.
                signal.setitimer(signal.ITIMER_REAL, timeout_s + GRACE_S)
                reply = call_function(loaded[function], function, response, row)
                signal.setitimer(signal.ITIMER_REAL, 0)
            case {"rule": _}:
                signal.setitimer(signal.ITIMER_PROF, verify_s)  # CPU time
                reply = apply_rule(functools.partial(answer_question, Question(**json.loads(line))))
                signal.setitimer(signal.ITIMER_PROF, 0)
        send(reply)


def answer_question(question: Question) -> Verdict:
    """The verdict of a built-in rule."""
    if question.rule == "format":
        return Verdict(format_reward(question.text, question.expected), "text")
    rule = GoldRule(*question.gold_rule)  # JSON makes a list of it
    verdict = decide(question.text, question.expected, question.options, equal_expressions, rule)
    assert verdict is not None, "mathematics is possible here"
    return verdict


def apply_rule(rule: Rule) -> Message:
    """{"value": verdict}, or {"memory": MEMORY} if the rule exceeds the limit."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":  # elsewhere only time is limited
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        # Relative and lifted afterwards, because a user function may import torch, which maps tens of GiB.
        limit = mapped + MEMORY if limits[0] == resource.RLIM_INFINITY else min(mapped + MEMORY, limits[0])
        resource.setrlimit(resource.RLIMIT_AS, (limit, limits[1]))
    try:
        return {"value": rule()}
    except MemoryError:
        return {"memory": MEMORY}
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def load_function(spec: str) -> Callable[..., Any]:
    """Load path/to/file.py:function.

    Raises:
        UserError: there is no such file or function, or the file cannot be loaded.
    """
    path, _, name = spec.rpartition(":")
    function = getattr(_load_file(path), name, None)
    if not callable(function):
        raise UserError(f"reward function {spec}: the file has no function {name!r}")
    return function


@functools.cache
def _load_file(path: str) -> ModuleType:
    if not Path(path).is_file():
        raise UserError(f"reward functions: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path, path)
    if spec is None or spec.loader is None:
        raise UserError(f"reward functions: {path} is no Python file (.py)")
    if (folder := os.path.dirname(path)) not in sys.path:
        sys.path.append(folder)  # for modules beside it; last, so that they hide nothing
    # Registered before it runs, as import does: dataclasses look their module up.
    sys.modules[path] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"reward functions: {path} cannot be loaded: {_explain(error, path)}") from error
    return module


def call_function(function: Callable[..., Any], spec: str, response: str, row: dict[str, Any]) -> Message:
    """{"value": {name: weighted number, name/part: logged number}}, or {"error": message with the failing line}."""
    path, _, name = spec.rpartition(":")
    try:
        value = function(response, row)
        parts = value if isinstance(value, dict) and value else {"overall": value}
        parts = {part: _number(number, value) for part, number in parts.items()}
        overall = parts.pop("overall", sum(parts.values()))
        return {"value": {name: overall} | {f"{name}/{part}": number for part, number in parts.items()}}
    except (Exception, SystemExit) as error:
        return {"error": _explain(error, path)}


def _number(value: object, returned: object) -> float:
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    raise TypeError(f"it returned {returned!r:.80}: a finite number, or a dict of them, is needed")


def _explain(error: BaseException, path: str) -> str:
    """The error, and the last line of the user's file that it passed through."""
    lines = [f"line {f.lineno}: {f.line}" for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    if isinstance(error, SyntaxError):
        lines.append(f"line {error.lineno}: {(error.text or '').strip()}")
    message = traceback.format_exception_only(error)[-1].strip()
    return f"{message} ({lines[-1]})" if lines else message
