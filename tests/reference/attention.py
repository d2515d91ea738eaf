# Generated from chapters/05_attention.ipynb.
# Edit the notebook, then run "make chapters".
"""Slow, obvious versions from chapter 05, Attention."""

from itertools import product

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def reference_attention(
    q: Float[Tensor, "B N T H"],
    k: Float[Tensor, "B K S H"],
    v: Float[Tensor, "B K S H"],
    mask: Bool[Tensor, "B heads queries S"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B N T H"]:
    """One query at a time, in float64; hidden keys are not there."""
    (B, N, T, H), (_, K, S, _) = q.shape, k.shape
    q, k, v = q.double(), k.double(), v.double()
    if mask is None:
        mask = torch.ones(B, 1, 1, S, dtype=torch.bool)
    mask = mask.expand(B, N, T, S)
    outputs = torch.zeros(B, N, T, H, dtype=torch.float64)
    for b, n, t in product(range(B), range(N), range(T)):
        readable = mask[b, n, t].nonzero().squeeze(1)
        if len(readable) == 0:
            continue  # nothing to read: zeros
        keys = k[b, n // (N // K), readable]
        values = v[b, n // (N // K), readable]
        scores = keys @ q[b, n, t] * (H**-0.5 if scale is None else scale)
        outputs[b, n, t] = torch.softmax(scores, dim=0) @ values
    return outputs
