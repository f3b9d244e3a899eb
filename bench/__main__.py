"""All benches: python -m bench [--json FILE] [--plot DIR] [--only NAME]

On a GPU prefer one process per op, since a kernel that breaks the CUDA context takes its process with it:

    for op in linear_loss linear_logprob attention mrope rmsnorm swiglu rollout; do
        python -m bench.$op
    done
"""

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

if __name__ == "__main__":
    only = arguments(None).only
    status = 0 if only == ["rollout"] else main(OPS)
    if not only or only == ["rollout"]:
        from bench import rollout  # the only one that needs the trainer's packages

        print("\nrollout", flush=True)
        rollout.main()
    sys.exit(status)
