"""What learns, at which rate, and that a step without finite numbers leaves no trace."""

import math

import pytest
import torch
from small import BANNED, small_model, small_recipe, small_trainer
from torch.utils._python_dispatch import TorchDispatchMode

from nanolmmr1.errors import UserError
from nanolmmr1.kernels.linear_logprob import linear_logprob
from nanolmmr1.kernels.linear_loss import linear_loss
from nanolmmr1.rollout.sampler import SamplingParams
from nanolmmr1.schema import GRPO, Objective, Optim, Phase
from nanolmmr1.update import memory
from nanolmmr1.update.objective import Tokens, policy_loss
from nanolmmr1.update.pack import pack_groups
from nanolmmr1.update.policy import Policy, fused_objective, learning_rate


def started(**phase):
    cfg = small_recipe(phase=phase, optim={"weight_decay": 0.1})
    policy = Policy(small_model(), cfg.pack, cfg.optim)
    policy.start_phase(cfg.phases["train"])
    return policy


def everything(policy):
    return {**dict(policy.model.named_parameters()), **policy.optimizer_tensors()}


def give_gradients(policy, value):
    """The same gradient everywhere; 0.0 keeps the moments moving without a direction."""
    for p in policy.trained.values():
        p.grad = torch.full_like(p, value)


@pytest.mark.parametrize("freeze, frozen", [
    ([], ()),
    (["vision"], ("visual.",)),
    (["merger"], ("visual.merger.",)),
    (["language"], ("model.",)),
    (["embedding"], ("model.embed_tokens.",)),
    (["vision", "embedding"], ("visual.", "model.embed_tokens.")),
    (["model.layers.0.", "visual.patch_embed"], ("model.layers.0.", "visual.patch_embed.")),
])
def test_frozen_parts_get_neither_gradient_nor_update(freeze, frozen):
    policy = started(freeze=freeze)
    expected = {name for name, _ in policy.model.named_parameters() if not name.startswith(frozen)}
    assert set(policy.trained) == expected == {n for n, p in policy.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    give_gradients(policy, 0.01)
    policy.optimizer_step(1e-2, 0.0)
    changed = {name for name, p in policy.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == expected


def test_a_phase_thaws_what_the_one_before_froze():
    policy = started(freeze=["vision"])
    policy.start_phase(Phase())
    assert set(policy.trained) == {name for name, _ in policy.model.named_parameters()}


@pytest.mark.parametrize("freeze, words", [(["eyes"], "'eyes'"), (["vision", "language"], "nothing to train")])
def test_a_freeze_that_fits_nothing_or_leaves_nothing_is_refused(freeze, words):
    with pytest.raises(UserError, match=words):
        started(freeze=freeze)


def test_only_matrices_decay():
    policy = started()
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    give_gradients(policy, 0.0)
    policy.optimizer_step(0.5, 0.0)
    for name, p in policy.model.named_parameters():
        assert torch.allclose(p, before[name] * (1 - 0.5 * 0.1 if p.ndim > 1 else 1), atol=1e-7), name


@pytest.mark.parametrize("optim, rates", [
    (Optim(), [2.0] * 6),
    (Optim(warmup_steps=4), [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]),
    (Optim(schedule="cosine", min_lr_ratio=0.0), [1 + math.cos(math.pi * t / 6) for t in range(6)]),
    (Optim(schedule="cosine", warmup_steps=2, min_lr_ratio=0.5), [1.0, 2.0, 2.0, 1.5 + math.sqrt(0.125), 1.5,
                                                                  1.5 - math.sqrt(0.125)]),
    (Optim(schedule="cosine", warmup_steps=9), [2 * (t + 1) / 9 for t in range(6)]),
])
def test_learning_rates_follow_the_schedule(optim, rates):
    phase = Phase(lr=2.0, steps=6)
    assert [learning_rate(phase, optim, step) for step in range(6)] == pytest.approx(rates)


def test_the_rate_given_is_the_rate_used():
    policy = started()
    norm = policy.model.model.norm.weight  # not decayed; the first step of AdamW is the rate times the gradient's sign
    give_gradients(policy, 1e-3)
    policy.optimizer_step(0.25, 0.0)
    assert torch.allclose(norm, torch.ones_like(norm) - 0.25, atol=1e-3)


@pytest.mark.parametrize("gradient, loss", [(math.nan, 0.0), (math.inf, 0.0), (0.01, math.nan), (0.01, math.inf)])
def test_a_non_finite_loss_or_gradient_leaves_weights_and_moments_as_they_are(gradient, loss):
    policy = started()
    give_gradients(policy, 0.01)
    policy.optimizer_step(1e-2, 0.0)
    before = {name: t.clone() for name, t in everything(policy).items()}
    give_gradients(policy, 0.01)
    policy.model.model.norm.weight.grad[3] = gradient
    norm, updated = policy.optimizer_step(1e-2, loss)
    assert not updated
    assert math.isfinite(norm) == math.isfinite(gradient)
    after = everything(policy)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None for p in policy.model.parameters())


def test_gradients_are_clipped_to_the_norm_asked_for_and_reported_as_they_were():
    """With a large eps, AdamW's first update is proportional to the gradient."""
    moved = []
    for max_norm in (1e9, 0.5):
        cfg = small_recipe(optim={"eps": 1e6, "max_grad_norm": max_norm})
        policy = Policy(small_model(), cfg.pack, cfg.optim)
        policy.start_phase(cfg.phases["train"])
        norm_weight = policy.model.model.norm.weight.detach()
        before = norm_weight.clone()
        give_gradients(policy, 2.0)
        norm, _ = policy.optimizer_step(1e6, 0.0)
        moved.append(float((norm_weight - before).norm()))
        assert norm == pytest.approx(2.0 * math.sqrt(sum(p.numel() for p in policy.model.parameters())), rel=1e-4)
    assert moved[1] / moved[0] == pytest.approx(0.5 / norm, rel=1e-3)


def test_an_optimizer_given_its_tensors_back_goes_on_as_if_never_stopped(tmp_path):
    whole, broken = small_trainer(tmp_path / "whole"), small_trainer(tmp_path / "broken")
    for trainer in (whole, broken):
        trainer.step()
    tensors = {name: t.clone() for name, t in broken.policy.optimizer_tensors().items()}
    assert len(tensors) == 3 * len(broken.policy.trained)  # the tower's too, which has seen no image yet
    broken.policy.start_phase(broken.phase)
    assert not broken.policy.optimizer.state
    for name, tensor in broken.policy.optimizer_tensors().items():
        assert not tensor.any()
        tensor.copy_(tensors[name])
    for trainer in (whole, broken):
        trainer.step()
    pairs = zip(whole.policy.model.parameters(), broken.policy.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("changes", [
    {"kl_coef": 0.5, "kl_place": "reward", "kl_estimator": "k1"},
    {"kl_coef": 0.5, "kl_place": "loss", "kl_estimator": "k2", "kl_ratio": True},
    {"tis_cap": 1.5, "entropy_coef": 0.2, "clip_ratio_dual": 3.0},
    {"loss_type": "cispo", "tis_cap": 0.0, "kl_coef": 0.1, "clip_ratio_low": 0.4, "clip_ratio_high": 0.1},
], ids=lambda changes: ", ".join(changes))
def test_the_numbers_of_a_fused_objective_say_what_policy_loss_does(device, changes):
    torch.manual_seed(0)
    objective = Objective(**dict(GRPO, tis_cap=0.0) | changes)
    x, w, y = torch.randn(16, 8, device=device), torch.randn(20, 8, device=device), torch.arange(16, device=device)
    near = linear_logprob(x, w, y)[0]
    old, sampler, ref = (near + 0.6 * torch.randn(16, device=device) for _ in range(3))
    advantage, weight = torch.randn(16, device=device), torch.rand(16, device=device)
    tokens = Tokens(advantage, weight, torch.zeros_like(y), sampler, old, ref)

    def run(impl, fused):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss, _, _ = linear_loss(
            a, b, y, lambda logp, entropy, rows: policy_loss(logp, entropy, tokens[rows], objective), fused=fused,
            impl=impl)
        loss.backward()
        return loss.detach(), a.grad, b.grad

    ours, gold = run("triton", fused_objective(tokens, objective)), run("chunked", None)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(ours, gold, strict=True))


def test_a_response_that_couples_tokens_is_not_fused():
    tokens = Tokens(*torch.zeros(4, 3))
    assert fused_objective(tokens, Objective(**dict(GRPO, loss_type="gspo", tis_cap=0.0))) is None


@pytest.mark.parametrize("pack, dtype", [({}, torch.bfloat16), ({"head": "triton"}, torch.float32)])
def test_rounded_logits_are_refused_where_they_cannot_be_had(pack, dtype):
    cfg = small_recipe(pack={"head_logits": "bfloat16"} | pack)
    with pytest.raises(UserError, match="pack.head_logits=bfloat16 needs"):
        Policy(small_model(), cfg.pack, cfg.optim, dtype=dtype)


def test_bf16_compute_on_a_cpu_keeps_fp32_log_probs(tmp_path):
    trainer = small_trainer(tmp_path)
    trainer.policy.dtype = torch.bfloat16
    record = trainer.step()
    assert math.isfinite(record["actor/grad_norm"]) and record["mismatch/logp_abs"] < 0.05


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(("products", "blocks"), [(0, 0), (1, 0), (3, 0), (3, 1), (3, 3)])
def test_a_budget_recomputes_as_much_as_a_pack_asks_for_and_changes_no_gradient(tmp_path, products, blocks):
    trainer = small_trainer(tmp_path, images=True)
    policy, model = trainer.policy, trainer.policy.model
    pack, tokens = pack_of(trainer)
    kind = memory.Kind("cpu", 4, 4)
    kept = memory.kept(model.cfg, pack.num_tokens, len(pack.patches), kind, products, blocks)

    with Products() as plainly:
        policy.backward(pack, tokens, trainer.phase.objective, 1.0)
    plain = [p.grad for p in policy.trained.values()]
    policy.discard()
    policy.pack.checkpoint_activations, policy.pack.activation_budget_gb = "budget", kept / 1e9
    with Products() as again:
        policy.backward(pack, tokens, trainer.phase.objective, 1.0)
    every = (*model.model.layers, *model.visual.blocks)
    assert [block.recompute for block in every] == [True] * blocks + [False] * (3 - blocks)
    assert [block.mlp.recompute for block in every] == [blocks <= i < products for i in range(3)]
    assert (again.count > plainly.count) == (blocks > 0)  # a product of SwiGLU is no matrix product
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, policy.trained.values(), strict=True))


def pack_of(trainer):
    """A pack of four groups, and what the objective knows of its tokens."""
    prompts = [trainer.processor.prepare(row, False) for row in trainer.rows[:4]]
    groups = trainer.sampler.generate(prompts, SamplingParams(2, 8, banned_ids=BANNED), [(n,) for n in range(4)])
    (pack,), _ = pack_groups(groups, 1 << 20)
    ones = torch.ones(pack.num_scored, device=trainer.policy.device)
    return pack, Tokens(ones, ones, torch.zeros_like(ones, dtype=torch.int64), torch.zeros_like(ones))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_same_pack_gives_the_same_bits(tmp_path, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    trainer = small_trainer(tmp_path, images=True)
    pack, tokens = pack_of(trainer)
    cfg, dtype = trainer.cfg, torch.bfloat16 if device == "cuda" else torch.float32
    policy = Policy(trainer.policy.model.to(device), cfg.pack, cfg.optim, BANNED, dtype)
    policy.start_phase(trainer.phase)
    tokens = Tokens(*(x.to(device) for x in (tokens.advantage, tokens.weight, tokens.response, tokens.sampler_logp)))
    found = []
    for _ in range(3):
        stats = policy.backward(pack, tokens, trainer.phase.objective, 1.0)
        found.append([*(p.grad.clone() for p in policy.trained.values()), stats["logp"], stats["loss"]])
        policy.discard()
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
