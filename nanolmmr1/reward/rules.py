r"""The accuracy rule: whether a response's final answer is the gold one. Pure functions of text.

Both texts are normalised (normal.py). Gold decides how they are compared: as option letters, as numbers with units, as
lists and tuples part by part, as words, or as mathematics. The trainer's process decides all but the last. Mathematics
runs in worker processes, because sooner or later a model answers 9^{9^{9^9}}: a worker that misses its deadline is
killed and replaced.

Next: formats.py, the shape of a response.
"""

import functools
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from nanolmmr1.reward.answer_size import MAX_DEPTH, too_large
from nanolmmr1.reward.choice import chosen_letters, gold_letters, option_values
from nanolmmr1.reward.normal import closing, strip_outside
from nanolmmr1.reward.values import equal_values, read_value, split_unit

REASONS = ("parsed", "letter", "value", "text", "unread", "deadline")
MOST_WORDS = 12  # of a gold answer that only the same text equals

_COMMANDS = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
_PROSE = re.compile(r"[A-Za-z]{3}|[A-Za-z]{2}\s+[A-Za-z]{2}|[\u3040-\u9fff\uac00-\ud7af]|[\u0400-\u04ff]{2}")
_WORD = re.compile(r"(?:[A-Za-z'\-]{3,}|is|of|to|in|so|we|as|at|by|it|be|an|if|my|on|no|do)[.,;:!?]*")
_TOKEN = re.compile(r"(\\begin\{|[(\[{]|\\\{)|(\\end\{|[)\]}]|\\\})|"
                    r"(\s*(?:\\cup(?![A-Za-z])|,(?:\s*(?:and|or)\b)?|;|\b(?:and|or)\b|[和或与及])\s*)")  # fmt: skip
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
_LOOSE = re.compile(r",\s|;|\b(?:and|or)\b")
_NUMBERED = re.compile(r"(?:(?<=[\s,;])|^)(?:\(([1-9])\)|([1-9])\)|Part\s+([1-9])\s*[:.)])\s*[,;:.]?\s*")
_ABOUT = re.compile(r"(?:\\approx|\\sim|≈|~|=|"
                    r"\b(?:about|approximately|approx\.?|roughly|around|nearly|almost|equals)\b|"
                    r"约[为是]?|大约|(?:一|总)?共有?(?=\s*[0-9])|近似[为于]?|"
                    r"\+(?=\s*\\?[0-9A-Za-z]))\s*")  # fmt: skip
_NAME = re.compile(r"(?:m\s*)?(?:\\(?:angle|triangle|overline|widehat|vec|text)\s*\{?\s*[A-Za-z]{1,4}\s*\}?|"
                   r"\\?[A-Za-z]+(?:\s*_\s*\{?[\\\w ]{1,24}\}?|'{1,2})?(?:\s*\([A-Za-z](?:,\s?[A-Za-z]){0,3}\))?|"
                   r"\([A-Za-z](?:,\s?[A-Za-z]){1,3}\)|[A-Za-z][A-Za-z ]{0,39})")  # fmt: skip
_IN = re.compile(rf"({_NAME.pattern})\s*\\in(?![A-Za-z])\s*")
_NAMES_AGAIN = re.compile(r"=|\\in(?![A-Za-z])")
_RELATION = re.compile(r"\s*(\\(?:le|ge)(?![A-Za-z])|[<>])\s*")
_VARIABLE = re.compile(r"\\?[A-Za-z]+(?:_\{?\w\}?)?|[A-Za-z]\s*\([A-Za-z]\)")
_BUILDER = re.compile(r"\\?\{\s*\\?[A-Za-z]+\s*"
                      r"(?:\\in\s*\\mathbb\s*\{?[RQZN]\}?\s*)?[|:]\s*(.+?)\s*\\?\}")
_REMARK = re.compile(r"(.*\S)\s+\(([^()]*)\)")  # 12 (people)
_REALS = re.compile(r"\\mathbb\s*\{?R\}?|(?:all\s+)?real(?:\s+numbers?)?|all\s+reals|全体实数|"
                    r"\(-\\infty\s*,\s*\+?\\infty\s*\)")
_RATIO = re.compile(r"([0-9.]+)\s*:\s*([0-9.]+)(?:\s*:\s*([0-9.]+))?(?:\s*:\s*([0-9.]+))?")
_SIDE_BY_SIDE = re.compile(r"[0-9]\s+[0-9]|\([0-9]+\)\s*[0-9]")  # math_verify adds them: 1 20 is 21
_BASE = re.compile(r"[0-9A-Fa-f]+\s*_\s*\{?\s*[0-9]+\s*\}?")  # 110_2
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_INDEX = re.compile(r"([_^])\{(\w)\}")
_CJK = re.compile(r"[\u3040-\u9fff\uac00-\ud7af]")
_CLOCK = re.compile(r"\b[0-2]?[0-9]:[0-5][0-9]\b(?!\s*:)")


class Verdict(NamedTuple):
    """Whether an answer is right, and the rule that decided."""

    score: float
    reason: str  # one of REASONS


class Node(NamedTuple):
    """A list of parts, or a tuple or an interval with its brackets."""

    kind: str  # "list", in any order; "ordered"; or the brackets, as in "(]"
    items: "tuple[Tree, ...]"


Tree = str | Node
Equal = Callable[[str, str], bool | None]


class Undecided(Exception):
    """The texts must be compared as mathematics, and that is not possible here."""


def decide(answer: str, gold: str, options: Sequence[str] = (), equal: Equal | None = None) -> Verdict | None:
    r"""Compare two normalised final answers. The first rule that applies decides:

    1. Nothing equals an empty answer.
    2. Equal as text, ignoring case, whitespace and outer punctuation.
    3. Gold is an option letter, a letter with its text, or several letters: the answer chooses the same ones, or is the
       value of that option and of no other. If gold is a value, the letter of an option with this value equals it.
    4. Lists are equal part by part in any order, tuples and intervals in order and by their brackets. A gold of several
       parts is not met by one of them, nor one by several. Inequalities are intervals.
    5. Numbers with units are equal exactly; see values.py.
    6. Gold is words: equal as text only.
    7. Mathematics: `equal` decides.

    Gold is read whole, never as "some number in it". Of a sentence, the last formula counts.

    Args:
        options: texts of a multiple-choice problem's options, in order.
        equal: compares two expressions; without it, the result is None if rule 7 is needed.
    """
    if not answer or not gold:
        return Verdict(0.0, "unread")
    if as_text(answer) == as_text(gold):
        return Verdict(1.0, "letter" if gold_letters(gold) else "value" if read_value(gold) else "text")
    try:
        letters = gold_letters(gold)
        if letters:
            return _decide_letters(answer, *letters, options, equal)
        verdict = _Comparison(equal).verdict(answer, gold)
        chosen = chosen_letters(answer) if options and not verdict.score else ""
        if value := option_values(options).get(chosen):
            verdict = max(verdict, _Comparison(equal).verdict(value, gold), key=lambda each: each.score)
        return verdict
    except Undecided:  # parts are no larger than the whole
        return Verdict(0.0, "unread") if is_too_large(answer) or is_too_large(gold) else None


def _decide_letters(answer: str, letters: str, text: str, options: Sequence[str], equal: Equal | None) -> Verdict:
    chosen, values = chosen_letters(answer), option_values(options)
    if chosen or len(letters) > 1:
        said = gold_letters(answer)  # with text, as in (B) 12; the text of another option contradicts its letter
        others = [as_text(value) for letter, value in values.items() if letter != letters]
        contradiction = said and said[1] and as_text(said[1]) in others
        return Verdict(float(chosen == letters and not contradiction), "letter")
    wanted = text or values.get(letters, "")
    if not wanted:
        return Verdict(0.0, "letter")
    comparison = _Comparison(equal)
    verdict = comparison.verdict(answer, wanted)
    others = [value for letter, value in values.items() if letter != letters]
    if verdict.score and any(comparison.verdict(other, wanted).score for other in others):
        return Verdict(0.0, "letter")  # two options have this value
    return verdict


class _Comparison:
    """A comparison of two answers; `reason` is the last rule that decided a part."""

    def __init__(self, equal: Equal | None) -> None:
        self.equal, self.reason = equal, "text"

    def verdict(self, answer: str, gold: str) -> Verdict:
        score = float(self.match(tree(answer, is_prose(gold)), tree(gold, True)))
        return Verdict(score, self.reason)

    def match(self, answer: Tree, gold: Tree) -> bool:
        answer, gold = _only(answer), _only(gold)
        if isinstance(answer, str) and isinstance(gold, str):
            return self.match_leaves(answer, gold)
        if isinstance(answer, str) or isinstance(gold, str):
            self.reason = "value"
            return False
        if {answer.kind, gold.kind} <= {"list", "ordered"} and {answer.kind, gold.kind} != {"ordered"}:
            return self.match_sets(list(answer.items), list(gold.items))
        if answer.kind == "list" and (point := _point(answer.items)):
            answer = point
        elif gold.kind == "list" and (point := _point(gold.items)):
            gold = point
        same = answer.kind == gold.kind and len(answer.items) == len(gold.items)
        return same and all(self.match(a, g) for a, g in zip(answer.items, gold.items, strict=True))

    def match_sets(self, answers: list[Tree], golds: list[Tree]) -> bool:
        if len(answers) != len(golds):
            self.reason = "value"
            return False
        for gold in golds:
            for i, answer in enumerate(answers):
                if self.match(answer, gold):
                    del answers[i]
                    break
            else:
                return False
        return True

    def match_leaves(self, answer: str, gold: str) -> bool:
        (name, answer_side), (gold_name, gold_side) = _split_name(answer), _split_name(gold)
        if bool(name or "=" not in answer) and bool(gold_name or "=" not in gold):
            if name and gold_name and as_text(name) != as_text(gold_name):
                return self.match_expressions(answer, gold)  # y = 2x is x = y/2
            answer, gold = answer_side, gold_side
        if as_text(answer) == as_text(gold):
            return True
        value, gold_value = read_value(answer), read_value(gold)
        if value and gold_value:
            self.reason = "value"
            return equal_values(value, gold_value)
        if _CLOCK.search(gold) or _BASE.fullmatch(gold) or (is_prose(gold) and not gold_value):
            self.reason = "text"
            return False
        if gold_ratio := _ratio(gold):
            self.reason = "value"
            ratio = _ratio(answer) or ([value.number, Fraction(1)] if value and len(gold_ratio) == 2 else [])
            pairs = zip(ratio, gold_ratio, strict=False)
            return len(ratio) == len(gold_ratio) and all(a * gold_ratio[0] == b * ratio[0] for a, b in pairs)
        (answer, unit), (gold, gold_unit) = split_unit(answer), split_unit(gold)
        return (not (unit and gold_unit) or unit == gold_unit) and self.match_expressions(answer, gold)

    def match_expressions(self, answer: str, gold: str) -> bool:
        self.reason = "unread"
        if is_prose(answer) or _SIDE_BY_SIDE.search(answer):
            return False
        if self.equal is None:
            raise Undecided
        equal = self.equal(*_same_angles(answer, gold))
        self.reason = "unread" if equal is None else "parsed"
        return bool(equal)


@functools.lru_cache(4096)
def tree(text: str, prose: bool) -> Tree:
    """The parts of a normalised answer. Unless `prose` is asked for, a sentence is replaced by its last formula."""
    text = strip_outside(text)
    while about := _ABOUT.match(text):
        text = strip_outside(text[about.end() :])
    if (remark := _REMARK.fullmatch(text)) and is_prose(remark[2]) and read_value(remark[1]):
        return remark[1]
    if read_value(text) or _depth(text) > MAX_DEPTH:
        return text
    if _REALS.fullmatch(text):
        return Node("()", (r"-\infty", r"\infty"))
    if _LOOSE.search(text):
        text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    if parts := _numbered(text):
        return Node("ordered", tuple(tree(part, prose) for part in parts))
    items = split(text)
    if len(items) > 1 and all(_is_part(item, prose) for item in items):
        return _listed(items, prose)
    if not prose and is_prose(text):
        formula = _last_formula(text)
        return tree(formula, True) if formula else text
    return _bracketed(text, prose)


def _bracketed(text: str, prose: bool) -> Tree:
    """The parts of a text that no separator divides: a set, a tuple, an interval, an inequality, or one leaf."""
    if builder := _BUILDER.fullmatch(text):
        return tree(builder[1], prose)
    if text == r"\emptyset":
        return Node("list", ())
    name, _, rest = text.partition("=")
    if member := _IN.match(text):
        name, rest = member[1], text[member.end() :]
    if _NAME.fullmatch(name.strip()) and not _NAMES_AGAIN.search(rest):
        if isinstance(node := _bracketed(rest.strip(), prose), Node):
            return node
    for left, right in ((r"\{", r"\}"), ("{", "}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        if text.startswith(left) and text.endswith(right) and closing(text, len(left) - 1) == len(text):
            inside = text[len(left) : -len(right)].strip()
            items = split(inside)
            if "{" in left:
                return _listed(items, prose) if inside and (len(items) > 1 or left == r"\{") else \
                    tree(inside, prose) if inside else Node("list", ())
            return Node(left + right, tuple(tree(item, True) for item in items)) if len(items) > 1 else \
                tree(inside, prose)
    if text.count(r"\pm") == 1 and not is_prose(text):
        name, rest = _split_name(text)
        plus = rest.replace(r"\pm", "+").strip().removeprefix("+")
        return Node("list", (plus.strip(), re.sub(r"\\pm\s*", "-", rest)))
    return _interval(text) or text


def _depth(text: str) -> int:
    """How deep brackets are nested in a text."""
    depth = deepest = 0
    for match in _TOKEN.finditer(text):
        depth += 0 if match[3] is not None else 1 if match[1] else -1
        deepest = max(deepest, depth)
    return deepest


def _listed(items: list[str], prose: bool) -> Tree:
    """A list of parts, each once."""
    parts = tuple(dict.fromkeys(tree(item, prose) for item in items))
    if len(parts) == 1 and len(items) > 1:
        return parts[0]
    return Node("list", parts)


def _interval(text: str) -> Node | None:
    """An inequality of one variable, such as x > 2 or 1 < x \\le 3, as an interval."""
    pieces = _RELATION.split(text)
    if len(pieces) not in (3, 5) or is_prose(text) or "" in pieces:
        return None
    if len(pieces) == 3 and not _VARIABLE.fullmatch(pieces[0]):
        pieces = [pieces[2], {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}[pieces[1]], pieces[0]]
    if len(pieces) == 3 and _VARIABLE.fullmatch(pieces[0]) and not re.search("[a-z]", _COMMANDS.sub("", pieces[2])):
        closed = pieces[1].startswith("\\")
        if pieces[1] in ("<", r"\le"):
            return Node("(" + ")]"[closed], (r"-\infty", pieces[2]))
        return Node("(["[closed] + ")", (pieces[2], r"\infty"))
    if len(pieces) == 5 and _VARIABLE.fullmatch(pieces[2]):
        low, first, _, second, high = pieces
        rising = first in ("<", r"\le"), second in ("<", r"\le")
        if rising == (False, False):
            low, first, second, high = high, second, first, low
        if rising[0] == rising[1]:
            return Node("(["[first.startswith("\\")] + ")]"[second.startswith("\\")], (low, high))
    return None


def split(text: str) -> list[str]:
    """The parts of a text between the commas, "and" and "or" outside its brackets."""
    depth, parts, at = 0, [], 0
    for match in _TOKEN.finditer(text):
        if match[3] is None:
            depth += 1 if match[1] else -1
        elif depth <= 0:
            parts.append(text[at : match.start()])
            at = match.end()
    return [part.strip() for part in (*parts, text[at:]) if part.strip()]


def _only(part: Tree) -> Tree:
    """The element of a set of one."""
    return part.items[0] if isinstance(part, Node) and part.kind == "list" and len(part.items) == 1 else part


def _point(items: tuple[Tree, ...]) -> Node | None:
    """x = 2, y = -3 as the point (2, -3): parts named by one letter each, in the alphabet's order."""
    named = sorted(_split_name(item) for item in items if isinstance(item, str))
    letters = "".join(name for name, _ in named)
    in_order = len(named) == len(items) > 1 and len(letters) == len(named) == len(set(letters))
    return Node("()", tuple(value for _, value in named)) if in_order else None


def _numbered(text: str) -> list[str]:
    """The parts of a text that numbers them, as (1) 3 (2) 4."""
    marks = list(_NUMBERED.finditer(text))
    if len(marks) < 2 or [next(filter(None, m.groups())) for m in marks] != list("123456789"[: len(marks)]):
        return []
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    parts = [strip_outside(text[mark.end() : end]) for mark, end in zip(marks, ends, strict=True)]
    return parts if all(parts) and (not text[: marks[0].start()].strip() or is_prose(text[: marks[0].start()])) else []


def _is_part(item: str, prose: bool) -> bool:
    return not is_prose(item) or read_value(item) is not None or (prose and len(item.split()) <= 3)


def _last_formula(text: str) -> str:
    """The last words of a sentence that are no words: of "so x is 3 or 4 there", 3 or 4."""
    run: list[str] = []
    found: list[str] = []
    for token in text.split():
        joins = token in ("and", "or", "and,", "or,")
        if (_WORD.fullmatch(token) or _CJK.search(token)) and not (joins and run):
            found, run = run or found, []
        elif not (token in ("a", "A", "I") and not run):
            run.append(token)
    text = " ".join(run or found)
    return re.sub(r"^(?:and|or)\b|\b(?:and|or)$", "", strip_outside(text)).strip()


def _split_name(text: str) -> tuple[str, str]:
    """(name, right side) of a text such as x = 5 or m\\angle ABC = 65^\\circ; of 2 + 3 = 5, ("1", "5")."""
    left, *_, right = text.split("=") if "=" in text and not _RELATION.search(text) else ("", text)
    left, right = left.strip().rstrip(":"), right.strip()
    if left and right and _NAME.fullmatch(left):
        return left, right
    if left and right and not re.search("[A-Za-z]", _COMMANDS.sub("", left)):
        return "", right
    return "", text


def _ratio(text: str) -> list[Fraction]:
    match = _RATIO.fullmatch(text)
    try:
        numbers = [Fraction(each) for each in match.groups() if each] if match else []
    except ValueError:  # as in 1.2.3
        return []
    return numbers if all(numbers) else []


def _same_angles(answer: str, gold: str) -> tuple[str, str]:
    """Both expressions without degree signs, in radians if only one has them and the other has pi."""
    degree, radians = r"^\circ", r"\cdot\frac{\pi}{180}"
    if _TRIGONOMETRY.search(answer + gold):
        return answer.replace(degree, radians), gold.replace(degree, radians)
    for here, there in ((answer, gold), (gold, answer)):
        if degree in here and degree not in there and r"\pi" in there:
            here = here.replace(degree, radians)
            return (here, gold) if there is gold else (answer, here)
    return answer.replace(degree, " "), gold.replace(degree, " ")


def is_prose(text: str) -> bool:
    """Whether a normalised text has words that are no mathematics."""
    return _PROSE.search(_COMMANDS.sub(" ", text)) is not None


def is_too_large(text: str) -> bool:
    """Whether a final answer is too large to compute; see answer_size.py."""
    return too_large(text, is_prose(text))


def as_text(text: str) -> str:
    """A text for comparison as words. An exclamation mark behind a number or a letter of mathematics stays: 3! is 6."""
    text = _INDEX.sub(r"\1\2", "".join(text.split()).casefold().strip(".,;:?'\"`"))
    return text.rstrip("!") if is_prose(text) else text


def gold_problem(gold: str) -> str:
    """The reason why no response can be right, of a normalised gold answer; "" if there is none."""
    if not gold:
        return "no gold answer"
    if is_too_large(gold):
        return "gold answer too large to compute"
    if is_prose(gold) and not gold_letters(gold) and len(gold.split()) + len(_CJK.findall(gold)) // 2 > MOST_WORDS:
        return f"gold answer of more than {MOST_WORDS} words, which only the same text equals"
    return ""
