"""The format reward: whether a response has the requested shape.

Next: extract.py, where the final answer stands.
"""

import re
from collections.abc import Callable

from nanolmmr1.errors import UserError
from nanolmmr1.reward.extract import last_boxed


def _has_tags(response: str, *tags: str) -> bool:
    return all(response.count(f"<{tag}>") == response.count(f"</{tag}>") == 1 for tag in tags)


def _think_answer(response: str) -> bool:
    response = response.strip()
    between = response.partition("</think>")[2].partition("<answer>")[0]
    return (
        _has_tags(response, "think", "answer")
        and response.startswith("<think>")
        and response.endswith("</answer>")
        and not between.strip()
        and response.index("</think>") < response.index("<answer>")
    )


def _think_boxed(response: str) -> bool:
    response = response.strip()
    boxed = last_boxed(response.partition("</think>")[2])
    return _has_tags(response, "think") and response.startswith("<think>") and boxed is not None


FORMATS: dict[str, Callable[[str], bool]] = {
    "think_answer": _think_answer,
    "think_boxed": _think_boxed,
    "boxed": lambda response: last_boxed(response) is not None,
}


def format_reward(response: str, format: str) -> float:
    r"""1.0 if the whole response has the format, else 0.0.

    Args:
        format: one of these, or a regular expression.
            think_answer: `<think>...</think>`, optional whitespace, `<answer>...</answer>` and nothing else, each tag
            exactly once. LMM-R1 (arXiv 2503.07536) allows no whitespace between the blocks; we do, and around them too.
            think_boxed: one `<think>...</think>`, then text with a closed \boxed{...}.
            boxed: a closed \boxed{...} anywhere.
            These take linear time. A regular expression (re.fullmatch with DOTALL) may never end: run it in a worker.
    """
    if format in FORMATS:
        return float(FORMATS[format](response))
    return float(re.fullmatch(format, response, re.DOTALL) is not None)


def check_format(format: str) -> None:
    """Check the recipe's format.

    Raises:
        UserError: it is neither a named format nor a valid regular expression.
    """
    if format in FORMATS:
        return
    if re.fullmatch(r"\w*", format):
        raise UserError(f"reward.format={format!r}: one of {', '.join(FORMATS)}, or a regular expression, is needed")
    try:
        re.compile(format, re.DOTALL)
    except re.error as error:
        raise UserError(f"reward.format={format!r} is no regular expression: {error}") from error
