"""Checks of chapter 15, Boxes and masks. The oracles count, or go step by step."""

import random

import torch
from torch import Tensor

from pgcore.lab.checks import exercise, require, require_close


@exercise("15.1")
def a_box_that_can_be_checked_by_hand(box_numbers):
    """gives top, left, bottom, right, each in 1023rds of its own side"""
    found = list(box_numbers(320, 120, 320, 240, 480, 1280))
    expected = [256, 256, 767, 512]
    require(found == expected, f"expected {expected}, got {found}")


@exercise("15.1")
def the_whole_picture_has_the_last_word(box_numbers):
    """says 0 and 1023 for the whole picture, and rounds to the nearest"""
    found = list(box_numbers(0, 0, 640, 480, 480, 640))
    require(found == [0, 0, 1023, 1023], f"expected 0, 0, 1023, 1023, got {found}")
    rng = random.Random(0)
    for _ in range(200):
        height, width = rng.randint(50, 900), rng.randint(50, 900)
        y, x = rng.randrange(height - 20), rng.randrange(width - 20)
        h, w = rng.randint(10, height - y), rng.randint(10, width - x)
        numbers = box_numbers(x, y, w, h, height, width)
        require(
            all(type(number) is int for number in numbers), f"four ints, got {numbers}"
        )
        edges = y / height, x / width, (y + h) / height, (x + w) / width
        for number, edge in zip(numbers, edges, strict=True):
            require(
                abs(number / 1023 - edge) <= 0.5 / 1023 + 1e-9,
                f"x, y, w, h = {x, y, w, h} of {height} x {width}: got {numbers}",
            )


BOX = "<loc0100><loc0200><loc0300><loc0400>"
EDGES = tuple(n / 1023 for n in (100, 200, 300, 400))


@exercise("15.2")
def what_is_right_is_read(read_boxes):
    """reads several things, and names of several words"""
    found = read_boxes(f"{BOX} red apple ; {BOX} cat")
    expected = [("red apple", EDGES), ("cat", EDGES)]
    require([tuple(pair) for pair in found] == expected, f"got {found}")


@exercise("15.2")
def what_is_wrong_is_kept(read_boxes):
    """keeps what has no box, with None, and nothing else"""
    cases = {
        "": [],
        " ; ": [],
        "nothing here": [("nothing here", None)],
        f"{BOX[:27]} cat ; {BOX} dog": [("cat", None), ("dog", EDGES)],
        f"{BOX}<loc0500> cat": [("cat", None)],
        "<loc0300><loc0200><loc0100><loc0400> cat": [("cat", None)],
        "<loc0100><loc0400><loc0300><loc0400> cat": [("cat", None)],
        f"  {BOX}   big   cat  ": [("big cat", EDGES)],
    }
    for text, expected in cases.items():
        found = [tuple(pair) for pair in read_boxes(text)]
        require(found == expected, f"{text!r}: expected {expected}, got {found}")
    ((_, box),) = read_boxes(f"cat {BOX}")
    require(box is None, f"four locations behind the name: got {box}")


@exercise("15.2")
def no_text_raises(read_boxes):
    """returns a list for any text"""
    rng = random.Random(1)
    pieces = (BOX, "<loc0001>", "<loc9999>", "<seg001>", "<loc", ";", " ", "cat", "\n")
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=rng.randrange(9)))
        found = read_boxes(text)
        require(isinstance(found, list), f"{text!r}: expected a list, got {found}")
        for _, box in found:
            require(box is None or max(box) <= 1, f"{text!r}: an edge beyond 1: {box}")


def random_boxes(number: int, seed: int) -> Tensor:
    """Boxes in shares, of all sizes, with doubles between the two seeds."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(number, 2, 2, generator=generator, dtype=torch.float64)
    return corners.sort(dim=1).values.flatten(1)


def counted(one: Tensor, other: Tensor) -> float:
    """The oracle: IoU of two boxes, on a fine grid of their own edges."""
    ys = sorted({*one[::2].tolist(), *other[::2].tolist()})
    xs = sorted({*one[1::2].tolist(), *other[1::2].tolist()})
    both = either = 0.0
    for top, bottom in zip(ys, ys[1:], strict=False):
        for left, right in zip(xs, xs[1:], strict=False):
            inside = [
                b[0] <= top and bottom <= b[2] and b[1] <= left and right <= b[3]
                for b in (one, other)
            ]
            area = (bottom - top) * (right - left)
            both += area * all(inside)
            either += area * any(inside)
    return both / either


@exercise("15.3")
def every_pair_is_right(iou_table):
    """agrees with areas counted piece by piece"""
    boxes, others = random_boxes(5, 0), random_boxes(4, 1)
    others[0] = boxes[0]
    expected = torch.tensor(
        [[counted(one, other) for other in others] for one in boxes],
        dtype=torch.float64,
    )
    require_close(iou_table(boxes, others), expected)


@exercise("15.3")
def boxes_apart_share_nothing(iou_table):
    """gives 0 for boxes that do not touch, in one direction or in both"""
    box = torch.tensor([[0.1, 0.1, 0.3, 0.3]])
    apart = torch.tensor(
        [[0.5, 0.5, 0.7, 0.7], [0.1, 0.6, 0.3, 0.8], [0.6, 0.1, 0.8, 0.3]]
    )
    require_close(iou_table(box, apart), torch.zeros(1, 3))


@exercise("15.3")
def none_is_no_trouble(iou_table):
    """works for no boxes at all"""
    boxes = random_boxes(3, 2)
    for n, m in ((0, 3), (3, 0), (0, 0)):
        shape = tuple(iou_table(boxes[:n], boxes[:m]).shape)
        require(shape == (n, m), f"expected {(n, m)}, got {shape}")


LEVELS = torch.tensor([-1.0, -0.25, 0.5, 2.0])


@exercise("15.4")
def values_are_levels(round_to):
    """gives the nearest level, for any shape"""
    x = torch.linspace(-3, 4, 30).reshape(2, 3, 5)
    nearest = [min(LEVELS.tolist(), key=lambda one: abs(one - v)) for v in x.flatten()]
    require_close(round_to(x, LEVELS), torch.tensor(nearest).reshape(x.shape))


@exercise("15.4")
def gradients_are_those_of_a_clamp(round_to):
    """passes the gradient inside the range, and none outside"""
    x = torch.tensor([-1.7, -0.9, 0.0, 0.4, 1.9, 2.6], requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    (round_to(x, LEVELS) * weights).sum().backward()
    require(x.grad is not None, "no gradient arrives at x")
    require_close(x.grad, torch.tensor([0.0, 2.0, 3.0, 4.0, 5.0, 0.0]), "gradient")


def clusters(seed: int) -> Tensor:
    """Latents in 12 clumps."""
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(12, 3, generator=generator)
    return (centres + 0.1 * torch.randn(20, 12, 3, generator=generator)).flatten(0, 1)


@exercise("15.5")
def codes_in_use_become_means(renew):
    """moves each chosen code to the mean of what chose it"""
    codebook = torch.tensor([[0.0], [10.0]])
    latents = torch.tensor([[1.0], [2.0], [9.0]])
    before = codebook.clone()
    require_close(renew(codebook, latents), torch.tensor([[1.5], [9.0]]))
    require(torch.equal(codebook, before), "the old codebook was changed")


@exercise("15.5")
def the_dead_go_where_the_need_is(renew):
    """moves unused codes to the worst served latents, the worst first"""
    codebook = torch.tensor([[0.0], [100.0], [-100.0]])
    latents = torch.tensor([[1.0], [-1.0], [6.5], [7.0], [-4.0]])
    require_close(renew(codebook, latents), torch.tensor([[1.9], [7.0], [-4.0]]))


@exercise("15.5")
def nothing_stays_dead(renew):
    """brings all codes into use, and the error down"""
    latents = clusters(0)
    codebook = 50 + torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    for _ in range(25):
        codebook = renew(codebook, latents)
    distances, chosen = torch.cdist(latents, codebook).min(1)
    used = len(chosen.unique())
    require(used == 12, f"after 25 rounds {used} of 12 codes are in use")
    error = distances.square().mean().item()
    require(error < 0.1, f"mean squared error {error:.2f}, 0.03 is possible")
