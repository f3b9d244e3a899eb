"""Where the pictures of a data set are: a folder, a folder that was moved, or a .zip or .tar beside the data.

Nothing is unpacked: a member is read when a row names it, so no member can land anywhere.

Next: readers.py, files, folders and hub data sets.
"""

import functools
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from nanolmmr1.data.readers import MAX_RECORD, BadRow, reason, shown

MAX_PATH = 4096  # characters of a path
Members = dict[str, list[tuple[str, Callable[[], bytes]]]]  # last part of a name -> whole names, and how to read them


class PictureFolder:
    """The folder that relative paths of pictures start at.

    Args:
        path: None for a data set of the hub, whose pictures are in its rows.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = os.path.abspath(path) if path is not None else ""
        self.removed: int | None = None  # leading parts of absolute paths, found with the first picture

    def find(self, name: str) -> str | bytes | None:
        """A picture that is not where its path leads: in this folder, if all folders above it were moved here, or in
        an archive of this folder. Paths of one source lose equally many leading parts, so that pictures of one name in
        two folders are never confused.

        Returns:
            its path, or its bytes from an archive, or None.

        Raises:
            BadRow: it is in an archive that is damaged, encrypted or holds too large a file.
        """
        parts = [part for part in PurePosixPath(name).parts if part != "/"]
        if not self.path or not parts or ".." in parts or len(name) > MAX_PATH:
            return None
        for removed in range(len(parts)) if self.removed is None else [self.removed]:
            path = os.path.join(self.path, *parts[removed:])
            if os.path.isabs(name) and removed < len(parts) and os.path.isfile(path):
                self.removed = removed
                return path
        return self._from_archive("/".join(parts))

    def _from_archive(self, name: str) -> bytes | None:
        """The member whose name ends with the path, or that the path ends with; None if none or several do."""
        found = [read for member, read in self._members.get(name.rpartition("/")[2], ())
                 if f"/{member}".endswith(f"/{name}") or f"/{name}".endswith(f"/{member}")]
        try:
            return found[0]() if len(found) == 1 else None
        except (OSError, ValueError, RuntimeError, NotImplementedError, zlib.error, zipfile.BadZipFile,
                tarfile.TarError, EOFError) as error:
            raise BadRow("picture broken", f"image {shown(name, 200)} cannot be read from its archive "
                         f"({reason(error)}); unpack it, or download it again") from error

    @functools.cached_property
    def _members(self) -> Members:
        members: Members = {}
        for path in sorted(Path(self.path).glob("*.*")):
            read = {".zip": _zip_members, ".tar": _tar_members}.get(path.suffix.lower())
            try:
                for name, member in read(path) if read and path.is_file() else ():
                    members.setdefault(name.rpartition("/")[2], []).append((name.removeprefix("./"), member))
            except (OSError, zipfile.BadZipFile, tarfile.TarError, ValueError) as error:
                raise BadRow("picture missing", f"{shown(path)} cannot be read ({reason(error)}); download it again, "
                             "or move it away") from error
        return members


def _zip_members(path: Path) -> list[tuple[str, Callable[[], bytes]]]:
    archive = zipfile.ZipFile(path)

    def read(info: zipfile.ZipInfo) -> bytes:
        with archive.open(info) as file:  # stops at MAX_RECORD bytes, whatever its header says
            return _limited(file.read(MAX_RECORD + 1))

    return [(info.filename, functools.partial(read, info)) for info in archive.infolist() if not info.is_dir()]


def _tar_members(path: Path) -> list[tuple[str, Callable[[], bytes]]]:
    """Members of a plain tar; in a compressed one a member cannot be found without reading all before it."""
    with tarfile.open(path, "r:") as archive:
        found = [(info.name, info.offset_data, info.size) for info in archive if info.isfile()]
    file = open(path, "rb")  # noqa: SIM115, closed with its last member

    def read(start: int, size: int) -> bytes:
        return _limited(os.pread(file.fileno(), min(size, MAX_RECORD + 1), start))

    return [(name, functools.partial(read, start, size)) for name, start, size in found]


def _limited(data: bytes) -> bytes:
    if len(data) > MAX_RECORD:
        raise ValueError(f"more than {MAX_RECORD:,} bytes")
    return data
