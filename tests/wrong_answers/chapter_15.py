"""Chapter 15: one right answer for each exercise, and several wrong ones."""

import re

import torch

# 15.1


def box_numbers(x, y, w, h, height, width):
    shares = y / height, x / width, (y + h) / height, (x + w) / width
    return [round(1023 * share) for share in shares]


def x_first(x, y, w, h, height, width):
    top, left, bottom, right = box_numbers(x, y, w, h, height, width)
    return [left, top, right, bottom]


def size_for_edge(x, y, w, h, height, width):
    return [round(1023 * s) for s in (y / height, x / width, h / height, w / width)]


def of_1024(x, y, w, h, height, width):
    shares = y / height, x / width, (y + h) / height, (x + w) / width
    return [min(int(1024 * share), 1023) for share in shares]


def cut_down(x, y, w, h, height, width):
    shares = y / height, x / width, (y + h) / height, (x + w) / width
    return [int(1023 * share) for share in shares]


def one_side_for_both(x, y, w, h, height, width):
    side = max(height, width)
    return [round(1023 * edge / side) for edge in (y, x, y + h, x + w)]


# 15.2


def read_boxes(text):
    pairs = []
    for part in text.split(";"):
        match = re.match(r"((?:\s*<loc\d{4}>)*)(.*)", part, re.DOTALL)
        name = " ".join(match[2].split())
        edges = [int(n) / 1023 for n in re.findall(r"\d+", match[1])]
        is_box = (
            len(edges) == 4
            and max(edges) <= 1
            and edges[0] < edges[2]
            and edges[1] < edges[3]
        )
        if part.strip():
            pairs.append((name, tuple(edges) if is_box else None))
    return pairs


def drops_the_invalid(text):
    return [pair for pair in read_boxes(text) if pair[1] is not None]


def one_word_names(text):
    return [(name.split(" ")[0], box) for name, box in read_boxes(text)]


def upside_down_is_fine(text):
    pairs = []
    for part in text.split(";"):
        edges = [int(n) / 1023 for n in re.findall(r"<loc(\d{4})>", part)]
        name = " ".join(re.sub(r"<loc\d{4}>", "", part).split())
        if part.strip():
            good = len(edges) == 4 and max(edges) <= 1
            pairs.append((name, tuple(edges) if good else None))
    return pairs


def the_first_four(text):
    pairs = []
    for part in text.split(";"):
        edges = tuple(int(n) / 1023 for n in re.findall(r"<loc(\d{4})>", part)[:4])
        name = " ".join(re.sub(r"<loc\d{4}>", "", part).split())
        good = len(edges) == 4 and edges[0] < edges[2] <= 1 and edges[1] < edges[3] <= 1
        if part.strip():
            pairs.append((name, edges if good else None))
    return pairs


def raises(text):
    pattern = r"\s*((?:<loc\d{4}>){4}) ([^;<]+)"
    return [
        (match[2].strip(), tuple(int(n) / 1023 for n in re.findall(r"\d+", match[1])))
        for match in (re.fullmatch(pattern, part) for part in text.split(" ; "))
    ]


# 15.3


def iou_table(boxes, others):
    corner = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    opposite = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (opposite - corner).clamp(min=0).prod(-1)
    areas, other_areas = ((b[:, 2:] - b[:, :2]).prod(-1) for b in (boxes, others))
    return shared / (areas[:, None] + other_areas - shared)


def two_negative_sides(boxes, others):
    corner = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    opposite = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (opposite - corner).prod(-1).clamp(min=0)
    areas, other_areas = ((b[:, 2:] - b[:, :2]).prod(-1) for b in (boxes, others))
    return shared / (areas[:, None] + other_areas - shared)


def counts_the_shared_twice(boxes, others):
    corner = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    opposite = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (opposite - corner).clamp(min=0).prod(-1)
    areas, other_areas = ((b[:, 2:] - b[:, :2]).prod(-1) for b in (boxes, others))
    return shared / (areas[:, None] + other_areas)


def transposed(boxes, others):
    return iou_table(others, boxes)


def by_the_hull(boxes, others):
    corner = torch.minimum(boxes[:, None, :2], others[None, :, :2])
    opposite = torch.maximum(boxes[:, None, 2:], others[None, :, 2:])
    inner = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    outer = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (outer - inner).clamp(min=0).prod(-1)
    return shared / (opposite - corner).prod(-1)


# 15.4


def round_to(x, levels):
    nearest = levels[(x[..., None] - levels).abs().argmin(-1)]
    inside = x.clamp(levels[0], levels[-1])
    return inside + (nearest - inside).detach()


def no_gradient(x, levels):
    return levels[(x[..., None] - levels).abs().argmin(-1)] + 0 * x.detach()


def a_gradient_everywhere(x, levels):
    nearest = levels[(x[..., None] - levels).abs().argmin(-1)]
    return x + (nearest - x).detach()


def not_rounded(x, levels):
    return x.clamp(levels[0], levels[-1])


def rounded_down(x, levels):
    place = torch.bucketize(x.detach(), levels, right=True).clamp(min=1) - 1
    inside = x.clamp(levels[0], levels[-1])
    return inside + (levels[place] - inside).detach()


# 15.5


def renew(codebook, latents):
    distances, chosen = torch.cdist(latents, codebook).min(1)
    counts = torch.bincount(chosen, minlength=len(codebook))
    sums = torch.zeros_like(codebook).index_add_(0, chosen, latents)
    new = sums / counts.clamp(min=1)[:, None]
    for code in (counts == 0).nonzero().flatten():
        new[code] = latents[distances.argmax()]
        distances = torch.minimum(distances, (latents - new[code]).norm(dim=1))
    return new


def the_worst_at_once(codebook, latents):
    distances, chosen = torch.cdist(latents, codebook).min(1)
    new = renew(codebook, latents)
    dead = torch.bincount(chosen, minlength=len(codebook)) == 0
    worst = distances.argsort(descending=True)[: int(dead.sum())]
    new[dead] = latents[worst]
    return new


def leaves_the_dead(codebook, latents):
    _, chosen = torch.cdist(latents, codebook).min(1)
    counts = torch.bincount(chosen, minlength=len(codebook))
    sums = torch.zeros_like(codebook).index_add_(0, chosen, latents)
    means = sums / counts.clamp(min=1)[:, None]
    return torch.where(counts[:, None] > 0, means, codebook)


def the_dead_go_to_zero(codebook, latents):
    _, chosen = torch.cdist(latents, codebook).min(1)
    counts = torch.bincount(chosen, minlength=len(codebook))
    sums = torch.zeros_like(codebook).index_add_(0, chosen, latents)
    return sums / counts.clamp(min=1)[:, None]


def all_to_the_same(codebook, latents):
    distances, chosen = torch.cdist(latents, codebook).min(1)
    new = renew(codebook, latents)
    counts = torch.bincount(chosen, minlength=len(codebook))
    new[counts == 0] = latents[distances.argmax()]
    return new


def to_the_nearest(codebook, latents):
    distances, chosen = torch.cdist(latents, codebook).min(1)
    new = renew(codebook, latents)
    dead = torch.bincount(chosen, minlength=len(codebook)) == 0
    new[dead] = latents[distances.argsort()[: int(dead.sum())]]
    return new


def in_place(codebook, latents):
    codebook.copy_(renew(codebook, latents))
    return codebook


RIGHT = {
    "15.1": box_numbers,
    "15.2": read_boxes,
    "15.3": iou_table,
    "15.4": round_to,
    "15.5": renew,
}
WRONG = {
    "15.1": [x_first, size_for_edge, of_1024, cut_down, one_side_for_both],
    "15.2": [
        drops_the_invalid,
        one_word_names,
        upside_down_is_fine,
        the_first_four,
        raises,
    ],
    "15.3": [two_negative_sides, counts_the_shared_twice, transposed, by_the_hull],
    "15.4": [no_gradient, a_gradient_everywhere, not_rounded, rounded_down],
    "15.5": [
        leaves_the_dead,
        the_dead_go_to_zero,
        all_to_the_same,
        the_worst_at_once,
        to_the_nearest,
        in_place,
    ],
}
