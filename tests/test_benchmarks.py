"""The table of benchmarks: rows of every published layout, prompts, subjects, families, and the scores of others."""

import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import fixtures_benchmarks as fixtures
import published as sources
import pytest

from nanolmmr1.benchmarks import choose
from nanolmmr1.benchmarks.item import Item, Response
from nanolmmr1.benchmarks.published import published, scores
from nanolmmr1.benchmarks.table import BENCHMARKS, MATHVERSE_VERSIONS, find, subject
from nanolmmr1.data.readers import HUB
from nanolmmr1.data.rows import load_rows
from nanolmmr1.data.schemas import NAMES, without_instruction
from nanolmmr1.data.store import Row
from nanolmmr1.errors import UserError

needs_shared = pytest.mark.skipif(not sources.SOURCES, reason="needs the shared notes")
# Rows of a source that are no rows of the benchmark: another version, language or kind of question.
OTHERS = {"mathverse": 1, "olympiadbench_en": 2, "olympiadbench_mm_maths": 3}
PAPERS = ("mathvista mathverse mathvision mathvision_testmini olympiadbench_en olympiadbench_mm_maths mmstar mmmu "
          "math500 gpqa_diamond wemath logicvista dynamath emma geometry3k gsm8k").split()  # fmt: skip
PROMPT_FILE = Path(__file__).with_name("official_prompts.txt")  # "## BENCHMARK PLACE" before each, of fixtures' rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rows of a benchmark's fixture, read as the command reads them."""
    loaded = {}

    def of(name):
        if name not in loaded:
            source = fixtures.publish_benchmark(name, tmp_path_factory.mktemp(name) / name)
            found = load_rows(source, schema=BENCHMARKS[name].schema)
            loaded[name] = found, list(choose.kept(found.rows, BENCHMARKS[name]))
        return loaded[name]

    return of


def test_the_table_has_the_papers_benchmarks_with_what_a_table_needs():
    assert list(BENCHMARKS) == PAPERS
    for entry in BENCHMARKS.values():
        assert entry.rows > 0 and entry.title and entry.licence and entry.schema in ("", *NAMES)
        assert all(re.fullmatch(rf"{HUB}@\w+", source) for source in entry.source), entry.source
        assert not entry.macro or entry.macro in entry.subjects
    assert [entry.name for entry in BENCHMARKS.values() if entry.private] == ["gpqa_diamond"]
    olympiad = BENCHMARKS["olympiadbench_en"], BENCHMARKS["olympiadbench_mm_maths"]
    assert [entry.rows for entry in olympiad] == [1517, 150] and set(olympiad[1].source) < set(olympiad[0].source)


@needs_shared
@pytest.mark.parametrize("name", PAPERS)
def test_every_benchmark_is_read_from_its_published_layout_and_no_row_is_lost(name, rows):
    loaded, kept = rows(name)
    empty = 1 if name == "logicvista" else 0  # one published gold is empty
    assert loaded.dropped == ({"no answer": 1} if empty else {})
    assert len(kept) == len(fixtures.published_rows(name)) - OTHERS.get(name, 0) - empty and len(kept) >= 12
    assert len({(row.problem, row.id) for row in kept}) == len(kept), "all are different"
    entry = BENCHMARKS[name]
    for row in kept:
        text = entry.official(row)
        assert text.count("<image>") == len(row.images) == row.problem.count("<image>")
        if name != "geometry3k":  # its gold is a value
            assert all(option in text for option in row.options if option not in "ABCDE" and "image" not in option)
        assert all(subject(row, column) for column in entry.subjects), "the tables have a value for every row"
        assert not entry.problem or subject(row, entry.problem)
    print(f"\n{name}: {len(kept)} rows; {[row.answer for row in kept]}\n{text}")


PROMPTS = re.findall(r"## (\w+) (\d+)\n(.*?)\n(?=## \w+ \d|\Z)", PROMPT_FILE.read_text(), re.S)


@needs_shared
@pytest.mark.parametrize(("name", "place", "prompt"), PROMPTS, ids=[f"{name} {place}" for name, place, _ in PROMPTS])
def test_a_benchmarks_own_prompt_is_as_it_was_published(name, place, prompt, rows):
    assert BENCHMARKS[name].official(rows(name)[1][int(place)]) == prompt


def test_every_own_prompt_is_compared_with_the_published_one():
    assert {name for name, _, _ in PROMPTS} == {*PAPERS} - {"mathvision_testmini", "olympiadbench_mm_maths"}, \
        "these two are asked as the benchmark that they are a part of"
    assert len(PROMPTS) == 34 and BENCHMARKS["mathvision_testmini"].official is BENCHMARKS["mathvision"].official


def test_an_instruction_is_taken_off_a_row_of_training_data_as_it_is_put_on_here():
    row = Row("How many?", "3", extra={"answer_type": "integer"})
    for name in ("mathvista", "gsm8k", "geometry3k"):
        assert without_instruction(BENCHMARKS[name].official(row)) == "How many?", name


@needs_shared
def test_only_the_benchmarks_rows_of_a_larger_file_are_kept(rows):
    versions = Counter(subject(row, "problem_version") for row in rows("mathverse")[1])
    assert len(versions) == 5 and "Text Only" not in versions
    assert len({subject(row, "problem_index") for row in rows("mathverse")[1]}) == 6
    for name in ("olympiadbench_en", "olympiadbench_mm_maths"):
        loaded, kept = rows(name)
        assert {row.extra["language"] for row in loaded.rows} == {"English", "Chinese"}
        assert {(row.extra["language"], row.extra["question_type"]) for row in kept} == {("English", "Open-ended")}
    assert all(row.images and row.extra["subject"] == "Math" for row in kept)
    assert len({row.extra["modality"] for row in rows("olympiadbench_en")[1]}) == 2
    assert BENCHMARKS["olympiadbench_mm_maths"].keep(Row("x", "1")), "a file of one configuration need not name it"


@needs_shared
def test_subjects_are_columns_nested_columns_and_what_an_id_tells(rows):
    assert subject(rows("mathvista")[1][2], "metadata.task") == "geometry problem solving"
    assert subject(rows("logicvista")[1][0], "skill") == "inductive"
    assert subject(rows("mathvision")[1][2], "level") == "5"
    art = rows("mmmu")[1][1]
    assert (subject(art, "mmmu_subject"), subject(art, "mmmu_domain")) == ("Art_Theory", "Art and Design")
    assert {subject(row, "mmmu_domain") for row in rows("mmmu")[1]} == {
        "Art and Design", "Business", "Science", "Humanities and Social Science", "Tech and Engineering"}  # fmt: skip
    assert len({subject(row, "id") for row in rows("dynamath")[1]}) == 3 and subject(rows("emma")[1][0], "task")


def test_a_subject_is_one_short_line_whatever_the_data_holds():
    row = Row("", "", id="\x1b[2J", extra={"a": "x" * 999, "b": ["\n", None, 3], "c": None, "d": {"e": 0},
                                          "answer_type": [], "precision": {}, "query_wo": 1, "option": []})  # fmt: skip
    assert len(subject(row, "a")) == 103 and subject(row, "b") == "\\n, 3"
    assert subject(row, "c") == subject(row, "z") == ""
    assert subject(row, "d.e") == "0" and subject(row, "id") == "\\x1b[2J" and subject(row, "mmmu_domain") == ""
    for entry in BENCHMARKS.values():
        assert isinstance(entry.official(row), str), "columns of the wrong type are no reason to stop"


@needs_shared
def test_the_real_rows_of_mathvision_are_a_subset_that_is_asked_as_published(shared):
    loaded, entry = load_rows(str(shared / "data" / "mathvision" / "testmini.jsonl"), decode=False), find("mathvision")
    kept = list(choose.kept(loaded.rows, entry))
    assert len(kept) == 300 < entry.rows and not loaded.dropped
    prompts = [entry.official(row) for row in kept]
    assert [text.count("<image>") for text in prompts] == [1] * 300
    assert all(subject(row, column) for row in kept for column in entry.subjects)
    assert len({subject(row, "subject") for row in kept}) == 16
    assert {subject(row, "level") for row in kept} == set("12345")
    drawn = [row for row, text in zip(kept, prompts, strict=True) if "\n(A)" in row.problem and "\n(A)" not in text]
    assert len(drawn) == 47, "options that are only in the picture are not listed"


def item(problem, right, **subjects):
    responses = [Response("", "", one, "", False, None, True, 1, False) for one in right]
    return Item("m", "b", f"{problem}{subjects}", problem, subjects, "", responses)


def family(number, steps, solved):
    """The items of a problem of We-Math in one sample; `steps`: whether each is right."""
    names = [f"{len(steps)}steps_{part}" for part in [*range(1, len(steps) + 1), "multi"]]
    return [item(f"p{number}", [right], key=name) for name, right in zip(names, [*steps, solved], strict=True)]


def test_we_maths_four_dimensions_are_those_of_its_formula():
    cases = [((True, True), True), ((True, False), True), ((False, False), True), ((True, True, True), False),
             ((True, False, True), False), ((True, True, False), True), ((True, True), True), ((False, True), False)]
    items = [each for number, case in enumerate(cases) for each in family(number, *case)]
    found = BENCHMARKS["wemath"].more(items)
    # Strict: 2 mastered, 3 by rote; loose: 4 mastered, 1 by rote; 1 generalizes inadequately, 2 lack knowledge.
    assert found["score (strict)"] == (8 - 0.5 * 1 - 3 - 2) / 8 and found["score (loose)"] == (8 - 0.5 * 1 - 1 - 2) / 8
    assert found["complete mastery (strict)"] == 2 / 8 and found["complete mastery (loose)"] == 4 / 8
    assert found["rote memorization (strict)"] == 3 / 5 and found["rote memorization (loose)"] == 1 / 5
    assert found["insufficient knowledge"] == 2 / 8 and found["inadequate generalization"] == 1 / 8
    part = [each for each in family(99, (True, True, True), True) if each.subjects["key"] != "3steps_3"]
    assert BENCHMARKS["wemath"].more([*items, *part]) == found, "incomplete families do not count"
    assert BENCHMARKS["wemath"].more([]) == {} and BENCHMARKS["gsm8k"].more(items) == {}
    unanswered = [each._replace(responses=[], fault="prompt too long") for each in items]
    assert BENCHMARKS["wemath"].more(unanswered)["score (loose)"] == 0


def test_we_maths_scores_of_several_samples_are_their_mean():
    both = [item("p", right, key=f"2steps_{part}") for part, right in (("1", [1, 1]), ("2", [1, 1]), ("multi", [1, 0]))]
    assert BENCHMARKS["wemath"].more(both)["score (strict)"] == 0.75


def test_dynamaths_worst_case_wants_all_ten_variants_right():
    always = [item("1", [True]) for _ in range(10)]
    once_wrong = [item("2", [place != 4]) for place in range(10)]
    few = [item("3", [True]) for _ in range(3)]
    assert BENCHMARKS["dynamath"].more([*always, *once_wrong, *few]) == {"worst case": 0.5}
    assert BENCHMARKS["dynamath"].more(few) == {}, "with a limit on rows there is no worst case"


def test_an_unknown_benchmark_is_refused_with_the_nearest_names():
    assert find("mathverse") is BENCHMARKS["mathverse"]
    with pytest.raises(UserError, match="'mathvist' is no benchmark: did you mean mathvista or"):
        find("mathvist")
    with pytest.raises(UserError, match="olympiadbench_en"):
        find("OlympiadBench")
    with pytest.raises(UserError, match="is no benchmark: one of mathvista, mathverse, .*, gsm8k.") as error:
        find("\x1bzzz")
    assert "\x1b" not in str(error.value)


def test_published_scores_that_are_counts_fit_their_denominators_and_the_others_are_marked():
    for score in scores():
        assert 0 < score.value < 100 and score.model and score.source
        assert score.benchmark.partition(": ")[0] in (*BENCHMARKS, "mean"), score
        if score.rows is None:
            assert score.fits
            continue
        value = Fraction(str(score.value))
        near = round(value * score.rows / 100)
        fits = abs(Fraction(100 * near, score.rows) - value) <= Fraction(5, 1000)
        assert fits == score.fits, score
        assert score.fits or score.note, f"{score}: why does no count fit?"
        known = BENCHMARKS[score.benchmark].rows if score.benchmark in BENCHMARKS else score.rows
        assert score.rows == known, score


def test_the_two_olympiad_columns_never_meet():
    lmm_r1, infi = published("olympiadbench_en"), published("olympiadbench_mm_maths")
    assert len(lmm_r1) == 7 and all(score.source.startswith("LMM-R1") for score in lmm_r1)
    assert [(score.model, score.value) for score in infi] == [("Infi-MMR-3B", 21.33)]


PAPER = "LMM-R1, arXiv"


def test_published_means_are_those_of_their_columns():
    def value(model, benchmark):
        return next(score.value for score in published(benchmark) if (score.model, score.source[:13]) == (model, PAPER))

    columns = {"mean: text": ("math500", "gpqa_diamond"), "mean: multimodal": (
        "olympiadbench_en", "mathvision", "mathverse", "mmstar", "mathvista")}  # fmt: skip
    for name, parts in columns.items():
        for score in published(name):
            mean = sum(value(score.model, part) for part in parts) / len(parts)
            assert (abs(mean - score.value) < 0.0051) == ("39.59" not in score.note), score


def test_the_counts_of_mathverses_versions_add_up_to_that_of_all():
    def count(model, benchmark):
        return next(round(score.value * score.rows / 100) for score in published(benchmark) if score.model == model)

    for model in ("Qwen2.5-VL-3B-Instruct", "LMM-R1 FRE-Text", "LMM-R1 MGT-Geo"):
        versions = [count(model, f"mathverse: problem_version={version}") for version in MATHVERSE_VERSIONS]
        assert sum(versions) == count(model, "mathverse"), model


def test_the_base_model_stands_beside_ours_as_others_report_it():
    base = [score.value for score in published("mathvista") if score.model == "Qwen2.5-VL-3B-Instruct"]
    assert min(base) == 23.6 and max(base) == 62.3 and len(base) == 8
    assert not published("mathvistas")
