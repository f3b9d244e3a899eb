"""The desk model before reinforcement learning: a random Qwen2.5-VL, its tokenizer, and a short supervised cold start.

The cold start trains the answer format and some skill at working answers out (arithmetic better than handwriting).
Then it trains a habit of guessing at once, more often with images than without, like that of models that were trained
on too many short answers. Reinforcement learning has to find that working answers out pays, and to improve at it.

It uses the trainer's own policy and packs: with one response per prompt and an advantage of 1, the on-policy gradient
of the objective is that of supervised training. The model's settings are the .json files beside this one.

Next: tasks.py, its questions.
"""

import json
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from nanolmmr1 import config, schema
from nanolmmr1.data.group import Group, Response
from nanolmmr1.data.prompt import Processor
from nanolmmr1.data.rows import load_rows
from nanolmmr1.desk.tasks import RowsByName, guessed, worked
from nanolmmr1.model import weights
from nanolmmr1.model.qwen import Qwen25VL
from nanolmmr1.parallel import export
from nanolmmr1.update.objective import Tokens
from nanolmmr1.update.pack import pack_groups
from nanolmmr1.update.policy import Policy, learning_rate

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]  # one token each
SETTINGS = Path(__file__).parent
LR = 2e-3
SKILL_STEPS, HABIT_STEPS, BATCH = 205, 60, 96
MIXTURE = {"text": 0.55, "captioned": 0.05, "image": 0.4}  # fractions of a batch
WORKED = {"text": 0.3, "captioned": 0.2, "image": 0.2}  # fraction of answers worked out, not guessed, in habit steps

CHAT_TEMPLATE = (
    "{%- for turn in messages -%}<|im_start|>{{ turn.role }}\n"
    "{%- if turn.content is string -%}{{ turn.content }}{%- else -%}{%- for part in turn.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}"
)


class Display(Protocol):
    """The part of report.display.Display that is used here."""

    def busy(self, text: str, total: int) -> AbstractContextManager[Callable[..., None]]:
        """Show progress while `advance(n)` is called."""


def write_model(folder: Path, world: Path, rows: RowsByName, seed: int, display: Display) -> None:
    """Create a Hugging Face folder with the cold-started model, its tokenizer and its processor.

    Args:
        world: folder of the .jsonl files with these rows.
    """
    folder.mkdir()
    write_settings(folder, rows)
    torch.manual_seed(seed)
    model = Qwen25VL(weights.read_config(folder))
    for name, p in model.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.02 if "embed" in name else (2 / (p[0].numel() + len(p))) ** 0.5)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)
    _train(model, folder, world, rows, seed, display)
    export.save(model, folder, folder)


def write_settings(folder: Path, rows: RowsByName) -> None:
    """Write everything but the weights: configuration, tokenizer (trained on the words of these rows), processor."""
    model_config = _read("config.json")
    tokenizer = _make_tokenizer(rows, model_config["vocab_size"])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder / "config.json", _with_token_ids(model_config, tokenizer))
    _write(folder / "generation_config.json", _with_token_ids(_read("generation_config.json"), tokenizer))
    _write(folder / "preprocessor_config.json", _read("preprocessor_config.json"))
    _write(folder / "tokenizer_config.json", _read("tokenizer_config.json") | {"chat_template": CHAT_TEMPLATE})


def _read(name: str) -> dict[str, Any]:
    return json.loads((SETTINGS / name).read_text(encoding="utf-8"))


def _write(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _with_token_ids(settings: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Replace token texts by ids in the values of *_token_id."""

    def token_id(value: Any) -> Any:
        return [token_id(text) for text in value] if isinstance(value, list) else tokenizer.token_to_id(value)

    return {name: token_id(value) if name.endswith("_token_id") else value for name, value in settings.items()}


def _make_tokenizer(rows: RowsByName, vocabulary: int) -> Tokenizer:
    """Byte-level BPE trained on the training rows; numbers below 100 are words, so most become one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,2}| ?\p{L}+| ?[^\s\p{L}\p{N}]|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    columns = ("problem", "steps", "caption")
    corpus = [row.get(column, "") for name in ("text_train", "image_train") for row in rows[name] for column in columns]
    corpus += ["system\n", "user\n", "assistant\n", "Caption: \n", "guess"] * 100
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL) - len(TAGS), initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(TAGS)
    return tokenizer


def _train(model: Qwen25VL, folder: Path, world: Path, rows: RowsByName, seed: int, display: Display) -> None:
    """Supervised steps on the training rows: first to work answers out, then to guess them."""
    cfg = config.load("desk")
    processor = Processor(folder, cfg.prompt)
    policy = Policy(model, cfg.pack, cfg.optim, processor.banned_ids)
    loaded = {name: load_rows(str(world / f"{name}.jsonl")).rows for name in ("text_train", "image_train")}
    rng = random.Random(seed)

    def example(skill: bool) -> Group:
        task = rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
        name = "text_train" if task == "text" else "image_train"
        index = rng.randrange(len(rows[name]))
        answer = worked(rows[name][index]) if skill or rng.random() < WORKED[task] else guessed(rng)
        ids = [*processor.tokenizer(answer, add_special_tokens=False)["input_ids"], processor.tokenizer.eos_token_id]
        response = Response(torch.tensor(ids), torch.zeros(len(ids)), "stop")
        return Group(processor.prepare(loaded[name][index], task == "captioned"), [response])

    phase = schema.Phase(lr=LR, steps=SKILL_STEPS + HABIT_STEPS)
    optim = schema.Optim(schedule="cosine", warmup_steps=10, min_lr_ratio=0.1)
    policy.start_phase(phase)
    with display.busy("cold start", phase.steps) as advance:
        for step in range(phase.steps):
            loss = _imitate(policy, [example(step < SKILL_STEPS) for _ in range(BATCH)])
            policy.optimizer_step(learning_rate(phase, optim, step), loss)
            advance()


def _imitate(policy: Policy, groups: list[Group]) -> float:
    """Accumulate the gradient of the mean negative log-prob of the groups' responses; returns the loss."""
    objective = schema.Objective(tis_cap=0.0)
    packs, _ = pack_groups(groups, policy.pack.tokens_per_micro_batch)
    count, loss = sum(pack.num_scored for pack in packs), 0.0
    for pack in packs:
        ones = torch.ones(pack.num_scored)
        tokens = Tokens(ones, ones / count, torch.zeros_like(pack.target), torch.zeros(pack.num_scored))
        loss += float(policy.backward(pack, tokens, objective, 1.0)["loss"])
    return loss
