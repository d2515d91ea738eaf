"""Files: read with errors that say what was wrong, written whole or not at all.

Written by hand, and below all chapters: it imports none of them.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

MAX_JSON_BYTES = 100_000_000
MAX_PIXELS = 178_956_970  # where Pillow refuses, too


def require_file(path: Path) -> None:
    """Raise FileNotFoundError unless there is such a file."""
    if not path.is_file():  # False for a loop of links, too
        raise FileNotFoundError(f"{path}: no such file")


def read_json(path: Path) -> dict:
    """Read a JSON file that holds an object.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for more than MAX_JSON_BYTES, and for what is no JSON object.
    """
    require_file(path)
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise ValueError(f"{size} bytes")
        found = json.loads(path.read_text(encoding="utf8"))
        if not isinstance(found, dict):
            raise ValueError(type(found).__name__)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON object, found {error}") from None
    return found


def open_image(path: str | Path) -> Image.Image:
    """Read a picture from a file, all of it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no picture, only a part of one, or more than
            MAX_PIXELS.
    """
    require_file(Path(path))
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} of them")
            image.load()
            return image
    except Exception as error:  # a decoder of broken bytes may raise anything
        raise ValueError(
            f"{path}: expected a whole picture of at most {MAX_PIXELS} pixels,"
            f" found {error or type(error).__name__}"
        ) from None


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a path to write a file to; it takes the place of ``path`` when all is there.

    If the block fails, or Ctrl-C stops it, what was written goes and ``path`` stays.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write to; it replaces ``folder`` when all is there.

    If the block fails, or Ctrl-C stops it, what was written goes and ``folder`` stays
    as it was. ``kill -9`` may leave NAME.partial or NAME.old beside it; the next call
    puts that right.
    """
    partial = folder.with_name(folder.name + ".partial")
    old = folder.with_name(folder.name + ".old")

    def tidy() -> None:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

    tidy()
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
    finally:
        tidy()
