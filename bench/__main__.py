"""All benches: python -m bench [--json FILE] [--plot DIR] [--only NAME]"""

import sys

from bench import attention, linear_logprob, linear_loss, mrope, rmsnorm, rollout, swiglu
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
        print("\nrollout", flush=True)
        rollout.main()
    sys.exit(status)
