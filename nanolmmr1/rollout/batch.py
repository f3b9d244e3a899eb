"""Groups on their way between ranks: sampled on one, learnt from on another, and on all of them one set of vectors.

Only what sampling made travels: token ids, log-probs, texts and judgements, a few bytes a token. Prompts and pictures
are a function of the row, so the rank that learns from a group prepares them again. Afterwards every rank knows all
groups, in the same order, and what follows from them (advantages, weights, which rank learns from which) is worked out
by each for itself, with no further word.
"""

import json

import torch
from safetensors.torch import load, save

from nanolmmr1.errors import Preempted
from nanolmmr1.parallel import dist
from nanolmmr1.rollout import Group, Response
from nanolmmr1.update.objective import Tokens


def gather_groups(groups, indices, rows, trouble=None, speaks=True):
    """All ranks' groups, in order of rank; this rank's own as they are.

    Args:
        groups: [Group], judged; indices: the number of each one's row in rows.
        trouble: Preempted or UserError that kept this rank from making them, or None.
        speaks: False on ranks whose groups another rank has as well (see `ranks` of samplers).

    Raises:
        Preempted, SharedError: some rank had such trouble; a single process raises its own.
    """
    if dist.size() == 1:
        if trouble:
            raise trouble
        return groups
    told = [_unpack(blob, rows) for blob in dist.gather(_pack(groups if speaks else [], indices, trouble))]
    if any(stopping for _, stopping, _ in told):
        raise Preempted
    dist.share_errors([error for _, _, error in told])
    mine = dist.rank() if speaks else None  # these have their prompts
    return [group for r, (theirs, _, _) in enumerate(told) for group in (groups if r == mine else theirs)]


class Batch:
    """What was sampled in a step, as flat vectors over its M scored tokens, response after response."""

    def __init__(self, groups):
        responses = [r for group in groups for r in group.responses]
        self.groups = groups
        self.lengths = torch.tensor([len(r.ids) for r in responses])  # (R,)
        self.group = torch.repeat_interleave(torch.tensor([len(g.responses) for g in groups]))  # (R,)
        self.response = torch.repeat_interleave(self.lengths)  # (M,)
        self.sampler_logp = torch.cat([r.logp for r in responses])  # (M,)
        self.rewards = torch.tensor([reward for group in groups for reward in group.rewards])  # (R,)
        self.weight = torch.zeros(len(responses))  # (R,), of each of the response's tokens
        self.old_logp = self.ref_logp = self.advantage = None  # (M,)
        self.first_logp = torch.zeros_like(self.sampler_logp)  # (M,), of the policy before its first update

    def tokens(self, pack, device):
        """The objective's view of a pack."""
        at, response = pack.flat_index, self.response[pack.flat_index]
        local = torch.unique_consecutive(response, return_inverse=True)[1]
        vectors = [
            self.advantage[at],
            self.weight[response],
            local,
            self.sampler_logp[at],
            *(None if v is None else v[at] for v in (self.old_logp, self.ref_logp)),
        ]
        return Tokens(*(None if v is None else v.to(device) for v in vectors))


def _pack(groups, indices, trouble):
    responses = [r for group in groups for r in group.responses]
    stopping = isinstance(trouble, Preempted)
    words = dict(stopping=stopping, error=str(trouble) if trouble and not stopping else "", groups=[
        dict(row=index, tokens=group.prompt_tokens, patches=group.num_patches, texts=group.texts,
             judgements=group.judgements, finish=[r.finish for r in group.responses])
        for index, group in zip(indices[: len(groups)], groups, strict=True)])
    empty = [torch.zeros(0)]
    return save({
        "words": torch.frombuffer(bytearray(json.dumps(words).encode()), dtype=torch.uint8),
        "lengths": torch.tensor([len(r.ids) for r in responses], dtype=torch.int64),
        "ids": torch.cat([r.ids for r in responses] or [empty[0].long()]).int(),
        "logp": torch.cat([r.logp for r in responses] or empty),
    })


def _unpack(blob, rows):
    """([Group], whether to stop, error)"""
    tensors = load(blob)
    words = json.loads(tensors["words"].numpy().tobytes())
    lengths = tensors["lengths"].tolist()
    pieces = zip(tensors["ids"].long().split(lengths), tensors["logp"].split(lengths), strict=True)
    groups = []
    for told in words["groups"]:
        responses = [Response(*next(pieces), finish) for finish in told["finish"]]
        groups.append(Group(None, responses, told["texts"], told["judgements"], rows[told["row"]], told["tokens"],
                            told["patches"]))
    return groups, words["stopping"], words["error"]
