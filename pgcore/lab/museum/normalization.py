# Generated from chapters/04_normalization.ipynb.
# Edit the notebook, then run "make chapters".
"""Wrong twins from chapter 04, Normalization."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pgcore.normalization import BatchNorm1d, LayerNorm, RMSNorm


def skip_from_norm_output(x, norm, sublayer):
    """Saves the norm's output for the skip (C67, C70, C73, C74).

    What is saved must be its input. With this the stream is normalised
    at every step: it is a post-norm network in disguise.
    """
    normal = norm(x)
    return normal + sublayer(normal)


class BatchNormOverEachItem(BatchNorm1d):
    """A statistic "for each dimension of each item" (C54, C57).

    Averages over the features of each item instead of over the batch.
    """

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        normal = (x - mean) * torch.rsqrt(var + self.eps)
        return normal * self.weight + self.bias


class BatchNormWithUnbiasedVariance(BatchNorm1d):
    """Divides by n - 1 for the output, not only for the memory.

    That is the default of ``torch.var`` and ``torch.std``.
    """

    def _measure(
        self, rows: Float[Tensor, "rows D"]
    ) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
        mean, var = super()._measure(rows)
        return mean, var * (len(rows) / (len(rows) - 1))


class BatchNormWithoutMemory(BatchNorm1d):
    """The formula of the notes (C55): no eps, weight, bias or memory."""

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        rows = x.reshape(-1, self.width)
        return (x - rows.mean(0)) / rows.var(0, correction=0).sqrt()


class LayerNormOverSequence(LayerNorm):
    """Takes the whole sequence for one item (C61): tokens leak."""

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        var, mean = torch.var_mean(x, (-2, -1), correction=0, keepdim=True)
        normal = (x - mean) * torch.rsqrt(var + self.eps)
        return normal * self.weight + self.bias


class LayerNormStdPlusEps(LayerNorm):
    """Epsilon outside the root: x / (std + eps).

    From The Annotated Transformer (its issue 122), which also takes the
    unbiased std. BERT-pytorch copied it (codertimo, issue 30).
    """

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        std, mean = torch.std_mean(x, dim=-1, correction=0, keepdim=True)
        return (x - mean) / (std + self.eps) * self.weight + self.bias


class RMSNormWithoutOne(RMSNorm):
    """Multiplies by w as Llama does, not by 1 + w as Gemma.

    Liger-Kernel issue 74. A fresh layer then gives zeros.
    """

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        shape, weight = (self.width,), self.weight.float()
        return F.rms_norm(x.float(), shape, weight, self.eps).type_as(x)


class RMSNormAddedInBfloat16(RMSNorm):
    """Adds the 1 in the weight's own dtype (vLLM pull request 3653)."""

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        shape, scale = (self.width,), (1 + self.weight).float()
        return F.rms_norm(x.float(), shape, scale, self.eps).type_as(x)


class RMSNormRoundedTooEarly(RMSNorm):
    """Rounds before it multiplies by the weight: Llama's order.

    transformers pull request 29402 put it right for Gemma.
    """

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        normal = F.rms_norm(x.float(), (self.width,), eps=self.eps)
        normal = normal.type_as(x).float()
        return (normal * (1 + self.weight.float())).type_as(x)
