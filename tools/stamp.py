"""The stamp of a chapter: a hash over everything of ours that its outputs depend on."""

import ast
import hashlib
import re
from pathlib import Path

from chapter import ROOT, Chapter
from export import imported_modules

ASSETS = ROOT / "pgcore" / "assets"


def stamp(chapter: Chapter) -> str:
    """A hash over the chapter's code and everything of ours that it runs."""
    digest = hashlib.sha256()
    sources = [c.source for c in chapter.notebook.cells if c.cell_type == "code"]
    for source in sources:
        digest.update(source.encode())
    plain = "\n".join(without_magics(source) for source in sources)
    for path in files_behind(plain):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def without_magics(source: str) -> str:
    """The cell as plain Python; ``%load_ext`` becomes an import."""
    source = re.sub(r"^(\s*)%load_ext (\S+)$", r"\1import \2", source, flags=re.M)
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M)


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
            chapter = str(getattr(node.args[0], "value", "")).split(".")[0]
            names.append(f"pgcore.lab.checks.chapter_{chapter}")
    return names


def file_of(module: str) -> Path | None:
    base = ROOT / Path(*module.split("."))
    candidates = [base.with_suffix(".py"), base / "__init__.py"]
    return next((path for path in candidates if path.is_file()), None)


def files_of_asset(name: str) -> set[Path]:
    """A string that names something in ``pgcore/assets`` stands for its content."""
    if not re.fullmatch(r"[\w.-]+", name) or not (ASSETS / name).exists():
        return set()
    asset = ASSETS / name
    return {asset} if asset.is_file() else {p for p in asset.rglob("*") if p.is_file()}
