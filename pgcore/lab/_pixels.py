"""Pixels as bytes: resizing, pasting and compositing, the same on every machine.

Axes: B pictures, R pixels a side, C colour channels.
"""

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageColor
from torch import Tensor

from pgcore.lab._near import unknown

Colour = str | tuple[int, int, int]  # a name that PIL knows, or 0..255 each
Pixels = UInt8[np.ndarray, "B R R C"]


def rgb(colour: Colour) -> tuple[int, int, int]:
    """Read a colour: "navy", "#fa0", or three numbers 0..255."""
    if isinstance(colour, str):
        try:
            red, green, blue, *_ = ImageColor.getrgb(colour)
        except ValueError:
            raise unknown("colour", colour, ImageColor.colormap) from None
        return red, green, blue
    if len(colour) != 3 or not all(0 <= part <= 255 for part in colour):
        raise ValueError(f"a colour has three parts, each 0..255, got {colour}")
    red, green, blue = (int(part) for part in colour)
    return red, green, blue


def to_images(pixels: Pixels) -> Float[Tensor, "B C R R"]:
    """Turn bytes 0..255 into numbers in [0, 1], channels first."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255


def to_pixels(images: Float[Tensor, "B C R R"]) -> Pixels:
    """Turn numbers in [0, 1] into bytes 0..255, channels last."""
    return (images * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def arrange(
    pixels: UInt8[np.ndarray, "B R R 4"], size: int, boxes: Int[np.ndarray, "B 3"]
) -> UInt8[np.ndarray, "B {size} {size} 4"]:
    """Resize each RGBA picture and put it into a clear frame of `size` pixels.

    boxes: side, left and top of each picture in its frame, in pixels.

    Bilinear with PIL's antialiasing, on colours times alpha ("RGBa"): what hides
    under zero alpha never shows as a halo. All in integers.
    """
    count, side = pixels.shape[:2]
    if count == 0:
        return np.zeros((0, size, size, 4), np.uint8)
    column = Image.fromarray(pixels.reshape(count * side, side, 4)).convert("RGBa")
    frames = Image.new("RGBa", (size, count * size))
    for row, (new, left, top) in enumerate(boxes.tolist()):
        # Crop first: resize(box=...) would also read the neighbours.
        cell = column.crop((0, row * side, side, (row + 1) * side))
        cell = cell.resize((new, new), Image.Resampling.BILINEAR)
        frames.paste(cell, (left, row * size + top))
    return np.array(frames.convert("RGBA")).reshape(count, size, size, 4)


def over(
    pixels: UInt8[np.ndarray, "B R R 4"], colours: UInt8[np.ndarray, "_ 3"]
) -> UInt8[np.ndarray, "B R R 3"]:
    """Lay RGBA pictures on colours, B of them or one; rounds to the nearest byte."""
    alpha = pixels[..., 3:].astype(np.uint16)
    back = colours.astype(np.uint16)[:, None, None, :]
    mixed = pixels[..., :3] * alpha + back * (255 - alpha)  # at most 255 * 255
    return ((mixed + 127) // 255).astype(np.uint8)
