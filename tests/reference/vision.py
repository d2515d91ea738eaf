# Generated from chapters/06_vision_transformer.ipynb.
# Edit the notebook, then run "make chapters".
"""Slow, obvious versions from chapter 06, Vision transformer."""

import torch
from jaxtyping import Float
from torch import Tensor


def patch_embedding_by_loops(
    images: Float[Tensor, "B C R R"],
    weight: Float[Tensor, "D C side side"],
    bias: Float[Tensor, " D"],
) -> Float[Tensor, "B P D"]:
    """Cut out patch by patch, row by row; multiply each by one matrix."""
    side = weight.shape[-1]
    matrix = weight.flatten(1)  # D, and the pixels of a patch
    tokens = []
    for top in range(0, images.shape[2], side):
        for left in range(0, images.shape[3], side):
            patch = images[:, :, top : top + side, left : left + side]
            tokens.append(patch.flatten(1) @ matrix.T + bias)
    return torch.stack(tokens, dim=1)
