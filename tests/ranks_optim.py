"""What test_optim.py does on several ranks."""

import json

import torch
import torch.distributed as td
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from nanolmmr1.parallel import dist
from nanolmmr1.update.optim import StochasticAdamW


def run(mesh=None):
    """Two steps; the weight, its gradient and first moment, each step. Rows repeat, so the halves are alike."""
    torch.manual_seed(0)
    model = nn.Linear(16, 64, bias=False, dtype=torch.bfloat16)
    model.weight.data.copy_(model.weight.data[:32].repeat(2, 1))
    if mesh:
        fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        model.set_gradient_divide_factor(1.0)
        model.set_force_sum_reduction_for_comms(True)
    optimizer = StochasticAdamW(model.parameters(), lr=1e-3, weight_decay=0.1, seed=5)
    found = []
    for step in range(2):
        model.zero_grad()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).bfloat16()
        # The same sum over ranks as alone: powers of 2 round nothing.
        (model(x).sum() / (dist.size() if mesh else 1)).backward()
        optimizer.step()
        w = model.weight
        for t in (w, w.grad, optimizer.state[w]["exp_avg"]):
            t = t.detach()
            found.append((t.full_tensor() if mesh else t).float().clone())
    return found


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def first_ranks(tensors):
    given = [t.contiguous().clone() for t in tensors]
    for t in given:
        td.broadcast(t, 0)
    return given


def main():
    dist.start("cpu", 60)
    alone = run()
    sharded, again = (run(init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))) for _ in range(2))
    replicated = run(init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))
    ulp = 2.0 ** (alone[0].abs().log2().floor() - 7)
    print(json.dumps({
        "a run repeats": equal(sharded, again),
        "ranks agree": equal(sharded, first_ranks(sharded)) and equal(replicated, first_ranks(replicated)),
        "the gradient is the one alone": torch.equal(alone[1], sharded[1]),
        "the first step is at most an ulp away": bool(((alone[0] - sharded[0]).abs() <= ulp).all()),
        "the bits are others": not torch.equal(alone[0], sharded[0]),
        "two shards draw different bits": not torch.equal(*sharded[0].view(2, 32, 16)),
        "one shard, replicated, is the whole": equal(replicated, alone),
    }))
