"""The head without gradient, log-prob and entropy: python -m bench.linear_logprob [--json FILE]"""

from functools import partial

import torch

from bench.harness import Case, main
from bench.linear_loss import SHAPES
from nanolmmr1.kernels import linear_logprob as kernel


def cases(device, dtype):
    for name, (tokens, hidden, vocab) in SHAPES[device].items():
        torch.manual_seed(0)
        x = torch.randn(tokens, hidden, device=device, dtype=dtype)
        w = torch.randn(vocab, hidden, device=device, dtype=dtype) * 2 / hidden**0.5
        y = torch.randint(vocab, (tokens,), device=device)
        run = partial(kernel.linear_logprob, x, w, y)
        providers = {"reference": partial(run, impl="reference"), "ours": partial(run, impl="chunked")}
        yield Case(name, 2 * tokens * hidden * vocab, providers)


if __name__ == "__main__":
    main({"linear_logprob": cases})
