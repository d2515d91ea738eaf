"""Prompts and answers about scenes: right, unambiguous, in PaliGemma's words."""

import hashlib
import itertools
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgcore.lab import _english as english
from pgcore.lab.emoji import CONCEPTS, names
from pgcore.lab.scene_language import (
    CAPTION_LANGUAGES,
    KINDS,
    Example,
    all_examples,
    box_mask,
    caption,
    choose_examples,
    loc_tokens,
)
from pgcore.lab.scenes import (
    Scene,
    SceneObject,
    SceneSettings,
    compose,
    compose_batch,
    held_out,
)

ROOT = Path(__file__).parents[1]
SETTINGS = SceneSettings(objects=(1, 4))
SCENES = compose_batch(SETTINGS, 11, 0, 100)
EXAMPLES_SHA256 = "6c8999206b3269e1be485d82f9983f9602651e9b45b3900bb00ae96c140723f6"
PRINT_DIGEST = """
from tests.test_scene_language import digest_of_examples
print(digest_of_examples())
"""


def digest_of_examples() -> str:
    digest = hashlib.sha256()
    for scene in SCENES:
        asked = all_examples(scene, encode_mask=lambda mask: range(16))
        asked += choose_examples(scene, 3, seed=5)
        for example in asked:
            digest.update(f"{example.kind}|{example.prompt}|{example.answer}".encode())
    return digest.hexdigest()


def ordered(mask: np.ndarray) -> list[int]:
    """Code a mask by 16 strips, so that each mask has its own codes."""
    return [int(strip.mean() * 127) for strip in mask.reshape(16, 4, 64)]


def asked(kind: str, **arguments) -> list[tuple[Scene, Example]]:
    return [
        (scene, example)
        for scene in SCENES
        for example in all_examples(scene, (kind,), **arguments)
    ]


def number_of(scene: Scene, concept: str) -> int:
    return sum(thing.concept == concept for thing in scene.objects)


def put(*things: tuple[str, tuple[int, int, int, int]]) -> Scene:
    """Make a scene of our own: concepts and boxes of full rectangles, 96 pixels."""
    segments = np.zeros((96, 96), np.uint8)
    for place, (_, (top, left, bottom, right)) in enumerate(things):
        segments[top:bottom, left:right] = place + 1
    return Scene(
        image=np.zeros((96, 96, 3), np.uint8),
        objects=tuple(
            SceneObject(concept, "noto", box, 1.0, place, segments)
            for place, (concept, box) in enumerate(things)
        ),
        segments=segments,
        settings=SETTINGS,
        seed=0,
        index=0,
    )


def told(scene: Scene, kind: str, **arguments) -> dict[str, str | None]:
    return {
        example.prompt: example.answer
        for example in all_examples(scene, (kind,), **arguments)
    }


CAT, DOG, OWL = (20, 10, 40, 30), (20, 60, 40, 80), (60, 60, 80, 80)
THREE = put(("cat", CAT), ("dog", DOG), ("owl", OWL))
TWO_CATS = put(("cat", CAT), ("red apple", DOG), ("cat", OWL))
NOTHING = put()


# Each kind, by hand


def test_captions_by_hand():
    assert caption(TWO_CATS) == "two cats and a red apple"
    assert caption(TWO_CATS, "de") == "2 × Katze und roter Apfel"
    assert caption(TWO_CATS, "fr") == "2 × chat et pomme rouge"
    assert caption(TWO_CATS, "es") == "2 × gato y manzana roja"
    assert caption(THREE) == "a cat, a dog and an owl"
    assert caption(put(("grapes", CAT))) == "grapes"
    assert caption(put(("jeans", CAT), ("jeans", DOG))) == "two pairs of jeans"
    assert caption(put(("cat", CAT), ("church", DOG)), "es") == "gato e iglesia"
    assert caption(put(("cat", CAT), ("shaved ice", DOG)), "es").startswith("gato y g")
    assert caption(put(("cat", CAT), ("herb", DOG)), "es") == "gato y hierba"


def test_answers_by_hand():
    counts = told(TWO_CATS, "count")
    assert counts.pop("answer en how many cats?") == "2"
    assert counts.pop("answer en how many red apples?") == "1"
    assert list(counts.values()) == ["0"]
    presences = told(TWO_CATS, "presence")
    assert presences.pop("answer en is there a cat?") == "yes"
    assert presences.pop("answer en is there a red apple?") == "yes"
    assert list(presences.values()) == ["no", "no"]


def test_relations_by_hand():
    assert told(THREE, "relation") == {
        "answer en what is left of the dog?": "cat",
        "answer en what is below the dog?": "owl",
    }  # the owl might be called right of the cat, and the cat above the owl
    one_row = put(("cat", CAT), ("dog", (20, 35, 40, 55)), ("owl", (20, 70, 40, 90)))
    assert told(one_row, "relation") == {
        "answer en what is right of the dog?": "owl",
        "answer en what is left of the dog?": "cat",
    }  # both the dog and the owl are right of the cat
    pair = put(("cat", CAT), ("owl", (20, 40, 40, 60)), ("cat", (20, 70, 40, 90)))
    assert told(pair, "relation") == {
        "answer en what is left of the owl?": "cat",
        "answer en what is right of the owl?": "cat",
    }  # which cat is meant could not be said
    assert told(put(("cat", CAT), ("owl", OWL)), "relation") == {}  # aslant


def test_boxes_by_hand():
    cat, dog = "<loc0213><loc0107><loc0426><loc0320>", "<loc0213><loc0639>"
    prompts = told(THREE, "detect")
    assert prompts["detect cat"] == f"{cat} cat"
    assert prompts["detect dog"] == f"{dog}<loc0426><loc0852> dog"
    both = told(TWO_CATS, "detect")["detect cat"]
    assert both == f"{cat} cat ; <loc0639><loc0639><loc0852><loc0852> cat"
    assert told(THREE, "region")[f"caption {cat}"] == "cat"
    masks = told(THREE, "segment", encode_mask=lambda mask: range(16))
    tokens = "".join(f"<seg{code:03d}>" for code in range(16))
    assert masks["segment cat"] == f"{cat}{tokens} cat"
    assert told(THREE, "segment") == dict.fromkeys(masks)


# Every scene


def test_examples_never_change():
    assert digest_of_examples() == EXAMPLES_SHA256
    printed = subprocess.run(
        [sys.executable, "-c", PRINT_DIGEST],
        env=os.environ | {"PYTHONHASHSEED": "77"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert printed == EXAMPLES_SHA256


def test_counts_count_and_one_is_nought():
    plurals = {english.many(concept): concept for concept in CONCEPTS}
    noughts = Counter()
    for scene, example in asked("count"):
        question = re.fullmatch(r"answer en how many (.+)\?", example.prompt)
        number = number_of(scene, plurals[question[1]])
        assert example.answer == str(number) == str(len(example.objects))
        noughts[scene.index] += number == 0
    assert set(noughts.values()) == {1}


def test_presence_is_balanced_and_true():
    questions = {f"answer en {english.is_there(c)}?": c for c in CONCEPTS}
    answers = Counter()
    for scene, example in asked("presence"):
        concept = questions[example.prompt]
        there = number_of(scene, concept)
        assert example.answer == ("yes" if there else "no")
        assert len(example.objects) == there
        answers[example.answer] += 1
        if not there:  # nor does the question tell, by a pair that never meets
            assert not any(held_out(concept, o.concept) for o in scene.objects)
    assert answers["yes"] == answers["no"] > 100


def test_relations_agree_with_angles():
    """By brute force, with angles between centres instead of integers."""
    headings = {"left of": 180, "right of": 0, "above": 90, "below": 270}
    number = 0
    for scene in SCENES:
        wanted = {}
        for (heading, at), thing in itertools.product(headings.items(), scene.objects):
            if number_of(scene, thing.concept) > 1:
                continue
            top, left, bottom, right = thing.box
            possible, clear = set(), 0
            for other in scene.objects:
                y = (other.box[0] + other.box[2]) / 2
                x = (other.box[1] + other.box[3]) / 2
                up, across = (top + bottom) / 2 - y, x - (left + right) / 2
                off = abs((math.degrees(math.atan2(up, across)) - at + 180) % 360 - 180)
                if other is thing or (up, across) == (0, 0):
                    continue
                if off < math.degrees(math.atan2(3, 2)) - 1e-9:
                    possible.add(other.concept)
                beyond = {"left of": left - x, "right of": x - right}
                beyond |= {"above": top - y, "below": y - bottom}
                close = off <= math.degrees(math.atan2(2, 3)) + 1e-9
                clear += close and beyond[heading] >= 3
            if clear and len(possible) == 1:
                prompt = f"answer en what is {heading} {english.the(thing.concept)}?"
                wanted[prompt] = possible.pop()
        assert told(scene, "relation") == wanted
        number += len(wanted)
    assert number > 70


def test_what_is_left_of_one_has_it_on_its_right():
    for scene, example in asked("relation"):
        if len(scene.objects) == 2:
            turned = {"left of": "right of", "above": "below"}
            turned |= {there: here for here, there in turned.items()}
            here = next(word for word in turned if word in example.prompt)
            (other,) = (o for o in scene.objects if o not in example.objects)
            name = english.the(example.answer)
            back = told(scene, "relation").get(
                f"answer en what is {turned[here]} {name}?", other.concept
            )
            assert back == other.concept


BOX = r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})>"


def near(tokens: tuple[str, ...], thing: SceneObject, size: int) -> bool:
    errors = [
        abs(int(token) / 1023 - edge / size)
        for token, edge in zip(tokens, thing.box, strict=True)
    ]
    return max(errors) <= 0.5 / 1023 + 1e-12


def test_detections_parse_back_to_the_boxes():
    left_out = 0
    for scene, example in asked("detect"):
        wanted = example.prompt.removeprefix("detect ").split(" ; ")
        parts = example.answer.split(" ; ")
        assert len(parts) == len(example.objects) > 0
        for part, thing in zip(parts, example.objects, strict=True):
            found = re.fullmatch(rf"{BOX} (.+)", part)
            assert found and found[5] == thing.concept
            assert near(found.groups()[:4], thing, 96)
        inside = [thing for name in wanted for thing in scene.objects
                  if thing.concept == name]  # fmt: skip
        assert inside == list(example.objects)
        left_out += len({o.concept for o in example.objects}) < len(wanted)
    assert left_out == len(SCENES)  # one question a scene names an absent concept


def test_segments_carry_box_mask_and_name():
    for scene, example in asked("segment", encode_mask=ordered):
        for part, thing in zip(
            example.answer.split(" ; "), example.objects, strict=True
        ):
            found = re.fullmatch(rf"{BOX}((?:<seg\d{{3}}>){{16}}) (.+)", part)
            assert near(found.groups()[:4], thing, 96)
            codes = [int(code) for code in re.findall(r"\d{3}", found[5])]
            assert codes == ordered(box_mask(thing))
            assert found[6] == thing.concept
        assert len(example.objects) == number_of(scene, found[6])


def test_regions_name_what_is_in_the_box():
    for _, example in asked("region"):
        found = re.fullmatch(f"caption {BOX}", example.prompt)
        assert near(found.groups(), example.objects[0], 96)
        assert example.answer == example.objects[0].concept
    assert sum(len(scene.objects) for scene in SCENES) == len(asked("region"))


@pytest.mark.parametrize("language", CAPTION_LANGUAGES)
def test_captions_name_every_object_once(language):
    for scene in SCENES:
        text = caption(scene, language)
        kinds = list(dict.fromkeys(thing.concept for thing in scene.objects))
        if language == "en":
            parts = [english.counted(kind, number_of(scene, kind)) for kind in kinds]
        else:
            parts = [
                f"{number_of(scene, kind)} × {name}".removeprefix("1 × ")
                for kind, name in zip(kinds, names(language, kinds), strict=True)
            ]
        places = [text.find(part) for part in parts]
        assert -1 not in places and places == sorted(places)
        assert len(text) <= sum(map(len, parts)) + 5 * len(parts)


def test_no_two_concepts_are_told_alike():
    for form in (english.one, english.the, english.many, english.is_there):
        told = [form(concept) for concept in CONCEPTS]
        assert len(set(told)) == len(CONCEPTS), form
    for concept in CONCEPTS:
        assert " ; " not in concept and "<" not in concept


@pytest.mark.parametrize(
    ("concept", "one", "many"),
    [
        ("ewe", "a ewe", "ewes"),
        ("unicorn", "a unicorn", "unicorns"),
        ("umbrella", "an umbrella", "umbrellas"),
        ("hourglass done", "an hourglass done", "hourglasses done"),
        ("mouse", "a mouse", "mice"),
        ("computer mouse", "a computer mouse", "computer mice"),
        ("mouse face", "a mouse face", "mouse faces"),
        ("fallen leaf", "a fallen leaf", "fallen leaves"),
        ("strawberry", "a strawberry", "strawberries"),
        ("monkey", "a monkey", "monkeys"),
        ("tropical fish", "a tropical fish", "tropical fish"),
        ("wine glass", "a wine glass", "wine glasses"),
        ("glasses", "glasses", "pairs of glasses"),
        ("bread", "bread", "portions of bread"),
        ("chart increasing", "a chart increasing", "charts increasing"),
    ],
)
def test_english_forms(concept, one, many):
    assert concept in CONCEPTS
    assert (english.one(concept), english.many(concept)) == (one, many)


# Boxes and masks


@given(size=st.integers(1, 2048), data=st.data())
def test_loc_tokens_err_by_half_a_token_at_most(size, data):
    edges = st.integers(0, size)
    top, bottom = sorted(data.draw(st.tuples(edges, edges)))
    left, right = sorted(data.draw(st.tuples(edges, edges)))
    box = (top, left, bottom, right)
    if top == bottom or left == right:
        with pytest.raises(ValueError, match="not empty"):
            loc_tokens(box, size)
        return
    found = re.fullmatch(BOX, loc_tokens(box, size))
    for token, edge in zip(found.groups(), box, strict=True):
        assert 0 <= int(token) <= 1023
        assert abs(int(token) * size - edge * 1023) * 2 <= size  # in integers


def test_box_masks_fill_their_frame():
    full = box_mask(THREE.objects[0])
    assert full.shape == (64, 64) and full.dtype == np.float32 and (full == 1).all()
    for scene in SCENES[:40]:
        for thing in scene.objects:
            mask = box_mask(thing)
            assert mask.min() >= 0 and mask.max() == 1
            top, left, bottom, right = thing.box
            whole = thing.mask.sum() / ((bottom - top) * (right - left))
            assert abs(mask.mean() - whole) < 0.02
            for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1]):
                assert edge.max() > 0.2  # the box is tight


# Choosing


def test_chosen_examples_are_some_of_all_and_differ():
    for scene in SCENES[:20]:
        every = {(e.kind, e.prompt, e.answer) for e in all_examples(scene, seed=4)}
        some = [(e.kind, e.prompt, e.answer) for e in choose_examples(scene, 5, seed=4)]
        assert len(set(some)) == 5 and set(some) <= every
        assert len(choose_examples(scene, 10**3, seed=4)) == len(all_examples(scene))
        assert choose_examples(scene, 0) == ()
        assert all_examples(scene, ()) == choose_examples(scene, 3, ()) == ()


def test_choosing_depends_on_the_seed_alone():
    def prompts(seed: int) -> list[str]:
        return [
            example.prompt
            for scene in SCENES[:30]
            for example in choose_examples(scene, 2, seed=seed)
        ]

    assert prompts(1) == prompts(1) != prompts(2)


def test_asking_fewer_kinds_changes_no_question():
    for scene in SCENES[:15]:
        every = all_examples(scene)
        for kind in KINDS:
            alone = [(e.prompt, e.answer) for e in all_examples(scene, (kind,))]
            assert alone == [(e.prompt, e.answer) for e in every if e.kind == kind]


def test_kinds_come_up_alike_and_by_weight():
    kinds = Counter(
        choose_examples(scene, 1, seed=seed)[0].kind
        for seed in range(4)
        for scene in SCENES
    )
    assert set(kinds) == set(KINDS)
    for kind in set(KINDS) - {"relation"}:  # 400 of 6 to 7 kinds
        assert 30 < kinds[kind] < 95
    twice = Counter(
        choose_examples(scene, 1, ("detect", "detect", "count"))[0].kind
        for scene in SCENES
    )
    assert 50 < twice["detect"] < 84


def test_masks_are_encoded_only_when_asked():
    calls = []

    def encode(mask):
        calls.append(mask)
        return range(16)

    for scene in SCENES[:40]:
        for example in choose_examples(scene, 1, encode_mask=encode):
            assert (example.kind == "segment") == bool(calls)
            assert len(calls) == (example.kind == "segment") * len(example.objects)
        calls.clear()


def test_a_world_of_one_concept_has_nothing_absent():
    scene = compose(SceneSettings(concepts=("cat",), objects=(2, 2)), 0, 0)
    assert told(scene, "presence") == {}
    assert told(scene, "count") == {"answer en how many cats?": "2"}
    assert list(told(scene, "detect")) == ["detect cat"]
    assert told(scene, "relation") == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: caption(THREE, "ja"), r"caption language 'ja' \(known: en, de, fr"),
        (lambda: all_examples(THREE, ("cuont",)), "'cuont': did you mean 'count'"),
        (lambda: choose_examples(THREE, 1, languages=("xx",)), "language 'xx'"),
        (
            lambda: all_examples(THREE, encode_mask=lambda mask: range(15)),
            r"must give 16 codes 0\.\.127, got \[0, 1",
        ),
        (
            lambda: all_examples(THREE, encode_mask=lambda mask: [128] * 16),
            r"must give 16 codes 0\.\.127, got \[128",
        ),
        (lambda: loc_tokens((0, 0, 97, 5), 96), r"within 0\.\.96 .*\(0, 0, 97, 5\)"),
        (lambda: loc_tokens((5, 0, 5, 5), 96), "not empty"),
        (lambda: caption(NOTHING), "scene: expected at least one object"),
        (lambda: all_examples(NOTHING), "scene: expected at least one object"),
        (lambda: choose_examples(NOTHING, 1), "scene: expected at least one object"),
    ],
)
def test_errors_say_what_is_wrong(call, message, as_user):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
