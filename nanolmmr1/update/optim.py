"""AdamW for bf16 weights without fp32 masters, by stochastic rounding.

bf16 has 8 bits of precision: the next number after 1 is 1 + 2^-7. An RL update changes a weight by about the learning
rate, 1e-6, so rounding to nearest would never move it. Rounding up or down at random, with probabilities that make the
mean exact, moves it as far on average as in fp32. Weights and both moments take 6 bytes per parameter, fp32 masters 12.
torchao's version draws from the global generator; this one is a function of (seed, step, tensor, shard), so a resumed
run is bit-exact.

Sources: Gupta et al., arXiv 1502.02551 (stochastic rounding); Zamirai et al., arXiv 2010.06192 (bf16 weights alone);
Loshchilov and Hutter, arXiv 1711.05101 (AdamW).

Next: memory.py, how much to recompute.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

SLICE = 1 << 22  # elements processed at a time: bounds the fp32 copies of a large tensor


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW with bf16 parameters and moments, computed in fp32 and stochastically rounded.

    Parameters may be DTensors: each rank updates its shard. Random bits depend on the seed, the step, the parameter's
    index and the shard's index. So there is no state besides AdamW's, a resumed run repeats the uninterrupted one bit
    for bit, and replicas of a shard stay equal.

    Args:
        params: contiguous parameters or parameter groups, as for torch.optim.AdamW.
        lr, betas, eps, weight_decay: as for AdamW; decay is decoupled. seed: non-negative.

    Raises:
        ValueError: a parameter that is not bf16.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        seed: int = 0,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.seed = seed
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.dtype != torch.bfloat16:
                raise ValueError(f"a parameter {tuple(p.shape)} is {p.dtype}: bfloat16 is wanted, or torch.optim.AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Returns the closure's result."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        for index, (p, group) in enumerate(pairs):
            if p.grad is not None:
                self._update(p, group, index)
        return loss

    def _update(self, p: torch.Tensor, group: dict[str, Any], index: int) -> None:
        state = self.state[p]
        if not state:  # under AdamW's names: checkpoints of both have one layout
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        step, (beta1, beta2), lr = int(state["step"]), group["betas"], group["lr"]
        stored = [_local(t).view(-1) for t in (p, state["exp_avg"], state["exp_avg_sq"])]
        assert p.grad is not None
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


def round_stochastically(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Round fp32 to bf16, up or down at random, so that the mean is x.

    Numbers that bf16 represents exactly stay, and so do NaN and infinities.

    Args:
        x: any shape, fp32. generator: on x's device.
    """
    noise = torch.randint(1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    # bf16 is the upper half of fp32: the sum carries into it with a probability proportional to the lower half. Sign
    # and magnitude are separate bits, so this holds for negative numbers, and a carry out of the mantissa increments
    # the exponent.
    rounded = (x.view(torch.int32) + noise).bitwise_and_(-1 << 16).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()


def _local(t: torch.Tensor) -> torch.Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def _shard(p: torch.Tensor) -> list[int]:
    """Index of this rank's shard of p: coordinates along the mesh axes that shard p, not along replicating axes.
    """
    if not isinstance(p, DTensor):
        return []
    coordinates = p.device_mesh.get_coordinate()
    assert coordinates is not None, "this rank is in the mesh"
    return [i for i, placement in zip(coordinates, p.placements, strict=True) if not placement.is_replicate()]
