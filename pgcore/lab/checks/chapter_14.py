"""Checks of chapter 14, Generation. The oracles are torch and exhaustive search."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pgcore.lab.checks import exercise, require, require_close

STOP = 1


def random_rows(shape: tuple[int, ...], seed: int, spread: float = 2.0) -> Tensor:
    """Log-probabilities over the last axis."""
    generator = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(shape, generator=generator)
    return scores.log_softmax(dim=-1)


@exercise("14.1")
def rows_are_cut(cut_rows):
    """cuts each row at its own stop, and leaves a row without one whole"""
    table = torch.tensor([[5, 6, 1, 1], [7, 8, 9, 10], [1, 1, 1, 1], [4, 1, 4, 1]])
    found, expected = cut_rows(table, 1), [[5, 6], [7, 8, 9, 10], [], [4]]
    require(found == expected, f"expected {expected}, got {found}")


@exercise("14.1")
def any_stop_will_do(cut_rows):
    """works for any id of the stop, the pad's 0 too"""
    table = torch.tensor([[3, 0, 9], [9, 9, 2]])
    for stop, expected in ((0, [[3], [9, 9, 2]]), (9, [[3, 0], []])):
        found = cut_rows(table, stop)
        require(found == expected, f"stop {stop}: expected {expected}, got {found}")


def smallest_set(row: Tensor, p: float) -> Tensor:
    """The oracle: add the most probable until they hold p."""
    kept, share = torch.zeros(len(row), dtype=torch.bool), 0.0
    while share < p and not kept.all():
        place = int(row.masked_fill(kept, -1).argmax())
        kept[place] = True
        share += float(row[place])
    return kept


@exercise("14.2")
def the_nucleus_is_the_smallest(nucleus):
    """keeps the fewest tokens that hold p, whatever their order"""
    for seed, p in enumerate((0.05, 0.3, 0.7, 0.9, 0.99)):
        rows = random_rows((4, 9), seed).exp()
        expected = torch.stack([smallest_set(row, p) for row in rows])
        require_close(nucleus(rows, p), expected, f"p = {p}")


@exercise("14.2")
def the_token_that_crosses_stays(nucleus):
    """keeps the token that crosses p, and at least one"""
    row = torch.tensor([[0.05, 0.5, 0.15, 0.3]], dtype=torch.float64)
    for p, number in ((0.4, 1), (0.5, 1), (0.6, 2), (0.81, 3), (0.97, 4)):
        found = int(nucleus(row, p).sum())
        require(found == number, f"p = {p}: expected {number} tokens, got {found}")


@exercise("14.3")
def probabilities_are_those_of_the_answers(answer_log_probability):
    """adds up the log-probabilities of the labelled tokens, one place before them"""
    logits = 3 * random_rows((3, 7, 11), seed=1) + 5
    labels = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(2))
    labels[0, :4] = labels[1, :6] = labels[2, :2] = -100
    log_probs = logits.log_softmax(dim=-1)
    expected = torch.stack(
        [
            sum(
                (
                    log_probs[row, place - 1, labels[row, place]]
                    for place in range(1, 7)
                    if labels[row, place] != -100
                ),
                torch.zeros(()),
            )
            for row in range(3)
        ]
    )
    found = answer_log_probability(logits, labels)
    require_close(found, expected, "A label is predicted one place before its own.")


@exercise("14.3")
def what_is_not_labelled_does_not_matter(answer_log_probability):
    """does not look at the places of the prompt"""
    logits = random_rows((2, 6, 5), seed=3)
    labels = torch.full((2, 6), -100)
    labels[:, 4:] = 2
    changed = logits.clone()
    changed[:, :3] = 7 * random_rows((2, 3, 5), seed=4)
    expected = answer_log_probability(logits, labels)
    require_close(answer_log_probability(changed, labels), expected)
    require_close(expected, logits[:, 3:5, 2].sum(dim=1))


Language = Callable[[Sequence[int]], Tensor]


def language(V: int, seed: int, stop_bias: float, spread: float = 4.0) -> Language:
    """Random log-probabilities that depend on all ids before."""

    def next_log_probs(ids: Sequence[int]) -> Tensor:
        number = seed
        for token in ids:
            number = number * 31 + token + 1
        scores = random_rows((V,), number % 2**31, spread)
        scores[STOP] += stop_bias
        return scores.log_softmax(dim=-1)

    return next_log_probs


def mean_of(next_log_probs: Language, ids: Sequence[int]) -> float:
    """The mean log-probability of a text's tokens."""
    parts = [float(next_log_probs(ids[:i])[ids[i]]) for i in range(len(ids))]
    return sum(parts) / len(parts)


def every_answer(V: int, length: int) -> list[list[int]]:
    """All answers of at most so many tokens that end, and all that are cut."""
    others = [token for token in range(V) if token != STOP]
    answers = [list(ids) for ids in itertools.product(others, repeat=length)]
    for n in range(length):
        answers += [[*ids, STOP] for ids in itertools.product(others, repeat=n)]
    return answers


@exercise("14.4")
def a_wide_beam_finds_the_best(search):
    """finds the best of all answers when nothing has to be dropped"""
    for seed in range(12):
        next_log_probs = language(4, seed, stop_bias=seed % 4)
        answers = every_answer(4, 4)
        best = max(answers, key=lambda ids: mean_of(next_log_probs, ids))
        found = list(search(next_log_probs, 4**4, STOP, 4))
        require(
            found == best,
            f"expected {best} ({mean_of(next_log_probs, best):.3f} a token), got "
            f"{found}",
        )


@exercise("14.4")
def a_narrow_beam_keeps_the_best_prefixes(search):
    """keeps the most probable beginnings, and no more than its width"""
    for seed in range(16):
        next_log_probs = language(6, 100 + seed, stop_bias=-60.0, spread=1.0)
        going: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(5):
            longer = [
                (total + float(more), [*ids, token])
                for total, ids in going
                for token, more in enumerate(next_log_probs(ids))
                if token != STOP
            ]
            going = sorted(longer, reverse=True)[:2]
        found = list(search(next_log_probs, 2, STOP, 5))
        require(found == going[0][1], f"expected {going[0][1]}, got {found}")


@exercise("14.4")
def ends_do_not_narrow_or_stop_the_search(search):
    """remembers what ends, keeps its width, and goes on to the limit"""
    for seed in range(16):
        next_log_probs = language(6, 300 + seed, stop_bias=1.0, spread=1.0)
        going: list[tuple[float, list[int]]] = [(0.0, [])]
        ended: list[tuple[float, list[int]]] = []
        for _ in range(5):
            longer = [
                (total + float(more), [*ids, token])
                for total, ids in going
                for token, more in enumerate(next_log_probs(ids))
            ]
            ended += [beam for beam in longer if beam[1][-1] == STOP]
            rest = [beam for beam in longer if beam[1][-1] != STOP]
            going = sorted(rest, reverse=True)[:2]
        best = max(ended + going, key=lambda beam: beam[0] / len(beam[1]))[1]
        found = list(search(next_log_probs, 2, STOP, 5))
        require(found == best, f"expected {best}, got {found}")


def choices(tokens: Sequence[int], V: int = 12) -> Tensor:
    """Logits whose likeliest tokens are these."""
    logits = random_rows((len(tokens), V), seed=len(tokens))
    logits[torch.arange(len(tokens)), torch.tensor(tokens)] = 5.0
    return logits


@exercise("14.5")
def guesses_are_kept_up_to_the_first_wrong_one(verify):
    """keeps right guesses, and puts the right token in the place of a wrong one"""
    logits = choices([4, 7, 7, 2, 9])
    for guesses, expected in (
        ([4, 7, 3, 2], [4, 7, 7]),
        ([5, 7, 7, 2], [4]),
        ([4, 7, 7, 2], [4, 7, 7, 2, 9]),
        ([4, 7, 7, 8], [4, 7, 7, 2]),
    ):
        found = [int(token) for token in verify(guesses, logits)]
        require(found == expected, f"{guesses}: expected {expected}, got {found}")


@exercise("14.5")
def one_token_is_certain_without_a_guess(verify):
    """gives one token when nothing was guessed"""
    found = [int(token) for token in verify([], choices([6]))]
    require(found == [6], f"expected [6], got {found}")
