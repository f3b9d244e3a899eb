r"""Size of the mathematics in an answer, estimated from its text in linear time before anything is computed.

Sooner or later a model answers 9^{9^{9^9}}, and sympy would compute it. `too_large` limits the digits of numbers, the
terms of multiplied-out sums, nesting depth and length. Answers of competitions stay far below the limits: 2^{2023},
10^{100}, 100!, \binom{100}{50}, \sum_{k=1}^{100} k.

Next: judge.py, worker processes, from the trainer's side.
"""

import math
import re
from typing import NamedTuple

MAX_DIGITS = 12_000  # of a computed number
MAX_TERMS = 300  # of a multiplied-out sum of symbols or roots
MAX_EXPONENT = 10_000  # also the last index of a sum or product
MAX_FACTORIAL = 3_000
MAX_DEPTH = 20
MAX_TOKENS = 250  # numbers, names, signs
MAX_PROSE_TOKENS = 2_000

_TOKEN = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+)|\\(?P<command>[A-Za-z]+|.)|"
                    r"(?P<name>[^\W\d_]+)|(?P<sign>\*\*|\S)", re.DOTALL)  # fmt: skip
_OPEN, _CLOSE = {"(": 1, "[": 1, "{": 1, r"\{": 1}, {")", "]", "}", r"\}"}
_LAYOUT = {r"\left", r"\right", r"\big", r"\Big", r"\displaystyle", r"\,", r"\;", r"\!", r"\ ", r"\limits"}
_ARGUMENTS = {r"\frac": 2, r"\dfrac": 2, r"\tfrac": 2, r"\cfrac": 2, r"\binom": 2, r"\dbinom": 2, r"\tbinom": 2,
              r"\Gamma": 1}  # fmt: skip
_LOOPS = {r"\sum", r"\prod"}  # at most one: nested loops take a product of steps
_UNBOUNDED = {r"\int", r"\iint", r"\iiint", r"\oint", r"\lim", r"\uparrow"}  # their cost cannot be estimated


class TooLarge(Exception):
    """A limit is exceeded."""


class _Size(NamedTuple):
    """Bounds on a value."""

    digits: float = 0.0  # before or after the decimal point
    terms: int = 0  # of symbols and roots; 0 for a number


def too_large(text: str, prose: bool = False) -> bool:
    """Whether a text (LaTeX or plain) takes more time or memory to compute than any sensible answer.

    Args:
        prose: it is a sentence, and only parts of it are mathematics.
    """
    tokens = [match[0] for match in _TOKEN.finditer(text)]
    tokens = [token for token in tokens if token not in _LAYOUT]
    loops = sum(token in _LOOPS for token in tokens)
    if len(tokens) > (MAX_PROSE_TOKENS if prose else MAX_TOKENS) or loops > 1 or not _UNBOUNDED.isdisjoint(tokens):
        return True
    try:
        reader = _Reader(tokens)
        while reader.at < len(tokens):  # an unmatched closing bracket ends a group
            reader.group(0)
            reader.at += 1
    except TooLarge:
        return True
    return False


class _Reader:
    """Recursive-descent parser; every method returns the size of an expression and moves `at` behind it.

    All of them raise TooLarge.
    """

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at = tokens, 0

    def group(self, depth: int) -> _Size:
        """Sums of products of powers, up to a closing bracket."""
        if depth > MAX_DEPTH:
            raise TooLarge
        total: _Size | None = None
        product: _Size | None = None
        last: _Size | None = None
        while self.at < len(self.tokens) and self.tokens[self.at] not in _CLOSE:
            token = self.tokens[self.at]
            if token in "+-=<>,;&|" or token in (r"\pm", r"\mp", r"\\", r"\cup", r"\cap"):
                total, product, last = _sum(total, product, last), None, None
                self.at += 1
            elif token in ("^", "**"):
                self.at += 1
                last = _power(last or _Size(), self.exponent(depth))
            elif token == "!":
                self.at += 1
                last = _factorial(last or _Size())
            else:
                product, last = _product(product, last), self.atom(depth)
        return _sum(total, product, last) or _Size()

    def exponent(self, depth: int) -> _Size:
        """An atom with signs before it and an exponent after it."""
        while self.at < len(self.tokens) and self.tokens[self.at] in "+-":
            self.at += 1
        size = self.atom(depth)
        if self.at < len(self.tokens) and self.tokens[self.at] in ("^", "**"):
            if depth > MAX_DEPTH:
                raise TooLarge
            self.at += 1
            size = _power(size, self.exponent(depth + 1))
        return size

    def atom(self, depth: int) -> _Size:
        """A number, a name, a group or a command with its arguments."""
        if self.at >= len(self.tokens) or self.tokens[self.at] in _CLOSE:
            return _Size()
        token = self.tokens[self.at]
        self.at += 1
        if token in _OPEN:
            size = self.group(depth + 1)
            self.at += 1
            return size
        if token[0] in "0123456789" or token[0] == "." != token:
            return _number(token)
        if token in _ARGUMENTS:
            sizes = [self.atom(depth + 1) for _ in range(_ARGUMENTS[token])]
            if "binom" in token and sizes[0].digits > math.log10(MAX_EXPONENT):
                raise TooLarge
            largest = _Size(max(size.digits for size in sizes), max(size.terms for size in sizes))
            return _factorial(largest) if token == r"\Gamma" else largest
        return _Size(0.0, 1) if token[0] == "\\" or token[0].isalpha() else _Size()


def _number(token: str) -> _Size:
    mantissa, _, exponent = token.lower().partition("e")
    if len(exponent) > 6:
        raise TooLarge
    whole, _, fraction = mantissa.partition(".")
    whole = whole.lstrip("0")
    lead = math.log10(int(whole[:15])) + max(0, len(whole) - 15) if whole else 0.0
    return _checked(_Size(max(lead, len(fraction)) + abs(int(exponent or 0)), 0))


def _checked(size: _Size) -> _Size:
    if size.digits > MAX_DIGITS or size.terms > MAX_TERMS:
        raise TooLarge
    return size


def _sum(total: _Size | None, product: _Size | None, last: _Size | None) -> _Size | None:
    """total + product * last; None stands for no operand."""
    term = _product(product, last)
    if total is None or term is None:
        return total or term
    terms = max(total.terms, 1) + max(term.terms, 1) if total.terms or term.terms else 0
    return _checked(_Size(max(total.digits, term.digits), terms))


def _product(a: _Size | None, b: _Size | None) -> _Size | None:
    if a is None or b is None:
        return a or b
    return _checked(_Size(a.digits + b.digits, max(a.terms, 1) * max(b.terms, 1) if a.terms or b.terms else 0))


def _power(base: _Size, exponent: _Size) -> _Size:
    if exponent.digits > math.log10(MAX_EXPONENT) + 1e-9:
        raise TooLarge
    n = math.ceil(10**exponent.digits - 1e-6)
    terms = math.comb(n + base.terms - 1, base.terms - 1) if base.terms > 1 else base.terms
    return _checked(_Size(base.digits * n, terms))


def _factorial(size: _Size) -> _Size:
    if size.digits > math.log10(MAX_FACTORIAL):
        raise TooLarge
    return _checked(_Size(math.lgamma(10**size.digits + 1) / math.log(10), size.terms))
