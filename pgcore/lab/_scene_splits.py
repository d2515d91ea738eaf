"""Which scenes train, which choose between models, and which test."""

import dataclasses

from pgcore.lab._compose import is_held_out
from pgcore.lab._near import unknown
from pgcore.lab._scene_settings import SceneSettings, known_names
from pgcore.lab.emoji import (
    CONCEPTS,
    TEST_STYLE,
    TRAIN_STYLES,
    UNSEEN_CONCEPTS,
    VALIDATION_STYLE,
)

SPLITS = (
    "train",
    "validation",  # an artist for choosing between models
    "test-scenes",  # known artists and concepts, scenes never seen
    "test-artist",  # the artist that no weight has seen
    "test-concepts",  # things that no training scene shows
    "test-composition",  # two things that no training scene shows together
)

_OTHER_ARTIST = {"validation": VALIDATION_STYLE, "test-artist": TEST_STYLE}
_OTHER_PAIRS = {"test-concepts": "any", "test-composition": "held-out"}


def split(
    name: str, settings: SceneSettings | None = None, seed: int = 0
) -> tuple[SceneSettings, int]:
    """Turn settings into those of one split, and a seed into that of its own stream.

    Use ``compose_batch(*split("train"), start, count)``. No training scene shows the
    test or the validation artist, an unseen concept or a held-out pair, and no two
    splits share random numbers.

    Args:
        name: of SPLITS.
        settings: size, number of objects and all else that no split fixes; None is
            the default. Artists and concepts are cut down to those of the split.
        seed: below 2**64.

    Raises:
        ValueError: for an unknown split, a seed out of range, and settings of which
            the split may show nothing.
    """
    if name not in SPLITS:
        raise unknown("split", name, SPLITS)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be 0 <= seed < 2**64, got {seed}")
    settings = settings or SceneSettings()
    styles = _styles(name, settings)
    concepts = _concepts(name, settings)
    pairs = _OTHER_PAIRS.get(name, "seen")
    least = 2 if pairs == "held-out" else 1
    fewest, most = (max(least, number) for number in settings.objects)
    settings = dataclasses.replace(
        settings,
        styles=styles,
        concepts=concepts,
        pairs=pairs,
        objects=(fewest, most),
    )
    return settings, (SPLITS.index(name) << 64) + seed


def _styles(name: str, settings: SceneSettings) -> tuple[str, ...]:
    if name in _OTHER_ARTIST:
        return (_OTHER_ARTIST[name],)
    styles = tuple(style for style in settings.styles if style in TRAIN_STYLES)
    if not styles:
        raise ValueError(
            f"split {name!r} may show none of the styles {settings.styles}"
        )
    return styles


def _concepts(name: str, settings: SceneSettings) -> tuple[str, ...]:
    unseen = name == "test-concepts"
    concepts = tuple(
        concept
        for concept in settings.concepts
        if (concept in UNSEEN_CONCEPTS) == unseen
    )
    if not concepts:
        raise ValueError(
            f"split {name!r} may show none of these {len(settings.concepts)} concepts"
        )
    return concepts


def held_out(one: str, other: str) -> bool:
    """Tell whether two concepts never meet in training scenes, in either order.

    One pair in ten, by a hash of the two code points.

    Raises:
        ValueError: for an unknown concept.
    """
    for concept in (one, other):
        known_names("concepts", (concept,), CONCEPTS)
    return one != other and is_held_out(one, other)
