"""What stands in PaliGemma's prompts and answers: captions, boxes, masks.

Axes: R pixels a side.
"""

import numpy as np
from jaxtyping import Float
from PIL import Image

from pgcore.lab import _english as english
from pgcore.lab._near import unknown
from pgcore.lab.emoji import names
from pgcore.lab.scenes import Box, Scene, SceneObject

CAPTION_LANGUAGES = ("en", "de", "fr", "es")
MASK_SIDE = 64  # pixels a side of the mask that becomes <seg> tokens


def require_things(scene: Scene) -> None:
    """Raise ValueError for a scene without objects: no language has a word for it."""
    if not scene.objects:
        raise ValueError("scene: expected at least one object, found none")


def caption(scene: Scene, language: str = "en") -> str:
    """Name what is in a scene: each concept once, in the order of ``scene.objects``.

    English has articles, plurals and numbers in words: "a cat and two red apples". The
    other languages have a form that is right without them: "Katze und 2 × roter Apfel".

    Raises:
        ValueError: for a language that is not in CAPTION_LANGUAGES, and for a scene
            without objects.
    """
    require_things(scene)
    if language not in CAPTION_LANGUAGES:
        raise unknown("caption language", language, CAPTION_LANGUAGES)
    numbers = {name: len(found) for name, found in by_concept(scene).items()}
    if language == "en":
        parts = [english.counted(*item) for item in numbers.items()]
    else:
        parts = [
            name if number == 1 else f"{number} × {name}"
            for name, number in zip(
                names(language, tuple(numbers)), numbers.values(), strict=True
            )
        ]
    *most, last = parts
    return f"{', '.join(most)} {_and(last, language)} {last}" if most else last


def loc_tokens(box: Box, size: int) -> str:
    """Write a box of a picture with `size` pixels a side as four <loc> tokens.

    The token of an edge at p pixels is round(1023 p / size): decoded as token / 1023,
    it errs by at most 0.5 / 1023 of the side. Half a token rounds to the even one.

    Raises:
        ValueError: if the box is empty or leaves the picture.
    """
    top, left, bottom, right = box
    if not (0 <= top < bottom <= size and 0 <= left < right <= size):
        raise ValueError(f"a box must be within 0..{size} and not empty, got {box}")
    return "".join(f"<loc{round(1023 * edge / size):04d}>" for edge in box)


def box_mask(thing: SceneObject) -> Float[np.ndarray, "64 64"]:
    """Cut an object's mask to its box and resize it to 64 x 64: 0 outside, 1 inside.

    Bilinear, antialiased.
    """
    top, left, bottom, right = thing.box
    part = thing.mask[top:bottom, left:right].astype(np.uint8) * 255
    side = (MASK_SIDE, MASK_SIDE)
    small = Image.fromarray(part).resize(side, Image.Resampling.BILINEAR)
    return np.asarray(small, np.float32) / 255


def by_concept(scene: Scene) -> dict[str, list[SceneObject]]:
    """Gather the objects of each concept; both stay in the scene's order."""
    found: dict[str, list[SceneObject]] = {}
    for thing in scene.objects:
        found.setdefault(thing.concept, []).append(thing)
    return found


def _and(following: str, language: str) -> str:
    """Say "and"; Spanish y becomes e before the sound of i."""
    word = following.lower()
    sounds_like_i = word.startswith(("i", "í", "hi")) and not word.startswith("hie")
    spanish = "e" if sounds_like_i else "y"
    return {"en": "and", "de": "und", "fr": "et", "es": spanish}[language]
