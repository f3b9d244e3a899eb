"""Benchmark of silu(gate) * up of the MLP.

    python -m bench.swiglu [--json FILE] [--plot DIR] [--only NAME]

Next: probe.py.
"""

import sys

import torch

from bench.harness import main
from bench.modes import by_mode, evaluate, wider
from bench.rmsnorm import row_ops
from nanolmmr1.kernels import swiglu as kernel

WIDTH = 11_008  # of Qwen2.5-VL-3B's language model


def gated(impl):
    return lambda gate, up: kernel.swiglu(gate, up, impl=impl)


def cases(device, dtype):
    for tokens in (4096, 16_384, 65_536) if device == "cuda" else (128,):
        torch.manual_seed(0)
        gate, up = (torch.randn(tokens, WIDTH, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
        upstream = torch.randn_like(up, requires_grad=False)

        def gold(inputs=(gate, up), upstream=upstream):
            return evaluate(gated("reference"), [wider(x) for x in inputs], [wider(upstream)])

        one = up.numel() * up.element_size()
        work = ((0, 3 * one), (0, 5 * one))
        ops = row_ops(gated, device, own_inputs=True)
        name = f"swiglu, {tokens:,} x {WIDTH:,}"
        yield from by_mode(name, ops, (gate, up), (upstream,), gold, work, "swiglu", tokens)


if __name__ == "__main__":
    sys.exit(main({"swiglu": cases}))
