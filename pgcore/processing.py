# Generated from chapters/11_pixels_and_tokens.ipynb.
# Edit the notebook, then run "make chapters".
"""Pixels and tokens: from pictures and prompts to the tensors of PaliGemma.

A picture becomes R x R colours in [-1, 1]; a prompt becomes ids, behind
P places for the picture's patches (Beyer et al., 2024, section 3.1).
"""

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image, ImageOps
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from torch import Tensor

from pgcore.files import one_line, require_file, written_whole
from pgcore.hub_settings import read_settings, settings_files


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as 8-bit RGB; the argument stays as it is.

    The first frame, turned as its EXIF data say; transparency over
    white; modes I and I;16 as 0..65535, F as 0..255, rounded to bytes.
    Raises ValueError for what is not a picture, an empty picture, and
    numbers outside.
    Source: the conversions of Pillow; white as in transformers 5; the
    rest is a choice of this book.

    Built in chapter 11, Pixels and tokens.
    """
    if not isinstance(image, Image.Image) or 0 in image.size:
        found = getattr(image, "size", type(image))
        raise ValueError(f"image: expected a PIL image with pixels, found {found}")
    if getattr(image, "is_animated", False):
        here = image.tell()
        image.seek(0)
        first = image.copy()
        image.seek(here)
        image = first
    with suppress(Exception):  # broken EXIF data turn nothing
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        image = _to_bytes(image)
    if image.has_transparency_data:
        if image.mode == "La":  # Pillow knows one way out
            image = image.convert("LA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _to_bytes(image: Image.Image) -> Image.Image:
    """Grey in more than 8 bits, scaled to 8; Pillow would cut it off."""
    top, mode = 255 if image.mode == "F" else 65_535, image.mode
    grey = np.array(image, np.float64)
    grey[grey == image.info.get("transparency")] = top  # white
    low, high = grey.min(), grey.max()
    if not 0 <= low <= high <= top:
        raise ValueError(f"image: {mode}: expected 0 to {top}, found {low} to {high}")
    return Image.fromarray((grey * 255 / top).round().astype(np.uint8))


def to_pixels(image: Image.Image, size: int) -> Float[Tensor, "C R R"]:
    """A picture as size x size colours in [-1, 1], squeezed to a square.

    Bicubic, antialiased, rounded to bytes before it is scaled.
    Source: the image processor of Hugging Face; Pillow. In training the
    kernel was random: Beyer et al. (2024), section 3.2.6.

    Built in chapter 11, Pixels and tokens.
    """
    square = to_rgb(image).resize((size, size), Image.Resampling.BICUBIC)
    colours = torch.from_numpy(np.array(square)).permute(2, 0, 1)
    return colours.div(255).sub(0.5).div(0.5)


PAD = "<pad>"  # fills up
EOS = "<eos>"  # ends an answer
BOS = "<bos>"  # begins the prompt
UNKNOWN = "<unk>"
CONTROL_TOKENS = PAD, EOS, BOS, UNKNOWN
LOC_TOKENS = tuple(f"<loc{i:04d}>" for i in range(1024))  # for boxes
SEG_TOKENS = tuple(f"<seg{i:03d}>" for i in range(128))  # for masks
IMAGE = "<image>"  # the place of a patch
IGNORE = -100  # a label that is none

# Places and shapes, single digits, letters or signs with the space before
# them, more spaces, ends of lines.
_WORD = re.compile(r"<loc\d{4}>|<seg\d{3}>|\d| ?[^\W\d]+| ?[^\w\s]+| +|\n+")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn pieces of words from texts; ids in the order of PaliGemma's.

    Control tokens, the 256 bytes, the learned pieces: vocab_size in all,
    fewer if the texts give no more. Then places, shapes, ``<image>``.
    A piece is a part of one word and the space before it.
    Raises ValueError unless there is room for the bytes.
    Source: byte-pair encoding (Sennrich et al., 2016), as in Gemma.

    Built in chapter 11, Pixels and tokens.
    """
    first = [*CONTROL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    if (room := vocab_size - len(first)) < 0:
        raise ValueError(f"vocab_size: expected 260 or more, found {vocab_size}")
    found = (word for text in texts for word in _WORD.findall(text))
    words = (word for word in found if word[:4] not in ("<loc", "<seg"))
    options = {"special_tokens": first, "limit_alphabet": room}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **options)
    (trained := _byte_pairs()).train_from_iterator(words, trainer)
    # Made anew: a trainer's first tokens are special, and bytes are not.
    model = json.loads(trained.to_str())["model"]
    pairs = [tuple(pair) for pair in model["merges"]]
    return _finished(_byte_pairs(vocab=model["vocab"], merges=pairs), CONTROL_TOKENS)


def _byte_pairs(**learned) -> Tokenizer:
    """Byte pairs as in Gemma: spaces are letters, no text is unknown."""
    options = {"unk_token": UNKNOWN, "byte_fallback": True, "fuse_unk": True}
    tokenizer = Tokenizer(models.BPE(**learned, **options))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " ")]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _finished(begun: Tokenizer, control: Iterable[str]) -> Tokenizer:
    """Add what is matched whole: control, places, shapes, <image>."""
    whole = LOC_TOKENS + SEG_TOKENS
    begun.add_special_tokens([AddedToken(t, normalized=False) for t in control])
    begun.add_tokens([AddedToken(t, normalized=False) for t in whole])
    begun.add_special_tokens([AddedToken(IMAGE, normalized=False)])
    return begun


def from_sentencepiece(path: Path) -> Tokenizer:
    """The tokenizer of a SentencePiece model of byte pairs, as Gemma's.

    The pairs to merge are not in the file: they follow from the order of
    the pieces. What the model lacks of PaliGemma's tokens comes after
    them. Needs the library ``sentencepiece``.
    Raises ValueError for a model of another kind than Gemma's.
    Source: Kudo and Richardson (2018); the file of Gemma.

    Built in chapter 11, Pixels and tokens.
    """
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_proto=path.read_bytes())
    vocabulary = {model.IdToPiece(i): i for i in range(len(model))}
    learned, whole, control = [], [], []
    for piece, i in vocabulary.items():
        is_learned = str(model.GetScore(i)) != "0.0"  # -0.0 is the first
        is_control = model.IsControl(i) or model.IsUnknown(i)
        kind = control if is_control else learned if is_learned else whole
        kind += [] if model.IsByte(i) else [piece]
    merges = []
    for piece in sorted(learned, key=lambda p: -model.GetScore(vocabulary[p])):
        cuts = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
        found = [(a, b) for a, b in cuts if {a, b} <= vocabulary.keys()]
        merges += sorted(found, key=lambda p: [vocabulary[x] for x in p])
    tokenizer = _byte_pairs(vocab=vocabulary, merges=merges)
    tokenizer.add_tokens([AddedToken(t, normalized=True) for t in whole])
    probe = " Two  cats\nﬁ"  # other models change spaces and letters
    if tokenizer.encode(probe).ids != model.EncodeAsIds(probe):
        raise ValueError(f"{path}: expected byte pairs, and texts left as they are")
    return _finished(tokenizer, control)


def load_tokenizer(folder: Path) -> Tokenizer:
    """From ``tokenizer.json``, or else from ``tokenizer.model``.

    Raises FileNotFoundError if there is neither, ValueError for a file
    that is not what its name says, or that needs ``sentencepiece``
    where it is not installed.

    Built in chapter 11, Pixels and tokens.
    """
    fast, slow = folder / "tokenizer.json", folder / "tokenizer.model"
    if not (is_fast := fast.is_file()) and not slow.is_file():
        raise FileNotFoundError(f"{folder}: neither {fast.name} nor {slow.name}")
    require_file(fast if is_fast else slow, 500_000_000)
    try:
        found = Tokenizer.from_file(str(fast)) if is_fast else from_sentencepiece(slow)
    except ImportError:
        raise ValueError(f"{slow}: needs the library sentencepiece") from None
    except Exception as error:  # both libraries raise nothing narrower
        raise ValueError(
            f"{folder}: expected a tokenizer, found: {one_line(error)}"
        ) from None
    found.no_padding()
    found.no_truncation()
    return found


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

        pixel_values [images, 3, R, R], all pictures in their order.
        input_ids [B, T]. attention_mask [B, T]: False is padding; the
        positions follow from it (``pgcore.rope.token_positions``). With
        suffixes also suffix_mask [B, T], and labels [B, T]: the ids of
        the suffix, IGNORE elsewhere.
        Raises ValueError for numbers of rows that differ, for what is
        not a picture, and for a text that contains ``<pad>``, ``<eos>``,
        ``<bos>`` or ``<image>``.
        """
        texts = (prompts,) if suffixes is None else (prompts, suffixes)
        sizes = [
            len(x) if isinstance(x, Sequence) and type(x) is not str else 0
            for x in (images, *texts)
        ]
        if len(set(sizes)) > 1 or not sizes[0]:
            what = "images, prompts, suffixes: expected lists of one length"
            raise ValueError(f"{what}, found {sizes}")
        each = [x if isinstance(x, Sequence) else [x] for x in images]
        R, pad, eos = self.image_size, self.id_of(PAD), self.id_of(EOS)
        seen = [to_pixels(x, R) for row in each for x in row]
        rows = list(map(self._prefix, map(len, each), prompts))
        ends = [[*self._encode(text), eos] for text in suffixes or ()]
        for row, end in zip(rows, ends, strict=False):
            row += end
        longest = max(map(len, rows))
        ids = _padded(rows, longest, pad)
        pixels = torch.stack(seen) if seen else torch.empty(0, 3, R, R)
        batch = {"pixel_values": pixels, "input_ids": ids, "attention_mask": ids != pad}
        if suffixes is not None:
            batch["labels"] = labels = _padded(ends, longest, IGNORE)
            batch["suffix_mask"] = labels != IGNORE
        return batch

    def id_of(self, token: str) -> int:
        """The id of a token; ValueError if the tokenizer lacks it."""
        if (found := self.tokenizer.token_to_id(token)) is None:
            raise ValueError(f"tokenizer: expected one that knows {token}")
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, up to its ``<eos>``."""
        ids, eos = [*ids, self.id_of(EOS)], self.id_of(EOS)
        return self.tokenizer.decode(ids[: ids.index(eos)])

    def save(self, folder: Path) -> None:
        """Write the files that ``load_processor`` and transformers read."""
        texts = settings_files(self.image_size, self.num_image_tokens, CONTROL_TOKENS)
        texts["tokenizer.json"] = self.tokenizer.to_str(pretty=True)
        for name, text in texts.items():
            with written_whole(folder / name) as path:
                path.write_text(text + "\n", encoding="utf8")

    def _prefix(self, num_images: int, prompt: str) -> list[int]:
        """The newline alone, so that it cannot merge with the prompt."""
        room = [self.id_of(IMAGE)] * (self.num_image_tokens * num_images)
        return [*room, self.id_of(BOS), *self._encode(prompt), *self._encode("\n")]

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        for token in (PAD, EOS, BOS, IMAGE):
            if self.id_of(token) in ids:
                raise ValueError(f"{text[:60]!r}: {token} is the processor's to place")
        return ids


def _padded(rows: list[list[int]], longest: int, filler: int) -> Int[Tensor, "B T"]:
    return torch.tensor([[filler] * (longest - len(row)) + row for row in rows])


def load_processor(folder: str | Path) -> Processor:
    """The processor of a checkpoint in Hugging Face's format.

    Reads ``preprocessor_config.json``, or ``processor_config.json`` of
    transformers 5, and the tokenizer. What it would do otherwise than
    ``to_pixels`` is refused.
    Raises FileNotFoundError and ValueError, naming file and setting.

    Built in chapter 11, Pixels and tokens.
    """
    folder = Path(folder)
    image_size, num_image_tokens = read_settings(folder)
    tokenizer = load_tokenizer(folder)
    try:
        return Processor(tokenizer, image_size, num_image_tokens)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


__all__ = [
    "BOS",
    "CONTROL_TOKENS",
    "EOS",
    "IGNORE",
    "IMAGE",
    "LOC_TOKENS",
    "PAD",
    "Processor",
    "SEG_TOKENS",
    "UNKNOWN",
    "from_sentencepiece",
    "load_processor",
    "load_tokenizer",
    "to_pixels",
    "to_rgb",
    "train_tokenizer",
]
