"""Who is in a scene and where: kinds, sides and places.

Axes: R pixels a side.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from pgcore.lab._draws import Draws
from pgcore.lab._sheets import catalogue
from pgcore.lab._sprites import Sprite, sprite

MOST_OF_A_KIND = 4
HELD_OUT_PERCENT = 10  # of all pairs of concepts
_KIND_TRIES = 64
_PLACE_TRIES = 24


class Drawn(NamedTuple):
    """A concept as one artist drew it: a cell of a sheet."""

    concept: str
    style: str
    cell: int
    variant: int = 0  # 0 is as drawn, see sprite()

    def sprite(self, side: int) -> Sprite:
        """It, with `side` pixels a side."""
        return sprite(self.style, self.cell, side, self.variant)


class Placed(NamedTuple):
    """A sprite at its place: the top left corner, in pixels."""

    drawn: Drawn
    sprite: Sprite
    top: int
    left: int


Cast = dict[str, tuple[Drawn, ...]]


@functools.lru_cache(maxsize=64)
def cast(styles: tuple[str, ...], concepts: tuple[str, ...]) -> Cast:
    """List the drawings of each concept; what none of the artists drew is left out."""
    rows = {row["names"]["en"]: row["cells"] for row in catalogue()["concepts"]}
    drawings = {
        concept: tuple(
            Drawn(concept, style, rows[concept][style])
            for style in styles
            if style in rows[concept]
        )
        for concept in concepts
    }
    return {concept: found for concept, found in drawings.items() if found}


@functools.lru_cache(maxsize=64)
def drawn_concepts(
    styles: tuple[str, ...], concepts: tuple[str, ...]
) -> tuple[str, ...]:
    """List the concepts that at least one of the artists drew, in their order."""
    return tuple(cast(styles, concepts))


@functools.cache
def _codes() -> dict[str, str]:
    return {row["names"]["en"]: row["code"] for row in catalogue()["concepts"]}


@functools.lru_cache(maxsize=2**18)
def is_held_out(one: str, other: str) -> bool:
    """Split pairs of concepts by their code points alone; the order is no matter."""
    pair = " ".join(sorted((_codes()[one], _codes()[other])))
    return int(hashlib.sha256(pair.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


@functools.lru_cache(maxsize=64)
def held_out_pairs(
    styles: tuple[str, ...], concepts: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    """List the held-out pairs among the concepts that the artists drew."""
    return tuple(
        pair
        for pair in itertools.combinations(drawn_concepts(styles, concepts), 2)
        if is_held_out(*pair)
    )


def newcomer(
    draws: Draws, concepts: Sequence[str], present: Collection[str], pairs: str
) -> str | None:
    """Draw a concept that is not present but could be; None if 64 tries find none.

    pairs: with "seen", a concept that is held out with a present one could not be.
    """
    for _ in range(_KIND_TRIES):
        new = draws.pick(concepts)
        strange = pairs == "seen" and any(is_held_out(new, kind) for kind in present)
        if new not in present and not strange:
            return new
    return None


def choose_kinds(
    draws: Draws,
    concepts: Sequence[str],
    number: int,
    same_kind: float,
    pairs: str,
    held_out: Sequence[tuple[str, str]],
) -> list[str]:
    """Draw the concepts of `number` objects.

    held_out: pairs of which one comes first, if any are given.

    All differ, except that with probability same_kind the first comes 2 to 4 times.
    Where no other could join, the first is repeated.
    """
    first = draws.pick(held_out) if held_out else (draws.pick(concepts),)
    kinds = draws.shuffled(first)
    room = min(number - len(kinds), MOST_OF_A_KIND - 1)
    if room > 0 and draws.chance(same_kind):
        kinds += [kinds[0]] * draws.between(1, room)
    while len(kinds) < number:
        kinds.append(newcomer(draws, concepts, kinds, pairs) or kinds[0])
    return kinds


def place_all(
    draws: Draws,
    drawn: Sequence[Drawn],
    size: int,
    sides: tuple[int, int],
    max_overlap: float,
) -> tuple[list[Placed], UInt8[np.ndarray, "R R"]]:
    """Place every sprite, the later ones in front.

    sides: smallest and largest side in pixels.
    max_overlap: share of a sprite's visible pixels that later ones may hide.

    Returns the sprites and their segments [R, R]: 0 is background, n is the n-th.
    """
    segments = np.zeros((size, size), np.uint8)
    placed: list[Placed] = []
    hidden = np.zeros(len(drawn) + 1, np.int64)
    for one in drawn:
        limits = [max_overlap * other.sprite.visible for other in placed]
        new = _place_one(draws, one, segments, sides, hidden, limits)
        if new is None:
            return _place_in_grid(draws, drawn, size, sides)
        placed.append(new)
        _stamp(segments, new, len(placed))
    return placed, segments


def _place_one(
    draws: Draws,
    drawn: Drawn,
    segments: np.ndarray,
    sides: tuple[int, int],
    hidden: np.ndarray,
    limits: Sequence[float],
) -> Placed | None:
    """Try places until nobody is hidden beyond its limit; updates hidden."""
    size = len(segments)
    side = draws.between(*sides)
    for attempt in range(_PLACE_TRIES):
        if attempt == _PLACE_TRIES // 2:
            side = sides[0]
        picture = drawn.sprite(side)
        top, left = draws.below(size - side + 1), draws.below(size - side + 1)
        under = segments[top : top + side, left : left + side][picture.mask]
        after = hidden + np.bincount(under, minlength=len(hidden))
        if all(
            now <= limit for now, limit in zip(after[1:].tolist(), limits, strict=False)
        ):
            hidden[1:] = after[1:]
            return Placed(drawn, picture, top, left)
    return None


def _place_in_grid(
    draws: Draws, drawn: Sequence[Drawn], size: int, sides: tuple[int, int]
) -> tuple[list[Placed], np.ndarray]:
    """Give each sprite a cell of a square grid: always possible, never an overlap."""
    room = size // grid_side(len(drawn))
    corners = [row * room for row in range(grid_side(len(drawn)))]
    free = draws.shuffled([(top, left) for top in corners for left in corners])
    segments = np.zeros((size, size), np.uint8)
    placed = []
    for one, (top, left) in zip(drawn, free, strict=False):
        side = draws.between(sides[0], min(sides[1], room))
        top += draws.below(room - side + 1)
        left += draws.below(room - side + 1)
        placed.append(Placed(one, one.sprite(side), top, left))
        _stamp(segments, placed[-1], len(placed))
    return placed, segments


def grid_side(number: int) -> int:
    """Count the cells along one side of the smallest square grid for so many."""
    return math.isqrt(number - 1) + 1


def _stamp(segments: np.ndarray, placed: Placed, number: int) -> None:
    """Write the number of a sprite where it is visible."""
    mask = placed.sprite.mask
    part = segments[
        placed.top : placed.top + len(mask), placed.left : placed.left + len(mask)
    ]
    part[mask] = number
