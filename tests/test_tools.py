"""The author's tools: from chapters to modules, and from code to rendered notebooks."""

import base64
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import chapter as chapter_tool
import export
import nbformat
import normalise
import pytest
import render
import stamp
from chapter import Chapter
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from tests.conftest import ROOT

MODULE_CELL = '#| export\n"""A module."""\n\nimport torch\nfrom torch import Tensor'


@pytest.fixture
def write_chapter(tmp_path):
    """Write a chapter of code cells into an empty book; return it as a Chapter."""
    (tmp_path / "chapters").mkdir()

    def write(*sources: str, number: str = "05", module: str = "attention") -> Chapter:
        cells = [new_markdown_cell("# A title"), *map(new_code_cell, sources)]
        notebook = new_notebook(cells=cells, metadata={"pgcore": {"module": module}})
        path = tmp_path / "chapters" / f"{number}_topic.ipynb"
        nbformat.write(notebook, path)
        return Chapter(path)

    return write


def exported(chapter: Chapter, kind: str = "export") -> str:
    path = ROOT / export.DESTINATIONS[kind].format(chapter.module)
    return export.modules_of(chapter)[path]


def test_a_chapter_may_build_parts_that_its_module_imports(tmp_path, write_chapter):
    chapter = write_chapter(
        '#| export kernel\n"""A part."""\n\nimport torch',
        "#| export kernel\nB = torch.ones(1)",
        MODULE_CELL + "\n\nfrom pgcore.kernel import B",
        "#| export\nA = B + torch.ones(1)",
        "#| wrong\nC = A + B",
    )
    with pytest.raises(ValueError, match="'kernel', which its metadata does not name"):
        export.modules_of(chapter)
    notebook = chapter.notebook
    notebook.metadata["pgcore"]["parts"] = ["kernel"]
    nbformat.write(notebook, chapter.path)
    chapter = Chapter(chapter.path)
    files = {
        str(path.relative_to(ROOT)): text
        for path, text in export.modules_of(chapter).items()
    }
    assert set(files) == {
        "pgcore/kernel.py", "pgcore/attention.py", "pgcore/lab/museum/attention.py",
    }  # fmt: skip
    assert "B = torch.ones" in files["pgcore/kernel.py"]
    assert "A = B" not in files["pgcore/kernel.py"]
    assert "from pgcore.kernel import B" in files["pgcore/attention.py"]
    assert "from pgcore.attention import A" in files["pgcore/lab/museum/attention.py"]
    assert chapter.code_of("export", "kernel") != chapter.code_of("export")


def test_a_part_may_not_import_its_module(write_chapter):
    chapter = write_chapter(
        '#| export kernel\n"""A part."""\n\nfrom pgcore.attention import A\n\nB = A',
        MODULE_CELL,
    )
    chapter.notebook.metadata["pgcore"]["parts"] = ["kernel"]
    nbformat.write(chapter.notebook, chapter.path)
    with pytest.raises(
        ValueError, match=r"imports pgcore\.attention, which chapter 05"
    ):
        export.modules_of(Chapter(chapter.path))


def test_only_marked_cells_are_exported_without_the_directive(write_chapter):
    chapter = write_chapter(MODULE_CELL, "print('teaching')", "#| export\nA = 1")
    text = exported(chapter)
    assert "A = 1" in text and "teaching" not in text and "#|" not in text


def test_an_exported_module_says_where_it_comes_from(write_chapter):
    text = exported(write_chapter(MODULE_CELL, "#| export\nA = 1"))
    assert text.startswith(
        "# Generated from chapters/05_topic.ipynb.\n# Edit the notebook"
    )


def test_public_docstrings_end_with_their_chapter(write_chapter):
    cell = (
        "#| export\n"
        'def one(x):\n    """One line."""\n    return x\n\n'
        'def two(x):\n    """First.\n\n    More.\n    """\n    return x\n\n'
        'def _private(x):\n    """Mine."""\n    return x'
    )
    text = exported(write_chapter(MODULE_CELL, cell))
    space: dict = {}
    exec(text.replace("from torch import Tensor", ""), space)
    note = "\n\n    Built in chapter 05, A title.\n    "
    assert space["one"].__doc__ == "One line." + note
    assert space["two"].__doc__ == "First.\n\n    More." + note
    assert space["_private"].__doc__ == "Mine."
    assert space["__all__"] == ["one", "two"]


def test_a_public_name_without_docstring_is_refused(write_chapter):
    chapter = write_chapter(MODULE_CELL, "#| export\ndef f(x):\n    return x")
    with pytest.raises(ValueError, match="f has no docstring"):
        export.modules_of(chapter)


def test_imports_move_to_the_top_and_unused_ones_go(write_chapter):
    text = exported(write_chapter(MODULE_CELL, "#| export\nimport math\nA = math.pi"))
    assert text.index("import math") < text.index("A = ")
    assert "import torch" not in text


def test_an_undefined_name_is_refused(write_chapter):
    chapter = write_chapter(MODULE_CELL, "#| export\nA = np.pi")
    with pytest.raises(ValueError, match=r"05_topic.ipynb \(export\).*`np`"):
        export.modules_of(chapter)


def test_a_shape_of_one_letter_is_no_undefined_name(write_chapter):
    cell = (
        "#| export\nfrom jaxtyping import Float\n"
        'def f(x: Float[Tensor, " B"]) -> Float[Tensor, "B D"]:\n    """Do."""\n'
        "    return x"
    )
    assert 'Float[Tensor, " B"]' in exported(write_chapter(MODULE_CELL, cell))


@pytest.mark.parametrize(
    "source", ["from pgcore.gemma import A", "import pgcore.gemma"]
)
def test_an_import_of_a_later_chapter_is_refused(write_chapter, source):
    write_chapter("#| export\nA = 1", number="10", module="gemma")
    chapter = write_chapter(MODULE_CELL, f"#| export\n{source}")
    with pytest.raises(ValueError, match="which chapter 10 builds"):
        export.modules_of(chapter)


def test_an_import_of_an_earlier_chapter_is_welcome(write_chapter):
    write_chapter("#| export\nA = 1", number="02", module="numerics")
    cell = "#| export\nfrom pgcore.numerics import A\nB = A"
    text = exported(write_chapter(MODULE_CELL, cell))
    assert "from pgcore.numerics import A" in text


@pytest.mark.parametrize("wing", ["lab", "lab.figures", "cli", "api", "recipes"])
def test_an_export_must_not_import_the_hand_written_wing(write_chapter, wing):
    chapter = write_chapter(f"#| export\nfrom pgcore.{wing} import thing\nA = thing")
    with pytest.raises(ValueError, match="only modules that earlier chapters build"):
        export.modules_of(chapter)


def test_wrong_twins_get_the_imports_and_names_they_use(write_chapter):
    chapter = write_chapter(
        MODULE_CELL,
        "#| export\nSCALE = 2.0",
        "#| wrong\ndef twin(x: Tensor):\n    return x * SCALE",
    )
    text = exported(chapter, "wrong")
    assert "from pgcore.attention import SCALE" in text
    assert "from torch import Tensor" in text and "import torch\n" not in text


def test_solution_marks_do_not_reach_the_module(write_chapter):
    cell = (
        "#| export\ndef f(x):\n    '''Do.'''\n    ### BEGIN SOLUTION\n"
        "    return x\n    ### END SOLUTION"
    ).replace("'''", '"""')
    assert "SOLUTION" not in exported(write_chapter(MODULE_CELL, cell))


def test_marked_cells_need_a_module_name(write_chapter):
    chapter = write_chapter("#| export\nA = 1", module=None)
    with pytest.raises(ValueError, match="its metadata names no module"):
        export.modules_of(chapter)


@pytest.mark.parametrize(
    "cell",
    [
        "#| exports\nA = 1",
        "\n#| export\nA = 1",
        "# first\n#| export\nA = 1",
        "#|export",
    ],
)
def test_what_looks_like_a_directive_must_be_one(write_chapter, cell):
    chapter = write_chapter(MODULE_CELL, cell)
    with pytest.raises(ValueError, match="is no directive"):
        export.modules_of(chapter)


@pytest.mark.parametrize("module", ["lab", "cli", "lab/emoji", "_private", "two words"])
def test_a_module_must_have_a_name_of_its_own(write_chapter, module):
    with pytest.raises(ValueError, match="cannot be the name of its module"):
        export.modules_of(write_chapter(MODULE_CELL, module=module))


def test_two_chapters_cannot_build_one_module(write_chapter):
    write_chapter(MODULE_CELL, number="02", module="numerics")
    chapter = write_chapter(MODULE_CELL, number="03", module="numerics")
    with pytest.raises(ValueError, match="02_topic.ipynb and chapters/03_topic.ipynb"):
        export.modules_of(chapter)


def test_a_module_without_docstring_is_refused(write_chapter):
    with pytest.raises(ValueError, match="no docstring for the module"):
        export.modules_of(write_chapter("#| export\nA = 1"))


def test_letters_beyond_ascii_do_not_confuse_the_docstring(write_chapter):
    cell = '#| export\ndef f(x):\n    """Scale by σ → x."""\n    return x'
    text = exported(write_chapter(MODULE_CELL, cell))
    assert '"""Scale by σ → x.\n\n    Built in chapter 05, A title.\n    """' in text


def test_the_stamp_follows_code_and_modules_but_not_prose(write_chapter):
    before = stamp.stamp(write_chapter("from pgcore.lab import figures"))
    prose = write_chapter("from pgcore.lab import figures")
    prose.notebook.cells[0].source = "# Another title"
    assert stamp.stamp(prose) == before
    assert stamp.stamp(write_chapter("from pgcore.lab import figures\n1")) != before


def test_the_stamp_covers_what_the_modules_import_and_load():
    files = stamp.files_behind("from pgcore.lab.emoji import load_emoji")
    names = {path.relative_to(ROOT).as_posix() for path in files}
    assert "pgcore/lab/emoji.py" in names
    assert "pgcore/assets/emoji/twemoji.webp" in names


@pytest.mark.parametrize(
    ("name", "count"), [(".", 0), ("..", 0), ("emoji/noto.webp", 1), ("nothing", 0)]
)
def test_a_string_stands_for_an_asset_only_if_it_names_one(name, count):
    assert len(stamp.files_of_asset(name)) == count


def test_the_stamp_sees_through_magics():
    source = stamp.as_python("%load_ext pgcore.lab\nif 1:\n    %pip install x")
    names = {p.name for p in stamp.files_behind(source)}
    assert "figures.py" in names


def test_the_stamp_covers_the_checks_of_an_exercise():
    names = {p.name for p in stamp.files_behind('check("02.1", f)')}
    assert "chapter_02.py" in names


def test_normalising_twice_changes_nothing_and_drops_noise(write_chapter):
    chapter = write_chapter("1")
    cell = chapter.notebook.cells[1]
    cell.metadata.executionInfo = {"elapsed": 3}
    chapter.notebook.metadata["colab"] = {"name": "x"}
    cell.outputs = [new_output("display_data", {"image/png": PIXEL})]
    once = normalise.normalised(chapter)
    assert "executionInfo" not in once.cells[1].metadata
    assert "colab" not in once.metadata
    nbformat.write(once, chapter.path)
    assert normalise.normalised(Chapter(chapter.path)) == once


PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmM"
    "IQAAAABJRU5ErkJggg=="
)


def test_a_picture_is_put_on_white_once(write_chapter):
    first = normalise.smaller_png(PIXEL)
    assert normalise.smaller_png(first) is first
    with Image.open(io.BytesIO(base64.b64decode(first))) as image:
        assert image.mode == "RGB" and image.getpixel((0, 0)) != (0, 0, 0)


def test_a_picture_that_moves_keeps_its_frames():
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    moving = base64.b64encode(buffer.getvalue()).decode()
    assert normalise.smaller_png(moving) is moving


@pytest.fixture
def book(tmp_path):
    """A whole book of one chapter in a folder of its own, and its tools."""
    no_caches = shutil.ignore_patterns("__pycache__")
    for folder in ("tools", "pgcore/lab", "pgcore/assets/emoji"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=no_caches)
    for name in ("__init__.py", "lab/museum/__init__.py"):
        (tmp_path / "pgcore" / name).write_bytes((ROOT / "pgcore" / name).read_bytes())
    for path in (tmp_path / "pgcore/lab/museum").glob("[a-z]*.py"):
        path.unlink()
    for name in ("_config.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    cells = [
        new_markdown_cell("# A title\n\nPromise.\n\n[Open in Colab](colab)"),
        new_code_cell("# setup", metadata={"tags": ["setup"]}),
        new_code_cell('#| export\n"""A module."""\n\nimport math\n\nA = math.pi'),
        new_code_cell("print(A)"),
    ]
    metadata = {"pgcore": {"module": "circle"}}
    (tmp_path / "chapters").mkdir()
    path = tmp_path / "chapters" / "01_circle.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata=metadata), path)

    def run(tool: str, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, tmp_path / "tools" / tool, *arguments],
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )

    return path, run


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf8")


def test_from_notebook_to_module_to_page_and_back(book):
    """One long story, because each step starts where the last one ended."""
    notebook, run = book
    module = notebook.parents[1] / "pgcore" / "circle.py"

    assert run("render.py", "--check").returncode == 1
    assert run("render.py").returncode == 0
    assert "A = math.pi" in module.read_text()
    first = notebook.read_bytes()
    assert b"colab.research.google.com" in first and b"3.14159" in first
    assert run("render.py", "--check").returncode == 0
    assert run("export.py", "--check").returncode == 0

    assert run("render.py", "--force").returncode == 0
    assert notebook.read_bytes() == first, "rendering twice gives the same file"

    edit(notebook, "3.14159", "3.00000")
    assert "not made by this command" in run("render.py", "--check").stdout
    assert run("render.py").returncode == 0
    assert notebook.read_bytes() == first

    edit(notebook, "git+https://", "git+http://")
    assert "not normalised" in run("render.py", "--check").stdout
    assert run("render.py").returncode == 0

    edit(module, "math.pi", "3.0")
    assert "out of date: pgcore/circle.py" in run("export.py", "--check").stdout
    assert run("export.py").returncode == 0 and "math.pi" in module.read_text()

    edit(notebook, "print(A)", "print(1 / 0)")
    before = notebook.read_bytes()
    failed = run("render.py")
    assert failed.returncode == 1 and "ZeroDivisionError" in failed.stderr
    assert notebook.read_bytes() == before, "a failed run leaves the notebook alone"

    notebook.unlink()
    assert run("export.py", "--check").returncode == 1
    assert run("export.py").returncode == 0
    assert not module.exists(), "a module without a chapter goes"


def test_a_chapter_is_stale_when_a_module_that_it_imports_changes(book):
    notebook, run = book
    edit(notebook, "print(A)", "import pgcore.lab.emoji")
    assert run("render.py").returncode == 0
    helper = notebook.parents[1] / "pgcore" / "lab" / "_near.py"
    helper.write_text(helper.read_text() + "\n# changed\n")
    assert "older than the code" in run("render.py", "--check").stdout


def test_rendering_refuses_a_cell_that_writes_to_stderr(write_chapter):
    chapter = write_chapter("import warnings; warnings.warn('careful')")
    with pytest.raises(ValueError, match="writes to stderr"):
        render.execute(chapter)


def test_many_prints_are_one_output_however_they_arrive(write_chapter):
    loop = "for i in range(3):\n    print(i, flush=True)\n    time.sleep(0.3)"
    chapter = write_chapter("import time\n" + loop)
    render.execute(chapter)
    (output,) = chapter.notebook.cells[1].outputs
    assert output.text == "0\n1\n2\n"


def test_a_failing_cell_stops_the_rendering_and_is_named(write_chapter):
    chapter = write_chapter("1 / 0")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        render.execute(chapter)


def test_an_unknown_chapter_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="no chapter '77'; there are .*02"):
        chapter_tool.select(["77"])
