"""``pgcore demo``: make a scene, ask everything about it, draw the answers."""

import argparse
import sys
from pathlib import Path

SUMMARY = "make a scene, ask the tiny model everything, and draw the answers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say which scene and where to."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo.png"), metavar="FILE", help="a picture")
    add("--seed", type=int, help="another scene; without: the one of the book")
    add("--model", default="tiny", help="tiny, or a folder of one like it")
    add("--device", default="auto", help="auto, cpu, cuda, ...")


def run(options: argparse.Namespace) -> int:
    """Print questions and answers, and write one picture with all of it."""
    from PIL import Image

    from pgcore import load
    from pgcore.files import written_whole
    from pgcore.lab.demo import answers, is_right, picture, scene_of

    formats = Image.registered_extensions()
    if (kind := formats.get(options.out.suffix.lower())) not in ("PNG", "JPEG"):
        raise ValueError(f"--out: expected a .png or .jpg file, found {options.out}")
    scene = scene_of(options.seed)
    print(f"pgcore: loading {options.model} ...", file=sys.stderr)
    model, processor = load(options.model, device=options.device)
    asked = answers(model, processor, scene)
    marks = {True: "right", False: "wrong", None: "drawn"}
    for one in asked:
        said = " ".join(one.answer.split())  # a line each, whatever it writes
        print(f"{marks[is_right(one)]}  {one.example.prompt:<40} {said}")
    with written_whole(options.out) as path:
        picture(scene, asked).save(path, format=kind)
    print(f"pgcore: written: {options.out}", file=sys.stderr)
    return 0
