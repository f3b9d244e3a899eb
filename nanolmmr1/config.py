"""Reading of recipes: a YAML file plus `dotted.key=value` overrides, checked before any work.

The keys are in schema.py. A value comes from the command line, else from the file, else from the recipe that the file
names as its `base`, else from the schema. Mappings are merged key by key, phases by name; lists and other values are
replaced. `order` then chooses the phases that run. Each phase starts from the section `defaults`. The resolved recipe,
with every value spelt out and without a base, is written to `<output>/recipe.yaml` and loads back to itself.

Next: schema.py, every key.
"""

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from nanolmmr1.errors import UserError
from nanolmmr1.schema import ALIASES, Phase, Recipe, Section, read_number

RECIPES = Path(__file__).resolve().parent / "recipes"
MAX_BYTES = 4 << 20  # of a recipe file
MAX_NODES = 100_000  # values of a recipe, aliases (`*name`) written out: a few lines of them can mean billions
MAX_TOKENS = 1 << 31  # of a step, if every response is as long as allowed
TAGS = ("<str>", "<list>")  # of schema.Files, in the locations of errors
NEEDED = {
    "string_type": "str is needed", "int_type": "int is needed", "bool_type": "bool is needed",
    "list_type": "list is needed", "dict_type": "dict is needed", "union_tag_not_found": "str or list is needed",
    "float_type": "a number is needed", "finite_number": "a number is needed, not inf or nan",
    "greater_than": "a number above {gt:g} is needed", "greater_than_equal": "a number of {ge:g} or more is needed",
    "string_pattern_mismatch": "it holds a zero byte, which no name or text may",
    "string_unicode": "it is not valid Unicode",
}  # fmt: skip


def load(recipe: str = "desk", overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe by name or path, apply `key=value` overrides, check and resolve it.

    Raises:
        UserError: unreadable file, unknown key (the nearest is named), wrong type or value, impossible combination.
    """
    path = _find(recipe)
    tree = _read(path)
    for override in overrides:
        _apply(tree, override)
    if tree.pop("base", None):
        raise UserError("base can be set in a recipe file only, which is merged with it before any override is applied")
    _choose_phases(tree)
    phases, defaults = tree["phases"], tree.get("defaults") or {}
    for name in phases:
        check_name("phases", name)
    phases = tree["phases"] = {name: _merged(defaults, phase) for name, phase in phases.items()}
    try:
        cfg = Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error.errors()[0], list(phases))) from error
    cfg.name = cfg.name or path.stem
    check_name("name", cfg.name, dots=True)
    cfg.output = cfg.output or f"runs/{cfg.name}"
    resolve(cfg)
    return cfg


def recipes() -> Iterator[tuple[str, str]]:
    """(name, what it is) of every built-in recipe, for `--help`: the first line of its file, a comment."""
    for path in sorted(RECIPES.glob("*.yaml")):
        yield path.stem, path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def _find(recipe: str, child: Path | None = None) -> Path:
    """The file of a recipe by name or path; of a base, a path from the folder of the file `child` that names it."""
    folder = child.parent if child else Path()
    path = folder / recipe if recipe.endswith((".yaml", ".yml")) else RECIPES / f"{recipe}.yaml"
    if not os.path.isfile(path):
        names, where = ", ".join(name for name, _ in recipes()), f" (the base of {child})" if child else ""
        raise UserError(f"no recipe {recipe!r:.200}{where}: give one of {names}, or the path of a .yaml file")
    return path


def _read(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tree of a recipe file, merged into its base's. `children`: the files that led here, the first one first."""
    if os.path.realpath(path) in map(os.path.realpath, children):
        circle = " -> ".join(str(file) for file in (*children, path))
        raise UserError(f"a recipe cannot be its own base: {circle}")
    with open(path, "rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise UserError(f"{path} has more than {MAX_BYTES:,} bytes, too many for a recipe: is it a data file?")
    tree = read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {type(tree).__name__}, not a mapping of recipe keys")
    base, order = tree.pop("base", None), tree.pop("order", None)
    _choose_phases(tree)  # a phase without a value changes nothing in the base's
    if base and not isinstance(base, str):
        raise UserError(f"{path}: base={base!r:.200}: the name or path of one recipe is needed")
    if base:
        inherited = _read(_find(base, path), (*children, path))
        for own in ("name", "output"):  # a base's would make two recipes claim one folder
            inherited.pop(own, None)
        tree = _merged(inherited, tree)
    tree["order"] = order
    _choose_phases(tree)
    return tree


def _choose_phases(tree: dict[str, Any]) -> None:
    """Make `phases` a mapping with text as names, and take `order` out of the tree: the phases that stay, in order.

    One list says what runs, so it drops, reorders and inserts. It counts at once, so that who builds on a recipe starts
    from the phases that it runs, and adds one without repeating the list.
    """
    phases, order = tree.get("phases") or {}, tree.pop("order", None) or []
    if not isinstance(phases, dict):
        raise UserError(f"phases must be a mapping, name -> phase; got {type(phases).__name__}")
    phases = {str(name): phase or {} for name, phase in phases.items()}
    names = [str(name) for name in order] if isinstance(order, list) else [""]
    if not set(names) <= set(phases) or len(set(names)) < len(names):
        raise UserError(f"order={order!r:.200}: a list of phases is needed, each once; there are {', '.join(phases)}")
    tree["phases"] = {name: phases[name] for name in names or phases}


def resolve(cfg: Recipe) -> None:
    """Fill in the values that depend on other sections, and refuse impossible combinations.

    Raises:
        UserError: the values that cannot be combined, and the cure.
    """
    for phase in cfg.phases.values():
        if phase.objective.tis_cap is None:
            phase.objective.tis_cap = 0.0 if cfg.rollout.engine == "local" else 2.0
    for problem in _problems(cfg):
        raise UserError(problem)
    for key in ("max_response_tokens", "max_prompt_tokens"):
        if getattr(cfg.evaluate, key) is None:
            setattr(cfg.evaluate, key, max(getattr(phase, key) for phase in cfg.phases.values()))


def _problems(cfg: Recipe) -> Iterator[str]:
    prompt, rollout, dist = cfg.prompt, cfg.rollout, cfg.dist
    if not cfg.model:
        yield "model is empty: give a Qwen2.5-VL folder or hub id, as in model=Qwen/Qwen2.5-VL-3B-Instruct"
    if not cfg.phases or "start" in cfg.phases:
        yield f"phases={list(cfg.phases)}: give at least one, and none called start, which names the moment before"
    if len(cfg.optim.betas) != 2 or max(cfg.optim.betas) >= 1:
        yield f"optim.betas={cfg.optim.betas}: two numbers in [0, 1) are needed"
    if prompt.min_pixels > prompt.max_pixels:
        yield f"prompt.min_pixels={prompt.min_pixels} exceeds prompt.max_pixels={prompt.max_pixels}"
    if rollout.engine != "local" and rollout.timeout_s >= dist.timeout_s:
        yield (f"rollout.timeout_s={rollout.timeout_s:g} is not below dist.timeout_s={dist.timeout_s:g}: while a rank "
               "waits for responses, the others wait in a collective, which would time out first and end the run "
               "without a checkpoint; raise dist.timeout_s")
    for name, phase in cfg.phases.items():
        for problem in _phase_problems(phase, rollout.engine):
            yield f"phases.{name}{problem}"
    for name, task in cfg.evaluate.tasks.items():
        check_name("evaluate.tasks", name)
        good = isinstance(task, dict) and not set(task) - {"data", "captions"} and task.get("data")
        data = task["data"] if good else None
        names = [data] if isinstance(data, str) else data if isinstance(data, list) else [None]
        if not (all(isinstance(each, str) for each in names) and isinstance(task.get("captions", False), bool)):
            yield (f"evaluate.tasks.{name}={task!r}: give {{data: FILE or BENCHMARK, captions: true or "
                   "false}}")


def _phase_problems(phase: Phase, engine: str) -> Iterator[str]:
    prompts, size, top_p, top_k = phase.prompts_per_step, phase.group_size, phase.top_p, phase.top_k
    objective = phase.objective
    cap, floor, mode, dual = objective.tis_cap, objective.tis_floor, objective.tis_mode, objective.clip_ratio_dual
    if not phase.data:
        yield ".data is empty: give a file, folder or hub id"
    if prompts * size * phase.max_response_tokens > MAX_TOKENS:
        yield (f": prompts_per_step={prompts} x group_size={size} x max_response_tokens={phase.max_response_tokens} "
               f"tokens a step are more than {MAX_TOKENS:,}; lower one of them")
    if size == 1:
        yield f".group_size=1: {objective.adv_estimator} compares responses; use 2 or more"
    if objective.kl_place == "reward" and objective.kl_estimator != "k1":
        yield f".objective.kl_estimator={objective.kl_estimator}: KL in the reward is k1"
    if 0 < dual <= 1:
        yield f".objective.clip_ratio_dual={dual}: more than 1, or 0 for off"
    if engine != "local" and phase.temperature < 0.01:
        yield f".temperature={phase.temperature}: vLLM would sample at 0.01"
    if cap and not floor <= 1 <= cap:
        yield (f".objective.tis_floor={floor}, tis_cap={cap}: 1 must lie between, the weight of a token on which "
               "sampler and policy agree; or tis_cap=0 for off")
    if not cap and (floor or mode != "token_truncate"):
        yield (f".objective.tis_mode={mode}, tis_floor={floor} do nothing with tis_cap=0, the default of "
               "rollout.engine=local: set objective.tis_cap")
    if cap and (top_p < 1 or top_k > 0) and not objective.tis_with_truncated_sampling:
        yield (f": top_p={top_p}, top_k={top_k} make importance weights against the sampler wrong; set top_p=1 "
               "top_k=0, or objective.tis_cap=0, or accept it with objective.tis_with_truncated_sampling=true")
    if prompts < phase.updates_per_rollout:
        yield (f".updates_per_rollout={phase.updates_per_rollout} exceeds prompts_per_step={prompts}; a group is never "
               "split over updates")


def check_name(key: str, name: str, dots: bool = False) -> None:
    """Refuse a name of a phase, task or run that cannot be part of a file name and of a dotted key.

    Raises:
        UserError: the name and what is allowed.
    """
    if not re.fullmatch(r"\w[\w +()=%s-]*" % (".," * dots), name) or len(name.encode()) > 150:  # noqa: UP031
        raise UserError(f"{key}: {name!r:.200} is not a plain name: at most 150 bytes of letters, digits, spaces and "
                        f"_+()=-{'.,' * dots} are possible, beginning with a letter, a digit or _")


def dump(cfg: Recipe) -> str:
    """The resolved recipe as YAML, without credentials. `load` of it gives the same recipe."""
    tree = cfg.model_dump(exclude={"defaults", "base", "order"})
    tree["rollout"]["servers"] = [without_credentials(url) for url in tree["rollout"]["servers"]]
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def without_credentials(url: str) -> str:
    """A server's URL less USER:PASSWORD@ or KEY@. Text that is no URL loses everything up to its last @."""
    scheme, slashes, rest = url.rpartition("://")
    return scheme + slashes + rest.rpartition("@")[2]


def known_keys() -> list[tuple[str, Any, str]]:
    """(dotted key, default, help) of every key, phases as `phases.<name>.*`, for `--help`."""
    keys = [key for key in _keys(Recipe(), "") if not key[0].startswith(("defaults.", "phases"))]
    return keys + list(_keys(Phase(), "phases.<name>."))


def _keys(section: Section, prefix: str) -> Iterator[tuple[str, Any, str]]:
    for name, field in type(section).model_fields.items():
        default = getattr(section, name)
        if isinstance(default, Section):
            yield from _keys(default, f"{prefix}{name}.")
        else:
            choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            listed = f"[{' | '.join(filter(None, choices))}] " if choices else ""
            yield prefix + name, default, f"{listed}{field.description}"


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a repeated key; plain YAML keeps the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag != "tag:yaml.org,2002:merge" and seen.setdefault((key.tag, str(key.value)), key) is not key:
                problem = f"the key {str(key.value)!r:.100} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(text: str | bytes, where: str) -> Any:
    """The tree in YAML text (bytes: UTF-8 or UTF-16). `where` names the text in errors.

    Raises:
        UserError: unreadable, a key twice in one mapping, or more than MAX_NODES values.
    """
    try:
        tree = yaml.load(text, _Loader)  # noqa: S506, derived from SafeLoader
        _count(tree, MAX_NODES)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date, a huge integer
        raise UserError(f"{where} is not readable YAML: {' '.join(str(error).split())[:500]}") from error
    return tree


def _count(tree: Any, left: int) -> int:
    """`left` less the values in a tree. Raises ValueError below 1, and for integers too long to print."""
    if left <= 0:
        raise ValueError(f"it holds more than {MAX_NODES:,} values, aliases written out")
    if isinstance(tree, int) and tree.bit_length() > 10_000:
        raise ValueError("it holds an integer of more than 3,000 digits")
    for value in [*tree, *tree.values()] if isinstance(tree, dict) else tree if isinstance(tree, list | set) else ():
        left = _count(value, left - 1)
    return left


def _apply(tree: Any, override: str) -> None:
    """Set the value of `dotted.key=value` in a tree."""
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
    value = read_yaml(text, f"the value of {key}")
    # "a: b" stays text: mappings must be written as {a: b}.
    tree[leaf] = text if isinstance(value, dict) and not text.lstrip().startswith("{") else value


def _merged(below: Any, above: Any) -> Any:
    """One tree on top of another, key by key; what is no mapping is replaced."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}


def _explain(error: ErrorDetails, phases: list[str]) -> str:
    """A pydantic error in one line: dotted key, value, and requirement."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    location = (*error["loc"][:-1], str(value)) if kind == "invalid_key" else error["loc"]
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in location if step not in TAGS]
    name = "".join(steps).removeprefix(".")
    if kind in ("extra_forbidden", "invalid_key"):
        nearest = _nearest(name, value, phases)
        return f"unknown key {name}: did you mean {nearest}? (python train.py --help lists all)"
    if kind == "model_type":
        return f"{name} must be a mapping of keys, got {value!r:.200}"
    if kind == "less_than_equal":
        return f"{name}={read_number(value):.6g}: at most {int(context['le']):,} is possible"
    if kind == "literal_error":
        wrong_type = "" if isinstance(value, str) else "str is needed, "
        return f"{name}={value!r:.200}: {wrong_type}one of {context['expected'].replace(' or ', ', ')} is needed"
    return f"{name}={value!r:.200}: {NEEDED.get(kind, error['msg']).format(**context)}"


def _nearest(key: str, value: Any, phases: list[str]) -> str:
    """The known key that an unknown one most likely means: another trainer's name, the same last word, or close to it.

    Args:
        value: of the key; of a section, the first key inside is looked up. phases: names of phases.
    """
    while isinstance(value, dict) and value:
        inner, value = next(iter(value.items()))
        key = f"{key}.{inner}"
    leaf, inside = key.rpartition(".")[2], re.match(r"defaults\.|phases\.[^.]+\.", key)
    phase = inside[0] if inside else f"phases.{phases[0] if phases else '<name>'}."
    known = [known.replace("phases.<name>.", phase) for known, _, _ in known_keys()]
    if leaf in ALIASES:
        return re.sub(r"^phases\.", lambda _: phase, ALIASES[leaf])
    same = [each for each in known if each.rpartition(".")[2] == leaf]
    if same:
        return difflib.get_close_matches(key, same, 1, 0.0)[0]
    leaves = {each.rpartition(".")[2]: each for each in reversed(known)}
    near = difflib.get_close_matches(leaf, leaves, 1, 0.75) if "." not in key else []
    return leaves[near[0]] if near else difflib.get_close_matches(key, known, 1, 0.0)[0]
