"""Rewards: what counts as right, what a hostile response cannot do, and what a user's function may do wrong."""

import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from nanolmmr1.errors import UserError
from nanolmmr1.reward import rules
from nanolmmr1.reward.algebra import equal_expressions
from nanolmmr1.reward.extract import final_answer, gold_answer, last_boxed
from nanolmmr1.reward.formats import check_format, format_reward
from nanolmmr1.reward.judge import Judge, RewardError
from nanolmmr1.reward.rules import decide
from nanolmmr1.schema import Reward

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
ROW = {"id": "row-7", "problem": "How much is 3 + 4?", "answer": "7"}
SLOW = ["10^{10^{10}}", "100000000!", "(9^9)^(9^9)", "{" * 100_000]
HARMLESS = [r"\frac{1}{" * 5000, "1" * 1_000_000, r"\boxed{" * 100_000 + "1", r"\left(" * 600 + "1" + r"\right)" * 600,
            "9**9**9**9", "1e999999999", "\ud800", "\x00", "__import__('os').abort()", "<think>" * 100_000]


@pytest.fixture(scope="module")
def judge():
    with Judge(Reward(verify_s=60.0)) as judge:
        yield judge


def functions(tmp_path, source, *names, **options):
    """A Judge with these reward functions, weight 2.0 each."""
    path = tmp_path / "rewards.py"
    path.write_text(source)
    return Judge(Reward(functions={f"{path}:{name}": 2.0 for name in names}, workers=1, **options))


def accuracy_reward(response, gold):
    """The accuracy reward without a worker."""
    return decide(final_answer(response), gold_answer(gold), (), equal_expressions).score


def rows_of(name):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ended(pidfd, seconds):
    return bool(select.select([pidfd], [], [], seconds)[0])


RIGHT = [  # gold, answer
    ("60", "$60$"), ("$60$", "60.0"), ("1000", "1,000"), ("1,000", "1000"), ("1000", "$1,000.00"), ("-5", "\u22125"),
    ("7", "007"), ("0.5", ".5"), ("42", "42 apples"), ("42", "the answer is 42."), ("42", "so there are 42 of them"),
    ("0.5", "1/2"), (r"\frac{1}{2}", "0.5"), (r"\frac12", r"\dfrac{2}{4}"), ("0.5", r"50\%"), ("50%", "50"),
    ("10^3", "1000"), ("{1,2}", r"\{2,1\}"), ("2,3", "3, 2"), ("3 or 4", "4 or 3"), ("[1,2)", r"x\in[1,2)"),
    (r"(-\infty,3]", r"(-\infty, 3]"), ("x=3", "3"), ("3", "x = 3"), ("y=2x+1", "2x-y+1=0"),
    ("x=3 or x=4", "x=4 or x=3"), ("$x=3$ and $y=4$", "$x=3$ and $y=4$"), (r"2\sqrt{3}", r"$\sqrt{12}$"),
    (r"25\pi", "25pi"), (r"$\pi-2$", r"\(\pi - 2\)"), ("x^2+2x+1", "(x+1)^2"), ("sin(x)", r"\sin x"), ("x", "$x$"),
    (r"90^\circ", "90"), (r"0.\overline{3}", "1/3"), (r"1.2\overline{34}", r"\frac{1222}{990}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("12 cm", r"12\text{ cm}"), ("5 apples", "5"), ("3 hours 20 minutes", "3 Hours  20 minutes."),
    ("yes", "Yes."), ("Monday", r"\text{monday}"),
    (r"2\sqrt{3}", r"2\sqrt{3}\text{ meters}"), ("the red one", "**The red one**"),
    ("B", "B"), ("B", "(B)"), ("B", "b"), ("B", "B."), ("B", "B) 12"), ("B", "(B) 12"), ("B", "B: a prime"),
    ("(B)", "B"), (r"\boxed{B}", r"$\boxed{\text{B}}$"), ("B", "**B**"), ("B", "The answer is B"),
    ("C", "(A) is wrong. The answer is (C)."), ("B", r"The correct option is $\text{B}$."),
]
WRONG = [
    ("60", "61"), ("60", ""), ("", ""), ("", "0"), ("5", "five"), ("0.33", "1/3"), ("0.3333333", "0.333333"),
    ("1000", "1,00"), ("3 or 4", "4"), ("x=3 or x=4", "x=4"), ("$x=3$ and $y=4$", "4"), ("3 hours 20 minutes", "20"),
    ("5", "x + 5"), ("x+5", "5"), ("{1,2}", "{1,3}"), ("[1,2)", "(1,2)"), ("(1,2)", "(2,1)"), (r"25\pi", "78.54"),
    (r"0.\overline{3}", "0"), (r"\frac{1}{", "1"), ("yes", "sey"), ("Monday", "Sunday"), ("listen", "silent"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    ("B", "C"), ("B", "2"), ("2", "B"), ("A", "A dog"), ("B", "(B) or (C)"), ("B", "B) 12, C) 13"),
    ("B", "The answer is B or C"), ("B", "So the answer is (B) or (C)"), ("B", "So the answer is B, C"),
    ("A", "The answer is (A). No, the answer is (B)."),
    ("I", "The answer is I'm not sure"), ("2", r"2\sqrt{3}\text{ meters}"), ("2", r"an area of 2\sqrt{3} meters"),
]


def test_right_and_wrong_answers_are_told_apart(judge):
    for shape in ("<think>9, B</think>\n<answer>{}</answer>", r"<think>9, \boxed{{7}}</think> \boxed{{{}}}", "{}"):
        pairs = [(shape.format(answer), {"answer": gold}) for gold, answer in RIGHT + WRONG]
        wanted = [1.0] * len(RIGHT) + [0.0] * len(WRONG)
        got = [result["accuracy"] for result in judge.score(pairs)]
        assert [pair for pair, a, b in zip(pairs, got, wanted, strict=True) if a != b] == []


SIBLINGS = [  # gold, response, right
    ("7", "<think>makes 7 but wait", 0), ("B", "<think>Consider option B", 0), ("7", "<think>\\boxed{7} or", 0),
    ("8", "<think>\\boxed{7}</think> 8", 1), ("7", "<think>a</think><answer>7", 0),
    ("(1) $x=3$ (2) $y=4$", "4", 0), ("(1) $x=3$ (2) $y=4$", "x=3, y=4", 1), ("(1) 3 (2) 4", "(1) 4 (2) 3", 0),
    ("2, 3", r"\boxed{2}, \boxed{3}", 1), ("3", r"\boxed{2} and \boxed{3}", 0), ("1728", "1331 and 1728", 0),
    ("B", "A) 1 B) 2 C) 3 D) 4", 0), ("B", "A. 1, B. 2, C. 3", 0), ("2^{-90}", "2^{-91}", 0),
    (r"\frac{1}{2010!}", r"\frac{1}{2012!}", 0), ("72", "#### 72", 1), ("He has 3*4=12.\n#### 12", "12", 1),
    ("90°", "90 degrees", 1), ("12 cm", "0.12 m", 1), ("12 cm", "12 m", 0), ("9.8 m/s^2", "9.8 m/s²", 1),
    ("5", "US$5", 1), ("1500000", "1.5 million", 1), ("3!", "3", 0), ("6", "3!", 1), ("x>2", "(2, +∞)", 1),
    ("1<x<3", "(1,3)", 1), ("[1,3)", r"1\le x<3", 1), (r"2\pm\sqrt{3}", r"2+\sqrt3, 2-\sqrt3", 1),
    ("B. 12", "12", 1), ("B. 12", "B", 1), ("B. 12", "13", 0), ("C", "故选：Ｃ", 1), ("5", "答案是 5 厘米。", 1),
    ("-5", "-$5", 1), (r"\{1,2\}", "1 和 2", 1), ("3:30", "1:10", 0), ("12", "It has 3 rows of 4, so there are 12", 1),
]


@pytest.mark.parametrize("gold, response, right", SIBLINGS)
def test_answers_are_read_as_people_write_them(gold, response, right):
    assert accuracy_reward(response, gold) == right


def test_an_options_value_counts_as_its_letter_where_no_other_has_it(judge):
    row = {"problem": "How many?\n(A) 10\n(B) 12\n(C) 14", "answer": "B"}
    cases = [(row, "12", 1), (row, "14", 0), (row, "B", 1), (row | {"problem": "?", "options": ["12", "12"]}, "12", 0),
             ({"problem": "?", "options": ["10", "12"], "answer": "12"}, "B", 1)]  # fmt: skip
    results = judge.score([(f"<answer>{answer}</answer>", row) for row, answer, _ in cases])
    assert [r["accuracy"] for r in results] == [right for *_, right in cases]
    with Judge(Reward(option_value=False)) as strict:
        pairs = [(f"<answer>{answer}</answer>", row) for answer in ("12", "B", "B. 12")]
        assert [r["accuracy"] for r in strict.score(pairs)] == [0.0, 1.0, 1.0]


def test_spellings_and_units_of_one_value_are_equal_and_no_others():
    lines = (ROOT / "tests" / "answers.txt").read_text(encoding="utf-8").splitlines()  # gold|answer|right
    cases = [(gold, re.sub(r"\\n(?![a-z])", "\n", answer), float(right))
             for gold, answer, right in (line.split("|") for line in lines)]  # fmt: skip
    assert [case for case in cases if accuracy_reward(case[1], case[0]) != case[2]] == []


def test_hard_pairs_are_judged_right():
    path = ROOT.parent / "shared" / "replays" / "answer_pairs.jsonl"
    if not path.is_file():
        pytest.skip("needs the folder `shared` beside the repository")
    pairs = [row for row in map(json.loads, path.read_text().splitlines()) if row["right"] is not None]
    wrong = [row for row in pairs if accuracy_reward(row["response"], row["gold"]) != row["right"]]
    kinds = Counter(row["kind"] for row in pairs), Counter(row["kind"] for row in wrong)
    print(*(f"{kind}: {count - kinds[1][kind]} of {count}" for kind, count in kinds[0].items()), sep="\n")
    print(f"{len(pairs) - len(wrong)} of {len(pairs)} agree; not: {wrong}")
    assert len(wrong) <= 0.05 * len(pairs) and all(row["right"] for row in wrong)  # none is given away


def test_the_judge_agrees_with_the_plain_function(judge):
    pairs = [(f"<answer>{answer}</answer>", {"answer": gold}) for gold, answer in RIGHT[:20] + WRONG[:20]]
    assert [r["accuracy"] for r in judge.score(pairs)] == [accuracy_reward(r, row["answer"]) for r, row in pairs]


@pytest.mark.parametrize("response, gold", [
    ("<answer>3</answer> wait <answer>7</answer>", "7"),
    (r"<answer>the sum is \boxed{7}, not 3</answer> 9", "7"),
    (r"\boxed{3} and then \boxed{7}", "7"),
    (r"\boxed{\frac{\sqrt{21}}{5}} is it", r"\frac{\sqrt{21}}{5}"),
    (r"\boxed{7} and \boxed{9", "7"),
    ("<think>it may be 9</think> 7", "7"),
])
def test_the_last_finished_answer_counts(response, gold):
    assert accuracy_reward(response, gold) == 1.0


def test_a_box_is_read_to_its_own_closing_brace():
    assert last_boxed(r"\boxed{a_{1}} {x}") == "a_{1}"
    assert last_boxed(r"\boxed{\{1,2\}}") == r"\{1,2\}"
    assert last_boxed(r"\boxed{\left\{x \right.}") == r"\left\{x \right."
    assert last_boxed(r"\boxed {5}") == "5"
    assert last_boxed(r"\boxed{5") is None
    assert last_boxed("} {5}") is None


FORMAT_CASES = [  # response, think_answer, think_boxed, boxed
    ("<think>a</think><answer>7</answer>", 1, 0, 0),
    ("\n<think>a\nb</think>\n\n<answer>7</answer>\n", 1, 0, 0),
    (r"<think>a</think><answer>\boxed{7}</answer>", 1, 1, 1),
    (r"<think>a</think> so \boxed{7}.", 0, 1, 1),
    (r"<think>\boxed{7}</think> so 7", 0, 0, 1),
    (r"\boxed{7}", 0, 0, 1),
    (r"<think>a</think> \boxed{7", 0, 0, 0),
    ("<think>a</think> so <answer>7</answer>", 0, 0, 0),
    ("<think>a</think><answer>7</answer> done", 0, 0, 0),
    ("so <think>a</think><answer>7</answer>", 0, 0, 0),
    ("<think>a<think>b</think><answer>7</answer>", 0, 0, 0),
    ("<think>a</think><answer>7</answer><answer>7</answer>", 0, 0, 0),
    ("<think>a</think><answer>7</think></answer>", 0, 0, 0),
    ("<think>a<answer></think>7</answer>", 0, 0, 0),
    ("<think><answer>7</think></answer>", 0, 0, 0),
    ("<answer>7</answer><think>a</think>", 0, 0, 0),
    ("<think>a</think>", 0, 0, 0),
    ("", 0, 0, 0),
]


def test_each_named_format_accepts_its_own_shape_only():
    for response, *wanted in FORMAT_CASES:
        assert [format_reward(response, name) for name in ("think_answer", "think_boxed", "boxed")] == wanted, response


def test_named_formats_take_linear_time():
    begun = time.perf_counter()
    for piece in ("<think>", "</think><answer>", r"\boxed{", "{", "\\", " "):
        for name in ("think_answer", "think_boxed", "boxed"):
            format_reward("<think>" + piece * (1_000_000 // len(piece)), name)
    assert time.perf_counter() - begun < 10


def test_a_format_may_be_a_regular_expression_for_the_whole_response():
    with Judge(Reward(format=r"Answer: .+", workers=1)) as judge:
        judge.check([ROW])
        results = judge.score([("Answer: 7\n8", ROW), ("My Answer: 7", ROW)])
    assert [r["format"] for r in results] == [1.0, 0.0]


@pytest.mark.parametrize("format", ["(unclosed", "think_anwser", ""])
def test_an_unusable_format_is_refused(format):
    with pytest.raises(UserError, match="reward.format="):
        check_format(format)
    with pytest.raises(UserError), Judge(Reward(format=format)) as judge:
        judge.check([ROW])


def test_a_regular_expression_that_backtracks_for_ever_is_killed():
    with Judge(Reward(format=r"(a|aa)+b", workers=1, verify_s=0.5)) as judge:
        result, = judge.score([("a" * 60 + "c", ROW)])
    assert result == {"overall": 0.0, "format": 0.0, "accuracy": 0.0, "timeout": 1, "reason/unread": 1.0}


def test_overall_is_the_weighted_sum(judge):
    right, wrong = "<think>a</think><answer>7</answer>", "<think>a</think><answer>8</answer>"
    results = judge.score([(right, ROW), (wrong, ROW), ("7", ROW)])
    assert [r["overall"] for r in results] == [1.5, 0.5, 1.0]
    assert results[0] == {"overall": 1.5, "format": 1.0, "accuracy": 1.0, "timeout": 0, "reason/value": 1.0}


def test_plain_numbers_letters_and_words_need_no_worker_and_are_fast():
    rows = [ROW, {"answer": "B"}, {"answer": "yes"}]
    pairs = [(f"<think>{'a b c ' * 100}</think><answer>{i}</answer>", rows[i % 3]) for i in range(3000)]
    with Judge(Reward()) as judge:
        begun = time.perf_counter()
        results = judge.score(pairs)
        assert len(results) / (time.perf_counter() - begun) > 5000
        assert judge.workers.idle == []


def test_results_depend_neither_on_worker_count_nor_on_order(judge):
    pairs = [(f"<answer>{answer}</answer>", {"answer": gold}) for gold, answer in RIGHT + WRONG]
    with Judge(Reward(workers=1, verify_s=60.0)) as lonely:
        assert lonely.score(pairs[::-1])[::-1] == judge.score(pairs)


def test_every_gsm8k_gold_answer_equals_itself_without_a_worker():
    rows = rows_of("gsm8k/train.jsonl")
    with Judge(Reward()) as judge:
        begun = time.perf_counter()
        assert not any(judge.gold_problems(rows))
        assert time.perf_counter() - begun < 1.0
        assert judge.workers.idle == []


def test_every_mathvision_gold_answer_equals_itself(judge):
    rows = rows_of("mathvision/testmini.jsonl")
    assert [row["id"] for row, ok in zip(rows, judge.gold_problems(rows), strict=True) if ok] == []


def test_gold_answers_that_nothing_can_equal_are_found():
    rows = [{"answer": gold} for gold in ("7", "", " ", "{" * 1000, r"\frac{3}{4}", "yes")]
    with Judge(Reward(workers=1)) as judge:
        assert [bool(problem) for problem in judge.gold_problems(rows)] == [False, True, True, True, False, False]


def test_hostile_responses_neither_hang_nor_earn():
    pairs = [(f"<think>a</think><answer>{answer}</answer>", ROW) for answer in SLOW + HARMLESS]
    with Judge(Reward()) as judge:
        judge.score([("<answer>x+1</answer>", ROW), ("<answer>x+2</answer>", ROW)])
        begun = time.perf_counter()
        results = judge.score(pairs)
        assert time.perf_counter() - begun < 3  # their size alone tells that they are not worth a try
        assert [(r["accuracy"], r["timeout"]) for r in results] == [(0.0, 0)] * len(pairs)


def test_what_is_not_known_to_be_slow_is_killed_and_does_not_earn(monkeypatch):
    monkeypatch.setattr(rules, "too_large", lambda text, prose=False: False)
    pairs = [(f"<think>a</think><answer>{answer}</answer>", ROW) for answer in SLOW[:3]]
    with Judge(Reward(verify_s=0.5)) as judge:
        judge.score([("<answer>x+1</answer>", ROW), ("<answer>x+2</answer>", ROW)])
        begun = time.perf_counter()
        results = judge.score(pairs)
        assert time.perf_counter() - begun < 10  # half a second each, in as many processes as cores; no new start
    late = {"overall": 0.5, "format": 1.0, "accuracy": 0.0, "timeout": 1, "reason/deadline": 1.0}
    assert results == [late] * 3


def test_a_killed_worker_is_replaced_and_its_verdict_remembered(monkeypatch):
    monkeypatch.setattr(rules, "too_large", lambda text, prose=False: False)
    with Judge(Reward(workers=1)) as judge:
        judge.score([("<answer>x+1</answer>", ROW)])
        worker, (first,) = judge.workers.idle[0], judge.workers.idle[0].child
        begun = time.perf_counter()
        assert judge.score([(f"<answer>{SLOW[0]}</answer>", ROW)] * 3)[2]["timeout"] == 1
        assert 0.9 < time.perf_counter() - begun < 5
        begun = time.perf_counter()
        assert judge.score([(f"<answer>{SLOW[0]}</answer>", ROW)])[0]["timeout"] == 1
        assert time.perf_counter() - begun < 0.5
        assert judge.score([("<answer>14/2</answer>", ROW)])[0] == {
            "overall": 1.0, "format": 0.0, "accuracy": 1.0, "timeout": 0, "reason/value": 1.0}
        assert judge.workers.idle == [worker] and worker.child != [first] and worker.process.poll() is None


@pytest.mark.parametrize("victims", ["child", "process", "both"])
def test_workers_that_died_between_judgements_are_replaced(victims):
    with Judge(Reward(verify_s=60.0)) as judge:
        judge.score([("<answer>x+1</answer>", ROW), ("<answer>x+2</answer>", ROW)])
        for worker in judge.workers.idle:
            if victims != "child":
                os.kill(worker.process.pid, signal.SIGKILL)
            if victims != "process":
                os.kill(worker.child[0], signal.SIGKILL)
        result, = judge.score([("<answer>14/2</answer>", ROW)])
        assert (result["accuracy"], result["timeout"]) == (1.0, 0)


def test_a_judgement_that_wants_too_much_memory_is_stopped():
    if sys.platform != "linux":
        pytest.skip("only Linux tells a process how much it has mapped")
    code = ("from nanolmmr1.reward.worker import apply_rule; print(apply_rule(lambda: len(bytearray({}))))")
    small, large = (subprocess.run([sys.executable, "-c", code.format(size)], cwd=ROOT, capture_output=True, text=True)
                    for size in ("1000000", str(3 << 30)))
    assert "'value': 1000000" in small.stdout
    assert "'memory'" in large.stdout


def test_closing_leaves_no_process():
    with Judge(Reward()) as judge:
        judge.score([("<answer>x+1</answer>", ROW)])
        pid = judge.workers.idle[0].process.pid
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("response", ["<answer>x+1</answer>", "loop"])
def test_a_worker_does_not_outlive_a_killed_parent(tmp_path, response):
    if not hasattr(os, "pidfd_open"):
        pytest.skip("only Linux can wait for a process that is not its child")
    (tmp_path / "rewards.py").write_text(
        "import os\ndef f(response, row):\n    print('worker', os.getpid(), flush=True)\n"
        "    while response == 'loop':\n        pass\n    return 0\n")
    parent = subprocess.Popen([sys.executable, "-c", f"""
import sys
from nanolmmr1.schema import Reward
from nanolmmr1.reward.judge import Judge
judge = Judge(Reward(workers=1, timeout_s=1.0, functions={{"{tmp_path}/rewards.py:f": 1.0}}))
judge.score([({response!r}, {ROW!r})])
sys.stdin.read()
"""], cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with parent:
        line = parent.stderr.readline()
        pidfd = os.pidfd_open(int(line.removeprefix("worker ")))
        parent.kill()
        try:
            assert ended(pidfd, 10)
        finally:
            os.close(pidfd)


def test_reward_functions_give_floats_bools_or_parts(tmp_path):
    source = """
from __future__ import annotations
import sys
from dataclasses import dataclass
@dataclass
class Limit:
    longest: int = 3
def short(response, row): return len(response) <= Limit().longest
def noisy(response, row):
    print("printed"); sys.stdout.write("{}"); input if sys.stdin.read() else None
    return 0.25
def summed(response, row): return {"a": 1, "b": 0.5}
def chosen(response, row): return {"overall": 0.5, "length": len(response), "gold": float(row["answer"])}
"""
    with functions(tmp_path, source, "short", "noisy", "summed", "chosen") as judge:
        judge.check([ROW])
        first, second = judge.score([("7", ROW), ("It is 8", ROW | {"answer": "9"})])
    assert first == {"overall": 1.0 + 2 * (1 + 0.25 + 1.5 + 0.5), "format": 0.0, "accuracy": 1.0, "timeout": 0,
                     "reason/value": 1.0,
                     "short": 1.0, "noisy": 0.25, "summed": 1.5, "summed/a": 1.0, "summed/b": 0.5,
                     "chosen": 0.5, "chosen/length": 1.0, "chosen/gold": 7.0}
    assert (second["short"], second["chosen/length"], second["chosen/gold"]) == (0.0, 7.0, 9.0)


FAULTS = """
import os, sys, time
def fault(response, row):
    if response == "raise":
        return 1 / 0  # here
    if response == "exit":
        sys.exit(3)
    if response == "die":
        os._exit(3)
    while response == "hang":
        time.sleep(1)
    return {"nan": float("nan"), "infinite": {"a": 1.0, "b": float("inf")}, "text": "1.0", "nothing": None, "empty": {},
            "huge": 10 ** 400}[response]
"""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    with functions(tmp_path_factory.mktemp("faulty"), FAULTS, "fault", timeout_s=1.0) as judge:
        yield judge


@pytest.mark.parametrize("fault, why", [
    ("raise", r"ZeroDivisionError: division by zero \(line 5: return 1 / 0  # here\)"),
    ("exit", r"SystemExit: 3 \(line 7"), ("die", "it ended its process, status 3"),
    ("hang", "it did not return within reward.timeout_s=1"),
    ("nan", "it returned nan"), ("infinite", "it returned .*'b': inf"), ("text", "it returned '1.0'"),
    ("nothing", "it returned None"), ("empty", "it returned {}"), ("huge", "OverflowError"),
])
def test_a_reward_function_that_fails_is_reported_with_its_row(faulty, fault, why):
    with pytest.raises(RewardError, match=rf"rewards\.py:fault failed on row 'row-7': .*{why}"):
        faulty.score([(fault, ROW)])


def test_one_failing_call_stops_the_calls_not_yet_begun(faulty):
    begun = time.perf_counter()
    with pytest.raises(RewardError):
        faulty.score([("hang", ROW)] * 20)
    assert time.perf_counter() - begun < 10


def test_a_reward_function_whose_worker_dies_once_is_asked_again(tmp_path):
    source = f"""
import os, signal
def once(response, row):
    if not os.path.exists({str(tmp_path / "died")!r}):
        open({str(tmp_path / "died")!r}, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0
"""
    with functions(tmp_path, source, "once") as judge:
        assert judge.score([("7", ROW)])[0]["once"] == 1.0


@pytest.mark.parametrize("source, name, why", [
    ("def f(response, row): return 1.0", "g", "no function 'g'"),
    ("f = 3", "f", "no function 'f'"),
    ("def f(response, row)\n    return 1.0", "f", r"cannot be loaded: SyntaxError.*line 1: def f"),
    ("import no_such_module", "f", r"cannot be loaded: ModuleNotFoundError.*line 1: import no_such_module"),
    ("def f(response, row): return row['missing']", "f", "KeyError: 'missing'"),
])
def test_the_start_up_check_finds_a_bad_reward_function(tmp_path, source, name, why):
    with functions(tmp_path, source, name) as judge, pytest.raises(UserError, match=why):
        judge.check([ROW])


def test_the_start_up_check_finds_a_missing_file(tmp_path):
    with Judge(Reward(functions={f"{tmp_path}/none.py:f": 1.0})) as judge:
        with pytest.raises(UserError, match="there is no file .*none.py"):
            judge.check([ROW])


@pytest.mark.parametrize("function, weight, why", [
    ("rewards.py", 1.0, "is not path/to/file.py:function"), ("rewards.py:", 1.0, "is not path/to/file.py:function"),
    (":f", 1.0, "is not path/to/file.py:function"), ("rewards.py:f", "1", "weight '1'"),
    ("rewards.py:f", True, "weight True"), ("rewards.py:f", float("nan"), "weight nan"),
    ("rewards.py:accuracy", 1.0, "is taken"),
])
def test_a_reward_function_must_be_named_and_weighted(function, weight, why):
    with pytest.raises(UserError, match=why):
        Judge(Reward(functions={function: weight}))


def test_the_trainer_process_imports_no_mathematics():
    code = "import sys, nanolmmr1.reward; print({'torch', 'transformers', 'sympy', 'math_verify'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_run_that_is_to_end_waits_for_no_more_than_the_judgements_at_work(tmp_path):
    """As many judgements as workers may end; the others are not begun."""
    source = "import time\n\ndef slow(response, row):\n    time.sleep(1.5)\n    return 1.0\n"

    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with functions(tmp_path, source, "slow") as judge:
        judge.score([("a", ROW)])  # the worker is there
        judge.workers.between = stop
        began = time.monotonic()
        with pytest.raises(Stop):
            judge.score([(str(n), ROW) for n in range(40)])
        assert time.monotonic() - began < 15


PIECES = ["(", ")", "[", "]", "{", "}", r"\{", r"\}", "$", ",", "and ", "or ", " ", "1", "x", "=", r"\frac", "^", "_",
          "\\", r"\text{", "answer is ", "答案是", "(1) ", "A) ", "B. ", ".", ":", "-", "°", "√", "²", "½", r"\pm", "<",
          r"\le ", "cm ", "%", "km/h ", "#", "*", "\n", "the ", "'", r"\overline{3}", "0.333...", "10^{3}", r"\times ",
          " 000", ",000", r"x\in ", r"\boxed{", "是", "m\\angle A", "=√"]  # fmt: skip


def test_no_text_takes_long_to_read_or_raises():
    rng, golds = random.Random(0), [gold_answer(gold) for gold, _ in RIGHT]
    for count in range(600):
        piece = "".join(rng.choices(PIECES, k=rng.choice((1, 2, 3, 5))))
        text = piece * (2000 // len(piece)) if count % 3 else "".join(rng.choices(PIECES, k=500))
        began = time.perf_counter()
        decide(final_answer(f"<think>{text}</think><answer>{text[:2000]}</answer>"), rng.choice(golds))
        assert time.perf_counter() - began < 1.0, piece
