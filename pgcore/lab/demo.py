"""A scene, everything that can be asked about it, and one picture of the answers."""

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from pgcore.grounding import draw, load_mask_codec, parse
from pgcore.lab.scene_language import Example, all_examples
from pgcore.lab.scenes import Scene, compose, split
from pgcore.lab.scoring import KINDS, Asked, answer
from pgcore.lab.tiny_world import SCENES, running_example

PANEL, GAP, LINE = 384, 24, 26  # pixels
INK, RIGHT, WRONG, PAPER = "#222222", "#2e7d32", "#7b1fa2", "#ffffff"


def scene_of(seed: int | None) -> Scene:
    """The book's own scene, or one that no training has seen."""
    if seed is None:
        return running_example()
    return compose(*split("test-scenes", SCENES, seed), 0)


def questions(scene: Scene) -> list[Example]:
    """A caption in two languages, and a question or more of each other kind."""
    examples = all_examples(scene, KINDS, languages=("en", "de"))
    names = len({thing.concept for thing in scene.objects})
    detect = [e for e in examples if e.kind == "detect"]
    together = detect[names] if names > 1 else detect[0]
    return [e for e in examples if e.kind != "detect"] + [together]


def answers(model: Any, processor: Any, scene: Scene) -> list[Asked]:
    """What the model says to each question."""
    return answer(model, processor, [scene], [(0, e) for e in questions(scene)])


def is_right(one: Asked) -> bool | None:
    """Whether the text is the right one; None for boxes and masks: look at them."""
    if one.example.kind in ("detect", "segment"):
        return None
    return one.answer == one.example.answer


def picture(scene: Scene, asked: Sequence[Asked]) -> Image.Image:
    """The scene with its boxes, with its masks, and the texts beside them."""
    image = Image.fromarray(scene.image)
    parts = {kind: [a for a in asked if a.example.kind == kind] for kind in KINDS}
    boxes = [thing for one in parts["detect"] for thing in parse(one.answer)]
    masks = [thing for one in parts["segment"] for thing in parse(one.answer)]
    panels = [
        (parts["detect"][0].example.prompt, draw(image, boxes)),
        ("segment, each alone", draw(image, masks, load_mask_codec())),
    ]
    texts = [one for one in asked if is_right(one) is not None]
    height = GAP + LINE + PANEL + GAP
    height = max(height, 2 * GAP + 2 * LINE * len(texts))
    width = 2 * (GAP + PANEL) + GAP + 460
    page = Image.new("RGB", (width, height), PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(16)
    for number, (title, panel) in enumerate(panels):
        left = GAP + number * (PANEL + GAP)
        pen.text((left, GAP - 4), title, fill=INK, font=font)
        page.paste(panel.resize((PANEL, PANEL)), (left, GAP + LINE))
    left = 3 * GAP + 2 * PANEL
    for number, one in enumerate(texts):
        top = GAP - 4 + 2 * LINE * number
        colour = RIGHT if is_right(one) else WRONG
        pen.text((left, top), one.example.prompt, fill=INK, font=font)
        pen.text((left + 16, top + LINE - 4), one.answer, fill=colour, font=font)
    return page
