"""The model under training: hidden states of packs, `score` (no gradient), `learn` (gradient), `apply` (one update).

Master weights are fp32 (or, by `optim.weights`, bf16); on a GPU the computation runs in bfloat16 under autocast.
Gradients of all micro-batches and ranks of an optimiser step add up before `apply`; since per-token weights already
hold the step's one denominator, no cut into micro-batches or ranks changes the sum.

Next: shard.py, how the model lies on several ranks; optim.py, the optimiser of bf16 weights.
"""

import contextlib
import math

import torch

from nanolmmr1.errors import UserError
from nanolmmr1.kernels.attention import attention
from nanolmmr1.kernels.linear_logprob import linear_logprob
from nanolmmr1.kernels.linear_loss import FusedObjective, linear_loss
from nanolmmr1.parallel.fsdp import reshard, sum_over_hosts
from nanolmmr1.update.memory import Kind, to_recompute
from nanolmmr1.update.objective import fold_importance, needs_whole_sequences, policy_loss, policy_stats
from nanolmmr1.update.optim import StochasticAdamW
from nanolmmr1.update.pack import scored

PARTS = {"vision": "visual.", "merger": "visual.merger.", "language": "model.", "embedding": "model.embed_tokens."}


class Policy:
    """A Qwen25VL with its optimiser and, where KL asks for it, its reference.

    With bf16 master weights the gradients of micro-batches are added in bf16, as FSDP keeps them in the weights' dtype
    (those of HSDP wait in fp32, see shard.sum_over_hosts).

    Args:
        model: Qwen25VL with master weights, plain or sharded.
        cfg: the recipe; banned_ids: token ids that no response may hold.
        dtype: of the computation. device: where it runs; None: where the head is.

    Raises:
        UserError: pack.head_logits asks for what the head cannot do here.
    """

    def __init__(self, model, cfg, banned_ids=(), dtype=torch.float32, device=None):
        self.model, self.cfg, self.banned_ids, self.dtype = model, cfg, tuple(banned_ids), dtype
        self.device = torch.device(device) if device else model.head.device
        triton = cfg.pack.head == "triton" or (cfg.pack.head == "auto" and self.device.type == "cuda")
        if cfg.pack.head_logits == "bfloat16" and not (triton and dtype == torch.bfloat16):
            raise UserError(
                f"pack.head_logits=bfloat16 needs pack.head=triton and dtype=bfloat16; here {cfg.pack.head} on "
                f"{self.device.type} and {str(dtype).removeprefix('torch.')}: leave it at float32"
            )
        self.reference = None
        tower, language = (
            sum(p.numel() for p in blocks.parameters()) for blocks in (model.visual.blocks, model.model.layers)
        )
        self.patch_cost = tower / language  # of an image patch, in tokens: by the parameters that each meets
        every = len(model.model.layers) + len(model.visual.blocks)
        self.recompute(*{"swiglu": (every, 0), "all": (every, every)}.get(cfg.pack.checkpoint_activations, (0, 0)))

    def recompute(self, products, blocks):
        """In the backward pass make again SwiGLU's product of the first `products` blocks, and the first `blocks` as a
        whole; the language model's come before the tower's."""
        for i, block in enumerate((*self.model.model.layers, *self.model.visual.blocks)):
            block.recompute, block.mlp.recompute = i < blocks, blocks <= i < products

    def fit_activations(self, pack):
        """With pack.checkpoint_activations=budget: recompute as much as this pack's size asks for.

        No collective is inside of what is recomputed, so ranks need not agree.
        """
        if self.cfg.pack.checkpoint_activations != "budget":
            return
        kind = Kind(self.device.type, self.dtype.itemsize, getattr(torch, self.cfg.optim.weights).itemsize)
        trained = any(p.requires_grad for p in self.model.visual.parameters())
        budget = self.cfg.pack.activation_budget_gb * 1e9
        sizes = pack.num_tokens, len(pack.patches)
        self.recompute(*to_recompute(self.model.cfg, *sizes, budget, kind, trained))

    def trainable_names(self, freeze):
        """Names of the tensors that are trained where `freeze` is not.

        Raises:
            UserError: a name in it that fits no tensor, or nothing left to train.
        """
        names = [name for name, _ in self.model.named_parameters()]
        prefixes = [PARTS.get(part, part) for part in freeze]
        for part, prefix in zip(freeze, prefixes, strict=True):
            if not any(name.startswith(prefix) for name in names):
                raise UserError(
                    f"freeze names {part!r}, which fits no tensor: use {', '.join(PARTS)} or the start of a tensor name"
                )
        left = {name for name in names if not name.startswith(tuple(prefixes))}
        if not left:
            raise UserError(f"freeze={freeze} leaves nothing to train")
        return left

    def start_phase(self, phase, seed=0):
        """Set which parts learn, and begin a fresh AdamW over them; what it rounds at random, it draws from `seed`.

        Raises:
            UserError: a name in `freeze` that fits no tensor, or nothing left to train.
        """
        names = self.trainable_names(phase.freeze)
        self.model.requires_grad_(False)
        self.trained = {name: p.requires_grad_() for name, p in self.model.named_parameters() if name in names}
        matrices = [p for p in self.trained.values() if p.ndim > 1]
        vectors = [p for p in self.trained.values() if p.ndim <= 1]
        optim = self.cfg.optim
        # Norms and biases are not decayed.
        groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        options = dict(lr=phase.lr, betas=tuple(optim.betas), eps=optim.eps)
        groups = [g for g in groups if g["params"]]
        if optim.weights == "bfloat16":
            self.optimizer = StochasticAdamW(groups, seed=seed, **options)
        else:
            self.optimizer = torch.optim.AdamW(groups, fused=True, **options)

    def autocast(self, cache=True):
        """cache: keep 16-bit copies of the weights until the end, for whoever reads a weight more than once."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype, cache_enabled=cache)

    def run(self, pack, model, head):
        """What `head` makes of its weight (V, H) and the hidden states (N, H) that predict the pack's scored tokens."""

        def attend(layer, q, k, v):
            return attention(q, k, v, pack.spans, impl=self.cfg.pack.attention)

        def then(hidden, weight):
            rows = scored(hidden, pack).to(self.dtype)  # (N, H); gradients of a prompt's last row add up in fp32
            del hidden  # all T of them, which the head's memory would come on top of
            return head(rows, weight)

        # The grid as lists: FSDP would send a tensor to the GPU, from where the host had to fetch it.
        images = pack.patches, pack.grid.tolist(), pack.image_slots
        with self.autocast(cache=False):
            return model(pack.ids, pack.positions, attend, *images, impl=self.cfg.pack.attention, then=then)

    @torch.no_grad()
    def logprobs(self, pack, temperature, model=None):
        """Log-probs and entropies (N,) of the pack's scored tokens, under `model` (default: the policy)."""
        pack = pack.to(self.device)

        def head(hidden, weight):
            return linear_logprob(
                hidden,
                weight,
                pack.target,
                temperature=temperature,
                banned=self.banned_ids,
                chunk_tokens=self.cfg.pack.head_chunk_tokens,
                impl=self.cfg.pack.head,
            )

        model = model or self.model
        scores = self.run(pack, model, head)
        reshard(model)
        return scores

    def backward(self, pack, tokens, objective, temperature, last=(True, True)):
        """Add the pack's gradient; returns the sums of `policy_stats`, with `loss` and the tokens' `logp`, (N,).

        Args:
            pack: Pack; tokens: objective.Tokens of its N scored tokens.
            last: whether it is the update's last, and the last of those with images; alike on all ranks.
        """
        if not self.cfg.dist.offload:  # what waits does so where the model computes
            sum_over_hosts(self.model, *last)
        pack = pack.to(self.device)
        self.fit_activations(pack)
        # Known importance weights cost nothing. Unknown ones of whole responses cost a second pass through the head,
        # a fraction of what it would cost to score the responses beforehand.
        tokens, objective = fold_importance(tokens, objective)

        def head(hidden, weight):
            return linear_loss(
                hidden,
                weight,
                pack.target,
                lambda logp, entropy, rows: policy_loss(logp, entropy, tokens[rows], objective),
                fused=fused_objective(tokens, objective),
                temperature=temperature,
                banned=self.banned_ids,
                chunk_tokens=self.cfg.pack.head_chunk_tokens,
                two_pass=needs_whole_sequences(objective),
                logits_dtype=getattr(torch, self.cfg.pack.head_logits),
                impl=self.cfg.pack.head,
            )

        loss, logp, entropy = self.run(pack, self.model, head)
        if loss.requires_grad:
            loss.backward()
        else:  # all that it met is frozen, as where a tower learns alone and had no image
            reshard(self.model)
        return policy_stats(logp, entropy, tokens, objective) | {"loss": loss.detach(), "logp": logp}

    def optimizer_step(self, lr, loss):
        """Clip and update; returns the gradient's norm before clipping, and whether the update was made.

        A non-finite loss or gradient changes nothing but clears the gradient.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.cfg.optim.max_grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # over all shards
        finite = math.isfinite(loss) and bool(norm.isfinite())
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm), finite

    def optimizer_tensors(self):
        """Name -> tensor of the optimiser's state, for a checkpoint; one to read into where no step was taken yet."""
        for p in self.trained.values():
            if not self.optimizer.state[p]:
                moments = {key: torch.zeros_like(p, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
                # A fused update wants its step count beside the parameter, ours where it can be read.
                beside = isinstance(self.optimizer, torch.optim.AdamW)
                self.optimizer.state[p] = {"step": torch.zeros((), device=p.device if beside else "cpu"), **moments}
        return {
            f"{name}/{key}": value for name, p in self.trained.items() for key, value in self.optimizer.state[p].items()
        }

    def discard(self):
        """Forget the gradient of an update that is not to be made. What HSDP holds back stays, for a run that ends."""
        self.optimizer.zero_grad(set_to_none=True)


def fused_objective(tokens, objective):
    """`policy_loss` of these tokens as the head's row kernel takes it, or None where the kernel does not know it."""
    capped = objective.tis_mode == "token_truncate" and not objective.tis_floor  # the kernel's own importance weights
    if needs_whole_sequences(objective) or objective.tis_cap and not capped:
        return None
    return FusedObjective(
        advantage=tokens.advantage,
        weight=tokens.weight,
        old_logp=tokens.old_logp,
        ref_logp=tokens.ref_logp,
        sampler_logp=tokens.sampler_logp,
        loss_type=objective.loss_type,
        clip_ratio_low=objective.clip_ratio_low,
        clip_ratio_high=objective.clip_ratio_high,
        clip_ratio_dual=objective.clip_ratio_dual,
        kl_coef=objective.kl_coef if objective.kl_place == "loss" else 0.0,
        kl_estimator=objective.kl_estimator,
        kl_ratio=objective.kl_ratio,
        entropy_coef=objective.entropy_coef,
        tis_cap=objective.tis_cap,
    )


def learning_rate(phase, optim, step):
    """The rate of step 0 ... steps - 1 of a phase: linear warm-up, then constant or a cosine down to min_lr_ratio."""
    if step < optim.warmup_steps:
        return phase.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return phase.lr
    done = (step - optim.warmup_steps) / max(1, phase.steps - optim.warmup_steps)
    return phase.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * (1 + math.cos(math.pi * done)) / 2)
