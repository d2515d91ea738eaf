# Generated from chapters/11_pixels_and_tokens.ipynb.
# Edit the notebook, then run "make chapters".
"""Slow, obvious versions from chapter 11, Pixels and tokens."""

from collections import Counter
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def reference_cubic(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The bicubic kernel at distance x (Keys, 1981, a = -1/2)."""
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


def reference_resize_matrix(
    old: int, new: int, *, antialias: bool = True
) -> Float[Tensor, "new old"]:
    """Row i: how much of each old pixel goes into new pixel i.

    With antialias the kernel is as much wider as the picture gets
    smaller; else it is two old pixels wide on either side.
    """
    scale = old / new
    stretch = max(scale, 1.0) if antialias else 1.0
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    middles = torch.arange(old, dtype=torch.float64) + 0.5
    weights = reference_cubic((middles - centres[:, None]) / stretch)
    return weights / weights.sum(dim=1, keepdim=True)


def reference_resize(image: np.ndarray, size: int) -> np.ndarray:
    """Columns, then rows, and bytes after each, as Pillow does it."""
    x = torch.tensor(image, dtype=torch.float64)  # height width 3
    columns = reference_resize_matrix(image.shape[1], size)
    rows = reference_resize_matrix(image.shape[0], size)
    x = torch.einsum("nw,hwc->hnc", columns, x).round().clamp(0, 255)
    x = torch.einsum("mh,hnc->mnc", rows, x).round().clamp(0, 255)
    return x.to(torch.uint8).numpy()


def reference_pairs(words: Counter, number: int) -> list[tuple[str, str]]:
    """The first pairs that byte-pair encoding merges, by counting.

    words: how often each occurs. Of equally frequent pairs the one whose
    pieces are older comes first.
    """
    cut = {word: tuple(word) for word in words}
    letters = sorted({letter for word in words for letter in word})
    age = {letter: i for i, letter in enumerate(letters)}
    merged = []
    for _ in range(number):
        seen = Counter()
        for word, pieces in cut.items():
            for pair in pairwise(pieces):
                seen[pair] += words[word]
        best = min(seen, key=lambda p: (-seen[p], age[p[0]], age[p[1]]))
        merged.append(best)
        age.setdefault("".join(best), len(age))
        for word, pieces in cut.items():
            cut[word] = reference_merge(pieces, best)
    return merged


def reference_merge(pieces: tuple, pair: tuple) -> tuple:
    """Join this pair wherever it stands, from the left."""
    joined = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return tuple(joined)
