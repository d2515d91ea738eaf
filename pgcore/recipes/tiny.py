"""The tiny PaliGemma that ships: captions, answers, boxes and masks of emoji.

    python -m pgcore.recipes.tiny --out runs/tiny

Stage 0 is chapter 07's: the image tower of the emoji SigLIP. Then it learns to see
small things, patch by patch: ``pgcore.recipes.tiny_tower``. Then all weights learn, on
questions about scenes. A picture comes with as many as fit into a row; in the last
steps with one, which the picture then reads, as it will when the model is asked.

What step n sees depends on the seed and on n alone: start it again with the same
folder, and it goes on where it was stopped.
"""

import argparse
import dataclasses
import functools
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait, do not spin

import torch
from torch import Tensor

from pgcore.files import make_folder
from pgcore.grounding import load_mask_codec
from pgcore.lab.scene_language import CAPTION_LANGUAGES, choose_examples
from pgcore.lab.scenes import Scene, compose, split
from pgcore.lab.scoring import FIGURES, ask, figure, scores
from pgcore.lab.tiny_world import SCENES
from pgcore.paligemma import TINY, PaliGemma
from pgcore.processing import LOC_TOKENS, Processor, load_processor
from pgcore.recipes import tiny_tower
from pgcore.recipes._starts import neighbours, unseeing_tower
from pgcore.recipes.tiny_tokenizer import FOLDER
from pgcore.recipes.tiny_tower import TRAIN, learning_rate_share, pixels_of
from pgcore.runs import METRICS, Ahead, RunFolder
from pgcore.training import (
    Mixture,
    Part,
    Trainer,
    TrainingConfig,
    batch_loss,
    fit,
    pack,
    packed_loss,
)
from pgcore.vision import VisionTower
from pgcore.weights import save_pretrained

EASY = dataclasses.replace(
    TRAIN, objects=(1, 1), alone_side=(0.5, 1.0), backgrounds=("plain",), clutter=0
)
SOME = dataclasses.replace(TRAIN, objects=(1, 2))
LEVELS = {"easy": EASY, "some": SOME, "all": TRAIN}

# A kind that is named twice is asked twice as often.
EASY_KINDS = ("caption", "caption", "presence", "region", "detect")
KINDS = (
    *("caption",) * 4,
    *("count", "presence", "relation", "region"),
    *("detect",) * 4,
    *("segment",) * 2,
)
STAGES = TOWER, MIXTURE = "tower", "mixture"  # folders of the run
ASKED = 8  # questions to choose from; those that fit are used
EVERY = 500  # steps between looks at the watched scenes, each saved
WATCHED = 32  # scenes of the validation artist


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, on what, and how.

    tower: how its tower is trained first; None for one of random numbers, which then
    learns at the decoder's rate. steps: in all, after that. easy: of these,
    the first, on large single things; then harder scenes come in, until `hard` only
    they are left. alone: the last steps, with one question a row. decay: the last
    steps, over which the learning rate falls to zero.
    """

    tower: tiny_tower.Recipe | None = tiny_tower.Recipe()
    steps: int = 10_000
    easy: int = 300
    hard: int = 1500
    alone: int = 1000
    decay: int = 3000
    pictures: int = 16
    length: int = 160
    alone_length: int = 144
    learning_rate: float = 1.5e-3
    tower_rate: float = 0.2
    seed: int = 0

    def __post_init__(self):
        for name, least in (("steps", 1), ("seed", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name}: expected {least} or more, found {value}")
        if not 0 <= self.easy <= self.hard <= self.steps - self.alone <= self.steps:
            raise ValueError(
                f"steps: expected at least hard + alone, {self.hard + self.alone}, and"
                f" easy to come first, found {self.steps}"
            )
        if not 0 < self.decay <= self.steps:
            raise ValueError(
                f"decay: expected 1 to {self.steps} steps, found {self.decay}"
            )


def batch_at(recipe: Recipe, processor: Processor, codec, step: int) -> dict:
    """Draw what a step sees."""
    alone = step >= recipe.steps - recipe.alone
    rise = max(1, recipe.hard - recipe.easy)
    risen = min(1.0, max(0.0, (step - recipe.easy) / rise))
    shares = {"easy": (1 - risen) ** 2, "some": 2 * risen * (1 - risen)}
    levels = Mixture({**shares, "all": risen**2}, recipe.seed)
    _, stream = split("train", SCENES, recipe.seed)
    # Pictures never come twice: each step has numbers of its own.
    first = step * recipe.pictures
    scenes = [
        compose(LEVELS[levels.task(number)], stream, number)
        for number in range(first, first + recipe.pictures)
    ]
    kinds = EASY_KINDS if step < recipe.easy else KINDS
    asked = asked_about(scenes, 1 if alone else ASKED, kinds, recipe.seed, codec)
    pixels = pixels_of(scenes, recipe.seed, step)
    length = recipe.alone_length if alone else recipe.length
    batch = pack(processor, pixels, asked, length)
    return read_alone(batch) if alone else batch


def asked_about(
    scenes: Sequence[Scene], number: int, kinds: Sequence[str], seed: int, codec
) -> list[list[tuple[str, str]]]:
    """Some questions about each scene, and the answers; captions mostly English."""
    language = Mixture({"en": 0.7, "all": 0.3}, seed + 1)
    asked = []
    for scene in scenes:
        only = language.task(scene.index) == "en"
        chosen = choose_examples(
            scene,
            number,
            kinds,
            languages=("en",) if only else CAPTION_LANGUAGES,
            encode_mask=codec,
        )
        asked.append([(one.prompt, one.answer or "") for one in chosen])
    return asked


def read_alone(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of one question, which the picture may read: as the model is asked."""
    question = batch["question"]
    rest = {name: value for name, value in batch.items() if name != "question"}
    return rest | {"attention_mask": question >= 0}


def loss_of(model: PaliGemma, batch: dict[str, Tensor]) -> Tensor:
    """Of either kind of batch."""
    return (
        packed_loss(model, batch) if "question" in batch else batch_loss(model, batch)
    )


def build(recipe: Recipe, processor: Processor, tower: VisionTower) -> PaliGemma:
    """The model as the recipe starts it: a tower that sees, and random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = PaliGemma(TINY)
        table = model.language.embed_tokens.weight
        first = processor.id_of(LOC_TOKENS[0])
        with torch.no_grad():
            neighbours(table[first : first + len(LOC_TOKENS)])
    model.vision.load_state_dict(tower.state_dict())
    return model


class Codes:
    """``encode_mask`` of ``scene_language``: a mask in, 16 codes out."""

    def __init__(self):
        self.codec = load_mask_codec()

    def __call__(self, mask) -> list[int]:
        with torch.no_grad():
            return self.codec.encode(torch.from_numpy(mask)[None])[0].tolist()


def train(recipe: Recipe, out: Path, device: str) -> PaliGemma:
    """Run the recipe to its end, from where an earlier run in ``out`` stopped."""
    processor, codes = load_processor(FOLDER), Codes()
    if recipe.tower is None:
        tower, rate = unseeing_tower(recipe.seed), 1.0
    else:
        tower = tiny_tower.train(recipe.tower, out / TOWER, device)
        rate = recipe.tower_rate
    model = build(recipe, processor, tower).to(device)
    config = TrainingConfig(
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        schedule=functools.partial(learning_rate_share, recipe.steps, recipe.decay),
        parts=(Part(prefix="vision.", rate=rate, warmup=400),),
        weight_decay=0.05,
        bfloat16=True,
    )
    draw = functools.partial(batch_at, recipe, processor, codes)
    batches = Ahead(draw, recipe.steps)
    trainer = Trainer(model, config, batches, loss_of, name=repr(recipe))
    watched = [compose(*split("validation", SCENES), index) for index in range(WATCHED)]

    def evaluate() -> dict[str, float]:
        kinds = ("caption", "count", "presence", "relation", "detect", "segment")
        asked = ask(model, processor, watched, kinds)
        found = scores(asked, watched, codes.codec)
        samples[:] = [f"{a.example.prompt}: {a.answer}" for a in asked[:3] + asked[-1:]]
        return {name: figure(name, found[name]) for name in FIGURES}

    samples: list[str] = []
    fit(
        trainer,
        RunFolder(out / MIXTURE),
        every=EVERY,
        evaluate=evaluate,
        samples=lambda: samples,
    )
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, then write what ships."""
    parser = argparse.ArgumentParser(description="Train the tiny PaliGemma.")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--tower-steps", type=int, default=tiny_tower.Recipe.steps)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--blank", action="store_true", help="begin with a tower that has seen nothing"
    )
    parser.add_argument("--ship", type=Path, help="copy it and its figures here, too")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tower = None
    if not options.blank:
        tower = tiny_tower.in_steps(options.tower_steps, options.seed)
    recipe = Recipe(tower=tower, seed=options.seed, **lengths(options.steps))
    model = train(recipe, options.out, device)
    folder = options.out / "shipped"
    save_pretrained(model.cpu().half(), load_processor(FOLDER), folder)
    print(f"written: {folder}", file=sys.stderr)
    if options.ship:
        ship(options.out, options.ship)


def lengths(steps: int) -> dict[str, int]:
    """The parts of the recipe in a run of another length."""
    names = "easy", "hard", "alone", "decay"
    parts = {n: round(getattr(Recipe, n) * steps / Recipe.steps) for n in names}
    return parts | {"steps": steps, "decay": max(1, parts["decay"])}


def ship(out: Path, folder: Path) -> None:
    """Copy what a run wrote into a folder that may hold other files."""
    make_folder(folder)
    for path in (out / "shipped").iterdir():
        shutil.copy(path, folder)
    for stage in STAGES:
        if (figures := out / stage / METRICS).exists():
            shutil.copy(figures, folder / f"{stage}.csv")
    print(f"written: {folder}", file=sys.stderr)


if __name__ == "__main__":
    main()
