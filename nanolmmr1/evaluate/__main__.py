"""Scores of models on benchmarks, by rules that are written down.

    python -m nanolmmr1.evaluate MODEL BENCHMARK ... [--compare MODEL ...] [--out FOLDER] [dotted.key=value ...]
    torchrun -m nanolmmr1.evaluate ...      one process per GPU

MODEL is a folder or hub id of a Qwen2.5-VL, or the folder of a run. BENCHMARK is a name (see --help), NAME=SOURCE if
its files are elsewhere, or a file of rows with answers. Models after --compare are asked the same, and the table has
their difference to MODEL. An answer is right if the accuracy reward says so; what no rule can decide is counted and
wrong. Prompts, engine and limits come from the recipe and its overrides, as in rollout.engine=vllm or
defaults.max_response_tokens=4096.

FOLDER gets items.jsonl, a line per row as soon as it is answered; results.json; and report.html, the table and the
answers to read: those of the last command. Responses are kept in FOLDER/responses.journal: the same command goes on
after a kill, and another one with this FOLDER asks only what is new.

Exit status: 0; 2 something is wrong (the message says what); 143 or 130 stopped by SIGTERM or Ctrl-C.

Next: prompts.py, prompts to choose from.
"""

import argparse
import dataclasses
import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from nanolmmr1 import config
from nanolmmr1.benchmarks.choose import choose, identity
from nanolmmr1.benchmarks.item import Item
from nanolmmr1.benchmarks.table import BENCHMARKS
from nanolmmr1.data.readers import reason, shown
from nanolmmr1.data.store import PREFIX, Row
from nanolmmr1.errors import UserError
from nanolmmr1.evaluate import prompts
from nanolmmr1.evaluate.answers import Answers, TestSet, read_test
from nanolmmr1.evaluate.page import write_page
from nanolmmr1.evaluate.summary import show, summarise
from nanolmmr1.files import write_atomically
from nanolmmr1.parallel import dist
from nanolmmr1.prepare import sampling
from nanolmmr1.prepare.journal import Journal
from nanolmmr1.prepare.output import source_path
from nanolmmr1.reward.judge import Judge
from nanolmmr1.rollout.sampler import SamplingParams
from nanolmmr1.schema import Recipe

JOURNAL = "responses.journal"
FILES = "items.jsonl", "results.json", "report.html"


def main(args: list[str]) -> None:
    """Run the command; see the docstring of this file."""
    options = read_options(args)
    chosen = [choose(text) for text in options.benchmarks]
    names = [entry.name for entry, _ in chosen]
    if len(set(names)) < len(names):
        raise UserError(f"benchmarks {', '.join(names)}: each may be named once")
    models = list(dict.fromkeys(map(prompts.exported, [options.model, *options.compare])))
    cfgs = [read_recipe(options, model) for model in models]
    labels = shortest(models)
    out = options.out or Path("evaluations", labels[0])
    askings = [prompts.choose(options.prompt, cfg) for cfg in cfgs]
    for cfg, asking in zip(cfgs, askings, strict=True):
        cfg.output, cfg.prompt = str(out), asking.prompt
    sources, journal = [source for each in chosen for source in each.sources], list[Journal]()
    with sampling.started(cfgs[0], out, lambda: make_folder(out, sources)) as place, ExitStack() as held:
        dist.on_main(lambda: journal.append(open_journal(out, held)))
        tests = [read_test(each, cfgs[0], options.limit, place.display.note) for each in chosen]
        leaked = dist.on_main(lambda: contaminated(options.contaminated, tests, place.display.note))
        sessions = [sampling.Session(cfg, place) for cfg in cfgs]
        for session in sessions if dist.is_main() else ():
            session.open_cache(journal[0])
        answers = []
        for label, session, asking in zip(labels, sessions, askings, strict=True):
            reward = session.cfg.reward.model_copy(update={"functions": {}, "format": asking.format})
            judge = held.enter_context(Judge(reward))
            judge.workers.between = session.watch.check
            answers.append(Answers(label, session, judge, sampling_params(session, options.samples),
                                   asking.kind == "official", leaked))
        ask_all(answers, tests, out, askings)
        dist.on_main(lambda: finish(out, answers, tests, options, askings))


def read_options(args: list[str]) -> argparse.Namespace:
    """The command line; `overrides` are its dotted.key=value."""
    parser = argparse.ArgumentParser(
        prog="python -m nanolmmr1.evaluate", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(__doc__ or "").partition("Next:")[0],
        epilog="benchmarks:\n" + "\n".join(f"  {name:24}{entry.title}" for name, entry in BENCHMARKS.items()))
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("benchmarks", metavar="BENCHMARK", nargs="+")
    parser.add_argument("--compare", metavar="MODEL", nargs="+", default=[], help="further models")
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="(evaluations/MODEL)")
    parser.add_argument("--prompt", choices=prompts.KINDS, default="auto", help="boxed: a final answer in \\boxed{}; "
                        "paper: LMM-R1's think prompt; official: each benchmark's own; recipe: that of --recipe; auto "
                        "(default): of the run that made the model, else boxed")
    parser.add_argument("--official", action="store_true",
                        help="score by a benchmark's own lenient rule where it is deterministic")
    parser.add_argument("--samples", type=int, default=1, help="responses per row; 1 (default): greedy")
    parser.add_argument("--limit", type=int, default=0, help="rows per benchmark, evenly spread; 0 (default): all")
    parser.add_argument("--contaminated", metavar="REPORT", type=Path, nargs="+", default=[],
                        help="OUT.report.json of prepare --against: score with and without the rows that it found")
    parser.add_argument("--subjects", action="store_true", help="print tables by subject as well")
    parser.add_argument("--recipe", default="single", help="its engine, pixel limits and last phase count")
    given = sampling.overrides(args)
    options = parser.parse_intermixed_args([arg for arg in args if arg not in given])
    options.overrides = given
    fixed = {"model", "output", "name", "phases", *["prompt.system", "prompt.template"] * (options.prompt != "recipe")}
    if taken := [arg for arg in given if arg.partition("=")[0] in fixed]:
        raise UserError(f"{shown(taken[0])} is set by MODEL, --out and --prompt here; with --prompt recipe, the prompt "
                        "is the recipe's and its overrides'")
    if not 0 < options.samples <= 1 << 16 or options.limit < 0:
        raise UserError(f"--samples={options.samples} --limit={options.limit}: 1 or more samples, and 0 or more rows")
    return options


def read_recipe(options: argparse.Namespace, model: str) -> Recipe:
    """The recipe for one of the models."""
    return config.load(options.recipe, [f"model={json.dumps(model)}", "defaults.data=none", *options.overrides])


def shortest(models: Sequence[str]) -> list[str]:
    """A label per model: as much of the end of its path as tells it from the others."""
    folders = [os.path.abspath(model) if os.path.isdir(model) else model for model in models]
    parts = [Path(re.sub(r"/model/?$", "", folder)).parts or (folder,) for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(each[-count:]).strip("/") or "model" for each in parts]
        if len(set(labels)) == len(labels):
            return labels
    return list(models)


def make_folder(out: Path, sources: Sequence[str]) -> None:
    """Make the folder of the results, and refuse one that holds anything of others."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={shown(out)} cannot be made: {reason(error)}") from error
    read = {Path(os.path.realpath(source_path(source))) for source in sources}
    if taken := [name for name in FILES if (out / name).is_dir() or Path(os.path.realpath(out / name)) in read]:
        raise UserError(f"--out={shown(out)}: {taken[0]} is a folder there, or is read: choose another one")
    if not os.access(out, os.W_OK) or (out / "recipe.yaml").exists() or (out / "config.json").exists():
        raise UserError(f"--out={shown(out)} is read-only, or the folder of a run or model: choose another one")


def open_journal(out: Path, held: ExitStack) -> Journal:
    """Lock an output until `held` ends, and remove the rows of a command that was killed while it read them."""
    journal = held.enter_context(Journal(out / JOURNAL, {"format": sampling.FORMAT}))
    for path in out.glob(f"{PREFIX}*"):
        path.unlink()
    return journal


def sampling_params(session: sampling.Session, samples: int) -> SamplingParams:
    """Greedy for one response; several are sampled as in the recipe's last phase."""
    phase, processor = session.phase, session.processor
    drawn = (phase.temperature, phase.top_p, phase.top_k) if samples > 1 else (0.0, 1.0, 0)
    return SamplingParams(samples, phase.max_response_tokens, *drawn, processor.stop_ids, processor.banned_ids)


def contaminated(paths: Sequence[Path], tests: Sequence[TestSet], note: Callable[[str], None]) -> dict[str, list[str]]:
    """Benchmark -> ids of its rows that a training set holds, of reports that `prepare --against` wrote; on rank 0.

    Raises:
        UserError: a file is no such report, or is of another file of the benchmark.
    """
    leaked: dict[str, list[str]] = {}
    reports = [_read_report(path) for path in paths]
    for test in tests if paths else ():
        entry, keys = test.entry, [identity(row) for row in test.every]
        mine = set(keys)
        for path, (_, hits) in zip(paths, reports, strict=True):
            named = {key for name, key in hits if name == entry.name}
            if unknown := named - mine:
                raise UserError(f"--contaminated {shown(path)}: {len(unknown)} of its {len(named)} rows of "
                                f"{entry.name} are not in the rows here: make it again with --against the same files")
        found = mine & {key for _, hits in reports for _, key in hits}
        if found or any(entry.name in benchmarks for benchmarks, _ in reports):
            leaked[entry.name] = [name for name, key in zip(test.every_id, keys, strict=True) if key in found]
        else:
            note(f"{entry.title}: no report of --contaminated was made against it")
    return leaked


def _read_report(path: Path) -> tuple[set[str], set[tuple[str, str]]]:
    """The benchmarks of a report of prepare, and (benchmark, key) of their rows that it found."""
    try:
        report = json.loads(path.read_bytes())
        return set(report["benchmarks"]), {(hit["benchmark"], hit["key"]) for hit in report["hits"] if hit["dropped"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        lacks = f"it lacks {error}" if isinstance(error, KeyError) else reason(error)
        raise UserError(f"--contaminated {shown(path)} is no OUT.report.json of prepare --against: {lacks}") from error


def ask_all(answers: Sequence[Answers], tests: Sequence[TestSet], out: Path, askings: Sequence[prompts.Asking]) -> None:
    """Ask every model about every benchmark. Items are written as they are answered."""
    items = out / "items.jsonl"
    dist.on_main(lambda: items.write_bytes(b""))
    for each, asking in zip(answers, askings, strict=True):
        session = each.session
        settings = dist.on_main(session.settings) | dataclasses.asdict(each.params) | {"kind": asking.kind}
        reward = each.judge.cfg
        settings |= dict(option_value=reward.option_value, verify_s=reward.verify_s, format=reward.format)
        common = sampling.digest(settings)
        with closing(session):
            for number, test in enumerate(tests):
                if not number or each.official:
                    show_prompt(each, test, asking.kind)

                def write(found: dict[str, Any], each: Answers = each, test: TestSet = test) -> None:
                    with open(items, "ab") as file:
                        file.writelines(lines(each.items(test, found)))

                session.kept = write
                each.ask(test, common)


def show_prompt(answers: Answers, test: TestSet, kind: str) -> None:
    """Print what the model is given for a benchmark's first row, unless its rows must not be shown."""
    session = answers.session
    if test.entry.private:
        return
    text = dist.on_main(lambda: session.processor.prepare(answers.as_asked(test, 0), False).text)
    session.display.note(f"{answers.label}, prompt {kind}, first row of {test.entry.title}:\n{text}")


def lines(items: Any) -> list[bytes]:
    return [json.dumps(item.record()).encode() + b"\n" for item in items]


def finish(
    out: Path, answers: Sequence[Answers], tests: Sequence[TestSet], options: argparse.Namespace,
    askings: Sequence[prompts.Asking],
) -> None:  # fmt: skip
    """Write all results, and print the table; on rank 0."""
    items = [item for each in answers for test in tests for item in each.items(test, each.session.known)]
    results = summarise(items, {test.entry.name: test.entry for test in tests}, options.official, options.samples)
    params = answers[0].params
    results["units"] = ("scores, shares and 95 % intervals (low, high) are fractions of 1, tokens are means per "
                        "response, published values are percentages")
    results["settings"] = {
        "models": {each.label: {"path": str(each.session.folder), "prompt": asking.kind, "system": asking.prompt.system,
                                "template": asking.prompt.template, "format": asking.format}
                   for each, asking in zip(answers, askings, strict=True)},
        "benchmarks": {test.entry.name: {"sources": test.sources, "rows": len(test.rows), "dropped": test.dropped,
                                         "reduced_pictures": answers[0].reduced[test.entry.name]} for test in tests},
        "samples": params.num_responses, "temperature": params.temperature, "top_p": params.top_p,
        "top_k": params.top_k, "max_response_tokens": params.max_tokens,
        "max_prompt_tokens": answers[0].session.phase.max_prompt_tokens,
        "max_pixels": answers[0].session.cfg.prompt.max_pixels,
        "engine": ", ".join(sorted({engine for each in answers for test in tests for engine in each.engines(test)})),
        "seed": answers[0].session.cfg.seed, "limit": options.limit,
    }  # fmt: skip
    rows = {(test.entry.name, name): (test, place) for test in tests for place, name in enumerate(test.ids)}

    def row_of(item: Item) -> Row | None:
        test, place = rows[item.benchmark, item.id]
        return None if test.entry.private else test.rows[place]

    try:
        write_atomically(out / "items.jsonl", b"".join(lines(items)))
        write_atomically(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
        write_page(out / "report.html", results, items, row_of)
    except OSError as error:
        raise UserError(f"{shown(out)}: results cannot be written ({reason(error)}); started again, the command asks "
                        "nothing anew") from error
    show(results, options.subjects)
    print(f"items: {out / 'items.jsonl'}  results: {out / 'results.json'}  page: {out / 'report.html'}")


if __name__ == "__main__":
    sampling.run(main)
