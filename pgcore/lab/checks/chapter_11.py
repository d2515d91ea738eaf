"""Checks of chapter 11, Pixels and tokens. Oracles: Pillow, tokenizers, torch."""

import random

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models

from pgcore.lab.checks import exercise, require, require_close


def all_levels(size: int = 16) -> torch.Tensor:
    """Three channels in which all 256 bytes occur, in different orders."""
    levels = torch.arange(size * size).view(size, size)
    return torch.stack([levels, levels.T, levels.flip(0)]) % 256


@exercise("11.1")
def every_byte_comes_back(to_bytes):
    """gives all 256 levels back, and their order of axes"""
    levels = all_levels()
    pixels = levels.float().div(255).sub(0.5).div(0.5)
    found = to_bytes(pixels)
    dtype = getattr(found, "dtype", type(found))
    require(dtype == torch.uint8, f"expected dtype torch.uint8, got {dtype}")
    require_close(found, levels.permute(1, 2, 0), "Round before you convert.")
    Image.fromarray(found.contiguous().numpy())


@exercise("11.1")
def numbers_outside_are_cut_off(to_bytes):
    """cuts off what is outside, black at -1 and white at 1"""
    pixels = torch.tensor([-1.2, -1.0, 0.0, 1.0]).view(1, 2, 2).repeat(3, 1, 1)
    found = to_bytes(pixels + torch.tensor([0.0, 0.0, 0.003, 0.4]).view(2, 2))
    expected = torch.tensor([0, 0, 128, 255]).view(2, 2, 1).expand(2, 2, 3)
    require_close(found, expected, "A byte goes from 0 to 255 and then wraps.")


@exercise("11.1")
def numbers_between_are_rounded(to_bytes):
    """rounds to the nearest level"""
    between = torch.tensor([10.7, 99.4, 200.6, 253.4]).div(255).sub(0.5).div(0.5)
    found = to_bytes(between.view(1, 2, 2).repeat(3, 1, 1))
    expected = torch.tensor([11, 99, 201, 253]).view(2, 2, 1).expand(2, 2, 3)
    require_close(found, expected, "The nearest level.")


@exercise("11.2")
def alpha_is_laid_over(lay_over):
    """agrees with Pillow, to a level of 255"""
    generator = torch.Generator().manual_seed(0)
    rgba = torch.randint(256, (4, 9, 9), generator=generator)
    for colour in ((255, 255, 255), (0, 0, 0), (200, 30, 90)):
        base = Image.new("RGBA", (9, 9), (*colour, 255))
        picture = Image.fromarray(rgba.byte().permute(1, 2, 0).numpy())
        laid = Image.alpha_composite(base, picture).convert("RGB")
        expected = torch.tensor(list(laid.tobytes())).view(9, 9, 3) / 255
        found = lay_over(rgba / 255, torch.tensor(colour) / 255)
        hint = f"Background {colour}."
        require_close(found, expected.permute(2, 0, 1), hint, atol=1.01 / 255)


@exercise("11.2")
def the_ends_are_exact(lay_over):
    """shows the picture alone at alpha 1, the background alone at 0"""
    rgba = torch.rand(4, 5, 5, generator=torch.Generator().manual_seed(1))
    colour = torch.tensor([0.2, 0.4, 0.9])
    rgba[3] = 1
    require_close(lay_over(rgba, colour), rgba[:3], "Alpha is 1.")
    rgba[3] = 0
    behind = colour[:, None, None].expand(3, 5, 5)
    require_close(lay_over(rgba, colour), behind, "Alpha is 0.")


def by_library(word: str, pairs: list[tuple[str, str]]) -> list[str]:
    """The oracle: byte pairs of the library ``tokenizers``."""
    pieces = [*dict.fromkeys([*sorted(set(word)), *"abc", *map("".join, pairs)])]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return Tokenizer(models.BPE(vocab=vocabulary, merges=pairs)).encode(word).tokens


@exercise("11.3")
def words_are_cut_as_by_the_library(cut):
    """cuts as the library does, for pairs in any order"""
    chance = random.Random(0)
    cases = [
        ("abab", [("ab", "a"), ("a", "b")]),
        ("abc", [("b", "c"), ("a", "b"), ("ab", "c")]),
    ]
    for _ in range(60):
        pieces, pairs = ["a", "b", "c"], []
        for _ in range(chance.randint(0, 8)):
            pair = chance.choice(pieces), chance.choice(pieces)
            if pair not in pairs and len("".join(pair)) < 9:
                pairs.append(pair)
                pieces.append("".join(pair))
        chance.shuffle(pairs)
        word = "".join(chance.choices("abc", k=chance.randint(1, 14)))
        cases.append((word, pairs))
    for word, pairs in cases:
        found, expected = list(cut(word, list(pairs))), by_library(word, pairs)
        require(
            found == expected,
            f"{word!r} with {pairs}: expected {expected}, got {found}",
        )


@exercise("11.3")
def nothing_is_lost(cut):
    """gives the word back when the pieces are joined"""
    for word in ("caterpillar", "a", "ännä", "aaaaa"):
        found = cut(word, [("a", "a"), ("c", "a"), ("ca", "t"), ("l", "l")])
        require("".join(found) == word, f"{word!r} became {found}")


def by_loops(
    prefixes: list[list[int]], suffixes: list[list[int]], pad: int, eos: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The oracle: fill three tensors from the right, number by number."""
    pairs = list(zip(prefixes, suffixes, strict=True))
    length = max(len(a) + len(b) + 1 for a, b in pairs)
    ids = torch.full((len(pairs), length), pad)
    mask = torch.zeros(len(pairs), length, dtype=torch.bool)
    labels = torch.full((len(pairs), length), -100)
    for row, (prefix, suffix) in enumerate(pairs):
        for back, token in enumerate([eos, *suffix[::-1], *prefix[::-1]], start=1):
            ids[row, -back], mask[row, -back] = token, True
            if back <= len(suffix) + 1:
                labels[row, -back] = token
    return ids, mask, labels


@exercise("11.4")
def rows_are_laid_out(lay_out):
    """lays out ragged rows, and does not take a text for padding"""
    chance = random.Random(0)
    for pad, eos in ((0, 1), (7, 2)):
        for size in (1, 2, 5):
            texts = [
                [[chance.randint(0, 9) for _ in range(chance.randint(low, 6))]
                 for _ in range(size)]
                for low in (1, 0)
            ]  # fmt: skip
            kept = [[row[:] for row in rows] for rows in texts]
            found = lay_out(texts[0], texts[1], pad, eos)
            names = ("ids", "mask", "labels")
            for name, mine, right in zip(
                names, found, by_loops(kept[0], kept[1], pad, eos), strict=True
            ):
                require_close(mine, right, f"{name}, pad {pad}, eos {eos}.")
                require(mine.dtype == right.dtype, f"{name}: {mine.dtype}")
            require(texts == kept, "The lists of the caller have changed.")


@exercise("11.5")
def pictures_resize_as_in_torch(resize_matrix):
    """resizes as torch does, antialiased, to any size"""
    generator = torch.Generator().manual_seed(0)
    for old, new in ((64, 16), (50, 7), (9, 9), (5, 12), (3, 1), (1, 4)):
        x = torch.rand(old, old, generator=generator, dtype=torch.float64)
        options = {"mode": "bilinear", "antialias": True}
        expected = F.interpolate(x[None, None], (new, new), **options)[0, 0]
        matrix = resize_matrix(old, new)
        dtype = getattr(matrix, "dtype", type(matrix))
        require(dtype == torch.float64, f"expected float64, got {dtype}")
        require_close(matrix @ x @ matrix.T, expected, f"{old} to {new}.", atol=1e-5)


@exercise("11.5")
def one_colour_stays(resize_matrix):
    """leaves a picture of one colour as it is, up to its edges"""
    for old, new in ((100, 3), (4, 9), (7, 6)):
        matrix = resize_matrix(old, new)
        require(matrix.shape == (new, old), f"shape {tuple(matrix.shape)}")
        sums = matrix.sum(dim=1)
        require_close(sums, torch.ones(new), f"{old} to {new}: sums of rows.")
