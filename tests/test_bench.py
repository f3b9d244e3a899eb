"""The benches' promises: nothing is timed before it is right, nothing is dropped, no number stands for a failure."""

import json
import math
import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
import torch

import bench.__main__ as bench_all
from bench import attention, harness, linear_logprob, linear_loss, mrope, providers, rmsnorm, swiglu
from bench.harness import TOLERANCE, Case, Provider, balanced, error, extra_mb, main, summary, timed
from bench.machine import PEAKS, floor_ms, machine
from bench.modes import Op, by_mode, evaluate, wider
from nanolmmr1.kernels import attention as kernel
from nanolmmr1.update.objective import policy_loss

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = ["--seconds", "0"]
NUMBERS = ("median_ms", "p20_ms", "p80_ms", "rounds", "tflop_per_s", "gb_per_s")
HAS_PEAK = DEVICE == "cuda" or os.access(harness.CLEAR_REFS, os.W_OK)

TABLES = {
    "causal": attention.chain([13], 1),
    "causal pack": attention.chain([5, 1, 9], 1),
    "shared prefix": attention.chain([4, 4, 4], 1, 6),
    "ragged responses": attention.chain([3, 7, 1], 1, 6),
    "windows": attention.chain([4, 4, 4], 0),
    "image": attention.chain([11], 0),
}
every_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


def square_cases(**others):
    """One case, x * x; "plain" and "ours" are right, others as given."""

    def cases(device, dtype):
        x = torch.linspace(-3, 2, 4096, device=device, dtype=dtype)
        right = {"plain": Provider(lambda: (x * x,)), "ours": Provider(lambda: (x.square(),), ours=True)}
        yield Case("square", lambda: (x.double() ** 2,), right | others, x.numel(), 8 * x.numel(), "any", 4096, dtype)

    return cases


def off_by_a_tenth(ours):
    return Provider(lambda: (1.1 * torch.linspace(-3, 2, 4096, device=DEVICE).square(),), ours=ours)


def fail():
    raise RuntimeError("out of everything\nand a long story")


def rows_of(path):
    return {row["provider"]: row for row in json.loads(path.read_text())["rows"]}


def test_right_providers_have_every_number(tmp_path, capsys):
    assert main({"op": square_cases()}, [*QUICK, "--json", str(tmp_path / "out.json")]) == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert {"device", "torch", "triton", "driver", "commit", "date", "cache"} <= report["machine"].keys()
    for row in report["rows"]:
        assert row["verdict"] == "right" and row["error"] < 2e-2 and all(math.isfinite(row[key]) for key in NUMBERS)
        assert (row["extra_mb"] is not None) == HAS_PEAK
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["tflop_per_s"] == pytest.approx(4096 / row["median_ms"] / 1e9)
    assert "square" in (printed := capsys.readouterr().out) and "* ours" in printed


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "another library"])
def test_a_wrong_provider_is_reported_and_not_timed(tmp_path, capsys, ours):
    status = main({"op": square_cases(off=off_by_a_tenth(ours))}, [*QUICK, "--json", str(tmp_path / "out.json")])
    assert status == (1 if ours else 0)  # only ours are ours to mend
    row = rows_of(tmp_path / "out.json")["off"]
    assert row["verdict"] == "wrong" and row["error"] == pytest.approx(0.1, rel=0.1)
    assert all(row[key] is None for key in (*NUMBERS, "extra_mb"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " off " in line]
    assert "1.0e-01" in line and "WRONG" in line


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "another library"])
def test_a_provider_that_raises_costs_the_others_nothing(tmp_path, capsys, ours):
    cases = square_cases(broken=Provider(fail, ours=ours), late=Provider(lambda: (torch.ones(3),)))
    assert main({"op": cases}, [*QUICK, "--json", str(tmp_path / "out.json")]) == (1 if ours else 0)
    rows = rows_of(tmp_path / "out.json")
    assert rows["broken"]["verdict"] == "failed" and rows["broken"]["fault"] == "RuntimeError: out of everything"
    assert "(3,)" in rows["late"]["fault"]
    assert rows["plain"]["median_ms"] > 0 and rows["ours"]["median_ms"] > 0
    assert "RuntimeError: out of everything\n" in capsys.readouterr().out


def test_one_that_raises_only_while_it_is_timed_is_a_failure(tmp_path):
    calls = []

    def run():
        calls.append(1)
        return fail() if len(calls) > 3 else (torch.linspace(-3, 2, 4096, device=DEVICE).square(),)

    main({"op": square_cases(tired=Provider(run))}, [*QUICK, "--json", str(tmp_path / "out.json")])
    row = rows_of(tmp_path / "out.json")["tired"]
    assert row["verdict"] == "failed" and row["median_ms"] is None and len(calls) == 4


def test_without_a_reference_a_case_fails_and_the_run_goes_on(tmp_path, capsys):
    def cases(device, dtype):
        others = {"x": Provider(fail), "y": Provider(fail, ours=True)}
        yield Case("no gold", fail, others | {"absent": Provider(refused="not installed")}, 1, 1)
        yield from square_cases()(device, dtype)

    assert main({"op": cases}, [*QUICK, "--json", str(tmp_path / "out.json")]) == 1
    rows = rows_of(tmp_path / "out.json")
    for name in ("x", "y"):
        assert rows[name]["fault"] == "no reference: RuntimeError: out of everything"
        assert rows[name]["verdict"] == "failed" and rows[name]["error"] is rows[name]["median_ms"] is None
    assert rows["absent"]["verdict"] == "refused" and rows["plain"]["median_ms"] > 0
    assert capsys.readouterr().out.count("failed: no reference") == 2


def test_what_was_measured_before_a_crash_is_kept(tmp_path):
    def cases(device, dtype):
        yield from square_cases()(device, dtype)
        fail()  # inputs that do not fit, say

    with pytest.raises(RuntimeError, match="everything"):
        main({"op": cases}, [*QUICK, "--json", str(tmp_path / "out.json")])
    assert rows_of(tmp_path / "out.json").keys() == {"plain", "ours"}


def test_who_cannot_run_is_listed_with_the_reason_and_never_run(tmp_path, capsys):
    others = {"absent": Provider(fail, refused="not installed: pip install it"), "vast": Provider(fail, needs=1e18)}
    assert main({"op": square_cases(**others)}, [*QUICK, "--json", str(tmp_path / "out.json")]) == 0
    rows = rows_of(tmp_path / "out.json")
    assert rows["absent"]["verdict"] == rows["vast"]["verdict"] == "refused"
    assert "1000000000 GB" in rows["vast"]["refused"]
    assert "pip install it" in capsys.readouterr().out


def test_only_chooses_cases_or_providers(tmp_path, capsys):
    def names(*only):
        options = [word for part in only for word in ("--only", part)]
        path = tmp_path / "f.json"
        return main({"op": square_cases()}, [*QUICK, *options, "--json", str(path)]), rows_of(path).keys()

    assert names("SQUARE") == (0, {"plain", "ours"})
    assert names("pla") == names("op: sq", "plain") == (0, {"plain"})
    assert main({"op": square_cases()}, [*QUICK, "--only", "cube"]) == 2
    assert "cube" in capsys.readouterr().out


def test_percentiles_rates_and_distance_to_the_floor():
    case = Case("", tuple, {}, flops=4e12, bytes=1e9)
    found = summary([5.0, 1.0, 2.0, 4.0, 3.0, 6.0], case, (1e15, 1e12))  # 4 ms of arithmetic, 1 ms of memory
    assert (found["p20_ms"], found["median_ms"], found["p80_ms"], found["rounds"]) == (2, 3.5, 5, 6)
    assert found["floor_ms"] == 4 and found["percent_of_floor"] == pytest.approx(100 * 4 / 3.5)
    assert found["tflop_per_s"] == pytest.approx(4 / 3.5e-3) and found["gb_per_s"] == pytest.approx(1 / 3.5e-3)
    assert floor_ms(1e9, 2e9, (1e15, 1e12)) == 2  # the slower of the two
    assert floor_ms(1e9, 2e9, None) is None and summary([1, 1], case, None)["percent_of_floor"] is None
    assert floor_ms(6 * 16_384 * 2048 * 151_936, 0, PEAKS["NVIDIA H200"]) == pytest.approx(38.7, abs=0.05)


def test_error_is_relative_to_the_norm_of_the_worst_output():
    gold = (torch.tensor([12.0, -16.0]), torch.tensor([1.0, 0.0]))
    assert error((torch.tensor([12.0, -18.0]), torch.tensor([1.0, 0.03])), gold) == pytest.approx(0.1)
    assert error((torch.tensor([12.0, -18.0]), torch.tensor([1.0, 0.3])), gold) == pytest.approx(0.3)
    assert error((torch.tensor([15.0, -20.0]), gold[1]), gold) == pytest.approx(0.25)
    for bad in (torch.tensor([10.0]), torch.tensor([10.0, math.nan]), torch.tensor([math.inf, 0.0])):
        with pytest.raises(ValueError, match="shape|finite"):
            error((bad, gold[1]), gold)
    with pytest.raises(ValueError):
        error(gold[:1], gold)


def test_rows_left_out_past_half_of_a_long_causal_pack_are_wrong(tmp_path):
    gold = torch.arange(1, 65_537, device=DEVICE).rsqrt()  # a mean of t random values is of this size
    late = gold.where(gold > gold[32_768], 0.0)
    tolerance = TOLERANCE[torch.bfloat16]
    assert (late - gold).abs().max() / gold.max() < 0.2 * tolerance < tolerance < error((late,), (gold,))

    def cases(device, dtype):
        found = {"late": Provider(lambda: (late,), ours=True), "whole": Provider(lambda: (gold.bfloat16(),))}
        yield Case("", lambda: (gold,), found, 1, 1, dtype=torch.bfloat16)

    assert main({"op": cases}, [*QUICK, "--json", str(tmp_path / "out.json")]) == 1
    assert {name: row["verdict"] for name, row in rows_of(tmp_path / "out.json").items()} == {
        "late": "wrong", "whole": "right"}


@pytest.mark.parametrize("count", range(1, 20))
def test_a_few_rounds_take_every_name_over_half_of_the_places(count):
    names = list(range(count))
    orders = [balanced(names, turn) for turn in range(5)]
    places = [[order.index(name) for order in orders] for name in names]
    assert all(max(at) - min(at) + 1 > count / 2 for at in places)
    for a, b in permutations(names, 2):
        assert sum(i < j for i, j in zip(places[a], places[b], strict=True)) in (2, 3)
    assert balanced([], 3) == []


def test_order_is_balanced():
    names = list("abcd")
    orders = [balanced(names, count) for count in range(8)]
    assert all(sorted(order) == names for order in orders)
    for a, b in permutations(names, 2):
        assert sum(order[0] == a for order in orders) == 2
        assert sum(order.index(a) < order.index(b) for order in orders) == 4


def test_setup_is_not_timed_and_comes_before_every_run():
    log = []
    provider = Provider(lambda x: log.append(x) or (), setup=lambda: log.append("setup") or ("run",))
    assert timed(provider, DEVICE, hot=True) >= 0 and timed(provider, DEVICE, hot=False) >= 0
    assert log == ["setup", "run"] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_that_went_to_the_driver_for_memory_is_repeated():
    log = []
    provider = Provider(lambda: log.append(torch.ones(64_000_000, device="cuda").sum()) or ())
    torch.cuda.empty_cache()
    timed(provider, "cuda", hot=True)
    assert len(log) == 2
    timed(provider, "cuda", hot=True)
    assert len(log) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory of the CPU path")
def test_extra_memory_is_left_out_where_the_peak_cannot_be_set_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    assert main({"op": square_cases()}, [*QUICK, "--json", str(tmp_path / "out.json")]) == 0
    assert all(row["extra_mb"] is None and row["median_ms"] > 0 for row in rows_of(tmp_path / "out.json").values())
    lines = [line for line in capsys.readouterr().out.splitlines() if "FLOP/s" in line]
    assert len(lines) == 2 and all(line.endswith(" -") for line in lines)


@pytest.mark.skipif(torch.cuda.is_available() or not HAS_PEAK, reason="memory of the CPU path")
def test_extra_memory_is_what_a_run_takes():
    size = 64_000_000
    assert 60 < extra_mb(Provider(lambda: (torch.ones(size // 4),)), "cpu") < 80
    held = Provider(lambda x: (x,), setup=lambda: (torch.ones(size // 4),))
    assert extra_mb(held, "cpu") < 20


class _Overwrites(torch.autograd.Function):
    """x * 3, in x itself, and in its gradient: like fused kernels that reuse their inputs."""

    @staticmethod
    def forward(ctx, x):
        return x.detach().mul_(3).clone()

    @staticmethod
    def backward(ctx, upstream):
        return upstream.mul_(3)


def test_an_op_that_writes_into_its_inputs_gets_copies():
    x, upstream = torch.linspace(-1, 2, 5, requires_grad=True), torch.linspace(2, -1, 5)
    before = x.detach().clone(), upstream.clone()
    ops = {"in place": Op(_Overwrites.apply, fresh=True), "plain": Op(lambda x: 3 * x)}
    work = ((1, 10), (2, 20))
    cases = list(by_mode("thrice", ops, (x,), (upstream,), lambda: ((3 * before[0],), (3 * before[1],)), work))
    assert [case.name for case in cases] == ["thrice, forward", "thrice, backward", "thrice, full"]
    assert [(case.flops, case.bytes) for case in cases] == [(1, 10), (2, 20), (3, 30)]
    for case in cases:
        for provider in case.providers.values():
            for _ in range(2):
                outputs = provider.compare(provider.run(*provider.setup()))
                assert error(outputs, case.gold()) == 0
    assert torch.equal(x, before[0]) and torch.equal(upstream, before[1])


def brute_force(table, tokens):
    """(T, T) bool: who sees whom, one pair at a time."""
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for q0, q1, k0, k1, p0, p1, causal in table:
        for i in range(q0, q1):
            for j in range(tokens):
                own = k0 <= j < k1 and (not causal or j - k0 <= i - q0)
                seen[i, j] = own or p0 <= j < p1
    return seen


@every_table
def test_pairs_are_counted_and_masked_as_the_spans_say(table):
    tokens = table[-1][1]
    seen, keys = brute_force(table, tokens), torch.arange(tokens)
    own0, own1, prefix0, prefix1 = attention.seen_by(table, tokens)[..., None]
    assert attention.visible(table) == seen.sum()
    assert torch.equal((keys >= own0) & (keys < own1) | (keys >= prefix0) & (keys < prefix1), seen)


@every_table
def test_attention_gold_and_repeated_prompts_equal_the_reference(table, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 3)
    torch.manual_seed(1)
    tokens, dtype = table[-1][1], torch.float64
    inputs = [torch.randn(tokens, heads, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]
    upstream = torch.randn(tokens, 4, 8, dtype=dtype)
    spans = kernel.Spans(torch.tensor(table), tokens)
    outputs, gradients = evaluate(lambda *x: kernel.attention(*x, spans, impl="reference"), inputs, [upstream])
    made = attention.gold(*inputs, table, upstream)
    assert error(made[0] + made[1], outputs + gradients) < 1e-13
    ops = attention.ops(inputs, table, upstream)
    _, _, full = by_mode("", ops, inputs, (upstream,), lambda: made, ((0, 0), (0, 0)))
    able = [provider for provider in full.providers.values() if not provider.refused]
    assert len(able) >= 2
    assert all(error(p.compare(p.run(*p.setup())), full.gold()) < 1e-5 for p in able)


def test_repeated_prompts_are_the_prompt_and_each_response():
    index, first, lengths = attention.repeated(attention.chain([2, 3], 1, 4))
    assert index.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 6, 7, 8] and lengths == [6, 7]
    assert first.tolist() == [True] * 6 + [False] * 4 + [True] * 3


@pytest.mark.parametrize("objective", [linear_loss.CROSS_ENTROPY, linear_loss.SURROGATE], ids=["entropy", "surrogate"])
def test_chunked_gold_of_the_head_equals_whole_logits(objective, monkeypatch):
    monkeypatch.setitem(linear_loss.GOLD, "chunk_tokens", 13)
    x, w, y = linear_loss.head(40, 16, 101, "cpu", torch.float32)
    case = linear_loss.case("", "", x, w, y, 8, objective)
    x, w = wider(x), wider(w)
    tokens = linear_loss.token_vectors(x.detach(), w.detach(), y, 8, objective)
    logps = (x @ w.T).log_softmax(-1)
    logp = logps.gather(1, y[:, None]).squeeze(1)
    loss = policy_loss(logp, torch.zeros(()), tokens, objective).sum()
    if objective is linear_loss.CROSS_ENTROPY:
        torch.testing.assert_close(loss, torch.nn.functional.nll_loss(logps, y))
    else:  # the objective must have work to do: some ratios clipped, some not, on both sides
        ratio = (logp.detach() - tokens.old_logp).exp()
        assert (ratio < 0.8).any() and (ratio > 1.28).any() and ((ratio > 0.8) & (ratio < 1.28)).any()
    whole = (loss.detach(), *torch.autograd.grad(loss, (x, w)))
    assert error(case.gold(), whole) < 1e-6  # old log-probs are fp32
    for name, provider in case.providers.items():
        assert provider.refused or error(provider.compare(provider.run()), whole) < 1e-4, name


def test_the_softmax_part_of_the_gradient_can_be_seen(tmp_path):
    count, vocab = 32, 8192
    x, w, y = linear_loss.head(count, 256, vocab, DEVICE, torch.float32)
    p = (x @ w.T).softmax(-1).gather(1, y[:, None]).detach()
    assert 0.15 < p.mean() < 0.5

    def without_p():  # dz = -onehot / N
        dz = -torch.nn.functional.one_hot(y, vocab).float() / count
        return torch.nn.functional.cross_entropy(x @ w.T, y).detach(), dz @ w.detach(), dz.T @ x.detach()

    case = linear_loss.case("", "", x, w, y, 8, linear_loss.CROSS_ENTROPY)
    case.providers = {"without p": Provider(without_p, ours=True), "chunked": case.providers["chunked"]}
    assert main({"op": lambda *_: [case]}, [*QUICK, "--json", str(tmp_path / "f.json")]) == 1
    rows = rows_of(tmp_path / "f.json")
    assert rows["without p"]["verdict"] == "wrong" and rows["chunked"]["verdict"] == "right"
    assert rows["without p"]["error"] > 10 * TOLERANCE[torch.bfloat16]


def test_chunked_gold_of_log_probs_equals_whole_logits(monkeypatch):
    monkeypatch.setitem(linear_loss.GOLD, "chunk_tokens", 13)
    x, w, y = (tensor.detach() for tensor in linear_loss.head(40, 16, 101, "cpu", torch.float32))
    logps = (wider(x) @ wider(w).T).log_softmax(-1)
    logp, entropy = logps.gather(1, y[:, None]).squeeze(1), -(logps.exp() * logps).sum(-1)
    for whole in ((logp, entropy), (logp,)):
        case = linear_logprob.case("", x, w, y, entropy=len(whole) == 2)
        assert error(case.gold(), whole) < 1e-12
        for name, provider in case.providers.items():
            assert provider.refused or error(provider.compare(provider.run()), whole) < 1e-5, name


def test_positions_of_the_rotary_bench_are_those_of_a_pack():
    where = mrope.positions(1500, "cpu")
    assert where.shape == (3, 1500) and where[:, 15].tolist() == [15] * 3
    assert where[:, 16 + 41].tolist() == [16, 17, 17] and where[:, 16 + 1280].tolist() == [56] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU shapes")
def test_small_ops_run_whole_and_plain_torch_is_right(tmp_path):
    cases = {"mrope": mrope.cases, "rmsnorm": rmsnorm.cases, "swiglu": swiglu.cases}
    assert main(cases, [*QUICK, "--json", str(tmp_path / "f.json")]) == 0
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert all(row["refused"] or row["verdict"] == "right" and row["error"] < 1e-5 for row in rows)


def test_every_kernel_is_benched():
    public = {path.stem for path in (ROOT / "kernels").glob("*.py") if path.stem[0] != "_"}
    assert public == bench_all.OPS.keys()
    assert not hasattr(bench_all, "rollout")  # which needs the trainer's packages: imported where it runs


def test_a_copy_without_git_can_name_its_commit(monkeypatch, capsys):
    monkeypatch.setenv("BENCH_COMMIT", "0123abc")
    assert machine("cpu")["commit"] == "0123abc"
    with pytest.raises(SystemExit):
        main({}, ["--help"])
    assert "BENCH_COMMIT" in capsys.readouterr().out


def test_a_missing_library_has_a_reason(monkeypatch):
    monkeypatch.setitem(providers.PACKAGES, "no_such_module", "no-such")
    assert providers.lacking("no_such_module", "cuda") == "not installed: pip install no-such"
    assert providers.lacking("torch", "cpu") == providers.GPU_ONLY and not providers.lacking("torch", "cuda")


def test_liger_on_hopper_needs_cute(monkeypatch):
    monkeypatch.setitem(sys.modules, "cutlass", None)  # as if not installed
    assert "nvidia-cutlass-dsl" in providers.lacking_cute((9, 0)) and not providers.lacking_cute((8, 0))
    monkeypatch.setitem(sys.modules, "cutlass", torch)  # as if it were
    assert not providers.lacking_cute((9, 0))


@pytest.mark.parametrize(("family", "line"), [("shared prefix, full", "None"), ("causal, full", "-")])
def test_packs_of_unrelated_sizes_are_not_joined(tmp_path, monkeypatch, family, line):
    pytest.importorskip("matplotlib")
    from bench import plot

    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, axes, path: drawn.append(axes))
    row = {"provider": "a", "ours": True, "median_ms": 2.0, "p20_ms": 1.0, "p80_ms": 3.0, "floor_ms": 1.0}
    plot.time_over_size("attention", family, {"a": [row | {"size": 10}, row | {"size": 20}]}, tmp_path)
    curve, floor = drawn[0].lines
    assert curve.get_linestyle() == line and curve.get_marker() == "o"
    assert (floor.get_linestyle() == "None") == (line == "None")


def test_pictures_are_drawn_from_rows(tmp_path):
    pytest.importorskip("matplotlib")

    def cases(device, dtype):
        for size in (1024, 4096):
            (case,) = square_cases()(device, dtype)
            case.size, case.family = size, "a family, of two"
            yield case

    assert main({"op": cases}, [*QUICK, "--plot", str(tmp_path / "new"), "--json", str(tmp_path / "out.json")]) == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"op_roofline.svg", "op_a_family__of_two_time.svg"}
    assert all("</svg>" in path.read_text() for path in (tmp_path / "new").iterdir())


def test_without_matplotlib_plot_names_the_extra_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "bench.plot", raising=False)
    with pytest.raises(SystemExit, match=r"matplotlib.*\.\[bench\]"):
        main({"op": fail}, ["--plot", str(tmp_path / "new")])


def test_the_command_runs_end_to_end(tmp_path):
    here = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}}
    options = [*QUICK, "--only", "cross entropy, 3B, V / 8", "--json", "f.json"]
    command = [sys.executable, "-m", "bench.linear_loss", *options]
    done = subprocess.run(command, capture_output=True, text=True, **here)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "f.json")
    assert rows["chunked"]["ours"] and rows["chunked"]["median_ms"] > 0 and rows["eager"]["rounds"] >= 3
    assert rows["Liger"]["refused"] and rows["triton fused fp32 logits"]["refused"]
    assert "chunked" in done.stdout and list(tmp_path.iterdir()) == [tmp_path / "f.json"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_every_provider_is_right_or_says_why_not(tmp_path):
    path = tmp_path / "out.json"
    assert main({"rmsnorm": rmsnorm.cases}, [*QUICK, "--only", "4,096 x", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["verdict"] for row in rows if row["ours"]} == {"right"}
    assert all(row["refused"] or row["fault"] or row["median_ms"] > 0 for row in rows)
