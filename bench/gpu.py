"""All GPU measurements and tests in one call of ten minutes.

    python -m bench.gpu [--part NAME ...] [--out DIR] [--dry]

Each part is a separate process with a time limit, so that a kernel that breaks the CUDA context ends only its part, and
everything printed and measured before stays. DIR has each part's log and rows; after each part verdicts.json and
verdicts.txt answer the questions of verdict.py from all rows so far. `--dry` does the same on a CPU with tiny shapes.

    python -m bench.gpu prepare [--to .gpu]

creates the folder that a host without network needs (carry.py); a later run in the same checkout uses it.
BENCH_COMMIT in the environment is the commit of a copy without .git.

Next: carry.py, offline dependencies.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py; torch reads it when it is imported
import torch

from bench import carry
from bench.verdict import MODES, answer, questions

ROOT = Path(__file__).resolve().parents[1]
PARTS = {  # name -> (seconds, lines of its log to show)
    "probe": (60, 40), "tests": (150, 30), "step": (120, 40), "head": (75, 30), "attention": (70, 40),
    "memory": (40, 40), "desk": (70, 14), "vllm": (120, 30),
}  # fmt: skip
OPS = {"probe": ["probe"], "step": ["step"], "head": ["linear_loss", "linear_logprob"], "attention": ["attention"],
       "memory": ["rmsnorm", "swiglu", "mrope"]}  # fmt: skip
ALSO = {"memory": "|(rmsnorm|swiglu|mrope): .*16,384.*ward: Liger"}  # useful rows that no question needs
TOLD = {  # part -> (question, regular expression of the line that answers it)
    "tests": ("pytest -m gpu", r".*\d+ passed.* in [\d.]+ ?s.*"),
    "desk": ("desk run, planned against measured peak", r"peak of .*"),
    "vllm": ("vLLM: doctor, and a run", r"\d+ checks ok.*"),
}  # fmt: skip
EDITS = dict.fromkeys(
    ("head's columns, warps, stages and groups of tiles", "attention, how finely dK and dV are split"),
    "change the constants in kernels/ and compare the rows of --part head, --part attention")  # fmt: skip
EDITS["attention, head dim 80 as 64 + 16"] = "only the padded one is built"
PLAN_OFF = 0.15  # allowed relative error of the planned peak
COLUMNS = 170
LIMIT_S = 570  # of the whole call


def arguments(argv):
    parser = argparse.ArgumentParser(description="Measure everything that waits for a GPU.")
    parser.add_argument("action", nargs="?", choices=("prepare",), help="make the folder to carry, and measure nothing")
    parser.add_argument("--to", type=Path, default=Path(".gpu"), metavar="DIR", help="folder carried (default .gpu)")
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS, metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR",
                        help="default runs/gpu; logs and rows of an earlier call are removed")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="after each part, all of DIR as one .tgz")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="S", help=f"of all parts (default {LIMIT_S} s)")
    parser.add_argument("--dry", action="store_true", help="on the CPU, on tiny shapes: numbers mean nothing")
    parser.add_argument("--new-assembler", action="store_true", help="compile with the assembler that was carried")
    return parser.parse_args(argv)


def main(argv=None):
    """Returns the exit status: 1 if a part failed or timed out."""
    o = arguments(argv)
    if o.action:
        print(f"{o.to}: {carry.prepare(o.to) / 1e6:.0f} MB")
        return 0
    if not (o.dry or torch.cuda.is_available()):
        raise ValueError("torch sees no GPU: use --dry for a run on the CPU")
    began, device, states = time.monotonic(), "cpu" if o.dry else "cuda", {}
    out = o.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for path in (out / f"{name}.{kind}" for name in PARTS for kind in ("json", "log")):
        path.unlink(missing_ok=True)  # rows of an earlier call must not answer questions of this one
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        env = environment(device, carry.unpack(o.to, Path(scratch), o.new_assembler))
        for name in dict.fromkeys(o.part):
            left = o.limit - (time.monotonic() - began)
            states[name] = run_part(name, device, out, Path(scratch), env, left)
            report(o, out, device, states)
    print((out / "verdicts.txt").read_text())
    return int(any(state != "done" and not state.startswith("not run") for state in states.values()))


def environment(device, carried):
    """Environment of every part: this checkout first on the path, then the carried packages; no network."""
    env = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"} | carried
    paths = ROOT, carried.get("PYTHONPATH"), os.environ.get("PYTHONPATH")
    env["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
    return env | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


def run_part(name, device, out, scratch, env, left):
    """Run a part and show the end of its log; returns its state: done, not run, timed out, or failed."""
    seconds, lines = PARTS[name]
    seconds, log = min(seconds, left), out / f"{name}.log"
    if seconds < 1:
        return "not run: no time was left"
    if name == "vllm" and (device == "cpu" or importlib.util.find_spec("vllm") is None):
        return "not run: a dry run starts no engine" if device == "cpu" else "not run: vLLM is not installed"
    began = time.monotonic()
    print(f"== {name}, at most {seconds:.0f} s", flush=True)
    state = "done"
    for command in commands(name, device, out, scratch):
        if state == "done":
            state = run(command, log, env, seconds - (time.monotonic() - began))
    if (metrics := scratch / name / "metrics.jsonl").exists():
        shutil.copy(metrics, out / f"{name}_metrics.jsonl")
    text = log.read_text(errors="replace")
    print(*(line[:COLUMNS] for line in text.splitlines()[-lines:]), sep="\n")
    print(f"== {name}: {state}, {time.monotonic() - began:.0f} s\n", flush=True)
    return state


def run(command, log, env, seconds):
    """Run a command, append its output to the log, and kill its process group; returns its state."""
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(max(0, seconds))
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "done" if not status else f"failed: signal {-status}" if status < 0 else f"failed: exit status {status}"


def commands(name, device, out, scratch):
    """Commands of a part, which run one after another."""
    python, dry, rows = [sys.executable, "-m"], device == "cpu", ["--json", str(out / f"{name}.json")]
    if name == "probe":
        return [[*python, "bench.probe", *rows]]
    if name == "step":
        return [[*python, "bench.step", *MODES, "--profile", "--apply", *rows]]
    if name in OPS:
        wanted = [re.escape(row) + "$" for question in questions(device) for row in question.names]
        only = "|".join(f"^{row}" for row in dict.fromkeys(wanted) if row.partition(":")[0] in OPS[name])
        only += ALSO.get(name, "")
        return [[*python, "bench", *OPS[name], "--only", only, "--seconds", "0" if dry else "0.15", *rows]]
    if name == "tests":
        many = ["-n", "4", "--dist", "loadfile"] if importlib.util.find_spec("xdist") and not dry else []
        return [[*python, "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *many, *["--collect-only"] * dry]]
    if dry:
        carry.tiny_world(scratch / "world")
    carry.give_world(run := scratch / name, scratch / "world")
    sizes = {"prompts_per_step": 2, "group_size": 2, "max_response_tokens": 8, "max_prompt_tokens": 256} if dry else {}
    train = [sys.executable, "train.py", "desk", f"device={device}", f"dtype={'float32' if dry else 'bfloat16'}",
             f"output={run}", f"evaluate.limit={2 if dry else 20}", *(f"defaults.{k}={v}" for k, v in sizes.items()),
             *(f"phases.{phase}.steps={1 if dry else 3}" for phase in ("text", "captioned", "image"))]  # fmt: skip
    if name == "desk":
        return [train]
    return [[*python, "nanolmmr1.doctor", "rollout.engine=vllm"], [*train, "rollout.engine=vllm"]]


def report(o, out, device, states):
    """Answer every question from the rows so far: verdicts.json, verdicts.txt, and the archive."""
    rows, lost, about = {}, {}, {}
    for part in OPS:
        with contextlib.suppress(FileNotFoundError):
            found = json.loads((out / f"{part}.json").read_text())
            rows |= {f"{row['op']}: {row['case']}: {row['provider']}": row for row in found["rows"]}
            about = found["machine"]  # from a part, since a CUDA context here would take GPU memory
        ended = states.get(part, "not asked for")
        lost |= dict.fromkeys(OPS[part], f"no row, {part} {ended}" if ended != "done" else "no such row")
    verdicts = [answer(question, rows, lost.__getitem__) for question in questions(device)]
    verdicts += [told(part, states.get(part, "not asked for"), out) for part in TOLD]
    verdicts += [{"question": text, "result": "not measured", "numbers": why} for text, why in EDITS.items()]
    whole = {"machine": about, "dry": o.dry, "parts": states, "verdicts": verdicts}
    (out / "verdicts.json").write_text(json.dumps(whole, indent=1) + "\n")
    shown = "device", "driver", "torch", "triton", "commit", "date"
    lines = [", ".join(f"{key} {about[key]}" for key in shown if about)]
    lines += ["dry: tiny shapes on a CPU, which decide nothing"] * o.dry
    lines += [f"VERDICT {v['question']}: {v['result']} ({v['numbers']})" for v in verdicts]
    (out / "verdicts.txt").write_text("\n".join(lines) + "\n")
    if o.archive:
        draft = o.archive.with_name(o.archive.name + ".part")
        with tarfile.open(draft, "w:gz") as packed:
            packed.add(out, "gpu", filter=lambda entry: None if entry.name.endswith((".tgz", ".part")) else entry)
        draft.replace(o.archive)


def told(part, state, out):
    """Verdict of a part without rows, from its state and the last matching line of its log."""
    question, pattern = TOLD[part]
    log = out / f"{part}.log"
    lines = re.findall(rf"^\W*({pattern})$", log.read_text(errors="replace"), re.MULTILINE) if log.exists() else []
    numbers, result = f"{state}; {lines[-1].strip(' =')}" if lines else f"{part} {state}", "not measured"
    if state.startswith("failed"):
        result = "missed"
    elif state == "done" and lines:
        ratio = re.search(r"\(([\d.]+) x\)", lines[-1])
        result = "met" if not ratio or abs(float(ratio[1]) - 1) <= PLAN_OFF else "missed"
    return {"question": question, "result": result, "numbers": numbers}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # exiting kills the part's processes
    try:
        sys.exit(main())
    except ValueError as wrong:
        sys.exit(f"error: {wrong}")
