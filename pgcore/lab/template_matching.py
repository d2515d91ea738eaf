"""A pipeline without learning: the nearest drawing in each window of a picture.

Every drawing of the training artists is laid on every window of the picture; where its
own pixels differ least, it is said to be there. It has boxes and masks for nothing,
since the drawing brings them along. To compare the tiny PaliGemma with.

Axes: R pixels a side of the picture, s of a window.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pgcore.lab._compose import Drawn, cast
from pgcore.lab.emoji import TRAIN_STYLES
from pgcore.lab.scene_language import EncodeMask, Example, all_examples
from pgcore.lab.scenes import Scene, SceneObject
from pgcore.lab.scoring import Asked
from pgcore.lab.tiny_world import CONCEPTS

SIDES = (24, 32, 40, 48, 64, 84)  # pixels of windows in a picture of 96
STRIDE = 2


@dataclasses.dataclass(frozen=True)
class Match:
    """A drawing at its place: by how much its pixels differ, box and mask."""

    concept: str
    difference: float
    box: tuple[int, int, int, int]
    mask: np.ndarray


def match(scene: Scene, threshold: float, most: int = 6) -> list[Match]:
    """Find drawings, best first, none over another, until they differ too much."""
    picture = torch.from_numpy(scene.image.copy()).permute(2, 0, 1).float() / 255
    size = scene.settings.size
    options = [_differences(picture, side) for side in SIDES if side <= size]
    found: list[Match] = []
    covered = np.zeros((size, size), bool)
    while len(found) < most:
        best = min(options, key=lambda table: table.min().item())
        difference = best.min().item()
        if difference > threshold:
            break
        side = SIDES[next(i for i, table in enumerate(options) if table is best)]
        number, row, column = np.unravel_index(int(best.argmin()), best.shape)
        best[number, row, column] = torch.inf
        drawn = _drawings()[int(number)]
        small = drawn.sprite(side).mask
        top, left = int(row) * STRIDE, int(column) * STRIDE
        mask = np.zeros_like(covered)
        mask[top : top + side, left : left + side] = small
        if (covered & mask).sum() > 0.2 * mask.sum():
            continue
        covered |= mask
        found.append(Match(drawn.concept, difference, _box(mask), mask))
    return found


def as_scene(scene: Scene, found: Sequence[Match]) -> Scene:
    """A scene of what was found, so that it can be asked like any other."""
    ordered = sorted(found, key=lambda one: (one.box[1], one.box[0]))
    segments = np.zeros_like(scene.segments)
    for number, one in enumerate(ordered, start=1):
        segments[one.mask] = number
    objects = [
        SceneObject(one.concept, "", one.box, 1.0, place, segments)
        for place, one in enumerate(ordered)
    ]
    return dataclasses.replace(scene, objects=tuple(objects), segments=segments)


def answers(
    scene: Scene,
    place: int,
    examples: Sequence[Example],
    found: Sequence[Match],
    encode_mask: EncodeMask,
) -> list[Asked]:
    """Answer questions about a scene from what was found in it.

    place: of the scene among others. How sure it is of a box: by how little the
    drawing differs.
    """
    sure = {one.box: 1 - one.difference for one in found}
    known: dict[str, Example] = {}
    if found:
        seen = as_scene(scene, found)
        known = {e.prompt: e for e in all_examples(seen, encode_mask=encode_mask)}
    nothing = {"count": "0", "presence": "no"}
    asked = []
    for example in examples:
        own = known.get(example.prompt)
        text = (own and own.answer) or nothing.get(example.kind, "")
        boxes = [sure[o.box] for o in own.objects] if own and "<loc" in text else []
        shares = [share for share in boxes for _ in range(4)]
        asked.append(Asked(place, example, text, shares, ["<loc"] * len(shares)))
    return asked


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def _drawings() -> Sequence[Drawn]:
    drawings = cast(TRAIN_STYLES, CONCEPTS)
    return [one for concept in CONCEPTS for one in drawings[concept]]


def _differences(
    picture: Float[Tensor, "C R R"], side: int
) -> Float[Tensor, "drawings rows columns"]:
    """How much each drawing leaves unexplained in each window, 0 to 1 and beyond.

    The squared difference of the drawing's own pixels, divided by that of a patch of
    the colour around it. Each is a sum over products, and these are convolutions.
    """
    colours, alphas = _kernels(side)
    three = alphas.expand(-1, 3, -1, -1)
    around = (1 - alphas).clamp(min=0.02)

    def summed(kernels: Tensor, image: Tensor) -> Tensor:
        return F.conv2d(image[None], kernels, stride=STRIDE)[0]

    weights = alphas.sum((1, 2, 3))[:, None, None]
    own = (colours**2 * alphas).sum((1, 2, 3))[:, None, None]
    squares = summed(three, picture**2)
    drawn = squares - 2 * summed(colours * alphas, picture) + own
    flat = squares
    for channel in picture[:, None]:
        back = summed(around, channel) / around.sum((1, 2, 3))[:, None, None]
        flat = flat - 2 * back * summed(alphas, channel) + back**2 * weights
    return drawn / (flat + 0.003 * weights)


_CACHE: dict[int, tuple[Tensor, Tensor]] = {}


def _kernels(side: int) -> tuple[Tensor, Tensor]:
    """Colours [n, 3, s, s] and alpha [n, 1, s, s] of all drawings."""
    if side not in _CACHE:
        sprites = [one.sprite(side) for one in _drawings()]
        alpha = np.stack([255 - one.clear for one in sprites]).astype(np.float32) / 255
        colour = np.stack([one.colour for one in sprites]).astype(np.float32) / 255
        colour = colour / np.maximum(alpha, 1 / 255)
        _CACHE[side] = (
            torch.from_numpy(colour).permute(0, 3, 1, 2).contiguous(),
            torch.from_numpy(alpha).permute(0, 3, 1, 2).contiguous(),
        )
    return _CACHE[side]
