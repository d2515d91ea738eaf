"""Broken checkpoints: the same model or one clear line, and never anything else."""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import pgcore
from pgcore import shards
from pgcore.weights import load_model, save_pretrained
from tests.checkpoints import (
    GEMMA1,
    GEMMA2,
    is_one_short_line,
    tiny_model,
    tiny_processor,
    write_checkpoint,
)

CONFIG, INDEX, WEIGHTS = (
    *("config.json", "model.safetensors.index.json", "model.safetensors"),
)
SHARD, OTHER_SHARD = (f"model-0000{n}-of-00003.safetensors" for n in (1, 2))
TOKENIZER, SETTINGS = "tokenizer.json", "preprocessor_config.json"
NORM = "language_model.model.norm.weight"
TABLE = "language_model.model.embed_tokens.weight"
NOT_READ = {"generation_config.json", "tokenizer_config.json"}


@cache
def good(kind):
    """A checkpoint in one file, or in three; as transformers 5 says it."""
    folder = Path(tempfile.mkdtemp(prefix="pgcore-good-")) / kind
    if kind == "three files":
        return folder, write_checkpoint(folder, GEMMA1, num_shards=4)
    model = write_checkpoint(folder, GEMMA2)
    if kind == "transformers 5":
        settings = json.loads((folder / SETTINGS).read_text())
        content = {"image_processor": settings}
        (folder / "processor_config.json").write_text(json.dumps(content))
        (folder / SETTINGS).unlink()
    return folder, model


KINDS = "one file", "three files", "transformers 5"


@pytest.fixture(scope="module", autouse=True)
def _leave_nothing_behind():
    yield
    for kind in KINDS:
        shutil.rmtree(good(kind)[0].parent)
    good.cache_clear()


@pytest.fixture
def copy(tmp_path):
    """A copy of a good checkpoint to break."""

    def make(kind="one file"):
        folder, _ = good(kind)
        return shutil.copytree(folder, tmp_path / "broken")

    return make


def assert_same_weights(model, expected):
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def load_or_one_line(folder, expected):
    """Load what may be broken. Return the error, or None for the same model."""
    try:
        model, _ = pgcore.load(folder, device="cpu")
    except (ValueError, FileNotFoundError) as error:
        assert type(error) in (ValueError, FileNotFoundError)
        assert is_one_short_line(error), f"{len(str(error))}: {error}"
        assert str(folder) in str(error) or "tokenizer" in str(error)
        return error
    assert_same_weights(model, expected)
    return None


def refused(folder, *words):
    _, expected = good("one file")
    error = load_or_one_line(folder, expected)
    assert error is not None
    for word in words:
        assert word in str(error)


def test_good_checkpoints_are_good():
    for kind in KINDS:
        assert load_or_one_line(*good(kind)) is None


# safetensors by hand


def parts_of(path):
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_parts(path, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", length or len(text)) + text + data)


def edit_header(path, change: Callable[[dict], object]):
    header, data = parts_of(path)
    change(header)
    write_parts(path, header, data)


def edit_tensors(path, change: Callable[[dict], object]):
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit_json(path, change: Callable[[dict], object]):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def transpose(name):
    return lambda tensors: tensors.update({name: tensors[name].T.contiguous()})


def cast(name, dtype):
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


BROKEN_WEIGHTS = {
    "a missing tensor": (lambda t: t.pop(NORM), f"- {NORM}"),
    "an extra tensor": (lambda t: t.update(extra=torch.ones(2)), "+ extra (2,)"),
    "an extra tensor of two lines": (lambda t: t.update({"a\nb": torch.ones(2)}), "+ "),
    "a long name": (lambda t: t.update({"long" * 999: torch.ones(2)}), "+ longlong"),
    "no tensor": (lambda t: t.clear(), "and"),
    "all of them extra": (
        lambda t: t.update({f"x.{n}{name}": t[name] * 1 for n in "ab" for name in t}),
        "more",
    ),
    "a transposed tensor": (transpose(TABLE), "(32, 1500)"),
    "a tensor of one axis more": (
        lambda t: t.update({NORM: t[NORM][None]}),
        "(1, 32)",
    ),
    "a tensor of many axes": (
        lambda t: t.update({NORM: t[NORM].view(32, *[1] * 60)}),
        NORM,
    ),
    "a tensor without axes": (lambda t: t.update({NORM: torch.ones(())}), "()"),
    "integers": (cast(NORM, torch.int32), NORM),
    "booleans": (cast(NORM, torch.bool), NORM),
    "eight bits": (cast(NORM, torch.float8_e4m3fn), NORM),
    "complex numbers": (cast(NORM, torch.complex64), NORM),
    "one tensor of two names": (
        lambda t: t.update({f"model.{TABLE}": t[TABLE] * 1}),
        TABLE,
    ),
    "a head that is another table": (
        lambda t: t.update({"lm_head.weight": t[TABLE] + 1}),
        "lm_head.weight",
    ),
    "a head of another shape": (
        lambda t: t.update({"lm_head.weight": t[TABLE].T.contiguous()}),
        "lm_head.weight",
    ),
}


@pytest.mark.parametrize(
    ("change", "words"), BROKEN_WEIGHTS.values(), ids=BROKEN_WEIGHTS
)
def test_weights_that_do_not_fit(change, words, copy):
    folder = copy()
    edit_tensors(folder / WEIGHTS, change)
    refused(folder, str(folder), words)


def test_a_head_that_is_the_table_once_more_is_right(copy):
    folder = copy()
    edit_tensors(folder / WEIGHTS, lambda t: t.update({"lm_head.weight": t[TABLE] * 1}))
    assert load_or_one_line(folder, good("one file")[1]) is None


def set_of(name, **facts):
    return lambda header: header[name].update(facts)


BROKEN_HEADERS = {
    "a shape that does not fit its place": set_of(NORM, shape=[33]),
    "a shape of another order": set_of(TABLE, shape=[32, 1500]),
    "a shape of nothing": set_of(NORM, shape=[0]),
    "a shape below 0": set_of(NORM, shape=[-32]),
    "a shape of halves": set_of(NORM, shape=[32.5]),
    "a shape that overflows": set_of(NORM, shape=[2**62, 2**62, 32]),
    "a shape of 2 ** 70": set_of(NORM, shape=[2**70]),
    "many axes": set_of(NORM, shape=[32] + [1] * 9999),
    "a place behind the end": set_of(NORM, data_offsets=[10**9, 10**9 + 128]),
    "a place before the beginning": set_of(NORM, data_offsets=[-128, 0]),
    "a place of one number": set_of(NORM, data_offsets=[0]),
    "a place that ends before it begins": set_of(NORM, data_offsets=[128, 0]),
    "another type": set_of(NORM, dtype="I32"),
    "no type": set_of(NORM, dtype="float32\n"),
    "a type of another size": set_of(NORM, dtype="BF16"),
    "no facts": lambda header: header.update({NORM: None}),
    "a list of facts": lambda header: header.update({NORM: []}),
    "two at one place": lambda header: header[NORM].update(
        data_offsets=header["multi_modal_projector.linear.bias"]["data_offsets"]
    ),
    "a name less": lambda header: header.pop(NORM),
    "metadata that are none": lambda header: header.update(__metadata__=[1, 2]),
}


@pytest.mark.parametrize("change", BROKEN_HEADERS.values(), ids=BROKEN_HEADERS)
def test_headers_that_lie(change, copy):
    folder = copy()
    edit_header(folder / WEIGHTS, change)
    refused(folder, str(folder))


BROKEN_FILES = {
    "nothing": lambda content: b"",
    "seven bytes": lambda content: content[:7],
    "eight bytes": lambda content: content[:8],
    "half a header": lambda content: content[:999],
    "no data": lambda content: content[: 8 + struct.unpack("<Q", content[:8])[0]],
    "half": lambda content: content[: len(content) // 2],
    "a byte less": lambda content: content[:-1],
    "a byte more": lambda content: content + b"\0",
    "a header of 2 ** 63": lambda content: struct.pack("<Q", 2**63) + content[8:],
    "a header of 99 MB": lambda content: struct.pack("<Q", 99 << 20) + content[8:],
    "a header of the whole file": lambda content: (
        struct.pack("<Q", len(content) - 8) + content[8:]
    ),
    "a header of nothing": lambda content: struct.pack("<Q", 0) + content[8:],
    "a header of two bytes": lambda content: struct.pack("<Q", 2) + b"{}",
    "a header that is deep": lambda content: (
        struct.pack("<Q", 200_000) + b'{"a":' * 40_000
    ),
    "a git-lfs pointer": lambda content: (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"
    ),
    "a page": lambda content: b"<html>\n<title>401</title>\n</html>\n" * 99,
    "a pickle": lambda content: b"\x80\x04K\x01." * 99,
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_weight_files_that_are_none(change, kind, copy):
    folder = copy(kind)
    path = folder / (OTHER_SHARD if kind == "three files" else WEIGHTS)
    path.write_bytes(change(path.read_bytes()))
    refused(folder, str(folder))


def test_every_file_that_is_read_must_be_there(tmp_path):
    """Or a loop of links, a broken link, a folder: none of them is a file."""
    for kind in KINDS:
        folder, expected = good(kind)
        for path in folder.iterdir():
            for put in (
                lambda path: None,
                lambda path: path.symlink_to(path.name),
                lambda path: path.symlink_to("nowhere"),
                lambda path: path.mkdir(),
            ):
                broken = shutil.copytree(folder, tmp_path / "broken")
                (broken / path.name).unlink()
                put(broken / path.name)
                error = load_or_one_line(broken, expected)
                assert (error is None) == (path.name in NOT_READ), path.name
                assert error is None or type(error) is FileNotFoundError
                shutil.rmtree(broken)


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "/etc/passwd", "a/b.safetensors", "", ".", "..", "\n"),
        *("missing.safetensors", CONFIG, "nu\0ll", "long" * 999, "two\nlines"),
        *(None, 7, ["model-00001-of-00003.safetensors"], {}),
    ],
    ids=lambda name: repr(name)[:20],
)
def test_an_index_names_files_of_its_folder(name, copy, tmp_path):
    shutil.copy(good("one file")[0] / WEIGHTS, tmp_path / "x.safetensors")
    folder = copy("three files")
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({NORM: name}))
    refused(folder, str(folder))


@pytest.mark.parametrize("content", [None, [], {}, "a", 7, {"a": {}}], ids=repr)
def test_an_index_that_maps_nothing(content, copy):
    folder = copy("three files")
    edit_json(folder / INDEX, lambda index: index.update(weight_map=content))
    refused(folder, str(folder))


def test_a_tensor_that_is_in_two_files(copy):
    folder = copy("three files")
    other = load_file(folder / OTHER_SHARD)
    edit_tensors(folder / SHARD, lambda tensors: tensors.update(other))
    refused(folder, str(folder))


def test_a_shard_of_another_model(copy):
    folder = copy("three files")
    shutil.copy(good("one file")[0] / WEIGHTS, folder / SHARD)
    refused(folder, str(folder))


def test_a_file_beside_an_index_is_refused(copy):
    """One of them is old; transformers reads the one, the index names the others."""
    folder = copy("three files")
    shutil.copy(good("one file")[0] / WEIGHTS, folder / WEIGHTS)
    refused(folder, str(folder), WEIGHTS, INDEX)


# the processor


BAD_SETTINGS = {
    "a size": [None, [], {}, 14.5, "14", {"height": 14}, {"shortest_edge": 14}]
    + [{"height": h, "width": h} for h in (0, -1, 10**9, 14.0, True, "14", None)]
    + [{"height": 14, "width": 15}, {"height": "1\n4" * 999, "width": 14}],
    "image_seq_length": [None, 0, -1, 10**9, 4.0, True, "4", [], "4\n" * 999],
    "resample": [2, None, "bicubic", [], "3\n" * 999],
    "image_mean": [None, 0.5, [0.5], [0.4] * 3, [0.5] * 9999, "x\n" * 999],
    "do_normalize": [False, None, "yes"],
    "rescale_factor": [1, None, "1/255"],
}


@pytest.mark.parametrize("kind", ["one file", "transformers 5"])
@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_settings_of_pictures_that_we_do_not_have(name, kind, copy):
    folder = copy(kind)
    path = folder / (SETTINGS if kind == "one file" else "processor_config.json")
    name_there = "size" if name == "a size" else name
    for value in BAD_SETTINGS[name]:
        data = json.loads((good(kind)[0] / path.name).read_text())
        settings = data.get("image_processor", data)
        settings[name_there] = value
        path.write_text(json.dumps(data))
        refused(folder, str(path), name_there)


@pytest.mark.parametrize("value", [None, [], 7, "a", {}], ids=repr)
def test_no_settings_of_pictures(value, copy):
    folder = copy("transformers 5")
    path = folder / "processor_config.json"
    edit_json(path, lambda data: data.update(image_processor=value))
    refused(folder, str(path))


BROKEN_TOKENIZERS = {
    "nothing": lambda text: "",
    "half": lambda text: text[: len(text) // 2],
    "an object": lambda text: "{}",
    "a list": lambda text: "[]",
    "null": lambda text: "null",
    "a page": lambda text: "<html>\n</html>\n",
    "deep": lambda text: "[" * 100_000,
    "deep inside": lambda text: text.replace(
        '"normalizer": {', '"normalizer": {"a":' * 999
    ),
    "no <image>": lambda text: text.replace("<image>", "<picture>"),
    "no <eos>": lambda text: text.replace("<eos>", "</s>"),
    "no <pad>": lambda text: text.replace("<pad>", "<nothing>"),
    "another kind of model": lambda text: text.replace('"BPE"', '"WordPiece"'),
    "an unknown kind of model": lambda text: text.replace('"BPE"', '"LSTM"'),
    "a version of the future": lambda text: text.replace('"1.0"', '"9.0"'),
}


@pytest.mark.parametrize("change", BROKEN_TOKENIZERS.values(), ids=BROKEN_TOKENIZERS)
def test_tokenizers_that_are_none(change, copy):
    folder = copy()
    path = folder / TOKENIZER
    path.write_text(change(path.read_text(encoding="utf8")), encoding="utf8")
    refused(folder, "tokenizer")


# any damage


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 2, 3, 10**9, 2**63, 10**400])
    | st.floats()
    | st.text()
    | st.sampled_from(["../x", "/etc/passwd", "a\nb", "x" * 9999]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)


def places_of(value, place=()):
    """Every path into a JSON value."""
    yield place
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in list(items)[:60]:
            yield from places_of(inner, (*place, key))


def damage_json(draw, path):
    try:
        data = json.loads(path.read_text(encoding="utf8"))
    except ValueError:  # broken before
        return damage_bytes(draw, path)
    place = draw(st.sampled_from(list(places_of(data))))
    value = draw(json_values)
    if not place:
        data = value
    else:
        inner = data
        for key in place[:-1]:
            inner = inner[key]
        if draw(st.booleans()):
            inner[place[-1]] = value
        else:
            del inner[place[-1]]
    path.write_text(json.dumps(data), encoding="utf8")  # NaN and Infinity, too


def damage_bytes(draw, path, end=None):
    content = bytearray(path.read_bytes())
    end = len(content) if end is None else min(end, len(content))
    if end:
        for place in draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=3)):
            content[place] = draw(st.integers(0, 255))
    path.write_bytes(content)


def cut_off(draw, path):
    with path.open("r+b") as file:
        file.truncate(draw(st.integers(0, path.stat().st_size)))


def damage_header(draw, path):
    """Bytes of numbers have no checksum: only those of names and places can be seen."""
    with path.open("rb") as file:
        start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    damage_bytes(draw, path, 8 + min(length, 99_999))


def damage_facts(draw, path):
    try:
        header, data = parts_of(path)
        names = [name for name in header if name != "__metadata__"]
    except (ValueError, struct.error):
        return cut_off(draw, path)
    name = draw(st.sampled_from(sorted(names)))
    if draw(st.booleans()):
        header[draw(json_values.filter(lambda v: isinstance(v, str)))] = header.pop(
            name
        )
    else:
        fact = draw(st.sampled_from(["shape", "dtype", "data_offsets"]))
        header[name][fact] = draw(
            json_values | st.lists(st.integers(), min_size=2, max_size=2)
        )
    return write_parts(path, header, data)


def put_something_else(draw, path):
    path.unlink()
    kind = draw(st.sampled_from(["nothing", "loop", "folder", "text", "empty"]))
    if kind == "loop":
        path.symlink_to(path.name)
    elif kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text(draw(st.text()))
    elif kind == "empty":
        path.touch()


@settings(max_examples=400)
@given(st.sampled_from(KINDS), st.data())
def test_any_damage_ends_in_the_same_model_or_in_one_line(kind, data):
    folder, expected = good(kind)
    with tempfile.TemporaryDirectory(prefix="pgcore-") as temporary:
        broken = shutil.copytree(folder, Path(temporary) / "broken")
        for _ in range(data.draw(st.integers(1, 3))):
            files = sorted(path for path in broken.iterdir() if path.is_file())
            path = data.draw(st.sampled_from(files), label="file")
            if path.suffix == ".json":
                ways = [damage_json, damage_json, damage_bytes, cut_off]
            else:
                ways = [damage_header, damage_facts, cut_off]
            ways.append(put_something_else)
            data.draw(st.sampled_from(ways), label="damage")(data.draw, path)
        load_or_one_line(broken, expected)


# within bounded memory


BOMBS = {
    **{
        f"{part}.{name} {size}": (CONFIG, part, {name: size})
        for part in ("vision_config", "text_config")
        for name, size in (
            *(("hidden_size", 999_999), ("num_hidden_layers", 1000)),
            *(("intermediate_size", 1_000_000), ("hidden_size", 10**15)),
        )
    },
    "vocab_size": (CONFIG, "text_config", {"vocab_size": 10_000_000}),
    "image_size": (CONFIG, "vision_config", {"image_size": 10_000, "patch_size": 1}),
    "patch_size": (CONFIG, "vision_config", {"image_size": 9999, "patch_size": 9999}),
    "all": (
        CONFIG,
        "text_config",
        {"hidden_size": 10**6, "intermediate_size": 10**6, "vocab_size": 10**7}
        | {"num_attention_heads": 10_000, "num_key_value_heads": 10_000}
        | {"head_dim": 10_000},
    ),
    "pictures": (SETTINGS, None, {"size": {"height": 10_000, "width": 10_000}}),
    "image_seq_length": (SETTINGS, None, {"image_seq_length": 10_000}),
}
MEASURE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (12 << 30,) * 2)  # torch alone maps some of it
import pgcore
pgcore.load(sys.argv[1], device="cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for folder in sys.argv[2:]:
    try:
        pgcore.load(folder, device="cpu")
        print("loaded", folder)
    except (ValueError, FileNotFoundError) as error:
        print(f"{folder}: {error}")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_absurd_sizes_are_refused_within_bounded_memory(tmp_path):
    source, _ = good("one file")
    folders = []

    def new(name):
        folders.append(shutil.copytree(source, tmp_path / name.replace(" ", "-")))
        return folders[-1]

    for name, (file, part, change) in BOMBS.items():
        edit_json(
            new(name) / file,
            lambda data, part=part, change=change: (
                data[part] if part else data
            ).update(change),
        )
    (new("many-lists") / CONFIG).write_text('{"a": [' + "[]," * 3_000_000 + "[]]}")
    for size in (10**9, 10**12):
        for name in (CONFIG, SETTINGS, TOKENIZER, WEIGHTS):
            os.truncate(new(f"{name}-{size}") / name, size)  # a hole: it takes no room
    edit_header(new("shape") / WEIGHTS, set_of(NORM, shape=[10**15]))
    path = new("zeros") / WEIGHTS
    path.write_bytes(struct.pack("<Q", 10**8) + path.read_bytes()[8:])
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, source, *folders],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    *lines, growth = result.stdout.splitlines()
    assert len(lines) == len(folders)
    for line, folder in zip(lines, folders, strict=True):
        assert line.startswith(f"{folder}: ") and len(line) < 800, line
    assert int(growth) < 400  # MB


def test_absurd_sizes_take_no_time_either():
    """A thousand layers of nothing are made and compared."""
    cost = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with tempfile.TemporaryDirectory() as temporary:
        folder = shutil.copytree(good("one file")[0], Path(temporary) / "broken")
        edit_json(
            folder / CONFIG,
            lambda data: [
                data[part].update(num_hidden_layers=1000, layer_types=None)
                for part in ("vision_config", "text_config")
            ],
        )
        refused(folder, "more")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - cost < 30


# the file is not the model's memory


def test_changing_a_loaded_model_does_not_change_its_file(copy):
    folder = copy()
    model = load_model(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_weights(load_model(folder), good("one file")[1])


def test_saving_a_model_over_the_files_it_was_loaded_from(copy):
    folder = copy()
    model, processor = pgcore.load(folder, device="cpu")
    save_pretrained(model, processor, folder)
    assert_same_weights(model, good("one file")[1])
    assert load_or_one_line(folder, good("one file")[1]) is None


# Ctrl-C


def stop_at(patch, number, stop):
    """The n-th write stops half way through."""
    from pgcore.processing import Processor

    count = 0

    def watched(real, spoil):
        def step(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                spoil(*args)
                raise stop
            return real(*args, **kwargs)

        return step

    half = b'{"half'
    patch.setattr(
        shards,
        "save_file",
        watched(shards.save_file, lambda _, path, *rest: path.write_bytes(half)),
    )
    patch.setattr(
        Path,
        "write_text",
        watched(Path.write_text, lambda path, *_: path.write_bytes(half)),
    )
    patch.setattr(Processor, "save", watched(Processor.save, lambda *_: None))
    patch.setattr(os, "replace", watched(os.replace, lambda *_: None))
    return lambda: count


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left")])
@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_a_save_that_is_stopped_leaves_the_old_checkpoint_or_the_new(
    there, stop, tmp_path
):
    old, new = tiny_model(GEMMA2, seed=1), tiny_model(GEMMA2, seed=2)
    folder, number = tmp_path / "model", 0
    if there:
        save_pretrained(old, tiny_processor(), folder, max_shard_bytes=100_000)
    while True:
        number += 1
        with pytest.MonkeyPatch.context() as patch:
            count = stop_at(patch, number, stop)
            try:
                save_pretrained(new, tiny_processor(), folder, max_shard_bytes=200_000)
            except (KeyboardInterrupt, OSError) as error:
                assert error is stop or isinstance(error, KeyboardInterrupt)
        if count() < number:
            break
        assert [path.name for path in tmp_path.iterdir()] == ["model"] * there
        if there:
            assert load_or_one_line(folder, old) is None
    assert number > 8
    assert load_or_one_line(folder, new) is None
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_save_never_replaces_what_is_no_checkpoint(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    for name in ("notes.txt", "model.bin", "config.json.bak", ".hidden", "more/a"):
        folder = tmp_path / name.replace("/", "-")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("the user's")
        with pytest.raises(ValueError, match="expected a new folder or one of"):
            save_pretrained(model, processor, folder)
        assert (folder / name).read_text() == "the user's"
    with pytest.raises(ValueError, match="found a file"):
        save_pretrained(model, processor, folder / "more" / "a")
