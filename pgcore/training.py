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

from pgcore.attention import Attention, require_heads
from pgcore.paligemma import PaliGemma, prefix_lm_mask, suffix_loss
from pgcore.processing import BOS, EOS, IGNORE, IMAGE, PAD, Processor
from pgcore.runs import Progress, RunFolder


def cosine(step: int, *, steps: int, warmup: int) -> float:
    """The share of the learning rate at a step: up in a line, then down.

    Half a wave of the cosine, from 1 to 0 at ``steps``. For a transfer,
    whose length is known (Beyer et al., 2024, section 3.2.4).
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def rsqrt(step: int, *, warmup: int, timescale: int) -> float:
    """The share of the learning rate at a step: up in a line, then slowly down.

    1 / sqrt(1 + t / timescale), t steps after the warm-up. It needs no
    end: a run may go on for ever, stage after stage.
    Source: big_vision, ``utils.create_learning_rate_schedule``.
    """
    if step < warmup:
        return (step + 1) / warmup
    return (1 + (step - warmup) / timescale) ** -0.5


@dataclass(frozen=True, kw_only=True)
class Part:
    """Parameters whose names begin alike, and how they learn.

    rate: times the learning rate; 0 leaves them as they are. warmup:
    steps in which that grows in a line from 0.
    Source: Beyer et al. (2024), section 3.2.2, for the image tower.
    """

    prefix: str
    rate: float = 1.0
    warmup: int = 0


def parameter_groups(
    model: nn.Module, parts: Sequence[Part], weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimizer: each parameter in the first part that fits.

    Matrices decay; norms and biases do not. A part of rate 0 is frozen:
    its parameters ask for no gradient. What fits no part learns at 1.
    Raises ValueError for a part that no name begins with.
    """
    parts = [*parts, Part(prefix="")]
    groups = [
        {"params": [], "part": number, "weight_decay": decay}
        for number in range(len(parts))
        for decay in (weight_decay, 0.0)
    ]
    for name, weight in model.named_parameters():
        number = next(i for i, p in enumerate(parts) if name.startswith(p.prefix))
        weight.requires_grad_(parts[number].rate > 0)
        groups[2 * number + (weight.ndim < 2)]["params"].append(weight)
    for number, part in enumerate(parts[:-1]):
        if not groups[2 * number]["params"] + groups[2 * number + 1]["params"]:
            raise ValueError(f"part: no parameter's name begins with {part.prefix!r}")
    return [group for group in groups if group["params"]]


@dataclass(frozen=True)
class Mixture:
    """Tasks, each with the share of the examples that it gets.

    Which task example n is follows from the seed and n alone.
    Raises ValueError for shares that are none.
    """

    shares: Mapping[str, float]
    seed: int = 0

    def __post_init__(self):
        values = list(self.shares.values())
        if not values or min(values) < 0 or not 0 < sum(values) < math.inf:
            raise ValueError(f"shares: expected 0 or more each, found {self.shares}")

    def task(self, number: int) -> str:
        draw = random.Random(f"{self.seed} {number}")
        return draw.choices(list(self.shares), list(self.shares.values()))[0]


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
    Raises ValueError if the first question of a picture does not fit.
    """
    P, bos, eos = processor.num_image_tokens, *map(processor.id_of, (BOS, EOS))
    encode = processor.tokenizer.encode
    newline = encode("\n", add_special_tokens=False).ids
    ids = torch.full((len(questions), length), processor.id_of(PAD))
    labels, question = torch.full_like(ids, IGNORE), torch.full_like(ids, -1)
    ids[:, :P], question[:, :P] = processor.id_of(IMAGE), 0
    for row, asked in enumerate(questions):
        at = P
        for number, (prompt, suffix) in enumerate(asked, start=1):
            prefix = [bos, *encode(prompt, add_special_tokens=False).ids, *newline]
            answer = [*encode(suffix, add_special_tokens=False).ids, eos]
            start, end = at + len(prefix), at + len(prefix) + len(answer)
            if end > length:
                break
            ids[row, at:end] = torch.tensor(prefix + answer)
            labels[row, start:end] = ids[row, start:end]
            question[row, at:end], at = number, end
        if at == P:
            raise ValueError(f"length: {length} tokens do not hold {asked[:1]}")
    return {
        "pixel_values": pixel_values,
        "input_ids": ids,
        "question": question,
        "suffix_mask": labels != IGNORE,
        "labels": labels,
    }


def packed_mask(
    question: Int[Tensor, "B T"], suffix_mask: Bool[Tensor, "B T"]
) -> Bool[Tensor, "B 1 T T"]:
    """Each question reads the picture and itself, as a prefix-LM does.

    The picture reads only itself: that is what it costs to be shared.
    """
    key, query = question[:, None, None], question[:, None, :, None]
    return prefix_lm_mask(question >= 0, suffix_mask) & ((key == query) | (key == 0))


def packed_loss(
    model: PaliGemma, batch: Mapping[str, Tensor], label_smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """The mean over questions of the mean over the tokens of their answers."""
    question, labels = batch["question"], batch["labels"]
    P = model.config.vision.num_patches
    counted = torch.arange(question.shape[1], device=question.device)
    starts = torch.where(question.diff(dim=1, prepend=question[:, :1]) != 0, counted, 0)
    positions = counted - starts.cummax(dim=1).values + P * (question != 0)
    hidden = model.language(
        model.embed(batch["input_ids"], model.encode_images(batch["pixel_values"])),
        positions=positions,
        mask=packed_mask(question, batch["suffix_mask"]),
    )
    logits = model.language.logits(hidden[:, :-1][labels[:, 1:] != IGNORE])
    alone = [
        labels.masked_fill(question != number, IGNORE)
        for number in range(1, int(question.max()) + 1)
    ]
    each = torch.stack(alone, dim=1).flatten(0, 1)
    return suffix_loss(logits, each, label_smoothing=label_smoothing)


def attend_by_matmul(
    q: Float[Tensor, "B N T H"],
    k: Float[Tensor, "B K S H"],
    v: Float[Tensor, "B K S H"],
    mask: Bool[Tensor, " B #N #T S"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B N T H"]:
    """``attend`` as two matrix products, for training in bfloat16 on a CPU.

    There the backward pass of torch's fused kernel is slow. Queries need
    something to read: a row of False gives no zeros here.
    Arguments and errors as for ``attend``.
    """
    require_heads(q, k, v, mask)
    (B, N, T, H), K = q.shape, k.shape[1]
    stacked = (q * (H**-0.5 if scale is None else scale)).reshape(B, K, -1, H)
    scores = (stacked @ k.transpose(-2, -1)).view(B, N, T, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    return (weights.view(B, K, N // K * T, -1) @ v).reshape(B, N, T, H)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained.

    Raises ValueError for what makes no sense.
    """

    steps: int  # updates of the weights
    learning_rate: float  # at its highest
    schedule: Callable[[int], float]  # its share at a step
    parts: tuple[Part, ...] = ()  # what learns otherwise than the rest
    weight_decay: float = 0.0  # of matrices, times the learning rate
    betas: tuple[float, float] = (0.9, 0.99)  # memory of Adam
    max_norm: float = 1.0  # of the gradient; longer ones are cut
    accumulate: int = 1  # batches an update
    bfloat16: bool = False  # products in 16 bits, weights in 32

    def __post_init__(self):
        for name in ("steps", "learning_rate", "max_norm", "accumulate"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name}: expected above 0, found {value}")


Batch = Mapping[str, Tensor]


def batch_loss(model: PaliGemma, batch: Batch) -> Float[Tensor, ""]:
    """The model's own loss on a batch of ``Processor``."""
    return model(**batch).loss


class Trainer:
    """A model, its optimizer, and how many updates they have seen.

    batch_at: the n-th batch, from n alone, so that a run needs no memory
    of its data. loss_of: what is made small.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        batch_at: Callable[[int], Batch],
        loss_of: Callable[[Any, Batch], Tensor] = batch_loss,
        name: str = "",
    ):
        self.model, self.config, self.step, self.name = model, config, 0, name
        self.batch_at, self.loss_of = batch_at, loss_of
        self.device = next(model.parameters()).device
        groups = parameter_groups(model, config.parts, config.weight_decay)
        self.optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=config.betas
        )
        self.rows: list[dict[str, float]] = []
        if config.bfloat16 and self.device.type == "cpu":
            for module in model.modules():
                if isinstance(module, Attention):
                    module.attend = attend_by_matmul

    def train_step(self) -> dict[str, float]:
        """One update; the loss before it and the length of its gradient."""
        config, total = self.config, 0.0
        self._set_rates()
        self.optimizer.zero_grad()
        for number in range(config.accumulate):
            batch = self.batch_at(self.step * config.accumulate + number)
            batch = {name: value.to(self.device) for name, value in batch.items()}
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=config.bfloat16
            ):
                loss = self.loss_of(self.model, batch) / config.accumulate
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.max_norm)
        self.optimizer.step()
        self.step += 1
        return {"loss": total, "gradient": norm.item()}

    def _set_rates(self) -> None:
        config, parts = self.config, [*self.config.parts, Part(prefix="")]
        now = config.learning_rate * config.schedule(self.step)
        for group in self.optimizer.param_groups:
            part = parts[group["part"]]
            risen = min(1.0, (self.step + 1) / part.warmup) if part.warmup else 1.0
            group["lr"] = now * part.rate * risen

    def state(self) -> dict[str, Any]:
        """All that a run needs to go on bit for bit."""
        return {
            "name": self.name,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "rows": self.rows,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to what ``state`` gave.

        Raises ValueError if it belongs to another run.
        """
        if state["name"] != self.name:
            raise ValueError(
                "state: written by another recipe; use another folder, or "
                f"the options it was started with: {state['name']}"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"].cpu())
        self.step, self.rows = state["step"], state["rows"]


def fit(
    trainer: Trainer,
    folder: RunFolder,
    *,
    every: int,
    evaluate: Callable[[], Mapping[str, float]] = dict,
    samples: Callable[[], Sequence[str]] = tuple,
) -> None:
    """Train to the last step, from where a run in this folder stopped.

    every: updates between looks. At each, ``evaluate`` gives figures,
    ``samples`` lines that are printed, and all is written down.
    """
    if (state := folder.load(trainer.device)) is not None:
        trainer.restore(state)
    progress = Progress(trainer.config.steps, trainer.step)
    recent: list[dict[str, float]] = []
    while trainer.step < trainer.config.steps:
        trainer.model.train()
        recent.append(trainer.train_step())
        if trainer.step % every and trainer.step != trainer.config.steps:
            continue
        means = {k: sum(r[k] for r in recent) / len(recent) for k in recent[0]}
        recent = []
        trainer.model.eval()
        figures = {**means, **evaluate()}
        trainer.rows.append({"step": trainer.step, **figures})
        progress.say(trainer.step, figures)
        for line in samples():
            print(f"  {line}")
        folder.save(trainer.state())
        folder.write_metrics(trainer.rows)
