# Generated from chapters/15_boxes_and_masks.ipynb.
# Edit the notebook, then run "make chapters".
"""The mask codec: 64 x 64 pixels as 16 codes, and back.

A VQ-VAE (van den Oord et al., 2017) with the layers of PaliGemma's
(Ning et al., 2023), and the files that hold one.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pgcore.drawing import ASSETS
from pgcore.files import one_line, require_file, written_whole
from pgcore.weights import require_same

MASK_GRID = 4  # cells a side: 16 tokens


def quantize(
    latents: Float[Tensor, "B 16 D"], codebook: Float[Tensor, "codes D"]
) -> tuple[Float[Tensor, "B 16 D"], Int[Tensor, "B 16"]]:
    """Replace each latent by the nearest code; also, the codes' numbers.

    The gradient goes straight through: what a code gets, the latent gets.
    Source: van den Oord et al. (2017), section 3.

    Built in chapter 15, Boxes and masks.
    """
    # The squared distance, less |latent|^2, which is the same for all.
    distances = codebook.square().sum(1) - 2 * latents @ codebook.T
    codes = distances.argmin(-1)
    return latents + (codebook[codes] - latents).detach(), codes


class CodebookAverages:
    """Makes each code the running mean of the latents that chose it.

    A code that few choose is moved to a latent of the batch: one that
    nothing chooses could never learn. ``codebook`` changes in place.
    Source: van den Oord et al. (2017), appendix A.1; the restarts are
    those of Dhariwal et al. (2020).

    Built in chapter 15, Boxes and masks.
    """

    def __init__(self, codebook: Float[Tensor, "codes D"], seed: int = 0):
        self.codebook = codebook
        self.counts = torch.ones(len(codebook))
        self.sums = codebook.clone()
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def start(self, latents: Float[Tensor, "B 16 D"], rounds: int = 20) -> None:
        """Choose the first codes by k-means: updates without memory."""
        rows = latents.flatten(0, 1)
        order = torch.randperm(len(rows), generator=self.generator)
        self.codebook.copy_(rows[order[: len(self.codebook)]])
        for _ in range(rounds):
            codes = quantize(latents, self.codebook)[1]
            self.update(latents, codes, decay=0.0)

    @torch.no_grad()
    def update(
        self,
        latents: Float[Tensor, "B 16 D"],
        codes: Int[Tensor, "B 16"],
        decay: float = 0.99,
        fewest: float = 1.0,
    ) -> int:
        """Move the codes; return how many were restarted.

        fewest: latents of a batch that must choose a code, on average.
        """
        rows = latents.flatten(0, 1)
        chosen = F.one_hot(codes.flatten(), len(self.codebook)).to(rows)
        self.counts.lerp_(chosen.sum(0), 1 - decay)
        self.sums.lerp_(chosen.T @ rows, 1 - decay)
        dead = (self.counts < fewest).nonzero().squeeze(1)
        others = torch.randint(len(rows), (len(dead),), generator=self.generator)
        self.sums[dead] = 2 * fewest * rows[others]
        self.counts[dead] = 2 * fewest
        known = self.counts > 1e-6  # the others stay where they are
        means = self.sums[known] / self.counts[known][:, None]
        self.codebook[known] = means
        return len(dead)


@dataclass(frozen=True, kw_only=True)
class MaskCodecConfig:
    """Sizes of a mask codec.

    Built in chapter 15, Boxes and masks.
    """

    num_codes: int = 128  # that a token can name
    code_width: int  # D, numbers in a code
    width: int  # channels at the 4 x 4 grid; an eighth at the 64 x 64 end
    depth: int = 2  # residual blocks, in the encoder and in the decoder

    def __post_init__(self):
        for field, size in asdict(self).items():
            least = 8 if field == "width" else 1
            if size < least or size % least:
                raise ValueError(
                    f"{field}: expected a multiple of {least}, found {size}"
                )


PALIGEMMA_MASKS = MaskCodecConfig(code_width=512, width=128)
EMOJI_MASKS = MaskCodecConfig(code_width=16, width=64)


class ResidualBlock(nn.Module):
    """Look at the neighbours twice, and add what was seen.

    Built in chapter 15, Boxes and masks.
    """

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(
        self, x: Float[Tensor, "B D height width"]
    ) -> Float[Tensor, "B D height width"]:
        """B D height width to the same."""
        return x + self.net(x)


class MaskEncoder(nn.Sequential):
    """A mask [B, 1, 64, 64] in [-1, 1] to latents [B, D, 4, 4].

    Source: big_vision, pp/proj/paligemma/segmentation.py.

    Built in chapter 15, Boxes and masks.
    """

    def __init__(self, config: MaskCodecConfig):
        sizes = [1, *(config.width // n for n in (8, 4, 2, 1))]
        layers = []
        for before, after in zip(sizes, sizes[1:], strict=False):
            halve = nn.Conv2d(before, after, 4, stride=2, padding=1)
            layers += [halve, nn.ReLU()]
        layers += [ResidualBlock(config.width) for _ in range(config.depth)]
        last = nn.Conv2d(config.width, config.code_width, 1)
        super().__init__(*layers, last)


class MaskDecoder(nn.Sequential):
    """Codes [B, D, 4, 4] to a mask [B, 1, 64, 64] in about [-1, 1].

    Source: big_vision, evaluators/proj/paligemma/transfers/segmentation.py.

    Built in chapter 15, Boxes and masks.
    """

    def __init__(self, config: MaskCodecConfig):
        sizes = [config.width // n for n in (1, 1, 2, 4, 8)]
        layers = [nn.Conv2d(config.code_width, config.width, 1), nn.ReLU()]
        layers += [ResidualBlock(config.width) for _ in range(config.depth)]
        for before, after in zip(sizes, sizes[1:], strict=False):
            double = nn.ConvTranspose2d(before, after, 4, 2, padding=1)
            layers += [double, nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(sizes[-1], 1, 1))


class MaskCodec(nn.Module):
    """64 x 64 pixels as 16 codes, row by row, and back.

    ``codebook`` is no parameter: running means teach it. The shipped
    codec's codes mean something to it alone, PaliGemma's to PaliGemma's.
    Source: Ning et al. (2023).

    Built in chapter 15, Boxes and masks.
    """

    codebook: Tensor

    def __init__(self, config: MaskCodecConfig):
        super().__init__()
        self.config = config
        self.encoder = MaskEncoder(config)
        self.decoder = MaskDecoder(config)
        size = config.num_codes, config.code_width
        self.register_buffer("codebook", torch.randn(size))

    def latents(self, masks: Float[Tensor, "B 64 64"]) -> Float[Tensor, "B 16 D"]:
        """What the encoder makes of masks in [0, 1], not yet codes.

        Raises ValueError for masks of another size.
        """
        if masks.shape[1:] != (64, 64):
            raise ValueError(f"masks: expected B 64 64, found {tuple(masks.shape)}")
        grid = self.encoder(2 * masks[:, None] - 1)
        return grid.flatten(2).transpose(1, 2)

    def render(self, latents: Float[Tensor, "B 16 D"]) -> Float[Tensor, "B 64 64"]:
        """Paint latents, or codes: in about [-1, 1], inside above 0."""
        grid = latents.transpose(1, 2).unflatten(2, (MASK_GRID, MASK_GRID))
        return self.decoder(grid)[:, 0]

    def encode(self, masks: Float[Tensor, "B 64 64"]) -> Int[Tensor, "B 16"]:
        """Masks in [0, 1] to the numbers of their codes."""
        return quantize(self.latents(masks), self.codebook)[1]

    def decode(self, codes: Int[Tensor, "B 16"]) -> Float[Tensor, "B 64 64"]:
        """Numbers of codes to masks in [0, 1], inside above 0.5."""
        return ((self.render(self.codebook[codes]) + 1) / 2).clamp(0, 1)

    def forward(self, masks: Float[Tensor, "B 64 64"]) -> Float[Tensor, "B 64 64"]:
        """There and back: what 16 codes keep of masks in [0, 1]."""
        return self.decode(self.encode(masks))


SHIPPED_CODEC = ASSETS / "mask_codes"


def save_mask_codec(folder: Path, codec: MaskCodec) -> None:
    """Write the weights in half precision, their sizes in the header.

    Built in chapter 15, Boxes and masks.
    """
    weights = {
        name: weight.half().contiguous() for name, weight in codec.state_dict().items()
    }
    metadata = {"config": json.dumps(asdict(codec.config))}
    with written_whole(folder / "model.safetensors") as path:
        save_file(weights, path, metadata)


def load_mask_codec(folder: str | Path = SHIPPED_CODEC) -> MaskCodec:
    """Load a codec, in float32; the shipped one knows emoji.

    Raises FileNotFoundError if there is none, ValueError if it is broken.

    Built in chapter 15, Boxes and masks.
    """
    path = Path(folder) / "model.safetensors"
    require_file(path)
    try:
        with safe_open(path, "pt") as file:
            sizes = json.loads(file.metadata()["config"])
            config = MaskCodecConfig(**sizes)
            names = file.offset_keys()
            weights = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a mask codec, found {one_line(error)}"
        ) from None
    return _filled(config, weights, path)


def _filled(
    config: MaskCodecConfig, weights: dict[str, Tensor], path: Path
) -> MaskCodec:
    """The codec of these weights, if they are all there and no others."""
    with torch.device("meta"):
        codec = MaskCodec(config)
    expected = {n: tuple(w.shape) for n, w in codec.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    require_same(expected, found, str(path))
    floats = {name: weight.float() for name, weight in weights.items()}
    codec.load_state_dict(floats, assign=True)
    return codec.eval().requires_grad_(False)


def load_published_codec(path: str | Path) -> MaskCodec:
    """Load PaliGemma's codec from ``vae-oid.npz`` as big_vision has it.

    Averages that only its training needed (``_vq_vae._ema_...``) are left
    out. Raises FileNotFoundError if there is no such file, ValueError for
    what is no ``.npz`` of numbers, and for arrays that are missing,
    unknown or of another shape.

    Built in chapter 15, Boxes and masks.
    """
    path = Path(path)
    require_file(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {
                name: torch.from_numpy(file[name].astype(np.float32))
                for name in file.files
                if not name.startswith("_vq_vae._ema_")
            }
    except Exception as error:  # of many kinds, zipfile's among them
        raise ValueError(
            f"{path}: expected an .npz of numbers, found {one_line(error)}"
        ) from None
    if "_vq_vae._embedding" in arrays:
        arrays["codebook"] = arrays.pop("_vq_vae._embedding")
    return _filled(PALIGEMMA_MASKS, arrays, path)


__all__ = [
    "CodebookAverages",
    "EMOJI_MASKS",
    "MASK_GRID",
    "MaskCodec",
    "MaskCodecConfig",
    "MaskDecoder",
    "MaskEncoder",
    "PALIGEMMA_MASKS",
    "ResidualBlock",
    "SHIPPED_CODEC",
    "load_mask_codec",
    "load_published_codec",
    "quantize",
    "save_mask_codec",
]
