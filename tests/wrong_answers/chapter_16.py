"""Chapter 16: one right answer for each exercise, and several wrong ones."""

from copy import deepcopy

import torch

# 16.1


def trapezoid(step, steps, warmup, decay):
    rising = (step + 1) / max(warmup, 1)
    falling = (steps - step) / max(decay, 1)
    return min(1.0, rising, falling)


def starts_at_zero(step, steps, warmup, decay):
    return min(1.0, step / max(warmup, 1), (steps - step) / max(decay, 1))


def ends_one_step_early(step, steps, warmup, decay):
    falling = max(0.0, (steps - 1 - step) / max(decay, 1))
    return min(1.0, (step + 1) / max(warmup, 1), falling)


def never_falls(step, steps, warmup, decay):
    return min(1.0, (step + 1) / max(warmup, 1))


def divides_by_zero(step, steps, warmup, decay):
    return min(1.0, (step + 1) / warmup, (steps - step) / decay)


# 16.2


def labels_of(ids, starts):
    place = torch.arange(ids.shape[1])
    return ids.masked_fill(place < starts[:, None], -100)


def masks_the_padding_id(ids, starts):
    return labels_of(ids, starts).masked_fill(ids == 1, -100)


def shifts_already(ids, starts):
    return torch.roll(labels_of(ids, starts), -1, dims=1)


def learns_the_prompt(ids, starts):
    return ids.masked_fill((ids == 1) & (torch.arange(ids.shape[1]) < 2), -100)


def forgets_the_first(ids, starts):
    return labels_of(ids, starts + 1)


def writes_into_the_ids(ids, starts):
    place = torch.arange(ids.shape[1])
    return ids.masked_fill_(place < starts[:, None], -100)


# 16.3


def accumulate(model, pieces, loss_of):
    model.zero_grad()
    total, number = 0.0, sum(len(piece) for piece in pieces)
    for piece in pieces:
        loss = loss_of(model, piece) * len(piece) / number
        loss.backward()
        total += loss.item()
    return total


def all_pieces_alike(model, pieces, loss_of):
    model.zero_grad()
    total = 0.0
    for piece in pieces:
        loss = loss_of(model, piece) / len(pieces)
        loss.backward()
        total += loss.item()
    return total


def not_divided(model, pieces, loss_of):
    model.zero_grad()
    total = 0.0
    for piece in pieces:
        loss = loss_of(model, piece)
        loss.backward()
        total += loss.item()
    return total / len(pieces)


def not_cleared(model, pieces, loss_of):
    total, number = 0.0, sum(len(piece) for piece in pieces)
    for piece in pieces:
        loss = loss_of(model, piece) * len(piece) / number
        loss.backward()
        total += loss.item()
    return total


def cleared_for_each(model, pieces, loss_of):
    total, number = 0.0, sum(len(piece) for piece in pieces)
    for piece in pieces:
        model.zero_grad()
        loss = loss_of(model, piece) * len(piece) / number
        loss.backward()
        total += loss.item()
    return total


def all_graphs_at_once(model, pieces, loss_of):
    model.zero_grad()
    number = sum(len(piece) for piece in pieces)
    losses = [loss_of(model, piece) * len(piece) / number for piece in pieces]
    loss = sum(losses)
    loss.backward()
    return loss.item()


# 16.4


def sorted_parameters(model, frozen):
    groups = {"frozen": [], "decay": [], "plain": []}
    for name, weight in model.named_parameters():
        kind = "decay" if weight.ndim >= 2 else "plain"
        if name.startswith(tuple(frozen)):
            kind = "frozen"
        weight.requires_grad_(kind != "frozen")
        groups[kind].append(weight)
    return groups


def by_the_name_norm(model, frozen):
    groups = {"frozen": [], "decay": [], "plain": []}
    for name, weight in model.named_parameters():
        kind = "plain" if "norm" in name or name.endswith("bias") else "decay"
        if name.startswith(tuple(frozen)):
            kind = "frozen"
        weight.requires_grad_(kind != "frozen")
        groups[kind].append(weight)
    return groups


def tied_twice(model, frozen):
    groups = {"frozen": [], "decay": [], "plain": []}
    for name, weight in model.named_parameters(remove_duplicate=False):
        kind = "decay" if weight.ndim >= 2 else "plain"
        if name.startswith(tuple(frozen)):
            kind = "frozen"
        weight.requires_grad_(kind != "frozen")
        groups[kind].append(weight)
    return groups


def wakes_nobody(model, frozen):
    groups = sorted_parameters(model, frozen)
    for weight in groups["decay"] + groups["plain"]:
        weight.requires_grad_(False)
    return groups


def leaves_gradients_on(model, frozen):
    groups = sorted_parameters(model, frozen)
    for weight in groups["frozen"]:
        weight.requires_grad_()
    return groups


def anywhere_in_the_name(model, frozen):
    return sorted_parameters(model, [name.rstrip(".") for name in frozen])


# 16.5


def take(run):
    return deepcopy(
        {
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "generator": run.generator.get_state(),
            "step": run.step,
        }
    )


def put(run, taken):
    taken = deepcopy(taken)
    run.model.load_state_dict(taken["model"])
    run.optimizer.load_state_dict(taken["optimizer"])
    run.generator.set_state(taken["generator"])
    run.step = taken["step"]


def without(name):
    """Forget one of the four."""

    def partial_put(run, taken):
        own = take(run)
        put(run, taken | {name: own[name]})

    return take, partial_put


def take_living_tensors(run):
    return {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "generator": run.generator.get_state(),
        "step": run.step,
    }


RIGHT = {
    "16.1": trapezoid,
    "16.2": labels_of,
    "16.3": accumulate,
    "16.4": sorted_parameters,
    "16.5": (take, put),
}

WRONG = {
    "16.1": [starts_at_zero, ends_one_step_early, never_falls, divides_by_zero],
    "16.2": [
        masks_the_padding_id,
        shifts_already,
        learns_the_prompt,
        forgets_the_first,
        writes_into_the_ids,
    ],
    "16.3": [
        all_pieces_alike,
        not_divided,
        not_cleared,
        cleared_for_each,
        all_graphs_at_once,
    ],
    "16.4": [
        by_the_name_norm,
        tied_twice,
        wakes_nobody,
        leaves_gradients_on,
        anywhere_in_the_name,
    ],
    "16.5": [
        (take_living_tensors, put),
        without("model"),
        without("optimizer"),
        without("generator"),
        without("step"),
    ],
}
