"""Groups -> one flat token axis: `[prompt | response 1 | ... | response G]`, group after group.

A response sees its prompt whole and itself causally (`Spans` with the prompt as prefix), and its
positions restart at the prompt's largest 3-D position + 1, as if it followed alone. So one pass
over a pack gives the hidden states and gradients of G separate sequences, with the prompt and its
images computed once. The prompt's last token predicts every response's first; its hidden state is
expanded to G before the head (`scored`). A response's last token predicts nothing, so it is a target and not an input.

A rollout's scored tokens also form one flat axis of M, response after response; a pack knows where
its tokens stand on it (`flat_index`). Whatever is per token (advantages, log-probs, weights) is a plain
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
        """The same with its tensors on a device. The grid stays: it is read by the host.

        To a GPU by pinned memory: from any other the host would wait for all that the GPU has in flight.
        """
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, torch.Tensor) and name != "grid":
                value = value.pin_memory() if torch.device(device).type == "cuda" and not value.is_cuda else value
                moved[name] = value.to(device, non_blocking=True)
        return type(self)(**moved)


@dataclass
class Piece:
    """A group, or those of its responses that one pack holds. What is known of it before its prompt is prepared."""

    group: object  # rollout.Group
    responses: list
    starts: list  # of each response on the rollout's flat axis
    size: int  # packed tokens
    patches: int  # of the prompt's images


@dataclass
class Pack(Prompts):
    """What one forward pass reads, and which hidden states are scored against what."""

    spans: Spans
    last: torch.Tensor  # (B,) int64, the last token of each prompt
    fanout: int  # most responses of a prompt
    picks: torch.Tensor  # (N,) int64, where `scored` finds the hidden state that predicts each scored token
    target: torch.Tensor  # (N,) int64
    flat_index: torch.Tensor  # (N,) int64, the scored token on the rollout's flat axis of M
    num_scored: int  # N
    num_tokens: int  # T


def scored(hidden, pack):
    """The hidden states (N, H) that predict the pack's scored tokens, out of all of them, (T, H).

    A prompt's last one predicts the first token of each response. Its gradients are the backward pass of an expansion,
    a sum in a fixed order: to select it several times would add them in whatever order a GPU comes by.
    """
    first = hidden.index_select(0, pack.last)  # (B, H)
    copies = first[:, None].expand(-1, pack.fanout, -1).flatten(0, 1)  # (B * fanout, H)
    return torch.cat([copies, hidden]).index_select(0, pack.picks)


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


def deal(groups, tokens_per_micro_batch, ranks=1, first=0, patch_cost=0.0):
    """Which groups meet in which pack, and on which rank: the layout, from sizes alone.

    Groups stay whole unless one alone exceeds the budget; then its responses are dealt over
    several packs and its prompt is computed in each, which costs time and changes nothing else.

    FSDP keeps the ranks in step, so a micro-step takes as long as its slowest rank. First fit, longest
    first, tells how few micro-steps will do; then the same pieces are spread over all their packs,
    and packs of like cost meet. Any rank computes the same layout: nothing is drawn, nothing is asked.

    Args:
        groups: [Group], of which only sizes are read; prompts need not be prepared.
        tokens_per_micro_batch: the largest pack, in tokens; only a piece of one response may exceed it.
        first: index on the rollout's flat axis of the first group's first token.
        patch_cost: what an image patch costs, in tokens.

    Returns:
        micro_steps: micro_steps[i][rank] is [Piece], what that rank builds its i-th pack of; empty: it has none.
        split: number of groups that were split.
    """
    pieces, split = [], 0
    for group in groups:
        cut = _cut(group, first, tokens_per_micro_batch)
        split += len(cut) > 1
        pieces += cut
        first += sum(len(r.ids) for r in group.responses)
    bins = _first_fit(pieces, tokens_per_micro_batch)
    if ranks > 1:
        bins = _balanced(pieces, bins, tokens_per_micro_batch, ranks, patch_cost)
    # Within a pack the rollout's order is kept, so that a response's tokens are contiguous and in order.
    bins = [sorted(own, key=lambda piece: piece.starts[0]) for own in bins]
    return [bins[i : i + ranks] for i in range(0, len(bins), ranks)], split


def has_images(micro_step):
    """Whether some rank's pack of this micro-step holds an image: then all ranks run the vision tower."""
    return any(piece.patches for pieces in micro_step for piece in pieces)


def pack_groups(groups, tokens_per_micro_batch, first=0):
    """The packs of one process, and the number of groups that were split: `deal`, then `build`."""
    micro_steps, split = deal(groups, tokens_per_micro_batch, 1, first)
    return [build(pieces) for (pieces,) in micro_steps], split


def _cut(group, first, budget):
    """The group as pieces, each within the budget where possible."""
    pieces = []
    for response, start in zip(group.responses, _starts([len(r.ids) for r in group.responses], first), strict=True):
        size = max(0, len(response.ids) - 1)
        if not pieces or pieces[-1].size + size > budget:
            pieces.append(Piece(group, [], [], group.prompt_tokens, group.num_patches))
        pieces[-1].size += size
        pieces[-1].responses.append(response)
        pieces[-1].starts.append(start)
    return pieces


def _first_fit(pieces, budget):
    """Bins of at most `budget` tokens: each piece, longest first, into the first that has room."""
    bins, sizes = [], []
    for piece in sorted(pieces, key=lambda piece: -piece.size):
        at = next((i for i, size in enumerate(sizes) if size + piece.size <= budget), len(bins))
        if at == len(bins):
            bins.append([])
            sizes.append(0)
        bins[at].append(piece)
        sizes[at] += piece.size
    return bins


def _balanced(pieces, bins, budget, ranks, patch_cost):
    """As many bins as fill whole micro-steps, ordered so that bins of like cost meet, dearest first.

    Pictures go into as few micro-steps as can hold them where all pieces then find room: the tower's weights
    travel whenever one rank needs them, and pictures are dealt evenly even where `patch_cost` misjudges them.
    """

    def cost(own):
        return sum(piece.size + patch_cost * piece.patches for piece in own)

    def dearest_first(bins):
        return sorted(bins, key=lambda own: -cost(own))

    def whole_steps(count):
        return -(-count // ranks) * ranks

    count = whole_steps(len(bins))
    for front in (whole_steps(len(_first_fit([piece for piece in pieces if piece.patches], budget))), count):
        if spread := _spread(pieces, count, front, budget, cost):
            return dearest_first(spread[:front]) + dearest_first(spread[front:])
    return dearest_first(bins + [[] for _ in range(count - len(bins))])


def _spread(pieces, count, front, budget, cost):
    """`count` bins: each piece, dearest first, into the cheapest that has room; None where one finds no room.

    Pictures come before text, and into the first `front` bins.
    """
    bins, sizes, costs = [[] for _ in range(count)], [0] * count, [0] * count
    for piece in sorted(pieces, key=lambda piece: (front < count and not piece.patches, -cost([piece]))):
        places = range(front if piece.patches else count)
        room = [i for i in places if not bins[i] or sizes[i] + piece.size <= budget]
        if not room:
            return None
        at = min(room, key=costs.__getitem__)
        bins[at].append(piece)
        sizes[at] += piece.size
        costs[at] += cost([piece])
    return bins


def build(pieces, patch_dim=0):
    """One pack of [Piece] whose prompts are prepared.

    A rank without pieces runs a pack of one token, of which nothing is scored, since FSDP's collectives need
    all ranks. For the same reason a pack without an image carries an idle one where other ranks have any: four
    blank patches that make one embedding, which no slot takes.

    Args:
        patch_dim: width of a patch, where the micro-step `has_images`; 0: it has none.
    """
    table, ids, positions, slots, lasts, picks, target, where, end = [], [], [], [], [], [], [], [], 0
    parts = [(piece.group.prompt, piece.responses, piece.starts) for piece in pieces] or [(_idle_prompt(), [], [])]
    fanout = max(len(responses) for _, responses, _ in parts)
    copies = len(parts) * fanout  # rows that `scored` puts before the hidden states
    for prompt, responses, starts in parts:
        p0, end = end, end + len(prompt.ids)
        table.append([p0, end, p0, end, 0, 0, 1])
        ids.append(prompt.ids)
        positions.append(prompt.positions)
        slots.append(prompt.image_slots + p0)
        last = end - 1
        lasts.append(last)
        for g, (response, start) in enumerate(zip(responses, starts, strict=True)):
            length = len(response.ids)
            if not length:
                continue
            r0, end = end, end + length - 1
            table.append([r0, end, r0, end, p0, last + 1, 1])
            ids.append(response.ids[:-1])
            positions.append((prompt.next_position + torch.arange(length - 1)).expand(3, -1))
            copy = (len(lasts) - 1) * fanout + g  # of this prompt's last row, for this response alone
            picks.append(torch.cat([torch.tensor([copy]), copies + torch.arange(r0, end)]))
            target.append(response.ids)
            where.append(torch.arange(start, start + length))
    patches, grid = torch.cat([p.patches for p, _, _ in parts]), torch.cat([p.grid for p, _, _ in parts])
    if patch_dim and not len(grid):
        patches, grid = torch.zeros(4, patch_dim), torch.tensor([[1, 2, 2]])
    empty = [torch.zeros(0, dtype=torch.int64)]
    return Pack(
        ids=torch.cat(ids),
        positions=torch.cat(positions, 1),
        patches=patches,
        grid=grid,
        image_slots=torch.cat(slots),
        spans=Spans(torch.tensor(table), end),
        last=torch.tensor(lasts),
        fanout=fanout,
        picks=torch.cat(picks or empty),
        target=torch.cat(target or empty),
        flat_index=torch.cat(where or empty),
        num_scored=sum(len(t) for t in target),
        num_tokens=end,
    )


def _idle_prompt():
    none = torch.zeros(0, dtype=torch.int64)
    return Prompts(none.new_zeros(1), none.new_zeros(3, 1), torch.zeros(0, 0), none.view(0, 3), none)


def _starts(lengths, first=0):
    starts = []
    for length in lengths:
        starts.append(first)
        first += length
    return starts
