"""Stage times and resident memory.

Next: logs.py, metrics.jsonl and samples.jsonl.
"""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from nanolmmr1.parallel.signals import Watch


def peak_rss_mb() -> float:
    """Peak resident memory of this process in 1e6 bytes, without child processes (reward workers)."""
    # On Linux getrusage would start from the parent's memory at the fork.
    with contextlib.suppress(FileNotFoundError):
        words = Path("/proc/self/status").read_text().split()
        return int(words[words.index("VmHWM:") + 1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6  # macOS counts bytes, Linux KiB


def rss_mb() -> float:
    """Resident memory of this process now, in 1e6 bytes; without /proc its peak."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except FileNotFoundError:
        return peak_rss_mb()
    return pages * resource.getpagesize() / 1e6


class StageTimer:
    """Seconds per named stage of a step. A stage entered again adds up; a nested stage counts in both.

    Args:
        watch: hang detection, which follows the stages to name the stage of a blocked rank; or None.
        step: number of the step, for the watch.
    """

    def __init__(self, watch: Watch | None = None, step: int = 0) -> None:
        self._seconds: dict[str, float] = {}
        self._watch, self._step = watch, step

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body of a `with`, also if it raises."""
        start = time.perf_counter()
        try:
            with self._watch.stage(name, self._step) if self._watch else contextlib.nullcontext():
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """{"timing_s/<name>": seconds}, in the order in which the stages ended."""
        return {f"timing_s/{name}": seconds for name, seconds in self._seconds.items()}
