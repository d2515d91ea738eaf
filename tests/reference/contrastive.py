# Generated from chapters/01_contrastive_loss.ipynb.
# Edit the notebook, then run "make chapters".
"""Slow, obvious versions from chapter 01, Contrastive loss."""

import torch
from jaxtyping import Float
from torch import Tensor

from pgcore.contrastive import contrastive_logits


def clip_loss_by_hand(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    log_scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """CLIP's loss, one question at a time."""
    score = contrastive_logits(images, texts, log_scale)
    total = torch.zeros((), dtype=score.dtype)
    for i in range(len(score)):
        row = score[i, i] - torch.logsumexp(score[i, :], dim=0)
        column = score[i, i] - torch.logsumexp(score[:, i], dim=0)
        total = total - row - column
    return total / (2 * len(score))
