# Generated from chapters/08_rotary_positions.ipynb.
# Edit the notebook, then run "make chapters".
"""Slow, obvious versions from chapter 08, Rotary positions."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def reference_rope(
    x: Float[Tensor, "B heads T H"],
    positions: Int[Tensor, "B T"],
    base: float = 10_000.0,
) -> Float[Tensor, "B heads T H"]:
    """One complex number a pair, one complex product, in complex128."""
    half = x.shape[-1] // 2
    first, second = x[..., :half].double(), x[..., half:].double()
    pair = torch.arange(half, dtype=torch.float64)
    angle = positions[:, None, :, None] * base ** (-pair / half)
    turned = torch.complex(first, second) * torch.exp(1j * angle)
    return torch.cat((turned.real, turned.imag), dim=-1)
