# Generated from chapters/16_training.ipynb.
# Edit the notebook, then run "make chapters".
"""Wrong twins from chapter 16, Training."""

import random

import torch
from torch import Tensor, nn

from pgcore.matmul_attention import attend_by_matmul as attend_by_matmul
from pgcore.paligemma import PaliGemma, prefix_lm_mask, suffix_loss
from pgcore.processing import IGNORE
from pgcore.runs import fit as fit
from pgcore.training import (
    Batch,
    Mixture,
    Trainer,
)


def shifted_twice(model: PaliGemma, batch: Batch) -> Tensor:
    """Shifts labels that the model shifts again: learns the next but one.

    GitForCausalLM of transformers from 4.49 on (issue 47394), until pull
    request 47395.
    """
    labels = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    return model(**{**batch, "labels": labels}).loss


def end_taken_for_padding(model: PaliGemma, batch: Batch) -> Tensor:
    """Pads with <eos>, and masks padding: it never learns to stop.

    Collators of transformers with pad_token = eos_token (issue 23530).
    """
    labels = batch["labels"].masked_fill(batch["labels"] == 1, IGNORE)
    return model(**{**batch, "labels": labels}).loss


def mean_over_tokens(model: PaliGemma, batch: Batch) -> Tensor:
    """Right for one batch, wrong when pieces of a batch are accumulated.

    Each piece divides by its own number of tokens. Trainers of
    transformers and others until October 2024 (pull request 34191).
    """
    logits = model(**batch).logits
    return suffix_loss(logits, batch["labels"], "tokens")


def packed_without_walls(model: PaliGemma, batch: Batch) -> Tensor:
    """Packs, and masks as if it were one text: questions read each other.

    The packing of TRL's SFTTrainer until 2025 (Kundu et al., 2024; trl,
    pull request 3526).
    """
    question, labels = batch["question"], batch["labels"]
    images = model.encode_images(batch["pixel_values"])
    counted = torch.arange(question.shape[1]).expand_as(question)
    hidden = model.language(
        model.embed(batch["input_ids"], images),
        positions=counted,
        mask=prefix_lm_mask(question >= 0, batch["suffix_mask"]),
    )
    logits = model.language.logits(hidden[:, :-1][labels[:, 1:] != IGNORE])
    return suffix_loss(logits, labels)


class ForgetsToClear(Trainer):
    """zero_grad is missing: every gradient there ever was is added up."""

    def train_step(self):
        self.optimizer.zero_grad = lambda set_to_none=True: None
        return super().train_step()


class LossNotDivided(Trainer):
    """Sums the batches of an update; issue 5 of distillKitPlus, for one.

    While every gradient is cut, the weights hide it; the curves never do.
    """

    def train_step(self):
        loss_of, number = self.loss_of, self.config.accumulate
        self.loss_of = lambda model, batch: number * loss_of(model, batch)
        try:
            return super().train_step()
        finally:
            self.loss_of = loss_of


class ScheduleFirst(Trainer):
    """Moves the schedule before the step: its first rate is never used.

    torch warns of it since 1.1; many logs show the warning.
    """

    def _set_rates(self):
        self.step += 1
        super()._set_rates()
        self.step -= 1


class DecaysEverything(Trainer):
    """Pulls norms and biases to zero, too.

    transformers looked for norms by their class, and home-made RMSNorms
    were not of it (pull request 35927).
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.config.weight_decay


class WeightsIn16Bits(Trainer):
    """Keeps the weights in bfloat16: most of a small step is rounded away.

    torchao rounds at random against it (pull request 1124).
    """

    def __init__(self, model, *arguments, **options):
        super().__init__(model.bfloat16(), *arguments, **options)


STEPPING = (
    ForgetsToClear,
    LossNotDivided,
    ScheduleFirst,
    DecaysEverything,
    WeightsIn16Bits,
)


class OnlyTheWeights(Trainer):
    """Restores weights and step; Adam starts with an empty memory."""

    def restore(self, state):
        super().restore(state)
        self.optimizer.state.clear()


class ForgetsTheGenerator(Trainer):
    """Goes on with other draws."""

    def restore(self, state):
        here = torch.get_rng_state()
        super().restore(state)
        torch.set_rng_state(here)


class StartsTheDataAgain(Trainer):
    """Sees the first batches once more, and the last ones never.

    accelerate was in this family: it resumed in the shuffled order of an
    earlier epoch (issue 2016, pull request 4071).
    """

    def restore(self, state):
        super().restore(state)
        batch_at, done = self.batch_at, self.step * self.config.accumulate
        self.batch_at = lambda number: batch_at(number - done)


class StartsTheScheduleAgain(Trainer):
    """Warms up once more; the rate falls from the top again."""

    def restore(self, state):
        super().restore(state)
        done, set_rates = self.step, super()._set_rates

        def shifted():
            self.step -= done
            set_rates()
            self.step += done

        self._set_rates = shifted


RESUMING = (
    OnlyTheWeights,
    ForgetsTheGenerator,
    StartsTheDataAgain,
    StartsTheScheduleAgain,
)


class DrawsWithTheData(Mixture):
    """Draws the task from the very seed that drew the picture.

    The first draft of this chapter: it captioned small things only.
    """

    def task(self, number):
        draw = random.Random(f"thing {self.seed} {number}")
        return draw.choices([*self.shares], [*self.shares.values()])[0]
