"""What is looked at while the emoji SigLIP trains: an artist it does not train on."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pgcore.lab.emoji import (
    SEEN_CONCEPTS,
    SHARED_CONCEPTS,
    VALIDATION_STYLE,
    load_emoji,
    place,
)
from pgcore.lab.words import Words
from pgcore.siglip import SigLIP

# Half the concepts; the test artist is never looked at.
WATCHED = tuple(name for name in SHARED_CONCEPTS if name in set(SEEN_CONCEPTS))[::2]
FILM = WATCHED[:: len(WATCHED) // 12][:12]  # the film of the similarity matrix
SIDES = (0.35, 1.0)  # as a share of the picture's side
GREY = "#e6e6e6"


@torch.no_grad()
def watch(model: SigLIP, words: Words) -> dict[str, float]:
    """Name the watched artist's pictures: top-1 accuracy, centred and anywhere."""
    texts = _unit(model, words.encode(WATCHED, model.text.config.max_length))
    size = model.vision.config.image_size
    sprites = load_emoji(VALIDATION_STYLE, WATCHED)
    sets = {
        "centred": load_emoji(VALIDATION_STYLE, WATCHED, size, GREY),
        "anywhere": place(sprites, seed=1, size=size, scale=SIDES),
    }
    seen = {name: _unit(model, 2 * emoji.images - 1) for name, emoji in sets.items()}
    return {
        name: ((seen[name] @ texts.T).argmax(1) == emoji.labels).float().mean().item()
        for name, emoji in sets.items()
    }


@torch.no_grad()
def film(model: SigLIP, words: Words) -> list[list[float]]:
    """Cosines of the film's pictures (rows) with their names (columns), rounded."""
    size = model.vision.config.image_size
    pictures = load_emoji(VALIDATION_STYLE, FILM, size, GREY).images
    texts = words.encode(FILM, model.text.config.max_length)
    cosines = _unit(model, 2 * pictures - 1) @ _unit(model, texts).T
    return [[round(value, 3) for value in row] for row in cosines.tolist()]


def _unit(model: SigLIP, inputs: Tensor) -> Float[Tensor, "B D"]:
    pictures = inputs.is_floating_point()
    encode = model.encode_images if pictures else model.encode_texts
    return F.normalize(encode(inputs.to(model.bias.device)), dim=-1).cpu()
