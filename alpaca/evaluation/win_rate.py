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
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from alpaca.common.errors import UserError, notice
from alpaca.evaluation.annotations import Comparison, read_annotations
from alpaca.evaluation.length_control import length_controlled

Z = NormalDist().inv_cdf(0.975)  # 95 % of a normal distribution lie within ± 1.96 deviations
EQUAL = 0.05  # a win rate this close to 50 % is called equal

# ---------------------------------------------------------------- significance


def sign_test(wins: int, losses: int) -> float:
    """The two-sided p-value of the exact binomial test with probability 1/2."""
    n, combinations = wins + losses, 1  # n choose k
    tail = 1
    for k in range(min(wins, losses)):
        combinations = combinations * (n - k) // (k + 1)
        tail += combinations
    return min(1.0, 2 * tail / 2**n)


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


def leaderboard(paths: Iterable[str | Path], common: bool = False) -> list[dict[str, Any]]:
    """A row for each comparison, in the order of the files. `common` restricts them to the
    instructions that all of them have."""
    comparisons = [comparison for path in paths for comparison in read_annotations(path)]
    if scored := [c for c in comparisons if not np.isnan(c.scores).all()]:
        for c in comparisons:
            if np.isnan(c.scores).all():
                notice(f"{c.source}: {c.annotator} has no preferences: left out")
        comparisons = scored
    return comparison_rows(restrict_to_common(comparisons) if common else comparisons)


def restrict_to_common(comparisons: list[Comparison]) -> list[Comparison]:
    all_texts = [set(comparison.instructions) for comparison in comparisons]
    common = set.intersection(*all_texts)
    if not common:
        raise UserError("--common: no instruction is in all of the files")
    if others := len(set.union(*all_texts) - common):
        notice(f"{others} instructions that are not in all of the files are left out")
    return [c.select([text for text in c.instructions if text in common]) for c in comparisons]


def comparison_rows(comparisons: list[Comparison]) -> list[dict[str, Any]]:
    """Models with the same annotator and baseline share one fit of the length control."""
    check_comparable(comparisons)
    groups: dict[tuple[str, str], list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        groups[comparison.baseline, comparison.annotator].append(comparison)
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for group in groups.values():
        aligned = [c.select(comparisons[0].instructions) for c in group]
        scores = np.array([c.scores for c in aligned])  # (M, N)
        longer = np.array([c.lengths[1] - c.lengths[0] for c in aligned])  # (M, N)
        rates, errors, f = length_controlled(scores, longer)
        for comparison, rate, error in zip(group, rates.tolist(), errors.tolist(), strict=True):
            rows[comparison.names] = comparison_row(comparison, rate, error, f)
    return [rows[comparison.names] for comparison in comparisons]


def check_comparable(comparisons: list[Comparison]) -> None:
    """Refuse comparisons on different instructions, repeated ones, and those without scores."""
    first, sources = comparisons[0], {}
    for comparison in comparisons:
        where = f"{comparison.source}: {comparison.model} against {comparison.baseline}"
        if comparison.names in sources:
            raise UserError(f"{where} is already in {sources[comparison.names]}: name it once")
        sources[comparison.names] = comparison.source
        if unpaired := set(first.instructions).symmetric_difference(comparison.instructions):
            source = first.source if min(unpaired) in first.instructions else comparison.source
            raise UserError(
                f"{where} has other instructions than {first.model} in {first.source}: "
                f"{len(unpaired)} are in one of them only, such as {min(unpaired)[:60]!r} in "
                f"{source}; --common scores those that all have"
            )
        if np.isnan(comparison.scores).all():
            raise UserError(f"{where}: no preference in it is a number: judge it again")


def comparison_row(comparison: Comparison, rate: float, error: float, f: float) -> dict[str, Any]:
    """Rates, errors and bounds are percentages; flip_rate is a proportion. None is unknown: the
    error of a single observation, flips where there was one order."""
    scores = comparison.scores[~np.isnan(comparison.scores)]
    flips = comparison.flips[~np.isnan(comparison.flips)]
    n = len(scores)
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
        "length_controlled_win_rate": 100 * rate,
        "length_controlled_standard_error": 100 * error if n > 1 else None,
        "length_coefficient": f,
        "mean_length": length,
        "baseline_mean_length": baseline_length,
        "baseline": comparison.baseline,
        "annotator": comparison.annotator,
    }


# ---------------------------------------------------------------- several raters


class Agreement(NamedTuple):
    percent: float | None  # of the pairs of raters, over all items
    alpha: float | None  # 1 always, 0 as by chance, None where there is one label only
    items: int  # that two raters or more have labelled


def agreement(raters: Iterable[Mapping[Any, Any]]) -> Agreement:
    """From each rater's labels, {item: label}; not everyone need label everything.

    alpha is Krippendorff's, 1 - observed / expected disagreement, where labels are expected to be
    drawn from the pool of all labels: agreeing on "tie" means little if nearly all are ties."""
    labels: dict[Any, Counter] = defaultdict(Counter)
    for rater in raters:
        for item, label in rater.items():
            labels[item][label] += 1
    shared = [counts for counts in labels.values() if counts.total() > 1]
    if not shared:
        return Agreement(None, None, 0)
    pairs = sum(math.comb(counts.total(), 2) for counts in shared)
    same = sum(math.comb(k, 2) for counts in shared for k in counts.values())
    pool = sum(shared, Counter())
    n = pool.total()
    expected = sum(k * (n - k) for k in pool.values()) / (n - 1)
    observed = sum(k * (c.total() - k) / (c.total() - 1) for c in shared for k in c.values())
    return Agreement(100 * same / pairs, 1 - observed / expected if expected else None, len(shared))
