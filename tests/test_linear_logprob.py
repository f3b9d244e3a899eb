"""The head's log-probs and entropies: equal to fp64 torch, however the work is cut and wherever the logits lie."""

import ast
from pathlib import Path

import pytest
import torch
from compare import largest

from nanolmmr1.kernels import _head, _triton
from nanolmmr1.kernels import linear_logprob as kernel

pytestmark = pytest.mark.usefixtures("poisoned_empty")
both = pytest.mark.parametrize("impl", ["chunked", "triton"])
KERNELS = Path(__file__).resolve().parents[1] / "kernels"


@pytest.fixture
def linear_logprob(device):
    """The op, which for "triton" runs where Triton runs; outputs on the CPU."""

    def run(x, w, y, impl="chunked", **options):
        place = device if impl == "triton" else x.device
        outputs = kernel.linear_logprob(x.to(place), w.to(place), y.to(place), impl=impl, **options)
        return [t.cpu() for t in outputs]

    return run


@pytest.fixture(params=[True, False], ids=["bulk copies", "pointers"])
def loads(request, monkeypatch):
    """Both ways to load tiles, where the interpreter runs; a GPU's config stays as it is."""
    monkeypatch.setitem(kernel.CONFIGS[0], "TMA", request.param)


def error(ours, gold):
    return max(largest(ours, gold))


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 13, 0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("banned", [(), (100, 0, 98)])
def test_fp64_equals_plain_torch(linear_logprob, head_inputs, plain_head, impl, chunk_tokens, temperature, banned):
    x, w, y = head_inputs()
    y = y.clamp(min=1)
    ours = linear_logprob(x, w, y, temperature=temperature, banned=banned, chunk_tokens=chunk_tokens, impl=impl)
    assert [t.dtype for t in ours] == [torch.float64] * 2
    assert error(ours, plain_head(x, w, y, temperature, banned)) <= 1e-12


@pytest.mark.parametrize("hidden", [24, 22, 9])
@pytest.mark.parametrize(("temperature", "banned"), [(1.0, ()), (0.7, (100, 0, 98))])
def test_the_kernel_equals_plain_torch(linear_logprob, loads, head_inputs, plain_head, hidden, temperature, banned):
    x, w, y = head_inputs(37, hidden, 101, torch.float32)  # no size is a multiple of a tile's
    y = y.clamp(min=1)
    ours = linear_logprob(x, w, y, "triton", temperature=temperature, banned=banned)
    assert [t.dtype for t in ours] == [torch.float32] * 2
    assert error(ours, plain_head(x.double(), w.double(), y, temperature, banned)) <= 1e-5


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [7, 0])
def test_lower_precision_errs_at_most_twice_as_much_as_torch(
    linear_logprob, head_inputs, plain_head, device, impl, dtype, chunk_tokens
):
    if impl == "triton" and dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter has no bf16")
    x, w, y = head_inputs(70, 64, 1003, dtype)
    gold = plain_head(x.double(), w.double(), y, 0.7)
    ours = linear_logprob(x, w, y, impl, temperature=0.7, chunk_tokens=chunk_tokens)
    assert [t.dtype for t in ours] == [torch.float32] * 2
    assert error(ours, gold) <= 2 * error(plain_head(x, w, y, 0.7), gold) + 1e-6


def test_16_bit_logits_are_never_rounded(linear_logprob, head_inputs, plain_head):
    for impl, dtype in (("chunked", torch.bfloat16), ("triton", torch.float16)):
        x, w, y = head_inputs(20, 64, 203, dtype)
        gold = plain_head(x.double(), w.double(), y)
        rounded = plain_head(*(t.to(torch.bfloat16) for t in (x, w)), y)
        assert error(linear_logprob(x, w, y, impl), gold) <= 1e-5 < 1e-3 < error(rounded, gold)


@pytest.mark.parametrize("impl", ["chunked", "triton", "reference"])
def test_a_master_weight_counts_as_rounded(linear_logprob, head_inputs, plain_head, impl):
    dtype = torch.float16 if impl == "triton" else torch.bfloat16  # the interpreter has no bf16
    x, _, y = head_inputs(20, 64, 203, dtype)
    w = head_inputs(20, 64, 203, torch.float32)[1]
    gold, unrounded = (plain_head(x.double(), head.double(), y) for head in (w.to(dtype), w))
    assert error(linear_logprob(x, w, y, impl), gold) <= 1e-5 < error(unrounded, gold)
    if impl != "reference":
        same = linear_logprob(x, w.to(dtype), y, impl)
        assert all(torch.equal(a, b) for a, b in zip(linear_logprob(x, w, y, impl), same, strict=True))
    with pytest.raises(ValueError, match=f"float32.*{dtype}"):
        linear_logprob(x.float(), w.to(dtype), y, impl)


@both
@pytest.mark.parametrize("level", [-3e4, 3e4])
def test_logits_far_from_zero_lose_nothing(linear_logprob, impl, level):
    z = torch.tensor([[0.0, -1.0, 2.0], [0.5, 0.0, -4.0]])
    x, y = torch.cat([z, torch.full((2, 1), level)], 1), torch.tensor([2, 1])  # (N, V + 1)
    w = torch.cat([torch.eye(3), torch.ones(3, 1)], 1)  # logits = z + level
    gold = (x @ w.T).double().log_softmax(-1)
    logp, entropy = linear_logprob(x, w, y, impl)
    assert error((logp,), (gold.gather(1, y[:, None])[:, 0],)) <= 1e-6
    assert error((entropy,), (-(gold.exp() * gold).sum(-1),)) <= 1e-6


@both
def test_a_certain_token_keeps_the_digits_of_its_log_prob(linear_logprob, impl):
    gap = torch.tensor([0.1, 0.7, 1.0, 2.0, 5.0, 14.0, 30.0, 80.0])  # z_0 = gap, the other logits 0
    logp, entropy = linear_logprob(gap[:, None], torch.eye(3, 1), torch.zeros(8, dtype=torch.int64), impl)
    gold = -torch.log1p(2 * torch.exp(-gap.double()))
    assert ((logp - gold).abs() <= 1e-5 * gold.abs()).all()
    assert (logp[:-1] < 0).all() and (entropy >= 0).all() and not logp.isnan().any()


@both
def test_an_unlikely_token_keeps_its_log_prob(linear_logprob, impl):
    gap = torch.tensor([20.0, 90.0, 150.0, 1e4])  # z_0 = -gap, the other logits 0
    logp, entropy = linear_logprob(-gap[:, None], torch.eye(3, 1), torch.zeros(4, dtype=torch.int64), impl)
    assert torch.allclose(logp.double(), -gap.double() - torch.tensor(2.0).double().log(), rtol=1e-6, atol=0)
    assert torch.allclose(entropy, torch.tensor(2.0).log().expand(4), rtol=1e-6)


@both
def test_strongly_negative_logits_meet_no_padding(linear_logprob, head_inputs, plain_head, impl):
    x, w, y = head_inputs(dtype=torch.float32)
    x, w = torch.cat([x, torch.full((13, 8), -5.0)], 1), torch.cat([w, torch.full((101, 8), 3.0)], 1)  # z - 120
    assert error(linear_logprob(x, w, y, impl), plain_head(x.double(), w.double(), y)) <= 5e-5  # of 120


@both
def test_a_banned_id_leaves_the_distribution_even_as_the_largest_logit(linear_logprob, head_inputs, plain_head, impl):
    x, w, y = head_inputs(dtype=torch.float32)
    w[[3, 99]] = 1e4 * x[0]
    y = torch.where(y == 3, 4, y)
    gold = plain_head(x.double(), w.double(), y, banned=(3, 99))
    assert error(linear_logprob(x, w, y, impl, banned=(3, 99)), gold) <= 1e-5


@both
def test_a_token_without_rivals_is_certain(linear_logprob, impl):
    x, one = torch.randn(3, 4), torch.zeros(3, dtype=torch.int64)
    for options in (dict(w=torch.randn(1, 4)), dict(w=torch.randn(70, 4), banned=tuple(range(1, 70)))):
        logp, entropy = linear_logprob(x, y=one, impl=impl, **options)
        assert logp.abs().max() == 0 and entropy.abs().max() == 0


@both
@pytest.mark.parametrize("where", ["hidden", "weight"])
def test_a_nan_is_not_hidden(linear_logprob, head_inputs, impl, where):
    x, w, y = head_inputs(dtype=torch.float32)
    (x if where == "hidden" else w)[7, 0] = float("nan")
    wrong = torch.arange(13) == 7 if where == "hidden" else torch.ones(13, dtype=torch.bool)
    for values in linear_logprob(x, w, y, impl):
        assert torch.equal(values.isnan(), wrong)


@pytest.mark.parametrize("impl", ["chunked", "triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one_token(linear_logprob, head_inputs, plain_head, impl, tokens, dtype):
    x, w, y = head_inputs(tokens, dtype=torch.float32)
    x, w = x.to(dtype).float(), w.to(dtype).float()
    ours = linear_logprob(x.to(dtype), w, y, impl)
    assert [(t.shape, t.dtype) for t in ours] == [((tokens,), torch.float32)] * 2
    gold = plain_head(x.double(), w.double(), y)
    assert all(torch.allclose(a.double(), b, rtol=0, atol=1e-5) for a, b in zip(ours, gold, strict=True))


@pytest.mark.parametrize("group", [1, 2, 32])
@pytest.mark.parametrize("splits", [1, 2, 4])
def test_any_split_and_grouping_gives_the_same(
    linear_logprob, head_inputs, plain_head, monkeypatch, device, splits, group
):
    x, w, y = head_inputs(70, 8, 117, torch.float32)  # interpreted: 5 token tiles, 4 of the vocabulary
    config = kernel.FP32_CONFIG if device.type == "cuda" else kernel.CONFIGS[0]
    monkeypatch.setitem(config, "BLOCK_V", 32)
    monkeypatch.setattr(kernel, "count_splits", lambda *_: splits)
    monkeypatch.setattr(kernel, "GROUP", group)
    assert error(linear_logprob(x, w, y, "triton"), plain_head(x.double(), w.double(), y)) <= 1e-5


@pytest.mark.parametrize("sms", [108, 132, 148])
@pytest.mark.parametrize("token_tiles", [1, 7, 8, 32, 128, 512])
def test_the_vocabulary_is_split_so_that_the_chip_is_busy(sms, token_tiles):
    tiles = 594
    splits = kernel.count_splits(token_tiles, tiles, sms)
    waves, longest = -(-token_tiles * splits // sms), -(-tiles // splits)
    assert 1 <= splits <= tiles
    assert token_tiles * tiles / (waves * longest * sms) >= 0.8  # of the tiles that the chip could have done
    assert kernel.count_splits(token_tiles, 3, sms) <= 3


def test_a_run_repeats_bit_by_bit(linear_logprob, head_inputs):
    inputs = head_inputs(40, 24, 101, torch.float32)
    first, second = (linear_logprob(*inputs, "triton", temperature=0.7, banned=(99,)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_is_kept_for_a_gradient(linear_logprob, head_inputs):
    x, w, y = head_inputs(dtype=torch.float32)
    for impl in ("chunked", "reference", "triton"):
        outputs = linear_logprob(x.requires_grad_(), w.requires_grad_(), y, impl)
        assert not any(t.requires_grad for t in outputs)


@both
def test_inputs_are_left_as_they_were(device, head_inputs, impl):
    inputs = [t.to(device) for t in head_inputs(dtype=torch.float32)]
    before = [t.clone() for t in inputs]
    kernel.linear_logprob(*inputs, temperature=0.7, banned=(99,), impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize(("tokens", "sizes"), [(40, [30, 30, 30]), (89, [45, 45]), (0, [15] * 6)])
def test_automatic_chunks_fit_their_buffer_and_are_even(head_inputs, monkeypatch, tokens, sizes):
    monkeypatch.setitem(_head.CHUNK_BYTES, "cpu", tokens * 101 * 8)
    x, w, _ = head_inputs(90)
    parts = _head.chunks(x, w, 0, torch.float64)
    assert [part.stop - part.start for part in parts] == sizes
    assert torch.equal(torch.cat([torch.arange(90)[part] for part in parts]), torch.arange(90))
    assert len(_head.chunks(x, w, 0, torch.float32)) <= len(parts)


def test_a_gpus_chunks_have_as_many_tokens_as_a_gigabyte_holds():
    cuda = torch.device("cuda")

    class Shape:  # of tensors that no CPU need hold
        def __init__(self, rows):
            self.rows, self.device = rows, cuda

        def __len__(self):
            return self.rows

    sizes = {dtype: _head.chunks(Shape(16_384), Shape(151_936), 0, dtype) for dtype in (torch.float32, torch.bfloat16)}
    assert {s.stop - s.start for s in sizes[torch.float32]} == {2048}
    assert {s.stop - s.start for s in sizes[torch.bfloat16]} == {4096}


def test_without_a_choice_the_device_decides(head_inputs, device):
    x, w, y = head_inputs(dtype=torch.float32)
    assert _head.choose_impl("auto", x, w, y) == "chunked"
    if device.type == "cuda":
        x, w, y = x.to(device), w.to(device), y.to(device)
        assert _head.choose_impl("auto", x, w, y) == "triton"
        assert _head.choose_impl("auto", x.double(), w.double(), y) == "chunked"


def test_wrong_use_is_refused(head_fault):
    arguments, words = head_fault
    with pytest.raises(ValueError, match=words):
        kernel.linear_logprob(**arguments)


def test_the_kernel_refuses_what_it_cannot_read(device, head_inputs, monkeypatch):
    x, w, y = (t.to(device) for t in head_inputs(dtype=torch.float32))
    for arguments, words in (
        ((x.T.contiguous().T, w, y), "hidden.*contiguous"),
        ((x, torch.cat([w, w], 1)[:, :24], y), "weight.*contiguous"),
        ((x.double(), w.double(), y), "float64.*chunked"),
    ):
        with pytest.raises(ValueError, match=words):
            kernel.linear_logprob(*arguments, impl="triton")
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    with pytest.raises(ValueError, match="hidden is on cpu.*CUDA"):
        kernel.linear_logprob(x.cpu(), w.cpu(), y.cpu(), impl="triton")


def test_a_sharded_weight_is_refused(sharded_weight):
    with pytest.raises(ValueError, match="full_tensor"):
        kernel.linear_logprob(torch.zeros(5, 4), sharded_weight, torch.arange(5))


@pytest.mark.parametrize("name", ["_rows.py", "linear_logprob.py"])
def test_programs_count_along_the_axis_without_a_limit_and_rows_in_64_bits(name):
    """65,536 rows are too many for grid axes 1 and 2, and 14,135 rows of 151,936 logits for 32-bit offsets."""
    found = []
    for node in ast.walk(ast.parse((KERNELS / name).read_text())):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).startswith(("_row_", "_logprob_", "_merge_")):
            assert len(node.slice.elts) == 1, ast.unparse(node)
            found.append(node)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("row", "rows", "w_rows"):
            assert "tl.int64" in ast.unparse(node.value) or "tl." not in ast.unparse(node.value), ast.unparse(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.program_id":
            assert ast.unparse(node) == "tl.program_id(0)"
            found.append(node)
    assert len(found) >= 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bf16_at_the_real_size(device):
    N, H, V, options = 1000, 2048, 151_936, dict(temperature=0.9, banned=(151_652, 151_655))
    torch.manual_seed(0)
    x = torch.randn(N, H, device=device, dtype=torch.bfloat16)
    w = (torch.randn(V, H, device=device) * 3 / H**0.5).bfloat16()
    y = torch.randint(151_000, (N,), device=device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours = kernel.linear_logprob(x, w, y, impl="triton", **options)
    assert torch.cuda.max_memory_allocated() - before <= 0.1e9
    assert all(torch.equal(a, b) for a, b in zip(ours, kernel.linear_logprob(x, w, y, **options), strict=True))
    gold = [[], []]
    for part in torch.arange(N, device=device).split(125):
        for found, t in zip(
            gold, kernel.linear_logprob_ref(x[part].double(), w.double(), y[part], *options.values()), strict=True
        ):
            found.append(t)
    gold = [torch.cat(parts) for parts in gold]
    plain = torch.mm(x, w.T, out_dtype=torch.float32) / 0.9
    plain = plain.index_fill_(1, torch.tensor(options["banned"], device=device), -1e9).log_softmax(-1)
    plain = plain.gather(1, y[:, None])[:, 0], -(plain.exp() * plain).sum(-1)
    for a, b, c in zip(ours, plain, gold, strict=True):
        assert error((a,), (c,)) <= 2 * error((b,), (c,)) + 1e-6
