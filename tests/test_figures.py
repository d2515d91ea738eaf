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


def test_colours_of_the_book_can_be_told_apart():
    """Also by a reader who sees no red and green: their luminance or hue differ."""
    named = [figures.IMAGE, figures.TEXT, figures.RIGHT, figures.WRONG, figures.NEUTRAL]
    rgb = np.array([matplotlib.colors.to_rgb(colour) for colour in named])
    distance = np.abs(rgb[:, None] - rgb[None]).sum(-1) + np.eye(len(named))
    assert distance.min() > 0.3
