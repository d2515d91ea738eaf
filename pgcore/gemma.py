# Generated from chapters/10_gemma.ipynb.
# Edit the notebook, then run "make chapters".
"""Gemma 1 and Gemma 2: one decoder, told apart by a configuration.

Multi-query or grouped-query attention, GeGLU, RMSNorm with 1 + w, one
table for words in and out (Gemma Team, 2024). Gemma 2 adds soft-caps,
two norms a block and windows (Gemma Team, 2024b).
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pgcore.attention import Attention, _require_heads, attend
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

    width: int  # D, the features of a token
    depth: int  # L, blocks
    mlp_dim: int  # F, of the gate alone
    num_heads: int  # N, of queries
    num_kv_heads: int  # K, a divisor of N
    head_dim: int  # H, even; N * H need not be D
    vocab_size: int  # V, words
    query_scale: float | None = None  # of the scores; head_dim ** -0.5
    attention_softcap: float | None = None  # a bound of the scores
    final_softcap: float | None = None  # a bound of the logits
    window: int | None = None  # slots that layers 0, 2, 4, ... read back
    rope_base: float = 10_000.0  # of the rotary positions
    post_norms: bool = False  # two more norms a block

    def __post_init__(self):
        sizes, limits = astuple(self)[:7], astuple(self)[7:12]
        positive = all(limit is None or limit > 0 for limit in limits)
        fit = min(sizes) >= 1 and self.num_heads % self.num_kv_heads == 0
        if not fit or not positive or self.head_dim % 2:
            raise ValueError(
                "expected sizes and limits above 0, num_kv_heads a divisor "
                f"of num_heads and an even head_dim, found {self}"
            )


_gemma1 = partial(GemmaConfig, vocab_size=256_000)
_gemma2 = partial(
    _gemma1, attention_softcap=50.0, final_softcap=30.0, window=4096, post_norms=True
)
GEMMA_2B = _gemma1(
    width=2048, depth=18, mlp_dim=16_384, num_heads=8, num_kv_heads=1, head_dim=256
)
GEMMA_7B = _gemma1(
    width=3072, depth=28, mlp_dim=24_576, num_heads=16, num_kv_heads=16, head_dim=256
)
GEMMA2_2B = _gemma2(
    width=2304, depth=26, mlp_dim=9216, num_heads=8, num_kv_heads=4, head_dim=256
)
GEMMA2_9B = _gemma2(
    width=3584, depth=42, mlp_dim=14_336, num_heads=16, num_kv_heads=8, head_dim=256
)
GEMMA2_27B = partial(_gemma2, query_scale=144**-0.5)(
    width=4608, depth=46, mlp_dim=36_864, num_heads=32, num_kv_heads=16, head_dim=128
)


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

    Order is kept; infinities become the bounds, a NaN stays one.
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
    torch's fused kernel takes no soft-cap: the table of scores exists,
    B x N x T x S in float32 at least, two or three times.
    Source: Gemma Team (2024b), section 2.

    Built in chapter 10, Gemma.
    """
    _require_heads(q, k, v, mask)
    (B, N, T, H), (K, S) = q.shape, k.shape[1:3]
    factor = (H**-0.5 if scale is None else scale) / cap
    if mask is None:
        mask = torch.ones(B, 1, T, S, dtype=torch.bool, device=q.device)
    # Queries of a group stand below each other: no key is copied.
    stacked = q.reshape(B, K, N // K * T, H)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (stacked @ k.transpose(-2, -1)).to(wide)  # B K G*T S
    # In place, and the cap's factor together with the mask: a further
    # table would cost as much memory as this one.
    scores.mul_(factor).tanh_()
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
        x: Float[Tensor, "B T D"],
        *,
        mask: Bool[Tensor, "B 1 T S"],
        rotate: Callable[[Tensor], Tensor],
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Add to the residual stream twice; arguments as ``Attention``."""
        h = self.pre_attention_norm(x)
        h = self.self_attn(h, mask=mask, rotate=rotate, cache=cache)
        x = x + self.post_attention_norm(h)
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
        rows, outside = self.config.vocab_size, ids[:0]
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = ids[(ids < 0) | (ids >= rows)]
        kinds = torch.int32, torch.int64
        if ids.ndim != 2 or ids.dtype not in kinds or len(outside):
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
        mask: Bool[Tensor, "B 1 T S"] | None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Let the tokens read each other; hand them out normalised.

        positions: for the rotation, padding not counted (chapter 08).
        mask: True = may attend; S is T, or the slots of the cache. None,
        without a cache: every token reads every other.
        cache: ``reserve(T)`` comes first (chapter 09). None: training.
        Raises ValueError for arguments that do not fit each other.
        """
        c, (B, T) = self.config, x.shape[:2]
        slots = cache.slots if cache else torch.arange(T, device=x.device)
        if mask is None and cache is None:
            mask = torch.ones(B, 1, T, T, dtype=torch.bool, device=x.device)
        self._require_fit(x, positions, mask, cache, slots)
        masks = self._masks(mask, slots)
        rotate = rotation(positions, c.head_dim, base=c.rope_base, dtype=x.dtype)
        for index, layer in enumerate(self.layers):
            memory = None if cache is None else cache.layers[index]
            x = layer(x, mask=masks[index % 2], rotate=rotate, cache=memory)
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

    def _require_fit(self, x, positions, mask, cache, slots) -> None:
        (B, T), S, depth = x.shape[:2], x.shape[1], self.config.depth
        found = [getattr(positions, "shape", positions), None]
        found += [depth, len(slots)]
        if cache is not None:
            found[2], S = len(cache.layers), cache.keys.shape[3]
        if mask is not None:
            found[1] = (mask.dtype, *mask.shape)
        if found != [(B, T), (torch.bool, B, 1, T, S), depth, T]:
            raise ValueError(
                "positions, mask, layers of the cache, slots reserved: "
                f"expected [{B}, {T}], booleans [{B}, 1, {T}, {S}], "
                f"{depth} and {T}, found {found}"
            )


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
