"""Decontamination: what counts as a repeated row, by words, answers and pictures, on invented rows and on real ones."""

import io
import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from nanolmmr1.data.images import open_image
from nanolmmr1.data.readers import BadRow
from nanolmmr1.data.rows import Row, load_rows
from nanolmmr1.prepare.decontaminate import (
    MAX_BITS,
    MAX_RMS,
    MAX_SHARED,
    MAX_STRETCH,
    MIN_CORRELATION,
    Contamination,
    compare,
    fingerprint,
)

LONG = (
    r"In $\triangle ABC$, point $D$ lies on side $\overline{BC}$ so that $BD = \frac{1}{2}DC$ and "
    r"$\angle BAD=30^\circ$. The area of triangle $ABD$ is 12 square units. What is the area of triangle $ADC$, "
    r"in square units?"
)
OPTIONS = ["20", "24", "30", r"12\sqrt{3}"]
LISTED = "".join(f"\n({letter}) {text}" for letter, text in zip("ABCD", OPTIONS, strict=True))


def png(image):
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def jpeg(image, quality=50):
    image.save(file := io.BytesIO(), "JPEG", quality=quality)
    return open_image(file.getvalue())


def halved(image):
    return image.resize((max(image.width // 2, 1), max(image.height // 2, 1)), Image.Resampling.BICUBIC)


def bordered(image):
    x, y = round(image.width * 0.15), round(image.height * 0.15)
    out = Image.new("RGB", (image.width + 2 * x, image.height + 2 * y), "white")
    out.paste(image, (x, y))
    return out


CHANGES = {
    "JPEG": jpeg,
    "halved": halved,
    "bordered": bordered,
    "all three": lambda image: jpeg(halved(bordered(image))),
}


def drawing(seed, size=(400, 300), lines=6):
    """Black lines and labels on white."""
    image, draws = Image.new("RGB", size, "white"), np.random.default_rng(seed)
    pen = ImageDraw.Draw(image)
    for _ in range(lines):
        pen.line([int(x) for x in draws.integers(40, min(size) - 40, 4)], "black", 3)
        pen.text([int(x) for x in draws.integers(40, min(size) - 40, 2)], "ABC", "black")
    return image


def photo(seed, size=(400, 300)):
    """Dark coarse noise, without a bright border."""
    cells = np.random.default_rng(seed).integers(0, 150, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def prints(row):
    return [fingerprint(open_image(item)) for item in row.images]


def best(index, row):
    """The row of a benchmark that a row looks like most; None if there is none."""
    return next(iter(index.find(row, prints(row))), None)


def find(row, *benchmark):
    """The hit of a training row in a benchmark of these rows."""
    index = Contamination()
    index.add("bench", benchmark)
    return best(index, row)


def same(one, other):
    """Whether two pictures are the same one."""
    hit = find(Row("", "1", [png(one)]), Row("", "2", [png(other)]))
    return hit is not None and hit.picture


@pytest.mark.parametrize(
    "text",
    [
        LONG,
        LONG.upper().replace(r"\TRIANGLE", r"\triangle").replace(r"\OVERLINE", "").replace(r"\FRAC", r"\frac")
        .replace(r"\ANGLE", r"\angle").replace(r"\CIRC", r"\circ"),
        LONG.replace("$", "").replace(r"\frac{1}{2}", r"\dfrac12").replace(r"\overline{BC}", "BC"),
        LONG.replace(r"\triangle", "△").replace(r"\angle", "∠").replace(r"^\circ", "°").replace(" = ", "="),
        LONG.replace("$", r"\(").replace(" ", "\n ").replace(r"\triangle", r"\triangle\,").replace("12", r"\text{12}~"),
        LONG.replace(r"\frac{1}{2}", "½").replace("area", "ａｒｅａ"),
        LONG + LISTED,
        LONG + " " + LISTED.replace("\n", " "),
        LONG + r" $\textbf{(A)}\ 20\qquad\textbf{(B)}\ 24\qquad\textbf{(C)}\ 30$",
        LONG + "\nA. 20\nB. 24\nC. 30",
        "<image>\n" + LONG.replace("point", "<image1> (image 2) [asy] draw((0,0)--(1,1)); label(A); [/asy] point"),
        "Answer the question with care, and think about it step by step before you say anything. " + LONG + " Explain.",
    ],
)  # fmt: skip
def test_a_reformatted_text_is_found(text):
    for one, other in ((text, LONG), (text, LONG + LISTED)):
        hit = find(Row(one, "24"), Row(other, "24", id="7"))
        assert hit and hit.overlap > 0.9 and hit.contaminated, hit


def test_a_number_is_found_with_and_without_commas():
    text = "A town of {} people grows by {} each year for as long as ten years. How many live there then?"
    bench = Row(text.format("1,250,000", "3,000"), "1,280,000")
    for numbers in (("1250000", "3000"), ("1{,}250{,}000", r"3,\!000")):
        hit = find(Row(text.format(*numbers), "1280000"), bench)
        assert hit.overlap == 1.0 and hit.contaminated


def test_a_benchmark_row_with_options_is_found_without_them():
    for text in (LONG, LONG.replace("point $D$", "point (D)")):  # a letter that is no option
        hit = find(Row(LONG, "24"), Row(text + LISTED, "B", id="7", options=OPTIONS))
        assert hit[:5] == ("bench", "7", 1.0, True, False) and hit.contaminated


def test_the_overlap_is_the_share_of_the_benchmark_row():
    words = [f"w{chr(97 + i)}" for i in range(26)]  # 14 sequences
    bench = Row(" ".join(words), "5")
    assert find(Row(" ".join(["x"] * 40 + words + ["y"] * 40), "5"), bench).overlap == 1.0
    assert find(Row(" ".join(words[:20]), "5"), bench).overlap == pytest.approx(8 / 14)
    assert find(Row(" ".join(words[:18]), "5"), bench) is None  # 6 / 14


def test_a_text_with_other_numbers_is_dropped_only_for_the_same_answer():
    changed = LONG.replace("12", "15")
    assert not find(Row(changed, "30"), Row(LONG, "24")).contaminated
    assert find(Row(changed, "24"), Row(LONG, "24")).contaminated
    every = LONG.replace("12", "15").replace("30", "45").replace("{2}", "{3}")
    assert find(Row(every, "24"), Row(LONG, "24")) is None


def test_a_paraphrase_is_not_found():
    text = (
        r"A point $D$ divides side $BC$ of a triangle $ABC$ such that $DC$ is twice as long as $BD$, and the angle "
        r"$BAD$ measures 30 degrees. If triangle $ABD$ has an area of 12, find that of triangle $ADC$."
    )
    assert find(Row(text, "24"), Row(LONG, "24")) is None


def test_a_short_text_must_be_equal_with_answer_and_picture():
    one, other = png(drawing(1)), png(drawing(2))
    text = Row("What is the sum of 17 and 25?", "42")
    assert find(Row("what is the SUM of $17$ and $25$", "42"), text).contaminated
    assert find(Row("what is the SUM of $17$ and $25$", "43"), text) is None
    assert find(Row("Now tell me: What is the sum of 17 and 25?", "42"), text) is None
    pictured = Row("<image>Find x.", "5", [one])
    assert find(Row("Find x.", "5"), pictured) is None
    assert find(Row("<image>Find $x$", "5", [other]), pictured) is None
    assert find(Row("<image>Find $x$", "5", [one]), pictured)[:5] == ("bench", "", 1.0, True, True)
    # The same question to the same picture, whatever the answer: it may only be written in another way.
    for answer in ("6", "5.00 units of length", r"\frac{x}{2}"):
        assert find(Row("<image>Find x.", answer, [one]), pictured).contaminated
    assert find(Row("<image>", "5", [other]), Row("<image>", "5", [one])) is None


def test_a_stem_of_many_questions_is_the_same_only_with_the_same_options():
    stem = "Which of the following is true? (A) {} (B) {} (C) none of these"
    bench = Row(stem.format("1+1=3", "2 is odd"), "C")
    assert find(Row(stem.format("cats bark", "dogs meow"), "C"), bench) is None
    assert find(Row(stem.format("2 is odd", "1+1=3"), "C"), bench).contaminated, "in another order"


def test_machines_and_plans_are_no_options():
    text = "Machine A: {} items an hour. Machine B: {} items. How many items do both make in two hours?"
    assert find(Row(text.format(50, 60), "220"), Row(text.format(100, 10), "220")) is None
    plans = ("Plan A: 20 dollars a month. Plan B: 5 dollars a month and 10 cents a minute. For how many minutes do "
             "they cost the same?")
    assert find(Row(f"Compare. {plans}", "150"), Row(plans, "150")).contaminated


def test_a_sequence_of_many_benchmark_rows_tells_nothing():
    text = "Find the area of the figure. Round your answer to the nearest tenth if it is necessary."
    rows = [Row(text, str(i), id=str(i)) for i in range(MAX_SHARED + 1)]
    assert find(Row(text, "7"), *rows[:-1]).id == "7"
    assert find(Row(text, "7"), *rows) is None
    hit = find(Row(LONG + text, "24"), *rows, Row(text + LONG, "24", id="long"))
    assert hit.id == "long" and hit.overlap > 0.6


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (Row(LONG, "24"), Row(LONG, r"The area is #### 24"), True),
        (Row(LONG, r"\boxed{24}"), Row(LONG, "24 square units"), True),
        (Row(LONG, r"$\frac12$"), Row(LONG, "0.5"), True),
        (Row(LONG, "24"), Row(LONG, "25"), False),
        (Row(LONG, "B"), Row(LONG, "(B)"), True),
        (Row(LONG, "B"), Row(LONG, "C"), False),
        (Row(LONG, "B", options=OPTIONS), Row(LONG + LISTED, "24"), True),
        (Row(LONG, "B"), Row(LONG + LISTED, "24"), True),
        (Row(LONG, "24"), Row(LONG, "B"), False),
        (Row(LONG, "B", options=OPTIONS), Row(LONG, "A", options=["24", "20"]), True),
        (Row(LONG, "B", options=OPTIONS), Row(LONG, "B", options=["24", "20"]), False),
        (Row(LONG, "B. 24"), Row(LONG, "24"), True),
        (Row(LONG, "C", options=list("ABCD")), Row(LONG, "C", options=OPTIONS), True),
        (Row(LONG, "A", options=[r"\sin 2x", "1"]), Row(LONG, "A", options=[r"\sin(2x)", "1"]), True),
        (Row(LONG, "x" * 3000), Row(LONG, "x" * 3000), False),  # too long to be an answer
    ],
)
def test_answers_are_the_same_by_value_or_else_by_letter(one, other, equal):
    for row, bench in ((one, other), (other, one)):
        assert find(row, bench).same_answer == equal == find(row, bench).contaminated


@pytest.mark.parametrize("make", [drawing, photo])
def test_a_changed_picture_is_the_same_one(make):
    for seed in range(3):
        image = make(seed)
        assert not same(make(seed + 100), image) and not same(image.resize((400, 400)), image)
        assert all(same(change(image), image) for change in CHANGES.values())


def test_a_drawing_filled_otherwise_is_another_picture():
    images = [drawing(1, (600, 600)) for _ in range(2)]
    for image, grey in zip(images, ("black", "silver"), strict=True):
        ImageDraw.Draw(image).rectangle((100, 100, 500, 500), grey)
    assert not same(*images)


def test_a_transparent_and_a_grey_picture_are_the_same_as_the_white_and_the_coloured_one():
    image = drawing(3)
    clear = Image.new("RGBA", image.size, (0, 0, 0, 0))
    clear.putalpha(Image.eval(image.convert("L"), lambda value: 255 - value))
    assert same(clear, image) and same(image.convert("L"), image)


def test_pictures_with_little_on_them_are_not_all_the_same():
    white, black = Image.new("RGB", (300, 200), "white"), Image.new("RGB", (300, 200))
    noise = np.random.default_rng(0).integers(-2, 3, (2, 200, 300, 3))
    shade = np.linspace(240, 248, 300)[:, None]  # of a scanned page
    blank = [Image.fromarray((base + each).astype(np.uint8)) for base in (252, shade) for each in noise]
    thin = [drawing(seed, (600, 600), 1) for seed in range(4)]
    pictures = [white, black, *blank, *thin]
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            assert not same(one, other)
    assert all(same(jpeg(image), image) for image in thin)
    assert not same(white, white)  # nothing to compare: the picture tells nothing


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (20000, 3), (3, 20000), (5000, 4000)])
def test_a_picture_of_any_size_has_a_fingerprint(size):
    for color in ("white", "black"):
        image = Image.new("RGB", size, color)
        image.putpixel((0, 0), (90, 90, 90))
        found = fingerprint(image)
        assert found.thumbnail.shape == (32, 32) and found.thumbnail.dtype == np.uint8
        assert 0 <= found.hash < 1 << 64 and np.isfinite(found.aspect)


def test_a_picture_alone_is_reported_and_drops_a_row_with_the_same_text_or_answer():
    image = png(drawing(1))
    bench = Row("<image>" + LONG, "24", [image], id="7")
    other = "<image>How many of the corners of the figure are marked with the letter A in this drawing of a pupil?"
    assert find(Row(other, "3", [image]), bench)[:5] == ("bench", "7", 0.0, False, True)
    assert not find(Row(other, "3", [image]), bench).contaminated
    assert find(Row(other, "24", [image]), bench).contaminated
    assert find(Row("<image>" + LONG, "3", [image]), bench).contaminated
    assert not find(Row("<image>" + LONG, "3", [png(drawing(2))]), bench).contaminated
    assert find(Row("<image><image>" + other, "24", [png(drawing(2)), image]), bench).picture


def test_the_most_telling_hit_is_returned():
    image = png(drawing(1))
    index = Contamination()
    index.add("pictures", [Row("<image>?", "1", [image], id="a")])
    index.add("texts", [Row(LONG, "1", id="b"), Row(LONG + " " + LONG[:200], "24", id="c"), Row(LONG, "24", id="d")])
    for answer, expected in (("24", "d"), ("25", "b")):
        assert best(index, Row(LONG, answer)).id == expected
    row = Row("<image>" + LONG, "25", [image])
    assert best(index, row).id == "b"
    row = Row("<image>" + LONG, "1", [image])
    assert best(index, row).contaminated
    assert not Contamination().find(row, prints(row))


def test_a_broken_picture_of_a_benchmark_is_named():
    with pytest.raises(BadRow, match="image of 3 bytes"):
        Contamination().add("bench", [Row("<image>", "1", [b"abc"])])


@pytest.mark.parametrize(
    "text",
    ["", " \n", "$$", "<image>", "word" * 250_000, "word " * 200_000, "1a" * 100_000, "(A) (B) " * 25_000,
     "[asy]" * 40_000, "\\frac" * 40_000, "1," * 100_000, "\\begin{" * 30_000, "三角形" * 60_000, "\U0001f600" * 9,
     "(A) " * 50_000, "A" * 20_000 + "B. 1", "image " * 30_000, "<" * 200_000],
    ids=lambda text: f"{text[:8]!r} to {len(text)}",
)  # fmt: skip
def test_a_hostile_text_takes_a_few_seconds_at_most(text):
    began = time.perf_counter()
    index = Contamination()
    index.add("bench", [Row(text, text or "1"), Row(LONG, "24", id="7")])
    index.find(Row(text, text or "1"), [])
    assert best(index, Row(LONG + text, "24")).id == "7"
    assert time.perf_counter() - began < 10


SCRIPT = """
import json, sys
from nanolmmr1.data.rows import Row
from nanolmmr1.prepare.decontaminate import Contamination, fingerprint
from PIL import Image
index = Contamination()
index.add("bench", [Row(text, "1", id=str(i)) for i, text in enumerate(json.loads(sys.argv[1]))])
print(index.sequences.tobytes().hex(), index.owners.tolist(), index.find(Row(json.loads(sys.argv[1])[0], "1"), []),
      fingerprint(Image.radial_gradient("L").convert("RGB")))
"""


def test_every_process_finds_the_same():
    texts = json.dumps([LONG, LONG + LISTED, LONG.replace("12", "15"), "Find x."])
    outputs = {
        subprocess.run([sys.executable, "-c", SCRIPT, texts], env=os.environ | {"PYTHONHASHSEED": seed}, check=True,
                       capture_output=True, text=True, cwd=Path(__file__).parents[1]).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1 and "overlap=1.0" in outputs.pop()


def test_an_index_is_small_and_keeps_neither_rows_nor_pictures():
    image, count = png(drawing(1, (100, 100))), 500

    class Rows:  # read one by one
        def __len__(self):
            return 0

        def __iter__(self):
            for i in range(count):
                problem = " ".join(f"{word}{i}" for word in LONG.split())
                yield Row("<image>" + problem, str(i), [image + bytes(100_000)], id=f"row {i}")

    tracemalloc.start()
    index = Contamination()
    index.add("bench", Rows())
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index.known) == count and size < 5000 * count  # 50 MB for 10,000 rows


@pytest.fixture(scope="module")
def gsm8k(shared):
    return [load_rows(str(shared / "data/gsm8k" / f"{split}.jsonl")).rows for split in ("train", "test")]


@pytest.fixture(scope="module")
def mathvision(shared):
    return load_rows(str(shared / "data/mathvision/testmini.jsonl")).rows


def test_real_rows_find_themselves_and_no_others(gsm8k, mathvision):
    (train, test), pictured = gsm8k, mathvision[::3]
    text, pictures = Contamination(), Contamination()
    text.add("gsm8k", test)
    began = time.perf_counter()
    pictures.add("mathvision", pictured)
    print(f"\n{(time.perf_counter() - began) / len(pictured) * 1e3:.1f} ms to read a row with a picture")
    assert all(text.find(row, [])[0].contaminated for row in test)
    for row in pictured:
        hit = best(pictures, row)
        assert hit.contaminated and hit.picture
    began = time.perf_counter()
    hits = [hit for row in train for index in (text, pictures) for hit in index.find(row, [])]
    print(f"{(time.perf_counter() - began) / len(train) / 2 * 1e3:.2f} ms to find a row; hits of other rows: {hits}")
    assert not hits


def test_real_pictures_are_found_after_changes(mathvision):
    images = [open_image(item) for row in mathvision[1::3] for item in row.images]
    originals = [fingerprint(image) for image in images]
    hashes, aspects = np.array([each.hash for each in originals], np.uint64), np.array([e.aspect for e in originals])
    thumbnails = np.stack([each.thumbnail for each in originals])

    def measures(found):  # of a picture to every original
        rms, correlation = compare(thumbnails, found.thumbnail)
        tests = [np.bitwise_count(hashes ^ np.uint64(found.hash)) <= MAX_BITS, rms <= MAX_RMS,
                 correlation >= MIN_CORRELATION, np.abs(aspects - found.aspect) <= MAX_STRETCH]  # fmt: skip
        return np.stack([*tests, np.logical_and.reduce(tests)]), rms

    recall = {name: np.mean([measures(fingerprint(change(image)))[0][:, i] for i, image in enumerate(images)], 0)
              for name, change in CHANGES.items()}  # fmt: skip
    together, others = np.array([row for row in recall.values()]), np.eye(len(images), dtype=bool)
    tests, rms = zip(*(measures(each) for each in originals), strict=True)
    matched = np.stack(tests, 1) & ~others
    far = matched & (np.stack(rms) > 0.1)
    print(f"\n{'':12}{'  '.join(f'{name:>9}' for name in CHANGES)}  match others, far")
    for i, name in enumerate(("dHash", "RMS", "correlation", "shape", "together")):
        row = "  ".join(f"{value:9.3f}" for value in together[:, i])
        print(f"{name:12}{row}  {matched[i].any(1).sum():5} {far[i].any(1).sum():5}")
    assert (together[:, :4] >= 0.96).all() and (together[:, 4] >= [0.98, 0.95, 0.96, 0.95]).all()
    assert matched[4].any(1).sum() <= 5 and not far[4].any()
