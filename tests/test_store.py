"""Rows on disk: what is written is read again, from several threads and processes, in little memory."""

import errno
import gc
import os
import threading

import pytest

from nanolmmr1.data.store import Row, Rows
from nanolmmr1.errors import UserError

FULL = Row("<image>\n<image> Find x.\n\u2028", "\\frac12", ["/a/b.png", b"\x00\n{}" * 100], "a\nb", "id", "task",
           {"level": [1, {"x": None}], "nan\u00e9": "\ud800"}, ["1", "2"])


def filled(*rows):
    store = Rows.temporary()
    for row in rows:
        store.append(row)
    return store


def test_rows_are_read_as_they_were_written():
    rows = [FULL, Row("Q", "1"), Row("<image>", "2", [b""]), Row("<image>", "3", [b"\n", "x", b"\n\n"])]
    store = filled(*rows)
    assert list(store) == rows and len(store) == 4 and store[-1] == rows[3] and store[0].images[1] == FULL.images[1]
    assert list(store[1:3]) == rows[1:3] and list(store.subset([3, 0, 3])) == [rows[3], rows[0], rows[3]]
    with pytest.raises(IndexError):
        store[4]


def test_rows_may_be_added_while_others_are_read_and_subsets_live_on():
    store = filled(FULL)
    half = store.subset([])
    half.append(Row("Q", "1"))
    store.extend(half)
    del half
    assert [row.answer for row in store] == ["\\frac12", "1"]
    part = store[1:]
    del store
    gc.collect()
    assert part[0].problem == "Q"


def test_files_are_closed_and_gone_with_the_last_rows(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    stores = [Rows.temporary(tmp_path) for _ in range(20)]
    assert not list(tmp_path.iterdir()), "nothing is left behind by a process that is killed"
    assert len(os.listdir("/proc/self/fd")) == before + 20
    del stores
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_read_rows_together():
    rows = [Row(f"Q{i}", str(i), [bytes([i % 256]) * (i % 977)]) for i in range(500)]
    store, wrong = filled(*rows), []

    def read():
        wrong.extend(i for i in range(500) if store[i] != rows[i])

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_file_that_was_cut_is_noticed():
    store = filled(FULL, FULL)
    os.ftruncate(store.file.number, store.starts[1] + 5)
    assert store[0] == FULL
    with pytest.raises(AssertionError, match="the file was cut"):
        store[1]


def test_a_full_disk_is_an_error_of_the_user(monkeypatch):
    """All ranks of a run then end together."""
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="No space left.*free some space"):
        filled(FULL)


def test_a_sealed_file_is_opened_by_its_name(tmp_path):
    path = str(tmp_path / "rows")
    for rows in ([FULL, Row("Q", "1")], []):
        store = Rows(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        for row in rows:
            store.append(row)
        store.seal()
        opened = Rows.open(path)
        os.unlink(path)
        assert list(opened) == rows, "also when the name is gone"
