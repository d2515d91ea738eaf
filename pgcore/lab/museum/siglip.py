# Generated from chapters/07_contrastive_pretraining.ipynb.
# Edit the notebook, then run "make chapters".
"""Wrong twins from chapter 07, Contrastive pretraining."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pgcore.attention import attention_mask
from pgcore.contrastive import contrastive_logits
from pgcore.siglip import (
    SigLIP,
    TextTower,
    rank_of_match,
)


def ties_in_favour(
    logits: Float[Tensor, "B candidates"],
) -> Int[Tensor, " B"]:
    """Counts only what is strictly better: a constant model is perfect.

    What ties do to retrieval metrics: ArrowLuo/CLIP4Clip, issue 80.
    """
    match = logits.diagonal()[:, None]
    return 1 + (logits > match).sum(dim=1)


class FirstTokenPooled(TextTower):
    """Takes the first token, as one takes a class token."""

    def forward(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B D"]:
        return self.head(self.encode_tokens(ids)[:, 0])


class MeanPooled(TextTower):
    """Takes the mean of all tokens (embeddings-benchmark/mteb, 4205)."""

    def forward(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B D"]:
        return self.head(self.encode_tokens(ids).mean(dim=1))


class CausalText(TextTower):
    """A causal mask, as in CLIP's text tower; SigLIP's has none."""

    def encode_tokens(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        mask = attention_mask(torch.ones_like(ids, dtype=torch.bool))
        x = self.token_embedding(ids) + self.positions[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, mask)
        return self.final_layer_norm(x)


class PaddingHidden(TextTower):
    """Hides the padding, as BERT and many others do.

    Asked and answered in mlfoundations/open_clip, issue 984: SigLIP
    attends to it.
    """

    def encode_tokens(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        mask = attention_mask(torch.zeros_like(ids).bool(), ids != 0)
        x = self.token_embedding(ids) + self.positions[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, mask)
        return self.final_layer_norm(x)


class ScaleWithoutExp(SigLIP):
    """The logarithm used as the scale (BAAI-DCAI/M3D, issue 52)."""

    def forward(
        self, images: Float[Tensor, "B C R R"], ids: Int[Tensor, "texts T"]
    ) -> Float[Tensor, "B texts"]:
        pictures, texts = self.encode_images(images), self.encode_texts(ids)
        return self.log_scale * contrastive_logits(pictures, texts, 0.0) + (self.bias)


class BiasLeftOut(SigLIP):
    """CLIP's logits: no bias (the notes name none, C36)."""

    def forward(
        self, images: Float[Tensor, "B C R R"], ids: Int[Tensor, "texts T"]
    ) -> Float[Tensor, "B texts"]:
        pictures, texts = self.encode_images(images), self.encode_texts(ids)
        return contrastive_logits(pictures, texts, self.log_scale)


class PooledBeforeNorm(SigLIP):
    """Pools the patches as the last block leaves them: no final norm."""

    def encode_images(self, images: Float[Tensor, "B C R R"]) -> Float[Tensor, "B D"]:
        x = self.vision.patch_embedding(images) + self.vision.positions
        for layer in self.vision.layers:
            x = layer(x)
        return self.pool(x)


class PicturesFromZero(SigLIP):
    """Pictures in [0, 1] where the tower expects [-1, 1].

    Wrong means and deviations: mlfoundations/open_clip, issue 204.
    """

    def encode_images(self, images: Float[Tensor, "B C R R"]) -> Float[Tensor, "B D"]:
        return super().encode_images((images + 1) / 2)


def ranks_in_columns(
    logits: Float[Tensor, "B candidates"],
) -> Int[Tensor, " B"]:
    """Text to image where image to text is meant.

    Directions that seem swapped: technicolor-research/dsve-loc, issue 17.
    """
    return rank_of_match(logits.T)
