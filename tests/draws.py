"""What several tests draw, and how they compare."""

from dataclasses import replace

import torch

from pgcore.gemma import GemmaConfig
from pgcore.vision import VisionConfig

# No two sizes equal by chance; head_dim is not width / num_heads = 10.
GEMMA1 = GemmaConfig(
    width=40,
    depth=4,
    mlp_dim=72,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    vocab_size=97,
)
GEMMA2 = replace(
    GEMMA1,
    query_scale=20**-0.5,
    attention_softcap=2.0,
    final_softcap=3.0,
    window=5,
    post_norms=True,
)
VISION = VisionConfig(
    width=24,
    depth=2,
    mlp_dim=40,
    num_heads=2,
    head_dim=12,
    patch_size=14,
    image_size=28,
)


def name_of(value):
    """An id for a parametrized test."""
    return getattr(value, "__name__", str(value))


def fan_in(module, seed=0):
    """Draw every weight, biases and norms too, at a size that keeps the variance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            std = parameter.shape[1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.normal_(std=std, generator=generator)
    return module


def draw_heads(sizes, dtype=torch.float64, grad=False, seed=0):
    """Queries, keys and values; sizes: B, N, K, T, S, H."""
    B, N, K, T, S, H = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, N, T, H), (B, K, S, H), (B, K, S, H)
    return [
        torch.randn(shape, generator=generator, dtype=dtype, requires_grad=grad)
        for shape in shapes
    ]


def draw_mask(sizes, seed=0, heads=None, rows=None, empty_row=False):
    """A mask for them: one for all heads, a row a query, some key for each."""
    B, N, _, T, S, _ = sizes
    shape = B, heads or 1, rows or T, S
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[..., seed % S] = True
    if empty_row:
        mask[:, :, 0] = False
    return mask


def assert_close(actual, expected, tolerance):
    """Equal, relative to the largest number, or to 1 if all are smaller."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * max(1.0, expected.abs().max().item())
