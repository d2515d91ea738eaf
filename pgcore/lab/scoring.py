"""How well a model answers about scenes: every figure with what it was made of.

A scene gives one value or several for each figure, so that an interval can be drawn
from the scenes (bootstrap).

Axes: R pixels a side.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pgcore.grounding import (
    Found,
    average_precision,
    box_iou,
    mask_iou,
    parse,
    paste_mask,
)
from pgcore.lab import _english as english
from pgcore.lab.scene_language import Example, all_examples
from pgcore.lab.scenes import Scene, SceneObject

KINDS = ("caption", "count", "presence", "relation", "detect", "segment")
MOST = 4  # of one concept that a caption may count
FIGURES = (
    "caption objects",  # the set of objects that is there; one may be named twice
    "caption exact",  # the caption word for word
    "answers",  # presence and relation
    "count",
    "detect AP50",
    "detect mIoU",
    "segment mIoU",
)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question about a scene and what the model wrote.

    Attributes:
        scene: its place among the scenes.
        example: the question and the right answer.
        answer: the text.
        probabilities: of its tokens.
        tokens: the text of each.
    """

    scene: int
    example: Example
    answer: str
    probabilities: Sequence[float]
    tokens: Sequence[str]


def questions(scene: Scene, kinds: Sequence[str]) -> list[Example]:
    """What is asked: an English caption, and all else about each concept alone."""
    examples = all_examples(scene, kinds, languages=("en",))
    return [e for e in examples if e.kind != "detect" or _asks_for_what_is_there(e)]


def _asks_for_what_is_there(example: Example) -> bool:
    return " ; " not in example.prompt and bool(example.objects)


def ask(
    model: Any,
    processor: Any,
    scenes: Sequence[Scene],
    kinds: Sequence[str],
    batch: int = 64,
) -> list[Asked]:
    """Put all questions to a model, greedily; like kinds together, for speed."""
    todo = [
        (place, example)
        for kind in kinds
        for place, scene in enumerate(scenes)
        for example in questions(scene, (kind,))
    ]
    asked = []
    for start in range(0, len(todo), batch):
        asked += answer(model, processor, scenes, todo[start : start + batch])
    return asked


def answer(
    model: Any,
    processor: Any,
    scenes: Sequence[Scene],
    todo: Sequence[tuple[int, Example]],
) -> list[Asked]:
    """Put questions to a model, all at once; each with the place of its scene."""
    from pgcore.api import generate

    images = [Image.fromarray(scenes[place].image) for place, _ in todo]
    prompts = [example.prompt for _, example in todo]
    answers = generate(model, processor, images, prompts, probabilities=True)
    asked = []
    for (place, example), one in zip(todo, answers, strict=True):
        tokens = [processor.tokenizer.id_to_token(i) for i in one.tokens]
        asked.append(Asked(place, example, one.text, one.probabilities, tokens))
    return asked


def named_in(caption: str, concepts: Iterable[str]) -> set[str] | None:
    """The concepts that an English caption names; None if a part of it is no name."""
    forms = _forms(tuple(concepts))
    parts = re.split(", | and ", caption)
    names = [forms.get(part) for part in parts]
    return None if None in names else {name for name in names if name is not None}


@functools.lru_cache(maxsize=8)
def _forms(concepts: tuple[str, ...]) -> dict[str, str]:
    """Each way in which a caption may say each concept."""
    return {
        english.counted(name, number): name
        for name in concepts
        for number in range(1, MOST + 1)
    }


def scores(
    asked: Sequence[Asked], scenes: Sequence[Scene], codec: Any
) -> dict[str, list[list[Any]]]:
    """For each figure a list of values for each scene; ``figure`` makes one of them.

    A box or mask that is missing, invalid or under another name has IoU 0.
    """
    found: dict[str, list[list[Any]]] = {name: [[] for _ in scenes] for name in FIGURES}
    for one in asked:
        scene, example = scenes[one.scene], one.example
        add = {name: rows[one.scene] for name, rows in found.items()}
        exact = one.answer == example.answer
        if example.kind == "caption":
            names = named_in(one.answer, scene.settings.concepts)
            add["caption objects"].append(names == {o.concept for o in scene.objects})
            add["caption exact"].append(exact)
        elif example.kind == "count":
            add["count"].append(exact)
        elif example.kind in ("presence", "relation"):
            add["answers"].append(exact)
        elif example.kind == "detect":
            boxes = _detected(one, scene)
            add["detect AP50"].append(boxes)
            add["detect mIoU"] += _matched(np.array(boxes[1]), boxes[2])
        elif example.kind == "segment":
            add["segment mIoU"] += _segmented(one, scene, codec)
    return found


def _detected(one: Asked, scene: Scene) -> tuple[list[float], list[list[float]], int]:
    """Scores of the boxes, their IoU with each true one, and how many are true."""
    shares = [
        share
        for token, share in zip(one.tokens, one.probabilities, strict=True)
        if token.startswith("<loc")
    ]
    truths = one.example.objects
    confidence, ious = [], []
    for thing in parse(one.answer):
        own, shares = np.split(shares, [thing.text.count("<loc")])
        if thing.box is not None:
            confidence.append(float(own.mean()))
            ious.append([_box_iou(thing, truth, scene) for truth in truths])
    return confidence, ious, len(truths)


def _box_iou(thing: Found, truth: SceneObject, scene: Scene) -> float:
    """0 under another name."""
    if thing.box is None or thing.name != truth.concept:
        return 0.0
    return box_iou(thing.box, share_box(truth, scene))


def share_box(thing: SceneObject, scene: Scene) -> tuple[float, ...]:
    """The box of an object in shares of the picture's side."""
    return tuple(edge / scene.settings.size for edge in thing.box)


def _matched(ious: np.ndarray, truths: int) -> list[float]:
    """The IoU of each true thing, best pairs first; 0 for what nothing is left."""
    values = [0.0] * truths
    ious = ious.reshape(-1, truths).copy()
    for _ in range(min(ious.shape)):
        row, column = np.unravel_index(ious.argmax(), ious.shape)
        values[int(column)] = max(0.0, float(ious[row, column]))
        ious[row], ious[:, column] = -1, -1
    return values


def _segmented(one: Asked, scene: Scene, codec: Any) -> list[float]:
    truths, ious = one.example.objects, []
    for thing in parse(one.answer):
        if (mask := _mask(thing, scene, codec)) is not None:
            named = [thing.name == truth.concept for truth in truths]
            shared = [mask_iou(mask, truth.mask) for truth in truths]
            ious.append(np.multiply(named, shared))
    return _matched(np.array(ious), len(truths))


def _mask(thing: Found, scene: Scene, codec: Any) -> np.ndarray | None:
    import torch

    if thing.box is None or thing.codes is None:
        return None
    mask = codec.decode(torch.tensor([thing.codes]))[0]
    return paste_mask(mask, thing.box, scene.settings.size, scene.settings.size)


def figure(name: str, rows: Sequence[Sequence[Any]]) -> float:
    """One figure from the values of some scenes; NaN if they have none."""
    values = [value for row in rows for value in row]
    if name == "detect AP50":
        own, ious, truths = zip(*values, strict=True) if values else ((), (), ())
        return average_precision(own, ious, truths)
    return float(np.mean(values)) if values else float("nan")


def interval(
    name: str, rows: Sequence[Sequence[Any]], draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Between which values 95 % of the figures of redrawn scenes lie (bootstrap)."""
    rng = np.random.default_rng(seed)
    redrawn = [
        figure(name, [rows[i] for i in rng.integers(0, len(rows), len(rows))])
        for _ in range(draws)
    ]
    low, high = np.nanquantile(redrawn, (0.025, 0.975))
    return float(low), float(high)
