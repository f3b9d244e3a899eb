"""The head in training, loss and both gradients: python -m bench.linear_loss [--json FILE]"""

from functools import partial

import torch

from bench.harness import Case, main
from nanolmmr1.kernels import linear_loss as kernel

# name -> tokens, hidden size, vocabulary, of Qwen2.5-VL-3B; a CPU gets an eighth of one or the other size.
SHAPES = {
    "cpu": {"3B, V / 8, N 256": (256, 2048, 18_992), "3B, H / 8, N 256": (256, 256, 151_936)},
    "cuda": {f"3B, N {n:,}": (n, 2048, 151_936) for n in (1024, 4096, 16_384)},
}


def objective(logp, entropy, rows):
    """A ratio of 1 and an entropy bonus, as in training."""
    return -(logp - logp.detach()).exp() - 0.01 * entropy


def cases(device, dtype):
    for name, (tokens, hidden, vocab) in SHAPES[device].items():
        torch.manual_seed(0)
        x = torch.randn(tokens, hidden, device=device, dtype=dtype, requires_grad=True)
        w = (torch.randn(vocab, hidden, device=device, dtype=dtype) * 2 / hidden**0.5).requires_grad_()
        y = torch.randint(vocab, (tokens,), device=device)

        def run(impl, x=x, w=w, y=y):
            loss, logp, entropy = kernel.linear_loss(x, w, y, objective, impl=impl)
            return loss.detach(), logp, entropy, *torch.autograd.grad(loss, (x, w))

        providers = {"reference": partial(run, "reference"), "ours": partial(run, "chunked")}
        yield Case(name, 6 * tokens * hidden * vocab, providers)


if __name__ == "__main__":
    main({"linear_loss": cases})
