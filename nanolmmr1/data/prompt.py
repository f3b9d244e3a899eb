"""Prompts: chat text, token ids, image patches and 3-D positions of a row.

Only this file uses the tokenizer and the image processor. An image is resized once, here, and the trainer and all
samplers use the same pixels. The number of prompt tokens follows from the image sizes, so a data set is measured
without decoding a pixel. Special tokens come from the chat template alone. Where a row's text looks like one, it is
tokenized as ordinary text: so image tokens are only where this file puts them, and data cannot end a turn or begin one.

Next: group.py, a prompt with its responses.
"""

import contextlib
import json
import re
import tempfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from nanolmmr1.data.readers import reason, shown
from nanolmmr1.data.rows import MARKER, Row, Size, image_size, open_image
from nanolmmr1.errors import UserError
from nanolmmr1.schema import Prompt as PromptConfig

Grid = tuple[int, int, int]  # t, h, w of an image in patches
MAX_ASPECT = 200  # as in Qwen2.5-VL's own smart_resize
# An explicit list, because AutoTokenizer asks on the terminal whether to run code of the model folder.
TOKENIZERS = {"Qwen2Tokenizer": Qwen2Tokenizer, "Qwen2TokenizerFast": Qwen2Tokenizer,
              "PreTrainedTokenizerFast": PreTrainedTokenizerFast, "TokenizersBackend": PreTrainedTokenizerFast}
PUBLISHED = "as published with Qwen2.5-VL"
PAD = "<|image_pad|>"
MAX_SETTINGS = 64 << 20  # bytes of a settings file
MAX_TEMPLATE = 1 << 20  # characters of a chat template
HIDDEN = "\udfff"  # around the id of a special token in a row's text; half a surrogate pair, so no row holds it
# Text that a template must show as it is: one that trims, escapes, changes case or prints a list does not.
PROBE = "\n 1 + 1 = ?  Aa 'b' \"c\" <d> & {e}\\f \u00e9\n "


@dataclass
class Prompt:
    """A tokenized row: L prompt tokens, P image patches, K image tokens, one per merge group of patches."""

    row: Row
    ids: torch.Tensor  # (L,) int64
    positions: torch.Tensor  # (3, L) int64: temporal, height, width
    patches: torch.Tensor  # (P, 1176) float32
    grid: torch.Tensor  # (images, 3) int64: t, h, w in patches
    image_slots: torch.Tensor  # (K,) int64: where in ids the image features go
    text: str  # the chat text, with one <|image_pad|> per image, and special tokens of the row's text as they are

    @property
    def next_position(self) -> int:
        """The position of a response's first token, on all three axes."""
        return int(self.positions.max()) + 1


class Processor:
    """Tokenizer and image processor of a Qwen2.5-VL folder, with a recipe's templates and pixel limits.

    Raises:
        UserError: the folder or a template lacks something, or a template contains a special token.
    """

    special: dict[str, int]  # special tokens and their ids
    any_special: re.Pattern[str]  # matches each of them, as a group
    image_pad_id: int  # the token that an image's embeddings replace
    banned_ids: list[int]  # vision tokens, which must not be sampled
    stop_ids: list[int]  # tokens that end a response
    longest_token: int  # in bytes
    patch: int  # pixels of a patch's side
    merge: int  # patches of a merge group's side
    frames: int  # of a patch
    patch_dim: int  # values of a patch, 1176
    resample: int  # Pillow's filter
    levels: np.ndarray  # (3, 256) float32: a channel's normalised values

    def __init__(self, folder: str | Path, cfg: PromptConfig) -> None:
        self.cfg, self.folder = cfg, shown(folder)
        if not (Path(folder) / "tokenizer.json").is_file():  # transformers would create an empty tokenizer
            raise UserError(f"{self.folder} has no tokenizer.json: give the folder of a Qwen2.5-VL")
        self.tokenizer = _load_tokenizer(folder)
        template = self.tokenizer.chat_template
        if not template or not isinstance(template, str | dict) or len(str(template)) > MAX_TEMPLATE:
            raise UserError(f"the tokenizer in {self.folder} has no chat template of up to {MAX_TEMPLATE:,} "
                            "characters: copy Qwen2.5-VL's chat_template.json")
        added = self.tokenizer.added_tokens_decoder
        self.special = {token.content: i for i, token in added.items() if token.special}
        if PAD not in self.special:
            raise UserError(f"the tokenizer in {self.folder} has no {PAD} token: a Qwen2.5-VL folder is needed")
        longest_first = sorted(self.special, key=len, reverse=True)
        self.any_special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self.image_pad_id = self.special[PAD]
        vision = ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
        self.banned_ids = [self.special[f"<|{name}|>"] for name in vision if f"<|{name}|>" in self.special]
        self.longest_token = max(map(len, self.tokenizer.get_vocab()))  # the vocabulary has a character per byte
        stops = _generation_stops(folder) | {self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}
        self.stop_ids = sorted(stops - {None})

        images = _load_images(folder)
        self.patch, self.merge, self.frames = images.patch_size, images.merge_size, images.temporal_patch_size
        self.patch_dim, self.resample = 3 * self.frames * self.patch**2, images.resample
        # A channel has 256 values, so rescaling and normalising is a table. The processor computes it: exactly equal.
        ramp = np.tile(np.arange(256, dtype=np.uint8), (3, 1, 1))  # (3, 1, 256)
        ramp = images.normalize(images.rescale(ramp, images.rescale_factor), images.image_mean, images.image_std)
        self.levels = ramp[:, 0].astype(np.float32)
        self._check_templates()

    def _check_templates(self) -> None:
        for key, needed in (("system", ""), ("template", "{problem}"), ("caption_template", "{caption}")):
            text = getattr(self.cfg, key)
            if found := self.any_special.search(text):
                raise UserError(f"prompt.{key} contains {found[0]}, a special token of the model: remove it")
            if needed and text.count(needed) != 1:
                raise UserError(f"prompt.{key}={text!r}: {needed} must stand in it once")
            if MARKER in text:
                raise UserError(f"prompt.{key}={text!r}: {MARKER} belongs in the rows' problems")
        # A chat template is a program, so it is run here: errors should not wait for the first prompt.
        self._probe(Row(PROBE, "2", id="made up, of text"))
        self._probe(Row(f"{MARKER}{PROBE}{MARKER}How many?{PROBE}", "2", [b"", b""], id="made up, with images"))

    def _probe(self, row: Row) -> None:
        """Refuse a chat template that does not show a row's texts as they are, once, with its images between them."""
        shown_text = self._render(row, False)
        texts, pads = [], [0]  # pads: before, between and after the texts
        for part in self.messages(row, False)[-1]["content"]:
            if part["type"] == "text":
                texts.append(part["text"])
                pads.append(0)
            else:
                pads[-1] += 1
        any_text = "|".join(map(re.escape, texts))
        seen = [gap.count(PAD) for gap in re.split(any_text, shown_text)]
        if re.findall(any_text, shown_text) != texts or seen != pads or self.cfg.system not in shown_text:
            raise UserError(f"the chat template in {self.folder} does not show the text and images of a prompt as they "
                            "are; it may be a text model's. Use the one published with Qwen2.5-VL")

    def messages(self, row: Row, captions: bool) -> list[dict[str, Any]]:
        """Chat messages, with text and image parts in the order of the problem's markers.

        With captions, the row's caption comes before its first image, or first if there is no image. A marker in the
        problem of a row without images is plain text.
        """
        before, after = self.cfg.template.split("{problem}")
        texts = row.problem.split(MARKER) if row.images else [row.problem]
        assert len(texts) == len(row.images) + 1, f"row {row.id}: {len(texts) - 1} markers, {len(row.images)} images"
        texts[0] = before + texts[0]
        texts[-1] += after
        if captions and row.caption:
            caption = self.cfg.caption_template.replace("{caption}", row.caption)
            texts[0] = texts[0] + caption if row.images else caption + texts[0]
        parts = [{"type": "text", "text": texts[0]}]
        for text in texts[1:]:
            parts += [{"type": "image"}, {"type": "text", "text": text}]
        system = [{"role": "system", "content": self.cfg.system}] if self.cfg.system else []
        return system + [{"role": "user", "content": [part for part in parts if part.get("text") != ""]}]

    def at_least(self, row: Row, captions: bool) -> int:
        """A lower bound of the row's tokens from the length of its texts, without tokenizing them."""
        return sum(_fewest_bytes(text) for text in (row.problem, row.caption * captions)) // self.longest_token

    def measure(self, row: Row, captions: bool) -> Size:
        """(tokens, image patches) of the row's Prompt, from image headers alone."""
        ids, _ = self._tokenize(row, captions)
        grids = [self._row_grid(row, *image_size(item)) for item in row.images]
        return len(ids) + sum(self._slots(grid) - 1 for grid in grids), sum(t * h * w for t, h, w in grids)

    def image_grid(self, width: int, height: int) -> Grid:
        """The grid of an image of width x height pixels after resizing.

        Raises:
            UserError: one side is more than 200 times the other.
        """
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise UserError(f"an image of {width} x {height} pixels is too thin: crop it until one side is at most "
                            f"{MAX_ASPECT} times the other")
        height, width = smart_resize(height, width, self.patch * self.merge, self.cfg.min_pixels, self.cfg.max_pixels)
        return 1, height // self.patch, width // self.patch

    def resized(self, row: Row) -> list[Image]:
        """The row's images, RGB, at the size that the model sees; every sampler must use these."""
        images = []
        for item in row.images:
            image = open_image(item)
            _, h, w = self._row_grid(row, *image.size)
            images.append(image.resize((w * self.patch, h * self.patch), self.resample))
        return images

    def prepare(self, row: Row, captions: bool) -> Prompt:
        """Tokenize the row; open and resize its images."""
        tokens, text = self._tokenize(row, captions)
        ids = np.array(tokens)
        pads = np.flatnonzero(ids == self.image_pad_id)  # (images,)
        images = self.resized(row)
        grid = [(1, image.height // self.patch, image.width // self.patch) for image in images]
        repeats = np.ones_like(ids)
        repeats[pads] = [self._slots(g) for g in grid]
        positions = self._positions(len(ids), pads, grid)
        ids = np.repeat(ids, repeats)
        patches = [self._patches(np.asarray(image)) for image in images]
        return Prompt(
            row=row, ids=torch.from_numpy(ids), positions=torch.from_numpy(positions),
            patches=torch.from_numpy(np.concatenate([np.empty((0, self.patch_dim), np.float32), *patches])),
            grid=torch.tensor(grid, dtype=torch.int64).view(-1, 3),
            image_slots=torch.from_numpy(np.flatnonzero(ids == self.image_pad_id)), text=text)

    def decode(self, ids: torch.Tensor | list[int]) -> str:
        """The text of a response, without special tokens."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _tokenize(self, row: Row, captions: bool) -> tuple[list[int], str]:
        """Token ids, with one pad per image, and chat text."""
        text = self._render(row, captions)
        if HIDDEN in text:  # stretches between the template's special tokens, where nothing is special
            ids: list[int] = []
            for i, piece in enumerate(self.any_special.split(text)):
                ids += [self.special[piece]] if i % 2 else self.tokenizer(
                    self._revealed(piece), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        else:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if (pads := ids.count(self.image_pad_id)) != len(row.images):
            raise UserError(f"row {row.id}: the chat template shows {pads} of {len(row.images)} images; "
                            "use the template published with Qwen2.5-VL")
        return ids, self._revealed(text)

    def _render(self, row: Row, captions: bool) -> str:
        """The chat text, where HIDDEN id HIDDEN stands for each special token that the row's text holds."""
        messages = self.messages(row, captions)
        for part in messages[-1]["content"]:
            if "text" in part:
                part["text"] = self.any_special.sub(lambda m: f"{HIDDEN}{self.special[m[0]]}{HIDDEN}", part["text"])
        problem = f"row {row.id}: the chat template in {self.folder} fails; use the one published with Qwen2.5-VL"
        with _as_user_error(problem):
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        return text

    def _revealed(self, text: str) -> str:
        """Text with the special tokens that `_render` has hidden."""
        names = {str(i): name for name, i in self.special.items()}
        return re.sub(f"{HIDDEN}(\\d+){HIDDEN}", lambda m: names[m[1]], text)

    def _row_grid(self, row: Row, width: int, height: int) -> Grid:
        try:
            return self.image_grid(width, height)
        except UserError as error:
            raise UserError(f"row {row.id}: {error}") from error

    def _slots(self, grid: Grid) -> int:
        """Image tokens of an image."""
        t, h, w = grid
        return t * h * w // self.merge**2

    def _positions(self, length: int, pads: np.ndarray, grid: list[Grid]) -> np.ndarray:
        """Positions (3, L) of a text of `length` tokens whose pads, at the indices `pads`, are expanded to images.

        Text positions count up, equal on all axes. An image that starts at s has t = s, h = s + row, w = s + column on
        its merged grid. The text after it starts one past the largest of these (Qwen2-VL, arXiv 2409.12191, 2.1).
        """
        blocks, start, done = [], 0, 0
        for pad, (t, h, w) in zip(pads, grid, strict=True):
            blocks.append(np.broadcast_to(np.arange(start, start + pad - done), (3, pad - done)))
            start += pad - done
            h, w = h // self.merge, w // self.merge
            blocks.append(start + np.indices((t, h, w)).reshape(3, -1))
            start, done = start + max(h, w), pad + 1
        blocks.append(np.broadcast_to(np.arange(start, start + length - done), (3, length - done)))
        return np.concatenate(blocks, axis=1)

    def _patches(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (height, width, 3) uint8 -> patches (P, 3 * frames * patch * patch) float32.

        Patches of a merge group are consecutive. All frames of a still image are equal.
        """
        height, width, _ = pixels.shape
        m, p = self.merge, self.patch
        pixels = pixels.reshape(height // (m * p), m, p, width // (m * p), m, p, 3)
        pixels = pixels.transpose(0, 3, 1, 4, 6, 2, 5)  # (h / m, w / m, m, m, 3, p, p)
        values = self.levels[np.arange(3)[:, None, None], pixels]
        values = np.repeat(values[:, :, :, :, :, None], self.frames, axis=5)
        return values.reshape(-1, self.patch_dim)


def _fewest_bytes(text: str) -> int:
    """A lower bound of the bytes after the tokenizer's NFC normalisation, which may join four characters to one."""
    return len(text) if text.isascii() or unicodedata.is_normalized("NFC", text) else len(text) // 4


@contextlib.contextmanager
def _as_user_error(problem: str) -> Iterator[None]:
    """Turn exceptions of the block into UserError. transformers, tokenizers and Jinja raise any type, also a bare
    Exception, at damaged or hostile files and templates."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{problem} ({type(error).__name__}: {reason(error)})") from error


def _load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast | Qwen2Tokenizer:
    """The tokenizer, with the chat template that `_chat_template` finds, or else its own."""
    path = Path(folder) / "tokenizer_config.json"
    tree = _read_object(path)
    name = tree.get("tokenizer_class", "Qwen2Tokenizer")
    if not (isinstance(name, str) and name in TOKENIZERS):
        raise UserError(f"{shown(path)}: tokenizer_class={name!r:.100} is not known: one of {', '.join(TOKENIZERS)}")
    template = _chat_template(Path(folder))
    problem = f"{shown(folder)} needs tokenizer.json, tokenizer_config.json and config.json {PUBLISHED}"
    with _as_user_error(problem), _without_marks(Path(folder)) as plain:
        tokenizer = TOKENIZERS[name].from_pretrained(plain, local_files_only=True)
        if not tokenizer("1 + 1")["input_ids"]:
            raise ValueError("text has no tokens")
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


def _chat_template(folder: Path) -> str:
    """The template of processor_config.json, chat_template.json or chat_template.jinja, the first that has one; "" if
    none has. All of them outrank tokenizer_config.json. This is the order of transformers' processors."""
    for path in (folder / "processor_config.json", folder / "chat_template.json"):
        template = _read_object(path).get("chat_template") if path.exists() else None
        if template is not None and not isinstance(template, str):
            raise UserError(f"{shown(path)}: chat_template={template!r:.100}: text is needed, {PUBLISHED}")
        if template:
            return template
    path = folder / "chat_template.jinja"
    return _read_text(path) if path.exists() else ""


@contextlib.contextmanager
def _without_marks(folder: Path) -> Iterator[Path]:
    """The folder, or one of links to its files if some .json begins with a byte-order mark, which transformers does
    not read: that file is copied, as plain UTF-8."""
    marked = set()
    for path in folder.glob("*.json"):
        with open(path, "rb") as file:
            if json.detect_encoding(file.read(4)) != "utf-8":
                marked.add(path)
    if not marked:
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        for path in folder.iterdir():
            plain = Path(scratch) / path.name
            if path in marked:
                plain.write_text(_read_text(path), encoding="utf-8")
            else:
                plain.symlink_to(path.resolve())
        yield Path(scratch)


def _load_images(folder: str | Path) -> Qwen2VLImageProcessorPil:
    """The image processor, its settings checked.

    The class is named because AutoImageProcessor prefers torchvision where that is installed, whose pixels differ in
    the last bits: a recipe would give other results.
    """
    names = [name for name in ("preprocessor_config.json", "processor_config.json") if (Path(folder) / name).exists()]
    path = Path(folder) / (names or ["preprocessor_config.json"])[0]
    _read_object(path)
    with _as_user_error(f"{shown(path)} is not {PUBLISHED}"):
        with _without_marks(Path(folder)) as plain:
            images = Qwen2VLImageProcessorPil.from_pretrained(plain, local_files_only=True)
    for key, count, types, least, most, needed in (
        ("patch_size", 1, int, 1, 1024, "a whole number from 1 to 1024"),
        ("merge_size", 1, int, 1, 64, "a whole number from 1 to 64"),
        ("temporal_patch_size", 1, int, 1, 64, "a whole number from 1 to 64"),
        ("resample", 1, int, 0, 5, "a filter from 0 to 5"),
        ("rescale_factor", 1, (int, float), 1e-9, 1e9, "a positive number"),
        ("image_mean", 3, (int, float), -1e9, 1e9, "three numbers"),
        ("image_std", 3, (int, float), 1e-9, 1e9, "three positive numbers"),
    ):
        value = getattr(images, key, None)
        numbers = [value] if count == 1 else value if isinstance(value, list | tuple) else []
        valid = [isinstance(n, types) and not isinstance(n, bool) and least <= n <= most for n in numbers]
        if len(valid) != count or not all(valid):
            raise UserError(f"{shown(path)}: {key}={value!r:.100}: {needed} is needed, {PUBLISHED}")
    return images


def _read_text(path: Path) -> str:
    """The text of a file in UTF-8, UTF-16 or UTF-32, without a byte-order mark."""
    with _as_user_error(f"{shown(path)} cannot be read"):
        if (size := path.stat().st_size) > MAX_SETTINGS:
            raise ValueError(f"it has {size:,} bytes, more than {MAX_SETTINGS:,}")
        raw = path.read_bytes()
        return raw.decode(json.detect_encoding(raw))


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model folder; refuse one that asks to run code of the folder (auto_map)."""
    try:
        tree = json.loads(_read_text(path))
        if not isinstance(tree, dict):
            raise ValueError(f"{type(tree).__name__} instead of named values")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{shown(path)} is not a JSON object {PUBLISHED}: {reason(error)}") from error
    if "auto_map" in tree:
        raise UserError(f"{shown(path)}: auto_map={tree['auto_map']!r:.100} wants code of the folder to be run, which "
                        "is never done: remove it")
    return tree


def _generation_stops(folder: str | Path) -> set[int]:
    """The end tokens of generation_config.json (Qwen2.5-VL: end of turn, end of text); the file is optional."""
    path = Path(folder) / "generation_config.json"
    if not path.exists():
        return set()
    ids = _read_object(path).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    for i in ids:
        if not (isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 1 << 31):
            raise UserError(f"{shown(path)}: eos_token_id={i!r:.100}: a token's number, or a list of them, is needed")
    return set(ids)
