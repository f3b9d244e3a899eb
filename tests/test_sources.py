"""Published sources as they are downloaded: schemas, instructions, pictures in archives and in folders that moved."""

import io
import json
import shutil
import tarfile
import zipfile

import pytest
from PIL import Image

from nanolmmr1.data import archives, schemas
from nanolmmr1.data.rows import load_rows, select_rows
from nanolmmr1.data.store import Row
from nanolmmr1.errors import UserError


def picture(color=0):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(file, "PNG")
    return file.getvalue()


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def row(name, **more):
    return dict(problem="<image>Find x.", answer="3", images=[name]) | more


def zipped(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, data in members.items():
            file.writestr(name, data)


def tarred(path, members, mode="w"):
    with tarfile.open(path, mode) as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("named, member", [
    ("images/a.png", "images/a.png"), ("images/a.png", "a.png"), ("images/a.png", "./images/a.png"),
    ("images/a.png", "data/images/a.png"), ("file:///home/author/data/images/a.png", "images/a.png"),
    ("/home/author/images/a.png", "a.png")])
def test_a_picture_is_read_from_the_archive_beside_the_data(tmp_path, pack, named, member):
    pack(tmp_path / f"pictures.{'zip' if pack is zipped else 'tar'}", {member: picture(), "images/other.png": b"x"})
    (found,) = load_rows(write(tmp_path / "rows.jsonl", row(named))).rows
    assert found.images == [picture()]


def test_pictures_of_one_name_in_two_folders_of_an_archive_are_not_confused(tmp_path):
    zipped(tmp_path / "p.zip", {"a/1.png": picture(1), "b/1.png": picture(2), "c/2.png": picture(3)})
    path = write(tmp_path / "rows.jsonl", row("b/1.png"), row("a/1.png"), row("1.png"), row("x/2.png"))
    rows, dropped, _ = load_rows(path)
    assert [each.images for each in rows] == [[picture(2)], [picture(1)]]
    assert dropped == {"picture missing": 2}, "two members may be 1.png, and none is x/2.png"


def test_a_picture_on_disk_comes_before_one_in_an_archive(tmp_path):
    zipped(tmp_path / "p.zip", {"a.png": picture(1)})
    (tmp_path / "a.png").write_bytes(picture(2))
    (found,) = load_rows(write(tmp_path / "rows.jsonl", row("a.png"))).rows
    assert found.images == [str(tmp_path / "a.png")]


def test_a_member_of_an_archive_is_no_way_out_of_it(tmp_path):
    (tmp_path / "in").mkdir()
    zipped(tmp_path / "in" / "p.zip", {"../a.png": picture(), "/etc/a.png": picture()})
    rows, dropped, _ = load_rows(write(tmp_path / "in" / "rows.jsonl", row("../a.png"), row("etc/a.png")))
    assert dropped == {"picture leads out of its folder": 1} and rows[0].images == [picture()]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"], "nothing is unpacked"


def test_damaged_archives_are_told_and_their_rows_dropped(tmp_path, monkeypatch):
    good = write(tmp_path / "rows.jsonl", row("a.png"), dict(problem="1+1?", answer="2"))
    (tmp_path / "p.zip").write_bytes(b"PK\3\4 broken")
    rows, dropped, notes = load_rows(good)
    assert dropped == {"picture missing": 1} and "p.zip cannot be read" in notes[-1]
    zipped(tmp_path / "p.zip", {"a.png": picture()})
    raw = bytearray((tmp_path / "p.zip").read_bytes())
    raw[raw.index(b"IHDR")] ^= 0xFF
    (tmp_path / "p.zip").write_bytes(raw)
    assert load_rows(good).dropped == {"picture broken": 1}, "by its checksum"
    zipped(tmp_path / "p.zip", {"a.png": bytes(5000)}, compression=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(archives, "MAX_RECORD", 1000)
    rows, dropped, notes = load_rows(good)
    assert dropped == {"picture broken": 1} and "more than 1,000 bytes" in notes[-1]
    (tmp_path / "p.zip").unlink()
    tarred(tmp_path / "p.tar", {"a.png": picture()}, "w:gz")
    assert "p.tar cannot be read" in load_rows(good).notes[-1]


def test_absolute_paths_of_another_machine_are_found_where_the_folder_is_now(tmp_path):
    for name in ("images/1.png", "images/deep/2.png", "2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture())
    path = write(tmp_path / "rows.jsonl", row("/home/author/data/images/1.png"),
                 row("/home/author/data/images/deep/2.png"), row("/home/author/data/gone/2.png"))
    rows, dropped, notes = load_rows(path)
    assert [each.images for each in rows] == [[str(tmp_path / "images/1.png")], [str(tmp_path / "images/deep/2.png")]]
    assert dropped == {"picture missing": 1}, "2.png stands in the folder, but all paths lose the same parts"
    assert any(f"pictures were found in {tmp_path} under the last parts of their paths" in note for note in notes)


INSTRUCTED = [  # as trainers and benchmarks write them, and what is left
    ('How many? Let\'s think step by step and output the final answer after "####".', "How many?"),
    (r"Find $x$. Let's think step by step and output the final answer within \boxed{}.", "Find $x$."),
    ("<image>Find x. You FIRST think about the reasoning process as an internal monologue and then provide the final "
     "answer. The reasoning process MUST BE enclosed within <think> </think> tags. The final answer MUST BE put in "
     r"\boxed{}.", "<image>Find x."),
    ("Find x.\nPlease reason step by step, and put your final answer within \\boxed{}.", "Find x."),
    ("Which?\nPlease reason step by step, and put your final answer option (e.g., A, B, C, D) within \\boxed{}, like "
     "\\boxed{A}.", "Which?"),
    ("Solve the following math problem step by step. The last line of your response should be of the form Answer: "
     "$Answer (without quotes) where $Answer is the answer to the problem.\n\nFind x.\n\nRemember to put your answer "
     'on its own line after "Answer:".', "Find x."),
    ("Which? First output the thinking process in <think> </think> tags and then output the final answer in <answer> "
     "</answer> tags. Output the final answer in JSON format.", "Which?"),
    ("<image>\nHint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, "
     "3, at the end.\nQuestion: How many?", "<image>\nHow many?"),
    ("Which? (A) 1 (B) 2\nAnswer with the option's letter from the given choices directly.", "Which? (A) 1 (B) 2"),
    ("What is it?\nAnswer the question using a single word or phrase.", "What is it?"),
]
PLAIN = ["Let's think step by step about why 1+1=2. What is 2+2?", "The final answer MUST BE even. Which is it?",
         "Hint: use symmetry. What is $x$?", "Please reason about it: how many?", r"Put $x$ in \boxed{}?",
         "Solve the following math problem: 1+1", "Question: How many?", ""]


@pytest.mark.parametrize("text, left", INSTRUCTED + [(text, text) for text in PLAIN])
def test_an_instruction_is_taken_off_and_a_problem_is_not(text, left):
    assert schemas.without_instruction(text) == left


def test_taking_instructions_off_long_texts_is_quick():
    for text in ("Let's think step by step " * 20_000, "<image>" * 20_000, "Hint:" * 50_000, " \n" * 100_000):
        schemas.without_instruction(text)


def test_only_rows_of_schemas_with_instructions_lose_them_and_it_is_told(tmp_path):
    text, left = INSTRUCTED[1]
    verl = dict(data_source="x", prompt=[dict(role="user", content=text)], reward_model=dict(ground_truth="3"))
    loaded = load_rows(write(tmp_path / "a.jsonl", verl, verl | dict(extra_info=dict(question="Which $x$?")),
                             dict(problem=text, answer="3")))
    assert [each.problem for each in loaded.rows] == [left, "Which $x$?", text]
    assert any("rows read as: verl (2)" in note for note in loaded.notes)
    assert any("1 rows had an instruction in their text, which was left out" in note for note in loaded.notes)


def test_the_recipes_columns_come_before_a_schemas(tmp_path):
    record = dict(data_source="x", prompt="Q?", reward_model=dict(ground_truth="3"), gold="4", text="Other?")
    path = write(tmp_path / "a.jsonl", record)
    (found,) = load_rows(path, dict(answer="gold", problem="text")).rows
    assert (found.problem, found.answer) == ("Other?", "4")


def test_a_named_schema_reads_its_rows_alone_and_an_unknown_name_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", dict(question="1+1?", answer="#### 2"), dict(query="1+1?", answer="2"))
    rows, dropped, notes = load_rows(path, schema="gsm8k")
    assert len(rows) == 1 and dropped == {"other schema": 1}
    assert "lacks columns of the schema gsm8k: question" in notes[-1]
    with pytest.raises(UserError, match="'gsm9k' is no schema: one of nanolmmr1, virl39k, lmm_r1"):
        load_rows(path, schema="gsm9k")


def test_a_pass_rate_that_was_not_measured_is_no_number(tmp_path):
    record = dict(question="1+1?", answer="\\boxed{2}", PassRate_32BTrained=0.5, PassRate_7BBase=-1.0, qid="q1")
    (found,) = load_rows(write(tmp_path / "a.jsonl", record)).rows
    assert found.extra == dict(PassRate_32BTrained=0.5, PassRate_7BBase=None) and found.id == "q1"


def test_a_folder_of_folders_with_a_row_a_file_is_read_in_the_order_of_numbers(tmp_path):
    for number in (10, 9, 2):
        folder = tmp_path / "train" / str(number)
        folder.mkdir(parents=True)
        (folder / "img_diagram.png").write_bytes(picture())
        (folder / "data.json").write_text(json.dumps(dict(problem_text=f"Find {number}.", answer="B", id=number,
            choices=["1", "2"], problem_type_graph=["Triangle"]), indent=2))  # fmt: skip
    rows = load_rows(str(tmp_path / "train")).rows
    assert [each.id for each in rows] == ["2", "9", "10"]
    assert rows[0].images == [str(tmp_path / "train/2/img_diagram.png")]
    for name in ("algebra/2", "algebra/10", "geometry/1"):
        write(tmp_path / "MATH" / f"{name}.json", dict(problem=name, level="Level 1", type="A", solution="\\boxed{1}"))
    found = load_rows(str(tmp_path / "MATH"))
    assert [each.problem for each in found.rows] == ["algebra/2", "algebra/10", "geometry/1"]
    assert "rows read as: math" in found.notes[1]
    shutil.rmtree(tmp_path / "MATH")
    write(tmp_path / "MATH/settings/a.json", dict(learning_rate=1))
    with pytest.raises(UserError, match="holds no .jsonl"):
        load_rows(str(tmp_path / "MATH"))


def test_csv_is_read_by_its_first_line(tmp_path):
    (tmp_path / "a.csv").write_text('question,answer,level\n"How, ""many""\nare there?",3,1\n1+1?,2,\n,5,1\n')
    rows, dropped, _ = load_rows(str(tmp_path / "a.csv"))
    assert [(each.problem, each.answer, each.extra) for each in rows] == [
        ('How, "many"\nare there?', "3", {"level": "1"}), ("1+1?", "2", {"level": ""})]
    assert dropped == {"no problem": 1}
    (tmp_path / "a.csv").write_text('question,answer\n"1+1?" x,2\n')
    with pytest.raises(UserError, match="a.csv:2: unreadable CSV.*quotes"):
        load_rows(str(tmp_path / "a.csv"))


def test_rows_outside_of_a_band_are_dropped_and_counted():
    class Anything:
        def at_least(self, row, captions): return 1  # noqa: E704
        def measure(self, row, captions): return 1, 0  # noqa: E704
        def gold_problems(self, rows): return [""] * len(rows)  # noqa: E704

    values = [0.0, 0.1, 0.5, 0.9, 1.0, 1, None, "0.5", True, float("nan"), -1]
    rows = [Row("Q", "1", extra={"info": {"rate": value}}) for value in values] + [Row("Q", "1")]
    kept = select_rows(rows, Anything(), False, 9, Anything(), "phases.a", {"info.rate": [0.1, 0.9]})
    assert kept.indices == [1, 2, 3]
    assert kept.dropped == {"info.rate outside of [0.1, 0.9]": 4, "no number in info.rate": 5}
    kept = select_rows(rows, Anything(), False, 9, Anything(), "phases.a", {"info.rate": [1, 1]})
    assert kept.indices == [4, 5]
    with pytest.raises(UserError, match=r"phases.a.data_filter=\{'rate': \[0, 1\]\}"):
        select_rows(rows, Anything(), False, 9, Anything(), "phases.a", {"rate": [0, 1]})
