"""Win rates: how often is the model's answer better than the baseline's, and how sure is that?

    leaderboard(["runs/judged/annotations.json"])   one row for each model in the files
    sign_test(90, 89)                               p-value of 90 wins against 89 losses
    agreement([ann, ben])                           how far several raters agree

With a score y from 0 (lost) to 1 (won) for each of n instructions:

    win rate             mean(y), as AlpacaEval publishes it
    standard error       std(y) / sqrt(n)
    Wilson interval      all rates r with |mean(y) - r| <= 1.96 sqrt(r (1 - r) / n): 95 %
    sign test            the chance that n fair coin tosses are at least as uneven, draws left out
    length-controlled    the rate if the answers were as long as the baseline's: length_control.py
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import accumulate, combinations
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from alpaca.common.errors import UserError, notice
from alpaca.evaluation.annotations import Comparison, read_annotations
from alpaca.evaluation.length_control import (
    LengthControlFile,
    length_controlled,
    length_controlled_v1,
    read_lc_file,
)

Z = NormalDist().inv_cdf(0.975)  # 95 % of a normal distribution lie within ± 1.96 deviations
EQUAL = 0.05  # a win rate this close to 50 % is called equal

# ---------------------------------------------------------------- significance


def sign_test(wins: int, losses: int) -> float:
    """The two-sided p-value of the exact binomial test with probability 1/2."""
    n = wins + losses
    n_choose_k = accumulate(
        range(min(wins, losses)), lambda c, k: c * (n - k) // (k + 1), initial=1
    )
    return min(1.0, 2 * sum(n_choose_k) / 2**n)


def wilson(wins: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval (1927) for a proportion, good for small n and near 0 or 1. A draw is
    half a win; scores between 0 and 1 vary less than wins and losses, so it errs on the wide side.
    """
    rate, z2 = wins / n, Z * Z / n
    middle, half = rate + z2 / 2, Z * math.sqrt(rate * (1 - rate) / n + z2 / n / 4)
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def describe_difference(wins: int, losses: int, draws: int = 0) -> str:
    """better, worse, about equal, or too few to tell. "better" takes at least 6 wins: a fair coin
    is as uneven as 5 : 0 one time in 16. "about equal" takes an interval within 5 points of 50 %,
    which is 400 observations."""
    if sign_test(wins, losses) < 0.05:
        return "better" if wins > losses else "worse"
    low, high = wilson(wins + draws / 2, wins + losses + draws)
    return "about equal" if max(high - 0.5, 0.5 - low) <= EQUAL else "too few to tell"


# ---------------------------------------------------------------- a row for each comparison


def leaderboard(paths: Iterable[str | Path], lc_file: Path | None = None) -> list[dict[str, Any]]:
    """A row for each comparison, in the order of the files, on the instructions that all of them
    have. With AlpacaEval's file for length control, all must have the instructions of its set."""
    found: dict[tuple[str, str, str], Comparison] = {}
    silent = []
    for c in (c for path in paths for c in read_annotations(path)):
        if np.isnan(c.scores).all():
            silent.append(c)
        elif c.names in found:
            where = f"{c.source}: {c.model} against {c.baseline}"
            raise UserError(f"{where} is already in {found[c.names].source}: name it once")
        else:
            found[c.names] = c
    if not found:
        raise UserError(f"{silent[0].source}: no preference in it is a number: judge it again")
    for c in silent:
        notice(f"{c.source}: {c.annotator} has no preferences: left out")
    comparisons = list(found.values())
    if lc_file is None:
        return comparison_rows(restrict_to_common(comparisons))
    file = read_lc_file(lc_file)
    check_numbered(comparisons, lc_file, file.difficulty)
    return comparison_rows(comparisons, file)


def check_numbered(comparisons: list[Comparison], lc_file: Path, difficulty: np.ndarray) -> None:
    """The file for length control knows instructions by their number in the set alone. In another
    order, scores and difficulties correlate by chance: 2 / sqrt(n) or more one time in 44."""
    n = len(difficulty)
    for c in comparisons:
        if len(c.instructions) != n or c.instructions != comparisons[0].instructions:
            raise UserError(
                f"{c.source}: {len(c.instructions)} instructions by {c.model}, but {lc_file} has "
                f"difficulties for {n}: all of its set, in its order, were expected"
            )
        x, y = (v[~np.isnan(c.scores)] for v in (difficulty, c.scores))
        if np.mean((x - x.mean()) * (y - y.mean())) < 2 / math.sqrt(n) * x.std() * y.std():
            notice(
                f"{c.source}: difficulties and preferences do not correlate: are the instructions "
                "those of the set, in its order?"
            )


def restrict_to_common(comparisons: list[Comparison]) -> list[Comparison]:
    all_texts = [set(comparison.instructions) for comparison in comparisons]
    common = set.intersection(*all_texts)
    if not common:
        raise UserError("no instruction is in all of the files: score them one by one")
    if others := len(set.union(*all_texts) - common):
        notice(
            f"{others} instructions that are not in all of the files are left out of every figure; "
            f"{len(common)} are scored"
        )
    return [c.select([text for text in c.instructions if text in common]) for c in comparisons]


# estimator, rate, error, and f: above 0 if the judge favours length
Controlled = tuple[str | None, float | None, float | None, float | None]
UNCONTROLLED: Controlled = (None, None, None, None)


def comparison_rows(
    comparisons: list[Comparison], file: LengthControlFile | None = None
) -> list[dict[str, Any]]:
    """A row for each comparison; all have the same instructions. Without a file, models with the
    same annotator and baseline share one fit of the length control, and one alone has none."""
    groups: dict[tuple[str, str], list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        groups[comparison.baseline, comparison.annotator].append(comparison)
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for group in groups.values():
        aligned = [c.select(comparisons[0].instructions) for c in group]
        scores = np.array([c.scores for c in aligned])  # (M, N)
        longer = np.array([c.lengths[1] - c.lengths[0] for c in aligned])  # (M, N)
        controlled: list[Controlled] = [UNCONTROLLED]
        if file:
            fits = [length_controlled_v1(*one, file) for one in zip(scores, longer, strict=True)]
            controlled = [(file.estimator, *fit[:2], float(-fit[2][0])) for fit in fits]
        elif len(group) > 1:
            rates, errors, f = length_controlled(scores, longer)
            fits = zip(rates.tolist(), errors.tolist(), strict=True)
            controlled = [("joint", *fit, f) for fit in fits]
        for comparison, fit in zip(group, controlled, strict=True):
            rows[comparison.names] = comparison_row(comparison, fit)
    return [rows[comparison.names] for comparison in comparisons]


def comparison_row(comparison: Comparison, fit: Controlled) -> dict[str, Any]:
    """Rates, errors and bounds are percentages; flip_rate is a proportion. None is unknown: the
    error of a single observation, flips where there was one order, the length-controlled rate of
    one model without AlpacaEval's file."""
    scores = comparison.scores[~np.isnan(comparison.scores)]
    flips = comparison.flips[~np.isnan(comparison.flips)]
    n, (estimator, rate, error, f) = len(scores), fit
    wins, losses = int((scores > 0.5).sum()), int((scores < 0.5).sum())
    draws = n - wins - losses
    low, high = wilson(float(scores.sum()), n)
    baseline_length, length = comparison.lengths.mean(1).tolist()  # of all answers, in characters
    return {
        "model": comparison.model,
        "win_rate": 100 * float(scores.mean()),
        "discrete_win_rate": 100 * (wins + draws / 2) / n,
        "standard_error": 100 * float(scores.std(ddof=1)) / math.sqrt(n) if n > 1 else None,
        "win_rate_low": 100 * low,
        "win_rate_high": 100 * high,
        "n": n,
        "n_missing": len(comparison.scores) - n,
        "n_wins": wins,
        "n_losses": losses,
        "n_draws": draws,
        "sign_test": sign_test(wins, losses),
        "verdict": describe_difference(wins, losses, draws),
        "flip_rate": float(flips.mean()) if flips.size else None,
        "length_control": estimator,
        "length_controlled_win_rate": rate and 100 * rate,
        "length_controlled_standard_error": 100 * error if error is not None and n > 1 else None,
        "length_coefficient": f,
        "mean_length": length,
        "baseline_mean_length": baseline_length,
        "baseline": comparison.baseline,
        "annotator": comparison.annotator,
    }


# ---------------------------------------------------------------- several raters


def agreement(raters: Iterable[Mapping[Any, Any]]) -> tuple[float | None, int]:
    """From each rater's labels, {item: label}: how many per cent of the pairs of raters agree, over
    all items, and how many items two raters or more have labelled."""
    labels: dict[Any, list] = defaultdict(list)
    for rater in raters:
        for item, label in rater.items():
            labels[item].append(label)
    same = [a == b for given in labels.values() for a, b in combinations(given, 2)]
    percent = 100 * sum(same) / len(same) if same else None
    return percent, sum(len(given) > 1 for given in labels.values())
