r"""Multiple choice: the letters that a text chooses, and the options that a problem lists.

Next: values.py, numbers with units.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence

from nanolmmr1.reward.normal import FONTS, normalise, unwrap

LETTERS = "ABCDEFGHIJ"

_ONE = r"[(\[]?\s*([A-J])\s*[)\].:]?"
_SET = re.compile(rf"(?:[Bb]oth\s+|[Oo]ptions?\s+|[Cc]hoices?\s+)?{_ONE}"
                  rf"(?:(?:\s*(?:[,;]\s*and\b|[,;/&+]|\band\b|和|与|及)\s*|\s*){_ONE}){{0,9}}")
_LOWER = re.compile(r"[(\[]\s*([a-j])\s*[)\]]|([a-j])\s*[).:]?")
_OR = re.compile(r"\bor\b|[/或]")
_WITH_TEXT = re.compile(r"[(\[]?([A-J])\s?(?:[)\]]\s*[.:]?\s*|[.:]\s+|[.:](?=[^A-Za-z\s])|"
                        r"\s*(?=[\u4e00-\u9fff]))(\S.*)", re.DOTALL)
_MARK = re.compile(r"(?:(?<=[\s,;.])|^)[(\[]?([A-J])(?:[)\]]|[.:](?=\s))")
_IN_PROSE = re.compile(r"(?:\b(?:option|choice|answer|select|choose|pick)(?:\s+(?:is|option|choice))?|选项?)\s*:?\s*"
                       r"[(\[]?([A-J])\b(?!['’])"
                       r"(?!\)?\s*(?:or\b|and\b|[,/&])\s*[(\[]?[A-J]\b)", re.IGNORECASE)  # fmt: skip
_AT_END = re.compile(r"\s(?:is|be)\s+[(\[]?([A-J])[)\]]?$")
_LIST = re.compile(r"(?:^|(?<=[\s,;])|(?<=[0-9\u4e00-\u9fff])(?=[(\[]))[(\[]?([A-J])\s*[)\].:、][ \t]*")


_BEFORE = re.compile(r"(?:so|thus|hence|therefore|it's|it is|this is|that is|which is|[,:\s])+", re.IGNORECASE)
_BEHIND = re.compile(r"\s*(?:(?:is|are)\s+(?:the\s+)?(?:correct|right)"
                     r"(?:\s+(?:answers?|options?|choices?|ones?))?|only|"
                     r"是?正确的?|,?\s*not\s+[(\[]?[A-J][)\]]?)", re.IGNORECASE)  # fmt: skip
_DENIED = re.compile(r"[)\]]?\s*(?:is|are)\s+(?:wrong|incorrect|false|not)\b|[)\]]?\s*是?(?:或|不|错|误)",
                     re.IGNORECASE)  # fmt: skip
_DENIES = re.compile(r"(?:\bnot|n't|\bexcept|不)\s*[(\[]?$", re.IGNORECASE)


@functools.lru_cache(8192)
def gold_letters(gold: str) -> tuple[str, str] | None:
    r"""(letters, text) of a gold answer that is an option, or several; None if it is anything else.

    As in: "B", "(B)" -> "B", ""; "B. 12" -> "B", "12"; "ACD", "A, C and D" -> "ACD", "". Letters are capital, sorted
    and different: "AB" may also be a segment, which its two letters in either order name.
    """
    if _SET.fullmatch(gold) and not _OR.search(gold):
        letters = re.findall("[A-J]", gold)
        if len(set(letters)) == len(letters):
            return "".join(sorted(letters)), ""
    if (match := _WITH_TEXT.fullmatch(gold)) and not _several_marks(gold, match[1]):
        return match[1], normalise(match[2])
    return None


@functools.lru_cache(8192)
def chosen_letters(answer: str) -> str:
    """The option letters that an answer chooses, sorted; "" if it chooses none, or offers several with "or"."""
    answer = answer[before.end() :] if (before := _BEFORE.match(answer)) else answer
    if (behind := _BEHIND.search(answer)) and behind.end() == len(answer):
        answer = answer[: behind.start()]
    if _SET.fullmatch(answer):
        return "" if _OR.search(answer) else "".join(sorted(set(re.findall("[A-J]", answer))))
    if match := _LOWER.fullmatch(answer):
        return (match[1] or match[2]).upper()
    if match := _WITH_TEXT.fullmatch(answer):
        denied = _DENIED.match(answer, match.end(1))
        return "" if denied or _several_marks(answer, match[1]) else match[1]
    said = [match for match in _IN_PROSE.finditer(answer)
            if not _DENIED.match(answer, match.end(1)) and not _DENIES.search(answer[: match.start()])]  # fmt: skip
    said += filter(None, [_AT_END.search(answer)])
    return said[-1][1].upper() if said else ""


def names_option(answer: str) -> bool:
    """Whether an answer is about letters of options, even if it does not choose between them."""
    return bool(chosen_letters(answer) or _SET.fullmatch(_OR.sub(",", answer)))


def _several_marks(text: str, letter: str) -> bool:
    """Whether a text reads out other options than `letter`: that is no choice."""
    return bool(set(_MARK.findall(text)) - {letter})


def listed_options(problem: str) -> list[str]:
    """The options that a problem's own text lists from A on, as "(A) 12" or "B: 9"; [] if there are none."""
    problem = unwrap(unicodedata.normalize("NFKC", problem), FONTS)
    problem = re.sub(r"\*\*|\\q?quad(?![a-z])|\\(?=\s)|\$(?=\s*[(\[]?[A-J][)\].:])", " ", problem)
    marks = list(_LIST.finditer(problem))
    best: list[str] = []
    for start, mark in enumerate(marks):
        if mark[1] == "A":
            run = [mark]
            for other in marks[start + 1 :]:
                if other[1] == LETTERS[len(run) : len(run) + 1]:
                    run.append(other)
            ends = [each.start() for each in run[1:]] + [len(problem)]
            texts = [problem[each.end() : end].partition("\n")[0] for each, end in zip(run, ends, strict=True)]
            best = texts if len(texts) > 1 else best
    return best


def option_values(options: Sequence[str]) -> dict[str, str]:
    """Letter -> normalised text of its option, but for a text that may itself be read as a letter."""
    texts = zip(LETTERS, map(normalise, options[: len(LETTERS)]), strict=False)
    return {letter: text for letter, text in texts if text and not chosen_letters(text)}
