"""Benchmark of RMSNorm, alone and after a residual add.

    python -m bench.rmsnorm [--json FILE] [--plot DIR] [--only NAME]

Next: swiglu.py.
"""

import sys

import torch

from bench import providers
from bench.harness import main
from bench.modes import Op, by_mode, evaluate, wider
from nanolmmr1.kernels import rmsnorm as kernel

EPS, HIDDEN = 1e-6, 2048  # of Qwen2.5-VL-3B


def norm(impl):
    return lambda x, weight: kernel.rmsnorm(x, weight, EPS, impl=impl)


def add_and_norm(impl):
    return lambda x, weight, residual: kernel.rmsnorm(x, weight, EPS, residual=residual, impl=impl)


def row_ops(make, device, own_inputs=False):
    """name -> Op of a function with impl=. own_inputs: Liger's backward overwrites its inputs."""
    ops = {"eager": Op(make("reference"))}
    if device == "cuda":
        ops["torch.compile"] = Op(providers.compiled(make("reference")))
        ops["triton"] = Op(make("triton"), ours=True)
    else:
        ops["torch.compile"] = Op(refused=providers.COMPILED)
        ops["triton"] = Op(refused=providers.INTERPRETED, ours=True)
    ops["Liger"] = Op(make("liger"), refused=providers.lacking("liger_kernel", device), fresh=own_inputs)
    return ops


def cases(device, dtype):
    for tokens in (4096, 16_384, 65_536) if device == "cuda" else (512,):
        for name, make, tensors in (("rmsnorm", norm, 1), ("add and rmsnorm", add_and_norm, 2)):
            torch.manual_seed(0)
            x, *residual = (
                torch.randn(tokens, HIDDEN, device=device, dtype=dtype, requires_grad=True) for _ in range(tensors))
            weight = (1 + 0.1 * torch.randn(HIDDEN, device=device, dtype=dtype)).requires_grad_()
            inputs = [x, weight, *residual]
            upstream = [torch.randn_like(x, requires_grad=False) for _ in range(tensors)]

            def gold(make=make, inputs=inputs, upstream=upstream):
                return evaluate(make("reference"), [wider(x) for x in inputs], [wider(x) for x in upstream])

            one = x.numel() * x.element_size()
            # Forward: each input and output. Backward: the sum, each upstream gradient, one gradient for both inputs.
            work = ((0, 2 * tensors * one), (0, (2 + tensors) * one))
            title = f"{name}, {tokens:,} x {HIDDEN:,}"
            yield from by_mode(title, row_ops(make, device), inputs, upstream, gold, work, name, tokens)


if __name__ == "__main__":
    sys.exit(main({"rmsnorm": cases}))
