# Generated from chapters/11_pixels_and_tokens.ipynb.
# Edit the notebook, then run "make chapters".
"""Wrong twins from chapter 11, Pixels and tokens."""

import re

import numpy as np
import torch
from PIL import Image

from pgcore.processing import Processor, to_pixels, to_rgb


def bytes_in_range(square):
    """Bytes of a picture as a tensor in [-1, 1]; this much is right."""
    colours = torch.from_numpy(np.array(square)).permute(2, 0, 1)
    return colours / 255 / 0.5 - 1


def no_conversion(image, size):
    """No RGB: a picture with alpha has four channels, a grey one fails.

    In a well-known port of PaliGemma (hkproj/pytorch-paligemma,
    ``process_images``; pull request 7 there).
    """
    square = image.resize((size, size), Image.Resampling.BICUBIC)
    return bytes_in_range(square)


def alpha_dropped(image, size):
    """``convert("RGB")`` alone: what was erased is back.

    Google's notebook (big_vision, finetune_paligemma.ipynb) drops alpha.
    """
    return to_pixels(image.convert("RGB"), size)


def exif_ignored(image, size):
    """The photo lies as the camera was held.

    (vllm-project/vllm, pull request 44974.)
    """
    plain = image.copy()
    plain.info.pop("exif", None)
    plain.getexif().clear()
    return to_pixels(plain, size)


def centre_cropped(image, size):
    """The shorter side becomes ``size``, the middle is cut out: CLIP's way.

    PaliGemma squeezes; here things at the edges are gone.
    """
    image = to_rgb(image)
    scale = size / min(image.size)
    width, height = (max(size, round(x * scale)) for x in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return bytes_in_range(image.crop((left, top, left + size, top + size)))


def not_antialiased(image, size):
    """torch's bicubic as it is by default: four old pixels a side."""
    x = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)[None]
    x = torch.nn.functional.interpolate(x.float(), (size, size), mode="bicubic")
    return x[0].round().clamp(0, 255) / 255 / 0.5 - 1


def bilinear(image, size):
    """Another kernel, as in big_vision's fine-tuning: close, not equal."""
    square = to_rgb(image).resize((size, size), Image.Resampling.BILINEAR)
    return bytes_in_range(square)


def imagenet_statistics(image, size):
    """Mean and standard deviation of ImageNet's colours.

    transformers calls these IMAGENET_DEFAULT_MEAN; the 0.5 that PaliGemma
    has is IMAGENET_STANDARD_MEAN.
    """
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    return (to_pixels(image, size) * 0.5 + 0.5 - mean) / std


def clip_statistics(image, size):
    """Mean and standard deviation of CLIP's training pictures."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    return (to_pixels(image, size) * 0.5 + 0.5 - mean) / std


PICTURE_TWINS = (
    no_conversion,
    alpha_dropped,
    exif_ignored,
    centre_cropped,
    not_antialiased,
    bilinear,
    imagenet_statistics,
    clip_statistics,
)


class SpaceAfterImage(Processor):
    """The prompt begins with a space, as in "<image> caption en".

    "The model breaks down" (huggingface/blog, pull request 2525).
    """

    def _prefix(self, num_images, prompt):
        return super()._prefix(num_images, " " + prompt)


class BosBeforeImages(Processor):
    """<bos> begins the row. PaliGemma's comes after the pictures.

    With one in front, too, the language of "caption <lang>" was not
    recognised (vllm-project/vllm, pull request 14015).
    """

    def _prefix(self, num_images, prompt):
        ids, bos = super()._prefix(num_images, prompt), self.id_of("<bos>")
        return [bos, *(i for i in ids if i != bos)]


class NewlineForgotten(Processor):
    """Nothing says that the prompt is over.

    (vllm-project/vllm, pull request 13584.)
    """

    def _prefix(self, num_images, prompt):
        return super()._prefix(num_images, prompt)[:-1]


class NewlineJoined(Processor):
    """Prompt and newline are encoded together, as Hugging Face does it.

    It matters for prompts that end with a newline.
    """

    def _prefix(self, num_images, prompt):
        start = super()._prefix(num_images, "")[:-1]
        return start + self._encode(prompt + "\n")


class PlacesInLetters(Processor):
    """<loc0512> is read letter by letter: it was never added.

    Suspected when detection found nothing (vllm-project/vllm, issue
    7115); Hugging Face adds the tokens by hand, since a conversion had
    missed them (huggingface/transformers, pull request 31022).
    """

    def _encode(self, text):
        parts = re.split(r"(?<=<)", text)  # after each "<"
        return [i for part in parts for i in super(PlacesInLetters, self)._encode(part)]


class RightPadding(Processor):
    """The padding stands at the end, where the answer should go on."""

    def __call__(self, images, prompts, suffixes=None):
        batch = super().__call__(images, prompts, suffixes)
        padding = (~batch["attention_mask"]).sum(dim=1).tolist()
        for row, shift in enumerate(padding):
            for name in batch.keys() - {"pixel_values"}:
                batch[name][row] = batch[name][row].roll(-shift)
        return batch


class LearnsThePrompt(Processor):
    """Labels everywhere: the model learns to ask, too."""

    def __call__(self, images, prompts, suffixes=None):
        batch = super().__call__(images, prompts, suffixes)
        if suffixes is not None:
            ids, is_token = batch["input_ids"], batch["attention_mask"]
            batch["labels"] = ids.where(is_token, -100)
        return batch


class EosForgotten(Processor):
    """The suffix has no end: the model never learns to stop.

    (huggingface/transformers, issue 35200.)
    """

    def __call__(self, images, prompts, suffixes=None):
        batch = super().__call__(images, prompts, suffixes)
        if suffixes is None:
            return batch
        return {
            name: tensor if name == "pixel_values" else tensor[:, :-1]
            for name, tensor in batch.items()
        }


ROW_TWINS = (
    SpaceAfterImage,
    BosBeforeImages,
    NewlineForgotten,
    NewlineJoined,
    PlacesInLetters,
    RightPadding,
    LearnsThePrompt,
    EosForgotten,
)
