"""The image tower of the tiny PaliGemma learns to see small things, patch by patch.

    python -m pgcore.recipes.tiny_tower --out runs/tiny_tower

Chapter 07's tower has learned from whole pictures and whole captions; of three small
things in a picture it names few. Here each patch of a scene is asked three questions:
which thing is it of, where does that thing's box end, which of its pixels are the
thing's. A picture gives 64 such answers, for no words read. The maps that answer are
thrown away; the tower stays.
"""

import argparse
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait, do not spin

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pgcore.lab.emoji import TRAIN_STYLES
from pgcore.lab.pretrained import load_emoji_siglip
from pgcore.lab.scenes import Scene, compose, images_of, split
from pgcore.lab.tiny_world import CONCEPTS, SCENES
from pgcore.recipes._pictures import tinted
from pgcore.runs import Ahead, RunFolder, fit
from pgcore.training import Trainer, TrainingConfig, rsqrt
from pgcore.vision import TINY, VisionTower

TRAIN = dataclasses.replace(SCENES, styles=TRAIN_STYLES, variants=64)
EVERY = 250  # steps between looks at the watched scenes, each saved
WATCHED = 100  # scenes of the validation artist
FEWEST = 1 / 4  # of a patch's pixels: with fewer it is background
EDGES = 5.0  # weight of the edges in the loss; they are shares of a picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, on what, and how.

    decay: the last steps, over which the learning rate falls to zero.
    """

    steps: int = 5000
    pictures: int = 32
    learning_rate: float = 1e-3
    decay: int = 2000
    seed: int = 0

    def __post_init__(self):
        for name, least in (("steps", 1), ("seed", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name}: expected {least} or more, found {value}")
        if not 0 < self.decay <= self.steps:
            raise ValueError(
                f"steps: expected at least the {max(1, self.decay)} of decay, found"
                f" {self.steps}"
            )


class PatchReader(nn.Module):
    """A tower, and one linear map from each of its patches to that patch's answers.

    Gives names [B, P, 1 + concepts], the first of them "nothing"; edges [B, P, 4], how
    far top, left, bottom and right of the box lie from the patch's middle, as shares of
    the picture's side; pixels [B, P, patch * patch], above 0 where the thing is.
    """

    def __init__(self, tower: VisionTower):
        super().__init__()
        self.tower = tower
        self.sizes = [1 + len(CONCEPTS), 4, tower.config.patch_size**2]
        self.read = nn.Linear(tower.config.width, sum(self.sizes))

    def forward(self, pictures: Float[Tensor, "B C R R"]) -> tuple[Tensor, ...]:
        return self.read(self.tower(pictures)).float().split(self.sizes, dim=-1)


def batch_at(recipe: Recipe, step: int) -> dict[str, Tensor]:
    """Draw what a step sees."""
    _, stream = split("train", SCENES, recipe.seed + 1)
    first = step * recipe.pictures  # pictures never come twice
    scenes = [compose(TRAIN, stream, first + row) for row in range(recipe.pictures)]
    return batch_of(scenes, pixels_of(scenes, recipe.seed, step))


def pixels_of(scenes: Sequence[Scene], seed: int, step: int) -> Tensor:
    """[B, 3, R, R] in [-1, 1]: each scene in a light of its own."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return 2 * tinted(images_of(scenes), generator) - 1


def batch_of(scenes: Sequence[Scene], pictures: Tensor) -> dict[str, Tensor]:
    """Pictures in [-1, 1], and the answers that ``PatchReader`` should give."""
    answers = [_answers(scene) for scene in scenes]
    names, edges, pixels = (
        torch.from_numpy(np.stack(part)) for part in zip(*answers, strict=True)
    )
    return {
        "pictures": pictures,
        "names": names,
        "edges": edges,
        "pixels": pixels,
    }


def _answers(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    size, side, grid = SCENES.size, TINY.patch_size, TINY.grid
    cells = scene.segments.reshape(grid, side, grid, side).swapaxes(1, 2)
    cells = cells.reshape(grid * grid, side * side)
    count = np.stack([(cells == n + 1).sum(1) for n in range(len(scene.objects))], 1)
    most = count.argmax(1)
    named = [CONCEPTS.index(one.concept) + 1 for one in scene.objects]
    names = np.where(count.max(1) >= FEWEST * side**2, np.array(named)[most], 0)
    middle = (np.arange(grid) + 0.5) * side
    row, column = (m.ravel() for m in np.meshgrid(middle, middle, indexing="ij"))
    boxes = np.array([one.box for one in scene.objects])[most]
    edges = (boxes - np.stack([row, column, row, column], 1)) / size
    return names, edges.astype(np.float32), cells == most[:, None] + 1


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Of names and pixels everywhere, and of edges where there is a thing."""
    names, edges, pixels = model(batch["pictures"])
    wrong = F.cross_entropy(names.flatten(0, 1), batch["names"].flatten())
    off = (edges - batch["edges"]).abs()[batch["names"] > 0].mean()
    unlike = F.binary_cross_entropy_with_logits(pixels, batch["pixels"].float())
    return wrong + EDGES * off + unlike


@torch.no_grad()
def measure(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Shares of patches named right, those of things and those of none; the edges'
    mean error as a share of the picture's side; the share of pixels right."""
    names, edges, pixels = model(batch["pictures"])
    right, on = names.argmax(-1) == batch["names"], batch["names"] > 0
    return {
        "things": right[on].float().mean().item(),
        "nothing": right[~on].float().mean().item(),
        "edges": (edges - batch["edges"]).abs()[on].mean().item(),
        "pixels": ((pixels > 0) == batch["pixels"]).float().mean().item(),
    }


def learning_rate_share(steps: int, decay: int, step: int) -> float:
    """Up, slowly down as rsqrt does, in the last ``decay`` steps in a line to zero."""
    return min(1.0, (steps - step) / decay) * rsqrt(step, warmup=100, timescale=steps)


def train(recipe: Recipe, out: Path, device: str) -> VisionTower:
    """Run the recipe to its end, from where an earlier run in ``out`` stopped."""
    siglip, _ = load_emoji_siglip()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = PatchReader(siglip.vision.requires_grad_(True)).to(device)
    config = TrainingConfig(
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        schedule=functools.partial(learning_rate_share, recipe.steps, recipe.decay),
        weight_decay=0.05,
        bfloat16=True,
    )
    batches = Ahead(functools.partial(batch_at, recipe), recipe.steps)
    trainer = Trainer(model, config, batches, loss_of, name=repr(recipe))
    watched = [compose(*split("validation", SCENES), index) for index in range(WATCHED)]
    seen = batch_of(watched, 2 * images_of(watched) - 1)
    seen = {name: value.to(device) for name, value in seen.items()}
    fit(
        trainer,
        RunFolder(out),
        every=EVERY,
        evaluate=functools.partial(measure, model, seen),
    )
    return model.tower


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the tower alone, as the first stage of ``pgcore.recipes.tiny`` does."""
    parser = argparse.ArgumentParser(description="Teach the image tower small things.")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny_tower"))
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train(in_steps(options.steps, options.seed), options.out, device)


def in_steps(steps: int, seed: int) -> Recipe:
    """The recipe in a run of another length."""
    decay = max(1, round(Recipe.decay * steps / Recipe.steps))
    return Recipe(steps=steps, decay=decay, seed=seed)


if __name__ == "__main__":
    main()
