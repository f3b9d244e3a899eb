"""What the vLLM sampler asks of its engine, in which order, and what it makes of failures that only a GPU has.

The engine is a list of calls here; test_vllm.py has the real one, on a CPU.
"""

from types import SimpleNamespace

import pytest
import torch

from nanolmmr1.errors import Preempted, UserError
from nanolmmr1.rollout import vllm
from nanolmmr1.rollout.sampler import SamplingParams
from nanolmmr1.rollout.vllm import VllmSampler

FULL = RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:62")
PARAMS = SamplingParams(num_responses=2, max_tokens=3)


class Engine:
    """Notes what it is asked, and ends one response a step, in the order of their requests."""

    def __init__(self, fails=None):
        self.calls, self.fails, self.waiting, self.resets, self.logps = [], fails, [], True, [-1.0, -2.0]

    def note(self, *call):
        self.calls.append(" ".join(map(str, call)))
        if self.fails and self.calls[-1].startswith(self.fails):
            raise FULL

    def wake_up(self, tags):
        self.note("wake", *tags)

    def sleep(self, level):
        self.note("sleep", level)

    def collective_rpc(self, method, kwargs):
        self.note(method, *(name for name, _ in kwargs["weights_iterator"]))

    def apply_model(self, function):
        return [None]

    def reset_prefix_cache(self):
        self.note("forget")
        return self.resets

    def reset_mm_cache(self):
        pass

    reset_encoder_cache = reset_mm_cache

    def add_request(self, name, request, params):
        self.waiting.append(name)

    def abort_request(self, names):
        self.note("abort", len(names))

    def step(self):
        self.note("step")
        drawn = SimpleNamespace(token_ids=[1, 2], logprobs=SimpleNamespace(logprobs=self.logps), finish_reason="stop")
        return [SimpleNamespace(request_id=self.waiting.pop(0), outputs=[drawn], prompt_token_ids=[5])]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = torch.nn.ModuleDict({"merger": torch.nn.Linear(2, 2), "mlp": torch.nn.Linear(2, 2)})


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(vllm, "_params", lambda params, seed: seed)

    def made(fails=None, asleep=()):
        sampler = VllmSampler.__new__(VllmSampler)
        model = Model()
        sampler.policy = SimpleNamespace(model=model, dtype=torch.float32, device=torch.device("cpu"))
        sampler.cfg = SimpleNamespace(rollout=SimpleNamespace(timeout_s=60.0, sleep_level=2))
        sampler.engine, sampler.on_gpu, sampler.ranks_per_engine, sampler.calls = Engine(fails), True, 1, 0
        sampler.asleep, sampler.stats, sampler.dtype = set(asleep), {}, torch.float32
        sampler.unverified, sampler.verified = set(), []
        sampler._verify = sampler.verified.append
        sampler.tensors = {name for name, _ in model.named_parameters()}
        sampler._memory = lambda: (8 << 30, 80 << 30, 40 << 30, 30 << 30)
        sampler._request = lambda prompt, new_tokens: "request"
        return sampler

    return made


def prompt():
    return SimpleNamespace(row=SimpleNamespace(id="r"), ids=torch.tensor([5]), patches=torch.empty(0, 4))


def generate(sampler, prompts=1, **callbacks):
    return sampler.generate([prompt() for _ in range(prompts)], PARAMS, [(b,) for b in range(prompts)], **callbacks)


def reload_of(sampler):
    return " ".join(["reload_weights", *(name for name, _ in sampler.policy.model.named_parameters())])


def test_an_engine_sleeps_until_new_weights_come_and_has_its_cache_back_when_it_samples(make):
    sampler = make()
    generate(sampler)
    sampler.sleep()
    assert sampler.stats["left_asleep_mb"] == 32 * 1024
    sampler.update(sampler.policy.model.named_parameters())
    generate(sampler)
    generate(sampler)
    sampled = ["step", "step", "abort 0"]
    assert sampler.engine.calls == [*sampled, "forget", "sleep 2", "wake weights", reload_of(sampler), "forget",
                                    "wake kv_cache", *sampled, *sampled]  # fmt: skip


def test_an_engine_that_wakes_without_new_weights_is_given_the_policys(make):
    sampler = make()
    sampler.sleep()
    sampler.wake()
    assert sampler.engine.calls[-4:] == ["wake weights", reload_of(sampler), "forget", "wake kv_cache"]
    assert not sampler.asleep


@pytest.mark.parametrize("level", [1, 2])
def test_all_is_read_back_at_the_start_and_once_after_waking(make, level):
    """What sleep took may come back otherwise, and nothing would say so."""
    sampler, weights = make(), []
    sampler.unverified, sampler.cfg.rollout.sleep_level = {"start", "wake"}, level
    verified = []
    for _ in range(3):
        sampler.update(sampler.policy.model.named_parameters())
        verified.append(len(sampler.verified))
        sampler.sleep()
        assert sampler.engine.calls[-1] == f"sleep {level}"
        sampler.wake()
        verified.append(len(sampler.verified))
    assert verified == [1, 2, 2, 2, 2, 2] and not weights


def test_a_read_back_that_fails_is_made_again(make):
    sampler = make()
    sampler.unverified, sampler._verify = {"start"}, lambda _: 1 / 0
    for _ in range(2):
        with pytest.raises(UserError, match="ZeroDivisionError"):
            sampler.update(sampler.policy.model.named_parameters())


def test_prefixes_of_old_weights_are_not_kept_in_silence(make):
    sampler = make()
    sampler.engine.resets = False
    for work in (sampler.sleep, lambda: sampler.update(sampler.policy.model.named_parameters())):
        with pytest.raises(UserError, match="vLLM keeps prefixes that it computed with old weights"):
            work()


@pytest.mark.parametrize("logp", [float("nan"), float("inf"), float("-inf"), 0.5])
def test_a_log_prob_that_is_none_is_refused(make, logp):
    sampler = make()
    sampler.engine.logps = [-1.0, logp]
    with pytest.raises(UserError, match=f"row r: vLLM gave a log-prob that is not a number up to 0 .{logp:.3g}."):
        generate(sampler)


@pytest.mark.parametrize(
    "fails, asleep, work",
    [
        ("wake kv_cache", {"kv_cache"}, "waking up"),
        ("wake weights", {"weights", "kv_cache"}, "taking new weights"),
        ("reload_weights", (), "taking new weights"),
        ("step", (), "sampling"),
        ("sleep", (), "going to sleep"),
    ],
)
def test_a_full_gpu_is_told_with_who_holds_it(make, fails, asleep, work):
    sampler = make(fails, asleep)
    weights = iter(list(sampler.policy.model.named_parameters()))
    with pytest.raises(UserError) as told:
        {"sampling": lambda: generate(sampler), "going to sleep": sampler.sleep, "waking up": sampler.wake}.get(
            work, lambda: sampler.update(weights)
        )()
    assert str(told.value).startswith(f"vLLM failed while {work}: RuntimeError: CUDA Error: out of memory")
    assert "8.0 of 80.0 GB are free; the trainer holds 40.0, the engine's pool 30.0" in str(told.value)
    if work == "taking new weights":
        assert list(weights) == []  # other ranks have walked through them too


def test_what_is_wrong_with_an_engine_argument_is_told(make):
    class Invalid(ValueError):
        def errors(self):
            return [{"msg": "max_model_len is too large"}, {"msg": "dtype is unknown"}]

    with pytest.raises(UserError, match="starting: max_model_len is too large; dtype is unknown"):
        with make()._wrap_errors("starting"):
            raise Invalid("2 validation errors")


@pytest.mark.parametrize("who", ["this rank", "another"])
def test_the_ranks_of_one_engine_stop_before_the_same_step(make, who):
    """SIGTERM comes amid the third of six steps, in which no group becomes whole."""
    sampler, flags = make(), []

    def any_rank(flag):  # asked of the deadline, then of the stop, before every step
        flags.append(flag)
        return flag or who == "another" and len(flags) == 8

    def should_stop():
        return who == "this rank" and len(sampler.engine.calls) >= 3

    sampler._any_rank = any_rank
    with pytest.raises(Preempted):
        generate(sampler, prompts=3, should_stop=should_stop)
    assert sampler.engine.calls == ["step", "step", "step", "abort 3"]
    assert flags == 7 * [False] + [who == "this rank"]  # both were asked of the step that was not made
