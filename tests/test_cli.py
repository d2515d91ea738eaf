"""The command line, as a user meets it: answers, JSON lines, errors, exit codes."""

import json
import re
import signal
import subprocess
import sys

import pytest
from PIL import Image

from pgcore import generate, load
from pgcore.cli import main
from pgcore.lab.tiny_world import running_example
from tests.checkpoints import GEMMA1, write_checkpoint

PROMPT = "caption en"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    write_checkpoint(folder, GEMMA1, seed=2)  # a talkative one
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{name}.png" for name in ("one", "two", "three")]
    for number, path in enumerate(paths):
        Image.effect_noise((40 + number, 30), 80).convert("RGB").save(path)
    return [str(path) for path in paths]


@pytest.fixture
def ask(checkpoint, capsys):
    """Run the command; give its code, standard output and standard error."""

    def run(*arguments):
        code = main(
            ["ask", *arguments, "--model", str(checkpoint), "--max-new-tokens", "8"]
        )
        return code, *capsys.readouterr()

    return run


def expected(checkpoint, paths, **options):
    model, processor = load(checkpoint)
    images = [Image.open(path) for path in paths]
    prompts = [PROMPT] * len(paths)
    return generate(model, processor, images, prompts, max_new_tokens=8, **options)


def test_one_picture_gives_the_answer_and_nothing_else(ask, checkpoint, pictures):
    code, out, err = ask(pictures[0], PROMPT)
    assert code == 0
    assert out == expected(checkpoint, pictures[:1])[0] + "\n"
    assert err == f"pgcore: loading {checkpoint} ...\n"


def test_several_pictures_give_a_line_each_in_their_order(ask, checkpoint, pictures):
    code, out, err = ask(*pictures, PROMPT, "--batch", "2")
    answers = expected(checkpoint, pictures)
    answers = [" ".join(answer.splitlines()) for answer in answers]
    lines = [f"{p}: {a}\n" for p, a in zip(pictures, answers, strict=True)]
    assert code == 0 and out == "".join(lines)
    assert "picture 2 of 3" in err and "picture 3 of 3" in err


def test_json_lines_can_be_read_again(ask, checkpoint, pictures):
    code, out, _ = ask(*pictures, PROMPT, "--json", "--probabilities")
    found = [json.loads(line) for line in out.splitlines()]
    answers = expected(checkpoint, pictures, probabilities=True)
    assert code == 0 and [row["picture"] for row in found] == pictures
    for row, answer in zip(found, answers, strict=True):
        assert row["answer"] == answer.text and row["tokens"] == answer.tokens
        assert row["prompt"] == PROMPT
        assert row["probabilities"] == pytest.approx(answer.probabilities, abs=1e-5)


def test_probabilities_are_said_in_words(ask, pictures):
    _, out, _ = ask(pictures[0], PROMPT, "--probabilities")
    assert "on average" in out and "at least" in out


def test_beams_and_seeds_reach_the_model(ask, checkpoint, pictures):
    assert (
        ask(pictures[0], PROMPT, "--beams", "3")[1].rstrip("\n")
        == (expected(checkpoint, pictures[:1], num_beams=3)[0])
    )
    one, again, other, surest = (
        ask(pictures[0], PROMPT, "--temperature", "1", "--seed", seed, *more)[1]
        for seed, *more in (["5"], ["5"], ["6"], ["5", "--top-k", "1"])
    )
    assert one == again != other
    assert surest.rstrip("\n") == expected(checkpoint, pictures[:1])[0]


def test_a_picture_that_is_named_twice_is_answered_twice(ask, pictures):
    code, out, _ = ask(pictures[0], pictures[0], PROMPT)
    first, second = out.splitlines()
    assert code == 0 and first == second


def test_a_broken_picture_is_named_and_the_others_are_answered(ask, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    code, out, err = ask(pictures[0], str(broken), pictures[1], PROMPT)
    assert code == 2
    assert [line.split(": ")[0] for line in out.splitlines()] == pictures[:2]
    assert f"pgcore: {broken}: expected a whole picture" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png", PROMPT], "nowhere.png: no such file"),
        (["{0}", PROMPT, "--batch", "0"], "--batch: expected 1 or more, found 0"),
        (["{0}", PROMPT, "--top-p", "2"], "top_p: expected"),
        (["{0}", PROMPT, "--beams", "0"], "num_beams: expected"),
        (["{0}", PROMPT, "--beams", "2", "--probabilities"], "not with --beams"),
        (["{0}", PROMPT, "--device", "abacus"], "device: 'abacus' cannot be used"),
        (["{0}", PROMPT, "--dtype", "int8"], "dtype: expected auto, float32"),
        (["{0}", " "], "PROMPT: expected one such as 'caption en', found nothing"),
        (["{0}", "<image> caption"], "<image> is the processor's to place"),
    ],
)
def test_bad_input_is_one_line_and_code_2(ask, pictures, arguments, message):
    code, out, err = ask(*[text.format(*pictures) for text in arguments])
    assert code == 2 and out == ""
    last = err.splitlines()[-1]
    assert last.startswith("pgcore: ") and message in last


def test_the_default_model_is_the_one_that_ships(tmp_path, capsys):
    scene, boxed = tmp_path / "scene.png", tmp_path / "boxed.png"
    Image.fromarray(running_example().image).save(scene)
    assert main(["ask", str(scene), "detect cat", "--out", str(boxed)]) == 0
    answer = capsys.readouterr().out.splitlines()[0]
    assert re.fullmatch(r"(<loc\d{4}>){4} cat", answer)
    with Image.open(boxed) as image:
        assert image.size == (384, 384)  # enlarged, so that names can be read


def test_info_counts_without_loading(checkpoint, capsys):
    assert main(["info", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    model, _ = load(checkpoint)
    total = sum(p.numel() for p in model.parameters())
    assert f"{total:,}" in out and "14 x 14, 4 tokens" in out
    assert "float32" in out and "PaliGemma in" in out


def test_info_refuses_a_checkpoint_that_does_not_fit(checkpoint, tmp_path, capsys):
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = (checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert main(["info", str(tmp_path)]) == 2
    assert "layers.2" in capsys.readouterr().err


def heed_ctrl_c():
    """Shells start what runs in the background deaf to Ctrl-C; children inherit it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def command(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "pgcore", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
        **options,
    )


def test_ctrl_c_is_code_130_without_a_traceback(checkpoint, pictures):
    process = command(
        "ask", pictures[0], PROMPT, "--model", str(checkpoint),
        "--max-new-tokens", "100000",
    )  # fmt: skip
    assert process.stderr.readline().startswith("pgcore: loading")
    process.stdout.read(1)  # it writes
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped" in err and "Traceback" not in err


def test_a_reader_that_leaves_early_is_no_error(checkpoint, pictures):
    process = command(
        "ask", pictures[0], PROMPT, "--model", str(checkpoint),
        "--max-new-tokens", "100000",
    )  # fmt: skip
    process.stdout.read(1)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.wait(timeout=60)


def test_the_help_of_a_command_needs_no_torch():
    code = "import sys; from pgcore.cli import main\ntry: main(['ask', '--help'])\n"
    code += "except SystemExit: print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert result.stdout.splitlines()[-1] == "False"


# --out


BOX = "<loc0100><loc0200><loc0600><loc0900>"
MASK = "".join(f"<seg{code:03d}>" for code in range(16))


@pytest.fixture
def says(monkeypatch):
    """Let every model give this answer: none here was trained to point at things."""
    import pgcore

    def answer_is(text):
        def generate(model, processor, images, prompts, stream=False, **options):
            if stream:
                return iter([text[:30], text[30:]])
            return [text] * len(images)

        monkeypatch.setattr(pgcore, "generate", generate, raising=False)

    return answer_is


def same_size(path, picture):
    with Image.open(path) as drawn, Image.open(picture) as original:
        drawn.load()
        times = drawn.width // original.width
        size = original.width * times, original.height * times
        return drawn.size == size and times > 1


@pytest.mark.parametrize("extension", ["png", "jpg", "JPEG"])
def test_out_draws_what_was_found(ask, pictures, tmp_path, says, extension):
    says(f"{BOX} red apple ; {BOX[:27]} broken")
    place = tmp_path / "new folder" / f"drawn.{extension}"
    code, out, _ = ask(pictures[0], "detect red apple", "--out", str(place))
    assert code == 0 and out == f"{BOX} red apple ; {BOX[:27]} broken\n"
    assert same_size(place, pictures[0])
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    with Image.open(place) as drawn:
        assert drawn.format == ("PNG" if extension == "png" else "JPEG")


def test_out_is_a_folder_for_several_pictures(ask, pictures, tmp_path, says):
    says(f"{BOX} cat")
    code, out, _ = ask(*pictures, "detect cat", "--out", str(tmp_path / "drawn"))
    assert code == 0 and len(out.splitlines()) == 3
    names = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert names == ["one.png", "three.png", "two.png"]


def test_out_may_be_a_folder_for_one(ask, pictures, tmp_path, says):
    says(f"{BOX} cat")
    assert ask(pictures[0], "detect cat", "--out", str(tmp_path))[0] == 0
    assert same_size(tmp_path / "one.png", pictures[0])


def test_an_answer_without_boxes_leaves_the_file_as_it_was(
    ask, pictures, tmp_path, says
):
    says("a cat")
    place = tmp_path / "drawn.png"
    place.write_bytes(b"from before")
    code, out, err = ask(pictures[0], PROMPT, "--out", str(place))
    assert code == 0 and out == "a cat\n"
    assert err.splitlines()[-1].startswith(f"pgcore: {pictures[0]}: no box in the")
    assert place.read_bytes() == b"from before"


def test_masks_need_their_codec(ask, pictures, tmp_path, says, capsys):
    from pgcore.mask_codec import SHIPPED_CODEC

    says(f"{BOX}{MASK} cat")
    plain, masked = tmp_path / "plain.png", tmp_path / "masked.png"
    code, _, err = ask(pictures[0], "segment cat", "--out", str(plain))
    assert code == 0 and "the masks are not drawn" in err
    codec = ["--mask-codec", str(SHIPPED_CODEC)]
    code, _, err = ask(pictures[0], "segment cat", "--out", str(masked), *codec)
    assert code == 0 and "not drawn" not in err
    assert plain.read_bytes() != masked.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{0}", PROMPT, "--out", "x.gif"], "a name that ends in .png, .jpg, .jpeg"),
        (["{0}", PROMPT, "--out", "nothing"], "ends in .png, .jpg, .jpeg, found no"),
        (["{0}", PROMPT, "--out", "{0}"], "is the picture itself"),
        (["{0}", "{1}", PROMPT, "--out", "{2}"], "for several pictures a folder"),
        (["{0}", "{1}", PROMPT, "--out", "{folder}"], "is the picture itself"),
        (["{0}", "{again}", PROMPT, "--out", "x"], "two pictures would be written"),
        (["{0}", PROMPT, "--mask-codec", "x"], "--mask-codec: only with --out"),
        (
            ["{0}", PROMPT, "--out", "x.png", "--mask-codec", "no.npz"],
            "no.npz: no such file",
        ),
        (
            ["{0}", PROMPT, "--out", "x.png", "--mask-codec", "{0}"],
            "expected an .npz of numbers",
        ),
    ],
)
def test_a_bad_out_is_found_before_the_model_is_loaded(
    ask, pictures, arguments, message, tmp_path
):
    again = tmp_path / "one.jpg"
    Image.new("RGB", (8, 8)).save(again)
    folder = str(again.parent) if "{folder}" not in arguments else pictures[0][:-8]
    given = [text.format(*pictures, again=again, folder=folder) for text in arguments]
    code, out, err = ask(*given)
    assert code == 2 and out == "" and "loading" not in err
    assert len(err.splitlines()) == 1 and message in err


def test_a_drawing_that_fails_leaves_nothing(
    ask, pictures, tmp_path, says, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    says(f"{BOX} cat")
    place = tmp_path / "drawn.png"
    place.mkdir()
    monkeypatch.setattr("os.replace", full)
    code, out, err = ask(pictures[0], "detect cat", "--out", str(place))
    assert code == 1 and out == f"{BOX} cat\n" and "gave up: [Errno 28]" in err
    assert list(place.iterdir()) == []


def test_a_drawing_does_not_take_the_place_of_a_folder(ask, pictures, tmp_path, says):
    says(f"{BOX} cat")
    place = tmp_path / "drawn.png"
    place.mkdir()
    (place / "one.png").mkdir()  # where the file should go
    code, out, err = ask(pictures[0], "detect cat", "--out", str(place))
    assert code == 2 and out == f"{BOX} cat\n" and "found a folder" in err
    assert [path.name for path in place.iterdir()] == ["one.png"]
