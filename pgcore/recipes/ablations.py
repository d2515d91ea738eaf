"""What each decision of PaliGemma's training is worth, on a small model.

    python -m pgcore.recipes.ablations --out runs/ablations

Six arms with three seeds each; an arm differs from the first in one decision, and a
tower that starts from nothing learns at the decoder's rate. A small decoder behind the
emoji SigLIP's tower learns captions, counts and boxes of scenes of eight things, one
question a row, for a fixed number of steps. Boxes end at the edges of patches: finer
ones take many times as long. Chapter 16 plots what is left:
``pgcore/assets/ablations.json``.

Start it again with the same folder, and it goes on where it was stopped. Two of it with
some of the arms each, and one thread each, take less time than one with two threads;
started with all arms once they are done, it sums up.

At least half of the eight things were chosen because the emoji SigLIP names them right
when the artist of the second exam drew them: it favours the arms that start with it.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait, do not spin

import torch
from torch import Tensor, nn

from pgcore.files import written_whole
from pgcore.gemma import GemmaConfig
from pgcore.lab.pretrained import load_emoji_siglip
from pgcore.lab.scene_language import choose_examples
from pgcore.lab.scenes import images_of
from pgcore.lab.scoring import ask, figure, scores
from pgcore.paligemma import PaliGemma, PaliGemmaConfig, prefix_lm_mask
from pgcore.processing import Processor, load_processor
from pgcore.recipes._coarse_scenes import CONCEPTS, SCENES, TRAIN, drawn
from pgcore.recipes.emoji_siglip import sincos_positions
from pgcore.recipes.tiny_tokenizer import FOLDER
from pgcore.runs import RunFolder, fit
from pgcore.training import Part, Trainer, TrainingConfig, batch_loss, cosine, pack
from pgcore.vision import VisionTower

ARMS = (
    "as it is",
    "tower frozen",
    "no SigLIP",  # a tower of random numbers, with the same kind of positions
    "projector at random",
    "causal",  # picture and prompt, too, read from left to right
    "weak positions",  # the tower's positions drawn at 1 / sqrt(width)
)
EXAMS = {"known artists": "test-scenes", "another artist": "validation"}
FIGURES = ("caption objects", "count", "detect mIoU")
KINDS = ("caption", "count", "detect", "detect")
Rows = list[dict[str, float | int]]  # of one run: what each look found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run: an arm, a seed, and how it is trained.

    watched: scenes of each exam.
    """

    arm: str
    seed: int
    steps: int = 800
    rows: int = 32
    learning_rate: float = 1e-3
    tower_rate: float = 0.2
    length: int = 96
    watched: int = 200


def build(recipe: Recipe, processor: Processor) -> PaliGemma:
    """The model as the arm starts it."""
    siglip, _ = load_emoji_siglip()
    text = GemmaConfig(
        width=128,
        depth=3,
        mlp_dim=512,
        num_heads=4,
        num_kv_heads=1,
        head_dim=48,
        vocab_size=processor.tokenizer.get_vocab_size(),
    )
    config = PaliGemmaConfig(
        vision=siglip.vision.config, text=text, image_token=processor.id_of("<image>")
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(recipe.seed)
        model = PaliGemma(config)
        for weight in model.language.layers.parameters():
            if weight.ndim == 2:
                nn.init.trunc_normal_(weight, std=weight.shape[1] ** -0.5)
        if recipe.arm == "projector at random":
            projector = model.projector.linear.weight
            nn.init.trunc_normal_(projector, std=projector.shape[1] ** -0.5)
        place(model.vision, recipe.arm, siglip.vision)
    return model


def place(tower: VisionTower, arm: str, trained: VisionTower) -> None:
    """Give the tower its weights, and its positions."""
    grid, width = tower.config.grid, tower.config.width
    if arm == "no SigLIP":
        tower.positions.copy_(sincos_positions(grid, width))
        return
    drawn = tower.positions.clone()
    tower.load_state_dict(trained.state_dict())
    if arm == "weak positions":
        tower.positions.copy_(drawn)


def batch_at(recipe: Recipe, processor: Processor, step: int) -> dict[str, Tensor]:
    """Draw what a step sees: one question about each picture."""
    scenes = drawn("train", TRAIN, recipe.seed, step * recipe.rows, recipe.rows)
    asked = []
    for scene in scenes:
        chosen = choose_examples(scene, 1, KINDS, languages=("en",))
        asked.append([(one.prompt, one.answer or "") for one in chosen])
    batch = pack(processor, 2 * images_of(scenes) - 1, asked, recipe.length)
    is_token = batch.pop("question") >= 0
    if recipe.arm == "causal":
        batch["suffix_mask"] = is_token
    return batch | {"attention_mask": is_token}


@contextlib.contextmanager
def read_as_trained(arm: str) -> Iterator[None]:
    """While this lasts, answers are written with the mask of the arm."""
    if arm != "causal":
        yield
        return
    with patch(
        "pgcore.generation.prefix_lm_mask",
        lambda is_token, is_suffix: prefix_lm_mask(is_token, is_token),
    ):
        yield


def config_of(recipe: Recipe) -> TrainingConfig:
    """How the arm is trained."""
    rates = {"tower frozen": 0.0, "no SigLIP": 1.0}
    rate = rates.get(recipe.arm, recipe.tower_rate)
    return TrainingConfig(
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        schedule=lambda step: cosine(step, steps=recipe.steps, warmup=50),
        parts=(Part(prefix="vision.", rate=rate, warmup=100),),
        weight_decay=0.05,
        bfloat16=True,
    )


def train(recipe: Recipe, out: Path, processor: Processor) -> Rows:
    """Run one arm with one seed to its end; its figures at each look."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(recipe, processor).to(device)
    trainer = Trainer(
        model,
        config_of(recipe),
        lambda step: batch_at(recipe, processor, step),
        batch_loss,
        name=repr(recipe),
    )
    exams = {
        title: drawn(name, SCENES, 0, 0, recipe.watched)
        for title, name in EXAMS.items()
    }
    samples: list[str] = []

    def evaluate() -> dict[str, float]:
        figures = {}
        for title, scenes in exams.items():
            with read_as_trained(recipe.arm):
                asked = ask(model, processor, scenes, ("caption", "count", "detect"))
            found = scores(asked, scenes, None)
            for name in FIGURES:
                figures[f"{name}, {title}"] = figure(name, found[name])
            samples[:] = [f"{one.example.prompt}: {one.answer}" for one in asked[:2]]
        return figures

    every = max(1, recipe.steps // 2)
    fit(
        trainer,
        RunFolder(out),
        every=every,
        evaluate=evaluate,
        samples=lambda: samples,
    )
    return trainer.rows


def summary(recipe: Recipe, found: dict[str, list[Rows]]) -> dict:
    """Mean, lowest and highest of the seeds, for each arm and figure, at the end."""
    arms = {}
    for arm, runs in found.items():
        arms[arm] = {"curves": runs}
        for name in (f"{name}, {exam}" for exam in EXAMS for name in FIGURES):
            ends = [rows[-1][name] for rows in runs]
            mean, low, high = statistics.fmean(ends), min(ends), max(ends)
            arms[arm][name] = {"mean": mean, "lowest": low, "highest": high}
    settings = dataclasses.asdict(recipe)
    del settings["arm"], settings["seed"]
    return {"recipe": settings, "concepts": CONCEPTS, "arms": arms}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not done yet; with all arms, write the summary."""
    parser = argparse.ArgumentParser(description="Train the arms of chapter 16.")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--watched", type=int, default=Recipe.watched)
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        raise ValueError(f"seeds: expected 1 or more, found {options.seeds}")
    processor = load_processor(FOLDER)
    found: dict[str, list[Rows]] = {arm: [] for arm in options.arms}
    shared = {"steps": options.steps, "watched": options.watched}
    for seed in range(options.seeds):  # every arm once before any comes twice
        for arm in options.arms:
            recipe = Recipe(arm=arm, seed=seed, **shared)
            print(f"arm {arm!r}, seed {seed}", file=sys.stderr, flush=True)
            folder = options.out / f"{arm.replace(' ', '_')}-{seed}"
            found[arm].append(train(recipe, folder, processor))
    if set(options.arms) == set(ARMS):  # of two with some arms, neither knows all
        with written_whole(options.out / "ablations.json") as path:
            text = json.dumps(summary(recipe, found), indent=1)
            path.write_text(text + "\n", encoding="utf8")
        print(f"written: {options.out / 'ablations.json'}", file=sys.stderr)


if __name__ == "__main__":
    main()
