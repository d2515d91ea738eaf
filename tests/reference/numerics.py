# Generated from chapters/02_softmax_stability.ipynb.
# Edit the notebook, then run "make chapters".
"""Slow, obvious versions from chapter 02, Softmax that never overflows."""

import math


def softmax_decimal(scores: list[float], digits: int = 50) -> list[float]:
    """The formula as written, in decimals too wide to overflow."""
    from decimal import Decimal, localcontext

    with localcontext() as context:
        context.prec = digits
        exponentials = [Decimal(score).exp() for score in scores]
        total = sum(exponentials)
        return [float(e / total) for e in exponentials]


def online_softmax_loop(
    scores: list[float], values: list[float]
) -> list[tuple[float, float, float, float]]:
    """After each score: m, l, o and the factor of the rescaling."""
    m, total, output = -math.inf, 0.0, 0.0
    history = []
    for x, v in zip(scores, values, strict=True):
        new_m = max(m, x)
        rescale = math.exp(m - new_m)
        weight = math.exp(x - new_m)
        total = rescale * total + weight
        output = rescale * output + weight * v
        m = new_m
        history.append((m, total, output, rescale))
    return history
