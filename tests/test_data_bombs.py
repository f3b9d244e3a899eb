"""Small files that would unpack to any size, files that never end, and text that a terminal would obey."""

import datetime
import io
import json
import os
import re
import struct
import subprocess
import sys
import time
import unicodedata
import zlib
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from nanolmmr1.data import rows
from nanolmmr1.data.rows import load_rows, open_image, shown
from nanolmmr1.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT.parent / "shared" / "data" / "tokenizer"
ROW = {"problem": "1+1?", "answer": "2"}
IDLE = 90  # MiB: Python, NumPy, Pillow and pyarrow

LOAD = """
import sys
from nanolmmr1.data.rows import UserError, load_rows
try: print(len(load_rows(sys.argv[1]).rows), "rows")
except UserError as error: print(error)
"""
PEAK = """
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def peak(code, *args, **environment):
    """(what the code prints, MiB that a Python of its own took for it)."""
    command = [sys.executable, "-c", code + PEAK, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *lines, kilobytes = done.stdout.splitlines()
    return "\n".join(lines), int(kilobytes) // 1024


def refusal(source):
    with pytest.raises(UserError) as caught:
        load_rows(str(source))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1500
    return str(caught.value)


def repeated(value, count):
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), pyarrow.array([value]))


def parquet(path, **columns):
    length = max(map(len, columns.values()))
    table = pyarrow.table(dict(problem=["1+1?"] * length, answer=["2"] * length) | columns)
    pyarrow.parquet.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30,
                                row_group_size=1 << 30, store_schema=False)


def pictures(path, count, size):
    """Rows with one and the same picture."""
    for_all = pyarrow.StructArray.from_arrays([repeated(b"ab " * (size // 3), count)], ["bytes"])
    each = pyarrow.ListArray.from_arrays(pyarrow.array(range(count + 1), pyarrow.int32()), for_all)
    parquet(path, problem=["<image>"] * count, images=each)


def big(count, size):
    return lambda path: parquet(path, problem=repeated("ab " * (size // 3), count))


def written(text, encoding="utf-8"):
    return lambda path: path.write_text(text(), encoding=encoding)


BOMBS = {  # name of the file, how it is made, words of the refusal, MiB above IDLE
    "a cell": ("a.parquet", lambda path: parquet(path, problem=["ab " * (100 << 20)]), "rows of 314,", 20),
    "a cell among others": ("a.parquet", lambda path: parquet(path, problem=["1?"] * 9 + ["ab " * (100 << 20)]),
                            "that unpack to more than 268,435,456", 20),
    "a cell, a thousand times": ("a.parquet", big(1000, 15 << 20), "that unpack to more than 268,435,456", 120),
    "the same in another column": ("a.parquet", lambda path: parquet(path, x=repeated("ab " * 5_000_000, 99)),
                                   "that unpack to more than", 120),
    "a picture, a thousand times": ("a.parquet", lambda path: pictures(path, 1000, 15 << 20), "that unpack to", 150),
    "rows without end": ("a.parquet", lambda path: parquet(path, problem=repeated("1?", 3_000_000),
                                                           answer=repeated("2", 3_000_000)), "that unpack to", 30),
    "lists of nothing": ("a.parquet", lambda path: parquet(path, x=pyarrow.array([[None] * 20_000_000],
                                                                                 pyarrow.list_(pyarrow.null()))),
                         "that unpack to more than", 60),
    "plain pages": ("a.parquet", lambda path: pyarrow.parquet.write_table(
        pyarrow.table(dict(problem=["ab " * 1_000_000] * 99, answer=["1"] * 99)), path, compression="zstd",
        use_dictionary=False), "that unpack to more than", 30),
    "a line": ("a.jsonl", written(lambda: json.dumps(ROW | dict(problem="ab " * 33_000_000))), "a row of more", 110),
    "a line of UTF-16": ("a.jsonl", written(lambda: json.dumps(ROW | dict(problem="ab " * 33_000_000)), "utf-16"),
                         "a row of more than", 250),
    "a line that does not end": ("a.jsonl", lambda path: (path.touch(), os.truncate(path, 1 << 33)),
                                 "a row of more than", 500),
    "an object": ("a.json", written(lambda: json.dumps([ROW, ROW | dict(problem="ab " * 33_000_000)])),
                  "a.json:2: a row of more than", 400),
    "an object of many": ("a.json", written(lambda: '[{"problem":"?","answer":"2","x":[' + "{}," * 5_000_000 + "1]}]"),
                          "1,048,576 values", 130),
    "a line of many": ("a.jsonl", written(lambda: '{"problem":"?","answer":"2","x":[' + "[[[]]]," * 3_000_000 + "1]}"),
                       "1,048,576 values", 60),
    "many objects": ("a.json", written(lambda: "[" + "{}," * 10_000_000 + "{}]"), "a.json:1: no problem", 10),
    "an object of ids": ("a.json", written(lambda: '{\n"' + "\\\\" * 40_000_000), "a row of more than", 600),
    "a chat of many parts": ("a.parquet", lambda path: parquet(path, problem=["[" + "[]," * 9_000_000 + "[]]"] * 2),
                             "a row of|problem has 27,000,004 characters", 300),
    "a number": ("a.json", written(lambda: '[{"problem":"?","answer":' + "9" * 10_000_000 + "}]"), "4300 digits", 10),
    "a depth": ("a.json", written(lambda: "[" * 10_000_000), "recursion", 10),
    "a depth of objects": ("a.jsonl", written(lambda: '{"a":' * 5_000_000), "a row of more|recursion", 60),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_name_in_little_memory(tmp_path, name):
    file, make, words, limit = BOMBS[name]
    make(tmp_path / file)
    said, took = peak(LOAD, tmp_path / file)
    assert said.startswith(str(tmp_path / file)) and any(each in said for each in words.split("|")), said[:500]
    assert took <= IDLE + limit


LONG = """
import sys
from nanolmmr1.data.rows import Row, select_rows
from nanolmmr1.data.prompt import Processor
from nanolmmr1.schema import Prompt
class Judge:
    def gold_problems(self, rows): return [""] * len(rows)
processor = Processor(sys.argv[1], Prompt())
rows = [Row("How many? " * int(sys.argv[2]), "1"), Row("1+1?", "2", caption="How many? " * int(sys.argv[2]))]
print(select_rows([*rows, Row("1+1?", "2")], processor, False, 4096, Judge(), "phases.a").dropped)
print(select_rows([*rows, Row("1+1?", "2", caption="Two.")], processor, True, 4096, Judge(), "phases.a").dropped)
"""


@pytest.mark.skipif(not TOKENIZER.is_dir(), reason="needs the tokenizer of the shared data folder")
def test_a_text_of_5_million_characters_is_dropped_without_being_tokenised():
    short, idle = peak(LONG, TOKENIZER, 1)
    long, took = peak(LONG, TOKENIZER, 500_000)
    assert long == "{'prompt too long': 1}\n{'no caption': 1, 'prompt too long': 1}" and short.startswith("{}")
    assert took - idle < 100


@pytest.mark.skipif(not TOKENIZER.is_dir(), reason="needs the tokenizer of the shared data folder")
def test_the_fewest_tokens_of_a_text_are_never_more_than_it_has():
    from nanolmmr1.data.prompt import Processor, _fewest_bytes
    from nanolmmr1.schema import Prompt

    processor = Processor(TOKENIZER, Prompt())
    for text in ("", "a", " " * 5000, "=" * 5000, "How many?" * 99, "1" * 999, "\u4e00" * 999, "e\u0301" * 999,
                 "\u03b1\u0314\u0301\u0345" * 999, "\u1112\u1161\u11ab" * 999, "\U0001f600" * 99, "\n" * 5000):
        row = rows.Row(text, "1", caption=text)
        for captions in (False, True):
            assert processor.at_least(row, captions) <= processor.measure(row, captions)[0]
        assert _fewest_bytes(text) <= len(unicodedata.normalize("NFC", text).encode())
    assert processor.at_least(rows.Row("a" * 128_000, "1"), False) == 1000


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("space", ["", " ", "\n\t "])
def test_a_list_is_read_alike_however_it_is_cut(tmp_path, monkeypatch, chunk, space):
    monkeypatch.setattr("nanolmmr1.data.readers.CHUNK", chunk)
    rows = [ROW | dict(id=i, x=[{}, [1.5e-3, True, None], '"]}, {[', "\u00e9\U0001f600\\"]) for i in range(5)]
    text = ("[" + space + (space + "," + space).join(json.dumps(row, ensure_ascii=bool(space)) for row in rows)
            + space + "]" + space)
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert [row.extra for row in load_rows(str(tmp_path / "a.json")).rows] == [dict(x=row["x"]) for row in rows]


@pytest.mark.parametrize("text", ["[", "[{}", "[%s,]", "[,%s]", "[%s%s]", "[%s] x", "[%s]]", "[%s", "[%s,",
                                  '[%s, {"a": ]', "[%s; %s]", "[[]", "[%s, tru]"])
@pytest.mark.parametrize("chunk", [1, 1000])
def test_a_list_that_is_none_is_refused(tmp_path, monkeypatch, text, chunk):
    monkeypatch.setattr("nanolmmr1.data.readers.CHUNK", chunk)
    (tmp_path / "a.json").write_text(text.replace("%s", json.dumps(ROW)))
    assert "a.json:" in refusal(tmp_path / "a.json")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_json_is_read_in_every_encoding_of_unicode(tmp_path, encoding):
    rows = [ROW | dict(problem=f"Wie gro\u00df? \u4e00\u0a0a\u0d0a\U0001f600{i}") for i in range(3)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    whole = json.dumps(rows, indent=1, ensure_ascii=False)
    for name, text in (("a.jsonl", lines), ("b.json", lines), ("c.json", whole)):
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert [row.problem for row in load_rows(str(tmp_path / name)).rows] == [row["problem"] for row in rows]
    plain = dict(LANG="C", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert peak(LOAD, tmp_path / "c.json", **plain)[0] == "3 rows"


def test_broken_characters_are_refused_by_line(tmp_path):
    line = json.dumps(ROW | dict(problem="gro\u00df"), ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(f"{line}\n".encode() + f"{line}\n".encode("latin-1"))
    loaded = load_rows(str(tmp_path / "a.jsonl"))
    assert len(loaded.rows) == 1 and "a.jsonl:2: unreadable JSON ('utf-8' codec" in loaded.notes[-1]
    for name, text in (("b.jsonl", line), ("c.json", f"[{line}]")):
        (tmp_path / name).write_bytes(text.encode("utf-16")[:-1])
        assert f"{name} cannot be read: 'utf-16" in refusal(tmp_path / name)
    (tmp_path / "d.json").write_bytes(f"[{line}]".encode("latin-1"))
    assert "d.json cannot be read: 'utf-8' codec" in refusal(tmp_path / "d.json")


def test_ids_are_one_short_line_without_control_codes(tmp_path):
    ids = ["a\nb", "\x1b[2J\x07", "\u202etxt.exe", "\ud800", "x" * 5000 + "1", "x" * 5000 + "2", "gro\u00df", 10**4000]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(ROW | dict(id=i)) + "\n" for i in ids))
    found = [row.id for row in load_rows(str(tmp_path / "a.jsonl")).rows]
    assert found[:4] == ["a\\nb", "\\x1b[2J\\x07", "\\u202etxt.exe", "\\ud800"] and found[6] == "gro\u00df"
    assert all(each.isprintable() and len(each) <= 200 for each in found) and len(set(found)) == len(ids)


@pytest.mark.parametrize("row", [
    {"\x1b[2J\n": 1, "answer": "2"}, dict.fromkeys(map(str, range(100_000)), 1),
    ROW | dict(answer={"\x1b[2J": ["\x1b[2J"] * 10**5}),
    ROW | dict(problem="<image>", images=["\x1b[2J\n"]), ROW | dict(problem="<image>", images=["\x1b[2J/../../x"]),
    ROW | dict(problem="<image>", images=["\x1b[2J.png"]), ROW | dict(problem="<image>", images=[{"\x1b": "\x1b"}]),
    "\x1b[2J", {"answer": "2", "problem": json.loads("[" * 900 + "]" * 900)},
])
def test_what_is_shown_of_a_bad_row_is_short_and_no_terminal_obeys_it(tmp_path, row):
    folder = tmp_path / "new\nline \x1b[31m"
    folder.mkdir()
    (folder / "\x1b[2J.png").write_text("no picture")
    (folder / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert "new\\nline \\x1b[31m/a.jsonl:1: " in refusal(folder / "a.jsonl")


def test_names_of_splits_and_sources_are_shown_plainly(tmp_path):
    for name in ("\x1b[2J.jsonl", "b\n.jsonl"):
        (tmp_path / name).write_text(json.dumps(ROW))
    assert "\\x1b[2J" in refusal(tmp_path) and "no split" in refusal(f"{tmp_path}@\x1b[2K")
    for source in ("no\x1b[2J", "n" * 5000, "nul\0", "~nobody-here/x", f"{tmp_path}/b\n.jsonl@train"):
        refusal(source)
    assert shown("a" * 2000) == "a" * 1000 + "..." and shown("\x9b\u2028\xad") == "\\x9b\\u2028\\xad"


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.symlink(tmp_path / "loop.png", tmp_path / "loop.png")
    os.symlink("/dev/zero", tmp_path / "zero.png")
    (tmp_path / "huge.png").touch()
    os.truncate(tmp_path / "huge.png", 1 << 29)
    for image in ("pipe.png", "loop.png", "zero.png", "/dev/zero", "/dev/stdin", "huge.png", ".", str(tmp_path)):
        (tmp_path / "a.json").write_text(json.dumps([ROW | dict(problem="<image>", images=[image])]))
        assert "is missing, or no file of up to 268,435,456 bytes" in refusal(tmp_path / "a.json")
    assert "pipe.jsonl is no regular file" in refusal(tmp_path)
    for source in (tmp_path / "pipe.jsonl", "/dev/zero", tmp_path / "loop.png"):
        assert "does not exist" in refusal(source)
    (tmp_path / "folder" / "a.parquet").mkdir(parents=True)
    assert "a.parquet is no regular file" in refusal(tmp_path / "folder")


def png(*chunks):
    """A PNG of 2 x 2 pixels with further chunks after its header."""
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    more = b"".join(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
                    for kind, body in chunks)
    return file.getvalue()[:33] + more + file.getvalue()[33:]


def tiff(tags, size):
    """A TIFF in which so many tags each claim the same `size` bytes."""
    entries = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
               (277, 3, 1, 1), (278, 4, 1, 8), (279, 4, 1, 64)] + [(40000 + i, 7, size, 8) for i in range(tags)]
    directory = b"".join(struct.pack("<HHLL", *entry) for entry in entries)
    return (b"II*\0" + struct.pack("<L", 8 + size) + b"\0" * size + struct.pack("<H", len(entries)) + directory
            + b"\0" * 4)


def exif(tags, size):
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "JPEG")
    body, blob = file.getvalue()[20:], tiff(tags, size)  # without the JFIF header
    parts = [b"Exif\0\0" + blob[i:i + 60_000] for i in range(0, len(blob), 60_000)]
    return b"\xff\xd8" + b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part for part in parts) + body


def gif(frames):
    file = io.BytesIO()
    Image.new("P", (2, 2)).save(file, "GIF", save_all=True, duration=9, append_images=[Image.new("P", (2, 2), 1)])
    first = file.getvalue()
    frame = first[first.rindex(b"\x21\xf9"):-1]
    return first[:-1] + frame * frames + b";"


def webp():
    """A lossless WEBP that says 16383 x 16383 and has no pixels."""
    body = b"\x2f" + struct.pack("<I", 16382 | 16382 << 14) + b"\0" * 32
    return b"RIFF" + struct.pack("<I", len(body) + 12) + b"WEBPVP8L" + struct.pack("<I", len(body)) + body


ZEROS = zlib.compress(b"\0" * (200 << 20), 9)
PICTURES = {
    "GIF of 100,000 frames": lambda: gif(100_000),
    "TIFF tags over one another": lambda: tiff(5000, 4 << 20),
    "EXIF tags over one another": lambda: exif(5000, 2 << 20),
    "PNG zTXt": lambda: png((b"zTXt", b"a\0\0" + ZEROS)),
    "PNG iTXt": lambda: png((b"iTXt", b"a\0\1\0\0\0" + ZEROS)),
    "PNG iCCP": lambda: png((b"iCCP", b"a\0\0" + ZEROS)),
    "PNG of many texts": lambda: png(*[(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * (1 << 20), 9))] * 500),
    "PNG eXIf": lambda: png((b"eXIf", tiff(5000, 2 << 20))),
    "WEBP that lies": webp,
}
OPEN = """
import pathlib, sys
from nanolmmr1.data.rows import UserError, open_image
raw = pathlib.Path(sys.argv[1])
for item in (str(raw), raw.read_bytes()):
    try: print(open_image(item).size)
    except UserError as error: print(error)
"""


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_unpacks_to_any_size_takes_little_memory(tmp_path, name):
    raw = PICTURES[name]()
    (tmp_path / "x").write_bytes(raw)
    said, took = peak(OPEN, tmp_path / "x")
    assert len(said.splitlines()) == 2 and took < 150 + 2 * len(raw) // (1 << 20), said


HOSTILE = {
    "spaces": " " * 4_000_000, "lines": "\n" * 4_000_000, "letters": "A " * 2_000_000, "options": "\nA. " * 1_000_000,
    "markers": "<image" * 700_000, "numbers": "<image 1> " * 400_000, "quotes": "[" + "'a'," * 300_000 + "'a']",
    "signs": "[" + "-" * 15_000 + "1]", "brackets": "[" * 19_000, "base64": "iVBORw0KGgo" + "A" * 4_000_000,
    "addresses": "data:image/png;base64," + "\n" * 4_000_000, "words": "A" + "!" * 4_000_000 + "b",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_text_in_any_column_is_read_or_dropped_in_seconds(tmp_path, name):
    began = time.monotonic()
    for column in ("problem", "answer", "options", "image", "images", "messages", "scan", "id", "image_1"):
        record = {"problem": "Q?", "answer": "B", "options": ["1", "2"]} | {column: HOSTILE[name]}
        (tmp_path / "a.jsonl").write_text(f"{json.dumps(ROW)}\n{json.dumps(record)}\n")
        if name == "base64" and column in ("options", "messages", "scan"):
            assert f"set prompt.columns.images={column}" in refusal(tmp_path / "a.jsonl")
        else:
            loaded = load_rows(str(tmp_path / "a.jsonl"))
            assert len(loaded.rows) + sum(loaded.dropped.values()) == 2
    assert time.monotonic() - began < 30


def test_a_saved_data_set_is_measured_too_and_needs_its_package(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([ROW, ROW]).save_to_disk(tmp_path / "set")
    assert len(load_rows(str(tmp_path / "set")).rows) == 2
    (file,) = (tmp_path / "set").glob("*.arrow")
    table = pyarrow.table(dict(problem=repeated("ab " * 100_000, 1200), answer=["2"] * 1200))
    info = json.loads((tmp_path / "set" / "dataset_info.json").read_text())
    with pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    (tmp_path / "set" / "dataset_info.json").write_text(json.dumps(info | dict(features=None)))
    said, took = peak(LOAD, tmp_path / "set")
    assert "that unpack to more than 268,435,456" in said and took < 1000
    file.write_bytes(file.read_bytes()[:1000])
    refusal(tmp_path / "set")
    absent = "import sys; sys.modules['datasets'] = None\n" + LOAD
    for source in (tmp_path / "set", "owner/name"):
        assert "pip install 'nanolmmr1[data]'" in peak(absent, source)[0]


def test_offsets_that_lead_out_of_a_saved_data_set_are_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([ROW, ROW]).save_to_disk(tmp_path / "set")
    (file,) = (tmp_path / "set").glob("*.arrow")
    offsets = struct.pack("<3i", 0, 4, 8)
    assert offsets in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(offsets, struct.pack("<3i", 0, 4, 1 << 30)))
    assert "unreadable data after row 0" in refusal(tmp_path / "set")


ODD = {  # columns that arrow reads and Python does not, and words of the refusal, or none
    "not UTF-8": (pyarrow.array([b"\xff\xfe"]).view(pyarrow.string()), "Invalid UTF8"),
    "a date before Christ": (pyarrow.array([-(1 << 40)], pyarrow.timestamp("s")), "unreadable data after row 0"),
    "a map": (pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int8())), "map<.* is not read"),
    "a decimal": (pyarrow.array([1], pyarrow.decimal128(9, 2)), ""),
    "nothing": (pyarrow.array([None], pyarrow.null()), ""),
    "an empty list": (pyarrow.array([[]], pyarrow.list_(pyarrow.string())), ""),
    "a date": (pyarrow.array([datetime.date(2020, 1, 1)]), ""),
    "categories": (repeated("a", 1), ""),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_columns_are_read_or_refused_by_name(tmp_path, name):
    column, words = ODD[name]
    pyarrow.parquet.write_table(pyarrow.table(dict(problem=["?"], answer=["2"], x=column)), tmp_path / "a.parquet")
    if words:
        assert re.search(words, refusal(tmp_path / "a.parquet"))
    else:
        assert len(load_rows(str(tmp_path / "a.parquet")).rows) == 1


def test_rows_of_all_sizes_come_whole_and_in_order(tmp_path, monkeypatch):
    picture = io.BytesIO()
    Image.new("RGB", (9, 9)).save(picture, "BMP")
    rows = [ROW | dict(problem="<image>", id=str(i), caption="c" * (i % 7 * 100), level=["a", "b"][i % 2],
                       images=[dict(bytes=picture.getvalue(), path=None)]) for i in range(500)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=33)
    whole = load_rows(str(tmp_path / "a.parquet")).rows
    assert [row.id for row in whole] == [str(i) for i in range(500)] and whole[5].extra == {"level": "b"}
    monkeypatch.setattr("nanolmmr1.data.readers.PIECE", 3000)
    assert list(load_rows(str(tmp_path / "a.parquet")).rows) == list(whole)
    assert open_image(whole[0].images[0]).size == (9, 9)


def test_long_texts_are_refused_by_column(tmp_path, monkeypatch):
    monkeypatch.setattr("nanolmmr1.data.columns.MAX_TEXT", 100)
    for column in ("problem", "answer", "caption", "task"):
        (tmp_path / "a.jsonl").write_text(json.dumps(ROW | {column: "x" * 101}))
        assert f"a.jsonl:1: {column} has 101 characters, more than 100" in refusal(tmp_path / "a.jsonl")
        (tmp_path / "a.jsonl").write_text(json.dumps(ROW | {column: "x" * 100}))
        assert len(load_rows(str(tmp_path / "a.jsonl")).rows) == 1
