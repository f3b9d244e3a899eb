r"""The benchmarks' own scorers, as far as they are deterministic.

Each function tells whether a response is right by a benchmark's own rule. None: its scorer would ask a language model,
draw an answer at random, or need algebra, which untrusted text meets in workers alone. They reproduce published scorers
with all their faults, for the column "official" of a table; reward/rules.py judges answers.

Next: choose.py, the rows of a benchmark that a user names.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from nanolmmr1.data.store import Row
from nanolmmr1.reward.choice import LETTERS
from nanolmmr1.reward.extract import boxes
from nanolmmr1.reward.parts import split

MOST_STEPS = 1_000_000  # of an edit distance
MOST_TOKENS = 100  # of an expression
_MATHVISION_LAYOUT = re.compile(r"\\left|\\right|\\text|\\mbox|\^\{\\circ\}|\^\\circ|\\[,!%$]|[\s$]|"
                                r"\{?m\}?\^3|\{?units\}?|\{?km\}?")  # fmt: skip
_TOKEN = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+|\\[a-z]+|[-+*/^(){}\[\]]")


def mathvista(response: str, row: Row) -> bool | None:
    """Evaluation/extract_answer.py and calculate_score.py of lupantech/MathVista, with `quick_extract`.

    A response that is an option, an integer or a float counts as it is, and the text in 'The answer is "..."'. A choice
    is then the option of its letter, or else the nearest one by edit distance.
    """
    kind, precision = row.extra.get("answer_type"), row.extra.get("precision")
    parse = {"integer": int, "float": float}.get(str(kind), lambda text: None)
    is_choice = row.extra.get("question_type") == "multi_choice"
    if response and not (is_choice and response in row.options) and _parsed(parse, response) is None:
        if not (quoted := re.search(r'The answer is "(.*)"\.', response)):
            return None
        response = quoted[1]
    if is_choice:
        chosen = _chosen(response, row.options)
        return None if chosen is None else chosen == _gold_text(row)
    said: Any = response
    if kind == "integer":
        said = _parsed(lambda text: str(int(float(text))), response)
    elif kind == "float" and isinstance(precision, int | float):
        said = _parsed(lambda text: str(round(float(text), int(precision))), response)
    return said == row.answer


def _chosen(text: str, options: Sequence[str]) -> str | None:
    """The option of a letter, or the nearest one; None if that takes too long to find."""
    said = next((letter.upper() for letter in re.findall(r"\(([a-zA-Z])\)", text)), text.strip())
    if said in (texts := dict(zip(LETTERS, options, strict=False))):
        return texts[said]
    if len(said) * sum(map(len, options)) > MOST_STEPS:
        return None
    return min(options, key=lambda option: _edits(said, option), default="")


def _gold_text(row: Row) -> str:
    """The text of the option that is gold."""
    return dict(zip(LETTERS, row.options, strict=False)).get(row.answer, row.answer)


def mathverse(response: str, row: Row) -> bool | None:
    """Evaluation/score_answer_s2.py of ZrrSkywalker/MathVerse, `quick_match`: equal as text; else a model decides."""
    return response.strip() == row.answer or None


def logicvista(response: str, row: Row) -> bool | None:
    """The set of letters of Yijia-Xiao/LogicVista; a model finds it in all but a bare list of letters."""
    is_list = re.fullmatch(r"[A-J](?:[,\s]+[A-J])*", response.strip())
    return set(re.findall("[A-J]", response)) == set(re.findall("[A-J]", row.answer)) if is_list else None


def mathvision(response: str, row: Row) -> bool | None:
    """Evaluation/evaluate.py and utils.py of mathllm/MATH-V: the letter or the option's text, to 2 decimals."""
    said = _mathvision_answer(response)
    return _any(_equal_rounded(said, gold.strip("$").lower()) for gold in (row.answer, _gold_text(row)))


def _mathvision_answer(response: str) -> str:
    """The answer that MATH-V reads from a response, in small letters and without layout."""
    text = response.strip()
    for letter in "ABCDE":
        starts = f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n"
        text = letter if text.endswith((f" {letter}.", f" ({letter}).")) or text.startswith(starts) else text
    last = text.split("is ")[-1].rstrip(".")
    text = text if _parsed(float, last) is None else last
    if "oxed{" in text:
        inside = text.split("oxed{")[-1]
        text = inside.rpartition("}")[0] if "}" in inside else text
    else:
        for name in ("the final answer is", "the answer is", "the correct answer is", "the answer should be"):
            for phrase in (name, name.replace("the", "The")):
                if phrase in text:
                    text = text.split(phrase)[-1].strip().split("\n")[0].split(". ")[0]
    text = text.lower().replace("{}", "")
    if "}" in text and "{" not in text.partition("}")[0]:
        text = text.partition("}")[0]
    text = text.split("=")[-1].split(r"\approx")[-1].replace("\u221e", r"\infty").replace(r"+\infty", r"\infty")
    text = re.sub(r"\\[td]frac", r"\\frac", _MATHVISION_LAYOUT.sub("", text.replace("\\\\", "\\")))
    return re.sub(r"\(([a-e])\)|\{([a-e])\}", r"\1\2", text).rstrip(".").lstrip(":").strip()


def _equal_rounded(answer: str, gold: str) -> bool | None:
    """Whether two texts, or their values rounded to 2 decimals, are equal, also within one tuple or list."""
    if not answer.strip() or not gold.strip():
        return False
    if answer.strip() == gold.strip():
        return True
    items, golds = answer[1:-1].split(","), gold[1:-1].split(",")
    if len(golds) > 1 and gold[0] + gold[-1] in ("()", "[]"):
        is_alike = gold[0] + gold[-1] == answer[:1] + answer[-1:] and len(items) == len(golds)
        return is_alike and _all(_equal_rounded(a, b) for a, b in zip(items, golds, strict=True))
    values = [number(text) for text in (answer, gold)]
    if values[0] is not None and values[1] is not None:
        return round(values[0], 2) == round(values[1], 2)
    unread = [text for text, value in zip((answer, gold), values, strict=True) if value is None]
    return None if any(re.search(r"\\[a-z]|!", text) for text in unread) else False


def olympiadbench(response: str, row: Row) -> bool | None:
    """Inference/judge.py and inference/code/math_judger.py of OpenBMB/OlympiadBench.

    All boxes after the last "So the final answer is" are a list; each item meets another gold, within the row's error
    or 1e-8, also 100 times or a hundredth of it. Symbolic expressions, intervals and equations need algebra.
    """
    phrase = "\u6240\u4ee5\u6700\u7ec8\u7b54\u6848\u662f" if row.extra.get("language") == "Chinese" else \
        "So the final answer is "  # fmt: skip
    said = re.findall(f"{phrase}(.*)", response)
    answers, golds = _olympiad_items(said[-1].strip() if said else response), _olympiad_items(row.answer)
    errors = str(row.extra.get("error") or "").split(",") if "Tuple" not in str(row.extra.get("answer_type")) else [""]
    limits = [_parsed(float, each) or 1e-8 for each in errors]
    limits = limits * len(golds) if len(limits) == 1 else limits
    if len(answers) != len(golds) or len(limits) < len(golds):
        return False
    for gold, limit in zip(golds, limits, strict=False):
        found = [_olympiad_equal(answer, gold, limit * 1.01) for answer in answers]
        if True not in found:
            return None if None in found else False
        del answers[found.index(True)]
    return True


def _olympiad_items(text: str) -> list[str]:
    found = [content for _, _, content in boxes(text)] or re.findall(r"\$(.*?)\$", text.strip().rpartition("\n")[2])
    text = ",".join(found) if found else text
    text = text.split(r"\in ")[1] if r"\in " in text else text
    text = re.sub(r"\\left|\\right|\$|\^\{?\\circ\}?|\\?%", "", text).replace("\uff0c", ",")
    text = re.sub(r"\\approx|\\simeq|\\sim", "=", text).strip("\n$,.:;^_=+`!@#%&*~\uff0c\u3002 ")
    items = split(re.sub(r"\\math(?:rm|bf)\{~?([^}]*)\}", r"\1", text))
    return [item.replace(r"\pm", sign) for item in items for sign in ("+-" if r"\pm" in item else "+")]


def _olympiad_equal(answer: str, gold: str, limit: float) -> bool | None:
    if answer == gold and gold:
        return True
    reference, value = (_parsed(float, text) for text in (gold, answer))
    if reference is not None and value is not None:
        return any(abs(each - value) <= limit for each in (reference / 100, reference, reference * 100))
    values = [number(text.rpartition("=")[2]) for text in (answer, gold)]
    return None if values[0] is None or values[1] is None else abs(values[0] - values[1]) <= limit


def mmstar(response: str, row: Row) -> bool:
    """Eval/vlmeval/evaluate/mmstar.py of MMStar-Benchmark/MMStar: the letter stands first, or behind few words."""
    text, gold = response.lower().strip(), row.answer.lower().strip()
    return any(text.startswith(before + gold) for before in ("", "(", "option ", "the answer is "))


def mmmu(response: str, row: Row) -> bool | None:
    """Mmmu/utils/eval_utils.py of MMMU-Benchmark/MMMU. Where it draws an option at random: None."""
    if row.extra.get("question_type") == "open":
        return _mmmu_open(response, (row.answer, *row.gold_rule.get("accept", ())))
    text = response
    for sign in ",.!?;:'":
        text = text.strip(sign)
    text, options = f" {text} ", dict(zip(LETTERS, row.options, strict=False))
    ways = [({letter: mark.format(letter) for letter in options}, text) for mark in ("({})", " {} ")]
    if len(text.split()) > 5:
        ways.append(({letter: option.lower() for letter, option in options.items()}, text.lower()))
    for marks, where in ways:
        if places := {letter: where.rfind(mark) for letter, mark in marks.items() if mark in where}:
            return max(places, key=places.__getitem__) == row.answer
    return None


def _mmmu_open(response: str, golds: Sequence[str]) -> bool:
    """Whether a number of the response is gold's, or a part of it holds gold's text."""
    found = _mmmu_parts(response)
    values = [each for text in found + _numbers(found) for each in _mmmu_value(text)]
    return any(gold in value if isinstance(value, str) and isinstance(gold, str) else gold == value
               for value in values for each in golds for gold in _mmmu_value(each))  # fmt: skip


def _mmmu_parts(response: str) -> list[str]:
    """Of each line what stands behind the last "is ", "so " and the like, whichever is shortest; or all."""
    response = response.strip().strip(".").lower()
    marks, parts, lines = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "], [], \
        response.split("\n")  # fmt: skip
    for place, line in enumerate(lines):
        last = ["="] if place == len(lines) - 1 else []
        ends = [line.rpartition(mark)[2].strip() for mark in marks + last if mark in line]
        if ends and (part := min(ends, key=len)) not in ("", *":,.!?;'"):
            parts.append(part)
    return parts or [response]


def _numbers(texts: Sequence[str]) -> list[str]:
    """The numbers in texts: with commas, with an exponent, plain."""
    return [each for text in texts for pattern in (
        r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
        r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])") for each in re.findall(pattern, text)]  # fmt: skip


def _mmmu_value(text: str) -> list[str | float]:
    """A number rounded to 2 decimals, or a text; one letter is a word of its own."""
    text = text.strip()
    if (value := _parsed(float, text.replace(",", ""))) is not None:
        return [round(value, 2)]
    return [f" {text.lower()}", f"{text.lower()} "] if len(text) == 1 else [text.lower()]


def gsm8k(response: str, row: Row) -> bool:
    """Grade_school_math/dataset.py of openai/grade-school-math: the number after the first "####"."""
    said = re.findall(r"#### (-?[0-9.,]+)", response)
    gold = row.answer.rpartition("#### ")[2]  # also of a row whose working was removed
    return bool(said) and said[0].replace(",", "") == gold.replace(",", "")


def gpqa(response: str, row: Row) -> bool:
    """Gpqa_eval.py of openai/simple-evals: the letter after the first "Answer:"."""
    return re.findall(r"(?i)Answer[ \t]*:[ \t]*\$?([A-D])\$?", response)[:1] == [row.answer]


def wemath(response: str, row: Row) -> bool:
    """Evaluation/accuracy.py of We-Math/We-Math: the first letter after the last "Answer"."""
    said = re.sub("[><:.]", "", response.rpartition("Answer")[2].strip()).strip()[:1]
    return said in tuple("ABCDEFGH") and said == row.answer


def dynamath(response: str, row: Row) -> bool:
    """Evaluation/opensource_json_eval.py of DynaMath/DynaMath: the "short answer" of a JSON object, within 1e-3."""
    first, last = response.find("{"), response.rfind("}")
    text = response[first : last + 1].replace("\\", "") if 0 <= first < last else response
    reply = _parsed(lambda text: json.loads(text, strict=False), text)
    if reply is not None and not isinstance(reply, dict):
        return False
    said = text.split("\n")[-1][:-1] if reply is None else str(reply.get("short answer"))
    kind = row.extra.get("answer_type")
    if kind == "float":
        factor, pi, _ = said.split(" ")[0].partition("\u03c0")
        value, gold = _parsed(float, factor), _parsed(float, row.answer)
        return None not in (value, gold) and abs(value * (math.pi if pi else 1.0) - gold) <= 1e-3
    if kind == "multiple choice":
        return row.answer in said[:3] if len(said) != 1 else said == row.answer
    return row.answer in said


def number(text: str) -> float | None:
    """The value of an expression of real numbers in LaTeX; None of anything else."""
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", "".join(text.split()))
    tokens = _TOKEN.findall(text)[::-1]  # read from its end
    if not tokens or "".join(tokens[::-1]) != text or len(tokens) > MOST_TOKENS:
        return None
    try:
        value = _sum(tokens)
    except (IndexError, ValueError, ArithmeticError, RecursionError):
        return None
    return value if not tokens and isinstance(value, float) and math.isfinite(value) else None


def _sum(tokens: list[str]) -> float:
    total = _product(tokens)
    while tokens and tokens[-1] in "+-":
        total += _product(tokens)  # its sign is that of the first factor
    return total


def _product(tokens: list[str]) -> float:
    value = _power(tokens)
    while tokens and tokens[-1] not in "+-)}]":
        sign = tokens.pop() if tokens[-1] in ("*", "/", r"\cdot", r"\times", r"\div") else "*"
        factor = _power(tokens)
        value = value / factor if sign in ("/", r"\div") else value * factor
    return value


def _power(tokens: list[str]) -> float:
    if tokens[-1] in "+-":
        return -_power(tokens) if tokens.pop() == "-" else _power(tokens)
    base = _atom(tokens)
    if tokens and tokens[-1] == "^":
        tokens.pop()
        base **= _power(tokens)
    return base


def _atom(tokens: list[str]) -> float:
    token = tokens.pop()
    if token in ("(", "{"):
        value = _sum(tokens)
        if tokens.pop() != {"(": ")", "{": "}"}[token]:
            raise ValueError("another bracket is closed")
        return value
    if token == r"\frac":
        return _atom(tokens) / _atom(tokens)
    if token == r"\sqrt":
        index = 2.0
        if tokens[-1] == "[":
            tokens.pop()
            index = _sum(tokens)
            tokens.pop()
        root: float = _atom(tokens) ** (1 / index)
        return root
    return math.pi if token == r"\pi" else float(token)


def _parsed(parse: Callable[[str], Any], text: str) -> Any:
    """`parse(text)`, None if it fails."""
    try:
        return parse(text)
    except (ValueError, OverflowError, RecursionError):
        return None


def _any(values: Iterable[bool | None]) -> bool | None:
    values = list(values)
    return True if True in values else None if None in values else False


def _all(values: Iterable[bool | None]) -> bool | None:
    values = list(values)
    return False if False in values else None if None in values else True


def _edits(a: str, b: str) -> int:
    """The Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]
