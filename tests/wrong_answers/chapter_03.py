"""Answers to the exercises of chapter 03: one right, several wrong."""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from pgcore.contrastive import contrastive_logits

# 03.1


def signs_then_logsigmoid(logits):
    signs = 2 * torch.eye(len(logits)) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def mean_over_pairs(logits):
    return signs_then_logsigmoid(logits) / len(logits)


def labels_as_signs(logits):
    return -F.logsigmoid(torch.eye(len(logits)) * logits).sum() / len(logits)


def matches_only(logits):
    return -F.logsigmoid(logits.diagonal()).mean()


def two_steps(logits):
    signs = 2 * torch.eye(len(logits)) - 1
    return -torch.log(torch.sigmoid(signs * logits)).sum() / len(logits)


def sum_of_surprise_at_yes(logits):
    return -F.logsigmoid(logits).sum() / len(logits)


# 03.2


def both_halves(logits, labels):
    return -labels * F.logsigmoid(logits) - (1 - labels) * F.logsigmoid(-logits)


def yes_half_only(logits, labels):
    return -labels * F.logsigmoid(logits)


def naive_logs(logits, labels):
    p = torch.sigmoid(logits)
    return -labels * torch.log(p) - (1 - labels) * torch.log(1 - p)


def clamped_logs(logits, labels):
    p = torch.sigmoid(logits).clamp(1e-7, 1 - 1e-7)
    return -labels * torch.log(p) - (1 - labels) * torch.log(1 - p)


def rounded_labels(logits, labels):
    return both_halves(logits, labels.round())


# 03.3


def softplus_less_trace(logits):
    return (F.softplus(logits).sum() - logits.trace()) / len(logits)


def softplus_plus_trace(logits):
    return (F.softplus(logits).sum() + logits.trace()) / len(logits)


def all_mismatches(logits):
    return F.softplus(logits).sum() / len(logits)


def with_a_mask(logits):
    is_match = torch.eye(len(logits), dtype=torch.bool)
    signed = torch.where(is_match, logits, -logits)
    return -F.logsigmoid(signed).sum() / len(logits)


def log1p_of_exp(logits):
    as_if_no_match = torch.log1p(torch.exp(logits)).sum()
    return (as_if_no_match - logits.trace()) / len(logits)


# 03.4


def bisection(logits):
    low, high = -logits.max().item() - 50, -logits.min().item() + 50
    for _ in range(40):
        middle = (low + high) / 2
        if torch.sigmoid(logits.double() + middle).sum() > len(logits):
            high = middle
        else:
            low = middle
    return (low + high) / 2


def as_if_all_were_zero(logits):
    return -math.log(max(len(logits) - 1, 1))


def the_papers(logits):
    return -10.0


def centred(logits):
    return -math.log(max(len(logits) - 1, 1)) - logits.mean().item()


# 03.5


def _strangers(pictures, captions, log_scale, bias):
    return F.softplus(contrastive_logits(pictures, captions, log_scale) + bias).sum()


def _by_blocks(block, images, texts, log_scale, bias, chunk_size):
    total = 0.0
    for pictures in images.split(chunk_size):
        for captions in texts.split(chunk_size):
            total = total + block(pictures, captions, log_scale, bias)
    return total


def recomputed(images, texts, log_scale, bias, chunk_size):
    def block(*inputs):
        return checkpoint(_strangers, *inputs, use_reentrant=False)

    return _by_blocks(block, images, texts, log_scale, bias, chunk_size)


def kept(images, texts, log_scale, bias, chunk_size):
    return _by_blocks(_strangers, images, texts, log_scale, bias, chunk_size)


def whole_matrix(images, texts, log_scale, bias, chunk_size):
    return _strangers(images, texts, log_scale, bias)


def checkpointed_once(images, texts, log_scale, bias, chunk_size):
    inputs = images, texts, log_scale, bias
    return checkpoint(_strangers, *inputs, use_reentrant=False)


def row_strips(images, texts, log_scale, bias, chunk_size):
    total = 0.0
    for pictures in images.split(chunk_size):
        inputs = pictures, texts, log_scale, bias
        total = total + checkpoint(_strangers, *inputs, use_reentrant=False)
    return total


def scale_left_out_of_the_graph(images, texts, log_scale, bias, chunk_size):
    return recomputed(images, texts, log_scale.detach(), bias, chunk_size) + (
        0.0 * log_scale
    )


def diagonal_blocks_only(images, texts, log_scale, bias, chunk_size):
    blocks = zip(images.split(chunk_size), texts.split(chunk_size), strict=False)
    return sum(_strangers(*block, log_scale, bias) for block in blocks)


def divided(images, texts, log_scale, bias, chunk_size):
    return recomputed(images, texts, log_scale, bias, chunk_size) / len(images)


RIGHT = {
    "03.1": signs_then_logsigmoid,
    "03.2": both_halves,
    "03.3": softplus_less_trace,
    "03.4": bisection,
    "03.5": recomputed,
}

WRONG = {
    "03.1": [
        mean_over_pairs,
        labels_as_signs,
        matches_only,
        two_steps,
        sum_of_surprise_at_yes,
    ],
    "03.2": [yes_half_only, naive_logs, clamped_logs, rounded_labels],
    "03.3": [
        softplus_plus_trace,
        all_mismatches,
        with_a_mask,
        signs_then_logsigmoid,
        log1p_of_exp,
    ],
    "03.4": [as_if_all_were_zero, the_papers, centred],
    "03.5": [
        kept,
        whole_matrix,
        checkpointed_once,
        row_strips,
        scale_left_out_of_the_graph,
        diagonal_blocks_only,
        divided,
    ],
}
