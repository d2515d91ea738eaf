"""Chapter 11: one right answer for each exercise, and several wrong ones."""

from itertools import pairwise

import torch

# 11.1


def to_bytes(pixels):
    levels = (pixels + 1) / 2 * 255
    return levels.round().clamp(0, 255).byte().permute(1, 2, 0)


def to_bytes_cut(pixels):
    levels = (pixels + 1) / 2 * 255
    return levels.clamp(0, 255).byte().permute(1, 2, 0)


def to_bytes_by_256(pixels):
    levels = ((pixels + 1) / 2 * 256).floor()
    return levels.clamp(0, 255).byte().permute(1, 2, 0)


def to_bytes_wrapped(pixels):
    levels = ((pixels + 1) / 2 * 255).round().long() % 256
    return levels.byte().permute(1, 2, 0)


def to_bytes_channels_first(pixels):
    return to_bytes(pixels).permute(2, 0, 1)


def to_bytes_transposed(pixels):
    return to_bytes(pixels).transpose(0, 1)


def to_bytes_floats(pixels):
    return to_bytes(pixels).float()


# 11.2


def lay_over(rgba, colour):
    picture, alpha = rgba[:3], rgba[3:]
    return alpha * picture + (1 - alpha) * colour[:, None, None]


def lay_over_dropped(rgba, colour):
    return rgba[:3]


def lay_over_premultiplied(rgba, colour):
    return rgba[:3] + (1 - rgba[3:]) * colour[:, None, None]


def lay_over_cut(rgba, colour):
    return torch.where(rgba[3:] > 0.5, rgba[:3], colour[:, None, None])


def lay_over_backwards(rgba, colour):
    return lay_over(torch.cat((rgba[:3], 1 - rgba[3:])), colour)


def lay_over_white(rgba, colour):
    return lay_over(rgba, torch.ones(3))


# 11.3


def cut(word, pairs):
    rank = {tuple(pair): i for i, pair in reversed(list(enumerate(pairs)))}
    pieces = list(word)
    while True:
        places = [
            (rank[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in rank
        ]
        if not places:
            return pieces
        _, i = min(places)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def cut_in_one_walk(word, pairs):
    pieces = list(word)
    for pair in pairs:
        pieces = cut_in_one_walk_over(pieces, pair)
    return pieces


def cut_all_of_the_best_pair_at_once(word, pairs):
    pieces = list(word)
    while known := [pair for pair in pairs if tuple(pair) in pairwise(pieces)]:
        pieces = cut_in_one_walk_over(pieces, known[0])
    return pieces


def cut_in_one_walk_over(pieces, pair):
    joined = []
    for piece in pieces:
        if joined and (joined[-1], piece) == tuple(pair):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def cut_by_the_piece_not_the_pair(word, pairs):
    rank = {"".join(pair): i for i, pair in reversed(list(enumerate(pairs)))}
    pieces = list(word)
    while True:
        joins = enumerate(map("".join, pairwise(pieces)))
        places = [(rank[join], i) for i, join in joins if join in rank]
        if not places:
            return pieces
        _, i = min(places)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def cut_longest_first(word, pairs):
    known = {*word, *map("".join, pairs)}
    pieces = []
    while word:
        length = max(k for k in range(1, len(word) + 1) if word[:k] in known)
        pieces.append(word[:length])
        word = word[length:]
    return pieces


def cut_from_the_left(word, pairs):
    known, pieces = {*map(tuple, pairs)}, list(word)
    while True:
        places = [i for i, pair in enumerate(pairwise(pieces)) if pair in known]
        if not places:
            return pieces
        i = places[0]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def cut_last_first(word, pairs):
    return cut(word, pairs[::-1])


def cut_letters(word, pairs):
    return list(word)


# 11.4


def lay_out(prefixes, suffixes, pad, eos):
    ends = [[*suffix, eos] for suffix in suffixes]
    rows = [[*a, *b] for a, b in zip(prefixes, ends, strict=True)]
    longest = max(map(len, rows))

    def padded(rows, filler):
        return torch.tensor([[filler] * (longest - len(row)) + row for row in rows])

    mask = padded([[True] * len(row) for row in rows], False)
    return padded(rows, pad), mask, padded(ends, -100)


def lay_out_mask_from_ids(prefixes, suffixes, pad, eos):
    ids, _, labels = lay_out(prefixes, suffixes, pad, eos)
    return ids, ids != pad, labels


def lay_out_right(prefixes, suffixes, pad, eos):
    tensors = lay_out(prefixes, suffixes, pad, eos)
    shifts = (~tensors[1]).sum(dim=1).tolist()
    return [
        torch.stack([row.roll(-k) for row, k in zip(tensor, shifts, strict=True)])
        for tensor in tensors
    ]


def lay_out_learns_the_prompt(prefixes, suffixes, pad, eos):
    ids, mask, _ = lay_out(prefixes, suffixes, pad, eos)
    return ids, mask, ids.where(mask, -100)


def lay_out_without_eos(prefixes, suffixes, pad, eos):
    return [x[:, :-1] for x in lay_out(prefixes, suffixes, pad, eos)]


def lay_out_eos_not_learned(prefixes, suffixes, pad, eos):
    ids, mask, labels = lay_out(prefixes, suffixes, pad, eos)
    labels[:, -1] = -100
    return ids, mask, labels


def lay_out_changes_lists(prefixes, suffixes, pad, eos):
    for suffix in suffixes:
        suffix.append(eos)
    return [x[:, :-1] for x in lay_out(prefixes, suffixes, pad, eos)]


# 11.5


def resize_matrix(old, new):
    scale = old / new
    middles = torch.arange(old, dtype=torch.float64) + 0.5
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    distance = (middles - centres[:, None]).abs() / max(scale, 1.0)
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)


def resize_matrix_aliased(old, new):
    scale = old / new
    middles = torch.arange(old, dtype=torch.float64) + 0.5
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    weights = (1 - (middles - centres[:, None]).abs()).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)


def resize_matrix_dark_edges(old, new):
    scale = old / new
    middles = torch.arange(old, dtype=torch.float64) + 0.5
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    distance = (middles - centres[:, None]).abs() / max(scale, 1.0)
    return (1 - distance).clamp(min=0) / max(scale, 1.0)


def resize_matrix_corners(old, new):
    scale = old / new
    middles = torch.arange(old, dtype=torch.float64)
    centres = torch.arange(new, dtype=torch.float64) * scale
    distance = (middles - centres[:, None]).abs() / max(scale, 1.0)
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)


def resize_matrix_shrinks_when_growing(old, new):
    scale = old / new
    middles = torch.arange(old, dtype=torch.float64) + 0.5
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    distance = (middles - centres[:, None]).abs() / scale
    weights = (1 - distance).clamp(min=1e-12)
    return weights / weights.sum(dim=1, keepdim=True)


RIGHT = {
    "11.1": to_bytes,
    "11.2": lay_over,
    "11.3": cut,
    "11.4": lay_out,
    "11.5": resize_matrix,
}
WRONG = {
    "11.1": [
        to_bytes_cut,
        to_bytes_by_256,
        to_bytes_wrapped,
        to_bytes_channels_first,
        to_bytes_transposed,
        to_bytes_floats,
    ],
    "11.2": [
        lay_over_dropped,
        lay_over_premultiplied,
        lay_over_cut,
        lay_over_backwards,
        lay_over_white,
    ],
    "11.3": [
        cut_in_one_walk,
        cut_all_of_the_best_pair_at_once,
        cut_by_the_piece_not_the_pair,
        cut_longest_first,
        cut_from_the_left,
        cut_last_first,
        cut_letters,
    ],
    "11.4": [
        lay_out_mask_from_ids,
        lay_out_right,
        lay_out_learns_the_prompt,
        lay_out_without_eos,
        lay_out_eos_not_learned,
        lay_out_changes_lists,
    ],
    "11.5": [
        resize_matrix_aliased,
        resize_matrix_dark_edges,
        resize_matrix_corners,
        resize_matrix_shrinks_when_growing,
    ],
}
