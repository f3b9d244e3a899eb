"""Facts about the host and the GPU of a benchmark: peak rates, memory, versions.

Next: harness.py.
"""

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# CUDA's device name -> dense bf16 FLOP/s, bytes/s. H200, H100: measured with probe.py, a large matrix product of random
# data (on an H100 798 TFLOP/s, on an H200 769 to 798) and a large copy. A100: from its data sheet. PCIe cards differ.
PEAKS = {
    "NVIDIA H200": (790e12, 4.3e12),
    "NVIDIA H100 80GB HBM3": (790e12, 3.0e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.04e12),
}


def peaks(device):
    """(FLOP/s, bytes/s) of the GPU, or None if unknown."""
    return PEAKS.get(torch.cuda.get_device_name()) if device == "cuda" else None


def floor_ms(flops, nbytes, peaks):
    """Milliseconds at the measured rates of a large product and a large copy, or None on an unknown GPU.

    A goal, not a bound: other shapes may run at higher rates and reach more than 100 % of it.
    """
    if not peaks:
        return None
    rate, bandwidth = peaks
    return max(flops / rate, nbytes / bandwidth) * 1e3


def capacity(device):
    """Bytes of memory."""
    if device == "cuda":
        return torch.cuda.get_device_properties().total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine(device):
    """Host, GPU, versions and commit. BENCH_COMMIT in the environment is the commit of a copy without .git."""
    cuda = device == "cuda"
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "peaks": peaks(device),
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "cpu": model[0].split(": ")[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "triton": installed("triton"),
        "liger": installed("liger-kernel"),
        "commit": os.environ.get("BENCH_COMMIT")
        or first_line("git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def first_line(*command):
    """First line of a program's output; None if it is missing or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.split("\n")[0].strip() or None
