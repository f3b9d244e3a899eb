"""Everything that must be there before the first step: lock, progress, world, rows, policy, sampler, reference.

Next: trainer.py, the step.
"""

import contextlib
import fcntl
import gc
import hashlib
import json
import time

import torch

from nanolmmr1 import checkpoint, config, dist, manifest, metrics, shard, weights
from nanolmmr1.config import UserError
from nanolmmr1.data import load_rows, select_rows
from nanolmmr1.policy import Policy
from nanolmmr1.trainer import Progress, Trainer

LOCK_WAIT_S = 60.0  # for the lock of a run that was killed a moment ago


def choose_device(cfg):
    """"cpu" or "cuda".

    Raises:
        UserError: the recipe wants a GPU, and there is none.
    """
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU; use device=auto or cpu")
    return device


@contextlib.contextmanager
def locked(run):
    """Hold the run folder, so that two runs never write one: the main rank does it for all.

    Ranks that torchrun may have started anew wait for what is left of their forerunners.

    Raises:
        UserError: another run holds it, or it cannot be written.
    """
    with contextlib.ExitStack() as held:
        dist.on_main(lambda: held.enter_context(_lock(run)))
        yield


@contextlib.contextmanager
def _lock(run):
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = open(run / ".lock", "w")
    except OSError as error:
        raise UserError(f"output={run} cannot be written: {error}") from error
    deadline = time.monotonic() + (LOCK_WAIT_S if dist.launched() else 0)
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise UserError(
                        f"output={run}: another process is writing this run; wait for it or choose another output"
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                raise UserError(f"output={run}: its disk knows no locks ({error}); choose another output") from error
        yield


def find_progress(cfg, run, checkpoints):
    """Progress and folder of the newest whole checkpoint; a fresh Progress and None where there is none.

    Raises:
        UserError: the folder holds another run, or one that is not to be resumed.
    """
    progress, latest = checkpoints.newest(Progress)
    mark = run / ".attempt"  # what began this run; torchrun's ranks, started anew, may go on even with resume=never
    ours = dist.on_main(lambda: mark.is_file() and bool(dist.launch) and mark.read_text() == dist.launch)
    if latest and cfg.resume == "never" and not ours:
        raise dist.SharedError(
            f"output={run} holds a run already ({latest.name}): choose another output, or resume=auto to go on"
        )
    if not latest:
        dist.on_main(lambda: mark.write_text(dist.launch or "") and None)
        return Progress(), None
    old = config.load(str(run / "recipe.yaml"))
    for key, was, now in (
        ("model", old.model, cfg.model),
        ("seed", old.seed, cfg.seed),
        ("phases", list(old.phases), list(cfg.phases)),
    ):
        if was != now:
            raise dist.SharedError(
                f"output={run} holds a run with {key}={was}, not {now}: choose another output, or give the same {key}"
            )
    return progress, latest


def is_finished(cfg, run, progress):
    """Whether nothing is left to do: all steps are taken, and `finish` came after them."""
    *_, (name, last) = cfg.phases.items()
    summary = run / "summary.json"
    return dist.on_main(
        lambda: progress.phase == name
        and progress.phase_step >= last.steps
        and summary.is_file()
        and json.loads(summary.read_text(encoding="utf-8"))["steps"] == progress.step
    )


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
        phase -> rows, task -> (rows, whether captions are shown), phase -> [(tokens, image patches)] of its rows
    """
    judge_checked, loaded = False, {}

    def select(source, captions, max_tokens, where):
        nonlocal judge_checked
        key = json.dumps(source)
        if key not in loaded:
            loaded[key] = dist.together(lambda: load_rows(source, cfg.prompt.columns))
            text = "\n".join(f"{row.problem}\t{row.answer}\t{row.caption}" for row in loaded[key])
            if len(set(dist.gather(hashlib.sha256(text.encode()).digest()))) > 1:
                raise dist.SharedError(f"{source}: the ranks read different rows; give all hosts the same files")
        rows = loaded[key]

        def choose():
            # By one rank for all: a judge has a deadline, so two might not choose alike.
            nonlocal judge_checked
            if not judge_checked:
                judge.check([row.public() for row in rows])
                judge_checked = True
            kept, dropped = select_rows(rows, processor, captions, max_tokens, judge, where)
            number = {id(row): i for i, row in enumerate(rows)}
            return [number[id(row)] for row, _ in kept], [size for _, size in kept], dropped

        kept, sizes, dropped = dist.on_main(choose)
        lost = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
        display.note(f"{where}: {len(kept)} of {len(rows)} rows; dropped: {lost}")
        return [rows[i] for i in kept], sizes

    rows, sizes, tasks = {}, {}, {}
    for name, phase in cfg.phases.items():
        rows[name], sizes[name] = select(phase.data, phase.captions, phase.max_prompt_tokens, f"phases.{name}")
    for name, task in cfg.evaluate.tasks.items():
        captions = bool(task.get("captions", False))
        kept, _ = select(task["data"], captions, cfg.evaluate.max_prompt_tokens, f"evaluate.{name}")
        tasks[name] = (kept[: cfg.evaluate.limit or None], captions)
    return rows, tasks, sizes


def load_model(cfg, folder, device, offload=False, empty=False):
    """The model of a folder as the recipe wants it: whole, or sharded where there is a process group.

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
        return shard.load_sharded(folder, cfg.dist, device, dtype, master, offload, empty), dtype
    return weights.load(folder, master, device, empty), dtype


def load_policy(cfg, folder, device, processor, empty=False):
    model, dtype = load_model(cfg, folder, device, cfg.dist.offload, empty)
    return Policy(model, cfg, processor.banned_ids, dtype, device)


def load_reference(cfg, run, name, policy, folder, progress):
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
        checkpoint.write_folder(kept, lambda path: weights.save(policy.model, path, folder, master))
        dist.on_main(lambda: _seal(kept, seals))
    elif wrong := dist.on_main(lambda: _damage(kept, seals)):
        raise dist.SharedError(f"{kept}: {wrong}; a KL reference cannot be rebuilt, so choose another output")
    offload = cfg.dist.offload or cfg.dist.offload_reference
    return load_model(cfg, kept, policy.device.type, offload)[0].requires_grad_(False)


def _seal(folder, seals):
    """Note what a folder holds."""
    told = {path.name: manifest.seal(path) for path in folder.iterdir()}
    metrics.write_atomically(seals, json.dumps(told).encode())


def _damage(folder, seals):
    """What is wrong with a folder that was sealed; nothing: empty."""
    if not seals.is_file():
        return f"{seals.name} is missing"
    return manifest.damage(folder, json.loads(seals.read_text(encoding="utf-8")).items())


def make_sampler(cfg, policy, folder, processor):
    if cfg.rollout.engine == "local":
        from nanolmmr1.rollout.local import LocalSampler

        return LocalSampler(policy, cfg.rollout.max_sequences)
    if cfg.rollout.engine == "server":
        from nanolmmr1.rollout.server import ServerSampler

        return ServerSampler(policy, cfg, processor, folder)
    from nanolmmr1.rollout.vllm import VllmSampler

    return VllmSampler(policy, cfg, folder)


def make_trainer(cfg, run, policy, folder, processor, judge, display, progress, watch):
    log = samples = None
    if dist.is_main():
        log, samples = metrics.MetricsLog(run), metrics.SampleLog(run)
        log.truncate(progress.metric_lines)
        samples.truncate(progress.step)
    sampler = make_sampler(cfg, policy, folder, processor)
    return Trainer(cfg, policy, sampler, judge, processor, log, samples, display, progress, watch)
