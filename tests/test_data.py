"""Rows, pictures and their order: what is read, what is refused and how, and who comes when."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image, ImageOps

from nanolmmr1.data.rows import PromptSampler, Row, image_size, load_rows, open_image, select_rows
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


def refusal(source, columns=None):
    with pytest.raises(UserError) as caught:
        load_rows(source, columns)
    return str(caught.value)


def test_a_row_keeps_its_text_its_id_and_its_other_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", row(answer=7, caption="two dots", task="sum", level=3, qid="q9"), "",
                 row(answer=0.5, id=4), row(images=None))
    first, second, third = load_rows(path)
    assert (first.problem, first.answer, first.caption, first.task, first.id) == ("1+1?", "7", "two dots", "sum", "q9")
    assert first.extra == {"level": 3} and first.images == []
    assert (second.answer, second.id) == ("0.5", "4")
    assert third.id == "a.jsonl:4", "the blank line counts"


def test_what_reward_functions_see_is_json_without_pixels(tmp_path):
    (tmp_path / "x.png").write_bytes(picture())
    shown = load_rows(write(tmp_path / "a.jsonl", row("<image>", images=["x.png"], level=3)))[0].public()
    assert shown["level"] == 3 and shown["answer"] == "2" and shown["images"] == [str(tmp_path / "x.png")]
    assert json.loads(json.dumps(Row("<image>", "2", [b"12345"]).public()))["images"] == ["<5 bytes>"]


@pytest.mark.parametrize("line, words", [
    ("{broken", "unreadable JSON"), ("[" * 100_000, "unreadable JSON"),
    ("[1, 2]", "object with named columns"),
    (dict(question="?", answer="2"), "no problem.*question, answer.*prompt.columns.problem"),
    (dict(problem="?", solution="2"), "no answer.*problem, solution.*prompt.columns.answer"),
    (row(answer=None), "no answer"), (row(answer="  "), "no answer"), (row(answer=float("nan")), "no answer"),
    (row(answer=["2"]), "answer must be text or a number"), (row(answer=True), "answer must be text or a number"),
    (row(caption=["a"]), "caption must be text"),
    ('{"problem": "\\ud800", "answer": "2"}', "surrogate"),
    (row("<image>"), "1 <image> markers .* 0 images"),
    (row(images=["x.png"]), "0 <image> markers .* 1 images"),
    (row("<image><image>", images=["x.png"]), "2 <image> markers .* 1 images"),
    (row("<image>", images=["y.png"]), "y.png' is missing"),
    (row("<image>", images=["nul\0"]), "leads out|is missing"),
    (row("<image>", images=["n" * 10_000]), "is missing"),
    (row("<image>", images=["."]), "is missing"),
    (row("<image>", images=[7]), "path or the bytes"),
    (row("<image>", images=["../x.png"]), "leads out of"), (row("<image>", images=["out.png"]), "leads out of"),
    (row("<image>", images=["text.png"]), "text.png cannot be read"),
    (row("<image>", images=["cut.jpg"]), "cut.jpg cannot be read.*truncated"),
    (row("<image>", images=["large.png"]), "more than 64,000,000 pixels.*8001 x 8000"),
    (row("<image>", images=["bomb.png"]), "more than 64,000,000 pixels"),
])
def test_a_bad_row_is_refused_with_file_and_line(tmp_path, line, words):
    folder = tmp_path / "data"
    path = write(folder / "a.jsonl", row(), row(), line, row())
    for name in (tmp_path / "x.png", folder / "x.png"):
        name.write_bytes(picture())
    os.symlink(tmp_path / "x.png", folder / "out.png")
    (folder / "text.png").write_text("no picture")
    (folder / "cut.jpg").write_bytes(picture(400, 400, kind="JPEG")[:-300])
    (folder / "large.png").write_bytes(png_header(8001, 8000))
    (folder / "bomb.png").write_bytes(png_header(60_000, 60_000))
    message = refusal(path)
    assert message.startswith(f"{path}:3: ")
    assert re.search(words, message), message
    assert len(message) < 1000


def test_an_image_may_be_absolute_and_needs_no_list_and_stays_on_disk(tmp_path):
    (tmp_path / "x.png").write_bytes(picture())
    path = str(tmp_path / "x.png")
    assert load_rows(write(tmp_path / "data" / "a.jsonl", row("<image>", images=[path])))[0].images == [path]
    rows = load_rows(write(tmp_path / "a.jsonl", row("<image>", image="x.png"), row("<image>", images="x.png"),
                           row("no picture", image="")))
    assert [r.images for r in rows] == [[path], [path], []]


def test_one_broken_picture_among_hundreds_is_found_at_load(tmp_path):
    for i in range(250):
        (tmp_path / f"{i}.png").write_bytes(picture() if i != 237 else picture()[:-30])
    path = write(tmp_path / "a.jsonl", *[row("<image>", images=[f"{i}.png"]) for i in range(250)])
    assert refusal(path).startswith(f"{path}:238: ")


@pytest.mark.parametrize("name, text, words", [
    ("a.jsonl", "", "holds no rows"), ("a.json", "[]", "holds no rows"), ("a.csv", "problem,answer", "is not read"),
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
        assert [r.answer for r in load_rows(str(tmp_path / name))] == ["2", "6"]
        assert load_rows(str(tmp_path / name))[1].id == f"{name}:2"


def test_parquet_rows_carry_pictures_as_bytes_or_paths(tmp_path):
    (tmp_path / "x.png").write_bytes(picture())
    rows = [row("<image><image>", images=[dict(bytes=picture(9, 9), path="lost.png"), dict(bytes=None, path="x.png")],
                raw=b"\0"),
            row("none", images=[], raw=b"\1")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = load_rows(str(tmp_path / "a.parquet"))
    assert first.images == [picture(9, 9), str(tmp_path / "x.png")] and second.images == []
    assert first.id == "a.parquet:1" and first.extra == {}, "bytes are no JSON, so no reward function's business"


def test_a_saved_data_set_gives_its_pictures_as_bytes(tmp_path):
    datasets = pytest.importorskip("datasets")
    image = Image.new("RGB", (9, 5), "red")
    data = datasets.Dataset.from_list([row("no picture", images=[]), row("<image><image>", "b", images=[image, image]),
                                       row("<image>", "c", images=[image])])
    data.select([2, 1]).save_to_disk(tmp_path / "one")
    rows = load_rows(str(tmp_path / "one"))
    assert [r.answer for r in rows] == ["c", "b"] and [len(r.images) for r in rows] == [1, 2]
    assert isinstance(rows[0].images[0], bytes) and open_image(rows[0].images[0]).getpixel((0, 0)) == (255, 0, 0)
    assert "no splits" in refusal(f"{tmp_path}/one@train")

    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "two")
    assert len(load_rows(f"{tmp_path}/two@train")) == 3
    assert load_rows(f"{tmp_path}/two@test")[0].id == "two@test:1"
    assert "train, test" in refusal(str(tmp_path / "two"))
    assert "no split 'dev'" in refusal(f"{tmp_path}/two@dev")


def test_splits_of_a_folder_are_never_mixed_and_shards_belong_together(tmp_path):
    write(tmp_path / "mixed" / "train.jsonl", row())
    write(tmp_path / "mixed" / "test.jsonl", row(), row())
    assert "the splits test, train: pick one" in refusal(str(tmp_path / "mixed"))
    assert len(load_rows(f"{tmp_path}/mixed@test")) == 2
    assert "no split 'dev'; it has test, train" in refusal(f"{tmp_path}/mixed@dev")
    assert "a single file has no splits" in refusal(f"{tmp_path}/mixed/test.jsonl@test")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for i in range(3):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row(answer=str(i))]),
                                    tmp_path / "hub" / "data" / f"train-0000{i}-of-00003.parquet")
    assert [r.answer for r in load_rows(str(tmp_path / "hub"))] == ["0", "1", "2"]
    (tmp_path / "void").mkdir()
    assert "holds no .jsonl or .parquet" in refusal(str(tmp_path / "void"))


def test_an_image_folder_is_read_by_its_metadata_and_may_have_an_at_sign(tmp_path):
    path = write(tmp_path / "a@b" / "metadata.jsonl", row("<image>", file_name="x.png"))
    (tmp_path / "a@b" / "x.png").write_bytes(picture())
    for source in (path, str(tmp_path / "a@b")):
        assert load_rows(source)[0].images == [str(tmp_path / "a@b" / "x.png")]


def test_sources_are_concatenated_in_order(tmp_path):
    a, b = write(tmp_path / "a.jsonl", row(answer="a")), write(tmp_path / "b.jsonl", row(answer="b"))
    assert [r.answer for r in load_rows([b, a, b])] == ["b", "a", "b"]
    assert f"{tmp_path}/c.jsonl holds no rows" in refusal([a, write(tmp_path / "c.jsonl"), b])


def test_columns_are_renamed_and_a_wrong_name_is_refused(tmp_path):
    (tmp_path / "x.png").write_bytes(picture())
    path = write(tmp_path / "a.jsonl", dict(question="<image>?", label=3, pic="x.png", problem="not this", text="dots"))
    columns = dict(problem="question", answer="label", images="pic", caption="text")
    first = load_rows(path, columns)[0]
    assert (first.problem, first.answer, first.caption, len(first.images)) == ("<image>?", "3", "dots", 1)
    assert first.extra == {"problem": "not this"} and first.public()["problem"] == "<image>?"
    assert "no answer" in refusal(path, columns | dict(answer="gold"))
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
    kept, dropped = select_rows(rows, Words(), True, 3, Numbers(), "phases.a")
    assert kept == [(rows[0], (3, 8))]
    assert dropped == {"no caption": 1, "prompt too long": 2, "no number": 1}
    kept, dropped = select_rows(rows, Words(), False, 3, Numbers(), "phases.a")
    assert kept == [(rows[i], (2, 8)) for i in (0, 1, 4)]
    assert dropped == {"prompt too long": 1, "no number": 1}


def test_when_no_row_is_left_the_lengths_and_the_key_to_raise_are_told():
    rows = [Row("w " * n, "1") for n in (10, 30, 20)]
    with pytest.raises(UserError, match=r"10 / 20 / 30.*phases.a.max_prompt_tokens=9") as caught:
        select_rows(rows, Words(), False, 9, Numbers(), "phases.a")
    assert "'prompt too long': 3" in str(caught.value)
    with pytest.raises(UserError, match="'no caption': 3"):
        select_rows(rows, Words(), True, 99, Numbers(), "phases.a")


def test_reading_rows_imports_neither_torch_nor_transformers():
    code = "import sys, nanolmmr1.data; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         cwd=Path(__file__).resolve().parents[1])
    assert out.stdout.strip() == "[]"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data folder")
def test_real_rows_are_read():
    text = load_rows([str(DATA / "gsm8k" / "train.jsonl"), f"{DATA}/gsm8k@test"])
    assert len(text) == 2300 and text[0].answer == "72" and text[2000].id == "test.jsonl:1"
    pictures = load_rows(str(DATA / "mathvision"))
    assert len(pictures) == 300 and all(len(r.images) == 1 for r in pictures)
    assert pictures[0].id == "3" and pictures[0].extra == {"level": 1, "subject": "metric geometry - length"}
