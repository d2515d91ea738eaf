"""Chapter 13: one right answer for each exercise, and several wrong ones."""

import json
from dataclasses import replace

import torch

import pgcore
from pgcore.weights import _NORMS, _PARTS, empty_model, hub_name

# 13.1


def read_header(data):
    length = int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            start, end = (8 + length + n for n in entry["data_offsets"])
            found[name] = entry["dtype"], tuple(entry["shape"]), start, end
    return found


def header_with_metadata(data):
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return {
        name: (e.get("dtype"), tuple(e.get("shape", ())), 0, 0)
        for name, e in header.items()
    }


def offsets_from_the_header(data):
    start = 8 + int.from_bytes(data[:8], "little")
    return {
        name: (kind, shape, a - start, b - start)
        for name, (kind, shape, a, b) in read_header(data).items()
    }


def eight_bytes_forgotten(data):
    return {
        name: (kind, shape, a - 8, b - 8)
        for name, (kind, shape, a, b) in read_header(data).items()
    }


def length_of_one_byte(data):
    return read_header(data[:1] + bytes(7) + data[8:])


def length_of_two_bytes(data):
    return read_header(data[:2] + bytes(6) + data[8:])


def shapes_as_lists(data):
    return {n: (k, list(s), a, b) for n, (k, s, a, b) in read_header(data).items()}


# 13.2


def our_name(name, post_norms):
    name = hub_name(name)
    there = next(t for t in _PARTS.values() if name.startswith(t))
    ours = next(o for o, t in _PARTS.items() if t == there)
    words = (ours + name.removeprefix(there)).split(".")
    if name.startswith("vision_tower."):
        words = ["o_proj" if word == "out_proj" else word for word in words]
    else:
        back = {both[post_norms]: here for here, both in _NORMS.items()}
        words = [back.get(word, word) if word else word for word in words]
    return ".".join(words)


def norms_of_paligemma_1(name, post_norms):
    return our_name(name, False)


def norms_of_paligemma_2(name, post_norms):
    return our_name(name, True)


def out_proj_forgotten(name, post_norms):
    found = our_name(name, post_norms)
    return found.replace("o_proj", "out_proj") if "vision" in name else found


def one_layout_only(name, post_norms):
    return our_name(name, post_norms) if hub_name(name) == name else name


def model_stripped_anywhere(name, post_norms):
    return our_name(hub_name(name), post_norms).replace("model.", "", 1) + (
        "" if name.startswith("model.") else "."
    )


# 13.3


def matrices(q, kv, o):
    return {
        "q_proj": q.transpose(-2, -1).flatten(0, 1),
        "k_proj": kv[0].transpose(-2, -1).flatten(0, 1),
        "v_proj": kv[1].transpose(-2, -1).flatten(0, 1),
        "o_proj": o.flatten(0, 1).T,
    }


def o_reshaped_only(q, kv, o):
    N, H, D = o.shape
    return matrices(q, kv, o) | {"o_proj": o.reshape(D, N * H)}


def o_not_transposed(q, kv, o):
    return matrices(q, kv, o) | {"o_proj": o.flatten(0, 1)}


def o_with_sizes_swapped(q, kv, o):
    N, H, D = o.shape
    return matrices(q, kv, o) | {"o_proj": o.permute(2, 0, 1).reshape(N * H, D)}


def q_reshaped_only(q, kv, o):
    N, D, H = q.shape
    return matrices(q, kv, o) | {"q_proj": q.reshape(N * H, D)}


def key_and_value_swapped(q, kv, o):
    return matrices(q, kv.flip(0), o)


def heads_last(q, kv, o):
    """Features of all heads interleaved: H N, not N H."""
    return matrices(q, kv, o) | {"q_proj": q.permute(2, 0, 1).flatten(0, 1)}


# 13.4


def with_more_words(model, number, generator):
    return larger_by(model, number, generator)


def larger_by(model, number, generator, rows=None, clone=True, dtype=None):
    config, key = model.config, "language.embed_tokens.weight"
    text = replace(config.text, vocab_size=config.text.vocab_size + number)
    weights = dict(model.state_dict())
    if clone:
        weights = {n: w.clone() for n, w in weights.items()}
    if rows is None:
        rows = 0.02 * torch.randn(number, text.width, generator=generator)
    rows = rows.to(dtype or weights[key].dtype)
    weights[key] = torch.cat([weights[key].to(rows.dtype), rows])
    larger = empty_model(replace(config, text=text))
    larger.load_state_dict(weights, assign=True)
    return larger


def even_numbers(model, number, generator):
    width = model.config.text.width
    rows = torch.rand(number, width, generator=generator) - 0.5
    return larger_by(model, number, generator, rows * 0.04 * 3**0.5)


def the_average_row(model, number, generator):
    table = model.language.embed_tokens.weight.detach()
    return larger_by(model, number, generator, table.mean(0).expand(number, -1))


def variance_for_deviation(model, number, generator):
    rows = 0.02**2 * torch.randn(number, 32, generator=generator)
    return larger_by(model, number, generator, rows)


def generator_ignored(model, number, generator):
    return larger_by(model, number, generator, 0.02 * torch.randn(number, 32))


def numbers_shared(model, number, generator):
    return larger_by(model, number, generator, clone=False)


def always_float32(model, number, generator):
    return larger_by(model, number, generator, dtype=torch.float32)


def zeros(model, number, generator):
    return larger_by(model, number, generator, torch.zeros(number, 32))


def configuration_forgotten(model, number, generator):
    larger = larger_by(model, number, generator)
    larger.config = model.config
    return larger


# 13.5


def ask(source, picture, prompts):
    model, processor = pgcore.load(source)
    pictures = [picture] * len(prompts)
    return pgcore.generate(model, processor, pictures, prompts, max_new_tokens=30)


def loads_for_each_prompt(source, picture, prompts):
    return [ask(source, picture, [prompt])[0] for prompt in prompts]


def without_the_picture(source, picture, prompts):
    model, processor = pgcore.load(source)
    pictures = [[] for _ in prompts]
    return pgcore.generate(model, processor, pictures, prompts, max_new_tokens=30)


def first_answer_only(source, picture, prompts):
    return ask(source, picture, prompts)[0]


def cut_short(source, picture, prompts):
    model, processor = pgcore.load(source)
    pictures = [picture] * len(prompts)
    return pgcore.generate(model, processor, pictures, prompts, max_new_tokens=3)


def backwards(source, picture, prompts):
    return ask(source, picture, prompts)[::-1]


RIGHT = {
    "13.1": read_header,
    "13.2": our_name,
    "13.3": matrices,
    "13.4": with_more_words,
    "13.5": ask,
}

WRONG = {
    "13.1": [
        header_with_metadata,
        offsets_from_the_header,
        eight_bytes_forgotten,
        length_of_one_byte,
        length_of_two_bytes,
        shapes_as_lists,
    ],
    "13.2": [
        norms_of_paligemma_1,
        norms_of_paligemma_2,
        out_proj_forgotten,
        one_layout_only,
        model_stripped_anywhere,
    ],
    "13.3": [
        o_reshaped_only,
        o_not_transposed,
        o_with_sizes_swapped,
        q_reshaped_only,
        key_and_value_swapped,
        heads_last,
    ],
    "13.4": [
        the_average_row,
        even_numbers,
        variance_for_deviation,
        generator_ignored,
        numbers_shared,
        always_float32,
        zeros,
        configuration_forgotten,
    ],
    "13.5": [
        loads_for_each_prompt,
        without_the_picture,
        first_answer_only,
        cut_short,
        backwards,
    ],
}
