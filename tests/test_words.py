"""Words as numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgcore.lab.emoji import CONCEPTS, SEEN_CONCEPTS, TRAIN_STYLES, keywords
from pgcore.lab.scene_language import caption
from pgcore.lab.scenes import SceneSettings, compose_batch
from pgcore.lab.words import PAD, Words, emoji_words

WORDS = emoji_words()


def test_ids_count_from_one_and_padding_is_zero():
    words = Words(["a", "cat"])
    assert len(words) == 3
    ids = words.encode(["a cat", "Cat!"], length=3)
    assert ids.tolist() == [[PAD, 1, 2], [PAD, PAD, 2]]
    assert words.decode(ids[0]) == "a cat"


@given(st.lists(st.sampled_from(WORDS.vocabulary), max_size=16))
def test_decoding_undoes_encoding(chosen):
    ids = WORDS.encode([" ".join(chosen)], length=16)
    assert WORDS.decode(ids[0]) == " ".join(chosen)


def test_the_vocabulary_covers_whatever_a_scene_or_a_keyword_says():
    settings = SceneSettings(styles=TRAIN_STYLES, concepts=SEEN_CONCEPTS)
    captions = [caption(scene) for scene in compose_batch(settings, 0, 0, 300)]
    for texts in (captions, CONCEPTS, [" ".join(keys) for keys in keywords()]):
        assert (WORDS.encode(texts, length=64) > 0).any(1).all()


def test_no_texts_give_no_rows():
    assert WORDS.encode([], length=4).shape == (0, 4)
    assert WORDS.encode([], length=4).dtype == torch.long


def test_errors_say_what_was_found():
    with pytest.raises(ValueError, match=r"unknown word 'catt': did you mean 'cat'"):
        WORDS.encode(["a catt"], length=4)
    with pytest.raises(ValueError, match=r"at most 2 words, found 3"):
        WORDS.encode(["a red apple"], length=2)
    with pytest.raises(ValueError, match="no word twice"):
        Words(["a", "a"])
