"""Rows into files that `load_rows` reads back as the same rows: .jsonl with pictures beside it, or .parquet with them.

Columns have our names, whatever those of the source were. A file appears whole or not at all.

Next: journal.py, work that survives a kill.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from nanolmmr1.data.columns import COLUMNS
from nanolmmr1.data.images import ImageItem
from nanolmmr1.data.readers import reason, shown
from nanolmmr1.data.schemas import OURS
from nanolmmr1.data.store import Row
from nanolmmr1.errors import UserError
from nanolmmr1.files import sync

GROUP = 100  # rows of a parquet row group: a reader holds one at a time, pictures included
FORMATS = ((b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg"), (b"GIF8", ".gif"), (b"BM", ".bmp"), (b"RIFF", ".webp"),
           (b"II*\0", ".tif"), (b"MM\0*", ".tif"), (b"P", ".ppm"))  # first bytes -> suffix
MOST_INT = 1 << 53  # larger integers are not exact as floats
IMAGES = pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))
# Kinds of a column's values -> its type in parquet, and in the settings of Hugging Face.
TYPES = {
    ("bool",): (pyarrow.bool_(), "bool"), ("int",): (pyarrow.int64(), "int64"),
    ("float",): (pyarrow.float64(), "float64"), ("float", "int"): (pyarrow.float64(), "float64"),
    ("texts",): (pyarrow.list_(pyarrow.string()), "texts"),
}  # fmt: skip
Record = dict[str, Any]


def check_output(out: Path, source: str) -> None:
    """Refuse an output that could not be written, or would replace what is read. Creates its folder.

    Raises:
        UserError: an unknown suffix, a folder that cannot be written, or an output that is or lies in the source.
    """
    if out.suffix not in WRITERS:
        raise UserError(f"OUT={shown(out)}: a {out.suffix or 'nameless'} file is not written; use one of "
                        f"{', '.join(WRITERS)}")
    try:
        read, here = Path(os.path.realpath(source_path(source))), Path(os.path.realpath(out))
        if here == read or read in here.parents and read.is_dir():
            raise UserError(f"OUT={shown(out)} is, or lies in, {shown(source)}, which is read: choose another output")
        folder = Path(os.path.realpath(picture_folder(out)))
        if folder == read or folder in read.parents:
            raise UserError(f"OUT={shown(out)}: its pictures would be written to {shown(folder)}, where "
                            f"{shown(source)} is: choose another output")
        out.parent.mkdir(parents=True, exist_ok=True)
        unwritable = out.is_dir() or not os.access(out.parent, os.W_OK)
    except OSError as error:
        raise _unwritable(out, error) from error
    if unwritable:
        raise UserError(f"OUT={shown(out)} cannot be written: it is a folder, or its folder is read-only")


def source_path(source: str) -> Path:
    """The file or folder of a source, without its split."""
    path = os.path.expanduser(source)
    return Path(path if os.path.exists(path) else path.rpartition("@")[0] or path)


def picture_folder(out: Path) -> Path:
    """Where the pictures of an output are: beside a .jsonl, the folder of its name; those of .parquet, until they are
    embedded."""
    return out.with_suffix("") if out.suffix == ".jsonl" else out.with_name(f"{out.name}.pictures")


def to_record(row: Row, out: Path, copy: bool = False) -> Record:
    """The columns of a row: ours, then the data's others that have no name of ours.

    A picture that is a path stays one, relative to the folder of `out` if it is inside. Bytes become a file in
    `picture_folder`, named by their hash; for .parquet they stay bytes. A file is not on disk until `os.sync`, since
    an fsync of each picture takes longer than all other work.

    Args:
        out: the file that the record is for.
        copy: make a file there of every picture, so that file and folder can be moved together, and the record is JSON.

    Raises:
        UserError: a picture cannot be read or written.
    """
    try:
        images = [_picture(item, out, copy) for item in row.images]
    except OSError as error:
        raise UserError(f"row {row.id}: a picture cannot be copied to {shown(picture_folder(out))}: {reason(error)}") \
            from error
    # The first column says that we wrote the row: columns of its source are kept, but not read again.
    filled = dict(caption=row.caption, options=row.options, id=row.id, task=row.task, gold_rule=row.gold_rule)
    record = {OURS: 1, "problem": row.problem, "answer": row.answer, "images": images}
    record |= {k: v for k, v in filled.items() if v}
    # Options that we cannot read stay as the data has them.
    return record | {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.extra.items()
                     if k not in record and (k not in COLUMNS or k == "options") and _is_utf8(k)}


def _picture(item: ImageItem, out: Path, copy: bool) -> ImageItem:
    home, folder = Path(os.path.abspath(out.parent)), picture_folder(out)
    if isinstance(item, str) and not copy:
        place = Path(os.path.abspath(item))
        return str(place.relative_to(home) if place.is_relative_to(home) else place)
    data = Path(item).read_bytes() if isinstance(item, str) else item
    if out.suffix == ".parquet" and not copy:
        return data
    suffix = next((suffix for start, suffix in FORMATS if data.startswith(start)), "")
    path = folder / (hashlib.sha256(data).hexdigest()[:20] + suffix)
    if not path.exists():
        folder.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(data)
        os.replace(temporary, path)
    return f"{folder.name}/{path.name}"


def write_rows(out: Path, records: Iterable[Record], ready: Callable[[Path], None] = lambda file: None) -> None:
    """Write records to a .jsonl or .parquet file, one after the other; the file is replaced when all are written.

    Parquet needs a type per column: truth values, integers, floats (also of integers and floats), texts and lists of
    texts have their own; a column of anything else, or of a mixture, holds JSON text. Its pictures are embedded as
    `{"bytes", "path"}`, which `datasets` opens as images.

    Args:
        ready: called with the new file before it replaces the old one.

    Raises:
        UserError: a picture cannot be read, or the file not written.
    """
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        WRITERS[out.suffix](temporary, iter(records), out.parent)
        os.sync()  # the pictures
        sync(temporary)
        ready(temporary)
        os.replace(temporary, out)
        sync(out.parent)
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _unwritable(out: Path, error: OSError) -> UserError:
    return UserError(f"OUT={shown(out)} cannot be written: {reason(error)}")


def _write_jsonl(path: Path, records: Iterable[Record], folder: Path) -> None:
    with open(path, "w", encoding="ascii") as file:  # JSON escapes the rest, half surrogates too
        file.writelines(json.dumps(record) + "\n" for record in records)


def _write_parquet(path: Path, records: Iterable[Record], folder: Path) -> None:
    """Write twice, because the types of the columns are known only after the last row."""
    spool, kinds = path.with_suffix(".spool"), dict[str, set[str]]()
    schema = pyarrow.schema([("record", pyarrow.string()), ("images", IMAGES)])
    try:
        with pyarrow.parquet.ParquetWriter(spool, schema) as writer:
            while batch := list(itertools.islice(records, GROUP)):
                images = [[_embedded(item, folder) for item in record["images"]] for record in batch]
                texts = [json.dumps({k: v for k, v in record.items() if k != "images"}) for record in batch]
                for name, value in (pair for record in batch for pair in record.items()):
                    kinds.setdefault(name, set()).add(_kind(value))
                writer.write_table(pyarrow.table([texts, pyarrow.array(images, IMAGES)], schema))
        with pyarrow.parquet.ParquetFile(spool) as file:
            _copy_typed(file, path, {name: tuple(sorted(found - {"null"})) for name, found in kinds.items()})
    finally:
        spool.unlink(missing_ok=True)


def _copy_typed(spool: pyarrow.parquet.ParquetFile, path: Path, kinds: dict[str, tuple[str, ...]]) -> None:
    columns = {name: TYPES.get(of, (pyarrow.string(), "string")) for name, of in kinds.items() if name != "images"}
    text = {"dtype": "string", "_type": "Value"}
    features: dict[str, Any] = {name: {"dtype": theirs, "_type": "Value"} for name, (_, theirs) in columns.items()}
    features |= {name: {"feature": text, "_type": "List"} for name, (_, theirs) in columns.items() if theirs == "texts"}
    features["images"] = {"feature": {"_type": "Image"}, "_type": "List"}
    fields = [(name, IMAGES if name == "images" else columns[name][0]) for name in kinds or ["images"]]
    settings = {"huggingface": json.dumps({"info": {"features": features}})}
    with pyarrow.parquet.ParquetWriter(path, pyarrow.schema(fields, settings)) as writer:
        for number in range(spool.num_row_groups):
            group = spool.read_row_group(number)
            records, images = map(json.loads, group.column("record").to_pylist()), group.column("images")
            rows = list(records)
            arrays = {name: pyarrow.array([_typed(row.get(name), kinds[name]) for row in rows], of)
                      for name, (of, _) in columns.items()}
            table = [images if name == "images" else arrays[name] for name, _ in fields]
            writer.write_table(pyarrow.table(table, writer.schema))


def _embedded(item: ImageItem, folder: Path) -> dict[str, Any]:
    if isinstance(item, bytes):
        return {"bytes": item, "path": None}
    return {"bytes": (folder / item).read_bytes(), "path": os.path.basename(item)}


def _is_utf8(text: str) -> bool:
    return text.isascii() or text == text.encode(errors="replace").decode()


def _kind(value: Any) -> str:
    """The kind of a value: a name that TYPES knows, "null", "text" or "other"."""
    if isinstance(value, str):
        return "text" if _is_utf8(value) else "other"
    if isinstance(value, list):
        return "texts" if value and all(isinstance(each, str) and _is_utf8(each) for each in value) else "other"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MOST_INT:
        return "other"
    return {type(None): "null", bool: "bool", int: "int", float: "float"}.get(type(value), "other")


def _typed(value: Any, kinds: tuple[str, ...]) -> Any:
    return value if value is None or kinds in TYPES or kinds == ("text",) else json.dumps(value)


WRITERS: dict[str, Callable[[Path, Iterable[Record], Path], None]] = {
    ".jsonl": _write_jsonl, ".parquet": _write_parquet}
