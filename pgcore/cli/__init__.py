"""The command line: ``pgcore`` or ``python -m pgcore``. One file a command."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from pgcore import __version__

COMMANDS = {"modules": "list what the chapters have built so far"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 if all went well, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="pgcore", description="PaliGemma, built chapter by chapter."
    )
    parser.add_argument("--version", action="version", version=f"pgcore {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, description=summary)
    options = parser.parse_args(arguments)
    try:
        import_module(f"pgcore.cli.{options.command}").run(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"pgcore: {error}", file=sys.stderr)
        return 2
    return 0
