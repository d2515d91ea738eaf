"""The scenes of the ablations: few things, large, and boxes that end at patches."""

import dataclasses

from pgcore.lab.scenes import Scene, SceneSettings, compose, split
from pgcore.vision import TINY

CONCEPTS = (
    *("cat", "red apple", "guitar", "rocket"),
    *("panda", "lemon", "sunflower", "basketball"),
)
SCENES = SceneSettings(
    concepts=CONCEPTS,
    objects=(1, 2),
    side=(0.35, 0.5),
    alone_side=(0.4, 0.8),
    backgrounds=("plain",),
    clutter=0,
)
TRAIN = dataclasses.replace(SCENES, variants=64)


def drawn(
    name: str, settings: SceneSettings, seed: int, start: int, count: int
) -> list[Scene]:
    """Scenes of a split whose boxes reach to the edges of the patches they touch."""
    settings, stream = split(name, settings, seed)
    return [on_patches(compose(settings, stream, start + n)) for n in range(count)]


def on_patches(scene: Scene) -> Scene:
    """The scene with larger boxes, which end where patches do."""
    side, things = TINY.patch_size, []
    for thing in scene.objects:
        top, left, bottom, right = thing.box
        patches = top // side, left // side, -(-bottom // side), -(-right // side)
        box = tuple(side * edge for edge in patches)
        things.append(dataclasses.replace(thing, box=box))
    return dataclasses.replace(scene, objects=tuple(things))
