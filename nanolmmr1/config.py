"""The typed recipe: one YAML file plus `dotted.key=value` overrides, checked before any work.

A recipe lists phases; a phase is data (where rows come from, how many steps, which objective).
Every number has one home: the dataclass default here, the recipe file, or the command line, in
rising order of authority. `defaults:` in a recipe is a phase-shaped mapping that each phase starts
from. The resolved recipe, with every value spelt out, is written to `<output>/recipe.yaml` and
loads back to itself.

Next: train.py, which walks the phases.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

RECIPES = Path(__file__).resolve().parent / "recipes"


class UserError(ValueError):
    """Something wrong in recipe, data or model: the message names the value and the cure."""


def opt(default, help):
    """A dataclass field with a default and the line `--help` shows for it."""
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Objective:
    """What is optimised. A value of None means: as `algorithm` says (see ALGORITHMS)."""

    algorithm: str = opt("grpo", "grpo | dr_grpo | dapo | rloo | reinforce_pp_baseline | gspo | cispo")
    adv_estimator: str | None = opt(None, "grpo | dr_grpo | rloo | reinforce_pp_baseline")
    loss_type: str | None = opt(None, "ppo | gspo | cispo")
    loss_avg_mode: str | None = opt(None, "token (global mean) | sequence (mean of means) | constant (fixed length)")
    clip_ratio_low: float | None = opt(None, "ratio is clipped below at 1 - this")
    clip_ratio_high: float | None = opt(None, "ratio is clipped above at 1 + this")
    clip_ratio_dual: float | None = opt(None, "dual clip c > 1 for negative advantages; 0: off")
    overlong_buffer: int | None = opt(None, "soft overlong penalty over the last so many tokens; 0: off")
    overlong_penalty: float = opt(1.0, "largest soft overlong penalty")
    kl_coef: float = opt(0.0, "beta; 0: no reference model is kept")
    kl_estimator: str = opt("k3", "k1 | k2 | k3")
    kl_place: str = opt("loss", "loss | reward (k1 only)")
    kl_ratio: bool = opt(False, "multiply the KL term in the loss by the importance ratio")
    entropy_coef: float = opt(0.0, "entropy bonus")
    tis_cap: float | None = opt(None, "importance weights against another engine's sampler are capped here; 0: off")


ALGORITHMS = {
    "grpo": dict(),
    "dr_grpo": dict(adv_estimator="dr_grpo", loss_avg_mode="constant"),
    "dapo": dict(loss_avg_mode="token", clip_ratio_high=0.28, overlong_buffer=64),
    "rloo": dict(adv_estimator="rloo", loss_avg_mode="token"),
    "reinforce_pp_baseline": dict(adv_estimator="reinforce_pp_baseline", loss_avg_mode="token"),
    "gspo": dict(loss_type="gspo", clip_ratio_low=3e-4, clip_ratio_high=4e-4),
    "cispo": dict(loss_type="cispo", loss_avg_mode="token", clip_ratio_low=1.0, clip_ratio_high=0.28),
}
GRPO = dict(adv_estimator="grpo", loss_type="ppo", loss_avg_mode="sequence", clip_ratio_low=0.2,
            clip_ratio_high=0.2, clip_ratio_dual=0.0, overlong_buffer=0)


@dataclass
class Phase:
    """One stretch of training: its rows, its length, its objective."""

    data: str | list[str] = opt("", "file, folder, hub id, `path@split`, or a list of them")
    captions: bool = opt(False, "put each row's caption before its images")
    steps: int = opt(100, "rollout batches to train on")
    prompts_per_step: int = opt(64, "prompts per step")
    group_size: int = opt(8, "responses per prompt (G)")
    max_prompt_tokens: int = opt(2048, "longer prompts are dropped and counted, image tokens included")
    max_response_tokens: int = opt(2048, "longer responses are cut and counted")
    lr: float = opt(1e-6, "peak learning rate")
    temperature: float = opt(1.0, "sampling temperature, also used when log-probs are computed")
    top_p: float = opt(1.0, "nucleus; below 1 makes importance ratios biased")
    top_k: int = opt(0, "0: off; above 0 makes importance ratios biased")
    updates_per_rollout: int = opt(1, "optimiser steps on one rollout batch")
    reference: str = opt("phase", "KL reference: phase (weights at the phase's start) | start (at the run's start)")
    freeze: list[str] = opt([], "what is not trained: vision | merger | language | embedding | a tensor name prefix")
    dynamic_sampling: bool = opt(False, "refill groups whose rewards are all equal (DAPO)")
    max_refills: int = opt(3, "rounds of refilling; then the step trains on what it has")
    objective: Objective = field(default_factory=Objective)


@dataclass
class Prompt:
    system: str = opt("", "system prompt; empty: the model's own default")
    template: str = opt("{problem}", "user turn; {problem} keeps its <image> markers")
    caption_template: str = opt("Caption: {caption}\n", "put before each <image> when the phase shows captions")
    columns: dict = opt({}, "our column -> the data's column, for problem, answer, images, caption")
    min_pixels: int = opt(3136, "smaller pictures are enlarged to this")
    max_pixels: int = opt(1003520, "larger pictures are reduced to this (784 pixels an image token)")


@dataclass
class Reward:
    format: str = opt("think_answer", "think_answer | think_boxed | boxed | a regular expression for all responses")
    format_weight: float = opt(0.5, "weight of the format reward (0 or 1)")
    accuracy_weight: float = opt(1.0, "weight of the accuracy reward (0 or 1)")
    functions: dict = opt({}, "user rewards: path/to/file.py:function -> weight")
    workers: int = opt(2, "judging processes")
    timeout_s: float = opt(10.0, "a judgement that takes longer is killed")


@dataclass
class Rollout:
    engine: str = opt("local", "local")
    max_sequences: int = opt(256, "responses decoded together")


@dataclass
class Optim:
    betas: list[float] = opt([0.9, 0.95], "AdamW")
    eps: float = opt(1e-8, "AdamW")
    weight_decay: float = opt(0.0, "AdamW; on matrices only")
    max_grad_norm: float = opt(1.0, "gradients are clipped to this global norm")
    schedule: str = opt("constant", "constant | cosine (per phase)")
    warmup_steps: int = opt(0, "linear warm-up at each phase's start, in steps")
    min_lr_ratio: float = opt(0.1, "cosine ends at this share of lr")
    max_bad_steps: int = opt(3, "non-finite steps in a row before the run stops")


@dataclass
class Pack:
    tokens_per_micro_batch: int = opt(16384, "packed tokens a micro-batch; a larger group is split, and said so")
    head_chunk_tokens: int = opt(0, "scored tokens per chunk of the LM head; 0: by device and vocabulary")
    checkpoint_activations: bool = opt(False, "recompute each block in the backward pass")


@dataclass
class Checkpoint:
    every_steps: int = opt(0, "0: only where a phase ends")
    keep: int = opt(2, "newest checkpoints kept")


@dataclass
class Evaluate:
    tasks: dict = opt({}, "name -> {data: ..., captions: false}; held-out rows, greedy answers")
    limit: int = opt(0, "rows per task; 0: all")
    max_response_tokens: int | None = opt(None, "none: the longest phase's")
    max_prompt_tokens: int | None = opt(None, "none: the longest phase's")


@dataclass
class Recipe:
    name: str = opt("", "run name; empty: the recipe's file name")
    model: str = opt("", "hub id or folder of a Qwen2.5-VL")
    output: str = opt("", "run folder; empty: runs/<name>")
    seed: int = opt(0, "everything random derives from it")
    resume: str = opt("auto", "auto (go on from the run folder's newest checkpoint) | never (refuse a used folder)")
    world: str = opt("", "embedded world built into <output>/world first: desk; its files are named world:FILE")
    device: str = opt("auto", "auto | cpu | cuda")
    dtype: str = opt("auto", "compute: auto (bfloat16 on cuda, float32 on cpu) | float32 | bfloat16")
    prompt: Prompt = field(default_factory=Prompt)
    reward: Reward = field(default_factory=Reward)
    rollout: Rollout = field(default_factory=Rollout)
    optim: Optim = field(default_factory=Optim)
    pack: Pack = field(default_factory=Pack)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluate: Evaluate = field(default_factory=Evaluate)
    defaults: Phase = field(default_factory=Phase)
    phases: dict[str, Phase] = opt({}, "name -> phase, in order")


CHOICES = {
    "algorithm": tuple(ALGORITHMS), "adv_estimator": ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"),
    "loss_type": ("ppo", "gspo", "cispo"), "loss_avg_mode": ("token", "sequence", "constant"),
    "kl_estimator": ("k1", "k2", "k3"), "kl_place": ("loss", "reward"), "reference": ("phase", "start"),
    "engine": ("local",), "schedule": ("constant", "cosine"), "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16"), "resume": ("auto", "never"), "world": ("", "desk"),
}
POSITIVE = {"prompts_per_step", "group_size", "max_prompt_tokens", "max_response_tokens", "temperature", "top_p",
            "updates_per_rollout", "min_pixels", "max_pixels", "workers", "timeout_s", "max_sequences", "eps",
            "max_grad_norm", "max_bad_steps", "tokens_per_micro_batch", "keep", "steps"}  # no number may be negative


def load(recipe="desk", overrides=()):
    """Read a recipe by name or path, apply `key=value` overrides, check and resolve it.

    Raises:
        UserError: unreadable file, unknown key (the nearest is named), wrong type or value, impossible combination.
    """
    path = RECIPES / f"{recipe}.yaml" if not recipe.endswith((".yaml", ".yml")) else Path(recipe)
    if not path.is_file():
        names = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        raise UserError(f"no recipe {recipe!r}: give one of {', '.join(names)}, or the path of a .yaml file")
    tree = _read_yaml(path.read_text(encoding="utf-8", errors="replace"), str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {type(tree).__name__}, not a mapping of recipe keys")
    for override in overrides:
        _apply(tree, override)
    phases, defaults = tree.pop("phases", None) or {}, tree.get("defaults") or {}
    if not isinstance(phases, dict):
        raise UserError(f"phases must be a mapping, name -> phase; got {type(phases).__name__}")
    cfg = _build(Recipe, tree, "")
    for name, own in phases.items():
        cfg.phases[str(name)] = _build(Phase, _merged(defaults, own or {}), f"phases.{name}.")
    cfg.name = cfg.name or path.stem
    cfg.output = cfg.output or f"runs/{cfg.name}"
    resolve(cfg)
    return cfg


def resolve(cfg):
    """Fill what is derived, and refuse what cannot work."""
    if not cfg.model:
        raise UserError("model is empty: give a Qwen2.5-VL folder or hub id, as in model=Qwen/Qwen2.5-VL-3B-Instruct")
    if not cfg.phases or "start" in cfg.phases:
        raise UserError(f"phases={list(cfg.phases)}: give at least one, and none called start, as the moment before is")
    if len(cfg.optim.betas) != 2 or not all(0 <= b < 1 for b in cfg.optim.betas):
        raise UserError(f"optim.betas={cfg.optim.betas}: two numbers in [0, 1) are needed")
    if cfg.prompt.min_pixels > cfg.prompt.max_pixels:
        raise UserError(f"prompt.min_pixels={cfg.prompt.min_pixels} exceeds prompt.max_pixels={cfg.prompt.max_pixels}")
    for name, phase in cfg.phases.items():
        objective, where = phase.objective, f"phases.{name}"
        engine = dict(tis_cap=0.0 if cfg.rollout.engine == "local" else 2.0)
        for key, value in (GRPO | engine | ALGORITHMS[objective.algorithm]).items():
            if getattr(objective, key) is None:
                setattr(objective, key, value)
        truncated, dual = phase.top_p < 1 or phase.top_k > 0, objective.clip_ratio_dual
        for wrong, message in (
            (not phase.data, ".data is empty: give a file, folder or hub id"),
            (phase.group_size == 1, f".group_size=1: {objective.adv_estimator} compares responses; use 2 or more"),
            (objective.kl_place == "reward" and objective.kl_estimator != "k1",
             f".objective.kl_estimator={objective.kl_estimator}: KL in the reward is k1"),
            (0 < dual <= 1, f".objective.clip_ratio_dual={dual}: more than 1, or 0 for off"),
            (phase.top_p > 1, f".top_p={phase.top_p}: at most 1"),
            (truncated and objective.tis_cap, f": top_p={phase.top_p}, top_k={phase.top_k} make importance weights "
             "against the sampler wrong; set top_p=1 top_k=0, or objective.tis_cap=0"),
            (phase.prompts_per_step < phase.updates_per_rollout, f".updates_per_rollout={phase.updates_per_rollout} "
             f"exceeds prompts_per_step={phase.prompts_per_step}; a group is never split over updates"),
        ):
            if wrong:
                raise UserError(f"{where}{message}")
    for key in ("max_response_tokens", "max_prompt_tokens"):
        if getattr(cfg.evaluate, key) is None:
            setattr(cfg.evaluate, key, max(getattr(phase, key) for phase in cfg.phases.values()))
    for name, task in cfg.evaluate.tasks.items():
        good = isinstance(task, dict) and not set(task) - {"data", "captions"} and task.get("data")
        if not (good and isinstance(task["data"], (str, list)) and isinstance(task.get("captions", False), bool)):
            raise UserError(f"evaluate.tasks.{name}={task!r}: give {{data: FILE, captions: true or false}}")


def dump(cfg):
    """The resolved recipe as YAML. `load` of it gives the same recipe."""
    tree = dataclasses.asdict(cfg)
    del tree["defaults"]
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def known_keys():
    """[(dotted key, default, help)] of every key, phases as `phases.<name>.*`, for `--help`."""
    def walk(cls, prefix):
        for f in dataclasses.fields(cls):
            if dataclasses.is_dataclass(f.type):
                yield from walk(f.type, f"{prefix}{f.name}.")
            else:
                made = f.default is dataclasses.MISSING
                yield prefix + f.name, f.default_factory() if made else f.default, f.metadata["help"]
    keys = [k for k in walk(Recipe, "") if not k[0].startswith(("defaults.", "phases"))]
    return keys + list(walk(Phase, "phases.<name>."))


def _read_yaml(text, where):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not readable YAML: {' '.join(str(error).split())}") from error


def _apply(tree, override):
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is not an override: write dotted.key=value")
    *parents, leaf = key.split(".")
    phases = tree.get("phases") or {}
    if parents[:1] == ["phases"] and len(parents) > 1 and isinstance(phases, dict) and parents[1] not in phases:
        has = ", ".join(map(str, phases)) or "none"
        raise UserError(f"{key}: the recipe has no phase {parents[1]!r}; it has {has}")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise UserError(f"{key}: {parent!r} holds a value, not a section")
    # Only YAML scalars and flow collections are wanted; "a: b" stays text.
    value = _read_yaml(text, f"the value of {key}")
    tree[leaf] = text if isinstance(value, dict) and not text.lstrip().startswith("{") else value


def _merged(base, own):
    if not (isinstance(base, dict) and isinstance(own, dict)):
        return own
    return base | {key: _merged(base.get(key), value) for key, value in own.items()}


def _build(cls, tree, where):
    if not isinstance(tree, dict):
        raise UserError(f"{where.rstrip('.') or 'the recipe'} must be a mapping of keys, got {tree!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in tree.items():
        if key not in fields:
            known = [f"{where}{name}" for name in fields] + [k for k, _, _ in known_keys()]
            near = difflib.get_close_matches(f"{where}{key}", known, 1, 0.0)[0]
            raise UserError(f"unknown key {where}{key}: did you mean {near}? (python train.py --help lists all)")
        kind = fields[key].type
        if dataclasses.is_dataclass(kind):
            values[key] = _build(kind, value or {}, f"{where}{key}.")
        else:
            values[key] = _value(kind, value, key, where)
    return cls(**values)


def _value(kind, value, key, where):
    """The value as `kind`: a plain type, a list of one, or a union of these."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    elements = [typing.get_args(k)[0] for k in kinds if typing.get_origin(k) is list]
    kinds = tuple(typing.get_origin(k) or k for k in kinds)
    name = f"{where}{key}"
    if isinstance(value, str) and float in kinds:
        try:
            value = float(value)  # YAML 1.1 reads 1e-6 as text
        except ValueError:
            raise UserError(f"{name}={value!r}: a number is needed") from None
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        value = float(value)
    if str in kinds and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)  # a folder called 7
    if value is None and types.NoneType not in kinds:  # `key=` empties it
        value = next((k() for k in (str, list, dict) if k in kinds), None)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("none" if k is types.NoneType else k.__name__ for k in kinds)
        raise UserError(f"{name}={value!r}: {wanted} is needed")
    if isinstance(value, list):
        return [_value(elements[0], item, f"{key}[{i}]", where) for i, item in enumerate(value)]
    if value is not None and key in CHOICES and value not in CHOICES[key]:
        raise UserError(f"{name}={value!r}: one of {', '.join(repr(c) for c in CHOICES[key])} is needed")
    positive = key in POSITIVE
    if isinstance(value, (int, float)) and not (0 <= value < math.inf and (value or not positive)):
        raise UserError(f"{name}={value}: a number {'above 0' if positive else 'of 0 or more'} is needed")
    return value
