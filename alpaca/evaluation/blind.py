"""Which of two models gives better answers? People compare, without knowing whose answer is whose.

    alpaca blind start runs/eval/tiny runs/eval/base --out runs/blind --raters ann ben
    alpaca blind rate runs/blind/ann                                 # each rater, at any time
    alpaca blind unblind runs/blind runs/eval/tiny runs/eval/base    # whose answers were better?

This is how Alpaca's authors evaluated it, on Self-Instruct's user-oriented instructions
(arXiv:2212.10560): 90 wins against 89 for text-davinci-003.

A rater's folder holds instructions, two answers "a" and "b" to each, and digests of the two files,
but no model's name, nor which side is whose. Order and sides are shuffled for each rater. `unblind`
finds out whose each side was: it needs the same two files again, and ends the rating. Each rating
is on disk before the next pair is shown, so a rater can stop at any time. Pairs of identical
answers are not shown; they count as ties.

Ratings of one instruction by several raters are not independent observations of the models: the
statistics are over instructions, each with the mean of its raters.
"""

import argparse
import math
import random
import re
import secrets
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from alpaca.common.cli import positive
from alpaca.common.errors import UserError, escape_control, notice
from alpaca.common.files import atomic_folder
from alpaca.common.json_files import append_jsonl, read_json, read_log
from alpaca.common.run_folder import run_folder
from alpaca.evaluation.annotations import ANNOTATIONS, Comparison, make_annotation
from alpaca.evaluation.outputs import Pairs, add_pair_arguments, digest, pair_outputs, save_json
from alpaca.evaluation.score import format_table
from alpaca.evaluation.win_rate import agreement, comparison_rows

CHOICES = {"a": "a", "b": "b", "t": "tie", "s": "skip"}
MENU = "a, b: that answer is better   t: tie   s: skip   u: undo   q: stop > "
SCORES = {"model": 1.0, "baseline": 0.0, "tie": 0.5}
ITEMS = "items.jsonl"


# ---------------------------------------------------------------- start


def run_start(args: argparse.Namespace) -> None:
    """Write a folder for each rater, with order and sides shuffled by a secret seed."""
    pairs = pair_outputs(args.model, args.baseline, args.common)
    if bad := [name for name in args.raters if not re.fullmatch(r"[A-Za-z0-9_-]+", name)]:
        raise UserError(f"--raters {bad[0]!r}: a name of letters, digits, - and _ was expected")
    if len({name.lower() for name in args.raters}) < len(args.raters):
        raise UserError("--raters: two have the same name")
    seed = secrets.token_hex() if args.seed is None else args.seed
    count = min(args.num or len(pairs.all), len(pairs.all))
    chosen = random.Random(f"{seed} which").sample(pairs.all, count)
    shown = [pair for pair in chosen if pair.output_1 != pair.output_2]
    identical = sorted({pair.instruction for pair in chosen} - {pair.instruction for pair in shown})
    if not shown:
        raise UserError("the two models give identical answers: there is nothing to compare")
    names = [name.lower() for name in (pairs.model, pairs.baseline)]
    texts = [text.lower() for pair in shown for text in (pair.output_1, pair.output_2)]
    if revealing := sum(any(name in text for name in names) for text in texts):
        notice(f"{revealing} answers contain the name of a model, which raters may recognize")
    with atomic_folder(args.out) as partial:
        for rater in args.raters:
            rng = random.Random(f"{seed} {rater}")
            items = []
            for pair in rng.sample(shown, len(shown)):
                a, b = rng.sample((pair.output_1, pair.output_2), 2)
                items.append({"instruction": pair.instruction, "a": a, "b": b})
            (partial / rater).mkdir()
            append_jsonl(partial / rater / ITEMS, *items)
            settings = {"rater": rater, "alike": identical, "answers": digest_sides(pairs)}
            save_json(partial / rater / "settings.json", settings)
    print(f"{len(shown)} pairs to rate. Each rater runs, at any time and as often as needed:")
    for rater in args.raters:
        print(f"  alpaca blind rate {args.out / rater}")
    print(f"Then, with the same two files: alpaca blind unblind {args.out} MODEL BASELINE")


def digest_sides(pairs: Pairs) -> list[str]:
    """Digests of both models' answers, sorted: their order must not show which is the model's."""
    sides = [[pairs.baseline, sorted((pair.instruction, pair.output_1) for pair in pairs.all)]]
    sides += [[pairs.model, sorted((pair.instruction, pair.output_2) for pair in pairs.all)]]
    return sorted(map(digest, sides))


# ---------------------------------------------------------------- rate


class RaterCopy:
    """A rater's folder: the pairs in the rater's order, and the choices made so far."""

    def __init__(self, folder: Path):
        if not (folder / ITEMS).exists():
            raise UserError(f"{folder} is not a rater's folder: `alpaca blind start` makes them")
        self.folder, self.log = folder, folder / "ratings.jsonl"
        shape = {"rater": str, "answers": [str], "alike": [str]}
        self.settings = read_json(folder / "settings.json", shape)
        self.items = list(read_log(folder / ITEMS, {"instruction": str, "a": str, "b": str}))
        self.choices: list[str] = []
        for number, line in enumerate(read_log(self.log, {"place": int}), 1):
            if not self.apply(line["place"], line.get("choice")):
                raise UserError(f"{self.log}, line {number}: not a rating of this copy")

    @property
    def left(self) -> int:
        return len(self.items) - len(self.choices)

    def apply(self, place: int | None, choice: str | None) -> bool:
        """Rate the next pair, or take the last rating back (None). False if it does not fit."""
        if choice is None and place == len(self.choices) - 1 >= 0:
            self.choices.pop()
        elif choice and choice in CHOICES.values() and place == len(self.choices) < len(self.items):
            self.choices.append(choice)
        else:
            return False
        return True

    def rate(self, choice: str | None) -> None:
        place = len(self.choices) - (choice is None)
        append_jsonl(self.log, {"place": place, "choice": choice})
        self.apply(place, choice)


def run_rate(args: argparse.Namespace) -> None:
    """Ask for one choice per line, from where the last session stopped to the end."""
    RaterCopy(args.copy)  # refuse another folder before locking it
    with run_folder(args.copy, {}, "rating"):
        if (args.copy.absolute().parent / ANNOTATIONS).exists():
            raise UserError(f"{args.copy} has been unblinded: ratings are closed")
        copy = RaterCopy(args.copy)  # read again, now that nobody else can write
        while (answer := ask(copy)) != "q":
            copy.rate(None if answer == "u" else CHOICES[answer])
    print(f"{copy.left} left: run the same command to resume" if copy.left else "Thank you!")


def ask(copy: RaterCopy) -> str:
    """Show the next pair and read an answer: a key of CHOICES, u or q."""
    valid, menu = {"q"}, "All pairs are rated.   u: undo   q: done > "
    if copy.left:
        valid, menu = {*CHOICES, "q"}, MENU
        item = copy.items[len(copy.choices)]
        print(f"\n===== {len(copy.choices) + 1} of {len(copy.items)} =====\n")
        print(quote(item["instruction"]))
        print(f"\n----- A -----\n\n{quote(item['a'])}\n\n----- B -----\n\n{quote(item['b'])}\n")
    if copy.choices:
        valid.add("u")
    while True:
        try:
            answer = input(menu).strip().lower()
        except EOFError:
            return "q"
        if answer in valid:
            return answer


def quote(text: str) -> str:
    """Every line marked and its control characters escaped, so that no answer can imitate our own
    lines or move the cursor."""
    lines = [escape_control(line.expandtabs()) for line in text.splitlines()]
    return "\n".join(f"│ {line}" for line in lines) if text.strip() else "(empty)"


# ---------------------------------------------------------------- unblind


def run_unblind(args: argparse.Namespace) -> None:
    """Count the votes and write annotations.json, after which (and during which) nobody rates."""
    pairs = pair_outputs(args.model, args.baseline, args.common)
    folders = [path.parent for path in sorted(args.folder.glob(f"*/{ITEMS}"))]
    if not folders:
        raise UserError(f"{args.folder} has no rater's folders: `alpaca blind start` makes them")
    with ExitStack() as locks:
        for folder in folders:
            locks.enter_context(run_folder(folder, {}, "rating"))
        copies = [RaterCopy(folder) for folder in folders]
        check_copies(copies, pairs, args.early)
        votes = {copy.settings["rater"]: find_votes(copy, pairs) for copy in copies}
        rated = {
            rater: {text: SCORES[vote] for text, vote in by_text.items() if vote in SCORES}
            for rater, by_text in votes.items()
        }
        if not any(rated.values()):
            raise UserError(f"{args.folder}: nobody has preferred anything yet")
        # Identical answers are ties, except for a rater who has rated nothing.
        ties = dict.fromkeys(copies[0].settings["alike"], 0.5)
        scores = {rater: by_text | ties for rater, by_text in rated.items() if by_text}
        rows = comparison_rows(make_comparisons(args.folder, pairs, scores))
        save_json(args.folder / ANNOTATIONS, make_annotations(pairs, votes, scores))
    count = Counter(vote for by_text in votes.values() for vote in by_text.values())
    print(
        f"{pairs.model} {count['model']} vs {count['baseline']} {pairs.baseline}: votes; "
        f"{count['tie'] + len(ties) * len(scores)} ties, {count['skip']} skipped, "
        f"{count['left']} not rated"
    )
    print(format_table(rows))
    percent, items = agreement(rated.values())
    if items:
        print(f"raters agree in {percent:.1f} % of pairs ({items} instructions)")
    print(f"{args.folder / ANNOTATIONS}; ratings are closed")


def check_copies(copies: list[RaterCopy], pairs: Pairs, early: bool) -> None:
    by_rater = {copy.settings["rater"]: copy for copy in copies}
    for copy in copies:
        if by_rater[copy.settings["rater"]] is not copy:
            raise UserError(f"{copy.folder} is a duplicate of another rater's folder: remove one")
        if copy.settings["answers"] != digest_sides(pairs):
            raise UserError(
                f"{copy.folder} compares other answers: give the two files that `start` was given, "
                "unchanged"
            )
        if copy.left and not early:
            raise UserError(
                f"{copy.folder}: {copy.left} of {len(copy.items)} are left to rate, and nobody can "
                "rate after this: finish first, or give --early to count what there is"
            )


def find_votes(copy: RaterCopy, pairs: Pairs) -> dict[str, str]:
    """Instruction → model, baseline, tie, skip or left. The texts show which side was whose."""
    by_text = {pair.instruction: pair for pair in pairs.all}
    votes, choices = {}, copy.choices + ["left"] * copy.left
    for number, (item, vote) in enumerate(zip(copy.items, choices, strict=True), 1):
        pair = by_text.get(item["instruction"])
        if pair is None or {item["a"], item["b"]} != {pair.output_1, pair.output_2}:
            raise UserError(f"{copy.folder / ITEMS}, line {number}: changed since `start`")
        if vote in ("a", "b"):
            vote = "model" if item[vote] == pair.output_2 else "baseline"
        votes[pair.instruction] = vote
    return votes


def make_comparisons(folder: Path, pairs: Pairs, scores: dict[str, dict]) -> list[Comparison]:
    """Each rater's comparison, on the instructions that anybody has scored. If there are several
    raters, that of their mean comes first."""
    asked = [p for p in pairs.all if any(p.instruction in s for s in scores.values())]
    texts = [pair.instruction for pair in asked]
    lengths = np.array([[len(p.output_1), len(p.output_2)] for p in asked], float).T
    rows = {r: np.array([s.get(text, math.nan) for text in texts]) for r, s in scores.items()}
    if len(rows) > 1:
        rows = {"all raters": np.nanmean(list(rows.values()), 0), **rows}
    flips = np.full(len(texts), math.nan)
    return [
        Comparison(folder, pairs.model, pairs.baseline, rater, texts, row, lengths, flips)
        for rater, row in rows.items()
    ]


def make_annotations(pairs: Pairs, votes: dict[str, dict], scores: dict[str, dict]) -> list[dict]:
    """A skipped pair, or one that was not rated, has no preference."""
    annotations = []
    for rater, by_text in votes.items():
        scored = scores.get(rater, {})
        for pair in pairs.all:
            if pair.instruction in by_text or pair.instruction in scored:
                score = scored.get(pair.instruction)
                preference = None if score is None else 1 + score
                annotations.append(make_annotation(pairs, pair, rater, preference))
    return annotations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    start = steps.add_parser("start", help="write a folder for each rater")
    add_pair_arguments(start)
    add = start.add_argument
    add("--out", type=Path, required=True, help="new folder, for the raters' folders")
    add("--raters", nargs="+", default=["rater"], help="names (default: rater)")
    add("--num", type=positive(int), help="number of pairs, chosen at random (default: all)")
    add("--seed", help="repeats a shuffle; keep it secret: it tells the sides (default: random)")
    rate = steps.add_parser("rate", help="rate pairs, from where the last session stopped")
    rate.add_argument("copy", type=Path, help="the rater's folder")
    unblind = steps.add_parser("unblind", help="count the votes, test them, close the ratings")
    unblind.add_argument("folder", type=Path, help="--out of start")
    add_pair_arguments(unblind)
    unblind.add_argument("--early", action="store_true", help="though not everything is rated")


def run(args: argparse.Namespace) -> None:
    {"start": run_start, "rate": run_rate, "unblind": run_unblind}[args.step](args)
