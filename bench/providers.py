"""Calls of the other libraries, and the reasons why one cannot run.

Each is used as its documentation says. A library is imported when it runs, so one that is not installed or does not
support this host does not affect the rest.

Next: linear_loss.py, attention.py, which use them.
"""

import functools
import importlib.util
import inspect

import torch
import torch.nn.functional as F

PACKAGES = {"liger_kernel": "liger-kernel", "cut_cross_entropy": "cut-cross-entropy", "flash_attn": "flash-attn"}
GPU_ONLY = "needs a CUDA device"
INTERPRETED = "needs a CUDA device: a time under Triton's interpreter means nothing"
COMPILED = "only on a CUDA device: compiling would take longer than all CPU cases"


def lacking(module, device):
    """The reason why a GPU library cannot run here, or an empty string."""
    if device != "cuda":
        return GPU_ONLY
    if importlib.util.find_spec(module) is None:
        return f"not installed: pip install {PACKAGES[module]}"
    return ""


def compiled(function):
    """`torch.compile` for one shape. Code of earlier shapes is dropped, because dynamo gives up after a few of them."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


# The head, as mean cross entropy: (hidden (N, H), weight (V, H), target (N,)) -> 0-d, or (N,) with reduction="none".


def liger_cross_entropy(hidden, weight, target):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, target)


def cut_cross_entropy(hidden, weight, target, reduction="mean", filter_eps="high"):
    """filter_eps=None: without skipping tiles whose gradient is small."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, target, reduction=reduction, filter_eps=filter_eps)


def torch_cross_entropy(hidden, weight, target, reduction="mean"):
    # Chunked for N >= H, as its documentation advises; for smaller N whole logits are cheaper.
    options = torch.nn.LinearCrossEntropyOptions() if len(hidden) >= hidden.shape[1] else None
    return F.linear_cross_entropy(hidden, weight, target, reduction=reduction, options=options)


def lacking_torch_cross_entropy():
    has = hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
    return "" if has else f"torch {torch.__version__} has no chunked F.linear_cross_entropy"


def lacking_cute(capability):
    """The reason why Liger's log-prob cannot run on a GPU of this (major, minor), or an empty string.

    On Hopper it is written in CuTe.
    """
    if capability == (9, 0) and importlib.util.find_spec("cutlass") is None:
        return "on Hopper needs CuTe: pip install nvidia-cutlass-dsl"
    return ""


def liger_logprob(hidden, weight, target):
    """Log-prob and entropy (N,) each."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target, 1.0, -100, 1, True)
    return -nll, entropy


def liger_grpo(hidden, weight, target, advantage, old_logp, clip_low, clip_high):
    """Clipped surrogate, token mean: target and old_logp (R, L) by response, advantage (R,)."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=clip_low, epsilon_high=clip_high, loss_type="dapo")
    hidden = hidden.view(*target.shape, -1)
    return loss(hidden, weight, target, torch.ones_like(target), advantage, old_per_token_logps=old_logp)[0]


# Attention over a list of whole sequences, each attending to itself: q (T, Hq, D), k and v (T, Hkv, D) -> (T, Hq, D).


def cumulative(lengths, device):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def torch_varlen(lengths, causal, device):
    bounds, longest = cumulative(lengths, device), max(lengths)

    def attend(q, k, v):
        from torch.nn.attention.varlen import varlen_attn

        known = inspect.signature(varlen_attn).parameters  # names differ between releases
        options = {"is_causal": causal} if "is_causal" in known else {"window_size": (-1, 0 if causal else -1)}
        options |= {"enable_gqa": True} if "enable_gqa" in known else {}
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)

    return attend


def flash_varlen(lengths, causal, device):
    bounds, longest = cumulative(lengths, device), max(lengths)

    def attend(q, k, v):
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, causal=causal)

    return attend


def torch_sdpa(lengths, causal):
    """For sequences of one length, a batch without padding."""

    def attend(q, k, v):
        q, k, v = (x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, L, D)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return attend


def flex_attention(seen, compile=compiled):
    """FlexAttention with a pack's mask.

    Args:
        seen: (4, T); query i sees keys [seen[0, i], seen[1, i]) and [seen[2, i], seen[3, i]).
    """

    @functools.cache
    def prepared(device):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        own0, own1, prefix0, prefix1 = seen.to(device)

        def mask(_batch, _head, i, j):
            return ((j >= own0[i]) & (j < own1[i])) | ((j >= prefix0[i]) & (j < prefix1[i]))

        tokens = seen.shape[1]
        return create_block_mask(mask, None, None, tokens, tokens, device=device), compile(flex_attention)

    def attend(q, k, v):
        blocks, run = prepared(q.device)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, T, D)
        return run(q, k, v, block_mask=blocks, enable_gqa=True)[0].transpose(0, 1)

    return attend


def liger_mrope(q, k, cos, sin, section):
    """In place in q and k (T, heads, D) and in their gradients; cos and sin: (3, 1, T, D)."""
    from liger_kernel.transformers.qwen2vl_mrope import liger_multimodal_rotary_pos_emb

    q, k = (x.transpose(0, 1)[None] for x in (q, k))  # (1, heads, T, D)
    return tuple(x[0].transpose(0, 1) for x in liger_multimodal_rotary_pos_emb(q, k, cos, sin, list(section)))
