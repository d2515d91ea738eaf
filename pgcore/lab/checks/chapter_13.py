"""Checks of chapter 13, Real weights. The oracles: safetensors, einsum, the table."""

import copy
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from pgcore.gemma import GemmaConfig
from pgcore.lab.checks import exercise, require, require_close
from pgcore.paligemma import (
    PALIGEMMA2_3B_224,
    PALIGEMMA_3B_224,
    PaliGemma,
    PaliGemmaConfig,
)
from pgcore.processing import Processor, train_tokenizer
from pgcore.vision import VisionConfig
from pgcore.weights import empty_model, hugging_face_name, save_pretrained

# No two sizes equal by chance, but N * H = D below, where it must not matter.
TOWER = VisionConfig(
    width=24, depth=1, mlp_dim=40, num_heads=2, head_dim=12, patch_size=8, image_size=16
)
TEXT = GemmaConfig(
    width=32,
    depth=2,
    mlp_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    vocab_size=97,
)
CONFIG = PaliGemmaConfig(vision=TOWER, text=TEXT, image_token=96)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn_model(config: PaliGemmaConfig, seed: int = 0) -> PaliGemma:
    """Every weight drawn, at a size that keeps the variance."""
    model = PaliGemma(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            spread = weight.shape[1] ** -0.5 if weight.ndim > 1 else 0.3
            weight.normal_(std=spread, generator=generator)
    return model.eval()


@exercise("13.1")
def headers_are_read(read_header):
    """finds every tensor of files with and without metadata"""
    tensors = {
        "a": draw(2, 3, seed=0),
        "b.weight": draw(5, seed=1).bfloat16(),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
        "naïve": draw(1, 2, 2, seed=2).half(),
    }
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    for metadata in ({"format": "pt"}, None, {"end": "data_offsets"}):
        data = save(tensors, metadata)
        found = read_header(data)
        require(
            set(found) == set(tensors),
            f"expected the names {sorted(tensors)}, got {sorted(found)}",
        )
        for name, tensor in tensors.items():
            kind, shape, start, end = found[name]
            expected = kinds[tensor.dtype], tuple(tensor.shape)
            got = kind, shape
            require(got == expected, f"{name}: expected {expected}, got {got}")
            numbers = tensor.contiguous().view(torch.uint8) if tensor.ndim else None
            size = tensor.nbytes
            require(
                end - start == size, f"{name}: expected {size} bytes, got {end - start}"
            )
            if numbers is not None:
                expected_bytes = bytes(numbers.flatten().tolist())
                require(
                    data[start:end] == expected_bytes,
                    f"{name}: found others in {start} to {end}",
                )


@exercise("13.1")
def long_headers_are_read(read_header):
    """reads a header of more than 255 and of more than 65 535 bytes"""
    for count in (5, 1200):
        tensors = {f"layers.{i}.weight": torch.ones(2) for i in range(count)}
        found = read_header(save(tensors))
        require(len(found) == count, f"expected {count} tensors, got {len(found)}")


LAYOUTS = {
    "the hub's": lambda n: n,
    "transformers' in memory": lambda n: (
        "model." + n.replace("language_model.model.", "language_model.")
    ),
    "the new": lambda n: n.replace("vision_tower.vision_model.", "vision_tower."),
}


def check_names(our_name, config: PaliGemmaConfig) -> None:
    kind = config.text.post_norms
    for title, layout in LAYOUTS.items():
        for ours in empty_model(config).state_dict():
            theirs = layout(hugging_face_name(ours, kind))
            found = our_name(theirs, kind)
            require(
                found == ours,
                f"{theirs} ({title} layout): expected {ours}, got {found}",
            )


@exercise("13.2")
def names_of_paligemma_1(our_name):
    """inverts the table for PaliGemma 3B, in all three layouts"""
    check_names(our_name, PALIGEMMA_3B_224)


@exercise("13.2")
def names_of_paligemma_2(our_name):
    """inverts the table for PaliGemma 2 3B, in all three layouts"""
    check_names(our_name, PALIGEMMA2_3B_224)


SIZES = (  # D, N, K, H; in the second N * H = D
    (10, 4, 2, 3),
    (12, 4, 1, 3),
    (7, 2, 2, 5),
)


@exercise("13.3")
def matrices_equal_einsums(matrices):
    """gives the outputs of the einsums, also where N * H = D"""
    for D, N, K, H in SIZES:
        q, kv, o = (
            draw(N, D, H, seed=D),
            draw(2, K, D, H, seed=N),
            draw(N, H, D, seed=H),
        )
        x, heads = draw(5, D, seed=8), draw(5, N, H, seed=9)
        expected = {
            "q_proj": (x, torch.einsum("TD,NDH->TNH", x, q)),
            "k_proj": (x, torch.einsum("TD,KDH->TKH", x, kv[0])),
            "v_proj": (x, torch.einsum("TD,KDH->TKH", x, kv[1])),
            "o_proj": (heads.flatten(1), torch.einsum("TNH,NHD->TD", heads, o)),
        }
        found = matrices(q, kv, o)
        require(
            set(found) == set(expected),
            f"expected {sorted(expected)}, got {sorted(found)}",
        )
        for name, (given, output) in expected.items():
            output = output.flatten(1)
            shape = output.shape[1], given.shape[1]
            hint = f"{name} with D {D}, N {N}, K {K}, H {H}."
            require(
                tuple(found[name].shape) == shape,
                f"{hint} expected shape {shape}, got {tuple(found[name].shape)}",
            )
            product = torch.nn.functional.linear(given, found[name])
            require_close(product, output, hint, atol=2e-6)


@exercise("13.4")
def words_are_appended(with_more_words):
    """appends rows of the right size, and says so in the configuration"""
    model = drawn_model(CONFIG)
    before = copy.deepcopy(model.state_dict())
    larger = with_more_words(model, 5000, torch.Generator().manual_seed(0))
    rows = 97 + 5000
    require(
        larger.config.text.vocab_size == rows,
        f"vocab_size: expected {rows}, got {larger.config.text.vocab_size}",
    )
    table = larger.language.embed_tokens.weight
    require(
        tuple(table.shape) == (rows, 32),
        f"table: expected ({rows}, 32), got {tuple(table.shape)}",
    )
    new = table[97:].detach()
    require(
        abs(new.std().item() - 0.02) < 5e-4 and abs(new.mean().item()) < 5e-4,
        "new rows: expected mean 0 and standard deviation 0.02, got "
        f"{new.mean():.4f} and {new.std():.4f}",
    )
    require(
        new[:2500].flatten().unique().numel() > 70_000,
        "every new row is drawn for itself",
    )
    for name, weight in before.items():
        kept = larger.state_dict()[name][: len(weight)]
        require_close(kept, weight, f"{name} of the new model.")
        require_close(model.state_dict()[name], weight, f"{name} of the old model.")


@exercise("13.4")
def old_answers_are_the_same(with_more_words):
    """is drawn by the generator, keeps the dtype, answers as before, shares nothing"""
    for dtype in (torch.float32, torch.bfloat16):
        model = drawn_model(CONFIG).to(dtype)
        first, second = (
            with_more_words(model, 3, torch.Generator().manual_seed(1))
            for _ in range(2)
        )
        table = first.language.embed_tokens.weight
        require(table.dtype == dtype, f"dtype: expected {dtype}, got {table.dtype}")
        again = second.language.embed_tokens.weight
        require(torch.equal(table, again), "the same seed draws the same rows")
        ids = torch.tensor([[96] * 4 + [2, 30, 7]])
        pixels = draw(1, 3, 16, 16, seed=3)
        with torch.no_grad():
            old, new = (m(pixels, ids).logits for m in (model, first))
            require_close(new[..., :97], old, "Logits of the old words.", atol=1e-2)
            first.projector.linear.weight.zero_()
            first.language.embed_tokens.weight.zero_()
            require_close(
                model(pixels, ids).logits, old, "Changing the new changed the old."
            )


@cache
def checkpoint() -> tuple[tempfile.TemporaryDirectory, Path]:
    """A small random checkpoint on the disk, gone when Python ends."""
    tokenizer = train_tokenizer(["caption en", "answer en what is on the left?"], 300)
    processor = Processor(tokenizer, image_size=16, num_image_tokens=4)
    text = replace(TEXT, vocab_size=tokenizer.get_vocab_size())
    config = PaliGemmaConfig(
        vision=TOWER, text=text, image_token=processor.id_of("<image>")
    )
    model = drawn_model(config)
    with torch.no_grad():  # a tied table at full size repeats the last word
        model.language.embed_tokens.weight.mul_(0.05)
    home = tempfile.TemporaryDirectory()
    folder = Path(home.name) / "checkpoint"
    save_pretrained(model, processor, folder)
    return home, folder


@exercise("13.5")
def answers_are_the_models(ask):
    """gives the model's answers, one for each prompt, in order"""
    import pgcore

    folder = checkpoint()[1]
    noise = (255 * draw(20, 30, 3, seed=5).sigmoid()).byte().numpy()
    picture = Image.fromarray(noise)
    model, processor = pgcore.load(folder)
    for prompts in (
        ["caption en"],
        ["caption en", "answer en what is on the left?", "left"],
    ):
        expected = [
            pgcore.generate(model, processor, picture, prompt, max_new_tokens=30)
            for prompt in prompts
        ]
        found = ask(folder, picture, prompts)
        require(
            isinstance(found, list) and len(found) == len(prompts),
            f"expected a list of {len(prompts)} texts, got {found!r:.80}",
        )
        for prompt, one, other in zip(prompts, found, expected, strict=True):
            require(one == other, f"{prompt}: expected {other!r:.60}, got {one!r:.60}")


@exercise("13.5")
def it_loads_once(ask):
    """reads the checkpoint once for all prompts"""
    from pgcore import api

    calls, load_model = [], api.load_model

    def counted(*arguments, **options):
        calls.append(arguments)
        return load_model(*arguments, **options)

    api.load_model = counted
    try:
        ask(checkpoint()[1], Image.new("RGB", (16, 16), "red"), ["caption en"] * 3)
    finally:
        api.load_model = load_model
    require(len(calls) == 1, f"expected the weights read once, not {len(calls)} times")
