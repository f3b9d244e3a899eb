"""Every published data set, as it is downloaded: trained on as it is, and prepared."""

import json
import shutil
from pathlib import Path

import published
import pytest

import train
from nanolmmr1.caption import main as caption
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
def test_a_published_source_is_trained_on_and_prepared(name, least, tmp_path, capsys):
    source, out = published.publish(name, tmp_path / "source"), tmp_path / "rows.jsonl"
    assert train.exit_status(["single", f"model={least}", f"output={tmp_path / 'run'}", f"phases.train.data={source}",
                              *SHORT]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert f"rows read as: {READ_AS.get(name, name)}\n" in said and "phases.train: 4 of 4 rows; dropped: none" in said
    prepare(["auto", source, str(out), f"model={least}"])
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
        "prompt.max_pixels=20000", "pack.tokens_per_micro_batch=4096", "checkpoint.every_minutes=0"]  # fmt: skip


def tiny(phases):
    """Overrides that make a recipe short; what a phase sets itself has to be set there."""
    of_phase = ("steps=1", "prompts_per_step=2", "updates_per_rollout=1")
    return TINY + [f"phases.{name}.{value}" for name in phases for value in of_phase]


def test_infi_mmr_runs_from_published_files_through_captions_and_all_phases(least, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # the recipe's files are in `data`
    text = published.publish("deepscaler", tmp_path / "hub" / "deepscaler")
    images = published.publish("virl39k", tmp_path / "hub" / "virl39k")
    bench = published.publish("mathvision", tmp_path / "hub" / "mathvision")
    prepare(["deepscaler", text, "data/deepscaler.jsonl", "--against", bench])
    prepare(["virl39k", images, "data/virl39k.jsonl", "--against", bench])
    caption([str(least), "data/virl39k.jsonl", "data/virl39k_captioned.jsonl", "--recipe", "infi_mmr_3b",
             "caption.max_tokens=8", "caption.first_temperature=1", *tiny([])])  # fmt: skip
    rows = load_rows("data/virl39k_captioned.jsonl").rows
    assert len(rows) == 4 and all(row.caption and row.extra["PassRate_7BBase"] is None for row in rows)
    phases = ("foundational_reasoning_activation", "cross_modal_reasoning_adaptation",
              "multimodal_reasoning_enhancement")
    assert train.exit_status(["infi_mmr_3b", f"model={least}", "output=run", *tiny(phases)]) == 0
    said = capsys.readouterr().out
    assert all(f"phases.{name}: 4 of 4 rows; dropped: none" in said for name in phases)
    steps = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [step["prompt_length/mean"] for step in steps][1] > [step["prompt_length/mean"] for step in steps][2], \
        "the second phase shows captions, the third hides them"


def test_lmm_r1_runs_from_published_files_through_both_phases(least, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepare(["lmm_r1", published.publish("lmm_r1_text_jsonl", tmp_path / "hub/text"), "data/lmm_r1_text.jsonl"])
    prepare(["lmm_r1", published.publish("lmm_r1_message_jsonl", tmp_path / "hub/geo"), "data/vermulti_geo.jsonl"])
    phases = ("foundational_reasoning_enhancement", "multimodal_generalization_training")
    assert train.exit_status(["lmm_r1_3b", f"model={least}", "output=run", *tiny(phases)]) == 0
    said = capsys.readouterr().out
    assert all(f"phases.{name}: 4 of 4 rows; dropped: none" in said for name in phases)


def test_a_recipe_without_its_files_says_what_writes_them(least, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.exit_status(["lmm_r1_3b", f"model={least}", "output=run", "rollout.engine=local"]) == 2
    assert "data/lmm_r1_text.jsonl does not exist" in (said := capsys.readouterr().err)
    assert "are written by the commands in its first lines" in said
