"""Chapter 16: training against torch, loops and hand-computed values, and its twins."""

import ast
import csv
import io
import math
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from chapter import ROOT
from export import imported_modules
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from pgcore import runs
from pgcore.attention import Attention, attend
from pgcore.gemma import GemmaConfig
from pgcore.lab.museum import training as museum
from pgcore.paligemma import PaliGemma, PaliGemmaConfig, suffix_loss
from pgcore.processing import IGNORE, Processor, train_tokenizer
from pgcore.runs import Progress, RunFolder, fit
from pgcore.training import (
    Mixture,
    Part,
    Trainer,
    TrainingConfig,
    attend_by_matmul,
    batch_loss,
    cosine,
    pack,
    packed_loss,
    packed_mask,
    parameter_groups,
    rsqrt,
)
from pgcore.vision import VisionConfig
from tests.draws import assert_close, draw_heads, draw_mask, fan_in
from tests.reference.training import packed_loss_by_loops

TOLERANCE = 5e-6
PROMPTS = ["caption en", "answer en what color is it?", "detect red circle"]
SUFFIXES = ["a red circle", "red", "<loc0000><loc0256><loc0512><loc1023> red circle"]
PROCESSOR = Processor(
    train_tokenizer([*PROMPTS, *SUFFIXES, "\n"] * 9, vocab_size=330),
    image_size=14,
    num_image_tokens=4,
)
# No two sizes equal by chance; head_dim is not width / num_heads.
CONFIG = PaliGemmaConfig(
    vision=VisionConfig(
        width=24,
        depth=2,
        mlp_dim=44,
        num_heads=2,
        head_dim=12,
        patch_size=7,
        image_size=14,
    ),
    text=GemmaConfig(
        width=40,
        depth=2,
        mlp_dim=72,
        num_heads=4,
        num_kv_heads=2,
        head_dim=12,
        vocab_size=PROCESSOR.tokenizer.get_vocab_size(),
    ),
    image_token=PROCESSOR.id_of("<image>"),
)


def new_model(seed=0):
    return fan_in(PaliGemma(CONFIG), seed)


def batch_at(step, rows=4, seed=0):
    """Pictures of noise with questions of different lengths, from n alone."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    kinds = torch.randint(3, (rows,), generator=generator).tolist()
    noise = torch.randint(256, (rows, 14, 14, 3), generator=generator)
    return PROCESSOR(
        [Image.fromarray(one.byte().numpy()) for one in noise],
        [PROMPTS[kind] for kind in kinds],
        [SUFFIXES[kind] for kind in kinds],
    )


def config_of(**changes):
    options = {"steps": 30, "learning_rate": 3e-3, "schedule": lambda step: 1.0}
    return TrainingConfig(**(options | changes))


def new_trainer(config=None, batches=batch_at, loss_of=batch_loss, seed=0, name="run"):
    return Trainer(new_model(seed), config or config_of(), batches, loss_of, name)


def weights_of(model):
    return {name: w.detach().clone() for name, w in model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different


# Schedules


def test_schedules_at_hand_computed_values():
    assert [cosine(n, steps=12, warmup=2) for n in (0, 1)] == [0.5, 1.0]
    found = [cosine(n, steps=12, warmup=2) for n in (2, 7, 12, 400)]
    assert found == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert cosine(2 + 10 // 4, steps=12, warmup=2) == pytest.approx(
        0.5 + 0.5 * math.cos(math.pi * 0.2)
    )
    assert [rsqrt(n, warmup=4, timescale=10) for n in range(4)] == [
        0.25,
        0.5,
        0.75,
        1.0,
    ]
    found = [rsqrt(4 + n, warmup=4, timescale=10) for n in (0, 30, 90)]
    assert found == pytest.approx([1.0, 0.5, 1 / math.sqrt(10)])


@given(st.integers(1, 200), st.integers(0, 50), st.integers(1, 50))
def test_schedules_rise_once_and_then_never(steps, warmup, timescale):
    for share in (
        partial(cosine, steps=steps, warmup=warmup),
        partial(rsqrt, warmup=warmup, timescale=timescale),
    ):
        values = [share(n) for n in range(2 * (steps + warmup))]
        assert all(0 <= value <= 1 for value in values)
        assert values[:warmup] == sorted(values[:warmup])
        rest = values[max(0, warmup - 1) :]
        assert rest == sorted(rest, reverse=True)


def test_the_cosine_is_that_of_torch():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=17)
    for step in range(17):
        expected = optimizer.param_groups[0]["lr"]
        assert cosine(step, steps=17, warmup=0) == pytest.approx(expected, abs=1e-9)
        optimizer.step()
        scheduler.step()


# Groups


PARTS = Part(prefix="vision.", rate=0.2, warmup=10), Part(prefix="language.", rate=0.0)


def test_groups_miss_nothing_and_have_nothing_twice():
    model = new_model()
    groups = parameter_groups(model, PARTS, 0.1)
    found = [id(p) for group in groups for p in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.parameters()}
    where = {id(p): group for group in groups for p in group["params"]}
    for name, weight in model.named_parameters():
        part = {"vision": 0, "language": 1}.get(name.split(".")[0], 2)
        assert where[id(weight)]["part"] == part, name
        decays = weight.ndim >= 2
        assert where[id(weight)]["weight_decay"] == (0.1 if decays else 0.0), name
        assert weight.requires_grad == (part != 1), name
    norms = [n for n, w in model.named_parameters() if "norm" in n and w.ndim < 2]
    assert norms and all(
        where[id(dict(model.named_parameters())[n])]["weight_decay"] == 0 for n in norms
    )


def test_the_first_part_that_fits_has_a_parameter():
    model = new_model()
    parts = Part(prefix="vision.layers.0.", rate=0.5), Part(prefix="vision.")
    groups = parameter_groups(model, parts, 0.0)
    where = {id(p): group["part"] for group in groups for p in group["params"]}
    assert where[id(model.vision.layers[0].mlp.fc1.weight)] == 0
    assert where[id(model.vision.layers[1].mlp.fc1.weight)] == 1
    assert where[id(model.projector.linear.weight)] == 2


def test_what_is_frozen_stays_bit_for_bit_and_the_rest_moves():
    config = config_of(
        steps=3, weight_decay=0.5, parts=(Part(prefix="vision.", rate=0.0),)
    )
    trainer = new_trainer(config)
    before = weights_of(trainer.model)
    for _ in range(3):
        trainer.train_step()
    after = weights_of(trainer.model)
    for name in before:
        same = torch.equal(before[name], after[name])
        assert same == name.startswith("vision."), name


def test_what_comes_frozen_learns_all_the_same():
    model = new_model().requires_grad_(False)
    trainer = Trainer(model, config_of(steps=2, weight_decay=0.0), batch_at)
    before = weights_of(model)
    trainer.train_step()
    trainer.train_step()
    assert not any(torch.equal(before[n], w) for n, w in weights_of(model).items())


def test_the_memory_of_adam_is_that_of_the_config():
    for betas in ((0.9, 0.99), (0.8, 0.95)):
        options = {} if betas == (0.9, 0.99) else {"betas": betas}
        trainer = new_trainer(config_of(**options))
        assert {g["betas"] for g in trainer.optimizer.param_groups} == {betas}


def test_rates_of_parts_rise_in_their_own_time():
    parts = Part(prefix="vision.", rate=0.5, warmup=4), Part(prefix="projector.")
    config = config_of(
        learning_rate=2.0, schedule=lambda n: 1 / (n + 1), parts=parts, steps=9
    )
    trainer = new_trainer(config)
    for step in range(6):
        trainer.step = step
        trainer._set_rates()
        rates = {g["part"]: g["lr"] for g in trainer.optimizer.param_groups}
        shared = 2.0 / (step + 1)
        expected = {0: shared * 0.5 * min(1, (step + 1) / 4), 1: shared, 2: shared}
        assert rates == pytest.approx(expected)


def test_a_part_that_nothing_fits_is_a_value_error():
    with pytest.raises(ValueError, match="part: no parameter's .* 'tower.'"):
        parameter_groups(new_model(), (Part(prefix="tower."),), 0.0)
    shadowed = Part(prefix="vision."), Part(prefix="vision.layers.")
    with pytest.raises(ValueError, match="'vision.layers.'"):
        parameter_groups(new_model(), shadowed, 0.0)


@pytest.mark.parametrize("bad", [{"rate": -1.0}, {"warmup": -1}, {"rate": math.nan}])
def test_a_part_below_zero_is_a_value_error(bad):
    with pytest.raises(ValueError, match="rate, warmup: expected 0 or more, found"):
        Part(prefix="vision.", **bad)


# Mixture


def test_a_mixture_gives_each_task_its_share():
    shares = {"caption": 2.0, "answer": 1.0, "detect": 1.0, "segment": 0.0}
    mixture = Mixture(shares, seed=3)
    drawn = [mixture.task(n) for n in range(4000)]
    for task, share in shares.items():
        expected = share / 4
        spread = 4 * math.sqrt(expected * (1 - expected) / 4000)
        assert abs(drawn.count(task) / 4000 - expected) <= spread
    again, other = Mixture(shares, seed=3), Mixture(shares, seed=4)
    assert [again.task(n) for n in reversed(range(50))] == drawn[:50][::-1]
    assert [other.task(n) for n in range(50)] != drawn[:50]
    assert drawn[:6] == ["answer", "caption", "detect", "answer", "detect", "detect"]


@pytest.mark.parametrize(
    "shares", [{}, {"a": -1.0, "b": 2.0}, {"a": 0.0}, {"a": math.inf}, {"a": math.nan}]
)
def test_shares_that_are_none_are_a_value_error(shares):
    with pytest.raises(ValueError, match="shares: expected 0 or more each, found"):
        Mixture(shares)


# Packing


ASKED = [
    [(PROMPTS[0], SUFFIXES[0]), (PROMPTS[1], SUFFIXES[1]), (PROMPTS[2], SUFFIXES[2])],
    [(PROMPTS[2], SUFFIXES[2]), (PROMPTS[1], "blue")],
]


def packed(length=60, seed=0):
    pixels = torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(seed))
    return pack(PROCESSOR, pixels, ASKED, length)


def test_a_packed_row_holds_the_tokens_of_each_question_alone():
    batch = packed()
    blank = Image.new("RGB", (14, 14))
    for row, asked in enumerate(ASKED):
        assert (batch["question"][row] == 0).sum() == 4
        assert (batch["input_ids"][row, :4] == CONFIG.image_token).all()
        for number, (prompt, suffix) in enumerate(asked, start=1):
            here = batch["question"][row] == number
            alone = PROCESSOR([blank], [prompt], [suffix])
            for name in ("input_ids", "labels", "suffix_mask"):
                assert torch.equal(batch[name][row, here], alone[name][0, 4:]), name
        rest = batch["question"][row] == -1
        assert (batch["input_ids"][row, rest] == PROCESSOR.id_of("<pad>")).all()
        assert (batch["labels"][row, rest] == IGNORE).all()


def test_what_does_not_fit_stays_out():
    full = packed()["question"]
    two = int((full[0] < 3).sum() - (full[0] == -1).sum())
    assert packed(two)["question"][0].max() == 2
    assert packed(two - 1)["question"][0].max() == 1
    first = max(int((row == 0).sum() + (row == 1).sum()) for row in full)
    assert packed(first)["question"].amax(dim=1).tolist() == [1, 1]
    for short in (first - 1, 3):
        with pytest.raises(ValueError, match=f"length: {short} tokens do not hold"):
            packed(short)
    with pytest.raises(ValueError, match="lists of one length, found"):
        pack(PROCESSOR, torch.randn(1, 3, 14, 14), [[]], 60)


def test_a_question_with_a_control_token_is_refused():
    with pytest.raises(ValueError, match="<eos> is the processor's to place"):
        pack(PROCESSOR, torch.randn(1, 3, 14, 14), [[("caption en", "a<eos>")]], 60)


def test_the_packed_mask_in_loops():
    batch = packed()
    question, suffix = batch["question"], batch["suffix_mask"]
    mask = packed_mask(question, suffix)[:, 0]
    for row in range(2):
        for i in range(question.shape[1]):
            for j in range(question.shape[1]):
                mine, yours = question[row, i], question[row, j]
                to_me = yours == 0 or yours == mine
                given_or_past = not suffix[row, j] or j <= i
                expected = yours >= 0 and to_me and given_or_past
                assert mask[row, i, j] == expected, (row, i, j)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_a_packed_loss_is_that_of_each_question_alone(smoothing):
    model, batch = new_model(), packed()
    with torch.no_grad():
        found = packed_loss(model, batch, smoothing)
        pixels = batch["pixel_values"]
        expected = packed_loss_by_loops(model, PROCESSOR, pixels, ASKED, smoothing)
    assert_close(found, expected, TOLERANCE)


def test_no_question_sees_another_and_no_picture_another():
    model, batch = new_model(), packed()
    question = batch["question"]
    for row, number in ((0, 1), (0, 3), (1, 2)):
        only = batch["labels"].masked_fill(question != number, IGNORE)
        only[1 - row] = IGNORE
        x = model.embed(batch["input_ids"], model.encode_images(batch["pixel_values"]))
        x = x.detach().requires_grad_()
        model.embed = lambda ids, images, x=x: x
        packed_loss(model, batch | {"labels": only}).backward()
        del model.embed
        read = (x.grad != 0).any(dim=-1)
        may = torch.zeros_like(read)
        may[row] = (question[row] == 0) | (question[row] == number)
        assert not (read & ~may).any()
        assert read[row, question[row] == 0].all()


def test_padding_and_the_order_of_questions_do_not_matter():
    model, batch = new_model(), packed()
    turned = pack(PROCESSOR, batch["pixel_values"], [a[::-1] for a in ASKED], 77)
    with torch.no_grad():
        assert_close(packed_loss(model, batch), packed_loss(model, turned), TOLERANCE)


# The loss


def test_the_prefix_gets_no_gradient():
    """Exactly 0 on logits of places that predict no label."""
    model, batch = new_model(), batch_at(0)
    plain = {name: v for name, v in batch.items() if name != "labels"}
    logits = model(**plain).logits.detach().requires_grad_()
    predicts = batch["labels"][:, 1:] != IGNORE
    suffix_loss(logits[:, :-1][predicts], batch["labels"]).backward()
    assert (logits.grad[:, :-1][~predicts] == 0).all() and (
        logits.grad[:, -1] == 0
    ).all()
    assert (logits.grad[:, :-1][predicts] != 0).any(dim=-1).all()


def test_label_smoothing_equals_torch():
    model, batch = new_model(), packed()
    with torch.no_grad():
        losses = []
        for asked, pixels in zip(ASKED, batch["pixel_values"], strict=True):
            for pair in asked:
                row = pack(PROCESSOR, pixels[None], [[pair]], 40)
                P = CONFIG.vision.num_patches
                q = row["question"]
                counted = torch.arange(40)[None].expand_as(q)
                hidden = model.language(
                    model.embed(row["input_ids"], model.encode_images(pixels[None])),
                    positions=counted,
                    mask=packed_mask(q, row["suffix_mask"]),
                )
                logits = model.language.logits(hidden)[0, :-1]
                assert P == 4
                losses.append(
                    F.cross_entropy(logits, row["labels"][0, 1:], label_smoothing=0.1)
                )
        assert_close(packed_loss(model, batch, 0.1), sum(losses) / 5, TOLERANCE)


# A step


def gradients_of(model):
    return {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def test_accumulation_equals_one_large_batch():
    large = new_trainer(batches=lambda n: merged(batch_at(2 * n), batch_at(2 * n + 1)))
    small = new_trainer(config_of(accumulate=2))
    for _ in range(2):
        figures = large.train_step(), small.train_step()
        assert figures[0] == pytest.approx(figures[1], rel=2e-5)
    left, right = gradients_of(large.model), gradients_of(small.model)
    for name in left:
        assert_close(left[name], right[name], 5e-5)


def merged(*batches):
    """One batch of all rows, padded on the left to the longest."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    fill = {"input_ids": PROCESSOR.id_of("<pad>"), "labels": IGNORE}
    out = {}
    for name in batches[0]:
        parts = [batch[name] for batch in batches]
        if name != "pixel_values":
            parts = [
                F.pad(p, (longest - p.shape[1], 0), value=fill.get(name, 0))
                for p in parts
            ]
        out[name] = torch.cat(parts)
    return out


def test_a_step_is_that_of_adamw_with_clipping_by_hand():
    config = config_of(
        schedule=lambda n: 0.5, weight_decay=0.3, max_norm=0.7, betas=(0.8, 0.95)
    )
    trainer, model = new_trainer(config), new_model()
    memory = {n: [0.0, 0.0] for n, _ in model.named_parameters()}
    for step in range(1, 4):
        figures = trainer.train_step()
        model.zero_grad()
        model(**batch_at(step - 1)).loss.backward()
        grads = {n: p.grad.double() for n, p in model.named_parameters()}
        length = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        assert figures["gradient"] == pytest.approx(length, rel=1e-4)
        cut = min(1.0, 0.7 / (length + 1e-6))
        rate = 3e-3 * 0.5
        with torch.no_grad():
            for name, weight in model.named_parameters():
                g, m = grads[name] * cut, memory[name]
                m[0] = 0.8 * m[0] + 0.2 * g
                m[1] = 0.95 * m[1] + 0.05 * g**2
                if weight.ndim >= 2:
                    weight.mul_(1 - rate * 0.3)
                mean, square = m[0] / (1 - 0.8**step), m[1] / (1 - 0.95**step)
                weight.sub_((rate * mean / (square.sqrt() + 1e-8)).float())
    for (name, mine), theirs in zip(
        model.named_parameters(), trainer.model.parameters(), strict=True
    ):
        assert (mine - theirs).abs().max() < 3e-5, name


def test_long_gradients_are_cut_to_the_norm_and_short_ones_left():
    for max_norm in (0.01, 1e6):
        trainer = new_trainer(config_of(max_norm=max_norm))
        length = trainer.train_step()["gradient"]
        kept = math.sqrt(
            sum(float((p.grad**2).sum()) for p in trainer.model.parameters())
        )
        assert kept == pytest.approx(min(max_norm, length), rel=1e-4)


def test_bfloat16_multiplies_in_16_bits_and_keeps_weights_in_32():
    seen = []

    def loss_of(model, batch):
        loss = batch_loss(model, batch)
        seen.append((loss.dtype, model.projector(torch.zeros(1, 1, 24)).dtype))
        return loss

    trainer = new_trainer(config_of(bfloat16=True), loss_of=loss_of)
    plain = new_trainer()
    found, expected = trainer.train_step(), plain.train_step()
    assert seen == [(torch.float32, torch.bfloat16)]
    assert found["loss"] == pytest.approx(expected["loss"], rel=2e-2)
    for weight in trainer.model.parameters():
        assert weight.dtype == weight.grad.dtype == torch.float32
    attends = [m.attend for m in trainer.model.modules() if isinstance(m, Attention)]
    assert len(attends) == 4 and all(a is attend_by_matmul for a in attends)
    attends = [m.attend for m in plain.model.modules() if isinstance(m, Attention)]
    assert all(a is attend for a in attends)


def test_bfloat16_leaves_other_ways_to_attend_alone():
    """A Gemma 2 caps its scores; that must not be lost."""
    from dataclasses import replace

    text = replace(CONFIG.text, attention_softcap=2.0)
    model = PaliGemma(replace(CONFIG, text=text))
    Trainer(model, config_of(bfloat16=True), batch_at)
    capped = [layer.self_attn.attend for layer in model.language.layers]
    assert all(isinstance(one, partial) for one in capped)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_as_matrix_products_equals_attend(masked, scale):
    sizes = 2, 6, 2, 5, 7, 4
    left, right = (draw_heads(sizes, grad=True) for _ in range(2))
    mask = draw_mask(sizes) if masked else None
    found, expected = (
        fn(*heads, mask, scale)
        for fn, heads in ((attend_by_matmul, left), (attend, right))
    )
    assert_close(found, expected, 1e-6)
    push = torch.randn(found.shape, dtype=found.dtype)
    (found * push).sum().backward()
    (expected * push).sum().backward()
    for one, other in zip(left, right, strict=True):
        assert_close(one.grad, other.grad, 1e-6)


def test_attention_as_matrix_products_refuses_what_attend_refuses(as_user):
    q, k, v = draw_heads((1, 3, 2, 4, 4, 8))
    with pytest.raises(ValueError, match="K a divisor of N"):
        attend_by_matmul(q, k, v)


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_weights():
    def loss_of(model, batch):
        loss = batch_loss(model, batch)
        return loss * math.nan if trainer.step == 2 else loss

    trainer = new_trainer(loss_of=loss_of)
    trainer.train_step()
    trainer.train_step()
    before = weights_of(trainer.model)
    with pytest.raises(ValueError, match="nan at step 2.*lower learning_rate"):
        trainer.train_step()
    assert_same(before, weights_of(trainer.model))
    assert trainer.step == 2


def test_a_loss_without_end_stops_the_run_too():
    def loss_of(model, batch):
        return batch_loss(model, batch) * math.inf

    with pytest.raises(ValueError, match="inf at step 0"):
        new_trainer(loss_of=loss_of).train_step()


def test_a_gradient_that_is_no_number_stops_the_run():
    def loss_of(model, batch):
        weight = model.projector.linear.weight
        return batch_loss(model, batch) + (weight[0, 0] - weight[0, 0]).abs().sqrt()

    with pytest.raises(ValueError, match="at step 0, gradient nan"):
        new_trainer(loss_of=loss_of).train_step()


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"learning_rate": 0.0},
        {"max_norm": -1.0},
        {"accumulate": 0},
        {"learning_rate": math.nan},
    ],
)
def test_a_config_that_makes_no_sense_is_a_value_error(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name}: expected above 0, found"):
        config_of(**bad)


def test_the_losses_run_without_numbers():
    with torch.device("meta"):
        model = PaliGemma(CONFIG)
    batch = {name: value.to("meta") for name, value in batch_at(0).items()}
    plain = {n: v for n, v in batch.items() if n not in ("labels", "suffix_mask")}
    T = plain["input_ids"].shape[1]
    assert model(**plain).logits.shape == (4, T, CONFIG.text.vocab_size)
    q, k, v = (x.to("meta") for x in draw_heads((2, 6, 2, 5, 7, 4)))
    assert attend_by_matmul(q, k, v).shape == (2, 6, 5, 4)
    question = packed()["question"].to("meta")
    assert packed_mask(question, question > 0).shape == (2, 1, 60, 60)


# A run


def test_thirty_steps_are_deterministic_and_lower_the_loss():
    runs_of_30 = [new_trainer() for _ in range(2)]
    losses = [[t.train_step()["loss"] for _ in range(30)] for t in runs_of_30]
    assert losses[0] == losses[1]
    assert_same(*(weights_of(t.model) for t in runs_of_30))
    assert sum(losses[0][-5:]) < 0.5 * sum(losses[0][:5])


def test_thirty_packed_steps_lower_the_loss_too():
    def batches(step):
        return packed(seed=step)

    trainer = new_trainer(batches=batches, loss_of=packed_loss)
    losses = [trainer.train_step()["loss"] for _ in range(30)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


SCRIPT = """
import sys, torch
from pathlib import Path
from tests.test_training import batch_loss, new_trainer, config_of, weights_of
from pgcore.runs import RunFolder, fit

def noisy(model, batch):  # a loss that draws from torch's generator
    return batch_loss(model, batch) * (1 + 0.1 * torch.rand(()))

out = Path(sys.argv[1])
torch.manual_seed(5)
trainer = new_trainer(config_of(steps=24, weight_decay=0.1), loss_of=noisy)
def evaluate():
    print("step", trainer.step, flush=True)
    return {"noise": torch.rand(()).item()}
fit(trainer, RunFolder(out), every=4, evaluate=evaluate)
torch.save(weights_of(trainer.model), out / "weights.pt")
"""


def start(folder):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)],
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tools")))},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_a_run_that_kill_9_stopped_goes_on_bit_for_bit(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    one, other = start(whole), start(killed)
    for line in other.stdout:
        if line.split() == ["step", "12"]:
            other.send_signal(signal.SIGKILL)
            break
    assert other.wait() == -signal.SIGKILL
    other.stdout.close()
    assert not (killed / "weights.pt").exists()
    before = len((killed / "metrics.csv").read_text().splitlines())
    again = start(killed)
    assert again.communicate()[0].split()[1] in ("12", "16")
    one.communicate()
    assert one.returncode == again.returncode == 0
    expected, found = (
        torch.load(folder / "weights.pt", weights_only=True)
        for folder in (whole, killed)
    )
    assert_same(expected, found)
    tables = [(folder / "metrics.csv").read_text() for folder in (whole, killed)]
    assert tables[0] == tables[1] and 3 <= before < len(tables[0].splitlines())
    states = [RunFolder(folder).load() for folder in (whole, killed)]
    assert str(states[0]["optimizer"]) == str(states[1]["optimizer"])


def quiet_fit(trainer, folder, **options):
    fit(trainer, RunFolder(folder), **({"every": 2} | options))


def test_fit_looks_prints_and_writes(tmp_path, capsys):
    trainer = new_trainer(config_of(steps=5))
    modes = []

    def evaluate():
        modes.append(trainer.model.training)
        return {"score": trainer.step / 10}

    quiet_fit(trainer, tmp_path, evaluate=evaluate, samples=lambda: ["a: b"])
    out, err = capsys.readouterr()
    assert out == "  a: b\n" * 3 and modes == [False] * 3
    assert [line[:11] for line in err.splitlines()] == [
        "step 2 of 5",
        "step 4 of 5",
        "step 5 of 5",
    ]
    assert "score 0.4" in err and err.splitlines()[0].endswith(" left")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "metrics.csv").read_text())))
    assert [row["step"] for row in rows] == ["2", "4", "5"]
    assert list(rows[0]) == ["step", "loss", "gradient", "score"]


def test_it_trains_in_the_mode_of_training(tmp_path):
    modes = []

    def loss_of(model, batch):
        modes.append(model.training)
        return batch_loss(model, batch)

    trainer = new_trainer(config_of(steps=5), loss_of=loss_of)
    trainer.model.eval()
    quiet_fit(trainer, tmp_path)
    assert modes == [True] * 5


def test_figures_are_means_since_the_look_before(tmp_path):
    trainer, alone = new_trainer(config_of(steps=4)), new_trainer(config_of(steps=4))
    quiet_fit(trainer, tmp_path)
    losses = [alone.train_step()["loss"] for _ in range(4)]
    found = [row["loss"] for row in trainer.rows]
    assert found == [sum(losses[:2]) / 2, sum(losses[2:]) / 2]


def test_a_run_that_is_done_stays_done(tmp_path):
    quiet_fit(new_trainer(config_of(steps=2)), tmp_path)
    table = (tmp_path / "metrics.csv").read_bytes()
    again = new_trainer(config_of(steps=2), seed=1)
    quiet_fit(again, tmp_path)
    assert again.step == 2 and (tmp_path / "metrics.csv").read_bytes() == table


def test_a_stop_between_two_files_loses_no_row(tmp_path, monkeypatch):
    write = RunFolder.write_metrics

    def stopped(folder, rows):
        if len(rows) == 2:
            raise KeyboardInterrupt
        write(folder, rows)

    monkeypatch.setattr(RunFolder, "write_metrics", stopped)
    with pytest.raises(KeyboardInterrupt):
        quiet_fit(new_trainer(config_of(steps=4)), tmp_path)
    monkeypatch.setattr(RunFolder, "write_metrics", write)
    quiet_fit(new_trainer(config_of(steps=4)), tmp_path)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "2", "4"]


def test_the_rows_of_a_state_are_its_own():
    trainer, other = new_trainer(), new_trainer()
    state = trainer.state()
    trainer.rows.append({"step": 1})
    other.restore(state)
    other.rows.append({"step": 2})
    assert state["rows"] == []


def test_fit_looks_at_least_every_step(tmp_path):
    with pytest.raises(ValueError, match="every: expected at least 1, found 0"):
        quiet_fit(new_trainer(), tmp_path, every=0)


def test_a_state_of_another_recipe_is_refused(tmp_path):
    quiet_fit(new_trainer(config_of(steps=2), name="Recipe(seed=0)"), tmp_path)
    other = new_trainer(config_of(steps=2), name="Recipe(seed=1)")
    with pytest.raises(ValueError, match=r"another recipe.*Recipe\(seed=0\)"):
        quiet_fit(other, tmp_path)


def test_a_state_of_another_model_is_refused_in_one_line(tmp_path):
    quiet_fit(new_trainer(config_of(steps=2)), tmp_path)
    model = nn.Linear(3, 3)
    other = Trainer(model, config_of(), batch_at, name="run")
    with pytest.raises(ValueError, match="state: of another model") as caught:
        quiet_fit(other, tmp_path)
    assert "\n" not in str(caught.value)
    parts = (Part(prefix="vision.", rate=0.5),)
    other = new_trainer(config_of(parts=parts))
    with pytest.raises(ValueError, match="state: of another model"):
        quiet_fit(other, tmp_path)


BROKEN = {
    "empty": b"",
    "cut": b"PK\x03\x04 and then nothing",
    "text": b"not a state",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_state_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.pt: expected the state") as caught:
        quiet_fit(new_trainer(), tmp_path)
    assert "\n" not in str(caught.value) and "delete it" in str(caught.value)


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), MemoryError("2 GB")])
def test_a_state_that_cannot_be_read_now_is_not_called_broken(
    error, tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise error

    (tmp_path / "state.pt").write_bytes(b"the work of hours")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)) as caught:
        RunFolder(tmp_path).load()
    assert caught.value is error


def test_a_file_in_the_place_of_the_folder_is_said_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match="a file is in its place") as caught:
            RunFolder(place)
        assert str(caught.value).startswith(f"{place}: expected a folder")


def test_a_state_cut_short_or_of_something_else_is_refused(tmp_path):
    quiet_fit(new_trainer(config_of(steps=2)), tmp_path)
    path = tmp_path / "state.pt"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="expected the state"):
        RunFolder(tmp_path).load()
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match="found: Tensor"):
        RunFolder(tmp_path).load()
    torch.save({"name": "run", "step": 3}, path)
    with pytest.raises(ValueError, match="state: of another model: 'model'"):
        quiet_fit(new_trainer(), tmp_path)


def test_a_state_cannot_run_code(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    (tmp_path / "state.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError, match="expected the state"):
        RunFolder(tmp_path).load()
    assert not (tmp_path / "pwned").exists()


def test_metrics_are_whole_at_any_moment(tmp_path):
    """Another process reads while this one writes: never a part of a table."""
    folder = RunFolder(tmp_path)
    rows = [{"step": n, "loss": 1 / (n + 1)} for n in range(400)]
    folder.write_metrics(rows[:1])
    reader = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib\n"
            "path, seen = pathlib.Path(sys.argv[1]), 0\n"
            "print('ready', flush=True)\n"
            "while seen < 400:\n"
            "    text = path.read_text()\n"
            "    lines = text.splitlines()\n"
            "    assert text.endswith('\\n') and lines[0] == 'step,loss', text[-80:]\n"
            "    assert all(line.count(',') == 1 for line in lines)\n"
            "    seen = len(lines) - 1\n",
            str(tmp_path / "metrics.csv"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert reader.stdout.readline() == "ready\n"
    for count in range(1, 401, 3):
        folder.write_metrics(rows[:count])
    folder.write_metrics(rows)
    reader.communicate(timeout=30)
    assert reader.returncode == 0
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ""][0] == "metrics.csv"


def test_metrics_may_gain_a_column(tmp_path):
    RunFolder(tmp_path).write_metrics([{"step": 1}, {"step": 2, "score": 0.5}])
    assert (tmp_path / "metrics.csv").read_text() == "step,score\n1,\n2,0.5\n"


class Board:
    """In the place of TensorBoard's writer."""

    written: list = []

    def __init__(self, folder):
        self.folder = folder

    def add_scalar(self, *what):
        Board.written.append(what)

    def close(self):
        Board.written.append("closed")


def test_tensorboard_gets_the_last_row_of_finite_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(Board, "written", [])
    monkeypatch.setattr(RunFolder, "_board", lambda self: Board(self.folder))
    rows = [{"step": 2, "loss": 3.0}, {"step": 4, "loss": 2.0, "score": math.nan}]
    RunFolder(tmp_path).write_metrics(rows)
    assert Board.written == [("loss", 2.0, 4), "closed"]


def test_without_tensorboard_there_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    quiet_fit(new_trainer(config_of(steps=2)), tmp_path)
    assert (tmp_path / "metrics.csv").exists() and not (
        tmp_path / "tensorboard"
    ).exists()


def test_with_tensorboard_its_events_are_there(tmp_path):
    pytest.importorskip("tensorboard")
    quiet_fit(new_trainer(config_of(steps=2)), tmp_path)
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_the_time_left_is_told_from_this_sitting(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(steps=1000, start=100)
    now[0] = 30.0
    progress.say(200, {"loss": 1.5})
    now[0] = 9000.0
    progress.say(400, {"loss": 1.5})
    now[0] = 300.0
    progress.say(990, {"loss": 0.25, "score": 1e-7})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 200 of 1000  loss 1.5  4 min left"
    assert lines[1].endswith("5 h 00 min left")
    assert lines[2] == "step 990 of 1000  loss 0.25  score 1e-07  3 s left"


def test_plumbing_knows_no_chapter():
    names = imported_modules(ast.parse(Path(runs.__file__).read_text()))
    assert [name for name in names if name.startswith("pgcore")] == ["pgcore.files"]


# Wrong twins


@pytest.mark.parametrize(
    "loss_of", [museum.shifted_twice, museum.end_taken_for_padding]
)
def test_a_twin_of_the_loss_teaches_something_else(loss_of):
    right, wrong, batch = new_model(), new_model(), batch_at(0)
    batch_loss(right, batch).backward()
    loss_of(wrong, batch).backward()
    assert apart(right, wrong) > 1e-2


def apart(left, right):
    """How far two models' gradients are from each other."""
    one, other = (
        torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (left, right)
    )
    return ((one - other).norm() / one.norm()).item()


def accumulated(loss_of):
    """How far the gradient of two pieces is from that of both at once."""
    pieces = [batch_at(4), batch_at(5)]
    whole, pieced = new_model(), new_model()
    loss_of(whole, merged(*pieces)).backward()
    for piece in pieces:
        (loss_of(pieced, piece) / 2).backward()
    return apart(whole, pieced)


def test_means_over_tokens_must_not_be_averaged():
    assert accumulated(batch_loss) < 1e-4
    assert accumulated(museum.mean_over_tokens) > 1e-2


def test_without_walls_questions_read_each_other():
    model, batch = new_model(), packed()
    first = batch["labels"].masked_fill(batch["question"] != 2, IGNORE)
    reads = {}
    for loss_of in (packed_loss, museum.packed_without_walls):
        x = model.embed(batch["input_ids"], model.encode_images(batch["pixel_values"]))
        x = x.detach().requires_grad_()
        model.embed = lambda ids, images, x=x: x
        loss_of(model, batch | {"labels": first}).backward()
        del model.embed
        reads[loss_of] = (x.grad[batch["question"] == 1] != 0).any().item()
    assert reads == {packed_loss: False, museum.packed_without_walls: True}
    with torch.no_grad():
        pixels = batch["pixel_values"]
        expected = packed_loss_by_loops(model, PROCESSOR, pixels, ASKED)
        found = museum.packed_without_walls(model, batch)
    assert abs(found - expected) > 1e-2 * expected


FALLING = config_of(
    steps=3, schedule=lambda n: 1 / (1 + n), weight_decay=0.2, accumulate=2
)


def three_steps(kind):
    trainer = kind(new_model(), FALLING, batch_at)
    reported = [trainer.train_step()["loss"] for _ in range(3)]
    return reported, torch.cat(
        [p.detach().flatten() for p in trainer.model.parameters()]
    )


@pytest.mark.parametrize("twin", museum.STEPPING, ids=lambda t: t.__name__)
def test_a_twin_of_the_step_reports_or_learns_something_else(twin):
    (said, weights), (expected_said, expected) = map(three_steps, (twin, Trainer))
    again = three_steps(Trainer)
    assert again[0] == expected_said and torch.equal(again[1], expected)
    way = (expected - torch.cat([p.flatten() for p in new_model().parameters()])).norm()
    off = ((weights.float() - expected).norm() / way).item()
    lies = max(abs(a - b) / b for a, b in zip(said, expected_said, strict=True))
    assert max(off, lies) > 1e-3


def drawing(model, batch):
    """A loss that draws from torch's generator."""
    return batch_loss(model, batch) * (1 + 0.1 * torch.rand(()))


@pytest.mark.parametrize("kind", [Trainer, *museum.RESUMING], ids=lambda t: t.__name__)
def test_only_the_right_one_goes_on_bit_for_bit(kind, tmp_path):
    one, other = (kind(new_model(n), FALLING, batch_at, drawing) for n in (0, 1))
    torch.manual_seed(8)
    one.train_step()
    one.train_step()
    RunFolder(tmp_path).save(one.state())
    for _ in range(2):
        one.train_step()
    torch.manual_seed(9)  # another program, another moment
    other.restore(RunFolder(tmp_path).load())
    for _ in range(2):
        other.train_step()
    left, right = weights_of(one.model), weights_of(other.model)
    same = all(torch.equal(left[name], right[name]) for name in left)
    assert same == (kind is Trainer)


def test_a_task_does_not_depend_on_what_is_drawn_from_the_same_seed():
    spread = {}
    for kind in (Mixture, museum.DrawsWithTheData):
        mixture = kind({"a": 1.0, "b": 1.0, "c": 2.0}, seed=0)
        small = [
            mixture.task(n) == "a"
            for n in range(1000)
            if random.Random(f"thing 0 {n}").choice((1, 2)) == 1
        ]
        spread[kind] = abs(sum(small) / len(small) - 0.25)
    assert spread[Mixture] < 0.08 and spread[museum.DrawsWithTheData] > 0.2
