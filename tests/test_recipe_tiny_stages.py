"""The recipe of stages 2 and 3: a finer picture, a question never asked before."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from pgcore.api import find_checkpoint, load
from pgcore.lab.emoji import TRAIN_STYLES, VALIDATION_STYLE
from pgcore.lab.pretrained import load_emoji_siglip
from pgcore.lab.scenes import compose, split
from pgcore.lab.scoring import Asked
from pgcore.lab.tiny_world import SCENES
from pgcore.processing import IGNORE
from pgcore.recipes import tiny, tiny_stages
from pgcore.recipes.tiny_stages import (
    LARGEST,
    SHOWN,
    TRIES,
    Recipe,
    at_size,
    examined,
    go_on,
    largest,
    lesson_at,
    main,
    mixture_at,
    processor_at,
    run,
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


def test_finer_scenes_show_the_same_things():
    fine = split("validation", world(SCENES, FINE_PROCESSOR), 1)
    coarse = split("validation", SCENES, 1)
    assert fine[1] == coarse[1]
    assert dataclasses.replace(fine[0], size=96) == coarse[0]
    for index in range(20):
        one, other = compose(*fine, index), compose(*coarse, index)
        assert one.image.shape == (192, 192, 3)
        names = [sorted(o.concept for o in scene.objects) for scene in (one, other)]
        assert names[0] == names[1]


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


def test_each_stage_starts_where_it_should(tmp_path, monkeypatch):
    """What goes into ``go_on``, and the marks that it leaves, as a chain."""
    starts, kinds = [], []

    def leaves_a_mark(model, batch_at, steps, rate, recipe, out):
        starts.append({name: w.clone() for name, w in model.state_dict().items()})
        kinds.append((out.name, batch_at.func, steps))
        model.projector.linear.bias.data.add_(1)

    monkeypatch.setattr(tiny_stages, "go_on", leaves_a_mark)
    monkeypatch.setattr(tiny_stages, "examined", lambda *_: {})
    run(dataclasses.replace(SMALL, steps=7, lessons=5), tmp_path, "cpu")
    assert kinds == [
        ("stage_2", mixture_at, 7),
        ("stage_3", lesson_at, 5),
        ("stage_1_gone_on", mixture_at, 7),
        ("stage_3_after_stage_0", lesson_at, 5),
    ]
    two, three, one, zero = starts
    assert same(two, FINE.state_dict()) and same(one, MODEL.state_dict())
    two["projector.linear.bias"] += 1
    assert same(two, three)
    seen = load_emoji_siglip()[0].vision.state_dict()
    for name, weight in seen.items():
        if name != "positions":
            assert torch.equal(zero[f"vision.{name}"], weight)
    assert not torch.equal(
        zero["language.embed_tokens.weight"], MODEL.language.embed_tokens.weight
    )


def test_only_the_right_thing_is_the_largest(monkeypatch):
    said = []

    def answers(model, processor, scenes, todo):
        return [Asked(place, one, said[place], [], []) for place, one in todo]

    monkeypatch.setattr(tiny_stages, "answer", answers)
    monkeypatch.setattr(tiny_stages, "KINDS", ())
    monkeypatch.setattr(tiny_stages, "SHOWN", ())
    recipe = dataclasses.replace(SMALL, examined=4)
    settings, stream = split("validation", SCENES, 1)
    truth = [largest(unequal(settings, stream, n)) for n in range(4, 204, TRIES)]
    for wrong in range(4):
        said[:] = ["nothing"] * wrong + truth[wrong:]
        found = examined(MODEL, PROCESSOR, recipe)["largest"][0]
        assert found == pytest.approx(1 - wrong / 4)


def test_the_command_runs_all_stages_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ["--out", str(tmp_path), "--steps", "1", "--lessons", "1"]
    options += ["--examined", "1"]
    main(options)
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
    main(options)
    assert capsys.readouterr().err.count("step 1 of 1") == 0  # all was done
    other = at_size(MODEL, 96)
    torch.nn.init.zeros_(other.projector.linear.bias)
    with pytest.raises(ValueError, match="written by another recipe"):
        go_on(other, dict, 1, 5e-4, Recipe(steps=1), tmp_path / "stage_1_gone_on")
    assert LARGEST.startswith("answer en ")


def test_what_ships_was_measured_with_this_recipe():
    report = json.loads((find_checkpoint("tiny").parent / "stages.json").read_text())
    assert report["recipe"] == dataclasses.asdict(Recipe())
    assert len(report["stages"]) == 6
