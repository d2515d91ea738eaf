"""Chapter 12: PaliGemma against Hugging Face, loops, and its wrong twins."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pgcore import paligemma
from pgcore.gemma import Gemma
from pgcore.kv_cache import KVCache
from pgcore.lab.museum import paligemma as museum
from pgcore.paligemma import (
    TINY,
    PaliGemma,
    PaliGemmaConfig,
    PrefixGemma,
    Projector,
    prefix_lm_mask,
    suffix_loss,
)
from pgcore.processing import IGNORE, Processor, train_tokenizer
from pgcore.rope import token_positions
from pgcore.vision import VisionConfig
from pgcore.weights import hub_name, hugging_face_name
from tests.draws import GEMMA1, GEMMA2, fan_in
from tests.reference.paligemma import (
    insert_by_loops,
    prefix_lm_mask_by_loops,
    suffix_loss_by_loops,
)

# No two sizes equal by chance; head_dim is not width / num_heads; P is 4.
EYES = VisionConfig(
    width=24,
    depth=2,
    mlp_dim=44,
    num_heads=2,
    head_dim=12,
    patch_size=7,
    image_size=14,
)
ONE = PaliGemmaConfig(vision=EYES, text=GEMMA1, image_token=96)
TWO = PaliGemmaConfig(vision=EYES, text=GEMMA2, image_token=96)
BOTH = pytest.mark.parametrize("config", [ONE, TWO], ids=["one", "two"])
EVERY_TWIN = pytest.mark.parametrize("twin", museum.TWINS, ids=lambda t: t.__name__)
LOSS_TWINS = {museum.LossOnThePrefix, museum.LossNotShifted, museum.LossOverPadding}
TOLERANCE = 5e-6


@cache
def model_of(config):
    return fan_in(PaliGemma(config)).eval()


def ragged(seed=0):
    """Two pictures in a row, one behind padding, none, one without an answer."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (4, 20), generator=generator)
    slot = torch.arange(20)
    is_token = slot >= torch.tensor([[0], [4], [7], [2]])
    is_suffix = slot >= torch.tensor([[15], [18], [12], [20]])
    ids[0, 0:8] = ids[1, 4:8] = ids[3, 2:6] = 96
    ids[~is_token] = 0
    return {
        "pixel_values": torch.randn(4, 3, 14, 14, generator=generator),
        "input_ids": ids,
        "attention_mask": is_token,
        "suffix_mask": is_suffix,
        "labels": ids.where(is_suffix, IGNORE),
    }


BATCH = ragged()
REAL = BATCH["attention_mask"]


def without(batch, *names):
    return {name: value for name, value in batch.items() if name not in names}


PROMPTS = without(BATCH, "suffix_mask", "labels")


@torch.no_grad()
def logits_of(model, batch):
    return model(**without(batch, "labels")).logits


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * expected.abs().max().item(), error


# Hugging Face


def their_config(config):
    transformers = pytest.importorskip("transformers", minversion="5.9")
    v, t = config.vision, config.text
    text = {
        "model_type": "gemma2" if t.post_norms else "gemma",
        "hidden_size": t.width,
        "intermediate_size": t.mlp_dim,
        "num_hidden_layers": t.depth,
        "num_attention_heads": t.num_heads,
        "num_key_value_heads": t.num_kv_heads,
        "head_dim": t.head_dim,
        "vocab_size": t.vocab_size,
    }
    if t.post_norms:
        text |= {
            "query_pre_attn_scalar": round(t.query_scale**-2),
            "sliding_window": t.window,
            "attn_logit_softcapping": t.attention_softcap,
            "final_logit_softcapping": t.final_softcap,
        }
    vision = {
        "model_type": "siglip_vision_model",
        "vision_use_head": False,
        "hidden_size": v.width,
        "intermediate_size": v.mlp_dim,
        "num_hidden_layers": v.depth,
        "num_attention_heads": v.num_heads,
        "image_size": v.image_size,
        "patch_size": v.patch_size,
        "projection_dim": t.width,
    }
    return transformers.PaliGemmaConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=t.width,
        image_token_id=config.image_token,
        pad_token_id=0,
        attn_implementation="eager",
    )


@cache
def hugging_face(config):
    transformers = pytest.importorskip("transformers")
    hf = transformers.PaliGemmaForConditionalGeneration(their_config(config))
    theirs = {hub_name(name): name for name in hf.state_dict()}
    model = model_of(config)
    weights = {
        theirs[hugging_face_name(name, config.text.post_norms)]: weight.clone()
        for name, weight in model.state_dict().items()
    }
    weights["lm_head.weight"] = model.language.embed_tokens.weight.clone()
    hf.load_state_dict(weights)
    return hf.eval()


def expected_of(config, batch, **options):
    """What transformers answers; always with token_type_ids."""
    is_token = batch["attention_mask"]
    types = batch.get("suffix_mask", is_token & False)
    pixels = batch["pixel_values"]
    with torch.no_grad():
        return hugging_face(config)(
            pixel_values=pixels if len(pixels) else None,
            input_ids=batch["input_ids"],
            attention_mask=is_token.long(),
            token_type_ids=types.long(),
            labels=batch.get("labels"),
            **options,
        )


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_logits_and_loss_equal_hugging_face(config, seed):
    batch = ragged(seed)
    real, model = batch["attention_mask"], model_of(config)
    theirs = expected_of(config, batch)
    assert_close(logits_of(model, batch)[real], theirs.logits[real])
    with torch.no_grad():
        logits = model(**batch).logits
    assert_close(suffix_loss(logits, batch["labels"], "tokens"), theirs.loss)
    prompts = without(batch, "suffix_mask", "labels")
    theirs = expected_of(config, prompts)
    assert_close(logits_of(model, prompts)[real], theirs.logits[real])


@BOTH
def test_gradients_equal_hugging_face(config):
    model, hf = fan_in(PaliGemma(config)), hugging_face(config)
    logits = model(**BATCH).logits
    suffix_loss(logits, BATCH["labels"], "tokens").backward()
    hf.zero_grad()
    hf(
        pixel_values=BATCH["pixel_values"],
        input_ids=BATCH["input_ids"],
        attention_mask=REAL.long(),
        token_type_ids=BATCH["suffix_mask"].long(),
        labels=BATCH["labels"],
    ).loss.backward()
    theirs = {hub_name(n): p.grad for n, p in hf.named_parameters()}
    for name, parameter in model.named_parameters():
        there = hugging_face_name(name, config.text.post_norms)
        if parameter.grad.abs().max() > 1e-6:  # k's bias has none but rounding
            assert_close(parameter.grad, theirs[there], 5e-5)


@BOTH
def test_rows_without_pictures_equal_hugging_face(config):
    batch = {
        name: value[2:3, 7:] for name, value in without(BATCH, "pixel_values").items()
    }
    batch |= {"pixel_values": torch.empty(0, 3, 14, 14)}
    theirs = expected_of(config, batch).logits
    assert_close(logits_of(model_of(config), batch), theirs)


def relative(wrong, right):
    return ((wrong - right).abs().max() / right.abs().max()).item()


@EVERY_TWIN
@BOTH
def test_wrong_twins_fail_the_parity_test(twin, config):
    """In their logits or, for those that leave the logits alone, in their loss."""
    bug = museum.with_bug(model_of(config), twin)
    theirs = expected_of(config, BATCH).logits
    if twin not in LOSS_TWINS:
        assert relative(logits_of(bug, BATCH)[REAL], theirs[REAL]) > 100 * TOLERANCE
        return
    assert_close(logits_of(bug, BATCH)[REAL], theirs[REAL])
    with torch.no_grad():
        loss = bug(**BATCH).loss
    right = suffix_loss_by_loops(theirs, BATCH["labels"])
    assert relative(loss, right) > 100 * TOLERANCE


@EVERY_TWIN
def test_wrong_twins_run_and_have_the_right_shape(twin):
    bug = museum.with_bug(model_of(TWO), twin)
    assert logits_of(bug, BATCH).shape == (4, 20, 97)
    assert logits_of(bug, PROMPTS).shape == (4, 20, 97)


def test_each_twin_has_one_bug_of_its_own():
    model, seen = model_of(TWO), []
    for twin in museum.TWINS:
        bug = museum.with_bug(model, twin)
        with torch.no_grad():
            seen.append(
                torch.cat([logits_of(bug, BATCH).flatten(), bug(**BATCH).loss[None]])
            )
    for one in range(len(seen)):
        for other in range(one):
            assert not torch.allclose(seen[one], seen[other], rtol=1e-4, atol=1e-5)


# The window of Gemma 2, and a prefix that is longer


def test_without_its_window_or_cut_by_it_the_prefix_fails_parity():
    theirs = expected_of(TWO, BATCH).logits[REAL]
    model = fan_in(PaliGemma(replace(TWO, text=replace(GEMMA2, window=None)))).eval()
    assert relative(logits_of(model, BATCH)[REAL], theirs) > 1e-2
    cut = fan_in(PaliGemma(TWO)).eval()
    cut.language.__class__ = Gemma
    assert relative(logits_of(cut, BATCH)[REAL], theirs) > 1e-2


@given(st.integers(0, 4), st.integers(0, 8), st.integers(0, 6), st.integers(1, 9))
def test_local_masks_equal_loops(padding, prefix, suffix, window):
    S = padding + prefix + suffix
    if not S:
        return
    slot = torch.arange(S)[None]
    is_token, is_suffix = slot >= padding, slot >= padding + prefix
    gemma = PrefixGemma(replace(GEMMA2, depth=1, vocab_size=1, window=window))
    local, full = gemma._masks(prefix_lm_mask(is_token, is_suffix), slot[0])
    assert torch.equal(full, prefix_lm_mask_by_loops(is_token, is_suffix))
    for query in range(padding, S):
        for key in range(S):
            both_prefix = max(query, key) < padding + prefix
            near = query - key < window
            expected = bool(full[0, 0, query, key]) and (near or both_prefix)
            assert bool(local[0, 0, query, key]) == expected


@BOTH
def test_a_prefix_through_a_cache_equals_one_without(config):
    model = model_of(config)
    t = config.text
    kept = KVCache(
        depth=t.depth,
        batch_size=4,
        num_slots=26,
        num_kv_heads=t.num_kv_heads,
        head_dim=t.head_dim,
    )
    with torch.no_grad():
        x = model.embed(BATCH["input_ids"], model.encode_images(BATCH["pixel_values"]))
        kept.reserve(20)
        mask = F.pad(prefix_lm_mask(REAL, REAL & False), (0, 6))
        hidden = model.language(
            x, positions=token_positions(REAL), mask=mask, cache=kept
        )
        found = model.language.logits(hidden)
    assert_close(found[REAL], logits_of(model, PROMPTS)[REAL])


def test_a_gemma_without_a_prefix_is_unchanged():
    plain, ours = (fan_in(kind(GEMMA2)).eval() for kind in (Gemma, PrefixGemma))
    mask = prefix_lm_mask(REAL, torch.ones_like(REAL))  # causal
    with torch.no_grad():
        hidden = [
            g(g.embed(BATCH["input_ids"]), positions=token_positions(REAL), mask=mask)
            for g in (plain, ours)
        ]
    assert torch.equal(*hidden)


# Masks and leaks


LAYOUT = st.tuples(*[st.integers(0, 5)] * 4)  # left padding, prefix, suffix, right


@given(st.lists(LAYOUT, min_size=1, max_size=4))
def test_the_mask_equals_loops_for_any_layout(rows):
    S = max(1, max(map(sum, rows)))
    is_token = torch.zeros(len(rows), S, dtype=torch.bool)
    is_suffix = is_token.clone()
    for row, (left, prefix, suffix, _) in enumerate(rows):
        is_token[row, left : left + prefix + suffix] = True
        is_suffix[row, left + prefix : left + prefix + suffix] = True
    ours, loops = (
        way(is_token, is_suffix) for way in (prefix_lm_mask, prefix_lm_mask_by_loops)
    )
    queries = is_token[:, None, :, None].expand_as(ours)  # rows of padding: anything
    assert torch.equal(ours[queries], loops[queries])


def influence(model, batch, row):
    """d logits at t by d vector at j, of one row of a batch."""
    caught = []

    def catch(module, inputs):
        caught.append(inputs[0].detach().requires_grad_())
        return (caught[0],)

    handle = model.language.register_forward_pre_hook(catch)
    logits = model(**without(batch, "labels")).logits[row]
    handle.remove()
    push = torch.randn(logits.shape[1], generator=torch.Generator().manual_seed(0))
    grads = [
        torch.autograd.grad(line @ push, caught[0], retain_graph=True)[0]
        for line in logits
    ]
    others = [g[[r for r in range(len(g)) if r != row]] for g in grads]
    assert all((g == 0).all() for g in others), "rows must not hear each other"
    return torch.stack([g[row].norm(dim=-1) for g in grads])


@settings(max_examples=25)
@given(
    st.booleans(),
    st.integers(0, 3),
    st.integers(0, 2),
    st.integers(1, 4),
    st.integers(0, 4),
    st.integers(0, 99),
)
def test_no_leak_for_any_layout(second, padding, pictures, prompt, suffix, seed):
    """Exactly zero from the future and padding; non-zero both ways in the prefix."""
    generator = torch.Generator().manual_seed(seed)
    first = padding + 4 * pictures + prompt
    T = first + suffix
    ids = torch.randint(3, 96, (2, T), generator=generator)
    ids[1, padding : padding + 4 * pictures] = 96
    slot = torch.arange(T).expand(2, T)
    batch = {
        "pixel_values": torch.randn(pictures, 3, 14, 14, generator=generator),
        "input_ids": ids,
        "attention_mask": slot >= torch.tensor([[0], [padding]]),
        "suffix_mask": slot >= first,
    }
    found = influence(model_of(TWO if second else ONE), batch, row=1)
    for t in range(padding, T):
        for j in range(T):
            may = j >= padding and (j < first or (t >= first and j <= t))
            assert (found[t, j] > 0) == may, (t, j)


LEAKS = [museum.AllOnesMask, museum.SuffixReadsItself]


@pytest.mark.parametrize("twin", LEAKS, ids=lambda t: t.__name__)
def test_the_detector_sees_what_leaks(twin):
    found = influence(museum.with_bug(model_of(ONE), twin), BATCH, row=2)
    future = torch.ones(20, 20).triu(1).bool()[12:, 12:]
    assert (found[12:, 12:][future] > 0).all()


def test_one_layer_does_not_care_about_the_prefixs_own_reading():
    for depth, same in ((1, True), (2, False)):
        config = replace(ONE, text=replace(GEMMA1, depth=depth))
        full = fan_in(PaliGemma(config)).eval()
        causal = museum.with_bug(full, museum.FullyCausal)
        with torch.no_grad():
            one, other = full(**BATCH).logits, causal(**BATCH).logits
        assert (relative(other, one) < TOLERANCE) == same


@BOTH
def test_pad_ids_never_matter(config):
    model = model_of(config)
    for batch in (BATCH, PROMPTS):
        ids = batch["input_ids"].where(REAL, 17)
        found = logits_of(model, batch | {"input_ids": ids})
        assert torch.equal(found[REAL], logits_of(model, batch)[REAL])


@BOTH
def test_batched_equals_single(config):
    model, pictures = model_of(config), [slice(0, 2), slice(2, 3), slice(3, 3)]
    for row, start in enumerate((0, 4, 7)):
        alone = {
            name: value[row : row + 1, start:]
            for name, value in without(BATCH, "pixel_values").items()
        }
        alone |= {"pixel_values": BATCH["pixel_values"][pictures[row]]}
        found = logits_of(model, alone)
        assert_close(found[0], logits_of(model, BATCH)[row, start:])


def test_fully_padded_rows_give_no_nan_and_change_nothing():
    model = fan_in(PaliGemma(TWO))
    real = REAL.clone()
    real[2] = False  # the row without pictures
    batch = BATCH | {
        "attention_mask": real,
        "suffix_mask": BATCH["suffix_mask"] & real,
        "labels": BATCH["labels"].where(real, IGNORE),
    }
    out = model(**batch)
    out.loss.backward()
    assert out.logits.isfinite().all() and out.loss.isfinite()
    assert logits_of(model, batch).isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    others = [0, 1, 3]
    found, expected = (logits_of(model, b)[others] for b in (batch, BATCH))
    assert torch.equal(found[REAL[others]], expected[REAL[others]])


def test_positions_from_zero_or_one():
    model = model_of(TWO)
    with torch.no_grad():
        x = model.embed(BATCH["input_ids"], model.encode_images(BATCH["pixel_values"]))
        hidden = model.language(
            x,
            positions=token_positions(REAL) + 1,
            mask=prefix_lm_mask(REAL, BATCH["suffix_mask"]),
        )
    found = model.language.logits(hidden)
    assert_close(found[REAL], logits_of(model, BATCH)[REAL])


# Image tokens


def test_image_tokens_are_not_scaled_and_words_are():
    model = model_of(ONE)
    ids = BATCH["input_ids"]
    with torch.no_grad():
        tokens = model.encode_images(BATCH["pixel_values"])
        x = model.embed(ids, tokens)
    table = model.language.embed_tokens.weight.detach()
    words = table[ids] * 40**0.5
    assert_close(x, insert_by_loops(words, ids == 96, tokens), 1e-7)
    assert torch.equal(x[ids == 96], tokens.flatten(0, 1))


def test_dividing_first_and_multiplying_everything_is_the_same_model():
    model = model_of(ONE)
    old = fan_in(PaliGemma(ONE)).eval()
    old.language.embed = lambda ids: old.language.embed_tokens(ids)
    for weight in old.projector.parameters():
        weight.data /= 40**0.5
    with torch.no_grad():
        x = old.embed(BATCH["input_ids"], old.encode_images(BATCH["pixel_values"]))
        expected = model.embed(
            BATCH["input_ids"], model.encode_images(BATCH["pixel_values"])
        )
    assert_close(x * 40**0.5, expected, 1e-6)


def test_the_image_tokens_id_may_lie_outside_of_the_table():
    outside = fan_in(PaliGemma(replace(ONE, image_token=97))).eval()
    ids = BATCH["input_ids"].masked_fill(BATCH["input_ids"] == 96, 97)
    found = logits_of(outside, BATCH | {"input_ids": ids})
    assert torch.equal(found, logits_of(model_of(ONE), BATCH))


def test_the_row_of_the_image_token_is_never_read_and_gets_no_gradient():
    model = fan_in(PaliGemma(ONE))
    x = model.embed(BATCH["input_ids"], model.encode_images(BATCH["pixel_values"]))
    x.square().sum().backward()
    grad = model.language.embed_tokens.weight.grad
    assert (grad[96] == 0).all() and (grad[3:96].abs().sum() > 0)
    # padding is looked up: row 0 hears of its own places alone
    pads = (BATCH["input_ids"] == 0).sum()
    table = model.language.embed_tokens.weight.detach()
    assert_close(grad[0], 2 * pads * 40 * table[0], 1e-5)


def test_several_pictures_keep_their_order():
    model = model_of(ONE)
    swapped = BATCH["pixel_values"][[1, 0, 2, 3]]
    found = logits_of(model, BATCH | {"pixel_values": swapped})
    right = logits_of(model, BATCH)
    assert relative(found[0], right[0]) > 1e-2
    assert torch.equal(found[1:], right[1:])


def test_the_projector_starts_at_zero_and_shields_the_tower_for_one_step():
    torch.manual_seed(0)
    model = PaliGemma(ONE)
    assert all((w == 0).all() for w in model.projector.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        model(**BATCH).loss.backward()
        tower = sum(w.grad.abs().sum() for w in model.vision.parameters())
        assert (tower > 0) == (step > 0)
        assert model.projector.linear.weight.grad.abs().sum() > 0
        optimizer.step()


# The loss


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=5),
    st.integers(0, 99),
    st.sampled_from(["examples", "tokens"]),
)
def test_the_loss_equals_loops(lengths, seed, average):
    generator = torch.Generator().manual_seed(seed)
    B, T = len(lengths), 7
    logits = torch.randn(B, T, 11, generator=generator)
    labels = torch.randint(11, (B, T), generator=generator)
    labels[torch.arange(T) < T - torch.tensor(lengths)[:, None]] = IGNORE
    logits.requires_grad_()
    predicts = labels[:, 1:] != IGNORE
    found = suffix_loss(logits[:, :-1][predicts], labels, average)
    if average == "examples":
        expected = suffix_loss_by_loops(logits, labels).float()
    elif predicts.any():
        expected = F.cross_entropy(logits[:, :-1].mT, labels[:, 1:])
    else:
        expected = 0 * logits.sum()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    pair = [torch.autograd.grad(x, logits)[0] for x in (found, expected)]
    torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)


def test_a_batch_of_examples_is_the_mean_of_its_rows():
    model = model_of(ONE)
    losses = []
    with torch.no_grad():
        for row, (start, pictures) in enumerate(((0, slice(0, 2)), (4, slice(2, 3)))):
            alone = {
                name: value[row : row + 1, start:]
                for name, value in without(BATCH, "pixel_values").items()
            }
            alone |= {"pixel_values": BATCH["pixel_values"][pictures]}
            losses.append(model(**alone).loss)
        two = {name: value[:2] for name, value in BATCH.items()}
        two |= {"pixel_values": BATCH["pixel_values"][:3]}
        together = model(**two).loss
    assert_close(together, sum(losses) / 2)


def test_logits_exist_only_where_a_label_is_predicted():
    model, shapes = model_of(ONE), []
    original = model.language.logits
    model.language.logits = lambda h: shapes.append(tuple(h.shape)) or original(h)
    try:
        with torch.no_grad():
            out = model(**BATCH)
            model(**PROMPTS)
    finally:
        del model.language.logits
    labelled = int((BATCH["labels"] != IGNORE).sum())
    assert shapes == [(labelled, 40), (4, 20, 40)] and labelled == 5 + 2 + 8
    assert out.logits.shape == (labelled, 97)
    all_logits = logits_of(model, BATCH)
    predicts = BATCH["labels"][:, 1:] != IGNORE
    assert_close(out.logits, all_logits[:, :-1][predicts])


def test_the_loss_is_computed_in_float32_at_least():
    logits = torch.randn(3, 50).bfloat16()
    labels = torch.tensor([[IGNORE, 4, 5, 6]])
    loss = suffix_loss(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, suffix_loss(logits.float(), labels))
    assert suffix_loss(logits.double(), labels).dtype == torch.float64


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("average", ["examples", "tokens"])
def test_label_smoothing_equals_torch(smoothing, average):
    logits, labels = torch.randn(3, 9, 11), torch.randint(11, (3, 9))
    labels[0, :6] = labels[1, :2] = labels[2, :8] = IGNORE
    predicts = labels[:, 1:] != IGNORE
    found = suffix_loss(logits[:, :-1][predicts], labels, average, smoothing)
    rows = logits[:, :-1].mT, labels[:, 1:]
    if average == "tokens":
        expected = F.cross_entropy(*rows, label_smoothing=smoothing)
    else:
        each = [
            F.cross_entropy(x[None], y[None], label_smoothing=smoothing)
            for x, y in zip(*rows, strict=True)
        ]
        expected = sum(each) / 3
    assert_close(found, expected)


def test_no_labels_no_loss_and_a_batch_without_any_is_zero():
    model = model_of(ONE)
    with torch.no_grad():
        assert model(**PROMPTS).loss is None
        labels = torch.full_like(BATCH["labels"], IGNORE)
        assert model(**(BATCH | {"labels": labels})).loss == 0


def test_trains_under_autocast():
    model = fan_in(PaliGemma(ONE))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**BATCH).loss
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(**BATCH).loss, rtol=0.05, atol=0)


# The batch of chapter 11


def test_the_processors_batch_fits():
    tokenizer = train_tokenizer(["caption en\n a cat and a red apple"] * 5, 280)
    processor = Processor(tokenizer, image_size=14, num_image_tokens=4)
    picture = Image.new("RGB", (20, 9), "red")
    batch = processor(
        [picture, [picture, picture], []], ["a", "two of them", "none"], ["b", "c", "d"]
    )
    text = replace(GEMMA2, vocab_size=tokenizer.get_vocab_size())
    token = processor.id_of("<image>")
    config = PaliGemmaConfig(vision=EYES, text=text, image_token=token)
    model = fan_in(PaliGemma(config)).eval()
    with torch.no_grad():
        out = model(**batch)
    assert len(out.logits) == (batch["labels"] != IGNORE).sum() == 6
    assert out.loss.isfinite()


# Presets


PARAMETERS = {
    "PALIGEMMA_3B": 2_923_466_480,
    "PALIGEMMA2_3B": 3_032_242_416,
    "PALIGEMMA2_10B": 9_662_638_832,
    "PALIGEMMA2_28B": 27_650_487_024,
}
MORE_POSITIONS = {224: 0, 448: 884_736, 896: 4_423_680}
EVERY_PRESET = pytest.mark.parametrize(
    ("name", "size"), [(n, s) for n in PARAMETERS for s in MORE_POSITIONS]
)


def on_meta(config):
    with torch.device("meta"):
        return PaliGemma(config)


@EVERY_PRESET
def test_presets_have_the_published_number_of_parameters(name, size):
    config = getattr(paligemma, f"{name}_{size}")
    number = sum(p.numel() for p in on_meta(config).parameters())
    assert number == PARAMETERS[name] + MORE_POSITIONS[size]


# width, depth, MLP, heads, KV heads, head dim, scale, soft-caps, window, post-norms
DECODERS = {
    "PALIGEMMA_3B": (2048, 18, 16384, 8, 1, 256, None, None, None, None, False),
    "PALIGEMMA2_3B": (2304, 26, 9216, 8, 4, 256, None, 50.0, 30.0, 4096, True),
    "PALIGEMMA2_10B": (3584, 42, 14336, 16, 8, 256, None, 50.0, 30.0, 4096, True),
    "PALIGEMMA2_28B": (4608, 46, 36864, 32, 16, 128, 1 / 12, 50.0, 30.0, 4096, True),
}


@EVERY_PRESET
def test_presets_are_as_published_field_by_field(name, size):
    config = getattr(paligemma, f"{name}_{size}")
    t, v = config.text, config.vision
    sizes = t.width, t.depth, t.mlp_dim, t.num_heads, t.num_kv_heads, t.head_dim
    rest = (t.attention_softcap, t.final_softcap, t.window, t.post_norms)
    published = DECODERS[name]
    assert sizes == published[:6] and rest == published[7:]
    assert t.query_scale == pytest.approx(published[6])
    assert t.rope_base == 10_000
    assert t.vocab_size == 257_216 and config.image_token == 257_152
    assert (v.width, v.depth, v.mlp_dim, v.num_heads) == (1152, 27, 4304, 16)
    assert (v.head_dim, v.patch_size, v.image_size) == (72, 14, size)
    assert v.num_patches == {224: 256, 448: 1024, 896: 4096}[size]


def test_tiny_has_the_ids_of_the_books_tokenizer():
    assert TINY.image_token == 3071 == TINY.text.vocab_size - 1
    assert TINY.text.head_dim != TINY.text.width // TINY.text.num_heads
    assert TINY.vision.num_patches == 64
    assert sum(p.numel() for p in on_meta(TINY).parameters()) == 4_764_864


@pytest.mark.parametrize("name", PARAMETERS)
def test_runs_at_full_size_on_the_meta_device(name):
    config = getattr(paligemma, f"{name}_224")
    model = on_meta(config)
    ids = torch.empty(2, 270, dtype=torch.long, device="meta")
    pixels = torch.empty(2, 3, 224, 224, device="meta")
    real = torch.ones(2, 270, dtype=torch.bool, device="meta")
    out = model(pixels, ids, real, real)
    assert out.logits.shape == (2, 270, 257_216) and out.loss is None
    assert model(pixels[:0], ids).logits.device.type == "meta"


# Errors


LABELS = torch.tensor([[IGNORE, 1, 2]])
BAD_LOSSES = {
    "average": ((torch.zeros(2, 5), LABELS, "rows"), "expected examples or tokens"),
    "too few": ((torch.zeros(1, 5), LABELS), r"expected \[2, V\].* found \(1, 5\)"),
    "all places": ((torch.zeros(1, 3, 5), LABELS), r"found \(1, 3, 5\)"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_LOSSES.values(), ids=BAD_LOSSES)
def test_a_loss_that_does_not_fit_is_a_value_error(bad, message, as_user):
    with pytest.raises(ValueError, match=message):
        suffix_loss(*bad)


BAD_BATCHES = {
    "a picture too few": (
        {"pixel_values": BATCH["pixel_values"][:3]},
        r"expected 12 places for image tokens \(3 pictures\), found 16",
    ),
    "no pictures": (
        {"pixel_values": BATCH["pixel_values"][:0]},
        r"expected 0 places for image tokens \(0 pictures\), found 16",
    ),
    "another image size": (
        {"pixel_values": torch.zeros(4, 3, 21, 21)},
        "images: expected 14 x 14, got 21 x 21",
    ),
    "labels of another shape": (
        {"labels": BATCH["labels"][:, 1:]},
        r"labels: expected \(4, 20\), as input_ids, found \(4, 19\)",
    ),
    "a mask of numbers": ({"attention_mask": REAL.long()}, "is_token"),
    "a mask of another shape": ({"suffix_mask": REAL[:, 1:]}, "starts_block"),
    "an id that is no row": (
        {"input_ids": BATCH["input_ids"] + 97 * (BATCH["input_ids"] == 0)},
        "the vocabulary has 97 words",
    ),
}


@pytest.mark.parametrize(("bad", "message"), BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_a_batch_that_does_not_fit_is_a_value_error(bad, message, as_user):
    with pytest.raises(ValueError, match=message):
        model_of(ONE)(**(BATCH | bad))


def test_a_negative_image_token_is_a_value_error():
    with pytest.raises(ValueError, match="image_token: expected 0 or more, found -1"):
        replace(ONE, image_token=-1)


def test_a_mask_needs_booleans(as_user):
    with pytest.raises(ValueError, match="expected booleans"):
        prefix_lm_mask(REAL.long(), REAL)


def test_the_projector_is_one_linear_map():
    projector = fan_in(Projector(6, 4))
    x = torch.randn(2, 3, 6)
    linear = projector.linear
    assert_close(projector(x), x @ linear.weight.T + linear.bias)


# What a batch may lack, and what it may not


def test_a_picture_too_many_is_a_value_error(as_user):
    more = torch.cat([BATCH["pixel_values"], BATCH["pixel_values"][:1]])
    with pytest.raises(ValueError, match="expected 20 places .*found 16"):
        model_of(ONE)(**(BATCH | {"pixel_values": more}))


def test_places_without_image_tokens_are_a_value_error():
    with pytest.raises(ValueError, match="expected 0 places .* found 16"):
        model_of(ONE).embed(BATCH["input_ids"])


def test_no_attention_mask_means_no_padding():
    batch = {name: value[:1] for name, value in BATCH.items()}
    batch |= {"pixel_values": BATCH["pixel_values"][:2]}
    found = logits_of(model_of(TWO), without(batch, "attention_mask"))
    assert torch.equal(found, logits_of(model_of(TWO), batch))


def test_pixels_are_taken_to_the_models_dtype():
    model = fan_in(PaliGemma(ONE)).double().eval()
    assert logits_of(model, BATCH).dtype == torch.float64


def test_a_tower_may_have_another_dtype_than_the_decoder():
    model = fan_in(PaliGemma(ONE)).eval()
    model.vision.bfloat16()
    expected = logits_of(fan_in(PaliGemma(ONE)).eval(), BATCH)
    assert relative(logits_of(model, BATCH)[REAL], expected[REAL]) < 0.1


def test_a_local_mask_of_later_slots():
    gemma = PrefixGemma(replace(GEMMA2, depth=1, vocab_size=1, window=2))
    block = torch.ones(1, 1, 4, 9, dtype=torch.bool)
    block[..., :2] = block[..., 8:] = False  # padding; not written yet
    local, _ = gemma._masks(block, torch.arange(4, 8))
    expected = torch.zeros(4, 9, dtype=torch.bool)
    expected[:, 4:8] = True
    expected[0, 3] = True
    assert torch.equal(local[0, 0], expected)


def test_embed_compiles_without_a_break(as_user):
    model = model_of(ONE)
    with torch.no_grad():
        tokens = model.encode_images(BATCH["pixel_values"])
        explain = torch._dynamo.explain(lambda ids, images: model.embed(ids, images))
        found = explain(BATCH["input_ids"], tokens)
    assert found.graph_break_count == 0
