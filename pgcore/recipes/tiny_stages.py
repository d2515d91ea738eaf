"""Stages 2 and 3 in miniature: pictures twice as fine, then one task for itself.

    python -m pgcore.recipes.tiny_stages --out runs/tiny_stages

Stage 1 is the tiny PaliGemma that ships. Stage 2 goes on with it, on the same tasks,
at twice the resolution. Stage 3 takes what comes out and teaches it a question that it
was never asked: which of the things is the largest. Beside stage 2 stands stage 1 gone
on for as many steps; beside stage 3 the same lessons for a model that has only stage 0.
Chapter 16 plots what is left: ``pgcore/assets/stages.json``.

Start it again with the same folder, and it goes on where it was stopped.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait, do not spin

import torch
from torch import Tensor

from pgcore.api import load
from pgcore.files import written_whole
from pgcore.lab.pretrained import load_emoji_siglip
from pgcore.lab.scene_language import EncodeMask, Example
from pgcore.lab.scenes import Scene, SceneSettings, compose, split
from pgcore.lab.scoring import KINDS, Asked, answer, ask, scores
from pgcore.lab.tiny_world import SCENES
from pgcore.paligemma import PaliGemma
from pgcore.processing import Processor
from pgcore.recipes import tiny
from pgcore.recipes.tiny_eval import with_intervals
from pgcore.recipes.tiny_tower import TRAIN, pixels_of
from pgcore.runs import Ahead, RunFolder
from pgcore.training import Part, Trainer, TrainingConfig, cosine, fit, pack
from pgcore.vision import resize_positions

FINE = 2  # times as many pixels a side
SHOWN = ("caption objects", "answers", "count", "detect mIoU", "segment mIoU")
LARGEST = "answer en which thing is the largest?"
CLEARLY = 1.5  # times as many pixels as the next
TRIES = 50  # scenes for each example, of which the first with a clear answer is taken
SEED = 1  # of the scenes: neither those that training looked at nor those of the test


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How stages 2 and 3 are trained, and on how many scenes all are examined.

    length: of a row behind the picture's tokens.
    """

    steps: int = 1000
    pictures: int = 8
    learning_rate: float = 5e-4
    length: int = 96
    lessons: int = 300
    lesson_pictures: int = 8
    lesson_rate: float = 5e-4
    tower_rate: float = 0.2
    examined: int = 200
    seed: int = 0


def at_size(model: PaliGemma, pixels: int) -> PaliGemma:
    """The model for pictures of another size: the same weights, positions resized."""
    vision = dataclasses.replace(model.config.vision, image_size=pixels)
    other = PaliGemma(dataclasses.replace(model.config, vision=vision))
    weights = model.state_dict()
    name = "vision.positions"
    weights[name] = resize_positions(weights[name], vision.grid)
    other.load_state_dict(weights)
    return other


def processor_at(processor: Processor, model: PaliGemma) -> Processor:
    """The processor for the pictures of a model."""
    vision = model.config.vision
    return dataclasses.replace(
        processor, image_size=vision.image_size, num_image_tokens=vision.num_patches
    )


def world(settings: SceneSettings, processor: Processor) -> SceneSettings:
    """Scenes of the same things, elsewhere, in as many pixels as a processor takes."""
    return dataclasses.replace(settings, size=processor.image_size)


def mixture_at(
    recipe: Recipe, processor: Processor, codes: EncodeMask, step: int
) -> dict[str, Tensor]:
    """What a step of stage 2 sees: as in stage 1, after its first steps."""
    settings = world(TRAIN, processor)
    _, stream = split("train", SCENES, recipe.seed + 2)
    first = step * recipe.pictures
    scenes = [compose(settings, stream, first + n) for n in range(recipe.pictures)]
    asked = tiny.asked_about(scenes, tiny.ASKED, tiny.KINDS, recipe.seed, codes)
    pixels = pixels_of(scenes, recipe.seed, step)
    length = processor.num_image_tokens + recipe.length
    return pack(processor, pixels, asked, length)


def lesson_at(recipe: Recipe, processor: Processor, step: int) -> dict[str, Tensor]:
    """What a step of stage 3 sees: pictures, and one question about each."""
    settings = world(TRAIN, processor)
    _, stream = split("train", SCENES, recipe.seed + 3)
    first = step * recipe.lesson_pictures * TRIES
    starts = range(first, first + recipe.lesson_pictures * TRIES, TRIES)
    scenes = [unequal(settings, stream, start) for start in starts]
    asked = [[(LARGEST, largest(scene) or "")] for scene in scenes]
    pixels = pixels_of(scenes, recipe.seed, step)
    length = processor.num_image_tokens + recipe.length
    return tiny.read_alone(pack(processor, pixels, asked, length))


def largest(scene: Scene) -> str | None:
    """The concept of the largest thing; None if the next one comes close."""
    things = sorted(scene.objects, key=lambda one: one.mask.sum())
    if len(things) < 2 or things[-1].mask.sum() < CLEARLY * things[-2].mask.sum():
        return None
    return things[-1].concept


def unequal(settings: SceneSettings, stream: int, start: int) -> Scene:
    """The first scene, from ``start`` on, in which one thing is clearly the largest."""
    for index in range(start, start + TRIES):
        if largest(scene := compose(settings, stream, index)) is not None:
            return scene
    raise ValueError(f"{TRIES} scenes from {start} on: none has a largest thing")


def examined(model: PaliGemma, processor: Processor, recipe: Recipe) -> dict:
    """Each figure on scenes of the validation artist, as [figure, low, high]."""
    codes, model = tiny.Codes(), model.eval()
    settings, stream = split("validation", world(SCENES, processor), SEED)
    scenes = [compose(settings, stream, n) for n in range(recipe.examined)]
    found = scores(ask(model, processor, scenes, KINDS, 32), scenes, codes.codec)
    found = {name: found[name] for name in SHOWN}
    starts = range(recipe.examined, recipe.examined * (1 + TRIES), TRIES)
    scenes = [unequal(settings, stream, start) for start in starts]
    asked = ask_largest(model, processor, scenes)
    found["largest"] = [[one.answer == one.example.answer] for one in asked]
    return with_intervals(found)


def ask_largest(
    model: PaliGemma, processor: Processor, scenes: Sequence[Scene], batch: int = 32
) -> list[Asked]:
    """Put the question of stage 3."""
    todo = [
        (place, Example("largest", LARGEST, largest(scene), ()))
        for place, scene in enumerate(scenes)
    ]
    parts = [todo[start : start + batch] for start in range(0, len(todo), batch)]
    return [one for part in parts for one in answer(model, processor, scenes, part)]


def go_on(
    model: PaliGemma,
    batch_at: Callable[[int], dict[str, Tensor]],
    steps: int,
    rate: float,
    recipe: Recipe,
    out: Path,
) -> None:
    """Train a model for some more steps, in a folder of its own.

    Its state belongs to this model: started with another, the run is refused.
    """
    start = hashlib.sha256()
    for weight in model.state_dict().values():
        start.update(weight.detach().cpu().numpy().tobytes())
    config = TrainingConfig(
        steps=steps,
        learning_rate=rate,
        schedule=functools.partial(cosine, steps=steps, warmup=steps // 10),
        parts=(Part(prefix="vision.", rate=recipe.tower_rate),),
        weight_decay=0.05,
        bfloat16=True,
    )
    name = f"{out.name} of {start.hexdigest()[:12]}: {recipe}"
    trainer = Trainer(model, config, Ahead(batch_at, steps), tiny.loss_of, name)
    fit(trainer, RunFolder(out), every=max(1, steps // 6))


def run(recipe: Recipe, out: Path, device: str) -> list[dict]:
    """All stages, one after the other; what each model can do."""
    codes = tiny.Codes()
    shipped, processor = load("tiny", device=device, dtype="float32")
    fine = at_size(shipped, FINE * shipped.config.vision.image_size)
    fine_processor = processor_at(processor, fine)
    results: list[dict] = []

    def stage(name: str, model: PaliGemma, own: Processor, train: Callable | None):
        print(name, file=sys.stderr, flush=True)
        model.to(device)
        if train is not None:
            train(model, own, out / name.replace(" ", "_"))
        figures = examined(model, own, recipe)
        pixels = own.image_size
        results.append({"name": name, "pixels": pixels, "figures": figures})
        print(f"  {figures}", file=sys.stderr, flush=True)

    def mixture(model: PaliGemma, own: Processor, folder: Path) -> None:
        batch_at = functools.partial(mixture_at, recipe, own, codes)
        go_on(model, batch_at, recipe.steps, recipe.learning_rate, recipe, folder)

    def lessons(model: PaliGemma, own: Processor, folder: Path) -> None:
        batch_at = functools.partial(lesson_at, recipe, own)
        go_on(model, batch_at, recipe.lessons, recipe.lesson_rate, recipe, folder)

    stage("stage 1", shipped, processor, None)
    stage("stage 1 enlarged", fine, fine_processor, None)
    stage("stage 2", fine, fine_processor, mixture)
    stage("stage 3", fine, fine_processor, lessons)
    stage("stage 1 gone on", shipped, processor, mixture)
    tower = load_emoji_siglip()[0].vision
    start = tiny.build(tiny.Recipe(seed=recipe.seed), processor, tower)
    start = at_size(start, fine.config.vision.image_size)
    stage("stage 3 after stage 0", start, fine_processor, lessons)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages, and write their figures."""
    parser = argparse.ArgumentParser(description="Stages 2 and 3 of the tiny model.")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny_stages"))
    for name in ("steps", "lessons", "examined", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Recipe, name))
    options = vars(parser.parse_args(arguments))
    out, recipe = options.pop("out"), Recipe(**options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = {"recipe": dataclasses.asdict(recipe), "stages": run(recipe, out, device)}
    with written_whole(out / "stages.json") as path:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf8")
    print(f"written: {out / 'stages.json'}", file=sys.stderr)


if __name__ == "__main__":
    main()
