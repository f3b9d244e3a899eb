"""The model: equal to transformers', and a group packed once equals its responses run one by one."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from nanolmmr1.data.group import Group, Response
from nanolmmr1.data.prompt import Processor
from nanolmmr1.data.rows import Row
from nanolmmr1.kernels import attention, linear_loss
from nanolmmr1.model import weights
from nanolmmr1.model.qwen import MLP, Images
from nanolmmr1.schema import Prompt as PromptConfig
from nanolmmr1.update.pack import Piece, build, deal, pack_groups, scored


def picture(path, width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def prompts(tiny, tmp_path_factory):
    """Name -> Prompt. A window is 4 x 4 merged units; 5 x 3, 11 x 3 and 2 x 9 units leave ragged ones."""
    folder = tmp_path_factory.mktemp("pictures")
    a, b, c, d = (
        picture(folder / f"{seed}.png", width, height, seed)
        for seed, (width, height) in enumerate([(140, 84), (300, 90), (20, 20), (64, 250)])
    )
    processor = Processor(tiny, PromptConfig())
    rows = {
        "text": Row("How much is 1+1?", "2", id="text"),
        "one image": Row("<image>\nHow many?", "2", [a], id="one"),
        "three images": Row("Is <image> like <image> or <image>?", "2", [b, c, d], id="three"),
        "short": Row("Hi", "2", id="short"),
    }
    return {name: processor.prepare(row, False) for name, row in rows.items()}


def hidden_states(model, pack, spans, impl="sdpa"):
    """(T, H), in the model's dtype; pack: ids, positions, patches, grid and image_slots."""
    attend = lambda layer, q, k, v: attention.attention(q, k, v, spans, impl=impl)  # noqa: E731
    images = Images(pack.patches.to(model.head.dtype), pack.grid.tolist(), pack.image_slots)
    return model(pack.ids, pack.positions, attend, images)


def test_the_vision_tower_attends_by_the_impl_it_is_given(tiny, prompts):
    model, prompt = weights.load(tiny), prompts["one image"]
    with pytest.raises(ValueError, match='impl="varlen"'):  # which a CPU does not have
        model.visual(prompt.patches, prompt.grid.tolist(), "varlen")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_an_mlp_of_any_width_is_a_plain_one(bias, recompute):
    """Products see a width that is a multiple of 8; weights, results and gradients are those of the width itself."""
    torch.manual_seed(0)
    mlp, x = MLP(16, 21, bias).double(), torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    mlp.recompute, seen = recompute, []
    plain = x.detach().clone().requires_grad_()
    gate, up = (F.linear(plain, proj.weight, proj.bias) for proj in (mlp.gate_proj, mlp.up_proj))
    wanted = F.linear(F.silu(gate) * up, mlp.down_proj.weight, mlp.down_proj.bias)
    upstream = torch.randn_like(wanted)
    inputs = [plain, *mlp.parameters()]
    gold = [wanted, *torch.autograd.grad(wanted, inputs, upstream)]
    out = mlp(x)
    ours = [out, *torch.autograd.grad(out, [x, *mlp.parameters()], upstream)]
    assert all(a.shape == b.shape and (a - b).abs().max() < 1e-14 for a, b in zip(ours, gold, strict=True))
    down, mlp.down = mlp.down, lambda gate, up: seen.append(gate.shape) or down(gate, up)
    mlp(x)
    assert seen == [(5, 24)] and [p.shape for p in mlp.parameters() if p.ndim > 1] == [(21, 16), (21, 16), (16, 21)]


def scored_hidden(model, pack):
    """(N, H)"""
    return scored(hidden_states(model, pack, pack.spans), pack)


def prompt_logits(model, *prompts):
    """Logits (T, V) of prompts packed end to end, split by prompt."""
    pack = build([Piece(Group(prompt, []), [], [], len(prompt.ids), len(prompt.patches)) for prompt in prompts])
    return (hidden_states(model, pack, pack.spans) @ model.head.T).split([len(prompt.ids) for prompt in prompts])


def theirs_logits(model, prompt):
    images = dict(pixel_values=prompt.patches, image_grid_thw=prompt.grid) if len(prompt.grid) else {}
    kinds = (prompt.ids == model.config.image_token_id).int()[None]
    return model(input_ids=prompt.ids[None], mm_token_type_ids=kinds, use_cache=False, **images).logits[0]  # (L, V)


def error(ours, theirs):
    """Largest difference in units of theirs' largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def worst_gradient(ours, theirs):
    """(relative error, name) of the worst of two name -> gradient mappings."""
    assert ours.keys() == theirs.keys()
    return max((error(ours[name], theirs[name]), name) for name in theirs)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="module", params=["tied", "untied"])
def both(request):
    """Our model and transformers', from one folder."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder = request.getfixturevalue("tiny" if request.param == "tied" else "tiny_untied")
    return weights.load(folder), Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ["text", "one image", "three images"])
def test_logits_equal_those_of_transformers(both, prompts, name):
    ours, theirs = both
    with torch.no_grad():
        assert error(prompt_logits(ours, prompts[name])[0], theirs_logits(theirs, prompts[name])) <= 1e-5


def test_prompts_packed_together_equal_transformers_run_on_each_alone(both, prompts):
    ours, theirs = both
    with torch.no_grad():
        packed = prompt_logits(ours, *prompts.values())
        for prompt, logits in zip(prompts.values(), packed, strict=True):
            assert error(logits, theirs_logits(theirs, prompt)) <= 1e-5


def test_gradients_of_all_parameters_equal_those_of_transformers(both, prompts):
    ours, theirs = both
    prompt = prompts["three images"]
    upstream = torch.randn(len(prompt.ids), ours.cfg.vocab_size, generator=torch.Generator().manual_seed(0))
    for model in both:
        model.zero_grad()
    (prompt_logits(ours, prompt)[0] * upstream).sum().backward()
    (theirs_logits(theirs, prompt) * upstream).sum().backward()
    expected = {weights.published_name(name): grad for name, grad in gradients(theirs).items()}
    worst, name = worst_gradient(gradients(ours), expected)
    assert worst <= 1e-5, name


@dataclass
class World:
    """Groups with one flat axis of M scored tokens, and a signed weight for the log-prob and entropy of each."""

    groups: list
    logp_weight: torch.Tensor  # (M,)
    entropy_weight: torch.Tensor  # (M,)
    temperature: float = 0.7


@pytest.fixture(scope="module")
def world(prompts):
    generator = torch.Generator().manual_seed(1)

    def response(length):
        ids = torch.randint(0, 151_000, (length,), generator=generator)
        return Response(ids, torch.zeros(length), "stop")

    groups = [Group(prompt, [response(length) for length in (1, 9, 2)]) for prompt in prompts.values()]
    count = sum(len(r.ids) for group in groups for r in group.responses)
    return World(groups, *torch.randn(2, count, generator=generator))


def packed_gradients(model, world, tokens_per_micro_batch=10_000):
    """Loss and name -> gradient over the packs that this budget gives, and how many packs."""
    model.zero_grad()
    packs, _ = pack_groups(world.groups, tokens_per_micro_batch)
    total = 0
    for pack in packs:
        a, b = world.logp_weight[pack.flat_index], world.entropy_weight[pack.flat_index]
        loss, _, _ = linear_loss.linear_loss(
            scored_hidden(model, pack), model.head, pack.target,
            lambda logp, entropy, rows, a=a, b=b: a[rows] * logp + b[rows] * entropy,
            temperature=world.temperature, chunk_tokens=7)  # fmt: skip
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model), len(packs)


def replicated_gradients(model, world):
    """The same from every response as a sequence of its own, with its own copy of the prompt, in plain torch."""
    model.zero_grad()
    total, first = 0, 0
    for group in world.groups:
        prompt = group.prompt
        for response in group.responses:
            length, count = len(prompt.ids), len(response.ids)
            after = int(prompt.positions.max()) + 1 + torch.arange(count)
            alone = replace(
                prompt,
                ids=torch.cat([prompt.ids, response.ids]),
                positions=torch.cat([prompt.positions, after.repeat(3, 1)], 1),
            )
            end = length + count
            spans = attention.Spans([[0, end, 0, end, 0, 0, 1]], end)
            hidden = hidden_states(model, alone, spans, impl="reference")[length - 1 : -1]
            logps = (hidden @ model.head.T / world.temperature).log_softmax(-1)  # (R, V)
            logp = logps.gather(1, response.ids[:, None]).squeeze(1)
            entropy = -(logps.exp() * logps).sum(-1)
            part = slice(first, first + count)
            loss = (world.logp_weight[part] * logp + world.entropy_weight[part] * entropy).sum()
            loss.backward()
            total, first = total + float(loss.detach()), first + count
    return total, gradients(model)


@pytest.fixture(scope="module")
def gold(tiny, world):
    return replicated_gradients(weights.load(tiny, torch.float64), world)


def assert_equals_gold(loss, grads, gold, bound):
    assert abs(loss - gold[0]) <= bound * abs(gold[0])
    worst, name = worst_gradient(grads, gold[1])
    assert worst <= bound, name


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_groups_packed_once_equal_their_responses_with_a_prompt_each(tiny, world, gold, dtype, bound):
    loss, grads, count = packed_gradients(weights.load(tiny, dtype), world)
    assert count == 1
    assert_equals_gold(loss, grads, gold, bound)


# At 30 tokens the longer groups fall into single responses, at 100 all but the longest stay whole.
@pytest.mark.parametrize(("budget", "packs"), [(30, 10), (100, 3)])
def test_any_split_into_micro_batches_gives_the_same_gradient(tiny, world, gold, budget, packs):
    loss, grads, count = packed_gradients(weights.load(tiny, torch.float64), world, budget)
    assert count == packs
    assert_equals_gold(loss, grads, gold, 1e-10)


def test_activation_checkpointing_gives_gradients_equal_to_the_bit(tiny, world):
    plain, checkpointed = weights.load(tiny), weights.load(tiny)
    for block in (*checkpointed.model.layers, *checkpointed.visual.blocks):
        block.recompute = True
    calls = []
    for part in (checkpointed.model.layers[0].self_attn, checkpointed.visual.blocks[0].attn):
        part.register_forward_pre_hook(lambda part, _: calls.append(type(part).__name__))
    loss, grads, _ = packed_gradients(plain, world)
    again, grads_again, _ = packed_gradients(checkpointed, world)
    once = ["VisionAttention", "LanguageAttention"]
    assert calls == [*once, *reversed(once)]  # each forward ran twice
    assert loss == again
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


def test_a_stray_image_token_in_a_response_is_a_token_like_any_other(tiny, prompts):
    model, pad, other = weights.load(tiny), 151_655, 1000
    with torch.no_grad():
        model.model.embed_tokens.weight[pad] = model.model.embed_tokens.weight[other]
        response = torch.tensor([5, other, 7, 8])
        group = Group(prompts["three images"], [Response(response, torch.zeros(4), "stop")])
        plain = build(deal([group], 1000)[0][0][0])
        stray = replace(plain, ids=plain.ids.clone())
        place = int((plain.ids == other).nonzero()[-1])
        stray.ids[place] = pad
        assert place >= len(prompts["three images"].ids)
        assert torch.equal(scored_hidden(model, stray), scored_hidden(model, plain))
