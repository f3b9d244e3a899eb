r"""The parts of an answer: lists, numbered parts, tuples, intervals, and names before an equals sign.

Next: formats.py, the shape of a response.
"""

import functools
import re
from typing import NamedTuple

from nanolmmr1.reward.answer_size import MAX_DEPTH
from nanolmmr1.reward.normal import closing, strip_outside
from nanolmmr1.reward.values import read_value

COMMANDS = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
_PROSE = re.compile(r"[A-Za-z]{3}|[A-Za-z]{2}\s+[A-Za-z]{2}|[\u3040-\u9fff\uac00-\ud7af]|[\u0400-\u04ff]{2}")
_WORD = re.compile(r"(?:[A-Za-z'\-]{3,}|is|of|to|in|so|we|as|at|by|it|be|an|if|my|on|no|do)[.,;:!?]*")
_TOKEN = re.compile(r"(\\begin\{|[(\[{]|\\\{)|(\\end\{|[)\]}]|\\\})|"
                    r"(\s*(?:\\cup(?![A-Za-z])|,(?:\s*(?:and|or)\b)?|;|\b(?:and|or)\b|[和或与及])\s*)")  # fmt: skip
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
_LOOSE = re.compile(r",\s|;|,0[0-9]{2}|\b(?:and|or)\b")
_NUMBERED = re.compile(r"(?:(?<=[\s,;])|^)(?:\(([1-9])\)|([1-9])\)|Part\s+([1-9])\s*[:.)])\s*[,;:.]?\s*")
_ABOUT = re.compile(r"(?:\\(?:approx|sim|Rightarrow|implies|therefore|rightarrow|to)(?![A-Za-z])|=>|[≈~∴=]|"
                    r"\b(?:about|approximately|approx\.?|roughly|around|nearly|almost|equals)\b|"
                    r"约[为是]?|大约|(?:一|总)?共有?(?=\s*[0-9])|近似[为于]?|"
                    r"\+(?=\s*\\?[0-9A-Za-z]))\s*")  # fmt: skip
_NAME = re.compile(r"(?:m\s*)?(?:\\(?:angle|triangle|overline|widehat|vec|text)\s*\{?\s*[A-Za-z]{1,4}\s*\}?|"
                   r"\\?[A-Za-z]+(?:\s*_\s*\{?[\\\w ]{1,24}\}?|'{1,2})?"
                   r"(?:\s*\([A-Za-z0-9]{1,3}(?:,\s?[A-Za-z0-9]{1,3}){0,3}\))?|"
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
# Words that make a number something else than the answer.
_HEDGE = re.compile(r"\b(?:not|never|cannot|neither|nor|wrong|incorrect|false|impossible|least|most|otherwise|maybe|"
                    r"perhaps|alternatively|up\s+to|between|half\s+of|twice|double|squared|cubed|"
                    r"(?:more|less|fewer|greater|larger|smaller|other)\s+than|or\s+(?:more|less|fewer|something))\b|n't\b",
                    re.IGNORECASE)  # fmt: skip
_AFTERTHOUGHT = re.compile(r",?\s+(?:and\s+)?not\s+[^\s,]+$")  # 5, not 6
_EMPTY = re.compile(r"\\emptyset|(?:there\s+(?:is|are)\s+)?no\s+(?:real\s+)?solutions?|"
                    r"(?:the\s+)?empty\s+set|无(?:实数)?解",
                    re.IGNORECASE)  # fmt: skip
_MARKS = re.compile(r"(?:\([1-9]\)[\s,和]*){2,9}")  # of numbered statements
_INDEX = re.compile(r"([_^])\{(\w)\}")
CJK = re.compile(r"[\u3040-\u9fff\uac00-\ud7af]")


class Node(NamedTuple):
    """A list of parts, or a tuple or an interval with its brackets."""

    kind: str  # "list", in any order; "ordered"; or the brackets, as in "(]"
    items: "tuple[Tree, ...]"


Tree = str | Node


@functools.lru_cache(4096)
def tree(text: str, prose: bool) -> Tree:
    """The parts of a normalised answer. Unless `prose` is asked for, a sentence is replaced by its last formula."""
    text = strip_outside(text)
    while about := _ABOUT.match(text):
        text = strip_outside(text[about.end() :])
    if (remark := _REMARK.fullmatch(text)) and is_prose(remark[2]) and read_value(remark[1]):
        return remark[1]
    named = text.count("=") == 1 and split_name(text)
    if read_value(text) or (named and named[0] and read_value(named[1])) or _depth(text) > MAX_DEPTH:
        return text
    if _EMPTY.fullmatch(text):
        return Node("list", ())
    if _MARKS.fullmatch(text):
        return Node("list", tuple(dict.fromkeys(re.findall("[1-9]", text))))
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
        text = _AFTERTHOUGHT.sub("", text)
        formula = "" if _HEDGE.search(text.rpartition(". ")[2]) else _last_formula(text)
        return tree(formula, True) if formula else text
    return _bracketed(text, prose)


def _bracketed(text: str, prose: bool) -> Tree:
    """The parts of a text that no separator divides: a set, a tuple, an interval, an inequality, or one leaf."""
    if builder := _BUILDER.fullmatch(text):
        return tree(builder[1], prose)
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
        name, rest = split_name(text)
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
    trees = [tree(item, prose) for item in items]
    both = [each.items if isinstance(each, Node) and each.kind == "list" and r"\pm" in item else (each,)
            for item, each in zip(items, trees, strict=True)]  # fmt: skip
    parts = tuple(dict.fromkeys(part for each in both for part in each))
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
    if len(pieces) == 3 and _VARIABLE.fullmatch(pieces[0]) and not re.search("[a-z]", COMMANDS.sub("", pieces[2])):
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


def only_part(part: Tree) -> Tree:
    """The element of a set of one."""
    return part.items[0] if isinstance(part, Node) and part.kind == "list" and len(part.items) == 1 else part


def as_point(items: tuple[Tree, ...]) -> Node | None:
    """x = 2, y = -3 as the point (2, -3): parts named by one letter each, in the alphabet's order."""
    named = sorted(split_name(item) for item in items if isinstance(item, str))
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
        if (_WORD.fullmatch(token) or CJK.search(token)) and not (joins and run):
            found, run = run or found, []
        elif not (token in ("a", "A", "I") and not run):
            run.append(token)
    text = " ".join(run or found)
    return re.sub(r"^(?:and|or)\b|\b(?:and|or)$", "", strip_outside(text)).strip()


def split_name(text: str) -> tuple[str, str]:
    """(name, right side) of a text such as x = 5 or m\\angle ABC = 65^\\circ; of 2 + 3 = 5, ("1", "5")."""
    left, *_, right = text.split("=") if "=" in text and not _RELATION.search(text) else ("", text)
    left, right = left.strip().rstrip(":"), right.strip()
    if left and right and _NAME.fullmatch(left):
        return left, right
    if left and right and _NAME.fullmatch(right) and not re.search("[A-Za-z]", COMMANDS.sub("", left)):
        return right, left  # 12 = x
    if left and right and not re.search("[A-Za-z]", COMMANDS.sub("", left)):
        return "", right
    return "", text


def is_prose(text: str) -> bool:
    """Whether a normalised text has words that are no mathematics."""
    return _PROSE.search(COMMANDS.sub(" ", text)) is not None


def as_text(text: str) -> str:
    """A text for comparison as words. An exclamation mark behind a number or a letter of mathematics stays: 3! is 6."""
    if text.isdecimal():
        return text
    text = re.sub(r"\b([ap])\.m\b\.?", r"\1m", text.casefold())
    text = re.sub(r"^(?:a|an|the)\s+", "", text) if is_prose(text) else text
    text = re.sub(r"(?<=[0-9])\s+(?=[0-9])", "_", text)  # 3 1/2 is not 31/2
    text = _INDEX.sub(r"\1\2", "".join(text.split()).strip(".,;:?'\"`"))
    return text.rstrip("!") if is_prose(text) else text
