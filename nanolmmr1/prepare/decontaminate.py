r"""Training rows that repeat a row of a benchmark: found by their words, their answer and their pictures.

Words: text is compared as sequences of 13 words, as usual for language models. The share of the benchmark row's
sequences counts, so a training row that holds a whole benchmark question and more is found. Case, punctuation, LaTeX's
layout, markers of pictures, drawing code and listed options do not count, nor do signs: 2 + 3 and 2 - 3 are the same
words. A text of fewer than 13 words is one sequence: only a row with the same text has it. A sequence of more than
MAX_SHARED benchmark rows, as in "Round to the nearest tenth if necessary", tells nothing.

Answers: compared by the rules of the accuracy reward, without its worker processes. So a formula equals another only if
both are written alike.

Pictures: grey, cropped to what is drawn, so that borders do not count. Two are the same picture if four measures agree:
dHash within MAX_BITS, thumbnails within MAX_RMS and above MIN_CORRELATION, and the shape of the crop. Puzzles reuse
their drawings, so a picture alone drops no row.

Measured on MATH-Vision: of its 3,040 rows, 148 are in the AIME and MATH parts of DeepScaleR; of the training rows that
hold them, the 22 with the least overlap are all real. Of 300 pictures saved as JPEG of quality 50, halved, bordered by
15 %, and all three, 99.7, 97.3, 98.7 and 97.3 % are found. dHash <= 8 and RMS <= 0.05 alone find 99.3, 95.0, 98.0 and
95.0 %. Among all 3,040 pictures, both match 78 pairs. Ours match 49 more, most of them one drawing made twice; those
two alone match 26 more, all but 3 of them different drawings.

Next: output.py, rows and pictures on disk.
"""

import hashlib
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from operator import length_hint
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.progress import track

from nanolmmr1.benchmarks.choose import identity
from nanolmmr1.data.images import MARKERS, open_image
from nanolmmr1.data.rows import Row
from nanolmmr1.reward.choice import gold_letters, listed_options, option_values
from nanolmmr1.reward.extract import gold_answer
from nanolmmr1.reward.rules import decide

WORDS = 13  # of a sequence
MIN_OVERLAP = 0.5  # of a benchmark row's sequences
MAX_SHARED = 20  # benchmark rows with the same sequence; MathVerse asks a question 6 times, DynaMath 10 times
MAX_CHARS = 1 << 20  # of a problem; what follows is not read
OPTION_CHARS = 4000  # at the end of a problem; they are searched for options, which takes quadratic time
CROP_SIDE = 384  # pixels of the copy that is searched for the crop; with 128, a fifth is not found
INK = 200  # of 255; darker pixels of that copy are drawn, those of JPEG's ringing are brighter
MAX_BITS, MAX_RMS, MIN_CORRELATION = 10, 0.07, 0.85  # RMS in units of white - black
MAX_STRETCH = 0.1  # natural logarithm of a ratio of aspects
MIN_CONTRAST = 0.01  # standard deviation of a thumbnail; MATH-Vision has 0.011 and more, a blank scan less

_DRAWING = re.compile(r"\[asy\].*?(?:\[/asy\]|\Z)", re.DOTALL)
_PICTURE = re.compile(rf"{MARKERS.pattern}|\bimage \d{{1,3}}\b", re.IGNORECASE)
_OPTION = re.compile(r"(?<![\w)])\(([A-J])\)|(?<!\S)([A-J])[).:]")
_THOUSANDS = re.compile(r"(?<=\d)(?:,\\!|\{,\}|,)(?=\d{3}(?!\d))")
_SHORT_FRACTION = re.compile(r"\\[dtc]?frac\s*(\d)\s*(\d)")
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[a-z]*\*?\}|\\([a-z]+)")
_CJK = r"\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"\d{{1,64}}|[{_CJK}]|[^\W\d_{_CJK}]{{1,64}}")
_GREEK = {chr(code): unicodedata.name(chr(code)).split()[-1].lower() for code in range(0x3B1, 0x3CA)}
_SIGNS = _GREEK | {"∠": "angle", "△": "triangle", "°": "degrees", "√": "sqrt"}
_TABLE = str.maketrans({sign: f" {word} " for sign, word in _SIGNS.items()})
_NAMES = {word: word for word in _SIGNS.values()} | {"circ": "degrees", "degree": "degrees"}  # commands that are words

Bytes = npt.NDArray[np.uint8]


class Fingerprint(NamedTuple):
    """A picture's content, about 1 kB."""

    hash: int  # dHash, 64 bits: whether each of 8 x 8 cells is darker than the cell to its right
    thumbnail: Bytes  # (32, 32), grey
    aspect: float  # natural logarithm of width / height


class Hit(NamedTuple):
    """A row of a benchmark that a training row may repeat."""

    benchmark: str
    id: str
    overlap: float  # share of the benchmark row's sequences of words that the training row has
    same_answer: bool
    picture: bool  # whether a picture of both is the same one
    key: str  # of the benchmark's row, whatever its id is; see choose.identity

    @property
    def contaminated(self) -> bool:
        """Whether to drop the training row. Other hits are worth a look."""
        is_text = self.overlap >= MIN_OVERLAP
        return (is_text and self.same_answer) or (self.picture and (is_text or self.same_answer))


class _Answer(NamedTuple):
    """A gold answer, normalised: option letters or their text, or a value; "" for what is unknown."""

    letters: str
    value: str


class _Known(NamedTuple):
    """A row of a benchmark, without its text and pictures."""

    benchmark: str
    id: str
    key: str  # see choose.identity
    answer: _Answer
    options: int  # a hash of their texts; 0 if there are none
    short: bool  # whether the whole text is one sequence
    pictured: bool


class Contamination:
    """An index of benchmark rows: about 1.5 kB a row and 1 kB a picture."""

    known: list[_Known]
    sequences: npt.NDArray[np.uint64]  # (S,), sorted hashes
    owners: npt.NDArray[np.int32]  # (S,), the row of each
    counts: npt.NDArray[np.int64]  # (rows,), telling sequences
    hashes: npt.NDArray[np.uint64]  # (P,), as the next three, of all pictures
    thumbnails: Bytes  # (P, 32, 32)
    aspects: npt.NDArray[np.float64]  # (P,)
    pictured: npt.NDArray[np.int32]  # (P,), the row of each

    def __init__(self) -> None:
        self.known = []
        self.sequences, self.owners, self.counts = np.zeros(0, np.uint64), np.zeros(0, np.int32), np.zeros(0, np.int64)
        self.hashes, self.thumbnails = np.zeros(0, np.uint64), np.zeros((0, 32, 32), np.uint8)
        self.aspects, self.pictured = np.zeros(0), np.zeros(0, np.int32)

    def add(self, benchmark: str, rows: Iterable[Row]) -> None:
        """Index the rows of a benchmark. Each row is read once and not kept.

        Raises:
            BadRow: a picture cannot be read.
        """
        sequences, owners, pictures, pictured = [self.sequences], [self.owners], list[Fingerprint](), list[int]()
        for row in track(rows, f"reading {benchmark}", transient=True, disable=length_hint(rows) <= 200):
            number, words = len(self.known), _words(row)
            self.known.append(_Known(benchmark, row.id, identity(row), _answer(row), _options(row), len(words) < WORDS,
                                     bool(row.images)))  # fmt: skip
            sequences.append(_sequences(words))
            owners.append(np.full(len(sequences[-1]), number, np.int32))
            pictures += [fingerprint(open_image(item)) for item in row.images]
            pictured += [number] * len(row.images)
        self._sort(np.concatenate(sequences), np.concatenate(owners))
        if pictures:
            hashes, thumbnails, aspects = zip(*pictures, strict=True)
            self.hashes = np.append(self.hashes, np.array(hashes, np.uint64))
            self.thumbnails = np.concatenate([self.thumbnails, thumbnails])
            self.aspects = np.append(self.aspects, aspects)
            self.pictured = np.append(self.pictured, np.array(pictured, np.int32))

    def _sort(self, sequences: npt.NDArray[np.uint64], owners: npt.NDArray[np.int32]) -> None:
        order = np.argsort(sequences, kind="stable")
        self.sequences, self.owners = sequences[order], owners[order]
        _, inverse, shared = np.unique(self.sequences, return_inverse=True, return_counts=True)
        self.counts = np.bincount(self.owners[shared[inverse] <= MAX_SHARED], minlength=len(self.known))

    def find(self, row: Row, pictures: Sequence[Fingerprint]) -> list[Hit]:
        """The benchmark rows that a training row repeats, or else the one that it looks like most.

        Contaminating ones come first, then those of most overlap, then those with the same picture. A row of less than
        MIN_OVERLAP is found by its picture only.

        Args:
            pictures: of the row's images.
        """
        overlaps = self._overlaps(_sequences(_words(row)))
        same = {number for picture in pictures for number in self._rows_with(picture)}
        likely = sorted(same.union(number for number, overlap in overlaps.items() if overlap >= MIN_OVERLAP))
        answer, options = (_answer(row), _options(row)) if likely else (_Answer("", ""), 0)
        hits = []
        for number in likely:
            known, picture, overlap = self.known[number], number in same, overlaps.get(number, 0.0)
            same_answer = _same_answer(answer, known.answer)
            # "Find x." is a question to many pictures.
            alike = picture or (same_answer and not (row.images or known.pictured))
            if known.short and not (alike and (not known.options or options in (0, known.options))):
                overlap = 0.0
            if overlap >= MIN_OVERLAP or picture:
                hits.append(Hit(known.benchmark, known.id, overlap, same_answer, picture, known.key))
        hits.sort(key=lambda hit: (hit.contaminated, hit.overlap, hit.picture), reverse=True)
        return [hit for hit in hits if hit.contaminated] or hits[:1]

    def _overlaps(self, sequences: npt.NDArray[np.uint64]) -> dict[int, float]:
        """Benchmark row -> share of its telling sequences that are among these."""
        start, end = (np.searchsorted(self.sequences, sequences, side) for side in ("left", "right"))
        telling = (start < end) & (end - start <= MAX_SHARED)
        owners = [self.owners[a:b] for a, b in zip(start[telling], end[telling], strict=True)]
        if not owners:
            return {}
        rows, held = np.unique(np.concatenate(owners), return_counts=True)
        return dict(zip(rows.tolist(), (held / self.counts[rows]).tolist(), strict=True))

    def _rows_with(self, picture: Fingerprint) -> list[int]:
        """Benchmark rows with this picture."""
        near = np.flatnonzero((np.bitwise_count(self.hashes ^ np.uint64(picture.hash)) <= MAX_BITS)
                              & (np.abs(self.aspects - picture.aspect) <= MAX_STRETCH))  # fmt: skip
        rms, correlation = compare(self.thumbnails[near], picture.thumbnail)
        return self.pictured[near[(rms <= MAX_RMS) & (correlation >= MIN_CORRELATION)]].tolist()


def fingerprint(image: Image.Image) -> Fingerprint:
    """The fingerprint of an RGB picture. A picture without a bright border is not cropped."""
    grey = image.convert("L")
    scale = max(1.0, max(grey.size) / CROP_SIDE)
    width, height = (max(round(side / scale), 1) for side in grey.size)
    ink = np.asarray(grey.resize((width, height), Image.Resampling.BOX)) < INK
    columns, rows = np.flatnonzero(ink.any(0)), np.flatnonzero(ink.any(1))
    box = (0.0, 0.0, float(grey.width), float(grey.height))
    if len(columns):
        left, right, top, bottom = (int(edge) for edge in (columns[0], columns[-1] + 1, rows[0], rows[-1] + 1))
        x, y = grey.width / width, grey.height / height
        box = (left * x, top * y, right * x, bottom * y)
    cells = np.asarray(grey.resize((9, 8), Image.Resampling.BOX, box))
    bits = np.packbits(cells[:, :-1] < cells[:, 1:]).tobytes()
    thumbnail = np.asarray(grey.resize((32, 32), Image.Resampling.BOX, box))
    return Fingerprint(int.from_bytes(bits, "big"), thumbnail, math.log((box[2] - box[0]) / (box[3] - box[1])))


def compare(thumbnails: Bytes, thumbnail: Bytes) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Compare (P, 32, 32) thumbnails with one: RMS differences in units of white - black, and correlations, (P,) each.

    On thin drawings all RMS are small, and correlations tell them apart; pictures without contrast have none.
    """
    a, b = (each.reshape(-1, 1024).astype(np.float32) / 255 for each in (thumbnails, thumbnail))
    rms = np.sqrt(np.square(a - b).mean(1))
    a, b = a - a.mean(1, keepdims=True), b - b.mean()
    contrast = np.maximum(a.std(1) * b.std(), MIN_CONTRAST**2)
    return rms, (a * b).mean(1) / contrast


def _words(row: Row) -> list[str]:
    """The words of a problem without its options. A number, and a Chinese or Japanese character, is a word.

    Where little is left and the answer is no letter, A: and B: name plans or machines, and stay.
    """
    text = unicodedata.normalize("NFKC", _DRAWING.sub(" ", row.problem[:MAX_CHARS]))
    words = _split(_without_options(text))
    return words if len(words) >= WORDS or gold_letters(gold_answer(row.answer)) or row.options else _split(text)


def _options(row: Row) -> int:
    """A hash of the texts of a row's options, whatever their order; 0 if there are none."""
    texts = sorted(option_values(row.options or listed_options(row.problem[-OPTION_CHARS:])).values())
    return int.from_bytes(hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest(), "big") if texts else 0


def _split(text: str) -> list[str]:
    text = _PICTURE.sub(" ", text).casefold().translate(_TABLE)
    text = _SHORT_FRACTION.sub(r" \1 \2 ", _THOUSANDS.sub("", text))
    return _WORD.findall(_COMMAND.sub(lambda match: f" {_NAMES.get(match[1], '')} ", text))


def _without_options(text: str) -> str:
    """The text without its list of options: from (A) before (B) to the end of the last one's line."""
    marks = list(_OPTION.finditer(text))
    letters = "".join(mark[1] or mark[2] for mark in marks)
    if not (run := re.search("ABC?D?E?F?G?H?I?J?", letters)):
        return text
    end = text.find("\n", marks[run.end() - 1].end())
    return text[: marks[run.start()].start()] + (text[end:] if end >= 0 else "")


def _sequences(words: list[str]) -> npt.NDArray[np.uint64]:
    """Hashes of the different sequences, equal in every process; of a shorter text, the hash of all its words."""
    texts = {" ".join(words[i : i + WORDS]) for i in range(max(len(words) - WORDS + 1, 1))} - {""}
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.sort(np.frombuffer(digests, "<u8").astype(np.uint64))


def _answer(row: Row) -> _Answer:
    """The gold answer of a row: of an option the text too, of a value the option that has it."""
    gold = gold_answer(row.answer)
    values = option_values(row.options or listed_options(row.problem[-OPTION_CHARS:]))
    if read := gold_letters(gold):
        letters, text = read
        return _Answer(letters, text or values.get(letters, ""))
    same = [letter for letter, value in values.items() if _same_answer(_Answer("", value), _Answer("", gold))]
    return _Answer(same[0] if len(same) == 1 else "", gold)


def _same_answer(one: _Answer, other: _Answer) -> bool:
    """Whether values are equal; where one is unknown, or rules cannot tell, whether letters are."""
    if one.value and other.value and (verdict := decide(one.value, other.value)):
        return bool(verdict.score)
    return bool(one.letters) and one.letters == other.letters
