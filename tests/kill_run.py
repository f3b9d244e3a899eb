"""Kill random ranks of a desk run at random moments, and see that torchrun brings it back and nothing is lost.

    python tests/kill_run.py [--kills 20] [--seed 0] [--out FOLDER] [dotted.key=value ...]

Two runs of a shortened desk recipe with two ranks: one is left alone, one is killed so many times. A table of the kills
is printed; the exit status is 1 where final weights or metrics differ, or where some kind of moment was hardly ever
hit. The seed decides rank, kind of moment and delays; the machine's own pace decides the rest.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
MOMENTS = {  # kind of moment -> stages that count as it
    "sampling": ("gen",),
    "scoring": ("old", "ref", "reward"),
    "backward": ("update_actor",),
    "checkpoint": (),  # a half-written folder is there
    "any": (),  # so many seconds after the last kill, starting up included
}
SHORT = [
    "world=desk", "checkpoint.every_steps=1", "evaluate.tasks={}", "phases.text.steps=14", "phases.captioned.steps=14",
    "phases.image.steps=14", "defaults.prompts_per_step=16", "defaults.updates_per_rollout=2",
    "defaults.objective.kl_coef=0.01", "reward.workers=1",
]  # fmt: skip


class Run:
    """train.py under torchrun on this machine, what it says in a file. A context manager: nothing of it outlives it."""

    def __init__(self, folder, args, ranks=2, torchrun=("--standalone",), log="", prefix=(), **env):
        """folder: the run folder. args: of train.py. torchrun: its options. log: told apart by it. prefix: of the
        command. env: more environment."""
        self.folder, self.log = Path(folder), Path(f"{folder}{log}.log")
        quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        command = [*prefix, sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), *torchrun,
                   ROOT / "tests" / "staged.py", *args, f"output={folder}"]  # fmt: skip
        with open(self.log, "a") as file:
            self.process = subprocess.Popen(command, env=os.environ | quiet | env, stdout=file, stderr=file, cwd=ROOT,
                                            start_new_session=True)  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        ranks = self.ranks()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pid in ranks.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def said(self):
        return self.log.read_text(errors="replace")

    def ranks(self):
        """{rank: process id} of those alive."""
        found = {}
        for pid in children(self.process.pid):
            try:
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue  # it has just ended
            found |= {int(word[5:]): pid for word in words if word.startswith(b"RANK=")}
        return found

    def stage(self, rank, pid):
        """What the process last wrote of where it is: {"pid", "moves", "stage", "step"}; None before that."""
        try:
            record = json.loads((self.folder / f".stage_rank_{rank}").read_text())
        except FileNotFoundError:
            return None
        return record if record["pid"] == pid else None

    def signal(self, rank, number):
        """Send it to one rank; returns its process id."""
        pid = self.ranks()[rank]
        os.kill(pid, number)
        return pid

    def step(self):
        """The newest checkpoint's step, 0 if there is none."""
        names = [path.name[5:] for path in (self.folder / "checkpoints").glob("step_*")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    def writing(self):
        """Whether a checkpoint is there in part."""
        halves = [path.name[5:-4] for path in (self.folder / "checkpoints").glob("step_*.tmp")]
        return any(int(name) > self.step() for name in halves)

    def wait_for(self, condition, what, timeout=300):
        """Poll until the condition gives something true; returns it.

        Raises:
            RuntimeError: torchrun has ended, or it took too long.
        """
        deadline = time.monotonic() + timeout
        while not (value := condition()):
            if self.process.poll() is not None:
                raise RuntimeError(f"no {what}: torchrun has ended with {self.process.poll()}\n{self.said()[-4000:]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"no {what} within {timeout} s\n{self.said()[-4000:]}")
            time.sleep(0.002)
        return value

    def end(self, timeout=300):
        """Wait for torchrun; returns its exit status."""
        return self.process.wait(timeout)


def strike(run, rng, moment, ranks=2):
    """SIGKILL a random rank at such a moment, and wait until torchrun has started it again.

    Returns:
        {"rank", "moment", "stage", "step": when it was killed, by its own last word; "resumed": the step it will go on
        from}. The kind of moment may be another than was aimed at, and two at once.
    """
    rank, delay = rng.randrange(ranks), rng.random()
    if moment != "any":
        for _ in range(1 + rng.randrange(2)):
            run.wait_for(lambda: not at(run, rank, moment), f"end of {moment}")
            run.wait_for(lambda: at(run, rank, moment), f"moment of {moment}")
    # Somewhere inside it: stages of such runs take some tenths of a second, writes some hundredths.
    deadline = time.monotonic() + delay * {"any": 10, "checkpoint": 0.03}.get(moment, 0.3)
    run.wait_for(lambda: time.monotonic() > deadline and rank in run.ranks(), "living rank")
    writing, pid = run.writing(), run.signal(rank, signal.SIGKILL)
    record = run.stage(rank, pid) or {"stage": "starting", "step": run.step()}
    kinds = [kind for kind, stages in MOMENTS.items() if record["stage"] in stages]
    if writing and run.writing() and record["stage"] != "starting":
        kinds.append("checkpoint")  # as well: it is written while training goes on
    run.wait_for(lambda: run.ranks().get(rank, pid) != pid, "new rank")
    stage = record["stage"] or "between stages"
    moment = "+".join(kinds) or "other"
    return {"rank": rank, "moment": moment, "stage": stage, "step": record["step"], "resumed": run.step()}


def back(run, ranks=2):
    """Whether all ranks have gone through a stage since they were started."""
    alive = run.ranks()
    return len(alive) == ranks and all(run.stage(rank, pid) for rank, pid in alive.items())


def at(run, rank, moment):
    if moment == "checkpoint":  # of these ranks: what killed ones left is removed by the next
        return run.writing() and back(run)
    record = run.stage(rank, run.ranks().get(rank))
    return record and record["stage"] in MOMENTS[moment]


def differences(ours, theirs):
    """What two finished runs differ in: tensors of the final model, bit for bit, and metrics but for timings."""
    models = [load_file(run / "model" / "model.safetensors") for run in (ours, theirs)]
    raw = [{name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in model.items()} for model in models]
    found = [name for name in raw[0] | raw[1] if raw[0].get(name) != raw[1].get(name)]
    told = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (ours, theirs)]
    if len(told[0]) != len(told[1]):
        found.append(f"number of steps: {len(told[0])} and {len(told[1])}")
    for mine, its in zip(*told, strict=False):
        keys = [key for key in mine | its if not key.startswith(("timing_s/", "perf/"))]
        found += [f"{key} of step {mine['step']}" for key in keys if mine.get(key) != its.get(key)]
    return found


def children(pid):
    try:
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    return [int(child) for text in lists for child in text.split()]


def tiny_recipe(home, steps):
    """Arguments of train.py for a run whose steps take about a second; model, rows and rewards are made in `home`."""
    home.mkdir(parents=True, exist_ok=True)
    tool = ROOT.parent / "shared" / "tools" / "make_tiny_checkpoint.py"
    sizes = {"hidden": 32, "heads": 2, "kv-heads": 1, "intermediate": 64, "layers": 1, "vision-depth": 1,
             "vision-full-every": 1, "vision-hidden": 32, "vision-intermediate": 32}  # fmt: skip
    options = [f"--{key}={value}" for key, value in sizes.items()]
    subprocess.run([sys.executable, tool, home / "model", "--dtype=float32", *options], check=True, capture_output=True)
    rows = [{"problem": f"How much is {n} + {n}?", "answer": str(2 * n)} for n in range(8)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Different responses earn different rewards, so that an untrained model has something to learn from.
    (home / "reward.py").write_text("def varied(response, row):\n    return sum(map(ord, response)) % 17 / 17\n")
    phase = {"data": home / "rows.jsonl", "steps": steps, "prompts_per_step": 4, "group_size": 4, "lr": 1e-4,
             "max_response_tokens": 16, "updates_per_rollout": 2}  # fmt: skip
    functions = f'reward.functions={{"{home / "reward.py"}:varied": 1.0}}'
    return ["single", f"model={home / 'model'}", "checkpoint.every_steps=1", "reward.workers=1", functions,
            *(f"phases.train.{key}={value}" for key, value in phase.items())]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    parser.add_argument("overrides", nargs="*", help="of the recipe, dotted.key=value")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    quiet, killed = (options.out.resolve() / name for name in ("undisturbed", "killed"))
    args, began = ["desk", *SHORT, *options.overrides], time.monotonic()
    with Run(quiet, args) as run:
        if run.end(3600):
            sys.exit(f"the undisturbed run failed:\n{run.said()[-4000:]}")
    print(f"undisturbed run: {time.monotonic() - began:.0f} s, {run.step()} steps")
    if not (killed / "world").is_dir():  # two minutes of work that are no subject here
        shutil.copytree(quiet / "world", killed / "world")
        (killed / ".nanolmmr1").touch()  # a run goes on only in a folder that is its own

    rng, began, counts = random.Random(options.seed), time.monotonic(), dict.fromkeys([*MOMENTS, "other"], 0)
    share = min(3, options.kills // (len(MOMENTS) - 1))
    columns = "{:>4}  {:>4}  {:19}  {:15}  {:>4}  {:>7}  {:>17}  {:>12}"
    print(columns.format("kill", "rank", "moment", "stage", "step", "after s", "resumed from step", "back after s"))
    with Run(killed, args, torchrun=["--standalone", "--max_restarts", str(2 * options.kills)]) as run:
        for kill in range(1, options.kills + 1):
            short = [moment for moment in list(MOMENTS)[:-1] if counts[moment] < share]
            needed = sum(share - counts[moment] for moment in short)
            hit = strike(run, rng, rng.choice(short if 2 * needed > options.kills - kill else list(MOMENTS)))
            for moment in hit["moment"].split("+"):
                counts[moment] += 1
            at_s, killed_at = time.monotonic() - began, time.monotonic()
            if rng.random() < 0.9:  # now and then the next one comes before all are back
                run.wait_for(lambda: back(run), "ranks that are back")
                took = f"{time.monotonic() - killed_at:.1f}"
            else:
                took = "-"
            print(columns.format(kill, *list(hit.values())[:4], f"{at_s:.1f}", hit["resumed"], took), flush=True)
        status, said = run.end(3600), run.said()
    print(f"kills: {', '.join(f'{count} {moment}' for moment, count in counts.items() if count)}; "
          f"exit status {status} after {time.monotonic() - began:.0f} s")  # fmt: skip
    if status:
        sys.exit(said[-4000:])
    wrong = differences(killed, quiet)
    print("final weights and metrics: " + (f"{len(wrong)} differ, {wrong[0]} first" if wrong else "equal, bit for bit"))
    if missed := [moment for moment in list(MOMENTS)[:-1] if counts[moment] < share]:
        print(f"fewer than {share} kills during: {', '.join(missed)}; try another seed")
    sys.exit(bool(wrong or missed))


if __name__ == "__main__":
    main()
