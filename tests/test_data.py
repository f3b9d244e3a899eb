"""Rows, pictures and their order: what is read, what is refused and how, and who comes when."""

import base64
import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image, ImageOps

from nanolmmr1.data import images
from nanolmmr1.data.rows import PromptSampler, Row, image_size, load_rows, open_image, select_rows
from nanolmmr1.data.store import Rows
from nanolmmr1.errors import UserError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def picture(width=8, height=6, mode="RGB", kind="PNG", **options):
    file = io.BytesIO()
    Image.new(mode, (width, height), 0).save(file, kind, **options)
    return file.getvalue()


def png_header(width, height):
    """A PNG that claims a size and breaks off where its pixels should start."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 1000) + b"IDAT"


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def row(problem="1+1?", answer="2", **more):
    return dict(problem=problem, answer=answer, **more)


def read(source, columns=None, **options):
    return list(load_rows(source, columns, **options).rows)


def refusal(source, columns=None, **options):
    with pytest.raises(UserError) as caught:
        read(source, columns, **options)
    return str(caught.value)


def test_a_row_keeps_its_text_its_id_and_its_other_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", row(answer=7, caption="two dots", task="sum", level=3, qid="q9"), "",
                 row(answer=0.5, id=4), row(images=None))
    first, second, third = read(path)
    assert (first.problem, first.answer, first.caption, first.task, first.id) == ("1+1?", "7", "two dots", "sum", "q9")
    assert first.extra == {"level": 3} and first.images == []
    assert (second.answer, second.id) == ("0.5", "4")
    assert third.id == "a.jsonl:4", "the blank line counts"


def test_what_reward_functions_see_is_json_without_pixels(tmp_path):
    (tmp_path / "x.png").write_bytes(picture())
    shown = read(write(tmp_path / "a.jsonl", row("<image>", images=["x.png"], level=3)))[0].public()
    assert shown["level"] == 3 and shown["answer"] == "2" and shown["images"] == [str(tmp_path / "x.png")]
    assert json.loads(json.dumps(Row("<image>", "2", [b"12345"]).public()))["images"] == ["<5 bytes>"]


@pytest.mark.parametrize("line, words", [
    ("{broken", "unreadable JSON"), ("[" * 100_000, "unreadable JSON"),
    ("[1, 2]", "object with named columns"),
    (dict(text="?", answer="2"), "no problem.*text, answer.*prompt.columns.problem"),
    (dict(problem="?", truth="2"), "no answer.*problem, truth.*prompt.columns.answer"),
    (row(answer=None), "no answer"), (row(answer="  "), "no answer"), (row(answer=float("nan")), "no answer"),
    (row(answer=[]), "no answer"), (row(answer={"a": 2}), "answer must be text or a number"),
    (row(caption=["a"]), "caption must be text"),
    ('{"problem": "\\ud800", "answer": "2"}', "surrogate"),
    (row("<image>"), "1 <image> markers .* 0 images"),
    (row("<image1> <image2> <image3>", images=["x.png", "x.png"]), "names <image3>, and the row has 2 images"),
    (row("<image><image2>", images=["x.png", "x.png"]), "1 <image> markers .* 2 images"),
    (row("<image><image>", images=["x.png"]), "2 <image> markers .* 1 images"),
    (row("<image>", images=["y.png"]), "y.png' is missing"),
    (row("<image>", images=["nul\0"]), "leads out|is missing"),
    (row("<image>", images=["n" * 10_000]), "is missing"),
    (row("<image>", images=["."]), "is missing"),
    (row("<image>", images=[7]), "path or the bytes"),
    (row("<image>", images=["../x.png"]), "leads out of"), (row("<image>", images=["a/../../x.png"]), "leads out of"),
    (row("<image>", images=["text.png"]), "text.png cannot be read"),
    (row("<image>", images=["cut.jpg"]), "cut.jpg cannot be read.*truncated"),
    (row("<image>", images=["large.png"]), "more than 64,000,000 pixels.*8001 x 8000"),
    (row("<image>", images=["bomb.png"]), "more than 64,000,000 pixels"),
    (row("<image>", images=["thin.png"]), "2000 x 4 pixels is too thin"),
    (row("<image>", images=["https://a.b/x.png"]), "not fetched from https://"),
    (row("<image>", images=["data:image/png;base64,!"]), "is no base64"),
    (row("<image>", images=["data:image/png,x"]), "without base64"),
    (row(videos=["x.mp4"]), "has a video"), (row(video={"path": "x.mp4"}), "has a video"),
    (row(video_path="x.mp4"), "has a video"),
])
def test_a_bad_row_is_dropped_or_refused_with_file_and_line(tmp_path, line, words):
    folder = tmp_path / "data"
    # The first row has a picture, so that the others may have some.
    path = write(folder / "a.jsonl", row("<image>", images=["x.png"]), row(), line, row())
    for name in (tmp_path / "x.png", folder / "x.png"):
        name.write_bytes(picture())
    (folder / "thin.png").write_bytes(picture(2000, 4))
    (folder / "text.png").write_text("no picture")
    (folder / "cut.jpg").write_bytes(picture(400, 400, kind="JPEG")[:-300])
    (folder / "large.png").write_bytes(png_header(8001, 8000))
    (folder / "bomb.png").write_bytes(png_header(60_000, 60_000))
    rows, dropped, notes = load_rows(path)
    assert [each.id for each in rows] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4"] and list(dropped.values()) == [1]
    assert notes[0] == f"{path}: 3 of 4 rows read; 1 of 3 rows have pictures"
    assert notes[-2] == f"{path}: dropped 1 bad rows (1 {next(iter(dropped))}); the first:"
    assert notes[-1].startswith(f"  {path}:3: ") and re.search(words, notes[-1]), notes
    message = refusal(path, on_bad_row="stop")
    assert message.startswith(f"1 bad rows (1 {next(iter(dropped))}); with data.on_bad_row=skip")
    assert f"{path}:3: " in message and re.search(words, message) and len(message) < 1200


def test_a_source_without_a_good_row_is_refused_with_the_first_five_and_the_counts(tmp_path):
    path = write(tmp_path / "a.jsonl", *[row(answer="")] * 3, "{", *[row(answer="")] * 9)
    message = refusal(path)
    assert message.startswith(f"{path}:1: no answer; the row's columns are problem, answer")
    assert f"no row is left of {path}: 13 bad rows (12 no answer, 1 unreadable JSON)" in message
    assert f"{path}:4: unreadable JSON" in message and f"{path}:5: " in message and f"{path}:6: " not in message
    path = write(tmp_path / "b.jsonl", *[row(answer="")] * 20_000, row())
    assert f"the rest was not read of {path}: 10,000 bad rows (10,000 no answer)" in refusal(path)
    sources = [write(tmp_path / f"{name}.jsonl", row(), row(problem="")) for name in "cd"]
    assert load_rows(sources).dropped == {"no problem": 2}
    assert "2 bad rows (2 no problem)" in (message := refusal(sources, on_bad_row="stop"))
    assert "c.jsonl:2: " in message and "d.jsonl:2: " in message


def test_an_image_may_be_absolute_and_needs_no_list_and_stays_on_disk(tmp_path):
    (tmp_path / "x.png").write_bytes(picture())
    path = str(tmp_path / "x.png")
    assert read(write(tmp_path / "data" / "a.jsonl", row("<image>", images=[path])))[0].images == [path]
    rows = read(write(tmp_path / "a.jsonl", row("<image>", image="x.png"), row("<image>", images="x.png"),
                           row("no picture", image="")))
    assert [r.images for r in rows] == [[path], [path], []]


def test_one_broken_picture_among_hundreds_is_found_at_load(tmp_path):
    for i in range(250):
        (tmp_path / f"{i}.png").write_bytes(picture() if i != 237 else picture()[:-30])
    path = write(tmp_path / "a.jsonl", *[row("<image>", images=[f"{i}.png"]) for i in range(250)])
    rows, dropped, notes = load_rows(path)
    assert len(rows) == 249 and dropped == {"picture broken": 1} and notes[-1].startswith(f"  {path}:238: ")


def test_only_rows_with_pictures_are_checked_a_slice_at_a_time(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(picture())
    rows, read = Rows.temporary(), []
    for place in range(100):
        rows.append(Row("Q", "1", [str(tmp_path / ("x.png" if place % 20 else "gone.png"))] if place % 10 == 0 else []))
    monkeypatch.setattr(images, "SLICE", 3)
    monkeypatch.setattr(Rows, "__getitem__", lambda self, index, get=Rows.__getitem__: read.append(index) or
                        get(self, index))
    assert list(images.unusable(rows, range(0, 100, 10))) == [0, 20, 40, 60, 80]
    assert sorted(read) == list(range(0, 100, 10))
    assert images.unusable(rows, []) == {}


def test_markers_without_pictures_are_dropped_in_the_order_of_the_rows(tmp_path):
    (tmp_path / "x.png").write_bytes(picture())
    (tmp_path / "y.png").write_bytes(b"no picture")
    path = write(tmp_path / "a.jsonl", row("<image>", image="x.png"), row("See <image 2>"), row(image="y.png"),
                 row("<image>"))
    rows, dropped, notes = load_rows(path)
    assert len(rows) == 1 and dropped == {"markers and pictures differ": 2, "picture broken": 1}
    assert [line.partition(": ")[0].strip() for line in notes[-3:]] == [f"{path}:2", f"{path}:3", f"{path}:4"]


@pytest.mark.parametrize("name, text, words", [
    ("a.jsonl", "", "holds no rows"), ("a.json", "[]", "holds no rows"), ("a.txt", "problem,answer", "is not read"),
    ("a.parquet", "nothing", "not readable parquet"), ("a.json", '[{"problem": "?"', "unreadable JSON"),
])
def test_an_unusable_file_is_refused_by_name(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    message = refusal(str(tmp_path / name))
    assert str(tmp_path / name) in message and words in message


def test_a_source_that_does_not_exist_is_refused_before_asking_the_hub(tmp_path):
    for source in (str(tmp_path / "a.jsonl"), "data/train.jsonl", "nothing"):
        assert "does not exist" in refusal(source)


def test_an_unreachable_hub_id_is_the_users_error():
    code = ("from nanolmmr1.data.rows import load_rows, UserError\n"
            "try: load_rows('nobody/nothing@train')\nexcept UserError as error: print(error)")
    out = subprocess.run([sys.executable, "-c", code], env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True,
                         text=True, check=True, cwd=Path(__file__).resolve().parents[1])
    assert "nobody/nothing is neither a file or folder here nor a readable data set" in out.stdout


def test_a_json_file_is_a_list_or_lines(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps([row(), row("3+3?", 6)], indent=1))
    write(tmp_path / "lines.json", row(), row("3+3?", 6))
    for name in ("list.json", "lines.json"):
        assert [r.answer for r in read(str(tmp_path / name))] == ["2", "6"]
        assert read(str(tmp_path / name))[1].id == f"{name}:2"


def test_a_list_may_begin_with_a_byte_order_mark_and_an_object_may_hold_the_rows_by_id(tmp_path, monkeypatch):
    rows = {'1"]': row(), "b": row("3+3?", 6, meta={"a": 1})}
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(list(rows.values())).encode())
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=1))
    write(tmp_path / "d.json", {"meta": {"a": 1}} | row(), row("3+3?", 6))
    for chunk, names in ((1 << 20, "abcd"), (12, "abc"), (13, "abc")):
        monkeypatch.setattr("nanolmmr1.data.readers.CHUNK", chunk)
        for name in names:
            assert [r.answer for r in read(str(tmp_path / f"{name}.json"))] == ["2", "6"]
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=1)[:-2])
    assert "c.json:3: unreadable JSON" in refusal(str(tmp_path / "c.json"))


def test_a_folder_of_json_is_read_without_its_settings(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps([row()], indent=1))
    for name, value in (("dataset_info", {"splits": {}}), ("labels", ["a", "b"]), ("dataset_infos", {"a": {"b": 1}})):
        (tmp_path / f"{name}.json").write_text(json.dumps(value, indent=1))
    assert [r.id for r in read(str(tmp_path))] == ["train.json:1"]
    write(tmp_path / "test.json", row(), row())
    assert len(read(f"{tmp_path}@test")) == 2 and "the splits test, train: pick one" in refusal(str(tmp_path))
    (tmp_path / "up" / "main").mkdir(parents=True)
    write(tmp_path / "up" / "main" / "train.jsonl", row())
    assert "of its folders, these may: main" in refusal(str(tmp_path / "up"))


def test_a_configuration_of_the_hub_is_named_after_a_colon(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(name, config=None):
        if config != "main":
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: "
                             "['main', 'socratic']")
        return datasets.DatasetDict({split: datasets.Dataset.from_list([row()] * count)
                                     for split, count in (("train", 1), ("test", 2))})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read("openai/gsm8k:main@test")) == 2
    assert "has the splits train, test: pick one, as in openai/gsm8k:main@SPLIT" in refusal("openai/gsm8k:main")
    for source in ("openai/gsm8k", "openai/gsm8k@train", "openai/gsm8k:other@train"):
        message = refusal(source)
        assert "has the configurations 'main', 'socratic': pick one, as in openai/gsm8k:CONFIG or " in message


def test_parquet_rows_carry_pictures_as_bytes_or_paths(tmp_path):
    (tmp_path / "x.png").write_bytes(picture())
    rows = [row("<image><image>", images=[dict(bytes=picture(9, 9), path="lost.png"), dict(bytes=None, path="x.png")],
                raw=b"\0"),
            row("none", images=[], raw=b"\1")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read(str(tmp_path / "a.parquet"))
    assert first.images == [picture(9, 9), str(tmp_path / "x.png")] and second.images == []
    assert first.id == "a.parquet:1" and first.extra == {}, "bytes are no JSON, so no reward function's business"


def test_a_saved_data_set_gives_its_pictures_as_bytes(tmp_path):
    datasets = pytest.importorskip("datasets")
    image = Image.new("RGB", (9, 5), "red")
    data = datasets.Dataset.from_list([row("no picture", images=[]), row("<image><image>", "b", images=[image, image]),
                                       row("<image>", "c", images=[image])])
    data.select([2, 1]).save_to_disk(tmp_path / "one")
    rows = read(str(tmp_path / "one"))
    assert [r.answer for r in rows] == ["c", "b"] and [len(r.images) for r in rows] == [1, 2]
    assert isinstance(rows[0].images[0], bytes) and open_image(rows[0].images[0]).getpixel((0, 0)) == (255, 0, 0)
    assert "no splits" in refusal(f"{tmp_path}/one@train")

    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "two")
    assert len(read(f"{tmp_path}/two@train")) == 3
    assert read(f"{tmp_path}/two@test")[0].id == "two@test:1"
    assert "train, test" in refusal(str(tmp_path / "two"))
    assert "no split 'dev'" in refusal(f"{tmp_path}/two@dev")


def test_splits_of_a_folder_are_never_mixed_and_shards_belong_together(tmp_path):
    write(tmp_path / "mixed" / "train.jsonl", row())
    write(tmp_path / "mixed" / "test.jsonl", row(), row())
    assert "the splits test, train: pick one" in refusal(str(tmp_path / "mixed"))
    assert len(read(f"{tmp_path}/mixed@test")) == 2
    assert "no split 'dev'; it has test, train" in refusal(f"{tmp_path}/mixed@dev")
    assert "a single file has no splits" in refusal(f"{tmp_path}/mixed/test.jsonl@test")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for i in range(3):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row(answer=str(i))]),
                                    tmp_path / "hub" / "data" / f"train-0000{i}-of-00003.parquet")
    assert [r.answer for r in read(str(tmp_path / "hub"))] == ["0", "1", "2"]
    (tmp_path / "void").mkdir()
    assert "holds no .jsonl or .parquet file" in refusal(str(tmp_path / "void"))


def test_an_image_folder_is_read_by_its_metadata_and_may_have_an_at_sign(tmp_path):
    path = write(tmp_path / "a@b" / "metadata.jsonl", row("<image>", file_name="x.png"))
    (tmp_path / "a@b" / "x.png").write_bytes(picture())
    for source in (path, str(tmp_path / "a@b")):
        assert read(source)[0].images == [str(tmp_path / "a@b" / "x.png")]


B64 = base64.b64encode(picture()).decode()
PHOTO = base64.b64encode(picture(kind="JPEG")).decode()  # begins with a slash, as an absolute path does


@pytest.mark.parametrize("value", [
    "x.png", ["x.png"], {"path": "x.png"}, {"bytes": None, "path": "x.png"}, {"image": "x.png"}, [{"image": "x.png"}],
    {"url": "x.png"}, {"image_url": {"url": "x.png"}}, '["x.png"]', "['x.png']", '[{"path": "x.png"}]', [["x.png"]],
    "./x.png", "sub/../x.png", "link/x.png", "file://FOLDER/x.png", "file://localhost/FOLDER/x.png", "FOLDER/x.png",
    "a%20b.png", "file://FOLDER/a%2520b.png", ["x.png", None, ""],
    f"data:image/png;base64,{B64}", f"DATA:image/png;charset=x;base64,{B64}", B64, PHOTO, {"bytes": B64},
    f"data:;base64,{B64}", {"type": "base64", "data": B64}, B64.rstrip("="), "\n".join(re.findall(".{1,40}", B64)),
    PHOTO.replace("+", "-").replace("/", "_"), {"image_url": {"url": f"data:image/png;base64,{B64}", "detail": "low"}},
])
@pytest.mark.parametrize("column", ["images", "image"])
def test_a_picture_is_found_however_it_is_written(tmp_path, value, column):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    for name in ("x.png", "a%20b.png"):
        (folder / name).write_bytes(picture())
    (folder / "link").symlink_to(folder, target_is_directory=True)
    text = json.dumps(row("<image>", **{column: value})).replace("FOLDER", str(folder))
    (only,) = read(write(folder / "a.jsonl", text))
    (item,) = only.images
    assert (item if isinstance(item, bytes) else Path(item).read_bytes()) in (picture(), base64.b64decode(PHOTO))


def test_a_link_inside_the_data_folder_is_followed_and_a_path_above_it_is_not(tmp_path):
    store, folder = tmp_path / "store", tmp_path / "data"
    store.mkdir()
    (store / "x.png").write_bytes(picture())
    (tmp_path / "y.png").write_bytes(picture())
    folder.mkdir()
    (folder / "images").symlink_to(store)
    (folder / "z.png").symlink_to(store / "x.png")
    path = write(folder / "a.jsonl", *[row("<image>", image=name) for name in (
        "images/x.png", "z.png", "../y.png", "images/../../y.png", "../data/z.png", "images/../z.png")])
    rows, dropped, _ = load_rows(path)
    assert [r.images for r in rows] == [[str(folder / name)] for name in ("images/x.png", "z.png", "z.png", "z.png")]
    assert dropped == {"picture leads out of its folder": 2}


def test_relative_paths_of_images_start_at_image_dir_if_there_is_one(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "x.png").write_bytes(picture())
    path = write(tmp_path / "data" / "a.jsonl", row("<image>", image="x.png"))
    assert read(path, image_dir=str(tmp_path / "pictures"))[0].images == [str(tmp_path / "pictures" / "x.png")]
    assert "'x.png' is missing" in refusal(path)
    assert "data.image_dir=nowhere: there is no such folder" in refusal(path, image_dir="nowhere")
    write(tmp_path / "data" / "a.jsonl", row("<image>", image="../data/a.jsonl"))
    assert "leads out of" in refusal(path, image_dir=str(tmp_path / "pictures"))


@pytest.mark.parametrize("name", [
    "images", "image", "decoded_image", "image_path", "image_paths", "img", "img_path", "image_file", "imagename",
    "image_url", "picture", "pictures", "photo", "figure", "diagram", "jpg", "png", "image_1", "image_base64",
])
def test_a_picture_in_a_column_of_a_usual_name_is_read(tmp_path, name):
    (tmp_path / "x.png").write_bytes(picture())
    for value in ("x.png", ["x.png"], B64):
        rows, _, notes = load_rows(write(tmp_path / "a.jsonl", row(**{name: value}), row("2+2?", **{name: None})))
        assert [len(r.images) for r in rows] == [1, 0] and rows[0].problem == "<image>1+1?"
        assert notes[0].endswith("2 of 2 rows read; 1 of 2 rows have pictures")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row(**{name: picture()})]), tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet"))[0].images == [picture()]


def test_the_first_column_that_is_not_empty_counts(tmp_path):
    for name in ("x.png", "y.png"):
        (tmp_path / name).write_bytes(picture())
    rows = read(write(tmp_path / "a.jsonl", row(images=[], image="x.png"), row(images=None, image_path="y.png"),
                      row(images=[""], image="", img="x.png"), row(images=["y.png"], image="x.png"),
                      row(image="x.png", decoded_image={"bytes": B64, "path": None}), row(image=[], image_path=None)))
    found = [[item if isinstance(item, bytes) else Path(item).name for item in r.images] for r in rows]
    assert found == [["x.png"], ["y.png"], ["x.png"], ["y.png"], [picture()], []]


def test_words_in_a_column_of_such_a_name_are_no_picture_and_it_is_noted(tmp_path):
    rows, dropped, notes = load_rows(write(tmp_path / "a.jsonl", row(figure="a bar chart", img_width=3, photo=True)))
    assert rows[0].images == [] and not dropped
    assert len(notes) == 2 and "WARNING: the column 'figure' seems to hold pictures" in notes[1]
    assert "prompt.columns.images=figure" in notes[1]
    assert "WARNING: the column 'scan'" in load_rows(write(tmp_path / "a.jsonl", row(scan="gone.png"))).notes[1]


@pytest.mark.parametrize("columns, named", [
    (dict(scan="x.png"), "scan"), (dict(scan=["x.png"]), "scan"), (dict(scan={"bytes": B64}), "scan"),
    (dict(scan=B64), "scan"), (dict(meta=dict(scan="x.png")), "meta.scan"), (dict(more=json.dumps(["x.png"])), "more"),
    (dict(talk=[dict(role="user", content=[dict(type="image", image="x.png")])]), "talk"),
])
def test_pictures_that_would_be_lost_are_refused_with_the_key_that_reads_them(tmp_path, columns, named):
    (tmp_path / "x.png").write_bytes(picture())
    path = write(tmp_path / "a.jsonl", row(), row(**columns))
    assert f"the column '{named}' holds some: set prompt.columns.images={named}" in refusal(path)
    assert [len(r.images) for r in read(path, dict(images=named))] == [0, 1] if named != "meta.scan" else True
    path = write(tmp_path / "a.jsonl", row("<image>", image="x.png"), row(**columns))
    assert any(f"the column '{named}' seems to hold pictures" in note for note in load_rows(path).notes)
    assert len(read(write(tmp_path / "a.jsonl", row(scan="gone.png", name="x.txt")))) == 1


def test_a_name_that_no_row_has_is_refused_and_one_that_some_lack_is_not(tmp_path):
    (tmp_path / "x.png").write_bytes(picture())
    path = write(tmp_path / "a.jsonl", row("<image>", pic="x.png"), row(), dict(problem="no answer"))
    assert len(read(path, dict(images="pic"))) == 2
    for ours in ("images", "caption", "options", "id", "problem", "answer"):
        words = f"no row has the column 'lost' that prompt.columns.{ours} names; the columns are problem, answer, pic"
        assert words in refusal(path, {ours: "lost"})


@pytest.mark.parametrize("answer, expected", [
    (3, "3"), (3.0, "3.0"), (0.1, "0.1"), (True, "True"), (["3"], "3"), ([3], "3"), ([["3"]], "3"), (["3", None], "3"),
    (json.loads("[" * 900 + "3" + "]" * 900), "3"),
    ("['3']", "3"), ('["3"]', "3"), (["3", "4"], "3, 4"), ([1, 2.5], "1, 2.5"), ("[1, 2]", "[1, 2]"), ("[3]", "[3]"),
    ("['a', 'b']", "['a', 'b']"), ("<answer> 3 </answer>", "<answer> 3 </answer>"),
])
def test_an_answer_of_every_type_becomes_text(tmp_path, answer, expected):
    (first,), _, notes = load_rows(write(tmp_path / "a.jsonl", row(answer=answer)))
    assert first.answer == expected
    assert ("have several answers" in notes[-1]) == (isinstance(answer, list) and "," in expected)


@pytest.mark.parametrize("name", ["answer", "final_answer", "gold", "ground_truth", "target", "label", "solution",
                                  "expected_answer", "reference_answer", "completion"])
def test_an_answer_in_a_column_of_a_usual_name_is_read(tmp_path, name):
    assert read(write(tmp_path / "a.jsonl", {"question": "1+1?", name: "2"}))[0].answer == "2"
    assert read(write(tmp_path / "a.jsonl", {"question": "1+1?", name: "2", "solution": "2", "answer": "2"}))


def test_sources_are_concatenated_in_order(tmp_path):
    a, b = write(tmp_path / "a.jsonl", row(answer="a")), write(tmp_path / "b.jsonl", row(answer="b"))
    assert [r.answer for r in read([b, a, b])] == ["b", "a", "b"]
    assert f"{tmp_path}/c.jsonl holds no rows" in refusal([a, write(tmp_path / "c.jsonl"), b])


def test_columns_are_renamed_and_a_wrong_name_is_refused(tmp_path):
    (tmp_path / "x.png").write_bytes(picture())
    path = write(tmp_path / "a.jsonl", dict(question="<image>?", label=3, pic="x.png", problem="not this", text="dots"))
    columns = dict(problem="question", answer="label", images="pic", caption="text")
    first = read(path, columns)[0]
    assert (first.problem, first.answer, first.caption, len(first.images)) == ("<image>?", "3", "dots", 1)
    assert first.extra == {"problem": "not this"} and first.public()["problem"] == "<image>?"
    assert "no row has the column 'gold' that prompt.columns.answer names; the columns are question, label, pic" in \
        refusal(path, columns | dict(answer="gold"))
    assert "prompt.columns" in refusal(path, dict(question="problem"))
    assert "prompt.columns" in refusal(path, dict(problem=["question"]))


def test_transparency_becomes_white():
    clear = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(clear, "PNG")
    assert open_image(clear.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(picture(mode="P", transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(picture(mode="L")).getpixel((0, 0)) == (0, 0, 0)


def test_a_16_bit_grey_picture_keeps_its_greys():
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 0x4000, 0x80FF, 0xFFFF]], np.uint16)).save(file, "PNG")
    assert np.asarray(open_image(file.getvalue()))[0, :, 1].tolist() == [0, 0x40, 0x80, 0xFF]


@pytest.mark.parametrize("values, dtype, expected", [
    ([0, 64, 255], np.int32, [0, 64, 255]), ([0, 0x4000, 0xFFFF], np.int32, [0, 0x40, 0xFF]),
    ([0, 0x40000000, 0x7FFFFFFF], np.int32, [0, 127, 255]), ([-5, 0, 200], np.int32, [0, 0, 200]),
    ([0, 64, 255], np.uint16, [0, 64, 255]), ([0, 0x4000, 0xFFFF], np.uint16, [0, 0x40, 0xFF]),
    ([0, 0.25, 1], np.float32, [0, 63, 255]), ([0, 64, 255], np.float32, [0, 64, 255]),
    ([0, 0x4000, 65535], np.float32, [0, 0x40, 0xFF]), ([0, 5e5, 1e6], np.float32, [0, 127, 255]),
    ([np.nan, -1, 1], np.float32, [0, 0, 255]), ([0, np.inf, 1], np.float32, [0, 0, 255]),
    ([0, 0, 0], np.float32, [0] * 3),
])
def test_a_grey_tiff_of_integers_or_floats_keeps_its_greys(values, dtype, expected):
    file = io.BytesIO()
    Image.fromarray(np.array([values], dtype)).save(file, "TIFF")
    assert np.asarray(open_image(file.getvalue()))[0].tolist() == [[grey] * 3 for grey in expected]


@pytest.mark.parametrize("mode, kind", [("1", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"),
                                        ("L", "BMP"), ("F", "TIFF"), ("RGB", "WEBP"), ("RGB", "PPM")])
def test_every_mode_and_format_becomes_rgb(mode, kind):
    image = open_image(picture(9, 5, mode, kind))
    assert image.mode == "RGB" and image.size == (9, 5) == image_size(picture(9, 5, mode, kind))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_is_set_upright_and_its_size_agrees(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored = Image.new("RGB", (16, 8), "black")
    stored.paste("white", (0, 0, 8, 8))  # the stored left half
    stored.save(file, kind, exif=exif)
    image = open_image(file.getvalue())
    assert image.size == image_size(file.getvalue()) == ((16, 8) if orientation < 5 else (8, 16))
    bright = {1: (2, 4), 2: (13, 4), 3: (13, 4), 4: (2, 4), 5: (4, 2), 6: (4, 2), 7: (4, 13), 8: (4, 13)}[orientation]
    assert image.getpixel(bright)[0] > 200 and image.getpixel((image.width - 1 - bright[0],
                                                               image.height - 1 - bright[1]))[0] < 50


def test_a_turned_photo_is_set_upright_though_another_tag_is_damaged():
    entries = struct.pack("<HHLL HHLL", 0x010F, 5, 1, 38, 0x0112, 3, 1, 6)  # a maker's name that is a fraction
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + entries + struct.pack("<LLL", 0, 1, 1)
    raw = picture(16, 8, kind="JPEG", exif=exif)
    with pytest.raises(AttributeError), Image.open(io.BytesIO(raw)) as image:
        ImageOps.exif_transpose(image)
    assert open_image(raw).size == image_size(raw) == (8, 16)


def test_the_size_comes_from_the_header_alone():
    assert image_size(png_header(640, 480)) == (640, 480)


@pytest.mark.filterwarnings("error")
def test_a_picture_pillow_warns_about_is_refused():
    with pytest.raises(UserError, match="more than 64,000,000 pixels"):
        open_image(png_header(10_000, 10_000))


def test_formats_that_start_programs_are_not_opened():
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "EPS")
    with pytest.raises(UserError, match="cannot be read"):
        image_size(file.getvalue())


def test_an_epoch_visits_every_row_once_and_the_next_in_another_order():
    sampler = PromptSampler(50, seed=1, phase_name="text")
    first, second = sampler.take(0, 50), sampler.take(50, 50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second and first != list(range(50))


def test_the_order_does_not_depend_on_how_it_is_asked_for():
    whole = PromptSampler(7, 3, "a").take(0, 100)
    assert [PromptSampler(7, 3, "a").take(i, 1)[0] for i in range(100)] == whole
    assert PromptSampler(7, 3, "a").take(5, 30) == whole[5:35], "over several epoch edges"


def test_seeds_and_phases_have_orders_of_their_own():
    orders = [PromptSampler(40, seed, phase).take(0, 40) for seed in (0, 1, 11) for phase in ("a", "b", "1/a")]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_order_is_the_same_on_every_machine_and_in_every_version():
    assert PromptSampler(8, 0, "train").take(0, 16) == [0, 6, 1, 3, 4, 2, 7, 5, 7, 0, 3, 5, 4, 2, 6, 1]


class Words:
    """A processor that counts words."""

    def measure(self, row, captions):
        return len(row.problem.split()) + len(row.caption.split()) * captions, 8

    def at_least(self, row, captions):
        return 1


class Numbers:
    """A judge for whom only a number equals itself."""

    def gold_problems(self, rows):
        return ["" if row["answer"].isdigit() else "no number" for row in rows]


def test_rows_a_phase_cannot_train_on_are_dropped_and_counted():
    rows = [Row("one two", "1", caption="c"), Row("one two", "1"), Row("one two three four", "1", caption="c"),
            Row("one", "x", caption="c"), Row("one two", "1", caption="c d")]
    kept, sizes, dropped, _, golds = select_rows(rows, Words(), True, 3, Numbers(), "phases.a")
    assert (kept, sizes) == ([0], [(3, 8)]) and golds == ["row : no number: x"]
    assert dropped == {"no caption": 1, "prompt too long": 2, "no number": 1}
    kept, sizes, dropped, *_ = select_rows(rows, Words(), False, 3, Numbers(), "phases.a")
    assert (kept, sizes) == ([0, 1, 4], [(2, 8)] * 3)
    assert dropped == {"prompt too long": 1, "no number": 1}


def test_a_row_that_makes_no_prompt_is_dropped_and_the_first_are_told():
    class Picky(Words):
        def measure(self, row, captions):
            if row.id:
                raise UserError(f"row {row.id}: too thin")
            return super().measure(row, captions)

    rows = [Row("one", "1", id=str(i) if i else "") for i in range(8)]
    kept, _, dropped, unusable, _ = select_rows(rows, Picky(), False, 3, Numbers(), "phases.a")
    assert kept == [0] and dropped == {"no prompt": 7}
    assert unusable == [f"row {i}: too thin" for i in range(1, 6)]
    with pytest.raises(UserError, match="'no prompt': 7.*row 1: too thin"):
        select_rows(rows[1:], Picky(), False, 3, Numbers(), "phases.a")


def test_when_no_row_is_left_the_lengths_and_the_key_to_raise_are_told():
    rows = [Row("w " * n, "1") for n in (10, 30, 20)]
    with pytest.raises(UserError, match=r"10 / 20 / 30.*phases.a.max_prompt_tokens=9") as caught:
        select_rows(rows, Words(), False, 9, Numbers(), "phases.a")
    assert "'prompt too long': 3" in str(caught.value)
    with pytest.raises(UserError, match="'no caption': 3"):
        select_rows(rows, Words(), True, 99, Numbers(), "phases.a")


def start_up(columns, options, *sources):
    """What the start of a run notes, and its rows or its refusal."""
    from nanolmmr1.run import setup
    from nanolmmr1.schema import Data, Phase, Prompt, Recipe

    class Picky(Words):
        def measure(self, row, captions):
            if row.id == "thin":
                raise UserError("row thin: too thin")
            return super().measure(row, captions)

    class Judge:
        def check(self, rows):
            pass

        def gold_problems(self, rows):
            return ["gold is prose" if "is" in row["answer"] else "" for row in rows]

    cfg = Recipe(prompt=Prompt(columns=columns), data=Data(**options))
    cfg.phases = {f"p{i}": Phase(data=source) for i, source in enumerate(sources)}
    cfg.evaluate.tasks, cfg.evaluate.max_prompt_tokens = {"t": {"data": sources[0]}}, 9
    notes = []
    try:
        rows = setup.load_data(cfg, Picky(), Judge(), SimpleNamespace(note=notes.append)).rows
        return [*notes, {name: len(each) for name, each in rows.items()}]
    except UserError as error:
        return [*notes, str(error)]


def test_the_start_of_a_run_tells_what_was_read_and_dropped(tmp_path):
    (tmp_path / "x.png").write_bytes(picture())
    a = write(tmp_path / "a.jsonl", dict(question="1+1?", answer="2", image_path="x.png"), row(answer=""),
              row(answer="It is 2"), row(id="thin"), row("one two three"))
    assert start_up({}, {}, a) == [
        f"{a}: 4 of 5 rows read; 1 of 4 rows have pictures",
        f"{a}: problem from 'problem' (3), 'question' (1), images from 'image_path'",
        f"{a}: 1 rows have pictures without a marker in the text, so the pictures stand first",
        f"{a}: dropped 1 bad rows (1 no answer); the first:",
        f"  {a}:2: no answer; the row's columns are problem, answer: fill it in, or name the right column with "
        "prompt.columns.answer=COLUMN",
        "phases.p0: 2 of 4 rows; dropped: 1 gold is prose, 1 no prompt",
        "  row thin: too thin", "  row a.jsonl:3: gold is prose: It is 2",
        "evaluate.t: 2 of 4 rows; dropped: 1 gold is prose, 1 no prompt",
        "  row thin: too thin", "  row a.jsonl:3: gold is prose: It is 2", {"p0": 2}]
    assert start_up({}, dict(on_bad_row="stop"), a)[-1].startswith("1 bad rows (1 no answer); with data.on_bad_row=")
    b = write(tmp_path / "b.jsonl", row(id="thin"), row())
    assert start_up({}, dict(on_bad_row="stop"), b)[-1] == (
        "phases.p0: 1 bad rows; with data.on_bad_row=skip they are dropped. The first: row thin: too thin")


def test_a_named_column_must_be_in_one_source_of_the_run_and_may_lack_in_others(tmp_path):
    (tmp_path / "x.png").write_bytes(picture())
    text = write(tmp_path / "text.jsonl", dict(question="1+1?", answer="2"))
    images = write(tmp_path / "images.jsonl", dict(task="2+2?", answer="4", pic="x.png"))
    columns = dict(images="pic", problem="task")
    for sources in ([text, images], [[text, images]]):
        lines = start_up(columns, {}, *sources)
        assert f"{images}: 1 of 1 rows read; 1 of 1 rows have pictures" in lines
        assert f"{text}: no row has the column 'pic' that prompt.columns.images names; the columns are question, " \
            "answer; its rows were read without that name" in lines
        assert lines[-1] == ({"p0": 1, "p1": 1} if len(sources) == 2 else {"p0": 2})
    assert start_up(dict(images="pics"), {}, text, images)[-1] == (
        f"{images}: no row has the column 'pics' that prompt.columns.images names; the columns are task, answer, pic")
    assert start_up(columns, {}, text)[-1].startswith(f"{text}: no row has the column 'pic' that")
    assert "no row has the column 'gold'" in start_up(dict(answer="gold"), {}, text)[-1]


def test_reading_rows_imports_neither_torch_nor_transformers():
    code = "import sys, nanolmmr1.data; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         cwd=Path(__file__).resolve().parents[1])
    assert out.stdout.strip() == "[]"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data folder")
def test_real_rows_are_read():
    text = read([str(DATA / "gsm8k" / "train.jsonl"), f"{DATA}/gsm8k@test"])
    assert len(text) == 2300 and text[0].answer == "72" and text[2000].id == "test.jsonl:1"
    pictures = read(str(DATA / "mathvision"))
    assert len(pictures) == 300 and all(len(r.images) == 1 for r in pictures)
    assert pictures[0].id == "3" and pictures[0].extra == {"level": 1, "subject": "metric geometry - length"}
