"""Train a small vision-language model to reason, phase after phase.

    python train.py [RECIPE] [dotted.key=value ...]        one process, CPU or one GPU
    torchrun train.py [RECIPE] [dotted.key=value ...]      one process per GPU, on one host or several
    python train.py [RECIPE] [dotted.key=value ...] --plan   print the memory, rows and steps it would need; no GPU

RECIPE is a name under nanolmmr1/recipes/ or the path of a YAML file. The default, desk, generates a tiny model and its
data on the spot: no GPU and no download. A run writes everything to its `output` folder: recipe.yaml, metrics.jsonl,
samples.jsonl, summary.json, report.html, checkpoints/, model/. The same command resumes it. An `output` folder with
other files is refused.

Exit status: 0 done; 2 the run cannot start or go on (the message says why, and how to fix it); 143, 130 or 129 stopped
by SIGTERM, Ctrl-C or SIGHUP after saving the last whole step (a second Ctrl-C ends the run at once). torchrun itself
exits with 1 if a rank fails.

Next: nanolmmr1/run/loop.py, the whole run.
"""

import json
import os
import signal
import sys
import traceback

from nanolmmr1 import config
from nanolmmr1.errors import DISK_FULL, Preempted, SharedError, UserError
from nanolmmr1.terminal import printable, protect


def main(args: list[str]) -> None:
    """Parse arguments, load the recipe, then train it, plan it, or print the help."""
    if {"-h", "--help"} & set(args):
        return print_help()
    planning, args = "--plan" in args, [a for a in args if a != "--plan"]
    args = [a.removeprefix("--") if "=" in a else a for a in args]  # other trainers write --key=value
    overrides = [a for a in args if "=" in a and not a.endswith((".yaml", ".yml"))]
    recipes = [a for a in args if a not in overrides]
    if len(recipes) > 1 or any(r.startswith("-") for r in recipes):
        raise UserError(f"arguments are [RECIPE] [dotted.key=value ...] [--plan]; got {' '.join(recipes)!r}")
    cfg = config.load(recipes[0] if recipes else "desk", overrides)
    from nanolmmr1.run import loop, plan  # torch takes seconds to import: a wrong recipe fails before that

    if planning:
        plan.show(cfg)
    else:
        loop.train(cfg)


def print_help() -> None:
    print(__doc__)
    print("Keys, with defaults (a recipe's `defaults:` section sets any phase key for all its phases):\n")
    for key, default, text in config.known_keys():
        print(f"  {key}={json.dumps(default)}\n      {text}")
    print("\nRecipes:\n")
    for name, text in config.recipes():
        print(f"  {name:<32}{text}")


def exit_status(args: list[str]) -> int:
    """Run `main`; turn its exceptions into one message on stderr and an exit status."""
    rank = os.environ.get("RANK", "0")
    try:
        main(args)
    except UserError as error:
        # Print an error once: if all ranks have it, on rank 0; otherwise on the rank that has it. Before the process
        # group exists nobody knows, and the first rank of every host prints.
        if rank == "0" or is_own(error):
            print(printable(f"error{'' if rank == '0' else f' on rank {rank}'}: {error}"), file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        print(f"error: the disk is full ({error}): free some space and start again", file=sys.stderr)
        return 2
    except Preempted as stop:
        return stop.exit_status
    except KeyboardInterrupt as interrupt:  # before the first step, see signals.Watch
        early = Preempted(signal.Signals(*interrupt.args or (signal.SIGINT,)))  # Python's own has no number
        if rank == "0":
            print(f"stopped by {early.signal.name} before the first step", file=sys.stderr)
        return early.exit_status
    return 0


def is_own(error: UserError) -> bool:
    """Whether this rank must print an error that rank 0 does not have."""
    from nanolmmr1.parallel import dist

    return not isinstance(error, SharedError) and (dist.launch is not None or dist.is_host_main())


if __name__ == "__main__":
    # Idle OpenMP threads sleep. If they spin, any competing process makes them about ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    protect()
    if "RANK" not in os.environ:
        sys.exit(exit_status(sys.argv[1:]))
    try:
        status = exit_status(sys.argv[1:])
    except Exception:  # print it as the interpreter would: dist.leave bypasses it
        traceback.print_exc()
        status = 1
    from nanolmmr1.parallel import dist

    dist.leave(status)
