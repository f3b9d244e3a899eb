"""The interface of every sampler: prompts in, groups of responses out.

Next: local.py, the embedded sampler.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch

from nanolmmr1.data.group import Group
from nanolmmr1.data.prompt import Prompt

Seed: TypeAlias = tuple[int, ...]  # of one prompt: non-negative integers


@dataclass(frozen=True)
class SamplingParams:
    """How responses are drawn. `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 are off."""

    num_responses: int  # per prompt (G)
    max_tokens: int  # per response, the stop token included
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: Sequence[int] = ()  # token ids that end a response
    banned_ids: Sequence[int] = ()  # never drawn; removed from the distribution


def ignore_progress(count: int) -> None:
    """Default `on_progress` of samplers."""


def never_stop() -> bool:
    """Default `should_stop` of samplers."""
    return False


class Sampler(Protocol):
    """An engine that samples responses from the policy's current weights."""

    @property
    def stats(self) -> dict[str, float]:
        """Numbers of the engine for the step's record, logged as `rollout/NAME`."""

    @property
    def dtype(self) -> torch.dtype | None:
        """dtype of the weights that `update` takes; None: as stored in the policy."""

    @property
    def keeps_unchanged(self) -> bool:
        """Whether weights that did not change may be left out of an update: the engine keeps the old ones."""

    @property
    def ranks_per_engine(self) -> int:
        """Number of neighbouring ranks that share one engine; they must pass the same prompts."""

    @property
    def pool_bytes(self) -> int:
        """GPU memory reserved by the engine, also while it sleeps."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seeds: Sequence[Seed],
        *,
        on_progress: Callable[[int], None] = ignore_progress,
        should_stop: Callable[[], bool] = never_stop,
    ) -> list[Group]:
        """Sample one group per prompt, in the order of the prompts.

        Args:
            seeds: one per prompt; the same seed draws the same responses again from the same engine and weights.
            on_progress: called with the number of prompts completed since the last call.
            should_stop: asked between two tokens or engine steps; True ends the call.

        Raises:
            Preempted: should_stop() returned True; the engine has dropped all requests.
            UserError: the engine failed, or refuses a prompt.
        """

    def update(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights.

        Args:
            weights: (published name, whole tensor) of all weights, or with `keeps_unchanged` of those that are trained;
                consumed to its end even after an error, because gathering sharded weights is a collective of all ranks.

        Raises:
            UserError: the engine failed, or does not accept the weights.
        """

    def sleep(self) -> None:
        """Free GPU memory for training. `update` may follow; `generate` wakes the engine if `wake` has not."""

    def wake(self) -> None:
        """Allocate the memory that `sleep` freed."""

    def close(self) -> None:
        """Shut the engine down."""


def response_uniforms(seed: Seed, index: int, count: int) -> np.ndarray:
    """Uniform random numbers that decide the tokens of one response.

    Args:
        seed: of the prompt; index: of the response in its group; count: number of tokens.

    Returns:
        (count,) float64 in [0, 1).
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([*seed, index]))).random(count)
