"""Answers to the exercises of chapter 04: one right, several wrong."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

# 04.1


def stream_of_sums(x, norms, functions):
    for norm, function in zip(norms, functions, strict=True):
        x = x + function(norm(x))
    return x


def skip_from_norm(x, norms, functions):
    for norm, function in zip(norms, functions, strict=True):
        normal = norm(x)
        x = normal + function(normal)
    return x


def norm_after_the_sum(x, norms, functions):
    for norm, function in zip(norms, functions, strict=True):
        x = norm(x + function(x))
    return x


def no_norm_at_all(x, norms, functions):
    for function in functions:
        x = x + function(x)
    return x


def no_skip(x, norms, functions):
    for norm, function in zip(norms, functions, strict=True):
        x = function(norm(x))
    return x


def written_in_place(x, norms, functions):
    for norm, function in zip(norms, functions, strict=True):
        x += function(norm(x))
    return x


def all_read_the_input(x, norms, functions):
    total = x
    for norm, function in zip(norms, functions, strict=True):
        total = total + function(norm(x))
    return total


# 04.2


def in_gemmas_order(x, weight, eps):
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normal * (1 + weight.float())).type_as(x)


def without_one(x, weight, eps):
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normal * weight.float()).type_as(x)


def one_added_early(x, weight, eps):
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normal * (1 + weight).float()).type_as(x)


def rounded_early(x, weight, eps):
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normal.type_as(x).float() * (1 + weight.float())).type_as(x)


def narrow_squares(x, weight, eps):
    normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (normal.float() * (1 + weight.float())).type_as(x)


def eps_outside_the_root(x, weight, eps):
    wide = x.float()
    normal = wide / (wide.square().mean(-1, keepdim=True).sqrt() + eps)
    return (normal * (1 + weight.float())).type_as(x)


def minus_the_mean(x, weight, eps):
    return in_gemmas_order(x - x.mean(-1, keepdim=True), weight, eps)


def sum_of_squares(x, weight, eps):
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)
    return (normal * (1 + weight.float())).type_as(x)


def never_rounded(x, weight, eps):
    return in_gemmas_order(x.float(), weight.float(), eps)


# 04.3


def _folded(linear, gain, shift):
    result = nn.Linear(linear.in_features, linear.out_features)
    with torch.no_grad():
        result.weight.copy_(gain[:, None] * linear.weight)
        result.bias.copy_(shift)
    return result


def _bias(linear):
    return 0.0 if linear.bias is None else linear.bias


def gain_and_shift(linear, norm):
    gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return _folded(linear, gain, gain * (_bias(linear) - norm.running_mean) + norm.bias)


def eps_forgotten(linear, norm):
    gain = norm.weight * torch.rsqrt(norm.running_var)
    return _folded(linear, gain, gain * (_bias(linear) - norm.running_mean) + norm.bias)


def variance_as_std(linear, norm):
    gain = norm.weight / (norm.running_var + norm.eps)
    return _folded(linear, gain, gain * (_bias(linear) - norm.running_mean) + norm.bias)


def bias_not_scaled(linear, norm):
    gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return _folded(linear, gain, _bias(linear) - gain * norm.running_mean + norm.bias)


def old_bias_lost(linear, norm):
    gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return _folded(linear, gain, norm.bias - gain * norm.running_mean)


def folded_in_place(linear, norm):
    right = gain_and_shift(linear, norm)
    with torch.no_grad():
        linear.weight.copy_(right.weight)
        linear.bias = right.bias
    return linear


def two_layers(linear, norm):
    return nn.Sequential(copy.deepcopy(linear), copy.deepcopy(norm).eval())


# 04.4


def _pieces(x, eps):
    var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    per_std = torch.rsqrt(var + eps)
    return (x - mean) * per_std, per_std


def less_two_directions(x, push, eps):
    normal, per_std = _pieces(x, eps)
    along_ones = push.mean(-1, keepdim=True)
    along_x = normal * (push * normal).mean(-1, keepdim=True)
    return per_std * (push - along_ones - along_x)


def statistics_are_constants(x, push, eps):
    _, per_std = _pieces(x, eps)
    return per_std * push


def variance_is_a_constant(x, push, eps):
    _, per_std = _pieces(x, eps)
    return per_std * (push - push.mean(-1, keepdim=True))


def mean_is_a_constant(x, push, eps):
    normal, per_std = _pieces(x, eps)
    return per_std * (push - normal * (push * normal).mean(-1, keepdim=True))


def not_divided(x, push, eps):
    normal, per_std = _pieces(x, eps)
    return less_two_directions(x, push, eps) / per_std


def projected_exactly(x, push, eps):
    normal, per_std = _pieces(x, eps)
    unit = F.normalize(normal, dim=-1)
    along_x = unit * (push * unit).sum(-1, keepdim=True)
    return per_std * (push - push.mean(-1, keepdim=True) - along_x)


# 04.5


def rows_less_their_mean(linear):
    return _centred(linear, linear.weight.mean(0), "mean")


def _centred(linear, weight_mean, bias):
    has_bias = linear.bias is not None
    result = nn.Linear(linear.in_features, linear.out_features, has_bias)
    with torch.no_grad():
        result.weight.copy_(linear.weight - weight_mean)
        if has_bias:
            shift = linear.bias.mean() if bias == "mean" else 0.0
            result.bias.copy_(linear.bias - shift)
    return result


def wrong_axis(linear):
    return _centred(linear, linear.weight.mean(1, keepdim=True), "mean")


def one_mean_for_all(linear):
    return _centred(linear, linear.weight.mean(), "mean")


def bias_forgotten(linear):
    return _centred(linear, linear.weight.mean(0), "keep")


def nothing_changed(linear):
    return copy.deepcopy(linear)


def centred_in_place(linear):
    with torch.no_grad():
        linear.weight -= linear.weight.mean(0)
        if linear.bias is not None:
            linear.bias -= linear.bias.mean()
    return linear


RIGHT = {
    "04.1": stream_of_sums,
    "04.2": in_gemmas_order,
    "04.3": gain_and_shift,
    "04.4": less_two_directions,
    "04.5": rows_less_their_mean,
}

WRONG = {
    "04.1": [
        skip_from_norm,
        norm_after_the_sum,
        no_norm_at_all,
        no_skip,
        written_in_place,
        all_read_the_input,
    ],
    "04.2": [
        without_one,
        one_added_early,
        rounded_early,
        narrow_squares,
        eps_outside_the_root,
        minus_the_mean,
        sum_of_squares,
        never_rounded,
    ],
    "04.3": [
        eps_forgotten,
        variance_as_std,
        bias_not_scaled,
        old_bias_lost,
        folded_in_place,
        two_layers,
    ],
    "04.4": [
        statistics_are_constants,
        variance_is_a_constant,
        mean_is_a_constant,
        not_divided,
        projected_exactly,
    ],
    "04.5": [
        wrong_axis,
        one_mean_for_all,
        bias_forgotten,
        nothing_changed,
        centred_in_place,
    ],
}
