"""The emoji SigLIP that ships with the book: weights, words and how it was trained.

Made by ``pgcore.recipes.emoji_siglip``; it has never seen the test artist.
"""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pgcore.files import written_whole
from pgcore.lab.words import Words
from pgcore.siglip import SigLIP, TextConfig
from pgcore.vision import VisionConfig

FOLDER = Path(__file__).parents[1] / "assets" / "emoji_siglip"
WEIGHTS, LOG = "model.safetensors", "training.json"


def save_emoji_siglip(folder: Path, model: SigLIP, words: Words, log: dict) -> None:
    """Write the weights, in half precision, with their sizes and words; and the log."""
    metadata = {
        "vision": json.dumps(dataclasses.asdict(model.vision.config)),
        "text": json.dumps(dataclasses.asdict(model.text.config)),
        "words": " ".join(words.vocabulary),
    }
    weights = {name: w.half().contiguous() for name, w in model.state_dict().items()}
    with written_whole(folder / WEIGHTS) as path:
        save_file(weights, path, metadata)
    with written_whole(folder / LOG) as path:
        path.write_text(json.dumps(log, indent=1))


def load_emoji_siglip(folder: Path = FOLDER) -> tuple[SigLIP, Words]:
    """Load the trained towers, in float32 and ready for use, and their words.

    Raises:
        FileNotFoundError: if the folder holds no weights.
    """
    path = Path(folder) / WEIGHTS
    if not path.exists():
        raise FileNotFoundError(f"no weights in {folder}: expected {WEIGHTS}")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name).float() for name in file.offset_keys()}
    with torch.device("meta"):
        model = SigLIP(
            VisionConfig(**json.loads(metadata["vision"])),
            TextConfig(**json.loads(metadata["text"])),
        )
    model.load_state_dict(weights, assign=True)
    model.eval().requires_grad_(False)
    return model, Words(metadata["words"].split())


def emoji_siglip_log(folder: Path = FOLDER) -> dict:
    """What was measured while it trained: steps, the film, the seconds it took."""
    return json.loads((Path(folder) / LOG).read_text())
