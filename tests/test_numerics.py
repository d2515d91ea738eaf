"""Chapter 02: softmax and its relatives against torch, scipy and decimals."""

from functools import reduce
from math import inf, nan

import pytest
import scipy.special
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from pgcore.lab.museum import numerics as museum
from pgcore.numerics import (
    SoftmaxState,
    cross_entropy,
    log_softmax,
    logsigmoid,
    logsumexp,
    merge_softmax_states,
    softmax,
    softmax_state,
)
from tests.reference.numerics import online_softmax_loop, softmax_decimal

ALONG_A_ROW = [
    pytest.param(softmax, torch.softmax, id="softmax"),
    pytest.param(log_softmax, torch.log_softmax, id="log_softmax"),
    pytest.param(logsumexp, torch.logsumexp, id="logsumexp"),
]
HEIGHTS = [0.0, 1e2, -1e2, 1e4, -1e4]
HALF = [torch.float16, torch.bfloat16]
# Here the sum of the exponentials is exactly 1, where its guard has a tie.
DOMINATED = [[0.0, -200.0], [7.0], [3.0, -inf], [0.0, -17.5]]
FULLY_MASKED = torch.tensor([[1.0, 2.0, -inf], [-inf, -inf, -inf]])


def close(actual, expected, rtol=1e-6, atol=1e-6, **options):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, **options)


def gradient(function, x, weights=None):
    """d(sum of weights * function(x)) / dx."""
    x = x.detach().clone().requires_grad_()
    result = function(x)
    weights = torch.ones_like(result) if weights is None else weights
    return torch.autograd.grad((weights * result).sum(), x)[0]


def assert_same_jacobian(ours, oracle, row):
    jacobian = torch.autograd.functional.jacobian
    actual, expected = (
        jacobian(lambda x, f=f: f(x, -1), torch.tensor(row)) for f in (ours, oracle)
    )
    close(actual, expected)


# The parity tests are functions, so that each wrong twin can be fed to the one that
# guards against it.


def assert_softmax_parity(fn):
    for height in HEIGHTS:
        scores = 5 * torch.randn(6, 9) + height
        scores[1, 3:] = -inf
        close(fn(scores), torch.softmax(scores, -1))
    uneven = torch.tensor([[300.0, 0.0, 0.0], [-300.0, -301.0, -302.0]])
    close(fn(uneven), torch.softmax(uneven, -1))
    high = 4 * torch.rand(500, 8) + 10_000
    close(fn(high).double(), torch.softmax(high.double(), -1), atol=0)
    close(fn(FULLY_MASKED)[1], torch.zeros(3))
    assert gradient(lambda x: fn(x)[:1], FULLY_MASKED).isfinite().all()
    for row in DOMINATED:
        assert_same_jacobian(fn, torch.softmax, row)


def assert_log_softmax_parity(fn):
    for height in HEIGHTS:
        scores = 100 * torch.randn(6, 9) + height
        close(fn(scores), torch.log_softmax(scores, -1))
    close(fn(FULLY_MASKED)[1], torch.full((3,), -inf))


def assert_logsigmoid_parity(fn):
    x = torch.cat([torch.linspace(-500, 500, 1001), torch.tensor([inf, -inf, 0.0])])
    close(fn(x), F.logsigmoid(x))
    close(fn(torch.arange(1.0, 80.0)), F.logsigmoid(torch.arange(1.0, 80.0)), atol=0)
    assert torch.equal(gradient(fn, torch.zeros(3)), torch.full((3,), 0.5))
    hessian = torch.autograd.functional.hessian(fn, torch.tensor(0.0))
    assert hessian == -0.25


def assert_cross_entropy_parity(fn):
    for height in HEIGHTS:
        logits = 20 * torch.randn(11, 7) + height
        targets = torch.randint(7, (11,))
        targets[::3] = -100
        for smoothing in (0.0, 0.1, 1.0):
            close(
                fn(logits, targets, label_smoothing=smoothing),
                F.cross_entropy(logits, targets, label_smoothing=smoothing),
            )


def state_of(scores):
    """A state whose output is the softmax itself: the values are unit vectors."""
    return [softmax_state(s, v) for s, v in blocks_of(scores)]


def blocks_of(scores, size=4):
    values = torch.eye(scores.shape[-1], dtype=scores.dtype)
    return list(zip(scores.split(size, -1), values.split(size, 0), strict=True))


def assert_merge_parity(fn):
    for height in HEIGHTS:
        scores = 30 * torch.randn(5, 16) + height
        merged = reduce(fn, state_of(scores))
        close(merged.output, torch.softmax(scores, -1))
        close(merged.maximum + merged.total.log(), torch.logsumexp(scores, -1))


GUARDS = [
    (assert_softmax_parity, softmax, "softmax_"),
    (assert_log_softmax_parity, log_softmax, "log_softmax_"),
    (assert_logsigmoid_parity, logsigmoid, "logsigmoid_"),
    (assert_cross_entropy_parity, cross_entropy, "cross_entropy_"),
    (assert_merge_parity, merge_softmax_states, "merge_"),
]
TWINS = [
    (guard, name)
    for guard, _, prefix in GUARDS
    for name in vars(museum)
    if name.startswith(prefix) and vars(museum)[name].__module__ == museum.__name__
]


@pytest.mark.parametrize(("guard", "fn", "prefix"), GUARDS)
def test_parity_with_torch(guard, fn, prefix):
    guard(fn)


@pytest.mark.parametrize(("guard", "name"), TWINS)
def test_each_wrong_twin_fails_the_parity_test(guard, name):
    with pytest.raises(AssertionError):
        guard(getattr(museum, name))


def test_no_wrong_twin_is_without_a_guard():
    own = {n for n, v in vars(museum).items() if callable(v)}
    own = {n for n in own if getattr(museum, n).__module__ == museum.__name__}
    assert own == {name for _, name in TWINS}
    assert len(own) >= 12


def test_the_textbook_softmax_of_torch_fails_our_parity_on_masked_rows():
    with pytest.raises(AssertionError):
        assert_softmax_parity(lambda x: torch.softmax(x, -1))


# Values


@pytest.mark.parametrize("dim", [-3, -2, -1, 0, 1, 2])
@pytest.mark.parametrize(("ours", "oracle"), ALONG_A_ROW)
def test_every_axis(ours, oracle, dim):
    scores = 50 * torch.randn(3, 4, 5)
    close(ours(scores, dim), oracle(scores, dim))


@pytest.mark.parametrize("special", [inf, nan])
@pytest.mark.parametrize(("ours", "oracle"), ALONG_A_ROW)
def test_infinity_and_nan_come_out_as_in_torch(ours, oracle, special):
    scores = torch.tensor([[special, 0.0], [special, -inf], [special, special]])
    close(ours(scores), oracle(scores, -1), equal_nan=True)


def test_parity_with_scipy():
    scores = 200 * torch.randn(20, 13)
    scores[torch.rand(20, 13) < 0.3] = -inf
    scores[:, 0] = 1.0
    numbers = scores.numpy()
    close(softmax(scores), torch.from_numpy(scipy.special.softmax(numbers, -1)))
    close(log_softmax(scores), torch.from_numpy(scipy.special.log_softmax(numbers, -1)))
    close(logsumexp(scores), torch.from_numpy(scipy.special.logsumexp(numbers, -1)))
    close(logsigmoid(scores), torch.from_numpy(scipy.special.log_expit(numbers)))


@pytest.mark.parametrize("height", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_parity_with_fifty_digits(height):
    scores = (3 * torch.randn(30) + height).double()
    expected = torch.tensor(softmax_decimal(scores.tolist()), dtype=torch.float64)
    close(softmax(scores), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_rounded_once(dtype):
    scores = (8 * torch.randn(64, 100)).to(dtype)
    wide = scores.float()
    for ours, oracle in ((softmax, torch.softmax), (log_softmax, torch.log_softmax)):
        assert ours(scores).dtype == dtype
        assert torch.equal(ours(scores), ours(wide).to(dtype))
        exact = oracle(scores.double(), -1)
        close(ours(scores).double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-7)
    loss = cross_entropy(scores, torch.arange(64))
    assert loss.dtype == torch.float32
    close(loss, F.cross_entropy(wide, torch.arange(64)))


def test_the_sum_of_a_long_half_precision_row_does_not_overflow():
    weights = softmax(torch.zeros(70_000, dtype=torch.float16))
    assert (weights == torch.tensor(1 / 70_000, dtype=torch.float16)).all()


def test_float64_stays_float64():
    scores = torch.randn(3, 4, dtype=torch.float64)
    for fn in (softmax, log_softmax, logsumexp, logsigmoid):
        assert fn(scores).dtype == torch.float64


# Properties

rows_of_any_height = hypothesis_numpy.arrays(
    dtype="float32",
    shape=st.tuples(st.integers(1, 4), st.integers(1, 12)),
    elements=st.one_of(
        st.floats(-100, 100, width=32),
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        st.sampled_from([2.0**126, -(2.0**126), 0.0]),
    ),
)


@given(rows_of_any_height)
def test_every_finite_row_is_a_distribution(rows):
    scores = torch.from_numpy(rows)
    weights = softmax(scores)
    assert (weights >= 0).all()
    close(weights.sum(-1), torch.ones(len(rows)))
    assert (weights.argmax(-1) == weights.max(-1).indices).all()
    top = scores.argmax(-1, keepdim=True)
    assert (weights.gather(-1, top) == weights.amax(-1, keepdim=True)).all()
    between = logsumexp(scores) - scores.amax(-1)
    assert (between >= 0).all()
    assert (logsumexp(scores).isfinite()).all()


def test_ten_thousand_wild_rows():
    magnitude = 10 ** torch.empty(10_000, 1).uniform_(0, 38.5)
    scores = magnitude * torch.empty(10_000, 16).uniform_(-1, 1)
    scores[0, :2] = torch.tensor([1e38, -1e38])
    scores[1, :2] = torch.tensor([3e38, -3e38])
    weights = softmax(scores)
    assert weights.isfinite().all()
    close(weights.sum(-1), torch.ones(10_000))
    close(weights, torch.softmax(scores.double(), -1).float())


@given(
    st.lists(st.integers(-128, 128), min_size=1, max_size=9),
    st.integers(-(2**15), 2**15),
)
def test_an_exact_shift_changes_no_bit(sixteenths, shift):
    scores = torch.tensor(sixteenths) / 16.0
    assert torch.equal(softmax(scores), softmax(scores + shift))
    assert torch.equal(log_softmax(scores), log_softmax(scores + shift))


@given(st.permutations(range(7)))
def test_permuting_a_row_permutes_its_weights(order):
    scores = torch.tensor([0.5, -3.0, 2.0, 80.0, -inf, 79.0, 0.0])
    close(softmax(scores[list(order)]), softmax(scores)[list(order)])


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=12))
def test_the_loop_agrees_with_torch(scores):
    values = [float(i % 5) for i in range(len(scores))]
    m, total, output, _ = online_softmax_loop(scores, values)[-1]
    row = torch.tensor(scores, dtype=torch.float64)
    assert m == row.max()
    close(m + total_log(total), row.logsumexp(-1).item(), rtol=1e-12)
    expected = torch.softmax(row, -1) @ torch.tensor(values, dtype=torch.float64)
    close(output / total, expected.item(), rtol=1e-9, atol=1e-12)


def total_log(total):
    return torch.tensor(total, dtype=torch.float64).log().item()


# Gradients


@pytest.mark.parametrize(("ours", "oracle"), ALONG_A_ROW)
def test_gradients_equal_those_of_torch(ours, oracle):
    scores = torch.randn(4, 6, dtype=torch.float64)
    scores[1, 2:] = -inf
    weights = torch.randn_like(oracle(scores, -1))
    weights = weights.masked_fill(oracle(scores, -1) == -inf, 0)
    # A masked score has a gradient in log_softmax; elsewhere it has none.
    expected = gradient(lambda x: oracle(x, -1).clamp(min=-1e300), scores, weights)
    actual = gradient(lambda x: ours(x).clamp(min=-1e300), scores, weights)
    close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("fn", [softmax, log_softmax, logsumexp, logsigmoid])
def test_gradcheck(fn):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fn, x)
    assert torch.autograd.gradgradcheck(fn, x)


@pytest.mark.parametrize("row", DOMINATED, ids=str)
@pytest.mark.parametrize(("ours", "oracle"), ALONG_A_ROW)
def test_gradients_where_one_score_dominates(ours, oracle, row):
    assert_same_jacobian(ours, oracle, row)


@pytest.mark.parametrize("row", DOMINATED, ids=str)
def test_gradients_of_a_state_where_one_score_dominates(row):
    values = torch.eye(len(row))

    def output(scores, dim):
        state = softmax_state(scores[None], values)
        empty = softmax_state(torch.full_like(scores, -inf)[None], values)
        return merge_softmax_states(state, empty).output[0]

    assert_same_jacobian(output, torch.softmax, row)


@pytest.mark.parametrize("fn", [softmax, logsumexp])
def test_a_fully_masked_row_has_gradient_zero(fn):
    assert (gradient(fn, FULLY_MASKED)[1] == 0).all()
    assert gradient(fn, FULLY_MASKED).isfinite().all()
    assert gradient(log_softmax, FULLY_MASKED).isfinite().all()


def test_values_of_a_fully_masked_row():
    assert softmax(FULLY_MASKED)[1].tolist() == [0, 0, 0]
    assert log_softmax(FULLY_MASKED)[1].tolist() == [-inf] * 3
    assert logsumexp(FULLY_MASKED)[1] == -inf


def test_gradient_of_the_loss_is_weights_minus_answers():
    logits = 5 * torch.randn(8, 5, dtype=torch.float64)
    targets = torch.randint(5, (8,))
    targets[3] = -100
    grad = gradient(lambda x: cross_entropy(x, targets), logits)
    answers = F.one_hot(targets.clamp(min=0), 5)
    expected = (torch.softmax(logits, -1) - answers) / 7
    expected[3] = 0
    close(grad, expected, rtol=1e-12, atol=1e-14)


def test_logsigmoid_slope_everywhere():
    x = torch.tensor([-inf, -200.0, -1.0, -0.0, 0.0, 1.0, 200.0, inf])
    close(gradient(logsigmoid, x), torch.sigmoid(-x), atol=1e-30)
    assert gradient(logsigmoid, torch.tensor([nan])).isnan().all()


def test_logsigmoid_second_derivative_everywhere():
    x = torch.tensor([-inf, -200.0, -1.0, -0.0, 0.0, 1.0, 200.0, inf])
    for dtype in (torch.float32, torch.float64):
        hessian = torch.autograd.functional.hessian(
            lambda x: logsigmoid(x).sum(), x.to(dtype)
        )
        sigmoid = torch.sigmoid(x.to(dtype))
        close(hessian.diagonal(), -sigmoid * (1 - sigmoid))


# Cross-entropy


def test_cross_entropy_of_any_leading_shape():
    logits, targets = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    flat = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    close(cross_entropy(logits, targets), flat)
    close(
        cross_entropy(logits[0, 0], targets[0, 0]),
        F.cross_entropy(logits[0, :1], targets[0, :1]),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_nothing_to_count_gives_zero_and_no_gradient(smoothing):
    logits = torch.randn(3, 4)
    logits[0] = -inf
    for x, targets in (
        (logits, torch.full((3,), -100)),
        (logits[:0], torch.zeros(0, dtype=torch.long)),
    ):
        fn = lambda x, t=targets: cross_entropy(x, t, label_smoothing=smoothing)  # noqa: E731
        assert fn(x) == 0
        assert torch.equal(gradient(fn, x), torch.zeros_like(x))


def test_ignored_rows_change_nothing():
    logits, targets = torch.randn(6, 4), torch.tensor([0, 9, 2, 9, 1, 3])
    kept = [0, 2, 4, 5]
    loss = cross_entropy(logits, targets, ignore_index=9, label_smoothing=0.1)
    close(loss, cross_entropy(logits[kept], targets[kept], label_smoothing=0.1))


def test_masked_classes():
    logits = torch.tensor([[0.0, -inf, 1.0]])
    for target, smoothing in ((0, 0.0), (1, 0.0), (0, 0.1), (1, 0.1)):
        loss = cross_entropy(logits, torch.tensor([target]), -100, smoothing)
        oracle = F.cross_entropy(
            logits, torch.tensor([target]), label_smoothing=smoothing
        )
        close(loss, oracle)


@pytest.mark.parametrize("target", [-1, 3])
def test_a_target_out_of_range_fails_inside_torch(target):
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        cross_entropy(torch.zeros(2, 3), torch.tensor([0, target]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int64])
def test_targets_of_any_integer_type(dtype):
    logits, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, -100])
    expected = F.cross_entropy(logits, targets)
    close(cross_entropy(logits, targets.to(dtype)), expected)


# Online softmax

finite_blocks = st.lists(
    st.lists(st.floats(-200, 200), min_size=2, max_size=2), min_size=3, max_size=3
)


def one_state(scores):
    scores = torch.tensor([scores], dtype=torch.float64)
    values = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    return softmax_state(scores, values)


def same_state(left, right):
    for a, b in zip(left, right, strict=True):
        close(a, b, rtol=1e-12, atol=1e-12)


@given(finite_blocks)
def test_merge_is_associative_and_commutative(blocks):
    a, b, c = map(one_state, blocks)
    merge = merge_softmax_states
    same_state(merge(merge(a, b), c), merge(a, merge(b, c)))
    same_state(merge(a, b), merge(b, a))


@given(finite_blocks)
def test_a_masked_block_is_neutral(blocks):
    empty = one_state([-inf, -inf])
    assert empty.maximum == -inf and empty.total == 0
    assert (empty.weighted == 0).all() and (empty.output == 0).all()
    for block in blocks:
        state = one_state(block)
        same_state(merge_softmax_states(state, empty), state)
        same_state(merge_softmax_states(empty, state), state)
    same_state(merge_softmax_states(empty, empty), empty)


@pytest.mark.parametrize("size", [1, 3, 16, 64])
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
def test_attention_in_blocks_equals_attention(shape, size):
    *batch, queries = shape
    scores = 20 * torch.randn(*batch, queries, 64)
    scores[..., torch.rand(64) < 0.5] = -inf
    scores[..., 0, :] = -inf  # this query may see nothing
    values = torch.randn(*batch, 64, 7)
    parts = [
        softmax_state(s, v)
        for s, v in zip(scores.split(size, -1), values.split(size, -2), strict=True)
    ]
    output = reduce(merge_softmax_states, parts).output
    close(output, softmax(scores) @ values, rtol=1e-5, atol=1e-5)
    assert (output[..., 0, :] == 0).all()


def test_gradients_flow_through_the_merge():
    scores = 5 * torch.randn(3, 8, dtype=torch.float64)
    scores[1] = -inf
    values = torch.randn(8, 4, dtype=torch.float64)

    def in_blocks(scores):
        left = softmax_state(scores[:, :3], values[:3])
        return merge_softmax_states(
            left, softmax_state(scores[:, 3:], values[3:])
        ).output

    weights = torch.randn(3, 4, dtype=torch.float64)
    expected = gradient(lambda x: softmax(x) @ values, scores, weights)
    close(gradient(in_blocks, scores, weights), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", HALF)
def test_the_state_of_half_precision_scores_is_wide(dtype):
    state = softmax_state(
        torch.zeros(1, 3000, dtype=dtype), torch.ones(3000, 1).to(dtype)
    )
    assert {part.dtype for part in state} == {torch.float32}
    assert state.total == 3000


# Errors, shapes, devices


@pytest.mark.parametrize("fn", [softmax, log_softmax, logsumexp])
def test_scores_that_make_no_sense(fn, as_user):
    with pytest.raises(ValueError, match=r"scores: expected floats, found torch.int64"):
        fn(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"at least one along axis -1.*\(3, 0\)"):
        fn(torch.zeros(3, 0))
    with pytest.raises(ValueError, match="axis 2"):
        fn(torch.zeros(3, 4), 2)
    with pytest.raises(ValueError, match="axis -1"):
        fn(torch.tensor(1.0))


def test_user_errors(as_user):
    logits = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"targets: .*\(3,\), found \(2,\)"):
        cross_entropy(logits, torch.zeros(2, dtype=torch.long))
    with pytest.raises(
        ValueError, match="targets: expected integers, found torch.bool"
    ):
        cross_entropy(logits, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="logits: expected floats"):
        cross_entropy(logits.long(), torch.zeros(3, dtype=torch.long))
    for bad in (1.5, -0.5):
        with pytest.raises(ValueError, match=f"label_smoothing: .* found {bad}"):
            cross_entropy(logits, torch.zeros(3, dtype=torch.long), label_smoothing=bad)
    with pytest.raises(ValueError, match="x: expected floats"):
        logsigmoid(torch.tensor([1]))
    with pytest.raises(ValueError, match=r"values: expected shape \(4,\) and a width"):
        softmax_state(logits, torch.zeros(5, 2))
    left = softmax_state(logits, torch.zeros(4, 2))
    right = softmax_state(logits, torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"right: expected shape \(3, 2\)"):
        merge_softmax_states(left, right)


def test_a_single_score_and_an_empty_batch():
    assert softmax(torch.tensor([7.0])) == 1
    assert log_softmax(torch.tensor([7.0])) == 0
    assert logsumexp(torch.tensor([7.0])) == 7
    for fn in (softmax, log_softmax):
        assert fn(torch.zeros(0, 3)).shape == (0, 3)
    assert logsumexp(torch.zeros(0, 3)).shape == (0,)
    assert logsigmoid(torch.zeros(0)).shape == (0,)


def test_meta_device():
    scores = torch.zeros(2, 3, 5, device="meta")
    targets = torch.zeros(2, 3, dtype=torch.long, device="meta")
    assert softmax(scores).shape == log_softmax(scores, 0).shape == scores.shape
    assert logsumexp(scores, 1).shape == (2, 5)
    assert logsigmoid(scores).device.type == "meta"
    assert cross_entropy(scores, targets, label_smoothing=0.1).shape == ()
    state = softmax_state(scores, torch.zeros(2, 5, 7, device="meta"))
    assert isinstance(merge_softmax_states(state, state), SoftmaxState)
    assert merge_softmax_states(state, state).output.shape == (2, 3, 7)
