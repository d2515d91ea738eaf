"""How well the tiny PaliGemma answers, beside three others, with intervals.

    python -m pgcore.recipes.tiny_eval --out pgcore/assets/tiny_scores.json

On scenes that no training has seen: of the known artists, and of the test artist. The
others are the same model with its eyes shut (a grey picture: what can be guessed),
and the nearest drawing in each window. ``--beside NAME=FOLDER`` adds a model,
``--card FILE`` writes the model card.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait, do not spin

import numpy as np

from pgcore.api import find_checkpoint, load
from pgcore.files import written_whole
from pgcore.grounding import load_mask_codec
from pgcore.lab import template_matching
from pgcore.lab.scenes import Scene, compose_batch, split
from pgcore.lab.scoring import (
    KINDS,
    Asked,
    ask,
    figure,
    interval,
    questions,
    scores,
)
from pgcore.lab.tiny_world import SCENES
from pgcore.recipes._tiny_card import card
from pgcore.recipes.tiny import Codes

SPLITS = ("test-scenes", "test-artist")
THRESHOLD = 0.3  # of the nearest drawing: set by eye on six validation scenes
OTHERS = "tiny", "blind", "nearest drawing"
SEED = 7  # of the scenes: not those that training looked at


def blind(scenes: Sequence[Scene]) -> list[Scene]:
    """The same scenes, their pictures grey."""
    return [
        dataclasses.replace(scene, image=np.full_like(scene.image, 128))
        for scene in scenes
    ]


def by_matching(scenes: Sequence[Scene]) -> list[Asked]:
    """What the nearest drawings answer."""
    codes, asked = Codes(), []
    for place, scene in enumerate(scenes):
        if place % 50 == 0:
            print(f"  scene {place} of {len(scenes)}", file=sys.stderr, flush=True)
        found = template_matching.match(scene, THRESHOLD)
        asked += template_matching.answers(
            scene, place, questions(scene, KINDS), found, codes
        )
    return asked


def measured(asked: Sequence[Asked], scenes: Sequence[Scene]) -> dict[str, list[float]]:
    """Each figure and the interval around it: [figure, low, high]."""
    return with_intervals(scores(asked, scenes, load_mask_codec()))


def with_intervals(found: dict[str, list[list[Any]]]) -> dict[str, list[float]]:
    """[figure, low, high] of each figure, from its values in each scene."""
    return {
        name: [round(v, 4) for v in (figure(name, rows), *interval(name, rows))]
        for name, rows in found.items()
    }


def compared(
    name: str, models: dict[str, str], number: int, matched: int
) -> dict[str, dict[str, list[float]]]:
    """The figures of every model, and of the others, on one split."""
    scenes = list(compose_batch(*split(name, SCENES, SEED), 0, number))
    found = {}

    def keep(title: str, asked: Sequence[Asked], scenes: Sequence[Scene]) -> None:
        found[title] = measured(asked, scenes)
        print(f"{name}, {title}: {found[title]}", file=sys.stderr, flush=True)

    for title, source in models.items():
        keep(title, ask(*load(source, dtype="float32"), scenes, KINDS), scenes)
    tiny = load(models["tiny"], dtype="float32")
    keep("blind", ask(*tiny, blind(scenes), KINDS), scenes)
    few = scenes[:matched]
    keep("nearest drawing", by_matching(few), few)
    return found


def named(text: str) -> tuple[str, str]:
    """The name and the folder of ``--beside``."""
    name, found, folder = text.partition("=")
    if not (name and found and folder) or name in OTHERS:
        raise ValueError(
            f"beside: expected NAME=FOLDER, NAME none of {', '.join(OTHERS)}, found"
            f" {text!r}"
        )
    return name, folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask all, and write one JSON file."""
    parser = argparse.ArgumentParser(description="Score the tiny PaliGemma.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=1000, help="of each split")
    parser.add_argument("--matched", type=int, default=200, help="for the drawings")
    parser.add_argument("--model", default="tiny", help="tiny, or its folder")
    parser.add_argument(
        "--beside", action="append", default=[], metavar="NAME=FOLDER", help="one more"
    )
    parser.add_argument("--card", type=Path, help="write the model card here, too")
    options = parser.parse_args(arguments)
    for name in ("scenes", "matched"):
        if (value := getattr(options, name)) < 1:
            raise ValueError(f"{name}: expected 1 or more, found {value}")
    models = {"tiny": options.model} | dict(map(named, options.beside))
    weights = find_checkpoint(options.model) / "model.safetensors"
    report: dict[str, Any] = {
        "scenes": options.scenes,
        "matched": min(options.matched, options.scenes),
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    with written_whole(options.out) as path:  # asked for now: it can be written
        report["splits"] = {
            name: compared(name, models, options.scenes, options.matched)
            for name in SPLITS
        }
        path.write_text(json.dumps(report, indent=1) + "\n")
    if options.card is not None:
        with written_whole(options.card) as path:
            path.write_text(card(report), encoding="utf8")


if __name__ == "__main__":
    main()
