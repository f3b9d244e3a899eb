"""Benchmark of the head in training, loss and both gradients.

    python -m bench.linear_loss [--json FILE] [--plot DIR] [--only NAME]

Two functions: cross entropy, the mean over tokens, which every fused head computes; and the training objective, DAPO's
clipped surrogate, token mean, with log-probs of an older policy. Gold is our chunked path in wider arithmetic, since
whole logits in fp32 would not fit into memory; tests/test_bench.py compares it with whole logits at small sizes.

cut-cross-entropy skips gradient tiles in which all probabilities are tiny. Random logits are the worst case of this
filter: nearly every tile has a larger one. A trained model has more peaked logits, so it can skip more.

Next: linear_logprob.py, the head without gradient.
"""

import math
import sys
from functools import partial

import torch
import torch.nn.functional as F

from bench import providers
from bench.harness import Case, Provider, main
from bench.modes import wider
from nanolmmr1.kernels import linear_logprob, linear_loss
from nanolmmr1.schema import Objective
from nanolmmr1.update.objective import Tokens, policy_loss
from nanolmmr1.update.policy import fused_objective

# (name, tokens, hidden size, vocabulary) of Qwen2.5-VL-3B; a CPU gets an eighth of either size.
SHAPES = {
    "cpu": [("3B, V / 8, N 64", 64, 2048, 18_992), ("3B, H / 8, N 64", 64, 256, 151_936)],
    "cuda": [(f"3B, N {n:,}", n, 2048, 151_936) for n in (1024, 4096, 16_384, 65_536)],
}
RESPONSE = {"cpu": 16, "cuda": 512}  # tokens
CLIP = 0.2, 0.28
GOLD = {"impl": "chunked"}  # of inputs in wider arithmetic
COMMON = dict(clip_ratio_low=CLIP[0], clip_ratio_high=CLIP[1], clip_ratio_dual=0.0, tis_cap=0.0)
SURROGATE = Objective(loss_type="ppo", **COMMON)
CROSS_ENTROPY = Objective(loss_type="cispo", **COMMON)  # -logp: the advantage is 1, there is no older policy


def head(tokens, hidden, vocab, device, dtype):
    """hidden (N, H), weight (V, H), target (N,): logits have a standard deviation of 2, except for target and rival.

    These two have a probability of about 1/3 each. If all probabilities were near 0, the gradient would be -onehot
    within bf16's tolerance, and a kernel without softmax would pass. The log-sum-exp is ln V + 2 and |w_y|^2 is 4, so
    adding (ln V + 2) / 4 of w_y to x raises the target's logit, 0 on average, to the log-sum-exp of all others.
    """
    torch.manual_seed(0)
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    w = (torch.randn(vocab, hidden, device=device, dtype=dtype) * 2 / hidden**0.5).requires_grad_()
    y = torch.randint(vocab, (tokens,), device=device)
    rival = torch.randint(vocab, (tokens,), device=device)
    x = (x + (w[y] + w[rival]) * ((math.log(vocab) + 2) / 4)).detach().requires_grad_()
    return x, w, y


def whole_cross_entropy(x, w, y):
    return F.cross_entropy((x @ w.T).float(), y)


def whole_surrogate(x, w, y, tokens):
    """Like eager trainers: logits in the inputs' dtype, log-softmax in fp32, autograd."""
    logp = (x @ w.T).float().log_softmax(-1).gather(1, y[:, None]).squeeze(1)
    return policy_loss(logp, logp.new_zeros(()), tokens, SURROGATE).sum()


def ours(x, w, y, tokens, objective, fused=False, **options):
    def loss_of(logp, entropy, rows):
        return policy_loss(logp, entropy, tokens[rows], objective)

    if fused:
        options["fused"] = fused_objective(tokens, objective)
    return linear_loss.linear_loss(x, w, y, loss_of, **options)[0]


def token_vectors(x, w, y, response, objective):
    """Per-token inputs of the objective. Ratios are not near the clip bounds, where rounding would decide."""
    count, device = len(y), y.device
    responses = torch.arange(count, device=device) // response
    if objective is CROSS_ENTROPY:
        advantage, old = torch.ones(count, device=device), None
    else:
        advantage = torch.linspace(-1, 2, count // response, device=device)[responses]
        logp = linear_logprob.linear_logprob(wider(x.detach()), wider(w.detach()), y, **GOLD)[0].float()
        old = logp + torch.tensor([-0.6, -0.1, 0.1, 0.6], device=device)[torch.arange(count, device=device) % 4]
    weight = torch.full((count,), 1 / count, device=device)
    return Tokens(advantage, weight, responses, sampler_logp=torch.zeros_like(weight), old_logp=old)


def our_providers(device):
    """name -> options of `ours`, or the reason why it cannot run."""
    found = {"chunked": {"impl": "chunked"}}
    for route, fused in (("fused", True), ("generic", False)):
        for bits, logits in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            gpu = {"impl": "triton", "logits_dtype": logits, "fused": fused}
            found[f"triton {route} {bits} logits"] = gpu if device == "cuda" else providers.INTERPRETED
    return found


def cases(device, dtype, shapes=SHAPES):
    for name, *sizes in shapes[device]:
        x, w, y = head(*sizes, device, dtype)
        for title, objective in (("cross entropy", CROSS_ENTROPY), ("surrogate", SURROGATE)):
            yield case(f"{title}, {name}", title, x, w, y, RESPONSE[device], objective)


def case(name, family, x, w, y, response, objective):
    device, (count, hidden), vocab = x.device.type, x.shape, len(w)
    tokens = token_vectors(x, w, y, response, objective)
    logits = 12.0 * count * vocab  # bytes: fp32 log-probs, their gradient, and the gradient of the logits

    def gradients(loss_of, x=x, w=w):
        loss = loss_of(x, w, y)
        return loss.detach(), *torch.autograd.grad(loss, (x, w))

    def offer(loss_of, refused="", **about):
        return Provider(partial(gradients, loss_of), refused=refused, **about)

    eager = whole_cross_entropy if objective is CROSS_ENTROPY else partial(whole_surrogate, tokens=tokens)
    found = {"eager": offer(eager, needs=logits)}
    found["torch.compile"] = (
        offer(providers.compiled(eager)) if device == "cuda" else Provider(refused=providers.COMPILED))
    liger, cut = (providers.lacking(module, device) for module in ("liger_kernel", "cut_cross_entropy"))
    if objective is CROSS_ENTROPY:
        found["F.linear_cross_entropy"] = offer(providers.torch_cross_entropy, providers.lacking_torch_cross_entropy())
        found["Liger"] = offer(providers.liger_cross_entropy, liger)
        found["cut-cross-entropy, filter"] = offer(providers.cut_cross_entropy, cut)
        found["cut-cross-entropy, exact"] = offer(partial(providers.cut_cross_entropy, filter_eps=None), cut)
    else:
        def liger_grpo(x, w, y):
            shape = (-1, response)
            return providers.liger_grpo(
                x, w, y.view(shape), tokens.advantage[::response], tokens.old_logp.view(shape), *CLIP)

        found["Liger"] = offer(liger_grpo, liger)
    for key, options in our_providers(device).items():
        refused = isinstance(options, str)
        found[key] = Provider(refused=options, ours=True) if refused else offer(
            partial(ours, tokens=tokens, objective=objective, **options), ours=True)

    def gold():
        return gradients(partial(ours, tokens=tokens, objective=objective, **GOLD), wider(x), wider(w))

    # Three products. Both matrices are read and their gradients are written.
    flops, nbytes = 6.0 * count * hidden * vocab, 2 * (count + vocab) * hidden * x.element_size()
    return Case(name, gold, found, flops, nbytes, f"{family}, V {vocab:,}, H {hidden:,}", count, x.dtype)


if __name__ == "__main__":
    sys.exit(main({"linear_loss": cases}))
