"""Mask codes: the codec that turns the mask of an emoji into 16 tokens, and back.

    python -m pgcore.recipes.mask_codes --out runs/mask_codes

Two runs: one whose codebook collapses, as a plain one does, for the record; and the one
that ships. What step n sees depends on the seed and on n alone, so a run that was
stopped goes on, where it left off, as if nothing had happened: start it again with the
same folder. It works on one core: 8 minutes.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from pgcore.files import written_whole
from pgcore.lab.emoji import TEST_STYLE, VALIDATION_STYLE
from pgcore.mask_codec import (
    EMOJI_MASKS,
    CodebookAverages,
    MaskCodec,
    MaskCodecConfig,
    load_mask_codec,
    quantize,
    save_mask_codec,
)
from pgcore.recipes._masks import (
    measure_scenes,
    measure_sprites,
    scenes_of,
    sprite_masks,
    training_masks,
)
from pgcore.runs import Progress, RunFolder, require_same_run

STEPS = 3600


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, on what, and how.

    free: steps at the start without codes: latents go to the decoder as they are.
    restarts: whether the first codes come from k-means over latents, and codes that
        nothing chooses are moved. Without it, and without free steps, most codes die.
    commitment: weight of the term that keeps latents near their codes.
    decay: the last share of the steps, over which the learning rate falls to zero.
    sizes: of the training scenes, in pixels; `scenes` of each.
    changed: warped copies of each mask.
    """

    steps: int = STEPS
    batch_size: int = 64
    free: int = 100
    restarts: bool = True
    commitment: float = 1.0
    learning_rate: float = 2e-3
    warmup: int = 50
    decay: float = 0.4
    seed: int = 0
    config: MaskCodecConfig = EMOJI_MASKS
    sizes: tuple[int, ...] = (64, 96, 128)
    scenes: int = 2500
    changed: int = 3


PLAIN = {"steps": 400, "free": 0, "restarts": False}  # the run that collapses
EVERY = 50  # steps between looks at the watched artist
START = 2048  # masks whose latents the first codes are chosen from


class Run:
    """A codec in training, its averages, the steps done and what was logged."""

    def __init__(self, recipe: Recipe, pool: UInt8[Tensor, "B 64 64"]):
        self.recipe, self.pool, self.step = recipe, pool, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.codec = MaskCodec(recipe.config)
        self.averages = CodebookAverages(self.codec.codebook, recipe.seed)
        self.optimizer = torch.optim.Adam(self.codec.parameters(), betas=(0.9, 0.99))
        self.log: list[dict] = []

    def masks_at(self, step: int, count: int) -> Float[Tensor, "B 64 64"]:
        """Draw what step ``step`` sees, in [0, 1]."""
        seed = self.recipe.seed * 1_000_003 + step
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(self.pool), (count,), generator=generator)
        return self.pool[rows].float() / 255

    def train_one_step(self) -> float:
        """Take one step and return the error of the masks that came back."""
        recipe, codec = self.recipe, self.codec
        if self.step == recipe.free and recipe.restarts:
            with torch.no_grad():
                parts = self.masks_at(self.step, START).split(64)
                latents = torch.cat([codec.latents(part) for part in parts])
            self.averages.start(latents)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(recipe, self.step)
        masks = self.masks_at(self.step, recipe.batch_size)
        latents = codec.latents(masks)
        if self.step < recipe.free:
            coded, codes, commitment = latents, None, torch.zeros(())
        else:
            coded, codes = quantize(latents, codec.codebook)
            commitment = F.mse_loss(latents, codec.codebook[codes])
        error = F.mse_loss(codec.render(coded), 2 * masks - 1)
        self.optimizer.zero_grad()
        (error + recipe.commitment * commitment).backward()
        torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        self.optimizer.step()
        if codes is not None:
            fewest = 1.0 if recipe.restarts else 0.0
            self.averages.update(latents.detach(), codes, fewest=fewest)
        self.step += 1
        return error.item()

    def state(self) -> dict[str, Any]:
        """All that it needs to go on; write it down before the next step."""
        return {
            "name": repr(self.recipe),
            "step": self.step,
            "codec": self.codec.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counts": self.averages.counts,
            "sums": self.averages.sums,
            "draws": self.averages.generator.get_state(),
            "log": self.log,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to what ``state`` gave.

        Raises:
            ValueError: if it belongs to another recipe.
        """
        require_same_run(state, repr(self.recipe))
        self.step, self.log = state["step"], state["log"]
        self.codec.load_state_dict(state["codec"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.averages.counts, self.averages.sums = state["counts"], state["sums"]
        self.averages.generator.set_state(state["draws"])


def learning_rate_at(recipe: Recipe, step: int) -> float:
    """Up in a line, level, down in a line."""
    left = (recipe.steps - step) / max(1, round(recipe.decay * recipe.steps))
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup, left)


def train(recipe: Recipe, pool: UInt8[Tensor, "B 64 64"], out: Path) -> Run:
    """Run the recipe to its end, from where an earlier run in ``out`` stopped."""
    folder, run = RunFolder(out), Run(recipe, pool)
    watched, errors = sprite_masks(VALIDATION_STYLE), []
    if (state := folder.load()) is not None:
        run.restore(state)
        print(f"going on after step {run.step}", file=sys.stderr)
    progress = Progress(recipe.steps, run.step)
    for _ in range(run.step, recipe.steps):
        errors.append(run.train_one_step())
        if run.step % EVERY == 0 or run.step == recipe.steps:
            error, errors = sum(errors) / len(errors), []
            figures = {"error": error, **measure_sprites(run.codec, watched)}
            entry = {"step": run.step, **figures}
            run.log.append({key: round(value, 4) for key, value in entry.items()})
            folder.save(run.state())
            progress.say(run.step, figures)
    return run


def final_test(codec: MaskCodec) -> dict:
    """Measure what ships on the artist that nothing was chosen by."""
    found = measure_sprites(codec, sprite_masks(TEST_STYLE))
    found["iou_in_scenes"] = measure_scenes(codec, scenes_of("test-artist", 96, 300))
    return {key: round(value, 4) for key, value in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, then write what ships."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/mask_codes"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ship", type=Path, help="write what ships here, instead")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    recipe = Recipe(steps=options.steps, seed=options.seed)
    plain = replace(recipe, **PLAIN)
    pool = training_masks(recipe.sizes, recipe.scenes, recipe.changed, recipe.seed)
    log: dict[str, list | dict] = {
        "plain": train(plain, pool, options.out / "plain").log,
        "shipped": (run := train(recipe, pool, options.out / "cured")).log,
    }
    folder = options.ship or options.out / "shipped"
    save_mask_codec(folder, run.codec)
    log["test"] = final_test(load_mask_codec(folder))
    with written_whole(folder / "training.json") as path:
        path.write_text(json.dumps(log, indent=1))
    print(f"written: {folder}")


if __name__ == "__main__":
    main()
