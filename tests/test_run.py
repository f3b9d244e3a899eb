"""Whole runs of train.py: what they leave, how they end, and that a kill, a fault or a full disk loses nothing."""

import fcntl
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from ranks import on_disk_of
from safetensors.torch import load_file, save_file

from nanolmmr1 import config, schema
from nanolmmr1.data.prompt import Processor
from nanolmmr1.data.rows import PromptSampler
from nanolmmr1.errors import Preempted, UserError
from nanolmmr1.model import weights
from nanolmmr1.report.logs import read_lines
from nanolmmr1.run import setup
from nanolmmr1.run.trainer import Progress, Trainer

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
SMALL = [f"phases.train.{key}" for key in ("steps=2", "prompts_per_step=2", "group_size=2", "max_response_tokens=4")]
KEYS = """phase step phase_step reward/overall reward/accuracy reward/format reward/timeouts reward/frac_zero_std
    actor/pg_loss actor/kl_loss actor/entropy actor/ppo_kl actor/grad_norm actor/lr actor/skipped_steps mismatch/kl
    mismatch/logp_abs response_length/mean response_length/max response_length/min response_length/clip_ratio
    prompt_length/mean prompt_length/max dynamic/sampled_groups pack/micro_batches pack/split_groups timing_s/gen
    timing_s/reward timing_s/update_actor timing_s/step perf/throughput perf/peak_rss_mb""".split()

# Different responses earn different rewards, so that an untrained model has something to learn from.
VARIED = "def varied(response, row):\n    return sum(map(ord, response)) % 17 / 17\n"


def start(args, cwd=None, **options):
    """train.py as a process group of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, TRAIN, *args], env=env, cwd=cwd, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def kill_after(process, out, step):
    """SIGKILL the process group once the step has its checkpoint, and the next one is in both logs but hardly saved."""
    deadline = time.monotonic() + 300
    while not (out / "checkpoints" / f"step_{step}").exists() or len(read_lines(out / "samples.jsonl")) <= step:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(count):
    return [{"problem": f"How much is {n} + {n}?", "answer": str(2 * n)} for n in range(count)]


def functions(folder, code=VARIED):
    path = folder / "functions.py"
    path.write_text(code)
    return f'reward.functions={{"{path}:varied": 1.0}}'


@pytest.fixture
def run_here(capsys, monkeypatch):
    """train.py in this process, imports already paid for: (exit status, stdout, stderr)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", [str(TRAIN), *map(str, args)])
        try:
            runpy.run_path(str(TRAIN), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def tiny(least):
    """Less to save and load: these runs save often."""
    return least


@pytest.fixture(scope="module")
def single(tiny, tmp_path_factory):
    """A finished run of `single`, started from another folder with relative paths: (folder, stdout, arguments)."""
    home = tmp_path_factory.mktemp("single")
    write_rows(home / "rows.jsonl", sums(5))
    args = ["single", f"model={tiny}", "phases.train.data=rows.jsonl", "output=out", *SMALL]
    return home / "out", finish(start(args, cwd=home)), args


def test_a_run_leaves_every_file_with_the_documented_keys(single):
    out, said, _ = single
    files = ("recipe.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "report.html")
    assert all((out / name).stat().st_size for name in files)
    records = read_lines(out / "metrics.jsonl")
    assert [(r["phase"], r["step"]) for r in records] == [("train", 1), ("train", 2)]
    for record in records:
        assert set(KEYS) <= set(record)
        assert all(math.isfinite(value) for key, value in record.items() if key != "phase")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["accuracy"] == {}
    assert 0 < summary["wall_s"] < 300 and 100 < summary["peak_rss_mb"] < 4000
    assert "phases.train: 5 of 5 rows" in said
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_2"]
    assert len(read_lines(out / "samples.jsonl")[0]["responses"]) == 2


def test_the_model_a_run_leaves_is_a_whole_folder(single):
    out, _, _ = single
    model = weights.load(out / "model")
    (shard,) = (out / "checkpoints" / "step_2" / "tensors").iterdir()
    trained = load_file(shard)
    assert trained and all(torch.equal(p, trained[f"model/{name}"]) for name, p in model.named_parameters())
    Processor(out / "model", schema.Prompt())


def test_the_recipe_that_a_run_leaves_repeats_it(single, monkeypatch):
    out, _, args = single
    monkeypatch.chdir(out.parent)
    assert config.load(str(out / "recipe.yaml")) == config.load(args[0], args[1:])


def test_a_finished_run_started_again_says_so_and_changes_nothing(single, run_here, monkeypatch):
    out, _, args = single
    monkeypatch.chdir(out.parent)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    status, said, _ = run_here(*args)
    assert status == 0 and "is finished after 2 steps" in said
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"} == before


@pytest.mark.parametrize("override, words", [
    ("resume=never", "holds a run already (step_2)"), ("seed=1", "seed=0, not 1"),
    ("model=another", "not another"), ("phases.train.steps=two", "phases.train.steps='two'"),
])
def test_a_used_folder_refuses_another_run(single, run_here, monkeypatch, override, words):
    out, _, args = single
    monkeypatch.chdir(out.parent)
    status, _, error = run_here(*args, override)
    assert status == 2 and words in error and "Traceback" not in error


def test_a_run_killed_before_its_export_makes_it_when_started_again(single, run_here, tmp_path, monkeypatch):
    out, _, args = single
    home = shutil.copytree(out.parent, tmp_path / "home")
    shutil.rmtree(home / "out" / "model")
    (home / "out" / "summary.json").unlink()
    monkeypatch.chdir(home)
    assert run_here(*args)[0] == 0
    ours, theirs = (folder / "model" / "model.safetensors" for folder in (home / "out", out))
    assert ours.read_bytes() == theirs.read_bytes()
    assert json.loads((home / "out" / "summary.json").read_text())["steps"] == 2


def test_a_finished_run_can_be_made_longer_without_a_look_at_the_base_weights(single, run_here, tmp_path, monkeypatch):
    out, _, args = single
    home = shutil.copytree(out.parent, tmp_path / "home")
    monkeypatch.chdir(home)
    monkeypatch.delattr(weights, "fill")
    assert run_here(*args, "phases.train.steps=3")[0] == 0
    assert json.loads((home / "out" / "summary.json").read_text())["steps"] == 3
    assert [r["step"] for r in read_lines(home / "out" / "metrics.jsonl")] == [1, 2, 3]

    shutil.copy(out / "summary.json", home / "out" / "summary.json")  # as if killed just before its second export
    assert "is finished" not in run_here(*args, "phases.train.steps=3")[1]
    assert json.loads((home / "out" / "summary.json").read_text())["steps"] == 3


@pytest.fixture(scope="module")
def three_phases(shared, tiny, tmp_path_factory):
    """GSM8K text, MathVision with captions and a KL reference, MathVision alone: the recipe and its finished run."""
    home = tmp_path_factory.mktemp("three_phases")
    rows = read_lines(shared / "data" / "mathvision" / "testmini.jsonl")[:10]
    for row in rows:
        row["images"] = [str(shared / "data" / "mathvision" / image) for image in row["images"]]
        row["caption"] = row["problem"].replace("<image>", " ").strip().split("\n")[0]
    rows[3]["caption"] = ""
    vision = str(write_rows(home / "vision.jsonl", rows))
    text = str(shared / "data" / "gsm8k" / "test.jsonl")
    tree = {
        "model": str(tiny),
        "prompt": {"max_pixels": 50176},
        "reward": {"functions": yaml.safe_load(functions(home).partition("=")[2])},
        "checkpoint": {"every_steps": 1, "keep": 2},
        "evaluate": {"limit": 2, "tasks": {"text": {"data": text}, "image": {"data": vision, "captions": True}}},
        "defaults": {"steps": 2, "prompts_per_step": 2, "group_size": 3, "max_prompt_tokens": 130,
                     "max_response_tokens": 5, "lr": 1e-3},
        "phases": {
            "text": {"data": text, "freeze": ["vision", "embedding"]},
            "captions": {"data": vision, "captions": True, "freeze": ["embedding"], "max_prompt_tokens": 300,
                         "objective": {"kl_coef": 0.1}},
            "images": {"data": vision, "max_prompt_tokens": 250, "updates_per_rollout": 2},
        },
    }
    recipe = home / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree, sort_keys=False))
    return recipe, home / "whole", finish(start([str(recipe), f"output={home / 'whole'}"]))


def test_three_phases_run_on_real_rows_and_every_row_is_accounted_for(three_phases):
    _, out, said = three_phases
    totals = {"phases.text": 300, "phases.captions": 10, "phases.images": 10,
              "evaluate.text": 300, "evaluate.image": 10}
    dropped = {}
    for where, total in totals.items():
        line = next(line for line in said.splitlines() if line.startswith(f"{where}:"))
        counts, _, reasons = line.partition("; dropped: ")
        kept, of = (int(word) for word in counts.split() if word.isdigit())
        pairs = [] if reasons == "none" else [reason.split(" ", 1) for reason in reasons.split(", ")]
        dropped[where] = {reason: int(count) for count, reason in pairs}
        assert of == total == kept + sum(dropped[where].values()), line
    assert dropped["phases.text"]["prompt too long"] > 0  # so that the sums above can fail
    assert dropped["phases.captions"]["no caption"] == 1 and "no caption" not in dropped["phases.images"]

    records = read_lines(out / "metrics.jsonl")
    assert [r["phase"] for r in records] == 2 * ["text"] + 2 * ["captions"] + 2 * ["images"]
    assert [r["actor/kl_loss"] > 0 for r in records] == [False, False, False, True, False, False]
    assert all(r["actor/grad_norm"] > 0 and r["mismatch/logp_abs"] < 1e-4 for r in records)
    accuracy = json.loads((out / "summary.json").read_text())["accuracy"]
    assert {moment: set(tasks) for moment, tasks in accuracy.items()} == dict.fromkeys(
        ("start", "text", "captions", "images"), {"text", "image"})
    shown = [(s["phase"], bool(s["images"]), "caption" in s) for s in read_lines(out / "samples.jsonl")]
    assert set(shown) == {("text", False, False), ("captions", True, True), ("images", True, False)}


def test_a_run_killed_twice_ends_as_the_uninterrupted_one(three_phases):
    recipe, whole, _ = three_phases
    out = whole.with_name("killed")
    args = [str(recipe), f"output={out}"]
    kill_after(start(args), out, 1)  # inside the first phase
    kill_after(start(args), out, 3)  # inside the second, which keeps a KL reference
    finish(start(args))

    files = sorted(path.name for path in (whole / "model").iterdir())
    assert files == sorted(path.name for path in (out / "model").iterdir())
    assert all((out / "model" / name).read_bytes() == (whole / "model" / name).read_bytes() for name in files)
    expected, got = ([{k: v for k, v in record.items() if not k.startswith(("timing_s/", "perf/"))}
                      for record in read_lines(folder / "metrics.jsonl")] for folder in (whole, out))
    assert got == expected
    assert read_lines(out / "samples.jsonl") == read_lines(whole / "samples.jsonl")
    accuracies = [json.loads((folder / "summary.json").read_text())["accuracy"] for folder in (whole, out)]
    assert accuracies[0] == accuracies[1]


def picture(path, width=56, height=56):
    Image.new("RGB", (width, height), "white").save(path)
    return str(path)


def bomb(path):
    """A PNG whose header promises 10 gigapixels."""
    picture(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (100_000).to_bytes(4) * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    path.write_bytes(data)
    return str(path)


def changed_model(tiny, folder, **changes):
    """A copy of the checkpoint with other entries in config.json."""
    shutil.copytree(tiny, folder)
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | changes))
    return folder


def shardless_model(tiny, folder):
    changed_model(tiny, folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


ASK = {"problem": "<image>How many?", "answer": "2"}
BAD_ROWS = {
    "no rows": (lambda at: [], "holds no rows"),
    "no answer": (lambda at: [{"problem": "How many?"}], "no answer"),
    "fewer markers": (lambda at: [ASK | {"images": [picture(at / "a.png")] * 2}], "1 <image> markers"),
    "more markers": (lambda at: [{"problem": "<image><image>?", "answer": "2", "image": picture(at / "a.png")}],
                     "2 <image> markers"),
    "missing image": (lambda at: [ASK | {"images": ["gone.png"]}], "'gone.png' is missing"),
    "broken image": (lambda at: [ASK | {"images": [str(write_rows(at / "a.png", [{}]))]}], "a.png cannot be read"),
    "bomb": (lambda at: [ASK | {"images": [bomb(at / "bomb.png")]}], "has more than 64,000,000 pixels"),
    "outside": (lambda at: [ASK | {"images": ["../outside.png"]}], "leads out of"),
}


def check_refusal(outcome, out, *words):
    status, _, error = outcome
    assert status == 2
    assert error.startswith("error: ") and "Traceback" not in error
    assert all(word in error for word in words), error
    left = {path.name for path in out.iterdir()} if out.exists() else set()
    assert not left & {"model", "summary.json", "report.html", "checkpoints"}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused_before_work_starts(run_here, tiny, tmp_path, name):
    make, words = BAD_ROWS[name]
    folder = tmp_path / "data"
    folder.mkdir()
    picture(tmp_path / "outside.png")
    rows = write_rows(folder / "rows.jsonl", make(tmp_path))
    outcome = run_here("single", f"model={tiny}", f"phases.train.data={rows}", f"output={tmp_path / 'out'}", *SMALL)
    check_refusal(outcome, tmp_path / "out", words, "rows.jsonl")


BAD_MODELS = {
    "missing shards": (shardless_model, "lacks 1 of 2 shards: 'model-00002"),
    "another architecture": (lambda tiny, at: changed_model(tiny, at, model_type="llama"), "'llama'"),
    "no folder": (lambda tiny, at: at, "neither a folder here nor a hub id"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models_are_refused_before_work_starts(run_here, tiny, tmp_path, name):
    make, words = BAD_MODELS[name]
    rows = write_rows(tmp_path / "rows.jsonl", sums(3))
    model = make(tiny, tmp_path / "its_model")
    outcome = run_here("single", f"model={model}", f"phases.train.data={rows}", f"output={tmp_path / 'out'}", *SMALL)
    check_refusal(outcome, tmp_path / "out", words, "its_model")


def broken_yaml(folder):
    (folder / "broken.yaml").write_text("phases: {train: [}")
    return [str(folder / "broken.yaml")]


BAD_ARGUMENTS = {
    "missing data": (lambda at: ["phases.train.data=gone.jsonl"], "gone.jsonl does not exist"),
    "unreadable recipe": (broken_yaml, "not readable YAML"),
    "no recipe": (lambda at: ["singel"], "no recipe 'singel'"),
    "two recipes": (lambda at: ["single", "desk"], "single desk"),
    "an option": (lambda at: ["--steps", "single"], "--steps"),
    "unknown key": (lambda at: ["phases.train.learning_rate=1"], "did you mean phases.train."),
    "group of one": (lambda at: ["phases.train.group_size=1"], "use 2 or more"),
    "every prompt too long": (lambda at: ["phases.train.max_prompt_tokens=8"], "max_prompt_tokens=8"),
    "reward raises": (lambda at: [functions(at, "def varied(response, row): return 1 / 0")], "ZeroDivisionError"),
    "reward is NaN": (lambda at: [functions(at, "def varied(response, row): return float('nan')")], "returned nan"),
    "reward never returns": (lambda at: ["reward.timeout_s=0.5", functions(
        at, "def varied(response, row):\n    while True:\n        pass")], "reward.timeout_s=0.5"),
    "reward is absent": (lambda at: [functions(at, "def other(response, row): return 0.0")], "no function 'varied'"),
    "freezes an unknown part": (lambda at: ["phases.train.freeze=[eyes]"], "'eyes'"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_before_work_starts(run_here, tiny, tmp_path, name):
    make, words = BAD_ARGUMENTS[name]
    rows = write_rows(tmp_path / "rows.jsonl", sums(3))
    given = make(tmp_path)
    recipe = ["single"] if "=" in given[0] else []
    outcome = run_here(
        *recipe, f"model={tiny}", f"phases.train.data={rows}", f"output={tmp_path / 'out'}", *SMALL, *given)
    check_refusal(outcome, tmp_path / "out", words)


def test_a_folder_that_another_process_writes_is_refused(run_here, tiny, tmp_path):
    rows, out = write_rows(tmp_path / "rows.jsonl", sums(3)), tmp_path / "out"
    out.mkdir()
    (out / ".nanolmmr1").touch()
    with open(out / ".lock", "w") as file:  # locks belong to the open file, so this is as good as another process
        fcntl.flock(file, fcntl.LOCK_EX)
        outcome = run_here("single", f"model={tiny}", f"phases.train.data={rows}", f"output={out}", *SMALL)
    check_refusal(outcome, out, "another process is writing this run")


def test_a_reward_function_that_fails_later_loses_no_step(run_here, tiny, tmp_path):
    rows, out = sums(6), tmp_path / "out"
    second = next(i for i in PromptSampler(6, 0, "train").take(2, 2) if i)  # rows[0] is asked about at the start
    failing = VARIED.replace("    return", f"    assert row['problem'] != {rows[second]['problem']!r}\n    return")
    args = ["single", f"model={tiny}", f"phases.train.data={write_rows(tmp_path / 'rows.jsonl', rows)}", *SMALL]
    status, _, error = run_here(*args, f"output={out}", functions(tmp_path, failing))
    assert status == 2 and "AssertionError" in error and "line 2" in error
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_1"]
    assert not (out / "model").exists() and not (out / "summary.json").exists()

    assert run_here(*args, f"output={out}", functions(tmp_path))[0] == 0
    assert run_here(*args, f"output={tmp_path / 'whole'}", functions(tmp_path))[0] == 0
    resumed, whole = ((folder / "model" / "model.safetensors").read_bytes() for folder in (out, tmp_path / "whole"))
    assert resumed == whole


def test_a_run_resumed_with_fewer_steps_than_it_has_taken_ends(run_here, tiny, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl", sums(3))
    args = ["single", f"model={tiny}", f"phases.train.data={rows}", f"output={tmp_path / 'out'}", *SMALL]
    step = Trainer.step

    def stopped(self):
        if self.progress.step == 2:
            raise Preempted
        return step(self)

    monkeypatch.setattr(Trainer, "step", stopped)
    assert run_here(*args, "phases.train.steps=3")[0] == 143
    monkeypatch.setattr(Trainer, "step", None)  # no further step
    assert run_here(*args, "phases.train.steps=1")[0] == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 2


def test_nan_weights_are_skipped_counted_and_end_the_run(run_here, tiny, tmp_path):
    model = changed_model(tiny, tmp_path / "nan_model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    rows, out = write_rows(tmp_path / "rows.jsonl", sums(3)), tmp_path / "out"
    outcome = run_here("single", f"model={model}", f"phases.train.data={rows}", f"output={out}", *SMALL,
                       "phases.train.steps=5", "optim.max_bad_steps=2", "checkpoint.every_steps=1")
    check_refusal(outcome, out, "2 steps in a row", "non-finite")
    records = read_lines(out / "metrics.jsonl")
    assert [r["actor/skipped_steps"] for r in records] == [1, 2]
    assert all(r["actor/pg_loss"] is None and "actor/pg_loss" in r["nonfinite"] for r in records)


def test_a_rate_that_explodes_ends_the_run_and_keeps_the_last_good_checkpoint(run_here, tiny, tmp_path):
    rows, out = write_rows(tmp_path / "rows.jsonl", sums(3)), tmp_path / "out"
    status, _, error = run_here(
        "single", f"model={tiny}", f"phases.train.data={rows}", f"output={out}", functions(tmp_path), *SMALL,
        "phases.train.steps=9", "phases.train.lr=1e30", "checkpoint.every_steps=1", "checkpoint.keep=1")
    assert status == 2 and "3 steps in a row" in error and "lower lr (now 1e+30)" in error
    skipped = [r["actor/skipped_steps"] for r in read_lines(out / "metrics.jsonl")]
    good = skipped.count(0)
    assert good >= 1 and skipped[good:] == [1, 2, 3]
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step_{good}"]
    assert not (out / "model").exists()


@pytest.mark.parametrize("megabytes, status", [(110, 0), (70, 2)])
def test_a_full_disk_stops_no_training_and_spoils_no_checkpoint(tiny, tmp_path, megabytes, status):
    """A checkpoint takes 59 MB, the exported model 24: either a checkpoint and the export have room, or only one."""
    prefix = on_disk_of(megabytes, tmp_path / "disk")
    rows = write_rows(tmp_path / "rows.jsonl", sums(3))
    args = ["single", f"model={tiny}", f"phases.train.data={rows}", f"output={tmp_path / 'disk' / 'out'}", *SMALL]
    script = '"$@"; status=$?; cd disk/out; ls checkpoints; ls model; wc -l < metrics.jsonl; exit $status'
    run = subprocess.run([*prefix, "sh", "-c", script, "sh", sys.executable, TRAIN, *args, "checkpoint.every_steps=1"],
                         cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    said, _, left = run.stdout.partition("step_1\n")
    assert run.returncode == status, run.stderr
    assert "no checkpoint at step 2, the last good one stays" in said and "No space left" in said
    assert "step_2" not in left and left.endswith("2\n")
    assert ("model.safetensors" in left) == (status == 0)
    assert "Traceback" not in run.stderr and ("model cannot be written" in run.stderr) == (status == 2)


def test_the_best_checkpoint_stays_also_if_its_evaluation_was_cut_short(run_here, tiny, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl", sums(3))
    args = ["single", f"model={tiny}", f"phases.train.data={rows}", functions(tmp_path), *SMALL,
            "phases.train.steps=4", "checkpoint.every_steps=1", "checkpoint.keep=1", "evaluate.every_steps=1",
            f"evaluate.tasks.held={{data: {rows}}}"]  # fmt: skip
    scores = {0: 0.0, 1: 0.9, 2: 0.1, 3: 0.2, 4: 0.3}
    found = []

    def run(out, cut):
        """Started again whenever an evaluation is cut short; step -> score as told in the end."""
        left = set(cut)

        def evaluate(tasks, sampler, *others):
            step = max([0, *(r["step"] for r in read_lines(out / "metrics.jsonl"))])
            if step in left:
                left.remove(step)
                raise Preempted
            return {"held": scores[step]}

        monkeypatch.setattr("nanolmmr1.run.loop.evaluate", evaluate)
        statuses = [run_here(*args, f"output={out}")[0] for _ in range(len(cut) + 1)]
        assert statuses == [143] * len(cut) + [0]
        found.append(json.loads((out / "summary.json").read_text())["accuracy"])
        return sorted(path.name for path in (out / "checkpoints").glob("step_*"))

    assert run(tmp_path / "whole", []) == run(tmp_path / "cut", [1, 3]) == ["step_1", "step_4"]
    assert found[0] == found[1] == {"start": {"held": 0.0}, "train": {"held": 0.3}} | {
        f"train {step}": {"held": scores[step]} for step in (1, 2, 3)}


def test_a_task_that_comes_late_has_no_accuracy_of_the_start(single, run_here, tmp_path, monkeypatch):
    out, _, args = single
    home = shutil.copytree(out.parent, tmp_path / "home")
    monkeypatch.chdir(home)
    assert run_here(*args, "phases.train.steps=3", "evaluate.tasks.held={data: rows.jsonl}")[0] == 0
    assert list(json.loads((home / "out" / "summary.json").read_text())["accuracy"]) == ["train"]


def test_a_run_in_an_embedded_world_resumes(run_here, tiny, tmp_path):
    world = tmp_path / "out" / "world"
    world.mkdir(parents=True)
    (tmp_path / "out" / ".nanolmmr1").touch()
    (world / "model").symlink_to(tiny)
    write_rows(world / "rows.jsonl", sums(3))
    keys = {key: int(value) for key, _, value in (arg.removeprefix("phases.train.").partition("=") for arg in SMALL)}
    recipe = tmp_path / "world.yaml"
    recipe.write_text(yaml.safe_dump({"world": "desk", "model": "world:model", "phases": {
        "train": keys | {"data": "world:rows.jsonl"}}}))
    assert run_here(recipe, f"output={tmp_path / 'out'}", "phases.train.steps=1")[0] == 0
    status, said, error = run_here(recipe, f"output={tmp_path / 'out'}")
    assert status == 0, error
    assert "2 steps" in said


STOPS = {signal.SIGTERM: 143, signal.SIGINT: 130}  # SIGHUP only has another number, see test_watch.py


@pytest.mark.parametrize("number", STOPS, ids=lambda number: number.name)
def test_a_signal_costs_no_whole_step_and_the_run_goes_on_from_there(single, tmp_path, number):
    whole, _, args = single
    out, told = tmp_path / "out", [*args, f"output={tmp_path / 'out'}", "phases.train.steps=1000"]
    process = start(told, cwd=whole.parent)
    for line in process.stdout:
        if line.startswith("train  "):
            break
    process.send_signal(number)
    said, error = process.communicate(timeout=60)
    assert process.returncode == STOPS[number] and not error
    step = int(re.search(rf"stopped by {number.name} after step (\d+): start the same command again", said)[1])
    assert step >= 1 and [path.name for path in (out / "checkpoints").iterdir()] == [f"step_{step}"]
    said = finish(start([*told[:-1], f"phases.train.steps={step + 1}"], cwd=whole.parent))
    assert [record["step"] for record in read_lines(out / "metrics.jsonl")] == list(range(1, step + 2)), said


def test_before_the_first_step_a_signal_ends_the_run_with_one_line(tiny, tmp_path, number=signal.SIGINT):
    waiting = (f"import pathlib, time\n\ndef varied(*_):\n    pathlib.Path({str(tmp_path / 'waiting')!r}).touch()\n"
               "    time.sleep(9)\n    return 0\n")
    rows = write_rows(tmp_path / "rows.jsonl", sums(3))  # the run is amid its look at them
    process = start(["single", f"model={tiny}", f"phases.train.data={rows}", functions(tmp_path, waiting),
                      f"output={tmp_path / 'out'}", *SMALL])  # fmt: skip
    deadline = time.monotonic() + 100
    while not (tmp_path / "waiting").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    said, error = process.communicate(timeout=60)
    assert process.returncode == STOPS[number]
    assert error == f"stopped by {number.name} before the first step\n" and "train" not in said


def test_help_lists_every_key_and_recipe(run_here):
    status, said, _ = run_here("--help")
    assert status == 0
    assert all(f"  {key}={json.dumps(default)}\n      {text}\n" in said for key, default, text in config.known_keys())
    assert all(path.stem in said for path in config.RECIPES.glob("*.yaml"))


def test_a_kl_reference_that_is_not_what_was_written_is_refused(tiny, tmp_path):
    cfg = config.load("single", [f"model={tiny}", "phases.train.data=rows.jsonl", "phases.train.objective.kl_coef=0.1"])
    policy = SimpleNamespace(model=weights.load(tiny), device=torch.device("cpu"), reference=None)
    progress = Progress()
    first = setup.load_reference(cfg, tmp_path, "train", policy, tiny, progress)
    progress.phase, progress.phase_step = "train", 1
    again = setup.load_reference(cfg, tmp_path, "train", policy, tiny, progress)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    shard = tmp_path / "reference" / "train" / "model.safetensors"
    with open(shard, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(UserError, match="model.safetensors does not hold what was written.*another output"):
        setup.load_reference(cfg, tmp_path, "train", policy, tiny, progress)
    shard.unlink()
    with pytest.raises(UserError, match="model.safetensors is missing"):
        setup.load_reference(cfg, tmp_path, "train", policy, tiny, progress)
