"""Train a small vision-language model to reason, phase after phase.

    python train.py [RECIPE] [dotted.key=value ...]        one process, CPU or one GPU
    torchrun train.py [RECIPE] [dotted.key=value ...]      one process a GPU, on one host or several
    python train.py [RECIPE] [dotted.key=value ...] --plan   what it would take: memory, rows, steps; no GPU needed

RECIPE is a name under nanolmmr1/recipes/ or the path of a YAML file; default: desk, which needs no
GPU, no download and no data. Everything a run leaves is in its `output` folder: recipe.yaml,
metrics.jsonl, samples.jsonl, summary.json, report.html, checkpoints/, model/.

An `output` folder that holds anything but a run is refused.

Exit status: 0 done; 2 something is wrong with recipe, data, model or reward (the message says what); 143, 130 or 129
stopped by SIGTERM, Ctrl-C or SIGHUP, with a checkpoint of the last whole step (a second Ctrl-C ends the run at once).
torchrun's own is 1 where a rank's is not 0.

Next: nanolmmr1/trainer.py, the step.
"""

import contextlib
import errno
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from nanolmmr1 import config
from nanolmmr1.errors import UserError
from nanolmmr1.terminal import printable, protect


def main(args):
    if {"-h", "--help"} & set(args):
        return print_help()
    planning, args = "--plan" in args, [a for a in args if a != "--plan"]
    args = [a.removeprefix("--") if "=" in a else a for a in args]  # --key=value, as other trainers have it
    is_override = [("=" in a and not a.endswith((".yaml", ".yml"))) for a in args]
    recipes = [a for a, override in zip(args, is_override, strict=True) if not override]
    if len(recipes) > 1 or any(r.startswith("-") for r in recipes):
        raise UserError(f"arguments are [RECIPE] [dotted.key=value ...] [--plan]; got {' '.join(recipes)!r}")
    cfg = config.load(*recipes, overrides=[a for a, override in zip(args, is_override, strict=True) if override])
    from nanolmmr1.parallel import dist
    from nanolmmr1.run import run_folder, setup  # torch and its friends: not before the recipe is known to be good

    if planning:
        from nanolmmr1.run import plan

        return plan.show(cfg)
    device = setup.choose_device(cfg)
    setup.check_machine(cfg, device)
    run_folder.check_sources(cfg)
    dist.start(device, cfg.dist.timeout_s, cfg.dist.offload or cfg.dist.offload_reference)
    with run_folder.locked(Path(cfg.output)):
        train(cfg, device)


def train(cfg, device):
    from nanolmmr1 import errors
    from nanolmmr1.data.prompt import Processor
    from nanolmmr1.errors import Preempted
    from nanolmmr1.model import weights
    from nanolmmr1.parallel import dist
    from nanolmmr1.parallel.signals import Watch, status_of
    from nanolmmr1.report import display
    from nanolmmr1.report.page import try_report
    from nanolmmr1.reward.judge import Judge
    from nanolmmr1.run import plan, run_folder, setup
    from nanolmmr1.run.checkpoint import Checkpoints

    run, began = Path(cfg.output), time.monotonic()
    recipe = config.dump(cfg)
    display = display.Display({name: phase.steps for name, phase in cfg.phases.items()}, quiet=not dist.is_main())

    with Judge(cfg.reward) as judge, Watch(run, cfg.dist.hang_s, cfg.dist.timeout_s) as watch:
        watch.begun = False  # nothing to save yet: a signal ends the process
        checkpoints = Checkpoints(run, cfg.checkpoint, display.note, cfg.dist.timeout_s)
        progress, latest, rows_then = run_folder.find_progress(cfg, run, checkpoints, display.note)
        if latest and run_folder.is_finished(cfg, run, progress):
            display.note(f"{run} is finished after {progress.step} steps; to train on, raise its last phase's steps")
            return
        if cfg.world:
            setup.build_world(cfg, run, display)
        with watch.stage("load_data"):
            dist.together(lambda: dist.is_host_main() and weights.find(cfg.model))  # a download, once a host
            folder = dist.together(lambda: weights.find(cfg.model))
            dist.together(lambda: weights.read_config(folder))  # the cheapest thing that can be wrong with a model
            processor = Processor(folder, cfg.prompt)
            rows, tasks, sizes, hashes = setup.load_data(cfg, processor, judge, display)
        run_folder.check_rows(rows_then, hashes, cfg, progress, display.note)
        checkpoints.about = {"recipe": recipe, "rows": hashes}
        planned = dist.on_main(lambda: plan.forecast(cfg, folder, sizes))
        dist.together(lambda: plan.check(planned, device, display.note))
        policy = setup.load_policy(cfg, folder, device, processor, empty=bool(latest))
        if latest:
            checkpoints.load(latest, policy, optimizer=False)
        dist.together(lambda: [policy.trainable_names(phase.freeze) for phase in cfg.phases.values()])
        if dist.is_main():
            run_folder.write_recipe(run, recipe, progress.step, display.note)
        judge.workers.between = watch.check
        trainer = setup.make_trainer(cfg, run, policy, folder, processor, judge, display, progress, watch)
        before = progress.wall_s

        def measure(moment):
            from nanolmmr1.run.evaluate import evaluate

            with watch.stage("evaluate", progress.step):
                progress.accuracy[moment] = evaluate(
                    tasks, trainer.sampler, processor, judge, cfg.evaluate.max_response_tokens, display, trainer.check
                )

        def save(score=None):
            progress.wall_s = before + time.monotonic() - began
            with watch.stage("save_checkpoint", progress.step):
                checkpoints.save(progress.step, policy, trainer.state(), score)
            trainer.saved_s += checkpoints.held_s

        def look(name, phase):
            moment = f"{name} {progress.phase_step}"
            if tasks and is_due(cfg.evaluate.every_steps, progress, phase) and moment not in progress.accuracy:
                measure(moment)
                return True

        def walk():
            if tasks and not progress.step and "start" not in progress.accuracy:
                measure("start")
            for name, phase in cfg.phases.items():
                if progress.phase_done(name, cfg.phases):
                    continue
                reference = setup.load_reference(cfg, run, name, policy, folder, progress, display.note)
                trainer.start_phase(name, rows[name], reference)
                if latest and progress.phase_step:
                    checkpoints.load(latest, policy, model=False)
                    if look(name, phase):  # an evaluation that SIGTERM cut short; its step has a checkpoint
                        save(score_of(progress, f"{name} {progress.phase_step}"))
                while progress.phase_step < phase.steps:
                    trainer.step()
                    look(name, phase)
                    due = is_due(cfg.checkpoint.every_steps, progress, phase)
                    if (due or checkpoints.is_old()) and progress.phase_step < phase.steps and trainer.last_update_finite:
                        save(score_of(progress, f"{name} {progress.phase_step}"))
                if tasks:
                    measure(name)
                progress.finished = name
                save(score_of(progress, name))
                if dist.is_main():
                    try_report(run, display.note)
            checkpoints.wait()
            finish(cfg, run, progress, policy, folder, before + time.monotonic() - began, display.note)

        with display, contextlib.closing(trainer.sampler):
            try:
                watch.begun = True
                walk()
                pool = trainer.sampler.pool_bytes
            except (UserError, Preempted) as stop:
                # A rank that has come to this alone says so, and torchrun ends the others.
                together = dist.size() == 1 or isinstance(stop, (errors.SharedError, Preempted))
                if together and progress.step and trainer.last_update_finite:
                    save()
                checkpoints.wait()  # for what is being written, in any case
                if isinstance(stop, UserError):
                    raise
                number = signal.Signals(watch.stopping or signal.SIGTERM)  # without one: another rank had it
                display.note(
                    f"stopped by {number.name} after step {progress.step}: start the same command again to go on"
                )
                sys.exit(status_of(number))
        if tasks and dist.is_main():
            display.print_accuracy(progress.accuracy)
        if dist.is_main():
            display.note(plan.compare(planned, device, pool))
        display.note(f"{progress.step} steps. Model: {run / 'model'}  Report: {run / 'report.html'}")


def is_due(every, progress, phase):
    """Whether a phase has come to such a step; not at its end, where all that is due is done anyway."""
    return every and progress.phase_step % every == 0 and 0 < progress.phase_step < phase.steps


def score_of(progress, moment):
    """Mean held-out accuracy at a moment, or None where nothing was measured."""
    accuracy = progress.accuracy.get(moment)
    return sum(accuracy.values()) / len(accuracy) if accuracy else None


def finish(cfg, run, progress, policy, folder, wall_s, note):
    """Write what a run leaves behind: model/, summary.json, report.html."""
    from nanolmmr1 import files
    from nanolmmr1.parallel import dist, export
    from nanolmmr1.report import usage
    from nanolmmr1.report.page import try_report
    from nanolmmr1.run import checkpoint

    checkpoint.write_folder(run / "model", lambda path: export.save(policy.model, path, folder, policy.dtype))
    if not dist.is_main():
        return
    summary = {
        "accuracy": progress.accuracy,
        "wall_s": wall_s,
        "peak_rss_mb": usage.peak_rss_mb(),
        "steps": progress.step,
    }
    try:
        files.write_atomically(run / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    except OSError as error:
        note(f"{run / 'summary.json'} cannot be written ({error}); started again, the run tries once more")
    try_report(run, note)


def print_help():
    print(__doc__)
    print("Keys, with defaults (a recipe's `defaults:` section sets any phase key for all its phases):\n")
    for key, default, text in config.known_keys():
        print(f"  {key}={json.dumps(default)}\n      {text}")
    print("\nRecipes:", ", ".join(sorted(p.stem for p in config.RECIPES.glob("*.yaml"))))


def run(args):
    """The exit status; what is wrong is told on stderr."""
    rank = os.environ.get("RANK", "0")
    try:
        main(args)
    except UserError as error:
        # What all ranks have, rank 0 tells; what one has alone, that one; what came before they met, one a host.
        if rank == "0" or is_own(error):
            text = f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}"
            print(printable(text), file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error: the disk is full ({error}): free some space and start again", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:  # see Watch; without a number it is Ctrl-C before there was one
        from nanolmmr1.parallel.signals import status_of

        number = signal.Signals(*stop.args or (signal.SIGINT,))
        if rank == "0":
            print(f"stopped by {number.name} before the first step", file=sys.stderr)
        return status_of(number)
    except SystemExit as end:
        return end.code
    return 0


def is_own(error):
    """Whether rank 0 does not tell of this error."""
    from nanolmmr1 import errors
    from nanolmmr1.parallel import dist

    return not isinstance(error, errors.SharedError) and (dist.launch is not None or dist.is_host_main())


if __name__ == "__main__":
    # Idle OpenMP threads sleep. Spinning, they starve each other tenfold as soon as another program wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    protect()
    if "RANK" not in os.environ:
        sys.exit(run(sys.argv[1:]))
    try:
        status = run(sys.argv[1:])
    except Exception:  # as the interpreter would, which dist.leave bypasses
        traceback.print_exc()
        status = 1
    from nanolmmr1.parallel import dist

    dist.leave(status)
