"""Answers to the exercises of chapter 07: one right, several wrong."""

import torch
import torch.nn.functional as F

from pgcore.contrastive import l2_normalize

# 07.1


def every_part(config):
    width = config.width
    attention = 4 * (width + 1) * width
    mlp = 2 * width * config.mlp_dim + config.mlp_dim + width
    tables = (config.vocab_size + config.max_length) * width
    head = (width + 1) * config.projection_dim
    return tables + config.depth * (attention + mlp + 4 * width) + 2 * width + head


def without_biases(config):
    width = config.width
    block = 4 * width**2 + 2 * width * config.mlp_dim + 4 * width
    tables = (config.vocab_size + config.max_length) * width
    head = width * config.projection_dim
    return tables + config.depth * block + 2 * width + head


def without_positions(config):
    return every_part(config) - config.max_length * config.width


def without_last_norm(config):
    return every_part(config) - 2 * config.width


def head_as_wide_as_the_tower(config):
    width = config.width
    return every_part(config) + (width + 1) * (width - config.projection_dim)


# 07.2


def wrong_ones_not_beaten(logits, is_match, k):
    best = logits.masked_fill(~is_match, -torch.inf).amax(1, keepdim=True)
    return ((~is_match & ~(logits < best)).sum(dim=1) < k).float().mean()


def ties_for_you(logits, is_match, k):
    best = logits.masked_fill(~is_match, -torch.inf).amax(1, keepdim=True)
    return ((~is_match & (logits > best)).sum(dim=1) < k).float().mean()


def share_of_all_matches(logits, is_match, k):
    top = logits.topk(k, dim=1).indices
    return (is_match.gather(1, top).sum(1) / is_match.sum(1)).mean()


def first_match_only(logits, is_match, k):
    first = is_match.float().argmax(1, keepdim=True)
    match = logits.gather(1, first)
    return ((~is_match & ~(logits < match)).sum(dim=1) < k).float().mean()


def all_must_be_found(logits, is_match, k):
    worst = logits.masked_fill(~is_match, torch.inf).amin(1, keepdim=True)
    return ((~is_match & ~(logits < worst)).sum(dim=1) < k).float().mean()


def precision(logits, is_match, k):
    top = logits.topk(k, dim=1).indices
    return is_match.gather(1, top).float().mean()


# 07.3


def unit_then_mean_then_unit(vectors):
    return l2_normalize(l2_normalize(vectors).mean(dim=0))


def mean_then_unit(vectors):
    return l2_normalize(vectors.mean(dim=0))


def unit_then_mean(vectors):
    return l2_normalize(vectors).mean(dim=0)


def over_the_classes(vectors):
    return l2_normalize(l2_normalize(vectors).mean(dim=1))


def first_sentence(vectors):
    return l2_normalize(vectors[0])


# 07.4


def left_out(pool, tokens, text):
    keep = ~torch.eye(len(tokens), dtype=torch.bool)
    fewer = torch.stack([tokens[row] for row in keep])
    whole = F.cosine_similarity(pool(tokens[None]), text[None])
    return whole - F.cosine_similarity(pool(fewer), text[None])


def set_to_zero(pool, tokens, text):
    dark = tokens * (1 - torch.eye(len(tokens)))[..., None]
    whole = F.cosine_similarity(pool(tokens[None]), text[None])
    return whole - F.cosine_similarity(pool(dark), text[None])


def sign_turned(pool, tokens, text):
    return -left_out(pool, tokens, text)


def alone(pool, tokens, text):
    return F.cosine_similarity(pool(tokens[:, None]), text[None])


def dot_products(pool, tokens, text):
    keep = ~torch.eye(len(tokens), dtype=torch.bool)
    fewer = torch.stack([tokens[row] for row in keep])
    return pool(tokens[None]) @ text - pool(fewer) @ text


RIGHT = {
    "07.1": every_part,
    "07.2": wrong_ones_not_beaten,
    "07.3": unit_then_mean_then_unit,
    "07.4": left_out,
}

WRONG = {
    "07.1": [
        without_biases,
        without_positions,
        without_last_norm,
        head_as_wide_as_the_tower,
    ],
    "07.2": [
        ties_for_you,
        share_of_all_matches,
        first_match_only,
        all_must_be_found,
        precision,
    ],
    "07.3": [mean_then_unit, unit_then_mean, over_the_classes, first_sentence],
    "07.4": [set_to_zero, sign_turned, alone, dot_products],
}
