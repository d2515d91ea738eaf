# Generated from chapters/09_kv_cache.ipynb.
# Edit the notebook, then run "make chapters".
"""Wrong twins from chapter 09, KV-cache."""

from functools import partial

import torch
import torch.nn.functional as F

from pgcore.attention import (
    Attention,
    attention_mask,
    merge_heads,
    split_heads,
)
from pgcore.kv_cache import KVCache
from pgcore.rope import token_positions


def positions_restart(is_token, cache):
    """Every forward counts from 0 again: all written tokens stand at 0.

    nanoVLM's draft cache lacked position ids; pull request 71 added
    them. With RoPE any start will do, as long as it is one for all.
    """
    restarted = torch.arange(len(cache.slots))
    return restarted.expand(len(is_token), -1)


def rows_one_slot_ahead(mask, cache):
    """Off by one: the query also reads the next slot, still a zero key.

    A score of 0 is no small score: the empty slot gets its share.
    """
    last = mask.shape[-1] - 1
    return mask[:, :, (cache.slots + 1).clamp(max=last)]


class KeysTurnedAgain(Attention):
    """Turns all cached keys by the new token's angle, at each step.

    They were turned when they were written. Keys that broadcast against
    one new position make it easy to miss; ``apply_rope`` refuses them.
    """

    def forward(self, x, *, mask, rotate, cache=None):
        q, k, v = (
            split_heads(project(x), self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q), rotate(k)
        if cache is not None:
            k, v = cache.update(k, v)
            if x.shape[1] == 1:
                slots = k.split(1, dim=2)
                k = torch.cat([rotate(slot) for slot in slots], dim=2)
        return self.o_proj(merge_heads(self.attend(q, k, v, mask)))


def causal_flag_for_mask(q, k, v, mask=None, scale=None):
    """is_causal=True: torch aligns the triangle at the top left.

    One query and five keys: it reads the first key only. Right for
    prefill without fillers, so the first token is right.
    """
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=True
    )


class UninitialisedCache(KVCache):
    """torch.empty, not zeros; NaN stands for what memory may hold."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.keys.fill_(torch.nan)
        self.values.fill_(torch.nan)


class OverflowHitsTheLastSlot(KVCache):
    """A full cache goes on, in its last slot, and says nothing."""

    def reserve(self, num_tokens):
        start, last = self.num_tokens, self.keys.shape[3] - 1
        self._advance(start, start + num_tokens)
        self.slots.clamp_(max=last)
        return self.slots


def right_padded(prompts):
    """Fillers on the right: the last column is a filler's in most rows.

    Seen again and again where batches differ from single prompts.
    """
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return ids, torch.arange(longest) < lengths[:, None]


def write_all_again(model, ids, is_token, num_new, cache):
    """Right words, no work saved: feeds the whole text at each step.

    The first draft of nanoVLM's cache gained 0.9% in speed. What helped
    was one query at a time, and the right is_causal (pull request 69).
    """
    mask = attention_mask(torch.ones_like(is_token), is_token)
    for _ in range(num_new):
        cache.clear()
        slots = cache.reserve(ids.shape[1])
        positions = token_positions(is_token)[:, slots]
        hidden = model(ids, positions=positions, cache=cache, mask=mask[:, :, slots])
        new = model.logits(hidden[:, -1:]).argmax(dim=-1)
        ids = torch.cat([ids, new], dim=1)
    return ids


class ViewsTakenInTheStep(KVCache):
    """Right numbers; a compiled step copies all keys and values.

    The first version of this chapter. A layer takes its view of the big
    tensor inside the step, where the compiler makes it a copy.
    """

    def __init__(self, **sizes):
        super().__init__(**sizes)
        for n, layer in enumerate(self.layers):
            layer.update = partial(self.update_layer, n)

    def update_layer(self, layer, k, v):
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self.slots, k)
        values.index_copy_(2, self.slots, v)
        return keys, values
