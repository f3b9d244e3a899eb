"""How a model lies on the ranks: FSDP2, a unit for every block.

    language block, vision block   gathered when its turn comes, in the compute dtype, and dropped after it
    vision tower                   patch embedding and merger: gathered only where a pack has images, as its blocks are
    root                           embedding, final norm and head: gathered once a pass, kept until its end, in the
                                   master dtype

The root keeps its precision because the head's gradient is summed over chunks in fp32: a 16-bit weight would round that
sum before it is reduced, and need one more copy of it. The residual stream is fp32 for the same reason as without
FSDP (autocast, see policy.py), so no unit casts its inputs.

Gradients are summed over ranks, not averaged: the weight of each token already holds the one denominator of the
optimiser step. They are reduced inside a host after every micro-batch: to do so after the last alone would keep a whole
unsharded gradient on every rank. Over hosts (HSDP) they are summed once an update, see `sum_over_hosts`.
"""

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from nanolmmr1.model import weights
from nanolmmr1.model.qwen import Qwen25VL
from nanolmmr1.parallel import dist


def load_sharded(folder, dist_cfg, device, dtype, master=torch.float32, offload=False, empty=False):
    """The model of a folder, each rank holding its shard alone: no rank ever holds the whole.

    Args:
        dist_cfg: schema.Dist. device: "cpu" or "cuda", where it computes. dtype: of the blocks' computation.
        master: of what is stored. offload: shards live on the CPU. empty: see weights.load.

    Raises:
        UserError: see weights.fill, dist.mesh.
    """
    with torch.device("meta"):
        model = Qwen25VL(weights.read_config(folder)).to(master)
    weights.check_size(model, folder)
    shard(model, dist.mesh(device, dist_cfg.shard, dist_cfg.timeout_s), dtype, offload)
    model.to_empty(device="cpu" if offload else device)
    if not empty:
        weights.fill(model, folder)
    return model


def shard(model, mesh, dtype, offload=False):
    """Apply fully_shard to a Qwen25VL, in place."""

    def unit(module, param_dtype=None, **options):
        precision = MixedPrecisionPolicy(param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=precision,
            offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
            **options,
        )

    for block in (*model.visual.blocks, *model.model.layers):
        unit(block, dtype)
    unit(model.visual, dtype)
    unit(model, reshard_after_forward=False)
    for module in units(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum


def sum_over_hosts(model, language, vision):
    """HSDP: whether the next backward pass sums gradients over hosts too. Until one does, they add up in each host, in
    fp32 and on the device.

    Args:
        language: of the language model, which every micro-batch meets; vision: of the tower, where it has images.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(language)
        model.visual.set_requires_all_reduce(vision)


def reshard(model):
    """After a pass that no backward pass follows, for which the root stays whole: it would miss the next update."""
    if isinstance(model, FSDPModule):
        model.reshard()


def units(model: nn.Module):
    """The model's FSDP units."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
