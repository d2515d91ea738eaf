"""Drawing on pictures, with Pillow alone: boxes, masks and names.

Written by hand: plumbing for chapter 15, which says what to draw.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw, ImageFont

from pgcore.files import one_line

ASSETS = Path(__file__).parent / "assets"
SMALLEST = 384  # pixels: from here on names can be read
# Okabe and Ito's, which colour-blind readers tell apart.
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")


# Its name, its box in shares of the picture, and its mask, as large as the picture.
Thing = tuple[str, Sequence[float], Bool[np.ndarray, "height width"] | None]


def enlarged(image: Image.Image) -> Image.Image:
    """Copy a picture in RGB, a whole number of times larger if it is small."""
    image = image.convert("RGB")
    times = -(-SMALLEST // max(image.size))
    return image.resize((image.width * times, image.height * times), 0)


def annotate(canvas: Image.Image, things: Sequence[Thing]) -> None:
    """Draw masks, then boxes, then names, in place: no name under a veil."""
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(things))]
    for (_, _, inside), colour in zip(things, colours, strict=True):
        if inside is not None:
            veil = Image.fromarray(inside.astype(np.uint8) * 140)
            canvas.paste(Image.new("RGB", canvas.size, colour), (0, 0), veil)
    pen, line = ImageDraw.Draw(canvas), max(2, max(canvas.size) // 200)
    places = [_pixels(box, canvas, line) for _, box, _ in things]
    for (top, left, bottom, right), colour in zip(places, colours, strict=True):
        pen.rectangle((left, top, right, bottom), outline="black", width=2 * line)
        half = line // 2
        inner = left + half, top + half, right - half, bottom - half
        pen.rectangle(inner, outline=colour, width=line)
    for (name, _, _), (top, left, _, _), colour in zip(
        things, places, colours, strict=True
    ):
        _write(pen, canvas, one_line(name, 40), (left, top), colour)


def _pixels(box: Sequence[float], canvas: Image.Image, line: int) -> list[int]:
    """Edges in pixels, so far apart that the lines of a thin box have room."""
    sides = canvas.height, canvas.width
    low = [
        min(round(share * side), side - 4 * line)
        for share, side in zip(box[:2], sides, strict=True)
    ]
    low = [max(0, edge) for edge in low]
    high = [
        max(round(share * side) - 1, edge + 4 * line - 1)
        for share, side, edge in zip(box[2:], sides, low, strict=True)
    ]
    return [*low, *high]


def _write(
    pen: ImageDraw.ImageDraw,
    canvas: Image.Image,
    name: str,
    place: tuple[int, int],
    colour: str,
) -> None:
    """Write a name above the box, or in it where there is no room."""
    if not name:
        return
    left, top = place
    size = max(12, max(canvas.size) // 28)
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):  # Pillow built without FreeType
        name = name.encode("latin-1", "replace").decode("latin-1")
    x0, y0, x1, y1 = pen.textbbox((0, 0), name, font=font)
    pad = size // 4
    wide, high = x1 - x0 + 2 * pad, y1 - y0 + 2 * pad
    left = max(0, min(left, canvas.width - wide - 1))
    top = top - high if top >= high else max(0, min(top, canvas.height - high - 1))
    pen.rectangle((left, top, left + wide, top + high), fill=colour, outline="black")
    pen.text((left + pad - x0, top + pad - y0), name, fill="black", font=font)
