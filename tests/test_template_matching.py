"""The pipeline without learning: it finds what it has seen, and answers of it."""

import dataclasses

import numpy as np
import pytest

from pgcore.lab.scenes import SceneSettings, compose, split
from pgcore.lab.scoring import questions
from pgcore.lab.template_matching import answers, as_scene, match
from pgcore.lab.tiny_world import CONCEPTS, SCENES

PLAIN = SceneSettings(
    styles=("noto",), concepts=CONCEPTS, objects=(1, 1), backgrounds=("plain",),
    clutter=0, alone_side=(0.5, 0.5), same_kind=0.0,
)  # fmt: skip


@pytest.mark.parametrize("index", range(5))
def test_a_known_drawing_is_found_where_it_is(index):
    scene = compose(PLAIN, 3, index)
    (thing,) = scene.objects
    best = match(scene, 0.3)[0]
    assert best.concept == thing.concept
    # Windows of 40 and 48 pixels are neighbours: an edge may be 4 pixels off.
    assert np.abs(np.subtract(best.box, thing.box)).max() <= 4
    shared = (best.mask & thing.mask).sum() / (best.mask | thing.mask).sum()
    assert shared > 0.6


def test_nothing_is_found_on_a_grey_picture():
    scene = compose(PLAIN, 3, 0)
    grey = dataclasses.replace(scene, image=np.full_like(scene.image, 128))
    assert match(grey, 0.3) == []


def test_nothing_is_found_over_another():
    """However much a drawing may differ: of one place, one thing."""
    scene = compose(PLAIN, 3, 0)
    found = match(scene, 2.0, most=2)
    assert len(found) == 2
    covered = np.zeros_like(found[0].mask)
    for one in found:
        assert (one.mask & covered).sum() <= 0.2 * one.mask.sum()
        covered |= one.mask


def test_what_was_found_answers_as_a_scene():
    scene = compose(*split("test-scenes", SCENES), 2)
    found = match(scene, 0.3)
    seen = as_scene(scene, found)
    assert [o.concept for o in seen.objects] == [
        one.concept for one in sorted(found, key=lambda one: one.box[1])
    ]
    asked = questions(scene, ("caption", "count", "presence", "detect"))
    told = answers(scene, 0, asked, found, lambda mask: [0] * 16)
    assert [one.example for one in told] == list(asked)
    for one in told:
        assert len(one.tokens) == len(one.probabilities) == one.answer.count("<loc")


def test_nothing_found_says_no_and_none():
    scene = compose(PLAIN, 3, 0)
    asked = questions(scene, ("caption", "count", "presence", "detect"))
    told = answers(scene, 0, asked, [], lambda mask: [0] * 16)
    said = {one.example.kind: one.answer for one in told}
    assert said == {"caption": "", "count": "0", "presence": "no", "detect": ""}
