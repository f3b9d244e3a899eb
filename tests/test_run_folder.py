"""A run owns its folder and no other, and a resumed run says what has changed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from test_run import SMALL, run_here, sums, write_rows  # noqa: F401, a fixture

from nanolmmr1 import config
from nanolmmr1.errors import UserError
from nanolmmr1.report.logs import read_lines
from nanolmmr1.run import checkpoint, manifest, run_folder, setup
from nanolmmr1.run.run_folder import MARK, REPLACED, changes, check_sources, claim


def tree(folder):
    """What lies in a folder: path -> bytes, target of a link, or None for a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = kind
    return found


def foreign_file(at, name="notes.txt"):
    at.mkdir()
    (at / name).write_text("mine")
    return at


def link_to_files(at):
    foreign_file(at.with_name("elsewhere"))
    at.symlink_to(at.with_name("elsewhere"))
    return at


def in_a_run(at, inside):
    (at / inside).mkdir(parents=True)
    (at / MARK).touch()
    return at / inside / "more"


FOREIGN = {
    "a file of another": foreign_file,
    "a hidden file alone": lambda at: foreign_file(at, ".profile"),
    "metrics of another program": lambda at: foreign_file(at, "metrics.jsonl"),
    "an empty folder inside": lambda at: (at / "sub").mkdir(parents=True) or at,
    "a folder of the mark's name": lambda at: (at / MARK).mkdir(parents=True) or at,
    "a link to a folder in use": link_to_files,
    "a file": lambda at: at.write_text("mine") and at,
    "a link to nothing": lambda at: at.symlink_to("gone") or at,
    "a run's model": lambda at: in_a_run(at, "model"),
    "a run's checkpoints": lambda at: in_a_run(at, "checkpoints/step_1"),
    "a run's world": lambda at: in_a_run(at, "world"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_that_is_not_ours_is_refused_and_not_touched(tmp_path, name):
    run = FOREIGN[name](tmp_path / "here")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="output="), run_folder.locked(run):
        pass
    assert tree(tmp_path) == before


def test_an_empty_or_new_folder_becomes_a_runs_and_stays_one(tmp_path):
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    for run in (tmp_path / "new" / "deep", tmp_path, tmp_path / "disk"):
        if run == tmp_path:
            run = tmp_path / "empty"
            run.mkdir()
        for _ in range(2):
            with run_folder.locked(run):
                (run / "metrics.jsonl").touch()
        assert (run / MARK).is_file()
    with run_folder.locked(tmp_path / "new" / "deep" / "another"):  # inside a run, and nothing of it is replaced
        pass


@pytest.mark.parametrize("key", ["model", "phases.train.data", "evaluate.tasks.t.data", "reward.functions"])
@pytest.mark.parametrize("inside", ["", "/../run", *(f"/{name}/x" for name in REPLACED)])
def test_what_a_run_reads_may_not_lie_where_it_replaces(tmp_path, key, inside):
    place = f"{tmp_path / 'run'}{inside}"
    value = {"evaluate.tasks.t.data": f"evaluate.tasks.t={{data: {place}}}",
             "reward.functions": f'reward.functions={{"{place}:f": 1.0}}'}.get(key, f"{key}={place}")
    cfg = config.load("single", ["model=m", "phases.train.data=d", f"output={tmp_path / 'run'}", value])
    with pytest.raises(UserError, match=f"{key}=.* lies in output="):
        check_sources(cfg)


def test_a_run_may_read_what_another_has_left_and_what_lies_beside_its_own(tmp_path):
    other, own = tmp_path / "other" / "model", tmp_path / "run" / "world" / "rows.jsonl"
    cfg = config.load("single", [f"model={other}", f"phases.train.data={own}@train", f"output={tmp_path / 'run'}"])
    check_sources(cfg)
    check_sources(config.load("single", ["model=Qwen/Qwen2.5-VL-3B-Instruct", "phases.train.data=owner/name@train"]))


@pytest.mark.parametrize("target", ["folder", "file"])
def test_a_link_in_place_of_what_a_run_replaces_loses_its_target_nothing(tmp_path, target):
    mine = foreign_file(tmp_path / "mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(mine if target == "folder" else mine / "notes.txt")
    before = tree(mine)
    for _ in range(2):
        checkpoint.write_folder(tmp_path / "run" / "model", lambda folder: (folder / "made").write_text("new"))
    assert tree(mine) == before and tree(tmp_path / "run") == {"model": None, "model/made": b"new"}


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_that_a_run_leaves_have_the_permissions_that_the_user_gives_files(tmp_path, umask, mode):
    def write(folder):
        (folder / "model.safetensors").touch(0o600)

    before = os.umask(umask)
    try:
        checkpoint.write_folder(tmp_path / "model", write)
    finally:
        os.umask(before)
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == mode


def test_changes_are_told_key_by_key():
    def recipe(way, gpus, lr, functions):
        return {"seed": 0, "resume": way, "output": way, "plan": {"gpus": gpus},
                "phases": {"a": {"lr": lr, "freeze": []}}, "reward": {"functions": functions}}  # fmt: skip

    old, new = recipe("auto", 1, 1e-6, {}), recipe("changed", 8, 1e-5, {"f.py:f": 1.0})
    found = changes(yaml.safe_dump(old), yaml.safe_dump(new))
    assert sorted(map(str, found)) == sorted(map(str, [
        ("phases.a.lr", 1e-6, 1e-5), ("reward.functions.f.py:f", "absent", 1.0)]))
    assert changes(yaml.safe_dump(new), yaml.safe_dump(new)) == []


@pytest.fixture(scope="module")
def home(small_model, tmp_path_factory):
    """A folder with rows.jsonl and `out`, a run of one of two steps: (folder, arguments)."""
    from test_run import finish, start

    home = tmp_path_factory.mktemp("home")
    write_rows(home / "rows.jsonl", sums(6))
    args = ["single", f"model={small_model}", "phases.train.data=rows.jsonl", "output=out", "reward.workers=1", *SMALL]
    finish(start([*args, "phases.train.steps=1"], cwd=home))
    return home, args


@pytest.fixture
def again(home, run_here, tmp_path, monkeypatch):  # noqa: F811
    """A copy of `home`, and a call that goes on with its run: (folder, call)."""
    folder = shutil.copytree(home[0], tmp_path / "home")
    monkeypatch.chdir(folder)
    return folder, lambda *overrides: run_here(*home[1], *overrides)


CHANGED = {
    "phases.train.lr=1e-4": "phases.train.lr was 1e-06, is now 0.0001",
    "phases.train.group_size=4": "phases.train.group_size was 2, is now 4",
    "reward.format_weight=0.1": "reward.format_weight was 0.5, is now 0.1",
    "evaluate.tasks.t={data: rows.jsonl}": "evaluate.tasks.t.data was absent, is now rows.jsonl",
}


@pytest.mark.parametrize("override", CHANGED)
def test_a_resume_tells_what_has_changed_and_keeps_the_old_recipe(again, override):
    folder, resume = again
    before = (folder / "out" / "recipe.yaml").read_bytes()
    status, said, error = resume(override)
    assert status == 0, error
    assert f"since step_1: {CHANGED[override]}" in said and said.count("since step_1") == 2  # and the steps
    assert (folder / "out" / "recipe_until_step_1.yaml").read_bytes() == before
    assert config.load(str(folder / "out" / "recipe.yaml")).phases["train"].steps == 2


def test_an_unchanged_recipe_is_resumed_without_a_word(again):
    folder, resume = again
    assert resume()[0] == 0
    shutil.rmtree(folder / "out" / "model")
    status, said, _ = resume()
    assert status == 0 and "since" not in said
    assert [path.name for path in (folder / "out").glob("recipe*")] == ["recipe.yaml", "recipe_until_step_1.yaml"]


OTHER_ROWS = {
    "other rows at the same path": lambda folder: write_rows(folder / "rows.jsonl", sums(7)[1:]) and [],
    "fewer": lambda folder: write_rows(folder / "rows.jsonl", sums(5)) and [],
    "in another order": lambda folder: write_rows(folder / "rows.jsonl", sums(6)[::-1]) and [],
    "at another path": lambda folder: [f"phases.train.data={write_rows(folder / 'more.jsonl', sums(9))}"],
    "an answer changed": lambda folder: write_rows(
        folder / "rows.jsonl", [row | {"answer": "7"} for row in sums(6)]) and [],
    "fewer fit": lambda folder: ["phases.train.max_prompt_tokens=28"],
}


@pytest.mark.parametrize("name", OTHER_ROWS)
def test_other_rows_are_refused_unless_the_recipe_says_so(again, name):
    folder, resume = again
    if name == "fewer fit":
        write_rows(folder / "rows.jsonl", [*sums(5), {"problem": "How much is it? " * 9, "answer": "3"}])
        shutil.rmtree(folder / "out")
        assert resume("phases.train.steps=1")[0] == 0
    overrides = OTHER_ROWS[name](folder)
    status, _, error = resume(*overrides)
    assert status == 2 and "phases.train has other rows" in error and "resume=changed" in error
    assert not (folder / "out" / "recipe_until_step_1.yaml").exists()
    status, said, error = resume(*overrides, "resume=changed")
    assert status == 0 and "phases.train has other rows" in said, error
    assert [record["step"] for record in read_lines(folder / "out" / "metrics.jsonl")] == [1, 2]


def test_the_same_rows_in_another_place_are_the_same_rows(again):
    folder, resume = again
    (folder / "moved").mkdir()
    (folder / "rows.jsonl").rename(folder / "moved" / "rows.jsonl")
    status, said, error = resume("phases.train.data=moved/rows.jsonl")
    assert status == 0, error
    assert "phases.train.data was rows.jsonl, is now moved/rows.jsonl" in said and "other rows" not in said


def test_pictures_count_as_rows_do(tmp_path):
    from nanolmmr1.data.rows import Row

    def digest(content, name="a.png", as_bytes=False):
        (tmp_path / name).write_bytes(content)
        return setup.hash_rows([Row("p", "a", [content if as_bytes else str(tmp_path / name)])])

    assert digest(b"12") == digest(b"12") and len({
        digest(b"12"), digest(b"123"), digest(b"12", "b.png"), digest(b"12", as_bytes=True),
        digest(b"13", as_bytes=True)}) == 5  # fmt: skip


def test_a_model_that_was_moved_is_gone_on_with_only_if_the_recipe_says_so(again, small_model):
    folder, resume = again
    shutil.copytree(small_model, folder / "moved")
    status, _, error = resume("model=moved")
    assert status == 2 and "not moved" in error and "resume=changed" in error
    assert resume("model=moved", "resume=changed")[0] == 0


def spoil(name, data):
    return lambda out: (out / name).write_bytes(data)


SPOILT = {
    "metrics.jsonl torn": (spoil("metrics.jsonl", b'{"step": 1'), ""),
    "metrics.jsonl garbage": (spoil("metrics.jsonl", b"{oops}\n"), "no records of a step"),
    "metrics.jsonl gone": (lambda out: (out / "metrics.jsonl").unlink(), ""),
    "samples.jsonl garbage": (spoil("samples.jsonl", b"[1]\n\xff\n"), "2 lines are no records"),
    "samples.jsonl of another shape": (
        spoil("samples.jsonl", b'{"step": 1, "phase": "train"}\n'), "report.html could not"),
    "summary.json torn": (spoil("summary.json", b'{"steps": 1'), ""),
    "summary.json a list": (spoil("summary.json", b"[]"), ""),
    "recipe.yaml gone": (lambda out: (out / "recipe.yaml").unlink(), ""),
    "recipe.yaml garbage": (spoil("recipe.yaml", b"\xff\x00: ["), "kept as recipe_until_step_1.yaml"),
    "report.html a folder": (lambda out: (out / "report.html").unlink() or (out / "report.html").mkdir(),
                             "report.html could not be written"),
    "summary.json a folder": (lambda out: (out / "summary.json").unlink() or (out / "summary.json").mkdir(),
                              "summary.json cannot be written"),
    "recipe.yaml a folder": (lambda out: (out / "recipe.yaml").unlink() or (out / "recipe.yaml").mkdir(),
                             "recipe.yaml cannot be written"),
    "metrics.jsonl a folder": (lambda out: (out / "metrics.jsonl").unlink() or (out / "metrics.jsonl").mkdir(),
                               "is no file"),
    "mark garbage": (spoil(MARK, b"\xff" * 9), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_log_summary_or_report_ends_no_run(again, name):
    folder, resume = again
    change, words = SPOILT[name]
    change(folder / "out")
    status, said, error = resume()
    assert status == 0 and not error, error
    assert words in said
    assert (folder / "out" / "model" / "model.safetensors").is_file()


def test_a_model_that_was_deleted_after_the_end_is_exported_anew(again):
    folder, resume = again
    assert resume()[0] == 0
    for spoilt in ("", "model.safetensors", "config.json"):
        kept = (folder / "out" / "model" / "model.safetensors").read_bytes()
        place = folder / "out" / "model" / spoilt
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        status, said, error = resume()
        assert status == 0 and "is finished" not in said, error
        assert (folder / "out" / "model" / "model.safetensors").read_bytes() == kept
    assert "is finished" in resume()[1]


def test_a_checkpoint_holds_its_recipe_and_the_hashes_of_its_rows(home):
    folder, args = home
    found = manifest.read(folder / "out" / "checkpoints" / "step_1")
    assert found["recipe"] == (folder / "out" / "recipe.yaml").read_text()
    assert list(found["rows"]) == ["train"] and len(found["rows"]["train"]) == 64


@pytest.mark.parametrize("content", [b"", b"{oops}", b"[]", b"{}", b'{"config.json": 5}', b"[" * 100_000, None])
def test_a_kl_reference_without_a_readable_seal_is_told_and_used(tmp_path, content):
    kept, seals, notes = tmp_path / "train", tmp_path / "train.json", []
    foreign_file(kept, "config.json")
    if content is not None:
        seals.write_bytes(content)
    assert setup._damage(kept, seals, notes.append) == ""
    assert len(notes) == 1 and "without a check of its hashes" in notes[0]
    assert setup._damage(kept, seals, notes.append) == "" and len(notes) == 1  # sealed again
    (kept / "config.json").write_text("that")
    assert "does not hold what was written" in setup._damage(kept, seals, notes.append)
    shutil.rmtree(kept)
    seals.write_bytes(b"{oops}")
    assert setup._damage(kept, seals, notes.append) == "it is gone"


def test_a_checkpoint_is_due_by_time_as_well(tmp_path, monkeypatch):
    made = checkpoint.Checkpoints(tmp_path, config.load("desk").checkpoint, print)
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: made.last + now[0])
    assert not made.is_old()
    now[0] = 599.0
    assert not made.is_old()
    now[0] = 600.0
    assert made.is_old()
    made.cfg.every_minutes = 0.0
    assert not made.is_old()


def test_a_run_that_names_no_interval_leaves_a_checkpoint_by_time(again):
    folder, resume = again
    status, _, error = resume("phases.train.steps=4", "checkpoint.every_minutes=1e-9", "checkpoint.keep=9")
    assert status == 0, error
    names = {path.name for path in (folder / "out" / "checkpoints").iterdir()}
    assert names == {"step_1", "step_2", "step_3", "step_4"}


def test_claiming_marks_a_folder_before_anything_else_is_in_it(tmp_path):
    claim(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [MARK]
    (tmp_path / "run" / "mine.txt").write_text("kept")
    claim(tmp_path / "run")
    assert json.loads(json.dumps(sorted(path.name for path in Path(tmp_path / "run").iterdir()))) == [MARK, "mine.txt"]
