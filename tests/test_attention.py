"""Chapter 05: attention against torch, Hugging Face, loops, and its wrong twins."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pgcore.attention import (
    Attention,
    Cache,
    attend,
    attention_mask,
    attention_weights,
    merge_heads,
    split_heads,
)
from pgcore.lab.museum import attention as museum
from tests.draws import assert_close, draw_heads, draw_mask, fan_in, name_of
from tests.reference.attention import reference_attention

ATTEND_TWINS = [
    museum.scaled_by_width,
    museum.scale_left_out,
    museum.softmax_over_queries,
    museum.kv_heads_tiled,
    museum.mask_inverted,
    museum.mask_as_numbers,
    museum.mask_after_softmax,
    museum.lowest_number_for_masked,
]
MASK_TWINS = [
    museum.causal_without_itself,
    museum.causal_for_all,
    museum.padding_in_the_rows,
]
SIZES = [  # B, N, K, T, S, H
    (1, 1, 1, 1, 1, 1),
    (2, 4, 4, 5, 5, 8),
    (2, 8, 2, 6, 9, 5),
    (3, 6, 3, 1, 7, 72),
    (1, 8, 1, 9, 4, 16),
]


def oracle(q, k, v, mask=None, scale=None):
    """einsum, torch's softmax over the keys that may be read, in float64."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    scores = torch.einsum("bnth,bnsh->bnts", q.double(), k)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is None:
        return torch.einsum("bnts,bnsh->bnth", scores.softmax(-1), v)
    readable = mask.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(~mask & readable, -torch.inf)
    return torch.einsum("bnts,bnsh->bnth", scores.softmax(-1) * readable, v)


# parity: attend


def assert_attend_parity(fn):
    """Values and gradients; every kind of mask, empty rows, a scale of its own."""
    for seed, sizes in enumerate(SIZES):
        masks = [
            None,
            draw_mask(sizes, seed),
            draw_mask(sizes, seed, heads=sizes[1]),
            draw_mask(sizes, seed, rows=1),
            draw_mask(sizes, seed, empty_row=True),
        ]
        for mask in masks:
            for scale in (None, 0.3):
                inputs = draw_heads(sizes, grad=True, seed=seed)
                ours, theirs = (f(*inputs, mask, scale) for f in (fn, oracle))
                assert_close(ours, theirs, 1e-12)
                push = torch.randn_like(theirs)
                slopes, expected = (
                    torch.autograd.grad((value * push).sum(), inputs)
                    for value in (ours, theirs)
                )
                for slope, wanted in zip(slopes, expected, strict=True):
                    assert_close(slope, wanted, 1e-11)


def test_attend_equals_einsum_and_softmax():
    assert_attend_parity(attend)


@pytest.mark.parametrize("twin", ATTEND_TWINS, ids=name_of)
def test_wrong_attention_fails_the_parity_test(twin):
    with pytest.raises(AssertionError):
        assert_attend_parity(twin)


@pytest.mark.parametrize("twin", ATTEND_TWINS, ids=name_of)
def test_wrong_attention_has_the_right_shape(twin):
    sizes = SIZES[2]
    inputs = draw_heads(sizes, torch.float32)
    assert twin(*inputs, draw_mask(sizes)).shape == inputs[0].shape


@pytest.mark.parametrize("sizes", SIZES)
def test_attend_equals_one_query_at_a_time(sizes):
    inputs, mask = draw_heads(sizes), draw_mask(sizes, empty_row=True)
    assert_close(attend(*inputs, mask), reference_attention(*inputs, mask), 1e-12)
    assert_close(attend(*inputs), reference_attention(*inputs), 1e-12)
    assert_close(oracle(*inputs, mask), reference_attention(*inputs, mask), 1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 4e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
)
def test_attend_in_other_precisions(dtype, tolerance):
    for sizes in [*SIZES, (2, 8, 1, 40, 300, 256)]:
        inputs, mask = draw_heads(sizes, dtype), draw_mask(sizes, empty_row=True)
        value = attend(*inputs, mask)
        assert value.dtype == dtype
        assert_close(value, oracle(*inputs, mask), tolerance)


def test_gradcheck():
    sizes = (1, 4, 2, 3, 4, 3)
    mask = draw_mask(sizes, empty_row=True)
    inputs = draw_heads(sizes, grad=True)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, mask), inputs)
    assert torch.autograd.gradcheck(
        lambda q, k: attention_weights(q, k, mask), inputs[:2]
    )


# rows with nothing to read


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [SIZES[1], SIZES[2], (2, 8, 1, 70, 300, 64)])
def test_a_query_with_nothing_to_read_gives_zeros_and_no_gradient(
    sizes, dtype, backend
):
    q, k, v = inputs = draw_heads(sizes, dtype, grad=True)
    mask = draw_mask(sizes)
    mask[0] = False
    mask[1, :, 0] = False
    with sdpa_kernel(backend):
        value = attend(*inputs, mask)
        slopes = torch.autograd.grad((value.float() + 1).square().sum(), inputs)
    assert (value[0] == 0).all() and (value[1, :, 0] == 0).all()
    assert all(slope.isfinite().all() for slope in slopes)
    assert all((slope[0] == 0).all() for slope in slopes)
    assert (slopes[0][1, :, 0] == 0).all() and (slopes[0][1] != 0).any()
    weights = attention_weights(q, k, mask)
    assert (weights[0] == 0).all() and (weights[1, :, 0] == 0).all()


# properties


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 7),
    st.integers(0, 1000),
)
def test_weights_are_what_attend_sums_with(K, groups, T, S, seed):
    sizes = 2, K * groups, K, T, S, 4
    q, k, v = draw_heads(sizes, seed=seed)
    mask = draw_mask(sizes, seed, empty_row=seed % 2 == 0)
    scale = None if seed % 3 else 0.3
    weights = attention_weights(q, k, mask, scale)
    summed = weights @ v.repeat_interleave(groups, dim=1)
    assert_close(summed, attend(q, k, v, mask, scale), 1e-12)
    assert (weights >= 0).all()
    assert (weights[~mask.expand_as(weights)] == 0).all()
    assert_close(weights.sum(-1), mask.any(-1).double().expand(weights.shape[:3]), 1e-9)


@given(st.integers(0, 1000))
def test_a_hidden_key_does_not_matter(seed):
    sizes = SIZES[2]
    q, k, v = draw_heads(sizes, seed=seed)
    mask = draw_mask(sizes, seed)
    mask[:, :, :, 1] = False
    expected = attend(q, k, v, mask)
    k[:, :, 1], v[:, :, 1] = 1e3, -1e6
    assert torch.equal(attend(q, k, v, mask), expected)
    keep = [0, *range(2, sizes[4])]
    shorter = attend(q, k[:, :, keep], v[:, :, keep], mask[..., keep])
    assert_close(shorter, expected, 1e-12)


@given(st.randoms(use_true_random=False), st.integers(0, 1000))
def test_shuffled_keys_change_nothing_and_shuffled_queries_shuffle(random, seed):
    q, k, v = draw_heads(SIZES[2], seed=seed)
    mask = draw_mask(SIZES[2], seed)
    rows, columns = (random.sample(range(n), n) for n in (6, 9))
    moved = attend(
        q[:, :, rows],
        k[:, :, columns],
        v[:, :, columns],
        mask[:, :, rows][..., columns],
    )
    assert_close(moved, attend(q, k, v, mask)[:, :, rows], 1e-12)


@pytest.mark.parametrize("groups", [2, 4])
def test_shared_heads_equal_copied_heads(groups):
    q, k, v = draw_heads((2, 8, 8 // groups, 5, 6, 4))
    copies = [x.repeat_interleave(groups, dim=1) for x in (k, v)]
    assert torch.equal(attend(q, k, v), attend(q, *copies))
    assert_close(attention_weights(q, k), attention_weights(q, copies[0]), 1e-15)


def test_attention_weights_are_float32_at_least():
    q, k, _ = draw_heads(SIZES[2], torch.bfloat16)
    weights = attention_weights(q, k)
    assert weights.dtype == torch.float32
    assert_close(weights, attention_weights(q.double(), k.double()), 1e-6)


def test_attention_weights_stay_finite_for_huge_scores():
    q, k, _ = draw_heads(SIZES[1], torch.float32)
    assert attention_weights(1e4 * q, 1e4 * k).isfinite().all()


# heads


def assert_split_parity(fn):
    for B, T, heads, H in ((1, 4, 2, 4), (2, 3, 5, 4), (3, 1, 2, 2), (2, 6, 3, 1)):
        x = torch.arange(B * T * heads * H, dtype=torch.float64)
        x = x.view(B, T, heads * H)
        split = fn(x, H)
        assert split.shape == (B, heads, T, H)
        for n in range(heads):
            assert torch.equal(split[:, n], x[:, :, n * H : (n + 1) * H])


def test_a_head_is_a_slice_of_features():
    assert_split_parity(split_heads)


def test_a_view_alone_fails_the_split_test():
    with pytest.raises(AssertionError):
        assert_split_parity(museum.view_without_transpose)


@given(*[st.integers(1, 5)] * 4)
def test_merge_undoes_split(B, T, heads, H):
    x = torch.randn(B, T, heads * H)
    assert torch.equal(merge_heads(split_heads(x, H)), x)
    y = torch.randn(B, heads, T, H)
    assert torch.equal(split_heads(merge_heads(y), H), y)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
def test_empty_heads(shape):
    split = split_heads(torch.ones(shape), 4)
    assert split.shape == (shape[0], 2, shape[1], 4)
    assert merge_heads(split).shape == shape


# masks


def mask_by_loops(starts_block, is_token=None):
    B, S = starts_block.shape
    mask = torch.zeros(B, 1, S, S, dtype=torch.bool)
    for b in range(B):
        for i in range(S):
            for j in range(S):
                between = starts_block[b, i + 1 : j + 1]  # empty if j <= i
                allowed = j <= i or not between.any()
                mask[b, 0, i, j] = allowed and (is_token is None or is_token[b, j])
    return mask


def assert_mask_parity(fn):
    generator = torch.Generator().manual_seed(0)
    for share in (0.0, 0.3, 0.7, 1.0):
        starts = torch.rand(4, 7, generator=generator) < share
        is_token = torch.rand(4, 7, generator=generator) < 0.7
        assert torch.equal(fn(starts), mask_by_loops(starts))
        assert torch.equal(fn(starts, is_token), mask_by_loops(starts, is_token))


def test_mask_equals_loops():
    assert_mask_parity(attention_mask)


@pytest.mark.parametrize("twin", MASK_TWINS, ids=name_of)
def test_wrong_masks_fail_the_parity_test(twin):
    with pytest.raises(AssertionError):
        assert_mask_parity(twin)


def test_named_masks():
    ones = torch.ones(5, 5, dtype=torch.bool)
    flags = torch.tensor([[0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]).bool()
    full, causal, prefix = attention_mask(flags)[:, 0]
    assert torch.equal(full, ones)
    assert torch.equal(causal, ones.tril())
    assert torch.equal(prefix, ones.tril() | (torch.arange(5) < 3))
    both = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    assert attention_mask(both).all(), "the first token starts a block either way"


def test_mask_drawn_in_the_docstring_is_the_mask():
    lines = inspect.getdoc(attention_mask).splitlines()
    start = next(i for i, line in enumerate(lines) if "starts_block 0" in line)
    flags = lines[start].split("starts_block")[1].split()
    rows = [line.split()[-16:] for line in lines[start + 1 : start + 5]]
    for block in range(4):
        part = slice(4 * block, 4 * block + 4)
        starts = torch.tensor([[flag == "1" for flag in flags[part]]])
        drawn = torch.tensor([[cell == "#" for cell in row[part]] for row in rows])
        assert torch.equal(attention_mask(starts)[0, 0], drawn)


def test_no_gradient_passes_where_the_mask_forbids():
    layer = fan_in(Attention(6, num_heads=4, num_kv_heads=2, head_dim=3)).double()
    starts = torch.tensor([[0, 0, 0, 1, 1]]).bool()
    is_token = torch.tensor([[1, 0, 1, 1, 1]]).bool()
    mask = attention_mask(starts, is_token)
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda source: layer(x, source=source, mask=mask), x
    )
    moves = jacobian[0, :, :, 0].abs().amax(dim=(1, 3))
    assert torch.equal(moves > 0, mask[0, 0])


# the layer


def by_hand(layer, x, source=None, mask=None, scale=None):
    """The oracle of the layer: the projections, einsum, the sum over heads."""
    source = x if source is None else source
    H = layer.head_dim
    q, k, v = (
        p(y).unflatten(-1, (-1, H)).transpose(1, 2)
        for p, y in zip(
            (layer.q_proj, layer.k_proj, layer.v_proj), (x, source, source), strict=True
        )
    )
    heads = oracle(q, k, v, mask, scale).to(x.dtype)
    slabs = layer.o_proj.weight.unflatten(1, (-1, H))
    mixed = torch.einsum("bnth,dnh->btd", heads, slabs)
    return mixed if layer.o_proj.bias is None else mixed + layer.o_proj.bias


def assert_layer_parity(layer_class):
    for bias in (False, True):
        for num_heads, num_kv_heads, head_dim in ((4, 4, 3), (4, 2, 5), (6, 1, 2)):
            sizes = {
                "num_heads": num_heads,
                "num_kv_heads": num_kv_heads,
                "head_dim": head_dim,
            }
            layer = fan_in(layer_class(12, **sizes, bias=bias)).double()
            right = fan_in(Attention(12, **sizes, bias=bias)).double()
            x = torch.randn(2, 5, 12, dtype=torch.float64)
            mask = attention_mask(torch.ones(2, 5, dtype=torch.bool))
            assert_close(layer(x), by_hand(right, x), 1e-12)
            assert_close(layer(x, mask=mask), by_hand(right, x, mask=mask), 1e-12)
            source = torch.randn(2, 7, 12, dtype=torch.float64)
            assert_close(layer(x, source=source), by_hand(right, x, source), 1e-12)


def test_layer_equals_its_formula():
    assert_layer_parity(Attention)


def test_heads_that_slice_the_input_fail_the_layer_test():
    with pytest.raises(AssertionError):
        assert_layer_parity(museum.HeadsSliceTheInput)


def test_scale_and_attend_are_used():
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 5}
    x = torch.randn(2, 6, 12)
    layer = fan_in(Attention(12, **sizes, scale=0.9))
    assert_close(layer(x), by_hand(layer, x, scale=0.9), 1e-5)
    seen = []

    def spy(q, k, v, mask, scale):
        seen.append((q.shape, k.shape, v.shape, mask, scale))
        return torch.zeros_like(q)

    layer = Attention(12, **sizes, attend=spy, scale=0.5)
    assert (layer(x) == 0).all()
    assert seen == [((2, 4, 6, 5), (2, 2, 6, 5), (2, 2, 6, 5), None, 0.5)]


@pytest.mark.parametrize("heads", [1, 6])
def test_one_query_a_row_equals_that_query_among_others(heads):
    """Its heads are stacked; with a mask for each head they are not."""
    sizes = 3, 6, 3, 4, 7, 8
    q, k, v = draw_heads(sizes)
    mask = draw_mask(sizes, heads=heads)
    together = attend(q, k, v, mask, 0.3)
    for query in range(4):
        alone = attend(
            q[:, :, [query]], k, v, mask[:, :, [query]].expand(3, heads, 1, 7), 0.3
        )
        assert_close(alone, together[:, :, [query]], 1e-12)


def test_keys_may_stand_elsewhere_than_queries():
    """Reading from a part of the tokens equals that part of the whole."""
    layer = fan_in(
        Attention(20, num_heads=4, num_kv_heads=2, head_dim=6).double(), seed=3
    )
    x = torch.randn(2, 5, 20, dtype=torch.float64)
    turns = torch.randn(1, 1, 5, 6, dtype=torch.float64)
    whole = layer(x, rotate=lambda heads: heads * turns)
    part = layer(
        x[:, -2:],
        source=x,
        rotate=lambda heads: heads * turns[:, :, -2:],
        rotate_source=lambda heads: heads * turns,
    )
    assert_close(part, whole[:, -2:], 1e-12)


def test_names_and_shapes_of_the_weights():
    layer = Attention(12, num_heads=4, num_kv_heads=2, head_dim=5)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "q_proj.weight": (20, 12),
        "k_proj.weight": (10, 12),
        "v_proj.weight": (10, 12),
        "o_proj.weight": (12, 20),
    }
    layer = Attention(12, num_heads=4, num_kv_heads=2, head_dim=5, bias=True)
    assert {n for n, _ in layer.named_parameters()} >= {"q_proj.bias", "o_proj.bias"}


def test_equals_nn_multihead_attention():
    ours = fan_in(Attention(24, num_heads=4, num_kv_heads=4, head_dim=6, bias=True))
    theirs = nn.MultiheadAttention(24, 4, batch_first=True)
    projections = ours.q_proj, ours.k_proj, ours.v_proj
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        theirs.out_proj.load_state_dict(ours.o_proj.state_dict())
    x, source = torch.randn(3, 7, 24), torch.randn(3, 5, 24)
    mask = attention_mask(torch.ones(3, 7, dtype=torch.bool))
    expected, weights = theirs(
        x, x, x, attn_mask=~mask[0, 0], average_attn_weights=False
    )
    assert_close(ours(x, mask=mask), expected, 2e-6)
    q, k = (split_heads(p(x), 6) for p in projections[:2])
    assert_close(attention_weights(q, k, mask), weights, 2e-6)
    assert_close(ours(x, source=source), theirs(x, source, source)[0], 2e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_equals_hugging_face_siglip(implementation):
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipAttention

    config = SiglipVisionConfig(hidden_size=48, num_attention_heads=4)
    config._attn_implementation = implementation
    theirs = fan_in(SiglipAttention(config)).eval()
    ours = Attention(48, num_heads=4, num_kv_heads=4, head_dim=12, bias=True)
    state = theirs.state_dict()
    ours.load_state_dict(
        {name.replace("out_proj", "o_proj"): value for name, value in state.items()}
    )
    x = torch.randn(2, 9, 48)
    assert_close(ours(x), theirs(x)[0], 2e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_equals_hugging_face_gemma(implementation):
    """Two key/value heads, four query heads, a head dim that is not width / heads."""
    from transformers import GemmaConfig
    from transformers.models.gemma.modeling_gemma import (
        GemmaAttention,
        GemmaRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    config = GemmaConfig(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=10
    )
    config._attn_implementation = implementation
    theirs = fan_in(GemmaAttention(config, layer_idx=0)).eval()
    ours = Attention(24, num_heads=4, num_kv_heads=2, head_dim=10)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 24)
    positions = torch.arange(6)[None].expand(2, 6)
    cos, sin = GemmaRotaryEmbedding(config)(x, positions)
    starts = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]]).bool()
    mask = attention_mask(starts)
    theirs_mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    expected, _ = theirs(x, position_embeddings=(cos, sin), attention_mask=theirs_mask)

    def rotate(heads):
        return apply_rotary_pos_emb(heads, heads, cos, sin)[0]

    assert_close(ours(x, mask=mask, rotate=rotate), expected, 2e-6)
    causal = attention_mask(torch.ones_like(starts))
    assert (ours(x, mask=causal, rotate=rotate) - expected).abs().max() > 0.1


class AppendingCache:
    k = v = None

    def update(self, k, v):
        if self.k is not None:
            k, v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        self.k, self.v = k, v
        return k, v


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 1000))
def test_any_split_with_a_cache_equals_one_causal_pass(lengths, seed):
    """The cache holds keys that are rotated already, and values that never are."""
    torch.manual_seed(seed)
    layer = fan_in(Attention(8, num_heads=4, num_kv_heads=2, head_dim=3)).double()
    total = sum(lengths)
    x = torch.randn(2, total, 8, dtype=torch.float64)
    factors = torch.rand(total, 1, dtype=torch.float64) + 0.5
    causal = attention_mask(torch.ones(2, total, dtype=torch.bool))
    whole = layer(x, mask=causal, rotate=lambda heads: heads * factors)
    cache, start, parts = AppendingCache(), 0, []
    assert isinstance(cache, Cache)
    for length in lengths:
        now = slice(start, start + length)
        part = layer(
            x[:, now],
            mask=causal[:, :, now, : start + length],
            rotate=lambda heads, now=now: heads * factors[now],
            cache=cache,
        )
        parts.append(part)
        start += length
    assert_close(torch.cat(parts, dim=1), whole, 1e-12)
    assert_close(cache.v, split_heads(layer.v_proj(x), 3), 1e-12)


def test_shuffled_tokens_shuffle_the_output():
    layer = fan_in(Attention(12, num_heads=4, num_kv_heads=2, head_dim=5)).double()
    x, order = torch.randn(2, 9, 12, dtype=torch.float64), torch.randperm(9)
    assert_close(layer(x[:, order]), layer(x)[:, order], 1e-12)
    causal = attention_mask(torch.ones(2, 9, dtype=torch.bool))
    moved = layer(x[:, order], mask=causal) - layer(x, mask=causal)[:, order]
    assert moved.abs().max() > 0.1


@given(st.integers(1, 6), st.integers(0, 1000))
def test_padding_never_matters(padding, seed):
    """Left or right, whatever stands in it."""
    torch.manual_seed(seed)
    layer = fan_in(Attention(8, num_heads=4, num_kv_heads=2, head_dim=3)).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    starts = torch.rand(1, 5) < 0.5
    expected = layer(x, mask=attention_mask(starts))
    filler = 100 * torch.randn(1, padding, 8, dtype=torch.float64)
    flags = torch.zeros(1, padding, dtype=torch.bool)
    for left in (True, False):
        parts = [(filler, x), (flags, starts), (flags, torch.ones_like(starts))]
        if not left:
            parts = [part[::-1] for part in parts]
        tokens, *both = (torch.cat(part, dim=1) for part in parts)
        out = layer(tokens, mask=attention_mask(*both))
        assert_close(out[:, padding:] if left else out[:, :5], expected, 1e-12)


# edges


def test_empty_batches_and_queries():
    layer = Attention(12, num_heads=4, num_kv_heads=2, head_dim=5)
    assert layer(torch.ones(0, 3, 12)).shape == (0, 3, 12)
    source = torch.ones(2, 3, 12)
    assert layer(torch.ones(2, 0, 12), source=source).shape == (2, 0, 12)
    assert attention_mask(torch.ones(0, 3).bool()).shape == (0, 1, 3, 3)
    assert attention_mask(torch.ones(2, 0).bool()).shape == (2, 1, 0, 0)


@pytest.mark.parametrize("which", [1, 2])
def test_nan_in_keys_and_values_is_passed_on(which):
    inputs = draw_heads(SIZES[1])
    inputs[which][0, 0, 2] = torch.nan
    assert attend(*inputs)[0, 0].isnan().all()
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[..., 2] = False
    assert attend(*inputs, mask)[0, 0].isnan().all(), "a mask is no shield: 0 x NaN"


def test_nan_in_a_query_stays_in_its_row_or_is_lost():
    """torch's kernel takes a short row of NaN for an empty one. The layer does not."""
    q, k, v = draw_heads(SIZES[1])
    expected = attend(q, k, v)
    q[0, 0, 1] = torch.nan
    value = attend(q, k, v)
    broken = value[0, 0, 1]
    assert broken.isnan().all() or (broken == 0).all()
    value[0, 0, 1] = expected[0, 0, 1]
    assert torch.equal(value, expected)
    layer = Attention(12, num_heads=4, num_kv_heads=2, head_dim=5)
    x = torch.randn(2, 3, 12)
    x[0, 1] = torch.nan
    assert layer(x)[0].isnan().all() and layer(x)[1].isfinite().all()


BAD_HEADS = {
    "three axes": lambda q, k, v: (q[0], k, v),
    "integers": lambda q, k, v: (q.long(), k, v),
    "batches differ": lambda q, k, v: (q, k[:1], v[:1]),
    "head dims differ": lambda q, k, v: (q, k[..., :3], v[..., :3]),
    "lengths differ": lambda q, k, v: (q, k, v[:, :, :3]),
    "K does not divide N": lambda q, k, v: (q[:, :3], k, v),
    "no keys": lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]),
    "no key heads": lambda q, k, v: (q, k[:, :0], v[:, :0]),
}


@pytest.mark.parametrize("spoil", BAD_HEADS.values(), ids=BAD_HEADS)
def test_bad_heads_are_a_value_error(spoil, as_user):
    q, k, v = spoil(*draw_heads(SIZES[2], torch.float32))
    with pytest.raises(ValueError, match="q, k, v: expected .* found"):
        attend(q, k, v)
    if k.shape == v.shape:
        with pytest.raises(ValueError, match="q, k, v: expected .* found"):
            attention_weights(q, k)


BAD_MASKS = {
    "numbers": torch.zeros(2, 1, 6, 9),
    "integers": torch.ones(2, 1, 6, 9).long(),
    "no axis for heads": torch.ones(2, 6, 9).bool(),
    "another batch": torch.ones(3, 1, 6, 9).bool(),
    "one row for the batch": torch.ones(1, 1, 6, 9).bool(),
    "key heads": torch.ones(2, 2, 6, 9).bool(),
    "queries": torch.ones(2, 1, 5, 9).bool(),
    "keys": torch.ones(2, 1, 6, 8).bool(),
    "one key": torch.ones(2, 1, 6, 1).bool(),
}


@pytest.mark.parametrize("mask", BAD_MASKS.values(), ids=BAD_MASKS)
def test_a_bad_mask_is_a_value_error(mask, as_user):
    q, k, v = draw_heads(SIZES[2], torch.float32)
    for call in (lambda: attend(q, k, v, mask), lambda: attention_weights(q, k, mask)):
        with pytest.raises(ValueError, match="mask: expected booleans .* found"):
            call()


@pytest.mark.parametrize(
    "flags",
    [
        (torch.ones(2, 3),),
        (torch.ones(2, 3).long(),),
        (torch.ones(3).bool(),),
        (torch.ones(2, 3, 1).bool(),),
        (torch.ones(2, 3).bool(), torch.ones(2, 4).bool()),
        (torch.ones(2, 3).bool(), torch.ones(1, 3).bool()),
        (torch.ones(2, 3).bool(), torch.ones(2, 3)),
    ],
)
def test_bad_flags_are_a_value_error(flags, as_user):
    with pytest.raises(ValueError, match="starts_block, is_token: .* found"):
        attention_mask(*flags)


def test_bad_sizes_are_a_value_error(as_user):
    with pytest.raises(ValueError, match="head_dim: expected .* found .*8.* and 3"):
        split_heads(torch.ones(2, 4, 8), 3)
    for head_dim, shape in ((0, (2, 4, 8)), (-2, (2, 4, 8)), (2, (4, 8))):
        with pytest.raises(ValueError, match="head_dim"):
            split_heads(torch.ones(shape), head_dim)
    with pytest.raises(ValueError, match=r"x: expected .* found \(4, 8\)"):
        merge_heads(torch.ones(4, 8))
    good = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 5}
    for bad in ({"num_kv_heads": 3}, {"num_heads": 0}, {"head_dim": 0}):
        with pytest.raises(ValueError, match="num_kv_heads.* found"):
            Attention(12, **(good | bad))
    with pytest.raises(ValueError, match="width"):
        Attention(0, **good)


def test_runs_on_the_meta_device():
    with torch.device("meta"):
        layer = Attention(2048, num_heads=8, num_kv_heads=1, head_dim=256)
        mask = attention_mask(torch.ones(2, 300).bool(), torch.ones(2, 300).bool())
        x = torch.ones(2, 300, 2048)
        assert layer(x, mask=mask).shape == x.shape
        assert layer(x, source=x[:, :7]).device.type == "meta"
        q, k = torch.ones(2, 8, 3, 4), torch.ones(2, 2, 5, 4)
        assert attention_weights(q, k).shape == (2, 8, 3, 5)


def test_compiles_without_a_break(as_user):
    layer = fan_in(Attention(12, num_heads=4, num_kv_heads=2, head_dim=5))
    x, starts = torch.randn(2, 6, 12), torch.ones(2, 6, dtype=torch.bool)

    def step(x, starts):
        return layer(x, mask=attention_mask(starts), cache=AppendingCache())

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert_close(compiled(x, starts), step(x, starts), 1e-6)


class StaticCache:
    """All slots exist from the start, as zeros; the mask hides the empty ones."""

    def __init__(self, B, K, S, H):
        self.k, self.v = torch.zeros(2, B, K, S, H)
        self.positions = None  # of the tokens that come next

    def update(self, k, v):
        self.k.index_copy_(2, self.positions, k)
        self.v.index_copy_(2, self.positions, v)
        return self.k, self.v


def test_a_cache_of_fixed_size_compiles_once_and_equals_one_causal_pass(as_user):
    layer = fan_in(Attention(12, num_heads=4, num_kv_heads=2, head_dim=5))
    x = torch.randn(2, 7, 12)
    factors = torch.rand(9, 1) + 0.5
    causal = attention_mask(torch.ones(2, 9, dtype=torch.bool))
    whole = layer(
        x, mask=causal[:, :, :7, :7], rotate=lambda heads: heads * factors[:7]
    )
    cache = StaticCache(2, 2, 9, 5)  # two slots more than tokens

    @torch.no_grad()
    def step(token, positions):
        cache.positions = positions
        return layer(
            token,
            mask=causal[:, :, positions],
            rotate=lambda heads: heads * factors[positions],
            cache=cache,
        )

    torch.compiler.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True, dynamic=False)
    parts = [compiled(x[:, :1], torch.tensor([0]))]
    with torch._dynamo.config.patch(error_on_recompile=True):
        parts += [compiled(x[:, t : t + 1], torch.tensor([t])) for t in range(1, 7)]
    assert_close(torch.cat(parts, dim=1), whole, 1e-6)
    assert (cache.k[:, :, 7:] == 0).all() and (cache.k[:, :, :7] != 0).all()


def test_causal_losses_in_one_pass_equal_many():
    layer = fan_in(Attention(8, num_heads=4, num_kv_heads=2, head_dim=3)).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)

    def run(x):
        return layer(x, mask=attention_mask(torch.ones(x.shape[:2]).bool()))

    whole = run(x)
    for t in range(1, 8):
        assert_close(run(x[:, :t])[:, -1], whole[:, t - 1], 1e-12)


def test_torch_has_the_top_left_trap():
    """Why attend takes a mask and not is_causal; if torch changes, so may we."""
    q, k, v = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 5, 4), torch.eye(5)[None, None]
    value = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert value.tolist() == [[[[1.0, 0, 0, 0, 0]]]]
