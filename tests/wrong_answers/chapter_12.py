"""Chapter 12: one right answer for each exercise, and several wrong ones."""

import torch
import torch.nn.functional as F

# 12.1


def who_reads_whom(kinds):
    place = torch.arange(kinds.shape[1])
    is_answer = kinds == 3
    own_past = is_answer[:, :, None] & (place <= place[:, None])
    return (kinds != 0)[:, None, :] & (~is_answer[:, None, :] | own_past)


def all_ones(kinds):
    return (kinds != 0)[:, None, :].expand(-1, kinds.shape[1], -1)


def causal(kinds):
    place = torch.arange(kinds.shape[1])
    return (kinds != 0)[:, None, :] & (place <= place[:, None])


def padding_is_read(kinds):
    return who_reads_whom(kinds.where(kinds != 0, 1))


def answer_reads_itself(kinds):
    is_answer = kinds == 3
    both = is_answer[:, :, None] | ~is_answer[:, None, :]
    return (kinds != 0)[:, None, :] & both


def only_pictures_read_both_ways(kinds):
    return who_reads_whom(kinds.where(kinds != 2, 3))


def transposed(kinds):
    return who_reads_whom(kinds).mT


def not_oneself(kinds):
    mask = who_reads_whom(kinds)
    own = torch.eye(kinds.shape[1], dtype=torch.bool) & (kinds == 3)[:, None, :]
    return mask & ~own


def prefix_reads_the_answer(kinds):
    place = torch.arange(kinds.shape[1])
    early = (place <= place[:, None]) | (kinds != 3)[:, :, None]
    return (kinds != 0)[:, None, :] & ((kinds != 3)[:, None, :] | early)


# 12.2


def embed_row(ids, table, image_tokens, image_token):
    is_image = ids == image_token
    words = table[ids.masked_fill(is_image, 0)] * table.shape[1] ** 0.5
    return words.masked_scatter(is_image[..., None], image_tokens)


def everything_scaled(ids, table, image_tokens, image_token):
    root = table.shape[1] ** 0.5
    return embed_row(ids, table, image_tokens * root, image_token)


def nothing_scaled(ids, table, image_tokens, image_token):
    root = table.shape[1] ** 0.5
    return embed_row(ids, table / root, image_tokens, image_token)


def images_divided(ids, table, image_tokens, image_token):
    root = table.shape[1] ** 0.5
    return embed_row(ids, table, image_tokens / root, image_token)


def looked_up_outside(ids, table, image_tokens, image_token):
    words = table[ids] * table.shape[1] ** 0.5
    return words.masked_scatter((ids == image_token)[..., None], image_tokens)


def in_reverse(ids, table, image_tokens, image_token):
    return embed_row(ids, table, image_tokens.flip(0), image_token)


def without_gradients(ids, table, image_tokens, image_token):
    return embed_row(ids, table.detach(), image_tokens, image_token)


def scaled_in_place(ids, table, image_tokens, image_token):
    table.data.mul_(table.shape[1] ** 0.5)
    return embed_row(ids, table, image_tokens, image_token) / table.shape[1] ** 0.5


# 12.3


def loss_per_example(logits, labels):
    labels = labels[:, 1:]
    shifted = logits[:, :-1].transpose(1, 2)
    losses = F.cross_entropy(shifted, labels, reduction="none")
    number = (labels != -100).sum(dim=1)
    means = losses.sum(dim=1) / number.clamp(min=1)
    return means.sum() / (number > 0).sum().clamp(min=1)


def over_tokens(logits, labels):
    labels = labels[:, 1:]
    total = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)


def not_shifted(logits, labels):
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    number = (labels != -100).sum(dim=1)
    means = losses.sum(dim=1) / number.clamp(min=1)
    return means.sum() / (number > 0).sum().clamp(min=1)


def empty_rows_count(logits, labels):
    labels = labels[:, 1:]
    shifted = logits[:, :-1].transpose(1, 2)
    losses = F.cross_entropy(shifted, labels, reduction="none")
    number = (labels != -100).sum(dim=1)
    return (losses.sum(dim=1) / number.clamp(min=1)).mean()


def over_padding(logits, labels):
    labels = labels[:, 1:]
    shifted = logits[:, :-1].transpose(1, 2)
    return F.cross_entropy(shifted, labels, reduction="none").mean()


def nan_for_empty_rows(logits, labels):
    rows = zip(logits[:, :-1], labels[:, 1:], strict=True)
    return torch.stack([F.cross_entropy(*row) for row in rows]).mean()


# 12.4


def leaks(decoder, x, first):
    x = x.detach().requires_grad_()
    logits = decoder(x)[0]
    push = torch.randn(logits.shape[1], dtype=logits.dtype)
    rows = [
        torch.autograd.grad(row @ push, x, retain_graph=True)[0][0] for row in logits
    ]
    depends = torch.stack([(row != 0).any(dim=-1) for row in rows])
    place = torch.arange(len(logits))
    return depends & (place > place[:, None]) & (place >= first)


def with_a_threshold(decoder, x, first):
    base = decoder(x)[0]
    found = torch.zeros(x.shape[1], x.shape[1], dtype=torch.bool)
    for j in range(first, x.shape[1]):
        other = x.clone()
        other[0, j] += 1
        found[:j, j] = ((decoder(other)[0] - base).abs().amax(-1) > 1e-6)[:j]
    return found


def within_the_suffix_only(decoder, x, first):
    found = leaks(decoder, x, first)
    found[:first] = False
    return found


def successors_only(decoder, x, first):
    return leaks(decoder, x, first) & torch.eye(x.shape[1]).roll(1, 1).bool()


def calls_the_prefix_a_leak(decoder, x, first):
    return leaks(decoder, x, 0)


def transposed_leaks(decoder, x, first):
    return leaks(decoder, x, first).T


# 12.5


def adapt(weight, bias, width):
    return weight / width**0.5, bias / width**0.5


def bias_forgotten(weight, bias, width):
    return weight / width**0.5, bias


def multiplied(weight, bias, width):
    return weight * width**0.5, bias * width**0.5


def by_the_features(weight, bias, width):
    return weight / weight.shape[1] ** 0.5, bias / weight.shape[1] ** 0.5


def divided_twice(weight, bias, width):
    return weight / width, bias / width


RIGHT = {
    "12.1": who_reads_whom,
    "12.2": embed_row,
    "12.3": loss_per_example,
    "12.4": leaks,
    "12.5": adapt,
}

WRONG = {
    "12.1": [
        all_ones,
        causal,
        padding_is_read,
        answer_reads_itself,
        only_pictures_read_both_ways,
        transposed,
        not_oneself,
        prefix_reads_the_answer,
    ],
    "12.2": [
        everything_scaled,
        nothing_scaled,
        images_divided,
        looked_up_outside,
        in_reverse,
        without_gradients,
        scaled_in_place,
    ],
    "12.3": [
        over_tokens,
        not_shifted,
        empty_rows_count,
        over_padding,
        nan_for_empty_rows,
    ],
    "12.4": [
        with_a_threshold,
        within_the_suffix_only,
        successors_only,
        calls_the_prefix_a_leak,
        transposed_leaks,
    ],
    "12.5": [bias_forgotten, multiplied, by_the_features, divided_twice],
}
