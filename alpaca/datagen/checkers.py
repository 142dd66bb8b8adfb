"""Rewards that need no model: does an answer agree with the reference in its record's `output`?

    check = load_checker("number")
    check({"instruction": "Add 70 and 2.", "input": "", "output": "… #### 72"}, "It is 72.")  # 1.0

    exact          the same text; any run of spaces and newlines counts as one space, case matters
    number         the same number after GSM8K's ####, or else the last one: 1,234.50 is 1234.5
    regex          the reference is a regular expression that matches somewhere in the answer
    FILE.py:NAME   a function of your own: NAME(record, answer) returns the reward, any number

A file of functions is run as any Python file is. Patterns come from the data and may take forever
(`(a+)+$`): use `regex` only with data that you trust.
"""

import math
import re
import runpy
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal, InvalidOperation

from alpaca.common.errors import UserError, describe_error
from alpaca.datagen.preferences import last_answer

Checker = Callable[[dict, str], float]  # (normalized record, answer) → reward
STATED = re.compile(r"#### (-?[\d.,]+)", re.ASCII)
NUMERAL = re.compile(
    r"(?<![\d.])[-−]?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)", re.ASCII
)


def check_exact(record: dict, answer: str) -> float:
    return float(answer.split() == last_answer(record).split())


def last_number(text: str) -> Decimal | None:
    found = NUMERAL.findall(text)
    return Decimal(re.sub("[$,]", "", found[-1]).replace("−", "-")) if found else None


def stated_number(text: str) -> Decimal | None:
    """The number that a solution in GSM8K's form ends with, or else the last one in the text."""
    if found := STATED.search(text):
        with suppress(InvalidOperation):  # "1.2.3"
            return Decimal(found[1].replace(",", ""))
    return last_number(text)


def check_number(record: dict, answer: str) -> float:
    if (expected := stated_number(last_answer(record))) is None:
        raise UserError(f"no number in the reference {last_answer(record)[:40]!r}: use exact")
    return float(stated_number(answer) == expected)


def check_regex(record: dict, answer: str) -> float:
    try:
        return float(re.search(last_answer(record), answer) is not None)
    except re.error as error:
        pattern = last_answer(record)[:40]
        raise UserError(f"the reference {pattern!r} is no regular expression: {error}") from None


CHECKERS: dict[str, Checker] = {"exact": check_exact, "number": check_number, "regex": check_regex}


def load_checker(spec: str) -> Checker:
    """The checker that a command line names."""
    file, colon, name = spec.rpartition(":")
    if not colon and spec in CHECKERS:
        return CHECKERS[spec]
    if not file.endswith(".py"):
        raise UserError(f"checker {spec!r}: one of {', '.join(CHECKERS)} or FILE.py:NAME expected")
    if not callable(function := runpy.run_path(file).get(name)):
        raise UserError(f"checker {spec!r}: {file} defines no function {name}")

    def check(record: dict, answer: str) -> float:
        try:
            reward = function(record, answer)
        except Exception as error:  # a user's code may raise anything
            what = f"{type(error).__name__}: {describe_error(error)}"
            raise UserError(f"checker {spec!r} raised {what} (given: record, answer)") from error
        if not isinstance(reward, int | float) or not math.isfinite(reward):
            raise UserError(f"checker {spec!r} returned {reward!r}: a finite number was expected")
        return float(reward)

    return check
