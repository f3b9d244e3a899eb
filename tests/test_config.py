"""The recipe: what is written comes back, what is wrong is named with its cure."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nanolmmr1 import config
from nanolmmr1.config import load
from nanolmmr1.errors import UserError
from nanolmmr1.schema import ALGORITHMS, ALIASES, Objective, Phase, Recipe, Section

REPOSITORY = Path(__file__).resolve().parents[1]
GIVEN = ["model=folder", "phases.train.data=rows.jsonl"]


def single(*overrides):
    return load("single", [*GIVEN, *overrides])


def recipe_file(folder, tree):
    path = folder / "mine.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree, sort_keys=False))
    return str(path)


@pytest.mark.parametrize("name", sorted(path.stem for path in config.RECIPES.glob("*.yaml")))
def test_every_recipe_loads_and_comes_back_from_its_dump(name, tmp_path):
    cfg = load(name, GIVEN if name == "single" else [])
    assert cfg.name == name and cfg.output == f"runs/{name}" and cfg.phases
    again = load(recipe_file(tmp_path, config.dump(cfg)))
    assert again == cfg.model_copy(update={"defaults": again.defaults})
    assert config.dump(again) == config.dump(cfg)


@pytest.mark.parametrize("override, where, value", [
    ("phases.train.lr=1e-6", "phases.train.lr", 1e-6),
    ("phases.train.lr=3", "phases.train.lr", 3.0),
    ("phases.train.steps=7", "phases.train.steps", 7),
    ("phases.train.captions=true", "phases.train.captions", True),
    ("phases.train.freeze=[vision, embedding]", "phases.train.freeze", ["vision", "embedding"]),
    ("phases.train.data=[a.jsonl, b@train]", "phases.train.data", ["a.jsonl", "b@train"]),
    ("phases.train.data=a=b/c d.jsonl", "phases.train.data", "a=b/c d.jsonl"),
    ("phases.train.data=owner/name@train", "phases.train.data", "owner/name@train"),
    ("phases.train.objective.algorithm=dapo", "phases.train.objective.algorithm", "dapo"),
    ("output=7", "output", "7"),
    ("prompt.system=", "prompt.system", ""),
    ("phases.train.freeze=", "phases.train.freeze", []),
    ("prompt.columns=", "prompt.columns", {}),
    ("output=/a/b-c.d", "output", "/a/b-c.d"),
    ("prompt.caption_template=Caption: {caption}", "prompt.caption_template", "Caption: {caption}"),
    ("prompt.system=think: then answer", "prompt.system", "think: then answer"),
    ("prompt.columns={problem: question}", "prompt.columns", {"problem": "question"}),
    ('reward.functions={"a.py:f": 0.5}', "reward.functions", {"a.py:f": 0.5}),
    ("reward.format=<a>.*</a>", "reward.format", "<a>.*</a>"),
    ("optim.betas=[0, 0.5]", "optim.betas", [0.0, 0.5]),
    ("evaluate.tasks.mine.data=x.jsonl", "evaluate.tasks", {"mine": {"data": "x.jsonl"}}),
    ("phases.train.objective.tis_cap=0", "phases.train.objective.tis_cap", 0.0),
])
def test_overrides_are_read_as_what_they_are(override, where, value):
    found = single(override)
    for key in where.split("."):
        found = found[key] if isinstance(found, dict) else getattr(found, key)
    assert found == value and type(found) is type(value)


def test_the_last_override_wins_and_leaves_its_neighbours_alone():
    cfg = single("phases.train.lr=1e-3", "phases.train.lr=1e-4", "phases.train.objective.kl_coef=0.1")
    assert (cfg.phases["train"].lr, cfg.phases["train"].objective.kl_coef) == (1e-4, 0.1)
    assert cfg.phases["train"].objective.kl_estimator == "k3" and cfg.phases["train"].steps == Phase().steps


def test_phases_start_from_the_defaults_section_by_section(tmp_path):
    path = recipe_file(tmp_path, {
        "model": "m",
        "defaults": {"data": "d", "steps": 5, "freeze": ["vision"], "objective": {"kl_coef": 0.1, "algorithm": "rloo"}},
        "phases": {"one": None, "two": {"steps": 6, "freeze": [], "objective": {"kl_coef": 0.2}}},
    })
    one, two = load(path, ["defaults.steps=4", "phases.two.lr=1"]).phases.values()
    assert (one.steps, one.freeze, one.objective.kl_coef, one.objective.algorithm) == (4, ["vision"], 0.1, "rloo")
    assert (two.steps, two.freeze, two.objective.kl_coef, two.objective.algorithm) == (6, [], 0.2, "rloo")
    assert (one.lr, two.lr) == (Phase().lr, 1.0)


def test_phases_keep_the_order_of_the_file(tmp_path):
    cfg = load(recipe_file(tmp_path, {"model": "m", "defaults": {"data": "d"}, "phases": {"z": {}, "a": {}, "m": {}}}))
    assert list(cfg.phases) == ["z", "a", "m"]


def test_a_recipe_changes_its_base_key_by_key_and_its_phases_by_name(tmp_path):
    (tmp_path / "deep").mkdir()
    recipe_file(tmp_path / "deep", {
        "name": "below", "output": "elsewhere", "model": "m", "optim": {"betas": [0.1, 0.2], "eps": 1e-3},
        "defaults": {"data": "d", "steps": 5, "objective": {"kl_coef": 0.1, "algorithm": "rloo"}},
        "phases": {"one": {"freeze": ["vision", "merger"]}, "two": {"steps": 6, "lr": 1}}})  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({
        "base": "deep/mine.yaml", "optim": {"betas": [0.3, 0.4]}, "defaults": {"objective": {"kl_coef": 0.2}},
        "phases": {"three": {"steps": 9}, "two": {"lr": 2}, "one": {"freeze": ["language"]}}}, sort_keys=False))
    (tmp_path / "top.yaml").write_text("base: mine.yaml\nseed: 7\nphases: {two: }\n")
    cfg = load(str(tmp_path / "top.yaml"), ["phases.two.steps=8"])
    assert (cfg.name, cfg.output, cfg.model, cfg.seed) == ("top", "runs/top", "m", 7), "a name is not inherited"
    assert (cfg.optim.betas, cfg.optim.eps) == ([0.3, 0.4], 1e-3)
    assert {name: (phase.steps, phase.lr, phase.freeze) for name, phase in cfg.phases.items()} == {
        "one": (5, 1e-6, ["language"]), "two": (8, 2.0, []), "three": (9, 1e-6, [])}  # fmt: skip
    assert list(cfg.phases) == ["one", "two", "three"], "a base's phases come first"
    assert all((p.data, p.objective.kl_coef, p.objective.algorithm) == ("d", 0.2, "rloo") for p in cfg.phases.values())
    written = recipe_file(tmp_path, config.dump(cfg))
    assert not {"base", "order"} & set(yaml.safe_load(config.dump(cfg)))
    assert load(written) == cfg.model_copy(update={"defaults": Phase()}), "a run's recipe needs no base"


@pytest.mark.parametrize("order, overrides, left", [
    ([], [], "abc"), (["c", "a"], [], "ca"), (["new", "b"], [], ["new", "b"]), (["b"], ["order=[b, b]"], None),
    (["c", "a"], ["order=[a]"], "a"), (["c", "a"], ["order=[b]"], None), (["d"], [], None), (["a", "a"], [], None),
    ("a", [], None), ({"a": 1}, [], None),
])  # fmt: skip
def test_an_order_drops_moves_and_inserts_phases_and_holds_no_others(tmp_path, order, overrides, left):
    recipe_file(tmp_path, {"model": "m", "defaults": {"data": "d"}, "phases": {"a": {}, "b": {}, "c": {}}})
    phases = {"new": {}} if left == ["new", "b"] else {}
    path = tmp_path / "ordered.yaml"
    path.write_text(yaml.safe_dump({"base": "mine.yaml", "order": order, "phases": phases}))
    if left is None:
        with pytest.raises(UserError, match="order=.*: a list of phases is needed, each once; there are "):
            load(str(path), overrides)
    else:
        assert list(load(str(path), overrides).phases) == list(left)


def test_who_builds_on_an_ordered_recipe_starts_from_the_phases_that_it_runs(tmp_path):
    path = recipe_file(tmp_path, {"base": "desk_direct", "phases": {"more": {"data": "d"}}})
    assert list(load(path).phases) == ["image", "more"]
    assert list(load("desk_direct").phases) == ["image"] and load("desk_direct").phases["image"].steps == 140


@pytest.mark.parametrize("base, words", [
    ("dekc", "no recipe 'dekc' (the base of {mine}): give one of desk, "), ("gone.yaml", "no recipe 'gone.yaml' (the"),
    ("mine.yaml", "its own base: {mine} -> {mine}"), ("other.yaml", "its own base: {mine} -> {other} -> {link}"),
    (["desk"], "{mine}: base=['desk']: the name or path of one"), ("bad.yaml", "{bad} is not readable YAML"),
    ("x" * 9999, "no recipe 'xxx"), ("a\0b", "no recipe"),
])  # fmt: skip
def test_a_base_that_cannot_be_one_is_refused(tmp_path, base, words):
    path = recipe_file(tmp_path, {"base": base})
    files = {name: str(tmp_path / f"{name}.yaml") for name in ("mine", "other", "link", "bad")}
    (tmp_path / "link.yaml").symlink_to(path)
    (tmp_path / "other.yaml").write_text("base: link.yaml\n")
    (tmp_path / "bad.yaml").write_text("phases: {train: [}")
    with pytest.raises(UserError, match=re.escape(words.format(**files))):
        load(path)


def test_a_base_on_the_command_line_is_refused():
    with pytest.raises(UserError, match="base can be set in a recipe file only"):
        single("base=desk")


def test_every_recipe_says_in_one_line_what_it_is():
    known = dict(config.recipes())
    assert set(known) == {path.stem for path in config.RECIPES.glob("*.yaml")} and all(known.values())
    for name, text in known.items():
        assert (config.RECIPES / f"{name}.yaml").read_text().startswith(f"# {text}\n")
        assert len(f"  {name:<32}{text}") <= 120
    table = re.findall(r"^\| `(\w+)` \|", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    assert sorted(["single", *table]) == sorted(known)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_algorithm_fills_what_the_recipe_leaves_open(algorithm):
    objective = single(f"phases.train.objective.algorithm={algorithm}").phases["train"].objective
    assert None not in vars(objective).values()
    for key, value in ALGORITHMS[algorithm].items():
        assert getattr(objective, key) == value
    own = single(f"phases.train.objective.algorithm={algorithm}", "phases.train.objective.clip_ratio_high=0.5",
                 "phases.train.objective.loss_avg_mode=sequence").phases["train"].objective
    assert (own.clip_ratio_high, own.loss_avg_mode) == (0.5, "sequence")


def test_algorithms_differ_in_what_their_papers_changed():
    objectives = {name: single(f"phases.train.objective.algorithm={name}").phases["train"].objective
                  for name in ALGORITHMS}
    assert objectives["grpo"] == Objective(
        adv_estimator="grpo", loss_type="ppo", loss_avg_mode="sequence", clip_ratio_low=0.2, clip_ratio_high=0.2,
        clip_ratio_dual=0.0, overlong_buffer=0, tis_cap=0.0)
    assert objectives["dr_grpo"].adv_estimator == "dr_grpo" and objectives["dr_grpo"].loss_avg_mode == "constant"
    assert objectives["dapo"].clip_ratio_high > objectives["dapo"].clip_ratio_low and objectives["dapo"].overlong_buffer
    assert objectives["gspo"].loss_type == "gspo" and objectives["cispo"].loss_type == "cispo"


def test_evaluation_is_as_long_as_the_longest_phase_unless_told(tmp_path):
    path = recipe_file(tmp_path, {"model": "m", "defaults": {"data": "d"}, "phases": {
        "a": {"max_response_tokens": 10, "max_prompt_tokens": 50}, "b": {"max_response_tokens": 20}}})
    assert load(path).evaluate.max_response_tokens == 20
    assert load(path).evaluate.max_prompt_tokens == Phase().max_prompt_tokens
    assert load(path, ["evaluate.max_response_tokens=5"]).evaluate.max_response_tokens == 5


WRONG = {  # override -> words of the message
    "model=": "model is empty",
    "phases.train.data=": "phases.train.data is empty",
    "phases.train.learning_rat=1": "unknown key phases.train.learning_rat: did you mean phases.train.",
    "phases.train.group_sise=1": "did you mean phases.train.group_size?",
    "rollout.engin=local": "did you mean rollout.engine?",
    "optim.lr=1": "unknown key optim.lr",
    "seeed=1": "did you mean seed?",
    "phases.test.steps=1": "no phase 'test'; it has train",
    "phases.train=5": "phases.train must be a mapping",
    "phases=[a, b]": "phases must be a mapping",
    "phases={}": "give at least one",
    "phases={start: {data: d}}": "none called start",
    "seed.x=1": "seed={'x': 1}: int is needed",
    "seed.x.y=1": "seed={'x': {'y': 1}}",
    "optim=5": "optim must be a mapping",
    "no_equals_sign": "write dotted.key=value",
    "=5": "write dotted.key=value",
    "prompt.columns={a": "the value of prompt.columns is not readable YAML",
    "phases.train.steps=two": "phases.train.steps='two': int is needed",
    "phases.train.steps=2.5": "phases.train.steps=2.5: int is needed",
    "phases.train.steps=true": "phases.train.steps=True: int is needed",
    "phases.train.steps=0": "phases.train.steps=0: a number above 0",
    "phases.train.group_size=-4": "phases.train.group_size=-4: a number above 0",
    "phases.train.group_size=1": "grpo compares responses; use 2 or more",
    "phases.train.lr=fast": "phases.train.lr='fast': a number is needed",
    "phases.train.lr=-1e-6": "a number of 0 or more",
    "phases.train.lr=.nan": "phases.train.lr=nan",
    "phases.train.lr=.inf": "phases.train.lr=inf",
    "phases.train.temperature=0": "phases.train.temperature=0.0: a number above 0",
    "phases.train.top_p=1.5": "phases.train.top_p=1.5: at most 1",
    "phases.train.captions=1": "phases.train.captions=1: bool is needed",
    "phases.train.data={a: b}": "str or list is needed",
    "phases.train.freeze=vision": "phases.train.freeze='vision': list is needed",
    "phases.train.freeze=[[vision]]": "phases.train.freeze[0]=['vision']: str is needed",
    "phases.train.reference=never": "one of 'phase', 'start'",
    "phases.train.updates_per_rollout=65": "exceeds prompts_per_step=64",
    "phases.train.objective.algorithm=ppo": "phases.train.objective.algorithm='ppo': one of 'grpo'",
    "phases.train.objective.kl_place=reward": "KL in the reward is k1",
    "phases.train.objective.clip_ratio_dual=0.5": "more than 1, or 0",
    "phases.train.objective.entropy_coef=.nan": "entropy_coef=nan",
    "phases.train.objective.tis_mode=sequence": "one of 'token_truncate', 'token_mask', 'sequence_truncate'",
    "phases.train.objective.tis_mode=token_mask": "tis_mode=token_mask, tis_floor=0.0 do nothing with tis_cap=0",
    "phases.train.objective.tis_floor=0.5": "tis_floor=0.5 do nothing with tis_cap=0",
    "phases.train.objective.tis_cap=0.5": "tis_floor=0.0, tis_cap=0.5: 1 must lie between",
    "phases.train.objective={tis_cap: 3, tis_floor: 2}": "tis_floor=2.0, tis_cap=3.0: 1 must lie between",
    "optim.betas=[0.9]": "two numbers in [0, 1)",
    "optim.betas=[0.9, 1.0]": "two numbers in [0, 1)",
    "optim.betas=[0.9, high]": "optim.betas[1]='high': a number",
    "optim.schedule=linear": "one of 'constant', 'cosine'",
    "rollout.engine=sglang": "one of 'local'",
    "resume=yes": "resume=True: str is needed",
    "device=tpu": "one of 'auto', 'cpu', 'cuda'",
    "world=moon": "one of '', 'desk'",
    "prompt.min_pixels=2000000": "prompt.min_pixels=2000000 exceeds prompt.max_pixels",
    "reward.timeout_s=0": "reward.timeout_s=0.0",
    "checkpoint.keep=0": "checkpoint.keep=0",
    "evaluate.tasks.t=rows.jsonl": "evaluate.tasks.t='rows.jsonl': give {data: FILE",
    "evaluate.tasks.t.captions=true": "give {data: FILE",
    "evaluate.tasks.t={data: 5}": "give {data: FILE",
    "evaluate.tasks.t={data: d, captions: some}": "give {data: FILE",
    "evaluate.tasks.t={data: d, limit: 5}": "give {data: FILE",
    "evaluate.tasks={../t: {data: d}}": "evaluate.tasks: '../t' is not a plain name",
    "phases={../../victim: {data: d}}": "phases: '../../victim' is not a plain name",
    "phases={a.b: {data: d}}": "phases: 'a.b' is not a plain name",
    'phases={"a\\e[31m": {data: d}}': "is not a plain name",
    "phases={'': {data: d}}": "phases: '' is not a plain name",
    "name=../up": "name: '../up' is not a plain name",
    "name=.hidden": "name: '.hidden' is not a plain name",
    f"name={'n' * 200}": "is not a plain name: at most 150 bytes",
    "phases.train.prompts_per_step=1000000000": "phases.train.prompts_per_step=1e+09: at most 1,048,576",
    "phases.train.group_size=100000000": "at most 65,536",
    "phases.train.steps=1000000000000000": "at most 1,000,000,000",
    "phases.train={data: d, prompts_per_step: 65536, group_size: 64}": "tokens a step are more than 2,147,483,648",
    "prompt.min_pixels=1000000000000": "at most 64,000,000",
    "reward.workers=1000000": "reward.workers=1e+06: at most 256",
    "dist.timeout_s=1e15": "at most 100,000,000",
    "pack.tokens_per_micro_batch=99999999999": "at most 2,147,483,647",
    f"phases.train.lr={10**400}": "phases.train.lr=inf: a number",
    f"seed={2**63}": "at most 9,223,372,036,854,775,807",
    f"seed={10**400}": "seed=inf: at most 9,223,372,036,854,775,807",
    f"seed=0x{'f' * 6000}": "it holds an integer of more than 3,000 digits",
    "rollout.sleep_level=true": "rollout.sleep_level=True: int is needed",
    "dtype=16": "dtype=16: str is needed, one of 'auto', 'float32', 'bfloat16'",
    "checkpoint.every_minutes=.nan": "checkpoint.every_minutes=nan: a number is needed",
    "optim=[]": "optim must be a mapping of keys, got []",
    "defaults.lrr=1": "unknown key defaults.lrr: did you mean defaults.lr?",
    'output="\\uD800"': "it is not valid Unicode",
    'output="a\\0b"': "it holds a zero byte",
    'phases.train.data=["a", "a\\0b"]': "phases.train.data[1]='a\\x00b': it holds a zero byte",
    "steps=3": "unknown key steps: did you mean phases.train.steps?",
    "seed={a: 1, a: 2}": "the key 'a' stands there twice",
    "prompt.columns={? [a] : 1, b: [[[[[[[": "not readable YAML",
}

RUN = ["model=m", "phases.train.data=d"]


def test_a_rollout_must_end_before_the_collective_that_waits_for_it():
    limits = ["rollout.timeout_s=100", "dist.timeout_s=100"]
    with pytest.raises(UserError, match="rollout.timeout_s=100 is not below dist.timeout_s=100: .* raise dist.timeout"):
        load("single", overrides=[*RUN, "rollout.engine=vllm", *limits])
    load("single", overrides=[*RUN, *limits])  # the embedded sampler has no limit
    load("single", overrides=[*RUN, "rollout.engine=vllm"])  # as they are, they fit


ELSEWHERE = {  # what TRL, EasyR1, verl and OpenRLHF call it -> ours
    "num_generations": "phases.train.group_size",
    "rollout.n": "phases.train.group_size",
    "worker.rollout.n": "phases.train.group_size",
    "actor_rollout_ref.rollout.n": "phases.train.group_size",
    "learning_rate": "phases.train.lr",
    "actor.optim.lr": "phases.train.lr",
    "lr": "phases.train.lr",
    "per_device_train_batch_size": "phases.train.prompts_per_step",
    "data.rollout_batch_size": "phases.train.prompts_per_step",
    "max_completion_length": "phases.train.max_response_tokens",
    "data.max_response_length": "phases.train.max_response_tokens",
    "max_prompt_length": "phases.train.max_prompt_tokens",
    "num_iterations": "phases.train.updates_per_rollout",
    "beta": "phases.train.objective.kl_coef",
    "kl_coef": "phases.train.objective.kl_coef",
    "algorithm.kl_coef": "phases.train.objective.kl_coef",
    "epsilon": "phases.train.objective.clip_ratio_low",
    "epsilon_high": "phases.train.objective.clip_ratio_high",
    "actor.clip_ratio_high": "phases.train.objective.clip_ratio_high",
    "temperature": "phases.train.temperature",
    "top_p": "phases.train.top_p",
    "group_size": "phases.train.group_size",
    "reward_funcs": "reward.functions",
    "max_steps": "phases.train.steps",
    "trainer.save_freq": "checkpoint.every_steps",
    "output_dir": "output",
    "trainer.test_freq": "evaluate.every_steps",
    "model_path": "model",
    "data.train_files": "phases.train.data",
    "max_grad_norm": "optim.max_grad_norm",
    "weight_decay": "optim.weight_decay",
    "gradient_checkpointing": "pack.checkpoint_activations",
    "attn_implementation": "pack.attention",
    "vllm_gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "system_prompt": "prompt.system",
    "max_pixels": "prompt.max_pixels",
    "algorithm": "phases.train.objective.algorithm",
    "run_name": "name",
    "loss_agg_mode": "phases.train.objective.loss_avg_mode",
    "trainer.find_last_checkpoint": "resume",
}


@pytest.mark.parametrize("key", ELSEWHERE)
def test_another_trainers_key_is_answered_with_ours(key):
    with pytest.raises(UserError, match=rf"unknown key {key.split('.')[0]}.*: did you mean {ELSEWHERE[key]}\?"):
        single(f"{key}=1")


def test_every_alias_names_a_key_that_there_is_and_is_none_itself():
    known = [key.replace(".<name>", "") for key, _, _ in config.known_keys()]
    assert set(ALIASES.values()) <= set(known)
    assert not set(ALIASES) & {key.rpartition(".")[2] for key in known}


def test_a_key_given_twice_is_refused_wherever_it_stands_and_a_merge_is_not(tmp_path):
    phase = "model: m\nphases:\n  a: {steps: 1, lr: 1, steps: 2}\n"
    for text in ("model: m\nmodel: n\n", phase, "a: {b: 1, 'b': 2}\n"):
        with pytest.raises(UserError, match="stands there twice"):
            load(recipe_file(tmp_path, text))
    merged = "model: m\ndefaults: &d {data: d, steps: 5}\nphases:\n  a:\n    <<: *d\n    steps: 6\n"
    assert load(recipe_file(tmp_path, merged)).phases["a"].steps == 6


def laughs(levels=12):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    return "\n".join(lines + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)])


@pytest.mark.parametrize("text", [laughs(), "a: &a [*a]", "a: &a {b: *a}", "[" * 20_000, "a: " * 20_000 + "1"])
def test_a_recipe_that_unfolds_without_end_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="not readable YAML") as error:
        load(recipe_file(tmp_path, text))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
def test_a_recipe_in_another_encoding_is_read_or_refused(tmp_path, encoding):
    path = tmp_path / "r.yaml"
    path.write_bytes(("\ufeff" * (encoding == "utf-16-le") + "model: mö\nphases: {a: {data: d}}\n").encode(encoding))
    if encoding == "latin-1":
        with pytest.raises(UserError, match="not readable YAML"):
            load(str(path))
    else:
        assert load(str(path)).model == "mö"


def test_a_file_too_large_for_a_recipe_is_not_read(tmp_path):
    with pytest.raises(UserError, match="is it a data file"):
        load(recipe_file(tmp_path, "#" * (4 << 20) + "\n"))


def test_a_dumped_recipe_holds_no_credentials():
    servers = ["http://user:pass@word@host:80", "https://key@host", "http://host:8000", "host", "://a@b", ""]
    cfg = single(f"rollout.servers={json.dumps(servers)}")
    text = config.dump(cfg)
    assert cfg.rollout.servers == servers and not re.search("pass|word|user|key@", text)
    assert config.read_yaml(text, "")["rollout"]["servers"] == [
        "http://host:80", "https://host", "http://host:8000", "host", "://b", ""]


def test_the_readmes_reward_example_survives_a_shell(tmp_path):
    (example,) = re.findall(r"`('reward\.functions=.*?')`", (REPOSITORY / "README.md").read_text())
    shell = ["bash", "-c", f"printf '%s\\0' {example}"]
    said = subprocess.run(shell, capture_output=True, text=True, check=True).stdout
    assert list(single(*said.split("\0")[:-1]).reward.functions.items()) == [("path/to/file.py:function", 1.0)]


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_value_is_named_with_what_is_wanted(override):
    with pytest.raises(UserError) as error:
        single(override)
    assert WRONG[override] in str(error.value)


def test_a_temperature_that_vllm_would_raise_is_refused():
    assert single("phases.train.temperature=0.005").phases["train"].temperature == 0.005
    with pytest.raises(UserError, match=r"phases.train.temperature=0.005: vLLM would sample at 0.01"):
        single("phases.train.temperature=0.005", "rollout.engine=vllm")


def test_importance_weights_are_on_for_another_engine_and_off_for_our_own():
    for engine, cap in (("local", 0.0), ("vllm", 2.0)):
        objective = single(f"rollout.engine={engine}").phases["train"].objective
        assert (objective.tis_cap, objective.tis_mode, objective.tis_floor) == (cap, "token_truncate", 0.0)
        for own in (0.0, 5.0):
            chosen = single(f"rollout.engine={engine}", f"phases.train.objective.tis_cap={own}").phases["train"]
            assert chosen.objective.tis_cap == own


@pytest.mark.parametrize("sampling", ["top_p=0.9", "top_k=20"])
@pytest.mark.parametrize("weights", ["rollout.engine=vllm", "phases.train.objective.tis_cap=2"])
def test_truncated_sampling_and_importance_weights_exclude_each_other_unless_asked_for_by_name(sampling, weights):
    assert single(f"phases.train.{sampling}").phases["train"].objective.tis_cap == 0
    with pytest.raises(UserError, match=rf"{sampling}.* make importance weights .*tis_with_truncated_sampling=true"):
        single(f"phases.train.{sampling}", weights)
    named = "phases.train.objective.tis_with_truncated_sampling=true"
    assert single(f"phases.train.{sampling}", weights, named).phases["train"].objective.tis_cap == 2


@pytest.mark.parametrize("text, words", [
    ("phases: {train: [}", "is not readable YAML"), ("- a\n- b\n", "holds list, not a mapping"), ("", "holds NoneType"),
    ("model: m\nphases: [a]\n", "phases must be a mapping"),
    ("model: m\nphases: {a: [1]}\n", "phases.a must be a mapping"),
    ("model: m\ndefaults: 3\nphases: {a: {}}\n", "defaults must be a mapping"), ("1: 2\n", "unknown key 1"),
    ("model: m\n", "give at least one"), ("\x00", "is not readable YAML"),
])
def test_a_wrong_file_is_named(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        load(recipe_file(tmp_path, text))
    assert words in str(error.value)


@pytest.mark.parametrize("text", ["model: m\nphases: [a]\n", "model: m\nphases: hello\n", "model: m\nphases:\n"])
def test_an_override_of_a_phase_that_is_not_there_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="phases"):
        load(recipe_file(tmp_path, text), ["phases.train.steps=1"])


def test_a_recipe_that_does_not_exist_names_those_that_do():
    with pytest.raises(UserError, match="no recipe 'dekc': give one of .*desk.*single"):
        load("dekc")
    with pytest.raises(UserError, match="no recipe 'gone.yaml'"):
        load("gone.yaml")


def leaves(value, prefix=""):
    for name, inner in value:
        if isinstance(inner, Section):
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield prefix + name, inner


def test_known_keys_are_all_fields_with_their_defaults_and_a_word_of_help():
    expected = {key: value for key, value in leaves(Recipe()) if not key.startswith(("defaults.", "phases"))}
    expected |= {f"phases.<name>.{key}": value for key, value in leaves(Phase())}
    known = config.known_keys()
    assert {key: default for key, default, _ in known} == expected and len(known) == len(expected)
    assert all(text for _, _, text in known)


def test_a_choice_is_shown_with_all_that_may_be_chosen():
    helps = {key: text for key, _, text in config.known_keys()}
    assert helps["optim.schedule"].startswith("[constant | cosine] ") and helps["world"].startswith("[desk] ")


def test_recipes_share_no_defaults():
    one, other = Recipe(), Recipe()
    one.defaults.objective.kl_coef, one.optim.betas[0] = 5.0, 0.5
    one.evaluate.tasks["t"] = {}
    assert other == Recipe() and Phase() == other.defaults


def test_every_known_key_can_be_set_to_its_default():
    changed = [f"{key.replace('<name>', 'train')}={json.dumps(default)}" for key, default, _ in config.known_keys()]
    defaults = [override for override in changed if not override.startswith(("model=", "phases.train.data="))]
    assert single(*defaults) == single()


def test_reading_a_recipe_needs_neither_torch_nor_transformers():
    code = ("import sys; from nanolmmr1 import config; config.load('desk'); "
            "print({'torch', 'transformers'} & set(sys.modules))")
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
