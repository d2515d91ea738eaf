"""The command line: ``pgcore`` or ``python -m pgcore``. One file a command.

Exit codes: 0 if all went well, 2 for bad input, 1 if the machine gave up (memory, a
full disk), 130 after Ctrl-C. Results go to standard output, all else to standard error.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from pgcore import __version__
from pgcore.cli import ask, demo, info, modules, train

COMMANDS = {
    "demo": demo,
    "ask": ask,
    "info": info,
    "train": train,
    "modules": modules,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        code = COMMANDS[options.command].run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("\npgcore: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in "pgcore ask ... | head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, FileNotFoundError) as error:
        print(f"pgcore: {error}", file=sys.stderr)
        return 2
    except (MemoryError, OSError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"pgcore: the machine gave up: {reason}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pgcore", description="PaliGemma, built chapter by chapter."
    )
    parser.add_argument("--version", action="version", version=f"pgcore {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        summary = command.SUMMARY
        own = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.add_arguments(own)
    return parser
