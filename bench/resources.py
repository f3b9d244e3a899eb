"""Registers, shared memory and spills of every kernel, without a GPU.

    python -m bench.resources [--arch 80 90 100] [--json FILE]

The host code of the ops runs on small CPU tensors of the real head dims and dtypes, forward and backward; each launch
is compiled for the requested GPU instead of run. So the table shows the kernels that a GPU would run: registers and
shared memory of a program, spills, and the number of tensor-core instructions. The compiler, ptxas and cuobjdump are
part of Triton's wheel. Register allocation changes between releases of ptxas, so repeat this for each Triton.

Next: tests/test_resources.py, which compares these numbers with the limits of the GPUs.
"""

import argparse
import contextlib
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from nanolmmr1.kernels import _triton
from nanolmmr1.kernels import attention as attention_op
from nanolmmr1.kernels import linear_logprob as linear_logprob_op
from nanolmmr1.kernels import linear_loss as linear_loss_op
from nanolmmr1.kernels import mrope as mrope_op
from nanolmmr1.kernels import rmsnorm as rmsnorm_op
from nanolmmr1.kernels import swiglu as swiglu_op

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a program may have (CUDA programming guide)
SMS = {80: 108, 90: 132, 100: 148}
TENSOR_CORE = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}  # of each generation, in PTX


@dataclass
class Resources:
    """Resources of one compiled kernel. Counts are instructions in the code, not executions."""

    op: str
    kernel: str
    arch: int
    dtype: str  # of the op's inputs
    config: str  # constants of its tiles
    warps: int
    registers: int  # per thread
    shared: int  # bytes per program
    stack: int  # bytes of local memory per thread, for values without a register
    spills: int  # loads and stores of the stack
    tensor_core: int
    tma: int  # bulk tensor loads

    def __str__(self):
        return LINE.format(
            self.op, self.kernel, f"sm_{self.arch}", self.dtype, self.config, self.warps, self.registers,
            f"{self.shared / 1024:.1f}", self.spills, self.tensor_core, self.tma,
        )


LINE = "{:15} {:22} {:6} {:5} {:44} {:>5} {:>4} {:>8} {:>6} {:>11} {:>3}"
HEADER = LINE.format(
    "op", "kernel", "chip", "dtype", "config", "warps", "regs", "smem KiB", "spills", "tensor core", "TMA"
)


class _Chip:
    """The part of Triton's driver that the compiler needs. The device number is the arch, which is a cache key."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def compile_only(arch, sms=None):
    """Context in which kernels launched on CPU tensors are compiled for `arch` and not run. Outputs are garbage.

    Args:
        sms: number of streaming multiprocessors to assume; None: that of the real GPU.

    Yields:
        a dict to which launches add: hash -> (compiled kernel, its arguments by name).

    Raises:
        RuntimeError: Triton interprets the kernels.
    """
    if _triton.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set, and what is interpreted is not compiled: unset it")
    launches = {}

    def compile_instead(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.setdefault(compiled.hash, (compiled, dict(zip(self.arg_names, args, strict=False)) | kwargs))
        return compiled

    run, plain = JITFunction.run, {name: getattr(_triton, name) for name in ("arch", "num_sms", "check_device")}
    JITFunction.run = compile_instead
    _triton.arch, _triton.num_sms = (lambda _: arch), (lambda _: sms or SMS[arch])
    _triton.check_device = lambda **_: None
    triton.runtime.driver.set_active(_Chip(arch))
    try:
        yield launches
    finally:
        JITFunction.run = run
        for name, function in plain.items():
            setattr(_triton, name, function)
        triton.runtime.driver._active = None


def read(op, arch, dtype, compiled, arguments):
    """Resources of a compiled kernel, from its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([CUOBJDUMP, "-res-usage", file.name], text=True, stderr=subprocess.STDOUT)
        stack = int(re.search(r"STACK:(\d+)", usage)[1])
        # Disassembling is slow, and without a stack there are no spills.
        dump = [CUOBJDUMP, "--dump-sass", file.name]
        code = subprocess.check_output(dump, text=True, stderr=subprocess.DEVNULL) if stack else ""
    tiles = {k: v for k, v in arguments.items() if k.isupper() and isinstance(v, (int, str)) and "BLOCK" in k}
    names = ", ".join(f"{k.removeprefix('BLOCK_')} {v}" for k, v in tiles.items())
    return Resources(
        op=op,
        kernel=compiled.metadata.name.strip("_"),
        arch=arch,
        dtype=dtype,
        config=f"{names}, {compiled.metadata.num_stages} stages" if names else "",
        warps=compiled.metadata.num_warps,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        shared=compiled.metadata.shared,
        stack=stack,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        tensor_core=len(re.findall(rf"\b{TENSOR_CORE[arch]}\b", compiled.asm["ptx"])),
        tma=len(re.findall(r"\bcp\.async\.bulk\.tensor\b", compiled.asm["ptx"])),
    )


def attention(dtype):
    """Language with a shared prefix, a whole image, and windows."""
    for (q_heads, kv_heads, dim), table in (
        ((16, 2, 128), [[0, 128, 0, 128, 0, 0, 1], [128, 192, 128, 192, 0, 128, 1]]),
        ((16, 16, 80), [[0, 128, 0, 128, 0, 0, 0]]),
        ((16, 16, 80), [[0, 64, 0, 64, 0, 0, 0], [64, 96, 64, 96, 0, 0, 0]]),
    ):
        spans = attention_op.Spans(table, table[-1][1])
        q, k, v = (
            torch.randn(spans.num_tokens, heads, dim, dtype=dtype, requires_grad=True)
            for heads in (q_heads, kv_heads, kv_heads)
        )
        attention_op.attention(q, k, v, spans, impl="triton").sum().backward()


def head(dtype, size=2048):
    """H as in the model; V is any number that is no power of two."""
    x = torch.randn(64, size, dtype=dtype, requires_grad=True)
    weight = torch.randn(2000, size, dtype=dtype, requires_grad=True)
    return x, weight, torch.arange(64)


def linear_logprob(dtype):
    for size, banned in ((2048, ()), (2048, (1990, 1991, 1992, 1993, 1994)), (2047, ())):  # the last has unaligned rows
        linear_logprob_op.linear_logprob(*head(dtype, size), banned=banned, impl="triton")


def linear_loss(dtype):
    """The generic route, and the fused objective with no option and with all options."""
    token = torch.ones(64)
    bare = linear_loss_op.FusedObjective(advantage=token, weight=token, loss_type="ppo")
    whole = dict(old_logp=token, ref_logp=token, sampler_logp=token, clip_ratio_dual=3.0, kl_coef=0.1, kl_ratio=True,
                 entropy_coef=0.01, tis_cap=2.0)
    for fused in (None, bare, replace(bare, **whole), replace(bare, **whole, loss_type="cispo", kl_estimator="k2")):
        for logits in {torch.float32, dtype}:
            loss, _, _ = linear_loss_op.linear_loss(
                *head(dtype), lambda logp, entropy, rows: logp, fused=fused, logits_dtype=logits, impl="triton")
            loss.backward()


def mrope(dtype):
    q, k = (torch.randn(64, heads, 128, dtype=dtype, requires_grad=True) for heads in (16, 2))
    positions = torch.arange(64).expand(3, -1).contiguous()
    sum(x.sum() for x in mrope_op.mrope(q, k, positions, theta=1e6, section=(16, 24, 24), impl="triton")).backward()
    q, k = (torch.randn(64, 16, 80, dtype=dtype, requires_grad=True) for _ in "qk")
    sum(x.sum() for x in mrope_op.rope2d(q, k, torch.ones(64, 2, dtype=torch.int64), impl="triton")).backward()


def rmsnorm(dtype):
    """Both towers' widths; a bf16 branch may join an fp32 residual, as under autocast."""
    for size in (2048, 1280):
        weight = torch.ones(size, requires_grad=True)
        for residual in (None, dtype, torch.float32):
            x = torch.randn(64, size, dtype=dtype, requires_grad=True)
            if residual is not None:
                residual = torch.randn(64, size, dtype=residual, requires_grad=True)
            out = rmsnorm_op.rmsnorm(x, weight, 1e-6, residual=residual, impl="triton")
            sum(y.sum() for y in (out if residual is not None else (out,))).backward()


def swiglu(dtype):
    gate, up = torch.randn(2, 64, 11008, dtype=dtype).unbind()
    swiglu_op.swiglu(gate.requires_grad_(), up.requires_grad_(), impl="triton").sum().backward()


OPS = (linear_logprob, linear_loss, attention, mrope, rmsnorm, swiglu)


def survey(arch):
    """Resources of one specialization of each kernel, dtype and route of `OPS`, one row per compiled kernel."""
    for op in OPS:
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            launches = {}
            for sms in (None, 1):  # with one, no work is split over programs
                with compile_only(arch, sms) as more:
                    op(dtype)
                launches |= more
            yield from (read(op.__name__, arch, name, *launch) for launch in launches.values())


def main():
    parser = argparse.ArgumentParser(description="Compile every kernel without a GPU.")
    parser.add_argument("--arch", type=int, nargs="+", choices=SMS, default=list(SMS))
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    print(f"triton {triton.__version__}\n{HEADER}")
    rows, seen = [], set()
    for arch in options.arch:
        for row in survey(arch):
            if str(row) not in seen:
                seen.add(str(row))
                rows.append(row)
                print(row, flush=True)
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
