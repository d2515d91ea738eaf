# Generated from chapters/03_sigmoid_loss.ipynb.
# Edit the notebook, then run "make chapters".
"""Wrong twins from chapter 03, Sigmoid loss."""

from itertools import product

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pgcore.contrastive import contrastive_logits
from pgcore.sigmoid import _cost_of_block, siglip_loss


def chunks_all_kept(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    log_scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    *,
    chunk_size: int,
) -> Float[Tensor, ""]:
    """Sums block by block, but autograd keeps every block.

    The value is right, the memory is that of the whole matrix. Seen in
    open_clip's ``chunk_size``; its pull request 1214 recomputes.
    """
    ids = torch.arange(len(images), device=images.device)
    ids = ids.split(chunk_size)
    rows = zip(images.split(chunk_size), ids, strict=True)
    columns = zip(texts.split(chunk_size), ids, strict=True)
    total = images.new_zeros(())
    for (pictures, row), (captions, column) in product(rows, columns):
        block = pictures, captions, log_scale, bias
        total = total + _cost_of_block(*block, row, column)
    return total / len(images)


def mean_over_all_pairs(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    log_scale: float | Float[Tensor, ""],
    bias: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Divides by B squared: a match weighs less in a larger batch.

    big_vision issue 115, a loss of 0.003: the mean, divided by B again.
    """
    return siglip_loss(images, texts, log_scale, bias) / len(images)


def zero_one_as_signs(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    log_scale: float | Float[Tensor, ""],
    bias: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """The labels 0 and 1 (C34) put where -1 and +1 belong.

    A mismatch costs -log sigmoid(0), a constant: nothing pushes apart.
    """
    logits = contrastive_logits(images, texts, log_scale) + bias
    labels = torch.eye(len(logits), device=logits.device)
    return -F.logsigmoid(labels * logits).sum() / len(logits)


def bias_left_out(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    log_scale: float | Float[Tensor, ""],
    bias: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """No bias: the notes name neither bias nor scale here (C36)."""
    return siglip_loss(images, texts, log_scale, 0.0 * bias)


def softmax_with_a_bias(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    log_scale: float | Float[Tensor, ""],
    bias: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Still a softmax over each row (C32): it cannot see the bias."""
    logits = contrastive_logits(images, texts, log_scale) + bias
    return F.cross_entropy(logits, torch.arange(len(logits)))


def log_of_sigmoid(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    log_scale: float | Float[Tensor, ""],
    bias: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Two steps instead of one (C37): infinite for a sure mistake."""
    logits = contrastive_logits(images, texts, log_scale) + bias
    signs = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -torch.log(torch.sigmoid(signs * logits)).sum() / len(logits)
