"""Answers to the exercises of chapter 02: right ones, and popular wrong ones."""

from math import inf

import torch
import torch.nn.functional as F

from pgcore.lab.museum import numerics as museum
from pgcore.numerics import log_softmax


def safe_softmax(scores):
    exponentials = torch.exp(scores - scores.amax(-1, keepdim=True))
    return exponentials / exponentials.sum(-1, keepdim=True)


def softmax_over_the_first_axis(scores):
    return torch.softmax(scores, 0)


def softmax_clipped(scores):
    return museum.softmax_no_shift(scores.clamp(-88, 88))


def my_logsumexp(scores, dim):
    maximum = scores.detach().amax(dim, keepdim=True)
    shift = maximum.masked_fill(maximum == -inf, 0.0)
    total = torch.exp(scores - shift).sum(dim, keepdim=True)
    return (maximum + total.clamp(min=1).log()).squeeze(dim)


def logsumexp_no_shift(scores, dim):
    return scores.exp().sum(dim).log()


def logsumexp_nan_on_masked_rows(scores, dim):
    maximum = scores.amax(dim, keepdim=True)
    return (scores - maximum).exp().sum(dim).log() + maximum.squeeze(dim)


def logsumexp_maximum_guard(scores, dim):
    maximum = scores.detach().amax(dim, keepdim=True)
    shift = maximum.masked_fill(maximum == -inf, 0.0)
    total = torch.exp(scores - shift).sum(dim, keepdim=True)
    total = torch.maximum(total, torch.ones_like(total))
    return (maximum + total.log()).squeeze(dim)


def logsumexp_last_axis_only(scores, dim):
    return torch.logsumexp(scores, -1)


def smooth_loss(logits, targets, epsilon):
    log_weights = log_softmax(logits)
    picked = log_weights.gather(-1, targets[:, None]).squeeze(-1)
    return -((1 - epsilon) * picked + epsilon * log_weights.mean(-1)).mean()


def smooth_loss_over_others(logits, targets, epsilon):
    classes = logits.shape[-1]
    share = epsilon * classes / (classes - 1)
    return smooth_loss(logits, targets, share)


def smooth_loss_sums_the_spread(logits, targets, epsilon):
    log_weights = log_softmax(logits)
    picked = log_weights.gather(-1, targets[:, None]).squeeze(-1)
    return -((1 - epsilon) * picked + epsilon * log_weights.sum(-1)).mean()


def smooth_loss_from_log_of_softmax(logits, targets, epsilon):
    log_weights = torch.softmax(logits, -1).log()
    picked = log_weights.gather(-1, targets[:, None]).squeeze(-1)
    return -((1 - epsilon) * picked + epsilon * log_weights.mean(-1)).mean()


def smooth_loss_ignores_epsilon(logits, targets, epsilon):
    return F.cross_entropy(logits, targets)


def merge_pairs(left, right):
    m = torch.maximum(left[0], right[0])
    shift = m.masked_fill(m == -inf, 0.0)
    return m, sum(total * torch.exp(mm - shift) for mm, total in (left, right))


def merge_adds(left, right):
    return torch.maximum(left[0], right[0]), left[1] + right[1]


def merge_rescales_one_side(left, right):
    m = torch.maximum(left[0], right[0])
    return m, left[1] * torch.exp(left[0] - m) + right[1]


def merge_nan_for_two_empty(left, right):
    m = torch.maximum(left[0], right[0])
    return m, sum(total * torch.exp(mm - m) for mm, total in (left, right))


def merge_nan_to_num(left, right):
    m, total = merge_nan_for_two_empty(left, right)
    return m, total.nan_to_num(0.0)


def merge_without_maximum(left, right):
    total = left[1] * left[0].exp() + right[1] * right[0].exp()
    return torch.zeros_like(total), total


def worst_error(function, scores):
    exact = torch.softmax(scores.double(), -1)
    return ((function(scores).double() - exact).abs() / exact).max() * 256


def worst_absolute_error(function, scores):
    exact = torch.softmax(scores.double(), -1)
    return (function(scores).double() - exact).abs().max() * 256


def worst_error_in_float32_steps(function, scores):
    return worst_error(function, scores) * 2**16


def worst_error_against_itself_rounded(function, scores):
    exact = torch.softmax(scores, -1).double()
    return ((function(scores).double() - exact).abs() / exact).max() * 256


def mean_error(function, scores):
    exact = torch.softmax(scores.double(), -1)
    return ((function(scores).double() - exact).abs() / exact).mean() * 256


RIGHT = {
    "02.1": safe_softmax,
    "02.2": my_logsumexp,
    "02.3": smooth_loss,
    "02.4": merge_pairs,
    "02.5": worst_error,
}
WRONG = {
    "02.1": [
        museum.softmax_no_shift,
        museum.softmax_shift_by_mean,
        museum.softmax_global_maximum,
        softmax_over_the_first_axis,
        softmax_clipped,
    ],
    "02.2": [
        logsumexp_no_shift,
        logsumexp_nan_on_masked_rows,
        logsumexp_maximum_guard,
        logsumexp_last_axis_only,
        torch.logsumexp,  # its gradient is NaN where all is masked
    ],
    "02.3": [
        smooth_loss_over_others,
        smooth_loss_sums_the_spread,
        smooth_loss_from_log_of_softmax,
        smooth_loss_ignores_epsilon,
    ],
    "02.4": [
        merge_adds,
        merge_rescales_one_side,
        merge_nan_for_two_empty,
        merge_nan_to_num,
        merge_without_maximum,
    ],
    "02.5": [
        worst_absolute_error,
        worst_error_in_float32_steps,
        worst_error_against_itself_rounded,
        mean_error,
    ],
}
