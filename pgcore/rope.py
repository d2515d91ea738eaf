# Generated from chapters/08_rotary_positions.ipynb.
# Edit the notebook, then run "make chapters".
"""Rotary positions: queries and keys turn, by angles that grow.

RoPE (Su et al., 2021) in the half-split layout of Gemma's weights.
Angles come from tensors of positions, in float32, once per forward.
There is no table, so no maximum length, and no buffer whose dtype a
cast could change.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def rope_angles(
    positions: Int[Tensor, "B T"],
    head_dim: int,
    *,
    base: float = 10_000.0,
) -> Float[Tensor, "B T half"]:
    """How far each pair of features turns, in radians.

    Position x speed: pair i turns base ** (-2 i / head_dim) a place,
    and half is head_dim / 2. float32 always: positions are exact to
    2 ** 24, and an angle is wrong by less than 1e-6 of itself. Negative
    positions turn backwards.
    Raises ValueError unless positions are integers [B, T], head_dim is
    even and at least 2, and base is above 0.
    Source: Su et al. (2021), section 3.2.2.

    Built in chapter 08, Rotary positions.
    """
    is_integer = not (
        positions.is_floating_point()
        or positions.is_complex()
        or positions.dtype == torch.bool
    )
    if positions.ndim != 2 or not is_integer:
        raise ValueError(
            "positions: expected integers [B, T], "
            f"found {positions.dtype} {tuple(positions.shape)}"
        )
    if head_dim < 2 or head_dim % 2 or not base > 0:
        raise ValueError(
            "head_dim, base: expected an even number from 2 on and a "
            f"number above 0, found {head_dim} and {base}"
        )
    exponents = torch.arange(
        0, head_dim, 2, dtype=torch.float32, device=positions.device
    )
    speeds = 1.0 / base ** (exponents / head_dim)
    return positions[..., None].float() * speeds


def apply_rope(
    x: Float[Tensor, "B heads T H"],
    cos: Float[Tensor, "B 1 T half"],
    sin: Float[Tensor, "B 1 T half"],
) -> Float[Tensor, "B heads T H"]:
    """Turn the pair (feature i, feature i + H / 2) by angle i.

    cos and sin: of the angles, for all heads alike. The result has the
    dtype of x; if they are wider, it is rounded once, at the end. A NaN
    spoils its own pair and nothing else.
    Raises ValueError for other shapes, and for what is not real floats.
    Source: Su et al. (2021), section 3.4.2; the pairs are big_vision's.

    Built in chapter 08, Rotary positions.
    """
    B, _, T, H = x.shape if x.ndim == 4 else (0, 0, 0, 0)
    turns = (B, 1, T, H // 2)
    fit = x.ndim == 4 and cos.shape == sin.shape == turns and H % 2 == 0
    real = cos.is_floating_point() and sin.is_floating_point()
    if not (fit and real and x.is_floating_point()):
        found = [(t.dtype, *t.shape) for t in (x, cos, sin)]
        raise ValueError(
            "x, cos, sin: expected floats [B, heads, T, H] and twice "
            f"[B, 1, T, H / 2], found {found}; for one row of "
            "positions and several of x: positions.expand(B, -1)"
        )
    first, second = x.chunk(2, dim=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.cat(turned, dim=-1).to(x.dtype)


def rotation(
    positions: Int[Tensor, "B T"],
    head_dim: int,
    *,
    base: float = 10_000.0,
    dtype: torch.dtype = torch.float32,
) -> Callable[[Tensor], Tensor]:
    """Turn what stands at ``positions``: once made, for every layer.

    Give it to each ``Attention`` as ``rotate``. Angles, cosines, sines
    are computed in float32; only then the last two are cast to dtype.
    Pass the dtype of queries and keys: with wider cosines the result is
    rounded otherwise than in Hugging Face, and nothing is raised.
    Raises ValueError as ``rope_angles`` does.
    Source: Su et al. (2021), section 3.2; Gemma in Hugging Face.

    Built in chapter 08, Rotary positions.
    """
    angles = rope_angles(positions, head_dim, base=base)[:, None]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return partial(apply_rope, cos=cos, sin=sin)


def token_positions(
    is_token: Bool[Tensor, "B S"],
) -> Int[Tensor, "B S"]:
    """Number the tokens of each row 0, 1, 2, ..., without padding.

    Padding gets the number of the token before it, or 0: nobody may
    read it anyway.
    Raises ValueError unless is_token is boolean [B, S].
    Source: position_ids of a padded batch in Hugging Face, big_vision.

    Built in chapter 08, Rotary positions.
    """
    if is_token.dtype != torch.bool or is_token.ndim != 2:
        raise ValueError(
            "is_token: expected booleans [B, S], "
            f"found {is_token.dtype} {tuple(is_token.shape)}"
        )
    return (is_token.long().cumsum(dim=-1) - 1).clamp(min=0)


__all__ = ["apply_rope", "rope_angles", "rotation", "token_positions"]
