"""train.py, with every rank's stage in <run>/.stage_rank_N: tests that kill a rank choose the moment by it."""

import json
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def record_stages():
    """Make Watch.heartbeat write the stage too. Returns a function that undoes this."""
    from nanolmmr1.parallel import dist
    from nanolmmr1.parallel.signals import Watch

    heartbeat = Watch.heartbeat

    def recorded(self, step=None):
        heartbeat(self, step)
        path = self.run / f".stage_rank_{dist.rank()}"
        stage = self.stages[-1] if self.stages else ""
        record = {"pid": os.getpid(), "moves": self.moves, "stage": stage, "step": self.step}
        path.with_suffix(".tmp").write_text(json.dumps(record))
        os.replace(path.with_suffix(".tmp"), path)

    Watch.heartbeat = recorded
    return lambda: setattr(Watch, "heartbeat", heartbeat)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    record_stages()
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
