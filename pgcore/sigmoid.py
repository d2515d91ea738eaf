# Generated from chapters/03_sigmoid_loss.ipynb.
# Edit the notebook, then run "make chapters".
"""Sigmoid loss: does this caption belong to this picture, yes or no?

SigLIP's loss (Zhai et al., 2023, section 3.2 and Algorithm 1) and its
sum by blocks (section 3.3, here on one device). Embeddings are [B, D],
as in ``pgcore.contrastive``. Scale and bias are learned; start them at
INITIAL_LOG_SCALE and INITIAL_BIAS.
"""

import math
from itertools import product

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pgcore.contrastive import contrastive_logits

INITIAL_LOG_SCALE = math.log(10.0)  # logits start as 10 * cosine
INITIAL_BIAS = -10.0  # the prior of a batch of 22027: -log(22026)


def siglip_loss(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    log_scale: float | Float[Tensor, ""],
    bias: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Ask of all B x B pairs if they match: summed cost, divided by B.

    Shapes: row i of images and row i of texts belong together, no other
    two do; the vectors need not be normalised. The sum is in nats, in
    float32 at least, also under autocast. A batch of one is one match
    and no mismatch.

    Raises ValueError for an empty batch, different counts or widths,
    integers, or more than one scale or bias. A NaN anywhere makes the
    loss NaN.
    Source: Zhai et al. (2023), section 3.2 and Algorithm 1.

    Built in chapter 03, Sigmoid loss.
    """
    _require_pairs(images, texts, bias)
    ids = torch.arange(len(images), device=images.device)
    cost = _cost_of_block(images, texts, log_scale, bias, ids, ids)
    return cost / len(images)


def _cost_of_block(
    images: Float[Tensor, "rows D"],
    texts: Float[Tensor, "columns D"],
    log_scale: float | Float[Tensor, ""],
    bias: float | Float[Tensor, ""],
    row_ids: Int[Tensor, " rows"],
    column_ids: Int[Tensor, " columns"],
) -> Float[Tensor, ""]:
    """The summed cost of some pairs; equal ids mark a match."""
    logits = contrastive_logits(images, texts, log_scale) + bias
    is_match = row_ids[:, None] == column_ids
    return -F.logsigmoid(torch.where(is_match, logits, -logits)).sum()


def _require_pairs(images: Tensor, texts: Tensor, bias: float | Tensor) -> None:
    for name, x in (("images", images), ("texts", texts)):
        if x.ndim != 2:
            raise ValueError(
                f"{name}: expected one vector a row, got shape {tuple(x.shape)}"
            )
    if len(images) != len(texts):
        raise ValueError(
            f"images and texts: expected pairs, got {len(images)} and {len(texts)}"
        )
    bias = torch.as_tensor(bias)
    if bias.numel() != 1:
        raise ValueError(f"bias: expected one number, got shape {tuple(bias.shape)}")


def siglip_loss_chunked(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    log_scale: float | Float[Tensor, ""],
    bias: float | Float[Tensor, ""],
    *,
    chunk_size: int,
) -> Float[Tensor, ""]:
    """The loss of ``siglip_loss`` in the memory of one block of pairs.

    Value and gradients are the same up to the order of the sums. No
    block is kept for the backward pass: it is computed again there, so
    there are 4/3 as many matrix products. What is held grows with B,
    not with B x B. Not under torch.func, which cannot recompute.

    Shapes: as ``siglip_loss``. A block has chunk_size pictures and as
    many captions; chunk_size need not divide B, and may exceed it.

    Raises ValueError as ``siglip_loss``, and unless chunk_size is an
    int of at least 1.
    Source: Zhai et al. (2023), section 3.3, on one device.

    Built in chapter 03, Sigmoid loss.
    """
    _require_pairs(images, texts, bias)
    if type(chunk_size) is not int or chunk_size < 1:
        raise ValueError(f"chunk_size: expected an int, at least 1, got {chunk_size!r}")
    ids = torch.arange(len(images), device=images.device)
    ids = ids.split(chunk_size)
    rows = zip(images.split(chunk_size), ids, strict=True)
    columns = zip(texts.split(chunk_size), ids, strict=True)
    costs = [
        checkpoint(
            _cost_of_block,
            *(pictures, captions, log_scale, bias, row_ids, column_ids),
            use_reentrant=False,
            preserve_rng_state=False,  # nothing random to replay
        )
        for (pictures, row_ids), (captions, column_ids) in product(rows, columns)
    ]
    return torch.stack(costs).sum() / len(images)


__all__ = ["INITIAL_BIAS", "INITIAL_LOG_SCALE", "siglip_loss", "siglip_loss_chunked"]
