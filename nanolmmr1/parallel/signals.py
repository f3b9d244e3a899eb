"""SIGTERM handling and hang detection.

SIGTERM, SIGUSR1 (Slurm can send it ahead of SIGTERM), SIGINT (Ctrl-C) and SIGHUP (closed terminal) only set a flag
while the run trains. The trainer polls it where a step can be abandoned, saves a checkpoint of the last complete step,
and exits. Before training there is nothing to save, and the signal ends the process at once; so does a second Ctrl-C.
torchrun forwards signals to its ranks and kills them 30 s later (--shutdown-timeout), so all of this must fit in there.

Hang detection: all ranks pass through the same stages and meet in collectives, so the rank that has passed through the
fewest is the one that the others wait for. Every rank publishes a heartbeat with its position through torchrun's store.
A rank that is blocked for `dist.hang_s` compares the heartbeats and prints rank, host and stage of the blocking one,
before `dist.timeout_s` ends all of them. torch's monitored_barrier names the rank alone, and ends the run to do so.

Next: ../rollout/vllm.py, vLLM in this process.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch.distributed as td

from nanolmmr1.errors import Preempted, SharedError
from nanolmmr1.parallel import dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
BEAT_S = 5.0  # between two heartbeats; a tenth of hang_s if that is less
MISSED_BEATS = 5  # heartbeats missed before a rank counts as stopped or gone
HOME = str(Path(__file__).resolve().parents[2])


@dataclass
class Heartbeat:
    """The state of a rank, published to the others."""

    process: str  # host and process id
    moves: int  # stages entered and left so far
    stage: str  # the innermost stage it is in; "" between stages
    step: int
    seconds: float  # since its last move
    place: str  # the line of this project that its main thread is executing
    named: bool  # it has just reported a hang
    silent: bool = False  # its heartbeats stopped


class Watch:
    """Stop signals of this process and, with several ranks, hang detection. A context manager.

    Created by the main thread, on all ranks together; restores the earlier signal handlers when closed.

    Args:
        run: folder of the run; a blocked rank writes its stack traces to hang_rank_N.txt in it.
        hang_s, timeout_s: `dist.hang_s` and `dist.timeout_s`.

    Attributes:
        stopping: number of the signal that asked this process to stop; 0: none.
        defer: whether a signal is left to the trainer. If not, it raises KeyboardInterrupt at once.

    Raises:
        SharedError: hang_s is not below timeout_s.
    """

    def __init__(self, run: str | Path, hang_s: float, timeout_s: float) -> None:
        if dist.size() > 1 and hang_s >= timeout_s:
            raise SharedError(
                f"dist.hang_s={hang_s:g} is not below dist.timeout_s={timeout_s:g}: the ranks would be ended before "
                "the one they wait for is named; lower dist.hang_s"
            )
        self.run, self.hang_s = Path(run), hang_s
        self.stopping = 0
        self.defer = True
        self.moves, self.step = 0, 0
        self.stages: list[str] = []
        self.since = self.busy = time.monotonic()  # last move; last sign that this rank does not wait for others
        self.dumped = self.named = -1  # value of `moves` when stacks were last dumped, and a hang last reported
        self.main, self.closed = threading.main_thread().ident, threading.Event()
        self.threads: list[threading.Thread] = []
        # nohup ignores SIGHUP, a shell's background jobs ignore SIGINT: keep that.
        handled = [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
        self.handlers = {number: signal.signal(number, self._on_signal) for number in handled}
        if dist.size() > 1:
            self._start_heartbeats()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stopping and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.stopping = number
        if not self.defer:
            raise KeyboardInterrupt(number)

    def should_stop(self) -> bool:
        """Whether this process was asked to stop. For work without collectives, as sampling; asking counts as progress.
        """
        self.busy = time.monotonic()
        return bool(self.stopping)

    def check(self) -> None:
        """Raise Preempted if this process was asked to stop; the trainer passes it on to the other ranks."""
        if self.should_stop():
            raise Preempted

    @contextlib.contextmanager
    def stage(self, name: str, step: int | None = None) -> Iterator[None]:
        """Mark the body of a `with` as a stage, perhaps inside another. step: the run's, from here on."""
        self.stages.append(name)
        self.heartbeat(step)
        try:
            yield
        finally:
            self.stages.pop()
            self.heartbeat()

    def heartbeat(self, step: int | None = None) -> None:
        """Count a move, at the same places on all ranks: a rank with fewer moves than the others is behind them."""
        self.step = self.step if step is None else step
        self.since = self.busy = time.monotonic()
        self.moves += 1

    def close(self) -> None:
        """Restore the signal handlers and stop the heartbeat threads."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.closed.set()
        for thread in self.threads:
            thread.join(1.0)  # no longer: if the store's host is gone, a call to the store never returns

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_heartbeats(self) -> None:
        self.rank, self.beat_s = dist.rank(), min(BEAT_S, self.hang_s / 10)
        # torchrun's own store: it still answers when a rank is stopped.
        self.store_address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=60)
        store = td.TCPStore(*self.store_address, is_master=False, wait_for_workers=False, timeout=timeout)
        token = dist.gather(uuid.uuid4().hex.encode())[0].decode()  # the store also outlives a restart of the ranks
        self.keys = [f"watch/{token}/{rank}" for rank in range(dist.size())]
        self.process = f"{socket.gethostname()}, pid {os.getpid()}"
        store.set(self.keys[self.rank], json.dumps([0, asdict(self._own_heartbeat())]))
        dist.barrier()  # from here on every key exists, and reading one does not block
        self.beats = [Heartbeat(**json.loads(text)[1]) for text in store.multi_get(self.keys)]
        self.received = [time.monotonic()] * dist.size()
        # Two threads: a store whose host is gone does not fail a call, it never answers.
        for work in (lambda: self._exchange(store), self._detect):
            self.threads.append(threading.Thread(target=work, daemon=True))
            self.threads[-1].start()

    def _innermost(self) -> str:
        stages = self.stages[-1:]  # a copy: the main thread may pop meanwhile
        return stages[0] if stages else ""

    def _own_heartbeat(self) -> Heartbeat:
        frame = sys._current_frames().get(self.main or 0)
        while frame and not is_ours(frame.f_code.co_filename):
            frame = frame.f_back
        place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}" if frame else "?"
        return Heartbeat(self.process, self.moves, self._innermost(), self.step, time.monotonic() - self.since, place,
                         self.named == self.moves)  # fmt: skip

    def _exchange(self, store: td.Store) -> None:
        """Publish this rank's heartbeat and read the others', until closed."""
        numbers = [0] * len(self.keys)
        # Heartbeats are numbered and timed by the receiver: clocks of hosts differ.
        try:
            while not self.closed.wait(self.beat_s):
                numbers[self.rank] += 1
                store.set(self.keys[self.rank], json.dumps([numbers[self.rank], asdict(self._own_heartbeat())]))
                for rank, text in enumerate(store.multi_get(self.keys)):
                    number, beat = json.loads(text)
                    if number != numbers[rank] or rank == self.rank:
                        numbers[rank], self.beats[rank] = number, Heartbeat(**beat)
                        self.received[rank] = time.monotonic()
        except RuntimeError:
            return  # torchrun is gone and will take the ranks with it; to the other ranks this one falls silent

    def _detect(self) -> None:
        """Once this rank has been blocked for hang_s: dump its stacks, and report the cause if that is its task."""
        while not self.closed.wait(self.beat_s):
            moves, now = self.moves, time.monotonic()
            if now - self.busy < self.hang_s or moves == self.named:
                continue
            limit = MISSED_BEATS * self.beat_s
            beats = [
                replace(beat, seconds=beat.seconds + now - received, silent=now - received > limit)
                for beat, received in zip(self.beats, self.received, strict=True)
            ]
            beats[self.rank] = self._own_heartbeat()
            reporter, text = blame(beats, self.rank, ":".join(map(str, self.store_address)))
            if moves != self.moves:
                continue  # it has just moved on
            if moves != self.dumped:
                self.dumped = moves
                with contextlib.suppress(OSError):  # a full disk must not prevent the report
                    self._dump(_position(beats[self.rank]))
            if reporter == self.rank and not any(beat.named for beat in beats):
                self.named = moves
                print(f"{text}; stacks are in {self.run}/hang_rank_*.txt", file=sys.stderr, flush=True)

    def _dump(self, position: str) -> None:
        with open(self.run / f"hang_rank_{self.rank}.txt", "a", encoding="utf-8") as file:
            print(time.strftime("%F %T"), position, file=file, flush=True)
            faulthandler.dump_traceback(file)


def is_ours(file: str) -> bool:
    """Whether a source file belongs to this project; a virtual environment may be inside its folder."""
    return file.startswith(HOME) and "site-packages" not in file


def blame(beats: list[Heartbeat], me: int, store: str) -> tuple[int, str]:
    """Find the blocking ranks: those whose heartbeats stopped, or else those with the fewest moves.

    Args:
        beats: one per rank. me: the rank that asks, after it was blocked for hang_s. store: its address.

    Returns:
        The rank that reports the hang, which is the lowest that does not cause it, and the message.
    """
    ranks = range(len(beats))
    silent = [rank for rank in ranks if beats[rank].silent]
    if len(silent) == len(beats) - 1 and len(silent) > 1:
        # More likely this rank is cut off. Nothing is known of the others, and they may be unable to report.
        return me, (
            f"rank {me} ({beats[me].process}) has been {_position(beats[me])} and hears of no other rank: they are "
            f"stopped, or there is no way to the store at {store}"
        )
    fewest = min(beat.moves for beat in beats)
    blocking = set(silent)
    if all(beats[rank].moves > fewest for rank in silent):
        blocking |= {rank for rank in ranks if beats[rank].moves == fewest}
    waiting = [rank for rank in ranks if rank not in blocking]
    reporter = min(waiting or set(ranks) - set(silent))
    if len(blocking) == len(beats) and not silent:
        at: dict[str, list[int]] = {}
        for rank in ranks:
            at.setdefault(beats[rank].place, []).append(rank)
        places = ", ".join(f"{_list(there)} at {place}" for place, there in at.items())
        return reporter, f"all ranks have been {_position(beats[reporter])}: {places}"
    text = "; ".join(
        f"rank {rank} ({beats[rank].process}) has been {_position(beats[rank])}"
        + (" and does not respond: it is stopped, or its host is gone" if beats[rank].silent else "")
        for rank in sorted(blocking)
    )
    if waiting:
        text += f"; {_list(waiting)} wait{'s' * (len(waiting) == 1)} for {'it' if len(blocking) == 1 else 'them'}"
    return reporter, text


def _position(beat: Heartbeat) -> str:
    stage = f"in stage {beat.stage}" if beat.stage else "between stages"
    return f"{stage} of step {beat.step} for {beat.seconds:.0f} s"


def _list(ranks: list[int]) -> str:
    *most, last = map(str, ranks)
    return f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"
