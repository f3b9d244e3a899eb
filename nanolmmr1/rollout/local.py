"""Embedded sampler: decodes with the policy's own model and a KV cache. The default on a CPU.

Prompts are prefilled once, packed together, and a prompt's keys and values are shared by its G responses. Responses
are decoded together, one token per step. A token is drawn by inverting the cumulative distribution at one uniform per
(response, step), so a response depends on its seed alone and not on the rest of the batch.

Next: batch.py, groups exchanged between ranks.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from nanolmmr1.data.group import Group, Response
from nanolmmr1.data.prompt import Prompt
from nanolmmr1.errors import Preempted
from nanolmmr1.kernels.attention import Spans, attention
from nanolmmr1.model.qwen import Qwen25VL
from nanolmmr1.parallel import dist
from nanolmmr1.parallel.export import published
from nanolmmr1.rollout.sampler import SamplingParams, Seed, ignore_progress, never_stop, response_uniforms
from nanolmmr1.update.pack import concat_prompts
from nanolmmr1.update.policy import Policy


class LocalSampler:
    """A `Sampler` that runs the trained modules themselves, so no weights are sent.

    If these are sharded, it holds a whole fp32 copy of them on every rank: gathering a block for each token would cost
    more than the token, and every rank would wait for the longest response of any rank. Meant for models that fit
    twice.

    Args:
        policy: the policy under training.
        max_sequences: most responses decoded together; bounds the KV cache.
    """

    ranks_per_engine, keeps_unchanged, pool_bytes = 1, True, 0
    dtype: torch.dtype | None = None

    def __init__(self, policy: Policy, max_sequences: int = 256) -> None:
        self.policy = policy
        self.max_sequences = max_sequences
        self.stats: dict[str, float] = {}
        self.model = policy.model
        if dist.sharded():
            with torch.device("meta"):
                self.model = Qwen25VL(policy.model.cfg).requires_grad_(False)
            self.model.to_empty(device=policy.device)
            self.update(published(policy.model))

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy new weights, if the model is sharded; see Sampler."""
        if self.model is self.policy.model:
            return
        parameters = dict(self.model.named_parameters())
        for name, tensor in weights:
            parameters[name].copy_(tensor)

    def sleep(self) -> None:
        """Nothing to free: the weights are the policy's, and a cache lives for one call."""

    def wake(self) -> None:
        """Nothing to allocate."""

    def close(self) -> None:
        """Nothing to shut down."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seeds: Sequence[Seed],
        *,
        on_progress: Callable[[int], None] = ignore_progress,
        should_stop: Callable[[], bool] = never_stop,
    ) -> list[Group]:
        """Sample one group per prompt; see Sampler."""
        groups, size = [], max(1, self.max_sequences // params.num_responses)
        for start in range(0, len(prompts), size):
            batch = slice(start, start + size)
            with self.policy.autocast():
                groups += _Decoder(self.policy, self.model, prompts[batch], params, seeds[batch]).run(should_stop)
            on_progress(len(prompts[batch]))
        return groups


class _Decoder:
    """A batch of prompts and their responses, decoded to the end.

    B prompts in the batch, G responses each; response b * G + g belongs to prompt b. B shrinks when groups finish.
    """

    alive: torch.Tensor  # (B,) int64, index in `prompts` of each prompt in the batch
    uniforms: torch.Tensor  # (B * G, max_tokens) float64, one per token
    start: torch.Tensor  # (B * G,) int64, position of each response's first token
    mask: torch.Tensor  # (B, 1, 1, P) fp32, 0 at a prompt's tokens and -inf at padding
    prompt_cache: dict[int, tuple[torch.Tensor, torch.Tensor]]  # layer -> keys, values (B, Hkv, P, D) of the prompts
    response_cache: dict[int, torch.Tensor]  # layer -> keys and values (2, B * G, Hkv, capacity, D) of the responses
    cached: int  # tokens of each response in response_cache

    def __init__(
        self, policy: Policy, model: Qwen25VL, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[Seed]
    ) -> None:
        self.model, self.device, self.params, self.prompts = model, policy.device, params, prompts
        self.attention = policy.pack.attention
        G = params.num_responses
        uniforms = [response_uniforms(seed, g, params.max_tokens) for seed in seeds for g in range(G)]
        self.uniforms = torch.from_numpy(np.stack(uniforms)).to(self.device)
        starts = torch.tensor([prompt.next_position for prompt in prompts], device=self.device)
        self.start = starts.repeat_interleave(G)
        self.alive = torch.arange(len(prompts))
        self.cached, self.response_cache = 0, {}
        self.stop = torch.tensor(params.stop_ids, device=self.device)

    def run(self, should_stop: Callable[[], bool]) -> list[Group]:
        """Decode until every response has ended.

        Raises:
            Preempted: should_stop() returned True before a token.
        """
        B, G, limit = len(self.prompts), self.params.num_responses, self.params.max_tokens
        ids = torch.zeros(B * G, limit, dtype=torch.int64)
        logp = torch.zeros(B * G, limit)
        length = torch.full((B * G,), limit)
        stopped = torch.zeros(B * G, dtype=torch.bool)
        hidden = self.prefill().repeat_interleave(G, 0)  # (B * G, H)
        for step in range(limit):
            if should_stop():
                raise Preempted
            rows = (self.alive[:, None] * G + torch.arange(G)).flatten()  # responses in the batch
            token, token_logp = draw(hidden, self.model.head, self.uniforms[:, step], self.params)
            ids[rows, step], logp[rows, step] = token.cpu(), token_logp.cpu().float()
            ended = torch.isin(token, self.stop).cpu() & ~stopped[rows]
            length[rows[ended]] = step + 1
            stopped[rows[ended]] = True
            if stopped.all() or step + 1 == limit:
                break
            token = self.drop_finished(~stopped.view(B, G).all(1), token)
            hidden = self.decode(token)
        finish = ["stop" if s else "length" for s in stopped.tolist()]
        responses = [
            Response(ids[i, :n].clone(), logp[i, :n].clone(), finish[i]) for i, n in enumerate(length.tolist())
        ]
        return [Group(prompt, responses[b * G : (b + 1) * G]) for b, prompt in enumerate(self.prompts)]

    def prefill(self) -> torch.Tensor:
        """Run the packed prompts through the model, and cache their keys and values.

        Returns:
            (B, H), the last hidden state of each prompt.
        """
        packed = concat_prompts(self.prompts).to(self.device)
        lengths = torch.tensor([len(prompt.ids) for prompt in self.prompts])
        ends = lengths.cumsum(0)
        starts, zero = ends - lengths, torch.zeros_like(ends)
        spans = Spans(torch.stack([starts, ends, starts, ends, zero, zero, zero + 1], 1), int(ends[-1]))
        # The cache is padded: rows past a prompt's end repeat its last token and are masked.
        index = starts[:, None] + torch.arange(int(lengths.max())).minimum(lengths[:, None] - 1)  # (B, P)
        index = index.to(self.device)
        is_padding = torch.arange(index.shape[1]) >= lengths[:, None]
        mask = torch.zeros(index.shape).masked_fill(is_padding, float("-inf"))
        self.mask = mask[:, None, None].to(self.device)
        self.prompt_cache, impl = {}, self.attention

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys, values = (x[index].transpose(1, 2).contiguous() for x in (k, v))
            self.prompt_cache[layer] = keys, values
            return attention(q, k, v, spans, impl=impl)

        hidden = self.model(packed.ids, packed.positions, attend, packed.images, impl=impl)  # (T, H)
        return hidden[(ends - 1).to(self.device)]

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        """One more token (B * G,) for each response.

        Returns:
            (B * G, H), hidden states that predict the next token.
        """
        positions = (self.start + self.cached).expand(3, -1)
        self.cached += 1
        return self.model(token, positions, self.attend)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of one token per response to the shared keys of its prompt and the keys of its response.

        Args:
            q: (n, Hq, D); k, v: (n, Hkv, D), with n = B * G.

        Returns:
            (n, Hq, D)
        """
        prompt_k, prompt_v = self.prompt_cache[layer]
        B, kv_heads, P, D = prompt_k.shape
        n, G, share = len(q), self.params.num_responses, q.shape[1] // kv_heads
        response_k, response_v = self.append(layer, k, v)  # (n, Hkv, cached, D)
        q = q.view(n, kv_heads, share, D) * D**-0.5
        by_prompt = q.view(B, G, kv_heads, share, D).transpose(1, 2).reshape(B, kv_heads, G * share, D)
        scores = by_prompt @ prompt_k.transpose(2, 3) + self.mask.to(q.dtype)  # (B, Hkv, G * share, P)
        scores = scores.view(B, kv_heads, G, share, P).transpose(1, 2).reshape(n, kv_heads, share, P)
        weights = torch.cat([scores, q @ response_k.transpose(2, 3)], -1).float().softmax(-1).to(q.dtype)
        of_response = weights[..., P:] @ response_v  # (n, Hkv, share, D)
        weights = weights[..., :P].view(B, G, kv_heads, share, P).transpose(1, 2).reshape(B, kv_heads, G * share, P)
        of_prompt = (weights @ prompt_v).view(B, kv_heads, G, share, D).transpose(1, 2).reshape(n, kv_heads, share, D)
        return (of_response + of_prompt).flatten(1, 2)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Append keys and values (n, Hkv, D) of one token to the layer's cache, which doubles when full.

        Returns:
            (2, n, Hkv, cached, D)
        """
        cache = self.response_cache.get(layer)
        if cache is None or self.cached > cache.shape[3]:
            grown = k.new_empty(2, *k.shape[:2], max(32, 2 * (self.cached - 1)), k.shape[2])
            if cache is not None:
                grown[:, :, :, : self.cached - 1] = cache[:, :, :, : self.cached - 1]
            cache = self.response_cache[layer] = grown
        cache[0, :, :, self.cached - 1], cache[1, :, :, self.cached - 1] = k, v
        return cache[:, :, :, : self.cached]

    def drop_finished(self, unfinished: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """Evict finished groups once they are half of the batch, so that a few long responses run alone.

        Args:
            unfinished: bool, one per prompt of the call; token: (B * G,).

        Returns:
            The tokens of the groups that stay.
        """
        keep = unfinished[self.alive]  # (B,)
        if 2 * int(keep.sum()) > len(keep):
            return token
        G = self.params.num_responses
        groups = keep.nonzero().flatten().to(self.device)
        rows = (groups[:, None] * G + torch.arange(G, device=self.device)).flatten()
        self.alive = self.alive[keep]
        self.mask, self.start, self.uniforms = self.mask[groups], self.start[rows], self.uniforms[rows]
        self.prompt_cache = {layer: (k[groups], v[groups]) for layer, (k, v) in self.prompt_cache.items()}
        self.response_cache = {layer: cache[:, rows] for layer, cache in self.response_cache.items()}
        return token[rows]


def draw(
    hidden: torch.Tensor, head: torch.Tensor, uniforms: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row, by inverting the cumulative distribution.

    The vocabulary is searched in two levels, blocks and then the tokens of one block, in float64: the rounding error
    of an fp32 cumulative sum over 150k tokens would exceed most probabilities.

    Args:
        hidden: (n, H); head: (V, H); uniforms: (n,) float64 in [0, 1).

    Returns:
        Tokens (n,) int64 and their log-probs (n,).
    """
    z = (hidden @ head.T.to(hidden.dtype)).float()  # (n, V)
    if params.banned_ids:
        z.index_fill_(1, torch.tensor(params.banned_ids, device=z.device), float("-inf"))
    if params.temperature not in (0.0, 1.0):
        z.div_(params.temperature)
    if params.top_k or params.top_p < 1:
        truncate(z, params.top_p, params.top_k)
    n, V = z.shape
    z.sub_(z.amax(1, keepdim=True))
    token = z.argmax(1) if params.temperature == 0 else None
    block = min(V & -V, 1024)  # the largest power of two that divides V
    e = z.exp_().view(n, V // block, block)  # (n, blocks, block); in place, a second buffer costs more than the exp
    sums = e.sum(2).double()  # (n, blocks)
    total = sums.sum(1, keepdim=True)  # (n, 1)
    if token is None:
        target = uniforms[:, None] * total
        coarse = _first_above(sums, target)  # (n, 1)
        rest = target - (sums.cumsum(1) - sums).gather(1, coarse)
        inside = e[torch.arange(n, device=z.device), coarse[:, 0]].double()  # (n, block)
        token = (coarse * block + _first_above(inside, rest))[:, 0]
    return token, (z.gather(1, token[:, None]).log() - total.log())[:, 0]


def _first_above(mass: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Index (n, 1) of the first entry of `mass` (n, k) whose cumulative sum exceeds `target` (n, 1).

    Never the index of an empty entry: if rounding keeps the sum below the target, the last entry that is not empty.
    """
    above = (mass.cumsum(1) > target) & (mass > 0)
    last = mass.shape[1] - 1 - (mass > 0).flip(1).int().argmax(1, keepdim=True)
    return torch.where(above.any(1, keepdim=True), above.int().argmax(1, keepdim=True), last)


def truncate(z: torch.Tensor, top_p: float, top_k: int) -> None:
    """Set logits (n, V) outside the top k, then outside the nucleus p, to -inf, in place. The likeliest token stays."""
    if top_k:
        z.masked_fill_(z < z.topk(min(top_k, z.shape[1])).values[:, -1:], float("-inf"))
    if top_p < 1:
        ordered, index = z.sort(dim=1, descending=True)
        p = ordered.softmax(1)
        z.scatter_(1, index, ordered.masked_fill(p.cumsum(1) - p >= top_p, float("-inf")))
