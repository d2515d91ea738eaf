"""Answers to the exercises of chapter 01: one right, many wrong, for each."""

import math

import torch
import torch.nn.functional as F

from pgcore.contrastive import contrastive_logits


def normalize(x, dim):
    return x / x.norm(dim=dim, keepdim=True).clamp_min(1e-12)


def divides_by_zero(x, dim):
    return x / x.norm(dim=dim, keepdim=True)


def last_axis_only(x, dim):
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def without_keepdim(x, dim):
    return x / x.norm(dim=dim).clamp_min(1e-12)


def sum_instead_of_length(x, dim):
    return x / x.abs().sum(dim=dim, keepdim=True).clamp_min(1e-12)


def squared_length(x, dim):
    return x / x.square().sum(dim=dim, keepdim=True).clamp_min(1e-12)


def adds_epsilon(x, dim):
    return x / (x.norm(dim=dim, keepdim=True) + 1e-2)


def in_place(x, dim):
    return x.div_(x.norm(dim=dim, keepdim=True).clamp_min(1e-12))


def loss_from_logits(logits):
    rows, columns = logits.logsumexp(dim=1), logits.logsumexp(dim=0)
    return ((rows + columns) / 2 - logits.diagonal()).mean()


def rows_only(logits):
    return (logits.logsumexp(dim=1) - logits.diagonal()).mean()


def naive_exponentials(logits):
    rows, columns = logits.exp().sum(1).log(), logits.exp().sum(0).log()
    return ((rows + columns) / 2 - logits.diagonal()).mean()


def sum_instead_of_mean(logits):
    return loss_from_logits(logits) * len(logits)


def halves_not_averaged(logits):
    return 2 * loss_from_logits(logits)


def whole_matrix(logits):
    return logits.flatten().logsumexp(dim=0) - logits.diagonal().mean()


def all_pairs_right(logits):
    rows, columns = logits.logsumexp(dim=1), logits.logsumexp(dim=0)
    return ((rows + columns) / 2 - logits.mean(dim=1)).mean()


def keep_scale_below(log_scale, largest):
    with torch.no_grad():
        log_scale.clamp_(max=math.log(largest))


def not_in_place(log_scale, largest):
    log_scale.clamp(max=math.log(largest))


def clamps_the_logarithm_at_the_scale(log_scale, largest):
    with torch.no_grad():
        log_scale.clamp_(max=largest)


def sets_to_the_ceiling(log_scale, largest):
    with torch.no_grad():
        log_scale.fill_(math.log(largest))


def with_a_floor(log_scale, largest):
    with torch.no_grad():
        log_scale.clamp_(min=0, max=math.log(largest))


def freezes(log_scale, largest):
    log_scale.requires_grad_(False).clamp_(max=math.log(largest))


def leaves_as_scale(log_scale, largest):
    with torch.no_grad():
        log_scale.exp_().clamp_(max=largest)


def gradient_of_logits(logits):
    truth = torch.eye(len(logits), dtype=logits.dtype)
    return (logits.softmax(1) + logits.softmax(0) - 2 * truth) / (2 * len(logits))


def scale_gradient(images, texts, log_scale):
    logits = contrastive_logits(images, texts, log_scale)
    return (gradient_of_logits(logits) * logits).sum()


def gradient_of_the_scale_itself(images, texts, log_scale):
    return scale_gradient(images, texts, log_scale) / log_scale.exp()


def sign_flipped(images, texts, log_scale):
    return -scale_gradient(images, texts, log_scale)


def rows_only_gradient(images, texts, log_scale):
    logits = contrastive_logits(images, texts, log_scale)
    truth = torch.eye(len(logits), dtype=logits.dtype)
    return ((logits.softmax(1) - truth) / len(logits) * logits).sum()


def forgets_to_divide(images, texts, log_scale):
    return scale_gradient(images, texts, log_scale) * len(images)


def by_autograd(images, texts, log_scale):
    leaf = log_scale.detach().clone().requires_grad_()
    loss = loss_from_logits(contrastive_logits(images, texts, leaf))
    return torch.autograd.grad(loss, leaf)[0]


def masked_loss(images, texts, log_scale, labels):
    logits = contrastive_logits(images, texts, log_scale)
    same = labels[:, None] == labels
    same.fill_diagonal_(False)
    return loss_from_logits(logits.masked_fill(same, -torch.inf))


def ignores_the_labels(images, texts, log_scale, labels):
    return loss_from_logits(contrastive_logits(images, texts, log_scale))


def removes_the_diagonal(images, texts, log_scale, labels):
    logits = contrastive_logits(images, texts, log_scale)
    same = labels[:, None] == labels
    return loss_from_logits(logits.masked_fill(same, -torch.inf))


def masks_with_zero(images, texts, log_scale, labels):
    logits = contrastive_logits(images, texts, log_scale)
    same = labels[:, None] == labels
    same.fill_diagonal_(False)
    return loss_from_logits(logits.masked_fill(same, 0.0))


def masks_rows_only(images, texts, log_scale, labels):
    logits = contrastive_logits(images, texts, log_scale)
    same = labels[:, None] == labels
    same.fill_diagonal_(False)
    masked = logits.masked_fill(same, -torch.inf)
    pairs = torch.arange(len(logits))
    return (F.cross_entropy(masked, pairs) + F.cross_entropy(logits.T, pairs)) / 2


def spreads_the_target(images, texts, log_scale, labels):
    logits = contrastive_logits(images, texts, log_scale)
    same = (labels[:, None] == labels).to(logits.dtype)
    target = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def drops_duplicate_pairs(images, texts, log_scale, labels):
    first = [i for i in range(len(labels)) if labels[i] not in labels[:i]]
    return loss_from_logits(contrastive_logits(images[first], texts[first], log_scale))


RIGHT = {
    "01.1": normalize,
    "01.2": loss_from_logits,
    "01.3": keep_scale_below,
    "01.4": scale_gradient,
    "01.5": masked_loss,
}

WRONG = {
    "01.1": [
        divides_by_zero,
        last_axis_only,
        without_keepdim,
        sum_instead_of_length,
        squared_length,
        adds_epsilon,
        in_place,
    ],
    "01.2": [
        rows_only,
        naive_exponentials,
        sum_instead_of_mean,
        halves_not_averaged,
        whole_matrix,
        all_pairs_right,
    ],
    "01.3": [
        not_in_place,
        clamps_the_logarithm_at_the_scale,
        sets_to_the_ceiling,
        with_a_floor,
        freezes,
        leaves_as_scale,
    ],
    "01.4": [
        gradient_of_the_scale_itself,
        sign_flipped,
        rows_only_gradient,
        forgets_to_divide,
        by_autograd,
    ],
    "01.5": [
        ignores_the_labels,
        removes_the_diagonal,
        masks_with_zero,
        masks_rows_only,
        spreads_the_target,
        drops_duplicate_pairs,
    ],
}
