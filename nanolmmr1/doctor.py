"""Does it all work on this machine? Under a minute on a CPU, with what is installed and nothing else.

    python -m nanolmmr1.doctor [RECIPE or MODEL_FOLDER] [dotted.key=value ...]

Attention and head are compared with their references, the embedded sampler with the trainer, and vLLM with both: as
it loads, with new weights, after sleeping. The model is a small random one made on the spot; given a recipe or a
folder, it is that one, with the recipe's kernels, precision and engine settings. No data is read. Rows are printed as
they come, so that a crash shows where it came. Exit status: 0; 1 something failed; 2 the arguments are wrong.
"""

import copy
import io
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

from nanolmmr1 import config, weights
from nanolmmr1.config import UserError
from nanolmmr1.data import Row
from nanolmmr1.desk import cold_start
from nanolmmr1.kernels.attention import Spans, attention
from nanolmmr1.kernels.linear_loss import FusedObjective, linear_loss
from nanolmmr1.model import Qwen25VL
from nanolmmr1.pack import pack_groups
from nanolmmr1.policy import Policy
from nanolmmr1.prompt import Processor
from nanolmmr1.rollout import SamplingParams
from nanolmmr1.rollout.local import LocalSampler
from nanolmmr1.terminal import printable, protect

EXTRAS = {"vllm": "vllm", "flash-attn": "flash", "liger-kernel": "bench"}  # optional package -> what brings it
KERNEL_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest error, relative to the largest right value
LOGP_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of the mean absolute error, in nats
SMALL = ["phases.train.data=none", "phases.train.max_prompt_tokens=256", "phases.train.max_response_tokens=64",
         "prompt.max_pixels=20000", "rollout.max_sequences=16", "rollout.timeout_s=100"]  # fmt: skip
NEW_TOKENS = 24  # of a response


class Skipped(Exception):
    """Why a check is not for this machine."""


class Report:
    """A table, printed row by row. `results`: name -> "ok", "skipped: why" or "failed: why"."""

    def __init__(self):
        self.console, self.results = Console(width=None if sys.stdout.isatty() else 120, markup=False), {}
        self.row("check", "result", "found", "   s")

    def row(self, name, result, found, seconds):
        style = {"o": "green", "s": "yellow", "f": "bold red"}.get(result[0], "bold")
        columns = Column(width=19), Column(ratio=1, style=style), Column(width=44)
        table = Table.grid(*columns, padding=(0, 1), expand=True)
        table.add_row(name, result, found, seconds)
        self.console.print(table)

    def check(self, name, run, *args, after=None):
        """A row for `run(*args)`, which returns what it found. It does not run where check `after` was not ok."""
        began, found, result = time.perf_counter(), "", self.results.get(after, "ok")
        try:
            if result != "ok":
                raise Skipped(f"{after} failed" if result.startswith("failed") else result.removeprefix("skipped: "))
            found = run(*args)
        except Skipped as reason:
            result = f"skipped: {reason}"
        except Exception as error:  # whatever it is, this row says so and the others follow
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            result = printable(f"failed: {kind}{error}".partition("\n")[0])
        self.results[name] = result
        self.row(name, result, found, f"{time.perf_counter() - began:4.1f}")


def installed(package):
    for found in (*distributions(name=package), *distributions(name=f"{package}-cpu")):  # as vLLM's for CPUs is named
        return found.version
    raise Skipped(f"pip install 'nanolmmr1[{EXTRAS[package]}]'" if package in EXTRAS else "unknown to pip")


def within(error, limit, found):
    if not error < limit:
        raise UserError(f"{found}; below {limit:g} is right")
    return found


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


def questions():
    def picture(width, height):
        Image.radial_gradient("L").resize((width, height)).save(file := io.BytesIO(), "PNG")
        return file.getvalue()

    yield Row("How much is 3 + 4?", "7", id="text")
    yield Row("What is in <image>?", "a disc", [picture(140, 60)], id="image")
    yield Row("Is <image> as <image>?", "no", [picture(90, 90), picture(30, 200)], id="images")


def write_model(folder):
    """The desk's architecture and tokenizer, and weights with opinions: flat logits would hide most mistakes."""
    cold_start.write_settings(folder, {"text_train": [], "image_train": []})
    torch.manual_seed(0)
    model = Qwen25VL(weights.read_config(folder))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2 if p.ndim > 1 else 1)
        model.model.embed_tokens.weight.mul_(0.06)
    weights.save(model, folder, folder)
    return folder


class Patient:
    """A model and its samplers; its methods are checks."""

    def load(self, cfg, device, dtype, scratch):
        self.folder = write_model(scratch) if cfg.model.startswith("world:") else weights.find(cfg.model)
        processor = Processor(self.folder, cfg.prompt)
        self.prompts = [processor.prepare(row, False) for row in questions()]
        self.policy = Policy(weights.load(self.folder, device=device), cfg, processor.banned_ids, dtype)
        self.local = LocalSampler(self.policy)
        return f"{sum(p.numel() for p in self.policy.model.parameters()) / 1e6:,.1f} M parameters, {dtype}"

    def load_vllm(self):
        if self.policy.cfg.rollout.engine != "vllm":
            installed("vllm")
        from nanolmmr1.rollout.vllm import VllmSampler
        cfg, needed = copy.deepcopy(self.policy.cfg), max(len(p.ids) for p in self.prompts) + NEW_TOKENS
        cfg.rollout.tensor_parallel = 1  # there is one process
        cfg.evaluate.max_prompt_tokens = max(cfg.evaluate.max_prompt_tokens, needed)  # room for the questions here
        cfg.rollout.max_model_len = cfg.rollout.max_model_len and max(cfg.rollout.max_model_len, needed)
        self.vllm = VllmSampler(self.policy, cfg, self.folder)
        return f"{len(self.vllm.tensors)} tensors read back"

    def sample(self, engine, part, count=2, temperature=1.0):
        """Whether the log-probs that come with responses are the trainer's. Keeps ids and these, (responses, L)."""
        params = SamplingParams(count, NEW_TOKENS, temperature, banned_ids=self.policy.banned_ids)
        groups = getattr(self, engine).generate(self.prompts[part], params, [(0,), (1,), (2,)][part])
        responses = [r for group in groups for r in group.responses]
        self.ids, told = (torch.stack([getattr(r, name) for r in responses]) for name in ("ids", "logp"))
        self.logp = torch.zeros_like(told)
        for pack in pack_groups(groups, self.policy.cfg.pack.tokens_per_micro_batch)[0]:
            self.logp.view(-1)[pack.where] = self.policy.score(pack, 1.0)[0].cpu()
        error = (self.logp - told).abs()
        limit, found = LOGP_LIMIT[self.policy.dtype], f"log-prob error {error.mean():.1e}, max {error.max():.1e}"
        return within(error.mean(), limit, found)

    def speak(self):
        """Whether vLLM's greedy tokens are the embedded sampler's, up to choices between near equals."""
        self.sample("local", slice(None), 1, 0.0)
        ids, logp = self.ids, self.logp
        self.sample("vllm", slice(None), 1, 0.0)
        differs = self.ids != ids
        gaps = (logp - self.logp)[differs & (differs.cumsum(1) == 1)].tolist()  # where each response first differs
        gap = max([0.0, *gaps])
        within(gap, 5 * LOGP_LIMIT[self.policy.dtype], f"vLLM's greedy token is less likely by {gap:.1e} nats")
        return f"{int((~differs).sum())} of {ids.numel()} greedy tokens alike"

    def hand_over(self):
        before, model = self.ids, self.policy.model
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 0.3 * torch.randn_like(p))
        self.vllm.update(weights.published(model), verify=True)
        return f"{self.speak()}, {int((before != self.ids).sum())} new"

    def sleep(self):
        if self.policy.device.type == "cpu":
            raise Skipped("a CPU has no memory to give back")
        self.vllm.sleep()
        self.vllm.wake()
        return f"{self.speak()}, {self.vllm.stats['left_asleep_mb']:.0f} MB kept"


def main(args):
    """Returns the exit status."""
    if {"-h", "--help"} & set(args):
        return print(__doc__)
    overrides, given = [a for a in args if "=" in a], " ".join(a for a in args if "=" not in a)
    small = [f"model={given or 'world:'}", *SMALL] if not given or Path(given).is_dir() else []
    cfg = config.load("single" if small else given, [*small, *overrides])
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, cfg.dtype if cfg.dtype != "auto" else "bfloat16" if device == "cuda" else "float32")

    report, patient, began = Report(), Patient(), time.perf_counter()
    report.check("python", lambda: sys.version.split()[0])
    for package in ("torch", "triton", "transformers", *EXTRAS):
        report.check(package, installed, package)
    with tempfile.TemporaryDirectory() as scratch:
        report.check("device", torch.cuda.get_device_name if device == "cuda" else lambda: f"{os.cpu_count()} CPUs")
        if report.results["device"] == "ok":
            check_kernels(report, cfg.pack, device, dtype)
            report.check("model", patient.load, cfg, device, dtype, Path(scratch))
            report.check("vllm load", patient.load_vllm, after="model")
            for engine, after in (("local", "model"), ("vllm", "vllm load")):
                report.check(f"{engine} text", patient.sample, engine, slice(1), after=after)
                report.check(f"{engine} images", patient.sample, engine, slice(1, None), after=after)
            report.check("vllm greedy", patient.speak, after="vllm load")
            report.check("vllm new weights", patient.hand_over, after="vllm load")
            report.check("vllm sleep, wake", patient.sleep, after="vllm load")
            if report.results["vllm load"] == "ok":
                patient.vllm.close()
    ok, skipped, failed = (
        sum(result.startswith(kind) for result in report.results.values()) for kind in ("ok", "skipped", "failed")
    )
    print(f"{ok} checks ok, {skipped} skipped, {failed} failed in {time.perf_counter() - began:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    protect()
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
