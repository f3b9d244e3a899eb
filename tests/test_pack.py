"""Packing: who sees whom, what predicts what, and every scored token exactly once, within the budget."""

import math
import random
from dataclasses import replace

import pytest
import torch

from nanolmmr1.data.group import Group, Response
from nanolmmr1.data.prompt import Prompt
from nanolmmr1.update.pack import Piece, build, concat_prompts, deal, has_images, pack_groups, scored


def text_prompt(*ids):
    """A prompt of words only."""
    length = len(ids)
    return Prompt(
        row=None, ids=torch.tensor(ids), positions=torch.arange(length).repeat(3, 1), patches=torch.zeros(0, 6),
        grid=torch.zeros(0, 3, dtype=torch.int64), image_slots=torch.zeros(0, dtype=torch.int64), text="",
    )  # fmt: skip


def image_prompt(first_patch):
    """[word, 2 x 1 merged image tokens, word] with 8 patches numbered from `first_patch`."""
    return Prompt(
        row=None, ids=torch.tensor([30, 9, 9, 31]), positions=torch.tensor([[0, 1, 1, 3], [0, 1, 2, 3], [0, 1, 1, 3]]),
        patches=torch.arange(first_patch, first_patch + 8)[:, None].expand(8, 6).float(),
        grid=torch.tensor([[1, 4, 2]]), image_slots=torch.tensor([1, 2]), text="",
    )  # fmt: skip


def rows(pack):
    """The places whose hidden states predict the pack's scored tokens."""
    return scored(torch.arange(pack.num_tokens)[:, None], pack).flatten().tolist()


def responses(*lengths, first=100):
    """Responses whose token ids count on from `first`."""
    made = []
    for length in lengths:
        made.append(Response(torch.arange(first, first + length), torch.zeros(length), "stop"))
        first += length
    return made


def piece(prompt, own, *starts):
    """A whole group as a piece."""
    group = Group(prompt, own)
    return Piece(group, own, list(starts), group.prompt_tokens + sum(len(r.ids) - 1 for r in own), group.num_patches)


def test_a_pack_of_two_groups_is_laid_out_as_written_here():
    text, image = text_prompt(10, 11, 12), image_prompt(0)
    pack = build([piece(text, responses(3, 1), 0, 3), piece(image, responses(2, first=200), 4)])
    #                        text      | 3 of which 2   | image           | 2 of which 1
    assert pack.ids.tolist() == [10, 11, 12, 100, 101, 30, 9, 9, 31, 200]
    assert pack.positions.tolist() == [
        [0, 1, 2, 3, 4, 0, 1, 1, 3, 4],
        [0, 1, 2, 3, 4, 0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4, 0, 1, 1, 3, 4],
    ]
    assert pack.spans.table.tolist() == [
        [0, 3, 0, 3, 0, 0, 1],
        [3, 5, 3, 5, 0, 3, 1],
        [5, 5, 5, 5, 0, 3, 1],
        [5, 9, 5, 9, 0, 0, 1],
        [9, 10, 9, 10, 5, 9, 1],
    ]
    assert pack.spans.num_tokens == pack.num_tokens == 10 and pack.num_scored == 6
    assert rows(pack) == [2, 3, 4, 2, 8, 9]  # a prompt's last token predicts each response's first
    assert pack.target.tolist() == [100, 101, 102, 103, 200, 201]
    assert pack.flat_index.tolist() == [0, 1, 2, 3, 4, 5]
    assert pack.image_slots.tolist() == [6, 7] and pack.grid.tolist() == [[1, 4, 2]] and pack.patches.shape == (8, 6)


def test_images_of_several_groups_keep_their_order_and_places():
    first, second = image_prompt(0), image_prompt(50)
    pack = build([piece(first, responses(2), 0), piece(second, responses(3, first=200), 2)])
    assert pack.image_slots.tolist() == [1, 2, 6, 7]
    assert pack.patches[:, 0].tolist() == [*range(8), *range(50, 58)]
    assert pack.grid.tolist() == [[1, 4, 2], [1, 4, 2]]


def test_an_empty_response_is_no_token_and_shifts_nothing():
    pack = build([piece(text_prompt(10, 11), responses(0, 2, 0), 0, 0, 2)])
    assert pack.ids.tolist() == [10, 11, 100]
    assert pack.spans.table.tolist() == [[0, 2, 0, 2, 0, 0, 1], [2, 3, 2, 3, 0, 2, 1]]
    assert rows(pack) == [1, 2] and pack.target.tolist() == [100, 101] and pack.flat_index.tolist() == [0, 1]


def test_a_group_of_empty_responses_scores_nothing():
    packs, split = pack_groups([Group(text_prompt(10, 11), responses(0, 0))], 100)
    assert split == 0 and [pack.num_scored for pack in packs] == [0]
    assert len(rows(packs[0])) == len(packs[0].target) == len(packs[0].flat_index) == 0


def rollout():
    """Seven groups of different sizes, with empty and one-token responses."""
    lengths = [(3, 1), (9, 9, 9), (0, 5), (1, 1), (20, 2), (4,), (6, 7)]
    groups, first = [], 100
    for index, own in enumerate(lengths):
        prompt = image_prompt(8 * index) if index % 3 == 0 else text_prompt(*range(10, 14 + index))
        groups.append(Group(prompt, responses(*own, first=first)))
        first += sum(own)
    return groups, first - 100


@pytest.mark.parametrize("budget", [1, 12, 25, 33, 60, 1000])
def test_every_scored_token_is_in_exactly_one_pack_and_predicted_by_the_token_before_it(budget):
    groups, count = rollout()
    packs, _ = pack_groups(groups, budget)
    where = torch.cat([pack.flat_index for pack in packs])
    assert sorted(where.tolist()) == list(range(count))
    before = {}  # where -> the token before it
    for group in groups:
        for response in group.responses:
            for i, token in enumerate(response.ids.tolist()):
                before[token - 100] = int(response.ids[i - 1]) if i else int(group.prompt.ids[-1])
    for pack in packs:
        assert (pack.target == pack.flat_index + 100).all()  # ids were numbered so
        assert pack.ids[rows(pack)].tolist() == [before[place] for place in pack.flat_index.tolist()]
        assert (pack.flat_index.diff() > 0).all()  # the rollout's order, so a response's tokens are contiguous


# The groups alone take 6, 29, 10, 4, 28, 12 and 15 tokens.
@pytest.mark.parametrize(("budget", "split_groups", "count"), [(12, 3, None), (25, 2, None), (34, 0, 4), (60, 0, 2)])
def test_packs_keep_to_the_budget_and_only_larger_groups_are_split(budget, split_groups, count):
    groups, _ = rollout()
    packs, split = pack_groups(groups, budget)
    assert split == split_groups
    assert count is None or len(packs) == count
    prompts = [int((pack.spans.table[:, 5] == 0).sum()) for pack in packs]  # spans without a prefix
    assert (sum(prompts) == len(groups)) == (split == 0)
    for pack in packs:
        one_response = len(pack.spans.table) <= 2
        assert pack.num_tokens <= budget or one_response


def test_a_group_larger_than_the_budget_takes_its_prompt_along():
    group = Group(text_prompt(10, 11, 12), responses(3, 5, 2))
    packs, split = pack_groups([group], 7, first=40)
    assert split == 1
    assert sorted((pack.ids.tolist(), pack.flat_index.tolist()) for pack in packs) == [
        ([10, 11, 12, 100, 101], [40, 41, 42]),
        ([10, 11, 12, 103, 104, 105, 106], [43, 44, 45, 46, 47]),
        ([10, 11, 12, 108], [48, 49]),
    ]


def test_a_prompt_above_the_budget_still_trains_one_response_at_a_time():
    group = Group(text_prompt(*range(10, 30)), responses(3, 1, 5))
    packs, split = pack_groups([group], 8)
    assert split == 1 and sorted(pack.num_scored for pack in packs) == [1, 3, 5]
    assert all(len(pack.spans.table) == 2 for pack in packs)


def test_a_budget_may_be_used_to_the_last_token():
    groups = [Group(text_prompt(10, 11, 12), responses(2, 2)), Group(text_prompt(10, 11), responses(4, first=104))]
    packs, split = pack_groups(groups, 10)  # 3 + 1 + 1 and 2 + 3
    assert (len(packs), packs[0].num_tokens, split) == (1, 10, 0)
    assert [len(pack_groups(groups, budget)[0]) for budget in (9, 5)] == [2, 2]
    assert pack_groups(groups[:1], 5)[1] == 0 and pack_groups(groups[:1], 4)[1] == 1


def test_short_groups_fill_what_long_ones_leave():
    groups = [Group(text_prompt(*range(size)), responses(1, first=100 + i)) for i, size in enumerate((4, 6, 4, 6))]
    packs, _ = pack_groups(groups, 10)
    assert [pack.num_tokens for pack in packs] == [10, 10]


def test_no_group_gives_no_pack():
    assert pack_groups([], 100) == ([], 0)
    assert deal([], 100, ranks=4) == ([], 0)


def first_fit(groups, budget):
    """Which responses share a pack, by first fit, longest first: what a single process has always done.

    Packs of (group, responses), each by index.
    """
    pieces = []
    for g, group in enumerate(groups):
        cut = []
        for r, response in enumerate(group.responses):
            size = max(0, len(response.ids) - 1)
            if not cut or cut[-1][0] + size > budget:
                cut.append([len(group.prompt.ids), g, []])
            cut[-1][0] += size
            cut[-1][2].append(r)
        pieces += cut
    packs = []
    for size, g, own in sorted(pieces, key=lambda p: -p[0]):
        for pack in packs:
            if pack[0] + size <= budget:
                break
        else:
            packs.append(pack := [0, []])
        pack[0] += size
        pack[1].append((g, own))
    return [sorted(own) for _, own in packs]


def names(pieces, groups):
    """Pieces as (group, responses), each by index."""
    found = []
    for own in pieces:
        (g,) = [g for g, group in enumerate(groups) if group is own.group]
        found.append((g, [r for r, x in enumerate(groups[g].responses) if any(x is y for y in own.responses)]))
    return found


@pytest.mark.parametrize("budget", [1, 12, 25, 34, 60, 1000])
def test_one_rank_has_the_packs_of_first_fit(budget):
    groups, _ = rollout()
    micro_steps, _ = deal(groups, budget, patch_cost=3.0)
    assert [names(pieces, groups) for (pieces,) in micro_steps] == first_fit(groups, budget)
    packs = [build(pieces) for (pieces,) in micro_steps]
    assert [p.ids.tolist() for p in packs] == [p.ids.tolist() for p in pack_groups(groups, budget)[0]]


def tokens(pieces):
    return sum(own.size for own in pieces)


@pytest.mark.parametrize("budget", [1, 12, 25, 34, 60, 1000])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 40])
def test_over_ranks_and_micro_steps_every_token_is_scored_once_within_the_budget(budget, ranks):
    groups, count = rollout()
    micro_steps, split = deal(groups, budget, ranks, first=5, patch_cost=0.5)
    assert all(len(step) == ranks for step in micro_steps)
    assert split == deal(groups, budget)[1]
    assert len(micro_steps) == math.ceil(len(deal(groups, budget)[0]) / ranks)  # as few as first fit can do with
    where = []
    for pieces in (pieces for step in micro_steps for pieces in step):
        pack = build(pieces)
        where += pack.flat_index.tolist()
        assert (pack.target == pack.flat_index + 95).all() and (pack.flat_index.diff() > 0).all()
        assert pack.num_tokens == max(1, tokens(pieces))
        assert pack.num_tokens <= budget or len(pieces) == len(pieces[0].responses) == 1
        assert len(pack.patches) == sum(own.patches for own in pieces)
    assert sorted(where) == list(range(5, 5 + count))


def test_a_layout_is_made_from_sizes_alone():
    groups, _ = rollout()
    elsewhere = [replace(group, prompt=None) for group in groups]
    assert [group.prompt_tokens for group in elsewhere] == [group.prompt_tokens for group in groups]
    layouts = [deal(own, 25, 3, patch_cost=0.5) for own in (groups, elsewhere)]
    shapes = [[[[(p.starts, p.size, p.patches) for p in own] for own in step] for step in own[0]] for own in layouts]
    assert shapes[0] == shapes[1] and layouts[0][1] == layouts[1][1]


def test_groups_of_one_size_may_change_places_without_changing_the_layout():
    lengths, shape = [(9, 4), (3, 3), (9, 4), (20, 1), (3, 3), (3, 3), (9, 4)], []
    for order in (range(7), [2, 1, 6, 3, 5, 4, 0]):
        groups = [Group(text_prompt(10, 11, 12), responses(*lengths[i])) for i in order]
        micro_steps, _ = deal(groups, 30, 2)
        shape.append([[[own.size for own in pieces] for pieces in step] for step in micro_steps])
        assert micro_steps == deal(groups, 30, 2)[0]
    assert shape[0] == shape[1]


def test_ranks_beyond_the_groups_have_nothing():
    groups = [Group(text_prompt(10, 11), responses(3)), Group(text_prompt(10, 11), responses(9, first=103))]
    (step,), _ = deal(groups, 100, 4)
    assert [names(pieces, groups) for pieces in step] == [[(1, [0])], [(0, [0])], [], []]  # the dearest first


def test_one_giant_group_is_shared_by_all_ranks():
    group = Group(text_prompt(10, 11, 12), responses(*[5] * 8))
    micro_steps, split = deal([group], 7, 4)
    assert split == 1 and [[tokens(pieces) for pieces in step] for step in micro_steps] == [[7] * 4] * 2
    assert [build(pieces).num_scored for step in micro_steps for pieces in step] == [5] * 8


def text_groups(*sizes):
    """One response of one token each, so that a group takes as many tokens as its prompt."""
    return [Group(text_prompt(*range(size)), responses(1, first=100 + i)) for i, size in enumerate(sizes)]


def test_packs_of_like_cost_meet():
    for sizes, budget, expected in (
        ((7, 13, 8, 11, 9, 10), 13, [[13, 11], [10, 9], [8, 7]]),  # no two fit one pack
        ((5, 6, 4, 7, 6), 9, [[9, 7], [6, 6]]),  # the last to be spread, 4 beside 5, makes the dearest
    ):
        micro_steps, _ = deal(text_groups(*sizes), budget, 2)
        assert [[tokens(pieces) for pieces in step] for step in micro_steps] == expected


def test_where_spreading_finds_no_room_first_fit_stands():
    # Spread, 5 + 4 and 5 + 3 would leave no room for the last 3.
    micro_steps, _ = deal(text_groups(5, 8, 3, 4, 9, 3, 5), 10, 2)
    packs = [[sorted(own.size for own in pieces) for pieces in step] for step in micro_steps]
    assert packs == [[[5, 5], [3, 3, 4]], [[9], [8]]]


def test_patches_weigh_as_much_as_their_cost():
    groups = [Group(image_prompt(0), responses(1))]
    groups += [Group(text_prompt(10, 11, 12, 13), responses(1, first=101 + i)) for i in range(3)]
    for patch_cost, expected in ((0.0, [2, 2]), (1.0, [1, 3])):  # 8 patches against 4 tokens
        (step,), _ = deal(groups, 100, 2, patch_cost=patch_cost)
        assert sorted(len(pieces) for pieces in step) == expected


def test_images_meet_in_few_micro_steps():
    groups = [Group(image_prompt(8 * i) if i % 3 == 0 else text_prompt(1, 2, 3, 4), responses(3)) for i in range(12)]
    micro_steps, _ = deal(groups, 12, 2)  # two groups of 6 tokens fill a pack
    assert [has_images(step) for step in micro_steps] == [True, False, False]
    assert [[tokens(pieces) for pieces in step] for step in micro_steps] == [[12, 12]] * 3


def test_where_one_rank_has_an_image_the_others_carry_an_idle_one():
    groups = [Group(image_prompt(0), responses(1)), Group(text_prompt(10, 11), responses(2, first=101))]
    (step,), _ = deal(groups, 100, 3)
    assert has_images(step)
    image, text, idle = (build(pieces, patch_dim=6) for pieces in step)
    assert image.grid.tolist() == [[1, 4, 2]] and len(image.image_slots) == 2
    for pack in (text, idle):
        assert pack.grid.tolist() == [[1, 2, 2]] and pack.patches.tolist() == [[0.0] * 6] * 4
        assert len(pack.image_slots) == 0  # nothing takes its embedding
    assert not has_images([step[1], step[2]]) and not len(build(step[1]).grid)


def test_a_pack_of_nothing_is_one_token_that_is_not_scored():
    pack = build([])
    assert (pack.num_tokens, pack.num_scored, pack.ids.tolist(), pack.positions.tolist()) == (1, 0, [0], [[0]] * 3)
    assert pack.spans.table.tolist() == [[0, 1, 0, 1, 0, 0, 1]]
    empty = pack.picks, pack.target, pack.flat_index, pack.patches, pack.grid, pack.image_slots
    assert [len(t) for t in empty] == [0] * 6
    assert pack.grid.shape == (0, 3) and pack.picks.dtype == pack.target.dtype == pack.flat_index.dtype == torch.int64


def sizes_of_a_step(seed, pictures):
    """128 groups of 8 responses, as a step of training has them: log-normal lengths to 4,096, some with a picture.

    Only sizes: no prompt, and one buffer behind all ids.
    """
    rng, buffer, groups = random.Random(seed), torch.zeros(4096, dtype=torch.int64), []
    for _ in range(128):
        difficulty = rng.gauss(math.log(500), 0.5)
        lengths = [min(4096, 1 + int(math.exp(rng.gauss(difficulty, 0.6)))) for _ in range(8)]
        patches = 4 * rng.randrange(64, 1200) if rng.random() < pictures else 0
        own = [Response(buffer[:length], None, "stop") for length in lengths]
        groups.append(Group(None, own, prompt_tokens=rng.randrange(50, 400) + patches // 4, num_patches=patches))
    return groups


def imbalance(micro_steps, patch_cost):
    """How much longer the micro-steps take than if every rank had the same to do."""
    cost = [[sum(p.size + patch_cost * p.patches for p in own) for own in step] for step in micro_steps]
    return sum(map(max, cost)) / (sum(map(sum, cost)) / len(cost[0]))


def contiguous(groups, budget, ranks):
    """Plain dealing: as many neighbouring groups to each rank, which packs them for itself."""
    count = len(groups)
    shares = [deal(groups[count * r // ranks : count * (r + 1) // ranks], budget)[0] for r in range(ranks)]
    return [[share[i][0] if i < len(share) else [] for share in shares] for i in range(max(map(len, shares)))]


@pytest.mark.parametrize("pictures", [0.0, 0.3, 1.0])
def test_ranks_wait_for_each_other_far_less_than_with_plain_dealing(pictures, capsys):
    ours, plain = [], []
    for seed in range(5):
        groups = sizes_of_a_step(seed, pictures)
        micro_steps, _ = deal(groups, 32768, 8, patch_cost=0.5)
        ours.append(imbalance(micro_steps, 0.5) - 1)
        plain.append(imbalance(contiguous(groups, 32768, 8), 0.5) - 1)
    with capsys.disabled():
        print(f"\nwaiting, mean of 5 steps: {sum(ours) / 5:.1%} dealt, {sum(plain) / 5:.1%} contiguous", end=" ")
    assert max(ours) < min(plain) / 2 and max(ours) < 0.07


def test_prompts_alone_are_concatenated_with_their_images():
    packed = concat_prompts([text_prompt(1, 2), image_prompt(0), image_prompt(8)])
    assert packed.ids.tolist() == [1, 2, 30, 9, 9, 31, 30, 9, 9, 31]
    assert packed.positions[1].tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 2, 3]
    assert packed.image_slots.tolist() == [3, 4, 7, 8]
    assert packed.patches[:, 0].tolist() == list(range(16)) and len(packed.grid) == 2


def test_gradients_of_a_prompts_last_row_are_added_in_one_order():
    """Nothing is selected twice, which a GPU would add up as it comes by; and the sum is right."""
    groups = [Group(text_prompt(1, 2, 3), responses(3, 1, 2)), Group(text_prompt(4), responses(2))]
    (pack,), _ = pack_groups(groups, 100)
    assert len(set(pack.picks.tolist())) == len(pack.picks) and len(set(pack.last.tolist())) == len(pack.last) == 2
    hidden = torch.randn(pack.num_tokens, 5, dtype=torch.float64, requires_grad=True)
    plain = hidden.detach().clone().requires_grad_()
    upstream = torch.randn(pack.num_scored, 5, dtype=torch.float64)
    ours, theirs = scored(hidden, pack), plain.index_select(0, torch.tensor(rows(pack)))
    assert torch.equal(ours, theirs)
    for out in (ours, theirs):
        out.backward(upstream)
    assert torch.allclose(hidden.grad, plain.grad, rtol=0, atol=1e-14) and hidden.grad[2].abs().min() > 0


def test_moving_a_pack_moves_its_tensors_but_not_the_grid():
    pack = build([piece(image_prompt(0), responses(2), 0)]).to("meta")
    moved = {name for name, value in vars(pack).items() if isinstance(value, torch.Tensor) and value.is_meta}
    assert moved == {"ids", "positions", "patches", "image_slots", "last", "picks", "target", "flat_index"}
    assert pack.grid.tolist() == [[1, 4, 2]] and pack.num_scored == 2
