# Generated from chapters/12_paligemma.ipynb.
# Edit the notebook, then run "make chapters".
"""Slow, obvious versions from chapter 12, PaliGemma."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def insert_by_loops(
    words: Float[Tensor, "B T D"],
    is_image: Bool[Tensor, "B T"],
    image_tokens: Float[Tensor, "images P D"],
) -> Float[Tensor, "B T D"]:
    """Image tokens, one after the other, into the places, row by row."""
    waiting = list(image_tokens.flatten(0, 1))
    rows = []
    for row, places in zip(words, is_image.tolist(), strict=True):
        rows.append(
            torch.stack(
                [
                    waiting.pop(0) if is_place else word
                    for word, is_place in zip(row, places, strict=True)
                ]
            )
        )
    assert not waiting
    return torch.stack(rows)


def prefix_lm_mask_by_loops(
    is_token: Bool[Tensor, "B S"], is_suffix: Bool[Tensor, "B S"]
) -> Bool[Tensor, "B 1 S S"]:
    """Everybody reads the prefix; the suffix reads its own past."""
    B, S = is_token.shape
    mask = torch.zeros(B, 1, S, S, dtype=torch.bool)
    for row in range(B):
        for query in range(S):
            for key in range(S):
                given = not is_suffix[row, key]
                own_past = is_suffix[row, query] and key <= query
                may = given or own_past
                mask[row, 0, query, key] = is_token[row, key] and may
    return mask


def suffix_loss_by_loops(
    logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """A mean for each row that has labels, then the mean of those."""
    of_rows = []
    for row, row_labels in zip(logits.double(), labels, strict=True):
        losses = [
            -row[place - 1].log_softmax(-1)[row_labels[place]]
            for place in range(1, len(row_labels))
            if row_labels[place] != -100
        ]
        if losses:
            of_rows.append(sum(losses) / len(losses))
    return sum(of_rows) / len(of_rows) if of_rows else logits.sum() * 0
