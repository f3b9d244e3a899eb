"""The evaluation command: what is asked, what is kept, what is shown, and that a kill loses nothing."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from fixtures_benchmarks import publish_benchmark
from PIL import Image
from test_passrate import FEW, ROOT, Command, asked, nursery, rows_of, run_main, size, write  # noqa: F401

import train
from nanolmmr1 import config
from nanolmmr1.benchmarks.choose import choose_task, spread
from nanolmmr1.benchmarks.table import BENCHMARKS
from nanolmmr1.data.rows import load_rows
from nanolmmr1.errors import UserError
from nanolmmr1.evaluate import __main__ as command
from nanolmmr1.evaluate import answers, prompts
from nanolmmr1.prepare.__main__ import main as prepare

SUMS = [{"problem": f"How much is {n} + {n}?", "answer": str(2 * n), "id": f"sum{n}", "level": n % 2} for n in range(6)]
FILES = "items.jsonl", "results.json", "report.html"


@pytest.fixture
def sums(tmp_path):
    return write(tmp_path / "sums.jsonl", SUMS)


def evaluate(out, *arguments):
    """Run the command; its items and results."""
    model, *rest = arguments
    run_main(command, model, "--out", out, *rest, *FEW)  # options may stand anywhere
    return rows_of(out / "items.jsonl"), json.loads((out / "results.json").read_text())


def retold(out, texts):
    """Have the kept responses say these texts, in their order, by rules of another version."""
    texts = iter(texts)
    header, *chunks = rows_of(out / command.JOURNAL)
    for chunk in chunks:
        for result in chunk.values():
            for response in result["responses"]:
                response["text"] = next(texts)
            result["by"] = "another version"
    write(out / command.JOURNAL, [header, *chunks])


def test_items_results_and_page_say_who_was_right(sums, small_model, tmp_path, asked, capsys):  # noqa: F811
    out = tmp_path / "out"
    evaluate(out, small_model, sums)
    assert len(asked) == 6 and asked[0].count("put your final answer within \\boxed{}") == 1
    assert asked[0] in capsys.readouterr().out.replace("\r", "")  # what the model is given is shown
    retold(out, [f"It is \\boxed{{{n}}}" for n in (0, 2, 4, 7)] + ["It is 8.", "perhaps the sum of both of them"])
    items, results = evaluate(out, small_model, sums)
    assert len(asked) == 6  # judged again, asked once
    assert [item["responses"][0]["right"] for item in items] == [True, True, True, False, True, False]
    assert [item["responses"][0]["format"] for item in items] == [True] * 4 + [False] * 2
    assert [item["id"] for item in items] == [row["id"] for row in SUMS]
    (score,) = results["scores"]
    assert score["score"] == pytest.approx(4 / 6, abs=1e-6) and score["rows"] == 6
    assert score["low"] < 0.5 < score["high"]
    page = (out / "report.html").read_text()
    assert "How much is 3 + 3?" in page and "\\boxed{7}" in page and page.count("<script") == 1
    assert "66.7" in capsys.readouterr().out
    settings = results["settings"]
    assert settings["temperature"] == 0 and settings["models"]["small0"]["prompt"] == "boxed"


def test_every_benchmark_is_evaluated_in_its_published_layout(least, tmp_path, monkeypatch, capsys):
    results_of = answers.Answers.results

    def golden(self, test, places, said):
        """Every second row is answered with its gold answer."""
        return results_of(self, test, places, [
            [("I do not know." if place % 2 else f"\\boxed{{{test.rows[place].answer}}}", *rest) for _, *rest in each]
            for place, each in zip(places, said, strict=True)])  # fmt: skip

    monkeypatch.setattr(answers.Answers, "results", golden)
    sources = {name: publish_benchmark(name, tmp_path / name) for name in BENCHMARKS}
    out = tmp_path / "out"
    named = [f"{name}={source}" for name, source in sources.items()]
    items, results = evaluate(out, least, *named, "defaults.max_prompt_tokens=4096", "--subjects")
    assert not [item["fault"] for item in items if item["fault"]]
    for name, entry in BENCHMARKS.items():
        mine = [item for item in items if item["benchmark"] == name]
        right = [item["responses"][0]["right"] for item in mine]
        assert len(mine) >= 12 and not any(right[1::2]), name
        assert sum(right[::2]) >= 0.8 * len(right[::2]), (name, right)
        assert any(item["subjects"][column] for item in mine for column in entry.subjects) or not entry.subjects
    assert {score["benchmark"] for score in results["scores"]} == set(BENCHMARKS)
    _, results = evaluate(out, least, *named, "defaults.max_prompt_tokens=4096", "--official")
    assert results["official"] and "official rules" in capsys.readouterr().out
    private = [row.problem.partition("\n")[0] for row in load_rows(sources["gpqa_diamond"]).rows]
    for name in (*FILES, command.JOURNAL):
        assert not any(question in (out / name).read_text() for question in private), name


def test_two_models_are_compared_over_the_same_rows(sums, small_model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(small_model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"note": "another file, the same weights"}))
    out = tmp_path / "out"
    items, results = evaluate(out, small_model, sums, "--compare", other)
    assert [item["model"] for item in items] == ["small0"] * 6 + ["other"] * 6
    (difference,) = results["differences"]
    assert difference["model"] == "other" and difference["base"] == "small0" and difference["rows"] == 6
    assert difference["score"] == difference["lost"] == difference["gained"] == 0


def test_several_responses_give_pass_at_k_and_a_majority(sums, small_model, tmp_path):
    out = tmp_path / "out"
    evaluate(out, small_model, sums, "--samples", 3)
    retold(out, ["\\boxed{0}", "\\boxed{1}", "\\boxed{0}"] + ["\\boxed{2}", "\\boxed{1}", "\\boxed{1}"] +
           ["\\boxed{99}"] * 12)  # fmt: skip
    items, results = evaluate(out, small_model, sums, "--samples", 3)
    (score,) = results["scores"]
    assert [len(item["responses"]) for item in items] == [3] * 6
    assert score["score"] == pytest.approx((2 + 1) / 18, abs=1e-6)
    assert score["pass_at_k"] == pytest.approx(2 / 6, abs=1e-6) and score["majority"] == pytest.approx(1 / 6, abs=1e-6)
    assert results["settings"]["temperature"] == 1.0


def test_the_prompt_is_that_of_the_run_which_made_the_model(sums, small_model, tmp_path, asked, shared):  # noqa: F811
    run = tmp_path / "run"
    assert train.exit_status(["single", f"model={small_model}", f"output={run}", f"phases.train.data={sums}",
                              "phases.train.steps=1", "defaults.prompts_per_step=1", "defaults.group_size=2", *FEW,
                              "prompt.system=Think first.", "prompt.template=Solve: {problem}"]) == 0  # fmt: skip
    asked.clear()
    _, results = evaluate(tmp_path / "out", run, sums)
    assert len(asked) == 6 and all("Think first." in text and "Solve: How much" in text for text in asked)
    model = results["settings"]["models"]["run"]
    assert model["prompt"] == "recipe" and model["format"] == "think_answer"
    asked.clear()
    evaluate(tmp_path / "out", run, sums, "--prompt", "boxed")
    assert len(asked) == 6 and all("Think" not in text and "\\boxed{}" in text for text in asked)
    asked.clear()
    evaluate(tmp_path / "out", small_model, sums, "--prompt", "paper")
    assert all("<think>" in text for text in asked)
    asked.clear()
    source = publish_benchmark("mathvista", tmp_path / "mathvista")
    evaluate(tmp_path / "out", small_model, f"mathvista={source}", "--prompt", "official", "--limit", 3)
    assert len(asked) == 3 and all("Hint: Please answer the question" in text for text in asked)
    assert not any("\\boxed" in text for text in asked)


def test_rows_that_a_training_set_holds_are_left_out_of_a_second_score(sums, small_model, tmp_path, capsys):
    leaked = write(tmp_path / "train.jsonl", [SUMS[2], SUMS[3], {"problem": "Something else?", "answer": "5"}])
    prepare(["auto", str(leaked), str(tmp_path / "rows.jsonl"), "--against", str(sums)])
    out = tmp_path / "out"
    evaluate(out, small_model, sums)
    retold(out, ["\\boxed{0}", "2", "\\boxed{4}", "\\boxed{6}", "no", "no"])
    items, results = evaluate(out, small_model, sums, "--contaminated", tmp_path / "rows.jsonl.report.json")
    assert [item["id"] for item in items if item["contaminated"]] == ["sum2", "sum3"]
    (score,) = results["scores"]
    assert score["score"] == pytest.approx(4 / 6, abs=1e-6) and score["clean"]["score"] == 0.5
    assert score["contaminated"] == 2
    with pytest.raises(UserError, match="is no OUT.report.json of prepare"):
        evaluate(out, small_model, sums, "--contaminated", sums)
    copy = write(tmp_path / "copy.jsonl", [{**row, "id": f"another {row['id']}"} for row in SUMS])
    items, _ = evaluate(out, small_model, copy, "--contaminated", tmp_path / "rows.jsonl.report.json")
    assert [item["contaminated"] for item in items] == [False, False, True, True, False, False]
    other = write(tmp_path / "other.jsonl", [{"problem": "Something new?", "answer": "1"}])
    evaluate(out, small_model, other, "--contaminated", tmp_path / "rows.jsonl.report.json")
    assert "no report of --contaminated was made against it" in capsys.readouterr().out


def test_rows_of_one_id_are_told_apart(small_model, tmp_path):
    variants = [{"id": str(seed), "question": f"What is {seed} + {variant}?", "ground_truth": str(seed + variant),
                 "answer_type": "float", "subject": "arithmetic", "knowledge_level": "school"}
                for seed in (1, 2) for variant in range(10)]  # fmt: skip
    source = write(tmp_path / "dyn.jsonl", variants)
    leaked = write(tmp_path / "train.jsonl", [
        SUMS[0], *({"problem": variants[place]["question"], "answer": variants[place]["ground_truth"]}
                   for place in (7, 13))])  # fmt: skip
    prepare(["auto", str(leaked), str(tmp_path / "rows.jsonl"), "--against", f"dynamath={source}"])
    report = tmp_path / "rows.jsonl.report.json"
    items, results = evaluate(tmp_path / "out", small_model, f"dynamath={source}", "--contaminated", report)
    assert [place for place, item in enumerate(items) if item["contaminated"]] == [7, 13]
    assert len({item["id"] for item in items}) == 20 and len({item["problem"] for item in items}) == 2
    items, _ = evaluate(tmp_path / "out", small_model, f"dynamath={source}", "--contaminated", report, "--limit", 10)
    assert not any(item["contaminated"] for item in items)  # the places 0, 2, 4 ...
    write(source, [row | {"question": f"Now: {row['question']}"} for row in variants])
    with pytest.raises(UserError, match="2 of its 2 rows of dynamath are not in"):
        evaluate(tmp_path / "out", small_model, f"dynamath={source}", "--contaminated", report)


def test_gpqa_is_private_wherever_it_is_from(shared, small_model, tmp_path, capsys):
    source = publish_benchmark("gpqa_diamond", tmp_path / "gpqa")
    questions = [row.problem.partition("\n")[0] for row in load_rows(source).rows]
    out = tmp_path / "out"
    evaluate(out, small_model, source)
    texts = [capsys.readouterr().out, *((out / name).read_text() for name in (*FILES, command.JOURNAL))]
    assert not any(question in text for question in questions for text in texts)


def test_a_file_of_a_benchmarks_name_is_not_that_benchmark(small_model, tmp_path):
    _, results = evaluate(tmp_path / "out", small_model, write(tmp_path / "mathvision.jsonl", SUMS))
    (entry,) = results["benchmarks"].values()
    assert entry["title"] == str(tmp_path / "mathvision.jsonl") and not entry["published"] and not entry["rows"]


def test_a_column_that_the_score_needs_must_be_there(shared, small_model, tmp_path, monkeypatch):
    source = publish_benchmark("mmstar", tmp_path / "mmstar")
    monkeypatch.setitem(BENCHMARKS, "mmstar", BENCHMARKS["mmstar"]._replace(macro="axis"))
    with pytest.raises(UserError, match="no row has a column 'axis'"):
        evaluate(tmp_path / "out", small_model, f"mmstar={source}")


def test_a_limit_takes_rows_evenly():
    assert spread(6, 3) == [0, 2, 4] and [len(spread(6, limit)) for limit in (0, 1, 6, 7)] == [6, 1, 6, 6]


def test_a_row_that_cannot_be_asked_counts_as_wrong(sums, small_model, tmp_path):
    rows = write(tmp_path / "long.jsonl", [*SUMS, {"problem": "Long " * 900, "answer": "4", "id": "long"}])
    items, results = evaluate(tmp_path / "out", small_model, rows, "defaults.max_prompt_tokens=200")
    assert items[-1]["fault"] == "prompt too long" and items[-1]["responses"] == []
    assert results["scores"][0]["rows"] == 7 and results["scores"][0]["faults"] == {"prompt too long": 1}


def test_pictures_above_the_limit_are_counted(small_model, tmp_path):
    Image.new("RGB", (200, 100), "red").save(tmp_path / "large.png")
    Image.new("RGB", (28, 28), "red").save(tmp_path / "small.png")
    rows = write(tmp_path / "rows.jsonl", [
        {"problem": "<image> What?", "answer": "red", "images": [f"{name}.png"]} for name in ("large", "small")])
    _, results = evaluate(tmp_path / "out", small_model, rows)
    assert results["settings"]["benchmarks"][str(rows)]["reduced_pictures"] == 1


def test_what_cannot_work_is_refused_and_finished_items_stay(sums, small_model, tmp_path, shared, asked):  # noqa: F811
    out = tmp_path / "out"
    evaluate(out, small_model, sums)
    before = {name: (out / name).read_bytes() for name in FILES}
    (tmp_path / "text_model").mkdir()
    (tmp_path / "text_model" / "config.json").write_text('{"model_type": "qwen2"}')
    lost = write(tmp_path / "lost.jsonl", [{"problem": "<image> What?", "answer": "1", "images": ["gone.png"]}, *SUMS])
    for arguments, words in (
        ([small_model, "mathvisto"], "did you mean mathvista"),
        ([small_model, tmp_path / "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        ([small_model, f"mathvista={sums}"], "mathvista"),
        ([small_model, lost], "not scored without its pictures"),
        ([small_model, sums, sums], "named once"),
        ([tmp_path / "text_model", sums], "only Qwen2.5-VL"),
        ([small_model, sums, "--compare", tmp_path / "text_model"], "only Qwen2.5-VL"),
        ([small_model, sums, "--samples", "0"], "--samples=0"),
        ([small_model, sums, "model=other"], "model=other is set by MODEL"),
        ([small_model, sums, "prompt.system=Think."], "prompt.system=Think. is set by"),
        ([small_model, sums, "prompt.columns.answer=gold"], "gold"),
        ([small_model, out / "items.jsonl"], "items.jsonl is a folder there, or is read"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate(out, *arguments)
        assert {name: (out / name).read_bytes() for name in FILES} == before
    assert len(asked) == 6
    with pytest.raises(UserError, match="the folder of a run or model"):
        evaluate(small_model, small_model, sums)
    with pytest.raises(UserError, match="gsm8k is a benchmark: give it a task of its own"):
        choose_task([str(sums), "gsm8k"])
    for data in ([3], {}, ""):
        with pytest.raises(UserError, match="give {data: FILE or BENCHMARK"):
            config.load("single", ["model=m", "defaults.data=d", f"evaluate.tasks.t={json.dumps({'data': data})}"])


def test_rows_of_a_killed_command_do_not_stay(sums, small_model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".rows.killed").write_text("a question")
    evaluate(tmp_path / "out", small_model, sums)
    assert not list((tmp_path / "out").glob(".rows.*"))


def test_a_mistake_is_told_in_a_line_with_status_2(sums, small_model, tmp_path, nursery):  # noqa: F811
    status, said = Command(nursery, tmp_path, "evaluate", small_model, "mathvisto", "--out", tmp_path / "out").end()
    assert status == 2 and said.startswith("error: 'mathvisto' is no benchmark") and said.count("\n") == 1


def test_five_kills_change_no_file(small_model, tmp_path, nursery):  # noqa: F811
    rows = write(tmp_path / "rows.jsonl", [{"problem": f"Which of {n}?", "answer": "ABCDEFGHIJ"[n % 10]}
                                           for n in range(400)])  # fmt: skip
    options = [small_model, rows, "--samples", 8, *FEW]
    outs = {which: tmp_path / which for which in ("undisturbed", "killed")}
    status, said = Command(nursery, tmp_path, "evaluate", *options, "--out", outs["undisturbed"]).end()
    assert status == 0, said
    rng, kept, journal = random.Random(0), [], outs["killed"] / command.JOURNAL
    for _ in range(5):
        before = size(journal)
        process = Command(nursery, tmp_path, "evaluate", *options, "--out", outs["killed"])
        while process.is_running() and size(journal) == before:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.03)
        os.kill(process.pid, signal.SIGKILL)
        kept.append(process.end()[0])
    assert kept.count(-signal.SIGKILL) >= 3, "it was done before it was killed"
    whole = (outs["undisturbed"] / "items.jsonl").read_bytes()
    assert whole.startswith((outs["killed"] / "items.jsonl").read_bytes())  # written as the answers come
    status, said = Command(nursery, tmp_path, "evaluate", *options, "--out", outs["killed"]).end()
    assert status == 0, said
    for name in (*FILES, command.JOURNAL):
        assert (outs["killed"] / name).read_bytes() == (outs["undisturbed"] / name).read_bytes(), name


def test_two_ranks_give_the_items_of_one(shared, small_model, tmp_path):
    sources = [f"{name}={publish_benchmark(name, tmp_path / name)}" for name in ("mathvision", "math500")]
    arguments = [small_model, *sources, *FEW, "defaults.max_prompt_tokens=4096"]
    run_main(command, *arguments, "--out", tmp_path / "one")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m",
                    "nanolmmr1.evaluate", *map(str, arguments), "--out", tmp_path / "two"], cwd=ROOT, env=environment,
                   check=True, capture_output=True, text=True)  # fmt: skip
    for name in FILES:
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()


def test_a_run_shows_the_curve_of_a_benchmark(shared, small_model, sums, tmp_path):
    source, run = publish_benchmark("mathvision", tmp_path / "mathvision"), tmp_path / "run"
    assert train.exit_status([
        "single", f"model={small_model}", f"output={run}", f"phases.train.data={sums}", "phases.train.steps=2",
        "defaults.prompts_per_step=1", "defaults.group_size=2", *FEW, "evaluate.every_steps=1", "evaluate.limit=5",
        f"evaluate.tasks.vision={{data: 'mathvision={source}'}}"]) == 0  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["accuracy"]) == ["start", "train 1", "train"] and summary["rows"] == {"vision": 5}
    assert re.search(r'<td>0.0 <small>± 2\d\.\d</small>', (run / "report.html").read_text())


def test_labels_are_short_and_different():
    assert command.shortest(["Qwen/Qwen2.5-VL-3B-Instruct"]) == ["Qwen2.5-VL-3B-Instruct"]
    assert command.shortest(["runs/a/model", "runs/b/model", "base"]) == ["a", "b", "base"]
    assert command.shortest(["x/a", "y/a"]) == ["x/a", "y/a"]
    assert command.shortest(["/"]) == ["model"] and "/" not in command.shortest([".."])[0]


def test_another_model_of_the_name_is_asked_anew(sums, small_model, tmp_path, asked):  # noqa: F811
    model = tmp_path / "model"
    shutil.copytree(small_model, model)
    evaluate(tmp_path / "out", model, sums)
    with open(model / "model.safetensors", "r+b") as file:  # one bit of one weight
        file.seek(-4, os.SEEK_END)
        bit = file.read(1)[0] ^ 1
        file.seek(-4, os.SEEK_END)
        file.write(bytes([bit]))
    evaluate(tmp_path / "out", model, sums)
    assert len(asked) == 12


def test_a_recipe_that_cannot_be_read_is_told(small_model, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_model, run / "model")
    (run / "recipe.yaml").write_text("[")
    assert prompts.exported(str(run)) == str(run / "model") and answers.judged_by() == answers.judged_by()
    with pytest.raises(UserError, match="name one with --prompt"):
        run_main(command, run, write(tmp_path / "rows.jsonl", SUMS), "--out", tmp_path / "out", *FEW)
