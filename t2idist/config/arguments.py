"""The argument parser that all subcommands of ``t2idist`` share."""

from __future__ import annotations

import argparse
import functools

_WIDTH = 110
_OPTION_COLUMNS = 34


def command_parser(name: str, description: str, example: str) -> argparse.ArgumentParser:
    """Build the parser of ``t2idist <name>``; its help text ends with one example."""
    return argparse.ArgumentParser(
        prog=f"t2idist {name}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, width=_WIDTH, max_help_position=_OPTION_COLUMNS
        ),
    )
