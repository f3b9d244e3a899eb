"""The plan's fake step against real ones, tensor by tensor; what `--plan` prints; and a forecast beside a run."""

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from plan_cases import VISION, case, group, model_config, real_update, recipe

from nanolmmr1 import config
from nanolmmr1.errors import UserError
from nanolmmr1.kernels.attention import Spans, attention
from nanolmmr1.model import qwen as model_file
from nanolmmr1.model.qwen import LanguageBlock, Qwen25VL, VisionBlock
from nanolmmr1.rollout.local import LocalSampler
from nanolmmr1.rollout.sampler import SamplingParams
from nanolmmr1.run import plan
from nanolmmr1.run.fake_step import Live, Machine, fake_step
from nanolmmr1.run.phase_plan import GB, Longest, machine, phase_plans
from nanolmmr1.update import memory
from nanolmmr1.update.policy import Policy

ROOT = Path(__file__).resolve().parents[1]
MODEL = model_config(4)
CPU = Machine("cpu", 1, 1, 0, "1 x CPU")
GPU = Machine("cuda", 1, 1, 80e9, "1 x 80 GB GPU")
PARAMETERS_3B = 3_754_622_976


def fake_update(cfg, model_cfg, pack, where=CPU, several=True):
    with fake_step(cfg, cfg.phases["train"], model_cfg, where) as step:
        sizes = step.update(pack, several)
    return sum(size for label, size in sizes.items() if label != "optimizer")


CASES = [
    *((depth, how, 0, "float32") for depth in (2, 6, 12) for how in ("none", "swiglu", "all", "budget")),
    *((6, how, 2, "float32") for how in ("none", "all", "budget")),
    *((6, how, images, "bfloat16") for how in ("none", "all") for images in (0, 2)),
]


@pytest.mark.parametrize(("depth", "how", "images", "dtype"), CASES)
def test_a_fake_update_holds_what_a_real_one_does(depth, how, images, dtype):
    """All tensors alive at the worst moment of a second micro-batch."""
    cfg, model_cfg, pack = case(depth, how, images, dtype)
    torch.manual_seed(0)
    found = real_update(cfg, Qwen25VL(model_cfg), pack, getattr(torch, dtype))
    fake = fake_update(cfg, model_cfg, pack)
    print(f"\n{depth} layers, {how}, {images} images, {dtype}: real {found / 1e6:.3f} MB, fake {fake / 1e6:.3f} MB, "
          f"{fake / found:.4f}")
    assert fake == pytest.approx(found, abs=1e5)


@pytest.mark.parametrize(("how", "images"), [("none", 2), ("all", 0)])
def test_a_fake_rank_holds_what_one_of_two_real_ranks_does(how, images):
    said = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "tests" / "ranks_plan.py",
                  how, images)
    found = next(int(line.split()[1]) for line in said if line.startswith("peak"))
    cfg, model_cfg, pack = case(2, how, images)
    fake = fake_update(cfg, model_cfg, pack, Machine("cpu", 2, 2, 0, ""))
    print(f"\n2 ranks, {how}, {images} images: real {found / 1e6:.3f} MB, fake {fake / 1e6:.3f} MB, {fake / found:.4f}")
    assert fake == pytest.approx(found, abs=1e5)


def test_a_fake_step_leaves_nothing_fake_behind():
    """Caches, kernels and the process group are as before; a real step after a fake one computes the same."""
    cfg, model_cfg, pack = case(2, "none", 2)
    torch.manual_seed(0)
    model = Qwen25VL(model_cfg)
    before = Policy(model, cfg.pack, cfg.optim).logprobs(pack, 1.0)[0]
    for where in (CPU, GPU, Machine("cuda", 8, 4, 80e9, "")):
        fake_update(cfg, model_cfg, pack, where)
    assert torch.equal(before, Policy(model, cfg.pack, cfg.optim).logprobs(pack, 1.0)[0])
    assert not torch.distributed.is_initialized()


def test_log_probs_and_sampling_peak_where_the_plan_says():
    for images in (0, 2):
        cfg = recipe(prompts=3, overrides=["phases.train.objective.kl_coef=0.1"])
        model = Qwen25VL(MODEL)
        policy = Policy(model, cfg.pack, cfg.optim)
        prompts = [group(150, 60, 4, images).prompt for _ in range(3)]
        _, _, pack = case(4, "none", images)
        with fake_step(cfg, cfg.phases["train"], MODEL, CPU) as step:
            fake = step.logprobs(pack)
        live = Live()
        live.label = "given"
        for tensor in (*model.parameters(), *(t for t in vars(pack).values() if isinstance(t, torch.Tensor))):
            live.see(tensor)
        given = live.total
        with live:
            live.restart()
            policy.logprobs(pack, 1.0)
        pixels = sum(t.nbytes for t in vars(pack).values() if isinstance(t, torch.Tensor))
        held = sum(fake.values()) - fake["weights"] - fake["optimizer"]
        assert held == pytest.approx(live.peak - given + pixels, rel=0.02)

        live, longest = Live(), Longest(150, 64 * images, 150, 9)
        for parameter in model.parameters():
            live.see(parameter)
        weights_bytes = live.total
        with live:
            live.restart()
            LocalSampler(policy).generate(prompts, SamplingParams(4, 60, 1.0, banned_ids=(0,)), [(0,), (1,), (2,)])
        found = live.peak - weights_bytes + sum(prompt.patches.nbytes for prompt in prompts)
        for planned in phase_plans(cfg, MODEL, CPU, {"train": longest}):
            parts = planned.sampling().parts
        expected = sum(parts.values()) - parts["weights"] - parts["optimizer"] - parts["reference"]
        print(f"sampling, {images} images: planned {expected / 1e6:.2f} MB, alive {found / 1e6:.2f} MB")
        assert expected == pytest.approx(found, rel=0.1)


def kept_by(block, run, autocast):
    """Bytes that autograd keeps of a block, parameters and their 16-bit copies not among them."""
    own = {p.shape for p in block.parameters()} | {p.shape[::-1] for p in block.parameters()}
    found = {}

    def pack(tensor):
        mask = tensor.ndim == 4 and tensor.shape[1] == 1  # one for all blocks
        if tensor.shape not in own and not mask:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    cast = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with cast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("how", ["float32", "bfloat16", "triton"])
def test_a_block_keeps_what_autograd_saves(how, monkeypatch):
    """On a GPU the same autograd functions run, here interpreted."""
    if how == "triton":
        for op in ("rmsnorm", "swiglu", "mrope", "rope2d"):
            monkeypatch.setattr(model_file, op, functools.partial(getattr(model_file, op), impl="triton"))
    impl, kind = "sdpa", memory.Kind("cpu", 2 if how == "bfloat16" else 4, 4)
    if how == "triton":
        impl, kind = "triton", memory.Kind("cuda", 4, 4)
    T = 120
    spans = Spans([[0, T, 0, T, 0, 0, 1]], T)
    x, block = torch.randn(T, MODEL.hidden_size, requires_grad=True), LanguageBlock(MODEL, 0)
    positions = torch.arange(T).expand(3, -1).contiguous()
    planned = memory.language_block(MODEL, T, kind).kept
    found = kept_by(block, lambda: block(x, positions, lambda _, q, k, v: attention(q, k, v, spans, impl=impl)),
                    how == "bfloat16")
    # Plain torch repeats keys and values for the q heads of a group, which the budget does not know.
    assert planned == pytest.approx(found, rel=0.03 if how == "triton" else 0.12)

    spans, block = Spans([[0, 80, 0, 80, 0, 0, 0]], 80), VisionBlock(VISION)
    x = torch.randn(80, VISION.hidden_size, requires_grad=True)
    x = x.bfloat16() if how == "bfloat16" else x
    places = torch.zeros(80, 2, dtype=torch.int64)
    found = kept_by(block, lambda: block(x, places, spans, impl), how == "bfloat16")
    assert memory.vision_block(VISION, 80, kind).kept == pytest.approx(found, rel=0.03)


def test_as_much_is_recomputed_as_the_budget_asks_for():
    """Products of one block after another, then whole blocks: each choice keeps less than the one before."""
    kind, sizes = memory.Kind("cuda", 2, 4), (4000, 800)
    every = MODEL.num_hidden_layers + VISION.depth
    choices = [(n, 0) for n in range(every)] + [(every, n) for n in range(every + 1)]
    kept = [memory.kept(MODEL, *sizes, kind, *choice) for choice in choices]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(kept) == 2 * every + 1
    for choice, size, following in zip(choices, kept, [*choices[1:], choices[-1]], strict=True):
        assert memory.to_recompute(MODEL, *sizes, size, kind) == choice
        assert memory.to_recompute(MODEL, *sizes, size - 1, kind) == following
    assert memory.to_recompute(MODEL, *sizes, 0, kind, vision=False) == (MODEL.num_hidden_layers,) * 2


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """The settings of a model of 2 M parameters."""
    folder = tmp_path_factory.mktemp("small")
    tree = json.loads((plan.SIZES / "Qwen2.5-VL-3B-Instruct" / "config.json").read_bytes())
    tree |= dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=8000, rope_scaling=dict(type="mrope", mrope_section=[4, 6, 6]))
    tree["vision_config"] |= dict(depth=2, hidden_size=64, intermediate_size=160, num_heads=4, out_hidden_size=128,
                                  fullatt_block_indexes=[0])
    (folder / "config.json").write_text(json.dumps(tree))
    return folder


LIMITS = ("phases.multimodal_reasoning_enhancement.max_prompt_tokens=1024", "prompt.max_pixels=501760")


def plan_of(folder, *overrides):
    """What `verdict` and the stages of infi_mmr_3b's last phase need, with another model and no rows."""
    cfg = config.load("infi_mmr_3b", overrides=[f"model={folder}", *overrides])
    cfg.phases = {"multimodal_reasoning_enhancement": cfg.phases["multimodal_reasoning_enhancement"]}
    where, model = machine(cfg), plan.weights.read_config(folder)
    return cfg, model, where, {name: plan.find_longest(cfg, phase, None) for name, phase in cfg.phases.items()}


def stages_of(folder, *overrides):
    cfg, *rest = plan_of(folder, *overrides)
    for planned in phase_plans(cfg, *rest):
        return planned.total, {stage.name: stage for stage in planned.stages(cfg.pack.tokens_per_micro_batch)}


def test_precision_offload_and_hosts_change_what_they_should(small_folder):
    count, eight = stages_of(small_folder, "plan.gpus=8", "plan.gpu_gb=80")
    shard = count / 8
    parts = eight["optimizer step"].parts
    near = functools.partial(pytest.approx, rel=0.02)  # shards are padded
    assert [parts[name] for name in ("weights", "gradients", "optimizer", "reference")] == [
        near(k * shard) for k in (4, 4, 8, 4)]  # fmt: skip
    assert not parts["sampler"] and not eight["update"].host
    assert eight["update"].parts["gathered"] >= 8000 * 128 * 4  # the embedding, fp32
    _, small = stages_of(small_folder, "plan.gpus=8", "optim.weights=bfloat16")
    parts = small["optimizer step"].parts
    assert [parts[name] for name in ("weights", "gradients", "optimizer")] == [near(k * shard) for k in (2, 2, 4)]
    _, away = stages_of(small_folder, "plan.gpus=8", "dist.offload=true")
    parts = away["optimizer step"].parts
    assert not sum(parts.get(name, 0) for name in ("weights", "optimizer", "gradients", "reference"))
    assert away["optimizer step"].host == near(20 * shard)
    _, reference = stages_of(small_folder, "plan.gpus=8", "dist.offload_reference=true")
    step = reference["optimizer step"]
    assert not step.parts["reference"] and step.parts["weights"] and step.host == near(4 * shard)
    keys = "plan.gpus=16", "plan.host_gpus=8", "dist.shard=host"
    _, hosts = stages_of(small_folder, *keys)
    assert hosts["optimizer step"].parts["weights"] == near(4 * shard)
    _, local = stages_of(small_folder, "plan.gpus=8", "rollout.engine=local")
    assert local["optimizer step"].parts["sampler"] == 4 * count  # a whole copy
    with pytest.raises(UserError, match=r"plan.gpus=12.*plan.host_gpus=8"):
        plan_of(small_folder, "plan.gpus=12", "dist.shard=host")
    plan_of(small_folder, "plan.gpus=12")  # sharded over all of them, hosts matter little


def test_a_machine_is_said_to_be_too_small_and_what_would_fit_does(small_folder):
    def peak(cfg, *rest):
        return max(stage.total for planned in phase_plans(cfg, *rest) for stage in planned.stages(
            cfg.pack.tokens_per_micro_batch))  # fmt: skip

    for gpu_gb, fits in ((80, True), (1.2, False)):
        cfg, model, where, longest = plan_of(small_folder, f"plan.gpu_gb={gpu_gb}", *LIMITS)
        size = peak(cfg, model, where, longest)
        first, *cures = plan.verdict(cfg, model, where, longest, (size, "update", "x"), 40960, 0)
        print(gpu_gb, first, *cures, sep="\n  ")
        assert ("It fits" in first) == fits and bool(cures) != fits and len(set(cures)) == len(cures)
        for cure in cures:
            assert peak(*plan_of(small_folder, f"plan.gpu_gb={gpu_gb}", *LIMITS, *cure.split())) <= where.capacity
    (none,) = plan.verdict(*plan_of(small_folder, "plan.gpu_gb=0.01", *LIMITS), (1e9, "update", "x"), 0, 0)
    assert "more or larger GPUs" in none


def test_the_largest_budget_fits_and_a_larger_one_does_not(small_folder):
    cfg, *rest = plan_of(small_folder, "plan.gpu_gb=2", *LIMITS, "pack.checkpoint_activations=all")
    for planned in phase_plans(cfg, *rest):
        most = planned.largest_budget({16384: planned.update(16384).total})
        assert most > 1024 and planned.update(most).total <= 2 * GB < planned.update(int(1.1 * most)).total


def python(*args, **environment):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1",
                                "OMP_WAIT_POLICY": "PASSIVE"} | environment
    # Resident memory follows tensors where freed blocks go back. By itself glibc soon serves all below 32 MB from its
    # heap, which only shrinks from the top: a tenth to a fifth more at these sizes, and different from run to run.
    environment["MALLOC_MMAP_THRESHOLD_"] = "131072"
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, env=environment, capture_output=True,
                          text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_the_3b_is_planned_without_network_and_without_data(tmp_path):
    """Its sizes come with the package; rows are as long as the phases allow, and the output says so."""
    began = time.monotonic()
    lines = python("train.py", "infi_mmr_3b", "--plan", "plan.gpus=8", "plan.gpu_gb=80",
                   HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    print(f"\n{time.monotonic() - began:.1f} s", *lines, sep="\n")
    text = "\n".join(lines)
    assert f"{PARAMETERS_3B / 1e9:.2f} B parameters, on 8 x 80 GB GPU" in text and "It fits" in text
    assert "published sizes are used" in text and "no rows are counted" in text
    for stage in ("sampling", "log-probs", "update", "optimizer step", "send weights", "checkpoint"):
        assert sum(line.strip().startswith(stage) for line in lines) == 2  # text alone; the two phases with images
    assert max(map(len, lines)) <= 120
    weights = next(line.split() for line in lines if line.strip().startswith("update"))[1]
    assert float(weights) == pytest.approx(4 * PARAMETERS_3B / 8 / 1e9, abs=0.06)


def test_the_7b_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = Qwen25VL(plan.weights.read_config(plan.SIZES / "Qwen2.5-VL-7B-Instruct"))
    assert sum(p.numel() for p in model.parameters()) == 8_292_166_656


def test_a_model_that_cannot_be_had_is_said_to_be(tmp_path):
    with pytest.raises(UserError, match="nobody/nothing.*config.json.*give a folder"):
        plan.show(recipe(overrides=["model=nobody/nothing"]))
    with pytest.raises(UserError, match="world:model"):
        plan.show(config.load("desk", overrides=[f"output={tmp_path}"]))


def test_a_forecast_runs_beside_the_run_and_is_compared_with_it(small_folder):
    notes = []
    forecast = plan.Forecast(recipe(), small_folder, {"train": [(40, 0), (60, 16)]}, "cpu", notes.append)
    forecast.poll()
    assert forecast.child is None and "planned" not in forecast.compare()  # a short run needs none
    forecast.due = 0
    forecast.poll()
    assert os.getpriority(os.PRIO_PROCESS, forecast.child.pid) == 19
    forecast.poll()
    assert not forecast.peak and not notes
    forecast.child.wait(300)
    line = forecast.compare()
    assert re.fullmatch(r"peak of resident memory: \d+\.\d\d GB, planned \d+\.\d\d at most \(\d+\.\d\d x\)", line), line
    assert forecast.peak > forecast.floor > 1e7 and not notes
    forecast.close()


def test_a_forecast_above_this_machines_memory_is_noted_once(small_folder, monkeypatch):
    notes = []
    cfg = recipe(max_response_tokens=64, prompts=64)
    forecast = plan.Forecast(cfg, small_folder, {"train": [(60, 16)]}, "cpu", notes.append)
    forecast.start()
    forecast.child.wait(300)
    pages = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: 1 if name == "SC_PHYS_PAGES" else pages(name))
    forecast.poll()
    forecast.poll()
    assert len(notes) == 1 and "a rank may take up to" in notes[0] and "`--plan`" in notes[0]


def test_a_forecast_that_fails_is_noted_once_and_one_that_is_killed_not_at_all(tmp_path):
    notes = []
    forecast = plan.Forecast(recipe(), tmp_path, {"train": [(60, 16)]}, "cpu", notes.append)  # has no config.json
    forecast.start()
    forecast.child.wait(300)
    forecast.poll()
    forecast.poll()
    assert len(notes) == 1 and "the memory forecast failed" in notes[0] and "config.json" in notes[0]
    assert "the memory forecast failed" in forecast.compare()
    forecast = plan.Forecast(recipe(), tmp_path, {"train": [(60, 16)]}, "cpu", notes.append)
    forecast.start()
    child = forecast.child
    forecast.close()
    assert child.returncode == -9 and len(notes) == 1


CHECKPOINT = """
import sys, torch
from pathlib import Path
from nanolmmr1.model import weights
from nanolmmr1.model.qwen import Qwen25VL
from nanolmmr1.parallel import export
torch.manual_seed(0)
model = Qwen25VL(weights.read_config(sys.argv[1]))
export.save(model, Path(sys.argv[1]), Path(sys.argv[1]))
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_takes_what_the_plan_says(ranks, shared, tmp_path):
    """Peak resident memory of a run of 50 M parameters, one rank's, against the forecast that it prints."""
    folder, run, data = tmp_path / "model", tmp_path / "run", tmp_path / "rows.jsonl"
    hidden = 256
    shutil.copytree(shared / "data" / "tokenizer", folder)
    tree = json.loads((plan.SIZES / "Qwen2.5-VL-3B-Instruct" / "config.json").read_bytes())
    tree |= dict(hidden_size=hidden, intermediate_size=1024, num_hidden_layers=8, torch_dtype="float32",
                 num_attention_heads=hidden // 64, num_key_value_heads=2)
    tree["rope_scaling"]["mrope_section"] = [8, 12, 12]
    tree["vision_config"] |= dict(depth=2, hidden_size=128, intermediate_size=256, num_heads=4, out_hidden_size=hidden,
                                  fullatt_block_indexes=[1])
    (folder / "config.json").write_text(json.dumps(tree))
    python("-c", CHECKPOINT, folder)
    Image.radial_gradient("L").resize((280, 280)).save(tmp_path / "disc.png")
    row = dict(problem="What is <image>? " + "Think well. " * 40, answer="1", images=["disc.png"])
    data.write_text(3 * (json.dumps(row) + "\n"))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    patient = tmp_path / "patient.py"  # a run of two steps is over before its forecast is ready
    patient.write_text("import runpy\nfrom nanolmmr1.run.plan import Forecast\n"
                       "Forecast.AFTER_S, Forecast.WAIT_S = 0, 300\n"
                       f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n")
    said = python(
        *torchrun, patient, "single", f"model={folder}", f"output={run}", f"phases.train.data={data}",
        "phases.train.steps=2", "phases.train.prompts_per_step=3", "phases.train.group_size=2",
        "phases.train.max_response_tokens=8", "device=cpu", "reward.workers=1", "checkpoint.background=false",
        "checkpoint.every_minutes=0",
    )  # fmt: skip
    told = next(line for line in said if line.startswith("peak of resident memory:"))
    found, planned = (float(gb) for gb in re.findall(r"\d+\.\d\d(?= GB| at most)", told))
    assert found == pytest.approx(json.loads((run / "summary.json").read_text())["peak_rss_mb"] / 1e3, abs=0.02)
    print(f"\n{ranks} ranks: {told}")
    assert 0.85 < planned / found < 1.15


def test_the_plan_counts_the_rows_that_are_here(shared, small_folder, tmp_path, capsys):
    """Rows that are here are counted, those that are not are named, and the table keeps to its width."""
    folder, data = tmp_path / "model", tmp_path / "rows.jsonl"
    shutil.copytree(shared / "data" / "tokenizer", folder)
    tree = json.loads((small_folder / "config.json").read_bytes()) | dict(vocab_size=151936)
    (folder / "config.json").write_text(json.dumps(tree))
    rows = [dict(problem=f"{n} + {n}?" + " and" * (300 if n == 3 else 0), answer=str(2 * n)) for n in range(5)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, third = config.load("infi_mmr_3b").phases
    changes = [f"model={folder}", f"phases.{first}.data={data}", f"phases.{first}.max_prompt_tokens=200"]
    changes += [f"phases.{name}.data={tmp_path}/absent.jsonl" for name in (second, third)]
    cfg = config.load("infi_mmr_3b", overrides=[*changes, "plan.gpus=8", "plan.gpu_gb=80", "reward.workers=1"])
    plan.show(cfg)
    text = capsys.readouterr().out
    assert "on 8 x 80 GB GPU" in text and "It fits" in text
    assert f"phases.{first}: 4 of 5 rows; dropped: 1 prompt too long" in text
    assert text.count("absent.jsonl does not exist") == 2 and text.count("longest rows allowed are assumed") == 2
    assert max(map(len, text.splitlines())) <= 120
    assert str(folder) in text and not list(folder.glob("*.safetensors"))
