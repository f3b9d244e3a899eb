"""Every published data set, as it is downloaded: trained on as it is, and prepared."""

import json
import shutil
from pathlib import Path

import published
import pytest

import train
from nanolmmr1.caption import main as caption
from nanolmmr1.config import load, recipes
from nanolmmr1.data.rows import load_rows
from nanolmmr1.prepare.__main__ import main as prepare

pytestmark = pytest.mark.skipif(not published.SOURCES, reason="needs the shared notes")
SHORT = ["phases.train.steps=2", "defaults.prompts_per_step=2", "defaults.group_size=2", "prompt.max_pixels=20000",
         "defaults.max_response_tokens=3", "reward.format=boxed"]  # fmt: skip
READ_AS = {"mathvista_free_form": "mathvista", "mathverse_vision_only": "mathverse", "mathvision_free": "mathvision",
           "geometry3k_hiyouga": "geometry3k", "virl39k_hub_copy": "virl39k", "lmm_r1_message_jsonl": "lmm_r1",
           "lmm_r1_text_jsonl": "lmm_r1", "mm_eureka_jsonl": "mm_eureka", "mathv360k": "llava",
           "llava_conversations": "llava", "verl_parquet": "verl", "math_hendrycks": "math"}  # fmt: skip


def content(row):
    images = [Path(item).read_bytes() if isinstance(item, str) else item for item in row.images]
    return row.problem, row.answer, images, row.options, row.extra


@pytest.mark.parametrize("name", [name for name in published.SOURCES if "sokoban" not in name])
def test_a_published_source_is_trained_on_and_prepared(name, small_model, tmp_path, capsys):
    source, out = published.publish(name, tmp_path / "source"), tmp_path / "rows.jsonl"
    assert train.exit_status(["single", f"model={small_model}", f"output={tmp_path / 'run'}",
                              f"phases.train.data={source}", *SHORT]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert f"rows read as: {READ_AS.get(name, name)}\n" in said and "phases.train: 4 of 4 rows; dropped: none" in said
    prepare(["auto", source, str(out), f"model={small_model}"])
    assert "kept" in capsys.readouterr().out
    raw, made = load_rows(source).rows, load_rows(str(out)).rows
    assert len(made) == 4
    for before, after in zip(raw, made, strict=True):
        assert content(after) == content(before), "written and read again, nothing is lost or added"
    shutil.rmtree(tmp_path / "source")
    assert [content(row) for row in load_rows(str(out)).rows] == [content(row) for row in made], "and it stands alone"


def test_levels_of_sokoban_are_refused_with_the_reason(least, tmp_path, capsys):
    source = published.publish("lmm_r1_sokoban_jsonl", tmp_path / "source")
    assert train.exit_status(["single", f"model={least}", f"output={tmp_path / 'run'}", f"phases.train.data={source}",
                              *SHORT]) == 2  # fmt: skip
    assert "its environment scores the moves; write a reward function" in capsys.readouterr().err


TINY = ["rollout.engine=local", "defaults.steps=1", "defaults.prompts_per_step=2", "defaults.group_size=2",
        "defaults.max_response_tokens=3", "defaults.updates_per_rollout=1", "prompt.min_pixels=3136",
        "prompt.max_pixels=20000", "pack.tokens_per_micro_batch=4096", "checkpoint.every_minutes=0",
        "reward.workers=1"]  # fmt: skip


@pytest.fixture(scope="module")
def home(least, tmp_path_factory):
    """A folder with the files that the recipes of the papers read, made as their first lines say."""
    home = tmp_path_factory.mktemp("home")
    sources = {name: published.publish(name, home / "hub" / name) for name in (
        "deepscaler", "virl39k", "mathvision", "lmm_r1_text_jsonl", "lmm_r1_message_jsonl", "geometry3k_hiyouga")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        prepare(["deepscaler", sources["deepscaler"], "data/deepscaler.jsonl", "--against", sources["mathvision"]])
        prepare(["virl39k", sources["virl39k"], "data/virl39k.jsonl", "--against", sources["mathvision"]])
        caption([str(least), "data/virl39k.jsonl", "data/virl39k_captioned.jsonl", "--recipe", "infi_mmr_3b",
                 "caption.max_tokens=8", "caption.first_temperature=1", *TINY])  # fmt: skip
        prepare(["lmm_r1", sources["lmm_r1_text_jsonl"], "data/lmm_r1_text.jsonl"])
        for name in ("vermulti_geo", "vermulti"):
            prepare(["lmm_r1", sources["lmm_r1_message_jsonl"], f"data/{name}.jsonl"])
        rows = load_rows("data/virl39k_captioned.jsonl").rows
        assert len(rows) == 4 and all(row.caption and row.extra["PassRate_7BBase"] is None for row in rows)
    return home


HUB = {"geometry3k_3b": ("phases.train.data", "evaluate.tasks.geometry3k.data")}  # keys of what is read from the hub
PUBLISHED = [name for name, _ in recipes() if "_3b" in name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_runs_small_from_published_files_through_all_its_phases(name, home, least, tmp_path, monkeypatch,
                                                                         capsys):
    monkeypatch.chdir(home)
    small, phases = [*TINY, f"model={least}", f"output={tmp_path / 'run'}"], load(name).phases
    small += [f"{key}={home}/hub/geometry3k_hiyouga/train.parquet" for key in HUB.get(name, ())]
    for key, phase in phases.items():  # what a phase sets itself has to be set there
        sizes = dict(steps=2, prompts_per_step=2, group_size=2, updates_per_rollout=min(2, phase.updates_per_rollout),
                     max_response_tokens=3)
        small += [f"phases.{key}.{size}={value}" for size, value in sizes.items()]
    assert train.exit_status([name, *small]) == 0
    said = capsys.readouterr().out
    assert all(f"phases.{key}: 4 of 4 rows; dropped: none" in said for key in phases)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["phase"] for step in steps] == [key for key in phases for _ in range(2)]
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    lengths = {phases[step["phase"]].captions: step["prompt_length/mean"] for step in steps
               if "virl39k" in str(phases[step["phase"]].data)}
    assert len(lengths) < 2 or lengths[True] > lengths[False], "where captions are shown, prompts are longer"


def test_a_recipe_without_its_files_says_what_writes_them(least, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.exit_status(["lmm_r1_3b", f"model={least}", "output=run", "rollout.engine=local"]) == 2
    assert "data/lmm_r1_text.jsonl does not exist" in (said := capsys.readouterr().err)
    assert "are written by the commands in its first lines" in said
