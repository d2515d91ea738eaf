"""Chapter 09: the cache against one pass without it, Hugging Face, its wrong twins."""

import gc
import re
import weakref
from copy import deepcopy
from functools import cache as cache_of_calls
from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from pgcore.attention import Attention, Cache, attend, attention_mask
from pgcore.kv_cache import KVCache
from pgcore.lab.museum import kv_cache as museum
from pgcore.rope import token_positions
from tests.reference.kv_cache import (
    AppendCache,
    ToyDecoder,
    draw_weights,
    left_padded,
    positions_of,
    read_in_pieces,
    rows_of,
    rows_so_far,
    write,
    write_obviously,
)

SLOTS = 14
TOLERANCE = 5e-6  # of the largest logit

SIZES = {"depth": 3, "batch_size": 2, "num_kv_heads": 2, "head_dim": 16}


def new_cache(kind=KVCache, **changes):
    return kind(**({**SIZES, "num_slots": SLOTS} | changes))


@cache_of_calls
def toy(**changes):
    return draw_weights(ToyDecoder(**changes), seed=6).eval()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def draw_ids(batch, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(64, (batch, tokens), generator=generator)


def slots_with_fillers(fillers, num_slots=SLOTS):
    """True from the first token of each row on; free slots are tokens to come."""
    return torch.arange(num_slots) >= torch.tensor(fillers)[:, None]


def whole_pass(model, ids, is_token, starts_block=None):
    """The oracle: all tokens at once, no cache."""
    now = is_token[:, : ids.shape[1]]
    starts = torch.ones_like(now)
    if starts_block is not None:
        starts = starts_block[:, : ids.shape[1]]
    mask = attention_mask(starts, now)
    return model.logits(model(ids, positions=token_positions(now), mask=mask))


def assert_close(actual, expected, is_token=None):
    assert actual.shape == expected.shape
    error = (actual - expected).abs()
    if is_token is not None:
        error = error[is_token]
    assert error.max() <= TOLERANCE * max(1.0, expected.abs().max().item())


# parity


def assert_parity(cache=KVCache, model=None, cuts=((6,), (1,), (3, 2), (12,)), **ways):
    """Logits of the tokens, for ragged prompts, in pieces and then one by one."""
    model = model or toy()
    ids, is_token = draw_ids(2, 12), slots_with_fillers((0, 4))
    expected = whole_pass(toy(), ids, is_token)
    for first in cuts:
        lengths = [*first, *[1] * (12 - sum(first))]
        made = new_cache(cache)
        actual = read_in_pieces(model, ids, is_token, lengths, made, **ways)
        assert_close(actual, expected, is_token[:, :12])


def test_the_static_cache_equals_no_cache():
    assert_parity()


def test_the_growing_cache_equals_no_cache():
    assert_parity(cache=lambda depth, **_: AppendCache(depth), rows=rows_so_far)


TWINS = {
    "positions_restart": {"positions": museum.positions_restart},
    "rows_one_slot_ahead": {"rows": museum.rows_one_slot_ahead},
    "KeysTurnedAgain": {"attention": museum.KeysTurnedAgain},
    "causal_flag_for_mask": {"attend": museum.causal_flag_for_mask},
    "UninitialisedCache": {"cache": museum.UninitialisedCache},
}


@pytest.mark.parametrize("twin", TWINS)
def test_a_wrong_twin_fails_the_parity_test(twin):
    changes = dict(TWINS[twin])
    parts = {k: changes.pop(k) for k in ("attention", "attend") if k in changes}
    with pytest.raises(AssertionError):
        assert_parity(model=toy(**parts), **changes)


@pytest.mark.parametrize("twin", ["positions_restart", "KeysTurnedAgain"])
def test_why_the_first_token_is_no_test(twin):
    """In one piece these twins are right; only decoding shows them."""
    changes = dict(TWINS[twin])
    parts = {k: changes.pop(k) for k in ("attention",) if k in changes}
    ids, every = draw_ids(2, 12), slots_with_fillers((0, 0))
    logits = read_in_pieces(
        toy(**parts), ids, every, [12], new_cache(), rows=rows_of, **changes
    )
    assert_close(logits, whole_pass(toy(), ids, every))


@st.composite
def cases(draw):
    """Ragged rows, cut anywhere, behind a prefix block of any length or none."""
    tokens = draw(st.integers(1, SLOTS))
    rows = draw(st.integers(1, 3))
    fillers = draw(st.lists(st.integers(0, tokens - 1), min_size=rows, max_size=rows))
    prefix = draw(st.integers(0, tokens))
    lengths, left = [prefix] if prefix else [], tokens - prefix
    while left:
        lengths.append(draw(st.integers(1, left)))
        left -= lengths[-1]
    return fillers, prefix, lengths, draw(st.integers(0, 1000))


@given(cases(), st.booleans())
def test_every_cut_of_every_batch_equals_no_cache(case, dirty):
    fillers, prefix, lengths, seed = case
    ids, is_token = draw_ids(len(fillers), sum(lengths), seed), None
    is_token = slots_with_fillers(fillers)
    starts_block = (torch.arange(SLOTS) >= prefix).expand_as(is_token)
    cache = new_cache(batch_size=len(fillers), depth=2)
    if dirty:
        cache.keys.normal_(std=100)
        cache.values.normal_(std=100)
    model = toy(depth=2)
    actual = read_in_pieces(
        model, ids, is_token, lengths, cache, starts_block=starts_block
    )
    expected = whole_pass(model, ids, is_token, starts_block)
    assert_close(actual, expected, is_token[:, : sum(lengths)])


@given(st.integers(0, 5), st.integers(1, 6), st.integers(0, 1000))
def test_the_number_of_fillers_never_matters(fillers, tokens, seed):
    ids = draw_ids(1, tokens, seed)
    model = toy(depth=2)
    alone = read_in_pieces(
        model, ids, slots_with_fillers((0,)), 1, new_cache(batch_size=1, depth=2)
    )
    padded = F.pad(ids, (fillers, 0), value=7)
    among = read_in_pieces(
        model,
        padded,
        slots_with_fillers((fillers,)),
        [fillers + 1] + [1] * (tokens - 1),
        new_cache(batch_size=1, depth=2),
    )
    assert_close(among[:, fillers:], alone)


def test_a_dirty_cache_equals_a_clean_one_bit_for_bit():
    ids, is_token = draw_ids(2, 12), slots_with_fillers((0, 4))
    cache = new_cache()
    clean = read_in_pieces(toy(), ids, is_token, [5] + [1] * 7, cache)
    cache.keys.normal_(std=1e6)
    cache.values.normal_(std=1e6)
    cache.clear()
    assert cache.num_tokens == 0 and len(cache.slots) == 0
    dirty = read_in_pieces(toy(), ids, is_token, [5] + [1] * 7, cache)
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("left", [torch.nan, torch.inf])
def test_clear_does_not_forget_a_nan(left):
    """As its docstring says: until the slot is written, or the cache is new."""
    ids, is_token = draw_ids(2, 12), slots_with_fillers((0, 0))
    expected = whole_pass(toy(), ids, is_token)
    cache = new_cache()
    cache.reserve(SLOTS)
    bad = torch.zeros(2, 2, SLOTS, 16)
    bad[:, :, 7] = left
    for layer in cache.layers:
        layer.update(bad, bad)
    cache.clear()
    logits = read_in_pieces(toy(), ids, is_token, [5] + [1] * 7, cache)
    assert logits[:, :7].isnan().any()
    assert cache.keys[:, :, :, 7].isnan().any()  # the NaN went on from there
    cache = new_cache()
    assert_close(read_in_pieces(toy(), ids, is_token, [12], cache), expected)


def test_keys_behind_an_edit_are_stale_from_the_second_layer_on():
    ids, is_token = draw_ids(2, 6), slots_with_fillers((0, 0))
    edited = ids.clone()
    edited[:, 1] = (ids[:, 1] + 1) % 64
    patched, right = new_cache(), new_cache()
    read_in_pieces(toy(), ids, is_token, [6], patched)
    patched.clear()
    patched.reserve(1)  # slot 0 stays, slot 1 is written anew
    mask = attention_mask(torch.ones_like(is_token), is_token)
    slots = patched.reserve(1)
    positions = token_positions(is_token)[:, slots]
    toy()(edited[:, 1:2], positions=positions, mask=mask[:, :, slots], cache=patched)
    read_in_pieces(toy(), edited, is_token, [6], right)
    apart = (patched.keys - right.keys).abs().amax(dim=(1, 2, 4))[:, :6]
    assert (apart[0] < 1e-5).all() and (apart[:, :2] < 1e-5).all()
    assert (apart[1:, 2:] > 1e-4).all()


def test_reserve_and_clear_touch_no_number():
    cache = new_cache()
    cache.keys.fill_(3.0)
    cache.values.fill_(4.0)
    cache.reserve(5)
    cache.clear()
    cache.reserve(2)
    assert (cache.keys == 3).all() and (cache.values == 4).all()


def test_the_slots_hold_what_hugging_face_keeps():
    ours, theirs = new_cache(depth=2), DynamicCache()
    for tokens in (5, 1, 1, 3):
        k, v = torch.randn(2, 2, 2, 2, tokens, 16).unbind()
        ours.reserve(tokens)
        for layer in range(2):
            all_k, all_v = ours.layers[layer].update(k[layer], v[layer])
            their_k, their_v = theirs.update(k[layer], v[layer], layer)
            now = ours.num_tokens
            assert torch.equal(all_k[:, :, :now], their_k)
            assert torch.equal(all_v[:, :, :now], their_v)
            assert not all_k[:, :, now:].any() and not all_v[:, :, now:].any()


def test_bfloat16_equals_one_pass_in_bfloat16():
    """One piece and single tokens differ by rounding, and by no more."""
    model = deepcopy(toy()).bfloat16()
    ids, is_token = draw_ids(2, 12), slots_with_fillers((0, 4))
    exact = whole_pass(toy(), ids, is_token)
    cache = new_cache(dtype=torch.bfloat16)
    cached = read_in_pieces(model, ids, is_token, [6] + [1] * 6, cache)
    whole = whole_pass(model, ids, is_token)
    assert cached.dtype == torch.bfloat16
    of_tokens = is_token[:, :12]
    rounding = (whole.float() - exact)[of_tokens].abs().mean()
    assert (cached.float() - exact)[of_tokens].abs().mean() < 1.5 * rounding


# a prefix that is read in both directions


@pytest.mark.parametrize("cache", ["static", "grows"])
@pytest.mark.parametrize("lengths", [[4, 4], [1] * 8, [7, 1]])
def test_a_prefix_lm_cannot_be_read_in_pieces(cache, lengths):
    ids, every = draw_ids(1, 12), slots_with_fillers((0,), 12)
    starts_block = (torch.arange(12) >= 8)[None]
    expected = whole_pass(toy(), ids, every, starts_block)

    def read(first, starts):
        made = new_cache(batch_size=1, num_slots=12)
        rows = rows_of
        if cache == "grows":
            made, rows = AppendCache(3), rows_so_far
        pieces = [*first, 1, 1, 1, 1]
        return read_in_pieces(
            toy(), ids, every, pieces, made, starts_block=starts, rows=rows
        )

    assert_close(read([8], starts_block), expected)
    wrong = (read(lengths, starts_block) - expected)[:, 8:].abs().max()
    assert wrong > 0.3 * expected.std()
    assert_close(read(lengths, torch.ones_like(every)), whole_pass(toy(), ids, every))


# writing


PROMPTS = [[5, 17, 40], [9, 33, 2, 61, 8, 12, 50], [21, 22, 23, 24]]


def answers(layout, prompts, write=write, num_new=7):
    ids, is_token = layout(prompts)
    is_token = F.pad(is_token, (0, SLOTS - ids.shape[1]), value=True)
    cache = new_cache(batch_size=len(prompts))
    return write(toy(), ids, is_token, num_new, cache)[:, -num_new:].tolist()


def assert_batch_equals_single(layout):
    alone = [answers(layout, [prompt])[0] for prompt in PROMPTS]
    assert answers(layout, PROMPTS) == alone


def test_a_batch_writes_what_each_prompt_writes_alone():
    assert_batch_equals_single(left_padded)
    ids, is_token = left_padded(PROMPTS)
    assert ids.shape == is_token.shape == (3, 7)
    assert ids[0].tolist() == [0, 0, 0, 0, 5, 17, 40]
    assert is_token.sum(dim=1).tolist() == [3, 7, 4]


def test_fillers_on_the_right_fail_that_test():
    with pytest.raises(AssertionError):
        assert_batch_equals_single(museum.right_padded)


def operations(run):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def assert_writes_the_same_with_less_work(way):
    ids, is_token = draw_ids(2, 5), slots_with_fillers((0, 0))
    expected = write_obviously(toy(), ids, is_token[:, :5], 9)
    assert len(expected[:, 5:].unique()) > 4  # no sequence of one word
    assert torch.equal(way(toy(), ids, is_token, 9, new_cache()), expected)
    saved = operations(lambda: way(toy(), ids, is_token, 9, new_cache()))
    assert 3 * saved < operations(
        lambda: write_obviously(toy(), ids, is_token[:, :5], 9)
    )


def test_writing_with_a_cache_is_the_same_with_less_work():
    assert_writes_the_same_with_less_work(write)


def test_feeding_everything_again_fails_that_test():
    with pytest.raises(AssertionError):
        assert_writes_the_same_with_less_work(museum.write_all_again)


def test_the_last_token_needs_no_slot():
    ids, is_token = draw_ids(1, 5), slots_with_fillers((0,), 8)
    cache = new_cache(batch_size=1, num_slots=8)
    assert write(toy(), ids, is_token, 4, cache).shape == (1, 9)
    assert cache.num_tokens == 8


# errors


def assert_overflow_changes_nothing(kind):
    cache = new_cache(kind)
    slots = cache.reserve(SLOTS - 1).clone()
    for layer in cache.layers:
        layer.update(*torch.randn(2, 2, 2, SLOTS - 1, 16))
    before = cache.keys.clone(), cache.values.clone()
    for too_many in (2, 3, SLOTS, 10**9):
        with pytest.raises(ValueError, match=rf"1 to 1.*of {SLOTS}.*{too_many}"):
            cache.reserve(too_many)
    assert torch.equal(cache.keys, before[0])
    assert torch.equal(cache.values, before[1])
    assert cache.num_tokens == SLOTS - 1 and torch.equal(cache.slots, slots)
    assert cache.reserve(1).tolist() == [SLOTS - 1]
    with pytest.raises(ValueError, match="expected 1 to 0"):
        cache.reserve(1)


def test_an_overflow_is_refused_before_anything_is_written():
    assert_overflow_changes_nothing(KVCache)


def test_a_cache_that_goes_on_in_its_last_slot_fails_that_test():
    with pytest.raises(pytest.fail.Exception):
        assert_overflow_changes_nothing(museum.OverflowHitsTheLastSlot)


@pytest.mark.parametrize("num_tokens", [0, -1])
def test_nothing_cannot_be_reserved(num_tokens):
    with pytest.raises(ValueError, match=f"num_tokens: expected 1 to 14.*{num_tokens}"):
        new_cache().reserve(num_tokens)


@pytest.mark.parametrize("name", [*SIZES, "num_slots"])
def test_sizes_are_at_least_one(name, as_user):
    with pytest.raises(ValueError, match=rf"{name}.*at least 1, found .*0"):
        new_cache(**{name: 0})


WRONG_SHAPES = {
    "batch": (3, 2, 4, 16),
    "one row for all": (1, 2, 4, 16),
    "heads": (2, 4, 4, 16),
    "fewer tokens": (2, 2, 3, 16),
    "more tokens": (2, 2, 5, 16),
    "no tokens": (2, 2, 0, 16),
    "head dim": (2, 2, 4, 8),
    "rank": (2, 2, 4),
}


@pytest.mark.parametrize("shape", WRONG_SHAPES.values(), ids=WRONG_SHAPES)
@pytest.mark.parametrize("which", ["k", "v"])
def test_other_shapes_are_refused_before_anything_is_written(which, shape, as_user):
    cache = new_cache()
    cache.reserve(4)
    good, bad = torch.ones(2, 2, 4, 16), torch.ones(shape)
    pair = (bad, good) if which == "k" else (good, bad)
    with pytest.raises(ValueError, match=rf"{which}: expected .*\(2, 2, 4, 16\)") as e:
        cache.layers[1].update(*pair)
    assert str(shape) in str(e.value)
    assert not cache.keys.any() and not cache.values.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_other_dtypes_are_refused(dtype, as_user):
    cache = new_cache()
    cache.reserve(4)
    good, bad = torch.ones(2, 2, 4, 16), torch.ones(2, 2, 4, 16, dtype=dtype)
    for name, pair in {"k": (bad, good), "v": (good, bad)}.items():
        message = f"{name}: expected torch.float32.*{dtype}"
        with pytest.raises(ValueError, match=message):
            cache.layers[0].update(*pair)
    assert not cache.keys.any()


def test_another_device_is_refused_before_anything_is_written(as_user):
    cache = new_cache()
    cache.reserve(4)
    good, bad = torch.ones(2, 2, 4, 16), torch.ones(2, 2, 4, 16, device="meta")
    for name, pair in {"k": (bad, good), "v": (good, bad)}.items():
        with pytest.raises(ValueError, match=f"{name}: .* on cpu.* on meta"):
            cache.layers[0].update(*pair)
    assert not cache.keys.any() and not cache.values.any()


@pytest.mark.parametrize("number", [2.0, 2.5, torch.tensor(2), True, None])
def test_only_an_int_can_be_reserved(number, as_user):
    cache = new_cache()
    with pytest.raises(ValueError, match="num_tokens: expected .* an int"):
        cache.reserve(number)
    assert cache.num_tokens == 0 and len(cache.slots) == 0


def test_nothing_is_written_before_something_is_reserved(as_user):
    for cache in (new_cache(), new_cache()):
        cache.reserve(3)
        cache.clear()
        with pytest.raises(ValueError, match=r"k: expected .*\(2, 2, 0, 16\)"):
            cache.layers[0].update(*torch.ones(2, 2, 2, 1, 16))


def test_a_cache_is_not_for_training():
    cache = new_cache()
    cache.reserve(1)
    k = torch.ones(2, 2, 1, 16)
    with torch.enable_grad():
        for name, pair in {"k": (k.clone(), k), "v": (k, k.clone())}.items():
            pair[0 if name == "k" else 1].requires_grad_()
            with pytest.raises(ValueError, match=rf"{name}: .*torch.no_grad"):
                cache.layers[0].update(*pair)
        ids = draw_ids(2, 1)
        with pytest.raises(ValueError, match="cache=None"):
            toy()(
                ids,
                positions=torch.zeros_like(ids),
                mask=torch.ones(2, 1, 1, SLOTS, dtype=torch.bool),
                cache=cache,
            )
    assert not cache.keys.requires_grad and not cache.keys.any()


def test_a_step_without_reserve_writes_the_same_slots():
    cache = new_cache()
    cache.reserve(2)
    for value in (1.0, 2.0):
        cache.layers[0].update(*torch.full((2, 2, 2, 2, 16), value))
    assert cache.num_tokens == 2
    assert (cache.keys[0, :, :, :2] == 2).all() and not cache.keys[0, :, :, 2:].any()


def test_a_nan_stays_in_its_slot_of_its_layer():
    cache = new_cache()
    cache.reserve(1)
    bad = torch.full((2, 2, 1, 16), torch.nan)
    cache.layers[1].update(bad, bad)
    assert cache.keys[1, :, :, 0].isnan().all()
    assert not cache.keys[0].any() and not cache.keys[2].any()
    assert not cache.keys[1, :, :, 1:].any()


# memory and compilers


@given(
    st.lists(st.integers(1, 9), min_size=5, max_size=5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_bytes_are_those_that_are_allocated(sizes, dtype):
    depth, batch, heads, width, slots = sizes
    options = {
        "depth": depth,
        "batch_size": batch,
        "num_kv_heads": heads,
        "head_dim": width,
        "num_slots": slots,
        "dtype": dtype,
    }
    cache = KVCache(**options)
    tensors = cache.keys, cache.values
    stored = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    formula = 2 * depth * batch * heads * width * slots * dtype.itemsize
    assert cache.num_bytes == stored == formula
    on_meta = KVCache(**options, device="meta")
    assert on_meta.keys.is_meta and on_meta.values.is_meta
    assert on_meta.num_bytes == formula
    assert cache.keys.shape == (depth, batch, heads, slots, width)


def test_bytes_of_known_models():
    def bytes_of(depth, heads, tokens):
        return KVCache(
            depth=depth,
            batch_size=1,
            num_kv_heads=heads,
            head_dim=256,
            num_slots=tokens,
            dtype=torch.bfloat16,
            device="meta",
        ).num_bytes

    assert bytes_of(18, 1, 1) == 18_432
    assert bytes_of(18, 8, 1) == 147_456
    assert bytes_of(26, 4, 4096) == 416 << 20
    assert bytes_of(42, 8, 4096) == 1344 << 20


def test_a_step_runs_on_the_meta_device():
    cache = new_cache(device="meta")
    assert cache.reserve(1).is_meta
    cache.clear()
    assert cache.slots.is_meta
    with torch.device("meta"):
        model = ToyDecoder()
        ids = torch.zeros(2, 5, dtype=torch.long)
        is_token = torch.ones(2, SLOTS, dtype=torch.bool)
        logits = read_in_pieces(model, ids, is_token, [3, 1, 1], cache)
    assert logits.shape == (2, 5, 64) and logits.device.type == "meta"
    assert cache.slots.device.type == "meta" and cache.num_tokens == 5


def test_all_steps_write_into_the_same_memory():
    cache = new_cache()
    before = cache.keys.data_ptr(), cache.values.data_ptr()
    ids, is_token = draw_ids(2, SLOTS), slots_with_fillers((0, 0))
    read_in_pieces(toy(), ids, is_token, 1, cache)
    assert before == (cache.keys.data_ptr(), cache.values.data_ptr())
    k, v = cache.layers[2].update(*torch.ones(2, 2, 2, 1, 16))
    assert k.data_ptr() == cache.keys[2].data_ptr()
    assert v.data_ptr() == cache.values[2].data_ptr()


def test_the_memory_is_free_when_the_cache_is_gone():
    """Without waiting for the garbage collector, which knows no tensor sizes."""
    gc.disable()
    try:
        cache = new_cache()
        cache.reserve(3)
        keys = weakref.ref(cache.keys)
        del cache
        assert keys() is None
    finally:
        gc.enable()


def test_a_layer_is_what_attention_asks_for():
    cache = new_cache()
    assert len(cache.layers) == 3
    assert all(isinstance(layer, Cache) for layer in cache.layers)


def sizes_allocated(cache):
    """Sizes of the buffers that inductor's code allocates for one step."""
    q, k, v = torch.randn(3, 2, 4, 1, 16), *torch.randn(2, 3, 2, 2, 1, 16)
    mask = (torch.arange(SLOTS) <= cache.reserve(1)).expand(2, 1, 1, -1)

    def step(q, k, v, mask, layers):
        outputs = []
        for n, layer in enumerate(layers):
            keys, values = layer.update(k[n], v[n])
            outputs.append(attend(q[n], keys, values, mask))
        return outputs

    torch.compiler.reset()
    with inductor_config.patch(fx_graph_cache=False):
        compiled = torch.compile(step, fullgraph=True, dynamic=False)
        _, (code,) = run_and_get_code(compiled, q, k, v, mask, cache.layers)
    torch.compiler.reset()
    found = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", code)
    assert found
    return [tuple(int(n) for n in sizes.split(",")) for sizes in found]


def assert_a_compiled_step_copies_no_cache(kind):
    whole = 2 * 2 * SLOTS * 16  # numbers of one layer's keys
    assert max(prod(sizes) for sizes in sizes_allocated(new_cache(kind))) < whole


def test_a_compiled_step_copies_no_cache(as_user, cpp_compiler):
    assert_a_compiled_step_copies_no_cache(KVCache)


def test_views_taken_in_the_step_fail_that_test(as_user, cpp_compiler):
    assert_parity(cache=museum.ViewsTakenInTheStep)
    with pytest.raises(AssertionError):
        assert_a_compiled_step_copies_no_cache(museum.ViewsTakenInTheStep)


def test_a_copy_of_a_cache_is_whole_and_its_own():
    cache = new_cache()
    cache.reserve(2)
    twin = deepcopy(cache)
    twin.layers[1].update(*torch.ones(2, 2, 2, 2, 16))
    assert twin.keys[1].any() and twin.values[1].any() and twin.num_tokens == 2
    assert not cache.keys.any() and not cache.values.any()


def test_sixty_four_steps_of_one_graph(as_user):
    cache = new_cache(num_slots=72)
    model, ids = toy(), draw_ids(2, 72)
    is_token = slots_with_fillers((0, 3), 72)
    mask = attention_mask(torch.ones_like(is_token), is_token)
    expected = whole_pass(model, ids, is_token)
    positions = token_positions(is_token)

    def step(new, cache):
        slots = cache.slots
        return model.logits(
            model(
                new,
                positions=positions[:, slots],
                mask=mask[:, :, slots],
                cache=cache,
            )
        )

    torch.compiler.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True, dynamic=False)
    cache.reserve(7)
    step(ids[:, :7], cache)
    cache.reserve(1)
    parts = [compiled(ids[:, 7:8], cache)]
    with torch.compiler.set_stance("fail_on_recompile"):
        for t in range(8, 72):
            cache.reserve(1)
            parts.append(compiled(ids[:, t : t + 1], cache))
        another = new_cache(num_slots=72)
        another.reserve(1)
        compiled(ids[:, :1], another)
    torch.compiler.reset()
    assert_close(torch.cat(parts, dim=1), expected[:, 7:])


def test_a_growing_cache_compiles_again(as_user):
    """Why the cache is static; if torch changes, so may we."""
    every = torch.ones(1, 8, dtype=torch.bool)
    model, cache = toy(), AppendCache(3)
    mask = attention_mask(every)

    def step(new, mask, cache):
        return model(new, positions=torch.zeros_like(new), mask=mask, cache=cache)

    torch.compiler.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True, dynamic=False)
    ids = draw_ids(1, 8)
    for _ in range(2):
        cache.reserve(1)
        compiled(ids[:, :1], rows_so_far(mask, cache), cache)
    with torch.compiler.set_stance("fail_on_recompile"):
        cache.reserve(1)
        with pytest.raises(RuntimeError, match="recompile"):
            compiled(ids[:, :1], rows_so_far(mask, cache), cache)
    torch.compiler.reset()


# facts about torch that the chapter relies on


def test_torch_leaks_a_nan_from_a_slot_that_is_masked():
    q = torch.randn(1, 2, 1, 8)
    k, v = torch.randn(2, 1, 2, 5, 8)
    mask = torch.tensor([True, True, True, False, False])[None, None, None]
    expected = attend(q, k, v, mask)
    for huge in (0.0, 1e30):
        k[:, :, 3:], v[:, :, 3:] = huge, huge
        assert torch.equal(attend(q, k, v, mask), expected)
    v[:, :, 3:] = torch.nan
    assert attend(q, k, v, mask).isnan().all()


def test_positions_that_count_fillers_too_are_harmless_with_rope():
    """Left padding shifts all positions of a row alike; RoPE sees differences."""

    def slot_numbers(is_token, cache):
        return cache.slots.expand(len(is_token), -1)

    assert_parity(positions=slot_numbers)
    assert_parity(positions=positions_of)


def test_attention_turns_keys_before_it_stores_them():
    layer = draw_weights(Attention(8, num_heads=2, num_kv_heads=1, head_dim=4))
    cache = KVCache(depth=1, batch_size=1, num_kv_heads=1, head_dim=4, num_slots=3)
    cache.reserve(2)
    x = torch.randn(1, 2, 8)
    mask = torch.tensor([[True, False, False], [True, True, False]])[None, None]
    layer(x, mask=mask, rotate=lambda heads: 2 * heads, cache=cache.layers[0])
    assert_close(cache.keys[0, :, 0, :2], 2 * layer.k_proj(x))
    assert_close(cache.values[0, :, 0, :2], layer.v_proj(x))


# A cache with other numbers


def test_a_changed_cache_has_the_same_tokens_and_numbers_of_its_own():
    cache = KVCache(depth=2, batch_size=3, num_kv_heads=1, head_dim=4, num_slots=5)
    cache.reserve(2)
    cache.keys.normal_()
    before = cache.keys.clone()
    rows = torch.tensor([2, 0])
    other = cache.changed(lambda kept: kept[:, rows])
    assert torch.equal(other.keys, before[:, rows]) and other.num_tokens == 2
    assert torch.equal(other.slots, cache.slots)
    new = torch.ones(2, 1, 2, 4)
    other.layers[1].update(new, new)  # the slots of the last reserve
    assert torch.equal(other.keys[1, :, :, :2], new)
    assert torch.equal(other.values[1, :, :, :2], new)
    assert torch.equal(cache.keys, before) and not cache.values.any()


def test_a_cache_with_more_slots_goes_on():
    cache = KVCache(depth=2, batch_size=1, num_kv_heads=1, head_dim=4, num_slots=2)
    cache.reserve(2)
    wide = cache.changed(lambda kept: torch.nn.functional.pad(kept, (0, 0, 0, 3)))
    assert wide.reserve(3).tolist() == [2, 3, 4]
    with pytest.raises(ValueError, match="num_tokens: expected 1 to 0"):
        cache.reserve(1)
    assert cache.num_tokens == 2 and wide.num_tokens == 5
