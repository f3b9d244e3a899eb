"""What a recipe may hold: every key with its default and a line of help.

Next: config.py, which reads, checks and resolves recipes.
"""

from dataclasses import dataclass, field


def opt(default, help):
    """A dataclass field with a default and the line `--help` shows for it."""
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Objective:
    """What is optimised. A value of None means: as `algorithm` says (see ALGORITHMS)."""

    algorithm: str = opt("grpo", "grpo | dr_grpo | dapo | rloo | reinforce_pp_baseline | gspo | cispo")
    adv_estimator: str | None = opt(None, "grpo | dr_grpo | rloo | reinforce_pp_baseline")
    loss_type: str | None = opt(None, "ppo | gspo | cispo")
    loss_avg_mode: str | None = opt(None, "token (global mean) | sequence (mean of means) | constant (fixed length)")
    clip_ratio_low: float | None = opt(None, "ratio is clipped below at 1 - this")
    clip_ratio_high: float | None = opt(None, "ratio is clipped above at 1 + this")
    clip_ratio_dual: float | None = opt(None, "dual clip c > 1 for negative advantages; 0: off")
    overlong_buffer: int | None = opt(None, "soft overlong penalty over the last so many tokens; 0: off")
    overlong_penalty: float = opt(1.0, "largest soft overlong penalty")
    kl_coef: float = opt(0.0, "beta; 0: no reference model is kept")
    kl_estimator: str = opt("k3", "k1 | k2 | k3")
    kl_place: str = opt("loss", "loss | reward (k1 only)")
    kl_ratio: bool = opt(False, "multiply the KL term in the loss by the importance ratio")
    entropy_coef: float = opt(0.0, "entropy bonus")
    tis_cap: float | None = opt(None, "importance weights policy / sampler are capped here; 0: off; none: 2, local 0")
    tis_floor: float = opt(0.0, "importance weights below are raised to this, or masked")
    tis_mode: str = opt("token_truncate", "token_truncate | token_mask (weight 0 outside [tis_floor, tis_cap]) | "
                        "sequence_truncate | sequence_mask (one weight a response)")
    tis_with_truncated_sampling: bool = opt(False, "accept importance weights with top_p < 1 or top_k > 0: biased")


ALGORITHMS = {
    "grpo": dict(),
    "dr_grpo": dict(adv_estimator="dr_grpo", loss_avg_mode="constant"),
    "dapo": dict(loss_avg_mode="token", clip_ratio_high=0.28, overlong_buffer=64),
    "rloo": dict(adv_estimator="rloo", loss_avg_mode="token"),
    "reinforce_pp_baseline": dict(adv_estimator="reinforce_pp_baseline", loss_avg_mode="token"),
    "gspo": dict(loss_type="gspo", clip_ratio_low=3e-4, clip_ratio_high=4e-4),
    "cispo": dict(loss_type="cispo", loss_avg_mode="token", clip_ratio_low=1.0, clip_ratio_high=0.28),
}
GRPO = dict(adv_estimator="grpo", loss_type="ppo", loss_avg_mode="sequence", clip_ratio_low=0.2,
            clip_ratio_high=0.2, clip_ratio_dual=0.0, overlong_buffer=0)


@dataclass
class Phase:
    """One stretch of training: its rows, its length, its objective."""

    data: str | list[str] = opt("", "file, folder, hub id, `path@split`, or a list of them")
    captions: bool = opt(False, "put each row's caption before its images")
    steps: int = opt(100, "rollout batches to train on")
    prompts_per_step: int = opt(64, "prompts per step")
    group_size: int = opt(8, "responses per prompt (G)")
    max_prompt_tokens: int = opt(2048, "longer prompts are dropped and counted, image tokens included")
    max_response_tokens: int = opt(2048, "longer responses are cut and counted")
    lr: float = opt(1e-6, "peak learning rate")
    temperature: float = opt(1.0, "sampling temperature, also used when log-probs are computed")
    top_p: float = opt(1.0, "nucleus; below 1 makes importance ratios biased")
    top_k: int = opt(0, "0: off; above 0 makes importance ratios biased")
    updates_per_rollout: int = opt(1, "optimiser steps on one rollout batch")
    reference: str = opt("phase", "KL reference: phase (weights at the phase's start) | start (at the run's start)")
    freeze: list[str] = opt([], "what is not trained: vision | merger | language | embedding | a tensor name prefix")
    dynamic_sampling: bool = opt(False, "refill groups whose rewards are all equal (DAPO)")
    max_refills: int = opt(3, "rounds of refilling; then the step trains on what it has")
    objective: Objective = field(default_factory=Objective)


@dataclass
class Prompt:
    system: str = opt("", "system prompt; empty: the model's own default")
    template: str = opt("{problem}", "user turn; {problem} keeps its <image> markers")
    caption_template: str = opt("Caption: {caption}\n", "put before each <image> when the phase shows captions")
    columns: dict = opt({}, "our column -> the data's column, for problem, answer, images, caption")
    min_pixels: int = opt(3136, "smaller pictures are enlarged to this")
    max_pixels: int = opt(1003520, "larger pictures are reduced to this (784 pixels an image token)")


@dataclass
class Reward:
    format: str = opt("think_answer", "think_answer | think_boxed | boxed | a regular expression for all responses")
    format_weight: float = opt(0.5, "weight of the format reward (0 or 1)")
    accuracy_weight: float = opt(1.0, "weight of the accuracy reward (0 or 1)")
    functions: dict = opt({}, "user rewards: path/to/file.py:function -> weight")
    workers: int = opt(0, "judging processes of a rank; 0: the host's cores over its ranks, at most 16")
    timeout_s: float = opt(10.0, "a user function that takes longer ends the run")
    verify_s: float = opt(1.0, "CPU seconds of a built-in judgement; one that takes more is killed and scores 0")
    env: list[str] = opt([], "environment variables that user functions may see, by name, as OPENAI_API_KEY")


@dataclass
class Rollout:
    engine: str = opt("local", "local (our own) | vllm (pip install 'nanolmmr1[vllm]') | server (vLLM elsewhere)")
    servers: list[str] = opt([], "server: vLLM servers that run already, http(s)://[USER:PASSWORD@|KEY@]HOST:PORT")
    server_weights: str = opt("nccl", "server: nccl (handed over after each update, GPU to GPU) | fixed (never)")
    server_wait_s: float = opt(60.0, "server: with none left, they are tried again for so long before the run stops")
    max_sequences: int = opt(256, "responses decoded together")
    gpu_memory_utilization: float = opt(0.5, "vllm: share of the GPU's memory for engine weights and cache")
    kv_cache_gb: float = opt(0.0, "vllm: size of the cache; 0: what the share above leaves, on a CPU at most 4")
    max_model_len: int = opt(0, "vllm: longest prompt and response together; 0: the longest that a phase allows")
    tensor_parallel: int = opt(1, "vllm: GPUs an engine is spread over")
    enforce_eager: bool = opt(False, "vllm: no CUDA graphs; starts faster, samples slower; always so on a CPU")
    sleep_level: int = opt(2, "vllm, asleep on a GPU: 2 (weights dropped) | 1 (copied to the host: 7.5 GB of the 3B)")
    max_mismatch: float | None = opt(None, "nats; a step's mean |log-prob of policy - sampler| above, of text or of "
                                     "images, ends the run. 0: off; none: 0.01 in float32, 0.1 in bfloat16, 0.25 by "
                                     "servers")
    timeout_s: float = opt(1800.0, "vllm, server: a call for responses that takes longer stops the run")
    untested_vllm: bool = opt(False, "accept a vLLM outside the tested range, 0.32")


@dataclass
class Optim:
    betas: list[float] = opt([0.9, 0.95], "AdamW")
    eps: float = opt(1e-8, "AdamW")
    weight_decay: float = opt(0.0, "AdamW; on matrices only")
    max_grad_norm: float = opt(1.0, "gradients are clipped to this global norm")
    schedule: str = opt("constant", "constant | cosine (per phase)")
    warmup_steps: int = opt(0, "linear warm-up at each phase's start, in steps")
    min_lr_ratio: float = opt(0.1, "cosine ends at this share of lr")
    max_bad_steps: int = opt(3, "steps in a row without a finite update before the run stops")
    weights: str = opt("float32", "master weights: float32 | bfloat16 (with its moments; stochastically rounded)")


@dataclass
class Pack:
    tokens_per_micro_batch: int = opt(16384, "packed tokens a micro-batch; a larger group is split, and said so")
    attention: str = opt("auto", "auto (triton on cuda, sdpa on cpu) | triton | varlen | flash | sdpa | reference")
    head: str = opt("auto", "auto (triton on cuda, chunked on cpu) | triton | chunked | reference")
    head_logits: str = opt("float32", "of a chunk: float32 | bfloat16 (faster; rounds new log-probs, not old ones)")
    head_chunk_tokens: int = opt(0, "scored tokens per chunk of the LM head; 0: by device and vocabulary")
    checkpoint_activations: str = opt("none", "what backward makes again: none | swiglu (its product) | all | budget")
    activation_budget_gb: float = opt(16.0, "budget: no more is recomputed than this asks for, a rank; products first")


@dataclass
class Checkpoint:
    every_steps: int = opt(0, "0: by time, and where a phase ends")
    every_minutes: float = opt(10.0, "also when the last checkpoint is this old; 0: never by time")
    keep: int = opt(2, "newest checkpoints kept, and beside them the one that evaluated best")
    background: bool = opt(True, "write while training goes on; a copy of the state is held in memory meanwhile")


@dataclass
class Dist:
    """How a run lies on the ranks that torchrun started."""

    shard: str = opt("all", "FSDP over all ranks | host (inside each host, replicated across hosts: HSDP)")
    offload: bool = opt(False, "parameters, gradients and optimiser live on the CPU")
    offload_reference: bool = opt(False, "the KL reference's shards live on the CPU between its turns")
    timeout_s: float = opt(3600.0, "a collective that waits longer ends the process; torchrun may start all anew")
    hang_s: float = opt(300.0, "a rank that keeps the others waiting for so long is named")


@dataclass
class Plan:
    """The machine that `--plan` plans for. Nothing of it changes a run."""

    gpu_gb: float = opt(0.0, "memory of a GPU, in 1e9 bytes; 0: of the one that is there, else 80 (of 85.5)")
    gpus: int = opt(0, "GPUs in all; 0: as many as torchrun starts, else 1")
    host_gpus: int = opt(0, "GPUs of a host; 0: as torchrun says, else up to 8")


@dataclass
class Evaluate:
    tasks: dict = opt({}, "name -> {data: ..., captions: false}; held-out rows, greedy answers")
    every_steps: int = opt(0, "also evaluate every so many steps of a phase; 0: only where it ends")
    limit: int = opt(0, "rows per task; 0: all")
    max_response_tokens: int | None = opt(None, "none: the longest phase's")
    max_prompt_tokens: int | None = opt(None, "none: the longest phase's")


@dataclass
class Recipe:
    name: str = opt("", "run name; empty: the recipe's file name")
    model: str = opt("", "hub id or folder of a Qwen2.5-VL")
    output: str = opt("", "run folder; empty: runs/<name>")
    seed: int = opt(0, "everything random derives from it")
    resume: str = opt("auto", "auto (go on from the newest checkpoint) | changed (also with other rows or another "
                      "model path) | never (refuse if there is a checkpoint)")
    world: str = opt("", "embedded world built into <output>/world first: desk; its files are named world:FILE")
    device: str = opt("auto", "auto | cpu | cuda")
    dtype: str = opt("auto", "compute: auto (bfloat16 on cuda, float32 on cpu) | float32 | bfloat16")
    prompt: Prompt = field(default_factory=Prompt)
    reward: Reward = field(default_factory=Reward)
    rollout: Rollout = field(default_factory=Rollout)
    optim: Optim = field(default_factory=Optim)
    pack: Pack = field(default_factory=Pack)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluate: Evaluate = field(default_factory=Evaluate)
    dist: Dist = field(default_factory=Dist)
    plan: Plan = field(default_factory=Plan)
    defaults: Phase = field(default_factory=Phase)
    phases: dict[str, Phase] = opt({}, "name -> phase, in order")


CHOICES = {
    "algorithm": tuple(ALGORITHMS), "adv_estimator": ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"),
    "loss_type": ("ppo", "gspo", "cispo"), "loss_avg_mode": ("token", "sequence", "constant"),
    "tis_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "kl_estimator": ("k1", "k2", "k3"), "kl_place": ("loss", "reward"), "reference": ("phase", "start"),
    "engine": ("local", "vllm", "server"), "server_weights": ("nccl", "fixed"), "sleep_level": (1, 2),
    "schedule": ("constant", "cosine"), "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16"), "resume": ("auto", "changed", "never"), "world": ("", "desk"),
    "attention": ("auto", "triton", "varlen", "flash", "sdpa", "reference"),
    "head": ("auto", "triton", "chunked", "reference"), "head_logits": ("float32", "bfloat16"),
    "checkpoint_activations": ("none", "swiglu", "all", "budget"), "weights": ("float32", "bfloat16"),
    "shard": ("all", "host"),
}
POSITIVE = {"prompts_per_step", "group_size", "max_prompt_tokens", "max_response_tokens", "temperature", "top_p",
            "updates_per_rollout", "min_pixels", "max_pixels", "timeout_s", "verify_s", "max_sequences", "eps",
            "max_grad_norm", "max_bad_steps", "tokens_per_micro_batch", "keep", "steps",
            "gpu_memory_utilization", "tensor_parallel", "hang_s"}  # no number may be negative
MOST = {  # largest value of a key; of other integers 2^31 - 1. What is above is a mistake, and would fill memory
    "prompts_per_step": 1 << 20, "group_size": 1 << 16, "max_prompt_tokens": 1 << 24, "max_response_tokens": 1 << 24,
    "min_pixels": 64_000_000, "max_pixels": 64_000_000, "workers": 256, "max_sequences": 1 << 20, "max_refills": 1000,
    "steps": 10**9, "tensor_parallel": 1024, "seed": 2**63 - 1,
    "timeout_s": 10**8, "hang_s": 10**8, "server_wait_s": 10**8, "verify_s": 10**6, "every_minutes": 10**6,
}
MOST_TOKENS = 1 << 31  # responses of a step, each as long as it may be
# What TRL, EasyR1, verl and OpenRLHF call a key -> our keys; `phases.` stands for each phase.
ALIASES = {
    **dict.fromkeys(("num_generations", "n", "n_samples_per_prompt", "rollout_n"), "phases.group_size"),
    **dict.fromkeys(("learning_rate", "actor_learning_rate"), "phases.lr"),
    **dict.fromkeys(("max_completion_length", "max_new_tokens", "max_response_length", "generate_max_len"),
                    "phases.max_response_tokens"),
    **dict.fromkeys(("max_prompt_length", "prompt_max_len"), "phases.max_prompt_tokens"),
    **dict.fromkeys(("max_steps", "total_training_steps", "num_train_epochs", "total_epochs", "total_episodes",
                     "num_episodes", "epochs"), "phases.steps"),
    **dict.fromkeys(("per_device_train_batch_size", "train_batch_size", "rollout_batch_size", "gen_batch_size",
                     "generation_batch_size", "batch_size"), "phases.prompts_per_step"),
    **dict.fromkeys(("num_iterations", "ppo_epochs", "ppo_mini_batch_size", "global_batch_size", "mini_batch_size"),
                    "phases.updates_per_rollout"),
    **dict.fromkeys(("beta", "kl_loss_coef", "init_kl_coef", "kl_beta"), "phases.objective.kl_coef"),
    **dict.fromkeys(("epsilon", "clip_ratio", "cliprange", "eps_clip"), "phases.objective.clip_ratio_low"),
    "epsilon_high": "phases.objective.clip_ratio_high", "clip_ratio_c": "phases.objective.clip_ratio_dual",
    "delta": "phases.objective.clip_ratio_dual",
    **dict.fromkeys(("kl_penalty", "kl_loss_type", "kl_type"), "phases.objective.kl_estimator"),
    "use_kl_in_reward": "phases.objective.kl_place", "use_kl_loss": "phases.objective.kl_coef",
    "loss_agg_mode": "phases.objective.loss_avg_mode", "entropy_coeff": "phases.objective.entropy_coef",
    **dict.fromkeys(("scale_rewards", "norm_adv_by_std_in_grpo", "advantage_estimator"),
                    "phases.objective.adv_estimator"),
    "importance_sampling_level": "phases.objective.loss_type",
    **dict.fromkeys(("tis_imp_ratio_cap", "vllm_importance_sampling_cap", "rollout_is_threshold"),
                    "phases.objective.tis_cap"),
    **dict.fromkeys(("train_files", "train_data", "dataset_name", "prompt_data", "dataset", "train_dataset"),
                    "phases.data"),
    **dict.fromkeys(("filter_groups", "online_filtering", "dynamic_filtering"), "phases.dynamic_sampling"),
    "max_num_gen_batches": "phases.max_refills", "max_try_make_batch": "phases.max_refills",
    **dict.fromkeys(("freeze_vision_tower", "freeze_vision_modules", "freeze_vit"), "phases.freeze"),
    **dict.fromkeys(("model_name_or_path", "model_path", "pretrain"), "model"),
    **dict.fromkeys(("output_dir", "default_local_dir", "save_checkpoint_path", "save_path", "ckpt_path"), "output"),
    **dict.fromkeys(("save_steps", "save_freq"), "checkpoint.every_steps"),
    **dict.fromkeys(("save_total_limit", "save_limit", "max_actor_ckpt_to_keep", "max_ckpt_num"), "checkpoint.keep"),
    **dict.fromkeys(("eval_steps", "test_freq", "val_freq"), "evaluate.every_steps"),
    **dict.fromkeys(("val_files", "val_data", "eval_dataset"), "evaluate.tasks"),
    **dict.fromkeys(("gradient_checkpointing", "enable_gradient_checkpointing"), "pack.checkpoint_activations"),
    **dict.fromkeys(("bf16", "fp16", "torch_dtype", "param_dtype"), "dtype"),
    **dict.fromkeys(("use_vllm", "vllm_mode", "vllm_server_base_url"), "rollout.engine"),
    **dict.fromkeys(("tensor_model_parallel_size", "tensor_parallel_size", "vllm_tensor_parallel_size"),
                    "rollout.tensor_parallel"),
    "vllm_gpu_memory_utilization": "rollout.gpu_memory_utilization", "max_num_seqs": "rollout.max_sequences",
    **dict.fromkeys(("ppo_max_token_len_per_gpu", "ppo_micro_batch_size_per_gpu", "gradient_accumulation_steps",
                     "micro_train_batch_size", "micro_batch_size_per_device_for_update"),
                    "pack.tokens_per_micro_batch"),
    **dict.fromkeys(("warmup_ratio", "lr_warmup_ratio", "lr_warmup_steps", "lr_warmup_steps_ratio"),
                    "optim.warmup_steps"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), "optim.schedule"),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), "optim.betas"),
    **dict.fromkeys(("reward_funcs", "reward_function", "custom_reward_function", "remote_rm_url", "reward_weights"),
                    "reward.functions"),
    "system_prompt": "prompt.system", "format_prompt": "prompt.template",
    **dict.fromkeys(("prompt_key", "answer_key", "image_key", "input_key", "label_key"), "prompt.columns"),
    "attn_implementation": "pack.attention",
    **dict.fromkeys(("resume_from_checkpoint", "find_last_checkpoint", "resume_mode", "load_checkpoint_path"),
                    "resume"),
    **dict.fromkeys(("param_offload", "optimizer_offload", "offload_params", "cpu_offload"), "dist.offload"),
    **dict.fromkeys(("run_name", "experiment_name", "project_name"), "name"),
}  # fmt: skip
