"""Attention as two matrix products, for training in bfloat16 on a CPU.

Written by hand, for chapter 16: nothing in it that chapter 05 has not derived.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pgcore.attention import require_heads


def attend_by_matmul(
    q: Float[Tensor, "B N T H"],
    k: Float[Tensor, "B K S H"],
    v: Float[Tensor, "B K S H"],
    mask: Bool[Tensor, " B #N #T S"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B N T H"]:
    """``attend`` as two matrix products, for training in bfloat16 on a CPU.

    It was faster there than torch's fused kernel when the tiny model was trained.
    Queries need something to read: a row of False gives no zeros here.
    Arguments and errors as for ``attend``.
    """
    require_heads(q, k, v, mask)
    (B, N, T, H), K = q.shape, k.shape[1]
    factor = H**-0.5 if scale is None else scale
    stacked = (q * factor).reshape(B, K, -1, H)
    scores = (stacked @ k.transpose(-2, -1)).view(B, N, T, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    return (weights.view(B, K, N // K * T, -1) @ v).reshape(B, N, T, H)
