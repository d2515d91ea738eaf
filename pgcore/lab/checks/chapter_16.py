"""Checks of chapter 16, Training. The oracles are torch and sums by hand."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from pgcore.lab.checks import exercise, require, require_close


@exercise("16.1")
def corners_are_right(trapezoid):
    """is right at its corners, for a run of 100 steps"""
    expected = {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 50: 1.0, 80: 1.0, 90: 0.5, 99: 0.05}
    expected[100] = 0.0
    for step, share in expected.items():
        found = float(trapezoid(step, 100, 10, 20))
        require(
            abs(found - share) < 1e-9, f"step {step}: expected {share}, got {found}"
        )


@exercise("16.1")
def none_of_either_is_fine(trapezoid):
    """needs no warm-up and no decay, and may have them overlap"""
    for step in range(10):
        found = float(trapezoid(step, 10, 0, 0))
        require(found == 1.0, f"without either, step {step}: got {found}")
    values = [float(trapezoid(step, 10, 8, 8)) for step in range(11)]
    expected = [min((s + 1) / 8, (10 - s) / 8, 1.0) for s in range(11)]
    require(
        max(abs(a - b) for a, b in zip(values, expected, strict=True)) < 1e-9,
        f"8 up and 8 down in 10 steps: expected {expected}, got {values}",
    )


@exercise("16.2")
def answers_are_labels(labels_of):
    """labels each token of the answer with itself, and nothing else"""
    ids = torch.tensor([[1, 1, 5, 6, 7, 1], [8, 9, 2, 3, 4, 1], [1, 1, 1, 1, 6, 1]])
    starts = torch.tensor([4, 2, 5])
    x = -100
    expected = [[x, x, x, x, 7, 1], [x, x, 2, 3, 4, 1], [x, x, x, x, x, 1]]
    require_close(
        labels_of(ids.clone(), starts), torch.tensor(expected), "1 pads and ends."
    )


@exercise("16.2")
def ids_are_left_alone(labels_of):
    """leaves the ids as they were, and gives integers"""
    ids = torch.randint(20, (4, 9), generator=torch.Generator().manual_seed(0))
    before, starts = ids.clone(), torch.tensor([0, 3, 8, 9])
    found = labels_of(ids, starts)
    require(torch.equal(ids, before), "the ids that were given have changed")
    require(found.dtype == torch.int64, f"expected int64, got {found.dtype}")
    counts = (found != -100).sum(dim=1).tolist()
    require(counts == [9, 6, 1, 0], f"expected 9, 6, 1, 0 labels, got {counts}")


def small_model(seed: int) -> nn.Module:
    """A net of three inputs and one output."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def squares(model: nn.Module, piece: torch.Tensor) -> torch.Tensor:
    """A mean over the examples of a piece: three inputs and a target each."""
    return F.mse_loss(model(piece[:, :3])[:, 0], piece[:, 3])


def gradient_of(parameter: nn.Parameter) -> torch.Tensor:
    """What ``backward`` has left."""
    assert parameter.grad is not None
    return parameter.grad


@exercise("16.3")
def pieces_make_one_batch(accumulate):
    """leaves the gradient of the mean over all examples"""
    for sizes in ([4, 4, 2], [1, 9], [5, 5], [7]):
        data = torch.randn(sum(sizes), 4, dtype=torch.float64)
        whole, pieced = small_model(1), small_model(1)
        loss = squares(whole, data)
        loss.backward()
        found = accumulate(pieced, list(data.split(sizes)), squares)
        for one, other in zip(whole.parameters(), pieced.parameters(), strict=True):
            require(other.grad is not None, "a weight has no gradient")
            require_close(other.grad, gradient_of(one), f"pieces of {sizes}")
        require(
            abs(float(found) - loss.item()) < 1e-9,
            f"pieces of {sizes}: expected the loss {loss.item():.4f}, got {found}",
        )


@exercise("16.3")
def old_gradients_are_gone(accumulate):
    """does not add to gradients that were there before"""
    data, model = torch.randn(6, 4, dtype=torch.float64), small_model(2)
    for _ in range(2):
        accumulate(model, [data[:2], data[2:]], squares)
    expected = small_model(2)
    squares(expected, data).backward()
    for one, other in zip(expected.parameters(), model.parameters(), strict=True):
        require_close(other.grad, gradient_of(one))


@exercise("16.3")
def one_graph_at_a_time(accumulate):
    """frees each piece's graph before it reads the next"""
    alive: list[bool] = []
    last: list[torch.Tensor] = []

    def watched(model, piece):
        if last:
            try:
                last[-1].backward(retain_graph=True)
                alive.append(True)
            except RuntimeError:
                alive.append(False)
        loss = squares(model, piece)
        last.append(loss)
        return loss

    data = torch.randn(6, 4, dtype=torch.float64)
    accumulate(small_model(3), [data[:2], data[2:4], data[4:]], watched)
    require(not any(alive), "an earlier piece's graph was still there")


class Tied(nn.Module):
    """An embedding whose table is the last layer's, too."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(3, 4, 2), nn.LayerNorm(4))
        self.towering = nn.Linear(4, 4)
        self.table = nn.Embedding(5, 4)
        self.last = nn.Linear(4, 5)
        self.last.weight = self.table.weight
        self.scale = nn.Parameter(torch.ones(()))


@exercise("16.4")
def each_is_in_its_group_once(sorted_parameters):
    """puts each parameter into its group, and once"""
    model = Tied()
    groups = sorted_parameters(model, ["tower."])
    names = {id(p): name for name, p in model.named_parameters()}
    found = {kind: sorted(names[id(p)] for p in groups[kind]) for kind in groups}
    expected = {
        "frozen": ["tower.0.bias", "tower.0.weight", "tower.1.bias", "tower.1.weight"],
        "decay": ["table.weight", "towering.weight"],
        "plain": ["last.bias", "scale", "towering.bias"],
    }
    for kind, wanted in expected.items():
        got = found.get(kind)
        require(got == wanted, f"{kind}: expected {wanted}, got {got}")


@exercise("16.4")
def only_the_frozen_ask_for_nothing(sorted_parameters):
    """switches gradients off for frozen ones, and on for the others"""
    model = Tied()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    groups = sorted_parameters(model, ["tower.", "scale"])
    for kind, parameters in groups.items():
        for parameter in parameters:
            require(
                parameter.requires_grad == (kind != "frozen"),
                f"{kind}: a parameter has requires_grad={parameter.requires_grad}",
            )
    require(bool(sorted_parameters(Tied(), [])["frozen"]) is False, "nothing is frozen")


def new_run(seed: int) -> SimpleNamespace:
    """A run at its first step."""
    model = small_model(seed)
    return SimpleNamespace(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.1),
        step=0,
        generator=torch.Generator().manual_seed(seed),
    )


def go_on(run: SimpleNamespace, steps: int) -> None:
    """Train for a while; data come from the generator, the rate from the step."""
    for _ in range(steps):
        data = torch.randn(5, 4, generator=run.generator, dtype=torch.float64)
        run.optimizer.param_groups[0]["lr"] = 0.1 / (1 + run.step)
        run.optimizer.zero_grad()
        squares(run.model, data).backward()
        run.optimizer.step()
        run.step += 1


def weights(run: SimpleNamespace) -> torch.Tensor:
    """All of its weights in one row, a copy."""
    return torch.cat([p.detach().flatten() for p in run.model.parameters()]).clone()


@exercise("16.5")
def a_run_goes_on_where_it_was(pair):
    """puts a run where the other one was, so that both go on alike"""
    take, put = pair
    run, other = new_run(1), new_run(2)
    go_on(run, 3)
    go_on(other, 1)
    put(other, take(run))
    require(other.step == 3, f"expected step 3, got {other.step}")
    go_on(run, 3)
    go_on(other, 3)
    gap = (weights(run) - weights(other)).abs().max().item()
    require(gap == 0, f"three steps later weights differ by {gap:.2g}")


@exercise("16.5")
def what_was_taken_stays(pair):
    """takes a copy: the run goes on, and what was taken does not"""
    take, put = pair
    run = new_run(3)
    go_on(run, 2)
    then, taken = weights(run), take(run)
    go_on(run, 2)
    later = weights(run)
    for _ in range(2):
        put(run, taken)
        require(torch.equal(weights(run), then), "the weights taken have moved on")
        go_on(run, 2)
        require(torch.equal(weights(run), later), "the second time, it went elsewhere")
