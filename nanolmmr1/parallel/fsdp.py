"""FSDP2 sharding of the model, one unit per block.

    language block, vision block   gathered in the compute dtype for its forward and backward pass, then freed
    vision tower                   patch embedding and merger: gathered only if a pack has images, like its blocks
    root                           embedding, final norm and head: gathered once per pass in the master dtype, and freed
                                   at its end

The root keeps the master dtype because the head's gradient is summed over chunks in fp32: a 16-bit weight would round
that sum before it is reduced, and need another copy of it. The residual stream has the embedding's dtype, as it has
without FSDP (autocast, see update/policy.py), so no unit casts its inputs.

Gradients are summed over ranks, not averaged: each token's weight already contains the denominator of the optimizer
step. They are reduce-scattered inside a host after every micro-batch, since accumulating unsharded gradients would need
a whole gradient per rank. Over hosts (HSDP) they are all-reduced once per update, see `sum_over_hosts`.

Next: export.py, gathering weights.
"""

from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from nanolmmr1.model import weights
from nanolmmr1.model.qwen import Qwen25VL


def load_sharded(
    folder: Path,
    mesh: DeviceMesh,
    device: str,
    dtype: torch.dtype,
    master: torch.dtype = torch.float32,
    offload: bool = False,
    empty: bool = False,
) -> Qwen25VL:
    """Load a model folder with FSDP; each rank reads and holds only its shards.

    Args:
        device: where it computes. dtype: of the blocks' computation. master: dtype of the stored weights.
        offload: keep the shards on the CPU. empty: leave memory uninitialized, for a checkpoint that is read next.

    Raises:
        UserError: see weights.fill.
    """
    with torch.device("meta"):
        model = Qwen25VL(weights.read_config(folder)).to(master)
    weights.check_size(model, folder)
    shard(model, mesh, dtype, offload)
    model.to_empty(device="cpu" if offload else device)
    if not empty:
        weights.fill(model, folder)
    return model


def shard(model: Qwen25VL, mesh: DeviceMesh, dtype: torch.dtype, offload: bool = False) -> None:
    """Apply fully_shard to a model, in place."""

    def unit(module: nn.Module, param_dtype: torch.dtype | None = None, reshard_after_forward: bool = True) -> None:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=MixedPrecisionPolicy(param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
            offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
            reshard_after_forward=reshard_after_forward,
        )

    for block in (*model.visual.blocks, *model.model.layers):
        unit(block, dtype)
    unit(model.visual, dtype)
    unit(model, reshard_after_forward=False)
    for module in units(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


def sum_over_hosts(model: nn.Module, language: bool, vision: bool) -> None:
    """HSDP: choose whether the next backward pass all-reduces gradients over hosts.

    Until one does, gradients accumulate inside each host, in fp32 on the device.

    Args:
        language: for the language model. vision: for the vision tower, which takes part only in packs with images.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(language)
        assert isinstance(model.visual, FSDPModule)
        model.visual.set_requires_all_reduce(vision)


def reshard(model: nn.Module) -> None:
    """Free the gathered root after a forward-only pass; it would keep stale weights after the next update."""
    if isinstance(model, FSDPModule):
        model.reshard()


def units(model: nn.Module) -> list[FSDPModule]:
    """The model's FSDP units."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
