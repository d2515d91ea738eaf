"""One emoji at one size, ready to paste.

Axes: s pixels a side of the sprite, R of the picture.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, Int, UInt8, UInt16
from PIL import Image

from pgcore.lab._sheets import cells

OPAQUE = 128  # alpha from here on counts as visible


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
def _original(style: str, cell: int) -> Image.Image:
    return Image.fromarray(cells(style)[cell]).convert("RGBa")


@functools.lru_cache(maxsize=4096)
def sprite(style: str, cell: int, side: int) -> Sprite:
    """Resize one cell of a sheet to `side` pixels: bilinear, antialiased, integers."""
    original = _original(style, cell)
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
