"""The embedded sampler: the trainer's own distribution, drawn from exactly, whatever stands in the same batch."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from nanolmmr1 import schema
from nanolmmr1.data.prompt import Processor
from nanolmmr1.data.rows import Row
from nanolmmr1.model import weights
from nanolmmr1.rollout.local import LocalSampler, draw
from nanolmmr1.rollout.sampler import SamplingParams, response_uniforms
from nanolmmr1.schema import Prompt as PromptConfig
from nanolmmr1.update.pack import pack_groups, scored
from nanolmmr1.update.policy import Policy


def picture(width, height, seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


ROWS = {
    "text": Row("How much is 3 + 4?", "7"),
    "image": Row("What is shown in <image>?", "noise", [picture(140, 60, 0)]),
    "images": Row("<image> or <image>, or <image>?", "all",
                  [picture(90, 90, 1), picture(30, 200, 2), picture(56, 56, 3)]),
}


@pytest.fixture(scope="module")
def processor(tiny):
    return Processor(tiny, PromptConfig(max_pixels=20000))


@pytest.fixture(scope="module")
def policy(tiny, processor):
    """A policy with opinions: logits of a random model are nearly flat, and would hide most mistakes."""
    model = weights.load(tiny)
    with torch.no_grad():
        model.model.norm.weight.mul_(12)
    return Policy(model, schema.Pack(), schema.Optim(), processor.banned_ids)


@pytest.fixture(scope="module")
def prompts(processor):
    return [processor.prepare(row, False) for row in ROWS.values()]


def params(policy, count=3, tokens=12, **changes):
    return SamplingParams(count, tokens, banned_ids=policy.banned_ids, **changes)


def seeds(prompts):
    return [(7, len(p.ids)) for p in prompts]


def ids(groups):
    return [r.ids.tolist() for group in groups for r in group.responses]


@pytest.mark.parametrize("temperature, tokens", [(1.0, 12), (0.7, 70)])  # 70: the cache has grown twice
def test_log_probs_are_the_trainers(policy, prompts, temperature, tokens):
    groups = LocalSampler(policy).generate(
        prompts, params(policy, tokens=tokens, temperature=temperature), seeds(prompts))
    (pack,), _ = pack_groups(groups, 1 << 20)
    logp, _ = policy.logprobs(pack, temperature)
    sampled = torch.cat([r.logp for group in groups for r in group.responses])
    assert len(sampled) == 3 * 3 * tokens and sampled.std() > 1
    assert (logp - sampled[pack.flat_index]).abs().max() < 1e-4


def test_a_response_does_not_depend_on_what_stands_beside_it(policy, prompts):
    sampler = LocalSampler(policy)
    together = sampler.generate(prompts, params(policy), seeds(prompts))
    alone = [sampler.generate([p], params(policy), seeds([p]))[0] for p in prompts]
    backwards = sampler.generate(prompts[::-1], params(policy), seeds(prompts[::-1]))[::-1]
    few = LocalSampler(policy, max_sequences=4).generate(prompts, params(policy), seeds(prompts))
    assert ids(together) == ids(alone) == ids(backwards) == ids(few)
    assert [group.prompt for group in few] == prompts


def test_every_response_has_a_seed_of_its_own(policy, prompts):
    twice = LocalSampler(policy).generate(prompts[:1] * 3, params(policy), [(0, 1), (0, 1), (0, 2)])
    first, same, other = ([tuple(r.ids.tolist()) for r in group.responses] for group in twice)
    assert first == same
    assert len({*first, *other}) == 6


def test_greedy_takes_the_likeliest_token_of_the_whole_forward_pass(policy, prompts):
    groups = LocalSampler(policy).generate(prompts, params(policy, 1, temperature=0.0), seeds(prompts))
    (pack,), _ = pack_groups(groups, 1 << 20)
    with torch.no_grad():
        logits = policy.forward(pack, policy.model, lambda hidden, head: scored(hidden, pack) @ head.T)  # (N, V)
    logits[:, policy.banned_ids] = float("-inf")
    assert torch.equal(logits.argmax(1), pack.target)


def test_responses_end_at_their_first_stop_token_and_no_other_changes(policy, prompts):
    """Stop tokens are chosen among what was said, so that the first two groups end and leave the last one alone."""
    sampler = LocalSampler(policy)
    free = sampler.generate(prompts, params(policy, tokens=40), seeds(prompts))
    said = [r.ids.tolist() for group in free for r in group.responses]
    stops = (*(words[3] for words in said[:3]), *(words[10] for words in said[3:6]))
    ended = sampler.generate(prompts, params(policy, tokens=40, stop_ids=stops), seeds(prompts))
    responses = [r for group in ended for r in group.responses]
    for whole, response in zip(said, responses, strict=True):
        first = next((i for i, token in enumerate(whole) if token in stops), None)
        assert response.ids.tolist() == (whole if first is None else whole[:first + 1])
        assert response.finish == ("length" if first is None else "stop")
        assert len(response.logp) == len(response.ids)
    assert {r.finish for r in responses[:6]} == {"stop"} and responses[-1].finish == "length"
    (pack,), _ = pack_groups(ended, 1 << 20)
    sampled = torch.cat([r.logp for r in responses])
    assert (policy.logprobs(pack, 1.0)[0] - sampled[pack.flat_index]).abs().max() < 1e-4


def test_banned_tokens_are_never_drawn(policy, prompts):
    sampler = LocalSampler(policy)
    free = sampler.generate(prompts, params(policy), seeds(prompts))
    banned = {token for response in ids(free) for token in response}
    kept = sampler.generate(prompts, SamplingParams(3, 12, banned_ids=tuple(banned)), seeds(prompts))
    assert not banned & {token for response in ids(kept) for token in response}


def distribution(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The rule in plain NumPy: temperature, then the top k, then the smallest set that holds top_p, renormalised."""
    p = np.exp(np.float64(logits) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    return p / p.sum()


@pytest.mark.parametrize("size", [7, 48, 1536])  # in blocks of 1, 16 and 512
@pytest.mark.parametrize("rule", [
    {}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.6, "temperature": 1.5},
    {"top_p": 1e-9}, {"top_k": 5000},
])
def test_tokens_come_as_often_as_they_should(size, rule):
    """Uniforms on an even grid leave no room for luck: every count is within two of its expectation."""
    logits = 3 * torch.randn(size, generator=torch.Generator().manual_seed(size))
    expected, n = distribution(logits, **rule), 4000
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    token, logp = draw(torch.ones(n, 1), logits[:, None], uniforms, SamplingParams(1, 1, **rule))
    counts = np.bincount(token, minlength=size)
    assert np.abs(counts - n * expected).max() < 2
    assert np.abs(logp.numpy() - np.log(expected[token])).max() < 1e-5


def test_the_uniforms_of_all_responses_are_uniform_and_independent():
    drawn = np.array([response_uniforms((0, prompt), g, 20) for prompt in range(50) for g in range(8)])  # (400, 20)
    assert 0 <= drawn.min() and drawn.max() < 1
    counts = np.histogram(drawn, bins=50, range=(0, 1))[0]
    assert ((counts - 160) ** 2 / 160).sum() < 85.4  # chi-square, 49 degrees of freedom, p = 0.001
    off_diagonal = np.abs(np.corrcoef(drawn) - np.eye(400))
    assert off_diagonal.max() < 0.99 and off_diagonal.mean() < 0.25  # 20 samples: 0.18 by chance


@pytest.mark.parametrize("size", [7, 48, 1536])
@pytest.mark.parametrize("uniform", [0.0, 0.3, 0.5, 1 - 2**-53])
def test_impossible_tokens_are_never_drawn_at_the_edges_of_the_unit_interval(size, uniform):
    logits = torch.full((size, 1), -200.0)  # exp underflows to zero
    logits[size // 3], logits[size // 2] = 1.0, 2.0
    banned = (0, size // 2 + 1, size - 1)
    token, logp = draw(torch.ones(1, 1), logits, torch.tensor([uniform], dtype=torch.float64),
                       SamplingParams(1, 1, banned_ids=banned))
    share = 1 / (1 + np.e)  # of the first
    assert token.item() == (size // 3 if uniform < share else size // 2)
    assert logp.item() == pytest.approx(np.log(share if uniform < share else 1 - share), abs=1e-6)


def test_a_vocabulary_of_many_small_probabilities_is_drawn_from_exactly():
    """Over 150,000 tokens, sums in fp32 are off by a good part of a token's probability."""
    logits = 0.5 * torch.randn(151_936, generator=torch.Generator().manual_seed(0))
    cumulative, wrong = np.cumsum((logits - logits.max()).exp().double().numpy()), 0
    for seed in range(4):
        uniforms = torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        token, _ = draw(torch.ones(400, 1), logits[:, None], uniforms, SamplingParams(1, 1))
        expected = np.searchsorted(cumulative, uniforms.numpy() * cumulative[-1], side="right")
        wrong += (token.numpy() != expected).sum()
    assert wrong <= 1
