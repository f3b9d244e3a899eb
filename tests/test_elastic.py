"""torchrun brings a run back from whatever befalls it, and the run ends as if nothing had."""

import random
import re
import signal
import time

import pytest
from kill_run import Run, at, back, differences, strike, tiny_recipe
from two_hosts import Hosts, both, why_not

STEPS = 5
LAUNCH = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", "--rdzv_id", "my-run"]
ELASTIC = [*LAUNCH, "--max_restarts", "3"]


@pytest.fixture(scope="module")
def recipe(shared, tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("tiny"), STEPS)


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory):
    """The folder of a run that nothing befell."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    with Run(folder, recipe) as run:
        assert run.end() == 0, run.said()
    return folder


def test_killed_three_times_a_run_finishes_by_itself_with_the_same_weights(recipe, undisturbed, tmp_path):
    rng = random.Random(6)
    args = [*recipe, "resume=never"]  # torchrun's ranks go on with their own run all the same
    with Run(tmp_path / "run", args, torchrun=ELASTIC) as run:
        kills = [strike(run, rng, moment) for moment in ("sampling", "checkpoint", "backward")]
        assert run.end() == 0, run.said()
    print(*kills, sep="\n")
    assert {kill["rank"] for kill in kills} == {0, 1} and kills[-1]["resumed"] > 0
    assert differences(run.folder, undisturbed) == []
    with Run(tmp_path / "run", args, torchrun=LAUNCH, log=" again") as again:
        assert again.end() == 1 and "holds a run already" in again.said()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_a_run_in_time_after_a_checkpoint_of_its_last_whole_step(recipe, undisturbed, tmp_path, number):
    args = [*recipe, "checkpoint.every_steps=0"]  # none is due: the one that is found is the signal's
    with Run(tmp_path / "run", args) as run:
        run.wait_for(lambda: back(run) and all(run.stage(*pair)["step"] > 2 for pair in run.ranks().items()), "step 3")
        began = time.monotonic()
        run.process.send_signal(number)
        run.end(30)
        took = time.monotonic() - began
    print(f"ended {took:.1f} s after {number.name}")
    assert took < 15  # torchrun would kill the ranks after 30
    step = int(re.search(rf"stopped by {number.name} after step (\d+): start the same command again", run.said())[1])
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == [f"step_{step}"]
    assert 2 <= step < STEPS and not (run.folder / "model").exists()
    with Run(tmp_path / "run", args) as run:
        assert run.end() == 0, run.said()
    assert differences(run.folder, undisturbed) == []


def test_one_rank_that_ends_on_its_own_or_stands_still_stops_no_run(recipe, undisturbed, tmp_path):
    limits = ["dist.hang_s=3", "dist.timeout_s=12"]
    with Run(tmp_path / "run", [*recipe, *limits], torchrun=ELASTIC, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="3") as run:
        run.wait_for(lambda: at(run, 1, "sampling"), "sampling on rank 1")
        pid = run.signal(1, signal.SIGTERM)
        # The others learn of it from rank 1, and all of them end as one that was told to stop does.
        run.wait_for(lambda: run.ranks().get(1, pid) != pid and back(run), "new rank 1")
        assert "stopped by SIGTERM after step" in run.said() and "Traceback" not in run.said()

        run.wait_for(lambda: at(run, 1, "backward"), "backward on rank 1")
        pid = run.signal(1, signal.SIGSTOP)
        words = rf"rank 1 \(.*, pid {pid}\) has been in stage .* of step \d+ for (\d+) s and does not respond"
        named = run.wait_for(lambda: re.search(words, run.said()), "name of the stopped rank")
        assert run.ranks()[1] == pid and 3 <= int(named[1]) < 12  # the watchdog has not fired
        assert run.end() == 0, run.said()
    assert (run.folder / "hang_rank_0.txt").stat().st_size
    assert differences(run.folder, undisturbed) == []


def test_two_hosts_survive_a_cut_link(recipe, tmp_path):
    if reason := why_not():
        pytest.skip(reason)
    args = [*recipe, "dist.shard=host", "dist.hang_s=3", "dist.timeout_s=6"]
    with Hosts() as hosts:
        both(hosts, tmp_path / "undisturbed", args)
        said = both(hosts, tmp_path / "cut", args, cut_s=12)
    assert all("Timed out waiting" in text for text in said)
    assert differences(tmp_path / "cut", tmp_path / "undisturbed") == []
