"""Benchmark of the head without gradient.

    python -m bench.linear_logprob [--json FILE] [--plot DIR] [--only NAME]

Two functions: log-prob and entropy, as in a training step, and the log-prob alone, for libraries without entropy.
Ours compute the entropy in both. Gold is our chunked path in wider arithmetic, as in linear_loss.py.

Next: attention.py.
"""

import sys
from functools import partial

import torch

from bench import providers
from bench.harness import Case, Provider, main
from bench.linear_loss import GOLD, SHAPES, head
from bench.modes import wider
from nanolmmr1.kernels import linear_logprob as kernel


def whole_logprob(x, w, y):
    return (x @ w.T).float().log_softmax(-1).gather(1, y[:, None]).squeeze(1)


def whole_logprob_and_entropy(x, w, y):
    logps = (x @ w.T).float().log_softmax(-1)  # (N, V)
    return logps.gather(1, y[:, None]).squeeze(1), -(logps.exp() * logps).sum(-1)


def minus(loss, x, w, y):
    return -loss(x, w, y, reduction="none").float()


def cases(device, dtype, shapes=SHAPES):
    for name, *sizes in shapes[device]:
        x, w, y = (tensor.detach() for tensor in head(*sizes, device, dtype))
        for entropy in (True, False):
            yield case(name, x, w, y, entropy)


def case(name, x, w, y, entropy):
    device, (count, hidden), vocab = x.device.type, x.shape, len(w)

    def offer(function, refused="", **about):
        def run():
            with torch.no_grad():
                outputs = function(x, w, y)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        return Provider(run, refused=refused, compare=lambda outputs: outputs[: 1 + entropy], **about)

    eager = whole_logprob_and_entropy if entropy else whole_logprob
    # fp32 log-probs, and either the logits in two dtypes, or p and p log p
    found = {"eager": offer(eager, needs=(12.0 if entropy else 10.0) * count * vocab)}
    found["torch.compile"] = (
        offer(providers.compiled(eager)) if device == "cuda" else Provider(refused=providers.COMPILED))
    if entropy:
        liger = providers.lacking("liger_kernel", device)
        found["Liger"] = offer(
            providers.liger_logprob, liger or providers.lacking_cute(torch.cuda.get_device_capability()))
    else:
        found["F.linear_cross_entropy"] = offer(
            partial(minus, providers.torch_cross_entropy), providers.lacking_torch_cross_entropy())
        found["cut-cross-entropy"] = offer(
            partial(minus, providers.cut_cross_entropy), providers.lacking("cut_cross_entropy", device))
    found["chunked"] = offer(partial(kernel.linear_logprob, impl="chunked"), ours=True)
    found["triton"] = offer(
        partial(kernel.linear_logprob, impl="triton"), "" if device == "cuda" else providers.INTERPRETED, ours=True)

    def gold():
        return kernel.linear_logprob(wider(x), wider(w), y, **GOLD)[: 1 + entropy]

    what = "log-prob and entropy" if entropy else "log-prob"
    nbytes = (count + vocab) * hidden * x.element_size()
    family = f"{what}, V {vocab:,}, H {hidden:,}"
    return Case(f"{what}, {name}", gold, found, 2.0 * count * hidden * vocab, nbytes, family, count, x.dtype)


if __name__ == "__main__":
    sys.exit(main({"linear_logprob": cases}))
