"""Chats, and rows as common data sets publish them: what becomes problem, answer, options and pictures."""

import base64
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from nanolmmr1.data import chat
from nanolmmr1.data.rows import load_rows
from nanolmmr1.errors import UserError

SCHEMAS = Path(__file__).resolve().parents[2] / "shared" / "notes" / "schemas.json"


def picture(width=8, height=6, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, kind)
    return file.getvalue()


URI = "data:image/png;base64," + base64.b64encode(picture()).decode()


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def text(text):
    return {"type": "text", "text": text}


def load(folder, *records, columns=None, **options):
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(picture())
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_rows(str(folder / "rows.jsonl"), columns, **options)


def only(folder, record, **options):
    """(problem, answer, names of the pictures or their bytes) of one record."""
    (row,) = load(folder, record, **options).rows
    return row.problem, row.answer, [item if isinstance(item, bytes) else Path(item).name for item in row.images]


LMM_R1 = [{"role": "system", "content": "S"}, user([text("Which? A. l B. r"), {"type": "image", "image": "a.png"}])]
VERL = dict(data_source="d", prompt=[user("<image>Find x.")], images=[{"image": "a.png"}], ability="math",
            reward_model=dict(style="rule", ground_truth="12"), extra_info=dict(split="train", answer="12"))
TRL = dict(prompt=[user([{"type": "image"}, text("Find x.")])], images=["a.png"], solution="<answer> 3 </answer>")
LLAVA = dict(image=["a.png", "b.png"], conversations=[{"from": "human", "value": "<image><image>\nWhich? (A) (B)"},
                                                      {"from": "gpt", "value": "B"}])
SWIFT = dict(messages=[user("<image>How many?"), assistant("7")], images=["a.png"])


@pytest.mark.parametrize("record, columns, expected", [
    (dict(question="Which? A. l B. r", answer="A", message=json.dumps(LMM_R1)), {},
     ("Which? A. l B. r<image>", "A", ["a.png"])),
    (dict(question="Which? A. l B. r", answer="A", message=json.dumps(LMM_R1)), dict(problem="question"),
     ("<image>Which? A. l B. r", "A", ["a.png"])),
    (dict(question="Which? A. l B. r", answer="A", message=json.dumps(LMM_R1)), dict(problem="message"),
     ("Which? A. l B. r<image>", "A", ["a.png"])),
    (dict(id="1", message=LMM_R1, answer="A"), {}, ("Which? A. l B. r<image>", "A", ["a.png"])),
    (VERL, {}, ("<image>Find x.", "12", ["a.png"])),
    (VERL, dict(problem="prompt", answer="reward_model.ground_truth"), ("<image>Find x.", "12", ["a.png"])),
    (VERL, dict(answer="extra_info.split"), ("<image>Find x.", "train", ["a.png"])),
    (VERL | dict(reward_model=json.dumps(VERL["reward_model"])), {}, ("<image>Find x.", "12", ["a.png"])),
    (TRL, {}, ("<image>Find x.", "<answer> 3 </answer>", ["a.png"])),
    (TRL, dict(problem="prompt", answer="solution"), ("<image>Find x.", "<answer> 3 </answer>", ["a.png"])),
    (dict(prompt="1+1?", completion=[assistant("2")]), {}, ("1+1?", "2", [])),
    (dict(prompt=[user("1+1?")], completion=[assistant("2")]), {}, ("1+1?", "2", [])),
    (LLAVA, {}, ("<image><image>\nWhich? (A) (B)", "B", ["a.png", "b.png"])),
    (LLAVA, dict(problem="conversations"), ("<image><image>\nWhich? (A) (B)", "B", ["a.png", "b.png"])),
    (LLAVA | dict(answer="A"), {}, ("<image><image>\nWhich? (A) (B)", "A", ["a.png", "b.png"])),
    (SWIFT, {}, ("<image>How many?", "7", ["a.png"])),
    (SWIFT, dict(problem="messages", answer="messages"), ("<image>How many?", "7", ["a.png"])),
    (SWIFT | dict(solution="8"), {}, ("<image>How many?", "8", ["a.png"])),
    (dict(messages=[user([text("How "), {"type": "image_url", "image_url": {"url": URI}}, text("many?")]),
                    assistant([text("7")])]), {}, ("How <image>many?", "7", [picture()])),
    (dict(messages=[user([{"type": "input_text", "text": "How many?"}, {"type": "input_image", "image_url": URI}])],
          answer="7"), {}, ("How many?<image>", "7", [picture()])),
    (dict(messages=[user([{"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                                      "data": URI.partition(",")[2]}}, "Q"])], answer="7"), {},
     ("<image>Q", "7", [picture()])),
    (dict(messages=[user([{"image": "a.png"}, {"text": "Q"}])], answer="7"), {}, ("<image>Q", "7", ["a.png"])),
    (dict(messages=[user([{"image": "a.png", "text": "Q"}])], answer="7"), {}, ("<image>Q", "7", ["a.png"])),
    # The text has markers of its own beside the picture parts.
    (dict(messages=[user([{"type": "image", "image": "a.png"}, text("See <image>.")])], answer="7"), {},
     ("See <image>.", "7", ["a.png"])),
    (dict(messages=[user("One."), user("Two?"), assistant("3"), assistant("4")]), {}, ("One.\nTwo?", "4", [])),
    (dict(messages=[assistant("Ask me."), user("1+1?"), assistant("2")]), {}, ("1+1?", "2", [])),
    (dict(messages=str([user("It's?"), assistant("2")])), {}, ("It's?", "2", [])),
    (dict(problem="Q", answer="3", messages=SWIFT["messages"]), {}, ("Q", "3", [])),
    (dict(problem="Q", answer="3", pics=[user([{"type": "image", "image": "a.png"}])]), dict(images="pics"),
     ("<image>Q", "3", ["a.png"])),
    (dict(problem="[1, 2] + [3]?", answer="[1, 2, 3]"), {}, ("[1, 2] + [3]?", "[1, 2, 3]", [])),
    (dict(problem="[1]", answer="{1}"), {}, ("[1]", "{1}", [])),
    # Parquet gives every turn and part the keys of all others.
    (dict(conversations=[{"role": None, "content": None, "from": "human", "value": "1+1?"},
                         {"role": None, "content": None, "from": "gpt", "value": "2"}]), {}, ("1+1?", "2", [])),
    (dict(message=[user([{"type": "image", "index": 1, "text": None}, text("Q")])], question="Q", images=["a.png"],
          answer="7"), {}, ("<image>Q", "7", ["a.png"])),
])
def test_a_chat_of_every_layout_is_read(tmp_path, record, columns, expected):
    assert only(tmp_path, record, columns=columns) == expected


def test_a_chat_in_parquet_is_read_though_its_parts_have_all_keys(tmp_path):
    part = dict(type=None, text=None, image=None)
    chat = [user([part | dict(type="image", image=dict(bytes=picture(), path=None)), part | text("Q")])]
    table = pyarrow.Table.from_pylist([dict(prompt=chat, reward_model=dict(style="rule", ground_truth="12"))])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (row,) = load_rows(str(tmp_path / "a.parquet")).rows
    assert (row.problem, row.answer, row.images) == ("<image>Q", "12", [picture()])


@pytest.mark.parametrize("messages, kind, words", [
    ([user("1?"), assistant("1"), user("2?"), assistant("2")], "conversation of several turns", "speaks again"),
    ([user("1?"), {"role": "tool", "content": "x"}, assistant("1")], "turn of an unknown role", "'tool'"),
    ([user([{"type": "video", "video": "x.mp4"}, text("?")]), assistant("1")], "has a video", "'video'"),
    ([user([{"type": "video_url", "video_url": {"url": "x"}}]), assistant("1")], "has a video", "'video_url'"),
    ([user([{"type": "input_audio"}]), assistant("1")], "has audio", "'input_audio'"),
    ([user([{"type": "file", "file": "x"}]), assistant("1")], "has an unknown part", "'file'"),
    ([user([7]), assistant("1")], "unknown part of a chat", "7"),
    ([user([{"type": "image"}, text("Q")]), assistant("1")], "picture missing", "neither it nor the row"),
    ([user(""), assistant("1")], "no problem", "no problem"), ([user("1?")], "no answer", "no answer"),
    ([assistant("1")], "no problem", "no problem"),
])
def test_a_chat_that_is_no_problem_with_an_answer_is_dropped_and_counted(tmp_path, messages, kind, words):
    loaded = load(tmp_path, dict(messages=messages), SWIFT)
    assert len(loaded.rows) == 1 and loaded.dropped == {kind: 1}
    assert "rows.jsonl:1: " in loaded.notes[-1] and words in loaded.notes[-1]


@pytest.mark.parametrize("value", [None, "", [], {}, 7, "text", "[1, 2]", "[broken", [1], [{}], [{"role": "user"}],
                                   [{"role": 1, "content": ""}], [user("a"), "b"], "[" * 100_000, '{"a": 1}',
                                   "[" + "{}," * 2_000_000 + "{}]"])
def test_what_is_no_chat(value):
    assert chat.turns(value) is None


def test_how_a_source_was_read_is_noted(tmp_path):
    message = [{"role": "system", "content": "S"}, user("1+1?")]
    notes = load(tmp_path, dict(message=message, reward_model=dict(ground_truth="2")), dict(problem="Q", answer="3"),
                 dict(LLAVA, image="a.png"), VERL).notes
    name = str(tmp_path / "rows.jsonl")
    assert notes == [
        f"{name}: 3 of 4 rows read; 1 of 3 rows have pictures",
        f"{name}: rows read as: verl (1)",
        f"{name}: problem from the chat in 'message' (1), 'problem' (1), the chat in 'prompt' (1), answer from "
        "'reward_model.ground_truth' (2), 'answer' (1)",
        f"{name}: 1 rows have a system turn, which was left out: prompt.system sets it",
        f"{name}: dropped 1 bad rows (1 markers and pictures differ); the first:",
        f"  {name}:3: 2 <image> markers in the problem, but 1 images; write one <image> for each image where it "
        "belongs in the text"]
    notes = load(tmp_path, dict(problem="Q", answer="3")).notes
    assert notes == [f"{name}: 1 of 1 rows read; 0 of 1 rows have pictures"]


OPTIONS = ["3", "4", "5"]


@pytest.mark.parametrize("value, expected", [
    (OPTIONS, OPTIONS), ([3, 4.5], ["3", "4.5"]),
    ({"B": "4", "A": "3"}, ["3", "4"]), ({"a": "3", "b": "4"}, ["3", "4"]),
    ("['$1', '$2']", ["$1", "$2"]), ('["1", "2"]', ["1", "2"]), ('{"A": "1", "B": "2"}', ["1", "2"]),
    ({"text": ["1", "2"], "label": ["A", "B"]}, ["1", "2"]),
    ({"A": "3", "B": "4", "C": None}, ["3", "4"]), ({"A": "3", "B": None, "C": "4"}, []),
    (["3", "4", None, None], ["3", "4"]), (["3", None, "4"], []), ([None, None], []),
    ({"text": ["1", "2", "3"], "label": ["B", "A", "C"]}, ["2", "1", "3"]),
    ({"text": ["1", "2"], "label": ["1", "2"]}, ["1", "2"]), ({"text": ["1", "2"], "label": ["A", "A"]}, ["1", "2"]),
    ({"text": ["1", "2", None], "label": ["B", "A", None]}, ["2", "1"]),
    ("A. 6 cm\u00b2;B. 8 cm\u00b2; C. 10", ["6 cm\u00b2", "8 cm\u00b2", "10"]), ("(A) red\n(B) blue", ["red", "blue"]),
    (None, []), ([], []), ("", []), (["one"], []), ([["a"], ["b"]], []), ({"x": 1}, []), ("none", []), (7, []),
    (["a"] * 27, []), (["a", ""], []), (["\ud800", "b"], []), ("__import__('os')", []), ("['a'] * 9", []),
])
@pytest.mark.parametrize("name", ["options", "choices", "option"])
def test_options_are_read_or_left_where_they_are(tmp_path, name, value, expected):
    (row,) = load(tmp_path, {"problem": "Q?", "answer": "x", name: value}).rows
    assert row.options == row.public()["options"] == expected and row.problem == "Q?"
    assert name == "options" or row.public()[name] == value, "reward functions see the column as it is"


@pytest.mark.parametrize("answer, options, problem", [
    ("B", OPTIONS, "Q?\n(A) 3\n(B) 4\n(C) 5"), ("(B)", OPTIONS, "Q?\n(A) 3\n(B) 4\n(C) 5"),
    ("\\boxed{B}", OPTIONS, "Q?\n(A) 3\n(B) 4\n(C) 5"), ("A, C", OPTIONS, "Q?\n(A) 3\n(B) 4\n(C) 5"),
    ("B", ["A", "B"], "Q?\n(A)\n(B)"), ("4", OPTIONS, "Q?"), ("D", OPTIONS, "Q?"), ("B", [], "Q?"),
    ("AB", ["AB", "CD"], "Q?"), ("b", OPTIONS, "Q?\n(A) 3\n(B) 4\n(C) 5"), ("BOX", OPTIONS, "Q?"),
    ("b", ["a", "$b$"], "Q?"), ("d", OPTIONS, "Q?"),
])
def test_options_are_listed_where_the_answer_is_a_letter(tmp_path, answer, options, problem):
    assert only(tmp_path, dict(problem="Q?", answer=answer, options=options))[0] == problem


ANIMALS = ["frog", "whale", "carp"]


@pytest.mark.parametrize("answer, options, gold", [
    (1, ANIMALS, "B"), ([0], ANIMALS, "A"), (2, ["D", "A", "B"], "C"), (1, ["2 m", "4 m"], "B"),
    ("b", ANIMALS, "B"), (True, ANIMALS, "True"), (4, ANIMALS, "4"), (1.0, ANIMALS, "1.0"), ("12", ANIMALS, "12"),
    ("4", ["3", "4", "5"], "4"), (4, [3, 4, 5], "4"), ("2", ["2.0", "3.0"], "2"), (1, [0, 1, 2], "1"), ("0", [], "0"),
    ("3", ["3 m", "4 m", "5 m"], "3"), ("1", ANIMALS, None), ("3", ANIMALS, None), ("1", ["2 m", "4 m"], None),
    (1, ["1", "2"], None), (2, ["2 m", "4 m", "6 m"], None),
])
def test_an_index_as_answer_becomes_a_letter_or_is_told(tmp_path, answer, options, gold):
    rows, dropped, notes = load(tmp_path, dict(problem="Q?", answer="x"),
                                dict(problem="Q?", answer=answer, choices=options))
    assert [each.answer for each in rows] == (["x", gold] if gold else ["x"])
    assert dropped == ({} if gold else {"answer is an index": 1})
    is_index = isinstance(answer, int | list) and gold in ("A", "B", "C")
    assert any("1 rows have an index as answer, which was read as an option's letter" in n for n in notes) == is_index
    assert not gold or ("(A)" in rows[1].problem) == (gold in ("A", "B", "C"))


def test_integers_that_count_options_from_1_are_refused(tmp_path):
    record = dict(problem="Q?", choices=ANIMALS)
    with pytest.raises(UserError, match="seem to count options from 0.*as if counted from 1; write the options' lett"):
        load(tmp_path, *(record | dict(answer=number) for number in (1, 2, 3)))
    dropped = load(tmp_path, record | dict(answer=3), record | dict(answer="B")).dropped
    assert dropped == {"answer is an index from 1": 1}


@pytest.mark.parametrize("problem", ["Given P(A)=0.5, P(B)=0.3 and P(C)=0.1, which?", "f(A), g(B) and h_2(C)?",
                                     "Is {A} or {B} or {C} right?", "Which of \\Pr(A), \\Pr(B), \\Pr(C)?"])
def test_letters_that_mark_no_options_are_no_list(tmp_path, problem):
    assert only(tmp_path, dict(problem=problem, answer="B", options=OPTIONS))[0] == f"{problem}\n(A) 3\n(B) 4\n(C) 5"


@pytest.mark.parametrize("problem", ["Q? A. 3 B. 4 C. 5", "Q?\n(A) 3\n(B) 4\n(C) 5", "Q?\nA:3\nB:4\nC:5",
                                     "\uff08A\uff093 \uff08B\uff094 \uff08C\uff095",
                                     "A\u30013 B\u30014 C\u30015", "Q?(A)3(B)4(C)5", "Q: [A] 3, [B] 4, [C] 5",
                                     "\u662f\uff08 \uff09A\uff0e3\uff1bB\uff0e4\uff1bC\uff0e5",
                                     "**A.** 3 **B.** 4 **C.** 5"])
def test_options_are_not_listed_twice(tmp_path, problem):
    assert only(tmp_path, dict(problem=problem, answer="B", options=OPTIONS))[0] == problem


MARKERS = [  # problem, columns of pictures, problem and pictures that come of it
    ("Find x.", dict(image="a.png"), "<image>Find x.", ["a.png"]),
    ("Find x.", dict(images=["a.png", "b.png"]), "<image><image>Find x.", ["a.png", "b.png"]),
    ("<image1> and <image 2>?", dict(images=["a.png", "b.png"]), "<image> and <image>?", ["a.png", "b.png"]),
    ("<IMAGE_2> then <|image_1|>?", dict(images=["a.png", "b.png"]), "<image> then <image>?", ["b.png", "a.png"]),
    ("<image 1> <image 1>?", dict(images=["a.png"]), "<image> image 1?", ["a.png"]),
    ("<image1><image2> Go", dict(image="a.png"), "<image>image 2 Go", ["a.png"]),
    ("<image2>?", dict(image="a.png"), "<image>?", ["a.png"]),
    ("<image 2>?", dict(images=["a.png", "b.png"]), "<image><image>?", ["a.png", "b.png"]),
    ("See <image 2>.", dict(images=[None, "b.png", "a.png"]), "<image>See <image>.", ["a.png", "b.png"]),
    ("See <image 2>.", dict(images=json.dumps(["", "b.png"])), "See <image>.", ["b.png"]),
    ("<image 3>, <image 2>?", dict(images=[{"path": None}, ["b.png"], "a.png"]), "<image>, <image>?",
     ["a.png", "b.png"]),
    ("<image_0> <image_1>", dict(images=["a.png", "b.png"]), "<image> <image>", ["a.png", "b.png"]),
    ("<image_2>?", dict(image_1="a.png", image_2="b.png", image_3=None), "<image><image>?", ["a.png", "b.png"]),
    ("<image_2> or <image_4>?", dict(image_2="a.png", image_4="b.png"), "<image> or <image>?", ["a.png", "b.png"]),
    ("<image>?", dict(image1="a.png", image2=""), "<image>?", ["a.png"]),
    ("Panel <image1>: <image>", dict(image="a.png"), "Panel <image1>: <image>", ["a.png"]),
    ("<|vision_start|><|image_pad|><|vision_end|>Q", dict(image="a.png"), "<image>Q", ["a.png"]),
    ("<img>Q<IMAGE>", dict(images=["a.png", "b.png"]), "<image>Q<image>", ["a.png", "b.png"]),
]


@pytest.mark.parametrize("problem, columns, expected, pictures", MARKERS)
def test_markers_of_every_spelling_stand_for_their_pictures(tmp_path, problem, columns, expected, pictures):
    assert only(tmp_path, dict(problem=problem, answer="1") | columns) == (expected, "1", pictures)
    for prompt in ([user(problem)], json.dumps([user(problem)])):
        assert only(tmp_path, dict(prompt=prompt, answer="1") | columns) == (expected, "1", pictures)


def test_a_numbered_marker_in_the_options_stands_for_its_picture(tmp_path):
    record = dict(question="Which is <image 1>?", options="['<image 2>', '<image 3>']", answer="B", image_1="a.png",
                  image_2="b.png", image_3="a.png")
    (row,) = load(tmp_path, record).rows
    assert row.problem == "Which is <image>?\n(A) <image>\n(B) <image>" and row.options == ["image 2", "image 3"]
    assert [Path(item).name for item in row.images] == ["a.png", "b.png", "a.png"]


def test_a_marker_is_plain_text_where_no_row_has_a_picture(tmp_path):
    html = dict(problem="Write <image> in HTML", answer="1")
    rows, dropped, notes = load(tmp_path, html, dict(problem="Q", answer="2"))
    assert rows[0].problem == "Write <image> in HTML" and rows[0].images == [] and not dropped
    assert "1 rows have <image> as plain text" in notes[1]
    rows, dropped, _ = load(tmp_path, html, SWIFT, dict(problem="See <image 1>.", answer="1"))
    assert len(rows) == 1 and dropped == {"markers and pictures differ": 2}
    assert load(tmp_path, dict(problem="See <image 1>.", answer="1")).rows[0].problem == "See <image 1>."


def with_bytes(value):
    if isinstance(value, dict):
        return picture() if "__bytes__" in value else {key: with_bytes(each) for key, each in value.items()}
    return [with_bytes(each) for each in value] if isinstance(value, list) else value


SOURCES = json.loads(SCHEMAS.read_text())["sources"] if SCHEMAS.is_file() else {}
EXPECTED = {  # problem, answer, number of pictures, options
    "mathvista": ("<image>Which bar is the tallest?\n(A) red\n(B) blue", "B", 1, ["red", "blue"]),
    "mathvista_free_form": ("<image>How long is the rope? (Unit: m)", "3.5", 1, []),
    "mathverse": ("<image>A square has side 3. Find its area.\nChoices:\nA:6\nB:9\nC:12\nD:3", "B", 1, []),
    "mathverse_vision_only": ("<image>Reason about the question shown in the image, then the letter.", "B", 1, []),
    "mathvision": ("How many triangles are in the picture?\n<image>\n(A) 3\n(B) 4\n(C) 5\n(D) 6\n(E) 7", "C", 1,
                   ["3", "4", "5", "6", "7"]),
    "mathvision_free": ("<image>image 2 How much heavier is the left box (kg)?", "\\frac{3}{2}", 1, []),
    "olympiadbench": ("In the figure <image>, find all real $x$.", "$1,-1$", 1, []),
    "mmstar": ("<image>What shape is shown?\nOptions: A: circle, B: square, C: star, D: line", "B", 1, []),
    "mmmu": ("<image> What is the total?\n(A) $1\n(B) $2\n(C) $3\n(D) $4", "C", 1, ["$1", "$2", "$3", "$4"]),
    "math500": ("Compute $1+\\frac12$.", "\\frac32", 0, []),
    "gpqa": ("Invented question?\n(A) gamma\n(B) alpha\n(C) delta\n(D) beta", "B", 0,
             ["gamma", "alpha", "delta", "beta"]),
    "gsm8k": ("Tom has 3 boxes of 4 pens. How many pens?", "He has 3*4=<<3*4=12>>12 pens.\n#### 12", 0, []),
    "wemath": ("<image>What is the area?\n(A) 6 cm\u00b2\n(B) 8 cm\u00b2\n(C) 10 cm\u00b2\n(D) 12 cm\u00b2\n"
               "(E) No correct answer", "B", 1,
               ["6 cm\u00b2", "8 cm\u00b2", "10 cm\u00b2", "12 cm\u00b2", "No correct answer"]),
    "logicvista": ("<image>Which figure comes next? A, B, C, D", "A, C", 1, []),
    "dynamath": ("<image>What is the slope? Answer with a floating-point number.", "2.5", 1, []),
    "geometry3k_hiyouga": ("<image>Find x.", "12", 1, ["10", "12", "14", "16"]),
    "geometry3k_original": ("Find x.\n(A) 10.0\n(B) 12.0\n(C) 14.0\n(D) 16.0", "B", 0,
                            ["10.0", "12.0", "14.0", "16.0"]),
    "deepscaler": ("Find the sum of the digits of 99.", "18", 0, []),
    "virl39k": ("<image>\nWhat is angle A in degrees?", "\\boxed{60}", 1, []),
    "virl39k_hub_copy": ("<image>Which? A. 1 B. 2", "\\boxed{B}", 1, []),
    "lmm_r1_message_jsonl": ("Which shape is larger? A. left B. right<image>", "$\\boxed{A}$", 1, []),
    "lmm_r1_text_jsonl": ("1+1=?", "$2$", 0, []),
    "lmm_r1_sokoban_jsonl": "no answer",
    "mm_eureka_jsonl": ("<image>Find x.", "12", 1, []),
    "mathv360k": ("<image>\nHint: number.\nQuestion: How many?", "The answer is 7", 1, []),
    "llava_conversations": ("<image><image>Which is larger? (A) first (B) second", "B", 2, []),
    "verl_parquet": ("<image>Find x.", "12", 1, []),
    "easyr1": ("<image>Find x.", "12", 1, []),
    "math_hendrycks": ("Compute $2^3$.", "$2^3=\\boxed{8}$.", 0, []),
}


@pytest.mark.skipif(not SOURCES, reason="needs the shared notes")
@pytest.mark.parametrize("name", SOURCES)
def test_a_row_of_every_public_source_is_read_without_a_key(tmp_path, name):
    record = with_bytes(SOURCES[name]["row"])
    as_text = json.dumps(record, default=lambda value: base64.b64encode(value).decode())
    as_text = as_text.replace("file:///data/", f"file://{tmp_path}/")
    for item in ("images/9001.jpg", "images/9002.jpg", "2steps/image/901-1.png", "v9001.png", "image/image901.png",
                 "images/Processed-9001-0.jpg", "images/9001.png", "9001.png", "TabMWP/images/9001.png", "a.png",
                 "b.png",
                 "sokoban_initial_frames/Sokoban-small-v0-frame_0.png"):
        (tmp_path / item).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / item).write_bytes(picture())
    (tmp_path / "a.jsonl").write_text(as_text)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([json.loads(as_text) if "file://" in as_text else record]),
                                tmp_path / "a.parquet")
    for file in ("a.jsonl", "a.parquet"):
        if isinstance(EXPECTED[name], str):
            with pytest.raises(UserError, match=EXPECTED[name]):
                load_rows(str(tmp_path / file))
        else:
            (row,) = load_rows(str(tmp_path / file)).rows
            assert (row.problem, row.answer, len(row.images), row.options) == EXPECTED[name]
