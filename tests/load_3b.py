"""Load a checkpoint of full size, and measure what it takes. Not part of the tests.

    python tests/load_3b.py FOLDER            needs 6 GB of disk and of memory
    python tests/load_3b.py FOLDER --float32  12 GB of disk: float32 in, bfloat16 out
    python tests/load_3b.py FOLDER --medium   the same at 200 million numbers

Writes a random PaliGemma 3B to FOLDER, piece by piece, loads it in a fresh process,
writes three tokens, and removes FOLDER. Fails if the peak of the process, above what it
takes after its imports, is more than 1.15 times the weights. Pages of the files count.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from pgcore.hub_config import config_to_json
from pgcore.paligemma import PALIGEMMA_3B_224, PaliGemma, PaliGemmaConfig
from pgcore.processing import Processor, train_tokenizer

MOST = 1.15
PIECE = 16_000_000  # numbers drawn at a time
SHARD = 2_000_000_000  # bytes
KINDS = {"bfloat16": (torch.bfloat16, "BF16", 2), "float32": (torch.float32, "F32", 4)}

# Few words, so <image> has another id than in the published models.
PROCESSOR = Processor(train_tokenizer(["caption en"], 270), 224, 256)

MEASURE = """
import sys, time
from PIL import Image
import pgcore
from pgcore.paligemma import PALIGEMMA_3B_224
from pgcore.weights import empty_model
from pgcore import api  # what load and generate need, torch included

def memory(line):
    for entry in open("/proc/self/status"):
        if entry.startswith(line):
            return 1024 * int(entry.split()[1])

imported = memory("VmRSS")
empty_model(PALIGEMMA_3B_224)  # torch imports more when it first needs "meta"
before = memory("VmRSS")
meta = before - imported
print(f"imports {imported / 1e9:.3f} GB, the device meta +{meta / 1e9:.3f} GB")
start = time.monotonic()
model, processor = pgcore.load(sys.argv[1], device="cpu", dtype="bfloat16")
loaded = memory("VmHWM")
seconds = time.monotonic() - start
weights = sum(weight.nbytes for weight in model.parameters())
picture = Image.new("RGB", (64, 64), "red")
answer = pgcore.generate(model, processor, picture, "caption en", max_new_tokens=3,
                         probabilities=True)
peak = memory("VmHWM")
print(f"weights {weights / 1e9:.3f} GB")
print(f"loading: {seconds:.2f} s, peak +{(loaded - before) / 1e9:.3f} GB, "
      f"{(loaded - before) / weights:.3f} times the weights")
print(f"three tokens {answer.tokens}: peak +{(peak - before) / 1e9:.3f} GB")
print((peak - before) / weights)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Load a checkpoint of full size.")
    parser.add_argument("folder", type=Path, help="new; it is removed at the end")
    parser.add_argument("--float32", action="store_true", help="a file in float32")
    parser.add_argument("--medium", action="store_true", help="200 million numbers")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists")
    config = medium() if options.medium else PALIGEMMA_3B_224
    config = replace(config, image_token=PROCESSOR.id_of("<image>"))
    kind = "float32" if options.float32 or options.medium else "bfloat16"
    options.folder.mkdir(parents=True)
    try:
        write(options.folder, config, kind)
        return measure(options.folder)
    finally:
        shutil.rmtree(options.folder)


def medium() -> PaliGemmaConfig:
    """About 200 million numbers, in the proportions of the 3B."""
    text = replace(PALIGEMMA_3B_224.text, width=768, depth=10, mlp_dim=4096)
    text = replace(text, head_dim=96, vocab_size=32_064)
    heads = {"num_heads": 8, "head_dim": 64}
    sizes = {"width": 512, "depth": 16, "mlp_dim": 2048}
    vision = replace(PALIGEMMA_3B_224.vision, **sizes, **heads)
    return PaliGemmaConfig(vision=vision, text=text, image_token=0)


def write(folder: Path, config: PaliGemmaConfig, kind: str) -> None:
    """Numbers at fan-in scale, in shards. By hand: the library wants whole tensors."""
    from pgcore.weights import hugging_face_name

    with torch.device("meta"):
        shapes = {
            hugging_face_name(name, config.text.post_norms): tuple(weight.shape)
            for name, weight in PaliGemma(config).named_parameters()
        }
    size = KINDS[kind][2]
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD
    for name, shape in shapes.items():
        if size * math.prod(shape) > room and shards[-1]:
            shards.append({})
            room = SHARD
        shards[-1][name] = shape
        room -= size * math.prod(shape)
    where = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / file, shard, kind)
        where |= dict.fromkeys(shard, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config_to_json(config, kind)))
    PROCESSOR.save(folder)


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], kind: str) -> None:
    """The header, then number after number: never more than a piece in memory."""
    dtype, name_of_kind, size = KINDS[kind]
    header, start = {}, 0
    for name, shape in shapes.items():
        end = start + size * math.prod(shape)
        header[name] = {"dtype": name_of_kind, "shape": shape}
        header[name]["data_offsets"] = [start, end]
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            std = 0.3 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
            left = math.prod(shape)
            while left:
                numbers = torch.randn(min(left, PIECE), generator=generator) * std
                file.write(numbers.to(dtype).view(torch.uint8).numpy())
                left -= len(numbers)


def measure(folder: Path) -> int:
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, folder], capture_output=True, text=True
    )
    if result.returncode:
        print(result.stderr, file=sys.stderr)
        return 1
    *lines, ratio = result.stdout.splitlines()
    print("\n".join(lines))
    print(f"peak {float(ratio):.3f} times the weights, at most {MOST} is allowed")
    return 0 if float(ratio) <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
