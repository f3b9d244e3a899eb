"""Checkpoints are whole or absent, whatever happens while one is written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import small_model, small_recipe

from nanolmmr1 import checkpoint, weights
from nanolmmr1.config import UserError
from nanolmmr1.policy import Policy
from nanolmmr1.trainer import Progress

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL_CONFIG = {
    "model_type": "qwen2_5_vl", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 48, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "tie_word_embeddings": True, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "vision_config": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [0]},
}


@pytest.fixture
def source(tmp_path):
    """The folder that the model is said to come from."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL_CONFIG))
    return folder


@pytest.fixture
def policy():
    cfg = small_recipe()
    policy = Policy(small_model(), cfg)
    policy.start_phase(cfg.phases["train"])
    for p in policy.trained.values():
        p.grad = torch.ones_like(p)
    policy.apply(1e-3, 0.0)
    return policy


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back(tmp_path, source, policy):
    state = {"phase": "train", "phase_step": 2, "step": 7, "accuracy": {"start": {"text": 0.5}}}
    checkpoint.save(tmp_path, 7, policy, state, source, keep=2)
    (folder,) = checkpoint.listed(tmp_path)
    assert folder.name == "step_7" and names(folder) == ["model", "optimizer.safetensors", "state.json"]
    assert checkpoint.read_state(folder, Progress) == Progress(**state)

    other = Policy(weights.load(folder / "model"), policy.cfg)
    other.start_phase(policy.cfg.phases["train"])
    checkpoint.load_optimizer(folder, other)
    ours, theirs = ({**dict(p.model.named_parameters()), **p.optimizer_tensors()} for p in (policy, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_newest_are_kept_by_number_and_not_by_name(tmp_path, source, policy):
    for step in (8, 9, 10, 11):
        checkpoint.save(tmp_path, step, policy, {"step": step}, source, keep=2)
    assert names(tmp_path / "checkpoints") == ["step_10", "step_11"]
    assert [folder.name for folder in checkpoint.listed(tmp_path)] == ["step_11", "step_10"]


def test_unfinished_folders_and_strangers_are_not_checkpoints(tmp_path, source, policy):
    assert checkpoint.listed(tmp_path) == []
    checkpoint.save(tmp_path, 1, policy, {"step": 1}, source, keep=2)
    for name in ("step_2.tmp", "step_x", "step_", "notes"):
        shutil.copytree(tmp_path / "checkpoints" / "step_1", tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints" / "step_3").mkdir()
    (tmp_path / "checkpoints" / "step_4").write_text("a file")
    assert [folder.name for folder in checkpoint.listed(tmp_path)] == ["step_1"]


def test_a_step_keeps_the_checkpoint_it_has(tmp_path, source, policy):
    checkpoint.save(tmp_path, 1, policy, {"step": 1}, source, keep=1)
    inode = (tmp_path / "checkpoints" / "step_1").stat().st_ino
    checkpoint.save(tmp_path, 1, policy, {"step": 2}, source, keep=1)
    assert (tmp_path / "checkpoints" / "step_1").stat().st_ino == inode


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


@pytest.mark.parametrize("name, content", [
    ("state.json", b""), ("state.json", b"[]"), ("state.json", b'{"step": 1'), ("state.json", b'{"nonsense": 1}'),
    ("state.json", b"\xff\xfe"), ("optimizer.safetensors", b"torn"), ("optimizer.safetensors", None),
])
def test_a_damaged_checkpoint_is_named_with_the_cure(tmp_path, source, policy, name, content):
    checkpoint.save(tmp_path, 1, policy, {"step": 1}, source, keep=1)
    folder = tmp_path / "checkpoints" / "step_1"
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=r"step_1.* cannot be .*delete"):
        checkpoint.read_state(folder, Progress)
        checkpoint.load_optimizer(folder, policy)


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path, source, policy):
    checkpoint.save(tmp_path, 1, policy, {"step": 1}, source, keep=1)
    del policy.trained["model.norm.weight"]
    with pytest.raises(UserError, match="model.norm.weight"):
        checkpoint.load_optimizer(tmp_path / "checkpoints" / "step_1", policy)


FILL_UP = """
import resource
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from nanolmmr1 import checkpoint
from small import small_model, small_recipe
from nanolmmr1.policy import Policy

cfg, run, source = small_recipe(), Path(sys.argv[3]), Path(sys.argv[4])
policy = Policy(small_model(), cfg)
policy.start_phase(cfg.phases["train"])
checkpoint.save(run, 1, policy, {"step": 1}, source, keep=1)
if sys.argv[5] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
else:
    (run / "ballast").write_bytes(bytes(int(sys.argv[5])))
try:
    checkpoint.save(run, 2, policy, {"step": 2}, source, keep=1)
except checkpoint.DiskError as error:
    print(error)
print(sorted(path.name for path in (run / "checkpoints").iterdir()))
"""


def run_on_disk_of(megabytes, disk, *args):
    """A script on a real small disk, mounted in a namespace of its own; skips where that is not allowed."""
    mount = f'mount -t tmpfs -o size={megabytes}M tmpfs "{disk}" && exec "$@"'
    prefix = ["unshare", "-rm", "sh", "-c", mount, "sh"]
    disk.mkdir()
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs unshare and user namespaces")
    return run(*prefix, sys.executable, *args)


def run(*command):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, check=True).stdout


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, source):
    disk = tmp_path / "disk"
    said = run_on_disk_of(1, disk, "-c", FILL_UP, REPOSITORY, REPOSITORY / "tests", disk, source, 850_000)
    assert "No space left" in said and "step_2 cannot be written" in said
    assert said.endswith("['step_1']\n")


def test_a_file_that_grows_too_large_leaves_the_last_good_checkpoint(tmp_path, source):
    said = run(sys.executable, "-c", FILL_UP, REPOSITORY, REPOSITORY / "tests", tmp_path, source, "limit")
    assert "File too large" in said and "step_2 cannot be written" in said
    assert said.endswith("['step_1']\n")


def test_a_run_folder_belongs_to_one_process(tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[1])\nfrom pathlib import Path\nfrom nanolmmr1 import checkpoint\n"
            "with checkpoint.locked(Path(sys.argv[2])):\n    print('held', flush=True)\n    input()\n")
    with subprocess.Popen([sys.executable, "-c", code, REPOSITORY, tmp_path / "run"], stdin=-1, stdout=-1) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another process is writing"), checkpoint.locked(tmp_path / "run"):
            pass
        holder.kill()  # a killed holder leaves no lock behind
        holder.wait()
        with checkpoint.locked(tmp_path / "run"):
            pass


def test_an_output_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot be written"), checkpoint.locked(run):
            pass


def test_errors_of_the_work_under_the_lock_are_its_own(tmp_path):
    with pytest.raises(PermissionError, match="not yours"), checkpoint.locked(tmp_path):
        raise PermissionError("not yours")


def test_the_moments_are_named_after_their_parameters(tmp_path, source, policy):
    checkpoint.save(tmp_path, 1, policy, {"step": 1}, source, keep=1)
    stored = load_file(tmp_path / "checkpoints" / "step_1" / "optimizer.safetensors")
    assert set(stored) == {f"{name}/{key}" for name in policy.trained for key in ("step", "exp_avg", "exp_avg_sq")}
