"""Rows, pictures and their order: everything about data that needs neither model nor tokenizer.

A row is a problem, its gold answer and its pictures. All of it is read and checked before the first
step, pictures decoded once, so that a bad line stops the run within minutes and not after hours. What is
kept in memory is small: a picture that is a file stays a path, one that came as bytes stays compressed.

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
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.Image import Transpose
from rich.progress import track

from nanolmmr1.config import UserError

MARKER = "<image>"
MAX_IMAGE_PIXELS = 64_000_000
# Named, because some of Pillow's other plugins start programs (EPS runs Ghostscript) on what is untrusted data.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Our column -> the columns of the data it is looked for in, unless prompt.columns names one.
COLUMNS = {"problem": ("problem",), "answer": ("answer",), "images": ("images", "image"), "caption": ("caption",),
           "id": ("id", "qid"), "task": ("task",)}
# EXIF orientation -> what sets the picture upright; from 5 on it lies on its side.
UPRIGHT = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
           5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90}


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
            raise UserError(f"{one} holds no rows")
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
    could only ever be wrong. `where` is the phase's key, as in "phases.text".

    Raises:
        UserError: nothing is left.
    """
    captioned = [row for row in rows if row.caption or not captions]
    sizes = [processor.measure(row, captions) for row in _progress(captioned, "counting prompt tokens", len(captioned))]
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
    path = Path(name).expanduser()
    if path.is_file():
        if split:
            raise UserError(f"{source}: a single file has no splits; leave out @{split}")
        yield from _from_file(path)
    elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        yield from _from_datasets(str(path), split, path)
    elif path.is_dir():
        for file in _files(path, split):
            yield from _from_file(file)
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and path.suffix not in READERS:
        yield from _from_datasets(name, split, None)
    else:
        raise UserError(f"{name} does not exist: give a file ({', '.join(READERS)}), a folder, or a hub id owner/name")


def _files(folder, split):
    """The data files of one split of a folder: shards (train-00000-of-00002) belong together, splits never mix."""
    splits = {}
    for path in sorted([*folder.glob("*.*"), *folder.glob("data/*.*")]):
        if path.suffix in (".jsonl", ".parquet"):
            splits.setdefault(re.sub(r"-\d+(-of-\d+.*)?$", "", path.stem), []).append(path)
    if not splits:
        raise UserError(f"{folder} holds no .jsonl or .parquet file and no saved data set")
    return _pick(splits, split, folder)


def _pick(splits, split, label):
    if split and split not in splits:
        raise UserError(f"{label}: no split {split!r}; it has {', '.join(splits)}")
    if not split and len(splits) > 1:
        raise UserError(f"{label} has the splits {', '.join(splits)}: pick one, as in {label}@{next(iter(splits))}")
    return splits[split or next(iter(splits))]


def _from_file(path):
    if path.suffix not in READERS:
        raise UserError(f"{path}: a {path.suffix or 'nameless'} file is not read; use one of {', '.join(READERS)}")
    for number, record in READERS[path.suffix](path):
        if path.name == "metadata.jsonl" and isinstance(record, dict) and "file_name" in record:
            record.setdefault("image", record["file_name"])  # the image-folder convention
        yield record, f"{path}:{number}", path.parent


def _read_jsonl(path):
    with open(path, "rb") as file:
        yield from ((number, _parse(line, f"{path}:{number}")) for number, line in enumerate(file, 1) if line.strip())


def _read_json(path):
    text = path.read_bytes()
    return enumerate(_parse(text, path), 1) if text.lstrip().startswith(b"[") else _read_jsonl(path)


def _parse(text, place):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: unreadable JSON ({error}); write one object a line, or in .json a list") from error


def _read_parquet(path):
    import pyarrow.parquet

    try:
        yield from _numbered(pyarrow.parquet.ParquetFile(path).iter_batches(1024))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not readable parquet: {error}") from error


def _numbered(tables):
    return enumerate((record for table in tables for record in table.to_pylist()), 1)


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}


def _from_datasets(name, split, folder):
    import datasets  # takes a second, and most runs read plain files

    try:
        data = datasets.load_from_disk(name) if folder else datasets.load_dataset(name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{name} is neither a file or folder here nor a readable data set: {error}") from error
    if not isinstance(data, dict) and split:
        raise UserError(f"{name}: this data set has no splits; leave out @{split}")
    data = _pick(data, split, name) if isinstance(data, dict) else data
    # As Arrow tables the pictures come as they were stored: compressed bytes, not decoded images.
    for number, record in _numbered(data.with_format("arrow").iter(1024)):
        yield record, f"{name}@{split}:{number}" if split else f"{name}:{number}", folder


def _row(record, place, folder, columns):
    if not isinstance(record, dict):
        raise UserError(f"{place}: an object with named columns is needed, got {repr(record)[:80]}")
    found = {ours: next((n for n in ([columns[ours]] if ours in columns else theirs) if n in record), None)
             for ours, theirs in COLUMNS.items()}
    value = {ours: record.get(name) for ours, name in found.items()}
    text = {}
    for ours in ("problem", "answer", "caption", "task"):
        text[ours] = _text(value[ours], ours, place)
        if ours in ("problem", "answer") and not text[ours].strip():
            raise UserError(f"{place}: no {ours}; the row's columns are {', '.join(map(str, record))}: fill it in, or "
                            f"name the right column with prompt.columns.{ours}=COLUMN")
    items = value["images"] if isinstance(value["images"], list) else [value["images"]]
    images = [_image(item, place, folder) for item in items if item is not None and item != ""]
    if (markers := text["problem"].count(MARKER)) != len(images):
        raise UserError(f"{place}: {markers} {MARKER} markers in the problem, but {len(images)} images; "
                        f"write one {MARKER} for each image where it belongs in the text")
    own = value["id"] if isinstance(value["id"], (str, int)) else ""
    extra = {str(name): v for name, v in record.items() if name not in found.values() and _is_jsonable(v)}
    return Row(images=images, id=str(own) or os.path.basename(place), extra=extra, **text)


def _text(value, column, place):
    if value is None:
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = "" if isinstance(value, float) and math.isnan(value) else str(value)
    if not isinstance(value, str):
        raise UserError(f"{place}: {column} must be text or a number, got {repr(value)[:80]}")
    if re.search("[\ud800-\udfff]", value):
        raise UserError(f"{place}: {column} holds half a surrogate pair, which is no text; repair its encoding")
    return value


def _image(item, place, folder):
    if isinstance(item, dict):
        item = item.get("bytes") or item.get("path")
    if isinstance(item, bytes):
        return item
    if not isinstance(item, str):
        raise UserError(f"{place}: an image must be a path or the bytes of an image file, got {repr(item)[:80]}")
    name, absolute = repr(item)[:200], os.path.isabs(item)
    path = "" if "\0" in item else os.path.realpath(os.path.join(folder or "", item))
    if not absolute and not (folder and Path(path).is_relative_to(os.path.realpath(folder))):
        raise UserError(f"{place}: image {name} leads out of {folder or 'a hub data set, which has no folder'}; "
                        "move it there, or give its absolute path")
    if not os.path.isfile(path):
        raise UserError(f"{place}: image {name} is missing; relative paths start at the folder of the data file")
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
        list(_progress(pool.map(check, place_of), "checking images", len(place_of)))


def _progress(items, what, total):
    return track(items, what, total, transient=True, disable=total <= 200)


@contextlib.contextmanager
def _opened(item):
    """(picture, EXIF orientation) by the header alone; what decoding trips over in the block becomes a UserError."""
    name = f"image {item}" if isinstance(item, str) else f"image of {len(item)} bytes"
    try:
        with Image.open(item if isinstance(item, str) else io.BytesIO(item), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height}")
            yield image, image.getexif().get(0x0112) if "exif" in image.info else None  # Pillow itself turns TIFF
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{name} has more than {MAX_IMAGE_PIXELS:,} pixels ({error}); reduce it") from error
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error) as error:
        raise UserError(f"{name} cannot be read ({error}); replace it with a whole file of {', '.join(IMAGE_FORMATS)}, "
                        "or drop the row") from error
