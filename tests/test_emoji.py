"""The emoji: the committed files, the splits, and what is done to the pixels."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import build_emoji
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from pgcore.lab import _sheets
from pgcore.lab._pixels import to_images, to_pixels
from pgcore.lab.emoji import (
    CONCEPTS,
    LANGUAGES,
    SEEN_CONCEPTS,
    SHARE_ALIKE_STYLES,
    SHARED_CONCEPTS,
    STYLES,
    TEST_STYLE,
    TRAIN_STYLES,
    UNSEEN_CONCEPTS,
    VALIDATION_STYLE,
    EmojiSet,
    keywords,
    load_emoji,
    names,
    place,
)

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "pgcore" / "assets" / "emoji"
DRAWN = {
    "noto": 521,
    "noto-v1": 519,
    "fluent": 521,
    "emojione": 519,
    "fxemoji": 422,
    "twemoji": 521,
    "openmoji": 520,
}
UNSEEN_SHA256 = "69890bea64e87e1b39ce19d56971ae4b944e5d2b6945a5e0b11bca14f743c65b"
PLACED_SHA256 = "14152a5523bac1289ada678bd54da240591cd22957d35d5ed50a0c21948aa447"
PLACED = """
import hashlib
from pgcore.lab.emoji import load_emoji, place
placed = place(load_emoji(("noto", "twemoji"), ("rocket", "cat", "pizza")), seed=7)
print(hashlib.sha256(placed.images.numpy().tobytes()).hexdigest())
"""


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def made_of(images: torch.Tensor) -> EmojiSet:
    """Wrap pictures of our own in a set."""
    return EmojiSet(
        images=images,
        labels=torch.zeros(len(images), dtype=torch.long),
        concepts=("rocket",),
        styles=("noto",) * len(images),
    )


# The committed files


def test_every_file_agrees_with_its_checksum():
    lines = (ASSETS / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = [*ASSETS.rglob("*.webp"), *ASSETS.rglob("*.json")]
    assert listed.keys() == {str(file.relative_to(ASSETS)) for file in files}
    for name, digest in listed.items():
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == digest, name


def test_the_whole_stays_small():
    sizes = [file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()]
    assert sum(sizes) < 4_500_000


def test_share_alike_art_stays_in_its_own_folder():
    apart = {file.stem for file in (ASSETS / "share-alike").glob("*.webp")}
    assert apart == set(SHARE_ALIKE_STYLES)


def test_licences_name_every_style_and_its_licence():
    text = (ASSETS / "LICENSES.md").read_text("utf-8")
    for style in STYLES:
        assert f"`{style}`" in text
    for licence in ("Apache", "MIT", "CC BY 4.0", "CC BY-SA 4.0", "Unicode"):
        assert licence in text


def test_the_tool_checks_without_building(tmp_path, monkeypatch, capsys):
    build_emoji.check()
    assert "8 files agree" in capsys.readouterr().out
    copy = tmp_path / "emoji"
    shutil.copytree(ASSETS, copy)
    monkeypatch.setattr(build_emoji, "ASSETS", copy)
    (copy / "noto.webp").write_bytes(b"not a picture")
    with pytest.raises(SystemExit, match=r"noto\.webp differs"):
        build_emoji.check()
    (copy / "noto.webp").unlink()
    with pytest.raises(SystemExit, match=r"noto\.webp is missing"):
        build_emoji.check()


def test_the_curated_list_is_what_was_built():
    curated = build_emoji.curated()
    built = _sheets.catalogue()["concepts"]
    assert [row["code"] for row in built] == list(curated)
    assert tuple(name for name, _ in curated.values()) == CONCEPTS
    for row in built:
        assert ("fxemoji" in row["cells"]) == (curated[row["code"]][1] != "-")


# What the artists drew


@pytest.mark.parametrize("style", STYLES)
def test_each_style_decodes(style):
    emoji = load_emoji(style)
    assert emoji.images.shape == (DRAWN[style], 4, 48, 48)
    assert emoji.images.dtype == torch.float32
    assert emoji.images.max() == 1 and emoji.images.min() == 0
    assert emoji.styles == (style,) * DRAWN[style]
    alpha = emoji.images[:, 3]
    assert (alpha.flatten(1) > 0.5).float().mean(
        1
    ).min() > 0.05  # the thinnest is 0.067
    clear = (alpha == 0).flatten(1).float().mean(1)
    assert clear.median() > 0.2  # cut out, not on a square
    faint = (alpha > 0) & (alpha < 8 / 255)
    assert not faint.any()
    assert not emoji.images[:, :3].masked_select((alpha == 0)[:, None]).any()


@pytest.mark.parametrize("style", STYLES)
def test_no_picture_comes_twice_in_a_style(style):
    images = load_emoji(style).images
    assert len({image.numpy().tobytes() for image in images}) == len(images)


def test_labels_point_at_the_cell_that_the_catalogue_names():
    wanted = ("rocket", "monkey", "collision")
    emoji = load_emoji(("twemoji", "noto"), wanted)
    assert emoji.styles == ("twemoji",) * 3 + ("noto",) * 3
    assert emoji.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert emoji.concepts == wanted
    rows = {row["names"]["en"]: row for row in _sheets.catalogue()["concepts"]}
    for image, label, style in zip(
        emoji.images, emoji.labels, emoji.styles, strict=True
    ):
        index = rows[wanted[label]]["cells"][style]
        sheet = Image.open(ASSETS / f"{style}.webp").convert("RGBA")
        left, top = index % 24 * 48, index // 24 * 48
        cell = np.asarray(sheet.crop((left, top, left + 48, top + 48)))
        assert np.array_equal((image.permute(1, 2, 0) * 255).round().numpy(), cell)


def test_artists_agree_on_what_a_concept_looks_like():
    """A sheet whose labels have slipped by one place would fall to chance, 0.2 %."""
    emoji = load_emoji(STYLES, size=12, background="silver")
    distance = torch.cdist(emoji.images.flatten(1), emoji.images.flatten(1))
    artist = torch.tensor([STYLES.index(style) for style in emoji.styles])
    distance[artist[:, None] == artist] = torch.inf  # the nearest by another artist
    right = emoji.labels[distance.argmin(1)] == emoji.labels
    for number, style in enumerate(STYLES):
        floor = 0.06 if style == "openmoji" else 0.25  # black outlines look alike
        assert right[artist == number].float().mean() > floor, style


def test_what_pixels_alone_can_do():
    """The baseline that the page "Data and licences" quotes."""
    train, test = (
        load_emoji(styles, SHARED_CONCEPTS, size=32, background="silver")
        for styles in (TRAIN_STYLES, TEST_STYLE)
    )
    moved = place(load_emoji(TEST_STYLE, SHARED_CONCEPTS), seed=0)
    for pictures, lowest, highest in ((test, 0.39, 0.41), (moved, 0.05, 0.07)):
        distance = torch.cdist(pictures.images.flatten(1), train.images.flatten(1))
        right = train.labels[distance.argmin(1)] == pictures.labels
        assert lowest < right.float().mean() < highest


def test_what_an_artist_did_not_draw_is_left_out():
    emoji = load_emoji(("noto", "fxemoji"), ("lion", "rocket"))
    assert emoji.styles == ("noto", "noto", "fxemoji")
    assert emoji.labels.tolist() == [0, 1, 1]
    nothing = load_emoji("fxemoji", "lion", size=20, background="red")
    assert len(nothing) == 0 and nothing.images.shape == (0, 3, 20, 20)


# The splits


def test_styles_are_split_once():
    assert tuple(DRAWN) == STYLES
    assert len({*TRAIN_STYLES, VALIDATION_STYLE, TEST_STYLE, *SHARE_ALIKE_STYLES}) == 7
    assert set(load_emoji().styles) == set(TRAIN_STYLES)


def test_the_unseen_concepts_never_change():
    assert len(CONCEPTS) == len(set(CONCEPTS)) == 521
    assert set(SEEN_CONCEPTS) | set(UNSEEN_CONCEPTS) == set(CONCEPTS)
    assert not set(SEEN_CONCEPTS) & set(UNSEEN_CONCEPTS)
    assert len(UNSEEN_CONCEPTS) == 65
    assert sha256("\n".join(sorted(UNSEEN_CONCEPTS))) == UNSEEN_SHA256


def test_shared_concepts_are_drawn_by_all_six():
    six = [style for style in STYLES if style not in SHARE_ALIKE_STYLES]
    emoji = load_emoji(six, SHARED_CONCEPTS)
    assert len(emoji) == 6 * len(SHARED_CONCEPTS) == 6 * 422
    rest = [concept for concept in CONCEPTS if concept not in SHARED_CONCEPTS]
    others = load_emoji(six, rest)
    assert others.labels.bincount(minlength=len(rest)).max() < 6


# Names


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_concept_has_a_name_and_keywords(language):
    assert len(names(language)) == len(keywords(language)) == len(CONCEPTS)
    assert len(set(names(language))) == len(CONCEPTS)  # no two share a name
    assert all(name.strip() for name in names(language))
    assert all(words and all(words) for words in keywords(language))


def test_names_follow_the_concepts_asked_for():
    assert {"en", "de", "fr", "es", "zh", "ja"} <= set(LANGUAGES)
    assert names() == CONCEPTS
    assert names("de", ("rocket", "cat")) == ("Rakete", "Katze")
    assert names("fr", "red apple") == ("pomme rouge",)
    assert "space" in keywords("en", "rocket")[0]


# Pixels


def test_compositing_agrees_with_pil():
    colour = (200, 30, 90)
    sprites = load_emoji("emojione")
    ours = load_emoji("emojione", background=colour)
    assert ours.images.shape == (DRAWN["emojione"], 3, 48, 48)
    for sprite, image in zip(sprites.images[::20], ours.images[::20], strict=True):
        rgba = Image.fromarray((sprite.permute(1, 2, 0) * 255).byte().numpy(), "RGBA")
        back = Image.new("RGBA", rgba.size, (*colour, 255))
        theirs = np.asarray(Image.alpha_composite(back, rgba).convert("RGB"))
        error = np.abs(image.permute(1, 2, 0).numpy() * 255 - theirs)
        assert error.max() < 1.01


@pytest.mark.parametrize("size", [17, 32, 64])
def test_resizing_agrees_with_torch_on_premultiplied_colours(size):
    sprites = load_emoji("noto").select(range(0, 521, 10)).images
    colour = torch.tensor([0.0, 1.0, 0.0])[:, None, None]  # shows a halo on red at once
    premultiplied = torch.cat([sprites[:, :3] * sprites[:, 3:], sprites[:, 3:]], 1)
    small = F.interpolate(premultiplied, (size, size), mode="bilinear", antialias=True)
    theirs = small[:, :3] + colour * (1 - small[:, 3:])
    ours = load_emoji("noto", size=size, background="lime")
    error = (ours.select(range(0, 521, 10)).images - theirs).abs()
    assert error.max() < 4 / 255  # ours rounds to a byte five times
    assert error.mean() < 0.5 / 255


def test_a_colour_may_be_a_name_or_three_numbers():
    one, other = (load_emoji("noto", "cat", background=c) for c in ("red", (255, 0, 0)))
    assert torch.equal(one.images, other.images)
    assert one.images[0, :, 0, 0].tolist() == [1, 0, 0]


def test_bytes_survive_the_way_through_floats():
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert np.array_equal(to_pixels(to_images(every)), every)
    assert to_pixels(torch.full((1, 1, 1, 1), 99.6 / 255)).item() == 100


# place


def test_the_same_seed_is_the_same_data_in_every_process():
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PLACED],
            env=os.environ | {"PYTHONHASHSEED": seed},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("0", "4242")
    ]
    printed = {process.communicate()[0].strip() for process in processes}
    assert printed == {PLACED_SHA256}


def test_sprites_stay_whole_and_use_all_the_room():
    """A white square shows where the sprite went: one full square, never cut off."""
    sides, lefts, tops = set(), set(), set()
    placed = place(made_of(torch.ones(3000, 4, 48, 48)), seed=0, background=None)
    assert placed.images.shape == (3000, 4, 32, 32)
    for alpha in placed.images[:, 3]:
        ys, xs = alpha.nonzero(as_tuple=True)
        side = int(ys.max() - ys.min() + 1)
        assert side == xs.max() - xs.min() + 1
        assert alpha.sum() == side**2
        sides.add(side)
        lefts.add(int(xs.min()))
        tops.add(int(ys.min()))
    assert sides == set(range(19, 33))  # 0.6 to 1.0 of 32 pixels
    assert lefts == tops == set(range(14))


def test_place_draws_a_background_a_picture():
    clear = made_of(torch.zeros(200, 4, 48, 48))
    images = place(clear, seed=0).images
    assert images.shape == (200, 3, 32, 32)
    colours = images.flatten(2)
    assert torch.equal(colours.amin(2), colours.amax(2))  # one colour each
    assert len(set(map(tuple, colours[..., 0].tolist()))) > 190
    assert (colours.mean((0, 2)) - 0.5).abs().max() < 0.08
    fixed = place(clear, seed=0, background="lime").images
    assert torch.equal(fixed, torch.tensor([0.0, 1, 0])[:, None, None].expand_as(fixed))


def test_each_row_depends_on_itself_alone():
    sprites = load_emoji("noto").select(range(40))
    whole = place(sprites, seed=3, size=40)
    start = place(sprites.select(range(7)), seed=3, size=40)
    assert torch.equal(whole.images[:7], start.images)
    assert torch.equal(whole.labels, sprites.labels)
    assert whole.styles == sprites.styles and whole.concepts == sprites.concepts
    assert not torch.equal(whole.images, place(sprites, seed=4, size=40).images)
    stripes = torch.zeros(9, 4, 48, 48)
    stripes[::2] = 1  # a resize that reads over the edge would soil the clear ones
    placed = place(made_of(stripes), seed=0, background=None)
    assert not placed.images[1::2].any()


def test_place_at_full_scale_only_resizes():
    placed = place(
        load_emoji("fluent"), seed=1, scale=(1.0, 1.0), background=(10, 20, 30)
    )
    loaded = load_emoji("fluent", size=32, background=(10, 20, 30))
    assert torch.equal(placed.images, loaded.images)


# select


def test_select_takes_a_mask_or_indices():
    emoji = load_emoji(("noto", "twemoji"), ("rocket", "cat"))
    cats = emoji.select(emoji.labels == 1)
    assert cats.styles == ("noto", "twemoji") and cats.labels.tolist() == [1, 1]
    assert torch.equal(cats.images, emoji.images[[1, 3]])
    backwards = emoji.select([3, 0])
    assert backwards.styles == ("twemoji", "noto")
    assert torch.equal(backwards.images, emoji.images[[3, 0]])
    assert len(emoji.select([])) == 0
    with pytest.raises(ValueError, match="the mask has 3 rows, the set 4"):
        emoji.select(torch.tensor([True, False, True]))


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_emoji("twemojy"), "'twemojy': did you mean 'twemoji'"),
        (
            lambda: load_emoji(("noto", "x")),
            r"unknown style 'x' \(known: noto, .*moji\)",
        ),
        (lambda: load_emoji(concepts="roket"), "'roket': did you mean 'rocket'"),
        (lambda: load_emoji(concepts="ROCKET"), "did you mean 'rocket'"),
        (lambda: load_emoji(concepts=("cat", "cat")), "'cat' is named twice"),
        (lambda: load_emoji(size=0), "size must be at least 1 pixel, got 0"),
        (lambda: load_emoji(background="gren"), "'gren': did you mean 'green'"),
        (lambda: load_emoji(background=(0, 0, 256)), r"0\.\.255, got \(0, 0, 256\)"),
        (lambda: load_emoji(background=(0, 0)), "three parts"),
        (lambda: names("english"), r"unknown language 'english'.*\(known: en, "),
        (lambda: keywords("xx"), "unknown language 'xx'"),
        (lambda: names("en", "zebra"), r"'zebra'.*\(521 are known: monk"),
    ],
)
def test_errors_say_what_is_wrong_and_what_is_known(call, message, as_user):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be at least 1 pixel, got 0"),
        ({"scale": (0.5, 1.1)}, r"scale must be .* got \(0\.5, 1\.1\)"),
        ({"scale": (0.9, 0.8)}, "scale must be"),
        ({"scale": (0, 1)}, "scale must be"),
        ({"background": "gren"}, "did you mean 'green'"),
    ],
)
def test_place_refuses_what_it_cannot_do(arguments, message, as_user):
    with pytest.raises(ValueError, match=message):
        place(load_emoji("noto", "cat"), seed=0, **arguments)


def test_place_needs_alpha():
    with pytest.raises(ValueError, match="need 4 channels .* got 3"):
        place(load_emoji("noto", "cat", background="red"), seed=0)


def test_a_missing_or_changed_file_says_what_to_do(tmp_path, monkeypatch):
    shutil.copytree(ASSETS, tmp_path / "emoji")
    monkeypatch.setattr(_sheets, "ASSETS", tmp_path / "emoji")
    sheet = tmp_path / "emoji" / "noto.webp"
    assert _sheets.read_asset("noto.webp") == sheet.read_bytes()
    sheet.write_bytes(sheet.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"noto\.webp differs.*git checkout"):
        _sheets.read_asset("noto.webp")
    sheet.unlink()
    with pytest.raises(FileNotFoundError, match=r"noto\.webp is missing.*git checkout"):
        _sheets.read_asset("noto.webp")
