"""Emoji: the same 521 things drawn by seven artists, as tensors.

The pictures ship with the package (pgcore/assets/emoji, made by
tools/build_emoji.py). Their licences are in LICENSES.md beside them and on the page
"Data and licences" of the book.

Axes: B pictures, C colour channels, R pixels a side.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pgcore.lab._near import unknown
from pgcore.lab._pixels import Colour, arrange, over, rgb, to_images, to_pixels
from pgcore.lab._sheets import catalogue, cells

TRAIN_STYLES = ("noto", "noto-v1", "fluent", "emojione")
VALIDATION_STYLE = "fxemoji"
TEST_STYLE = "twemoji"  # no weight that ships with the book has seen it
SHARE_ALIKE_STYLES = ("openmoji",)  # CC BY-SA 4.0: no shipped weight trains on it
STYLES = (*TRAIN_STYLES, VALIDATION_STYLE, TEST_STYLE, *SHARE_ALIKE_STYLES)

UNSEEN_PERCENT = 12

_ROWS = {row["names"]["en"]: row for row in catalogue()["concepts"]}


def _is_unseen(code: str) -> bool:
    """Split by the code point alone, so that adding a concept moves no other."""
    return int(hashlib.sha256(code.encode()).hexdigest(), 16) % 100 < UNSEEN_PERCENT


LANGUAGES = tuple(catalogue()["languages"])
CONCEPTS = tuple(_ROWS)
UNSEEN_CONCEPTS = tuple(name for name, row in _ROWS.items() if _is_unseen(row["code"]))
SEEN_CONCEPTS = tuple(name for name in CONCEPTS if name not in set(UNSEEN_CONCEPTS))
SHARED_CONCEPTS = tuple(
    name
    for name, row in _ROWS.items()
    if row["cells"].keys() >= set(STYLES) - set(SHARE_ALIKE_STYLES)
)


@dataclasses.dataclass(frozen=True, eq=False)
class EmojiSet:
    """Pictures of concepts, one row each.

    Attributes:
        images: [B, C, R, R] in [0, 1]; C is 4 (straight alpha) or 3 (on a background).
        labels: [B], index into ``concepts``.
        concepts: the English names that labels count.
        styles: the artist of each picture, B of them.
    """

    images: Float[Tensor, "B C R R"]
    labels: Int[Tensor, " B"]
    concepts: tuple[str, ...]
    styles: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.styles)

    def select(
        self, rows: Bool[Tensor, " B"] | Int[Tensor, " some"] | Sequence[int]
    ) -> "EmojiSet":
        """Keep some rows: a boolean mask of B, or indices in any order."""
        rows = torch.as_tensor(rows)
        if rows.dtype == torch.bool:
            if len(rows) != len(self):
                raise ValueError(f"the mask has {len(rows)} rows, the set {len(self)}")
            rows = rows.nonzero().squeeze(1)
        rows = rows.long()
        return dataclasses.replace(
            self,
            images=self.images[rows],
            labels=self.labels[rows],
            styles=tuple(self.styles[row] for row in rows.tolist()),
        )


def load_emoji(
    styles: str | Sequence[str] = TRAIN_STYLES,
    concepts: str | Sequence[str] | None = None,
    size: int = 48,
    background: Colour | None = None,
) -> EmojiSet:
    """Load every picture that these artists drew of these concepts.

    The order is by style, then by concept, both as given. What an artist did not draw
    is left out.

    Args:
        styles: a name of ``STYLES`` or several.
        concepts: a name of ``CONCEPTS`` or several; None is all of them.
        size: R, pixels a side; the sheets hold 48.
        background: None gives RGBA [B, 4, R, R]; a colour gives RGB [B, 3, R, R].

    Raises:
        ValueError: for an unknown or repeated name and for a size below 1.
    """
    styles = _known("style", styles, STYLES)
    concepts = _known("concept", CONCEPTS if concepts is None else concepts, CONCEPTS)
    _check_size(size)
    drawn = [
        (style, label, _ROWS[concept]["cells"][style])
        for style in styles
        for label, concept in enumerate(concepts)
        if style in _ROWS[concept]["cells"]
    ]
    side = catalogue()["cell"]
    pixels = np.zeros((len(drawn), side, side, 4), np.uint8)
    for row, (style, _, index) in enumerate(drawn):
        pixels[row] = cells(style)[index]
    if size != side:
        pixels = arrange(pixels, size, np.tile([size, 0, 0], (len(drawn), 1)))
    if background is not None:
        pixels = over(pixels, np.array([rgb(background)], np.uint8))
    return EmojiSet(
        images=to_images(pixels),
        labels=torch.tensor([label for _, label, _ in drawn], dtype=torch.long),
        concepts=concepts,
        styles=tuple(style for style, _, _ in drawn),
    )


def names(
    language: str = "en", concepts: str | Sequence[str] | None = None
) -> tuple[str, ...]:
    """Name the concepts (English names; None is all) in a language of LANGUAGES.

    Source: Unicode CLDR.

    Raises:
        ValueError: for an unknown language or concept.
    """
    (language,) = _known("language", language, LANGUAGES)
    concepts = _known("concept", CONCEPTS if concepts is None else concepts, CONCEPTS)
    return tuple(_ROWS[concept]["names"][language] for concept in concepts)


def keywords(
    language: str = "en", concepts: str | Sequence[str] | None = None
) -> tuple[tuple[str, ...], ...]:
    """List words that go with each concept, in a language of LANGUAGES.

    Source: Unicode CLDR.

    Raises:
        ValueError: for an unknown language or concept.
    """
    (language,) = _known("language", language, LANGUAGES)
    concepts = _known("concept", CONCEPTS if concepts is None else concepts, CONCEPTS)
    return tuple(tuple(_ROWS[concept]["keywords"][language]) for concept in concepts)


def place(
    sprites: EmojiSet,
    *,
    seed: int,
    size: int = 32,
    scale: tuple[float, float] = (0.6, 1.0),
    background: Colour | None = "random",
) -> EmojiSet:
    """Put each sprite at a random place and scale in a frame: the augmentation.

    The same seed gives the same bytes on every machine, since pixels are reckoned in
    integers. Row i depends on the seed, i and sprite i only.

    Args:
        sprites: pictures with alpha, [B, 4, R, R]. They never leave the frame.
        seed: of this draw of places, scales and colours.
        size: pixels a side of the frame.
        scale: smallest and largest side of a sprite, as a share of the frame's.
        background: "random" draws one colour a picture; else as in ``load_emoji``.

    Raises:
        ValueError: if sprites have no alpha or a number is out of range.
    """
    if (channels := sprites.images.shape[1]) != 4:
        raise ValueError(
            f"sprites need 4 channels (RGBA), got {channels}:"
            " load them with background=None"
        )
    _check_size(size)
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale must be 0 < smallest <= largest <= 1, got {scale}")
    smallest, largest = (max(1, round(share * size)) for share in scale)
    # NumPy promises that raw PCG64 numbers never change; it does not for integers().
    # 2**64 numbers modulo a few hundred: the bias is below 1e-16.
    raw = np.random.PCG64(seed).random_raw((len(sprites), 6))
    side = smallest + raw[:, 0] % np.uint64(largest - smallest + 1)
    left, top = (raw[:, axis] % (np.uint64(size + 1) - side) for axis in (1, 2))
    boxes = np.stack([side, left, top], axis=1).astype(np.int64)
    pixels = arrange(to_pixels(sprites.images), size, boxes)
    if background == "random":
        pixels = over(pixels, (raw[:, 3:] % np.uint64(256)).astype(np.uint8))
    elif background is not None:
        pixels = over(pixels, np.array([rgb(background)], np.uint8))
    return dataclasses.replace(sprites, images=to_images(pixels))


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")


def _known(
    kind: str, wanted: str | Sequence[str], known: Sequence[str]
) -> tuple[str, ...]:
    """Check names: each known, none twice. A single name counts as one."""
    wanted = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    exists = set(known)
    for name in wanted:
        if name not in exists:
            raise unknown(kind, name, known)
    if len(set(wanted)) < len(wanted):
        twice = next(name for name in wanted if wanted.count(name) > 1)
        raise ValueError(f"{kind} {twice!r} is named twice")
    return wanted
