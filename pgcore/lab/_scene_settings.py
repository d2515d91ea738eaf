"""What scenes are made of, checked once."""

import dataclasses
from collections.abc import Sequence

from pgcore.lab._backdrops import BACKGROUNDS
from pgcore.lab._compose import drawn_concepts, grid_side, held_out_pairs
from pgcore.lab._near import unknown
from pgcore.lab.emoji import CONCEPTS, SHARE_ALIKE_STYLES, STYLES, TRAIN_STYLES

PAIRS = ("seen", "held-out", "any")
# Pixels: from here on every drawing keeps pixels with alpha >= 128.
SMALLEST_SIDE = 13
SMALLEST_OUTLINE = 21  # the same for the thin black lines of openmoji


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneSettings:
    """What scenes are made of.

    Attributes:
        styles: the artists, names of ``emoji.STYLES``; one is drawn for each object.
        concepts: what may appear, English names.
        size: R, pixels a side of the picture.
        objects: fewest and most objects in a scene.
        side: smallest and largest side of a sprite's cell, as a share of R.
        alone_side: the same for an object that is alone.
        max_overlap: share of a sprite's visible pixels that later ones may hide.
        clutter: most marks (rectangles, discs, lines) behind the objects.
        same_kind: probability that a scene repeats a concept, up to four times.
        backgrounds: names of ``BACKGROUNDS``; one is drawn for each scene.
        pairs: "seen" never shows two concepts of a held-out pair together,
            "held-out" always shows one such pair, "any" does not care.
        variants: forms of each drawing: 1 is as the artist drew it, the others turn,
            stretch, mirror and tint it a little. For training.

    Raises ValueError, with the number or name, for what cannot be drawn.
    """

    styles: tuple[str, ...] = TRAIN_STYLES
    concepts: tuple[str, ...] = CONCEPTS
    size: int = 96
    objects: tuple[int, int] = (1, 3)
    side: tuple[float, float] = (0.25, 0.5)
    alone_side: tuple[float, float] = (0.35, 1.0)
    max_overlap: float = 0.1
    clutter: int = 3
    same_kind: float = 0.25
    backgrounds: tuple[str, ...] = BACKGROUNDS
    pairs: str = "seen"
    variants: int = 1

    def __post_init__(self):
        for field, known in (
            ("styles", STYLES),
            ("concepts", CONCEPTS),
            ("backgrounds", BACKGROUNDS),
        ):
            chosen = known_names(field, getattr(self, field), known)
            object.__setattr__(self, field, chosen)
        if self.pairs not in PAIRS:
            raise unknown("pairs", self.pairs, PAIRS)
        if not 1 <= self.objects[0] <= self.objects[1] <= 16:
            raise ValueError(f"objects: 1 <= fewest <= most <= 16, got {self.objects}")
        for field in ("max_overlap", "same_kind"):
            if not 0 <= (share := getattr(self, field)) <= 1:
                raise ValueError(f"{field} must be between 0 and 1, got {share}")
        if self.max_overlap == 1:
            raise ValueError("max_overlap must be below 1: an object would vanish")
        if self.clutter < 0:
            raise ValueError(f"clutter must be 0 or more marks, got {self.clutter}")
        if not 1 <= self.variants <= 1000:
            raise ValueError(f"variants: 1 to 1000 forms, got {self.variants}")
        self._check_sides()
        self._check_concepts()

    def _check_sides(self) -> None:
        thin = set(self.styles) & set(SHARE_ALIKE_STYLES)
        needed = SMALLEST_OUTLINE if thin else SMALLEST_SIDE
        several, alone = self.objects[1] > 1, self.objects[0] == 1
        for field, used in (("side", several), ("alone_side", alone)):
            low, high = getattr(self, field)
            if not 0 < low <= high <= 1:
                raise ValueError(
                    f"{field} must be 0 < smallest <= largest <= 1, got {(low, high)}"
                )
            if used and (smallest := round(low * self.size)) < needed:
                raise ValueError(
                    f"{field}: {low} of {self.size} pixels is {smallest},"
                    f" the thinnest drawing needs {needed}"
                )
        room = self.size // grid_side(self.objects[1])
        if several and (smallest := round(self.side[0] * self.size)) > room:
            raise ValueError(
                f"{self.objects[1]} objects of {smallest} pixels may not fit into"
                f" {self.size}: at most {room} each"
            )

    def _check_concepts(self) -> None:
        if not drawn_concepts(self.styles, self.concepts):
            raise ValueError(f"no artist of {self.styles} drew any of the concepts")
        if self.pairs != "held-out":
            return
        if self.objects[0] < 2:
            raise ValueError(f"a held-out pair needs 2 objects, got {self.objects}")
        if not held_out_pairs(self.styles, self.concepts):
            raise ValueError(
                f"no pair of these {len(self.concepts)} concepts is held out"
            )


def known_names(
    field: str, wanted: str | Sequence[str], known: Sequence[str]
) -> tuple[str, ...]:
    """Check names: at least one, each known, none twice."""
    wanted = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    if not wanted:
        raise ValueError(f"{field} must name at least one of {len(known)}, got none")
    exists = set(known)
    for name in wanted:
        if name not in exists:
            raise unknown(field.removesuffix("s"), name, known)
    if len(set(wanted)) < len(wanted):
        twice = next(name for name in wanted if wanted.count(name) > 1)
        raise ValueError(f"{field.removesuffix('s')} {twice!r} is named twice")
    return wanted
