"""Chapter 05: one right answer for each exercise, and several wrong ones."""

import math

import torch

from pgcore.attention import attention_mask
from pgcore.numerics import softmax

# 05.1


def one_head(q, k, v):
    return softmax(q @ k.T / math.sqrt(q.shape[-1])) @ v


def head_without_scale(q, k, v):
    return softmax(q @ k.T) @ v


def head_scaled_by_h(q, k, v):
    return softmax(q @ k.T / q.shape[-1]) @ v


def head_over_queries(q, k, v):
    return softmax(q @ k.T / math.sqrt(q.shape[-1]), dim=0) @ v


def head_of_keys_and_queries_swapped(q, k, v):
    return softmax(k @ q.T / math.sqrt(q.shape[-1])).T @ v


def head_without_softmax(q, k, v):
    scores = q @ k.T / math.sqrt(q.shape[-1])
    return scores / scores.sum(dim=-1, keepdim=True) @ v


# 05.2


def masked_head(q, k, v, mask):
    can_read = mask.any(dim=-1, keepdim=True)
    scores = q @ k.T / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask & can_read, -torch.inf)
    return torch.softmax(scores, dim=-1).masked_fill(~can_read, 0.0) @ v


def mask_gives_nan(q, k, v, mask):
    scores = q @ k.T / math.sqrt(q.shape[-1])
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1) @ v


def nan_is_hidden_afterwards(q, k, v, mask):
    """Right forwards. Backwards the NaN returns: an added -inf does not stop it."""
    hidden = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    weights = torch.softmax(q @ k.T / math.sqrt(q.shape[-1]) + hidden, dim=-1)
    return torch.where(weights.isnan(), 0.0, weights) @ v


def empty_rows_read_everything(q, k, v, mask):
    scores = q @ k.T / math.sqrt(q.shape[-1])
    lowest = torch.finfo(scores.dtype).min
    return torch.softmax(scores.masked_fill(~mask, lowest), dim=-1) @ v


def mask_upside_down(q, k, v, mask):
    return masked_head(q, k, v, ~mask)


def mask_after_the_softmax(q, k, v, mask):
    return torch.softmax(q @ k.T / math.sqrt(q.shape[-1]), dim=-1) * mask @ v


def mask_multiplies_the_scores(q, k, v, mask):
    scores = q @ k.T / math.sqrt(q.shape[-1]) * mask
    return torch.softmax(scores, dim=-1) @ v


# 05.3


def mix_heads(heads, weight):
    _, N, _, H = heads.shape
    return torch.einsum("bnth,dnh->btd", heads, weight.unflatten(1, (N, H)))


def heads_and_dims_swapped(heads, weight):
    _, N, _, H = heads.shape
    return torch.einsum("bnth,dhn->btd", heads, weight.unflatten(1, (H, N)))


def merged_without_transpose(heads, weight):
    B, N, T, H = heads.shape
    return heads.reshape(B, T, N * H) @ weight.T


def heads_averaged(heads, weight):
    return mix_heads(heads, weight) / heads.shape[1]


def one_slab_for_all(heads, weight):
    return heads.sum(dim=1) @ weight[:, : heads.shape[-1]].T


# 05.4


def copy_previous(letters, length):
    w_q, w_k = torch.zeros(2, letters + length, length)
    w_q[letters:] = 20 * math.sqrt(length) * torch.eye(length).roll(-1, dims=1)
    w_k[letters:] = torch.eye(length)
    w_v = torch.zeros(letters + length, letters)
    w_v[:letters] = torch.eye(letters)
    return w_q, w_k, w_v


def copies_itself(letters, length):
    _, w_k, w_v = copy_previous(letters, length)
    return 20 * math.sqrt(length) * w_k, w_k, w_v


def copies_the_next(letters, length):
    w_q, w_k, w_v = copy_previous(letters, length)
    w_q[letters:] = w_q[letters:].roll(2, dims=1)
    return w_q, w_k, w_v


def copies_softly(letters, length):
    w_q, w_k, w_v = copy_previous(letters, length)
    return w_q / 20, w_k, w_v


def copies_the_place(letters, length):
    w_q, w_k, w_v = copy_previous(letters, length)
    return w_q, w_k, w_v.flip(0)


def is_steered_by_letters(letters, length):
    w_q, w_k, w_v = copy_previous(letters, length)
    w_q[:letters] = 1.0
    return w_q, w_k, w_v


# 05.5


def packed_mask(document):
    causal = attention_mask(torch.ones_like(document, dtype=torch.bool))
    return causal & (document[:, :, None] == document[:, None, :])[:, None]


def packed_without_causal(document):
    return (document[:, :, None] == document[:, None, :])[:, None]


def packed_by_causal_alone(document):
    return attention_mask(torch.ones_like(document, dtype=torch.bool))


def packed_by_blocks(document):
    """Documents as blocks: a later one reads all earlier ones, and itself both ways."""
    starts = torch.zeros_like(document, dtype=torch.bool)
    starts[:, 1:] = document[:, 1:] != document[:, :-1]
    return attention_mask(starts)


def packed_for_rising_numbers(document):
    """Right for 0 0 1 1, wrong for documents in another order."""
    causal = attention_mask(torch.ones_like(document, dtype=torch.bool))
    return causal & (document[:, :, None] <= document[:, None, :])[:, None]


def packed_as_numbers(document):
    return packed_mask(document).float()


RIGHT = {
    "05.1": one_head,
    "05.2": masked_head,
    "05.3": mix_heads,
    "05.4": copy_previous,
    "05.5": packed_mask,
}

WRONG = {
    "05.1": [
        head_without_scale,
        head_scaled_by_h,
        head_over_queries,
        head_of_keys_and_queries_swapped,
        head_without_softmax,
    ],
    "05.2": [
        mask_gives_nan,
        nan_is_hidden_afterwards,
        empty_rows_read_everything,
        mask_upside_down,
        mask_after_the_softmax,
        mask_multiplies_the_scores,
    ],
    "05.3": [
        heads_and_dims_swapped,
        merged_without_transpose,
        heads_averaged,
        one_slab_for_all,
    ],
    "05.4": [
        copies_itself,
        copies_the_next,
        copies_softly,
        copies_the_place,
        is_steered_by_letters,
    ],
    "05.5": [
        packed_without_causal,
        packed_by_causal_alone,
        packed_by_blocks,
        packed_for_rising_numbers,
        packed_as_numbers,
    ],
}
