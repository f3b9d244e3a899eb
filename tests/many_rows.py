"""Memory and time of a data set with many pictures: prepared, and at the start of a run on 1, 2 and 8 ranks.

    python tests/many_rows.py [--rows 40000] [--ranks 1 2 8] [--out FOLDER]

The rows are made from 200 real pictures, each file a different one, in one parquet. Printed are peaks and what is
resident after the rows are read, beside what they were before.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
TARGET_PREPARE_MB, TARGET_RANKS_MB = 1000, 500


def make(path, count):
    """Rows with one picture each; bytes behind a picture's end make its file another one."""
    import published
    import pyarrow
    import pyarrow.parquet

    real = published.pictures()[:200]
    kinds = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    names = ("problem", "answer", "images", "qid", "pass_rate")
    types = (pyarrow.string(), pyarrow.string(), pyarrow.list_(kinds), pyarrow.string(), pyarrow.float64())
    schema = pyarrow.schema(list(zip(names, types, strict=True)))
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, count, 1000):
            rows = [dict(problem=f"<image>What is the sum of the {i} numbers that are shown, if each of them counts "
                         f"{i % 17} times and the result is rounded to the nearest hundred?", answer=str(i),
                         images=[dict(bytes=real[i % len(real)] + i.to_bytes(4), path=None)], qid=f"row-{i}",
                         pass_rate=i % 9 / 8) for i in range(start, min(start + 1000, count))]  # fmt: skip
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def start(source, model, folder):
    """[resident MB before, after, at most] of a rank, seconds, and its number of rows."""
    import torch  # noqa: F401, so that it is in the first number

    from nanolmmr1 import config
    from nanolmmr1.data.prompt import Processor
    from nanolmmr1.report.display import Display
    from nanolmmr1.reward.judge import Judge
    from nanolmmr1.run import setup

    cfg = config.load("single", [f"model={model}", f"phases.train.data={source}", f"output={folder}"])
    processor, began = Processor(model, cfg.prompt), time.monotonic()
    with Judge(cfg.reward) as judge:
        before = resident_mb()
        data = setup.load_data(cfg, processor, judge, Display({}, quiet=True))
        took = time.monotonic() - began
        after, peak = resident_mb(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        assert sum(len(row.images[0]) > 100 for row in data.rows["train"][:50]) == 50
    return [before, after, peak, took, len(data.rows["train"])]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 8])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        folder.mkdir(exist_ok=True)
        for line in measure(folder, options.rows, options.ranks):
            print(line, flush=True)


def measure(folder, count, ranks):
    """The lines that are printed, one after the other."""
    from conftest import SHARED, make_checkpoint
    from ranks import run

    source, model = folder / "rows.parquet", make_checkpoint(SHARED, folder / "model", "--layers", "1")
    make(source, count)
    yield f"{count:,} rows with pictures, {source.stat().st_size / 1e6:,.0f} MB of parquet"
    command = [sys.executable, "-m", "nanolmmr1.prepare", "auto", str(source), str(folder / "prepared.jsonl")]
    idle = subprocess.run(["/usr/bin/env", sys.executable, "-c", IDLE], cwd=ROOT, capture_output=True, text=True)
    began = time.monotonic()
    peak = _peak_mb(command)
    took = time.monotonic() - began
    yield (f"prepare: {took:.0f} s, {took / count * 1000:.1f} s per 1,000 rows; peak {peak:,.0f} MB, of which imports "
           f"take {float(idle.stdout):,.0f} (target: under {TARGET_PREPARE_MB:,})")
    os.makedirs(folder / "run", exist_ok=True)
    for size in ranks:
        told = run(size, start, str(source), str(model), str(folder / "run"), timeout=3600)
        grown = sum(after - before for before, after, *_ in told)
        yield (f"{size} rank{'s' * (size > 1)}: {told[0][3]:.0f} s until {told[0][4]:,} rows are read, checked and "
               f"measured; {grown:,.0f} MB more are resident in all (target: under {TARGET_RANKS_MB} for 8); peak of "
               f"rank 0 {told[0][2]:,.0f} MB, of which {told[0][0]:,.0f} before")


IDLE = ("import resource, nanolmmr1.prepare.__main__; "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)")


def _peak_mb(command):
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, f"exit status {status}"
    return used.ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
