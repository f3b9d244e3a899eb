"""Packing: groups laid out on one token axis, `[prompt | response 1 | ... | response G]`, group after group.

A prompt of three tokens with the responses a b c and d e:

    token       p  q  r | a  b | d          the last token of a response is never an input
    position    0  1  2 | 3  4 | 3          responses continue at the prompt's largest 3-D position + 1
    attends to  prompt, | prompt and        causal; see kernels/attention.py
                causal  | own response
    predicts          a | b  c | e
                      d |      |

So one pass over a pack computes hidden states and gradients of G separate sequences, with the prompt and its images
computed once. The prompt's last token predicts the first token of every response: its hidden state is copied G times
before the head (`scored`).

The scored tokens of a batch also form one flat axis of length M, response after response; `Pack.flat_index` says where
a pack's tokens are on it. Everything per token (advantages, log-probs, weights) is a plain (M,) vector, and indexing
gives a pack its part.

Next: policy.py, forward, backward, optimizer step.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch

from nanolmmr1.data.group import Group, Response
from nanolmmr1.data.prompt import Prompt
from nanolmmr1.kernels.attention import Spans
from nanolmmr1.model.qwen import Images


@dataclass
class PackedPrompts:
    """Prompts concatenated on a token axis, with their images' patches."""

    ids: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (3, T) int64
    patches: torch.Tensor  # (P, patch_dim) fp32
    grid: torch.Tensor  # (num_images, 3) int64, t h w in patches; always on the CPU, where it is read
    image_slots: torch.Tensor  # (K,) int64, the tokens that image embeddings replace

    @property
    def images(self) -> Images:
        """The images as the model takes them. The grid is a list: FSDP would move a tensor to the GPU."""
        return Images(self.patches, self.grid.tolist(), self.image_slots)

    def to(self, device: torch.device | str) -> Self:
        """A copy on a device. To a GPU through pinned memory: otherwise the host would wait for all GPU work in flight.
        """
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, torch.Tensor) and name != "grid":
                value = value.pin_memory() if torch.device(device).type == "cuda" and not value.is_cuda else value
                moved[name] = value.to(device, non_blocking=True)
        return type(self)(**moved)


@dataclass
class Piece:
    """The responses of one group that share a pack: all of them, unless the group was split."""

    group: Group
    responses: list[Response]
    starts: list[int]  # of each response on the flat axis
    size: int  # tokens in the pack, the prompt included
    patches: int  # of the prompt's images


@dataclass
class Pack(PackedPrompts):
    """The input of one forward pass, and the tokens that it scores."""

    spans: Spans
    last: torch.Tensor  # (B,) int64, the last token of each prompt
    fanout: int  # largest number of responses of a prompt
    picks: torch.Tensor  # (N,) int64, rows of the concatenation in `scored` that predict the scored tokens
    target: torch.Tensor  # (N,) int64, the scored tokens
    flat_index: torch.Tensor  # (N,) int64, their places on the flat axis of length M
    num_scored: int  # N
    num_tokens: int  # T


MicroStep = list[list[Piece]]  # by rank


def scored(hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
    """The hidden states (N, H) that predict the pack's scored tokens, from all hidden states (T, H).

    A prompt's last hidden state is copied by `expand`, so its gradients are summed in a fixed order. Selecting the row
    several times would sum them in a random order on a GPU.
    """
    first = hidden.index_select(0, pack.last)  # (B, H)
    copies = first[:, None].expand(-1, pack.fanout, -1).flatten(0, 1)  # (B * fanout, H)
    return torch.cat([copies, hidden]).index_select(0, pack.picks)


def concat_prompts(prompts: Sequence[Prompt]) -> PackedPrompts:
    """Prompts packed end to end."""
    starts = _starts(len(p.ids) for p in prompts)
    return PackedPrompts(
        ids=torch.cat([p.ids for p in prompts]),
        positions=torch.cat([p.positions for p in prompts], 1),
        patches=torch.cat([p.patches for p in prompts]),
        grid=torch.cat([p.grid for p in prompts]),
        image_slots=torch.cat([p.image_slots + start for p, start in zip(prompts, starts, strict=True)]),
    )


def deal(
    groups: Sequence[Group],
    tokens_per_micro_batch: int,
    ranks: int = 1,
    first: int = 0,
    patch_cost: float = 0.0,
) -> tuple[list[MicroStep], int]:
    """Assign groups to packs and packs to ranks, from sizes alone.

    A group stays whole unless it exceeds the budget by itself. Then its responses are spread over several packs and its
    prompt is computed in each of them, which costs time but does not change the gradient.

    FSDP keeps the ranks in step, so a micro-step takes as long as its slowest rank. First-fit decreasing finds the
    smallest number of micro-steps; then the same pieces are spread evenly over their packs, and packs of similar cost
    share a micro-step. The result is deterministic: every rank computes the same without communication.

    Args:
        groups: only sizes are read; prompts may be None.
        tokens_per_micro_batch: the largest pack, in tokens; only a piece with one response may exceed it.
        first: place of the first group's first token on the flat axis. patch_cost: cost of an image patch, in tokens.

    Returns:
        Micro-steps, each with the pieces of every rank's pack (an empty list: no work for that rank), and the number of
        groups that were split.
    """
    pieces: list[Piece] = []
    num_split = 0
    for group in groups:
        group_pieces = _cut(group, first, tokens_per_micro_batch)
        num_split += len(group_pieces) > 1
        pieces += group_pieces
        first += sum(len(r.ids) for r in group.responses)
    bins = _first_fit(pieces, tokens_per_micro_batch)
    if ranks > 1:
        bins = _balanced(pieces, bins, tokens_per_micro_batch, ranks, patch_cost)
    # A pack keeps the batch's order, so that the tokens of a response are contiguous and in order.
    bins = [sorted(pieces, key=lambda piece: piece.starts[0]) for pieces in bins]
    return [bins[i : i + ranks] for i in range(0, len(bins), ranks)], num_split


def has_images(micro_step: MicroStep) -> bool:
    """Whether any rank's pack has an image: then all ranks run the vision tower."""
    return any(piece.patches for pieces in micro_step for piece in pieces)


def pack_groups(
    groups: Sequence[Group], tokens_per_micro_batch: int, first: int = 0
) -> tuple[list[Pack], int]:
    """The packs of a single process and the number of groups that were split: `deal`, then `build`."""
    micro_steps, num_split = deal(groups, tokens_per_micro_batch, 1, first)
    return [build(pieces) for (pieces,) in micro_steps], num_split


def _cut(group: Group, first: int, budget: int) -> list[Piece]:
    """The group as pieces, each within the budget where possible."""
    pieces: list[Piece] = []
    starts = _starts((len(r.ids) for r in group.responses), first)
    for response, start in zip(group.responses, starts, strict=True):
        size = max(0, len(response.ids) - 1)
        if not pieces or pieces[-1].size + size > budget:
            pieces.append(Piece(group, [], [], group.prompt_tokens, group.num_patches))
        pieces[-1].size += size
        pieces[-1].responses.append(response)
        pieces[-1].starts.append(start)
    return pieces


def _first_fit(pieces: list[Piece], budget: int) -> list[list[Piece]]:
    """First-fit decreasing: each piece, longest first, goes into the first bin of `budget` tokens with room."""
    bins: list[list[Piece]] = []
    sizes: list[int] = []
    for piece in sorted(pieces, key=lambda piece: -piece.size):
        at = next((i for i, size in enumerate(sizes) if size + piece.size <= budget), len(bins))
        if at == len(bins):
            bins.append([])
            sizes.append(0)
        bins[at].append(piece)
        sizes[at] += piece.size
    return bins


def _balanced(
    pieces: list[Piece], bins: list[list[Piece]], budget: int, ranks: int, patch_cost: float
) -> list[list[Piece]]:
    """Enough bins to fill whole micro-steps, sorted by falling cost, so that bins of similar cost share one.

    Images go into as few micro-steps as possible: the vision tower is gathered on all ranks whenever one rank needs it.
    They are also spread evenly, in case `patch_cost` is off.
    """

    def cost(pieces: list[Piece]) -> float:
        return sum(piece.size + patch_cost * piece.patches for piece in pieces)

    def by_cost(bins: list[list[Piece]]) -> list[list[Piece]]:
        return sorted(bins, key=lambda pieces: -cost(pieces))

    def whole_steps(count: int) -> int:
        return -(-count // ranks) * ranks

    count = whole_steps(len(bins))
    for front in (whole_steps(len(_first_fit([piece for piece in pieces if piece.patches], budget))), count):
        if spread := _spread(pieces, count, front, budget, cost):
            return by_cost(spread[:front]) + by_cost(spread[front:])
    return by_cost(bins + [[] for _ in range(count - len(bins))])


def _spread(
    pieces: list[Piece], count: int, front: int, budget: int, cost: Callable[[list[Piece]], float]
) -> list[list[Piece]] | None:
    """`count` bins: each piece, most expensive first, goes into the cheapest bin with room; None if none has room.

    Images come before text, and only into the first `front` bins.
    """
    bins: list[list[Piece]] = [[] for _ in range(count)]
    sizes, costs = [0] * count, [0.0] * count
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


def build(pieces: list[Piece], patch_dim: int = 0) -> Pack:
    """Build one pack from pieces whose prompts are prepared. The module docstring draws the layout.

    A rank without pieces gets a pack of one token and nothing to score, because FSDP's collectives need every rank. For
    the same reason a pack without images gets a dummy image if another rank has one: four zero patches, one embedding,
    and no slot that reads it.

    Args:
        patch_dim: size of a patch if the micro-step `has_images`; 0: it has none.
    """
    Part = tuple[Prompt | _DummyPrompt, list[Response], list[int]]
    parts: list[Part] = [(_dummy_prompt(), [], [])] if not pieces else []
    for piece in pieces:
        assert piece.group.prompt is not None, "prepare the prompt before build"
        parts.append((piece.group.prompt, piece.responses, piece.starts))
    fanout = max(len(responses) for _, responses, _ in parts)
    num_copies = len(parts) * fanout  # rows in front of the hidden states in `scored`
    table, ids, positions, slots, picks, target, flat_index = [], [], [], [], [], [], []
    last: list[int] = []
    end = 0
    for prompt, responses, starts in parts:
        p0, end = end, end + len(prompt.ids)
        p1 = end
        table.append([p0, p1, p0, p1, 0, 0, 1])
        ids.append(prompt.ids)
        positions.append(prompt.positions)
        slots.append(prompt.image_slots + p0)
        copy = len(last) * fanout  # row of the first copy of this prompt's last hidden state
        last.append(p1 - 1)
        for g, (response, start) in enumerate(zip(responses, starts, strict=True)):
            length = len(response.ids)
            if not length:
                continue
            r0, end = end, end + length - 1
            table.append([r0, end, r0, end, p0, p1, 1])
            ids.append(response.ids[:-1])
            positions.append((prompt.next_position + torch.arange(length - 1)).expand(3, -1))
            picks.append(torch.cat([torch.tensor([copy + g]), num_copies + torch.arange(r0, end)]))
            target.append(response.ids)
            flat_index.append(torch.arange(start, start + length))
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
        last=torch.tensor(last),
        fanout=fanout,
        picks=torch.cat(picks or empty),
        target=torch.cat(target or empty),
        flat_index=torch.cat(flat_index or empty),
        num_scored=sum(len(t) for t in target),
        num_tokens=end,
    )


@dataclass
class _DummyPrompt(PackedPrompts):
    next_position: int = 1


def _dummy_prompt() -> _DummyPrompt:
    """One token and no image."""
    none = torch.zeros(0, dtype=torch.int64)
    return _DummyPrompt(none.new_zeros(1), none.new_zeros(3, 1), torch.zeros(0, 0), none.view(0, 3), none)


def _starts(lengths: Iterable[int], first: int = 0) -> list[int]:
    starts = []
    for length in lengths:
        starts.append(first)
        first += length
    return starts
