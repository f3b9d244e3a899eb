"""Open performance questions, with the rows that each needs and the rule that judges them.

A row is named `op: case: provider`, as in `--only`, so gpu.py runs exactly the cases needed here. A question is
answered if all its rows are right; otherwise it is not measured, and the answer gives the reason. On a CPU the same
questions name the small CPU cases, which tests the names and decides nothing.

Next: gpu.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

from bench.probe import LOGITS, SIZES

MODES = "shared", "swiglu", "recompute", "repeated"  # of step.py
HEAD = {"cuda": ("3B, N 16,384", "3B, N 1,024"), "cpu": ("3B, V / 8, N 64",) * 2}
ATTENTION = {  # causal packs, a shared prefix, an image
    "cuda": (("2,048 tokens", "8,192 tokens"), "shared prefix, 1,400 + 8 x 400", "vision whole image, 5,120 patches"),
    "cpu": (("512 tokens",), "shared prefix, 350 + 8 x 100", "vision whole image, 512 patches"),
}
MEMORY = {
    "cuda": {"rmsnorm": ("rmsnorm, 16,384 x 2,048", "add and rmsnorm, 16,384 x 2,048"),
             "swiglu": ("swiglu, 16,384 x 11,008",), "mrope": ("mrope, 16,384 tokens",)},
    "cpu": {"rmsnorm": ("rmsnorm, 512 x 2,048", "add and rmsnorm, 512 x 2,048"),
            "swiglu": ("swiglu, 128 x 11,008",), "mrope": ("mrope, 512 tokens",)},
}  # fmt: skip
HEAD_MS, FORWARD_MS, HEAD_MB = 46, 16, 1300
GRADIENTS_MB = 2 * 2048 * (16_384 + 151_936) / 1e6  # dX and dW in bf16, which a row's extra memory includes


@dataclass(frozen=True)
class Question:
    text: str
    names: tuple  # of the rows it needs
    judge: Callable  # their values -> (result, numbers as text)
    key: str = "median_ms"  # column of the rows


def at_most(limit, unit="ms", less=0.0):
    return lambda value: (met(value - less <= limit), f"{value - less:,.1f} {unit}, at most {limit:,}")


def at_least(limit, unit):
    return lambda value: (met(value >= limit), f"{value:,.1f} {unit}, at least {limit}")


def times_as_fast(factor):
    def judge(ours, theirs):
        faster = theirs / ours
        return met(faster >= factor), f"{ours:.3f} against {theirs:.3f} ms: {faster:.2f} x, at least {factor}"

    return judge


def winner(*labels, per=None):
    """The label with the lowest sum; each label has equally many values. per: divisors of the sums."""

    def judge(*values):
        each = len(values) // len(labels)
        sums = [sum(values[i * each : (i + 1) * each]) / (per[i] if per else 1) for i in range(len(labels))]
        told = ", ".join(f"{label} {value:.4g}" for label, value in zip(labels, sums, strict=True))
        return f"winner {labels[sums.index(min(sums))]}", f"{told} {'us a token' if per else 'ms'}"

    return judge


def percent_of(least):
    def judge(ours, ceiling):
        percent = 100 * ours / ceiling
        return met(percent >= least), f"{ours:,.0f} of {ceiling:,.0f} GB/s: {percent:.0f} %, at least {least}"

    return judge


def met(good):
    return "met" if good else "missed"


def questions(device):
    """All questions, with the names of the rows on "cuda" or "cpu"."""
    head, wide = HEAD[device], ATTENTION[device]
    bare = *probe(SIZES[device]), *memory(MEMORY[device])
    return [*training(*head), *forward(*head), *attention(*wide), *step(), *bare]


def training(large, small):
    def row(of, provider):
        return f"linear_loss: {of}: {provider}"

    surrogate, ours = f"surrogate, {large}", "triton fused fp32 logits"
    for bits in LOGITS:
        fused = (row(surrogate, f"triton fused {bits} logits"),)
        yield Question(f"head, training, {bits} logits", fused, at_most(HEAD_MS))
        memory = at_most(HEAD_MB, "MB", GRADIENTS_MB)
        yield Question(f"head, memory beside dX and dW, {bits} logits", fused, memory, "extra_mb")
    routes = tuple(row(surrogate, f"triton {route} fp32 logits") for route in ("fused", "generic"))
    yield Question("head, fused or generic route", routes, winner("fused", "generic"))
    for route in ("fused", "generic"):
        both = tuple(row(surrogate, f"triton {route} {bits} logits") for bits in LOGITS)
        yield Question(f"head, logits' dtype, {route} route", both, winner(*LOGITS))
    pairs = (surrogate, "eager"), (f"cross entropy, {large}", "Liger"), (f"surrogate, {small}", "eager")
    for of, theirs in dict.fromkeys(pairs):
        yield Question(f"head, never slower than {theirs}: {of}", (row(of, ours), row(of, theirs)), times_as_fast(1))


def forward(large, small):
    for size in dict.fromkeys((large, small)):
        own, chunked, eager = (
            f"linear_logprob: log-prob and entropy, {size}: {name}" for name in ("triton", "chunked", "eager"))
        if size == large:
            yield Question("head, forward only", (own,), at_most(FORWARD_MS))
        product = f"head, forward only, own product or the library's and row statistics: {size}"
        yield Question(product, (own, chunked), winner("own", "library's"))
        yield Question(f"head, forward only, never slower than eager: {size}", (own, eager), times_as_fast(1))


def attention(causal, shared, image):
    def pair(case, theirs="torch varlen_attn"):
        return f"attention: {case}: triton", f"attention: {case}: {theirs}"

    for tokens in causal:
        for mode, factor in (("forward", 0.9), ("backward", 0.8)):
            case = f"causal, {tokens}, {mode}"
            yield Question(f"attention, {case}, against varlen_attn", pair(case), times_as_fast(factor))
    repeated = pair(f"{shared}, full", "torch varlen_attn, repeated")
    yield Question(f"attention, {shared}, against repeated prompts", repeated, times_as_fast(2))
    for mode in ("forward", "backward"):
        yield Question(f"attention, {image}, {mode}", pair(f"{image}, {mode}"), winner("triton", "varlen_attn"))


def step():
    shared, swiglu, recompute, repeated = (f"step: {mode}: policy" for mode in MODES)
    yield Question("update, shared prompt against repeated", (shared, repeated), times_as_fast(3.5))
    yield Question("update, share of the chip's products", (shared,), at_least(50, "%"), "mfu_percent")
    modes = winner("kept", "SwiGLU's product recomputed", "all recomputed")
    yield Question("update, what recomputation costs", (shared, swiglu, recompute), modes)


def probe(s):
    def row(case):
        return f"probe: {case}: torch"

    kinds = [(chunk, bits) for chunk in s.chunks for bits in LOGITS]
    names = [row(f"head, chunk {chunk:,}, {bits} logits, {what}") for chunk, bits in kinds
             for what in ("logits", "dX", "dW, beta 1")]  # fmt: skip
    labels = [f"{chunk:,} {bits}" for chunk, bits in kinds]
    thousands = [chunk / 1e3 for chunk, _ in kinds]
    yield Question("head, tokens of a chunk: bare products", tuple(names), winner(*labels, per=thousands))
    dw = tuple(row(f"head, chunk {s.chunks[1]:,}, fp32 logits, dW, beta {beta}") for beta in (0, 1))
    yield Question("head, what adding to dW costs", dw, winner("written", "added"))
    widths = [f"{width:,}" for width in s.widths]
    yield Question("vision MLP, width", tuple(row(f"vision MLP, width {width}") for width in widths), winner(*widths))


def memory(cases):
    for op, titles in cases.items():
        for title in titles:
            for mode in ("forward", "backward"):
                names = f"{op}: {title}, {mode}: triton", "probe: copy: torch"
                yield Question(f"{title}, {mode}: share of a copy's rate", names, percent_of(85), "gb_per_s")


def answer(question, rows, why):
    """The verdict of one question.

    Args:
        rows: name -> row; why: op -> the reason why it has no other rows.

    Returns:
        {"question", "result", "numbers"}; the result is met, missed, winner X or not measured.
    """
    values, missing = [], {}
    for name in question.names:
        row = rows.get(name)
        if row is None:
            missing.setdefault(why(name.partition(":")[0]), []).append(name)
        elif row["verdict"] != "right":
            reason = row["refused"] or row["fault"] or "beyond tolerance"
            missing.setdefault(f"{row['verdict']}: {reason}", []).append(name)
        elif row.get(question.key) is None:
            missing.setdefault(f"no {question.key}", []).append(name)
        else:
            values.append(row[question.key])
    if missing:
        reasons = "; ".join(f"{reason} [{', '.join(names)}]" for reason, names in missing.items())
        return {"question": question.text, "result": "not measured", "numbers": reasons}
    result, numbers = question.judge(*values)
    return {"question": question.text, "result": result, "numbers": numbers}
