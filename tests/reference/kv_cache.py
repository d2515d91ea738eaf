# Generated from chapters/09_kv_cache.ipynb.
# Edit the notebook, then run "make chapters".
"""Slow, obvious versions from chapter 09, KV-cache."""

import torch
import torch.nn.functional as F
from torch import nn

from pgcore.attention import Attention, attention_mask
from pgcore.normalization import RMSNorm
from pgcore.rope import rotation, token_positions


class ToyBlock(nn.Module):
    """Attention, then a gated MLP; each has a norm and a skip."""

    def __init__(self, width, mlp_dim, attention=Attention, **heads):
        super().__init__()
        self.norm, self.mlp_norm = RMSNorm(width), RMSNorm(width)
        self.attention = attention(width, **heads)
        self.gate = nn.Linear(width, mlp_dim, bias=False)
        self.up = nn.Linear(width, mlp_dim, bias=False)
        self.down = nn.Linear(mlp_dim, width, bias=False)

    def forward(self, x, **options):
        x = x + self.attention(self.norm(x), **options)
        h = self.mlp_norm(x)
        return x + self.down(F.gelu(self.gate(h)) * self.up(h))


class ToyDecoder(nn.Module):
    """A few blocks between an embedding table and the same table."""

    def __init__(
        self,
        *,
        width=48,
        depth=3,
        mlp_dim=96,
        vocab_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        **options,
    ):
        super().__init__()
        heads = {
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
        }
        self.head_dim = head_dim
        self.table = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(
            ToyBlock(width, mlp_dim, **heads, **options) for _ in range(depth)
        )
        self.norm = RMSNorm(width)

    def forward(self, ids, *, positions, mask, cache=None):
        """ids B T, positions B T, mask B 1 T S, hidden B T D."""
        x = self.table(ids)
        rotate = rotation(positions, self.head_dim, dtype=x.dtype)
        layers = [None] * len(self.blocks)
        if cache is not None:
            layers = cache.layers
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block(x, mask=mask, rotate=rotate, cache=layer)
        return self.norm(x)

    def logits(self, hidden):
        """hidden ... D, logits ... V."""
        return F.linear(hidden, self.table.weight)


@torch.no_grad()
def draw_weights(model, seed=0):
    """Random weights at a size that keeps the variance; norms too."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        std = weight.shape[1] ** -0.5 if weight.ndim > 1 else 0.3
        weight.normal_(std=std, generator=generator)
    return model


def write_obviously(model, ids, is_token, num_new):
    """Greedy: num_new more tokens, everything read again for each."""
    is_token = F.pad(is_token, (0, num_new), value=True)  # B S
    mask = attention_mask(torch.ones_like(is_token), is_token)
    positions = token_positions(is_token)
    for n in range(ids.shape[1], is_token.shape[1]):
        hidden = model(ids, positions=positions[:, :n], mask=mask[:, :, :n, :n])
        new = model.logits(hidden[:, -1:]).argmax(dim=-1)  # B 1
        ids = torch.cat([ids, new], dim=1)
    return ids


class AppendLayer:
    """Keys and values of one layer; each update makes longer copies."""

    k = v = None

    def update(self, k, v):
        if self.k is not None:
            k = torch.cat([self.k, k], dim=2)  # B K S H
            v = torch.cat([self.v, v], dim=2)
        self.k, self.v = k, v
        return k, v


class AppendCache:
    """A cache that grows by torch.cat."""

    def __init__(self, depth):
        self.layers = [AppendLayer() for _ in range(depth)]
        self.num_tokens = 0

    def reserve(self, num_tokens):
        """Numbers of the slots that the coming forward fills."""
        end = self.num_tokens + num_tokens
        self.slots = torch.arange(self.num_tokens, end)
        self.num_tokens = end
        return self.slots

    def clear(self):
        self.__init__(len(self.layers))


def rows_so_far(mask, cache):
    """Rows of the new queries; a column for each key there is."""
    return mask[:, :, cache.slots, : cache.num_tokens]


def rows_of(mask, cache):
    """Rows of the new queries, over all slots."""
    return mask[:, :, cache.slots]


def positions_of(is_token, cache):
    """Positions of the new tokens; fillers are not counted."""
    return token_positions(is_token)[:, cache.slots]


def read_in_pieces(
    model,
    ids,
    is_token,
    lengths,
    cache,
    *,
    starts_block=None,
    rows=rows_of,
    positions=positions_of,
):
    """Logits of ids [B, T], read in pieces; is_token: all S slots."""
    if starts_block is None:
        starts_block = torch.ones_like(is_token)  # causal
    mask = attention_mask(starts_block, is_token)
    logits = []
    for piece in ids.split(lengths, dim=1):
        cache.reserve(piece.shape[1])
        hidden = model(
            piece,
            positions=positions(is_token, cache),
            mask=rows(mask, cache),
            cache=cache,
        )
        logits.append(model.logits(hidden))
    return torch.cat(logits, dim=1)


def write(
    model, ids, is_token, num_new, cache, *, rows=rows_of, positions=positions_of
):
    """Greedy, each token is fed once; is_token has all S slots."""
    mask = attention_mask(torch.ones_like(is_token), is_token)
    new = ids
    for _ in range(num_new):
        cache.reserve(new.shape[1])
        hidden = model(
            new,
            positions=positions(is_token, cache),
            mask=rows(mask, cache),
            cache=cache,
        )
        new = model.logits(hidden[:, -1:]).argmax(dim=-1)  # B 1
        ids = torch.cat([ids, new], dim=1)
    return ids


def left_padded(prompts):
    """Prompts as ids and is_token [B, T], fillers on the left."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        row[longest - len(prompt) :] = torch.tensor(prompt)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    is_token = torch.arange(longest) >= longest - lengths[:, None]
    return ids, is_token
