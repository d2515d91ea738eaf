"""Checks of the exercises of chapter 01, contrastive loss."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pgcore.lab.checks import CheckFailed, exercise, require, require_close

SHAPES = ((5,), (3, 4), (2, 3, 4), (4, 4))


def torch_loss(logits: Tensor) -> Tensor:
    """The oracle: both questions, by torch's cross-entropy."""
    pairs = torch.arange(len(logits))
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


def torch_logits(images: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
    """The oracle for logits, composed from torch."""
    return log_scale.exp() * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T


def random_batch(
    n: int, width: int = 6, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Related pairs in float64 and the log of a scale."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randn(n, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, width, generator=generator, dtype=torch.float64)
    log_scale = 3 * torch.rand((), generator=generator, dtype=torch.float64)
    return texts + 2 * noise, texts, log_scale


@exercise("01.1")
def agrees_with_torch(normalize):
    """equals F.normalize along every axis"""
    for shape in SHAPES:
        x = torch.randn(shape)
        for dim in range(-len(shape), len(shape)):
            hint = f"The shape was {shape}, dim {dim}."
            require_close(normalize(x, dim), F.normalize(x, dim=dim), hint)


@exercise("01.1")
def zero_stays_zero(normalize):
    """a zero vector stays zero"""
    x = torch.randn(3, 4)
    x[1] = 0
    result = normalize(x, 1)
    require(not result.isnan().any(), "a zero vector became NaN: 0 / 0")
    require_close(result, F.normalize(x, dim=1))


@exercise("01.1")
def input_is_untouched(normalize):
    """your argument is left as it was"""
    x = torch.randn(3, 4)
    before = x.clone()
    normalize(x, 0)
    require_close(x, before, "Do not divide in place.")


@exercise("01.2")
def loss_agrees_with_torch(clip_loss_from_logits):
    """equals torch's two cross-entropies"""
    for n in (2, 3, 17):
        logits = 4 * torch.randn(n, n)
        require_close(clip_loss_from_logits(logits), torch_loss(logits))


@exercise("01.2")
def uniform_is_log_n(clip_loss_from_logits):
    """equal logits cost log n, one pair costs nothing"""
    for n in (1, 2, 50):
        expected = torch.tensor(math.log(n))
        require_close(clip_loss_from_logits(torch.full((n, n), 7.0)), expected)


@exercise("01.2")
def large_logits(clip_loss_from_logits):
    """logits of 100 and more do not overflow"""
    logits = 100 * torch.randn(8, 8)
    require_close(clip_loss_from_logits(logits), torch_loss(logits))


@exercise("01.2")
def order_of_pairs(clip_loss_from_logits):
    """the order of the pairs does not matter, the pairing does"""
    logits = 3 * torch.randn(9, 9) + 4 * torch.eye(9)
    order = torch.randperm(9)
    loss = clip_loss_from_logits(logits)
    require_close(clip_loss_from_logits(logits[order][:, order]), loss)
    rolled = clip_loss_from_logits(logits.roll(1, dims=0))
    require(rolled > loss + 0.1, "captions were shuffled and the loss hardly moved")


@exercise("01.3")
def ceiling_holds(keep_scale_below):
    """a scale above the ceiling comes down to it"""
    for value, largest in ((4.7, 100.0), (30.0, 100.0), (3.0, 10.0)):
        log_scale = torch.nn.Parameter(torch.tensor(value))
        keep_scale_below(log_scale, largest)
        untouched = log_scale.item() == torch.tensor(value).item()
        require(not untouched, "Nothing changed: is it in place?")
        expected = torch.tensor(math.log(largest))
        require_close(log_scale.detach(), expected, "Which one is a logarithm?")


@exercise("01.3")
def small_scales_stay(keep_scale_below):
    """smaller scales stay as they are"""
    for value in (4.6, 2.659, 0.0, -1.5):
        log_scale = torch.nn.Parameter(torch.tensor(value))
        keep_scale_below(log_scale, 100.0)
        require_close(log_scale.detach(), torch.tensor(value))


@exercise("01.3")
def still_a_trainable_leaf(keep_scale_below):
    """the parameter is still one, and can learn its way back down"""
    log_scale = torch.nn.Parameter(torch.tensor(4.7))
    keep_scale_below(log_scale, 100.0)
    require(log_scale.requires_grad, "the parameter no longer requires a gradient")
    require(log_scale.is_leaf, "the clamp was recorded by autograd")
    log_scale.exp().backward()
    require_close(log_scale.grad, torch.tensor(100.0), "Its gradient is wrong.")


@exercise("01.4")
def gradient_agrees_with_autograd(scale_gradient_by_formula):
    """equals autograd on random batches"""
    for n in (2, 5, 12):
        for seed in range(5):
            images, texts, log_scale = random_batch(n, seed=seed)
            leaf = log_scale.clone().requires_grad_()
            loss = torch_loss(torch_logits(images, texts, leaf))
            (expected,) = torch.autograd.grad(loss, leaf)
            answer = scale_gradient_by_formula(images, texts, log_scale)
            require_close(answer, expected, rtol=1e-8, atol=1e-10)


@exercise("01.4")
def sign_of_the_gradient(scale_gradient_by_formula):
    """negative where all answers are right, positive where all are wrong"""
    vectors = torch.eye(4, dtype=torch.float64)
    t = torch.tensor(1.0, dtype=torch.float64)
    require(scale_gradient_by_formula(vectors, vectors, t) < 0, "all right: raise it")
    rolled = vectors.roll(1, dims=0)
    require(scale_gradient_by_formula(vectors, rolled, t) > 0, "all wrong: lower it")


@exercise("01.4")
def no_autograd(scale_gradient_by_formula):
    """no autograd"""
    try:
        with torch.inference_mode():
            scale_gradient_by_formula(*random_batch(3))
    except RuntimeError as error:
        raise CheckFailed(
            "this check runs without autograd; use the formula"
        ) from error


@exercise("01.5")
def distinct_labels(masked_loss):
    """with distinct labels it equals clip_loss"""
    for n in (1, 2, 9):
        images, texts, log_scale = random_batch(n, seed=n)
        expected = torch_loss(torch_logits(images, texts, log_scale))
        answer = masked_loss(images, texts, log_scale, torch.randperm(n))
        require_close(answer, expected, rtol=1e-8)


@exercise("01.5")
def one_label(masked_loss):
    """with one label everywhere it is 0"""
    images, texts, log_scale = random_batch(5)
    answer = masked_loss(images, texts, log_scale, torch.zeros(5, dtype=torch.long))
    require_close(answer, torch.zeros_like(answer))


@exercise("01.5")
def duplicates_leave_the_question(masked_loss):
    """equals cross-entropies over what is left of each row and column"""
    for seed in range(5):
        images, texts, log_scale = random_batch(8, seed=seed)
        labels = torch.randint(4, (8,), generator=torch.Generator().manual_seed(seed))
        logits = torch_logits(images, texts, log_scale)
        total = torch.zeros((), dtype=logits.dtype)
        for question in (logits, logits.T):
            for i, row in enumerate(question):
                keep = (labels != labels[i]) | (torch.arange(8) == i)
                target = keep[:i].sum()
                total = total + F.cross_entropy(row[keep], target)
        answer = masked_loss(images, texts, log_scale, labels)
        require_close(answer, total / 16, rtol=1e-8)


@exercise("01.5")
def gradients_are_finite(masked_loss):
    """its gradients are finite"""
    images, texts, log_scale = random_batch(4)
    images.requires_grad_()
    labels = torch.tensor([0, 0, 1, 2])
    masked_loss(images, texts, log_scale, labels).backward()
    gradient = images.grad
    if gradient is None:
        raise CheckFailed("no gradient reaches the pictures")
    require(gradient.isfinite().all(), "a gradient is NaN or infinite")
