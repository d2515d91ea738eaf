"""pgcore.generate: all of generation behind one function."""

import math

import pytest
import torch

import pgcore
import pgcore.api
from pgcore.api import Answer
from pgcore.generation import read_token
from tests.test_generation import (
    GEMMA1,
    GEMMA2,
    PROMPTS,
    model_of,
    next_logits,
    pictures,
    processor,
    ragged,
)


def generate(*args, text=GEMMA2, **options):
    return pgcore.generate(
        model_of(text), processor(), *args, **{"max_new_tokens": 8} | options
    )


def test_one_prompt_stands_alone_and_lists_are_batches():
    together = generate(pictures(3), PROMPTS)
    assert together == [
        generate(picture, prompt)
        for picture, prompt in zip(pictures(3), PROMPTS, strict=True)
    ]
    assert len(set(together)) == 3


def test_probabilities_are_those_of_a_whole_forward():
    answers = generate(pictures(3), PROMPTS, probabilities=True)
    assert [str(answer) for answer in answers] == generate(pictures(3), PROMPTS)
    for row, answer in enumerate(answers):
        assert isinstance(answer, Answer)
        tokens = torch.tensor([answer.tokens] * 3)
        assert len(answer.probabilities) == len(answer.tokens)
        with torch.no_grad():
            for n, (token, share) in enumerate(
                zip(answer.tokens, answer.probabilities, strict=True)
            ):
                logits = next_logits(model_of(GEMMA2), ragged(), tokens[:, :n])
                expected = logits.softmax(dim=-1)[row, token].item()
                assert share == pytest.approx(expected, rel=1e-4)


def test_probabilities_are_the_models_own_also_when_it_draws():
    options = {"temperature": 0.3, "top_k": 1, "seed": 0, "probabilities": True}
    drawn = generate(pictures(1)[0], "a", **options)
    greedy = generate(pictures(1)[0], "a", probabilities=True)
    assert drawn.tokens == greedy.tokens
    assert drawn.probabilities == pytest.approx(greedy.probabilities)
    assert math.prod(drawn.probabilities) < 0.99


def test_pieces_of_a_stream_join_to_the_text():
    expected = generate(pictures(3), PROMPTS)
    rows = zip(*generate(pictures(3), PROMPTS, stream=True), strict=True)
    assert ["".join(pieces) for pieces in rows] == expected
    pieces = generate(pictures(3)[0], PROMPTS[0], stream=True)
    assert iter(pieces) is pieces, "it comes while it is written"
    assert "".join(pieces) == expected[0]


def test_the_same_seed_draws_the_same():
    options = {"temperature": 1.0, "top_p": 0.95, "top_k": 200}
    first = generate(pictures(3), PROMPTS, seed=7, **options)
    torch.rand(5)
    assert generate(pictures(3), PROMPTS, seed=7, **options) == first
    assert generate(pictures(3), PROMPTS, seed=8, **options) != first


def test_beams_return_texts():
    texts = generate(pictures(3), PROMPTS, num_beams=3, text=GEMMA1)
    assert all(isinstance(text, str) for text in texts) and len(texts) == 3
    alone = generate(pictures(3)[1], PROMPTS[1], num_beams=3, text=GEMMA1)
    assert alone == texts[1]


def test_max_new_tokens_cuts():
    answer = generate(pictures(1)[0], "a", max_new_tokens=1, probabilities=True)
    assert len(answer.tokens) == 1


@pytest.mark.parametrize("number", [0, -3, 2.0, "7"])
def test_max_new_tokens_is_checked(number, as_user):
    with pytest.raises(ValueError, match="max_new_tokens: expected 1 or more, found"):
        generate(pictures(1)[0], "a", max_new_tokens=number)


@pytest.mark.parametrize(
    "option",
    [
        {"stream": True},
        {"probabilities": True},
        {"compile": True},
        {"temperature": 1.0},
    ],
    ids=str,
)
def test_a_search_excludes_other_options(option):
    with pytest.raises(ValueError, match="num_beams: a search goes with none of"):
        generate(pictures(1)[0], "a", num_beams=2, **option)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_beams": 0}, "num_beams: expected at least 1, found 0"),
        ({"temperature": -1.0}, "temperature, top_k, top_p"),
        ({"top_p": 0.0}, "temperature, top_k, top_p"),
        ({"top_k": 0}, "temperature, top_k, top_p"),
        ({"top_k": 5}, "top_k, top_p: they need a temperature above 0"),
        ({"top_p": 0.9}, "top_k, top_p: they need a temperature above 0"),
        ({"top_p": 0.9, "num_beams": 2}, "they need a temperature above 0"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(option, message):
    with pytest.raises(ValueError, match=message):
        generate(pictures(1)[0], "a", **option)


def test_pictures_and_prompts_must_be_of_one_number():
    with pytest.raises(ValueError, match="lists of one length"):
        generate(pictures(2), ["a"])


def test_a_letter_that_was_cut_ends_the_stream(monkeypatch):
    ids = processor().tokenizer.encode("a猫").ids[:-1]
    steps = [(torch.tensor([token]), None) for token in ids]
    monkeypatch.setattr(pgcore.api, "write_tokens", lambda *_, **__: iter(steps))
    *_, last = generate(pictures(1)[0], "a", stream=True)
    assert "\ufffd" in last


def test_compile_exchanges_the_reader(monkeypatch):
    calls = []

    def read(*arguments):
        calls.append(1)
        return read_token(*arguments)

    monkeypatch.setattr(pgcore.api, "compiled_read_token", lambda: read)
    text = generate(pictures(1)[0], "a", compile=True)
    assert calls and text == generate(pictures(1)[0], "a")
