"""Output outlives its readers, and shows no control codes."""

import io
import os
import subprocess
import sys

import pytest

from nanolmmr1 import terminal
from nanolmmr1.report.display import Display
from nanolmmr1.terminal import printable

SAY = """
import sys
from nanolmmr1.terminal import protect
protect()
for n in range(20_000):
    print("line", n, "\\u6570\\u0142\\ud83d")
print("end", file=sys.stderr)
raise SystemExit(3)
"""


def say(redirect, **env):
    command = [sys.executable, "-c", SAY]
    return subprocess.run(["bash", "-c", f'"$@" {redirect}', "sh", *command], capture_output=True, timeout=60,
                          env=os.environ | env)


@pytest.mark.parametrize("redirect", [
    "| head -1; exit ${PIPESTATUS[0]}", ">/dev/full", ">&-", "2>&- >&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full",
    ">/dev/null",
])
def test_a_process_whose_output_has_no_reader_ends_as_it_would(redirect):
    run = say(redirect)
    assert run.returncode == 3 and run.stderr in (b"end\n", b"")


@pytest.mark.parametrize("env", [
    {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "utf-8"},
])
def test_a_terminal_of_few_letters_shows_the_others_escaped(env):
    run = say("", **env)
    assert run.returncode == 3 and run.stdout.splitlines()[-1].startswith(b"line 19999 ")


def test_a_stream_that_was_closed_in_python_is_replaced(monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    terminal.protect()
    print("to nobody")
    print("again")


def test_control_codes_are_shown_and_not_sent(capsys):
    text = "row \x1b[31mred\x07\r\x9b2J\u202egnp.\n\tnext 数"
    assert printable(text) == "row \\x1b[31mred\\x07\\x0d\\x9b2J\\u202egnp.\n\tnext 数".replace("\\x0d", "\\r")
    Display({"p": 1}).note(text)
    assert capsys.readouterr().out == printable(text) + "\n"
