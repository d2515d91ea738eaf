"""Sixty small verses about the things of the book: a text for tiny language models.

Written for the book, rhymed in couplets, four lines a verse; under the licence of its
text. Every tenth verse is held out: train on the others, and these tell what a model
has learned from what it has merely kept.
"""

from functools import cache
from pathlib import Path

FILE = Path(__file__).parents[1] / "assets" / "verses.txt"
EVERY = 10


@cache
def load_verses() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The verses for training and those held out, in lower case.

    Each verse is four lines without an empty line around them.
    """
    verses = FILE.read_text(encoding="ascii").lower().strip().split("\n\n")
    held_out = verses[EVERY - 1 :: EVERY]
    del verses[EVERY - 1 :: EVERY]
    return tuple(verses), tuple(held_out)
