"""Checks of chapter 12, PaliGemma. The oracles are loops, torch and our own modules."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pgcore.gemma import Gemma, GemmaConfig
from pgcore.lab.checks import exercise, require, require_close
from pgcore.paligemma import prefix_lm_mask

CONFIG = GemmaConfig(
    width=16,
    depth=2,
    mlp_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    vocab_size=11,
)


def rows_of_kinds(seed: int) -> Tensor:
    """Ragged rows: padding left or right, 0 to 3 image tokens, words, an answer."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for at_the_end in (False, True, False):
        sizes = torch.randint(0, 4, (3,), generator=generator).tolist()
        kinds = [kind + 1 for kind, size in enumerate(sizes) for _ in range(size)]
        padding = [0] * (10 - len(kinds))
        rows.append(kinds + padding if at_the_end else padding + kinds)
    return torch.tensor(rows)


def may_read(kinds: list[int], query: int, key: int) -> bool:
    """The rule as a sentence."""
    if kinds[key] == 0:
        return False
    return kinds[key] != 3 or (kinds[query] == 3 and key <= query)


@exercise("12.1")
def the_mask_is_right(who_reads_whom):
    """says who may read whom, for ragged rows padded on either side"""
    for seed in range(6):
        kinds = rows_of_kinds(seed)
        mask = who_reads_whom(kinds)
        require(
            isinstance(mask, Tensor) and mask.dtype == torch.bool,
            "expected a boolean tensor",
        )
        require(
            mask.shape == (3, 10, 10),
            f"expected shape (3, 10, 10), got {tuple(mask.shape)}",
        )
        for row, line in enumerate(kinds.tolist()):
            for query in range(10):
                if line[query] == 0:
                    continue  # rows of padding may hold anything
                for key in range(10):
                    expected = may_read(line, query, key)
                    require(
                        bool(mask[row, query, key]) == expected,
                        f"kinds {line}: query {query}, key {key}: expected {expected}.",
                    )


def row_example(seed: int, image_token: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, a table of 7 rows, and image tokens: two pictures, none, one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 7, (3, 9), generator=generator)
    ids[ids == image_token] = 1
    ids[0, 1:5] = ids[2, 3:5] = image_token
    table = torch.randn(7, 6, generator=generator) / 6**0.5
    tokens = torch.randn(3, 2, 6, generator=generator)
    return ids, table, tokens


@exercise("12.2")
def the_row_is_right(embed_row):
    """puts scaled words and unscaled image tokens where they belong"""
    for seed, image_token in enumerate((6, 3, 40, 0)):
        ids, table, tokens = row_example(seed, image_token)
        before = table.clone()
        waiting = list(tokens.flatten(0, 1))
        expected = torch.stack(
            [
                torch.stack(
                    [
                        waiting.pop(0) if i == image_token else table[i] * 6**0.5
                        for i in line
                    ]
                )
                for line in ids.tolist()
            ]
        )
        hint = f"the image token is {image_token}, the table has 7 rows."
        require_close(embed_row(ids, table, tokens, image_token), expected, hint)
        require(torch.equal(table, before), "The table must stay as it is.")


@exercise("12.2")
def gradients_reach_both_ends(embed_row):
    """lets gradients through to the table and to the image tokens"""
    ids, table, tokens = row_example(9, 40)
    table.requires_grad_(), tokens.requires_grad_()
    embed_row(ids, table, tokens, 40).sum().backward()
    require(table.grad is not None and tokens.grad is not None, "A gradient is lost.")
    counts = torch.bincount(ids[ids != 40], minlength=7).float()[:, None]
    require_close(table.grad, counts.expand(7, 6) * 6**0.5, "of the table")
    require_close(tokens.grad, torch.ones(3, 2, 6), "of the image tokens")


def losses_by_loops(logits: Tensor, labels: Tensor) -> Tensor:
    """A mean for each row with labels, then the mean of those."""
    of_rows = []
    for row, line in zip(logits, labels.tolist(), strict=True):
        losses = [
            F.cross_entropy(row[t - 1], torch.tensor(label))
            for t, label in enumerate(line)
            if t and label != -100
        ]
        if losses:
            of_rows.append(torch.stack(losses).mean())
    return torch.stack(of_rows).mean() if of_rows else 0 * logits.sum()


def labelled(seed: int, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Logits, and labels at the end of each row."""
    generator = torch.Generator().manual_seed(seed)
    B, T = len(lengths), 8
    logits = 3 * torch.randn(B, T, 11, generator=generator)
    labels = torch.randint(11, (B, T), generator=generator)
    for row, length in enumerate(lengths):
        labels[row, : T - length] = -100
    return logits, labels


@exercise("12.3")
def the_loss_is_right(loss_per_example):
    """equals a loop over rows and labels, rows without labels included"""
    for seed, lengths in enumerate(((2, 6), (3, 3, 3), (1, 0, 7), (0, 5), (0, 0))):
        logits, labels = labelled(seed, lengths)
        expected = losses_by_loops(logits, labels)
        found = loss_per_example(logits, labels)
        require_close(found, expected, f"Answers of {lengths} tokens.", 1e-4)


@exercise("12.3")
def the_gradient_is_right(loss_per_example):
    """has the right gradient, and no NaN where there is nothing to learn"""
    for seed, lengths in enumerate(((2, 6), (1, 0, 7), (0, 0))):
        logits, labels = labelled(seed, lengths)
        logits.requires_grad_()
        found, expected = (
            torch.autograd.grad(way(logits, labels), logits)[0]
            for way in (loss_per_example, losses_by_loops)
        )
        require_close(found, expected, f"Answers of {lengths} tokens.", 1e-4)


def model_with(mask: Tensor, tiny_leak: float = 0.0):
    """A decoder as the exercise hands it out: vectors in, logits out."""
    generator = torch.Generator().manual_seed(0)
    gemma = Gemma(CONFIG)
    with torch.no_grad():
        for weight in gemma.parameters():
            size = 0.3 if weight.ndim == 1 else weight.shape[1] ** -0.5
            weight.normal_(std=size, generator=generator)
    gemma.double()

    def decoder(x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])[None]
        hidden = gemma(x, positions=positions, mask=mask)
        if tiny_leak:
            hidden = hidden + tiny_leak * x.roll(-1, dims=1)
        return gemma.logits(hidden)

    return decoder


def masks(T: int, first: int) -> dict[str, Tensor]:
    """Right ones and leaking ones, 1 1 T T."""
    real = torch.ones(1, T, dtype=torch.bool)
    suffix = torch.arange(T)[None] >= first
    right = prefix_lm_mask(real, suffix)
    successor = right | torch.eye(T, dtype=torch.bool).roll(1, dims=1).triu(1)
    last = right.clone()
    last[..., T - 2, T - 1] = True
    block = right.clone()
    block[..., first:, first:] = True
    return {
        "no leak": right,
        "a causal prefix, no leak": prefix_lm_mask(real, real),
        "all ones": torch.ones_like(right),
        "a suffix that reads itself": block,
        "each reads its successor": successor,
        "a leak at the end alone": last,
    }


def reachable(mask: Tensor, first: int, layers: int) -> Tensor:
    """The oracle: which leaks can travel through so many layers."""
    one = mask[0, 0].float()
    reads = torch.linalg.matrix_power(one, layers) > 0
    place = torch.arange(len(one))
    return reads & (place > place[:, None]) & (place >= first)


@exercise("12.4")
def leaks_are_found(leaks):
    """finds exactly the pairs that leak, through any mask"""
    T, first = 9, 5
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, T, 16, generator=generator, dtype=torch.float64)
    for name, mask in masks(T, first).items():
        found = leaks(model_with(mask), x, first)
        expected = reachable(mask, first, CONFIG.depth)
        require(
            isinstance(found, Tensor)
            and found.dtype == torch.bool
            and found.shape == (T, T),
            f"expected {T} x {T} booleans.",
        )
        extra, missing = (found & ~expected).sum(), (expected & ~found).sum()
        require(
            extra == 0 and missing == 0,
            f"{name}: {missing} leaking pairs not found, {extra} found that are none.",
        )


@exercise("12.4")
def small_leaks_are_found(leaks):
    """finds a leak of a billionth"""
    T, first = 7, 3
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, T, 16, generator=generator, dtype=torch.float64)
    decoder = model_with(masks(T, first)["no leak"], tiny_leak=1e-9)
    expected = torch.eye(T).roll(1, dims=1).triu(1).bool()
    expected = expected & (torch.arange(T) >= first)
    found = leaks(decoder, x, first)
    require(torch.equal(found, expected), "Is there a threshold in your answer?")


@exercise("12.5")
def both_roads_agree(adapt):
    """gives the same after the old decoder's multiplication"""
    for seed, (features, width) in enumerate(((6, 16), (10, 7), (3, 64))):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(width, features, generator=generator)
        bias = torch.randn(width, generator=generator)
        before = weight.clone()
        new_weight, new_bias = adapt(weight, bias, width)
        x = torch.randn(5, features, generator=generator)
        found = F.linear(x, new_weight, new_bias) * width**0.5
        expected = F.linear(x, weight, bias)
        require_close(found, expected, f"D is {width}.", rtol=1e-4, atol=1e-5)
        require(torch.equal(weight, before), "Leave the argument as it is.")
