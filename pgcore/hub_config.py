"""Hugging Face's ``config.json``, read into a configuration and written from one.

Written by hand: nothing here but names. Chapter 13 reads and writes with it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pgcore.files import shown
from pgcore.gemma import GemmaConfig
from pgcore.paligemma import PaliGemmaConfig
from pgcore.vision import VisionConfig

# Our field: Hugging Face's, its default there (old files leave defaults out), and the
# most that is no mistake: a model of such sizes can be described, if not made.
_VISION = {
    "width": ("hidden_size", None, 1_000_000),
    "depth": ("num_hidden_layers", None, 1000),
    "mlp_dim": ("intermediate_size", None, 1_000_000),
    "num_heads": ("num_attention_heads", None, 10_000),
    "patch_size": ("patch_size", None, 10_000),
    "image_size": ("image_size", 224, 10_000),
}
_TEXT = {
    "width": ("hidden_size", None, 1_000_000),
    "depth": ("num_hidden_layers", None, 1000),
    "mlp_dim": ("intermediate_size", None, 1_000_000),
    "num_heads": ("num_attention_heads", None, 10_000),
    "num_kv_heads": ("num_key_value_heads", None, 10_000),
    "head_dim": ("head_dim", 256, 10_000),
    "vocab_size": ("vocab_size", None, 10_000_000),
}
_CAPS = {
    "attention_softcap": ("attn_logit_softcapping", 50.0),
    "final_softcap": ("final_logit_softcapping", 30.0),
}
_WINDOW = 4096
# What our model does in one way only, so no file may ask for another.
_GELU = "gelu_pytorch_tanh"
_VISION_FIXED = {
    "model_type": "siglip_vision_model",
    "hidden_act": _GELU,
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
    "vision_use_head": False,
}
_TEXT_FIXED = {"rms_norm_eps": 1e-6, "attention_bias": False, "rope_scaling": None}
_TOKENS = 2**31  # ids, and places that a window spans


def config_from_json(data: Mapping[str, Any]) -> PaliGemmaConfig:
    """Read what ``config.json`` holds.

    The ``hidden_size`` beside the two parts is wrong in PaliGemma 2, and not read.

    Raises:
        ValueError: for another model, a size that is none, and for what our model
            would do otherwise than the file says.
    """
    _require(data, {"model_type": "paligemma"}, needed=True)
    with _part(data, "vision_config") as vision:
        _require(vision, _VISION_FIXED)
        sizes = _sizes(vision, _VISION)
        if rest := sizes["width"] % sizes["num_heads"]:
            raise ValueError(
                f"num_attention_heads: expected a divisor of {sizes['width']}, found"
                f" {sizes['num_heads']} (rest {rest})"
            )
        head_dim = sizes["width"] // sizes["num_heads"]
        vision_config = VisionConfig(**sizes, head_dim=head_dim)
    with _part(data, "text_config") as text:
        text_config = _text_config(text)
    image_token = _whole(data, "image_token_index", None, 0, _TOKENS)
    return PaliGemmaConfig(
        vision=vision_config, text=text_config, image_token=image_token
    )


def config_to_json(config: PaliGemmaConfig, dtype: str) -> dict[str, Any]:
    """Write a configuration as transformers reads it; dtype as in "bfloat16".

    Raises:
        ValueError: for a decoder that is neither Gemma 1 nor Gemma 2.
    """
    text = _text_json(config.text)
    vision = {names[0]: getattr(config.vision, o) for o, names in _VISION.items()}
    vision |= _VISION_FIXED | {"projection_dim": config.text.width}
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "torch_dtype": dtype,
        "image_token_index": config.image_token,
        "hidden_size": config.text.width,
        "projection_dim": config.text.width,
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": vision,
    }


def _text_config(text: Mapping[str, Any]) -> GemmaConfig:
    kind = text.get("model_type", "gemma")
    if kind not in ("gemma", "gemma2"):
        raise ValueError(f"model_type: expected gemma or gemma2, found {shown(kind)}")
    _require(text, _TEXT_FIXED)
    for name in ("hidden_activation", "hidden_act"):  # null: not said
        if text.get(name) is not None:
            _require(text, {name: _GELU})
    if text.get("use_bidirectional_attention") is not None:  # of prompts
        _require(text, {"use_bidirectional_attention": True})
    sizes: dict[str, Any] = _sizes(text, _TEXT)
    if sizes["num_heads"] % sizes["num_kv_heads"]:
        raise ValueError(
            f"num_key_value_heads: expected a divisor of {sizes['num_heads']}, found"
            f" {sizes['num_kv_heads']}"
        )
    sizes["rope_base"] = _rope_base(text)
    if kind == "gemma":
        return GemmaConfig(**sizes)
    if text.get("layer_types") is not None:
        _require(text, {"layer_types": _layer_types(sizes["depth"])})
    scalar = _number(text, "query_pre_attn_scalar", 256)
    sizes["query_scale"] = None if scalar == sizes["head_dim"] else scalar**-0.5
    for ours, (name, default) in _CAPS.items():
        if text.get(name, default) is not None:
            sizes[ours] = float(_number(text, name, default))
    if text.get("sliding_window", _WINDOW) is not None:
        sizes["window"] = _whole(text, "sliding_window", _WINDOW, 1, _TOKENS)
    return GemmaConfig(**sizes, post_norms=True)


def _rope_base(text: Mapping[str, Any]) -> float:
    """Beside the other fields, or since transformers 5 in an object of its own."""
    if text.get("rope_parameters") is None:
        return float(_number(text, "rope_theta", 1e4))
    with _part(text, "rope_parameters") as rope:
        _require(rope, {"rope_type": "default"})
        return float(_number(rope, "rope_theta", 1e4))


def _text_json(text: GemmaConfig) -> dict[str, Any]:
    found = {names[0]: getattr(text, ours) for ours, names in _TEXT.items()}
    found |= _TEXT_FIXED | {
        "model_type": "gemma2" if text.post_norms else "gemma",
        "hidden_act": _GELU,
        "hidden_activation": _GELU,
        "rope_theta": text.rope_base,
        "tie_word_embeddings": True,
    }
    if text.post_norms:
        scalar = (text.query_scale or text.head_dim**-0.5) ** -2
        whole = round(scalar)  # transformers wants one
        exact = abs(scalar - whole) < 1e-9 * scalar
        found["query_pre_attn_scalar"] = whole if exact else scalar
        found |= {theirs: getattr(text, ours) for ours, (theirs, _) in _CAPS.items()}
        found["sliding_window"] = text.window
        found["layer_types"] = _layer_types(text.depth)
    elif any(
        (text.query_scale, text.attention_softcap, text.final_softcap, text.window)
    ):
        raise ValueError(
            "text: expected a Gemma 1 without scale, caps and window, or post_norms"
        )
    return found


def _layer_types(depth: int) -> list[str]:
    kinds = "sliding_attention", "full_attention"
    return [kinds[layer % 2] for layer in range(depth)]


@contextmanager
def _part(data: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """An object in the file; errors about it begin with its name."""
    if not isinstance(found := data.get(name), dict):
        raise ValueError(f"{name}: expected an object, found {shown(found)}")
    try:
        yield found
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _require(
    data: Mapping[str, Any], fixed: Mapping[str, Any], needed: bool = False
) -> None:
    """Compare what is there; with ``needed`` it must be there."""
    for name, expected in fixed.items():
        found = data.get(name, None if needed else expected)
        if found != expected:
            raise ValueError(
                f"{name}: expected {shown(expected)}, found {shown(found)}"
            )


def _sizes(data: Mapping[str, Any], names: Mapping[str, tuple]) -> dict[str, int]:
    return {
        ours: _whole(data, name, default, 1, most)
        for ours, (name, default, most) in names.items()
    }


def _whole(
    data: Mapping[str, Any], name: str, default: int | None, least: int, most: int
) -> int:
    found = data.get(name, default)
    if type(found) is not int or not least <= found <= most:
        raise ValueError(f"{name}: expected {least} to {most}, found {shown(found)}")
    return found


def _number(data: Mapping[str, Any], name: str, default: int | float) -> Any:
    found = data.get(name, default)
    if type(found) not in (int, float) or not 1e-12 < found < 1e12:
        raise ValueError(f"{name}: expected a number above 0, found {shown(found)}")
    return found
