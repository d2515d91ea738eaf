"""Checks of chapter 06, vision transformer. Oracles: torch, and loops."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from pgcore.lab.checks import exercise, require, require_close
from pgcore.vision import SO400M_14_896, TINY, VisionConfig, VisionTower

SHAPES = ((2, 3, 12, 4), (1, 3, 15, 5), (3, 1, 6, 2), (1, 4, 7, 7), (1, 2, 5, 1))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@exercise("06.1")
def patches_are_those_of_unfold(cut):
    """cuts the patches that F.unfold cuts"""
    for batch, channels, size, side in SHAPES:
        images = drawn(batch, channels, size, size, seed=size)
        expected = F.unfold(images, side, stride=side).transpose(1, 2)
        hint = "A patch is channel by channel; patches go row by row."
        require_close(cut(images, side), expected, hint, rtol=0, atol=0)


@exercise("06.1")
def patches_fit_the_kernel(cut):
    """fits the flattened kernel of a convolution"""
    conv = nn.Conv2d(3, 5, 4, stride=4)
    images = drawn(2, 3, 12, 12, seed=1)
    expected = conv(images).flatten(2).transpose(1, 2)
    ours = cut(images, 4) @ conv.weight.flatten(1).T + conv.bias
    require_close(ours, expected, "Channels come first.", rtol=1e-4, atol=1e-5)


def random_config(seed: int) -> VisionConfig:
    """A small tower of random sizes that fit."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (6,), generator=generator).tolist()
    heads, head_dim, depth, mlp, side, grid = sizes
    return VisionConfig(
        width=heads * head_dim,
        depth=depth,
        mlp_dim=3 * mlp,
        num_heads=heads,
        head_dim=head_dim,
        patch_size=side,
        image_size=side * grid,
    )


@exercise("06.2")
def counts_what_is_there(count):
    """counts what a tower of these sizes has"""
    configs = [TINY, SO400M_14_896, *map(random_config, range(12))]
    for config in configs:
        with torch.device("meta"):
            tower = VisionTower(config)
        expected = sum(p.numel() for p in tower.parameters())
        found = count(config)
        require(found == expected, f"{config}: expected {expected}, got {found}")


@exercise("06.2")
def only_positions_know_the_picture(count):
    """grows by D for each patch more"""
    for grid in (16, 32, 64):
        config = VisionConfig(**{**vars(SO400M_14_896), "image_size": 14 * grid})
        rest = count(config) - config.width * grid**2
        require(
            rest == 412_147_440,
            f"without its {grid**2} positions So400m/14 has 412147440 "
            f"parameters, yours {rest}",
        )


def parts(width: int, seed: int):
    """Norm, attention, norm, MLP of a block, all weights at random."""
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    norms = [nn.LayerNorm(width, eps=1e-6) for _ in range(2)]
    heads = nn.MultiheadAttention(width, 2, batch_first=True)
    mlp = nn.Sequential(nn.Linear(width, 9), nn.Tanh(), nn.Linear(9, width))
    with torch.no_grad():
        for layer in (*norms, heads, mlp):
            for parameter in layer.parameters():
                parameter.normal_(std=0.5)
    torch.random.set_rng_state(torch_state)
    return norms[0], lambda x: heads(x, x, x)[0], norms[1], mlp, heads


@exercise("06.3")
def block_is_torchs(run_block):
    """equals torch's pre-norm encoder layer"""
    for seed in range(3):
        norm1, attention, norm2, mlp, heads = parts(6, seed)
        layer = nn.TransformerEncoderLayer(
            6, 2, 9, 0.0, torch.tanh, 1e-6, batch_first=True, norm_first=True
        )
        layer.self_attn, layer.norm1, layer.norm2 = heads, norm1, norm2
        first, _, last = mlp
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        layer.linear1, layer.linear2 = first, last
        x = 3 * drawn(2, 5, 6, seed=seed) + 1
        hint = "Add to the tokens as they were before the norm."
        ours = run_block(x, norm1, attention, norm2, mlp)
        require_close(ours, layer(x), hint, rtol=1e-4, atol=1e-5)


@exercise("06.3")
def silent_block_is_the_identity(run_block):
    """hands its input on if both sub-layers are silent"""
    norm1, _, norm2, *_ = parts(6, 3)
    x = 4 * drawn(2, 5, 6, seed=4) + 2
    before = x.clone()
    ours = run_block(x, norm1, torch.zeros_like, norm2, torch.zeros_like)
    require_close(ours, before, rtol=0, atol=0)
    require(torch.equal(x, before), "x itself was changed; do not use += here.")


def weights(batch: int, heads: int, count: int, seed: int) -> torch.Tensor:
    """Random attention weights; rows sum to 1."""
    return (2 * drawn(batch, heads, count, count, seed=seed)).softmax(dim=-1)


def distance_by_loops(weights: torch.Tensor) -> torch.Tensor:
    """The oracle: every pair of patches, one at a time."""
    batch, heads, count, _ = weights.shape
    side = math.isqrt(count)
    total = torch.zeros(heads)
    for query in range(count):
        for key in range(count):
            rows = query // side - key // side
            columns = query % side - key % side
            far = math.hypot(rows, columns)
            total += far * weights[:, :, query, key].sum(dim=0)
    return total / (batch * count)


@exercise("06.4")
def distance_is_that_of_loops(attention_distance):
    """equals four loops, head by head"""
    for batch, heads, side in ((1, 1, 2), (2, 3, 4), (3, 2, 5)):
        example = weights(batch, heads, side**2, seed=side)
        expected = distance_by_loops(example)
        hint = "A mean over queries and pictures, one number a head."
        require_close(attention_distance(example), expected, hint)


@exercise("06.4")
def distance_of_known_heads(attention_distance):
    """is 0 for a head that looks at itself, 1 for one that looks next door"""
    itself = torch.eye(16)
    beside = torch.eye(16)[torch.arange(16) ^ 1]  # 0 <-> 1, 2 <-> 3
    above = torch.eye(16)[torch.arange(16) ^ 4]  # row 0 <-> row 1
    both = torch.stack([itself, beside, above])[None]
    expected = torch.tensor([0.0, 1.0, 1.0])
    require_close(attention_distance(both), expected, "Neighbours are 1 apart.")


def waves_by_loops(grid: int, width: int) -> torch.Tensor:
    """The oracle: the formula, one number at a time."""
    quarter = width // 4
    rows = []
    for row in range(grid):
        for column in range(grid):
            omega = [10_000 ** (-k / (quarter - 1)) for k in range(quarter)]
            rows.append(
                [
                    f(place * o)
                    for place in (column, row)
                    for f in (math.sin, math.cos)
                    for o in omega
                ]
            )
    return torch.tensor(rows)


@exercise("06.5")
def waves_are_those_of_loops(waves):
    """equals the formula, number by number"""
    for grid, width in ((2, 8), (3, 12), (8, 64), (5, 192)):
        hint = "First the column's sines and cosines, then the row's."
        expected = waves_by_loops(grid, width)
        require_close(waves(grid, width), expected, hint, atol=1e-5)


@exercise("06.5")
def waves_know_displacements(waves):
    """has inner products that depend on the displacement alone"""
    table = waves(6, 32).reshape(6, 6, 32)
    first = (table[:-2, :-1] * table[2:, 1:]).sum(dim=-1)
    spread = (first.max() - first.min()).item()
    require(
        spread < 1e-3,
        f"two rows down and one right, the inner products differ by {spread:.2g}",
    )
