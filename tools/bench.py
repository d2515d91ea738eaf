"""Measure pgcore beside transformers, on one random checkpoint, and write the page.

    python tools/bench.py              measures, writes book/performance.json and .md
    python tools/bench.py --page       writes the page from the JSON that is there

Both read the same files in the same process, in turns of random order, and so is the
machine's own speed measured; of each figure the median is kept. Load time and memory
need a fresh process each. Look at ratios: on a shared machine times change by half from
minute to minute.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.pop("OMP_WAIT_POLICY", None)  # threads wait as they do for users
transformers: Any = import_module("transformers")

ROOT = Path(__file__).resolve().parents[1]
RESULT, PAGE = ROOT / "book" / "performance.json", ROOT / "book" / "performance.md"
DTYPES = ("bfloat16", "float32")
BATCHES = (1, 4)
PROMPT = "caption en with eight tokens"
ROUNDS, STEPS, SPARE = 15, 12, 128  # SPARE: slots beyond the prefix
LOADS = 3
VISION = {
    "hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 2048,
    "num_attention_heads": 8, "image_size": 224, "patch_size": 14,
    "projection_dim": 1024, "vision_use_head": False,
    "model_type": "siglip_vision_model",
}  # fmt: skip
TEXT = {
    "hidden_size": 1024, "num_hidden_layers": 8, "intermediate_size": 4096,
    "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 128,
    "vocab_size": 32_768, "model_type": "gemma",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure pgcore and transformers.")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(load_once(*options.child)))
        return 0
    if not options.page:
        with tempfile.TemporaryDirectory() as folder:
            report = measure(Path(folder))
        RESULT.write_text(json.dumps(report, indent=1) + "\n")
    PAGE.write_text(page_of(json.loads(RESULT.read_text())), encoding="utf8")
    return 0


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def measure(folder: Path) -> dict:
    """All figures, and what they were measured on."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    rows = []
    for dtype in DTYPES:
        checkpoint = folder / dtype
        say(f"writing a random checkpoint in {dtype} ...")
        write_checkpoint(checkpoint, dtype)
        rows.append({"dtype": dtype, **loads(checkpoint, dtype)})
        models = load_both(checkpoint, dtype)
        for batch_size in BATCHES:
            say(f"{dtype}, batch of {batch_size} ...")
            rows.append(
                {"dtype": dtype, "batch": batch_size, **speeds(*models, batch_size)}
            )
    prefix = len(models[2]["pgcore"].tokenizer.encode(PROMPT).ids) + 256 + 2
    return {
        "machine": machine(),
        "prefix": prefix,
        "rows": rows,
    }


def machine() -> dict[str, str | int]:
    import torch

    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ] if Path("/proc/cpuinfo").exists() else [platform.processor()]  # fmt: skip
    return {
        "processor": names[0],
        "cores": os.cpu_count() or 1,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def write_checkpoint(folder: Path, dtype: str) -> None:
    """The medium model, random, and a processor; both written by transformers."""
    import torch

    from pgcore.processing import train_tokenizer

    half = [0.5] * 3
    pictures = transformers.SiglipImageProcessorPil(
        size={"height": 224, "width": 224}, image_mean=half, image_std=half
    )
    pictures.image_seq_length = 256
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer([PROMPT] * 9, 300),
        bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        padding_side="left", additional_special_tokens=["<image>"],
    )  # fmt: skip
    processor = transformers.PaliGemmaProcessor(pictures, words)
    config = transformers.PaliGemmaConfig(
        vision_config=VISION,
        text_config=TEXT,
        projection_dim=TEXT["hidden_size"],
        image_token_id=processor.image_token_id,
    )
    torch.manual_seed(0)
    model = transformers.PaliGemmaForConditionalGeneration(config)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def load_theirs(folder: Path, dtype: str):
    """Their model, and their processor as a function of ours' form."""
    import torch

    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        folder, dtype=getattr(torch, dtype)
    )
    processor = transformers.PaliGemmaProcessor.from_pretrained(folder)

    def process(pictures, prompts):
        texts = ["<image>" + prompt for prompt in prompts]
        return processor(pictures, texts, return_tensors="pt", padding=True)

    return model.eval(), process


def load_both(folder: Path, dtype: str):
    from pgcore import load

    model, processor = load(folder, dtype=dtype, device="cpu")
    theirs, their_processor = load_theirs(folder, dtype)
    return model, theirs, {"pgcore": processor, "transformers": their_processor}


class Machine:
    """What the machine can do at that minute: read, multiply, map single vectors."""

    def __init__(self, model, batch_size: int):
        import torch

        self.block = torch.ones(2**26)  # 256 MiB, beyond any cache
        self.x = torch.randn(1024, 4096).to(model.projector.linear.weight.dtype)
        self.w = torch.randn(4096, 4096).to(self.x.dtype)
        language = model.language
        maps = [m for m in language.modules() if isinstance(m, torch.nn.Linear)]
        self.maps = [m.weight for m in maps] + [language.embed_tokens.weight]
        wide = max(weight.shape[1] for weight in self.maps)
        self.rows = torch.randn(batch_size, wide).to(self.x.dtype)

    def multiply(self):
        self.x @ self.w

    def map_all(self):
        """All linear maps of a step, with nothing between them."""
        import torch.nn.functional as F

        for weight in self.maps:
            F.linear(self.rows[:, : weight.shape[1]], weight)

    def one_round(self) -> dict[str, list[float]]:
        runs = {"read": self.block.sum, "multiply": self.multiply, "maps": self.map_all}
        return {what: [seconds_of(run) for _ in range(3)] for what, run in runs.items()}

    def limits(self, taken: dict[str, float]) -> dict[str, float]:
        """Bytes and operations a second; seconds of the linear maps alone."""
        operations = 2 * self.x.numel() * self.w.shape[1]
        return {
            "bytes": self.block.nbytes / taken["read"],
            "operations": operations / taken["multiply"],
            "maps": taken["maps"],
        }


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Runner:
    """A prefill and some steps, timed one by one."""

    def one_round(self) -> dict[str, list[float]]:
        prefill = seconds_of(self.prefill)
        steps = [seconds_of(self.step) for _ in range(STEPS)]
        return {"prefill": [prefill], "step": steps[2:]}  # caches settle

    def prefill(self) -> None:
        raise NotImplementedError

    def step(self) -> None:
        raise NotImplementedError


class Theirs(Runner):
    """transformers, driven as leanly as its own generate would, and leaner."""

    def __init__(self, model, batch):
        self.model, self.batch = model, batch

    def prefill(self):
        import torch

        self.cache = transformers.DynamicCache(
            config=self.model.config.get_text_config()
        )
        self.mask = self.batch["attention_mask"].long()
        found = self.model(
            pixel_values=self.batch["pixel_values"].to(self.model.dtype),
            input_ids=self.batch["input_ids"],
            attention_mask=self.mask,
            token_type_ids=torch.zeros_like(self.batch["input_ids"]),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.tokens = found.logits[:, -1].argmax(dim=-1)

    def step(self):
        import torch

        ones = self.mask.new_ones(len(self.mask), 1)
        self.mask = torch.cat([self.mask, ones], dim=1)
        found = self.model(
            input_ids=self.tokens[:, None],
            attention_mask=self.mask,
            position_ids=self.mask.sum(dim=1, keepdim=True),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.tokens = found.logits[:, -1].argmax(dim=-1)


class Ours(Runner):
    """pgcore, eager or with a compiled step."""

    def __init__(self, model, batch, read):
        self.model, self.batch, self.read = model, batch, read

    def prefill(self):
        from pgcore.generation import prefill

        slots = self.batch["input_ids"].shape[1] + SPARE
        logits, self.state = prefill(self.model, self.batch, slots)
        self.tokens = logits.argmax(dim=-1)

    def step(self):
        from pgcore.generation import decode_step

        logits = decode_step(self.model, self.tokens, self.state, self.read)
        self.tokens = logits.argmax(dim=-1)


def speeds(model, theirs, processors, batch_size: int) -> dict:
    """Median seconds of prefill and of a step, in turns with the machine's limits."""
    import torch
    from PIL import Image

    from pgcore.generation import compiled_read_token, read_token

    pictures = [Image.effect_noise((400 + i, 300), 90) for i in range(batch_size)]
    prompts = [PROMPT] * batch_size
    batch = processors["pgcore"](pictures, prompts)
    runners = {
        "transformers": Theirs(theirs, batch),
        "pgcore": Ours(model, batch, read_token),
        "pgcore compiled": Ours(model, batch, compiled_read_token()),
        "machine": Machine(model, batch_size),
    }
    taken = defaultdict(list)
    draws = random.Random(0)
    with torch.inference_mode():
        for number in range(ROUNDS + 1):  # the first warms up, and compiles
            for name in draws.sample(list(runners), len(runners)):
                times = runners[name].one_round()
                if number:
                    for what, seconds in times.items():
                        taken[what, name] += seconds
        flops = prefill_flops(runners["pgcore"])
        first = first_token(processors, pictures, prompts, runners)
    medians = defaultdict(dict)
    for (what, name), values in taken.items():
        medians[name][what] = statistics.median(values)
    limits = runners["machine"].limits(medians.pop("machine"))
    seconds = {
        what: {name: found[what] for name, found in medians.items()}
        for what in ("prefill", "step")
    }
    seconds["first token"] = first
    weights = sum(p.nbytes for p in model.language.parameters())
    counted = {"prefill flops": flops, "step bytes": weights}
    return {"seconds": seconds, "limits": limits, **counted}


def first_token(processors, pictures, prompts, runners) -> dict[str, float]:
    """From pictures and prompts to a token: each with its own processor."""
    taken = defaultdict(list)
    draws = random.Random(1)
    names = ["transformers", "pgcore"]
    for _ in range(ROUNDS):
        for name in draws.sample(names, len(names)):
            runner, process = runners[name], processors[name]

            def answer(runner=runner, process=process):
                runner.batch = process(pictures, prompts)
                runner.prefill()

            taken[name].append(seconds_of(answer))
    return {name: statistics.median(values) for name, values in taken.items()}


def prefill_flops(runner) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        runner.prefill()
    return counter.get_total_flops()


def loads(folder: Path, dtype: str) -> dict:
    """Median seconds from nothing loaded to a token, and memory above the imports."""
    found = defaultdict(list)
    names = ["transformers", "pgcore"]
    draws = random.Random(2)
    for number in range(LOADS + 1):
        for name in draws.sample(names, len(names)):
            command = [sys.executable, __file__, "--child", name, str(folder), dtype]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            if number:
                found[name].append(json.loads(result.stdout.splitlines()[-1]))
    return {
        what: {n: statistics.median(f[what] for f in found[n]) for n in names}
        for what in ("load and first token", "memory")
    }


def load_once(name: str, folder: str, dtype: str) -> dict[str, float]:
    """In a process of its own: load, answer with one token, look at the memory."""
    import torch
    from PIL import Image

    _ = transformers.PaliGemmaForConditionalGeneration  # imports are not loading

    from pgcore import load
    from pgcore.generation import read_token

    torch.set_num_threads(os.cpu_count() or 1)
    picture = Image.effect_noise((400, 300), 90)
    before = memory("VmRSS")
    start = time.perf_counter()
    if name == "pgcore":
        model, processor = load(folder, device="cpu")
        runner = Ours(model, processor([picture], [PROMPT]), read_token)
    else:
        model, process = load_theirs(Path(folder), dtype)
        runner = Theirs(model, process([picture], [PROMPT]))
    with torch.inference_mode():
        runner.prefill()
    seconds = time.perf_counter() - start
    return {"load and first token": seconds, "memory": memory("VmHWM") - before}


def memory(which: str) -> int:
    """Bytes of this process now (VmRSS) or at most (VmHWM); pages of files count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return 1024 * int(line.split()[1])
    raise ValueError(f"{which}: this system does not say")


TEXT_OF_PAGE = """\
# Performance

How fast is what you have built, beside the library that everybody uses, and how far is
it from what the machine can do? `make bench` measures it; this page is what it found.

Both sides read one random checkpoint, a PaliGemma of 192 million parameters (vision
tower: width 512, 12 layers, 224 pixels in patches of 14; Gemma: width 1024, 8 layers, 8
query heads, 1 key head of 128, 32,768 words). They take turns in one process, in
random order; each figure is a median. *Prefill* is the tower and a prefix of {prefix}
tokens up to the logits of the next token. *First token* begins with a picture and a
prompt. A *step* reads one token a row. *Load* begins with an empty process after its
imports and ends with a token; *memory* is the most that it took above the imports.

{table}

*Times* says how many times as fast as transformers: above 1 is faster; for memory, how
many times as little. *Of the limit* is the share of the machine's own speed, measured
in turns with the rest: for prefill, of the rate of a large matrix product ({gemm}); for
a step, of the rate at which torch sums up a large tensor ({bytes}), as each step reads
all weights of the decoder once.

*Maps alone* are the linear maps of a step with nothing between them, no attention and
no norms. Both sides call the same function of torch for them, so no eager step can be
faster: that line is as far as Python can go. A compiled step does not call it for one
row.

Measured on {processor}, {cores} cores, with torch {torch} and transformers
{transformers}, {date}. The machine is a shared one: times move by half, ratios by a
tenth.

Where does it come from? Prefill: the last layer computes one query instead of all
([chapter 10](../chapters/10_gemma.ipynb)). Loading: the files are mapped, and no model
is drawn first ([chapter 13](../chapters/13_real_weights.ipynb)). Eager steps: one key
head is read once for all its queries ([chapter 05](../chapters/05_attention.ipynb)) and
a static cache ([chapter 09](../chapters/09_kv_cache.ipynb)); the more rows, the more it
matters. With one row both sides spend two thirds of a step and more in the same maps.
Compiled steps: products of a matrix and one vector are written as sums, which read the
weights faster than torch's own product does
([chapter 14](../chapters/14_generation.ipynb)).
"""


def page_of(report: dict) -> str:
    rows = [row for row in report["rows"] if "batch" in row]

    def rates(what: str, unit: str) -> str:
        of = {d: [r["limits"][what] for r in rows if r["dtype"] == d] for d in DTYPES}
        return " and ".join(
            f"{statistics.mean(found) / 1e9:.0f} {unit} in {dtype}"
            for dtype, found in of.items()
        )

    reading = statistics.mean(row["limits"]["bytes"] for row in rows) / 1e9
    return TEXT_OF_PAGE.format(
        table="\n".join(table(report)),
        gemm=rates("operations", "GFLOP/s"),
        bytes=f"{reading:.0f} GB/s",
        prefix=report["prefix"],
        **report["machine"],
    )


def table(report: dict) -> list[str]:
    """A line for each figure, numbers with their units."""
    lines = [
        "| | format | rows | transformers | pgcore | times | of the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        if "batch" not in row:
            lines += load_lines(row)
    for what in ("prefill", "first token", "step"):
        for row in report["rows"]:
            if "batch" in row:
                lines += speed_lines(what, row)
    return lines


def load_lines(row: dict) -> list[str]:
    lines = []
    for what, unit, scale in (
        ("load and first token", "s", 1),
        ("memory", "GB", 1e-9),
    ):
        theirs, ours = row[what]["transformers"], row[what]["pgcore"]
        lines.append(
            f"| {what} | {row['dtype']} | 1 | {theirs * scale:.2f} {unit} |"
            f" {ours * scale:.2f} {unit} | {theirs / ours:.2f} | |"
        )
    return lines


def speed_lines(what: str, row: dict) -> list[str]:
    seconds, limits = dict(row["seconds"][what]), row["limits"]
    theirs, lines = seconds.pop("transformers"), []
    if what == "prefill":
        del seconds["pgcore compiled"]  # it is the same prefill
    if what == "step":
        seconds["pgcore maps alone"] = limits["maps"]
    least = {
        "prefill": row["prefill flops"] / limits["operations"],
        "step": row["step bytes"] / limits["bytes"],
    }
    for name, ours in seconds.items():
        label = what + name.removeprefix("pgcore").replace(" ", ", ", 1)
        shown = [f"{1000 * value:.0f} ms" for value in (theirs, ours)]
        if what == "step":
            shown = [f"{row['batch'] / value:.1f} tokens/s" for value in (theirs, ours)]
        limit = f"{least[what] / ours:.0%}" if what in least else ""
        lines.append(
            f"| {label} | {row['dtype']} | {row['batch']} | {shown[0]} | {shown[1]} |"
            f" {theirs / ours:.2f} | {limit} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
