"""A quarter of the 300 mishaps of tests/mishaps.py; `python tests/mishaps.py` runs all of them."""

import subprocess
import sys
from pathlib import Path

from mishaps import ALL, QUICK


def test_a_quarter_of_the_mishaps_end_as_they_should(shared):
    assert len(ALL) > 300 and len(QUICK) > 70 and len({(m.kind, m.name) for m in ALL}) == len(ALL)
    command = [sys.executable, Path(__file__).with_name("mishaps.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
