"""Checks of chapter 08, rotary positions. The oracles are complex numbers."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pgcore.lab.checks import exercise, require, require_close


def draw(*sizes: int, seed: int) -> Tensor:
    """Normal numbers, always the same."""
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def angles_of(positions: Tensor, half: int, base: float) -> Tensor:
    """Positions times speeds, in float64: the positions' axes, then half."""
    pair = torch.arange(half, dtype=torch.float64)
    return positions[..., None].double() * base ** (-pair / half)


def turned(first: Tensor, second: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle: each pair is a complex number, times e^(i angle)."""
    product = torch.complex(first.double(), second.double()) * torch.exp(1j * angles)
    return product.real, product.imag


def half_split(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """x: ``... T H``, positions: ``T`` or whatever fits before H."""
    first, second = x.chunk(2, dim=-1)
    angles = angles_of(positions, first.shape[-1], base)
    return torch.cat(turned(first, second, angles), dim=-1)


def interleaved(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """The same with neighbouring features as pairs."""
    angles = angles_of(positions, x.shape[-1] // 2, base)
    both = turned(x[..., ::2], x[..., 1::2], angles)
    return torch.stack(both, dim=-1).flatten(-2)


# 08.1


@exercise("08.1")
def hands_turn_like_complex_numbers(turn_hands):
    """equals multiplication by e^(i angle)"""
    for shape in ((5,), (2, 3), (4, 1, 2)):
        hands, angles = draw(*shape, 2, seed=1), 3 * draw(*shape, seed=2)
        expected = torch.stack(turned(hands[..., 0], hands[..., 1], angles), -1)
        require_close(
            turn_hands(hands, angles),
            expected.float(),
            "Radians, and counterclockwise: (1, 0) by a quarter turn is (0, 1).",
            atol=1e-5,
        )


@exercise("08.1")
def turns_add_up(turn_hands):
    """turns by a and then by b as by a + b, and by 0 not at all"""
    hands, a, b = draw(20, 2, seed=3), draw(20, seed=4), draw(20, seed=5)
    twice = turn_hands(turn_hands(hands, a), b)
    require_close(twice, turn_hands(hands, a + b).detach(), atol=1e-5)
    require_close(turn_hands(hands, 0 * a), hands)


# 08.2

SIZES = ((7, 2, 100.0), (12, 6, 10_000.0), (9, 16, 500.0), (30, 256, 10_000.0))


@exercise("08.2")
def rope_is_complex_multiplication(rope):
    """equals one complex product a pair, for all sizes and bases"""
    for T, H, base in SIZES:
        x, positions = draw(T, H, seed=T), torch.arange(T)
        hint = f"H = {H}, base {base:g}: pair i is features i and i + H / 2."
        expected = half_split(x, positions, base).float()
        require_close(rope(x, positions, base), expected, hint, atol=1e-4)


@exercise("08.2")
def rope_makes_scores_of_distances(rope):
    """gives the same score when both tokens move on"""
    generator = torch.Generator().manual_seed(0)
    q, k = draw(2, 40, 32, seed=6)
    places = torch.randint(0, 500, (2, 40), generator=generator)
    here = (rope(q, places[0], 1e4) * rope(k, places[1], 1e4)).sum(-1)
    moved = places + 1000
    there = (rope(q, moved[0], 1e4) * rope(k, moved[1], 1e4)).sum(-1)
    require_close(there, here.detach(), "Both by 1000 places.", atol=0.01)


@exercise("08.2")
def rope_keeps_angles_exact_in_bfloat16(rope):
    """has its angles in float32 and its result in the dtype of x"""
    x = draw(4, 64, seed=7).bfloat16()
    positions = torch.tensor([0, 257, 4351, 8191])
    answer = rope(x, positions, 10_000.0)
    require(
        answer.dtype == torch.bfloat16, f"expected bfloat16 back, got {answer.dtype}"
    )
    hint = "x is bfloat16, but positions, speeds and angles should not be."
    expected = half_split(x, positions)
    require_close(answer, expected, hint, rtol=0.02, atol=0.05)


# 08.3


@exercise("08.3")
def scores_survive_the_conversion(to_interleaved):
    """gives the same scores under the interleaved turn"""
    for heads, head_dim, D in ((1, 6, 5), (3, 8, 4), (2, 16, 24), (4, 2, 7)):
        x = draw(9, D, seed=heads)
        weights = draw(2, heads * head_dim, D, seed=head_dim)
        positions = torch.arange(9)

        def scores(weights, turn, heads=heads, x=x, positions=positions):
            q, k = (
                turn((x @ w.T).unflatten(1, (heads, -1)).transpose(0, 1), positions)
                for w in weights
            )
            return q @ k.mT

        converted = [to_interleaved(w, head_dim) for w in weights]
        require(
            all(w.shape == weights[0].shape for w in converted),
            f"expected shape {tuple(weights[0].shape)}, "
            f"got {tuple(converted[0].shape)}",
        )
        hint = f"{heads} heads of {head_dim}: permute rows, head by head."
        expected = scores(weights, half_split).float()
        require_close(scores(converted, interleaved), expected, hint, atol=1e-3)


@exercise("08.3")
def rows_are_permuted(to_interleaved):
    """puts feature i and feature i + H / 2 of each head side by side"""
    rows = torch.arange(16.0)[:, None].expand(16, 3)
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    expected = torch.tensor([*order, *(8 + i for i in order)]).float()
    require_close(
        to_interleaved(rows, 8), expected[:, None].expand(16, 3), "Two heads of 8."
    )


# 08.4


def rounded_to(bits: int, positions: Tensor) -> Tensor:
    """Integers as a float with so many binary digits holds them."""
    mantissa, exponent = torch.frexp(positions.double())
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)


def by_batch(turn, x: Tensor, positions: Tensor) -> Tensor:
    """x: ``B heads T H``, positions: ``B T``; computed in float64."""
    return turn(x.double(), positions[:, None]).to(x.dtype)


def in_float32(x: Tensor, positions: Tensor) -> Tensor:
    """As a program computes it: every step in float32."""
    first, second = x.float().chunk(2, dim=-1)
    pair = torch.arange(first.shape[-1]) / first.shape[-1]
    angles = positions[:, None, :, None].float() * 10_000.0**-pair
    cos, sin = angles.cos(), angles.sin()
    halves = first * cos - second * sin, second * cos + first * sin
    return torch.cat(halves, dim=-1)


RIGHT_ROTATIONS = {
    "half-split": partial(by_batch, half_split),
    "half-split in float32": in_float32,
    "interleaved": partial(by_batch, interleaved),
    "base 500": partial(by_batch, partial(half_split, base=500.0)),
    "base 1 000 000": partial(by_batch, partial(interleaved, base=1e6)),
    "turned the other way": lambda x, p: in_float32(x, -p),
}


def stretches(x: Tensor, positions: Tensor) -> Tensor:
    """Wrong: lengths grow with the position."""
    return in_float32(x, positions) * (1 + positions[:, None, :, None] / 1000)


def loses_the_minus(x: Tensor, positions: Tensor) -> Tensor:
    """Wrong: both products are added, in both halves."""
    first, second = x.chunk(2, dim=-1)
    angles = angles_of(positions, first.shape[-1], 10_000.0)[:, None].to(x.dtype)
    cos, sin = angles.cos(), angles.sin()
    halves = first * cos + second * sin, second * cos + first * sin
    return torch.cat(halves, dim=-1)


def adds(x: Tensor, positions: Tensor) -> Tensor:
    """Wrong: adds the cosines and sines, as older models do."""
    angles = angles_of(positions, x.shape[-1] // 2, 10_000.0)[:, None]
    return x + torch.cat((angles.cos(), angles.sin()), dim=-1).to(x.dtype)


WRONG_ROTATIONS = {
    "positions in bfloat16": lambda x, p: in_float32(x, rounded_to(8, p)),
    "positions in TF32": lambda x, p: in_float32(x, rounded_to(11, p)),
    "a table that ends at 2048": lambda x, p: in_float32(x, p.clamp(max=2047)),
    "cosines and sines added": adds,
    "hands that grow": stretches,
    "no minus": loses_the_minus,
    "positions ignored": lambda x, p: x,
    "zeros": lambda x, p: 0 * x,
}


def drift(rotate: Callable[[Tensor, Tensor], Tensor]) -> float:
    """How far scores of 100 normal pairs move, five places apart, at 8000."""
    q, k = draw(2, 1, 1, 100, 64, seed=8)
    here, there = (
        (rotate(q, p + 5) * rotate(k, p)).sum(dim=-1)
        for p in (torch.zeros(1, 100).long(), torch.full((1, 100), 8000))
    )
    return (here - there).abs().max().item()


def is_answer(answer: object) -> bool:
    """True or False, also as a tensor of one."""
    return isinstance(answer, bool) or (
        isinstance(answer, Tensor) and answer.dtype == torch.bool and answer.ndim == 0
    )


@exercise("08.4")
def accepts_what_is_right(knows_distance_only):
    """lets every right rotation pass, whatever its layout and base"""
    for name, rotate in RIGHT_ROTATIONS.items():
        answer = knows_distance_only(rotate)
        require(is_answer(answer), f"expected True or False, got {answer!r}")
        require(
            answer,
            f"{name}: it is right, and your test says False. In float32 scores "
            f"of 100 normal pairs of 64 features drift by up to "
            f"{drift(rotate):.0e} at 8000.",
        )


@exercise("08.4")
def rejects_what_is_wrong(knows_distance_only):
    """stops every wrong one, early or late"""
    for name, rotate in WRONG_ROTATIONS.items():
        require(
            not knows_distance_only(rotate),
            f"{name}: it is wrong, and your test says True.",
        )


@exercise("08.4")
def rejects_positions_that_stop(knows_distance_only):
    """stops a program whose positions stand still from somewhere on"""
    for last in (260, 900, 3000, 7000):

        def stops(x: Tensor, positions: Tensor, last: int = last) -> Tensor:
            return in_float32(x, positions.clamp(max=last))

        require(
            not knows_distance_only(stops),
            f"positions that stop at {last}: your test says True.",
        )
