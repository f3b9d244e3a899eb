"""Published layouts of rows: a table, one entry each.

Most data is read by the names of its columns alone (columns.py). An entry says what names cannot: which of several
columns counts, which instruction is baked into the text, and what a value means. To add one, write an entry: `has` are
columns that rows of no other entry have together, `columns` are tried before the common names, `change` returns the
record with other values. `prompt.columns` comes before all of them.

Next: chat.py, rows that are chats.
"""

import functools
import hashlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from nanolmmr1.data.readers import BadRow
from nanolmmr1.errors import UserError

Record = dict[str, Any]

# Instructions that trainers and benchmarks add to a problem. The recipe's prompt gives its own, so a row's would be a
# second one, or ask for another format. Sources: verl's and EasyR1's data scripts, DAPO-Math, VLM-R1, simple-evals,
# MathVista's hints, LLaVA's short-answer prompts.
BEFORE = re.compile(r"""^((?:\s*<image>)*\s*) (?:
    Hint:[^\n]{1,300}\n\s*Question:\s*
  | Solve\ the\ following\ math\ problem\ step\ by\ step\.\s*
    (?:The\ last\ line\ of\ your\ response\ should\ be[^\n]{0,100}the\ answer\ to\ the\ problem\.\s*)?
)""", re.X | re.I)
AFTER = re.compile(r"""(?:^|\s+) (?:(?:
    Let's\ think\ step\ by\ step(?:\ and\ output\ the\ final\ answer\ (?:after\ "\#{4}"|within\ \\boxed\{\}))?\.?
  | Please\ (?:reason|think)\ step\ by\ step,?(?:\ and\ put\ your\ final\ answer[^\n]{0,60}\\boxed\{[^}\n]{0,20}\}
    (?:,\ like\ \\boxed\{\w\})?)?\.?
  | You\ FIRST\ think\ about\ the\ reasoning\ process[^\n]{0,100}the\ final\ answer\.
  | The\ (?:reasoning\ process|final\ answer)\ MUST\ BE\ [^\n]{1,80}?(?:tags|\\boxed\{\})\.?
  | (?:First\ )?output\ the\ thinking\ process\ in\ <think>[^\n]{0,80}</answer>\ tags\.?
  | Output\ the\ final\ answer\ in\ JSON\ format\.?
  | Remember\ to\ put\ your\ answer\ on\ its\ own\ line[^\n]{0,120}
  | Answer\ with\ the\ option's\ letter\ from\ the\ given\ choices\ directly\.?
  | Answer\ the\ question\ using\ a\ single\ word\ or\ phrase\.?
  | Hint:\ Please\ answer\ the\ question[^\n]{0,200}
)\s*)+$""", re.X | re.I)
LONGEST = 2000  # characters at a text's end where instructions are looked for


def without_instruction(problem: str) -> str:
    """A problem without the instructions of the tables above."""
    problem = BEFORE.sub(r"\1", problem)
    return problem[:-LONGEST] + AFTER.sub("", problem[-LONGEST:])


class Schema(NamedTuple):
    """A published layout of rows."""

    name: str
    has: tuple[str, ...]  # rows with all of these columns are of this schema; the first in the table counts
    columns: dict[str, str] = {}  # our column -> the data's, also dotted; an empty value leaves it to the common names
    instructed: bool = False  # the text may hold instructions
    change: Callable[[Record], Record] = lambda record: record  # called before columns are read
    alone: bool = False  # rows with other columns are of another schema


def _virl39k(record: Record) -> Record:
    """A pass rate of -1 was not measured."""
    return record | {name: None for name in record if name.startswith("PassRate") and record[name] == -1}


def _mathvista(record: Record) -> Record:
    """The gold of a choice is an option's text; its letter lists the options in the problem. Units stand apart."""
    choices, answer, unit = record.get("choices"), record.get("answer"), record.get("unit")
    if isinstance(choices, list) and answer in choices[:26]:
        record = record | {"answer": chr(65 + choices.index(answer))}
    return record | {"question": f"{record['question']} (Unit: {unit})"} if unit and record["question"] else record


def _mathverse(record: Record) -> Record:
    """The text of a Vision Only row is in its picture; what is asked then is the benchmark's own prompt."""
    return record if record["question"] else record | {"question": record["query_cot"]}


def _olympiad(record: Record) -> Record:
    """Questions of physics may share a context."""
    parts = [record.get("context"), record["question"]]
    return record | {"question": "\n".join(parts)} if all(isinstance(part, str) and part for part in parts) else record


def _gpqa(record: Record) -> Record:
    """Options in an order that is a function of the question: the data has the right one first."""
    options = [str(record.get(name) or "").strip() for name in
               ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")]
    right, question = options[0], str(record["Question"] or "")
    options.sort(key=lambda option: hashlib.sha256(f"{question}\n{option}".encode()).digest())
    return {"id": record.get("Record ID"), "problem": question, "options": options,
            "answer": chr(65 + options.index(right))} | record


def _sokoban(record: Record) -> Record:
    if not record.get("answer"):
        raise BadRow("scored by an environment", "a level of Sokoban has no answer: its environment scores the moves; "
                     "write a reward function that does")
    return record


OURS = "nanolmmr1"  # a column of the rows that prepare, passrate and caption write; its value is their version
SCHEMAS = (
    # Rows that we wrote keep the columns of their source, which must not be read a second time.
    Schema(OURS, (OURS,), {"problem": "problem", "answer": "answer", "images": "images", "options": "options"}),
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
    Schema("mathvista", ("pid", "question", "answer_type", "precision"), change=_mathvista, instructed=True),
    Schema("mathverse", ("problem_version", "question", "query_cot"), change=_mathverse),
    Schema("mathvision", ("question", "options", "level", "subject", "solution")),
    Schema("olympiadbench", ("final_answer", "question", "answer_type"), change=_olympiad),
    Schema("mmstar", ("question", "l2_category", "meta_info")),
    Schema("mmmu", ("question", "img_type", "topic_difficulty")),
    Schema("wemath", ("question", "option", "knowledge concept")),
    Schema("logicvista", ("imagename", "question", "broad_capability")),
    Schema("dynamath", ("question", "answer_type", "level", "subject")),
    Schema("gpqa", ("Question", "Correct Answer", "Incorrect Answer 3"), change=_gpqa),
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
