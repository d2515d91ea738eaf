# Generated from chapters/15_boxes_and_masks.ipynb.
# Edit the notebook, then run "make chapters".
"""Wrong twins from chapter 15, Boxes and masks."""

import re

import numpy as np
import torch
from PIL import Image

from pgcore.grounding import Found, box_to_tokens, parse, require_box, tokens_to_box
from pgcore.mask_codec import MaskCodec as MaskCodec
from pgcore.mask_codec import load_mask_codec as load_mask_codec


def mask_over_the_picture(mask, box, height, width):
    """Stretches the mask over the whole picture: it belongs in its box.

    The sixteen words do not say where it lies. Ours, to show that.
    """
    require_box(box)
    small = Image.fromarray(mask.numpy())
    size = width, height
    return np.asarray(small.resize(size, Image.Resampling.BILINEAR)) > 0.5


def x_first(box):
    """Writes left, top, right, bottom, as COCO, Pillow and most others do.

    Both orders are in use, and a user of the other calls one of them
    "unacceptable" (tensorflow/models, issue 9988).
    """
    top, left, bottom, right = box
    return box_to_tokens((left, top, right, bottom))


def rounded_down(box):
    """Cuts down where it should round: up to a whole step off.

    Ours, to show what half a step is worth.
    """
    require_box(box)
    return "".join(f"<loc{int(edge * 1023):04d}>" for edge in box)


def over_1024(tokens):
    """Divides by 1024: boxes creep to the upper left.

    The demo of big-vision/paligemma; roboflow/supervision, from_paligemma.
    """
    return tuple(int(n) / 1024 for n in re.findall("[0-9]+", tokens))


def pixels_of_the_square(tokens, height, width):
    """Edges in the pixels of the model's square, for the original picture.

    Right for a square picture of 224 pixels alone. Ours, to show why
    shares belong to the original picture.
    """
    return tuple(224 * edge for edge in tokens_to_box(tokens))


def one_word_names(text):
    r"""Takes \w+ for the name: "yellow breast parrot" is "yellow".

    JarvisZhang24/nano-paligemma2, src/detection.py.
    """
    pattern = r"((?:<loc\d{4}>){4})\s*(\w+)"
    return [
        Found(name, tokens_to_box(tokens), None, tokens + " " + name)
        for tokens, name in re.findall(pattern, text)
    ]


def drops_the_invalid(text):
    """Leaves out what it cannot read, so that no mean ever hears of it.

    Most parsers; roboflow/supervision among them.
    """
    return [found for found in parse(text) if not found.problem]


def four_at_a_time(text):
    """Collects all numbers and takes four at a time.

    One edge too few, and all boxes that follow are mixed from two. Ours,
    to show what one broken part does to its neighbours.
    """
    numbers = [int(n) / 1023 for n in re.findall(r"<loc(\d{4})>", text)]
    names = [part.split(">")[-1].strip() for part in text.split(";")]
    edges = iter(numbers)
    boxes = zip(edges, edges, edges, edges, strict=False)
    return [Found(name, box, None, "") for name, box in zip(names, boxes, strict=False)]


def one_pixel_more(one, other):
    """Adds 1 to all lengths: a habit of PASCAL VOC, from whole pixels.

    With edges in shares of the picture nearly all boxes seem to overlap:
    two small ones that do not touch can get 0.5.
    """
    top, left = max(one[0], other[0]), max(one[1], other[1])
    bottom, right = min(one[2], other[2]), min(one[3], other[3])
    shared = max(bottom - top + 1, 0) * max(right - left + 1, 0)
    areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (one, other)]
    return shared / (sum(areas) - shared)


def a_truth_found_twice(scores, ious, truths, threshold=0.5):
    """Lets a truth count for each prediction near it: repeating pays.

    Ours, to show why a truth is taken once.
    """
    pairs = sorted(
        (
            (score, max(row, default=0.0) >= threshold)
            for own, rows in zip(scores, ious, strict=True)
            for score, row in zip(own, rows, strict=True)
        ),
        key=lambda pair: -pair[0],
    )
    found, total = 0, 0.0
    for rank, (_, hit) in enumerate(pairs, start=1):
        found += hit
        total += hit * found / rank
    return total / sum(truths)


def column_by_column(codec, codes):
    """Lays the sixteen words out in columns: the mask is mirrored.

    Ours, to show that their order is that of reading.
    """
    grid = codes.unflatten(1, (4, 4)).transpose(1, 2)
    return codec.decode(grid.flatten(1))


def inside_above_zero(codec, codes):
    """Takes PaliGemma's threshold, 0 in [-1, 1], for numbers in [0, 1]."""
    return (codec.decode(codes) > 0).float()


def corners_of_a_polygon(codec, codes):
    """Reads sixteen words as eight points: that is Florence-2's way.

    ComfyUI_VLM_nodes, issue 142 (since fixed); google-research/big_vision,
    issue 136.
    """
    from PIL import ImageDraw

    masks = []
    for row in codes.tolist():
        canvas = Image.new("L", (64, 64))
        pairs = zip(row[::2], row[1::2], strict=True)
        points = [(x / 2, y / 2) for x, y in pairs]
        ImageDraw.Draw(canvas).polygon(points, fill=255)
        masks.append(torch.from_numpy(np.asarray(canvas) / 255).float())
    return torch.stack(masks)


def no_way_back(latents, codebook):
    """Hands on the codes themselves: the encoder gets no gradient.

    Ours, to show what the last line of quantize is for.
    """
    codes = (codebook.square().sum(1) - 2 * latents @ codebook.T).argmin(-1)
    return codebook[codes], codes


WRITERS = (x_first, rounded_down)
READERS = (over_1024,)
PARSERS = (one_word_names, drops_the_invalid, four_at_a_time)
DECODERS = (column_by_column, inside_above_zero, corners_of_a_polygon)
