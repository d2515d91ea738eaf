"""What the author's tools know about a chapter: its number, module and cells.

Shared by the exporter, the executor, the Sphinx extension and the tests.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nbformat
import yaml
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = ROOT / "chapters"
DIRECTIVE = re.compile(r"#\|\s*(export|reference|wrong)\s*\n")


@dataclass(frozen=True)
class Chapter:
    """One chapter notebook."""

    path: Path

    @cached_property
    def notebook(self) -> NotebookNode:
        return nbformat.read(self.path, as_version=4)

    @property
    def number(self) -> str:
        return self.path.stem.split("_")[0]

    @property
    def title(self) -> str:
        first_line = self.notebook.cells[0].source.splitlines()[0]
        return first_line.removeprefix("# ").strip()

    @property
    def module(self) -> str | None:
        """The pgcore module that the chapter builds, None if it builds nothing."""
        return self.notebook.metadata.get("pgcore", {}).get("module")

    @property
    def relative_path(self) -> str:
        return self.path.relative_to(self.path.parents[1]).as_posix()

    def code_of(self, directive: str) -> list[str]:
        """The code cells that begin with ``#| directive``, without that line."""
        sources = [c.source for c in self.notebook.cells if c.cell_type == "code"]
        return [
            source[match.end() :].strip("\n")
            for source in sources
            if (match := DIRECTIVE.match(source)) and match[1] == directive
        ]


def all_chapters(folder: Path = CHAPTERS) -> list[Chapter]:
    """The chapters in the order of the book, which is the build order."""
    return [Chapter(path) for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))]


def select(numbers: list[str]) -> list[Chapter]:
    """The chapters with these numbers, all of them if none is named.

    Raises ValueError for a number that is no chapter.
    """
    chapters = all_chapters()
    known = {chapter.number: chapter for chapter in chapters}
    if unknown := [number for number in numbers if number not in known]:
        raise ValueError(f"no chapter {unknown[0]!r}; there are {', '.join(known)}")
    return [known[number] for number in numbers] or chapters


def repository() -> tuple[str, str]:
    """The repository's address and branch; ``_config.yml`` is their one place."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf8"))
    return config["repository"]["url"], config["repository"]["branch"]
