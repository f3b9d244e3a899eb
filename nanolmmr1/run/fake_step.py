"""The step of one rank on fake tensors: its allocations, measured without memory, weights or a GPU.

The real `Policy` runs under torch's FakeTensorMode, where operators compute shapes only, and `Live` counts the storages
that exist at once. Other ranks are a process group of torch's "fake" backend. A GPU is a fake CPU tensor whose
`is_cuda` is true, so that the Triton path runs; its kernels are not launched. Memory wasted by an allocator, and memory
of CUDA and cuBLAS themselves, is not counted.

Next: ../config.py, recipes.
"""

import contextlib
import copy
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as td
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from nanolmmr1 import schema
from nanolmmr1.kernels import _head, _triton, linear_logprob, linear_loss, mrope
from nanolmmr1.kernels.attention import Spans
from nanolmmr1.model import qwen
from nanolmmr1.parallel import dist, export, fsdp
from nanolmmr1.update.objective import Tokens
from nanolmmr1.update.pack import Pack
from nanolmmr1.update.policy import Policy, compute_dtype

Sizes = Mapping[str, float]  # label -> bytes
OFFLOADED = frozenset({"weights", "gradients", "optimizer"})  # labels of memory that dist.offload moves to the host
CACHES = (qwen._layout, mrope._freq, _head.banned_ids)  # would keep fake tensors for real runs, or real ones for fakes


class Machine(NamedTuple):
    """Where a run would run."""

    device: str  # "cpu" or "cuda"
    ranks: int
    shards: int  # ranks that share one copy of the model
    capacity: float  # bytes of a rank; 0: unknown
    name: str


class _Storage:
    """One live storage."""

    __slots__ = "label", "ref", "size"

    def __init__(self, ref: weakref.ref, label: str) -> None:
        self.ref, self.label, self.size = ref, label, 0


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operators have created and that still exist.

    Fake tensors have no values. Where the host reads one (is the norm finite? are the targets valid?), it gets 1.

    Attributes:
        label: of storages that are created from now on. now: bytes per label.
        total: bytes on the device. peak: the largest total since `restart`. at_peak: bytes per label at that moment.
    """

    def __init__(self, offloaded: Iterable[str] = ()) -> None:
        super().__init__()
        self.offloaded, self.label = frozenset(offloaded), "work"
        self.storages: dict[int, _Storage] = {}
        self.now: Counter[str] = Counter()
        self.restart()

    def restart(self) -> None:
        self.total = self.peak = sum(size for label, size in self.now.items() if label not in self.offloaded)
        self.at_peak = dict(self.now)

    def __enter__(self) -> "Live":
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            if storage._cdata in self.storages:
                self.set(self.storages[storage._cdata], size=size)

        self.patch = mock.patch.object(torch.UntypedStorage, "resize_", resize_and_count)  # FSDP frees and grows by it
        self.patch.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # operators on its local tensor follow
        if args and isinstance(args[0], FakeTensor):
            if func is torch.ops.prim.device.default and not args[0].fake_mode.in_kernel_invocation:
                return args[0].fake_device  # half of all calls
            if func is torch.ops.aten._local_scalar_dense.default:
                return 1.0 if args[0].is_floating_point() else args[0].dtype == torch.bool or 1
            if func is torch.ops.aten.bincount.default:
                return torch.zeros(1, dtype=torch.int64)
        out = func(*args, **(kwargs or {}))
        for tensor in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":  # on meta, DTensor infers shapes
                self.see(tensor)
        if func.namespace == "fsdp":
            for tensor in tree_leaves((args, kwargs, out)):
                self.relabel(tensor, "gathered")
        return out

    def see(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage from now on."""
        storage = tensor.untyped_storage()
        entry = self.storages.get(key := storage._cdata)
        if entry is None:
            entry = _Storage(weakref.ref(storage, lambda _: self.set(self.storages.pop(key), size=0)), self.label)
            self.storages[key] = entry
        self.set(entry, size=storage.nbytes())

    def relabel(self, tensor: Any, label: str) -> None:
        """Set the label of a counted tensor; of a DTensor, that of its shard."""
        if isinstance(tensor, torch.Tensor) and (entry := self.storages.get(_local(tensor).untyped_storage()._cdata)):
            if entry.label not in OFFLOADED:
                self.set(entry, label=label)

    def set(self, entry: _Storage, label: str | None = None, size: int | None = None) -> None:
        old_label, old_size = entry.label, entry.size
        entry.label, entry.size = label or old_label, old_size if size is None else size
        if (entry.label, entry.size) == (old_label, old_size):
            return
        self.now[old_label] -= old_size
        self.now[entry.label] += entry.size
        self.total += entry.size * (entry.label not in self.offloaded) - old_size * (old_label not in self.offloaded)
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.now)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class FakeStep:
    """The stages of a step, run on fakes. Each method returns bytes per label at the stage's peak.

    Labels: weights, gradients, optimizer; gathered (FSDP's buffers); activations (of the language model), vision, head:
    created by their forward passes; work: everything else, mostly the backward pass.
    """

    def __init__(self, policy: Policy, phase: schema.Phase, where: Machine, live: Live) -> None:
        self.policy, self.phase, self.where, self.live = policy, phase, where, live
        policy.start_phase(phase)
        live.label = "optimizer"
        policy.optimizer_tensors()
        for parameter in policy.trained.values():
            parameter.register_post_accumulate_grad_hook(lambda p: live.relabel(p.grad, "gradients"))
        model = policy.model
        for module, before, after in (
            (model, "activations", "work"), (model.visual, "vision", "activations"), (model.model.norm, None, "head")
        ):  # fmt: skip
            if before:
                module.register_forward_pre_hook(self._set_label(before), prepend=True)
            module.register_forward_hook(self._set_label(after))
        live.label = "work"
        self.gradient_bytes = sum(_local(p).nbytes for p in policy.trained.values())

    def _set_label(self, label: str) -> Any:
        def hook(*_: Any) -> None:
            self.live.label = label

        return hook

    def _fake(self, pack: Pack) -> Pack:
        """A pack of the same sizes, where the model computes. Its grid is read by the host and stays real."""
        fakes: dict[str, Any] = {"spans": Spans(pack.spans.rows, pack.num_tokens)}  # real ones cache real tensors
        for name, value in vars(pack).items():
            if isinstance(value, torch.Tensor) and name != "grid":
                self.live.label = "vision" if name == "patches" else "work"
                fakes[name] = torch.empty(value.shape, dtype=value.dtype)
        self.live.label = "work"
        return replace(pack, **fakes)

    def logprobs(self, pack: Pack) -> Sizes:
        """The forward pass that scores tokens, under the policy or its reference."""
        pack = self._fake(pack)
        self.live.restart()
        self.policy.logprobs(pack, self.phase.temperature)
        return dict(self.live.at_peak)

    def update(self, pack: Pack, several: bool) -> Sizes:
        """Forward and backward pass of a micro-batch; several: of the second one, which meets the first one's gradient.
        """
        policy, objective, n = self.policy, self.phase.objective, pack.num_scored
        scalars = [torch.empty(n) for _ in range(5)]
        response = torch.empty(n, dtype=torch.int64)
        old = scalars[3] if self.phase.updates_per_rollout > 1 else None
        ref = scalars[4] if objective.kl_coef else None
        tokens = Tokens(scalars[0], scalars[1], response, scalars[2], old, ref)
        last = not several or self.where.shards == self.where.ranks
        if not several:
            policy.discard()
        elif last:
            self._fill_gradients()
        else:  # over hosts, gradients wait where FSDP keeps them
            policy.backward(self._fake(pack), tokens, objective, self.phase.temperature, (False, False))
        pack = self._fake(pack)
        self.live.restart()
        policy.backward(pack, tokens, objective, self.phase.temperature, (last, last))
        return dict(self.live.at_peak)

    def optimizer_step(self) -> Sizes:
        """Clipping and update of an optimizer that has its state."""
        self._fill_gradients()
        self.live.restart()
        if not fsdp.units(self.policy.model):  # DTensor is slow to infer 800 shards; norm and update need little memory
            self.policy.optimizer_step(0.0, 0.0)
        self.policy.discard()
        return dict(self.live.at_peak)

    def send_weights(self, dtype: torch.dtype | None) -> Sizes:
        """Gathering the weights for a sampler, bucket after bucket."""
        self.live.label = "gathered"
        self.live.restart()
        with mock.patch.object(dist, "together", lambda work: work()):
            for _ in export.published(self.policy.model, dtype):
                pass
        self.live.label = "work"
        return dict(self.live.at_peak)

    def _fill_gradients(self) -> None:
        self.live.label = "gradients"
        for parameter in self.policy.trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.live.label = "work"


@contextlib.contextmanager
def fake_step(
    cfg: schema.Recipe, phase: schema.Phase, model_cfg: qwen.ModelConfig, where: Machine
) -> Iterator[FakeStep]:
    """The step of a phase on one rank of a machine; inside, all tensors are fake."""
    gpu, cfg = where.device == "cuda", copy.deepcopy(cfg)
    if gpu:
        cfg.pack.attention = cfg.pack.head = "triton"
    dtype = compute_dtype(cfg.dtype, where.device)
    with torch.device("meta"):
        model = qwen.Qwen25VL(model_cfg).to(getattr(torch, cfg.optim.weights))
    live = Live(OFFLOADED if cfg.dist.offload else ())
    with contextlib.ExitStack() as stack:
        if where.ranks > 1 or cfg.dist.offload or cfg.dist.offload_reference:
            td.init_process_group("fake", rank=0, world_size=where.ranks, store=FakeStore())
            stack.callback(td.destroy_process_group)
            shape = (where.ranks,) if where.shards == where.ranks else (where.ranks // where.shards, where.shards)
            names = ("replicate", "shard")[-len(shape) :]
            fsdp.shard(model, init_device_mesh("cpu", shape, mesh_dim_names=names), dtype)
        for cached in CACHES:
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        for module in (linear_loss, linear_logprob):  # later chunks repeat the first two
            stack.enter_context(mock.patch.object(module, "chunks", lambda *args: _head.chunks(*args)[:2]))
        for module in (linear_loss, _head):
            stack.enter_context(mock.patch.object(module, "blocks", lambda z, all=_head.blocks: islice(all(z), 1)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if gpu:
            stack.enter_context(_as_gpu())
        stack.enter_context(live)
        live.label = "weights"
        model.to_empty(device="cpu")
        yield FakeStep(Policy(model, cfg.pack, cfg.optim, (), dtype, offload=cfg.dist.offload), phase, where, live)


@contextlib.contextmanager
def _as_gpu() -> Iterator[None]:
    """Fake CPU tensors pass for CUDA ones, and Triton kernels are not launched. Tiles and work lists are an H100's."""
    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.multiple(FakeTensor, is_cuda=True, data_ptr=lambda self: 0, create=True),
            mock.patch.multiple(_triton, arch=lambda device: 90, num_sms=lambda device: 132),
            mock.patch.dict(_head.CHUNK_BYTES, cpu=_head.CHUNK_BYTES["cuda"]),
            mock.patch.dict(_head.BLOCK_ELEMENTS, cpu=_head.BLOCK_ELEMENTS["cuda"]),
            mock.patch.object(JITFunction, "run", lambda *args, **kwargs: None),
            mock.patch.object(InterpretedFunction, "run", lambda *args, **kwargs: None),
        ):
            stack.enter_context(patch)
        yield
