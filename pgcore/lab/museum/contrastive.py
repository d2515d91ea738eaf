# Generated from chapters/01_contrastive_loss.ipynb.
# Edit the notebook, then run "make chapters".
"""Wrong twins from chapter 01, Contrastive loss."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pgcore.contrastive import MAX_LOG_SCALE, clip_loss, contrastive_logits


def clamp_inside_the_loss(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    log_scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """The ceiling of 100 as a clamp in the loss: beyond it, no gradient.

    Proposed for CLIP's model file: openai/CLIP, issue 46.
    """
    clamped = torch.as_tensor(log_scale).clamp(max=MAX_LOG_SCALE)
    return clip_loss(images, texts, clamped)


def loss_without_normalization(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    log_scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Raw dot products: a long vector looks like a good one.

    The notes ask for a high dot product (C12); found in public code in
    moein-shariatnia/OpenAI-CLIP, issue 16.
    """
    logits = torch.as_tensor(log_scale).exp() * images @ texts.T
    pairs = torch.arange(len(logits), device=logits.device)
    by_row = F.cross_entropy(logits, pairs)
    return (by_row + F.cross_entropy(logits.T, pairs)) / 2


def loss_over_one_axis(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    log_scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Rows only: no caption is ever asked which picture is its own.

    lucidrains/DALLE-pytorch, issue 32. The same number comes out if both
    halves use one axis by mistake (C19).
    """
    logits = contrastive_logits(images, texts, log_scale)
    pairs = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, pairs)


def loss_without_exp(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    log_scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """The logarithm used as the scale: 2.66 where 14.3 was meant.

    BAAI-DCAI/M3D, issue 52. Below zero it would push true pairs apart.
    """
    cosines = contrastive_logits(images, texts, 0.0)
    logits = log_scale * cosines
    pairs = torch.arange(len(logits), device=logits.device)
    by_row = F.cross_entropy(logits, pairs)
    return (by_row + F.cross_entropy(logits.T, pairs)) / 2


def loss_times_temperature(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    log_scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Multiplies by the temperature where one has to divide by it.

    What exp(t) stands for confused a reader: LAION-AI/CLAP, issue 57.
    """
    return clip_loss(images, texts, -torch.as_tensor(log_scale))


def softmax_over_the_matrix(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    log_scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """One softmax over all B x B pairs, as if only one could be true.

    "We use cross entropy loss" on the whole matrix, with no axis (C15).
    """
    logits = contrastive_logits(images, texts, log_scale)
    log_shares = logits.flatten().log_softmax(dim=0)
    return -log_shares.reshape(logits.shape).diagonal().mean()
