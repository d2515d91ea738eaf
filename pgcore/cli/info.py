"""``pgcore info``: what a checkpoint holds, from the heads of its files."""

import argparse
import math
from collections import defaultdict
from pathlib import Path

SUMMARY = "show a checkpoint's sizes, parameters and memory, without loading it"
PARTS = {"vision": "vision tower", "projector": "projector", "language": "Gemma"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say which checkpoint."""
    parser.add_argument("source", metavar="FOLDER", help="tiny, a folder, a hub name")


def run(options: argparse.Namespace) -> int:
    """Print a table; a checkpoint whose tensors do not fit is an error."""
    from pgcore.api import find_checkpoint
    from pgcore.weights import read_checkpoint

    folder = find_checkpoint(options.source)
    checkpoint = read_checkpoint(folder)
    vision, text = checkpoint.config.vision, checkpoint.config.text
    numbers: dict[str, int] = defaultdict(int)
    for name, tensor in checkpoint.tensors.items():
        numbers[name.split(".")[0]] += math.prod(tensor.shape)
    kind = "PaliGemma 2" if text.post_norms else "PaliGemma"
    total = sum(numbers.values())
    print(f"{kind} in {folder}")
    print(
        f"  pictures      {vision.image_size} x {vision.image_size},"
        f" {vision.num_patches} tokens"
    )
    print(
        f"  vision tower  {vision.depth} layers, width {vision.width},"
        f" {vision.num_heads} heads of {vision.head_dim}, MLP {vision.mlp_dim}"
    )
    print(
        f"  Gemma         {text.depth} layers, width {text.width}, {text.num_heads}"
        f" heads of {text.head_dim}, {text.num_kv_heads} with keys, MLP {text.mlp_dim},"
        f" {text.vocab_size} words"
    )
    print("  parameters")
    for part, name in PARTS.items():
        print(f"    {name:<12}{numbers[part]:>16,}")
    print(f"    {'in all':<12}{total:>16,}")
    files = sorted({tensor.path for tensor in checkpoint.tensors.values()})
    stored = sum(Path(path).stat().st_size for path in files)
    kinds = sorted({str(t.dtype).split(".")[1] for t in checkpoint.tensors.values()})
    per_token = 2 * text.depth * text.num_kv_heads * text.head_dim
    print(f"  files         {len(files)}, {_size(stored)}, {', '.join(kinds)}")
    print(f"  memory        {_size(2 * total)} in 16 bits, {_size(4 * total)} in 32;")
    print(f"                keys and values {_size(2 * per_token)} a token in 16 bits")
    return 0


def _size(number: int | float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    raise AssertionError(number)
