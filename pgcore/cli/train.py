"""``pgcore train``: run a recipe."""

import argparse
import ast
import importlib
import os
import sys
from pathlib import Path

SUMMARY = "run a recipe, from where it was stopped: pgcore train tiny --out runs/tiny"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say which; its own options follow its name."""
    add = parser.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="without one: list them")
    add("options", nargs=argparse.REMAINDER, help="of the recipe: see RECIPE --help")


def run(options: argparse.Namespace) -> int:
    """Hand over to the recipe's own command line."""
    known = recipes()
    if options.recipe is None:
        for name, summary in known.items():
            print(f"{name:<16}{summary}")
        return 0
    if options.recipe not in known:
        raise ValueError(
            f"recipe: expected one of {', '.join(known)}, found {options.recipe}"
        )
    # Before torch is there: threads that spin while they wait starve each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    recipe = importlib.import_module(f"pgcore.recipes.{options.recipe}")
    sys.argv[0] = f"pgcore train {options.recipe}"  # the usage line says this
    recipe.main(options.options)
    return 0


def recipes() -> dict[str, str]:
    """The recipes and what each makes, from their first lines; none is imported."""
    folder = Path(__file__).parents[1] / "recipes"
    found = {}
    for path in sorted(folder.glob("[a-z]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf8"))) or ""
        found[path.stem] = text.partition("\n")[0]
    return found
