"""Chapter 09: one right answer for each exercise, and several wrong ones."""

import torch

# 09.1


def cache_bytes(depth, num_kv_heads, head_dim, batch_size, num_slots, dtype):
    numbers = depth * num_kv_heads * head_dim * batch_size * num_slots
    return 2 * numbers * dtype.itemsize


def bytes_of_keys_only(*sizes_and_dtype):
    return cache_bytes(*sizes_and_dtype) // 2


def bytes_in_bits(*sizes_and_dtype):
    return 8 * cache_bytes(*sizes_and_dtype)


def bytes_always_bfloat16(*sizes_and_dtype):
    return cache_bytes(*sizes_and_dtype[:-1], torch.bfloat16)


def bytes_without_batch(depth, heads, width, batch, slots, dtype):
    return cache_bytes(depth, heads, width, 1, slots, dtype)


# 09.2


def room_for(start, num_new, num_slots):
    if start + num_new > num_slots:
        raise ValueError("full")


def store(keys, values, start, k, v):
    slots = start + torch.arange(k.shape[2])
    keys.index_copy_(2, slots, k)
    values.index_copy_(2, slots, v)


def no_room_for_the_last(start, num_new, num_slots):
    if start + num_new >= num_slots:
        raise ValueError("full")


def always_room(start, num_new, num_slots):
    return None


def store_one(keys, values, start, k, v):
    keys.index_copy_(2, start[None], k[:, :, :1])
    values.index_copy_(2, start[None], v[:, :, :1])


def store_and_wrap(keys, values, start, k, v):
    slots = (start + 1 + torch.arange(k.shape[2])) % keys.shape[2]
    keys.index_copy_(2, slots, k)
    values.index_copy_(2, slots, v)


def store_that_asks_itself(keys, values, start, k, v):
    """Right numbers; a branch that depends on them breaks the graph."""
    if start + k.shape[2] > keys.shape[2]:
        raise ValueError("full")
    store(keys, values, start, k, v)


def store_keys_only(keys, values, start, k, v):
    keys.index_copy_(2, start + torch.arange(k.shape[2]), k)


def store_copies(keys, values, start, k, v):
    """Not in place."""
    store(keys.clone(), values.clone(), start, k, v)


# 09.3


def row_of(lengths, width, slot, num_slots):
    slots = torch.arange(num_slots)
    may_read = ((width - lengths)[:, None] <= slots) & (slots <= slot)
    return may_read[:, None, None]


def row_without_itself(lengths, width, slot, num_slots):
    slots = torch.arange(num_slots)
    may_read = ((width - lengths)[:, None] <= slots) & (slots < slot)
    return may_read[:, None, None]


def row_one_too_far(lengths, width, slot, num_slots):
    return row_of(lengths, width, slot + 1, num_slots)


def row_with_fillers(lengths, width, slot, num_slots):
    may_read = torch.arange(num_slots) <= slot
    return may_read.expand(len(lengths), 1, 1, -1)


def row_padded_right(lengths, width, slot, num_slots):
    slots = torch.arange(num_slots)
    gap = (lengths[:, None] <= slots) & (slots < width)
    return (~gap & (slots <= slot))[:, None, None]


def row_of_the_longest(lengths, width, slot, num_slots):
    return row_of(lengths.amax().expand(len(lengths)), width, slot, num_slots)


# 09.4


def first_batch(flops, own, shared, reads, computes):
    steeper = flops * reads - own * computes
    return -(-shared * computes // steeper) if steeper > 0 else None


def batch_rounded_down(flops, own, shared, reads, computes):
    found = first_batch(flops, own, shared, reads, computes)
    return found and shared * computes // (flops * reads - own * computes)


def batch_without_own_bytes(flops, own, shared, reads, computes):
    return -(-shared * computes // (flops * reads))


def batch_one_more(flops, own, shared, reads, computes):
    steeper = flops * reads - own * computes
    return shared * computes // steeper + 1 if steeper > 0 else None


def batch_never_none(flops, own, shared, reads, computes):
    steeper = flops * reads - own * computes
    return -(-shared * computes // steeper) if steeper else 0


def batch_that_shares_nothing(flops, own, shared, reads, computes):
    return 1 if flops * reads >= (shared + own) * computes else None


RIGHT = {
    "09.1": cache_bytes,
    "09.2": (room_for, store),
    "09.3": row_of,
    "09.4": first_batch,
}
WRONG = {
    "09.1": [
        bytes_of_keys_only,
        bytes_in_bits,
        bytes_always_bfloat16,
        bytes_without_batch,
    ],
    "09.2": [
        (no_room_for_the_last, store),
        (always_room, store),
        (room_for, store_one),
        (room_for, store_and_wrap),
        (room_for, store_that_asks_itself),
        (room_for, store_keys_only),
        (room_for, store_copies),
        store,
    ],
    "09.3": [
        row_without_itself,
        row_one_too_far,
        row_with_fillers,
        row_padded_right,
        row_of_the_longest,
    ],
    "09.4": [
        batch_rounded_down,
        batch_without_own_bytes,
        batch_one_more,
        batch_never_none,
        batch_that_shares_nothing,
    ],
}
