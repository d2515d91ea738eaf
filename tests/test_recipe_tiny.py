"""The recipe of the tiny model: what it draws, how it starts, how it goes on."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

from pgcore.api import load
from pgcore.lab import scene_language
from pgcore.lab.emoji import TEST_STYLE, TRAIN_STYLES, VALIDATION_STYLE
from pgcore.lab.pretrained import load_emoji_siglip
from pgcore.lab.scene_language import choose_examples
from pgcore.lab.scenes import compose_batch, split
from pgcore.lab.tiny_world import SCENES
from pgcore.processing import IGNORE, load_processor
from pgcore.recipes import tiny, tiny_tower
from pgcore.recipes.tiny import LEVELS, Recipe, batch_at, build, train
from pgcore.recipes.tiny_tokenizer import FOLDER
from pgcore.training import Trainer
from tests.stopped_runs import same, stop_in_the_fourth_step

TOWER = tiny_tower.Recipe(steps=2, decay=1, pictures=2)
SMALL = Recipe(
    tower=TOWER, steps=6, easy=2, hard=4, alone=2, decay=3, pictures=2
)  # fmt: skip
PROCESSOR = load_processor(FOLDER)


def codes(mask):
    return [int(1000 * np.asarray(mask).mean()) % 128] * 16


@pytest.mark.parametrize("step", [0, 3, 5])
def test_a_batch_depends_on_its_step_alone(step):
    batch = batch_at(SMALL, PROCESSOR, codes, step)
    assert same(batch, batch_at(SMALL, PROCESSOR, codes, step))
    other = batch_at(SMALL, PROCESSOR, codes, (step + 1) % 6)
    assert not torch.equal(batch["pixel_values"], other["pixel_values"])
    assert batch["pixel_values"].abs().max() <= 1


def test_another_seed_draws_other_pictures():
    other = dataclasses.replace(SMALL, seed=1)
    one, two = (batch_at(recipe, PROCESSOR, codes, 0) for recipe in (SMALL, other))
    assert not torch.equal(one["pixel_values"], two["pixel_values"])


def test_the_recipe_never_draws_what_it_is_tested_on():
    for settings in LEVELS.values():
        assert settings.styles == TRAIN_STYLES
        assert TEST_STYLE not in settings.styles
        assert VALIDATION_STYLE not in settings.styles


def test_the_last_steps_ask_one_question_a_row():
    packed, alone = (batch_at(SMALL, PROCESSOR, codes, step) for step in (3, 4))
    assert packed["question"].max() > 2
    assert "question" not in alone
    edges = (alone["labels"] != IGNORE).diff(dim=1).sum(dim=1)
    assert (edges <= 2).all()  # one answer begins and ends, and none comes behind it
    padding = alone["input_ids"] == PROCESSOR.id_of("<pad>")
    assert padding.any() and torch.equal(alone["attention_mask"], ~padding)


def test_the_first_steps_ask_what_is_easy(monkeypatch):
    kinds = []

    def chosen(scene, number, own, **how):
        kinds.append(set(own))
        return choose_examples(scene, number, own, **how)

    monkeypatch.setattr(tiny, "choose_examples", chosen)
    for step in (0, 2):
        batch_at(SMALL, PROCESSOR, codes, step)
    easy, later = kinds[: SMALL.pictures], kinds[SMALL.pictures :]
    assert all(own == {"caption", "presence", "region", "detect"} for own in easy)
    assert all(own == {*scene_language.KINDS} for own in later)


def test_captions_are_mostly_english_but_not_all():
    scenes = compose_batch(*split("train", SCENES), 0, 60)
    asked = tiny.asked_about(scenes, 1, ("caption",), 0, codes)
    languages = [prompt.split()[-1] for [(prompt, _)] in asked]
    assert set(languages) == {"en", "de", "fr", "es"}
    assert 0.6 < languages.count("en") / 60 < 0.95


def test_pictures_come_in_another_light(monkeypatch):
    shown = batch_at(SMALL, PROCESSOR, codes, 3)["pixel_values"]
    monkeypatch.setattr(tiny_tower, "tinted", lambda pictures, generator: pictures)
    plain = batch_at(SMALL, PROCESSOR, codes, 3)["pixel_values"]
    assert 0.01 < (shown - plain).abs().mean() < 0.2


def test_it_starts_with_the_tower_and_places_like_their_neighbours():
    tower = load_emoji_siglip()[0].vision
    model = build(SMALL, PROCESSOR, tower)
    assert same(model.vision.state_dict(), tower.state_dict())
    table = model.language.embed_tokens.weight.detach()
    first = PROCESSOR.id_of("<loc0000>")
    places = torch.nn.functional.normalize(table[first : first + 1024], dim=1)
    near = (places[:-1] * places[1:]).sum(1).mean()
    far = (places[:-300] * places[300:]).sum(1).mean()
    assert near > 0.9 and abs(far) < 0.3
    words = table[300:1900].std()
    assert table[first : first + 1024].std() == pytest.approx(words.item(), rel=0.2)


def test_the_rate_rises_falls_and_ends_at_zero():
    recipe = Recipe()
    shares = [
        tiny.learning_rate_share(recipe.steps, recipe.decay, n)
        for n in range(recipe.steps)
    ]
    assert shares[0] < 0.02 and max(shares) == pytest.approx(1, abs=0.01)
    assert shares[-1] < 0.001
    assert all(a >= b for a, b in zip(shares[100:], shares[101:], strict=False))


def test_a_run_of_another_length_has_the_same_parts():
    assert Recipe(**tiny.lengths(Recipe.steps)) == Recipe()
    assert tiny_tower.in_steps(5000, 0) == tiny_tower.Recipe()
    short = Recipe(**tiny.lengths(1000))
    assert (short.easy, short.hard, short.alone, short.decay) == (30, 150, 100, 300)
    assert tiny_tower.in_steps(50, 3) == tiny_tower.Recipe(steps=50, decay=20, seed=3)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"steps": 1000}, "steps: expected at least hard"),
        ({"steps": 0}, "steps: expected 1 or more, found 0"),
        ({"seed": -1}, "seed: expected 0 or more, found -1"),
        ({"decay": 0}, "decay: expected 1 to 10000 steps, found 0"),
        ({"easy": 2000}, "easy to come first"),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is(wrong, words):
    with pytest.raises(ValueError, match=words):
        Recipe(**wrong)
    for wrong in ({"steps": 0}, {"seed": -1}, {"decay": 6000}):
        with pytest.raises(ValueError, match="expected"):
            tiny_tower.Recipe(**wrong)


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "EVERY", 2)
    monkeypatch.setattr(tiny, "WATCHED", 1)
    monkeypatch.setattr(tiny_tower, "WATCHED", 2)
    whole = train(SMALL, tmp_path / "whole", "cpu")

    stop_in_the_fourth_step(tiny, partial(train, SMALL, tmp_path / "parts", "cpu"))
    parts = train(SMALL, tmp_path / "parts", "cpu")
    assert same(whole.state_dict(), parts.state_dict())
    lines = (tmp_path / "whole" / "mixture" / "metrics.csv").read_text()
    assert lines == (tmp_path / "parts" / "mixture" / "metrics.csv").read_text()


def test_what_ships_is_half_as_large_and_comes_with_its_figures(tmp_path, monkeypatch):
    model = build(SMALL, PROCESSOR, load_emoji_siglip()[0].vision)

    def trained(recipe, out, device):
        for stage in tiny.STAGES:
            (out / stage).mkdir(parents=True, exist_ok=True)
            (out / stage / "metrics.csv").write_text(f"step\n{stage}\n")
        return model

    monkeypatch.setattr(tiny, "train", trained)
    shipped = tmp_path / "ship"
    shipped.mkdir()
    (shipped / "README.md").write_text("a card")
    options = ["--out", str(tmp_path), "--steps", "6", "--tower-steps", "2"]
    tiny.main(options)
    tiny.main([*options, "--ship", str(shipped)])  # once more, and beside other files
    assert (shipped / "README.md").read_text() == "a card"
    weights = "model.safetensors"
    own = tmp_path / "shipped" / weights
    assert own.read_bytes() == (shipped / weights).read_bytes()
    assert (shipped / "mixture.csv").read_text() == "step\nmixture\n"
    assert (shipped / "tower.csv").read_text() == "step\ntower\n"
    again, _ = load(shipped, device="cpu", dtype="auto")
    close = dict(again.named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(close[name], weight.half().float())


@pytest.fixture
def rates(monkeypatch):
    """Learning rates of tower and decoder, step by step."""
    monkeypatch.setattr(tiny, "WATCHED", 1)
    rates = []

    class Watched(Trainer):
        def train_step(self):
            found = super().train_step()
            rates.append({g["part"]: g["lr"] for g in self.optimizer.param_groups})
            return found

    monkeypatch.setattr(tiny, "Trainer", Watched)
    return rates


def test_a_tower_that_sees_learns_slowly(tmp_path, monkeypatch, rates):
    tower = load_emoji_siglip()[0].vision.requires_grad_(True)
    monkeypatch.setattr(tiny_tower, "train", lambda *_: tower)
    recipe = dataclasses.replace(Recipe(), **tiny.lengths(1))
    train(recipe, tmp_path, "cpu")
    (rate,) = rates
    assert rate[0] * 400 == pytest.approx(0.2 * rate[1])  # the first of 400 steps


def test_a_blank_tower_learns_as_fast_as_the_decoder(tmp_path, monkeypatch, rates):
    monkeypatch.setattr(tiny_tower, "train", None)  # is not called
    options = ["--out", str(tmp_path), "--blank", "--steps"]
    shipped = tmp_path / "ship"
    tiny.main([*options, "1", "--ship", str(shipped)])
    assert (shipped / "mixture.csv").exists() and not (shipped / "tower.csv").exists()
    (rate,) = rates
    assert rate[0] * 400 == pytest.approx(rate[1])


def test_a_blank_tower_is_drawn_from_its_seed():
    one, again, other = (tiny.unseeing_tower(seed).state_dict() for seed in (0, 0, 1))
    assert same(one, again)
    for name, weight in one.items():
        drawn = weight.ndim > 1 and name != "positions"
        assert torch.equal(weight, other[name]) != drawn, name
    seen = load_emoji_siglip()[0].vision.state_dict()
    assert not torch.equal(one["positions"], seen["positions"])
    assert one["positions"].pow(2).mean() == pytest.approx(0.5)  # waves
