"""Rows, pictures and their order: everything about data that needs neither model nor tokenizer.

A row is a problem, its gold answer and its pictures. All of it is read and checked before the first step, pictures
decoded once, so that a bad line stops the run within minutes. What is kept is small: a picture that is a file stays a
path, one that came as bytes stays compressed. As a few kB can unpack to any size, files are measured piece by piece.

Next: prompt.py, where a row becomes token ids, image patches and positions.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import statistics
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as brief

import numpy as np
from PIL import Image
from PIL.Image import Transpose
from rich.progress import track

from nanolmmr1.errors import UserError

MARKER = "<image>"
MAX_IMAGE_PIXELS = 64_000_000
MAX_LINE = 64 << 20  # characters of a line of .jsonl, or of an object in a .json list; bytes where that is UTF-8
MAX_VALUES = 1 << 20  # texts, numbers, lists and objects of one line: an empty list is 2 bytes there, 88 in memory
MAX_TEXT = 16 << 20  # characters of a problem, answer, caption or task
MAX_RECORD = 256 << 20  # bytes of a row of parquet or a data set, its pictures included, or of a picture file
MAX_UNPACKED, MAX_RATIO = 256 << 20, 100  # bytes of a parquet file or data set; or a hundred times its own
MAX_ID = 200  # characters of an id: it stands in logs and messages
PIECE = 64 << 20  # bytes of parquet or a data set that become Python objects at once
CHUNK = 1 << 20  # characters of a .json list read at once
# Named, because some of Pillow's other plugins start programs (EPS runs Ghostscript) on what is untrusted data.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Our column -> the columns of the data it is looked for in, unless prompt.columns names one.
COLUMNS = {"problem": ("problem",), "answer": ("answer",), "images": ("images", "image"), "caption": ("caption",),
           "id": ("id", "qid"), "task": ("task",)}
# EXIF orientation -> what sets the picture upright; from 5 on it lies on its side.
UPRIGHT = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
           5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}
warnings.filterwarnings("ignore", "Tag data larger|Corrupt EXIF|Metadata", module="PIL")  # one for each of thousands


@dataclass
class Row:
    """One problem with its gold answer; each image is an absolute path or the bytes of an image file."""

    problem: str
    answer: str
    images: list = field(default_factory=list)
    caption: str = ""
    id: str = ""
    task: str = ""
    extra: dict = field(default_factory=dict)

    def public(self):
        """The row as a JSON-able dict for reward functions: all columns, pictures by path or size."""
        images = [item if isinstance(item, str) else f"<{len(item)} bytes>" for item in self.images]
        return self.extra | dict(problem=self.problem, answer=self.answer, images=images, caption=self.caption,
                                 id=self.id, task=self.task)


def load_rows(source, columns=None):
    """Read and check all rows of a source: a .jsonl, .json or .parquet file, a folder, a hub id, or a list of these.

    A folder holds such files, an image folder's `metadata.jsonl`, or what `datasets.save_to_disk` wrote. `@split`
    after a folder or hub id picks a split. `columns` maps our column names to the data's.

    Raises:
        UserError: names file and line (row for parquet and data sets), what is wrong, and the cure.
    """
    columns = columns or {}
    if not all(ours in COLUMNS and isinstance(theirs, str) for ours, theirs in columns.items()):
        raise UserError(f"prompt.columns={columns}: give each of {', '.join(COLUMNS)} the name of a column of the data")
    places, rows = [], []
    for one in [source] if isinstance(source, str) else source:
        before = len(rows)
        for record, place, folder in _records(one):
            rows.append(_row(record, place, folder, columns))
            places.append(place)
        if len(rows) == before:
            raise UserError(f"{shown(one)} holds no rows")
    _check_images(rows, places)
    return rows


def open_image(item):
    """Decode a path or bytes into an RGB picture, upright as its EXIF says, transparency flattened on white.

    Raises:
        UserError: missing, broken, of an unknown format, or larger than MAX_IMAGE_PIXELS by its header.
    """
    with _opened(item) as (image, orientation):
        if image.mode.startswith("I"):  # 16-bit greys: Pillow's own conversion clips all but the darkest to white
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image.convert("RGBA"))
            image = white
        image = image.convert("RGB")
        return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def image_size(item):
    """(width, height) of the picture `open_image` gives, in pixels, from the file's header alone."""
    with _opened(item) as (image, orientation):
        return image.size[::-1] if orientation in (5, 6, 7, 8) else image.size


def shown(text, most=1000):
    """Text of data, or a path, for messages and logs: at most so many characters, and control codes as \\x1b."""
    text = text if len(text := str(text)) <= most else text[:most] + "..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text) if not text.isprintable() else text


def reason(error):
    """What an exception says, or else its name, in one short line."""
    return shown(" ".join(str(error)[:2000].split()), 300) or type(error).__name__


class PromptSampler:
    """The order in which rows are visited: a pure function of seed, phase name and cursor.

    Nothing is remembered between calls, so resuming a run needs the cursor (rows taken so far) and no more.
    """

    def __init__(self, num_rows, seed, phase_name):
        assert num_rows > 0, "a sampler needs rows"
        self.num_rows, self.seed, self.phase_name = num_rows, seed, phase_name

    def take(self, cursor, count):
        """The row indices at cursor .. cursor + count - 1; each epoch is a permutation of its own."""
        indices = []
        while len(indices) < count:
            epoch, start = divmod(cursor + len(indices), self.num_rows)
            indices += self._permutation(epoch)[start:start + count - len(indices)]
        return indices

    def _permutation(self, epoch):
        digest = hashlib.sha256(f"{self.seed}/{epoch}/{self.phase_name}".encode()).digest()
        bits = np.random.Philox(key=int.from_bytes(digest[:16]))
        # Sorting raw bits: NumPy promises their stream for all versions, but not that of Generator.permutation.
        return np.argsort(bits.random_raw(self.num_rows), kind="stable").tolist()


def select_rows(rows, processor, captions, max_prompt_tokens, judge, where):
    """Keep the rows a phase can train on. Returns ([(row, its processor.measure)] kept, {reason: number dropped}).

    Dropped are rows without a caption where captions are shown, prompts above max_prompt_tokens (image tokens
    included, no pixel decoded), and rows whose gold answer the judge does not accept for itself: their reward
    could only ever be wrong. A text too long for any tokens is not tokenised, at 200 bytes a character: it counts as
    the fewest it can have. `where` is the phase's key, as in "phases.text".

    Raises:
        UserError: nothing is left.
    """
    def size(row):
        long = len(row.problem) + len(row.caption) * captions > max_prompt_tokens  # a token has a character at least
        least = processor.at_least(row, captions) if long else 0
        return (least, 0) if least > max_prompt_tokens else processor.measure(row, captions)

    captioned = [row for row in rows if row.caption or not captions]
    sizes = [size(row) for row in track(captioned, "counting prompt tokens", transient=True, disable=len(rows) <= 200)]
    short = [(row, size) for row, size in zip(captioned, sizes, strict=True) if size[0] <= max_prompt_tokens]
    accepted = judge.gold_answers_ok([row.public() for row, _ in short]) if short else []
    kept = [each for each, ok in zip(short, accepted, strict=True) if ok]
    dropped = {"no caption": len(rows) - len(captioned), "prompt too long": len(captioned) - len(short),
               "gold answer fails against itself": len(short) - len(kept)}
    dropped = {reason: count for reason, count in dropped.items() if count}
    if not kept:
        tokens = [size[0] for size in sizes]
        lengths = f"{min(tokens)} / {statistics.median(tokens):.0f} / {max(tokens)}" if tokens else "none counted"
        raise UserError(f"{where}: no row is left of {len(rows)}, dropped {dropped}; prompt tokens min / median / max: "
                        f"{lengths}. For long prompts raise {where}.max_prompt_tokens={max_prompt_tokens} or lower "
                        "prompt.max_pixels; for captions and gold answers look at prompt.columns")
    return kept, dropped


def _records(source):
    """Yield (record, place, folder) for each raw row; folder is where relative image paths start."""
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
        for file in _files(path, split):
            yield from _from_file(file)
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and path.suffix not in READERS:
        yield from _from_datasets(name, split, None)
    else:
        raise UserError(f"{shown(name)} does not exist: give a file ({', '.join(READERS)}), folder or hub id owner/set")


def _files(folder, split):
    """The data files of one split of a folder: shards (train-00000-of-00002) belong together, splits never mix."""
    splits = {}
    for path in sorted([*folder.glob("*.*"), *folder.glob("data/*.*")]):
        if path.suffix in (".jsonl", ".parquet"):
            splits.setdefault(re.sub(r"-\d+(-of-\d+.*)?$", "", path.stem), []).append(path)
    if not splits:
        raise UserError(f"{shown(folder)} holds no .jsonl or .parquet file and no saved data set")
    return _pick(splits, split, shown(folder))


def _pick(splits, split, label):
    if split and split not in splits:
        raise UserError(f"{label}: no split {split!r}; it has {shown(', '.join(splits))}")
    if not split and len(splits) > 1:
        raise UserError(f"{label} has the splits {shown(', '.join(splits))}: pick one, as in {label}@SPLIT")
    return splits[split or next(iter(splits))]


def _from_file(path):
    name = shown(path)
    if path.suffix not in READERS:
        raise UserError(f"{name}: a {path.suffix or 'nameless'} file is not read; use one of {', '.join(READERS)}")
    if not path.is_file():  # in a folder; to read a FIFO is to wait for ever
        raise UserError(f"{name} is no regular file: remove it, or name the files that are data")
    try:
        for number, record in READERS[path.suffix](path, name):
            if path.name == "metadata.jsonl" and isinstance(record, dict) and "file_name" in record:
                record.setdefault("image", record["file_name"])  # the image-folder convention
            yield record, f"{name}:{number}", path.parent
    except (OSError, UnicodeError) as error:
        raise UserError(f"{name} cannot be read: {reason(error)}") from error


def _encoding(file):
    """UTF-8, 16 or 32 by the first bytes; leaves the file after a byte-order mark of UTF-8."""
    encoding = json.detect_encoding(file.read(4))
    file.seek(3 if encoding == "utf-8-sig" else 0)
    return encoding.removesuffix("-sig")


def _read_jsonl(path, name):
    with open(path, "rb") as file:
        encoding = _encoding(file)
        # Bytes where a line feed is a byte: a broken character is then found in its own line.
        lines = file if encoding == "utf-8" else io.TextIOWrapper(file, encoding, newline="\n")
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), lines.read(0)), 1):
            if not line.isspace():
                _check_size(line, f"{name}:{number}")
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise _unreadable(f"{name}:{number}", error) from error


def _check_size(text, place):
    marks = (b",", b"[", b"{") if isinstance(text, bytes) else ",[{"
    if len(text) > MAX_LINE or len(text) > MAX_VALUES < sum(map(text.count, marks)):
        raise UserError(f"{place}: a row of more than {MAX_LINE:,} characters or {MAX_VALUES:,} values; write one "
                        "object a line, or in .json a list, with pictures as paths")


def _unreadable(place, error):
    return UserError(f"{place}: unreadable JSON ({reason(error)}); write one object a line, or in .json a list")


def _read_json(path, name):
    with open(path, "rb") as file:
        text = io.TextIOWrapper(file, _encoding(file))
        start = text.read(CHUNK).lstrip()
        yield from _elements(text, start, name) if start.startswith("[") else _read_jsonl(path, name)


def _elements(file, text, name):
    """(number, element) of the list whose start is `text` and whose rest is in `file`: little more than one is held."""
    decode, gaps, at, number = json.JSONDecoder().raw_decode, (r"\[\s*(\])?", r"\s*(?:,\s*|(\]))"), 0, 1
    while not ((gap := re.compile(gaps[number > 1]).match(text, at)) and gap[1]):
        try:
            if not gap:
                raise json.JSONDecodeError("a comma or ] should follow the last object", text, at)
            record, at = decode(text, gap.end())
        except (ValueError, RecursionError) as error:
            new = file.read(max(CHUNK, len(text) // 4)) if isinstance(error, json.JSONDecodeError) else ""
            if not new:
                raise _unreadable(f"{name}:{number}", error) from error
            text, at = text[at:], 0  # it may only be cut off
            _check_size(text, f"{name}:{number}")
            text += new
        else:
            yield number, record
            number += 1
    if text[gap.end():].strip() or file.read(CHUNK).strip():
        raise _unreadable(f"{name}:{number}", "the list ends before the file does")


def _read_parquet(path, name):
    import pyarrow.parquet

    try:
        metadata, packed = pyarrow.parquet.read_metadata(path), path.stat().st_size
        batch, unpacked = 1 << 16, 0
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            chunks, rows = [group.column(i) for i in range(group.num_columns)], max(group.num_rows, 1)
            size = sum(chunk.total_uncompressed_size for chunk in chunks)
            if size > rows * MAX_RECORD:
                raise UserError(f"{name}: rows of {size // rows:,} bytes, more than {MAX_RECORD:,}; cut them down")
            batch = min(batch, max(PIECE * rows // max(size, 1), 1))
            unpacked += size + 100 * sum(chunk.num_values for chunk in chunks)  # as Python objects
        _check_unpacked(name, packed, unpacked)
        # Repeats stay a dictionary, so that a value is unpacked once; group by group, as lists can have only one.
        columns = map(metadata.schema.column, range(metadata.num_columns))
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        file = pyarrow.parquet.ParquetFile(path, metadata=metadata, read_dictionary=texts, buffer_size=CHUNK)
        batches = (part for i in range(file.num_row_groups) for part in file.iter_batches(batch, row_groups=[i]))
        yield from _numbered(batches, name, packed)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name} is not readable parquet: {reason(error)}") from error


def _check_unpacked(name, packed, unpacked):
    if unpacked > max(MAX_UNPACKED, packed * MAX_RATIO):
        raise UserError(f"{name}: {packed:,} bytes that unpack to more than {MAX_UNPACKED:,} and {MAX_RATIO} times as "
                        "much; no data set to train on is like that: cut it down")


def _numbered(batches, name, packed):
    """(number, record) of Arrow record batches; `packed`: bytes that they had in their files."""
    import pyarrow

    number = total = 0
    try:
        for batch in batches:
            batch.validate(full=True)  # UTF-8 above all; in a saved data set offsets may also lead anywhere
            total += sum(map(_weight, batch.columns))
            _check_unpacked(name, packed, total)
            pieces = [batch]
            while pieces:
                piece = pieces.pop()
                sizes, half = list(map(_weight, piece.columns)), piece.num_rows // 2
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
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError) as error:  # a date that Python does not have
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: unreadable data after row {number}: {reason(error)}") from error


def _weight(array):
    """About the bytes an Arrow array takes as Python objects; `nbytes` counts repeats and empty lists as nothing."""
    from pyarrow import BaseExtensionType, compute, types

    kind, count, indices = array.type, len(array), None
    if isinstance(kind, BaseExtensionType):
        return _weight(array.storage)
    if types.is_struct(kind):
        return 200 * count + sum(map(_weight, array.flatten()))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return 64 * count + 8 * len(array.flatten()) + _weight(array.flatten())
    if types.is_dictionary(kind):
        array, indices, kind = array.dictionary, array.indices, kind.value_type
    if kind.num_fields or types.is_dictionary(kind) or any(name in str(kind) for name in ("view", "run_end")):
        raise ValueError(f"a column of type {kind} is not read: convert it to text, numbers or lists")
    if not any(name in str(kind) for name in ("string", "binary")):
        return 64 * count
    lengths = compute.binary_length(array)
    return 64 * count + (compute.sum(lengths if indices is None else lengths.take(indices)).as_py() or 0)


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}


def _from_datasets(name, split, folder):
    label = shown(name)
    try:
        import datasets  # takes a second, and most runs read plain files
        data = datasets.load_from_disk(name) if folder else datasets.load_dataset(name)
    except ImportError as error:
        raise UserError(f"{label} is no file or folder here, or one for the package `datasets`, which is missing "
                        f"({reason(error)}): pip install 'nanolmmr1[data]'") from error
    except Exception as error:  # an unreachable hub and a damaged folder raise whatever they trip over
        raise UserError(f"{label} is neither a file or folder here nor a readable data set: {reason(error)}") from error
    if not isinstance(data, dict) and split:
        raise UserError(f"{label}: this data set has no splits; leave out @{shown(split)}")
    data = _pick(data, split, label) if isinstance(data, dict) else data
    label += f"@{split}" if split else ""
    packed, data = sum(os.path.getsize(file["filename"]) for file in data.cache_files), data.with_format("arrow")
    # As Arrow tables the pictures come as they were stored: compressed bytes, not decoded images.
    rows = _numbered((batch for table in data.iter(1024) for batch in table.to_batches()), label, packed)
    return ((record, f"{label}:{number}", folder) for number, record in rows)


def _row(record, place, folder, columns):
    if not isinstance(record, dict):
        raise UserError(f"{place}: an object with named columns is needed, got {brief(record)}")
    found = {ours: next((n for n in ([columns[ours]] if ours in columns else theirs) if n in record), None)
             for ours, theirs in COLUMNS.items()}
    value = {ours: record.get(name) for ours, name in found.items()}
    text = {}
    for ours in ("problem", "answer", "caption", "task"):
        text[ours] = _text(value[ours], ours, place)
        if ours in ("problem", "answer") and not text[ours].strip():
            raise UserError(f"{place}: no {ours}; the row's columns are {shown(', '.join(map(str, record)))}: fill it "
                            f"in, or name the right column with prompt.columns.{ours}=COLUMN")
    items = value["images"] if isinstance(value["images"], list) else [value["images"]]
    images = [_image(item, place, folder) for item in items if item is not None and item != ""]
    if (markers := text["problem"].count(MARKER)) != len(images):
        raise UserError(f"{place}: {markers} {MARKER} markers in the problem, but {len(images)} images; "
                        f"write one {MARKER} for each image where it belongs in the text")
    own = str(value["id"]) if isinstance(value["id"], (str, int)) else ""
    if len(own) > MAX_ID:
        own = f"{own[:MAX_ID - 20]}...{hashlib.sha256(own.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
    extra = {str(name): v for name, v in record.items() if name not in found.values() and _is_jsonable(v)}
    return Row(images=images, id=shown(own) or os.path.basename(place), extra=extra, **text)


def _text(value, column, place):
    if value is None:
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = "" if isinstance(value, float) and math.isnan(value) else str(value)
    if not isinstance(value, str):
        raise UserError(f"{place}: {column} must be text or a number, got {brief(value)}")
    if len(value) > MAX_TEXT:
        raise UserError(f"{place}: {column} has {len(value):,} characters, more than {MAX_TEXT:,}; cut it down")
    if re.search("[\ud800-\udfff]", value):
        raise UserError(f"{place}: {column} holds half a surrogate pair, which is no text; repair its encoding")
    return value


def _image(item, place, folder):
    if isinstance(item, dict):
        item = item.get("bytes") or item.get("path")
    if isinstance(item, bytes):
        return item
    if not isinstance(item, str):
        raise UserError(f"{place}: an image must be a path or the bytes of an image file, got {brief(item)}")
    name, absolute = repr(item)[:200], os.path.isabs(item)
    path = "" if "\0" in item else os.path.realpath(os.path.join(folder or "", item))
    if not absolute and not (folder and Path(path).is_relative_to(os.path.realpath(folder))):
        raise UserError(f"{place}: image {name} leads out of {shown(folder or 'a hub data set, which has no folder')}; "
                        "move it there, or give its absolute path")
    if not os.path.isfile(path) or os.path.getsize(path) > MAX_RECORD:
        raise UserError(f"{place}: image {name} is missing, or no file of up to {MAX_RECORD:,} bytes; relative paths "
                        "start at the folder of the data file")
    return path


def _is_jsonable(value):
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # bytes, dates, decimals of parquet
        return False
    return True


def _check_images(rows, places):
    place_of = {}
    for row, place in zip(rows, places, strict=True):
        for item in row.images:
            place_of.setdefault(item, place)

    def check(item):
        try:
            open_image(item)
        except UserError as error:
            raise UserError(f"{place_of[item]}: {error}") from error
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(track(pool.map(check, place_of), "checking images", total := len(place_of), transient=True,
                   disable=total <= 200))


@contextlib.contextmanager
def _opened(item):
    """(picture, EXIF orientation) by the header alone; what decoding trips over in the block becomes a UserError."""
    name = f"image {shown(item)}" if isinstance(item, str) else f"image of {len(item)} bytes"
    try:
        with Image.open(item if isinstance(item, str) else io.BytesIO(item), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height}")
            yield image, image.getexif().get(0x0112) if "exif" in image.info else None  # Pillow itself turns TIFF
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{name} has more than {MAX_IMAGE_PIXELS:,} pixels ({reason(error)}); reduce it") from error
    except Exception as error:  # Pillow's plugins raise whatever they trip over in a damaged file
        raise UserError(f"{name} cannot be read ({reason(error)}); replace it with a whole file of "
                        f"{', '.join(IMAGE_FORMATS)}, or drop the row") from error
