"""Judging processes run this package and what is installed, nothing else, and a hostile answer holds none of them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from judge_cost import N, hostile, ordinary

from nanolmmr1.errors import UserError
from nanolmmr1.reward import judge as judge_file
from nanolmmr1.reward import rules
from nanolmmr1.reward.answer_size import too_large
from nanolmmr1.reward.extract import final_answer
from nanolmmr1.reward.judge import Judge, environment, libraries
from nanolmmr1.schema import Reward

ROOT = Path(__file__).resolve().parents[1]
ASK = """
import json, sys
from nanolmmr1.reward.judge import Judge
from nanolmmr1.schema import Reward
if __name__ == "__main__":
    with Judge(Reward(workers=1, **json.loads(sys.argv[1]))) as judge:
        row = {"answer": "x+1", "problem": "?", "id": "r"}
        print(json.dumps(judge.score([("<answer>1+x</answer>", row), ("<answer>y+2</answer>", row)])))
"""
# Whatever of these is imported leaves a mark, and would change the verdict or end the process.
IMPOSTORS = ["math_verify.py", "numbers.py", "json.py", "sympy/__init__.py", "gmpy2.py", "sitecustomize.py", "yaml.py",
             "usercustomize.py", "nanolmmr1/__init__.py", "logging.py", "flint.py"]  # fmt: skip


@pytest.fixture
def trap(tmp_path):
    """A folder of impostors, and the file that appears when one is imported."""
    mark = tmp_path / "imported"
    for name in IMPOSTORS:
        path = tmp_path / "trap" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"open({str(mark)!r}, 'a').write(__file__)\nraise SystemExit(9)\n")
    (tmp_path / "ask.py").write_text(f"import sys\nsys.path[0] = {str(ROOT)!r}\n" + ASK)
    return tmp_path / "trap", mark


def ask(tmp_path, cwd, options="{}", **env):
    command = [sys.executable, tmp_path / "ask.py", options]
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_of_the_current_folder_is_run(tmp_path, trap):
    folder, mark = trap
    assert '"accuracy": 1.0' in ask(tmp_path, folder) and not mark.exists()


@pytest.mark.parametrize("path", ["", os.pathsep, ".", "../trap", "{}"])
def test_nor_by_way_of_an_import_path_of_judges_alone(tmp_path, trap, path):
    """PYTHONPATH is the trainer's. What of it is not the current folder comes after all that is installed."""
    folder, mark = trap
    shutil.rmtree(folder / "nanolmmr1")
    for name in ("json.py", "numbers.py", "logging.py", "yaml.py", "sitecustomize.py", "usercustomize.py"):
        (folder / name).unlink()  # these would end the trainer itself
    assert '"accuracy": 1.0' in ask(tmp_path, folder, PYTHONPATH=path.format(folder)) and not mark.exists()


def test_nor_of_the_checkouts_root(tmp_path, trap, monkeypatch):
    folder, mark = trap
    for name in ("nanolmmr1", "kernels"):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    keep = {"math_verify.py", "gmpy2.py", "flint.py"}  # which the trainer itself does not import
    for name in set(IMPOSTORS) - keep - {"nanolmmr1/__init__.py"}:
        (folder / name).unlink()
    script = (tmp_path / "ask.py").read_text().replace(str(ROOT), str(folder))
    (tmp_path / "ask.py").write_text(script)
    assert '"accuracy": 1.0' in ask(tmp_path, tmp_path) and not mark.exists()


def test_libraries_of_the_trainers_path_come_along_and_the_current_folder_does_not(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", ".", str(tmp_path), str(ROOT), "relative", "/opt/libraries"])
    assert libraries() == ["/opt/libraries"]


def write(folder, name, code):
    (folder / name).write_text(code)
    return folder / name


def test_a_reward_function_may_import_what_lies_beside_it_and_hides_nothing(tmp_path):
    write(tmp_path, "helper.py", "VALUE = 0.25\n")
    write(tmp_path, "sympy.py", "raise SystemExit(9)\n")
    code = "import helper, sympy\ndef f(response, row): return helper.VALUE * (sympy.S(1) == 1)\n"
    path = write(tmp_path, "own.py", code)
    with Judge(Reward(workers=1, functions={f"{path}:f": 1.0})) as judge:
        assert judge.score([("x", {"answer": "7"})])[0]["f"] == 0.25


SECRETS = {"HF_TOKEN": "s3cret", "OPENAI_API_KEY": "s3cret", "AWS_SECRET_ACCESS_KEY": "s3cret", "WANDB_KEY": "s3cret",
           "https_proxy": "http://u:s3cret@p", "PYTHONPATH": "/s3cret", "PYTHONSTARTUP": "/s3cret", "MY_OWN": "s3cret",
           "GITHUB_TOKEN": "s3cret", "BASH_ENV": "/s3cret", "LD_PRELOAD": ""}  # fmt: skip


def test_judges_see_no_secrets_but_those_that_the_recipe_names(tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LC_MESSAGES", "C")
    found = environment()
    assert not set(SECRETS) & set(found) and found["PATH"] == os.environ["PATH"] and found["LC_MESSAGES"] == "C"
    assert environment(["HF_TOKEN"])["HF_TOKEN"] == "s3cret"
    path = write(tmp_path, "own.py", "import os\ndef f(response, row):\n"
                 "    return {'overall': 0, 'all': 's3cret' in str(os.environ), 'own': 'MY_OWN' in os.environ}\n")
    for env, seen in (([], 0.0), (["MY_OWN"], 1.0)):
        with Judge(Reward(workers=1, functions={f"{path}:f": 1.0}, env=env)) as judge:
            result, = judge.score([("x", {"answer": "7"})])
        assert (result["f/all"], result["f/own"]) == (seen, seen)


def test_a_part_named_accuracy_of_a_user_function_replaces_the_rules(tmp_path):
    path = tmp_path / "f.py"
    path.write_text("def f(response, row): return {'overall': 0.25, 'accuracy': float('7' in response)}")
    with Judge(Reward(workers=1, functions={f"{path}:f": 1.0}, accuracy_weight=2.0, format_weight=0.0)) as judge:
        right, wrong = judge.score([("<answer>17</answer>", {"answer": "8"}), ("<answer>8</answer>", {"answer": "8"})])
    assert (right["accuracy"], right["overall"], right["reason/function"]) == (1.0, 2.25, 1.0)
    assert (wrong["accuracy"], wrong["overall"], "reason/value" in wrong) == (0.0, 0.25, False)


def test_a_variable_that_is_not_set_is_refused_at_the_start():
    with pytest.raises(UserError, match="reward.env: the environment has no variable NOT_SET_HERE"):
        Judge(Reward(env=["NOT_SET_HERE"]))


@pytest.mark.parametrize("wanted, ranks, count", [(3, 1, 3), (0, 1, None), (0, 64, 1)])
def test_processes_are_as_many_as_cores_of_a_rank(monkeypatch, wanted, ranks, count):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert Judge(Reward(workers=wanted)).workers.count == (count or min(16, len(os.sched_getaffinity(0))))


def test_a_busy_machine_changes_no_verdict(monkeypatch):
    """A judgement that is stopped for longer than its limit, but does not compute, goes on."""
    with Judge(Reward(workers=1, verify_s=0.3)) as judge:
        judge.score([("<answer>x+1</answer>", {"answer": "1+y"})])
        child, = judge.workers.idle[0].child
        os.kill(child, signal.SIGSTOP)
        subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {child}"])
        began = time.monotonic()
        result, = judge.score([("<answer>x+2</answer>", {"answer": "2+x"})])
        assert time.monotonic() - began > 0.8 and (result["accuracy"], result["timeout"]) == (1.0, 0)


def test_a_child_that_stands_still_is_killed_by_the_clock(monkeypatch):
    monkeypatch.setattr(judge_file, "WALL", 1)
    with Judge(Reward(workers=1)) as judge:
        judge.score([("<answer>x+1</answer>", {"answer": "1+y"})])
        child, = judge.workers.idle[0].child
        os.kill(child, signal.SIGSTOP)
        assert judge.score([("<answer>x+2</answer>", {"answer": "2+x"})])[0]["timeout"] == 1
        assert judge.score([("<answer>x+3</answer>", {"answer": "3+x"})])[0]["accuracy"] == 1.0
        assert judge.workers.idle[0].child != [child]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_signals_of_a_terminal_do_not_reach_judges(tmp_path, number):
    with Judge(Reward(workers=1)) as judge:
        judge.score([("<answer>x+1</answer>", {"answer": "1+y"})])
        groups = {os.getpgid(pid) for pid in (judge.workers.idle[0].process.pid, judge.workers.idle[0].child[0])}
        assert os.getpgid(0) not in groups and len(groups) == 2


TRAINER = (  # prints the ids of its worker process and of that one's child, then waits
    "import sys\nfrom nanolmmr1.reward.judge import Judge\nfrom nanolmmr1.schema import Reward\n"
    "judge = Judge(Reward(workers=1))\njudge.score([('<answer>x+1</answer>', {'answer': '1+y'})])\n"
    "worker = judge.workers.idle[0]\n"
    "print(worker.process.pid, worker.child[0], flush=True)\nsys.stdin.read()\n"
)


def test_closing_ends_both_processes_and_a_killed_trainer_leaves_none(tmp_path):
    judge = Judge(Reward(workers=2))
    judge.score([(f"<answer>x+{n}</answer>", {"answer": "1+y"}) for n in range(4)])
    workers = judge.workers.idle
    handles = [os.pidfd_open(pid) for worker in workers for pid in (worker.process.pid, worker.child[0])]
    judge.close()
    for handle in handles:
        signal_gone(handle)
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER], cwd=ROOT, stdin=-1, stdout=-1, text=True)
    with trainer:
        handles = [os.pidfd_open(int(pid)) for pid in trainer.stdout.readline().split()]
        trainer.kill()
    for handle in handles:
        signal_gone(handle)


def test_a_child_that_is_killed_when_the_trainer_is_gone_is_not_replaced_for_ever():
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER], cwd=ROOT, stdin=-1, stdout=-1, text=True)
    with trainer:
        process, child = map(int, trainer.stdout.readline().split())
        handles = [os.pidfd_open(process), os.pidfd_open(child)]
        os.kill(child, signal.SIGSTOP)  # so that it does not see its input end
        trainer.kill()
    os.kill(child, signal.SIGKILL)  # as the limit of CPU time does
    for handle in handles:
        signal_gone(handle)


def signal_gone(handle):
    """Wait until the process has ended."""
    import select

    assert select.select([handle], [], [], 10)[0]
    os.close(handle)


FINE = [
    "2^{2023}", "10^{100}", "100!", "2010!", r"\binom{100}{50}", r"\sum_{k=1}^{100} k", "2^{2^{10}}", "x^{2024}", "n!",
    r"2^{\frac{2023}{2024}}", r"\left(\frac{1+\sqrt5}{2}\right)^{20}", "6.02e23", "5!!", r"1.5\times10^{-19}",
    "3^{3^3}",
    r"0.\overline{142857}", r"\sqrt{2+\sqrt{2+\sqrt{2}}}", r"e^{i\pi}", r"(-\infty,2)\cup(3,\infty)", "(x+1)^{10}",
    r"\begin{pmatrix}1&2&3\\4&5&6\\7&8&9\end{pmatrix}", r"\frac{(2n)!}{n!(n+1)!}", "a^b^c", "", "^", "!", "}{", "((",
    "^^2", "**", "x³ + ²", "٣^2",
]  # fmt: skip


@pytest.mark.parametrize("text", FINE)
def test_answers_of_competitions_are_not_too_large(text):
    assert not too_large(text)


@pytest.mark.parametrize("text", [
    "9^9^9", "9**9**9", "(9^9)^(9^9)", "{{9}^{9}}^{{9}^{9}}", "10^{10001}", "3001!", "9!!!", r"\binom{10001}{5}",
    r"\sum_{i=1}^{9} \sum_{j=1}^{9} j", r"\int_0^1 x dx", r"\lim_{x \to 0} x", "(x+1)^{301}", "(x+y+z)^{40}",
    "((x+1)^{9}+1)^{99}", "((" * 20, "1+" * 200, "-9^{-9^{9}}", r"\sum_{k=1}^{10001} k", r"2^{\sqrt{10^{9}}}",
    "99999^{9999}", "1e99999", "1e-9999999",
])  # fmt: skip
def test_what_no_answer_asks_for_is_too_large(text):
    assert too_large(text)


def test_no_gold_answer_here_is_too_large_and_the_look_is_quick():
    if not (ROOT.parent / "shared").is_dir():
        pytest.skip("needs the folder `shared` beside the repository")
    pairs = [final_answer(text) for pair in ordinary(2000) for text in pair]
    began = time.perf_counter()
    assert not any(too_large(text) for text in pairs)
    assert time.perf_counter() - began < 1


def test_too_large_an_answer_earns_only_as_the_same_text():
    with Judge(Reward(workers=1)) as judge:
        tower = "9^{9^{9^9}}"
        results = judge.score([(f"<answer>{tower}</answer>", {"answer": gold}) for gold in (tower, f"${tower}$", "7")])
        assert [r["accuracy"] for r in results] == [1.0, 1.0, 0.0] and judge.workers.idle == []


def test_most_hostile_answers_cost_no_process_anything():
    texts = [final_answer(f"<answer>{text}</answer>") for text in hostile()]
    caught = [text for text in texts if too_large(text, rules.is_prose(text))]
    print(f"{len(caught)} of {len(texts)} are recognized by their size")
    assert len(caught) > 0.8 * len(texts) > 80 and str(N) in texts[0]


@pytest.mark.acceptance
def test_hostile_answers_cost_a_step_next_to_nothing():
    if not (ROOT.parent / "shared").is_dir():
        pytest.skip("needs the folder `shared` beside the repository")
    from judge_cost import step

    took = {percent: step(percent)[0] for percent in (0, 5)}
    print(took)
    assert took[5] - took[0] < 10  # of a step of 256 x 16 responses, which takes minutes
