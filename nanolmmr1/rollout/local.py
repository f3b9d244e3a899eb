"""The embedded sampler: our own model with a KV cache, the default on a CPU.

Each prompt is prefilled once, packed with the others, and its keys and values are shared by its G
responses; responses are decoded together, one token a step. Tokens are drawn by inverting the
cumulative distribution at one uniform per (response, step), so what a response says depends on its
seed alone, not on its neighbours.
"""

import numpy as np
import torch

from nanolmmr1.kernels.attention import Spans, attention
from nanolmmr1.model.qwen import Qwen25VL
from nanolmmr1.parallel import dist
from nanolmmr1.parallel.export import published
from nanolmmr1.rollout import Group, Response, response_uniforms
from nanolmmr1.update.pack import concat_prompts


class LocalSampler:
    """Samples from the very modules that are trained, so there are no weights to hand over.

    Where these are sharded, from a whole copy of them on every rank, in fp32: gathering a block for each token would
    cost more than the token, and bind all ranks to the longest response of any. Made for models that fit twice.

    Args:
        policy: offers `model`, `cfg`, `device` and `autocast()`.
        max_sequences: responses decoded together; bounds the KV cache.
    """

    ranks, dtype, remembers, pool_bytes = 1, None, True, 0

    def __init__(self, policy, max_sequences=256):
        self.policy = policy
        self.max_sequences = max_sequences
        self.stats = {}
        self.model = policy.model
        if dist.sharded():
            with torch.device("meta"):
                self.model = Qwen25VL(policy.model.cfg).requires_grad_(False)
            self.model.to_empty(device=policy.device)
            self.update(published(policy.model))

    @torch.no_grad()
    def update(self, weights):
        """Take over new weights: an iterable of (published name, whole tensor)."""
        if self.model is self.policy.model:
            return
        own = dict(self.model.named_parameters())
        for name, tensor in weights:
            own[name].copy_(tensor)

    def sleep(self):
        pass

    def wake(self):
        pass

    def close(self):
        pass

    @torch.no_grad()
    def generate(self, prompts, params, seeds, advance=lambda n: None):
        """One group a prompt, in order.

        Args:
            prompts: [Prompt]; params: SamplingParams.
            seeds: one tuple of non-negative ints a prompt.
            advance: told how many more prompts are done, for progress displays; and 0 between tokens.
        """
        groups, size = [], max(1, self.max_sequences // params.num_responses)
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            with self.policy.autocast():
                groups += _Decoder(self.policy, self.model, prompts[part], params, seeds[part]).run(advance)
            advance(len(prompts[part]))
        return groups


class _Decoder:
    """Some prompts and their responses, decoded to the end.

    B prompts, G responses each; response b * G + g belongs to prompt b. Caches per layer:
    prefix (B, Hkv, P, D), shared by the group, and own (B * G, Hkv, capacity, D).
    """

    def __init__(self, policy, model, prompts, params, seeds):
        self.model, self.device, self.params, self.prompts = model, policy.device, params, prompts
        self.attention = policy.cfg.pack.attention
        G = params.num_responses
        uniforms = [response_uniforms(seed, g, params.max_tokens) for seed in seeds for g in range(G)]
        self.uniforms = torch.from_numpy(np.stack(uniforms)).to(self.device)  # (B * G, R) float64
        self.start = torch.tensor([p.next_position for p in prompts], device=self.device).repeat_interleave(
            G
        )  # (B * G,)
        self.alive = torch.arange(len(prompts))  # prompts still being decoded
        self.used, self.own = 0, {}
        self.stop = torch.tensor(params.stop_ids, device=self.device)

    def run(self, advance):
        B, G, limit = len(self.prompts), self.params.num_responses, self.params.max_tokens
        ids = torch.zeros(B * G, limit, dtype=torch.int64)
        logp = torch.zeros(B * G, limit)
        length = torch.full((B * G,), limit)
        stopped = torch.zeros(B * G, dtype=torch.bool)
        hidden = self.prefill().repeat_interleave(G, 0)  # (B * G, H)
        for step in range(limit):
            advance(0)
            rows = (self.alive[:, None] * G + torch.arange(G)).flatten()  # which responses are in the batch
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

    def prefill(self):
        """Run the prompts through the model, packed; returns the last hidden state of each, (B, H)."""
        packed = concat_prompts(self.prompts).to(self.device)
        lengths = torch.tensor([len(p.ids) for p in self.prompts])
        ends = lengths.cumsum(0)
        starts, zero = ends - lengths, torch.zeros_like(ends)
        spans = Spans(torch.stack([starts, ends, starts, ends, zero, zero, zero + 1], 1), int(ends[-1]))
        # Padded gather: rows past a prompt's end repeat its last token and are masked.
        index = starts[:, None] + torch.arange(int(lengths.max())).minimum(lengths[:, None] - 1)  # (B, P)
        index = index.to(self.device)
        self.mask = torch.zeros(index.shape).masked_fill(
            torch.arange(index.shape[1]) >= lengths[:, None], float("-inf")
        )
        self.mask = self.mask[:, None, None].to(self.device)  # (B, 1, 1, P)
        self.prefix, impl = {}, self.attention

        def attend(layer, q, k, v):
            self.prefix[layer] = tuple(x[index].transpose(1, 2).contiguous() for x in (k, v))  # (B, Hkv, P, D)
            return attention(q, k, v, spans, impl=impl)

        images = packed.patches, packed.grid, packed.image_slots
        hidden = self.model(packed.ids, packed.positions, attend, *images, impl=impl)  # (T, H)
        return hidden[(ends - 1).to(self.device)]

    def decode(self, token):
        """One more token (B * G,) for each response; returns the hidden states that predict the next, (B * G, H)."""
        positions = (self.start + self.used).expand(3, -1)
        self.used += 1
        return self.model(token, positions, self.attend)

    def attend(self, layer, q, k, v):
        """q (B * G, Hq, D) over its prompt's keys, shared by the group, and its own."""
        kp, vp = self.prefix[layer]
        B, kv_heads, P, D = kp.shape
        n, G, share = len(q), self.params.num_responses, q.shape[1] // kv_heads
        ko, vo = self.append(layer, k, v)  # (n, Hkv, used, D)
        q = q.view(n, kv_heads, share, D) * D**-0.5
        shared = q.view(B, G, kv_heads, share, D).transpose(1, 2).reshape(B, kv_heads, G * share, D)
        before = shared @ kp.transpose(2, 3) + self.mask.to(q.dtype)  # (B, Hkv, G * share, P)
        before = before.view(B, kv_heads, G, share, P).transpose(1, 2).reshape(n, kv_heads, share, P)
        weights = torch.cat([before, q @ ko.transpose(2, 3)], -1).float().softmax(-1).to(q.dtype)
        own = weights[..., P:] @ vo  # (n, Hkv, share, D)
        weights = weights[..., :P].view(B, G, kv_heads, share, P).transpose(1, 2).reshape(B, kv_heads, G * share, P)
        prompt = (weights @ vp).view(B, kv_heads, G, share, D).transpose(1, 2).reshape(n, kv_heads, share, D)
        return (own + prompt).flatten(1, 2)

    def append(self, layer, k, v):
        """Add one token's keys and values (n, Hkv, D) to the layer's own cache, which doubles when full."""
        cache = self.own.get(layer)
        if cache is None or self.used > cache.shape[3]:
            grown = k.new_empty(2, *k.shape[:2], max(32, 2 * (self.used - 1)), k.shape[2])
            if cache is not None:
                grown[:, :, :, : self.used - 1] = cache[:, :, :, : self.used - 1]
            cache = self.own[layer] = grown
        cache[0, :, :, self.used - 1], cache[1, :, :, self.used - 1] = k, v
        return cache[:, :, :, : self.used]

    def drop_finished(self, unfinished, token):
        """Forget groups that have ended once they are half of the batch, so that stragglers run alone."""
        keep = unfinished[self.alive]  # (B,) of those in the batch
        if 2 * int(keep.sum()) > len(keep):
            return token
        G = self.params.num_responses
        groups = keep.nonzero().flatten().to(self.device)
        rows = (groups[:, None] * G + torch.arange(G, device=self.device)).flatten()
        self.alive = self.alive[keep]
        self.mask, self.start, self.uniforms = self.mask[groups], self.start[rows], self.uniforms[rows]
        self.prefix = {layer: tuple(x[groups] for x in kv) for layer, kv in self.prefix.items()}
        self.own = {layer: cache[:, rows] for layer, cache in self.own.items()}
        return token[rows]


def draw(hidden, head, uniforms, params):
    """Tokens and their log-probs, both (n,), at `uniforms` (n,) of the cumulative distribution.

    The vocabulary is walked in two levels, blocks and then the tokens of one block, in float64:
    a plain fp32 cumulative sum over 150k tokens would be off by more than most probabilities.
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
    best = z.argmax(1) if params.temperature == 0 else None
    block = min(V & -V, 1024)  # the largest power of two that divides V
    e = z.exp_().view(n, V // block, block)  # (n, blocks, block); in place, a second buffer costs more than the exp
    sums = e.sum(2).double()  # (n, blocks)
    total = sums.sum(1, keepdim=True)  # (n, 1)
    if best is None:
        target = uniforms[:, None] * total
        coarse = _first_above(sums, target)  # (n, 1)
        rest = target - (sums.cumsum(1) - sums).gather(1, coarse)
        inside = e[torch.arange(n, device=z.device), coarse[:, 0]].double()  # (n, block)
        best = (coarse * block + _first_above(inside, rest))[:, 0]
    return best, (z.gather(1, best[:, None]).log() - total.log())[:, 0]


def _first_above(mass, target):
    """Index (n, 1) of the first entry whose cumulative mass exceeds target; rounding never picks an empty entry."""
    above = (mass.cumsum(1) > target) & (mass > 0)
    last = mass.shape[1] - 1 - (mass > 0).flip(1).int().argmax(1, keepdim=True)
    return torch.where(above.any(1, keepdim=True), above.int().argmax(1, keepdim=True), last)


def truncate(z, top_p, top_k):
    """Set logits (n, V) outside the top k, then outside the nucleus p, to -inf, in place; the likeliest stays."""
    if top_k:
        z.masked_fill_(z < z.topk(min(top_k, z.shape[1])).values[:, -1:], float("-inf"))
    if top_p < 1:
        ordered, index = z.sort(dim=1, descending=True)
        p = ordered.softmax(1)
        z.scatter_(1, index, ordered.masked_fill(p.cumsum(1) - p >= top_p, float("-inf")))
