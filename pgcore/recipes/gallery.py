"""The gallery: the best and the worst answers of the tiny model, chosen by a rule.

    python -m pgcore.recipes.gallery --out book

Writes ``gallery.md`` and its pictures, ``figures/gallery_*.png``: of scenes that no
training has seen, by the artists of the training and by one that it never saw. Chosen
by loss, the mean negative log-probability of the right answer's tokens; nobody picks by
hand. The same model gives the same page. ``_gallery_pictures`` draws it and
``_gallery_page`` says what stands on it.
"""

import argparse
import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait, do not spin

import numpy as np
import torch
from PIL import Image

from pgcore.api import find_checkpoint, load
from pgcore.files import written_whole
from pgcore.lab.scene_language import Example, all_examples
from pgcore.lab.scenes import Scene, compose_batch, split
from pgcore.lab.scoring import KINDS, Asked, answer, questions, scores
from pgcore.lab.tiny_world import SCENES
from pgcore.recipes._gallery_page import page
from pgcore.recipes._gallery_pictures import attention_strip, sheet
from pgcore.recipes.tiny import Codes

SPLITS = ("test-scenes", "test-artist")
SEED = 11  # of the scenes: not those of tiny_eval, nor those that training looked at
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Judged:
    """An answer, what it was about, and how far it is from the right one.

    Attributes:
        split: of SPLITS.
        scene: the scene itself.
        asked: the question, the right answer, and the model's.
        loss: mean negative log-probability of the right answer's tokens, nats.
        iou: mean over the right boxes or masks; None for words.
    """

    split: str
    scene: Scene
    asked: Asked
    loss: float
    iou: float | None

    @property
    def is_right(self) -> bool:
        """Word for word; for boxes and masks: they share half of what they cover."""
        if self.iou is not None:
            return self.iou >= 0.5
        return self.asked.answer == self.asked.example.answer


def examples(scene: Scene, kind: str, codes: Codes) -> list[Example]:
    """The questions of one kind, with right answers for masks as well."""
    if kind == "segment":
        asked = all_examples(scene, (kind,), languages=("en",), encode_mask=codes)
        return list(asked)
    return questions(scene, (kind,))


@torch.inference_mode()
def losses(
    model: Any, processor: Any, scenes: Sequence[Scene], asked: Sequence[Asked]
) -> list[float]:
    """Mean negative log-probability of each right answer's tokens."""
    found = []
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        batch = processor(
            [Image.fromarray(scenes[one.scene].image) for one in part],
            [one.example.prompt for one in part],
            [one.example.answer for one in part],
        )
        batch = {
            n: x.to(model.projector.linear.weight.device) for n, x in batch.items()
        }
        labels, logits = batch["labels"][:, 1:], model(**batch).logits
        counts = batch["suffix_mask"][:, 1:]
        each = torch.nn.functional.cross_entropy(
            logits.float(), labels[counts], reduction="none"
        )
        rows = each.split(counts.sum(dim=1).tolist())
        found += [row.mean().item() for row in rows]
    return found


def judge(
    model: Any, processor: Any, name: str, scenes: Sequence[Scene], kind: str
) -> list[Judged]:
    """Ask all questions of one kind about the scenes of one split."""
    codes, asked = Codes(), []
    todo = [
        (place, example)
        for place, scene in enumerate(scenes)
        for example in examples(scene, kind, codes)
    ]
    for start in range(0, len(todo), BATCH):
        asked += answer(model, processor, scenes, todo[start : start + BATCH])
    judged = []
    for one, loss in zip(asked, losses(model, processor, scenes, asked), strict=True):
        scene, iou = scenes[one.scene], None
        if kind in ("detect", "segment"):
            alone = dataclasses.replace(one, scene=0)
            values = scores([alone], [scene], codes.codec)[f"{kind} mIoU"][0]
            iou = float(np.mean(values))
        judged.append(Judged(name, scene, one, loss, iou))
    return judged


def by_loss(judged: Sequence[Judged]) -> list[Judged]:
    """Lowest loss first; of each scene the first that comes, from either end."""
    return sorted(
        judged, key=lambda one: (round(one.loss, 6), one.split, one.scene.index)
    )


def of_different_scenes(judged: Sequence[Judged], number: int) -> list[Judged]:
    """The first so many, at most one of a scene."""
    found: dict[tuple[str, int], Judged] = {}
    for one in judged:
        found.setdefault((one.split, one.scene.index), one)
    return list(found.values())[:number]


def choose(judged: Sequence[Judged]) -> list[Judged]:
    """The 3 best of all, then the 3 worst of each split."""
    chosen = of_different_scenes(by_loss(judged), 3)
    for name in SPLITS:
        own = [one for one in judged if one.split == name]
        chosen += of_different_scenes(by_loss(own)[::-1], 3)
    return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask, choose, draw, write."""
    parser = argparse.ArgumentParser(description="Write the gallery of the tiny model.")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--scenes", type=int, default=200, help="of each split")
    parser.add_argument("--model", default="tiny", help="tiny, or a folder")
    options = parser.parse_args(arguments)
    if options.scenes < 1:
        raise ValueError(f"scenes: expected 1 or more, found {options.scenes}")
    model, processor = load(options.model, dtype="float32")
    weights = find_checkpoint(options.model) / "model.safetensors"
    pictures = options.out / "figures"
    scenes = {
        name: compose_batch(*split(name, SCENES, SEED), 0, options.scenes)
        for name in SPLITS
    }
    judged, chosen = {}, {}
    for kind in KINDS:
        judged[kind] = [
            one
            for name in SPLITS
            for one in judge(model, processor, name, scenes[name], kind)
        ]
        chosen[kind] = choose(judged[kind])
        save(sheet(chosen[kind]), pictures / f"gallery_{kind}.png")
    ranked = by_loss(judged["caption"])
    looked = {"best": ranked[0], "worst": ranked[-1]}
    for name, one in looked.items():
        strip = attention_strip(model, processor, one.scene, one.asked)
        save(strip, pictures / f"gallery_attention_{name}.png")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    with written_whole(options.out / "gallery.md") as path:
        path.write_text(
            page(judged, chosen, looked, digest, options.scenes), encoding="utf8"
        )


def save(image: Image.Image, path: Path) -> None:
    """A PNG with few colours: small, and the same each time."""
    with written_whole(path) as scratch:
        image.quantize(160, dither=Image.Dither.NONE).save(
            scratch, format="PNG", optimize=True
        )


if __name__ == "__main__":
    main()
