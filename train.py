"""Train a small vision-language model to reason, phase after phase.

    python train.py [RECIPE] [dotted.key=value ...]        one process, CPU or one GPU
    torchrun train.py [RECIPE] [dotted.key=value ...]      the same

RECIPE is a name under nanolmmr1/recipes/ or the path of a YAML file; default: desk, which needs no
GPU, no download and no data. Everything a run leaves is in its `output` folder: recipe.yaml,
metrics.jsonl, samples.jsonl, summary.json, report.html, checkpoints/, model/.

Exit status: 0 done; 2 something is wrong with recipe, data, model or reward (the message says what).

Next: nanolmmr1/trainer.py, the step.
"""

import errno
import json
import os
import sys
import time
from pathlib import Path

from nanolmmr1 import config
from nanolmmr1.config import UserError


def main(args):
    if {"-h", "--help"} & set(args):
        return print_help()
    is_override = [("=" in a and not a.endswith((".yaml", ".yml"))) for a in args]
    recipes = [a for a, override in zip(args, is_override, strict=True) if not override]
    if len(recipes) > 1 or any(r.startswith("-") for r in recipes):
        raise UserError(f"arguments are [RECIPE] [dotted.key=value ...]; got {' '.join(recipes)!r}")
    cfg = config.load(*recipes, overrides=[a for a, override in zip(args, is_override, strict=True) if override])
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: this version trains on one process; use --nproc_per_node=1"
        )
    from nanolmmr1 import checkpoint  # torch and its friends: not before the recipe is known to be good

    with checkpoint.locked(Path(cfg.output)):
        train(cfg)


def train(cfg):
    from nanolmmr1 import checkpoint, metrics, weights
    from nanolmmr1.prompt import Processor
    from nanolmmr1.report import write_report
    from nanolmmr1.reward import Judge

    run, began = Path(cfg.output), time.monotonic()
    recipe = config.dump(cfg)
    display = metrics.Display({name: phase.steps for name, phase in cfg.phases.items()})
    progress, latest = find_progress(cfg, run)
    if latest and is_finished(cfg, run, progress):
        return display.note(f"{run} is finished after {progress.step} steps; to train on, raise its last phase's steps")
    if cfg.world:
        build_world(cfg, run, display)
    folder = weights.find(cfg.model)
    weights.read_config(folder)  # the cheapest thing that can be wrong with a model
    processor = Processor(folder, cfg.prompt)

    with Judge(cfg.reward) as judge:
        rows, tasks = load_data(cfg, processor, judge, display)
        policy = load_policy(cfg, latest / "model" if latest else folder, processor)
        (run / "recipe.yaml").write_text(recipe, encoding="utf-8")
        trainer = make_trainer(cfg, run, policy, folder, processor, judge, display, progress)
        before = progress.wall_s

        def measure(moment):
            from nanolmmr1.evaluate import evaluate

            progress.accuracy[moment] = evaluate(
                tasks, trainer.sampler, processor, judge, cfg.evaluate.max_response_tokens, display
            )

        def save():
            progress.wall_s = before + time.monotonic() - began
            try:
                checkpoint.save(run, progress.step, policy, trainer.state(), folder, cfg.checkpoint.keep)
            except checkpoint.DiskError as error:
                display.note(f"no checkpoint at step {progress.step}, the last good one stays: {error}")

        with display:
            if tasks and "start" not in progress.accuracy:
                measure("start")
            for name, phase in cfg.phases.items():
                if progress.phase_done(name, cfg.phases):
                    continue
                trainer.start_phase(name, rows[name], load_reference(run, name, phase, policy, folder, progress))
                if latest and progress.phase_step:
                    checkpoint.load_optimizer(latest, policy)
                try:
                    while progress.phase_step < phase.steps:
                        trainer.step()
                        # Weights that have just given a NaN must not push a good checkpoint out.
                        due = cfg.checkpoint.every_steps and progress.step % cfg.checkpoint.every_steps == 0
                        if due and not progress.bad_steps:
                            save()
                    if tasks:
                        measure(name)
                except UserError:
                    if progress.step and not progress.bad_steps:
                        save()
                    raise
                progress.finished = name
                save()
                write_report(run)
            finish(cfg, run, progress, policy, folder, before + time.monotonic() - began)
        if tasks:
            metrics.print_accuracy(progress.accuracy)
        display.note(f"{progress.step} steps. Model: {run / 'model'}  Report: {run / 'report.html'}")


def find_progress(cfg, run):
    """Progress and folder of the newest checkpoint; a fresh Progress and None where there is none."""
    from nanolmmr1 import checkpoint
    from nanolmmr1.trainer import Progress

    latest = next(iter(checkpoint.listed(run)), None)
    if latest and cfg.resume == "never":
        raise UserError(
            f"output={run} holds a run already ({latest.name}): choose another output, or resume=auto to go on"
        )
    if not latest:
        return Progress(), None
    progress = checkpoint.read_state(latest, Progress)
    old = config.load(str(run / "recipe.yaml"))
    for key, was, now in (
        ("model", old.model, cfg.model),
        ("seed", old.seed, cfg.seed),
        ("phases", list(old.phases), list(cfg.phases)),
    ):
        if was != now:
            raise UserError(
                f"output={run} holds a run with {key}={was}, not {now}: choose another output, or give the same {key}"
            )
    return progress, latest


def is_finished(cfg, run, progress):
    """Whether nothing is left to do: all steps are taken, and `finish` came after them."""
    *_, (name, last) = cfg.phases.items()
    summary = run / "summary.json"
    return (
        progress.phase == name
        and progress.phase_step >= last.steps
        and summary.is_file()
        and json.loads(summary.read_text(encoding="utf-8"))["steps"] == progress.step
    )


def build_world(cfg, run, display):
    """Make the embedded world's model and data once, and point the recipe's `world:FILE` names at them."""
    from nanolmmr1 import checkpoint
    from nanolmmr1.desk import build

    world = run / "world"
    if not world.is_dir():
        checkpoint.write_folder(world, lambda folder: build(folder, cfg.seed, display))

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
    """Rows of each phase and held-out task, checked; says what was kept and what was dropped, and why."""
    from nanolmmr1.data import load_rows, select_rows

    judge_checked, loaded = False, {}

    def select(source, captions, max_tokens, where):
        nonlocal judge_checked
        key = json.dumps(source)
        if key not in loaded:
            loaded[key] = load_rows(source, cfg.prompt.columns)
        if not judge_checked:
            judge.check([row.public() for row in loaded[key]])
            judge_checked = True
        kept, dropped = select_rows(loaded[key], processor, captions, max_tokens, judge, where)
        lost = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
        display.note(f"{where}: {len(kept)} of {len(loaded[key])} rows; dropped: {lost}")
        return kept

    rows = {name: select(p.data, p.captions, p.max_prompt_tokens, f"phases.{name}") for name, p in cfg.phases.items()}
    tasks = {}
    for name, task in cfg.evaluate.tasks.items():
        captions = bool(task.get("captions", False))
        kept = select(task["data"], captions, cfg.evaluate.max_prompt_tokens, f"evaluate.{name}")
        tasks[name] = (kept[: cfg.evaluate.limit or None], captions)
    return rows, tasks


def load_policy(cfg, folder, processor):
    import torch

    from nanolmmr1 import weights
    from nanolmmr1.policy import Policy

    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU; use device=auto or cpu")
    dtype = {
        "auto": torch.bfloat16 if device == "cuda" else torch.float32,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
    }[cfg.dtype]
    return Policy(weights.load(folder, torch.float32, device), cfg, processor.banned_ids, dtype)


def make_sampler(cfg, policy, folder, processor):
    if cfg.rollout.engine == "local":
        from nanolmmr1.rollout.local import LocalSampler

        return LocalSampler(policy, cfg.rollout.max_sequences)
    if cfg.rollout.engine == "server":
        from nanolmmr1.rollout.server import ServerSampler

        return ServerSampler(policy, cfg, processor, folder)
    from nanolmmr1.rollout.vllm import VllmSampler

    return VllmSampler(policy, cfg, folder)


def make_trainer(cfg, run, policy, folder, processor, judge, display, progress):
    from nanolmmr1 import metrics
    from nanolmmr1.trainer import Trainer

    log, samples = metrics.MetricsLog(run), metrics.SampleLog(run)
    log.truncate(progress.metric_lines)
    samples.truncate(progress.step)
    return Trainer(
        cfg,
        policy,
        make_sampler(cfg, policy, folder, processor),
        processor=processor,
        judge=judge,
        metrics=log,
        samples=samples,
        display=display,
        progress=progress,
    )


def load_reference(run, name, phase, policy, folder, progress):
    """The frozen model that KL compares with, or None: the model as it was when this phase, or the run, began."""
    import copy

    from nanolmmr1 import checkpoint, weights

    if not phase.objective.kl_coef:
        return None
    if phase.reference == "start":
        return weights.load(folder, device=policy.device).requires_grad_(False)
    kept = run / "reference" / name
    if not progress.inside(name):
        checkpoint.write_folder(kept, lambda path: weights.save(policy.model, path, folder))
        return copy.deepcopy(policy.model).requires_grad_(False)
    if not kept.is_dir():
        raise UserError(f"{kept} is gone: the phase's KL reference cannot be rebuilt; start anew in another output")
    return weights.load(kept, device=policy.device).requires_grad_(False)


def finish(cfg, run, progress, policy, folder, wall_s):
    """Write what a run leaves behind: model/, summary.json, report.html."""
    from nanolmmr1 import checkpoint, metrics, weights
    from nanolmmr1.report import write_report

    checkpoint.write_folder(run / "model", lambda path: weights.save(policy.model, path, folder, policy.dtype))
    summary = {
        "accuracy": progress.accuracy,
        "wall_s": wall_s,
        "peak_rss_mb": metrics.peak_rss_mb(),
        "steps": progress.step,
    }
    metrics.write_atomically(run / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    write_report(run)


def print_help():
    print(__doc__)
    print("Keys, with defaults (a recipe's `defaults:` section sets any phase key for all its phases):\n")
    for key, default, text in config.known_keys():
        print(f"  {key}={json.dumps(default)}\n      {text}")
    print("\nRecipes:", ", ".join(sorted(p.stem for p in config.RECIPES.glob("*.yaml"))))


if __name__ == "__main__":
    # Idle OpenMP threads sleep. Spinning, they starve each other tenfold as soon as another program wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error: the disk is full ({error}): free some space and start again", file=sys.stderr)
        sys.exit(2)
