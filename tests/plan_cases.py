"""Small models and packs, and the bytes that their real update holds: shared by test_plan.py and ranks_plan.py."""

import torch

from nanolmmr1 import config, schema
from nanolmmr1.data.group import Group, Response
from nanolmmr1.data.prompt import Prompt
from nanolmmr1.model.qwen import ModelConfig, Qwen25VL, VisionConfig
from nanolmmr1.run.fake_step import Live
from nanolmmr1.update.objective import Tokens
from nanolmmr1.update.pack import Pack, build, deal
from nanolmmr1.update.policy import Policy

VISION = VisionConfig(depth=3, hidden_size=64, intermediate_size=160, num_heads=4, out_hidden_size=64,
                      fullatt_block_indexes=(0,))


def model_config(depth: int) -> ModelConfig:
    return ModelConfig(hidden_size=64, intermediate_size=192, num_hidden_layers=depth, num_attention_heads=4,
                       num_key_value_heads=2, vocab_size=500, vision=VISION, mrope_section=(2, 3, 3))


def recipe(pack=None, freeze=(), prompts=3, overrides=(), **phase) -> schema.Recipe:
    values = dict(group_size=4, max_response_tokens=60, prompts_per_step=prompts, freeze=list(freeze)) | phase
    cfg = config.load("single", overrides=["model=none", "device=cpu", "phases.train.data=none", *overrides])
    for key, value in values.items():
        setattr(cfg.phases["train"], key, value)
    for key, value in (pack or {}).items():
        setattr(cfg.pack, key, value)
    return cfg


def group(prompt: int, response: int, responses: int, images: int) -> Group:
    """A group whose prompt holds images of 64 patches."""
    slots = torch.arange(16 * images)
    made = Prompt(None, torch.zeros(prompt, dtype=torch.int64), torch.arange(prompt).expand(3, -1),
                  torch.zeros(64 * images, VISION.patch_dim), torch.tensor([[1, 8, 8]] * images).view(-1, 3), slots, "")
    return Group(made, [Response(torch.ones(response, dtype=torch.int64), torch.zeros(response), "stop")
                        for _ in range(responses)])


def case(
    depth: int, how: str, images: int, dtype: str = "float32", freeze=()
) -> tuple[schema.Recipe, ModelConfig, Pack]:
    """A recipe, a model and a pack; how: pack.checkpoint_activations."""
    cfg = recipe({"checkpoint_activations": how, "activation_budget_gb": 0.001 * depth}, freeze)
    cfg.dtype = dtype
    pieces = deal([group(70, 40, 4, images) for _ in range(2)], 1 << 14)[0][0][0]
    return cfg, model_config(depth), build(pieces, VISION.patch_dim if images else 0)


def real_update(cfg: schema.Recipe, model: Qwen25VL, pack: Pack, dtype: torch.dtype) -> int:
    """Bytes alive at the peak of a second micro-batch, weights and gradients among them."""
    phase = cfg.phases["train"]
    policy = Policy(model, cfg.pack, cfg.optim, (), dtype)
    policy.start_phase(phase)
    for parameter in policy.trained.values():
        parameter.grad = torch.zeros_like(parameter)
    live, n = Live(), pack.num_scored
    for parameter in model.parameters():
        for tensor in filter(lambda t: t is not None, (parameter, parameter.grad)):
            live.see(tensor.to_local() if hasattr(tensor, "to_local") else tensor)
    for tensor in vars(pack).values():
        if isinstance(tensor, torch.Tensor) and tensor is not pack.grid:
            live.see(tensor)
    with live:
        tokens = Tokens(torch.ones(n), torch.ones(n), torch.zeros(n, dtype=torch.int64), torch.zeros(n))
        live.restart()
        policy.backward(pack, tokens, phase.objective, 1.0)
    return live.peak
