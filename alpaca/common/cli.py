"""Command lines: argparse with a module's docstring as help and errors on one line."""

import argparse
import math
import os
from collections.abc import Callable
from typing import IO, Any

from alpaca.common.errors import notice


class Parser(argparse.ArgumentParser):
    """argparse with the module's docstring as help and one line for a mistake."""

    def __init__(self, description: str | None = None, **how):
        how.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        if description:  # which test shows it is for readers of the code
            description = description.partition("\n\nShown by ")[0]
        super().__init__(description=description, **how)

    def error(self, message: str):
        notice(f"error: {message} (--help tells more)")
        self.exit(2)

    def print_help(self, file: IO[str] | None = None) -> None:
        if os.environ.get("RANK", "0") == "0":  # under torchrun once, not by every rank
            super().print_help(file)


def run_verb(args: argparse.Namespace) -> None:
    """The command of a verb, which may leave what it got from `claim` in `args.lock`."""
    try:
        args.command(args)
    finally:
        if getattr(args, "lock", None) is not None:
            os.close(args.lock)


def positive(kind: type) -> Callable[[str], Any]:
    """For `type=` of a flag: an int or a float above 0."""

    def number(text: str) -> Any:
        if not 0 < kind(text) < math.inf:
            raise ValueError
        return kind(text)

    number.__name__ = f"{kind.__name__} above 0"  # argparse: invalid int above 0 value: '-3'
    return number
