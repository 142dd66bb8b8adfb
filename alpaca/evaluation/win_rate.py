"""From a judge's verdicts to win rates: how much better, how sure, and is it more than length?

    leaderboard(paths)              AlpacaEval's annotation files: a row for each model in them
    length_controlled(won, longer)  win rates as if no answer were longer than the other
    sign_test, wilson, verdict      is 90 against 89 a difference?
    agreement(raters)               do several people see the same thing?

An annotation's preference says how much better output_2, the model's, is than output_1, the
baseline's: from 1, not at all, to 2. With y = preference - 1 the win rate is the mean of y and its
standard error s / sqrt(n), s the standard deviation, just as AlpacaEval publishes them.

  - No preference (absent, null, NaN) is no verdict: counted, and left out. 0 is an old way to write
    a draw. Anything else outside 1..2 is refused.
  - Judges favour a place. Asked in both orders, an instruction has two entries, one of them with
    `"swapped": true`: the judge saw output_2 first. (2 still means that output_2 is better.) Their
    mean is one observation. If one of the two has no verdict, neither counts: it would say as much
    about the place as about the answers. A flip is a winner who changes with the order.
  - Judges favour length. For model m and instruction i, with d the characters by which the model's
    answer is longer than the baseline's, and s the root of the mean d² over all models,

        P = sigmoid(q_m + f tanh(d / s) + h_i)

    q says how good a model is, f how fond of length the judge is, h how kind an instruction is to
    all models. They maximise Σ y log P + (1 - y) log (1 - P) - f² / 20 - Σ h² / 2, by Newton's
    method. The length-controlled rate is the mean of sigmoid(q_m + h_i). As nothing holds q back,
    Σ (P - y) = 0 for each model: at equal lengths this rate is the raw one exactly.
  - Its error is an infinitesimal jackknife over the instructions: by how much the rate moves when
    one of them weighs a little more. At equal lengths that, too, is the raw one exactly.

The idea is AlpacaEval 2's, arXiv:2404.04475; the estimator is another, so that figures differ by
some points from the published ones. Theirs takes h from a file, fitted once over many models, with
a factor per model; ours fits it to the models at hand, and has none for a model alone. Their f is
each model's own, steadied by GPT-4's answers when told to be brief or wordy; ours is one for all
models before a judge, since it is the judge who is fond of length. Their s is a standard deviation;
ours, around 0, keeps tanh from saturating where all answers are long. Their penalty is L1, tuned by
cross-validation.

So a model's rate here depends a little on its company. Where answers were cut to 0.55 or padded to
1.8 times their length on purpose (the judge in tests/test_winrate.py, means of 30 draws), the raw
rate goes from 24 to 57, the controlled one from 33 to 40. If all answers of a model are longer by
the same amount, nobody can tell length from merit, and the two rates agree.

Shown by tests/test_winrate.py: test_a_judge_of_length_alone_is_seen_through.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from alpaca.common.errors import UserError, notice
from alpaca.common.files import json_records

HOLD_F, HOLD_H = 0.1, 1.0  # f and h are expected around 0, with variances 10 and 1
Z = NormalDist().inv_cdf(0.975)  # 95 % of a normal distribution lie within ± 1.96 deviations
EQUAL = 0.05  # a win rate that close to a half makes no difference worth a name
NAMES = ("generator_2", "generator_1", "annotator", "instruction", "output_1", "output_2")

# ---------------------------------------------------------------- annotation files


class Entry(NamedTuple):
    won: float  # 0 the baseline … 1 the model, nan nobody
    outputs: tuple[str, ...]  # the baseline's, the model's


@dataclass(frozen=True)
class Comparison:
    """What one judge said of a model and a baseline on N instructions."""

    source: Path
    model: str
    baseline: str
    annotator: str
    instructions: list[str]
    won: np.ndarray  # (N), nan where there is no verdict
    lengths: np.ndarray  # (2, N), characters of the baseline's answers, of the model's
    flips: np.ndarray  # (N), 1 where the winner changed with the order, nan where nobody knows

    def of(self, texts: set[str]) -> "Comparison":
        """On these instructions alone."""
        keep = np.array([text in texts for text in self.instructions])
        some = [text for text in self.instructions if text in texts]
        parts = {"won": self.won[keep], "lengths": self.lengths[:, keep], "flips": self.flips[keep]}
        return replace(self, instructions=some, **parts)


def read_annotations(path: str | Path) -> list[Comparison]:
    """The comparisons in a file, a JSON list or JSON lines."""
    found: dict[tuple[str, ...], dict[str, dict[bool, Entry]]] = {}
    for place, raw in json_records(path):
        try:
            who, instruction, swapped, entry = understood(raw)
            orders = found.setdefault(who, {}).setdefault(instruction, {})
            told = f"{instruction[:60]!r} is there before,"
            if swapped in orders:
                raise UserError(f'{told} in the same order: keep one, or mark one "swapped": true')
            if any(other.outputs != entry.outputs for other in orders.values()):
                raise UserError(f"{told} in the other order and with other outputs: keep one pair")
            orders[swapped] = entry
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    if not found:
        raise UserError(f"{path}: no annotations in it")
    return [compared(Path(path), who, asked) for who, asked in found.items()]


def understood(raw: Any) -> tuple[tuple[str, ...], str, bool, Entry]:
    """(model, baseline, annotator), instruction, swapped, and the rest."""
    if not isinstance(raw, dict):
        raise UserError("an object with instruction, outputs and preference was expected")
    raw = {key: value for key, value in raw.items() if value is not None}  # null as if absent
    raw = {"annotator": "", "swapped": False, "preference": None} | raw
    if odd := [name for name in NAMES if not isinstance(raw.get(name), str)]:
        raise UserError(f"{odd[0]}: a string was expected")
    if not isinstance(raw["swapped"], bool):
        raise UserError(f"swapped {raw['swapped']!r}: true or false was expected")
    *who, instruction, output_1, output_2 = (raw[name] for name in NAMES)
    entry = Entry(share(raw["preference"]), (output_1, output_2))
    return tuple(who), instruction, raw["swapped"], entry


def share(preference: Any) -> float:
    if preference is None or preference != preference:
        return math.nan
    number = isinstance(preference, int | float) and not isinstance(preference, bool)
    if not number or not (preference == 0 or 1 <= preference <= 2):
        wanted = "1 (output_1 is better) to 2 (output_2 is), or null"
        raise UserError(f"preference {preference!r}: {wanted}, was expected")
    return preference - 1.0 if preference else 0.5


def compared(path: Path, who: tuple[str, ...], asked: dict[str, dict[bool, Entry]]) -> Comparison:
    """If any instruction was asked in both orders, all were to be."""
    orders = max(map(len, asked.values()))
    found = np.full((orders, len(asked)), math.nan)
    for place, entries in enumerate(asked.values()):
        if len(entries) == orders:
            found[:, place] = [entry.won for entry in entries.values()]
    sides = found - 0.5
    both = ~np.isnan(sides).any(0) & (orders == 2)
    flips = np.where(both, sides[0] * sides[-1] < 0, math.nan)
    outputs = [next(iter(entries.values())).outputs for entries in asked.values()]
    lengths = np.array([[len(text) for text in pair] for pair in outputs], float).T
    return Comparison(path, *who, list(asked), found.mean(0), lengths, flips)


# ---------------------------------------------------------------- win rates


def leaderboard(paths: Iterable[str | Path], common: bool = False) -> list[dict[str, Any]]:
    """A row for each comparison, in the order of the files; over what all have, if `common`."""
    found = [one for path in paths for one in read_annotations(path)]
    told = [one for one in found if not np.isnan(one.won).all()]
    for one in found:
        if told and np.isnan(one.won).all():
            notice(f"{one.source}: no preference of {one.annotator}'s: left out")
    return rows(shared(told or found) if common else told or found)


def shared(comparisons: list[Comparison]) -> list[Comparison]:
    """Of each the part on the instructions that all have."""
    texts = set.intersection(*(set(one.instructions) for one in comparisons))
    if not texts:
        raise UserError("--common: there is no instruction that all of them have")
    if more := len(set.union(*(set(one.instructions) for one in comparisons))) - len(texts):
        notice(f"{more} instructions that not all have are left out")
    return [one.of(texts) for one in comparisons]


def rows(comparisons: list[Comparison]) -> list[dict[str, Any]]:
    """Models before the same judge and against the same baseline are fitted together."""
    check(comparisons)
    place = {text: column for column, text in enumerate(comparisons[0].instructions)}
    together: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, one in enumerate(comparisons):
        together[one.baseline, one.annotator].append(number)
    found: dict[int, dict[str, Any]] = {}
    for numbers in together.values():
        won, longer = np.zeros((2, len(numbers), len(place)))
        for which, number in enumerate(numbers):
            one = comparisons[number]
            columns = [place[text] for text in one.instructions]
            won[which, columns], longer[which, columns] = one.won, one.lengths[1] - one.lengths[0]
        rates, errors, fond = length_controlled(won, longer)
        for number, rate, error in zip(numbers, rates.tolist(), errors.tolist(), strict=True):
            found[number] = row_of(comparisons[number], rate, error, fond)
    return [found[number] for number in range(len(comparisons))]


def check(comparisons: list[Comparison]) -> None:
    """All on the same instructions, each but once, none without any verdict."""
    first, seen = comparisons[0], {}
    wanted = set(first.instructions)
    for one in comparisons:
        told = f"{one.source}: {one.model} against {one.baseline}"
        who = (one.model, one.baseline, one.annotator)
        if who in seen:
            raise UserError(f"{told} is in {seen[who]} already: name it once")
        seen[who] = one.source
        if odd := wanted.symmetric_difference(one.instructions):
            where = f"only in {first.source}" if min(odd) in wanted else "only here"
            others = f"{first.model} in {first.source}"
            raise UserError(
                f"{told}: other instructions than {others} has: {len(odd)} are in one of them only "
                f"({min(odd)[:60]!r} {where}): score what has the same ones, or --common"
            )
        if np.isnan(one.won).all():
            raise UserError(f"{told}: no preference in it is a number: judge it again")


def row_of(one: Comparison, controlled: float, error: float, fond: float) -> dict[str, Any]:
    """Rates, their errors and bounds (of 95 %) are in per cent, but flip_rate is a share, 0 to 1.
    None is what nobody can know: the error of a single observation, flips in a single order."""
    won = one.won[~np.isnan(one.won)]
    n, sure = len(won), len(won) > 1
    flips = one.flips[~np.isnan(one.flips)]
    wins, losses = int((won > 0.5).sum()), int((won < 0.5).sum())
    low, high = wilson(float(won.sum()), n)
    baseline_length, length = one.lengths.mean(1).tolist()
    return {
        "model": one.model,
        "win_rate": 100 * float(won.mean()),
        "discrete_win_rate": 100 * (wins + (n - wins - losses) / 2) / n,
        "standard_error": 100 * float(won.std(ddof=1)) / math.sqrt(n) if sure else None,
        "win_rate_low": 100 * low,
        "win_rate_high": 100 * high,
        "n": n,
        "n_missing": len(one.won) - n,
        "n_wins": wins,
        "n_losses": losses,
        "n_draws": n - wins - losses,
        "sign_test": sign_test(wins, losses),
        "verdict": verdict(wins, losses, n - wins - losses),
        "flip_rate": float(flips.mean()) if flips.size else None,
        "length_controlled_win_rate": 100 * controlled,
        "length_controlled_standard_error": 100 * error if sure else None,
        "length_coefficient": fond,  # f
        "mean_length": length,  # of all answers of the model, in characters
        "baseline_mean_length": baseline_length,
        "baseline": one.baseline,
        "annotator": one.annotator,
    }


def length_controlled(won: np.ndarray, longer: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Rates (M), their errors (M), and f, for M models on N instructions: what each won there (nan:
    nobody knows) and by how many characters its answer was longer, both (M, N)."""
    M, N = won.shape
    seen = ~np.isnan(won)
    n, y = seen.sum(1), np.where(seen, won, 0.0)
    s = math.sqrt(np.mean(longer[seen] ** 2)) or 1.0
    t = np.tanh(longer / s) * seen
    b, slope, curve = maximum(y, t, seen)
    q, h = b[:M, None], b[M + 1 :] if M > 1 else 0.0
    p = sigmoid(q + h) * seen  # at equal lengths
    w = p * (1 - p)
    rates = p.sum(1) / n
    # n times the rates' slope over q, f and h; and how these move as an instruction weighs more: q
    # is pulled at by its residuals, f by those times t, its own h by nothing, being at its best.
    over = np.c_[np.diag(w.sum(1)), np.zeros(M), w[:, : len(b) - M - 1]]
    pull = np.zeros((len(b), N))
    pull[:M], pull[M] = slope, (slope * t).sum(0)
    moved = (p - rates[:, None]) * seen + over @ np.linalg.solve(curve, pull)  # (M, N)
    return rates, np.sqrt((moved**2).sum(1) / n / np.maximum(n - 1, 1)), float(b[M])


def maximum(
    y: np.ndarray, t: np.ndarray, seen: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, f, h (M + 1 + N) that fit best, the residuals y - P (M, N) there, and minus the Hessian. A
    lone model has no h: it would be one per observation."""
    M, N = y.shape
    N = N if M > 1 else 0
    hold = np.r_[np.zeros(M), HOLD_F, np.full(N, HOLD_H)]

    def z(b: np.ndarray) -> np.ndarray:  # (M, N)
        return b[:M, None] + b[M] * t + (b[M + 1 :] if N else 0)

    def over_qfh(x: np.ndarray) -> np.ndarray:
        """Σ x dz/dq, Σ x dz/df, Σ x dz/dh."""
        return np.r_[x.sum(1), (x * t).sum(), x.sum(0)[:N]]

    b = np.zeros(M + 1 + N)
    for _ in range(200):
        p = sigmoid(z(b)) * seen
        w = p * (1 - p)
        curve = np.diag(over_qfh(w))
        curve[:M, M + 1 :], curve[M + 1 :, :M] = w[:, :N], w.T[:N]
        curve[M] = curve[:, M] = over_qfh(w * t)
        curve += np.diag(hold)
        slope = over_qfh(y - p) - hold * b
        if np.abs(slope).max() < 1e-11 * y.shape[1]:
            return b, y - p, curve
        b += np.linalg.solve(curve, slope)
    raise AssertionError("a concave function has a maximum, and Newton did not find it")


def sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))


# ---------------------------------------------------------------- is it a difference?


def sign_test(wins: int, losses: int) -> float:
    """How often a fair coin is at least so uneven, ties dropped: the exact binomial, two-sided."""
    n, ways = wins + losses, 1  # to have k heads
    tail = 1
    for k in range(min(wins, losses)):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**n)


def wilson(wins: float, n: int) -> tuple[float, float]:
    """Bounds of 95 % for a share of n (Wilson 1927), sound for few and near 0 or 1. A draw is half
    a win; as anything between 0 and 1 varies less than wins and losses, they err by being wide."""
    if not n:
        return 0.0, 1.0
    rate, z2 = wins / n, Z * Z / n
    middle, half = rate + z2 / 2, Z * math.sqrt(rate * (1 - rate) / n + z2 / n / 4)
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def verdict(wins: int, losses: int, draws: int = 0) -> str:
    """What a user may be told. "better" takes six that are no draws: a fair coin gives 5 : 0 or
    0 : 5 one time in 16. "about equal" takes bounds within 5 points of 50: 400 observations."""
    if sign_test(wins, losses) < 0.05:
        return "better" if wins > losses else "worse"
    low, high = wilson(wins + draws / 2, wins + losses + draws)
    return "about equal" if max(high - 0.5, 0.5 - low) <= EQUAL else "too few to tell"


class Agreement(NamedTuple):
    per_cent: float | None  # of the pairs of raters, over all items
    alpha: float | None  # 1 always, 0 as by chance, None where there is one label only
    items: int  # that two raters or more have seen


def agreement(raters: Iterable[Mapping[Hashable, Hashable]]) -> Agreement:
    """Of each rater's labels, {item: label}. Not everyone need have seen everything.

    alpha is Krippendorff's: 1 - observed / expected disagreement, expected being that of labels
    drawn from one urn. To agree on "tie" is no feat where nearly everything is one."""
    labels: dict[Hashable, Counter] = defaultdict(Counter)
    for rater in raters:
        for item, label in rater.items():
            labels[item][label] += 1
    shared = [counts for counts in labels.values() if counts.total() > 1]
    if not shared:
        return Agreement(None, None, 0)
    pairs = sum(math.comb(counts.total(), 2) for counts in shared)
    same = sum(math.comb(k, 2) for counts in shared for k in counts.values())
    urn = sum(shared, Counter())
    n = urn.total()
    expected = sum(k * (n - k) for k in urn.values()) / (n - 1)
    observed = sum(k * (c.total() - k) / (c.total() - 1) for c in shared for k in c.values())
    return Agreement(100 * same / pairs, 1 - observed / expected if expected else None, len(shared))
