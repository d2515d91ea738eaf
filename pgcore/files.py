"""Files: read with errors that say what was wrong, written whole or not at all.

Written by hand, and below all chapters: it imports none of them.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image, ImageOps

MAX_JSON_BYTES = 10_000_000  # read, it takes some ten times as much
MAX_PIXELS = 178_956_970  # where Pillow refuses, too


def one_line(text: object, most: int = 200) -> str:
    """The text as an error shows it: no line breaks, of a long one the beginning."""
    start = str(text)[: most + 1]
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in start)
    return shown if len(shown) <= most else shown[:most] + "..."


def shown(value: object) -> str:
    """A value as an error shows it: what was found, and of a long one the beginning."""
    return one_line(repr(value), 60)


def require_file(path: Path, max_bytes: int | None = None) -> None:
    """Raise FileNotFoundError unless there is such a file, ValueError if larger."""
    if not os.path.isfile(path):  # False, too: a loop of links, a name too long
        found = ", but a folder" if os.path.isdir(path) else ""
        raise FileNotFoundError(f"{one_line(path, 300)}: no such file{found}")
    if max_bytes is not None and (size := path.stat().st_size) > max_bytes:
        raise ValueError(f"{path}: expected at most {max_bytes} bytes, found {size}")


def read_json(path: Path) -> dict:
    """Read a JSON file that holds an object.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for more than MAX_JSON_BYTES, and for what is no JSON object.
    """
    require_file(path, MAX_JSON_BYTES)
    try:
        found = json.loads(path.read_text(encoding="utf8"))
        if not isinstance(found, dict):
            raise ValueError(type(found).__name__)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected a JSON object, found {one_line(error)}"
        ) from None
    return found


def open_image(path: str | Path) -> Image.Image:
    """Read a picture from a file, all of it, turned as its EXIF data say.

    Of several frames it is the first.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no picture, only a part of one, or more than
            MAX_PIXELS.
    """
    require_file(Path(path))
    try:
        with warnings.catch_warnings():
            # Pillow warns at half of MAX_PIXELS, and of odd data beside the pixels.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} of them")
                image.load()
                with suppress(Exception):  # broken EXIF data turn nothing
                    return ImageOps.exif_transpose(image)  # a copy, free of the file
                return image.copy()
    except Exception as error:  # a decoder of broken bytes may raise anything
        reason = one_line(str(error) or type(error).__name__)
        raise ValueError(
            f"{path}: expected a whole picture of at most {MAX_PIXELS} pixels,"
            f" found {reason}"
        ) from None


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises:
        ValueError: if a file is in its place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(
            f"{folder}: expected a folder, a file is in its place"
        ) from None


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a path to write a file to; it takes the place of ``path`` when all is there.

    If the block fails, or Ctrl-C stops it, what was written goes and ``path`` stays.
    ``kill -9`` may leave .NAME.pgcore-partial beside it, which the next call uses:
    of two at once, neither is sure to end well.

    Folders above it are made.

    Raises:
        ValueError: if ``path`` is a folder, or a file is in the place of one above it.
    """
    if path.is_dir():
        raise ValueError(f"{path}: expected a file to write, found a folder")
    make_folder(path.parent)
    partial = _beside(path, "partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # or a power cut may leave the name alone
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write to; it replaces ``folder`` when all is there.

    If the block fails, or Ctrl-C stops it, what was written goes and ``folder`` stays
    as it was. ``kill -9`` may leave .NAME.pgcore-partial or .NAME.pgcore-old beside
    it; the next call puts that right.

    Raises:
        ValueError: if ``folder`` is a file, or one that you are in.
    """
    try:
        folder = folder.resolve()  # where a link points to is where we write
    except RuntimeError:
        raise ValueError(f"{folder}: expected a folder, found a loop") from None
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, found something else")
    if Path.cwd().is_relative_to(folder):
        raise ValueError(f"{folder}: expected a folder other than the current one")
    partial, old = _beside(folder, "partial"), _beside(folder, "old")

    def tidy() -> None:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

    tidy()
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
    finally:
        try:
            tidy()
        finally:  # Ctrl-C once more, by an impatient user
            tidy()


def _beside(path: Path, kind: str) -> Path:
    """A name that nobody else gives: what has it may be deleted."""
    return path.with_name(f".{path.name}.pgcore-{kind}")
