# Generated from chapters/10_gemma.ipynb.
# Edit the notebook, then run "make chapters".
"""Slow, obvious versions from chapter 10, Gemma."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pgcore.gemma import GemmaConfig, softcap


def reference_attend_softcapped(
    q: Float[Tensor, "B N T H"],
    k: Float[Tensor, "B K S H"],
    v: Float[Tensor, "B K S H"],
    mask: Bool[Tensor, " B #N #T S"] | None = None,
    scale: float | None = None,
    *,
    cap: float,
) -> Float[Tensor, "B N T H"]:
    """Scores, soft-cap, mask, softmax, sum: a line each, in float64."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q.double() @ k.transpose(-2, -1)  # B N T S
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap(scores, cap)
    if mask is None:
        return scores.softmax(dim=-1) @ v
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return weights.masked_fill(~mask, 0) @ v  # no keys: zeros, not NaN


def reference_gemma(
    weights: dict[str, Tensor], config: GemmaConfig, ids: Int[Tensor, " T"]
) -> Float[Tensor, "T V"]:
    """Causal logits of one text, in float64, equation by equation."""
    w = {name: value.double() for name, value in weights.items()}
    T, H, c = len(ids), config.head_dim, config
    table = w["embed_tokens.weight"]
    later = torch.arange(T)[:, None] - torch.arange(T)  # query minus key

    def norm(x, name):
        if name not in w:
            return x  # Gemma 1 has no norm there
        mean_square = (x * x).mean(dim=-1, keepdim=True)
        return x / (mean_square + 1e-6).sqrt() * (1 + w[name])

    def turn(x):  # T H, pairs as complex numbers
        speeds = c.rope_base ** -(torch.arange(H // 2).double() / (H // 2))
        angles = torch.arange(T)[:, None] * speeds
        pairs = torch.complex(x[:, : H // 2], x[:, H // 2 :])
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    def head(x, layer, n):
        at = f"layers.{layer}.self_attn."
        kv = n // (c.num_heads // c.num_kv_heads)
        q = turn(x @ w[at + "q_proj.weight"][n * H : (n + 1) * H].T)
        k = turn(x @ w[at + "k_proj.weight"][kv * H : (kv + 1) * H].T)
        v = x @ w[at + "v_proj.weight"][kv * H : (kv + 1) * H].T
        scores = q @ k.T * (c.query_scale or H**-0.5)
        if c.attention_softcap:
            scores = c.attention_softcap * (scores / c.attention_softcap).tanh()
        readable = later >= 0
        if c.window and layer % 2 == 0:
            readable = readable & (later < c.window)
        weights = scores.masked_fill(~readable, -torch.inf).softmax(dim=-1)
        slab = w[at + "o_proj.weight"][:, n * H : (n + 1) * H]
        return weights @ v @ slab.T

    x = table[ids] * c.width**0.5
    for layer in range(c.depth):
        at = f"layers.{layer}."
        h = norm(x, at + "pre_attention_norm.weight")
        h = sum(head(h, layer, n) for n in range(c.num_heads))
        x = x + norm(h, at + "post_attention_norm.weight")
        h = norm(x, at + "pre_mlp_norm.weight")
        gate = h @ w[at + "mlp.gate_proj.weight"].T
        bend = (
            gate
            / 2
            * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
        )
        h = bend * (h @ w[at + "mlp.up_proj.weight"].T)
        h = h @ w[at + "mlp.down_proj.weight"].T
        x = x + norm(h, at + "post_mlp_norm.weight")
    logits = norm(x, "norm.weight") @ table.T
    if c.final_softcap:
        logits = c.final_softcap * (logits / c.final_softcap).tanh()
    return logits
