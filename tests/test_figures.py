"""The shared plots draw what they are given."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from pgcore.lab import figures


@pytest.fixture(autouse=True)
def on_paper():
    matplotlib.use("agg")
    figures.use_book_style()
    yield
    plt.close("all")


def test_pictures_stand_in_reading_order_with_their_titles():
    images = torch.rand(5, 3, 8, 8)
    figure = figures.show_pictures(images, titles=list("abcde"), columns=3)
    drawn = [ax for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in drawn] == list("abcde")
    assert len(figure.axes) == 6
    for ax, image in zip(drawn, images, strict=True):
        np.testing.assert_allclose(ax.images[0].get_array(), image.permute(1, 2, 0))


def test_a_heatmap_prints_every_entry_and_stays_legible():
    _, ax = plt.subplots()
    matrix = torch.tensor([[0.0, 1.0, 0.5]])
    figures.heatmap(ax, matrix, ["row"], ["a", "b", "c"])
    assert [text.get_text() for text in ax.texts] == ["0.00", "1.00", "0.50"]
    assert [text.get_color() for text in ax.texts[:2]] == ["white", "black"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "c"]


def test_a_heatmap_without_format_prints_nothing():
    _, ax = plt.subplots()
    figures.heatmap(ax, torch.eye(3), value_format=None)
    assert not ax.texts


def test_pixels_are_clipped_and_channels_last():
    pixels = figures.as_pixels(torch.tensor([-1.0, 0.5, 2.0]).view(3, 1, 1))
    np.testing.assert_array_equal(pixels, [[[0.0, 0.5, 1.0]]])


# How a reader without red (protanopia) or green (deuteranopia) cones sees linear RGB:
# Machado, Oliveira and Fernandes 2009, severity 1.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
}


def lab(colour: str, eyes: np.ndarray) -> np.ndarray:
    """A colour in CIE Lab (D65), as these eyes see it."""
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    white = to_xyz @ np.ones(3)
    ratio = to_xyz @ (eyes @ linear).clip(0, 1) / white
    f = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eyes", BLINDNESS.values(), ids=BLINDNESS)
def test_colours_of_the_book_can_be_told_apart(eyes):
    named = [figures.IMAGE, figures.TEXT, figures.RIGHT, figures.WRONG, figures.NEUTRAL]
    seen = np.array([lab(colour, eyes) for colour in named])
    distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
    assert distance[np.triu_indices(len(named), 1)].min() >= 12
    right_from_wrong = lab(figures.RIGHT, eyes) - lab(figures.WRONG, eyes)
    assert np.linalg.norm(right_from_wrong) >= 20


@pytest.mark.parametrize(("pictures", "titles"), [(0, []), (1, ["a", "b"])])
def test_no_picture_or_too_many_titles_is_an_error(pictures, titles):
    with pytest.raises(ValueError, match=f"got {pictures} pictures and {len(titles)}"):
        figures.show_pictures(torch.rand(pictures, 3, 4, 4), titles)
