"""Chapter 10: Gemma against Hugging Face, its equations, and its wrong twins."""

import copy
import math
from dataclasses import astuple, replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pgcore.attention import attend, attention_mask
from pgcore.gemma import (
    GEMMA2_2B,
    GEMMA2_9B,
    GEMMA2_27B,
    GEMMA_2B,
    GEMMA_7B,
    GeGLU,
    Gemma,
    GemmaConfig,
    _local_mask,
    attend_softcapped,
    softcap,
)
from pgcore.kv_cache import KVCache
from pgcore.lab.museum import gemma as museum
from pgcore.lab.verses import load_verses
from pgcore.rope import token_positions
from tests.draws import GEMMA1, GEMMA2, draw_heads, draw_mask, fan_in
from tests.reference.gemma import reference_attend_softcapped, reference_gemma

BOTH = pytest.mark.parametrize("config", [GEMMA1, GEMMA2], ids=["gemma1", "gemma2"])
EVERY_TWIN = pytest.mark.parametrize("twin", museum.TWINS, ids=lambda t: t.__name__)
PRESETS = {
    "2b": (GEMMA_2B, 1_981_884_416),
    "7b": (GEMMA_7B, 7_751_248_896),
    "2-2b": (GEMMA2_2B, 2_024_517_888),
    "2-9b": (GEMMA2_9B, 8_324_201_984),
    "2-27b": (GEMMA2_27B, 26_047_480_320),
}
EVERY_PRESET = pytest.mark.parametrize(
    ("config", "without_table"), PRESETS.values(), ids=PRESETS
)
TOLERANCE = 5e-6


@cache
def gemma_of(config, table=1.0):
    gemma = fan_in(Gemma(config)).eval()
    gemma.embed_tokens.weight.data.mul_(table)
    return gemma


def new_cache(config, batch_size, num_slots, **options):
    return KVCache(
        depth=config.depth,
        batch_size=batch_size,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_slots=num_slots,
        **options,
    )


def plan_of(is_token):
    return attention_mask(torch.ones_like(is_token), is_token), token_positions(
        is_token
    )


@torch.no_grad()
def run(gemma, ids, is_token=None, sizes=None, memory=None):
    """Causal logits; in parts of these sizes through a cache, else at once."""
    is_token = torch.ones_like(ids, dtype=torch.bool) if is_token is None else is_token
    mask, positions = plan_of(is_token)
    if sizes is None:
        return gemma.logits(gemma(gemma.embed(ids), positions=positions, mask=mask))
    memory = memory or new_cache(gemma.config, *ids.shape)
    spare = memory.keys.shape[3] - ids.shape[1]
    mask = F.pad(mask, (0, spare), value=True)
    mask[..., ids.shape[1] :] = False
    outputs = []
    for part in ids.split(sizes, dim=1):
        slots = memory.reserve(part.shape[1])
        hidden = gemma(
            gemma.embed(part),
            positions=positions[:, slots],
            mask=mask[:, :, slots],
            cache=memory,
        )
        outputs.append(gemma.logits(hidden))
    return torch.cat(outputs, dim=1)


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * expected.abs().max().item(), error


def draw_ids(*shape, seed=1, vocab_size=97):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, shape, generator=generator)


IDS = draw_ids(3, 14)
IS_TOKEN = torch.arange(14) >= torch.tensor([[0], [3], [6]])  # padded on the left


# Hugging Face


HF_NAMES = {
    GEMMA1: {
        "pre_attention_norm": "input_layernorm",
        "pre_mlp_norm": "post_attention_layernorm",
    },
    GEMMA2: {
        "pre_attention_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "pre_mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    },
}


def hf_config(config):
    transformers = pytest.importorskip("transformers")
    shared = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "intermediate_size": config.mlp_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "pad_token_id": 0,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }
    if not config.post_norms:
        return transformers.GemmaConfig(**shared, hidden_act="gelu_pytorch_tanh")
    scale = config.query_scale or config.head_dim**-0.5
    return transformers.Gemma2Config(
        **shared,
        query_pre_attn_scalar=round(scale**-2),
        sliding_window=config.window,
        attn_logit_softcapping=config.attention_softcap,
        final_logit_softcapping=config.final_softcap,
    )


def hf_class(config):
    transformers = pytest.importorskip("transformers")
    kind = "Gemma2ForCausalLM" if config.post_norms else "GemmaForCausalLM"
    return getattr(transformers, kind)


def to_hf_name(name, config):
    for ours, theirs in HF_NAMES[config].items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return f"model.{name}"


@cache
def hugging_face(config, table=1.0):
    """The oracle, with the weights of ``gemma_of(config, table)``."""
    model = hf_class(config)(hf_config(config)).eval()
    ours = gemma_of(config, table).state_dict()
    theirs = {to_hf_name(name, config): weight for name, weight in ours.items()}
    theirs["lm_head.weight"] = ours["embed_tokens.weight"]
    model.load_state_dict(theirs)  # strict: every name is used
    return model


@cache
def expected_logits(config):
    with torch.no_grad():
        return hugging_face(config)(
            input_ids=IDS,
            attention_mask=IS_TOKEN.long(),
            position_ids=token_positions(IS_TOKEN),
        ).logits[IS_TOKEN]


def assert_hugging_face_parity(gemma, config):
    """One pass, and a cache in two uneven steps; a batch padded on the left."""
    expected = expected_logits(config)
    for sizes in (None, [9, 5]):
        assert_close(run(gemma, IDS, IS_TOKEN, sizes)[IS_TOKEN], expected)


@BOTH
def test_equals_hugging_face(config):
    assert_hugging_face_parity(gemma_of(config), config)


@BOTH
@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_the_last_token_alone_is_the_last_of_all(config, cached):
    """Also through a cache, which then holds all tokens: the next step agrees."""
    gemma = gemma_of(config)
    mask, positions = plan_of(IS_TOKEN)
    memory, cut = None, 14
    if cached:
        memory, cut = new_cache(config, *IDS.shape), 13
        memory.reserve(cut)
        mask = mask[:, :, :cut]
    else:
        mask = mask[:, :, :cut, :cut]
    last = gemma(
        gemma.embed(IDS[:, :cut]),
        positions=positions[:, :cut],
        mask=mask,
        cache=memory,
        last_only=True,
    )
    expected = run(gemma, IDS, IS_TOKEN)
    assert_close(gemma.logits(last), expected[:, [cut - 1]])
    if cached:
        slots = memory.reserve(1)
        whole, _ = plan_of(IS_TOKEN)
        hidden = gemma(
            gemma.embed(IDS[:, cut:]),
            positions=positions[:, slots],
            mask=whole[:, :, slots],
            cache=memory,
        )
        assert_close(gemma.logits(hidden), expected[:, cut:])


def test_the_last_token_alone_spares_most_of_a_layer():
    from torch.utils.flop_counter import FlopCounterMode

    gemma, counts = gemma_of(GEMMA1), []
    mask, positions = plan_of(IS_TOKEN)
    for last_only in (False, True):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            gemma(gemma.embed(IDS), positions=positions, mask=mask, last_only=last_only)
        counts.append(counter.get_total_flops())
    one_layer = counts[0] / GEMMA1.depth
    assert 0.6 * one_layer < counts[0] - counts[1] < one_layer


@EVERY_TWIN
def test_wrong_twins_fail_the_parity_test(twin):
    wrong = museum.with_bug(gemma_of(GEMMA2), twin)
    with pytest.raises(AssertionError):
        assert_hugging_face_parity(wrong, GEMMA2)


@EVERY_TWIN
def test_wrong_twins_run_and_have_the_right_shape(twin):
    wrong = museum.with_bug(gemma_of(GEMMA2), twin)
    assert any(
        type(module) is twin
        or getattr(getattr(module, "attend", None), "func", None) is twin
        for module in wrong.modules()
    )
    assert run(wrong, IDS, sizes=7).shape == (3, 14, 97)
    assert run(wrong, IDS).isfinite().all()


def test_each_twin_has_one_bug_of_its_own():
    logits = [
        run(museum.with_bug(gemma_of(GEMMA2), twin), IDS, sizes=9)
        for twin in museum.TWINS
    ]
    for i, one in enumerate(logits):
        for other in logits[:i]:
            assert (one - other).abs().max() > 1e-4


@BOTH
def test_gradients_equal_hugging_face(config):
    """Training: the same code, with cache=None."""
    ours, theirs = copy.deepcopy(gemma_of(config)), hugging_face(config)
    mask, positions = plan_of(torch.ones_like(IDS, dtype=torch.bool))
    hidden = ours(ours.embed(IDS), positions=positions, mask=mask)
    loss = F.cross_entropy(ours.logits(hidden[:, :-1]).mT, IDS[:, 1:])
    loss.backward()
    theirs.zero_grad()
    logits = theirs(input_ids=IDS).logits
    F.cross_entropy(logits[:, :-1].mT, IDS[:, 1:]).backward()
    slopes = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        assert weight.grad.abs().max() > 0
        assert_close(weight.grad, slopes[to_hf_name(name, config)].grad, 2e-5)


@BOTH
def test_greedy_continuation_equals_hugging_face_token_for_token(config):
    prompt, is_token = IDS[:, :10], IS_TOKEN[:, :10]
    table = 0.03  # a tied table at full size says the last token again and again
    expected = hugging_face(config, table).generate(
        input_ids=prompt,
        attention_mask=is_token.long(),
        do_sample=False,
        max_new_tokens=24,
    )[:, 10:]
    assert min(len(row.unique()) for row in expected) >= 6, "a lively continuation"
    gemma, memory = gemma_of(config, table), new_cache(config, 3, 34)
    mask, positions = plan_of(F.pad(is_token, (0, 24), value=True))
    new, written = prompt, []
    with torch.no_grad():
        for _ in range(24):
            slots = memory.reserve(new.shape[1])
            hidden = gemma(
                gemma.embed(new),
                positions=positions[:, slots],
                mask=mask[:, :, slots],
                cache=memory,
            )
            new = gemma.logits(hidden[:, -1:]).argmax(dim=-1)
            written.append(new)
    assert torch.equal(torch.cat(written, dim=1), expected)


def test_embed_equals_hugging_face_in_bfloat16_bit_for_bit():
    modeling = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    for width in (40, 2048):
        gemma = fan_in(Gemma(replace(GEMMA1, width=width, depth=1))).bfloat16()
        hf = hugging_face(GEMMA2).model.embed_tokens
        scaled = type(hf)(97, width, 0, embed_scale=width**0.5).bfloat16()
        scaled.load_state_dict(gemma.embed_tokens.state_dict())
        assert torch.equal(gemma.embed(IDS), scaled(IDS))
        not_rounded = (gemma.embed_tokens(IDS).float() * width**0.5).bfloat16()
        assert not torch.equal(gemma.embed(IDS), not_rounded)
    assert modeling


# the equations


@BOTH
@pytest.mark.parametrize("length", [1, 2, 5, 6, 17])
def test_equals_its_equations(config, length):
    ids = draw_ids(2, length, seed=length)
    weights = gemma_of(config).double().state_dict()
    for row, expected_of in enumerate(ids):
        expected = reference_gemma(weights, config, expected_of)
        assert_close(run(gemma_of(config).float(), ids)[row], expected)


def test_multi_query_and_multi_head():
    for num_kv_heads in (1, 4):
        config = replace(GEMMA2, num_kv_heads=num_kv_heads)
        gemma = gemma_of(config)
        expected = reference_gemma(gemma.state_dict(), config, IDS[0])
        assert_close(run(gemma, IDS[:1])[0], expected)


# the presets


def count_without_table(module):
    return sum(
        weight.numel()
        for name, weight in module.named_parameters()
        if "embed_tokens" not in name and "lm_head" not in name
    )


@EVERY_PRESET
def test_presets_have_the_published_number_of_parameters(config, without_table):
    with torch.device("meta"):
        gemma = Gemma(config)
        theirs = hf_class(config)(hf_config(config))
    assert count_without_table(gemma) == without_table
    assert count_without_table(theirs) == without_table
    assert gemma.embed_tokens.weight.numel() == 256_000 * config.width
    assert sum(w.numel() for w in gemma.parameters()) == (
        without_table + 256_000 * config.width
    )


NONE, CAPS = (None,) * 4, (50.0, 30.0, 4096)
PUBLISHED = {  # the fields in their order, as the reports and their code have them
    GEMMA_2B: (2048, 18, 16_384, 8, 1, 256, 256_000, *NONE, 1e4, False),
    GEMMA_7B: (3072, 28, 24_576, 16, 16, 256, 256_000, *NONE, 1e4, False),
    GEMMA2_2B: (2304, 26, 9216, 8, 4, 256, 256_000, None, *CAPS, 1e4, True),
    GEMMA2_9B: (3584, 42, 14_336, 16, 8, 256, 256_000, None, *CAPS, 1e4, True),
    GEMMA2_27B: (4608, 46, 36_864, 32, 16, 128, 256_000, 1 / 12, *CAPS, 1e4, True),
}


@pytest.mark.parametrize(("config", "published"), PUBLISHED.items(), ids=PRESETS)
def test_presets_are_as_published_field_by_field(config, published):
    assert astuple(config) == published


def test_hugging_faces_defaults_are_two_of_the_presets():
    transformers = pytest.importorskip("transformers")
    fields = {
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "intermediate_size": "mlp_dim",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "head_dim": "head_dim",
        "vocab_size": "vocab_size",
    }
    more = {
        "sliding_window": "window",
        "attn_logit_softcapping": "attention_softcap",
        "final_logit_softcapping": "final_softcap",
    }
    for theirs, ours, names in (
        (transformers.GemmaConfig(), GEMMA_7B, fields),
        (transformers.Gemma2Config(), GEMMA2_2B, fields | more),
    ):
        for their_name, our_name in names.items():
            assert getattr(theirs, their_name) == getattr(ours, our_name), our_name
    kinds = transformers.Gemma2Config(num_hidden_layers=4).layer_types
    assert kinds == ["sliding_attention", "full_attention"] * 2


def test_query_scales():
    assert GEMMA2_27B.query_scale == pytest.approx(1 / 12)
    assert GEMMA2_27B.width / GEMMA2_27B.num_heads == 144
    assert all(c.query_scale is None for c, _ in list(PRESETS.values())[:4])
    layer = gemma_of(GEMMA2).layers[0].self_attn
    assert layer.scale == 20**-0.5


@EVERY_PRESET
def test_runs_at_full_size_on_the_meta_device(config, without_table):
    with torch.device("meta"):
        gemma = Gemma(config)
        ids = torch.zeros(2, 7, dtype=torch.long)
        mask, positions = plan_of(torch.ones(2, 9, dtype=torch.bool))
        memory = new_cache(config, 2, 9, device="meta")
        slots = memory.reserve(7)
        with torch.no_grad():
            hidden = gemma(
                gemma.embed(ids),
                positions=positions[:, slots],
                mask=mask[:, :, slots],
                cache=memory,
            )
        assert hidden.shape == (2, 7, config.width)
        assert gemma.logits(hidden[:, -1]).shape == (2, 256_000)
        causal = plan_of(torch.ones(2, 7, dtype=torch.bool))[0]
        trained = gemma(gemma.embed(ids), positions=ids, mask=causal)
    assert trained.device.type == "meta"


# properties: cache, batch, padding


SHALLOW = {
    config: replace(config, depth=2, window=config.window and 3)
    for config in (GEMMA1, GEMMA2)
}
EITHER = st.sampled_from([GEMMA1, GEMMA2])


@given(EITHER, st.data())
def test_a_cache_changes_nothing(config, data):
    """Any split into parts, any padding, slots to spare, garbage in the cache."""
    config = SHALLOW[config]
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4), "sizes")
    padding = data.draw(st.integers(0, 4), "padding")
    spare = data.draw(st.integers(0, 3), "spare")
    ids = draw_ids(2, sum(sizes), seed=data.draw(st.integers(0, 999), "seed"))
    is_token = torch.ones_like(ids, dtype=torch.bool)
    is_token[1, : min(padding, sum(sizes) - 1)] = False
    memory = new_cache(config, 2, sum(sizes) + spare)
    if spare:
        memory.keys.normal_(std=100)
        memory.values.normal_(std=100)
    gemma = gemma_of(config)
    whole = run(gemma, ids, is_token)
    parts = run(gemma, ids, is_token, sizes, memory)
    assert_close(parts[is_token], whole[is_token])


@BOTH
@pytest.mark.parametrize("split", range(1, 12))
def test_every_split_point(config, split):
    ids, gemma = IDS[:, :12], gemma_of(config)
    assert_close(run(gemma, ids, sizes=[split, 12 - split]), run(gemma, ids))


@given(EITHER, st.integers(0, 5), st.integers(1, 6), st.integers(0, 999))
def test_batched_equals_single_and_padding_never_matters(config, padding, length, seed):
    gemma = gemma_of(SHALLOW[config])
    text = draw_ids(1, length, seed=seed)
    alone = run(gemma, text)
    ids = draw_ids(3, padding + length, seed=seed + 1)  # whatever stands in it
    ids[1, padding:] = text
    is_token = torch.ones_like(ids, dtype=torch.bool)
    is_token[1, :padding] = False
    logits = run(gemma, ids, is_token)
    assert_close(logits[1:2, padding:], alone)
    assert logits.isfinite().all(), "rows of padding, too"


def test_a_used_cache_can_be_cleared():
    memory = new_cache(GEMMA2, 3, 14)
    first = run(gemma_of(GEMMA2), IDS, IS_TOKEN, [9, 5], memory)
    memory.clear()
    again = run(gemma_of(GEMMA2), IDS, IS_TOKEN, [9, 5], memory)
    assert torch.equal(first[IS_TOKEN], again[IS_TOKEN])


@BOTH
def test_no_token_hears_of_the_future_or_of_padding(config):
    gemma = copy.deepcopy(gemma_of(config)).double()
    x = torch.randn(1, 8, 40, dtype=torch.float64)
    is_token = torch.arange(8)[None] != 2
    mask, positions = plan_of(is_token)
    moves = torch.autograd.functional.jacobian(
        lambda x: gemma(x, positions=positions, mask=mask), x
    )[0, :, :, 0]
    moves = moves.abs().amax(dim=(1, 3))
    may = mask[0, 0] | torch.eye(8, dtype=torch.bool)
    assert torch.equal(moves > 0, may)


# far positions


def logits_from(gemma, start, ids):
    positions = (start + torch.arange(ids.shape[1])).expand(ids.shape)
    mask = attention_mask(torch.ones_like(ids, dtype=torch.bool))
    with torch.no_grad():
        return gemma.logits(gemma(gemma.embed(ids), positions=positions, mask=mask))


@BOTH
@pytest.mark.parametrize("start", [4096, 8000])
def test_far_positions_are_right_in_bfloat16(config, start):
    """The oracle counts from 0, in float64: only differences of positions matter."""
    half = copy.deepcopy(gemma_of(config)).bfloat16()
    expected = reference_gemma(half.state_dict(), config, IDS[0])
    near = logits_from(half, 0, IDS[:1])[0].double() - expected
    far = logits_from(half, start, IDS[:1])[0].double() - expected
    rounding = 0.05 * expected.abs().max()
    assert near.abs().max() < rounding and far.abs().max() < rounding
    wrong = museum.with_bug(half, museum.PositionsInBfloat16)
    off = logits_from(wrong, start, IDS[:1])[0].double() - expected
    assert off.abs().max() > 4 * rounding
    short = logits_from(wrong, 0, IDS[:1])[0].double() - expected
    assert short.abs().max() < rounding, "short texts do not show it"


def test_the_rotation_is_made_once_in_the_dtype_of_the_activations(monkeypatch):
    import pgcore.gemma as module

    made, right = [], module.rotation

    def spy(positions, head_dim, *, base, dtype):
        made.append((base, dtype))
        return right(positions, head_dim, base=base, dtype=dtype)

    monkeypatch.setattr(module, "rotation", spy)
    config = replace(GEMMA2, rope_base=777.0)
    run(fan_in(Gemma(config)).bfloat16(), IDS)
    assert made == [(777.0, torch.bfloat16)], "not once per layer"


# compile


@pytest.mark.parametrize(
    ("config", "backend"),
    [(GEMMA1, "eager"), (GEMMA2, "inductor")],  # inductor takes its time
    ids=["gemma1", "gemma2"],
)
def test_one_compiled_decode_step_serves_a_whole_text(
    config, backend, as_user, request
):
    if backend == "inductor":
        request.getfixturevalue("cpp_compiler")
    from torch._dynamo.utils import counters

    config = SHALLOW[config]
    gemma, length = gemma_of(config), 70
    memory, eager = (new_cache(config, 2, length) for _ in range(2))
    mask, positions = plan_of(torch.ones(2, length, dtype=torch.bool))
    ids = draw_ids(2, length, seed=5)

    def step(tokens, memory):
        slots = memory.slots
        hidden = gemma(
            gemma.embed(tokens),
            positions=positions[:, slots],
            mask=mask[:, :, slots],
            cache=memory,
        )
        return gemma.logits(hidden[:, -1])

    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend=backend)
    with torch.no_grad():
        for cache_ in (memory, eager):
            cache_.reserve(5)
            step(ids[:, :5], cache_)
        for t in range(5, length):
            memory.reserve(1)
            eager.reserve(1)
            token = ids[:, t : t + 1]
            if t == 5:
                found = compiled(token, memory)
            else:
                with torch.compiler.set_stance("fail_on_recompile"):
                    found = compiled(token, memory)
            assert_close(found, step(token, eager), 1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch.compiler.reset()


# the head


class Watch(TorchDispatchMode):
    """The shape of every tensor that is made, views aside."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            given = {
                x.untyped_storage().data_ptr()
                for x in args
                if isinstance(x, torch.Tensor)
            }
            if result.untyped_storage().data_ptr() not in given:
                self.shapes.append(tuple(result.shape))
        return result


def test_logits_exist_only_where_they_are_asked_for():
    config = replace(GEMMA2, vocab_size=5003)
    gemma = gemma_of(config)
    mask, positions = plan_of(torch.ones(2, 40, dtype=torch.bool))
    ids = draw_ids(2, 40, vocab_size=5003)
    with Watch() as watch:  # with gradients, as in training
        hidden = gemma(gemma.embed(ids), positions=positions, mask=mask)
        logits = gemma.logits(hidden[:, -3:])
    wide = {shape for shape in watch.shapes if 5003 in shape}
    assert {math.prod(shape) for shape in wide} == {2 * 3 * 5003}, wide
    assert_close(logits, run(gemma, ids)[:, -3:])


def test_logits_take_any_axes_in_front():
    gemma = gemma_of(GEMMA2)
    hidden = torch.randn(2, 3, 40)
    logits = gemma.logits(hidden)
    assert logits.shape == (2, 3, 97)
    assert_close(gemma.logits(hidden[0, 0]), logits[0, 0])
    assert gemma.logits(hidden[:, :0]).shape == (2, 0, 97)


def test_the_head_is_the_table():
    gemma = Gemma(GEMMA1)
    names = set(gemma.state_dict())
    assert "embed_tokens.weight" in names and "lm_head.weight" not in names
    weights = {n: torch.randn_like(w) for n, w in gemma.state_dict().items()}
    with torch.device("meta"):
        loaded = Gemma(GEMMA1)
    loaded.load_state_dict(weights, assign=True)
    assert loaded.logits(torch.eye(40)).equal(weights["embed_tokens.weight"].T)
    assert not list(loaded.buffers()), "nothing is left on meta, nothing is stored"


def test_fresh_weights_start_at_the_right_size():
    torch.manual_seed(0)
    gemma = Gemma(replace(GEMMA1, width=256, vocab_size=4000, depth=1))
    assert abs(gemma.embed(draw_ids(4, 50)).std() - 1) < 0.02
    logits = gemma.logits(F.rms_norm(torch.randn(50, 256), (256,)))
    assert abs(logits.std() - 1) < 0.05


# attention with a soft-cap


SIZES = [  # B, N, K, T, S, H
    (1, 1, 1, 1, 1, 1),
    (2, 4, 4, 5, 5, 8),
    (2, 8, 2, 6, 9, 5),
    (3, 6, 3, 1, 7, 12),
]


def assert_softcapped_parity(fn):
    """Values and gradients; every kind of mask, empty rows, a scale of its own."""
    for seed, sizes in enumerate(SIZES):
        masks = [
            None,
            draw_mask(sizes, seed),
            draw_mask(sizes, seed, heads=sizes[1]),
            draw_mask(sizes, seed, rows=1),
            draw_mask(sizes, seed, empty_row=True),
            draw_mask(sizes, seed, heads=sizes[1], empty_row=True),
            draw_mask(sizes, seed, heads=sizes[1]),
        ]
        masks[-1][:, :1, 0] = False  # nothing to read for one head only
        for mask in masks:
            for scale, cap in ((None, 50.0), (0.7, 0.9)):
                inputs = draw_heads(sizes, grad=True, seed=seed)
                ours = fn(*inputs, mask, scale, cap=cap)
                plain = draw_heads(sizes, seed=seed)
                expected = reference_attend_softcapped(*plain, mask, scale, cap=cap)
                assert ours.shape == expected.shape
                assert (ours - expected).abs().max() < 1e-12
                push = torch.randn_like(expected)
                slopes = torch.autograd.grad((ours * push).sum(), inputs)
                assert all(slope.isfinite().all() for slope in slopes)


def test_softcapped_attention_equals_a_line_each():
    assert_softcapped_parity(attend_softcapped)


@pytest.mark.parametrize(
    "twin",
    [museum.softcap_after_mask, museum.kv_heads_tiled_capped],
    ids=lambda twin: twin.__name__,
)
def test_wrong_softcapped_attention_fails_the_parity_test(twin):
    with pytest.raises(AssertionError):
        assert_softcapped_parity(twin)


def test_softcapped_gradcheck():
    sizes = (1, 4, 2, 3, 4, 3)
    mask = draw_mask(sizes, empty_row=True)
    inputs = draw_heads(sizes, grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: attend_softcapped(*x, mask, cap=0.8), inputs
    )


def test_a_large_cap_is_no_cap():
    inputs, mask = draw_heads(SIZES[2]), draw_mask(SIZES[2], empty_row=True)
    capped = attend_softcapped(*inputs, mask, cap=1e6)
    assert (capped - attend(*inputs, mask)).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 4e-6), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)],
)
def test_softcapped_attention_in_other_precisions(dtype, tolerance):
    for sizes in [*SIZES, (2, 8, 1, 40, 300, 256)]:
        inputs, mask = draw_heads(sizes, dtype), draw_mask(sizes, empty_row=True)
        value = attend_softcapped(*inputs, mask, cap=5.0)
        assert value.dtype == dtype
        expected = reference_attend_softcapped(*inputs, mask, cap=5.0)
        scale = max(1.0, expected.abs().max().item())
        assert (value.double() - expected).abs().max() <= tolerance * scale


def test_scores_are_capped_in_float32_at_least():
    """Scores 0 to 63 are exact in bfloat16; capped ones would not be."""
    q = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    k = torch.arange(64).view(1, 1, 64, 1).bfloat16()
    v = (1.0 - 2 * (torch.arange(64) % 2)).view(1, 1, 64, 1).bfloat16()
    expected = reference_attend_softcapped(q, k, v, scale=1.0, cap=50.0)
    value = attend_softcapped(q, k, v, scale=1.0, cap=50.0)
    assert (value.double() - expected).abs().max() < 0.004


def test_large_queries_and_keys_do_not_overflow_in_float16():
    """Unscaled, both scores would be above 65 504, and alike."""
    q = torch.full((1, 1, 1, 256), 20.0).half()
    k = torch.stack((q[0, 0, 0], q[0, 0, 0] - 1))[None, None]
    v = torch.tensor([1.0, 2.0]).half().view(1, 1, 2, 1).expand(1, 1, 2, 256)
    for cap in (50.0, 1e4):
        expected = reference_attend_softcapped(q, k, v, cap=cap)
        value = attend_softcapped(q, k, v, cap=cap)
        assert (value.double() - expected).abs().max() < 4e-3


def test_a_query_with_nothing_to_read_gives_zeros_and_no_gradient():
    q, k, v = inputs = draw_heads(SIZES[2], grad=True)
    mask = draw_mask(SIZES[2])
    mask[0] = False
    value = attend_softcapped(*inputs, mask, cap=2.0)
    slopes = torch.autograd.grad((value + 1).square().sum(), inputs)
    assert (value[0] == 0).all()
    assert all((slope[0] == 0).all() and (slope != 0).any() for slope in slopes)


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 3), (torch.bfloat16, 5), (torch.float16, 5)]
)
def test_three_tables_of_scores_at_most(dtype, most):
    inputs = draw_heads((2, 4, 2, 64, 64, 4), dtype)
    mask = draw_mask((2, 4, 2, 64, 64, 4))
    with Watch() as watch:
        attend_softcapped(*inputs, mask, cap=5.0)
    tables = [shape for shape in watch.shapes if math.prod(shape) >= 2 * 4 * 64 * 64]
    assert len(tables) <= most, tables


def test_which_attention_a_block_uses():
    assert gemma_of(GEMMA1).layers[0].self_attn.attend is attend
    capped = gemma_of(GEMMA2).layers[0].self_attn.attend
    assert capped.func is attend_softcapped and capped.keywords == {"cap": 2.0}


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.floats(0.1, 100.0))
def test_softcap_is_odd_rising_bounded_and_gentle(a, b, cap):
    low, high = softcap(torch.tensor([min(a, b), max(a, b)]).double(), cap).tolist()
    assert -cap <= low <= high <= cap
    one = torch.tensor([a], dtype=torch.float64)
    assert torch.equal(softcap(-one, cap), -softcap(one, cap))
    small = torch.tensor([1e-4 * cap], dtype=torch.float64)
    assert abs(softcap(small, cap) - small) < 1e-8 * cap


def test_softcap_edges():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    assert softcap(x, 3.0)[[0, 1, 3]].tolist() == [3.0, -3.0, 0.0]
    assert softcap(x, 3.0)[2].isnan()


# windows


@given(st.integers(1, 12), st.integers(0, 6), st.integers(1, 8), st.integers(0, 99))
def test_local_mask_equals_loops(num_slots, start, window, seed):
    start = min(start, num_slots - 1)
    generator = torch.Generator().manual_seed(seed)
    slots = torch.arange(start, num_slots)
    mask = torch.rand(2, 1, len(slots), num_slots, generator=generator) < 0.7
    local = _local_mask(mask, slots, window)
    for row, slot in enumerate(slots.tolist()):
        for key in range(num_slots):
            near = slot - key < window
            expected = mask[:, 0, row, key] & near
            assert torch.equal(local[:, 0, row, key], expected)


def test_the_window_of_layer_0_is_the_window():
    """The token itself and four others, and nothing further back."""
    gemma = copy.deepcopy(gemma_of(replace(GEMMA2, depth=1))).double()
    x = torch.randn(1, 9, 40, dtype=torch.float64)
    mask, positions = plan_of(torch.ones(1, 9, dtype=torch.bool))
    moves = torch.autograd.functional.jacobian(
        lambda x: gemma(x, positions=positions, mask=mask)[0, 8], x
    )
    assert (moves.abs().amax(dim=(0, 1, 3)) > 0).tolist() == [False] * 4 + [True] * 5


def test_a_window_longer_than_the_text_changes_nothing():
    wide = copy.deepcopy(gemma_of(replace(GEMMA2, window=14)))
    none = gemma_of(replace(GEMMA2, window=None))
    assert torch.equal(run(wide, IDS), run(none, IDS))


# GeGLU


def test_geglu_equals_its_formula():
    layer = fan_in(GeGLU(7, 11)).double()
    x = 3 * torch.randn(2, 5, 7, dtype=torch.float64)
    gate, up = x @ layer.gate_proj.weight.T, x @ layer.up_proj.weight.T
    bent = (
        gate / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    )
    expected = (bent * up) @ layer.down_proj.weight.T
    assert (layer(x) - expected).abs().max() < 1e-12
    assert all(linear.bias is None for linear in layer.children())


# bad input


@pytest.fixture
def fit():
    """Arguments of a forward with a cache, all as they should be."""
    gemma, memory = gemma_of(GEMMA2), new_cache(GEMMA2, 3, 16)
    slots = memory.reserve(4)
    mask, positions = plan_of(torch.ones(3, 16, dtype=torch.bool))
    x = gemma.embed(IDS[:, :4])
    return {
        "x": x.detach(),
        "positions": positions[:, slots],
        "mask": mask[:, :, slots],
        "cache": memory,
    }


def other_cache(**sizes):
    options = {
        "depth": 4,
        "batch_size": 3,
        "num_kv_heads": 2,
        "head_dim": 12,
        "num_slots": 16,
    }
    memory = KVCache(**(options | sizes))
    memory.reserve(4)
    return memory


SHAPE = r"positions: expected \(3, 4\), found "
MASK = r"mask: expected \(3, 1, 4, 16\), found "
BAD = {
    "width": ({"x": torch.ones(3, 4, 39)}, r"x: expected B T 40, found \(3, 4, 39\)"),
    "rank 2": ({"x": torch.ones(4, 40)}, r"x: expected B T 40, found \(4, 40\)"),
    "rank 1": ({"x": torch.ones(40)}, r"x: expected B T 40, found \(40,\)"),
    "rank 4": ({"x": torch.ones(1, 3, 4, 40)}, r"x: .* found \(1, 3, 4, 40\)"),
    "integers": ({"x": torch.ones(3, 4, 40).long()}, "floating-point"),
    "a number for positions": ({"positions": 3}, f"{SHAPE}3"),
    "a list for positions": ({"positions": [0, 1, 2, 3]}, rf"{SHAPE}\[0, 1, 2, 3\]"),
    "no positions": ({"positions": None}, f"{SHAPE}None"),
    "one row of positions": ({"positions": torch.arange(4)}, rf"{SHAPE}.*\[4\]"),
    "floats for positions": (
        {"positions": torch.zeros(3, 4)},
        "positions: expected integers",
    ),
    "another batch of positions": (
        {"positions": torch.zeros(2, 4).long()},
        rf"{SHAPE}.*\[2, 4\]",
    ),
    "no mask": ({"mask": None}, f"{MASK}None"),
    "a list for a mask": ({"mask": [True]}, rf"{MASK}\[True\]"),
    "a mask of the tokens only": (
        {"mask": torch.ones(3, 1, 4, 4).bool()},
        rf"{MASK}.*\[3, 1, 4, 4\]",
    ),
    "a mask for another batch": (
        {"mask": torch.ones(1, 1, 4, 16).bool()},
        rf"{MASK}.*\[1, 1, 4, 16\]",
    ),
    "a mask of numbers": (
        {"mask": torch.ones(3, 1, 4, 16)},
        "mask: expected torch.bool, found torch.float32",
    ),
    "a cache for another batch": (
        {"cache": other_cache(batch_size=2)},
        r"expected .*\(2, 2, 4, 12\).*found .*\(3, 2, 4, 12\)",
    ),
    "a cache of another depth": (
        {"cache": other_cache(depth=3)},
        "layers of the cache: expected 4, found 3",
    ),
    "a cache of other heads": (
        {"cache": other_cache(num_kv_heads=4)},
        r"expected .*\(3, 4, 4, 12\).*found .*\(3, 2, 4, 12\)",
    ),
    "nothing reserved": (
        {"cache": new_cache(GEMMA2, 3, 16)},
        "slots reserved: expected 4, found 0",
    ),
    "too short a cache": (
        {"cache": other_cache(num_slots=12)},
        r"mask: expected \(3, 1, 4, 12\), found .*\[3, 1, 4, 16\]",
    ),
    "a cache in another dtype": (
        {"cache": other_cache(dtype=torch.float16)},
        "float16.*found.*float32",
    ),
}


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
def test_arguments_that_do_not_fit_are_a_value_error(bad, message, fit, as_user):
    arguments = fit | bad
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        gemma_of(GEMMA2)(arguments.pop("x"), **arguments)


def test_arguments_that_fit_are_fine(fit, as_user):
    with torch.no_grad():
        assert gemma_of(GEMMA2)(fit.pop("x"), **fit).isfinite().all()


def test_a_full_cache_is_a_value_error(as_user):
    memory = new_cache(GEMMA2, 3, 16)
    memory.reserve(14)
    with pytest.raises(ValueError, match="expected 1 to 2.* found 3"):
        memory.reserve(3)


@pytest.mark.parametrize("bad", [97, -1, 2**40])
def test_an_id_out_of_range_is_a_value_error(bad, as_user):
    ids = IDS.clone()
    ids[1, 2] = bad
    message = rf"0 to 96 \(the vocabulary has 97 words\), found .* \[{bad}\]"
    with pytest.raises(ValueError, match=message):
        gemma_of(GEMMA2).embed(ids)


@pytest.mark.parametrize(
    "ids",
    [torch.ones(2, 3), torch.ones(3).long(), torch.ones(2, 3).bool()],
    ids=["floats", "one axis", "booleans"],
)
def test_ids_of_another_kind_are_a_value_error(ids, as_user):
    with pytest.raises(ValueError, match=r"ids: expected int32 or int64 \[B, T\]"):
        gemma_of(GEMMA2).embed(ids)


def test_ids_may_be_int32_and_none():
    gemma = gemma_of(GEMMA2)
    assert torch.equal(gemma.embed(IDS.int()), gemma.embed(IDS))
    assert gemma.embed(IDS[:, :0]).shape == (3, 0, 40)
    assert gemma.embed(IDS[:0]).shape == (0, 14, 40)
    assert run(gemma, IDS[:0]).shape == (0, 14, 97)


def test_bad_heads_are_a_value_error(as_user):
    with pytest.raises(ValueError, match="q, k, v: expected"):
        attend_softcapped(*(torch.ones(2, 3, 4) for _ in range(3)), cap=2.0)
    heads = draw_heads(SIZES[1])
    with pytest.raises(ValueError, match="mask: expected booleans"):
        attend_softcapped(*heads, torch.ones(2, 1, 5, 5), cap=2.0)


@pytest.mark.parametrize(
    "bad",
    [
        {"width": 0},
        {"depth": 0},
        {"num_heads": 3},
        {"num_kv_heads": 0},
        {"num_kv_heads": 3},
        {"head_dim": 7},
        {"vocab_size": -1},
        {"query_scale": 0.0},
        {"attention_softcap": -50.0},
        {"final_softcap": 0.0},
        {"window": 0},
        {"rope_base": -1.0},
        {"rope_base": None},
        {"vocab_size": None},
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_a_value_error(bad, as_user):
    (name, value), *_ = bad.items()
    if name == "num_heads":  # one that num_kv_heads does not divide
        name, value = "num_kv_heads", GEMMA2.num_kv_heads
    with pytest.raises(ValueError, match=f"{name}: expected .* found {value}$"):
        replace(GEMMA2, **bad)


def test_the_configuration_is_frozen_and_named():
    with pytest.raises(AttributeError):
        GEMMA_2B.width = 4
    with pytest.raises(TypeError):
        GemmaConfig(40, 4, 72, 4, 2, 12, 97)
    assert replace(GEMMA_2B, depth=2).depth == 2 and hash(GEMMA_2B)


def test_norms_of_both_generations():
    kinds = {
        config: [
            type(getattr(gemma_of(config).layers[0], name)).__name__
            for name in (
                "pre_attention_norm",
                "post_attention_norm",
                "pre_mlp_norm",
                "post_mlp_norm",
            )
        ]
        for config in (GEMMA1, GEMMA2)
    }
    assert kinds[GEMMA1] == ["RMSNorm", "Identity", "RMSNorm", "Identity"]
    assert kinds[GEMMA2] == ["RMSNorm"] * 4
    assert not any(isinstance(m, nn.LayerNorm) for m in gemma_of(GEMMA2).modules())


# the verses


def test_verses():
    training, held_out = load_verses()
    assert len(training) == 54 and len(held_out) == 6
    verses = training + held_out
    assert len(set(verses)) == 60
    for verse in verses:
        lines = verse.split("\n")
        assert len(lines) == 4 and verse.isascii() and verse == verse.lower()
        assert all(line == line.strip() and 20 < len(line) < 42 for line in lines)
        assert verse[-1] == "."
    assert not set("\n".join(held_out).split("\n")) & set(
        "\n".join(training).split("\n")
    )
