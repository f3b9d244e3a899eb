"""Benchmark of rotary embeddings of q and k, both towers.

    python -m bench.mrope [--json FILE] [--plot DIR] [--only NAME]

Tables of cosines and sines for other libraries are not timed, since a model computes them once for all layers.

Next: rmsnorm.py.
"""

import sys

import torch

from bench import providers
from bench.harness import main
from bench.modes import Op, by_mode, evaluate, wider
from nanolmmr1.kernels import mrope as kernel

THETA, SECTION = 1e6, (16, 24, 24)  # of Qwen2.5-VL-3B's language model, 16 q heads and 2 kv heads of 128
GRID = 32, 40  # merged patches of an image of 896 x 1,120 pixels


def positions(tokens, device):
    """(3, T) positions of packs: 16 + 1,280 (image) + 104 prompt tokens, then eight responses of 400."""
    image = torch.cartesian_prod(torch.arange(1), *map(torch.arange, GRID)).T + 16
    after = 16 + max(GRID)
    parts = [(0, 16), image, (after, after + 104)] + [(after + 104, after + 504)] * 8
    pack = torch.cat([torch.arange(*p).expand(3, -1) if isinstance(p, tuple) else p for p in parts], 1)
    return pack.repeat(1, -(-tokens // pack.shape[1]))[:, :tokens].contiguous().to(device)


def tables(angles):
    """cos and sin (T, 1, D) of angles (T, D / 2) for the two halves of the head dim."""
    angles = torch.cat([angles, angles], 1)[:, None]
    return angles.cos(), angles.sin()


def turn(x, cos, sin):
    """Rotation in plain torch from tables, computed in fp32."""
    a, b = x.float().chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


def turn_both(q, k, cos, sin):
    return turn(q, cos, sin), turn(k, cos, sin)


def language(tokens, device, dtype):
    where, half = positions(tokens, device), sum(SECTION)
    freq = THETA ** -(torch.arange(half, device=device, dtype=torch.float64) / half)
    axis = torch.repeat_interleave(torch.tensor(SECTION, device=device))
    shapes = (tokens, 16, 2 * half), (tokens, 2, 2 * half)

    def ours(impl):
        return lambda q, k: kernel.mrope(q, k, where, theta=THETA, section=SECTION, impl=impl)

    def liger(q, k):
        return providers.liger_mrope(q, k, *by_axis, SECTION)

    by_axis = [x.float().transpose(1, 2).contiguous() for x in tables3(where, freq)]
    # Liger's backward rotates the upstream gradient in place.
    others = {"Liger": Op(liger, fresh=True, refused=providers.lacking("liger_kernel", device))}
    angles = where[axis].T * freq
    yield from bench(f"mrope, {tokens:,} tokens", "mrope", shapes, angles, ours, others, device, dtype)


def tables3(where, freq):
    """cos and sin (3, T, 1, D): all columns for each axis, the layout of Liger."""
    return (torch.stack(x) for x in zip(*(tables(w[:, None] * freq) for w in where), strict=True))


def vision(patches, device, dtype):
    side = -(-patches // 64)
    where = torch.cartesian_prod(torch.arange(side), torch.arange(64))[:patches].to(device)
    freq = 10_000.0 ** -(torch.arange(20, device=device, dtype=torch.float64) / 20)
    angles = torch.cat([where[:, :1] * freq, where[:, 1:] * freq], 1)
    shapes = (patches, 16, 80), (patches, 16, 80)

    def ours(impl):
        return lambda q, k: kernel.rope2d(q, k, where, impl=impl)

    yield from bench(f"rope2d, {patches:,} patches", "rope2d", shapes, angles, ours, {}, device, dtype)


def bench(name, family, shapes, angles, ours, others, device, dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
    upstream = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    cos, sin = (x.float() for x in tables(angles))
    ops = {"eager": Op(lambda q, k: turn_both(q, k, cos, sin))}
    if device == "cuda":
        run = providers.compiled(turn_both)
        ops["torch.compile"] = Op(lambda q, k: run(q, k, cos, sin))
        ops["triton"] = Op(ours("triton"), ours=True)
    else:
        ops["torch.compile"] = Op(refused=providers.COMPILED)
        ops["triton"] = Op(refused=providers.INTERPRETED, ours=True)
        ops["reference"] = Op(ours("reference"), ours=True)

    def gold():
        return evaluate(ours("reference"), [wider(x) for x in inputs], [wider(x) for x in upstream])

    moved = 2 * sum(x.numel() * x.element_size() for x in inputs)  # read and written
    yield from by_mode(name, ops | others, inputs, upstream, gold, ((0, moved), (0, moved)), family, shapes[0][0])


def cases(device, dtype):
    for tokens in (4096, 16_384, 65_536) if device == "cuda" else (512,):
        yield from language(tokens, device, dtype)
    for patches in (5120, 16_384) if device == "cuda" else (512,):
        yield from vision(patches, device, dtype)


if __name__ == "__main__":
    sys.exit(main({"mrope": cases}))
