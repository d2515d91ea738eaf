"""Chapter 08: one right answer for each exercise, and several wrong ones."""

import torch

from pgcore.lab.checks.chapter_08 import in_float32

# 08.1


def turn_hands(hands, angles):
    x, y = hands.unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((x * cos - y * sin, y * cos + x * sin), dim=-1)


def hands_turn_clockwise(hands, angles):
    return turn_hands(hands, -angles)


def hands_without_minus(hands, angles):
    x, y = hands.unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((x * cos + y * sin, y * cos + x * sin), dim=-1)


def hands_in_degrees(hands, angles):
    return turn_hands(hands, angles.deg2rad())


def hands_swapped(hands, angles):
    return turn_hands(hands, angles).flip(-1)


# 08.2


def turn_halves(x, angles):
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    both = first * cos - second * sin, second * cos + first * sin
    return torch.cat(both, dim=-1).to(x.dtype)


def angles(positions, half, base, shift=0):
    return positions[:, None] * base ** -((torch.arange(half) + shift) / half)


def rope(x, positions, base):
    return turn_halves(x, angles(positions, x.shape[-1] // 2, base))


def rope_interleaved(x, positions, base):
    half = x.shape[-1] // 2
    back = torch.arange(2 * half).view(2, half).T.flatten()
    pairs_apart = torch.cat((x[:, ::2], x[:, 1::2]), dim=1)
    return rope(pairs_apart, positions, base)[:, back]


def rope_of_another_base(x, positions, base):
    return rope(x, positions, 10_000.0)


def rope_off_by_one(x, positions, base):
    return turn_halves(x, angles(positions, x.shape[-1] // 2, base, shift=1))


def rope_in_the_dtype_of_x(x, positions, base):
    half = x.shape[-1] // 2
    speeds = base ** -(torch.arange(half) / half)
    return turn_halves(x, positions[:, None].to(x.dtype) * speeds.to(x.dtype))


def rope_with_wide_result(x, positions, base):
    return rope(x.float(), positions, base)


def rope_backwards(x, positions, base):
    return rope(x, -positions, base)


def rope_at_slots(x, positions, base):
    return rope(x, torch.arange(len(x)), base)


# 08.3


def to_interleaved(weight, head_dim):
    heads = weight.unflatten(0, (-1, 2, head_dim // 2))
    return heads.transpose(1, 2).flatten(0, 2)


def to_half_split_again(weight, head_dim):
    heads = weight.unflatten(0, (-1, head_dim // 2, 2))
    return heads.transpose(1, 2).flatten(0, 2)


def over_all_heads_at_once(weight, head_dim):
    return weight.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def columns_permuted(weight, head_dim):
    even = weight.shape[1] // 2 * 2
    order = torch.arange(even).view(2, -1).T.flatten()
    return torch.cat((weight[:, order], weight[:, even:]), dim=1)


def nothing_converted(weight, head_dim):
    return weight


# 08.4


def differences(rotate, pairs, offset):
    q, k = torch.randn(2, 1, 1, 1, 64, generator=torch.Generator().manual_seed(3))

    def score(m, n):
        at_n = rotate(k, torch.tensor([[n]]))
        return (rotate(q, torch.tensor([[m]])) * at_n).sum().item()

    here = [score(m, n) for m, n in pairs]
    there = [score(m + offset, n + offset) for m, n in pairs]
    change = max(abs(a - b) for a, b in zip(here, there, strict=True))
    return change, max(here) - min(here)


def knows_distance_only(rotate):
    pairs = [(0, 0), (1, 0), (2, 0), (7, 1), (200, 30), (250, 0)]
    for offset in (7, 60, 255, 700, 1801, 4101, 5000, 7941):
        change, spread = differences(rotate, pairs, offset)
        if change > 0.03 or spread < 0.1:
            return False
    return True


def only_near_the_start(rotate):
    change, spread = differences(rotate, [(5, 0), (3, 2), (9, 1)], 100)
    return change < 0.03 and spread > 0.1


def without_asking_for_a_difference(rotate):
    pairs = [(0, 0), (1, 0), (2, 0), (7, 1), (200, 30), (250, 0)]
    return all(
        differences(rotate, pairs, offset)[0] < 0.03
        for offset in (7, 60, 255, 700, 1801, 4101, 5000, 7941)
    )


def too_strict(rotate):
    change, spread = differences(rotate, [(5, 0), (90, 1)], 7941)
    return change < 1e-7 and spread > 0.1


def one_convention_only(rotate):
    x = torch.randn(1, 1, 4, 64, generator=torch.Generator().manual_seed(4))
    positions = torch.tensor([[0, 5, 4351, 8191]])
    return torch.allclose(rotate(x, positions), in_float32(x, positions), atol=0.01)


def lengths_only(rotate):
    x = torch.randn(1, 1, 50, 64, generator=torch.Generator().manual_seed(5))
    turned = rotate(x, torch.arange(0, 8000, 160)[None])
    return torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-3)


def always_right(rotate):
    return True


def always_wrong(rotate):
    return False


RIGHT = {
    "08.1": turn_hands,
    "08.2": rope,
    "08.3": to_interleaved,
    "08.4": knows_distance_only,
}

WRONG = {
    "08.1": [
        hands_turn_clockwise,
        hands_without_minus,
        hands_in_degrees,
        hands_swapped,
    ],
    "08.2": [
        rope_interleaved,
        rope_of_another_base,
        rope_off_by_one,
        rope_in_the_dtype_of_x,
        rope_with_wide_result,
        rope_backwards,
        rope_at_slots,
    ],
    "08.3": [
        to_half_split_again,
        over_all_heads_at_once,
        columns_permuted,
        nothing_converted,
    ],
    "08.4": [
        only_near_the_start,
        without_asking_for_a_difference,
        too_strict,
        one_convention_only,
        lengths_only,
        always_right,
        always_wrong,
    ],
}
