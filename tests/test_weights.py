"""Chapter 13: checkpoints of transformers, read strictly and written whole."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import pgcore
from pgcore import weights as module
from pgcore.files import read_json
from pgcore.lab.museum import weights as museum
from pgcore.paligemma import (
    PALIGEMMA2_3B_224,
    PALIGEMMA2_28B_224,
    PALIGEMMA_3B_224,
    PaliGemma,
    PaliGemmaConfig,
)
from pgcore.processing import Processor, load_processor, train_tokenizer
from pgcore.weights import (
    empty_model,
    hub_name,
    hugging_face_name,
    load_model,
    require_same,
    save_pretrained,
    stored_tensors,
)
from tests import draws
from tests.draws import fan_in, name_of
from tests.reference.weights import read_by_hand

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 5e-6
TABLE = "language_model.model.embed_tokens.weight"
KINDS = pytest.mark.parametrize("kind", ["gemma", "gemma2"])

# What transformers itself writes


VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 32,
    "vision_use_head": False,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,  # not 32 / 4
    "vocab_size": 1600,
}


@cache
def tokenizer():
    return train_tokenizer(["caption en a cat and two red apples"] * 3, 300)


@cache
def hf_processor():
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
    )
    images = transformers.SiglipImageProcessorPil(
        size={"height": 28, "width": 28}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    images.image_seq_length = 4
    return transformers.PaliGemmaProcessor(images, fast)


@cache
def hugging_face(kind, seed=0):
    transformers = pytest.importorskip("transformers")
    text = TEXT | {"model_type": kind}
    if kind == "gemma2":
        text |= {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0}
    config = transformers.PaliGemmaConfig(
        text_config=text,
        vision_config=VISION,
        projection_dim=32,
        image_token_id=hf_processor().image_token_id,
    )
    model = transformers.PaliGemmaForConditionalGeneration(config)
    model.set_attn_implementation("eager")
    return fan_in(model, seed).eval()


@pytest.fixture
def written(tmp_path):
    """Let transformers write a checkpoint; then, perhaps, rename and add."""

    def write(kind="gemma2", layout="new", head=None, sharded=False, dtype=None):
        folder = tmp_path / "checkpoint"
        model = hugging_face(kind)
        size = "50KB" if sharded else "5GB"
        model.save_pretrained(folder, max_shard_size=size)
        hf_processor().save_pretrained(folder)
        rewrite(folder, LAYOUTS[layout], head, dtype)
        return folder

    return write


# Written anew from peers of the loader: what each version of transformers wrote.
LAYOUTS = {
    "new": lambda n: n,  # by the version at hand
    "hub": lambda n: n.replace("vision_tower.", "vision_tower.vision_model."),
    "memory 4.52": lambda n: (
        "model."
        + n.replace("vision_tower.", "vision_tower.vision_model.").replace(
            "language_model.model.", "language_model."
        )
    ),
    "memory 5.6": lambda n: (
        "model." + n.replace("language_model.model.", "language_model.")
    ),
}
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def rewrite(folder, layout, head=None, dtype=None):
    """Save each weight file again, under other names; the index follows."""
    where = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        if head and TABLE in tensors:
            tensors[head] = tensors[TABLE].clone()
        assert not any("vision_model" in name for name in tensors)
        tensors = {
            name if name == head else layout(name): weight.to(dtype or weight.dtype)
            for name, weight in tensors.items()
        }
        save_file(tensors, path, {"format": "pt"})
        where |= dict.fromkeys(tensors, path.name)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))


def pictures(number):
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8))
        for i in range(number)
    ]


PROMPTS = ["caption en", "a", "how many cats and apples"]
SUFFIXES = ["a cat", "two <loc0012> apples", "5"]


def batch_of(processor):
    return processor(pictures(3), PROMPTS, SUFFIXES)


@torch.no_grad()
def run(model, batch):
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    return model(**inputs).logits[batch["attention_mask"]]


@torch.no_grad()
def run_oracle(model, batch):
    return model(
        pixel_values=batch["pixel_values"],
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"].long(),
        token_type_ids=batch["suffix_mask"].long(),
    ).logits[batch["attention_mask"]]


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item()
    assert error <= tolerance * expected.abs().max().item(), error


def assert_parity(model, processor, kind):
    batch = batch_of(processor)
    assert_close(run(model, batch), run_oracle(hugging_face(kind), batch))


@KINDS
@EVERY_LAYOUT
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("head", [None, "lm_head.weight"], ids=["tied", "head"])
def test_answers_as_transformers_does(written, kind, layout, sharded, head):
    folder = written(kind, layout, head, sharded)
    assert (len(list(folder.glob("*.safetensors"))) > 2) is sharded
    model, processor = pgcore.load(folder, device="cpu")
    assert_parity(model, processor, kind)
    assert not model.training


@pytest.mark.parametrize(
    "head", ["lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight"]
)
def test_a_copy_of_the_table_may_have_any_of_its_names(written, head):
    model, processor = pgcore.load(written(layout="hub", head=head), device="cpu")
    assert_parity(model, processor, "gemma2")


def ours(kind, seed=3):
    """A model of ours with other numbers, as large as theirs, and a processor."""
    processor = Processor(tokenizer(), 28, 4)
    text = {"gemma": draws.GEMMA1, "gemma2": draws.GEMMA2}[kind]
    text = replace(text, width=32, depth=2, mlp_dim=64, vocab_size=1600)
    text = replace(text, window=text.window and 4096)
    image_token = processor.id_of("<image>")
    config = PaliGemmaConfig(vision=draws.VISION, text=text, image_token=image_token)
    return fan_in(PaliGemma(config), seed).eval(), processor


@KINDS
@pytest.mark.parametrize("max_shard_bytes", [10**9, 60_000], ids=["whole", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_loads_what_is_saved(tmp_path, kind, max_shard_bytes, dtype):
    transformers = pytest.importorskip("transformers")
    model, processor = ours(kind)
    model = model.to(dtype)
    folder = tmp_path / "saved"
    save_pretrained(model, processor, folder, max_shard_bytes=max_shard_bytes)
    theirs, report = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    problems = {name: keys for name, keys in report.items() if keys}
    assert not problems
    assert theirs.dtype == dtype and theirs.config.text_config.model_type == kind
    assert theirs.lm_head.weight is theirs.get_input_embeddings().weight
    wide = type(theirs).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )  # compares numbers, not roundings
    batch = batch_of(processor)
    assert_close(run(model.float(), batch), run_oracle(wide, batch))


def test_transformers_prepares_as_the_saved_processor_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, processor = ours("gemma")
    save_pretrained(model, processor, tmp_path / "saved")
    theirs = transformers.PaliGemmaProcessor.from_pretrained(tmp_path / "saved")
    found = theirs(
        images=pictures(3),
        text=PROMPTS,
        suffix=SUFFIXES,
        padding=True,
        return_tensors="pt",
    )
    batch = batch_of(load_processor(tmp_path / "saved"))
    for name, tensor in batch_of(processor).items():
        assert torch.equal(batch[name], tensor)
    assert torch.equal(found["input_ids"], batch["input_ids"])
    assert torch.equal(found["attention_mask"].bool(), batch["attention_mask"])
    assert torch.equal(found["labels"], batch["labels"])
    # Their backend for torch rounds a few colours another way than Pillow.
    assert (found["pixel_values"] - batch["pixel_values"]).abs().max() < 2.1 / 255


def test_transformers_writes_the_same_as_the_original(tmp_path):
    """There and back: ours, transformers, ours."""
    transformers = pytest.importorskip("transformers")
    model, processor = ours("gemma2")
    save_pretrained(model, processor, tmp_path / "one")
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "one"
    )
    theirs.save_pretrained(tmp_path / "two")
    again = load_model(tmp_path / "two")
    assert again.config == model.config
    assert_equal_weights(again, model)


def assert_equal_weights(one, other):
    other = other.state_dict()
    assert one.state_dict().keys() == other.keys()
    for name, weight in one.state_dict().items():
        assert weight.dtype == other[name].dtype and torch.equal(weight, other[name])


# Twins


@pytest.mark.parametrize("twin", museum.TWINS, ids=name_of)
def test_wrong_loaders_fail_the_parity_test(written, twin):
    folder = written("gemma2", "new")
    processor = load_processor(folder)
    wrong = twin(folder)
    assert run(wrong, batch_of(processor)).isfinite().all()
    with pytest.raises(AssertionError):
        assert_parity(wrong, processor, "gemma2")


def test_the_blind_loader_sees_nothing_wrong_where_names_are_the_hubs(written):
    folder = written("gemma", "hub")
    assert_parity(museum.load_whatever_fits(folder), load_processor(folder), "gemma")


def test_strict_loading_cannot_see_a_swap(written):
    right = load_model(folder := written("gemma2"))
    for twin in (museum.norms_as_in_paligemma_1, museum.gate_and_up_swapped):
        wrong = twin(folder)
        assert wrong.state_dict().keys() == right.state_dict().keys()
        assert any(
            not torch.equal(weight, wrong.state_dict()[name])
            for name, weight in right.state_dict().items()
        )


def kernel_of(N, H, D):
    generator = torch.Generator().manual_seed(N * D)
    return torch.randn(N, H, D, generator=generator)


@pytest.mark.parametrize(("N", "H", "D"), [(4, 3, 12), (4, 3, 10)])
def test_kernels_reshaped_carelessly(N, H, D):
    kernel, heads = kernel_of(N, H, D), torch.randn(5, N, H)
    expected = torch.einsum("TNH,NHD->TD", heads, kernel)
    matrix = kernel.flatten(0, 1).T
    assert_close(heads.flatten(1) @ matrix.T, expected)
    square = N * H == D
    reshaped = museum.o_proj_reshaped_only(kernel)
    by_accident = museum.o_proj_by_accident(kernel)
    assert (reshaped.shape == matrix.shape) is square
    assert not torch.equal(reshaped, matrix)
    assert torch.equal(by_accident, matrix) is square


def test_keys_are_not_values():
    kernel = torch.randn(2, 3, 10, 4)
    key, value = museum.key_and_value_swapped(kernel)
    right = kernel.transpose(-2, -1).flatten(1, 2)
    assert key.shape == right[0].shape
    assert torch.equal(key, right[1]) and torch.equal(value, right[0])


def test_a_pickle_runs_code_and_safetensors_does_not(tmp_path):
    marker = tmp_path / "ran"
    torch.save({"w": Runs(marker)}, tmp_path / "weights.bin")
    assert not marker.exists()
    museum.load_pickle(tmp_path / "weights.bin")
    assert marker.exists()
    save_file({"w": torch.ones(2)}, tmp_path / "weights.safetensors")
    assert read_by_hand(tmp_path / "weights.safetensors")["w"].tolist() == [1, 1]


class Runs:
    """Unpickling it leaves a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


# Names


def published(D, depth, kv, F, post_norms):
    """Names and shapes as in the index on the hub, written from its listing."""
    tower, q = "vision_tower.vision_model.", 8 * 256
    shapes = {
        f"{tower}embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        f"{tower}embeddings.patch_embedding.bias": (1152,),
        f"{tower}embeddings.position_embedding.weight": (256, 1152),
        f"{tower}post_layernorm.weight": (1152,),
        f"{tower}post_layernorm.bias": (1152,),
        "multi_modal_projector.linear.weight": (D, 1152),
        "multi_modal_projector.linear.bias": (D,),
        "language_model.model.embed_tokens.weight": (257216, D),
        "language_model.model.norm.weight": (D,),
    }
    for i in range(27):
        layer = f"{tower}encoder.layers.{i}."
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{norm}.weight": (1152,), f"{layer}{norm}.bias": (1152,)}
        for name in "qkv":
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (1152, 1152)
            shapes[f"{layer}self_attn.{name}_proj.bias"] = (1152,)
        shapes |= {
            f"{layer}self_attn.out_proj.weight": (1152, 1152),
            f"{layer}self_attn.out_proj.bias": (1152,),
            f"{layer}mlp.fc1.weight": (4304, 1152),
            f"{layer}mlp.fc1.bias": (4304,),
            f"{layer}mlp.fc2.weight": (1152, 4304),
            f"{layer}mlp.fc2.bias": (1152,),
        }
    norms = ["input_layernorm", "post_attention_layernorm"]
    if post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for i in range(depth):
        layer = f"language_model.model.layers.{i}."
        shapes |= {f"{layer}{norm}.weight": (D,) for norm in norms}
        shapes |= {
            f"{layer}self_attn.q_proj.weight": (q, D),
            f"{layer}self_attn.k_proj.weight": (kv * 256, D),
            f"{layer}self_attn.v_proj.weight": (kv * 256, D),
            f"{layer}self_attn.o_proj.weight": (D, q),
            f"{layer}mlp.gate_proj.weight": (F, D),
            f"{layer}mlp.up_proj.weight": (F, D),
            f"{layer}mlp.down_proj.weight": (D, F),
        }
    return shapes


FULL_SIZE = {
    "paligemma-3b-pt-224": (
        PALIGEMMA_3B_224,
        published(2048, 18, 1, 16_384, False),
        603,
        2_923_466_480,
    ),
    "paligemma2-3b-pt-224": (
        PALIGEMMA2_3B_224,
        published(2304, 26, 4, 9216, True),
        727,
        3_032_242_416,
    ),
}


@pytest.mark.parametrize(
    ("config", "expected", "tensors", "parameters"), FULL_SIZE.values(), ids=FULL_SIZE
)
def test_names_and_shapes_are_those_of_the_published_index(
    config, expected, tensors, parameters
):
    model = empty_model(config)
    assert all(weight.is_meta for weight in model.state_dict().values())
    shapes = {
        hugging_face_name(name, config.text.post_norms): tuple(weight.shape)
        for name, weight in model.state_dict().items()
    }
    assert shapes == expected
    assert len(shapes) == len(model.state_dict()) == tensors, "a bijection"
    assert sum(map(math.prod, shapes.values())) == parameters


@pytest.mark.parametrize(
    "config", [PALIGEMMA_3B_224, PALIGEMMA2_28B_224], ids=["gemma", "gemma2"]
)
def test_every_layout_leads_to_one_name_and_back(config):
    kind = config.text.post_norms
    for name in empty_model(config).state_dict():
        there = hugging_face_name(name, kind)
        assert hub_name(there) == there, "idempotent"
        new = there.replace("vision_model.", "")
        for layout in LAYOUTS.values():
            assert hub_name(layout(new)) == there


def test_only_beginnings_are_renamed():
    for name in (
        "multi_modal_projector.model.vision_tower.x",
        "adapter.language_model.model.x",
        "lm_head.weight",
        "",
    ):
        assert hub_name(name) == name
    assert hub_name("model.model.x") == "model.x"


# Strict


SHAPES = st.dictionaries(
    st.sampled_from("abcdefghijklm"), st.tuples(st.integers(1, 3)), max_size=12
)


@given(SHAPES, SHAPES)
def test_require_same_raises_exactly_if_something_differs(expected, found):
    wrong = [f"- {n} {s}" for n, s in expected.items() if n not in found]
    wrong += [f"+ {n} {s}" for n, s in found.items() if n not in expected]
    wrong += [
        f"{n}: - {s} + {found[n]}"
        for n, s in expected.items()
        if n in found and found[n] != s
    ]
    if not wrong:
        return require_same(expected, found, "here")
    with pytest.raises(ValueError, match="^here: weights that do not fit") as caught:
        require_same(expected, found, "here")
    message = str(caught.value)
    assert all(line in message for line in wrong[:4])
    assert not any(line in message for line in wrong[4:])
    assert (f"and {len(wrong) - 4} more" in message) is (len(wrong) > 4)
    assert "\n" not in message


def change(folder, function):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    function(tensors)
    save_file(tensors, path)


NORM = "language_model.model.layers.1.input_layernorm.weight"
GATE = "language_model.model.layers.0.mlp.gate_proj.weight"
CHANGES = {
    "missing": (lambda t: t.pop(NORM), rf"- {NORM} \(32,\)$"),
    "unknown": (lambda t: t.update(x=torch.ones(3)), r"\+ x \(3,\)$"),
    "transposed": (
        lambda t: t.update({GATE: t[GATE].T.contiguous()}),
        rf"{GATE}: - \(64, 32\) \+ \(32, 64\)$",
    ),
    "one row less": (
        lambda t: t.update({TABLE: t[TABLE][1:]}),
        rf"{TABLE}: - \(1600, 32\) \+ \(1599, 32\)$",
    ),
    "a bias": (
        lambda t: t.update({GATE.replace("weight", "bias"): torch.ones(64)}),
        r"\+ .*gate_proj.bias \(64,\)$",
    ),
}


@pytest.mark.parametrize(("damage", "message"), CHANGES.values(), ids=CHANGES)
def test_what_does_not_fit_is_listed(written, damage, message):
    folder = written()
    change(folder, damage)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder)
    assert str(caught.value).startswith(str(folder))


def test_a_file_of_the_other_kind_is_refused(written):
    for kind, sign in (("gemma", r"\+ .*pre_feedforward"), ("gemma2", "- .*pre_feed")):
        folder = written("gemma2" if kind == "gemma" else "gemma")
        config = read_json(folder / "config.json")
        config["text_config"]["model_type"] = kind
        config["text_config"].pop("layer_types", None)
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=sign):
            load_model(folder)
        shutil.rmtree(folder)


def test_a_head_that_is_not_the_table_is_refused(written):
    folder = written(head="lm_head.weight")
    for other in (torch.ones(1600, 32), torch.ones(3, 32)):
        change(folder, lambda t, other=other: t.update({"lm_head.weight": other}))
        message = f"lm_head.weight: expected the numbers of {TABLE}"
        with pytest.raises(ValueError, match=message):
            load_model(folder)


def test_a_head_may_be_the_table_rounded(written):
    folder = written(head="lm_head.weight")
    change(folder, lambda t: t.update({"lm_head.weight": t[TABLE].bfloat16()}))
    assert load_model(folder).projector.linear.weight.dtype == torch.float32


def test_a_name_in_two_layouts_is_refused(written):
    folder = written()
    change(folder, lambda t: t.update({f"model.{NORM}": torch.ones(32)}))
    with pytest.raises(ValueError, match="input_layernorm.weight: expected once"):
        load_model(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_what_are_no_floats_is_refused(written, dtype):
    folder = written()
    change(folder, lambda t: t.update({NORM: t[NORM].to(dtype)}))
    with pytest.raises(ValueError, match=f"{NORM}: .*in BF16, F16, F32, F64, found"):
        load_model(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", 3, None])
def test_an_index_names_files_of_its_folder_only(written, name):
    folder = written(sharded=True)
    index = folder / "model.safetensors.index.json"
    for content in ({"weight_map": {"a": name}}, {"weight_map": [name]}, {}):
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match="weight_map: expected file names"):
            load_model(folder)


def test_a_missing_shard_is_named(written):
    folder = written(sharded=True)
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(FileNotFoundError, match=f"{last.name}: no such file"):
        load_model(folder)


def test_an_index_beside_a_whole_file_is_a_question(written):
    """transformers leaves the old one when it saves the other way."""
    folder = written(sharded=True)
    written(sharded=False)
    assert (folder / "model.safetensors.index.json").is_file()
    with pytest.raises(ValueError, match="found both; remove the one that is older"):
        load_model(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert load_model(folder)


def test_pickles_are_not_read(written):
    folder = written()
    torch.save({"w": torch.ones(2)}, folder / "pytorch_model.bin")
    assert load_model(folder), "it stands beside; nobody opens it"
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match="found only pytorch_model.bin; it is a pickle"
    ):
        load_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors: no such file$"):
        load_model(folder)


def test_a_broken_file_or_configuration_is_named(written):
    folder = written()
    (folder / "model.safetensors").write_bytes(b"\xff" * 99)
    with pytest.raises(ValueError, match="model.safetensors: expected safetensors"):
        load_model(folder)
    config = read_json(folder / "config.json")
    config["text_config"]["head_dim"] = -1
    (folder / "config.json").write_text(json.dumps(config))
    message = "config.json: text_config: head_dim: expected .* found -1"
    with pytest.raises(ValueError, match=message):
        load_model(folder)


# Numbers: dtypes, order, memory


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16], ids=str)
def test_dtypes(written, stored, wanted):
    dtype = getattr(torch, stored)
    folder = written(dtype=dtype)
    model = load_model(folder, dtype=wanted)
    right = load_file(folder / "model.safetensors")
    for name, weight in model.state_dict().items():
        there = hugging_face_name(name, True).replace("vision_model.", "")
        assert weight.dtype == (wanted or dtype)
        assert torch.equal(weight, right[there].to(weight.dtype))


def test_several_dtypes_become_float32(written):
    folder = written()
    change(folder, lambda t: t.update({NORM: t[NORM].half()}))
    kinds = {w.dtype for w in load_model(folder).state_dict().values()}
    assert kinds == {torch.float32}


def test_the_largest_is_read_first_and_each_once(written, monkeypatch):
    reads = []
    read = module.Stored.read

    def noted(stored, device, dtype):
        reads.append(stored)
        return read(stored, device, dtype)

    monkeypatch.setattr(module.Stored, "read", noted)
    load_model(written("gemma"), dtype=torch.bfloat16)
    sizes = [math.prod(stored.shape) for stored in reads]
    assert sizes == sorted(sizes, reverse=True)
    assert len({stored.name for stored in reads}) == len(reads) == 59


def test_uncast_each_file_is_mapped_once(written, monkeypatch):
    folder, opened = written("gemma", sharded=True), []
    checkpoint = module.read_checkpoint(folder)
    whole = module.safe_open

    def noted(path, *arguments, **options):
        opened.append(path)
        return whole(path, *arguments, **options)

    monkeypatch.setattr(module, "safe_open", noted)
    module.load_weights(checkpoint)
    assert len(opened) == len(set(opened)) > 1


def test_nothing_is_read_before_all_fits(written, monkeypatch):
    folder = written()
    change(folder, lambda t: t.pop(NORM))

    def never(*arguments, **options):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(module.Stored, "read", never)
    monkeypatch.setattr(module, "load_weights", never)
    with pytest.raises(ValueError, match="do not fit"):
        load_model(folder)


def test_training_changes_the_model_and_not_the_file(written):
    folder = written()
    before = (folder / "model.safetensors").read_bytes()
    model, processor = pgcore.load(folder, device="cpu")
    assert all(w.requires_grad and w.is_leaf for w in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = batch_of(processor)
    first = model(**batch).loss
    first.backward()
    optimizer.step()
    assert model(**batch).loss < first
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_model_survives_its_files(tmp_path):
    """Mapped pages stay when the folder is replaced, by the model itself too."""
    model, processor = ours("gemma2")
    folder = tmp_path / "saved"
    save_pretrained(model, processor, folder)
    mapped = load_model(folder)
    save_pretrained(mapped, processor, folder, max_shard_bytes=60_000)
    assert_equal_weights(mapped, model)
    assert_equal_weights(load_model(folder), model)
    shutil.rmtree(folder)
    assert_equal_weights(mapped, model)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_weights_are_pages_of_the_file_unless_they_are_cast(written):
    folder = written()
    for dtype, mapped in ((None, True), (torch.float32, True), (torch.half, False)):
        model = load_model(folder, dtype=dtype)
        lines = Path("/proc/self/maps").read_text().splitlines()
        ours = [line.split()[0] for line in lines if str(folder) in line]
        areas = [[int(end, 16) for end in area.split("-")] for area in ours]
        for weight in model.parameters():
            place = weight.data_ptr()
            assert any(start <= place < end for start, end in areas) is mapped


PEAK = """
import sys, torch
from pathlib import Path
from pgcore.weights import load_model

def memory(line):
    for entry in open("/proc/self/status"):
        if entry.startswith(line):
            return 1024 * int(entry.split()[1])

load_model(sys.argv[1], dtype=torch.bfloat16)
before = memory("VmRSS")
dtype = getattr(torch, sys.argv[3])
model = load_model(sys.argv[2], dtype=dtype)
total = sum(w.sum().item() for w in model.parameters())
weights = sum(w.nbytes for w in model.parameters())
print((memory("VmHWM") - before) / weights)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_the_memory_of_one_copy(tmp_path, dtype):
    """tests/load_3b.py does it at full size."""
    small, processor = ours("gemma")
    wide = replace(small.config.text, width=512, depth=6, mlp_dim=2048, vocab_size=8000)
    large = PaliGemma(replace(small.config, text=wide))
    for name, model in (("small", small), ("large", large)):
        save_pretrained(model, processor, tmp_path / name)
    result = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "small", tmp_path / "large", dtype],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 1.3


# Written whole


def test_shards_hold_at_most_what_they_may(tmp_path):
    model, processor = ours("gemma2")
    folder = tmp_path / "saved"
    save_pretrained(model, processor, folder, max_shard_bytes=60_000)
    index = read_json(folder / "model.safetensors.index.json")
    where = index["weight_map"]
    files = sorted(folder.glob("*.safetensors"))
    assert sorted(set(where.values())) == [file.name for file in files]
    total = 0
    for number, file in enumerate(files, start=1):
        assert file.name == f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = load_file(file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 60_000 or len(tensors) == 1, "the table is larger than a shard"
        assert {n for n, name in where.items() if name == file.name} == set(tensors)
        total += size
    assert index["metadata"]["total_size"] == total
    assert total == sum(w.nbytes for w in model.state_dict().values())


def test_a_checkpoint_is_replaced_as_a_whole(tmp_path):
    model, processor = ours("gemma2")
    folder = tmp_path / "saved"
    save_pretrained(model, processor, folder, max_shard_bytes=60_000)
    save_pretrained(model, processor, folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_the_saved_ids_are_those_of_the_processor(tmp_path):
    model, processor = ours("gemma2")
    save_pretrained(model, processor, tmp_path / "saved")
    for name in ("config.json", "generation_config.json"):
        found = read_json(tmp_path / "saved" / name)
        for key, token in (("bos", "<bos>"), ("eos", "<eos>"), ("pad", "<pad>")):
            assert found[f"{key}_token_id"] == processor.id_of(token)


@pytest.mark.parametrize("name", ["config.json.bak", "model.safetensors.old"])
def test_files_that_only_begin_like_ours_are_not_replaced(tmp_path, name):
    model, processor = ours("gemma")
    save_pretrained(model, processor, tmp_path / "saved")
    (tmp_path / "saved" / name).write_text("mine")
    with pytest.raises(ValueError, match="checkpoint alone, found"):
        save_pretrained(model, processor, tmp_path / "saved")
    assert (tmp_path / "saved" / name).read_text() == "mine"


@pytest.mark.parametrize("step", ["save_shards", "config_to_json", "Processor.save"])
def test_a_failure_leaves_the_old_checkpoint(tmp_path, monkeypatch, step):
    model, processor = ours("gemma2")
    folder = tmp_path / "saved"
    save_pretrained(model, processor, folder)

    def fails(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"pgcore.weights.{step}", fails)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(fan_in(PaliGemma(model.config), 9), processor, folder)
    monkeypatch.undo()
    assert_equal_weights(load_model(folder), model)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_other_peoples_files_are_not_replaced(tmp_path):
    model, processor = ours("gemma")
    (tmp_path / "thesis.tex").write_text("four years")
    with pytest.raises(ValueError, match="checkpoint alone, found thesis.tex"):
        save_pretrained(model, processor, tmp_path)
    with pytest.raises(ValueError, match="checkpoint alone, found a file"):
        save_pretrained(model, processor, tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "four years"


def test_weights_on_strides_are_saved_as_they_are(tmp_path):
    model, processor = ours("gemma")
    linear = model.projector.linear
    linear.weight = torch.nn.Parameter(torch.randn(24, 32).T)
    save_pretrained(model, processor, tmp_path / "saved")
    assert_equal_weights(load_model(tmp_path / "saved"), model)


# The file format, by hand


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
TENSORS = st.dictionaries(
    NAMES.filter(lambda name: name != "__metadata__"),
    st.tuples(
        st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
        st.lists(st.integers(1, 3), max_size=3),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60)
@given(TENSORS)
def test_a_file_read_by_hand_is_what_the_loader_reads(tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("files")
    tensors = {n: torch.randn(shape).to(dtype) for n, (dtype, shape) in drawn.items()}
    if len({hub_name(name) for name in tensors}) < len(tensors):
        return
    save_file(tensors, folder / "model.safetensors")
    by_hand = read_by_hand(folder / "model.safetensors")
    stored = stored_tensors(folder)
    assert by_hand.keys() == tensors.keys()
    assert stored.keys() == {hub_name(name) for name in tensors}
    for name, tensor in tensors.items():
        entry = stored[hub_name(name)]
        assert (entry.shape, entry.dtype) == (tuple(tensor.shape), tensor.dtype)
        for found in (by_hand[name], entry.read("cpu", tensor.dtype)):
            assert found.dtype == tensor.dtype and torch.equal(found, tensor)


IMPORTS = """
import sys, torch
from pgcore.paligemma import TINY, PaliGemma
from pgcore.weights import empty_model
before = len(sys.modules)
if sys.argv[1:]:
    with torch.device("meta"):
        PaliGemma(TINY)
else:
    assert all(weight.is_meta for weight in empty_model(TINY).parameters())
print(len(sys.modules) - before)
"""


@pytest.mark.parametrize("drawn", [True, False])
def test_an_empty_model_imports_no_compiler(drawn):
    command = [sys.executable, "-c", IMPORTS, *["drawn"] * drawn]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    number = int(result.stdout)
    assert number > 200 if drawn else number < 10
