# Generated from chapters/04_normalization.ipynb.
# Edit the notebook, then run "make chapters".
"""Normalization: keep the vectors inside a network at one scale.

Batch normalization (Ioffe and Szegedy, 2015) measures each feature over
the batch. Layer normalization (Ba et al., 2016) and RMSNorm (Zhang and
Sennrich, 2019) measure each vector on its own. PaliGemma has LayerNorm
in its vision tower, RMSNorm in Gemma, and BatchNorm1d nowhere.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class _Norm(nn.Module):
    """What the three layers share: a width, an epsilon, their checks."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        if width < 1 or not eps > 0:
            raise ValueError(
                "width and eps: expected at least 1 and more than 0, "
                f"got {width} and {eps}"
            )
        self.width, self.eps = width, eps

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps:g}"

    def _require_vectors(self, x: Tensor) -> None:
        fits = x.shape[-1:] == (self.width,)
        if not fits or not x.is_floating_point():
            raise ValueError(
                "x: expected floating-point vectors of width "
                f"{self.width}, got shape {tuple(x.shape)} of {x.dtype}"
            )


class BatchNorm1d(_Norm):
    """Standardise each feature over the batch; then weight and bias.

    In training, mean and variance are those of the batch, and the
    running estimates move towards them by the share ``momentum``. In
    evaluation the running estimates are used, and no vector sees
    another. Written by hand, with the results of torch.nn.BatchNorm1d.

    Shapes: [..., D] to [..., D]; all leading axes count as batch, so
    that of [B, T, D] B x T vectors are averaged. Computed in float32 at
    least, returned in the dtype of x. The running estimates keep the
    layer's dtype; keep them in float32.

    Raises ValueError for another width, integers, or fewer than two
    vectors in training. A NaN spoils its feature: in the whole batch,
    and in the running estimates for good.
    Source: Ioffe and Szegedy (2015), Algorithms 1 and 2.

    Built in chapter 04, Normalization.
    """

    running_mean: Float[Tensor, " D"]
    running_var: Float[Tensor, " D"]

    def __init__(self, width: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__(width, eps)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: expected 0 to 1, got {momentum}")
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        self._require_vectors(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.training:
            mean, var = self._measure(wide.reshape(-1, self.width))
        else:
            mean, var = self.running_mean, self.running_var
        normal = (wide - mean) * torch.rsqrt(var + self.eps)
        return (normal * self.weight + self.bias).type_as(x)

    def _measure(
        self, rows: Float[Tensor, "rows D"]
    ) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
        """Mean and variance of a batch, which the estimates remember."""
        count = len(rows)
        if count < 2:
            raise ValueError(f"x: expected at least 2 vectors in training, got {count}")
        mean, var = rows.mean(0), rows.var(0, correction=0)
        unbiased = var * (count / (count - 1))
        with torch.no_grad():
            for memory, value in (
                (self.running_mean, mean),
                (self.running_var, unbiased),
            ):
                memory.lerp_(value.type_as(memory), self.momentum)
        return mean, var


class LayerNorm(_Norm):
    """Standardise each vector on its own; then weight and bias.

    Shapes: [..., D] to [..., D]; each vector on its own. x has the dtype
    of the weights; on a CPU it may also be bfloat16 or float16 with
    float32 weights. The default epsilon is SigLIP's 1e-6; that of
    torch.nn.LayerNorm is 1e-5.

    Raises ValueError for another width or integers. A NaN spoils its
    own vector only. A constant vector gives ``bias``.
    Source: Ba et al. (2016); epsilon as in SigLIP.

    Built in chapter 04, Normalization.
    """

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__(width, eps)
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        self._require_vectors(x)
        shape = (self.width,)
        return F.layer_norm(x, shape, self.weight, self.bias, self.eps)


class RMSNorm(_Norm):
    """Divide each vector by its root mean square, multiply by 1 + weight.

    The weight starts at 0. Everything is computed in float32 and rounded
    to the dtype of x once, at the end; ``1 + weight`` too, which bfloat16
    could not hold.

    Shapes: [..., D] to [..., D]; each vector on its own.

    Raises ValueError for another width or integers. A NaN spoils its
    own vector only. Zeros stay zeros.
    Source: Zhang and Sennrich (2019); 1 + weight and the order of
    rounding as in Gemma.

    Built in chapter 04, Normalization.
    """

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__(width, eps)
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        self._require_vectors(x)
        scale = 1 + self.weight.float()
        shape = (self.width,)
        return F.rms_norm(x.float(), shape, scale, self.eps).type_as(x)


__all__ = ["BatchNorm1d", "LayerNorm", "RMSNorm"]
