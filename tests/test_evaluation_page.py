"""Results hold the right numbers; table and page show them, nothing that is private, and no markup of others."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from nanolmmr1.benchmarks.item import Item, Response
from nanolmmr1.benchmarks.statistics import wilson
from nanolmmr1.benchmarks.table import Benchmark
from nanolmmr1.data.store import Row
from nanolmmr1.evaluate import page as pages
from nanolmmr1.evaluate.page import write_page
from nanolmmr1.evaluate.summary import show, summarise

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)>\"'&<!-- \ud83d \0 \u202e [red]"
MODELS = ("base", "trained")
SETTINGS = {"samples": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_response_tokens": 2048,
            "max_pixels": 1003520, "engine": "local", "seed": 0, "limit": 0,
            "models": {"base": {"prompt": "boxed", "system": EVIL}},
            "benchmarks": {"ours": {"sources": ["ours.jsonl"], "dropped": {"no answer": 3}, "reduced_pictures": 12}}}


def entry(name="ours", **more):
    """A benchmark of 40 published rows."""
    given = dict(source=(), rows=40, licence="MIT", schema="", official=lambda row: "", subjects=("topic",))
    return Benchmark(name=name, title=f"The {name}", **given | more)


def response(right, text="so it is", answer="4", undecided=False, lenient=None, tokens=10, cut=False):
    return Response(text, answer, bool(right), "value", undecided, lenient, True, tokens, cut)


def item(place, right, model="base", benchmark="ours", **fields):
    given = dict(problem=str(place), subjects={"topic": "odd" if place % 2 else "even"}, gold="4",
                 responses=[response(right)])  # fmt: skip
    return Item(model, benchmark, str(place), **given | fields)


def forty(model="base", every=4, benchmark="ours", **fields):
    """Forty items of which each `every`-th is right."""
    return [item(place, place % every == 0, model, benchmark, **fields) for place in range(40)]


def results_of(items, *entries, official=False, k=1):
    return summarise(items, {each.name: each for each in entries or [entry()]}, official, k)


def png(colour="red", size=(900, 300)):
    Image.new("RGB", size, colour).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def row_of(item):
    return Row(f"What is {item.id}? <image>", "4", [png()])


def page_of(tmp_path, items, *entries, row_of=row_of, official=False):
    results = results_of(items, *entries, official=official) | {"settings": SETTINGS}
    write_page(tmp_path / "report.html", results, items, row_of)
    return (tmp_path / "report.html").read_bytes().decode()


class Reader(HTMLParser):
    """What a browser would see: (tag, attributes) in order, and the text outside of style and script."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.raw = [], "", False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.raw = tag in ("script", "style")

    def handle_endtag(self, tag):
        self.raw = False

    def handle_data(self, data):
        self.text += "" if self.raw else data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_results_are_json_and_have_the_score_with_its_interval_and_the_rows():
    found = json.loads(json.dumps(results_of(forty())))
    score, by_hand = found["scores"][0], wilson(10, 40)
    assert (score["model"], score["benchmark"], score["rows"]) == ("base", "ours", 40)
    assert (score["score"], score["low"], score["high"]) == tuple(round(value, 6) for value in by_hand[:3])
    assert found["differences"] == [] and found["models"] == ["base"]
    assert score["subjects"]["topic"]["even"] | {"low": 0, "high": 0} == {"score": 0.5, "low": 0, "high": 0, "rows": 20}
    assert score["subjects"]["topic"]["odd"]["score"] == 0


def test_counts_and_means_are_over_responses_and_faults_are_named():
    items = [item(0, 1), item(1, 0, responses=[response(0, undecided=True, tokens=31, cut=True)]),
             item(2, 0, responses=[], fault="prompt too long"), item(3, 0, responses=[], fault="no picture"),
             item(4, 0, responses=[], fault="prompt too long")]  # fmt: skip
    score = results_of(items)["scores"][0]
    assert score["score"] == 0.2 and score["faults"] == {"prompt too long": 2, "no picture": 1}
    assert (score["undecided"], score["responses"], score["tokens"], score["cut"]) == (1, 2, 20.5, 0.5)
    assert score["pass_at_k"] is None and score["majority"] is None and score["clean"] is None


def test_a_model_that_could_be_asked_nothing_has_numbers_that_are_null():
    score = results_of([item(0, 0, responses=[], fault="no prompt")])["scores"][0]
    assert score["score"] == 0 and score["tokens"] is None and score["format"] is None


def test_several_responses_have_pass_at_k_and_a_majority():
    answers = [response(0, answer="3"), response(1, answer="4"), response(1, answer="4"), response(0, answer="5")]
    score = results_of([item(0, 0, responses=answers), item(1, 0, responses=answers[::-1])], k=2)["scores"][0]
    assert score["score"] == 0.5 and score["majority"] == 1
    assert score["pass_at_k"] == round(1 - 1 / 6, 6)


def test_a_macro_headline_stands_beside_the_plain_mean_also_in_the_difference():
    items = [item(place, place in (1, 2), subjects={"axis": "a" if place < 3 else "b"}) for place in range(4)]
    better = [each._replace(model="trained", responses=[response(1)]) for each in items]
    found = results_of([*items, *better], entry(macro="axis", subjects=("axis",)))
    assert found["scores"][0]["score"] == round(1 / 3, 6) and found["scores"][0]["plain"]["score"] == 0.5
    assert found["differences"][0]["score"] == round(2 / 3, 6)


def test_contaminated_items_are_counted_and_left_out_of_the_second_score():
    items = [each._replace(contaminated=each.id in ("0", "1", "4")) for each in forty()]
    score = results_of(items)["scores"][0]
    assert score["contaminated"] == 3 and score["clean"]["rows"] == 37
    assert score["clean"]["score"] == round(8 / 37, 6) and score["score"] == 0.25


def test_if_every_item_is_contaminated_there_is_no_second_score():
    clean = results_of([each._replace(contaminated=True) for each in forty()])["scores"][0]["clean"]
    assert clean == {"score": None, "low": None, "high": None, "rows": 0}


def test_the_official_rule_counts_where_it_decides():
    items = [item(0, 0, responses=[response(0, undecided=True, lenient=True)]),
             item(1, 0, responses=[response(1, lenient=False)]), item(2, 0, responses=[response(1, lenient=None)]),
             item(3, 0, responses=[response(0, undecided=True, lenient=None)])]  # fmt: skip
    ours, theirs = (results_of(items, official=flag)["scores"][0] for flag in (False, True))
    assert (ours["score"], ours["undecided"]) == (0.5, 2)
    assert (theirs["score"], theirs["undecided"], theirs["without_official"]) == (0.5, 1, 2)
    right = [summarise([each], {"ours": entry()}, True, 1)["scores"][0]["score"] for each in items]
    assert right == [1, 0, 1, 0]


def test_later_models_differ_from_the_first_on_every_benchmark_that_both_have_answered():
    items = [*forty(), *forty("trained", 2), *forty("third", 4, "another"), *forty("trained", 4, "another")]
    found = results_of(items, entry(), entry("another"))
    only, = found["differences"]
    assert (only["benchmark"], only["model"], only["base"]) == ("ours", "trained", "base")
    assert (only["score"], only["lost"], only["gained"], only["rows"]) == (0.25, 0, 10, 40)
    assert only["low"] > 0


def test_further_scores_of_the_benchmark_are_of_the_items_as_they_count():
    more = entry(more=lambda items: {"strict": sum(each.responses[0].right for each in items) / 100})
    items = [item(0, 0, responses=[response(0, lenient=True)])]
    assert results_of(items, more, official=True)["scores"][0]["more"] == {"strict": 0.01}


def test_published_numbers_of_the_benchmark_and_of_its_parts_come_with_their_sources():
    items = forty(benchmark="mathverse")
    found = results_of(items, entry("mathverse"))["benchmarks"]["mathverse"]
    assert 34.64 in [each["value"] for each in found["published"]]
    assert all(each["source"] and each["benchmark"] == "mathverse" for each in found["published"])
    assert all(each["benchmark"].startswith("mathverse: ") for each in found["published_parts"]) is True
    assert results_of(forty())["benchmarks"]["ours"]["published"] == []


def printed(capsys, items, *entries, subjects=True, official=False, k=1):
    show(results_of(items, *entries, official=official, k=k), subjects)
    return capsys.readouterr().out


def test_the_table_has_a_line_per_benchmark_and_model_and_fits_100_columns(capsys):
    items = [each._replace(contaminated=each.id == "0") for each in [*forty(), *forty("trained", 2)]]
    out = printed(capsys, items, entry(rows=3040))
    assert max(map(len, out.splitlines())) <= 100
    base, trained = (next(line for line in out.splitlines() if line.strip().startswith(name)) for name in MODELS)
    assert base.split() == ["base", "25.0", "[14.2,", "40.2]", "40/3,040", "23.1", "(−1)", "0", "0.0", "10"]
    assert trained.split()[1:3] == ["50.0", "[35.2,"]
    difference = next(line for line in out.splitlines() if "The ours, trained" in line and "+" in line)
    assert difference.split()[3:4] == ["+25.0"] and difference.split()[-4:] == ["0", "10", "0.002", "40"]
    assert re.search(r"The ours by topic\s+rows +base +trained", re.sub("─", "", out))
    assert re.search(r"even +20 +50.0 \[29.9, 70.1\] +100.0 \[83.9, 100.0\]", out)


def test_the_tables_title_says_which_rules_count(capsys):
    assert "official rules" not in printed(capsys, forty())
    assert "official rules where they decide" in printed(capsys, forty(), official=True)


def test_tables_by_subject_are_printed_on_request(capsys):
    assert "by topic" not in printed(capsys, forty(), subjects=False)


def test_published_numbers_and_all_further_ones_are_printed(capsys):
    answers = [response(0), response(1)]
    items = [item(place, 0, benchmark="mathverse", responses=answers) for place in range(3)]
    out = printed(capsys, [*items, item(9, 0, benchmark="mathverse", responses=[], fault="no picture")],
                  entry("mathverse", more=lambda items: {"strict": 0.125}), k=2)  # fmt: skip
    words = " ".join(out.split())
    assert "34.64" in words and "LMM-R1, arXiv" in words and "pass@2 75.0" in words and "strict 12.5" in words
    assert "not asked: no picture 1" in words and "in the asked format 100.0" in words


@pytest.mark.parametrize("width", [40, 60, 100])
def test_nothing_in_the_table_is_cut_off(capsys, monkeypatch, width):
    long = "a_model_whose_name_is_longer_than_any_column/of_the_table"
    items, signs = [*forty(long, benchmark="mathvision"), *forty(f"{long}2", benchmark="mathvision")], []
    for given in (1000, width):
        monkeypatch.setattr("nanolmmr1.evaluate.summary.WIDTH", given)
        out = printed(capsys, items, entry("mathvision"))
        signs.append(sorted("".join(out.replace("─", "").split())))
    assert max(map(len, out.splitlines())) <= width and signs[0] == signs[1]


def test_names_that_a_terminal_would_obey_are_written_out(capsys):
    out = printed(capsys, [*forty("\x1b[31m[red]x"), *forty("y")])
    assert "\x1b" not in out and "[red]x" in out


def test_the_page_has_the_scores_the_intervals_and_the_published_numbers(tmp_path):
    items = [*forty(benchmark="mathverse"), *forty("trained", 2, "mathverse")]
    page = page_of(tmp_path, items, entry("mathverse"))
    text = " ".join(Reader(page).text.split())
    for part in ("The mathverse", "25.0 [14.2, 40.2]", "50.0 [35.2, 64.8]", "34.64", "LMM-R1", "+25.0", "1, greedy"):
        assert part in text
    labels = [each.get("aria-label") for each in Reader(page).all("svg")]
    assert "95 % interval [14.2, 40.2]" in labels and labels.count("95 % interval [14.2, 40.2]") == 1


def test_the_page_tells_how_the_models_were_asked_and_what_became_of_the_rows(tmp_path):
    text = " ".join(Reader(page_of(tmp_path, forty())).text.split())
    for part in ("promptboxed", "longest response2,048 tokens", "at most 1,003,520 pixels", "enginelocal",
                 "licence MIT · rows of ours.jsonl · 12 with a picture above the pixel limit · 3 dropped: no answer"):
        assert part in text


def test_intervals_are_drawn_to_one_scale(tmp_path):
    page = page_of(tmp_path, [*forty(), *forty("trained", 2)])
    spans = [(float(each["x1"]), float(each["x2"])) for each in Reader(page).all("line") if each["class"] == "span"]
    centres = [float(each["cx"]) for each in Reader(page).all("circle")]
    axis = pages.Axis([0.142, 0.648])
    assert spans[0] == (pytest.approx(axis.x(14.187), abs=0.1), pytest.approx(axis.x(40.194), abs=0.1))
    assert centres[:2] == [pytest.approx(axis.x(25), abs=0.1), pytest.approx(axis.x(50), abs=0.1)]


def evil_items():
    evil = dict(subjects={"topic": EVIL}, gold=EVIL, responses=[response(0, EVIL, EVIL, undecided=True)])
    return [item(0, 0, f"{EVIL} {model}", problem=EVIL, **evil)._replace(id=EVIL) for model in MODELS]


def test_nothing_from_data_or_model_becomes_markup(tmp_path):
    page = page_of(tmp_path, evil_items(), row_of=lambda item: Row(EVIL, EVIL))
    reader = Reader(page)
    assert len(reader.all("script")) == 1 and page.count("<script") == 1
    assert reader.all("img") == []
    assert not [key for _, attributes in reader.tags for key in attributes if key.startswith("on")]
    shown = EVIL.replace("\ud83d", "?").replace("\0", "\\x00").replace("\u202e", "\\u202e")
    assert reader.text.count(shown) >= 10
    assert "\0" not in page and "\u202e" not in page
    assert [each["dir"] for each in reader.all("pre") if "dir" in each] == ["auto"] * 2
    counts = json.loads(next(each["data-counts"] for each in reader.all("section") if "data-counts" in each))
    assert counts["wrong any any"] == 1


def test_the_only_script_that_may_run_is_the_pages_own_and_it_refers_to_nothing_outside(tmp_path):
    page = page_of(tmp_path, forty())
    policy = next(each["content"] for each in Reader(page).all("meta") if each.get("http-equiv"))
    script = re.search(r"<script>(.*?)</script>", page, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not re.search(r"https?://|url\(|@import", page)
    assert all(each["src"].startswith("data:image/webp;base64,") for each in Reader(page).all("img"))


def test_nothing_of_a_private_row_stands_in_the_page(tmp_path):
    secret = dict(gold="SECRET gold", responses=[response(1, "SECRET text", "SECRET answer")])
    items = [*(item(place, 1, benchmark="closed", **secret) for place in range(5)), *forty()]
    page = page_of(tmp_path, items, entry("closed", private=True), entry(),
                   row_of=lambda item: None if item.benchmark == "closed" else row_of(item))  # fmt: skip
    reader = Reader(page)
    assert "SECRET" not in page
    assert "Rows of The closed are not shown" in reader.text and "100.0" in reader.text
    assert [each["value"] for each in reader.all("option") if each.get("value") in ("ours", "closed")] == ["ours"]


def test_pictures_are_small_and_unreadable_ones_are_named(tmp_path):
    pictures = [png(size=(1200, 400)), b"no picture", "/no/such/file.png", png(size=(20, 10))]
    page = page_of(tmp_path, [item(0, 0)], row_of=lambda item: Row("<image>" * 4, "4", pictures))
    reader = Reader(page)
    assert [(each["width"], each["height"]) for each in reader.all("img")] == [("400", "133"), ("20", "10")]
    assert reader.text.count("a picture that cannot be read") == 2
    data = base64.b64decode(reader.all("img")[0]["src"].partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (400, 133)


def test_long_texts_and_many_responses_are_cut_and_the_page_says_by_how_much(tmp_path):
    long = "a" * 600_000 + "MIDDLE" + "b" * 399_994
    items = [item(0, 0, responses=[response(0, f"{long}END")] * 9)]
    page = page_of(tmp_path, items, row_of=lambda item: Row(long, "4", [png()] * 20))
    reader = Reader(page)
    assert "MIDDLE" not in page and "[… 992,003 characters are not shown …]" in reader.text
    assert "4 of 9 responses" in reader.text and "8 of 20 pictures" in reader.text and len(reader.all("img")) == 8
    assert len(reader.all("pre")) == 4 + 1 and page.count("END</span></summary>") == 4
    assert len(page) < 150_000


def articles(page):
    """(id, tokens, values) of the rows in the page."""
    ids = re.findall(r"<article.*?<b>(.*?)</b>", page, re.S)
    found = [each for each in Reader(page).all("article")]
    return [(name, set(each["data-tokens"].split(",")), each["data-values"].split(","))
            for name, each in zip(ids, found, strict=True)]  # fmt: skip


def test_each_outcome_shows_at_most_40_rows_evenly_spaced_and_counts_all(tmp_path):
    items = [item(place, place % 3 == 0, model, problem=str(place)) for model in MODELS for place in range(300)]
    page = page_of(tmp_path, items)
    shown = articles(page)
    right = [int(name) for name, tokens, _ in shown if "right any" in tokens]
    assert right == [i * 100 // 40 * 3 for i in range(40)]
    assert len([name for name, tokens, _ in shown if "wrong 1" in tokens]) == 40 and len(shown) == 80
    counts = json.loads(next(each["data-counts"] for each in Reader(page).all("section") if "data-counts" in each))
    assert (counts["right any any"], counts["wrong 0 any"], counts["any 1 any"]) == (100, 200, 300)
    assert "changed any any" not in counts
    values = re.findall(r'<option value="(\d)">(even|odd)</option>', page)
    assert values == [("0", "even"), ("1", "odd")]
    assert counts["right any 0"] == sum(place % 2 == 0 for place in range(0, 300, 3)) == 50
    assert all(each == ["any", str(int(name) % 2)] for name, _, each in shown)


def test_outcomes_are_those_of_each_model(tmp_path):
    undecided = [response(0, undecided=True)]
    items = [item(0, 1), item(1, 1), item(2, 0, responses=undecided), item(3, 0, contaminated=True),
             item(0, 1, "trained"), item(1, 0, "trained"), item(2, 1, "trained"),
             item(3, 0, "trained", contaminated=True)]  # fmt: skip
    found = {name: {token for token in tokens if not token.endswith("any") and not token.startswith("any")}
             for name, tokens, _ in articles(page_of(tmp_path, items))}  # fmt: skip
    assert found == {"0": {"right 0", "right 1"}, "1": {"right 0", "wrong 1", "changed 1"},
                     "2": {"wrong 0", "undecided 0", "right 1", "changed 1"},
                     "3": {"wrong 0", "wrong 1", "contaminated 0", "contaminated 1"}}  # fmt: skip


def test_the_official_rule_decides_in_the_page_too(tmp_path):
    items = [item(0, 0, responses=[response(0, undecided=True, lenient=True)])]
    (_, tokens, _), = articles(page_of(tmp_path, items, official=True))
    assert "right 0" in tokens and "undecided 0" not in tokens
    assert "official rules where they decide" in Reader(page_of(tmp_path, items, official=True)).text


def test_a_row_that_was_not_asked_says_why(tmp_path):
    page = page_of(tmp_path, [item(0, 0, responses=[], fault="prompt too long")])
    assert "not asked: prompt too long" in Reader(page).text


def test_the_same_items_give_the_same_page(tmp_path):
    items = [*forty(), *forty("trained", 2)]
    first = page_of(tmp_path, items)
    pages.picture.cache_clear()
    assert page_of(tmp_path, items) == first


def test_a_page_of_a_large_benchmark_stays_small(tmp_path):
    noise = Image.effect_noise((500, 400), 60)
    noise.save(file := io.BytesIO(), "PNG")
    said = [response(0, "a thought of some words. " * 300)]
    items = [item(place, place % 2, model, responses=said) for model in MODELS for place in range(3000)]
    page = page_of(tmp_path, items, row_of=lambda item: Row("<image>", "4", [file.getvalue()]))
    assert len(articles(page)) == 40 and len(page) < 6_000_000


def test_results_of_nothing_give_an_empty_table_and_page(tmp_path, capsys):
    results = summarise([], {}, False, 1)
    show(results, True)
    write_page(tmp_path / "report.html", results, [], row_of)
    assert capsys.readouterr().out.strip() == "" and "Scores" in (tmp_path / "report.html").read_text()
