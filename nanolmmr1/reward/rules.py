r"""The accuracy rule: whether a response's final answer is the gold one. Pure functions of text.

Both texts are normalised (normal.py). Gold decides how they are compared: as option letters, as numbers with units, as
lists and tuples part by part, as words, or as mathematics. The trainer's process decides all but the last. Mathematics
runs in worker processes, because sooner or later a model answers 9^{9^{9^9}}: a worker that misses its deadline is
killed and replaced.

Next: parts.py, lists, tuples and intervals.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

from nanolmmr1.reward.answer_size import too_large
from nanolmmr1.reward.choice import LETTERS, chosen_letters, gold_letters, names_option, option_values
from nanolmmr1.reward.normal import normalise
from nanolmmr1.reward.parts import CJK, COMMANDS, Node, Tree, as_point, as_text, is_prose, only_part, split_name, tree
from nanolmmr1.reward.values import Near, equal_values, nearness, read_value, split_unit

REASONS = ("parsed", "letter", "value", "text", "unread", "deadline")
MOST_PARTS = 20  # of lists of numbers that are near each other: their pairs are searched for
MOST_WORDS = 12  # of a gold answer that only the same text equals

_RATIO = re.compile(r"([0-9.]+)" + 3 * r"(?:\s*(?::|to|比)\s*([0-9.]+))?")
_SIDE_BY_SIDE = re.compile(r"[0-9]\s+[0-9]|\([0-9]+\)\s*[0-9]")  # math_verify adds them: 1 20 is 21
_BASE = re.compile(r"[0-9A-Fa-f]+\s*_\s*\{?\s*[0-9]+\s*\}?")  # 110_2
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_CLOCK = re.compile(r"\b[0-2]?[0-9]:[0-5][0-9]\b(?!\s*:)")


class Verdict(NamedTuple):
    """Whether an answer is right, and the rule that decided."""

    score: float
    reason: str  # one of REASONS
    undecided: bool = False  # no rule can tell right from wrong; see _undecided


class GoldRule(NamedTuple):
    """How an answer is compared with gold beyond the general rules."""

    accept: Sequence[str] = ()  # other gold answers, normalised, that are right as well
    decimals: int | None = None  # numbers are equal if they are so when rounded to so many
    tolerance: Sequence[float] = ()  # largest absolute differences of numbers: for each part of gold, or one for all


NO_RULE = GoldRule()
Equal = Callable[[str, str, Near | None], bool | None]
Limits = tuple[Fraction, ...]  # largest differences, of each part of gold or one for all


class Undecided(Exception):
    """The texts must be compared as mathematics, and that is not possible here."""


def decide(answer: str, gold: str, options: Sequence[str] = (), equal: Equal | None = None,
           rule: GoldRule = NO_RULE) -> Verdict | None:
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
        rule: of the row. Its tolerance and decimals hold for numbers in rules 4, 5 and 7, each in gold's unit.
    """
    verdicts = []
    for each in (gold, *rule.accept):
        verdict = _decide(answer, each, options, equal, rule)
        if verdict and verdict.score:
            return verdict
        verdicts.append(verdict)
    if None in verdicts:
        return None
    # One gold answer that rules can compare is enough: the others mean the same.
    return next((verdict for verdict in verdicts if verdict and not verdict.undecided), verdicts[0])


def _decide(answer: str, gold: str, options: Sequence[str], equal: Equal | None, rule: GoldRule) -> Verdict | None:
    if not answer or not gold:
        return Verdict(0.0, "unread", bool(answer))
    if as_text(answer) == as_text(gold):
        return Verdict(1.0, "letter" if gold_letters(gold) else "value" if read_value(gold) else "text")
    try:
        if letters := gold_letters(gold):
            verdict = _decide_letters(answer, *letters, options, equal)
        else:
            verdict = _decide_value(answer, gold, options, equal, rule)
    except Undecided:  # parts are no larger than the whole
        return Verdict(0.0, "unread", True) if is_too_large(answer) or is_too_large(gold) else None
    return verdict if verdict.score else verdict._replace(undecided=_undecided(answer, gold, options, rule, verdict))


def _undecided(answer: str, gold: str, options: Sequence[str], rule: GoldRule, verdict: Verdict) -> bool:
    r"""Whether a judge would have to say if an answer that no rule finds right is wrong.

    A wrong answer is decided if it and gold were compared as numbers, as mathematics or as options: such a comparison
    tells right from wrong. It is undecided
    - if one of them was not read, or is words: words of one meaning differ as text;
    - if gold is one value, and the answer lists several of which one is gold's, or gold's parts without its brackets;
    - if gold is an option, and the answer is neither a letter nor the text of an option, or is that of several.
    An answer that names other options is always decided.
    """
    if verdict.reason in ("parsed", "value") and read_value(answer) and read_value(gold):
        return False  # most wrong answers, so it is asked first
    letters, text = gold_letters(gold) or ("", "")
    if letters or options:
        if names_option(answer):
            return False
        if named := _named(answer, options):
            return bool(letters) and letters in named
    if verdict.reason in ("unread", "letter", "parsed"):
        return verdict.reason != "parsed"
    if letters:
        gold = text or option_values(options)[letters]  # it was compared
    read, expected = only_part(tree(answer, is_prose(gold))), only_part(tree(gold, True))
    if any(is_prose(leaf) and not read_value(leaf) and not split_unit(leaf)[1]
           for part in (read, expected) for leaf in _leaves(part)):  # fmt: skip
        return True
    if not (isinstance(read, Node) and read.kind in ("list", "ordered")):
        return False
    if isinstance(expected, Node):
        return list(_leaves(read)) == list(_leaves(expected))
    return any(_may_equal(leaf, gold, rule) for leaf in _leaves(read))


def _named(answer: str, options: Sequence[str]) -> str:
    """The letters of the options that an answer names by their text or value."""
    texts = zip(LETTERS, map(normalise, options[: len(LETTERS)]), strict=False)
    return "".join(letter for letter, text in texts if text and (as_text(text) == as_text(answer)
                                                                 or _may_equal(answer, text)))


def _may_equal(answer: str, gold: str, rule: GoldRule = NO_RULE) -> bool:
    try:
        return bool(_Comparison(None, rule).verdict(answer, gold).score)
    except Undecided:
        return False


def _leaves(part: Tree) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    else:
        for item in part.items:
            yield from _leaves(item)


def _decide_value(answer: str, gold: str, options: Sequence[str], equal: Equal | None, rule: GoldRule) -> Verdict:
    verdict = _Comparison(equal, rule).verdict(answer, gold)
    chosen = chosen_letters(answer) if options and not verdict.score else ""
    said = gold_letters(answer) if chosen else None  # the text behind a letter counts more than the letter
    if value := said[1] if said and said[1] else option_values(options).get(chosen):
        verdict = max(verdict, _Comparison(equal, rule).verdict(value, gold), key=lambda each: each.score)
    return verdict


def _decide_letters(answer: str, letters: str, text: str, options: Sequence[str], equal: Equal | None) -> Verdict:
    texts = zip(LETTERS, map(normalise, options[: len(LETTERS)]), strict=False)
    same = [letter for letter, option in texts if as_text(option) == as_text(answer)]
    if len(same) == 1 and len(letters) == 1 and len(answer) > 1:
        return Verdict(float(same[0] == letters), "letter")  # AB may be an option, too
    chosen, values = chosen_letters(answer), option_values(options)
    if chosen or len(letters) > 1:
        said = gold_letters(answer)  # with text, as in (B) 12; the text of another option contradicts its letter
        own, comparison = text or values.get(letters, ""), _Comparison(equal)
        right = chosen == letters
        if right and said and said[1] and not (own and comparison.verdict(said[1], own).score):
            others = [value for letter, value in values.items() if letter != letters]
            right = not any(comparison.verdict(said[1], other).score for other in others)
        return Verdict(float(right), "letter")
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

    def __init__(self, equal: Equal | None, rule: GoldRule = NO_RULE) -> None:
        self.equal, self.rule, self.reason = equal, rule, "text"

    def verdict(self, answer: str, gold: str) -> Verdict:
        limits = tuple(Fraction(str(each)) for each in self.rule.tolerance)
        score = float(self.match(tree(answer, is_prose(gold)), tree(gold, True), limits))
        return Verdict(score, self.reason)

    def match(self, answer: Tree, gold: Tree, limits: Limits) -> bool:
        answer, gold = only_part(answer), only_part(gold)
        if isinstance(answer, str) and isinstance(gold, str):
            near = nearness(self.rule.decimals, limits[0] if len(limits) == 1 else Fraction(0))
            return self.match_leaves(answer, gold, near)
        if isinstance(answer, str) or isinstance(gold, str):
            self.reason = "value"
            return False
        if gold.kind == answer.kind == "list" and (point := as_point(gold.items)) and not as_point(answer.items):
            gold, answer = point, answer._replace(kind=point.kind)  # for x = 2, y = 3 the answer 2, 3 is in order
        if {answer.kind, gold.kind} <= {"list", "ordered"} and {answer.kind, gold.kind} != {"ordered"}:
            return self.match_sets(answer.items, gold.items, limits)
        if answer.kind == "list" and (point := as_point(answer.items)):
            answer = point
        elif gold.kind == "list" and (point := as_point(gold.items)):
            gold = point
        same = answer.kind == gold.kind and len(answer.items) == len(gold.items)
        parts = zip(answer.items, gold.items, _each(limits, len(gold.items)), strict=False)
        return same and all(self.match(*part) for part in parts)

    def match_sets(self, answers: Sequence[Tree], golds: Sequence[Tree], limits: Limits) -> bool:
        """Whether each answer matches another gold, if need be by exchanging: nearness is not transitive."""
        if len(answers) != len(golds):
            self.reason = "value"
            return False
        is_near = (bool(limits) or self.rule.decimals is not None) and len(golds) <= MOST_PARTS
        each, taken = _each(limits, len(golds)), dict[int, int]()  # place of an answer -> place of its gold

        def place(gold: int, moved: set[int]) -> bool:
            for i, answer in enumerate(answers):
                if i not in taken and self.match(answer, golds[gold], each[gold]):
                    taken[i] = gold
                    return True
            for i in [i for i in taken if i not in moved] if is_near else ():
                moved.add(i)
                if self.match(answers[i], golds[gold], each[gold]) and place(taken[i], moved):
                    taken[i] = gold
                    return True
            return False

        return all(place(gold, set()) for gold in range(len(golds)))

    def match_leaves(self, answer: str, gold: str, near: Near | None) -> bool:
        (name, answer_side), (gold_name, gold_side) = split_name(answer), split_name(gold)
        if "=" in answer and "=" not in gold and not name:
            left, *_, right = (side.strip() for side in answer.split("="))
            variables = set(re.findall("[A-Za-z]", COMMANDS.sub("", left)))
            if len(variables) == 1:  # 2x = 5 is an equation to solve, not the value 5
                self.reason = "value"
                return False
            # 1 + 1 = 3 is no answer; of x + y = 5, the right side is.
            return self.match_leaves(right, gold, near) and (bool(variables) or self.match_leaves(left, gold, near))
        if bool(name or "=" not in answer) and bool(gold_name or "=" not in gold):
            if name and gold_name and as_text(name) != as_text(gold_name):
                return self.match_expressions(answer, gold, near)  # y = 2x is x = y/2
            answer, gold = answer_side, gold_side
        if as_text(answer) == as_text(gold):
            return True
        value, gold_value = read_value(answer), read_value(gold)
        if value and gold_value:
            self.reason = "value"
            return equal_values(value, gold_value, near)
        if _CLOCK.search(gold) or _BASE.fullmatch(gold) or (is_prose(gold) and not gold_value):
            self.reason = "text"
            return False
        if gold_ratio := _ratio(gold):
            self.reason = "value"
            ratio = _ratio(answer) or ([value.number, Fraction(1)] if value and len(gold_ratio) == 2 else [])
            pairs = zip(ratio, gold_ratio, strict=False)
            return len(ratio) == len(gold_ratio) and all(a * gold_ratio[0] == b * ratio[0] for a, b in pairs)
        (answer, unit), (gold, gold_unit) = split_unit(answer), split_unit(gold)
        return (not (unit and gold_unit) or unit == gold_unit) and self.match_expressions(answer, gold, near)

    def match_expressions(self, answer: str, gold: str, near: Near | None) -> bool:
        self.reason = "unread"
        if is_prose(answer) or _SIDE_BY_SIDE.search(answer):
            return False
        if self.equal is None:
            raise Undecided
        equal = self.equal(*_same_angles(answer, gold), near)
        self.reason = "unread" if equal is None else "parsed"
        return bool(equal)


def _each(limits: Limits, count: int) -> list[Limits]:
    """The limits of `count` parts: one each, or one for all; of another number of them none is known."""
    return [(limit,) for limit in limits] if len(limits) == count else [limits if len(limits) == 1 else ()] * count


def _ratio(text: str) -> list[Fraction]:
    match = _RATIO.fullmatch(text.rpartition("=")[2].strip())
    try:
        numbers = [Fraction(each) for each in match.groups() if each] if match else []
    except ValueError:  # as in 1.2.3
        return []
    return numbers if all(numbers) and len(numbers) > 1 else []


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


def is_too_large(text: str) -> bool:
    """Whether a final answer is too large to compute; see answer_size.py."""
    return too_large(text, is_prose(text))


def gold_problem(gold: str) -> str:
    """The reason why no response can be right, of a normalised gold answer; "" if there is none."""
    if not gold:
        return "no gold answer"
    if is_too_large(gold):
        return "gold answer too large to compute"
    if is_prose(gold) and not gold_letters(gold) and len(gold.split()) + len(CJK.findall(gold)) // 2 > MOST_WORDS:
        return f"gold answer of more than {MOST_WORDS} words, which only the same text equals"
    return ""
