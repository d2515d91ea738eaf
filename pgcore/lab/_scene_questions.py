"""The questions of each kind about one scene, each written out when it is called."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from pgcore.lab import _english as english
from pgcore.lab._compose import drawn_concepts, newcomer
from pgcore.lab._draws import Draws
from pgcore.lab._relations import DIRECTIONS, is_clearly, is_possibly
from pgcore.lab._scene_text import box_mask, by_concept, caption, loc_tokens
from pgcore.lab.scenes import Scene, SceneObject

MASK_TOKENS = 16
MASK_CODES = 128

EncodeMask = Callable[[Float[np.ndarray, "64 64"]], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt about a scene and its answer.

    Attributes:
        kind: one of KINDS.
        prompt: such as "detect cat ; red apple", without the newline.
        answer: the text after the newline; None for "segment" without an encoder.
        objects: those that the answer speaks of, in its order; they hold the exact
            boxes and masks. Empty where the answer is that there is none.
    """

    kind: str
    prompt: str
    answer: str | None
    objects: tuple[SceneObject, ...]


Draft = Callable[[], Example]  # written out only when chosen: masks cost time


def absent_concepts(scene: Scene, draws: Draws) -> list[str]:
    """Draw as many concepts as the scene shows that it does not, but could."""
    known = drawn_concepts(scene.settings.styles, scene.settings.concepts)
    present = list(by_concept(scene))
    absent: list[str] = []
    for _ in present:
        new = newcomer(draws, known, [*present, *absent], scene.settings.pairs)
        if new is not None:
            absent.append(new)
    return absent


def captions(scene: Scene, languages: Sequence[str]) -> list[Draft]:
    """caption de -> Katze und 2 × roter Apfel"""
    return [functools.partial(_caption, scene, language) for language in languages]


def _caption(scene: Scene, language: str) -> Example:
    prompt = f"caption {language}"
    return Example("caption", prompt, caption(scene, language), scene.objects)


def counts(scene: Scene, absent: Sequence[str]) -> list[Draft]:
    """answer en how many cats? -> 2; one question has the answer 0."""
    found = by_concept(scene) | {name: [] for name in absent[:1]}
    return [functools.partial(_count, *item) for item in found.items()]


def _count(name: str, things: Sequence[SceneObject]) -> Example:
    prompt = f"answer en how many {english.many(name)}?"
    return Example("count", prompt, str(len(things)), tuple(things))


def presences(scene: Scene, absent: Sequence[str]) -> list[Draft]:
    """answer en is there a dog? -> no; yes as often as no."""
    asked = list(by_concept(scene).items())[: len(absent)]
    asked += [(name, []) for name in absent]
    return [functools.partial(_presence, *item) for item in asked]


def _presence(name: str, things: Sequence[SceneObject]) -> Example:
    prompt = f"answer en {english.is_there(name)}?"
    return Example("presence", prompt, "yes" if things else "no", tuple(things))


def relations(scene: Scene) -> list[Draft]:
    """answer en what is left of the red apple? -> cat

    Asked about a concept that is there once, if one concept alone lies that way: at
    least one of its objects clearly, and no object of another even possibly.
    """
    drafts = []
    for name, (thing, *more) in by_concept(scene).items():
        for direction in DIRECTIONS if not more else ():
            way = [
                other
                for other in scene.objects
                if is_possibly(other.box, direction, thing.box)
            ]
            clear = [
                is_clearly(other.box, direction, thing.box, scene.settings.size)
                for other in way
            ]
            if any(clear) and len({other.concept for other in way}) == 1:
                prompt = f"answer en what is {direction} {english.the(name)}?"
                answer = way[0].concept
                drafts.append(
                    functools.partial(Example, "relation", prompt, answer, tuple(way))
                )
    return drafts


def detections(scene: Scene, absent: Sequence[str], draws: Draws) -> list[Draft]:
    """detect cat ; red apple -> <loc0123>... cat ; <loc0400>... red apple

    Each concept alone, all together in a drawn order, and one beside an absent one,
    which the answer leaves out.
    """
    found = by_concept(scene)
    asked = [[name] for name in found]
    if len(found) > 1:
        asked.append(draws.shuffled(list(found)))
    if absent:
        asked.append(draws.shuffled([draws.pick(list(found)), absent[0]]))
    return [functools.partial(_detect, scene, names) for names in asked]


def _detect(scene: Scene, names: Sequence[str]) -> Example:
    found = by_concept(scene)
    things = tuple(thing for name in names for thing in found.get(name, ()))
    parts = [
        f"{loc_tokens(thing.box, scene.settings.size)} {thing.concept}"
        for thing in things
    ]
    return Example("detect", f"detect {' ; '.join(names)}", " ; ".join(parts), things)


def segmentations(scene: Scene, encode_mask: EncodeMask | None) -> list[Draft]:
    """segment cat -> four <loc> tokens, 16 <seg> tokens, the name; every cat."""
    size = scene.settings.size
    return [
        functools.partial(_segment, name, things, size, encode_mask)
        for name, things in by_concept(scene).items()
    ]


def _segment(
    name: str, things: Sequence[SceneObject], size: int, encode: EncodeMask | None
) -> Example:
    answer = None
    if encode is not None:
        parts = [
            f"{loc_tokens(thing.box, size)}{_seg_tokens(thing, encode)} {name}"
            for thing in things
        ]
        answer = " ; ".join(parts)
    return Example("segment", f"segment {name}", answer, tuple(things))


def _seg_tokens(thing: SceneObject, encode: EncodeMask) -> str:
    codes = [int(code) for code in encode(box_mask(thing))]
    if len(codes) != MASK_TOKENS or not all(0 <= c < MASK_CODES for c in codes):
        raise ValueError(
            f"encode_mask must give {MASK_TOKENS} codes 0..{MASK_CODES - 1},"
            f" got {codes}"
        )
    return "".join(f"<seg{code:03d}>" for code in codes)


def regions(scene: Scene) -> list[Draft]:
    """caption <loc0123><loc0200><loc0500><loc0800> -> cat"""
    size = scene.settings.size
    return [functools.partial(_region, thing, size) for thing in scene.objects]


def _region(thing: SceneObject, size: int) -> Example:
    prompt = f"caption {loc_tokens(thing.box, size)}"
    return Example("region", prompt, thing.concept, (thing,))
