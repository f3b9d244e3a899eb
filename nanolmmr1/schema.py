"""The keys of a recipe, as pydantic models: type, bounds, default and help text of each.

Types are strict: 1 is no bool, and "7" no int. Text, Number and Section convert where YAML makes it necessary.
Assignments to an instance are not checked.

Next: errors.py, three exceptions.
"""

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

T = TypeVar("T")


def key(default: T, help: str, le: float | None = None) -> T:
    """A recipe key with its default, the text that `--help` shows, and its largest value if the type has none."""
    return Field(default=default, description=help, le=le)


def by_algorithm(help: str) -> Any:
    """A key that `algorithm` sets unless the recipe does."""
    return key(None, f"{help} (default: by algorithm)")


def _read_text(value: Any) -> Any:
    return str(value) if type(value) in (int, float) else value  # a folder may be called 7


def read_number(value: Any) -> Any:
    """Convert text (YAML reads 1e-6 as text) or an integer to float. Other values stay, and are refused later."""
    try:
        return float(value) if type(value) in (int, str) else value
    except ValueError:
        return value
    except OverflowError:
        return math.inf


Text = Annotated[str, BeforeValidator(_read_text), Field(pattern=r"^[^\x00]*$")]  # no path may hold a zero byte
# One text or several. The tags appear in errors, where config.py removes them.
Files = Annotated[
    Annotated[Text, Tag("<str>")] | Annotated[list[Text], Tag("<list>")],
    Discriminator(lambda value: {list: "<list>", dict: None}.get(type(value), "<str>")),
]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(read_number)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(read_number)]
Seconds = Annotated[float, Field(gt=0, le=10**8, allow_inf_nan=False), BeforeValidator(read_number)]
Finite = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(read_number)]
Band = Annotated[list[Finite], Field(min_length=2, max_length=2)]  # lowest and highest value
# A larger integer is a mistake, and might fill the memory.
Whole = Annotated[int, Field(ge=0, le=2**31 - 1)]
Count = Annotated[int, Field(gt=0, le=2**31 - 1)]
Tokens = Annotated[int, Field(gt=0, le=1 << 24)]
Pixels = Annotated[int, Field(gt=0, le=64_000_000)]


class Section(BaseModel):
    """A mapping of keys. A value left out (`key=`) is empty text, an empty list or mapping, or a section's defaults."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _read_empty(cls, values: Any) -> Any:
        for name, field in cls.model_fields.items() if isinstance(values, dict) else ():
            if name in values and values[name] is None and isinstance(field.default, str | list | dict | Section):
                values = values | {name: type(field.default)()}
        return values


GRPO: dict[str, Any] = dict(adv_estimator="grpo", loss_type="ppo", loss_avg_mode="sequence", clip_ratio_low=0.2,
                            clip_ratio_high=0.2, clip_ratio_dual=0.0, overlong_buffer=0)  # fmt: skip
ALGORITHMS: dict[str, dict[str, Any]] = {  # differences from GRPO
    "grpo": dict(),
    "dr_grpo": dict(adv_estimator="dr_grpo", loss_avg_mode="constant"),
    "dapo": dict(loss_avg_mode="token", clip_ratio_high=0.28, overlong_buffer=64),
    "rloo": dict(adv_estimator="rloo", loss_avg_mode="token"),
    "reinforce_pp_baseline": dict(adv_estimator="reinforce_pp_baseline", loss_avg_mode="token"),
    "gspo": dict(loss_type="gspo", clip_ratio_low=3e-4, clip_ratio_high=4e-4),
    "cispo": dict(loss_type="cispo", loss_avg_mode="token", clip_ratio_low=1.0, clip_ratio_high=0.28),
}


class Objective(Section):
    """The objective: advantages, loss and KL."""

    algorithm: Literal["grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp_baseline", "gspo", "cispo"] = key(
        "grpo", "sets the keys below that say so")
    adv_estimator: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"] = by_algorithm("rewards to advantages")
    loss_type: Literal["ppo", "gspo", "cispo"] = by_algorithm("clipped surrogate loss")
    loss_avg_mode: Literal["token", "sequence", "constant"] = by_algorithm(
        "mean over all tokens; mean over responses of their means; sum over the largest possible number of tokens")
    clip_ratio_low: Number = by_algorithm("the importance ratio is clipped below at 1 - this")
    clip_ratio_high: Number = by_algorithm("the importance ratio is clipped above at 1 + this")
    clip_ratio_dual: Number = by_algorithm("dual clip c > 1 for negative advantages; 0: off")
    overlong_buffer: Whole = by_algorithm("soft overlong penalty over this many tokens before the limit; 0: off")
    overlong_penalty: Number = key(1.0, "largest soft overlong penalty")
    kl_coef: Number = key(0.0, "weight (beta) of the KL term; 0: no reference model is kept")
    kl_estimator: Literal["k1", "k2", "k3"] = key("k3", "estimator of the KL divergence")
    kl_place: Literal["loss", "reward"] = key("loss", "where the KL term is added; reward: k1 only")
    kl_ratio: bool = key(False, "multiply the KL term in the loss by the importance ratio")
    entropy_coef: Number = key(0.0, "weight of the entropy bonus")
    tis_cap: Number | None = key(
        None, "truncated importance sampling (tis): cap of policy / sampler; 0: off; null: 2, with the local engine 0")
    tis_floor: Number = key(0.0, "importance weights below are raised to this, or masked")
    tis_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = key(
        "token_truncate", "one weight per token or response; outside [tis_floor, tis_cap] it is clipped or set to 0")
    tis_with_truncated_sampling: bool = key(False, "allow importance weights with top_p < 1 or top_k > 0: biased")

    @model_validator(mode="before")
    @classmethod
    def _read_algorithm(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = {name: value for name, value in values.items() if value is not None or name not in GRPO}
        return GRPO | ALGORITHMS.get(str(values.get("algorithm")), {}) | values


class Phase(Section):
    """One stretch of training: its rows, its length, its objective."""

    data: Files = key("", "file, folder, hub id, `path@split`, or a list of them")
    data_filter: dict[Text, Band] = key(
        {}, "numeric column -> [low, high]: rows outside, or without a number there, are dropped and counted")
    captions: bool = key(False, "put each row's caption before its images")
    steps: Annotated[int, Field(gt=0, le=10**9)] = key(100, "training steps, one rollout batch each")
    prompts_per_step: Annotated[int, Field(gt=0, le=1 << 20)] = key(64, "prompts per step")
    group_size: Annotated[int, Field(gt=0, le=1 << 16)] = key(8, "responses per prompt (G)")
    max_prompt_tokens: Tokens = key(2048, "longer prompts are dropped and counted; includes image tokens")
    max_response_tokens: Tokens = key(2048, "longer responses are truncated and counted")
    lr: Number = key(1e-6, "peak learning rate")
    temperature: Positive = key(1.0, "sampling temperature, also used when log-probs are computed")
    top_p: Positive = key(1.0, "nucleus sampling; below 1, importance ratios are biased", le=1)
    top_k: Whole = key(0, "top-k sampling; 0: off; above 0, importance ratios are biased")
    updates_per_rollout: Count = key(1, "optimizer steps on one rollout batch")
    reference: Literal["phase", "start"] = key("phase", "KL reference: weights at the phase's or at the run's start")
    freeze: list[Text] = key(
        [], "frozen parts: vision (merger included), merger, language, embedding, or prefixes of tensor names")
    dynamic_sampling: bool = key(False, "resample groups whose rewards are all equal (DAPO)")
    max_refills: Annotated[int, Field(ge=0, le=1000)] = key(3, "resampling rounds; then train on what there is")
    objective: Objective = Objective()


class Prompt(Section):
    system: Text = key("", "system prompt; empty: the model's default")
    template: Text = key("{problem}", "user turn; {problem} includes its <image> markers")
    caption_template: Text = key("Caption: {caption}\n", "put before each <image> if the phase shows captions")
    columns: dict[Text, Text] = key({}, "our column -> the data's, for problem, answer, images, options, caption; "
        "a dot leads into an object: reward_model.ground_truth")
    min_pixels: Pixels = key(3136, "pixels; smaller images are enlarged to this")
    max_pixels: Pixels = key(1003520, "pixels, 784 per image token; larger images are reduced to this")


class Data(Section):
    """How rows of all phases and held-out tasks are read."""

    on_bad_row: Literal["skip", "stop"] = key(
        "skip", "rows without answer, with broken images ...: skip drops and counts them, stop ends the run")
    image_dir: Text = key("", "folder that relative image paths start at; empty: the data file's folder")


class Reward(Section):
    format: Text = key("think_answer", "think_answer | think_boxed | boxed | a regular expression for all responses")
    format_weight: Number = key(0.5, "weight of the format reward (0 or 1)")
    accuracy_weight: Number = key(1.0, "weight of the accuracy reward (0 or 1)")
    option_value: bool = key(True, "multiple choice: an option's value counts as its letter, and the reverse")
    functions: dict[Text, Any] = key({}, "user rewards: path/to/file.py:function -> weight")
    workers: Annotated[int, Field(ge=0, le=256)] = key(0, "judge processes per rank; 0: cores / ranks, at most 16")
    timeout_s: Seconds = key(10.0, "seconds per call of a user function; a slower one ends the run")
    verify_s: Positive = key(1.0, "CPU seconds per built-in judgement; a slower one is killed and scores 0", le=10**6)
    env: list[Text] = key([], "environment variables that user functions may read, such as OPENAI_API_KEY")


class Rollout(Section):
    engine: Literal["local", "vllm", "server"] = key(
        "local", "embedded sampler, vLLM on the same GPU (pip install 'nanolmmr1[vllm]'), or vLLM servers")
    servers: list[Text] = key([], "server: URLs of running vLLM servers, http(s)://[USER:PASSWORD@|KEY@]HOST:PORT")
    server_weights: Literal["nccl", "fixed"] = key("nccl", "server: send weights GPU to GPU after updates, or never")
    server_wait_s: Number = key(60.0, "server: seconds of retries before the run stops if none answers", le=10**8)
    max_sequences: Annotated[int, Field(gt=0, le=1 << 20)] = key(256, "responses decoded at the same time")
    gpu_memory_utilization: Positive = key(0.5, "vllm: fraction of GPU memory for engine weights and KV cache")
    kv_cache_gb: Number = key(0.0, "vllm: KV cache in GiB; 0: what the fraction above leaves, at most 4 on a CPU")
    max_model_len: Whole = key(0, "vllm: longest prompt plus response in tokens; 0: as the phases allow")
    tensor_parallel: Annotated[int, Field(gt=0, le=1024)] = key(1, "vllm: GPUs per engine")
    enforce_eager: bool = key(False, "vllm: no CUDA graphs; starts faster, samples slower; always so on a CPU")
    sleep_level: Annotated[int, Field(ge=1, le=2)] = key(
        2, "vllm: on a GPU, a sleeping engine's weights are 2: dropped, 1: copied to the host (7.5 GB for the 3B)")
    max_mismatch: Number | None = key(
        None, "nats; a larger mean |log-prob of policy - sampler| in a step, of text or images, ends the run; "
        "0: off; none: 0.01 in float32, 0.1 in bfloat16, 0.25 with servers")
    timeout_s: Seconds = key(1800.0, "vllm, server: seconds per call for responses; a slower one stops the run")
    untested_vllm: bool = key(False, "allow a vLLM other than the tested 0.32")


class Optim(Section):
    betas: list[Number] = key([0.9, 0.95], "AdamW: decay rates of the first and second moment")
    eps: Positive = key(1e-8, "AdamW: added to the denominator")
    weight_decay: Number = key(0.0, "AdamW: on matrices only")
    max_grad_norm: Positive = key(1.0, "gradients are clipped to this global norm")
    schedule: Literal["constant", "cosine"] = key("constant", "learning rate over a phase")
    warmup_steps: Whole = key(0, "steps of linear warm-up at each phase's start")
    min_lr_ratio: Number = key(0.1, "cosine ends at this fraction of lr")
    max_bad_steps: Count = key(3, "consecutive steps without a finite update before the run stops")
    weights: Literal["float32", "bfloat16"] = key(
        "float32", "master weights; with bfloat16 the moments are bfloat16 too, and updates are stochastically rounded")


class Pack(Section):
    tokens_per_micro_batch: Count = key(16384, "packed tokens per micro-batch; larger groups are split, with a note")
    attention: Literal["auto", "triton", "varlen", "flash", "sdpa", "reference"] = key(
        "auto", "attention kernel; auto: triton on cuda, sdpa on cpu")
    head: Literal["auto", "triton", "chunked", "reference"] = key("auto", "auto: triton on cuda, chunked on cpu")
    head_logits: Literal["float32", "bfloat16"] = key("float32", "bfloat16: faster; rounds new log-probs, not old ones")
    head_chunk_tokens: Whole = key(0, "scored tokens per chunk of the LM head; 0: by device and vocabulary")
    checkpoint_activations: Literal["none", "swiglu", "all", "budget"] = key(
        "none", "recomputed in backward: nothing, SwiGLU products, everything, or what the budget below requires")
    activation_budget_gb: Number = key(16.0, "budget: GB of activations kept per rank; SwiGLU products go first")


class Checkpoint(Section):
    every_steps: Whole = key(0, "steps between checkpoints; 0: by time, and at the end of a phase")
    every_minutes: Number = key(10.0, "also save when the last checkpoint is this old; 0: never by time", le=10**6)
    keep: Count = key(2, "newest checkpoints to keep, besides the one that evaluated best")
    background: bool = key(True, "write while training continues; a copy of the state is held in host memory")


class Dist(Section):
    """Sharding over the ranks that torchrun started, and how long they wait for each other."""

    shard: Literal["all", "host"] = key("all", "FSDP over all ranks, or inside each host with replicas across (HSDP)")
    offload: bool = key(False, "keep parameters, gradients and optimizer state on the CPU")
    offload_reference: bool = key(False, "keep the KL reference on the CPU while it is not used")
    timeout_s: Seconds = key(3600.0, "seconds a collective may wait; then the process ends, and torchrun may restart")
    hang_s: Seconds = key(300.0, "seconds a rank may block the others before it is named")


class Plan(Section):
    """The hardware that `--plan` plans for. It does not change a run."""

    gpu_gb: Number = key(0.0, "memory per GPU in GB (1e9 bytes); 0: of the GPU present, else 80 (of 85.5)")
    gpus: Whole = key(0, "number of GPUs; 0: as many as torchrun starts, else 1")
    host_gpus: Whole = key(0, "GPUs per host; 0: as many as torchrun starts there, else up to 8")


class Evaluate(Section):
    tasks: dict[Text, Any] = key({}, "name -> {data: ..., captions: false}; held-out rows, or a benchmark "
        "of nanolmmr1.evaluate, answered greedily")
    every_steps: Whole = key(0, "steps between evaluations in a phase; 0: only at its end")
    limit: Whole = key(0, "rows per task; 0: all")
    max_response_tokens: Tokens | None = key(None, "none: the largest of the phases")
    max_prompt_tokens: Tokens | None = key(None, "none: the largest of the phases")


class Caption(Section):
    """How `python -m nanolmmr1.caption` describes pictures. It does not change a run."""

    template: Text = key(
        "Describe this picture of a mathematics problem so exactly that somebody who cannot see it could draw it. "
        "Name every object and where it is; copy all labels, numbers, units, formulas, texts and table entries as they "
        "are written; say which points, lines, angles, sides and areas belong together, what is marked as equal, "
        "parallel or perpendicular, and for graphs the axes, scales and points that can be read. Write only what is "
        "visible: do not calculate, do not draw conclusions, do not solve anything.",
        "instruction below each picture")
    by_kind: dict[Text, Text] = key({}, "kind of a row -> its template; other kinds have the one above")
    kind_column: Text = key("", "the data's column with the kind of a row, such as category")
    max_tokens: Tokens = key(512, "of a caption; longer ones are cut off and counted")
    first_temperature: Number = key(0.0, "temperature of a picture's first caption; 0: greedy")


class Recipe(Section):
    base: Text = key("", "in a file: the recipe that it changes, a built-in name or a path from the file's folder")
    name: Text = key("", "run name; empty: the recipe's file name")
    model: Text = key("", "hub id or folder of a Qwen2.5-VL")
    output: Text = key("", "run folder; empty: runs/<name>")
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = key(0, "seed of everything random")
    resume: Literal["auto", "changed", "never"] = key(
        "auto", "continue from the newest checkpoint; changed: also with other rows or another model path; never: "
        "refuse if there is one")
    world: Literal["", "desk"] = key("", "embedded data set, built first in <output>/world; its files are world:FILE")
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto: cuda if there is a GPU")
    dtype: Literal["auto", "float32", "bfloat16"] = key("auto", "computation; auto: bfloat16 on cuda, float32 on cpu")
    prompt: Prompt = Prompt()
    data: Data = Data()
    reward: Reward = Reward()
    rollout: Rollout = Rollout()
    optim: Optim = Optim()
    pack: Pack = Pack()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    caption: Caption = Caption()
    dist: Dist = Dist()
    plan: Plan = Plan()
    defaults: Phase = Phase()
    phases: dict[str, Phase] = key({}, "name -> phase, in order")
    order: list[Text] = key([], "the phases that run, in this order; empty: all, as written, a base's first")


# Our key -> its names in TRL, EasyR1, verl and OpenRLHF. `phases.` stands for each phase.
_ELSEWHERE = {
    "phases.group_size": "num_generations n n_samples_per_prompt rollout_n",
    "phases.lr": "learning_rate actor_learning_rate",
    "phases.max_response_tokens": "max_completion_length max_new_tokens max_response_length generate_max_len",
    "phases.max_prompt_tokens": "max_prompt_length prompt_max_len",
    "phases.steps": "max_steps total_training_steps num_train_epochs total_epochs total_episodes num_episodes epochs",
    "phases.prompts_per_step": "per_device_train_batch_size train_batch_size rollout_batch_size gen_batch_size "
        "generation_batch_size batch_size",
    "phases.updates_per_rollout": "num_iterations ppo_epochs ppo_mini_batch_size global_batch_size mini_batch_size",
    "phases.objective.kl_coef": "beta kl_loss_coef init_kl_coef kl_beta use_kl_loss",
    "phases.objective.clip_ratio_low": "epsilon clip_ratio cliprange eps_clip",
    "phases.objective.clip_ratio_high": "epsilon_high", "phases.objective.clip_ratio_dual": "clip_ratio_c delta",
    "phases.objective.kl_estimator": "kl_penalty kl_loss_type kl_type",
    "phases.objective.kl_place": "use_kl_in_reward", "phases.objective.loss_avg_mode": "loss_agg_mode",
    "phases.objective.entropy_coef": "entropy_coeff",
    "phases.objective.adv_estimator": "scale_rewards norm_adv_by_std_in_grpo advantage_estimator",
    "phases.objective.loss_type": "importance_sampling_level",
    "phases.objective.tis_cap": "tis_imp_ratio_cap vllm_importance_sampling_cap rollout_is_threshold",
    "phases.data": "train_files train_data dataset_name prompt_data dataset train_dataset",
    "phases.dynamic_sampling": "filter_groups online_filtering dynamic_filtering",
    "phases.max_refills": "max_num_gen_batches max_try_make_batch",
    "phases.freeze": "freeze_vision_tower freeze_vision_modules freeze_vit",
    "model": "model_name_or_path model_path pretrain",
    "output": "output_dir default_local_dir save_checkpoint_path save_path ckpt_path",
    "checkpoint.every_steps": "save_steps save_freq",
    "checkpoint.keep": "save_total_limit save_limit max_actor_ckpt_to_keep max_ckpt_num",
    "evaluate.every_steps": "eval_steps test_freq val_freq", "evaluate.tasks": "val_files val_data eval_dataset",
    "pack.checkpoint_activations": "gradient_checkpointing enable_gradient_checkpointing",
    "dtype": "bf16 fp16 torch_dtype param_dtype", "rollout.engine": "use_vllm vllm_mode vllm_server_base_url",
    "rollout.tensor_parallel": "tensor_model_parallel_size tensor_parallel_size vllm_tensor_parallel_size",
    "rollout.gpu_memory_utilization": "vllm_gpu_memory_utilization", "rollout.max_sequences": "max_num_seqs",
    "pack.tokens_per_micro_batch": "ppo_max_token_len_per_gpu ppo_micro_batch_size_per_gpu micro_train_batch_size "
        "micro_batch_size_per_device_for_update gradient_accumulation_steps",
    "optim.warmup_steps": "warmup_ratio lr_warmup_ratio lr_warmup_steps lr_warmup_steps_ratio",
    "optim.schedule": "lr_scheduler_type lr_scheduler", "optim.betas": "adam_beta1 adam_beta2",
    "reward.functions": "reward_funcs reward_function custom_reward_function remote_rm_url reward_weights",
    "prompt.system": "system_prompt", "prompt.template": "format_prompt",
    "data.image_dir": "image_folders image_root image_folder",
    "prompt.columns": "prompt_key answer_key image_key input_key label_key", "pack.attention": "attn_implementation",
    "resume": "resume_from_checkpoint find_last_checkpoint resume_mode load_checkpoint_path",
    "dist.offload": "param_offload optimizer_offload offload_params cpu_offload",
    "name": "run_name experiment_name project_name",
}  # fmt: skip
ALIASES = {name: ours for ours, names in _ELSEWHERE.items() for name in names.split()}
