# Generated from chapters/15_boxes_and_masks.ipynb.
# Edit the notebook, then run "make chapters".
"""Boxes and masks: what PaliGemma's <loc> and <seg> tokens say.

A box is four words, a mask sixteen more (Beyer et al., 2024, section
3.2.5). Boxes are (top, left, bottom, right) in shares of the picture's
sides, 0 to 1.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from pgcore.drawing import annotate, enlarged
from pgcore.files import shown
from pgcore.mask_codec import MaskCodec as MaskCodec
from pgcore.mask_codec import load_mask_codec as load_mask_codec

Box = tuple[float, float, float, float]
LAST_BIN = 1023


def require_box(box: Sequence[float]) -> None:
    """Raise ValueError unless 0 <= top < bottom <= 1, and so sideways.

    Built in chapter 15, Boxes and masks.
    """
    if len(box) == 4:
        top, left, bottom, right = box
        if 0 <= top < bottom <= 1 and 0 <= left < right <= 1:
            return
    raise ValueError(
        "box: expected top < bottom and left < right, from 0 to 1, found "
        f"({', '.join(f'{edge:.4g}' for edge in box)})"
    )


def box_to_tokens(box: Sequence[float]) -> str:
    """Write a box as "<loc0123>...": top, left, bottom, right.

    Each edge errs by at most 0.5 / 1023 of the side. Raises ValueError
    for what is no box, and for one too thin to be said.
    Source: big_vision, pp/proj/paligemma/segmentation.py.

    Built in chapter 15, Boxes and masks.
    """
    require_box(box)
    bins = [round(float(edge) * LAST_BIN) for edge in box]
    if bins[0] == bins[2] or bins[1] == bins[3]:
        raise ValueError(f"box: expected two words a side, found {bins}: too thin")
    return "".join(f"<loc{number:04d}>" for number in bins)


def tokens_to_box(tokens: str) -> Box:
    """Read the box that four tokens say: each number / 1023.

    Raises ValueError for other than four tokens and for what is no box.

    Built in chapter 15, Boxes and masks.
    """
    if not re.fullmatch("(<loc[0-9]{4}>){4}", tokens):
        raise ValueError(f"box: expected four <loc> tokens, found {shown(tokens)}")
    numbers = re.findall("[0-9]+", tokens)
    top, left, bottom, right = (int(n) / LAST_BIN for n in numbers)
    require_box((top, left, bottom, right))
    return top, left, bottom, right


@dataclass(frozen=True)
class Found:
    """One thing that an answer speaks of.

    Built in chapter 15, Boxes and masks.
    """

    name: str
    box: Box | None  # None: the prediction is invalid
    codes: tuple[int, ...] | None  # of its mask: 16 numbers below 128
    text: str  # as it was written
    problem: str = ""  # why it is invalid


_PART = re.compile(r"((?:\s*<loc[0-9]{4}>)*)((?:\s*<seg[0-9]{3}>)*)(.*)", re.DOTALL)
# At each ";", and where a box begins behind a name.
_BETWEEN = re.compile(r";|(?<=[^\s>])\s*(?=<loc[0-9]{4}>)")


def parse(text: str, named: bool = True) -> list[Found]:
    """Read the answer to "detect ..." or "segment ...", never raising.

    Nothing is left out: what has no box, no mask of 16 codes or no name
    is invalid, has a problem and counts as IoU 0, as for big_vision's
    evaluator. That one wants a mask and no name: say ``named=False`` for
    answers without names.

    Built in chapter 15, Boxes and masks.
    """
    parts = [part.strip() for part in _BETWEEN.split(text)]
    return [_found(part, named) for part in parts if part]


def _found(text: str, named: bool) -> Found:
    match = _PART.fullmatch(text)
    assert match is not None  # three parts that may be empty
    locs, segs, rest = match.groups()
    name = " ".join(rest.split())
    codes = tuple(int(code) for code in re.findall("[0-9]+", segs)) or None
    box, problem = None, ""
    try:
        box = tokens_to_box("".join(locs.split()))
    except ValueError as error:
        problem = str(error)
    if codes and (len(codes) != 16 or max(codes) > 127):
        problem = f"mask: expected 16 codes below 128, found {shown(codes)}"
    elif "<loc" in name or "<seg" in name or (named and not name):
        problem = f"name: expected one, found {shown(name)}"
    if problem:
        return Found(name, None, None, text, problem)
    return Found(name, box, codes, text)


def box_iou(one: Sequence[float] | None, other: Sequence[float] | None) -> float:
    """Divide what two boxes share by what they cover; 0 with None.

    Boxes are as ``require_box`` wants them: none is empty.

    Built in chapter 15, Boxes and masks.
    """
    if one is None or other is None:
        return 0.0
    top, left = max(one[0], other[0]), max(one[1], other[1])
    bottom, right = min(one[2], other[2]), min(one[3], other[3])
    shared = max(bottom - top, 0.0) * max(right - left, 0.0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    return shared / (sum(areas) - shared)


def mask_iou(
    one: Bool[np.ndarray, "height width"],
    other: Bool[np.ndarray, "height width"],
) -> float:
    """Divide what two masks share by what they cover; 0 if both are empty.

    Raises ValueError for masks of two sizes.

    Built in chapter 15, Boxes and masks.
    """
    if one.shape != other.shape:
        raise ValueError(
            f"masks: expected one size, found {one.shape} and {other.shape}"
        )
    return float((one & other).sum() / max((one | other).sum(), 1))


def average_precision(
    scores: Sequence[Sequence[float]],
    ious: Sequence[Sequence[Sequence[float]]],
    truths: Sequence[int],
    threshold: float = 0.5,
) -> float:
    """The precision at each true thing that was found, on average; else 0.

    In each picture the predictions, best score first, take the truth they
    overlap most of those left, from the threshold on (as COCO's). Then
    those of all pictures are ranked; equal scores are one step, as
    scikit-learn has it. Nothing is interpolated: COCO's 101 points give
    another number. NaN without truths.
    scores: of each picture's predictions. ious: of each of these, its IoU
    with each truth. truths: how many each picture has.
    Raises ValueError for numbers that do not fit together.

    Built in chapter 15, Boxes and masks.
    """
    hits = []
    for own, rows, count in zip(scores, ious, truths, strict=True):
        if [len(row) for row in rows] != [count] * len(own):
            raise ValueError(
                f"ious: expected {len(own)} rows of {count} truths, found "
                f"{shown([len(row) for row in rows])}"
            )
        left = set(range(count))
        for row in sorted(range(len(own)), key=lambda row: -own[row]):
            best = max(left, key=lambda i: rows[row][i], default=None)
            hit = best is not None and rows[row][best] >= threshold
            if hit:
                left.discard(best)
            hits.append((own[row], hit))
    hits.sort(key=lambda one: -one[0])
    total, found, before = 0.0, 0, 0
    for rank, (score, hit) in enumerate(hits, start=1):
        found += hit
        if rank == len(hits) or hits[rank][0] != score:
            total += (found - before) * found / rank
            before = found
    return total / sum(truths) if sum(truths) else float("nan")


def paste_mask(
    mask: Float[Tensor, "64 64"],
    box: Sequence[float],
    height: int,
    width: int,
) -> Bool[np.ndarray, "height width"]:
    """Lay a mask into its box in a picture: True inside.

    Bilinear, then above 0.5. The box's edges are rounded to pixels; a box
    that vanishes leaves nothing. Raises ValueError for what is no box.
    Source: big_vision, evaluators/proj/paligemma/transfers/segmentation.py,
    which cuts edges down.

    Built in chapter 15, Boxes and masks.
    """
    require_box(box)
    lengths = height, width, height, width
    top, left, bottom, right = (
        round(float(share) * length) for share, length in zip(box, lengths, strict=True)
    )
    inside = np.zeros((height, width), dtype=bool)
    if top < bottom and left < right:
        small = Image.fromarray(mask.detach().cpu().float().numpy())
        size = right - left, bottom - top
        part = np.asarray(small.resize(size, Image.Resampling.BILINEAR))
        inside[top:bottom, left:right] = part > 0.5
    return inside


def draw(
    image: Image.Image,
    found: Sequence[Found],
    codec: MaskCodec | None = None,
) -> Image.Image:
    """Draw the valid ones on a copy of the picture: boxes and names.

    With a codec, masks as well. Small pictures are enlarged.

    Built in chapter 15, Boxes and masks.
    """
    canvas, things = enlarged(image), []
    for one in found:
        inside = None
        if one.box is None:
            continue
        if one.codes is not None and codec is not None:
            device = codec.codebook.device
            codes = torch.tensor([one.codes], device=device)
            mask = codec.decode(codes)[0]
            inside = paste_mask(mask, one.box, canvas.height, canvas.width)
        things.append((one.name, one.box, inside))
    annotate(canvas, things)
    return canvas


__all__ = [
    "Box",
    "Found",
    "LAST_BIN",
    "average_precision",
    "box_iou",
    "box_to_tokens",
    "draw",
    "mask_iou",
    "parse",
    "paste_mask",
    "require_box",
    "tokens_to_box",
]
