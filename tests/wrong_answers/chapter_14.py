"""Chapter 14: one right answer for each exercise, and several wrong ones."""

import torch
import torch.nn.functional as F

# 14.1


def cut_rows(table, stop):
    rows = table.tolist()
    return [row[: row.index(stop)] if stop in row else row for row in rows]


def keeps_the_stop(table, stop):
    rows = table.tolist()
    return [row[: row.index(stop) + 1] if stop in row else row for row in rows]


def drops_every_stop(table, stop):
    return [[token for token in row if token != stop] for row in table.tolist()]


def cuts_all_at_the_first(table, stop):
    rows = table.tolist()
    end = min([row.index(stop) for row in rows if stop in row], default=None)
    return [row[:end] for row in rows]


def loses_the_last_of_a_whole_row(table, stop):
    return [row[: (row.index(stop) if stop in row else -1)] for row in table.tolist()]


# 14.2


def nucleus(probabilities, p):
    shares, places = probabilities.sort(dim=-1, descending=True)
    kept = F.pad(shares.cumsum(dim=-1), (1, -1)) < p
    return torch.zeros_like(kept).scatter(-1, places, kept)


def falls_short(probabilities, p):
    shares, places = probabilities.sort(dim=-1, descending=True)
    kept = shares.cumsum(dim=-1) <= p
    kept[:, 0] = True
    return torch.zeros_like(kept).scatter(-1, places, kept)


def in_the_sorted_order(probabilities, p):
    shares = probabilities.sort(dim=-1, descending=True).values
    return F.pad(shares.cumsum(dim=-1), (1, -1)) < p


def in_the_order_of_the_vocabulary(probabilities, p):
    return F.pad(probabilities.cumsum(dim=-1), (1, -1)) < p


def above_a_threshold(probabilities, p):
    return probabilities >= (1 - p) * probabilities.amax(dim=-1, keepdim=True)


# 14.3


def answer_log_probability(logits, labels):
    losses = F.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
    return -losses.sum(dim=1)


def not_shifted(logits, labels):
    return -F.cross_entropy(logits.mT, labels, reduction="none").sum(dim=1)


def mean_over_the_answer(logits, labels):
    return answer_log_probability(logits, labels) / (labels[:, 1:] != -100).sum(dim=1)


def sum_of_logits(logits, labels):
    wanted = labels[:, 1:].clamp(min=0)[..., None]
    chosen = logits[:, :-1].gather(-1, wanted)[..., 0]
    return chosen.masked_fill(labels[:, 1:] == -100, 0).sum(dim=1)


def one_number_for_the_batch(logits, labels):
    return answer_log_probability(logits, labels).sum().expand(len(labels))


# 14.4


def search(next_log_probs, width, stop, max_new_tokens, mean=True, keep_ends=True):
    going, ended = [(0.0, [])], []
    for _ in range(max_new_tokens):
        longer = continued(going, next_log_probs)
        if keep_ends:
            ended += [beam for beam in longer if beam[1][-1] == stop]
        going = [beam for beam in longer if beam[1][-1] != stop][:width]
    power = 1 if mean else 0
    return max(ended + going, key=lambda beam: beam[0] / len(beam[1]) ** power)[1]


def stops_when_enough_have_ended(next_log_probs, width, stop, max_new_tokens):
    going, ended = [(0.0, [])], []
    for _ in range(max_new_tokens):
        longer = continued(going, next_log_probs)
        ended += [beam for beam in longer[:width] if beam[1][-1] == stop]
        going = [beam for beam in longer if beam[1][-1] != stop][:width]
        if len(ended) >= width:
            break
    return max(ended + going, key=lambda beam: beam[0] / len(beam[1]))[1]


def ends_keep_their_places(next_log_probs, width, stop, max_new_tokens):
    going, ended = [(0.0, [])], []
    for _ in range(max_new_tokens):
        longer = continued(going, next_log_probs)[:width]
        ended += [beam for beam in longer if beam[1][-1] == stop]
        going = [beam for beam in longer if beam[1][-1] != stop]
        width -= len(longer) - len(going)
    return max(ended + going, key=lambda beam: beam[0] / len(beam[1]))[1]


def continued(going, next_log_probs):
    longer = [
        (total + more, [*ids, token])
        for total, ids in going
        for token, more in enumerate(next_log_probs(ids).tolist())
    ]
    return sorted(longer, reverse=True)


def compares_sums(next_log_probs, width, stop, max_new_tokens):
    return search(next_log_probs, width, stop, max_new_tokens, mean=False)


def forgets_what_ended(next_log_probs, width, stop, max_new_tokens):
    return search(next_log_probs, width, stop, max_new_tokens, keep_ends=False)


def greedy(next_log_probs, width, stop, max_new_tokens):
    return search(next_log_probs, 1, stop, max_new_tokens)


def ignores_the_width(next_log_probs, width, stop, max_new_tokens):
    return search(next_log_probs, 10**6, stop, max_new_tokens)


# 14.5


def verify(guesses, logits):
    own, agreed = logits.argmax(dim=-1).tolist(), 0
    while agreed < len(guesses) and guesses[agreed] == own[agreed]:
        agreed += 1
    return own[: agreed + 1]


def keeps_all_that_agree(guesses, logits):
    own = logits.argmax(dim=-1).tolist()
    return [b for a, b in zip([*guesses, own[-1]], own, strict=True) if a == b]


def gives_nothing_for_free(guesses, logits):
    return verify(guesses, logits)[:-1] or logits.argmax(dim=-1).tolist()[:1]


def trusts_what_follows(guesses, logits):
    return logits.argmax(dim=-1).tolist()


RIGHT = {
    "14.1": cut_rows,
    "14.2": nucleus,
    "14.3": answer_log_probability,
    "14.4": search,
    "14.5": verify,
}

WRONG = {
    "14.1": [
        keeps_the_stop,
        drops_every_stop,
        cuts_all_at_the_first,
        loses_the_last_of_a_whole_row,
    ],
    "14.2": [
        falls_short,
        in_the_sorted_order,
        in_the_order_of_the_vocabulary,
        above_a_threshold,
    ],
    "14.3": [
        not_shifted,
        mean_over_the_answer,
        sum_of_logits,
        one_number_for_the_batch,
    ],
    "14.4": [
        compares_sums,
        forgets_what_ended,
        greedy,
        ignores_the_width,
        stops_when_enough_have_ended,
        ends_keep_their_places,
    ],
    "14.5": [keeps_all_that_agree, gives_nothing_for_free, trusts_what_follows],
}
