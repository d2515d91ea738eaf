"""The tiny dual encoder trains, repeats itself, and takes any contrastive loss."""

import math

import pytest
import torch
import torch.nn.functional as F

from pgcore.lab.dual_encoder import (
    SPRITE_SCALE,
    DualEncoder,
    draw_batch,
    split_into_patches,
    split_into_words,
    train_dual_encoder,
    vocabulary_of,
    warmup_then_cosine,
)
from pgcore.lab.emoji import load_emoji, place

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


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_half_wave():
    factor = warmup_then_cosine(200)
    assert factor(0) == 1 / 20
    assert factor(9) == pytest.approx(0.5 * (1 + math.cos(0.045 * math.pi)) / 2)
    assert factor(19) == pytest.approx((1 + math.cos(0.095 * math.pi)) / 2)
    assert factor(100) == pytest.approx(0.5)
    assert factor(200) == 0.01


def test_a_scalar_without_gradient_stays(sprites):
    """Weight decay would pull it towards zero."""

    def ignoring(images, texts, log_scale):
        return loss_fn(images, texts, torch.tensor(2.0)) + 0 * log_scale

    assert train(sprites, ignoring).scalars["log_scale"] == 2.0


def test_without_gradients_the_weights_decay(sprites):
    def flat(images, texts, log_scale):
        return 0 * (images.sum() + texts.sum() + log_scale)

    run = train(sprites, flat, steps=3, learning_rate=0.5, seed=1)
    factor = math.prod(1 - 0.5 * 0.05 * warmup_then_cosine(3)(k) for k in range(3))
    torch.manual_seed(1)
    before = DualEncoder(vocabulary_of(sprites.concepts))
    for old, new in zip(before.parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(new, factor * old)


def test_every_step_places_the_pictures_anew(sprites):
    """One picture and no learning: only the placement can change its vector."""
    seen = []

    def recording(images, texts, log_scale):
        seen.append(images.detach())
        return loss_fn(images, texts, log_scale)

    cat = sprites.select(sprites.labels == 0)
    one = cat.select(torch.tensor([0]))
    train(one, recording, batch_size=1, steps=5, learning_rate=0.0)
    for step, vector in enumerate(seen):
        assert not any(torch.equal(vector, other) for other in seen[:step])


def test_three_steps_agree_with_a_loop_by_hand(sprites):
    """AdamW from its formulas, the gradients fresh in every step."""
    steps, seed, rate, betas = 3, 7, 3e-3, (0.9, 0.95)
    torch.manual_seed(seed)
    model = DualEncoder(vocabulary_of(sprites.concepts))
    scale = torch.tensor(2.0, requires_grad=True)
    weights = [*model.parameters(), scale]
    decays = [0.05] * (len(weights) - 1) + [0.0]
    means = [[torch.zeros_like(w), torch.zeros_like(w)] for w in weights]
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        batch = sprites.select(draw_batch(sprites.labels, 6, generator))
        batch = place(batch, seed=seed + step + 1, size=32, scale=SPRITE_SCALE)
        names = [batch.concepts[label] for label in batch.labels]
        loss = loss_fn(
            model.encode_images(batch.images), model.encode_texts(names), scale
        )
        gradients = torch.autograd.grad(loss, weights)
        step_rate = rate * warmup_then_cosine(steps)(step)
        with torch.no_grad():
            for w, g, decay, (first, second) in zip(
                weights, gradients, decays, means, strict=True
            ):
                w.mul_(1 - step_rate * decay)
                first.lerp_(g, 1 - betas[0])
                second.lerp_(g.square(), 1 - betas[1])
                mean = first / (1 - betas[0] ** (step + 1))
                spread = (second / (1 - betas[1] ** (step + 1))).sqrt()
                w.sub_(step_rate * mean / (spread + 1e-8))
        losses.append(loss.item())
    run = train(sprites, steps=steps, seed=seed)
    assert run.losses == pytest.approx(losses, rel=1e-4)
    assert run.scalars["log_scale"].item() == pytest.approx(scale.item(), rel=1e-6)


def test_the_pictures_second_network_sees_normalised_patches():
    read = DualEncoder(vocabulary_of(CONCEPTS)).encode_images.picture
    patches = torch.randn(2, 16 * 128)
    torch.testing.assert_close(
        read(3 * patches + 5), read(patches), rtol=1e-4, atol=1e-4
    )


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
