"""Chapter 06: the vision tower against torch, Hugging Face, SciPy, and its twins."""

import dataclasses

import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pgcore.attention import attention_mask
from pgcore.lab.museum import vision as museum
from pgcore.vision import (
    MLP,
    SO400M_14_224,
    SO400M_14_448,
    SO400M_14_896,
    TINY,
    EncoderBlock,
    MAPHead,
    PatchEmbedding,
    VisionConfig,
    VisionTower,
    initialize,
    resize_positions,
)
from tests.reference.vision import patch_embedding_by_loops

SMALL = VisionConfig(
    width=60,
    depth=3,
    mlp_dim=88,
    num_heads=5,
    head_dim=12,
    patch_size=4,
    image_size=20,
)
SIZES = (20, 32)  # 25 and 64 patches
TWINS = [
    museum.SkipFromTheNorm,
    museum.WithoutFinalNorm,
    museum.WithoutPositions,
    museum.PositionsAtTheEnd,
    museum.ReshapedPatches,
    museum.ColumnByColumn,
    museum.ChannelsLastPatches,
    museum.ExactGELU,
    museum.WithoutNonlinearity,
    museum.ScaleByWidth,
    museum.LooseEpsilon,
    museum.HeadWithoutMLP,
]

every_twin = pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.__name__)


def draw_weights(module, seed=0):
    """Draw every parameter: maps at fan-in scale, norms near 1, the rest near 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_map = parameter.ndim in (2, 4)
            noise *= (parameter[0].numel() if is_map else 4) ** -0.5
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(noise + is_norm)
    return module.eval()


def pictures(config, batch=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = batch, 3, config.image_size, config.image_size
    return 2 * torch.rand(shape, generator=generator, dtype=dtype) - 1


def assert_close(ours, theirs, tolerance=5e-6):
    assert ours.shape == theirs.shape
    size = theirs.abs().max().item()
    assert size > 0.1, "a comparison with nothing proves nothing"
    assert (ours - theirs).abs().max().item() <= tolerance * size


def build(config, twin=None):
    """A tower and its pooling head; a twin takes the place of its right part."""
    bases = {twin.__base__: twin} if twin else {}
    tower = bases.get(VisionTower, VisionTower)(config)
    head = bases.get(MAPHead, MAPHead)(config)
    heads = {"num_heads": config.num_heads, "head_dim": config.head_dim}
    if PatchEmbedding in bases:
        tower.patch_embedding = twin(config.width, config.patch_size)
    if EncoderBlock in bases:
        blocks = [twin(config.width, config.mlp_dim, **heads) for _ in tower.layers]
        tower.layers = nn.ModuleList(blocks)
    if MLP in bases:
        for holder in (*tower.layers, head):
            holder.mlp = twin(config.width, config.mlp_dim)
    return draw_weights(tower, seed=1), draw_weights(head, seed=2)


# parity


def by_hugging_face(tower, head, images):
    """Tokens and pooled vector of SiglipVisionModel with the same weights."""
    transformers = pytest.importorskip("transformers")
    c = tower.config
    hf = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=c.width,
            intermediate_size=c.mlp_dim,
            num_hidden_layers=c.depth,
            num_attention_heads=c.num_heads,
            image_size=c.image_size,
            patch_size=c.patch_size,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
        )
    ).eval()
    ours = {**tower.state_dict(), **head.state_dict(prefix="head.")}
    theirs = {}
    for name, value in hf.state_dict().items():
        name_here = name.replace("out_proj", "o_proj").removeprefix("encoder.")
        name_here = name_here.removeprefix("embeddings.")
        name_here = name_here.replace("patch_embedding.", "patch_embedding.conv.")
        if "position_embedding" in name:
            name_here = "positions"
        if "in_proj" in name:  # queries, keys and values in one
            names = [name_here.replace("in_proj_", f"{n}_proj.") for n in "qkv"]
            found = torch.cat([ours.pop(n) for n in names])
        else:
            found = ours.pop(name_here)
        assert found.shape == value.shape
        theirs[name] = found
    assert not ours
    hf.load_state_dict(theirs)
    output = hf(pixel_values=images)
    return output.last_hidden_state, output.pooler_output


def whisper(tower):
    """Make the stream small: next to a variance of 1 no epsilon can be told."""
    first = tower.layers[0]
    for layer in (tower.patch_embedding.conv, first.self_attn.o_proj, first.mlp.fc2):
        layer.weight.mul_(0.01)
        layer.bias.mul_(0.01)
    tower.positions.mul_(0.01)


@torch.no_grad()
def assert_parity(twin=None):
    for size in SIZES:
        config = dataclasses.replace(SMALL, image_size=size)
        tower, head = build(config, twin)
        images = pictures(config)
        for _ in range(2):
            tokens, vector = by_hugging_face(tower, head, images)
            assert_close(tower(images), tokens)
            assert_close(head(tower(images)), vector)
            whisper(tower)


def test_equals_hugging_face():
    assert_parity()


@every_twin
def test_wrong_twins_fail_the_parity_test(twin):
    with pytest.raises(AssertionError):
        assert_parity(twin)


@every_twin
def test_twins_have_the_right_shapes(twin):
    tower, head = build(SMALL, twin)
    images = pictures(SMALL)
    assert tower(images).shape == (3, 25, 60)
    assert head(tower(images)).shape == (3, 60)


@torch.no_grad()
def test_block_equals_torch_in_float64():
    block = build(SMALL)[0].layers[0].double()
    oracle = nn.TransformerEncoderLayer(
        60,
        5,
        88,
        dropout=0.0,
        activation=lambda x: F.gelu(x, approximate="tanh"),
        layer_norm_eps=1e-6,
        batch_first=True,
        norm_first=True,
    ).double()
    ours = dict(block.named_parameters())
    for kind in ("weight", "bias"):
        stacked = torch.cat([ours[f"self_attn.{n}_proj.{kind}"] for n in "qkv"])
        getattr(oracle.self_attn, f"in_proj_{kind}").copy_(stacked)
        for name, part in (
            ("self_attn.o_proj", oracle.self_attn.out_proj),
            ("layer_norm1", oracle.norm1),
            ("layer_norm2", oracle.norm2),
            ("mlp.fc1", oracle.linear1),
            ("mlp.fc2", oracle.linear2),
        ):
            getattr(part, kind).copy_(ours[f"{name}.{kind}"])
    x = torch.randn(2, 7, 60, dtype=torch.float64)
    assert_close(block(x), oracle(x), 1e-13)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    causal = attention_mask(torch.ones(2, 7, dtype=torch.bool))
    assert_close(block(x, causal), oracle(x, src_mask=~mask), 1e-13)


@torch.no_grad()
def test_head_equals_torchs_attention():
    head = build(SMALL)[1]
    ours = dict(head.named_parameters())
    oracle = nn.MultiheadAttention(60, 5, batch_first=True)
    for kind in ("weight", "bias"):
        stacked = torch.cat([ours[f"attention.{n}_proj.{kind}"] for n in "qkv"])
        getattr(oracle, f"in_proj_{kind}").copy_(stacked)
        getattr(oracle.out_proj, kind).copy_(ours[f"attention.o_proj.{kind}"])
    tokens = torch.randn(4, 9, 60)
    x = oracle(head.probe.repeat(4, 1, 1), tokens, tokens)[0]
    expected = x + head.mlp(F.layer_norm(x, (60,), *head.layernorm.parameters(), 1e-6))
    assert_close(head(tokens), expected[:, 0])


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
def test_patches_equal_loops(batch, grid, side, width):
    embedding = draw_weights(PatchEmbedding(width, side))
    images = torch.randn(batch, 3, grid * side, grid * side)
    with torch.no_grad():
        ours = embedding(images)
        theirs = patch_embedding_by_loops(
            images, embedding.conv.weight, embedding.conv.bias
        )
    assert ours.shape == (batch, grid**2, width)
    assert torch.allclose(ours, theirs, atol=1e-5)


# positions


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_resized_positions_equal_scipys_zoom(side, grid, seed):
    """Which is what big_vision calls."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(side**2, 3, generator=generator, dtype=torch.float64)
    square = table.reshape(side, side, 3).numpy()
    zoom = grid / side, grid / side, 1
    theirs = torch.from_numpy(scipy.ndimage.zoom(square, zoom, order=1))
    ours = resize_positions(table, grid)
    assert ours.shape == (grid**2, 3)
    if 1 in (side, grid):  # where SciPy has no second corner to hold
        assert torch.equal(ours[0], table[0])
    else:
        assert torch.allclose(ours, theirs.reshape(grid**2, 3), atol=1e-12)


def test_the_same_grid_gives_the_same_table():
    table = torch.randn(36, 5)
    assert torch.equal(resize_positions(table, 6), table)


def test_rows_and_columns_are_not_swapped():
    """A table that counts rows and columns still does when it is stretched."""
    side = torch.linspace(0, 1, 4)
    table = torch.cartesian_prod(side, side)
    side = torch.linspace(0, 1, 7)
    assert torch.allclose(
        resize_positions(table, 7), torch.cartesian_prod(side, side), atol=1e-6
    )


def test_hugging_face_resizes_differently():
    table = torch.randn(16, 5)
    square = table.T.reshape(1, 5, 4, 4)
    theirs = F.interpolate(square, size=(8, 8), mode="bicubic").flatten(2)[0].T
    assert (resize_positions(table, 8) - theirs).abs().max() > 0.1


@pytest.mark.parametrize("rows, grid", [(15, 4), (2, 4), (0, 4)])
def test_a_table_that_is_no_square_is_a_value_error(rows, grid):
    with pytest.raises(ValueError, match=f"table: expected a square .*got {rows}"):
        resize_positions(torch.ones(rows, 3), grid)


@pytest.mark.parametrize("grid", [0, -2])
def test_a_grid_below_one_is_a_value_error(grid):
    with pytest.raises(ValueError, match=f"grid: expected at least 1, got {grid}"):
        resize_positions(torch.ones(4, 3), grid)


# what the tower is


@given(st.integers(0, 1000))
def test_blocks_are_permutation_equivariant(seed):
    generator = torch.Generator().manual_seed(seed)
    block = build(SMALL)[0].layers[0]
    x = torch.randn(2, 9, 60, generator=generator)
    order = torch.randperm(9, generator=generator)
    with torch.no_grad():
        assert_close(block(x[:, order]), block(x)[:, order], 1e-5)


@torch.no_grad()
def test_only_positions_break_the_symmetry():
    tower, head = build(SMALL)
    images = pictures(SMALL, batch=1)
    squares = images.unflatten(3, (5, 4)).unflatten(2, (5, 4))
    order = torch.randperm(5)
    jigsaw = squares[:, :, order][:, :, :, :, order.flip(0)]
    jigsaw = jigsaw.flatten(4, 5).flatten(2, 3)
    assert (head(tower(jigsaw)) - head(tower(images))).abs().max() > 0.01
    tower.positions.zero_()
    assert_close(head(tower(jigsaw)), head(tower(images)), 1e-5)


@torch.no_grad()
def test_silent_sublayers_leave_the_stream_alone():
    block = build(SMALL)[0].layers[0]
    for last in (block.self_attn.o_proj, block.mlp.fc2):
        last.weight.zero_()
        last.bias.zero_()
    x = 5 * torch.randn(2, 9, 60) + 3
    assert torch.equal(block(x), x)


def test_every_patch_reaches_every_token():
    tower = build(SMALL)[0]
    images = pictures(SMALL, batch=1).requires_grad_()
    for place in (0, 24):
        token = tower(images)[0, place] @ torch.randn(60)
        (gradient,) = torch.autograd.grad(token, images)
        assert (F.unfold(gradient, 4, stride=4)[0].norm(dim=0) > 1e-6).all()


@torch.no_grad()
def test_pictures_of_a_batch_do_not_see_each_other():
    tower, head = build(SMALL)
    images = pictures(SMALL, batch=4)
    alone = torch.cat([head(tower(image[None])) for image in images])
    assert_close(head(tower(images)), alone, 1e-5)


@torch.no_grad()
def test_nan_spoils_its_own_picture_only():
    tower, head = build(SMALL)
    images = pictures(SMALL)
    images[1, 0, 3, 3] = torch.nan
    tokens = tower(images)
    assert tokens[1].isnan().all() and head(tokens)[1].isnan().all()
    assert tokens[[0, 2]].isfinite().all() and head(tokens)[[0, 2]].isfinite().all()


@torch.no_grad()
def test_an_empty_batch_gives_an_empty_batch():
    tower, head = build(SMALL)
    tokens = tower(pictures(SMALL, batch=0))
    assert tokens.shape == (0, 25, 60) and head(tokens).shape == (0, 60)


def test_gradcheck():
    config = VisionConfig(
        width=4,
        depth=1,
        mlp_dim=3,
        num_heads=2,
        head_dim=2,
        patch_size=2,
        image_size=4,
    )
    tower, head = (module.double() for module in build(config))
    images = pictures(config, batch=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: head(tower(x)), images)


def test_gradient_reaches_every_parameter():
    tower, head = build(SMALL)
    (head(tower(pictures(SMALL))) * torch.randn(60)).sum().backward()
    for module in (tower, head):
        for name, parameter in module.named_parameters():
            if "k_proj.bias" in name:  # softmax does not see it
                assert parameter.grad.abs().max() < 1e-4
            else:
                assert parameter.grad.abs().max() > 1e-4, name


@torch.no_grad()
def test_bfloat16():
    tower, head = (module.bfloat16() for module in build(SMALL))
    vector = head(tower(pictures(SMALL).bfloat16()))
    assert vector.dtype == torch.bfloat16
    exact = head.float()(tower.float()(pictures(SMALL)))
    assert_close(vector.float(), exact, 0.1)


# sizes and names


@pytest.mark.parametrize(
    "config, patches, parameters",
    [
        (SO400M_14_224, 256, 412_442_352),
        (SO400M_14_448, 1024, 413_327_088),
        (SO400M_14_896, 4096, 416_866_032),
        (TINY, 64, 1_875_264),
    ],
)
def test_presets_on_the_meta_device(config, patches, parameters):
    R = config.image_size
    with torch.device("meta"):
        tower, head = VisionTower(config), MAPHead(config)
        tokens = tower(torch.empty(2, 3, R, R))
        vector = head(tokens)
    assert config.num_patches == patches == config.grid**2
    assert tokens.shape == (2, patches, config.width) and tokens.is_meta
    assert vector.shape == (2, config.width)
    assert sum(p.numel() for p in tower.parameters()) == parameters


def test_parameters_have_the_names_of_the_checkpoint():
    names = set(VisionTower(dataclasses.replace(SMALL, depth=1)).state_dict())
    block = {
        f"layers.0.{part}.{kind}"
        for part in (
            "layer_norm1",
            "layer_norm2",
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.fc1",
            "mlp.fc2",
        )
        for kind in ("weight", "bias")
    }
    around = {"positions", "patch_embedding.conv.weight", "patch_embedding.conv.bias"}
    norm = {"post_layernorm.weight", "post_layernorm.bias"}
    assert names == block | around | norm
    heads = {name.split(".")[0] for name in MAPHead(SMALL).state_dict()}
    assert heads == {"probe", "attention", "layernorm", "mlp"}


def test_initialize():
    wide = dataclasses.replace(SMALL, patch_size=10, mlp_dim=200)
    tower, head = VisionTower(wide), MAPHead(wide)
    kernel = tower.patch_embedding.conv.weight
    assert kernel.std().item() == pytest.approx(300**-0.5, rel=0.05)
    bound = (6 / (60 + 200)) ** 0.5  # Xavier's
    for mlp in (tower.layers[0].mlp, head.mlp):
        assert 0.95 * bound < mlp.fc1.weight.abs().max() <= bound
    tower = VisionTower(dataclasses.replace(SMALL, image_size=200))
    assert tower.positions.std().item() == pytest.approx(60**-0.5, rel=0.05)
    assert 0.7 * (6 / 61) ** 0.5 < head.probe.abs().max() <= (6 / 61) ** 0.5
    for module in (tower, head):
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any(), name
            elif "norm" in name:
                assert (parameter == 1).all(), name


def test_initialize_leaves_norms_alone_and_accepts_maps_without_bias():
    layers = nn.Sequential(nn.Linear(4, 3, bias=False), nn.LayerNorm(3))
    nn.init.constant_(layers[1].bias, 2.0)
    before = layers[0].weight.clone()
    initialize(layers)
    assert (layers[1].bias == 2).all() and not torch.equal(layers[0].weight, before)


# errors


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_size": 225}, "image_size: expected a multiple of 14, got 225"),
        ({"patch_size": 15}, "image_size: expected a multiple of 15, got 224"),
        ({"num_heads": 12}, r"num_heads \* head_dim: expected 1152, got 864"),
        ({"head_dim": 64}, r"num_heads \* head_dim: expected 1152, got 1024"),
        ({"depth": 0}, "depth: expected at least 1, got 0"),
        ({"patch_size": -14}, "patch_size: expected at least 1, got -14"),
    ],
)
def test_sizes_that_do_not_fit_are_a_value_error(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SO400M_14_224, **change)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((2, 3, 21, 21), "expected a multiple of 4, got 21"),
        ((2, 3, 24, 24), "expected 20 x 20, got 24 x 24"),
        ((2, 3, 16, 16), "expected 20 x 20, got 16 x 16"),
        ((2, 1, 20, 20), r"expected squares \(B, 3, R, R\), got \(2, 1, 20, 20\)"),
        ((2, 4, 20, 20), r"expected squares \(B, 3, R, R\), got \(2, 4, 20, 20\)"),
        ((2, 3, 20, 24), r"expected squares \(B, 3, R, R\), got \(2, 3, 20, 24\)"),
        ((2, 20, 20, 3), r"expected squares \(B, 3, R, R\), got \(2, 20, 20, 3\)"),
        ((3, 20, 20), r"expected squares \(B, 3, R, R\), got \(3, 20, 20\)"),
        ((), r"expected squares \(B, 3, R, R\), got \(\)"),
    ],
)
def test_bad_pictures_are_a_value_error(shape, message, as_user):
    with pytest.raises(ValueError, match=f"images: {message}"):
        VisionTower(SMALL)(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_bytes_are_a_value_error(dtype, as_user):
    images = torch.zeros(2, 3, 20, 20, dtype=dtype)
    with pytest.raises(ValueError, match=f"expected floats in .*got {dtype}"):
        VisionTower(SMALL)(images)


def test_configs_are_frozen_and_need_names():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.width = 3
    with pytest.raises(TypeError):
        VisionConfig(192, 4, 768, 4, 48, 12, 96)


def test_compiles_into_one_graph(as_user):
    tower, head = build(SMALL)
    images = pictures(SMALL)
    whole = nn.Sequential(tower, head)
    compiled = torch.compile(whole, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(images), whole(images), 1e-6)
