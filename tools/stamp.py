"""The two hashes of a rendered chapter.

The stamp covers everything of ours that the outputs depend on: the chapter's code, the
modules of pgcore that it imports, directly or not, and the assets that those load. The
seal covers the outputs, so that only "make chapters" can have made them.
"""

import ast
import hashlib
import json
import re
from pathlib import Path

from chapter import ROOT, Chapter
from export import imported_modules
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

ASSETS = ROOT / "pgcore" / "assets"


def stamp(chapter: Chapter) -> str:
    """A hash over the chapter's code and everything of ours that it runs.

    Raises ValueError for a cell that is no Python.
    """
    digest = hashlib.sha256()
    sources = [c.source for c in chapter.notebook.cells if c.cell_type == "code"]
    for source in sources:
        digest.update(source.encode() + b"\0")
    try:
        files = files_behind("\n".join(as_python(source) for source in sources))
    except SyntaxError as error:
        raise ValueError(
            f"{chapter.relative_path}: {error.msg}: {error.text}"
        ) from None
    for path in files:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def seal(notebook: NotebookNode) -> str:
    """A hash over the outputs of a notebook in canonical form."""
    outputs = [
        (cell.id, cell.execution_count, cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    text = json.dumps(outputs, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def as_python(source: str) -> str:
    """The cell as plain Python, magics included; ``%load_ext`` becomes an import."""
    source = re.sub(r"^%load_ext (\S+)$", r"import \1", source, flags=re.M)
    return TransformerManager().transform_cell(source)


def files_behind(source: str) -> list[Path]:
    """The files of pgcore that a source imports, directly or not, and their assets."""
    found: set[Path] = set()
    waiting = [source]
    while waiting:
        tree = ast.parse(waiting.pop())
        names = [n for n in imported_modules(tree) if n.split(".")[0] == "pgcore"]
        names += imported_submodules(tree)
        for path in sorted({path for name in names if (path := file_of(name))} - found):
            found.add(path)
            waiting.append(path.read_text(encoding="utf8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= files_of_asset(node.value)
    return sorted(found)


def imported_submodules(tree: ast.Module) -> list[str]:
    """``from pgcore.lab import figures`` names a module too, and so does a check."""
    names = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pgcore")
        for alias in node.names
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check":
            exercise_id = getattr(node.args[0], "value", "") if node.args else ""
            chapter = str(exercise_id).split(".")[0]
            names.append(f"pgcore.lab.checks.chapter_{chapter}")
    return names


def file_of(module: str) -> Path | None:
    base = ROOT / Path(*module.split("."))
    candidates = [base.with_suffix(".py"), base / "__init__.py"]
    return next((path for path in candidates if path.is_file()), None)


def files_of_asset(name: str) -> set[Path]:
    """A string that names something in ``pgcore/assets`` stands for its content."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", name):
        return set()
    asset = ASSETS / name
    if asset.is_file():
        return {asset}
    return {path for path in asset.rglob("*") if path.is_file()}
