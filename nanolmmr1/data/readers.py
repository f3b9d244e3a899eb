"""Raw rows of .jsonl, .json, .csv and .parquet files, folders, saved data sets and the hub.

Data is untrusted. A few kB can unpack to any size, so files are measured, and read in pieces below the limits here.
That is why parquet is not read by `datasets`, which has no such limits; it reads only its own folders, and the hub.

Next: prompt.py, from a row to token ids, patches and positions.
"""

import ast
import contextlib
import csv
import io
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from nanolmmr1.errors import UserError

MAX_LINE = 64 << 20  # characters (bytes in UTF-8) of a line of .jsonl, or of an object in a .json list
MAX_VALUES = 1 << 20  # texts, numbers, lists and objects of one line: an empty list is 2 bytes there, 88 in memory
MAX_RECORD = 256 << 20  # bytes of an image file, or of a row of parquet or a data set with its images
MAX_UNPACKED, MAX_RATIO = 256 << 20, 100  # a file may unpack to so many bytes, or to so many times its size
PIECE = 64 << 20  # bytes of Arrow data that are converted to Python objects together
HUB = r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?"  # a data set of the hub, perhaps with a configuration
CHUNK = 1 << 20  # characters of a .json list that are read together
FIRST = 10  # files of a folder of single rows of which one has to be a row
SINGLE = ("problem", "question", "problem_text")  # columns by which a file is known as a row
DIAGRAM = "img_diagram.png"  # the picture beside each data.json of Geometry3K as first published
MAX_LITERAL = 20_000  # characters of a Python literal inside a text

Numbered = Iterator[tuple[int, Any]]  # raw rows of a file and their numbers
Records = Iterator[tuple[Any, str, Path | None]]  # raw row, its place for messages, folder of relative image paths


class BadRow(UserError):
    """A row that cannot be used, while the others can. A reader yields one in place of a row that it cannot read."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind  # a few words, by which such rows are counted


def shown(text: object, most: int = 1000) -> str:
    """Text of data, or a path, for messages and logs: cut to `most` characters, unprintable ones escaped as \\x1b."""
    text = text if len(text := str(text)) <= most else text[:most] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text) if not text.isprintable() else text


def reason(error: object) -> str:
    """The message of an exception, or else its name, in one short line."""
    return shown(" ".join(str(error)[:2000].split()), 300) or type(error).__name__


def parsed(text: str) -> Any:
    """The list or object that a text holds as JSON or as a Python literal; None if it holds none.

    No code runs: a literal has no names and calls. Texts are measured first, because "[]" takes 28 times as much.
    """
    if len(text) > MAX_LINE or text.lstrip()[:1] not in ("[", "{") or _many_values(text):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        if len(text) > MAX_LITERAL:
            return None
    try:
        with warnings.catch_warnings(action="ignore"):  # of backslashes
            value = ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list | dict) else None


def raw_rows(source: str) -> Records:
    """The raw rows of a source, see `rows.load_rows`.

    Raises:
        UserError: it does not exist, has no such split, cannot be read, or would unpack to more than the limits.
    """
    name, at, split = source.rpartition("@")
    if not at or os.path.exists(source):
        name, split = source, ""
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):
        if split:
            raise UserError(f"{shown(source)}: a single file has no splits; leave out @{shown(split)}")
        yield from _from_file(path)
    elif any(os.path.isfile(path / mark) for mark in ("state.json", "dataset_dict.json")):
        yield from _from_datasets(str(path), split, path)
    elif os.path.isdir(path):
        for file in data_files(path, split):
            yield from _from_file(file)
    elif re.fullmatch(HUB, name) and path.suffix not in READERS:
        yield from _from_datasets(name, split, None)
    else:
        raise UserError(f"{shown(name)} does not exist: give a file ({', '.join(READERS)}), a folder, or a hub id as "
                        "owner/set, owner/set@split or owner/set:config@split; the files of a built-in recipe are "
                        "written by the commands in its first lines, or in its base's")


def data_files(folder: Path, split: str) -> list[Path]:
    """The data files of one split of a folder. Shards (train-00000-of-00002) are one split."""
    inside = sorted([*folder.glob("*.*"), *folder.glob("data/*.*")])
    files = [path for path in inside if path.suffix in (".jsonl", ".parquet")]
    files = files or [path for path in inside if path.suffix == ".json" and _holds_rows(path)]
    files = files or [path for path in inside if path.suffix == ".csv"]
    if not files and not split and (files := _single_rows(folder)):
        return files
    if not files:
        folders = sorted({path.parent.name for suffix in READERS for path in folder.glob(f"*/*{suffix}")})
        raise UserError(f"{shown(folder)} holds no .jsonl or .parquet file, no .json of rows and no saved data set"
                        + f"; of its folders, these may: {shown(', '.join(folders))}" * bool(folders))
    splits: dict[str, list[Path]] = {}
    for path in files:
        splits.setdefault(re.sub(r"-\d+(-of-\d+.*)?$", "", path.stem), []).append(path)
    return _pick(splits, split, shown(folder))


def _single_rows(folder: Path) -> list[Path]:
    """Files of one row each: of a folder of folders, in the order of their numbers. MATH and Geometry3K are like that.
    One of the first files has to be a row, so that settings of other programs are not searched for rows. Where all
    folders have a file of its name, a name without a number, others are no rows, such as Geometry3K's logic_form.json.
    """
    found = [path for path in folder.glob("*/*.json") if path.is_file()]
    found.sort(key=lambda path: [int(part) if place % 2 else part for place, part in
                                 enumerate(re.split(r"(\d+)", f"{path.parent.name}/{path.name}"))])
    for path in found[:FIRST]:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            row = json.loads(path.read_bytes()[:MAX_LINE])
            if isinstance(row, dict) and any(isinstance(row.get(name), str) for name in SINGLE):
                same = [other for other in found if other.name == path.name]
                is_each = len(same) == len({other.parent for other in found}) and not re.search(r"\d", path.stem)
                return same if is_each else found
    return []


def _holds_rows(path: Path) -> bool:
    """Whether a .json file has rows: a list of objects, or an object a line. Other .json files are settings."""
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file, io.TextIOWrapper(file, _encoding(file), errors="replace") as text:
            return bool(re.match(r"\s*(\[\s*\{|\{.*\}\s*\n\s*\{)", text.read(CHUNK)))
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read ({reason(error)}): change its permissions, or name the files "
                        "that are data") from error


def _pick(splits: dict[str, Any], split: str, label: str) -> Any:
    if split and split not in splits:
        raise UserError(f"{label}: no split {split!r}; it has {shown(', '.join(splits))}")
    if not split and len(splits) > 1:
        raise UserError(f"{label} has the splits {shown(', '.join(splits))}: pick one, as in {label}@SPLIT")
    return splits[split or next(iter(splits))]


def _from_file(path: Path) -> Records:
    name = shown(path)
    if path.suffix not in READERS:
        raise UserError(f"{name}: a {path.suffix or 'nameless'} file is not read; use one of {', '.join(READERS)}")
    if not path.is_file():  # a folder may hold a FIFO, and reading that never ends
        raise UserError(f"{name} is no regular file: remove it, or name the files that are data")
    try:
        for number, record in READERS[path.suffix](path, name):
            if path.name == "metadata.jsonl" and isinstance(record, dict) and "file_name" in record:
                record.setdefault("image", record["file_name"])  # the convention of image folders
            if path.name == "data.json" and isinstance(record, dict) and (path.parent / DIAGRAM).is_file():
                record.setdefault("image", DIAGRAM)
            yield record, f"{name}:{number}", path.parent
    except (OSError, UnicodeError) as error:
        raise UserError(f"{name} cannot be read: {reason(error)}") from error


def _from_datasets(name: str, split: str, folder: Path | None) -> Records:
    label = shown(name)
    hub_id, _, config = name.partition(":")
    try:
        import datasets  # takes a second, and most runs read plain files
        data = datasets.load_from_disk(name) if folder else datasets.load_dataset(hub_id, config or None)
    except ImportError as error:
        raise UserError(f"{label} is no file or folder here, or one for the package `datasets`, which is missing "
                        f"({reason(error)}): pip install 'nanolmmr1[data]'") from error
    except Exception as error:  # any type: an unreachable hub, a damaged folder
        if found := not folder and re.search(r"[Cc]onfig.*?\[(.*?)\]", str(error), re.S):
            raise UserError(f"{label}: this data set has the configurations {shown(found[1])}: pick one, as in "
                            f"{hub_id}:CONFIG or {hub_id}:CONFIG@SPLIT") from error
        raise UserError(f"{label} is neither a file or folder here nor a readable data set: {reason(error)}") from error
    if not isinstance(data, dict) and split:
        raise UserError(f"{label}: this data set has no splits; leave out @{shown(split)}")
    data = _pick(data, split, label) if isinstance(data, dict) else data
    label += f"@{split}" if split else ""
    packed = sum(os.path.getsize(file["filename"]) for file in data.cache_files)
    # As Arrow tables, images are the bytes that were stored, not decoded ones.
    batches = (batch for table in data.with_format("arrow").iter(1024) for batch in table.to_batches())
    for number, record in _arrow_rows(batches, label, packed):
        yield record, f"{label}:{number}", folder


def _encoding(file: IO[bytes]) -> str:
    """UTF-8, 16 or 32 by the first bytes; the file is then at its start, or after a byte-order mark of UTF-8."""
    encoding = json.detect_encoding(file.read(4))
    file.seek(3 if encoding == "utf-8-sig" else 0)
    return encoding.removesuffix("-sig")


def _read_jsonl(path: Path, name: str) -> Numbered:
    with open(path, "rb") as file:
        encoding = _encoding(file)
        # UTF-8 is split as bytes, so that a broken character is reported with its line.
        lines: IO[Any] = file if encoding == "utf-8" else io.TextIOWrapper(file, encoding, newline="\n")
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), lines.read(0)), 1):
            if not line.isspace():
                _check_size(line, f"{name}:{number}")
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    record = _bad_json(error)
                yield number, record


def _many_values(text: str | bytes) -> bool:
    marks: tuple[Any, ...] = (b",", b"[", b"{") if isinstance(text, bytes) else (",", "[", "{")
    return len(text) > MAX_VALUES < sum(map(text.count, marks))


def _check_size(text: str | bytes, place: str) -> None:
    if len(text) > MAX_LINE or _many_values(text):
        raise UserError(f"{place}: a row of more than {MAX_LINE:,} characters or {MAX_VALUES:,} values; write one "
                        "object a line, or in .json a list, with pictures as paths")


def _unreadable(place: str, error: object) -> UserError:
    return UserError(f"{place}: unreadable JSON ({reason(error)}); write one object a line, or in .json a list")


def _bad_json(error: object) -> BadRow:
    return BadRow("unreadable JSON", str(_unreadable("", error)).removeprefix(": "))


def _read_json(path: Path, name: str) -> Numbered:
    with open(path, "rb") as file:
        text = io.TextIOWrapper(file, _encoding(file))
        start = text.read(CHUNK).lstrip()
        is_whole = start[:1] == "[" or _is_keyed(start)
        if start[:1] == "{" and not is_whole and len(start) < CHUNK:  # an object alone, over several lines
            try:
                record = json.loads(start)
            except (ValueError, RecursionError) as error:
                record = _bad_json(error)
            if isinstance(record, dict) or "\n{" not in start:
                yield 1, record
                return
        yield from _read_list(text, start, name) if is_whole else _read_jsonl(path, name)


def _is_keyed(start: str) -> bool:
    """Whether a file that starts so is one object of rows by their ids, and not an object a line."""
    line, _, rest = start.partition("\n")
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):  # the object goes on in the next line
        return bool(re.match(rf"\{{\s*{JSON_KEY}\{{", start))
    return isinstance(first, dict) and bool(first) and not rest.strip() and all(
        isinstance(value, dict) for value in first.values())


JSON_KEY = r'"(?:[^"\\]|\\.){0,1000}"\s*:\s*'  # a longer key is no id


def _read_list(file: IO[str], text: str, name: str) -> Numbered:
    """The elements of a JSON list, or the values of an object, read chunk by chunk: `text` is its start."""
    decode, at, number = json.JSONDecoder().raw_decode, 0, 1
    between = (r"\[\s*(\])?", r"\s*(?:,\s*|(\]))")
    if text[0] == "{":
        between = (rf"\{{\s*(?:(\}})|{JSON_KEY})", rf"\s*(?:,\s*{JSON_KEY}|(\}}))")
    while not ((gap := re.compile(between[number > 1]).match(text, at)) and gap[1]):
        try:
            if not gap:
                raise json.JSONDecodeError("a comma or the end should follow the last object", text, at)
            record, at = decode(text, gap.end())
        except (ValueError, RecursionError) as error:
            # Perhaps the object only continues in the next chunk.
            new = file.read(max(CHUNK, len(text) // 4)) if isinstance(error, json.JSONDecodeError) else ""
            if not new:
                raise _unreadable(f"{name}:{number}", error) from error
            text, at = text[at:], 0
            _check_size(text, f"{name}:{number}")
            text += new
        else:
            yield number, record
            number += 1
    if text[gap.end():].strip() or file.read(CHUNK).strip():
        raise _unreadable(f"{name}:{number}", "the list ends before the file does")


def _read_parquet(path: Path, name: str) -> Numbered:
    import pyarrow.parquet

    try:
        metadata, packed = pyarrow.parquet.read_metadata(path), path.stat().st_size
        batch_rows, unpacked = 1 << 16, 0
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            chunks, rows = [group.column(i) for i in range(group.num_columns)], max(group.num_rows, 1)
            size = sum(chunk.total_uncompressed_size for chunk in chunks)
            if size > rows * MAX_RECORD:
                raise UserError(f"{name}: rows of {size // rows:,} bytes, more than {MAX_RECORD:,}; cut them down")
            batch_rows = min(batch_rows, max(PIECE * rows // max(size, 1), 1))
            unpacked += size + 100 * sum(chunk.num_values for chunk in chunks)  # as Python objects
        _check_unpacked(name, packed, unpacked)
        # A dictionary column unpacks a repeated value once. A batch of lists can hold one dictionary only, so batches
        # end with their row group.
        columns = map(metadata.schema.column, range(metadata.num_columns))
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        file = pyarrow.parquet.ParquetFile(path, metadata=metadata, read_dictionary=texts, buffer_size=CHUNK)
        batches = (b for i in range(file.num_row_groups) for b in file.iter_batches(batch_rows, row_groups=[i]))
        yield from _arrow_rows(batches, name, packed)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name} is not readable parquet: {reason(error)}") from error


def _read_csv(path: Path, name: str) -> Numbered:
    """Rows by the names in the first line; every value is text, and None where a line ends early."""
    with open(path, "rb") as file:
        csv.field_size_limit(MAX_LINE)
        rows = csv.DictReader(io.TextIOWrapper(file, _encoding(file), newline=""), strict=True)
        try:
            names = Counter(filter(None, rows.fieldnames or ()))
            if twice := [column for column, count in names.items() if count > 1]:
                raise UserError(f"{name}: the first line names the column {shown(twice[0], 100)!r} twice; rename one")
            for number, row in enumerate(rows, 2):
                more = row.pop(None, ())  # the key of fields without a name
                yield number, BadRow("fields without a column", f"the row has {len(more)} fields more than the first "
                                     "line has names; put quotes around values that hold commas") if more else row
        except csv.Error as error:
            raise UserError(f"{name}:{rows.line_num + 1}: unreadable CSV ({reason(error)}); write it again, with "
                            "quotes around values that hold commas, quotes or line breaks") from error


READERS: dict[str, Callable[[Path, str], Numbered]] = {
    ".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".csv": _read_csv}


def _check_unpacked(name: str, packed: int, unpacked: int) -> None:
    if unpacked > max(MAX_UNPACKED, packed * MAX_RATIO):
        raise UserError(f"{name}: {packed:,} bytes that unpack to more than {MAX_UNPACKED:,} and {MAX_RATIO} times as "
                        "much; no data set to train on is like that: cut it down")


def _arrow_rows(batches: Iterable[Any], name: str, packed: int) -> Numbered:
    """The rows of Arrow batches, converted in pieces of at most PIECE bytes; `packed`: the size of their files."""
    import pyarrow

    number = total = 0
    try:
        for batch in batches:
            batch.validate(full=True)  # texts may be no UTF-8, and offsets of a saved data set may lead anywhere
            total += sum(map(_python_bytes, batch.columns))
            _check_unpacked(name, packed, total)
            pieces = [batch]
            while pieces:
                piece = pieces.pop()
                sizes, half = list(map(_python_bytes, piece.columns)), piece.num_rows // 2
                if sum(sizes) > PIECE and half:
                    pieces += [piece[half:], piece[:half]]
                    continue
                if sum(sizes) > MAX_RECORD:
                    raise UserError(f"{name}:{number + 1}: a row of {sum(sizes):,} bytes, over {MAX_RECORD:,}, most "
                                    f"in column {piece.schema.names[sizes.index(max(sizes))]!r:.80}; cut it down")
                flat = [c.dictionary_decode() if hasattr(c, "dictionary") else c for c in piece.columns]  # 3 x faster
                records = pyarrow.RecordBatch.from_arrays(flat, piece.schema.names).to_pylist()
                yield from enumerate(records, number + 1)
                number += len(records)
    except UserError:
        raise
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError) as error:  # such as a date before the year 1
        raise UserError(f"{name}: unreadable data after row {number}: {reason(error)}") from error


def _python_bytes(array: Any) -> int:
    """About the bytes of an Arrow array as Python objects. Its `nbytes` counts repeats and empty lists as nothing."""
    from pyarrow import BaseExtensionType, compute, types

    data_type, count, indices = array.type, len(array), None
    if isinstance(data_type, BaseExtensionType):
        return _python_bytes(array.storage)
    if types.is_struct(data_type):
        return 200 * count + sum(map(_python_bytes, array.flatten()))
    if types.is_list(data_type) or types.is_large_list(data_type) or types.is_fixed_size_list(data_type):
        return 64 * count + 8 * len(items := array.flatten()) + _python_bytes(items)
    if types.is_dictionary(data_type):
        array, indices, data_type = array.dictionary, array.indices, data_type.value_type
    nested = data_type.num_fields or types.is_dictionary(data_type)
    if nested or any(name in str(data_type) for name in ("view", "run_end")):
        raise ValueError(f"a column of type {data_type} is not read: convert it to text, numbers or lists")
    if not any(name in str(data_type) for name in ("string", "binary")):
        return 64 * count
    lengths = compute.binary_length(array)
    return 64 * count + (compute.sum(lengths if indices is None else lengths.take(indices)).as_py() or 0)
