"""Data rows: reading, checking, selecting and ordering them; neither model nor tokenizer is needed.

A row is a problem, its gold answer and its images. All rows are read and checked before the first step, and every
image is decoded once, so a run cannot meet a bad row later. Bad rows are dropped and counted, or stop the run.

Next: store.py, rows on disk.
"""

import hashlib
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from reprlib import repr as brief
from typing import Any, NamedTuple, Protocol

import numpy as np
from rich.progress import track

from nanolmmr1.data import images, schemas
from nanolmmr1.data.archives import PictureFolder
from nanolmmr1.data.columns import COLUMNS, FROM_1, INDEXED, Fields, get, shown_options
from nanolmmr1.data.images import MARKER
from nanolmmr1.data.images import image_size as image_size
from nanolmmr1.data.images import open_image as open_image
from nanolmmr1.data.readers import BadRow, raw_rows, reason, shown
from nanolmmr1.data.store import Row, Rows
from nanolmmr1.errors import UserError

MAX_BAD = 10_000  # a source whose first rows are all bad is not read further
MAX_NAMES = 1000  # of columns, for messages
FIRST = 5  # bad rows that are shown
LIKE_IMAGES = re.compile(r"image|img|picture|photo|figure|diagram|screenshot", re.I)  # names of columns

Size = tuple[int, int]  # tokens and image patches of a prompt


class Loaded(NamedTuple):
    """The rows of one or several sources."""

    rows: Rows
    dropped: dict[str, int]  # bad rows by reason
    notes: list[str]  # lines for the user: how the rows were read, how many have pictures, which are bad


class NoColumn(UserError):
    """`prompt.columns` names a column that no row of a source has."""

    def __init__(self, ours: str, message: str) -> None:
        super().__init__(message)
        self.ours = ours


class Measures(Protocol):
    """The part of prompt.Processor that `select_rows` calls."""

    def at_least(self, row: Row, captions: bool) -> int: ...
    def measure(self, row: Row, captions: bool) -> Size: ...


class ChecksGold(Protocol):
    """The part of reward.judge.Judge that `select_rows` calls."""

    def gold_problems(self, rows: list[dict[str, Any]]) -> list[str]: ...


def load_rows(source: str | list[str], columns: dict[str, str] | None = None, on_bad_row: str = "skip",
              image_dir: str = "", rows: Rows | None = None, schema: str = "", decode: bool = True) -> Loaded:
    """Read and check all rows of one or several sources.

    Args:
        source: a .jsonl, .json, .csv or .parquet file, a hub id, or a folder. A folder holds such files, an image
            folder's `metadata.jsonl`, files of one row each in folders below, or the files of
            `datasets.save_to_disk`. `@split` after a folder or hub id picks a split, `:config` before it a
            configuration of the hub.
        columns: our column names -> those of the data; a dot leads into an object, as in reward_model.ground_truth.
        on_bad_row: "skip" drops and counts bad rows, "stop" refuses them.
        image_dir: where relative paths of images start; empty: at the folder of the data file.
        rows: written to; None: a new temporary file.
        schema: of all rows, see schemas.py; empty: of each row by its columns.
        decode: decode every image; otherwise a broken one is met later.

    Raises:
        UserError: a source cannot be read or has no good row. NoColumn: see there. Each names the cure.
    """
    columns = columns or {}
    if not all(ours in COLUMNS and isinstance(theirs, str) for ours, theirs in columns.items()):
        raise UserError(f"prompt.columns={columns}: give each of {', '.join(COLUMNS)} the name of a column of the data")
    if image_dir and not os.path.isdir(os.path.expanduser(image_dir)):
        raise UserError(f"data.image_dir={shown(image_dir)}: there is no such folder")
    folder = Path(os.path.expanduser(image_dir)) if image_dir else None
    rows = Rows.temporary() if rows is None else rows
    loaded, dropped, first = Loaded(rows.subset([]), {}, []), Counter[str](), list[str]()
    for name in [source] if isinstance(source, str) else source:
        reader = _Source(shown(name), columns, rows.subset([]), schemas.named(schema) if schema else ())
        for record, place, beside in raw_rows(name):
            reader.add(record, place, folder or beside)
        reader.finish(decode)
        loaded.rows.extend(reader.rows)
        loaded.notes.extend(reader.notes())
        dropped += reader.bad
        first += reader.first
    if dropped and on_bad_row == "stop":
        raise UserError(f"{_counts(dropped)}; with data.on_bad_row=skip they are dropped. The first: "
                        + " | ".join(first[:FIRST]))
    return loaded._replace(dropped=dict(dropped))


def _counts(numbers: dict[str, int]) -> str:
    return f"{sum(numbers.values()):,} bad rows (" + ", ".join(f"{n:,} {kind}" for kind, n in numbers.items()) + ")"


class _Source:
    """Reads the records of one source into rows, and notes how."""

    def __init__(self, name: str, columns: dict[str, str], rows: Rows, entries: Sequence[schemas.Schema]) -> None:
        self.name, self.columns, self.rows, self.entries = name, columns, rows, entries
        self.schemas = Counter[str]()  # good rows by the name of their schema
        self.folders: dict[Path | None, PictureFolder] = {}
        self.places: list[str] = []  # of the rows, as "file:line"
        self.bad = Counter[str]()  # rows by reason
        self.first: list[str] = []  # messages of the first bad rows
        self.absent = set(columns)  # our columns whose named column no row has had so far
        self.names: dict[str, None] = {}  # the data's columns, for messages
        self.used = {ours: Counter[str]() for ours in COLUMNS}  # where each of our columns came from
        self.has_pictures = False
        self.said = Counter[str]()  # rows by what was done to them
        self.unused: dict[str, bool] = {}  # other columns that seem to hold pictures -> whether by their values
        self.pictured: list[int] = []  # rows with pictures
        self.marked: dict[int, tuple[int, str]] = {}  # rows without -> how many markers their problem has, and one

    def add(self, record: Any, place: str, folder: Path | None) -> None:
        """Read one record; a bad one is counted."""
        if folder not in self.folders:
            self.folders[folder] = PictureFolder(folder)
        try:
            row = self._row(record, place, self.folders[folder])
            if row.images:
                self.pictured.append(len(self.rows))
            elif markers := images.MARKERS.findall(row.problem):
                self.marked[len(self.rows)] = len(markers), MARKER if MARKER in markers else markers[0]
            self.rows.append(row)
            self.places.append(place)
        except BadRow as error:
            self._drop(error, place)
        if not self.rows and self.bad.total() >= MAX_BAD:
            self._refuse("the rest was not read")

    def finish(self, decode: bool) -> None:
        """Drop the rows whose pictures fail; refuse a source that has no good row or whose pictures would be lost."""
        for ours in sorted(self.absent if self.names else ()):
            raise NoColumn(ours, f"{self.name}: no row has the column {self.columns[ours]!r} that "
                           f"prompt.columns.{ours} names; the columns are {shown(', '.join(self.names))}")
        lost = [shown(name, 100) for name, by_value in self.unused.items() if by_value]
        if lost and not self.has_pictures:
            raise UserError(f"{self.name}: no row has pictures in a column that is read, but the column {lost[0]!r} "
                            f"holds some: set prompt.columns.images={lost[0]}, or remove the column")
        if self.said[INDEXED] and self.bad[FROM_1]:
            raise UserError(f"{self.name}: answers that are integers seem to count options from 0, but others are the "
                            "number of all options, as if counted from 1; write the options' letters")
        faults = images.unusable(self.rows, self.pictured) if decode else {}
        for index, (count, marker) in self.marked.items():
            if self.has_pictures:
                faults[index] = BadRow("markers and pictures differ", f"{count} {marker} markers in the problem, but 0 "
                                       "images; add the images, or remove the markers")
            elif marker == MARKER:
                self.said[f"have {MARKER} as plain text, since the source has no pictures"] += 1
        for index in sorted(faults):
            self._drop(faults[index], self.places[index])
        self.pictured = [index for index in self.pictured if index not in faults]
        self.rows = self.rows.subset(index for index in range(len(self.rows)) if index not in faults)
        if not self.rows:
            self._refuse("no row is left")

    def notes(self) -> list[str]:
        """Lines for the user."""
        total, pictured, kept = len(self.rows) + self.bad.total(), len(self.pictured), f"{len(self.rows):,}"
        lines = [f"{self.name}: {kept} of {total:,} rows read; {pictured:,} of {kept} rows have pictures"]
        known = [f"{name} ({count:,})" if len(self.schemas) > 1 else name
                 for name, count in self.schemas.most_common(FIRST) if name]
        lines += [f"{self.name}: rows read as: {', '.join(known)}"] if known else []
        lines += [f"{self.name}: pictures were found in {shown(where.path)} under the last parts of their paths"
                  for where in self.folders.values() if where.removed is not None]
        how = [f"{ours} from " + ", ".join(f"{name} ({count:,})" if len(names) > 1 else name
                                           for name, count in names.most_common(FIRST))
               for ours, names in self.used.items() if set(names) - {f"'{ours}'"}]
        lines += [f"{self.name}: {', '.join(how)}"] if how else []
        lines += [f"{self.name}: {count:,} rows {what}" for what, count in self.said.items() if count]
        unused = [shown(name, 100) for name, by_value in self.unused.items() if by_value or not pictured]
        lines += [f"{self.name}: WARNING: the column {name!r} seems to hold pictures, and they are not used; to use "
                  f"them set prompt.columns.images={name}" for name in unused[:FIRST]]
        lines += [f"{self.name}: dropped {_counts(self.bad)}; the first:"] if self.bad else []
        return lines + [f"  {text}" for text in self.first]

    def _drop(self, error: BadRow, place: str) -> None:
        self.bad[error.kind] += 1
        if len(self.first) < FIRST:
            self.first.append(f"{place}: {error}")

    def _refuse(self, why: str) -> None:
        if not self.bad:
            raise UserError(f"{self.name} holds no rows")
        raise UserError(f"{self.first[0]} -- {why} of {self.name}: {_counts(self.bad)}"
                        + "".join(f" | {text:.200}" for text in self.first[1:]))

    def _row(self, record: Any, place: str, folder: PictureFolder) -> Row:
        """A raw row, checked."""
        if isinstance(record, BadRow):
            raise record
        if not isinstance(record, dict):
            raise BadRow("not an object", f"an object with named columns is needed, got {brief(record)}")
        if len(self.names) < MAX_NAMES and not record.keys() <= self.names.keys():
            self.names.update(dict.fromkeys(record))
        schema = self._schema(record)
        record = _changed(record, schema)
        fields = Fields(record, self.columns, folder, schema)
        self.absent -= set(fields.names)
        # A benchmark has its pictures twice, as bytes and by name, and rows that we wrote the columns of their source.
        if schema.common and not (schema.name and "images" in fields.names):
            self._look_for_pictures(fields)
        if any(images.find(record.get(name)) for name in ("video", "videos", "video_path")):
            raise BadRow("has a video", "the row has a video, and only text and images are read")
        try:
            pictures = fields.pictures()
        finally:
            self.has_pictures |= fields.has_pictures
        options = fields.options()
        text = {"problem": fields.problem(len(pictures)), "answer": fields.answer(options)}
        text |= {ours: fields.text(ours) for ours in ("caption", "task")}
        for ours in ("problem", "answer"):
            if not text[ours].strip():
                raise BadRow(f"no {ours}", f"no {ours}; the row's columns are {shown(', '.join(record))}: "
                             f"fill it in, or name the right column with prompt.columns.{ours}=COLUMN")
        said = list(fields.said)
        if lines := shown_options(text["problem"], text["answer"], options, fields.by_place):
            text["problem"] += lines
            said.append("got their options listed after the problem, since the answer is a letter")
        marked, items = images.place(text["problem"], pictures)
        if marked == MARKER * len(items) + text["problem"] and items:
            said.append("have pictures without a marker in the text, so the pictures stand first")
        self.said.update(said)
        self.schemas[schema.name] += 1
        for ours, name in fields.names.items():
            self.used[ours][f"the chat in {name!r}" if name in fields.chats else repr(name)] += 1
        return Row(marked, text["answer"], items, text["caption"], fields.id() or os.path.basename(place),
                   text["task"], fields.extra(), [images.NUMBERED.sub(r"image \1", option) for option in options],
                   fields.gold_rule())

    def _schema(self, record: schemas.Record) -> schemas.Schema:
        """The record's schema: the named one, or the one that its columns fit, or that of the rows that we wrote."""
        if schemas.OURS in record:
            return schemas.recognize(record)
        fits = [schema for schema in self.entries if record.keys() >= set(schema.has)]
        if self.entries and not fits:
            raise BadRow("other schema", f"the row lacks columns of the schema {self.entries[0].name}: "
                         f"{shown(', '.join(sorted(set(self.entries[0].has) - record.keys())))}")
        return fits[0] if fits else schemas.recognize(record)

    def _look_for_pictures(self, fields: Fields) -> None:
        """Note columns, also inside objects, that seem to hold pictures and are not read."""
        if len(self.unused) > MAX_NAMES:
            return
        for name, value in fields.record.items():
            if isinstance(value, str | bytes | list | dict) and value and name not in fields.read:
                inner = value.items() if isinstance(value, dict) else ()
                for label, each in [(name, value), *((f"{name}.{key}", each) for key, each in inner)]:
                    if self.unused.get(label):
                        break
                    if label not in fields.read and fields.holds_pictures(each):
                        self.unused[label] = True
                        break
                if LIKE_IMAGES.search(name) or images.is_picture(value):
                    self.unused.setdefault(name, False)


def _changed(record: schemas.Record, schema: schemas.Schema) -> schemas.Record:
    try:
        return schema.change(record)
    except BadRow:
        raise
    except Exception as error:  # the record may hold values of any type
        raise BadRow("other schema", f"the row is no row of the schema {schema.name} ({reason(error)}): repair its "
                     "columns") from error


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


class Selected(NamedTuple):
    """The rows that a phase can train on."""

    indices: list[int]
    sizes: list[Size]  # of these rows
    dropped: dict[str, int]  # rows by reason
    unusable: list[str]  # why rows cannot be made a prompt
    golds: list[str]  # which gold answers earn no reward, and why


def out_of_band(row: Row, bands: dict[str, list[float]]) -> str:
    """The reason why a row is outside of a band, a column's lowest and highest value; "" if it is inside of all."""
    for name, (low, high) in bands.items():
        value = get(row.extra, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            return f"no number in {name}"
        if not low <= value <= high:
            return f"{name} outside of [{low:g}, {high:g}]"
    return ""


def measured(row: Row, processor: Measures, captions: bool, most: int) -> Size:
    """`processor.measure`, but of a row that must have more than `most` tokens only a lower bound of them.

    Tokenizing takes 200 bytes per character, so such a text is not tokenized.
    """
    is_long = len(row.problem) + len(row.caption) * captions > most  # a token has a character or more
    least = processor.at_least(row, captions) if is_long else 0
    return (least, 0) if least > most else processor.measure(row, captions)


def select_rows(rows: Sequence[Row], processor: Measures, captions: bool, max_prompt_tokens: int, judge: ChecksGold,
                where: str, bands: dict[str, list[float]] | None = None) -> Selected:
    """Select the rows that a phase can train on.

    Dropped are rows without a caption where captions are shown, rows outside of a band, rows that the processor
    refuses, prompts above max_prompt_tokens (image tokens included), and rows whose gold answer no response can equal:
    none could earn their reward.

    Args:
        where: the phase's key, as in "phases.text". bands: numeric columns, with their lowest and highest value.

    Raises:
        UserError: no row is left.
    """
    selected, tokens, dropped = Selected([], [], {}, [], []), list[int](), Counter[str]()

    def note(messages: list[str], text: str) -> None:
        if len(messages) < FIRST:
            messages.append(text)

    def fault(index: int, row: Row) -> str:
        if captions and not row.caption:
            return "no caption"
        if reason := out_of_band(row, bands or {}):
            return reason
        try:
            size = measured(row, processor, captions, max_prompt_tokens)
        except UserError as error:
            note(selected.unusable, str(error))
            return "no prompt"
        tokens.append(size[0])
        if size[0] > max_prompt_tokens:
            return "prompt too long"
        if problem := judge.gold_problems([row.public()])[0]:
            note(selected.golds, f"row {row.id}: {problem}: {shown(row.answer, 80)}")
            return problem
        selected.indices.append(index)
        selected.sizes.append(size)
        return ""

    for index, row in enumerate(track(rows, "counting prompt tokens", transient=True, disable=len(rows) <= 200)):
        if reason := fault(index, row):
            dropped[reason] += 1
    if not selected.indices:
        lengths = f"{min(tokens)} / {statistics.median(tokens):.0f} / {max(tokens)}" if tokens else "none counted"
        first = "".join(f" | {text:.300}" for text in [*selected.unusable, *selected.golds][:FIRST])
        raise UserError(f"{where}: no row is left of {len(rows)}, dropped {dict(dropped)}; prompt tokens min / median "
                        f"/ max: {lengths}. For long prompts raise {where}.max_prompt_tokens={max_prompt_tokens} or "
                        f"lower prompt.max_pixels; for captions and gold answers look at prompt.columns; bands are "
                        f"{where}.data_filter={bands or {}}{first}")
    return selected._replace(dropped=dict(dropped))
