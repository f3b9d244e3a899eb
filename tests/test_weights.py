"""Folders in, folders out: both published layouts, shards, dtypes, transformers reads ours, and damage is named."""

import json
import shutil
from itertools import pairwise

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


def test_a_tied_head_that_was_written_once_more_is_ignored(tied):
    folder, model = tied
    state = load_file(folder / "model.safetensors")
    save_file(state | {"lm_head.weight": torch.zeros(64, 128)}, folder / "model.safetensors")
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
    "lacking key": (lambda f: edit_config(f, vision_config={}), "config.json lacks 'depth'"),
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
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    lose_tensor(broken)
    ranks = results(4, ranks_weights.__file__, folder, broken, tmp_path / "out", hosts=2)
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
        assert "broken lacks 1 of" in rank["damaged"] and "model.norm.weight" in rank["damaged"]
    files = sorted(path.name for path in (tmp_path / "out" / "all").glob("*.safetensors"))
    assert len(files) > 4
    for turn in (0, 1):
        assert [rank["folders"][turn][2] for rank in ranks] == [files[rank::4] for rank in range(4)]
