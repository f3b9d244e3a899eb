"""One call on a GPU: each part by its CPU twin, parts that hang or crash, verdicts that put no number for a failure."""

import json
import signal
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bench.__main__ as bench_all
from bench import attention, carry, gpu, linear_logprob, linear_loss, mrope, probe, rmsnorm, step, swiglu, verdict
from bench.machine import machine
from bench.verdict import Question, answer, at_most, questions, times_as_fast, winner

DEVICES = "cpu", "cuda"
TINY_HEAD = 16, 8, 101  # tokens, hidden size, vocabulary
python_says = [sys.executable, "-c"]


@pytest.fixture
def parts(monkeypatch):
    """Set what parts run: name -> commands."""

    def choose(**chosen):
        monkeypatch.setattr(gpu, "commands", lambda name, *_: chosen[name])

    return choose


def call(out, *options):
    """Exit status, state of each part, and question -> verdict."""
    status = gpu.main(["--dry", "--out", str(out), "--to", str(out / "nothing"), *options])
    told = json.loads((out / "verdicts.json").read_text())
    assert told["dry"] and (out / "verdicts.txt").read_text().count("VERDICT") == len(told["verdicts"])
    return status, told["parts"], {verdict["question"]: verdict for verdict in told["verdicts"]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU twin")
def test_a_dry_call_runs_every_part_and_answers_every_question(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(linear_loss.SHAPES, "cpu", [("3B, V / 8, N 64", *TINY_HEAD)])
    whole, seen = gpu.run, []

    def run(command, log, env, seconds):
        """In this process where that saves the imports."""
        seen.append(command)
        mains = {"bench.probe": probe.main, "bench.step": step.main, "bench": bench_all.run}
        if "pytest" in command:
            assert {"-m", "gpu", "--collect-only"} <= set(command)
            log.write_text("===== 3 passed, 1 skipped in 1.50s =====\n")
            return "done"
        if command[1] == "-m" and command[2] in mains:
            status = mains[command[2]](command[3:])
            log.write_text(capsys.readouterr().out)
            return f"failed: exit status {status}" if status else "done"
        return whole(command, log, env, seconds)

    monkeypatch.setattr(gpu, "run", run)
    status, states, verdicts = call(tmp_path, "--archive", str(tmp_path / "all.tgz"))
    assert status == 0 and states.pop("vllm").startswith("not run"), states
    assert states == dict.fromkeys(states, "done") and len(states) == len(gpu.PARTS) - 1 == len(seen)
    assert verdicts["vision MLP, width"]["result"].startswith("winner 1")
    assert verdicts["update, shared prompt against repeated"]["result"] in ("met", "missed")
    assert verdicts["pytest -m gpu"]["result"] == "met" and "3 passed" in verdicts["pytest -m gpu"]["numbers"]
    assert "peak of resident memory" in verdicts["desk run, planned against measured peak"]["numbers"]
    for question in questions("cpu"):  # whatever is not measured says why, and it is never that a name is unknown
        told = verdicts[question.text]
        assert "no such row" not in told["numbers"]
        assert told["result"] != "not measured" or "needs a CUDA device" in told["numbers"] or "mfu" in told["numbers"]
    with tarfile.open(tmp_path / "all.tgz") as packed:
        assert {"gpu/verdicts.json", "gpu/probe.json", "gpu/step.log"} <= set(packed.getnames())


def names_on(device, monkeypatch):
    """`op: case: provider` of all that the benches of ops would run on a device, as far as names go."""
    for module in (linear_loss, linear_logprob):
        shapes = {"cpu": [(name, *TINY_HEAD) for name, *_ in linear_loss.SHAPES[device]]}
        for case in module.cases("cpu", torch.float32, shapes):
            yield from (f"{module.__name__[6:]}: {case.name}: {provider}" for provider in case.providers)
    for _, name, _, _ in attention.shapes(device):
        shared = ", repeated" if "shared" in name else ""
        for mode in ("forward", "backward", "full"):
            yield from (f"attention: {name}, {mode}: {who}" for who in ("triton", f"torch varlen_attn{shared}"))
    monkeypatch.setattr(mrope, "language", lambda tokens, *_: [f"mrope, {tokens:,} tokens"])
    monkeypatch.setattr(mrope, "vision", lambda *_: [])
    for name in mrope.cases(device, torch.bfloat16):
        yield from (f"mrope: {name}, {mode}: triton" for mode in ("forward", "backward"))
    with FakeTensorMode():
        for module in (rmsnorm, swiglu):
            for case in module.cases(device, torch.bfloat16):
                yield from (f"{module.__name__[6:]}: {case.name}: {provider}" for provider in case.providers)


@pytest.mark.parametrize("device", DEVICES)
def test_questions_ask_for_rows_that_the_benches_make(device, monkeypatch):
    made = set(names_on(device, monkeypatch))
    asked = {name for question in questions(device) for name in question.names}
    assert {name for name in asked if name.partition(":")[0] in bench_all.OPS} <= made
    assert {name.partition(":")[0] for name in asked} == {op for ops in gpu.OPS.values() for op in ops}


def test_sizes_of_the_probe_are_those_of_the_model_and_of_its_verdicts():
    gpu_sizes = probe.SIZES["cuda"]
    assert (gpu_sizes.hidden, gpu_sizes.vocab, gpu_sizes.inner) == (2048, 151_936, 11_008)
    assert verdict.GRADIENTS_MB == pytest.approx(689, abs=1)
    for device in DEVICES:
        texts = [question.text for question in questions(device)]
        assert len(texts) == len(set(texts)) > 30


def made_up(**changes):
    """Rows of a GPU on which all is alike, but for what is given: name -> columns."""
    names = {name for question in questions("cuda") for name in question.names}
    row = {"verdict": "right", "refused": "", "fault": None, "median_ms": 10.0, "gb_per_s": 4000.0, "extra_mb": 900.0,
           "mfu_percent": 55.0}  # fmt: skip
    return {name: row | next((new for part, new in changes.items() if part in name), {}) for name in names}


def judged(changes, why=lambda op: "no such row"):
    rows = made_up(**changes)
    return {q.text: answer(q, rows, why) for q in questions("cuda")}


HEAD = "linear_loss: surrogate, 3B, N 16,384: "
VERDICTS = [  # question, columns of rows, its result and words of its numbers
    ("head, training, fp32 logits", {}, "met", "10.0 ms, at most 46"),
    ("head, training, fp32 logits", {HEAD + "triton fused fp32": {"median_ms": 46.5}}, "missed", "46.5 ms"),
    ("head, memory beside dX and dW, fp32 logits", {}, "met", "210.6 MB"),
    ("head, memory beside dX and dW, fp32 logits", {HEAD + "triton fused fp32": {"extra_mb": 2e3}}, "missed", "1,310"),
    ("head, fused or generic route", {HEAD + "triton generic fp32": {"median_ms": 9.0}}, "winner generic", "fused 10"),
    ("head, logits' dtype, fused route", {HEAD + "triton fused bf16": {"median_ms": 8.0}}, "winner bf16", "bf16 8 ms"),
    ("head, forward only", {"N 16,384: triton": {"median_ms": 16.1}}, "missed", "16.1 ms, at most 16"),
    ("head, never slower than eager: surrogate, 3B, N 1,024",
     {"surrogate, 3B, N 1,024: eager": {"median_ms": 9.9}}, "missed", "0.99 x, at least 1"),
    ("attention, causal, 2,048 tokens, forward, against varlen_attn",
     {"causal, 2,048 tokens, forward: triton": {"median_ms": 11.0}}, "met", "0.91 x, at least 0.9"),
    ("attention, causal, 8,192 tokens, backward, against varlen_attn",
     {"causal, 8,192 tokens, backward: triton": {"median_ms": 13.0}}, "missed", "0.77 x, at least 0.8"),
    ("attention, shared prefix, 1,400 + 8 x 400, against repeated prompts",
     {"full: torch varlen_attn, repeated": {"median_ms": 20.0}}, "met", "2.00 x, at least 2"),
    ("update, shared prompt against repeated", {"step: repeated": {"median_ms": 19.0}}, "missed", "1.90 x"),
    ("update, share of the chip's products", {}, "met", "55.0 %"),
    ("update, share of the chip's products", {"step: shared": {"mfu_percent": 49.0}}, "missed", "49.0 %, at least 50"),
    ("head, tokens of a chunk: bare products", {"chunk 4,096, bf16 logits, dX": {"median_ms": 1.0}},
     "winner 4,096 bf16", "4,096 bf16 5.127"),
    ("vision MLP, width", {"width 3,424": {"median_ms": 7.0}}, "winner 3,424", "3,420 10, 3,424 7, 3,456 10 ms"),
    ("swiglu, 16,384 x 11,008, forward: share of a copy's rate", {}, "met", "100 %, at least 85"),
    ("swiglu, 16,384 x 11,008, forward: share of a copy's rate",
     {"probe: copy": {"gb_per_s": 4800.0}}, "missed", "4,000 of 4,800 GB/s: 83 %"),
]  # fmt: skip


@pytest.mark.parametrize(("question", "changes", "result", "numbers"), VERDICTS)
def test_numbers_are_judged_by_the_targets(question, changes, result, numbers):
    told = judged(changes)[question]
    assert told["result"] == result and numbers in told["numbers"]


@pytest.mark.parametrize(("columns", "why"), [
    ({"verdict": "refused", "refused": "not installed: pip install it"}, "refused: not installed"),
    ({"verdict": "failed", "fault": "RuntimeError: out of memory"}, "failed: RuntimeError: out of memory"),
    ({"verdict": "wrong", "median_ms": None}, "wrong: beyond tolerance"),
    ({"median_ms": None}, "no median_ms"),
])  # fmt: skip
def test_what_has_no_right_number_is_not_measured_and_says_why(columns, why):
    verdicts = judged({"causal, 2,048 tokens, forward: torch varlen_attn": columns})
    told = verdicts["attention, causal, 2,048 tokens, forward, against varlen_attn"]
    assert told["result"] == "not measured" and why in told["numbers"] and "varlen_attn" in told["numbers"]
    assert sum(told["result"] == "not measured" for told in verdicts.values()) == 1  # the others are not touched


def test_a_part_that_left_no_rows_is_named():
    one = Question("q", ("step: shared: policy", "step: repeated: policy"), times_as_fast(2))
    told = answer(one, {}, {"step": "no row, step timed out"}.__getitem__)
    assert told == {"question": "q", "result": "not measured", "numbers":
                    "no row, step timed out [step: shared: policy, step: repeated: policy]"}  # fmt: skip


def test_winners_add_up_what_is_one_choice():
    assert winner("a", "b")(1.0, 2.0, 2.0, 0.5) == ("winner b", "a 3, b 2.5 ms")
    assert winner("a", "b", per=[1, 2])(3.0, 4.0) == ("winner b", "a 3, b 2 us a token")
    assert at_most(5, "MB", 2)(6.5) == ("met", "4.5 MB, at most 5")


def test_a_part_that_hangs_is_ended_with_all_it_started_and_keeps_what_it_said(tmp_path, parts, monkeypatch, capsys):
    late = tmp_path / "late"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(late)!r}).touch()"
    hang = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); " \
           "print('begun', flush=True); time.sleep(60)"  # fmt: skip
    parts(probe=[[*python_says, hang], [*python_says, "print('unreachable')"]], head=[[*python_says, "print('after')"]])
    monkeypatch.setitem(gpu.PARTS, "probe", (2, 5))
    began = time.monotonic()
    status, states, verdicts = call(tmp_path / "out", "--part", "probe", "head")
    assert status == 1 and time.monotonic() - began < 30
    assert states == {"probe": "timed out", "head": "done"}
    printed = capsys.readouterr().out
    assert "begun" in printed and "unreachable" not in printed and "after" in printed
    assert (tmp_path / "out" / "probe.log").read_text() == "begun\n"
    assert "probe timed out" in verdicts["vision MLP, width"]["numbers"]
    unasked = verdicts["attention, causal, 512 tokens, forward, against varlen_attn"]
    assert unasked["result"] == "not measured" and "attention not asked for" in unasked["numbers"]
    time.sleep(max(0, 5 - (time.monotonic() - began)))
    assert not late.exists()


def test_a_part_that_crashes_costs_the_others_nothing_and_keeps_its_rows(tmp_path, parts, capsys):
    rows = [{"op": "step", "case": case, "provider": "policy", "verdict": "right", "refused": "", "fault": None,
             "median_ms": ms, "mfu_percent": None} for case, ms in (("shared", 2.0), ("repeated", 8.0))]  # fmt: skip
    path, text = str(tmp_path / "step.json"), json.dumps({"machine": machine("cpu"), "rows": rows})
    crash = f"import pathlib, os; pathlib.Path({path!r}).write_text({text!r}); os.abort()"
    parts(step=[[*python_says, crash]], tests=[[*python_says, "print('1 failed, 9 passed in 3.00s'); exit(1)"]],
          desk=[[*python_says, "print('peak of x: 2.0 GB, planned 2.5 at most (1.25 x)')"]])
    status, states, verdicts = call(tmp_path, "--part", "step", "tests", "desk")
    assert status == 1 and states == {
        "step": f"failed: signal {signal.SIGABRT.value}", "tests": "failed: exit status 1", "desk": "done"}
    assert (tmp_path / "verdicts.txt").read_text().startswith(f"device cpu, driver None, torch {torch.__version__}")
    assert verdicts["update, shared prompt against repeated"]["result"] == "met"
    assert "signal 6" in verdicts["update, what recomputation costs"]["numbers"]
    assert verdicts["pytest -m gpu"]["result"] == "missed" and "1 failed" in verdicts["pytest -m gpu"]["numbers"]
    assert verdicts["desk run, planned against measured peak"]["result"] == "missed"


def test_no_part_starts_when_the_time_is_up_and_old_rows_answer_nothing(tmp_path, parts):
    (tmp_path / "probe.json").write_text('{"rows": []}')
    parts(probe=[[*python_says, "print(1)"]])
    status, states, _ = call(tmp_path, "--part", "probe", "--limit", "0")
    assert status == 0 and states == {"probe": "not run: no time was left"} and not (tmp_path / "probe.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_without_a_gpu_only_a_dry_call_is_taken(tmp_path):
    with pytest.raises(ValueError, match="--dry"):
        gpu.main(["--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.main(["--dry", "--part", "everything"])


def test_an_update_counts_the_work_that_the_model_needs():
    o = step.arguments(["--tiny", "--group-size", "3", "--response", "5"])
    policy = step.random_policy(o, "cpu", torch.float32)
    model, (pack,) = policy.model, step.make_packs(o, False, 512)
    T, N, P, H = 8 + 8 + 3 * 4, 15, 32, 64  # a response's last token is no input
    assert step.count([pack]) == [T, P, N]
    pairs = 16 * 17 / 2 + 3 * (4 * 16 + 4 * 5 / 2)
    blocks, tower, merger = (
        sum(p.numel() for p in part.parameters())
        for part in (model.model.layers, model.visual.blocks, model.visual.merger))
    products = T * blocks + P * tower + P / 4 * merger + N * 512 * H
    assert step.work([pack], model) == 6 * products + 12 * (2 * H * pairs + 32 * P * 2 * P)
    repeated = step.make_packs(o, True, 512)
    assert len(repeated) == 2 and step.count(repeated) == [3 * (16 + 4), 3 * P, N]


@pytest.mark.parametrize("wrong", [["sideways"], ["--height", "3"], ["--layers", "0"]])
def test_an_update_of_impossible_sizes_is_refused(wrong):
    with pytest.raises(SystemExit):
        step.arguments(wrong)


def test_benches_can_be_chosen_by_op_and_by_regular_expression(tmp_path, capsys):
    assert bench_all.run(["swiglu", "--only", "128 x .*(forward|full): eager$", "--seconds", "0", "--json",
                          str(tmp_path / "f.json")]) == 0  # fmt: skip
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [(row["case"][-7:], row["provider"]) for row in rows] == [("forward", "eager"), ("8, full", "eager")]
    with pytest.raises(ValueError, match="no bench is named swish.*rollout"):
        bench_all.run(["swish"])


def test_what_is_carried_is_unpacked_and_found(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(carry, "download", lambda what, folder, *_: told.append(what))
    monkeypatch.setattr(carry, "whole_world", lambda world: (world / "model").mkdir(parents=True))
    (folder := tmp_path / "carried").mkdir()
    (folder / "ptxas.xz").write_bytes(carry.lzma.compress(b"#!/bin/sh\n"))
    assert 0 < carry.prepare(folder) < 10_000 and set(told) == {*carry.WHEELS, *carry.OTHERS}
    (scratch := tmp_path / "scratch").mkdir()
    env = carry.unpack(folder, scratch, new_assembler=True)
    assert Path(env["TRITON_PTXAS_PATH"]).read_bytes() == b"#!/bin/sh\n" and "PYTHONPATH" not in env
    carry.give_world(scratch / "desk", scratch / "world")
    assert (scratch / "desk" / "world" / "model").is_dir()
    assert carry.unpack(tmp_path / "absent", scratch) == {}
    with pytest.raises(ValueError, match="prepare --to"):
        carry.unpack(tmp_path / "absent", scratch, new_assembler=True)
    monkeypatch.setattr(carry, "LARGEST", 1)
    with pytest.raises(ValueError, match="more than"):
        carry.prepare(folder)
