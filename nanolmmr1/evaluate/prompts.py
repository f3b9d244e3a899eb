"""The prompts to choose from: they move a model's score by more than training does.

LMM-R1 evaluates the untrained model without its think prompt, which that model does not know. So does `auto`: a model
that a run has exported gets the prompt of its run, any other one `boxed`.

Next: answers.py, asking and judging.
"""

from pathlib import Path
from typing import NamedTuple

import yaml

from nanolmmr1 import config
from nanolmmr1.errors import UserError
from nanolmmr1.schema import Prompt, Recipe

KINDS = ("auto", "boxed", "paper", "official", "recipe")
BOXED = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."  # of Qwen2.5's models
PAPER = "lmm_r1_3b"  # the recipe with LMM-R1's prompt


class Asking(NamedTuple):
    """How a model is asked."""

    kind: str  # one of KINDS, but for auto
    prompt: Prompt
    format: str  # what its responses should be like, as reward.format


def run_of(model: str) -> Path | None:
    """The folder of the run that exported a model; None if no run of ours has."""
    folder = Path(model).expanduser()
    return folder.parent if (folder.parent / "recipe.yaml").is_file() and (folder / "config.json").is_file() else None


def exported(model: str) -> str:
    """The model of a run, if the folder of the run is named; else the name as it is."""
    inside = Path(model).expanduser() / "model"
    return str(inside) if run_of(str(inside)) else model


def choose(kind: str, cfg: Recipe) -> Asking:
    """The prompt of a kind, for the recipe's model. Pixel limits and columns stay the recipe's.

    Raises:
        UserError: the recipe of the run that made the model cannot be read.
    """
    if kind == "auto":
        run = run_of(cfg.model)
        return _of_run(run, cfg.prompt) if run else choose("boxed", cfg)
    if kind == "recipe":
        return Asking(kind, cfg.prompt, cfg.reward.format)
    if kind == "paper":
        paper = config.load(PAPER, ["model=none", "defaults.data=none"])
        return Asking(kind, _with(cfg.prompt, paper.prompt.system, paper.prompt.template), paper.reward.format)
    return Asking(kind, _with(cfg.prompt, "", BOXED if kind == "boxed" else "{problem}"), "boxed")


def _with(prompt: Prompt, system: str, template: str) -> Prompt:
    return prompt.model_copy(update={"system": system, "template": template})


def _of_run(run: Path, prompt: Prompt) -> Asking:
    try:
        tree = yaml.safe_load((run / "recipe.yaml").read_bytes())
        theirs, format = Prompt.model_validate(tree.get("prompt") or {}), str(tree["reward"]["format"])
    except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run / 'recipe.yaml'} is no recipe ({type(error).__name__}), so the prompt that the model "
                        "was trained with is unknown: name one with --prompt") from error
    return Asking("recipe", _with(prompt, theirs.system, theirs.template), format)
