"""The model under training: log-probs without gradient, forward and backward, and the optimizer step.

Master weights are fp32 (or bf16, by `optim.weights`); on a GPU the computation runs in bfloat16 under autocast.
Gradients of all micro-batches and ranks of an update add up before `optimizer_step`. Each token's weight already
contains the denominator of the update, so the sum does not depend on how tokens are cut into micro-batches or ranks.

Next: optim.py, AdamW for bf16 weights.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch

from nanolmmr1.errors import UserError
from nanolmmr1.kernels.attention import attention
from nanolmmr1.kernels.linear_logprob import linear_logprob
from nanolmmr1.kernels.linear_loss import FusedObjective, linear_loss
from nanolmmr1.model.qwen import Head, Qwen25VL
from nanolmmr1.parallel.fsdp import reshard, sum_over_hosts
from nanolmmr1.schema import Objective, Optim, Phase
from nanolmmr1.schema import Pack as PackConfig
from nanolmmr1.update.memory import Kind, to_recompute
from nanolmmr1.update.objective import Tokens, fold_importance, needs_whole_sequences, policy_loss, policy_stats
from nanolmmr1.update.optim import StochasticAdamW
from nanolmmr1.update.pack import Pack, scored

PARTS = {"vision": "visual.", "merger": "visual.merger.", "language": "model.", "embedding": "model.embed_tokens."}


class Policy:
    """A model with its optimizer and, if the objective has a KL term, its reference model.

    With bf16 master weights, gradients of micro-batches are added in bf16, the dtype in which FSDP stores them; with
    HSDP they wait in fp32, see fsdp.sum_over_hosts.

    Args:
        model: Qwen25VL with master weights, plain or sharded.
        pack, optim: sections of the recipe. banned_ids: token ids that no response may contain.
        dtype: of the computation. device: of the computation; None: the model's.
        offload: the model's shards are on the CPU.

    Attributes:
        reference: frozen model of the KL term, or None.
        trained: name -> parameter, for the parameters that this phase trains.
        patch_cost: cost of an image patch in tokens, by the parameters that each passes through.

    Raises:
        UserError: pack.head_logits is impossible on this device.
    """

    def __init__(
        self,
        model: Qwen25VL,
        pack: PackConfig,
        optim: Optim,
        banned_ids: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        offload: bool = False,
    ) -> None:
        self.model, self.pack, self.optim = model, pack, optim
        self.banned_ids, self.dtype, self.offload = tuple(banned_ids), dtype, offload
        self.device = torch.device(device) if device else model.head.device
        triton = pack.head == "triton" or (pack.head == "auto" and self.device.type == "cuda")
        if pack.head_logits == "bfloat16" and not (triton and dtype == torch.bfloat16):
            raise UserError(
                f"pack.head_logits=bfloat16 needs pack.head=triton and dtype=bfloat16; here {pack.head} on "
                f"{self.device.type} and {str(dtype).removeprefix('torch.')}: leave it at float32"
            )
        self.reference: Qwen25VL | None = None
        tower, language = (
            sum(p.numel() for p in blocks.parameters()) for blocks in (model.visual.blocks, model.model.layers)
        )
        self.patch_cost = tower / language
        every = len(model.model.layers) + len(model.visual.blocks)
        self.recompute(*{"swiglu": (every, 0), "all": (every, every)}.get(pack.checkpoint_activations, (0, 0)))

    def recompute(self, products: int, blocks: int) -> None:
        """Set the recomputation in backward: the first `blocks` blocks, and SwiGLU's product of the first
        `products`. Blocks of the language model are counted before those of the vision tower."""
        for i, block in enumerate((*self.model.model.layers, *self.model.visual.blocks)):
            block.recompute, block.mlp.recompute = i < blocks, blocks <= i < products

    def fit_activations(self, pack: Pack) -> None:
        """With pack.checkpoint_activations=budget: recompute as much as a pack of this size needs.

        Recomputation contains no collective, so ranks need not agree.
        """
        if self.pack.checkpoint_activations != "budget":
            return
        device = "cuda" if pack.ids.is_cuda else "cpu"
        kind = Kind(device, self.dtype.itemsize, getattr(torch, self.optim.weights).itemsize)
        trained = any(p.requires_grad for p in self.model.visual.parameters())
        budget = self.pack.activation_budget_gb * 1e9
        sizes = pack.num_tokens, len(pack.patches)
        self.recompute(*to_recompute(self.model.cfg, *sizes, budget, kind, trained))

    def trainable_names(self, freeze: Sequence[str]) -> set[str]:
        """Names of the tensors that are trained if the parts in `freeze` are not.

        Raises:
            UserError: an entry of it matches no tensor, or nothing is left to train.
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

    def start_phase(self, phase: Phase, seed: int = 0) -> None:
        """Freeze the phase's frozen parts, and start a new AdamW. seed: of stochastic rounding.

        Raises:
            UserError: see `trainable_names`.
        """
        names = self.trainable_names(phase.freeze)
        self.model.requires_grad_(False)
        self.trained = {name: p.requires_grad_() for name, p in self.model.named_parameters() if name in names}
        matrices = [p for p in self.trained.values() if p.ndim > 1]
        vectors = [p for p in self.trained.values() if p.ndim <= 1]
        # Norms and biases are not decayed.
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": self.optim.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        beta1, beta2 = self.optim.betas
        options: dict[str, Any] = dict(lr=phase.lr, betas=(beta1, beta2), eps=self.optim.eps)
        self.optimizer: torch.optim.Optimizer
        if self.optim.weights == "bfloat16":
            self.optimizer = StochasticAdamW(groups, seed=seed, **options)
        else:
            self.optimizer = torch.optim.AdamW(groups, fused=True, **options)

    def autocast(self, cache: bool = True) -> contextlib.AbstractContextManager[None]:
        """cache: keep 16-bit copies of weights until the context ends; useful if a weight is read more than once."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype, cache_enabled=cache)

    def forward(self, pack: Pack, model: Qwen25VL, head: Head) -> Any:
        """Run a pack through the model. Returns the head's result, see Qwen25VL.forward."""

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attention(q, k, v, pack.spans, impl=self.pack.attention)

        with self.autocast(cache=False):
            return model(pack.ids, pack.positions, attend, pack.images, impl=self.pack.attention, head=head)

    @torch.no_grad()
    def logprobs(
        self, pack: Pack, temperature: float, model: Qwen25VL | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies, both (N,), of the pack's scored tokens, by `model` or by the policy."""
        pack = pack.to(self.device)

        def head(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            rows = scored(hidden, pack).to(self.dtype)  # (N, H)
            del hidden  # (T, H): free it before the head allocates
            return linear_logprob(
                rows,
                weight,
                pack.target,
                temperature=temperature,
                banned=self.banned_ids,
                chunk_tokens=self.pack.head_chunk_tokens,
                impl=self.pack.head,
            )

        model = model or self.model
        result = self.forward(pack, model, head)
        reshard(model)
        return result

    def backward(
        self,
        pack: Pack,
        tokens: Tokens,
        objective: Objective,
        temperature: float,
        final: tuple[bool, bool] = (True, True),
    ) -> dict[str, torch.Tensor]:
        """Forward and backward pass of the loss over a pack; gradients accumulate.

        Args:
            tokens: of the pack's N scored tokens.
            final: whether this is the update's last pack, and its last one with images; equal on all ranks.

        Returns:
            The sums of `policy_stats`, `loss`, and the tokens' `logp` (N,), all on the device.
        """
        if not self.offload:  # offloaded gradients accumulate after the all-reduce, on the CPU
            sum_over_hosts(self.model, *final)
        pack = pack.to(self.device)
        self.fit_activations(pack)
        # With old_logp the importance weights are known, and are folded into the advantages. Without it, weights of
        # whole sequences need all log-probs first: a second pass through the head, cheaper than one through the model.
        tokens, objective = fold_importance(tokens, objective)

        def head(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            rows = scored(hidden, pack).to(self.dtype)  # (N, H); gradients of copied rows are summed in fp32
            del hidden  # (T, H): free it before the head allocates
            return linear_loss(
                rows,
                weight,
                pack.target,
                lambda logp, entropy, rows: policy_loss(logp, entropy, tokens[rows], objective),
                fused=fused_objective(tokens, objective),
                temperature=temperature,
                banned=self.banned_ids,
                chunk_tokens=self.pack.head_chunk_tokens,
                two_pass=needs_whole_sequences(objective),
                logits_dtype=getattr(torch, self.pack.head_logits),
                impl=self.pack.head,
            )

        loss, logp, entropy = self.forward(pack, self.model, head)
        if loss.requires_grad:
            loss.backward()
        else:  # everything in this pass is frozen: only the vision tower trains, and the pack has no image
            reshard(self.model)
        return policy_stats(logp, entropy, tokens, objective) | {"loss": loss.detach(), "logp": logp}

    def optimizer_step(self, lr: float, loss: float) -> tuple[float, bool]:
        """Clip the gradient and update. A non-finite loss or gradient skips the update.

        Returns:
            Gradient norm before clipping, and whether the update was applied.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.optim.max_grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # over all shards
        finite = math.isfinite(loss) and bool(norm.isfinite())
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm), finite

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """Name -> tensor of the optimizer's state, to save or to load into; zeros before the first step."""
        for p in self.trained.values():
            if not self.optimizer.state[p]:
                moments = {key: torch.zeros_like(p, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
                # Fused AdamW needs its step count on the parameter's device; StochasticAdamW reads it on the CPU.
                fused = isinstance(self.optimizer, torch.optim.AdamW)
                self.optimizer.state[p] = {"step": torch.zeros((), device=p.device if fused else "cpu"), **moments}
        return {
            f"{name}/{key}": value for name, p in self.trained.items() for key, value in self.optimizer.state[p].items()
        }

    def discard(self) -> None:
        """Drop the gradient of an abandoned update. With HSDP a part of it stays, in a run that is about to end."""
        self.optimizer.zero_grad(set_to_none=True)


def fused_objective(tokens: Tokens, objective: Objective) -> FusedObjective | None:
    """The arguments of the row kernel that computes `policy_loss`, or None if the kernel does not support it."""
    capped = objective.tis_mode == "token_truncate" and not objective.tis_floor  # the only mode of the kernel
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
        tis_cap=objective.tis_cap or 0.0,
    )


def compute_dtype(name: str, device: str) -> torch.dtype:
    """The recipe's `dtype` as a torch dtype; auto is bfloat16 on a GPU, float32 on a CPU."""
    return getattr(torch, name if name != "auto" else "bfloat16" if device == "cuda" else "float32")


def learning_rate(phase: Phase, optim: Optim, step: int) -> float:
    """Learning rate of step 0 ... steps - 1 of a phase: linear warm-up, then constant or cosine to min_lr_ratio."""
    if step < optim.warmup_steps:
        return phase.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return phase.lr
    done = (step - optim.warmup_steps) / max(1, phase.steps - optim.warmup_steps)
    return phase.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * (1 + math.cos(math.pi * done)) / 2)
