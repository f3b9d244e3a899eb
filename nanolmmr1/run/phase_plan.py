"""Memory of a rank in every stage of a step, phase by phase: the fake step at the sizes of the longest rows.

The update, log-probs, the optimizer step and the gathering of weights are run on fakes. The rest is arithmetic: vLLM's
share of a GPU, the cache of the embedded sampler, a checkpoint's files.
Run as a program, it is the child of plan.Forecast.

Next: fake_step.py, the real step on tensors without data.
"""

import copy
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from nanolmmr1 import schema
from nanolmmr1.errors import UserError
from nanolmmr1.kernels.attention import Spans
from nanolmmr1.model import weights
from nanolmmr1.model.qwen import ModelConfig
from nanolmmr1.run.fake_step import FakeStep, Machine, Sizes, fake_step
from nanolmmr1.run.manifest import FILE_BYTES
from nanolmmr1.update.pack import Pack

GB = 1e9
MOST_TOKENS = 1 << 17  # of a token budget that is tried
FIRST_CACHE = 32  # tokens of the embedded sampler's first cache; it doubles, see rollout/local.py


class Longest(NamedTuple):
    """The largest rows of a phase."""

    prompt: int  # tokens
    patches: int
    mean: float  # tokens of a prompt; the largest if no row could be read
    rows: int  # 0: none could be read


class Stage(NamedTuple):
    """A stage at its peak: bytes on the device by label, and bytes in the host's memory."""

    name: str
    parts: Sizes
    host: float = 0

    @property
    def total(self) -> float:
        return sum(self.parts.values())


class PhasePlan:
    """The memory of one phase, or of several that are alike.

    Args:
        names: of the phases. longest: their largest rows. step: fakes of the first phase.
        shared: results that are the same in all phases.
    """

    def __init__(
        self, cfg: schema.Recipe, names: list[str], model: ModelConfig, where: Machine, longest: Longest,
        step: FakeStep, shared: dict[str, Sizes],
    ) -> None:  # fmt: skip
        self.shared = shared
        self.cfg, self.names, self.model, self.where, self.longest, self.step = cfg, names, model, where, longest, step
        self.phase = cfg.phases[names[0]]
        self.master = getattr(torch, cfg.optim.weights).itemsize
        self.compute = step.policy.dtype.itemsize
        offload, away = cfg.dist.offload, cfg.dist.offload or cfg.dist.offload_reference
        self.sharded = where.ranks > 1 or away
        self.total = sum(p.numel() for p in step.policy.model.parameters())
        held = step.live.now
        reference = held["weights"] * bool(self.phase.objective.kl_coef)
        # The embedded sampler reads the policy's weights; if these are sharded, a whole copy in fp32.
        copied = self.total * 4 * (cfg.rollout.engine == "local" and self.sharded)
        self.extra = {"reference": 0 if away else reference, "sampler": copied}
        self.host = (held["weights"] + held["optimizer"] + step.gradient_bytes) * offload + reference * away
        self.persistent = {name: held[name] for name in ("weights", "optimizer")}

    def stage(self, name: str, sizes: Sizes, **more: float) -> Stage:
        """sizes: measured by the fake step; more: bytes besides."""
        offloaded = self.step.live.offloaded
        parts = {label: size for label, size in sizes.items() if size > 0 and label not in offloaded}
        for label, size in (*self.extra.items(), *more.items()):
            parts[label] = parts.get(label, 0) + size
        return Stage(name, parts, self.host)

    def prompts(self, per_rank: bool) -> int:
        """Of an update; with several GPUs one of them may get them all in a micro-batch."""
        count = -(-self.phase.prompts_per_step // self.phase.updates_per_rollout)
        return -(-count // self.where.ranks) if per_rank else count

    def pack(self, budget: int, responses: bool = True) -> Pack:
        """The largest micro-batch in a token budget: long responses fill it with tokens, short ones with images."""
        longest, phase = self.longest, self.phase
        length = phase.max_response_tokens - 1
        group = longest.prompt + phase.group_size * length
        prompts = self.prompts(self.where.device == "cpu")
        tokens = min(prompts * group, budget) if group <= budget else max(budget, longest.prompt + length)
        rows: list[list[int]] = []
        end, scored, lasts = 0, 0, 0
        while end < tokens:  # group after group; the last one is cut
            start, last = end, min(end + longest.prompt, tokens)
            rows, end, lasts = [*rows, [start, last, start, last, 0, 0, 1]], last, lasts + 1
            for _ in range(phase.group_size):
                if size := min(length, tokens - end):
                    rows.append([end, end + size, end, end + size, start, last, 1])
                    end, scored = end + size, scored + size + 1
        images = max(1, min(prompts, budget // longest.prompt)) * bool(longest.patches)
        units = longest.patches // 4
        height = max((n for n in range(1, math.isqrt(units) + 1) if units % n == 0), default=1)

        def ids(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int64)

        with unset_fake_temporarily():  # the grid has to be real
            grid = torch.tensor([[1, 2 * height, 2 * units // height]] * images).view(-1, 3)
            patches = torch.empty(images * longest.patches, self.model.vision.patch_dim, device="meta")
            return Pack(
                ids(end), ids(3, end), patches, grid, ids(min(end, images * units)), Spans(rows, end), ids(lasts),
                phase.group_size, ids(scored), ids(scored), ids(scored), scored, end,
            )  # fmt: skip

    def several(self, pack: Pack) -> bool:
        """Whether an update may have more than one such micro-batch."""
        group = self.longest.prompt + self.phase.group_size * (self.phase.max_response_tokens - 1)
        return self.prompts(False) * group > pack.num_tokens * self.where.ranks

    def update(self, budget: int) -> Stage:
        pack = self.pack(budget)
        return self.stage("update", self.step.update(pack, self.several(pack)))

    def sampling(self) -> Stage:
        cfg, phase, longest, model = self.cfg.rollout, self.phase, self.longest, self.model
        row = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * self.compute  # of a token
        if cfg.engine == "server":
            return self.stage("sampling", self.persistent)
        if cfg.engine == "vllm":
            # Weights, cache and buffers share vLLM's part of the GPU; kv_cache_gb sets the cache beside the weights.
            share = cfg.gpu_memory_utilization * self.where.capacity if self.where.device == "cuda" else 0
            if cfg.kv_cache_gb or not share:
                tokens = cfg.max_sequences * (longest.prompt + phase.max_response_tokens)
                cache = cfg.kv_cache_gb * 2**30 or min(tokens * row, 4 << 30)
                share = cache + self.total * self.compute / cfg.tensor_parallel
            return self.stage("sampling", self.persistent, sampler=share)
        prompts = min(-(-phase.prompts_per_step // self.where.ranks), max(1, cfg.max_sequences // phase.group_size))
        sequences, capacity = prompts * phase.group_size, FIRST_CACHE
        while capacity < phase.max_response_tokens - 1:
            capacity *= 2
        prefix = row * prompts * longest.prompt
        # A cache grows layer by layer. Logits are fp32; in 16 bits, logits and head also before they are converted.
        small = self.compute if self.compute < 4 else 0
        logits = model.vocab_size * (sequences * (4 + small) + model.hidden_size * small)
        work = max(logits, row // model.num_hidden_layers * sequences * capacity // 2)
        cast = self.total * small * (not self.sharded and small < self.master)  # autocast's copies of weights
        pixels = -(-phase.prompts_per_step // self.where.ranks) * longest.patches * model.vision.patch_dim * 4
        pixels *= self.where.device == "cpu"
        # Patches of the prompts wait in the host's memory; those in the prefilled pack are a copy.
        packed = self.step.logprobs(self.prompt_pack(prompts))
        prefill = self.stage("sampling", packed, sampler=prefix, vision=pixels)
        decode = self.stage(
            "sampling", self.persistent, sampler=prefix + row * sequences * capacity, work=work, gathered=cast,
            vision=pixels,
        )
        return max(prefill, decode, key=lambda stage: stage.total)

    def prompt_pack(self, prompts: int) -> Pack:
        """Prompts that the embedded sampler prefills together."""
        short = copy.copy(self)
        short.phase = copy.copy(self.phase)
        short.phase.max_response_tokens, short.phase.group_size, short.phase.prompts_per_step = 1, 1, 10**6
        return short.pack(prompts * self.longest.prompt)

    def stages(self, budget: int) -> list[Stage]:
        cfg, step, found = self.cfg, self.step, [self.sampling()]
        if self.phase.objective.kl_coef or self.phase.updates_per_rollout > 1:
            found.append(self.stage("log-probs", step.logprobs(self.pack(budget))))
        found += [self.update(budget), self.stage("optimizer step", step.optimizer_step())]
        if cfg.rollout.engine == "vllm" or self.sharded and cfg.rollout.engine == "local":
            engine = self.total * self.compute / cfg.rollout.tensor_parallel * (cfg.rollout.engine == "vllm")
            if "sent" not in self.shared:
                self.shared["sent"] = step.send_weights(step.policy.dtype if engine else None)
            sent = {**self.persistent, "gathered": self.shared["sent"].get("gathered", 0)}
            found.append(self.stage("send weights", sent, sampler=engine))
        return [*found, self.checkpoint(found)]

    def checkpoint(self, others: list[Stage]) -> Stage:
        """A copy of the state is written while training goes on, and safetensors holds a file twice as it writes it. A
        file is closed once it has FILE_BYTES, so the largest tensor may come on top."""
        state = sum(self.persistent.values())
        largest = self.model.vocab_size * self.model.hidden_size * self.master / self.where.shards
        background = self.cfg.checkpoint.background
        staged = state * background + 2 * min(FILE_BYTES + largest, state)
        if self.where.device == "cuda":
            return self.stage("checkpoint", self.persistent)._replace(host=self.host + staged)
        parts = max(others, key=lambda stage: stage.total).parts if background else {**self.persistent, **self.extra}
        return Stage("checkpoint", {**parts, "work": parts.get("work", 0) + staged}, self.host)

    def largest_budget(self, tried: dict[int, float], most: int = MOST_TOKENS) -> int:
        """The largest token budget found to fit, a multiple of 1,024; 0: none does.

        The peak is nearly affine in tokens. So the next budget to try is interpolated, or extrapolated from the
        last one's bytes per token, and few runs are needed.

        Args:
            tried: budget -> bytes of the update, at one budget at least. most: the limit.
        """
        capacity, extra = self.where.capacity, self.extra
        fixed = sum(self.persistent.values()) + extra["reference"] + extra["sampler"] + self.step.gradient_bytes
        for _ in range(2):  # a run of the 3B takes five seconds
            fits = [n for n in sorted(tried) if tried[n] <= capacity]
            too_large = min((n for n in tried if tried[n] > capacity), default=0)
            if fits and (fits[-1] >= most or tried[fits[-1]] > 0.95 * capacity or 0 < too_large <= fits[-1] + 1024):
                break
            low, high = ([0, *fits][-1], too_large) if too_large else [0, *fits][-2:]
            slope = max(1.0, (tried[high] - tried.get(low, fixed)) / (high - low))
            guess = low + (0.98 * capacity - tried.get(low, fixed)) / slope
            if not too_large and len(fits) == 1 and self.cfg.pack.checkpoint_activations == "budget":
                guess = 2 * fits[0]  # saved memory stops growing, so the slope is smaller from here
            guess = min(most, int(guess) // 1024 * 1024)
            if guess < 1024 or guess in tried:
                break
            tried[guess] = self.update(guess).total
        return min(most, max((n for n, size in tried.items() if size <= capacity), default=0)) // 1024 * 1024


def machine(cfg: schema.Recipe) -> Machine:
    """The machine that the recipe, its section `plan` and torchrun's environment describe.

    Raises:
        UserError: hosts of different sizes with dist.shard=host.
    """
    here = torch.cuda.is_available()
    device = cfg.device if cfg.device != "auto" else "cuda" if here or cfg.plan.gpu_gb or cfg.plan.gpus else "cpu"
    ranks = cfg.plan.gpus or int(os.environ.get("WORLD_SIZE", 1))
    host = cfg.plan.host_gpus or int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or min(ranks, 8)
    if cfg.dist.shard == "host" and ranks % host:
        raise UserError(f"plan.gpus={ranks} is no multiple of plan.host_gpus={host}: give the GPUs of a host")
    shards = host if cfg.dist.shard == "host" else ranks
    if device == "cpu":
        return Machine(device, ranks, shards, 0, f"{ranks} x CPU")
    if cfg.plan.gpu_gb or not here:
        capacity = (cfg.plan.gpu_gb or 80) * GB
    else:  # free memory: other programs and the CUDA context have taken theirs
        capacity = torch.cuda.mem_get_info()[0]
    return Machine(device, ranks, shards, capacity, f"{ranks} x {capacity / GB:.0f} GB GPU")


def phase_plans(
    cfg: schema.Recipe, model: ModelConfig, where: Machine, longest: dict[str, Longest]
) -> Iterator[PhasePlan]:
    """Phases, similar ones together, largest first. Each is on fakes until the next one is asked for."""
    alike: dict[str, list[str]] = {}
    for name, phase in cfg.phases.items():
        memory = phase.model_dump(exclude={"data", "captions", "steps", "lr", "reference"})
        alike.setdefault(repr((memory, longest[name][:2])), []).append(name)

    def size(names: list[str]) -> tuple[bool, int]:
        phase, rows = cfg.phases[names[0]], longest[names[0]]
        return "vision" not in phase.freeze and rows.patches > 0, rows.prompt + rows.patches + phase.max_response_tokens

    shared: dict[str, Sizes] = {}
    for names in sorted(alike.values(), key=size, reverse=True):
        with fake_step(cfg, cfg.phases[names[0]], model, where) as step:
            yield PhasePlan(cfg, names, model, where, longest[names[0]], step, shared)


def main() -> None:
    """The child of a Forecast: JSON on stdin, bytes of the hungriest rank on stdout."""
    task = json.load(sys.stdin)
    torch.set_num_threads(1)
    cfg = schema.Recipe.model_validate_json(json.dumps(task["recipe"]))
    where, model = Machine(*task["where"]), weights.read_config(task["folder"])
    longest = {name: Longest(*rows) for name, rows in task["longest"].items()}
    left_out = "sampler" if where.device == "cuda" and cfg.rollout.engine == "vllm" else ""
    peak = 0.0
    for plan in phase_plans(cfg, model, where, longest):
        stages = plan.stages(cfg.pack.tokens_per_micro_batch)
        peak = max(peak, *(stage.total - stage.parts.get(left_out, 0) for stage in stages))
    print(peak)


if __name__ == "__main__":
    main()
