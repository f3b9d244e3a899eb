"""Data rows: checking, selecting and ordering them, and opening their images; neither model nor tokenizer is needed.

A row is a problem, its gold answer and its images. All rows are read and checked before the first step, and every
image is decoded once, so a bad line stops the run within minutes. Rows stay small in memory: an image file is stored
as its path, image bytes stay compressed.

Next: readers.py, files, folders and hub data sets.
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
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as brief
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps
from PIL.ExifTags import Base
from rich.progress import track

from nanolmmr1.data.readers import MAX_RECORD, raw_rows, reason, shown
from nanolmmr1.errors import UserError

MARKER = "<image>"
MAX_IMAGE_PIXELS = 64_000_000
MAX_TEXT = 16 << 20  # characters of a problem, answer, caption or task
MAX_ID = 200  # characters of an id, which appears in logs and messages
# An explicit list, because some other plugins of Pillow start programs (EPS runs Ghostscript).
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Our column -> the columns of the data that are tried, unless prompt.columns names one.
COLUMNS = {"problem": ("problem",), "answer": ("answer",), "images": ("images", "image"), "caption": ("caption",),
           "id": ("id", "qid"), "task": ("task",)}
warnings.filterwarnings("ignore", "Tag data larger|Corrupt EXIF|Metadata", module="PIL")  # one per image otherwise

ImageItem = str | bytes  # an absolute path, or the bytes of an image file
Size = tuple[int, int]  # tokens and image patches of a prompt


@dataclass
class Row:
    """One problem with its gold answer."""

    problem: str  # with one MARKER per image
    answer: str
    images: list[ImageItem] = field(default_factory=list)
    caption: str = ""
    id: str = ""
    task: str = ""
    extra: dict[str, Any] = field(default_factory=dict)  # the data's other columns that are JSON

    def public(self) -> dict[str, Any]:
        """The row for reward functions, JSON-able: all columns, images by path or size."""
        images = [item if isinstance(item, str) else f"<{len(item)} bytes>" for item in self.images]
        return self.extra | dict(problem=self.problem, answer=self.answer, images=images, caption=self.caption,
                                 id=self.id, task=self.task)


class Measures(Protocol):
    """The part of prompt.Processor that `select_rows` calls."""

    def at_least(self, row: Row, captions: bool) -> int: ...
    def measure(self, row: Row, captions: bool) -> Size: ...


class ChecksGold(Protocol):
    """The part of reward.judge.Judge that `select_rows` calls."""

    def gold_problems(self, rows: list[dict[str, Any]]) -> list[str]: ...


def load_rows(source: str | list[str], columns: dict[str, str] | None = None) -> list[Row]:
    """Read and check all rows of one or several sources.

    Args:
        source: a .jsonl, .json or .parquet file, a hub id, or a folder. A folder holds such files, an image folder's
            `metadata.jsonl`, or the files of `datasets.save_to_disk`. `@split` after a folder or hub id picks a split.
        columns: our column names -> those of the data.

    Raises:
        UserError: names file and line (row number in parquet and data sets), the problem and the cure.
    """
    columns = columns or {}
    if not all(ours in COLUMNS and isinstance(theirs, str) for ours, theirs in columns.items()):
        raise UserError(f"prompt.columns={columns}: give each of {', '.join(COLUMNS)} the name of a column of the data")
    rows: list[Row] = []
    places: dict[ImageItem, str] = {}  # where each image is first used
    for name in [source] if isinstance(source, str) else source:
        before = len(rows)
        for record, place, folder in raw_rows(name):
            rows.append(_row(record, place, folder, columns))
            for item in rows[-1].images:
                places.setdefault(item, place)
        if len(rows) == before:
            raise UserError(f"{shown(name)} holds no rows")
    _check_images(places)
    return rows


def open_image(item: ImageItem) -> Image.Image:
    """Decode an image to RGB, turned upright by its EXIF orientation, transparency flattened on white.

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
        image.info = {}  # exif_transpose rewrites an image's EXIF, which fails if another of its tags is damaged
        image.getexif()[Base.Orientation] = orientation
        ImageOps.exif_transpose(image, in_place=True)
        return image


def image_size(item: ImageItem) -> tuple[int, int]:
    """(width, height) in pixels of `open_image`'s result, read from the file's header alone."""
    with _opened(item) as (image, orientation):
        return (image.height, image.width) if orientation in (5, 6, 7, 8) else (image.width, image.height)


class PromptSampler:
    """The order in which rows are visited: a pure function of seed, phase name and cursor.

    It has no state, so a run resumes from the cursor alone, the number of rows taken so far.
    """

    def __init__(self, num_rows: int, seed: int, phase_name: str) -> None:
        assert num_rows > 0, "a sampler needs rows"
        self.num_rows, self.seed, self.phase_name = num_rows, seed, phase_name

    def take(self, cursor: int, count: int) -> list[int]:
        """The row indices at cursor .. cursor + count - 1. Every epoch is another permutation."""
        indices: list[int] = []
        while len(indices) < count:
            epoch, start = divmod(cursor + len(indices), self.num_rows)
            indices += self._permutation(epoch)[start:start + count - len(indices)]
        return indices

    def _permutation(self, epoch: int) -> list[int]:
        digest = hashlib.sha256(f"{self.seed}/{epoch}/{self.phase_name}".encode()).digest()
        bits = np.random.Philox(key=int.from_bytes(digest[:16]))
        # Sorting raw bits: NumPy guarantees their stream across versions, but not that of Generator.permutation.
        return np.argsort(bits.random_raw(self.num_rows), kind="stable").tolist()


def select_rows(rows: list[Row], processor: Measures, captions: bool, max_prompt_tokens: int, judge: ChecksGold,
                where: str) -> tuple[list[tuple[Row, Size]], dict[str, int]]:
    """Select the rows that a phase can train on.

    Dropped are rows without a caption where captions are shown, prompts above max_prompt_tokens (image tokens
    included), and rows whose gold answer no response can equal: none could earn their reward.

    Args:
        where: the phase's key, as in "phases.text".

    Returns:
        Selected rows with their sizes, and how many rows were dropped by reason.

    Raises:
        UserError: no row is left.
    """
    def measure(row: Row) -> Size:
        # Tokenising takes 200 bytes per character, so a text that must be too long is not tokenised.
        long = len(row.problem) + len(row.caption) * captions > max_prompt_tokens  # a token has a character or more
        least = processor.at_least(row, captions) if long else 0
        return (least, 0) if least > max_prompt_tokens else processor.measure(row, captions)

    captioned = [row for row in rows if row.caption or not captions]
    progress = track(captioned, "counting prompt tokens", transient=True, disable=len(rows) <= 200)
    measured = [(row, measure(row)) for row in progress]
    short = [(row, size) for row, size in measured if size[0] <= max_prompt_tokens]
    problems = judge.gold_problems([row.public() for row, _ in short])
    selected = [each for each, problem in zip(short, problems, strict=True) if not problem]
    dropped = {"no caption": len(rows) - len(captioned), "prompt too long": len(captioned) - len(short),
               **Counter(filter(None, problems))}
    dropped = {reason: count for reason, count in dropped.items() if count}
    if not selected:
        tokens = [size[0] for _, size in measured]
        lengths = f"{min(tokens)} / {statistics.median(tokens):.0f} / {max(tokens)}" if tokens else "none counted"
        raise UserError(f"{where}: no row is left of {len(rows)}, dropped {dropped}; prompt tokens min / median / max: "
                        f"{lengths}. For long prompts raise {where}.max_prompt_tokens={max_prompt_tokens} or lower "
                        "prompt.max_pixels; for captions and gold answers look at prompt.columns")
    return selected, dropped


def _row(record: Any, place: str, folder: Path | None, columns: dict[str, str]) -> Row:
    """A raw row, checked."""
    if not isinstance(record, dict):
        raise UserError(f"{place}: an object with named columns is needed, got {brief(record)}")
    names = {ours: next((name for name in ([columns[ours]] if ours in columns else theirs) if name in record), None)
             for ours, theirs in COLUMNS.items()}
    value = {ours: record.get(name) for ours, name in names.items()}
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
    row_id = str(value["id"]) if isinstance(value["id"], (str, int)) else ""
    if len(row_id) > MAX_ID:
        digest = hashlib.sha256(row_id.encode("utf-8", "surrogatepass")).hexdigest()
        row_id = f"{row_id[:MAX_ID - 20]}...{digest[:16]}"
    extra = {str(name): v for name, v in record.items() if name not in names.values() and _is_jsonable(v)}
    return Row(images=images, id=shown(row_id) or os.path.basename(place), extra=extra, **text)


def _text(value: Any, column: str, place: str) -> str:
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


def _image(item: Any, place: str, folder: Path | None) -> ImageItem:
    """The absolute path or bytes of an image; a relative path must not leave the folder."""
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


def _is_jsonable(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # such as bytes, dates or decimals of parquet
        return False
    return True


def _check_images(places: dict[ImageItem, str]) -> None:
    """Decode every image once; `places` says where each is used."""
    def check(item: ImageItem) -> None:
        try:
            open_image(item)
        except UserError as error:
            raise UserError(f"{places[item]}: {error}") from error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(track(pool.map(check, places), "checking images", total := len(places), transient=True,
                   disable=total <= 200))


@contextlib.contextmanager
def _opened(item: ImageItem) -> Iterator[tuple[Image.Image, Any]]:
    """An image and its EXIF orientation, from the header alone; errors of decoding it in the block become UserError."""
    name = f"image {shown(item)}" if isinstance(item, str) else f"image of {len(item)} bytes"
    try:
        with Image.open(item if isinstance(item, str) else io.BytesIO(item), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height}")
            # A TIFF has no "exif": Pillow turns it while decoding.
            yield image, image.getexif().get(Base.Orientation, 1) if "exif" in image.info else 1
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{name} has more than {MAX_IMAGE_PIXELS:,} pixels ({reason(error)}); reduce it") from error
    except Exception as error:  # Pillow's plugins raise any type on a damaged file
        raise UserError(f"{name} cannot be read ({reason(error)}); replace it with a whole file of "
                        f"{', '.join(IMAGE_FORMATS)}, or drop the row") from error
