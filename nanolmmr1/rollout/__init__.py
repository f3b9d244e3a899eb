"""What every sampler takes and gives: prompts in, groups out.

A sampler has five verbs: `generate(prompts, params, seeds, advance) -> groups`, `update(weights)`, `sleep()`, `wake()`
and `close()`. And it tells: `stats`, numbers of its own for a step's record; `dtype`, in which it wants weights, None:
as they are stored; `remembers`, whether weights that did not change need not be given again; `ranks`, how many
neighbouring ranks are one engine and must be given the same prompts; `pool_bytes`, of the GPU's memory that is its own,
asleep or not. `advance(n)` is told that n more prompts are done, and 0 between two tokens, when it may raise Preempted.

A group is a prompt with its G responses. It stays one object from here to the gradient, so the
prompt and its pictures need go through the model only once.

Next: local.py, our own engine; vllm.py, a faster one; server.py, such engines elsewhere; exchange.py, groups on their
way from the rank that sampled them to the one that learns from them.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from nanolmmr1.data.prompt import Prompt
from nanolmmr1.data.rows import Row


@dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn. `temperature` 0 is greedy; top_p 1 and top_k 0 are off."""

    num_responses: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple = ()
    banned_ids: tuple = ()  # never drawn; they leave the distribution


@dataclass
class Response:
    ids: torch.Tensor  # (R,) int64, the stop token included
    logp: torch.Tensor  # (R,) fp32, under the distribution sampled from
    finish: str  # "stop" or "length"


@dataclass
class Group:
    """A prompt and its responses. On other ranks than the sampler's the prompt is None until it is prepared there."""

    prompt: Prompt | None
    responses: list[Response]
    texts: list[str] = field(default_factory=list)
    judgements: list[dict] = field(default_factory=list)  # as the judge gave them, one a response
    row: Row | None = None
    prompt_tokens: int = 0
    num_patches: int = 0

    def __post_init__(self):
        if self.prompt is not None:
            prompt = self.prompt
            self.row, self.prompt_tokens, self.num_patches = prompt.row, len(prompt.ids), len(prompt.patches)

    @property
    def rewards(self):
        return [judgement["overall"] for judgement in self.judgements]


def response_uniforms(seed, index, count):
    """The `count` uniforms in [0, 1) that decide response `index` of the prompt with this seed."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([*seed, index]))).random(count)
