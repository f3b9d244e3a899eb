"""From a published data set to training rows.

    python -m nanolmmr1.prepare SCHEMA SOURCE OUT [--against BENCHMARK ...] [dotted.key=value ...]

SCHEMA is the layout of the rows, such as virl39k (see --help), or `auto`: by their columns. SOURCE is a file, a
folder, or a hub id, whose files are then downloaded; pictures may be files, bytes in the rows, or in a .zip or .tar
beside them. OUT is a .jsonl file, with its pictures in a folder beside it, or a .parquet file with the pictures inside.
Rows are dropped if they cannot be read, if no response can earn their reward, if an earlier row asks the same, or if
they repeat a row of a BENCHMARK: a source, or a name that `nanolmmr1.evaluate` knows, as mathvision, or NAME=SOURCE.
OUT.report.json lists every row that a benchmark may hold, dropped or not.

Keys are those of a recipe: prompt.columns, data.image_dir, reward.option_value; defaults.data_filter keeps a band of a
numeric column; with model=FOLDER, prompts over defaults.max_prompt_tokens are dropped.

A command that was killed goes on where it was, and one that has finished does nothing.

Next: check.py, whether a row can be trained on.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nanolmmr1 import config
from nanolmmr1.benchmarks.choose import Chosen, choose, kept
from nanolmmr1.data import schemas
from nanolmmr1.data.prompt import Processor
from nanolmmr1.data.readers import HUB, READERS, data_files, reason, shown
from nanolmmr1.data.rows import FIRST, Loaded, load_rows
from nanolmmr1.data.store import Rows
from nanolmmr1.errors import UserError
from nanolmmr1.files import write_atomically
from nanolmmr1.model import weights
from nanolmmr1.prepare.check import Checks
from nanolmmr1.prepare.decontaminate import Contamination
from nanolmmr1.prepare.journal import Journal
from nanolmmr1.prepare.output import check_output, picture_folder, source_path, to_record, write_rows
from nanolmmr1.prepare.sampling import overrides, print_table, run
from nanolmmr1.report.display import Display
from nanolmmr1.reward.judge import Judge
from nanolmmr1.schema import Recipe

NO_MODEL = "none"  # a recipe must name a model, and prompts may be measured without
CHUNK = 256  # rows between two writes to the journal
FORMAT = 2  # of the journal and of what is kept; raised when earlier work must not be used


def main(args: list[str]) -> None:
    """Prepare the rows of one source.

    Raises:
        UserError: a source or OUT is wrong, or no row is left. What was finished is kept.
    """
    parser = argparse.ArgumentParser(prog="python -m nanolmmr1.prepare", description=__doc__.partition("Next:")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schema", metavar="SCHEMA", choices=["auto", *schemas.NAMES],
                        help=f"auto, {', '.join(schemas.NAMES)}")
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--against", metavar="BENCHMARK", nargs="+", default=[])
    given = overrides(args)
    options = parser.parse_args([arg for arg in args if arg not in given])
    cfg = config.load("single", [f"model={NO_MODEL}", f"defaults.data={NO_MODEL}", *given])
    source, against = fetch(options.source), fetch_benchmarks(options.against)
    for name in (source, *(name for _, sources in against.values() for name in sources)):
        check_output(options.out, name)
    schema = options.schema if options.schema != "auto" else ""
    read = load_rows(source, cfg.prompt.columns, cfg.data.on_bad_row, cfg.data.image_dir,
                     Rows.temporary(options.out.parent), schema, decode=False)
    work = {"format": FORMAT, "schema": schema, "keys": sorted(given), "rows": digest(read),
            "against": {name: [*map(state, sources)] for name, (_, sources) in against.items()}}  # fmt: skip
    journal = Path(f"{options.out}.journal")
    if (done := finished(options.out, journal, work)) is None:
        print("\n".join(read.notes))
        done = prepare(cfg, read, options.out, journal, against, work)
    if journal.exists():
        if options.out.suffix == ".parquet":  # which holds the pictures
            shutil.rmtree(picture_folder(options.out), ignore_errors=True)
        journal.unlink()
    show(done, options.out)
    if not done["kept"]:
        raise UserError(f"{shown(source)}: no row is left; the table above says why")


def fetch(source: str) -> str:
    """A source on this machine: a hub data set is downloaded, as the files that it consists of.

    Raises:
        UserError: it is neither here nor on the hub.
    """
    name, at, split = source.rpartition("@")
    name, split = (name, split) if at and not os.path.exists(source) else (source, "")
    if os.path.exists(os.path.expanduser(name)) or not re.fullmatch(HUB, name) or Path(name).suffix in READERS:
        return source
    hub_id, _, config_name = name.partition(":")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(hub_id, repo_type="dataset")
    except Exception as error:  # any type: an unreachable hub, no such set, a full disk
        raise UserError(f"{shown(hub_id)} is no file or folder here, and cannot be downloaded: {reason(error)}") \
            from error
    # A configuration is a folder, or a file that is named like a split; and a folder of one split need not name it.
    inside = os.path.join(folder, config_name).rstrip("/")
    for place, which in ((inside, split), (inside, ""), (folder, config_name), (folder, split)):
        with contextlib.suppress(UserError):
            if data_files(Path(place), which):
                return f"{place}@{which}" if which else place
    raise UserError(f"{shown(source)}: the data set, downloaded to {folder}, has no files of this configuration and "
                    "split: name a file there")


def fetch_benchmarks(texts: list[str]) -> dict[str, Chosen]:
    """Benchmarks by name; their sources are on this machine."""
    return {entry.name: Chosen(entry, [fetch(source) for source in sources])
            for entry, sources in map(choose, texts)}


def digest(read: Loaded) -> str:
    """A hash of rows as they were read: texts, and pictures by contents, or by size and time of their files."""
    found = hashlib.sha256(json.dumps(read.dropped).encode())
    for row in read.rows:
        images = [item if isinstance(item, str) else hashlib.sha256(item).hexdigest() for item in row.images]
        times = [(os.stat(item).st_size, os.stat(item).st_mtime_ns) for item in row.images if isinstance(item, str)]
        found.update(json.dumps([vars(row) | {"images": images}, times]).encode())
    return found.hexdigest()


def state(source: str) -> str:
    """A hash of names, sizes and times of a source's files."""
    path, found = source_path(source), hashlib.sha256()
    try:
        for file in [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file()):
            status = file.stat()
            found.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise UserError(f"{shown(source)} cannot be read: {reason(error)}") from error
    return found.hexdigest()


def report_path(out: Path) -> Path:
    return Path(f"{out}.report.json")


def finished(out: Path, journal: Path, work: dict[str, Any]) -> dict[str, Any] | None:
    """The report of the same work, if it is done; None if it is not, or if this command wrote OUT from other rows.

    Raises:
        UserError: OUT, or a file beside it, is not as this command left it, or not of this command.
    """
    report, done, written = report_path(out), dict[str, Any](), _sha256(out) if out.is_file() else ""
    others = [path for path in (out, report) if path.exists()]
    try:
        if report.exists():
            done = json.loads(report.read_bytes())
            others = [] if written in ("", done["sha256"], done["replaced"]) else [out]
    except (OSError, ValueError, KeyError, TypeError):
        others = [report]
    if not journal.exists() and (not done or out.suffix == ".parquet") and picture_folder(out).exists():
        others.append(picture_folder(out))
    if others:
        raise UserError(f"{shown(others[0])} is there, and is not as this command left it: choose another output, or "
                        "move it away")
    return done if done.get("work") == work and done["sha256"] == written else None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare(
    cfg: Recipe, read: Loaded, out: Path, path: Path, against: dict[str, Chosen], work: dict[str, Any]
) -> dict[str, Any]:  # fmt: skip
    """Check and write rows; the report. `path`: of the journal."""
    began = time.monotonic()
    benchmarks, sizes = Contamination(), dict[str, int]()
    for name, (entry, sources) in against.items():
        held = load_rows(sources, rows=Rows.temporary(out.parent), schema=entry.schema)
        print("\n".join(held.notes))
        rows = kept(held.rows, entry)
        sizes[name] = len(rows)
        benchmarks.add(name, rows)
    processor = Processor(weights.find(cfg.model), cfg.prompt) if cfg.model != NO_MODEL else None
    with (
        Journal(path, work) as journal,
        Judge(cfg.reward) as judge,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        checks = Checks(cfg.phases["train"], judge, processor, benchmarks if against else None, pool)
        check_rows(read.rows, checks, journal, out)
        before = _sha256(out) if out.is_file() else ""
        report = summary(read, journal) | {"work": work, "benchmarks": sizes, "replaced": before}
        report["seconds"] = round(time.monotonic() - began, 1)

        def describe(file: Path | None) -> None:
            report["sha256"] = _sha256(file) if file else before
            write_atomically(report_path(out), (json.dumps(report, indent=1) + "\n").encode())

        if report["kept"]:
            write_rows(out, (record for chunk in journal.chunks() for record in chunk["rows"]), describe)
        else:
            describe(None)
    return report


def check_rows(rows: Rows, checks: Checks, journal: Journal, out: Path) -> None:
    """Check the rows that the journal does not have yet, chunk by chunk.

    Raises:
        UserError: pictures that the journal names are gone.
    """
    for chunk in journal.chunks():
        checks.asked |= chunk["asked"]
        for name in (name for record in chunk["rows"] for name in record["images"]):
            if not (out.parent / name).is_file():
                raise UserError(f"{shown(journal.path)} names the picture {name}, which is gone: delete the journal to "
                                "start over")
    total = -(-len(rows) // CHUNK)
    with Display({}) as display, display.busy("checking rows", len(rows)) as advance:
        advance(min(journal.done * CHUNK, len(rows)))
        for number in range(journal.done, total):
            chunk = list(rows[number * CHUNK:(number + 1) * CHUNK])
            kept, dropped, hits, asked = checks.check(chunk)
            records = [to_record(row, out, copy=True) for row, keep in zip(chunk, kept, strict=True) if keep]
            os.sync()  # their pictures
            journal.append({"rows": records, "asked": asked, "dropped": dropped, "hits": hits})
            advance(len(chunk))


def summary(read: Loaded, journal: Journal) -> dict[str, Any]:
    """Counts, the first dropped rows of each reason, and the rows that a benchmark may hold."""
    counts, first, hits, kept = Counter(read.dropped), dict[str, list[str]](), list[dict[str, Any]](), 0
    for chunk in journal.chunks():
        hits += chunk["hits"]
        kept += len(chunk["rows"])
        for name, why, text in chunk["dropped"]:
            counts[why] += 1
            if len(told := first.setdefault(why, [])) < FIRST:
                told.append(f"{name}: {text}")
    return {"read": kept + counts.total(), "kept": kept, "dropped": dict(counts), "first": first, "hits": hits}


def show(report: dict[str, Any], out: Path) -> None:
    """Print what was read, kept and dropped."""
    lines = [("rows read", f"{report['read']:,}"), (f"kept in {out}", f"{report['kept']:,}")]
    lines += [(f"dropped: {why}", f"{count:,}") for why, count in Counter(report["dropped"]).most_common()]
    print_table("prepared", lines)
    for why, texts in report["first"].items():
        print(f"{why}; the first: " + " | ".join(texts))
    for name, rows in report["benchmarks"].items():
        hits = [hit for hit in report["hits"] if hit["benchmark"] == name]
        print(f"{name}: {rows:,} rows; {len({h['key'] for h in hits if h['dropped']}):,} of them are in "
              f"{len({h['id'] for h in hits if h['dropped']}):,} rows, which were dropped; "
              f"{sum(not h['dropped'] for h in hits):,} "
              f"rows were kept that look like one (all in {report_path(out)})")


if __name__ == "__main__":
    run(main)
