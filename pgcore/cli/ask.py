"""``pgcore ask``: put a prompt to pictures."""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

SUMMARY = "ask about pictures, in PaliGemma's language: pgcore ask cat.jpg 'caption en'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what can be asked for."""
    add = parser.add_argument
    add("pictures", nargs="+", metavar="PICTURE", help="one file or several")
    add("prompt", metavar="PROMPT", help="such as 'caption en' or 'detect cat ; dog'")
    add("--model", default="tiny", help="tiny, a folder, or a name on the hub")
    add("--json", action="store_true", help="one JSON object a line and picture")
    add("--out", metavar="FILE", help="draw what it found; of several: a folder")
    add("--mask-codec", metavar="FILE", help="vae-oid.npz, to draw <seg> tokens")
    add("--probabilities", action="store_true", help="say how sure the model was")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="cut it there")
    add("--temperature", type=float, default=0.0, metavar="T", help="0: no chance")
    add("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from this share")
    add("--beams", type=int, default=1, metavar="N", help="above 1: search, not greedy")
    add("--seed", type=int, help="the same seed draws the same answers")
    add("--batch", type=int, default=4, metavar="N", help="pictures at a time")
    add("--compile", action="store_true", help="worth its wait for long answers")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16")


def run(options: argparse.Namespace) -> int:
    """Print the answers: one as it is written, several in the order of the pictures."""
    if options.batch < 1:
        raise ValueError(f"--batch: expected 1 or more, found {options.batch}")
    if not options.prompt.strip():
        raise ValueError("PROMPT: expected one such as 'caption en', found nothing")
    if options.probabilities and options.beams > 1:
        raise ValueError("--probabilities: not with --beams")
    for picture in options.pictures:
        _require_there(picture)
    drawings = _Drawings(options)
    _say(f"loading {options.model} ...")
    from pgcore import load

    model, processor = load(options.model, device=options.device, dtype=options.dtype)
    one = len(options.pictures) == 1
    streams = one and not (options.json or options.probabilities or options.beams > 1)
    if streams:
        _stream(model, processor, options, drawings)
        return 0
    failed = 0
    for done, batch in enumerate(_batches(options.pictures, options.batch)):
        if not one:
            count = min(done * options.batch + len(batch), len(options.pictures))
            _say(f"picture {count} of {len(options.pictures)} ...")
        failed += _answer(model, processor, batch, options, drawings)
    return 2 if failed else 0


def _require_there(picture: str) -> None:
    """Before the model is loaded: a misspelt name should not cost that time."""
    from pathlib import Path

    from pgcore.files import require_file

    require_file(Path(picture))


def _say(text: str) -> None:
    print(f"pgcore: {text}", file=sys.stderr, flush=True)


def _batches(pictures: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(pictures), size):
        yield pictures[start : start + size]


def _how(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "num_beams": options.beams,
        "seed": options.seed,
        "compile": options.compile,
    }


class _Drawings:
    """Where the answers' boxes and masks are drawn, and with which codec.

    All that can be wrong with it is found here, before the model is loaded.
    """

    FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}

    def __init__(self, options: argparse.Namespace):
        self.codec, self.files = None, {}
        if options.mask_codec is not None and options.out is None:
            raise ValueError("--mask-codec: only with --out")
        if options.out is None:
            return
        self.files = self._places(options.pictures, options.out)
        self.codec = self._codec(options.mask_codec, options.model)

    def _places(self, pictures: list[str], out: str) -> dict[str, Any]:
        from pathlib import Path

        path = Path(out)
        if len(pictures) == 1 and not path.is_dir():
            if path.suffix.lower() not in self.FORMATS:
                raise ValueError(
                    f"--out: expected a folder or a name that ends in"
                    f" {', '.join(self.FORMATS)}, found {out}"
                )
            places = {pictures[0]: path}
        else:
            if path.exists() and not path.is_dir():
                raise ValueError(f"--out: for several pictures a folder, found {out}")
            places = {name: path / f"{Path(name).stem}.png" for name in pictures}
        if len(set(places.values())) < len(set(pictures)):
            raise ValueError("--out: two pictures would be written to one file")
        for name, place in places.items():
            if place.exists() and place.samefile(name):
                raise ValueError(f"--out: {place} is the picture itself")
        return places

    def _codec(self, name: str | None, model: str) -> Any:
        """The codec of the shipped model is the shipped one; another must be named."""
        from pathlib import Path

        from pgcore.mask_codec import load_mask_codec, load_published_codec

        if name is None:
            return load_mask_codec() if model == "tiny" else None
        if Path(name).is_dir():
            return load_mask_codec(name)
        return load_published_codec(name)

    def draw(self, picture: str, image: Any, answer: str) -> None:
        """Write the drawing, or say why there is none."""
        from pgcore.files import written_whole
        from pgcore.grounding import draw, parse

        if (place := self.files.get(picture)) is None:
            return
        found = [one for one in parse(answer, named=False) if one.box is not None]
        if not found:
            _say(f"{picture}: no box in the answer, {place} is not written")
            return
        if self.codec is None and any(one.codes for one in found):
            _say(f"{picture}: the masks are not drawn, they need --mask-codec")
        with written_whole(place) as partial:
            drawn = draw(image, found, self.codec)
            drawn.save(partial, self.FORMATS[place.suffix.lower()], quality=92)


def _stream(
    model: Any, processor: Any, options: argparse.Namespace, drawings: _Drawings
) -> None:
    from pgcore import generate
    from pgcore.files import open_image

    image = open_image(options.pictures[0])
    how = _how(options) | {"stream": True}
    answer = ""
    for piece in generate(model, processor, image, options.prompt, **how):
        print(piece, end="", flush=True)
        answer += piece
    print()
    drawings.draw(options.pictures[0], image, answer)


def _answer(
    model: Any,
    processor: Any,
    pictures: list[str],
    options: argparse.Namespace,
    drawings: _Drawings,
) -> int:
    """Answer for a batch; say which pictures are broken, and return their number."""
    from pgcore import generate
    from pgcore.files import open_image

    names, images = [], []
    for picture in pictures:
        try:
            images.append(open_image(picture))
            names.append(picture)
        except ValueError as error:
            _say(str(error))
    if images:
        how = _how(options) | {"probabilities": options.beams == 1}
        prompts = [options.prompt] * len(images)
        found = generate(model, processor, images, prompts, **how)
        for picture, image, answer in zip(names, images, found, strict=True):
            print(_line(picture, answer, options), flush=True)
            drawings.draw(picture, image, str(answer))
    return len(pictures) - len(images)


def _line(picture: str, answer: Any, options: argparse.Namespace) -> str:
    facts = {"picture": picture, "prompt": options.prompt, "answer": str(answer)}
    shares = getattr(answer, "probabilities", [])
    if options.json:
        if options.probabilities:
            facts |= {"tokens": answer.tokens, "probabilities": shares}
        return json.dumps(facts, ensure_ascii=False)
    text = facts["answer"]
    if options.probabilities:
        lowest = min(shares)
        mean = sum(shares) / len(shares)
        text += (
            f"  (a token's probability: {mean:.2f} on average, {lowest:.2f} at least)"
        )
    if len(options.pictures) == 1:
        return text
    return f"{picture}: {' '.join(text.splitlines())}"  # a line a picture
