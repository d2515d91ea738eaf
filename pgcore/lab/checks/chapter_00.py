"""Checks of chapter 00, The whole machine. The oracles are the modules themselves."""

import torch

from pgcore.gemma import Gemma, GemmaConfig
from pgcore.grounding import tokens_to_box
from pgcore.lab.checks import exercise, require

DECODERS = (
    (192, 4, 768, 4, 1, 64, 3072),
    (24, 3, 40, 6, 2, 10, 50),
    (16, 1, 8, 2, 2, 4, 7),
    (2048, 18, 16_384, 8, 1, 256, 257_216),
)


@exercise("00.1")
def the_weights_are_those_of_a_gemma(decoder_weights):
    """counts what a Gemma of these sizes has"""
    names = "width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim"
    for sizes in DECODERS:
        config = GemmaConfig(**dict(zip((*names, "vocab_size"), sizes, strict=True)))
        with torch.device("meta"):
            expected = sum(weight.numel() for weight in Gemma(config).parameters())
        found = decoder_weights(*sizes)
        require(found == expected, f"{sizes}: expected {expected:,}, got {found:,}")


@exercise("00.1")
def blocks_alone_count_by_depth(decoder_weights):
    """adds the same for each block"""
    counts = [decoder_weights(32, depth, 64, 4, 2, 8, 100) for depth in (1, 2, 5)]
    one, three = counts[1] - counts[0], counts[2] - counts[1]
    require(three == 3 * one, f"three blocks add {three:,}, one adds {one:,}")


def require_box(found, expected):
    """Fail unless four numbers are these."""
    close = len(found) == 4 and all(
        abs(float(a) - b) < 1e-6 * max(1, b)
        for a, b in zip(found, expected, strict=True)
    )
    require(close, f"expected {expected}, got {tuple(found)}")


@exercise("00.2")
def edges_lie_where_the_tokens_say(box_in_pixels):
    """turns 1023rds into pixels, height and width each in their place"""
    generator = torch.Generator().manual_seed(0)
    for height, width in ((96, 96), (480, 640), (1000, 30)):
        low = torch.randint(0, 500, (2,), generator=generator).tolist()
        high = torch.randint(501, 1024, (2,), generator=generator).tolist()
        text = "".join(f"<loc{number:04d}>" for number in (*low, *high))
        sides = height, width, height, width
        box = tokens_to_box(text)
        expected = tuple(edge * side for edge, side in zip(box, sides, strict=True))
        require_box(box_in_pixels(f"{text} cat", height, width), expected)


@exercise("00.2")
def borders_are_borders(box_in_pixels):
    """reaches both borders, and reads numbers in the name as part of the name"""
    text = "<loc0000><loc0000><loc1023><loc1023> route 66"
    require_box(box_in_pixels(text, 50, 200), (0.0, 0.0, 50.0, 200.0))


@exercise("00.3")
def the_product_of_the_shares(answer_probability):
    """multiplies the shares of the tokens that were chosen"""
    generator = torch.Generator().manual_seed(1)
    for length, V in ((1, 5), (4, 9), (7, 30)):
        logits = 3 * torch.randn(length, V, generator=generator)
        tokens = torch.randint(V, (length,), generator=generator).tolist()
        logs = logits.double().log_softmax(dim=1)
        expected = float(logs[range(length), tokens].sum().exp())
        found = float(answer_probability(logits, tokens))
        require(
            abs(found - expected) < 1e-4 * expected,
            f"expected {expected:.6g}, got {found:.6g}",
        )


@exercise("00.3")
def large_scores_do_not_overflow(answer_probability):
    """gives a number for scores of 1000, too"""
    logits = torch.tensor([[1000.0, 1000.0, 0.0], [-1000.0, -1000.0, -1000.0]])
    found = float(answer_probability(logits, [0, 2]))
    require(abs(found - 1 / 6) < 1e-5, f"expected {1 / 6:.4f}, got {found}")
