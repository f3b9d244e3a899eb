"""Published layouts of rows: a table, one entry each.

Most data is read by the names of its columns alone (columns.py). An entry says what names cannot: which of several
columns counts, which instruction is baked into the text, and what a value means. To add one, write an entry: `has` are
columns that rows of no other entry have together, `columns` are tried before the common names, `change` returns the
record with other values, and with a `gold_rule` if answers are compared in a way of their own. `prompt.columns` comes
before all of them.

Next: chat.py, rows that are chats.
"""

import functools
import hashlib
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from nanolmmr1.data.readers import BadRow, parsed
from nanolmmr1.errors import UserError

Record = dict[str, Any]

# Instructions that trainers and benchmarks add to a problem, letter for letter, without a full stop at the end. The
# recipe's prompt gives its own, so a row's would be a second one, or ask for another format. Anything else may be part
# of the problem. Sources: verl's and EasyR1's data scripts, DAPO-Math, VLM-R1, simple-evals, MathVista, LLaVA.
STEPS = "Solve the following math problem step by step."
LAST_LINE = ("The last line of your response should be of the form Answer: ${0} (without quotes) where ${0} is the "
             "answer to the problem.")
HINTS = tuple(f"Hint: Please answer the question {form}, at the end" for form in (
    "and provide the correct option letter, e.g., A, B, C, D",
    "requiring an integer answer and provide the final value, e.g., 1, 2, 3",
    "requiring a floating-point number with one decimal place and provide the final value, e.g., 1.2, 1.3, 1.4",
    "requiring a floating-point number with two decimal places and provide the final value, e.g., 1.23, 1.34, 1.45",
    "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4]"))
BEFORE = (*(f"{hint}.\nQuestion:" for hint in HINTS), *(f"{STEPS} {LAST_LINE.format(x)}" for x in ("Answer", "ANSWER")),
          STEPS)
AFTER = (
    *HINTS,
    "Let's think step by step and output the final answer after \"####\"",
    r"Let's think step by step and output the final answer within \boxed{}",
    *(f"Please {verb} step by step{comma} and put your final answer {where}\\boxed{{}}" for verb in ("reason", "think")
      for comma in (",", "") for where in ("within ", "in ")),
    r"Please reason step by step, and put your final answer option (e.g., A, B, C, D) within \boxed{}, like \boxed{A}",
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer",
    "The reasoning process MUST BE enclosed within <think> </think> tags",
    "The final answer MUST BE enclosed within <answer> </answer> tags",
    r"The final answer MUST BE put in \boxed{}",
    *(f"{verb} the thinking process in <think> </think> {rest} in <answer> </answer> tags"
      for verb in ("First output", "Output") for rest in ("tags and then output the final answer",
                                                          "and final answer", "and final answer (number)")),
    "Output the final answer in JSON format",
    'Remember to put your answer on its own line after "Answer:"',
    'Remember to put your answer on its own line after "Answer:", and you do not need to use a \\boxed command',
    "Answer with the option's letter from the given choices directly",
    "Answer the question using a single word or phrase",
)
# These may also end a sentence of the problem, as its object.
SHORT = ("Let's think step by step", "Please reason step by step", "Please think step by step")
MOST = 5  # instructions of one problem
MARKERS = re.compile(r"(?:\s*<image>)*\s*")
MOST_DECIMALS = 15  # of a gold rule


def without_instruction(problem: str) -> str:
    """A problem without the instructions of the tables above."""
    markers = MARKERS.match(problem)
    assert markers, "the pattern fits an empty text"
    if start := next((each for each in BEFORE if problem.startswith(each, markers.end())), ""):
        problem = markers[0] + problem[markers.end() + len(start):].lstrip()
    for _ in range(MOST):
        text = problem.rstrip().removesuffix(".")
        end = next(filter(text.endswith, (*AFTER, *SHORT)), "")
        before = text.removesuffix(end)
        apart = r"(^|[.?!\u3002\uff1f\uff01]\s+|\n\s*)$" if end in SHORT else r"(^|\s)$"
        if not end or not re.search(apart, before[-20:]):
            break
        problem = before.rstrip()
    return problem


class Schema(NamedTuple):
    """A published layout of rows."""

    name: str
    has: tuple[str, ...]  # rows with all of these columns are of this schema; the first in the table counts
    columns: dict[str, str] = {}  # our column -> the data's, also dotted; an empty value leaves it to the common names
    instructed: bool = False  # the text may hold instructions
    change: Callable[[Record], Record] = lambda record: record  # called before columns are read
    alone: bool = False  # rows with other columns are of another schema
    common: bool = True  # the common names are tried too
    text_gold: bool = False  # the gold of a choice is an option's text; its letter is read, and the options are listed


def _virl39k(record: Record) -> Record:
    """A pass rate of -1 was not measured."""
    return record | {name: None for name in record if name.startswith("PassRate") and record[name] == -1}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _mathvista(record: Record) -> Record:
    """Units stand apart; floating-point numbers are compared to a precision, 1 or 1.0. Without a valid one: exactly."""
    question, unit, precision = record.get("question"), record.get("unit"), record.get("precision")
    joined = {"question": f"{question} (Unit: {unit})"} if _is_text(question) and _is_text(unit) else {}
    decimals = next((n for n in range(MOST_DECIMALS + 1) if n == precision), None)
    is_rounded = record.get("answer_type") == "float" and decimals is not None
    return record | joined | {"gold_rule": {"decimals": decimals} if is_rounded else {}}


def _mathverse(record: Record) -> Record:
    """The text of a Vision Only row is in its picture; what is asked then is the benchmark's own prompt.

    Some golds are an option's text, begin with a word as in "Area $=12$", or have a degree sign read as GBK.
    """
    record = record if record.get("question") else record | {"question": record.get("query_cot")}
    if not isinstance(gold := record.get("answer"), str):
        return record
    gold = re.sub(r"^\s*(?:[A-Za-z]{3,}|S\.A\.)(?: [A-Za-z]+)*\s*(\$?)\s*=", r"\1", gold.replace("\u63b3", "\u00b0"))
    if record.get("question_type") == "multi-choice" and not re.fullmatch(r"(?:[\W_]*[A-J])+[\W_]*", gold):
        texts = "\n".join(str(record.get(name)) for name in ("question", "question_for_eval"))
        letters = set(re.findall(rf"(?<!\S)\(?([A-J])[.:)]\s*{re.escape(gold.strip())}(?!\S)", texts))
        gold = letters.pop() if len(letters) == 1 else gold
    return record | {"answer": gold}


def _olympiad(record: Record) -> Record:
    """Questions of physics may share a context, which EMMA calls none where it is absent; a tolerance is text."""
    parts = [record.get("context"), record.get("question")]
    parts[0] = None if str(parts[0]).strip().lower() == "none" else parts[0]
    joined = {"question": "\n".join(map(str, parts))} if all(map(_is_text, parts)) else {}
    return record | joined | {"gold_rule": _tolerance(record.get("error"))}


def _tolerance(error: Any) -> dict[str, list[float]]:
    """The gold rule of a tolerance: 0.1, "1e-1", or "1e-1,,2" for several values, where none stands for 0.

    {} for anything else: the answer must be exact then.
    """
    if isinstance(error, bool) or not isinstance(error, str | int | float):
        return {}
    try:
        values = [float(each.strip() or 0) for each in str(error).split(",")]
    except ValueError:
        return {}
    return {"tolerance": values} if any(values) and all(0 <= each < math.inf for each in values) else {}


def _mmmu(record: Record) -> Record:
    """The answer of an open question may be a text of several, any of which is right; numbers have two decimals."""
    if record.get("question_type") != "open":
        return record
    gold = record.get("answer")
    found = parsed(gold) if isinstance(gold, str) else gold
    texts = [str(each) for each in (found if isinstance(found, list) else [gold])
             if each is not None and str(each).strip()]
    return record | {"answer": texts[0] if texts else None, "gold_rule": {"accept": texts[1:], "decimals": 2}}


def _dynamath(record: Record) -> Record:
    return record | {"gold_rule": {"tolerance": [1e-3]} if record.get("answer_type") == "float" else {}}


def _gpqa(record: Record) -> Record:
    """Options in an order that is a function of the question: the data has the right one first."""
    values = [record.get(name) for name in
              ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")]
    options = [str(value).strip() for value in values if _is_text(value) or isinstance(value, int | float)]
    if len(set(options)) < len(values):
        raise BadRow("options incomplete", "GPQA needs a right and three wrong answers, all filled and different; "
                     "complete them")
    right, question = options[0], record.get("Question")
    try:
        options.sort(key=lambda option: hashlib.sha256(f"{question or ''}\n{option}".encode()).digest())
    except UnicodeEncodeError as error:
        raise BadRow("half a surrogate", "the question or an option holds half a surrogate pair, which is no text; "
                     "repair its encoding") from error
    return {"id": record.get("Record ID")} | record | {"problem": question, "options": options, "answer": right}


def _sokoban(record: Record) -> Record:
    if not record.get("answer"):
        raise BadRow("scored by an environment", "a level of Sokoban has no answer: its environment scores the moves; "
                     "write a reward function that does")
    return record


OURS = "nanolmmr1"  # a column of the rows that prepare, passrate and caption write; its value is their version
SCHEMAS = (
    # Rows that we wrote keep the columns of their source, which must not be read a second time.
    Schema(OURS, (OURS,), {name: name for name in
           ("problem", "answer", "images", "options", "caption", "id", "task", "gold_rule")}, common=False),
    # training sources
    Schema("virl39k", ("PassRate_32BTrained", "qid"), change=_virl39k),
    Schema("virl39k", ("qid", "category", "images", "problem")),
    Schema("lmm_r1_sokoban", ("message", "env_path"), change=_sokoban),
    Schema("lmm_r1", ("message", "question"), {"problem": "message", "images": "message"}, instructed=True),
    Schema("mm_eureka", ("message", "answer"), instructed=True),
    Schema("verl", ("prompt", "reward_model"),
           {"problem": "extra_info.question", "answer": "reward_model.ground_truth"}, instructed=True),
    Schema("geometry3k", ("images", "problem", "choices", "ground_truth"), {"answer": "answer"}),
    Schema("geometry3k_original", ("problem_text", "problem_type_graph")),
    Schema("llava", ("conversations",), instructed=True),
    Schema("mathv360k", ("conversations", "image", "id"), instructed=True),  # LLaVA's layout: known by its name alone
    Schema("ms_swift", ("messages",), instructed=True),
    Schema("trl", ("prompt", "completion"), instructed=True),
    Schema("trl", ("prompt", "solution"), instructed=True),
    Schema("trl", ("prompt", "answer"), instructed=True),
    # benchmarks
    Schema("mathvista", ("pid", "question", "answer_type", "precision"), change=_mathvista, instructed=True,
           text_gold=True),
    Schema("mathverse", ("problem_version", "question", "query_cot"), change=_mathverse),
    Schema("mathvision", ("question", "options", "level", "subject", "solution")),
    Schema("olympiadbench", ("final_answer", "question", "answer_type"), change=_olympiad),
    Schema("mmstar", ("question", "l2_category", "meta_info")),
    Schema("mmmu", ("question", "img_type", "topic_difficulty"), change=_mmmu),
    Schema("wemath", ("question", "option", "knowledge concept")),
    Schema("logicvista", ("imagename", "question", "broad_capability")),
    *(Schema("dynamath", ("question", "answer_type", level, "subject"), change=_dynamath)
      for level in ("level", "knowledge_level")),
    Schema("emma", ("pid", "question", "type", "context", "category"), change=_olympiad),
    Schema("gpqa", ("Question", "Correct Answer", "Incorrect Answer 3"), change=_gpqa, text_gold=True),
    Schema("math500", ("problem", "unique_id", "subject", "level")),
    # text, by few columns, so they come last
    Schema("math", ("problem", "type", "level", "solution")),
    Schema("deepscaler", ("problem", "answer", "solution")),
    Schema("easyr1", ("problem", "answer", "images")),  # and our own rows
    Schema("gsm8k", ("question", "answer"), alone=True),
)
OTHER = Schema("", ())
NAMES = tuple(dict.fromkeys(schema.name for schema in SCHEMAS))


def recognize(record: Record) -> Schema:
    """The schema of a record by its columns; OTHER if no entry fits."""
    return _recognize(frozenset(record))


@functools.lru_cache(1000)  # most records of a source have the same columns
def _recognize(names: frozenset[str]) -> Schema:
    return next((schema for schema in SCHEMAS if names.issuperset(schema.has)
                 and not (schema.alone and len(names) > len(schema.has))), OTHER)


def named(name: str) -> tuple[Schema, ...]:
    """The entries of a name.

    Raises:
        UserError: there is none.
    """
    if not (found := tuple(schema for schema in SCHEMAS if schema.name == name)):
        raise UserError(f"{name!r} is no schema: one of {', '.join(NAMES)}")
    return found
