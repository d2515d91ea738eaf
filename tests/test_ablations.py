"""The recipe of the ablations: each arm differs from the first in one thing."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from pgcore.generation import prefill
from pgcore.lab.scenes import compose_batch, split
from pgcore.processing import load_processor
from pgcore.recipes import ablations
from pgcore.recipes._coarse_scenes import CONCEPTS, SCENES, TRAIN, drawn, on_patches
from pgcore.recipes.ablations import (
    ARMS,
    EXAMS,
    FIGURES,
    Recipe,
    batch_at,
    build,
    config_of,
    main,
    read_as_trained,
    summary,
)
from pgcore.recipes.tiny_tokenizer import FOLDER

PROCESSOR = load_processor(FOLDER)
ASSETS = FOLDER.parent


def test_models_of_the_arms_differ_in_what_their_names_say():
    plain = build(Recipe(arm="as it is", seed=0), PROCESSOR).state_dict()
    for arm in ARMS[1:]:
        found = build(Recipe(arm=arm, seed=0), PROCESSOR).state_dict()
        other = {name for name in plain if not torch.equal(plain[name], found[name])}
        expected = {
            "tower frozen": set(),
            "causal": set(),
            "projector at random": {"projector.linear.weight"},
            "weak positions": {"vision.positions"},
        }
        if arm == "no SigLIP":
            assert other and all(name.startswith("vision.") for name in other)
            assert "vision.positions" in other
        else:
            assert other == expected[arm], arm
    seeded = build(Recipe(arm="as it is", seed=1), PROCESSOR).state_dict()
    assert torch.equal(plain["vision.positions"], seeded["vision.positions"])
    key = "language.embed_tokens.weight"
    assert not torch.equal(plain[key], seeded[key])


def test_batches_differ_by_seed_and_step_and_the_causal_ones_by_their_mask():
    def batch(arm="as it is", seed=0, step=0):
        return batch_at(Recipe(arm=arm, seed=seed, rows=3), PROCESSOR, step)

    plain, causal = batch(), batch("causal")
    for name in ("pixel_values", "input_ids", "labels", "attention_mask"):
        assert torch.equal(plain[name], causal[name])
    assert torch.equal(causal["suffix_mask"], causal["attention_mask"])
    assert torch.equal(plain["suffix_mask"], plain["labels"] != -100)
    for other in (batch(seed=1), batch(step=1)):
        assert not torch.equal(plain["pixel_values"], other["pixel_values"])


def test_boxes_reach_to_the_edges_of_the_patches_that_they_touch():
    scenes = drawn("train", TRAIN, 3, 5, 20)
    settings, stream = split("train", TRAIN, 3)
    for scene, own in zip(scenes, compose_batch(settings, stream, 5, 20), strict=True):
        for thing, before in zip(scene.objects, own.objects, strict=True):
            touched = np.zeros((8, 8), bool)
            rows, columns = np.nonzero(before.mask)
            touched[rows // 12, columns // 12] = True
            rows, columns = np.nonzero(touched)
            top, left = 12 * rows.min(), 12 * columns.min()
            bottom, right = 12 * (rows.max() + 1), 12 * (columns.max() + 1)
            assert thing.box == (top, left, bottom, right)
        again = [thing.box for thing in on_patches(scene).objects]
        assert again == [thing.box for thing in scene.objects]  # nothing more to do


def test_no_arm_trains_on_what_it_is_examined_on():
    exams = {name: split(name, SCENES)[0].styles for name in EXAMS.values()}
    trained = split("train", TRAIN)[0].styles
    assert set(exams["validation"]).isdisjoint(trained)
    assert set(exams["test-scenes"]) <= set(trained)
    streams = {split(name, SCENES, 0)[1] for name in EXAMS.values()}
    assert streams.isdisjoint(split("train", TRAIN, seed)[1] for seed in range(3))


def test_the_causal_arm_is_asked_as_it_was_trained():
    """Its prefill must give the logits of its training forward."""
    recipe = Recipe(arm="causal", seed=0, rows=2)
    model = build(Recipe(arm="projector at random", seed=0), PROCESSOR).eval()
    batch = batch_at(recipe, PROCESSOR, 0)
    first = int((batch["labels"][0] != -100).nonzero()[0])
    row = {name: value[:1] for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        expected = model(**row).logits[0, first - 1]
        prefix = {
            name: value[:, :first] if name != "pixel_values" else value
            for name, value in row.items()
            if name != "suffix_mask"
        }
        with read_as_trained("causal"):
            found = prefill(model, prefix, first)[0][0]
        other = prefill(model, prefix, first)[0][0]
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 1e-5 * scale
    assert (other - expected).abs().max() > 1e-2 * scale


def test_the_command_goes_on_and_sums_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arms = ["as it is", "causal"]
    read = []

    def read_as(arm):
        read.append(arm)
        return read_as_trained(arm)

    monkeypatch.setattr(ablations, "read_as_trained", read_as)
    main(["--out", str(tmp_path), "--steps", "1", "--watched", "1", "--arms", *arms])
    assert not (tmp_path / "ablations.json").exists()  # some arms do not sum up
    assert read == [arm for _ in range(3) for arm in arms for _ in EXAMS]
    monkeypatch.setattr(ablations, "ARMS", tuple(arms))
    capsys.readouterr()
    options = ["--out", str(tmp_path), "--steps", "1", "--watched", "1", "--arms"]
    main([*options, *arms, "--seeds", "1"])
    table = json.loads((tmp_path / "ablations.json").read_text())
    assert list(table["arms"]) == arms and table["recipe"]["steps"] == 1
    capsys.readouterr()
    main([*options, *arms, "--seeds", "2"])
    again = json.loads((tmp_path / "ablations.json").read_text())
    assert capsys.readouterr().err.count("step 1 of 1") == 0  # all was done
    for arm in arms:
        assert again["arms"][arm]["curves"][0] == table["arms"][arm]["curves"][0]
        for name in (f"{name}, {exam}" for name in FIGURES for exam in EXAMS):
            figure = again["arms"][arm][name]
            assert figure["lowest"] <= figure["mean"] <= figure["highest"]


def test_rates_of_the_arms():
    rates = {arm: config_of(Recipe(arm=arm, seed=0)).parts[0].rate for arm in ARMS}
    expected = dict.fromkeys(ARMS, 0.2)
    assert rates == expected | {"tower frozen": 0.0, "no SigLIP": 1.0}


def test_the_summary_by_hand():
    names = [f"{name}, {exam}" for name in FIGURES for exam in EXAMS]
    first = {"step": 1} | dict.fromkeys(names, 9.0)
    ends = [{"step": 2} | dict.fromkeys(names, end) for end in (1.0, 2.0, 6.0)]
    runs = [[first, end] for end in ends]
    found = summary(Recipe(arm="causal", seed=2), {"causal": runs})["arms"]["causal"]
    expected = {"mean": 3.0, "lowest": 1.0, "highest": 6.0}
    assert found == {"curves": runs, **dict.fromkeys(names, expected)}


def test_no_seeds_are_one_line():
    with pytest.raises(ValueError, match="seeds: expected 1 or more, found 0"):
        main(["--seeds", "0"])


def test_what_ships_was_measured_with_this_recipe():
    report = json.loads((ASSETS / "ablations.json").read_text())
    shared = dataclasses.asdict(Recipe(arm="as it is", seed=0))
    del shared["arm"], shared["seed"]
    assert report["recipe"] == shared and tuple(report["concepts"]) == CONCEPTS
    assert tuple(report["arms"]) == ARMS
    for arm in report["arms"].values():
        assert [run[-1]["step"] for run in arm["curves"]] == [shared["steps"]] * 3


def test_an_unknown_arm_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--arms", "no legs"])
    assert "no legs" in capsys.readouterr().err
