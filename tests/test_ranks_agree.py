"""What ranks have to agree on besides a step: phases one after another, meshes, rows, held-out accuracy, one launch."""

import json

import pytest
import torch
from ranks import run
from small import SmallJudge, SmallProcessor, small_model, small_policy, small_recipe, small_trainer
from torch import distributed as td

from nanolmmr1.data.rows import Row
from nanolmmr1.errors import UserError
from nanolmmr1.parallel import dist, fsdp
from nanolmmr1.report.display import Display
from nanolmmr1.rollout.local import LocalSampler
from nanolmmr1.run import setup
from nanolmmr1.run.evaluate import evaluate
from nanolmmr1.schema import Phase


def after_a_tower_without_pictures(folder):
    """How far the weights of the root move in a phase, after one of the tower alone whose packs had no picture."""
    trainer = small_trainer(folder, phase={"freeze": ["language"]})
    trainer.step()
    trainer.cfg.phases["next"] = Phase(data="rows", prompts_per_step=4, group_size=4, max_response_tokens=8, lr=1e-3,
                                       objective=trainer.phase.objective)  # fmt: skip
    trainer.display.phases["next"] = 1
    trainer.start_phase("next", trainer.rows)
    names = "model.embed_tokens.weight", "model.norm.weight"
    before = {name: trainer.policy.trained[name].detach().clone() for name in names}
    trainer.step()
    now = dict(trainer.policy.model.named_parameters())
    return [float((now[name] - before[name]).detach().full_tensor().abs().max()) for name in names]


@pytest.mark.parametrize("count", [1, 2])
def test_all_learns_after_a_phase_of_the_tower_alone_that_met_no_picture(count, tmp_path):
    found = run(count, after_a_tower_without_pictures, str(tmp_path))
    assert all(move > 1e-4 for moves in found for move in moves)


def meshes():
    """Ranks that this one's gradients are summed with over hosts, and that its shards lie on; and groups made."""
    mesh = dist.mesh("cpu", "host", 60)
    groups = [sorted(td.get_process_group_ranks(mesh.get_group(axis))) for axis in ("replicate", "shard")]
    before = len(td.distributed_c10d._world.pg_map)
    for _ in range(3):
        fsdp.shard(small_model(), dist.mesh("cpu", "host", 60), torch.float32)
    return *groups, len(td.distributed_c10d._world.pg_map) - before


def test_shards_lie_inside_a_host_and_models_share_the_groups():
    across, inside = [[0, 2], [1, 3]] * 2, [[0, 1]] * 2 + [[2, 3]] * 2
    assert run(4, meshes, hosts=2) == [[*both, 0] for both in zip(across, inside, strict=True)]


def sums_over_hosts(folder):
    """How often a step's gradients are summed over hosts, and in how many packs."""
    trainer = small_trainer(folder, images=True, over="host", pack={"tokens_per_micro_batch": 30},
                            phase={"prompts_per_step": 12, "updates_per_rollout": 2})  # fmt: skip
    across, all_reduce, calls = dist.mesh("cpu", "host", 60).get_group("replicate"), td.all_reduce, []

    def counted(tensor, *args, group=None, **options):
        if group is across:
            calls.append(tensor.dtype)
        return all_reduce(tensor, *args, group=group, **options)

    td.all_reduce = counted
    record = trainer.step()
    td.all_reduce = all_reduce
    return len(calls), len(fsdp.units(trainer.policy.model)), record["pack/micro_batches"]


def test_hosts_sum_their_gradients_once_an_update(tmp_path):
    """That the sums are right is test_ranks.py's to show."""
    for calls, units, packs in run(4, sums_over_hosts, str(tmp_path), hosts=2):
        assert calls == 2 * units and packs > 4


def accuracies():
    """On fewer rows than ranks, and on more; the odd ones are right."""
    sampler = LocalSampler(small_policy())
    rows = [Row(str(n), "") for n in range(10)]
    judge = SmallJudge(lambda ids, row: row % 2)
    return evaluate({"few": (rows[:2], False), "many": (rows[:10], False)}, sampler, SmallProcessor(), judge, 3,
                    Display({}, quiet=True))  # fmt: skip


def test_accuracy_is_of_all_ranks_rows():
    assert run(3, accuracies) == [{"few": 0.5, "many": 0.5}] * 3


def reading(folder):
    """What becomes of a run whose hosts have different files."""
    cfg = small_recipe(phase={"data": f"{folder}/{dist.rank()}.jsonl"})
    cfg.phases["train"].data = "rows"
    load = setup.load_rows
    setup.load_rows = lambda source, *options: load(f"{folder}/{dist.rank()}.jsonl", *options)
    try:
        setup.load_data(cfg, None, None, Display({}, quiet=True))
    except UserError as error:
        return str(error)


def test_hosts_with_different_rows_are_refused(tmp_path):
    for rank in range(2):
        (tmp_path / f"{rank}.jsonl").write_text(json.dumps({"problem": "1 + 1?", "answer": str(2 + rank)}) + "\n")
    told = ["rows: the hosts read different rows; give all hosts the same files"] * 2
    assert run(2, reading, str(tmp_path), hosts=2) == told


def test_more_processes_than_gpus_are_refused_by_all_before_any_waits(monkeypatch):
    """As rank 1 of a host, whose others are not there at all."""
    for key, value in dict(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2).items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes on this host, and each sees 1 GPUs: lower --nproc_per_node"):
        dist.start("cuda", 60)
