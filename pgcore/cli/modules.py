"""``pgcore modules``: what the chapters have built so far."""

import argparse
import ast
from pathlib import Path

SUMMARY = "list what the chapters have built so far"
PACKAGE = Path(__file__).resolve().parents[1]
GENERATED = "# Generated from chapters/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(options: argparse.Namespace) -> int:
    """Print a line for each generated module: its chapter, name and first sentence."""
    rows = []
    for path in PACKAGE.glob("*.py"):
        source = path.read_text(encoding="utf8")
        if source.startswith(GENERATED):
            number = source.removeprefix(GENERATED)[:2]
            summary = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
            rows.append((number, f"pgcore.{path.stem}", summary))
    for number, module, summary in sorted(rows):
        print(f"{number}  {module:<22} {summary}")
    return 0
