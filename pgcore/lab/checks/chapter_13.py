"""Checks of chapter 13, Real weights. The oracles: safetensors, einsum, the table."""

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from pgcore import api
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

# fmt: off
TOWER = VisionConfig(
    width=24, depth=1, mlp_dim=40, num_heads=2, head_dim=12, patch_size=8,
    image_size=16)
TEXT = GemmaConfig(
    width=32, depth=2, mlp_dim=64, num_heads=4, num_kv_heads=2, head_dim=12,
    vocab_size=97)
# fmt: on
CONFIG = PaliGemmaConfig(vision=TOWER, text=TEXT, image_token=96)


def draw(*shape: int, seed: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def drawn_model(config: PaliGemmaConfig) -> PaliGemma:
    """Every weight drawn, at a size that keeps the variance."""
    model = PaliGemma(config)
    with torch.no_grad():
        for seed, weight in enumerate(model.parameters()):
            spread = weight.shape[1] ** -0.5 if weight.ndim > 1 else 0.3
            weight.copy_(spread * draw(*weight.shape, seed=seed))
    return model.eval()


@exercise("13.1")
def headers_are_read(read_header):
    """finds every tensor, in files with and without metadata"""
    tensors = {
        "a": draw(2, 3, seed=0),
        "b.weight": draw(5, seed=1).bfloat16(),
        "none": torch.zeros(0, 4),
        "naïve": draw(1, 2, 2, seed=2).half(),
    }
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    for metadata in ({"format": "pt"}, None):
        data = save(tensors, metadata)
        found = read_header(data)
        names = sorted(tensors), sorted(found)
        require(names[0] == names[1], "names: expected {}, got {}".format(*names))
        for name, tensor in tensors.items():
            kind, shape, start, end = found[name]
            expected = kinds[tensor.dtype], tuple(tensor.shape)
            got = kind, shape
            require(got == expected, f"{name}: expected {expected}, got {got}")
            right = bytes(tensor.view(torch.uint8).flatten().tolist())
            hint = f"{name}: bytes {start} to {end} of the file are not its numbers"
            require(data[start:end] == right, hint)


@exercise("13.1")
def long_headers_are_read(read_header):
    """reads a header of more than 255 and of more than 65 535 bytes"""
    for count in (5, 1200):
        tensors = {f"layers.{i}.weight": torch.ones(2) for i in range(count)}
        found = read_header(save(tensors))
        require(len(found) == count, f"expected {count} tensors, got {len(found)}")


def layouts_of(name: str) -> list[str]:
    """A name of the hub's in all four layouts."""
    inner = "model." + name.replace("language_model.model.", "language_model.")
    short = [
        n.replace("vision_tower.vision_model.", "vision_tower.") for n in (name, inner)
    ]
    return [name, inner, *short]


def check_names(our_name, config: PaliGemmaConfig) -> None:
    """The oracle: the table forwards, for every parameter."""
    kind = config.text.post_norms
    for ours in empty_model(config).state_dict():
        for theirs in layouts_of(hugging_face_name(ours, kind)):
            found = our_name(theirs, kind)
            require(found == ours, f"{theirs}: expected {ours}, got {found}")


@exercise("13.2")
def names_of_paligemma_1(our_name):
    """inverts the table for PaliGemma 3B, in all four layouts"""
    check_names(our_name, PALIGEMMA_3B_224)


@exercise("13.2")
def names_of_paligemma_2(our_name):
    """inverts the table for PaliGemma 2 3B, in all four layouts"""
    check_names(our_name, PALIGEMMA2_3B_224)


@exercise("13.3")
def matrices_equal_einsums(matrices):
    """gives the outputs of the einsums, also where N * H = D"""
    for D, N, K, H in ((10, 4, 2, 3), (12, 4, 1, 3), (7, 2, 2, 5)):
        q, kv, o = (
            draw(*shape, seed=D) for shape in ((N, D, H), (2, K, D, H), (N, H, D))
        )
        x, heads = draw(5, D, seed=8), draw(5, N, H, seed=9)
        expected = {
            "q_proj": (x, torch.einsum("TD,NDH->TNH", x, q)),
            "k_proj": (x, torch.einsum("TD,KDH->TKH", x, kv[0])),
            "v_proj": (x, torch.einsum("TD,KDH->TKH", x, kv[1])),
            "o_proj": (heads.flatten(1), torch.einsum("TNH,NHD->TD", heads, o)),
        }
        found = matrices(q, kv, o)
        names = sorted(expected), sorted(found)
        require(names[0] == names[1], "names: expected {}, got {}".format(*names))
        for name, (given, output) in expected.items():
            output = output.flatten(1)
            shape, got = (output.shape[1], given.shape[1]), tuple(found[name].shape)
            hint = f"{name} with D {D}, N {N}, K {K}, H {H}."
            require(got == shape, f"{hint} Expected shape {shape}, got {got}")
            require_close(F.linear(given, found[name]), output, hint, atol=2e-6)


@exercise("13.4")
def words_are_appended(with_more_words):
    """appends rows of the right size, and says so in the configuration"""
    model = drawn_model(CONFIG)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    larger = with_more_words(model, 5000, torch.Generator().manual_seed(0))
    table = larger.language.embed_tokens.weight.detach()
    sizes = larger.config.text.vocab_size, *table.shape
    require(
        sizes == (5097, 5097, 32),
        f"vocab_size and table: expected (5097, 5097, 32), got {sizes}",
    )
    std, mean = table[97:].std().item(), table[97:].mean().item()
    require(
        abs(std - 0.02) < 5e-4 and abs(mean) < 5e-4,
        f"new rows: expected deviation 0.02 and mean 0, got {std:.4f} and {mean:.4f}",
    )
    require(table[97:, 0].unique().numel() > 2500, "each row is drawn for itself")
    require(table[97:].abs().max() > 0.06, "new rows: they are not normal numbers")
    for name, weight in before.items():
        kept = larger.state_dict()[name][: len(weight)]
        require_close(kept, weight, f"{name} of the new model.")
        require_close(model.state_dict()[name], weight, f"{name} of the old model.")


@exercise("13.4")
def old_answers_are_the_same(with_more_words):
    """draws with the generator, keeps the dtype, answers as before, shares nothing"""
    ids = torch.tensor([[96] * 4 + [2, 30, 7]])
    pixels = draw(1, 3, 16, 16, seed=3)
    for dtype in (torch.float32, torch.bfloat16):
        model = drawn_model(CONFIG).to(dtype)
        first, second = (
            with_more_words(model, 3, torch.Generator().manual_seed(1))
            for _ in range(2)
        )
        table, again = (m.language.embed_tokens.weight for m in (first, second))
        require(table.dtype == dtype, f"dtype: expected {dtype}, got {table.dtype}")
        require(torch.equal(table, again), "the same seed draws the same rows")
        with torch.no_grad():
            old, new = (m(pixels, ids).logits for m in (model, first))
            require_close(new[..., :97], old, "Logits of the old words.", atol=1e-2)
            for weight in first.parameters():
                weight.zero_()
            hint = "Changing the new model changed the old."
            require_close(model(pixels, ids).logits, old, hint)


@cache
def checkpoint() -> tuple[tempfile.TemporaryDirectory, Path]:
    """A small random checkpoint on the disk, gone when Python ends."""
    tokenizer = train_tokenizer(["caption en", "answer en what is on the left?"], 300)
    processor = Processor(tokenizer, image_size=16, num_image_tokens=4)
    text = replace(TEXT, vocab_size=tokenizer.get_vocab_size())
    image_token = processor.id_of("<image>")
    model = drawn_model(replace(CONFIG, text=text, image_token=image_token))
    with torch.no_grad():  # a tied table at full size repeats the last word
        model.language.embed_tokens.weight.mul_(0.05)
    home = tempfile.TemporaryDirectory()
    folder = Path(home.name) / "checkpoint"
    save_pretrained(model, processor, folder)
    return home, folder


@exercise("13.5")
@torch.no_grad()
def answers_are_the_models(ask):
    """gives the model's answers, one for each prompt, in order"""
    folder = checkpoint()[1]
    noise = (255 * draw(20, 30, 3, seed=5).sigmoid()).byte().numpy()
    picture = Image.fromarray(noise)
    model, processor = api.load(folder)
    questions = ["caption en", "answer en what is on the left?", "left"]
    expected = [
        api.generate(model, processor, picture, question, max_new_tokens=30)
        for question in questions
    ]
    for number in (1, 3):
        found, right = ask(folder, picture, questions[:number]), expected[:number]
        require(found == right, f"expected {right!r:.90}, got {found!r:.90}")


@exercise("13.5")
@torch.no_grad()
def it_loads_once(ask):
    """reads the weights once for all prompts"""
    calls, load_weights = [], api.load_weights

    def counted(*arguments, **options):
        calls.append(arguments)
        return load_weights(*arguments, **options)

    api.load_weights = counted
    try:
        ask(checkpoint()[1], Image.new("RGB", (16, 16), "red"), ["caption en"] * 3)
    finally:
        api.load_weights = load_weights
    require(len(calls) == 1, f"expected the weights read once, not {len(calls)} times")
