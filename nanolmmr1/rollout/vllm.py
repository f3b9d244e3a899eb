"""The fast sampler: a vLLM engine inside the trainer's process, on the trainer's own device.

Nothing is prepared twice. A prompt reaches the engine as the token ids, patches and grid that the trainer computes
with, so neither tokenizer nor image processor of the engine can disagree with ours. The engine starts with random
weights; what it samples from is what `update` streamed into it, tensor by tensor, and the first time all of its
tensors are read back and compared.

On a GPU the engine sleeps between a rollout and the hand-over that follows: its weights and cache are dropped, or with
rollout.sleep_level=1 the weights are copied to the host. What sleep takes, vLLM must give back, and in other trainers
it has failed to without a word: so after the first wake all is read back once more, and every step compares log-probs
(rollout.max_mismatch). Written against vLLM 0.32.

Next: vllm_tensors.py, where our tensors lie in the engine; vllm_input.py, what it is told.
"""

import contextlib
import hashlib
import logging
import os
import time

import numpy as np
import torch

from nanolmmr1.errors import Preempted, UserError
from nanolmmr1.parallel.export import published
from nanolmmr1.rollout import Group, Response
from nanolmmr1.rollout.vllm_input import batch_tokens, check_logps, fp32_head, images_of, sampling_fields
from nanolmmr1.rollout.vllm_tensors import EMBED, FUSED, HEAD, column, digests, engine_tensor, read, repack_tied_head

TESTED = "0.32"
CPU_CACHE_BYTES = 4 << 30
WEIGHTS_TOLD_BY = "vllm.model_executor.model_loader", "vllm.model_executor.models.utils"  # whose warnings are shown


class VllmSampler:
    """One engine. Under torchrun each tensor-parallel group is one; its ranks must be given the same prompts.

    Args:
        policy: offers `model`, `device` and `dtype`.
        cfg: the recipe. folder: the model's; its config and tokenizer are read, its weights are not.

    Raises:
        UserError: vLLM is missing, untested or cannot start; or its tensors are not the policy's.
    """

    def __init__(self, policy, cfg, folder):
        vllm = _import(cfg.rollout.untested_vllm)
        self.policy, self.cfg, self.on_gpu = policy, cfg, policy.device.type == "cuda"
        self.ranks, self.dtype, self.remembers = cfg.rollout.tensor_parallel, policy.dtype, False
        self.asleep, self.stats, self.calls = set(), {}, 0
        self.unproven = {"start", "wake"}  # after which the engine's tensors are still to be read back
        parts = [*cfg.phases.values(), cfg.evaluate]
        self.max_len = cfg.rollout.max_model_len or max(p.max_prompt_tokens + p.max_response_tokens for p in parts)
        args, set_num_threads = self._engine_args(folder), torch.set_num_threads
        try:
            with self._failing_at("starting"):
                # As vLLM's own offline class asks: defaults for throughput rather than latency.
                context = vllm.usage.usage_lib.UsageContext.LLM_CLASS
                self.engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**args), context)
        finally:
            torch.set_num_threads = set_num_threads  # on a CPU vLLM replaces it by a function that does nothing
        for logger in map(logging.getLogger, WEIGHTS_TOLD_BY):  # now: an engine that starts takes handlers away
            logger.handlers = [logging.StreamHandler()]
            logger.setLevel(logging.WARNING)
        self.merge = self.engine.model_config.hf_config.vision_config.spatial_merge_size
        self.tensors = self.engine.apply_model(lambda model: {name for name, _ in model.named_parameters()})[0]
        self.buffers = self.engine.apply_model(digests)[0]  # rotary tables: nobody hands them over
        self.update(published(policy.model, self.dtype))

    def _engine_args(self, folder):
        rollout, prompt, model = self.cfg.rollout, self.cfg.prompt, self.policy.model.cfg
        world = int(os.environ.get("WORLD_SIZE", 1))
        if world % rollout.tensor_parallel:
            raise UserError(f"rollout.tensor_parallel={rollout.tensor_parallel} does not divide the {world} processes")
        args = dict(
            model=str(folder),
            load_format="dummy",
            dtype=str(self.policy.dtype).removeprefix("torch."),
            seed=self.cfg.seed,
            max_model_len=self.max_len,
            max_num_seqs=rollout.max_sequences,
            logprobs_mode="processed_logprobs",  # of the distribution sampled from: temperature and bans included
            hf_overrides=fp32_head(self.policy),
            generation_config="vllm",  # the model's own would change temperature and penalties
            enable_prefix_caching=True,  # a group's prompt is computed once
            mm_processor_cache_gb=0,  # nothing is processed there
            mm_device_do_normalize=False,  # patches come normalised; the default would do so again, and not say so
            mm_processor_kwargs=dict(min_pixels=prompt.min_pixels, max_pixels=prompt.max_pixels),  # sizes its buffers
            limit_mm_per_prompt={"video": 0},
            enforce_eager=rollout.enforce_eager or not self.on_gpu,
            tensor_parallel_size=rollout.tensor_parallel,
            disable_log_stats=True,
        )
        if world > 1:
            args["distributed_executor_backend"] = "external_launcher"
        if self.on_gpu:
            # The pool that sleeps cannot live in expandable segments; 0.32 turns them off while it allocates there.
            args |= dict(gpu_memory_utilization=rollout.gpu_memory_utilization, enable_sleep_mode=True)
        else:
            # A prompt cut between two steps rewinds its seeded generator, which 0.32 cannot do on a CPU: so cut none.
            most = batch_tokens(self.max_len, rollout.max_sequences)
            args |= dict(enable_chunked_prefill=False, max_num_batched_tokens=most)
            row = 2 * model.num_key_value_heads * model.head_dim * self.policy.dtype.itemsize
            tokens = rollout.max_sequences * (self.max_len + 256)  # a sequence's last block is partly empty
            args["kv_cache_memory_bytes"] = min(tokens * model.num_hidden_layers * row, CPU_CACHE_BYTES)
        if rollout.kv_cache_gb:
            args["kv_cache_memory_bytes"] = int(rollout.kv_cache_gb * 2**30)
        return args

    @torch.no_grad()
    def generate(self, prompts, params, seeds, advance=lambda n: None):
        """One group a prompt, in order; as LocalSampler's, but the same seeds draw other tokens.

        Raises:
            UserError: a prompt does not fit the engine, or the engine failed or passed rollout.timeout_s.
        """
        self.wake()
        requests = [self._request(prompt, params.max_tokens) for prompt in prompts]
        G, timeout, began = params.num_responses, self.cfg.rollout.timeout_s, time.monotonic()
        self.calls += 1
        waiting, done = {}, {}
        try:
            with self._failing_at("sampling"):
                for b, (request, seed) in enumerate(zip(requests, seeds, strict=True)):
                    for g in range(G):
                        waiting[f"{self.calls}-{b}-{g}"] = b, g
                        self.engine.add_request(f"{self.calls}-{b}-{g}", request, _params(params, (*seed, g)))
                while waiting:
                    if self._agree(time.monotonic() - began > timeout):
                        raise UserError(f"vLLM had {len(waiting)} responses unfinished after rollout.timeout_s="
                                        f"{timeout:g} seconds: raise it, or lower max_response_tokens")
                    stop = None
                    try:
                        advance(0)
                    except Preempted as told:
                        stop = told
                    if self._agree(stop is not None):
                        raise stop or Preempted
                    for output in self.engine.step():
                        b, g = waiting.pop(output.request_id)
                        done[b, g] = _response(output, prompts[b])
                        if all((b, other) in done for other in range(G)):
                            advance(1)  # never 0 here, where a rank would stop without its engine's others
        finally:
            self.engine.abort_request(list(waiting))
        return [Group(prompt, [done[b, g] for g in range(G)]) for b, prompt in enumerate(prompts)]

    @contextlib.contextmanager
    def _failing_at(self, work):
        """Whatever goes wrong in the engine, the run must end with a checkpoint and a reason."""
        try:
            yield
        except (UserError, Preempted):
            raise
        except Exception as error:
            raise UserError(f"vLLM failed while {work}: {_reason(error)}{self._held()}") from error

    def _agree(self, flag):
        """Whether the flag is set on some rank of this engine: none may leave the others inside a step."""
        if self.ranks == 1:
            return flag
        from vllm.distributed.parallel_state import get_tp_group

        flags = torch.tensor(int(flag))
        torch.distributed.all_reduce(flags, group=get_tp_group().cpu_group)
        return bool(flags)

    def _request(self, prompt, new_tokens):
        """The prompt as the engine's own input: what its processor would have made, made of our very tensors."""
        from vllm.inputs.engine import mm_input, tokens_input
        from vllm.multimodal import inputs as mm

        ids = prompt.ids.tolist()
        if len(ids) + new_tokens > self.max_len:
            raise UserError(f"row {prompt.row.id}: {len(ids)} prompt tokens and {new_tokens} new ones exceed the "
                            f"engine's {self.max_len}: raise rollout.max_model_len, or 0 to derive it from the phases")
        images = images_of(prompt, self.merge)
        if not images:
            return tokens_input(ids)
        items, hashes, places = [], [], []
        for grid, pixels, first, length in images:
            items.append(mm.MultiModalKwargsItem(
                pixel_values=mm.MultiModalFieldElem(pixels, mm.MultiModalFlatField(slices=[slice(0, len(pixels))])),
                image_grid_thw=mm.MultiModalFieldElem(grid, mm.MultiModalBatchedField(keep_on_cpu=True))))
            # Image features and cached prefixes go by this name: the same grid and pixels, the same features.
            digest = hashlib.blake2b(pixels.contiguous().numpy(), digest_size=16, salt=grid.numpy().tobytes()[:16])
            hashes.append(digest.hexdigest())
            places.append(mm.PlaceholderRange(offset=first, length=length))
        return mm_input(ids, mm.MultiModalKwargsItems({"image": items}), {"image": hashes}, {"image": places})

    @torch.no_grad()
    def update(self, weights, verify=False):
        """Stream new weights into the engine, in place, and forget what it cached under the old ones.

        Args:
            weights: iterable of (published name, whole tensor); walked to its end in any case, since other ranks do so
                too, and no more than a layer's are held.
            verify: read the engine's tensors back and compare; always done the first time, and after the first sleep.

        Raises:
            UserError: a tensor is missing, comes twice or has no place in the engine, or differs when read back; or
                the engine failed.
        """
        moment = "wake" if self.asleep else "start"
        began, verify, weights = time.perf_counter(), verify or moment in self.unproven, iter(weights)
        try:
            with self._failing_at("taking new weights"):
                self._load(weights, verify)
        finally:
            for _ in weights:
                pass
        self.unproven.discard(moment)
        self.stats["handover_s"] = time.perf_counter() - began

    def _load(self, weights, verify):
        if "weights" in self.asleep:
            self.engine.wake_up(["weights"])
            self.asleep = {"kv_cache"}
        given = {}  # engine's tensor -> {part: what to find there}

        def watched():
            for name, tensor in weights:
                target, part = engine_tensor(name)
                parts = given.setdefault(target, {})
                if part in parts or target not in self.tensors:
                    raise UserError(f"{name} {'came twice' if part in parts else 'has no place in the engine'}: is the "
                                    "recipe's model the one that is trained?")
                parts[part] = column(target, tensor).to(self.policy.dtype, copy=True) if verify else None
                yield name, tensor

        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": watched()})
        partial = {t for t, parts in given.items() if len(parts) != len(FUSED.get(t.split(".")[-2], "1"))}
        if missing := sorted(partial | (self.tensors - given.keys())):
            raise UserError(f"{len(missing)} of the engine's {len(self.tensors)} tensors were not handed over, or in "
                            f"part, {missing[0]} first: is the recipe's model the one that is trained?")
        self.engine.apply_model(repack_tied_head)
        if verify:
            self._verify({target: torch.cat([parts[i] for i in sorted(parts)]) for target, parts in given.items()})
        self._reset_caches()

    def _verify(self, expected):
        """Compare a column of every engine tensor with the trainer's, bit by bit; of spread ones, vectors alone."""
        spread = self.cfg.rollout.tensor_parallel > 1

        def differing(model):
            if HEAD not in expected:
                expected[HEAD] = column(HEAD, model.get_parameter(EMBED))  # tied
            for target, wanted in expected.items():
                if spread and model.get_parameter(target).shape != wanted.shape:
                    continue
                if not torch.equal(read(model, target)[: len(wanted)], wanted):  # the vocabulary may be padded
                    yield target

        if wrong := self.engine.apply_model(lambda model: list(differing(model)))[0]:
            raise UserError(f"after the hand-over {len(wrong)} of the engine's {len(expected)} tensors are not the "
                            f"trainer's, {wrong[0]} first")
        found = self.engine.apply_model(digests)[0]
        if wrong := [name for name, digest in self.buffers.items() if found.get(name) != digest]:
            raise UserError(f"{len(wrong)} of the engine's {len(self.buffers)} buffers are not as they were made, "
                            f"{wrong[0]} first: rollout.sleep_level=1 may keep them")

    def wake(self):
        """Take the engine's memory back: weights, then cache. Weights that were not replaced are streamed in anew."""
        if "weights" in self.asleep:
            self.update(published(self.policy.model, self.dtype))
        if self.asleep:
            with self._failing_at("waking up"):
                self.engine.wake_up(["kv_cache"])
            self.asleep = set()

    def sleep(self):
        """Give the GPU's memory to the trainer. A CPU has nothing to give; there, only the caches are emptied."""
        self._reset_caches()
        if self.on_gpu:
            with self._failing_at("going to sleep"):
                self.engine.sleep(level=self.cfg.rollout.sleep_level)
            self.asleep = {"weights", "kv_cache"}
            free, total, trainer, _ = self._memory()
            self.stats["left_asleep_mb"] = (total - free - trainer) / 2**20  # contexts, graphs, other processes

    @property
    def pool_bytes(self):
        return self._memory()[3] if self.on_gpu else 0

    def close(self):
        """End the engine, and with it the process group, whoever began it: that is what 0.32 does."""
        self.engine.engine_core.shutdown()

    def _reset_caches(self):
        """Prefixes and image features of old weights; the latter would also grow with every image seen.

        Raises:
            UserError: prefixes of old weights stay.
        """
        if not self.engine.reset_prefix_cache():
            raise UserError("vLLM keeps prefixes that it computed with old weights: its cache could not be reset")
        self.engine.reset_mm_cache()
        self.engine.reset_encoder_cache()

    def _memory(self):
        """Bytes of the GPU: free, all, held by the trainer, and in the engine's pool, asleep or not."""
        from vllm.device_allocator import get_mem_allocator_instance

        pool = get_mem_allocator_instance().get_current_usage()
        return *torch.cuda.mem_get_info(self.policy.device), torch.cuda.memory_reserved() - pool, pool

    def _held(self):
        if not self.on_gpu:
            return ""
        free, total, trainer, pool = (f"{size / 2**30:.1f}" for size in self._memory())
        return (f" ({free} of {total} GB are free; the trainer holds {trainer}, the engine's pool {pool}; if that "
                "is why, lower rollout.gpu_memory_utilization, rollout.max_sequences or pack.tokens_per_micro_batch)")


def _params(params, seed):
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        **sampling_fields(params),
        logit_bias={token: float("-inf") for token in params.banned_ids} or None,
        seed=int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1)),
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _response(output, prompt):
    (drawn,), read = output.outputs, len(output.prompt_token_ids)
    if read != len(prompt.ids) or drawn.finish_reason not in ("stop", "length"):
        raise UserError(f"row {prompt.row.id}: vLLM read {read} of {len(prompt.ids)} prompt tokens and finished by "
                        f"{drawn.finish_reason!r}")
    ids, logp = torch.tensor(drawn.token_ids, dtype=torch.int64), torch.tensor(drawn.logprobs.logprobs)
    check_logps(f"row {prompt.row.id}: vLLM", drawn.logprobs.logprobs)
    return Response(ids, logp, drawn.finish_reason)


def _import(untested):
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine lives in this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")  # a failure would print every request; we say what it was
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
                        "'nanolmmr1[vllm]', or try this one with rollout.untested_vllm=true")
    vllm.ModelRegistry.register_model(Model.__name__, Model)  # else a child process is started to look at it
    return vllm


def _reason(error):
    if hasattr(error, "errors"):  # of pydantic; its text begins with how many there are
        return "; ".join(each["msg"] for each in error.errors())
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0] or 'no message'}"
