"""Checkpoints of several ranks: whole or absent, and the same for any number of ranks."""

import json
from pathlib import Path

import pytest
import ranks_checkpoint as tasks
from ranks import launch, on_disk_of, results
from safetensors import safe_open

SCRIPT = Path(tasks.__file__)
names = tasks.names


def test_a_run_goes_on_with_any_number_of_ranks(tmp_path):
    """Plain, 2 ranks, 4 ranks as 2 hosts of 2, plain, 4 ranks, a sharded one alone, plain."""
    gold = tasks.go_on(tmp_path / "gold", steps="7")["state"]
    run = tmp_path / "run"
    tasks.go_on(run)
    on_two = results(2, SCRIPT, "go_on", run)
    hosts = results(4, SCRIPT, "go_on", run, "host", hosts=2)
    check_files(run / "checkpoints" / "step_3", 4)  # replicas share the work
    plain = tasks.go_on(run)
    on_four = results(4, SCRIPT, "go_on", run)
    alone = results(1, SCRIPT, "go_on", run)
    last = tasks.go_on(run)
    walk = [*on_two, *hosts, plain, *on_four, *alone, last]
    assert [turn["began"] for turn in walk] == [1, 1, 2, 2, 2, 2, 3, 4, 4, 4, 4, 5, 6]
    assert all(turn["notes"] == [] for turn in walk)
    assert on_two[0]["state"] == on_two[1]["state"] != last["state"]
    assert last["state"] == gold
    assert names(run / "checkpoints") == ["step_6", "step_7"]


def test_the_trainers_own_policy_goes_on_sharded_and_whole(tmp_path):
    gold = [tasks.trained(tmp_path / "gold") for _ in range(3)]
    first, (second, other), third = (tasks.trained(tmp_path / "run"), results(2, SCRIPT, "trained", tmp_path / "run"),
                                     tasks.trained(tmp_path / "run"))
    assert [first, second, third] == gold and second == other
    assert gold[0] != gold[1] != gold[2]


def check_files(folder, ranks):
    """Nothing but JSON and safetensors, of which every rank has one, with every number once."""
    held = {}
    assert names(folder) == ["manifest.json", "state.json", "tensors"]
    for name in ("manifest.json", "state.json"):
        json.loads((folder / name).read_text())
    assert len(names(folder / "tensors")) == ranks
    for path in (folder / "tensors").iterdir():
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118, safe_open is no mapping
                held[name] = held.get(name, 0) + shard.get_tensor(name).numel()
    policy = tasks.Policy()
    ours = {f"model/{name}": p for name, p in policy.model.named_parameters()}
    ours |= {f"optimizer/{name}": t for name, t in policy.optimizer_tensors().items()}
    assert held == {name: t.numel() for name, t in ours.items()}


def test_a_background_write_equals_one_in_the_foreground(tmp_path):
    for rank in results(2, SCRIPT, "background", tmp_path):
        held_s, write_s = rank.pop("seconds")
        print(f"\nstaging {held_s:.4f} s, writing {write_s:.4f} s")
        assert rank == {"writing": True, "stands": True, "back": [True, True]}
        assert held_s > 0 and write_s > 0


@pytest.mark.parametrize("how", ["foreground", "background"])
def test_a_full_disk_of_two_ranks_ends_no_training(tmp_path, how):
    prefix, disk = on_disk_of(6, tmp_path / "disk"), tmp_path / "disk"
    main, other = results(2, SCRIPT, "full_disk", disk / "run", 4_200_000, how, prefix=prefix)
    assert main["stands"] == other["stands"] == [True, False, True]
    (note,) = main["notes"]
    assert "no checkpoint at step 2, the last good one stays" in note and "No space left" in note
    assert main["after"] == ["step_1"] and main["end"] == ["step_1", "step_3"] and other["notes"] == []


@pytest.mark.parametrize("victim, moment, left", [
    (1, "seal", ["step_1", "step_2.tmp"]),  # its shards are written, not hashed
    (0, "write", ["step_1", "step_2.tmp"]),  # all shards are whole, the manifest is missing
    (0, "deleting", ["step_1.tmp", "step_2"]),
])
def test_a_rank_killed_amid_a_write_leaves_no_half_checkpoint(tmp_path, victim, moment, left):
    done = launch(2, SCRIPT, "die", tmp_path, victim, moment)
    assert done[victim][0] == -9 and (moment == "deleting" or done[1 - victim][0] > 0)
    assert names(tmp_path / "checkpoints") == left
    began = 2 if "step_2" in left else 1
    again = tasks.go_on(tmp_path)
    assert again["began"] == began and again["notes"] == []
    assert again["state"] == tasks.go_on(tmp_path / "gold", steps=str(began + 1))["state"]
    assert names(tmp_path / "checkpoints") == [f"step_{n}" for n in range(began, began + 2)]


def test_all_ranks_find_the_damage_that_one_of_them_reads(tmp_path):
    results(2, SCRIPT, "go_on", tmp_path, "all", 3)
    folder = tmp_path / "checkpoints" / "step_3"
    files = sorted((folder / "tensors").iterdir(), key=lambda path: -path.stat().st_size)
    data = bytearray(files[1].read_bytes())  # the second largest is verified by rank 1
    data[-1] ^= 1
    files[1].write_bytes(data)
    main, other = results(2, SCRIPT, "go_on", tmp_path, "all", 2)
    assert main["began"] == other["began"] == 2
    (note,) = main["notes"]
    assert files[1].name in note and "its hash differs" in note and "step_3.damaged" in note
    assert main["state"] == tasks.go_on(tmp_path / "gold", steps="4")["state"]
    assert names(tmp_path / "checkpoints") == ["step_3", "step_3.damaged", "step_4"]


def test_another_model_is_refused_by_all_ranks(tmp_path):
    tasks.go_on(tmp_path)
    said = results(2, SCRIPT, "load_other", tmp_path)
    assert said[0] == said[1] and "model/block.three is float32 [3, 5] there and float32 [3, 6] here" in said[0]


def test_a_folder_of_all_ranks_is_whole_or_as_it_was(tmp_path):
    run = tmp_path / "run"
    for disk, (left, made), lock in results(3, SCRIPT, "folders", run):
        assert f"{run}/made cannot be written" in disk and "No space left" in disk
        assert left == [".lock", ".nanolmmr1", "made"] and made == {f"of_{rank}": "good" for rank in range(3)}
        assert "file cannot be written, as it is a file" in lock
