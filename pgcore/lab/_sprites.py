"""One emoji at one size, ready to paste: as it was drawn, or a little bent.

Axes: s pixels a side of the sprite, R of the picture, n of any square.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, Int, UInt8, UInt16
from PIL import Image

from pgcore.lab._draws import Draws
from pgcore.lab._sheets import cells

OPAQUE = 128  # alpha from here on counts as visible
_BENT = 40  # at most, in 256ths, of each number that bends the plane
_TINTED = 28  # the same of each colour's gain
_ROOM = 16  # pixels around a cell, so that nothing is cut off


@dataclasses.dataclass(frozen=True, eq=False)
class Sprite:
    """A resized emoji.

    Attributes:
        colour: [s, s, 3], bytes, times alpha.
        clear: [s, s, 1], 255 - alpha.
        mask: [s, s], where alpha >= 128.
        visible: number of True in mask.
    """

    colour: UInt16[np.ndarray, "s s 3"]
    clear: UInt16[np.ndarray, "s s 1"]
    mask: Bool[np.ndarray, "s s"]
    visible: int

    def paste(self, picture: UInt8[np.ndarray, "R R 3"], top: int, left: int) -> None:
        """Lay the sprite on the picture, in place; rounds to the nearest byte."""
        side = len(self.mask)
        part = picture[top : top + side, left : left + side]
        part[:] = self.colour + (part * self.clear + 127) // 255


@functools.cache
def _original(style: str, cell: int, variant: int) -> Image.Image:
    original = Image.fromarray(cells(style)[cell]).convert("RGBa")
    return _bent(original, Draws(variant, cell)) if variant else original


def _bent(original: Image.Image, draws: Draws) -> Image.Image:
    """Turn, stretch, mirror and tint a drawing, each a little; cut it out tightly."""

    def about(middle: int, most: int) -> float:
        return (middle + draws.between(-most, most)) / 256

    mirror = -1 if draws.chance(0.25) else 1
    across, slant = mirror * about(256, _BENT), about(0, _BENT)
    lean, down = mirror * about(0, _BENT), about(256, _BENT)
    size = original.width + 2 * _ROOM
    frame, middle = Image.new("RGBa", (size, size)), size / 2
    frame.paste(original, (_ROOM, _ROOM))
    shift = middle * (1 - across - slant), middle * (1 - lean - down)
    plane = across, slant, shift[0], lean, down, shift[1]
    bent = frame.transform(
        frame.size, Image.Transform.AFFINE, plane, Image.Resampling.BILINEAR
    )
    gains = [about(256, _TINTED) for _ in range(3)]
    red, green, blue, alpha = (np.asarray(band) for band in bent.split())
    tinted = [
        np.minimum(np.rint(band * gain), alpha).astype(np.uint8)
        for band, gain in zip((red, green, blue), gains, strict=True)
    ]
    pixels = np.dstack([*tinted, alpha])
    whole = Image.frombytes("RGBa", frame.size, pixels.tobytes())
    return whole.crop(_square_around(alpha >= OPAQUE))


def _square_around(mask: Bool[np.ndarray, "n n"]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the square that holds a mask, and a pixel more."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    ends = (int(columns[0]), int(columns[-1])), (int(rows[0]), int(rows[-1]))
    side = max(high - low for low, high in ends) + 3
    left, top = ((low + high + 1 - side) // 2 for low, high in ends)
    return left, top, left + side, top + side


@functools.lru_cache(maxsize=32_768)
def sprite(style: str, cell: int, side: int, variant: int = 0) -> Sprite:
    """Resize one cell of a sheet to `side` pixels: bilinear, antialiased, integers.

    variant: 0 is as drawn; each other number bends it in its own way.
    """
    original = _original(style, cell, variant)
    pixels = np.asarray(original.resize((side, side), Image.Resampling.BILINEAR))
    mask = pixels[..., 3] >= OPAQUE
    return Sprite(
        colour=pixels[..., :3].astype(np.uint16),
        clear=255 - pixels[..., 3:].astype(np.uint16),
        mask=mask,
        visible=int(mask.sum()),
    )


@functools.cache
def rim(style: str, cell: int) -> tuple[int, int, int]:
    """Mean colour of an emoji along its outline: what a background must differ from."""
    pixels = cells(style)[cell].astype(np.int64)
    inside = pixels[..., 3] >= OPAQUE
    padded = np.pad(inside, 1)
    core = inside & padded[:-2, 1:-1] & padded[2:, 1:-1]
    core &= padded[1:-1, :-2] & padded[1:-1, 2:]
    edge: Int[np.ndarray, "n 4"] = pixels[inside & ~core]
    red, green, blue = (edge[:, :3].sum(0) // max(1, len(edge))).tolist()
    return red, green, blue
