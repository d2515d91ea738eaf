"""Masks that the mask codec learns from, and those that it is measured on.

Axes: B masks.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

from pgcore.grounding import mask_iou, paste_mask
from pgcore.lab.emoji import load_emoji
from pgcore.lab.scene_language import MASK_SIDE, box_mask
from pgcore.lab.scenes import Scene, SceneSettings, compose_batch, split
from pgcore.mask_codec import MaskCodec

TURN, SHEAR, STRETCH = 0.5, 0.3, 0.25  # most: radians, share of a side, log of a factor


def scenes_of(name: str, size: int, count: int) -> tuple[Scene, ...]:
    """Draw scenes of one split at one size."""
    return compose_batch(*split(name, SceneSettings(size=size), seed=size), 0, count)


def training_masks(
    sizes: tuple[int, ...], count: int, changed: int, seed: int
) -> UInt8[Tensor, "B 64 64"]:
    """Masks of `count` training scenes a size, as they are and `changed` times warped.

    Scenes show train artists and seen concepts alone, some things slightly hidden.
    """
    rng, masks = np.random.default_rng(seed), []
    for size in sizes:
        for scene in scenes_of("train", size, count):
            for thing in scene.objects:
                top, left, bottom, right = thing.box
                part = thing.mask[top:bottom, left:right]
                masks.append(_resized(part))
                masks += [_resized(_warped(part, rng)) for _ in range(changed)]
    return torch.from_numpy(np.stack(masks))


def sprite_masks(style: str) -> Float[Tensor, "B 64 64"]:
    """Masks of all that an artist drew, alone and whole, in [0, 1]."""
    alpha = load_emoji(style).images[:, 3].numpy()
    masks = [_resized(_cut(picture > 127.5 / 255)) for picture in alpha]
    return torch.from_numpy(np.stack(masks)).float() / 255


@torch.no_grad()
def measure_sprites(codec: MaskCodec, masks: Float[Tensor, "B 64 64"]) -> dict:
    """Mean IoU of masks with what 16 codes keep of them; how many codes are used."""
    codes = codec.encode(masks)
    pairs = zip(codec.decode(codes).numpy() > 0.5, masks.numpy() > 0.5, strict=True)
    ious = [mask_iou(*pair) for pair in pairs]
    return {"iou": sum(ious) / len(ious), "codes": len(codes.unique())}


@torch.no_grad()
def measure_scenes(codec: MaskCodec, scenes: tuple[Scene, ...]) -> float:
    """Mean IoU in the scenes themselves: each mask coded, and laid into its box."""
    things = [(thing, scene) for scene in scenes for thing in scene.objects]
    masks = torch.from_numpy(np.stack([box_mask(thing) for thing, _ in things]))
    ious = []
    for mask, (thing, scene) in zip(codec(masks), things, strict=True):
        size = scene.settings.size
        box = tuple(edge / size for edge in thing.box)
        ious.append(mask_iou(paste_mask(mask, box, size, size), thing.mask))
    return sum(ious) / len(ious)


def _warped(
    mask: Bool[np.ndarray, "height width"], rng: np.random.Generator
) -> Bool[np.ndarray, "tall wide"]:
    """Mirror every other mask; turn, shear and stretch each a little; cut it anew."""
    turn, shear = rng.uniform(-TURN, TURN), rng.uniform(-SHEAR, SHEAR)
    stretch = np.exp(rng.uniform(-STRETCH, STRETCH))
    picture = Image.fromarray(mask[:, :: rng.choice((-1, 1))].astype(np.uint8) * 255)
    side = 2 * max(mask.shape)  # a frame that nothing leaves
    row = np.cos(turn) * stretch, -np.sin(turn) * stretch + shear
    column = np.sin(turn) / stretch, np.cos(turn) / stretch
    x = picture.width / 2 - sum(row) * side / 2
    y = picture.height / 2 - sum(column) * side / 2
    moved = picture.transform(
        (side, side),
        Image.Transform.AFFINE,
        (*row, x, *column, y),
        resample=Image.Resampling.BILINEAR,
    )
    warped = np.asarray(moved) >= 128
    return _cut(warped) if warped.any() else mask


def _cut(mask: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "tall wide"]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _resized(mask: Bool[np.ndarray, "tall wide"]) -> UInt8[np.ndarray, "64 64"]:
    """As scene_language.box_mask does it."""
    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(picture.resize((MASK_SIDE, MASK_SIDE), Image.Resampling.BILINEAR))
