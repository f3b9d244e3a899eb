"""A run that is told to stop notices; a rank that keeps the others waiting is named, and nobody else."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as td
from staged import record_stages

from nanolmmr1.errors import Preempted, UserError
from nanolmmr1.parallel import dist, signals
from nanolmmr1.parallel.signals import Heartbeat, Watch, blame
from nanolmmr1.reward.judge import Worker
from nanolmmr1.reward.worker import Question
from nanolmmr1.schema import Reward

HANG_S = 2.0
STUCK = rf"rank {{}} \({re.escape(socket.gethostname())}, pid {{}}\) has been in stage gen of step 12 for [1-9] s"


@pytest.mark.parametrize("number", signals.SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_noticed_and_kills_nothing(number, tmp_path):
    before = signal.getsignal(number)
    with Watch(tmp_path, 300, 1800) as run:
        run.check()
        assert not run.stopping
        os.kill(os.getpid(), number)
        assert run.stopping
        with pytest.raises(Preempted):
            run.check()
    assert signal.getsignal(number) == before


def test_the_status_after_a_signal_is_a_shells():
    assert {number.name: Preempted(number).exit_status for number in signals.SIGNALS} == {
        "SIGTERM": 143, "SIGUSR1": 143, "SIGINT": 130, "SIGHUP": 129}


@pytest.mark.parametrize("number", signals.SIGNALS, ids=lambda number: number.name)
def test_before_there_is_anything_to_save_a_signal_ends_the_process(number, tmp_path):
    with Watch(tmp_path, 300, 1800) as run:
        run.defer = False
        with pytest.raises(KeyboardInterrupt) as stop:
            os.kill(os.getpid(), number)
        assert stop.value.args == (number,)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_second_ctrl_c_ends_the_process_at_once(first, tmp_path):
    code = ("import os, signal, sys\nfrom nanolmmr1.parallel.signals import Watch\n"
            "with Watch('.', 300, 1800) as run:\n"
            f"    os.kill(os.getpid(), {int(first)})\n    print('asked', flush=True)\n"
            "    os.kill(os.getpid(), signal.SIGINT)\n    print('alive', flush=True)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "asked\n")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_that_was_ignored_when_the_run_began_stays_so(number, tmp_path):
    before = signal.signal(number, signal.SIG_IGN)  # as nohup does, and a shell with its background jobs
    try:
        with Watch(tmp_path, 300, 1800) as run:
            os.kill(os.getpid(), number)
            assert not run.stopping
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_one_process_needs_no_thread_and_no_store(tmp_path):
    threads = threading.active_count()
    with Watch(tmp_path, 1800, 300) as run, run.stage("gen", 3):
        assert (run.step, run.stages, threading.active_count()) == (3, ["gen"], threads)


def test_a_stage_that_fails_is_left(tmp_path):
    with Watch(tmp_path, 300, 1800) as run:
        with pytest.raises(Preempted), run.stage("step", 3), run.stage("gen"):
            raise Preempted
        assert (run.stages, run.moves) == ([], 4)


def test_staged_runs_keep_stages_in_files(tmp_path, request):
    file = tmp_path / ".stage_rank_0"
    with Watch(tmp_path, 300, 1800) as run:
        with run.stage("old", 1):
            assert not file.exists()
        request.addfinalizer(record_stages())
        with run.stage("step", 2), run.stage("gen"):
            assert json.loads(file.read_text()) == {"pid": os.getpid(), "moves": 4, "stage": "gen", "step": 2}
        assert json.loads(file.read_text())["stage"] == ""
    assert list(tmp_path.iterdir()) == [file]


def signs(text):
    """[Sign] from words like `5` (moves), `5!` (not heard any more), `5@x` (its main thread is at x)."""
    made = []
    for rank, word in enumerate(text.split()):
        word, _, place = word.partition("@")
        stage = "" if word.startswith("0") else "gen"
        moves, silent = int(word.rstrip("!")), word.endswith("!")
        made.append(Heartbeat(f"host{rank}, pid {rank}", moves, stage, 12, 305.4, place, False, silent))
    return made


@pytest.mark.parametrize(
    ("state", "me", "speaker", "text"),
    [
        ("6 5 6 6", 0, 0, "<1>; ranks 0, 2 and 3 wait for it"),
        ("5 6 7", 1, 1, "<0>; ranks 1 and 2 wait for it"),
        ("5 6", 0, 1, "<0>; rank 1 waits for it"),
        ("5 6 5", 1, 1, "<0>; <2>; rank 1 waits for them"),
        ("6 6! 6", 0, 0, "<1> and does not respond: it is stopped, or its host is gone; ranks 0 and 2 wait for it"),
        ("6! 6", 1, 1, "<0> and does not respond: it is stopped, or its host is gone; rank 1 waits for it"),
        # Silent, but ahead: the one that it waited for is named as well.
        ("6! 5 6", 2, 2, "<0> and does not respond: it is stopped, or its host is gone; <1>; rank 2 waits for them"),
        ("6! 5", 1, 1, "<0> and does not respond: it is stopped, or its host is gone; <1>"),
        # No further than the silent one, and yet not to blame.
        ("5! 5 6", 1, 1, "<0> and does not respond: it is stopped, or its host is gone; ranks 1 and 2 wait for it"),
        ("5@x 5@y 5@x", 2, 0, "all ranks have been in stage gen of step 12 for 305 s: ranks 0 and 2 at x, rank 1 at y"),
        ("5! 5 5!", 1, 1, "<1> and hears of no other rank: they are stopped, or there is no way to the store at here"),
    ],
)
def test_who_is_to_blame(state, me, speaker, text):
    text = re.sub("<(.)>", r"rank \1 (host\1, pid \1) has been in stage gen of step 12 for 305 s", text)
    assert blame(signs(state), me, "here") == (speaker, text)


def test_between_stages_is_a_place_too():
    assert "rank 1 (host1, pid 1) has been between stages of step 12 for 305 s;" in blame(signs("6 0 6"), 0, "")[1]


# What follows runs in processes of its own: this file, as a program.


def walk(kind, run):
    """Three ranks on their way through stages, to the end of it, with one fault of that kind."""
    free = threading.Event()  # never set: to wait for it is to stand still
    with run.stage("step", 12):
        if kind == "all move":
            end = time.monotonic() + 2 * HANG_S
            while not dist.any_of(time.monotonic() > end):
                with run.stage("gen"):
                    free.wait(HANG_S / 10 * dist.rank())
                    dist.barrier()
            return
        if kind == "deadlock":
            with run.stage("update_actor"):
                if dist.rank() == 1:
                    free.wait(2 * HANG_S)
                dist.barrier()
            return
        with run.stage("gen"):
            if kind == "stands still" and dist.rank() == 1:
                free.wait(2 * HANG_S)
            while kind == "takes long" and time.monotonic() - run.since < 2 * HANG_S:
                run.check()
                free.wait(HANG_S / 20)
            free.wait(HANG_S / 2)  # until the others know of the stage
            if (kind, dist.rank()) in (("is stopped", 1), ("stops the store", 0)):
                os.kill(os.getpid(), signal.SIGSTOP)
        with run.stage("update_actor"):
            dist.barrier()
        if kind == "loses the store" and dist.rank() == 0:
            print("ready", flush=True)
        if kind == "loses the store":
            sys.stdin.readline()


def main(kind, folder):
    if kind == "is judging":
        with Watch(folder, 300, 1800) as run:
            worker = Worker(Reward(timeout_s=60.0), [])
            os.killpg(os.getpgid(0), signal.SIGTERM)  # as torchrun does it: to the rank's process group
            assert run.stopping
            assert worker.ask(Question("accuracy", "7", "7")) == {"value": [1.0, "value", False]}
        return
    dist.start("cpu", 60)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError, match="dist.hang_s=60 is not below dist.timeout_s=60"):
        Watch(folder, 60, 60)
    assert signal.getsignal(signal.SIGTERM) == before
    with Watch(folder, HANG_S, 60) as run:
        walk(kind, run)
        began = time.monotonic()
    assert time.monotonic() - began < 10
    dist.leave()


class Ranks:
    """Three processes of this file, whose words are kept. A context manager, so that none outlives its test."""

    def __init__(self, kind, folder, port, count=3, **env):
        env |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        self.processes, self.said = [], [folder / f"stderr_{rank}" for rank in range(count)]
        for rank, path in enumerate(self.said):
            with open(path, "w") as file:
                self.processes.append(subprocess.Popen(
                    [sys.executable, __file__, kind, folder], env=os.environ | env | {"RANK": str(rank)}, stderr=file,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def words(self, rank):
        """Lines that the rank's watch wrote to its stderr; torch's own are left out."""
        lines = self.said[rank].read_text().splitlines()
        return [line for line in lines if line.startswith(("rank", "all ranks"))]

    def hear(self, rank):
        """The first of these, once it is there."""
        deadline = time.monotonic() + 60
        while not self.words(rank):
            assert time.monotonic() < deadline, self.said[rank].read_text()
            time.sleep(0.05)
        return self.words(rank)[0]

    def end(self):
        """Wait until all have ended well."""
        for process, said in zip(self.processes, self.said, strict=True):
            assert process.wait(60) == 0, said.read_text()


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_rank_that_stands_still_is_named_once_and_all_leave_their_stacks(tmp_path, port):
    with Ranks("stands still", tmp_path, port) as ranks:
        ranks.end()
        assert [len(ranks.words(rank)) for rank in range(3)] == [1, 0, 0]
        stuck = STUCK.format(1, ranks.processes[1].pid)
        assert re.fullmatch(f"{stuck}; ranks 0 and 2 wait for it; stacks are in .*", ranks.words(0)[0])
    stacks = [(tmp_path / f"hang_rank_{rank}.txt").read_text() for rank in range(3)]
    assert "in stage gen of step 12" in stacks[1] and "in walk" in stacks[1]
    assert all("in stage update_actor of step 12" in stacks[rank] and "in barrier" in stacks[rank] for rank in (0, 2))


def test_a_stopped_rank_is_named_as_such(tmp_path, port):
    with Ranks("is stopped", tmp_path, port) as ranks:
        text = ranks.hear(0)
        assert re.match(f"{STUCK.format(1, ranks.processes[1].pid)} and does not respond: it is stopped", text)
        ranks.processes[1].send_signal(signal.SIGCONT)
        ranks.end()


def test_where_the_store_does_not_answer_a_rank_says_that_it_hears_nobody(tmp_path, port):
    with Ranks("stops the store", tmp_path, port) as ranks:  # without torchrun, rank 0 has it
        for rank in (1, 2):
            text = ranks.hear(rank)
            assert "hears of no other rank" in text and text.startswith(f"rank {rank} ") and f"127.0.0.1:{port}" in text
        ranks.processes[0].send_signal(signal.SIGCONT)
        ranks.end()


@pytest.mark.parametrize("kind", ["all move", "takes long"])
def test_nobody_is_named_while_all_are_busy(kind, tmp_path, port):
    with Ranks(kind, tmp_path, port) as ranks:
        ranks.end()
        assert [ranks.words(rank) for rank in range(3)] == [[], [], []]
    assert not list(tmp_path.glob("hang_rank_*"))


def test_a_deadlock_of_all_is_told_with_the_lines_they_are_at(tmp_path, port):
    with Ranks("deadlock", tmp_path, port) as ranks:
        ranks.end()
        said = [words for rank in range(3) for words in ranks.words(rank)]
    assert len(said) == 1
    assert re.match(
        r"all ranks have been in stage update_actor of step 12 for [1-9] s: ranks 0 and 2 at dist.py:\d+ in barrier, "
        r"rank 1 at test_watch.py:\d+ in walk; stacks are in", said[0]
    )  # fmt: skip


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_ranks_end_well_without_their_store(how, tmp_path, port):
    host = subprocess.Popen([sys.executable, __file__, "store", str(port)], stdout=subprocess.PIPE, text=True)
    try:
        assert host.stdout.readline() == "ready\n"
        with Ranks("loses the store", tmp_path, port, TORCHELASTIC_USE_AGENT_STORE="True") as ranks:
            assert ranks.processes[0].stdout.readline() == "ready\n", ranks.said[0].read_text()
            host.send_signal(how)
            for process in ranks.processes:
                process.stdin.write("go on\n")
                process.stdin.flush()
            ranks.end()
            assert not any("Traceback" in said.read_text() for said in ranks.said)
    finally:
        host.kill()
        host.communicate()


def test_a_rank_told_to_stop_goes_on_judging(tmp_path, port):
    with Ranks("is judging", tmp_path, port, count=1) as ranks:
        ranks.end()


if __name__ == "__main__":
    if sys.argv[1] == "store":
        kept = td.TCPStore("127.0.0.1", int(sys.argv[2]), is_master=True, wait_for_workers=False)
        print("ready", flush=True)
        threading.Event().wait()
    main(sys.argv[1], Path(sys.argv[2]))
