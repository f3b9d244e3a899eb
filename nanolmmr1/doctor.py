"""Does it all work on this machine? Under a minute on a CPU, with what is installed and nothing else.

    python -m nanolmmr1.doctor [RECIPE or MODEL_FOLDER] [dotted.key=value ...]
    torchrun -m nanolmmr1.doctor [RECIPE or MODEL_FOLDER] [dotted.key=value ...]      with all that ranks add

Attention and head are compared with their references, the embedded sampler with the trainer, and vLLM with both: as
it loads, with new weights, in a batch that its CUDA graphs pad, after sleeping. Each sampler has to tell two pictures
apart, and positions in a picture. The model is a small random one made on the spot; given a recipe or a folder, it is
that one, with the recipe's kernels, precision and engine settings. No data is read.

Rows are printed as they come, so that a crash shows where it came. Of several ranks, what rank 0 found is shown, and
what failed on any of them. Exit status: 0; 1 something failed; 2 the arguments are wrong.
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
from importlib.metadata import distributions
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py; torch reads it when it is imported
import torch
from PIL import Image
from rich.console import Console
from rich.table import Column, Table
from torch.distributed.tensor import DTensor

from nanolmmr1 import config
from nanolmmr1.data.prompt import Processor
from nanolmmr1.data.rows import Row
from nanolmmr1.desk import cold_start
from nanolmmr1.errors import SharedError, UserError
from nanolmmr1.kernels.attention import Spans, attention
from nanolmmr1.kernels.linear_loss import FusedObjective, linear_loss
from nanolmmr1.model import weights
from nanolmmr1.model.qwen import Qwen25VL
from nanolmmr1.parallel import dist, export
from nanolmmr1.rollout import Group, SamplingParams
from nanolmmr1.rollout.local import LocalSampler
from nanolmmr1.run import setup
from nanolmmr1.terminal import printable, protect
from nanolmmr1.update.pack import pack_groups

EXTRAS = {"vllm": "vllm", "flash-attn": "flash", "liger-kernel": "bench"}  # optional package -> what brings it
KERNEL_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest error, relative to the largest right value
LOGP_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of the mean absolute error, in nats
FAR = {"other pictures": 3, "flat positions": 1}  # times the error: how far these have to move log-probs, at least
SMALL = ["phases.train.data=none", "phases.train.max_prompt_tokens=256", "phases.train.max_response_tokens=64",
         "prompt.max_pixels=40000", "rollout.max_sequences=16", "rollout.timeout_s=100"]  # fmt: skip
NEW_TOKENS = 24  # of a response
TIMEOUT_S = 300.0  # of a rank that waits for the others


class Skipped(Exception):
    """Why a check is not for this machine."""


class Lost(Exception):
    """The ranks are no longer at the same check, so no more can be made."""


class Report:
    """A table, printed row by row by rank 0. `results`: name -> "ok", "skipped: why" or "failed: why", on all ranks."""

    def __init__(self):
        width = None if sys.stdout.isatty() else 120
        self.console, self.results = Console(width=width, markup=False, quiet=not dist.is_main()), {}
        self.row("check", "result", "found", "   s")

    def row(self, name, result, found, seconds):
        style = {"o": "green", "s": "yellow", "f": "bold red"}.get(result[0], "bold")
        columns = Column(width=19), Column(ratio=1, style=style), Column(width=44)
        table = Table.grid(*columns, padding=(0, 1), expand=True)
        table.add_row(name, result, found, seconds)
        self.console.print(table)

    def check(self, name, run, *args, after=()):
        """A row for `run(*args)`, which returns what it found. It does not run where a check in `after` was not ok.

        Raises:
            Lost: the other ranks do not answer.
        """
        began, found, result = time.perf_counter(), "", "ok"
        try:
            for other in after:
                if (was := self.results.get(other, "ok")) != "ok":
                    raise Skipped(f"{other} failed" if was.startswith("failed") else was.removeprefix("skipped: "))
            found = run(*args)
        except Skipped as reason:
            result = f"skipped: {reason}"
        except Exception as error:  # whatever it is, this row says so and the others follow
            result = printable(f"failed: {told(error)}".partition("\n")[0])
            if not (dist.is_main() or isinstance(error, SharedError)):
                print(f"rank {dist.rank()}: {name} {result}", file=sys.stderr)  # now: the others may wait for long
        lost = None
        try:
            result, found = agreed(result, found)
        except Exception as error:
            result = result if result.startswith("failed") else f"failed: the other ranks are lost: {told(error)}"
            lost = Lost(name)
        self.results[name] = result
        self.row(name, result, found, f"{time.perf_counter() - began:4.1f}")
        if lost:
            raise lost


def told(error):
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def agreed(result, found):
    """The worst result of all ranks, on all of them, with what rank 0 found."""
    ranks = [json.loads(said) for said in dist.gather(json.dumps([result, found]).encode())]
    for kind in ("failed", "skipped"):
        bad = [rank for rank, (result, _) in enumerate(ranks) if result.startswith(kind)]
        if bad:
            who = f"rank {bad[0]}: " if len(bad) < len(ranks) else ""
            return f"{kind}: {who}{ranks[bad[0]][0].removeprefix(f'{kind}: ')}", ranks[bad[0]][1]
    return ranks[0]


def each(work, *args):
    """Every rank's own `work(*args)`. Where one fails, all do: none goes on alone to where it waits for the others."""

    def tried():
        try:
            return work(*args)
        except UserError:
            raise
        except Exception as error:
            raise UserError(told(error)) from error

    return dist.together(tried)


def installed(package):
    for found in (*distributions(name=package), *distributions(name=f"{package}-cpu")):  # as vLLM's for CPUs is named
        return found.version
    raise Skipped(f"pip install 'nanolmmr1[{EXTRAS[package]}]'" if package in EXTRAS else "unknown to pip")


def within(error, limit, found):
    if not error < limit:
        raise UserError(f"{found}; below {limit:g} is right")
    return found


def beyond(distance, least, found):
    if not distance > least:
        raise UserError(f"{found}; above {least:.1e} is right")


def check_kernels(report, pack, device, dtype):
    """Attention and head by every implementation, forward and backward, on one prompt with two responses."""
    T, table = 70, [[0, 20, 0, 20, 0, 0, 1], [20, 37, 20, 37, 0, 20, 1], [37, 70, 37, 70, 0, 20, 1]]
    spans, target = Spans(torch.tensor(table), T), torch.arange(T, device=device) * 7
    torch.manual_seed(0)
    advantage = torch.randn(T).to(device)
    fused = FusedObjective(advantage, torch.ones_like(advantage), loss_type="cispo")

    def head(impl, hidden, weight):
        outputs = linear_loss(hidden, weight, target, lambda logp, _, rows: -advantage[rows] * logp, fused=fused,
                              banned=(3,), impl=impl)
        return torch.cat([x.view(-1) for x in outputs])  # loss, log-probs, entropies; the first has a gradient

    def outcome(op, impl, inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = op(impl, *inputs)
        out.square().sum().backward()
        return [x.detach().double() for x in (out, *(x.grad for x in inputs))]

    def compare(op, impl, wanted, inputs):
        right = outcome(op, "reference", [x.double() for x in inputs])
        try:
            ours = outcome(op, impl, inputs)
        except ValueError as refusal:  # of the implementation, since the reference took the same
            raise (UserError if wanted else Skipped)(str(refusal)) from refusal
        # torch's maximum, unlike Python's, lets no NaN pass.
        off = [(a - b).abs().max() / b.abs().max() for a, b in zip(ours, right, strict=True)]
        error = float(torch.stack(off).max())
        return within(error, KERNEL_LIMIT[dtype], f"relative error {error:.1e}")

    for name, op, impls, shapes in (
        ("attention", lambda impl, *qkv: attention(*qkv, spans, impl=impl), ("triton", "varlen", "flash", "sdpa"),
         [(T, heads, 32) for heads in (4, 2, 2)]),
        ("head", head, ("triton", "chunked"), [(T, 64), (1003, 64)]),
    ):
        inputs = [torch.randn(shape).to(device, dtype) for shape in shapes]
        for impl in impls:
            report.check(f"{name} {impl}", compare, op, impl, impl == getattr(pack, name), inputs)


def meet(cfg, device):
    """Join the ranks that torchrun started."""
    dist.start(device, cfg.dist.timeout_s)
    return f"{dist.size()}, the model sharded over {cfg.dist.shard}" if dist.sharded() else "1"


def questions():
    """Rows; the last two show two pictures of one size, whose halves trade places."""

    def picture(width, height):
        Image.radial_gradient("L").resize((width, height)).save(file := io.BytesIO(), "PNG")
        return file.getvalue()

    def halves(left, right):
        whole = Image.new("RGB", (280, 140), left)
        whole.paste(right, (140, 0, 280, 140))
        whole.save(file := io.BytesIO(), "PNG")
        return file.getvalue()

    yield Row("How much is 3 + 4?", "7", id="text")
    yield Row("What is in <image>?", "a disc", [picture(140, 60)], id="image")
    yield Row("Is <image> as <image>?", "no", [picture(90, 90), picture(30, 200)], id="images")
    yield Row("Which half of <image> is red?", "left", [halves("red", "blue")], id="left")
    yield Row("Which half of <image> is red?", "right", [halves("blue", "red")], id="right")


def flat(prompt):
    """The prompt with no heights and widths: all tokens of a picture stand at its first one's position."""
    positions = prompt.positions.clone()
    positions[1:, prompt.image_slots] = positions[0, prompt.image_slots]
    return dataclasses.replace(prompt, positions=positions)


def write_model(folder):
    """The desk's architecture and tokenizer, and weights with opinions: flat logits would hide most mistakes."""
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
def shake(model):
    """New weights, one and the same model on all ranks: replicas of a shard are shaken alike."""
    first = next(model.parameters())
    torch.manual_seed(first.device_mesh.get_local_rank("shard") if isinstance(first, DTensor) else 0)
    for p in model.parameters():
        own = p.to_local() if isinstance(p, DTensor) else p
        own.mul_(1 + 0.3 * torch.randn_like(own))


def stacked(groups, name):
    """`ids` or `logp` of all responses, (responses, L)."""
    return torch.stack([getattr(r, name) for group in groups for r in group.responses])


class Patient:
    """A model and its samplers; its methods are checks. On several ranks every one is made by all of them together."""

    def load(self, cfg, device, scratch):
        def prepare():
            self.folder = write_model(scratch) if cfg.model.startswith("world:") else weights.find(cfg.model)
            processor = Processor(self.folder, cfg.prompt)
            *self.prompts, left, right = (processor.prepare(row, False) for row in questions())
            self.halves = [left, right]
            return processor

        each(lambda: dist.is_host_main() and not cfg.model.startswith("world:") and weights.find(cfg.model))
        processor = each(prepare)
        self.policy = setup.load_policy(cfg, self.folder, device, processor)
        self.local = LocalSampler(self.policy)
        size = sum(p.numel() for p in self.policy.model.parameters())
        return f"{size / 1e6:,.1f} M parameters, {self.policy.dtype}"

    def load_vllm(self):
        from nanolmmr1.rollout.vllm import VllmSampler

        cfg = copy.deepcopy(self.policy.cfg)
        needed = max(len(p.ids) for p in (*self.prompts, *self.halves)) + NEW_TOKENS
        if dist.size() == 1:
            cfg.rollout.tensor_parallel = 1  # whatever the recipe has
        cfg.evaluate.max_prompt_tokens = max(cfg.evaluate.max_prompt_tokens, needed)  # room for the questions here
        cfg.rollout.max_model_len = cfg.rollout.max_model_len and max(cfg.rollout.max_model_len, needed)
        self.vllm = VllmSampler(self.policy, cfg, self.folder)
        return f"{each(self.runner)}; {len(self.vllm.tensors)} tensors read back"

    def runner(self):
        """Which of vLLM's model runners there is: two generations of them keep positions and batches differently."""

        def find(worker):
            kind, second = type(worker.model_runner), getattr(worker, "use_v2_model_runner", None)
            generation = "unknown" if second is None else "V2" if second else "V1"
            return f"{generation} {kind.__name__} of {kind.__module__}"

        return self.vllm.engine.collective_rpc(find)[0]

    def ask(self, engine, prompts, count=1, temperature=1.0):
        """Groups of `count` responses; engines of other ranks are given other seeds."""
        params = SamplingParams(count, NEW_TOKENS, temperature, banned_ids=self.policy.banned_ids)
        sampler = getattr(self, engine)
        seeds = [(i, dist.rank() // sampler.ranks) for i in range(len(prompts))]
        return each(sampler.generate, prompts, params, seeds)

    def score(self, groups, prompts=None):
        """The trainer's log-probs of the responses, (responses, L); prompts: to be read in place of the groups' own."""
        if prompts:
            groups = [Group(prompt, group.responses) for prompt, group in zip(prompts, groups, strict=True)]
        logp = torch.zeros(stacked(groups, "ids").shape)
        for pack in pack_groups(groups, self.policy.cfg.pack.tokens_per_micro_batch)[0]:
            logp.view(-1)[pack.flat_index] = self.policy.logprobs(pack, 1.0)[0].cpu()
        return logp

    def sample(self, engine, prompts, count=2, temperature=1.0):
        """Whether the log-probs that come with responses are the trainer's; no response hides among the others.

        Returns:
            groups, the trainer's log-probs, what was found
        """
        groups = self.ask(engine, prompts, count, temperature)
        logp = self.score(groups)
        error = (logp - stacked(groups, "logp")).abs()
        found = f"log-prob error {error.mean():.1e}, max {error.max():.1e}"
        each(within, error.mean(), LOGP_LIMIT[self.policy.dtype], found)
        worst = error.mean(1).max()
        each(within, worst, 3 * LOGP_LIMIT[self.policy.dtype], f"log-prob error {worst:.1e} of a response")
        return groups, logp, found

    def answer(self, engine, part):
        return self.sample(engine, self.prompts[part])[2]

    def discern(self, engine, others, what):
        """Whether the sampler's log-probs are the trainer's for these prompts, and not for others that are like them.

        Trainer and sampler could agree on a picture, or positions, that neither reads: so the trainer's own have to
        move. How much of that move the sampler makes tells which prompt it read, even where the precision is poor.
        others: in place of `halves`.
        """
        groups, logp, _ = self.sample(engine, self.halves, 4)
        move, off = (x.view(2, -1) for x in (self.score(groups, others) - logp, stacked(groups, "logp") - logp))
        error, moved = off.abs().mean(1).max(), move.abs().mean(1).min()  # of either picture
        found = f"{what} move log-probs by {moved:.1e}, error {error:.1e}"
        share = float(((move * off).sum(1) / move.square().sum(1).clamp(min=1e-12)).max())
        each(within, share, 0.5, f"{engine} moves {share:.2f} of the way to {what}")
        each(beyond, moved, FAR[what] * max(float(error), LOGP_LIMIT[self.policy.dtype] / 100), found)
        return found

    def pictures(self, engine):
        return self.discern(engine, self.halves[::-1], "other pictures")

    def positions(self, engine):
        return self.discern(engine, [flat(prompt) for prompt in self.halves], "flat positions")

    def speak(self):
        """Whether vLLM's greedy tokens are the embedded sampler's, up to choices between near equals."""
        ours, logp, _ = self.sample("local", self.prompts, 1, 0.0)
        theirs, their_logp, _ = self.sample("vllm", self.prompts, 1, 0.0)
        differs = stacked(ours, "ids") != stacked(theirs, "ids")
        gaps = (logp - their_logp)[differs & (differs.cumsum(1) == 1)].tolist()  # where each response first differs
        gap = max([0.0, *gaps])
        limit = 5 * LOGP_LIMIT[self.policy.dtype]
        each(within, gap, limit, f"vLLM's greedy token is less likely by {gap:.1e} nats")
        return f"{int((~differs).sum())} of {differs.numel()} greedy tokens alike"

    def hand_over(self):
        before = stacked(self.ask("vllm", self.prompts, 1, 0.0), "ids")
        shake(self.policy.model)
        self.local.update(export.published(self.policy.model))
        each(lambda: self.vllm.update(export.published(self.policy.model), verify=True))
        alike = self.speak()
        after = stacked(self.ask("vllm", self.prompts, 1, 0.0), "ids")
        return f"{alike}, {int((before != after).sum())} new"

    def batch(self):
        """Sequences decoded together, as many as need most padding: what CUDA graphs leave in rows that are padded
        is read as positions and block numbers there, and may reach others."""
        graphs = self.vllm.engine.vllm_config.compilation_config.cudagraph_capture_sizes or []
        most = min(self.policy.cfg.rollout.max_sequences, 64)

        def padding(n):
            return min((size - n for size in graphs if size >= n), default=0)

        n = max(range(1, most + 1), key=padding)
        pad = padding(n)
        n = n if pad else min(11, most)
        prompts = [self.prompts[i % len(self.prompts)] for i in range(n)]
        found = self.sample("vllm", prompts, 1)[2]
        return f"{n} sequences, {f'padded to {n + pad}' if pad else 'no graph pads them'}, {found}"

    def sleep(self):
        """Twice, since what is restored after the first time may be lost in the second."""
        for _ in range(2):
            each(self.vllm.sleep)
            each(self.vllm.wake)
            found = f"{self.speak()}; {self.batch()}"
        if self.policy.device.type == "cpu":  # which has no memory to give back
            return f"caches emptied twice; {found}"
        return f"{self.vllm.stats['left_asleep_mb']:.0f} MB kept; {found}"


def examine(report, cfg, device, dtype, scratch):
    patient = Patient()
    check_kernels(report, cfg.pack, device, dtype)
    report.check("model", patient.load, cfg, device, scratch)
    # A recipe that asks for vLLM fails without it.
    needed = ("model",) if cfg.rollout.engine == "vllm" else ("model", "vllm")
    report.check("vllm load", patient.load_vllm, after=needed)
    for engine, after in (("local", "model"), ("vllm", "vllm load")):
        report.check(f"{engine} text", patient.answer, engine, slice(1), after=[after])
        report.check(f"{engine} images", patient.answer, engine, slice(1, None), after=[after])
        report.check(f"{engine} pictures", patient.pictures, engine, after=[after])
        report.check(f"{engine} M-RoPE", patient.positions, engine, after=[after])
    report.check("vllm greedy", patient.speak, after=["vllm load"])
    report.check("vllm padded batch", patient.batch, after=["vllm load"])
    report.check("vllm new weights", patient.hand_over, after=["vllm load"])
    report.check("vllm sleep, wake", patient.sleep, after=["vllm load", "vllm new weights"])
    if report.results["vllm load"] == "ok":
        patient.vllm.close()


def main(args):
    """Returns the exit status."""
    if {"-h", "--help"} & set(args):
        return print(__doc__)
    overrides, given = [a for a in args if "=" in a], " ".join(a for a in args if "=" not in a)
    small = [f"model={given or 'world:'}", *SMALL] if not given or Path(given).is_dir() else []
    cfg = config.load("single" if small else given, [*small, *overrides])
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, cfg.dtype if cfg.dtype != "auto" else "bfloat16" if device == "cuda" else "float32")
    cfg.dist.timeout_s = min(cfg.dist.timeout_s, TIMEOUT_S)

    report, began = Report(), time.perf_counter()
    with contextlib.suppress(Lost), tempfile.TemporaryDirectory() as scratch:
        if dist.launched():
            report.check("ranks", meet, cfg, device)
        cfg.dist.offload = cfg.dist.offload and dist.size() > 1  # FSDP has no model of a single rank here
        report.check("python", lambda: sys.version.split()[0])
        for package in ("torch", "triton", "transformers", *EXTRAS):
            report.check(package, installed, package)
        report.check("device", torch.cuda.get_device_name if device == "cuda" else lambda: f"{os.cpu_count()} CPUs")
        if report.results["device"] == report.results.get("ranks", "ok") == "ok":
            examine(report, cfg, device, dtype, Path(scratch))
    ok, skipped, failed = (
        sum(result.startswith(kind) for result in report.results.values()) for kind in ("ok", "skipped", "failed")
    )
    if dist.is_main():
        print(f"{ok} checks ok, {skipped} skipped, {failed} failed in {time.perf_counter() - began:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    protect()
    try:
        status = main(sys.argv[1:]) or 0
    except UserError as error:
        if dist.is_main():
            print(f"error: {error}", file=sys.stderr)
        status = 2
    dist.leave(status)
