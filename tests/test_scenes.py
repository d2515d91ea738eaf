"""Scenes: the same bytes everywhere, exact boxes and masks, honest splits."""

import hashlib
import itertools
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pgcore.lab import _compose, _draws, _sheets
from pgcore.lab._backdrops import BACKGROUNDS, contrast
from pgcore.lab._scene_settings import SMALLEST_OUTLINE, SMALLEST_SIDE
from pgcore.lab._sprites import rim, sprite
from pgcore.lab.emoji import (
    CONCEPTS,
    SEEN_CONCEPTS,
    SHARE_ALIKE_STYLES,
    STYLES,
    TEST_STYLE,
    TRAIN_STYLES,
    UNSEEN_CONCEPTS,
    VALIDATION_STYLE,
    load_emoji,
)
from pgcore.lab.scenes import (
    SPLITS,
    Scene,
    SceneSettings,
    compose,
    compose_batch,
    held_out,
    images_of,
    split,
)

ROOT = Path(__file__).parents[1]
CELLS = {row["names"]["en"]: row["cells"] for row in _sheets.catalogue()["concepts"]}
FEW = ("cat", "dog", "red apple", "rocket", "owl", "key", "tulip", "guitar", "pizza")

# Weights have been trained on these pictures: they never change.
GOLDEN = {
    "default": (
        {},
        "55c97cb1ec1ac4832131c8bbab4688d2bcfb993fcd4bb88c8f6850e0f4cfbbff",
    ),
    "small": (
        {"size": 64, "objects": (1, 4)},
        "863b3029a300c5a850f99853c32ac846044e767536eb85152841d075cff3c760",
    ),
    "held-out pairs": (
        {"styles": ("fxemoji",), "objects": (2, 4), "pairs": "held-out"},
        "4f501f07c9783b0ca41be6332100a432148b88ac7e8c516219a88106b38a1233",
    ),
    "crowded": (
        {"objects": (9, 9), "side": (0.2, 0.33), "max_overlap": 0.0},
        "f1554358f902a54ada296a29fd33066a1879fca8c49c5e166e36f38339e1c209",
    ),
}
BENT_SHA256 = "8cdd1734d2d4c31f6011474957b9d53bb7ff320e610589b6d16e2e43c1ccb498"
HELD_OUT_SHA256 = "966d6abdcc1e875e630a4623f3f4ddda815ff59624466e27513554a2a6ba5ae5"
PRINT_DIGEST = """
import hashlib
from pgcore.lab.scenes import SceneSettings, compose_batch
digest = hashlib.sha256()
for start in range(0, 100, 25):
    for scene in compose_batch(SceneSettings(), 3, start, 25):
        digest.update(scene.image.tobytes() + scene.segments.tobytes())
        digest.update(repr(scene.objects).encode())
print(digest.hexdigest())
"""


def digest_of(scenes) -> str:
    digest = hashlib.sha256()
    for scene in scenes:
        digest.update(scene.image.tobytes() + scene.segments.tobytes())
        digest.update(repr(scene.objects).encode())
    return digest.hexdigest()


def same(one: Scene, other: Scene) -> bool:
    return digest_of([one]) == digest_of([other])


def pairs_in(scene: Scene) -> set[tuple[str, ...]]:
    kinds = sorted({thing.concept for thing in scene.objects})
    return set(itertools.combinations(kinds, 2))


# The same bytes everywhere


@pytest.mark.parametrize("name", GOLDEN)
def test_scenes_never_change(name):
    changes, golden = GOLDEN[name]
    assert digest_of(compose_batch(SceneSettings(**changes), 3, 0, 100)) == golden


def test_bent_drawings_never_change():
    """The tiny model trains on them."""
    assert digest_of(compose_batch(SceneSettings(variants=64), 3, 0, 50)) == BENT_SHA256


def test_a_fresh_process_draws_the_same_bytes():
    printed = subprocess.run(
        [sys.executable, "-c", PRINT_DIGEST],
        env=os.environ | {"PYTHONHASHSEED": "4242"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert printed == GOLDEN["default"][1]


@given(seed=st.integers(0, 2**70), start=st.integers(0, 2**40), at=st.integers(0, 3))
def test_a_scene_depends_on_settings_seed_and_index_alone(seed, start, at):
    settings = SceneSettings(concepts=FEW)
    alone = compose(settings, seed, start + at)
    assert same(compose_batch(settings, seed, start, at + 1)[at], alone)
    assert (alone.seed, alone.index) == (seed, start + at)


def test_seeds_and_indices_all_draw_other_scenes():
    keys = [(seed, index) for seed in range(12) for index in range(12)]
    keys += [(2**32, 0), (0, 2**32), (1 << 64, 0), (2 << 64, 0)]
    scenes = [compose(SceneSettings(), *key) for key in keys]
    assert len({digest_of([scene]) for scene in scenes}) == len(keys)


def test_the_background_changes_no_object():
    plain = SceneSettings(backgrounds=("plain",), clutter=0)
    for index in range(50):
        bare = compose(plain, 1, index)
        rich = compose(SceneSettings(clutter=9), 1, index)
        assert repr(bare.objects) == repr(rich.objects)
        assert np.array_equal(bare.segments, rich.segments)


def test_raw_numbers_are_those_that_numpy_promises():
    draws = _draws.Draws(5, 7)
    source = np.random.PCG64(np.random.SeedSequence(5, spawn_key=(7,)))
    wanted = [int(source.random_raw()) for _ in range(200)]
    assert [draws.below(2**64) for _ in range(200)] == wanted
    assert wanted[0] == 8189392099379923689


def test_draws_keep_their_bounds():
    draws = _draws.Draws(0, 0)
    assert {draws.between(3, 6) for _ in range(200)} == {3, 4, 5, 6}
    assert {draws.below(4) for _ in range(200)} == {0, 1, 2, 3}
    assert not any(draws.chance(0.0) for _ in range(200))
    assert all(draws.chance(1.0) for _ in range(200))
    assert 350 < sum(draws.chance(0.2) for _ in range(2000)) < 450
    orders = Counter(tuple(draws.shuffled("abc")) for _ in range(1200))
    assert len(orders) == 6 and min(orders.values()) > 150


# Drawings that are bent


def test_a_variant_bends_a_drawing_and_number_0_does_not():
    plain = sprite("noto", 7, 40)
    assert np.array_equal(plain.colour, sprite("noto", 7, 40, 0).colour)
    bent = [sprite("noto", 7, 40, number) for number in range(1, 9)]
    masks = {one.mask.tobytes() for one in (plain, *bent)}
    assert len(masks) == 9
    for one in bent:
        shared = (one.mask & plain.mask).sum() / (one.mask | plain.mask).sum()
        mirrored = one.mask[:, ::-1]
        turned = (mirrored & plain.mask).sum() / (mirrored | plain.mask).sum()
        assert max(shared, turned) > 0.5  # still the same thing
        assert (one.colour <= 255 - one.clear).all()  # no colour above its alpha


def test_nothing_of_a_bent_drawing_is_cut_off():
    for cell in range(0, 500, 25):
        for number in range(1, 6):
            mask = sprite("fluent", cell, 64, number).mask
            edges = mask[0], mask[-1], mask[:, 0], mask[:, -1]
            assert not any(edge.all() for edge in edges)


@pytest.mark.parametrize(("variants", "fewest", "most"), [(1, 1, 1), (8, 5, 8)])
def test_scenes_show_as_many_forms_as_they_are_told(variants, fewest, most):
    settings = SceneSettings(
        styles=("noto",), concepts=("cat",), objects=(1, 1), alone_side=(0.5, 0.5),
        variants=variants,
    )  # fmt: skip
    cats = [compose(settings, 0, index).objects[0] for index in range(40)]
    assert fewest <= len({int(cat.mask.sum()) for cat in cats}) <= most


# Boxes, masks, counts


@st.composite
def some_settings(draw) -> dict:
    size = draw(st.integers(96, 120))
    most = draw(st.integers(1, 6))
    low = draw(st.floats(0.22, 0.33))
    alone = draw(st.floats(0.25, 0.9))
    return dict(
        styles=tuple(draw(st.sets(st.sampled_from(STYLES), min_size=1))),
        concepts=tuple(draw(st.sets(st.sampled_from(CONCEPTS), min_size=8))),
        size=size,
        objects=(draw(st.integers(1, most)), most),
        side=(low, draw(st.floats(low, 0.6))),
        alone_side=(alone, draw(st.floats(alone, 1.0))),
        max_overlap=draw(st.sampled_from([0.0, 0.05, 0.1, 0.5, 0.9])),
        clutter=draw(st.integers(0, 6)),
        same_kind=draw(st.sampled_from([0.0, 0.3, 1.0])),
        backgrounds=tuple(draw(st.sets(st.sampled_from(BACKGROUNDS), min_size=1))),
        pairs=draw(st.sampled_from(["seen", "any"])),
        variants=draw(st.sampled_from([1, 1, 40])),
    )


@given(chosen=some_settings(), seed=st.integers(0, 2**64), index=st.integers(0, 999))
def test_every_scene_is_what_it_says(chosen, seed, index):
    settings = SceneSettings(**chosen)
    scene = compose(settings, seed, index)
    size = settings.size
    assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
    assert settings.objects[0] <= len(scene.objects) <= settings.objects[1]
    assert scene.segments.max() == len(scene.objects)
    for place, thing in enumerate(scene.objects):
        assert thing.place == place
        assert thing.concept in settings.concepts and thing.style in settings.styles
        assert thing.style in CELLS[thing.concept]
        rows, columns = thing.mask.nonzero()
        tight = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
        assert thing.box == tight
        assert 1 - settings.max_overlap <= thing.visible <= 1
    together = sum(thing.mask.astype(int) for thing in scene.objects)
    assert np.array_equal(together, scene.segments > 0)  # nowhere two at once
    corners = [(thing.box[1], thing.box[0]) for thing in scene.objects]
    assert corners == sorted(corners)
    if settings.pairs == "seen":
        assert not any(held_out(*pair) for pair in pairs_in(scene))


@pytest.mark.parametrize("index", range(40))
def test_pictures_equal_what_pil_composes(index):
    """Sprites of 48 pixels are not resized; their places follow from the boxes."""
    settings = SceneSettings(
        objects=(1, 2), side=(0.5, 0.5), alone_side=(0.5, 0.5), same_kind=0.0,
        max_overlap=0.0, backgrounds=("plain",), clutter=0,
    )  # fmt: skip
    scene = compose(settings, 0, index)
    layers = []
    for thing in scene.objects:
        cell = _sheets.cells(thing.style)[CELLS[thing.concept][thing.style]]
        rows, columns = (cell[..., 3] >= 128).nonzero()
        layers.append((cell, thing.box[1] - columns.min(), thing.box[0] - rows.min()))
    free = np.ones((96, 96), bool)
    for _, left, top in layers:
        free[top : top + 48, left : left + 48] = False
    colours = np.unique(scene.image[free], axis=0)
    assert len(colours) == 1
    errors = []
    for order in itertools.permutations(layers):  # which is in front is not told
        picture = Image.new("RGBA", (96, 96), (*colours[0].tolist(), 255))
        for cell, left, top in order:
            picture.alpha_composite(Image.fromarray(cell), (int(left), int(top)))
        theirs = np.asarray(picture.convert("RGB")).astype(int)
        errors.append(np.abs(theirs - scene.image).max())
    assert min(errors) <= 2


def test_what_is_hidden_is_counted_against_the_whole_sprite():
    settings = SceneSettings(objects=(4, 4), side=(0.5, 0.5), max_overlap=0.3)
    hidden = []
    for scene in compose_batch(settings, 0, 0, 100):
        for thing in scene.objects:
            cell = CELLS[thing.concept][thing.style]
            whole = (_sheets.cells(thing.style)[cell][..., 3] >= 128).sum()
            if thing.mask.sum() == whole:
                assert thing.visible == 1
            elif thing.visible == thing.mask.sum() / whole:  # else: not 48 pixels
                hidden.append(1 - thing.visible)
    assert len(hidden) > 50 and 0.2 < max(hidden) <= 0.3


def test_numbers_and_kinds_are_as_asked():
    scenes = compose_batch(SceneSettings(objects=(1, 4), concepts=FEW), 0, 0, 500)
    numbers = Counter(len(scene.objects) for scene in scenes)
    assert set(numbers) == {1, 2, 3, 4} and min(numbers.values()) > 95
    most = [max(Counter(o.concept for o in s.objects).values()) for s in scenes]
    assert set(most) == {1, 2, 3, 4}
    repeated = sum(m > 1 for m, s in zip(most, scenes, strict=True) if s.objects[1:])
    assert 0.18 < repeated / (500 - numbers[1]) < 0.32
    for probability, wanted in ((0.0, {1}), (1.0, {2, 3, 4})):
        settings = SceneSettings(objects=(4, 4), same_kind=probability, concepts=FEW)
        most = {
            max(Counter(thing.concept for thing in scene.objects).values())
            for scene in compose_batch(settings, 0, 0, 60)
        }
        assert most == wanted


def test_all_artists_concepts_and_sizes_come_up():
    scenes = compose_batch(SceneSettings(concepts=FEW), 0, 0, 500)
    things = [thing for scene in scenes for thing in scene.objects]
    for field, wanted in (("style", TRAIN_STYLES), ("concept", FEW)):
        seen = Counter(getattr(thing, field) for thing in things)
        assert set(seen) == set(wanted)
        assert min(seen.values()) > 0.6 * len(things) / len(wanted)
    alone = [scene.objects[0].box for scene in scenes if len(scene.objects) == 1]
    heights = [bottom - top for top, _, bottom, _ in alone]
    assert min(heights) < 40 and max(heights) > 80


def test_too_many_large_objects_fall_back_to_a_grid(monkeypatch):
    settings = SceneSettings(objects=(4, 4), side=(0.5, 0.5), max_overlap=0.0)
    monkeypatch.setattr(_compose, "_PLACE_TRIES", 1)
    for scene in compose_batch(settings, 0, 0, 20):
        assert len(scene.objects) == 4
        assert all(thing.visible == 1 for thing in scene.objects)


def test_an_only_concept_is_repeated():
    settings = SceneSettings(concepts=("cat",), objects=(6, 6), side=(0.25, 0.3))
    scene = compose(settings, 0, 0)
    assert [thing.concept for thing in scene.objects] == ["cat"] * 6


def test_what_an_artist_did_not_draw_does_not_appear():
    settings = SceneSettings(styles=("fxemoji",), concepts=("lion", "rocket"))
    kinds = {t.concept for s in compose_batch(settings, 0, 0, 40) for t in s.objects}
    assert kinds == {"rocket"}


@pytest.mark.parametrize("style", STYLES)
def test_no_sprite_vanishes_at_a_small_side(style):
    smallest = SMALLEST_OUTLINE if style in SHARE_ALIKE_STYLES else SMALLEST_SIDE
    for styles in CELLS.values():
        if style in styles:
            sides = (*range(smallest, smallest + 4), 24, 26)
            assert all(sprite(style, styles[style], side).visible for side in sides)


# Backgrounds


@pytest.mark.parametrize(
    ("kind", "fewest", "most"),
    [("plain", 1, 1), ("stripes", 2, 2), ("checks", 2, 2), ("gradient", 9, 256)],
)
def test_backgrounds_have_their_number_of_colours(kind, fewest, most):
    settings = SceneSettings(backgrounds=(kind,), clutter=0, concepts=FEW)
    scenes = compose_batch(settings, 0, 0, 60)
    for scene in scenes:
        back = scene.image[scene.segments == 0]
        colours, counts = np.unique(back, axis=0, return_counts=True)
        common = int((counts > 12).sum())  # the rest are soft edges of sprites
        assert common >= fewest or len(colours) > 200
        assert common <= most + 8
    backs = {scene.image[0, 0].tobytes() for scene in scenes}
    assert len(backs) > 40


def test_objects_stand_off_from_a_plain_background():
    settings = SceneSettings(backgrounds=("plain",), clutter=0, objects=(1, 2))
    near = 0
    for scene in compose_batch(settings, 0, 0, 400):
        corners = scene.image[:: len(scene.image) - 1, :: len(scene.image) - 1]
        back = tuple(np.median(corners.reshape(4, 3), axis=0).astype(int).tolist())
        rims = [rim(o.style, CELLS[o.concept][o.style]) for o in scene.objects]
        near += min(contrast(back, colour) for colour in rims) < 300
    assert near < 20


def test_marks_lie_behind_the_objects():
    bare = SceneSettings(backgrounds=("plain",), clutter=0)
    full = SceneSettings(backgrounds=("plain",), clutter=12)
    changed = 0
    for index in range(60):
        one, other = compose(bare, 0, index), compose(full, 0, index)
        # The marks' number is drawn last: background and objects are the same.
        differs = (one.image != other.image).any(2)
        changed += bool(differs.any())
        core = one.segments > 0  # an object's inside, two pixels from its rim
        for _ in range(2):
            padded = np.pad(core, 1)
            core = core & padded[:-2, 1:-1] & padded[2:, 1:-1]
            core &= np.pad(core, 1)[1:-1, :-2] & np.pad(core, 1)[1:-1, 2:]
        assert differs[core].mean() < 0.1 if core.any() else True
    assert changed > 45


# Splits


def test_splits_share_no_stream_and_show_what_they_should():
    base = SceneSettings(objects=(1, 4), styles=STYLES)
    drawn = {name: split(name, base, seed=5) for name in SPLITS}
    assert len({seed for _, seed in drawn.values()}) == len(SPLITS)
    assert drawn["train"][1] == 5
    for name, (settings, seed) in drawn.items():
        artists = {"validation": (VALIDATION_STYLE,), "test-artist": (TEST_STYLE,)}
        assert settings.styles == artists.get(name, TRAIN_STYLES)
        unseen = name == "test-concepts"
        assert settings.concepts == (UNSEEN_CONCEPTS if unseen else SEEN_CONCEPTS)
        for scene in compose_batch(settings, seed, 0, 60):
            new = any(held_out(*pair) for pair in pairs_in(scene))
            if name == "test-composition":
                assert new
            elif name != "test-concepts":
                assert not new


def test_a_split_keeps_all_other_settings():
    base = SceneSettings(concepts=(*FEW, "fox", "rose"), size=64, objects=(1, 1))
    settings, seed = split("test-composition", base)
    assert settings.objects == (2, 2) and settings.size == 64
    assert settings.concepts == tuple(c for c in FEW if c in SEEN_CONCEPTS)
    assert split("test-scenes", base)[0] == split("train", base)[0]
    assert split("test-concepts", base)[0].concepts == ("pizza", "fox", "rose")
    assert split("train")[0] == split("train", SceneSettings())[0]
    assert compose(settings, seed, 0).image.shape == (64, 64, 3)


def test_seeds_of_splits_never_meet():
    last = [split(name, seed=2**64 - 1)[1] for name in SPLITS]
    first = [split(name)[1] for name in SPLITS]
    assert all(
        end < start
        for end, start in itertools.pairwise(sum(zip(first, last, strict=True), ()))
    )


def test_the_held_out_pairs_never_change():
    pairs = _compose.held_out_pairs(STYLES, CONCEPTS)
    assert 0.095 < len(pairs) / (521 * 520 / 2) < 0.105
    told = "\n".join(sorted("+".join(sorted(pair)) for pair in pairs))
    assert hashlib.sha256(told.encode()).hexdigest() == HELD_OUT_SHA256
    assert all(held_out(*pair) and held_out(*pair[::-1]) for pair in pairs[::100])
    assert not any(held_out(one, one) for one in CONCEPTS)
    partners = Counter(itertools.chain(*pairs))
    assert min(partners.values()) > 20  # no concept is spared


# Tensors, and what may not be done


def test_images_are_the_pictures_as_tensors():
    scenes = compose_batch(SceneSettings(), 0, 0, 5)
    images = images_of(scenes)
    assert images.shape == (5, 3, 96, 96) and images.dtype == torch.float32
    for image, scene in zip(images, scenes, strict=True):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(pixels, scene.image)


def test_a_scene_is_read_only_and_travels_between_processes():
    scene = compose(SceneSettings(), 0, 0)
    for array in (scene.image, scene.segments):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 0
    assert same(pickle.loads(pickle.dumps(scene)), scene)
    assert not np.shares_memory(images_of([scene]).numpy(), scene.image)


def test_colours_equal_those_that_load_emoji_gives():
    settings = SceneSettings(
        styles=("noto",), concepts=("rocket",), objects=(1, 1), alone_side=(1.0, 1.0),
        size=48, clutter=0, backgrounds=("plain",),
    )  # fmt: skip
    scene = compose(settings, 0, 0)
    back = tuple(scene.image[0, 0].tolist())
    loaded = load_emoji("noto", "rocket", background=back).images
    assert (images_of([scene]) - loaded).abs().max() < 1.01 / 255


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"styles": ("notto",)}, "unknown style 'notto': did you mean 'noto'"),
        ({"styles": ()}, "styles must name at least one of 7, got none"),
        ({"concepts": ("cat", "cat")}, "concept 'cat' is named twice"),
        ({"concepts": ("catt",)}, "did you mean 'cat'"),
        ({"backgrounds": ("plaid",)}, "unknown background 'plaid'.*'plain'"),
        ({"pairs": "held out"}, "unknown pairs 'held out': did you mean 'held-out'"),
        ({"objects": (0, 2)}, r"1 <= fewest <= most <= 16, got \(0, 2\)"),
        ({"objects": (3, 2)}, r"got \(3, 2\)"),
        ({"objects": (1, 17)}, r"got \(1, 17\)"),
        ({"side": (0.5, 0.4)}, r"side must be 0 < .*, got \(0\.5, 0\.4\)"),
        ({"alone_side": (0.5, 1.1)}, r"alone_side must be .*, got \(0\.5, 1\.1\)"),
        ({"size": 24}, "side: 0.25 of 24 pixels is 6, the thinnest drawing needs 13"),
        (
            {"styles": ("openmoji",), "size": 64},
            "side: 0.25 of 64 pixels is 16, the thinnest drawing needs 21",
        ),
        ({"objects": (1, 5), "side": (0.4, 0.5)}, "5 objects of 38 .* at most 32 each"),
        ({"max_overlap": 1.0}, "max_overlap must be below 1"),
        ({"max_overlap": -0.1}, "max_overlap must be between 0 and 1, got -0.1"),
        ({"same_kind": 2.0}, "same_kind must be between 0 and 1, got 2"),
        ({"clutter": -1}, "clutter must be 0 or more marks, got -1"),
        ({"styles": ("fxemoji",), "concepts": ("lion",)}, "no artist of .* drew"),
        ({"pairs": "held-out"}, r"a held-out pair needs 2 objects, got \(1, 3\)"),
        (
            {"pairs": "held-out", "objects": (2, 3), "concepts": ("cat",)},
            "no pair of these 1 concepts is held out",
        ),
    ],
)
def test_settings_refuse_what_cannot_be_drawn(changes, message, as_user):
    with pytest.raises(ValueError, match=message) as caught:
        SceneSettings(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compose(SceneSettings(), -1, 0), "must be 0 or more, got -1"),
        (lambda: compose(SceneSettings(), 0, -7), "must be 0 or more, got -7"),
        (lambda: images_of([]), r"scenes of one size are needed, got sizes \[\]"),
        (
            lambda: images_of([compose(SceneSettings(size=s), 0, 0) for s in (96, 64)]),
            r"got sizes \[64, 96\]",
        ),
        (lambda: split("tran"), "unknown split 'tran': did you mean 'train'"),
        (lambda: split("train", seed=2**64), r"0 <= seed < 2\*\*64, got 18446"),
        (
            lambda: split("train", SceneSettings(styles=("twemoji",))),
            "'train' may show none of the styles .*twemoji",
        ),
        (
            lambda: split("train", SceneSettings(concepts=("fox", "rose"))),
            "'train' may show none of these 2 concepts",
        ),
        (lambda: held_out("cat", "lionn"), "concept 'lionn': did you mean 'lion'"),
    ],
)
def test_calls_refuse_what_they_cannot_do(call, message, as_user):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
