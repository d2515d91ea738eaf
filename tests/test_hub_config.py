"""config.json: read as transformers reads it, written as it writes it, or refused."""

import copy
import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgcore import paligemma
from pgcore.gemma import GEMMA2_27B, GemmaConfig
from pgcore.hub_config import config_from_json, config_to_json
from pgcore.paligemma import PaliGemmaConfig
from pgcore.vision import SO400M_14_224, VisionConfig
from tests.checkpoints import GEMMA1, GEMMA2, is_one_short_line, tiny_config

PRESETS = {n: c for n, c in vars(paligemma).items() if isinstance(c, PaliGemmaConfig)}
EVERY_PRESET = pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
BOTH = pytest.mark.parametrize("text", [GEMMA1, GEMMA2], ids=["gemma1", "gemma2"])

# As Google's first files say it: what is a default of Gemma or SigLIP is left out.
HUB_3B = {
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "bos_token_id": 2,
    "eos_token_id": 1,
    "hidden_size": 2048,
    "ignore_index": -100,
    "image_token_index": 257152,
    "model_type": "paligemma",
    "pad_token_id": 0,
    "projection_dim": 2048,
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_image_tokens": 256,
        "num_key_value_heads": 1,
        "torch_dtype": "float32",
        "vocab_size": 257216,
    },
    "torch_dtype": "float32",
    "transformers_version": "4.42.0.dev0",
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "num_image_tokens": 256,
        "patch_size": 14,
        "projection_dim": 2048,
        "projector_hidden_act": "gelu_fast",
        "vision_use_head": False,
    },
}


def edited(path, value, text=GEMMA2):
    """What config.json says, with one field changed: "text_config.head_dim"."""
    data = config_to_json(tiny_config(text), "float32")
    *parts, name = path.split(".")
    place = data
    for part in parts:
        place = place[part]
    place[name] = value
    return data


def without(path, text=GEMMA2):
    data = edited(path, None, text)
    part, _, name = path.rpartition(".")
    del (data[part] if part else data)[name]
    return data


def through_a_file(data):
    return json.loads(json.dumps(data))


# there and back


@EVERY_PRESET
def test_presets_come_back(config):
    data = through_a_file(config_to_json(config, "bfloat16"))
    assert config_from_json(data) == config


@st.composite
def visions(draw):
    size = st.integers(1, 9)
    heads, head_dim, patch = draw(size), draw(size), draw(size)
    return VisionConfig(
        width=heads * head_dim,
        depth=draw(st.integers(1, 1000)),
        mlp_dim=draw(st.integers(1, 1_000_000)),
        num_heads=heads,
        head_dim=head_dim,
        patch_size=patch,
        image_size=patch * draw(st.integers(1, 99)),
    )


@st.composite
def texts(draw):
    kv_heads, groups = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    head_dim = 2 * draw(st.integers(1, 999))
    config = GemmaConfig(
        width=kv_heads * groups * draw(st.integers(1, 99)),
        depth=draw(st.integers(1, 99)),
        mlp_dim=draw(st.integers(1, 1_000_000)),
        num_heads=kv_heads * groups,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=draw(st.integers(1, 10_000_000)),
        rope_base=draw(st.floats(1, 1e9)),
    )
    if draw(st.booleans()):
        return config
    scalar = draw(st.integers(1, 99_999).filter(lambda n: n != head_dim))
    return replace(
        config,
        query_scale=draw(st.sampled_from([None, scalar**-0.5])),
        attention_softcap=draw(st.none() | st.floats(0.1, 1e4)),
        final_softcap=draw(st.none() | st.floats(0.1, 1e4)),
        window=draw(st.none() | st.integers(1, 2**31)),
        post_norms=True,
    )


configs = st.builds(
    PaliGemmaConfig, vision=visions(), text=texts(), image_token=st.integers(0, 2**31)
)


@given(configs)
def test_configurations_come_back(config):
    data = through_a_file(config_to_json(config, "float32"))
    assert config_from_json(data) == config


@given(st.floats(1e-4, 1e4))
def test_a_query_scale_comes_back_whatever_it_is(scale):
    config = tiny_config(replace(GEMMA2, query_scale=scale))
    data = through_a_file(config_to_json(config, "float32"))
    back = config_from_json(data).text.query_scale or GEMMA2.head_dim**-0.5
    assert math.isclose(back, scale, rel_tol=1e-9)


def test_a_decoder_that_has_no_name_on_the_hub_is_not_written():
    for change in ({"window": 5}, {"final_softcap": 3.0}, {"query_scale": 0.1}):
        config = tiny_config(replace(GEMMA1, **change))
        with pytest.raises(ValueError, match="expected a Gemma 1 without scale"):
            config_to_json(config, "float32")


# transformers


def hf_config(data):
    transformers = pytest.importorskip("transformers")
    return transformers.PaliGemmaConfig.from_dict(copy.deepcopy(data))


def assert_transformers_agrees(hf, config):
    """Field by field, in the words of both."""
    vision, text = config.vision, config.text
    assert hf.image_token_index == config.image_token
    assert hf.projection_dim == text.width
    found = hf.vision_config
    assert found.model_type == "siglip_vision_model" and not found.vision_use_head
    assert (found.hidden_size, found.num_hidden_layers) == (vision.width, vision.depth)
    assert found.intermediate_size == vision.mlp_dim
    assert found.num_attention_heads == vision.num_heads
    assert found.hidden_size // found.num_attention_heads == vision.head_dim
    assert (found.patch_size, found.image_size) == (
        vision.patch_size,
        vision.image_size,
    )
    assert (found.num_channels, found.layer_norm_eps) == (3, 1e-6)
    assert found.hidden_act == "gelu_pytorch_tanh"
    found = hf.text_config
    assert found.model_type == ("gemma2" if text.post_norms else "gemma")
    assert (found.hidden_size, found.num_hidden_layers) == (text.width, text.depth)
    assert found.intermediate_size == text.mlp_dim
    assert found.num_attention_heads == text.num_heads
    assert found.num_key_value_heads == text.num_kv_heads
    assert (found.head_dim, found.vocab_size) == (text.head_dim, text.vocab_size)
    assert found.rope_parameters["rope_theta"] == text.rope_base
    assert found.rope_parameters["rope_type"] == "default"
    assert (found.rms_norm_eps, found.attention_bias) == (1e-6, False)
    if not text.post_norms:
        assert found.hidden_act == "gelu_pytorch_tanh"
        return
    assert found.hidden_activation == "gelu_pytorch_tanh"
    scale = text.query_scale or text.head_dim**-0.5
    assert math.isclose(found.query_pre_attn_scalar**-0.5, scale)
    assert found.attn_logit_softcapping == text.attention_softcap
    assert found.final_logit_softcapping == text.final_softcap
    assert found.sliding_window == text.window
    assert [kind == "sliding_attention" for kind in found.layer_types] == [
        layer % 2 == 0 for layer in range(text.depth)
    ]


@EVERY_PRESET
def test_transformers_reads_the_presets_as_we_do_and_we_read_its(config):
    hf = hf_config(config_to_json(config, "bfloat16"))
    assert_transformers_agrees(hf, config)
    assert config_from_json(through_a_file(hf.to_dict())) == config
    assert config_from_json(through_a_file(hf.to_diff_dict())) == config


@settings(max_examples=100)
@given(configs)
def test_transformers_reads_any_configuration_as_we_do_and_we_read_its(config):
    hf = hf_config(config_to_json(config, "float32"))
    assert_transformers_agrees(hf, config)
    assert config_from_json(through_a_file(hf.to_dict())) == config


def test_old_files_leave_defaults_out():
    assert config_from_json(HUB_3B) == paligemma.PALIGEMMA_3B_224
    assert_transformers_agrees(hf_config(HUB_3B), paligemma.PALIGEMMA_3B_224)


def test_gemma_2_without_its_defaults_is_a_gemma_2():
    data = config_to_json(paligemma.PALIGEMMA2_3B_224, "bfloat16")
    for name in (
        *("head_dim", "query_pre_attn_scalar", "sliding_window", "layer_types"),
        *("attn_logit_softcapping", "final_logit_softcapping", "rope_theta"),
        *("rms_norm_eps", "hidden_act", "hidden_activation", "attention_bias"),
    ):
        del data["text_config"][name]
    del data["vision_config"]["image_size"]
    assert config_from_json(data) == paligemma.PALIGEMMA2_3B_224
    assert_transformers_agrees(hf_config(data), paligemma.PALIGEMMA2_3B_224)


@pytest.mark.parametrize("name", ["sliding_window", "attn_logit_softcapping"])
def test_null_says_none_where_a_default_would_say_one(name):
    ours = {"sliding_window": "window", "attn_logit_softcapping": "attention_softcap"}
    data = edited(f"text_config.{name}", None)
    assert getattr(config_from_json(data).text, ours[name]) is None
    assert getattr(hf_config(data).text_config, name) is None


@BOTH
def test_the_hidden_size_beside_the_parts_is_not_read(text):
    for wrong in (1, -1, "two", None):
        assert config_from_json(edited("hidden_size", wrong, text)) == tiny_config(text)


@BOTH
def test_fields_that_say_nothing_of_the_model_are_not_read(text):
    for name in ("use_cache", "text_config.dropout", "vision_config.num_image_tokens"):
        assert config_from_json(edited(name, "any", text)) == tiny_config(text)


def test_gemma_27b_is_scaled_by_its_own_scalar():
    text = replace(GEMMA2_27B, vocab_size=257_216)
    config = PaliGemmaConfig(vision=SO400M_14_224, text=text, image_token=257_152)
    data = config_to_json(config, "bfloat16")
    assert data["text_config"]["query_pre_attn_scalar"] == 144
    assert config_from_json(data).text.query_scale == 1 / 12


def test_rope_speaks_in_two_ways():
    old = edited("text_config.rope_theta", 500_000)
    new = without("text_config.rope_theta")
    new["text_config"]["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "default"}
    assert config_from_json(old) == config_from_json(new)
    assert config_from_json(old).text.rope_base == 500_000.0


# refused, in one line that names the field


def refuse(data, *words):
    with pytest.raises(ValueError) as caught:
        config_from_json(data)
    assert is_one_short_line(caught.value, 250)
    for word in words:
        assert word in str(caught.value)


SIZES = [
    *("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"),
]
VISION_SIZES = [*SIZES, "patch_size", "image_size"]
TEXT_SIZES = [*SIZES, "num_key_value_heads", "head_dim", "vocab_size"]
EVERY_SIZE = [f"vision_config.{name}" for name in VISION_SIZES]
EVERY_SIZE += [f"text_config.{name}" for name in TEXT_SIZES]
NO_SIZES = [0, -1, -(2**63), 10**9, 2**64, 10**400, 2.0, 1.5, 1e300, math.nan]
NO_SIZES += [math.inf, True, False, "8", "", "8\n" * 999, None, [8], {"8": 8}]


@pytest.mark.parametrize("path", EVERY_SIZE)
@pytest.mark.parametrize("value", NO_SIZES, ids=lambda v: repr(v)[:12])
def test_what_is_no_size(path, value):
    refuse(edited(path, value), *path.split("."), "expected 1 to")


@pytest.mark.parametrize(
    "path", [p for p in EVERY_SIZE if not p.endswith(("image_size", "head_dim"))]
)
def test_a_size_that_is_not_there(path):
    refuse(without(path), *path.split("."), "expected 1 to", "found None")


@pytest.mark.parametrize(
    "name",
    [
        *("query_pre_attn_scalar", "attn_logit_softcapping", "rope_theta"),
        *("final_logit_softcapping", "sliding_window"),
    ],
)
@pytest.mark.parametrize(
    "value",
    [0, -1, 1e300, 10**400, math.nan, True, "1", [1]],
    ids=lambda v: repr(v)[:9],
)
def test_what_is_no_number(name, value):
    refuse(edited(f"text_config.{name}", value), "text_config", name)


@pytest.mark.parametrize("value", [-1, 2**40, 5.0, math.nan, "257152", None, [1], True])
def test_what_is_no_image_token(value):
    refuse(edited("image_token_index", value), "image_token_index: expected 0 to")


def test_a_window_is_a_whole_number():
    refuse(edited("text_config.sliding_window", 4.5), "sliding_window", "found 4.5")


OTHER_MODELS = {
    "model_type": ["llava", None, 7, ["paligemma"]],
    "vision_config": [None, [], "siglip", 7],
    "text_config": [None, [], "gemma", 7],
    "vision_config.model_type": ["clip_vision_model", None],
    "vision_config.hidden_act": ["gelu", "gelu_new", "quick_gelu", None],
    "vision_config.layer_norm_eps": [1e-5, 0, None, "1e-6", math.nan],
    "vision_config.num_channels": [1, 4, None],
    "vision_config.vision_use_head": [True, None, "no"],
    "text_config.model_type": ["gemma3", "llama", None, ["gemma"], {}],
    "text_config.hidden_act": ["gelu", "silu", "", 0, []],
    "text_config.hidden_activation": ["gelu", "silu", "", 0, []],
    "text_config.rms_norm_eps": [1e-5, 0, None, math.nan],
    "text_config.attention_bias": [True, None, "no"],
    "text_config.rope_scaling": [{"type": "linear", "factor": 2.0}, 2.0, []],
    "text_config.rope_parameters": [
        *({"rope_type": "linear", "factor": 2.0}, {"rope_theta": "10000"}, [], 1e4, ""),
        {"rope_type": None},
    ],
    "text_config.use_bidirectional_attention": [False, "no"],
    "text_config.layer_types": [
        *(["full_attention"] * 2, ["full_attention", "sliding_attention"], []),
        *(["sliding_attention"], "sliding_attention", ["x"] * 9999),
    ],
}


@pytest.mark.parametrize(
    ("path", "value"),
    [(path, value) for path, values in OTHER_MODELS.items() for value in values],
    ids=lambda v: repr(v)[:40],
)
def test_another_model_than_ours(path, value):
    refuse(edited(path, value), *path.split("."), "expected")


@pytest.mark.parametrize("part", ["vision_config", "text_config"])
def test_heads_that_do_not_fit(part):
    name = {
        "vision_config": "num_attention_heads",
        "text_config": "num_key_value_heads",
    }
    refuse(edited(f"{part}.{name[part]}", 5 if part[0] == "v" else 3), part, name[part])


def test_patches_and_head_dims_that_do_not_fit():
    refuse(
        edited("vision_config.image_size", 15), "vision_config: image_size: expected"
    )
    refuse(
        edited("text_config.head_dim", 11), "text_config: head_dim: expected an even"
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
TINY_JSON = config_to_json(tiny_config(), "float32")
PATHS = [
    *TINY_JSON,
    *(f"text_config.{name}" for name in TINY_JSON["text_config"]),
    *(f"vision_config.{name}" for name in TINY_JSON["vision_config"]),
]


@given(st.sampled_from(PATHS), json_values)
def test_any_value_in_any_place_is_read_or_refused_in_one_line(path, value):
    try:
        config_from_json(edited(path, value))
    except ValueError as error:
        assert is_one_short_line(error, 250)
        assert path.rpartition(".")[2] in str(error)
