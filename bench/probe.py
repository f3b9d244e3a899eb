"""Peak rates of the GPU, to compare kernels with.

    python -m bench.probe [--json FILE]

A large copy and a large matrix product are the ceilings. The rest are bare products at the shapes of the 3B model: the
head in chunks, to choose their size and the logits' dtype, and the MLPs of both towers. Nothing is checked, since torch
computes everything. On a CPU sizes are tiny and only show that the command works.

Next: step.py, a whole update.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.harness import Provider, attempt, save, timed
from bench.machine import machine


@dataclass(frozen=True)
class Sizes:
    copy: int  # elements of two bytes
    square: int
    chunks: tuple  # tokens
    hidden: int
    vocab: int
    patches: int
    vision: int
    widths: tuple  # of the vision MLP: as published, and padded for 16-byte and 256-byte rows
    tokens: int
    inner: int
    runs: int


SIZES = {
    "cuda": Sizes(1 << 31, 8192, (1024, 2048, 4096), 2048, 151_936, 5120, 1280, (3420, 3424, 3456), 4592, 11_008, 10),
    "cpu": Sizes(1 << 20, 128, (16, 32, 64), 64, 512, 64, 40, (107, 112, 128), 64, 172, 3),
}
LOGITS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def wide_product(a, b, dtype):
    """a @ b in `dtype`. A CPU has no product with a wider result and rounds first."""
    return a @ b if a.dtype == dtype else torch.mm(a, b, out_dtype=dtype) if a.is_cuda else (a @ b).to(dtype)


def add_product(out, a, b, beta):
    """out = beta * out + a @ b, in place; out is fp32, a and b are bf16."""
    if out.is_cuda:
        return torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)
    return torch.addmm(out, a.float(), b.float(), beta=beta, out=out)


def ceilings(s, rnd):
    a, b = rnd(1).new_zeros(2, s.copy)
    yield "copy", 0, 4 * s.copy, [(b.copy_, a)]
    side = s.square
    yield f"product, {side:,} cubed", 2 * side**3, 0, [(torch.mm, rnd(side, side), rnd(side, side))]


def head(s, rnd):
    """Each product of a chunk. The gradient of fp32 logits is in their buffer, so its rows are 2 V apart."""
    w = rnd(s.vocab, s.hidden)
    dw = torch.zeros_like(w, dtype=torch.float32)
    for chunk in s.chunks:
        x, wide = rnd(chunk, s.hidden), rnd(chunk, 2 * s.vocab)
        for bits, dtype in LOGITS.items():
            dz = wide[:, s.vocab :] if bits == "fp32" else wide[:, : s.vocab].contiguous()
            for what, run in (
                ("logits", (wide_product, x, w.T, dtype)), ("dX", (torch.mm, dz, w)),
                ("dW, beta 0", (add_product, dw, dz.T, x, 0)), ("dW, beta 1", (add_product, dw, dz.T, x, 1)),
            ):
                yield f"head, chunk {chunk:,}, {bits} logits, {what}", 2 * chunk * s.hidden * s.vocab, 0, [run]


def mlps(s, rnd):
    """The vision MLP's nine products, forward and backward, at each width; the language model's forward ones."""
    x, mm = rnd(s.patches, s.vision), torch.mm
    for width in s.widths:
        gate, down, inner = rnd(width, s.vision), rnd(s.vision, width), rnd(s.patches, width)
        runs = [(mm, x, gate.T), (mm, inner, gate), (mm, inner.T, x)] * 2  # same for gate and up
        runs += [(mm, inner, down.T), (mm, x, down), (mm, x.T, inner)]
        yield f"vision MLP, width {width:,}", 18 * s.patches * s.vision * width, 0, runs
    h = s.hidden
    for name, (n, k) in {"gate": (s.inner, h), "down": (h, s.inner), "q": (h, h), "k": (h // 8, h)}.items():
        yield f"language {name}, T {s.tokens:,}", 2 * s.tokens * n * k, 0, [(mm, rnd(s.tokens, k), rnd(n, k).T)]


def measure(device, sizes):
    """A row for each line, like harness.measure; the time of several products is the sum of their medians."""
    def rnd(*shape):
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    def median(function, *given):
        provider = Provider(function, lambda: given)
        times = [timed(provider, device, False) for _ in range(2 + sizes.runs)]
        return statistics.median(times[2:])  # libraries select their kernels in the first runs

    for part in (ceilings, head, mlps):
        for case, flops, nbytes, runs in part(sizes, rnd):
            row = {"op": "probe", "case": case, "provider": "torch", "refused": "", "fault": None, "median_ms": None}
            ms = attempt(row, lambda runs=runs: sum(median(*run) for run in runs))
            row["verdict"] = "failed" if row["fault"] else "right"
            if ms:
                row |= {"median_ms": ms, "tflop_per_s": flops / ms / 1e9, "gb_per_s": nbytes / ms / 1e6}
            yield row


def main(argv=None):
    """Returns the exit status: 1 if a line failed."""
    parser = argparse.ArgumentParser(description="Rates of a large copy and of the 3B's products.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and rows here, after every line")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = {"machine": machine(device), "rows": []}
    for row in measure(device, SIZES[device]):
        report["rows"].append(row)
        rate = row["fault"] or f"{row['median_ms']:9.3f} ms  " + (
            f"{row['tflop_per_s']:8.1f} TFLOP/s" if row["tflop_per_s"] else f"{row['gb_per_s']:8.1f} GB/s")
        print(f"{row['case']:46}{rate}", flush=True)
        if options.json:
            save(report, options.json)
    return int(any(row["fault"] for row in report["rows"]))


if __name__ == "__main__":
    sys.exit(main())
