# Generated from chapters/03_sigmoid_loss.ipynb.
# Edit the notebook, then run "make chapters".
"""Slow, obvious versions from chapter 03, Sigmoid loss."""

import torch
from jaxtyping import Float
from torch import Tensor


def siglip_loss_by_loops(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    log_scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """The formula, one pair at a time, in float64."""
    images, texts = images.double(), texts.double()
    total = torch.zeros((), dtype=torch.float64)
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            cosine = image @ text / (image.norm() * text.norm())
            logit = log_scale.double().exp() * cosine + bias
            sign = 1 if i == j else -1
            p_right = 1 / (1 + torch.exp(-sign * logit))
            total = total - torch.log(p_right)
    return total / len(images)
