"""The desk recipe's data and model: contents, the held-out split, and loading by other libraries."""

import json
import random
import re

import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from nanolmmr1.data.rows import load_rows
from nanolmmr1.desk import cold_start
from nanolmmr1.desk.tasks import WORDS, _handwriting, guessed, worked
from nanolmmr1.desk.world import build
from nanolmmr1.report.display import Display
from nanolmmr1.reward.extract import final_answer
from nanolmmr1.reward.formats import format_reward
from nanolmmr1.reward.rules import decide


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Rows, images and a model after three steps of its cold start."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cold_start, "SKILL_STEPS", 2)
        patch.setattr(cold_start, "HABIT_STEPS", 1)
        build(folder, 3, Display({}, quiet=True))
    return folder


def accuracy_reward(response, gold):
    return decide(final_answer(response), final_answer(gold)).score


def rows(world, name):
    return [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()]


def triple(row):
    """What is asked: operation and digits, the captioned ones read from their words."""
    digits = re.findall(r"\d", row["problem"])
    return row["task"], [str(WORDS.index(word)) for word in row.get("caption", "").split(" and ") if word] + digits


def test_held_out_rows_ask_what_no_training_row_asks(world):
    train = [triple(row) for name in ("text_train", "image_train") for row in rows(world, name)]
    test = [triple(row) for name in ("text_test", "image_test") for row in rows(world, name)]
    assert len(test) == 600
    assert not [asked for asked in test if asked in train]


def test_no_handwriting_is_both_trained_on_and_held_out():
    writings = _handwriting()
    train, test = ({w.tobytes() for digit in writings[part].values() for w in digit} for part in ("train", "test"))
    assert len(train) + len(test) > 1700
    assert not train & test


def test_every_answer_is_what_its_working_says_and_earns_the_whole_reward(world):
    for name in ("text_train", "text_test", "image_train", "image_test"):
        for row in rows(world, name):
            first, second = row["steps"].split(", ")
            for step in (first, second):
                left, right = step.split("=")
                assert eval(left, {"__builtins__": {}}) == int(right)
            response = worked(row)
            assert second.endswith(f"={row['answer']}")
            assert format_reward(response, "think_answer") == accuracy_reward(response, row["answer"]) == 1.0


def test_a_guess_has_the_format_and_is_seldom_right():
    rng = random.Random(0)
    guesses = [guessed(rng) for _ in range(900)]
    assert all(format_reward(guess, "think_answer") == 1.0 for guess in guesses)
    assert sum(accuracy_reward(guess, "12") for guess in guesses) < 45


def test_a_picture_is_two_image_tokens_and_the_row_loads(world):
    loaded = load_rows(str(world / "image_test.jsonl")).rows
    assert len(loaded) == 300
    assert {row.images[0].endswith(".png") for row in loaded} == {True}


def test_the_model_folder_loads_in_transformers_and_its_tokenizer_is_lossless(world):
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(world / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    assert len(tokenizer) <= model.config.text_config.vocab_size
    text = worked(rows(world, "image_train")[0]) + " Caption: seven and two\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    with torch.no_grad():
        assert model(input_ids=torch.tensor([ids])).logits.isfinite().all()
