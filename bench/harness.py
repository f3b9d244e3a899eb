"""Harness of all kernel benchmarks: checks every provider, then times it.

A case is a shape and its providers: our implementations, plain torch and other libraries, all computing the same
function. Its gold result is computed in wider arithmetic. If a provider's error exceeds the tolerance, the error is
printed instead of a time; if it cannot run here or fails, the reason is. The others run in turn, in an order that
changes every round: a slower host then slows all of them, and none always runs after the same neighbour.

GPU times are between CUDA events. The L2 cache is flushed before each run (not with `--hot`), and the host runs a
little ahead, as in a training step, so that launches count only if they take longer than the kernels. Work is
algorithmic: products that the result needs, counted once, without masked pairs; bytes that must be read or written at
least once. The floor is the larger of FLOPs and bytes at the measured rates of a large product and a large copy
(machine.py; one GPU has those of its data sheet), so a provider may exceed 100 % of it.
Memory on a CPU is read from /proc, so this needs Linux; it is omitted if the peak cannot be reset.

Next: modes.py, which splits a differentiable op into forward, backward and full.
"""

import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.machine import capacity, floor_ms, machine, peaks

# Of the norm. bf16 rounds to 1 in 256 and a gradient adds several roundings; 1 missing row in 100 is an error of 0.1.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
ROUNDS = {"cpu": (3, 50), "cuda": (5, 100)}  # fewest, most
HEADER = "{:34}{:>8}{:>12}{:>10}{:>10}{:>18}{:>9}{:>11}"
HEAD_START = 500_000  # clock cycles, about 0.3 ms, by which the host runs ahead of the GPU
CLEAR_REFS = Path("/proc/self/clear_refs")  # missing in some kernels and sandboxes


@dataclass
class Provider:
    """One implementation in one case. `run(*setup())` returns outputs; only `run` is timed."""

    run: Callable | None = None
    setup: Callable = tuple
    compare: Callable = tuple  # outputs -> tensors like the gold's; untimed
    ours: bool = False  # wrong results fail the whole bench
    needs: float = 0.0  # bytes that it is known to allocate besides its inputs
    refused: str = ""  # reason why it cannot run here


@dataclass
class Case:
    name: str
    gold: Callable  # () -> tensors
    providers: dict[str, Provider]
    flops: float
    bytes: float
    family: str = ""  # cases that differ by size alone; one line of a plot
    size: int = 0
    dtype: torch.dtype = torch.float32


def main(benches, argv=None):
    """Run benches, name -> function of (device, dtype) that yields cases.

    Returns:
        exit status: 1 if a provider of ours is wrong or fails, 2 if --only selects nothing.
    """
    options = arguments(argv)
    draw = plotter(options) if options.plot else None
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    report = {"machine": machine(device) | {"cache": "hot" if options.hot or device == "cpu" else "cold"}, "rows": []}
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()), "(* ours)", flush=True)
    said, start = set(), time.perf_counter()
    for op, cases in benches.items():
        header = "\n" + HEADER.format(op, "error", "median ms", "p20", "p80", "rate", "of floor", "extra MB") + "\n"
        for case in cases(device, dtype):
            case.providers = chosen(op, case, options.only)
            if not case.providers:
                continue
            print(header, end="")
            header = ""
            print(f"{case.name}  [{time.perf_counter() - start:.0f} s]", flush=True)
            for row in measure(op, case, device, options):
                line = show(row)
                if not row["refused"] or (op, line) not in said:  # a missing library is printed once
                    print(line, flush=True)
                said.add((op, line))
                report["rows"].append(row)
            if options.json:
                save(report, options.json)
    if not report["rows"]:
        print(f"nothing is named like --only {' --only '.join(options.only)}")
        return 2
    if draw:
        draw(report, options.plot)
    return int(any(row["ours"] and row["verdict"] in ("wrong", "failed") for row in report["rows"]))


def arguments(argv):
    parser = argparse.ArgumentParser(
        description="Check every provider against a reference, then time it.",
        epilog="BENCH_COMMIT in the environment names the commit of a copy without .git.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and rows here, after every case")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw rooflines and times over size")
    parser.add_argument(
        "--only", default=[], action="append", metavar="NAME",
        help="only what has this, as it stands or as a regular expression, in `op: case: provider`")
    parser.add_argument("--hot", action="store_true", help="leave the L2 cache as the last run left it")
    parser.add_argument("--seconds", type=float, default=0.25, help="timed per provider and case (default 0.25)")
    return parser.parse_args(argv)


def plotter(options):
    """`bench.plot.draw`; fails early if matplotlib is missing."""
    try:
        from bench.plot import draw
    except ModuleNotFoundError as missing:
        sys.exit(f"--plot needs {missing.name}: pip install -e '.[bench]'")
    options.plot.mkdir(parents=True, exist_ok=True)
    return draw


def chosen(op, case, only):
    """The providers that match every `--only`."""

    def wanted(name):
        name = f"{op}: {case.name}: {name}"
        return all(part.lower() in name.lower() or matches(part, name) for part in only)

    return {name: provider for name, provider in case.providers.items() if wanted(name)}


def matches(part, name):
    """Whether the name contains a match of the regular expression; False for an invalid one."""
    try:
        return bool(re.search(part, name, re.IGNORECASE))
    except re.error:
        return False


def measure(op, case, device, options):
    """One row per provider."""
    about = {"op": op, "case": case.name, "family": case.family, "size": case.size}
    about |= {"dtype": str(case.dtype).removeprefix("torch."), "flops": case.flops, "bytes": case.bytes}
    empty = dict.fromkeys(
        ("verdict", "refused", "fault", "error", "median_ms", "p20_ms", "p80_ms", "rounds", "tflop_per_s", "gb_per_s",
         "floor_ms", "percent_of_floor", "extra_mb"))
    rows = {name: about | {"provider": name, "ours": p.ours} | empty for name, p in case.providers.items()}
    empty_cache()  # cached blocks of the last case's sizes would take memory that a provider may need
    for name, provider in case.providers.items():
        rows[name]["refused"] = provider.refused or too_large(provider, device)
    able = [name for name in rows if not rows[name]["refused"]]
    if able:
        check(case, rows, able)
    right = [name for name in able if not rows[name]["fault"] and rows[name]["error"] <= TOLERANCE[case.dtype]]
    for name in right:
        rows[name]["extra_mb"] = attempt(rows[name], extra_mb, case.providers[name], device)
    times, start = {name: [] for name in right}, time.perf_counter()
    fewest, most = ROUNDS[device]
    for count in range(most):
        if count >= fewest and time.perf_counter() - start > options.seconds * len(right):
            break
        for name in balanced(right, count):
            if not rows[name]["fault"]:
                times[name].append(attempt(rows[name], timed, case.providers[name], device, options.hot))
    for name, row in rows.items():
        if row["refused"] or row["fault"]:
            row["verdict"] = "refused" if row["refused"] else "failed"
        elif name not in right:
            row["verdict"] = "wrong"
        else:
            row |= {"verdict": "right"} | summary(times[name], case, peaks(device))
        yield row


def check(case, rows, names):
    """Store each provider's error in its row, or a fault if there is no gold result."""
    made = {}
    gold = attempt(made, case.gold)
    if made:
        for name in names:
            rows[name]["fault"] = f"no reference: {made['fault']}"
        return

    def of_one_run(provider):
        return error(provider.compare(provider.run(*provider.setup())), gold)

    for name in names:
        rows[name]["error"] = attempt(rows[name], of_one_run, case.providers[name])


def summary(times, case, chip):
    """Columns of one provider from its times in ms; chip: see `peaks`."""
    low, _, _, high = statistics.quantiles(times, n=5, method="inclusive")
    median, floor = statistics.median(times), floor_ms(case.flops, case.bytes, chip)
    return {
        "median_ms": median, "p20_ms": low, "p80_ms": high, "rounds": len(times),
        "tflop_per_s": case.flops / median / 1e9, "gb_per_s": case.bytes / median / 1e6,
        "floor_ms": floor, "percent_of_floor": floor and 100 * floor / median,
    }


def show(row):
    """A provider's line of the table."""
    name = f"  {'*' if row['ours'] else ' '} {row['provider']:30}"
    if row["verdict"] == "refused":
        return f"{name}        not run: {row['refused']}"
    if row["verdict"] == "failed":
        return f"{name}        failed: {row['fault']}"
    name += f"{row['error']:8.1e}"
    if row["verdict"] == "wrong":
        return f"{name}  WRONG: beyond {TOLERANCE[getattr(torch, row['dtype'])]:.0e}, not timed"
    rate = f"{1e3 * row['tflop_per_s']:,.0f} GFLOP/s" if row["flops"] else f"{row['gb_per_s']:,.1f} GB/s"
    floor = f"{row['percent_of_floor']:.0f} %" if row["percent_of_floor"] else "-"
    extra = "-" if row["extra_mb"] is None else f"{row['extra_mb']:,.1f}"
    times = f"{row['median_ms']:10.3f} {row['p20_ms']:9.3f} {row['p80_ms']:9.3f}"
    return f"{name}  {times} {rate:>17} {floor:>8} {extra:>10}"


def attempt(row, work, *arguments):
    """`work(*arguments)`; any exception is stored as the provider's fault, so that the others still run."""
    try:
        return work(*arguments)
    except Exception as fault:
        row["fault"] = f"{type(fault).__name__}: {fault}".splitlines()[0]
    empty_cache()  # by now the traceback and the tensors in it are freed
    return None


def empty_cache():
    """Free the GPU's cached blocks. After a kernel broke the CUDA context this raises as well; ignore it."""
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def too_large(provider, device):
    """The reason why the device cannot hold the provider, or an empty string."""
    if provider.needs <= capacity(device):
        return ""
    return f"needs about {provider.needs / 1e9:.0f} GB, the machine has {capacity(device) / 1e9:.0f}"


def balanced(names, count):
    """Order of a round. Every second round is the mirror image of the one before; then the order is rotated by a third.

    So after an even number of rounds each name ran before each other as often as after it; after an odd number, once
    more or less. In five rounds, the fewest on a GPU, each name runs at more than half of the places.
    """
    turn = count // 2 * max(1, len(names) // 3) % len(names) if names else 0
    order = names[turn:] + names[:turn]
    return order[::-1] if count % 2 else order


@torch.no_grad()
def error(outputs, gold):
    """||output - gold|| / ||gold|| of the worst output.

    A maximum would not see errors in small values: late rows of a long causal pack average many values, and all of them
    may be missing without a difference as large as the first rows' values.

    Raises:
        ValueError: outputs of another number or other shapes, or not finite.
    """
    worst = 0.0
    for a, b in zip(outputs, gold, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"an output of shape {tuple(a.shape)}, the reference's is {tuple(b.shape)}")
        off = float((a.to(b.dtype) - b).norm() / b.norm())
        if not math.isfinite(off):
            raise ValueError("outputs are not finite")
        worst = max(worst, off)
    return worst


def timed(provider, device, hot):
    """Milliseconds of one run; of a second one if the first had to allocate memory from the driver."""
    if device == "cuda":
        elapsed, grew = timed_on_gpu(provider, hot)
        return timed_on_gpu(provider, hot)[0] if grew else elapsed
    state = provider.setup()
    start = time.perf_counter()
    outputs = provider.run(*state)
    elapsed = (time.perf_counter() - start) * 1e3
    del outputs  # freeing memory is not timed
    return elapsed


def timed_on_gpu(provider, hot):
    """(milliseconds, whether the allocator called the driver, which stalls first runs only)."""
    state = provider.setup()
    if not hot:
        l2_filler().zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before = device_allocations()
    torch.cuda._sleep(HEAD_START)
    start.record()
    provider.run(*state)
    end.record()
    end.synchronize()
    return start.elapsed_time(end), device_allocations() != before


def device_allocations():
    return torch.cuda.memory_stats().get("num_device_alloc", 0)


@functools.cache
def l2_filler():
    """A buffer that evicts everything else from the L2 cache when written."""
    size = 4 * torch.cuda.get_device_properties().L2_cache_size
    return torch.empty(size, dtype=torch.int8, device="cuda")


def extra_mb(provider, device):
    """Peak memory of one run above the memory before it, results included, in MB; None if it cannot be measured."""
    state = provider.setup()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        provider.run(*state)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)  # cached memory of earlier runs would hide new allocations
    try:
        CLEAR_REFS.write_text("5")  # resets the process's peak to its present size
    except OSError:
        return None
    before = resident_kb("VmRSS")
    provider.run(*state)
    return (resident_kb("VmHWM") - before) * 1024 / 1e6


def resident_kb(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def save(report, path):
    """Atomic write: the file of an interrupted run stays readable."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(draft, path)
