"""The model card of the tiny PaliGemma, written from its scores."""

from collections.abc import Mapping
from typing import Any

from pgcore.lab.tiny_world import CONCEPTS
from pgcore.recipes.tiny import Recipe

GROUPS = {"test-scenes": "known artists", "test-artist": "Twemoji, a new artist"}
EXPLAINED = {
    "blind": "the same model, given a grey picture",
    "nearest drawing": "the nearest drawing in each window, no learning, on {matched}"
    " of the scenes",
    "without pretraining": "the same model, trained as long on the same questions, its"
    " image tower from random numbers",
}
TEXT = """\
# tiny

A PaliGemma of 4.8 million weights that looks at scenes of emoji, 96 × 96 pixels, and
answers in PaliGemma's own prompt language. It ships with the book "PaliGemma from
Scratch"; chapter 00 shows what it does, chapter 16 how it was trained.

- **Ask it.** `pgcore demo`, or `pgcore ask scene.png "detect cat ; red apple" --out
  boxed.png`, or `pgcore.load("tiny")`. `transformers` reads the folder, too.
- **Prompts.** `caption en` (also de, fr, es), `answer en how many cats?`, `answer en is
  there a cat?`, `answer en what is left of the cat?` (right of, above, below), `detect
  cat ; red apple`, `segment cat`, and what is in a box.
- **Knows** the {concepts} things in `pgcore/lab/tiny_world.py`. It answers about
  other things as if they were among these; it never says that it does not know.
- **Made by** `make tiny` from random numbers and the image tower of the emoji SigLIP,
  with seed 0, one run: {tower_steps} steps of the tower alone, {steps:,}
  of questions, an hour and a half on two cores with other work beside it.
- **Trained on** scenes drawn by four artists (Noto, Noto blobs, Fluent, EmojiOne).
  **Watched** on FxEmojis. **Never seen:** Twemoji.
- **Files.** `model.safetensors`: weights in half precision, under PaliGemma's names.
  `tower.csv`, `mixture.csv`: what was measured while it trained.

Measured with `make eval-tiny` on {scenes} scenes of each group that no
training has seen, with 95 % intervals. Beside it:

{explained}

{tables}

Captions, answers and counts: the share that is right. A caption names the right set of
things, though perhaps one of them twice (objects), or is right to the letter (exact).
A box or mask that is missing, invalid or under another name counts as an IoU of 0.

- **Weak** on basketballs, scissors and candles, and on counting two of a thing: see the
  gallery in the book.
- **Licence.** Apache License 2.0, as the code. The drawings that it learned from keep
  their own, in `pgcore/assets/emoji/LICENSES.md`.
"""


def card(report: Mapping[str, Any]) -> str:
    """The page, of a report that ``tiny_eval`` wrote."""
    recipe = Recipe()
    assert recipe.tower is not None  # the one that ships has seen before
    others = [name for name in next(iter(report["splits"].values())) if name != "tiny"]
    explained = "\n".join(
        f"- **{name[0].upper()}{name[1:]}**: {EXPLAINED[name].format(**report)}."
        for name in others
        if name in EXPLAINED
    )
    tables = "\n\n".join(
        _table(title, report["splits"][name], others) for name, title in GROUPS.items()
    )
    return TEXT.format(
        concepts=len(CONCEPTS),
        tower_steps=recipe.tower.steps,
        steps=recipe.steps,
        scenes=report["scenes"],
        explained=explained,
        tables=tables,
    )


def _table(title: str, rows: Mapping[str, Any], others: list[str]) -> str:
    lines = [f"| {title} | tiny | {' | '.join(others)} |"]
    lines.append("|---" * (2 + len(others)) + "|")
    for what, (value, low, high) in rows["tiny"].items():
        cells = [f"{value:.2f} ({low:.2f}–{high:.2f})"]
        cells += [f"{rows[name][what][0]:.2f}" for name in others]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)
