"""Emoji SigLIP: the picture and text towers that ship with the book.

    python -m pgcore.recipes.emoji_siglip --out runs/emoji_siglip

What step n sees depends on the seed and on n alone, so a run that was stopped goes on,
where it left off, as if nothing had happened: start it again with the same folder.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pgcore.lab.emoji import SEEN_CONCEPTS, TRAIN_STYLES, keywords
from pgcore.lab.pretrained import save_emoji_siglip
from pgcore.lab.scene_language import caption
from pgcore.lab.scenes import Scene, SceneSettings, compose, images_of
from pgcore.lab.words import Words, emoji_words
from pgcore.recipes._pictures import augment
from pgcore.recipes._run import Batch, Clock, Run
from pgcore.recipes._watch import film, watch
from pgcore.runs import RunFolder
from pgcore.siglip import TINY_TEXT, SigLIP, TextConfig
from pgcore.vision import TINY

STEPS = 6000


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, on what, and how.

    easy: steps at the start with large emoji on plain colours, and plain names.
    strong: the step from which pictures are changed twice as much: by then the drawings
        of four artists are known too well.
    alone: pictures of a batch, after that, that show one emoji, no two the same; the
        others are scenes of two or three.
    decay: the last share of the steps, over which the learning rate falls to zero.
    """

    steps: int = STEPS
    batch_size: int = 128
    easy: int = 1000
    strong: int = 2500
    alone: int = 104
    learning_rate: float = 7e-4
    weight_decay: float = 0.05
    warmup: int = 100
    decay: float = 0.3
    seed: int = 0
    text: TextConfig = replace(TINY_TEXT, vocab_size=len(emoji_words()))


ALONE_SIDE = (0.35, 1.0)  # a sprite's side, as a share of the picture's
EASY_SIDE = (0.6, 1.0)
SCENES = SceneSettings(
    styles=TRAIN_STYLES,
    concepts=SEEN_CONCEPTS,
    size=TINY.image_size,
    objects=(2, 3),
    pairs="seen",
)
FILM_STEPS = (0, 100, 300, 1000, 3000)
EVERY = 100  # steps between looks at the watched artist, each saved


def batch_at(recipe: Recipe, words: Words, step: int) -> Batch:
    """Draw what step ``step`` sees: pictures in [-1, 1] and the ids of captions."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    rng = np.random.default_rng([recipe.seed, step])
    easy = step < recipe.easy
    alone = recipe.batch_size if easy else recipe.alone
    concepts = rng.permutation(len(SEEN_CONCEPTS))[:alone]
    settings = [_alone(SEEN_CONCEPTS[row], easy) for row in concepts]
    settings += [SCENES] * (recipe.batch_size - alone)
    first = step * recipe.batch_size
    scenes = [compose(s, recipe.seed, first + row) for row, s in enumerate(settings)]
    texts = [_name(scene) if easy else _caption(scene, rng) for scene in scenes]
    strength = 1.0 if step < recipe.strong else 2.0
    pictures = augment(images_of(scenes), generator, strength)
    return 2 * pictures - 1, words.encode(texts, recipe.text.max_length)


def _alone(concept: str, easy: bool) -> SceneSettings:
    settings = SceneSettings(
        styles=TRAIN_STYLES,
        concepts=(concept,),
        size=TINY.image_size,
        objects=(1, 1),
        alone_side=ALONE_SIDE,
    )
    if easy:
        return replace(
            settings, alone_side=EASY_SIDE, backgrounds=("plain",), clutter=0
        )
    return settings


def _name(scene: Scene) -> str:
    return scene.objects[0].concept


def _caption(scene: Scene, rng: np.random.Generator) -> str:
    """Say what is there: "a cat", "cat", or by keywords "kitten, cat, pet"."""
    concept, choice = _name(scene), rng.random()
    if len(scene.objects) > 1 or choice < 0.4:
        return caption(scene)
    if choice < 0.8:
        return concept
    said = [concept, *KEYWORDS[concept]]
    said = [said[row] for row in rng.permutation(len(said))[:3]]
    return ", ".join(said)


KEYWORDS = {
    concept: tuple(key for key in keys if len(key.split()) <= 2)
    for concept, keys in zip(SEEN_CONCEPTS, keywords("en", SEEN_CONCEPTS), strict=True)
}


def sincos_positions(grid: int, width: int) -> Float[Tensor, "P D"]:
    """Sines and cosines of a patch's row and column, as large as the patches.

    Small random positions are learned late, or never: the pooled vector hardly needs
    them. The tiny PaliGemma will need them to say where things are.
    """
    frequencies = 100 ** -(torch.arange(width // 4) / (width // 4))
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (row, column)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)


def learning_rate_at(recipe: Recipe, step: int) -> float:
    """Up in a line, level, down in a line."""
    left = (recipe.steps - step) / max(1, round(recipe.decay * recipe.steps))
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup, left)


def build(recipe: Recipe, words: Words, device: str) -> Run:
    """Build the model as the recipe starts it, and its run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = SigLIP(TINY, recipe.text).to(device)
    with torch.no_grad():
        model.vision.positions.copy_(sincos_positions(TINY.grid, TINY.width))
        # The prior of a match (chapter 03), for a batch much smaller than SigLIP's.
        model.bias.fill_(-math.log(recipe.batch_size - 1))
    return Run(
        model,
        batch_at=lambda step: batch_at(recipe, words, step),
        learning_rate_at=lambda step: learning_rate_at(recipe, step),
        weight_decay=recipe.weight_decay,
        name=repr(recipe),
    )


def train(recipe: Recipe, out: Path, device: str) -> tuple[SigLIP, Words, dict]:
    """Run the recipe to its end, from where an earlier run in ``out`` stopped."""
    words, folder = emoji_words(), RunFolder(out)
    run = build(recipe, words, device)
    if (state := folder.load()) is not None:
        run.restore(state)
        print(f"going on after step {run.step}", file=sys.stderr)
    model, log = run.model, run.log
    clock, losses = Clock(*log["seconds"]), []
    for _ in range(run.step, recipe.steps):
        if run.step in FILM_STEPS:
            log["film"].append({"step": run.step, "cosines": film(model, words)})
        losses.append(run.train_one_step())
        if run.step % EVERY == 0 or run.step == recipe.steps:
            loss, losses = sum(losses) / len(losses), []
            entry = {"step": run.step, "loss": loss, **watch(model, words)}
            log["steps"].append({k: round(v, 4) for k, v in entry.items()})
            log["seconds"] = clock.seconds()
            folder.save(run.state())
            _report(run, recipe.steps)
    log["film"].append({"step": run.step, "cosines": film(model, words)})
    return model, words, log


def _report(run: Run, steps: int) -> None:
    entry, (seconds, _) = run.log["steps"][-1], run.log["seconds"]
    left = seconds / run.step * (steps - run.step) / 60
    print(
        f"step {run.step} of {steps}  loss {entry['loss']:.3f}"
        f"  names {entry['centred']:.1%} centred, {entry['anywhere']:.1%} anywhere"
        f"  {left:.0f} min left",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, then write what ships."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/emoji_siglip"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ship", type=Path, help="write what ships here, instead")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = Recipe(steps=options.steps, seed=options.seed)
    model, words, log = train(recipe, options.out, device)
    folder = options.ship or options.out / "shipped"
    save_emoji_siglip(folder, model.cpu(), words, log)
    print(f"written: {folder}")


if __name__ == "__main__":
    main()
