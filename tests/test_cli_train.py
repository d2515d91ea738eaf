"""``pgcore train`` and ``pgcore demo``, as a user meets them."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageColor

from pgcore.cli import main
from pgcore.cli.train import recipes
from pgcore.lab.demo import (
    GAP,
    KINDS,
    PANEL,
    RIGHT,
    WRONG,
    answers,
    is_right,
    picture,
    questions,
    scene_of,
)
from pgcore.lab.pretrained import load_emoji_siglip
from pgcore.lab.scene_language import all_examples
from pgcore.lab.scenes import SPLITS, Scene
from pgcore.lab.scoring import Asked
from pgcore.lab.tiny_world import running_example
from pgcore.processing import load_processor
from pgcore.recipes import tiny_tokenizer
from pgcore.recipes.tiny import Recipe, build
from pgcore.weights import save_pretrained


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The tiny model before its first step: it answers, and nothing right."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    processor = load_processor(tiny_tokenizer.FOLDER)
    model = build(Recipe(), processor, load_emoji_siglip()[0].vision)
    save_pretrained(model, processor, folder)
    return folder


def test_without_a_recipe_all_are_listed_with_what_they_make(capsys):
    assert main(["train"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(recipes())
    assert {"tiny", "emoji_siglip", "mask_codes"} <= recipes().keys()
    assert all(len(line.split()) > 3 for line in lines)


def test_an_unknown_recipe_is_one_line_and_code_2(capsys):
    assert main(["train", "huge"]) == 2
    assert capsys.readouterr().err.startswith("pgcore: recipe: expected one of ")


def test_a_recipe_gets_its_own_options(tmp_path, capsys):
    assert main(["train", "tiny_tokenizer", "--out", str(tmp_path)]) == 0
    shipped = tiny_tokenizer.FOLDER / "tokenizer.json"
    assert (tmp_path / "tokenizer.json").read_bytes() == shipped.read_bytes()


def test_a_recipe_says_how_it_is_called(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["pgcore", "train", "tiny_tokenizer", "--help"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: pgcore train tiny_tokenizer [-h] --out OUT")


def test_every_recipe_has_a_command_line():
    import importlib

    for name in recipes():
        assert callable(importlib.import_module(f"pgcore.recipes.{name}").main)


def test_the_demo_asks_everything_and_draws_it(checkpoint, tmp_path, capsys):
    out = tmp_path / "a folder to make" / "demo.png"
    assert main(["demo", "--model", str(checkpoint), "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(questions(running_example()))
    assert {line.split()[0] for line in said} <= {"right", "wrong", "drawn"}
    with Image.open(out) as image:
        assert image.width > 2 * 384 and image.height > 384


def test_the_demo_cannot_write_below_a_file(checkpoint, tmp_path, capsys):
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "demo.png")
    assert main(["demo", "--model", str(checkpoint), "--out", out]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        said
        == f"pgcore: {tmp_path / 'file'}: expected a folder, a file is in its place"
    )


def test_the_demo_refuses_other_files_before_it_loads(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "demo.txt")]) == 2
    assert "expected a .png or .jpg" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_seed_gives_the_same_scene_and_another_another():
    assert (scene_of(3).image == scene_of(3).image).all()
    assert (scene_of(3).image != scene_of(4).image).any()
    assert (scene_of(None).image == running_example().image).all()


def test_the_scenes_of_seeds_are_none_that_training_saw():
    assert {SPLITS[scene_of(seed).seed >> 64] for seed in range(3)} == {"test-scenes"}


def known(scene, **changed):
    """The right answer to each question of the demo, or another to its kind."""
    examples = all_examples(
        scene, KINDS, languages=("en", "de"), encode_mask=lambda mask: [0] * 16
    )
    answers = {one.prompt: one.answer or "" for one in examples}
    return [
        Asked(0, one, changed.get(one.kind, answers[one.prompt]), [], [])
        for one in questions(scene)
    ]


def test_the_picture_says_what_is_right_and_draws_all_that_was_found():
    scene = running_example()

    def pixels(colour=None, **changed):
        page = np.asarray(picture(scene, known(scene, **changed))).astype(int)
        if colour is None:
            return page
        return (page == ImageColor.getrgb(colour)).all(axis=-1).sum()

    assert pixels(RIGHT) > 200 and pixels(WRONG) == 0
    assert pixels(WRONG, caption="a zebra") > 50
    assert pixels(RIGHT, caption="a zebra") < pixels(RIGHT)
    (boxes,) = [a.answer for a in known(scene) if a.example.kind == "detect"]
    first, *others = boxes.split(" ; ")
    half = slice(0, GAP + PANEL)
    assert others and (pixels() != pixels(detect=first))[:, half].any()
    assert (pixels() != pixels(segment=""))[:, half.stop :].any()
    assert (pixels() == pixels(segment=""))[:, half].all()
    asked, full = known(scene), pixels()
    for one in [a for a in asked if a.example.kind == "segment"]:
        less = [dataclasses.replace(a, answer="") if a is one else a for a in asked]
        assert (np.asarray(picture(scene, less)) != full)[:, half.stop :].any()


def test_a_right_answer_is_called_right():
    scene: Scene = running_example()
    for example in questions(scene):
        right = Asked(0, example, example.answer or "", [], [])
        wrong = dataclasses.replace(right, answer="a zebra")
        if example.kind in ("detect", "segment"):
            assert is_right(right) is None
        else:
            assert is_right(right) and not is_right(wrong)


def test_a_scene_of_one_thing_can_be_drawn(checkpoint):
    from pgcore import load

    scene = next(s for s in map(scene_of, range(20)) if len(s.objects) == 1)
    asked = answers(*load(checkpoint), scene)
    assert picture(scene, asked).mode == "RGB"
