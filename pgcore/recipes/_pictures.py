"""Small changes to pictures that leave what they show: the augmentation."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def augment(
    pictures: Float[Tensor, "B C R R"],
    generator: torch.Generator,
    strength: float = 1.0,
) -> Float[Tensor, "B C R R"]:
    """Turn, stretch, mirror and tint each picture a little, in its own way."""

    def around(middle: float, most: float, *shape: int) -> Tensor:
        low, high = middle - most * strength, middle + most * strength
        draw = torch.rand(len(pictures), *shape, generator=generator)
        return low + (high - low) * draw

    turn, shear = around(0.0, 0.15), around(0.0, 0.05)
    wide, tall = around(0.0, 0.15).exp(), around(0.0, 0.15).exp()
    mirror = around(0.0, 1.0).sign()
    rows = [
        torch.stack([turn.cos() * wide * mirror, shear - turn.sin() * tall], 1),
        torch.stack([turn.sin() * wide * mirror, turn.cos() * tall], 1),
    ]
    matrix = torch.cat([torch.stack(rows, 1), around(0.0, 0.1, 2)[..., None]], dim=2)
    grid = F.affine_grid(matrix, list(pictures.shape), align_corners=False)
    pictures = F.grid_sample(
        pictures, grid, padding_mode="reflection", align_corners=False
    )
    pictures = pictures.clamp(0, 1) ** around(0.0, 0.15, 1, 1, 1).exp()
    pictures = pictures * around(1.0, 0.1, 3, 1, 1) + around(0.0, 0.04, 3, 1, 1)
    grey = pictures.mean(1, keepdim=True)
    pictures = grey + (pictures - grey) * around(1.0, 0.2, 1, 1, 1)
    return pictures.clamp(0, 1)


def tinted(
    pictures: Float[Tensor, "B C R R"], generator: torch.Generator
) -> Float[Tensor, "B C R R"]:
    """Show each picture in another light."""
    gain = 0.9 + 0.2 * torch.rand(len(pictures), 3, 1, 1, generator=generator)
    lift = 0.08 * torch.rand(len(pictures), 1, 1, 1, generator=generator) - 0.04
    return (pictures * gain + lift).clamp(0, 1)
