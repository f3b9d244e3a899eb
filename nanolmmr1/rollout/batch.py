"""Sampled groups of all ranks: their exchange, and flat vectors over their tokens.

One rank samples a group, another may train on it. Only the output of sampling is exchanged: token ids, log-probs,
texts and judgements, a few bytes per token. A prompt and its images are a function of the row, so the rank that trains
on a group prepares them again. After the exchange every rank holds all groups in the same order, and computes
advantages, weights and the assignment of groups to ranks by itself, identically and without further messages.

Next: ../reward/rules.py, format and accuracy.
"""

import json
from collections.abc import Sequence

import torch
from safetensors.torch import load, save

from nanolmmr1.data.group import Group, Response
from nanolmmr1.data.rows import Row
from nanolmmr1.errors import Preempted, UserError
from nanolmmr1.parallel import dist
from nanolmmr1.update.objective import Tokens
from nanolmmr1.update.pack import Pack


def gather_groups(
    groups: list[Group],
    row_indices: Sequence[int],
    rows: Sequence[Row],
    failure: Preempted | UserError | None = None,
    sends: bool = True,
) -> list[Group]:
    """All-gather the ranks' groups.

    Args:
        groups: judged groups of this rank; row_indices: index of each group's row in `rows`.
        failure: why this rank has no groups, or None.
        sends: False if a rank of the same engine sends the same groups (see `Sampler.ranks_per_engine`).

    Returns:
        The groups of all ranks, in order of rank. Groups of this rank are returned unchanged, others have no prompt.

    Raises:
        Preempted, SharedError: some rank passed a failure; see dist.raise_together.
    """
    dist.raise_together(failure)
    if dist.size() == 1:
        return groups
    gathered: list[Group] = []
    for rank, blob in enumerate(dist.gather(_encode(groups, row_indices) if sends else b"")):
        if sends and rank == dist.rank():
            gathered += groups
        elif blob:
            gathered += _decode(blob, rows)
    return gathered


class Batch:
    """All responses of a step as flat vectors: R responses, M scored tokens, response after response.

    The order of responses is that of the groups. Vectors are on the CPU and identical on all ranks.
    """

    groups: list[Group]
    lengths: torch.Tensor  # (R,) int64, tokens of each response
    group: torch.Tensor  # (R,) int64, index of each response's group
    response: torch.Tensor  # (M,) int64, index of each token's response
    rewards: torch.Tensor  # (R,) fp32, from the judge
    weight: torch.Tensor  # (R,) fp32, weight in the loss of each token of a response; set for each update
    sampler_logp: torch.Tensor  # (M,) fp32, reported by the sampler
    first_logp: torch.Tensor  # (M,) fp32, of the policy before its first update; compared with sampler_logp
    old_logp: torch.Tensor | None  # (M,) fp32, the same for the ratio in the loss; None: equal to the current log-prob
    ref_logp: torch.Tensor | None  # (M,) fp32, of the reference model; None: there is no reference
    advantage: torch.Tensor  # (M,) fp32; set before the first update

    def __init__(self, groups: list[Group]) -> None:
        responses = [response for group in groups for response in group.responses]
        self.groups = groups
        self.lengths = torch.tensor([len(response.ids) for response in responses])
        self.group = torch.repeat_interleave(torch.tensor([len(group.responses) for group in groups]))
        self.response = torch.repeat_interleave(self.lengths)
        self.rewards = torch.tensor([reward for group in groups for reward in group.rewards])
        self.weight = torch.zeros(len(responses))
        self.sampler_logp = torch.cat([response.logp for response in responses])
        self.first_logp = torch.zeros_like(self.sampler_logp)
        self.old_logp = self.ref_logp = None

    def tokens(self, pack: Pack, device: torch.device) -> Tokens:
        """Input of the objective for the N scored tokens of a pack, on a device."""
        index = pack.flat_index  # (N,)
        response = self.response[index]

        def select(vector: torch.Tensor | None) -> torch.Tensor | None:
            return None if vector is None else vector[index].to(device)

        return Tokens(
            advantage=self.advantage[index].to(device),
            weight=self.weight[response].to(device),
            response=torch.unique_consecutive(response, return_inverse=True)[1].to(device),
            sampler_logp=self.sampler_logp[index].to(device),
            old_logp=select(self.old_logp),
            ref_logp=select(self.ref_logp),
        )


def _encode(groups: list[Group], row_indices: Sequence[int]) -> bytes:
    """A safetensors blob: the flat tensors of all responses, and everything else as JSON."""
    responses = [response for group in groups for response in group.responses]
    header = [
        dict(row=index, tokens=group.prompt_tokens, patches=group.num_patches, texts=group.texts,
             judgements=group.judgements, finish=[response.finish for response in group.responses])
        for index, group in zip(row_indices, groups, strict=True)
    ]  # fmt: skip
    empty = torch.zeros(0)
    return save({
        "header": torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8),
        "lengths": torch.tensor([len(response.ids) for response in responses], dtype=torch.int64),
        "ids": torch.cat([response.ids for response in responses] or [empty.long()]).int(),
        "logp": torch.cat([response.logp for response in responses] or [empty]),
    })  # fmt: skip


def _decode(blob: bytes, rows: Sequence[Row]) -> list[Group]:
    """The groups in a blob of `_encode`, without prompts."""
    tensors = load(blob)
    header = json.loads(tensors["header"].numpy().tobytes())
    lengths = tensors["lengths"].tolist()
    pairs = zip(tensors["ids"].long().split(lengths), tensors["logp"].split(lengths), strict=True)
    groups = []
    for fields in header:
        responses = [Response(*next(pairs), finish) for finish in fields["finish"]]
        groups.append(Group(None, responses, fields["texts"], fields["judgements"], rows[fields["row"]],
                            fields["tokens"], fields["patches"]))  # fmt: skip
    return groups
