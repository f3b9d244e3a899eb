"""Benchmark of packed attention, both towers.

    python -m bench.attention [--json FILE] [--plot DIR] [--only NAME]

A pack is a row of sequences, the windows of an image, or a prompt with the responses that share it. Libraries without
shared prompts get the same group with the prompt repeated for each response. This computes the same outputs and, after
the copies' gradients are added (untimed), the same gradients; their rate is computed from the work of the shared form.
All but one copy of the prompt (7 of 8) get an upstream gradient of zeros, and products with zeros draw less power, so
their backward appears slightly too fast.

Next: mrope.py.
"""

import sys

import torch

from bench import providers
from bench.harness import main
from bench.modes import Op, by_mode, wider
from nanolmmr1.kernels import attention as kernel

VISION, LANGUAGE = (16, 16, 80), (16, 2, 128)  # q heads, kv heads, head dim of Qwen2.5-VL-3B
WINDOW = 64  # patches, 112 pixels square
GROUPS = ((1400, 400, 8), (600, 800, 8), (1400, 1024, 8), (2800, 512, 8), (400, 2000, 8))  # prompt, response, count
BLOCK = 1024  # queries of a block in gold


def chain(lengths, causal, prefix=0):
    """Consecutive spans; with a prefix, the first `prefix` tokens are visible to all later ones."""
    rows, start = [[0, prefix, 0, prefix, 0, 0, 1]] if prefix else [], prefix
    for length in lengths:
        rows.append([start, start + length, start, start + length, 0, prefix, causal])
        start += length
    return rows


def shapes(device):
    """(family, name, heads, span table); a CPU gets a quarter of the lengths."""
    cut = 1 if device == "cuda" else 4
    for tokens in (2048, 4096, 8192) if device == "cuda" else (512,):
        yield "causal", f"causal, {tokens:,} tokens", LANGUAGE, chain([tokens], 1)
    lengths = [length // cut for length in (1291, 757, 1811, 64, 173)]
    yield "causal pack", f"causal pack of {len(lengths)}, {sum(lengths):,} tokens", LANGUAGE, chain(lengths, 1)
    for prompt, response, count in GROUPS[: None if device == "cuda" else 1]:
        prompt, response = prompt // cut, response // cut
        table = chain([response] * count, 1, prompt)
        yield "shared prefix", f"shared prefix, {prompt:,} + {count} x {response:,}", LANGUAGE, table
    for patches in (1024, 5120, 16_384) if device == "cuda" else (512,):
        yield "windows", f"vision windows, {patches:,} patches", VISION, chain([WINDOW] * (patches // WINDOW), 0)
        yield "image", f"vision whole image, {patches:,} patches", VISION, chain([patches], 0)


def visible(table):
    """Number of visible (query, key) pairs."""
    own = sum((q1 - q0) * (k1 - k0 + causal) // (1 + causal) for q0, q1, k0, k1, _, _, causal in table)
    return own + sum((q1 - q0) * (p1 - p0) for q0, q1, _, _, p0, p1, _ in table)


def seen_by(table, tokens):
    """(4, T): first and last + 1 of the own keys that each query sees, then of the prefix keys."""
    seen = torch.zeros(4, tokens, dtype=torch.int64)
    for q0, q1, k0, k1, p0, p1, causal in table:
        seen[:, q0:q1] = torch.tensor([[k0], [k1], [p0], [p1]])
        if causal:
            seen[1, q0:q1] = torch.arange(k0, k1) + 1
    return seen


def repeated(table):
    """The group with its prompt repeated.

    Returns:
        for each row its row in the shared pack, whether it is the first copy of that row, and the sequence lengths.
    """
    index, lengths = [], []
    for q0, q1, _, _, p0, p1, _ in table:
        if p1 > p0 or not any(row[5] for row in table):  # skip a prompt that its responses repeat
            index += [torch.arange(p0, p1), torch.arange(q0, q1)]
            lengths.append(p1 - p0 + q1 - q0)
    index = torch.cat(index)
    first = torch.ones(len(index), dtype=torch.bool)
    order = torch.argsort(index, stable=True)
    first[order[1:]] = index[order[1:]] != index[order[:-1]]
    return index, first, lengths


def gold(q, k, v, table, upstream):
    """Output and gradients, computed in blocks of queries, so that the whole score matrix is never allocated."""
    q, k, v, upstream = (wider(x) for x in (q, k, v, upstream))
    out, group, scale = torch.zeros_like(q), q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    for q0, q1, k0, k1, p0, p1, causal in table:
        for start in range(q0, q1, BLOCK):
            stop = min(start + BLOCK, q1)
            last = k0 + stop - q0 if causal else k1
            keys, values = (torch.cat([x[p0:p1], x[k0:last]]).repeat_interleave(group, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q[start:stop], keys) * scale  # (Hq, B, L)
            if causal:
                hidden = scores.new_ones(scores.shape[1:], dtype=torch.bool).triu(1 + scores.shape[2] - (stop - start))
                scores = scores.masked_fill(hidden, float("-inf"))
            part = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
            part.backward(upstream[start:stop])
            out.data[start:stop] = part.detach()
    return (out,), (q.grad, k.grad, v.grad)


def ops(q_k_v, table, upstream):
    """name -> Op of every implementation that can compute this pack."""
    q, device, tokens, causal = q_k_v[0], upstream.device.type, len(upstream), bool(table[-1][6])
    spans, on_gpu = kernel.Spans(torch.tensor(table), tokens), "" if device == "cuda" else providers.GPU_ONLY
    longest = max((q1 - q0) * (k1 - k0 + p1 - p0) for q0, q1, k0, k1, p0, p1, _ in table)

    def ours(impl, refused="", **about):
        return Op(lambda q, k, v: kernel.attention(q, k, v, spans, impl=impl), refused=refused, **about)

    found = {"eager": ours("reference", needs=6.0 * q.shape[1] * longest * q.element_size())}
    index, first, lengths = repeated(table)
    sharing = len(index) > tokens
    like = {}
    if sharing:  # only the first copy gets an upstream gradient
        at, rows = index.to(q.device), first.to(q.device)
        like = {
            "inputs": [x.detach()[at].requires_grad_() for x in q_k_v],
            "upstream": [upstream[at] * rows[:, None, None]],
            "fold_output": lambda out: out.new_zeros(upstream.shape).index_copy(0, at[rows], out[rows]),
            "fold_gradient": lambda g: g.new_zeros(tokens, *g.shape[1:]).float().index_add(0, at, g.float()),
        }
    suffix = ", repeated" if sharing else ""
    if len(set(lengths)) == 1:
        found[f"torch SDPA{suffix}"] = Op(providers.torch_sdpa(lengths, causal), **like)
    else:
        found["torch SDPA"] = Op(refused="takes sequences of one length")
    flash = providers.lacking("flash_attn", device)
    found[f"torch varlen_attn{suffix}"] = Op(providers.torch_varlen(lengths, causal, device), refused=on_gpu, **like)
    found[f"flash-attn{suffix}"] = Op(providers.flash_varlen(lengths, causal, device), refused=flash, **like)
    found["FlexAttention"] = Op(providers.flex_attention(seen_by(table, tokens)), refused=on_gpu)
    found["sdpa"] = ours("sdpa", ours=True)
    found["varlen"] = ours("varlen", on_gpu, ours=True)
    found["flash"] = ours("flash", flash, ours=True)
    found["triton"] = ours("triton", on_gpu and providers.INTERPRETED, ours=True)
    return found


def cases(device, dtype):
    for family, name, (q_heads, kv_heads, dim), table in shapes(device):
        torch.manual_seed(0)
        tokens = table[-1][1]
        q, k, v = (
            torch.randn(tokens, heads, dim, device=device, dtype=dtype, requires_grad=True)
            for heads in (q_heads, kv_heads, kv_heads)
        )
        upstream = torch.randn_like(q, requires_grad=False)
        product = 2.0 * visible(table) * q_heads * dim  # FLOPs; two forward, five backward, which recomputes the scores
        tensor = q.element_size() * tokens * dim  # bytes per head; q and out, then these again and two gradients
        work = (
            (2 * product, tensor * (2 * q_heads + 2 * kv_heads)),
            (5 * product, tensor * (4 * q_heads + 4 * kv_heads)),
        )

        def made(q=q, k=k, v=v, table=table, upstream=upstream):
            return gold(q, k, v, table, upstream)

        found = ops((q, k, v), table, upstream)
        yield from by_mode(name, found, (q, k, v), (upstream,), made, work, family, tokens)


if __name__ == "__main__":
    sys.exit(main({"attention": cases}))
