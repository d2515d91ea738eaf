"""Chapter 03: the sigmoid loss against torch, Hugging Face, and its own wrong twins."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pgcore.lab.checks.chapter_03 import SavedBytes
from pgcore.lab.museum import sigmoid as museum
from pgcore.sigmoid import (
    INITIAL_BIAS,
    INITIAL_LOG_SCALE,
    siglip_loss,
    siglip_loss_chunked,
)
from tests.reference.sigmoid import siglip_loss_by_loops

LOSS_TWINS = [
    museum.mean_over_all_pairs,
    museum.zero_one_as_signs,
    museum.bias_left_out,
    museum.softmax_with_a_bias,
    museum.log_of_sigmoid,
]


def draw(
    n,
    width,
    seed=0,
    log_scale=INITIAL_LOG_SCALE,
    bias=INITIAL_BIAS,
    dtype=torch.float64,
):
    """Random pairs whose matches are more alike than chance, and the two scalars."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": dtype}
    images = torch.randn(n, width, **options)
    texts = images + torch.randn(n, width, **options)
    scalars = [torch.tensor(value, dtype=dtype) for value in (log_scale, bias)]
    return [tensor.requires_grad_() for tensor in (images, texts, *scalars)]


def value_and_gradients(loss, inputs, **options):
    value = loss(*inputs, **options)
    return value, *torch.autograd.grad(value, inputs)


def by_torch(images, texts, log_scale, bias):
    images, texts = F.normalize(images, dim=1), F.normalize(texts, dim=1)
    logits = log_scale.exp() * images @ texts.T + bias
    labels = torch.eye(len(logits), dtype=logits.dtype)
    total = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    return total / len(logits)


def assert_close(actual, expected, tolerance):
    for ours, theirs in zip(actual, expected, strict=True):
        size = max(theirs.abs().max().item(), 1e-3)
        assert (ours - theirs).abs().max().item() <= tolerance * size


# parity


def assert_parity(loss):
    """Ordinary batches, a bias of the reader's own, and a sure mistake."""
    for n, width in ((1, 4), (2, 3), (13, 8), (40, 32)):
        for bias in (INITIAL_BIAS, -math.log(40), 0.5):
            inputs = draw(n, width, seed=n, bias=bias)
            assert_close(
                value_and_gradients(loss, inputs),
                value_and_gradients(by_torch, inputs),
                1e-12,
            )
    images, _, log_scale, bias = draw(3, 8, log_scale=math.log(1000))
    inputs = images, -images, log_scale, bias
    assert_close([loss(*inputs)], [by_torch(*inputs)], 1e-12)


def test_equals_binary_cross_entropy():
    assert_parity(siglip_loss)


@pytest.mark.parametrize("chunk_size", [7, 64])
def test_chunked_equals_binary_cross_entropy(chunk_size):
    assert_parity(lambda *inputs: siglip_loss_chunked(*inputs, chunk_size=chunk_size))


@pytest.mark.parametrize("twin", LOSS_TWINS, ids=lambda twin: twin.__name__)
def test_wrong_twins_fail_the_parity_test(twin):
    with pytest.raises(AssertionError):
        assert_parity(twin)


def test_equals_the_loops_of_the_chapter():
    inputs = [tensor.detach() for tensor in draw(9, 6)]
    assert_close([siglip_loss(*inputs)], [siglip_loss_by_loops(*inputs)], 1e-12)


def test_equals_torch_in_float32():
    inputs = draw(200, 64, dtype=torch.float32)
    value = siglip_loss(*inputs)
    assert_close([value], [by_torch(*inputs)], 1e-6)
    assert_close([value], [by_torch(*(tensor.double() for tensor in inputs))], 1e-6)


def test_gradcheck():
    inputs = draw(4, 3, bias=-2.0)
    assert torch.autograd.gradcheck(siglip_loss, inputs)
    assert torch.autograd.gradcheck(
        lambda *inputs: siglip_loss_chunked(*inputs, chunk_size=3), inputs
    )


def test_equals_hugging_face():
    """SiglipModel, every weight at fan-in scale, scale and bias set by hand."""
    from transformers import SiglipConfig, SiglipModel

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = SiglipConfig(
        text_config={**sizes, "vocab_size": 50, "max_position_embeddings": 8},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
    )
    model = SiglipModel(config).eval()
    assert model.logit_scale.item() == model.logit_bias.item() == 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
            parameter.normal_(std=fan_in**-0.5)
        model.logit_scale.fill_(INITIAL_LOG_SCALE)
        model.logit_bias.fill_(INITIAL_BIAS)
    outputs = model(
        pixel_values=torch.randn(6, 3, 16, 16),
        input_ids=torch.randint(50, (6, 8)),
        return_loss=True,
    )
    inputs = (
        3 * outputs.image_embeds,  # theirs are normalised; ours need not be
        outputs.text_embeds,
        model.logit_scale.squeeze(),
        model.logit_bias.squeeze(),
    )
    learned = [model.logit_scale, model.logit_bias]
    theirs = (
        outputs.loss,
        *torch.autograd.grad(outputs.loss, learned, retain_graph=True),
    )
    for loss in (siglip_loss, lambda *x: siglip_loss_chunked(*x, chunk_size=4)):
        value = loss(*inputs)
        ours = value, *torch.autograd.grad(value, learned, retain_graph=True)
        assert_close(ours, theirs, 1e-6)


# properties


@given(st.integers(1, 12), st.integers(1, 14), st.integers(0, 1000))
def test_any_chunk_size_gives_the_whole(n, chunk_size, seed):
    inputs = draw(n, 5, seed=seed)
    assert_close(
        value_and_gradients(siglip_loss_chunked, inputs, chunk_size=chunk_size),
        value_and_gradients(siglip_loss, inputs),
        1e-11,
    )


@pytest.mark.parametrize("n, chunk_size", [(100, 32), (33, 8), (64, 100)])
def test_any_chunk_size_gives_the_whole_in_float32(n, chunk_size):
    inputs = draw(n, 16, dtype=torch.float32)
    assert_close(
        value_and_gradients(siglip_loss_chunked, inputs, chunk_size=chunk_size),
        value_and_gradients(siglip_loss, inputs),
        1e-6,
    )


@given(st.integers(2, 10), st.randoms(use_true_random=False), st.integers(0, 1000))
def test_the_order_of_pairs_does_not_matter(n, random, seed):
    images, texts, log_scale, bias = draw(n, 5, seed=seed)
    order = random.sample(range(n), n)
    shuffled = siglip_loss(images[order], texts[order], log_scale, bias)
    assert_close([shuffled], [siglip_loss(images, texts, log_scale, bias)], 1e-12)


@given(st.floats(0.01, 100), st.integers(0, 1000))
def test_the_length_of_vectors_does_not_matter(factor, seed):
    images, texts, log_scale, bias = draw(5, 4, seed=seed)
    longer = siglip_loss(factor * images, texts, log_scale, bias)
    assert_close([longer], [siglip_loss(images, texts, log_scale, bias)], 1e-10)


@given(st.integers(2, 8), st.integers(0, 1000))
def test_pictures_and_captions_are_treated_alike(n, seed):
    images, texts, log_scale, bias = draw(n, 5, seed=seed)
    swapped = siglip_loss(texts, images, log_scale, bias)
    assert_close([swapped], [siglip_loss(images, texts, log_scale, bias)], 1e-12)


def test_the_order_of_captions_alone_does_matter():
    images, texts, log_scale, bias = draw(6, 5)
    rolled = siglip_loss(images, texts.roll(1, dims=0), log_scale, bias)
    assert rolled > siglip_loss(images, texts, log_scale, bias) + 1


def test_pairs_are_independent():
    """The push on one pair does not change with the logit of another."""
    n = 4
    images = torch.eye(n + 1, dtype=torch.float64)[:n]
    cosines = torch.rand(n, n, dtype=torch.float64) / n

    def loss_of_cosines(cosines):  # captions of length 1 with exactly these cosines
        rest = (1 - cosines.square().sum(0)).sqrt()
        texts = torch.cat([cosines, rest[None]]).T
        return siglip_loss(images, texts, INITIAL_LOG_SCALE, -2.0)

    hessian = torch.autograd.functional.hessian(loss_of_cosines, cosines)
    hessian = hessian.reshape(n * n, n * n)
    others = hessian - torch.diag(hessian.diagonal())
    assert others.abs().max() < 1e-12 * hessian.diagonal().min()


def test_a_batch_is_the_sum_of_its_parts():
    """Independence seen from outside: adding a pair adds its row and column only."""
    images, texts, log_scale, bias = draw(7, 5)
    whole = 7 * siglip_loss(images, texts, log_scale, bias)
    part = 6 * siglip_loss(images[:6], texts[:6], log_scale, bias)
    cosines = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    logits = log_scale.exp() * cosines + bias
    added = F.softplus(logits[6, :6]).sum() + F.softplus(logits[:6, 6]).sum()
    added = added + F.softplus(-logits[6, 6])
    assert_close([whole - part], [added], 1e-10)


def test_the_slope_by_the_bias_counts_the_yes_answers():
    images, texts, log_scale, bias = inputs = draw(8, 5)
    cosines = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    yes = torch.sigmoid(log_scale.exp() * cosines + bias).sum() / 8
    slope = value_and_gradients(siglip_loss, inputs)[-1]
    assert_close([slope], [yes - 1], 1e-12)


def test_the_initial_bias_is_the_prior_of_a_large_batch():
    assert math.isclose(-math.log(22027 - 1), INITIAL_BIAS, abs_tol=1e-4)
    assert math.isclose(math.exp(INITIAL_LOG_SCALE), 10.0)


# memory


def saved(loss, n, **options):
    inputs = draw(n, 8, dtype=torch.float32)
    with SavedBytes() as counter:
        loss(*inputs, **options)
    return counter.total


def assert_saves_no_matrix(loss):
    small, large = (saved(loss, n, chunk_size=32) for n in (128, 256))
    assert large <= 2.1 * small
    assert large < 256 * 256 * 4 / 4


def test_chunked_saves_no_matrix():
    assert_saves_no_matrix(siglip_loss_chunked)


def test_keeping_every_chunk_fails_the_memory_test():
    assert_close(
        value_and_gradients(museum.chunks_all_kept, draw(9, 5), chunk_size=4),
        value_and_gradients(siglip_loss, draw(9, 5)),
        1e-12,
    )
    with pytest.raises(AssertionError):
        assert_saves_no_matrix(museum.chunks_all_kept)


def test_only_one_block_of_logits_is_alive(monkeypatch):
    """Count the pairs of each block while it is computed: forward, then backward."""
    from pgcore import sigmoid

    sizes = []

    def spying(images, texts, log_scale):
        logits = original(images, texts, log_scale)
        sizes.append(tuple(logits.shape))
        return logits

    original = sigmoid.contrastive_logits
    monkeypatch.setattr(sigmoid, "contrastive_logits", spying)
    siglip_loss_chunked(*draw(10, 4), chunk_size=4).backward()
    assert max(rows * columns for rows, columns in sizes) == 16
    assert sum(rows * columns for rows, columns in sizes) == 2 * 10 * 10


# edges


def test_one_pair_is_one_match():
    images, texts, log_scale, bias = draw(1, 4)
    cosine = F.cosine_similarity(images, texts)
    expected = F.softplus(-(log_scale.exp() * cosine + bias)).squeeze()
    assert_close([siglip_loss(images, texts, log_scale, bias)], [expected], 1e-12)


def test_scale_and_bias_may_be_numbers():
    images, texts, log_scale, bias = draw(3, 4)
    value = siglip_loss(images, texts, INITIAL_LOG_SCALE, INITIAL_BIAS)
    assert_close([value], [siglip_loss(images, texts, log_scale, bias)], 1e-7)


def test_bfloat16_is_summed_in_float32():
    images, texts, *_ = (t.detach() for t in draw(16, 8, dtype=torch.bfloat16))
    expected = siglip_loss(
        images.float(), texts.float(), INITIAL_LOG_SCALE, INITIAL_BIAS
    )
    for loss in (siglip_loss, lambda *x: siglip_loss_chunked(*x, chunk_size=5)):
        value = loss(images, texts, INITIAL_LOG_SCALE, INITIAL_BIAS)
        assert value.dtype == torch.float32
        assert_close([value], [expected], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [siglip_loss, siglip_loss_chunked])
def test_autocast_does_not_narrow_the_loss(loss, dtype):
    """Not in the product, the scale, or the bias; nor in the second computation."""
    options = {"chunk_size": 5} if loss is siglip_loss_chunked else {}
    inputs = draw(16, 8, bias=-4.14, dtype=dtype)
    outside = value_and_gradients(loss, inputs, **options)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*inputs, **options)
    inside = value, *torch.autograd.grad(value, inputs)
    assert inside[0].dtype == outside[0].dtype == torch.float32
    assert_close(inside, outside, 1e-6)


def test_a_sure_mistake_stays_finite():
    images = torch.ones(2, 3)
    value = siglip_loss(images, -images, math.log(1e6), 0.0)
    assert torch.isclose(value, torch.tensor(1e6))


@pytest.mark.parametrize("which", range(4))
def test_nan_is_passed_on(which):
    inputs = [tensor.detach() for tensor in draw(3, 4)]
    inputs[which].view(-1)[0] = torch.nan
    assert siglip_loss(*inputs).isnan()
    assert siglip_loss_chunked(*inputs, chunk_size=2).isnan()


BAD = {
    "more captions than pictures": (torch.ones(3, 4), torch.ones(2, 4)),
    "empty": (torch.ones(0, 4), torch.ones(0, 4)),
    "widths differ": (torch.ones(3, 4), torch.ones(3, 5)),
    "one vector": (torch.ones(4), torch.ones(4)),
    "one number": (torch.tensor(1.0), torch.tensor(1.0)),
    "a picture and a number": (torch.ones(3, 4), torch.tensor(1.0)),
    "integers": (torch.ones(3, 4).long(), torch.ones(3, 4).long()),
}


@pytest.mark.parametrize("pair", BAD.values(), ids=BAD.keys())
def test_a_bad_batch_is_a_value_error(pair, as_user):
    with pytest.raises(ValueError, match="images|texts"):
        siglip_loss(*pair, torch.tensor(0.0), torch.tensor(0.0))
    with pytest.raises(ValueError, match="images|texts"):
        siglip_loss_chunked(*pair, torch.tensor(0.0), torch.tensor(0.0), chunk_size=2)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.5, True, "2", None])
def test_a_bad_chunk_size_is_a_value_error(chunk_size, as_user):
    with pytest.raises(ValueError, match="chunk_size.*at least 1, got"):
        siglip_loss_chunked(*draw(3, 4), chunk_size=chunk_size)


@pytest.mark.parametrize("which, name", [(2, "log_scale"), (3, "bias")])
def test_more_than_one_scale_or_bias_is_a_value_error(which, name, as_user):
    inputs = draw(3, 4)
    inputs[which] = torch.zeros(3)
    for loss in (siglip_loss, lambda *x: siglip_loss_chunked(*x, chunk_size=2)):
        with pytest.raises(ValueError, match=f"{name}: expected one number, got .*3,"):
            loss(*inputs)


def test_one_scale_and_bias_may_have_an_axis(as_user):
    """As the parameters of Hugging Face's SiglipModel do."""
    images, texts, log_scale, bias = draw(5, 4)
    boxed = log_scale[None], bias[None]
    whole = siglip_loss(images, texts, *boxed)
    parts = siglip_loss_chunked(images, texts, *boxed, chunk_size=2)
    expected = siglip_loss(images, texts, log_scale, bias)
    assert whole.shape == parts.shape == ()
    assert_close([whole, parts], [expected, expected], 1e-12)


@pytest.mark.parametrize("loss", [siglip_loss, siglip_loss_chunked])
def test_runs_on_the_meta_device(loss):
    options = {"chunk_size": 3} if loss is siglip_loss_chunked else {}
    inputs = [
        torch.empty(shape, device="meta", requires_grad=True)
        for shape in ((8, 4), (8, 4), (), ())
    ]
    value = loss(*inputs, **options)
    value.backward()
    assert value.shape == () and value.is_meta and inputs[0].grad.shape == (8, 4)


def test_compiles_into_one_graph(as_user):
    inputs = draw(6, 4)
    compiled = torch.compile(siglip_loss, backend="aot_eager", fullgraph=True)
    assert_close(
        value_and_gradients(compiled, inputs),
        value_and_gradients(siglip_loss, inputs),
        1e-12,
    )
