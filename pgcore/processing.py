"""Pixels and tokens: from pictures and prompts to the tensors of PaliGemma.

A picture becomes R x R colours in [-1, 1]; a prompt becomes ids, behind
P places for the picture's patches (Beyer et al., 2024, section 3.1).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from torch import Tensor

from pgcore.files import read_json

PAD, EOS, BOS, UNKNOWN = CONTROL_TOKENS = "<pad>", "<eos>", "<bos>", "<unk>"
LOC_TOKENS = tuple(f"<loc{i:04d}>" for i in range(1024))  # places, for boxes
SEG_TOKENS = tuple(f"<seg{i:03d}>" for i in range(128))  # shapes, for masks
IMAGE = "<image>"  # where a patch of a picture goes
IGNORE = -100  # the label of a place where nothing is to be predicted


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB; the argument stays as it is.

    The first frame, turned as its EXIF data say; transparency over
    white; modes I and I;16 as 0..65535, F as 0..255, rounded to bytes.
    Raises ValueError for an empty picture and for numbers outside.
    Source: the conversions of Pillow; the rest is a choice of this book.

    Built in chapter 11, Pixels and tokens.
    """
    if 0 in image.size:
        raise ValueError(f"image: expected some pixels, found {image.size}")
    if getattr(image, "is_animated", False):
        here = image.tell()
        image.seek(0)
        first = image.copy()
        image.seek(here)
        image = first
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        top = 255 if image.mode == "F" else 65_535
        numbers = np.asarray(image, np.float64)
        if not (numbers.min() >= 0 and numbers.max() <= top):
            raise ValueError(
                f"image: expected 0 to {top} in mode {image.mode}, found "
                f"{numbers.min()} to {numbers.max()}"
            )
        image = Image.fromarray((numbers * 255 / top).round().astype(np.uint8))
    if image.mode == "La":  # Pillow knows one way out
        image = image.convert("LA")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, picture)
    return image.convert("RGB")


def to_pixels(image: Image.Image, size: int) -> Float[Tensor, "C R R"]:
    """A picture as size x size colours in [-1, 1], squeezed to a square.

    Bicubic, antialiased, rounded to bytes before it is scaled.
    Source: Beyer et al. (2024), section 3.2.6; Pillow.

    Built in chapter 11, Pixels and tokens.
    """
    square = to_rgb(image).resize((size, size), Image.Resampling.BICUBIC)
    colours = torch.from_numpy(np.array(square)).permute(2, 0, 1)
    return colours.div(255).sub(0.5).div(0.5)


def load_tokenizer(folder: Path) -> Tokenizer:
    """From ``tokenizer.json``, or else from ``tokenizer.model``.

    Raises FileNotFoundError if there is neither, ValueError for a file
    that is not what its name says.

    Built in chapter 11, Pixels and tokens.
    """
    fast, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
    if not fast.is_file() and not pieces.is_file():
        raise FileNotFoundError(f"{folder}: neither {fast.name} nor {pieces.name}")
    try:
        if not fast.is_file():
            return from_sentencepiece(pieces)
        tokenizer = Tokenizer.from_file(str(fast))
    except Exception as error:  # both libraries raise nothing narrower
        raise ValueError(f"{folder}: expected a tokenizer, found {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def from_sentencepiece(path: Path) -> Tokenizer:
    """The tokenizer of a SentencePiece model of byte pairs, as Gemma's.

    The pairs to merge are not in the file: they follow from the order of
    the pieces. What the model lacks of PaliGemma's tokens comes after
    them. Needs the library ``sentencepiece``.
    Source: Kudo and Richardson (2018); the file of Gemma.

    Built in chapter 11, Pixels and tokens.
    """
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    model.LoadFromSerializedProto(path.read_bytes())
    vocabulary = {model.IdToPiece(i): i for i in range(len(model))}
    learned, whole, control = [], [], []
    for piece, i in vocabulary.items():
        if model.IsControl(i) or model.IsUnknown(i):
            control.append(piece)
        elif str(model.GetScore(i)) != "0.0":  # -0.0 is the first learned
            learned.append(piece)
        elif not model.IsByte(i):
            whole.append(piece)
    merges = []
    for piece in sorted(learned, key=lambda p: -model.GetScore(vocabulary[p])):
        cuts = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
        found = [pair for pair in cuts if all(part in vocabulary for part in pair)]
        merges += sorted(found, key=lambda p: [vocabulary[part] for part in p])
    tokenizer = _byte_pairs(vocab=vocabulary, merges=merges)
    tokenizer.add_tokens([AddedToken(t, normalized=True) for t in whole])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in control])
    return _with_paligemma_tokens(tokenizer)


def _byte_pairs(**learned) -> Tokenizer:
    """Byte pairs as in Gemma: spaces are letters, and no text is unknown."""
    options = {"unk_token": UNKNOWN, "byte_fallback": True, "fuse_unk": True}
    tokenizer = Tokenizer(models.BPE(**learned, **options))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _with_paligemma_tokens(tokenizer: Tokenizer) -> Tokenizer:
    plain = {"normalized": False, "special": False}
    tokenizer.add_tokens([AddedToken(t, **plain) for t in LOC_TOKENS + SEG_TOKENS])
    tokenizer.add_special_tokens([AddedToken(IMAGE, normalized=False)])
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn pieces of words from texts; ids in the order of PaliGemma's.

    Control tokens, the 256 bytes, the learned pieces: vocab_size in all,
    fewer if the texts give no more. Then places, shapes, ``<image>``.
    Raises ValueError unless there is room for the bytes.
    Source: byte-pair encoding (Sennrich et al., 2016), as in Gemma.

    Built in chapter 11, Pixels and tokens.
    """
    first = [*CONTROL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    if vocab_size < len(first):
        raise ValueError(
            f"vocab_size: expected at least {len(first)}, found {vocab_size}"
        )
    tokenizer = _byte_pairs()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=first, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_paligemma_tokens(tokenizer)


# What to_pixels does, in the words of preprocessor_config.json; 3 is bicubic.
# fmt: off
_SETTINGS = {
    "do_convert_rgb": True, "do_resize": True, "resample": 3,
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}
_NAMES = {
    "bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNKNOWN,
    "additional_special_tokens": [IMAGE], "padding_side": "left",
    "tokenizer_class": "PreTrainedTokenizerFast",
}
# fmt: on


@dataclass(frozen=True)
class Processor:
    """Pictures and prompts in, the tensors of a batch out.

    A row is ``<image>`` times P for each picture, ``<bos>``, the prompt,
    a newline; with a suffix, the suffix and ``<eos>`` follow. The shorter
    rows are padded on the left, so that all end together.
    tokenizer: knows the control tokens and ``<image>``. image_size: R.
    num_image_tokens: P.
    Raises ValueError for a tokenizer that lacks one of them.
    Source: Beyer et al. (2024), section 3.1; Hugging Face.

    Built in chapter 11, Pixels and tokens.
    """

    tokenizer: Tokenizer
    image_size: int
    num_image_tokens: int

    def __post_init__(self):
        for token in (PAD, EOS, BOS, IMAGE):
            self.id_of(token)

    def __call__(
        self,
        images: Sequence[Image.Image | Sequence[Image.Image]],
        prompts: Sequence[str],
        suffixes: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """One row for each prompt; images: one each, or several, or none.

        pixel_values [images, 3, R, R], of all rows, in their order;
        input_ids [B, T]; attention_mask [B, T], False is padding; with
        suffixes also suffix_mask [B, T], and labels [B, T]: the ids of
        the suffix, IGNORE elsewhere.
        Raises ValueError for numbers of rows that differ, and for a text
        that contains a control token or ``<image>``.
        """
        texts = (prompts,) if suffixes is None else (prompts, suffixes)
        sizes = [0 if isinstance(x, str) else len(x) for x in (images, *texts)]
        if len(set(sizes)) > 1 or not sizes[0]:
            raise ValueError(
                "images, prompts, suffixes: expected lists of one length, "
                f"found {sizes}"
            )
        of_rows = [[x] if isinstance(x, Image.Image) else list(x) for x in images]
        counts = [len(row) for row in of_rows]
        starts = [self._prefix(*row) for row in zip(counts, prompts, strict=True)]
        ends = [self._suffix(text) for text in suffixes or [None] * len(starts)]
        pixels = [to_pixels(x, self.image_size) for row in of_rows for x in row]
        shape = (0, 3, self.image_size, self.image_size)
        return {
            "pixel_values": torch.stack(pixels) if pixels else torch.empty(shape),
            **self._text(starts, ends, with_labels=suffixes is not None),
        }

    def id_of(self, token: str) -> int:
        """The id of a token. ValueError if the tokenizer has none such."""
        if (found := self.tokenizer.token_to_id(token)) is None:
            raise ValueError(f"tokenizer: expected one that knows {token}")
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, up to its ``<eos>``."""
        ids, eos = list(ids), self.id_of(EOS)
        return self.tokenizer.decode(ids[: ids.index(eos)] if eos in ids else ids)

    def save(self, folder: Path) -> None:
        """Write the files that ``load_processor`` and transformers read."""
        settings = _SETTINGS | {
            "size": {"height": self.image_size, "width": self.image_size},
            "image_seq_length": self.num_image_tokens,
            "image_processor_type": "SiglipImageProcessor",
        }
        owner = {"processor_class": "PaliGemmaProcessor"}
        for name, content in ("preprocessor", settings), ("tokenizer", _NAMES):
            text = json.dumps(content | owner, indent=2) + "\n"
            (folder / f"{name}_config.json").write_text(text)
        self.tokenizer.save(str(folder / "tokenizer.json"))

    def _prefix(self, num_images: int, prompt: str) -> list[int]:
        """The newline is encoded alone: it must not melt into the prompt."""
        room = [self.id_of(IMAGE)] * (self.num_image_tokens * num_images)
        newline = self._encode("\n")
        return [*room, self.id_of(BOS), *self._encode(prompt), *newline]

    def _suffix(self, text: str | None) -> list[int]:
        return [] if text is None else [*self._encode(text), self.id_of(EOS)]

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        for token in (PAD, EOS, BOS, IMAGE):
            if self.id_of(token) in ids:
                raise ValueError(
                    f"text {text[:80]!r}: {token} is the processor's to place"
                )
        return ids

    def _text(
        self, starts: list[list[int]], ends: list[list[int]], with_labels: bool
    ) -> dict[str, Tensor]:
        """Pad on the left; say what is padding, and what is suffix."""
        length = max(len(s) + len(e) for s, e in zip(starts, ends, strict=True))
        ids = torch.full((len(starts), length), self.id_of(PAD))
        is_token = torch.zeros_like(ids, dtype=torch.bool)
        is_suffix = is_token.clone()
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            first = length - len(start) - len(end)
            ids[row, first:] = torch.tensor([*start, *end])
            is_token[row, first:] = True
            is_suffix[row, length - len(end) :] = True
        batch = {"input_ids": ids, "attention_mask": is_token}
        if with_labels:
            batch["suffix_mask"] = is_suffix
            batch["labels"] = ids.where(is_suffix, IGNORE)
        return batch


def load_processor(folder: str | Path) -> Processor:
    """The processor of a checkpoint in Hugging Face's format.

    Reads ``preprocessor_config.json``, or ``processor_config.json`` of
    transformers 5, and the tokenizer. What it would do otherwise than
    ``to_pixels`` is refused.
    Raises FileNotFoundError and ValueError, naming file and setting.

    Built in chapter 11, Pixels and tokens.
    """
    folder = Path(folder)
    path = folder / "preprocessor_config.json"
    if path.is_file():
        settings = read_json(path)
    else:
        path = folder / "processor_config.json"
        settings = read_json(path).get("image_processor", {})
    for name, expected in _SETTINGS.items():
        if (found := settings.get(name, expected)) != expected:
            raise ValueError(f"{path}: {name}: expected {expected}, found {found}")
    size, length = settings.get("size", {}), settings.get("image_seq_length")
    side = size.get("height") if isinstance(size, dict) else None
    for name, number in (("size", side), ("image_seq_length", length)):
        if type(number) is not int or not 1 <= number <= 10_000:
            raise ValueError(f"{path}: {name}: expected 1 to 10000, found {number}")
    if size["height"] != size.get("width"):
        raise ValueError(f"{path}: size: expected a square, found {size}")
    return Processor(load_tokenizer(folder), cast(int, side), cast(int, length))
