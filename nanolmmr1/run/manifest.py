"""The manifest of a checkpoint: written with every rank's shards, verified before they are read.

manifest.json:

    format, step, ranks    of the run that wrote it
    recipe, rows           resolved recipe as YAML; phase -> hash of its rows
    score                  mean held-out accuracy, or null
    tensors                name -> [dtype, shape], which a policy must match
    files                  name -> [bytes, sha256]
    sha256                 of everything above

Next: run_folder.py, ownership of the output folder.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from nanolmmr1.files import sync
from nanolmmr1.parallel import dist

FORMAT = 2
FILE_BYTES = 256 << 20  # size of a shard file; safetensors holds two copies of a file in memory while writing


class Writer(dcp.HuggingFaceStorageWriter):
    """Writes the files for dcp.save, which raises an error of one rank on all ranks."""

    def __init__(
        self, folder: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any], state: dict[str, Any]
    ) -> None:
        files: dict[str, int] = {}
        size = 0.0
        for name, tensor in tensors.items():
            size += tensor.nbytes / dist.size()
            files[name] = 1 + int(size / FILE_BYTES)
        super().__init__(str(temporary_name(folder) / "tensors"), fqn_to_index_mapping=files, save_distributed=True)
        self.folder, self.about, self.state = folder, about, state

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        """On each rank: write its shards. Returns one WriteResult per file: name, bytes, hash."""
        written = super().write_data(plan, planner).wait()
        names = sorted({result.storage_data.relative_path for result in written})
        sealed = [seal(temporary_name(self.folder) / "tensors" / name) for name in names]
        future: Future[list[WriteResult]] = Future()
        future.set_result(
            [WriteResult(MetadataIndex(f"tensors/{name}"), *facts) for name, facts in zip(names, sealed, strict=True)]
        )
        return future

    def finish(self, metadata: Any, results: list[list[WriteResult]]) -> None:
        """On the main rank, after all ranks have written: write state and manifest, fsync, rename."""
        temporary = temporary_name(self.folder)
        (temporary / "state.json").write_text(json.dumps(self.state, indent=2) + "\n", encoding="utf-8")
        files = {"state.json": seal(temporary / "state.json")}
        for result in (result for of_rank in results for result in of_rank):
            files[result.index.fqn] = (result.size_in_bytes, result.storage_data)
        write(temporary, {"format": FORMAT} | self.about | {"files": files})
        sync(temporary / "tensors")
        os.replace(temporary, self.folder)
        sync(self.folder.parent)
        sync(self.folder.parent.parent)


def table(tensors: dict[str, torch.Tensor]) -> dict[str, list[Any]]:
    """Name -> [dtype, shape]."""
    return {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        digest = manifest.pop("sha256")
    except FileNotFoundError:
        raise ValueError("manifest.json is missing") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"manifest.json cannot be read ({error})") from error
    if digest != _digest(manifest):
        raise ValueError("manifest.json does not hold what was written: its hash differs")
    return manifest


def write(folder: Path, manifest: dict[str, Any]) -> None:
    """Write and fsync manifest.json, with a hash of itself."""
    text = json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    sync(folder / "manifest.json")
    sync(folder)


def damage(folder: Path, files: Iterable[tuple[str, tuple[int, str]]]) -> str:
    """How a folder's files differ from their (bytes, hash); "" if they do not."""
    for name, (size, digest) in files:
        try:
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes and was written with {size}"
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} does not hold what was written: its hash differs"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return ""


def seal(path: Path) -> tuple[int, str]:
    """Fsync a file; returns its size and sha256. Reading it is cheap: it is still in the page cache."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, digest


def temporary_name(folder: Path) -> Path:
    """The name of a folder until it is complete."""
    return folder.with_name(folder.name + ".tmp")


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
