"""Chapter 15: the mask codec, its files, and the recipe that trains it."""

import dataclasses
import json
import math
import zipfile
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import nn

from pgcore.grounding import mask_iou
from pgcore.lab.emoji import TEST_STYLE, TRAIN_STYLES, UNSEEN_CONCEPTS
from pgcore.lab.museum import grounding as museum
from pgcore.lab.scene_language import box_mask
from pgcore.lab.scenes import SceneSettings, compose_batch, split
from pgcore.mask_codec import (
    EMOJI_MASKS,
    PALIGEMMA_MASKS,
    SHIPPED_CODEC,
    CodebookAverages,
    MaskCodec,
    MaskCodecConfig,
    MaskDecoder,
    MaskEncoder,
    load_mask_codec,
    load_published_codec,
    quantize,
    save_mask_codec,
)
from pgcore.recipes import mask_codes
from pgcore.recipes._masks import measure_sprites, scenes_of, sprite_masks
from pgcore.recipes.mask_codes import Recipe, Run, learning_rate_at, main, train
from tests.draws import fan_in, name_of

TOLERANCE = 5e-6
SMALL = MaskCodecConfig(num_codes=20, code_width=12, width=16, depth=1)


@cache
def published_arrays():
    """A file of PaliGemma's names and shapes, weights at fan-in scale."""
    codec = fan_in(MaskCodec(PALIGEMMA_MASKS), 3)
    arrays = {name: w.numpy() for name, w in codec.state_dict().items()}
    codes = np.random.default_rng(1).normal(size=(128, 512)).astype(np.float32)
    del arrays["codebook"]
    return arrays | {
        "_vq_vae._embedding": codes,
        "_vq_vae._ema_w": codes * 3,
        "_vq_vae._ema_cluster_size": np.ones(128, np.float32),
    }


@pytest.fixture
def published(tmp_path):
    path = tmp_path / "vae-oid.npz"
    np.savez(path, **published_arrays())
    return path


def random_masks(number, seed=0):
    noise = torch.rand(number, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, 64, mode="bicubic")[:, 0].clamp(0, 1)


def random_codes(number, codes=128):
    generator = torch.Generator().manual_seed(7)
    return torch.randint(codes, (number, 16), generator=generator)


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * expected.abs().max().item(), error


# PaliGemma's: the published layers, written again in NumPy in its own layout


def jax_conv(x, kernel, bias, stride=1, padding=0):
    """x [B, h, w, in]; kernel [rows, columns, in, out], as flax and TensorFlow."""
    rows, columns, _, out = kernel.shape
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    size = (x.shape[1] - rows) // stride + 1
    result = np.zeros((len(x), size, size, out)) + bias
    for r in range(rows):
        for c in range(columns):
            end = stride * (size - 1) + 1
            part = x[:, r : r + end : stride, c : c + end : stride]
            result += part @ kernel[r, c]
    return result


def jax_conv_transpose(x, kernel, bias):
    """flax's ConvTranspose(kernel 4, strides 2, padding 2, transpose_kernel=True)."""
    B, side, _, channels = x.shape
    spread = np.zeros((B, 2 * side - 1, 2 * side - 1, channels))
    spread[:, ::2, ::2] = x
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    return jax_conv(spread, flipped, bias, padding=2)


def reference_decoder(arrays, codes):
    """big_vision's Decoder, in float64."""

    def conv(x, name, how=jax_conv, **options):
        kernel = np.transpose(arrays[name + ".weight"], (2, 3, 1, 0)).astype(float)
        return how(x, kernel, arrays[name + ".bias"].astype(float), **options)

    def block(x, name):
        y = np.maximum(conv(x, name + ".0", padding=1), 0)
        y = np.maximum(conv(y, name + ".2", padding=1), 0)
        return x + conv(y, name + ".4")

    x = arrays["_vq_vae._embedding"][codes].reshape(len(codes), 4, 4, -1)
    x = np.maximum(conv(x.astype(float), "decoder.0"), 0)
    x = block(block(x, "decoder.2.net"), "decoder.3.net")
    for layer in (4, 6, 8, 10):
        x = np.maximum(conv(x, f"decoder.{layer}", how=jax_conv_transpose), 0)
    return conv(x, "decoder.12")[..., 0]


def reference_encoder(arrays, masks):
    """big_vision's encode_to_codebook_indices, in float64, before the codes."""

    def conv(x, name, **options):
        kernel = np.transpose(arrays[name + ".weight"], (2, 3, 1, 0)).astype(float)
        return jax_conv(x, kernel, arrays[name + ".bias"].astype(float), **options)

    x = 2.0 * (masks[..., None].astype(float) - 0.5)
    for layer in (0, 2, 4, 6):  # "SAME" with stride 2 and an even side: one on each
        x = np.maximum(conv(x, f"encoder.{layer}", stride=2, padding=1), 0)
    for layer in (8, 9):
        name = f"encoder.{layer}.net"
        y = np.maximum(conv(x, name + ".0", padding=1), 0)
        y = np.maximum(conv(y, name + ".2", padding=1), 0)
        x = x + conv(y, name + ".4")
    return conv(x, "encoder.10").reshape(len(masks), 16, -1)


def test_the_decoder_is_the_published_one(published):
    codec, codes = load_published_codec(published), random_codes(3)
    expected = torch.from_numpy(reference_decoder(published_arrays(), codes.numpy()))
    assert expected.std() > 0.1
    painted = codec.render(codec.codebook[codes])
    assert_close(painted, expected)
    decoded = codec.decode(codes)
    assert_close(decoded, ((painted + 1) / 2).clamp(0, 1), 1e-7)
    assert 0 < (decoded > 0.5).float().mean() < 1


def test_the_encoder_is_the_published_one(published):
    codec, masks = load_published_codec(published), random_masks(3)
    expected = reference_encoder(published_arrays(), masks.numpy())
    assert_close(codec.latents(masks), torch.from_numpy(expected))
    table = published_arrays()["_vq_vae._embedding"].astype(float)
    distances = ((expected[:, :, None] - table) ** 2).sum(-1)
    assert torch.equal(codec.encode(masks), torch.from_numpy(distances.argmin(-1)))


def test_the_published_sizes():
    with torch.device("meta"):
        decoder = MaskDecoder(PALIGEMMA_MASKS)
    shapes = {name: tuple(w.shape) for name, w in decoder.state_dict().items()}
    assert shapes["0.weight"] == (128, 512, 1, 1)
    assert [shapes[f"{n}.weight"][:2] for n in (4, 6, 8, 10)] == [
        (128, 128), (128, 64), (64, 32), (32, 16),
    ]  # fmt: skip
    assert shapes["2.net.4.weight"] == (128, 128, 1, 1)
    assert shapes["12.weight"] == (1, 16, 1, 1) and len(shapes) == 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("decoder.12.bias"), r"- decoder.12.bias \(1,\)"),
        (lambda a: a.pop("_vq_vae._embedding"), r"- codebook \(128, 512\)"),
        (lambda a: a.pop("encoder.0.weight"), "- encoder.0.weight"),
        (lambda a: a.update(stranger=np.ones(3)), r"\+ stranger \(3,\)"),
        (
            lambda a: a.update({"decoder.4.weight": np.ones((128, 64, 4, 4))}),
            r"decoder.4.weight: - \(128, 128, 4, 4\) \+ \(128, 64, 4, 4\)",
        ),
        (
            lambda a: a.update({"decoder.12.bias": np.array([{}], dtype=object)}),
            "expected an .npz of numbers, found Object arrays cannot be loaded",
        ),
        (
            lambda a: a.update({"decoder.12.bias": np.array(["x"])}),
            "expected an .npz of numbers, found could not convert string",
        ),
    ],
)
def test_a_published_file_must_fit(tmp_path, change, message):
    arrays = dict(published_arrays())
    change(arrays)
    np.savez(tmp_path / "vae.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_published_codec(tmp_path / "vae.npz")


def test_what_is_no_npz_is_refused(tmp_path):
    path = tmp_path / "vae.npz"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_published_codec(path)
    path.write_bytes(b"\x80\x04pickle me")
    with pytest.raises(ValueError, match="expected an .npz of numbers"):
        load_published_codec(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("decoder.0.bias.npy", b"no array")
    with pytest.raises(ValueError, match="expected an .npz of numbers"):
        load_published_codec(path)


# Codes


def test_the_nearest_code_is_chosen():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(5, 16, 7, generator=generator)
    table = torch.randn(30, 7, generator=generator)
    coded, codes = quantize(latents, table)
    expected = torch.cdist(latents, table.expand(5, -1, -1)).argmin(-1)
    assert torch.equal(codes, expected)
    assert_close(coded, table[codes], 1e-6)


def test_the_gradient_goes_straight_through():
    latents = torch.randn(2, 16, 3, requires_grad=True)
    table = torch.randn(6, 3, requires_grad=True)
    weights = torch.randn(2, 16, 3)
    (quantize(latents, table)[0] * weights).sum().backward()
    assert torch.equal(latents.grad, weights) and table.grad is None


def test_the_twin_gives_the_encoder_no_gradient():
    latents = torch.randn(2, 16, 3, requires_grad=True)
    coded, _ = museum.no_way_back(latents, torch.randn(6, 3))
    assert not coded.requires_grad


def test_without_memory_the_averages_are_k_means():
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(40, 16, 3, generator=generator)
    rows = latents.flatten(0, 1)
    table = rows[:8].clone()
    averages = CodebookAverages(table)
    for _ in range(15):
        averages.update(latents, quantize(latents, table)[1], decay=0.0, fewest=0.0)
    expected, _ = kmeans2(
        rows.double().numpy(), rows[:8].double().numpy(), iter=15, minit="matrix"
    )
    assert_close(table, torch.from_numpy(expected), 1e-5)


def test_the_first_codes_are_those_of_k_means():
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(40, 16, 3, generator=generator)
    rows, table = latents.flatten(0, 1), torch.zeros(8, 3)
    CodebookAverages(table, seed=7).start(latents)
    seven = torch.Generator().manual_seed(7)
    first = rows[torch.randperm(len(rows), generator=seven)[:8]]
    expected, _ = kmeans2(
        rows.double().numpy(), first.double().numpy(), iter=20, minit="matrix"
    )
    assert_close(table, torch.from_numpy(expected), 1e-5)


def test_a_code_that_too_few_choose_is_restarted_from_one_on():
    table = torch.tensor([[0.0], [9.0]])
    averages = CodebookAverages(table)
    latents = torch.zeros(1, 16, 1)
    restarted = averages.update(latents, torch.zeros(1, 16).long(), decay=0.5)
    assert restarted == 1 and table[1] == 0  # a count of 0.5 is below one


def test_without_restarts_what_nobody_chooses_stays_where_it_is():
    table = torch.tensor([[0.0], [9.0]])
    averages = CodebookAverages(table)
    latents = torch.zeros(1, 16, 1)
    for _ in range(60):
        averages.update(latents, torch.zeros(1, 16).long(), decay=0.5, fewest=0.0)
    assert_close(table[1], torch.tensor([9.0]), 1e-3)


def test_the_averages_move_as_slowly_as_the_decay_says():
    table = torch.tensor([[0.0], [10.0]])
    averages = CodebookAverages(table)
    latents = torch.full((1, 16, 1), 2.0)
    restarted = averages.update(latents, torch.zeros(1, 16).long(), 0.9, fewest=0.0)
    count, total = 0.9 * 1 + 0.1 * 16, 0.9 * 0 + 0.1 * 32
    assert restarted == 0
    assert_close(table, torch.tensor([[total / count], [10.0]]), 1e-6)


def test_what_nobody_chooses_is_restarted():
    table = torch.full((6, 2), 50.0)
    table[0] = 0
    latents = torch.randn(3, 16, 2)
    averages = CodebookAverages(table)
    restarted = averages.update(latents, torch.zeros(3, 16).long(), 0.0)
    assert restarted == 5
    others = torch.cdist(table[1:], latents.flatten(0, 1)).amin(1)
    assert others.max() < 1e-6
    codes = quantize(latents, table)[1]
    assert len(codes.unique()) > 1


@pytest.mark.parametrize("twin", museum.DECODERS, ids=name_of)
def test_twins_paint_other_masks(twin):
    codec, masks = load_mask_codec(), masks_never_seen()
    codes = codec.encode(masks)
    assert mean_iou(twin(codec, codes), masks) < mean_iou(codec(masks), masks) - 0.05


def test_rows_come_before_columns():
    """A mark in one cell of the mask changes that cell's code, mostly."""
    codec = load_mask_codec()
    empty = torch.zeros(16, 64, 64)
    marked = empty.clone()
    for place in range(16):
        row, column = divmod(place, 4)
        top, left = 16 * row + 3, 16 * column + 3
        marked[place, top : top + 10, left : left + 10] = 1
    latents = codec.latents(marked) - codec.latents(empty)
    moved = latents.norm(dim=-1)
    assert moved.argmax(1).tolist() == list(range(16))


@pytest.mark.parametrize("config", [PALIGEMMA_MASKS, EMOJI_MASKS, SMALL])
def test_shapes_on_the_meta_device(config):
    with torch.device("meta"):
        codec = MaskCodec(config)
        masks = torch.zeros(3, 64, 64)
        latents = codec.latents(masks)
        assert latents.shape == (3, 16, config.code_width)
        assert codec.encode(masks).shape == (3, 16)
        assert codec(masks).shape == codec.render(latents).shape == (3, 64, 64)
        assert MaskEncoder(config)(masks[:, None]).shape[2:] == (4, 4)


def test_masks_of_another_size_are_refused(as_user):
    codec = MaskCodec(SMALL)
    for call in (codec.latents, codec.encode, codec):
        with pytest.raises(ValueError, match=r"masks: expected B 64 64, found \(2, 32"):
            call(torch.zeros(2, 32, 32))


def test_an_empty_mask_comes_back_empty():
    codec = load_mask_codec()
    assert not (codec(torch.zeros(1, 64, 64)) > 0.5).any()


def test_a_batch_changes_nothing():
    codec, masks = load_mask_codec(), random_masks(6)
    codes = codec.encode(masks)
    for row in range(6):
        assert torch.equal(codec.encode(masks[row : row + 1])[0], codes[row])
    decoded = codec.decode(codes)
    assert decoded.min() >= 0 and decoded.max() <= 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("width", 12), ("width", 0), ("depth", 0), ("num_codes", -1), ("code_width", 0)],
)
def test_sizes_that_are_none_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected a multiple of"):
        MaskCodecConfig(**{"code_width": 4, "width": 16} | {field: value})


# What ships


def mean_iou(found, masks):
    pairs = zip(found.numpy() > 0.5, masks.numpy() > 0.5, strict=True)
    return sum(mask_iou(*pair) for pair in pairs) / len(masks)


@cache
def masks_never_seen():
    scenes = compose_batch(*split("test-artist", SceneSettings()), 0, 60)
    masks = [box_mask(thing) for scene in scenes for thing in scene.objects]
    return torch.from_numpy(np.stack(masks))


def test_what_ships_reaches_what_its_card_says():
    codec = load_mask_codec()
    assert codec.config == EMOJI_MASKS
    assert not any(p.requires_grad for p in codec.parameters()) and not codec.training
    found = measure_sprites(codec, sprite_masks(TEST_STYLE))
    log = json.loads((SHIPPED_CODEC / "training.json").read_text())
    assert found["iou"] >= 0.9 and found["codes"] >= 100
    assert math.isclose(found["iou"], log["test"]["iou"], abs_tol=2e-3)
    assert mean_iou(codec(masks_never_seen()), masks_never_seen()) >= 0.9
    card = (SHIPPED_CODEC / "README.md").read_text()
    assert f"{100 * log['test']['iou']:.1f} %" in card
    assert f"{100 * log['test']['iou_in_scenes']:.1f} %" in card
    assert f"{100 * log['shipped'][-1]['iou']:.1f} %" in card
    assert log["shipped"][-1]["step"] == Recipe.steps
    assert log["plain"][-1]["codes"] < 20 < 100 < log["shipped"][-1]["codes"]
    assert sum(file.stat().st_size for file in SHIPPED_CODEC.iterdir()) < 2_000_000


def test_a_codec_comes_back_as_it_was_saved(tmp_path):
    codec = fan_in(MaskCodec(SMALL), 0)
    save_mask_codec(tmp_path / "new", codec)
    loaded = load_mask_codec(tmp_path / "new")
    assert loaded.config == SMALL
    for name, weight in codec.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.half().float())


def test_a_broken_codec_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
        load_mask_codec(tmp_path)
    weights = {n: w.contiguous() for n, w in MaskCodec(SMALL).state_dict().items()}
    config = json.dumps(dataclasses.asdict(SMALL))
    for metadata, found in (
        (None, "found"),
        ({"other": "1"}, "found 'config'"),
        ({"config": "[1"}, "found"),
        ({"config": "[1]"}, "found"),
        ({"config": '{"depth": 1}'}, "found"),
        ({"config": config.replace("16", "13")}, "multiple of 8, found 13"),
    ):
        save_file(weights, path, metadata)
        with pytest.raises(ValueError, match=f"expected a mask codec, .*{found}"):
            load_mask_codec(tmp_path)
    del weights["decoder.0.bias"]
    save_file(weights, path, {"config": config})
    with pytest.raises(ValueError, match=r"- decoder\.0\.bias \(16,\)"):
        load_mask_codec(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="expected a mask codec, found"):
        load_mask_codec(tmp_path)


# The recipe


QUICK = Recipe(
    steps=6, batch_size=4, free=2, warmup=2, config=SMALL, sizes=(64,), scenes=3,
    changed=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _look_often(monkeypatch):
    monkeypatch.setattr(mask_codes, "EVERY", 2)
    monkeypatch.setattr(mask_codes, "START", 8)
    few = sprite_masks("fxemoji")[:5]
    monkeypatch.setattr(mask_codes, "sprite_masks", lambda style: few)


@cache
def pool():
    return mask_codes.training_masks((64,), 3, 1, 0)


def test_the_recipe_never_draws_what_it_is_tested_on():
    for scene in scenes_of("train", 64, 40):
        for thing in scene.objects:
            assert thing.style in TRAIN_STYLES and thing.style != TEST_STYLE
            assert thing.concept not in UNSEEN_CONCEPTS


def test_training_masks_are_those_of_scenes_and_warped_copies():
    masks = pool()
    things = [thing for s in scenes_of("train", 64, 3) for thing in s.objects]
    assert masks.shape == (2 * len(things), 64, 64) and masks.dtype == torch.uint8
    for row, thing in enumerate(things):
        assert (masks[2 * row].float().numpy() / 255 == box_mask(thing)).all()
        assert (masks[2 * row + 1] != masks[2 * row]).any()
    # Cut to their boxes: something touches every side.
    for side in (masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]):
        assert side.amax(1).min() > 0
    assert torch.equal(masks, mask_codes.training_masks((64,), 3, 1, 0))


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, monkeypatch):
    whole = train(QUICK, pool(), tmp_path / "whole")
    step = Run.train_one_step

    def stop_in_the_fifth(run):
        if run.step == 4:
            raise KeyboardInterrupt
        return step(run)

    monkeypatch.setattr(Run, "train_one_step", stop_in_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        train(QUICK, pool(), tmp_path / "killed")
    monkeypatch.setattr(Run, "train_one_step", step)
    resumed = train(QUICK, pool(), tmp_path / "killed")
    assert whole.log == resumed.log and len(whole.log) == 3
    for name, weight in whole.codec.state_dict().items():
        assert torch.equal(weight, resumed.codec.state_dict()[name]), name


def test_a_state_of_another_recipe_is_refused(tmp_path):
    train(QUICK, pool(), tmp_path)
    with pytest.raises(ValueError, match="another recipe"):
        train(dataclasses.replace(QUICK, seed=1), pool(), tmp_path)


def test_the_learning_rate_rises_stays_and_falls():
    recipe = Recipe(steps=1000, warmup=100, decay=0.25, learning_rate=2.0)
    rates = [learning_rate_at(recipe, step) for step in (0, 49, 99, 500, 750, 875)]
    assert rates == [0.02, 1.0, 2.0, 2.0, 2.0, 1.0]


def test_the_command_trains_and_writes_what_ships(tmp_path, monkeypatch, capsys):
    quick = partial(Recipe, **{
        f.name: getattr(QUICK, f.name) for f in dataclasses.fields(Recipe)
        if f.name not in ("steps", "seed")
    })  # fmt: skip
    monkeypatch.setattr(mask_codes, "Recipe", quick)
    monkeypatch.setattr(mask_codes, "PLAIN", mask_codes.PLAIN | {"steps": 2})
    monkeypatch.setattr(mask_codes, "scenes_of", lambda *_: scenes_of("train", 64, 2))
    main(["--out", str(tmp_path), "--steps", "4"])
    assert "step 4 of 4" in capsys.readouterr().err
    codec = load_mask_codec(tmp_path / "shipped")
    assert codec.config == SMALL and isinstance(codec.encoder[0], nn.Conv2d)
    log = json.loads((tmp_path / "shipped" / "training.json").read_text())
    assert [entry["step"] for entry in log["shipped"]] == [2, 4]
    assert set(log) == {"plain", "shipped", "test"}
    assert set(log["test"]) == {"iou", "codes", "iou_in_scenes"}
