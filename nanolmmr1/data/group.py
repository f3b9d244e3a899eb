"""A prompt and its sampled responses.

A group stays one object from the sampler to the gradient, so the model computes the prompt and its images only once.

Next: ../rollout/sampler.py, the interface of samplers.
"""

from dataclasses import dataclass, field

import torch

from nanolmmr1.data.prompt import Prompt
from nanolmmr1.data.rows import Row


@dataclass
class Response:
    """One sampled response of R tokens."""

    ids: torch.Tensor  # (R,) int64, the stop token included
    logp: torch.Tensor  # (R,) fp32, under the distribution sampled from
    finish: str  # "stop" or "length"


@dataclass
class Group:
    """A prompt and its responses."""

    prompt: Prompt | None  # None on ranks that did not sample the group, until they prepare the prompt
    responses: list[Response]
    texts: list[str] = field(default_factory=list)  # decoded, one per response
    judgements: list[dict[str, float]] = field(default_factory=list)  # from the judge, one per response
    row: Row = None  # type: ignore[assignment] # default: the prompt's, see __post_init__
    prompt_tokens: int = 0
    num_patches: int = 0  # of all images

    def __post_init__(self) -> None:
        if self.prompt is not None:
            prompt = self.prompt
            self.row, self.prompt_tokens, self.num_patches = prompt.row, len(prompt.ids), len(prompt.patches)

    @property
    def rewards(self) -> list[float]:
        """Total reward of every response."""
        return [judgement["overall"] for judgement in self.judgements]
