"""The files of a checkpoint: how each rank writes its shards, and whether they still are what was written.

manifest.json:

    format, step, ranks    of the writing run
    recipe, rows           its resolved recipe as YAML; phase -> hash of its rows
    score                  what it evaluated to, or null
    tensors                name -> [dtype, shape]: what a policy must have in common with it
    files                  name -> [bytes, sha256]
    sha256                 of all the above
"""

import hashlib
import json
import os

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from nanolmmr1.files import sync
from nanolmmr1.parallel import dist

FORMAT = 2
FILE_BYTES = 256 << 20  # of a rank's shards; two copies of a file are in memory while safetensors writes it


class Writer(dcp.HuggingFaceStorageWriter):
    """What dcp.save does on the disk. An error of any rank in here is raised on all ranks, by dcp.save."""

    def __init__(self, folder, tensors, about, state):
        files, size = {}, 0
        for name, tensor in tensors.items():
            size += tensor.nbytes / dist.size()
            files[name] = 1 + int(size / FILE_BYTES)
        super().__init__(str(temporary_name(folder) / "tensors"), fqn_to_index_mapping=files, save_distributed=True)
        self.folder, self.about, self.state = folder, about, state

    def write_data(self, plan, planner):
        """On each rank: write its shards. Returns one WriteResult a file: name, bytes, hash."""
        written = super().write_data(plan, planner).wait()
        names = sorted({result.storage_data.relative_path for result in written})
        sealed = [seal(temporary_name(self.folder) / "tensors" / name) for name in names]
        future = Future()
        future.set_result(
            [WriteResult(MetadataIndex(f"tensors/{name}"), *facts) for name, facts in zip(names, sealed, strict=True)]
        )
        return future

    def finish(self, metadata, results):
        """On the main rank, when all have written."""
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


def table(tensors):
    """Name -> [dtype, shape]: what a checkpoint must have in common with the policy that it is read into."""
    return {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}


def read(folder):
    """The manifest of a checkpoint.

    Raises:
        ValueError: it is missing, or not what was written.
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


def write(folder, manifest):
    """Write manifest.json, with a hash of itself, and wait until it is on the disk."""
    text = json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    sync(folder / "manifest.json")
    sync(folder)


def damage(folder, files):
    """What is wrong with [(name, (bytes, hash))] of a folder; nothing: empty."""
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


def seal(path):
    """(bytes, hash) of a file that is then on the disk. The page cache has it still."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, digest


def temporary_name(folder):
    """What a folder is called until it is whole."""
    return folder.with_name(folder.name + ".tmp")


def _digest(manifest):
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
