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
DIRECTIVE = re.compile(r"#\| (export|reference|wrong)(?:(?<=export) (\w+))?(?:\n|$)")
LIKE_A_DIRECTIVE = re.compile(r"^\s*#\s*\|", flags=re.M)


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
    def parts(self) -> list[str]:
        """Modules that it builds beside: cells marked ``#| export part`` go there."""
        return self.notebook.metadata.get("pgcore", {}).get("parts", [])

    @property
    def relative_path(self) -> str:
        return self.path.relative_to(self.path.parents[1]).as_posix()

    @property
    def colab_address(self) -> str:
        """Where Colab opens the tracked notebook."""
        config = book_config()
        repository, colab = config["repository"], config["launch_buttons"]["colab_url"]
        owner_and_name = repository["url"].removeprefix("https://github.com/")
        return (
            f"{colab}/github/{owner_and_name}/blob/{repository['branch']}/"
            f"{self.relative_path}"
        )

    def code_of(self, directive: str, module: str | None = None) -> list[str]:
        """The code cells that begin with ``#| directive``, without that line.

        module: of exported cells, only those that go there.
        Raises ValueError for a line that looks like a directive and is none.
        """
        found = []
        for cell in self.notebook.cells:
            if cell.cell_type != "code":
                continue
            match = DIRECTIVE.match(cell.source)
            rest = cell.source[match.end() :] if match else cell.source
            if stray := LIKE_A_DIRECTIVE.search(rest):
                line = rest[stray.start() :].strip().splitlines()[0]
                raise ValueError(
                    f"{self.relative_path}: {line!r} is no directive; a cell may begin "
                    "with '#| export', '#| reference' or '#| wrong'"
                )
            if not match or match[1] != directive:
                continue
            if match[2] and match[2] not in self.parts:
                raise ValueError(
                    f"{self.relative_path}: a cell goes into {match[2]!r}, which its "
                    "metadata does not name among the parts"
                )
            if module in (None, match[2] or self.module):
                found.append(rest.strip("\n"))
        return found


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
    config = book_config()
    return config["repository"]["url"], config["repository"]["branch"]


def book_config() -> dict:
    return yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf8"))
