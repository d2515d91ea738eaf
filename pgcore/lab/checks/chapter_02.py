"""Checks for chapter 02, Softmax that never overflows."""

from math import inf

import torch
import torch.nn.functional as F

from pgcore.lab.checks import exercise, require, require_close


def _rows(seed: int, *shape: int, scale: float = 3.0) -> torch.Tensor:
    """Random scores that are the same on every call."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator)


@exercise("02.1")
def agrees_with_torch(safe_softmax):
    """equals torch.softmax on ordinary scores"""
    for seed, shape in enumerate([(5,), (4, 7), (2, 3, 6)]):
        scores = _rows(seed, *shape)
        hint = "Normalise over the last axis."
        require_close(safe_softmax(scores), torch.softmax(scores, -1), hint)


@exercise("02.1")
def rows_are_independent(safe_softmax):
    """gives a low row its weights, whatever the other rows are"""
    scores = torch.tensor([[1.0, 2.0, 3.0], [501.0, 502.0, 503.0]])
    weights = safe_softmax(scores)
    require_close(weights, torch.softmax(scores, -1), "Each row has its own maximum.")


@exercise("02.1")
def survives_every_height(safe_softmax):
    """is finite and right wherever the row lies, from -1e38 to 1e38"""
    for seed, scale in enumerate([1e2, 1e4, 1e38]):
        scores = _rows(seed, 50, 8).clamp(-3, 3) * scale
        weights = safe_softmax(scores)
        require(weights.isfinite().all(), f"scores near {scale:g} gave NaN or infinity")
        hint = "Clipping changes the weights; subtracting does not."
        require_close(weights, torch.softmax(scores, -1), hint)


@exercise("02.2")
def logsumexp_agrees_with_torch(logsumexp):
    """equals torch.logsumexp along every axis"""
    for seed, scale in enumerate([1.0, 300.0]):
        scores = _rows(seed, 3, 4, 5, scale=scale)
        for dim in (-3, -2, -1, 0, 1, 2):
            hint = f"dim={dim}, scores of about {scale:g}."
            expected = torch.logsumexp(scores, dim)
            require_close(logsumexp(scores, dim), expected, hint)


@exercise("02.2")
def logsumexp_of_masked_rows(logsumexp):
    """gives -inf for a row of -inf, and ignores -inf in the others"""
    scores = _rows(0, 4, 6)
    scores[0] = -inf
    scores[1, 2:] = -inf
    hint = "-inf - (-inf) is NaN: subtract 0 where the maximum is -inf."
    require_close(logsumexp(scores, -1), torch.logsumexp(scores, -1), hint)


@exercise("02.2")
def logsumexp_has_finite_gradients(logsumexp):
    """has the softmax as its gradient, and 0 where all is masked"""
    hint = "A masked row makes NaN on the way back, even if the loss ignores it."
    for used in ([0, 2], [1], [0, 1, 2]):
        scores = _rows(1, 3, 5)
        scores[1] = -inf
        expected = torch.zeros(3, 5)
        for row in set(used) - {1}:
            expected[row] = torch.softmax(scores[row], -1)
        scores.requires_grad_()
        total = logsumexp(scores, -1)[used].sum()
        (actual,) = torch.autograd.grad(total, scores)
        require_close(actual, expected, hint)
    dominated = torch.tensor([[0.0, -200.0]], requires_grad=True)
    (actual,) = torch.autograd.grad(logsumexp(dominated, -1).sum(), dominated)
    hint = "Here the sum is exactly 1: torch.maximum halves the gradient of a tie."
    require_close(actual, torch.tensor([[1.0, 0.0]]), hint)


@exercise("02.3")
def smoothing_agrees_with_torch(smooth_loss):
    """equals F.cross_entropy for every epsilon, at any height"""
    for seed, epsilon in enumerate([0.0, 0.1, 0.5, 1.0]):
        logits = _rows(seed, 9, 5, scale=10.0 ** (seed + 1))
        targets = torch.arange(9) % 5
        expected = F.cross_entropy(logits, targets, label_smoothing=epsilon)
        actual = smooth_loss(logits, targets, epsilon)
        hint = f"epsilon={epsilon}: the loss is {float(actual):g}."
        require(actual.isfinite().all(), f"{hint} Start from log_softmax.")
        hint = f"epsilon={epsilon}: the right class gets its share epsilon / n, too."
        require_close(actual, expected, hint)


@exercise("02.3")
def smoothing_has_its_minimum_at_the_smoothed_target(smooth_loss):
    """has gradient zero exactly where the weights equal the smoothed target"""
    for classes, epsilon in ((3, 0.1), (10, 0.3)):
        targets = torch.arange(classes)
        smoothed = (1 - epsilon) * torch.eye(classes) + epsilon / classes
        logits = smoothed.log().requires_grad_()
        smooth_loss(logits, targets, epsilon).backward()
        require_close(logits.grad, torch.zeros(classes, classes), atol=1e-6)


def _pair(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The state of a block, computed in the obvious way."""
    maximum = scores.amax(-1)
    return maximum, (scores - maximum[..., None]).exp().sum(-1)


def _log_of(state: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return state[0] + state[1].log()


@exercise("02.4")
def merging_is_the_logsumexp_of_both(merge):
    """two blocks merge to the logsumexp of all their scores"""
    for seed, scale in enumerate([1.0, 50.0, 1e4]):
        left, right = _rows(2 * seed, 6, 5), _rows(2 * seed + 1, 6, 3)
        left, right = scale * left.double(), scale * right.double()
        merged = merge(_pair(left), _pair(right))
        both = torch.cat([left, right], -1)
        hint = f"Scores near {scale:g}. Rescale both sums to the larger m."
        require_close(_log_of(merged), both.logsumexp(-1), hint)
        require_close(merged[0], both.amax(-1), "m is the larger maximum.")


@exercise("02.4")
def merging_is_associative_and_commutative(merge):
    """grouping and order make no difference"""
    for seed in range(20):
        a, b, c = (
            _pair(_rows(3 * seed + i, 4, 2, scale=40).double()) for i in range(3)
        )
        for one, other in (
            (merge(merge(a, b), c), merge(a, merge(b, c))),
            (merge(a, b), merge(b, a)),
        ):
            require_close(one[0], other[0])
            require_close(one[1], other[1], rtol=1e-12)


@exercise("02.4")
def the_empty_state_changes_nothing(merge):
    """(-inf, 0) is neutral, also for itself"""
    state = _pair(_rows(0, 4, 3))
    empty = torch.full((4,), -inf), torch.zeros(4)
    for left, right, expected in (
        (state, empty, state),
        (empty, state, state),
        (empty, empty, empty),
    ):
        merged = merge(left, right)
        require_close(merged[0], expected[0])
        require_close(merged[1], expected[1], "-inf - (-inf) is NaN.")


@exercise("02.4")
def the_empty_state_makes_no_nan_on_the_way_back(merge):
    """has finite gradients where one state is empty, or both"""
    maxima = torch.tensor([[-inf, -inf, 1.0, 2.0], [-inf, 3.0, -inf, 2.0]])
    totals = torch.tensor([[0.0, 0.0, 1.5, 1.0], [0.0, 2.0, 0.0, 1.0]])
    leaves = [part.requires_grad_() for part in (*maxima, *totals)]
    total = merge((leaves[0], leaves[2]), (leaves[1], leaves[3]))[1]
    gradients = torch.autograd.grad(total.sum(), leaves, allow_unused=True)
    finite = all(g.isfinite().all() for g in gradients if g is not None)
    require(finite, "A gradient is NaN. Repair -inf - (-inf) before exp, not after.")


def _off_by(share: float):
    """A softmax whose first weight is too large by this share."""

    def function(scores: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(scores.double(), -1)
        weights[..., 0] *= 1 + share
        return weights

    return function


@exercise("02.5")
def an_error_put_in_is_measured(worst_error):
    """finds an error of known size in a single weight, large or small"""
    scores = _rows(3, 16, 12, scale=4.0).bfloat16()
    for share in (2.0**-8, 0.25, -0.5):
        measured = worst_error(_off_by(share), scores)
        expected = torch.tensor(abs(share) * 256, dtype=torch.float64)
        require_close(measured, expected, "Relative to each weight, in units of 2**-8.")


@exercise("02.5")
def a_softmax_rounded_once_costs_half_a_step(worst_error):
    """gives 0 to the exact softmax, at most 1 u to one that rounds once"""
    for seed in range(5):
        scores = _rows(seed, 8, 50).bfloat16()
        exact = worst_error(lambda x: torch.softmax(x.double(), -1), scores)
        require(float(exact) == 0, f"the exact softmax has error {float(exact):.3g}")
        once = worst_error(lambda x: torch.softmax(x, -1), scores)
        hint = "Compare with the softmax of scores.double(): these scores, in float64."
        require(0.5 < float(once) < 1.01, f"torch: {float(once):.3g} u. {hint}")
