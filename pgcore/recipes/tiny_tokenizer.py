"""The tokenizer of the tiny PaliGemma, and how it wants its pictures.

    python -m pgcore.recipes.tiny_tokenizer --out pgcore/assets/tiny

Trained on what is asked and answered about the scenes of the book, in a few seconds.
The same scenes give the same files. Chapter 11 trains it, too.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pgcore.lab.emoji import names
from pgcore.lab.scene_language import CAPTION_LANGUAGES, all_examples
from pgcore.lab.scenes import compose_batch, split
from pgcore.processing import Processor, train_tokenizer

FOLDER = Path(__file__).parents[1] / "assets" / "tiny"
SCENES = 1000
PIECES = 1919  # 4 control tokens, 256 bytes, 1659 learned; then places and shapes
IMAGE_SIZE = 96
IMAGE_TOKENS = 64  # patches of 12 x 12 pixels


def scene_texts(split_name: str = "train", scenes: int = SCENES) -> list[str]:
    """All prompts and answers about the first scenes of a split.

    Captions are in four languages. Segmentation has its prompts alone: the answers
    are made of places, shapes and names, and none of these is to be learned here.
    """
    examples = [
        example
        for scene in compose_batch(*split(split_name), 0, scenes)
        for example in all_examples(scene)
    ]
    answers = [example.answer for example in examples if example.answer is not None]
    return [example.prompt for example in examples] + answers


def all_names() -> list[str]:
    """The name of every concept in the languages of captions."""
    return [name for language in CAPTION_LANGUAGES for name in names(language)]


def build() -> Processor:
    """Train the tokenizer and put it into the processor that ships."""
    tokenizer = train_tokenizer(scene_texts() + all_names(), PIECES)
    return Processor(tokenizer, IMAGE_SIZE, IMAGE_TOKENS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write what ships: the tokenizer and the settings, each file whole."""
    parser = argparse.ArgumentParser(description="Train the tiny model's tokenizer.")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    build().save(options.out)


if __name__ == "__main__":
    main()
