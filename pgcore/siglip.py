# Generated from chapters/07_contrastive_pretraining.ipynb.
# Edit the notebook, then run "make chapters".
"""SigLIP: a tower for pictures, a tower for words, one score a pair.

The model of Zhai et al. (2023): the vision tower of chapter 06 with its
pooling head, a text tower of the same blocks, and the two scalars of
the sigmoid loss. PaliGemma keeps ``SigLIP.vision`` and nothing else.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pgcore.contrastive import contrastive_logits
from pgcore.normalization import LayerNorm
from pgcore.sigmoid import INITIAL_BIAS, INITIAL_LOG_SCALE
from pgcore.vision import (
    EncoderBlock,
    MAPHead,
    VisionConfig,
    VisionTower,
    initialize,
)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The sizes of a text tower.

    Attributes:
        vocab_size: V, how many ids there are; padding is one of them.
        max_length: the number of positions, T at most.
        width: D, the features of a token inside the tower.
        depth: L, how many encoder blocks stand on each other.
        mlp_dim: F, the hidden features of each block's MLP.
        num_heads: N, the attention heads of each block.
        head_dim: H, the features of a head; N * H is the width.
        projection_dim: features that come out: the pictures' width.

    Raises ValueError for a size below 1 and for heads that do not fill
    the width.

    Built in chapter 07, Contrastive pretraining.
    """

    vocab_size: int
    max_length: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    head_dim: int
    projection_dim: int

    def __post_init__(self):
        for name, size in vars(self).items():
            if type(size) is not int or size < 1:
                raise ValueError(f"{name}: expected an int, at least 1, got {size!r}")
        if self.num_heads * self.head_dim != self.width:
            raise ValueError(
                f"num_heads * head_dim: expected the width {self.width}, "
                f"got {self.num_heads} * {self.head_dim} = "
                f"{self.num_heads * self.head_dim}"
            )


class TextTower(nn.Module):
    """Ids to one vector a text: every token reads every other.

    There is no mask. Padding is read like any word, so pad a text as in
    training, to the same length. The last token's vector is the text's.

    Raises ValueError unless ids are int32 or int64, of shape B T with T
    from 1 to max_length. Ids must lie below vocab_size. An empty batch
    gives an empty batch.
    Source: Zhai et al. (2023); big_vision, ``text_transformer.py``.

    Built in chapter 07, Contrastive pretraining.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Parameter(torch.empty(config.max_length, width))
        self.layers = nn.ModuleList(
            EncoderBlock(
                width,
                config.mlp_dim,
                num_heads=config.num_heads,
                head_dim=config.head_dim,
            )
            for _ in range(config.depth)
        )
        self.final_layer_norm = LayerNorm(width)
        self.head = nn.Linear(width, config.projection_dim)
        initialize(self)
        for table in (self.token_embedding.weight, self.positions):
            nn.init.normal_(table, std=width**-0.5)

    def encode_tokens(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """One vector a token, after the final LayerNorm."""
        _require_ids(ids, self.config.max_length)
        x = self.token_embedding(ids) + self.positions[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.final_layer_norm(x)

    def forward(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B D"]:
        """One vector a text, not normalised, of projection_dim features."""
        return self.head(self.encode_tokens(ids)[:, -1])


def _require_ids(ids: Tensor, max_length: int) -> None:
    shape = tuple(ids.shape)
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids: expected int32 or int64, got {ids.dtype}")
    if len(shape) != 2 or not 1 <= shape[1] <= max_length:
        raise ValueError(
            f"ids: expected shape (B, T) with T from 1 to {max_length}, got {shape}"
        )


class SigLIP(nn.Module):
    """Two towers and two learned numbers: does this text fit this picture?

    Raises ValueError unless the text tower's projection_dim is the
    vision tower's width: pictures have no projection of their own.
    Source: Zhai et al. (2023), section 3.2; big_vision,
    ``two_towers.py``.

    Built in chapter 07, Contrastive pretraining.
    """

    def __init__(self, vision: VisionConfig, text: TextConfig):
        super().__init__()
        if text.projection_dim != vision.width:
            raise ValueError(
                f"projection_dim: expected the vision width "
                f"{vision.width}, got {text.projection_dim}"
            )
        self.vision = VisionTower(vision)
        self.pool = MAPHead(vision)
        self.text = TextTower(text)
        self.log_scale = nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))
        self.bias = nn.Parameter(torch.tensor(INITIAL_BIAS))

    def encode_images(self, images: Float[Tensor, "B C R R"]) -> Float[Tensor, "B D"]:
        """One vector a picture, from RGB in [-1, 1], not normalised."""
        return self.pool(self.vision(images))

    def encode_texts(self, ids: Int[Tensor, "texts T"]) -> Float[Tensor, "texts D"]:
        """One vector a text, not normalised."""
        return self.text(ids)

    def forward(
        self, images: Float[Tensor, "B C R R"], ids: Int[Tensor, "texts T"]
    ) -> Float[Tensor, "B texts"]:
        """The logit of "yes" for each picture (row) and text (column)."""
        pictures, texts = self.encode_images(images), self.encode_texts(ids)
        logits = contrastive_logits(pictures, texts, self.log_scale)
        return logits + self.bias


# The text tower beside SO400M_14_224. (The 384-pixel model's reads 64.)
SO400M_TEXT = TextConfig(
    vocab_size=32_000,
    max_length=16,
    width=1152,
    depth=27,
    mlp_dim=4304,
    num_heads=16,
    head_dim=72,
    projection_dim=1152,
)

# The text tower beside TINY; a recipe puts in its own vocab_size.
TINY_TEXT = TextConfig(
    vocab_size=1400,
    max_length=16,
    width=192,
    depth=2,
    mlp_dim=768,
    num_heads=4,
    head_dim=48,
    projection_dim=192,
)


def rank_of_match(
    logits: Float[Tensor, "B candidates"],
) -> Int[Tensor, " B"]:
    """The place of each row's match, column i for row i; 1 is the best.

    Counts the candidates that are not beaten by the match, the match
    included: a tie counts against it, and so does NaN.

    Raises ValueError unless there is at least one row, and a candidate
    for each.

    Built in chapter 07, Contrastive pretraining.
    """
    if logits.ndim != 2 or not 1 <= logits.shape[0] <= logits.shape[1]:
        raise ValueError(
            "logits: expected a row for each query, at least one, and no "
            f"fewer candidates, got {tuple(logits.shape)}"
        )
    match = logits.diagonal()[:, None]
    return (~(logits < match)).sum(dim=1)


def retrieval_recall(
    logits: Float[Tensor, "B candidates"], k: int
) -> Float[Tensor, ""]:
    """recall@k: how often the match is among the k best of its row.

    With pictures in rows this is image to text; the transpose is text
    to image. One match a row, column i for row i; ties count against.

    Raises ValueError as ``rank_of_match``, and for k below 1.

    Built in chapter 07, Contrastive pretraining.
    """
    if type(k) is not int or k < 1:
        raise ValueError(f"k: expected an int, at least 1, got {k!r}")
    return (rank_of_match(logits) <= k).float().mean()


__all__ = [
    "SO400M_TEXT",
    "SigLIP",
    "TINY_TEXT",
    "TextConfig",
    "TextTower",
    "rank_of_match",
    "retrieval_recall",
]
