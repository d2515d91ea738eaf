"""Chapter 00: one right answer for each exercise, and several wrong ones."""

import math
import re

# 00.1


def decoder_weights(
    width, depth, mlp_dim, num_heads, num_kv_heads, head_dim, vocab_size
):
    attention = 2 * width * (num_heads + num_kv_heads) * head_dim
    block = attention + 3 * width * mlp_dim + 2 * width
    return vocab_size * width + depth * block + width


def heads_fill_the_width(width, depth, mlp_dim, num_heads, K, head_dim, vocab_size):
    block = 2 * width**2 + 2 * width * K * head_dim + 3 * width * mlp_dim + 2 * width
    return vocab_size * width + depth * block + width


def every_head_has_keys(width, depth, mlp_dim, num_heads, K, head_dim, vocab_size):
    return decoder_weights(
        width, depth, mlp_dim, num_heads, num_heads, head_dim, vocab_size
    )


def two_maps_in_the_mlp(width, depth, mlp_dim, num_heads, K, head_dim, vocab_size):
    sizes = width, depth, mlp_dim, num_heads, K, head_dim, vocab_size
    return decoder_weights(*sizes) - depth * width * mlp_dim


def a_table_for_each_end(width, depth, mlp_dim, num_heads, K, head_dim, vocab_size):
    sizes = width, depth, mlp_dim, num_heads, K, head_dim, vocab_size
    return decoder_weights(*sizes) + vocab_size * width


def forgets_the_last_norm(width, depth, mlp_dim, num_heads, K, head_dim, vocab_size):
    sizes = width, depth, mlp_dim, num_heads, K, head_dim, vocab_size
    return decoder_weights(*sizes) - width


# 00.2


def box_in_pixels(answer, height, width):
    numbers = re.findall("<loc([0-9]{4})>", answer)[:4]
    sides = height, width, height, width
    return tuple(
        int(number) / 1023 * side for number, side in zip(numbers, sides, strict=True)
    )


def left_before_top(answer, height, width):
    return box_in_pixels(answer, width, height)


def divides_by_1024(answer, height, width):
    return tuple(edge * 1023 / 1024 for edge in box_in_pixels(answer, height, width))


def reads_the_name(answer, height, width):
    numbers = [int(number) for number in re.findall("[0-9]+", answer)][-4:]
    sides = height, width, height, width
    return tuple(n / 1023 * side for n, side in zip(numbers, sides, strict=True))


def in_shares(answer, height, width):
    return box_in_pixels(answer, 1, 1)


# 00.3


def answer_probability(logits, tokens):
    shares = logits.double().softmax(dim=1)
    return math.prod(shares[range(len(tokens)), tokens].tolist())


def mean_of_the_shares(logits, tokens):
    shares = logits.softmax(dim=1)
    return shares[range(len(tokens)), tokens].mean().item()


def of_the_likeliest(logits, tokens):
    return logits.softmax(dim=1).amax(dim=1).prod().item()


def overflows(logits, tokens):
    shares = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    return math.prod(shares[range(len(tokens)), tokens].tolist())


def over_the_whole_table(logits, tokens):
    shares = logits.flatten().softmax(dim=0).view_as(logits)
    return math.prod(shares[range(len(tokens)), tokens].tolist())


RIGHT = {
    "00.1": decoder_weights,
    "00.2": box_in_pixels,
    "00.3": answer_probability,
}
WRONG = {
    "00.1": [
        heads_fill_the_width,
        every_head_has_keys,
        two_maps_in_the_mlp,
        a_table_for_each_end,
        forgets_the_last_norm,
    ],
    "00.2": [left_before_top, divides_by_1024, reads_the_name, in_shares],
    "00.3": [mean_of_the_shares, of_the_likeliest, overflows, over_the_whole_table],
}
