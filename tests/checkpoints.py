"""Tiny checkpoints: a model of every kind of weight, a processor, their files."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
from PIL import Image

from pgcore.paligemma import PaliGemma, PaliGemmaConfig
from pgcore.processing import Processor, train_tokenizer
from pgcore.vision import VisionConfig
from pgcore.weights import save_pretrained
from tests import draws
from tests.draws import fan_in

# No two sizes equal by chance; head_dim is not width / num_heads = 8.
VISION = VisionConfig(
    width=24,
    depth=3,
    mlp_dim=40,
    num_heads=3,
    head_dim=8,
    patch_size=7,
    image_size=14,
)
_SIZES = {"width": 32, "depth": 2, "mlp_dim": 56, "vocab_size": 1500}
GEMMA1, GEMMA2 = (replace(g, **_SIZES) for g in (draws.GEMMA1, draws.GEMMA2))
TEXTS = ["caption en a cat and two red apples", "how many cats\n"] * 10


@cache
def tiny_processor():
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    return Processor(tokenizer, VISION.image_size, VISION.num_patches)


def tiny_config(text=GEMMA2):
    image_token = tiny_processor().id_of("<image>")
    return PaliGemmaConfig(vision=VISION, text=text, image_token=image_token)


def tiny_model(text=GEMMA2, seed=0):
    return fan_in(PaliGemma(tiny_config(text)), seed).eval()


def write_checkpoint(folder, text=GEMMA2, seed=0, num_shards=1):
    """Write one; return its model."""
    model = tiny_model(text, seed)
    total = sum(w.nbytes for w in model.parameters())
    most = math.ceil(total / num_shards)
    save_pretrained(model, tiny_processor(), folder, max_shard_bytes=most)
    return model


def random_picture(width=40, height=30, seed=0):
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))


def is_one_short_line(error, most=600):
    """What every error of ours is."""
    text = str(error)
    return 0 < len(text) <= most and text.isprintable()
