"""Chapter 01's contrastive loss agrees with torch and Hugging Face, edge by edge."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pgcore.contrastive import (
    INITIAL_LOG_SCALE,
    MAX_LOG_SCALE,
    clip_loss,
    contrastive_logits,
    l2_normalize,
    zero_shot_classify,
)
from pgcore.lab.museum import contrastive as museum
from tests.reference.contrastive import clip_loss_by_hand

TWINS = [
    museum.clamp_inside_the_loss,
    museum.loss_over_one_axis,
    museum.loss_times_temperature,
    museum.loss_without_exp,
    museum.loss_without_normalization,
    museum.softmax_over_the_matrix,
]
SCALES = (0.0, INITIAL_LOG_SCALE, 5.0)  # 5.0 lies above the trainer's ceiling


def batch(n=12, width=8, seed=0, dtype=torch.float64):
    """Related pairs, far from normalised, on which rows and columns differ."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randn(n, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, width, generator=generator, dtype=torch.float64)
    lengths = 0.1 + 5 * torch.rand(n, 1, generator=generator, dtype=torch.float64)
    return ((texts + noise) * lengths).to(dtype), texts.to(dtype)


def torch_loss(images, texts, log_scale):
    logits = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    logits = logits * torch.as_tensor(log_scale).exp()
    pairs = torch.arange(len(logits))
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


def value_and_gradients(loss_fn, *inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = loss_fn(*leaves)
    gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return loss.detach(), *gradients


def assert_parity(loss_fn):
    """The value and every gradient, in float64, at scales from 1 to 148."""
    for seed, log_scale in enumerate(SCALES):
        images, texts = batch(seed=seed)
        inputs = images, texts, torch.tensor(log_scale, dtype=torch.float64)
        expected = value_and_gradients(torch_loss, *inputs)
        for ours, theirs in zip(
            value_and_gradients(loss_fn, *inputs), expected, strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss_fn", [clip_loss, clip_loss_by_hand])
def test_parity_with_torch(loss_fn):
    assert_parity(loss_fn)


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.__name__)
def test_a_wrong_twin_fails_the_parity_test(twin):
    with pytest.raises(AssertionError):
        assert_parity(twin)


def test_every_twin_of_the_museum_is_tested():
    assert sorted(twin.__name__ for twin in TWINS) == sorted(
        name
        for name, value in vars(museum).items()
        if getattr(value, "__module__", None) == museum.__name__
    )


@pytest.mark.parametrize("log_scale", SCALES)
def test_float32_agrees_with_float64(log_scale):
    images, texts = batch(n=64, width=32)
    expected = torch_loss(images, texts, log_scale)
    actual = clip_loss(images.float(), texts.float(), torch.tensor(log_scale))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module")
def hugging_face_clip():
    """A tiny CLIP with every weight drawn at fan-in scale, and its outputs."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    }
    config = CLIPConfig(
        text_config={"vocab_size": 50, "eos_token_id": 49, "bos_token_id": 48} | sizes,
        vision_config={"image_size": 16, "patch_size": 8} | sizes,
        projection_dim=24,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 0:
                weight.normal_(
                    std=weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.5
                )
            if "norm" in name and name.endswith("weight"):
                weight.add_(1.0)
        ids = torch.randint(0, 48, (6, 7))
        ids[:, -1] = 49
        outputs = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.randn(6, 3, 16, 16),
            return_loss=True,
        )
    return model, outputs


def test_parity_with_hugging_face_clip(hugging_face_clip):
    model, outputs = hugging_face_clip
    images, texts = outputs.image_embeds, outputs.text_embeds
    scale = model.logit_scale.detach()
    assert outputs.loss > 0.1
    logits = contrastive_logits(3 * images, texts / 7, scale)
    torch.testing.assert_close(logits, outputs.logits_per_image, rtol=1e-5, atol=1e-5)
    loss = clip_loss(3 * images, texts / 7, scale)
    torch.testing.assert_close(loss, outputs.loss, rtol=1e-6, atol=1e-6)


def test_zero_shot_agrees_with_hugging_face_clip(hugging_face_clip):
    model, outputs = hugging_face_clip
    class_texts = outputs.text_embeds[:4]
    shares = zero_shot_classify(
        outputs.image_embeds, class_texts, model.logit_scale.detach()
    )
    expected = outputs.logits_per_image[:, :4].softmax(dim=1)
    torch.testing.assert_close(shares, expected, rtol=1e-5, atol=1e-6)


def test_first_scale_is_hugging_faces(hugging_face_clip):
    model, _ = hugging_face_clip
    assert abs(model.config.logit_scale_init_value - INITIAL_LOG_SCALE) < 1e-3
    assert math.isclose(math.exp(INITIAL_LOG_SCALE), 1 / 0.07)
    assert math.isclose(math.exp(MAX_LOG_SCALE), 100)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_l2_normalize_agrees_with_torch(shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    torch.testing.assert_close(l2_normalize(x), F.normalize(x, dim=-1))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_l2_normalize_keeps_zero_and_its_dtype(dtype):
    x = torch.zeros(2, 3, dtype=dtype)
    x[1, 0] = 3
    result = l2_normalize(x)
    assert result.dtype == dtype
    assert result.tolist() == [[0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_l2_normalize_measures_half_types_in_float32(dtype):
    """In float16 the length of 128 entries of 1e4 overflows."""
    x = torch.full((2, 128), 1e4).to(dtype).requires_grad_()
    result = l2_normalize(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result, torch.full_like(result, 128**-0.5))
    result[:, 0].sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype and x.grad.isfinite().all()


def test_a_vector_whose_length_overflows_becomes_zero():
    x = torch.full((4,), 1e30)
    assert l2_normalize(x).tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(l2_normalize(x.double()), torch.full((4,), 0.5).double())


def test_l2_normalize_divides_a_short_vector_by_eps():
    x = torch.tensor([[3e-14, 4e-14]])
    torch.testing.assert_close(l2_normalize(x), x / 1e-12)
    torch.testing.assert_close(l2_normalize(x, eps=1e-20), x / x.norm())


def test_gradient_is_finite_at_the_zero_vector():
    images, texts = batch(4)
    images[1] = 0
    images.requires_grad_()
    clip_loss(images, texts, 0.0).backward()
    assert images.grad.isfinite().all()


sizes = st.integers(1, 12)
log_scales = st.floats(-2, MAX_LOG_SCALE)
seeds = st.integers(0, 10**6)


@given(n=sizes, log_scale=log_scales, seed=seeds)
def test_the_order_of_the_pairs_does_not_matter(n, log_scale, seed):
    images, texts = batch(n, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    loss = clip_loss(images, texts, log_scale)
    torch.testing.assert_close(clip_loss(images[order], texts[order], log_scale), loss)


@given(n=st.integers(3, 12), seed=seeds)
def test_the_pairing_does(n, seed):
    images, texts = batch(n, seed=seed)
    loss = clip_loss(images, texts, 1.0)
    moved = clip_loss(images, texts.roll(1, dims=0), 1.0)
    assert abs(moved - loss) > 1e-6


@given(n=sizes, log_scale=log_scales, seed=seeds)
def test_lengths_do_not_matter(n, log_scale, seed):
    images, texts = batch(n, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.empty(2, n, 1, dtype=torch.float64)
    lengths.uniform_(1e-3, 1e3, generator=generator)
    loss = clip_loss(images, texts, log_scale)
    longer = clip_loss(images * lengths[0], texts * lengths[1], log_scale)
    torch.testing.assert_close(longer, loss)


@given(n=sizes, log_scale=log_scales, seed=seeds)
def test_never_negative_and_symmetric(n, log_scale, seed):
    images, texts = batch(n, seed=seed)
    loss = clip_loss(images, texts, log_scale)
    assert loss >= -1e-12
    torch.testing.assert_close(clip_loss(texts, images, log_scale), loss)


@given(n=st.integers(1, 300), log_scale=log_scales)
def test_equal_scores_cost_log_n(n, log_scale):
    same = torch.ones(n, 5, dtype=torch.float64)
    loss = clip_loss(same, same, log_scale)
    assert math.isclose(loss, math.log(n), rel_tol=1e-9, abs_tol=1e-12)


@given(n=st.integers(2, 10), seed=seeds)
def test_gradient_is_belief_minus_truth(n, seed):
    images, texts = batch(n, seed=seed)
    logits = contrastive_logits(images, texts, 1.0).requires_grad_()
    pairs = torch.arange(n)
    loss = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
    (gradient,) = torch.autograd.grad(loss, logits)
    truth = torch.eye(n, dtype=torch.float64)
    formula = (logits.softmax(1) + logits.softmax(0) - 2 * truth) / (2 * n)
    torch.testing.assert_close(gradient, formula)


@given(pictures=sizes, classes=sizes, log_scale=log_scales, seed=seeds)
def test_zero_shot_probabilities(pictures, classes, log_scale, seed):
    images, _ = batch(pictures, seed=seed)
    _, texts = batch(classes, seed=seed + 1)
    shares = zero_shot_classify(images, texts, log_scale)
    assert shares.shape == (pictures, classes)
    torch.testing.assert_close(shares.sum(1), torch.ones_like(shares[:, 0]))
    cosines = F.cosine_similarity(images[:, None], texts[None], dim=-1)
    best = cosines.gather(1, shares.argmax(1, keepdim=True)).squeeze(1)
    torch.testing.assert_close(best, cosines.amax(1))


def test_one_pair_costs_exactly_nothing():
    images, texts = batch(1)
    loss, *gradients = value_and_gradients(
        clip_loss, images, texts, torch.tensor(4.0, dtype=torch.float64)
    )
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


def test_a_sure_mistake_costs_the_logits_distance():
    """log(softmax(...)) says infinity: the right answer's share underflows."""
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    loss = clip_loss(x, x.flip(0), MAX_LOG_SCALE)
    assert math.isclose(loss, 200, rel_tol=1e-6)


def test_two_equal_captions_have_a_floor_of_log_2():
    vectors = torch.eye(4)[[0, 0, 2, 3]]
    loss = clip_loss(vectors, vectors, MAX_LOG_SCALE)
    assert math.isclose(loss, math.log(2) / 2, rel_tol=1e-6)


@pytest.mark.parametrize("where", ["images", "texts", "log_scale"])
def test_nan_makes_the_loss_nan(where):
    images, texts = batch(4)
    inputs = {"images": images, "texts": texts, "log_scale": torch.tensor(1.0)}
    inputs[where].view(-1)[0] = torch.nan
    assert clip_loss(**inputs).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_scored_in_float32(dtype):
    assert torch.tensor(100.2).bfloat16() == 100  # why: half a unit to the next one
    images, texts = batch(16, dtype=dtype)
    logits = contrastive_logits(images, texts, MAX_LOG_SCALE)
    assert logits.dtype == torch.float32
    expected = torch_loss(images.double(), texts.double(), MAX_LOG_SCALE)
    loss = clip_loss(images, texts, MAX_LOG_SCALE)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("first", DTYPES)
@pytest.mark.parametrize("second", DTYPES)
def test_the_wider_dtype_decides(first, second):
    images, texts = batch()
    images, texts = images.to(first), texts.to(second)
    log_scale = torch.tensor(1.0, dtype=torch.float64)
    loss = clip_loss(images, texts, log_scale)
    wide = torch.float64 in (first, second)
    assert loss.dtype == (torch.float64 if wide else torch.float32)
    tolerance = 1e-12 if wide else 1e-6
    swapped = clip_loss(texts, images, log_scale)
    torch.testing.assert_close(swapped, loss, rtol=tolerance, atol=tolerance)
    expected = torch_loss(images.double(), texts.double(), log_scale)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)


def test_log_scale_may_be_a_float_or_a_parameter():
    images, texts = batch()
    parameter = torch.nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))
    loss = clip_loss(images, texts, parameter)
    torch.testing.assert_close(clip_loss(images, texts, INITIAL_LOG_SCALE), loss)
    loss.backward()
    assert parameter.grad is not None and parameter.grad != 0


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (torch.ones(3, 4), torch.ones(2, 4), "expected pairs, got 3 and 2"),
        (torch.ones(3, 4), torch.ones(3, 5), "expected one width, got 4 and 5"),
        (torch.ones(0, 4), torch.ones(0, 4), r"images: .* got shape \(0, 4\)"),
        (torch.ones(4), torch.ones(4), r"images: .* got shape \(4,\)"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4), "images: expected one vector"),
        (torch.ones(3, 4).long(), torch.ones(3, 4), "images: .* got torch.int64"),
        (torch.ones(3, 4), torch.ones(3, 4).bool(), "texts: .* got torch.bool"),
    ],
)
def test_clip_loss_explains_what_is_wrong(images, texts, message, as_user):
    with pytest.raises(ValueError, match=message):
        clip_loss(images, texts, 0.0)


def test_no_classes_and_integers_are_value_errors(as_user):
    with pytest.raises(ValueError, match="texts: .* at least one row"):
        zero_shot_classify(torch.ones(2, 4), torch.ones(0, 4), 0.0)
    with pytest.raises(ValueError, match="x: expected floating point"):
        l2_normalize(torch.ones(3, dtype=torch.long))


def test_shapes_on_the_meta_device():
    images = torch.empty(5, 8, device="meta")
    texts = torch.empty(3, 8, device="meta")
    log_scale = torch.empty((), device="meta")
    assert contrastive_logits(images, texts, log_scale).shape == (5, 3)
    assert contrastive_logits(images, texts, 0.0).device.type == "meta"
    assert zero_shot_classify(images, texts, log_scale).shape == (5, 3)
    assert clip_loss(images, images, log_scale).shape == ()


def test_no_graph_breaks(as_user):
    explanation = torch._dynamo.explain(clip_loss)(*batch(), torch.tensor(1.0))
    assert explanation.graph_count == 1 and explanation.graph_break_count == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_narrow_the_loss(dtype):
    """In bfloat16 a logit near 100 would be off by up to a quarter."""
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 20, 16, generator=generator).to(dtype)
    log_scale = torch.tensor(MAX_LOG_SCALE).to(dtype)
    outside = clip_loss(images, texts, log_scale)
    with torch.autocast("cpu", torch.bfloat16):
        inside = clip_loss(images, texts, log_scale)
    assert inside.dtype == outside.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=1e-6, atol=0)


def test_more_than_one_scale_is_an_error(as_user):
    vectors = torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"log_scale: expected one number, got .*4,"):
        clip_loss(vectors, vectors, torch.zeros(4))
