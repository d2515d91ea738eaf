"""A tiny dual encoder and its training loop, shared by the contrastive chapters.

Two encoders, one for pictures and one for words, give vectors of one width, and a
contrastive loss pulls the pairs together. The loss comes in as an argument:

    run = train_dual_encoder(clip_loss, sprites, scalars={"log_scale": 2.66})

Pictures are 32 pixels a side, as ``pgcore.lab.emoji.place`` makes them. A caption is
the name of a concept. There is no attention here: chapters 05 and 06 bring it.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pgcore.lab.emoji import EmojiSet, place

IMAGE_SIZE = 32
PATCH_SIZE = 8
SPRITE_SCALE = (0.7, 1.0)  # a sprite's side in training, as a share of the picture's

Loss = Callable[..., Float[Tensor, ""]]


class PatchEncoder(nn.Module):
    """Patches to one vector: one shared MLP reads each patch, a second reads all.

    The second MLP sees the patches side by side, each at its place, so it knows what is
    where. Mixing by a fixed place is the cheap stand-in for attention.
    """

    def __init__(self, width: int, mlp_dim: int = 384):
        super().__init__()
        num_patches = (IMAGE_SIZE // PATCH_SIZE) ** 2
        self.patch = nn.Sequential(
            nn.Linear(3 * PATCH_SIZE**2, mlp_dim),
            nn.GELU(),
            nn.Linear(mlp_dim, width),
            nn.GELU(),
        )
        self.picture = nn.Sequential(
            nn.LayerNorm(num_patches * width),
            nn.Linear(num_patches * width, mlp_dim),
            nn.GELU(),
            nn.Linear(mlp_dim, width),
        )

    def forward(self, images: Float[Tensor, "B 3 R R"]) -> Float[Tensor, "B D"]:
        """One vector a picture, from RGB in [0, 1]. The vector is not normalised."""
        return self.picture(self.patch(split_into_patches(images)).flatten(1))


class WordEncoder(nn.Module):
    """A bag of words to one vector: the mean of the words' vectors, then one layer."""

    def __init__(self, vocabulary: Sequence[str], width: int):
        super().__init__()
        self.index = {word: number for number, word in enumerate(vocabulary)}
        self.words = nn.EmbeddingBag(len(vocabulary), width, mode="mean")
        self.project = nn.Linear(width, width)

    def forward(self, texts: Sequence[str]) -> Float[Tensor, "B D"]:
        """One vector a text, not normalised. Raises ValueError for an unknown word."""
        bags = [split_into_words(text) for text in texts]
        for text, bag in zip(texts, bags, strict=True):
            unknown = [word for word in bag if word not in self.index]
            if unknown or not bag:
                raise ValueError(
                    f"text {text!r}: expected known words, got {unknown or 'none'}"
                )
        device = self.words.weight.device
        numbers = torch.tensor([self.index[word] for bag in bags for word in bag])
        ends = torch.tensor([len(bag) for bag in bags]).cumsum(0)
        starts = torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]])
        return self.project(self.words(numbers.to(device), starts.to(device)))


class DualEncoder(nn.Module):
    """A picture encoder and a text encoder that end in vectors of the same width."""

    def __init__(self, vocabulary: Sequence[str], width: int = 128):
        super().__init__()
        self.encode_images = PatchEncoder(width)
        self.encode_texts = WordEncoder(vocabulary, width)


@dataclass(frozen=True, eq=False)
class Run:
    """What a training run leaves.

    model: the trained encoders.
    scalars: the learned scalars of the loss, detached, under the loss's own names.
    losses: the loss of each step.
    watched: (steps done, what ``watch`` said), the first entry before any training.
    """

    model: DualEncoder
    scalars: dict[str, Float[Tensor, ""]]
    losses: list[float]
    watched: list[tuple[int, float]]


def train_dual_encoder(
    loss_fn: Loss,
    sprites: EmojiSet,
    *,
    scalars: Mapping[str, float],
    ceilings: Mapping[str, float] | None = None,
    steps: int = 400,
    batch_size: int = 200,
    learning_rate: float = 3e-3,
    seed: int = 0,
    watch: Callable[[DualEncoder], float] | None = None,
    watch_every: int = 25,
) -> Run:
    """Train a dual encoder on sprites and the names of what they show.

    loss_fn: called as ``loss_fn(images, texts, **scalars)`` with two [B, D] tensors.
    sprites: pictures with alpha, several artists; each step places them anew.
    scalars: the loss's learned scalars and their first values, such as log_scale.
    ceilings: the largest value that a scalar may reach; clamped after each step.
    batch_size: a batch holds that many concepts, none twice, each by a random artist.
    watch: measures the model before the first step and every ``watch_every`` steps.

    The same seed gives the same run on the same machine.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DualEncoder(vocabulary_of(sprites.concepts))
    learned = {name: nn.Parameter(torch.tensor(v)) for name, v in scalars.items()}
    groups = [
        {"params": model.parameters(), "weight_decay": 0.05},
        {"params": learned.values(), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_then_cosine(steps))
    losses, watched = [], [(0, watch(model))] if watch else []
    for step in range(1, steps + 1):
        batch = sprites.select(draw_batch(sprites.labels, batch_size, generator))
        batch = place(batch, seed=seed + step, size=IMAGE_SIZE, scale=SPRITE_SCALE)
        captions = [batch.concepts[label] for label in batch.labels.tolist()]
        images, texts = model.encode_images(batch.images), model.encode_texts(captions)
        loss = loss_fn(images, texts, **learned)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for name, ceiling in (ceilings or {}).items():
                learned[name].clamp_(max=ceiling)
        losses.append(loss.item())
        if watch and step % watch_every == 0:
            watched.append((step, watch(model)))
    model.eval().requires_grad_(False)
    return Run(model, {n: p.detach() for n, p in learned.items()}, losses, watched)


def split_into_patches(
    images: Float[Tensor, "B 3 R R"], side: int = PATCH_SIZE
) -> Float[Tensor, "B P pixels"]:
    """Cut pictures into squares, in reading order; [0, 1] becomes [-1, 1]."""
    return nn.functional.unfold(2 * images - 1, side, stride=side).transpose(1, 2)


def split_into_words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def vocabulary_of(texts: Sequence[str]) -> tuple[str, ...]:
    """Every word of the texts, once, sorted."""
    return tuple(sorted({word for text in texts for word in split_into_words(text)}))


def draw_batch(
    labels: Int[Tensor, " B"], batch_size: int, generator: torch.Generator
) -> Int[Tensor, " rows"]:
    """Rows with ``batch_size`` different labels, in random order, one row a label."""
    order = torch.randperm(len(labels), generator=generator)
    grouped = order[labels[order].argsort(stable=True)]
    counts = torch.unique_consecutive(labels[grouped], return_counts=True)[1]
    if batch_size > len(counts):
        raise ValueError(
            f"batch_size: a batch holds no concept twice, so at most {len(counts)} "
            f"of these sprites; got {batch_size}"
        )
    one_each = grouped[counts.cumsum(0) - counts]
    return one_each[torch.randperm(len(one_each), generator=generator)[:batch_size]]


def warmup_then_cosine(steps: int, warmup: int = 20) -> Callable[[int], float]:
    """The learning rate's factor at each step: up in a line, down in a half wave."""

    def factor(step: int) -> float:
        decay = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
        return min(1.0, (step + 1) / warmup) * max(decay, 0.01)

    return factor
