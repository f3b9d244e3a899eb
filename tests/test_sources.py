"""Published sources as they are downloaded: schemas, instructions, pictures in archives and in folders that moved."""

import contextlib
import io
import json
import os
import random
import shutil
import tarfile
import time
import zipfile

import pytest
from PIL import Image

from nanolmmr1.data import archives, readers, schemas
from nanolmmr1.data.readers import BadRow
from nanolmmr1.data.rows import _Source, load_rows, select_rows
from nanolmmr1.data.store import Row, Rows
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


def test_pictures_and_archives_may_be_beside_the_folder_data(tmp_path):
    for name in ("data", "rows"):
        home = tmp_path / name
        zipped(home.parent / "p.zip", {"images/a.png": picture(1)})
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / "b.png").write_bytes(picture(2))
        loaded = load_rows(write(home / "rows.jsonl", row("images/a.png"), row("images/b.png"),
                                 dict(problem="1+1?", answer="2")))  # fmt: skip
        assert [each.images for each in loaded.rows][:-1] == (
            [[picture(1)], [str(tmp_path / "images/b.png")]] if name == "data" else [])
        assert loaded.dropped == ({} if name == "data" else {"picture missing": 2})


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


FLAT = {"1.png": picture(1)}
NESTED = {"images/1.png": picture(1)}


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("stem, members, named, kept", [
    ("train", FLAT, ["train/1.png", "test/1.png", "train/1.png"], [0, 2]),
    ("p", FLAT, ["/old/A/1.png", "/old/B/1.png"], [0]),
    ("FigureQA", NESTED, ["FigureQA/images/1.png", "Geometry3K/images/1.png", "images/1.png"], [0, 2]),
    ("p", NESTED | {"1.png": picture(2)}, ["images/1.png"], [0]),  # the whole path comes before its end
])
def test_members_of_an_archive_belong_to_one_folder(tmp_path, pack, stem, members, named, kept):
    pack(tmp_path / f"{stem}.{'zip' if pack is zipped else 'tar'}", members)
    rows, dropped, _ = load_rows(write(tmp_path / "rows.jsonl", *map(row, named)))
    assert [each.id for each in rows] == [f"rows.jsonl:{place + 1}" for place in kept]
    assert all(each.images == [picture(1)] for each in rows)
    assert dropped == ({"picture missing": len(named) - len(kept)} if len(named) > len(kept) else {})


def test_an_archive_that_gave_pictures_for_another_folder_than_its_own_is_refused(tmp_path):
    zipped(tmp_path / "train.zip", FLAT)
    path = write(tmp_path / "rows.jsonl", row("test/1.png"), row("train/1.png"))
    with pytest.raises(UserError, match=r"train.zip: rows name its pictures as test/\.\.\. and as train/"):
        load_rows(path)
    zipped(tmp_path / "test.zip", {"1.png": picture(2)})
    assert [each.images for each in load_rows(path).rows] == [[picture(2)], [picture(1)]], "by the archives' names"


def test_a_member_of_two_archives_is_taken_where_they_agree(tmp_path):
    zipped(tmp_path / "a.zip", NESTED)
    tarred(tmp_path / "b.tar", NESTED)
    path = write(tmp_path / "rows.jsonl", row("images/1.png"), dict(problem="1+1?", answer="2"))
    assert load_rows(path).rows[0].images == [picture(1)]
    tarred(tmp_path / "b.tar", {"images/1.png": picture(2)})
    rows, dropped, notes = load_rows(path)
    assert dropped == {"picture missing": 1} and "may be images/1.png of" in notes[-1] and "b.tar" in notes[-1]


def test_members_of_archives_of_other_systems_and_hard_links_are_found(tmp_path):
    zipped(tmp_path / "a.zip", {"images\\1.png": picture(1)})
    with tarfile.open(tmp_path / "b.tar", "w") as file:
        for info in (tarfile.TarInfo("./more/2.png"), tarfile.TarInfo("more/3.png")):
            info.size = len(picture(2)) if "2" in info.name else 0
            if not info.size:
                info.type, info.linkname = tarfile.LNKTYPE, "./more/2.png"
            file.addfile(info, io.BytesIO(picture(2)))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/4.png").write_bytes(picture(4))
    path = write(tmp_path / "rows.jsonl", *map(row, ["images/1.png", "images\\1.png", "more/3.png", "images\\4.png",
                                                     "C:\\author\\images\\4.png", "..\\images\\4.png"]))
    rows, dropped, _ = load_rows(path)
    here = [str(tmp_path / "images/4.png")]
    assert [each.images for each in rows] == [[picture(1)], [picture(1)], [picture(2)], here, here]
    assert dropped == {"picture missing": 1}, "and none leads out of the folder"


def test_a_broken_archive_is_read_once_and_told_only_where_no_other_has_the_picture(tmp_path, monkeypatch):
    zipped(tmp_path / "a.zip", {f"{place}.png": picture(place) for place in range(4)})
    (tmp_path / "b.zip").write_bytes(b"a part of a download")
    opened, read = [], archives._zip_members
    monkeypatch.setattr(archives, "_zip_members", lambda path: opened.append(path.name) or read(path))
    rows, dropped, notes = load_rows(write(tmp_path / "rows.jsonl", *(row(f"{place}.png") for place in range(5))))
    assert len(rows) == 4 and dropped == {"picture missing": 1} and "b.zip cannot be read" in notes[-1]
    assert opened == ["a.zip", "b.zip"]


def test_a_folder_of_many_archives_keeps_none_open(tmp_path):
    for place in range(20):
        (zipped if place % 2 else tarred)(tmp_path / f"{place}.{'zip' if place % 2 else 'tar'}",
                                          {f"{place}.png": picture(place)})
    folder, before = archives.PictureFolder(tmp_path), len(os.listdir("/proc/self/fd"))
    assert [folder.find(f"{place}.png") for place in range(20)] == [picture(place) for place in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_damaged_member_of_every_compression_costs_its_row_alone(tmp_path):
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        noise = bytes(random.Random(0).choices(range(256), k=2000))
        zipped(tmp_path / "p.zip", {"a.png": noise, "b.png": picture()}, compression=method)
        raw = bytearray((tmp_path / "p.zip").read_bytes())
        raw[300:900] = b"\xff" * 600
        (tmp_path / "p.zip").write_bytes(raw)
        rows, dropped, _ = load_rows(write(tmp_path / "rows.jsonl", row("a.png"), row("b.png")))
        assert len(rows) == 1 and dropped == {"picture broken": 1}, method


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


def test_pictures_of_two_folders_are_not_taken_from_one_that_was_moved(tmp_path):
    (tmp_path / "1.png").write_bytes(picture())
    rows, dropped, _ = load_rows(write(tmp_path / "rows.jsonl", row("/old/A/1.png"), row("/old/B/1.png")))
    assert [each.id for each in rows] == ["rows.jsonl:1"] and dropped == {"picture missing": 1}


def test_columns_that_are_not_read_do_not_decide_where_a_folder_was_moved(tmp_path):
    for name in ("images/1.png", "mask/1.png", "images/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture())
    zipped(tmp_path / "p.zip", {"3.png": picture(3)})
    path = write(tmp_path / "rows.jsonl", *(dict(
        mask_image=f"/m/mask/{place}.png", zipped_mask=f"masks/{place}.png", problem="Q", answer="1",
        image=f"/home/author/images/{place}.png" if place < 3 else "photos/3.png") for place in (1, 2, 3)))
    rows, dropped, _ = load_rows(path)
    found = [str(tmp_path / "images/1.png"), str(tmp_path / "images/2.png"), picture(3)]
    assert [each.images for each in rows] == [[item] for item in found] and not dropped


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
    ("Find x. Let's think step by step.", "Find x."), ("Find $x$\n\nPlease reason step by step.", "Find $x$"),
    ("Find x. Output the thinking process in <think> </think> and final answer (number) in <answer> </answer> tags.",
     "Find x."),
]
PLAIN = ["Let's think step by step about why 1+1=2. What is 2+2?", "The final answer MUST BE even. Which is it?",
         "Hint: use symmetry. What is $x$?", "Please reason about it: how many?", r"Put $x$ in \boxed{}?",
         "Solve the following math problem: 1+1", "Question: How many?", "",
         "Hint: use pi = 3.14 and g = 10.\nQuestion: How far?", "<image>Hint: <image> shows it.\nQuestion: How far?",
         "Find x.\nThe final answer must be rounded to two decimals and put in \\boxed{}.",
         "Find x. Please reason step by step, and put your final answer as a common fraction within \\boxed{}.",
         "Find x. Please reason step by step, and put your final answer (the sum of all roots) in \\boxed{}.",
         'Remember to put your answer on its own line after "Answer:". Give the answer in radians.',
         "What is wrong with saying: Let's think step by step.", "Why is it wrong to please reason step by step",
         "Find x. answer the question using a single word or phrase."]


@pytest.mark.parametrize("text, left", INSTRUCTED + [(text, text) for text in PLAIN])
def test_an_instruction_is_taken_off_and_a_problem_is_not(text, left):
    assert schemas.without_instruction(text) == left


def test_taking_instructions_off_long_texts_is_quick():
    start = time.process_time()
    for text in ("Let's think step by step " * 20_000, "Let's think step by step.\n" * 20_000, "<image>" * 200_000,
                 "<image> " * 3000 + " " * 100_000, "Hint:" * 50_000, " \n" * 100_000, " " * 200_000 + "x",
                 "a" + "\n" * 200_000 + "x", "You FIRST think " * 20_000):
        schemas.without_instruction(text)
    assert time.process_time() - start < 1


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


def test_files_beside_those_of_the_rows_and_damaged_ones_are_no_rows(tmp_path):
    for number in range(4):
        folder = tmp_path / "train" / str(number)
        folder.mkdir(parents=True)
        (folder / "logic_form.json").write_text(json.dumps(dict(text_logic_form=["x"]), indent=2))
        (folder / "data.json").write_text(json.dumps(dict(problem_text=f"Find {number}.", answer="1"), indent=2))
    for number in (0, 2):
        text = (tmp_path / f"train/{number}/data.json").read_text()
        (tmp_path / f"train/{number}/data.json").write_text(text[:-1])
    rows, dropped, notes = load_rows(str(tmp_path / "train"))
    assert [each.problem for each in rows] == ["Find 1.", "Find 3."] and dropped == {"unreadable JSON": 2}
    assert "0/data.json:1: unreadable JSON" in notes[-2]
    for name in ("algebra/1", "algebra/2", "geometry/1"):  # each is a row, though all folders have a first
        write(tmp_path / "MATH" / f"{name}.json", dict(problem=name, level="Level 1", type="A", solution="\\boxed{1}"))
    assert len(load_rows(str(tmp_path / "MATH")).rows) == 3


def test_a_json_file_that_cannot_be_opened_is_refused_by_name(tmp_path, monkeypatch):
    write(tmp_path / "a.json", row("a.png"))

    def refuse(*_):
        raise PermissionError("Permission denied")

    monkeypatch.setattr(readers, "open", refuse, raising=False)
    with pytest.raises(UserError, match="a.json cannot be read .Permission denied.: change its permissions"):
        load_rows(str(tmp_path))


ODD = [None, 7, -1, 0.5, float("nan"), True, "", " ", "text", "\ud800", b"x", [], [None], [1], ["a", "b"], {},
       {"a": None}, {"a": {"b": {"c": []}}}, [[[]]], "[", '{"question": null}']


@pytest.mark.parametrize("schema", schemas.SCHEMAS, ids=lambda schema: f"{schema.name}-{len(schema.has)}")
def test_odd_values_in_any_column_of_a_schema_cost_their_row_alone(tmp_path, schema):
    for value in ODD:
        for others in ({}, dict(answer=value, choices=value, unit=value, context=value)):
            record = dict.fromkeys(schema.has, value) | others
            with contextlib.suppress(BadRow):
                assert isinstance(schema.change(record), dict)
            source = _Source("x", {}, Rows.temporary(), ())
            source.add(record, "x:1", tmp_path)
            assert len(source.rows) + source.bad.total() == 1


def test_a_schema_that_fails_on_a_row_costs_the_row_alone(tmp_path):
    schema = schemas.Schema("odd", ("problem",), change=lambda record: record | {"answer": record["answer"] + 1})
    source = _Source("x", {}, Rows.temporary(), [schema])
    for answer in (1, "1"):
        source.add(dict(problem="Q", answer=answer), "x:1", tmp_path)
    assert source.rows[0].answer == "2" and source.bad == {"other schema": 1}
    assert "no row of the schema odd" in source.first[0]


MATHVISTA = dict(pid="1", question="Which?", question_type="multi_choice", answer_type="text", precision=None)
GPQA = {"Question": "Q?", "Correct Answer": "w", "Incorrect Answer 1": "x", "Incorrect Answer 2": "y",
        "Incorrect Answer 3": "z"}  # fmt: skip


@pytest.mark.parametrize("choices, answer, problem, gold", [
    (["red", "blue"], "blue", "Which?\n(A) red\n(B) blue", "B"),
    (["D", "B", "A", "C"], "D", "Which?\n(A) D\n(B) B\n(C) A\n(D) C", "A"),
    (["2", "1", "0"], "1", "Which?\n(A) 2\n(B) 1\n(C) 0", "B"),
    (["12", "12", "13"], "12", "Which?", "12"), (["", "12", "13"], "12", "Which?", "12"),
    ([f"c{place}" for place in range(30)], "c3", "Which?", "c3"), (None, "12", "Which?", "12"),
])
def test_the_gold_text_of_mathvista_is_the_letter_of_an_option_that_is_listed(tmp_path, choices, answer, problem, gold):
    record = MATHVISTA | dict(choices=choices, answer=answer, unit=float("nan"))
    (found,) = load_rows(write(tmp_path / "a.jsonl", record)).rows
    assert (found.problem, found.answer) == (problem, gold)


@pytest.mark.parametrize("column, value", [("Incorrect Answer 2", None), ("Incorrect Answer 2", " "),
                                           ("Correct Answer", None), ("Incorrect Answer 3", "w "),
                                           ("Incorrect Answer 1", ["x"]), ("Incorrect Answer 1", "\ud800")])
def test_a_row_of_gpqa_needs_four_different_options(tmp_path, column, value):
    rows, dropped, _ = load_rows(write(tmp_path / "a.jsonl", GPQA, GPQA | {column: value}))
    assert len(rows) == 1 and sum(dropped.values()) == 1
    assert rows[0].options[ord(rows[0].answer) - 65] == "w" and f"({rows[0].answer}) w" in rows[0].problem


def test_rows_that_we_wrote_are_read_by_our_columns_alone(tmp_path):
    (tmp_path / "x.png").write_bytes(picture())
    ours = dict(nanolmmr1=1, problem="Q?", answer="B", images=[])
    rows, dropped, notes = load_rows(write(
        tmp_path / "a.jsonl", ours | dict(options=[], image="x.png", choices=["3", "4"], qid="q1"),
        ours | dict(gold="A", answer=""), {"nanolmmr1": 1, "question": "Q?", "answer": "1"}, ours | dict(answer=0)))
    assert [(each.problem, each.answer, each.images, each.options, each.id) for each in rows] == [
        ("Q?", "B", [], [], "a.jsonl:1"), ("Q?", "0", [], [], "a.jsonl:4")]
    assert rows[0].extra == dict(image="x.png", choices=["3", "4"], qid="q1")
    assert dropped == {"no answer": 1, "no problem": 1}
    (named,) = load_rows(write(tmp_path / "b.jsonl", ours | dict(image="x.png")), dict(images="image")).rows
    assert len(named.images) == 1, "the recipe's name counts"


@pytest.mark.parametrize("gold", [0, 0.0, False])
def test_a_gold_answer_that_is_nothing_as_a_truth_value_counts(tmp_path, gold):
    record = dict(data_source="x", prompt="1-1?", reward_model=dict(ground_truth=gold), label="5")
    assert load_rows(write(tmp_path / "a.jsonl", record)).rows[0].answer == str(gold)


def test_csv_is_read_by_its_first_line(tmp_path):
    (tmp_path / "a.csv").write_text('question,answer,level\n"How, ""many""\nare there?",3,1\n1+1?,2,\n,5,1\n')
    rows, dropped, _ = load_rows(str(tmp_path / "a.csv"))
    assert [(each.problem, each.answer, each.extra) for each in rows] == [
        ('How, "many"\nare there?', "3", {"level": "1"}), ("1+1?", "2", {"level": ""})]
    assert dropped == {"no problem": 1}
    (tmp_path / "a.csv").write_text("question,answer\nWhat is 1,000 + 1?,1001\n1+1?,2\n3+3?\n")
    rows, dropped, notes = load_rows(str(tmp_path / "a.csv"))
    assert len(rows) == 1 and dropped == {"fields without a column": 1, "no answer": 1}
    assert "a.csv:2: the row has 1 fields more than the first line has names; put quotes" in notes[-2]
    (tmp_path / "a.csv").write_text("question,answer,answer\n1+1?,2,why\n")
    with pytest.raises(UserError, match="a.csv: the first line names the column 'answer' twice"):
        load_rows(str(tmp_path / "a.csv"))
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
