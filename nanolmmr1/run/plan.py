"""The memory, steps and rows of a run before it starts: `python train.py RECIPE --plan`; and a forecast during a run.

Memory per rank and stage, the largest token budget that fits, cures if nothing fits, and the steps, tokens and
rows of each phase. Memory is measured on fake tensors at the sizes of the longest rows, with responses of full length
and an optimizer that has its state. Neither weights nor a GPU are needed. For published models, whose sizes come with
this package, no network either.

On a CPU the process is part of the sum, at its size with everything imported and all rows read. Freed memory that
glibc's heap retains is not; MALLOC_MMAP_THRESHOLD_=131072 in the environment makes glibc return it.

Next: phase_plan.py, the memory of a phase.
"""

import contextlib
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Literal, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nanolmmr1 import schema
from nanolmmr1.errors import UserError
from nanolmmr1.model import weights
from nanolmmr1.model.qwen import ModelConfig
from nanolmmr1.parallel import dist
from nanolmmr1.report import usage
from nanolmmr1.run.fake_step import Machine
from nanolmmr1.run.phase_plan import GB, MOST_TOKENS, Longest, PhasePlan, Stage, machine, phase_plans
from nanolmmr1.terminal import printable

SIZES = Path(weights.__file__).parent / "sizes"  # config.json of published models, by name
HEADINGS = {  # label of memory -> heading
    "weights": "weights", "gradients": "grads", "optimizer": "optim.", "reference": "ref.", "gathered": "gathered",
    "activations": "activ.", "vision": "vision", "head": "head", "work": "work", "sampler": "sampler",
}  # fmt: skip
CURES: tuple[dict[str, Any], ...] = (  # changes that make a run smaller, cheapest first
    {},
    {"pack.checkpoint_activations": "swiglu"},
    {"pack.checkpoint_activations": "all"},
    {"pack.checkpoint_activations": "all", "dist.offload_reference": True},
    {"pack.checkpoint_activations": "all", "dist.offload": True},
    {"pack.checkpoint_activations": "all", "optim.weights": "bfloat16"},
    {"pack.checkpoint_activations": "all", "optim.weights": "bfloat16", "dist.offload": True},
)


def show(cfg: schema.Recipe) -> None:
    """Print the plan of a recipe.

    Raises:
        UserError: the model's config is neither here nor on the hub; plan.* describes no machine.
    """
    console = Console(width=120, markup=False, highlight=False)
    (folder, notes), where = find_settings(cfg), machine(cfg)
    model = weights.read_config(folder)
    sizes, more = measure_rows(cfg, folder)
    longest = {name: find_longest(cfg, phase, sizes.get(name)) for name, phase in cfg.phases.items()}
    floor = usage.rss_mb() * 1e6 if where.device == "cpu" else 0
    tables, peak, most, total = [], (0.0, "", ""), MOST_TOKENS, 0
    for plan in phase_plans(cfg, model, where, longest):
        stages, total = plan.stages(cfg.pack.tokens_per_micro_batch), plan.total
        tables.append(memory_table(stages, f"GB per rank, {', '.join(plan.names)}", floor))
        worst = max(stages, key=lambda stage: stage.total)
        update = next(stage.total for stage in stages if stage.name == "update")
        if where.capacity and worst.total <= where.capacity and update > peak[0]:
            most = plan.largest_budget({cfg.pack.tokens_per_micro_batch: update}, most)
        peak = max(peak, (worst.total + floor, worst.name, plan.names[0]))
    console.print(f"{cfg.name}: {cfg.model}, {total / 1e9:.2f} B parameters, on {where.name}\n")
    for line in (*notes, *more):
        console.print(printable(line))
    for table in (phase_table(cfg, longest, where.ranks), *tables):
        console.print(table)
    for line in verdict(cfg, model, where, longest, peak, most, floor):
        console.print(line)


def verdict(
    cfg: schema.Recipe, model: ModelConfig, where: Machine, longest: dict[str, Longest],
    peak: tuple[float, str, str], most: int, floor: float,
) -> Iterator[str]:  # fmt: skip
    """Whether it fits, the largest token budget that does, and if it does not fit, the cures."""
    size, stage, name = peak
    if where.device == "cpu":
        yield f"Peak: {size / GB:.1f} GB of this machine's memory per rank, {floor / GB:.1f} of it the process itself."
        return
    says = f"Peak: {size / GB:.1f} of {where.capacity / GB:.1f} GB, in {stage} of {name}."
    if size <= where.capacity:
        yield f"{says} It fits, with pack.tokens_per_micro_batch up to {most:,} at least."
        return
    fitting = list(islice(cures(cfg, model, where, longest), 3))
    if not fitting:
        yield f"{says} It does not fit, whatever is recomputed or offloaded: more or larger GPUs are needed."
    else:
        yield f"{says} It does not fit. What would, cheapest first:"
        yield from (f"  {' '.join(cure)}" for cure in fitting)


def cures(
    cfg: schema.Recipe, model: ModelConfig, where: Machine, longest: dict[str, Longest]
) -> Iterator[list[str]]:
    """Lists of `key=value` with which the recipe fits."""
    known: list[list[str]] = []
    for changes in CURES:
        smaller = fitted(changed(cfg, changes), model, where, longest)
        if smaller is None:
            continue
        keys = ("pack.checkpoint_activations", "dist.offload_reference", "dist.offload", "optim.weights",
                "rollout.engine", "rollout.gpu_memory_utilization", "rollout.max_sequences",
                "pack.tokens_per_micro_batch")  # fmt: skip
        values = [(key, _value(smaller, key)) for key in keys]
        cure = [f"{key}={str(value).lower()}" for key, value in values if value != _value(cfg, key)]
        if cure not in known:  # some of it may be in the recipe
            known.append(cure)
            yield cure


def fitted(
    cfg: schema.Recipe, model: ModelConfig, where: Machine, longest: dict[str, Longest]
) -> schema.Recipe | None:
    """The recipe with a sampler and a token budget that fit; None: there are none."""
    for plan in phase_plans(cfg, model, where, longest):
        for change in ({}, *samplers(cfg)):
            tried = changed(cfg, change)
            trial = PhasePlan(tried, plan.names, model, where, plan.longest, plan.step, plan.shared)
            if trial.sampling().total <= where.capacity:
                break
        else:
            return None
        cfg, budget = tried, tried.pack.tokens_per_micro_batch
        if sum(trial.persistent.values()) + trial.extra["reference"] + trial.extra["sampler"] > where.capacity:
            return None
        budget = trial.largest_budget({budget: trial.update(budget).total}, budget)
        if not budget:
            return None
        cfg.pack.tokens_per_micro_batch = budget
    return cfg


def samplers(cfg: schema.Recipe) -> list[dict[str, Any]]:
    """Changes that make the sampler smaller, step by step."""
    shares = [n / 100 for n in range(90, 0, -5)]  # of a GPU, for vLLM
    if cfg.rollout.engine == "vllm":
        return [{"rollout.gpu_memory_utilization": n} for n in shares if n < cfg.rollout.gpu_memory_utilization]
    sizes = [2**n for n in range(10, 2, -1) if 2**n < cfg.rollout.max_sequences]
    vllm = [{"rollout.engine": "vllm", "rollout.gpu_memory_utilization": share} for share in shares]
    return [{"rollout.max_sequences": size} for size in sizes] + vllm if cfg.rollout.engine == "local" else []


def changed(cfg: schema.Recipe, changes: dict[str, Any]) -> schema.Recipe:
    """The recipe with dotted keys changed."""
    cfg = copy.deepcopy(cfg)
    for key, value in changes.items():
        section, name = key.split(".")
        setattr(getattr(cfg, section), name, value)
    return cfg


def _value(cfg: schema.Recipe, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(cfg, section), name)


def find_settings(cfg: schema.Recipe) -> tuple[Path, list[str]]:
    """(folder of a model's config and tokenizer, notes). Of a model on the hub only these are downloaded.

    Raises:
        UserError: they are neither here nor on a hub that can be reached.
    """
    model, shipped = cfg.model, SIZES / Path(cfg.model).name
    if model.startswith("world:"):
        built = Path(cfg.output) / "world" / model.removeprefix("world:")
        if not built.is_dir():
            raise UserError(f"model={model}: {cfg.output} holds none yet; the recipe's first run makes it there")
        return built, []
    if Path(model).is_dir():
        return Path(model), []
    published = model.startswith("Qwen/") and shipped.is_dir()
    try:
        folder = Path(snapshot_download(model, allow_patterns=list(weights.COMPANIONS), local_files_only=published))
        if (folder / "config.json").is_file() or not published:
            return folder, []
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if not published:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"model={model!r} is no folder here, and its config.json cannot be fetched ({reason}): "
                "give a folder that holds config.json and the tokenizer's files; weights are not needed for a plan"
            ) from error
    return shipped, [f"{model} is not in the local cache: its published sizes are used, which come with this package"]


def measure_rows(cfg: schema.Recipe, folder: Path) -> tuple[dict[str, list[tuple[int, int]]], list[str]]:
    """({phase: (tokens, image patches) of each row}, notes on kept, dropped and unreadable rows)."""
    from nanolmmr1.data.prompt import Processor
    from nanolmmr1.report.display import Display
    from nanolmmr1.reward.judge import Judge
    from nanolmmr1.run.setup import load_data, world_paths  # imports the whole trainer, which is part of a run's memory

    found: dict[str, list[tuple[int, int]]] = {}
    notes: list[str] = []
    try:
        processor = Processor(folder, cfg.prompt)
    except UserError as error:
        return found, [f"no rows are counted, the longest that a phase allows are assumed: {error}"]
    display = cast(Display, SimpleNamespace(note=notes.append))
    with Judge(cfg.reward) as judge:
        for name, phase in cfg.phases.items():
            alone, phase = copy.copy(cfg), copy.copy(phase)
            alone.phases, alone.evaluate = {name: phase}, copy.copy(cfg.evaluate)
            alone.evaluate.tasks = {}
            if cfg.world:
                phase.data = world_paths(phase.data, Path(cfg.output) / "world")
            try:
                found |= load_data(alone, processor, judge, display).sizes
            except UserError as error:
                notes.append(f"phases.{name}: the longest rows allowed are assumed, as they cannot be read: {error}")
    return found, notes


def find_longest(cfg: schema.Recipe, phase: schema.Phase, sizes: Iterable[tuple[int, int]] | None) -> Longest:
    """Longest of a phase's rows; None: prompts as long as allowed, with an image as large."""
    if sizes is None:
        patches = 4 * min(cfg.prompt.max_pixels // 28**2, phase.max_prompt_tokens)
        return Longest(phase.max_prompt_tokens, 0 if "vision" in phase.freeze else patches, phase.max_prompt_tokens, 0)
    tokens, patches_of_rows = zip(*sizes, strict=True)
    return Longest(max(tokens), max(patches_of_rows), sum(tokens) / len(tokens), len(tokens))


def memory_table(stages: list[Stage], title: str, floor: float) -> Table:
    """A row per stage, a column per label; labels that no stage has are left out."""
    used = [part for part in HEADINGS if any(stage.parts.get(part, 0) > 0 for stage in stages)]
    host = any(stage.host for stage in stages)
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("stage", no_wrap=True)
    for heading in [HEADINGS[part] for part in used] + ["process"] * bool(floor) + ["total"] + ["host"] * host:
        table.add_column(heading, justify="right", no_wrap=True)
    for stage in stages:
        sizes = [stage.parts.get(part, 0) for part in used] + [floor] * bool(floor) + [stage.total + floor]
        table.add_row(stage.name, *(_gb(size) for size in sizes), *([_gb(stage.host)] if host else []))
    return table


def phase_table(cfg: schema.Recipe, longest: dict[str, Longest], ranks: int) -> Table:
    """Steps, groups and tokens per phase: at most, and as expected with responses half as long as allowed."""
    title = "a step: groups, updates, tokens; packs (micro-batches) of a rank"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("phase", overflow="fold", min_width=22)
    for heading in ("rows", "prompt", "patches", "steps", "groups", "updates", "tokens", "expected", "packs",
                    "expected"):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    budget = cfg.pack.tokens_per_micro_batch
    for name, phase in cfg.phases.items():
        rows, size, updates = longest[name], phase.group_size, phase.updates_per_rollout
        prompts, response = -(-phase.prompts_per_step // updates), phase.max_response_tokens - 1
        most, expected = rows.prompt + size * (response + 1), rows.mean + size * (response + 1) / 2  # tokens of a group
        if (group := rows.prompt + size * response) <= budget:
            packs = -(-prompts // (budget // group))
        else:  # a group is split, and its prompt is in each part
            packs = prompts * -(-size // max(1, (budget - rows.prompt) // max(1, response)))
        of_rank = (int(-(-n // ranks)) * updates for n in (packs, -(-prompts * expected // budget)))
        table.add_row(
            name, f"{rows.rows:,}" if rows.rows else "?", f"{rows.prompt:,}", f"{rows.patches:,}", f"{phase.steps:,}",
            f"{phase.prompts_per_step} x {size}", f"{updates}",
            *(f"{n * phase.prompts_per_step / 1e6:.2f} M" for n in (most, expected)), *(f"{n:,}" for n in of_rank),
        )  # fmt: skip
    return table


def _gb(size: float) -> str:
    return f"{size / GB:.1f}" if size >= 0.05 * GB else "" if not size else "0.0"


class Forecast:
    """The peak that a run will reach, computed beside it by a child process of low priority.

    Only the main rank has a child, and only runs of more than AFTER_S seconds: the forecast takes some ten seconds of a
    core. Create it when everything is loaded but the model: on a CPU, the memory of the process at that moment is part
    of the sum. On a GPU a vLLM engine is not, because it sleeps during the peak.

    Args:
        folder: of the model. sizes: phase -> (tokens, image patches) of each row. note: prints a line.

    Attributes:
        peak: bytes, once the child has finished. failure: why there is none.
    """

    AFTER_S = 20.0  # age of a run at which `poll` starts the child
    WAIT_S = 10.0  # for the child, at the end of a run

    def __init__(
        self, cfg: schema.Recipe, folder: Path, sizes: dict[str, list[tuple[int, int]]], device: str,
        note: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.device, self.note, self.peak, self.failure = device, note, 0.0, ""
        self.child: subprocess.Popen[bytes] | None = None
        self.task: dict[str, Any] | None = None  # until the child has started
        self.due = time.monotonic() + self.AFTER_S
        if not dist.is_main():
            return
        here = copy.copy(cfg)
        here.device = cast(Literal["cpu", "cuda"], device)
        here.plan = schema.Plan()  # this machine, not the one that --plan assumes
        self.task = {
            "recipe": here.model_dump(mode="json"), "folder": str(folder), "where": machine(here),
            "longest": {name: find_longest(cfg, phase, sizes[name]) for name, phase in cfg.phases.items()},
        }  # fmt: skip
        self.floor = usage.rss_mb() * 1e6 if device == "cpu" else 0

    def start(self) -> None:
        """Start the child."""
        task, self.task = self.task, None
        self.output = tempfile.TemporaryFile()
        ours = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        others = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        self.child = subprocess.Popen(
            [sys.executable, "-m", "nanolmmr1.run.phase_plan"], env=others | ours, stdin=subprocess.PIPE,
            stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self.child.pid, 19)
        with contextlib.suppress(BrokenPipeError), cast(IO[bytes], self.child.stdin) as stdin:
            stdin.write(json.dumps(task).encode())

    def poll(self) -> None:
        """Start the child when it is due; note, once, a forecast above this machine's memory, or that it failed. Never
        blocks."""
        if self.task is not None and time.monotonic() >= self.due:
            try:
                self.start()
            except OSError as error:  # no process or temporary file to be had: no reason to end a run
                self.failure = f"the memory forecast cannot start: {error}"
                self.note(printable(self.failure))
        if self.child is None or self.child.poll() is None:
            return
        self.output.seek(0)
        lines = self.output.read().decode(errors="replace").split("\n")
        self.output.close()
        status, self.child = self.child.returncode, None
        with contextlib.suppress(ValueError, IndexError):
            self.peak = float(lines[-2]) + self.floor if status == 0 else 0.0
        if not self.peak:
            last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
            self.failure = f"the memory forecast failed (exit status {status}): {last.strip():.300}"
            return self.note(printable(self.failure))
        if self.device == "cuda":
            memory = float(torch.cuda.mem_get_info()[1])
        else:
            ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks
        if self.peak > memory:
            self.note(
                f"a rank may take up to {self.peak / GB:,.1f} GB, and has {memory / GB:,.1f}: `--plan` tells which "
                "stage of a step takes it; pack.tokens_per_micro_batch, rollout.max_sequences and a phase's limits "
                "change it"
            )

    def compare(self, pool: int = 0) -> str:
        """A line with the forecast and the peak of this process so far.

        Args:
            pool: bytes of a vLLM engine's own memory, which torch counts as allocated even while it sleeps.
        """
        if self.child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(self.WAIT_S)
            self.poll()
        cuda = self.device == "cuda"
        measured = torch.cuda.max_memory_allocated() - pool if cuda else usage.peak_rss_mb() * 1e6
        what = "the trainer's tensors on the GPU" if cuda else "resident memory"
        says = f"peak of {what}: {measured / GB:.2f} GB"
        if not self.peak:
            reason = self.failure or "" if self.child is None else "the forecast was not ready"
            return f"{says}; {reason}" if reason else says
        return f"{says}, planned {self.peak / GB:.2f} at most ({self.peak / measured:.2f} x)"

    def close(self) -> None:
        """Kill the child."""
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            self.child = None
            self.output.close()
