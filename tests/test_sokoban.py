"""Sokoban: the rules, shortest solutions, generated levels, pictures, the reward of plans, and rows that train."""

import itertools
import json
import runpy
import sys
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanolmmr1.errors import UserError
from nanolmmr1.reward.judge import Judge
from nanolmmr1.schema import Reward
from nanolmmr1.sokoban.__main__ import main
from nanolmmr1.sokoban.generate import SIZES, canonical, generate, is_held_out
from nanolmmr1.sokoban.level import CHARACTERS, MOVES, read_map
from nanolmmr1.sokoban.plan import length_bonus, play, read_plan, sokoban, sokoban_paper
from nanolmmr1.sokoban.render import SIDE, draw, png
from nanolmmr1.sokoban.solve import Unsolved, solve

ROOT = Path(__file__).resolve().parents[1]
SPEC = f"{ROOT}/nanolmmr1/sokoban/plan.py:sokoban"
CORRIDOR = "#######\n#@ $ .#\n#######"  # Right, Right, Right
TWO = "#######\n#@$. .#\n#  $  #\n#     #\n#######"
HALL = "########\n#@     #\n#   $ .#\n#      #\n########"


def row(level, answer="Right,Right,Right"):
    return {"level": level, "answer": answer}


def response(moves, thought="a"):
    return f"<think>{thought}</think><answer>{moves}</answer>"


def walk(level, *moves):
    """The map and the rewards after moves."""
    rewards = []
    for move in moves:
        level, reward = level.step(move)
        rewards.append(reward)
    return str(level), pytest.approx(rewards)


def test_a_step_pays_as_in_gym_sokoban():
    assert walk(read_map(CORRIDOR), "Left", "Right", "Right", "Right") == \
        ("#######\n#   @*#\n#######", [-0.1, -0.1, -0.1, 10.9])
    after, rewards = walk(read_map(TWO), "Right", "Right", "Right", "Left")
    assert rewards == [0.9, -1.1, 0.9, -0.1]  # onto a target, off it, and onto the other
    assert after.startswith("#######\n#  + *#")
    assert walk(read_map("######\n#@$..#\n# $  #\n######"), "Right", "Right")[1] == [0.9, -0.1]  # from target to target


def test_walls_and_other_boxes_block_a_push():
    for text in ("#####\n#@$##\n# . #\n#####", "######\n#@$$.#\n#.   #\n######"):
        level = read_map(text)
        assert level.step("Right") == (level, -0.1)


def test_maps_are_read_back_as_they_were_written():
    for text in (CORRIDOR, TWO, HALL, "######\n#+$*.#\n#  $ #\n######"):
        assert str(read_map(text)) == text
    assert str(read_map("#####\n#@$.#\n###")) == "#####\n#@$.#\n#####"


@pytest.mark.parametrize("text", [
    "", "\n", "###", "#" * 50 + "\n", "#####\n#@$.#\n#####\x1b", "#####\n#@$x#\n#####", "#####\n#@$ #\n#####",
    "#####\n# $.#\n#####", "#####\n@ $.#\n#####", "#####\n#@$. \n#####", "####\n#@@#\n####"])
def test_what_is_no_level_is_refused(text):
    with pytest.raises(UserError, match="^map "):
        read_map(text)


def brute(level):
    """The least number of moves, by a search of all states."""
    seen, queue = {level}, deque([(level, 0)])
    while queue:
        state, moves = queue.popleft()
        if state.done:
            return moves
        for after in (state.step(move)[0] for move in MOVES):
            if after not in seen:
                seen.add(after)
                queue.append((after, moves + 1))
    return None


def small_boards():
    """Random levels of one or two boxes in a room of 4 x 5 cells; many cannot be solved."""
    rng = np.random.default_rng(0)
    for number in range(200):
        kinds = [4, 2, *[4, 2] * (number % 2), 5, *[0] * (number % 4)]
        inside = rng.permutation([*kinds, *[1] * (20 - len(kinds))]).reshape(4, 5)
        yield read_map("\n".join("".join(CHARACTERS[code] for code in line) for line in np.pad(inside, 1)))


def test_the_search_finds_the_least_moves_of_a_search_of_all_states():
    lengths = []
    for level in small_boards():
        lengths.append(brute(level))
        if lengths[-1] is None:
            with pytest.raises(Unsolved) as error:
                solve(level)
            assert not error.value.bounded
        else:
            plan = solve(level)
            assert len(plan) == lengths[-1] and play(str(level), plan)[1]
    assert lengths.count(None) > 50 and len(set(lengths)) > 12 and max(filter(None, lengths)) > 16


def test_the_search_gives_up_at_its_bound():
    with pytest.raises(Unsolved) as error:
        solve(read_map(HALL), 0)
    assert error.value.bounded


@pytest.fixture(scope="module", params=list(SIZES))
def levels(request):
    return request.param, list(generate(request.param, 30 if "large" in request.param else 200, 0))


def test_generated_levels_are_valid_solved_and_distinct(levels):
    size, found = levels
    rows, columns, boxes = SIZES[size]
    for each in found:
        level = read_map(str(each.level))
        assert level == each.level and (level.rows, level.columns, len(level.boxes)) == (rows, columns, boxes)
        assert not level.targets & (level.boxes | {level.player})
        assert play(str(level), each.plan)[1] and len(each.plan) <= 50
    assert len({canonical(each.level) for each in found}) == len(found)
    if size == "small-v0":
        assert [len(each.plan) for each in found[:20]] == [brute(each.level) for each in found[:20]]


def test_no_level_needs_more_moves_than_a_plan_may_have(monkeypatch):
    monkeypatch.setattr("nanolmmr1.sokoban.generate.MOST_MOVES", 8)
    assert max(len(each.plan) for each in generate("small-v0", 30, 0)) == 8


def test_levels_depend_on_their_seed_alone(levels):
    size, found = levels
    np.random.seed(3)
    assert list(generate(size, 5, 0)) == found[:5]
    assert not {each.key for each in generate(size, 5, 1)} & {each.key for each in found[:5]}


def test_test_levels_are_no_training_levels_of_any_seed(levels):
    size, found = levels
    held = list(generate(size, 5, 0, test=True))
    assert all(is_held_out(canonical(each.level)) for each in held)
    assert not any(is_held_out(canonical(each.level)) for each in found)


def test_a_level_is_the_same_when_turned_mirrored_or_walked_through():
    grid = read_map(TWO).codes()
    views = [np.rot90(side, turns) for side in (grid, grid.T) for turns in range(4)]
    maps = ["\n".join("".join(CHARACTERS[code] for code in line) for line in view) for view in views]
    assert len({*maps}) == 8 and len({canonical(read_map(text)) for text in maps}) == 1
    assert canonical(read_map(TWO).step("Down")[0]) == canonical(read_map(TWO))
    assert canonical(read_map(TWO).step("Right")[0]) != canonical(read_map(TWO))


@pytest.mark.parametrize("height", [640, 196])
def test_every_cell_can_be_read_from_its_pixels(height):
    text = "########\n#+$*. .#\n#  $ $ #\n#@ #####\n########"
    text, other = text.replace("@", " "), text.replace("+", ".")
    seen = {}
    for level in (read_map(text), read_map(other)):
        image = draw(level, height)
        cells = image.resize((level.columns * SIDE, level.rows * SIDE), Image.Resampling.NEAREST)
        pixels = np.asarray(cells).reshape(level.rows, SIDE, level.columns, SIDE, 3).swapaxes(1, 2)
        assert image.size == (round(height * 8 / 5), height)
        for place, code in np.ndenumerate(level.codes()):
            seen.setdefault(pixels[place].tobytes(), set()).add(int(code))
    assert sorted(map(sorted, seen.values())) == [[code] for code in range(7)]
    assert png(read_map(TWO)) == png(read_map(TWO))


def test_plans_are_lists_of_the_four_moves():
    assert read_plan(" left, RIGHT ,Up,\nDown") == ["Left", "Right", "Up", "Down"]
    for text in ("", "Left,", "Left Right", "Left; Up", "Left, Jump", "L"):
        assert read_plan(text) is None


def test_a_plan_is_paid_for_its_best_moment_and_the_game_ends_when_it_is_solved():
    assert play(CORRIDOR, ["Right"] * 3) == (pytest.approx(10.7), True)
    assert play(CORRIDOR, ["Right"] * 3 + ["Left"] * 9) == (pytest.approx(10.7), True)
    again = ["Right", "Right", "Down", "Right", "Right", "Up", "Left"]  # off the target, and on it from the other side
    assert play("#######\n#@$.  #\n#     #\n#######", again) == (pytest.approx(10.9), True)
    assert play(CORRIDOR, ["Left"]) == (0.0, False)
    assert play(TWO, ["Right", "Right", "Left"]) == (pytest.approx(0.9), False)  # before the box left its target
    assert play(CORRIDOR, ["Left"] * 47 + ["Right"] * 3) == (pytest.approx(10 + 1 - 5.0), True)
    assert play(CORRIDOR, ["Left"] * 48 + ["Right"] * 3) == (0.0, False)  # the 51st move would solve it


def test_the_papers_bonus_for_length():
    values = {0: 0.0, 3: 0.15, 19: 0.95, 20: 1.0, 35: 0.95, 50: 0.8, 51: 1 - 31**2 / 900 * 0.2, 200: -6.2}
    assert {n: length_bonus(n, 20) for n in values} == pytest.approx(values)


def test_the_repaired_bonus_pays_no_move_beyond_the_shortest_solution_and_takes_none_that_is_needed():
    assert [length_bonus(n, 8) for n in (3, 8, 12, 20, 50)] == pytest.approx([0.15, 0.4, 0.4, 0.4, 0.2])
    assert [length_bonus(n, 35) for n in (20, 35, 50)] == pytest.approx([1.0, 1.0, 0.95])


def test_rewards_add_up():
    scores = sokoban(response("Right, Right, Right", "go to the box"), row(CORRIDOR))
    parts = dict(format=0.5, game=10.7, length=0.15, thinking=0.004, accuracy=1.0, moves=3.0)
    assert scores == pytest.approx({"overall": 11.354} | parts)
    longer = response("Right, Right, Right" + ", Left, Right" * 4)  # which are never carried out
    assert sokoban(longer, row(CORRIDOR))["length"] == pytest.approx(0.15)
    assert sokoban_paper(longer, row(CORRIDOR))["length"] == pytest.approx(0.55)
    assert sokoban(response("Left", "ab " * 300), row(CORRIDOR))["thinking"] == pytest.approx(0.2)
    assert sokoban(response("Left", "a b"), row(CORRIDOR))["overall"] == pytest.approx(0.55)  # letters are no words


@pytest.mark.parametrize("text", ["Right,Right,Right", "<think>a</think>Right", "<think>a</think><answer></answer>",
                                  response("Right, Jump"), response("Right") + "<answer>",
                                  response("Right", "<think>")])
def test_without_tags_or_with_other_words_a_plan_earns_nothing(text):
    for function in (sokoban, sokoban_paper):
        assert set(function(text, row(CORRIDOR)).values()) == {0.0}


@pytest.mark.parametrize("period", range(1, 6))
def test_a_sequence_of_up_to_five_moves_may_stand_seven_times_in_a_row(period):
    moves = ["Left", "Left", "Up", "Right", "Down"][-period:]
    bonus = [sokoban_paper(response(",".join(moves * times)), row(CORRIDOR))["length"] for times in (7, 8)]
    assert bonus[0] == pytest.approx(length_bonus(7 * period, 20))
    assert bonus[1] == pytest.approx(min(0, length_bonus(8 * period, 20) - 0.2)) and bonus[1] <= 0 < bonus[0]
    split = ",".join([*moves * 4, "Down" if moves[-1] != "Down" else "Up", *moves * 4])
    assert sokoban_paper(response(split), row(CORRIDOR))["length"] > 0


def test_long_plans_are_scored_fast_and_rows_without_a_level_are_named():
    moves = ",".join(itertools.islice(itertools.cycle(MOVES), 100_000))
    assert sokoban_paper(response(moves), row(CORRIDOR))["length"] < -1e6
    with pytest.raises(UserError, match="column `level`"):
        sokoban(response("Left"), {"answer": "Left"})
    with pytest.raises(UserError, match="is no plan"):
        sokoban(response("Left"), row(CORRIDOR, "3"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows with pictures, and as text: two folders."""
    home = tmp_path_factory.mktemp("rows")
    for form in ("pictures", "text"):
        main([str(home / form), "--levels", "6", "--test", "3", "--as", form, "--height", "196"])
    return home


def test_the_command_writes_the_same_levels_as_pictures_and_as_text(rows, capsys):
    shown, written = ([json.loads(line) for name in ("train", "test")
                       for line in (rows / form / f"{name}.jsonl").read_text().splitlines()] for form in
                      ("pictures", "text"))
    assert len(shown) == 9 and [each["level"] for each in shown] == [each["level"] for each in written]
    for each in shown:
        assert np.array_equal(Image.open(rows / "pictures" / each["images"][0]), draw(read_map(each["level"]), 196))
        assert play(each["level"], each["answer"].split(","))[1] and each["moves"] == each["answer"].count(",") + 1
    assert [is_held_out(canonical(read_map(each["level"]))) for each in shown] == [False] * 6 + [True] * 3
    assert all(each["level"] in each["problem"] and not each["images"] for each in written)
    main([str(rows / "text"), "--levels", "6", "--test", "3", "--as", "text", "--height", "196"])
    assert "nothing to do" in capsys.readouterr().out


def test_an_output_of_something_else_is_refused_and_untouched(rows, tmp_path):
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "sokoban.json").write_text("[]")
    for out, why in ((rows / "text", "other settings"), (tmp_path, "no folder"), (tmp_path / "mine", "no folder"),
                     (tmp_path / "list", "no folder"), (tmp_path / "mine" / "below", "cannot be written")):
        with pytest.raises(UserError, match=why):
            main([str(out), "--levels", "2"])
    assert (tmp_path / "mine").read_text() == "kept" and sorted(p.name for p in tmp_path.iterdir()) == ["list", "mine"]


def test_a_run_trains_on_the_rows(rows, small_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [
        "train.py", "single", f"model={small_model}", f"output={tmp_path / 'out'}", "device=cpu",
        f"reward.functions={{{json.dumps(SPEC)}: 1.0}}", "reward.format_weight=0", "reward.accuracy_weight=0",
        "reward.workers=1", f"phases.train.data={rows / 'pictures' / 'train.jsonl'}", "phases.train.steps=2",
        "defaults.group_size=2", "defaults.prompts_per_step=2", "defaults.max_response_tokens=8",
        f"evaluate.tasks.held={{data: {rows / 'text' / 'test.jsonl'}}}"])
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    except SystemExit as end:
        assert not end.code, capsys.readouterr()
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    trained = [step for step in steps if "reward/sokoban/game" in step]
    assert len(trained) == 2 and all(step["reward/reason/function"] == 1.0 for step in trained)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["accuracy"]["train"].keys() == {"held"}


def test_any_solution_is_right_and_the_same_moves_in_another_order_are_not():
    """By the judge, in a worker process; the built-in rule takes moves for a set."""
    config = Reward(workers=1, format_weight=0, accuracy_weight=2, functions={SPEC: 1.0})
    hall = row(HALL, "Down,Right,Right,Right,Right")
    with Judge(config) as judge:
        scores = judge.score([(response(plan), hall) for plan in (
            "Down,Right,Right,Right,Right", "Right,Down,Right,Right,Right", "Right,Right,Right,Right,Down")])
    assert [each["accuracy"] for each in scores] == [1.0, 1.0, 0.0]
    assert [each["overall"] for each in scores] == [each["sokoban"] + 2 * each["accuracy"] for each in scores]
    assert all(each["reason/function"] == 1.0 for each in scores)
