"""Benchmark of one update of a random 3B model.

    python -m bench.step [shared] [swiglu] [recompute] [repeated] [--profile] [--apply]

`Policy.backward` of one group: a prompt with an image of 1,280 tokens, and eight responses of 400. `shared` packs them
as in training, `swiglu` also recomputes each MLP's product in the backward pass, `recompute` recomputes every block,
and `repeated` gives each response a copy of the prompt and its image, like a trainer without shared prefixes.
Utilization counts the products that the model needs, 2 FLOPs forward and 4 backward per weight and token, with vision;
recomputation is not counted.

On a CPU the model is tiny, and its times only show that the command works.

Next: verdict.py, the questions that these numbers answer.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from bench.harness import attempt, empty_cache, save
from bench.machine import capacity, machine, peaks
from bench.verdict import MODES
from nanolmmr1.config import resolve
from nanolmmr1.data.group import Group, Response
from nanolmmr1.data.prompt import Prompt
from nanolmmr1.data.rows import Row
from nanolmmr1.model.qwen import ModelConfig, Qwen25VL, VisionConfig
from nanolmmr1.schema import Phase, Recipe
from nanolmmr1.update.objective import Tokens
from nanolmmr1.update.pack import pack_groups
from nanolmmr1.update.policy import Policy

SIZES = {  # option -> (value, tiny value, meaning)
    "group-size": (8, 2, "responses of the prompt"), "response": (400, 6, "tokens of a response"),
    "text": (120, 8, "tokens of the prompt beside its image"), "height": (64, 4, "patches of the image"),
    "width": (80, 8, "patches of the image"), "budget": (16_384, 16_384, "packed tokens of a pass"),
    "layers": (36, 2, "language blocks"), "depth": (32, 2, "vision blocks"),
}  # fmt: skip
APPLY_BYTES = 120e9  # weights, gradients and two moments in fp32 take 60; memory of the passes stays cached
KERNELS = 32
CFG = Recipe(model="random", phases={"bench": Phase(data="random")})
resolve(CFG)
OBJECTIVE = CFG.phases["bench"].objective


def random_policy(o, device, dtype):
    """A Policy with random weights, created on its device."""
    width, inner, kv_heads, vocab, section = (64, 96, 2, 512, (2, 3, 3)) if o.tiny else (
        2048, 11_008, 2, 151_936, (16, 24, 24))
    heads, tower = (4, (32, 44, 2)) if o.tiny else (16, (1280, 3420, 16))
    full = tuple(i for i in (7, 15, 23, 31) if i < o.depth) or (o.depth - 1,)
    vision = VisionConfig(o.depth, *tower, width, fullatt_block_indexes=full)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen25VL(ModelConfig(width, inner, o.layers, heads, kv_heads, vocab, vision, mrope_section=section))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.02)
    CFG.pack.head_logits, CFG.pack.attention = o.head_logits, o.attention
    policy = Policy(model, CFG.pack, CFG.optim, (), dtype, device)
    policy.start_phase(CFG.phases["bench"])
    return policy


def make_packs(o, repeated, vocab):
    """Packs of a group; repeated: a group for each response, two per pack, since more image copies would not fit."""
    generator = torch.Generator().manual_seed(0)
    patches = o.height * o.width
    length, before = o.text + patches // 4, o.text // 2

    def ids(count):
        return torch.randint(0, vocab - 500, (count,), generator=generator)

    prompt = Prompt(
        Row("", ""), ids(length), torch.arange(length).expand(3, -1), torch.randn(patches, 1176, generator=generator),
        torch.tensor([[1, o.height, o.width]]), torch.arange(before, before + patches // 4), "")
    responses = [Response(ids(o.response), torch.full((o.response,), -1.0), "stop") for _ in range(o.group_size)]
    if not repeated:
        return pack_groups([Group(prompt, responses)], o.budget)[0]
    return pack_groups([Group(prompt, [r]) for r in responses], min(o.budget, 2 * (length + o.response)))[0]


def count(packs):
    """Tokens, patches and scored tokens of packs."""
    return [sum(of) for of in zip(*((p.num_tokens, len(p.patches), p.num_scored) for p in packs), strict=True)]


def work(packs, model):
    """FLOPs that an update needs, without norms, rotations, patch embedding and optimizer."""
    cfg, tower = model.cfg, model.visual
    (tokens, patches, scored), whole = count(packs), len(tower.cfg.fullatt_block_indexes)
    language, vision, merger = (
        sum(p.numel() for p in part.parameters()) for part in (model.model.layers, tower.blocks, tower.merger))
    rows = [row for pack in packs for row in pack.spans.table.tolist()]
    pairs = sum((q1 - q0) * (p1 - p0 + (k1 - k0 + 1) / 2) for q0, q1, k0, k1, p0, p1, _ in rows)
    window = (tower.cfg.window_size // tower.cfg.patch_size) ** 2
    grids = [grid for pack in packs for grid in pack.grid.tolist()]
    seen = sum(t * h * w * (whole * h * w + (tower.cfg.depth - whole) * min(window, h * w)) for t, h, w in grids)
    products = tokens * language + patches * vision + patches / 4 * merger + scored * model.head.numel()
    return 6 * products + 12 * (cfg.hidden_size * cfg.num_hidden_layers * pairs + tower.cfg.hidden_size * seen)


def learner(policy, packs, response, objective):
    """A function that accumulates an update's gradient, with advantages of both signs."""
    total = sum(pack.num_scored for pack in packs)

    def tokens(pack):
        n = pack.num_scored
        advantage, weight, logp = torch.linspace(-1, 1, n), torch.full((n,), 1 / total), torch.full((n,), -1.0)
        vectors = advantage, weight, pack.flat_index // response, logp
        return Tokens(*(vector.to(policy.device) for vector in vectors))

    given = [(pack, tokens(pack)) for pack in packs]

    def learn():
        for i, (pack, own) in enumerate(given):
            policy.backward(pack, own, objective, 1.0, (i == len(given) - 1,) * 2)

    return learn


def timed(run, device):
    """Milliseconds until the device has finished, and until the host has launched everything."""
    wait = torch.cuda.synchronize if device == "cuda" else tuple
    wait()
    start = time.perf_counter()
    run()
    asked = time.perf_counter()
    wait()
    return (time.perf_counter() - start) * 1e3, (asked - start) * 1e3


def peak_gb(device):
    return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None


def measure(mode, policy, o, device):
    """Row entries of one mode."""
    blocks = len(policy.model.model.layers) + len(policy.model.visual.blocks)
    policy.recompute(blocks * (mode == "swiglu"), blocks * (mode == "recompute"))
    packs = make_packs(o, mode == "repeated", policy.model.cfg.vocab_size)
    learn, flops = learner(policy, packs, o.response, OBJECTIVE), work(packs, policy.model)
    first, _ = timed(learn, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, hosts = zip(*(timed(learn, device) for _ in range(3)), strict=True)
    ms, chip = statistics.median(times), peaks(device)
    return dict(zip(("tokens", "patches", "scored"), count(packs), strict=True)) | {
        "packs": len(packs), "first_ms": first, "median_ms": ms, "host_ms": statistics.median(hosts), "flops": flops,
        "tflop_per_s": flops / ms / 1e9, "mfu_percent": chip and 1e5 * flops / ms / chip[0], "peak_gb": peak_gb(device)}


def profile(policy, o, device):
    """Print the longest kernels of one update, in the first mode; on a CPU, torch's operators."""
    learn = learner(policy, make_packs(o, o.modes[0] == "repeated", policy.model.cfg.vocab_size), o.response, OBJECTIVE)
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, *[kinds.CUDA] * (device == "cuda")]) as seen:
        timed(learn, device)
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    found = [(getattr(e, key), e) for e in seen.key_averages() if e.device_type.name == device.upper()]
    total = sum(us for us, _ in found)
    print(f"  {sum(e.count for _, e in found):,} launches, {total / 1e3:,.1f} ms; the longest:")
    for us, e in sorted(found, key=lambda pair: -pair[0])[:KERNELS]:
        print(f"  {us / 1e3:9.2f} ms {100 * us / total:5.1f} % {e.count:7,} x {e.key[:110]}", flush=True)


def apply(policy, o, device):
    """Row entries of the optimizer step: the second of two, since the first allocates the moments."""
    learn = learner(policy, make_packs(o, False, policy.model.cfg.vocab_size), o.response, OBJECTIVE)
    for _ in range(2):
        learn()
        ms, host = timed(lambda: policy.optimizer_step(1e-6, 0.0), device)
    return {"median_ms": ms, "host_ms": host, "peak_gb": peak_gb(device)}


def show(row):
    if why := row["refused"] or row["fault"]:
        return f"{row['case']}: {row['verdict']}: {why}"
    text = f"{row['case']}: {row['median_ms']:,.1f} ms (host {row['host_ms']:,.1f})"
    if "flops" in row:
        text += (f", T {row['tokens']:,}, P {row['patches']:,}, N {row['scored']:,}, {row['flops'] / 1e12:.4g} TFLOP, "
                 f"{row['tflop_per_s']:.3g} TFLOP/s")
        text += f", {row['mfu_percent']:.1f} % of the chip" if row["mfu_percent"] else ""
    return text + (f", peak {row['peak_gb']:.1f} GB" if row["peak_gb"] else "")


def arguments(argv):
    parser = argparse.ArgumentParser(description="Time one update of a random model.")
    parser.add_argument("modes", nargs="*", metavar="MODE", help=f"of {', '.join(MODES)} (default: shared)")
    parser.add_argument("--profile", action="store_true", help="print the longest kernels of the first mode")
    parser.add_argument("--apply", action="store_true", help="the optimiser's step too, where memory allows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and rows here, after every mode")
    parser.add_argument("--tiny", action=argparse.BooleanOptionalAction, default=not torch.cuda.is_available(),
                        help="narrow layers and small sizes; default where there is no GPU")
    for name, (value, tiny, meaning) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{meaning} (default {value}; tiny: {tiny})")
    parser.add_argument("--head-logits", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--attention", default="auto", help="as pack.attention")
    o = parser.parse_args(argv)
    o.modes = o.modes or ["shared"]
    if wrong := [mode for mode in o.modes if mode not in MODES]:
        parser.error(f"no mode is named {', '.join(wrong)}: there are {', '.join(MODES)}")
    for name, (value, tiny, _) in SIZES.items():
        key = name.replace("-", "_")
        if getattr(o, key) is None:
            setattr(o, key, tiny if o.tiny else value)
        if getattr(o, key) < 1 or (key in ("height", "width") and getattr(o, key) % 2):
            parser.error(f"--{name} {getattr(o, key)}: at least 1, and an image's sides even")
    return o


def main(argv=None):
    """Returns the exit status: 1 if a mode failed."""
    o = arguments(argv)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    report, policy = {"machine": machine(device), "rows": []}, random_policy(o, device, dtype)
    for case in (*o.modes, *["apply"] * o.apply):
        row = {"op": "step", "case": case, "provider": "policy", "refused": "", "fault": None, "median_ms": None}
        if case != "apply":
            row |= attempt(row, measure, case, policy, o, device) or {}
        elif device == "cuda" and capacity(device) < APPLY_BYTES:
            row["refused"] = f"needs {APPLY_BYTES / 1e9:.0f} GB, the machine has {capacity(device) / 1e9:.0f}"
        else:
            row |= attempt(row, apply, policy, o, device) or {}
        policy.discard()
        empty_cache()
        row["verdict"] = "refused" if row["refused"] else "failed" if row["fault"] else "right"
        report["rows"].append(row)
        print(show(row), flush=True)
        if o.json:
            save(report, o.json)
        if o.profile and case == o.modes[0]:
            attempt(lost := {}, profile, policy, o, device)  # a failing profiler must not lose the numbers
            print("".join(f"  no kernels: {why}" for why in lost.values()))
            policy.discard()
    took = {row["case"]: row["median_ms"] for row in report["rows"]}
    if took.get("shared") and took.get("repeated"):
        print(f"shared against repeated: {took['repeated'] / took['shared']:.2f} x", flush=True)
    return int(any(row["fault"] for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
