# Generated from chapters/15_boxes_and_masks.ipynb.
# Edit the notebook, then run "make chapters".
"""Boxes and masks: what PaliGemma's <loc> and <seg> tokens say.

A box is four words, a mask sixteen more (Beyer et al., 2024, section
3.2.5). Boxes are (top, left, bottom, right) in shares of the picture's
sides, 0 to 1.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pgcore.drawing import ASSETS, annotate, enlarged
from pgcore.files import one_line, require_file, shown, written_whole
from pgcore.weights import require_same

Box = tuple[float, float, float, float]
LAST_BIN = 1023


def require_box(box: Sequence[float]) -> None:
    """Raise ValueError unless 0 <= top < bottom <= 1, and so sideways.

    Built in chapter 15, Boxes and masks.
    """
    if len(box) == 4:
        top, left, bottom, right = box
        if 0 <= top < bottom <= 1 and 0 <= left < right <= 1:
            return
    raise ValueError(
        "box: expected top < bottom and left < right, from 0 to 1, found "
        f"({', '.join(f'{edge:.4g}' for edge in box)})"
    )


def box_to_tokens(box: Sequence[float]) -> str:
    """Write a box as "<loc0123>...": top, left, bottom, right.

    Each edge errs by at most 0.5 / 1023 of the side. Raises ValueError
    for what is no box, and for one too thin to be said.
    Source: big_vision, pp/proj/paligemma/segmentation.py.

    Built in chapter 15, Boxes and masks.
    """
    require_box(box)
    bins = [round(float(edge) * LAST_BIN) for edge in box]
    if bins[0] == bins[2] or bins[1] == bins[3]:
        raise ValueError(f"box: expected two words a side, found {bins}: too thin")
    return "".join(f"<loc{number:04d}>" for number in bins)


def tokens_to_box(tokens: str) -> Box:
    """Read the box that four tokens say: each number / 1023.

    Raises ValueError for other than four tokens and for what is no box.

    Built in chapter 15, Boxes and masks.
    """
    if not re.fullmatch("(<loc[0-9]{4}>){4}", tokens):
        raise ValueError(f"box: expected four <loc> tokens, found {shown(tokens)}")
    numbers = re.findall("[0-9]+", tokens)
    top, left, bottom, right = (int(n) / LAST_BIN for n in numbers)
    require_box((top, left, bottom, right))
    return top, left, bottom, right


@dataclass(frozen=True)
class Found:
    """One thing that an answer speaks of.

    Built in chapter 15, Boxes and masks.
    """

    name: str
    box: Box | None  # None: the prediction is invalid
    codes: tuple[int, ...] | None  # of its mask: 16 numbers below 128
    text: str  # as it was written
    problem: str = ""  # why it is invalid


MASK_SIDE = 64  # pixels a side of a mask that becomes tokens
MASK_GRID = 4  # cells a side: 16 tokens
_PART = re.compile(r"((?:\s*<loc[0-9]{4}>)*)((?:\s*<seg[0-9]{3}>)*)(.*)", re.DOTALL)
# At each ";", and where a box begins behind a name.
_BETWEEN = re.compile(r";|(?<=[^\s>])\s*(?=<loc[0-9]{4}>)")


def parse(text: str, named: bool = True) -> list[Found]:
    """Read the answer to "detect ..." or "segment ...", never raising.

    Nothing is left out: what has no box, no mask of 16 codes or no name
    is invalid, has a problem and counts as IoU 0, as for big_vision's
    evaluator. That asks for no name: say ``named=False`` for answers
    without names.

    Built in chapter 15, Boxes and masks.
    """
    parts = [part.strip() for part in _BETWEEN.split(text)]
    return [_found(part, named) for part in parts if part]


def _found(text: str, named: bool) -> Found:
    match = _PART.fullmatch(text)
    assert match is not None  # three parts that may be empty
    locs, segs, rest = match.groups()
    name = " ".join(rest.split())
    codes = tuple(int(code) for code in re.findall("[0-9]+", segs)) or None
    box, problem = None, ""
    try:
        box = tokens_to_box("".join(locs.split()))
    except ValueError as error:
        problem = str(error)
    if codes and (len(codes) != MASK_GRID**2 or max(codes) > 127):
        problem = f"mask: expected 16 codes below 128, found {shown(codes)}"
    elif "<loc" in name or "<seg" in name or (named and not name):
        problem = f"name: expected one, found {shown(name)}"
    if problem:
        return Found(name, None, None, text, problem)
    return Found(name, box, codes, text)


def box_iou(one: Sequence[float] | None, other: Sequence[float] | None) -> float:
    """Divide what two boxes share by what they cover; 0 with None.

    Built in chapter 15, Boxes and masks.
    """
    if one is None or other is None:
        return 0.0
    top, left = max(one[0], other[0]), max(one[1], other[1])
    bottom, right = min(one[2], other[2]), min(one[3], other[3])
    shared = max(bottom - top, 0.0) * max(right - left, 0.0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    return shared / (sum(areas) - shared)


def mask_iou(
    one: Bool[np.ndarray, "height width"],
    other: Bool[np.ndarray, "height width"],
) -> float:
    """Divide what two masks share by what they cover; 0 if both are empty.

    Raises ValueError for masks of two sizes.

    Built in chapter 15, Boxes and masks.
    """
    if one.shape != other.shape:
        raise ValueError(
            f"masks: expected one size, found {one.shape} and {other.shape}"
        )
    return float((one & other).sum() / max((one | other).sum(), 1))


def average_precision(
    scores: Sequence[Sequence[float]],
    ious: Sequence[Sequence[Sequence[float]]],
    truths: Sequence[int],
    threshold: float = 0.5,
) -> float:
    """The precision at each true thing that was found, on average; else 0.

    In each picture the predictions, best score first, take the truth they
    overlap most of those left, from the threshold on (as COCO's). Then
    those of all pictures are ranked; equal scores are one step. Nothing
    is interpolated: COCO's 101 points give another number. NaN without
    truths.
    scores: of each picture's predictions. ious: of each of these, its IoU
    with each truth. truths: how many each picture has.
    Raises ValueError for numbers that do not fit together.

    Built in chapter 15, Boxes and masks.
    """
    hits = []
    for own, rows, count in zip(scores, ious, truths, strict=True):
        if [len(row) for row in rows] != [count] * len(own):
            raise ValueError(
                f"ious: expected {len(own)} rows of {count} truths, found "
                f"{shown([len(row) for row in rows])}"
            )
        left = set(range(count))
        for row in sorted(range(len(own)), key=lambda row: -own[row]):
            best = max(left, key=lambda i: rows[row][i], default=None)
            hit = best is not None and rows[row][best] >= threshold
            if hit:
                left.discard(best)
            hits.append((own[row], hit))
    hits.sort(key=lambda one: -one[0])
    total, found, before = 0.0, 0, 0
    for rank, (score, hit) in enumerate(hits, start=1):
        found += hit
        if rank == len(hits) or hits[rank][0] != score:
            total += (found - before) * found / rank
            before = found
    return total / sum(truths) if sum(truths) else float("nan")


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
    Source: van den Oord et al. (2017), appendix A.1; restarts as in
    Dhariwal et al. (2020), section 3.1.

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
        means = self.sums / self.counts.clamp(min=1e-6)[:, None]
        self.codebook.copy_(means)
        return len(dead)


@dataclass(frozen=True, kw_only=True)
class MaskCodecConfig:
    """Sizes of a mask codec.

    Built in chapter 15, Boxes and masks.
    """

    num_codes: int = 128  # that a token can name
    code_width: int  # D, numbers in a code
    width: int  # channels at the 4 x 4 grid; halved as the grid doubles
    depth: int = 2  # residual blocks, in the encoder and in the decoder

    def __post_init__(self):
        for field, value in asdict(self).items():
            least = 8 if field == "width" else 1
            if value < least or value % least:
                raise ValueError(
                    f"{field}: expected a multiple of {least}, found {value}"
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
            double = nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)
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
        """What the encoder makes of masks in [0, 1], not yet codes."""
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
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.half().contiguous() for name, weight in codec.state_dict().items()
    }
    with written_whole(folder / "model.safetensors") as path:
        save_file(weights, path, {"config": json.dumps(asdict(codec.config))})


def load_mask_codec(folder: str | Path = SHIPPED_CODEC) -> MaskCodec:
    """Load a codec, in float32; the shipped one knows emoji.

    Raises FileNotFoundError if there is none, ValueError if it is broken.

    Built in chapter 15, Boxes and masks.
    """
    path = Path(folder) / "model.safetensors"
    require_file(path)
    try:
        with safe_open(path, "pt") as file:
            config = MaskCodecConfig(**json.loads(file.metadata()["config"]))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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


def paste_mask(
    mask: Float[Tensor, "64 64"],
    box: Sequence[float],
    height: int,
    width: int,
) -> Bool[np.ndarray, "height width"]:
    """Lay a mask into its box in a picture: True inside.

    Bilinear, then above 0.5. The box's edges are rounded to pixels; a box
    that vanishes leaves nothing. Raises ValueError for what is no box.
    Source: big_vision, evaluators/proj/paligemma/transfers/segmentation.py,
    which cuts edges down.

    Built in chapter 15, Boxes and masks.
    """
    require_box(box)
    lengths = height, width, height, width
    top, left, bottom, right = (
        round(float(share) * length) for share, length in zip(box, lengths, strict=True)
    )
    inside = np.zeros((height, width), dtype=bool)
    if top < bottom and left < right:
        small = Image.fromarray(mask.detach().cpu().float().numpy())
        size = right - left, bottom - top
        part = np.asarray(small.resize(size, Image.Resampling.BILINEAR))
        inside[top:bottom, left:right] = part > 0.5
    return inside


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


def draw(
    image: Image.Image, found: Sequence[Found], codec: MaskCodec | None = None
) -> Image.Image:
    """Draw the valid ones on a copy of the picture: boxes and names.

    With a codec, masks as well. Small pictures are enlarged.

    Built in chapter 15, Boxes and masks.
    """
    canvas, things = enlarged(image), []
    for one in found:
        inside = None
        if one.box is None:
            continue
        if one.codes is not None and codec is not None:
            device = codec.codebook.device
            codes = torch.tensor([one.codes], device=device)
            mask = codec.decode(codes)[0]
            inside = paste_mask(mask, one.box, canvas.height, canvas.width)
        things.append((one.name, one.box, inside))
    annotate(canvas, things)
    return canvas


__all__ = [
    "Box",
    "CodebookAverages",
    "EMOJI_MASKS",
    "Found",
    "LAST_BIN",
    "MASK_GRID",
    "MASK_SIDE",
    "MaskCodec",
    "MaskCodecConfig",
    "MaskDecoder",
    "MaskEncoder",
    "PALIGEMMA_MASKS",
    "ResidualBlock",
    "SHIPPED_CODEC",
    "average_precision",
    "box_iou",
    "box_to_tokens",
    "draw",
    "load_mask_codec",
    "load_published_codec",
    "mask_iou",
    "parse",
    "paste_mask",
    "quantize",
    "require_box",
    "save_mask_codec",
    "tokens_to_box",
]
