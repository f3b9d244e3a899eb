"""Three cases of a differentiable op: forward, backward, and full (forward, then backward).

Next: providers.py, the other libraries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from bench.harness import Case, Provider


@dataclass
class Op:
    """One implementation: `function(*inputs)` returns a tensor or a tuple of tensors, differentiable."""

    function: Callable | None = None
    ours: bool = False
    refused: str = ""
    needs: float = 0.0
    fresh: bool = False  # it writes to its inputs or the upstream gradient, so each run gets copies
    inputs: Sequence | None = None  # if they differ from the case's, with an upstream gradient of their shape
    upstream: Sequence | None = None
    fold_output: Callable = lambda output: output  # converts to the case's shape, untimed
    fold_gradient: Callable = lambda gradient: gradient


def wider(x):
    """For gold: the same numbers in the next wider dtype; integers unchanged."""
    if not x.is_floating_point():
        return x
    wide = torch.float32 if x.dtype == torch.bfloat16 else torch.float64
    return x.detach().to(wide).requires_grad_(x.requires_grad)


def evaluate(function, inputs, upstream):
    """Outputs, and gradients of the inputs that require one."""
    outputs = forward(function, inputs)
    return outputs, backward(outputs, inputs, upstream)


def forward(function, inputs):
    outputs = function(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def backward(outputs, inputs, upstream):
    return torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], list(upstream))


def by_mode(name, ops, inputs, upstream, gold, work, family="", size=0):
    """The cases `name, forward`, `name, backward` and `name, full`.

    Args:
        ops: name -> Op; inputs: tensors; upstream: a gradient for each output, not uniform and of both signs.
        gold: () -> (outputs, gradients), called at most once.
        work: ((flops, bytes) forward, (flops, bytes) backward). full is their sum: in a training step other ops run
            between them, so the cache is assumed to be empty.
    """
    golds = cache(lambda: tuple(tuple(x.detach() for x in part) for part in gold()))
    full = tuple(map(sum, zip(*work, strict=True)))
    wanted = {"forward": lambda: golds()[0], "backward": lambda: golds()[1], "full": lambda: golds()[0] + golds()[1]}
    for mode, (flops, nbytes) in zip(wanted, (*work, full), strict=True):
        providers = {key: provider(op, mode, inputs, upstream) for key, op in ops.items()}
        yield Case(
            f"{name}, {mode}", wanted[mode], providers, flops, nbytes, f"{family}, {mode}", size, inputs[0].dtype)


def provider(op, mode, inputs, upstream):
    """The provider of an op in one mode."""
    given = (op.inputs or inputs, op.upstream or upstream)

    def start():
        if not op.fresh:
            return given
        inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in given[0]]
        return inputs, [x.clone() for x in given[1]]

    def graph():
        inputs, upstream = start()
        return forward(op.function, inputs), inputs, upstream

    def outputs_only(inputs, _upstream):
        return forward(op.function, inputs)

    def all_of_it(inputs, upstream):
        return evaluate(op.function, inputs, upstream)

    def fold(outputs=(), gradients=()):
        return *(op.fold_output(x.detach()) for x in outputs), *(op.fold_gradient(x) for x in gradients)

    setup, run, compare = {
        "forward": (start, outputs_only, fold),
        "backward": (graph, backward, lambda gradients: fold((), gradients)),
        "full": (start, all_of_it, lambda parts: fold(*parts)),
    }[mode]
    return Provider(run, setup, compare, op.ours, op.needs, op.refused)
