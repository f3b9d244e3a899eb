"""Where the pictures of a data set are: a folder, a folder that was moved, or a .zip or .tar beside the data.

Nothing is unpacked: a member is read when a row names it, so no member can land anywhere.

Next: readers.py, files, folders and hub data sets.
"""

import functools
import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from nanolmmr1.data.readers import MAX_RECORD, BadRow, reason, shown
from nanolmmr1.errors import UserError

MAX_PATH = 4096  # characters of a path
# How well a member fits a path: it is the path, or ends with it; or the path ends with it, below the archive's name, or
# below the same folder as before; or not.
WHOLE, END, STEM, SAME, OTHER = range(5)


class Member(NamedTuple):
    """A file in an archive."""

    archive: Path
    name: str
    read: Callable[[], bytes]


class PictureFolder:
    """The folder that relative paths of pictures start at.

    Args:
        path: None for a data set of the hub, whose pictures are in its rows.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = os.path.abspath(path) if path is not None else ""
        # Data sets of the hub may have their rows in `data`, and pictures or archives beside that folder.
        self.places = [self.path, *([os.path.dirname(self.path)] if os.path.basename(self.path) == "data" else [])]
        self.removed: tuple[str, ...] | None = None  # leading parts of absolute paths, found with the first picture
        self.above: dict[Path, str] = {}  # archive -> the leading parts of paths that its members lack, found likewise
        self.unreadable = ""  # the first archive that cannot be read, and why

    def find(self, name: str, settle: bool = True) -> str | bytes | None:
        """A picture that is not where its path leads: in this folder, if all folders above it were moved here, or in
        an archive of this folder. Paths of one source lose the same leading parts, so that pictures of one name in two
        folders are never confused.

        Args:
            settle: the leading parts that this path loses are those of all later paths.

        Returns:
            its path, or its bytes from an archive, or None.

        Raises:
            BadRow: it may be one of several members, or an archive is damaged, encrypted or holds too large a file.
            UserError: an archive's members were found under two folders.
        """
        parts = tuple(part for part in PurePosixPath(name.replace("\\", "/")).parts if part != "/")
        if not self.path or not parts or ".." in parts or len(name) > MAX_PATH:
            return None
        is_whole = os.path.isabs(name) or parts[0].endswith(":")
        for removed in range(len(parts)) if is_whole else [0]:  # a relative path may have had back-slashes
            for place in self.places if not is_whole or self.removed in (None, parts[:removed]) else ():
                if os.path.isfile(path := os.path.join(place, *parts[removed:])):
                    self.removed = parts[:removed] if is_whole and settle else self.removed
                    return path
        return self._from_archive("/".join(parts), settle)

    def _from_archive(self, name: str, settle: bool) -> bytes | None:
        """The member whose name ends with the path, or that the path ends with."""
        found: dict[int, list[Member]] = {}
        for member in self._members.get(name.rpartition("/")[2], ()):
            found.setdefault(self._rank(member, name), []).append(member)
        if (best := min(found, default=OTHER)) == OTHER:
            if self.unreadable:
                raise BadRow("picture missing", self.unreadable)
            return None
        first, *others = found[best]
        try:
            data = first.read()
            is_one = all(other.read() == data for other in others)
        except Exception as error:  # the decompressors raise any type on a damaged member
            raise BadRow("picture broken", f"image {shown(name, 200)} cannot be read from its archive "
                         f"({reason(error)}); unpack it, or download it again") from error
        if not is_one:
            members = [f"{shown(each.name, 200)} of {shown(each.archive.name)}" for each in (first, others[0])]
            raise BadRow("picture missing", f"image {shown(name, 200)} may be {' or '.join(members)}; unpack the right "
                         "one, or move the other away")
        if settle and best >= STEM:
            above = name.removesuffix(f"/{first.name}")
            if self.above.setdefault(first.archive, above) != above:
                raise UserError(f"{shown(first.archive)}: rows name its pictures as {shown(self.above[first.archive])}/"
                                f"... and as {shown(above)}/...; unpack it where its pictures belong")
        return data

    def _rank(self, member: Member, name: str) -> int:
        if f"/{member.name}".endswith(f"/{name}"):
            return WHOLE if member.name == name else END
        above = name.removesuffix(f"/{member.name}")
        if above == member.archive.stem and above != name:
            return STEM
        return SAME if above != name and self.above.get(member.archive, above) == above else OTHER

    @functools.cached_property
    def _members(self) -> dict[str, list[Member]]:
        """Last part of a name -> the members with it."""
        members: dict[str, list[Member]] = {}
        for path in sorted(path for place in self.places for path in Path(place).glob("*.*")):
            read = {".zip": _zip_members, ".tar": _tar_members}.get(path.suffix.lower())
            try:
                found = {name.replace("\\", "/").removeprefix("./").lstrip("/"): member  # the last of a name counts
                         for name, member in (read(path) if read and path.is_file() else ())}
            except Exception as error:  # as above
                self.unreadable = self.unreadable or (f"{shown(path)} cannot be read ({reason(error)}); download it "
                                                      "again, or move it away")
                continue
            for name, member in found.items():
                members.setdefault(name.rpartition("/")[2], []).append(Member(path, name, member))
        return members


class _File(io.RawIOBase):
    """A file that is open only while a piece of it is read: a folder may hold more archives than one may open."""

    def __init__(self, path: Path) -> None:
        self.path, self.size, self.at = path, path.stat().st_size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.at)
            count = file.readinto(buffer)
        self.at += count
        return count


def _zip_members(path: Path) -> Iterable[tuple[str, Callable[[], bytes]]]:
    archive = zipfile.ZipFile(io.BufferedReader(_File(path)))

    def read(info: zipfile.ZipInfo) -> bytes:
        with archive.open(info) as file:  # stops at MAX_RECORD bytes, whatever its header says
            return _limited(file.read(MAX_RECORD + 1))

    return [(info.filename, functools.partial(read, info)) for info in archive.infolist() if not info.is_dir()]


def _tar_members(path: Path) -> Iterable[tuple[str, Callable[[], bytes]]]:
    """Members of a plain tar; in a compressed one a member cannot be found without reading all before it."""
    places: dict[str, tuple[int, int]] = {}
    with tarfile.open(path, "r:") as archive:
        for info in archive:
            if info.isfile():
                places[info.name] = info.offset_data, info.size
            elif info.islnk() and info.linkname in places:
                places[info.name] = places[info.linkname]

    def read(start: int, size: int) -> bytes:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            return _limited(file.read(min(size, MAX_RECORD + 1)))

    return [(name, functools.partial(read, start, size)) for name, (start, size) in places.items()]


def _limited(data: bytes) -> bytes:
    if len(data) > MAX_RECORD:
        raise ValueError(f"more than {MAX_RECORD:,} bytes")
    return data
