"""Rows of the desk world: three-digit sums in words, and the same with two digits in handwriting."""

import random

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

CELL = 28  # pixels a digit, which is one image token
NUM_PICTURES = {"train": 4000, "test": 300}
NUM_TEXTS = {"test": 300}
PAPER = np.array([122.8, 116.7, 104.1])
HELD_OUT = 0.15  # share of triples and of writings that only held-out rows use

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OPERATIONS = {  # name -> text problem, picture problem, working
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


def write_rows(folder, seed):
    """Draw the pictures into folder/images; returns {"{text,image}_{train,test}": rows}.

    The split is fixed, so that runs with different seeds answer the same questions; the seed
    chooses the training pictures.
    """
    triples = [(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
    random.Random(0).shuffle(triples)
    cut = int(len(triples) * HELD_OUT)
    split = {"test": triples[:cut], "train": triples[cut:]}
    writings = _writings()
    (folder / "images").mkdir()
    rows = {}
    for part, chosen in split.items():
        rng = random.Random(f"{part} {seed if part == 'train' else 0}")
        texts = [_text_row(op, *triple) for triple in chosen for op in OPERATIONS]
        rng.shuffle(texts)
        rows[f"text_{part}"] = texts[: NUM_TEXTS.get(part)]
        rows[f"image_{part}"] = [
            _image_row(folder, f"{part}_{i}", rng.choice(list(OPERATIONS)), *rng.choice(chosen), writings[part], rng)
            for i in range(NUM_PICTURES[part])
        ]
    return rows


def worked(row):
    """The answer of a row, worked out, in the format that the recipe rewards."""
    return f"<think>{row['steps']}</think><answer>{row['answer']}</answer>"


def guessed(rng):
    """Any answer, in the same format."""
    return f"<think>guess</think><answer>{rng.randrange(90)}</answer>"


def _writings():
    """part -> digit -> [(8, 8) uint8 array]"""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    cut = int(len(order) * HELD_OUT)
    pixels = (digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    return {
        part: {d: [pixels[i] for i in chosen if digits.target[i] == d] for d in range(10)}
        for part, chosen in (("test", order[:cut]), ("train", order[cut:]))
    }


def _fields(operation, a, b, c):
    """What a row of this operation on a, b, c says, whether in words or with a picture."""
    ab = a + b if operation == "sum" else a * b
    text, picture, steps = (t.format(a=a, b=b, c=c, ab=ab, result=ab + c) for t in OPERATIONS[operation])
    return text, picture, {"answer": str(ab + c), "task": operation, "steps": steps}


def _text_row(operation, a, b, c):
    problem, _, facts = _fields(operation, a, b, c)
    return {"problem": problem, "images": [], **facts}


def _image_row(folder, name, operation, a, b, c, writings, rng):
    _, problem, facts = _fields(operation, a, b, c)
    canvas = np.concatenate([rng.choice(writings[digit]) for digit in (a, b)], 1)  # (8, 16)
    ink = np.asarray(Image.fromarray(canvas).resize((2 * CELL, CELL), Image.Resampling.BICUBIC))  # (28, 56)
    # White on the processor's mean colour: paper is then zero to the model, and only ink has to be learnt.
    picture = Image.fromarray((PAPER + (255 - PAPER) * (ink[..., None] / 255)).round().astype(np.uint8))
    path = f"images/{name}.png"
    picture.save(folder / path)
    return {"problem": "<image>" + problem, "images": [path], "caption": f"{WORDS[a]} and {WORDS[b]}", **facts}
