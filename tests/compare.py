"""What kernel tests compare by. A NaN counts as infinitely wrong: Python's `max` would pass over it."""

import torch


def run(function, tensors, device="cpu"):
    """Outputs and gradients on the CPU, under fixed upstream gradients of both signs."""
    tensors = [t.to(device).requires_grad_() for t in tensors]
    out = function(*tensors)
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype) for x in out]
    grads = torch.autograd.grad(out, tensors, upstream)
    return [x.detach().cpu() for x in (*out, *grads)]


def largest(ours, gold):
    """Largest difference of each pair."""
    off = [(a.double() - b).abs().max() for a, b in zip(ours, gold, strict=True)]
    return [float(x.nan_to_num(nan=float("inf"))) for x in off]


def errors(ours, gold):
    """`largest` in units of each gold's largest value."""
    return [off / float(b.abs().max()) for off, b in zip(largest(ours, gold), gold, strict=True)]


def assert_within_twice(ours, plain, gold):
    """Errors at most twice plain torch's; of few numbers that may be by luck, so the last rounding comes on top."""
    for x, a, b in zip(ours, errors(ours, gold), errors(plain, gold), strict=True):
        assert a <= 2 * b + max(1e-6, torch.finfo(x.dtype).eps / 2)
