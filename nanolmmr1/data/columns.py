"""The columns of a record: which of them hold the problem, the answer, the options and the pictures of a row.

Names of columns that common data sets use are tried in a fixed order, unless `prompt.columns` names one.

Next: schemas.py, published layouts of rows.
"""

import decimal
import functools
import hashlib
import json
import math
import re
from reprlib import repr as brief
from typing import Any

from nanolmmr1.data import chat, images
from nanolmmr1.data.archives import PictureFolder
from nanolmmr1.data.images import MARKER, ImageItem
from nanolmmr1.data.readers import BadRow, parsed, shown
from nanolmmr1.data.schemas import MOST_DECIMALS, OURS, Schema, without_instruction

MAX_TEXT = 16 << 20  # characters of a problem, answer, caption or task
MAX_ID = 200  # characters of an id, which appears in logs and messages
CHATS = ("message", "messages", "conversations", "conversation", "prompt")
# Our column -> the columns of the data that are tried: for images the first with a picture, for the others the first
# that the row has. A dot leads into an object.
COLUMNS = {
    "problem": ("problem", "question", "problem_text", "query", *CHATS),
    "answer": ("answer", "final_answer", "gold", "gold_answer", "gt_answer", "ground_truth",
               "reward_model.ground_truth", "expected_answer", "reference_answer", "correct_answer", "target", "label",
               "solution", "completion", "response", *CHATS),
    "images": ("images", "decoded_image", "image", "image_<number>", "image_path", "image_paths", "img", "imgs",
               "img_path", "img_paths", "image_file", "image_files", "image_bytes", "image_base64", "imagename",
               "image_name", "picture", "pictures", "picture_path", "photo", "photos", "figure", "figures",
               "figure_path", "diagram", "diagrams", "screenshot", "jpg", "jpeg", "png", "webp", "image_url",
               "image_urls", *CHATS),
    "options": ("options", "choices", "option"), "caption": ("caption",), "task": ("task",),
    "gold_rule": ("gold_rule",), "id": ("id", "qid", "pid", "sample_index", "unique_id")}
# The keys of a gold rule, each optional, and what their values are.
GOLD_RULE = {"accept": "a list of texts, other gold answers that are right as well",
             "decimals": f"an integer up to {MOST_DECIMALS}: answer and gold are rounded to so many decimals",
             "tolerance": "a list of the largest absolute differences from gold, one for each part of gold or for all"}
# Any value of these is meant as a picture; the other names count only where the value plainly is one.
PICTURES = ("images", "decoded_image", "image")
NUMBERED = "image_<number>"  # stands for image_1, image_2 ... together
HEADS = {name.partition(".")[0] for theirs in COLUMNS.values() for name in theirs}
# The mark of an option in a text. Before it stands no letter or bracket, as in P(A) or f(B).
LISTED = (r"(?:(?<![^\s,;:?!*\u3001\u3002\u4e00-\u9fff\uff01\uff09\uff0c\uff1a\uff1b\uff1f])|(?<=[0-9.])"
          r"(?<!_[0-9])(?=[(\[\uff08]))[(\[\uff08]?{}\s*[).:\]\uff09\uff0e\uff1a\u3001]")
INDEXED = "have an index as answer, which was read as an option's letter, counted from 0"
FROM_1 = "answer is an index from 1"  # a kind of bad rows
ABSENT = object()
EMPTY: tuple[Any, ...] = (None, "", [], {})  # 0 and False are values


def get(record: dict[str, Any], name: str) -> Any:
    """The value of a column, also of a dotted name; ABSENT if there is none."""
    if name in record:
        return record[name]
    head, dot, rest = name.partition(".")
    inner = record.get(head) if dot else None
    inner = parsed(inner) if isinstance(inner, str) else inner
    return get(inner, rest) if isinstance(inner, dict) else ABSENT


def _number(name: str) -> int | None:
    """The number of a column such as image_1."""
    found = re.fullmatch(r"(?:images?|img|picture|figure)[_ ]?(\d{1,2})", name, re.I) if len(name) < 20 else None
    return int(found[1]) if found else None


@functools.lru_cache(100)
def _candidates(present: frozenset[str], columns: tuple[tuple[str, str], ...],
                first: tuple[tuple[str, str], ...], common: bool) -> dict[str, list[str]]:
    """Our columns -> names to try in a record with these names. Most records of a source have the same ones."""
    tried = {ours: (*(name for ours_too, name in first if ours_too == ours), *(theirs if common else ()))
             for ours, theirs in COLUMNS.items()} | {ours: (name,) for ours, name in columns}
    return {ours: [name for name in theirs if name == NUMBERED or name in present or _head(name) in present]
            for ours, theirs in tried.items()}


def _head(name: str) -> str:
    return name.partition(".")[0]


class Fields:
    """The columns that one record uses.

    Args:
        columns: our column -> the data's, where the recipe names one.
        folder: where relative paths of pictures start.
        schema: of the record.
    """

    names: dict[str, str]  # our column -> the data's, for those that the record has

    def __init__(self, record: dict[str, Any], columns: dict[str, str], folder: PictureFolder, schema: Schema) -> None:
        self.record, self.columns, self.folder, self.schema = record, columns, folder, schema
        self.has_pictures = False  # set by `pictures`, also if one of them is missing
        self.said: list[str] = []  # what was done to the row beyond reading it
        self.by_place = False  # set by `answer`: it is the letter of an option's place, whatever the options' texts are
        self.chats: dict[str, chat.Chat] = {}
        # Columns image_1, image_2 ... by their number, without empty ones.
        self.numbered = {number: name for name in record
                         if (number := _number(name)) is not None and images.is_picture(record[name])}
        self.names = {}
        named = [*columns.values(), *schema.columns.values()]
        known = HEADS.union(named, map(_head, named)) & record.keys()
        tried = _candidates(frozenset(known), tuple(columns.items()), tuple(schema.columns.items()),
                            schema.common)
        for ours, theirs in tried.items():
            if name := next((name for name in theirs if self._has(ours, name)), None):
                self.names[ours] = name
        # The columns that the row is made of. Options of another name stay among the others, for reward functions.
        self.read = {OURS, *(name for ours, name in self.names.items() if ours != "options" or name == ours)}
        if NUMBERED in self.read:
            self.read.update(self.numbered.values())

    def _has(self, ours: str, name: str) -> bool:
        """Whether the record has our column under this name."""
        if name == NUMBERED:
            return bool(self.numbered)
        value = get(self.record, name)
        if value is ABSENT or ours in self.columns:
            return value is not ABSENT
        if self.schema.columns.get(ours) == name and value in EMPTY:
            return False
        if name in CHATS and ours in ("answer", "images"):
            read = self._probe(name, value)
            return bool(read and (read.answer if ours == "answer" else read.pictures))
        if ours == "options":
            return bool(_options(value))
        if ours != "images":
            return True
        on_web = "url" in name and isinstance(value, str) and "://" in value[:10]
        return bool(images.find(value)) if name in PICTURES else on_web or images.is_picture(value)

    def _chat(self, name: str, value: Any) -> chat.Chat | None:
        if name not in self.chats:
            if (found := chat.turns(value)) is None:
                return None
            self.chats[name] = chat.read(found)
        return self.chats[name]

    def _probe(self, name: str, value: Any) -> chat.Chat | None:
        """The chat of a column that may hold one; None too if it cannot be read."""
        try:
            return self._chat(name, value)
        except BadRow:
            return None

    def _value(self, ours: str) -> tuple[Any, chat.Chat | None]:
        name = self.names.get(ours)
        value = get(self.record, name) if name and name != NUMBERED else None
        return value, self._chat(name, value) if name and ours in ("problem", "answer", "images") else None

    def text(self, ours: str) -> str:
        """The caption or task; "" if the record has none."""
        return _text(self._value(ours)[0], ours)

    def answer(self, options: list[str]) -> str:
        """The answer; "" if the record has none. It becomes a letter where it means one of the options: by the text of
        an option in schemas whose gold is one, by a small letter, or by an integer, which is counted from 0.

        Raises:
            BadRow: it is a number that may be an index, counted from 0 or 1, or a value.
        """
        value, found = self._value("answer")
        value = found.answer if found else self._one_answer(value)
        answer, texts = _text(value, "answer"), [option.strip() for option in options]
        bare, letters = answer.strip(), _letters(len(options))
        place = texts.index(bare) if self.schema.text_gold and texts.count(bare) == 1 else None
        if place is None and (place := _index(value, bare, texts)) is not None:
            self.said.append(INDEXED)
        self.by_place = place is not None
        if place is not None:
            return letters[place]
        is_small = len(bare) == 1 and bare.islower() and bare.upper() in letters
        return bare.upper() if is_small and not {bare, bare.upper()} & {text.strip("$") for text in texts} else answer

    def _one_answer(self, value: Any) -> Any:
        """The answer of a list, which may be written as text; several are joined."""
        if isinstance(value, str) and re.match(r"""\[\s*["']""", value) and len(found := parsed(value) or []) == 1:
            value = found
        answers = [value]
        while len(answers) == 1 and isinstance(answers[0], list):
            answers = [each for each in answers[0] if each is not None and each != ""]
        if len(answers) < 2:
            return answers[0] if answers else None
        self.said.append("have several answers, which were joined by commas")
        return ", ".join(_text(each, "answer") for each in answers)

    def problem(self, count: int) -> str:
        """The problem of a row that has `count` pictures, its markers not placed yet."""
        value, found = self._value("problem")
        if found is None:
            return self._plain(_text(value, "problem"))
        if found.has_system:
            self.said.append("have a system turn, which was left out: prompt.system sets it")
        if not count and found.problem != found.text:
            raise BadRow("picture missing", "the chat has a picture part, but neither it nor the row has the picture")
        # The text may have a marker for each picture in addition to the picture parts.
        in_text = found.text.count(MARKER) == count != found.problem.count(MARKER)
        return self._plain(_text(found.text if in_text else found.problem, "problem"))

    def _plain(self, problem: str) -> str:
        """The problem without the instructions that its schema bakes in."""
        plain = without_instruction(problem) if self.schema.instructed else problem
        if plain.strip() and plain != problem:
            self.said.append("had an instruction in their text, which was left out: prompt.template or prompt.system "
                             "gives one")
            return plain
        return problem

    def pictures(self) -> dict[int, ImageItem]:
        """The row's pictures by the number that a numbered marker gives them.

        Raises:
            BadRow: one cannot be found.
        """
        if self.names.get("images") == NUMBERED:
            found = {number: images.find(self.record[name])[0] for number, name in sorted(self.numbered.items())}
        else:
            value, read = self._value("images")
            found = dict(enumerate(read.pictures, 1)) if read else images.numbered(value)
        self.has_pictures = bool(found)
        return {number: images.locate(item, self.folder) for number, item in found.items()}

    def options(self) -> list[str]:
        """The options of a multiple choice; [] if there are none, or they cannot be read."""
        return _options(self._value("options")[0])

    def gold_rule(self) -> dict[str, Any]:
        """How answers are compared with gold beyond the general rules; {} for most rows.

        Raises:
            BadRow: the column holds anything but a GOLD_RULE.
        """
        value = self._value("gold_rule")[0]
        value = value if not isinstance(value, str) or (inner := parsed(value)) is None else inner
        if value in EMPTY:
            return {}
        # Parquet gives all rows the same keys, and those that a row lacks are None.
        rule = {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else {"": value}
        if wrong := [key for key in rule if not _fits(key, rule[key])]:
            raise BadRow("wrong gold rule", f"gold_rule has {brief(wrong[0])}: {brief(rule[wrong[0]])}; it may have "
                         + "; ".join(f"{key}: {what}" for key, what in GOLD_RULE.items()))
        return rule

    def id(self) -> str:
        """The id in one short printable line, or ""."""
        value, _ = self._value("id")
        text = str(value) if isinstance(value, str | int) else ""
        if len(text) > MAX_ID:
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
            text = f"{text[:MAX_ID - 20]}...{digest[:16]}"
        return shown(text)

    def extra(self) -> dict[str, Any]:
        """The other columns that are JSON, without ours that are empty."""
        return {str(name): v for name, v in self.record.items()
                if name not in self.read and (v or name not in COLUMNS) and _is_jsonable(v)}

    def holds_pictures(self, value: Any) -> bool:
        """Whether a value of some column is a picture that is here, or a chat with one."""
        if (found := chat.turns(value)) is None:
            return images.is_here(value, self.folder)
        try:
            return bool(chat.read(found).pictures)
        except BadRow:
            return False


def _text(value: Any, column: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, int | float | decimal.Decimal):
        value = str(value)
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{column} must be text or a number, got {brief(value)}")
    if len(value) > MAX_TEXT:
        raise BadRow("text too long", f"{column} has {len(value):,} characters, more than {MAX_TEXT:,}; cut it down")
    if re.search("[\ud800-\udfff]", value):
        raise BadRow("half a surrogate", f"{column} holds half a surrogate pair, which is no text; repair its encoding")
    return value


def _fits(key: Any, value: Any) -> bool:
    """Whether a value is one of this key of GOLD_RULE."""
    if key == "decimals":
        return type(value) is int and 0 <= value <= MOST_DECIMALS
    if key not in ("accept", "tolerance") or not isinstance(value, list):
        return False
    if key == "accept":
        return all(isinstance(each, str) and _text(each, "gold_rule.accept") for each in value)
    return all(type(each) in (int, float) and 0 <= each < math.inf for each in value)


def _options(value: Any) -> list[str]:
    """The texts of options: of a list, an object {"A": ...} or {"text": [...]}, their JSON or literal text, or lines
    or clauses that begin with A., B. and so on."""
    if isinstance(value, str):
        marks = list(re.finditer(r"(?:^|[\n;,])[ \t]*\(?([A-Z])[.):\uff0e\uff1a\u3001]", value))
        if (inner := parsed(value)) is not None:
            value = inner
        elif len(marks) > 1 and [mark[1] for mark in marks] == _letters(len(marks)):
            ends = [mark.start() for mark in marks[1:]] + [len(value)]
            value = [value[mark.end():end].strip() for mark, end in zip(marks, ends, strict=True)]
    value = _in_order(value) if isinstance(value, dict) else value
    while isinstance(value, list) and value and value[-1] is None:  # as parquet may fill up a list
        value = value[:-1]
    if not isinstance(value, list) or not 1 < len(value) <= 26:
        return []
    try:
        texts = [_text(each, "options") for each in value]
    except BadRow:
        return []
    return texts if all(texts) else []


def _in_order(value: dict[Any, Any]) -> Any:
    """The texts of an object, in the order of its letters if it has some."""
    texts, labels, pairs = value.get("text", value.get("texts")), value.get("label"), list(value.items())
    if isinstance(labels, list) and isinstance(texts, list) and len(labels) == len(texts):
        pairs = list(zip(labels, texts, strict=True))
    # Parquet gives all rows the same keys, and those that a row lacks are None.
    lettered = sorted(((str(key).upper(), text) for key, text in pairs if text is not None), key=lambda pair: pair[0])
    is_lettered = [letter for letter, _ in lettered] == _letters(len(lettered))
    return [text for _, text in lettered] if is_lettered else texts


def _letters(count: int) -> list[str]:
    return [chr(65 + i) for i in range(count)]


def _index(value: Any, answer: str, options: list[str]) -> int | None:
    """The place of the option that a number means, as in ScienceQA and MMLU; None: the answer is a value.

    An integer counts from 0, unless an option names it. Of digits in a text nobody knows where they start to count.
    """
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not options or not (is_int or isinstance(value, str)) or not re.fullmatch("[0-9]{1,2}", answer):
        return None
    number = int(answer)
    named = [place for place, text in enumerate(options) if text == answer] or [
        place for place, text in enumerate(options)
        if any(float(each) == number for each in re.findall(r"[0-9]+(?:\.[0-9]+)?", text))]
    if is_int and not named and number < len(options):
        return number
    if not named and number <= len(options) or is_int and number < len(options) and number not in named:
        kind = FROM_1 if is_int and number == len(options) else "answer is an index"
        raise BadRow(kind, f"the answer {answer} may be the number of an option, counted from 0 or 1, or a value; "
                     "write the option's letter, or its text")
    return None


def shown_options(problem: str, answer: str, options: list[str], by_place: bool = False) -> str:
    """The lines that list the options, or "": where the answer is no letter of theirs, or the problem lists them.

    Without these lines a model could only guess the letter. `by_place`: the answer is a letter, though an option may
    have its text.
    """
    if not options or len(answer) > 200:
        return ""
    letters = re.fullmatch(r"(?:\\boxed\{)?[\W_]*([A-Z](?:[\W_]*[A-Z])*)[\W_]*", answer.strip())
    named = set(re.findall("[A-Z]", letters[1])) if letters else set()
    every = _letters(len(options))
    if not named or not named <= set(every) or (not by_place and answer in options and options != every):
        return ""
    if all(re.search(LISTED.format(letter), problem) for letter in every):
        return ""
    return "".join(f"\n({letter})" + f" {text}" * (options != every)
                   for letter, text in zip(every, options, strict=True))


def _is_jsonable(value: Any) -> bool:
    if isinstance(value, str):
        return True
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # such as bytes, dates or decimals of parquet
        return False
    return True
