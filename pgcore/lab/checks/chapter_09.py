"""Checks of chapter 09, the KV-cache. Oracles: tensors counted, one causal pass."""

from typing import Any

import torch
from torch import Tensor

from pgcore.attention import attention_mask
from pgcore.kv_cache import KVCache
from pgcore.lab.checks import exercise, require, require_close


def draw(*shapes: tuple[int, ...], seed: int) -> list[Tensor]:
    """Normal numbers, one tensor a shape."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


GEMMA_WEIGHTS = 2_506_096_640  # of Gemma 2B with one key head, without norms
GEMMA_STEPS = ((300, 1, 11), (300, 8, 11), (4360, 1, 11), (4360, 8, None))

DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float64)


@exercise("09.1")
def bytes_are_counted(cache_bytes):
    """equals the bytes of a cache that was allocated"""
    for seed, dtype in enumerate(DTYPES):
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.randint(1, 6, (5,), generator=generator).tolist()
        depth, heads, width, batch, slots = sizes
        cache = KVCache(
            depth=depth,
            batch_size=batch,
            num_kv_heads=heads,
            head_dim=width,
            num_slots=slots,
            dtype=dtype,
        )
        found = cache_bytes(*sizes, dtype)
        require(
            isinstance(found, int) and found == cache.num_bytes,
            f"sizes {sizes}, {dtype}: expected {cache.num_bytes}, got {found!r}.",
        )


@exercise("09.1")
def bytes_of_gemma(cache_bytes):
    """says 18,432 bytes for a token of Gemma 2B, and twice for two"""
    for batch, slots in ((1, 1), (1, 2), (2, 1)):
        found = cache_bytes(18, 1, 256, batch, slots, torch.bfloat16)
        expected = 18_432 * batch * slots
        require(found == expected, f"expected {expected}, got {found!r}.")


def both_of(pair: Any) -> tuple[Any, Any]:
    """The two functions of exercise 09.2."""
    require(
        isinstance(pair, tuple) and len(pair) == 2 and all(map(callable, pair)),
        'expected a pair of functions: check("09.2", (room_for, store)).',
    )
    room_for, store = pair
    return room_for, store


@exercise("09.2")
def slots_are_written(pair):
    """writes its slots, in place, and no other"""
    _, store = both_of(pair)
    for seed, (start, T) in enumerate(((0, 1), (0, 6), (3, 2), (4, 2), (5, 1))):
        shape, new = (2, 3, 6, 4), (2, 3, T, 4)
        keys, values, k, v = draw(shape, shape, new, new, seed=seed)
        expected = keys.clone(), values.clone()
        expected[0][:, :, start : start + T] = k
        expected[1][:, :, start : start + T] = v
        store(keys, values, torch.tensor(start), k, v)
        hint = f"{T} tokens from slot {start}."
        require_close(keys, expected[0], hint, rtol=0, atol=0)
        require_close(values, expected[1], hint, rtol=0, atol=0)


@exercise("09.2")
def overflow_is_refused(pair):
    """refuses what does not fit, and nothing else"""
    room_for, _ = both_of(pair)
    for start in range(6):
        for num_new in range(1, 8):
            try:
                room_for(start, num_new, 6)
                refused = False
            except ValueError:
                refused = True
            case = f"{num_new} tokens from slot {start} of 6"
            require(
                refused == (start + num_new > 6),
                f"{case}: {'refused' if refused else 'let through'}.",
            )


@exercise("09.2")
def store_compiles_once(pair):
    """is compiled once for all starts"""
    _, store = both_of(pair)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(store, backend=keep, fullgraph=True, dynamic=False)
    slots, new = (1, 2, 6, 3), (1, 2, 1, 3)
    keys, values, k, v = draw(slots, slots, new, new, seed=9)
    for start in range(6):
        compiled(keys, values, torch.tensor(start), k, v)
    torch.compiler.reset()
    hint = "Nothing in store may depend on the number in start."
    require(len(graphs) == 1, f"compiled {len(graphs)} times. {hint}")
    require_close(keys, k.expand_as(keys))


def padded_mask(lengths: Tensor, width: int, num_slots: int) -> Tensor:
    """The oracle: chapter 05's whole mask; rows of fillers are empty."""
    slots = torch.arange(num_slots)
    is_token = slots >= width - lengths[:, None]
    mask = attention_mask(torch.ones_like(is_token), is_token)
    return mask & is_token[:, None, :, None]


def drawn(row: Tensor) -> str:
    """A row of a mask as text."""
    return "".join("#" if may_read else "." for may_read in row.flatten().tolist())


@exercise("09.3")
def row_is_of_the_whole_mask(row_of):
    """equals the row of the whole mask, fillers and all"""
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 6, (3,), generator=generator)
        width = int(lengths.max()) + seed % 2
        whole = padded_mask(lengths, width, width + 4)
        for slot in range(width + 4):
            found = row_of(lengths, width, slot, width + 4)
            case = f"lengths {lengths.tolist()}, width {width}, slot {slot}"
            require(
                isinstance(found, Tensor) and found.dtype == torch.bool,
                "expected a tensor of booleans.",
            )
            require(
                found.shape == (3, 1, 1, width + 4),
                f"expected shape {(3, 1, 1, width + 4)}, got {tuple(found.shape)}.",
            )
            expected = whole[:, :, slot : slot + 1]
            for b in range(3):
                require(
                    torch.equal(found[b], expected[b]),
                    f"{case}, prompt {b}: expected {drawn(expected[b])}, "
                    f"got {drawn(found[b])} (# may be read).",
                )


@exercise("09.3")
def row_does_not_know_the_batch(row_of):
    """lets a prompt read the same tokens alone and in a batch"""
    lengths = torch.tensor([2, 5, 1])
    together = row_of(lengths, 5, 6, 9)
    for b, length in enumerate(lengths.tolist()):
        alone = row_of(lengths[b : b + 1], length, length + 1, length + 4)
        require(
            torch.equal(together[b, ..., 5 - length :], alone[0]),
            f"prompt of {length} tokens: reads others in a batch than alone.",
        )


def tried_one_by_one(flops: int, own: int, shared: int, reads: int, computes: int):
    """The oracle: the first of the batches 1, 2, ... that arithmetic limits."""
    for batch in range(1, 2000):
        if batch * flops * reads >= (shared + batch * own) * computes:
            return batch
    return None


@exercise("09.4")
def batch_is_the_first(first_batch):
    """finds what trying one batch after the other finds"""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        sizes = torch.randint(1, 20, (5,), generator=generator).tolist()
        expected, found = tried_one_by_one(*sizes), first_batch(*sizes)
        require(
            found == expected,
            f"flops, own, shared, reads, computes = {sizes}: "
            f"expected {expected}, got {found!r}.",
        )


@exercise("09.4")
def batch_of_gemma(first_batch):
    """knows Gemma 2B: a batch of 11 after 300 tokens, never with 8 key heads"""
    machine = 40 * 10**9, 400 * 10**9
    for tokens, heads, expected in GEMMA_STEPS:
        wider = 18 * 2 * 2048 * 256 * (heads - 1)
        weights = GEMMA_WEIGHTS + wider
        flops = 2 * weights + 4 * tokens * 18 * 8 * 256
        own = 2 * 18 * heads * 256 * 2 * (tokens + 1)
        found = first_batch(flops, own, 2 * weights, *machine)
        require(
            found == expected,
            f"{tokens} tokens, {heads} key heads: expected {expected}, got {found!r}.",
        )
