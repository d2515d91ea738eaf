"""Write the modules of pgcore from the marked cells of the chapters.

    python tools/export.py            writes what is out of date
    python tools/export.py --check    fails if a module differs from its notebook

``#| export`` cells become ``pgcore/<module>.py``, ``#| wrong`` cells
``pgcore/lab/museum/<module>.py``, ``#| reference`` cells
``tests/reference/<module>.py``. A chapter that would fill more than one module names
the others as ``parts`` in its metadata: ``#| export part`` cells go there.
"""

import argparse
import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from chapter import ROOT, Chapter, all_chapters

DESTINATIONS = {
    "export": "pgcore/{}.py",
    "wrong": "pgcore/lab/museum/{}.py",
    "reference": "tests/reference/{}.py",
}
WRITTEN_BY_HAND = ("lab", "recipes", "api", "cli", "assets", "big_vision")
# Plumbing, by hand as well, that chapters may import from this one on.
PLUMBING = {
    "files": "00",
    "hub_settings": "11",
    "shards": "13",
    "hub_config": "13",
    "drawing": "15",
    "matmul_attention": "16",
    "runs": "16",
}
HEADER = '# Generated from {}.\n# Edit the notebook, then run "make chapters".\n'


def main() -> int:
    parser = argparse.ArgumentParser(description="Write pgcore from the chapters.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    try:
        files = {
            path: text
            for chapter in all_chapters()
            for path, text in modules_of(chapter).items()
        }
    except ValueError as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    stale = [
        path
        for path, text in files.items()
        if not path.exists() or path.read_text(encoding="utf8") != text
    ]
    orphans = [path for path in generated_files() if path not in files]
    verb = "out of date" if options.check else "updated"
    for path in stale + orphans:
        print(f"{verb}: {path.relative_to(ROOT)}")
    if options.check:
        return 1 if stale or orphans else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[path], encoding="utf8")
    for path in orphans:
        path.unlink()
    return 0


def generated_files() -> list[Path]:
    """Every file that says it was generated from a chapter."""
    folders = [ROOT / Path(pattern).parent for pattern in DESTINATIONS.values()]
    mark = HEADER.split("{")[0]
    files = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    return [path for path in files if path.read_text(encoding="utf8").startswith(mark)]


def modules_of(chapter: Chapter) -> dict[Path, str]:
    """The files that a chapter generates, and their text.

    Raises ValueError, naming the chapter, for a cell that cannot stand alone.
    """
    cells = {kind: chapter.code_of(kind) for kind in DESTINATIONS}
    if not any(cells.values()):
        return {}
    check_module_name(chapter)
    exported = {
        module: "\n\n\n".join(chapter.code_of("export", module))
        for module in [*chapter.parts, chapter.module]
    }
    files = {}
    for kind, pattern in DESTINATIONS.items():
        for module, source in exported.items() if kind == "export" else ():
            if source:
                path = ROOT / pattern.format(module)
                files[path] = finished(source, kind, path, chapter)
        if kind != "export" and cells[kind]:
            source = "\n\n\n".join(cells[kind])
            source = imports_for(source, exported) + "\n" + source
            path = ROOT / pattern.format(chapter.module)
            files[path] = finished(source, kind, path, chapter)
    return files


def check_module_name(chapter: Chapter) -> None:
    """What a chapter with marked cells builds is new, and its own."""
    if chapter.module is None:
        raise ValueError(
            f"{chapter.relative_path}: it has marked cells, but its metadata names no "
            'module ({"pgcore": {"module": "..."}})'
        )
    for module in [chapter.module, *chapter.parts]:
        taken = module in WRITTEN_BY_HAND or module in PLUMBING
        if not module.isidentifier() or module[0] == "_" or taken:
            raise ValueError(
                f"{chapter.relative_path}: {module!r} cannot be the name of its module"
            )
        others = [
            c
            for c in all_chapters(chapter.path.parent)
            for name in [c.module, *c.parts]
            if name == module
        ]
        if len(others) > 1:
            raise ValueError(
                f"{chapter.relative_path}: the module {module!r} is named by "
                + " and ".join(c.relative_path for c in others)
            )


def finished(source: str, kind: str, path: Path, chapter: Chapter) -> str:
    """The text of a generated module: header, docstrings, imports on top, formatted."""
    where = f"{chapter.relative_path} ({kind})"
    source = without_solution_marks(source)
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"{where}: line {error.lineno}: {error.msg}") from None
    if kind == "export":
        check_imports(tree, chapter)
        source = with_back_references(source, tree, chapter)
    source = with_imports_on_top(source)
    if kind == "export":
        source += f"\n\n__all__ = {public_names(tree)!r}\n"
    elif ast.get_docstring(tree) is None:
        what = {"wrong": "Wrong twins", "reference": "Slow, obvious versions"}[kind]
        source = (
            f'"""{what} from chapter {chapter.number}, {chapter.title}."""\n' + source
        )
    return formatted(HEADER.format(chapter.relative_path) + source, path, where)


def without_solution_marks(source: str) -> str:
    lines = source.splitlines()
    marks = ("### BEGIN SOLUTION", "### END SOLUTION")
    return "\n".join(line for line in lines if line.strip() not in marks)


def check_imports(tree: ast.Module, chapter: Chapter) -> None:
    """An exported cell may import earlier chapters only."""
    number_of = {
        c.module: c.number for c in all_chapters(chapter.path.parent) if c.module
    }
    for other in all_chapters(chapter.path.parent):
        own = other.number == chapter.number  # its parts come first
        number_of |= dict.fromkeys(other.parts, "00" if own else other.number)
    for module, first in PLUMBING.items():
        if chapter.number >= first:
            number_of[module] = "00"
    for name in imported_modules(tree):
        if name.startswith(".") or name.split(".")[0] in ("tests", "importlib"):
            raise ValueError(
                f"{chapter.relative_path}: an exported cell imports {name}; "
                "name earlier chapters in full, as in 'from pgcore.numerics import'"
            )
        if name.split(".")[0] != "pgcore":
            continue
        module = name.removeprefix("pgcore").removeprefix(".").split(".")[0]
        if module in WRITTEN_BY_HAND or module not in number_of:
            raise ValueError(
                f"{chapter.relative_path}: an exported cell imports {name}; "
                "it may import only modules that earlier chapters build"
            )
        if number_of[module] >= chapter.number:
            raise ValueError(
                f"{chapter.relative_path}: an exported cell imports {name}, which "
                f"chapter {number_of[module]} builds; it may import earlier ones only"
            )


def imported_modules(tree: ast.AST) -> list[str]:
    """Every module named by an import statement anywhere in the tree."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append("." * node.level + (node.module or ""))
    return names


def imports_for(source: str, exported: Mapping[str, str]) -> str:
    """The imports that a wrong or reference cell needs to run alone.

    It sees what the notebook has at that point: the imports of the exported cells and
    the names that they define. What it does not use, ruff removes.
    exported: the cells of each module.
    """
    trees = {
        module: ast.parse(without_solution_marks(cells))
        for module, cells in exported.items()
    }
    lines = [
        ast.unparse(node)
        for tree in trees.values()
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    here = set(defined_names(ast.parse(without_solution_marks(source))))
    for module, tree in trees.items():
        if names := [name for name in defined_names(tree) if name not in here]:
            lines.append(f"from pgcore.{module} import {', '.join(names)}")
    return "\n".join(lines)


def defined_names(tree: ast.Module) -> list[str]:
    """Functions, classes and constants that a module defines at its top level."""
    names = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [t.id for t in node.targets if isinstance(t, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return names


def public_names(tree: ast.Module) -> list[str]:
    return sorted(name for name in defined_names(tree) if not name.startswith("_"))


def with_back_references(source: str, tree: ast.Module, chapter: Chapter) -> str:
    """End each public docstring with the chapter that derives it."""
    lines = source.splitlines()
    note = f"Built in chapter {chapter.number}, {chapter.title}."
    if ast.get_docstring(tree) is None:
        raise ValueError(
            f"{chapter.relative_path}: the first exported cell has no docstring for "
            "the module"
        )
    for node in reversed(tree.body):
        if isinstance(node, ast.AsyncFunctionDef):
            raise ValueError(f"{chapter.relative_path}: async def {node.name}")
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name[0] == "_":
            continue
        if ast.get_docstring(node) is None:
            raise ValueError(f"{chapter.relative_path}: {node.name} has no docstring")
        docstring = node.body[0]
        assert docstring.end_lineno and docstring.end_col_offset
        indent = " " * docstring.col_offset
        last = docstring.end_lineno - 1
        # Columns count bytes: "σ" is one character and two of them.
        end = len(lines[last].encode()[: docstring.end_col_offset].decode())
        text, rest = lines[last][: end - 3].rstrip(), lines[last][end - 3 :]
        if not rest.startswith('"""'):
            raise ValueError(
                f"{chapter.relative_path}: the docstring of {node.name} must stand "
                'between """'
            )
        closing = ["", indent + note, indent + rest]
        lines[last : last + 1] = [text, *closing] if text else closing
    return "\n".join(lines)


def with_imports_on_top(source: str) -> str:
    """Move the top-level imports of later cells below the module's docstring."""
    tree, lines = ast.parse(source), source.splitlines()
    imports = []
    for node in reversed(tree.body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.insert(0, "\n".join(lines[node.lineno - 1 : node.end_lineno]))
            del lines[node.lineno - 1 : node.end_lineno]
    has_docstring = ast.get_docstring(tree) is not None
    top = tree.body[0].end_lineno if has_docstring else 0
    return "\n".join([*lines[:top], "", *imports, "", *lines[top:]])


def formatted(source: str, path: Path, where: str) -> str:
    """Sort imports, drop unused ones, format, and refuse undefined names."""
    ruff = [sys.executable, "-m", "ruff"]
    name = ["--stdin-filename", str(path), "-"]
    for command in (
        [*ruff, "check", "--quiet", "--fix-only", "--select", "I,F401", *name],
        [*ruff, "format", "--quiet", *name],
        [*ruff, "check", "--quiet", "--output-format", "concise", *name],
    ):
        result = subprocess.run(command, input=source, capture_output=True, text=True)
        if result.returncode != 0:
            reason = (result.stdout or result.stderr).strip().splitlines()[0]
            raise ValueError(f"{where}: {reason}")
        if "--output-format" not in command:
            source = result.stdout
    return source


if __name__ == "__main__":
    sys.exit(main())
