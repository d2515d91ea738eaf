# Generated from chapters/10_gemma.ipynb.
# Edit the notebook, then run "make chapters".
"""Wrong twins from chapter 10, Gemma."""

from functools import partial

import torch
import torch.nn.functional as F

from pgcore.attention import Attention
from pgcore.gemma import GeGLU, Gemma, GemmaBlock, attend_softcapped, softcap
from pgcore.normalization import RMSNorm


def softcap_after_mask(q, k, v, mask=None, scale=None, *, cap):
    """Masks, then caps: -inf becomes -cap, and hidden keys come back."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * q @ k.transpose(-2, -1)  # B N T S
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return softcap(scores, cap).softmax(dim=-1) @ v


class NormWithoutOne(RMSNorm):
    """Multiplies by the weight, not by 1 + weight, as Llama does."""

    def forward(self, x):
        x = F.rms_norm(x.float(), x.shape[-1:], None, self.eps)
        return x * self.weight


class GeluByErf(GeGLU):
    """The exact GELU; the weights were trained with the tanh one.

    On the list of Gemma bugs that Unsloth found in ports (2024).
    """

    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


class GateAndUpSwapped(GeGLU):
    """The wrong one of two equal shapes goes through the GELU."""

    def forward(self, x):
        gate = F.gelu(self.up_proj(x), approximate="tanh")
        return self.down_proj(gate * self.gate_proj(x))


class ScaleFromWidth(Attention):
    """Takes width / heads for the head dim; Gemma's is a field.

    Right for Gemma 2B, where both are 256, and for Gemma 2 27B.
    """

    def forward(self, x, **options):
        num_heads = self.q_proj.out_features // self.head_dim
        self.scale = (self.q_proj.in_features / num_heads) ** -0.5
        return super().forward(x, **options)


def kv_heads_tiled_capped(q, k, v, mask=None, scale=None, *, cap):
    """repeat for repeat_interleave: query heads read the wrong group."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat(1, groups, 1, 1) for x in (k, v))
    return attend_softcapped(q, k, v, mask, scale, cap=cap)


class SkipFromTheNorm(GemmaBlock):
    """The skip carries the norm's output, as in the book's notes."""

    def forward(self, x, *, mask, rotate, cache=None):
        x = self.pre_attention_norm(x)
        h = self.self_attn(x, mask=mask, rotate=rotate, cache=cache)
        x = self.pre_mlp_norm(x + self.post_attention_norm(h))
        return x + self.post_mlp_norm(self.mlp(x))


class PostNormAfterTheSum(GemmaBlock):
    """norm(x + h) for x + norm(h): the stream itself is normalised."""

    def forward(self, x, *, mask, rotate, cache=None):
        h = self.pre_attention_norm(x)
        h = self.self_attn(h, mask=mask, rotate=rotate, cache=cache)
        x = self.post_attention_norm(x + h)
        return self.post_mlp_norm(x + self.mlp(self.pre_mlp_norm(x)))


class InterleavedRope(GemmaBlock):
    """Turns features 2i and 2i + 1 together; Gemma's pairs are i, i + H/2.

    The question behind transformers issue 25199 and many others.
    """

    def forward(self, x, *, mask, rotate, cache=None):
        def turn(heads):
            pairs = heads.unflatten(-1, (-1, 2)).mT.flatten(-2)
            return rotate(pairs).unflatten(-1, (2, -1)).mT.flatten(-2)

        return super().forward(x, mask=mask, rotate=turn, cache=cache)


class NoEmbeddingScale(Gemma):
    """The rows of the table as they are: no sqrt(D)."""

    def embed(self, ids):
        return self.embed_tokens(ids)


class NoFinalSoftcap(Gemma):
    """The final cap is forgotten. The order of words stays.

    But for rounding: far above the cap, capped logits are equal.
    """

    def logits(self, hidden):
        return F.linear(hidden, self.embed_tokens.weight)


class WindowOffByOne(Gemma):
    """A token reads itself and ``window`` others, one too many."""

    def _masks(self, mask, slots):
        return super()._masks(mask, slots - 1)


class LocalAndGlobalSwapped(Gemma):
    """The window in layers 1, 3, 5, ...; Gemma 2's are 0, 2, 4, ..."""

    def _masks(self, mask, slots):
        return super()._masks(mask, slots)[::-1]


class PositionsFromZero(Gemma):
    """Each call counts from 0 again. Right, until there is a cache."""

    def forward(self, x, *, positions, mask, cache=None):
        positions = positions - positions[:, :1]
        return super().forward(x, positions=positions, mask=mask, cache=cache)


class PositionsInBfloat16(Gemma):
    """Positions rounded to the weights' dtype: 257 is 256, 4351 is 4352.

    On the list of Gemma bugs that Unsloth found in ports (2024).
    """

    def forward(self, x, *, positions, mask, cache=None):
        positions = positions.bfloat16().long()
        return super().forward(x, positions=positions, mask=mask, cache=cache)


TWINS = (
    NoEmbeddingScale,
    NormWithoutOne,
    SkipFromTheNorm,
    PostNormAfterTheSum,
    GateAndUpSwapped,
    GeluByErf,
    InterleavedRope,
    kv_heads_tiled_capped,
    ScaleFromWidth,
    softcap_after_mask,
    WindowOffByOne,
    LocalAndGlobalSwapped,
    PositionsFromZero,
    NoFinalSoftcap,
)


def with_bug(gemma: Gemma, twin) -> Gemma:
    """A copy of a Gemma 2 with the same weights and one bug.

    Modules of the class that the twin extends become the twin; a function
    takes the place of ``attend_softcapped``, which a Gemma 1 has not.
    """
    copy = Gemma(gemma.config)
    copy.load_state_dict(gemma.state_dict())
    for module in list(copy.modules()):
        if not isinstance(twin, type) and isinstance(module, Attention):
            module.attend = partial(twin, **module.attend.keywords)
        elif isinstance(twin, type) and type(module) is twin.__base__:
            module.__class__ = twin
    return copy.to(gemma.embed_tokens.weight.dtype)
