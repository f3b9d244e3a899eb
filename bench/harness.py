"""Check, then time: what every kernel bench shares.

A case names a shape and its providers, the reference first. Each provider's outputs are compared with the
reference's; one that errs beyond tolerance gets its error printed and no time. The others run in turn, round after
round, so that a machine that slows down slows all of them. Numbers go to a table, and as one JSON object to the
last line of stdout. Memory on a CPU is read from /proc, so these benches need Linux.

Next: linear_loss.py, which fills cases with shapes.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest value; bf16 logits are good to 1 in 128
SECONDS_PER_CASE = 2.5
ROUNDS = 3, 50  # fewest, most


@dataclass
class Case:
    name: str
    flops: float  # of the products that the result needs, counted once
    providers: dict[str, Callable[[], tuple]]  # name -> outputs and gradients; the first is the reference


def main(benches):
    """Run benches, name -> function of (device, dtype) that yields cases; options from the command line."""
    parser = argparse.ArgumentParser(description="Check against the reference, then time.")
    parser.add_argument("--json", type=Path, help="also write the JSON object here")
    options = parser.parse_args()
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    print(f"{'':67}  error  median ms     p20     p80  GFLOP/s  extra MB")
    rows = []
    for name, cases in benches.items():
        for case in cases(device, dtype):
            rows += measure(name, case, dtype)
    text = json.dumps({"machine": machine(device), "rows": rows})
    if options.json:
        options.json.write_text(text + "\n")
    print(text)


def measure(op, case, dtype):
    """One row a provider, printed as they come."""
    reference, *others = case.providers
    gold = case.providers[reference]()
    errors = {reference: 0.0} | {name: error(case.providers[name](), gold) for name in others}
    del gold
    right = [name for name in case.providers if errors[name] <= TOLERANCE[dtype]]
    extra = {name: extra_mb(case.providers[name]) for name in right}
    times, start = {name: [] for name in right}, time.perf_counter()
    for count in range(ROUNDS[1]):
        if count >= ROUNDS[0] and time.perf_counter() - start > SECONDS_PER_CASE:
            break
        for name in right:
            times[name].append(timed(case.providers[name]))
    rows = []
    for name in case.providers:
        row = {"op": op, "case": case.name, "provider": name, "error": errors[name], "right": name in right}
        line = f"{op:15}{case.name:42}{name:10}{errors[name]:.1e}"
        if row["right"]:
            p20, p80 = (statistics.quantiles(times[name], n=5, method="inclusive")[i] * 1e3 for i in (0, 3))
            median = statistics.median(times[name]) * 1e3
            row |= {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "rounds": len(times[name])}
            row |= {"gflop_per_s": case.flops / median / 1e6, "extra_mb": extra[name]}
            line += f" {median:10.1f} {p20:7.1f} {p80:7.1f} {row['gflop_per_s']:8.1f} {row['extra_mb']:9.1f}"
        print(line if row["right"] else f"{line}  beyond {TOLERANCE[dtype]:.0e}: not timed", flush=True)
        rows.append(row)
    return rows


def error(outputs, gold):
    """Largest difference of the worst output, in units of its reference's largest value; NaN counts as infinite."""
    each = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(outputs, gold, strict=True)]
    return max(float("inf") if math.isnan(e) else e for e in each)


def timed(run):
    """Seconds of one call."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def extra_mb(run):
    """Peak memory of one call above what was resident before, results included, in MB."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept of earlier runs would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # sets the process's peak back to its present size
    before = resident_kb("VmRSS")
    run()
    return (resident_kb("VmHWM") - before) / 2**10


def resident_kb(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def machine(device):
    """Where the numbers come from."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": model[0].split(": ")[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }
