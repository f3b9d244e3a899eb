"""Checkpoints of one process: whole or absent, verified, and the newest and the best are kept."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from ranks import on_disk_of
from small import small_model, small_recipe

from nanolmmr1.errors import UserError
from nanolmmr1.run import checkpoint, manifest, run_folder
from nanolmmr1.run.trainer import Progress
from nanolmmr1.schema import Checkpoint
from nanolmmr1.update.policy import Policy

REPOSITORY = Path(__file__).resolve().parents[1]


def make_policy(**changes):
    cfg = small_recipe(changes)
    policy = Policy(small_model(), cfg.pack, cfg.optim)
    policy.start_phase(cfg.phases["train"])
    return policy


@pytest.fixture
def policy():
    policy = make_policy()
    learn(policy)
    return policy


def learn(policy):
    for p in policy.trained.values():
        p.grad = torch.randn(p.shape)
    policy.optimizer_step(1e-3, 0.0)


def tensors(policy):
    live = dict(policy.model.named_parameters()) | policy.optimizer_tensors()
    return {name: t.detach().clone() for name, t in live.items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def make(run, keep=2, background=False):
    own = checkpoint.Checkpoints(run, Checkpoint(keep=keep, background=background), note=lambda text: told.append(text))
    own.told = told = []
    return own


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("background", [False, True])
def test_what_is_saved_comes_back(tmp_path, policy, background):
    state = {"phase": "train", "phase_step": 2, "step": 7, "accuracy": {"start": {"text": 0.5}}}
    own = make(tmp_path, background=background)
    own.save(7, policy, state)
    assert own.wait() and own.told == []
    assert own.held_s > 0 and own.write_s > 0
    (folder,) = checkpoint.listed(tmp_path)
    assert folder.name == "step_7" and names(folder) == ["manifest.json", "state.json", "tensors"]
    assert make(tmp_path).newest(Progress) == (Progress(**state), folder)

    other, saved = make_policy(), tensors(policy)
    own.load(folder, other, optimizer=False)
    assert not same(tensors(other), saved) and torch.equal(other.model.head, policy.model.head)
    own.load(folder, other)
    assert same(tensors(other), saved)
    for both in (policy, other):  # and goes on alike
        torch.manual_seed(1)
        learn(both)
    assert same(tensors(other), tensors(policy)) and not same(tensors(other), saved)


def test_a_write_in_the_background_does_not_see_later_updates(tmp_path, policy, monkeypatch):
    own, saved = make(tmp_path, background=True), tensors(policy)
    changed, write_data = threading.Event(), manifest.Writer.write_data

    def held_back(*args):
        assert changed.wait(60)
        return write_data(*args)

    monkeypatch.setattr(manifest.Writer, "write_data", held_back)
    own.save(1, policy, {"step": 1})
    assert checkpoint.listed(tmp_path) == []
    learn(policy)
    changed.set()
    assert own.wait() and not same(tensors(policy), saved)
    own.load(own.newest(Progress)[1], policy)
    assert same(tensors(policy), saved)


def test_the_next_save_waits_for_the_one_before(tmp_path, policy):
    own = make(tmp_path, background=True)
    for step in range(1, 6):
        own.save(step, policy, {"step": step})
        assert step == 1 or tmp_path / "checkpoints" / f"step_{step - 1}" in checkpoint.listed(tmp_path)
    assert own.wait() and [f.name for f in checkpoint.listed(tmp_path)] == ["step_5", "step_4"]


def test_what_breaks_in_the_background_is_raised_where_it_is_waited_for(tmp_path, policy, monkeypatch):
    own = make(tmp_path, background=True)
    monkeypatch.setattr(manifest, "seal", lambda path: 1 / 0)
    own.save(1, policy, {"step": 1})
    with pytest.raises(checkpoint.dcp.CheckpointException, match="division by zero"):
        own.save(2, policy, {"step": 2})
    assert names(tmp_path / "checkpoints") == []


def test_the_newest_are_kept_by_number_and_not_by_name(tmp_path, policy):
    own = make(tmp_path)
    for step in (8, 9, 10, 11):
        own.save(step, policy, {"step": step})
    assert names(tmp_path / "checkpoints") == ["step_10", "step_11"]
    assert [folder.name for folder in checkpoint.listed(tmp_path)] == ["step_11", "step_10"]


def test_the_best_is_kept_beside_the_newest(tmp_path, policy):
    kept = {}
    for step, score in enumerate([0.1, 0.5, None, 0.5, 0.2, 0.3, 0.5, 0.9, None, 0.0], 1):
        make(tmp_path).save(step, policy, {"step": step}, score)
        kept[step] = sorted(int(folder.name[5:]) for folder in checkpoint.listed(tmp_path))
    assert kept == {1: [1], 2: [1, 2], 3: [2, 3], 4: [3, 4], 5: [4, 5], 6: [4, 5, 6], 7: [6, 7], 8: [7, 8], 9: [8, 9],
                    10: [8, 9, 10]}


def test_a_checkpoint_may_be_rated_later(tmp_path, policy):
    own = make(tmp_path, keep=1)
    own.save(1, policy, {"step": 1})
    own.save(1, policy, {"step": 1}, 0.9)
    for step in (2, 3):
        own.save(step, policy, {"step": step}, 0.5)
    own.wait()
    assert names(tmp_path / "checkpoints") == ["scores.json", "step_1", "step_3"]


def test_unfinished_folders_and_strangers_are_not_checkpoints(tmp_path, policy):
    assert make(tmp_path).newest(Progress) == (None, None)
    make(tmp_path).save(1, policy, {"step": 1})
    for name in ("step_2.tmp", "step_x", "step_", "notes"):
        shutil.copytree(tmp_path / "checkpoints" / "step_1", tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints" / "step_4").write_text("a file")
    own = make(tmp_path)
    progress, folder = own.newest(Progress)
    assert progress.step == 1 and folder.name == "step_1" and own.told == []
    assert names(tmp_path / "checkpoints") == ["notes", "step_", "step_1", "step_4", "step_x"]  # no step_2.tmp


def test_a_step_keeps_the_checkpoint_it_has(tmp_path, policy):
    own = make(tmp_path, keep=1)
    own.save(1, policy, {"step": 1})
    inode = (tmp_path / "checkpoints" / "step_1").stat().st_ino
    own.save(1, policy, {"step": 2})
    assert (tmp_path / "checkpoints" / "step_1").stat().st_ino == inode
    assert own.wait() and own.told == [] and own.newest(Progress)[0].step == 1


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def shard(folder):
    (path,) = (folder / "tensors").iterdir()
    return path


DAMAGE = {  # what happens to a checkpoint, and words of the complaint
    "truncated": (lambda f: os.truncate(shard(f), 1000), r"safetensors has 1000 bytes and was written with \d+"),
    "flipped in a tensor": (lambda f: flip(shard(f), -1), "safetensors does not hold what was written"),
    "flipped in a header": (lambda f: flip(shard(f), 20), "safetensors does not hold what was written"),
    "missing shard": (lambda f: shard(f).unlink(), "safetensors is missing"),
    "missing tensors": (lambda f: shutil.rmtree(f / "tensors"), "safetensors is missing"),
    "state flipped": (lambda f: flip(f / "state.json", 3), "state.json does not hold what was written"),
    "state empty": (lambda f: (f / "state.json").write_text(""), "state.json has 0 bytes"),
    "state missing": (lambda f: (f / "state.json").unlink(), "state.json is missing"),
    "manifest missing": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest torn": (lambda f: os.truncate(f / "manifest.json", 100), "manifest.json cannot be read"),
    "manifest of bytes": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json cannot be read"),
    "manifest a list": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    "manifest altered": (lambda f: flip(f / "manifest.json", (f / "manifest.json").read_bytes().index(b"float32")),
                         "manifest.json does not hold what was written"),
    "another's shard": (lambda f: shutil.copy(shard(f.with_name("step_1")), f / "tensors" / "a.safetensors"),
                        "tensors/a.safetensors was not written with it"),
    "empty": (lambda f: [shutil.rmtree(f), f.mkdir()], "manifest.json is missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(tmp_path, policy, name):
    own = make(tmp_path)
    own.save(1, policy, {"step": 1})
    saved = tensors(policy)
    learn(policy)
    own.save(2, policy, {"step": 2})
    damage, words = DAMAGE[name]
    damage(tmp_path / "checkpoints" / "step_2")
    own = make(tmp_path)
    progress, folder = own.newest(Progress)
    assert progress.step == 1
    (note,) = own.told
    assert re.search(f"step_2 is damaged: .*{words}", note), note
    own.load(folder, policy)
    assert same(tensors(policy), saved)
    assert names(tmp_path / "checkpoints") == ["step_1", "step_2.damaged"]
    own.save(2, policy, {"step": 2})  # its name is free again
    assert make(tmp_path).newest(Progress)[0].step == 2


def test_all_damaged_ones_are_passed_over_and_kept(tmp_path, policy):
    own = make(tmp_path, keep=3)
    for step in (1, 2, 3):
        own.save(step, policy, {"step": step})
        shard(tmp_path / "checkpoints" / f"step_{step}").unlink()
    (tmp_path / "checkpoints" / "step_3.damaged").mkdir()
    with pytest.raises(UserError, match="no whole checkpoint left .*step_3: .*choose another output"):
        own.newest(Progress)  # to begin anew here would write over what the run has left
    assert ["step_3" in own.told[0], "step_2" in own.told[1], "step_1" in own.told[2]] == [True] * 3
    assert names(tmp_path / "checkpoints") == ["step_1.damaged", "step_2.damaged", "step_3.damaged", "step_3.damaged2"]


def test_another_version_is_refused_and_not_called_damaged(tmp_path, policy, monkeypatch):
    own = make(tmp_path)
    own.save(1, policy, {"step": 1})

    @dataclasses.dataclass
    class Later:
        stride: int = 0

    with pytest.raises(UserError, match="step_1 was written by another version .*'step'"):
        own.newest(Later)
    monkeypatch.setattr(manifest, "FORMAT", 9)
    with pytest.raises(UserError, match="step_1 was written by another version .*its format is 2, not 9"):
        own.newest(Progress)
    assert names(tmp_path / "checkpoints") == ["step_1"]


def test_another_model_or_recipe_is_refused_by_its_first_tensor_that_differs(tmp_path, policy):
    own = make(tmp_path)
    own.save(1, policy, {"step": 1})
    folder = checkpoint.listed(tmp_path)[0]
    frozen = make_policy(freeze=["vision"])
    with pytest.raises(UserError, match="step_1 is of another model or recipe: optimizer/visual.*absent here"):
        own.load(folder, frozen)
    before = tensors(frozen)
    half = make_policy()
    half.model.visual.patch_embed.proj.to(torch.bfloat16)
    with pytest.raises(UserError, match=r"model/visual.patch_embed.proj.weight is float32 \[16, 3, 2, 14, 14\] there "
                                        "and bfloat16"):
        own.load(folder, half)
    del half.model.visual.patch_embed
    with pytest.raises(UserError, match="model/visual.patch_embed.proj.weight is .* there and absent here"):
        own.load(folder, half, optimizer=False)
    half.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="another model or recipe"):
        own.load(folder, half, optimizer=False)
    assert same(before, tensors(frozen))  # nothing was read before the refusal
    own.load(folder, frozen, optimizer=False)  # a phase's end needs no more


class Killed(BaseException):
    pass


@pytest.mark.parametrize("error, raised", [(OSError(28, "No space left"), checkpoint.DiskError), (Killed, Killed)])
def test_a_failure_in_the_middle_leaves_the_old_folder_whole(tmp_path, error, raised):
    folder = tmp_path / "model"
    checkpoint.write_folder(folder, lambda path: (path / "a").write_text("old"))

    def write(path):
        (path / "a").write_text("new")
        raise error

    with pytest.raises(raised):
        checkpoint.write_folder(folder, write)
    assert (folder / "a").read_text() == "old"
    checkpoint.write_folder(folder, lambda path: (path / "b").write_text("newest"))
    assert names(tmp_path) == ["model"] and names(folder) == ["b"]


def test_an_old_checkpoint_that_cannot_be_deleted_is_told(tmp_path, policy, monkeypatch):
    own = make(tmp_path, keep=1)
    own.save(1, policy, {"step": 1})
    remove = shutil.rmtree

    def stuck(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(16, "Device or resource busy", str(path))
        remove(path, ignore_errors=True)

    monkeypatch.setattr(shutil, "rmtree", stuck)
    own.save(2, policy, {"step": 2})
    assert own.wait() and len(own.told) == 1 and "an old checkpoint cannot be deleted" in own.told[0]
    monkeypatch.undo()
    assert own.newest(Progress)[0].step == 2 and names(tmp_path / "checkpoints") == ["step_2"]


FILL_UP = """
import resource
import subprocess
import sys
import threading
from pathlib import Path
from nanolmmr1.run import checkpoint
from nanolmmr1.schema import Checkpoint
from test_checkpoint import learn, make_policy

run, how, policy, notes = Path(sys.argv[1]), sys.argv[2], make_policy(), []
learn(policy)
checkpoints = checkpoint.Checkpoints(run, Checkpoint(background=True), notes.append)
checkpoints.save(1, policy, {"step": 1})
print(checkpoints.wait())
if how == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
elif how == "read-only":
    subprocess.run(["mount", "-o", "remount,ro", run.parent], check=True)
else:
    (run / "ballast").write_bytes(bytes(int(how)))
checkpoints.save(2, policy, {"step": 2})
print(checkpoints.wait(), *notes)
print(sorted(path.name for path in (run / "checkpoints").iterdir()))
"""


def run_code(code, *args, prefix=()):
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [*prefix, sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("how, words", [(300_000, "No space left"), ("read-only", "Read-only file system")])
def test_a_disk_that_takes_no_more_leaves_the_last_good_checkpoint(tmp_path, how, words):
    disk = tmp_path / "disk"
    said = run_code(FILL_UP, disk / "run", how, prefix=on_disk_of(1, disk)).splitlines()
    assert said[0] == "True" and said[1].startswith("False no checkpoint at step 2, the last good one stays")
    assert "step_2 cannot be written" in said[1] and words in said[1] and said[2] == "['step_1']"


def test_a_file_that_grows_too_large_leaves_the_last_good_checkpoint(tmp_path):
    said = run_code(FILL_UP, tmp_path / "run", "limit").splitlines()
    assert said[0] == "True" and "File too large" in said[1] and said[2] == "['step_1']"


def test_a_file_where_the_folder_belongs_is_told(tmp_path, policy):
    (tmp_path / "checkpoints").write_text("")
    own = make(tmp_path)
    own.save(1, policy, {"step": 1})
    assert not own.wait() and len(own.told) == 1
    assert "no checkpoint at step 1" in own.told[0] and "cannot be written" in own.told[0]


HOLD = """
import sys
import threading
from pathlib import Path
from nanolmmr1.run import run_folder
with run_folder.locked(Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `tmp_path / "run"`."""
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdin=-1, stdout=-1, env=env) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_run_folder_belongs_to_one_process(tmp_path, holder):
    with pytest.raises(UserError, match="another process is writing"), run_folder.locked(tmp_path / "run"):
        pass
    holder.kill()  # a killed holder leaves no lock behind
    holder.wait()
    with run_folder.locked(tmp_path / "run"):
        pass


def test_a_restarted_run_waits_for_its_forerunner_and_no_longer(tmp_path, holder, monkeypatch):
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "1")):  # as torchrun starts it
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(run_folder, "LOCK_WAIT_S", 0.2)
    with pytest.raises(UserError, match="another process is writing"), run_folder.locked(tmp_path / "run"):
        pass
    monkeypatch.setattr(run_folder, "LOCK_WAIT_S", 60.0)
    pauses = []

    def pause(seconds):
        pauses.append(seconds)
        holder.kill()
        holder.wait()

    monkeypatch.setattr(run_folder.time, "sleep", pause)
    with run_folder.locked(tmp_path / "run"):
        assert len(pauses) == 1


def test_an_output_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot be written"), run_folder.locked(run):
            pass


def test_errors_of_the_work_under_the_lock_are_its_own(tmp_path):
    with pytest.raises(PermissionError, match="not yours"), run_folder.locked(tmp_path):
        raise PermissionError("not yours")


def test_the_manifest_names_all_that_a_policy_is_made_of(tmp_path, policy):
    make(tmp_path).save(1, policy, {"step": 1}, score=0.5)
    told = json.loads((tmp_path / "checkpoints" / "step_1" / "manifest.json").read_text())
    moments = {f"optimizer/{name}/{key}" for name in policy.trained for key in ("step", "exp_avg", "exp_avg_sq")}
    assert set(told["tensors"]) == moments | {f"model/{name}" for name, _ in policy.model.named_parameters()}
    assert told["tensors"]["model/model.embed_tokens.weight"] == ["float32", [48, 32]]
    assert (told["format"], told["step"], told["ranks"], told["score"]) == (2, 1, 1, 0.5)
    assert told["recipe"] == "" and told["rows"] == {}  # which a run fills in


def test_a_checkpoint_of_many_files_comes_back(tmp_path, policy, monkeypatch):
    monkeypatch.setattr(manifest, "FILE_BYTES", 50_000)
    own, saved = make(tmp_path), tensors(policy)
    own.save(1, policy, {"step": 1})
    folder = own.newest(Progress)[1]
    sizes = [path.stat().st_size for path in (folder / "tensors").iterdir()]
    largest = max(t.nbytes for t in saved.values())
    assert len(sizes) > 5 and max(sizes) < 50_000 + largest + 10_000  # a file ends with what crosses the line
    learn(policy)
    own.load(folder, policy)
    assert same(tensors(policy), saved)
