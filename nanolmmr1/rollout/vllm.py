"""vLLM sampler: an engine inside the trainer's process, on the trainer's device. The fast engine on a GPU.

A prompt reaches the engine as the token ids, patches and grid that the trainer computes with, so the engine's tokenizer
and image processor are never used and cannot disagree with ours. The engine starts with random weights. `update`
streams the policy's weights into it, and the first update reads all engine tensors back and compares them.

On a GPU the engine sleeps between sampling and the next update: its weights and cache are dropped, or with
rollout.sleep_level=1 the weights are offloaded to the host. In other trainers vLLM has silently failed to restore
freed tensors. So the first update after the first sleep reads everything back once more, and every step compares
log-probs (rollout.max_mismatch). Written for vLLM 0.32.

Next: vllm_input.py, its inputs.
"""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from nanolmmr1.data.group import Group, Response
from nanolmmr1.data.prompt import Prompt
from nanolmmr1.errors import Preempted, UserError
from nanolmmr1.parallel.export import published
from nanolmmr1.rollout.sampler import SamplingParams, Seed, ignore_progress, never_stop
from nanolmmr1.rollout.vllm_input import (
    batch_tokens,
    check_logps,
    fp32_head,
    images_of,
    longest_sequence,
    sampling_fields,
)
from nanolmmr1.rollout.vllm_tensors import EMBED, FUSED, HEAD, column, digests, engine_tensor, read, repack_tied_head
from nanolmmr1.schema import Recipe
from nanolmmr1.update.policy import Policy

TESTED = "0.32"
CPU_CACHE_BYTES = 4 << 30  # maximum size of the KV cache on a CPU
# Loggers of vLLM's weight loading; their warnings are shown.
WEIGHT_LOGGERS = "vllm.model_executor.model_loader", "vllm.model_executor.models.utils"


class VllmSampler:
    """A `Sampler` with one vLLM engine, or with one per tensor-parallel group of ranks.

    Args:
        policy: the policy under training.
        cfg: the recipe.
        folder: of the model; the engine reads its config and tokenizer, not its weights.

    Raises:
        UserError: vLLM is missing, untested or cannot start; or its tensors are not the policy's.
    """

    keeps_unchanged = False
    ranks_per_engine: int
    dtype: torch.dtype
    stats: dict[str, float]
    engine: Any  # vllm.LLMEngine
    calls: int  # of `generate`; makes request ids unique
    asleep: set[str]  # memory freed by sleep and not yet allocated again: "weights", "kv_cache"
    unverified: set[str]  # "start", "wake": after which the engine's tensors have not been read back yet
    max_len: int  # most tokens of a prompt and its response
    merge: int  # patches along one side of an image token
    tensors: set[str]  # names of the engine's parameters
    buffers: dict[str, int]  # name -> checksum; rotary tables, which no update sends

    def __init__(self, policy: Policy, cfg: Recipe, folder: str | Path) -> None:
        vllm = _import(cfg.rollout.untested_vllm)
        self.policy, self.cfg, self.on_gpu = policy, cfg, policy.device.type == "cuda"
        self.ranks_per_engine, self.dtype = cfg.rollout.tensor_parallel, policy.dtype
        self.asleep, self.stats, self.calls = set(), {}, 0
        self.unverified = {"start", "wake"}
        self.max_len = cfg.rollout.max_model_len or longest_sequence(cfg)
        args, set_num_threads = self._engine_args(folder), torch.set_num_threads
        try:
            with self._wrap_errors("starting"):
                # Like vLLM's offline class: defaults for throughput rather than latency.
                context = vllm.usage.usage_lib.UsageContext.LLM_CLASS
                self.engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**args), context)
        finally:
            torch.set_num_threads = set_num_threads  # on a CPU vLLM replaces it by a function that does nothing
        for logger in map(logging.getLogger, WEIGHT_LOGGERS):  # not earlier: the starting engine removes handlers
            logger.handlers = [logging.StreamHandler()]
            logger.setLevel(logging.WARNING)
        self.merge = self.engine.model_config.hf_config.vision_config.spatial_merge_size
        self.tensors = self.engine.apply_model(lambda model: {name for name, _ in model.named_parameters()})[0]
        self.buffers = self.engine.apply_model(digests)[0]
        self.update(published(policy.model, self.dtype))

    def _engine_args(self, folder: str | Path) -> dict[str, Any]:
        """Arguments of vllm.EngineArgs.

        Raises:
            UserError: the ranks cannot be divided into engines.
        """
        rollout, prompt, model = self.cfg.rollout, self.cfg.prompt, self.policy.model.cfg
        world = int(os.environ.get("WORLD_SIZE", 1))
        if world % rollout.tensor_parallel:
            raise UserError(f"rollout.tensor_parallel={rollout.tensor_parallel} does not divide the {world} processes")
        args: dict[str, Any] = dict(
            model=str(folder),
            load_format="dummy",
            dtype=str(self.policy.dtype).removeprefix("torch."),
            seed=self.cfg.seed,
            max_model_len=self.max_len,
            max_num_seqs=rollout.max_sequences,
            logprobs_mode="processed_logprobs",  # after temperature and bans, so of the distribution sampled from
            hf_overrides=fp32_head(self.policy),
            generation_config="vllm",  # the model's would change temperature and penalties
            enable_prefix_caching=True,  # a group's prompt is computed once
            mm_processor_cache_gb=0,  # the engine's image processor is not used
            mm_device_do_normalize=False,  # patches are normalised already; the default would do it again, silently
            mm_processor_kwargs=dict(min_pixels=prompt.min_pixels, max_pixels=prompt.max_pixels),  # size of buffers
            limit_mm_per_prompt={"video": 0},
            enforce_eager=rollout.enforce_eager or not self.on_gpu,
            tensor_parallel_size=rollout.tensor_parallel,
            disable_log_stats=True,
        )
        if world > 1:
            args["distributed_executor_backend"] = "external_launcher"
        if self.on_gpu:
            # The pool that sleeps cannot use expandable segments; vLLM 0.32 disables them while it allocates the pool.
            args |= dict(gpu_memory_utilization=rollout.gpu_memory_utilization, enable_sleep_mode=True)
        else:
            # No chunked prefill: a prompt split over two steps rewinds its seeded generator, and 0.32 cannot on a CPU.
            most = batch_tokens(self.max_len, rollout.max_sequences)
            args |= dict(enable_chunked_prefill=False, max_num_batched_tokens=most)
            token_bytes = 2 * model.num_key_value_heads * model.head_dim * self.policy.dtype.itemsize  # of one layer
            tokens = rollout.max_sequences * (self.max_len + 256)  # a sequence's last block is partly empty
            args["kv_cache_memory_bytes"] = min(tokens * model.num_hidden_layers * token_bytes, CPU_CACHE_BYTES)
        if rollout.kv_cache_gb:
            args["kv_cache_memory_bytes"] = int(rollout.kv_cache_gb * 2**30)
        return args

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seeds: Sequence[Seed],
        *,
        on_progress: Callable[[int], None] = ignore_progress,
        should_stop: Callable[[], bool] = never_stop,
    ) -> list[Group]:
        """Sample one group per prompt; see Sampler. A seed draws other tokens here than in LocalSampler.

        Raises:
            Preempted: should_stop() returned True on a rank of this engine, before an engine step.
            UserError: a prompt does not fit the engine, or the engine failed or exceeded rollout.timeout_s.
        """
        self.wake()
        requests = [self._request(prompt, params.max_tokens) for prompt in prompts]
        G, timeout, began = params.num_responses, self.cfg.rollout.timeout_s, time.monotonic()
        self.calls += 1
        waiting: dict[str, tuple[int, int]] = {}  # request id -> prompt b, response g
        done: dict[tuple[int, int], Response] = {}
        try:
            with self._wrap_errors("sampling"):
                for b, (request, seed) in enumerate(zip(requests, seeds, strict=True)):
                    for g in range(G):
                        waiting[f"{self.calls}-{b}-{g}"] = b, g
                        self.engine.add_request(f"{self.calls}-{b}-{g}", request, _params(params, (*seed, g)))
                while waiting:
                    if self._any_rank(time.monotonic() - began > timeout):
                        raise UserError(f"vLLM had {len(waiting)} responses unfinished after rollout.timeout_s="
                                        f"{timeout:g} seconds: raise it, or lower max_response_tokens")  # fmt: skip
                    if self._any_rank(should_stop()):
                        raise Preempted
                    for output in self.engine.step():
                        b, g = waiting.pop(output.request_id)
                        done[b, g] = _response(output, prompts[b])
                        if all((b, other) in done for other in range(G)):
                            on_progress(1)
        finally:
            self.engine.abort_request(list(waiting))
        return [Group(prompt, [done[b, g] for g in range(G)]) for b, prompt in enumerate(prompts)]

    @contextlib.contextmanager
    def _wrap_errors(self, work: str) -> Iterator[None]:
        """Turn any error of the engine into a UserError, so that the run ends with a checkpoint and a reason."""
        try:
            yield
        except (UserError, Preempted):
            raise
        except Exception as error:
            raise UserError(f"vLLM failed while {work}: {_reason(error)}{self._memory_hint()}") from error

    def _any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on some rank of this engine: all ranks must leave before the same engine step."""
        if self.ranks_per_engine == 1:
            return flag
        from vllm.distributed.parallel_state import get_tp_group

        flags = torch.tensor(int(flag))
        torch.distributed.all_reduce(flags, group=get_tp_group().cpu_group)
        return bool(flags)

    def _request(self, prompt: Prompt, new_tokens: int) -> Any:
        """The engine's internal form of a prompt: the output of vLLM's processor, built from the trainer's tensors."""
        from vllm.inputs.engine import mm_input, tokens_input
        from vllm.multimodal import inputs as mm

        ids = prompt.ids.tolist()
        if len(ids) + new_tokens > self.max_len:
            raise UserError(f"row {prompt.row.id}: {len(ids)} prompt tokens and {new_tokens} new ones exceed the "
                            f"engine's {self.max_len}: raise rollout.max_model_len, or 0 to derive it from the "
                            "phases")  # fmt: skip
        images = images_of(prompt, self.merge)
        if not images:
            return tokens_input(ids)
        items, hashes, places = [], [], []
        for grid, pixels, first, length in images:
            items.append(mm.MultiModalKwargsItem(
                pixel_values=mm.MultiModalFieldElem(pixels, mm.MultiModalFlatField(slices=[slice(0, len(pixels))])),
                image_grid_thw=mm.MultiModalFieldElem(grid, mm.MultiModalBatchedField(keep_on_cpu=True)),
            ))  # fmt: skip
            # Key of cached image features and prefixes: equal for the same grid and pixels.
            digest = hashlib.blake2b(pixels.contiguous().numpy().data, digest_size=16, salt=grid.numpy().tobytes()[:16])
            hashes.append(digest.hexdigest())
            places.append(mm.PlaceholderRange(offset=first, length=length))
        return mm_input(ids, mm.MultiModalKwargsItems({"image": items}), {"image": hashes}, {"image": places})

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, torch.Tensor]], verify: bool = False) -> None:
        """Stream new weights into the engine, in place, and clear caches computed with the old ones; see Sampler.

        Args:
            weights: consumed to its end even after an error; no more than one layer is held.
            verify: read the engine's tensors back and compare them. Always done by the first update, and by the one
                after the first sleep.

        Raises:
            UserError: a tensor is missing, comes twice, is not in the engine or differs when read back; or the engine
                failed.
        """
        moment = "wake" if self.asleep else "start"
        began, verify, weights = time.perf_counter(), verify or moment in self.unverified, iter(weights)
        try:
            with self._wrap_errors("taking new weights"):
                self._load(weights, verify)
        finally:
            for _ in weights:
                pass
        self.unverified.discard(moment)
        self.stats["handover_s"] = time.perf_counter() - began

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]], verify: bool) -> None:
        if "weights" in self.asleep:
            self.engine.wake_up(["weights"])
            self.asleep = {"kv_cache"}
        received: dict[str, dict[int, torch.Tensor]] = {}  # engine's tensor -> {index: expected column, or nothing}

        def recorded() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                target, index = engine_tensor(name)
                columns = received.setdefault(target, {})
                if index in columns or target not in self.tensors:
                    raise UserError(f"{name} {'came twice' if index in columns else 'has no place in the engine'}: is "
                                    "the recipe's model the one that is trained?")  # fmt: skip
                expected = column(target, tensor) if verify else tensor.new_empty(0)
                columns[index] = expected.to(self.policy.dtype, copy=True)
                yield name, tensor

        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": recorded()})
        partial = {t for t, columns in received.items() if len(columns) != len(FUSED.get(t.split(".")[-2], "1"))}
        if missing := sorted(partial | (self.tensors - received.keys())):
            raise UserError(f"{len(missing)} of the engine's {len(self.tensors)} tensors were not handed over, or in "
                            f"part, {missing[0]} first: is the recipe's model the one that is trained?")  # fmt: skip
        self.engine.apply_model(repack_tied_head)
        if verify:
            self._verify({t: torch.cat([columns[i] for i in sorted(columns)]) for t, columns in received.items()})
        self._reset_caches()

    def _verify(self, expected: dict[str, torch.Tensor]) -> None:
        """Compare a column of every engine tensor with the trainer's, bit by bit.

        Of an engine that is spread over several GPUs, only the replicated tensors can be compared: the vectors.

        Raises:
            UserError: a tensor or a buffer differs.
        """
        spread = self.cfg.rollout.tensor_parallel > 1

        def differing(model: nn.Module) -> list[str]:
            if HEAD not in expected:
                expected[HEAD] = column(HEAD, model.get_parameter(EMBED))  # tied
            names = []
            for target, values in expected.items():
                if spread and model.get_parameter(target).shape != values.shape:
                    continue
                if not torch.equal(read(model, target)[: len(values)], values):  # the vocabulary may be padded
                    names.append(target)
            return names

        if wrong := self.engine.apply_model(differing)[0]:
            raise UserError(f"after the hand-over {len(wrong)} of the engine's {len(expected)} tensors are not the "
                            f"trainer's, {wrong[0]} first")  # fmt: skip
        checksums = self.engine.apply_model(digests)[0]
        if wrong := [name for name, digest in self.buffers.items() if checksums.get(name) != digest]:
            raise UserError(f"{len(wrong)} of the engine's {len(self.buffers)} buffers are not as they were made, "
                            f"{wrong[0]} first: rollout.sleep_level=1 may keep them")  # fmt: skip

    def wake(self) -> None:
        """Allocate the engine's memory again: weights, then cache. Sends the weights if no update has since `sleep`."""
        if "weights" in self.asleep:
            self.update(published(self.policy.model, self.dtype))
        if self.asleep:
            with self._wrap_errors("waking up"):
                self.engine.wake_up(["kv_cache"])
            self.asleep = set()

    def sleep(self) -> None:
        """Clear the caches and, on a GPU, free the engine's memory for training."""
        self._reset_caches()
        if self.on_gpu:
            with self._wrap_errors("going to sleep"):
                self.engine.sleep(level=self.cfg.rollout.sleep_level)
            self.asleep = {"weights", "kv_cache"}
            free, total, trainer, _ = self._memory()
            self.stats["left_asleep_mb"] = (total - free - trainer) / 2**20  # contexts, graphs, other processes

    @property
    def pool_bytes(self) -> int:
        """GPU memory reserved by the engine's pool."""
        return self._memory()[3] if self.on_gpu else 0

    def close(self) -> None:
        """Shut the engine down. vLLM 0.32 then also destroys the process group, even one that it did not create."""
        self.engine.engine_core.shutdown()

    def _reset_caches(self) -> None:
        """Evict prefixes and image features of old weights; cached features would also grow with every image.

        Raises:
            UserError: vLLM did not evict the prefixes.
        """
        if not self.engine.reset_prefix_cache():
            raise UserError("vLLM keeps prefixes that it computed with old weights: its cache could not be reset")
        self.engine.reset_mm_cache()
        self.engine.reset_encoder_cache()

    def _memory(self) -> tuple[int, int, int, int]:
        """Bytes of the GPU: free, total, held by the trainer, and reserved by the engine's pool, asleep or not."""
        from vllm.device_allocator import get_mem_allocator_instance

        pool = get_mem_allocator_instance().get_current_usage()
        return *torch.cuda.mem_get_info(self.policy.device), torch.cuda.memory_reserved() - pool, pool

    def _memory_hint(self) -> str:
        """End of an error message on a GPU: its free memory, and settings that need less."""
        if not self.on_gpu:
            return ""
        free, total, trainer, pool = (f"{size / 2**30:.1f}" for size in self._memory())
        return (f" ({free} of {total} GB are free; the trainer holds {trainer}, the engine's pool {pool}; if that "
                "is why, lower rollout.gpu_memory_utilization, rollout.max_sequences or "
                "pack.tokens_per_micro_batch)")  # fmt: skip


def _params(params: SamplingParams, seed: Seed) -> Any:
    """vLLM's sampling parameters of one response."""
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind

    return VllmParams(
        **sampling_fields(params),
        logit_bias={token: float("-inf") for token in params.banned_ids} or None,
        seed=int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1)),
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _response(output: Any, prompt: Prompt) -> Response:
    """The response in a finished vllm.RequestOutput.

    Raises:
        UserError: the engine read another number of prompt tokens, ended otherwise than by a stop token or the length
            limit, or gave a log-prob that is none.
    """
    (drawn,), num_read = output.outputs, len(output.prompt_token_ids)
    if num_read != len(prompt.ids) or drawn.finish_reason not in ("stop", "length"):
        raise UserError(f"row {prompt.row.id}: vLLM read {num_read} of {len(prompt.ids)} prompt tokens and finished by "
                        f"{drawn.finish_reason!r}")  # fmt: skip
    ids, logp = torch.tensor(drawn.token_ids, dtype=torch.int64), torch.tensor(drawn.logprobs.logprobs)
    check_logps(f"row {prompt.row.id}: vLLM", drawn.logprobs.logprobs)
    return Response(ids, logp, drawn.finish_reason)


def _import(untested: bool) -> ModuleType:
    """The vllm package, set up for an engine in this process.

    Raises:
        UserError: it is missing, cannot be imported, or has an untested version and `untested` is False.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")  # an error would print every request; our message has it
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # else vLLM leaves the trainer one thread
    try:
        import vllm
        from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Model
    except (ImportError, RuntimeError) as error:
        if getattr(error, "name", "") == "vllm":
            raise UserError("rollout.engine=vllm needs vLLM: pip install 'nanolmmr1[vllm]'") from error
        raise UserError(f"vLLM is installed but cannot be imported: {_reason(error)}") from error
    if not (untested or vllm.__version__.startswith(f"{TESTED}.")):
        raise UserError(f"vLLM {vllm.__version__} is installed, but only {TESTED} is tested: pip install "
                        "'nanolmmr1[vllm]', or try this one with rollout.untested_vllm=true")  # fmt: skip
    vllm.ModelRegistry.register_model(Model.__name__, Model)  # else vLLM starts a child process to inspect it
    return vllm


def _reason(error: Exception) -> str:
    """One line for an error. The text of a pydantic error would begin with their number."""
    if hasattr(error, "errors"):
        return "; ".join(each["msg"] for each in error.errors())
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0] or 'no message'}"
