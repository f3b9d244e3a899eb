"""Rows that are written come back as they were, and a journal holds whole chunks only."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
from PIL import Image

from nanolmmr1.data.rows import Row, load_rows
from nanolmmr1.errors import UserError
from nanolmmr1.prepare.journal import Journal
from nanolmmr1.prepare.output import check_output, picture_folder, to_record, write_rows

ROOT = Path(__file__).resolve().parents[1]


def png(colour="red", kind="PNG"):
    Image.new("RGB", (30, 20), colour).save(file := io.BytesIO(), kind)
    return file.getvalue()


def write(out, rows, copy=False):
    write_rows(out, (to_record(row, out, copy) for row in rows))


def comparable(rows):
    """Rows with the bytes of their pictures."""
    return [vars(row) | {"images": [item if isinstance(item, bytes) else Path(item).read_bytes()
                                    for item in row.images]} for row in rows]  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("copy", [False, True])
def test_real_rows_come_back_as_they_were(shared, tmp_path, suffix, copy):
    rows = load_rows(str(shared / "data" / "mathvision")).rows
    out = tmp_path / f"out{suffix}"
    write(out, rows, copy)
    again = load_rows(str(out))
    assert comparable(again.rows) == comparable(rows) and len(rows) == 300 and not again.dropped
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([picture_folder(out).name] * copy + [out.name])


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_every_column_comes_back(tmp_path, suffix):
    rows = [
        Row("How <image> and <image>?\n(A) 1\n(B) 2", "B", [png(), png("blue", "JPEG")], "two pictures", "first",
            "sums", {"level": 3, "share": 0.5, "note": "\u4f60\u597d \ud800", "tags": ["a", "b"], "deep": {"x": [1]}},
            ["1", "2"]),
        Row("How much?", "2", [], "", "second", "", {"level": 4, "share": 1, "note": None, "deep": 7}),
        Row("<image> Which?", "3", [png()], "", "third", "sums", {"level": None, "big": 1 << 60, "yes": True}),
    ]  # fmt: skip
    out = tmp_path / f"out{suffix}"
    write(out, rows)
    as_json = ("note", "deep", "big") if suffix == ".parquet" else ()
    for ours, again in zip(comparable(rows), comparable(load_rows(str(out)).rows), strict=True):
        # Columns that the row does not fill may be there, empty.
        extra = {name: json.loads(value) if name in as_json else value for name, value in again.pop("extra").items()
                 if value not in (None, [])}  # fmt: skip
        assert extra == {name: value for name, value in ours.pop("extra").items() if value not in (None, [])}
        assert again == ours


def test_pictures_are_files_of_a_folder_that_can_be_moved(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "in.png").write_bytes(png("green"))
    (tmp_path / "out.gif").write_bytes(png("white", "GIF"))
    pictures = [png(), str(tmp_path / "here" / "in.png"), str(tmp_path / "out.gif"), png()]
    out = tmp_path / "here" / "rows.jsonl"
    row = Row("<image><image><image><image>?", "1", pictures, id="one")
    first, inside, outside, same = to_record(row, out)["images"]
    assert first == same and first.startswith("rows/") and first.endswith(".png")
    assert (inside, outside) == ("in.png", str(tmp_path / "out.gif"))
    write(out, [row], copy=True)
    names = json.loads(out.read_text())["images"]
    assert [name[-4:] for name in names] == [".png", ".png", ".gif", ".png"] and names[0] == first
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "out.gif").unlink()
    assert len(load_rows(str(tmp_path / "there" / "rows.jsonl")).rows[0].images) == 4


def test_a_column_of_the_data_never_replaces_ours(tmp_path):
    row = Row("?", "1", id="one", extra={"answer": "2", "caption": "x", "question": "?"})
    record = to_record(row, tmp_path / "o.jsonl")
    assert record == {"nanolmmr1": 1, "problem": "?", "answer": "1", "images": [], "id": "one", "question": "?"}


def test_parquet_has_images_that_hugging_face_opens_and_small_row_groups(tmp_path):
    datasets = pytest.importorskip("datasets")
    out = tmp_path / "out.parquet"
    write(out, [Row("<image>?", str(n), [png()], id=str(n), extra={"level": n}) for n in range(250)])
    groups = pyarrow.parquet.read_metadata(out)
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [100, 100, 50]
    data = datasets.load_dataset("parquet", data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert data[3]["images"][0].size == (30, 20) and data[3]["level"] == 3


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_appears_whole_or_not_at_all(tmp_path, suffix):
    out = tmp_path / f"out{suffix}"
    write(out, [Row("?", "1", id="one")])
    before = out.read_bytes()

    def failing():
        yield from (to_record(Row("?", str(n), id=str(n)), out) for n in range(300))
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        write_rows(out, failing())
    assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]
    with pytest.raises(UserError, match="cannot be written"):
        write_rows(tmp_path / "missing" / out.name, [])


def test_outputs_that_cannot_be_are_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    source = str(tmp_path / "rows.jsonl")
    for out, read, words in ((tmp_path / "o.csv", source, "csv"), (tmp_path / "link.jsonl", source, "is read"),
                             (tmp_path / "o.jsonl", f"{tmp_path}@train", "is read"),
                             (tmp_path / "data" / "o.jsonl", str(tmp_path), "is read")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            check_output(out, read)
    check_output(tmp_path / "new" / "o.jsonl", source)
    assert (tmp_path / "new").is_dir()


def chunks(path, fingerprint=None):
    with Journal(path, fingerprint or {"model": "m"}) as journal:
        return list(journal.chunks())


def test_a_journal_keeps_whole_chunks_through_any_cut(tmp_path):
    path, given = tmp_path / "out.journal", [[1, "\u00e9"], {"a": None}, []]
    with Journal(path, {"model": "m"}) as journal:
        for chunk in given:
            journal.append(chunk)
        assert journal.done == 3 and list(journal.chunks()) == given
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        assert chunks(path) == given[: max(sum(end <= length for end in ends) - 1, 0)]
        with Journal(path, {"model": "m"}) as journal:
            for chunk in given[journal.done :]:
                journal.append(chunk)
        assert path.read_bytes() == whole
    path.write_bytes(whole + b"\0" * 50 + b"\n")  # as a power cut leaves it
    assert chunks(path) == given and path.read_bytes() == whole


def test_a_journal_of_other_work_and_a_foreign_file_are_left_alone(tmp_path):
    path = tmp_path / "out.journal"
    with Journal(path, {"model": "m", "sources": [["a", 1]]}) as journal:
        journal.append(1)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"sources=\[\['a', 1\]\], not \[\['a', 2\]\].*delete the file"):
        Journal(path, {"model": "m", "sources": [["a", 2]]})
    assert path.read_bytes() == before
    for text in ("my notes\n", "my notes", '{"journal": \n', '{"a": 1}\n'):
        path.write_text(text)
        with pytest.raises(UserError, match="no journal"):
            Journal(path, {})
        assert path.read_text() == text


def test_a_second_process_is_refused_and_a_killed_one_holds_nothing(tmp_path):
    path = tmp_path / "out.journal"
    code = f"""
from pathlib import Path
from nanolmmr1.prepare.journal import Journal
journal = Journal(Path({str(path)!r}), {{"model": "m"}})
journal.append("theirs")
print("open", flush=True)
input()
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"open\n"
    with pytest.raises(UserError, match="another process"):
        Journal(path, {"model": "m"})
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert chunks(path) == ["theirs"]


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "out.journal"
    with Journal(path, {"model": "m"}) as journal:
        journal.append("first")

        def full(_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(UserError, match="No space left.*after its 1 finished"):
                journal.append("second")
        journal.append("third")
    assert chunks(path) == ["first", "third"]
    with Journal(path, {"model": "m"}) as journal:
        journal.remove()
    assert not path.exists()
