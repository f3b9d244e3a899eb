"""Captions: what is asked, what leaks, and that a kill loses nothing."""

import json

import pytest
import test_passrate
from PIL import Image
from test_passrate import kill_and_go_on, rows_of, run_main, write

from nanolmmr1 import caption
from nanolmmr1.caption import leaks
from nanolmmr1.data.prompt import Processor
from nanolmmr1.data.rows import Row
from nanolmmr1.errors import UserError

nursery = test_passrate.nursery  # a fixture
OPTIONS = "Which is it?\n(A) 12\n(B) 15\n(C) 20\n(D) 25"
KITES = "Which kite has the longest string?\n(A)\n(B)\n(C)\n(D)\n(E)"
LEAKS = [  # problem, gold answer, caption, whether it leaks
    ("Which? (A) 1 (B) 2", "B", "In triangle ABC, angle B is right.", False),
    ("Which? (A) 1 (B) 2", "A", "The triangle with the angle at A is right-angled.", False),
    ("Which? (A) 1 (B) 2", "B", "The correct option is B.", True),
    ("Which? (A) 1 (B) 2", "B", "(B) is the right option.", True),
    ("What is the area?", "12", "A rectangle; its area is 12.", True),
    ("What is the area?", "12", "A rectangle of 3 by 4.", False),
    ("What is the area?", "12", "A rectangle of 12.5 by 4.", False),
    ("What is the area?", "12", "Points A12 and x_12, and 112 dots.", False),
    ("What is the area?", "12", "A side is labelled 12cm.", True),
    ("What is the area of a side of 12?", "12", "A side is labelled 12.", False),
    ("What is the area of a side of 12?", "12", "So the answer is 12.", True),
    ("How many are there?", "3", "There are three triangles.", True),
    ("How many are there?", "1", "One of the sides is longer.", False),
    ("How many are there?", "2", "1. A circle.\n2. A square.", False),
    ("How many are there?", "1400", "The sum of 1,400 people is shown.", True),
    ("How many are there?", "1", "The sum of 1,400 people is shown.", False),
    ("How much is it?", "0.5", r"A pie with $\frac{1}{2}$ of it shaded.", True),
    ("How much is it?", "2", r"A pie with $\frac{1}{2}$ of it shaded.", False),
    ("How much is it?", "28%", "A bar is labelled 28%.", True),
    ("How much is it?", "-3", "The curve meets the axis at -3.", True),
    ("How much is it?", "3", "The curve meets the axis at -3.", False),
    ("How much is it?", "7", "The clock shows 7:30.", False),
    ("How much is it?", "2", "The curve is y = x^2.", False),
    ("How much is it?", "5", "\u8fb9\u957f\u4e3a5\u5398\u7c73\u3002", True),
    ("Find the angle.", r"65^\circ", "Angle ABC is 65\u00b0.", True),
    ("Find the length.", r"2\sqrt{3}", "The side is 2\u221a3 long.", True),
    ("Find the length.", r"2\sqrt{3}", "The side is 12\u221a3 long.", False),
    ("Which colour?", "red", "A red ball beside a blue one.", True),
    ("Which colour?", "red", "A shared, coloured border.", False),
    ("Is the ball red or blue?", "red", "A red ball.", False),
    ("Is it a square?", "no", "There are no labels.", False),
    ("Is it a square?", "No", "The answer is no.", True),
    (KITES, "C", "Kites A, B, C, D and E with strings.", False),
    (KITES, "C", "Option C shows a kite.", False),
    (KITES, "C", "The answer is C.", True),
    (KITES, "C", "The answer is B.", False),
    (KITES, "C", "The longest is seen: C is the correct one.", True),
    (KITES, "C", r"Therefore \boxed{C}", True),
    (OPTIONS, "B", "The side is 15.", True),
    (OPTIONS, "B", "The side is 12.", False),
    (OPTIONS, "B", "Options 12, 15, 20 and 25 are listed.", False),
    ("With a side of 15. " + OPTIONS, "B", "The side is 15.", False),
    (OPTIONS, "15", "The side is 15.", True),
    (OPTIONS, "15", "Options 12, 15, 20 and 25 are listed.", False),
]


@pytest.mark.parametrize(("problem", "answer", "text", "expected"), LEAKS)
def test_a_leak_is_a_caption_that_states_the_gold_answer(problem, answer, text, expected):
    assert leaks(text, Row(problem, answer)) == expected


def picture(path, colour, kind="PNG"):
    Image.new("RGB", (60, 40), colour).save(path, kind)
    return path.name


@pytest.fixture
def rows(tmp_path):
    """Four pictures in six rows, one of which is text."""
    names = [picture(tmp_path / f"{colour}.png", colour) for colour in ("red", "green", "blue", "white")]
    records = [{"problem": "<image> What?", "answer": "7", "images": names[:1], "category": "plot"},
               {"problem": "<image> Which?", "answer": "9", "images": names[:1], "category": "plot"},
               {"problem": "<image><image> Where?", "answer": "8", "images": names[1:3], "category": "other"},
               {"problem": "<image> Whose?", "answer": "right here", "images": names[3:]},
               {"problem": "How much is 1 + 1?", "answer": "2", "caption": "of its own"},
               {"problem": "How much is 1 + 2?", "answer": "3"}]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def captions_of(out):
    return [row.get("caption") for row in rows_of(out)]


def test_every_picture_is_described_once_and_rows_of_text_stay(rows, small_model, capsys):
    out = rows.with_name("out.jsonl")
    assert run_main(caption, small_model, rows, out, "caption.max_tokens=3") == 0
    found = captions_of(out)
    assert found[0] and found[0] == found[1] and found[4:] == ["of its own", None]
    assert found[2].startswith("Image 1: ") and "\nImage 2: " in found[2]
    said = capsys.readouterr().out
    assert "captioning: 4/4" in said and "cut off at caption.max_tokens" in said
    assert run_main(caption, small_model, rows, out, "caption.max_tokens=3") == 0
    assert "captioning" not in capsys.readouterr().out and captions_of(out) == found


def test_the_kind_of_a_row_picks_the_instruction_and_no_system_prompt_is_shown(rows, small_model, monkeypatch):
    shown = []
    prepare = Processor.prepare
    monkeypatch.setattr(Processor, "prepare", lambda self, row, _: shown.append(prepare(self, row, _).text)
                        or prepare(self, row, _))  # fmt: skip
    changes = ["caption.max_tokens=1", "caption.kind_column=category", "caption.by_kind={plot: Read the plot.}",
               "caption.template=Look.", "prompt.system=Solve it.", "prompt.template=Now! {problem}"]  # fmt: skip
    assert run_main(caption, small_model, rows, rows.with_name("out.jsonl"), *changes) == 0
    assert len(shown) == 4 and [("Read the plot." in text, "Look." in text) for text in shown] == [
        (True, False), (False, True), (False, True), (False, True)]  # fmt: skip
    assert not any("Solve it" in text or "Now!" in text or "What?" in text for text in shown)


def test_leaks_are_counted_dropped_or_sampled_again(rows, small_model, monkeypatch, capsys):
    arguments = [small_model, rows, rows.with_name("out.jsonl"), "caption.max_tokens=3"]
    run_main(caption, *arguments)
    first = captions_of(arguments[2])

    def first_leaks(text, row):
        return text == first[0] and row.answer == "7"

    monkeypatch.setattr(caption, "leaks", first_leaks)
    for leak, expected in (("keep", first[0]), ("drop", None)):
        assert run_main(caption, *arguments, "--leak", leak) == 0
        assert captions_of(arguments[2]) == [expected, *first[1:]]
    capsys.readouterr()
    assert run_main(caption, *arguments, "--leak", "redo") == 0
    again = captions_of(arguments[2])
    assert again[0] and again[0] != first[0] and again[1:] == first[1:]
    assert "attempt 2: 1/1" in capsys.readouterr().out

    monkeypatch.setattr(caption, "leaks", lambda text, row: row.answer == "7")
    assert run_main(caption, *arguments, "--leak", "redo") == 0
    assert captions_of(arguments[2]) == [None, *first[1:]]
    said = capsys.readouterr().out
    assert "attempt 2" not in said and "attempt 3: 1/1" in said and "attempt 4: 1/1" in said


def test_templates_that_cannot_work_are_refused(rows, small_model):
    for change, words in (("caption.template=See <image>", "put before it"), ("caption.template=", "empty"),
                          ("caption.by_kind={plot: Read.}", "kind_column")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            caption.main([str(small_model), str(rows), str(rows.with_name("out.jsonl")), change])


def test_five_kills_change_no_caption(small_model, tmp_path, nursery):
    records = []
    for number in range(320):
        Image.new("RGB", (28, 28), (number % 256, number // 256, 0)).save(tmp_path / f"{number}.png")
        records.append({"problem": "<image>?", "answer": "7", "images": [f"{number}.png"]})
    rows = write(tmp_path / "rows.jsonl", records)
    options = ["caption.template=Look.", "caption.max_tokens=4", "caption.first_temperature=1", "--leak", "redo"]
    out = kill_and_go_on(nursery, tmp_path, "caption", small_model, rows, *options)
    assert len(set(captions_of(out))) > 100
