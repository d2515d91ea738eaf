"""Words as numbers: a word-level tokenizer for the captions of emoji.

Chapter 11 builds the tokenizer of PaliGemma. Until then a word is a token.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from pgcore.lab import _english as english
from pgcore.lab._compose import MOST_OF_A_KIND
from pgcore.lab._near import unknown
from pgcore.lab.dual_encoder import split_into_words, vocabulary_of
from pgcore.lab.emoji import CONCEPTS, keywords

PAD = 0


class Words:
    """A fixed vocabulary; word n of it has the id n + 1, and 0 is padding.

    vocabulary: words in lower case, none twice.
    """

    def __init__(self, vocabulary: Sequence[str]):
        self.vocabulary = tuple(vocabulary)
        self._ids = {word: row + 1 for row, word in enumerate(self.vocabulary)}
        if len(self._ids) < len(self.vocabulary):
            raise ValueError("vocabulary: expected no word twice")

    def __len__(self) -> int:
        """The number of ids, padding among them."""
        return len(self.vocabulary) + 1

    def encode(self, texts: Iterable[str], length: int) -> Int[Tensor, "B T"]:
        """Turn texts into ids, [B, length], padded on the left.

        So the last token, which speaks for the text in SigLIP, is its last word.

        Raises:
            ValueError: for a word that is not in the vocabulary, and for a text of
                more than ``length`` words.
        """
        rows = []
        for text in texts:
            words = split_into_words(text)
            if len(words) > length:
                raise ValueError(
                    f"text {text!r}: expected at most {length} words,"
                    f" found {len(words)}"
                )
            for word in words:
                if word not in self._ids:
                    raise unknown("word", word, self._ids)
            padding = [PAD] * (length - len(words))
            rows.append(padding + [self._ids[word] for word in words])
        return torch.tensor(rows, dtype=torch.long).reshape(-1, length)

    def decode(self, ids: Int[Tensor, " T"]) -> str:
        """Turn ids back into words, without the padding."""
        return " ".join(self.vocabulary[i - 1] for i in ids.tolist() if i != PAD)


def emoji_words() -> Words:
    """Every word of the names, keywords and English captions of all concepts."""
    counted = [
        english.counted(concept, number)
        for concept in CONCEPTS
        for number in range(1, MOST_OF_A_KIND + 1)
    ]
    keys = [key for one in keywords() for key in one]
    return Words(vocabulary_of((*CONCEPTS, *keys, *counted, "and")))
