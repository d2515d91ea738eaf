# Generated from chapters/04_normalization.ipynb.
# Edit the notebook, then run "make chapters".
"""Slow, obvious versions from chapter 04, Normalization."""

import torch
from jaxtyping import Float
from torch import Tensor


def layer_norm_by_formula(
    x: Float[Tensor, "... D"],
    weight: Float[Tensor, " D"],
    bias: Float[Tensor, " D"],
    eps: float,
) -> Float[Tensor, "... D"]:
    """Subtract each vector's mean, divide by its standard deviation."""
    centred = x - x.mean(-1, keepdim=True)
    var = centred.square().mean(-1, keepdim=True)
    return centred / torch.sqrt(var + eps) * weight + bias


def rms_norm_by_formula(
    x: Float[Tensor, "... D"], weight: Float[Tensor, " D"], eps: float
) -> Float[Tensor, "... D"]:
    """Gemma's order: all in float32, rounded once, at the end."""
    wide = x.float()
    mean_square = wide.square().mean(-1, keepdim=True)
    normal = wide * torch.rsqrt(mean_square + eps)
    return (normal * (1 + weight.float())).type_as(x)


def pre_norm(x, norm, sublayer):
    """Read a normalised copy of the stream, add to the stream itself."""
    return x + sublayer(norm(x))
