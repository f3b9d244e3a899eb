"""Scores and intervals are those of hand calculation, hold what they promise, and are the same every time."""

import itertools
import math
import random
import time

import numpy as np
import pytest

from nanolmmr1.benchmarks import statistics
from nanolmmr1.benchmarks.item import Item, Response
from nanolmmr1.benchmarks.statistics import Estimate, difference, majority, pass_at_k, score, share_right, wilson


def response(right, answer="1"):
    return Response("", answer, bool(right), "value", False, None, True, 10, False)


def item(*rights, name="0", problem=None, fault="", **subjects):
    """An item whose responses are right or not, in order."""
    return Item("m", "b", name, problem or name, subjects, "", [response(right) for right in rights], fault)


def single(values, **subjects):
    """Items of one response each, each a problem of its own."""
    return [item(right, name=str(i), **subjects) for i, right in enumerate(values)]


def test_an_item_counts_by_the_share_of_its_responses_that_are_right_and_not_at_all_with_a_fault():
    items = [item(1, 1, 0, 0, name="a"), item(1, 1, 1, 1, name="b"), item(name="c", fault="prompt too long")]
    assert [share_right(each) for each in items] == [0.5, 1, 0]
    found = score(items)
    assert found.value == 0.5 and found.rows == 3


def test_a_macro_mean_is_the_mean_over_values_of_their_means():
    items = [*single([1, 1, 1, 0], axis="a"), item(0, name="x", axis="b"), item(1, name="y", axis="b")]
    assert score(items, "axis").value == (0.75 + 0.5) / 2
    assert score(items).value == pytest.approx(4 / 6)


@pytest.mark.parametrize(("right", "count", "low", "high"), [
    # Each is the root of (p - share)^2 = z^2 p (1 - p) / count.
    (8, 10, 0.490162, 0.943318), (0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (1, 1, 0.206549, 1.0),
    (0, 1, 0.0, 0.793451), (822, 3040, 0.254903, 0.286466),
])
def test_wilsons_interval_is_that_of_his_equation(right, count, low, high):
    found = wilson(right, count)
    assert found == (right / count, pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6), count)
    for bound in (low, high):
        assert (bound - found.value) ** 2 == pytest.approx(statistics.Z**2 * bound * (1 - bound) / count, abs=1e-5)


def test_independent_items_have_wilsons_interval():
    assert score(single([1, 0, 0, 1, 0])) == wilson(2, 5)
    assert score([*single([1, 0, 0, 1]), item(name="f", fault="no prompt")]) == wilson(2, 5)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("count", [150, 198, 1000])
def test_wilsons_interval_holds_the_true_share_in_about_95_of_100_cases(share, count):
    ks = np.arange(count + 1)
    logs = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in ks]
    chance = np.exp(np.array(logs) + ks * math.log(share) + (count - ks) * math.log1p(-share))
    held = np.array([wilson(k, count).low <= share <= wilson(k, count).high for k in ks])
    assert 0.92 < chance[held].sum() < 0.98


def clustered(generator, problems, versions, macro=False):
    """Items of problems with several versions: a problem is easy or hard for all of its versions together."""
    items = []
    for problem in range(problems):
        easy = generator.random() < 0.4
        for version in range(versions):
            right = generator.random() < (0.9 if easy else 0.1)
            items.append(item(right, name=f"{problem}.{version}", problem=str(problem), axis=str(version % 2)))
    return items


@pytest.mark.parametrize("macro", ["", "axis"])
def test_the_bootstrap_holds_the_true_score_of_problems_with_versions_in_about_95_of_100_cases(macro):
    generator = random.Random(1)
    held = alone = 0
    for _ in range(300):
        items = clustered(generator, 80, 5)
        found = score(items, macro)
        held += found.low <= 0.42 <= found.high
        plain = wilson(sum(map(share_right, items)), len(items))
        alone += plain.low <= 0.42 <= plain.high
    assert 0.91 < held / 300 < 0.98
    assert alone / 300 < 0.8  # versions as if they were independent


def test_the_interval_of_a_difference_holds_the_true_one_in_about_95_of_100_cases():
    generator = random.Random(2)
    held = 0
    for _ in range(300):
        hard = [generator.random() for _ in range(120)]
        old = single(generator.random() < 0.6 * h for h in hard)
        new = single(generator.random() < 0.6 * h + 0.1 for h in hard)
        found = difference(old, new).estimate
        held += found.low <= 0.1 <= found.high
    assert 0.91 < held / 300 < 0.98


def test_draws_of_kinds_have_the_distribution_of_draws_of_problems():
    items = clustered(random.Random(3), 100, 5)
    found, table = score(items), np.zeros(100)
    np.add.at(table, [int(each.problem) for each in items], [share_right(each) for each in items])
    draws = np.random.default_rng(0).integers(100, size=(20_000, 100))
    low, high = np.percentile(table[draws].mean(1) / 5, [2.5, 97.5])
    assert found.low == pytest.approx(low, abs=0.006) and found.high == pytest.approx(high, abs=0.006)


@pytest.mark.parametrize("macro", ["", "axis"])
def test_the_interval_of_nothing_or_everything_right_is_wilsons_of_the_problems(macro):
    for right in (0, 1):
        items = [item(right, right, name=f"{i}", problem=f"{i // 2}", axis=str(i % 2)) for i in range(20)]
        found, bounds = score(items, macro), wilson(10 * right, 10)
        assert (found.value, found.rows) == (right, 20)
        assert (found.low, found.high) == (pytest.approx(bounds.low), pytest.approx(bounds.high))


def test_one_problem_tells_little_whatever_the_number_of_its_versions():
    found = score([item(1, name=f"{i}", problem="p") for i in range(5)])
    assert (found.value, found.high) == (1, 1) and found.low == pytest.approx(wilson(1, 1).low)


def test_without_items_there_is_no_score_and_no_difference():
    assert score([]) is None and score([], "axis") is None
    assert difference([], single([1])) is None
    assert difference(single([1]), [item(1, name="another")]) is None


def test_a_value_with_one_row_widens_a_macro_interval():
    many = [item(i % 2, name=f"{i}", axis="a") for i in range(200)]
    few = [*many, item(1, name="x", axis="b"), item(0, name="y", axis="b")]
    narrow, wide = score([*many, *(each._replace(id=f"{each.id}b", problem=f"{each.id}b", subjects={"axis": "b"})
                                   for each in many)], "axis"), score(few, "axis")  # fmt: skip
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_intervals_do_not_depend_on_the_order_of_items_nor_on_the_run():
    items = clustered(random.Random(4), 60, 3)
    mixed = random.Random(5).sample(items, len(items))
    for macro in ("", "axis"):
        first, again = score(items, macro), score(mixed, macro)
        assert first == pytest.approx(again, abs=1e-12) and first == score(items, macro)
    assert score(items)[1:3] == (pytest.approx(1 / 3), pytest.approx(0.55))  # on every machine


def test_a_difference_is_over_the_items_that_both_have_and_counts_what_changed():
    old = [*single([1, 1, 0, 0, 0]), item(1, name="only old")]
    new = [item(1, name="only new"), *single([1, 0, 1, 1, 0])]
    found = difference(old, new)
    assert (found.lost, found.gained, found.estimate.rows) == (1, 2, 5)
    assert found.estimate.value == pytest.approx(0.2)
    assert found.estimate.low < 0 < found.estimate.high


def test_items_of_another_benchmark_with_the_same_id_are_no_pair():
    assert difference(single([1]), [each._replace(benchmark="c") for each in single([1])]) is None


def test_the_same_answers_differ_by_nothing_as_far_as_the_problems_can_tell():
    items = single([1, 0] * 100)
    found = difference(items, items)
    assert (found.lost, found.gained, found.estimate.value) == (0, 0, 0)
    assert found.estimate.high == -found.estimate.low == pytest.approx(wilson(0, 200).high)


def test_a_pair_of_models_is_told_apart_better_than_two_intervals_do():
    generator = random.Random(6)
    hard = [generator.random() for _ in range(500)]
    old, new = (single(h < limit for h in hard) for limit in (0.5, 0.55))
    found, apart = difference(old, new).estimate, (score(old), score(new))
    assert found.low > 0 and apart[0].high > apart[1].low


def test_a_difference_of_macro_means_is_that_of_the_scores():
    items = clustered(random.Random(7), 40, 3)
    better = [each._replace(responses=[response(1)]) if each.id.endswith(".0") else each for each in items]
    found = difference(items, better, "axis").estimate
    assert found.value == pytest.approx(score(better, "axis").value - score(items, "axis").value)


@pytest.mark.parametrize(("n", "right", "k"), [(4, 1, 2), (8, 3, 4), (5, 0, 3), (5, 5, 5), (6, 2, 1), (6, 1, 6)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_responses_that_hold_a_right_one(n, right, k):
    given = [i < right for i in range(n)]
    choices = list(itertools.combinations(given, k))
    assert pass_at_k(item(*given), k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_k_of_many_responses_neither_overflows_nor_loses_digits():
    assert pass_at_k(item(*[1] + [0] * 4095), 1024) == pytest.approx(0.25)
    assert pass_at_k(item(fault="no prompt"), 4) == 0
    with pytest.raises(AssertionError):
        pass_at_k(item(1), 2)


@pytest.mark.parametrize(("answers", "right"), [
    ([("3", 0), ("4", 1), ("4", 1)], True),
    ([("3", 0), ("4", 1)], False),  # of equally frequent ones the first
    ([("4", 1), ("3", 0)], True),
    ([("", 0), ("", 0), ("4", 1)], True),  # no answer has no vote
    ([("", 0), ("", 0)], False),
    ([], False),
    ([("B", 1), ("A", 0), (" b. ", 1)], True),  # one text, ignoring case, spaces and outer punctuation
    ([("2", 0), ("2", 0), ("5", 1), ("5", 1), ("5", 1)], True),
])
def test_the_most_frequent_answer_wins(answers, right):
    assert majority(item()._replace(responses=[response(good, text) for text, good in answers])) == right


def test_4000_items_of_any_kind_take_less_than_a_second():
    generator = random.Random(8)
    items = [item(*(generator.random() < 0.3 for _ in range(4)), name=str(i), problem=str(i // 5), axis=str(i % 5))
             for i in range(4000)]  # fmt: skip
    for macro in ("", "axis"):
        began = time.process_time()
        assert isinstance(score(items, macro), Estimate)
        assert time.process_time() - began < 3


def test_the_exact_test_of_a_difference_is_mcnemars():
    def p(lost, gained, same=10):
        old, new = [1] * lost + [0] * gained + [1] * same, [0] * lost + [1] * gained + [1] * same
        return difference(single(old), single(new)).p

    assert p(0, 4) == 0.125 and p(4, 0) == 0.125 and p(0, 10) == 2 / 1024 and p(3, 3) == p(0, 0) == 1.0
    assert p(1, 5) == pytest.approx(2 * (1 + 6) / 64)
    pair = [item(1, name=name, problem="0") for name in "ab"]
    assert difference(pair, pair).p is None and difference([item(1, 0)], [item(1, 1)]).p is None
