"""Pictures: finding them in the values of a row, placing their markers, and opening them.

A picture is a path or the bytes of an image file. Data writes it in many ways: a path, bytes, `{"bytes", "path"}`,
`{"image_url": {"url"}}`, a data URI, base64, or a list of these. Pixels are decoded when they are needed.

Next: archives.py, where they are.
"""

import base64
import binascii
import contextlib
import functools
import io
import itertools
import os
import re
import urllib.parse
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.ExifTags import Base
from rich.progress import track

from nanolmmr1.data.archives import PictureFolder
from nanolmmr1.data.readers import MAX_RECORD, BadRow, parsed, reason, shown
from nanolmmr1.data.store import ImageItem, Row

MARKER = "<image>"
MAX_IMAGE_PIXELS = 64_000_000
MAX_ASPECT = 200  # as in Qwen2.5-VL's own smart_resize
SLICE = 4096  # rows whose pictures wait together to be checked
# An explicit list, because some other plugins of Pillow start programs (EPS runs Ghostscript).
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIX = re.compile(r"\.(bmp|gif|jpe?g|jfif|png|p[bgnp]m|tiff?|webp)$", re.I)
MAGIC = re.compile(rb"BM|GIF8|\xff\xd8\xff|\x89PNG|P[1-6]\s|II\*\0|MM\0\*|RIFF....WEBP", re.S)
# The keys of an object that stands for a picture; the first filled one counts.
KEYS = ("bytes", "path", "image", "image_url", "url", "image_path", "file_name", "filename", "source", "data", "base64",
        "image_bytes", "image_base64", "src")
NUMBERED = re.compile(r"<\|?(?:image|img)[ _-]?(\d{1,3})\|?>", re.I)
MARKERS = re.compile(r"<image>|<\|?image[ _-]?\d{1,3}\|?>", re.I)
# Other spellings of a marker. Only rows whose count of them is that of their pictures use them.
SPELLINGS = re.compile(r"(?:<\|vision_start\|>)?<\|image_pad\|>(?:<\|vision_end\|>)?|<\|image\|>|<img>|<image>", re.I)
warnings.filterwarnings("ignore", "Tag data larger|Corrupt EXIF|Metadata", module="PIL")  # one per image otherwise


def find(value: Any) -> list[Any]:
    """The pictures of a value, each as it is written there: see the docstring of this file. NaN and False are none."""
    return list(numbered(value).values())


def numbered(value: Any) -> dict[int, Any]:
    """`find`'s pictures by their places in a list, from 1: an empty place counts too."""
    return {number: item for number, item in enumerate(_places(value), 1) if item is not None}


def _places(value: Any, depth: int = 0) -> list[Any]:
    if isinstance(value, str) and value[:1] in ("[", "{"):
        value = value if (inner := parsed(value)) is None else inner
    if value is None or value is False or value != value or value in ("", b"", [], {}):
        return []
    if isinstance(value, list) and depth < 8:
        return [item for each in value for item in _places(each, depth + 1) or [None]]
    if isinstance(value, dict) and depth < 8:
        filled = [value[key] for key in KEYS if value.get(key)]
        return _places(filled[0], depth + 1) if filled else [value] if any(value.values()) else []
    return [value]


def is_picture(value: Any) -> bool:
    """Whether a value is plainly a picture, or a list of them: by the first bytes, or by the suffix of a path."""
    item = value if isinstance(value, str) and value[:1] not in ("[", "{") else (find(value) or [None])[0]
    if isinstance(item, bytes):
        return bool(MAGIC.match(item))
    if not isinstance(item, str):
        return False
    return bool(re.match("data:image/", item, re.I) or SUFFIX.search(item[-8:]) or _is_base64(item))


def is_here(value: Any, folder: PictureFolder) -> bool:
    """Whether `is_picture`, and a path leads to a file."""
    if not is_picture(value):
        return False
    try:
        item = locate(find(value)[0], folder, settle=False)
    except BadRow:
        return False
    return isinstance(item, str) or bool(MAGIC.match(item))


def locate(item: Any, folder: PictureFolder, settle: bool = True) -> ImageItem:
    """The absolute path or the bytes of a picture that `find` returned; `settle`: see PictureFolder.find.

    A relative path must not lead out of the folder as it is written. Links are followed: whoever owns the folder has
    put them there, and a data file cannot create one.

    Raises:
        BadRow: it is missing, too large, leads out, or is somewhere on the web.
    """
    if isinstance(item, bytes):
        return item
    if not isinstance(item, str):
        raise BadRow("no picture", f"an image must be a path or the bytes of an image file, got {brief(item)}")
    name = repr(item[:200])
    if re.match("data:", item[:5], re.I):
        head, _, body = item.partition(",")
        if not head.lower().endswith(";base64"):
            raise BadRow("no picture", f"image {name} is a data URI without base64; write data:image/png;base64,...")
        return _decoded(body, name)
    if item[:7].lower() == "file://":
        item = "/" + item[7:].removeprefix("localhost").lstrip("/")
        item = item if os.path.exists(item) else urllib.parse.unquote(item)
    elif web := re.match(r"[a-z][a-z0-9+.-]+://", item, re.I):
        raise BadRow("picture on the web", f"image {name}: pictures are not fetched from {web[0]}; download it and "
                     "give its path")
    base = folder.path
    path = "" if "\0" in item else os.path.normpath(os.path.join(base, item))
    inside = os.path.isabs(item) or bool(base) and Path(path).is_relative_to(base)
    if _is_base64(item) and not (inside and os.path.isfile(path)):
        return _decoded(item, name)
    if not inside:
        raise BadRow("picture leads out of its folder", f"image {name} leads out of "
                     f"{shown(base or 'a hub data set, which has no folder')}; move it there, give its absolute "
                     "path, or name the folder of the images with data.image_dir")
    if not os.path.isfile(path) and (found := folder.find(item, settle)) is not None:
        return found
    if not os.path.isfile(path) or os.path.getsize(path) > MAX_RECORD:
        raise BadRow("picture missing", f"image {name} is missing, or no file of up to {MAX_RECORD:,} bytes; relative "
                     "paths start at the folder of the data file, or at data.image_dir, and a .zip or .tar there is "
                     "read too")
    return path


def _is_base64(text: str) -> bool:
    """Whether a text starts like an image file in base64."""
    if len(text) < 64 or not re.fullmatch(r"[A-Za-z0-9+/_-]{32}", text[:32]):
        return False
    return bool(MAGIC.match(base64.urlsafe_b64decode(text[:32].replace("+", "-").replace("/", "_"))))


def _decoded(text: str, name: str) -> bytes:
    """The bytes of a base64 text, also of the URL alphabet, in lines or without padding."""
    if len(text) > MAX_RECORD // 3 * 4:
        raise BadRow("picture too large", f"image {name} has more than {MAX_RECORD:,} bytes")
    text = re.sub(r"\s|%0A", "", text).replace("-", "+").replace("_", "/").rstrip("=").replace("%3D", "")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRow("picture broken", f"image {name} is no base64 ({reason(error)}); encode the image file again") \
            from error


def place(text: str, pictures: dict[int, ImageItem]) -> tuple[str, list[ImageItem]]:
    """The text with one MARKER per picture, and the pictures in the order of their markers.

    A numbered marker stands for the picture of that number; a second mention becomes plain text, as in "image 1".
    Pictures without a marker stand first.

    Args:
        pictures: the number that data gives a picture, from 1 unless its columns are numbered from 0 -> the picture.

    Raises:
        BadRow: the markers of the text and the pictures do not fit.
    """
    count = len(pictures)
    if not count or text.count(MARKER) == count:
        return text, list(pictures.values())
    numbers = [int(number) for number in NUMBERED.findall(text)]
    if len(SPELLINGS.findall(text)) == count:
        return SPELLINGS.sub(MARKER, text), list(pictures.values())
    if markers := len(SPELLINGS.findall(text)):
        raise BadRow("markers and pictures differ", f"{markers} {MARKER} markers in the problem, but {count} images; "
                     f"write one {MARKER} for each image where it belongs in the text")
    if 0 in numbers and 0 not in pictures:
        pictures = {number - 1: item for number, item in pictures.items()}
    # Such as MATH-Vision's sheet of numbered panels: the picture stands at the first.
    if count == 1 and numbers and set(numbers).isdisjoint(pictures.keys() - {1}):
        pictures = dict.fromkeys(numbers[:1], next(iter(pictures.values())))
    elif absent := sorted(set(numbers) - set(pictures)):
        raise BadRow("markers and pictures differ", f"the problem names <image{absent[0]}>, and the row has {count} "
                     "images; add the picture, or remove the marker")
    order: list[int] = []

    def mark(match: re.Match[str]) -> str:
        number = int(match[1])
        if number in order or number not in pictures:
            return f"image {number}"
        order.append(number)
        return MARKER

    text = NUMBERED.sub(mark, text)
    first = [number for number in pictures if number not in order]
    return MARKER * len(first) + text, [pictures[number] for number in first + order]


def open_image(item: ImageItem) -> Image.Image:
    """Decode an image to RGB, turned upright by its EXIF orientation, transparency flattened on white.

    Raises:
        BadRow: missing, broken, of an unknown format, or larger than MAX_IMAGE_PIXELS by its header.
    """
    with _opened(item) as (image, orientation):
        if image.mode.startswith(("I", "F")):  # Pillow's own conversion clips them: all but the darkest become white
            image = _in_8_bits(image)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image.convert("RGBA"))
            image = white
        image = image.convert("RGB")
        image.info = {}  # exif_transpose rewrites an image's EXIF, which fails if another of its tags is damaged
        image.getexif()[Base.Orientation] = orientation
        ImageOps.exif_transpose(image, in_place=True)
        return image


def _in_8_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16-bit or 32-bit integers, or of floats.

    Its format does not say which value is white, so the brightest value decides: white is the least of 1 (floats
    alone), 255, 65535 and that value which is not below it. A picture of 65,536 levels whose brightest is below 256
    would be black in any case.
    """
    grey = np.asarray(image).astype(np.float32)
    if not np.isfinite(grey).all():
        grey = np.nan_to_num(grey, nan=0.0, posinf=0.0, neginf=0.0)
    top = float(grey.max(initial=0))
    scales = ((1, 255.0 if image.mode == "F" else 1.0), (255, 1.0), (65535, 1 / 256))
    grey *= next((scale for white, scale in scales if top <= white), 255 / top if top else 1.0)
    return Image.fromarray((grey + 1e-3).clip(0, 255).astype(np.uint8))  # float32 may round 255 to 254.99998


def image_size(item: ImageItem) -> tuple[int, int]:
    """(width, height) in pixels of `open_image`'s result, read from the file's header alone."""
    with _opened(item) as (image, orientation):
        return (image.height, image.width) if orientation in (5, 6, 7, 8) else (image.width, image.height)


def unusable(rows: Sequence[Row], indices: Sequence[int]) -> dict[int, BadRow]:
    """Decode the images of the rows at these indices; those with one that fails or is too thin for the model, with the
    reason."""
    @functools.lru_cache(100_000)  # rows may share a file
    def check_file(path: str) -> BadRow | None:
        return _fault(path)

    def check(index: int) -> BadRow | None:
        return next(filter(None, (check_file(item) if isinstance(item, str) else _fault(item)
                                  for item in rows[index].images)), None)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        slices = (indices[start:start + SLICE] for start in range(0, len(indices), SLICE))
        checks = track(itertools.chain.from_iterable(pool.map(check, each) for each in slices), "checking images",
                       len(indices), transient=True, disable=len(indices) <= 200)
        return {index: error for index, error in zip(indices, checks, strict=True) if error}


def _fault(item: ImageItem) -> BadRow | None:
    try:
        open_checked(item)
    except BadRow as error:
        return error
    return None


def open_checked(item: ImageItem) -> Image.Image:
    """`open_image`, of an image that the model can take.

    Raises:
        BadRow: see there, or too thin.
    """
    image = open_image(item)
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise BadRow("picture too thin", f"an image of {image.width} x {image.height} pixels is too thin: crop it "
                     f"until one side is at most {MAX_ASPECT} times the other")
    return image


@contextlib.contextmanager
def _opened(item: ImageItem) -> Iterator[tuple[Image.Image, Any]]:
    """An image and its EXIF orientation, from the header alone; errors of decoding it in the block become BadRow."""
    name = f"image {shown(item)}" if isinstance(item, str) else f"image of {len(item)} bytes"
    try:
        with Image.open(item if isinstance(item, str) else io.BytesIO(item), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height}")
            # A TIFF has no "exif": Pillow turns it while decoding.
            yield image, image.getexif().get(Base.Orientation, 1) if "exif" in image.info else 1
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRow("picture too large", f"{name} has more than {MAX_IMAGE_PIXELS:,} pixels ({reason(error)}); "
                     "reduce it") from error
    except Exception as error:  # Pillow's plugins raise any type on a damaged file
        raise BadRow("picture broken", f"{name} cannot be read ({reason(error)}); replace it with a whole file of "
                     f"{', '.join(IMAGE_FORMATS)}, or drop the row") from error
