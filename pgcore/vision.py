# Generated from chapters/06_vision_transformer.ipynb.
# Edit the notebook, then run "make chapters".
"""The vision tower: patches in, one vector a patch out.

A Vision Transformer (Dosovitskiy et al., 2021) as SigLIP and PaliGemma
have it: learned positions, no class token. Pictures are RGB in [-1, 1].
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pgcore.attention import Attention
from pgcore.normalization import LayerNorm


class PatchEmbedding(nn.Module):
    """Patches, row by row from the top, each through one linear map.

    Raises ValueError unless images are RGB floats of whole patches.
    Source: Dosovitskiy et al. (2021), equation 1.

    Built in chapter 06, Vision transformer.
    """

    def __init__(self, width: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.conv = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, images: Float[Tensor, "B C R R"]) -> Float[Tensor, "B P D"]:
        shape, side = tuple(images.shape), self.patch_size
        if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
            raise ValueError(f"images: expected squares (B, 3, R, R), got {shape}")
        if shape[2] % side:
            raise ValueError(f"images: expected a multiple of {side}, got {shape[2]}")
        if not images.is_floating_point():
            raise ValueError(f"images: expected floats in [-1, 1], got {images.dtype}")
        return self.conv(images).flatten(2).transpose(1, 2)


class MLP(nn.Module):
    """Linear, GELU (the tanh form), linear; each token on its own.

    Built in chapter 06, Vision transformer.
    """

    def __init__(self, width: int, mlp_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, width)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class EncoderBlock(nn.Module):
    """Add what tokens read from each other, then what each makes of it.

    A mask says who may read whom (True = may); without one all read all.
    Source: Dosovitskiy et al. (2021), equations 2 and 3.

    Built in chapter 06, Vision transformer.
    """

    def __init__(self, width: int, mlp_dim: int, *, num_heads: int, head_dim: int):
        super().__init__()
        n = num_heads  # every head has keys and values of its own
        self.layer_norm1 = LayerNorm(width)
        self.self_attn = Attention(
            width,
            num_heads=n,
            num_kv_heads=n,
            head_dim=head_dim,
            bias=True,
        )
        self.layer_norm2 = LayerNorm(width)
        self.mlp = MLP(width, mlp_dim)

    def forward(
        self, x: Float[Tensor, "B T D"], mask: Bool[Tensor, " B #N #T T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        x = x + self.self_attn(self.layer_norm1(x), mask=mask)
        return x + self.mlp(self.layer_norm2(x))


def initialize(module: nn.Module) -> None:
    """Draw the weights of all maps in a module; the rest stays.

    Linear: Xavier-uniform. Patches: normal, 1 / sqrt(fan-in). Biases: 0.
    Source: big_vision, ``models/vit.py``; there the patches' normal is
    truncated, and the MLPs' biases are drawn at 1e-6.

    Built in chapter 06, Vision transformer.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
        elif isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The sizes of a vision tower. Raises ValueError if they do not fit.

    Built in chapter 06, Vision transformer.
    """

    width: int  # D, features of a token, the same from end to end
    depth: int  # L, encoder blocks, one after the other
    mlp_dim: int  # F, hidden features of each block's MLP
    num_heads: int  # N, attention heads of each block
    head_dim: int  # H, features of a head; the heads fill the width
    patch_size: int  # side of a patch in pixels, a divisor of R
    image_size: int  # R, side of a picture in pixels

    def __post_init__(self):
        for name, size in vars(self).items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if (n := self.num_heads * self.head_dim) != self.width:
            raise ValueError(f"num_heads * head_dim: expected {self.width}, got {n}")
        side, patch = self.image_size, self.patch_size
        if side % patch:
            raise ValueError(f"image_size: expected a multiple of {patch}, got {side}")

    @property
    def grid(self) -> int:
        """Patches along a side of the picture."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """P, the patches of a picture."""
        return self.grid**2


_SO400M = {"width": 1152, "depth": 27, "mlp_dim": 4304, "num_heads": 16, "head_dim": 72}
SO400M_14_224 = VisionConfig(**_SO400M, patch_size=14, image_size=224)
SO400M_14_448 = replace(SO400M_14_224, image_size=448)
SO400M_14_896 = replace(SO400M_14_224, image_size=896)

_TINY = {"width": 192, "depth": 4, "mlp_dim": 768, "num_heads": 4, "head_dim": 48}
TINY = VisionConfig(**_TINY, patch_size=12, image_size=96)


class VisionTower(nn.Module):
    """Pictures to one vector a patch, informed by the whole picture.

    Raises ValueError for another image size, and as ``PatchEmbedding``.
    A NaN spoils its picture. Source: Zhai et al. (2023), SigLIP.

    Built in chapter 06, Vision transformer.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = c = config
        self.patch_embedding = PatchEmbedding(c.width, c.patch_size)
        self.positions = nn.Parameter(torch.empty(c.num_patches, c.width))
        heads = {"num_heads": c.num_heads, "head_dim": c.head_dim}
        self.layers = nn.ModuleList(
            EncoderBlock(c.width, c.mlp_dim, **heads) for _ in range(c.depth)
        )
        self.post_layernorm = LayerNorm(c.width)
        initialize(self)
        nn.init.normal_(self.positions, std=c.width**-0.5)

    def forward(self, images: Float[Tensor, "B C R R"]) -> Float[Tensor, "B P D"]:
        x = self.patch_embedding(images)
        size, found = self.config.image_size, images.shape[-1]
        if found != size:
            raise ValueError(f"images: expected {size} x {size}, got {found} x {found}")
        x = x + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.post_layernorm(x)


class MAPHead(nn.Module):
    """Multi-head attention pooling: a learned probe reads all tokens.

    Gives one vector a picture. Source: big_vision, ``models/vit.py``.

    Built in chapter 06, Vision transformer.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        c, n = config, config.num_heads
        self.probe = nn.Parameter(torch.empty(1, 1, c.width))
        self.attention = Attention(
            c.width,
            num_heads=n,
            num_kv_heads=n,
            head_dim=c.head_dim,
            bias=True,
        )
        self.layernorm = LayerNorm(c.width)
        self.mlp = MLP(c.width, c.mlp_dim)
        initialize(self)
        nn.init.xavier_uniform_(self.probe[0])

    def forward(self, tokens: Float[Tensor, "B P D"]) -> Float[Tensor, "B D"]:
        probe = self.probe.expand(len(tokens), -1, -1)  # B 1 D
        x = self.attention(probe, source=tokens)
        return (x + self.mlp(self.layernorm(x)))[:, 0]


def resize_positions(table: Float[Tensor, "P D"], grid: int) -> Float[Tensor, "new D"]:
    """Stretch a table of positions to a picture of grid x grid patches.

    Bilinear, and corners stay corners; in Hugging Face neither is so.
    Raises ValueError if P is not a square number or grid is below 1.
    Source: big_vision, ``resample_posemb``.

    Built in chapter 06, Vision transformer.
    """
    count, width = table.shape
    side = math.isqrt(count)
    if side**2 != count or count == 0:
        raise ValueError(f"table: expected a square number of rows, got {count}")
    if grid < 1:
        raise ValueError(f"grid: expected at least 1, got {grid}")
    square = table.T.reshape(1, width, side, side)
    square = F.interpolate(
        square, size=(grid, grid), mode="bilinear", align_corners=True
    )
    return square.flatten(2)[0].T


__all__ = [
    "EncoderBlock",
    "MAPHead",
    "MLP",
    "PatchEmbedding",
    "SO400M_14_224",
    "SO400M_14_448",
    "SO400M_14_896",
    "TINY",
    "VisionConfig",
    "VisionTower",
    "initialize",
    "resize_positions",
]
