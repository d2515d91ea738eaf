"""Hugging Face's ``config.json``, read into a configuration and written from one.

Written by hand: nothing here but names. Chapter 13 reads and writes with it.
"""

from collections.abc import Mapping
from typing import Any

from pgcore.gemma import GemmaConfig
from pgcore.paligemma import PaliGemmaConfig
from pgcore.vision import VisionConfig

# Our field: Hugging Face's, and its default there (old files leave defaults out).
_VISION = {
    "width": ("hidden_size", None),
    "depth": ("num_hidden_layers", None),
    "mlp_dim": ("intermediate_size", None),
    "num_heads": ("num_attention_heads", None),
    "patch_size": ("patch_size", None),
    "image_size": ("image_size", 224),
}
_TEXT = {
    "width": ("hidden_size", None),
    "depth": ("num_hidden_layers", None),
    "mlp_dim": ("intermediate_size", None),
    "num_heads": ("num_attention_heads", None),
    "num_kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", 256),
    "vocab_size": ("vocab_size", None),
}
_GEMMA2 = {
    "attention_softcap": ("attn_logit_softcapping", 50.0),
    "final_softcap": ("final_logit_softcapping", 30.0),
    "window": ("sliding_window", 4096),
}
# What our model does in one way only, so no file may ask for another.
_VISION_FIXED = {
    "model_type": "siglip_vision_model",
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
    "vision_use_head": False,
}
_TEXT_FIXED = {"rms_norm_eps": 1e-6, "attention_bias": False, "rope_scaling": None}
_GELU = "gelu_pytorch_tanh"
_MOST = 10_000_000, 1000  # a larger size, more layers: a mistake, not a model


def config_from_json(data: Mapping[str, Any]) -> PaliGemmaConfig:
    """Read what ``config.json`` holds.

    The ``hidden_size`` beside the two parts is wrong in PaliGemma 2, and not read.

    Raises:
        ValueError: for another model, a size that is none, and for what our model
            would do otherwise than the file says.
    """
    _require(data, {"model_type": "paligemma"}, needed=True)
    vision, text = (_part(data, name) for name in ("vision_config", "text_config"))
    _require(vision, _VISION_FIXED)
    sizes = _sizes(vision, _VISION)
    return PaliGemmaConfig(
        vision=VisionConfig(**sizes, head_dim=sizes["width"] // sizes["num_heads"]),
        text=_text_config(text),
        image_token=_number(data, "image_token_index", 257_152),
    )


def config_to_json(config: PaliGemmaConfig, dtype: str) -> dict[str, Any]:
    """Write a configuration as transformers reads it; dtype as in "bfloat16".

    Raises:
        ValueError: for a decoder that is neither Gemma 1 nor Gemma 2.
    """
    text = _text_json(config.text)
    vision = {theirs: getattr(config.vision, o) for o, (theirs, _) in _VISION.items()}
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
    _require(text, _TEXT_FIXED)
    activation = text.get("hidden_activation") or text.get("hidden_act") or _GELU
    _require({"hidden_activation": activation}, {"hidden_activation": _GELU})
    rope = text.get("rope_parameters") or {"rope_theta": text.get("rope_theta", 1e4)}
    _require(rope, {"rope_type": "default"})
    sizes = _sizes(text, _TEXT)
    sizes["rope_base"] = float(_number(rope, "rope_theta", 1e4))
    kind = text.get("model_type")
    if kind == "gemma":
        return GemmaConfig(**sizes)
    _require(text, {"model_type": "gemma2"}, needed=True)
    _require(text, {"layer_types": _layer_types(sizes["depth"])})
    scalar = _number(text, "query_pre_attn_scalar", 256)
    caps: dict[str, Any] = {
        ours: None if text.get(name, default) is None else _number(text, name, default)
        for ours, (name, default) in _GEMMA2.items()
    }
    sizes["query_scale"] = None if scalar == sizes["head_dim"] else scalar**-0.5
    return GemmaConfig(**sizes, **caps, post_norms=True)


def _text_json(text: GemmaConfig) -> dict[str, Any]:
    found = {theirs: getattr(text, ours) for ours, (theirs, _) in _TEXT.items()}
    found |= _TEXT_FIXED | {
        "model_type": "gemma2" if text.post_norms else "gemma",
        "hidden_act": _GELU,
        "hidden_activation": _GELU,
        "rope_theta": text.rope_base,
        "tie_word_embeddings": True,
    }
    if text.post_norms:
        scalar = round((text.query_scale or text.head_dim**-0.5) ** -2, 6)
        found |= {theirs: getattr(text, ours) for ours, (theirs, _) in _GEMMA2.items()}
        found["query_pre_attn_scalar"] = (
            int(scalar) if scalar == int(scalar) else scalar
        )
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


def _part(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(found := data.get(name), dict):
        raise ValueError(f"{name}: expected an object, found {found!r}")
    return found


def _require(
    data: Mapping[str, Any], fixed: Mapping[str, Any], needed: bool = False
) -> None:
    """Compare what is there; with ``needed`` it must be there."""
    for name, expected in fixed.items():
        found = data.get(name, None if needed else expected)
        if found != expected:
            raise ValueError(f"{name}: expected {expected!r}, found {_short(found)}")


def _sizes(data: Mapping[str, Any], names: Mapping[str, tuple]) -> dict[str, Any]:
    sizes = {ours: _number(data, *theirs) for ours, theirs in names.items()}
    for ours, size in sizes.items():
        most = _MOST[ours == "depth"]
        if type(size) is not int or not 1 <= size <= most:
            name = names[ours][0]
            raise ValueError(f"{name}: expected 1 to {most}, found {_short(size)}")
    return sizes


def _number(data: Mapping[str, Any], name: str, default: int | float | None) -> Any:
    found = data.get(name, default)
    if type(found) not in (int, float) or not 0 < found < 1e12:
        raise ValueError(f"{name}: expected a number above 0, found {_short(found)}")
    return found


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
