"""What hostile answers cost a step: `python tests/judge_cost.py [--list]`.

A step of 256 prompts x 16 responses is judged with no, 1 % and 5 % of hostile answers among ordinary ones: each of the
hostile ones another text, so that no cache helps. `--list` judges each kind alone and says what became of it.
"""

import json
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nanolmmr1.reward.extract import final_answer  # noqa: E402
from nanolmmr1.reward.judge import Judge  # noqa: E402
from nanolmmr1.reward.rules import decide  # noqa: E402
from nanolmmr1.schema import Reward  # noqa: E402

N = 7919  # stands in each text for a number that makes it another one


def hostile():
    """Texts with a number N in each: towers, factorials, sums, integrals, powers of sums, depth, length."""
    return (ROOT / "tests" / "hostile_answers.txt").read_text(encoding="utf-8").splitlines()


def ordinary(count):
    """Golds of GSM8K and MathVision, each written in one of several ways, and what they are judged against."""
    data = ROOT.parent / "shared" / "data"
    rows = [json.loads(line) for name in ("gsm8k/train.jsonl", "gsm8k/test.jsonl", "mathvision/testmini.jsonl")
            for line in (data / name).read_text(encoding="utf-8").splitlines()]  # fmt: skip
    golds = [row["answer"].rpartition("####")[2].strip() for row in rows]
    ways = ("{}", "${}$", "\\boxed{{{}}}", "\\frac{{{}}}{{1}}", "{} \\text{{ cm}}", "x = {}", "{}.0", "2 \\cdot {}",
            "\\sqrt{{{}}}", "the answer is {}")  # fmt: skip
    rng = random.Random(0)
    return [(rng.choice(ways).format(gold), gold) for gold in rng.choices(golds, k=count)]


def judge_all(pairs, **options):
    """(seconds, verdicts) of a step, the worker processes already there."""
    with Judge(Reward(**options)) as judge:
        judge.score([("<answer>x+1</answer>", {"answer": "1+y"}), ("<answer>x+2</answer>", {"answer": "1+y"})])
        began = time.perf_counter()
        verdicts = judge.score([(f"<think>a</think><answer>{text}</answer>", {"answer": gold}) for text, gold in pairs])
        return time.perf_counter() - began, verdicts


def step(percent):
    """(seconds, judgements killed, hostile answers) of 256 x 16 answers."""
    rng, pairs = random.Random(1), ordinary(4096)
    kinds, count = hostile(), 4096 * percent // 100
    for i, place in enumerate(rng.sample(range(4096), count)):
        text = kinds[i % len(kinds)].replace(str(N), str(N + 1 + i // len(kinds)))
        pairs[place] = text, "$\\frac{x+1}{7}$"
    took, verdicts = judge_all(pairs)
    return took, sum(verdict["timeout"] for verdict in verdicts), count


def main():
    if "--list" in sys.argv:
        for text in hostile():
            took, (verdict,) = judge_all([(text, "$\\frac{x+1}{7}$")], workers=1)
            answer = final_answer(f"<answer>{text}</answer>")
            at_once = decide(answer, "\\frac{x+1}{7}") is not None
            how = "killed" if verdict["timeout"] else "at once" if at_once else ""
            print(f"{took:6.2f} s  {how:8} {text[:90]}")
        return
    took, _ = judge_all(ordinary(2000))
    print(f"2,000 ordinary answers: {took:.2f} s", flush=True)
    for percent in (0, 1, 5):
        took, killed, count = step(percent)
        print(f"4,096 answers, {percent} % hostile ({count}): {took:.2f} s, {killed} killed", flush=True)


if __name__ == "__main__":
    main()
