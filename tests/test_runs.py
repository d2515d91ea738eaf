"""A batch drawn ahead is the batch itself."""

import os
from functools import partial

import pytest
import torch

from pgcore.runs import Ahead


def drawn(factor, step):
    if step == 7:
        raise ValueError("step 7 cannot be drawn")
    return {"step": torch.tensor(factor * step), "by": os.getpid()}


def test_each_batch_is_that_of_its_step_and_drawn_elsewhere():
    ahead = Ahead(partial(drawn, 3), steps=6)
    batches = [ahead(step) for step in range(6)]
    assert [batch["step"].item() for batch in batches] == [0, 3, 6, 9, 12, 15]
    assert {batch["by"] for batch in batches}.isdisjoint({os.getpid()})


def test_it_begins_anew_where_it_is_asked_to():
    ahead = Ahead(partial(drawn, 1), steps=6)
    order = [4, 5, 2, 3, 3, 0]
    assert [ahead(step)["step"].item() for step in order] == order


def test_a_batch_that_cannot_be_drawn_says_why():
    ahead = Ahead(partial(drawn, 1), steps=9)
    assert ahead(6)["step"].item() == 6
    with pytest.raises(ValueError, match="step 7 cannot be drawn") as caught:
        ahead(7)
    assert str(caught.value) == "step 7 cannot be drawn"  # and no traceback


def test_behind_the_last_step_there_is_none():
    ahead = Ahead(partial(drawn, 1), steps=2)
    with pytest.raises(ValueError, match="step 2: expected 0 to 1"):
        ahead(2)


def test_drawing_ahead_leaves_the_generator_of_the_loss_alone():
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    Ahead(partial(drawn, 1), steps=6)(0)
    assert torch.equal(torch.rand(()), expected)
