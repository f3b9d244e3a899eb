"""The report tells what the run folder holds, tells it right, and lets nothing from data or model become markup."""

import base64
import hashlib
import html
import json
import os
import re
from html.parser import HTMLParser

import pytest
import yaml
from PIL import Image

from nanolmmr1.errors import UserError
from nanolmmr1.report.chart import chart, number, round_step, running_mean, y_ticks
from nanolmmr1.report.diagnose import Diagnosis
from nanolmmr1.report.logs import MetricsLog, SampleLog
from nanolmmr1.report.page import duration, phase_bands, try_report, write_report

PHASES = {"text": 6, "with captions": 4, "images": 2}
EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&<image> \ud83d"
ACCURACY = {"start": {"words": 0.31, "digits": 0.2}, "text": {"words": 0.5}, "with captions": {"words": 0.6},
            "images": {"words": 0.55, "digits": 0.125}}
KEYS = ("reward/overall", "reward/accuracy", "reward/format", "response_length/mean", "actor/entropy", "actor/kl_loss",
        "actor/grad_norm", "actor/lr", "perf/throughput")


class Reader(HTMLParser):
    """What a browser would see: (tag, attributes) in order, and the text of every element by tag."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.open = [], {}, []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def count(self, tag, kind=None):
        return sum(name == tag and kind in (None, attributes.get("class")) for name, attributes in self.tags)


def a_run(folder, metrics=True, summary=True, samples=True, recipe=True):
    """A run folder of three phases, with evil text wherever data or model can put some."""
    step = 0
    for phase, steps in PHASES.items():
        for _ in range(steps):
            step += 1
            if metrics:
                times = {"timing_s/gen": 3.0, "timing_s/learn": 1.0, "timing_s/step": 5.0}
                MetricsLog(folder).write({"phase": phase, "step": step, **dict.fromkeys(KEYS, 0.1 * step), **times})
            if samples and phase != "images":
                responses = [{"text": f"{EVIL} response {step}.{k}", "reward": 1.5 * k, "advantage": k - 0.5,
                              "parts": {"accuracy": float(k), EVIL: 1.0}} for k in range(2)]
                SampleLog(folder).write({"phase": phase, "step": step, "problem": EVIL, "answer": EVIL, "caption": EVIL,
                                         "images": [Image.new("RGB", (8, 8))], "responses": responses})
    if summary:
        facts = {"accuracy": ACCURACY, "wall_s": 3723.4, "peak_rss_mb": 2310.5}
        (folder / "summary.json").write_text(json.dumps(facts))
    if recipe:
        phases = {phase: {"steps": steps} for phase, steps in PHASES.items()}
        tree = {"name": "a <b>run</b>", "model": "m", "phases": phases}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = write_report(a_run(tmp_path_factory.mktemp("run")))
    assert path.name == "report.html"
    assert not [name for name in os.listdir(path.parent) if name.endswith(".tmp")]
    return path.read_text(encoding="utf-8")


def test_nothing_from_data_or_model_becomes_markup(page):
    reader = Reader(page)
    assert reader.count("script") == 1
    assert reader.count("image") == 0 and "<b>run" not in page
    assert not [key for _, attributes in reader.tags for key in attributes if key.startswith("on")]
    evil = EVIL.replace("\ud83d", "?")
    assert "".join(reader.texts["p"]).count(evil) >= 8  # problems and captions of two kept steps of two phases
    assert f"{evil} response 1.0" in reader.texts["pre"]
    assert "a <b>run</b>" in reader.texts["h1"]


def test_a_script_tag_in_any_text_field_is_escaped(tmp_path):
    fields = ("name", "model", "phase", "recipe", "moment", "task", "stage", "problem", "answer", "caption", "response",
              "part", "image")
    evil = {field: f"\"'><script>{field}</script>" for field in fields}
    folder = tmp_path / "<script>note<"
    step = {"phase": evil["phase"], "step": 1}
    MetricsLog(folder).write(step | {"reward/overall": 0.5, f"timing_s/{evil['stage']}": 1.0, "timing_s/step": 2.0})
    responses = [{"text": evil["response"], "reward": 1.0, "advantage": 0.0, "parts": {evil["part"]: 1.0}}]
    sample = {field: evil[field] for field in ("problem", "answer", "caption")}
    sample |= step | {"images": [evil["image"]], "responses": responses}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (folder / "summary.json").write_text(json.dumps({"accuracy": {evil["moment"]: {evil["task"]: 0.5}}}))
    recipe = {"name": evil["name"], "model": evil["model"], "phases": {evil["phase"]: {"steps": 1}}}
    (folder / "recipe.yaml").write_text(f"# {evil['recipe']}\n{yaml.safe_dump(recipe)}")
    page = write_report(folder).read_text()
    assert page.count("<script") == Reader(page).count("script") == 1
    assert not [field for field in fields if f"&lt;script&gt;{field}&lt;/script&gt;" not in page]
    (folder / "summary.json").unlink()
    (folder / "summary.json").mkdir()  # its error names the folder
    page = write_report(folder).read_text()
    assert page.count("<script") == 1 and re.search('class="note">Left out: summary.json.*&lt;script&gt;note&lt;', page)


def test_the_only_script_that_may_run_is_the_reports_own(page):
    policy = next(attributes["content"] for tag, attributes in Reader(page).tags
                  if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy")
    script = re.search(r"<script>(.*?)</script>", page, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_the_page_refers_to_nothing_outside_itself(page):
    assert not re.search(r"https?://|url\(|@import", page)
    tags = Reader(page).tags
    links = [value for _, attributes in tags for key, value in attributes.items() if key in ("src", "href")]
    assert links and all(link.startswith("data:image/png;base64,") for link in links)


def test_each_curve_is_drawn_once_and_every_phase_is_named_on_every_chart(page):
    reader = Reader(page)
    assert reader.count("figure", "chart") == 8
    assert reader.count("path", "curve") == len(KEYS) + 2  # and two held-out tasks
    assert reader.count("path", "raw") == 0  # too short to be smoothed
    for phase in PHASES:
        assert reader.texts["title"].count(phase) == 8
        assert phase in reader.texts["h3"] or phase == "images"  # of which no samples were kept


def test_a_long_run_is_drawn_faint_with_its_mean_over_it_but_not_what_has_no_noise(tmp_path):
    for step in range(1, 81):
        MetricsLog(tmp_path).write({"phase": "text", "step": step, "reward/overall": step % 2, "actor/lr": 1e-6})
    reader = Reader(write_report(tmp_path).read_text())
    assert (reader.count("path", "curve"), reader.count("path", "raw")) == (2, 1)


@pytest.mark.parametrize(("own", "drawn"), [
    ({"actor/kl_loss": 0.0}, False),
    ({"actor/kl_loss": 0.01}, True),
    ({"actor/kl_loss": 0.0, "timing_s/ref": 1.0}, True),  # a reference from which the policy has not moved
])
def test_without_a_kl_reference_there_is_no_kl_chart(tmp_path, own, drawn):
    log = MetricsLog(tmp_path)
    log.write({"phase": "text", "step": 1, "reward/overall": 0.5, "actor/kl_loss": 0.0})
    log.write({"phase": "images", "step": 2, "reward/overall": 0.5} | own)
    page = write_report(tmp_path).read_text()
    assert Reader(page).count("figure", "chart") == 1 + drawn and ("KL to the reference" in page) == drawn


def test_the_accuracy_table_has_each_moment_and_the_change_in_points(page):
    table = re.search(r'<table class="accuracy">.*?</table>', page, re.S)[0]
    rows = [[html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)]
            for row in re.findall(r"<tr.*?</tr>", table, re.S)]
    assert rows == [["% right", "words", "digits"], ["start", "31.0", "20.0"], ["after text", "50.0", "–"],
                    ["after with captions", "60.0", "–"], ["after images", "55.0", "12.5"],
                    ["change, points", "+24.0", "−7.5"]]


def test_held_out_accuracy_stands_where_each_phase_ends(page):
    reader = Reader(page)
    points = [json.loads(attributes["data-points"]) for tag, attributes in reader.tags if tag == "output"]
    shown = dict(zip(reader.texts["output"], points, strict=True))
    assert shown["55"] == [[0, "31"], [6, "50"], [10, "60"], [12, "55"]]
    assert shown["12.5"] == [[0, "20"], [12, "12.5"]]


def test_stage_times_are_means_by_phase_and_untimed_seconds_stay_blank(page):
    table = re.search(r'<table class="times">.*?</table>', page, re.S)[0]
    assert re.findall(r"<tr><th>(.*?)</th>", table)[1:] == list(PHASES)
    assert re.findall(r"<td>(.*?)</td>", table) == ["3", "1", "<b>5</b>"] * 3
    assert re.findall(r"width:([\d.]+)%", table) == ["60.00", "20.00"] * 3


def test_samples_are_those_of_the_first_and_the_last_kept_step_of_a_phase(page):
    shown = sorted({int(step) for step in re.findall(r"response (\d+)\.", page)})
    assert shown == [1, 6, 7, 10]
    assert re.findall(r'<li class="(\w+)" style="--strength:([\d.]+)"', page)[:2] == [("down", "1.00"), ("up", "1.00")]
    assert "−0.50" in page and "+0.50" in page and "reward 1.5" in page


def test_a_group_without_caption_images_or_responses_is_shown(tmp_path):
    group = {"phase": "text", "step": 1, "problem": "1+1?", "answer": "2", "images": [], "responses": []}
    SampleLog(tmp_path).write(group)
    reader = Reader(write_report(tmp_path).read_text())
    assert "1+1?" in reader.texts["p"] and reader.count("img") == reader.count("p", "caption") == 0


def test_the_facts_of_the_run_are_at_its_head(page):
    facts = dict(zip(*(Reader(page).texts[tag] for tag in ("dt", "dd")), strict=True))
    assert facts == {"model": "m", "steps": "12", "phases": "text → with captions → images", "wall time": "1 h 2 min",
                     "peak memory": "2,310 MB"}


@pytest.mark.parametrize("missing", ["metrics", "summary", "samples", "recipe"])
def test_a_run_that_lacks_a_file_has_a_report_of_the_rest(tmp_path, missing):
    page = write_report(a_run(tmp_path, **{missing: False})).read_text()
    headings = {"metrics": {"Curves", "Time per step"}, "summary": {"Held-out accuracy"},
                "samples": {"Sample rollouts"}, "recipe": {"Recipe"}}
    everything = {heading for group in headings.values() for heading in group}
    assert set(Reader(page).texts["h2"]) == everything - headings[missing]


def test_an_empty_folder_has_a_report_with_its_name(tmp_path):
    reader = Reader(write_report(tmp_path).read_text())
    assert reader.texts["h1"] == [tmp_path.name] and "h2" not in reader.texts


def test_a_run_that_was_killed_is_reported_up_to_there(tmp_path):
    a_run(tmp_path, metrics=False, samples=False, summary=False)
    MetricsLog(tmp_path).write({"phase": "text", "step": 1, "reward/overall": 0.0, "actor/grad_norm": float("nan")})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"phase": "text", "st')
    (tmp_path / "summary.json").write_text(json.dumps({"accuracy": {"start": {"words": 0.31}}}))
    page = write_report(tmp_path).read_text()
    assert "1 of 12" in page and "change, points" not in page
    assert Reader(page).count("path", "curve") == 2  # reward and the task's start; no norm was finite


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run folder '.*gone'"):
        write_report(tmp_path / "gone")


SPOILT = {
    "summary.json": ("{", "[]", "\\xff", "[" * 100_000),
    "metrics.jsonl": ("{oops}\n", "[1]\n", '{"phase": 5, "step": "x"}\n'),
    "samples.jsonl": ("null\n", "\\xff\n"),
}


@pytest.mark.parametrize(("name", "content"), [(name, text) for name, texts in SPOILT.items() for text in texts])
def test_a_spoilt_file_is_left_out_and_the_page_says_so(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert "Left out: " in write_report(tmp_path).read_text() and name in write_report(tmp_path).read_text()


def test_a_report_that_cannot_be_made_is_told_and_ends_nothing(tmp_path):
    notes = []
    (tmp_path / "samples.jsonl").write_text('{"phase": "a", "step": 1}\n')  # a line of the right kind, and no group
    try_report(tmp_path, notes.append)
    try_report(tmp_path / "gone", notes.append)
    (tmp_path / "samples.jsonl").unlink()
    (tmp_path / "report.html").mkdir()
    try_report(tmp_path, notes.append)
    assert len(notes) == 3 and all("report.html could not be written" in note for note in notes)


@pytest.mark.parametrize(("values", "ticks"), [
    ([0.3, 0.93], [0, 0.5, 1]), ([130, 150], [130, 135, 140, 145, 150]), ([1e-6, 1e-6], [0, 5e-7, 1e-6]),
    ([0.0, 0.0], [0, 0.5, 1]), ([999, 1000], [0, 500, 1000]), ([-0.2, 0.5], [-0.2, 0, 0.2, 0.4, 0.6]),
    ([-3, -3], [-3, -2, -1, 0]),
])
def test_ticks_are_round_and_enclose_the_values(values, ticks):
    assert y_ticks(values) == pytest.approx(ticks, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("span", "count", "step"), [(100, 5, 20), (100, 4, 50), (0.3, 3, 0.1), (7, 1, 10), (1, 1, 1)])
def test_a_round_step_is_the_smallest_that_is_coarse_enough(span, count, step):
    assert round_step(span, count) == pytest.approx(step)


def test_the_mean_stays_within_its_phase():
    points = [(1, 0.0), (2, 3.0), (3, 6.0), (4, 100.0), (5, 102.0)]
    assert running_mean(points, [("a", 0, 3), ("b", 3, 5)], 1) == [(1, 1.5), (2, 3), (3, 4.5), (4, 101), (5, 101)]


def test_a_phase_begins_where_the_one_before_it_ends():
    metrics = [{"phase": "a", "step": 1}, {"phase": "a", "step": 2}, {"phase": "b", "step": 3}]
    assert phase_bands(metrics) == [("a", 0, 2), ("b", 2, 3)]


def test_a_curve_spans_its_plot_and_a_long_name_is_cut_to_its_band():
    figure = chart("T", "u", {"c": [(0, 0.0), (10, 1.0)]}, [("a long name of a phase", 0, 1), ("b", 1, 10)])
    assert 'd="M54.0 202.0L460.0 26.0"' in figure
    assert ">a lon…</text>" in figure and "<title>a long name of a phase</title>" in figure


@pytest.mark.parametrize(("value", "shown"), [
    (None, "–"), (0, "0"), (0.71234, "0.712"), (-0.5, "−0.5"), (12345.6, "12,346"), (-1500, "−1,500"), (1e-6, "1e−6"),
    (0.000123, "1.23e−4"), (0.001, "0.001"),
])
def test_numbers_are_short(value, shown):
    assert number(value) == shown


@pytest.mark.parametrize(("seconds", "shown"), [
    (0, "0 s"), (59.6, "1 min 0 s"), (723, "12 min 3 s"), (18420, "5 h 7 min"),
])
def test_durations_are_short(seconds, shown):
    assert duration(seconds) == shown


LEARNS = {"response_length/clip_ratio": 0.1, "response_length/max": 64, "reward/format": 0.5, "actor/grad_norm": 0.7,
          "reward/frac_all_wrong": 0.2, "reward/frac_all_right": 0.3, "reward/frac_zero_std": 0.5}
EQUAL = {"reward/frac_zero_std": 1, "actor/grad_norm": 0.0}
CUT, SHAPELESS = EQUAL | {"response_length/clip_ratio": 1}, EQUAL | {"reward/format": 0}
HARD, EASY = EQUAL | {"reward/frac_all_wrong": 1}, EQUAL | {"reward/frac_all_right": 1}
CAUSES = {  # what a step differs in from one that learns -> the sentence's beginning, and the keys that it names
    "cut off": (CUT, "every response of the last 5 steps was cut off at 64 tokens", "phases.a.max_response_tokens"),
    "cut off, wrong and without format": (CUT | SHAPELESS | HARD, "every response of the last 5 steps was cut off",
                                          "phases.a.max_response_tokens"),
    "format never met": (SHAPELESS, "no response of the last 5 steps had the format", "prompt.system reward.format"),
    "format never met and wrong": (SHAPELESS | HARD, "no response of the last 5 steps had the format", "reward.format"),
    "format never met, yet learning": ({"reward/format": 0.0}, "no response of the last 5 steps had", "reward.format"),
    "all wrong": (HARD, "every response of the last 5 steps was wrong", "phases.a.data samples.jsonl"),
    "all wrong, format learnt": ({"reward/frac_all_wrong": 1.0}, "every response of the last 5 steps was wrong", ""),
    "all right": (EASY, "every response of the last 5 steps was right", "phases.a.data"),
    "all equal": (EQUAL, "all responses to the same prompt earned the same reward",
                  "phases.a.temperature phases.a.group_size phases.a.dynamic_sampling"),
    "no gradient": ({"actor/grad_norm": 0.0}, "the gradient of the last 5 steps was exactly 0", "phases.a.objective"),
}


def told(*steps, planned=100, rewarded=None):
    """{number of a step in phase a: what is said at it}"""
    diagnosis = Diagnosis({"a": planned}, rewarded or {"format": True, "accuracy": True})
    said = [diagnosis.see({"phase": "a", "step": i} | LEARNS | step) for i, step in enumerate(steps, 1)]
    return {i: sentence for i, sentence in enumerate(said, 1) if sentence}


@pytest.mark.parametrize("name", CAUSES)
def test_a_cause_that_stops_learning_is_told_once_with_the_key_to_change(name):
    step, begins, keys = CAUSES[name]
    said = told({}, *[step] * 20)
    assert list(said) == [6] and said[6].startswith(begins)
    assert all(key in said[6] for key in keys.split())
    assert told(*[step] * 4, {}, *[step] * 4) == {}


@pytest.mark.parametrize(("planned", "at"), [(1, 1), (3, 3), (5, 5), (6, 5)])
def test_a_phase_of_few_steps_is_judged_at_its_end(planned, at):
    said = told(*[HARD] * planned, planned=planned)
    assert list(said) == [at] and ("of the only step" if at == 1 else f"of the last {at} steps") in said[at]
    assert told(*[HARD] * (planned - 1), {}, planned=planned) == ({5: said[at]} if planned == 6 else {})


def test_a_cause_is_told_again_when_it_was_gone_for_a_while_and_another_one_at_once():
    assert list(told(*[HARD] * 5, *[{}] * 5, *[HARD] * 6)) == [5, 15]
    assert list(told(*[HARD] * 5, *[{}] * 4, *[HARD] * 6)) == [5]
    said = told(*[CUT | HARD] * 7, *[HARD] * 3)
    assert list(said) == [5, 8] and "cut off" in said[5] and "wrong" in said[8]


def test_each_phase_is_told_of_its_own():
    diagnosis = Diagnosis({"a": 9, "b": 9}, {})
    said = [diagnosis.see({"phase": phase} | LEARNS | HARD) for phase in "aaaabbbbbb"]
    assert [bool(sentence) for sentence in said] == [False] * 8 + [True, False] and "phases.b.data" in said[8]


def test_what_has_no_weight_in_the_reward_is_no_cause():
    own = {"format": False, "accuracy": False}
    assert told(*[{"reward/format": 0, "reward/frac_all_wrong": 1}] * 9, rewarded=own) == {}
    assert "same reward" in told(*[HARD | SHAPELESS] * 5, rewarded=own)[5]


def test_records_that_lack_numbers_are_no_cause():
    assert not any(Diagnosis({}, {}).see({"phase": "a", "actor/grad_norm": None}) for _ in range(9))


def test_the_report_of_a_killed_run_says_why_nothing_was_learnt(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(1, 8):
        log.write({"phase": "<b>a", "step": step} | LEARNS | HARD)
    recipe = {"phases": {"<b>a": {"steps": 100}}, "reward": {"format_weight": 0.5, "accuracy_weight": 1.0}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    page = write_report(tmp_path).read_text()
    assert page.count("Phase &lt;b&gt;a, step 5: every response of the last 5 steps was wrong: ") == 1
    recipe["reward"]["accuracy_weight"] = 0
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "Phase &lt;b&gt;a, step 5: all responses to the same prompt" in write_report(tmp_path).read_text()


def test_the_reasons_of_judgements_are_a_chart_in_which_a_missing_one_is_0(tmp_path):
    log = MetricsLog(tmp_path)
    for step, reasons in ((1, {"parsed": 1.0}), (2, {"letter": 0.25, "parsed": 0.75})):
        shares = {f"reward/reason/{name}": share for name, share in reasons.items()}
        log.write({"phase": "a", "step": step, "reward/overall": 0.5} | shares)
    reader = Reader(write_report(tmp_path).read_text())
    points = [json.loads(attributes["data-points"]) for tag, attributes in reader.tags if tag == "output"]
    assert [[value for _, value in curve] for curve in points[1:]] == [["1", "0.75"], ["0", "0.25"]]
    assert reader.count("figure", "chart") == 2
