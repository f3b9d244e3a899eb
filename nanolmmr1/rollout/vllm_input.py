"""What a vLLM engine is told of a prompt and of how to sample, be it in this process or behind a server.

Next: vllm.py, the engine in this process; vllm_http.py, one server.
"""

import math

from nanolmmr1.errors import UserError


def images_of(prompt, merge):
    """[(grid (3,), pixels (patches, patch_dim), first token, number of tokens)], one a picture of the prompt.

    Args:
        merge: patches along a side of an image token, as the engine counts them.

    Raises:
        UserError: the pictures do not fit the prompt's tokens.
    """
    row, given = f"row {prompt.row.id}", len(prompt.image_slots)
    patches = prompt.grid.prod(1).tolist()
    counts = [count // merge**2 for count in patches]
    if sum(counts) != given or sum(patches) != len(prompt.patches):
        raise UserError(f"{row}: {given} image tokens and {len(prompt.patches)} patches, but the engine makes "
                        f"{sum(counts)} and {sum(patches)} of the grids {prompt.grid.tolist()}")
    images = []
    if given:
        parts = zip(prompt.grid, prompt.patches.split(patches), prompt.image_slots.split(counts), strict=True)
        for grid, pixels, slots in parts:
            first, last = int(slots[0]), int(slots[-1])
            if last - first + 1 != len(slots):
                raise UserError(f"{row}: the {len(slots)} tokens of the image at token {first} are not neighbours")
            images.append((grid, pixels, first, len(slots)))
    return images


def batch_tokens(longest, sequences):
    """Tokens of an engine step in which no prompt is cut: the longest one's, or one of every sequence."""
    return max(2048, longest, sequences)


def sampling_fields(params):
    """The fields of vLLM's sampling parameters that every engine is given alike."""
    return dict(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        max_tokens=params.max_tokens,
        stop_token_ids=list(params.stop_ids),
        ignore_eos=True,  # stop_ids say it all
        logprobs=0,  # of the sampled token alone
        detokenize=False,
    )


def check_logps(who, logps, lowest=-math.inf):
    """Refuse log-probs that are none: they have to be above `lowest`, and at most 0 but for rounding.

    Raises:
        UserError: the first one that is not.
    """
    wrong = next((x for x in logps if not lowest < x <= 1e-3), None)
    if wrong is not None:
        raise UserError(f"{who} gave a log-prob that is not a number up to 0 ({wrong:.3g}): its weights are broken")


def fp32_head(policy):
    """Overrides of the model's config, so that an engine's logits are fp32 sums, as ours are.

    Rounded to bf16 they would be off by 0.01 to 0.02 nats on average. A bf16 head on a CPU stays as it is.
    """
    return {} if policy.device.type == "cpu" and policy.dtype.itemsize < 4 else {"head_dtype": "float32"}
