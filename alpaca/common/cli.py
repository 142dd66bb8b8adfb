"""Command lines: argparse with a module's docstring as help, and errors on one line."""

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from alpaca.common.errors import is_rank_0, notice


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line; an unknown flag is answered with the closest known."""

    def __init__(self, *args, **options):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(*args, formatter_class=raw, allow_abbrev=False, **options)

    def error(self, message: str):
        notice(f"error: {message} (see --help)")
        self.exit(2)

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        args = sys.argv[1:] if args is None else list(args)
        known = set(self.flags())
        for flag in (word.partition("=")[0] for word in args):  # before argparse misses others
            if re.fullmatch(r"--[a-z][\w-]*", flag) and flag not in known:
                similar = difflib.get_close_matches(flag, known - {"--help"}, n=1, cutoff=0.75)
                hint = f": did you mean {similar[0]}?" if similar else ""
                self.error(f"unrecognized argument {flag}{hint}")
        return super().parse_args(args, namespace)

    def flags(self) -> Iterator[str]:
        """Every flag of this parser and of its subcommands."""
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser.flags()

    def print_help(self, file: IO[str] | None = None) -> None:
        if is_rank_0():
            super().print_help(file)


def utf8_text(word: str) -> str:
    """For `type=` of a flag: a text that can be written and sent."""
    word.encode()  # an argument that is not UTF-8 has half surrogate pairs in its place
    return word


def positive(number_type: type, most: float = math.inf) -> Callable[[str], Any]:
    """For `type=` of a flag: an int or a float above 0, and at most `most`."""

    def number(text: str) -> Any:
        if not 0 < number_type(text) < math.inf:
            raise ValueError
        if number_type(text) > most:
            raise argparse.ArgumentTypeError(f"{text} is more than {most:,}")
        return number_type(text)

    number.__name__ = f"{number_type.__name__} above 0"  # argparse: invalid int above 0 value: '-3'
    return number


def bounded(number_type: type, low: float, high: float, name: str) -> Callable[[str], Any]:
    """For `type=` of a flag: a number from `low` to `high`."""

    def number(text: str) -> Any:
        if not low <= number_type(text) <= high:  # NaN neither
            raise ValueError
        return number_type(text)

    number.__name__ = name  # argparse: invalid int from 0 to 9 value: 'x'
    return number


not_negative = bounded(int, 0, 2**63 - 1, f"int from 0 to {2**63 - 1:,}")
finite = bounded(float, -sys.float_info.max, sys.float_info.max, "number")
share = bounded(float, 0, 1, "number from 0 to 1")
utf8_text.__name__ = "UTF-8 text"
