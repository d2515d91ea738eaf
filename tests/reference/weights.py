# Generated from chapters/13_real_weights.ipynb.
# Edit the notebook, then run "make chapters".
"""Slow, obvious versions from chapter 13, Real weights."""

import json

import torch


def read_by_hand(path):
    """All tensors of a safetensors file, with nothing but the format."""
    kinds = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
    }
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            file.seek(8 + length + start)
            numbers = bytearray(file.read(end - start))
            tensor = torch.frombuffer(numbers, dtype=kinds[entry["dtype"]])
            tensors[name] = tensor.reshape(entry["shape"])
    return tensors
