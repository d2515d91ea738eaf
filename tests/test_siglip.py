"""Chapter 07: the two towers against Hugging Face, and recall against scikit-learn."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import top_k_accuracy_score
from torch import nn

from pgcore.lab.museum import siglip as museum
from pgcore.lab.pretrained import load_emoji_siglip
from pgcore.siglip import (
    SO400M_TEXT,
    TINY_TEXT,
    SigLIP,
    TextConfig,
    TextTower,
    rank_of_match,
    retrieval_recall,
)
from pgcore.sigmoid import INITIAL_BIAS, INITIAL_LOG_SCALE, siglip_loss
from pgcore.vision import SO400M_14_224, TINY, VisionConfig

VISION = VisionConfig(
    width=64,
    depth=2,
    mlp_dim=96,
    num_heads=4,
    head_dim=16,
    patch_size=4,
    image_size=12,
)
TEXT = TextConfig(
    vocab_size=40,
    max_length=9,
    width=48,
    depth=3,
    mlp_dim=80,
    num_heads=4,
    head_dim=12,
    projection_dim=64,
)
LOG_SCALE, BIAS = 2.0, -3.0

TEXT_TWINS = [
    museum.FirstTokenPooled,
    museum.MeanPooled,
    museum.CausalText,
    museum.PaddingHidden,
]
MODEL_TWINS = [
    museum.ScaleWithoutExp,
    museum.BiasLeftOut,
    museum.PooledBeforeNorm,
    museum.PicturesFromZero,
]
RANK_TWINS = [museum.ties_in_favour, museum.ranks_in_columns]


def count(module):
    return sum(p.numel() for p in module.parameters())


def hugging_face(vision, text):
    """SiglipModel of these sizes, every weight at fan-in scale, scalars by hand."""
    from transformers import SiglipConfig, SiglipModel

    def sizes(config):
        return {
            "hidden_size": config.width,
            "intermediate_size": config.mlp_dim,
            "num_hidden_layers": config.depth,
            "num_attention_heads": config.num_heads,
        }

    config = SiglipConfig(
        text_config={
            **sizes(text),
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.max_length,
            "projection_size": text.projection_dim,
        },
        vision_config={
            **sizes(vision),
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
    )
    model = SiglipModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight") or "norm1.w" in name or "norm2.w" in name:
                weight.normal_(1.0, 0.3)
            else:
                fan_in = weight[0].numel() if weight.ndim > 1 else 4
                weight.normal_(0.0, fan_in**-0.5)
        model.logit_scale.fill_(LOG_SCALE)
        model.logit_bias.fill_(BIAS)
    return model


def from_hugging_face(weights, vision):
    """Hugging Face's weights under our names."""
    ours = {}
    for name, weight in weights.items():
        if ".in_proj_" in name:  # the pooling head holds q, k and v in one tensor
            kind = name.rsplit("_", 1)[1]
            parts = weight.split(vision.width)
            for letter, part in zip("qkv", parts, strict=True):
                ours[f"pool.attention.{letter}_proj.{kind}"] = part
            continue
        for theirs, our in (
            ("logit_scale", "log_scale"),
            ("logit_bias", "bias"),
            ("vision_model.head.attention.out_proj", "pool.attention.o_proj"),
            ("vision_model.head.", "pool."),
            ("vision_model.embeddings.patch_embedding", "vision.patch_embedding.conv"),
            ("vision_model.embeddings.position_embedding.weight", "vision.positions"),
            ("text_model.embeddings.position_embedding.weight", "text.positions"),
            ("text_model.embeddings.", "text."),
            ("vision_model.", "vision."),
            ("text_model.", "text."),
            ("encoder.layers.", "layers."),
            ("out_proj", "o_proj"),
        ):
            name = name.replace(theirs, our)
        ours[name] = weight.squeeze() if name in ("log_scale", "bias") else weight
    return ours


def draw(vision, text, batch=5, length=None):
    """Pictures, and ids that end in padding (id 0), as SigLIP's tokenizer pads."""
    images = torch.rand(batch, 3, vision.image_size, vision.image_size) * 2 - 1
    length = length or text.max_length
    ids = torch.randint(1, text.vocab_size, (batch, length))
    for row in range(batch):
        ids[row, 1 + row % length :] = 0
    return images, ids


def assert_close(ours, theirs):
    size = theirs.abs().max().item()
    assert (ours - theirs).abs().max().item() <= 5e-6 * size


def assert_parity(model_class=SigLIP, text_class=TextTower):
    """Features, logits, loss and all gradients, at two sizes and two text lengths."""
    for image_size, length in ((12, 9), (20, 6)):
        vision = dataclasses.replace(VISION, image_size=image_size)
        oracle = hugging_face(vision, TEXT)
        model = model_class(vision, TEXT)
        model.text = text_class(TEXT)
        model.load_state_dict(from_hugging_face(oracle.state_dict(), vision))
        images, ids = draw(vision, TEXT, length=length)
        theirs = oracle(pixel_values=images, input_ids=ids, return_loss=True)
        ours = model.encode_images(images), model.encode_texts(ids)
        assert_close(ours[0], oracle.get_image_features(images).pooler_output)
        assert_close(ours[1], oracle.get_text_features(ids).pooler_output)
        assert_close(model(images, ids), theirs.logits_per_image)
        loss = siglip_loss(*ours, model.log_scale, model.bias)
        assert_close(loss, theirs.loss)
        if model_class is SigLIP and text_class is TextTower:
            loss.backward()
            theirs.loss.backward()
            gradients = {n: p.grad for n, p in oracle.named_parameters()}
            gradients = from_hugging_face(gradients, vision)
            for name, parameter in model.named_parameters():
                scale = gradients[name].abs().max()
                difference = (parameter.grad - gradients[name]).abs().max()
                # keys' biases have no gradient but rounding: softmax sees no shift
                assert difference <= 2e-5 * scale or name.endswith("k_proj.bias"), name


# parity


def test_equals_hugging_face():
    assert_parity()


@pytest.mark.parametrize("twin", TEXT_TWINS, ids=lambda twin: twin.__name__)
def test_wrong_text_towers_fail_the_parity_test(twin):
    with pytest.raises(AssertionError):
        assert_parity(text_class=twin)


@pytest.mark.parametrize("twin", MODEL_TWINS, ids=lambda twin: twin.__name__)
def test_wrong_models_fail_the_parity_test(twin):
    with pytest.raises(AssertionError):
        assert_parity(model_class=twin)


def test_the_twins_hold_the_same_weights():
    names = SigLIP(VISION, TEXT).state_dict().keys()
    for twin in MODEL_TWINS:
        assert twin(VISION, TEXT).state_dict().keys() == names
    names = TextTower(TEXT).state_dict().keys()
    for twin in TEXT_TWINS:
        assert twin(TEXT).state_dict().keys() == names


def test_sizes_of_so400m():
    with torch.device("meta"):
        model = SigLIP(SO400M_14_224, SO400M_TEXT)
    assert count(model.vision) == 412_442_352
    assert count(model.pool) == 15_238_352
    assert count(model.text) == 449_679_600
    assert count(model) == 877_360_306


def test_so400m_has_the_sizes_of_hugging_face():
    from transformers import SiglipConfig, SiglipModel

    same = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
    }
    config = SiglipConfig(
        text_config={**same, "max_position_embeddings": 16},
        vision_config={**same, "patch_size": 14},
    )
    with torch.device("meta"):
        assert count(SiglipModel(config)) == count(SigLIP(SO400M_14_224, SO400M_TEXT))
    theirs = config.text_config  # heads change no count
    assert vars(SO400M_TEXT) == {
        "vocab_size": theirs.vocab_size,
        "max_length": theirs.max_position_embeddings,
        "width": theirs.hidden_size,
        "depth": theirs.num_hidden_layers,
        "mlp_dim": theirs.intermediate_size,
        "num_heads": theirs.num_attention_heads,
        "head_dim": theirs.hidden_size // theirs.num_attention_heads,
        "projection_dim": theirs.projection_size,
    }


def test_the_shipped_text_tower_is_tiny_text():
    model, words = load_emoji_siglip()
    tiny = dataclasses.replace(TINY_TEXT, vocab_size=len(words))
    assert model.text.config == tiny


def test_tiny_text_stands_beside_tiny():
    model = SigLIP(TINY, TINY_TEXT)
    assert model.text.head.out_features == TINY.width
    assert model.log_scale.item() == pytest.approx(INITIAL_LOG_SCALE)
    assert model.bias.item() == INITIAL_BIAS


# the towers


def test_every_token_is_read():
    """Bidirectional: the last vector changes with each id, the first with the last."""
    tower = TextTower(TEXT)
    ids = torch.randint(1, 40, (1, 9))
    tokens, text = tower.encode_tokens(ids), tower(ids)
    for place in range(9):
        changed = ids.clone()
        changed[0, place] = (ids[0, place] + 1) % 40
        assert (tower(changed) - text).abs().max() > 1e-4
        assert (tower.encode_tokens(changed) - tokens)[0, 0].abs().max() > 1e-5


def test_padding_is_read_and_so_is_its_length():
    tower = TextTower(TEXT)
    ids = torch.tensor([[7, 3, 0, 0, 0]])
    shorter, other = ids[:, :4], ids.clone()
    other[0, -1] = 9
    assert (tower(ids) - tower(shorter)).abs().max() > 1e-3
    assert (tower(ids) - tower(other)).abs().max() > 1e-3


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 1000))
def test_texts_of_a_batch_do_not_meet(batch, length, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(40, (batch, length), generator=generator)
    with torch.no_grad():
        together = TOWER(ids)
        alone = torch.cat([TOWER(row[None]) for row in ids])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


TOWER = TextTower(TEXT)


def test_logits_are_scaled_cosines_plus_the_bias():
    model = SigLIP(VISION, TEXT)
    images, ids = draw(VISION, TEXT, batch=4)
    with torch.no_grad():
        model.log_scale.fill_(LOG_SCALE)
        model.bias.fill_(BIAS)
    pictures, texts = model.encode_images(images), model.encode_texts(ids[:3])
    cosines = F.cosine_similarity(pictures[:, None], texts[None], dim=-1)
    expected = cosines * torch.tensor(LOG_SCALE).exp() + BIAS
    torch.testing.assert_close(model(images, ids[:3]), expected)


def test_pictures_have_no_projection_of_their_own():
    names = dict(SigLIP(VISION, TEXT).named_children()).keys()
    assert names == {"vision", "pool", "text"}


def test_weights_start_at_their_scales():
    tower = TextTower(TINY_TEXT)
    for table in (tower.token_embedding.weight, tower.positions):
        assert table.std().item() == pytest.approx(192**-0.5, rel=0.05)
    linear = [m for m in tower.modules() if isinstance(m, nn.Linear)]
    assert all(not m.bias.any() for m in linear)


def test_gradcheck():
    vision = VisionConfig(
        width=4,
        depth=1,
        mlp_dim=3,
        num_heads=2,
        head_dim=2,
        patch_size=2,
        image_size=4,
    )
    text = TextConfig(
        vocab_size=5,
        max_length=3,
        width=6,
        depth=1,
        mlp_dim=3,
        num_heads=2,
        head_dim=3,
        projection_dim=4,
    )
    model = SigLIP(vision, text).double()
    ids = torch.randint(5, (2, 3))
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    table = model.text.token_embedding.weight
    scalars = model.log_scale, model.bias
    assert torch.autograd.gradcheck(
        lambda images, *_: model(images, ids), (images, table, *scalars)
    )


# recall


def assert_ranks(rank):
    """Against sorting, with ties, more candidates than queries, and NaN."""
    for rows, columns, levels in ((1, 1, 3), (6, 6, 3), (5, 11, 4), (30, 40, 1000)):
        logits = torch.randint(levels, (rows, columns)).float()
        for row, found in enumerate(rank(logits).tolist()):
            others = logits[row].tolist()
            match = others.pop(row)
            # the match stands behind all that are as good
            ranked = sorted([(-x, 0) for x in others] + [(-match, 1)])
            assert found == ranked.index((-match, 1)) + 1
    nan = torch.tensor([[1.0, torch.nan], [0.0, torch.nan]])
    assert rank(nan).tolist() == [2, 2]


def test_rank_equals_sorting():
    assert_ranks(rank_of_match)


@pytest.mark.parametrize("twin", RANK_TWINS, ids=lambda twin: twin.__name__)
def test_wrong_ranks_fail_the_parity_test(twin):
    with pytest.raises((AssertionError, ValueError)):
        assert_ranks(twin)


@given(st.integers(3, 30), st.integers(1, 35), st.integers(0, 1000))
def test_recall_equals_scikit_learn(n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.rand(n, n, generator=generator)
    oracle = 1.0
    if k < n:
        oracle = top_k_accuracy_score(range(n), logits.numpy(), k=k, labels=range(n))
    assert retrieval_recall(logits, k).item() == pytest.approx(oracle)


@given(st.integers(1, 20), st.integers(1, 20), st.floats(0.1, 5), st.floats(-9, 9))
def test_recall_does_not_see_scale_and_bias(n, k, scale, bias):
    generator = torch.Generator().manual_seed(n)
    logits = torch.rand(n, n, generator=generator, dtype=torch.float64)
    moved = retrieval_recall(scale * logits + bias, k)
    assert moved == retrieval_recall(logits, k)


@given(st.integers(2, 20), st.integers(0, 1000))
def test_recall_grows_with_k_and_shrinks_with_candidates(n, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.rand(n, 2 * n, generator=generator)
    recalls = [retrieval_recall(logits, k).item() for k in range(1, 2 * n + 1)]
    assert recalls == sorted(recalls) and recalls[-1] == 1.0
    assert retrieval_recall(logits[:, :n], 1) >= retrieval_recall(logits, 1)


def test_a_constant_model_finds_nothing():
    assert retrieval_recall(torch.zeros(8, 8), 1) == 0.0
    assert retrieval_recall(torch.zeros(8, 8), 7) == 0.0
    assert retrieval_recall(torch.full((8, 8), torch.nan), 7) == 0.0


# edges


def test_an_empty_batch_is_an_empty_batch():
    model = SigLIP(VISION, TEXT)
    assert model.encode_texts(torch.zeros(0, 9, dtype=torch.long)).shape == (0, 64)
    assert model.encode_images(torch.zeros(0, 3, 12, 12)).shape == (0, 64)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(2, 10, dtype=torch.long), r"from 1 to 9, got \(2, 10\)"),
        (torch.zeros(2, 0, dtype=torch.long), r"from 1 to 9, got \(2, 0\)"),
        (torch.zeros(9, dtype=torch.long), r"from 1 to 9, got \(9,\)"),
        (torch.zeros(2, 9), "expected int32 or int64, got torch.float32"),
        (torch.zeros(2, 9, dtype=torch.bool), "int32 or int64, got torch.bool"),
        (torch.zeros(2, 9, dtype=torch.uint8), "int32 or int64, got torch.uint8"),
        (torch.zeros(2, 9, dtype=torch.int16), "int32 or int64, got torch.int16"),
        (torch.zeros(2, 9, dtype=torch.cfloat), "int32 or int64, got torch.complex64"),
    ],
)
def test_ids_that_are_none_are_refused(ids, message, as_user):
    with pytest.raises(ValueError, match=f"ids: .*{message}"):
        TOWER(ids)


def test_int32_ids_are_read_as_int64_are():
    ids = torch.randint(40, (2, 9))
    torch.testing.assert_close(TOWER(ids.int()), TOWER(ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 50}, r"the width 50, got 4 \* 12 = 48"),
        ({"depth": 0}, "depth: expected an int, at least 1, got 0"),
        ({"vocab_size": 40.0}, "vocab_size: expected an int, at least 1, got 40.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message, as_user):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TEXT, **change)


def test_towers_that_do_not_meet_are_refused(as_user):
    text = dataclasses.replace(TEXT, projection_dim=48)
    with pytest.raises(ValueError, match="the vision width 64, got 48"):
        SigLIP(VISION, text)


@pytest.mark.parametrize("channels", [1, 4])
def test_pictures_that_are_not_rgb_are_refused(channels, as_user):
    with pytest.raises(ValueError, match="3"):
        SigLIP(VISION, TEXT).encode_images(torch.zeros(2, channels, 12, 12))


@pytest.mark.parametrize("shape", [(0, 3), (3, 2), (4,)])
def test_logits_without_a_match_are_refused(shape, as_user):
    with pytest.raises(ValueError, match="logits: expected a row for each query"):
        rank_of_match(torch.zeros(shape))


@pytest.mark.parametrize("k", [0, -1, 1.0, True])
def test_a_k_that_is_no_count_is_refused(k, as_user):
    with pytest.raises(ValueError, match="k: expected an int, at least 1"):
        retrieval_recall(torch.eye(3), k)


def test_runs_on_the_meta_device():
    with torch.device("meta"):
        model = SigLIP(VISION, TEXT)
        images, ids = torch.empty(2, 3, 12, 12), torch.empty(3, 9, dtype=torch.long)
        logits = model(images, ids)
        recall = retrieval_recall(logits, 1)
    assert logits.is_meta and logits.shape == (2, 3) and recall.is_meta


def test_compiles_into_one_graph(as_user):
    model = SigLIP(VISION, TEXT).requires_grad_(False)
    images, ids = draw(VISION, TEXT)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, ids), model(images, ids))
