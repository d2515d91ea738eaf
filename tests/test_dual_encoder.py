"""The tiny dual encoder trains, repeats itself, and takes any contrastive loss."""

import pytest
import torch
import torch.nn.functional as F

from pgcore.lab.dual_encoder import (
    DualEncoder,
    draw_batch,
    split_into_patches,
    split_into_words,
    train_dual_encoder,
    vocabulary_of,
)
from pgcore.lab.emoji import load_emoji

CONCEPTS = ("cat", "red apple", "rocket", "guitar", "green apple", "man's shoe")


def loss_fn(images, texts, log_scale):
    logits = log_scale.exp() * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    pairs = torch.arange(len(logits))
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


@pytest.fixture(scope="module")
def sprites():
    return load_emoji(concepts=CONCEPTS)


def train(sprites, loss_fn=loss_fn, **options):
    defaults = {"scalars": {"log_scale": 2.0}, "steps": 25, "batch_size": 6}
    return train_dual_encoder(loss_fn, sprites, **(defaults | options))


def test_training_lowers_the_loss(sprites):
    run = train(sprites, steps=40)
    assert len(run.losses) == 40
    assert sum(run.losses[-5:]) < 0.7 * sum(run.losses[:5])
    assert run.scalars["log_scale"] != 2.0
    assert not any(weight.requires_grad for weight in run.model.parameters())


def test_the_same_seed_is_the_same_run(sprites):
    first, second, other = (train(sprites, steps=6, seed=s) for s in (3, 3, 4))
    assert first.losses == second.losses != other.losses
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_callers_random_numbers_are_left_alone(sprites):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    train(sprites, steps=2)
    assert torch.equal(torch.rand(3), expected)


def test_a_ceiling_holds_after_every_step(sprites):
    seen = []

    def recording(images, texts, log_scale):
        seen.append(log_scale.item())
        return loss_fn(images, texts, log_scale)

    run = train(sprites, recording, ceilings={"log_scale": 1.0})
    assert seen[0] == 2.0 and max(seen[1:]) <= 1.0
    assert run.scalars["log_scale"] <= 1.0


def test_a_loss_may_have_several_scalars(sprites):
    def sigmoid_loss(images, texts, log_scale, bias):
        logits = log_scale.exp() * F.normalize(images) @ F.normalize(texts).T + bias
        return -F.logsigmoid((2 * torch.eye(len(logits)) - 1) * logits).sum() / 6

    run = train(sprites, sigmoid_loss, scalars={"log_scale": 1.0, "bias": -2.0})
    assert set(run.scalars) == {"log_scale", "bias"}
    assert run.scalars["bias"] != -2.0
    assert run.losses[-1] < run.losses[0]


def test_watch_sees_the_model_before_and_during(sprites):
    run = train(sprites, watch=lambda model: 1.5, watch_every=10)
    assert run.watched == [(0, 1.5), (10, 1.5), (20, 1.5)]


def test_a_batch_holds_no_concept_twice(sprites):
    generator = torch.Generator().manual_seed(0)
    styles = set()
    for _ in range(20):
        rows = draw_batch(sprites.labels, 4, generator)
        assert len(set(sprites.labels[rows].tolist())) == 4
        styles |= {sprites.styles[row] for row in rows.tolist()}
    assert styles == set(sprites.styles)


def test_too_large_a_batch_is_a_value_error(sprites):
    with pytest.raises(ValueError, match="at most 6 of these sprites; got 7"):
        train(sprites, batch_size=7)


def test_words():
    assert split_into_words("Man's shoe, t-shirt 2") == [
        "man's",
        "shoe",
        "t-shirt",
        "2",
    ]
    assert vocabulary_of(["red apple", "Green apple"]) == ("apple", "green", "red")


def test_an_unknown_word_is_a_value_error():
    model = DualEncoder(vocabulary_of(CONCEPTS))
    with pytest.raises(ValueError, match="text 'blue cat': .*got .'blue'."):
        model.encode_texts(["cat", "blue cat"])
    with pytest.raises(ValueError, match="expected known words, got none"):
        model.encode_texts(["!"])


def test_a_caption_is_the_mean_of_its_words():
    encode = DualEncoder(vocabulary_of(CONCEPTS)).encode_texts
    both, red, apple, swapped = encode(["red apple", "red", "apple", "apple red"])
    torch.testing.assert_close(both, (red + apple) / 2)
    torch.testing.assert_close(both, swapped)


def test_patches_are_squares_in_reading_order():
    images = torch.rand(2, 3, 32, 32)
    patches = split_into_patches(images)
    assert patches.shape == (2, 16, 192)
    square = 2 * images[1, :, 8:16, 16:24] - 1  # row 1, column 2 of a 4 by 4 grid
    torch.testing.assert_close(patches[1, 6], square.flatten())
