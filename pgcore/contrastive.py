# Generated from chapters/01_contrastive_loss.ipynb.
# Edit the notebook, then run "make chapters".
"""Contrastive loss: which caption belongs to which picture?

CLIP's loss (Radford et al., 2021, section 2.3 and Figure 3): all
pictures of a batch against all captions, as scaled cosines, and a
cross-entropy over each row and each column. Embeddings are [B, D], one
vector a picture or caption, of any length.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

INITIAL_LOG_SCALE = math.log(1 / 0.07)  # scale 14.3; CLIP, section 2.5
MAX_LOG_SCALE = math.log(100.0)  # the trainer clamps to it after each step


def l2_normalize(
    x: Float[Tensor, "*rows D"], eps: float = 1e-12
) -> Float[Tensor, "*rows D"]:
    """Scale each vector to length 1, so that only its direction is left.

    Shapes: x is [..., D], and so is the result. A vector shorter than
    ``eps`` is divided by ``eps`` instead of its length, so the zero vector
    stays zero. Where the dtype cannot hold ``eps`` (float16), its smallest
    normal number stands in. The length is computed in float32 at least; a
    vector whose length overflows becomes zero. NaN stays NaN.

    Raises ValueError if x is not floating point.
    Source: the l2_normalize of Radford et al. (2021), Figure 3.

    Built in chapter 01, Contrastive loss.
    """
    if not x.is_floating_point():
        raise ValueError(f"x: expected floating point, got {x.dtype}")
    wide = torch.promote_types(x.dtype, torch.float32)
    lengths = x.norm(dim=-1, keepdim=True, dtype=wide)
    shortest = max(eps, torch.finfo(x.dtype).tiny)
    return (x / lengths.clamp_min(shortest)).to(x.dtype)


def contrastive_logits(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "captions D"],
    log_scale: float | Float[Tensor, ""],
) -> Float[Tensor, "B captions"]:
    """Score each picture against each caption: exp(log_scale) * cosine.

    Shapes: one row a picture, one column a caption; the two counts may
    differ. The vectors need not be normalised. Computed in float32 at
    least, also under autocast.

    Raises ValueError for no rows, different widths, integers, two scales.
    Source: Radford et al. (2021), Figure 3.

    Built in chapter 01, Contrastive loss.
    """
    for name, x in (("images", images), ("texts", texts)):
        if x.ndim != 2 or len(x) == 0:
            raise ValueError(
                f"{name}: expected one vector a row and at least one row, "
                f"got shape {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise ValueError(f"{name}: expected floating point, got {x.dtype}")
    if images.shape[1] != texts.shape[1]:
        raise ValueError(
            f"images and texts: expected one width, "
            f"got {images.shape[1]} and {texts.shape[1]}"
        )
    log_scale = torch.as_tensor(log_scale)
    if log_scale.numel() != 1:
        raise ValueError(
            f"log_scale: expected one number, got shape {tuple(log_scale.shape)}"
        )
    dtype = torch.promote_types(images.dtype, texts.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    x, y = l2_normalize(images.to(dtype)), l2_normalize(texts.to(dtype))
    # Near 100, bfloat16 numbers are half a unit apart.
    with _outside_autocast(images.device):
        return log_scale.to(dtype).exp() * (x @ y.T)  # B captions


def _outside_autocast(device: torch.device) -> AbstractContextManager:
    """Where autocast exists, switch it off: it would narrow products."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def clip_loss(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    log_scale: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """CLIP's loss: caption i belongs to picture i, and to no other.

    Shapes: images and texts are [B, D], row i of one with row i of the
    other; the vectors need not be normalised. log_scale is the learned
    logarithm of the scale. The loss is the mean over 2 B questions, in
    nats: log B where all scores are equal, never negative beyond
    rounding, exactly 0 for a batch of one. A NaN anywhere makes it NaN.

    Raises ValueError for an empty batch, for different counts or widths
    and for integers.
    Source: Radford et al. (2021), Figure 3.

    Built in chapter 01, Contrastive loss.
    """
    if len(images) != len(texts):
        raise ValueError(
            f"images and texts: expected pairs, got {len(images)} and {len(texts)}"
        )
    logits = contrastive_logits(images, texts, log_scale)
    pairs = torch.arange(len(logits), device=logits.device)
    by_row = F.cross_entropy(logits, pairs)  # which caption is mine?
    by_column = F.cross_entropy(logits.T, pairs)  # which picture is mine?
    return (by_row + by_column) / 2


def zero_shot_classify(
    images: Float[Tensor, "B D"],
    class_texts: Float[Tensor, "classes D"],
    log_scale: float | Float[Tensor, ""],
) -> Float[Tensor, "B classes"]:
    """The probability of each class, named by a caption, for each picture.

    Shapes: class_texts holds one embedding a class. Each row of the result
    adds up to 1; its argmax is the answer, whatever log_scale is.

    Raises ValueError as ``contrastive_logits`` does.
    Source: Radford et al. (2021), section 3.1.

    Built in chapter 01, Contrastive loss.
    """
    logits = contrastive_logits(images, class_texts, log_scale)
    return logits.softmax(dim=-1)


__all__ = [
    "INITIAL_LOG_SCALE",
    "MAX_LOG_SCALE",
    "clip_loss",
    "contrastive_logits",
    "l2_normalize",
    "zero_shot_classify",
]
