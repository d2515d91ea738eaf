"""The processor's settings, in the files and words of Hugging Face.

Written by hand: nothing here but names. Chapter 11 reads and writes with it.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pgcore.files import read_json, shown

# What pgcore.processing does with pictures, so no file may ask for another.
_FIXED = {
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,  # bicubic
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
# Hugging Face would follow these, too; null, or nothing, is as good as ours.
_OR_NULL = {"do_convert_rgb": True, "do_center_crop": False, "do_pad": False}
_OWNER = {"processor_class": "PaliGemmaProcessor"}


def read_settings(folder: Path) -> tuple[int, int]:
    """The side of a picture and its number of tokens: R and P.

    They stand in ``preprocessor_config.json``, or since transformers 5 in
    ``processor_config.json``.

    Raises:
        FileNotFoundError: if neither file is there.
        ValueError: for sizes that are none, and for a setting of another value than
            ours.
    """
    old = folder / "preprocessor_config.json"
    path = old if old.is_file() else folder / "processor_config.json"
    settings = read_json(path)
    settings = settings.get("image_processor", settings)
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: image_processor: expected an object")
    for name, expected in (_FIXED | _OR_NULL).items():
        found = settings.get(name, expected)
        if found != expected and not (found is None and name in _OR_NULL):
            raise ValueError(
                f"{path}: {name}: expected {expected}, found {shown(found)}"
            )
    side = settings.get("size")
    if isinstance(side, dict) and side.get("height") == side.get("width"):
        side = side.get("height")
    length = settings.get("image_seq_length")
    return _size(path, "size", side), _size(path, "image_seq_length", length)


def _size(path: Path, name: str, found: Any) -> int:
    if type(found) is not int or not 1 <= found <= 10_000:
        raise ValueError(f"{path}: {name}: expected 1 to 10000, found {shown(found)}")
    return found


def settings_files(
    image_size: int, num_image_tokens: int, control_tokens: Iterable[str]
) -> dict[str, str]:
    """The files that ``read_settings`` and transformers read, by their names.

    Args:
        image_size: R.
        num_image_tokens: P.
        control_tokens: as in ``<bos>``.
    """
    pictures = _FIXED | {
        "size": {"height": image_size, "width": image_size},
        "image_seq_length": num_image_tokens,
        "image_processor_type": "SiglipImageProcessor",
    }
    tokens = {f"{token[1:-1]}_token": token for token in control_tokens} | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left",
    }
    return {
        "preprocessor_config.json": json.dumps(pictures | _OWNER, indent=2),
        "tokenizer_config.json": json.dumps(tokens | _OWNER, indent=2),
    }
