# Generated from chapters/13_real_weights.ipynb.
# Edit the notebook, then run "make chapters".
"""Wrong twins from chapter 13, Real weights."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from pgcore.files import read_json
from pgcore.hub_config import config_from_json
from pgcore.paligemma import PaliGemma
from pgcore.weights import (
    empty_model,
    hugging_face_name,
    load_model,
    require_same,
    stored_tensors,
)


def load_pickle(path):
    """Unpickles whatever the file says: it may run any code.

    In many scripts, since an old file will not load otherwise.
    """
    return torch.load(path, weights_only=False)


def load_whatever_fits(folder):
    """Takes what it knows by name and says nothing of the rest.

    ``strict=False`` with the result ignored, as in the loader of
    hkproj/pytorch-paligemma.
    """
    config = config_from_json(read_json(Path(folder) / "config.json"))
    model = PaliGemma(config)
    kind = config.text.post_norms
    ours = {hugging_face_name(n, kind): n for n in model.state_dict()}
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        names: list[str] = list(file.keys())
        found = {ours.get(n, n): file.get_tensor(n) for n in names}
    model.load_state_dict(found, strict=False)
    return model.eval()


def o_proj_reshaped_only(kernel):
    """N H D to N*H D: a transpose is missing."""
    return kernel.reshape(-1, kernel.shape[-1])


def o_proj_by_accident(kernel):
    """The two sizes the wrong way round: Hugging Face's first converter."""
    rows = kernel.shape[0] * kernel.shape[1]
    return kernel.permute(2, 0, 1).reshape(rows, kernel.shape[2])


def key_and_value_swapped(kernel):
    """2 K D H to (k_proj, v_proj), the wrong one of the two first."""
    value, key = kernel.transpose(-2, -1).flatten(1, 2)
    return key, value


def load_by(folder, name_of):
    """Load with another table of names. Strict, as ``load_model`` is."""
    config = config_from_json(read_json(Path(folder) / "config.json"))
    stored, model = stored_tensors(Path(folder)), empty_model(config)
    kind = config.text.post_norms
    names = {n: name_of(n, kind) for n in model.state_dict()}
    ours = {names[n]: tuple(w.shape) for n, w in model.state_dict().items()}
    require_same(ours, {n: s.shape for n, s in stored.items()}, str(folder))
    weights = {
        n: stored[there].read("cpu", stored[there].dtype) for n, there in names.items()
    }
    model.load_state_dict(weights, assign=True)
    return model.eval()


def swapped(name, one, other):
    """The name with the two words exchanged."""
    words = {one: other, other: one}
    return ".".join(words.get(word, word) for word in name.split("."))


def norms_as_in_paligemma_1(folder):
    """post_attention_layernorm is the norm before the MLP, as it was.

    What a port that learnt its names from PaliGemma 1 may do.
    """

    def name_of(name, post_norms):
        return hugging_face_name(
            swapped(name, "pre_mlp_norm", "post_attention_norm"), post_norms
        )

    return load_by(folder, name_of)


def gate_and_up_swapped(folder):
    """gating_einsum[0] taken for up, [1] for gate: they have one shape.

    Ours; no public case known.
    """

    def name_of(name, post_norms):
        name = swapped(name, "gate_proj", "up_proj")
        return hugging_face_name(name, post_norms)

    return load_by(folder, name_of)


def scale_from_head_dim(folder):
    """Scores by head_dim ** -0.5; the file says query_pre_attn_scalar.

    nano-paligemma2 and mini-paligemma2; wrong for PaliGemma 2 28B, where
    heads have 128 features and the scalar is 4608 / 32 = 144.
    """
    model = load_model(folder)
    text = replace(model.config.text, query_scale=None)
    wrong = PaliGemma(replace(model.config, text=text))
    wrong.load_state_dict(model.state_dict())
    return wrong.eval()


def norms_folded_in_bfloat16(folder):
    """Gemma's norms kept as 1 + w, in bfloat16: near 1 it is coarse.

    GEMMANormWeight of LightLLM, for a model in bfloat16.
    """
    model = load_model(folder)
    with torch.no_grad():
        for name, weight in model.language.named_parameters():
            if "norm" in name:
                weight.copy_((1 + weight).bfloat16().float() - 1)
    return model


TWINS = (
    load_whatever_fits,
    norms_as_in_paligemma_1,
    gate_and_up_swapped,
    scale_from_head_dim,
    norms_folded_in_bfloat16,
)
KERNEL_TWINS = (
    o_proj_reshaped_only,
    o_proj_by_accident,
    key_and_value_swapped,
)
