"""Folders in, folders out: both published layouts, shards, dtypes, transformers reads ours, and damage is named."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import ranks_weights
import torch
from ranks import results
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nanolmmr1.errors import UserError
from nanolmmr1.kernels import attention
from nanolmmr1.model import weights
from nanolmmr1.model.qwen import Qwen25VL
from nanolmmr1.parallel import export

INDEX = "model.safetensors.index.json"
SIZES = Path(weights.__file__).parent / "sizes"


@pytest.fixture(params=["tied", "untied"])
def micro(request, tiny, tmp_path):
    """(folder, model): `tiny` with a vocabulary of 64."""
    return make_micro(tiny, tmp_path, tie_word_embeddings=request.param == "tied")


@pytest.fixture
def tied(tiny, tmp_path):
    return make_micro(tiny, tmp_path)


def make_micro(tiny, tmp_path, **changes):
    source = tmp_path / "source"
    source.mkdir()
    for path in tiny.glob("*.json"):
        if path.name != "tokenizer.json":
            shutil.copyfile(path, source / path.name)
    edit_config(source, vocab_size=64, **changes)
    torch.manual_seed(0)
    model = Qwen25VL(weights.read_config(source))
    export.save(model, tmp_path / "micro", source)
    return tmp_path / "micro", model


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def same(model, other, dtype=torch.float32):
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(p, theirs[name].to(dtype)) for name, p in ours.items())


def tensor_names(folder):
    names = []
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            names += shard.keys()
    return names


def from_transformers(folder, **options):
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **options)


def test_a_saved_model_loads_as_it_was(micro):
    folder, model = micro
    loaded = weights.load(folder)
    assert same(loaded, model)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())
    assert ("lm_head.weight" in tensor_names(folder)) == (not model.cfg.tie_word_embeddings)


def test_transformers_reads_what_we_save_and_computes_the_same(micro):
    folder, model = micro
    theirs, info = from_transformers(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = dict(model.named_parameters())
    assert all(torch.equal(ours[weights.published_name(name)], p) for name, p in theirs.named_parameters())
    ids = torch.arange(1, 30)
    spans = attention.Spans([[0, 29, 0, 29, 0, 0, 1]], 29)
    with torch.no_grad():
        hidden = model(ids, torch.arange(29).repeat(3, 1), lambda layer, q, k, v: attention.attention(q, k, v, spans))
        gold = theirs(input_ids=ids[None]).logits[0]
    assert (hidden @ model.head.T - gold).abs().max() <= 1e-6 * gold.abs().max()


def test_what_newer_transformers_writes_is_read(micro, tmp_path):
    folder, model = micro
    newer = tmp_path / "newer"
    from_transformers(folder).save_pretrained(newer)
    assert "text_config" in json.loads((newer / "config.json").read_text())
    assert weights.read_config(newer) == model.cfg
    assert same(weights.load(newer), model)
    # Some releases write the tensor names that they hold in memory.
    inside = {"model": "model.language_model", "visual": "model.visual", "lm_head": "lm_head"}
    state = load_file(newer / "model.safetensors")
    names = {name: ".".join([inside[name.split(".")[0]], *name.split(".")[1:]]) for name in state}
    save_file({names[name]: t for name, t in state.items()}, newer / "model.safetensors", metadata={"format": "pt"})
    assert "model.language_model.norm.weight" in tensor_names(newer)
    assert same(weights.load(newer), model)


def test_large_models_are_sharded_and_both_read_them(tied, tmp_path, monkeypatch):
    folder, model = tied
    monkeypatch.setattr(export, "FILE_BYTES", 200_000)
    sharded = tmp_path / "sharded"
    export.save(model, sharded, folder)
    index = json.loads((sharded / INDEX).read_text())
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))] and len(files) > 3
    assert sorted(index["weight_map"]) == sorted(name for name, _ in model.named_parameters())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    sizes = [[tensor.nbytes for tensor in load_file(sharded / name).values()] for name in files]
    assert all(sum(shard) <= 200_000 or len(shard) == 1 for shard in sizes)
    assert all(sum(shard) + max(after) > 200_000 for shard, after in pairwise(sizes))  # none ends early
    assert same(weights.load(sharded), model)
    theirs, info = from_transformers(sharded, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(theirs.get_input_embeddings().weight, model.head)


def test_bf16_files_are_read_into_the_dtype_asked_for(tied, tmp_path):
    folder, model = tied
    half = tmp_path / "half"
    export.save(model, half, folder, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(half / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((half / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert same(model.bfloat16(), weights.load(half), torch.bfloat16)
    assert {p.dtype for p in weights.load(half).parameters()} == {torch.float32}
    assert {p.dtype for p in weights.load(half, torch.float64).parameters()} == {torch.float64}


def test_everything_but_weights_comes_along(tied, tmp_path):
    folder, model = tied
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "optimizer.bin").write_text("not ours to copy")
    export.save(model, tmp_path / "again", folder)
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert names == {path.name for path in folder.iterdir()} - {"optimizer.bin"}
    assert {"preprocessor_config.json", "tokenizer_config.json", "generation_config.json"} < names


def test_companions_are_written_as_transformers_reads_them(tied, tmp_path):
    folder, model = tied
    written = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(written), encoding="utf-8-sig")
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}', encoding="utf-16")
    (folder / "adapter_config.json").write_text("{}")
    export.save(model, tmp_path / "again", folder)
    assert json.loads((tmp_path / "again/tokenizer_config.json").read_text(encoding="utf-8")) == written
    assert json.loads((tmp_path / "again/generation_config.json").read_text(encoding="utf-8")) == {"eos_token_id": 1}
    assert not (tmp_path / "again/adapter_config.json").exists()


def write_shards(folder, *shards):
    """Replace the weights by shards, and their index; the shards' names keep their order."""
    (folder / "model.safetensors").unlink()
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (folder / INDEX).write_bytes(json.dumps({"weight_map": weight_map}).encode("utf-8-sig"))


def give_head(folder, change=lambda embed: embed, name="lm_head.weight", first=None, embed=True):
    """Write a head made from the embedding, into the same file, or a shard that is read before or after it."""
    state = load_file(folder / "model.safetensors")
    head = {name: change(state["model.embed_tokens.weight"]).clone()}
    if not embed:
        del state["model.embed_tokens.weight"]
    if first is None:
        save_file(state | head, folder / "model.safetensors")
    else:
        write_shards(folder, *([head, state] if first else [state, head]))


def nudged(embed):
    head = embed.clone()
    head[-1, -1] += 1e-3
    return head


NAMES = ("lm_head.weight", "language_model.lm_head.weight")


@pytest.mark.parametrize("first", [None, False, True], ids=["one file", "head last", "head first"])
@pytest.mark.parametrize("name", NAMES)
def test_a_tied_head_that_was_written_once_more_is_ignored(tied, name, first):
    folder, model = tied
    give_head(folder, name=name, first=first)
    assert same(weights.load(folder), model)


@pytest.mark.parametrize("first", [False, True])
def test_a_tied_head_is_the_same_where_one_of_the_two_was_rounded(tied, tmp_path, first):
    folder, model = tied
    give_head(folder, lambda embed: embed.bfloat16(), first=first)
    bf16 = model.head.bfloat16()
    assert torch.equal(weights.load(folder).head, bf16.float() if first else model.head)
    half = tmp_path / "half"
    export.save(model, half, folder, torch.bfloat16)
    give_head(half, lambda embed: embed.float())
    assert torch.equal(weights.load(half).head, bf16.float())


def test_a_tied_head_alone_serves_as_the_embedding(tied):
    folder, model = tied
    give_head(folder, embed=False)
    assert same(weights.load(folder), model)


@pytest.mark.parametrize("change", [nudged, lambda e: nudged(e).half(), lambda e: -e, lambda e: torch.zeros_like(e),
                                    lambda e: e + torch.nan])
@pytest.mark.parametrize("first", [None, False, True], ids=["one file", "head last", "head first"])
def test_a_head_of_its_own_under_a_tie_flag_is_refused_until_the_flag_says_so(tied, monkeypatch, change, first):
    folder, model = tied
    monkeypatch.setattr(weights, "ROWS", 10)  # the last of 64 rows are a part of their own
    give_head(folder, change, first=first)
    words = "lm_head.weight and model.embed_tokens.weight differ, but config.json has tie_word_embeddings=true"
    with pytest.raises(UserError, match=words):
        weights.load(folder)
    edit_config(folder, tie_word_embeddings=False)
    untied = weights.load(folder)
    assert torch.equal(untied.model.embed_tokens.weight, model.head)
    assert torch.equal(untied.head, change(model.head).float()) or change(model.head).isnan().all()


@pytest.mark.parametrize(("root", "text", "tied"), [(True, None, True), (False, None, False), (None, True, True),
                                                    (False, True, True), (True, False, True), (None, None, False)])
def test_either_place_of_a_config_ties_the_head(sizes, tmp_path, root, text, tied):
    tree = sizes("3B")
    del tree["tie_word_embeddings"]
    vision = {"vision_config": tree.pop("vision_config")}
    flags = [{} if flag is None else {"tie_word_embeddings": flag} for flag in (root, text)]
    tree = vision | {"model_type": "qwen2_5_vl", "text_config": tree | flags[1]} | flags[0]
    assert config_of(tmp_path, tree).tie_word_embeddings == tied


def test_a_tensor_in_two_files_counts_once_if_equal_and_is_refused_if_not(tied):
    folder, model = tied
    state = load_file(folder / "model.safetensors")
    norm = {"model.norm.weight": state["model.norm.weight"].clone()}
    write_shards(folder, state, norm)
    (folder / INDEX).unlink()
    assert same(weights.load(folder), model)
    save_file({"model.norm.weight": norm["model.norm.weight"] + 1}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="00002.safetensors: model.norm.weight differs from the one in model-00001"):
        weights.load(folder)


BESIDE = ("adapter_model", "optimizer", "consolidated", "consolidated.00", "training_state", "model_ema", "a", "z")


@pytest.mark.parametrize("layout", ["one file", "shards without index", "shards with index"])
def test_other_tensors_beside_the_weights_are_not_read(tied, layout):
    folder, model = tied
    if layout != "one file":
        items = list(load_file(folder / "model.safetensors").items())
        write_shards(folder, dict(items[:9]), dict(items[9:]))
    if layout == "shards without index":
        (folder / INDEX).unlink()
    for name in BESIDE:
        save_file({"base_model.model.lora_A.weight": torch.ones(2)}, folder / f"{name}.safetensors")
    if layout == "shards with index":
        save_file({"model.norm.weight": torch.ones(2)}, folder / "model.safetensors")
    assert same(weights.load(folder), model)


def test_weights_of_any_name_are_read_where_nothing_else_is(tied):
    folder, model = tied
    (folder / "model.safetensors").rename(folder / "pytorch_model.safetensors")
    assert same(weights.load(folder), model)


def index_of(folder, *files):
    weight_map = {f"tensor_{i}": name for i, name in enumerate(files)}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def lose_tensor(folder):
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors")


def edit_vision(folder, **changes):
    edit_config(folder, vision_config=json.loads((folder / "config.json").read_text())["vision_config"] | changes)


def rename_tensor(folder):
    state = load_file(folder / "model.safetensors")
    save_file(state | {"\x1b[2J\n" + "x" * 9999: state["model.norm.weight"].clone()}, folder / "model.safetensors")


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


DAMAGE = {  # how a folder is damaged, and words of the complaint
    "missing shard": (lambda f: index_of(f, "model.safetensors", "other.safetensors"), "1 of 2.*other.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "micro has no .safetensors"),
    "missing tensor": (lose_tensor, "micro lacks 1 of .* model.norm.weight"),
    "missing layer": (lambda f: edit_config(f, num_hidden_layers=3), "micro lacks .* model.layers.2"),
    "wrong shape": (lambda f: edit_config(f, intermediate_size=96), r"model.safetensors: .*256.*96"),
    "unexpected tensor": (lambda f: edit_config(f, num_hidden_layers=1), "model.safetensors: unexpected .*layers.1"),
    "truncated": (truncate, "model.safetensors cannot be read"),
    "not safetensors": (lambda f: (f / "model.safetensors").write_text("x" * 100), "model.safetensors cannot be read"),
    "index outside": (lambda f: index_of(f, "../outside.safetensors"), "index.json names files outside"),
    "index absolute": (lambda f: index_of(f, "/etc/passwd"), "index.json names files outside"),
    "index of a number": (lambda f: index_of(f, 1), "index.json is not a weight index"),
    "broken index": (lambda f: (f / INDEX).write_text("{"), "index.json is not a weight index"),
    "index of a list": (lambda f: (f / INDEX).write_text("[]"), "index.json is not a weight index"),
    "another architecture": (lambda f: edit_config(f, model_type="llama"), "micro holds a 'llama' model"),
    "no config": (lambda f: (f / "config.json").unlink(), "micro has no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "config of a list": (lambda f: (f / "config.json").write_text("[]"), "micro holds a 'list' model"),
    "sliding window": (lambda f: edit_config(f, use_sliding_window=True), "config.json: use_sliding_window=True"),
    "another activation": (lambda f: edit_config(f, hidden_act="gelu"), "config.json: hidden_act='gelu'"),
    "another rope": (lambda f: edit_config(f, rope_scaling={"type": "yarn"}), "config.json: rope type 'yarn'"),
    "sections": (lambda f: edit_config(f, rope_scaling={"mrope_section": [4, 4, 4]}), r"config.json: .*\(4, 4, 4\)"),
    "no vision": (lambda f: edit_config(f, vision_config={}), "vision out_hidden_size 3584 must be hidden_size 128"),
    "deep config": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json is not JSON"),
    "deep index": (lambda f: (f / INDEX).write_text('{"weight_map": ' * 100_000), "index.json is not a weight index"),
    "half a character": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "config.json is not JSON"),
    "four sections": (lambda f: edit_config(f, rope_scaling={"mrope_section": [4, 4, 4, 4]}), "must be three numbers"),
    "a small window": (lambda f: edit_vision(f, window_size=27), "window_size=27 is less than patch_size=14"),
    "heads that do not divide": (lambda f: edit_config(f, num_attention_heads=3), "hidden_size=.* a multiple of .* 3"),
    "a tensor's name": (rename_tensor, r"unexpected tensor '\\x1b\[2J"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_with_its_file(tied, name):
    folder, _ = tied
    damage, words = DAMAGE[name]
    damage(folder)
    with pytest.raises(UserError, match=words) as caught:
        weights.load(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700


WRONG = ["x", -1, 0, True, None, 1.5, 1e400, float("nan"), 10**9, 10**12, 10**30, [], {}, [1], ["x"], "\x1b[2J" * 99]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: f"{value!r:.20}")
def test_a_number_of_the_config_that_is_none_is_named_before_anything_is_made(shared, tmp_path, value):
    tree = json.loads((shared / "data" / "configs" / "qwen2.5-vl-3b.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    plain = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "vocab_size")  # fmt: skip
    vision = ("depth", "hidden_size", "num_heads", "out_hidden_size", "patch_size", "spatial_merge_size", "window_size",
              "temporal_patch_size", "fullatt_block_indexes")  # fmt: skip
    absent = ([], {}, None, 0)
    right = {"vision_config": absent, "rope_scaling": absent, "rope_parameters": absent, "tie_word_embeddings": (True,),
             "fullatt_block_indexes": ([], [1]), "rope_theta": (1.5, 10**9, 10**12)}  # fmt: skip
    cases = [(key, tree | {key: value}) for key in (*plain, "rms_norm_eps", "rope_theta", "tie_word_embeddings",
             "vision_config", "rope_scaling", "rope_parameters")]  # fmt: skip
    cases += [(key, tree | {"vision_config": tree["vision_config"] | {key: value}}) for key in (*vision, "in_chans")]
    cases += [("mrope_section", tree | {"rope_scaling": {"mrope_section": value}})]
    for key, config in cases:
        if not any(value == each and type(value) is type(each) for each in right.get(key, ())):
            (tmp_path / "config.json").write_text(json.dumps(config))
            with pytest.raises(UserError, match=f"config.json: .*{key}[= ]") as caught:
                weights.load(tmp_path)
            assert str(caught.value).isprintable() and len(str(caught.value)) < 700


def test_a_config_larger_than_its_weights_is_refused_before_it_has_memory(tied, monkeypatch):
    folder, _ = tied
    monkeypatch.setattr(Qwen25VL, "to_empty", lambda *args, **more: pytest.fail("it was given memory"))
    for changes in (dict(vocab_size=1 << 24), dict(intermediate_size=1 << 20, num_hidden_layers=1000)):
        edit_config(folder, **changes)
        for empty in (False, True):
            with pytest.raises(UserError, match="config.json describes .* parameters, but"):
                weights.load(folder, empty=empty)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_config_in_another_encoding_is_read_and_written_plainly(tied, tmp_path, encoding):
    folder, model = tied
    (folder / "config.json").write_bytes((folder / "config.json").read_text().encode(encoding))
    assert same(weights.load(folder), model)
    export.save(model, tmp_path / "again", folder)
    assert json.loads((tmp_path / "again" / "config.json").read_text(encoding="ascii"))["vocab_size"] == 64


def test_the_published_3b_config_is_read(shared, tmp_path):
    shutil.copyfile(shared / "data" / "configs" / "qwen2.5-vl-3b.json", tmp_path / "config.json")
    cfg = weights.read_config(tmp_path)
    assert (cfg.hidden_size, cfg.num_hidden_layers, cfg.head_dim, cfg.num_key_value_heads) == (2048, 36, 128, 2)
    assert (cfg.vocab_size, cfg.tie_word_embeddings, cfg.mrope_section) == (151_936, True, (16, 24, 24))
    assert (cfg.vision.depth, cfg.vision.patch_dim, cfg.vision.fullatt_block_indexes) == (32, 1176, (7, 15, 23, 31))
    with torch.device("meta"):
        assert 3.7e9 < sum(p.numel() for p in Qwen25VL(cfg).parameters()) < 3.8e9


@pytest.fixture
def sizes():
    """"3B" or "7B" -> config.json as published."""
    return lambda size: json.loads((SIZES / f"Qwen2.5-VL-{size}-Instruct" / "config.json").read_text())


def config_of(folder, tree):
    (folder / "config.json").write_text(json.dumps(tree))
    return weights.read_config(folder)


def without_defaults(section, config_class):
    """A section of a config without the keys that have the class's default, as transformers 4.49 saves it."""
    defaults = config_class().to_dict()
    return {key: value for key, value in section.items() if key not in defaults or defaults[key] != value}


@pytest.mark.parametrize("size", ["3B", "7B"])
def test_keys_that_transformers_left_out_have_its_defaults(sizes, tmp_path, size):
    from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl as theirs

    tree, gold = sizes(size), config_of(tmp_path, sizes(size))
    vision = without_defaults(tree["vision_config"], theirs.Qwen2_5_VLVisionConfig)
    assert {"depth", "num_heads", "patch_size", "window_size", "fullatt_block_indexes"}.isdisjoint(vision)
    assert ("out_hidden_size" in vision) == (size == "3B") and "hidden_size" in vision
    assert config_of(tmp_path, tree | {"vision_config": vision}) == gold
    text = without_defaults(tree, theirs.Qwen2_5_VLTextConfig)
    assert ("vocab_size" in text) == (size == "3B")
    assert config_of(tmp_path, text | {"vision_config": vision}) == gold
    nested = {"model_type": "qwen2_5_vl", "text_config": text, "vision_config": vision}
    assert config_of(tmp_path, nested) == gold
    del vision["in_chans"]
    assert config_of(tmp_path, nested) == gold


@pytest.mark.parametrize("size", ["3B", "7B"])
def test_a_config_that_the_installed_transformers_saves_reads_as_the_published_one(sizes, tmp_path, size):
    from transformers import Qwen2_5_VLConfig

    gold = config_of(tmp_path, sizes(size))
    for use_diff in (True, False):
        Qwen2_5_VLConfig.from_pretrained(tmp_path).to_json_file(tmp_path / "config.json", use_diff=use_diff)
        assert weights.read_config(tmp_path) == gold


def test_the_defaults_are_those_of_transformers():
    from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl as theirs

    text, vision = theirs.Qwen2_5_VLTextConfig(), theirs.Qwen2_5_VLVisionConfig()
    for key, value in weights.TEXT.items():
        assert value == (text.default_theta if key == "rope_theta" else getattr(text, key)), key
    for key, value in weights.VISION.items():
        theirs_value = getattr(vision, "in_channels" if key == "in_chans" else key)
        assert value == (list(theirs_value) if isinstance(value, list) else theirs_value), key


def test_a_folder_is_found_and_what_is_neither_folder_nor_hub_id_is_refused(tmp_path):
    assert weights.find(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match="no/such/folder"):
        weights.find("no/such/folder")


def test_offloaded_shards_are_handed_over_where_the_model_computes(sharded_weight, monkeypatch):
    """On one rank too, where nothing is gathered. `meta` stands for the GPU."""
    model = torch.nn.ParameterDict({"weight": sharded_weight})
    monkeypatch.setattr(type(sharded_weight.device_mesh), "device_type", "meta")
    ((_, given),) = export.published(model, torch.bfloat16)
    assert (given.device.type, given.dtype, given.shape) == ("meta", torch.bfloat16, (7, 4))


def test_ranks_read_hand_over_and_write_what_one_process_does(tied, tmp_path):
    """4 ranks, over all of them and as 2 hosts of 2: with more ranks than rows, and rows that they cannot share."""
    folder, _ = tied
    broken, own_head = (shutil.copytree(folder, tmp_path / name) for name in ("broken", "own_head"))
    lose_tensor(broken)
    give_head(own_head, nudged)  # in a row that only the last rank holds
    ranks = results(4, ranks_weights.__file__, folder, broken, own_head, tmp_path / "out", hosts=2)
    block = [f"block.{name}" for name in ranks_weights.AWKWARD]
    whole = [block[:4], block[4:5], block[5:], ["last.end"]]  # one dtype a bucket, and what is not sharded ends one
    few = [block[:3], *([name] for name in block[3:]), ["last.end"]]
    single = [[name] for name in [*block, "last.end"]]
    for rank in ranks:
        assert rank["hand_over"] == [[buckets, True, True, True] for buckets in (whole, few, single)] * 2
        assert [done[:2] for done in rank["folders"]] == [[True, True]] * 2
        assert "full cannot be written" in rank["full_disk"][0] and "No space left" in rank["full_disk"][0]
        assert rank["full_disk"][1] == ["all", "host"]
        assert rank["full_memory"] == ["rank 1: no memory to gather weights: tried to allocate 9 GiB", 2, 7]
        assert "broken lacks 1 of" in rank["damaged"][0] and "model.norm.weight" in rank["damaged"][0]
        assert "embed_tokens.weight differ" in rank["damaged"][1]
    files = sorted(path.name for path in (tmp_path / "out" / "all").glob("*.safetensors"))
    assert len(files) > 4
    for turn in (0, 1):
        assert [rank["folders"][turn][2] for rank in ranks] == [files[rank::4] for rank in range(4)]
