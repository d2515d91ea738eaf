"""Read what tools/build_emoji.py wrote: the concepts and the sheets of pictures."""

import functools
import hashlib
import io
import json
from pathlib import Path
from typing import TypedDict

import numpy as np
from PIL import Image

ASSETS = Path(__file__).parents[1] / "assets" / "emoji"
REMEDY = "run `git checkout pgcore/assets/emoji`, or install the package again"


class Concept(TypedDict):
    """One line of concepts.json."""

    code: str  # Unicode code point, hexadecimal
    group: str  # such as "food-drink"
    names: dict[str, str]  # language -> name
    keywords: dict[str, list[str]]  # language -> keywords
    cells: dict[str, int]  # style -> place on its sheet; absent where not drawn


class Catalogue(TypedDict):
    """The whole of concepts.json."""

    cell: int  # pixels a side
    columns: int  # cells a row
    languages: list[str]
    sheets: dict[str, str]  # style -> file
    concepts: list[Concept]


def read_asset(name: str) -> bytes:
    """Read one file of the assets and compare it with SHA256SUMS.

    Raises FileNotFoundError if it is missing, ValueError if it has been changed.
    """
    for needed in (name, "SHA256SUMS"):
        if not (ASSETS / needed).is_file():
            raise FileNotFoundError(f"{ASSETS / needed} is missing: {REMEDY}")
    data = (ASSETS / name).read_bytes()
    line = f"{hashlib.sha256(data).hexdigest()}  {name}"
    if line not in (ASSETS / "SHA256SUMS").read_text("utf-8").splitlines():
        raise ValueError(f"{ASSETS / name} differs from SHA256SUMS: {REMEDY}")
    return data


@functools.cache
def catalogue() -> Catalogue:
    """Read concepts.json, once."""
    return json.loads(read_asset("concepts.json"))


@functools.cache
def cells(style: str) -> np.ndarray:
    """Decode the sheet of one style, once: uint8 [B, R, R, 4], straight alpha."""
    side = catalogue()["cell"]
    page = np.asarray(
        Image.open(io.BytesIO(read_asset(catalogue()["sheets"][style]))).convert("RGBA")
    )
    rows, columns = page.shape[0] // side, page.shape[1] // side
    grid = page.reshape(rows, side, columns, side, 4).swapaxes(1, 2)
    flat = grid.reshape(-1, side, side, 4)
    flat.flags.writeable = False  # shared by every caller
    return flat
