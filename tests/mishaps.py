"""Mishaps of a new user, over 300 of them: `python tests/mishaps.py [--quick] [--only WORD]`.

Each runs train.py in a folder of its own and must end with the right exit status and words: never a traceback, a
control code, a changed file that is not the run's, a process left behind, or a deadline missed. Those of `--quick` are
in the gate. To be quick, one process imports everything once and forks a child for each; what depends on how a process
starts (environment, redirections, torchrun) starts one. Tracebacks of torchrun itself do not count.
"""

import argparse
import collections
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "train.py"
DEADLINE_S, PEAK_GB = 120, 4.0
SMALL = [f"phases.train.{key}" for key in ("steps=2", "prompts_per_step=2", "group_size=2", "max_response_tokens=4")]
MARK = ".nanolmmr1"
VARIED = "def varied(response, row):\n    return sum(map(ord, response)) % 17 / 17\n"
DONE = re.compile(r"2 steps\. Model: ")


class Mishap(NamedTuple):
    kind: str
    name: str
    make: object  # (folder) -> arguments of train.py beside the usual ones, or a Plan
    status: object = 2  # or a tuple of possible ones
    words: str = ""  # regular expression that the output must match
    quick: bool = True


class Plan(NamedTuple):
    """How a mishap is run, where arguments alone do not say it."""

    args: list = []
    alone: bool = False  # these arguments and no usual ones
    shell: str = ""  # a real process: a bash command in which $RUN is train.py with its arguments
    env: dict = {}
    signals: tuple = ()  # sent one after another once `when` is there
    when: str = "out/metrics.jsonl"
    first: list = None  # arguments of an earlier run in the same folder; then `change(folder)`
    change: object = None
    after: object = None  # (folder) -> what is wrong afterwards, or ""


ALL = []


def mishaps(kind, table, status=2, quick=True):
    """Add rows (name, make or arguments, words[, status])."""
    for name, make, words, *other in table:
        how = make if callable(make) else (lambda folder, given=make: given)
        ALL.append(Mishap(kind, name, how, other[0] if other else status, words, quick))


def rows_of(count=4):
    return [{"problem": f"How much is {n} + {n}?", "answer": str(2 * n)} for n in range(count)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_rows(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------------------------------------------------------------
# recipe


def recipe(text, name="mine.yaml"):
    return lambda folder: Plan([str(write(folder / name, text))], alone=True)


LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
GOOD = (
    "model: model\nphases: {train: {data: rows.jsonl, steps: 2, prompts_per_step: 2, group_size: 2, "
    "max_response_tokens: 4}}\n"
)
mishaps(
    "recipe",
    [
        (key, [f"{key}={value}"], rf"did you mean {ours}\?")
        for key, value, ours in (
            ("steps", 3, "phases.train.steps"),
            ("num_generations", 8, "phases.train.group_size"),
            ("learning_rate", 1, "phases.train.lr"),
            ("per_device_train_batch_size", 8, "phases.train.prompts_per_step"),
            ("beta", 0.1, "phases.train.objective.kl_coef"),
            ("epsilon", 0.2, "phases.train.objective.clip_ratio_low"),
            ("max_completion_length", 9, "phases.train.max_response_tokens"),
            ("max_prompt_length", 9, "phases.train.max_prompt_tokens"),
            ("rollout.n", 5, "phases.train.group_size"),
            ("actor.optim.lr", 1, "phases.train.lr"),
            ("kl_coef", 0.1, "phases.train.objective.kl_coef"),
            ("temperature", 1, "phases.train.temperature"),
            ("num_iterations", 2, "phases.train.updates_per_rollout"),
            ("reward_funcs", "f", "reward.functions"),
            ("output_dir", "x", "output"),
            ("save_steps", 5, "checkpoint.every_steps"),
            ("trainer.save_freq", 5, "checkpoint.every_steps"),
            ("bf16", "true", "dtype"),
            ("gradient_checkpointing", "true", "pack.checkpoint_activations"),
            ("data.train_files", "x", "phases.train.data"),
            ("attn_implementation", "flash", "pack.attention"),
            ("vllm_gpu_memory_utilization", 0.3, "rollout.gpu_memory_utilization"),
            ("system_prompt", "x", "prompt.system"),
            ("freeze_vision_tower", "true", "phases.train.freeze"),
            ("seeed", 1, "seed"),
        )
    ],
)
mishaps(
    "recipe",
    [
        ("two dashes", ["--phases.train.lr=1e-4"], "2 steps", 0),
        ("two dashes, unknown", ["--seeed=1"], "did you mean seed"),
        ("an option", ["--lr", "3"], "arguments are"),
        ("no recipe", lambda at: Plan(["singel"], alone=True), "no recipe 'singel'"),
        ("two recipes", ["desk"], "arguments are"),
        ("a key twice", recipe(GOOD + "model: other\n"), "'model' stands there twice"),
        (
            "a key twice inside",
            recipe("model: m\nphases:\n  train: {data: r, lr: 1, lr: 2}\n"),
            "'lr' stands there twice",
        ),
        ("aliases without end", recipe(LAUGHS), "not readable YAML"),
        ("an alias of itself", recipe("a: &a [*a]"), "not readable YAML"),
        ("deep nesting", recipe("[" * 9999), "not readable YAML"),
        ("tabs", recipe("model:\tm\n\tphases: {}\n"), "not readable YAML"),
        ("empty", recipe(""), "holds NoneType"),
        ("a list", recipe("- a\n"), "holds list"),
        ("text", recipe("hello"), "holds str"),
        ("binary", recipe(bytes(range(256))), "not readable YAML"),
        ("UTF-16", recipe(GOOD.encode("utf-16")), DONE.pattern, 0),
        ("a byte-order mark", recipe(b"\xef\xbb\xbf" + GOOD.encode()), DONE.pattern, 0),
        ("too large", recipe("#" * (5 << 20)), "is it a data file"),
        ("a folder", lambda at: (at / "d.yaml").mkdir() or Plan(["d.yaml"], alone=True), "no recipe"),
        ("code", recipe("model: !!python/object/apply:os.system ['touch hacked']\n"), "not readable YAML"),
        ("no phases", recipe("model: m\n"), "give at least one"),
        ("phases a list", recipe("model: m\nphases: []\n"), "give at least one"),
        (
            "a phase upwards",
            recipe("model: m\nphases: {../../victim: {data: d, objective: {kl_coef: 1}}}\n"),
            "not a plain name",
        ),
        ("a phase with a slash", recipe("model: m\nphases: {a/b: {data: d}}\n"), "not a plain name"),
        ("a phase with a point", recipe("model: m\nphases: {a.b: {data: d}}\n"), "not a plain name"),
        ("a phase in colour", recipe('model: m\nphases: {"\\e[31mx": {data: d}}\n'), r"not a plain name"),
        ("a task upwards", ["evaluate.tasks={../t: {data: rows.jsonl}}"], "not a plain name"),
        ("a hidden run", ["name=.x"], "not a plain name"),
        ("a run upwards", ["name=../x"], "not a plain name"),
        ("prompts without end", ["phases.train.prompts_per_step=1000000000"], "at most 1,048,576"),
        ("prompts as 1e9", ["phases.train.prompts_per_step=1e9"], "int is needed"),
        ("groups without end", ["phases.train.group_size=100000000"], "at most"),
        ("pixels without end", ["prompt.min_pixels=1000000000000"], "at most 64,000,000"),
        ("steps without end", ["phases.train.steps=1000000000000000"], "at most"),
        ("workers without end", ["reward.workers=1000000"], "at most 256"),
        ("tokens without end", ["phases.train.max_response_tokens=1000000000000"], "at most"),
        ("a time without end", ["dist.timeout_s=1e15"], "at most"),
        ("NaN", ["phases.train.lr=.nan"], "not inf or nan"),
        ("infinity", ["phases.train.lr=.inf"], "not inf or nan"),
        ("below zero", ["phases.train.lr=-1"], "0 or more"),
        ("text for a number", ["phases.train.steps=two"], "int is needed"),
        ("a group of one", ["phases.train.group_size=1"], "use 2 or more"),
        ("an unknown algorithm", ["phases.train.objective.algorithm=ppo"], "one of 'grpo'"),
        ("torn brackets", ["reward.functions={a:"], "not readable YAML"),
        ("a zero byte", ['output="a\\0b"'], "zero byte"),
        ("kernels for a GPU", ["pack.attention=triton"], "pack.attention=triton needs a GPU"),
        ("flash", ["pack.attention=flash"], "needs a GPU"),
        ("varlen", ["pack.attention=varlen"], "needs a GPU"),
        ("a head for a GPU", ["pack.head=triton"], "pack.head=triton needs a GPU"),
        ("a GPU", ["device=cuda"], "torch sees no GPU"),
        (
            "vllm that is not there",
            ["rollout.engine=vllm"],
            "pip install" if not importlib.util.find_spec("vllm") else "",
        ),
        ("an unknown part", ["phases.train.freeze=[eyes]"], "'eyes'"),
        ("a format that is none", ["reward.format=(a"], "no regular expression"),
    ],
)

# ---------------------------------------------------------------------------------------------------------------------
# output folder


def taken(name="mine.txt", inside="out", args=("output=out",)):
    def make(at):
        write(at / inside / name, "mine")
        return list(args)

    return make


def marked(inside, args):
    def make(at):
        write(at / "out" / MARK, b"")
        (at / "out" / inside).mkdir(parents=True)
        return args

    return make


mishaps(
    "output",
    [
        ("the current folder", ["output=."], "is not empty"),
        ("the model", ["output=model"], "lies in output=model"),
        ("the model and its folder", ["model=model", "output=."], "is not empty"),
        ("the parent", ["output=.."], "is not empty|lies in"),
        ("another's files", taken(), "is not empty"),
        ("a hidden file", taken(".profile"), "is not empty"),
        ("another's metrics", taken("metrics.jsonl"), "is not empty"),
        ("another's model", taken("model/config.json"), "is not empty"),
        ("another's recipe", taken("recipe.yaml"), "is not empty"),
        ("a report", taken("report.html"), "is not empty"),
        ("an empty folder in it", lambda at: (at / "out" / "x").mkdir(parents=True) or ["output=out"], "is not empty"),
        ("a lock alone", taken(".lock"), "is not empty"),
        ("a file", taken("out", "", ["output=out"]), "as it is a file"),
        ("a device", ["output=/dev/null"], "as it is a file"),
        ("below a file", taken("f", "", ["output=f/out"]), "cannot be written"),
        ("/proc", ["output=/proc/x"], "cannot be written"),
        ("a long name", ["output=" + "n" * 300], "cannot be written"),
        ("a link to files", lambda at: taken()(at) and (at / "l").symlink_to("out") or ["output=l"], "is not empty"),
        ("a link to nothing", lambda at: (at / "l").symlink_to("gone") or ["output=l"], "cannot be written"),
        ("a link to itself", lambda at: (at / "l").symlink_to("l") or ["output=l"], "cannot be written"),
        ("a run's model", marked("model", ["output=out/model"]), "the run in .* replaces"),
        ("a run's checkpoints", marked("checkpoints", ["output=out/checkpoints/x"]), "replaces"),
        ("a run's reference", marked("reference", ["output=out/reference"]), "replaces"),
        ("a model inside", marked("model", ["output=out", "model=out/model"]), "model=out/model lies in"),
        (
            "data inside",
            marked("checkpoints", ["output=out", "phases.train.data=out/checkpoints/rows.jsonl"]),
            "phases.train.data=.* lies in",
        ),
        ("samples as data", marked("x", ["output=out", "phases.train.data=out/samples.jsonl"]), "lies in"),
        ("a task inside", marked("x", ["output=out", "evaluate.tasks.t.data=out/model/r.jsonl"]), "lies in"),
        (
            "a data folder",
            lambda at: write_rows(at / "d" / "r.jsonl", rows_of()) and ["output=d", "phases.train.data=d"],
            "lies in output=d",
        ),
        ("an empty folder", lambda at: (at / "out").mkdir() or ["output=out"], DONE.pattern, 0),
        ("a disk", lambda at: (at / "out" / "lost+found").mkdir(parents=True) or ["output=out"], DONE.pattern, 0),
        ("spaces and letters", ["output=my rün 数"], DONE.pattern, 0),
        ("a new line", ['output="a\\nb"'], "2 steps", 0),
        ("deep and new", ["output=a/b/c/d"], DONE.pattern, 0),
    ],
)

# ---------------------------------------------------------------------------------------------------------------------
# data


def data(content, name="d.jsonl", *args):
    return lambda at: [f"phases.train.data={write(at / 'data' / name, content).relative_to(at)}", *args]


def one(**row):
    return data(json.dumps({"problem": "1+1?", "answer": "2"} | row) + "\n")


def parquet(columns, name="d.parquet", **options):
    def make(at):
        import pyarrow
        import pyarrow.parquet

        (at / "data").mkdir()
        pyarrow.parquet.write_table(pyarrow.table(columns()), at / "data" / name, **options)
        return [f"phases.train.data=data/{name}"]

    return make


def special(create):
    def make(at):
        (at / "data").mkdir()
        create(at / "data" / "d.jsonl")
        return ["phases.train.data=data"]

    return make


LINES = "".join(json.dumps(row) + "\n" for row in rows_of())
mishaps(
    "data",
    [
        ("gone", ["phases.train.data=gone.jsonl"], "gone.jsonl does not exist"),
        ("no hub", ["phases.train.data=owner/name"], "neither a file or folder here"),
        ("empty", data(""), "holds no rows"),
        ("blank lines", data("\n\n \n"), "holds no rows"),
        ("no JSON", data("hello\n"), r"d.jsonl:1: unreadable JSON"),
        ("a torn line", data(LINES + '{"problem": '), r"d.jsonl:5: unreadable[^\0]*" + DONE.pattern, 0),
        ("a list a line", data("[1]\n"), "an object with named columns"),
        ("no answer", data('{"problem": "1+1?"}\n'), "no answer"),
        ("an empty answer", one(answer=""), "no answer"),
        ("no problem", data('{"answer": "2"}\n'), "no problem"),
        ("a problem of numbers", one(problem=[1]), "must be text"),
        ("half a surrogate", data('{"problem": "\\ud800", "answer": "2"}\n'), "surrogate"),
        ("deep JSON", data("[" * 200_000), "unreadable JSON"),
        ("a huge number", data('{"problem": "1", "answer": ' + "9" * 10_000 + "}\n"), "unreadable JSON"),
        ("a file of no kind", data(LINES, "d.txt"), "is not read"),
        ("a folder of nothing", lambda at: (at / "data").mkdir() or ["phases.train.data=data"], "holds no"),
        ("a split of a file", lambda at: [data(LINES)(at)[0] + "@train"], "no splits"),
        ("an unknown column", ["prompt.columns={picture: x}"], "prompt.columns"),
        ("a FIFO", special(os.mkfifo), "no regular file"),
        ("a device", special(lambda path: path.symlink_to("/dev/zero")), "no regular file"),
        ("a link to itself", special(lambda path: path.symlink_to(path)), "no regular file|cannot be read"),
        ("a folder of its name", special(Path.mkdir), "no regular file"),
        ("markers and no picture", one(problem="<image>?"), DONE.pattern, 0),
        ("a picture and no marker", one(images=["x.png"]), "is missing|0 <image>"),
        ("a picture that is gone", one(problem="<image>?", images=["x.png"]), "'x.png' is missing"),
        ("a picture above", one(problem="<image>?", images=["../../etc/passwd"]), "leads out of"),
        (
            "a picture that is none",
            lambda at: write(at / "data" / "x.png", "text") and one(problem="<image>?", images=["x.png"])(at),
            "cannot be read",
        ),
        ("a picture of a device", one(problem="<image>?", images=["/dev/zero"]), "is missing"),
        ("a special token", one(problem="<|im_end|> hi"), DONE.pattern, 0),
        ("too long", one(problem="long " * 9999), "no row is left"),
        ("a very long problem", one(problem="x" * 3_000_000), "no row is left"),
        ("codes in an id", one(id="\x1b[31mred\x07\n"), DONE.pattern, 0),
        ("codes in a problem", one(problem="\x1b[2J\x07 1+1?"), DONE.pattern, 0),
        ("a nul in a problem", one(problem="a\0b"), DONE.pattern, 0),
        ("UTF-16", data(LINES.encode("utf-16")), DONE.pattern, 0),
        ("UTF-32", data(LINES.encode("utf-32")), DONE.pattern, 0),
        ("a byte-order mark", data(b"\xef\xbb\xbf" + LINES.encode()), DONE.pattern, 0),
        ("Latin-1", data('{"problem": "é", "answer": "2"}\n'.encode("latin-1")), "unreadable|cannot be read"),
        ("a list in UTF-16", data(json.dumps(rows_of()).encode("utf-16"), "d.json"), DONE.pattern, 0),
        ("a list with a mark", data(b"\xef\xbb\xbf" + json.dumps(rows_of()).encode(), "d.json"), DONE.pattern, 0),
        ("a torn list", data(json.dumps(rows_of())[:-9], "d.json"), "unreadable JSON"),
        ("a list and more", data(json.dumps(rows_of()) + "x", "d.json"), "unreadable JSON"),
        ("CRLF", data(LINES.replace("\n", "\r\n")), DONE.pattern, 0),
        ("a parquet that is none", data(b"PAR1" + bytes(99), "d.parquet"), "not readable parquet"),
        (
            "a torn parquet",
            lambda at: (
                parquet(lambda: {"problem": ["1"], "answer": ["1"]})(at),
                os.truncate(at / "data" / "d.parquet", 100),
            )[0],
            "not readable parquet",
        ),
        (
            "a parquet bomb",
            parquet(lambda: {"problem": ["x" * 40_000_000] * 9, "answer": ["1"] * 9}, compression="zstd"),
            "unpack|bytes|no row is left",
        ),
        ("a gold that nothing meets", one(answer="{" * 99), "no row is left"),
        ("a tower as gold", one(answer="$9^{9^{9^{9}}}$"), "no row is left"),
        (
            "two splits",
            lambda at: (
                [write_rows(at / "data" / f"{name}.jsonl", rows_of()) for name in ("a", "b")]
                and ["phases.train.data=data"]
            ),
            "pick one",
        ),
        (
            "a name with a line",
            lambda at: ['phases.train.data="gone\\nb.jsonl"'],
            "does not exist",
        ),
    ],
)

# ---------------------------------------------------------------------------------------------------------------------
# model folder


def model(change, *args):
    def make(at):
        at.joinpath("mine").mkdir()
        for path in (at / "model").resolve().iterdir():
            os.link(path, at / "mine" / path.name)
        change(at / "mine")
        return ["model=mine", *args]

    return make


def put(name, content):
    def change(at):
        (at / name).unlink(missing_ok=True)
        write(at / name, content if isinstance(content, bytes | str) else json.dumps(content))

    return change


def config(**changes):
    def change(at):
        tree = json.loads((at / "config.json").read_text())
        for key, value in changes.items():
            where = tree
            *parents, leaf = key.split("__")
            for parent in parents:
                where = where[parent]
            where[leaf] = value
        put("config.json", tree)(at)

    return change


def template(text):
    def change(at):
        (at / "chat_template.json").unlink(missing_ok=True)
        tree = json.loads((at / "tokenizer_config.json").read_text())
        put("tokenizer_config.json", tree | {"chat_template": text})(at)

    return change


def gone(*names):
    return lambda at: [(at / name).unlink() for name in names]


def torn(name, size):
    def change(at):
        content = (at / name).read_bytes()
        put(name, content[:size])(at)

    return change


def weights(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return put("model.safetensors", len(text).to_bytes(8, "little") + text + data)


mishaps(
    "model",
    [
        ("gone", ["model=gone"], "neither a folder here nor a hub id"),
        ("empty", lambda at: (at / "e").mkdir() or ["model=e"], "no config.json|no tokenizer"),
        ("a file", ["model=rows.jsonl"], "neither a folder"),
        ("no config", model(gone("config.json")), "config.json"),
        ("no weights", model(gone("model.safetensors")), "no .safetensors"),
        ("no tokenizer", model(gone("tokenizer.json")), "no tokenizer.json"),
        ("no tokenizer config", model(gone("tokenizer_config.json")), "tokenizer_config.json"),
        ("no preprocessor", model(gone("preprocessor_config.json")), "preprocessor_config.json"),
        ("config of text", model(put("config.json", "hello")), "config.json"),
        ("config a list", model(put("config.json", "[1]")), "'list' model|config.json"),
        ("config deep", model(put("config.json", "[" * 99999)), "config.json"),
        ("another model", model(config(model_type="llama")), "'llama'"),
        ("hidden_size text", model(config(hidden_size="big")), "hidden_size"),
        ("hidden_size below zero", model(config(hidden_size=-32)), "hidden_size"),
        ("hidden_size zero", model(config(hidden_size=0)), "hidden_size"),
        ("heads of none", model(config(num_attention_heads=0)), "num_attention_heads"),
        ("layers without end", model(config(num_hidden_layers=10**9)), "num_hidden_layers|parameters"),
        ("vocabulary without end", model(config(vocab_size=10**12)), "vocab_size|parameters"),
        ("eps text", model(config(rms_norm_eps="x")), "rms_norm_eps"),
        ("eps true", model(config(rms_norm_eps=True)), "rms_norm_eps"),
        ("vision a list", model(config(vision_config=[1])), "vision_config|config.json"),
        ("depth below zero", model(config(vision_config__depth=-1)), "depth"),
        ("patch text", model(config(vision_config__patch_size="14")), "patch_size"),
        ("tokenizer {}", model(put("tokenizer.json", "{}")), "tokenizer"),
        ("tokenizer []", model(put("tokenizer.json", "[]")), "tokenizer"),
        ("tokenizer torn", model(torn("tokenizer.json", 999)), "tokenizer"),
        ("tokenizer config a list", model(put("tokenizer_config.json", "[1]")), "tokenizer_config.json"),
        ("tokenizer config null", model(put("tokenizer_config.json", "null")), "tokenizer_config.json"),
        ("preprocessor a list", model(put("preprocessor_config.json", "[1]")), "preprocessor_config.json"),
        ("preprocessor without size", model(put("preprocessor_config.json", {"patch_size": -1})), "patch_size"),
        ("stops of text", model(put("generation_config.json", {"eos_token_id": "end"})), "eos_token_id"),
        ("generation a list", model(put("generation_config.json", "[]")), "generation_config.json"),
        ("template of a fault", model(template("{{ 1 / 0 }}")), "chat template"),
        ("template torn", model(template("{% for")), "chat template"),
        ("template out of its box", model(template("{{ ''.__class__.__mro__ }}")), "chat template"),
        ("template that refuses", model(template("{{ raise_exception('no') }}")), "chat template"),
        ("template without end", model(template("{% for i in range(10**12) %}x{% endfor %}")), "chat template"),
        ("template of text alone", model(template("{% for m in messages %}{{ m.role }}{% endfor %}")), "chat template"),
        ("no template", model(template(None)), "chat template"),
        ("a torn shard", model(torn("model.safetensors", 5000)), "model.safetensors"),
        ("an empty shard", model(put("model.safetensors", "")), "model.safetensors"),
        (
            "a header that lies",
            model(weights({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 9**9]}})),
            "model.safetensors|parameters",
        ),
        ("a header of text", model(weights(b"hello")), "model.safetensors|parameters"),
        ("a header without end", model(put("model.safetensors", b"\xff" * 64)), "model.safetensors|parameters"),
        (
            "a pickle alone",
            model(
                lambda at: (
                    gone("model.safetensors")(at),
                    put("pytorch_model.bin", b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR.")(at),
                )
            ),
            "no .safetensors",
        ),
        (
            "an index upwards",
            model(put("model.safetensors.index.json", {"weight_map": {"a": "../../x.safetensors"}})),
            "outside its folder",
        ),
        ("an index of text", model(put("model.safetensors.index.json", "hello")), "not a weight index"),
        (
            "shards that are gone",
            model(put("model.safetensors.index.json", {"weight_map": {"a": "model-2.safetensors"}})),
            "lacks 1 of 1",
        ),
        (
            "code for the tokenizer",
            model(
                put("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a.b", None]}, "tokenizer_class": "Mine"})
            ),
            "auto_map|not known",
        ),
        (
            "config in UTF-16",
            model(lambda at: put("config.json", (at / "config.json").read_text().encode("utf-16"))(at)),
            DONE.pattern,
            0,
        ),
        ("a link to itself", lambda at: (at / "l").symlink_to("l") or ["model=l"], "neither a folder"),
    ],
)

# ---------------------------------------------------------------------------------------------------------------------
# resume

FIRST = ["phases.train.steps=1"]


def again(change=None, *args, after=None, first=FIRST):
    return lambda at: Plan(list(args), first=first, change=change, after=after)


def spoil(name, content):
    return lambda at: write(at / "out" / name, content)


def folder_instead(name):
    def change(at):
        (at / "out" / name).unlink()
        (at / "out" / name).mkdir()

    return change


def damage(name, edit):
    def change(at):
        path = next((at / "out" / "checkpoints" / "step_1").glob(name))
        path.write_bytes(edit(path.read_bytes()))

    return change


def lacks(*names):
    return lambda at: "".join(f"{name} is missing; " for name in names if not (at / "out" / name).exists())


KL = ["phases.train.objective.kl_coef=0.1"]
mishaps(
    "resume",
    [
        ("nothing has changed", again(), DONE.pattern, 0),
        (
            "learning rate",
            again(None, "phases.train.lr=1e-4", after=lacks("recipe_until_step_1.yaml")),
            "lr was 1e-06, is now 0.0001",
            0,
        ),
        ("group size", again(None, "phases.train.group_size=4"), "group_size was 2, is now 4", 0),
        ("reward weights", again(None, "reward.accuracy_weight=2"), "accuracy_weight was 1.0, is now 2.0", 0),
        ("two keys", again(None, "phases.train.lr=1e-4", "optim.eps=1e-7"), "eps was 1e-08, is now 1e-07", 0),
        (
            "a task more",
            again(None, "evaluate.tasks.t.data=rows.jsonl", "evaluate.max_response_tokens=2"),
            "tasks.t.data was absent",
            0,
        ),
        ("another seed", again(None, "seed=1"), "seed=0, not 1"),
        (
            "another model path",
            again(lambda at: shutil.copytree(at / "model", at / "moved"), "model=moved"),
            "not moved",
        ),
        (
            "another model path, wanted",
            again(lambda at: shutil.copytree(at / "model", at / "moved"), "model=moved", "resume=changed"),
            DONE.pattern,
            0,
        ),
        ("never", again(None, "resume=never"), "holds a run already"),
        ("other rows", again(lambda at: write_rows(at / "rows.jsonl", rows_of(5)[1:])), "has other rows"),
        ("fewer rows", again(lambda at: write_rows(at / "rows.jsonl", rows_of(3))), "has other rows"),
        (
            "another path",
            again(lambda at: write_rows(at / "more.jsonl", rows_of(9)), "phases.train.data=more.jsonl"),
            "has other rows",
        ),
        (
            "other rows, wanted",
            again(lambda at: write_rows(at / "rows.jsonl", rows_of(3)), "resume=changed"),
            DONE.pattern,
            0,
        ),
        (
            "rows that were moved",
            again(lambda at: (at / "rows.jsonl").rename(at / "moved.jsonl"), "phases.train.data=moved.jsonl"),
            "data was rows.jsonl, is now moved.jsonl",
            0,
        ),
        ("rows that are gone", again(lambda at: (at / "rows.jsonl").unlink()), "does not exist"),
        (
            "other phases",
            again(lambda at: write(at / "two.yaml", GOOD.replace("train:", "other:")), "x")
            and (
                lambda at: Plan(
                    [str(write(at / "two.yaml", GOOD.replace("train:", "other:"))), "output=out"],
                    alone=True,
                    first=FIRST,
                )
            ),
            "phases=\\['train'\\], not \\['other'\\]",
        ),
        ("metrics torn", again(spoil("metrics.jsonl", '{"step": 1')), DONE.pattern, 0),
        ("metrics garbage", again(spoil("metrics.jsonl", b"\xff\x00\n[1]\n")), "no records of a step", 0),
        ("metrics deep", again(spoil("metrics.jsonl", "[" * 99999 + "\n")), "no records", 0),
        ("metrics gone", again(lambda at: (at / "out/metrics.jsonl").unlink()), DONE.pattern, 0),
        ("metrics a folder", again(folder_instead("metrics.jsonl")), "is no file", 0),
        ("samples garbage", again(spoil("samples.jsonl", "{}\n")), "no records", 0),
        (
            "samples of another shape",
            again(spoil("samples.jsonl", '{"step": 1, "phase": "train"}\n')),
            "report.html could not",
            0,
        ),
        ("summary torn", again(spoil("summary.json", "{")), DONE.pattern, 0),
        ("summary a folder", again(folder_instead("summary.json")), "summary.json cannot be written", 0),
        ("report a folder", again(folder_instead("report.html")), "report.html could not", 0),
        (
            "recipe gone",
            again(lambda at: (at / "out/recipe.yaml").unlink(), after=lacks("recipe.yaml")),
            DONE.pattern,
            0,
        ),
        ("recipe garbage", again(spoil("recipe.yaml", b"\xff: [")), "kept as recipe_until_step_1", 0),
        ("recipe a folder", again(folder_instead("recipe.yaml")), "recipe.yaml cannot be written", 0),
        ("mark garbage", again(spoil(MARK, b"\xff\x00")), DONE.pattern, 0),
        ("mark gone", again(lambda at: (at / "out" / MARK).unlink()), "is not empty"),
        (
            "model gone",
            again(
                lambda at: shutil.rmtree(at / "out/model"),
                "phases.train.steps=1",
                after=lacks("model/model.safetensors"),
            ),
            "1 steps",
            0,
        ),
        (
            "weights gone",
            again(
                lambda at: (at / "out/model/model.safetensors").unlink(),
                "phases.train.steps=1",
                after=lacks("model/model.safetensors"),
            ),
            "1 steps",
            0,
        ),
        ("finished", again(None, "phases.train.steps=1"), "is finished after 1 steps", 0),
        (
            "a seal of garbage",
            again(spoil("reference/train.json", "{oops"), *KL, first=FIRST + KL),
            "without a check of its hashes",
            0,
        ),
        (
            "a tensor flipped",
            again(damage("tensors/*", lambda b: b[:-1] + bytes([b[-1] ^ 1]))),
            "no whole checkpoint left",
        ),
        ("a manifest torn", again(damage("manifest.json", lambda b: b[:99])), "no whole checkpoint left"),
        (
            "a manifest changed",
            again(damage("manifest.json", lambda b: b.replace(b'"step": 1', b'"step": 2'))),
            "no whole checkpoint left",
        ),
        ("a state torn", again(damage("state.json", lambda b: b[:9])), "no whole checkpoint left"),
        (
            "a stranger among tensors",
            again(lambda at: write(at / "out/checkpoints/step_1/tensors/x.safetensors", "x")),
            "was not written with it",
        ),
        ("half a checkpoint", again(lambda at: write(at / "out/checkpoints/step_9.tmp/x", "x")), DONE.pattern, 0),
    ],
)

# ---------------------------------------------------------------------------------------------------------------------
# signals

LONG = ["phases.train.steps=1000"]
WAITING = (
    "import pathlib, time\n\ndef varied(*_):\n    pathlib.Path('waiting').touch()\n    time.sleep(9)\n    return 0\n"
)


def stopped(*numbers, when="out/metrics.jsonl", args=(), shell="", after=None):
    return lambda at: Plan([*LONG, *args], signals=numbers, when=when, shell=shell, after=after)


def waiting(*numbers):
    def make(at):
        write(at / "wait.py", WAITING)
        return Plan(['reward.functions={"wait.py:varied": 1.0}'], signals=numbers, when="waiting")

    return make


def one_checkpoint(at):
    found = [path.name for path in (at / "out/checkpoints").iterdir()]
    return "" if len(found) == 1 and found[0][5:].isdigit() else f"checkpoints {found}"


TORCHRUN = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2 $RUN"
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
mishaps(
    "signal",
    [
        (f"{number.name} {name}", make, words, status)
        for number, status in ((TERM, 143), (INT, 130), (HUP, 129))
        for name, make, words in (
            (
                "in a step",
                stopped(number, after=one_checkpoint),
                rf"stopped by {number.name} after step \d+: start the same",
            ),
            ("before the first step", waiting(number), rf"stopped by {number.name} before the first step"),
            (
                "while it evaluates",
                stopped(
                    number,
                    when="out/recipe.yaml",
                    args=["evaluate.tasks.t.data=rows.jsonl", "evaluate.max_response_tokens=999"],
                ),
                f"stopped by {number.name}",
            ),
            (
                "with a KL reference",
                stopped(number, args=KL, after=one_checkpoint),
                f"stopped by {number.name} after step",
            ),
            (
                "with checkpoints amid",
                stopped(number, args=["checkpoint.every_steps=1", "checkpoint.keep=1"], after=one_checkpoint),
                f"stopped by {number.name} after step",
            ),
        )
    ],
)
mishaps(
    "signal",
    [
        ("SIGUSR1", stopped(signal.SIGUSR1, after=one_checkpoint), "stopped by SIGUSR1 after step", 143),
        ("Ctrl-C twice", stopped(INT, INT), "", (130, -2)),
        ("SIGTERM, then Ctrl-C", stopped(TERM, INT), "", (143, 130, -2)),
        ("SIGTERM twice", stopped(TERM, TERM, after=one_checkpoint), "stopped by SIGTERM after step", 143),
        ("SIGKILL", stopped(signal.SIGKILL), "", -9),
        ("SIGPIPE", stopped(signal.SIGPIPE, TERM), "stopped by SIGTERM", 143),
    ],
)
mishaps(
    "signal",
    [
        (
            "nohup",
            lambda at: Plan(shell="(trap '' HUP; $RUN & pid=$!; sleep 6; kill -HUP $pid; wait $pid)"),
            DONE.pattern,
            0,
        ),
        (
            "torchrun and SIGTERM",
            stopped(TERM, shell=TORCHRUN, after=one_checkpoint),
            "stopped by SIGTERM after step",
            (1, 143, -15),
        ),
        (
            "torchrun and Ctrl-C",
            stopped(INT, shell=TORCHRUN, after=one_checkpoint),
            "stopped by SIGINT after step",
            (1, 130, -2),
        ),
        (
            "torchrun and SIGHUP",
            stopped(HUP, shell=TORCHRUN, after=one_checkpoint),
            "stopped by SIGHUP after step",
            (1, 129, -1),
        ),
        (
            "torchrun before the first step",
            lambda at: waiting(TERM)(at)._replace(shell=TORCHRUN),
            "stopped by SIGTERM before",
            (1, 143, -15),
        ),
    ],
    quick=False,
)

# ---------------------------------------------------------------------------------------------------------------------
# environment


def shell(command, **env):
    return lambda at: Plan(shell=command, env=env)


def impostor(*names, **plan):
    def make(at):
        for name in names:
            write(at / name, "open('hacked', 'w')\nraise SystemExit(9)\n")
        return Plan(**plan) if plan else []

    return make


def nosy(at):
    write(
        at / "nosy.py", "import os\ndef f(response, row):\n    assert 's3cret' not in str(os.environ)\n    return 0.5\n"
    )
    return Plan(['reward.functions={"nosy.py:f": 1.0}'], env={"HF_TOKEN": "s3cret", "OPENAI_API_KEY": "s3cret"})


mishaps(
    "environment",
    [
        (f"{name} in the current folder", impostor(name), DONE.pattern, 0)
        for name in (
            "math_verify.py",
            "numbers.py",
            "json.py",
            "sympy/__init__.py",
            "nanolmmr1/__init__.py",
            "gmpy2.py",
            "sitecustomize.py",
            "yaml.py",
            "train.py",
        )
    ]
    + [
        ("tokens do not reach rewards", nosy, DONE.pattern, 0),
        (
            "a token that is named",
            lambda at: nosy(at)._replace(args=['reward.functions={"nosy.py:f": 1.0}', "reward.env=[HF_TOKEN]"]),
            "AssertionError",
        ),
        ("a variable that is not set", ["reward.env=[NOT_SET]"], "no variable NOT_SET"),
        ("no terminal", lambda at: Plan(env={"TERM": "dumb"}), DONE.pattern, 0),
        ("narrow", lambda at: Plan(env={"COLUMNS": "1"}), DONE.pattern, 0),
        ("no GPU wanted", lambda at: Plan(env={"CUDA_VISIBLE_DEVICES": ""}), DONE.pattern, 0),
        ("no home", lambda at: Plan(env={"HOME": "/nonexistent"}), DONE.pattern, 0),
        ("an empty path", lambda at: Plan(env={"PATH": ""}), DONE.pattern, 0),
        ("bad proxies", lambda at: Plan(env={"https_proxy": "garbage", "http_proxy": "::"}), DONE.pattern, 0),
        ("a rank without others", lambda at: Plan(env={"LOCAL_WORLD_SIZE": "8"}), DONE.pattern, 0),
    ],
)
mishaps(
    "environment",
    [
        ("| head", shell("$RUN | head -1; exit ${PIPESTATUS[0]}"), "", 0),
        ("closed stdout", shell("$RUN >&-"), "", 0),
        ("closed stderr", shell("$RUN 2>&-"), DONE.pattern, 0),
        ("closed stdin", shell("$RUN <&-"), DONE.pattern, 0),
        ("all closed", shell("$RUN <&- >&- 2>&-"), "", 0),
        ("a full device", shell("$RUN >/dev/full"), "", 0),
        ("help | head", shell("$PYTHON $TRAIN --help | head -1; exit ${PIPESTATUS[0]}"), "", 0),
        ("LC_ALL=C", lambda at: Plan(["output=数"], shell="$RUN", env={"LC_ALL": "C"}), "2 steps", 0),
        (
            "ASCII",
            lambda at: Plan(["output=数"], shell="$RUN", env={"PYTHONIOENCODING": "ascii"}),
            r"2 steps. Model: \\u6570",
            0,
        ),
        ("Latin-1", lambda at: Plan(["output=数"], shell="$RUN", env={"PYTHONIOENCODING": "latin-1"}), r"\\u6570", 0),
        ("threads of garbage", shell("$RUN", OMP_NUM_THREADS="abc"), DONE.pattern, 0),
        ("no TMPDIR", shell("$RUN", TMPDIR="/nonexistent"), DONE.pattern, 0),
        ("few files", shell("ulimit -n 80; $RUN"), DONE.pattern, 0),
        (
            "umask 077",
            lambda at: Plan(
                shell="umask 077; $RUN",
                after=lambda at: (
                    "" if (at / "out/model/model.safetensors").stat().st_mode & 0o77 == 0 else "others may read"
                ),
            ),
            DONE.pattern,
            0,
        ),
        (
            "umask 022",
            lambda at: Plan(
                shell="umask 022; $RUN",
                after=lambda at: (
                    "" if (at / "out/model/model.safetensors").stat().st_mode & 0o44 == 0o44 else "others may not read"
                ),
            ),
            DONE.pattern,
            0,
        ),
        # What the trainer itself imports may then lie here: the user says so. What judges import may not.
        (
            "PYTHONPATH empty",
            impostor("math_verify.py", shell="$RUN", env={"PYTHONPATH": ":"}),
            DONE.pattern,
            0,
        ),
        (
            "PYTHONPATH is here",
            impostor("math_verify.py", shell="$RUN", env={"PYTHONPATH": "."}),
            DONE.pattern,
            0,
        ),
        (
            "another checkout's root",
            impostor("nanolmmr1/__init__.py", "nanolmmr1/reward/worker.py", "math_verify.py", shell="$RUN"),
            DONE.pattern,
            0,
        ),
        ("python -O", shell("$PYTHON -O $RUN_ARGS"), DONE.pattern, 0),
        ("python -I", shell("$PYTHON -W error::SyntaxWarning $RUN_ARGS"), DONE.pattern, 0),
        ("the doctor | head", shell("$PYTHON -m nanolmmr1.doctor --help | head -1; exit ${PIPESTATUS[0]}"), "", 0),
    ],
    quick=False,
)

# ---------------------------------------------------------------------------------------------------------------------
# disk


def disk(megabytes, *args, readonly=False, inner="$RUN", change=""):
    mount = f"mount -t tmpfs -o size={megabytes}M tmpfs disk && {change or ':'}"
    mount += " && mount -o remount,ro disk" * readonly

    def make(at):
        (at / "disk").mkdir()
        return Plan(["output=disk/out", *args], shell=f"unshare -rm bash -c '{mount}; {inner}'")

    return make


EVERY = ["checkpoint.every_steps=1", "phases.train.steps=3"]
mishaps(
    "disk",
    [
        (f"{size} MB{name}", disk(size, *args), words, (0, 2))
        for size in (1, 2, 5, 10, 15, 20, 30, 45, 60, 80, 110, 150)
        for name, args, words in (("", [], ""), (", checkpoints", EVERY, ""))
    ]
    + [
        ("read-only", disk(99, readonly=True), "cannot be written", 2),
        ("read-only, with a folder", disk(99, readonly=True, change="mkdir disk/out"), "cannot be written", 2),
        ("writing in the foreground", disk(45, *EVERY, "checkpoint.background=false"), "", (0, 2)),
    ],
    quick=False,
)

# ---------------------------------------------------------------------------------------------------------------------
# server

SERVER = ["rollout.engine=server", "rollout.server_weights=fixed", "rollout.server_wait_s=0", "rollout.timeout_s=5"]


def server(url, *args):
    return [*SERVER, f"rollout.servers=[{url}]", *args]


def answers(text, credentials=""):
    """A server that gives one answer to everything."""

    def make(at):
        import http.server
        import threading

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(text)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=web.serve_forever, daemon=True).start()
        return server(f'"http://{credentials}127.0.0.1:{web.server_address[1]}"')

    return make


def unstored(at):
    text = "".join(
        path.read_text(errors="replace")
        for path in (at / "out").glob("*")
        if path.is_file() and path.name != "server.key"
    )
    return "the credentials are stored" if "s3cret" in text else ""


mishaps(
    "server",
    [
        ("none named", SERVER, r"needs rollout.servers=.*(?s:.)*--host 127.0.0.1"),
        ("nobody listens", server("http://127.0.0.1:9"), "cannot be reached"),
        ("an unknown host", server("http://nowhere.invalid:80"), "cannot be reached"),
        ("no scheme", server("localhost:8000"), "http://HOST:PORT"),
        ("another scheme", server("ftp://localhost"), "http://HOST:PORT"),
        ("a path", server("http://localhost/v1"), "http://HOST:PORT"),
        ("a port of text", server("http://localhost:port"), "http://HOST:PORT"),
        ("a port past all", server("http://localhost:99999"), "http://HOST:PORT"),
        ("half an address", server('"http://[::1"'), "http://HOST:PORT"),
        ("an empty URL", server('""'), "http://HOST:PORT"),
        ("a very long host", server(f"http://{'a' * 300}:80"), "cannot be reached"),
        (
            "weights over a CPU",
            [*SERVER, "rollout.servers=[http://127.0.0.1:9]", "rollout.server_weights=nccl"],
            "from GPU to GPU",
        ),
        ("credentials of garbage", server('"http://user:s3cret@host:port"'), r"(?s)^(?!.*s3cret).*http://HOST:PORT"),
        (
            "credentials of nobody",
            lambda at: Plan(server('"http://user:s3cret@127.0.0.1:9"'), after=unstored),
            r"(?s)^(?!.*s3cret).*cannot be reached",
        ),
        ("a key of nobody", server('"http://s3cret@127.0.0.1:9"'), r"(?s)^(?!.*s3cret).*cannot be reached"),
        ("a page", answers(b"<html>"), "status 200"),
        ("an empty object", answers(b"{}"), "version None of vLLM"),
        ("a list", answers(b"[]"), "status 200"),
        ("deep", answers(b"[" * 99999), "status 200"),
        ("another version", answers(b'{"version": "0.1.0"}'), "version 0.1.0 of vLLM"),
        ("codes", answers(b'{"version": "\\u001b[31m"}'), "of vLLM, and only"),
        ("right version and nothing else", answers(b'{"version": "0.32.0"}'), "cannot be read"),
        ("a model without length", answers(b'{"version": "0.32.0", "data": [{}]}'), "cannot be read"),
        ("a model too short", answers(b'{"version": "0.32.0", "data": [{"max_model_len": 1}]}'), "it takes 1 tokens"),
        ("no choices", answers(b'{"version": "0.32.0", "data": [{"max_model_len": 9999}]}'), "cannot be read"),
        ("https to http", lambda at: [x.replace("http:", "https:") for x in answers(b"{}")(at)], "cannot be reached"),
        ("credentials of a server", answers(b"{}", "user:s3cret@"), r"(?s)^(?!.*s3cret).*of vLLM"),
    ],
)

# ---------------------------------------------------------------------------------------------------------------------
# how they are run


class Runner:
    """Everything imported once, a small model made once."""

    def __init__(self, home):
        self.home = home
        os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        sys.path.insert(0, str(ROOT))
        tool = ROOT.parent / "shared" / "tools" / "make_tiny_checkpoint.py"
        sizes = {
            "hidden": 32,
            "heads": 2,
            "kv-heads": 1,
            "intermediate": 64,
            "layers": 1,
            "vision-depth": 1,
            "vision-full-every": 1,
            "vision-hidden": 32,
            "vision-intermediate": 32,
        }
        options = [f"--{key}={value}" for key, value in sizes.items()]
        subprocess.run(
            [sys.executable, tool, home / "model", "--dtype=float32", *options], check=True, capture_output=True
        )
        write(home / "varied.py", VARIED)
        import torch

        torch.set_num_threads(1)
        from nanolmmr1.report import page  # noqa: F401
        from nanolmmr1.rollout import local, server  # noqa: F401
        from nanolmmr1.run import plan, run_folder, setup  # noqa: F401

        self.model = tree(home / "model")

    def run(self, mishap):
        """What is wrong with how it ended; empty: nothing."""
        at = Path(tempfile.mkdtemp(dir=self.home))
        (at / "model").symlink_to(self.home / "model")
        write_rows(at / "rows.jsonl", rows_of())
        plan = mishap.make(at)
        plan = plan if isinstance(plan, Plan) else Plan(list(plan))
        usual = ["single", "model=model", "phases.train.data=rows.jsonl", "output=out", "reward.workers=1", *SMALL]
        usual.append(f'reward.functions={{"{self.home}/varied.py:varied": 1.0}}')
        if plan.first is not None:
            status, said, _ = self.forked(at, Plan([*usual, *plan.first]))
            if status:
                return f"its first run ended with {status}: {said[-500:]}"
            if plan.change:
                plan.change(at)
        before = tree(at)
        mine = plan._replace(args=plan.args if plan.alone else [*usual, *plan.args])
        status, said, peak = self.started(at, mine) if plan.shell else self.forked(at, mine)
        wanted = mishap.status if isinstance(mishap.status, tuple) else (mishap.status,)
        faults = [f"status {status}"] * (status not in wanted) + ["a traceback"] * (
            "Traceback" in said and plan.shell != TORCHRUN
        )
        faults += ["its words"] * (not re.search(mishap.words, said)) + [f"{peak:.1f} GB"] * (peak > PEAK_GB)
        faults += ["no error line"] * (status == 2 and not re.search("^error", said, re.M) and "2>&-" not in plan.shell)
        faults += ["control codes"] * (re.search("[\0-\x08\x0b-\x1f\x7f-\x9f]", said.replace("\r\n", "\n")) is not None)
        faults += self.changed(before, tree(at), mine.args) + ["the model has changed"] * (
            tree(self.home / "model") != self.model
        )
        left, more = leftovers(at), plan.after(at) if plan.after else ""
        faults += [f"processes {left}"] * bool(left) + [more] * bool(more)
        if faults:
            return f"{', '.join(faults)}: {said[-600:]}"
        shutil.rmtree(at)
        return ""

    @staticmethod
    def changed(before, after, args):
        """Files outside of the run's folder, or in one that was refused, that are not what they were."""
        own = (
            next((x.partition("=")[2] for x in reversed(args) if x.startswith("output=")), "").strip('"').split("/")[0]
        )
        ours = ("waiting", "runs", "nohup.out")
        touched = [
            name for name in before | after if before.get(name) != after.get(name) and name.split("/")[0] not in ours
        ]
        was_free = own and f"{own}/{MARK}" in after
        return [
            f"{name} has changed"
            for name in touched
            if not (was_free and name.split("/")[0] == own or name.split("\\n")[0] == own)
            and not (name.split("/")[0] in (own, "disk", "a") or "\n" in name or name == own)
        ][:3]

    def forked(self, at, plan):
        """(status, output, peak in GB) of train.py in a fork of this process."""
        log = self.home / "said"
        child = os.fork()
        if not child:
            status = 1
            try:
                os.setsid()
                os.chdir(at)
                os.environ.update(plan.env)
                with open(log, "wb") as file:
                    for number in (1, 2):
                        os.dup2(file.fileno(), number)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
                sys.argv = [str(TRAIN), *plan.args]
                status = 0
                runpy.run_path(str(TRAIN), run_name="__main__")
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                import traceback

                traceback.print_exc()
                status = 1
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(status)
        status, usage = self.wait(child, at, plan, lambda: os.wait4(child, os.WNOHANG))
        return status, log.read_text(errors="replace"), usage.ru_maxrss / 1e6 if usage else 0.0

    def started(self, at, plan):
        """The same of a real process."""
        words = {"PYTHON": sys.executable, "TRAIN": str(TRAIN)}
        quoted = " ".join("'" + x.replace("'", "'\\''") + "'" for x in plan.args)
        run_args = f"{TRAIN} {quoted}"
        command = (
            plan.shell.replace("$RUN_ARGS", "RUN-ARGS")
            .replace("$PYTHON", words["PYTHON"])
            .replace("$TRAIN", words["TRAIN"])
        )
        torchrun = "torch.distributed.run" in command
        # Inside bash -c '...' quotes would end the outer ones, so the arguments go in by a file.
        script = write(self.home / "run.sh", f"exec {'' if torchrun else sys.executable + ' '}{run_args}\n")
        inner = run_args if torchrun else f"bash {script}"
        command = command.replace("$RUN", inner).replace("RUN-ARGS", run_args)
        if "unshare" in command and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
            return 0, "no user namespaces here", 0.0
        log, env = self.home / "said", os.environ | {"PYTHONUNBUFFERED": "1"} | plan.env
        with open(log, "wb") as file:
            process = subprocess.Popen(
                ["bash", "-c", command], cwd=at, env=env, stdout=file, stderr=file, start_new_session=True
            )
        status, usage = self.wait(process.pid, at, plan, lambda: os.wait4(process.pid, os.WNOHANG))
        process.returncode = 0
        return status, log.read_text(errors="replace"), usage.ru_maxrss / 1e6 if usage else 0.0

    @staticmethod
    def wait(pid, at, plan, poll):
        deadline, signals = time.monotonic() + DEADLINE_S, list(plan.signals)
        while True:
            found, status, usage = poll()
            if found:
                status = os.waitstatus_to_exitcode(status)
                return (status - 256 if status > 192 else status), usage
            if signals and (place := at / plan.when).exists() and (place.suffix != ".jsonl" or place.stat().st_size):
                for number in signals:
                    os.kill(pid, number)
                    time.sleep(0.05)
                signals = []
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return "deadline", None
            time.sleep(0.005)


def tree(at):
    """Path -> what is there: a hash and the mode, a link's target, or a folder."""
    found = {}
    for path in at.rglob("*"):
        if path.is_symlink():
            what = os.readlink(path)
        elif path.is_file():
            what = hashlib.blake2b(path.read_bytes()).hexdigest(), path.stat().st_mode
        else:
            what = "folder" if path.is_dir() else "special"
        found[str(path.relative_to(at))] = what
    return found


def leftovers(at, seconds=3.0):
    """Ids of processes that still work in a folder."""
    deadline = time.monotonic() + seconds
    while True:
        left = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                if entry.name.isdigit() and Path(os.readlink(entry / "cwd")) == at and int(entry.name) != os.getpid():
                    left.append(int(entry.name))
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the quarter that is in the gate")
    parser.add_argument("--only", default="", help="those whose kind or name holds this")
    options = parser.parse_args()
    chosen = [m for m in ALL if (m in QUICK or not options.quick) and options.only in f"{m.kind} {m.name}"]
    counts = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as home:
        runner = Runner(Path(home))
        for mishap in chosen:
            began = time.monotonic()
            wrong = runner.run(mishap)
            counts[mishap.kind]["failed" if wrong else "ok"] += 1
            print(
                f"{mishap.kind:12} {mishap.name[:44]:44} {time.monotonic() - began:5.1f} s  {wrong or 'ok'}", flush=True
            )
    print(f"\n{'kind':12} tried    ok  failed")
    for kind, count in counts.items():
        print(f"{kind:12} {count.total():5} {count['ok']:5} {count['failed']:7}")
    failed = sum(count["failed"] for count in counts.values())
    print(f"{'all':12} {len(chosen):5} {len(chosen) - failed:5} {failed:7}")
    return int(failed > 0)


QUICK = [mishap for mishap in ALL if mishap.quick][::4]  # of those that need no process of their own

if __name__ == "__main__":
    sys.exit(main())
