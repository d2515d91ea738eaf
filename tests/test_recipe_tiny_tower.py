"""The recipe of the tower: what it asks of each patch, and how it goes on."""

from functools import partial

import numpy as np
import pytest
import torch

from pgcore.lab.emoji import TEST_STYLE, TRAIN_STYLES, VALIDATION_STYLE
from pgcore.lab.pretrained import load_emoji_siglip
from pgcore.lab.scenes import compose, images_of, split
from pgcore.lab.tiny_world import CONCEPTS, SCENES
from pgcore.recipes import tiny_tower
from pgcore.recipes.tiny_tower import (
    PatchReader,
    Recipe,
    batch_at,
    batch_of,
    loss_of,
    measure,
    train,
)
from tests.stopped_runs import same, stop_in_the_fourth_step

SMALL = Recipe(steps=4, decay=2, pictures=2)


@pytest.mark.parametrize("index", range(6))
def test_answers_are_those_that_loops_find(index):
    scene = compose(*split("validation", SCENES), index)
    batch = batch_of([scene], images_of([scene]))
    for patch in range(64):
        top, left = 12 * (patch // 8), 12 * (patch % 8)
        window = slice(top, top + 12), slice(left, left + 12)
        sizes = [int(one.mask[window].sum()) for one in scene.objects]
        if max(sizes) < 36:
            assert batch["names"][0, patch] == 0
            continue
        one = scene.objects[int(np.argmax(sizes))]
        assert CONCEPTS[batch["names"][0, patch] - 1] == one.concept
        found = batch["edges"][0, patch] * 96 + torch.tensor([top, left] * 2) + 6
        torch.testing.assert_close(found, torch.tensor(one.box).float())
        pixels = batch["pixels"][0, patch].view(12, 12).numpy()
        assert (pixels == one.mask[window]).all()


def test_a_batch_depends_on_its_step_alone():
    batch = batch_at(SMALL, 3)
    assert same(batch, batch_at(SMALL, 3))
    assert not torch.equal(batch["pictures"], batch_at(SMALL, 2)["pictures"])
    assert batch["pictures"].abs().max() <= 1


def test_the_recipe_never_draws_what_it_is_tested_on():
    assert tiny_tower.TRAIN.styles == TRAIN_STYLES
    assert not {TEST_STYLE, VALIDATION_STYLE} & set(tiny_tower.TRAIN.styles)


class Knows(torch.nn.Module):
    """Answers as told."""

    def __init__(self, batch, *, shift=0.0, sure=30.0):
        super().__init__()
        names = torch.nn.functional.one_hot(batch["names"], 1 + len(CONCEPTS))
        pixels = 2 * batch["pixels"].float() - 1
        self.answers = names * sure, batch["edges"] + shift, pixels * sure

    def forward(self, pictures):
        return self.answers


def test_who_knows_all_has_no_loss_and_all_figures_right():
    batch = batch_at(SMALL, 0)
    assert loss_of(Knows(batch), batch) < 1e-6
    found = measure(Knows(batch), batch)
    assert found == {"things": 1, "nothing": 1, "edges": 0, "pixels": 1}


def test_what_is_wrong_costs_by_its_kind():
    batch = batch_at(SMALL, 0)
    shifted = Knows(batch, shift=0.1)
    assert loss_of(shifted, batch).item() == pytest.approx(0.5, abs=1e-5)
    assert measure(shifted, batch)["edges"] == pytest.approx(0.1, abs=1e-6)
    guessed = loss_of(Knows(batch, sure=0.0), batch).item()
    assert guessed == pytest.approx(np.log(1 + len(CONCEPTS)) + np.log(2), abs=1e-4)


def test_a_few_steps_lower_the_loss_and_the_tower_learns_too():
    torch.manual_seed(0)
    tower = load_emoji_siglip()[0].vision.requires_grad_(True)
    before = tower.patch_embedding.conv.weight.detach().clone()
    model, batch = PatchReader(tower), batch_at(SMALL, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(loss_of(model, batch))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert not torch.equal(before, tower.patch_embedding.conv.weight)


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_tower, "EVERY", 2)
    monkeypatch.setattr(tiny_tower, "WATCHED", 2)
    whole = train(SMALL, tmp_path / "whole", "cpu")

    stop_in_the_fourth_step(
        tiny_tower, partial(train, SMALL, tmp_path / "parts", "cpu")
    )
    parts = train(SMALL, tmp_path / "parts", "cpu")
    assert same(whole.state_dict(), parts.state_dict())
    lines = (tmp_path / "whole" / "metrics.csv").read_text()
    assert lines == (tmp_path / "parts" / "metrics.csv").read_text()
