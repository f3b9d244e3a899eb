"""What a rank holds in each stage of a step: `Plan(...).stages()`.

A stage's figure is its worst moment: a sum of what is there at once, and the largest of these. Upper bounds go in (the
longest prompts, responses that are never cut short), and an optimiser that has taken its first step.

Next: plan.py, which shows it.
"""

import os
from typing import NamedTuple

import torch

from nanolmmr1.errors import UserError
from nanolmmr1.parallel import export
from nanolmmr1.run.manifest import FILE_BYTES
from nanolmmr1.update import memory
from nanolmmr1.update.policy import PARTS

GB = 1e9


class Machine(NamedTuple):
    """Where a run would run."""

    device: str
    ranks: int
    shards: int  # ranks that a model is spread over; 1: a whole model on each
    capacity: float  # bytes of a rank; 0: unknown
    name: str


class Longest(NamedTuple):
    """The largest of a phase's rows."""

    prompt: int  # tokens
    patches: int
    mean: float  # tokens of a prompt; the largest where no row could be read
    count: int  # rows; 0: none could be read


class Stage(NamedTuple):
    """A stage's worst moment: bytes on the device by column, and in the host's memory beside them."""

    name: str
    parts: dict
    host: float = 0

    @property
    def total(self):
        return sum(self.parts.values())


def machine(cfg):
    """The machine that the recipe, the section `plan` and torchrun's environment describe."""
    wanted = cfg.plan.gpu_gb or cfg.plan.gpus
    here = torch.cuda.is_available()
    device = cfg.device if cfg.device != "auto" else "cuda" if here or wanted else "cpu"
    ranks = cfg.plan.gpus or int(os.environ.get("WORLD_SIZE", 1))
    host = cfg.plan.host_gpus or int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or min(ranks, 8)
    if cfg.dist.shard == "host" and ranks % host:
        raise UserError(f"plan.gpus={ranks} is no multiple of plan.host_gpus={host}: give the GPUs of a host")
    shards = host if cfg.dist.shard == "host" else ranks
    if device == "cpu":
        return Machine(device, ranks, shards, 0, f"{ranks} x CPU")
    if cfg.plan.gpu_gb or not here:
        capacity = (cfg.plan.gpu_gb or 80) * GB
    else:  # what is free: other programs' memory and the context are gone already
        capacity = torch.cuda.mem_get_info()[0]
    return Machine(device, ranks, shards, capacity, f"{ranks} x {capacity / GB:.0f} GB GPU")


class Plan:
    """The memory of one phase.

    Args:
        cfg: the recipe. phase: Phase. model: ModelConfig. where: Machine. longest: Longest of the phase's rows.
        more: whether steps follow a checkpoint.
    """

    def __init__(self, cfg, phase, model, where, longest, more=True):
        self.cfg, self.phase, self.model, self.where, self.longest, self.more = cfg, phase, model, where, longest, more
        compute = {"auto": 2 if where.device == "cuda" else 4, "float32": 4, "bfloat16": 2}[cfg.dtype]
        self.kind = memory.Kind(where.device, compute, getattr(torch, cfg.optim.weights).itemsize)
        self.count = memory.parameters(model, tuple(PARTS.get(part, part) for part in phase.freeze))
        self.prompts = -(-phase.prompts_per_step // where.ranks)  # that this rank samples
        self.vision = bool(self.count.trained_vision)
        offload, away = cfg.dist.offload, cfg.dist.offload or cfg.dist.offload_reference
        self.sharded = where.ranks > 1 or away  # by FSDP
        bytes_, shards, n = self.kind.master, where.shards, self.count
        self.weights, self.gradients = n.total * bytes_ / shards, n.trained * bytes_ / shards
        self.optimiser = 2 * self.gradients  # both moments, in the weights' precision
        # Of micro-batches: HSDP keeps their sum in fp32 until it crosses hosts, but where it is offloaded.
        self.waiting = n.trained * 4 / shards if cfg.dist.shard == "host" and self.sharded else self.gradients
        self.reference = self.weights if phase.objective.kl_coef else 0
        self.host = (self.weights + self.gradients + self.optimiser) * offload + self.reference * away
        if offload:
            self.weights = self.gradients = self.waiting = self.optimiser = 0
        if away:
            self.reference = 0
        # The embedded sampler reads whole weights: the policy's own, or where these are sharded a copy of them in fp32.
        self.copy = n.total * 4 if cfg.rollout.engine == "local" and self.sharded else 0
        # Without FSDP autocast makes 16-bit copies of matrices: a product's backward keeps its own.
        self.cast = compute if not self.sharded and compute < bytes_ else 0  # of a parameter

    def load(self, budget):
        """The largest micro-batch within a token budget."""
        longest, phase = self.longest, self.phase
        prompts = -(-phase.prompts_per_step // phase.updates_per_rollout)  # of an update; one rank may get them all
        if self.where.ranks == 1 or self.where.device == "cpu":
            prompts = -(-prompts // self.where.ranks)
        response, G = phase.max_response_tokens, phase.group_size
        return memory.micro_batch(longest.prompt, response, G, longest.patches, prompts, budget)

    def recompute(self, load):
        """(products, blocks), see plan_memory.to_recompute."""
        how, model = self.cfg.pack.checkpoint_activations, self.model
        most = model.num_hidden_layers + model.vision.depth
        if how != "budget":
            return most * (how in ("swiglu", "all")), most * (how == "all")
        budget = self.cfg.pack.activation_budget_gb * GB
        return memory.to_recompute(model, load.tokens, load.patches, budget, self.kind, self.vision)

    def gathered(self, backward=False, again=(0, 0)):
        """What FSDP holds of a block beside its shard: (weights, gradients); `again`: see `recompute`.

        With several ranks a unit is gathered into one buffer and copied out of it; forward the next unit's buffer meets
        the last one's, backward the next unit's the parameters in use. Gradients come in the compute precision, and are
        copied into the fp32 buffer that is reduced; a shard of the sum in fp32 is then added to the one that is there.
        """
        numel, compute = max(self.count.block, self.count.vision_block), self.kind.compute
        if not self.sharded:
            if not backward:
                return numel * self.cast, 0
            kept = self.count.total - min(again[1], self.model.num_hidden_layers) * self.count.block
            return kept * self.cast, numel * self.cast
        weights = numel * compute * (1 if self.where.shards == 1 else 2)
        return weights, (numel * (compute + 4 + 4 / self.where.shards) if backward else 0)

    def base(self, **parts):
        """What is there in every stage, and `parts` besides."""
        there = dict(weights=self.weights, optimiser=self.optimiser, reference=self.reference, sampler=self.copy)
        return there | {name: size + there.get(name, 0) for name, size in parts.items()}

    @property
    def root(self):
        """The root is gathered once a pass, in the master weights' precision."""
        return self.count.root * self.kind.master if self.sharded else 0

    def sampling(self):
        cfg, phase, longest = self.cfg, self.phase, self.longest
        if cfg.rollout.engine == "server":
            return self.base()
        if cfg.rollout.engine == "vllm":
            # Its weights, cache and buffers share what it was given; kv_cache_gb sets the cache beside the weights.
            share = cfg.rollout.gpu_memory_utilization * self.where.capacity if self.where.device == "cuda" else 0
            if cfg.rollout.kv_cache_gb or not share:
                model = self.model
                row = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * self.kind.compute
                cache = cfg.rollout.max_sequences * (longest.prompt + phase.max_response_tokens) * row
                cache = cfg.rollout.kv_cache_gb * 2**30 or min(cache, 4 << 30)
                share = cache + self.count.total * self.kind.compute / cfg.rollout.tensor_parallel
            return self.base(sampler=share)
        together = min(self.prompts, max(1, cfg.rollout.max_sequences // phase.group_size))
        lengths = longest.prompt, phase.max_response_tokens, phase.group_size, longest.patches
        cache, work = memory.local_sampling(self.model, self.kind, together, *lengths)
        copies = self.count.total * self.cast
        return self.base(sampler=cache, work=work, vision=self.pixels(self.prompts), gathered=copies)

    def pixels(self, prompts):
        """Patches of prompts: they wait where they were made, in the host's memory."""
        return prompts * self.longest.patches * self.model.vision.patch_dim * 4 * (self.where.device == "cpu")

    def scoring(self, load):
        work = memory.language_block(self.model, load, self.kind).forward
        if load.patches:
            work = max(work, memory.vision_block(self.model.vision, load.patches, self.kind).forward)
        head = memory.head(self.model, load.scored, self.kind, False, self.cfg.pack.head_chunk_tokens).scoring
        weights, _ = self.gathered()
        stream = load.tokens * self.model.hidden_size * self.kind.stream  # it outlives its blocks
        blocks = dict(work=work, activations=memory.masks(self.model, load, self.kind))
        # Tower, blocks and head follow one another.
        parts = max(blocks, dict(head=head, activations=stream), key=lambda parts: sum(parts.values()))
        pixels = load.patches * self.model.vision.patch_dim * 4
        return self.base(gathered=self.root + weights, vision=pixels, **parts)

    def learning(self, load):
        """The worst of: the head, the first block of the backward pass, the tower's, the embedding's gradient."""
        model, kind, n = self.model, self.kind, self.count
        again = self.recompute(load)
        language, vision = memory.kept(model, load, kind, *again, self.vision)
        blocks = language - memory.norm(load.tokens, model.hidden_size, kind.stream, kind)  # the last norm goes first
        if load.patches and not self.vision:
            vision = load.patches * model.vision.patch_dim * 4
        head = memory.head(model, load.scored, kind, bool(n.trained_root), self.cfg.pack.head_chunk_tokens)
        block = memory.language_block(model, load, kind)
        weights, gradients = self.gathered(True, again)
        root = n.root * kind.master * bool(n.trained_root)  # a gradient of the embedding, as large as itself
        # Before the first micro-batch of an update there are none.
        before = self.waiting if self.several(load) else 0
        share = self.waiting / max(1, n.trained)

        def there(**parts):
            return self.base(**dict(activations=language, vision=vision) | parts)

        def recomputed(block, count):
            """Work of one of `count` blocks: where not all of them are recomputed, the others are freed by then."""
            products, blocks = again
            return block.work + (block.kept - block.input if blocks >= count else block.product * (products >= count))

        moments = [
            there(gradients=before, gathered=self.root + weights, head=head.learning),
            there(
                gradients=before, gathered=self.root + weights + gradients, activations=blocks, head=head.gradient,
                work=recomputed(block, model.num_hidden_layers),
            ),
        ]  # fmt: skip
        if vision and self.vision:
            tower = memory.vision_block(model.vision, load.patches, kind)
            moments.append(there(
                gradients=max(before, share * n.trained_language), gathered=self.root + weights + gradients,
                activations=load.tokens * model.hidden_size * kind.stream, head=head.weight,
                work=recomputed(tower, model.num_hidden_layers + model.vision.depth),
            ))  # fmt: skip
        # A tied weight's gradient is complete when the embedding's, as large and dense, is added to the head's; FSDP
        # then copies it into the buffer that is reduced.
        copies = max(head.weight + root + self.root, 2 * root if self.sharded else 0)
        moments.append(there(
            gradients=max(before, share * (n.trained - n.trained_root)), gathered=copies - head.weight, vision=0,
            activations=load.tokens * model.hidden_size * kind.stream, head=head.weight,
        ))  # fmt: skip
        return max(moments, key=lambda parts: sum(parts.values()))

    def several(self, load):
        """Whether an update may have more than one micro-batch."""
        group = self.longest.prompt + self.phase.group_size * (self.phase.max_response_tokens - 1)
        prompts = -(-self.phase.prompts_per_step // self.phase.updates_per_rollout)
        return prompts * group > load.tokens * self.where.ranks

    def tokens(self):
        """Of a group: (at most, expected). Nobody knows how long responses will be: expected is half of what may be."""
        longest, phase = self.longest, self.phase
        return (
            longest.prompt + phase.group_size * phase.max_response_tokens,
            longest.mean + phase.group_size * phase.max_response_tokens / 2,
        )

    def micro_batches(self):
        """Of a rank in a step: (at most, expected)."""
        phase, prompt, budget = self.phase, self.longest.prompt, self.cfg.pack.tokens_per_micro_batch
        prompts, response = -(-phase.prompts_per_step // phase.updates_per_rollout), phase.max_response_tokens - 1
        group = prompt + phase.group_size * response
        if group <= budget:
            packs = -(-prompts // (budget // group))
        else:  # a group is split, its prompt stands in each part
            packs = prompts * -(-phase.group_size // max(1, (budget - prompt) // max(1, response)))
        expected = -(-prompts * self.tokens()[1] // budget)
        return tuple(int(-(-n // self.where.ranks)) * phase.updates_per_rollout for n in (packs, expected))

    def stages(self, budget=None):
        """[Stage] at a token budget, by default the recipe's."""
        load, where = self.load(budget or self.cfg.pack.tokens_per_micro_batch), self.where
        phase, found = self.phase, [Stage("sampling", self.sampling(), self.host)]
        if phase.objective.kl_coef or phase.updates_per_rollout > 1:
            found.append(Stage("scoring", self.scoring(load), self.host))
        found.append(Stage("learning", self.learning(load), self.host))
        found.append(Stage("optimiser step", self.base(gradients=self.gradients), self.host))
        if self.cfg.rollout.engine == "vllm" or self.sharded and self.cfg.rollout.engine == "local":
            # A bucket, or a larger tensor by itself, is gathered from a flat shard, whole, and then as it is. Of an
            # engine the weights are back.
            embedding = self.model.vocab_size * self.model.hidden_size
            embedding *= self.kind.compute if self.cfg.rollout.engine == "vllm" else self.kind.master
            bucket = max(export.BUCKET_BYTES, embedding) * (2 + 1 / where.shards) if where.shards > 1 else 0
            engine = self.count.total * self.kind.compute / self.cfg.rollout.tensor_parallel
            parts = dict(gathered=bucket) | (dict(sampler=engine) if self.cfg.rollout.engine == "vllm" else {})
            found.append(Stage("hand-over", self.base(**parts), self.host))
        found.append(self.checkpointing(found))
        return found

    def checkpointing(self, others):
        """A copy of the state is written while training goes on; safetensors holds a file twice as it writes it.

        A file is closed once it has FILE_BYTES, so the largest tensor may come on top.
        """
        state = (self.count.total + 2 * self.count.trained) * self.kind.master / self.where.shards
        largest = self.model.vocab_size * self.model.hidden_size * self.kind.master / self.where.shards
        staged = state * self.cfg.checkpoint.background + 2 * min(FILE_BYTES + largest, state)
        if self.where.device == "cuda":
            return Stage("checkpoint", self.base(), self.host + staged)
        parts = self.base()
        if self.more and self.cfg.checkpoint.background:
            parts = max((stage.parts for stage in others), key=lambda parts: sum(parts.values()))
        return Stage("checkpoint", parts | dict(work=parts.get("work", 0) + staged), self.host)

    def peak(self, budget=None):
        """Bytes on the device."""
        return max(stage.total for stage in self.stages(budget))

    def largest_budget(self, capacity):
        """The largest pack.tokens_per_micro_batch, in multiples of 1,024, with which all stages fit; 0: none."""
        fits = [k for k in range(1, 129) if self.peak(1024 * k) <= capacity]
        return 1024 * max(fits, default=0)
