"""What the tests of recipes share: a run that is stopped, and what is left of it."""

import pytest
import torch


class Stopped(Exception):
    """Somebody pulled the plug."""


def stop_in_the_fourth_step(recipe, train) -> None:
    """Call ``train`` of a recipe's module, whose ``loss_of`` fails the fourth time."""
    loss_of, calls = recipe.loss_of, []

    def stops(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise Stopped
        return loss_of(*arguments)

    recipe.loss_of = stops
    try:
        with pytest.raises(Stopped):
            train()
    finally:
        recipe.loss_of = loss_of


def same(one, other) -> bool:
    """Whether two dicts of tensors are equal to the bit."""
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) for name in one
    )
