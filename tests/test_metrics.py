"""The logs survive kills and cuts; the display says the same on a terminal and in a file."""

import base64
import io
import json
import math
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from nanolmmr1.errors import UserError
from nanolmmr1.files import write_atomically
from nanolmmr1.report.display import Display, accuracy_rows, print_accuracy
from nanolmmr1.report.logs import MetricsLog, SampleLog, read_lines
from nanolmmr1.report.usage import StageTimer, peak_rss_mb

ROOT = Path(__file__).resolve().parents[1]
RECORD = {"reward/overall": 0.7123, "reward/accuracy": 0.625, "response_length/mean": 143.4, "actor/kl_loss": 0.0031,
          "actor/entropy": 0.4127, "perf/throughput": 12345.6}
ACCURACY = {"start": {"text": 0.31, "digits": 0.2}, "text": {"text": 0.5, "new": 0.9},
            "images": {"text": 0.55, "digits": 0.125}}


def sample(step, **own):
    responses = [{"text": "<think>x</think>", "reward": 1.0, "advantage": 0.5, "parts": {"accuracy": 1.0}}]
    return {"phase": "text", "step": step, "problem": "1+1?", "answer": "2", "images": [], "responses": responses} | own


def test_a_stage_entered_twice_adds_up_and_one_inside_another_counts_in_both():
    timer = StageTimer()
    with timer.stage("step"):
        with timer.stage("gen"):
            pass
        once = timer.seconds()["timing_s/gen"]
        with timer.stage("gen"):
            pass
    twice = timer.seconds()
    assert list(twice) == ["timing_s/gen", "timing_s/step"]
    assert 0 < once < twice["timing_s/gen"] < twice["timing_s/step"]


def test_a_stage_that_raises_is_timed():
    timer = StageTimer()
    with pytest.raises(KeyError), timer.stage("gen"):
        raise KeyError
    assert timer.seconds()["timing_s/gen"] > 0


def test_a_record_is_on_disk_as_one_line_when_write_returns(tmp_path):
    log = MetricsLog(tmp_path / "run")
    log.write({"phase": "text", "step": 1, "reward/overall": 0.5})
    log.write({"phase": "text", "step": 2, "reward/overall": 0.25})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["reward/overall"] for line in lines] == [0.5, 0.25]


def test_numbers_that_json_lacks_become_null_and_are_named(tmp_path):
    log = MetricsLog(tmp_path)
    record = {"step": 1, "a": math.nan, "b": -math.inf, "c": 1.0}
    log.write(record)
    log.write({"step": 2, "a": 0.0})
    assert read_lines(log.path) == [{"step": 1, "a": None, "b": None, "c": 1.0, "nonfinite": ["a", "b"]},
                                    {"step": 2, "a": 0.0}]
    assert math.isnan(record["a"])


def test_a_torn_last_line_is_dropped_at_open_and_ignored_by_a_reader(tmp_path):
    MetricsLog(tmp_path).write({"step": 1})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 2, "rew')
    assert read_lines(path) == [{"step": 1}]
    log = MetricsLog(tmp_path)
    assert path.read_bytes() == b'{"step": 1}\n'
    log.write({"step": 2})
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"st')
    MetricsLog(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize(("keep", "left"), [(0, []), (2, [1, 2]), (3, [1, 2, 3]), (9, [1, 2, 3])])
def test_truncate_keeps_the_first_records_and_writing_goes_on_after_them(tmp_path, keep, left):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write({"step": step})
    log.truncate(keep)
    log.write({"step": 7})
    assert [record["step"] for record in read_lines(log.path)] == [*left, 7]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


GARBAGE = [b"{oops}", b"[1]", b'{"a": 1}', b'{"step": "x"}', b"\xff\xfe\x00", b"[" * 100_000, b"null", b""]


@pytest.mark.parametrize("line", GARBAGE, ids=lambda line: repr(line[:12]))
@pytest.mark.parametrize("kind", [MetricsLog, SampleLog])
def test_a_spoilt_line_of_a_log_is_kept_aside_and_told_and_the_others_stay(tmp_path, kind, line):
    path, notes = tmp_path / kind.name, []
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    log = kind(tmp_path, notes.append)
    assert [record["step"] for record in read_lines(path)] == [1, 2]
    assert path.with_suffix(".unreadable").read_bytes() == line + b"\n"
    assert len(notes) == 1 and "1 lines are no records" in notes[0]
    log.truncate(1)
    assert [record["step"] for record in read_lines(path)] == [1] and len(notes) == 1


def test_something_else_of_a_logs_name_is_set_aside(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "metrics.jsonl" / "mine").write_text("kept")
    notes = []
    MetricsLog(tmp_path, notes.append).write({"step": 1})
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}]
    (aside,) = tmp_path.glob("metrics.aside*")
    assert (aside / "mine").read_text() == "kept" and aside.name in notes[0]


def test_lines_that_the_disk_does_not_take_are_written_with_the_next_one(tmp_path):
    notes, room = [], tmp_path / "room"
    log = MetricsLog(tmp_path, notes.append)
    log.write({"step": 1})
    before = log.path.rename(room)
    log.path.mkdir()  # as good as a full disk: it cannot be opened for writing
    log.write({"step": 2})
    log.write({"step": 3})
    assert len(notes) == 1 and "cannot be written" in notes[0]
    log.path.rmdir()
    before.rename(log.path)
    with open(log.path, "ab") as file:
        file.write(b'{"st')  # the part of a line that the disk had room for
    log.write({"step": 4})
    assert [record["step"] for record in read_lines(log.path)] == [1, 2, 3, 4] and len(notes) == 1


def test_a_log_that_was_deleted_amid_the_run_is_begun_anew(tmp_path):
    log = MetricsLog(tmp_path)
    log.write({"step": 1})
    log.path.unlink()
    log.write({"step": 2})
    assert log.path.read_bytes() == b'{"step": 2}\n'


def test_a_failed_atomic_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize(("line", "fault"), [("{oops}", "is not JSON"), ("[1]", "holds list")])
def test_a_spoilt_complete_line_is_named_by_file_and_number(tmp_path, line, fault):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(UserError, match=rf"metrics\.jsonl:2 {fault}"):
        read_lines(path)


def test_there_are_no_records_in_a_file_that_is_not_there(tmp_path):
    assert read_lines(tmp_path / "none.jsonl") == []


def test_pictures_are_kept_as_small_pngs_and_small_ones_as_they_are(tmp_path):
    log = SampleLog(tmp_path)
    log.write(sample(1, images=[Image.new("RGB", (400, 200), "red"), Image.new("L", (28, 14), 7)]))
    large, small = (Image.open(io.BytesIO(base64.b64decode(image))) for image in read_lines(log.path)[0]["images"])
    assert (large.format, large.size, large.getpixel((80, 40))) == ("PNG", (160, 80), (255, 0, 0))
    assert (small.size, small.getpixel((0, 0))) == ((28, 14), (7, 7, 7))


def test_any_text_of_data_or_model_comes_back_as_it_was(tmp_path):
    problem = "lone \ud83d, line\u2028break\r\n\x00, 数"
    log = SampleLog(tmp_path)
    log.write(sample(1, problem=problem))
    log.write(sample(2))
    assert [record["problem"] for record in read_lines(log.path)] == [problem, "1+1?"]


def test_samples_are_cut_by_step(tmp_path):
    log = SampleLog(tmp_path)
    for step in (1, 1, 5, 10):
        log.write(sample(step))
    before = log.path.read_bytes()
    log.truncate(10)
    assert log.path.read_bytes() == before
    log.truncate(4)
    assert [record["step"] for record in read_lines(log.path)] == [1, 1]


def test_the_peak_memory_is_what_the_kernel_says():
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc on this system")
    kib = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    assert peak_rss_mb() == pytest.approx(kib * 1024 / 1e6, rel=0.01)


def run_phase(display, name, steps, done=0):
    display.start_phase(name, done)
    for _ in range(steps - done):
        display.step(RECORD)


def test_without_a_terminal_a_phase_is_about_ten_plain_lines(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Display({"text": 25, "images": 3}) as display:
        run_phase(display, "text", 25)
        display.note("checkpoint [red] written")
        run_phase(display, "images", 3)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert re.findall(r"^text +(\d+)/25 ", out, re.M) == ["1", *map(str, range(2, 25, 2)), "25"]
    assert re.findall(r"^images +(\d)/3 ", out, re.M) == ["1", "2", "3"]
    assert "checkpoint [red] written\n" in out
    assert ("reward 0.712  acc 0.625  length 143  KL 0.0031  entropy 0.413  tok/s 12346  elapsed 0:00:00  left 0:00:00"
            in out)


def test_a_figure_that_is_missing_is_a_dash(capsys):
    display = Display({"text": 1})
    display.start_phase("text")
    display.step({"reward/overall": 0.5, "actor/kl_loss": None})
    assert "reward 0.500  acc -  length -  KL -  entropy -" in capsys.readouterr().out


def test_the_time_left_follows_the_pace_since_the_resume(capsys):
    display = Display({"text": 100})
    display.start_phase("text", done=97)
    display.began = time.monotonic() - 60
    display.step(RECORD)
    line = capsys.readouterr().out
    assert line.startswith("text   98/100  ")
    assert line.endswith("elapsed 0:01:00  left 0:02:00\n")


def test_other_long_work_says_when_it_begins_and_ends(capsys):
    with Display({}).busy("evaluating", 30) as advance:
        advance(0)
        advance(20)
        advance()
    assert capsys.readouterr().out == "evaluating: 0/30\nevaluating: 21/30 in 0:00:00\n"


def test_a_quiet_display_shows_nothing(capsys):
    with Display({"text": 2}, quiet=True) as display:
        run_phase(display, "text", 2)
        display.note("hello")
        with display.busy("evaluating", 3) as advance:
            advance(3)
    assert capsys.readouterr() == ("", "")


def on_a_terminal(script):
    """Output of a script on a terminal of 120 columns."""
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40", "PYTHONPATH": str(ROOT)}
    script = f"from nanolmmr1.report.display import Display, print_accuracy\n{script}"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # how Linux reports that the other end was closed
        pass
    os.close(ours)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


def test_a_quiet_display_shows_nothing_on_a_terminal_either():
    assert on_a_terminal("""
with Display({"text": 1}, quiet=True) as display:
    display.start_phase("text")
    display.step({})
""") == ""


def test_on_a_terminal_there_is_a_bar_a_phase_with_its_figures():
    shown = on_a_terminal(f"""
with Display({{"text": 4, "captions": 4, "[images]": 4}}) as display:
    display.start_phase("captions", 2)
    with display.busy("evaluating", 9) as advance:
        advance(0)
        advance(3)
        display.bars.refresh()
    display.note("note [b]")
    display.step({RECORD})
print_accuracy({ACCURACY})
""")
    assert "\x1b[" in shown
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "\n").split("\n")
    assert any(re.match(r"captions .* 2/4 ", line) for line in lines)
    assert any(re.match(r"evaluating .* 3/9 ", line) for line in lines)
    assert "note [b]" in lines and any(line.startswith("evaluating: 3/9 in ") for line in lines)
    last = lines[max(i for i, line in enumerate(lines) if line.startswith("text ")) :]
    bars = [line for line in last if "━" in line]
    assert [line.split()[0] for line in bars] == ["text", "captions", "[images]"]
    assert [re.search(r"\d/4", line)[0] for line in bars] == ["4/4", "3/4", "0/4"]
    figures = r"reward=0\.712 acc=0\.625 length=143 KL=0\.0031 entropy=0\.413 tok/s=12346"
    assert re.search(figures + r" 0:00:\d\d 0:00:\d\d", bars[1])
    assert "=" not in bars[2] and "-:--:--" in bars[2]
    assert any(line.split() == ["images", "55.0", "12.5", "-"] for line in last)


def test_accuracy_rows_are_percent_and_the_change_is_last_minus_first():
    tasks, rows, change = accuracy_rows(ACCURACY)
    assert tasks == ["text", "digits", "new"]
    assert rows == [("start", [31.0, 20.0, None]), ("text", [50.0, None, 90.0]),
                    ("images", [pytest.approx(55), 12.5, None])]
    assert change == [pytest.approx(24), -7.5, None]
    assert accuracy_rows({"start": {"text": 0.5}}) == (["text"], [("start", [50.0])], None)
    assert accuracy_rows({}) == ([], [], None)


def test_the_accuracy_table_is_plain_text_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_accuracy(ACCURACY | {"[x]": {"text": 0.0}})
    out = capsys.readouterr().out
    assert "\x1b" not in out
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines() if "0" in line or "accuracy" in line]
    assert rows == [["accuracy, %", "text", "digits", "new"], ["start", "31.0", "20.0", "-"],
                    ["text", "50.0", "-", "90.0"], ["images", "55.0", "12.5", "-"], ["[x]", "0.0", "-", "-"],
                    ["change, points", "-31.0", "-", "-"]]


def test_a_process_peak_is_its_own_and_not_its_parents():
    code = "from nanolmmr1.report.usage import peak_rss_mb; print(peak_rss_mb())"
    heavy = bytearray(b"x" * 600_000_000)
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert len(heavy) == 600_000_000 and 10 < float(said) < 500 < peak_rss_mb()
