# Generated from chapters/14_generation.ipynb.
# Edit the notebook, then run "make chapters".
"""Slow, obvious versions from chapter 14, Generation."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from pgcore.generation import (
    decode_step,
    prefill,
)
from pgcore.paligemma import PaliGemma


def next_logits(
    model: PaliGemma, batch: dict[str, Tensor], written: Int[Tensor, "B n"]
) -> Float[Tensor, "B V"]:
    """Logits after what is written, from one forward over everything."""
    more = (0, written.shape[1])
    output = model(
        batch["pixel_values"],
        torch.cat([batch["input_ids"], written], dim=1),
        F.pad(batch["attention_mask"], more, value=True),
        F.pad(torch.zeros_like(batch["attention_mask"]), more, value=True),
    )
    return output.logits[:, -1]


def write_obviously(
    model: PaliGemma,
    batch: dict[str, Tensor],
    max_new_tokens: int,
    stop: int,
) -> tuple[Int[Tensor, "B n"], Float[Tensor, "B n V"]]:
    """The likeliest token each time, the whole model for each; logits."""
    written, logits = batch["input_ids"][:, :0], []
    for _ in range(max_new_tokens):
        logits.append(next_logits(model, batch, written))
        new = logits[-1].argmax(dim=-1, keepdim=True)
        written = torch.cat([written, new], dim=1)
        if (written == stop).any(dim=1).all():
            break
    return written, torch.stack(logits, dim=1)


def greedy_logits(
    model: PaliGemma,
    batch: dict[str, Tensor],
    tokens: Int[Tensor, "B n"],
    prefill=prefill,
    step=decode_step,
) -> Float[Tensor, "B m V"]:
    """Logits before each of these tokens and after the last, by steps."""
    num_slots = batch["input_ids"].shape[1] + tokens.shape[1] + 3
    first, state = prefill(model, batch, num_slots)
    later = [step(model, column, state) for column in tokens.T]
    return torch.stack([first, *later], dim=1)


def reference_distribution(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> list[float]:
    """One row, in plain Python: divide, sort, keep, divide by the sum."""
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    total, kept, share = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if share >= top_p * total:
            break
        kept.append(i)
        share += weights[i]
    return [weights[i] / share if i in kept else 0.0 for i in range(len(logits))]
