"""Packed attention, forward and backward, of both towers: python -m bench.attention [--json FILE]"""

from functools import partial

import torch

from bench.harness import Case, main
from nanolmmr1.kernels import attention as kernel

VISION, LANGUAGE = (16, 16, 80), (16, 2, 128)  # q heads, kv heads, head dim of Qwen2.5-VL-3B


def chain(lengths, causal, prefix=0):
    """Spans one after another; with a prefix, the first `prefix` tokens are seen by all that follow."""
    rows, start = [[0, prefix, 0, prefix, 0, 0, 1]] if prefix else [], prefix
    for length in lengths:
        rows.append([start, start + length, start, start + length, 0, prefix, causal])
        start += length
    return rows


def shapes(size):
    """name -> (heads, span table) at 1 / size of a step with 1,400 prompt tokens and 8 responses of 400."""
    prompt, response, side = 1400 // size, 400 // size, 64 // size
    return {
        f"vision windows, {side**2} patches": (VISION, chain([64] * (side**2 // 64), 0)),
        f"vision whole image, {side**2} patches": (VISION, chain([side**2], 0)),
        f"causal, 4 of {prompt}": (LANGUAGE, chain([prompt] * 4, 1)),
        f"shared prefix, {prompt} + 8 of {response}": (LANGUAGE, chain([response] * 8, 1, prompt)),
    }


def visible(table):
    """(query, key) pairs that attend."""
    own = sum((q1 - q0) * (k1 - k0 + causal) // (1 + causal) for q0, q1, k0, k1, _, _, causal in table)
    return own + sum((q1 - q0) * (p1 - p0) for q0, q1, _, _, p0, p1, _ in table)


def cases(device, dtype):
    for name, ((q_heads, kv_heads, dim), table) in shapes(1 if device == "cuda" else 2).items():
        torch.manual_seed(0)
        tokens = table[-1][1]
        spans = kernel.Spans(torch.tensor(table), tokens)
        q, k, v = (
            torch.randn(tokens, heads, dim, device=device, dtype=dtype, requires_grad=True)
            for heads in (q_heads, kv_heads, kv_heads)
        )

        def run(impl, q=q, k=k, v=v, spans=spans):
            out = kernel.attention(q, k, v, spans, impl=impl)
            upstream = torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
            return out.detach(), *torch.autograd.grad(out, (q, k, v), upstream)

        # Two products forward; five backward, since the scores are made again.
        flops = 14 * visible(table) * q_heads * dim
        yield Case(name, flops, {"reference": partial(run, "reference"), "ours": partial(run, "sdpa")})


if __name__ == "__main__":
    main({"attention": cases})
