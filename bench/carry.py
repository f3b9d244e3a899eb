"""What a bare machine without network lacks, as a folder to carry there: python -m bench.gpu prepare [--to .gpu]

Wheels, the embedded world with its cold start, and an assembler for Triton that is younger than the one in the wheels
of torch 2.11: up to 12.9, and 13.0, it can corrupt products whose left operand is in registers on Hopper.
"""

import json
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEELS = "math-verify==0.9.0", "latex2sympy2-extended==1.11.0", "antlr4-python3-runtime==4.13.2"
OTHERS = "liger-kernel==0.8.5", "cut-cross-entropy==25.1.1"  # whom our kernels are compared with
ASSEMBLER = "nvidia-cuda-nvcc==13.5.37"
LARGEST = 64e6  # bytes


def prepare(folder):
    """Fill the folder; what is there already stays. git is told to leave it alone.

    Returns:
        its size in bytes.

    Raises:
        ValueError: a wheel cannot be had, or all of it is too large to carry.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    for what in (*WHEELS, *OTHERS):
        download(what, folder)
    if not (folder / "ptxas.xz").exists():
        with tempfile.TemporaryDirectory() as scratch:
            download(ASSEMBLER, Path(scratch), "--only-binary=:all:", "--platform=manylinux2014_x86_64")
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as parts:
                (name,) = (name for name in parts.namelist() if name.endswith("bin/ptxas"))
                (folder / "ptxas.xz").write_bytes(lzma.compress(parts.read(name), preset=9))
    if not (folder / "world.tgz").exists():
        with tempfile.TemporaryDirectory() as scratch:
            whole_world(Path(scratch) / "world")
            draft = folder / "world.tgz.part"
            with tarfile.open(draft, "w:gz") as packed:
                packed.add(Path(scratch) / "world", "world")
            draft.replace(folder / "world.tgz")
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > LARGEST:
        raise ValueError(f"{folder} holds {size / 1e6:.0f} MB, more than the {LARGEST / 1e6:.0f} that can be carried")
    return size


def download(what, folder, *options):
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *options, what]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"pip has no {what}: {(done.stderr.strip().splitlines() or ['it says nothing'])[-1]}")


def unpack(folder, scratch, new_assembler=False):
    """Put what was carried to use.

    Args:
        scratch: a folder that outlives the runs; the world comes to `scratch/world`.

    Returns:
        environment variables that make Python and Triton find it; none where the folder is not there.

    Raises:
        ValueError: the new assembler is asked for and was not carried.
    """
    found = {}
    if wheels := sorted(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        done = subprocess.run([*command, "--target", scratch / "site", *wheels], capture_output=True, text=True)
        if done.returncode:
            print(f"without what {folder} carries: {done.stderr.strip()}", flush=True)
        found["PYTHONPATH"] = str(scratch / "site")
    if (folder / "world.tgz").exists():
        with tarfile.open(folder / "world.tgz") as packed:
            packed.extractall(scratch, filter="data")
    if new_assembler:
        if not (folder / "ptxas.xz").exists():
            raise ValueError(f"{folder} holds no assembler: make it with `python -m bench.gpu prepare --to {folder}`")
        tool = scratch / "ptxas"
        tool.write_bytes(lzma.decompress((folder / "ptxas.xz").read_bytes()))
        os.chmod(tool, 0o755)
        found["TRITON_PTXAS_PATH"] = str(tool)
    return found


def give_world(run, world):
    """Make a run folder whose world is another folder, if that is there; else the run makes its own."""
    from nanolmmr1.run.run_folder import claim

    claim(run)
    if world.exists():
        (run / "world").symlink_to(world)


def whole_world(world):
    """The desk recipe's world; its cold start takes about two minutes on two cores."""
    from nanolmmr1 import schema
    from nanolmmr1.desk import build
    from nanolmmr1.report.display import Display

    world.mkdir(parents=True)
    build(world, schema.Recipe().seed, Display({}))


def tiny_world(world, rows=4):
    """Files of the same names, of a few rows and a model that was taught nothing."""
    from PIL import Image

    from nanolmmr1.desk import cold_start
    from nanolmmr1.model import weights
    from nanolmmr1.model.qwen import Qwen25VL
    from nanolmmr1.parallel import export

    (world / "model").mkdir(parents=True)
    Image.new("RGB", (56, 28)).save(world / "two.png")
    asked = [{"problem": f"{i} + 1 = ?", "answer": str(i + 1), "steps": "", "images": []} for i in range(rows)]
    shown = [row | {"problem": "<image>" + row["problem"], "images": ["two.png"], "caption": "two"} for row in asked]
    made = {f"{kind}_{part}": own for kind, own in (("text", asked), ("image", shown)) for part in ("train", "test")}
    for name, own in made.items():
        (world / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    cold_start.write_settings(world / "model", made)
    export.save(Qwen25VL(weights.read_config(world / "model")), world / "model", world / "model")
