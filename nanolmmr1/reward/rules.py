r"""Rules that score a response: pure functions from strings to 0.0 or 1.0.

A response earns a format reward (does it have the requested shape?) and an accuracy reward (is its final answer the
gold one?). The trainer's process decides format, option letters, plain numbers and words itself. Mathematics and
regular expressions run in worker processes, because sooner or later a model answers 9^{9^{9^9}}: a worker that misses
its deadline is killed and replaced.

Next: answer_size.py, answers that are too large to compute.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from nanolmmr1.errors import UserError
from nanolmmr1.reward.answer_size import too_large

ANSWER_CHARS = 2000  # longer answers are cut: math_verify's patterns take quadratic time

_BRACES = re.compile(r"(\\boxed\s*\{)|\\.|([{}])", re.DOTALL)
_FENCES = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))
_FONT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\s*\{([^{}]*)\}")
_LEAD = re.compile(r"(?:the\s+)?(?:(?:final|correct)\s+)?answer(?:\s+is\b|\s*[:=])\s*:?", re.IGNORECASE)
_LETTER = re.compile(r"\(?([A-Za-z])\)?")
_LETTER_AND_TEXT = re.compile(r"\(?([A-Z])(?:\)[.:]?|[.:]\s)\s*\S.*", re.DOTALL)
_LETTER_IN_PROSE = re.compile(r"(?i:\b(?:answer|option|choice)(?:\s+is)?)\s*:?\s*\(?([A-Z])\b(?!['’])"
                              r"(?!\)?\s*(?:or\b|and\b|[,/&])\s*\(?[A-Z]\b)")
_NUMBER = re.compile(r"([-+]?)(?:\\?\$)?((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
_FENCED = re.compile(r"\$|\\\(|\\\[")
_COMMANDS = re.compile(r"\\(?:begin|end|operatorname|text|math[a-z]+)\s*\{[^{}]*\}|\\[A-Za-z]+")
_FUNCTIONS = re.compile(r"(?<![\\A-Za-z])(pi|sin|cos|tan|ln|log|exp)(?![A-Za-z])")
_PROSE = re.compile(r"[A-Za-z]{3}|[A-Za-z]{2}\s+[A-Za-z]{2}")
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\overline\s*\{([0-9]+)\}")


def _has_tags(response: str, *tags: str) -> bool:
    return all(response.count(f"<{tag}>") == response.count(f"</{tag}>") == 1 for tag in tags)


def _think_answer(response: str) -> bool:
    response = response.strip()
    between = response.partition("</think>")[2].partition("<answer>")[0]
    return (
        _has_tags(response, "think", "answer")
        and response.startswith("<think>")
        and response.endswith("</answer>")
        and not between.strip()
        and response.index("</think>") < response.index("<answer>")
    )


def _think_boxed(response: str) -> bool:
    response = response.strip()
    boxed = last_boxed(response.partition("</think>")[2])
    return _has_tags(response, "think") and response.startswith("<think>") and boxed is not None


FORMATS: dict[str, Callable[[str], bool]] = {
    "think_answer": _think_answer,
    "think_boxed": _think_boxed,
    "boxed": lambda response: last_boxed(response) is not None,
}


def format_reward(response: str, format: str) -> float:
    r"""1.0 if the whole response has the format, else 0.0.

    Args:
        format: one of these, or a regular expression.
            think_answer: `<think>...</think>`, optional whitespace, `<answer>...</answer>` and nothing else, each tag
            exactly once. LMM-R1 (arXiv 2503.07536) allows no whitespace between the blocks; we do, and around them too.
            think_boxed: one `<think>...</think>`, then text with a closed \boxed{...}.
            boxed: a closed \boxed{...} anywhere.
            These take linear time. A regular expression (re.fullmatch with DOTALL) may never end: run it in a worker.
    """
    if format in FORMATS:
        return float(FORMATS[format](response))
    return float(re.fullmatch(format, response, re.DOTALL) is not None)


def check_format(format: str) -> None:
    """Check the recipe's format.

    Raises:
        UserError: it is neither a named format nor a valid regular expression.
    """
    if format in FORMATS:
        return
    if re.fullmatch(r"\w*", format):
        raise UserError(f"reward.format={format!r}: one of {', '.join(FORMATS)}, or a regular expression, is needed")
    try:
        re.compile(format, re.DOTALL)
    except re.error as error:
        raise UserError(f"reward.format={format!r} is no regular expression: {error}") from error


def last_boxed(text: str) -> str | None:
    r"""The content of the last closed \boxed{...}, or None. Linear time.

    Braces are balanced; of nested boxes the outermost counts.
    """
    starts: list[int | None] = []  # of open braces: where the content of a box starts, None for other braces
    content = None
    for match in _BRACES.finditer(text) if r"\boxed" in text else ():
        if match[1] or match[2] == "{":
            starts.append(match.end() if match[1] else None)
        elif match[2] == "}" and starts:
            start = starts.pop()
            if start is not None:
                content = text[start : match.start()]
    return content


def final_answer(text: str) -> str:
    r"""The final answer in a response, or in a gold answer, without its wrapping.

    It is searched inside the last <answer>...</answer>, or in the whole text if there is none: the last \boxed{...},
    else the text after the last </think>. Of this we keep the last ANSWER_CHARS characters and strip "The answer is",
    $...$, \text{...}, **...** and a closing full stop.
    """
    before, closed, _ = text.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    if closed and opened:
        text = inside
    boxed = last_boxed(text)
    text = text.rpartition("</think>")[2] if boxed is None else boxed
    text = text[-ANSWER_CHARS:].replace("\u2212", "-").replace("\u2013", "-")
    for _ in range(8):  # deeper wrapping is not an answer
        before, text = text, text.strip().removesuffix(".").rstrip()
        for left, right in _FENCES:
            inside = text[len(left) : -len(right)]
            if text.startswith(left) and text.endswith(right) and inside and left not in inside:
                text = inside
        if font := _FONT.fullmatch(text):
            text = font[1]
        if (boxed := last_boxed(text)) is not None:
            text = boxed
        if lead := _LEAD.match(text):
            text = text[lead.end() :]
        if text == before:
            break
    return text


def plain_accuracy(answer: str, gold: str) -> float | None:
    r"""Compare two final answers without mathematics. The first rule that applies decides:

    1. Nothing equals an empty answer.
    2. Gold is an option letter: the answer is the same letter, as "B", "(b)", "B.", "B) 12", \text{B} or "the answer is
       B", and not two letters. A letter never equals a number.
    3. Both are plain numbers (sign, digits, thousands commas, decimals, a leading $): they are exactly equal.
    4. Gold is words without a digit, or one of the two is too large to compute (answer_size.py): they are equal as
       text, ignoring case, whitespace and outer punctuation.

    Gold is always read whole, never as "some number in it". If it cannot be read, no answer is right (LMM-R1 scores 1).

    Returns:
        0.0 or 1.0, or None if `mathematical_accuracy` must decide.
    """
    if not answer or not gold:
        return 0.0
    if (letter := _LETTER.fullmatch(gold)) and letter[1].isupper():
        return float(_chosen_letter(answer) == letter[1])
    numbers = _plain_number(answer), _plain_number(gold)
    if None not in numbers:
        return float(numbers[0] == numbers[1])
    if (not re.search(r"[0-9]", gold) and _is_prose(gold)) or is_too_large(answer) or is_too_large(gold):
        return float(_as_text(answer) == _as_text(gold))
    return None


def mathematical_accuracy(answer: str, gold: str) -> float:
    """Compare two final answers by math_verify (expressions, sets, intervals, equations, LaTeX), else as text.

    Time and memory are unbounded, so it runs in a worker process.

    Raises:
        MemoryError: the comparison exceeds the process's memory limit.
    """
    # Imported here: sympy is slow to import, and the trainer's process does not need it.
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # No timeouts of math_verify: these use signals, which do not interrupt a long C call. judge.py has a deadline.
    options: dict[str, Any] = dict(parsing_timeout=None, fallback_mode="no_fallback", raise_on_error=True)

    def read(text: str, whole: bool) -> Any:
        if whole:
            latex = _REPEATING.sub(_as_fraction, _FUNCTIONS.sub(r"\\\1", " ".join(text.split())))
            return parse(f"${latex}$", [LatexExtractionConfig()], extraction_mode="first_match", **options)
        return parse(text, [LatexExtractionConfig(), ExprExtractionConfig()], **options)

    # From prose math_verify takes the last number; from a bare 2\sqrt{3} meters that would be the 2.
    whole = not _FENCED.search(answer) and ("\\" in answer or not _is_prose(answer))
    try:
        expected = read(gold, not _FENCED.search(gold))
        if verify(expected, read(answer, whole), timeout_seconds=None, raise_on_error=True):
            return 1.0
    except MemoryError:
        raise
    except Exception:
        pass  # sympy raises nearly any type on pairs that it cannot compare; they may still be equal as text
    return float(_as_text(answer) == _as_text(gold))


def _chosen_letter(answer: str) -> str | None:
    """The option letter that an answer chooses, or None."""
    if match := _LETTER.fullmatch(answer):
        return match[1].upper()
    match = _LETTER_AND_TEXT.fullmatch(answer)
    if match and set(re.findall(r"\b([A-Z])\)", answer)) <= {match[1]}:
        return match[1]
    letters = _LETTER_IN_PROSE.findall(" ".join(re.sub(r"\\[A-Za-z]+|[*${}]", " ", answer).split()))
    return letters[-1] if letters else None


def _plain_number(text: str) -> Fraction | None:
    match = _NUMBER.fullmatch(text) if len(text) <= 100 else None
    return Fraction(match[1] + match[2].replace(",", "")) if match else None


def is_too_large(text: str) -> bool:
    """Whether a final answer is too large to compute; see answer_size.py."""
    return too_large(text, _is_prose(text))


def _is_prose(text: str) -> bool:
    return _PROSE.search(_FUNCTIONS.sub(" ", _COMMANDS.sub(" ", text))) is not None


def _as_text(text: str) -> str:
    return "".join(text.split()).casefold().strip(".,;:!?'\"`")


def _as_fraction(match: re.Match[str]) -> str:
    r"""A repeating decimal as \frac{a}{b}: math_verify reads 0.\overline{3} as 0."""
    whole, fixed, period = match.groups()
    value = Fraction(f"{whole or 0}.{fixed or 0}") + Fraction(int(period), 10 ** len(fixed) * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
