"""Weights that a run begins with, where torch's own would be learned late."""

import torch
from torch import Tensor

from pgcore.recipes.emoji_siglip import sincos_positions
from pgcore.vision import TINY, VisionTower


def unseeing_tower(seed: int) -> VisionTower:
    """A tower of random numbers, with positions as stage 0 started from."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed + 1)  # the decoder has the seed itself
        tower = VisionTower(TINY)
        tower.positions.copy_(sincos_positions(TINY.grid, TINY.width))
    return tower


def neighbours(rows: Tensor) -> None:
    """Make the vectors of places that lie side by side alike, in place.

    Waves of many lengths, turned at random, as large as the rows were: what is
    learned about one place then holds near it, too.
    """
    count, width = rows.shape
    place = torch.linspace(0, 1, count)[:, None]
    angles = torch.pi * place * 2 ** torch.linspace(-1, 6.5, width // 2)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    turn, _ = torch.linalg.qr(torch.randn(width, width))
    size = rows.std() / waves.std()
    rows.mul_(0.2).add_(waves @ turn, alpha=0.8 * size.item())
