"""Command line of the benchmarks.

    python -m bench [OP ...] [--json FILE] [--plot DIR] [--only NAME]

On a GPU prefer one process per op, since a kernel that breaks the CUDA context ends its process:

    for op in linear_loss linear_logprob attention mrope rmsnorm swiglu rollout; do
        python -m bench.$op
    done

or all GPU measurements in one call: python -m bench.gpu.
"""

import itertools
import sys

from bench import attention, linear_logprob, linear_loss, mrope, rmsnorm, swiglu
from bench.harness import arguments, main

OPS = {
    "linear_loss": linear_loss.cases,
    "linear_logprob": linear_logprob.cases,
    "attention": attention.cases,
    "mrope": mrope.cases,
    "rmsnorm": rmsnorm.cases,
    "swiglu": swiglu.cases,
}


def run(argv):
    """Run the ops named at the beginning of `argv`, by default all; returns the exit status."""
    named = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    if unknown := [name for name in named if name not in (*OPS, "rollout")]:
        raise ValueError(f"no bench is named {', '.join(unknown)}: there are {', '.join((*OPS, 'rollout'))}")
    options = argv[len(named) :]
    only = arguments(options).only
    named = named or (["rollout"] if only == ["rollout"] else list(OPS) + ["rollout"] * (not only))
    ops = {name: OPS[name] for name in named if name != "rollout"}
    status = main(ops, options) if ops else 0
    if "rollout" in named:
        from bench import rollout  # imported here, since it needs the trainer's packages

        print("\nrollout", flush=True)
        rollout.main()
    return status


if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1:]))
    except ValueError as wrong:
        sys.exit(f"error: {wrong}")
