"""How long one more token takes: without a cache, with torch.cat, with a static cache.

    python -m pgcore.recipes.cache_speed --out pgcore/assets/cache_speed.json

All ways and lengths take turns, each round in another order: whatever else the machine
does meets them all, and none always finds what another has left in the CPU's caches.
The clock is the thread's CPU time: waiting for other programs does not count.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pgcore.attention import Attention, attention_mask
from pgcore.files import written_whole
from pgcore.kv_cache import KVCache
from pgcore.normalization import RMSNorm
from pgcore.rope import rotation

WIDTH, DEPTH, MLP_DIM, HEADS, HEAD_DIM = 256, 4, 1024, 4, 64
CONTEXTS = (64, 128, 256, 512, 1024)
ROUNDS = 101


class Block(nn.Module):
    """Attention with one key/value head, then an MLP."""

    def __init__(self):
        super().__init__()
        self.norm = RMSNorm(WIDTH)
        self.attention = Attention(
            WIDTH, num_heads=HEADS, num_kv_heads=1, head_dim=HEAD_DIM
        )
        self.mlp = nn.Sequential(
            RMSNorm(WIDTH),
            nn.Linear(WIDTH, MLP_DIM, bias=False),
            nn.GELU(approximate="tanh"),
            nn.Linear(MLP_DIM, WIDTH, bias=False),
        )

    def forward(self, x: Tensor, **options) -> Tensor:
        """B T D to B T D."""
        x = x + self.attention(self.norm(x), **options)
        return x + self.mlp(x)


class AppendLayer:
    """Keys and values that grow by torch.cat; what it holds stays as it was."""

    def __init__(self, k: Tensor, v: Tensor):
        self._k, self._v = k, v

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones last."""
        return torch.cat([self._k, k], dim=2), torch.cat([self._v, v], dim=2)


def one_token(num_slots: int, context: int) -> dict[str, Callable[[], Tensor]]:
    """Ways to read token ``context`` of ``num_slots``; all give the same.

    "exact" is "static" with ``context`` slots: none of them is empty.
    """
    blocks = nn.ModuleList(Block() for _ in range(DEPTH))
    x = torch.randn(1, context, WIDTH)
    slots = torch.arange(num_slots)[None]
    mask = attention_mask(torch.ones_like(slots, dtype=torch.bool))

    def run(x: Tensor, at: Tensor, mask: Tensor, layers: Sequence) -> Tensor:
        rotate = rotation(at, HEAD_DIM)
        for block, layer in zip(blocks, layers, strict=True):
            x = block(x, mask=mask, rotate=rotate, cache=layer)
        return x[:, -1]

    def filled(num_slots: int) -> KVCache:
        cache = KVCache(
            depth=DEPTH, batch_size=1, num_kv_heads=1, head_dim=HEAD_DIM,
            num_slots=num_slots,
        )  # fmt: skip
        before = cache.reserve(context - 1)
        rows = mask[:, :, before, :num_slots]
        run(x[:, :-1], before[None], rows, cache.layers)
        cache.reserve(1)
        return cache

    static, exact = filled(num_slots), filled(context)
    now = static.slots
    grown = [
        AppendLayer(exact.keys[n][:, :, : context - 1].clone(),
                    exact.values[n][:, :, : context - 1].clone())
        for n in range(DEPTH)
    ]  # fmt: skip
    row, exact_row = mask[:, :, now], mask[:, :, now, :context]
    return {
        "none": lambda: run(
            x, slots[:, :context], mask[:, :, :context, :context], [None] * DEPTH
        ),
        "cat": lambda: run(x[:, -1:], now[None], exact_row, grown),
        "static": lambda: run(x[:, -1:], now[None], row, static.layers),
        "exact": lambda: run(x[:, -1:], now[None], exact_row, exact.layers),
    }  # fmt: skip


@torch.no_grad()
def measure() -> dict[str, list[list[float]]]:
    """Milliseconds a token: lower quartile, median and upper quartile."""
    torch.manual_seed(0)
    ways = {context: one_token(CONTEXTS[-1], context) for context in CONTEXTS}
    for all_four in ways.values():  # the first calls warm up, and must agree
        expected = all_four["none"]()
        for way in all_four.values():
            torch.testing.assert_close(way(), expected, rtol=1e-4, atol=1e-4)
    turns = [(name, context) for context in CONTEXTS for name in ways[context]]
    taken: dict[tuple[str, int], list[float]] = {turn: [] for turn in turns}
    shuffled = random.Random(0)
    for number in range(ROUNDS):
        if number % 10 == 0:
            print(f"round {number + 1} of {ROUNDS}", file=sys.stderr, flush=True)
        for name, context in shuffled.sample(turns, len(turns)):
            way = ways[context][name]
            start = time.thread_time()
            way()
            spent = 1000 * (time.thread_time() - start)
            taken[name, context].append(spent)
    times: dict[str, list[list[float]]] = {}
    for (name, _), values in taken.items():
        quartiles = torch.tensor(values).quantile(torch.tensor([0.25, 0.5, 0.75]))
        rounded = [round(value, 3) for value in quartiles.tolist()]
        times.setdefault(name, []).append(rounded)
    return times


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write what chapter 09 plots."""
    parser = argparse.ArgumentParser(description="Time one more token.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--machine", default="one core of a server CPU")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # two threads wait for each other on a busy machine
    version = torch.__version__.split("+")[0]
    milliseconds = measure()
    report = {
        "machine": f"{options.machine}, torch {version}, float32",
        "model": {"width": WIDTH, "depth": DEPTH, "mlp_dim": MLP_DIM},
        "rounds": ROUNDS,
        "contexts": CONTEXTS,
        "load": round(os.getloadavg()[0], 1),
        "milliseconds": milliseconds,
    }
    with written_whole(options.out) as path:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
