"""What a run would take, before it is started: `python train.py RECIPE --plan`.

Memory of a rank, stage by stage, by arithmetic on the model's config; the largest token budget that fits; steps, tokens
and rows of each phase. No weights are read and no GPU is needed. `forecast` and `compare` do the same for a run: what
it was going to take, and what it took.

On a CPU the process itself is in the sum, as large as it was measured to be with everything imported and all rows read.
What glibc's heap keeps of freed memory is not. With MALLOC_MMAP_THRESHOLD_=131072 in the environment, glibc's own first
value, which it then does not raise, it gives tensors back.

Next: plan_stages.py, the stages; plan_memory.py, what blocks, head and sampler hold.
"""

import copy
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nanolmmr1 import schema
from nanolmmr1.data.prompt import Processor
from nanolmmr1.errors import UserError
from nanolmmr1.model import weights
from nanolmmr1.report import usage
from nanolmmr1.reward.judge import Judge
from nanolmmr1.run.plan_stages import GB, Longest, Plan, machine
from nanolmmr1.terminal import printable

HEADINGS = {  # part of a stage -> heading
    "weights": "weights", "gradients": "grads", "optimiser": "optim.", "reference": "ref.", "gathered": "gathered",
    "activations": "activ.", "work": "work", "head": "head", "vision": "vision", "sampler": "sampler",
}  # fmt: skip
CURES = (  # what makes a run smaller, the cheapest first; each is tried with the largest token budget that then fits
    {"pack.checkpoint_activations": "swiglu"},
    {"pack.checkpoint_activations": "all"},
    {"pack.checkpoint_activations": "all", "dist.offload_reference": True},
    {"pack.checkpoint_activations": "all", "dist.offload": True},
    {"pack.checkpoint_activations": "all", "optim.weights": "bfloat16"},
    {"pack.checkpoint_activations": "all", "optim.weights": "bfloat16", "dist.offload": True},
)
SHARES = [n / 100 for n in range(90, 0, -5)]  # of a GPU, for vLLM


def show(cfg):
    """Print the plan of a recipe.

    Raises:
        UserError: the model's config can be had neither here nor from the hub; a number that fits no machine.
    """
    console = Console(width=120, markup=False, highlight=False)
    folder, where = find_settings(cfg), machine(cfg)
    model = weights.read_config(folder)
    sizes, notes = measure_rows(cfg, folder)
    longest = {name: find_longest(cfg, phase, sizes.get(name)) for name, phase in cfg.phases.items()}
    floor = resident() if where.device == "cpu" else 0
    plans = make_plans(cfg, model, where, longest)

    parameters = next(iter(plans.values())).count.total
    console.print(f"{cfg.name}: {cfg.model}, {parameters / 1e9:.2f} B parameters, on {where.name}\n")
    for line in notes:
        console.print(printable(line))
    console.print(phase_table(plans, longest))
    for names, plan in alike(plans):
        console.print(memory_table(plan, f"GB a rank, {', '.join(names)}", floor))
    for line in verdict(cfg, model, where, longest, floor):
        console.print(line)


def forecast(cfg, folder, sizes):
    """Bytes that the hungriest rank will take at its peak: of the GPU, or as resident memory where it runs on a CPU.

    Call it when everything is there but weights: what the process holds by then is part of the sum on a CPU. On a GPU a
    vLLM engine is not in it: that takes what it is given, and sleeps while the rest has its peak.

    Args:
        folder: the model's. sizes: phase -> [(tokens, image patches)] of its rows.
    """
    cfg = copy.copy(cfg)
    cfg.plan = schema.Plan()  # this machine, whatever another was planned for
    where, model = machine(cfg), weights.read_config(folder)
    longest = {name: find_longest(cfg, phase, sizes[name]) for name, phase in cfg.phases.items()}
    floor = resident() if where.device == "cpu" else 0
    left_out = "sampler" if where.device == "cuda" and cfg.rollout.engine == "vllm" else None
    stages = [stage for plan in make_plans(cfg, model, where, longest).values() for stage in plan.stages()]
    return floor + max(stage.total - stage.parts.get(left_out, 0) for stage in stages)


def check(planned, device, note):
    """Refuse a run whose forecast is over twice the memory of this machine, before it allocates; tell of any other
    that is over it: forecasts take every response to be as long as allowed.

    Raises:
        UserError: the forecast, the memory and what to change.
    """
    if device == "cuda":
        memory = torch.cuda.mem_get_info()[1]
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if planned > memory:
        text = (f"a rank may take up to {planned / GB:,.1f} GB, and has {memory / GB:,.1f}: `--plan` tells which stage "
                "of a step takes it; pack.tokens_per_micro_batch, rollout.max_sequences and a phase's limits change it")
        if planned > 2 * memory:
            raise UserError(text)
        note(text)


def compare(planned, device, pool=0):
    """A line that sets `forecast`'s bytes beside the peak of this process so far.

    Args:
        pool: bytes of a vLLM engine's own memory, which torch counts as allocated even while it sleeps.
    """
    measured = torch.cuda.max_memory_allocated() - pool if device == "cuda" else usage.peak_rss_mb() * 1e6
    what = "the trainer's tensors on the GPU" if device == "cuda" else "resident memory"
    return f"peak of {what}: {measured / GB:.2f} GB, planned {planned / GB:.2f} at most ({planned / measured:.2f} x)"


def resident():
    """Bytes of memory that the process holds now."""
    return usage.rss_mb() * 1e6


def find_settings(cfg):
    """The folder of a model's config and tokenizer; of a model on the hub only these are fetched.

    Raises:
        UserError: it is neither here nor on a hub that can be reached.
    """
    model = cfg.model
    if model.startswith("world:"):
        built = Path(cfg.output) / "world" / model.removeprefix("world:")
        if not built.is_dir():
            raise UserError(f"model={model}: {cfg.output} holds none yet; the recipe's first run makes it there")
        return built
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, allow_patterns=weights.COMPANIONS))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model={model!r} is no folder here, and its config.json cannot be fetched ({reason}): "
            "give a folder that holds config.json and the tokenizer's files; weights are not needed for a plan"
        ) from error


def measure_rows(cfg, folder):
    """({phase: [(tokens, image patches)] of its rows}, lines that tell what was kept, dropped or could not be read)."""
    from nanolmmr1.run.setup import load_data  # the whole trainer: what a run imports is part of what it takes

    found, notes = {}, []
    try:
        processor = Processor(folder, cfg.prompt)
    except UserError as error:
        return found, [f"no rows are counted: {error}"]
    with Judge(cfg.reward) as judge:
        for name, phase in cfg.phases.items():
            alone = copy.copy(cfg)
            alone.phases, alone.evaluate = {name: phase}, copy.copy(cfg.evaluate)
            alone.evaluate.tasks = {}
            if cfg.world:
                alone.phases[name] = copy.copy(phase)
                alone.phases[name].data = _placed(phase.data, Path(cfg.output) / "world")
            try:
                found |= load_data(alone, processor, judge, SimpleNamespace(note=notes.append))[2]
            except UserError as error:
                notes.append(f"phases.{name}: the longest rows allowed are assumed, as they cannot be read: {error}")
    return found, notes


def _placed(data, world):
    if isinstance(data, list):
        return [_placed(one, world) for one in data]
    return str(world / data.removeprefix("world:")) if data.startswith("world:") else data


def find_longest(cfg, phase, sizes):
    """Longest of a phase's rows. Where none could be read: prompts as long as is allowed, with as large a picture."""
    if sizes is None:
        patches = min(cfg.prompt.max_pixels // 14**2, 4 * phase.max_prompt_tokens)
        return Longest(phase.max_prompt_tokens, 0 if "vision" in phase.freeze else patches, phase.max_prompt_tokens, 0)
    tokens, patches = zip(*sizes, strict=True)
    return Longest(max(tokens), max(patches), sum(tokens) / len(tokens), len(tokens))


def make_plans(cfg, model, where, longest):
    """Phase -> Plan."""
    last, every = list(cfg.phases)[-1], cfg.checkpoint.every_steps
    soonest = 1 if cfg.checkpoint.every_minutes else every  # step after which a checkpoint may be written
    return {
        name: Plan(cfg, phase, model, where, longest[name], more=name != last or 0 < soonest < phase.steps)
        for name, phase in cfg.phases.items()
    }


def alike(plans):
    """[(names, plan)] of phases whose memory is the same in every stage."""
    found = {}
    for name, plan in plans.items():
        found.setdefault(repr(plan.stages()), ([], plan))[0].append(name)
    return found.values()


def memory_table(plan, title, floor):
    """A row a stage, a column a part; parts that no stage has are left out."""
    stages = plan.stages()
    used = [part for part in HEADINGS if any(stage.parts.get(part, 0) > 0 for stage in stages)]
    host = any(stage.host for stage in stages)
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("stage", no_wrap=True)
    headings = [HEADINGS[part] for part in used] + ["process"] * bool(floor) + ["total"] + ["host"] * host
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for stage in stages:
        sizes = [stage.parts.get(part, 0) for part in used] + [floor] * bool(floor) + [stage.total + floor]
        table.add_row(stage.name, *(_gb(size) for size in sizes), *([_gb(stage.host)] if host else []))
    return table


def phase_table(plans, longest):
    """Steps, groups and tokens of each phase: at most, and as expected with responses half as long as they may be."""
    title = "a step: groups, updates, tokens; packs (micro-batches) of a rank"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("phase", overflow="fold", min_width=22)
    for heading in ("rows", "prompt", "patches", "steps", "groups", "updates", "tokens", "expected", "packs",
                    "expected"):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for name, plan in plans.items():
        phase, rows = plan.phase, longest[name]
        most, expected = (tokens * phase.prompts_per_step for tokens in plan.tokens())
        batches = [f"{n:,}" for n in plan.micro_batches()]
        table.add_row(
            name, f"{rows.count:,}" if rows.count else "?", f"{rows.prompt:,}", f"{rows.patches:,}", f"{phase.steps:,}",
            f"{phase.prompts_per_step} x {phase.group_size}", f"{phase.updates_per_rollout}", _million(most),
            _million(expected), *batches,
        )  # fmt: skip
    return table


def verdict(cfg, model, where, longest, floor):
    """Whether it fits, the largest token budget that does, and where it does not fit, what to change."""
    plans = make_plans(cfg, model, where, longest)
    peak = floor + max(plan.peak() for plan in plans.values())
    if where.device == "cpu":
        return [f"Peak: {peak / GB:.1f} GB of this machine's memory a rank, of it {floor / GB:.1f} the process itself."]
    name = max(plans, key=lambda name: plans[name].peak())
    stage = max(plans[name].stages(), key=lambda stage: stage.total).name
    says = f"Peak: {peak / GB:.1f} of {where.capacity / GB:.1f} GB, in {stage} of {name}."
    most = min(plan.largest_budget(where.capacity) for plan in plans.values())
    if peak <= where.capacity:
        return [f"{says} It fits, with pack.tokens_per_micro_batch up to {most:,}."]
    fitting = list(cures(cfg, model, where, longest))
    if not fitting:
        return [f"{says} It does not fit, whatever is recomputed or offloaded: more or larger GPUs are needed."]
    return [f"{says} It does not fit. What would, the cheapest first:", *(f"  {' '.join(each)}" for each in fitting)]


def cures(cfg, model, where, longest):
    """Lists of `key=value` with which the recipe fits."""
    tried, known = [{"pack.tokens_per_micro_batch": 0}, *CURES], []
    for changes in tried:
        for sampling in ({}, *samplers(cfg)):
            smaller = changed(cfg, changes | sampling)
            plans = make_plans(smaller, model, where, longest).values()
            budget = min(plan.largest_budget(where.capacity) for plan in plans)
            if budget:
                budget = min(budget, cfg.pack.tokens_per_micro_batch)
                news = changes | sampling | {"pack.tokens_per_micro_batch": budget}
                cure = [f"{key}={str(value).lower()}" for key, value in news.items() if value != _value(cfg, key)]
                if cure not in known:  # some of it may be in the recipe
                    known.append(cure)
                    yield cure
                break


def samplers(cfg):
    """Changes that make the sampler smaller, by and by."""
    if cfg.rollout.engine == "vllm":
        smaller = [share for share in SHARES if share < cfg.rollout.gpu_memory_utilization]
        return [{"rollout.gpu_memory_utilization": share} for share in smaller]
    sizes = [2**n for n in range(10, 2, -1) if 2**n < cfg.rollout.max_sequences]
    vllm = [{"rollout.engine": "vllm", "rollout.gpu_memory_utilization": share} for share in SHARES]
    return [{"rollout.max_sequences": size} for size in sizes] + vllm if cfg.rollout.engine == "local" else []


def changed(cfg, changes):
    """The recipe with dotted keys changed."""
    cfg = copy.deepcopy(cfg)
    for key, value in changes.items():
        section, name = key.split(".")
        setattr(getattr(cfg, section), name, value)
    return cfg


def _value(cfg, key):
    section, name = key.split(".")
    return getattr(getattr(cfg, section), name)


def _gb(size):
    return f"{size / GB:.1f}" if size >= 0.05 * GB else "" if not size else "0.0"


def _million(tokens):
    return f"{tokens / 1e6:.2f} M"
