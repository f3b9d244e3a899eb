"""The benchmarks: a table, one entry each.

To add one, write an entry here and its prompt in official.py; data/schemas.py needs an entry only where the names of
the columns do not tell how its rows are read. tests/fixtures_benchmarks.py wants some rows of it, in its own layout.

Next: official.py, their own prompts.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nanolmmr1.benchmarks import lenient, official
from nanolmmr1.benchmarks.item import Item
from nanolmmr1.data.columns import ABSENT, get
from nanolmmr1.data.readers import shown
from nanolmmr1.data.store import Row
from nanolmmr1.errors import UserError


class Benchmark(NamedTuple):
    """A benchmark: its rows, its prompt and its scores."""

    name: str
    title: str
    source: tuple[str, ...]  # as data.rows.load_rows reads it
    rows: int  # as published; 0: unknown
    licence: str  # as stated
    schema: str  # an entry of data/schemas.py that all rows must fit; "": any
    official: Callable[[Row], str]  # its own prompt, see official.py
    subjects: tuple[str, ...] = ()  # columns by which tables are broken down, see `subject`
    problem: str = ""  # the column that rows of one problem share; "": each row is a problem
    keep: Callable[[Row], bool] | None = None  # which rows of the source are the benchmark's; None: all
    macro: str = ""  # the column over whose values the headline is the mean of means; "": the mean over rows
    lenient: Callable[[str, Row], bool | None] | None = None  # its own scorer, see lenient.py
    private: bool = False  # rows are never written anywhere
    more: Callable[[Sequence[Item]], dict[str, float]] = lambda items: {}  # further scores, fractions of 1


MATHVERSE_VERSIONS = ("Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only")
MMMU_DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": ("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine",
                            "Pharmacy", "Public_Health"),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": ("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics",
                             "Energy_and_Power", "Materials", "Mechanical_Engineering")}
MMMU_ID = re.compile(r"[a-z]+_(\w+)_\d+")  # validation_Art_Theory_1
WEMATH_FAMILIES = {"2steps": {"1", "2", "multi"}, "3steps": {"1", "2", "3", "multi"}}  # the last is the whole problem
DYNAMATH_VARIANTS = 10


def _mmmu_subject(row: Row) -> str:
    found = MMMU_ID.fullmatch(row.id)
    return found[1] if found else ""


def _mmmu_domain(row: Row) -> str:
    return next((domain for domain, subjects in MMMU_DOMAINS.items() if _mmmu_subject(row) in subjects), "")


COMPUTED: dict[str, Callable[[Row], str]] = {  # columns that the data lacks, or that the reader has taken
    "id": lambda row: row.id, "task": lambda row: row.task, "mmmu_domain": _mmmu_domain, "mmmu_subject": _mmmu_subject}


def subject(row: Row, column: str) -> str:
    """A row's value in a column, also of a dotted name, in one short printable line; "" if it has none."""
    value = COMPUTED[column](row) if column in COMPUTED else get(row.extra, column)
    values = value if isinstance(value, list) else [value]
    return shown(", ".join(str(each) for each in values if each is not None and each is not ABSENT), 100)


def _has(**values: str) -> Callable[[Row], bool]:
    """A test of rows: each of these columns has its value here, or is absent, as in a file of one configuration."""
    return lambda row: all(row.extra.get(column, value) == value for column, value in values.items())


def _right(item: Item, sample: int) -> bool:
    return sample < len(item.responses) and item.responses[sample].right


def _samples(items: Sequence[Item]) -> range:
    return range(max([1, *(len(item.responses) for item in items)]))


def _wemath(items: Sequence[Item]) -> dict[str, float]:
    """Four-dimensional metrics over families: the steps of a problem and the problem that combines them.

    Insufficient knowledge fails a step and the problem, inadequate generalization the problem alone. Who solves the
    problem has mastered it if all steps are right (strict) or one is (loose); else it was rote memorization. Source:
    We-Math/We-Math evaluation/four_dimensional_metrics.py.
    """
    families: dict[tuple[str, str], dict[str, Item]] = {}
    for item in items:
        steps, _, step = item.subjects["key"].partition("_")  # 2steps_1 ... 3steps_multi
        families.setdefault((item.problem, steps), {})[step] = item
    counts = Counter[str]()
    for (_, steps), family in families.items():
        if set(family) != WEMATH_FAMILIES.get(steps):  # with a limit on rows, some families are incomplete
            continue
        for sample in _samples(items):
            right = {step: _right(item, sample) for step, item in family.items()}
            is_solved, steps_right = right.pop("multi"), list(right.values())
            counts["families"] += 1
            for kind, is_known in (("strict", all(steps_right)), ("loose", any(steps_right))):
                counts[f"mastery {kind}"] += is_solved and is_known
                counts[f"rote {kind}"] += is_solved and not is_known
            counts["generalization"] += all(steps_right) and not is_solved
    if not (total := counts["families"]):
        return {}
    scores: dict[str, float] = {}
    for kind in ("strict", "loose"):
        mastery, rote = counts[f"mastery {kind}"], counts[f"rote {kind}"]
        scores |= {f"score ({kind})": (mastery + counts["generalization"] / 2) / total,
                   f"complete mastery ({kind})": mastery / total,
                   f"rote memorization ({kind})": rote / max(mastery + rote, 1)}
    unsolved = total - counts["mastery strict"] - counts["rote strict"]
    return scores | {"insufficient knowledge": (unsolved - counts["generalization"]) / total,
                     "inadequate generalization": counts["generalization"] / total}


def _dynamath(items: Sequence[Item]) -> dict[str, float]:
    """Problems whose variants are all right. The average case is the headline."""
    problems: dict[str, list[Item]] = {}
    for item in items:
        problems.setdefault(item.problem, []).append(item)
    worst = [all(_right(item, sample) for item in variants) for variants in problems.values()
             if len(variants) == DYNAMATH_VARIANTS for sample in _samples(items)]
    return {"worst case": sum(worst) / len(worst)} if worst else {}


OLYMPIADBENCH = "Hothan/OlympiadBench:OE_{}_en_COMP@train"
OLYMPIADBENCH_SUBJECTS = ("subject", "modality", "answer_type", "subfield")
ENTRIES = (
    Benchmark("mathvista", "MathVista testmini", ("AI4Math/MathVista@testmini",), 1000,
              "CC BY-SA 4.0, for evaluation only", "mathvista", official.mathvista,
              ("metadata.task", "metadata.category", "question_type", "answer_type", "metadata.context",
               "metadata.source", "metadata.grade", "metadata.language"),
              lenient=lenient.mathvista),
    Benchmark("mathverse", "MathVerse testmini", ("AI4Math/MathVerse:testmini@testmini",), 3940, "MIT", "mathverse",
              official.mathverse, ("problem_version", "metadata.subject", "metadata.subfield", "question_type"),
              problem="problem_index", keep=lambda row: row.extra.get("problem_version") in MATHVERSE_VERSIONS,
              lenient=lenient.mathverse),
    # Rows of any layout, since those of `nanolmmr1.prepare` have options and subjects as well.
    Benchmark("mathvision", "MathVision test", ("MathLLMs/MathVision@test",), 3040, "MIT", "", official.mathvision,
              ("subject", "level"), lenient=lenient.mathvision),
    Benchmark("mathvision_testmini", "MathVision testmini", ("MathLLMs/MathVision@testmini",), 304, "MIT", "",
              official.mathvision, ("subject", "level"), lenient=lenient.mathvision),
    # LMM-R1's column. It is of an older copy with 675 rows of text maths; the four configurations have 674 by now.
    Benchmark("olympiadbench_en", "OlympiadBench, English open-ended, maths and physics",
              tuple(map(OLYMPIADBENCH.format, ("MM_maths", "MM_physics", "TO_maths", "TO_physics"))), 1517,
              "Apache-2.0", "olympiadbench", official.olympiadbench, OLYMPIADBENCH_SUBJECTS,
              keep=_has(language="English", question_type="Open-ended"), lenient=lenient.olympiadbench),
    # Infi-MMR's column.
    Benchmark("olympiadbench_mm_maths", "OlympiadBench, English open-ended, maths with pictures",
              (OLYMPIADBENCH.format("MM_maths"),), 150, "Apache-2.0", "olympiadbench", official.olympiadbench,
              OLYMPIADBENCH_SUBJECTS, keep=_has(language="English", question_type="Open-ended", subject="Math",
                                                modality="Multimodal"), lenient=lenient.olympiadbench),
    Benchmark("mmstar", "MM-Star", ("Lin-Chen/MMStar@val",), 1500, "not stated", "mmstar", official.mmstar,
              ("category", "l2_category"), macro="l2_category", lenient=lenient.mmstar),
    # The merged copy: MMMU/MMMU has a configuration per subject, and to load all is 30 downloads of the same rows.
    Benchmark("mmmu", "MMMU val", ("lmms-lab/MMMU@validation",), 900, "Apache-2.0", "mmmu", official.mmmu,
              ("mmmu_domain", "mmmu_subject", "question_type", "topic_difficulty"), lenient=lenient.mmmu),
    Benchmark("math500", "MATH-500", ("HuggingFaceH4/MATH-500@test",), 500, "MIT", "", official.math500,
              ("subject", "level")),
    Benchmark("gpqa_diamond", "GPQA-Diamond", ("Idavidrein/gpqa:gpqa_diamond@train",), 198, "CC BY 4.0", "gpqa",
              official.gpqa, ("High-level domain", "Subdomain"), lenient=lenient.gpqa, private=True),
    Benchmark("wemath", "We-Math testmini", ("We-Math/We-Math@testmini",), 1740, "CC BY-NC 4.0", "wemath",
              official.wemath, ("key",), problem="ID", lenient=lenient.wemath, more=_wemath),
    # The copy that lmms-eval reads: the authors publish on GitHub alone.
    Benchmark("logicvista", "LogicVista", ("lscpku/LogicVista@test",), 448, "Apache-2.0", "", official.plain,
              ("skill", "broad_capability"), lenient=lenient.logicvista),
    Benchmark("dynamath", "DynaMath", tuple(f"DynaMath/DynaMath_Sample@sample_variant{number}" for number in
                                            range(1, DYNAMATH_VARIANTS + 1)), 5010,
              "Apache-2.0 (data), MIT (repository)", "dynamath", official.dynamath,
              ("subject", "knowledge_level", "answer_type"), problem="id", lenient=lenient.dynamath, more=_dynamath),
    # All of it; EMMA-mini is a sample of 100 rows a subject.
    Benchmark("emma", "EMMA", tuple(map("luckychao/EMMA:{}@test".format, ("Chemistry", "Coding", "Math", "Physics"))),
              2788, "not stated", "emma", official.emma, ("subject", "category", "task", "type")),
    Benchmark("geometry3k", "Geometry3K test", ("hiyouga/geometry3k@test",), 601, "MIT", "", official.geometry3k),
    Benchmark("gsm8k", "GSM8K test", ("openai/gsm8k:main@test",), 1319, "MIT", "", official.gsm8k,
              lenient=lenient.gsm8k))
BENCHMARKS = {entry.name: entry for entry in ENTRIES}


def find(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
        UserError: there is none; the message has the nearest names.
    """
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name[:100].lower(), BENCHMARKS, cutoff=0.5)
        names = f"did you mean {' or '.join(near)}?" if near else f"one of {', '.join(BENCHMARKS)}."
        raise UserError(f"{shown(name, 100)!r} is no benchmark: {names} A file of rows with answers is one too, by its "
                        "path")
    return BENCHMARKS[name]
