# Generated from chapters/02_softmax_stability.ipynb.
# Edit the notebook, then run "make chapters".
"""Softmax and its relatives, written so that they cannot overflow.

Every function first subtracts the maximum of a row. Then each exponent
is at most 0, and the sum of n exponentials lies between 1 and n. Half
precision is computed in float32 and rounded once, at the end.

Where all of a row is masked (``-inf``), weights are 0, their logarithms
and the log-sum are ``-inf``, and no gradient is NaN. A NaN or ``+inf``
gives what it gives in torch: a sign that something broke earlier.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


def _widened(name: str, scores: Tensor) -> Tensor:
    """The scores in float32, or in float64 if that is what they are."""
    if not scores.is_floating_point():
        raise ValueError(f"{name}: expected floats, found {scores.dtype}")
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _shifted(scores: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Scores minus the maximum of their row, and that maximum."""
    scores = _widened("scores", scores)
    if not -scores.ndim <= dim < scores.ndim or scores.shape[dim] == 0:
        raise ValueError(
            f"scores: expected at least one along axis {dim}, "
            f"found shape {tuple(scores.shape)}"
        )
    # No result depends on the shift, so it needs no gradient.
    maximum = scores.detach().amax(dim, keepdim=True)
    # Before a NaN is made: -inf - (-inf) would be one.
    shift = maximum.masked_fill(maximum == -math.inf, 0.0)
    return scores - shift, maximum


def softmax(scores: Float[Tensor, "*axes"], dim: int = -1) -> Float[Tensor, "*axes"]:
    """Weights >= 0 that sum to 1 along ``dim``; same shape and dtype.

    Fully masked row: weights 0, gradient 0 (torch: NaN, NaN).
    Raises: ValueError for integers, a missing or an empty axis.
    Source: Blanchard, Higham and Higham 2021, shifted softmax.

    Built in chapter 02, Softmax that never overflows.
    """
    shifted, _ = _shifted(scores, dim)
    exponentials = shifted.exp()
    # At least 1, except that it is 0 in a fully masked row. At just 1
    # clamp() passes all of the gradient, torch.maximum() only half.
    total = exponentials.sum(dim, keepdim=True).clamp(min=1)
    return (exponentials / total).to(scores.dtype)


def logsumexp(scores: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
    """log(sum(exp(scores))) along ``dim``, which leaves the shape.

    Fully masked row: ``-inf``, gradient 0 (torch: ``-inf``, NaN).
    Raises: ValueError for integers, a missing or an empty axis.
    Source: Blanchard, Higham and Higham 2021, shifted log-sum-exp.

    Built in chapter 02, Softmax that never overflows.
    """
    shifted, maximum = _shifted(scores, dim)
    total = shifted.exp().sum(dim, keepdim=True).clamp(min=1)
    # Where the maximum is +inf, inf - inf has made a NaN of the total.
    log_total = total.log().masked_fill(maximum == math.inf, 0.0)
    return (maximum + log_total).squeeze(dim).to(scores.dtype)


def log_softmax(
    scores: Float[Tensor, "*axes"], dim: int = -1
) -> Float[Tensor, "*axes"]:
    """The logarithm of ``softmax``; same shape and dtype.

    Fully masked row: ``-inf``, the logarithm of 0 (torch: NaN).
    Raises: ValueError for integers, a missing or an empty axis.
    Source: scores - logsumexp(scores), with one shift for both.

    Built in chapter 02, Softmax that never overflows.
    """
    shifted, _ = _shifted(scores, dim)
    total = shifted.exp().sum(dim, keepdim=True).clamp(min=1)
    return (shifted - total.log()).to(scores.dtype)


def logsigmoid(x: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """log(sigmoid(x)), finite for finite ``x``; same shape and dtype.

    Raises: ValueError for integers.
    Source: minus the shifted log-sum-exp of the two scores 0 and -x.

    Built in chapter 02, Softmax that never overflows.
    """
    wide = _widened("x", x)
    # Two smooth formulas: min(x, 0) and |x| have kinks at 0. No exp()
    # sees a large number, so nothing infinite waits in the gradient.
    low = wide.masked_fill(wide > 0, 0.0)
    high = wide.masked_fill(wide < 0, 0.0)
    left = low - torch.log1p(low.exp())
    right = -torch.log1p((-high).exp())
    return torch.where(wide < 0, left, right).to(x.dtype)


def cross_entropy(
    logits: Float[Tensor, "*positions classes"],
    targets: Int[Tensor, "*positions"],
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Mean of -log softmax(logits)[target] over the targets that count.

    Shapes: one target for each row of logits, a class or
    ``ignore_index``. Half-precision logits give a float32 loss. If no
    target counts, the loss and its gradient are 0 (torch: NaN).
    ``label_smoothing`` is the share of each target that is spread
    evenly over all classes.
    Raises: ValueError for shapes that differ, targets that are no
    integers, smoothing outside [0, 1]; from torch, targets out of range.
    Source: ``torch.nn.functional.cross_entropy``, reduction "mean".

    Built in chapter 02, Softmax that never overflows.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            "targets: expected one for each row of logits, shape "
            f"{tuple(logits.shape[:-1])}, found {tuple(targets.shape)}"
        )
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets: expected integers, found {targets.dtype}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected 0 to 1, found {label_smoothing}")
    log_weights = log_softmax(_widened("logits", logits))
    ignored = targets == ignore_index
    classes = targets.masked_fill(ignored, 0).long()
    losses = -log_weights.gather(-1, classes.unsqueeze(-1)).squeeze(-1)
    if label_smoothing:  # else 0 * -inf, for a masked class, is NaN
        spread = -log_weights.mean(-1)
        losses = (1 - label_smoothing) * losses
        losses = losses + label_smoothing * spread
    count = (~ignored).sum().clamp(min=1)
    return losses.masked_fill(ignored, 0).sum() / count


class SoftmaxState(NamedTuple):
    """What an online softmax remembers of the scores it has seen.

    ``maximum`` is the largest score m, ``-inf`` if there was none.
    ``total`` is the sum of exp(score - m): 0 if none, else at least 1.
    ``weighted`` is the sum of exp(score - m) * value.
    Source: Milakov and Gimelshein 2018; with values, Dao et al. 2022.

    Built in chapter 02, Softmax that never overflows.
    """

    maximum: Float[Tensor, "*batch T"]
    total: Float[Tensor, "*batch T"]
    weighted: Float[Tensor, "*batch T H"]

    @property
    def output(self) -> Float[Tensor, "*batch T H"]:
        """softmax(scores) @ values; 0 if no score was seen."""
        return self.weighted / self.total.clamp(min=1).unsqueeze(-1)


def softmax_state(
    scores: Float[Tensor, "*batch T S"],
    values: Float[Tensor, "*batch S H"],
) -> SoftmaxState:
    """The state of one block; (-inf, 0, 0) if all of it is masked.

    Raises: ValueError for integers, no scores, shapes that differ.
    Source: Dao et al. 2022, one block of keys and values.

    Built in chapter 02, Softmax that never overflows.
    """
    expected = (*scores.shape[:-2], scores.shape[-1])
    if values.shape[:-1] != expected:
        raise ValueError(
            f"values: expected shape {expected} and a width, "
            f"found {tuple(values.shape)}"
        )
    shifted, maximum = _shifted(scores, -1)
    exponentials = shifted.exp()
    weighted = exponentials @ values.to(exponentials.dtype)
    total = exponentials.sum(-1)
    return SoftmaxState(maximum.squeeze(-1), total, weighted)


def merge_softmax_states(left: SoftmaxState, right: SoftmaxState) -> SoftmaxState:
    """The state of two blocks together.

    Associative and commutative, up to rounding.
    Raises: ValueError if the shapes of the states differ.
    Source: Milakov and Gimelshein 2018, the parallel form.

    Built in chapter 02, Softmax that never overflows.
    """
    if left.weighted.shape != right.weighted.shape:
        raise ValueError(
            f"right: expected shape {tuple(left.weighted.shape)}, "
            f"found {tuple(right.weighted.shape)}"
        )
    maximum = torch.maximum(left.maximum, right.maximum)
    shift = maximum.masked_fill(maximum == -math.inf, 0.0)
    shrink_left = (left.maximum - shift).exp()
    shrink_right = (right.maximum - shift).exp()
    total = shrink_left * left.total + shrink_right * right.total
    from_left = shrink_left.unsqueeze(-1) * left.weighted
    from_right = shrink_right.unsqueeze(-1) * right.weighted
    return SoftmaxState(maximum, total, from_left + from_right)


__all__ = [
    "SoftmaxState",
    "cross_entropy",
    "log_softmax",
    "logsigmoid",
    "logsumexp",
    "merge_softmax_states",
    "softmax",
    "softmax_state",
]
