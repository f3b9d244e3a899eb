"""Benchmark of the samplers in tokens per second.

    python -m bench.rollout [FOLDER]

32 responses of 64 tokens, 8 per prompt, from a 20 M-parameter model with Qwen2.5-VL's vocabulary of 151,936. The
target of the local sampler on two idle CPU cores is 800 tokens/s. With a model folder, that model is sampled, and by
vLLM too if it is installed: same prompts, same number of tokens. CPU seconds are printed as well, since other processes
do not change them. The log-probs of every response are compared with the trainer's first.
"""

import importlib.util
import json
import platform
import sys
import time

import torch

from nanolmmr1.data.prompt import Prompt
from nanolmmr1.data.rows import Row
from nanolmmr1.model import weights
from nanolmmr1.model.qwen import ModelConfig, Qwen25VL, VisionConfig
from nanolmmr1.rollout.local import LocalSampler
from nanolmmr1.rollout.sampler import SamplingParams
from nanolmmr1.schema import Phase, Recipe
from nanolmmr1.update.pack import pack_groups
from nanolmmr1.update.policy import Policy

PROMPTS, GROUP, PROMPT_TOKENS, TOKENS, RUNS = 4, 8, 64, 64, 3


def small_model():
    vision = VisionConfig(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128)
    torch.manual_seed(0)
    model = Qwen25VL(ModelConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=151_936, vision=vision, mrope_section=(4, 6, 6)))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02) if p.ndim > 1 else None
    return model


def text_prompt(seed, vocabulary):
    ids = torch.randint(min(vocabulary, 151_643), (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(seed))
    return Prompt(
        row=Row("", ""), ids=ids, positions=torch.arange(PROMPT_TOKENS).expand(3, -1), patches=torch.zeros(0, 1176),
        grid=torch.zeros(0, 3, dtype=torch.int64), image_slots=torch.zeros(0, dtype=torch.int64), text="")


def main(folder=None):
    device = "cuda" if folder and torch.cuda.is_available() else "cpu"
    model = weights.load(folder, device=device) if folder else small_model()
    cfg = Recipe(phases={"bench": Phase(max_prompt_tokens=PROMPT_TOKENS, max_response_tokens=TOKENS)})
    cfg.evaluate.max_prompt_tokens, cfg.evaluate.max_response_tokens = PROMPT_TOKENS, TOKENS
    vocabulary = model.cfg.vocab_size
    banned = tuple(range(151_652, 151_657)) if vocabulary > 151_657 else ()
    policy = Policy(model, cfg.pack, cfg.optim, banned, torch.bfloat16 if device == "cuda" else torch.float32)
    prompts = [text_prompt(i, vocabulary) for i in range(PROMPTS)]
    bench("local", LocalSampler(policy), policy, prompts)
    if folder and importlib.util.find_spec("vllm"):
        from nanolmmr1.rollout.vllm import VllmSampler

        bench("vllm", VllmSampler(policy, cfg, folder), policy, prompts)


def bench(engine, sampler, policy, prompts):
    params = SamplingParams(GROUP, TOKENS, banned_ids=policy.banned_ids)

    def run():
        return sampler.generate(prompts, params, [(0, i) for i in range(PROMPTS)])

    groups = run()
    packs, _ = pack_groups(groups, 1 << 14)
    sampled = torch.cat([r.logp for g in groups for r in g.responses])
    error = max(float((policy.logprobs(p, 1.0)[0].cpu() - sampled[p.flat_index]).abs().max()) for p in packs)
    limit = {"local": 1e-4, "vllm": 1e-3}[engine] if policy.dtype == torch.float32 else 0.5  # rounding differs
    assert error < limit, f"log-probs of {engine} differ from the trainer's by {error}"

    rows = []
    for _ in range(RUNS):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        rows.append((time.perf_counter() - wall, time.process_time() - cpu))
    wall, cpu = (sorted(column)[RUNS // 2] for column in zip(*rows, strict=True))
    count = PROMPTS * GROUP * TOKENS
    print(f"{engine:5} {count} tokens: {count / wall:.0f} tokens/s, {wall:.2f} s, {cpu:.2f} s of CPU; "
          f"log-prob error {error:.1e}")
    print(json.dumps({
        "bench": "rollout", "engine": engine, "tokens_per_s": count / wall, "wall_s": wall, "cpu_s": cpu,
        "logp_error": error, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "machine": platform.processor()}))


if __name__ == "__main__":
    main(*sys.argv[1:2])
