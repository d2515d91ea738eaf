"""Answers to the exercises of chapter 06: one right, several wrong."""

import torch

# 06.1


def two_unflattens(images, patch_size):
    x = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def channels_last(images, patch_size):
    x = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def column_by_column(images, patch_size):
    return two_unflattens(images.transpose(2, 3), patch_size)


def only_reshaped(images, patch_size):
    pixels = images.shape[1] * patch_size**2
    return images.reshape(len(images), -1, pixels)


def patches_down_the_columns(images, patch_size):
    x = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return x.permute(0, 4, 2, 1, 3, 5).flatten(3).flatten(1, 2)


# 06.2


def by_formula(config):
    width, wide = config.width, config.mlp_dim
    block = 4 * width**2 + 2 * width * wide + 9 * width + wide
    around = width * (3 * config.patch_size**2 + config.num_patches + 3)
    return config.depth * block + around


def without_biases(config):
    width, wide = config.width, config.mlp_dim
    block = 4 * width**2 + 2 * width * wide + 4 * width
    around = width * (3 * config.patch_size**2 + config.num_patches + 2)
    return config.depth * block + around


def without_final_norm(config):
    return by_formula(config) - 2 * config.width


def with_a_class_token(config):
    return by_formula(config) + 2 * config.width


def four_times_wide(config):
    width = config.width
    block = 4 * width**2 + 8 * width**2 + 13 * width
    around = width * (3 * config.patch_size**2 + config.num_patches + 3)
    return config.depth * block + around


def always_224(config):
    return 412_442_352


# 06.3


def two_sums(x, norm1, attention, norm2, mlp):
    x = x + attention(norm1(x))
    return x + mlp(norm2(x))


def skips_from_the_norms(x, norm1, attention, norm2, mlp):
    x = norm1(x)
    x = x + attention(x)
    x = norm2(x)
    return x + mlp(x)


def post_norm(x, norm1, attention, norm2, mlp):
    x = norm1(x + attention(x))
    return norm2(x + mlp(x))


def in_parallel(x, norm1, attention, norm2, mlp):
    return x + attention(norm1(x)) + mlp(norm2(x))


def no_second_skip(x, norm1, attention, norm2, mlp):
    x = x + attention(norm1(x))
    return mlp(norm2(x))


def skip_from_the_start(x, norm1, attention, norm2, mlp):
    y = x + attention(norm1(x))
    return x + mlp(norm2(y))


def in_place(x, norm1, attention, norm2, mlp):
    x += attention(norm1(x))
    return x + mlp(norm2(x))


# 06.4


def places_of(count):
    side = torch.arange(float(round(count**0.5)))
    return torch.cartesian_prod(side, side)


def weighted_mean(weights):
    places = places_of(weights.shape[-1])
    return (weights * torch.cdist(places, places)).sum(-1).mean((0, 2))


def summed_over_queries(weights):
    return weighted_mean(weights) * weights.shape[-1]


def along_the_sequence(weights):
    index = torch.arange(float(weights.shape[-1]))
    return (weights * (index[:, None] - index).abs()).sum(-1).mean((0, 2))


def in_city_blocks(weights):
    places = places_of(weights.shape[-1])
    return (weights * torch.cdist(places, places, p=1)).sum(-1).mean((0, 2))


def of_the_strongest_key(weights):
    places = places_of(weights.shape[-1])
    distance = torch.cdist(places, places)
    strongest = weights.argmax(-1)  # B N P
    queries = torch.arange(weights.shape[-1])
    return distance[queries, strongest].mean((0, 2))


def of_squares(weights):
    places = places_of(weights.shape[-1])
    return (weights * torch.cdist(places, places).square()).sum(-1).mean((0, 2))


def all_heads_as_one(weights):
    return weighted_mean(weights).mean().expand(weights.shape[1])


# 06.5


def waves_by_place(grid, width, swap=False, dividend=-1):
    quarter = width // 4
    omega = 10_000 ** (-torch.arange(quarter) / (quarter + dividend))
    side = torch.arange(float(grid))
    row, column = torch.cartesian_prod(side, side).T[:, :, None]
    c, r = (row, column) if swap else (column, row)
    return torch.cat([f(p * omega) for p in (c, r) for f in (torch.sin, torch.cos)], 1)


def rows_for_columns(grid, width):
    return waves_by_place(grid, width, swap=True)


def denominator_of_text(grid, width):
    return waves_by_place(grid, width, dividend=0)


def interleaved(grid, width):
    table = waves_by_place(grid, width)
    return table.unflatten(1, (4, -1)).transpose(1, 2).flatten(1)


def one_long_line(grid, width):
    half = width // 2
    omega = 10_000 ** (-torch.arange(half) / (half - 1))
    angle = torch.arange(float(grid**2))[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], 1)


RIGHT = {
    "06.1": two_unflattens,
    "06.2": by_formula,
    "06.3": two_sums,
    "06.4": weighted_mean,
    "06.5": waves_by_place,
}

WRONG = {
    "06.1": [channels_last, column_by_column, only_reshaped, patches_down_the_columns],
    "06.2": [
        without_biases,
        without_final_norm,
        with_a_class_token,
        four_times_wide,
        always_224,
    ],
    "06.3": [
        skips_from_the_norms,
        post_norm,
        in_parallel,
        no_second_skip,
        skip_from_the_start,
        in_place,
    ],
    "06.4": [
        summed_over_queries,
        along_the_sequence,
        in_city_blocks,
        of_the_strongest_key,
        of_squares,
        all_heads_as_one,
    ],
    "06.5": [rows_for_columns, denominator_of_text, interleaved, one_long_line],
}
