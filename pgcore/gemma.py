# Generated from chapters/10_gemma.ipynb.
# Edit the notebook, then run "make chapters".
"""Gemma 1 and Gemma 2: one decoder, told apart by a configuration.

Multi-query or grouped-query attention, GeGLU, RMSNorm with 1 + w, one
table for words in and out (Gemma Team, 2024). Gemma 2 adds soft-caps,
two norms a block and windows (Gemma Team, 2024b).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pgcore.attention import Attention, attend, require_heads
from pgcore.kv_cache import KVCache, LayerCache
from pgcore.normalization import RMSNorm
from pgcore.rope import rotation


@dataclass(frozen=True, kw_only=True)
class GemmaConfig:
    """The sizes of a Gemma, and what makes it the first or the second.

    Raises ValueError for sizes that do not fit.
    Source: Gemma Team (2024), Table 1; Gemma Team (2024b), Table 1.

    Built in chapter 10, Gemma.
    """

    width: int  # D: every token is a vector of so many features.
    depth: int  # L: so many blocks, one after the other.
    mlp_dim: int  # F: gate and up each have so many outputs.
    num_heads: int  # N: attention has so many heads of queries.
    num_kv_heads: int  # K: N / K query heads share keys and values.
    head_dim: int  # H: even; N * H need not be D.
    vocab_size: int  # V: the table has a row for each word.
    # Scores are multiplied by it; None: by head_dim ** -0.5.
    query_scale: float | None = None
    # Scores stay between -cap and cap; None: they have no bound.
    attention_softcap: float | None = None
    # Logits stay between -cap and cap; None: they have no bound.
    final_softcap: float | None = None
    # Layers 0, 2, 4, ... read so many slots, their own included; None: all.
    window: int | None = None
    # Rotary positions turn the slower the larger it is.
    rope_base: float = 10_000.0
    # What attention and MLP hand back is normalised, then added.
    post_norms: bool = False

    def __post_init__(self):
        for field in fields(self)[:-1]:  # all but post_norms
            value = getattr(self, field.name)
            if not (field.default is None if value is None else value > 0):
                raise ValueError(f"{field.name}: expected above 0, found {value}")
        N, K, H = self.num_heads, self.num_kv_heads, self.head_dim
        if N % K:
            why = f"expected a divisor of num_heads {N}, found {K}"
            raise ValueError(f"num_kv_heads: {why}")
        if H % 2:
            raise ValueError(f"head_dim: expected an even number, found {H}")


# fmt: off
GEMMA_2B = GemmaConfig(
    width=2048, depth=18, mlp_dim=16_384,
    num_heads=8, num_kv_heads=1, head_dim=256, vocab_size=256_000)
GEMMA_7B = GemmaConfig(
    width=3072, depth=28, mlp_dim=24_576,
    num_heads=16, num_kv_heads=16, head_dim=256, vocab_size=256_000)
GEMMA2_2B = GemmaConfig(
    width=2304, depth=26, mlp_dim=9216, post_norms=True,
    num_heads=8, num_kv_heads=4, head_dim=256, vocab_size=256_000,
    attention_softcap=50.0, final_softcap=30.0, window=4096)
GEMMA2_9B = replace(
    GEMMA2_2B, width=3584, depth=42, mlp_dim=14_336,
    num_heads=16, num_kv_heads=8)
GEMMA2_27B = replace(
    GEMMA2_2B, width=4608, depth=46, mlp_dim=36_864, query_scale=144**-0.5,
    num_heads=32, num_kv_heads=16, head_dim=128)
# fmt: on


class GeGLU(nn.Module):
    """down(gelu(gate(x)) * up(x)): one map of x gates another.

    No biases; the GELU is the tanh approximation. width is D, mlp_dim F.
    Source: Shazeer (2020), equation 6; Gemma Team (2024), section 2.

    Built in chapter 10, Gemma.
    """

    def __init__(self, width: int, mlp_dim: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, mlp_dim, bias=False)
        self.up_proj = nn.Linear(width, mlp_dim, bias=False)
        self.down_proj = nn.Linear(mlp_dim, width, bias=False)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        gate = F.gelu(self.gate_proj(x), approximate="tanh")  # ... F
        return self.down_proj(gate * self.up_proj(x))


def softcap(x: Float[Tensor, "..."], cap: float) -> Float[Tensor, "..."]:
    """Press numbers smoothly into (-cap, cap): cap * tanh(x / cap).

    Order is kept, up to rounding; infinities become the bounds, and a
    NaN stays one.
    Source: Gemma Team (2024b), section 2.

    Built in chapter 10, Gemma.
    """
    return cap * torch.tanh(x / cap)


def attend_softcapped(
    q: Float[Tensor, "B N T H"],
    k: Float[Tensor, "B K S H"],
    v: Float[Tensor, "B K S H"],
    mask: Bool[Tensor, " B #N #T S"] | None = None,
    scale: float | None = None,
    *,
    cap: float,
) -> Float[Tensor, "B N T H"]:
    """``attend`` with its scores soft-capped, before the mask.

    Arguments, errors and rows with nothing to read: as for ``attend``.
    q k^T is rounded to the dtype of q first; then float32 at least.
    torch's fused kernel takes no soft-cap, so tables of B x N x T x S
    numbers are made: three, and two more for q, k, v in 16 bits.
    Source: Gemma Team (2024b), section 2.

    Built in chapter 10, Gemma.
    """
    require_heads(q, k, v, mask)
    (B, N, T, H), (K, S) = q.shape, k.shape[1:3]
    factor: float = H**-0.5 if scale is None else scale
    if mask is None:
        mask = torch.ones(B, 1, T, S, dtype=torch.bool, device=q.device)
    # N is K groups of G heads, so B N T H is B K G*T H without moving a
    # number: the queries of a group stand below each other, and no key
    # is copied. The scale goes first, lest q k^T is too large for 16 bits.
    stacked = (factor * q).reshape(B, K, N // K * T, H)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (stacked @ k.transpose(-2, -1)).to(wide)  # B K G*T S
    # In place, and the cap's factor together with the mask: a further
    # table would cost as much memory as this one.
    scores.div_(cap).tanh_()
    can_read = mask.any(dim=-1, keepdim=True)  # a softmax of none is NaN
    hidden = torch.zeros(mask.shape, dtype=wide, device=q.device)
    hidden.masked_fill_(~mask & can_read, -torch.inf)
    scores = torch.add(hidden, scores.view(B, N, T, S), alpha=cap)
    weights = scores.softmax(dim=-1).to(v.dtype)
    heads = weights.view(B, K, N // K * T, S) @ v
    return heads.view(B, N, T, H).masked_fill(~can_read, 0)


def _local_mask(mask: Tensor, slots: Tensor, window: int) -> Tensor:
    """Hide from each query the keys ``window`` or more slots behind it."""
    keys = torch.arange(mask.shape[-1], device=mask.device)
    return mask & (slots[:, None] - keys < window)  # B 1 T S


class GemmaBlock(nn.Module):
    """Attention, then a GeGLU, each behind a norm and beside a skip.

    With ``post_norms`` what they hand back is normalised, then added.
    Source: Gemma Team (2024b), section 2; the code of big_vision.

    Built in chapter 10, Gemma.
    """

    def __init__(self, config: GemmaConfig):
        super().__init__()
        width, cap = config.width, config.attention_softcap
        post_norm = RMSNorm if config.post_norms else nn.Identity
        self.pre_attention_norm = RMSNorm(width)
        self.self_attn = Attention(
            width,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.query_scale,
            attend=partial(attend_softcapped, cap=cap) if cap else attend,
        )
        self.post_attention_norm = post_norm(width)
        self.pre_mlp_norm = RMSNorm(width)
        self.mlp = GeGLU(width, config.mlp_dim)
        self.post_mlp_norm = post_norm(width)

    def forward(
        self,
        x: Float[Tensor, "B tokens D"],
        *,
        mask: Bool[Tensor, "B 1 T S"],
        cache: LayerCache | None = None,
        **rotate: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, "B T D"]:
        """Add to the residual stream twice; arguments as ``Attention``.

        A mask with fewer rows than tokens asks for the last T alone.
        """
        T = mask.shape[2]
        h = self.pre_attention_norm(x)
        h = self.self_attn(h[:, -T:], source=h, mask=mask, cache=cache, **rotate)
        x = x[:, -T:] + self.post_attention_norm(h)
        return x + self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x)))


class Gemma(nn.Module):
    """The decoder: ids to vectors, L blocks, vectors to logits.

    Three calls, ``embed``, the model, ``logits``: images come in after
    the first, and most positions need no logits. Fresh weights: the
    table at 1 / sqrt(D), all else as torch draws it.
    Source: Gemma Team (2024), section 2; Gemma Team (2024b), section 2.

    Built in chapter 10, Gemma.
    """

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        nn.init.normal_(self.embed_tokens.weight, std=config.width**-0.5)
        blocks = (GemmaBlock(config) for _ in range(config.depth))
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.width)

    def embed(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Rows of the table, times sqrt(D) rounded to the table's dtype.

        Raises ValueError unless ids are int32 or int64 [B, T]; on a CPU,
        where looking costs no wait, also for an id that is no row.
        """
        rows, outside = self.config.vocab_size, ids.new_empty(0)
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = ids[(ids < 0) | (ids >= rows)]
        is_int = ids.dtype in (torch.int32, torch.int64)
        if ids.ndim != 2 or not is_int or len(outside):
            raise ValueError(
                f"ids: expected int32 or int64 [B, T], 0 to {rows - 1} "
                f"(the vocabulary has {rows} words), found {ids.dtype} "
                f"{tuple(ids.shape)} {outside[:1].tolist()}"
            )
        x, root = self.embed_tokens(ids), self.config.width**0.5
        return x * torch.full((), root, dtype=x.dtype, device=x.device)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        *,
        positions: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B 1 T S"],
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Float[Tensor, "B out D"]:
        """Let the tokens read each other; hand them out normalised.

        positions: for the rotation, padding not counted (chapter 08).
        mask: True = may attend; S is T, or the slots of the cache.
        cache: ``reserve(T)`` comes first (chapter 09). None: training.
        last_only: hand out the last token alone, for less work.
        Raises ValueError for arguments that do not fit each other.
        """
        c = self.config
        masks = self._masks(mask, self._slots(x, positions, mask, cache))
        make = partial(rotation, base=c.rope_base, dtype=x.dtype)
        rotate = {"rotate": make(positions, c.head_dim)}
        for index, layer in enumerate(self.layers):
            memory = None if cache is None else cache.layers[index]
            seen = masks[index % 2]
            if last_only and index == c.depth - 1:
                seen, last = seen[:, :, -1:], positions[:, -1:]
                rotate["rotate_source"] = rotate["rotate"]
                rotate["rotate"] = make(last, c.head_dim)
            x = layer(x, mask=seen, cache=memory, **rotate)
        return self.norm(x)

    def logits(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """One logit a word, soft-capped. V is large: choose positions."""
        logits = F.linear(hidden, self.embed_tokens.weight)
        cap = self.config.final_softcap
        return logits if cap is None else softcap(logits, cap)

    def _masks(self, mask, slots) -> tuple[Tensor, Tensor]:
        """Of the local layers 0, 2, 4, ... and of the global ones."""
        if self.config.window is None:
            return mask, mask
        return _local_mask(mask, slots, self.config.window), mask

    def _slots(self, x, positions, mask, cache) -> Tensor:
        """Of the new tokens. ValueError unless all fit each other."""
        c = self.config
        if x.ndim != 3 or x.shape[2] != c.width:
            raise ValueError(f"x: expected B T {c.width}, found {tuple(x.shape)}")
        B, T = x.shape[:2]
        if cache is None:
            slots = torch.arange(T, device=x.device)
            S, layers = T, c.depth
        else:
            slots = cache.slots
            S, layers = cache.keys.shape[3], len(cache.layers)
        for name, found, expected in (
            ("positions", getattr(positions, "shape", positions), (B, T)),
            ("mask", getattr(mask, "shape", mask), (B, 1, T, S)),
            ("mask", getattr(mask, "dtype", mask), torch.bool),
            ("layers of the cache", layers, c.depth),
            ("slots reserved", len(slots), T),
        ):
            if found != expected:
                raise ValueError(f"{name}: expected {expected}, found {found}")
        return slots


__all__ = [
    "GEMMA2_27B",
    "GEMMA2_2B",
    "GEMMA2_9B",
    "GEMMA_2B",
    "GEMMA_7B",
    "GeGLU",
    "Gemma",
    "GemmaBlock",
    "GemmaConfig",
    "attend_softcapped",
    "softcap",
]
