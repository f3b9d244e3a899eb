"""Groups -> one flat token axis: `[prompt | response 1 | ... | response G]`, group after group.

A response sees its prompt whole and itself causally (`Spans` with the prompt as prefix), and its
positions restart at the prompt's largest 3-D position + 1, as if it followed alone. So one pass
over a pack gives the hidden states and gradients of G separate sequences, with the prompt and its
images computed once. The prompt's last token predicts every response's first; it is gathered G
times before the head. A response's last token predicts nothing, so it is a target and not an input.

A rollout's scored tokens also form one flat axis of M, response after response; a pack knows where
its tokens stand on it (`where`). Whatever is per token (advantages, log-probs, weights) is a plain
(M,) vector, and cutting the rollout into packs is indexing.
"""

from dataclasses import dataclass, fields

import torch

from nanolmmr1.kernels.attention import Spans


@dataclass
class Prompts:
    """Prompts one after another on a token axis, with their images' patches."""

    ids: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (3, T) int64
    patches: torch.Tensor  # (P, patch_dim) fp32
    grid: torch.Tensor  # (num_images, 3) int64, t h w in patches
    image_slots: torch.Tensor  # (K,) int64, the tokens that image embeddings replace

    def to(self, device):
        """The same with its tensors on a device. The grid stays: it is read by the host."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, torch.Tensor) and name != "grid":
                moved[name] = value.to(device, non_blocking=True)
        return type(self)(**moved)


@dataclass
class Pack(Prompts):
    """What one forward pass reads, and which hidden states are scored against what."""

    spans: Spans
    rows: torch.Tensor  # (N,) int64, hidden state that predicts each scored token
    target: torch.Tensor  # (N,) int64
    where: torch.Tensor  # (N,) int64, the scored token on the rollout's flat axis of M
    num_scored: int  # N
    num_tokens: int  # T


def concat_prompts(prompts):
    """Prompts packed end to end."""
    starts = _starts([len(p.ids) for p in prompts])
    return Prompts(
        ids=torch.cat([p.ids for p in prompts]),
        positions=torch.cat([p.positions for p in prompts], 1),
        patches=torch.cat([p.patches for p in prompts]),
        grid=torch.cat([p.grid for p in prompts]),
        image_slots=torch.cat([p.image_slots + start for p, start in zip(prompts, starts, strict=True)]),
    )


def pack_groups(groups, tokens_per_micro_batch, first=0):
    """Packs of at most `tokens_per_micro_batch` tokens, longest groups first.

    Groups stay whole unless one alone exceeds the budget; then its responses are dealt over
    several packs and its prompt is computed in each, which costs time and changes nothing else.

    Args:
        groups: [Group]; first: index on the rollout's flat axis of the first group's first token.

    Returns:
        packs, number of groups that were split.
    """
    pieces, split = [], 0
    for group in groups:
        cut = _cut(group, first, tokens_per_micro_batch)
        split += len(cut) > 1
        pieces += cut
        first += sum(len(r.ids) for r in group.responses)
    bins = []
    for size, *piece in sorted(pieces, key=lambda p: -p[0]):
        room = next((b for b in bins if b[0] + size <= tokens_per_micro_batch), None)
        if room is None:
            bins.append([size, [piece]])
        else:
            room[0] += size
            room[1].append(piece)
    # Within a pack the rollout's order is kept, so that a response's tokens are contiguous and in order.
    return [build(sorted(b[1], key=lambda p: p[2][0] if p[2] else 0)) for b in bins], split


def _cut(group, first, budget):
    """[(tokens, prompt, responses, their starts on the flat axis)], each within the budget where possible."""
    pieces, prompt = [], group.prompt
    for response, start in zip(group.responses, _starts([len(r.ids) for r in group.responses], first), strict=True):
        size = max(0, len(response.ids) - 1)
        if not pieces or pieces[-1][0] + size > budget:
            pieces.append([len(prompt.ids), prompt, [], []])
        pieces[-1][0] += size
        pieces[-1][2].append(response)
        pieces[-1][3].append(start)
    return [(size, prompt, responses, starts) for size, prompt, responses, starts in pieces]


def build(pieces):
    """One pack of [(prompt, responses, flat starts)]."""
    table, ids, positions, slots, rows, target, where, end = [], [], [], [], [], [], [], 0
    for prompt, responses, starts in pieces:
        p0, end = end, end + len(prompt.ids)
        table.append([p0, end, p0, end, 0, 0, 1])
        ids.append(prompt.ids)
        positions.append(prompt.positions)
        slots.append(prompt.image_slots + p0)
        last = end - 1
        for response, start in zip(responses, starts, strict=True):
            length = len(response.ids)
            if not length:
                continue
            r0, end = end, end + length - 1
            table.append([r0, end, r0, end, p0, last + 1, 1])
            ids.append(response.ids[:-1])
            positions.append((prompt.next_position + torch.arange(length - 1)).expand(3, -1))
            rows.append(torch.cat([torch.tensor([last]), torch.arange(r0, end)]))
            target.append(response.ids)
            where.append(torch.arange(start, start + length))
    empty = [torch.zeros(0, dtype=torch.int64)]
    return Pack(
        ids=torch.cat(ids),
        positions=torch.cat(positions, 1),
        patches=torch.cat([p.patches for p, _, _ in pieces]),
        grid=torch.cat([p.grid for p, _, _ in pieces]),
        image_slots=torch.cat(slots),
        spans=Spans(torch.tensor(table), end),
        rows=torch.cat(rows or empty),
        target=torch.cat(target or empty),
        where=torch.cat(where or empty),
        num_scored=sum(len(t) for t in target),
        num_tokens=end,
    )


def _starts(lengths, first=0):
    starts = []
    for length in lengths:
        starts.append(first)
        first += length
    return starts
