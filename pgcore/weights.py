# Generated from chapters/13_real_weights.ipynb.
# Edit the notebook, then run "make chapters".
"""Real weights: from files in several layouts to one model, and back.

What a tensor is called in Hugging Face's files is a matter of one table.
Loading is strict: what is missing, unknown or of another shape is an
error. Nothing is ever unpickled.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pgcore.files import folder_written_whole, one_line, read_json, require_file
from pgcore.hub_config import config_from_json, config_to_json
from pgcore.paligemma import PaliGemma, PaliGemmaConfig
from pgcore.processing import BOS, EOS, PAD, Processor
from pgcore.shards import save_shards, weight_files

# How a name begins here, and in the files on the hub.
_TOWER = "vision_tower.vision_model."
_PARTS = {
    "vision.patch_embedding.conv.": _TOWER + "embeddings.patch_embedding.",
    "vision.positions": _TOWER + "embeddings.position_embedding.weight",
    "vision.layers.": _TOWER + "encoder.layers.",
    "vision.post_layernorm.": _TOWER + "post_layernorm.",
    "projector.": "multi_modal_projector.",
    "language.": "language_model.model.",
}
_TABLE = "language_model.model.embed_tokens.weight"
# What Gemma's norms are called there, in PaliGemma 1 and PaliGemma 2.
_NORMS = {
    "pre_attention_norm": ("input_layernorm", "input_layernorm"),
    "post_attention_norm": ("", "post_attention_layernorm"),
    "pre_mlp_norm": ("post_attention_layernorm", "pre_feedforward_layernorm"),
    "post_mlp_norm": ("", "post_feedforward_layernorm"),
}


def hugging_face_name(name: str, post_norms: bool) -> str:
    """What the files on the hub call a parameter of ``PaliGemma``.

    post_norms: of the configuration, True for PaliGemma 2. There
    post_attention_layernorm is the norm after the attention; in
    PaliGemma 1 it is the norm before the MLP. Raises ValueError for a
    name that is no parameter's.

    Built in chapter 13, Real weights.
    """
    ours = next((part for part in _PARTS if name.startswith(part)), None)
    if ours is None:
        raise ValueError(f"expected a parameter of PaliGemma, found {name}")
    name = _PARTS[ours] + name.removeprefix(ours)
    if name.startswith(_TOWER):
        return name.replace(".o_proj.", ".out_proj.")
    for ours, theirs in _NORMS.items():
        name = name.replace(f".{ours}.", f".{theirs[post_norms]}.")
    return name


def hub_name(name: str) -> str:
    """A name in any of Hugging Face's layouts, as the hub's files have it.

    transformers 4.52 put ``model.`` before all names and took it out of
    the language model's; 5.6 took ``vision_model.`` out. The head, a copy
    of the table of words, has had two names.

    Built in chapter 13, Real weights.
    """
    name = name.removeprefix("model.")
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    inner = r"^language_model\.(?!model\.)"
    name = re.sub(inner, "language_model.model.", name)
    return re.sub(r"^vision_tower\.(?!vision_model\.)", _TOWER, name)


def require_same(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    where: str,
) -> None:
    """Raise ValueError with a +/- list unless names and shapes agree.

    Built in chapter 13, Real weights.
    """
    wrong = [f"- {n} {expected[n]}" for n in expected if n not in found]
    wrong += [
        f"+ {one_line(name, 90)} {one_line(shape, 40)}"
        for name, shape in found.items()
        if name not in expected
    ]
    for name, shape in expected.items():
        if found.get(name, shape) != shape:
            there = one_line(found[name], 40)
            wrong.append(f"{name}: - {shape} + {there}")
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(
            f"{where}: weights that do not fit (- expected, + found): "
            f"{'; '.join(wrong[:4])}{more}"
        )


class _NothingDrawn(TorchFunctionMode):
    """Leaves out what torch.nn.init would do."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **kwargs)


def empty_model(config: PaliGemmaConfig) -> PaliGemma:
    """A model without memory, on the device "meta": names and shapes.

    Built in chapter 13, Real weights.
    """
    with torch.device("meta"), _NothingDrawn():
        return PaliGemma(config)


class Stored(NamedTuple):
    """A tensor in a file, not read yet.

    Built in chapter 13, Real weights.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, device: str, dtype: torch.dtype) -> Tensor:
        """Mapped from the file if nothing is to be changed, else copied.

        The file is opened for this tensor alone, so that what was mapped
        and copied goes at once, not when the last tensor is read.
        """
        with safe_open(self.path, "pt", device=device) as file:
            return file.get_tensor(self.name).to(dtype)


# fmt: off
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16,
           "F32": torch.float32, "F64": torch.float64}
# fmt: on


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """What the weight files hold, by the hub's names; not read yet.

    Raises FileNotFoundError for a missing file; ValueError for one that
    is broken, a name that comes twice, tensors that are not floats.

    Built in chapter 13, Real weights.
    """
    stored: dict[str, Stored] = {}
    for path in weight_files(folder):
        require_file(path)
        try:
            with safe_open(path, "pt") as file:
                views = [(n, file.get_slice(n)) for n in list(file.keys())]
                facts = [(n, v.get_dtype(), v.get_shape()) for n, v in views]
        except (SafetensorError, OSError, MemoryError) as error:
            raise ValueError(
                f"{path}: expected safetensors, found {one_line(error)}"
            ) from None
        for name, kind, shape in facts:
            where = f"{path}: {one_line(name, 90)}"
            if kind not in _DTYPES:
                raise ValueError(
                    f"{where}: expected numbers in {', '.join(_DTYPES)}, found {kind}"
                )
            if first := stored.get(hub_name(name)):
                raise ValueError(
                    f"{where}: expected once, found again as "
                    f"{one_line(first.name, 90)} in {first.path.name}"
                )
            found = Stored(path, name, tuple(shape), _DTYPES[kind])
            stored[hub_name(name)] = found
    return stored


class Checkpoint(NamedTuple):
    """What a folder holds: sizes, and tensors by our names, not read.

    Built in chapter 13, Real weights.
    """

    config: PaliGemmaConfig
    tensors: dict[str, Stored]


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Look at a checkpoint in Hugging Face's format, without loading it.

    Raises FileNotFoundError and ValueError, naming the file, for what is
    missing, broken or does not fit.

    Built in chapter 13, Real weights.
    """
    folder = Path(folder)
    path = folder / "config.json"
    data = read_json(path)
    try:
        config = config_from_json(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    stored = stored_tensors(folder)
    head = stored.pop("lm_head.weight", None)
    ours = empty_model(config).state_dict()
    names = {n: hugging_face_name(n, config.text.post_norms) for n in ours}
    shapes = {names[n]: tuple(weight.shape) for n, weight in ours.items()}
    require_same(shapes, {n: s.shape for n, s in stored.items()}, str(folder))
    if head is not None:
        _require_tied(head, stored[_TABLE])
    tensors = {n: stored[there] for n, there in names.items()}
    return Checkpoint(config, tensors)


def load_weights(
    checkpoint: Checkpoint, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> PaliGemma:
    """Read the tensors of a checkpoint into a model, in evaluation mode.

    dtype None: that of the files, float32 if they have several. On a CPU
    in that dtype nothing is copied: the weights are pages of the files.

    Built in chapter 13, Real weights.
    """
    config, stored = checkpoint
    kinds = {tensor.dtype for tensor in stored.values()}
    dtype = dtype or (torch.float32 if len(kinds) > 1 else [*kinds][0])
    if device == "cpu" and kinds == {dtype}:  # each file is mapped once
        paths = {tensor.path for tensor in stored.values()}
        files = {path: safe_open(path, "pt") for path in paths}
        weights = {n: files[t.path].get_tensor(t.name) for n, t in stored.items()}
    else:  # the largest first: while it is cast, nothing else is held
        order = sorted(stored, key=lambda n: -math.prod(stored[n].shape))
        weights = {n: stored[n].read(device, dtype) for n in order}
    model = empty_model(config)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def load_model(
    folder: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> PaliGemma:
    """``load_weights`` of what ``read_checkpoint`` finds in a folder.

    Built in chapter 13, Real weights.
    """
    return load_weights(read_checkpoint(folder), device=device, dtype=dtype)


def _require_tied(head: Stored, table: Stored) -> None:
    """A head in the file must be the table of words once more."""
    one, other = (s.read("cpu", s.dtype) for s in (head, table))
    if not torch.equal(one, other.to(one.dtype)):
        raise ValueError(
            f"{head.path}: {head.name}: expected the numbers of "
            f"{table.name} (PaliGemma's head is tied), found others"
        )


# Which files a checkpoint of ours has.
_OURS = re.compile(
    r"((generation_|preprocessor_|tokenizer_)?config|tokenizer)\.json"
    r"|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
)
_IDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


def save_pretrained(
    model: PaliGemma,
    processor: Processor,
    folder: str | Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a checkpoint that ``load_model`` and transformers read.

    The folder is new, or holds an earlier checkpoint, and is replaced as
    a whole when all is written. Names are the hub's.
    Raises ValueError if it holds anything else.

    Built in chapter 13, Real weights.
    """
    folder = Path(folder)
    others = [p.name for p in folder.glob("*") if not _OURS.fullmatch(p.name)]
    if others or folder.is_file():
        raise ValueError(
            f"{folder}: expected a new folder or one of a checkpoint "
            f"alone, found {others[0] if others else 'a file'}"
        )
    post_norms = model.config.text.post_norms
    weights = {
        hugging_face_name(name, post_norms): weight.detach().contiguous()
        for name, weight in model.state_dict().items()
    }
    dtype = str(model.projector.linear.weight.dtype).split(".")[-1]
    ids = {name: processor.id_of(token) for name, token in _IDS.items()}
    config = config_to_json(model.config, dtype) | ids
    with folder_written_whole(folder) as partial:
        save_shards(weights, partial, max_shard_bytes)
        processor.save(partial)
        for name, content in ("config", config), ("generation_config", ids):
            text = json.dumps(content, indent=2) + "\n"
            (partial / f"{name}.json").write_text(text)


__all__ = [
    "Checkpoint",
    "Stored",
    "empty_model",
    "hub_name",
    "hugging_face_name",
    "load_model",
    "load_weights",
    "read_checkpoint",
    "require_same",
    "save_pretrained",
    "stored_tensors",
]
