"""big_vision's ``.npz`` files: the arrays of the JAX code, made ours.

Written by hand: a table of names and orders of axes. A file holds no sizes, so the
configuration is the caller's. Source: big_vision, ``models/vit.py`` and
``models/ppp/gemma.py``.
"""

import math
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pgcore.files import require_file
from pgcore.paligemma import PaliGemma, PaliGemmaConfig
from pgcore.weights import empty_model, require_same

# For each of ours: the array, and the order of its axes that makes it ours.
_TOP = {
    "vision.patch_embedding.conv.weight": ("img/embedding/kernel", (3, 2, 0, 1)),
    "vision.patch_embedding.conv.bias": ("img/embedding/bias", (0,)),
    "vision.positions": ("img/pos_embedding", (0, 1, 2)),
    "vision.post_layernorm.weight": ("img/Transformer/encoder_norm/scale", (0,)),
    "vision.post_layernorm.bias": ("img/Transformer/encoder_norm/bias", (0,)),
    "projector.linear.weight": ("img/head/kernel", (1, 0)),
    "projector.linear.bias": ("img/head/bias", (0,)),
    "language.embed_tokens.weight": ("llm/embedder/input_embedding", (0, 1)),
    "language.norm.weight": ("llm/final_norm/scale", (0,)),
}
# Of layers: their arrays have the layers as a first axis, and some a part as second.
_HEADS = "MultiHeadDotProductAttention_0"
_VISION_LAYERS = {
    "layer_norm1.weight": ("LayerNorm_0/scale", (0,)),
    "layer_norm1.bias": ("LayerNorm_0/bias", (0,)),
    "layer_norm2.weight": ("LayerNorm_1/scale", (0,)),
    "layer_norm2.bias": ("LayerNorm_1/bias", (0,)),
    "self_attn.q_proj.weight": (f"{_HEADS}/query/kernel", (1, 2, 0)),  # D N H
    "self_attn.q_proj.bias": (f"{_HEADS}/query/bias", (0, 1)),  # N H
    "self_attn.k_proj.weight": (f"{_HEADS}/key/kernel", (1, 2, 0)),
    "self_attn.k_proj.bias": (f"{_HEADS}/key/bias", (0, 1)),
    "self_attn.v_proj.weight": (f"{_HEADS}/value/kernel", (1, 2, 0)),
    "self_attn.v_proj.bias": (f"{_HEADS}/value/bias", (0, 1)),
    "self_attn.o_proj.weight": (f"{_HEADS}/out/kernel", (2, 0, 1)),  # N H D
    "self_attn.o_proj.bias": (f"{_HEADS}/out/bias", (0,)),
    "mlp.fc1.weight": ("MlpBlock_0/Dense_0/kernel", (1, 0)),
    "mlp.fc1.bias": ("MlpBlock_0/Dense_0/bias", (0,)),
    "mlp.fc2.weight": ("MlpBlock_0/Dense_1/kernel", (1, 0)),
    "mlp.fc2.bias": ("MlpBlock_0/Dense_1/bias", (0,)),
}
_TEXT_LAYERS = {
    "pre_attention_norm.weight": ("pre_attention_norm/scale", (0,)),
    "self_attn.q_proj.weight": ("attn/q_einsum/w", (0, 2, 1)),  # N D H
    "self_attn.k_proj.weight": ("attn/kv_einsum/w", (0, 2, 1), 0),  # 2 K D H
    "self_attn.v_proj.weight": ("attn/kv_einsum/w", (0, 2, 1), 1),
    "self_attn.o_proj.weight": ("attn/attn_vec_einsum/w", (2, 0, 1)),  # N H D
    "post_attention_norm.weight": ("post_attention_norm/scale", (0,)),
    "pre_mlp_norm.weight": ("pre_ffw_norm/scale", (0,)),
    "mlp.gate_proj.weight": ("mlp/gating_einsum", (1, 0), 0),  # 2 D F
    "mlp.up_proj.weight": ("mlp/gating_einsum", (1, 0), 1),
    "mlp.down_proj.weight": ("mlp/linear", (1, 0)),  # F D
    "post_mlp_norm.weight": ("post_ffw_norm/scale", (0,)),
}


Source = tuple[str, tuple[int, ...], tuple[int, ...]]  # array, place in it, axes


def load_npz(
    path: str | Path,
    config: PaliGemmaConfig,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PaliGemma:
    """Load a big_vision checkpoint into a model of these sizes, ready for use.

    The published files have 257,152 rows in the table of words; Hugging Face's 64 more
    are padding. Names may begin with ``params/``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for what is no ``.npz`` of floats, and for arrays that are missing,
            unknown or of another shape.
    """
    path = Path(path)
    require_file(path)
    model = empty_model(config)
    shapes = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    sources = {name: _source(name) for name in shapes}
    weights: dict[str, Tensor] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name.removeprefix("params/"): name for name in file.files}
            names = {array: () for array, _, _ in sources.values()}
            require_same(names, dict.fromkeys(stored, ()), str(path))
            for array in stored:  # one of them in memory at a time
                whole = _floats(file[stored[array]])
                for name, (where, place, axes) in sources.items():
                    if where == array:
                        part = _arranged(whole, place, axes, shapes[name])
                        weights[name] = part.to(device, dtype, copy=True)
    except (zipfile.BadZipFile, OSError, EOFError, IndexError) as error:
        raise ValueError(f"{path}: expected an .npz file, found {error}") from None
    require_same(shapes, {n: tuple(w.shape) for n, w in weights.items()}, str(path))
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _source(name: str) -> Source:
    """Say where a parameter of ours comes from."""
    if name in _TOP:
        array, axes = _TOP[name]
        return array, (), axes
    wing, _, layer, leaf = name.split(".", 3)
    if wing == "vision":
        array, axes = _VISION_LAYERS[leaf]
        return f"img/Transformer/encoderblock/{array}", (int(layer),), axes
    array, axes, *part = _TEXT_LAYERS[leaf]
    return f"llm/layers/{array}", (int(layer), *part), axes


def _floats(array: np.ndarray) -> Tensor:
    """NumPy has no bfloat16: such arrays come as two bytes without a type."""
    if array.dtype == np.dtype("V2"):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind != "f":
        raise ValueError(f"expected floats, found {array.dtype}")
    return torch.from_numpy(array)


def _arranged(
    whole: Tensor, place: tuple[int, ...], axes: tuple[int, ...], shape: tuple[int, ...]
) -> Tensor:
    """Take a layer's part, order its axes, and join heads as our layer has them."""
    part = whole[place]
    if part.ndim != len(axes):
        return part  # its shape will be reported
    part = part.permute(axes)
    return part.reshape(shape) if part.numel() == math.prod(shape) else part
