"""AdamW for weights that are bf16 and nothing else: rounded at random, since to the nearest they would not move.

A bf16 number has 8 bits of precision, so near 1 the next one is 2^-7 away. A step of RL moves a weight by about the
learning rate, 1e-6: rounded to the nearest, the weight stays where it is for ever. Rounded up or down at random, with
the probabilities that make the mean exact, it goes as far on average as in fp32. Weights and both moments then take 6
bytes a parameter where fp32 masters take 12.

Sources: Gupta et al., arXiv 1502.02551 (stochastic rounding); Zamirai et al., arXiv 2010.06192 (bf16 weights alone);
Loshchilov and Hutter, arXiv 1711.05101 (AdamW).
"""

import math

import numpy as np
import torch
from torch.distributed.tensor import DTensor

SLICE = 1 << 22  # elements at a time, so that fp32 copies of a large tensor never exist whole


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW whose parameters and moments are bf16, computed in fp32 and stochastically rounded.

    Parameters may be DTensors: each rank steps its shard. What is random follows from seed, step, a parameter's place
    among the parameters, and which shard of it this is. So there is no state beside AdamW's own, a resumed run repeats
    the uninterrupted one bit for bit, and replicas of a shard stay equal.

    Args:
        params: parameters, or groups of them, as torch.optim.AdamW takes them; contiguous.
        lr, betas, eps, weight_decay: floats, as AdamW's; decay is decoupled. seed: int >= 0.

    Raises:
        ValueError: a parameter that is not bf16.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, seed=0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.seed = seed
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.dtype != torch.bfloat16:
                raise ValueError(f"a parameter {tuple(p.shape)} is {p.dtype}: bfloat16 is wanted, or torch.optim.AdamW")

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient. Returns what the closure, if any, gives."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        everything = [(p, group) for group in self.param_groups for p in group["params"]]
        for index, (p, group) in enumerate(everything):
            if p.grad is not None:
                self._update(p, group, index)
        return loss

    def _update(self, p, group, index):
        state = self.state[p]
        if not state:  # AdamW's names, so that a checkpoint of either looks the same
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        step, (beta1, beta2), lr = int(state["step"]), group["betas"], group["lr"]
        stored = [_local(t).view(-1) for t in (p, state["exp_avg"], state["exp_avg_sq"])]
        grad = _local(p.grad).reshape(-1)
        seed = np.random.SeedSequence([self.seed, step, index, *_shard(p)]).generate_state(1)
        generator = torch.Generator(grad.device).manual_seed(int(seed[0]))
        for g, *part in zip(grad.split(SLICE), *(t.split(SLICE) for t in stored), strict=True):
            g, (w, m, v) = g.float(), (t.float() for t in part)
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            scale = (v.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
            w.mul_(1 - lr * group["weight_decay"]).addcdiv_(m, scale, value=-lr / (1 - beta1**step))
            for target, exact in zip(part, (w, m, v), strict=True):
                target.copy_(round_stochastically(exact, generator))


def round_stochastically(x, generator):
    """fp32 -> bf16: to one of the two neighbours, the nearer more often, so that the mean is x.

    What bf16 holds exactly stays, and so do NaN and infinities.

    Args:
        x: any shape, fp32. generator: torch.Generator on its device.
    """
    noise = torch.randint(1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    # bf16 is the upper half of fp32: the sum carries into it as often as the lower half is large. Sign and magnitude
    # are apart, so this holds below 0 too, and a carry out of the mantissa is the next exponent.
    rounded = (x.view(torch.int32) + noise).bitwise_and_(-1 << 16).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()


def _local(t):
    return t.to_local() if isinstance(t, DTensor) else t


def _shard(p):
    """Which shard of p lies here: its place along the mesh axes that split p, and not along those that repeat it."""
    if not isinstance(p, DTensor):
        return []
    at = zip(p.device_mesh.get_coordinate(), p.placements, strict=True)
    return [coordinate for coordinate, placement in at if not placement.is_replicate()]
