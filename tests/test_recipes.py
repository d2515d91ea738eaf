"""The recipe of the emoji SigLIP, and the weights that it left."""

import dataclasses
from functools import partial

import pytest
import torch

from pgcore.lab.emoji import TEST_STYLE, UNSEEN_CONCEPTS
from pgcore.lab.pretrained import (
    FOLDER,
    emoji_siglip_log,
    load_emoji_siglip,
    save_emoji_siglip,
)
from pgcore.lab.words import emoji_words
from pgcore.recipes import _watch, emoji_siglip
from pgcore.recipes._pictures import augment
from pgcore.recipes._run import Run
from pgcore.recipes.emoji_siglip import (
    SCENES,
    Recipe,
    batch_at,
    learning_rate_at,
    main,
    sincos_positions,
    train,
)

SMALL = Recipe(steps=4, batch_size=8, easy=1, alone=6, warmup=2)


@pytest.fixture(autouse=True)
def _save_every_other_step(monkeypatch):
    monkeypatch.setattr(emoji_siglip, "EVERY", 2)
    monkeypatch.setattr(_watch, "WATCHED", _watch.WATCHED[:6])


def weights_of(model):
    return {name: w.clone() for name, w in model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_batch_depends_on_its_step_alone():
    words = emoji_words()
    pictures, ids = batch_at(SMALL, words, 3)
    again, same_ids = batch_at(SMALL, words, 3)
    other, _ = batch_at(SMALL, words, 4)
    assert torch.equal(pictures, again) and torch.equal(ids, same_ids)
    assert not torch.equal(pictures, other)
    assert pictures.shape == (8, 3, 96, 96) and ids.shape == (8, 16)
    assert pictures.min() >= -1 and pictures.max() <= 1


def test_the_recipe_never_draws_what_it_is_tested_on():
    assert TEST_STYLE not in SCENES.styles
    assert not set(UNSEEN_CONCEPTS) & set(SCENES.concepts)
    assert not set(UNSEEN_CONCEPTS) & set(_watch.WATCHED)


def test_the_learning_rate_rises_stays_and_falls():
    recipe = Recipe(steps=1000, warmup=100, decay=0.25, learning_rate=2.0)
    rates = [learning_rate_at(recipe, step) for step in (0, 49, 99, 500, 750, 875)]
    assert rates == [0.02, 1.0, 2.0, 2.0, 2.0, 1.0]
    assert learning_rate_at(recipe, 1000) == 0


def test_positions_differ_and_are_as_large_as_the_patches():
    table = sincos_positions(8, 192)
    assert table.shape == (64, 192)
    assert torch.allclose(table.square().sum(1), torch.tensor(96.0))
    assert torch.cdist(table, table).fill_diagonal_(9).min() > 1


def test_augmenting_keeps_the_range_and_changes_each_picture_its_own_way():
    pictures = torch.rand(1, 3, 24, 24).expand(4, -1, -1, -1)
    out = augment(pictures, torch.Generator().manual_seed(0))
    assert out.min() >= 0 and out.max() <= 1
    assert len({tuple(one.flatten().tolist()) for one in out}) == 4


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, monkeypatch):
    whole, _, whole_log = train(SMALL, tmp_path / "whole", "cpu")
    step, killed = Run.train_one_step, tmp_path / "killed"

    def stop_in_the_fourth(run):
        if run.step == 3:
            raise KeyboardInterrupt
        return step(run)

    monkeypatch.setattr(Run, "train_one_step", stop_in_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        train(SMALL, killed, "cpu")
    monkeypatch.setattr(Run, "train_one_step", step)
    resumed, _, resumed_log = train(SMALL, killed, "cpu")
    assert_same(weights_of(whole), weights_of(resumed))
    assert whole_log["steps"] == resumed_log["steps"]
    assert whole_log["film"] == resumed_log["film"]


def test_a_state_of_another_recipe_is_refused(tmp_path):
    train(dataclasses.replace(SMALL, steps=2), tmp_path, "cpu")
    with pytest.raises(ValueError, match="another recipe"):
        train(dataclasses.replace(SMALL, steps=2, seed=1), tmp_path, "cpu")


def test_a_half_written_state_is_never_read(tmp_path):
    train(dataclasses.replace(SMALL, steps=2), tmp_path, "cpu")
    (tmp_path / ".state.pt.pgcore-partial").write_bytes(b"cut off by kill -9")
    train(dataclasses.replace(SMALL, steps=2), tmp_path, "cpu")


def test_the_command_trains_and_writes_what_ships(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(emoji_siglip, "Recipe", partial(Recipe, batch_size=8, alone=6))
    main(["--out", str(tmp_path), "--steps", "4"])
    out = capsys.readouterr().out
    assert "step 4 of 4" in out and "min left" in out
    model, words = load_emoji_siglip(tmp_path / "shipped")
    assert len(words) == model.text.config.vocab_size
    assert emoji_siglip_log(tmp_path / "shipped")["steps"][-1]["step"] == 4


def test_weights_come_back_as_they_were_saved(tmp_path):
    words = emoji_words()
    model = emoji_siglip.build(SMALL, words, "cpu").model
    save_emoji_siglip(tmp_path, model, words, {"steps": []})
    loaded, loaded_words = load_emoji_siglip(tmp_path)
    assert loaded_words.vocabulary == words.vocabulary
    expected = {name: w.half().float() for name, w in model.state_dict().items()}
    assert_same(loaded.state_dict(), expected)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors"):
        load_emoji_siglip(tmp_path)


def test_what_ships_is_small_and_fits_this_code():
    model, words = load_emoji_siglip()
    assert words.vocabulary == emoji_words().vocabulary
    assert model.text.config == Recipe().text
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 8_000_000
    assert emoji_siglip_log()["steps"][-1]["step"] == Recipe.steps
