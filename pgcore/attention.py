# Generated from chapters/05_attention.ipynb.
# Edit the notebook, then run "make chapters".
"""Attention: a token asks, all tokens answer, a weighted sum comes back.

Scaled dot-product attention with many heads (Vaswani et al., 2017),
keys and values shared by groups of query heads (Ainslie et al., 2023),
one rule for every mask (big_vision): boolean, True = may attend.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pgcore.numerics import softmax


def split_heads(
    x: Float[Tensor, "B T features"], head_dim: int
) -> Float[Tensor, "B heads T H"]:
    """Cut the features of each token into heads; no number changes.

    Head 0 gets the first ``head_dim`` features of every token.
    Raises ValueError unless ``head_dim`` divides the features.
    Source: Vaswani et al. (2017), section 3.2.2.

    Built in chapter 05, Attention.
    """
    if x.ndim != 3 or head_dim < 1 or x.shape[-1] % head_dim:
        raise ValueError(
            "x, head_dim: expected [B, T, features], divided by head_dim, "
            f"found {tuple(x.shape)} and {head_dim}"
        )
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def merge_heads(x: Float[Tensor, "B heads T H"]) -> Float[Tensor, "B T features"]:
    """Put the heads of a token side by side again: undo ``split_heads``.

    Source: Vaswani et al. (2017), section 3.2.2, Concat.

    Built in chapter 05, Attention.
    """
    if x.ndim != 4:
        raise ValueError(f"x: expected [B, heads, T, H], found {tuple(x.shape)}")
    return x.transpose(1, 2).flatten(2)


def attention_mask(
    starts_block: Bool[Tensor, "B S"],
    is_token: Bool[Tensor, "B S"] | None = None,
) -> Bool[Tensor, "B 1 S S"]:
    """Who may attend to whom: True where query i may read key j.

    True in ``starts_block`` starts a new block of tokens. A token reads
    its own block and earlier ones, never padding (``is_token`` False)::

        starts_block 0 0 0 0   1 1 1 1   0 0 1 1   1 0 1 0
             query 0 # # # #   # . . .   # # . .   # # . .
                   1 # # # #   # # . .   # # . .   # # . .
                   2 # # # #   # # # .   # # # .   # # # #
                   3 # # # #   # # # #   # # # #   # # # #
                     full      causal    prefix-LM blocks

    The axis of size 1 is for all heads alike. Rows of padding may hold
    True (in the source: False); nobody reads what they compute.
    Raises ValueError unless both are boolean, of one shape B S.
    Source: make_attn_mask in big_vision (Beyer et al., 2024).

    Built in chapter 05, Attention.
    """
    if is_token is None:
        is_token = torch.ones_like(starts_block)
    shape, other = found = [(x.dtype, *x.shape) for x in (starts_block, is_token)]
    if shape != other or len(shape) != 3 or shape[0] != torch.bool:
        raise ValueError(
            "starts_block, is_token: expected booleans of one shape "
            f"[B, S], found {found}"
        )
    block = starts_block.long().cumsum(dim=-1)  # B S
    may_read = block[:, None, :] <= block[:, :, None]  # B T S
    return (may_read & is_token[:, None, :])[:, None]


def attend(
    q: Float[Tensor, "B N T H"],
    k: Float[Tensor, "B K S H"],
    v: Float[Tensor, "B K S H"],
    mask: Bool[Tensor, " B #N #T S"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B N T H"]:
    """softmax(scale q k^T) v for each head, in one fused call.

    N / K neighbouring query heads share a key/value head. mask: True =
    may attend. scale: H ** -0.5 unless given. A query that may attend to
    nothing gets zeros, and no gradient. A NaN in k or v reaches every
    query of its head, masked or not; torch may turn a query of NaN into
    zeros where keys are few. q, k, v: one dtype, torch insists.
    Raises ValueError for bad shapes, no keys, a mask that is not boolean.
    Source: Vaswani et al. (2017), equation 1; Ainslie et al. (2023).

    Built in chapter 05, Attention.
    """
    require_heads(q, k, v, mask)
    (B, N, T, H), K = q.shape, k.shape[1]
    if T == 1 and (mask is None or mask.shape[1] == 1):
        group = q.reshape(B, K, N // K, H)  # one below the other
        heads = F.scaled_dot_product_attention(group, k, v, mask, scale=scale)
        return heads.reshape(B, N, 1, H)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


def attention_weights(
    q: Float[Tensor, "B N T H"],
    k: Float[Tensor, "B K S H"],
    mask: Bool[Tensor, " B #N #T S"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B N T S"]:
    """The weights that ``attend`` sums values with, for looking at.

    Arguments, errors and source as for ``attend``. Rows sum to 1, or to
    0 where a query may attend to nothing. In float32 at least.

    Built in chapter 05, Attention.
    """
    require_heads(q, k, k, mask)
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.to(wide) @ k.transpose(-2, -1)  # B N T S
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return softmax(scores)


def require_heads(
    q: Float[Tensor, "B N T H"],
    k: Float[Tensor, "B K S H"],
    v: Float[Tensor, "B K S H"],
    mask: Bool[Tensor, " B #N #T S"] | None,
) -> None:
    """Raise a ValueError unless these fit together, as in ``attend``.

    For other ways to attend, which take the same arguments.

    Built in chapter 05, Attention.
    """
    found = [(x.dtype, *x.shape) for x in (q, k, v)]
    fit = all(x.ndim == 4 and x.is_floating_point() for x in (q, k, v))
    B, N, T, H = q.shape if fit else (0, 0, 0, 0)
    K, S = k.shape[1:3] if fit else (0, 0)
    fit = fit and k.shape == v.shape == (B, K, S, H)
    if not fit or 0 in (K, S) or N % K:
        raise ValueError(
            "q, k, v: expected floats [B, N, T, H] and twice [B, K, S, H], "
            f"K a divisor of N and S at least 1, found {found}"
        )
    fits = [(B, heads, rows, S) for heads in (1, N) for rows in (1, T)]
    if mask is not None and (mask.dtype != torch.bool or mask.shape not in fits):
        raise ValueError(
            f"mask: expected booleans [{B}, 1 or {N}, 1 or {T}, {S}], "
            f"found {mask.dtype} {tuple(mask.shape)}"
        )


@runtime_checkable
class Cache(Protocol):
    """What ``Attention`` asks of a memory of earlier keys and values.

    Built in chapter 05, Attention.
    """

    def update(
        self, k: Float[Tensor, "B K T H"], v: Float[Tensor, "B K T H"]
    ) -> tuple[Float[Tensor, "B K S H"], Float[Tensor, "B K S H"]]:
        """Store T new keys and values; return all S slots that exist.

        Slots not written yet are returned too and must be finite (zeros):
        the mask hides them, but 0 x NaN is NaN. Whoever counts positions
        outside a compiled step raises ValueError when T more do not fit.
        """
        ...


class Attention(nn.Module):
    """Project, attend in heads, mix the heads: the one attention layer.

    width is D, num_heads N, num_kv_heads K, head_dim H; N * H need not be
    D. scale: of the scores, H ** -0.5 if None. attend: how heads attend.
    Raises ValueError unless all sizes are at least 1 and K divides N.
    Source: Vaswani et al. (2017), section 3.2.2; Ainslie et al. (2023).

    Built in chapter 05, Attention.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool = False,
        scale: float | None = None,
        attend: Callable[..., Tensor] = attend,
    ):
        super().__init__()
        sizes = width, num_heads, num_kv_heads, head_dim
        if min(sizes) < 1 or num_heads % num_kv_heads:
            raise ValueError(
                "width, num_heads, num_kv_heads, head_dim: expected at "
                f"least 1, the third divides the second, found {sizes}"
            )
        self.head_dim, self.scale, self.attend = head_dim, scale, attend
        self.q_proj = nn.Linear(width, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(width, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(width, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, width, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        source: Float[Tensor, "B S D"] | None = None,
        mask: Bool[Tensor, " B #N #T slots"] | None = None,
        rotate: Callable[[Tensor], Tensor] | None = None,
        rotate_source: Callable[[Tensor], Tensor] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Let the tokens of ``x`` read from ``source`` (None: from ``x``).

        mask: True = may attend; a slot for each key, a cache's included.
        rotate: turns queries and keys, with the same positions for both.
        rotate_source: turns the keys instead, if they stand elsewhere.
        """
        source = x if source is None else source
        q = split_heads(self.q_proj(x), self.head_dim)  # B N T H
        k = split_heads(self.k_proj(source), self.head_dim)  # B K S H
        v = split_heads(self.v_proj(source), self.head_dim)  # B K S H
        if rotate is not None:
            q, k = rotate(q), (rotate_source or rotate)(k)
        if cache is not None:
            k, v = cache.update(k, v)
        heads = self.attend(q, k, v, mask, self.scale)  # B N T H
        return self.o_proj(merge_heads(heads))


__all__ = [
    "Attention",
    "Cache",
    "attend",
    "attention_mask",
    "attention_weights",
    "merge_heads",
    "require_heads",
    "split_heads",
]
