# Generated from chapters/12_paligemma.ipynb.
# Edit the notebook, then run "make chapters".
"""PaliGemma: a vision tower, one linear map, and Gemma, read as one model.

Image tokens take the first places of the sequence. They and the prompt
read each other freely; the answer is read from left to right (Beyer et
al., 2024). PaliGemma 2 differs by its configuration (Steiner et al.,
2024).
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pgcore.attention import attention_mask as block_mask
from pgcore.gemma import (
    GEMMA2_2B,
    GEMMA2_9B,
    GEMMA2_27B,
    GEMMA_2B,
    Gemma,
    GemmaConfig,
)
from pgcore.processing import IGNORE
from pgcore.rope import token_positions
from pgcore.vision import (
    SO400M_14_224,
    SO400M_14_448,
    SO400M_14_896,
    VisionConfig,
    VisionTower,
)
from pgcore.vision import TINY as TINY_VISION


@dataclass(frozen=True, kw_only=True)
class PaliGemmaConfig:
    """The sizes of a PaliGemma.

    Raises ValueError for an image token below 0.
    Source: Beyer et al. (2024), section 3.1.

    Built in chapter 12, PaliGemma.
    """

    vision: VisionConfig  # of the tower that looks at the picture
    text: GemmaConfig  # of the decoder that reads and writes
    image_token: int  # the id that holds the place of an image token

    def __post_init__(self):
        if self.image_token < 0:
            raise ValueError(
                f"image_token: expected 0 or more, found {self.image_token}"
            )


def _published(vision: VisionConfig, text: GemmaConfig) -> PaliGemmaConfig:
    """With 1024 places and 128 shapes after Gemma's words, then <image>.

    The table has 257,216 rows, a multiple of 64, as in the files.
    """
    text = replace(text, vocab_size=257_216)
    return PaliGemmaConfig(vision=vision, text=text, image_token=257_152)


PALIGEMMA_3B_224 = _published(SO400M_14_224, GEMMA_2B)
PALIGEMMA_3B_448 = _published(SO400M_14_448, GEMMA_2B)
PALIGEMMA_3B_896 = _published(SO400M_14_896, GEMMA_2B)
PALIGEMMA2_3B_224 = _published(SO400M_14_224, GEMMA2_2B)
PALIGEMMA2_3B_448 = _published(SO400M_14_448, GEMMA2_2B)
PALIGEMMA2_3B_896 = _published(SO400M_14_896, GEMMA2_2B)
PALIGEMMA2_10B_224 = _published(SO400M_14_224, GEMMA2_9B)
PALIGEMMA2_10B_448 = _published(SO400M_14_448, GEMMA2_9B)
PALIGEMMA2_10B_896 = _published(SO400M_14_896, GEMMA2_9B)
PALIGEMMA2_28B_224 = _published(SO400M_14_224, GEMMA2_27B)
PALIGEMMA2_28B_448 = _published(SO400M_14_448, GEMMA2_27B)
PALIGEMMA2_28B_896 = _published(SO400M_14_896, GEMMA2_27B)

# The book's own: `make tiny` trains it on a laptop, chapter 16 says how.
_TINY_TEXT = GemmaConfig(
    width=192,
    depth=4,
    mlp_dim=768,
    num_heads=4,
    num_kv_heads=1,
    head_dim=64,
    vocab_size=3072,
)
TINY = PaliGemmaConfig(vision=TINY_VISION, text=_TINY_TEXT, image_token=3071)


class Projector(nn.Module):
    """One linear map from the tower's width to the decoder's.

    Zeros at first, so that no noise enters a trained decoder.
    Source: Beyer et al. (2024), section 3.1; big_vision, head_zeroinit.

    Built in chapter 12, PaliGemma.
    """

    def __init__(self, vision_width: int, width: int):
        super().__init__()
        self.linear = nn.Linear(vision_width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(
        self, patches: Float[Tensor, "images P features"]
    ) -> Float[Tensor, "images P D"]:
        return self.linear(patches)


def prefix_lm_mask(
    is_token: Bool[Tensor, "B S"], is_suffix: Bool[Tensor, "B S"]
) -> Bool[Tensor, "B 1 S S"]:
    """Image and prompt are one block; each token of the suffix its own.

    True where query i may read key j. Padding is read by nobody. The
    suffix comes last, apart from padding.
    Raises ValueError unless both are boolean, of one shape B S.
    Source: Beyer et al. (2024), figure 2.

    Built in chapter 12, PaliGemma.
    """
    return block_mask(is_suffix, is_token)


class PrefixGemma(Gemma):
    """A Gemma whose windows do not cut through the prefix.

    In a local layer what is ``window`` or more slots behind is hidden,
    but not from tokens that it reads, too: a prefix stays whole at any
    length. Without a window, or without a prefix, it is ``Gemma``.
    Source: PaliGemma 2 in transformers 5.23; big_vision has no windows.

    Built in chapter 12, PaliGemma.
    """

    def _masks(self, mask: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        local, full = super()._masks(mask, slots)
        if self.config.window is None or len(slots) == 1:
            return local, full
        new = full[..., slots]  # B 1 T T
        both_ways = new & new.transpose(-2, -1)
        whole = local[..., slots] | both_ways
        return local.index_copy(-1, slots, whole), full


def suffix_loss(
    logits: Float[Tensor, "targets V"],
    labels: Int[Tensor, "B T"],
    average: str = "examples",
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Cross-entropy of the labelled tokens, from one row of logits each.

    logits: row by row, in the order of the labels that count; a label is
    predicted at the place before its own. average: "examples" weighs
    every example alike, "tokens" every token, as Hugging Face does. In
    float32 at least; examples without labels do not count (big_vision
    counts them as 0), and it is 0 without any. label_smoothing: the
    share of each target that is spread over all V (chapter 16).
    Raises ValueError for another average, or another number of rows.
    Source: Beyer et al. (2024), section 5.2; big_vision, train.py.

    Built in chapter 12, PaliGemma.
    """
    counts = labels[:, 1:] != IGNORE  # B T-1
    if average not in ("examples", "tokens"):
        raise ValueError(f"average: expected examples or tokens, found {average!r}")
    if logits.ndim != 2 or len(logits) != counts.sum():
        raise ValueError(
            f"logits: expected [{counts.sum()}, V], a row for each label, "
            f"found {tuple(logits.shape)}"
        )
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = F.cross_entropy(
        logits.to(wide),
        labels[:, 1:][counts],
        reduction="none",
        label_smoothing=label_smoothing,
    )
    number = counts.sum(dim=1, keepdim=True)  # B 1
    if average == "tokens":
        return losses.sum() / number.sum().clamp(min=1)
    shares = (1 / number.clamp(min=1)).expand_as(counts)[counts]
    return (losses * shares).sum() / (number > 0).sum().clamp(min=1)


class Output(NamedTuple):
    """What a forward gives.

    logits: of every place, B T V; with labels only of the places that
    predict one, targets V. loss: their mean, None without labels.

    Built in chapter 12, PaliGemma.
    """

    logits: Float[Tensor, "..."]
    loss: Float[Tensor, ""] | None = None


class PaliGemma(nn.Module):
    """Pictures and ids in, logits out; the batch of ``Processor`` fits.

    Fresh weights: those of the three parts.
    Source: Beyer et al. (2024), section 3; Steiner et al. (2024).

    Built in chapter 12, PaliGemma.
    """

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.projector = Projector(config.vision.width, config.text.width)
        self.language = PrefixGemma(config.text)

    def encode_images(
        self, pixel_values: Float[Tensor, "images C R R"]
    ) -> Float[Tensor, "images P D"]:
        """P image tokens a picture, as the decoder reads them.

        They are not scaled by sqrt(D), as words are. Pixels are taken to
        the dtype of the tower.
        """
        pixels = pixel_values.to(self.vision.positions.dtype)
        features = self.vision(pixels)
        dtype = self.projector.linear.weight.dtype
        return self.projector(features.to(dtype))

    def embed(
        self,
        input_ids: Int[Tensor, "B T"],
        image_tokens: Float[Tensor, "images P D"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Vectors of words, and image tokens where ids hold their places.

        They go in row by row, in order. Raises ValueError, on a CPU, if
        their number is not that of the places.
        """
        is_image = input_ids == self.config.image_token
        x = self.language.embed(input_ids.masked_fill(is_image, 0))
        if image_tokens is None:
            image_tokens = x.new_empty(0, 1, x.shape[-1])
        tokens = image_tokens.flatten(0, 1).to(x.dtype)
        can_look = x.device.type == "cpu"
        if torch.compiler.is_compiling():
            can_look = False  # a number that the graph must not wait for
        if can_look and is_image.sum() != len(tokens):
            raise ValueError(
                f"input_ids: expected {len(tokens)} places for image "
                f"tokens ({image_tokens.shape[0]} pictures), "
                f"found {is_image.sum()}"
            )
        return x.masked_scatter(is_image[..., None], tokens)

    def forward(
        self,
        pixel_values: Float[Tensor, "images C R R"],
        input_ids: Int[Tensor, "B T"],
        attention_mask: Bool[Tensor, "B T"] | None = None,
        suffix_mask: Bool[Tensor, "B T"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
    ) -> Output:
        """Read a batch at once, as in training.

        attention_mask: False is padding; None: there is none.
        suffix_mask: True is read from left to right; None: all is prefix.
        labels: IGNORE, or the id at this place, predicted one before it.
        Raises ValueError for shapes that do not fit.
        """
        if labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"labels: expected {tuple(input_ids.shape)}, as input_ids, "
                f"found {tuple(labels.shape)}"
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
        if suffix_mask is None:
            suffix_mask = torch.zeros_like(attention_mask)
        image_tokens = self.encode_images(pixel_values)
        hidden = self.language(
            self.embed(input_ids, image_tokens),
            positions=token_positions(attention_mask),
            mask=prefix_lm_mask(attention_mask, suffix_mask),
        )
        if labels is None:
            return Output(self.language.logits(hidden))
        # A row of logits is V numbers: make those that predict something.
        predicts = labels[:, 1:] != IGNORE
        logits = self.language.logits(hidden[:, :-1][predicts])
        return Output(logits, suffix_loss(logits, labels))


__all__ = [
    "Output",
    "PALIGEMMA2_10B_224",
    "PALIGEMMA2_10B_448",
    "PALIGEMMA2_10B_896",
    "PALIGEMMA2_28B_224",
    "PALIGEMMA2_28B_448",
    "PALIGEMMA2_28B_896",
    "PALIGEMMA2_3B_224",
    "PALIGEMMA2_3B_448",
    "PALIGEMMA2_3B_896",
    "PALIGEMMA_3B_224",
    "PALIGEMMA_3B_448",
    "PALIGEMMA_3B_896",
    "PaliGemma",
    "PaliGemmaConfig",
    "PrefixGemma",
    "Projector",
    "TINY",
    "prefix_lm_mask",
    "suffix_loss",
]
