"""The plan's arithmetic against tensors that are counted one by one, and its prediction against runs."""

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from nanolmmr1.kernels.attention import Spans, attention
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanolmmr1 import config
from nanolmmr1.data.prompt import Prompt
from nanolmmr1.errors import UserError
from nanolmmr1.model import qwen as model_file
from nanolmmr1.model import weights
from nanolmmr1.model.qwen import LanguageBlock, ModelConfig, Qwen25VL, VisionBlock, VisionConfig, VisionTower
from nanolmmr1.rollout import Group, Response, SamplingParams
from nanolmmr1.rollout.local import LocalSampler
from nanolmmr1.run import plan
from nanolmmr1.run.manifest import FILE_BYTES
from nanolmmr1.run.plan_stages import GB, Longest, Plan, machine
from nanolmmr1.update import memory
from nanolmmr1.update.objective import Tokens
from nanolmmr1.update.pack import build, deal
from nanolmmr1.update.policy import Policy

ROOT = Path(__file__).resolve().parents[1]
VISION = VisionConfig(depth=3, hidden_size=64, intermediate_size=160, num_heads=4, out_hidden_size=128,
                      fullatt_block_indexes=(0,))
MODEL = ModelConfig(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=2000, vision=VISION, mrope_section=(4, 6, 6))
PARAMETERS_3B = 3_754_622_976


class Live(TorchDispatchMode):
    """Bytes of all storages that operators have made and that are still there, and the most there were at once.

    known: tensors that do not count.
    """

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = 0
        self.held = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        return out

    def see(self, storage):
        if storage not in self.held:
            self.held.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, storage.nbytes())

    def gone(self, nbytes):
        self.now -= nbytes


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
    P, R, G = 40, 21, 4
    T = P + G * (R - 1)
    own = [(P + g * (R - 1), P + (g + 1) * (R - 1)) for g in range(G)]
    spans = Spans(torch.tensor([[0, P, 0, P, 0, 0, 1], *([a, b, a, b, 0, P, 1] for a, b in own)]), T)
    x, block = torch.randn(T, MODEL.hidden_size, requires_grad=True), LanguageBlock(MODEL)
    positions = torch.arange(T).expand(3, -1).contiguous()
    load = memory.Load(T, G * R, 0, P, G * (P + R - 1))
    planned = memory.language_block(MODEL, load, kind).kept
    found = kept_by(block, lambda: block(x, positions, lambda q, k, v: attention(q, k, v, spans, impl=impl)),
                    how == "bfloat16")
    assert planned == pytest.approx(found, rel=0.03)

    spans, block = Spans(torch.tensor([[0, 80, 0, 80, 0, 0, 0]]), 80), VisionBlock(VISION)
    x = torch.randn(80, VISION.hidden_size, requires_grad=True)
    x = x.bfloat16() if how == "bfloat16" else x
    places = torch.zeros(80, 2, dtype=torch.int64)
    found = kept_by(block, lambda: block(x, places, spans, impl), how == "bfloat16")
    assert memory.vision_block(VISION, 80, kind).kept == pytest.approx(found, rel=0.03)


def group(prompt, response, responses, images):
    """A group whose prompt holds pictures of 64 patches."""
    slots = torch.arange(16 * images)
    made = Prompt(None, torch.zeros(prompt, dtype=torch.int64), torch.arange(prompt).expand(3, -1),
                  torch.zeros(64 * images, VISION.patch_dim), torch.tensor([[1, 8, 8]] * images).view(-1, 3), slots, "")
    return Group(made, [Response(torch.ones(response, dtype=torch.int64), torch.zeros(response), "stop")
                        for _ in range(responses)])


CASES = {
    "text": dict(images=0),
    "recomputed": dict(images=0, pack={"checkpoint_activations": "all"}),
    "pictures": dict(images=2),
    "pictures, recomputed": dict(images=2, pack={"checkpoint_activations": "all"}),
    "pictures, the tower frozen": dict(images=2, freeze=["vision"]),
    "pictures, the embedding frozen": dict(images=2, freeze=["embedding"]),
    "two micro-batches": dict(images=0, packs=2),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_learning_peaks_where_the_plan_says(case):
    """All tensors alive at the worst moment of forward and backward, in fp32 on a CPU."""
    made = CASES[case]
    images, packs = made["images"], made.get("packs", 1)
    cfg = recipe(pack=made.get("pack", {}), freeze=made.get("freeze", []), prompts=3 * packs)
    phase, longest = cfg.phases["train"], Longest(150, 64 * images, 150, 9)
    cfg.pack.tokens_per_micro_batch = 3 * (150 + 4 * 59)
    torch.manual_seed(0)
    model = Qwen25VL(MODEL)
    policy = Policy(model, cfg)
    policy.start_phase(phase)
    planned = Plan(cfg, phase, MODEL, machine(cfg), longest)
    groups = [group(150, 60, 4, images) for _ in range(3 * packs)]
    steps, split = deal(groups, cfg.pack.tokens_per_micro_batch)
    assert len(steps) == packs and not split
    live = Live(model.parameters())
    for (pieces,) in steps:
        pack = build(pieces, VISION.patch_dim)
        n = pack.num_scored
        tokens = Tokens(torch.ones(n), torch.ones(n) / n, torch.zeros(n, dtype=torch.int64), torch.zeros(n))
        with live:
            policy.backward(pack, tokens, phase.objective, 1.0)
    parts = planned.learning(planned.load(cfg.pack.tokens_per_micro_batch))
    expected = sum(parts.values()) - parts["weights"] - parts["optimiser"]
    found = live.peak + pack.patches.nbytes * bool(images)
    print(f"{case}: planned {expected / 1e6:.1f} MB, alive {found / 1e6:.1f} MB, {expected / found:.3f}")
    assert expected == pytest.approx(found, rel=0.05)


def recipe(pack=None, freeze=(), prompts=3, overrides=(), **phase):
    values = dict(group_size=4, max_response_tokens=60, prompts_per_step=prompts, freeze=list(freeze)) | phase
    cfg = config.load("single", overrides=["model=none", "device=cpu", "phases.train.data=none", *overrides])
    for key, value in values.items():
        setattr(cfg.phases["train"], key, value)
    for key, value in (pack or {}).items():
        setattr(cfg.pack, key, value)
    return cfg


@pytest.mark.parametrize("images", [0, 2])
def test_scoring_and_sampling_peak_where_the_plan_says(images):
    cfg = recipe(prompts=3, overrides=["phases.train.objective.kl_coef=0.1"])
    model, longest = Qwen25VL(MODEL), Longest(150, 64 * images, 150, 9)
    policy = Policy(model, cfg)
    planned = Plan(cfg, cfg.phases["train"], MODEL, machine(cfg), longest)
    groups = [group(150, 60, 4, images) for _ in range(3)]
    prompts = [g.prompt for g in groups]
    pixels = sum(prompt.patches.nbytes for prompt in prompts)

    pack = build(deal(groups, 1 << 14)[0][0][0])
    with Live(model.parameters()) as live:
        policy.logprobs(pack, 1.0)
    found = live.peak + pixels * bool(images)
    parts = planned.scoring(planned.load(1 << 14))
    expected = sum(parts.values()) - sum(planned.base().values())
    print(f"scoring: planned {expected / 1e6:.1f} MB, alive {found / 1e6:.1f} MB, {expected / found:.3f}")
    assert expected == pytest.approx(found, rel=0.05)

    with Live(model.parameters()) as live:
        LocalSampler(policy).generate(prompts, SamplingParams(4, 60, 1.0, banned_ids=(0,)), [(0,), (1,), (2,)])
    found = live.peak + pixels
    parts = planned.sampling()
    expected = parts["work"] + parts["sampler"] + parts["vision"]
    print(f"sampling: planned {expected / 1e6:.1f} MB, alive {found / 1e6:.1f} MB, {expected / found:.3f}")
    assert expected == pytest.approx(found, rel=0.05)


@pytest.fixture(scope="module")
def folder_3b(shared, tmp_path_factory):
    """The 3B's settings, without weights."""
    folder = tmp_path_factory.mktemp("3b")
    shutil.copytree(shared / "data" / "tokenizer", folder, dirs_exist_ok=True)
    shutil.copyfile(shared / "data" / "configs" / "qwen2.5-vl-3b.json", folder / "config.json")
    return folder


def plan_3b(folder, *overrides, phase=-1):
    """The Plan of one of infi_mmr_3b's phases, its rows unknown."""
    cfg = config.load("infi_mmr_3b", overrides=[f"model={folder}", *overrides])
    where, model = machine(cfg), weights.read_config(folder)
    longest = {name: plan.find_longest(cfg, phase, None) for name, phase in cfg.phases.items()}
    return list(plan.make_plans(cfg, model, where, longest).values())[phase], cfg, model, where, longest


def stage(planned, name):
    return next(stage for stage in planned.stages() if stage.name == name)


@pytest.mark.parametrize("gpus", [1, 8])
def test_the_3b_holds_what_arithmetic_says(folder_3b, gpus):
    planned, *_ = plan_3b(folder_3b, f"plan.gpus={gpus}", "plan.gpu_gb=80")
    assert planned.count.total == PARAMETERS_3B
    parts = stage(planned, "optimiser step").parts
    shard = PARAMETERS_3B / gpus
    assert (parts["weights"], parts["gradients"], parts["optimiser"], parts["reference"]) == (
        4 * shard, 4 * shard, 8 * shard, 4 * shard)  # fmt: skip
    assert parts["sampler"] == 0  # vLLM's weights and cache sleep
    local, *_ = plan_3b(folder_3b, f"plan.gpus={gpus}", "plan.gpu_gb=80", "rollout.engine=local")
    # The embedded one reads the policy's own weights, or where these are sharded a copy that is whole.
    assert stage(local, "optimiser step").parts["sampler"] == (4 * PARAMETERS_3B if gpus > 1 else 0)
    learning = stage(planned, "learning").parts
    assert learning["gathered"] > 151_936 * 2048 * 4  # embedding and head, fp32
    assert learning["head"] >= 151_936 * 2048 * 4  # dW waits for the gradient of the embedding
    tokens, blocks = 32768, 36  # all recomputed: a block keeps its input, the residual stream in fp32
    assert tokens * 2048 * 4 * blocks <= learning["activations"] < 1.1 * tokens * 2048 * 4 * blocks
    assert stage(planned, "checkpoint").host == pytest.approx(12 * shard + 2 * (FILE_BYTES + 151_936 * 2048 * 4 / gpus))

    text, *_ = plan_3b(folder_3b, f"plan.gpus={gpus}", phase=0)  # its vision tower is frozen
    with torch.device("meta"):
        tower = sum(p.numel() for p in VisionTower(weights.read_config(folder_3b).vision).parameters())
    assert text.count.trained == PARAMETERS_3B - tower
    assert stage(text, "learning").parts["vision"] == 0 < stage(planned, "learning").parts["vision"]
    assert stage(text, "optimiser step").parts["optimiser"] == 8 * (PARAMETERS_3B - tower) / gpus


def test_precision_offload_and_hosts_change_what_they_should(folder_3b):
    small, *_ = plan_3b(folder_3b, "plan.gpus=8", "optim.weights=bfloat16")
    parts = stage(small, "optimiser step").parts
    assert (parts["weights"], parts["gradients"], parts["optimiser"]) == tuple(
        k * PARAMETERS_3B / 8 for k in (2, 2, 4))
    away, *_ = plan_3b(folder_3b, "plan.gpus=8", "dist.offload=true")
    step = stage(away, "optimiser step")
    assert not step.parts["weights"] + step.parts["optimiser"] + step.parts["gradients"] + step.parts["reference"]
    assert step.host == 20 * PARAMETERS_3B / 8
    reference, *_ = plan_3b(folder_3b, "plan.gpus=8", "dist.offload_reference=true")
    step = stage(reference, "optimiser step")
    assert not step.parts["reference"] and step.parts["weights"] and step.host == 4 * PARAMETERS_3B / 8
    hosts, *_ = plan_3b(folder_3b, "plan.gpus=16", "plan.host_gpus=8", "dist.shard=host")
    assert stage(hosts, "optimiser step").parts["weights"] == 4 * PARAMETERS_3B / 8
    keys = "plan.gpus=16", "plan.host_gpus=8", "dist.shard=host"
    small, *_ = plan_3b(folder_3b, *keys, "optim.weights=bfloat16")  # sums wait for other hosts' in fp32
    assert [stage(small, name).parts["gradients"] for name in ("learning", "optimiser step")] == [
        k * PARAMETERS_3B / 8 for k in (4, 2)]  # fmt: skip
    away, *_ = plan_3b(folder_3b, *keys, "dist.offload=true")
    assert not stage(away, "learning").parts["gradients"]
    with pytest.raises(UserError, match=r"plan.gpus=12.*plan.host_gpus=8"):
        plan_3b(folder_3b, "plan.gpus=12", "dist.shard=host")
    plan_3b(folder_3b, "plan.gpus=12")  # sharded over all of them, hosts matter little


def test_a_machine_is_said_to_be_too_small_and_what_would_fit_does(folder_3b):
    for machine_, fits in (("plan.gpus=1 plan.gpu_gb=80", False), ("plan.gpus=8 plan.gpu_gb=80", True),
                           ("plan.gpus=1 plan.gpu_gb=141", True), ("plan.gpus=8 plan.gpu_gb=20", False)):
        planned, cfg, model, where, longest = plan_3b(folder_3b, *machine_.split())
        first, *cures = plan.verdict(cfg, model, where, longest, 0)
        print(machine_, first, *cures, sep="\n  ")
        assert ("It fits" in first) == fits and bool(cures) != fits
        if fits:
            most = min(p.largest_budget(where.capacity) for p in plan.make_plans(cfg, model, where, longest).values())
            assert planned.peak(most) <= where.capacity < planned.peak(most + 1024)
        assert len(set(cures)) == len(cures)
        for cure in cures:
            again = plan_3b(folder_3b, *machine_.split(), *cure.split())
            assert max(p.peak() for p in plan.make_plans(*again[1:]).values()) <= where.capacity
    (none,) = plan.verdict(*plan_3b(folder_3b, "plan.gpus=1", "plan.gpu_gb=4")[1:], 0)
    assert "more or larger GPUs" in none


def test_as_much_is_recomputed_as_the_budget_asks_for():
    """Products of one block after another, then whole blocks: each choice keeps less than the one before."""
    kind, load = memory.Kind("cuda", 2, 4), memory.Load(4000, 0, 800)
    every = MODEL.num_hidden_layers + VISION.depth
    choices = [(n, 0) for n in range(every)] + [(every, n) for n in range(every + 1)]
    sizes = [sum(memory.kept(MODEL, load, kind, *choice)) for choice in choices]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes) == 2 * every + 1
    for choice, size, following in zip(choices, sizes, [*choices[1:], choices[-1]], strict=True):
        assert memory.to_recompute(MODEL, 4000, 800, size, kind) == choice
        assert memory.to_recompute(MODEL, 4000, 800, size - 1, kind) == following
    assert memory.to_recompute(MODEL, 4000, 800, 0, kind, vision=False) == (MODEL.num_hidden_layers,) * 2
    for how, wanted in (("budget", choices[2]), ("swiglu", (every, 0)), ("all", (every, every)), ("none", (0, 0))):
        cfg = recipe(pack={"checkpoint_activations": how, "activation_budget_gb": sizes[2] / GB})
        where = machine(cfg)._replace(device="cuda")
        assert Plan(cfg, cfg.phases["train"], MODEL, where, Longest(10, 0, 10, 1)).recompute(load) == wanted


CHECKPOINT = """
import sys, torch
from pathlib import Path
from nanolmmr1 import weights
from nanolmmr1.model import Qwen25VL
torch.manual_seed(0)
model = Qwen25VL(weights.read_config(sys.argv[1]))
weights.save(model, Path(sys.argv[1]), Path(sys.argv[1]))
"""
SIZES = {"40 M": (256, 512, 2), "50 M": (256, 1024, 8), "80 M": (384, 1536, 8)}  # hidden, intermediate, layers


def python(*args):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    # Resident memory follows tensors where freed blocks go back. By itself glibc soon serves all below 32 MB from its
    # heap, which only shrinks from the top: a tenth to a fifth more at these sizes, and different from run to run.
    environment["MALLOC_MMAP_THRESHOLD_"] = "131072"
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, env=environment, capture_output=True,
                          text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("size, ranks", [("40 M", 1), ("50 M", 1), ("80 M", 1), ("50 M", 2)])
def test_a_run_takes_what_was_planned(size, ranks, folder_3b, tmp_path):
    """Two steps and a checkpoint on a CPU: the main rank's largest resident memory, by the system's own count."""
    hidden, intermediate, layers = SIZES[size]
    folder, run, data = tmp_path / "model", tmp_path / "run", tmp_path / "rows.jsonl"
    shutil.copytree(folder_3b, folder)
    tree = json.loads((folder / "config.json").read_text())
    tree |= dict(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, torch_dtype="float32",
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
    said = python(
        *torchrun, ROOT / "train.py", "single", f"model={folder}", f"output={run}", f"phases.train.data={data}",
        "phases.train.steps=2", "phases.train.prompts_per_step=3", "phases.train.group_size=2",
        "phases.train.max_response_tokens=8", "device=cpu", "reward.workers=1", "checkpoint.background=false",
        "checkpoint.every_minutes=0",
    )  # fmt: skip
    told = next(line for line in said if line.startswith("peak of resident memory:"))
    found, planned = (float(gb) for gb in re.findall(r"\d+\.\d\d(?= GB| at most)", told))
    assert found == pytest.approx(json.loads((run / "summary.json").read_text())["peak_rss_mb"] / 1e3, abs=0.02)
    print(f"\n{size}, {ranks} ranks: {told}")
    assert 0.85 < planned / found < 1.15


def test_the_plan_is_printed_without_weights(folder_3b, tmp_path, capsys):
    """Rows that are here are counted, those that are not are named, and the table keeps to its width."""
    data = tmp_path / "rows.jsonl"
    rows = [dict(problem=f"{n} + {n}?" + " and" * (300 if n == 3 else 0), answer=str(2 * n)) for n in range(5)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, third = config.load("infi_mmr_3b").phases
    changes = [f"model={folder_3b}", f"phases.{first}.data={data}", f"phases.{first}.max_prompt_tokens=200"]
    changes += [f"phases.{name}.data={tmp_path}/absent.jsonl" for name in (second, third)]
    cfg = config.load("infi_mmr_3b", overrides=[*changes, "plan.gpus=8", "plan.gpu_gb=80", "reward.workers=1"])
    plan.show(cfg)
    text = capsys.readouterr().out
    assert "3.75 B parameters, on 8 x 80 GB GPU" in text and "It fits" in text
    assert f"phases.{first}: 4 of 5 rows; dropped: 1 prompt too long" in text
    assert text.count("absent.jsonl does not exist") == 2 and text.count("longest rows allowed are assumed") == 2
    assert {"sampling", "scoring", "learning", "optimiser step", "hand-over", "checkpoint"} <= set(
        " ".join(line.split()[:2]) if line.split()[:1] == ["optimiser"] else line.split()[0]
        for line in text.splitlines() if line.split())  # fmt: skip
    assert max(map(len, text.splitlines())) <= 120
    assert str(folder_3b) in text and not list(folder_3b.glob("*.safetensors"))


def test_a_model_that_cannot_be_had_is_said_to_be(tmp_path):
    with pytest.raises(UserError, match="nobody/nothing.*config.json.*give a folder"):
        plan.show(recipe(overrides=["model=nobody/nothing"]))
    with pytest.raises(UserError, match="world:model"):
        plan.show(config.load("desk", overrides=[f"output={tmp_path}"]))


def test_what_no_memory_here_could_hold_is_refused_before_it_is_allocated():
    notes, memory = [], os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    plan.check(0.9 * memory, "cpu", notes.append)
    assert not notes
    plan.check(1.5 * memory, "cpu", notes.append)
    assert len(notes) == 1 and "a rank may take up to" in notes[0]
    with pytest.raises(UserError, match=r"a rank may take up to .* GB, and has .*`--plan`"):
        plan.check(2.1 * memory, "cpu", notes.append)
