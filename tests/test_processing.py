"""Chapter 11: pictures against Pillow and Hugging Face, rows against Hugging Face."""

import io
import json
import struct
import warnings
import zlib
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from tokenizers import Tokenizer

from pgcore.hub_settings import read_settings
from pgcore.lab.museum import processing as museum
from pgcore.processing import (
    CONTROL_TOKENS,
    IGNORE,
    IMAGE,
    LOC_TOKENS,
    SEG_TOKENS,
    Processor,
    from_sentencepiece,
    load_processor,
    load_tokenizer,
    to_pixels,
    to_rgb,
    train_tokenizer,
)
from pgcore.recipes import tiny_tokenizer
from tests.reference.processing import reference_pairs, reference_resize

TEXTS = ["a cat and two red apples", "answer en how many cats?", "n'a\n\nb c", "é 12"]
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
RANDOM = np.random.default_rng(0)


def noise(width, height, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(RANDOM.integers(0, 256, shape, dtype=np.uint8))


@cache
def small_tokenizer():
    """Newlines, bytes, letters; a piece of two newlines, a piece of two spaces."""
    return train_tokenizer([*TEXTS * 5, "a\n\nb  cat\n\n\n"], 340)


@cache
def shipped():
    return load_processor(tiny_tokenizer.FOLDER)


@cache
def oracle():
    with warnings.catch_warnings(action="ignore"):
        from transformers import PaliGemmaProcessor

        return PaliGemmaProcessor.from_pretrained(tiny_tokenizer.FOLDER, backend="pil")


@cache
def image_oracle(size):
    with warnings.catch_warnings(action="ignore"):
        from transformers.models.siglip.image_processing_pil_siglip import (
            SiglipImageProcessorPil,
        )
    half = [0.5] * 3
    side = {"height": size, "width": size}
    return SiglipImageProcessorPil(
        size=side, resample=3, image_mean=half, image_std=half
    )


def expected_pixels(image, size):
    return image_oracle(size)(image, return_tensors="pt")["pixel_values"][0]


# Pictures: the same numbers as Hugging Face, to the last bit.


SHAPES = [(1, 1), (1, 2), (5000, 17), (17, 5000), (96, 96), (95, 97), (640, 480)]


@pytest.mark.parametrize("size", [1, 14, 96, 224])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pixels_are_those_of_hugging_face(shape, size):
    image = noise(*shape)
    assert torch.equal(to_pixels(image, size), expected_pixels(image, size))


@settings(max_examples=60)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 60), st.randoms())
def test_pixels_of_any_shape_are_those_of_hugging_face(width, height, size, random):
    image = Image.frombytes(
        "RGB", (width, height), random.randbytes(3 * width * height)
    )
    assert torch.equal(to_pixels(image, size), expected_pixels(image, size))


def test_all_bytes_become_the_same_numbers():
    image = Image.fromarray(np.arange(768).reshape(16, 16, 3).astype(np.uint8))
    pixels = to_pixels(image, 16)
    assert torch.equal(pixels, expected_pixels(image, 16))
    assert pixels.min() == -1 and pixels.max() == 1 and len(pixels.unique()) == 256
    assert pixels.dtype == torch.float32 and pixels.shape == (3, 16, 16)


@pytest.mark.parametrize("shape", [(40, 50), (300, 7), (8, 9), (64, 64)], ids=str)
def test_two_matrices_do_what_pillow_does(shape):
    image = noise(*shape)
    ours = reference_resize(np.asarray(image), 24).astype(int)
    theirs = np.asarray(image.resize((24, 24), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(ours - theirs).max() <= 1


# Any mode.


WHITE = {"La": (0, 0), "RGBa": (0, 0, 0, 0), "PA": (0, 0), "LA": (9, 0)}
BLACK_AT_ZERO = {"1", "L", "F", "I", "HSV", "P", "RGB", "RGBX"}


@pytest.mark.parametrize("mode", Image.MODES)
def test_every_mode_of_pillow_becomes_rgb(mode):
    image = Image.new(mode, (3, 2))
    before = image.tobytes() if not mode.startswith("I;16N") else None
    rgb = to_rgb(image)
    assert rgb.mode == "RGB" and rgb.size == (3, 2) and rgb is not image
    assert before is None or image.tobytes() == before
    if mode in BLACK_AT_ZERO or mode.startswith("I;16"):
        assert rgb.getpixel((0, 0)) == (0, 0, 0)
    elif mode in ("RGBA", "RGBa", "LA", "La", "PA", "CMYK"):
        assert rgb.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_where_pillow_loses_nothing_its_conversion_is_ours(mode):
    image = noise(9, 8)
    try:
        image = image.convert(mode)
    except ValueError:
        image = Image.frombytes(mode, (9, 8), noise(9, 8).tobytes())
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(np.asarray(to_rgb(image)), expected)


def over_white(rgba):
    """The oracle: a weighted mean, in float64."""
    numbers = np.asarray(rgba, np.float64)
    alpha = numbers[..., 3:] / 255
    return alpha * numbers[..., :3] + (1 - alpha) * 255


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_alpha_is_laid_over_white(mode):
    rgba = noise(16, 16, 4)
    if mode in ("LA", "La"):
        rgba = rgba.convert("LA").convert("RGBA")
    image = rgba
    if mode == "PA":
        image = rgba.quantize(200)
        image = image.convert("PA")
        rgba = image.convert("RGBA")
    elif mode == "La":
        image = rgba.convert("LA").convert("La")
        rgba = image.convert("LA").convert("RGBA")
    elif mode != "RGBA":
        image = rgba.convert(mode)
        rgba = image.convert("RGBA")
    found = np.asarray(to_rgb(image)).astype(float)
    assert np.abs(found - over_white(rgba)).max() <= 1


@pytest.mark.parametrize("colour", [0, 3, 255])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_a_colour_that_is_named_transparent_is_white(mode, colour):
    if mode == "1" and colour == 3:
        colour = 255
    image = Image.new(mode, (2, 1), (colour,) * 3 if mode == "RGB" else colour)
    image.putpixel((1, 0), (9, 9, 9) if mode == "RGB" else (9 if mode != "1" else 0))
    image.info["transparency"] = (colour,) * 3 if mode == "RGB" else colour
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)
    if colour and mode in ("L", "RGB"):
        assert to_rgb(image).getpixel((1, 0)) == (9, 9, 9)


def test_a_palette_with_alpha_for_each_colour():
    image = Image.new("P", (3, 1))
    image.putpalette([200, 0, 0, 0, 100, 0, 0, 0, 50])
    image.putdata([0, 1, 2])
    image.info["transparency"] = bytes([255, 0, 128])
    found = np.asarray(to_rgb(image))[0].tolist()
    assert found[0] == [200, 0, 0] and found[1] == [255, 255, 255]
    assert np.abs(np.array(found[2]) - over_white([[[0, 0, 50, 128]]])).max() <= 1


def png(bits, greys, transparent):
    """A grey PNG file, one row, written by hand."""
    form = ">" + {8: "B", 16: "H"}[bits] * len(greys)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", len(greys), 1, bits, 0, 0, 0, 0)),
        (b"tRNS", struct.pack(">H", transparent)),
        (b"IDAT", zlib.compress(b"\0" + struct.pack(form, *greys))),
        (b"IEND", b""),
    ]
    chunks = [
        struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d))
        for n, d in parts
    ]
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def test_sixteen_bits_in_a_file_with_a_transparent_grey():
    image = Image.open(png(16, [0, 1000, 32_768, 65_535], 1000))
    found = [to_rgb(image).getpixel((x, 0))[0] for x in range(4)]
    assert image.mode == "I;16" and found == [0, 255, 128, 255]
    image = Image.open(png(8, [0, 100], 100))
    assert [to_rgb(image).getpixel((x, 0))[0] for x in range(2)] == [0, 255]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_all_sixteen_bit_greys_are_scaled(dtype):
    greys = np.arange(65_536).reshape(256, 256)
    image = Image.fromarray(greys.astype(dtype))
    assert image.mode == {np.uint16: "I;16", np.int32: "I"}[dtype]
    found = np.asarray(to_rgb(image))
    assert np.array_equal(found[..., 0], (greys / 257).round())
    assert (found == found[..., :1]).all()


@pytest.mark.parametrize("order", ["<", ">"])
def test_both_byte_orders_of_sixteen_bits(order):
    mode = {"<": "I;16L", ">": "I;16B"}[order]
    data = np.array([0, 257, 65_535], order + "u2").tobytes()
    image = Image.frombytes(mode, (3, 1), data)
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 1, 255]


def test_floats_are_levels():
    image = Image.fromarray(np.array([[0.0, 41.6, 255.0]], np.float32))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 42, 255]


@pytest.mark.parametrize("value", [-1.0, 255.5, np.nan, np.inf])
def test_floats_outside_are_refused(value):
    image = Image.fromarray(np.array([[0.0, value]], np.float32))
    with pytest.raises(ValueError, match="image: F: expected 0 to 255, found"):
        to_rgb(image)


@pytest.mark.parametrize("value", [-1, 65_536])
def test_integers_outside_are_refused(value):
    image = Image.fromarray(np.array([[0, value]], np.int32))
    with pytest.raises(ValueError, match=f"image: I: expected 0 to 65535.*{value}"):
        to_rgb(image)


def with_orientation(image, number):
    exif = Image.Exif()
    exif[0x0112] = number
    image.info["exif"] = exif.tobytes()
    return image


TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("number", TURNS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "I;16"])
def test_a_photo_is_turned_as_its_exif_data_say(number, mode):
    colours = np.arange(30, dtype=np.uint8).reshape(5, 6)
    if mode == "I;16":
        image = Image.fromarray(colours.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(colours).convert(mode)
    found = np.asarray(to_rgb(with_orientation(image, number)))[..., 0]
    assert np.array_equal(found, TURNS[number](colours))
    assert image.size == (6, 5), "the argument was turned"


@pytest.mark.parametrize(
    "exif", [b"garbage", b"", b"Exif\0\0II*\0", b"Exif\0\0" + b"\xff" * 40]
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_data_turn_nothing(exif):
    image = noise(4, 3)
    image.info["exif"] = exif
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image))


@pytest.mark.parametrize("number", [0, 9, 70])
def test_an_orientation_that_is_none_turns_nothing(number):
    image = with_orientation(noise(4, 3), number)
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_frame_of_an_animation(form):
    frames = [Image.new("RGB", (8, 8), tint) for tint in ("red", "lime", "blue")]
    file = io.BytesIO()
    options = {"lossless": True} if form == "WEBP" else {}
    frames[0].save(file, form, save_all=True, append_images=frames[1:], **options)
    image = Image.open(file)
    image.seek(2)
    assert image.is_animated
    assert to_rgb(image).getpixel((4, 4)) == (255, 0, 0)
    assert image.tell() == 2
    assert image.convert("RGB").getpixel((4, 4)) == (0, 0, 255)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_an_empty_picture_is_refused(size):
    with pytest.raises(ValueError, match="expected a PIL image with pixels, found"):
        to_rgb(Image.new("RGB", size))


@pytest.mark.parametrize("thing", [None, "cat.png", np.zeros((2, 2, 3)), torch.ones(3)])
def test_what_is_no_picture_is_refused(thing, as_user):
    with pytest.raises(ValueError, match="expected a PIL image with pixels, found"):
        to_pixels(thing, 8)
    with pytest.raises(ValueError, match="expected a PIL image with pixels, found"):
        shipped()([thing], ["caption en"])


# Tokenizers.


def test_ids_are_in_the_order_of_paligemma():
    tokenizer = small_tokenizer()
    at = tokenizer.token_to_id
    assert [at(token) for token in CONTROL_TOKENS] == [0, 1, 2, 3]
    assert [at(f"<0x{byte:02X}>") for byte in range(256)] == list(range(4, 260))
    pieces = tokenizer.get_vocab_size() - 1024 - 128 - 1
    assert 260 < pieces <= 340
    whole = [*LOC_TOKENS, *SEG_TOKENS, IMAGE]
    assert [at(token) for token in whole] == list(range(pieces, pieces + 1153))
    assert LOC_TOKENS[7] == "<loc0007>" and SEG_TOKENS[-1] == "<seg127>"


def test_the_shipped_ids_are_what_other_chapters_rely_on():
    tokenizer = shipped().tokenizer
    at = tokenizer.token_to_id
    assert tokenizer.get_vocab_size() == 3072
    assert sorted(tokenizer.get_vocab().values()) == list(range(3072))
    found = [at(token) for token in ("<loc0000>", "<seg000>", "<image>")]
    assert found == [1919, 2943, 3071]
    assert (shipped().image_size, shipped().num_image_tokens) == (96, 64)


def test_the_recipe_gives_the_shipped_files_again(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "folder"
    monkeypatch.setattr("sys.argv", ["tiny_tokenizer", "--out", str(folder)])
    tiny_tokenizer.main()
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in names:
        shipped_file = tiny_tokenizer.FOLDER / name
        assert (folder / name).read_bytes() == shipped_file.read_bytes(), name


@given(st.text())
def test_every_text_comes_back_and_nothing_is_unknown(text):
    for token in CONTROL_TOKENS:
        text = text.replace(token, "")
    text = text.replace("▁", " ").replace(IMAGE, "")
    for tokenizer in (small_tokenizer(), shipped().tokenizer):
        encoded = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(encoded.ids) == text
        assert 3 not in encoded.ids


@pytest.mark.parametrize(
    "text", ["<0x41>", "naïve 猫", "🦊", "\n", "  two", "<loc0001>"]
)
def test_bytes_are_no_special_tokens(text):
    tokenizer = shipped().tokenizer
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_no_piece_reaches_across_words_or_digits():
    whole = {*LOC_TOKENS, *SEG_TOKENS, *CONTROL_TOKENS, IMAGE}
    for piece in set(shipped().tokenizer.get_vocab()) - whole:
        assert "▁" not in piece[1:] or not piece.strip("▁"), piece
        assert (
            piece.startswith("<0x")
            or len(piece) == 1
            or not any(letter.isdigit() for letter in piece)
        ), piece
        assert "loc" not in piece or "<" not in piece, piece


def test_pairs_are_those_of_counting():
    plain = ["low lower lowest", "newer wider new", "aaaa aaab aab"] * 2
    model = json.loads(train_tokenizer(plain, 900).to_str())["model"]
    words = Counter(
        "▁" + word if i else word
        for text in plain
        for i, word in enumerate(text.split(" "))
    )
    found = [tuple(pair) for pair in model["merges"]]
    assert len(found) > 15
    assert reference_pairs(words, len(found)) == found


def test_training_gives_the_same_twice_and_stops_when_texts_end():
    assert train_tokenizer(TEXTS, 300).to_str() == train_tokenizer(TEXTS, 300).to_str()
    assert train_tokenizer(TEXTS, 9999).get_vocab_size() < 9999
    assert train_tokenizer(iter(TEXTS), 300).get_vocab_size() == 300 + 1153


@pytest.mark.parametrize("size", [260, 261, 265, 290])
def test_the_vocabulary_is_never_larger_than_asked_for(size):
    tokenizer = train_tokenizer(TEXTS * 9, size)
    assert tokenizer.get_vocab_size() <= size + 1153
    assert tokenizer.decode(tokenizer.encode("é 12 cats").ids) == "é 12 cats"


def test_places_in_texts_are_not_learned():
    texts = ["detect cat", "<loc0001><loc0002><loc0003><loc0004> cat"] * 20
    assert train_tokenizer(texts, 500).get_vocab_size() < 300 + 1153
    # What only looks like a place is not learned, either; it is read as a text.
    tokenizer = train_tokenizer(["<loc9999> a"] * 9, 500)
    assert tokenizer.get_vocab_size() == 260 + 3 + 1153  # two letters, one pair
    assert tokenizer.decode(tokenizer.encode("<loc9999>").ids) == "<loc9999>"


def test_there_must_be_room_for_the_bytes():
    with pytest.raises(ValueError, match="vocab_size: expected 260 or more, found 259"):
        train_tokenizer(TEXTS, 259)


# SentencePiece.


OPTIONS = {
    "model_type": "bpe",
    "vocab_size": 340,
    "byte_fallback": True,
    "add_dummy_prefix": False,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "pad_piece": "<pad>",
    "eos_piece": "<eos>",
    "bos_piece": "<bos>",
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "hard_vocab_limit": False,
    "minloglevel": 2,
    "user_defined_symbols": ["\n", "\n\n", "▁▁", "<b>"],
}


@cache
def sentencepiece_model(**changes):
    file = io.BytesIO()
    texts = [t.replace("\n", " ") for t in TEXTS] + ["abab abc  cab", "aab baa é"]
    options = OPTIONS | dict(changes)
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts * 3), model_writer=file, **options
    )
    return file.getvalue()


def written(folder, **changes):
    path = Path(folder) / "tokenizer.model"
    path.write_bytes(sentencepiece_model(**changes))
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    path = written(tmp_path_factory.mktemp("model"))
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return model, load_tokenizer(path.parent)


LETTERS = st.text(st.sampled_from("abcdelmnpstwé 猫\n<>?12▁ "), max_size=30)


@given(LETTERS | st.text(max_size=20))
def test_a_sentencepiece_model_is_converted_exactly(converted, text):
    model, tokenizer = converted
    if any(token in text for token in (*CONTROL_TOKENS, IMAGE)) or "\0" in text:
        return
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == model.EncodeAsIds(text)
    if "▁" not in text:
        assert tokenizer.decode(ids) == text


def test_what_the_model_lacks_comes_after_it(converted):
    model, tokenizer = converted
    assert tokenizer.get_vocab_size() == len(model) + 1153
    assert tokenizer.token_to_id("<loc0000>") == len(model)
    assert tokenizer.token_to_id(IMAGE) == len(model) + 1152
    row = Processor(tokenizer, 8, 2)([[]], ["a cat"])["input_ids"][0].tolist()
    assert row == [2, *model.EncodeAsIds("a cat"), *model.EncodeAsIds("\n")]


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "unigram", "vocab_size": 290},
        {"add_dummy_prefix": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"model_type": "word"},
    ],
    ids=str,
)
def test_another_kind_of_model_is_refused(tmp_path, changes):
    symbols = ("<b>",)  # with a piece for two spaces, spaces would stay anyway
    path = written(tmp_path, **changes, user_defined_symbols=symbols)
    with pytest.raises(ValueError, match="expected byte pairs, and texts left as they"):
        from_sentencepiece(path)
    with pytest.raises(ValueError, match="expected a tokenizer, found: .*byte pairs"):
        load_tokenizer(tmp_path)


def test_without_the_library_the_error_names_it(tmp_path, monkeypatch):
    written(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(ValueError, match="model: needs the library sentencepiece$"):
        load_tokenizer(tmp_path)


def test_a_piece_with_two_cuts_is_found(tmp_path):
    file, texts = io.BytesIO(), ["ab"] * 10 + ["bc"] * 8 + ["abc"] * 5
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts), model_writer=file, **OPTIONS
    )
    (tmp_path / "tokenizer.model").write_bytes(file.getvalue())
    assert load_tokenizer(tmp_path).encode("abc").tokens == ["abc"]


def test_shapes_in_texts_are_not_learned():
    tokenizer = train_tokenizer(["<seg001> a"] * 9, 500)
    assert tokenizer.get_vocab_size() == 260 + 3 + 1153


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\x00broken", b"[1]"])
def test_a_broken_tokenizer_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        ValueError, match=f"{tmp_path.name}: expected a tokenizer, found"
    ):
        load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="neither tokenizer.json nor tokenizer."
    ):
        load_tokenizer(tmp_path)


def test_padding_and_truncation_of_the_file_are_not_ours(tmp_path):
    tokenizer = Tokenizer.from_str(small_tokenizer().to_str())
    tokenizer.enable_padding(length=50)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = load_tokenizer(tmp_path).encode("answer en how many cats?").ids
    assert ids == small_tokenizer().encode("answer en how many cats?").ids
    assert 2 < len(ids) < 50


# Rows.


ROWS = (
    [
        [noise(30, 40)],
        [noise(9, 8), noise(50, 5)],
        [noise(3, 3), noise(4, 4)],
        [noise(7, 9)],
    ],
    [
        "detect cat ; red apple",
        "caption <loc0000><loc0512><loc0700><loc1023>",
        "naïve 猫",
        "",
    ],
    ["<loc0010><loc0020><loc0030><loc0040><seg007> cat", "a cat", "", "non é\n"],
)


def hugging_face(processor, images, prompts, suffixes=None):
    texts = ["<image>" * len(x) + p for x, p in zip(images, prompts, strict=True)]
    found = processor(
        images=images,
        text=texts,
        suffix=suffixes,
        padding="longest",
        return_tensors="pt",
    )
    found["suffix_mask"] = found.pop("token_type_ids").bool()
    found["attention_mask"] = found["attention_mask"].bool()
    return dict(found)


def assert_same(ours, theirs):
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def differs(ours, theirs):
    return any(
        x.shape != theirs[name].shape or not torch.equal(x, theirs[name])
        for name, x in ours.items()
    )


def test_rows_are_those_of_hugging_face():
    ours = shipped()(*ROWS)
    assert set(ours) == {
        "pixel_values",
        "input_ids",
        "attention_mask",
        "labels",
        "suffix_mask",
    }
    assert_same(ours, hugging_face(oracle(), *ROWS))
    assert not ours["attention_mask"].all(), "nothing was ragged"
    ours = shipped()(*ROWS[:2])
    assert set(ours) == {"pixel_values", "input_ids", "attention_mask"}
    assert_same(ours, hugging_face(oracle(), *ROWS[:2]))


WORDS = st.text(st.sampled_from("ab cat é猫<12?;"), max_size=12)
EXAMPLES = st.lists(st.tuples(st.integers(1, 3), WORDS, WORDS), min_size=1, max_size=4)
TINY_PICTURE = Image.new("RGB", (2, 2))


@settings(max_examples=40)
@given(EXAMPLES)
def test_any_rows_are_those_of_hugging_face(examples):
    images = [[TINY_PICTURE] * number for number, _, _ in examples]
    prompts, suffixes = ([e[i] for e in examples] for i in (1, 2))
    ours = shipped()(images, prompts, suffixes)
    assert_same(ours, hugging_face(oracle(), images, prompts, suffixes))


@given(EXAMPLES)
def test_a_batch_is_its_rows_with_padding_on_the_left(examples):
    processor = Processor(small_tokenizer(), 4, 3)
    images = [[TINY_PICTURE] * (number - 1) for number, _, _ in examples]
    prompts, suffixes = ([e[i] for e in examples] for i in (1, 2))
    batch = processor(images, prompts, suffixes)
    for row, single in enumerate(zip(images, prompts, suffixes, strict=True)):
        alone = processor(*([part] for part in single))
        length = alone["input_ids"].shape[1]
        for name in alone.keys() - {"pixel_values"}:
            assert torch.equal(batch[name][row, -length:], alone[name][0]), name
            filler = {"input_ids": 0, "labels": IGNORE}.get(name, False)
            assert (batch[name][row, :-length] == filler).all(), name
        assert alone["attention_mask"].all()
    assert batch["attention_mask"].any(dim=0).all(), "a column of padding"


def test_a_row_by_hand():
    processor = Processor(small_tokenizer(), 4, 3)
    at = processor.id_of
    batch = processor([[TINY_PICTURE] * 2], ["b"], ["a"])
    text = [at("b"), at("\n"), at("a"), at("<eos>")]
    row = [at("<image>")] * 6 + [at("<bos>"), *text]
    assert batch["input_ids"].tolist() == [row]
    assert batch["labels"].tolist() == [[IGNORE] * 9 + text[2:]]
    assert batch["suffix_mask"].tolist() == [[False] * 9 + [True, True]]


def test_pictures_stand_in_the_order_of_rows_and_may_come_bare():
    processor = Processor(small_tokenizer(), 5, 2)
    one, two, three = noise(5, 5), noise(6, 6), noise(7, 3)
    batch = processor([one, (two, three), []], ["a", "b", "c"])
    expected = torch.stack([to_pixels(x, 5) for x in (one, two, three)])
    assert torch.equal(batch["pixel_values"], expected)
    counts = (batch["input_ids"] == processor.id_of(IMAGE)).sum(dim=1)
    assert counts.tolist() == [2, 4, 0]


def test_rows_without_pictures_have_no_pixels():
    batch = Processor(small_tokenizer(), 5, 2)([[], []], ["a", "b"])
    assert batch["pixel_values"].shape == (0, 3, 5, 5)
    assert batch["pixel_values"].dtype == torch.float32


def test_the_newline_is_encoded_alone():
    processor = Processor(small_tokenizer(), 4, 1)
    assert processor.id_of("\n\n")
    newline = processor.id_of("\n")
    ids = processor([[]], ["a cat\n"])["input_ids"][0].tolist()
    assert ids[-2:] == [newline, newline]
    joined = museum.NewlineJoined(small_tokenizer(), 4, 1)
    ids = joined([[]], ["a cat\n"])["input_ids"][0].tolist()
    assert ids[-1] == processor.id_of("\n\n")


@pytest.mark.parametrize("token", ["<pad>", "<eos>", "<bos>", "<image>"])
@pytest.mark.parametrize("where", [0, 1])
def test_a_text_may_not_contain_what_the_processor_places(token, where):
    texts = ["a", "b"]
    texts[where] = f"see {token} here"
    with pytest.raises(ValueError, match=f"{token} is the processor's to place"):
        shipped()([[]], texts[:1], texts[1:])


@pytest.mark.parametrize(
    "arguments",
    [
        ([], []),
        ([[]], []),
        ([], ["a"]),
        ([[]], ["a", "b"]),
        ([[]], ["a"], []),
        ([[]], ["a"], ["b", "c"]),
        ([[]], "a"),
        ([[]], ["a"], "b"),
        (Image.new("RGB", (4, 4)), ["a"]),
        (None, ["a"]),
    ],
    ids=str,
)
def test_lists_of_different_lengths_are_refused(arguments, as_user):
    with pytest.raises(
        ValueError, match="prompts, suffixes: expected lists of one len"
    ):
        shipped()(*arguments)


@pytest.mark.parametrize("token", ["<pad>", "<eos>", "<bos>", "<image>"])
def test_a_tokenizer_must_know_the_tokens(token):
    text = small_tokenizer().to_str().replace(f'"{token}"', '"<other>"')
    with pytest.raises(ValueError, match=f"tokenizer: expected one that knows {token}"):
        Processor(Tokenizer.from_str(text), 8, 4)
    with pytest.raises(ValueError, match="expected one that knows <moon>"):
        shipped().id_of("<moon>")


def test_an_answer_is_decoded_up_to_its_end():
    processor = shipped()
    text = "<loc0001><loc0002><loc0003><loc0004> cat ; naïve 猫"
    ids = processor.tokenizer.encode(text).ids
    eos = processor.id_of("<eos>")
    assert processor.decode(ids) == text
    assert processor.decode((*ids, eos, *ids)) == text
    assert processor.decode([eos]) == processor.decode([]) == ""
    kept = list(ids)
    processor.decode(ids)
    assert ids == kept


# Files.


def test_what_is_saved_loads_and_answers_alike(tmp_path):
    processor = Processor(small_tokenizer(), 24, 9)
    processor.save(tmp_path)
    again = load_processor(str(tmp_path))
    with warnings.catch_warnings(action="ignore"):
        from transformers import PaliGemmaProcessor

        theirs = PaliGemmaProcessor.from_pretrained(tmp_path, backend="pil")
    ours = processor(*ROWS)
    assert_same(ours, again(*ROWS))
    assert_same(ours, hugging_face(theirs, *ROWS))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_what_hugging_face_saves_loads_and_answers_alike(tmp_path):
    oracle().save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    assert_same(load_processor(tmp_path)(*ROWS), hugging_face(oracle(), *ROWS))


def test_a_tokenizer_of_hugging_face_that_has_no_places_yet(tmp_path):
    """Their processor adds the missing tokens when it is made, and saves them."""
    with warnings.catch_warnings(action="ignore"):
        from transformers import PaliGemmaProcessor, PreTrainedTokenizerFast

    plain = json.loads(small_tokenizer().to_str())
    plain["added_tokens"] = plain["added_tokens"][:4]
    names = {f"{token[1:-1]}_token": token for token in CONTROL_TOKENS}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(plain)),
        padding_side="left",
        **names,
    )
    images = image_oracle(24)
    images.image_seq_length = 4
    theirs = PaliGemmaProcessor(images, fast)
    theirs.save_pretrained(tmp_path)
    assert_same(load_processor(tmp_path)(*ROWS), hugging_face(theirs, *ROWS))


SETTINGS = {"size": {"height": 24, "width": 24}, "image_seq_length": 9}


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("resample", 2),
        ("image_mean", [0.485, 0.456, 0.406]),
        ("image_std", [0.5, 0.5]),
        ("do_normalize", False),
        ("do_resize", None),
        ("do_convert_rgb", False),
        ("do_center_crop", True),
        ("do_pad", True),
        ("rescale_factor", 1.0),
        ("size", {"height": 24, "width": 25}),
        ("size", {"shortest_edge": 24}),
        ("size", {"height": 24.5, "width": 24.5}),
        ("size", {"height": True, "width": True}),
        ("size", None),
        ("size", [24, 24]),
        ("image_seq_length", 0),
        ("image_seq_length", 10_001),
        ("image_seq_length", "9"),
    ],
)
def test_a_setting_that_we_would_not_follow_is_refused(tmp_path, name, value, old):
    settings = SETTINGS | {name: value}
    file = "preprocessor_config.json" if old else "processor_config.json"
    settings = settings if old else {"image_processor": settings}
    (tmp_path / file).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"{file}: {name}: expected"):
        load_processor(tmp_path)


@pytest.mark.parametrize("name", ["do_convert_rgb", "do_center_crop", "do_pad"])
def test_null_is_as_good_as_nothing_where_others_write_it(tmp_path, name):
    settings = SETTINGS | {name: None}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert read_settings(tmp_path) == (24, 9)


def test_broken_settings_are_refused(tmp_path):
    path = tmp_path / "processor_config.json"
    with pytest.raises(FileNotFoundError, match="processor_config.json: no such file"):
        load_processor(tmp_path)
    path.write_text("{")
    with pytest.raises(
        ValueError, match="processor_config.json: expected a JSON object"
    ):
        load_processor(tmp_path)
    for value in ("[]", "5", "null"):
        path.write_text(f'{{"image_processor": {value}}}')
        with pytest.raises(ValueError, match="image_processor: expected an object"):
            load_processor(tmp_path)
    path.write_text(json.dumps({"image_processor": SETTINGS}))
    with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor"):
        load_processor(tmp_path)


def test_the_sizes_are_read_and_the_old_file_wins(tmp_path):
    Processor(small_tokenizer(), 24, 9).save(tmp_path)
    (tmp_path / "processor_config.json").write_text("{}")
    found = load_processor(tmp_path)
    assert (found.image_size, found.num_image_tokens) == (24, 9)


# Twins.


def photo():
    """Everything that a picture can have: alpha, an orientation, an odd shape."""
    rgba = np.array(noise(90, 40, 4))
    rgba[:, :30, 3] = 0
    return with_orientation(Image.fromarray(rgba), 6)


@pytest.mark.parametrize("twin", museum.PICTURE_TWINS, ids=lambda t: t.__name__)
def test_a_wrong_picture_is_noticed(twin):
    image = photo()
    right = to_pixels(image, 24)
    white = Image.new("RGBA", (40, 90), "white")
    white.alpha_composite(ImageOps.exif_transpose(image))
    expected = expected_pixels(white.convert("RGB"), 24)
    assert torch.equal(right, expected)
    found = twin(image, 24)
    assert found.shape != expected.shape or not torch.allclose(
        found, expected, atol=1e-2
    )


def test_without_conversion_a_grey_picture_fails():
    with pytest.raises(RuntimeError):
        museum.no_conversion(noise(9, 9, 1), 8)


@pytest.mark.parametrize("twin", museum.ROW_TWINS, ids=lambda t: t.__name__)
def test_a_wrong_row_is_noticed(twin):
    tokenizer = small_tokenizer()
    images, prompts, suffixes = ROWS
    rows = images, [prompt + "\n" for prompt in prompts], suffixes
    found = twin(tokenizer, 8, 3)(*rows)
    right = Processor(tokenizer, 8, 3)(*rows)
    assert differs(found, right)
    if twin is not museum.NewlineJoined:  # it differs after a newline only
        wrong = twin(shipped().tokenizer, 96, 64)(*ROWS)
        assert differs(wrong, hugging_face(oracle(), *ROWS))


def test_joining_the_newline_is_what_hugging_face_does(tmp_path):
    Processor(small_tokenizer(), 8, 3).save(tmp_path)
    with warnings.catch_warnings(action="ignore"):
        from transformers import PaliGemmaProcessor

        theirs = PaliGemmaProcessor.from_pretrained(tmp_path, backend="pil")
    rows = ROWS[0], [prompt + "\n" for prompt in ROWS[1]], ROWS[2]
    expected = hugging_face(theirs, *rows)
    joined = museum.NewlineJoined(small_tokenizer(), 8, 3)(*rows)
    assert_same(joined, expected)
    assert differs(Processor(small_tokenizer(), 8, 3)(*rows), expected)
