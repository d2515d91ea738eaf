"""Chapter 15: boxes, answers, metrics, drawing, and the wrong twins of each."""

import math
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score

import pgcore.grounding as module
from pgcore import drawing
from pgcore.grounding import (
    Found,
    average_precision,
    box_iou,
    box_to_tokens,
    draw,
    load_mask_codec,
    mask_iou,
    parse,
    paste_mask,
    require_box,
    tokens_to_box,
)
from pgcore.lab.museum import grounding as museum
from pgcore.lab.scene_language import all_examples, loc_tokens
from pgcore.lab.scenes import compose_batch, split
from tests.draws import name_of

WHOLE = "<loc0000><loc0000><loc1023><loc1023>"
BOX = "<loc0100><loc0200><loc0300><loc0400>"
MASK = "".join(f"<seg{n:03d}>" for n in range(16))
STEP = 1 / 1023

shares = st.floats(0, 1, allow_nan=False)


@st.composite
def boxes(draw, least=2 * STEP):
    """Boxes of which each side can be said."""
    top, left = draw(st.floats(0, 1 - least)), draw(st.floats(0, 1 - least))
    bottom = draw(st.floats(min(top + least, 1), 1))
    right = draw(st.floats(min(left + least, 1), 1))
    return top, left, bottom, right


# Boxes as words


def worst_error(write=box_to_tokens, read=tokens_to_box, number=100_000):
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((number, 2, 2)), axis=1).reshape(-1, 4)
    corners = corners[(corners[:, 2:] - corners[:, :2] > STEP).all(1)]
    worst = 0.0
    for box in corners.tolist():
        try:
            back = read(write(box))
        except ValueError:
            return math.inf
        worst = max(worst, *(abs(a - b) for a, b in zip(back, box, strict=True)))
    return worst


def test_no_edge_moves_by_more_than_half_a_step():
    assert 0.49 * STEP < worst_error() <= 0.5 * STEP + 1e-12


@pytest.mark.parametrize("twin", museum.WRITERS, ids=name_of)
def test_twins_that_write_boxes_move_edges(twin):
    assert worst_error(write=twin, number=2000) > 0.9 * STEP


@pytest.mark.parametrize("twin", museum.READERS, ids=name_of)
def test_twins_that_read_boxes_move_edges(twin):
    assert worst_error(read=twin, number=2000) > 0.9 * STEP


def test_top_comes_first():
    tokens = box_to_tokens((0.1, 0.2, 0.3, 0.4))
    assert [int(n) for n in re.findall(r"\d+", tokens)] == [102, 205, 307, 409]
    assert tokens_to_box(WHOLE) == (0.0, 0.0, 1.0, 1.0)
    assert box_to_tokens((0.0, 0.0, 1.0, 1.0)) == WHOLE


def test_edges_are_those_of_the_original_picture():
    found = museum.pixels_of_the_square(BOX, 480, 1280)
    right = [n / 1023 * s for n, s in zip((100, 200, 300, 400), (480, 1280) * 2)]  # noqa: B905
    assert max(abs(a - b) for a, b in zip(found, right, strict=True)) > 100


@given(boxes())
def test_words_say_the_same_as_those_of_the_scenes(box):
    size = 96
    pixels = tuple(round(edge * size) for edge in box)
    if pixels[0] < pixels[2] and pixels[1] < pixels[3]:
        ours = box_to_tokens([edge / size for edge in pixels])
        assert ours == loc_tokens(pixels, size)


@given(boxes())
def test_reading_and_writing_again_changes_nothing(box):
    tokens = box_to_tokens(box)
    assert box_to_tokens(tokens_to_box(tokens)) == tokens


@pytest.mark.parametrize(
    "box",
    [
        (0.1, 0.1, 0.1, 0.2),
        (0.2, 0.1, 0.1, 0.2),
        (0.1, 0.2, 0.2, 0.1),
        (-0.1, 0.1, 0.2, 0.2),
        (0.1, 0.1, 0.2, 1.01),
        (0.1, 0.1, 0.2),
        (math.nan, 0.1, 0.2, 0.3),
        (0.1, 0.1, math.inf, 0.3),
        (10.0, 20.0, 30.0, 40.0),
    ],
)
def test_what_is_no_box_is_refused(box, as_user):
    for function in (require_box, box_to_tokens):
        with pytest.raises(ValueError, match="box: expected top < bottom and left"):
            function(box)
    with pytest.raises(ValueError, match="box: expected top"):
        paste_mask(torch.zeros(64, 64), box, 10, 10)


def test_a_box_too_thin_for_words_is_refused():
    with pytest.raises(ValueError, match=r"two words a side, found \[102, .*too thin"):
        box_to_tokens((0.1, 0.1, 0.1001, 0.5))
    with pytest.raises(ValueError, match=r"two words a side, .* 102\]: too thin"):
        box_to_tokens((0.1, 0.1, 0.5, 0.1001))


@pytest.mark.parametrize(
    "tokens", ["", BOX[:27], BOX + "<loc0001>", "x" + BOX, BOX + "\n", "<loc00١1>" * 4]
)
def test_other_than_four_words_are_refused(tokens):
    with pytest.raises(ValueError, match="box: expected four <loc> tokens, found"):
        tokens_to_box(tokens)


# Answers

pieces = st.lists(
    st.sampled_from(
        [
            BOX,
            MASK,
            WHOLE,
            "<loc0001>",
            "<loc9999>",
            "<seg127>",
            "<seg999>",
            "<loc",
            ";",
        ]
        + [
            " ; ",
            " ",
            "\n",
            "cat",
            "red apple",
            "<",
            ">",
            "é",
            "<eos>",
            "<loc١٢٣٤>",
            "\0",
        ]
    ),
    max_size=12,
)


@settings(max_examples=400)
@given(st.one_of(st.text(max_size=60), pieces.map("".join)), st.booleans())
@example("<loc0001>" * 2000, True)
@example(" " * 2000 + "<loc0001> ; " * 500, False)
def test_no_text_raises_and_what_is_valid_is_complete(text, named):
    for found in parse(text, named=named):
        assert found.text and found.text in text
        if found.problem:
            assert found.box is None and found.codes is None
            continue
        require_box(found.box)
        assert found.name or not named
        assert found.codes is None or (
            len(found.codes) == 16 and set(found.codes) <= set(range(128))
        )


@given(
    st.lists(
        st.tuples(
            boxes(),
            st.one_of(
                st.none(), st.lists(st.integers(0, 127), min_size=16, max_size=16)
            ),
            st.lists(st.text("abcßé'-", min_size=1), min_size=1, max_size=3),
        ),
        max_size=5,
    )
)
def test_every_valid_answer_comes_back(things):
    parts = []
    for box, codes, words in things:
        segs = "".join(f"<seg{code:03d}>" for code in codes or ())
        parts.append(f"{box_to_tokens(box)}{segs} {' '.join(words)}")
    found = parse(" ; ".join(parts))
    assert [one.text for one in found] == parts
    for one, (box, codes, words) in zip(found, things, strict=True):
        assert (one.problem, one.name) == ("", " ".join(words))
        assert one.codes == (tuple(codes) if codes else None)
        assert np.allclose(one.box, box, atol=0.5 * STEP + 1e-12)


def test_the_answers_about_scenes_come_back():
    codec = load_mask_codec()

    def encode(mask):
        return codec.encode(torch.from_numpy(mask)[None])[0].tolist()

    number = 0
    for scene in compose_batch(*split("test-artist"), 0, 25):
        for asked in all_examples(scene, ["detect", "segment"], encode_mask=encode):
            found = parse(asked.answer)
            assert len(found) == len(asked.objects)
            for one, thing in zip(found, asked.objects, strict=True):
                size = scene.settings.size
                assert one.problem == "" and one.name == thing.concept
                assert (one.codes is not None) == (asked.kind == "segment")
                off = np.abs(size * np.array(one.box) - thing.box).max()
                assert off <= 0.5 * STEP * size + 1e-9
                number += 1
    assert number > 100


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"{BOX[:27]} cat", "four <loc> tokens, found '<loc0100"),
        (f"{BOX}<loc0001> cat", "four <loc> tokens"),
        ("cat", "four <loc> tokens, found ''"),
        ("<loc0300><loc0200><loc0100><loc0400> cat", "top < bottom"),
        ("<loc0100><loc0200><loc0100><loc0400> cat", "top < bottom"),
        ("<loc0100><loc0200><loc1024><loc0400> cat", "from 0 to 1"),
        (f"{BOX}{MASK[:-8]} cat", "mask: expected 16 codes below 128"),
        (f"{BOX}{MASK}<seg001> cat", "mask: expected 16 codes"),
        (f"{BOX}<seg128>{MASK[8:]} cat", "mask: expected 16 codes below 128"),
        (f"{BOX}", "name: expected one, found ''"),
        (f"{BOX}{MASK}", "name: expected one"),
        (f"{BOX}{MASK}{BOX} cat", "name: expected one"),
        (f"{BOX} cat{MASK}", "name: expected one"),
    ],
)
def test_what_is_invalid_is_kept_and_says_why(text, problem):
    (found,) = parse(text)
    assert problem in found.problem and found.text == text
    assert found.box is None and found.codes is None
    assert box_iou(found.box, (0.0, 0.0, 1.0, 1.0)) == 0


def test_names_may_be_missing_where_none_are_asked_for():
    (found,) = parse(f"{BOX}{MASK}", named=False)
    assert found.problem == "" and found.codes == tuple(range(16))


def test_spaces_and_missing_separators_do_not_matter():
    loose = f" {BOX.replace('><', '> <')}  big \n cat {BOX}{MASK} dog;;"
    assert [(one.name, one.problem) for one in parse(loose)] == [
        ("big cat", ""),
        ("dog", ""),
    ]
    assert parse("") == parse(" ; ;\n") == []


@pytest.mark.parametrize("twin", museum.PARSERS, ids=name_of)
def test_twins_read_some_answer_wrong(twin):
    answers = [
        f"{BOX} yellow breast parrot",
        f"{BOX[:27]} cat ; {WHOLE} dog",
        f"{BOX} cat ; nothing",
    ]
    wrong = [
        [(one.name, one.box) for one in twin(text)]
        != [(one.name, one.box) for one in parse(text)]
        for text in answers
    ]
    assert any(wrong)


# How right


def counted_iou(one, other, side=64):
    """Boxes with edges on a grid, painted and counted."""
    painted = []
    for top, left, bottom, right in (one, other):
        mask = np.zeros((side, side), bool)
        mask[top:bottom, left:right] = True
        painted.append(mask)
    return mask_iou(*painted)


grid_boxes = st.tuples(*[st.integers(0, 63)] * 2, *[st.integers(1, 64)] * 2).filter(
    lambda box: box[0] < box[2] and box[1] < box[3]
)


@given(grid_boxes, grid_boxes)
def test_box_iou_counts_pixels(one, other):
    ours = [tuple(edge / 64 for edge in box) for box in (one, other)]
    assert math.isclose(box_iou(*ours), counted_iou(one, other), abs_tol=1e-12)
    assert math.isclose(box_iou(*ours), box_iou(*ours[::-1]))


def test_the_twin_of_box_iou_is_nearly_always_right_about_nothing():
    apart = (0.1, 0.1, 0.2, 0.2), (0.5, 0.5, 0.6, 0.6)
    assert box_iou(*apart) == 0 < 0.2 < museum.one_pixel_more(*apart)
    assert box_iou(None, apart[0]) == box_iou(apart[0], None) == 0


def test_mask_iou_of_empty_masks_and_of_two_sizes(as_user):
    empty, full = np.zeros((4, 5), bool), np.ones((4, 5), bool)
    assert mask_iou(empty, empty) == mask_iou(empty, full) == 0
    assert mask_iou(full, full) == 1
    with pytest.raises(ValueError, match=r"one size, found \(4, 5\) and \(5, 4\)"):
        mask_iou(full, full.T)


def reference_ap(scores, ious, truths, threshold):
    """Independent: one list of all predictions, truths claimed in its order."""
    order = sorted(
        ((score, p, i) for p, own in enumerate(scores) for i, score in enumerate(own)),
        key=lambda one: (-one[0], one[1], one[2]),
    )
    claimed, hits, ranked = set(), [], []
    for score, p, i in order:
        free = [
            (ious[p][i][t], -t)
            for t in range(truths[p])
            if (p, t) not in claimed and ious[p][i][t] >= threshold
        ]
        if free:
            claimed.add((p, -max(free)[1]))
        hits.append(bool(free))
        ranked.append(score)
    if not any(hits):
        return 0.0
    return average_precision_score(hits, ranked) * sum(hits) / sum(truths)


@st.composite
def evaluations(draw):
    numbers = st.integers(0, 8).map(lambda n: n / 8)
    truths = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    scores, ious = [], []
    for count in truths:
        own = draw(st.lists(numbers, max_size=4))
        row = st.lists(numbers, min_size=count, max_size=count)
        scores.append(own)
        ious.append(draw(st.lists(row, min_size=len(own), max_size=len(own))))
    return scores, ious, truths


@settings(max_examples=300)
@given(evaluations(), st.sampled_from([0.25, 0.5, 0.75]))
def test_average_precision_is_that_of_scikit_learn(evaluation, threshold):
    found = average_precision(*evaluation, threshold)
    if not sum(evaluation[2]):
        assert math.isnan(found)
    else:
        assert math.isclose(found, reference_ap(*evaluation, threshold), abs_tol=1e-12)
        assert 0 <= found <= 1


def test_average_precision_by_hand():
    ious = [[[0.9, 0.0], [0.8, 0.0], [0.0, 0.6]]]
    by_hand = (1 / 1 + 2 / 3) / 2
    assert math.isclose(average_precision([[0.9, 0.8, 0.7]], ious, [2]), by_hand)
    # All scores equal: one step, precision 2 of 3 at recall 1.
    assert math.isclose(average_precision([[1.0, 1.0, 1.0]], ious, [2]), 2 / 3)
    assert average_precision([[], []], [[], []], [1, 0]) == 0
    assert math.isnan(average_precision([[0.5]], [[[]]], [0]))


def test_a_truth_is_found_once():
    repeated = [[0.9, 0.8, 0.7]], [[[1.0], [0.9], [0.8]]], [1]
    assert average_precision(*repeated) == 1
    assert museum.a_truth_found_twice(*repeated) > 1


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"ious: expected 2 rows of 1 truths, found"):
        average_precision([[0.5, 0.4]], [[[1.0]]], [1])
    with pytest.raises(ValueError, match="ious: expected 1 rows of 2 truths"):
        average_precision([[0.5]], [[[1.0]]], [2])
    with pytest.raises(ValueError, match="shorter"):
        average_precision([[0.5], [0.5]], [[[1.0]]], [1])


# Masks in pictures


def random_mask(seed=0):
    noise = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise[None, None], 64, mode="bicubic")[
        0, 0
    ].clamp(0, 1)


@given(boxes(), st.integers(1, 90), st.integers(1, 90), st.integers(0, 3))
def test_a_mask_stays_in_its_box(box, height, width, seed):
    inside = paste_mask(random_mask(seed), box, height, width)
    assert inside.shape == (height, width) and inside.dtype == bool
    top, left = round(box[0] * height), round(box[1] * width)
    bottom, right = round(box[2] * height), round(box[3] * width)
    outside = inside.copy()
    outside[top:bottom, left:right] = False
    assert not outside.any()
    full = paste_mask(torch.ones(64, 64), box, height, width)
    assert full.sum() == max(0, bottom - top) * max(0, right - left)


def test_a_pasted_mask_is_that_of_big_vision():
    """Its evaluator: PIL's bilinear, above 0 in [-1, 1]; edges cut down by int."""
    box, mask = (0.25, 0.125, 0.75, 0.625), random_mask(5)
    scaled = (2 * mask - 1).numpy()
    part = np.asarray(Image.fromarray(scaled).resize((80, 60), Image.BILINEAR)) > 0
    expected = np.zeros((120, 160), bool)
    expected[30:90, 20:100] = part
    assert (paste_mask(mask, box, 120, 160) == expected).all()


def test_the_twin_paints_outside_of_the_box():
    box, mask = (0.25, 0.25, 0.5, 0.5), random_mask(1)
    wrong = museum.mask_over_the_picture(mask, box, 40, 40)
    wrong[10:20, 10:20] = False
    assert wrong.any()


def test_an_empty_mask_and_a_box_below_half_a_pixel_leave_nothing():
    assert not paste_mask(torch.zeros(64, 64), (0.0, 0.0, 1.0, 1.0), 9, 9).any()
    assert not paste_mask(torch.ones(64, 64), (0.1, 0.1, 0.12, 0.12), 9, 9).any()


def test_a_mask_that_cannot_decide_is_outside():
    undecided = torch.full((64, 64), 0.5)
    assert not paste_mask(undecided, (0.0, 0.0, 1.0, 1.0), 64, 64).any()


# Drawing


def things(number):
    rng = random.Random(number)
    answer = []
    for n in range(number):
        top, left = rng.uniform(0, 0.8), rng.uniform(0, 0.8)
        box = box_to_tokens((top, left, top + 0.15, left + 0.2))
        answer.append(f"{box}{MASK if n % 2 else ''} thing {n}")
    return parse(" ; ".join(answer))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK"])
def test_any_picture_can_be_drawn_on_and_stays_as_it_was(mode):
    picture = Image.effect_noise((60, 40), 90).convert(mode)
    before = picture.tobytes()
    drawn = draw(picture, things(3), load_mask_codec())
    assert drawn.mode == "RGB" and picture.tobytes() == before
    assert drawn.width >= drawing.SMALLEST and drawn.width % 60 == 0


@settings(max_examples=30)
@given(
    boxes(),
    st.sampled_from([(1, 1), (3, 500), (500, 3), (24, 24), (700, 400)]),
    st.text(max_size=60),
)
def test_any_box_and_name_can_be_drawn(box, size, name):
    picture = Image.new("RGB", size, "white")
    found = Found(name, box, tuple(range(16)), "")
    drawn = draw(picture, [found] * 2, load_mask_codec())
    assert drawn.tobytes() != drawing.enlarged(picture).tobytes()


def test_what_is_drawn_is_at_its_place():
    picture = Image.new("RGB", (400, 200), "white")
    (found,) = parse(f"{box_to_tokens((0.5, 0.5, 0.9, 0.8))} cat")
    changed = (np.asarray(draw(picture, [found])) != 255).any(-1)
    rows, columns = changed.nonzero()
    assert (columns.min(), columns.max()) == (200, 319)
    assert rows.max() == 179 and 70 < rows.min() < 100  # the name stands above
    assert not changed[110:170, 210:310].any()  # and there is no mask


def test_nothing_valid_draws_nothing():
    picture = Image.effect_noise((400, 400), 90).convert("RGB")
    for found in ([], parse("cat ; <loc0001>")):
        assert draw(picture, found).tobytes() == picture.tobytes()


def test_masks_are_drawn_with_a_codec_alone():
    picture, codec = Image.new("RGB", (400, 400), "white"), load_mask_codec()
    (found,) = parse(f"{box_to_tokens((0.2, 0.2, 0.8, 0.8))}{MASK} cat")
    plain, masked = draw(picture, [found]), draw(picture, [found], codec)
    changed = (np.asarray(plain) != np.asarray(masked)).any(-1)
    mask = codec.decode(torch.tensor([found.codes]))[0]
    inside = paste_mask(mask, found.box, 400, 400)
    assert changed.any() and not (changed & ~inside).any()


def test_no_name_is_under_a_veil():
    picture, codec = Image.new("RGB", (400, 400), "white"), load_mask_codec()
    label, whole = box_to_tokens((0.5, 0.5, 0.9, 0.9)), (0.0, 0.0, 1.0, 1.0)
    (named,) = parse(f"{label} cat")
    name = (np.asarray(draw(picture, [named])) != 255).any(-1)
    name[200:] = False  # above the box
    full = torch.ones(1, 64, 64)
    veil = Found("", whole, tuple(codec.encode(full)[0].tolist()), "")
    both = np.asarray(draw(picture, [named, veil], codec))
    assert (both[name] == np.asarray(draw(picture, [named]))[name]).all()


def test_a_long_name_stays_in_the_picture():
    picture = Image.new("RGB", (400, 400), "white")
    (found,) = parse(f"{box_to_tokens((0.5, 0.9, 0.9, 0.99))} a long name of a thing")
    drawn = np.asarray(draw(picture, [found]))
    label = (drawn[150:195] != 255).any(-1)
    rows, columns = label.nonzero()
    assert columns.max() - columns.min() > 100
    # Its frame is closed on the right: black from top to bottom.
    edge = drawn[150:195, columns.max()][rows.min() : rows.max() + 1]
    assert (edge == 0).all()


def test_without_freetype_names_lose_what_cannot_be_written(monkeypatch):
    from PIL import ImageFont

    bitmap = ImageFont.load_default_imagefont()
    monkeypatch.setattr(drawing.ImageFont, "load_default", lambda size: bitmap)
    found = Found("猫 cat", (0.2, 0.2, 0.8, 0.8), None, "")
    assert draw(Image.new("RGB", (400, 400)), [found]).size == (400, 400)


def test_the_module_needs_no_plots_and_no_classroom():
    code = (
        "import sys, pgcore.grounding; print([m for m in sys.modules if"
        " m.startswith(('matplotlib', 'pgcore.lab', 'sklearn', 'transformers'))])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert result.stdout.strip() == "[]", result.stderr
    assert module.MaskCodec is load_mask_codec().__class__
