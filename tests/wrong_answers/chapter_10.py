"""Chapter 10: one right answer for each exercise, and several wrong ones."""

import torch
import torch.nn.functional as F

# 10.1


def geglu(x, gate, up, down):
    return (F.gelu(x @ gate.T, approximate="tanh") * (x @ up.T)) @ down.T


def geglu_by_erf(x, gate, up, down):
    return (F.gelu(x @ gate.T) * (x @ up.T)) @ down.T


def geglu_swapped(x, gate, up, down):
    return geglu(x, up, gate, down)


def geglu_added(x, gate, up, down):
    return (F.gelu(x @ gate.T, approximate="tanh") + x @ up.T) @ down.T


def swiglu(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def geglu_bends_both(x, gate, up, down):
    bent = F.gelu(x @ gate.T, approximate="tanh")
    return (bent * F.gelu(x @ up.T, approximate="tanh")) @ down.T


# 10.2


def capped_weights(scores, mask, cap):
    can_read = mask.any(dim=-1, keepdim=True)
    scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~mask & can_read, -torch.inf)
    return scores.softmax(dim=-1).masked_fill(~can_read, 0.0)


def cap_after_mask(scores, mask, cap):
    scores = scores.masked_fill(~mask, -torch.inf)
    return (cap * torch.tanh(scores / cap)).softmax(dim=-1)


def cap_forgotten(scores, mask, cap):
    return capped_weights(scores, mask, 1e9)


def cap_without_its_factor(scores, mask, cap):
    return capped_weights(scores / cap, mask, 1.0)


def clamped(scores, mask, cap):
    can_read = mask.any(dim=-1, keepdim=True)
    scores = scores.clamp(-cap, cap).masked_fill(~mask & can_read, -torch.inf)
    return scores.softmax(dim=-1).masked_fill(~can_read, 0.0)


def nan_in_empty_rows(scores, mask, cap):
    scores = (cap * torch.tanh(scores / cap)).masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1)


def nan_hidden_from_the_forward_pass(scores, mask, cap):
    """Right values. Backwards the NaN returns: an added -inf does not stop it."""
    hidden = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    weights = (cap * torch.tanh(scores / cap) + hidden).softmax(dim=-1)
    return torch.where(weights.isnan(), 0.0, weights)


def mask_after_the_softmax(scores, mask, cap):
    return (cap * torch.tanh(scores / cap)).softmax(dim=-1) * mask


def over_the_queries(scores, mask, cap):
    return capped_weights(scores.T, mask.T, cap).T


# 10.3


def count_parameters(config):
    c = config
    queries = 2 * c.width * c.num_heads * c.head_dim
    keys = 2 * c.width * c.num_kv_heads * c.head_dim
    norms = (4 if c.post_norms else 2) * c.width
    block = queries + keys + 3 * c.width * c.mlp_dim + norms
    return c.depth * block + c.width + c.vocab_size * c.width


def untied(config):
    return count_parameters(config) + config.vocab_size * config.width


def without_the_last_norm(config):
    return count_parameters(config) - config.width


def two_norms_always(config):
    extra = 2 * config.width * config.depth if config.post_norms else 0
    return count_parameters(config) - extra


def head_dim_from_width(config):
    c = config
    too_many = c.num_heads * c.head_dim - c.width
    return count_parameters(c) - 2 * c.depth * c.width * too_many


def keys_for_every_head(config):
    c = config
    missing = (c.num_heads - c.num_kv_heads) * c.head_dim
    return count_parameters(c) + 2 * c.depth * c.width * missing


def gate_forgotten(config):
    c = config
    return count_parameters(c) - c.depth * c.width * c.mlp_dim


# 10.4


def text(*shape):
    return torch.randint(97, shape, generator=torch.Generator().manual_seed(0))


def nearest(suspect, candidates, ids, part):
    seen = suspect(ids, part)
    gaps = {n: (c(ids, part) - seen).abs().max() for n, c in candidates.items()}
    return min(gaps, key=gaps.get)


def find_bug(suspect, candidates):
    return nearest(suspect, candidates, text(2, 16), 8)


def probes_at_once(suspect, candidates):
    return nearest(suspect, candidates, text(2, 16), None)


def probes_a_short_text(suspect, candidates):
    return nearest(suspect, candidates, text(2, 4), 2)


def probes_one_word(suspect, candidates):
    return nearest(suspect, candidates, torch.full((2, 16), 7), 8)


def takes_the_first_that_is_close(suspect, candidates):
    ids = text(2, 16)
    seen = suspect(ids, 8)
    for name, candidate in candidates.items():
        if torch.allclose(candidate(ids, 8), seen, atol=1e-2):
            return name
    return "none"


def compares_the_likeliest_words(suspect, candidates):
    ids = text(2, 16)
    seen = suspect(ids, 8).argmax(dim=-1)
    for name, candidate in candidates.items():
        if torch.equal(candidate(ids, 8).argmax(dim=-1), seen):
            return name
    return "none"


RIGHT = {
    "10.1": geglu,
    "10.2": capped_weights,
    "10.3": count_parameters,
    "10.4": find_bug,
}

WRONG = {
    "10.1": [geglu_by_erf, geglu_swapped, geglu_added, swiglu, geglu_bends_both],
    "10.2": [
        cap_after_mask,
        cap_forgotten,
        cap_without_its_factor,
        clamped,
        nan_in_empty_rows,
        nan_hidden_from_the_forward_pass,
        mask_after_the_softmax,
        over_the_queries,
    ],
    "10.3": [
        untied,
        without_the_last_norm,
        two_norms_always,
        head_dim_from_width,
        keys_for_every_head,
        gate_forgotten,
    ],
    "10.4": [
        probes_at_once,
        probes_a_short_text,
        probes_one_word,
        takes_the_first_that_is_close,
        compares_the_likeliest_words,
    ],
}
