# Generated from chapters/02_softmax_stability.ipynb.
# Edit the notebook, then run "make chapters".
"""Wrong twins from chapter 02, Softmax that never overflows."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pgcore.numerics import SoftmaxState, merge_softmax_states


def softmax_finite_mask(
    scores: Float[Tensor, "*axes"], dim: int = -1
) -> Float[Tensor, "*axes"]:
    """Wrong: masks with the lowest finite number, not ``-inf``.

    A fully masked row becomes uniform: it reads what it may not see.
    Common as ``masked_fill(mask, torch.finfo(dtype).min)``.
    """
    lowest = torch.finfo(scores.dtype).min
    return torch.softmax(scores.clamp(min=lowest), dim)


def softmax_nan_to_num(
    scores: Float[Tensor, "*axes"], dim: int = -1
) -> Float[Tensor, "*axes"]:
    """Wrong: right forwards, NaN backwards.

    Overwriting a NaN cuts it from the output, not from the gradient:
    the backward pass of the softmax multiplies a zero by the NaN that
    it stored. The NaN: pytorch/pytorch issue 41508.
    """
    return torch.softmax(scores, dim).nan_to_num(0.0)


def logsigmoid_clamp(
    x: Float[Tensor, "*axes"],
) -> Float[Tensor, "*axes"]:
    """Wrong: right values everywhere, wrong gradient at exactly 0.

    At its edge ``clamp`` passes the whole gradient, and ``abs`` passes
    none, so the slope at 0 is 1. The right slope is 1/2.
    """
    return x.clamp(max=0) - torch.log1p(torch.exp(-x.abs()))


def logsigmoid_minimum(
    x: Float[Tensor, "*axes"],
) -> Float[Tensor, "*axes"]:
    """Wrong: right values and slopes, wrong second derivative at 0.

    At a tie ``minimum`` passes half of the gradient: right by luck. The
    second derivative is 0 there. The right one is -1/4.
    """
    low = torch.minimum(x, torch.zeros_like(x))
    return low - torch.log1p(torch.exp(-x.abs()))


def softmax_maximum_guard(
    scores: Float[Tensor, "*axes"], dim: int = -1
) -> Float[Tensor, "*axes"]:
    """Wrong: right values, wrong gradient where one score dominates.

    There the sum is exactly 1, and at a tie ``torch.maximum`` passes
    half of its gradient.
    """
    shift = scores.detach().amax(dim, keepdim=True)
    shift = shift.masked_fill(shift == -float("inf"), 0.0)
    exponentials = torch.exp(scores - shift)
    total = exponentials.sum(dim, keepdim=True)
    return exponentials / torch.maximum(total, torch.ones_like(total))


def softmax_shift_by_mean(
    scores: Float[Tensor, "*axes"], dim: int = -1
) -> Float[Tensor, "*axes"]:
    """Wrong: subtracts the mean, so a high score still overflows.

    Only the maximum makes every exponent <= 0 (claims C25, C26).
    """
    exponentials = torch.exp(scores - scores.mean(dim, keepdim=True))
    return exponentials / exponentials.sum(dim, keepdim=True)


def softmax_global_maximum(
    scores: Float[Tensor, "*axes"], dim: int = -1
) -> Float[Tensor, "*axes"]:
    """Wrong: one maximum for the whole tensor, not one a row.

    No overflow, but a row far below that maximum underflows to 0/0.
    The notes' ``max(a_i)`` does not say over which scores (C25).
    """
    exponentials = torch.exp(scores - scores.max())
    return exponentials / exponentials.sum(dim, keepdim=True)


def softmax_no_shift(
    scores: Float[Tensor, "*axes"], dim: int = -1
) -> Float[Tensor, "*axes"]:
    """Wrong: as written; overflows above 88.72 in float32 (C23)."""
    exponentials = torch.exp(scores)
    return exponentials / exponentials.sum(dim, keepdim=True)


def log_softmax_of_softmax(
    scores: Float[Tensor, "*axes"], dim: int = -1
) -> Float[Tensor, "*axes"]:
    """Wrong: the logarithm of weights that underflow to 0 (C27)."""
    return torch.log(torch.softmax(scores, dim))


def logsigmoid_log_of_sigmoid(
    x: Float[Tensor, "*axes"],
) -> Float[Tensor, "*axes"]:
    """Wrong: ``-inf`` where the sigmoid underflows (C27, C37)."""
    return torch.log(torch.sigmoid(x))


def softmax_without_division(
    scores: Float[Tensor, "*axes"], dim: int = -1
) -> Float[Tensor, "*axes"]:
    """Wrong: exponentiates the rounding error of the logsumexp.

    Finite, and inaccurate for large scores: Blanchard et al. 2021.
    """
    total = torch.logsumexp(scores, dim, keepdim=True)
    return torch.exp(scores - total)


def cross_entropy_mean_over_all(
    logits: Float[Tensor, "*positions classes"],
    targets: Int[Tensor, "*positions"],
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Wrong: divides by all positions, so padding shrinks the loss."""
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, -2),
        targets.flatten(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    return losses.mean()


def cross_entropy_smooths_others(
    logits: Float[Tensor, "*positions classes"],
    targets: Int[Tensor, "*positions"],
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Wrong: spreads the smoothing over the other classes only.

    In torch the right class gets its share, too.
    """
    classes = logits.shape[-1]
    scale = classes / (classes - 1)
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, -2),
        targets.flatten(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing * scale,
    )


def merge_forgets_output(left: SoftmaxState, right: SoftmaxState) -> SoftmaxState:
    """Wrong: rescales the sum, but not the output that goes with it."""
    merged = merge_softmax_states(left, right)
    return merged._replace(weighted=left.weighted + right.weighted)


def merge_without_rescale(left: SoftmaxState, right: SoftmaxState) -> SoftmaxState:
    """Wrong: adds sums that are measured from different maxima."""
    return SoftmaxState(
        torch.maximum(left.maximum, right.maximum),
        left.total + right.total,
        left.weighted + right.weighted,
    )
