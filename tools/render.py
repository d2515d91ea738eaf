"""Make chapters: export their modules, execute what is stale, normalise the notebooks.

    python tools/render.py              every stale chapter
    python tools/render.py 02 --force   chapter 02, stale or not
    python tools/render.py --check      fails if a chapter is stale or not normalised

A rendered notebook carries a stamp over what its outputs depend on, and a seal over the
outputs. Rendering twice gives the same file.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from chapter import Chapter, repository, select
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from normalise import normalised
from stamp import seal, stamp

BUDGET_SECONDS = 60
CELL_TIMEOUT_SECONDS = 300
THREADS = "2"

SETUP = """\
# Colab only: fetch pgcore and what Colab lacks. Elsewhere this does nothing.
import sys
if "google.colab" in sys.modules:
    %pip install -q --no-deps "paligemma-from-scratch @ git+{url}@{branch}" {extras}
"""
COLAB_LACKS = "jaxtyping wadler-lindig beartype"


def main() -> int:
    parser = argparse.ArgumentParser(description="Bring chapters up to date.")
    parser.add_argument("numbers", nargs="*", metavar="NN", help="default: all")
    parser.add_argument("--force", action="store_true", help="even if not stale")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    try:
        chapters = select(options.numbers)
        if options.check:
            return report_stale(chapters)
        export_all_modules()
        for chapter in chapters:
            render(chapter, options.force)
    except ValueError as error:
        print(f"chapters: {error}", file=sys.stderr)
        return 1
    return 0


def report_stale(chapters: list[Chapter]) -> int:
    problems = [
        f"{chapter.relative_path}: {problem}"
        for chapter in chapters
        if (problem := what_is_stale(chapter))
    ]
    for problem in problems:
        print(f'{problem}; run "make chapters"')
    return 1 if problems else 0


def what_is_stale(chapter: Chapter) -> str | None:
    """Why a chapter on disk is not what ``render`` would leave, None if it is."""
    on_disk = chapter.path.read_text(encoding="utf8")
    prepare(chapter)
    marks = chapter.notebook.metadata.get("pgcore", {})
    canonical = normalised(chapter)
    if marks.get("stamp") != stamp(chapter):
        return "the outputs are older than the code"
    if marks.get("seal") != seal(canonical):
        return "the outputs were not made by this command"
    return None if text_of(canonical) == on_disk else "not normalised"


def render(chapter: Chapter, force: bool) -> None:
    """Bring one chapter up to date. Its file changes at the end or not at all.

    Raises ValueError if a cell fails, or if the file was saved meanwhile.
    """
    before = chapter.path.read_text(encoding="utf8")
    problem = what_is_stale(chapter)
    if problem is None and not force:
        print(f"{chapter.relative_path}: up to date")
        return
    marks = chapter.notebook.metadata.setdefault("pgcore", NotebookNode())
    if problem != "not normalised" or force:
        print(f"{chapter.relative_path}: executing ...", flush=True)
        seconds = execute(chapter)
        print(f"{chapter.relative_path}: done in {seconds:.0f} s")
        if seconds > BUDGET_SECONDS:
            print(f"  that is over the budget of {BUDGET_SECONDS} s")
        marks["stamp"] = stamp(chapter)
        marks["seal"] = seal(normalised(chapter))
    if chapter.path.read_text(encoding="utf8") != before:
        raise ValueError(
            f"{chapter.relative_path}: it was saved while it ran, so nothing was "
            "written; run the command again"
        )
    write_atomically(chapter.path, text_of(normalised(chapter)))


def export_all_modules() -> None:
    """Chapters import each other's modules: bring all of them up to date first."""
    tool = Path(__file__).with_name("export.py")
    if subprocess.run([sys.executable, str(tool)]).returncode != 0:
        raise ValueError("the modules could not be exported (see above)")


def prepare(chapter: Chapter) -> None:
    """Fill in what the tools own: the setup cell and the Colab address."""
    cells = chapter.notebook.cells
    cells[0].source = re.sub(
        r"\[Open in Colab\]\([^)]*\)",
        f"[Open in Colab]({chapter.colab_address})",
        cells[0].source,
    )
    setup_cells = [c for c in cells if "setup" in c.metadata.get("tags", [])]
    if len(setup_cells) != 1:
        raise ValueError(
            f"{chapter.relative_path}: expected one cell tagged 'setup', "
            f"found {len(setup_cells)}"
        )
    url, branch = repository()
    setup_cells[0].source = SETUP.format(
        url=url, branch=branch, extras=COLAB_LACKS
    ).strip()
    setup_cells[0].metadata["tags"] = ["setup", "remove-cell"]


def execute(chapter: Chapter) -> float:
    """Run all cells in a fresh kernel; return the seconds it took.

    Raises ValueError with the failing cell, or with a warning that a cell printed.
    """
    with tempfile.TemporaryDirectory() as ipython_dir:
        quiet = Path(ipython_dir) / "profile_default" / "ipython_kernel_config.py"
        quiet.parent.mkdir()
        quiet.write_text("c.IPKernelApp.log_level = 40\n")
        environment = os.environ | {
            "IPYTHONDIR": ipython_dir,
            "OMP_NUM_THREADS": THREADS,
            "MKL_NUM_THREADS": THREADS,
            "OMP_WAIT_POLICY": "passive",  # spinning threads starve a busy machine
            "PYTHONHASHSEED": "0",
        }
        client = NotebookClient(
            chapter.notebook,
            timeout=CELL_TIMEOUT_SECONDS,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,  # else prints break up by chance of timing
            resources={"metadata": {"path": str(chapter.path.parent)}},
        )
        start = time.monotonic()
        try:
            client.execute(env=environment)
        except CellExecutionError as error:
            raise ValueError(f"{chapter.relative_path}: {error}") from None
        seconds = time.monotonic() - start
    refuse_warnings(chapter)
    return seconds


def refuse_warnings(chapter: Chapter) -> None:
    for cell in chapter.notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise ValueError(
                    f"{chapter.relative_path}: a cell writes to stderr, and the page "
                    f"would show it: {output.text.strip().splitlines()[-1]}"
                )


def text_of(notebook: NotebookNode) -> str:
    return nbformat.writes(notebook, version=nbformat.NO_CONVERT) + "\n"


def write_atomically(path: Path, text: str) -> None:
    scratch = path.with_suffix(".ipynb.part")
    scratch.write_text(text, encoding="utf8")
    scratch.replace(path)


if __name__ == "__main__":
    sys.exit(main())
