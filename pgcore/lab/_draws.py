"""Random numbers for scenes: the same on every machine, for ever."""

from collections.abc import Iterator, Sequence

import numpy as np


class Draws:
    """One stream of numbers for each (seed, *key), read from front to back.

    NumPy promises that PCG64's raw numbers never change; it does not for
    ``integers`` or ``random``. 2**64 numbers modulo a few thousand: the bias is
    below 1e-15.
    """

    def __init__(self, seed: int, *key: int):
        if (least := min(seed, *key)) < 0:
            raise ValueError(f"a seed and an index must be 0 or more, got {least}")
        sequence = np.random.SeedSequence(seed, spawn_key=key)
        self._next = _raw_numbers(np.random.PCG64(sequence)).__next__

    def below(self, end: int) -> int:
        """Draw from 0, 1, ..., end - 1."""
        return self._next() % end

    def between(self, low: int, high: int) -> int:
        """Draw from low, ..., high, both included."""
        return low + self._next() % (high - low + 1)

    def chance(self, probability: float) -> bool:
        """Say yes with this probability."""
        return self._next() < int(probability * 2**64)

    def pick(self, things: Sequence):
        """Draw one of several things."""
        return things[self._next() % len(things)]

    def shuffled(self, things: Sequence) -> list:
        """Draw an order (Fisher and Yates)."""
        things = list(things)
        for last in range(len(things) - 1, 0, -1):
            other = self.below(last + 1)
            things[last], things[other] = things[other], things[last]
        return things


def _raw_numbers(source: np.random.PCG64) -> Iterator[int]:
    while True:
        yield from source.random_raw(64).tolist()
