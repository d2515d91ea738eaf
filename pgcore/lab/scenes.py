"""Scenes: emoji on backgrounds, with exact boxes, masks, counts and places.

A scene depends on its settings, a seed and an index, and on nothing else: batches,
processes and machines agree on every byte. What to ask about one, and the answers, is
in ``pgcore.lab.scene_language``.

Axes: B scenes, R pixels a side. Boxes are (top, left, bottom, right) in pixels, half
open: rows top..bottom - 1 and columns left..right - 1.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from pgcore.lab._backdrops import BACKGROUNDS, backdrop
from pgcore.lab._compose import (
    Placed,
    cast,
    choose_kinds,
    drawn_concepts,
    held_out_pairs,
    place_all,
)
from pgcore.lab._draws import Draws
from pgcore.lab._pixels import to_images
from pgcore.lab._scene_settings import PAIRS, SceneSettings
from pgcore.lab._scene_splits import SPLITS, held_out, split
from pgcore.lab._sprites import rim

__all__ = [
    "BACKGROUNDS",
    "PAIRS",
    "SPLITS",
    "Box",
    "Scene",
    "SceneObject",
    "SceneSettings",
    "compose",
    "compose_batch",
    "held_out",
    "images_of",
    "split",
]

Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class SceneObject:
    """One object of a scene.

    Attributes:
        concept: its English name.
        style: the artist.
        box: tight around the pixels that can be seen (alpha >= 128, not hidden).
        visible: share of its own pixels that no other object hides.
        place: its place in ``Scene.objects``.
        segments: those of the scene, [R, R], shared.
    """

    concept: str
    style: str
    box: Box
    visible: float
    place: int
    segments: UInt8[np.ndarray, "R R"] = dataclasses.field(repr=False)

    @property
    def mask(self) -> Bool[np.ndarray, "R R"]:
        """Where the object can be seen, [R, R]."""
        return self.segments == self.place + 1


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """A picture and what is in it.

    Attributes:
        image: [R, R, 3], bytes. Read-only.
        objects: from left to right by the left edge of the box, then from the top.
        segments: [R, R]; 0 is background, n is ``objects[n - 1]``. Read-only.
        settings: what it was drawn with.
        seed: of the stream it came from.
        index: its place in that stream.
    """

    image: UInt8[np.ndarray, "R R 3"] = dataclasses.field(repr=False)
    objects: tuple[SceneObject, ...]
    segments: UInt8[np.ndarray, "R R"] = dataclasses.field(repr=False)
    settings: SceneSettings = dataclasses.field(repr=False)
    seed: int
    index: int


def compose(settings: SceneSettings, seed: int, index: int) -> Scene:
    """Draw scene `index` of the stream that `seed` names.

    Raises:
        ValueError: for a seed or index below 0.
    """
    draws = Draws(seed, index)
    drawings = cast(settings.styles, settings.concepts)
    number = draws.between(*settings.objects)
    chosen = [draws.pick(drawings[kind]) for kind in _kinds(draws, settings, number)]
    if settings.variants > 1:
        chosen = [c._replace(variant=draws.below(settings.variants)) for c in chosen]
    shares = settings.side if number > 1 else settings.alone_side
    sides = round(shares[0] * settings.size), round(shares[1] * settings.size)
    placed, segments = place_all(
        draws, chosen, settings.size, sides, settings.max_overlap
    )
    image = backdrop(
        draws,
        draws.pick(settings.backgrounds),
        settings.size,
        [rim(one.style, one.cell) for one in chosen],
        draws.between(0, settings.clutter),
    )
    for one in placed:
        one.sprite.paste(image, one.top, one.left)
    objects, segments = _in_order(placed, segments)
    image.flags.writeable = segments.flags.writeable = False
    return Scene(image, objects, segments, settings, seed, index)


def compose_batch(
    settings: SceneSettings, seed: int, start: int, count: int
) -> tuple[Scene, ...]:
    """Draw the scenes start, ..., start + count - 1 of a stream."""
    return tuple(compose(settings, seed, start + row) for row in range(count))


def images_of(scenes: Sequence[Scene]) -> Float[Tensor, "B 3 R R"]:
    """Stack the pictures of scenes of one size: [B, 3, R, R] in [0, 1].

    Raises:
        ValueError: for no scenes, and for scenes of several sizes.
    """
    sizes = sorted({scene.settings.size for scene in scenes})
    if len(sizes) != 1:
        raise ValueError(f"scenes of one size are needed, got sizes {sizes}")
    return to_images(np.stack([scene.image for scene in scenes]))


def _kinds(draws: Draws, settings: SceneSettings, number: int) -> list[str]:
    known = settings.styles, settings.concepts
    return choose_kinds(
        draws,
        drawn_concepts(*known),
        number,
        settings.same_kind,
        settings.pairs,
        held_out_pairs(*known) if settings.pairs == "held-out" else (),
    )


def _in_order(
    placed: Sequence[Placed], segments: UInt8[np.ndarray, "R R"]
) -> tuple[tuple[SceneObject, ...], UInt8[np.ndarray, "R R"]]:
    """Sort the objects by left edge, then top, and number the segments likewise."""
    seen = [_seen(one, segments, number + 1) for number, one in enumerate(placed)]
    order = sorted(range(len(seen)), key=lambda row: (seen[row][0][1], seen[row][0][0]))
    renumber = np.zeros(len(placed) + 1, np.uint8)
    renumber[np.array(order) + 1] = np.arange(1, len(placed) + 1)
    segments = renumber[segments]
    objects = tuple(
        SceneObject(
            placed[row].drawn.concept, placed[row].drawn.style, *seen[row], at, segments
        )
        for at, row in enumerate(order)
    )
    return objects, segments


def _seen(
    one: Placed, segments: UInt8[np.ndarray, "R R"], number: int
) -> tuple[Box, float]:
    """Measure what can be seen of a sprite: its tight box and its visible share."""
    side = len(one.sprite.mask)
    mask = segments[one.top : one.top + side, one.left : one.left + side] == number
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    box = (
        one.top + int(rows[0]),
        one.left + int(columns[0]),
        one.top + int(rows[-1]) + 1,
        one.left + int(columns[-1]) + 1,
    )
    return box, int(mask.sum()) / one.sprite.visible
