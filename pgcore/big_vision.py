"""big_vision's ``.npz`` files: the arrays of the JAX code, made ours.

Written by hand: a table of names and orders of axes. A file holds no sizes, so the
configuration is the caller's. Source: big_vision, ``models/vit.py`` and
``models/ppp/gemma.py``.
"""

import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from pgcore.files import one_line, require_file
from pgcore.paligemma import PaliGemma, PaliGemmaConfig
from pgcore.weights import empty_model, require_same

# For each of ours: the array, its axes, and the order of them that makes it ours. An
# axis that is not ours is a place in it: the layer; first or second of two.
_TOP = {
    "vision.patch_embedding.conv.weight": (
        "img/embedding/kernel",
        "row column C D -> D C row column",
    ),
    "vision.patch_embedding.conv.bias": ("img/embedding/bias", "D -> D"),
    "vision.positions": ("img/pos_embedding", "1 P D -> 1 P D"),
    "vision.post_layernorm.weight": ("img/Transformer/encoder_norm/scale", "D -> D"),
    "vision.post_layernorm.bias": ("img/Transformer/encoder_norm/bias", "D -> D"),
    "projector.linear.weight": ("img/head/kernel", "features D -> D features"),
    "projector.linear.bias": ("img/head/bias", "D -> D"),
    "language.embed_tokens.weight": ("llm/embedder/input_embedding", "V D -> V D"),
    "language.norm.weight": ("llm/final_norm/scale", "D -> D"),
}
_HEADS = "MultiHeadDotProductAttention_0"
_VISION_LAYERS = {
    "layer_norm1.weight": ("LayerNorm_0/scale", "L D -> D"),
    "layer_norm1.bias": ("LayerNorm_0/bias", "L D -> D"),
    "layer_norm2.weight": ("LayerNorm_1/scale", "L D -> D"),
    "layer_norm2.bias": ("LayerNorm_1/bias", "L D -> D"),
    "self_attn.q_proj.weight": (f"{_HEADS}/query/kernel", "L D N H -> N H D"),
    "self_attn.q_proj.bias": (f"{_HEADS}/query/bias", "L N H -> N H"),
    "self_attn.k_proj.weight": (f"{_HEADS}/key/kernel", "L D N H -> N H D"),
    "self_attn.k_proj.bias": (f"{_HEADS}/key/bias", "L N H -> N H"),
    "self_attn.v_proj.weight": (f"{_HEADS}/value/kernel", "L D N H -> N H D"),
    "self_attn.v_proj.bias": (f"{_HEADS}/value/bias", "L N H -> N H"),
    "self_attn.o_proj.weight": (f"{_HEADS}/out/kernel", "L N H D -> D N H"),
    "self_attn.o_proj.bias": (f"{_HEADS}/out/bias", "L D -> D"),
    "mlp.fc1.weight": ("MlpBlock_0/Dense_0/kernel", "L D F -> F D"),
    "mlp.fc1.bias": ("MlpBlock_0/Dense_0/bias", "L F -> F"),
    "mlp.fc2.weight": ("MlpBlock_0/Dense_1/kernel", "L F D -> D F"),
    "mlp.fc2.bias": ("MlpBlock_0/Dense_1/bias", "L D -> D"),
}
_TEXT_LAYERS = {
    "pre_attention_norm.weight": ("pre_attention_norm/scale", "L D -> D"),
    "self_attn.q_proj.weight": ("attn/q_einsum/w", "L N D H -> N H D"),
    "self_attn.k_proj.weight": ("attn/kv_einsum/w", "L 2 K D H -> K H D", 0),
    "self_attn.v_proj.weight": ("attn/kv_einsum/w", "L 2 K D H -> K H D", 1),
    "self_attn.o_proj.weight": ("attn/attn_vec_einsum/w", "L N H D -> D N H"),
    "post_attention_norm.weight": ("post_attention_norm/scale", "L D -> D"),
    "pre_mlp_norm.weight": ("pre_ffw_norm/scale", "L D -> D"),
    "mlp.gate_proj.weight": ("mlp/gating_einsum", "L 2 D F -> F D", 0),
    "mlp.up_proj.weight": ("mlp/gating_einsum", "L 2 D F -> F D", 1),
    "mlp.down_proj.weight": ("mlp/linear", "L F D -> D F"),
    "post_mlp_norm.weight": ("post_ffw_norm/scale", "L D -> D"),
}


class _Source(NamedTuple):
    """Where a parameter of ours comes from."""

    array: str
    axes: list[str]  # of the array
    place: tuple[int, ...]  # in the first of them
    order: list[int]  # of the others, to be ours


class _Header(NamedTuple):
    """An array in a file, not read yet."""

    member: str
    shape: tuple[int, ...]
    dtype: np.dtype


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
    sources = {name: _source(name) for name in model.state_dict()}
    expected = {s.array: _shape(s, config) for s in sources.values()}
    weights: dict[str, Tensor] = {}
    with ExitStack() as stack:
        with _reading(path):
            file = stack.enter_context(zipfile.ZipFile(path))
            headers = _headers(file)
        found = {array: header.shape for array, header in headers.items()}
        require_same(expected, found, str(path))
        for array, header in headers.items():  # one of them in memory at a time
            with _reading(path, array):
                whole = _read(file, header)
            for name, source in sources.items():
                if source.array == array:
                    part = whole[source.place].permute(source.order)
                    part = part.reshape(model.get_parameter(name).shape)  # joins heads
                    weights[name] = part.to(device, dtype, copy=True)
                    del part
            del whole
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _source(name: str) -> _Source:
    if name in _TOP:
        (array, pattern), place = _TOP[name], ()
    else:
        wing, _, layer, leaf = name.split(".", 3)
        below, table = {
            "vision": ("img/Transformer/encoderblock/", _VISION_LAYERS),
            "language": ("llm/layers/", _TEXT_LAYERS),
        }[wing]
        array, pattern, *half = table[leaf]
        array, place = below + array, (int(layer), *half)
    axes, ours = (side.split() for side in pattern.split(" -> "))
    order = [axes[len(place) :].index(axis) for axis in ours]
    return _Source(array, axes, place, order)


def _shape(source: _Source, config: PaliGemmaConfig) -> tuple[int, ...]:
    """What the array of a model of these sizes has."""
    vision, text = config.vision, config.text
    if source.array == "img/head/kernel":  # from one wing to the other
        return vision.width, text.width
    sizes = {"1": 1, "2": 2, "C": 3, "P": vision.num_patches}
    sizes |= {"row": vision.patch_size, "column": vision.patch_size}
    sizes |= {"K": text.num_kv_heads, "V": text.vocab_size}
    is_vision = source.array.startswith("img/") and source.array != "img/head/bias"
    wing = vision if is_vision else text
    sizes |= {"L": wing.depth, "D": wing.width, "F": wing.mlp_dim}
    sizes |= {"N": wing.num_heads, "H": wing.head_dim}
    return tuple(sizes[axis] for axis in source.axes)


@contextmanager
def _reading(path: Path, array: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a reader of broken bytes may raise anything
        where = f"{path}: {array}" if array else str(path)
        reason = one_line(str(error) or type(error).__name__)
        raise ValueError(
            f"{where}: expected an .npz file of floats, found {reason}"
        ) from None


def _headers(file: zipfile.ZipFile) -> dict[str, _Header]:
    headers: dict[str, _Header] = {}
    for member in file.namelist():
        array = one_line(member.removesuffix(".npy").removeprefix("params/"))
        if array in headers:
            raise ValueError(f"{array} twice")
        with file.open(member) as stream:
            if (version := npy.read_magic(stream)) != (1, 0):  # others: long headers
                raise ValueError(f"{array} of version {version}")
            shape, _, kind = npy.read_array_header_1_0(stream)
        if kind != "V2" and (kind.kind != "f" or kind.itemsize > 8):
            raise ValueError(f"{array} of {kind}")
        headers[array] = _Header(member, shape, kind)
    return headers


def _read(file: zipfile.ZipFile, header: _Header) -> Tensor:
    with file.open(header.member) as stream:
        array = npy.read_array(stream, allow_pickle=False)
        if stream.read(1):  # at the end the checksum is compared
            raise ValueError("more bytes than its shape says")
    if header.dtype == "V2":  # NumPy has no bfloat16: two bytes without a type
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.astype(header.dtype.newbyteorder("="), copy=False))
