# Generated from chapters/12_paligemma.ipynb.
# Edit the notebook, then run "make chapters".
"""Wrong twins from chapter 12, PaliGemma."""

import torch
import torch.nn.functional as F

from pgcore.paligemma import Output, PaliGemma, suffix_loss
from pgcore.processing import IGNORE


class _Twin(PaliGemma):
    """A PaliGemma that changes its batch, or what comes out of it."""

    def before(self, batch):
        return batch

    def after(self, out, batch):
        return out

    def forward(
        self,
        pixel_values,
        input_ids,
        attention_mask=None,
        suffix_mask=None,
        labels=None,
    ):
        batch = {
            "pixel_values": pixel_values,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "suffix_mask": suffix_mask,
            "labels": labels,
        }
        return self.after(super().forward(**self.before(batch)), batch)


class AllOnesMask(_Twin):
    """Everybody reads everybody: the answer is read before it is said.

    Training in transformers until pull request 30967; reported in 30918.
    """

    def before(self, batch):
        return batch | {"suffix_mask": None}


class FullyCausal(_Twin):
    """Read from left to right throughout, picture and prompt, too.

    transformers 5.9 to 5.23, when called without ``token_type_ids``.
    """

    def before(self, batch):
        everything = torch.ones_like(batch["input_ids"], dtype=torch.bool)
        return batch | {"suffix_mask": everything}


class ImagesDivided(PaliGemma):
    """Image tokens divided by sqrt(D), though only words are multiplied.

    vLLM issue 52667: the multiplication had moved, the division stayed.
    """

    def encode_images(self, pixel_values):
        root = self.config.text.width**0.5
        return super().encode_images(pixel_values) / root


class ImagesMultiplied(PaliGemma):
    """Everything that goes into Gemma times sqrt(D), image tokens, too.

    What you get if you leave out the division of pytorch-paligemma
    because it looks like a bug (its issue 13).
    """

    def encode_images(self, pixel_values):
        root = self.config.text.width**0.5
        return super().encode_images(pixel_values) * root


class WordsNotScaled(PaliGemma):
    """The rows of the table as they are: no sqrt(D)."""

    def embed(self, input_ids, image_tokens=None):
        x = super().embed(input_ids, image_tokens)
        is_image = (input_ids == self.config.image_token)[..., None]
        return x.where(is_image, x / self.config.text.width**0.5)


class WordsScaledTwice(PaliGemma):
    """By the table, and by hand once more. OpenTau pull request 179,
    with Gemma 3.
    """

    def embed(self, input_ids, image_tokens=None):
        x = super().embed(input_ids, image_tokens)
        is_image = (input_ids == self.config.image_token)[..., None]
        return x.where(is_image, x * self.config.text.width**0.5)


class ScaleFromTheTop(PaliGemma):
    """Divides by the root of the file's ``hidden_size``, not the text's.

    2048 also in PaliGemma 2, whose decoder is wider: pytorch-paligemma,
    and ports of it. Liger-Kernel pull request 612 mends the mismatch. Too
    large by 6 % in the 3B, by half in the 28B.
    """

    ratio = (4608 / 2048) ** 0.5  # 1.5, of PaliGemma 2 28B

    def encode_images(self, pixel_values):
        return super().encode_images(pixel_values) * self.ratio


class PlaceholdersFromTheTable(PaliGemma):
    """<image> is looked up like a word; the picture never arrives."""

    def embed(self, input_ids, image_tokens=None):
        return self.language.embed(input_ids)


class PicturesInOtherRows(PaliGemma):
    """Pictures in another order than the rows that they belong to."""

    def encode_images(self, pixel_values):
        return super().encode_images(pixel_values.flip(0))


class TowerWithoutItsLastNorm(PaliGemma):
    """The tower hands out its stream; post_layernorm is forgotten."""

    def encode_images(self, pixel_values):
        kept = []
        handle = self.vision.post_layernorm.register_forward_pre_hook(
            lambda module, inputs: kept.append(inputs[0])
        )
        self.vision(pixel_values.to(self.projector.linear.weight.dtype))
        handle.remove()
        return self.projector(kept[0])


class PaddingInThePrefix(_Twin):
    """Fillers count as prefix, and everybody reads them.

    Training in transformers 4.48: issue 35855.
    """

    def before(self, batch):
        return batch | {"attention_mask": None}


class SuffixReadsItself(_Twin):
    """Two full blocks: the prefix is safe, the answer reads its future."""

    def before(self, batch):
        suffix = batch["suffix_mask"]
        if suffix is None:
            return batch
        is_first = suffix & (suffix.cumsum(dim=1) == 1)  # starts the block
        return batch | {"suffix_mask": is_first}


class LossOnThePrefix(_Twin):
    """Learns the prompt by heart as well; the answer is one part of it."""

    def before(self, batch):
        ids, is_token = batch["input_ids"], batch["attention_mask"]
        if batch["labels"] is None:
            return batch
        is_word = ids != self.config.image_token
        if is_token is not None:
            is_word = is_word & is_token
        return batch | {"labels": ids.where(is_word, IGNORE)}


class LossNotShifted(_Twin):
    """Each place predicts itself, which it has read."""

    def before(self, batch):
        return batch | {"labels": None}

    def after(self, out, batch):
        if (labels := batch["labels"]) is None:
            return out
        logits = out.logits.transpose(1, 2)
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE)
        return Output(out.logits, loss)


class LossOverPadding(_Twin):
    """The sum is right, and is divided by all places of the batch."""

    def after(self, out, batch):
        if (labels := batch["labels"]) is None:
            return out
        total = suffix_loss(out.logits, labels, "tokens") * len(out.logits)
        return Output(out.logits, total / labels.numel())


TWINS = (
    ImagesDivided,
    ImagesMultiplied,
    WordsNotScaled,
    WordsScaledTwice,
    ScaleFromTheTop,
    PlaceholdersFromTheTable,
    TowerWithoutItsLastNorm,
    PicturesInOtherRows,
    FullyCausal,
    PaddingInThePrefix,
    AllOnesMask,
    SuffixReadsItself,
    LossOnThePrefix,
    LossNotShifted,
    LossOverPadding,
)


def with_bug(model: PaliGemma, twin: type[PaliGemma]) -> PaliGemma:
    """A copy of a model with the same weights and one bug."""
    copy = twin(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.to(model.projector.linear.weight.dtype).eval()
