"""Every chapter has the form that CONTRIBUTING.md describes."""

import re
import subprocess

import pytest
import yaml
from chapter import ROOT, all_chapters, repository
from nbformat import NotebookNode

CHAPTERS = all_chapters()
MAX_KILOBYTES = 1500
CODE_COLUMNS = 76
SECTIONS = [
    "Check it",
    "People get this wrong",
    "What to remember",
    "Exercises",
    "Further reading",
]

every_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.number)


def code_cells(chapter) -> list[NotebookNode]:
    return [c for c in chapter.notebook.cells if c.cell_type == "code"]


def prose(chapter) -> str:
    cells = chapter.notebook.cells
    return "\n\n".join(c.source for c in cells if c.cell_type == "markdown")


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def test_the_book_contains_every_chapter_once_in_order():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = [c["file"] for part in toc["parts"] for c in part["chapters"]]
    listed = [file for file in listed if file.startswith("chapters/")]
    assert listed == [c.relative_path.removesuffix(".ipynb") for c in CHAPTERS]


@every_chapter
def test_opening(chapter):
    opening, setup = chapter.notebook.cells[0].source, chapter.notebook.cells[1]
    assert re.match(r"# \S.*\n\n\S.+", opening)
    assert re.search(r"\*\*Time\*\* .*\*\*Runs in\*\* .*\*\*Builds\*\* ", opening)
    assert "setup" in tags(setup) and "remove-cell" in tags(setup)
    assert "torch" not in setup.source.replace("paligemma-from-scratch", "")
    imports = code_cells(chapter)[1].source
    assert imports.startswith("%load_ext pgcore.lab\n")


@every_chapter
def test_colab_opens_the_tracked_notebook(chapter):
    url, branch = repository()
    link = re.search(r"\[Open in Colab\]\((.*?)\)", chapter.notebook.cells[0].source)
    path = link[1].split(f"/blob/{branch}/")[1]
    assert link[1].startswith("https://colab.research.google.com/github/")
    assert url.removeprefix("https://github.com/") in link[1]
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert tracked.stdout.strip() == chapter.relative_path


@every_chapter
def test_sections(chapter):
    headings = re.findall(r"^## (.+)$", prose(chapter), flags=re.M)
    found = [h for h in headings if h in SECTIONS]
    assert found == SECTIONS
    assert prose(chapter).count("} Predict") >= 3


@every_chapter
def test_exercises(chapter):
    cells = chapter.notebook.cells
    heading = re.compile(r"### Exercise (\d\d\.\d) · .+ ★+ · \d+ min\n")
    ids = []
    for index, cell in enumerate(cells):
        if not (match := heading.match(cell.source)):
            assert not cell.source.startswith("### Exercise"), cell.source[:60]
            continue
        ids.append(match[1])
        solution, check = cells[index + 1], cells[index + 2]
        assert solution.source.startswith(f"# exercise {match[1]}\n")
        assert solution.source.count("### BEGIN SOLUTION") == 1
        assert solution.source.count("### END SOLUTION") == 1
        assert {"solution", "hide-input"} <= set(tags(solution))
        assert re.match(rf'check\(\s*"{match[1]}", ', check.source)
    for cell in cells:
        if cell.cell_type == "markdown" and "solution" in tags(cell):
            assert cell.source.startswith("```{dropdown}"), "a solution is folded"
    assert ids == [f"{chapter.number}.{i + 1}" for i in range(len(ids))]
    assert 3 <= len(ids) <= 5


@every_chapter
def test_every_cell_is_of_the_kind_that_its_author_meant(chapter):
    """Jupytext keeps a first line that it cannot read under this name, as code."""
    for cell in chapter.notebook.cells:
        assert "incorrectly_encoded_metadata" not in cell.metadata, cell.source


@every_chapter
def test_figures_have_a_caption_a_name_and_alt_text(chapter):
    figures = 0
    for cell in code_cells(chapter):
        if not any("image/png" in o.get("data", {}) for o in cell.outputs):
            continue
        figures += 1
        rendering = cell.metadata.get("mystnb", {})
        assert len(rendering.get("figure", {}).get("caption", "")) > 20, cell.source[
            :80
        ]
        assert len(rendering.get("image", {}).get("alt", "")) > 40, cell.source[:80]
        bare = re.sub("`[^`]*`", "", rendering["figure"]["caption"])
        assert not re.search("<[a-z]", bare), "a browser takes it for a tag"
        name = rendering["figure"]["name"]
        assert f"`{name}`" in prose(chapter), f"no text speaks of {name}"
        shown = [o for o in cell.outputs if "data" in o]
        assert len(shown) == 1, f"{name}: the value of the last line is shown, too"
    assert figures >= 3


def test_figure_names_are_unique_in_the_book():
    names = [
        cell.metadata["mystnb"]["figure"]["name"]
        for chapter in CHAPTERS
        for cell in code_cells(chapter)
        if "figure" in cell.metadata.get("mystnb", {})
    ]
    assert len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)


@every_chapter
def test_outputs_are_complete_and_clean(chapter):
    counts = [c.execution_count for c in code_cells(chapter)]
    assert counts == list(range(1, len(counts) + 1))
    for cell in code_cells(chapter):
        for output in cell.outputs:
            assert output.output_type != "error", cell.source[:80]
            assert output.get("name") != "stderr", output.get("text")
            formats = set(output.get("data", {}))
            assert not formats & {"image/svg+xml", "text/html"}, formats
            text = output.get("text", "") + str(
                output.get("data", {}).get("text/plain")
            )
            assert not re.search(r"0x[0-9a-f]{6}|/home/|Warning:|\d(ms|s/it)\b", text)
    assert chapter.path.stat().st_size < MAX_KILOBYTES * 1024


@every_chapter
def test_code_fits_the_column_and_ends_without_semicolons(chapter):
    for cell in code_cells(chapter):
        if "setup" in tags(cell):
            continue
        for line in cell.source.splitlines():
            assert len(line) <= CODE_COLUMNS, line
            assert not line.rstrip().endswith(";"), line


@every_chapter
def test_cells_whose_text_is_compared_exist(chapter):
    compared = [c for c in code_cells(chapter) if "nbval-check-output" in tags(c)]
    assert compared
    assert all(cell.outputs for cell in compared)


@every_chapter
def test_the_chapter_names_its_sources(chapter):
    assert len(set(re.findall(r"\{cite:[tp]\}`([^`]+)`", prose(chapter)))) >= 3


@every_chapter
def test_no_hype(chapter):
    words = r"\b(simply|just|obviously|of course|powerful|amazing|magic(al)?ly)\b"
    text = re.sub(r"`[^`]*`", "", prose(chapter))
    found = re.search(words, text, flags=re.I)
    assert not found, text[max(0, found.start() - 60) : found.end() + 20]
