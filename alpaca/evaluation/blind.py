"""Which answer is better? People say, without knowing whose it is.

    start(pairs, folder, raters, …)     a copy for each rater, sides and order shuffled
    rate(copy)                          in the terminal, a key an instruction
    unblind(folder, model, baseline)    whose answers they liked, and is it a difference?

As Alpaca's authors did it: two models, instructions as users ask them, the better answer of each
pair; they counted 90 wins against 89.

  - Nothing in a copy tells whose an answer is, or which side is which: it holds instructions, the
    two texts as "a" and "b", and digests of the two files. Which side had been whose is found out
    by `unblind`, from the answers themselves: it is given their files again, and refuses any other.
  - Order and sides are drawn for each rater alone: a habit of pressing A favours nobody.
  - A rating is on disk before the next pair is shown. Stop at any time, at any other go on.
  - Keys count for the pair that is on the screen: what was typed ahead is dropped.
  - Pairs of the same text are not shown: they are ties, of all who have rated anything.
  - After `unblind` nobody can rate any more.

Several raters may have rated the same instruction. They are not several observations of which model
is better: statistics are over instructions, each the mean of its raters.

Shown by tests/test_blind.py: test_a_session_stopped_killed_and_finished.
"""

import json
import math
import os
import random
import re
import secrets
import select
import shutil
import sys
import termios
import textwrap
import tty
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from unicodedata import east_asian_width

import numpy as np

from alpaca.common.errors import UserError, escape_control, notice
from alpaca.common.files import (
    append_jsonl,
    atomic_file,
    atomic_folder,
    claim_run_folder,
    read_json,
    read_jsonl,
    read_log,
)
from alpaca.evaluation import win_rate
from alpaca.evaluation.outputs import ANNOTATIONS, Pair, Pairs, annotation, digest, write_json

CHOICES = {"a": "a", "b": "b", "t": "tie", "s": "skip"}
KEYS = "a, b: that one is better   t: tie   s: skip   u: undo   q: stop > "
ITEMS = "items.jsonl"


# ---------------------------------------------------------------- start


def start(pairs: Pairs, folder: Path, raters: list[str], num: int | None, seed: str | None) -> int:
    """Make the raters' copies; how many pairs there are to rate."""
    if odd := [name for name in raters if not re.fullmatch(r"[A-Za-z0-9_-]+", name)]:
        raise UserError(f"--raters {odd[0]!r}: letters, digits, - and _, for it names a folder")
    if len({name.lower() for name in raters}) < len(raters):
        raise UserError("--raters: two have the same name")
    salt = secrets.token_hex() if seed is None else seed
    drawn = random.Random(f"{salt} which").sample(pairs.all, min(num or math.inf, len(pairs.all)))
    shown = [pair for pair in drawn if pair.output_1 != pair.output_2]
    alike = sorted({pair.instruction for pair in drawn} - {pair.instruction for pair in shown})
    if not shown:
        raise UserError("the two models answer everything with the same text: nothing to compare")
    names = [name.lower() for name in (pairs.model, pairs.baseline)]
    texts = [text.lower() for pair in shown for text in (pair.output_1, pair.output_2)]
    if telling := sum(any(name in text for name in names) for text in texts):
        notice(f"{telling} answers hold the name of a model: raters may know it by that")
    with atomic_folder(folder) as partial:
        for rater in raters:
            rng = random.Random(f"{salt} {rater}")
            items = []
            for pair in rng.sample(shown, len(shown)):
                a, b = rng.sample((pair.output_1, pair.output_2), 2)
                items.append({"instruction": pair.instruction, "a": a, "b": b})
            (partial / rater).mkdir()
            settings = {"rater": rater, "alike": alike, "answers": sealed(pairs)}
            write_json(partial / rater / "settings.json", settings)
            with atomic_file(partial / rater / ITEMS, "w") as file:
                file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    return len(shown)


def sealed(pairs: Pairs) -> list[str]:
    """Digests of both sides, in an order that says nothing."""
    sides = [[pairs.baseline, [p[:2] for p in pairs.all]]]
    sides += [[pairs.model, [(p.instruction, p.output_2) for p in pairs.all]]]
    return sorted(digest([name, sorted(side)]) for name, side in sides)


# ---------------------------------------------------------------- rate


class Copy:
    """One rater's: the pairs in their order, and what was said of them."""

    def __init__(self, folder: Path):
        if not (folder / ITEMS).exists():
            raise UserError(f"{folder} is no rater's copy: `blind start` makes them")
        self.folder, self.log = folder, folder / "ratings.jsonl"
        self.settings = read_json(folder / "settings.json")
        if odd := {"rater", "alike", "answers"} - self.settings.keys():
            raise UserError(f"{folder / 'settings.json'}: it has no {min(odd)!r}")
        self.items = list(read_jsonl(folder / ITEMS))
        for number, item in enumerate(self.items, 1):
            if not all(isinstance(item.get(name), str) for name in ("instruction", "a", "b")):
                raise UserError(f"{folder / ITEMS}, line {number}: these are other answers")
        self.choices: dict[int, str] = {}
        for number, line in enumerate(read_log(self.log), 1):
            place, choice = line.get("place"), line.get("choice")
            if place not in range(len(self.items)) or choice not in (*CHOICES.values(), None):
                raise UserError(f"{self.log}, line {number}: no place or no choice of this copy")
            self.take(place, choice)

    def take(self, place: int, choice: str | None) -> None:
        self.choices[place] = choice
        if choice is None:  # taken back
            del self.choices[place]

    def say(self, place: int, choice: str | None) -> None:
        append_jsonl(self.log, {"place": place, "choice": choice})
        self.take(place, choice)

    @property
    def place(self) -> int:
        """The first that nothing was said of."""
        return next(i for i in range(len(self.items) + 1) if i not in self.choices)


def rate(folder: Path) -> None:
    """A session at the terminal, from where the last one stopped."""
    if not sys.stdin.isatty():
        raise UserError("rating is done at a terminal, a key a pair")
    Copy(folder)  # is it one?
    lock = claim_run_folder(folder, {}, "rating")
    try:
        if (folder.absolute().parent / ANNOTATIONS).exists():
            raise UserError(f"{folder} has been unblinded: ratings are closed")
        copy = Copy(folder)  # read when nobody else can write any more
        with single_keys() as fd:
            while (choice := ask(copy, fd)) != "stop":
                copy.say(copy.place - (choice is None), choice)
                print(choice or "undo", flush=True)
    finally:
        os.close(lock)
    left = len(copy.items) - copy.place
    print(f"\n{left} left: the same command goes on" if left else "\nThank you!")


def ask(copy: Copy, fd: int) -> str | None:
    """What is said of the next pair; None takes back what was said of the one before."""
    place, choices = copy.place, CHOICES
    termios.tcflush(fd, termios.TCIFLUSH)
    if place == len(copy.items):
        choices = {}
        print("\nAll are rated.   u: undo the last   q: done > ", end="", flush=True)
    else:
        item = copy.items[place]
        parts = [f"===== {place + 1} of {len(copy.items)} =====", shown(item["instruction"])]
        parts += ["----- A -----", shown(item["a"]), "----- B -----", shown(item["b"]), "-" * 13]
        print("\n" + "\n\n".join(parts), KEYS, sep="\n", end="", flush=True)
    while True:
        pressed = key(fd)
        if pressed in ("q", "\x04", ""):
            return "stop"
        if pressed in choices:
            return choices[pressed]
        if pressed == "u" and place > 0:
            return None


def shown(text: str) -> str:
    """Answers are anybody's text: they may not move the cursor, nor pass for lines of ours. Each
    line on the screen has a mark, and none is left to the terminal to wrap."""
    room, lines = max(4, shutil.get_terminal_size().columns - 2), []
    for line in text.splitlines():
        line = escape_control(line.expandtabs())
        wide = any(east_asian_width(c) in "FW" for c in line)  # two columns each, 写 say
        lines += textwrap.wrap(line, room // (1 + wide), drop_whitespace=False) or [""]
    return "\n".join(f"│ {line}" for line in lines) if text.strip() else "(empty)"


@contextmanager
def single_keys() -> Iterator[int]:
    """Keys without Enter, and as the terminal was afterwards."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def key(fd: int) -> str:
    """One key, small; "" at the end of input. What an arrow key sends (Esc [ A) is none of ours."""
    pressed = os.read(fd, 1)
    if pressed == b"\x1b" and waiting(fd) and os.read(fd, 1) in (b"[", b"O"):
        while waiting(fd) and (more := os.read(fd, 1)) and not b"@" <= more <= b"~":
            pass
    return pressed.decode("latin-1").lower()


def waiting(fd: int) -> bool:
    """Is there more at once? A person is slower."""
    return bool(select.select([fd], [], [], 0.05)[0])


# ---------------------------------------------------------------- unblind


class Report(NamedTuple):
    votes: Counter  # "model", "baseline", "tie", "skip", "left", of all raters
    rows: list[dict]  # of win_rate.py: each rater's, and of all together
    agreement: win_rate.Agreement


def unblind(folder: Path, pairs: Pairs, early: bool = False) -> Report:
    """Count, and write annotations.json: from then on nobody can rate, nor can meanwhile."""
    there = [path.parent for path in sorted(folder.glob(f"*/{ITEMS}"))]
    if not there:
        raise UserError(f"{folder} holds no rater's copy: `blind start` makes them")
    with ExitStack() as locks:
        for copy in there:
            locks.callback(os.close, claim_run_folder(copy, {}, "rating"))
        return counted(folder, [Copy(copy) for copy in there], pairs, early)


def counted(folder: Path, copies: list[Copy], pairs: Pairs, early: bool) -> Report:
    raters = {copy.settings["rater"]: copy.folder for copy in copies}
    if odd := [copy.folder for copy in copies if copy.folder not in raters.values()]:
        raise UserError(f"{odd[0]} is a copy of the copy of another rater: remove it")
    by_text = {pair.instruction: pair for pair in pairs.all}
    for copy in copies:
        if copy.settings["answers"] != sealed(pairs):
            raise UserError(
                f"{copy.folder} compares other answers: name the two files that it was begun with, "
                "as they were then"
            )
        left = len(copy.items) - copy.place
        if left and not early:
            raise UserError(
                f"{copy.folder}: {left} of {len(copy.items)} are left to rate, and nobody can once "
                "the names are known: finish, or --early counts what there is"
            )
    alike = dict.fromkeys(copies[0].settings["alike"], "tie")
    votes = {copy.settings["rater"]: liked(copy, by_text) for copy in copies}
    kept = {r: {q: c for q, c in s.items() if c in WORTH} for r, s in votes.items()}
    if not any(kept.values()):
        raise UserError(f"{folder}: nobody has preferred anything yet")
    for rater, said in kept.items():
        if said:  # who has rated nothing has not found anything alike either
            votes[rater] |= alike
    rows = win_rate.rows(list(comparisons(folder, pairs, votes)))
    entries = [e for rater, said in votes.items() for e in annotations(pairs, said, rater)]
    write_json(folder / ANNOTATIONS, entries)
    count = Counter(choice for said in votes.values() for choice in said.values())
    return Report(count, rows, win_rate.agreement(kept.values()))


WORTH = {"model": 1.0, "baseline": 0.0, "tie": 0.5}


def liked(copy: Copy, by_text: dict[str, Pair]) -> dict[str, str]:
    """Instruction → "model", "baseline", "tie", "skip" or "left". The texts tell whose each was."""
    found = {}
    for place, item in enumerate(copy.items):
        pair = by_text.get(item["instruction"])
        if pair is None or {item["a"], item["b"]} != {pair.output_1, pair.output_2}:
            raise UserError(f"{copy.folder / ITEMS}, line {place + 1}: these are other answers")
        choice = copy.choices.get(place, "left")
        if choice in ("a", "b"):
            choice = "model" if item[choice] == pair.output_2 else "baseline"
        found[item["instruction"]] = choice
    return found


def comparisons(folder: Path, pairs: Pairs, votes: dict) -> Iterator[win_rate.Comparison]:
    """Of each rater who has preferred anything, and the mean of all, over what anybody has."""
    asked = [p for p in pairs.all if any(v.get(p.instruction) in WORTH for v in votes.values())]
    lengths = np.array([[len(p.output_1), len(p.output_2)] for p in asked], float).T
    texts = [pair.instruction for pair in asked]
    each = np.array(  # (raters, N)
        [[WORTH.get(said.get(text), np.nan) for text in texts] for said in votes.values()]
    )
    names, flips = (pairs.model, pairs.baseline), np.full(len(texts), np.nan)
    if len(votes) > 1:
        mean = np.nanmean(each, 0)
        yield win_rate.Comparison(folder, *names, "all raters", texts, mean, lengths, flips)
    for rater, won in zip(votes, each, strict=True):
        if not np.isnan(won).all():
            yield win_rate.Comparison(folder, *names, rater, texts, won, lengths, flips)


def annotations(pairs: Pairs, said: dict[str, str], rater: str) -> Iterator[dict]:
    """As AlpacaEval's: a skipped pair has no preference."""
    for pair in pairs.all:
        if pair.instruction not in said:
            continue
        worth = WORTH.get(said[pair.instruction])
        yield annotation(pairs, pair, rater, None if worth is None else 1 + worth)
