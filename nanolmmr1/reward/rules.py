r"""Rule-based rewards: strings in, floats out, and no response can stop the run.

A response earns a format reward (is it shaped as asked?) and an accuracy reward (is its final answer the gold
one?), both 0 or 1, plus whatever the recipe's own functions give. Format, option letters, plain numbers and words
are decided on the spot. Mathematics, regular expressions from the recipe and user functions run in worker
processes, because a model sooner or later answers 9^{9^{9^9}}: a worker that misses its deadline is killed
and replaced.

Next: judge.py, the worker.
"""

import re
from fractions import Fraction

from nanolmmr1.errors import UserError
from nanolmmr1.reward.answer_size import too_large

ANSWER_CHARS = 2000  # no answer is longer; math_verify's patterns take quadratic time in the length

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


def _has_tags(response, *tags):
    return all(response.count(f"<{tag}>") == response.count(f"</{tag}>") == 1 for tag in tags)


def _think_answer(response):
    response = response.strip()
    between = response.partition("</think>")[2].partition("<answer>")[0]
    return (_has_tags(response, "think", "answer") and response.startswith("<think>") and response.endswith("</answer>")
            and not between.strip() and response.index("</think>") < response.index("<answer>"))


def _think_boxed(response):
    response = response.strip()
    return (_has_tags(response, "think") and response.startswith("<think>")
            and last_boxed(response.partition("</think>")[2]) is not None)


FORMATS = {"think_answer": _think_answer, "think_boxed": _think_boxed, "boxed": lambda r: last_boxed(r) is not None}


def format_reward(response, format):
    r"""1.0 if the whole response has the format, else 0.0. The named formats take linear time.

    think_answer: `<think>...</think>`, optional whitespace, `<answer>...</answer>` and nothing else, each tag exactly
    once (LMM-R1, arXiv 2503.07536, allows no whitespace between the blocks; we do, and around them too).
    think_boxed: one `<think>...</think>`, then text with a closed \boxed{...}. boxed: a closed \boxed{...} anywhere.
    Anything else is a regular expression for re.fullmatch with DOTALL, which may take for ever: call it in a worker.
    """
    if format in FORMATS:
        return float(FORMATS[format](response))
    return float(re.fullmatch(format, response, re.DOTALL) is not None)


def check_format(format):
    """Raises: UserError if `format` is neither a named format nor a usable regular expression."""
    if format in FORMATS:
        return
    if re.fullmatch(r"\w*", format):
        raise UserError(f"reward.format={format!r}: one of {', '.join(FORMATS)}, or a regular expression, is needed")
    try:
        re.compile(format, re.DOTALL)
    except re.error as error:
        raise UserError(f"reward.format={format!r} is no regular expression: {error}") from error


def last_boxed(text):
    r"""What stands in the last closed \boxed{...} (balanced braces; the outermost of nested ones), or None. Linear."""
    opened, found = [], None
    for match in _BRACES.finditer(text) if r"\boxed" in text else ():
        if match[1] or match[2] == "{":
            opened.append(match.end() if match[1] else None)
        elif match[2] == "}" and opened:
            start = opened.pop()
            if start is not None:
                found = text[start:match.start()]
    return found


def final_answer(text):
    r"""The final answer in a response, or in a gold answer, without its wrapping.

    Inside the last <answer>...</answer> if there is one, else everywhere: the last \boxed{...}; if none, what follows
    the last </think>. Of that the last ANSWER_CHARS characters, less "The answer is", $...$, \text{...}, **...** and
    a closing full stop.
    """
    before, closed, _ = text.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    if closed and opened:
        text = inside
    boxed = last_boxed(text)
    text = text.rpartition("</think>")[2] if boxed is None else boxed
    text = text[-ANSWER_CHARS:].replace("\u2212", "-").replace("\u2013", "-")
    for _ in range(8):  # deeper wrapping is no answer
        before, text = text, text.strip().removesuffix(".").rstrip()
        for left, right in _FENCES:
            inside = text[len(left):-len(right)]
            if text.startswith(left) and text.endswith(right) and inside and left not in inside:
                text = inside
        if font := _FONT.fullmatch(text):
            text = font[1]
        if (boxed := last_boxed(text)) is not None:
            text = boxed
        if lead := _LEAD.match(text):
            text = text[lead.end():]
        if text == before:
            break
    return text


def accuracy_reward(response, gold):
    r"""1.0 if the response's final answer is the gold one, else 0.0. The first rule that applies decides:

    1. Nothing equals an empty answer.
    2. Gold is an option letter: the same letter, as "B", "(b)", "B.", "B) 12", \text{B}, "the answer is B"; but not two
       letters. A letter never equals a number.
    3. Both are plain numbers (sign, digits, thousands commas, decimals, a leading $): exactly equal.
    4. Gold is words without a digit, or either asks for more than can be computed (answer_size.py): equal as text, that
       is but for case, whitespace and outer punctuation.
    5. Otherwise: equal by math_verify (expressions, sets, intervals, equations, LaTeX with or without $), or as text.

    Gold is always read whole, never as "some number in it", and one that cannot be read is not given away
    (LMM-R1 scores 1 then). Rule 5 has no bound on time or memory: `Judge` runs it in a worker.
    """
    answer, gold = final_answer(response), final_answer(gold)
    decided = plain_accuracy(answer, gold)
    return mathematical_accuracy(answer, gold) if decided is None else decided


def plain_accuracy(answer, gold):
    """Rules 1 to 4 of `accuracy_reward` on two final answers: 0.0, 1.0, or None where mathematics must decide."""
    if not answer or not gold:
        return 0.0
    if (letter := _LETTER.fullmatch(gold)) and letter[1].isupper():
        return float(_chosen_letter(answer) == letter[1])
    numbers = [_NUMBER.fullmatch(text) if len(text) <= 100 else None for text in (answer, gold)]
    if all(numbers):
        a, b = (Fraction(sign + digits.replace(",", "")) for sign, digits in (n.groups() for n in numbers))
        return float(a == b)
    if (not re.search(r"[0-9]", gold) and _is_prose(gold)) or is_too_large(answer) or is_too_large(gold):
        return float(_as_text(answer) == _as_text(gold))
    return None


def mathematical_accuracy(answer, gold):
    """Rule 5 of `accuracy_reward` on two final answers. May run for ever or out of memory.

    Raises:
        MemoryError: the comparison needs more than the process may have.
    """
    # Imported here: the trainer's process never compares and so never pays for sympy.
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # The deadline is the parent's: math_verify's own, by signal, does not stop a long C call.
    options = dict(parsing_timeout=None, fallback_mode="no_fallback", raise_on_error=True)

    def read(text, pieces):
        if not pieces:
            latex = _REPEATING.sub(_as_fraction, _FUNCTIONS.sub(r"\\\1", " ".join(text.split())))
            return parse(f"${latex}$", [LatexExtractionConfig()], extraction_mode="first_match", **options)
        return parse(text, [LatexExtractionConfig(), ExprExtractionConfig()], **options)

    # From prose the last number is taken; from a bare 2\sqrt{3} meters that would be the 2.
    pieces = _FENCED.search(answer) or (_is_prose(answer) and "\\" not in answer)
    try:
        if verify(read(gold, _FENCED.search(gold)), read(answer, pieces), timeout_seconds=None, raise_on_error=True):
            return 1.0
    except MemoryError:
        raise
    except Exception:
        pass  # sympy raises nearly every type on pairs that it cannot compare; they may still be equal as text
    return float(_as_text(answer) == _as_text(gold))


def _chosen_letter(answer):
    if match := _LETTER.fullmatch(answer):
        return match[1].upper()
    match = _LETTER_AND_TEXT.fullmatch(answer)
    if match and set(re.findall(r"\b([A-Z])\)", answer)) <= {match[1]}:
        return match[1]
    found = _LETTER_IN_PROSE.findall(" ".join(re.sub(r"\\[A-Za-z]+|[*${}]", " ", answer).split()))
    return found[-1] if found else None


def is_too_large(text):
    return too_large(text, _is_prose(text))


def _is_prose(text):
    return _PROSE.search(_FUNCTIONS.sub(" ", _COMMANDS.sub(" ", text))) is not None


def _as_text(text):
    return "".join(text.split()).casefold().strip(".,;:!?'\"`")


def _as_fraction(match):
    # math_verify reads 0.\overline{3} as 0.
    whole, fixed, period = match.groups()
    value = Fraction(f"{whole or 0}.{fixed or 0}") + Fraction(int(period), 10 ** len(fixed) * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
