"""The author's tools: from chapters to modules, and from code to rendered notebooks."""

import subprocess
import sys

import chapter as chapter_tool
import export
import nbformat
import normalise
import pytest
import render
import stamp
from chapter import Chapter
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

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
    assert "from pgcore.numerics import A" in exported(write_chapter(cell))


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
    assert "SOLUTION" not in exported(write_chapter(cell))


def test_marked_cells_need_a_module_name(write_chapter):
    chapter = write_chapter("#| export\nA = 1", module=None)
    with pytest.raises(ValueError, match="its metadata names no module"):
        export.modules_of(chapter)


def test_the_committed_modules_are_those_of_the_chapters():
    command = [sys.executable, str(ROOT / "tools" / "export.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_check_notices_a_module_edited_by_hand(monkeypatch, tmp_path, capsys):
    chapters = [c for c in chapter_tool.all_chapters() if c.module]
    (path, text), *_ = export.modules_of(chapters[0]).items()
    changed = {path: text + "# edited\n"}
    monkeypatch.setattr(export, "modules_of", lambda chapter: changed)
    monkeypatch.setattr(sys, "argv", ["export.py", "--check", chapters[0].number])
    assert export.main() == 1
    assert "out of date" in capsys.readouterr().out


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


def test_the_stamp_sees_through_magics():
    source = stamp.without_magics("%load_ext pgcore.lab\nif 1:\n    %pip install x")
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
