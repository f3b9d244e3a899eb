"""What may befall a run from outside: it is told to stop, or one of its ranks keeps all the others waiting.

SIGTERM, SIGUSR1 (which Slurm can send ahead of it), SIGINT (Ctrl-C) and SIGHUP (a closed terminal) only raise a flag
once training has begun. The trainer asks for it where a step can be given up, writes the checkpoint of the last whole
step and ends. Before training there is nothing to save, and they end the process at once; so does a second Ctrl-C.
torchrun hands signals on to its ranks and kills them 30 s later (--shutdown-timeout), so all that must fit in there.

All ranks walk through the same stages and meet in collectives. So the one that has gone through fewest is the one that
the others wait for: every rank tells the rest, by way of the store of the process group, how far it is, and one that
has stood still for `dist.hang_s` looks around and says who is to blame, before `dist.timeout_s` ends them all.
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
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as td

from nanolmmr1.errors import Preempted, SharedError
from nanolmmr1.parallel import dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
BEAT_S = 5.0  # between two signs of life; a tenth of hang_s if that is less
MISSED = 5  # beats after which a rank is taken for stopped or gone
HOME = str(Path(__file__).resolve().parents[2])
STAGE_FILES = "NANOLMMR1_STAGE_FILES"  # set it, and every rank keeps its stage in <run>/.stage_rank_N, for tests


def status_of(number):
    """The exit status after a signal, as shells have it; SIGUSR1 is a SIGTERM that came early."""
    return 128 + (signal.SIGTERM if number == signal.SIGUSR1 else number)


@dataclass
class Sign:
    """A rank's sign of life."""

    who: str  # host and process
    moves: int  # stages entered and left so far
    stage: str  # the innermost that it is in; "" between two
    step: int
    seconds: float  # since its last move
    place: str  # the line of ours that its main thread is at
    named: bool  # it has just said who is to blame
    silent: bool = False  # it is not heard any more


class Watch:
    """Signals of this process and, with several ranks, an eye on the others. A context manager; ends with `close`.

    Args:
        run: folder of the run, where a rank that stands still leaves its stacks: hang_rank_N.txt.
        hang_s, timeout_s: `dist.hang_s` and `dist.timeout_s`.

    To be made by the main thread, by all ranks together. Restores the signals' earlier handlers when closed.

    Raises:
        SharedError: hang_s is not below timeout_s.
    """

    def __init__(self, run, hang_s, timeout_s):
        if dist.size() > 1 and hang_s >= timeout_s:
            raise SharedError(
                f"dist.hang_s={hang_s:g} is not below dist.timeout_s={timeout_s:g}: the ranks would be ended before "
                "the one they wait for is named; lower dist.hang_s"
            )
        self.run, self.hang_s = Path(run), hang_s
        self.stopping = 0  # the signal by which this process was told to stop
        self.begun = True  # whether a signal waits for the trainer; else it raises KeyboardInterrupt at once
        self.moves, self.stages, self.step = 0, [], 0
        self.since = self.busy = time.monotonic()  # the last move, and the last that shows it does not wait
        self.dumped = self.named = None  # the moves after which a hang was last written down, and told
        self.main, self.closed, self.threads = threading.main_thread().ident, threading.Event(), []
        # Under nohup SIGHUP is ignored, in a shell's background jobs SIGINT: so it stays.
        heard = [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
        self.handlers = {number: signal.signal(number, self._stop) for number in heard}
        if dist.size() > 1:
            self._start()

    def _stop(self, number, frame):
        if self.stopping and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.stopping = number
        if not self.begun:
            raise KeyboardInterrupt(number)

    def check(self):
        """For work without collectives, as sampling: give it up if this process was told to stop. It is no standstill.

        Raises:
            Preempted: on this rank; the others learn of it from the trainer.
        """
        self.busy = time.monotonic()
        if self.stopping:
            raise Preempted

    @contextlib.contextmanager
    def stage(self, name, step=None):
        """The body of a `with` is a stage, perhaps inside another; step: of the run, from here on."""
        self.stages.append(name)
        self._move(step)
        try:
            yield
        finally:
            self.stages.pop()
            self._move()

    def pack(self):
        """One of the many equal parts of a stage is done, on all ranks alike: no standstill, and finer blame."""
        self._move()

    def _move(self, step=None):
        self.step = self.step if step is None else step
        self.since = self.busy = time.monotonic()
        self.moves += 1
        if STAGE_FILES in os.environ:
            path = self.run / f".stage_rank_{dist.rank()}"
            record = {"pid": os.getpid(), "moves": self.moves, "stage": self._innermost(), "step": self.step}
            path.with_suffix(".tmp").write_text(json.dumps(record))
            os.replace(path.with_suffix(".tmp"), path)

    def close(self):
        """Give the signals back, and look at nobody any more."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.closed.set()
        for thread in self.threads:
            thread.join(1.0)  # no longer: its store may have gone, and a call to it never returns then

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _start(self):
        self.rank, self.beat_s = dist.rank(), min(BEAT_S, self.hang_s / 10)
        # Under torchrun the store lives with torchrun itself: it stays when a rank is stopped.
        self.where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = td.TCPStore(*self.where, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
        token = dist.gather(uuid.uuid4().hex.encode())[0].decode()  # the store also outlives a restart
        self.keys = [f"watch/{token}/{rank}" for rank in range(dist.size())]
        self.who = f"{socket.gethostname()}, pid {os.getpid()}"
        store.set(self.keys[self.rank], json.dumps([0, asdict(self._sign())]))
        dist.barrier()  # now every key is there, and reading waits for none
        self.signs = [Sign(**json.loads(text)[1]) for text in store.multi_get(self.keys)]
        self.heard = [time.monotonic()] * dist.size()
        # Two threads, for a store that has lost its host answers a call never, and not with an error.
        for work in (lambda: self._exchange(store), self._look):
            self.threads.append(threading.Thread(target=work, daemon=True))
            self.threads[-1].start()

    def _innermost(self):
        stages = self.stages[-1:]  # a copy, as the main thread goes on
        return stages[0] if stages else ""

    def _sign(self):
        frame = sys._current_frames().get(self.main)
        while frame and not is_ours(frame.f_code.co_filename):
            frame = frame.f_back
        place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}" if frame else "?"
        return Sign(self.who, self.moves, self._innermost(), self.step, time.monotonic() - self.since, place,
                    self.named == self.moves)

    def _exchange(self, store):
        """Tell the others of this rank, and hear of them, again and again."""
        beats = [0] * len(self.keys)
        # Signs are numbered and timed by who hears them: hosts' clocks differ.
        try:
            while not self.closed.wait(self.beat_s):
                beats[self.rank] += 1
                store.set(self.keys[self.rank], json.dumps([beats[self.rank], asdict(self._sign())]))
                for rank, text in enumerate(store.multi_get(self.keys)):
                    beat, sign = json.loads(text)
                    if beat != beats[rank] or rank == self.rank:
                        beats[rank], self.signs[rank], self.heard[rank] = beat, Sign(**sign), time.monotonic()
        except RuntimeError:
            return  # torchrun is gone, and the ranks follow it: to the others of them, this one falls silent

    def _look(self):
        """Once this rank has stood still for hang_s: leave its stacks, and name who is to blame if that falls to it."""
        while not self.closed.wait(self.beat_s):
            moves, now = self.moves, time.monotonic()
            if now - self.busy < self.hang_s or moves == self.named:
                continue
            late = MISSED * self.beat_s
            signs = [
                replace(sign, seconds=sign.seconds + now - heard, silent=now - heard > late)
                for sign, heard in zip(self.signs, self.heard, strict=True)
            ]
            signs[self.rank] = self._sign()
            speaker, text = blame(signs, self.rank, ":".join(map(str, self.where)))
            if moves != self.moves:
                continue  # it has just gone on
            if moves != self.dumped:
                self.dumped = moves
                with contextlib.suppress(OSError):  # a full disk hides no name
                    self._dump(_where(signs[self.rank]))
            if speaker == self.rank and not any(sign.named for sign in signs):
                self.named = moves
                print(f"{text}; stacks are in {self.run}/hang_rank_*.txt", file=sys.stderr, flush=True)

    def _dump(self, where):
        with open(self.run / f"hang_rank_{self.rank}.txt", "a", encoding="utf-8") as file:
            print(time.strftime("%F %T"), where, file=file, flush=True)
            faulthandler.dump_traceback(file)


def is_ours(file):
    """Whether a source file is this project's; an environment may lie in its folder too."""
    return file.startswith(HOME) and "site-packages" not in file


def blame(signs, me, store):
    """Who keeps the ranks waiting: those that are not heard any more, and those that have gone through fewest stages.

    Args:
        signs: [Sign], by rank; me: the rank that asks, after it has stood still for long; store: its address.

    Returns:
        (speaker, text): the rank that is to say so, the lowest that is not to blame, and what it says.
    """
    ranks = range(len(signs))
    silent = [rank for rank in ranks if signs[rank].silent]
    if len(silent) == len(signs) - 1 and len(silent) > 1:
        # More likely it is cut off itself. Nothing is known of the others, who may be unable to speak.
        return me, (
            f"rank {me} ({signs[me].who}) has been {_where(signs[me])} and hears of no other rank: they are stopped, "
            f"or there is no way to the store at {store}"
        )
    fewest = min(sign.moves for sign in signs)
    guilty = set(silent)
    if all(signs[rank].moves > fewest for rank in silent):
        guilty |= {rank for rank in ranks if signs[rank].moves == fewest}
    others = [rank for rank in ranks if rank not in guilty]
    speaker = min(others or set(ranks) - set(silent))
    if len(guilty) == len(signs) and not silent:
        at = {}
        for rank in ranks:
            at.setdefault(signs[rank].place, []).append(rank)
        places = ", ".join(f"{_ranks(there)} at {place}" for place, there in at.items())
        return speaker, f"all ranks have been {_where(signs[speaker])}: {places}"
    text = "; ".join(
        f"rank {rank} ({signs[rank].who}) has been {_where(signs[rank])}"
        + (" and does not respond: it is stopped, or its host is gone" if signs[rank].silent else "")
        for rank in sorted(guilty)
    )
    if others:
        text += f"; {_ranks(others)} wait{'s' * (len(others) == 1)} for {'it' if len(guilty) == 1 else 'them'}"
    return speaker, text


def _where(sign):
    stage = f"in stage {sign.stage}" if sign.stage else "between stages"
    return f"{stage} of step {sign.step} for {sign.seconds:.0f} s"


def _ranks(ranks):
    *most, last = map(str, ranks)
    return f"ranks {', '.join(most)} and {last}" if most else f"rank {last}"
