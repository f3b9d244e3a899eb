"""From a row to what the model reads: chat text, token ids, image patches and 3-D positions.

The only place that knows tokenizer and image processor. A picture is resized once, here, and the same pixels
serve trainer and sampler. The number of prompt tokens follows from picture sizes by arithmetic, so a data set
is measured without decoding a pixel. A problem that contains the text of a special token is refused: image
tokens then stand exactly where this file put them, and no data can end a turn or open another.

Next: pack.py, where a prompt and its responses share one token axis.
"""

import contextlib
import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from nanolmmr1.data.rows import MARKER, Row, image_size, open_image, reason, shown
from nanolmmr1.errors import UserError

MAX_ASPECT = 200  # as in Qwen2.5-VL's own smart_resize
# Named rather than found by AutoTokenizer, which asks on the terminal whether to run a folder's own code.
TOKENIZERS = {"Qwen2Tokenizer": Qwen2Tokenizer, "Qwen2TokenizerFast": Qwen2Tokenizer,
              "PreTrainedTokenizerFast": PreTrainedTokenizerFast, "TokenizersBackend": PreTrainedTokenizerFast}
PUBLISHED = "as published with Qwen2.5-VL"


@dataclass
class Prompt:
    """A row made ready: L prompt tokens, P image patches, K image tokens (a patch's merge group each)."""

    row: Row
    ids: torch.Tensor  # (L,) int64
    positions: torch.Tensor  # (3, L) int64: temporal, height, width
    patches: torch.Tensor  # (P, 1176) float32
    grid: torch.Tensor  # (images, 3) int64: t, h, w in patches
    image_slots: torch.Tensor  # (K,) int64: where in ids the image features go
    text: str  # as rendered, one <|image_pad|> an image

    @property
    def next_position(self):
        """The position, on all three axes, of every response's first token."""
        return int(self.positions.max()) + 1


class Processor:
    """Tokenizer and image processor of a Qwen2.5-VL folder, with a recipe's templates and pixel limits.

    Raises:
        UserError: the folder or a template lacks something, or a text holds a special token.
    """

    def __init__(self, folder, cfg):
        self.cfg, self.folder = cfg, shown(folder)
        if not (Path(folder) / "tokenizer.json").is_file():  # transformers would make an empty one, silently
            raise UserError(f"{self.folder} has no tokenizer.json: give the folder of a Qwen2.5-VL")
        self.tokenizer = _load_tokenizer(folder)
        if not self.tokenizer.chat_template:
            raise UserError(f"the tokenizer in {self.folder} has no chat template: copy Qwen2.5-VL's "
                            "tokenizer_config.json")
        added = self.tokenizer.added_tokens_decoder
        self.special = {token.content: i for i, token in added.items() if token.special}
        if "<|image_pad|>" not in self.special:
            raise UserError(f"the tokenizer in {self.folder} has no <|image_pad|> token: a Qwen2.5-VL folder is needed")
        self.image_pad_id = self.special["<|image_pad|>"]
        vision = ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
        self.banned_ids = [self.special[f"<|{name}|>"] for name in vision if f"<|{name}|>" in self.special]
        self.longest_token = max(map(len, self.tokenizer.get_vocab()))  # in bytes: each stands there as a character
        stops = _generation_stops(folder) | {self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}
        self.stop_ids = sorted(stops - {None})

        images = _load_images(folder)
        self.patch, self.merge, self.frames = images.patch_size, images.merge_size, images.temporal_patch_size
        self.patch_dim, self.resample = 3 * self.frames * self.patch**2, images.resample
        # A channel has 256 values, so rescaling and normalising is a table; made by the processor, it is exact.
        ramp = np.tile(np.arange(256, dtype=np.uint8), (3, 1, 1))  # (3, 1, 256)
        ramp = images.normalize(images.rescale(ramp, images.rescale_factor), images.image_mean, images.image_std)
        self.levels = ramp[:, 0].astype(np.float32)  # (3, 256)

        for key, needed in (("system", ""), ("template", "{problem}"), ("caption_template", "{caption}")):
            text = getattr(cfg, key)
            self._refuse_special(text, f"prompt.{key}")
            if needed and text.count(needed) != 1:
                raise UserError(f"prompt.{key}={text!r}: {needed} must stand in it once")
            if MARKER in text:
                raise UserError(f"prompt.{key}={text!r}: {MARKER} belongs in the rows' problems")
        # The template is a program: what is wrong with it should show now, and not at the first prompt.
        if "1 + 1 = ?" not in self._render(Row("1 + 1 = ?", "2", id="made up, of text"), False):
            raise UserError(f"the chat template in {self.folder} does not show a problem's text, as of a text model; "
                            "use the one published with Qwen2.5-VL")
        self._render(Row(f"{MARKER}How many?", "2", [b""], id="made up, with an image"), False)

    def messages(self, row, captions):
        """Chat messages: text and image parts in the order of the problem's markers.

        With captions, the row's caption stands before its first image (or first, where there is none).
        """
        where = f"row {row.id}"
        self._refuse_special(row.problem, f"{where}: problem")
        first, *rest = self.cfg.template.replace("{problem}", row.problem).split(MARKER)
        assert len(rest) == len(row.images), f"{where}: {len(rest)} markers, {len(row.images)} images"
        if captions and row.caption:
            self._refuse_special(row.caption, f"{where}: caption")
            caption = self.cfg.caption_template.replace("{caption}", row.caption)
            first = first + caption if rest else caption + first
        parts = [{"type": "text", "text": first}]
        for text in rest:
            parts += [{"type": "image"}, {"type": "text", "text": text}]
        system = [{"role": "system", "content": self.cfg.system}] if self.cfg.system else []
        return system + [{"role": "user", "content": [part for part in parts if part.get("text") != ""]}]

    def at_least(self, row, captions):
        """The fewest tokens that the row's texts can have by their length; nothing is tokenised."""
        return sum(_fewest_bytes(text) for text in (row.problem, row.caption * captions)) // self.longest_token

    def measure(self, row, captions):
        """(tokens, image patches) of what `prepare` would make of the row, from picture headers alone."""
        ids, _ = self._tokenize(row, captions)
        grids = [self._grid_of(row, *image_size(item)) for item in row.images]
        return len(ids) + sum(self._slots(g) - 1 for g in grids), sum(t * h * w for t, h, w in grids)

    def image_grid(self, width, height):
        """(t, h, w) in patches of a picture of width x height pixels after resizing: arithmetic only.

        Raises:
            UserError: one side is more than 200 times the other.
        """
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise UserError(f"an image of {width} x {height} pixels is too thin: crop it until one side is at most "
                            f"{MAX_ASPECT} times the other")
        height, width = smart_resize(height, width, self.patch * self.merge, self.cfg.min_pixels, self.cfg.max_pixels)
        return 1, height // self.patch, width // self.patch

    def resized(self, row):
        """The row's pictures, RGB, at the size the model sees: what any other sampler engine must be given."""
        pictures = []
        for item in row.images:
            picture = open_image(item)
            _, h, w = self._grid_of(row, *picture.size)
            pictures.append(picture.resize((w * self.patch, h * self.patch), self.resample))
        return pictures

    def prepare(self, row, captions):
        """The row as a Prompt; opens and resizes its pictures."""
        ids, text = self._tokenize(row, captions)
        ids = np.array(ids)
        pads = np.flatnonzero(ids == self.image_pad_id)  # (images,)
        pictures = self.resized(row)
        grid = [(1, picture.height // self.patch, picture.width // self.patch) for picture in pictures]
        repeats = np.ones_like(ids)
        repeats[pads] = [self._slots(g) for g in grid]
        positions = self._positions(len(ids), pads, grid)
        ids = np.repeat(ids, repeats)
        patches = [self._patches(np.asarray(picture)) for picture in pictures]
        return Prompt(
            row=row, ids=torch.from_numpy(ids), positions=torch.from_numpy(positions),
            patches=torch.from_numpy(np.concatenate([np.empty((0, self.patch_dim), np.float32), *patches])),
            grid=torch.tensor(grid, dtype=torch.int64).view(-1, 3),
            image_slots=torch.from_numpy(np.flatnonzero(ids == self.image_pad_id)), text=text)

    def decode(self, ids):
        """Text of response ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _tokenize(self, row, captions):
        """(token ids with one pad an image, chat text)."""
        text = self._render(row, captions)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if (pads := ids.count(self.image_pad_id)) != len(row.images):
            raise UserError(f"row {row.id}: the chat template shows {pads} of {len(row.images)} images; "
                            "use the template published with Qwen2.5-VL")
        return ids, text

    def _render(self, row, captions):
        messages = self.messages(row, captions)
        with _blaming(f"row {row.id}: the chat template in {self.folder} fails; use the one published with Qwen2.5-VL"):
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _refuse_special(self, text, where):
        for token in self.special:
            if token in text:
                raise UserError(f"{where} contains {token}, a special token of the model: remove it")

    def _grid_of(self, row, width, height):
        try:
            return self.image_grid(width, height)
        except UserError as error:
            raise UserError(f"row {row.id}: {error}") from error

    def _slots(self, grid):
        t, h, w = grid
        return t * h * w // self.merge**2

    def _positions(self, length, pads, grid):
        """Positions (3, L) of `length` tokens in which each of `pads` stands for a whole image.

        Text counts on, alike on all axes. An image starting at s has t = s, h = s + row, w = s + column over its
        merged grid, and the text after it goes on past the largest of these (Qwen2-VL, arXiv 2409.12191, 2.1).
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

    def _patches(self, pixels):
        """Pixels (height, width, 3) uint8 -> patches (P, 3 * frames * patch * patch) float32.

        Patches of one merge group are neighbours; a still picture is its own second frame.
        """
        height, width, _ = pixels.shape
        m, p = self.merge, self.patch
        pixels = pixels.reshape(height // (m * p), m, p, width // (m * p), m, p, 3)
        pixels = pixels.transpose(0, 3, 1, 4, 6, 2, 5)  # (h / m, w / m, m, m, 3, p, p)
        values = self.levels[np.arange(3)[:, None, None], pixels]
        values = np.repeat(values[:, :, :, :, :, None], self.frames, axis=5)
        return values.reshape(-1, self.patch_dim)


def _fewest_bytes(text):
    """Of the text once the tokenizer has normalised it: NFC makes one character of up to four."""
    return len(text) if text.isascii() or unicodedata.is_normalized("NFC", text) else len(text) // 4


@contextlib.contextmanager
def _blaming(what):
    """Turn whatever the block raises into a UserError: transformers, tokenizers and Jinja raise any type, bare
    Exception too, at files and templates that are damaged or hostile."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} ({type(error).__name__}: {reason(error)})") from error


def _load_tokenizer(folder):
    path = Path(folder) / "tokenizer_config.json"
    tree = _read_object(path)
    name = tree.get("tokenizer_class", "Qwen2Tokenizer")
    if not (isinstance(name, str) and name in TOKENIZERS):
        raise UserError(f"{shown(path)}: tokenizer_class={name!r:.100} is not known: one of {', '.join(TOKENIZERS)}")
    with _blaming(f"{shown(folder)} needs tokenizer.json, tokenizer_config.json and config.json {PUBLISHED}"):
        tokenizer = TOKENIZERS[name].from_pretrained(folder, local_files_only=True)
        if not tokenizer("1 + 1")["input_ids"]:
            raise ValueError("it makes no tokens of text")
        return tokenizer


def _load_images(folder):
    """The image processor. Named rather than found by AutoImageProcessor, which prefers torchvision where that is
    installed: its pixels differ in the last bits, and one recipe would mean two things."""
    path = next((path for name in ("preprocessor_config.json", "processor_config.json")
                 if (path := Path(folder) / name).exists()), Path(folder) / "preprocessor_config.json")
    _read_object(path)
    with _blaming(f"{shown(path)} is not {PUBLISHED}"):
        images = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)

    def number(value, least, most):
        return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most

    def whole(value, least, most):
        return number(value, least, most) and isinstance(value, int)

    for key, good, wanted in (
        ("patch_size", lambda v: whole(v, 1, 1024), "a whole number from 1 to 1024"),
        ("merge_size", lambda v: whole(v, 1, 64), "a whole number from 1 to 64"),
        ("temporal_patch_size", lambda v: whole(v, 1, 64), "a whole number from 1 to 64"),
        ("resample", lambda v: whole(v, 0, 5), "a filter from 0 to 5"),
        ("rescale_factor", lambda v: number(v, 1e-9, 1e9), "a positive number"),
        ("image_mean", lambda v: _three(v, lambda x: number(x, -1e9, 1e9)), "three numbers"),
        ("image_std", lambda v: _three(v, lambda x: number(x, 1e-9, 1e9)), "three positive numbers"),
    ):
        value = getattr(images, key, None)
        if not good(value):
            raise UserError(f"{shown(path)}: {key}={value!r:.100}: {wanted} is needed, {PUBLISHED}")
    return images


def _three(values, good):
    return isinstance(values, list | tuple) and len(values) == 3 and all(map(good, values))


def _read_object(path):
    """A JSON object of a model folder in which no key asks for code of the folder's own.

    Raises:
        UserError: missing, not that, or such a key.
    """
    try:
        tree = json.loads(path.read_bytes())
        if not isinstance(tree, dict):
            raise ValueError(f"{type(tree).__name__} instead of named values")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{shown(path)} is not a JSON object {PUBLISHED}: {reason(error)}") from error
    if "auto_map" in tree:
        raise UserError(f"{shown(path)}: auto_map={tree['auto_map']!r:.100} wants code of the folder to be run, which "
                        "is never done: remove it")
    return tree


def _generation_stops(folder):
    """The end tokens that generation_config.json names (Qwen2.5-VL: end of turn, end of text), if there is one."""
    path = Path(folder) / "generation_config.json"
    if not path.exists():
        return set()
    ids = _read_object(path).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    for i in ids:
        if not (isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 1 << 31):
            raise UserError(f"{shown(path)}: eos_token_id={i!r:.100}: a token's number, or a list of them, is needed")
    return set(ids)
