# Generated from chapters/16_training.ipynb.
# Edit the notebook, then run "make chapters".
"""Training: from random numbers to a model that answers.

A loss over answers only, one optimizer with groups of parameters, a
schedule, and a run that can be stopped at any step and goes on as if
nothing had happened (Beyer et al., 2024, section 3.2).
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pgcore.attention import Attention, attend
from pgcore.files import one_line
from pgcore.matmul_attention import attend_by_matmul as attend_by_matmul
from pgcore.paligemma import PaliGemma, prefix_lm_mask, suffix_loss
from pgcore.processing import IGNORE, IMAGE, PAD, Processor
from pgcore.runs import fit as fit
from pgcore.runs import require_same_run


def cosine(step: int, *, steps: int, warmup: int) -> float:
    """The share of the learning rate at a step: up in a line, then down.

    Half a wave of the cosine, from 1 at the end of the warm-up to 0 at
    ``steps`` and after it. For a transfer, whose length is known.
    Source: Beyer et al. (2024), section 3.2.4.

    Built in chapter 16, Training.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.5 + 0.5 * math.cos(math.pi * done)


def rsqrt(step: int, *, warmup: int, timescale: int) -> float:
    """The share of the learning rate at a step: up, then slowly down.

    1 / sqrt(1 + t / timescale), t steps after the warm-up. It needs no
    end: a run may go on for ever, stage after stage.
    Source: big_vision, ``utils.create_learning_rate_schedule``; there the
    first step has rate 0.

    Built in chapter 16, Training.
    """
    if step < warmup:
        return (step + 1) / warmup
    return (1 + (step - warmup) / timescale) ** -0.5


@dataclass(frozen=True, kw_only=True)
class Part:
    """Parameters whose names begin alike, and how they learn.

    rate: times the learning rate; 0 leaves them as they are. warmup:
    steps in which that grows in a line from 0.
    Raises ValueError for numbers below 0.
    Source: Beyer et al. (2024), section 3.2.2, for the image tower.

    Built in chapter 16, Training.
    """

    prefix: str
    rate: float = 1.0
    warmup: int = 0

    def __post_init__(self):
        if not (self.rate >= 0 and self.warmup >= 0):
            raise ValueError(f"rate, warmup: expected 0 or more, found {self}")


def parameter_groups(
    model: nn.Module, parts: Sequence[Part], weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimizer: each parameter in the first part that fits.

    Matrices decay; norms and biases do not. A part of rate 0 is frozen:
    its parameters need no gradient. What fits no part learns at 1.
    Raises ValueError for a part that no name begins with.

    Built in chapter 16, Training.
    """
    parts = [*parts, Part(prefix="")]
    groups = [
        {"params": [], "part": number, "weight_decay": decay}
        for number in range(len(parts))
        for decay in (weight_decay, 0.0)
    ]
    for name, weight in model.named_parameters():
        fits = (name.startswith(part.prefix) for part in parts)
        number = list(fits).index(True)
        weight.requires_grad_(parts[number].rate > 0)
        groups[2 * number + (weight.ndim < 2)]["params"].append(weight)
    groups = [group for group in groups if group["params"]]
    for number, part in enumerate(parts[:-1]):
        if number not in (group["part"] for group in groups):
            raise ValueError(f"part: no parameter's name begins with {part.prefix!r}")
    return groups


@dataclass(frozen=True)
class Mixture:
    """Tasks, each with the share of the examples that it gets.

    Which task example n is follows from the seed and n alone.
    Raises ValueError for invalid shares.

    Built in chapter 16, Training.
    """

    shares: Mapping[str, float]
    seed: int = 0

    def __post_init__(self):
        values = list(self.shares.values())
        if not values or min(values) < 0 or not 0 < sum(values) < math.inf:
            raise ValueError(f"shares: expected 0 or more each, found {self.shares}")

    def task(self, number: int) -> str:
        draw = random.Random(f"{self.seed} {number}")
        return draw.choices([*self.shares], [*self.shares.values()])[0]


def pack(
    processor: Processor,
    pixel_values: Float[Tensor, "B C R R"],
    questions: Sequence[Sequence[tuple[str, str]]],
    length: int,
) -> dict[str, Tensor]:
    """One row a picture: its tokens once, then questions with answers.

    questions: (prompt, suffix) of each picture; as many as fit into
    ``length`` tokens go in, the first ones first.
    Gives pixel_values, input_ids [B, length], question [B, length]: 0 is
    the picture, n the n-th question, -1 padding, and suffix_mask, labels
    as ``Processor`` does.
    Raises ValueError for a picture without questions, and if its first
    one does not fit.

    Built in chapter 16, Training.
    """
    shape, P = (len(questions), length), processor.num_image_tokens
    ids = torch.full(shape, processor.id_of(PAD))
    labels, question = torch.full(shape, IGNORE), torch.full(shape, -1)
    ids[:, :P], question[:, :P] = processor.id_of(IMAGE), 0
    for row, asked in enumerate(questions):
        prompts, suffixes = [q for q, _ in asked], [a for _, a in asked]
        texts, end = processor([[]] * len(asked), prompts, suffixes), P
        for number, is_token in enumerate(texts["attention_mask"]):
            start, end = end, end + int(is_token.sum())
            if end > length:
                break
            ids[row, start:end] = texts["input_ids"][number, is_token]
            labels[row, start:end] = texts["labels"][number, is_token]
            question[row, start:end] = number + 1
        if question[row].max() < 1:
            raise ValueError(f"length: {length} tokens do not hold {asked[0]}")
    batch = {"pixel_values": pixel_values, "input_ids": ids, "labels": labels}
    return batch | {"question": question, "suffix_mask": labels != IGNORE}


def packed_mask(
    question: Int[Tensor, "B T"], suffix_mask: Bool[Tensor, "B T"]
) -> Bool[Tensor, "B 1 T T"]:
    """Each question reads the picture and itself, as a prefix-LM does.

    The picture reads only itself: that is what it costs to be shared.

    Built in chapter 16, Training.
    """
    key, query = question[:, None, None], question[:, None, :, None]
    may = (key == query) | (key == 0)
    return prefix_lm_mask(question >= 0, suffix_mask) & may


def packed_loss(
    model: PaliGemma, batch: Mapping[str, Tensor], label_smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """The mean over questions of the mean over the tokens of their answers.

    batch: of ``pack``. Each question's positions go on where the
    picture's end, as if it were alone.

    Built in chapter 16, Training.
    """
    question, labels = batch["question"], batch["labels"]
    P = model.config.vision.num_patches
    counted = torch.arange(question.shape[1], device=question.device)
    is_first = question.diff(dim=1, prepend=question[:, :1]) != 0
    starts = torch.where(is_first, counted, 0).cummax(dim=1).values
    hidden = model.language(
        model.embed(batch["input_ids"], model.encode_images(batch["pixel_values"])),
        positions=counted - starts + P * (question != 0),
        mask=packed_mask(question, batch["suffix_mask"]),
    )
    logits = model.language.logits(hidden[:, :-1][labels[:, 1:] != IGNORE])
    numbers = range(1, int(question.max()) + 1)
    each = [labels.masked_fill(question != n, IGNORE) for n in numbers]
    rows = torch.stack(each, dim=1).flatten(0, 1)  # one a question
    return suffix_loss(logits, rows, label_smoothing=label_smoothing)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained.

    Raises ValueError for what makes no sense.

    Built in chapter 16, Training.
    """

    steps: int  # updates of the weights
    learning_rate: float  # at its highest
    schedule: Callable[[int], float]  # its share at a step
    parts: tuple[Part, ...] = ()  # what learns differently from the rest
    weight_decay: float = 0.0  # of matrices, times the learning rate
    betas: tuple[float, float] = (0.9, 0.99)  # memory of Adam
    max_norm: float = 1.0  # of the gradient; longer ones are cut
    accumulate: int = 1  # batches an update, each with as many examples
    bfloat16: bool = False  # products in 16 bits, weights in 32

    def __post_init__(self):
        for name in ("steps", "learning_rate", "max_norm", "accumulate"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name}: expected above 0, found {value}")


Batch = Mapping[str, Tensor]


def batch_loss(model: PaliGemma, batch: Batch) -> Float[Tensor, ""]:
    """The model's own loss on a batch of ``Processor``.

    Built in chapter 16, Training.
    """
    return model(**batch).loss


class Trainer:
    """A model, its optimizer, and how many updates they have seen.

    batch_at: the n-th batch, from n alone, so that a run needs no memory
    of its data. loss_of: the loss to minimise. name: of the run; a state
    belongs to one. With bfloat16 on a CPU, attention in the model is
    ``attend_by_matmul`` from here on.

    Built in chapter 16, Training.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        batch_at: Callable[[int], Batch],
        loss_of: Callable[[Any, Any], Tensor] = batch_loss,
        name: str = "",
    ):
        self.model, self.config, self.step = model, config, 0
        self.name, self.batch_at, self.loss_of = name, batch_at, loss_of
        self.device = next(model.parameters()).device
        groups = parameter_groups(model, config.parts, config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=config.betas)
        self.rows: list[dict[str, float]] = []
        if config.bfloat16 and self.device.type == "cpu":
            for part in model.modules():
                if isinstance(part, Attention) and part.attend is attend:
                    part.attend = attend_by_matmul

    def train_step(self) -> dict[str, float]:
        """One update; the loss before it and the length of its gradient.

        Raises ValueError, and leaves the weights, if one is not finite.
        """
        config, total = self.config, 0.0
        self._set_rates()
        self.optimizer.zero_grad()
        for number in range(config.accumulate):
            batch = self.batch_at(self.step * config.accumulate + number)
            batch = {k: value.to(self.device) for k, value in batch.items()}
            with torch.autocast(self.device.type, torch.bfloat16, config.bfloat16):
                loss = self.loss_of(self.model, batch) / config.accumulate
            loss.backward()
            total += loss.item()
        weights, longest = self.model.parameters(), config.max_norm
        norm = nn.utils.clip_grad_norm_(weights, longest).item()
        if not math.isfinite(total + norm):
            raise ValueError(
                f"loss: {total} at step {self.step}, gradient {norm}; "
                "try a lower learning_rate, and look at the batch"
            )
        self.optimizer.step()
        self.step += 1
        return {"loss": total, "gradient": norm}

    def _set_rates(self) -> None:
        config, parts = self.config, [*self.config.parts, Part(prefix="")]
        now = config.learning_rate * config.schedule(self.step)
        for group in self.optimizer.param_groups:
            part = parts[group["part"]]
            risen = min(1.0, (self.step + 1) / max(1, part.warmup))
            group["lr"] = now * part.rate * risen

    def state(self) -> dict[str, Any]:
        """All that a run needs to go on bit for bit.

        Weights are not copied: write it down before the next step.
        random: torch's generator on the CPU, for a loss that draws.
        """
        return {
            "name": self.name,
            "step": self.step,
            "rows": list(self.rows),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to what ``state`` gave.

        Raises ValueError if it belongs to another run or model.
        """
        require_same_run(state, self.name)
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["random"].cpu())
            self.step, self.rows = state["step"], list(state["rows"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"state: of another model: {one_line(error)}") from None


__all__ = [
    "Batch",
    "Mixture",
    "Part",
    "Trainer",
    "TrainingConfig",
    "batch_loss",
    "cosine",
    "pack",
    "packed_loss",
    "packed_mask",
    "parameter_groups",
    "rsqrt",
]
