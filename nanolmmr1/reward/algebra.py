r"""Equality of two mathematical expressions by math_verify and sympy, in a worker process.

Next: answer_size.py, answers that are too large to compute.
"""

import re
from fractions import Fraction
from typing import Any

from nanolmmr1.reward.values import Near

POINTS = ("17/13", "-29/23", "41/7", "-3/19", "11/31", "-67/9", "103/37", "89/5")
_WHOLE = re.compile(r"(?<![0-9.])([0-9]+)\.0+(?![0-9])")
_IMAGINARY = re.compile(r"(?<![A-Za-z\\{])j(?![A-Za-z_^])")
EXACT = 1e-15  # relative difference of two equal numbers that are not both rational
ROUNDED = 1e-6  # the same if one of them is a decimal


def equal_expressions(answer: str, gold: str, near: Near | None = None) -> bool | None:
    r"""Whether two normalised expressions are equal, or numbers that are near; None if the answer cannot be read.

    Time and memory are unbounded, so it runs in a worker process.

    Raises:
        MemoryError: the comparison exceeds the process's memory limit.
    """
    # Imported here: sympy is slow to import, and the trainer's process does not need it.
    from latex2sympy2_extended import NormalizationConfig  # type: ignore[import-untyped]
    from math_verify import LatexExtractionConfig, parse, verify

    # No timeouts of math_verify: these use signals, which do not interrupt a long C call. judge.py has a deadline.
    options: dict[str, Any] = dict(parsing_timeout=None, fallback_mode="no_fallback", raise_on_error=True,
                                   extraction_mode="first_match")  # fmt: skip
    # Its own reading of units would take the h of \pi r^2 h for hours.
    latex = LatexExtractionConfig(normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False))  # fmt: skip
    try:
        read, expected = (parse(f"${_spelt(text)}$", [latex], **options) for text in (answer, gold))
        if not read or not expected:
            return None
        is_equal = _close if verify(expected, read, timeout_seconds=None, raise_on_error=True) else _same_function
        return is_equal(expected[0], read[0]) or (near is not None and _are_near(read[0], expected[0], near))
    except MemoryError:
        raise
    except Exception:
        return None  # sympy raises nearly any type on pairs that it cannot compare


def _spelt(text: str) -> str:
    """An expression with whole numbers as such, and i for the imaginary unit: math_verify compares 1.0 i as a float."""
    return _IMAGINARY.sub("i", _WHOLE.sub(r"\1", text))


def _close(a: Any, b: Any) -> bool:
    """Whether two expressions that math_verify finds equal are: it rounds numbers to six decimals."""
    from sympy import Basic, Float  # type: ignore[import-untyped]

    if not (isinstance(a, Basic) and isinstance(b, Basic) and getattr(a, "is_number", False) and b.is_number):
        return True
    a, b = a.doit(), b.doit()
    if a.is_Rational and b.is_Rational:
        return bool(a == b or 100 * a == b or a == 100 * b)  # percent
    tolerance = ROUNDED if a.has(Float) or b.has(Float) else EXACT
    a, b = a.evalf(30), b.evalf(30)
    return bool(abs(a - b) <= tolerance * abs(b))


def _are_near(answer: Any, gold: Any, near: Near) -> bool:
    """Whether two expressions are real numbers that are near."""
    from sympy import Expr, Float

    if not (isinstance(answer, Expr) and isinstance(gold, Expr) and answer.is_number and gold.is_number):
        return False
    numbers = [each.doit() for each in (answer, gold)]
    # A decimal is read as a binary number, whose 15 digits are those that were written.
    numbers = [each if each.is_Rational else each.evalf(15 if each.has(Float) else 60) for each in numbers]
    return all(each.is_real and each.is_finite for each in numbers) and near(*map(Fraction, map(str, numbers)))


def _same_function(a: Any, b: Any) -> bool:
    """Whether two expressions have equal values, at points that no identity singles out, wherever both are real.

    As sqrt(1/n) and 1/sqrt(n), which differ for sympy, whose symbols are complex. Constants may be complex.
    """
    from sympy import Expr, I, Rational

    if not (isinstance(a, Expr) and isinstance(b, Expr)):
        return False
    a, b = a.doit(), b.doit()
    if a.has(I) != b.has(I):  # i is read as a symbol
        a, b = (each.subs({s: I for s in each.free_symbols if str(s) == "i"}) for each in (a, b))
    names = sorted(map(str, a.free_symbols))  # symbols of one name may differ in what sympy assumes of them
    if len(names) > 3 or sorted(map(str, b.free_symbols)) != names:
        return False
    met = 0
    for i in range(len(POINTS) if names else 1):
        at = {name: Rational(POINTS[(i + 3 * k) % len(POINTS)]) for k, name in enumerate(names)}
        x, y = (each.subs({s: at[str(s)] for s in each.free_symbols}).doit().evalf(30) for each in (a, b))
        if x.is_finite and y.is_finite and (not names or (x.is_real and y.is_real)):
            if abs(x - y) > EXACT * max(abs(x), abs(y)):
                return False
            met += 1
    return met >= (3 if names else 1)
