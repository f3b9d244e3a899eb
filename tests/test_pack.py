"""Packing: who sees whom, what predicts what, and every scored token exactly once, within the budget."""

import pytest
import torch

from nanolmmr1.pack import build, concat_prompts, pack_groups
from nanolmmr1.prompt import Prompt
from nanolmmr1.rollout import Group, Response


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


def responses(*lengths, first=100):
    """Responses whose token ids count on from `first`."""
    made = []
    for length in lengths:
        made.append(Response(torch.arange(first, first + length), torch.zeros(length), "stop"))
        first += length
    return made


def test_a_pack_of_two_groups_is_laid_out_as_written_here():
    text, image = text_prompt(10, 11, 12), image_prompt(0)
    pack = build([(text, responses(3, 1), [0, 3]), (image, responses(2, first=200), [4])])
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
    assert pack.rows.tolist() == [2, 3, 4, 2, 8, 9]  # a prompt's last token predicts each response's first
    assert pack.target.tolist() == [100, 101, 102, 103, 200, 201]
    assert pack.where.tolist() == [0, 1, 2, 3, 4, 5]
    assert pack.image_slots.tolist() == [6, 7] and pack.grid.tolist() == [[1, 4, 2]] and pack.patches.shape == (8, 6)


def test_images_of_several_groups_keep_their_order_and_places():
    first, second = image_prompt(0), image_prompt(50)
    pack = build([(first, responses(2), [0]), (second, responses(3, first=200), [2])])
    assert pack.image_slots.tolist() == [1, 2, 6, 7]
    assert pack.patches[:, 0].tolist() == [*range(8), *range(50, 58)]
    assert pack.grid.tolist() == [[1, 4, 2], [1, 4, 2]]


def test_an_empty_response_is_no_token_and_shifts_nothing():
    pack = build([(text_prompt(10, 11), responses(0, 2, 0), [0, 0, 2])])
    assert pack.ids.tolist() == [10, 11, 100]
    assert pack.spans.table.tolist() == [[0, 2, 0, 2, 0, 0, 1], [2, 3, 2, 3, 0, 2, 1]]
    assert pack.rows.tolist() == [1, 2] and pack.target.tolist() == [100, 101] and pack.where.tolist() == [0, 1]


def test_a_group_of_empty_responses_scores_nothing():
    packs, split = pack_groups([Group(text_prompt(10, 11), responses(0, 0))], 100)
    assert split == 0 and [pack.num_scored for pack in packs] == [0]
    assert len(packs[0].rows) == len(packs[0].target) == len(packs[0].where) == 0


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
    where = torch.cat([pack.where for pack in packs])
    assert sorted(where.tolist()) == list(range(count))
    before = {}  # where -> the token before it
    for group in groups:
        for response in group.responses:
            for i, token in enumerate(response.ids.tolist()):
                before[token - 100] = int(response.ids[i - 1]) if i else int(group.prompt.ids[-1])
    for pack in packs:
        assert (pack.target == pack.where + 100).all()  # ids were numbered so
        assert pack.ids[pack.rows].tolist() == [before[place] for place in pack.where.tolist()]
        assert (pack.where.diff() > 0).all()  # the rollout's order, so a response's tokens are contiguous


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
    assert sorted((pack.ids.tolist(), pack.where.tolist()) for pack in packs) == [
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


def test_prompts_alone_are_concatenated_with_their_images():
    packed = concat_prompts([text_prompt(1, 2), image_prompt(0), image_prompt(8)])
    assert packed.ids.tolist() == [1, 2, 30, 9, 9, 31, 30, 9, 9, 31]
    assert packed.positions[1].tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 2, 3]
    assert packed.image_slots.tolist() == [3, 4, 7, 8]
    assert packed.patches[:, 0].tolist() == list(range(16)) and len(packed.grid) == 2


def test_moving_a_pack_moves_its_tensors_but_not_the_grid():
    pack = build([(image_prompt(0), responses(2), [0])]).to("meta")
    moved = {name for name, value in vars(pack).items() if isinstance(value, torch.Tensor) and value.is_meta}
    assert moved == {"ids", "positions", "patches", "image_slots", "rows", "target", "where"}
    assert pack.grid.tolist() == [[1, 4, 2]] and pack.num_scored == 2
