"""Stage times and resident memory."""

import contextlib
import resource
import sys
import time
from pathlib import Path


def peak_rss_mb():
    """Largest resident memory of this process so far, in 1e6 bytes. Child processes, as judging workers, not in it."""
    with contextlib.suppress(FileNotFoundError):  # Linux: what getrusage says there begins with what the parent held
        words = Path("/proc/self/status").read_text().split()
        return int(words[words.index("VmHWM:") + 1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6  # macOS counts bytes, Linux KiB


def rss_mb():
    """Resident memory of this process now, in 1e6 bytes; where /proc is missing, its peak."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except FileNotFoundError:
        return peak_rss_mb()
    return pages * resource.getpagesize() / 1e6


class StageTimer:
    """Seconds per named stage of a step. A stage entered again adds up; a stage inside another counts in both.

    Args:
        watch: told of every stage as well, so that a rank that stays in one can be named; or None.
        step: number of the step, for the watch.
    """

    def __init__(self, watch=None, step=0):
        self._seconds, self._watch, self._step = {}, watch, step

    @contextlib.contextmanager
    def stage(self, name):
        """Time the body of a `with`, also when it raises."""
        start = time.perf_counter()
        try:
            with self._watch.stage(name, self._step) if self._watch else contextlib.nullcontext():
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def seconds(self):
        """{"timing_s/<name>": seconds} since the last reset, in order of first use."""
        return {f"timing_s/{name}": seconds for name, seconds in self._seconds.items()}

    def reset(self):
        """Forget all stages: a step begins."""
        self._seconds = {}
