"""The look of every figure in the book, and the few plots that many chapters share.

Colours carry meaning, the same in every chapter: pictures are blue, words are orange,
what is right is green, what is wrong is dark purple, the rest is grey, and yellow
points at something. Readers who see no red or no green can tell them apart: a test
measures it.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from torch import Tensor

IMAGE = "#0072B2"
TEXT = "#D55E00"
RIGHT = "#009E73"
WRONG = "#882255"
NEUTRAL = "#6B7280"
HIGHLIGHT = "#E69F00"

WIDTH = 6.4  # inches: with 12 pt type a figure stays legible on a phone

SEQUENTIAL = "cividis"  # from dark blue (low) to yellow (high); colour-blind safe
DIVERGING = "PuOr_r"  # around zero


def use_book_style() -> None:
    """Set matplotlib's defaults to the book's: white face, 12 pt, quiet axes."""
    plt.rcdefaults()
    plt.rcParams.update(
        {
            "figure.figsize": (WIDTH, 3.4),
            "figure.dpi": 144,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "savefig.facecolor": "white",
            "font.size": 12,
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": NEUTRAL,
            "axes.prop_cycle": cycler(color=[IMAGE, TEXT, RIGHT, WRONG, NEUTRAL]),
            "image.cmap": SEQUENTIAL,
            "legend.frameon": False,
            "lines.linewidth": 2.0,
        }
    )


def show_pictures(
    images: Float[Tensor, "B C R R"],
    titles: Sequence[str] = (),
    columns: int | None = None,
    width: float = WIDTH,
) -> Figure:
    """Draw pictures in a grid, in reading order.

    Shapes: C is 3 (RGB) or 4 (RGBA), values in [0, 1].

    Raises:
        ValueError: if there is no picture, or more titles than pictures.
    """
    if len(images) == 0 or len(titles) > len(images):
        raise ValueError(
            f"expected at least one picture and at most one title each, "
            f"got {len(images)} pictures and {len(titles)} titles"
        )
    columns = columns or len(images)
    rows = -(-len(images) // columns)
    cell = width / columns
    height = rows * (cell + (0.35 if titles else 0.05))
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    for index, ax in enumerate(axes.flat):
        ax.axis("off")
        if index < len(images):
            ax.imshow(as_pixels(images[index]), interpolation="nearest")
        if index < len(titles):
            ax.set_title(titles[index], loc="center", fontweight="normal")
    return figure


def heatmap(
    ax: Axes,
    matrix: Float[Tensor, "rows columns"],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    value_format: str | None = "{:.2f}",
    **imshow_options,
) -> None:
    """Draw a matrix with its entries printed (``value_format=None`` prints none)."""
    values = matrix.detach().cpu().numpy()
    image = ax.imshow(values, **imshow_options)
    ax.set_xticks(range(len(column_labels)), column_labels, rotation=35, ha="right")
    ax.set_yticks(range(len(row_labels)), row_labels)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    if value_format is None:
        return
    for row, column in np.ndindex(values.shape):
        red, green, blue, _ = image.cmap(image.norm(values[row, column]))
        is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.55
        ax.text(
            column,
            row,
            value_format.format(values[row, column]),
            ha="center",
            va="center",
            color="black" if is_light else "white",
            fontsize=10,
        )


def put_picture(
    ax: Axes, image: Float[Tensor, "C R R"], x: float, y: float, zoom: float = 0.5
) -> None:
    """Put a small picture at data coordinates (x, y): an emoji as a tick label."""
    thumbnail = OffsetImage(as_pixels(image), zoom=zoom)
    box = AnnotationBbox(thumbnail, (x, y), frameon=False, annotation_clip=False)
    ax.add_artist(box)


def as_pixels(image: Float[Tensor, "C R R"]) -> np.ndarray:
    """One picture as matplotlib wants it: [R, R, C], clipped to [0, 1]."""
    return image.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
