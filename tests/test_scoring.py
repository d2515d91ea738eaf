"""Scores of answers about scenes: right answers get all, wrong ones nothing."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from pgcore.grounding import load_mask_codec
from pgcore.lab.scene_language import all_examples, caption
from pgcore.lab.scenes import compose_batch, split
from pgcore.lab.scoring import (
    FIGURES,
    Asked,
    _matched,
    figure,
    interval,
    named_in,
    questions,
    scores,
)
from pgcore.lab.tiny_world import CONCEPTS, SCENES

KINDS = ("caption", "count", "presence", "relation", "detect", "segment")
SCENES_SEEN = compose_batch(*split("test-scenes", SCENES), 0, 12)
CODEC = load_mask_codec()


def encode(mask):
    return CODEC.encode(torch.from_numpy(mask)[None])[0].tolist()


def told(scene, place, change=lambda text: text, share=0.9):
    """What a model would have said that knows all, or that changes each answer."""
    known = {e.prompt: e for e in all_examples(scene, encode_mask=encode)}
    asked = []
    for example in questions(scene, KINDS):
        text = change(known[example.prompt].answer)
        tokens = ["<loc"] * text.count("<loc")
        asked.append(Asked(place, example, text, [share] * len(tokens), tokens))
    return asked


def figures(asked):
    found = scores(asked, SCENES_SEEN, CODEC)
    return {name: figure(name, found[name]) for name in FIGURES}


def everything(**how):
    return [a for n, s in enumerate(SCENES_SEEN) for a in told(s, n, **how)]


def test_who_knows_all_gets_all():
    found = figures(everything())
    masks = found.pop("segment mIoU")
    boxes = found.pop("detect mIoU")
    assert all(value == 1 for value in found.values()), found
    assert boxes > 0.97  # a box is rounded to 1023rds
    assert 0.8 < masks < 1  # sixteen tokens say a mask roughly


def test_who_says_nothing_gets_nothing():
    found = figures(everything(change=lambda text: ""))
    assert all(value == 0 for value in found.values()), found


def test_another_order_of_a_caption_names_the_same_things():
    assert named_in("a cat and two red apples", CONCEPTS) == {"cat", "red apple"}
    assert named_in("two red apples and a cat", CONCEPTS) == {"cat", "red apple"}
    assert named_in("a cat and a zebra", CONCEPTS) is None
    assert named_in("four cats", CONCEPTS) == {"cat"}
    assert named_in("", CONCEPTS) is None


@pytest.mark.parametrize("scene", SCENES_SEEN, ids=lambda s: str(s.index))
def test_a_caption_names_what_is_in_the_scene(scene):
    named = named_in(caption(scene), CONCEPTS)
    assert named == {thing.concept for thing in scene.objects}


def test_one_thing_too_many_is_wrong():
    wrong = everything(change=lambda text: f"{text} and a cat")
    right = [a for a in everything() if a.example.kind == "caption"]
    there = [any(o.concept == "cat" for o in s.objects) for s in SCENES_SEEN]
    found = figures([a for a in wrong if a.example.kind == "caption"])
    assert found["caption objects"] == np.mean(there)
    assert figures(right)["caption objects"] == 1


def test_one_thing_too_few_is_wrong():
    def without_the_last(text):
        return text.rpartition(" and ")[0] or "a zebra"

    asked = [a for a in everything() if a.example.kind == "caption"]
    short = [dataclasses.replace(a, answer=without_the_last(a.answer)) for a in asked]
    assert figures(short)["caption objects"] == 0


@pytest.mark.parametrize("kind", ["presence", "relation"])
def test_each_kind_of_question_counts(kind):
    asked = [a for a in everything() if a.example.kind in ("presence", "relation")]
    one = next(a for a in asked if a.example.kind == kind)
    wrong = [
        dataclasses.replace(a, answer="none of these") if a is one else a for a in asked
    ]
    assert figures(wrong)["answers"] == pytest.approx(1 - 1 / len(asked))


def test_one_box_is_one_thing():
    assert _matched(np.array([[0.9, 0.8]]), 2) == [0.9, 0.0]
    assert _matched(np.array([[0.9, 0.8], [0.7, 0.1]]), 2) == [0.9, 0.1]
    assert _matched(np.array([]), 2) == [0.0, 0.0]


def test_a_box_is_as_sure_as_the_mean_of_its_tokens():
    scene = SCENES_SEEN[0]
    example = next(e for e in questions(scene, ("detect",)) if len(e.objects) == 1)
    tokens = ["<loc"] * 4 + ["cat"]
    asked = Asked(0, example, example.answer or "", [0.1, 0.2, 0.3, 1.0, 0.5], tokens)
    [(confidence, _, _)] = scores([asked], [scene], CODEC)["detect AP50"][0]
    assert confidence == pytest.approx([0.4])


def test_a_box_in_the_wrong_order_of_axes_is_worth_little():
    def swapped(text):
        for a in all_locs(text):
            top, left, bottom, right = (a[n : n + 9] for n in range(0, 36, 9))
            text = text.replace(a, left + top + right + bottom)
        return text

    assert figures(everything(change=swapped))["detect mIoU"] < 0.5


def all_locs(text):
    return [text[n : n + 36] for n in range(len(text)) if text[n:].startswith("<loc")][
        ::4
    ]


def test_the_second_box_on_one_thing_is_no_hit():
    doubled = everything(change=lambda text: f"{text} ; {text}")
    only = [a for a in doubled if a.example.kind == "detect"]
    assert figures(only)["detect mIoU"] > 0.97
    hits = [hit for a in only for hit in [1, 0] * len(a.example.objects)]
    reference = average_precision_score(hits, np.ones(len(hits)))
    assert figures(only)["detect AP50"] == pytest.approx(reference)


def test_a_broken_box_shifts_no_confidence():
    """The first box has three places: the second keeps its own probabilities."""
    scene = SCENES_SEEN[0]
    example = next(e for e in questions(scene, ("detect",)))
    text = f"<loc0001><loc0002><loc0003> cat ; {example.answer}"
    tokens = ["<loc"] * text.count("<loc")
    asked = Asked(0, example, text, [0.1] * 3 + [0.8] * (len(tokens) - 3), tokens)
    [(confidence, ious, truths)] = scores([asked], [scene], CODEC)["detect AP50"][0]
    assert confidence == pytest.approx([0.8] * len(example.objects))
    assert len(ious) == truths == len(example.objects)


def test_intervals_hold_the_figure_and_shrink_with_scenes():
    rng = np.random.default_rng(0)
    rows = [[bool(rng.random() < 0.7)] for _ in range(400)]
    low, high = interval("count", rows)
    assert low < figure("count", rows) < high
    share = figure("count", rows)
    binomial = 2 * 1.96 * (share * (1 - share) / 400) ** 0.5
    assert high - low == pytest.approx(binomial, rel=0.05)


def test_a_figure_of_nothing_is_no_number():
    assert np.isnan(figure("count", [[], []]))


def test_things_asked_for_are_there():
    for scene in SCENES_SEEN:
        for example in questions(scene, ("detect", "segment")):
            assert example.objects and " ; " not in example.prompt


def test_a_mask_outside_its_box_is_worth_nothing():
    def moved(text):
        for box in all_locs(text):
            text = text.replace(box, "<loc0000><loc0000><loc0011><loc0011>")
        return text

    found = figures(everything(change=moved))
    assert found["segment mIoU"] < 0.05 and found["detect AP50"] < 0.05


def test_scores_do_not_depend_on_the_order_of_questions():
    asked = everything()
    assert figures(asked) == pytest.approx(figures(asked[::-1]))


def test_scenes_of_another_size_have_the_same_scores():
    scene = compose_batch(
        *split("test-scenes", dataclasses.replace(SCENES, size=192)), 0, 1
    )[0]
    asked = told(scene, 0)
    found = scores(asked, [scene], CODEC)
    assert figure("detect mIoU", found["detect mIoU"]) > 0.98


@pytest.mark.parametrize("kind", ["detect", "segment"])
def test_a_thing_under_another_name_is_not_found(kind):
    """Its box and its mask are right, what they are said to be is not."""
    asked = [a for a in everything() if a.example.kind == kind]
    names = {thing.concept for a in asked for thing in a.example.objects}
    wrong = [
        dataclasses.replace(a, answer=a.answer.replace(name, "zebra"))
        for a in asked
        for name in names & {thing.concept for thing in a.example.objects}
    ]
    assert len(wrong) == len(asked) and all("zebra" in a.answer for a in wrong)
    right, found = figures(asked), figures(wrong)
    for name in ("detect AP50", "detect mIoU", "segment mIoU"):
        if name.startswith(kind):
            assert right[name] > 0.8 and found[name] == 0
