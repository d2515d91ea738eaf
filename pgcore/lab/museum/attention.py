# Generated from chapters/05_attention.ipynb.
# Edit the notebook, then run "make chapters".
"""Wrong twins from chapter 05, Attention."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pgcore.attention import Attention, attend, attention_mask, attention_weights
from pgcore.numerics import softmax


def view_without_transpose(
    x: Float[Tensor, "B T features"], head_dim: int
) -> Float[Tensor, "B heads T H"]:
    """A view alone: right shape, but tokens and heads are mixed up.

    The notes have the transpose (C81); many a first version has not.
    """
    batch, tokens, features = x.shape
    return x.reshape(batch, features // head_dim, tokens, head_dim)


def scaled_by_width(q, k, v, mask=None, scale=None):
    """Divides by sqrt(d_model), as the notes do (C69): nearly even."""
    width = q.shape[1] * q.shape[3]
    return attend(q, k, v, mask, width**-0.5)


def scale_left_out(q, k, v, mask=None, scale=None):
    """No scale: decided before anything is learned."""
    return attend(q, k, v, mask, 1.0)


def softmax_over_queries(q, k, v, mask=None, scale=None):
    """The wrong axis: each key deals out 1, a query may get nothing."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * q @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return softmax(scores, dim=-2) @ v


def kv_heads_tiled(q, k, v, mask=None, scale=None):
    """repeat for repeat_interleave: heads read the wrong group."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat(1, groups, 1, 1) for t in (k, v))
    return attend(q, k, v, mask, scale)


def mask_inverted(q, k, v, mask=None, scale=None):
    """True taken for "hidden", the meaning in nn.MultiheadAttention."""
    return attend(q, k, v, None if mask is None else ~mask, scale)


def mask_as_numbers(q, k, v, mask=None, scale=None):
    """A mask of ones and zeros is added to the scores, and hides nothing.

    What F.scaled_dot_product_attention does with a float mask.
    """
    bias = None if mask is None else mask.to(q.dtype)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, scale=scale, enable_gqa=True
    )


def mask_after_softmax(q, k, v, mask=None, scale=None):
    """Weights set to 0 after the softmax: the rest no longer sum to 1."""
    weights = attention_weights(q, k, None, scale)
    if mask is not None:
        weights = weights * mask
    return weights @ v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def lowest_number_for_masked(q, k, v, mask=None, scale=None):
    """finfo.min for "hidden": an empty row reads everything, evenly.

    Seen in many models, transformers among them (issue 32390).
    """
    if mask is None:
        return attend(q, k, v, None, scale)
    lowest = torch.finfo(q.dtype).min
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, lowest)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, scale=scale, enable_gqa=True
    )


def causal_without_itself(starts_block, is_token=None):
    """Off by one: earlier blocks only; a token cannot read itself."""
    block = starts_block.long().cumsum(dim=-1)
    allowed = block[:, None, :] < block[:, :, None]
    if is_token is not None:
        allowed = allowed & is_token[:, None, :]
    return allowed[:, None]


def causal_for_all(starts_block, is_token=None):
    """Every token "captures ... all the past tokens" (C77), images too.

    What transformers 5.23 does with a PaliGemma that is called without
    token_type_ids.
    """
    return attention_mask(torch.ones_like(starts_block), is_token)


def padding_in_the_rows(starts_block, is_token=None):
    """Hides what padding reads, and lets all tokens read the padding."""
    allowed = attention_mask(starts_block)
    if is_token is None:
        return allowed
    return allowed & is_token[:, None, :, None]


class HeadsSliceTheInput(Attention):
    """Head n projects only the n-th part of the features (C80).

    Zeroes the rest of the weights at each call.
    """

    def forward(self, x, **options):
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            heads = projection.out_features // self.head_dim
            part = projection.in_features // heads
            own = torch.block_diag(*torch.ones(heads, self.head_dim, part))
            with torch.no_grad():
                projection.weight.mul_(own)
        return super().forward(x, **options)
