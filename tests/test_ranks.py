"""One rank is as good as many: the same steps on 1, 2 and 4 processes, wherever groups and pictures fall."""

import random

import pytest
import torch
from ranks import run
from small import BANNED, Bell, RecordingSampler, small_model, small_recipe, small_trainer
from torch.distributed.tensor.debug import CommDebugMode

from nanolmmr1.errors import Preempted, UserError
from nanolmmr1.parallel import dist, export, fsdp
from nanolmmr1.parallel.export import published
from nanolmmr1.report.display import Display
from nanolmmr1.rollout.sampler import SamplingParams
from nanolmmr1.run import setup
from nanolmmr1.update.objective import Tokens
from nanolmmr1.update.pack import build, deal, has_images
from nanolmmr1.update.policy import Policy

BUDGET = {"tokens_per_micro_batch": 60}  # a group or two: several micro-steps, some of them without an image on a rank
RECIPES = {
    "grpo": dict(images=True, pack=BUDGET, phase={"prompts_per_step": 6}),
    "two updates, KL": dict(images=True, pack=BUDGET, phase={"prompts_per_step": 5, "updates_per_rollout": 2},
                            objective={"kl_coef": 0.1}),
    "dapo": dict(images=True, pack=BUDGET, phase={"dynamic_sampling": True, "prompts_per_step": 3},
                 objective={"algorithm": "dapo", "overlong_buffer": 4}),
    "recomputed, text, frozen": dict(pack=BUDGET | {"checkpoint_activations": "all"}, phase={"freeze": ["vision"]}),
}


def often_equal(ids, row):
    """A reward that is all the same in some groups, for dynamic sampling."""
    return float(ids[0] % 2 == 0) if row % 4 else 1.0


def trajectory(folder, names, over="all"):
    """{recipe: (records of five steps, final weights, which micro-steps this rank had no image in while others had)}"""
    found = {}
    for name in names:
        changes = RECIPES[name]
        reference = small_model(1).requires_grad_(False) if "KL" in name else None
        # Keys' biases have no gradient but rounding errors, which AdamW with a small eps blows up into whole steps.
        trainer = small_trainer(f"{folder}/{name}", often_equal, reference, over=over, optim={"eps": 1e-4}, **changes)
        lonely, learn = 0, trainer.policy.backward

        def counted(pack, *args, learn=learn):
            nonlocal lonely
            lonely += len(pack.grid) > 0 and not len(pack.image_slots)
            return learn(pack, *args)

        trainer.policy.backward = counted
        records = [trainer.step() for _ in range(5)]
        final = [tensor.flatten().tolist() for _, tensor in published(trainer.policy.model)]
        found[name] = records, sum(final, []), lonely
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return trajectory(tmp_path_factory.mktemp("alone"), list(RECIPES))


@pytest.mark.parametrize(("count", "hosts"), [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_five_steps_are_the_same_on_any_number_of_ranks(alone, tmp_path, count, hosts):
    over = "host" if hosts > 1 else "all"
    ends = run(count, trajectory, str(tmp_path), list(RECIPES), over, hosts=hosts)
    for name, (records, ours, _) in alone.items():
        for mine in ends:
            theirs, final, _ = mine[name]
            for expected, got in zip(records, theirs, strict=True):
                compared = [key for key in expected if not key.startswith(("phase", "timing_s/", "perf/", "pack/"))]
                here, there = {k: expected[k] for k in compared}, {k: got[k] for k in compared}
                assert there == pytest.approx(here, rel=1e-5, abs=1e-5)
            assert (torch.tensor(final) - torch.tensor(ours)).abs().max() <= 1e-5, name
            assert final == ends[0][name][1]
    if count > 1:
        assert sum(mine["grpo"][2] for mine in ends) > 0  # some rank ran the tower for the others' sake


def random_assignments(seed, number):
    """Largest error of the gradient, relative to its largest entry; and how often this rank lacked an image."""
    cfg = small_recipe()
    model, plain = small_model(), small_model()
    fsdp.shard(model, dist.mesh("cpu", "all", 60), torch.float32)
    policy, whole = Policy(model, cfg.pack, cfg.optim, BANNED), Policy(plain, cfg.pack, cfg.optim, BANNED)
    policy.start_phase(cfg.phases["train"])
    whole.start_phase(cfg.phases["train"])
    trainer = small_trainer(".", images=True)
    sampler, rng, worst, lonely = RecordingSampler(policy), random.Random(seed), 0.0, 0
    objective = trainer.phase.objective
    for _ in range(number):
        prompts = [trainer.processor.prepare(trainer.rows[rng.randrange(12)], False) for _ in range(rng.randint(1, 7))]
        params = SamplingParams(2, 5, banned_ids=BANNED)
        groups = sampler.generate(prompts, params, [(rng.randrange(99),) for _ in prompts])
        micro_steps, _ = deal(groups, 1 << 20)
        pieces = [piece for step in micro_steps for piece in step[0]]
        # Any piece on any rank in any micro-step: far from what `deal` would do.
        steps = rng.randint(1, 4)
        layout = [[[] for _ in range(dist.size())] for _ in range(steps)]
        for piece in pieces:
            layout[rng.randrange(steps)][rng.randrange(dist.size())].append(piece)
        for step in layout:
            for own in step:
                own.sort(key=lambda piece: piece.starts[0])
        loss = 0.0
        for step in layout:
            for rank, own in enumerate(step):
                pack = build(own, 1176 if has_images(step) else 0)
                if rank == dist.rank():
                    lonely += len(pack.grid) > 0 and not len(pack.image_slots)
                    policy.backward(pack, tokens_of(pack), objective, 1.0)
                if own:
                    loss += float(whole.backward(build(own), tokens_of(build(own)), objective, 1.0)["loss"])
        for p, q in zip(policy.trained.values(), whole.trained.values(), strict=True):
            grad = torch.zeros_like(q) if p.grad is None else p.grad.full_tensor()
            gold = torch.zeros_like(q) if q.grad is None else q.grad
            worst = max(worst, float((grad - gold).abs().max() / gold.abs().max().clamp(min=1e-3)))
        policy.discard()
        whole.discard()
    return worst, lonely


def tokens_of(pack):
    weight = torch.full((pack.num_scored,), 0.1)
    advantage = torch.linspace(-1, 1, pack.num_scored) if pack.num_scored else weight
    return Tokens(advantage, weight, torch.zeros_like(pack.target), torch.zeros_like(weight))


def test_fifty_random_assignments_neither_deadlock_nor_change_the_gradient():
    found = run(3, random_assignments, 7, 50, timeout=240)
    assert max(worst for worst, _ in found) <= 1e-5
    assert all(lonely > 5 for _, lonely in found), found


def collectives(images, freeze):
    """How often each collective is called for one pack; by FSDP alone."""
    trainer = small_trainer(".", images=images, phase={"freeze": freeze})
    prompts = [trainer.processor.prepare(trainer.rows[3], False)]
    group = trainer.sampler.generate(prompts, SamplingParams(2, 5, banned_ids=BANNED), [(0,)])
    micro_steps, _ = deal(group, 1000, dist.size())
    pack = trainer.make_pack(micro_steps[0])
    with CommDebugMode() as comm:
        trainer.policy.backward(pack, tokens_of(pack), trainer.phase.objective, 1.0)
    return {str(op).rpartition(".")[2]: n for op, n in comm.get_comm_counts().items()}


def test_a_frozen_tower_that_no_row_uses_takes_no_part():
    # Two blocks, forward and backward; and the root.
    language = {"_allgather_base_": 2 * 2 + 1, "_reduce_scatter_base_": 2 + 1}
    assert run(2, collectives, False, ["vision"]) == [language] * 2
    # Its own unit and its one block, forward and backward.
    more = {"_allgather_base_": 2 * 2 + 1 + 2 * 2, "_reduce_scatter_base_": 2 + 1 + 2}
    assert run(2, collectives, True, []) == [more] * 2


def gathered_in_a_step(freeze):
    """Bytes that a step's hand-over gathers, and the model's."""
    trainer = small_trainer(".", phase={"freeze": freeze})
    gathered, gather = [], export.all_gather

    def counted(out, *args, **options):
        gathered.append(out.nbytes)
        return gather(out, *args, **options)

    export.all_gather = counted
    trainer.update_sampler()
    export.all_gather = gather
    sizes = {name: p.numel() * 4 for name, p in trainer.policy.model.named_parameters()}
    return sum(gathered), sum(sizes.values()), sum(size for name, size in sizes.items() if name.startswith("visual."))


def test_a_frozen_tower_is_not_handed_over_again():
    for gathered, whole, tower in run(2, gathered_in_a_step, ["vision"]):
        assert whole - tower <= gathered < whole - tower / 2  # rows are padded to even shards
    for gathered, whole, _ in run(2, gathered_in_a_step, []):
        assert gathered >= whole


def timeouts():
    """Seconds that the groups of an HSDP mesh wait."""
    mesh = dist.mesh("cpu", "host", 7.0)
    groups = [mesh.get_group(axis) for axis in ("replicate", "shard")]
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_the_groups_of_an_hsdp_mesh_wait_no_longer_than_the_recipe_says():
    assert run(2, timeouts, hosts=2) == [[7.0, 7.0]] * 2


def choosing(folder):
    """The rows of a phase, where the last rank's judge would have none of the first row."""
    cfg = small_recipe(phase={"data": f"{folder}/rows.jsonl"})

    class Judge:
        def check(self, rows):
            pass

        def gold_problems(self, rows):
            return ["" if dist.rank() == 0 or i > 0 else "wrong" for i in range(len(rows))]

    class Processor:
        def measure(self, row, captions):
            return len(row.problem), 0

    rows, _, sizes, hashes = setup.load_data(cfg, Processor(), Judge(), Display({}, quiet=True))
    assert hashes == {"train": setup.hash_rows(rows["train"])}
    return [[row.problem, *size] for row, size in zip(rows["train"], sizes["train"], strict=True)]


def test_all_ranks_train_on_the_rows_that_one_has_chosen(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"problem": "a", "answer": "1"}\n{"problem": "bb", "answer": "2"}\n')
    assert run(2, choosing, str(tmp_path)) == [[["a", 1, 0], ["bb", 2, 0]]] * 2


def sixteen_bits():
    """Relative distance of a bf16 gradient to the fp32 one: sharded, whole; and whether the head's was ever rounded."""
    trainer = small_trainer(".", images=True)
    prompts = [trainer.processor.prepare(trainer.rows[n], False) for n in (0, 1)]
    groups = trainer.sampler.generate(prompts, SamplingParams(4, 5, banned_ids=BANNED), [(0,), (1,)])
    micro_steps, _ = deal(groups, 1 << 20)
    pack, grads = build(micro_steps[0][0]), {}
    kinds = dict(gold=(torch.float32, False), whole=(torch.bfloat16, False), sharded=(torch.bfloat16, True))
    for name, (dtype, split) in kinds.items():
        model = small_model()
        if split:
            fsdp.shard(model, dist.mesh("cpu", "all", 60), dtype)
        policy = Policy(model, trainer.cfg.pack, trainer.cfg.optim, BANNED, dtype)
        policy.start_phase(trainer.phase)
        policy.backward(pack, tokens_of(pack), trainer.phase.objective, 1.0)
        parts = dist.size() if split else 1  # all ranks have learnt the same pack
        grads[name] = {n: (p.grad.full_tensor() if split else p.grad) / parts for n, p in policy.trained.items()}
    head = grads["sharded"]["model.embed_tokens.weight"]
    g = grads["gold"]
    far = [max(float((grads[kind][n] - g[n]).norm() / g[n].norm()) for n in g) for kind in ("sharded", "whole")]
    return *far, not torch.equal(head, head.bfloat16().float())


def test_sixteen_bit_gradients_are_as_good_sharded_as_whole():
    for sharded, whole, unrounded in run(2, sixteen_bits):
        assert 1e-4 < sharded <= 1.5 * whole and unrounded


def trouble(folder, kind):
    """What becomes of a step in which the last rank alone is told to stop, or fails; and whether anything changed."""
    last = dist.rank() == dist.size() - 1

    def rule(ids, row):
        if last and kind == "error":
            raise UserError("that row is wrong")
        return float(ids[0] % 2)

    watch = Bell(last and kind == "sampling")
    trainer = small_trainer(folder, rule, watch=watch)
    before = [tensor.clone() for _, tensor in published(trainer.policy.model)]
    if kind == "learning" and last:
        learn = trainer.policy.backward

        def told_while_learning(*args):
            watch.stopping = True
            return learn(*args)

        trainer.policy.backward = told_while_learning
    trainer.cfg.pack.tokens_per_micro_batch = 20
    try:
        trainer.step()
    except (Preempted, UserError) as end:
        same = all(torch.equal(a, b) for a, (_, b) in zip(before, published(trainer.policy.model), strict=True))
        clean = all(p.grad is None for p in trainer.policy.trained.values())
        return type(end).__name__, str(end), same and clean and trainer.progress.step == 0
    return None


@pytest.mark.parametrize(("kind", "end", "words"), [
    ("sampling", "Preempted", ""), ("learning", "Preempted", ""), ("error", "SharedError", "rank 1: that row is wrong"),
])
def test_what_stops_one_rank_stops_all_of_them_and_changes_nothing(tmp_path, kind, end, words):
    assert run(2, trouble, str(tmp_path), kind) == [[end, words, True]] * 2


def words_between_ranks():
    def fails(rank):
        def work():
            if dist.rank() == rank:
                raise UserError(f"of {rank}")
            return dist.rank()

        return work

    said = []
    for act in (lambda: dist.on_main(fails(0)), lambda: dist.on_main(fails(2)), lambda: dist.together(fails(1)),
                lambda: dist.together(fails(9))):
        try:
            said.append(act())
        except UserError as error:
            said.append(str(error))
    gathered = [text.decode() for text in dist.gather(b"x" * dist.rank())]
    shares = [list(range(10)[dist.my_slice(10, 3, part)]) for part in range(3)]
    return said, gathered, dist.any_of(dist.rank() == 2), dist.any_of(False), shares, dist.is_main()


def test_ranks_tell_each_other_what_they_have_and_what_is_wrong():
    for rank, (said, gathered, some, none, shares, main) in enumerate(run(3, words_between_ranks)):
        assert said == ["of 0", 0, "rank 1: of 1", rank]
        assert gathered == ["", "x", "xx"] and some and not none
        assert sum(shares, []) == list(range(10)) and {len(share) for share in shares} == {3, 4}
        assert main == (rank == 0)
