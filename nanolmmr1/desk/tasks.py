"""Rows of the desk recipe: sums of three digits as text, and the same with two digits as an image of handwriting.

Next: ../sokoban/__main__.py, another world.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

CELL = 28  # side of a digit in pixels, which is one image token
NUM_IMAGES = {"train": 4000, "test": 300}
NUM_TEXTS = {"test": 300}
PAPER = np.array([122.8, 116.7, 104.1])  # the processor's mean colour
HELD_OUT = 0.15  # fraction of triples and of handwriting that only held-out rows use

Row = dict[str, Any]
RowsByName = dict[str, list[Row]]  # by {text,image}_{train,test}
Triple = tuple[int, int, int]  # a, b, c of a sum
Digits = dict[int, list[np.ndarray]]  # digit -> (8, 8) uint8 images

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OPERATIONS = {  # name -> problem of text rows, problem of image rows, steps
    "sum": (
        "What is {a} + {b} + {c}?",
        "Add the two digits in the picture and {c}.",
        "{a}+{b}={ab}, {ab}+{c}={result}",
    ),
    "product": (
        "What is {a} * {b} + {c}?",
        "Multiply the two digits in the picture and add {c}.",
        "{a}*{b}={ab}, {ab}+{c}={result}",
    ),
}


def write_rows(folder: Path, seed: int) -> RowsByName:
    """Draw the images into folder/images and return all rows.

    The split is fixed, so that runs with different seeds are tested on the same rows. The seed chooses the training
    images.
    """
    triples = [(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
    random.Random(0).shuffle(triples)
    cut = int(len(triples) * HELD_OUT)
    split = {"test": triples[:cut], "train": triples[cut:]}
    handwriting = _handwriting()
    (folder / "images").mkdir()
    rows: RowsByName = {}
    for part, chosen in split.items():
        rng = random.Random(f"{part} {seed if part == 'train' else 0}")
        texts = [_text_row(operation, triple) for triple in chosen for operation in OPERATIONS]
        rng.shuffle(texts)
        rows[f"text_{part}"] = texts[: NUM_TEXTS.get(part)]
        rows[f"image_{part}"] = [
            _image_row(folder, f"{part}_{i}", rng.choice(list(OPERATIONS)), rng.choice(chosen), handwriting[part], rng)
            for i in range(NUM_IMAGES[part])
        ]
    return rows


def worked(row: Row) -> str:
    """A response with the row's steps and answer, in the format that the recipe rewards."""
    return f"<think>{row['steps']}</think><answer>{row['answer']}</answer>"


def guessed(rng: random.Random) -> str:
    """A response with a random answer, in the same format."""
    return f"<think>guess</think><answer>{rng.randrange(90)}</answer>"


def _handwriting() -> dict[str, Digits]:
    """The images of "train" and "test"."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    cut = int(len(order) * HELD_OUT)
    pixels = (digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    return {
        part: {d: [pixels[i] for i in chosen if digits.target[i] == d] for d in range(10)}
        for part, chosen in (("test", order[:cut]), ("train", order[cut:]))
    }


def _fields(operation: str, a: int, b: int, c: int) -> tuple[str, str, Row]:
    """Problem of the text row, problem of the image row, and the columns that both share."""
    ab = a + b if operation == "sum" else a * b
    text, image, steps = (t.format(a=a, b=b, c=c, ab=ab, result=ab + c) for t in OPERATIONS[operation])
    return text, image, {"answer": str(ab + c), "task": operation, "steps": steps}


def _text_row(operation: str, triple: Triple) -> Row:
    problem, _, shared = _fields(operation, *triple)
    return {"problem": problem, "images": [], **shared}


def _image_row(folder: Path, name: str, operation: str, triple: Triple, handwriting: Digits, rng: random.Random) -> Row:
    _, problem, shared = _fields(operation, *triple)
    a, b, _ = triple
    canvas = np.concatenate([rng.choice(handwriting[digit]) for digit in (a, b)], 1)  # (8, 16)
    ink = np.asarray(Image.fromarray(canvas).resize((2 * CELL, CELL), Image.Resampling.BICUBIC))  # (28, 56)
    # White on the processor's mean colour: the model sees paper as zero and only has to learn the ink.
    image = Image.fromarray((PAPER + (255 - PAPER) * (ink[..., None] / 255)).round().astype(np.uint8))
    path = f"images/{name}.png"
    image.save(folder / path)
    caption = f"{WORDS[a]} and {WORDS[b]}"
    return {"problem": "<image>" + problem, "images": [path], "caption": caption, **shared}
