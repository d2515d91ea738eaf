"""Files of weights: one, or several and the index that says which holds what.

Written by hand: it knows Hugging Face's names of files, and nothing of models.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from pgcore.files import read_json

WHOLE = "model.safetensors"
INDEX = f"{WHOLE}.index.json"
_PICKLES = ".bin", ".pt", ".pth", ".ckpt", ".pkl"


def weight_files(folder: Path) -> list[Path]:
    """The one file, there or not, or those that the index names, if there is one.

    Raises:
        FileNotFoundError: if there are weights, but none that are safetensors.
        ValueError: for an index that names no files in this folder, or has the one
            file beside it: who knows which of the two is older?
    """
    whole, index = folder / WHOLE, folder / INDEX
    if not index.is_file():
        if not whole.is_file():
            _advise(folder)
        return [whole]
    if whole.is_file():
        raise ValueError(
            f"{index}: expected either an index or {WHOLE}, found both; remove the one"
            " that is older"
        )
    where = read_json(index).get("weight_map")
    names: list = [*where.values()] if isinstance(where, dict) else [0]
    if any(type(name) is not str or Path(name).name != name for name in names):
        raise ValueError(f"{index}: weight_map: expected file names in this folder")
    return [folder / name for name in sorted(set(names))]


def _advise(folder: Path) -> None:
    """Say what to do with weights that are there in another format."""
    for path in sorted(folder.glob("*")):
        if path.suffix == ".npz":
            advice = "it is Big Vision's: read it with pgcore.big_vision.load_npz"
        elif path.suffix in _PICKLES:
            advice = "it is a pickle, which may run code: save it as safetensors"
        else:
            continue
        raise FileNotFoundError(
            f"{folder}: expected {WHOLE}, found only {path.name}; {advice}"
        )


def save_shards(
    weights: Mapping[str, Tensor], folder: Path, max_shard_bytes: int
) -> None:
    """Write one file, or several and their index; a tensor is never cut."""
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for name, weight in weights.items():
        if weight.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = weight
        room -= weight.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / WHOLE, {"format": "pt"})
        return
    where = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        where |= dict.fromkeys(shard, file)
    total = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
