"""A row, and rows in a file.

A data set with pictures is larger than the memory of a host with eight ranks. So one rank of a host reads the sources
and writes each row, with the bytes of its pictures, to a temporary file; all ranks of the host read rows from it when
they need them. A row costs a rank 16 bytes of memory.

Next: columns.py, the columns of a record.
"""

import hashlib
import json
import os
import sys
import tempfile
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from nanolmmr1.errors import UserError

PREFIX = ".rows."  # of the names of files with rows, while they have one
INDEX = array("Q")  # its type is that of positions in a file
ImageItem = str | bytes  # an absolute path, or the bytes of an image file


@dataclass
class Row:
    """One problem with its gold answer."""

    problem: str  # with one MARKER per image; without images, a MARKER is plain text
    answer: str
    images: list[ImageItem] = field(default_factory=list)
    caption: str = ""
    id: str = ""
    task: str = ""
    extra: dict[str, Any] = field(default_factory=dict)  # the data's other columns that are JSON
    options: list[str] = field(default_factory=list)  # of a multiple choice, in the order A, B, ...
    # How answers are compared with gold beyond the general rules; see columns.GOLD_RULE.
    gold_rule: dict[str, Any] = field(default_factory=dict)

    def public(self) -> dict[str, Any]:
        """The row for reward functions, JSON-able: all columns, images by path or size."""
        images = [item if isinstance(item, str) else f"<{len(item)} bytes>" for item in self.images]
        return self.extra | dict(problem=self.problem, answer=self.answer, images=images, caption=self.caption,
                                 id=self.id, task=self.task, options=self.options, gold_rule=self.gold_rule)


def picture_hash(item: ImageItem) -> str:
    """sha256 of an image file's bytes, in hex. Raises OSError if it cannot be read."""
    return hashlib.sha256(item if isinstance(item, bytes) else Path(item).read_bytes()).hexdigest()


class _File:
    """A file descriptor, closed when nobody has it any more."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.end = os.fstat(number).st_size

    def __del__(self) -> None:
        os.close(self.number)

    def write(self, data: bytes) -> None:
        """Write behind the end; a single call to the system may take a part.

        Raises:
            UserError: the disk is full.
        """
        left = memoryview(data)
        while left:
            try:
                written = os.pwrite(self.number, left, self.end)
            except OSError as error:
                raise UserError(f"rows cannot be written to disk ({error}): free some space where the output is") \
                    from error
            self.end, left = self.end + written, left[written:]


class Rows(Sequence[Row]):
    """Rows in a file. Subsets share it; it is closed with the last of them.

    Args:
        file: its descriptor, also open for writing if rows are appended.
        starts, sizes: bytes in the file, of each row.
    """

    def __init__(self, file: int | _File, starts: Iterable[int] = (), sizes: Iterable[int] = ()) -> None:
        self.file = _File(file) if isinstance(file, int) else file
        self.starts, self.sizes = array(INDEX.typecode, starts), array(INDEX.typecode, sizes)

    @classmethod
    def temporary(cls, folder: Path | None = None) -> "Rows":
        """No rows yet, in a new file without a name: it is gone when the process ends, however it ends.

        Args:
            folder: of the file; None: the system's, which may be in memory.
        """
        file, path = tempfile.mkstemp(prefix=PREFIX, dir=folder)
        os.unlink(path)
        return cls(file)

    @classmethod
    def open(cls, path: str) -> "Rows":
        """The rows of a file that was sealed."""
        rows = cls(os.open(path, os.O_RDONLY))
        file, end = rows.file.number, rows.file.end - INDEX.itemsize
        size = INDEX.itemsize * int.from_bytes(os.pread(file, INDEX.itemsize, end), sys.byteorder)
        rows.starts.frombytes(os.pread(file, size, end - 2 * size))
        rows.sizes.frombytes(os.pread(file, size, end - size))
        return rows

    def append(self, row: Row) -> None:
        """Write a row behind the last one that was written."""
        pictures = [item for item in row.images if isinstance(item, bytes)]
        fields = vars(row) | {"images": [len(item) if isinstance(item, bytes) else item for item in row.images]}
        data = b"".join([json.dumps(fields).encode(), b"\n", *pictures])
        self.starts.append(self.file.end)
        self.sizes.append(len(data))
        self.file.write(data)

    def seal(self) -> None:
        """Write the index behind the rows, so that others can open the file by its name."""
        for part in (self.starts, self.sizes, array(INDEX.typecode, [len(self)])):
            self.file.write(part.tobytes())

    def extend(self, others: "Rows") -> None:
        """Add rows of the same file."""
        assert others.file is self.file, "rows of another file"
        self.starts.extend(others.starts)
        self.sizes.extend(others.sizes)

    def subset(self, indices: Iterable[int]) -> "Rows":
        """The rows at these indices."""
        indices = list(indices)
        return Rows(self.file, (self.starts[i] for i in indices), (self.sizes[i] for i in indices))

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows": ...
    def __getitem__(self, index: int | slice) -> "Row | Rows":
        if isinstance(index, slice):
            return Rows(self.file, self.starts[index], self.sizes[index])
        start, size = self.starts[index], self.sizes[index]
        raw = os.pread(self.file.number, size, start)  # keeps no position, so threads may read together
        assert len(raw) == size, f"a row of {size} bytes at {start} ends after {len(raw)}: the file was cut"
        text, _, pictures = raw.partition(b"\n")  # JSON has no line breaks
        fields, at = json.loads(text), 0
        for place, item in enumerate(fields["images"]):
            if isinstance(item, int):
                fields["images"][place] = pictures[at:at + item]
                at += item
        return Row(**fields)
