"""All benches: python -m bench [--json FILE]"""

from bench import attention, linear_logprob, linear_loss, rollout
from bench.harness import main

if __name__ == "__main__":
    rollout.main()
    main({"attention": attention.cases, "linear_logprob": linear_logprob.cases, "linear_loss": linear_loss.cases})
