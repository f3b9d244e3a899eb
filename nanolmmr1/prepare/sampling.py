"""Asking a model for many rows: what `passrate` and `caption` share.

A command is one process, or the ranks that torchrun started. What is not known yet is asked in chunks, by the engine
that the recipe names, and each finished chunk is kept in the file OUT.cache. Keys name everything that a result depends
on, and seeds are made of keys. So a chunk has the same results whenever it is asked, and a command that was killed goes
on where it was.

Next: ../passrate.py, how hard a row is.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py; torch reads it when it is imported
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from nanolmmr1 import config
from nanolmmr1.data.group import Group
from nanolmmr1.data.prompt import Processor, Prompt
from nanolmmr1.data.readers import BadRow, reason, shown
from nanolmmr1.data.rows import measured
from nanolmmr1.data.store import Row, Rows
from nanolmmr1.errors import DISK_FULL, Preempted, SharedError, UserError
from nanolmmr1.model import weights
from nanolmmr1.parallel import dist
from nanolmmr1.parallel.signals import Watch
from nanolmmr1.prepare.journal import Journal
from nanolmmr1.prepare.output import check_output
from nanolmmr1.report.display import Display
from nanolmmr1.rollout.sampler import Sampler, SamplingParams
from nanolmmr1.run import setup
from nanolmmr1.schema import ALIASES, Recipe
from nanolmmr1.terminal import printable, protect

CHUNK = 64  # items asked between two writes to the cache
FORMAT = 1  # of results; raised when an older cache must not be used
Items = Sequence[tuple[str, Any]]  # key, JSON-able item


class Question(NamedTuple):
    """How items are asked, on every rank with its share; ranks that share an engine have the same share."""

    rows: Callable[[Items], list[Row]]
    params: SamplingParams
    captions: bool  # whether prompts show them
    judge: Callable[[Items, list[Group | str]], list[Any]]  # a JSON-able result per item, of its group or its fault


def parser(name: str, text: str) -> argparse.ArgumentParser:
    """A parser of MODEL ROWS OUT [--recipe NAME_OR_FILE] [dotted.key=value ...] for the command nanolmmr1.NAME.

    Args:
        text: the docstring of its file.
    """
    found = argparse.ArgumentParser(prog=f"python -m nanolmmr1.{name}", description=text.partition("Next:")[0],
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("model", metavar="MODEL", help="folder or hub id of a Qwen2.5-VL")
    found.add_argument("rows", metavar="ROWS", help="file, folder or hub id, as phases.NAME.data of a recipe")
    found.add_argument("out", metavar="OUT", type=Path, help="a .jsonl or .parquet file")
    found.add_argument("--recipe", default="single", help="its prompt, rollout, pack and last phase count")
    found.add_argument("overrides", metavar="dotted.key=value", nargs="*", help="as for train.py")
    return found


def overrides(args: list[str]) -> list[str]:
    """The dotted.key=value of a command line; benchmarks' NAME=SOURCE and paths are none."""
    known = {*Recipe.model_fields, *ALIASES}
    return [arg for arg in args if re.match(r"[a-z][\w.]*=", arg) and not os.path.exists(arg)
            and (arg.partition("=")[0] in ALIASES or re.split("[.=]", arg)[0] in known)]


def read_recipe(options: argparse.Namespace) -> Recipe:
    """The recipe that a command line names, for its model. Its phases train on the rows if they name no data.

    Raises:
        UserError: see config.load.
    """
    given = [f"model={json.dumps(options.model)}", f"defaults.data={json.dumps(options.rows)}"]
    return config.load(options.recipe, [*given, *options.overrides])


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a command and leave: status 0; 2 after a UserError or on a full disk; 128 + signal number if stopped."""
    protect()
    try:
        main(sys.argv[1:])
        status = 0
    except UserError as error:
        if dist.is_main() or not isinstance(error, SharedError):
            print(printable(f"error: {error}"), file=sys.stderr)
        status = 2
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        print(f"error: the disk is full ({error}): free some space and start again", file=sys.stderr)
        status = 2
    except Preempted as stop:
        status = stop.exit_status
    except KeyboardInterrupt as interrupt:  # while nothing is asked, see signals.Watch
        status = Preempted(signal.Signals(*interrupt.args or (signal.SIGINT,))).exit_status
    dist.leave(status)


def digest(value: Any) -> str:
    """sha256 of a JSON-able value, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def print_table(title: str, lines: Iterable[tuple[str, str]]) -> None:
    """Print a table of names and numbers."""
    table = Table(title, Column(justify="right"), box=SIMPLE_HEAD, show_edge=False)
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 100, markup=False, emoji=False, highlight=False).print(table)


class Place(NamedTuple):
    """Where sessions run: what they share."""

    device: str
    display: Display
    watch: Watch


@contextlib.contextmanager
def started(cfg: Recipe, folder: Path, check: Callable[[], None]) -> Iterator[Place]:
    """Join the other ranks and catch signals: cheap checks first.

    Args:
        folder: of the output; `check` makes it, on rank 0.

    Raises:
        UserError: the recipe asks for what this machine lacks, or `check` refuses.
    """
    device = setup.choose_device(cfg)
    setup.check_machine(cfg, device)
    dist.start(device, cfg.dist.timeout_s, cfg.dist.offload)
    dist.on_main(check)
    with (
        Display({}, quiet=not dist.is_main()) as display,
        Watch(folder, cfg.dist.hang_s, cfg.dist.timeout_s) as watch,
    ):
        watch.defer = False  # a signal ends the process at once, but for `Session.ask`
        yield Place(device, display, watch)


@contextlib.contextmanager
def opened(cfg: Recipe, source: str, out: Path, what: str) -> Iterator["Session"]:
    """Read model settings and rows, and lock the cache of OUT.

    Args:
        what: column that the command writes; a cache is of one column.

    Raises:
        UserError: recipe, model, rows or output are wrong, or another process writes the same output.
    """
    path = Path(f"{out}.cache")
    cfg.output = str(out.parent)  # where the key of vLLM servers lies
    with (
        started(cfg, out.parent, lambda: _check(out, path, source)) as place,
        contextlib.closing(Session(cfg, place)) as session,
        contextlib.ExitStack() as held,
    ):
        session.read(source)
        dist.on_main(lambda: session.open_cache(held.enter_context(Journal(path, {"format": FORMAT, "column": what}))))
        yield session


def read_rows(
    source: str | list[str], cfg: Recipe, note: Callable[[str], None], layout: str = ""
) -> tuple[Rows, dict[str, int]]:  # fmt: skip
    """The rows of a source, and the dropped ones by reason; notes how they were read.

    Args:
        layout: as in setup.share_rows.

    Raises:
        UserError: see there; or prompt.columns names a column that the source lacks.
    """
    rows, read = setup.share_rows(source, cfg.prompt.columns, cfg.data, Path(cfg.output), layout)
    for lacks in read.missing.values():
        raise UserError(lacks)
    for text in read.notes:
        note(text)
    return rows, read.dropped


def _check(out: Path, cache: Path, source: str) -> None:
    check_output(out, source)
    if out.exists() and not cache.exists():
        raise UserError(f"OUT={shown(out)} is there, and no {shown(cache.name)} of this command beside it: choose "
                        "another output, or delete it")


class Session:
    """A model and the rows to ask it about. Its methods are called on all ranks together, unless they say otherwise.

    Attributes:
        phase: the recipe's last, whose sampling settings and prompt limit count. folder: of the model.
        rows, dropped: set by `read`; bad rows by reason.
        known: key -> result, on rank 0. kept: called on rank 0 with the results of each chunk.
        sampler: loaded when it is first needed.
    """

    cache: Journal  # on rank 0
    rows: Rows
    dropped: dict[str, int]

    def __init__(self, cfg: Recipe, place: Place) -> None:
        self.cfg = cfg
        self.device, self.display, self.watch = place
        self.phase = list(cfg.phases.values())[-1]
        dist.together(lambda: dist.is_host_main() and weights.find(cfg.model))  # download once per host
        self.folder = dist.together(lambda: weights.find(cfg.model))
        dist.together(lambda: weights.read_config(self.folder))
        self.processor = dist.together(lambda: Processor(self.folder, cfg.prompt))
        self.known: dict[str, Any] = {}
        self.kept: Callable[[dict[str, Any]], None] = lambda found: None

    def read(self, source: str) -> None:
        """Read the rows of a source."""
        self.rows, self.dropped = read_rows(source, self.cfg, self.display.note)

    @functools.cached_property
    def sampler(self) -> Sampler:
        policy = setup.load_policy(self.cfg, self.folder, self.device, self.processor)
        return setup.make_sampler(self.cfg, policy, self.folder, self.processor, self.display.note)

    def close(self) -> None:
        """Close the sampler and drop its model: another session may need the memory."""
        if sampler := vars(self).pop("sampler", None):
            sampler.close()

    def open_cache(self, cache: Journal) -> None:
        """Take over an open cache and read it; on rank 0. A picture that could not be read may be back."""
        self.cache = cache
        for chunk in cache.chunks():
            self.known |= {key: result for key, result in chunk.items()
                           if not (isinstance(result, str) and result.startswith("picture"))}  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """What every result depends on: all of the model's files, prompt settings, prompt limit and seed; on rank 0.

        The engine and its precision are not among them: two engines sample from one distribution.
        """
        paths = {*weights.weight_files(self.folder)}
        paths |= {path for pattern in weights.COMPANIONS for path in self.folder.glob(pattern)}
        hashes = []
        try:
            with self.display.busy("hashing the model's files", len(paths)) as advance:
                for path in sorted(paths):
                    with open(path, "rb") as file:
                        hashes.append([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
                    advance()
        except OSError as error:
            raise UserError(f"{shown(self.folder)} cannot be read: {reason(error)}") from error
        prompt = self.cfg.prompt.model_dump(exclude={"columns"})
        return dict(model=hashes, prompt=prompt, most=self.phase.max_prompt_tokens, seed=self.cfg.seed)

    def ask(self, what: str, find: Callable[[], dict[str, Any]], question: Question) -> int:
        """Have everything answered that is not known yet; rank 0 then knows it.

        Args:
            what: for the display.
            find: called on rank 0; returns key -> JSON-able item, of all that must be known.

        Returns:
            The number of items that were asked.

        Raises:
            Preempted: a signal asked the command to stop; finished chunks are kept. UserError: the engine failed.
        """
        todo: Items = dist.on_main(lambda: [(key, item) for key, item in find().items() if key not in self.known])
        if not todo:
            return 0
        ranks = self.sampler.ranks_per_engine
        engines, engine, done = dist.size() // ranks, dist.rank() // ranks, 0
        chunks = [todo[start : start + CHUNK] for start in range(0, len(todo), CHUNK)]
        shares = [chunk[dist.my_slice(len(chunk), engines, engine)] for chunk in chunks]
        self.watch.defer = True
        try:
            with self.display.busy(what, sum(map(len, shares))) as advance:
                for chunk, share in zip(chunks, shares, strict=True):
                    with self.watch.stage(what, done):
                        self._ask_chunk(chunk, share, ranks, question, advance)
                    done += len(chunk)
        except Preempted as stop:
            stop.signal = signal.Signals(self.watch.stopping or signal.SIGTERM)  # without one: another rank got it
            self.display.note(f"stopped by {stop.signal.name} with {done} of {len(todo)} answers kept: start the same "
                              "command again to go on")  # fmt: skip
            raise
        self.watch.defer = False
        return len(todo)

    def _ask_chunk(
        self, chunk: Items, share: Items, ranks: int, question: Question, advance: Callable[[int], None]
    ) -> None:
        def prompts() -> list[Prompt | str]:
            return [self._prompt(row, question.captions) for row in question.rows(share)]

        # Two steps, because ranks that share an engine must enter it together: a rank that is told to stop while it
        # prepares a prompt would leave the other one waiting inside.
        prepared = dist.together(prompts)

        def results() -> list[Any]:
            return question.judge(share, self._generate(prepared, share, question.params, advance)) if share else []

        messages = dist.gather(json.dumps(dist.together(results)).encode())[::ranks]
        answers = [result for message in messages for result in json.loads(message)]
        found = {key: result for (key, _), result in zip(chunk, answers, strict=True)}
        self.known.update(found)
        dist.on_main(lambda: self._keep(found))

    def _keep(self, found: dict[str, Any]) -> None:
        self.cache.append(found)
        self.kept(found)

    def _generate(
        self, prompts: list[Prompt | str], items: Items, params: SamplingParams, advance: Callable[[int], None]
    ) -> list[Group | str]:
        """Sample a group per prompt, with seeds made of the keys; what is no prompt is the reason and stays."""
        asked = [(prompt, (int(key[:8], 16), int(key[8:16], 16)))
                 for prompt, (key, _) in zip(prompts, items, strict=True) if isinstance(prompt, Prompt)]  # fmt: skip
        advance(len(prompts) - len(asked))
        groups = iter(self.sampler.generate(
            [prompt for prompt, _ in asked], params, [seed for _, seed in asked], on_progress=advance,
            should_stop=self.watch.should_stop,
        ) if asked else ())  # fmt: skip
        return [next(groups) if isinstance(prompt, Prompt) else prompt for prompt in prompts]

    def _prompt(self, row: Row, captions: bool) -> Prompt | str:
        """The prompt of a row, or the reason why there is none."""
        self.watch.check()
        most = self.phase.max_prompt_tokens
        try:
            if measured(row, self.processor, captions, most)[0] > most:
                return "prompt too long"
            return self.processor.prepare(row, captions)
        except BadRow as error:
            return error.kind
        except UserError:
            return "no prompt"
