"""The arrays of the JAX code: they compute here what they compute there."""

import io
import math
import tracemalloc
import weakref
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib import format as npy

from pgcore import big_vision
from pgcore.big_vision import load_npz
from pgcore.paligemma import PALIGEMMA2_3B_224, PALIGEMMA_3B_224
from tests.checkpoints import (
    GEMMA1,
    GEMMA2,
    VISION,
    is_one_short_line,
    random_picture,
    tiny_config,
    tiny_model,
    tiny_processor,
)
from tests.draws import assert_close

BOTH = pytest.mark.parametrize("text", [GEMMA1, GEMMA2], ids=["gemma1", "gemma2"])
HEADS = "MultiHeadDotProductAttention_0"


def kernel(weight):
    """What comes out for each feature alone: a linear map as JAX stores it."""
    return F.linear(torch.eye(weight.shape[1]), weight)  # in out


def vision_layer(layer, config):
    D, N, H = config.width, config.num_heads, config.head_dim
    attention = layer.self_attn
    arrays = {
        f"{HEADS}/out/kernel": kernel(attention.o_proj.weight).reshape(N, H, D),
        f"{HEADS}/out/bias": attention.o_proj.bias,
        "MlpBlock_0/Dense_0/kernel": kernel(layer.mlp.fc1.weight),
        "MlpBlock_0/Dense_0/bias": layer.mlp.fc1.bias,
        "MlpBlock_0/Dense_1/kernel": kernel(layer.mlp.fc2.weight),
        "MlpBlock_0/Dense_1/bias": layer.mlp.fc2.bias,
    }
    for number, norm in enumerate((layer.layer_norm1, layer.layer_norm2)):
        arrays[f"LayerNorm_{number}/scale"] = norm.weight
        arrays[f"LayerNorm_{number}/bias"] = norm.bias
    for word in ("query", "key", "value"):
        linear = getattr(attention, f"{word[0]}_proj")
        arrays[f"{HEADS}/{word}/kernel"] = kernel(linear.weight).reshape(D, N, H)
        arrays[f"{HEADS}/{word}/bias"] = linear.bias.reshape(N, H)
    return arrays


def text_layer(layer, config):
    D, N, K, H = config.width, config.num_heads, config.num_kv_heads, config.head_dim
    attention, mlp = layer.self_attn, layer.mlp

    def heads(linear, number):  # heads D H
        return kernel(linear.weight).reshape(D, number, H).movedim(1, 0)

    kv = heads(attention.k_proj, K), heads(attention.v_proj, K)
    arrays = {
        "attn/q_einsum/w": heads(attention.q_proj, N),
        "attn/kv_einsum/w": torch.stack(kv),
        "attn/attn_vec_einsum/w": kernel(attention.o_proj.weight).reshape(N, H, D),
        "mlp/gating_einsum": torch.stack(
            [kernel(mlp.gate_proj.weight), kernel(mlp.up_proj.weight)]
        ),
        "mlp/linear": kernel(mlp.down_proj.weight),
        "pre_attention_norm/scale": layer.pre_attention_norm.weight,
        "pre_ffw_norm/scale": layer.pre_mlp_norm.weight,
    }
    if config.post_norms:
        arrays["post_attention_norm/scale"] = layer.post_attention_norm.weight
        arrays["post_ffw_norm/scale"] = layer.post_mlp_norm.weight
    return arrays


def stacked(prefix, layers):
    return {prefix + n: torch.stack([la[n] for la in layers]) for n in layers[0]}


@torch.no_grad()
def jax_arrays(model):
    """What big_vision would have saved, had it trained this model."""
    vision, language, config = model.vision, model.language, model.config
    side, D = config.vision.patch_size, config.vision.width
    pixels = torch.eye(side * side * 3).reshape(-1, side, side, 3)  # one lit in each
    patches = F.conv2d(pixels.movedim(3, 1), vision.patch_embedding.conv.weight)
    arrays = {
        "img/embedding/kernel": patches.reshape(side, side, 3, D),
        "img/embedding/bias": vision.patch_embedding.conv.bias,
        "img/pos_embedding": vision.positions.reshape(1, -1, D),
        "img/Transformer/encoder_norm/scale": vision.post_layernorm.weight,
        "img/Transformer/encoder_norm/bias": vision.post_layernorm.bias,
        "img/head/kernel": kernel(model.projector.linear.weight),
        "img/head/bias": model.projector.linear.bias,
        "llm/embedder/input_embedding": language.embed_tokens.weight,
        "llm/final_norm/scale": language.norm.weight,
    }
    layers = [vision_layer(layer, config.vision) for layer in vision.layers]
    arrays |= stacked("img/Transformer/encoderblock/", layers)
    layers = [text_layer(layer, config.text) for layer in language.layers]
    arrays |= stacked("llm/layers/", layers)
    return {name: array.clone().numpy() for name, array in arrays.items()}


def write_npz(path, arrays, prefix="params/", save=np.savez):
    save(path, **{prefix + name: array for name, array in arrays.items()})
    return path


def assert_same_weights(loaded, model):
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def arrays(model):
    return jax_arrays(model)


# right


@BOTH
@pytest.mark.parametrize("prefix", ["", "params/"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_weights_come_back(text, prefix, save, tmp_path):
    model = tiny_model(text)
    path = write_npz(tmp_path / "a.npz", jax_arrays(model), prefix, save)
    loaded = load_npz(path, model.config)
    assert_same_weights(loaded, model)
    assert not loaded.training
    batch = tiny_processor()([random_picture()], ["caption en"])
    with torch.no_grad():
        assert_close(loaded(**batch).logits, model(**batch).logits, 1e-5)


def test_a_layer_computes_what_the_equations_of_big_vision_do(tmp_path, model, arrays):
    """Its einsums, as they stand in vit.py and gemma.py."""
    loaded = load_npz(write_npz(tmp_path / "a.npz", arrays), model.config)
    array = {name: torch.from_numpy(value) for name, value in arrays.items()}
    for number, layer in enumerate(loaded.vision.layers):
        of = {n: a[number] for n, a in array.items() if "encoderblock" in n}
        of = {n.split("encoderblock/")[1]: a for n, a in of.items()}
        x, heads = torch.randn(2, 4, 24), layer.self_attn
        for word in ("query", "key", "value"):
            expected = torch.einsum("btd,dnh->btnh", x, of[f"{HEADS}/{word}/kernel"])
            expected = (expected + of[f"{HEADS}/{word}/bias"]).flatten(2)
            assert_close(getattr(heads, f"{word[0]}_proj")(x), expected, 1e-6)
        encoded = torch.randn(2, 4, 3, 8)
        expected = torch.einsum("btnh,nhd->btd", encoded, of[f"{HEADS}/out/kernel"])
        expected = expected + of[f"{HEADS}/out/bias"]
        assert_close(heads.o_proj(encoded.flatten(2)), expected, 1e-6)
        hidden = x @ of["MlpBlock_0/Dense_0/kernel"] + of["MlpBlock_0/Dense_0/bias"]
        hidden = F.gelu(hidden, approximate="tanh")
        expected = hidden @ of["MlpBlock_0/Dense_1/kernel"]
        expected = expected + of["MlpBlock_0/Dense_1/bias"]
        assert_close(layer.mlp(x), expected, 1e-5)
    for number, layer in enumerate(loaded.language.layers):
        of = {n: a[number] for n, a in array.items() if "llm/layers" in n}
        of = {n.removeprefix("llm/layers/"): a for n, a in of.items()}
        x, heads = torch.randn(2, 4, 32), layer.self_attn
        q = torch.einsum("BTD,NDH->BTNH", x, of["attn/q_einsum/w"])
        k, v = torch.einsum("BSD,cKDH->cBSKH", x, of["attn/kv_einsum/w"])
        for linear, expected in (
            *((heads.q_proj, q), (heads.k_proj, k), (heads.v_proj, v)),
        ):
            assert_close(linear(x), expected.flatten(2), 1e-5)
        expected = torch.einsum("BTNH,NHD->BTD", q, of["attn/attn_vec_einsum/w"])
        assert_close(heads.o_proj(q.flatten(2)), expected, 1e-5)
        gate, up = (x @ w for w in of["mlp/gating_einsum"])
        expected = (F.gelu(gate, approximate="tanh") * up) @ of["mlp/linear"]
        assert_close(layer.mlp(x), expected, 1e-5)


def test_patches_are_read_row_by_row_and_colour_last(tmp_path, model, arrays):
    loaded = load_npz(write_npz(tmp_path / "a.npz", arrays), model.config)
    side = VISION.patch_size
    pixels = torch.randn(1, 14, 14, 3)  # as JAX has pictures
    weights = torch.from_numpy(arrays["img/embedding/kernel"])
    tiles = pixels.unfold(1, side, side).unfold(2, side, side)  # B i j C row column
    expected = torch.einsum("bijcrs,rscd->bijd", tiles, weights).flatten(1, 2)
    expected = expected + torch.from_numpy(arrays["img/embedding/bias"])
    assert_close(loaded.vision.patch_embedding(pixels.movedim(3, 1)), expected, 1e-5)


@pytest.mark.parametrize("kind", ["<f2", "<f4", "<f8", ">f4", ">f8"])
def test_floats_of_any_size_and_byte_order_are_read(kind, tmp_path, model, arrays):
    arrays = {name: array.astype(kind) for name, array in arrays.items()}
    loaded = load_npz(write_npz(tmp_path / "a.npz", arrays), model.config)
    tolerance = 1e-3 if kind == "<f2" else 0
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == torch.float32
        assert_close(weight, model.state_dict()[name], tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_is_two_bytes_without_a_type(dtype, tmp_path, model, arrays):
    """As ml_dtypes leaves it in a file."""
    arrays = {
        name: torch.from_numpy(array).bfloat16().view(torch.int16).numpy().view("V2")
        for name, array in arrays.items()
    }
    path = write_npz(tmp_path / "a.npz", arrays)
    loaded = load_npz(path, model.config, dtype=dtype)
    assert_same_weights(loaded, model.bfloat16().to(dtype))


def test_arrays_in_fortran_order_are_read(tmp_path, model, arrays):
    arrays = {name: np.asfortranarray(array) for name, array in arrays.items()}
    loaded = load_npz(write_npz(tmp_path / "a.npz", arrays), model.config)
    assert_same_weights(loaded, model)


def test_an_image_token_may_lie_outside_of_the_table(tmp_path):
    """The published files have no row for <image>: 257,152 rows, and that is its id."""
    image_token = tiny_processor().id_of("<image>")
    text = replace(GEMMA2, vocab_size=image_token)
    model = tiny_model(text)
    assert model.config.image_token == model.config.text.vocab_size
    path = write_npz(tmp_path / "a.npz", jax_arrays(model))
    loaded = load_npz(path, tiny_config(text))
    batch = tiny_processor()([random_picture()], ["caption en"], ["a cat"])
    output = loaded(**batch)
    output.loss.backward()
    assert output.logits.isfinite().all() and output.logits.shape[-1] == image_token
    with torch.no_grad():
        assert_close(output.logits, model(**batch).logits, 1e-5)


@pytest.mark.parametrize("config", [PALIGEMMA_3B_224, PALIGEMMA2_3B_224])
def test_the_published_sizes_have_an_array_for_each_weight(config):
    """The shapes that big_vision's own code gives its arrays."""
    text, names = config.text, big_vision.empty_model(config).state_dict()
    shapes = {}
    for name in names:
        source = big_vision._source(name)
        shapes[source.array] = big_vision._shape(source, config)
    N, K, D, F, L = (
        *(text.num_heads, text.num_kv_heads, text.width, text.mlp_dim, text.depth),
    )
    assert shapes["img/embedding/kernel"] == (14, 14, 3, 1152)
    assert shapes["img/pos_embedding"] == (1, 256, 1152)
    assert shapes["img/head/kernel"] == (1152, D)
    layer = "img/Transformer/encoderblock/"
    assert shapes[f"{layer}{HEADS}/query/kernel"] == (27, 1152, 16, 72)
    assert shapes[f"{layer}{HEADS}/out/kernel"] == (27, 16, 72, 1152)
    assert shapes[f"{layer}MlpBlock_0/Dense_0/kernel"] == (27, 1152, 4304)
    assert shapes["llm/layers/attn/q_einsum/w"] == (L, N, D, 256)
    assert shapes["llm/layers/attn/kv_einsum/w"] == (L, 2, K, D, 256)
    assert shapes["llm/layers/attn/attn_vec_einsum/w"] == (L, N, 256, D)
    assert shapes["llm/layers/mlp/gating_einsum"] == (L, 2, D, F)
    assert shapes["llm/layers/mlp/linear"] == (L, F, D)
    total = sum(math.prod(shape) for shape in shapes.values())
    assert total == sum(weight.numel() for weight in names.values())


def test_arrays_are_read_one_at_a_time(tmp_path, model, arrays, monkeypatch):
    path, alive, real = write_npz(tmp_path / "a.npz", arrays), [], npy.read_array

    def watched(*args, **kwargs):
        assert not any(reference() is not None for reference in alive)
        array = real(*args, **kwargs)
        alive.append(weakref.ref(array))
        return array

    monkeypatch.setattr(npy, "read_array", watched)
    assert_same_weights(load_npz(path, model.config), model)
    assert len(alive) == len(arrays)


# wrong


def refuse(path, config, *words):
    with pytest.raises(ValueError) as caught:
        load_npz(path, config)
    assert is_one_short_line(caught.value, 900), caught.value
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_a_file_that_is_not_there(tmp_path, model):
    for path in (tmp_path / "a.npz", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load_npz(path, model.config)


def test_every_array_must_be_there(tmp_path, model, arrays):
    for name in arrays:
        rest = {n: a for n, a in arrays.items() if n != name}
        path = write_npz(tmp_path / "a.npz", rest)
        refuse(path, model.config, f"- {name}")


def test_an_unknown_array(tmp_path, model, arrays):
    path = write_npz(tmp_path / "a.npz", arrays | {"opt/mu\n": np.zeros(3)})
    refuse(path, model.config, "+ opt/mu\\n (3,)")


def test_every_shape_must_be_that_of_the_configuration(tmp_path, model, arrays):
    """Axes in another order, even if as many numbers; another number of layers."""
    for name, array in arrays.items():
        for wrong in (array[None], array[..., :-1], array.T):
            if wrong.shape != array.shape:
                path = write_npz(tmp_path / "a.npz", arrays | {name: wrong})
                refuse(path, model.config, name, str(array.shape), str(wrong.shape))


@pytest.mark.parametrize(
    "change",
    [
        *({"depth": 1}, {"depth": 3}, {"num_heads": 2, "head_dim": 24}),
        *({"num_kv_heads": 4, "head_dim": 6}, {"vocab_size": 1499}, {"mlp_dim": 58}),
    ],
    ids=str,
)
def test_a_file_of_other_sizes_is_refused(change, tmp_path, model, arrays):
    """More layers than asked for, too; heads of another size, too."""
    path = write_npz(tmp_path / "a.npz", arrays)
    refuse(path, tiny_config(replace(GEMMA2, **change)), "llm/")
    fewer = replace(model.config, vision=replace(VISION, depth=2))
    refuse(path, fewer, "encoderblock", "(3, 24)")


def test_gemma_1_is_not_gemma_2(tmp_path, model, arrays):
    path = write_npz(tmp_path / "a.npz", arrays)
    refuse(path, tiny_config(GEMMA1), "+ llm/layers/post_attention_norm/scale")
    path = write_npz(tmp_path / "b.npz", jax_arrays(tiny_model(GEMMA1)))
    refuse(path, model.config, "- llm/layers/post_ffw_norm/scale")


@pytest.mark.parametrize(
    "kind", ["i4", "u2", "?", "c8", "V1", "V4", "g", "O", "U3", "M8[s]"]
)
def test_only_floats_are_read(kind, tmp_path, model, arrays):
    name = "llm/final_norm/scale"
    wrong = np.zeros(arrays[name].shape, kind)
    path = write_npz(tmp_path / "a.npz", arrays | {name: wrong})
    refuse(path, model.config, name)


def test_nothing_is_ever_unpickled(tmp_path, model, arrays):
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    name = "llm/final_norm/scale"
    wrong = np.array([Bomb()] * 32, object)
    path = write_npz(tmp_path / "a.npz", arrays | {name: wrong})
    refuse(path, model.config, name)


def test_an_array_that_comes_twice(tmp_path, model, arrays):
    again = {"params/img/head/bias": arrays["img/head/bias"]}
    path = write_npz(tmp_path / "a.npz", arrays | again, prefix="")
    refuse(path, model.config, "img/head/bias twice")


NO_NPZ = {
    "nothing": b"",
    "text": b"Not Found",
    "a zip of nothing": b"PK\x05\x06" + bytes(18),
    "a pickle": b"\x80\x04K\x01.",
    "half a header": b"PK\x03\x04" + bytes(9),
}


@pytest.mark.parametrize("content", NO_NPZ.values(), ids=NO_NPZ)
def test_what_is_no_npz(content, tmp_path, model):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    refuse(path, model.config)


def test_a_single_array_is_no_npz(tmp_path, model):
    np.save(tmp_path / "a.npy", np.zeros(3))
    refuse(tmp_path / "a.npy", model.config, "expected an .npz file")


def test_a_member_that_is_no_array(tmp_path, model, arrays):
    path = write_npz(tmp_path / "a.npz", arrays)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("README", "These are weights.")
    refuse(path, model.config, "expected an .npz file")


def test_a_header_of_four_gigabytes_is_not_believed(tmp_path, model, arrays):
    """From version 2 on its length is a number of four bytes."""
    whole = io.BytesIO()
    npy.write_array(whole, arrays.pop("llm/final_norm/scale"), version=(2, 0))
    path = write_npz(tmp_path / "a.npz", arrays, prefix="")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("llm/final_norm/scale.npy", whole.getvalue())
    refuse(path, model.config, "llm/final_norm/scale of version (2, 0)")


def test_a_header_that_asks_for_too_much_is_refused_before_memory_is(
    tmp_path, model, arrays
):
    header = io.BytesIO()
    fields = {"descr": "<f4", "fortran_order": False, "shape": (10**12,)}
    npy.write_array_header_1_0(header, fields)
    name = "llm/final_norm/scale"
    del arrays[name]
    path = write_npz(tmp_path / "a.npz", arrays, prefix="")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(f"{name}.npy", header.getvalue())
    tracemalloc.start()
    refuse(path, model.config, name, "(1000000000000,)")
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_data_that_do_not_fit_their_header(tmp_path, model, arrays):
    name = "llm/final_norm/scale"
    whole = io.BytesIO()
    npy.write_array(whole, arrays.pop(name))
    for content in (whole.getvalue()[:-4], whole.getvalue() + b"more"):
        path = write_npz(tmp_path / "a.npz", arrays, prefix="")
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(f"{name}.npy", content)
        refuse(path, model.config, name)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_file_is_refused_or_gives_the_same_weights(save, tmp_path, model):
    """Cut off, or with other bytes: the archive has checksums."""
    path = write_npz(tmp_path / "a.npz", jax_arrays(model), save=save)
    whole = path.read_bytes()
    places = st.integers(0, len(whole) - 1) | st.integers(1, 8000).map(
        lambda n: len(whole) - n  # the directory of the archive
    )

    @settings(max_examples=100)
    @given(st.none() | places, st.lists(st.tuples(places, st.integers(0, 255))))
    def check(length, changes):
        broken = bytearray(whole)
        for place, byte in changes:
            broken[place] = byte
        path.write_bytes(broken[:length])
        try:
            loaded = load_npz(path, model.config)
        except ValueError as error:
            assert is_one_short_line(error, 900) and str(path) in str(error)
        else:
            assert_same_weights(loaded, model)

    check()
