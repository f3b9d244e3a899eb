"""A whole world of 48 tokens for tests of the loop: a step takes milliseconds, and nothing is read from disk."""

import contextlib

import torch

from nanolmmr1.config import resolve
from nanolmmr1.data.prompt import Prompt
from nanolmmr1.data.rows import Row
from nanolmmr1.model.qwen import ModelConfig, Qwen25VL, VisionConfig
from nanolmmr1.parallel import dist, fsdp
from nanolmmr1.report.display import Display
from nanolmmr1.report.logs import MetricsLog, SampleLog, read_lines
from nanolmmr1.rollout.local import LocalSampler
from nanolmmr1.run.trainer import Trainer
from nanolmmr1.schema import Objective, Phase, Recipe
from nanolmmr1.update.policy import Policy

VOCABULARY, STOP, BANNED = 48, 2, (0, 1)


def small_model(seed=0):
    """A random Qwen2.5-VL with opinions: its logits have a spread of about 2."""
    vision = VisionConfig(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32,
                          fullatt_block_indexes=(0,))
    model = Qwen25VL(ModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCABULARY, vision=vision, mrope_section=(2, 3, 3)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 or name.endswith("bias"):
                p.normal_(std=0.3, generator=generator)
    return model


def small_recipe(phase=None, objective=None, optim=None, pack=None, rollout=None):
    """One phase, `train`, with the given values changed."""
    values = dict(data="rows", prompts_per_step=4, group_size=4, max_response_tokens=8, lr=1e-3, steps=50)
    phase = Phase(**values | (phase or {}), objective=Objective(**objective or {}))
    cfg = Recipe(model="model", phases={"train": phase})
    for part, changes in ((cfg.optim, optim), (cfg.pack, pack), (cfg.rollout, rollout)):
        for key, value in (changes or {}).items():
            setattr(part, key, value)
    resolve(cfg)
    return cfg


def small_policy():
    cfg = small_recipe()
    return Policy(small_model(), cfg.pack, cfg.optim, BANNED)


class SmallProcessor:
    """Row n is the prompt `n + 3`, five times or so; text is token ids in decimal.

    With `images`, the rows that n % 3 leaves 0 of begin with a picture of n + 1 image tokens, of noise.
    """

    stop_ids, banned_ids = (STOP,), BANNED

    def __init__(self, images=False):
        self.images = images

    def prepare(self, row, captions):
        n = int(row.problem)
        slots = n + 1 if self.images and n % 3 == 0 else 0
        ids = torch.cat([torch.zeros(slots, dtype=torch.int64), torch.full((4 + n % 3,), 3 + n)])
        patches = torch.randn(4 * slots, 1176, generator=torch.Generator().manual_seed(n))
        grid = torch.tensor([[1, 2, 2 * slots]] if slots else []).long().view(-1, 3)
        return Prompt(row, ids, torch.arange(len(ids)).expand(3, -1), patches, grid, torch.arange(slots), row.problem)

    def decode(self, ids):
        return " ".join(map(str, ids.tolist()))


class SmallJudge:
    """Judges by a function (token ids, row number) -> reward."""

    def __init__(self, rule):
        self.rule = rule

    def score(self, pairs):
        rewards = [float(self.rule([int(word) for word in text.split()], int(row["problem"]))) for text, row in pairs]
        return [{"overall": reward, "accuracy": reward, "format": 1.0, "timeout": 0} for reward in rewards]


class Bell:
    """A watch that has been told to stop, or not yet."""

    def __init__(self, stopping=False):
        self.stopping = stopping

    def should_stop(self):
        return self.stopping

    stage = staticmethod(lambda name, step: contextlib.nullcontext())
    heartbeat = staticmethod(lambda: None)


class RecordingSampler(LocalSampler):
    """The embedded sampler, which keeps what it drew last."""

    def generate(self, *args, **callbacks):
        self.groups = super().generate(*args, **callbacks)
        return self.groups


def share_of_even(ids, row):
    return sum(token % 2 == 0 for token in ids) / len(ids)


def small_trainer(folder, rule=share_of_even, reference=None, seed=0, notes=None, images=False, over="all", watch=None,
                  **changes):
    """A trainer at the start of its phase, over 12 rows; `notes`: a list that is told what the user would be.

    With a process group its model is sharded, `over` all ranks or each host's, and so is the reference.
    """
    cfg = small_recipe(**changes)
    model = small_model(seed)
    if dist.sharded():
        for own in filter(None, (model, reference)):
            fsdp.shard(own, dist.mesh("cpu", over, 60), torch.float32)
    policy = Policy(model, cfg.pack, cfg.optim, BANNED)
    display = Display({"train": cfg.phases["train"].steps}, quiet=True)
    if notes is not None:
        display.note = notes.append
    logs = (MetricsLog(folder), SampleLog(folder)) if dist.is_main() else (None, None)
    trainer = Trainer(cfg, policy, RecordingSampler(policy), SmallJudge(rule), SmallProcessor(images), *logs, display,
                      watch=watch)
    trainer.start_phase("train", [Row(str(n), "") for n in range(12)], reference)
    return trainer


def samples(folder):
    return read_lines(folder / "samples.jsonl")
