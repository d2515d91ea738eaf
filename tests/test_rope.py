"""Chapter 08: rotary positions against complex numbers, Hugging Face, and twins."""

import inspect
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgcore.attention import Attention, attention_mask
from pgcore.lab.museum import rope as museum
from pgcore.rope import apply_rope, rope_angles, rotation, token_positions
from tests.draws import assert_close, fan_in, name_of
from tests.reference.rope import reference_rope

ANGLE_TWINS = [museum.exponent_off_by_one, museum.angles_in_bfloat16]
TURN_TWINS = [museum.interleaved_pairs, museum.layouts_mixed]
LAYER_TWINS = [
    museum.ValuesTurnToo,
    museum.KeysTurnBackwards,
    museum.TurnsTheStream,
]

SIZES = [  # B, heads, T, H, base
    (1, 1, 1, 2, 10.0),
    (2, 3, 5, 6, 500.0),
    (3, 1, 7, 72, 1e6),
    (2, 8, 9, 256, 1e4),
]
INTEGERS = (torch.int64, torch.int32, torch.int16)


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def draw_positions(B, T, seed=0, last=8192):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, last, (B, T), generator=generator)


def exact_angles(positions, head_dim, base=1e4):
    pair = torch.arange(head_dim // 2, dtype=torch.float64)
    return positions[..., None].double() * base ** (-2 * pair / head_dim)


def exact_turns(positions, head_dim, base=1e4):
    angles = exact_angles(positions, head_dim, base)[:, None]
    return {"cos": angles.cos(), "sin": angles.sin()}


def turned_at(x, positions, base=1e4):
    return rotation(positions, x.shape[-1], base=base, dtype=x.dtype)(x)


def slots_as_positions(is_token):
    return torch.arange(is_token.shape[1]).expand_as(is_token)


def restarts_after_padding(is_token):
    count = is_token.long().cumsum(dim=-1)
    before = torch.where(is_token, 0, count).cummax(dim=-1).values
    return (count - before - 1).clamp(min=0)


COUNT_TWINS = [slots_as_positions, restarts_after_padding]


# angles


def assert_angles_parity(fn):
    """The formula in float64, at every position up to Gemma's last and far out."""
    positions = torch.arange(8192).view(2, -1)
    far = torch.tensor([[2**20, 2**24 - 1, -4351]])
    for _, _, _, H, base in SIZES:
        for places in (positions, far):
            angles = fn(places, H, base=base)
            expected = exact_angles(places, H, base)
            assert angles.dtype == torch.float32
            assert angles.shape == expected.shape
            assert ((angles - expected).abs() <= 1e-6 * expected.abs()).all()


def test_angles_are_the_formula():
    assert_angles_parity(rope_angles)


@pytest.mark.parametrize("twin", ANGLE_TWINS, ids=name_of)
def test_wrong_angles_fail_the_parity_test(twin):
    with pytest.raises(AssertionError):
        assert_angles_parity(twin)


@pytest.mark.parametrize("twin", ANGLE_TWINS, ids=name_of)
def test_wrong_angles_look_right(twin):
    assert list(inspect.signature(twin).parameters) == ["positions", "head_dim", "base"]
    positions = torch.arange(6).view(2, 3)
    assert twin(positions, 8).shape == rope_angles(positions, 8).shape
    assert twin(positions, 8).dtype == torch.float32


def test_a_buffer_is_right_until_the_model_is_cast():
    def by(dtype):
        def angles(positions, head_dim, *, base=1e4):
            return museum.SpeedsInABuffer(head_dim, base).to(dtype)(positions)

        return angles

    assert_angles_parity(by(torch.float32))
    with pytest.raises(AssertionError):
        assert_angles_parity(by(torch.bfloat16))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_positions_are_any_integers(dtype):
    positions = torch.tensor([[0, 3, 250], [7, 7, 1]])
    angles = rope_angles(positions.to(dtype), 16)
    assert torch.equal(angles, rope_angles(positions, 16))


def test_angles_are_float32_whatever_the_surroundings():
    positions = torch.tensor([[257, 4351, 8191]])
    expected = rope_angles(positions, 256)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rope_angles(positions, 256), expected)
        rotate = rotation(positions, 256)
        assert torch.equal(rotate.keywords["cos"], expected.cos()[:, None])
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            angles = rope_angles(positions, 256)
        finally:
            torch.set_default_dtype(torch.float32)
        assert angles.dtype == torch.float32 and torch.equal(angles, expected)


def test_float32_cannot_tell_positions_apart_from_two_to_the_24_on():
    last = torch.tensor([[2**24 - 1, 2**24, 2**24 + 1]])
    before, at, after = rope_angles(last, 2)[0]
    assert before != at and at == after


def test_bfloat16_positions_collide_from_256_on():
    positions = torch.arange(300)[None]
    angles = museum.angles_in_bfloat16(positions, 2)[0, :, 0]
    assert len(angles[:257].unique()) == 257
    assert angles[256] == angles[257]
    error = (museum.angles_in_bfloat16(torch.tensor([[4351]]), 256)).double()
    error = (error - exact_angles(torch.tensor([[4351]]), 256)).abs().max()
    assert abs(error - 10.7) < 0.05


# the turn


def assert_turn_parity(fn):
    """Complex multiplication, in float64, values and gradients."""
    for seed, (B, heads, T, H, base) in enumerate(SIZES):
        x, push = draw(2, B, heads, T, H, seed=seed)
        positions = draw_positions(B, T, seed)
        turns = exact_turns(positions, H, base)
        inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours, theirs = (
            fn(inputs[0], **turns),
            reference_rope(inputs[1], positions, base),
        )
        assert_close(ours, theirs, 1e-12)
        slopes = torch.autograd.grad((ours, theirs), inputs, (push, push))
        assert_close(*slopes, 1e-12)


def test_the_turn_is_complex_multiplication():
    assert_turn_parity(apply_rope)


@pytest.mark.parametrize("twin", TURN_TWINS, ids=name_of)
def test_wrong_turns_fail_the_parity_test(twin):
    with pytest.raises(AssertionError):
        assert_turn_parity(twin)


@pytest.mark.parametrize("twin", TURN_TWINS, ids=name_of)
def test_wrong_turns_look_right(twin):
    assert list(inspect.signature(twin).parameters) == ["x", "cos", "sin"]
    x, turns = draw(2, 3, 4, 8), exact_turns(draw_positions(2, 4), 8)
    assert twin(x, **turns).shape == x.shape
    turns = exact_turns(torch.zeros(2, 4).long(), 8)
    assert_close(twin(x, **turns), x, 1e-15)  # place 0 never tells


def test_the_reference_is_the_matrix_of_the_formula():
    """Two features by hand: cos, -sin, sin, cos."""
    x, angle = torch.tensor([[[[3.0, 4.0]]]]), 7.0
    c, s = math.cos(angle), math.sin(angle)
    expected = torch.tensor([[[[3 * c - 4 * s, 3 * s + 4 * c]]]])
    assert_close(reference_rope(x, torch.tensor([[7]])), expected, 1e-6)


def test_gradients_in_float64():
    x = draw(2, 2, 3, 6).requires_grad_()
    angles = draw(2, 1, 3, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, angles: apply_rope(x, angles.cos(), angles.sin()), (x, angles)
    )


def test_the_gradient_is_the_turn_back():
    x, push = draw(2, 2, 3, 5, 8)
    turns = exact_turns(draw_positions(2, 5), 8)
    x = x.requires_grad_()
    (slope,) = torch.autograd.grad(apply_rope(x, **turns), x, push)
    assert_close(slope, apply_rope(push, turns["cos"], -turns["sin"]), 1e-14)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize("wide", (False, True), ids=("same dtype", "wider turns"))
def test_the_result_has_the_dtype_of_x(dtype, wide):
    x, positions = draw(2, 3, 5, 64), torch.tensor([[0, 1, 257, 4351, 8191]] * 2)
    rotate = rotation(positions, 64, dtype=torch.float32 if wide else dtype)
    turned = rotate(x.to(dtype))
    assert turned.dtype == dtype
    rounding = torch.finfo(dtype).eps * (1 if wide else 3) + 1e-3
    expected = reference_rope(x.to(dtype), positions)
    assert_close(turned, expected, rounding)
    if wide:  # rounded once, at the end
        in_float32 = apply_rope(x.to(dtype).float(), **rotate.keywords)
        assert torch.equal(turned, in_float32.to(dtype))


def test_a_nan_spoils_its_own_pair_only():
    x = draw(1, 2, 3, 8)
    x[0, 1, 2, 5] = torch.nan  # pair 1: features 1 and 5
    turned = apply_rope(x, **exact_turns(draw_positions(1, 3), 8))
    assert turned.isnan().nonzero().tolist() == [[0, 1, 2, 1], [0, 1, 2, 5]]


@pytest.mark.parametrize(("B", "heads", "T"), [(0, 2, 3), (2, 2, 0), (1, 0, 4)])
def test_empty_batches_stay_empty(B, heads, T):
    x = torch.zeros(B, heads, T, 8)
    assert turned_at(x, torch.zeros(B, T).long()).shape == x.shape


def test_nothing_is_changed_in_place():
    x, positions = draw(2, 3, 4, 8), draw_positions(2, 4)
    before = x.clone(), positions.clone()
    turned_at(x, positions)
    assert torch.equal(x, before[0]) and torch.equal(positions, before[1])


# properties


places = st.integers(0, 8191)


@given(places, places, st.integers(-8191, 8191), st.integers(0, 10**6))
def test_scores_know_the_distance_only(m, n, offset, seed):
    q, k = draw(2, 1, 1, 1, 32, seed=seed)
    here, there = (
        reference_rope(q, torch.tensor([[m + o]]))
        * reference_rope(k, torch.tensor([[n + o]]))
        for o in (0, offset)
    )
    assert_close(there.sum(), here.sum(), 1e-9)
    ours = turned_at(q.float(), torch.tensor([[m + offset]]))
    ours = ours * turned_at(k.float(), torch.tensor([[n + offset]]))
    # float32: two angles of up to 16 382, each rounded
    assert abs(ours.sum() - here.sum()) < 7e-3 * q.norm() * k.norm()


@given(st.integers(-8191, 8191), st.integers(-8191, 8191), st.integers(0, 10**6))
def test_turns_add_up_and_keep_lengths(a, b, seed):
    x = draw(1, 2, 1, 16, dtype=torch.float32, seed=seed)
    first, second = (torch.tensor([[place]]) for place in (a, b))
    once = turned_at(x, first + second)
    assert_close(turned_at(turned_at(x, first), second), once, 1e-2)
    assert_close(once.norm(dim=-1), x.norm(dim=-1), 1e-6)
    assert_close(turned_at(turned_at(x, first), -first), x, 1e-5)
    assert torch.equal(turned_at(x, 0 * first), x)


def test_heads_and_rows_are_turned_alone():
    x, positions = draw(3, 4, 5, 16), draw_positions(3, 5)
    whole = turned_at(x, positions)
    for b in range(3):
        row = turned_at(x[b : b + 1], positions[b : b + 1])
        assert torch.equal(row[0], whole[b])
        for head in range(4):
            one = turned_at(x[b : b + 1, head : head + 1], positions[b : b + 1])
            assert torch.equal(one[0, 0], whole[b, head])


@pytest.mark.parametrize("head_dim", (2, 4, 6, 64, 256))
def test_the_permutation_theorem(head_dim):
    x, turns = draw(2, 3, 7, head_dim), exact_turns(draw_positions(2, 7), head_dim)
    every = torch.arange(head_dim)
    even_first = torch.cat((every[::2], every[1::2]))
    permuted = museum.interleaved_pairs(x, **turns)[..., even_first]
    assert_close(permuted, apply_rope(x[..., even_first], **turns), 1e-14)
    if head_dim > 2:
        with pytest.raises(AssertionError):
            assert_close(permuted, apply_rope(x, **turns), 1e-3)


@pytest.mark.parametrize("start", (0, 1, 100))
def test_a_common_start_changes_nothing(start):
    layer, x = (
        fan_in(Attention(20, num_heads=4, num_kv_heads=2, head_dim=6)),
        draw(2, 7, 20, dtype=torch.float32),
    )
    positions, mask = torch.arange(7).expand(2, 7), causal(2, 7)
    here = layer(x, mask=mask, rotate=rotation(positions, 6))
    there = layer(x, mask=mask, rotate=rotation(positions + start, 6))
    assert_close(there, here, 1e-5)


# Hugging Face


def hugging_face(head_dim=256, **sizes):
    from transformers import GemmaConfig
    from transformers.models.gemma import modeling_gemma

    config = GemmaConfig(head_dim=head_dim, attn_implementation="eager", **sizes)
    return modeling_gemma, config


@pytest.mark.parametrize("head_dim", (2, 6, 72, 256))
@pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str
)
def test_rotation_is_hugging_faces(head_dim, dtype):
    """The same bits but for cosines, whose last bit depends on the machine."""
    gemma, config = hugging_face(head_dim)
    q = draw(3, 4, 200, head_dim, dtype=torch.float32).to(dtype)
    k = draw(3, 2, 200, head_dim, dtype=torch.float32, seed=1).to(dtype)
    positions, one = draw_positions(3, 200), torch.tensor([[1]])
    angles = gemma.GemmaRotaryEmbedding(config)
    assert torch.equal(rope_angles(one, head_dim)[0, 0], angles.inv_freq)
    products = positions[..., None].float() * angles.inv_freq
    assert torch.equal(rope_angles(positions, head_dim), products)
    rotate = rotation(positions, head_dim, dtype=dtype)
    for name, theirs in zip(("cos", "sin"), angles(q, positions), strict=True):
        ours = rotate.keywords[name][:, 0]
        assert ours.dtype == theirs.dtype == dtype
        half = theirs[..., : head_dim // 2]
        assert_close(ours, half, torch.finfo(dtype).eps)
        # cosines may differ by a rounding here and there, not everywhere
        assert (ours != half).double().mean() < 0.01 or dtype == torch.float32
    turns = (rotate.keywords[name][:, 0].repeat(1, 1, 2) for name in ("cos", "sin"))
    expected = gemma.apply_rotary_pos_emb(q, k, *turns)
    for ours, theirs in zip((rotate(q), rotate(k)), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_base_is_hugging_faces_rope_theta():
    gemma, config = hugging_face(16)
    config.rope_parameters["rope_theta"] = 1_000_000.0
    theirs, one = gemma.GemmaRotaryEmbedding(config), torch.tensor([[1]])
    assert torch.equal(rope_angles(one, 16, base=1e6)[0, 0], theirs.inv_freq)
    positions, x = draw_positions(2, 9), draw(2, 1, 9, 16, dtype=torch.float32)
    cos, _ = theirs(x, positions)
    rotate = rotation(positions, 16, base=1e6)
    assert_close(rotate.keywords["cos"][:, 0], cos[..., :8], 2e-7)


def test_a_layer_is_hugging_faces():
    """Two kv heads with two queries each, head_dim unlike width / heads, padding."""
    gemma, config = hugging_face(
        12, hidden_size=40, num_attention_heads=4, num_key_value_heads=2
    )
    theirs = fan_in(gemma.GemmaAttention(config, layer_idx=0).eval())
    ours = Attention(40, num_heads=4, num_kv_heads=2, head_dim=12)
    ours.load_state_dict(theirs.state_dict())
    x = draw(3, 11, 40, dtype=torch.float32)
    is_token = torch.arange(11) >= torch.tensor([0, 3, 6])[:, None]
    positions = token_positions(is_token)
    mask = attention_mask(torch.ones_like(is_token), is_token)
    turns = gemma.GemmaRotaryEmbedding(config)(x, positions)
    hidden = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    expected, _ = theirs(x, position_embeddings=turns, attention_mask=hidden)
    actual = ours(x, mask=mask, rotate=rotation(positions, 12))
    assert_close(actual[is_token], expected[is_token], 5e-6)


# in a layer


def causal(B, T):
    return attention_mask(torch.ones(B, T, dtype=torch.bool))


def assert_layer_parity(kind):
    """einsum and torch's softmax on queries and keys turned in complex128."""
    layer = fan_in(kind(40, num_heads=6, num_kv_heads=3, head_dim=8)).double()
    x, positions, mask = draw(2, 9, 40), draw_positions(2, 9), causal(2, 9)
    rotate = partial(apply_rope, **exact_turns(positions, 8))
    q, k, v = (
        projection(x).view(2, 9, -1, 8).transpose(1, 2)
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    q, k = reference_rope(q, positions), reference_rope(k, positions)
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    scores = torch.einsum("bnth,bnsh->bnts", q, k) / math.sqrt(8)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    heads = torch.einsum("bnts,bnsh->btnh", weights, v).flatten(2)
    assert_close(layer(x, mask=mask, rotate=rotate), layer.o_proj(heads), 1e-12)


@pytest.mark.parametrize("kind", (Attention, museum.TurnsItsOwnWay), ids=name_of)
def test_the_layer_turns_queries_and_keys(kind):
    assert_layer_parity(kind)


@pytest.mark.parametrize("twin", LAYER_TWINS, ids=name_of)
def test_wrong_layers_fail_the_parity_test(twin):
    with pytest.raises(AssertionError):
        assert_layer_parity(twin)


@pytest.mark.parametrize("twin", LAYER_TWINS, ids=name_of)
def test_wrong_layers_look_right(twin):
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    layer = twin(40, **sizes)
    right = Attention(40, **sizes)
    right.load_state_dict(layer.state_dict())
    x, start = draw(2, 5, 40, dtype=torch.float32), torch.zeros(2, 5).long()
    output = layer(x, mask=causal(2, 5), rotate=rotation(start, 8))
    assert_close(output, right(x, mask=causal(2, 5)), 1e-6)  # place 0 never tells


class AppendingCache:
    k = v = None

    def update(self, k, v):
        if self.k is not None:
            k, v = torch.cat((self.k, k), 2), torch.cat((self.v, v), 2)
        self.k, self.v = k, v
        return k, v


def assert_steps_parity(count):
    """Token by token with remembered keys, or in pieces, is one pass."""
    layer = fan_in(Attention(20, num_heads=4, num_kv_heads=2, head_dim=6))
    x = draw(2, 9, 20, dtype=torch.float32)
    is_token = torch.arange(9) >= torch.tensor([0, 3])[:, None]
    mask = attention_mask(torch.ones_like(is_token), is_token)
    positions = token_positions(is_token)
    whole = layer(x, mask=mask, rotate=rotation(positions, 6))
    for cuts in ((0, 9), (0, 4, 9), (0, 1, 5, 6, 9), range(10)):
        cache, outputs = AppendingCache(), []
        for start, end in zip(cuts, cuts[1:], strict=False):
            slots = torch.arange(start, end)
            rotate = rotation(count(is_token, slots), 6)
            rows = mask[:, :, slots, :end]
            outputs.append(layer(x[:, slots], mask=rows, rotate=rotate, cache=cache))
        output = torch.cat(outputs, dim=1)
        assert_close(output[is_token], whole[is_token], 1e-6)


def test_stored_keys_are_never_turned_again():
    assert_steps_parity(lambda is_token, slots: token_positions(is_token)[:, slots])


def test_counting_only_the_step_fails_the_parity_test():
    with pytest.raises(AssertionError):
        assert_steps_parity(lambda is_token, slots: token_positions(is_token[:, slots]))


# positions


@given(st.integers(1, 4), st.integers(0, 12), st.integers(0, 10**6))
def test_positions_count_tokens(B, S, seed):
    generator = torch.Generator().manual_seed(seed)
    is_token = torch.rand(B, S, generator=generator) < 0.6
    positions = token_positions(is_token)
    assert positions.shape == (B, S) and positions.dtype == torch.int64
    for b in range(B):
        seen = 0
        for s in range(S):
            seen += bool(is_token[b, s])
            assert positions[b, s] == max(seen - 1, 0)


def assert_padding_parity(count):
    """A row with padding anywhere gives what the row alone gives."""
    layer = fan_in(Attention(20, num_heads=4, num_kv_heads=2, head_dim=6))
    x = draw(1, 10, 20, dtype=torch.float32)
    for padding in ((), (0, 1, 2), (4, 5), (7, 8, 9), (0, 3, 6)):
        is_token = torch.ones(1, 10, dtype=torch.bool)
        is_token[0, list(padding)] = False
        text = x[is_token][None]
        alone = layer(
            text,
            mask=causal(1, text.shape[1]),
            rotate=rotation(torch.arange(text.shape[1])[None], 6),
        )
        mask = attention_mask(torch.ones_like(is_token), is_token)
        padded = layer(x, mask=mask, rotate=rotation(count(is_token), 6))
        assert_close(padded[is_token], alone[0], 1e-6)


def test_padding_has_no_place():
    assert_padding_parity(token_positions)


@pytest.mark.parametrize("twin", COUNT_TWINS, ids=name_of)
def test_wrong_counts_fail_the_parity_test(twin):
    with pytest.raises(AssertionError):
        assert_padding_parity(twin)


@pytest.mark.parametrize("count", [token_positions, *COUNT_TWINS], ids=name_of)
def test_all_agree_without_padding(count):
    is_token = torch.ones(2, 5, dtype=torch.bool)
    assert count(is_token).tolist() == [[0, 1, 2, 3, 4]] * 2


# where it runs


def test_on_meta():
    with torch.device("meta"):
        is_token = torch.ones(2, 5, dtype=torch.bool)
        x = torch.empty(2, 3, 5, 8, dtype=torch.bfloat16)
    positions = token_positions(is_token)
    turned = rotation(positions, 8, dtype=torch.bfloat16)(x)
    assert turned.device.type == "meta"
    assert (turned.shape, turned.dtype) == (x.shape, x.dtype)


def test_compiles_once_for_all_positions(as_user):
    def step(x, is_token, slots):
        positions = token_positions(is_token)[:, slots]
        return rotation(positions, 8, dtype=x.dtype)(x)

    x, is_token = draw(2, 3, 1, 8).float(), torch.ones(2, 50, dtype=torch.bool)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend="eager")
    compiled(x, is_token, torch.tensor([0]))
    with torch.compiler.set_stance("fail_on_recompile"):
        for slot in (1, 2, 17, 49):
            slots = torch.tensor([slot])
            assert_close(compiled(x, is_token, slots), step(x, is_token, slots), 1e-6)


# errors


@pytest.mark.usefixtures("as_user")
class TestErrors:
    @pytest.mark.parametrize(
        "positions",
        [
            torch.zeros(1, 3),
            torch.zeros(1, 3, dtype=torch.bfloat16),
            torch.zeros(1, 3, dtype=torch.bool),
            torch.zeros(1, 3, dtype=torch.complex64),
            torch.zeros(3, dtype=torch.long),
            torch.zeros(1, 1, 3, dtype=torch.long),
        ],
        ids=lambda p: f"{p.dtype} {tuple(p.shape)}",
    )
    @pytest.mark.parametrize("fn", (rope_angles, rotation), ids=name_of)
    def test_positions_are_integers_of_two_axes(self, fn, positions):
        with pytest.raises(ValueError, match="positions: expected integers") as error:
            fn(positions, 8)
        assert str(positions.dtype) in str(error.value)
        assert str(tuple(positions.shape)) in str(error.value)

    @pytest.mark.parametrize("head_dim", (-2, 0, 1, 7))
    def test_head_dim_is_even(self, head_dim):
        with pytest.raises(ValueError, match=f"head_dim, base.*found {head_dim} and"):
            rope_angles(torch.zeros(1, 3).long(), head_dim)

    @pytest.mark.parametrize("base", (0.0, -1.0, float("nan")))
    def test_base_is_positive(self, base):
        with pytest.raises(ValueError, match=f"head_dim, base.*found 8 and {base}"):
            rope_angles(torch.zeros(1, 3).long(), 8, base=base)

    @pytest.mark.parametrize(
        ("x", "cos", "sin"),
        [
            ((2, 3, 8), (2, 1, 5, 4), (2, 1, 5, 4)),  # no heads
            ((2, 3, 5, 8), (2, 5, 4), (2, 5, 4)),  # no axis for them
            ((2, 3, 5, 8), (2, 1, 5, 8), (2, 1, 5, 8)),  # Hugging Face's full width
            ((2, 3, 5, 8), (2, 1, 5, 4), (2, 1, 5, 3)),
            ((2, 3, 5, 8), (2, 1, 4, 4), (2, 1, 4, 4)),  # other tokens
            ((2, 3, 5, 8), (1, 1, 5, 4), (1, 1, 5, 4)),  # other batch
            ((2, 3, 5, 7), (2, 1, 5, 3), (2, 1, 5, 3)),  # odd
        ],
    )
    def test_shapes_of_the_turn(self, x, cos, sin):
        x, cos, sin = (torch.zeros(shape) for shape in (x, cos, sin))
        with pytest.raises(ValueError, match="x, cos, sin: expected") as error:
            apply_rope(x, cos, sin)
        assert str(x.shape[-1]) in str(error.value)

    def test_x_holds_floats(self):
        x, turn = torch.zeros(2, 3, 5, 8).long(), torch.zeros(2, 1, 5, 4)
        with pytest.raises(ValueError, match="x, cos, sin: expected floats"):
            apply_rope(x, turn, turn)

    @pytest.mark.parametrize("dtype", (torch.long, torch.complex64), ids=str)
    def test_cosines_and_sines_are_real_floats(self, dtype):
        x, turn = torch.zeros(2, 3, 5, 8), torch.zeros(2, 1, 5, 4)
        for turns in ((turn, turn.to(dtype)), (turn.to(dtype), turn)):
            with pytest.raises(ValueError, match="x, cos, sin: expected floats"):
                apply_rope(x, *turns)

    def test_one_row_of_positions_for_a_batch_names_the_cure(self):
        rotate = rotation(torch.arange(5)[None], 8)
        with pytest.raises(ValueError, match=r"positions\.expand\(B, -1\)"):
            rotate(torch.zeros(2, 3, 5, 8))

    def test_a_rotation_of_other_tokens_is_refused(self):
        rotate = rotation(torch.arange(5)[None], 8)
        with pytest.raises(ValueError, match="x, cos, sin"):
            rotate(torch.zeros(1, 2, 6, 8))
        with pytest.raises(ValueError, match="x, cos, sin"):
            rotate(torch.zeros(1, 2, 5, 10))

    @pytest.mark.parametrize(
        "is_token",
        [torch.ones(2, 3), torch.ones(2, 3).long(), torch.ones(3).bool()],
        ids=lambda t: f"{t.dtype} {tuple(t.shape)}",
    )
    def test_is_token_is_boolean(self, is_token):
        with pytest.raises(ValueError, match="is_token: expected booleans") as error:
            token_positions(is_token)
        assert str(is_token.dtype) in str(error.value)


def test_wrong_shapes_are_caught_by_the_annotations():
    from jaxtyping import TypeCheckError

    with pytest.raises(TypeCheckError):
        rope_angles(torch.zeros(1, 3), 8)
    with pytest.raises(TypeCheckError):
        token_positions(torch.ones(2, 3).long())
    with pytest.raises(TypeCheckError):
        apply_rope(torch.zeros(2, 3, 5, 8), torch.zeros(2, 5, 4), torch.zeros(2, 5, 4))
