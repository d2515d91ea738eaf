# Generated from chapters/16_training.ipynb.
# Edit the notebook, then run "make chapters".
"""Slow, obvious versions from chapter 16, Training."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from pgcore.matmul_attention import attend_by_matmul as attend_by_matmul
from pgcore.paligemma import PaliGemma
from pgcore.processing import IMAGE, Processor
from pgcore.runs import fit as fit


def packed_loss_by_loops(
    model: PaliGemma,
    processor: Processor,
    pixel_values: Float[Tensor, "B C R R"],
    questions: Sequence[Sequence[tuple[str, str]]],
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Each question in a row of its own; its picture reads itself alone."""
    losses, P = [], processor.num_image_tokens
    for picture, asked in zip(pixel_values, questions, strict=True):
        images = model.encode_images(picture[None])
        for prompt, suffix in asked:
            text = processor([[]], [prompt], [suffix])
            ids = [processor.id_of(IMAGE)] * P
            ids = torch.tensor([ids + text["input_ids"][0].tolist()])
            T = ids.shape[1]
            start = T - int(text["suffix_mask"].sum())
            mask = torch.zeros(1, 1, T, T, dtype=torch.bool)
            for query in range(T):
                for key in range(T):
                    given = key < (P if query < P else start)
                    own_past = query >= start and key <= query
                    mask[0, 0, query, key] = given or own_past
            hidden = model.language(
                model.embed(ids, images),
                positions=torch.arange(T)[None],
                mask=mask,
            )
            logits = model.language.logits(hidden)[0, start - 1 : -1]
            losses.append(
                cross_entropy(logits, ids[0, start:], label_smoothing=label_smoothing)
            )
    return sum(losses) / len(losses)
