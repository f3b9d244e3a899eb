"""The desk model before reinforcement learning: a random Qwen2.5-VL, its tokenizer, a short supervised start.

The start teaches the answer format, some skill at working an answer out (arithmetic better than
handwriting), and then the habit of guessing at once instead, as models have that saw too many short
answers, and more so with pictures than without. What is left to reinforcement learning is to find
that working things out pays, and to get better at it.

It is the trainer's own machinery: with one response a prompt and an advantage of 1, the on-policy
gradient of the objective is that of supervised learning.
"""

import json
import random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from nanolmmr1 import config, schema
from nanolmmr1.data.prompt import Processor
from nanolmmr1.data.rows import load_rows
from nanolmmr1.desk.tasks import guessed, worked
from nanolmmr1.model import weights
from nanolmmr1.model.qwen import Qwen25VL
from nanolmmr1.parallel import export
from nanolmmr1.rollout import Group, Response
from nanolmmr1.update.objective import Tokens
from nanolmmr1.update.pack import pack_groups
from nanolmmr1.update.policy import Policy, learning_rate

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]  # one token each, as a larger vocabulary would have them
VOCABULARY = 512
LR = 2e-3
SKILL_STEPS, HABIT_STEPS, BATCH = 205, 60, 96
MIXTURE = {"text": 0.55, "captioned": 0.05, "image": 0.4}  # shares of a batch
WORKED = {"text": 0.3, "captioned": 0.2, "image": 0.2}  # the habit: how often an answer is worked out, not guessed

CHAT_TEMPLATE = (
    "{%- for turn in messages -%}<|im_start|>{{ turn.role }}\n"
    "{%- if turn.content is string -%}{{ turn.content }}{%- else -%}{%- for part in turn.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}"
)


def write_model(folder, world, rows, seed, display):
    """A Hugging Face folder with the cold-started model, its tokenizer and processor."""
    folder.mkdir()
    write_settings(folder, rows)
    torch.manual_seed(seed)
    model = Qwen25VL(weights.read_config(folder))
    for name, p in model.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.02 if "embed" in name else (2 / (p[0].numel() + len(p))) ** 0.5)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)
    _teach(model, folder, world, rows, seed, display)
    export.save(model, folder, folder)


def write_settings(folder, rows):
    """All of the folder but its weights: configuration, tokenizer (of these rows' words), processor."""
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "min_pixels": 784,
            "max_pixels": 1003520,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    )
    tokenizer = _write_tokenizer(folder, rows)
    _write_json(folder / "config.json", _model_config(tokenizer))
    _write_json(
        folder / "generation_config.json",
        {
            "eos_token_id": [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")],
            "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
            "do_sample": True,
        },
    )


def _teach(model, folder, world, rows, seed, display):
    """Supervised steps on the training rows: some skill at working answers out, then a habit of guessing them."""
    cfg = config.load("desk")
    processor = Processor(folder, cfg.prompt)
    policy = Policy(model, cfg, processor.banned_ids)
    loaded = {name: load_rows(str(world / f"{name}.jsonl")) for name in ("text_train", "image_train")}
    rng = random.Random(seed)

    def example(skill):
        kind = rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
        name = "text_train" if kind == "text" else "image_train"
        index = rng.randrange(len(rows[name]))
        answer = worked(rows[name][index]) if skill or rng.random() < WORKED[kind] else guessed(rng)
        ids = [*processor.tokenizer(answer, add_special_tokens=False)["input_ids"], processor.tokenizer.eos_token_id]
        response = Response(torch.tensor(ids), torch.zeros(len(ids)), "stop")
        return Group(processor.prepare(loaded[name][index], kind == "captioned"), [response])

    phase = schema.Phase(lr=LR, steps=SKILL_STEPS + HABIT_STEPS)
    optim = schema.Optim(schedule="cosine", warmup_steps=10, min_lr_ratio=0.1)
    policy.start_phase(phase)
    with display.busy("cold start", phase.steps) as advance:
        for step in range(phase.steps):
            loss = _imitate(policy, [example(step < SKILL_STEPS) for _ in range(BATCH)])
            policy.optimizer_step(learning_rate(phase, optim, step), loss)
            advance()


def _imitate(policy, groups):
    """Add the gradient of the mean log-prob of the groups' responses; returns the loss."""
    objective = schema.Objective(**schema.GRPO, tis_cap=0.0)
    packs, _ = pack_groups(groups, policy.cfg.pack.tokens_per_micro_batch)
    count, loss = sum(pack.num_scored for pack in packs), 0.0
    for pack in packs:
        ones = torch.ones(pack.num_scored)
        tokens = Tokens(ones, ones / count, torch.zeros_like(pack.target), torch.zeros(pack.num_scored))
        loss += float(policy.backward(pack, tokens, objective, 1.0)["loss"])
    return loss


def _model_config(tokenizer):
    special = {
        f"{name}_token_id": tokenizer.token_to_id(f"<|{token}|>")
        for name, token in (
            ("eos", "im_end"),
            ("bos", "endoftext"),
            ("pad", "endoftext"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
            ("vision", "vision_pad"),
            ("image", "image_pad"),
            ("video", "video_pad"),
        )
    }
    return special | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_act": "silu",
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_sliding_window": False,
        "vocab_size": VOCABULARY,
        "initializer_range": 0.02,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "vision_config": {
            "depth": 2,
            "hidden_act": "silu",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "in_chans": 3,
            "out_hidden_size": 192,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    }


def _write_tokenizer(folder, rows):
    """Byte-level BPE over the world's own sentences, every number below 100 a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,2}| ?\p{L}+| ?[^\s\p{L}\p{N}]|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    columns = ("problem", "steps", "caption")
    corpus = [row.get(column, "") for part in ("text_train", "image_train") for row in rows[part] for column in columns]
    corpus += ["system\n", "user\n", "assistant\n", "Caption: \n", "guess"] * 100
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(TAGS), initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(TAGS)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 4096,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    return tokenizer


def _write_json(path, tree):
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
