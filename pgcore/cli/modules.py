"""``pgcore modules``: what the chapters have built so far."""

import argparse
import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def run(options: argparse.Namespace) -> None:
    """Print a line for each generated module: its chapter, name and first sentence."""
    rows = []
    for path in PACKAGE.glob("*.py"):
        source = path.read_text(encoding="utf8")
        header = source.splitlines()[0]
        if header.startswith("# Generated from chapters/"):
            number = header.removeprefix("# Generated from chapters/")[:2]
            summary = (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
            rows.append((number, f"pgcore.{path.stem}", summary))
    for number, module, summary in sorted(rows):
        print(f"{number}  {module:<22} {summary}")
