"""What the gallery draws: sheets of answers, and where the model read.

Axes: P patches, L layers, N heads, T readers, S what is read.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from pgcore.attention import attend, attention_weights
from pgcore.grounding import Found, load_mask_codec, parse, paste_mask
from pgcore.lab.scenes import Scene
from pgcore.lab.scoring import Asked

TILE, GAP, COLUMNS = 192, 12, 3  # pixels, twice the scene's own; pictures in a row
TRUE, SAID, INK, PAPER = "#009E73", "#E69F00", "#222222", "#ffffff"
MOST_TOKENS = 7


def sheet(chosen: Sequence[Any]) -> Image.Image:
    """Pictures with numbers, three in a row; boxes and masks drawn."""
    rows = -(-len(chosen) // COLUMNS)
    size = COLUMNS * (TILE + GAP) + GAP, rows * (TILE + GAP) + GAP
    paper = Image.new("RGB", size, PAPER)
    for number, one in enumerate(chosen):
        row, column = divmod(number, COLUMNS)
        place = GAP + column * (TILE + GAP), GAP + row * (TILE + GAP)
        paper.paste(tile(one.scene, one.asked, number + 1), place)
    return paper


def tile(scene: Scene, asked: Asked, number: int) -> Image.Image:
    """One scene, twice as large, with its number and what was answered about it."""
    image = Image.fromarray(scene.image).resize((TILE, TILE), Image.Resampling.NEAREST)
    if asked.example.kind in ("detect", "segment"):
        found = [thing for thing in parse(asked.answer) if thing.box is not None]
        if asked.example.kind == "segment":
            veil(image, found)
        pen = ImageDraw.Draw(image)
        for thing in asked.example.objects:
            top, left, bottom, right = (2 * edge for edge in thing.box)
            pen.rectangle((left, top, right - 1, bottom - 1), outline="black", width=4)
            pen.rectangle((left, top, right - 1, bottom - 1), outline=TRUE, width=3)
        for thing in found:
            top, left, bottom, right = (round(TILE * edge) for edge in thing.box or ())
            right, bottom = max(left + 1, right - 1), max(top + 1, bottom - 1)
            pen.rectangle((left, top, right, bottom), outline=SAID, width=2)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(16)
    pen.rectangle((0, 0, 20, 20), fill=PAPER)
    pen.text((10, 10), str(number), fill=INK, font=font, anchor="mm")
    return image


def veil(image: Image.Image, found: Sequence[Found]) -> None:
    """Colour the masks that were answered, in place."""
    codec = load_mask_codec()
    for thing in found:
        if thing.codes is None or thing.box is None:
            continue
        mask = codec.decode(torch.tensor([thing.codes]))[0]
        inside = paste_mask(mask, thing.box, TILE, TILE)
        alpha = Image.fromarray(inside.astype(np.uint8) * 150)
        image.paste(Image.new("RGB", image.size, SAID), (0, 0), alpha)


@torch.inference_mode()
def read_weights(model: Any, processor: Any, scene: Scene, asked: Asked) -> Any:
    """For each written token its attention on the patches, [tokens, P], in shares.

    The mean over layers and heads, of a pass over prompt and answer, at the place that
    predicts the token.
    """
    image = Image.fromarray(scene.image)
    batch = processor([image], [asked.example.prompt], [asked.answer])
    noted = []

    def spy(q, k, v, mask, scale):
        noted.append(attention_weights(q, k, mask, scale)[0].mean(dim=0))  # T S
        return attend(q, k, v, mask, scale)

    device = model.projector.linear.weight.device
    given = {n: x.to(device) for n, x in batch.items() if n != "labels"}
    layers = [block.self_attn for block in model.language.layers]
    usual = [layer.attend for layer in layers]
    for layer in layers:
        layer.attend = spy
    try:
        model(**given)
    finally:
        for layer, own in zip(layers, usual, strict=True):
            layer.attend = own
    begin = int(batch["suffix_mask"][0].nonzero()[0])
    patches = model.config.vision.num_patches
    return torch.stack(noted).mean(dim=0)[begin - 1 : -1, :patches].cpu()


def attention_strip(
    model: Any, processor: Any, scene: Scene, asked: Asked
) -> Image.Image:
    """The picture, then for each token of the answer what it read of it: bright."""
    maps = read_weights(model, processor, scene, asked)[:MOST_TOKENS]
    tokens = [processor.tokenizer.encode(asked.answer).tokens, ["<eos>"]]
    names = ["the picture", *(tokens[0] + tokens[1])[: len(maps)]]
    side, columns, head = TILE * 3 // 4, 4, 24
    rows = -(-len(names) // columns)
    size = columns * (side + GAP) + GAP, rows * (side + head + GAP) + GAP
    paper = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(15)
    grid = model.config.vision.grid
    for number, name in enumerate(names):
        row, column = divmod(number, columns)
        left, top = GAP + column * (side + GAP), GAP + row * (side + head + GAP)
        pixels = scene.image.astype(np.float32)
        if number:
            heat = maps[number - 1].view(grid, grid) / maps[number - 1].max()
            cell = scene.settings.size // grid
            light = np.kron(heat.numpy(), np.ones((cell, cell)))[..., None]
            pixels = pixels * (0.15 + 0.85 * light)
        image = Image.fromarray(pixels.round().astype(np.uint8))
        paper.paste(
            image.resize((side, side), Image.Resampling.NEAREST), (left, top + head)
        )
        label = name.replace("▁", " ").strip() or name
        pen.text((left, top + head // 2), label, fill=INK, font=font, anchor="lm")
    return paper
