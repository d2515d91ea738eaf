"""What lies behind the objects of a scene: a background and a few marks.

A background is a pattern of weights 0..255 [R, R] that mixes two colours.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from pgcore.lab._draws import Draws

RGB = tuple[int, int, int]
Weights = UInt8[np.ndarray, "R R"]

BACKGROUNDS = ("plain", "gradient", "stripes", "checks", "noise")
MARKS = ("rectangle", "disc", "line")

_CONTRAST = 50 * 7  # see contrast(): 50 levels in each channel
_COLOUR_TRIES = 8


def contrast(one: RGB, other: RGB) -> int:
    """Reckon how far apart two colours look: 0 to 7 * 255, green counts most."""
    (r, g, b), (red, green, blue) = one, other
    return 2 * abs(r - red) + 4 * abs(g - green) + abs(b - blue)


def _colour(draws: Draws) -> RGB:
    """Draw a muted colour: any, mixed with white or with a grey."""
    grey = 255 if draws.below(2) else draws.below(256)
    share = draws.between(64, 192)
    colour = draws.below(256), draws.below(256), draws.below(256)
    return _mix(colour, (grey, grey, grey), share)


def _clear_of(draws: Draws, rims: Sequence[RGB]) -> RGB:
    """Draw colours until one stands off from every rim; else keep the best."""
    best, furthest = (0, 0, 0), -1
    for _ in range(_COLOUR_TRIES):
        colour = _colour(draws)
        nearest = min((contrast(colour, rim) for rim in rims), default=_CONTRAST)
        if nearest > furthest:
            best, furthest = colour, nearest
        if furthest >= _CONTRAST:
            break
    return best


def _mix(one: RGB, other: RGB, share: int) -> RGB:
    """Mix `share` parts in 256 of the other colour into the one."""
    (r, g, b), (red, green, blue), rest = one, other, 256 - share
    return (
        (r * rest + red * share) >> 8,
        (g * rest + green * share) >> 8,
        (b * rest + blue * share) >> 8,
    )


@functools.cache
def _grid(size: int) -> Int[np.ndarray, "2 R R"]:
    return np.indices((size, size))


def _gradient(draws: Draws, size: int) -> Weights:
    down, right = draws.pick(((1, 0), (0, 1), (1, 1), (2, 1), (1, 2)))
    y, x = _grid(size)
    weights = (down * y + right * x) * 255 // max(1, (down + right) * (size - 1))
    weights = weights.astype(np.uint8)
    weights = weights[:, ::-1] if draws.below(2) else weights
    return weights[::-1] if draws.below(2) else weights


def _stripes(draws: Draws, size: int) -> Weights:
    down, right = draws.pick(((1, 0), (0, 1), (1, 1), (1, -1)))
    period = draws.between(max(2, size // 16), max(3, size // 5))
    y, x = _grid(size)
    return ((down * y + right * x) // period % 2 * 255).astype(np.uint8)


def _checks(draws: Draws, size: int) -> Weights:
    period = draws.between(max(2, size // 12), max(3, size // 4))
    y, x = _grid(size)
    return ((y // period + x // period) % 2 * 255).astype(np.uint8)


def _noise(draws: Draws, size: int) -> Weights:
    knots = draws.between(3, 9)
    small = np.array([draws.below(256) for _ in range(knots * knots)], np.uint8)
    image = Image.fromarray(small.reshape(knots, knots))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


_PATTERNS = {
    "gradient": _gradient,
    "stripes": _stripes,
    "checks": _checks,
    "noise": _noise,
}


def backdrop(
    draws: Draws, kind: str, size: int, rims: Sequence[RGB], marks: int
) -> UInt8[np.ndarray, "R R 3"]:
    """Draw a background of one kind and `marks` marks on it, [R, R, 3].

    rims: the outlines of the objects to come; the colours keep clear of them.
    """
    first = _clear_of(draws, rims)
    if kind == "plain":
        picture = np.full((size, size, 3), first, np.uint8)
    else:
        second = _clear_of(draws, rims)
        if kind != "gradient":
            second = _mix(first, second, draws.between(48, 144))
        weights = _PATTERNS[kind](draws, size)
        picture = _table(first, second)[weights]
    for _ in range(marks):
        _mark(draws, picture, _mix(first, _clear_of(draws, rims), 144))
    return picture


def _table(first: RGB, second: RGB) -> UInt8[np.ndarray, "256 3"]:
    """List the 256 mixtures of two colours."""
    share = np.arange(256)[:, None]
    mixed = np.array(first) * (255 - share) + np.array(second) * share
    return ((mixed + 127) // 255).astype(np.uint8)


@functools.cache
def _disc(side: int) -> np.ndarray:
    across = 2 * np.arange(side) - side + 1
    return across[:, None] ** 2 + across**2 <= side * side


def _mark(draws: Draws, picture: np.ndarray, colour: RGB) -> None:
    """Draw a small rectangle, disc or slanted line at a random place."""
    size = len(picture)
    kind = draws.pick(MARKS)
    small, large = max(2, size // 24), max(3, size // 8)
    height, width = draws.between(small, large), draws.between(small, large)
    if kind == "disc":
        width = height
    elif kind == "line":
        height, width = 2 * height, 2 * width
    top, left = (draws.below(max(1, size - side + 1)) for side in (height, width))
    part = picture[top : top + height, left : left + width]
    if kind == "rectangle":
        part[:] = colour
    elif kind == "disc":
        part[_disc(height)[: len(part), : part.shape[1]]] = colour
    else:
        steps = np.arange(2 * max(part.shape))
        down, right = (
            steps * len(part) // len(steps),
            steps * part.shape[1] // len(steps),
        )
        part[down, right if draws.below(2) else -1 - right] = colour
