"""Chapter 14: generation against Hugging Face, whole forwards, and its twins."""

import itertools
import math
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

import pgcore.generation as module
from pgcore.generation import (
    Sampler,
    TextStream,
    _map_of_one,
    beam_search,
    compiled_read_token,
    decode_step,
    prefill,
    read_token,
    write_tokens,
)
from pgcore.lab.museum import generation as museum
from pgcore.paligemma import PaliGemma, PaliGemmaConfig
from pgcore.processing import EOS, Processor, train_tokenizer
from tests import draws
from tests.draws import VISION, fan_in, name_of
from tests.reference.generation import (
    greedy_logits,
    next_logits,
    reference_distribution,
    write_obviously,
)

TOLERANCE = 5e-6
GREEDY = Sampler()
PROMPTS = ["caption en", "a", "how many cats and apples"]
GEMMA1 = replace(draws.GEMMA1, depth=2, vocab_size=1600)
GEMMA2 = replace(draws.GEMMA2, depth=2, vocab_size=1600, attention_softcap=5.0)
BOTH = pytest.mark.parametrize("text", [GEMMA1, GEMMA2], ids=["gemma1", "gemma2"])


@cache
def processor():
    texts = ["caption en a cat and two red apples", "how many cats"] * 3
    return Processor(train_tokenizer(texts, 300), 28, 4)


STOP = 1


def new_model(text, seed=2, table=0.1):
    """A tied table at full size says the last token again and again."""
    config = PaliGemmaConfig(
        vision=VISION, text=text, image_token=processor().id_of("<image>")
    )
    model = fan_in(PaliGemma(config), seed).eval().requires_grad_(False)
    model.language.embed_tokens.weight.mul_(table)
    return model


model_of = cache(new_model)


def pictures(number):
    noise = np.random.default_rng(0)
    return [
        Image.fromarray(noise.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8))
        for i in range(number)
    ]


@cache
def ragged():
    """Three pictures with prompts of three lengths."""
    batch = processor()(pictures(3), PROMPTS)
    assert len(batch["attention_mask"].sum(dim=1).unique()) == 3
    return batch


def single(row):
    return processor()([pictures(3)[row]], [PROMPTS[row]])


def written(model, batch, number, choose=GREEDY, stop=STOP, **options):
    steps = write_tokens(
        model, batch, choose, max_new_tokens=number, stop=stop, **options
    )
    columns, logits = zip(*steps, strict=True)
    return torch.stack(columns, dim=1), torch.stack(logits, dim=1)


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * expected.abs().max().item(), error


# Hugging Face


@cache
def hugging_face(text, tmp):
    transformers = pytest.importorskip("transformers")
    from pgcore.weights import save_pretrained

    save_pretrained(model_of(text), processor(), tmp)
    kind = transformers.PaliGemmaForConditionalGeneration
    return kind.from_pretrained(tmp, attn_implementation="eager").eval()


@pytest.fixture
def oracle(tmp_path_factory):
    def generate(text, batch, **options):
        name = "gemma2" if text.post_norms else "gemma1"
        folder = tmp_path_factory.getbasetemp() / f"hf-{name}"
        hf = hugging_face(text, folder)
        out = hf.generate(
            pixel_values=batch["pixel_values"],
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"].long(),
            token_type_ids=torch.zeros_like(batch["input_ids"]),
            do_sample=False,
            **options,
        )
        return out[:, batch["input_ids"].shape[1] :]

    return generate


@BOTH
def test_greedy_equals_hugging_face_for_32_tokens_alone_and_batched(text, oracle):
    expected = oracle(text, ragged(), max_new_tokens=32, eos_token_id=None)
    assert min(len(row.unique()) for row in expected) >= 8, "lively answers"
    found, _ = written(model_of(text), ragged(), 32, stop=-1)
    assert torch.equal(found, expected)
    for row in range(3):
        alone, _ = written(model_of(text), single(row), 32, stop=-1)
        assert torch.equal(alone[0], expected[row])
        theirs = oracle(text, single(row), max_new_tokens=32, eos_token_id=None)
        assert torch.equal(theirs, alone)


def an_early_token(text):
    """An id that greedy answers write, not all at once: a stop in the middle."""
    ids, _ = written(model_of(text), ragged(), 32, stop=-1)
    return int(ids[1, 5])


@BOTH
def test_greedy_with_an_end_equals_hugging_face(text, oracle):
    stop = an_early_token(text)
    options = {"max_new_tokens": 32, "eos_token_id": stop, "pad_token_id": stop}
    expected = oracle(text, ragged(), **options)
    found, _ = written(model_of(text), ragged(), 32, stop=stop)
    assert torch.equal(found, expected)


@BOTH
@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0])
@pytest.mark.parametrize("ending", ["never", "early"])
def test_beam_search_equals_hugging_face(text, penalty, ending, oracle):
    stop = an_early_token(text) if ending == "early" else -1
    options = {"num_beams": 3, "max_new_tokens": 12, "length_penalty": penalty}
    ids = {"eos_token_id": stop, "pad_token_id": 0} if stop >= 0 else {}
    if stop < 0:
        ids = {"eos_token_id": None, "pad_token_id": 0}
    expected = oracle(text, ragged(), **options, **ids)
    found = beam_search(model_of(text), ragged(), stop=stop, **options)
    for (_, ours), theirs in zip(found, expected.tolist(), strict=True):
        assert ours == theirs[: len(ours)]
        assert set(theirs[len(ours) :]) <= {0, stop}  # it fills up with either


@BOTH
@pytest.mark.parametrize(("num_beams", "penalty"), [(2, 1.0), (3, 0.3), (4, 1.5)])
def test_every_rule_of_the_search_is_hugging_faces(text, num_beams, penalty, oracle):
    """Ends that come early or late, alone or several: who may end, and when."""
    free, _ = written(model_of(text), ragged(), 10, stop=-1)
    options = {"num_beams": num_beams, "max_new_tokens": 10, "length_penalty": penalty}
    for stop in free.unique().tolist()[::3]:
        ids = {"eos_token_id": stop, "pad_token_id": stop}
        expected = oracle(text, ragged(), **options, **ids)
        found = beam_search(model_of(text), ragged(), stop=stop, **options)
        for (_, ours), theirs in zip(found, expected.tolist(), strict=True):
            assert ours == theirs[: len(ours)]
            assert set(theirs[len(ours) :]) <= {stop}


# whole forwards


@BOTH
@pytest.mark.parametrize("number", [1, 2, 9])
def test_logits_of_every_step_equal_whole_forwards(text, number):
    model = model_of(text)
    with torch.no_grad():
        expected, expected_logits = write_obviously(model, ragged(), number, -1)
    found, logits = written(model, ragged(), number, stop=-1)
    assert torch.equal(found, expected)
    assert_close(logits, expected_logits)


def random_batch(lengths, seed, pictures=True):
    """Left-padded rows of random ids, a picture each."""
    generator = torch.Generator().manual_seed(seed)
    T = 4 + max(lengths)
    ids = torch.randint(4, 259, (len(lengths), T), generator=generator)
    is_token = torch.arange(T) >= T - 4 - torch.tensor(lengths)[:, None]
    image = processor().id_of("<image>")
    for row, length in enumerate(lengths):
        ids[row, T - 4 - length : T - length] = image
    pixels = torch.randn(len(lengths), 3, 28, 28, generator=generator)
    return {"input_ids": ids, "attention_mask": is_token, "pixel_values": pixels}


@given(
    st.sampled_from([GEMMA1, GEMMA2]),
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.integers(0, 5),
    st.integers(0, 999),
)
@settings(max_examples=40)
def test_cached_equals_uncached_for_any_lengths(text, lengths, number, seed):
    model, batch = model_of(text), random_batch(lengths, seed)
    tokens = torch.randint(4, 259, (len(lengths), number))
    with torch.no_grad():
        found = greedy_logits(model, batch, tokens)
        for n in range(number + 1):
            assert_close(found[:, n], next_logits(model, batch, tokens[:, :n]))


@given(st.sampled_from([GEMMA1, GEMMA2]), st.integers(0, 999))
@settings(max_examples=15)
def test_a_row_does_not_know_its_neighbours(text, seed):
    model, lengths = model_of(text), [2, 6, 4]
    batch = random_batch(lengths, seed)
    found, _ = written(model, batch, 6, stop=-1)
    for row, length in enumerate(lengths):
        alone = {
            "input_ids": batch["input_ids"][row : row + 1, -4 - length :],
            "attention_mask": batch["attention_mask"][row : row + 1, -4 - length :],
            "pixel_values": batch["pixel_values"][row : row + 1],
        }
        assert torch.equal(written(model, alone, 6, stop=-1)[0][0], found[row])


def test_words_without_a_picture():
    batch = processor()([[], []], ["caption en", "a"])
    with torch.no_grad():
        expected, _ = write_obviously(model_of(GEMMA2), batch, 5, -1)
    assert torch.equal(written(model_of(GEMMA2), batch, 5, stop=-1)[0], expected)


@pytest.mark.parametrize("search", [False, True])
def test_the_picture_is_encoded_once(search):
    model, calls = new_model(GEMMA1), []
    model.vision.register_forward_hook(lambda *args: calls.append(len(args[2])))
    if search:
        limits = {"max_new_tokens": 5, "stop": -1}
        beam_search(model, ragged(), num_beams=3, **limits)
    else:
        written(model, ragged(), 5, stop=-1)
    assert calls == [3]


def test_a_prefix_that_is_too_long_and_a_cache_that_is_full():
    model, batch = model_of(GEMMA1), single(0)
    length = batch["input_ids"].shape[1]
    with torch.no_grad():
        message = f"num_slots: expected at least {length}, found {length - 1}"
        with pytest.raises(ValueError, match=message):
            prefill(model, batch, length - 1)
        logits, state = prefill(model, batch, length + 1)
        decode_step(model, logits.argmax(dim=-1), state)
        with pytest.raises(ValueError, match="slots left"):
            decode_step(model, logits.argmax(dim=-1), state)


def test_prefill_makes_logits_of_one_place_only():
    model, sizes = new_model(GEMMA1), []
    right = model.language.logits
    model.language.logits = lambda hidden: sizes.append(hidden.shape) or right(hidden)
    written(model, ragged(), 3, stop=-1)
    assert set(sizes) == {(3, 40)}


@BOTH
def test_runs_on_the_meta_device_at_any_size(text):
    with torch.device("meta"):
        model = PaliGemma(model_of(text).config)
        batch = {name: tensor.to("meta") for name, tensor in ragged().items()}
        with torch.inference_mode():
            logits, state = prefill(model, batch, 40)
            tokens = logits.argmax(dim=-1)
            assert decode_step(model, tokens, state).shape == (3, 1600)
            state = module._select(state, torch.zeros(6, dtype=torch.long))
            assert decode_step(model, torch.cat([tokens] * 2), state).shape[0] == 6
        shares = Sampler(temperature=1.0, top_k=3, top_p=0.5).distribution(logits)
    assert shares.device.type == "meta"


# twins of the steps


def assert_step_parity(prefill=prefill, step=decode_step):
    model = model_of(GEMMA2)
    tokens = torch.randint(4, 259, (3, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = greedy_logits(model, ragged(), tokens, prefill, step)
        expected = torch.stack(
            [next_logits(model, ragged(), tokens[:, :n]) for n in range(7)], dim=1
        )
    assert_close(found, expected)


def test_the_steps_pass_the_parity_test():
    assert_step_parity()


@pytest.mark.parametrize("twin", museum.STEPS, ids=name_of)
def test_wrong_steps_fail_the_parity_test(twin):
    with pytest.raises(AssertionError):
        assert_step_parity(step=twin)


@pytest.mark.parametrize("cut", [1, 3, None, 8])
def test_a_prefix_in_two_pieces_fails_the_parity_test(cut):
    with pytest.raises(AssertionError):
        assert_step_parity(prefill=partial(museum.prefix_in_two_pieces, cut=cut))


def test_the_tower_at_every_step_gives_right_numbers_and_wastes_work():
    model, calls = new_model(GEMMA1), []
    model.vision.register_forward_hook(lambda *args: calls.append(1))
    pixels = ragged()["pixel_values"]
    step = partial(museum.tower_at_every_step, pixels=pixels)
    tokens = torch.full((3, 4), 9)
    with torch.no_grad():
        found = greedy_logits(model, ragged(), tokens, step=step)
        assert_close(found, greedy_logits(model, ragged(), tokens))
    assert len(calls) == 5 + 1


# rows that end


def steps_taken(write, stop):
    model, steps = new_model(GEMMA1), []
    model.language.register_forward_hook(lambda *args: steps.append(1))
    rows = [
        tokens
        for tokens, _ in write(model, ragged(), GREEDY, max_new_tokens=20, stop=stop)
    ]
    return len(steps), torch.stack(rows, dim=1)


def test_rows_stop_alone_and_do_not_change_others():
    free, _ = written(model_of(GEMMA1), ragged(), 20, stop=-1)
    stops = [int(free[row, place]) for row, place in ((0, 3), (1, 0), (2, 7))]
    for stop in stops:
        found, _ = written(model_of(GEMMA1), ragged(), 20, stop=stop)
        for ours, theirs in zip(found.tolist(), free.tolist(), strict=True):
            end = theirs.index(stop) + 1 if stop in theirs else 20
            assert ours[:end] == theirs[: len(ours)][:end]
            assert set(ours[end:]) <= {stop}


def test_all_end_when_every_row_has():
    free, _ = written(model_of(GEMMA1), ragged(), 20, stop=-1)
    row = single(0)
    stop = int(free[0, 4])
    first = free[0].tolist().index(stop)
    found, _ = written(model_of(GEMMA1), row, 20, stop=stop)
    assert found.shape[1] == first + 1


def test_running_past_the_end_takes_more_steps():
    model = model_of(GEMMA1)
    ids, _ = written(model, single(1), 20, stop=-1)
    stop = int(ids[0, 2])
    counts = []
    for write in (write_tokens, museum.runs_past_the_end):
        steps = list(write(model, single(1), GREEDY, max_new_tokens=20, stop=stop))
        counts.append(len(steps))
        text = torch.stack([tokens for tokens, _ in steps], dim=1)[0]
        assert text[: counts[0]].tolist() == ids[0, : counts[0]].tolist()
    assert counts[0] <= 3 and counts[1] == 20


def test_one_new_token_needs_no_step():
    model, steps = new_model(GEMMA1), []
    model.language.register_forward_hook(lambda *args: steps.append(1))
    tokens, logits = written(model, ragged(), 1)
    assert tokens.shape == (3, 1) and len(steps) == 1
    assert torch.equal(tokens[:, 0], logits[:, 0].argmax(dim=-1))


def test_tokens_come_while_they_are_written_and_the_caller_may_leave():
    model, steps = new_model(GEMMA1), []
    model.language.register_forward_hook(lambda *args: steps.append(1))
    iterator = write_tokens(model, ragged(), GREEDY, max_new_tokens=9, stop=-1)
    for expected in (1, 2, 3):
        next(iterator)
        assert len(steps) == expected
        assert not torch.is_inference_mode_enabled(), "between the steps"
    iterator.close()


# choosing


# Sixteenths: no two so close that float32 takes them for one.
logit_rows = st.lists(st.integers(-192, 192), min_size=2, max_size=12, unique=True).map(
    lambda row: torch.tensor([row], dtype=torch.float32) / 16
)


@given(logit_rows, st.floats(0.2, 5), st.integers(1, 12), st.floats(0.05, 1))
def test_the_distribution_is_that_of_plain_python(logits, temperature, top_k, top_p):
    sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p)
    found = sampler.distribution(logits)[0]
    close = [
        torch.tensor(reference_distribution(logits[0].tolist(), temperature, top_k, p))
        for p in (top_p - 1e-5, top_p, top_p + 1e-5)  # a share may round to p
    ]
    assert min((found - expected).abs().max() for expected in close) < 1e-5
    assert abs(found.sum() - 1) < 1e-5


def assert_smallest_nucleus(kind, logits, top_p):
    shares = logits.double().softmax(dim=-1)[0]
    kept = kind(temperature=1.0, top_p=top_p).distribution(logits)[0] > 0
    assert kept.any()
    assert shares[kept].sum() >= top_p - 1e-5, "it falls short"
    assert shares[kept].min() >= shares[~kept].max() if (~kept).any() else True
    assert shares[kept].sum() - shares[kept].min() < top_p + 1e-5, "one too many"


@given(logit_rows, st.floats(0.05, 0.999))
def test_the_nucleus_is_the_smallest_set_that_holds_top_p(logits, top_p):
    assert_smallest_nucleus(Sampler, logits, top_p)


def test_a_nucleus_that_holds_top_p_exactly_is_enough():
    equal = torch.zeros(1, 4)  # shares of a quarter, without rounding
    for top_p, number in ((0.25, 1), (0.5, 2), (0.75, 3), (0.76, 4)):
        shares = Sampler(temperature=1.0, top_p=top_p).distribution(equal)
        assert (shares > 0).sum() == number


@pytest.mark.parametrize(
    "twin", [museum.NucleusFallsShort, museum.NucleusInTheWrongOrder], ids=name_of
)
def test_wrong_nuclei_are_not_it(twin):
    logits = torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log()
    with pytest.raises(AssertionError):
        assert_smallest_nucleus(twin, logits, 0.7)


def test_temperature_comes_before_the_filters():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    for temperature, number in ((0.25, 1), (1.0, 2), (100.0, 3)):
        knobs = {"temperature": temperature, "top_p": 0.6}
        assert (Sampler(**knobs).distribution(logits) > 0).sum() == number
    wrong = museum.TemperatureLast(temperature=0.25, top_p=0.6)
    assert (wrong.distribution(logits) > 0).sum() == 2


@given(logit_rows, st.integers(-500, 500))
def test_a_shift_of_all_logits_changes_nothing(logits, shift):
    sampler = Sampler(temperature=0.7, top_p=0.9)
    logits = (logits * 8).round() / 8  # so that the shift is exact
    moved = sampler.distribution(logits + shift)
    assert torch.allclose(sampler.distribution(logits), moved, atol=1e-6)


@given(logit_rows, st.randoms())
def test_the_order_of_the_vocabulary_does_not_matter(logits, random):
    order = list(range(logits.shape[1]))
    random.shuffle(order)
    sampler = Sampler(temperature=0.9, top_k=5, top_p=0.8)
    found = sampler.distribution(logits[:, order])
    assert torch.allclose(found, sampler.distribution(logits)[:, order], atol=1e-6)


@given(logit_rows, st.integers(1, 20))
def test_top_k_keeps_the_k_most_probable(logits, top_k):
    kept = Sampler(temperature=1.0, top_k=top_k).distribution(logits)[0] > 0
    best = logits[0].topk(min(top_k, logits.shape[1])).indices
    assert set(kept.nonzero()[:, 0].tolist()) <= set(best.tolist())
    assert kept[best[0]]


def test_top_k_keeps_k_of_equals():
    assert (
        Sampler(temperature=1.0, top_k=2).distribution(torch.zeros(1, 5)) > 0
    ).sum() == 2


@given(logit_rows)
def test_temperature_towards_zero_is_greedy(logits):
    likeliest = GREEDY(logits)
    assert torch.equal(likeliest, logits.argmax(dim=-1))
    one_hot = GREEDY.distribution(logits)
    assert torch.equal(one_hot, F.one_hot(likeliest, logits.shape[1]).float())
    for temperature in (1e-10, 1e-30):
        cold = Sampler(temperature=temperature)
        gap = logits.topk(2).values.diff().abs().item()
        if gap > 1e-8:
            assert torch.allclose(cold.distribution(logits), one_hot)


def test_nothing_is_cut_at_top_p_1():
    logits = torch.tensor([[0.0, -20.0, -30.0]])
    shares = Sampler(temperature=1.0).distribution(logits)
    assert torch.allclose(shares, logits.softmax(dim=-1), rtol=1e-6, atol=0)
    assert (shares > 0).all()


def test_bfloat16_logits_are_added_up_in_float32():
    logits = torch.randn(2, 5000).bfloat16()
    shares = Sampler(temperature=1.0, top_p=0.9).distribution(logits)
    assert shares.dtype == torch.float32
    assert torch.allclose(shares.sum(dim=-1), torch.ones(2), atol=1e-5)


def test_draws_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]])
    for knobs in ({}, {"top_k": 4}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.95}):
        sampler = Sampler(temperature=0.8, generator=generator, **knobs)
        shares = sampler.distribution(logits)[0].double()
        drawn = sampler(logits.expand(20_000, -1))
        counts = torch.bincount(drawn, minlength=6)
        kept = shares > 0
        assert counts[~kept].sum() == 0
        expected = shares[kept] / shares[kept].sum() * 20_000
        assert stats.chisquare(counts[kept], expected).pvalue > 1e-3


def test_the_same_seed_writes_the_same_whatever_was_drawn_before():
    def draw(seed, batch, noise):
        torch.rand(noise)
        generator = torch.Generator().manual_seed(seed)
        sampler = Sampler(temperature=1.0, generator=generator)
        return written(model_of(GEMMA1), batch, 8, sampler, stop=-1)[0]

    state = torch.get_rng_state()
    first = draw(3, ragged(), 0)
    assert torch.equal(state, torch.get_rng_state()), "torch's own was left alone"
    assert torch.equal(first, draw(3, ragged(), 99))
    assert not torch.equal(first, draw(4, ragged(), 0))
    other = dict(ragged())
    other["pixel_values"] = other["pixel_values"].clone()
    other["pixel_values"][0] = 0
    assert torch.equal(draw(3, other, 0)[1:], first[1:]), "rows draw for themselves"


@pytest.mark.parametrize(
    "knobs",
    [
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_k": 0},
    ],
    ids=str,
)
def test_knobs_out_of_range_are_refused(knobs):
    message = "temperature, top_k, top_p: expected 0 or more, 1 or more"
    with pytest.raises(ValueError, match=message):
        Sampler(**knobs)


def test_a_sampler_takes_whole_numbers(as_user):
    assert Sampler(temperature=1, top_p=1).distribution(torch.zeros(1, 2)).sum() == 1


# searching


SMALL = replace(GEMMA1, vocab_size=5)


@cache
def small_model(seed):
    config = PaliGemmaConfig(vision=VISION, text=SMALL, image_token=5)
    return fan_in(PaliGemma(config), seed).eval().requires_grad_(False)


def small_batch(rows=2):
    """Rows of ids 0 to 4 behind a picture."""
    ids = torch.tensor([[5, 5, 5, 5, 2, 3, 4], [0, 5, 5, 5, 5, 4, 2]])[:rows]
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    is_token = torch.ones_like(ids, dtype=torch.bool)
    is_token[1:, 0] = False
    return {
        "input_ids": ids,
        "attention_mask": is_token,
        "pixel_values": pixels[:rows],
    }


def exhaustive(model, batch, length, penalty):
    """The best of all answers of up to this length, row by row."""
    others = [token for token in range(5) if token != STOP]
    answers = [list(ids) for ids in itertools.product(others, repeat=length)]
    for n in range(length):
        answers += [[*ids, STOP] for ids in itertools.product(others, repeat=n)]
    table = {}
    with torch.no_grad():
        for n in range(length):
            for ids in itertools.product(others, repeat=n):
                tokens = torch.tensor([ids] * len(batch["input_ids"]), dtype=torch.long)
                tokens = tokens.reshape(len(batch["input_ids"]), n)
                table[ids] = next_logits(model, batch, tokens).log_softmax(dim=-1)
    best = []
    for row in range(len(batch["input_ids"])):
        scores = [
            sum(table[tuple(ids[:i])][row, token].item() for i, token in enumerate(ids))
            / len(ids) ** penalty
            for ids in answers
        ]
        best.append(max(zip(scores, answers, strict=True)))
    return best


@cache
def best_of_all(seed, penalty):
    return exhaustive(small_model(seed), small_batch(), 3, penalty)


def assert_wide_search_is_exhaustive(seeds=range(4), penalty=1.0):
    for seed in seeds:
        model, limits = small_model(seed), {"max_new_tokens": 3, "stop": STOP}
        options = {"num_beams": 64, "length_penalty": penalty}
        found = beam_search(model, small_batch(), **options, **limits)
        for (score, ids), (expected, answer) in zip(
            found, best_of_all(seed, penalty), strict=True
        ):
            assert ids == answer
            assert score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 2.0])
def test_a_wide_beam_search_is_exhaustive(penalty):
    assert_wide_search_is_exhaustive(penalty=penalty)


def test_one_beam_that_never_ends_is_greedy():
    expected, logits = written(model_of(GEMMA2), ragged(), 8, stop=-1)
    limits = {"max_new_tokens": 8, "stop": -1}
    found = beam_search(model_of(GEMMA2), ragged(), num_beams=1, **limits)
    own = logits.log_softmax(dim=-1).gather(-1, expected[..., None])[..., 0]
    for row, (score, ids) in enumerate(found):
        assert ids == expected[row].tolist()
        assert score == pytest.approx(own[row].mean().item(), abs=1e-4)


def narrow_search():
    """Two beams, an end in reach: what all rules of the search decide."""
    texts = []
    for seed in range(8):
        limits = {"max_new_tokens": 6, "stop": STOP}
        model = small_model(seed)
        texts += [
            (round(score, 4), ids)
            for score, ids in beam_search(model, small_batch(), num_beams=2, **limits)
        ]
    return texts


def test_beams_keep_what_they_have_read():
    """The score of an answer is what a whole forward gives it."""
    for (score, ids), row in zip(narrow_search(), itertools.count()):
        model, batch = small_model(row // 2), small_batch()
        tokens = torch.tensor([ids, ids])
        with torch.no_grad():
            logits = greedy_logits(model, batch, tokens[:, :-1])[row % 2]
        own = logits.log_softmax(dim=-1)[torch.arange(len(ids)), torch.tensor(ids)]
        assert score == pytest.approx(own.mean().item(), abs=2e-3)


@pytest.mark.parametrize("twin", museum.BEAMS, ids=name_of)
def test_wrong_beams_find_something_else(twin, monkeypatch):
    right = narrow_search()
    monkeypatch.setattr(module, "_Beams", twin)
    assert narrow_search() != right


def test_wrong_beams_fail_the_tests_of_the_search(monkeypatch):
    monkeypatch.setattr(module, "_Beams", museum.SumForMean)
    with pytest.raises(AssertionError):
        assert_wide_search_is_exhaustive()
    monkeypatch.setattr(module, "_Beams", museum.CacheStays)
    with pytest.raises(AssertionError):
        test_beams_keep_what_they_have_read()


@pytest.mark.parametrize("number", [0, -1, 2.5])
def test_a_search_needs_a_beam(number, as_user):
    with pytest.raises(ValueError, match="num_beams: expected at least 1, found"):
        beam_search(
            model_of(GEMMA1), ragged(), num_beams=number, max_new_tokens=2, stop=1
        )


def test_a_search_of_rows_that_end_at_different_steps_equals_each_alone():
    limits = {"max_new_tokens": 6, "stop": STOP}
    for seed in range(6):
        model, batch = small_model(seed), small_batch()
        both = beam_search(model, batch, num_beams=3, **limits)
        alone = beam_search(model, small_batch(1), num_beams=3, **limits)
        assert both[0][1] == alone[0][1]


# streaming


def assert_pieces_join(kind, text):
    tokenizer = processor().tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    stream = kind(tokenizer.decode)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) + stream.end() == tokenizer.decode(ids) == text
    assert stream.end() == ""


@given(st.text(st.characters(codec="utf-8", exclude_characters="▁\ufffd")))
@settings(max_examples=100)
def test_pieces_join_to_the_text(text):
    if "<" not in text:
        assert_pieces_join(TextStream, text)


@pytest.mark.parametrize("text", ["éléphant", "猫 und 犬", "🐈‍⬛ a cat", "a\n b"])
def test_letters_of_several_tokens(text):
    assert_pieces_join(TextStream, text)
    if not text.isascii():
        with pytest.raises(AssertionError):
            assert_pieces_join(museum.EachTokenAlone, text)


def test_a_letter_that_was_cut_comes_out_at_the_end():
    tokenizer = processor().tokenizer
    ids = tokenizer.encode("a猫").ids[:-1]
    stream = TextStream(tokenizer.decode)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) == "a" and "\ufffd" in stream.end()


# compile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_map_of_one_vector_is_a_sum(dtype):
    x, weight = torch.randn(1, 1, 96).to(dtype), torch.randn(33, 96).to(dtype)
    found = _map_of_one(x, weight)
    assert found.dtype == dtype
    expected = F.linear(x.double(), weight.double())
    assert_close(found, expected, 1e-6 if dtype == torch.float32 else 4e-3)


def test_the_compiled_step_is_one_graph_of_rewritten_maps(as_user, cpp_compiler):
    from torch._dynamo.utils import counters

    model, batch = model_of(GEMMA2), single(0)
    torch.compiler.reset()
    compiled_read_token.cache_clear()
    counters.clear()
    rewritten = []
    inner = torch._inductor.compile

    def watch(graph, inputs):
        rewritten.append(sum(n.target is _map_of_one for n in graph.graph.nodes))
        return inner(graph, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._inductor, "compile", watch)
        expected, expected_logits = written(model, batch, 32, stop=-1)
        read, seen = compiled_read_token(), []
        limits = {"max_new_tokens": 32, "stop": -1}
        for step in write_tokens(model, batch, GREEDY, read=read, **limits):
            seen.append(step)
            if len(seen) == 2:  # the first step has been compiled
                torch.compiler.set_stance("fail_on_recompile")
        torch.compiler.set_stance("default")
    found = torch.stack([tokens for tokens, _ in seen], dim=1)
    assert torch.equal(found, expected)
    assert_close(torch.stack([x for _, x in seen], dim=1), expected_logits, 1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert rewritten == [7 * 2 + 1]
    torch.compiler.reset()
    compiled_read_token.cache_clear()


def test_another_reader_gets_slots_by_the_128(as_user):
    """A compiled step fits all answers up to there: few programs are made."""
    widths = set()

    def read(model, tokens, positions, mask, cache):
        widths.add(mask.shape[-1])
        return read_token(model, tokens, positions, mask, cache)

    for number in (2, 9, 60):
        found, _ = written(model_of(GEMMA2), ragged(), number, stop=-1, read=read)
        expected, _ = written(model_of(GEMMA2), ragged(), number, stop=-1)
        assert torch.equal(found, expected)
    assert widths == {128}


def test_two_vectors_stay_maps(as_user):
    graphs = []

    def look(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._inductor, "compile", look)
        read = torch.compile(
            read_token, fullgraph=True, backend=module._matrix_vector, dynamic=False
        )
        found = written(model_of(GEMMA1), ragged(), 4, stop=-1, read=read)[0]
    assert not any(n.target is _map_of_one for n in graphs[0].graph.nodes)
    assert torch.equal(found, written(model_of(GEMMA1), ragged(), 4, stop=-1)[0])
    torch.compiler.reset()


def test_the_end_of_the_processor_is_the_default_stop():
    assert processor().id_of(EOS) == STOP


# What only a number shows


def test_a_row_that_is_done_stays_as_it_is(monkeypatch):
    steps = [[0.0, 0.6, 0.4], [0.0, 0.001, 0.999], [0.0, 0.999, 0.001]]
    other = [[0.0, 0.01, 0.99]] * 3
    logits = iter([torch.tensor(r).log() for r in zip(steps, other, strict=True)])
    monkeypatch.setattr(module, "prefill", lambda *_: (next(logits), None))
    monkeypatch.setattr(module, "decode_step", lambda *_: next(logits))
    monkeypatch.setattr(module, "_select", lambda state, rows: state)
    batch = {"input_ids": torch.zeros(2, 1, dtype=torch.long)}
    limits = {"num_beams": 1, "max_new_tokens": 3, "stop": STOP}
    assert beam_search(small_model(0), batch, **limits)[0][1] == [STOP]


def test_products_are_not_rounded_before_they_are_added():
    x = torch.tensor([[[1 + 2**-7, 1 + 2**-6]]]).bfloat16()
    weight = torch.tensor([[1 + 2**-7, -1.0]]).bfloat16()
    assert _map_of_one(x, weight).item() == 2**-14


def test_scores_of_a_bfloat16_model_are_added_up_in_float32():
    model, batch = new_model(GEMMA1).bfloat16(), dict(single(0))
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    limits = {"num_beams": 2, "max_new_tokens": 4, "stop": -1}
    ((score, ids),) = beam_search(model, batch, **limits)
    with torch.no_grad():
        logits = greedy_logits(model, batch, torch.tensor([ids])[:, :-1])[0]
    own = logits.float().log_softmax(-1)[torch.arange(4), torch.tensor(ids)]
    assert score == pytest.approx(own.mean().item(), abs=1e-3)


def test_the_last_block_of_a_prefill_works_on_one_place():
    model, sizes = new_model(GEMMA1), []
    model.language.layers[-1].mlp.register_forward_hook(
        lambda module, arguments, output: sizes.append(output.shape[1])
    )
    written(model, ragged(), 2, stop=-1)
    assert sizes == [1, 1]
