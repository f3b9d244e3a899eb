"""Self-test of an installation: kernels, samplers and vLLM against the trainer. Under a minute on a CPU, without data.

    python -m nanolmmr1.doctor [RECIPE or MODEL_FOLDER] [dotted.key=value ...]
    torchrun -m nanolmmr1.doctor [RECIPE or MODEL_FOLDER] [dotted.key=value ...]      with FSDP and several ranks

Attention and LM head are compared with their references. The log-probs of the embedded sampler and of vLLM are compared
with the trainer's, and must depend on images and on M-RoPE positions. vLLM is checked again with new weights, in a
batch that its CUDA graphs pad, and after sleeping. The model is a small random one; with a recipe or a folder it is
that one, with the recipe's kernels, precision and engine settings.

Rows are printed when a check ends, so a crash shows where it happened. On several ranks, rank 0's results are shown,
and failures of any rank. Exit status: 0; 1 a check failed; 2 the arguments are wrong.
"""

import contextlib
import copy
import dataclasses
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py; torch reads it when it is imported
import torch
from PIL import Image
from rich.console import Console
from rich.table import Column, Table
from torch.distributed.tensor import DTensor

from nanolmmr1 import config, schema
from nanolmmr1.data.group import Group
from nanolmmr1.data.prompt import Processor, Prompt
from nanolmmr1.data.rows import Row
from nanolmmr1.desk import cold_start
from nanolmmr1.errors import SharedError, UserError
from nanolmmr1.kernels.attention import Spans, attention
from nanolmmr1.kernels.linear_loss import FusedObjective, linear_loss
from nanolmmr1.model import weights
from nanolmmr1.model.qwen import Qwen25VL
from nanolmmr1.parallel import dist, export
from nanolmmr1.rollout.local import LocalSampler
from nanolmmr1.rollout.sampler import SamplingParams
from nanolmmr1.rollout.vllm import VllmSampler
from nanolmmr1.run import setup
from nanolmmr1.terminal import printable, protect
from nanolmmr1.update.pack import pack_groups
from nanolmmr1.update.policy import Policy, compute_dtype

EXTRAS = {"vllm": "vllm", "flash-attn": "flash", "liger-kernel": "bench"}  # optional package -> our extra
KERNEL_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # largest error, relative to the largest reference value
LOGP_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # mean absolute error in nats
MIN_CHANGE = {"other pictures": 3, "flat positions": 1}  # these change log-probs by more than this many errors
SMALL = ["phases.train.data=none", "phases.train.max_prompt_tokens=256", "phases.train.max_response_tokens=64",
         "prompt.max_pixels=40000", "rollout.max_sequences=16", "rollout.timeout_s=100"]  # fmt: skip
NEW_TOKENS = 24  # per response
TIMEOUT_S = 300.0  # of a collective: a rank that waits longer for the others gives up
Params = ParamSpec("Params")
Result = TypeVar("Result")


class Skipped(Exception):
    """A check cannot run here; the message says why."""


class RanksLost(Exception):
    """The ranks are no longer at the same check, so no further check can run."""


class Report:
    """A table of checks, printed row by row on rank 0."""

    results: dict[str, str]  # check -> "ok", "skipped: reason" or "failed: reason"; equal on all ranks

    def __init__(self) -> None:
        width = None if sys.stdout.isatty() else 120
        self.console, self.results = Console(width=width, markup=False, quiet=not dist.is_main()), {}
        self.print_row("check", "result", "found", "   s")

    def print_row(self, name: str, result: str, detail: str, seconds: str) -> None:
        style = {"o": "green", "s": "yellow", "f": "bold red"}.get(result[0], "bold")
        columns = Column(width=19), Column(ratio=1, style=style), Column(width=44)
        table = Table.grid(*columns, padding=(0, 1), expand=True)  # of a single row
        table.add_row(name, result, detail, seconds)
        self.console.print(table)

    def check(self, name: str, run: Callable[..., str], *args: Any, after: Sequence[str] = ()) -> None:
        """Run a check and print its row.

        Args:
            run: called with `args`; returns a detail to print, raises on failure.
            after: checks that must be "ok", otherwise this one is skipped.

        Raises:
            RanksLost: the other ranks do not answer.
        """
        began, detail, result = time.perf_counter(), "", "ok"
        try:
            for other in after:
                if (earlier := self.results.get(other, "ok")) != "ok":
                    raise Skipped(f"{other} failed" if earlier[0] == "f" else earlier.removeprefix("skipped: "))
            detail = run(*args)
        except Skipped as reason:
            result = f"skipped: {reason}"
        except Exception as error:  # any failure is this row's result, and the next check runs
            result = printable(f"failed: {describe(error)}".partition("\n")[0])
            if not (dist.is_main() or isinstance(error, SharedError)):  # print now: the others may time out
                print(f"rank {dist.rank()}: {name} {result}", file=sys.stderr)
        try:
            result, detail = worst_of_ranks(result, detail)
        except Exception as error:
            result = result if result.startswith("failed") else f"failed: the other ranks are lost: {describe(error)}"
            raise RanksLost(name) from error
        finally:
            self.results[name] = result
            self.print_row(name, result, detail, f"{time.perf_counter() - began:4.1f}")


def describe(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def worst_of_ranks(result: str, detail: str) -> tuple[str, str]:
    """All-gather a check's result. The first failed rank counts, else the first skipped one, else rank 0."""
    ranks = [json.loads(message) for message in dist.gather(json.dumps([result, detail]).encode())]
    for outcome in ("failed", "skipped"):
        bad = [rank for rank, (result, _) in enumerate(ranks) if result.startswith(outcome)]
        if bad:
            result, detail = ranks[bad[0]]
            prefix = f"rank {bad[0]}: " if len(bad) < len(ranks) else ""
            return f"{outcome}: {prefix}{result.removeprefix(f'{outcome}: ')}", detail
    return ranks[0]


def on_all_ranks(work: Callable[Params, Result], *args: Params.args, **options: Params.kwargs) -> Result:
    """Run work on every rank; if it fails on one, all raise, so that none waits in a collective for it."""

    def attempt() -> Result:
        try:
            return work(*args, **options)
        except UserError:
            raise
        except Exception as error:
            raise UserError(describe(error)) from error

    return dist.together(attempt)


def require_below(value: float, limit: float, text: str) -> str:
    """Return the text if value < limit, otherwise (NaN included) raise a UserError with it."""
    if value < limit:
        return text
    raise UserError(f"{text}; below {limit:g} is right")


def require_above(value: float, limit: float, text: str) -> None:
    if not value > limit:
        raise UserError(f"{text}; above {limit:.1e} is right")


def package_version(package: str) -> str:
    for found in (*distributions(name=package), *distributions(name=f"{package}-cpu")):  # vLLM's CPU package
        return found.version
    raise Skipped(f"pip install 'nanolmmr1[{EXTRAS[package]}]'" if package in EXTRAS else "unknown to pip")


def check_kernels(report: Report, pack: schema.Pack, device: str, dtype: torch.dtype) -> None:
    """Every implementation of attention and LM head, forward and backward, on a prompt with two responses."""
    T, table = 70, [[0, 20, 0, 20, 0, 0, 1], [20, 37, 20, 37, 0, 20, 1], [37, 70, 37, 70, 0, 20, 1]]
    spans, target = Spans(torch.tensor(table), T), torch.arange(T, device=device) * 7
    torch.manual_seed(0)
    advantage = torch.randn(T).to(device)
    fused = FusedObjective(advantage, torch.ones_like(advantage), loss_type="cispo")

    def head(impl: str, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        outputs = linear_loss(hidden, weight, target, lambda logp, _, rows: -advantage[rows] * logp, fused=fused,
                              banned=(3,), impl=impl)  # fmt: skip
        return torch.cat([x.view(-1) for x in outputs])  # loss, log-probs, entropies; the first has a gradient

    def outcome(op: Callable[..., torch.Tensor], impl: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = op(impl, *inputs)
        out.square().sum().backward()
        return [x.detach().double() for x in (out, *(x.grad for x in inputs)) if x is not None]

    def compare(op: Callable[..., torch.Tensor], impl: str, requested: bool, inputs: list[torch.Tensor]) -> str:
        reference = outcome(op, "reference", [x.double() for x in inputs])
        try:
            ours = outcome(op, impl, inputs)
        except ValueError as refusal:  # by this implementation, since the reference accepted the inputs
            raise (UserError if requested else Skipped)(str(refusal)) from refusal
        # torch's maximum, unlike Python's, propagates NaN.
        errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(ours, reference, strict=True)]
        error = float(torch.stack(errors).max())
        return require_below(error, KERNEL_LIMIT[dtype], f"relative error {error:.1e}")

    def attend(impl: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, spans, impl=impl)

    for name, op, impls, shapes in (
        ("attention", attend, ("triton", "varlen", "flash", "sdpa"), [(T, heads, 32) for heads in (4, 2, 2)]),
        ("head", head, ("triton", "chunked"), [(T, 64), (1003, 64)]),
    ):
        inputs = [torch.randn(shape).to(device, dtype) for shape in shapes]
        for impl in impls:
            report.check(f"{name} {impl}", compare, op, impl, impl == getattr(pack, name), inputs)


def join_ranks(cfg: schema.Recipe, device: str) -> str:
    """Join the process group of torchrun."""
    dist.start(device, cfg.dist.timeout_s)
    return f"{dist.size()}, the model sharded over {cfg.dist.shard}" if dist.sharded() else "1"


def make_rows() -> list[Row]:
    """One row without images, and four with; the last two differ only in which half of the image has which colour."""

    def png(image: Image.Image) -> bytes:
        image.save(file := io.BytesIO(), "PNG")
        return file.getvalue()

    disc, halves = Image.radial_gradient("L"), Image.new("RGB", (280, 140), "red")
    halves.paste("blue", (140, 0, 280, 140))
    mirrored = halves.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return [
        Row("How much is 3 + 4?", "7", id="text"),
        Row("What is in <image>?", "a disc", [png(disc.resize((140, 60)))], id="image"),
        Row("Is <image> as <image>?", "no", [png(disc.resize(size)) for size in ((90, 90), (30, 200))], id="images"),
        Row("Which half of <image> is red?", "left", [png(halves)], id="left"),
        Row("Which half of <image> is red?", "right", [png(mirrored)], id="right"),
    ]


def flat_positions(prompt: Prompt) -> Prompt:
    """The prompt without heights and widths: all tokens of an image get the position of its first token."""
    positions = prompt.positions.clone()
    positions[1:, prompt.image_slots] = positions[0, prompt.image_slots]
    return dataclasses.replace(prompt, positions=positions)


def write_model(folder: Path) -> Path:
    """The desk's architecture and tokenizer with larger random weights: flat logits would hide most mistakes."""
    cold_start.write_settings(folder, {"text_train": [], "image_train": []})
    torch.manual_seed(0)
    model = Qwen25VL(weights.read_config(folder))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2 if p.ndim > 1 else 1)
        model.model.embed_tokens.weight.mul_(0.06)
    export.save(model, folder, folder)
    return folder


@torch.no_grad()
def perturb(model: Qwen25VL) -> None:
    """Change all weights, to the same model on all ranks: replicas of a shard draw the same noise."""
    first = next(model.parameters())
    torch.manual_seed(first.device_mesh.get_local_rank("shard") if isinstance(first, DTensor) else 0)
    for p in model.parameters():
        local = p.to_local() if isinstance(p, DTensor) else p
        local.mul_(1 + 0.3 * torch.randn_like(local))


def stack(groups: list[Group], name: str) -> torch.Tensor:
    """`ids` or `logp` of all responses, (responses, NEW_TOKENS)."""
    return torch.stack([getattr(response, name) for group in groups for response in group.responses])


def model_runner(worker: Any) -> str:
    """vLLM's model runner: V1 and V2 lay out positions and batches differently."""
    runner, second = type(worker.model_runner), getattr(worker, "use_v2_model_runner", None)
    version = "unknown" if second is None else "V2" if second else "V1"
    return f"{version} {runner.__name__} of {runner.__module__}"


class Comparison(NamedTuple):
    groups: list[Group]
    logp: torch.Tensor  # (responses, NEW_TOKENS), the trainer's
    detail: str  # to print


class Engines:
    """The trainer's policy and the samplers "local" and "vllm". Methods are checks, and run on all ranks together."""

    cfg: schema.Recipe
    folder: Path  # of the model
    policy: Policy
    local: LocalSampler
    vllm: VllmSampler
    prompts: list[Prompt]  # text, then images
    pair: list[Prompt]  # equal but for the pixels of their image

    def load(self, cfg: schema.Recipe, device: str, scratch: Path) -> str:
        """Load the model that the recipe names, or write a random one to `scratch`; prepare the prompts."""
        embedded = cfg.model.startswith("world:")

        def prepare() -> Processor:
            self.folder = write_model(scratch) if embedded else weights.find(cfg.model)
            processor = Processor(self.folder, cfg.prompt)
            *self.prompts, left, right = (processor.prepare(row, False) for row in make_rows())
            self.pair = [left, right]
            return processor

        # The first rank of a host downloads, and the others find the files.
        on_all_ranks(lambda: weights.find(cfg.model) if dist.is_host_main() and not embedded else None)
        processor = on_all_ranks(prepare)
        self.cfg, self.policy = cfg, setup.load_policy(cfg, self.folder, device, processor)
        self.local = LocalSampler(self.policy)
        size = sum(p.numel() for p in self.policy.model.parameters())
        return f"{size / 1e6:,.1f} M parameters, {self.policy.dtype}"

    def load_vllm(self) -> str:
        """Start vLLM with the recipe's settings and room for the prompts here."""
        cfg = copy.deepcopy(self.cfg)
        needed = max(len(prompt.ids) for prompt in (*self.prompts, *self.pair)) + NEW_TOKENS
        if dist.size() == 1:
            cfg.rollout.tensor_parallel = 1
        cfg.evaluate.max_prompt_tokens = max(cfg.evaluate.max_prompt_tokens or 0, needed)
        cfg.rollout.max_model_len = cfg.rollout.max_model_len and max(cfg.rollout.max_model_len, needed)
        self.vllm = VllmSampler(self.policy, cfg, self.folder)
        runner = on_all_ranks(lambda: self.vllm.engine.collective_rpc(model_runner)[0])
        return f"{runner}; {len(self.vllm.tensors)} tensors read back"

    def generate(self, engine: str, prompts: list[Prompt], count: int = 1, temperature: float = 1.0) -> list[Group]:
        """Sample `count` responses per prompt. Every engine of several gets different seeds."""
        params = SamplingParams(count, NEW_TOKENS, temperature, banned_ids=self.policy.banned_ids)
        sampler = self.local if engine == "local" else self.vllm
        seeds = [(i, dist.rank() // sampler.ranks_per_engine) for i in range(len(prompts))]
        return on_all_ranks(sampler.generate, prompts, params, seeds)

    def trainer_logprobs(self, groups: list[Group], prompts: list[Prompt] | None = None) -> torch.Tensor:
        """The trainer's log-probs of the responses, (responses, NEW_TOKENS), optionally after other prompts."""
        if prompts:
            groups = [Group(prompt, group.responses) for prompt, group in zip(prompts, groups, strict=True)]
        logp = torch.zeros(stack(groups, "ids").shape)
        for pack in pack_groups(groups, self.policy.pack.tokens_per_micro_batch)[0]:
            logp.view(-1)[pack.flat_index] = self.policy.logprobs(pack, 1.0)[0].cpu()
        return logp

    def compare(self, engine: str, prompts: list[Prompt], count: int = 2, temperature: float = 1.0) -> Comparison:
        """Check that the log-probs of an engine's responses are the trainer's, in the mean and in every response."""
        groups = self.generate(engine, prompts, count, temperature)
        logp = self.trainer_logprobs(groups)
        error = (logp - stack(groups, "logp")).abs()
        detail = f"log-prob error {error.mean():.1e}, max {error.max():.1e}"
        limit, worst = LOGP_LIMIT[self.policy.dtype], float(error.mean(1).max())
        on_all_ranks(require_below, float(error.mean()), limit, detail)
        on_all_ranks(require_below, worst, 3 * limit, f"log-prob error {worst:.1e} of a response")
        return Comparison(groups, logp, detail)

    def check_logprobs(self, engine: str, selection: slice) -> str:
        return self.compare(engine, self.prompts[selection]).detail

    def check_prompts(self, engine: str, name: str) -> str:
        """Check that an engine reads `pair` and not prompts with "other pictures" or "flat positions".

        If trainer and engine both ignored images or positions they would agree, so the trainer's log-probs must change
        with the prompts. The engine's error projected on that change tells which prompt it read, in any precision.
        """
        others = self.pair[::-1] if name == "other pictures" else [flat_positions(prompt) for prompt in self.pair]
        groups, logp, _ = self.compare(engine, self.pair, 4)
        change = (self.trainer_logprobs(groups, others) - logp).view(2, -1)  # row: prompt of the pair
        error = (stack(groups, "logp") - logp).view(2, -1)
        largest, smallest = float(error.abs().mean(1).max()), float(change.abs().mean(1).min())
        text = f"{name} move log-probs by {smallest:.1e}, error {largest:.1e}"
        share = float(((change * error).sum(1) / change.square().sum(1).clamp(min=1e-12)).max())
        on_all_ranks(require_below, share, 0.5, f"{engine} moves {share:.2f} of the way to {name}")
        least = MIN_CHANGE[name] * max(largest, LOGP_LIMIT[self.policy.dtype] / 100)
        on_all_ranks(require_above, smallest, least, text)
        return text

    def check_greedy(self) -> str:
        """Check that vLLM's greedy tokens are the embedded sampler's, except where two tokens are nearly as likely."""
        ours, logp, _ = self.compare("local", self.prompts, 1, 0.0)
        theirs, their_logp, _ = self.compare("vllm", self.prompts, 1, 0.0)
        differs = stack(ours, "ids") != stack(theirs, "ids")
        first = differs & (differs.cumsum(1) == 1)  # in each response
        gap = max([0.0, *(logp - their_logp)[first].tolist()])
        limit = 5 * LOGP_LIMIT[self.policy.dtype]
        on_all_ranks(require_below, gap, limit, f"vLLM's greedy token is less likely by {gap:.1e} nats")
        return f"{int((~differs).sum())} of {differs.numel()} greedy tokens alike"

    def check_update(self) -> str:
        """Change the weights, send them to both samplers, and compare again."""
        before = stack(self.generate("vllm", self.prompts, 1, 0.0), "ids")
        perturb(self.policy.model)
        self.local.update(export.published(self.policy.model))
        on_all_ranks(lambda: self.vllm.update(export.published(self.policy.model), verify=True))
        greedy = self.check_greedy()
        after = stack(self.generate("vllm", self.prompts, 1, 0.0), "ids")
        return f"{greedy}, {int((before != after).sum())} new"

    def check_padded_batch(self) -> str:
        """Compare a batch of the size that CUDA graphs pad most: stale values in padded rows may reach other rows."""
        graphs = self.vllm.engine.vllm_config.compilation_config.cudagraph_capture_sizes or []
        most = min(self.cfg.rollout.max_sequences, 64)

        def padding(count: int) -> int:
            return min((size - count for size in graphs if size >= count), default=0)

        count = max(range(1, most + 1), key=padding)
        padded = count + padding(count)
        if padded == count:
            count = min(11, most)
        prompts = [self.prompts[i % len(self.prompts)] for i in range(count)]
        detail = self.compare("vllm", prompts, 1).detail
        return f"{count} sequences, {f'padded to {padded}' if padded > count else 'no graph pads them'}, {detail}"

    def check_sleep(self) -> str:
        """Sleep, wake and compare twice: the second sleep may lose tensors that the first wake restored."""
        for _ in range(2):
            on_all_ranks(self.vllm.sleep)
            on_all_ranks(self.vllm.wake)
            detail = f"{self.check_greedy()}; {self.check_padded_batch()}"
        if self.policy.device.type == "cpu":  # only a GPU's memory is freed
            return f"caches emptied twice; {detail}"
        return f"{self.vllm.stats['left_asleep_mb']:.0f} MB kept; {detail}"


def check_engines(report: Report, cfg: schema.Recipe, device: str, scratch: Path) -> None:
    engines = Engines()
    report.check("model", engines.load, cfg, device, scratch)
    # A missing vLLM is a failure if the recipe asks for vLLM, otherwise its checks are skipped.
    needed = ("model",) if cfg.rollout.engine == "vllm" else ("model", "vllm")
    report.check("vllm load", engines.load_vllm, after=needed)
    for engine, after in (("local", "model"), ("vllm", "vllm load")):
        report.check(f"{engine} text", engines.check_logprobs, engine, slice(1), after=[after])
        report.check(f"{engine} images", engines.check_logprobs, engine, slice(1, None), after=[after])
        report.check(f"{engine} pictures", engines.check_prompts, engine, "other pictures", after=[after])
        report.check(f"{engine} M-RoPE", engines.check_prompts, engine, "flat positions", after=[after])
    report.check("vllm greedy", engines.check_greedy, after=["vllm load"])
    report.check("vllm padded batch", engines.check_padded_batch, after=["vllm load"])
    report.check("vllm new weights", engines.check_update, after=["vllm load"])
    report.check("vllm sleep, wake", engines.check_sleep, after=["vllm load", "vllm new weights"])
    if report.results["vllm load"] == "ok":
        engines.vllm.close()


def read_recipe(args: Sequence[str]) -> schema.Recipe:
    """The named recipe, or the recipe "single" with a small setup and the named model folder or a random model."""
    overrides, name = [arg for arg in args if "=" in arg], " ".join(arg for arg in args if "=" not in arg)
    small = [f"model={name or 'world:'}", *SMALL] if not name or Path(name).is_dir() else []
    return config.load("single" if small else name, [*small, *overrides])


def main(args: Sequence[str]) -> int:
    """Run all checks; returns the exit status."""
    if {"-h", "--help"} & set(args):
        print(__doc__)
        return 0
    cfg = read_recipe(args)
    cfg.dist.timeout_s = min(cfg.dist.timeout_s, TIMEOUT_S)
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = compute_dtype(cfg.dtype, device)
    report, began = Report(), time.perf_counter()
    with contextlib.suppress(RanksLost), tempfile.TemporaryDirectory() as scratch:
        if dist.launched():
            report.check("ranks", join_ranks, cfg, device)
        cfg.dist.offload = cfg.dist.offload and dist.size() > 1  # here a single rank has no FSDP, which offloads
        report.check("python", lambda: sys.version.split()[0])
        for package in ("torch", "triton", "transformers", *EXTRAS):
            report.check(package, package_version, package)
        report.check("device", torch.cuda.get_device_name if device == "cuda" else lambda: f"{os.cpu_count()} CPUs")
        if report.results["device"] == report.results.get("ranks", "ok") == "ok":
            check_kernels(report, cfg.pack, device, dtype)
            check_engines(report, cfg, device, Path(scratch))
    results = report.results.values()
    ok, skipped, failed = (sum(r.startswith(outcome) for r in results) for outcome in ("ok", "skipped", "failed"))
    if dist.is_main():
        print(f"{ok} checks ok, {skipped} skipped, {failed} failed in {time.perf_counter() - began:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    protect()
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        if dist.is_main():
            print(f"error: {error}", file=sys.stderr)
        status = 2
    dist.leave(status)
