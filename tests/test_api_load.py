"""pgcore.load: what it finds, what it downloads, and what it says if it does not."""

import fnmatch
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub

import pgcore
from pgcore import api
from pgcore.api import (
    choose_device,
    choose_dtype,
    find_checkpoint,
    load,
    require_fit,
)
from pgcore.paligemma import TINY, PaliGemma, PaliGemmaConfig
from pgcore.processing import Processor
from pgcore.weights import save_pretrained
from tests.checkpoints import (
    GEMMA1,
    GEMMA2,
    VISION,
    is_one_short_line,
    tiny_config,
    tiny_model,
    tiny_processor,
    write_checkpoint,
)

HUB_NAME = "google/paligemma2-3b-mix-224"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint, and the model it was written from."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    return folder, write_checkpoint(folder)


def refused(kind, function, *args, **options):
    with pytest.raises(kind) as caught:
        function(*args, **options)
    assert type(caught.value) is kind
    assert is_one_short_line(caught.value, 400), str(caught.value)
    return str(caught.value)


# the package


def test_the_package_gives_its_public_names_when_asked():
    assert pgcore.load is load and pgcore.generate is api.generate
    assert pgcore.PaliGemma is PaliGemma
    assert pgcore.PaliGemmaConfig is PaliGemmaConfig
    assert pgcore.Processor is Processor
    assert all(hasattr(pgcore, name) for name in pgcore.__all__)
    with pytest.raises(AttributeError, match="no attribute 'paint'"):
        pgcore.paint  # noqa: B018


def test_importing_it_imports_nothing_heavy_until_a_name_is_asked_for():
    code = (
        "import sys, pgcore\n"
        "heavy = {'torch', 'numpy', 'PIL', 'tokenizers', 'huggingface_hub'}\n"
        "assert pgcore.__version__ and not heavy & set(sys.modules)\n"
        "from pgcore import load\n"
        "assert 'torch' in sys.modules and 'huggingface_hub' not in sys.modules\n"
        "assert 'transformers' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


# a folder


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_a_folder_is_loaded(written, kind):
    folder, model = written
    loaded, processor = load(kind(folder), device="cpu")
    weights = model.state_dict()
    assert all(torch.equal(w, weights[n]) for n, w in loaded.state_dict().items())
    assert loaded.config == model.config and not loaded.training
    assert processor.image_size == VISION.image_size


def test_a_folder_relative_to_the_current_one(written, monkeypatch):
    folder, _ = written
    monkeypatch.chdir(folder.parent)
    assert find_checkpoint("tiny/") == folder.relative_to(folder.parent)
    (folder.parent / "a").mkdir()
    shutil.copytree(folder, folder.parent / "a" / "b")
    assert find_checkpoint("a/b").is_dir()  # before the hub is asked


def test_a_folder_that_is_a_link(written, tmp_path):
    (tmp_path / "link").symlink_to(written[0])
    load(tmp_path / "link", device="cpu")


def test_what_is_no_folder_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", pytest.fail)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    (tmp_path / "a" / "loop").symlink_to("loop")
    for source in (
        *(tmp_path / "missing", tmp_path / "a" / "file", "a/file", "a/loop"),
        *("", "missing", "../x", "./x", "b/..", "-a/b", "a/b/c", "https://hf.co/a/b"),
        *("two\nlines", "nu\0ll", "long" * 999, "~/x", "a b/c"),
    ):
        message = refused(FileNotFoundError, find_checkpoint, source)
        assert "expected a folder, a name on the hub such as" in message


def test_an_empty_folder(tmp_path):
    message = refused(FileNotFoundError, load, tmp_path)
    assert str(tmp_path) in message and "no such file" in message


# tiny


def test_tiny_is_the_checkpoint_that_ships():
    folder = find_checkpoint("tiny")
    assert folder == Path(api.__file__).parent / "assets" / "tiny"
    model, processor = load("tiny", device="cpu")
    assert model.config == TINY and processor.image_size == TINY.vision.image_size


def test_what_ships_of_tiny_is_at_most_ten_megabytes():
    files = [path for path in find_checkpoint("tiny").iterdir() if path.is_file()]
    assert {"model.safetensors", "README.md", "mixture.csv"} <= {f.name for f in files}
    assert sum(path.stat().st_size for path in files) <= 10_000_000


# the hub


def raising(error):
    def download(*_, **__):
        raise error

    return download


def answer(kind, status, message="", **options):
    request = httpx.Request("GET", f"https://huggingface.co/{HUB_NAME}")
    return kind(message, response=httpx.Response(status, request=request), **options)


SERVER = "500 Server Error: Internal\n\nRequest ID: Root=1-2-3\n" + "x" * 999


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (answer(hub.GatedRepoError, 403, "403\nno"), ValueError, "licence must be"),
        (
            answer(hub.RepositoryNotFoundError, 401, "401\nno"),
            FileNotFoundError,
            "hf auth login",
        ),
        (
            hub.LocalEntryNotFoundError("Cannot find it.\nOutgoing traffic is off."),
            FileNotFoundError,
            "cannot be downloaded: Cannot find it.",
        ),
        (hub.OfflineModeIsEnabled("offline\nmode"), FileNotFoundError, "offline"),
        (answer(hub.HfHubHTTPError, 500, SERVER), FileNotFoundError, "500 Server"),
        (answer(hub.DisabledRepoError, 403, "off"), FileNotFoundError, "off"),
        (httpx.ReadTimeout("too slow"), FileNotFoundError, "too slow"),
        (httpx.ReadTimeout(""), FileNotFoundError, "ReadTimeout"),
        (OSError(28, "No space left on device"), FileNotFoundError, "No space left"),
        (OSError(), FileNotFoundError, "OSError"),
        (hub.HFValidationError("Repo id must\nnot"), FileNotFoundError, "Repo id must"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_hub_answers_is_said_in_one_line(error, kind, words, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    message = refused(kind, load, HUB_NAME)
    assert HUB_NAME in message and words in message


def test_ctrl_c_stops_a_download(monkeypatch):
    stop = raising(KeyboardInterrupt())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stop)
    with pytest.raises(KeyboardInterrupt):
        load(HUB_NAME)


def test_without_the_network_a_name_on_the_hub_is_one_line(tmp_path):
    """As a reader sees it, with the real library."""
    code = f"import pgcore; pgcore.load({HUB_NAME!r})"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        cwd=api.Path(__file__).parents[1],
    )
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"FileNotFoundError: {HUB_NAME}: not a folder, and it")
    assert "During handling" not in result.stderr
    assert len(last) < 400


def test_a_name_on_the_hub_is_downloaded_and_loaded(written, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(written[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model, _ = load(HUB_NAME, device="cpu")
    assert asked.pop("name") == HUB_NAME
    assert asked == {"allow_patterns": api.HUB_FILES}
    assert model.config == written[1].config


def test_only_safe_files_are_downloaded():
    def comes(name):
        return any(fnmatch.fnmatch(name, pattern) for pattern in api.HUB_FILES)

    for name in (
        *("config.json", "model.safetensors", "model-00001-of-00002.safetensors"),
        *("tokenizer.json", "tokenizer.model", "preprocessor_config.json"),
        *("model.safetensors.index.json", "generation_config.json"),
    ):
        assert comes(name), name
    for name in (
        *("pytorch_model.bin", "model.pt", "model.pth", "weights.pkl", "x.ckpt"),
        *("modeling_paligemma.py", "run.sh", "a.npz", "tf_model.h5", "x.msgpack"),
    ):
        assert not comes(name), name


# weights that are not read


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "all.pkl"]
)
def test_a_pickle_is_not_read_and_the_error_says_what_to_do(name, written, tmp_path):
    shutil.copytree(written[0], tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / name)
    message = refused(FileNotFoundError, load, tmp_path / "a")
    assert f"expected model.safetensors, found only {name}" in message
    assert "save it as safetensors" in message


def test_an_npz_has_its_own_reader(written, tmp_path):
    shutil.copytree(written[0], tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / "pt_224.npz")
    assert "big_vision.load_npz" in refused(FileNotFoundError, load, tmp_path / "a")


def test_a_pickle_beside_safetensors_is_left_alone(written, tmp_path):
    shutil.copytree(written[0], tmp_path / "a")
    (tmp_path / "a" / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")
    load(tmp_path / "a", device="cpu")


# device and dtype


def test_auto_is_a_gpu_if_there_is_one(monkeypatch):
    """torch may be built for a GPU that the machine lacks."""
    accelerator = torch.accelerator
    monkeypatch.setattr(
        accelerator, "current_accelerator", lambda: torch.device("cuda")
    )
    monkeypatch.setattr(accelerator, "is_available", lambda: True)
    assert choose_device("auto") == "cuda"
    monkeypatch.setattr(accelerator, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"


def test_a_device_by_any_of_its_names(written):
    for device in ("cpu", "cpu:0", torch.device("cpu")):
        assert choose_device(device) == "cpu"
        load(written[0], device=device)


@pytest.mark.parametrize(
    "device",
    [
        *("cuda:99", "gpu", "", "CPU", "cpu:x", "meta", "xla", "hpu", "vulkan", "tpu"),
        *("two\nlines", "long" * 999),
    ],
)
def test_a_device_that_cannot_be_used(device, written):
    message = refused(ValueError, load, written[0], device=device)
    assert message.startswith("device: ") and "cannot be used: " in message


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)
def test_the_dtype_is_the_one_asked_for(dtype, expected, written):
    model, _ = load(written[0], device="cpu", dtype=dtype)
    weights = written[1].state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name].to(expected))


def test_a_cpu_reads_float16_as_float32_unless_told_otherwise(tmp_path):
    """It multiplies float16 slowly; the shipped model is stored so."""
    folder = tmp_path / "half"
    save_pretrained(tiny_model(GEMMA1).half(), tiny_processor(), folder)
    for dtype, expected in (("auto", torch.float32), ("float16", torch.float16)):
        model, _ = load(folder, device="cpu", dtype=dtype)
        assert {weight.dtype for weight in model.parameters()} == {expected}


@pytest.mark.parametrize(
    "dtype",
    [
        *("fp16", "half", "", "Auto", "torch.float16", "two\nlines", "long" * 999),
        *(torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_what_is_no_dtype_of_a_model(dtype, written):
    assert "dtype: expected auto" in refused(
        ValueError, load, written[0], device="cpu", dtype=dtype
    )


@pytest.mark.usefixtures("as_user")
@pytest.mark.parametrize("dtype", [None, 16, [], {}], ids=str)
def test_what_is_no_dtype_at_all(dtype):
    assert "dtype: expected auto" in refused(ValueError, choose_dtype, dtype)


# model and processor


def test_a_processor_that_does_not_fit_the_model(tmp_path):
    right = tiny_processor()
    image_token = right.id_of("<image>")
    for text in (GEMMA1, GEMMA2):
        require_fit(tiny_config(text), right, tmp_path)
    for processor, config, words in (
        (replace(right, image_size=28), {}, "image size: the processor has 28, the"),
        (replace(right, num_image_tokens=5), {}, "image tokens: the processor has 5"),
        (right, {"image_token": 7}, f"id of <image>: the processor has {image_token}"),
        (right, {"text": replace(GEMMA2, vocab_size=1400)}, "ids up to 1451"),
    ):
        config = replace(tiny_config(), **config)
        message = refused(ValueError, require_fit, config, processor, tmp_path)
        assert words in message and str(tmp_path) in message


def test_only_the_image_token_may_lie_outside_of_the_table(tmp_path):
    """Every other id is looked up in it."""
    image_token = tiny_processor().id_of("<image>")
    for rows in (image_token, image_token + 1, image_token + 64):
        config = replace(tiny_config(), text=replace(GEMMA2, vocab_size=rows))
        require_fit(config, tiny_processor(), tmp_path)
    config = replace(tiny_config(), text=replace(GEMMA2, vocab_size=image_token - 1))
    refused(ValueError, require_fit, config, tiny_processor(), tmp_path)


def test_a_tokenizer_that_leaves_numbers_out(written, tmp_path):
    """How many tokens there are does not say how large their ids are."""
    shutil.copytree(written[0], tmp_path / "a")
    path = tmp_path / "a" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    pieces = tokenizer["model"]["vocab"]
    pieces[max(pieces, key=pieces.get)] = 9000
    path.write_text(json.dumps(tokenizer))
    message = refused(ValueError, load, tmp_path / "a", device="cpu")
    assert "9000" in message or "tokenizer" in message


def test_a_processor_of_another_model_is_noticed_when_loading(written, tmp_path):
    shutil.copytree(written[0], tmp_path / "a")
    path = tmp_path / "a" / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"size": {"height": 28, "width": 28}}))
    message = refused(ValueError, load, tmp_path / "a", device="cpu")
    assert "image size: the processor has 28, the model 14" in message
