"""The typed recipe: one YAML file plus `dotted.key=value` overrides, checked before any work.

A recipe lists phases; a phase is data (where rows come from, how many steps, which objective).
Every number has one home: the dataclass default here, the recipe file, or the command line, in
rising order of authority. `defaults:` in a recipe is a phase-shaped mapping that each phase starts
from. The resolved recipe, with every value spelt out, is written to `<output>/recipe.yaml` and
loads back to itself. The keys themselves are in schema.py.

Next: train.py, which walks the phases.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from pathlib import Path

import yaml

from nanolmmr1.errors import UserError
from nanolmmr1.schema import ALGORITHMS, ALIASES, CHOICES, GRPO, MOST, MOST_TOKENS, POSITIVE, Phase, Recipe

RECIPES = Path(__file__).resolve().parent / "recipes"
MAX_BYTES = 4 << 20  # of a recipe file
MAX_NODES = 100_000  # values of a recipe, aliases (`*name`) written out: a few lines of them can mean billions


def load(recipe="desk", overrides=()):
    """Read a recipe by name or path, apply `key=value` overrides, check and resolve it.

    Raises:
        UserError: unreadable file, unknown key (the nearest is named), wrong type or value, impossible combination.
    """
    path = RECIPES / f"{recipe}.yaml" if not recipe.endswith((".yaml", ".yml")) else Path(recipe)
    if not path.is_file():
        names = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        raise UserError(f"no recipe {recipe!r}: give one of {', '.join(names)}, or the path of a .yaml file")
    with open(path, "rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise UserError(f"{path} has more than {MAX_BYTES:,} bytes, too many for a recipe: is it a data file?")
    tree = read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {type(tree).__name__}, not a mapping of recipe keys")
    for override in overrides:
        _apply(tree, override)
    phases, defaults = tree.pop("phases", None) or {}, tree.get("defaults") or {}
    if not isinstance(phases, dict):
        raise UserError(f"phases must be a mapping, name -> phase; got {type(phases).__name__}")
    cfg = _build(Recipe, tree, "", list(phases))
    for name, own in phases.items():
        check_name("phases", str(name))
        cfg.phases[str(name)] = _build(Phase, _merged(defaults, own or {}), f"phases.{name}.", [name])
    cfg.name = cfg.name or path.stem
    check_name("name", cfg.name, dots=True)
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
    if cfg.rollout.engine != "local" and cfg.rollout.timeout_s >= cfg.dist.timeout_s:
        raise UserError(f"rollout.timeout_s={cfg.rollout.timeout_s:g} is not below dist.timeout_s="
                        f"{cfg.dist.timeout_s:g}: a rank that waits so long for responses keeps the others in a "
                        "collective, which would end them without a checkpoint; raise dist.timeout_s")
    for name, phase in cfg.phases.items():
        objective, where = phase.objective, f"phases.{name}"
        engine = dict(tis_cap=0.0 if cfg.rollout.engine == "local" else 2.0)
        for key, value in (GRPO | engine | ALGORITHMS[objective.algorithm]).items():
            if getattr(objective, key) is None:
                setattr(objective, key, value)
        truncated, dual = phase.top_p < 1 or phase.top_k > 0, objective.clip_ratio_dual
        cap, floor, mode = objective.tis_cap, objective.tis_floor, objective.tis_mode
        for wrong, message in (
            (not phase.data, ".data is empty: give a file, folder or hub id"),
            (phase.prompts_per_step * phase.group_size * phase.max_response_tokens > MOST_TOKENS,
             f": prompts_per_step={phase.prompts_per_step} x group_size={phase.group_size} x max_response_tokens="
             f"{phase.max_response_tokens} tokens a step are more than {MOST_TOKENS:,}; lower one of them"),
            (phase.group_size == 1, f".group_size=1: {objective.adv_estimator} compares responses; use 2 or more"),
            (objective.kl_place == "reward" and objective.kl_estimator != "k1",
             f".objective.kl_estimator={objective.kl_estimator}: KL in the reward is k1"),
            (0 < dual <= 1, f".objective.clip_ratio_dual={dual}: more than 1, or 0 for off"),
            (phase.top_p > 1, f".top_p={phase.top_p}: at most 1"),
            (cfg.rollout.engine != "local" and 0 < phase.temperature < 0.01,
             f".temperature={phase.temperature}: vLLM would sample at 0.01"),
            (cap and not floor <= 1 <= cap, f".objective.tis_floor={floor}, tis_cap={cap}: 1 must lie between, the "
             "weight of a token that the sampler and the policy agree on; or tis_cap=0 for off"),
            (not cap and (floor or mode != "token_truncate"), f".objective.tis_mode={mode}, tis_floor={floor} do "
             "nothing with tis_cap=0, which is rollout.engine=local's default: set objective.tis_cap"),
            (truncated and cap and not objective.tis_with_truncated_sampling, f": top_p={phase.top_p}, "
             f"top_k={phase.top_k} make importance weights against the sampler wrong; set top_p=1 top_k=0, or "
             "objective.tis_cap=0, or accept it with objective.tis_with_truncated_sampling=true"),
            (phase.prompts_per_step < phase.updates_per_rollout, f".updates_per_rollout={phase.updates_per_rollout} "
             f"exceeds prompts_per_step={phase.prompts_per_step}; a group is never split over updates"),
        ):
            if wrong:
                raise UserError(f"{where}{message}")
    for key in ("max_response_tokens", "max_prompt_tokens"):
        if getattr(cfg.evaluate, key) is None:
            setattr(cfg.evaluate, key, max(getattr(phase, key) for phase in cfg.phases.values()))
    for name, task in cfg.evaluate.tasks.items():
        check_name("evaluate.tasks", str(name))
        good = isinstance(task, dict) and not set(task) - {"data", "captions"} and task.get("data")
        if not (good and isinstance(task["data"], (str, list)) and isinstance(task.get("captions", False), bool)):
            raise UserError(f"evaluate.tasks.{name}={task!r}: give {{data: FILE, captions: true or false}}")


def check_name(key, name, dots=False):
    """Names of phases, tasks and runs become names of files and parts of dotted keys.

    Raises:
        UserError: the name is not plain.
    """
    if not re.fullmatch(r"\w[\w +()=%s-]*" % (".," * dots), name) or len(name.encode()) > 150:  # noqa: UP031
        raise UserError(
            f"{key}: {name!r:.200} is not a plain name: at most 150 bytes of letters, digits, spaces and _+()=- are "
            f"wanted{' (and dots)' if dots else ''}, a letter, digit or _ first"
        )


def dump(cfg):
    """The resolved recipe as YAML, without credentials. `load` of it gives the same recipe."""
    tree = dataclasses.asdict(cfg)
    del tree["defaults"]
    tree["rollout"]["servers"] = [without_credentials(url) for url in tree["rollout"]["servers"]]
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def without_credentials(url):
    """A server's URL less USER:PASSWORD@ or KEY@; text that is no URL comes back as it is, up to its last @."""
    scheme, slashes, rest = url.rpartition("://")
    return scheme + slashes + rest.rpartition("@")[2]


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


class _Loader(yaml.SafeLoader):
    """Safe YAML in which no mapping has a key twice: the second would win without a word."""

    def construct_mapping(self, node, deep=False):
        seen = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag != "tag:yaml.org,2002:merge" and seen.setdefault((key.tag, str(key.value)), key) is not key:
                problem = f"the key {str(key.value)!r:.100} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(text, where):
    """The tree in YAML text (str, or bytes in UTF-8 or UTF-16).

    Raises:
        UserError: unreadable, a key twice in one mapping, or more than MAX_NODES values.
    """
    try:
        tree = yaml.load(text, _Loader)  # noqa: S506, derived from SafeLoader
        _count(tree, MAX_NODES)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none, a huge integer
        raise UserError(f"{where} is not readable YAML: {' '.join(str(error).split())[:500]}") from error
    return tree


def _count(tree, left):
    """`left` less the values in a tree. Raises ValueError where it runs out."""
    if left <= 0:
        raise ValueError(f"it holds more than {MAX_NODES:,} values, aliases written out")
    for part in [*tree, *tree.values()] if isinstance(tree, dict) else tree if isinstance(tree, list | set) else ():
        left = _count(part, left - 1)
    return left


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
    value = read_yaml(text, f"the value of {key}")
    tree[leaf] = text if isinstance(value, dict) and not text.lstrip().startswith("{") else value


def _merged(base, own):
    if not (isinstance(base, dict) and isinstance(own, dict)):
        return own
    return base | {key: _merged(base.get(key), value) for key, value in own.items()}


def _build(cls, tree, where, phases):
    if not isinstance(tree, dict):
        raise UserError(f"{where.rstrip('.') or 'the recipe'} must be a mapping of keys, got {tree!r:.200}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in tree.items():
        if key not in fields:
            raise UserError(f"unknown key {where}{key}: did you mean {_nearest(f'{where}{key}', value, phases)}? "
                            "(python train.py --help lists all)")
        kind = fields[key].type
        if dataclasses.is_dataclass(kind):
            values[key] = _build(kind, value or {}, f"{where}{key}.", phases)
        else:
            values[key] = _value(kind, value, key, where)
    return cls(**values)


def _nearest(key, value, phases):
    """The known key that an unknown one most likely means: another trainer's name, the same last word, or close to it.

    Args:
        value: of the key; where it is a section, its first key is the one that is meant. phases: names of phases.
    """
    while isinstance(value, dict) and value:
        inner, value = next(iter(value.items()))
        key = f"{key}.{inner}"
    leaf, phase = key.rpartition(".")[2], f"phases.{phases[0] if phases else '<name>'}."
    known = [known.replace("phases.<name>.", phase) for known, _, _ in known_keys()]
    if leaf in ALIASES:
        return re.sub(r"^phases\.", lambda _: phase, ALIASES[leaf])
    same = [each for each in known if each.rpartition(".")[2] == leaf]
    if same:
        return difflib.get_close_matches(key, same, 1, 0.0)[0]
    leaves = {each.rpartition(".")[2]: each for each in reversed(known)}
    near = difflib.get_close_matches(leaf, leaves, 1, 0.75) if "." not in key else []
    return leaves[near[0]] if near else difflib.get_close_matches(key, known, 1, 0.0)[0]


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
            raise UserError(f"{name}={value!r:.200}: a number is needed") from None
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        value = float(value) if abs(value) < 10**300 else math.inf  # which is refused below
    if str in kinds and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)  # a folder called 7
    if value is None and types.NoneType not in kinds:  # `key=` empties it
        value = next((k() for k in (str, list, dict) if k in kinds), None)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("none" if k is types.NoneType else k.__name__ for k in kinds)
        raise UserError(f"{name}={value!r:.200}: {wanted} is needed")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{name}={value!r:.200}: it holds a zero byte, which no name or text may")
    if isinstance(value, list):
        return [_value(elements[0], item, f"{key}[{i}]", where) for i, item in enumerate(value)]
    if value is not None and key in CHOICES and value not in CHOICES[key]:
        raise UserError(f"{name}={value!r:.200}: one of {', '.join(repr(c) for c in CHOICES[key])} is needed")
    positive = key in POSITIVE
    if isinstance(value, (int, float)) and not (0 <= value < math.inf and (value or not positive)):
        raise UserError(f"{name}={value}: a number {'above 0' if positive else 'of 0 or more'} is needed")
    most = MOST.get(key, 2**31 - 1 if isinstance(value, int) else math.inf)
    if isinstance(value, (int, float)) and value > most:
        raise UserError(f"{name}={value:.6g}: at most {most:,} is possible")
    return value
