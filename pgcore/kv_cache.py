# Generated from chapters/09_kv_cache.ipynb.
# Edit the notebook, then run "make chapters".
"""A static KV-cache: keys and values are computed once, then kept.

Preallocated, batched, handed to the model as an argument. Positions and
masks are the caller's; the cache says which slots a forward fills.
"""

from collections.abc import Callable
from copy import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor


class LayerCache:
    """One layer's views of a ``KVCache``, for its ``Attention``.

    Source: the ``Cache`` protocol of chapter 05.

    Built in chapter 09, KV-cache.
    """

    slots: Int[Tensor, " T"]  # that the coming forward fills

    def __init__(
        self,
        keys: Float[Tensor, "B K S H"],
        values: Float[Tensor, "B K S H"],
    ):
        self._keys, self._values = keys, values

    def update(
        self, k: Float[Tensor, "B K T H"], v: Float[Tensor, "B K T H"]
    ) -> tuple[Float[Tensor, "B K S H"], Float[Tensor, "B K S H"]]:
        """Write T keys and values to the reserved slots; return all S.

        Without a new ``reserve`` it writes the same slots again.
        Raises ValueError, before it writes, if k or v have another
        shape, dtype or device than the cache, if T was not reserved,
        and for tensors with a gradient: training takes ``cache=None``.
        """
        keys, values = self._keys, self._values
        B, K, _, H = keys.shape
        fits = keys.dtype, (B, K, len(self.slots), H), keys.device
        for name, new in (("k", k), ("v", v)):
            found = new.dtype, tuple(new.shape), new.device
            if found != fits:
                text = (
                    "{}: expected {} {} on {}, as the cache is and the "
                    "last reserve() says, found {} {} on {}"
                )
                raise ValueError(text.format(name, *fits, *found))
            if new.requires_grad:
                raise ValueError(
                    f"{name}: expected no gradient, found one; use a "
                    "cache under torch.no_grad(), train with cache=None"
                )
        keys.index_copy_(2, self.slots, k)  # in place
        values.index_copy_(2, self.slots, v)
        return keys, values


class KVCache:
    """Keys and values of all L layers: S slots a row, allocated once.

    Call ``reserve`` before each forward, outside of a compiled step.
    The layers then write into ``slots``. Who may read a slot is the
    mask's business, also that nobody reads one not written yet. The
    zeros matter all the same: a weight of 0 times NaN is NaN.
    keys, values: L B K S H. layers: a ``Cache`` for each ``Attention``.
    slots: T, of the last ``reserve``. num_tokens: slots in use, an int
    that no compiled step may read. Made under torch.inference_mode, a
    cache can be written only there.
    Raises ValueError unless all sizes are at least 1.
    Source: Shazeer (2019), incremental multi-head attention.

    Built in chapter 09, KV-cache.
    """

    keys: Float[Tensor, "L B K S H"]
    values: Float[Tensor, "L B K S H"]
    slots: Int[Tensor, " T"]
    num_tokens: int

    def __init__(
        self,
        *,
        depth: int,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        num_slots: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        sizes = depth, batch_size, num_kv_heads, num_slots, head_dim
        if min(sizes) < 1:
            raise ValueError(
                "depth, batch_size, num_kv_heads, num_slots, head_dim: "
                f"expected at least 1, found {sizes}"
            )
        keys = torch.zeros(sizes, dtype=dtype, device=device)
        self._hold(keys, torch.zeros_like(keys))
        self.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values; on "meta", what they would take."""
        return self.keys.nbytes + self.values.nbytes

    def reserve(self, num_tokens: int) -> Int[Tensor, " T"]:
        """Take the next T slots for the coming forward and return them.

        Raises ValueError when fewer are left; nothing has changed then.
        """
        num_slots = self.keys.shape[3]
        left = num_slots - self.num_tokens
        if type(num_tokens) is not int or not 1 <= num_tokens <= left:
            raise ValueError(
                f"num_tokens: expected 1 to {left}, an int, the slots "
                f"left of {num_slots}, found {num_tokens!r}"
            )
        start = self.num_tokens
        self._advance(start, start + num_tokens)
        return self.slots

    def clear(self) -> None:
        """Forget all tokens. Nothing is zeroed: the mask hides it.

        It cannot hide a NaN, an infinity or a key so large that scores
        overflow: make a new cache after a text that left one behind.
        """
        self._advance(0, 0)

    def changed(self, change: Callable[[Tensor], Tensor]) -> "KVCache":
        """A cache of its own with the same tokens in use.

        change: what makes its keys and values from L B K S H, such as
        other rows or more slots.
        """
        new = copy(self)
        new._hold(change(self.keys), change(self.values))
        for layer in new.layers:
            layer.slots = self.slots
        return new

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        """Take the views here: a compiled step would copy the cache for it.

        A layer does not hold the cache: that would be a cycle, and its
        memory would outlive the last use.
        """
        self.keys, self.values = keys, values
        views = zip(keys.unbind(), values.unbind(), strict=True)
        self.layers = [LayerCache(k, v) for k, v in views]

    def _advance(self, start: int, end: int) -> None:
        self.slots = torch.arange(start, end, device=self.keys.device)
        self.num_tokens = end
        for layer in self.layers:
            layer.slots = self.slots


__all__ = ["KVCache", "LayerCache"]
