"""Offline dependencies for a GPU host without network, in one folder.

    python -m bench.gpu prepare [--to .gpu]

The folder has wheels, the desk recipe's data and cold-started model, and a newer ptxas for Triton: the one in the
wheels of torch 2.11 (up to 12.9, and 13.0) can corrupt products whose left operand is in registers on Hopper.
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
OTHERS = "liger-kernel==0.8.5", "cut-cross-entropy==25.1.1"  # libraries compared with our kernels
ASSEMBLER = "nvidia-cuda-nvcc==13.5.37"
LARGEST = 64e6  # bytes


def prepare(folder):
    """Fill the folder with the files that are missing. git ignores it.

    Returns:
        its size in bytes.

    Raises:
        ValueError: a wheel cannot be downloaded, or the folder is too large.
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
    """Install the contents of the folder.

    Args:
        scratch: a folder that outlives the runs; the world is extracted to `scratch/world`.

    Returns:
        environment variables for Python and Triton; empty if there is no folder.

    Raises:
        ValueError: the new assembler is requested and is not in the folder.
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
    """Create a run folder with a link to an existing world; without one, the run builds it."""
    from nanolmmr1.run.run_folder import claim

    claim(run)
    if world.exists():
        (run / "world").symlink_to(world)


def whole_world(world):
    """Build the desk recipe's world; the cold start takes about two minutes on two cores."""
    from nanolmmr1 import schema
    from nanolmmr1.desk.world import build
    from nanolmmr1.report.display import Display

    world.mkdir(parents=True)
    build(world, schema.Recipe().seed, Display({}))


def tiny_world(world, rows=4):
    """Build files of the same names with a few rows and an untrained model."""
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
