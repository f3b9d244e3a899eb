r"""Where the final answer stands: in a response, and in a gold answer, which may be a whole solution.

Next: normal.py, one spelling for each sign.
"""

import re

from nanolmmr1.reward.normal import FONTS, normalise, unwrap

ANSWER_CHARS = 2000  # longer answers are not read: patterns of the mathematics take quadratic time

_BRACES = re.compile(r"\\(boxed|fbox)\s*\{|\\.|([{}])", re.DOTALL)
# Text before a box that belongs to its answer: a part's number, or a name.
_LABEL = r"(?:[(（]?[1-9][)）]|[①②③④⑤⑥]|\\?[A-Za-z]+(?:_\{?[0-9A-Za-z]\}?)?\s*=)"
_LABELS = re.compile(rf"{_LABEL}[\s$]*\Z")
# Text between two boxes that makes a list of them.
_BETWEEN = re.compile(rf"(?:[\s$,;、，；&.]|\\[,;:!()\[\] ]|\\q?quad|\\\\|\\text\s*\{{[\s,]*(?:and|or)?[\s,]*\}}|"
                      rf"\b(?:and|or)\b|[和或与及]|{_LABEL}){{0,40}}")  # fmt: skip
_PHRASE = re.compile(
    r"(?:\b(?:answers?|ans|(?:correct|right|best)\s+(?:options?|choices?))[*_`]*"
    r"(?:\s+(?:is|are|should\s+be|would\s+be|must\s+be|will\s+be)\b(?:\s+(?:option|choice)\b)?|\s*[:：=]|[*_`]*\s*\n)|"
    r"####|(?:答案|答)(?:选项)?(?:应该|应当|应)?(?:选项|选择|[是为選选:：】])+|"
    r"(?<!不)(?:应该?|故|故应|该|正确的?|)(?:选择|选项|选|選|正确的是)[是为:：]?"
    r"(?=\s*[(\[（【]?(?:[A-JＡ-Ｊ]{1,10}|[a-j])(?![A-Za-z])))"
    r"[*_`]*\s*[:：]?\s*", re.IGNORECASE)  # fmt: skip
_END_TOKEN = re.compile(r"(?:\s*(?:<\|[a-z_]{1,30}\|>|</s>))+\s*\Z")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3}")
_SENTENCE_END = re.compile(r"(?<![A-JＡ-Ｊ])[.。](?=\s|$)|\n(?=[^\n]*[A-Za-z]{3})")


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of every closed \boxed{...}, in order. Braces are balanced; of nested boxes the outermost
    counts. Linear time."""
    starts: list[tuple[int, int] | None] = []  # of open braces: where a box and its content start, None for others
    found: list[tuple[int, int, str]] = []
    for match in _BRACES.finditer(text) if "box" in text else ():
        if match[1] or match[2] == "{":
            starts.append((match.start(), match.end()) if match[1] else None)
        elif match[2] == "}" and starts and (start := starts.pop()) is not None:
            while found and found[-1][0] > start[0]:
                found.pop()
            found.append((start[0], match.end(), text[start[1] : match.start()]))
    return found


def last_boxed(text: str) -> str | None:
    r"""The content of the last closed \boxed{...}, or None."""
    found = boxes(text)
    return found[-1][2] if found else None


def final_answer(response: str, parts: int = 1) -> str:
    r"""The final answer in a response, normalised; "" if there is none.

    It is searched in the last <answer>...</answer>; without one, in the text after the last </think>, and if that is
    blank, in the thought. A thought that never ends, without <answer>, holds no answer. Inside, the first that is there
    counts: the last \boxed{...}, as a list with those directly before it; the text after the last "the answer is"; the
    whole text. An answer of more than ANSWER_CHARS characters is none.

    Args:
        parts: of the gold answer. If the response has this many different boxes, anywhere, they are the list.
    """
    text, tagged = _region(response)
    if found := boxes(text):
        if len({content.strip() for _, _, content in found}) == parts > 1:
            return normalise(", ".join(dict.fromkeys(content.strip() for _, _, content in found)))
        return _bounded(_after_phrase(_last_run(text, found)))
    text = _after_phrase(text)
    if not tagged and len(text) > ANSWER_CHARS:
        text = text.strip().rpartition("\n")[2]  # a response without any mark ends with its answer
    return _bounded(text)


def gold_answer(gold: str) -> str:
    r"""The final answer in a gold answer, normalised.

    Of a whole solution it is the text after ####, or the list of all its boxes, or the text after "the answer is".
    """
    _, mark, after = gold.rpartition("####")
    text, _ = _region(after if mark and after.strip() else gold)
    if found := list(dict.fromkeys(content.strip() for _, _, content in boxes(text))):
        text = ", ".join(found)
    return _bounded(_after_phrase(text))


def _bounded(text: str) -> str:
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and r"\begin" not in text and not any(_WORD.search(line) for line in lines):
        text = ", ".join(line.rstrip(",;.") for line in lines if line.strip("$[]\\"))
    return normalise(text) if len(text) <= ANSWER_CHARS else ""


def _region(text: str) -> tuple[str, bool]:
    """The part of a text that may hold the answer, and whether it is all inside <answer>...</answer>."""
    text = _END_TOKEN.sub("", text)
    before, closed, _ = text.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    if closed and opened:
        return inside.partition("</answer>")[0], True  # some responses close it twice
    thought, ended, after = text.rpartition("</think>")
    after = after.partition("<think>")[0].replace("</answer>", "")  # closed, but never opened
    if ended and not after.strip() and boxes(thought):
        return thought, False
    if "<answer>" in after and not boxes(after):  # never closed, and no closed box: no finished answer
        after = after.partition("<answer>")[0]
    return after, False


def _last_run(text: str, found: list[tuple[int, int, str]]) -> str:
    """The content of the last box, or a list with the boxes before it that only commas, "and" or labels separate."""
    first = len(found) - 1
    while first and _BETWEEN.fullmatch(text, found[first - 1][1], found[first][0]):
        first -= 1
    if first == len(found) - 1:
        return found[-1][2]
    items = []
    for i in range(first, len(found)):
        between = text[found[i - 1][1] if i else 0 : found[i][0]]
        label = _LABELS.search(between[-40:])
        items.append((label[0] if label else "") + found[i][2])
    return ", ".join(dict.fromkeys(items))


def _after_phrase(text: str) -> str:
    """The sentence after the last "the answer is", or the whole text."""
    text = unwrap(text, FONTS)
    phrases = [match for match in _PHRASE.finditer(text) if text[match.end() :].strip(" .*$\n")]
    if not phrases:
        return text
    text = text[phrases[-1].end() :]
    end = _SENTENCE_END.search(text)
    return text[: end.start()] if end and text[: end.start()].strip() else text
