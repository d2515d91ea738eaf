"""From which split each recipe draws, seen where scenes are made."""

import json
from functools import partial

import numpy as np
import pytest

from pgcore.api import load
from pgcore.lab.emoji import TEST_STYLE, TRAIN_STYLES, VALIDATION_STYLE
from pgcore.lab.scenes import SPLITS, compose_batch, split
from pgcore.lab.tiny_world import SCENES
from pgcore.processing import load_processor
from pgcore.recipes import (
    _coarse_scenes,
    ablations,
    tiny,
    tiny_eval,
    tiny_stages,
    tiny_tower,
)
from pgcore.recipes.tiny_tokenizer import FOLDER

PROCESSOR = load_processor(FOLDER)
MIXTURE = tiny.Recipe(steps=8, easy=2, hard=4, alone=2, decay=2, pictures=2)
STAGES = tiny_stages.Recipe(pictures=2, lesson_pictures=2, examined=2)
ARM = ablations.Recipe(arm="as it is", seed=2, steps=1, rows=2, watched=2)


def codes(mask):
    return [0] * 16


@pytest.fixture
def composed(monkeypatch):
    """(split, stream, index, artists) of each scene that a recipe has drawn."""
    seen = []

    def watch(module):
        real = module.compose

        def watched(settings, stream, index):
            seen.append((SPLITS[stream >> 64], stream, index, settings.styles))
            return real(settings, stream, index)

        monkeypatch.setattr(module, "compose", watched)

    for module in (tiny, tiny_tower, tiny_stages, _coarse_scenes):
        watch(module)
    return seen


@pytest.mark.parametrize(
    "batch_at",
    [
        partial(tiny.batch_at, MIXTURE, PROCESSOR, codes),
        partial(tiny_tower.batch_at, tiny_tower.Recipe(pictures=2)),
        partial(tiny_stages.mixture_at, STAGES, PROCESSOR, codes),
        partial(tiny_stages.lesson_at, STAGES, PROCESSOR),
        partial(ablations.batch_at, ARM, PROCESSOR),
    ],
    ids=["tiny", "tower", "stage 2", "stage 3", "ablations"],
)
def test_batches_are_of_the_train_split_and_never_come_twice(batch_at, composed):
    steps = range(8)
    for step in steps:
        batch_at(step)
    assert {name for name, *_ in composed} == {"train"}
    assert {styles for *_, styles in composed} == {TRAIN_STYLES}
    drawn = [(stream, index) for _, stream, index, _ in composed]
    assert len(set(drawn)) == len(drawn) >= 2 * len(steps)


def test_stages_have_streams_of_their_own(composed):
    streams = []
    for batch_at in (
        partial(tiny.batch_at, MIXTURE, PROCESSOR, codes),
        partial(tiny_tower.batch_at, tiny_tower.Recipe(pictures=2)),
        partial(tiny_stages.mixture_at, STAGES, PROCESSOR, codes),
        partial(tiny_stages.lesson_at, STAGES, PROCESSOR),
    ):
        composed.clear()
        batch_at(0)
        streams.append({stream for _, stream, _, _ in composed})
    assert len(set.union(*streams)) == len(streams)


def test_exams_are_of_their_splits(composed, monkeypatch, tmp_path):
    monkeypatch.setattr(ablations, "fit", lambda *_, **__: None)
    ablations.train(ARM, tmp_path, PROCESSOR)
    artists = {name: set(styles) for name, _, _, styles in composed}
    assert artists == {
        "test-scenes": set(TRAIN_STYLES),
        "validation": {VALIDATION_STYLE},
    }
    composed.clear()
    monkeypatch.setattr(tiny_stages, "ask", lambda *_: [])
    monkeypatch.setattr(tiny_stages, "answer", lambda *_: [])
    monkeypatch.setattr(tiny_eval, "interval", lambda *_: (0.0, 1.0))
    tiny_stages.examined(load("tiny", device="cpu")[0], PROCESSOR, STAGES)
    assert {name for name, *_ in composed} == {"validation"}


def test_a_blind_model_sees_grey_and_the_scenes_stay_as_they_are():
    scenes = compose_batch(*split("validation", SCENES), 0, 3)
    before = [scene.image.copy() for scene in scenes]
    for grey, scene, own in zip(tiny_eval.blind(scenes), scenes, before, strict=True):
        assert (grey.image == 128).all() and grey.objects == scene.objects
        assert np.array_equal(scene.image, own)


def test_the_scores_are_of_the_splits_that_they_name(tmp_path, monkeypatch):
    asked = []

    def watched(model, processor, scenes, kinds):
        asked.append([(scene.seed, scene.index) for scene in scenes])
        grey = all((scene.image == scene.image[0, 0]).all() for scene in scenes)
        assert grey == (len(asked) % 3 == 0)  # tiny, the one beside it, then blind
        return []

    monkeypatch.setattr(tiny_eval, "ask", watched)
    monkeypatch.setattr(tiny_eval, "load", lambda source, dtype: (source, None))
    monkeypatch.setattr(
        tiny_eval, "measured", lambda _, scenes: {"n": [1.0 * len(scenes), 0.0, 1.0]}
    )
    out = tmp_path / "new" / "scores.json"
    options = ["--scenes", "3", "--matched", "1", "--beside", "other=folder"]
    card = tmp_path / "another" / "card.md"
    tiny_eval.main(["--out", str(out), *options, "--card", str(card)])
    report = json.loads(out.read_text())
    written = card.read_text(encoding="utf8")
    assert "| n | 3.00 (0.00–1.00) | 3.00 | 3.00 | 1.00 |" in written
    assert "on 3 scenes of each group" in written
    assert "no learning, on 1 of the scenes" in written
    assert report["scenes"] == 3 and report["matched"] == 1
    for name, rows in zip(tiny_eval.SPLITS, (asked[:3], asked[3:]), strict=True):
        settings, stream = split(name, SCENES, tiny_eval.SEED)
        artist = {"test-scenes": TRAIN_STYLES, "test-artist": (TEST_STYLE,)}[name]
        assert settings.styles == artist
        assert rows == [[(stream, index) for index in range(3)]] * 3
        found = report["splits"][name]
        assert {title: one["n"][0] for title, one in found.items()} == {
            "tiny": 3,
            "other": 3,
            "blind": 3,
            "nearest drawing": 1,
        }


@pytest.mark.parametrize("wrong", ["folder", "=folder", "name=", "blind=folder"])
def test_a_model_beside_it_has_a_name_of_its_own(wrong, tmp_path):
    out = str(tmp_path / "scores.json")
    with pytest.raises(ValueError, match="beside: expected NAME=FOLDER"):
        tiny_eval.main(["--out", out, "--beside", wrong])


@pytest.mark.parametrize("name", ["scenes", "matched"])
def test_scores_of_no_scenes_are_refused(name, tmp_path):
    out = tmp_path / "new" / "scores.json"
    with pytest.raises(ValueError, match=f"^{name}: expected 1 or more, found 0$"):
        tiny_eval.main(["--out", str(out), f"--{name}", "0"])
    assert not out.parent.exists()


def test_a_place_that_cannot_be_written_is_said_before_anything_is_asked(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(tiny_eval, "compared", lambda *_: pytest.fail("asked"))
    with pytest.raises(ValueError, match="expected a file to write, found a folder"):
        tiny_eval.main(["--out", str(tmp_path)])
