"""Files that are whole or not there, whatever stops the program."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a path to write to; it takes the place of ``path`` when all is written.

    If the block fails, or Ctrl-C stops it, what was written goes and ``path`` stays.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
