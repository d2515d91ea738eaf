"""Chapter 04: the norms against torch, Hugging Face, and their own wrong twins."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pgcore.lab.museum import normalization as museum
from pgcore.normalization import BatchNorm1d, LayerNorm, RMSNorm
from tests.reference.normalization import (
    layer_norm_by_formula,
    pre_norm,
    rms_norm_by_formula,
)

NORMS = [BatchNorm1d, LayerNorm, RMSNorm]
HALVES = [torch.bfloat16, torch.float16]

every_norm = pytest.mark.parametrize("norm", NORMS, ids=lambda n: n.__name__)


def randomised(layer, seed=0):
    """Every weight drawn, the biases and the memory too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            tensor.normal_(0.0, 0.5, generator=generator)
            if name == "running_var":
                tensor.abs_().add_(0.1)
    return layer


def draw(*shape, seed=0, dtype=torch.float32, scale=1.0, offset=0.5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (scale * x + offset * scale).to(dtype)


def assert_close(ours, theirs, tolerance=5e-6):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    size = max(theirs.detach().abs().max().item(), 1e-3)
    assert (ours - theirs).abs().max().item() <= tolerance * size


# parity


def assert_batch_norm(norm):
    """Five updates with gradients, then evaluation, as torch does them."""
    for eps, momentum in ((1e-5, 0.1), (0.01, 0.4)):
        ours = randomised(norm(6, eps=eps, momentum=momentum))
        theirs = nn.BatchNorm1d(6, eps=eps, momentum=momentum)
        theirs.load_state_dict(ours.state_dict(), strict=False)
        for seed, n in enumerate((2, 3, 8, 64, 200)):
            x = draw(n, 6, seed=seed, scale=3.0)
            x[:, 5] = 0.25  # a feature that never changes
            push = draw(n, 6, seed=seed + 50)
            results = []
            for layer in (ours, theirs):
                leaf = x.clone().requires_grad_()
                results.append((leaf, layer(leaf)))
            assert_close(*(y for _, y in results), 3e-5)
            slopes = [
                torch.autograd.grad(y, [leaf, layer.weight, layer.bias], push)
                for layer, (leaf, y) in zip((ours, theirs), results, strict=True)
            ]
            for mine, yours in zip(*slopes, strict=True):
                assert_close(mine, yours, 3e-5)
            assert_close(ours.running_mean, theirs.running_mean)
            assert_close(ours.running_var, theirs.running_var)
        for x in (draw(5, 6), draw(1, 6), 1e-3 * draw(9, 6)):
            assert_close(ours.eval()(x), theirs.eval()(x))


def assert_layer_norm(norm):
    """Vectors of any size, in sequences, and one that is constant."""
    for scale in (1e-4, 1e-3, 1.0, 1e3):
        ours = randomised(norm(24))
        theirs = nn.LayerNorm(24, eps=1e-6)
        theirs.load_state_dict(ours.state_dict())
        for shape in ((5, 24), (2, 3, 24), (2, 3, 4, 24), (24,)):
            x = draw(*shape, scale=scale)
            x.view(-1, 24)[0] = 0.3
            assert_close(ours(x), theirs(x))
            assert_close(ours(x), layer_norm_by_formula(x, *ours.parameters(), 1e-6))


def gemma(width, eps=1e-6):
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    return GemmaRMSNorm(width, eps)


def assert_rms_norm(norm):
    """Hugging Face's GemmaRMSNorm, to the last bit."""
    for dtype in (torch.float32, *HALVES):
        for width, eps in ((1, 1e-6), (72, 1e-6), (2048, 1e-6), (16, 1e-3)):
            ours = randomised(norm(width, eps=eps)).to(dtype)
            theirs = gemma(width, eps).to(dtype)
            theirs.load_state_dict(ours.state_dict())
            for scale in (1e-3, 1.0, 100.0):
                x = draw(2, 3, width, dtype=dtype, scale=scale)
                assert torch.equal(ours(x), theirs(x))
                formula = rms_norm_by_formula(x, ours.weight, eps)
                assert torch.equal(ours(x), formula)


GUARDS = {BatchNorm1d: assert_batch_norm, LayerNorm: assert_layer_norm}
GUARDS[RMSNorm] = assert_rms_norm

TWINS = [
    (guard, twin)
    for twin in vars(museum).values()
    if isinstance(twin, type)
    for norm, guard in GUARDS.items()
    if issubclass(twin, norm) and twin is not norm
]


@every_norm
def test_equals_its_oracle(norm):
    GUARDS[norm](norm)


def test_the_museum_has_all_its_twins():
    assert len(TWINS) == 8


@pytest.mark.parametrize(
    ("guard", "twin"), TWINS, ids=lambda v: getattr(v, "__name__", None)
)
def test_wrong_twins_fail_the_parity_test(guard, twin):
    with pytest.raises(AssertionError):
        guard(twin)


def test_layer_norm_and_rms_norm_equal_torchs_functions():
    x = draw(4, 5, 12)
    layer = randomised(LayerNorm(12, eps=0.1))
    assert torch.equal(layer(x), F.layer_norm(x, (12,), layer.weight, layer.bias, 0.1))
    layer = randomised(RMSNorm(12, eps=0.1))
    assert torch.equal(layer(x), F.rms_norm(x, (12,), 1 + layer.weight, 0.1))


def test_gradients_of_rms_norm_equal_those_of_the_formula():
    layer = randomised(RMSNorm(16))
    x, push = draw(3, 7, 16).requires_grad_(), draw(3, 7, 16, seed=1)
    inputs = [x, layer.weight]
    ours = torch.autograd.grad(layer(x), inputs, push)
    formula = rms_norm_by_formula(x, layer.weight, layer.eps)
    theirs = torch.autograd.grad(formula, inputs, push)
    for mine, yours in zip(ours, theirs, strict=True):
        assert_close(mine, yours, 1e-5)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("norm", [BatchNorm1d, LayerNorm])
def test_gradcheck(norm, mode):
    layer = randomised(norm(4, eps=0.01)).double().train(mode)
    x = draw(5, 4, dtype=torch.float64).requires_grad_()
    inputs = (x, *layer.parameters())
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, given, (x,))

    assert torch.autograd.gradcheck(call, inputs)


def test_gradcheck_of_the_formula_of_rms_norm():
    def in_float64(x, weight):  # the layer itself computes in float32, as Gemma does
        normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return normal * (1 + weight)

    x, weight = draw(4, 6, dtype=torch.float64), draw(6, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        in_float64, (x.requires_grad_(), weight.requires_grad_())
    )
    assert_close(
        rms_norm_by_formula(x.float(), weight.float(), 1e-6),
        in_float64(x, weight).float(),
    )


# the skip


def assert_reads_a_copy(step):
    """Hugging Face's SigLIP encoder layer is two of these steps."""
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

    config = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=3,
        attn_implementation="eager",
    )
    layer = SiglipEncoderLayer(config).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.normal_(std=fan_in**-0.5)
        x = draw(2, 7, 24, scale=2.0)
        theirs = layer(x, attention_mask=None)

        def attend(tokens):
            return layer.self_attn(tokens)[0]

        ours = step(x, layer.layer_norm1, attend)
        ours = step(ours, layer.layer_norm2, layer.mlp)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    assert_close(ours, theirs)


def test_pre_norm_is_the_skip_of_siglip():
    assert_reads_a_copy(pre_norm)


def test_the_skip_of_the_notes_is_not():
    with pytest.raises(AssertionError):
        assert_reads_a_copy(museum.skip_from_norm_output)


@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_a_block_that_finds_nothing_is_the_identity(seed, scale):
    x = draw(3, 8, seed=seed, scale=scale)
    assert torch.equal(pre_norm(x, LayerNorm(8), torch.zeros_like), x)
    y = museum.skip_from_norm_output(x, LayerNorm(8), torch.zeros_like)
    assert torch.equal(y, LayerNorm(8)(x))


def test_the_skip_of_the_notes_is_an_option_of_bloom_that_is_off():
    from transformers import BloomConfig

    assert BloomConfig().apply_residual_connection_post_layernorm is False


# properties

seeds = st.integers(0, 10_000)


@given(seeds, st.floats(0.1, 100))
def test_layer_norm_and_rms_norm_ignore_the_scale(seed, factor):
    x = draw(6, 32, seed=seed)
    for layer in (randomised(LayerNorm(32)), randomised(RMSNorm(32))):
        assert_close(layer(factor * x), layer(x), 2e-3)


@given(seeds, st.floats(-20, 20))
def test_layer_norm_ignores_an_offset_and_rms_norm_does_not(seed, offset):
    x = draw(6, 32, seed=seed, offset=0.0)
    layer = randomised(LayerNorm(32))
    assert_close(layer(x + offset), layer(x), 1e-4)
    if abs(offset) > 1:
        moved = RMSNorm(32)(x + offset) - RMSNorm(32)(x)
        assert moved.abs().max() > 0.1


@given(seeds, st.integers(1, 40))
def test_layer_norm_is_rms_norm_of_what_is_centred(seed, width):
    x = draw(5, width, seed=seed)
    centred = x - x.mean(-1, keepdim=True)
    assert_close(LayerNorm(width)(x), RMSNorm(width)(centred), 2e-5)


@given(seeds, st.integers(2, 64))
def test_vectors_land_on_a_sphere(seed, width):
    x = draw(7, width, seed=seed, scale=3.0)
    y = RMSNorm(width, eps=1e-12)(x)
    assert_close(y.norm(dim=-1), torch.full((7,), math.sqrt(width)), 1e-5)
    assert F.cosine_similarity(x, y).min() > 1 - 1e-5
    y = LayerNorm(width, eps=1e-12).double()(x.double())
    radius = torch.full((7,), math.sqrt(width), dtype=torch.float64)
    assert_close(y.norm(dim=-1), radius, 1e-4)
    assert y.sum(-1).abs().max() < 1e-6


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
@given(seed=seeds)
def test_no_vector_sees_another(norm, seed):
    layer = randomised(norm(8))
    x = draw(2, 5, 8, seed=seed)
    y = layer(x)
    for b, t in ((0, 0), (1, 3)):
        assert torch.equal(layer(x[b, t]), y[b, t])
    order = torch.randperm(5)
    assert torch.equal(layer(x[:, order]), y[:, order])


@given(seeds)
def test_no_vector_sees_another_in_evaluation(seed):
    layer = randomised(BatchNorm1d(8)).eval()
    x = draw(6, 8, seed=seed)
    assert_close(layer(x[2:3]), layer(x)[2:3], 1e-6)


@given(seeds, st.integers(3, 40), st.floats(0.5, 20))
def test_a_batch_is_standardised_whatever_its_units(seed, n, factor):
    layer = BatchNorm1d(4, eps=1e-12).double()
    x = draw(n, 4, seed=seed, scale=factor, dtype=torch.float64)
    y = layer(x)
    assert y.mean(0).abs().max() < 1e-9
    assert_close(y.var(0, correction=0), torch.ones(4, dtype=torch.float64), 1e-6)
    assert_close(layer(-3 * x + 1), -y, 1e-6)


@given(seeds)
def test_the_order_of_a_batch_does_not_matter(seed):
    x, order = draw(9, 3, seed=seed), torch.randperm(9)
    assert_close(BatchNorm1d(3)(x)[order], BatchNorm1d(3)(x[order]), 1e-5)


def test_a_batchmate_moves_an_output_in_training_only():
    layer, x = BatchNorm1d(3), draw(4, 3)
    other = torch.cat([x[:3], x[3:] + 5])
    assert (layer(other)[0] - layer(x)[0]).abs().min() > 0.1
    layer.eval()
    assert torch.equal(layer(other)[0], layer(x)[0])


def test_a_batch_of_two_keeps_one_bit_of_each_feature():
    for gap in (0.1, 10.0, 1e4):
        y = BatchNorm1d(1, eps=1e-12)(torch.tensor([[3.0], [3.0 + gap]]))
        assert_close(y, torch.tensor([[-1.0], [1.0]]), 1e-4)


def test_batch_norm_does_not_change_the_shape_of_a_distribution():
    from scipy import stats

    x = torch.empty(5000, 1).exponential_()
    y = BatchNorm1d(1)(x).detach()
    for moment in (stats.skew, stats.kurtosis):
        before, after = (moment(v.double().squeeze()) for v in (x, y))
        assert math.isclose(before, after, rel_tol=1e-3)
    assert stats.kstest(y.squeeze().numpy(), "norm").pvalue < 1e-6


def test_all_leading_axes_are_batch():
    x = draw(4, 5, 3)
    ours = BatchNorm1d(3)
    theirs = nn.BatchNorm1d(3)
    assert_close(ours(x), theirs(x.transpose(1, 2)).transpose(1, 2))
    assert_close(ours.running_var, theirs.running_var)
    assert torch.equal(BatchNorm1d(3)(x), BatchNorm1d(3)(x.view(20, 3)).view(4, 5, 3))


def test_the_memory_gets_its_share_of_each_batch():
    layer = BatchNorm1d(2, momentum=0.25)
    for _ in range(6):
        layer(torch.tensor([[3.0, 5.0], [5.0, 5.0]]))
    share = 1 - 0.75**6
    assert_close(layer.running_mean, torch.tensor([4 * share, 5 * share]), 1e-6)
    variances = torch.tensor([2.0 * share + 0.75**6, 0.75**6])  # 2 = (1 + 1) / (2 - 1)
    assert_close(layer.running_var, variances, 1e-6)
    frozen = layer.running_mean.clone()
    layer.eval()(draw(9, 2))
    assert torch.equal(layer.running_mean, frozen)


def test_the_memory_keeps_no_graph():
    layer = BatchNorm1d(3)
    layer(draw(4, 3).requires_grad_())
    assert not layer.running_mean.requires_grad
    assert not layer.running_var.requires_grad


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_a_memory_may_be_none_or_all(momentum):
    layer, x = BatchNorm1d(2, momentum=momentum), draw(5, 2)
    layer(x)
    assert_close(layer.running_mean, momentum * x.mean(0), 1e-6)


# precision


@pytest.mark.parametrize("dtype", HALVES)
@every_norm
def test_half_precision_is_rounded_once(norm, dtype):
    """The same as in float32, then rounded; the weights stay what they are."""
    layer = randomised(norm(64))
    x = draw(3, 5, 64, dtype=dtype, scale=20.0)
    y = layer(x)
    assert y.dtype == dtype
    exact = randomised(norm(64))(x.float())
    assert (y.float() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_large_half_precision_does_not_overflow():
    x = torch.full((1, 8), 6e4, dtype=torch.float16)
    assert_close(RMSNorm(8)(x), torch.ones(1, 8, dtype=torch.float16), 1e-3)


def test_small_weights_survive_bfloat16():
    x = draw(4, 128, dtype=torch.bfloat16)
    layer = RMSNorm(128).bfloat16()
    nn.init.constant_(layer.weight, 0.0035)  # 1 + w is 1 in bfloat16
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    exact = exact * (1 + layer.weight.double())
    bias = (layer(x).double() / exact).mean() - 1
    assert abs(bias) < 5e-4
    twin = museum.RMSNormAddedInBfloat16(128).bfloat16()
    twin.load_state_dict(layer.state_dict())
    assert abs((twin(x).double() / exact).mean() - 1) > 2e-3


@every_norm
def test_autocast_changes_nothing(norm):
    layer = randomised(norm(16))
    for x in (draw(4, 16), draw(4, 16, dtype=torch.bfloat16)):
        outside = layer.eval()(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), outside)


def test_epsilon_is_siglips_and_gemmas():
    assert LayerNorm(4).eps == RMSNorm(4).eps == gemma(4).eps == 1e-6
    assert BatchNorm1d(4).eps == nn.BatchNorm1d(4).eps == 1e-5
    x = 1e-3 * draw(50, 32)
    assert (LayerNorm(32)(x) - LayerNorm(32, eps=1e-5)(x)).abs().max() > 0.5


# edges


def test_a_fresh_layer_has_no_opinion():
    fresh = {norm: norm(3).state_dict() for norm in NORMS}
    assert list(fresh[RMSNorm]) == ["weight"] and not fresh[RMSNorm]["weight"].any()
    assert list(fresh[LayerNorm]) == ["weight", "bias"]
    names = ["weight", "bias", "running_mean", "running_var"]
    assert list(fresh[BatchNorm1d]) == names
    for state in (fresh[LayerNorm], fresh[BatchNorm1d]):
        assert (state["weight"] == 1).all() and (state["bias"] == 0).all()
    assert (fresh[BatchNorm1d]["running_mean"] == 0).all()
    assert (fresh[BatchNorm1d]["running_var"] == 1).all()


def test_a_model_says_what_it_has():
    assert repr(RMSNorm(2048)) == "RMSNorm(2048, eps=1e-06)"


@every_norm
@pytest.mark.parametrize("shape", [(2, 5), (3,), (2, 4, 1), ()])
def test_another_width_is_a_value_error(norm, shape, as_user):
    with pytest.raises(ValueError, match=r"x: .*width 4, got shape \("):
        norm(4)(torch.ones(shape))


def test_a_regrouping_is_not_a_batch(as_user):
    with pytest.raises(ValueError, match="width 4"):
        BatchNorm1d(4)(torch.ones(4, 2))


@every_norm
def test_integers_are_a_value_error(norm, as_user):
    with pytest.raises(ValueError, match="floating-point.*torch.int64"):
        norm(4)(torch.ones(2, 4, dtype=torch.long))


@every_norm
@pytest.mark.parametrize(
    ("width", "eps"), [(0, 1e-6), (-1, 1e-6), (4, 0.0), (4, -1e-6), (4, math.nan)]
)
def test_a_bad_width_or_epsilon_is_a_value_error(norm, width, eps, as_user):
    with pytest.raises(ValueError, match="width and eps: expected .*, got"):
        norm(width, eps=eps)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, math.nan])
def test_a_bad_momentum_is_a_value_error(momentum, as_user):
    with pytest.raises(ValueError, match="momentum: expected 0 to 1, got"):
        BatchNorm1d(4, momentum=momentum)


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (4,), (1, 1, 4)])
def test_a_batch_of_one_cannot_train(shape, as_user):
    layer = BatchNorm1d(4)
    with pytest.raises(ValueError, match="at least 2 vectors in training, got [01]"):
        layer(torch.ones(shape))
    assert (layer.running_mean == 0).all()
    assert layer.eval()(torch.ones(shape)).shape == shape


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_nothing_in_nothing_out(norm):
    assert norm(4)(torch.ones(0, 4)).shape == (0, 4)
    assert norm(4)(torch.ones(2, 0, 4)).shape == (2, 0, 4)


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_nan_stays_in_its_vector(norm):
    x = draw(3, 4)
    clean = norm(4)(x)
    x[1, 2] = torch.nan
    y = norm(4)(x)
    assert y[1].isnan().all()
    assert torch.equal(y[::2], clean[::2])


def test_nan_spoils_its_feature_for_good():
    layer, x = BatchNorm1d(3), draw(4, 3)
    x[1, 2] = torch.nan
    is_nan = layer(x).isnan()
    assert is_nan[:, 2].all() and not is_nan[:, :2].any()
    layer(draw(4, 3))
    assert layer.running_mean.isnan().tolist() == [False, False, True]


def test_constant_vectors_and_features():
    layer = randomised(LayerNorm(4))
    assert_close(layer(torch.full((2, 4), 3.0)), layer.bias.expand(2, 4), 1e-4)
    assert (RMSNorm(4)(torch.zeros(2, 4)) == 0).all()
    layer = randomised(BatchNorm1d(4))
    assert_close(layer(torch.full((2, 4), 3.0)), layer.bias.expand(2, 4), 1e-6)


@every_norm
@pytest.mark.parametrize("mode", [True, False])
def test_runs_on_the_meta_device(norm, mode):
    with torch.device("meta"):
        layer = norm(8).train(mode)
        x = torch.ones(2, 3, 8, dtype=torch.bfloat16)
    y = layer(x)
    assert y.device.type == "meta"
    assert y.shape == x.shape and y.dtype == x.dtype


@every_norm
@pytest.mark.parametrize("mode", [True, False])
def test_compiles_as_one_graph(norm, mode, as_user):
    layer = randomised(norm(8)).train(mode)
    memory = {k: v.clone() for k, v in layer.state_dict().items()}
    x = draw(2, 3, 8)
    plain = layer(x)
    layer.load_state_dict(memory)
    torch._dynamo.reset()
    traced = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(traced(x), plain)


def test_the_norm_does_not_write_into_its_input():
    for norm in NORMS:
        x = draw(3, 4)
        kept = x.clone()
        norm(4)(x)
        assert torch.equal(x, kept)
