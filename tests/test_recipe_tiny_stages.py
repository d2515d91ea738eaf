"""The recipe of stages 2 and 3: a finer picture, a question never asked before."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from pgcore.api import find_checkpoint, load
from pgcore.lab.emoji import TRAIN_STYLES, VALIDATION_STYLE
from pgcore.lab.scenes import compose, split
from pgcore.lab.tiny_world import SCENES
from pgcore.processing import IGNORE
from pgcore.recipes import tiny, tiny_stages
from pgcore.recipes.tiny_stages import (
    LARGEST,
    SHOWN,
    TRIES,
    Recipe,
    at_size,
    largest,
    lesson_at,
    main,
    mixture_at,
    processor_at,
    unequal,
    world,
)
from pgcore.recipes.tiny_tower import TRAIN
from tests.stopped_runs import same

MODEL, PROCESSOR = load("tiny", device="cpu", dtype="float32")
FINE = at_size(MODEL, 192)
FINE_PROCESSOR = processor_at(PROCESSOR, FINE)
SMALL = Recipe(steps=1, pictures=2, lessons=1, lesson_pictures=2, examined=1)


def codes(mask):
    return [int(1000 * np.asarray(mask).mean()) % 128] * 16


def test_only_positions_change_with_the_size():
    coarse, fine = MODEL.state_dict(), FINE.state_dict()
    assert coarse.keys() == fine.keys()
    for name, weight in coarse.items():
        if name != "vision.positions":
            assert torch.equal(weight, fine[name]), name
    table = fine["vision.positions"].view(16, 16, -1)
    corners = coarse["vision.positions"].view(8, 8, -1)
    assert torch.equal(table[::15, ::15], corners[::7, ::7])
    assert same(at_size(MODEL, 96).state_dict(), coarse)
    assert (FINE_PROCESSOR.image_size, FINE_PROCESSOR.num_image_tokens) == (192, 256)


def test_an_enlarged_scene_is_the_same_scene():
    """So that what is learned on it is the picture's fineness, not its content."""
    fine = split("validation", world(SCENES, FINE_PROCESSOR), 1)
    coarse = split("validation", SCENES, 1)
    assert fine[1] == coarse[1]
    assert dataclasses.replace(fine[0], size=96) == coarse[0]
    assert compose(*fine, 0).image.shape == (192, 192, 3)


@pytest.mark.parametrize(
    ("model", "processor"), [(MODEL, PROCESSOR), (FINE, FINE_PROCESSOR)]
)
def test_batches_depend_on_their_step_alone_and_teach(model, processor):
    for draw in (
        lambda step: mixture_at(SMALL, processor, codes, step),
        lambda step: lesson_at(SMALL, processor, step),
    ):
        batch = draw(3)
        assert same(batch, draw(3))
        assert not torch.equal(batch["pixel_values"], draw(4)["pixel_values"])
        assert batch["pixel_values"].shape[-1] == processor.image_size
        with torch.no_grad():
            assert tiny.loss_of(model, batch).isfinite()
    answers = batch["labels"][batch["labels"] != IGNORE]
    known = [n.replace(" ", "") for n in SCENES.concepts]
    text = processor.tokenizer.decode(answers.tolist(), skip_special_tokens=True)
    assert any(name in text.replace(" ", "") for name in known)


def test_the_largest_thing_is_the_one_with_the_most_pixels():
    settings, stream = split("validation", SCENES, 1)
    clear = 0
    for index in range(60):
        scene = compose(settings, stream, index)
        sizes = np.bincount(scene.segments.ravel(), minlength=2)[1:]
        order = np.argsort(sizes)
        if len(sizes) > 1 and sizes[order[-1]] >= 1.5 * sizes[order[-2]]:
            assert largest(scene) == scene.objects[order[-1]].concept
            clear += 1
        else:
            assert largest(scene) is None
    assert 10 < clear < 50


def test_scenes_of_the_lesson_have_an_answer_and_never_come_twice():
    settings, stream = split("train", TRAIN, 3)
    scenes = [unequal(settings, stream, start) for start in range(0, 500, TRIES)]
    assert None not in [largest(scene) for scene in scenes]
    assert len({scene.index for scene in scenes}) == 10
    assert settings.styles == TRAIN_STYLES and VALIDATION_STYLE not in settings.styles
    alone = dataclasses.replace(settings, objects=(1, 1))
    with pytest.raises(ValueError, match="50 scenes from 7 on"):
        unequal(alone, stream, 7)


def test_the_command_runs_all_stages_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tiny_stages, "Recipe", lambda **_: SMALL)
    main(["--out", str(tmp_path)])
    report = json.loads((tmp_path / "stages.json").read_text())
    pixels = {stage["name"]: stage["pixels"] for stage in report["stages"]}
    assert pixels == {
        "stage 1": 96,
        "stage 1 enlarged": 192,
        "stage 2": 192,
        "stage 3": 192,
        "stage 1 gone on": 96,
        "stage 3 after stage 0": 192,
    }
    for stage in report["stages"]:
        assert list(stage["figures"]) == [*SHOWN, "largest"]
    assert capsys.readouterr().err.count("step 1 of 1") == 4
    main(["--out", str(tmp_path)])
    assert capsys.readouterr().err.count("step 1 of 1") == 0  # all was done
    assert LARGEST.startswith("answer en ")


def test_what_ships_was_measured_with_this_recipe():
    report = json.loads((find_checkpoint("tiny").parent / "stages.json").read_text())
    assert report["recipe"] == dataclasses.asdict(Recipe())
    assert len(report["stages"]) == 6
