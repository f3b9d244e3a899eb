"""Pass rates: what is asked, what is kept, and that a kill loses nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from nanolmmr1 import passrate
from nanolmmr1.data.prompt import Processor
from nanolmmr1.data.rows import load_rows
from nanolmmr1.errors import Preempted, UserError
from nanolmmr1.reward.judge import Judge
from nanolmmr1.rollout.local import LocalSampler

ROOT = Path(__file__).resolve().parents[1]
FEW = ["defaults.max_response_tokens=3", "prompt.max_pixels=6000", "reward.workers=1"]
# A process that has imported everything; it forks one per command, which is killed in the test.
NURSERY = """
import json, os, sys
from nanolmmr1 import caption, passrate
from nanolmmr1.evaluate import __main__ as evaluate
from nanolmmr1.prepare import sampling
for line in sys.stdin:
    name, said, *arguments = json.loads(line)
    if not (child := os.fork()):
        sys.argv[1:] = arguments
        for number in (1, 2):
            os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        sampling.run({"caption": caption, "evaluate": evaluate, "passrate": passrate}[name].main)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Command:
    """A command in a process of its own; `said` is its output and errors."""

    def __init__(self, nursery, folder, name, *arguments):
        self.nursery, self.file = nursery, folder / "said.txt"
        self.file.unlink(missing_ok=True)
        nursery.stdin.write(json.dumps([name, str(self.file), *map(str, arguments)]) + "\n")
        nursery.stdin.flush()
        self.pid = int(nursery.stdout.readline())

    def is_running(self):
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
        except OSError:
            return False

    def end(self):
        """Wait; returns status and output."""
        return int(self.nursery.stdout.readline()), self.file.read_text() if self.file.exists() else ""


@pytest.fixture(scope="session")
def nursery():
    """Starts commands in processes of their own, as often as needed; torch is imported once."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, "-c", NURSERY], cwd=ROOT, env=environment, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    yield process
    process.stdin.close()
    process.wait()


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_main(module, *arguments):
    """Run a command in this process; 0 if it ended well."""
    return module.main([*map(str, arguments)]) or 0


def size(path):
    return path.stat().st_size if path.exists() else 0


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def rows(tmp_path):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "red.png")
    return write(tmp_path / "rows.jsonl", [
        {"problem": "<image> How many?", "answer": "7", "images": ["red.png"], "level": 3},
        {"problem": "How much is 1 + 2?", "answer": "3", "note": {"from": "me"}},
        {"problem": "Long " * 300, "answer": "4"},
    ])  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """The prompts that samplers have been asked, as text."""
    prompts, generate = [], LocalSampler.generate

    def noted(self, new, *args, **options):
        prompts.extend(prompt.text for prompt in new)
        return generate(self, new, *args, **options)

    monkeypatch.setattr(LocalSampler, "generate", noted)
    return prompts


def test_out_is_the_rows_with_a_pass_rate(rows, small_model, monkeypatch, capsys):
    def half_right(self, pairs):
        return [{"accuracy": float(i % 2 and "How much" in row["problem"])} for i, (_, row) in enumerate(pairs)]

    monkeypatch.setattr(Judge, "score", half_right)
    out = rows.with_name("out.jsonl")
    arguments = [small_model, rows, out, "--samples", 4, *FEW, "defaults.max_prompt_tokens=200"]
    run_main(passrate, *arguments)
    written, given = rows_of(out), rows_of(rows)
    assert [row["pass_rate"] for row in written] == [0, 0.5, None]
    for theirs, ours in zip(given, written, strict=True):
        kept = {key: ours[key] for key in ours if key not in ("id", "pass_rate")}
        assert {"images": [], "nanolmmr1": 1} | theirs == kept
    said = " ".join(capsys.readouterr().out.split())
    assert "not asked: prompt too long 1" in said and "pass rate (0.25, 0.5] 1" in said and "asked now 3" in said
    assert load_rows(str(out)).rows[1].extra["pass_rate"] == 0.5
    run_main(passrate, *arguments)
    said = " ".join(capsys.readouterr().out.split())
    assert "not asked: prompt too long 1" in said and "asked now 0" in said


def test_a_second_run_asks_nothing_and_more_rows_ask_the_new_ones(rows, small_model, asked):
    out = rows.with_name("out.jsonl")
    arguments = [small_model, rows, out, "--samples", 2, *FEW]
    run_main(passrate, *arguments)
    first, count = out.read_bytes(), len(asked)
    out.unlink()
    run_main(passrate, *arguments)
    assert out.read_bytes() == first and len(asked) == count == 3
    given = rows_of(rows)
    write(rows, [{"problem": "How much is 2 + 2?", "answer": "4"}, *given, given[1]])
    run_main(passrate, *arguments)
    assert len(asked) == count + 1 and "2 + 2" in asked[-1]
    assert [row["pass_rate"] for row in rows_of(out)[1:4]] == [json.loads(line)["pass_rate"] for line in first.split(
        b"\n")[:3]]  # fmt: skip


@pytest.mark.parametrize("change", [["defaults.temperature=0.5"], ["prompt.system=Think."], ["seed=1"]])
def test_other_settings_ask_again(rows, small_model, asked, change):
    out = rows.with_name("out.jsonl")
    run_main(passrate, small_model, rows, out, "--samples", 1, *FEW)
    run_main(passrate, small_model, rows, out, "--samples", 1, *FEW, *change)
    assert len(asked) == 6


def test_another_picture_or_another_model_asks_again(rows, small_model, asked, tmp_path):
    out, model = rows.with_name("out.jsonl"), tmp_path / "model"
    subprocess.run(["cp", "-r", small_model, model], check=True)
    arguments = [model, rows, out, "--samples", 1, *FEW]
    run_main(passrate, *arguments)
    Image.new("RGB", (60, 40), "blue").save(tmp_path / "red.png")
    run_main(passrate, *arguments)
    assert len(asked) == 4
    with open(model / "model.safetensors", "r+b") as file:  # one bit of one weight
        file.seek(-4, os.SEEK_END)
        bit = file.read(1)[0] ^ 1
        file.seek(-4, os.SEEK_END)
        file.write(bytes([bit]))
    run_main(passrate, *arguments)
    assert len(asked) == 7


def test_without_images_the_model_sees_none(rows, small_model, asked):
    out, both = rows.with_name("out.jsonl"), rows.with_name("both.jsonl")
    run_main(passrate, small_model, rows, out, "--samples", 1, *FEW)
    run_main(passrate, small_model, out, both, "--samples", 1, "--without-images", *FEW)
    assert "image_pad" in asked[0] and len(asked) == 6
    assert "How many?" in asked[3] and "image" not in asked[3]
    assert all("pass_rate_without_images" in row and "pass_rate" in row for row in rows_of(both))
    assert rows_of(both)[0]["images"] == ["red.png"] and "<image>" in rows_of(both)[0]["problem"]
    with pytest.raises(UserError, match="holds work with column=pass_rate, not pass_rate_without_images"):
        run_main(passrate, small_model, rows, out, "--samples", 1, "--without-images", *FEW)


def test_no_optimizer_is_allocated_and_a_user_function_is_not_called(rows, small_model, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "__init__", lambda *_, **__: pytest.fail("an optimizer"))
    functions = f'reward.functions={{"{rows.with_name("none.py")}:missing": 1.0}}'
    run_main(passrate, small_model, rows, rows.with_name("out.jsonl"), "--samples", 1, *FEW, functions)


def test_a_picture_that_has_gone_makes_a_null(rows, small_model, monkeypatch, capsys):
    prepare = Processor.measure

    def measure(self, row, captions):
        if row.images:
            (rows.parent / "red.png").unlink()
        return prepare(self, row, captions)

    monkeypatch.setattr(Processor, "measure", measure)
    out = rows.with_name("out.jsonl")
    run_main(passrate, small_model, rows, out, "--samples", 1, *FEW)
    assert [row["pass_rate"] is None for row in rows_of(out)] == [True, False, False]
    assert "not asked" in capsys.readouterr().out


def test_a_signal_ends_it_with_finished_chunks_kept(rows, small_model, monkeypatch, asked):
    monkeypatch.setattr("nanolmmr1.prepare.sampling.CHUNK", 1)
    out, score = rows.with_name("out.jsonl"), Judge.score

    def stop(self, pairs):
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(self, pairs)

    monkeypatch.setattr(Judge, "score", stop)
    arguments = [small_model, rows, out, "--samples", 1, *FEW]
    with pytest.raises(Preempted) as stopped:
        run_main(passrate, *arguments)
    assert stopped.value.exit_status == 143 and len(asked) == 2 and not out.exists()
    run_main(passrate, *arguments)
    assert len(asked) == 3 and len(rows_of(out)) == 3


def test_what_cannot_work_is_refused_before_anything_is_asked(rows, small_model, tmp_path, shared):
    (tmp_path / "text_model").mkdir()
    (tmp_path / "text_model" / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "file").touch()
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "precious.jsonl").touch()
    out, before = tmp_path / "out.jsonl", sorted(path.name for path in tmp_path.iterdir())
    for arguments, words in (
        ([small_model, tmp_path / "missing.jsonl", out], "missing.jsonl"),
        ([small_model, rows, rows], "which is read"),
        ([small_model, tmp_path, out], "lies in"),
        ([tmp_path / "text_model", rows, out], "only Qwen2.5-VL"),
        ([tmp_path / "nowhere", rows, out], "nowhere"),
        ([small_model, rows, tmp_path / "out.csv"], "csv"),
        ([small_model, rows, tmp_path / "file" / "out.jsonl"], "cannot be written"),
        ([small_model, rows, tmp_path / "folder.jsonl"], "cannot be written"),
        ([small_model, rows, tmp_path / "precious.jsonl"], "choose another output"),
        ([small_model, rows, out, "--samples=0"], "samples"),
        ([small_model, rows, out, "--column=answer"], "another name"),
        ([small_model, rows, out, "rollout.engin=vllm"], "rollout.engine"),
    ):
        with pytest.raises(UserError, match=words):
            run_main(passrate, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_mistake_is_told_in_a_line_with_status_2(rows, tmp_path, nursery):
    status, said = Command(nursery, tmp_path, "passrate", tmp_path / "nowhere", rows, tmp_path / "out.jsonl").end()
    assert status == 2 and said.startswith("error: model=") and said.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_command_says_how_to_go_on(rows, small_model, tmp_path, nursery, number):
    write(rows, [{"problem": f"Which of {n}?", "answer": "A"} for n in range(2000)])
    out = tmp_path / "out.jsonl"
    command = Command(nursery, tmp_path, "passrate", small_model, rows, out, "--samples", 8, *FEW)
    while command.is_running() and size(Path(f"{out}.cache")) < 100:
        time.sleep(0.001)
    os.kill(command.pid, number)
    status, said = command.end()
    assert status == 128 + number and "of 2000 answers kept: start the same command again" in said, said
    assert "Traceback" not in said and not out.exists()


def kill_and_go_on(nursery, folder, name, model, rows, *options):
    """Run a command undisturbed; kill it five times at random moments, let it end, and compare. Returns OUT."""
    outs = {which: folder / f"{which}.jsonl" for which in ("undisturbed", "killed")}
    caches = {which: Path(f"{out}.cache") for which, out in outs.items()}
    status, said = Command(nursery, folder, name, model, rows, outs["undisturbed"], *options).end()
    assert status == 0, said
    rng, kept = random.Random(0), []
    for _ in range(5):
        before = size(caches["killed"])
        command = Command(nursery, folder, name, model, rows, outs["killed"], *options)
        while command.is_running() and size(caches["killed"]) == before:
            time.sleep(0.001)  # until it has begun, or goes on
        time.sleep(rng.random() * 0.03)
        os.kill(command.pid, signal.SIGKILL)
        kept.append(command.end()[0])
    assert kept.count(-signal.SIGKILL) >= 3, "it was done before it was killed"
    status, said = Command(nursery, folder, name, model, rows, outs["killed"], *options).end()
    assert status == 0, said
    assert outs["killed"].read_bytes() == outs["undisturbed"].read_bytes()
    assert caches["killed"].read_bytes() == caches["undisturbed"].read_bytes()
    return outs["killed"]


def test_five_kills_change_no_pass_rate(small_model, tmp_path, nursery):
    records = [{"problem": f"Which of {n}?", "answer": "ABCDEFGHIJ"[n % 10]} for n in range(400)]
    rows = write(tmp_path / "rows.jsonl", records)
    options = ["--samples", 8, *FEW, "defaults.max_response_tokens=1"]
    out = kill_and_go_on(nursery, tmp_path, "passrate", small_model, rows, *options)
    assert len({row["pass_rate"] for row in rows_of(out)}) > 1


def test_the_command_leaves_the_signal_handlers_alone(rows, small_model):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run_main(passrate, small_model, rows, rows.with_name("out.jsonl"), "--samples", 1, *FEW)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
