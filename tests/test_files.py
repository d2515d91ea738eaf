"""Files: broken ones end in one clear line, and none is ever half written or lost."""

import contextlib
import io
import os
import signal
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from pgcore import files
from pgcore.files import (
    MAX_JSON_BYTES,
    MAX_PIXELS,
    folder_written_whole,
    one_line,
    open_image,
    read_json,
    shown,
    written_whole,
)
from tests.checkpoints import is_one_short_line, random_picture


def loop_of_links(folder, name="loop"):
    (folder / name).symlink_to(folder / "other")
    (folder / "other").symlink_to(folder / name)
    return folder / name


def refused(function, path, kind=ValueError):
    with pytest.raises(kind) as caught:
        function(path)
    assert type(caught.value) is kind
    assert is_one_short_line(caught.value)
    return str(caught.value)


@given(st.text(), st.integers(1, 30))
def test_one_line_is_one_short_line_and_leaves_short_ones_alone(text, most):
    shown = one_line(text, most)
    assert shown.isprintable() and len(shown) <= most + 3
    if text.isprintable() and len(text) <= most:
        assert shown == text


def test_a_value_is_shown_as_python_writes_it():
    assert shown("two\nlines") == r"'two\nlines'"
    assert shown([1.5, None]) == "[1.5, None]"
    assert len(shown("x" * 999)) == 63


# what is not there

READERS = pytest.mark.parametrize("read", [read_json, open_image])


@READERS
def test_what_is_no_file_is_not_found(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")  # to read it would wait for ever
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "file").touch()
    for path in (
        *(tmp_path / "missing", tmp_path, tmp_path / "pipe", tmp_path / "broken"),
        *(tmp_path / "file" / "below", loop_of_links(tmp_path)),
        *(tmp_path / ("long" * 99), tmp_path / "two\nlines", tmp_path / "nu\0ll"),
    ):
        assert "no such file" in refused(read, path, FileNotFoundError)


@READERS
def test_a_folder_is_called_one(read, tmp_path):
    message = refused(read, tmp_path, FileNotFoundError)
    assert message == f"{tmp_path}: no such file, but a folder"
    message = refused(read, tmp_path / "missing", FileNotFoundError)
    assert message == f"{tmp_path / 'missing'}: no such file"


@READERS
def test_a_file_that_may_not_be_read(read, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "secret"
    path.write_text("{}")
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(io, "open", refuse)
    assert "Permission denied" in refused(read, path)


# JSON


def test_json_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"word": "café", "list": [1, 2.5, null]}', encoding="utf8")
    assert read_json(path) == {"word": "café", "list": [1, 2.5, None]}


NO_JSON = {
    "nothing": b"",
    "text": b"Not Found",
    "a page": b"<html>\n<title>401</title>\n</html>",
    "cut off": b'{"model_type": "paligemma", "text_con',
    "a list": b"[1, 2]",
    "a word": b'"paligemma"',
    "a number": b"7",
    "null": b"null",
    "two objects": b"{}{}",
    "latin-1": '{"a": "é"}'.encode("latin-1"),
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "zeros": bytes(999),
    "lines": b'{"a\nb": 1}',
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep lists": b"[" * 1_000_000,
    "a long number": b'{"a": 1' + b"0" * 99_999 + b"}",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
}


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON)
def test_what_is_no_json(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    message = refused(read_json, path)
    assert message.startswith(f"{path}: expected a JSON object, found ")


def test_a_json_file_of_absurd_size_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(10**13)  # a hole: it takes no room
    assert str(10**13) in refused(read_json, path)
    with path.open("wb") as file:
        file.write(b"{}" + b" " * (MAX_JSON_BYTES - 2))
    assert read_json(path) == {}


# pictures


def encoded(kind, image=None, **options):
    file = io.BytesIO()
    (image or random_picture()).save(file, kind, **options)
    return file.getvalue()


PICTURES = {
    "png": encoded("PNG"),
    "jpeg": encoded("JPEG", quality=95),
    "progressive": encoded("JPEG", progressive=True),
    "webp": encoded("WEBP", lossless=True),
    "lossy-webp": encoded("WEBP"),
    "gif": encoded("GIF"),
    "bmp": encoded("BMP"),
    "tiff": encoded("TIFF"),
    "tiff-lzw": encoded("TIFF", compression="tiff_lzw"),
    "ppm": encoded("PPM"),
}
EVERY_KIND = pytest.mark.parametrize("content", PICTURES.values(), ids=PICTURES)


def pixels_of(image):
    return np.asarray(image.convert("RGB"))


@EVERY_KIND
def test_pictures_are_read_and_outlive_their_files(content, tmp_path):
    path = tmp_path / "picture"  # what it is, the content says
    path.write_bytes(content)
    image = open_image(path)
    path.unlink()
    assert np.array_equal(pixels_of(image), pixels_of(Image.open(io.BytesIO(content))))
    assert image.resize((5, 5)).size == (5, 5)


@EVERY_KIND
def test_a_picture_cut_off_anywhere_is_whole_or_refused(content, tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(content)
    whole = pixels_of(open_image(path))
    refusals = 0
    for length in [*range(0, len(content), 10), len(content) - 1]:
        path.write_bytes(content[:length])
        try:
            assert np.array_equal(pixels_of(open_image(path)), whole)
        except ValueError as error:
            refusals += 1
            assert is_one_short_line(error) and str(path) in str(error)
    assert refusals >= 0.95 * len(content) / 10


@EVERY_KIND
def test_a_picture_with_wrong_bytes_is_read_or_refused(content, tmp_path):
    path = tmp_path / "picture"

    @settings(max_examples=80)
    @given(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255))))
    def check(changes):
        broken = bytearray(content)
        for place, byte in changes:
            broken[place] = byte
        path.write_bytes(broken)
        try:
            open_image(path).convert("RGB")
        except ValueError as error:
            assert is_one_short_line(error) and str(path) in str(error)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check()


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"caption en\n", b"<html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"BM"],
    ids=repr,
)
def test_what_is_no_picture(content, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    assert "expected a whole picture" in refused(open_image, path)


def png_of(width, height):
    """A PNG of a kilobyte that says it is as large as this."""
    chunks = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for kind, data in (b"IHDR", header), (b"IDAT", zlib.compress(bytes(999))):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        chunks += struct.pack(">I", len(data)) + kind + data + crc
    return chunks


BOMBS = {
    "png": png_of(2**31 - 1, 2**31 - 1),
    "a long png": png_of(1, 2**31 - 1),
    "just too many": png_of(MAX_PIXELS // 2 + 1, 2),
    "gif": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x08" + bytes(99),
    "bmp": b"BM"
    + struct.pack("<IIIIiiHH6I", 99, 0, 54, 40, 2**30, 2**30, 1, 24, *[0] * 6),
    "ppm": b"P6 99999999 99999999 255\n" + bytes(99),
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_by_its_header(content, tmp_path, monkeypatch):
    path = tmp_path / "picture"
    path.write_bytes(content)
    for own in (Image.MAX_IMAGE_PIXELS, None):  # with Pillow's own limit, and without
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", own)
        for kind in (Image.Image, ImageFile.ImageFile):  # no pixel is to be made
            monkeypatch.setattr(kind, "load", lambda _: pytest.fail("loaded"))
        assert str(MAX_PIXELS) in refused(open_image, path)


def test_a_large_picture_is_no_bomb_and_no_warning(tmp_path, monkeypatch):
    """Pillow warns from half its limit on."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = tmp_path / "picture.png"
    random_picture(40, 30).save(path)  # 1200 pixels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(path).size == (40, 30)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_of_several_frames_the_first_is_read(kind, tmp_path):
    frames = [random_picture(seed=seed) for seed in range(3)]
    path = tmp_path / "film"
    path.write_bytes(encoded(kind, frames[0], save_all=True, append_images=frames[1:]))
    image = open_image(path)
    alone = pixels_of(Image.open(path))
    assert np.array_equal(pixels_of(image), alone)
    errors = [np.abs(alone - pixels_of(f).astype(float)).mean() for f in frames]
    assert errors[0] == min(errors)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_is_turned_as_its_exif_data_say(kind, tmp_path):
    from pgcore.processing import to_rgb

    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    path = tmp_path / "picture"
    path.write_bytes(encoded(kind, random_picture(40, 30), exif=exif))
    image = open_image(path)
    assert image.size == (30, 40)
    assert to_rgb(image).size == (30, 40)  # not turned once more


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_data_turn_nothing(kind, tmp_path):
    path = tmp_path / "picture"
    for exif in (b"Exif\0\0broken", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03"):
        path.write_bytes(encoded(kind, random_picture(40, 30), exif=exif))
        assert open_image(path).size == (40, 30)


# written whole or not at all


@pytest.fixture
def target(tmp_path):
    """A file among others that must stay."""
    for name in ("a.txt", "a.txt.partial", "a.txt.old", "other"):
        (tmp_path / name).write_text(f"the user's {name}")
    return tmp_path / "a.txt"


def contents(folder):
    """Every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


STOPS = pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError, SystemExit])


def test_a_file_takes_the_place_of_the_old_one(target):
    before = contents(target.parent)
    with written_whole(target) as path:
        path.write_text("new")
        assert target.read_text() == "the user's a.txt"
    assert contents(target.parent) == before | {"a.txt": "new"}


@STOPS
def test_a_file_stays_if_writing_stops(target, stop):
    before = contents(target.parent)
    with pytest.raises(stop), written_whole(target) as path:
        path.write_text("ne")
        raise stop
    with pytest.raises(stop), written_whole(target) as path:
        raise stop  # before the first byte
    assert contents(target.parent) == before


def test_nothing_written_is_an_error_and_the_file_stays(target):
    before = contents(target.parent)
    with pytest.raises(FileNotFoundError), written_whole(target):
        pass
    assert contents(target.parent) == before


@STOPS
def test_a_file_stays_if_the_last_step_fails(target, stop, monkeypatch):
    def fail(*_):
        raise stop

    before = contents(target.parent)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(stop), written_whole(target) as path:
        path.write_text("new")
    assert contents(target.parent) == before


def test_a_file_cannot_go_where_a_folder_is_nor_below_a_file(target):
    def write_to(path):
        with written_whole(path):
            pytest.fail("this block is not to be reached")

    before = contents(target.parent)
    (target.parent / "folder").mkdir()
    assert "found a folder" in refused(write_to, target.parent / "folder")
    for below in (target / "b.txt", target / "x" / "b.txt"):
        message = refused(write_to, below)
        assert message == (f"{below.parent}: expected a folder, a file is in its place")
    assert contents(target.parent) == before


def test_folders_above_a_file_are_made(tmp_path):
    for _ in range(2):
        with written_whole(tmp_path / "x" / "y" / "a.txt") as path:
            path.write_text("new")
    assert contents(tmp_path) == {"x/y/a.txt": "new"}


def test_a_file_is_on_the_disk_before_it_gets_its_name(target, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda _: done.append("on the disk"))
    monkeypatch.setattr(os, "replace", lambda *_: done.append("named"))
    with written_whole(target) as path:
        path.write_text("new")
    assert done == ["on the disk", "named"]


@pytest.fixture
def place(tmp_path):
    """A checkpoint among other folders that must stay."""
    for name in ("model", "model.partial", "model.old", "model.bak"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(f"the user's {name}")
    return tmp_path / "model"


def write(folder, *names, stop=None):
    with folder_written_whole(folder) as path:
        for name in names:
            (path / name).write_text("new")
        if stop:
            raise stop


def test_a_folder_takes_the_place_of_the_old_one(place):
    expected = contents(place.parent)
    del expected["model/weights"]
    write(place, "a", "b")
    assert contents(place.parent) == expected | {"model/a": "new", "model/b": "new"}


def test_a_folder_and_those_above_it_are_made(tmp_path):
    write(tmp_path / "x" / "y", "a")
    assert contents(tmp_path) == {"x/y/a": "new"}


@STOPS
def test_a_folder_stays_if_writing_stops(place, stop):
    before = contents(place.parent)
    for names in ([], ["a"], ["weights"]):
        with pytest.raises(stop):
            write(place, *names, stop=stop)
    assert contents(place.parent) == before
    assert sorted(p.name for p in place.parent.iterdir()) == sorted(
        ["model", "model.partial", "model.old", "model.bak"]
    )


def stop_at(monkeypatch, number, stop=KeyboardInterrupt, after=False):
    """The n-th step that changes folders stops, before or after it is done."""
    steps = []

    def watched(real):
        def step(*args, **kwargs):
            steps.append(real.__name__)
            here = len(steps) == number
            if here and not after:
                raise stop
            result = real(*args, **kwargs)
            if here:
                raise stop
            return result

        return step

    monkeypatch.setattr(files.os, "replace", watched(os.replace))
    monkeypatch.setattr(files.shutil, "rmtree", watched(files.shutil.rmtree))
    monkeypatch.setattr(Path, "mkdir", watched(Path.mkdir))
    return steps


@STOPS
@pytest.mark.parametrize("after", [False, True])
def test_a_stop_at_any_step_leaves_the_old_folder_or_the_new(place, stop, after):
    old = contents(place.parent)
    new = {k: v for k, v in old.items() if k != "model/weights"} | {"model/a": "new"}
    outcomes = []
    for number in range(1, 99):
        with pytest.MonkeyPatch.context() as patch:
            steps = stop_at(patch, number, stop, after)
            with contextlib.suppress(stop):
                write(place, "a")
        now = contents(place.parent)
        outcomes.append(now == new)
        assert now in (old, new), (number, steps)
        if len(steps) < number:  # it was never stopped
            break
        if now == new:  # start again
            (place / "a").unlink()
            (place / "weights").write_text(old["model/weights"])
    assert number > 7 and not outcomes[0] and outcomes[-1]


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from pgcore import files

number, count = int(sys.argv[2]), 0

def watched(real):
    def step(*args, **kwargs):
        global count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return step

os.replace = watched(os.replace)
shutil.rmtree = watched(shutil.rmtree)
Path.mkdir = watched(Path.mkdir)
Path.write_text = watched(Path.write_text)
folder = Path(sys.argv[1])
with files.folder_written_whole(folder) as path:
    (path / "a").write_text("new")
    (path / "b").write_text("new")
"""


def test_kill_9_at_any_step_loses_nothing_and_the_next_call_tidies(place):
    old = contents(place.parent)
    others = {k: v for k, v in old.items() if k != "model/weights"}
    new = others | {"model/a": "new", "model/b": "new"}
    for number in range(1, 99):
        result = subprocess.run([sys.executable, "-c", KILLED, place, str(number)])
        left = contents(place.parent)
        assert others.items() <= left.items()
        weights = {v for k, v in left.items() if k not in others}
        is_new = left.get("model/a") == left.get("model/b") == "new"
        assert "the user's model" in weights or is_new  # somewhere
        with pytest.raises(ValueError):
            write(place, stop=ValueError)  # the next call
        assert contents(place.parent) in (old, new)
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL
        if (place / "a").exists():
            (place / "a").unlink(), (place / "b").unlink()
            (place / "weights").write_text(old["model/weights"])
    assert number > 9


def test_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "model"
    link.symlink_to(tmp_path / "disk")
    for _ in range(2):
        write(link, "a")
    assert link.is_symlink()
    assert contents(tmp_path / "disk") == {"a": "new"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "model"]


def test_what_is_no_folder_is_refused_and_stays(tmp_path):
    (tmp_path / "file").write_text("the user's")
    for path in (tmp_path / "file", loop_of_links(tmp_path)):
        with pytest.raises(ValueError, match="expected a folder, found"):
            write(path, "a")
    assert (tmp_path / "file").read_text() == "the user's"
    assert (tmp_path / "loop").is_symlink()


def test_the_ground_you_stand_on_is_not_taken_away(tmp_path, monkeypatch):
    (tmp_path / "model" / "inside").mkdir(parents=True)
    for here, path in (("model", "."), ("model/inside", ".."), ("model", "../model")):
        monkeypatch.chdir(tmp_path / here)
        with pytest.raises(ValueError, match="other than the current one"):
            write(Path(path), "a")
    monkeypatch.chdir(tmp_path)
    write(Path("model"), "a")
    assert contents(tmp_path) == {"model/a": "new"}
