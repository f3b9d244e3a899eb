"""Input of a vLLM engine: images and sampling parameters, the same for an engine in this process and on a server.

Next: vllm_tensors.py, its weights.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from nanolmmr1.data.prompt import Prompt
from nanolmmr1.errors import UserError
from nanolmmr1.rollout.sampler import SamplingParams
from nanolmmr1.schema import Recipe
from nanolmmr1.update.policy import Policy


class PromptImage(NamedTuple):
    """One image of a prompt."""

    grid: torch.Tensor  # (3,) int64: t, h, w in patches
    pixels: torch.Tensor  # (patches, patch_dim) fp32
    first: int  # index of its first token in the prompt
    length: int  # number of its tokens, which are contiguous


def images_of(prompt: Prompt, merge: int) -> list[PromptImage]:
    """The images of a prompt.

    Args:
        merge: patches along one side of an image token, as the engine counts them.

    Raises:
        UserError: the images do not fit the prompt's tokens.
    """
    row, slots = f"row {prompt.row.id}", len(prompt.image_slots)
    patches = prompt.grid.prod(1).tolist()
    counts = [count // merge**2 for count in patches]
    if sum(counts) != slots or sum(patches) != len(prompt.patches):
        raise UserError(f"{row}: {slots} image tokens and {len(prompt.patches)} patches, but the engine makes "
                        f"{sum(counts)} and {sum(patches)} of the grids {prompt.grid.tolist()}")  # fmt: skip
    images = []
    if slots:
        for grid, pixels, tokens in zip(
            prompt.grid, prompt.patches.split(patches), prompt.image_slots.split(counts), strict=True
        ):
            first, last = int(tokens[0]), int(tokens[-1])
            if last - first + 1 != len(tokens):
                raise UserError(f"{row}: the {len(tokens)} tokens of the image at token {first} are not neighbours")
            images.append(PromptImage(grid, pixels, first, len(tokens)))
    return images


def longest_sequence(cfg: Recipe) -> int:
    """Most tokens of a prompt and its response, over all phases and the evaluation of a resolved recipe."""
    evaluate = cfg.evaluate
    assert evaluate.max_prompt_tokens is not None and evaluate.max_response_tokens is not None
    lengths = [phase.max_prompt_tokens + phase.max_response_tokens for phase in cfg.phases.values()]
    return max([*lengths, evaluate.max_prompt_tokens + evaluate.max_response_tokens])


def batch_tokens(longest: int, sequences: int) -> int:
    """Token budget of an engine step that splits no prompt: the longest prompt, or one token of every sequence."""
    return max(2048, longest, sequences)


def sampling_fields(params: SamplingParams) -> dict[str, Any]:
    """Fields of vLLM's sampling parameters that are the same for every engine."""
    return dict(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        max_tokens=params.max_tokens,
        stop_token_ids=list(params.stop_ids),
        ignore_eos=True,  # stop_ids has every stop token
        logprobs=0,  # of the sampled token only
        detokenize=False,
    )


def check_logps(source: str, logps: Iterable[float], lowest: float = -math.inf) -> None:
    """Check that log-probs are above `lowest` and, up to rounding, at most 0.

    Raises:
        UserError: names `source` and the first log-prob that is not; NaN is not.
    """
    wrong = next((x for x in logps if not lowest < x <= 1e-3), None)
    if wrong is not None:
        raise UserError(f"{source} gave a log-prob that is not a number up to 0 ({wrong:.3g}): its weights are broken")


def fp32_head(policy: Policy) -> dict[str, str]:
    """Overrides of the model config that make the engine's logits fp32 sums, like the trainer's.

    Rounded to bf16, log-probs would be off by 0.01 to 0.02 nats on average. A bf16 head on a CPU is not overridden.
    """
    return {} if policy.device.type == "cpu" and policy.dtype.itemsize < 4 else {"head_dtype": "float32"}
