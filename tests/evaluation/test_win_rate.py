"""Win rates: annotations with a known truth, statistics by brute force."""

import json
import math
import random
import re
import statistics
from fractions import Fraction
from itertools import permutations, product

import pytest
from helpers.annotations import entry, write

from alpaca.common.errors import UserError
from alpaca.evaluation.annotations import read_annotations
from alpaca.evaluation.win_rate import (
    Z,
    agreement,
    describe_difference,
    leaderboard,
    sign_test,
    wilson,
)


def text(length: float) -> str:
    return "w" * max(1, round(length))


def only(path, entries: list) -> dict:
    (row,) = leaderboard([write(path / "annotations.json", entries)])
    return row


def judged(seed: int, n: int, merit: float, stretch: float = 1.0, **names) -> list[dict]:
    """A judge who likes merit, and also length: 1 for each doubling, or so. The instructions and
    the baseline's answers are the same for every seed."""
    shared, rng, entries = random.Random(0), random.Random(seed), []
    for number in range(n):
        base, easy = 200 * shared.lognormvariate(0, 0.5), shared.gauss(0, 1)
        length = base * stretch * rng.lognormvariate(0, 0.4)
        chance = 1 / (1 + math.exp(-(merit + 1.5 * math.log(length / base) + easy)))
        outputs = {"output_1": text(base), "output_2": text(length)}
        entries.append(entry(number, 1 + (rng.random() < chance), **outputs, **names))
    return entries


def counts(row: dict) -> tuple:
    return tuple(row[name] for name in ("n", "n_missing", "n_wins", "n_losses", "n_draws"))


# ---------------------------------------------------------------- annotations with a known truth


def test_rates_are_the_published_arithmetic(tmp_path):
    rng = random.Random(1)
    preferences = [round(rng.uniform(1, 2), 10) for _ in range(200)] + [1, 2, 2, 1.5, 0, 0.0]
    rng.shuffle(preferences)
    missing = [None, math.nan, "absent"]
    entries = [entry(n, p, output_2=text(n)) for n, p in enumerate(missing + preferences)]
    del entries[2]["preference"]
    row = only(tmp_path, entries)
    y = [0.5 if p == 0 else p - 1 for p in preferences]
    assert row["win_rate"] == pytest.approx(100 * statistics.mean(y), abs=1e-9)
    error = 100 * statistics.stdev(y) / len(y) ** 0.5
    assert row["standard_error"] == pytest.approx(error, abs=1e-9)
    wins, losses = sum(v > 0.5 for v in y), sum(v < 0.5 for v in y)
    assert counts(row) == (206, 3, wins, losses, y.count(0.5)) and y.count(0.5) >= 3
    lengths = [len(one["output_2"]) for one in entries]
    assert row["mean_length"] == pytest.approx(statistics.mean(lengths))
    assert row["baseline_mean_length"] == len("baseline")
    assert row["flip_rate"] is None and row["model"] == "tuned" and row["annotator"] == "judge"
    unnamed = [one | {"annotator": None} for one in entries]
    assert only(tmp_path, unnamed) == row | {"annotator": ""}, "null is as absent"


def test_discrete_rate_counts_any_lead_as_a_win(tmp_path):
    """As AlpacaEval's does; 1.5 and the old 0 are half a win."""
    lost, drawn, won = (1, 1.49, 1.0000002), (1.5, 0, 1.5), (1.51, 2)
    row = only(tmp_path, [entry(n, p) for n, p in enumerate((*lost, *drawn, *won))])
    assert counts(row) == (8, 0, 2, 3, 3) and row["discrete_win_rate"] == 100 * (2 + 3 / 2) / 8


def test_a_published_annotation_is_read_unchanged(tmp_path):
    """With unused fields, an escaped slash, and an object on several lines."""
    file = tmp_path / "annotations.json"
    file.write_text(
        '[\n  {\n    "instruction":"5 \\/ 2?",\n    "output_1":"2.5",\n    "generator_1":"base",\n'
        '    "dataset":"koala",\n    "output_2":"two",\n    "generator_2":"tuned",\n'
        '    "annotator":"judge",\n    "preference":1.0000001827,\n    "raw_completion":{"a":1}\n'
        "  }\n]\n"
    )
    (row,) = leaderboard([file])
    assert row["win_rate"] == pytest.approx(0.00001827, abs=1e-12)
    assert row["standard_error"] is row["length_controlled_standard_error"] is None
    (one,) = read_annotations(file)
    assert one.instructions == ["5 / 2?"]


def test_equal_lengths_leave_the_rate_and_error_unchanged(tmp_path):
    rng = random.Random(2)
    entries = [entry(n, rng.choice([1, 1.2, 1.5, 1.9, 2, None])) for n in range(120)]
    others = [judged(seed, 120, 0.5, 1.5, generator_2=f"other {seed}") for seed in (3, 4)]
    files = [
        write(tmp_path / f"{n}.json", some)
        for n, some in enumerate([others[0], entries, others[1]])
    ]
    among_others = leaderboard(files)
    assert [row["model"] for row in among_others] == ["other 3", "tuned", "other 4"]
    row = among_others[1]
    for name in ("win_rate", "standard_error"):
        assert row[f"length_controlled_{name}"] == pytest.approx(row[name], abs=1e-8)
    assert abs(among_others[0]["length_controlled_win_rate"] - among_others[0]["win_rate"]) > 5


def test_padding_or_cutting_answers_moves_the_controlled_rate_less(tmp_path):
    files = []
    for seed, (name, stretch) in enumerate({"plain": 1.0, "wordy": 1.8, "brief": 0.55}.items()):
        entries = judged(seed, 400, -0.5, stretch, generator_2=name)
        files.append(write(tmp_path / f"{name}.json", entries))
    plain, wordy, brief = leaderboard(files)
    raw = wordy["win_rate"] - brief["win_rate"]
    assert raw > 25
    together = [row["length_controlled_win_rate"] for row in (plain, wordy, brief)]
    assert max(together) - min(together) < raw / 2
    alone = leaderboard(files[:1])[0]
    assert alone["win_rate"] == plain["win_rate"] and plain["length_control"] == "joint"
    names = ("length_control", "length_controlled_win_rate", "length_controlled_standard_error")
    assert [alone[name] for name in (*names, "length_coefficient")] == [None] * 4


def test_two_orders_are_one_observation_and_one_is_none(tmp_path):
    pairs = [(2, 2), (2, 1), (1, 2), (1.5, 2), (1, 1), (2, None), (None, None)]
    entries = [entry(n, p[0]) for n, p in enumerate(pairs)]
    entries += [entry(n, p[1], swapped=True) for n, p in enumerate(pairs)]
    entries += [entry(99, 2)]  # was never asked in the other order
    row = only(tmp_path, entries)
    y = [1, 0.5, 0.5, 0.75, 0]
    assert row["win_rate"] == 100 * statistics.mean(y)
    assert row["standard_error"] == pytest.approx(100 * statistics.stdev(y) / 5**0.5)
    assert counts(row) == (5, 3, 2, 1, 2) and row["flip_rate"] == 2 / 5
    # One order per instruction, drawn at random, is complete.
    row = only(tmp_path, [entry(n, 1 + n % 2, swapped=n % 3 == 0) for n in range(12)])
    assert counts(row) == (12, 0, 6, 6, 0) and row["flip_rate"] is None


@pytest.mark.parametrize("models", [1, 3])
def test_swapping_model_and_baseline_mirrors_every_figure(tmp_path, models):
    """In both orders, with soft and with missing preferences."""
    rng, here, there = random.Random(6), [], []
    other = {"output_1": "output_2", "output_2": "output_1"}
    for model in range(models):
        name = f"model {model}"
        entries = judged(model, 90, 0.3 * model, 1 + 0.3 * model, generator_2=name)
        for one in entries:
            one["preference"] = rng.choice([None, one["preference"], rng.uniform(1, 2)])
        entries += [
            one | {"swapped": True, "preference": rng.choice([1, 1.5, 2])} for one in entries
        ]
        here.append(write(tmp_path / f"{model}.json", entries))
        mirror = [{other.get(key, key): value for key, value in one.items()} for one in entries]
        for one in mirror:
            one["preference"] = one["preference"] and 3 - one["preference"]
        there.append(write(tmp_path / f"{model} mirrored.json", mirror))
    mirrored = ["win_rate"]
    same = ["standard_error", "n", "n_missing", "n_draws", "sign_test", "flip_rate"]
    if models > 1:
        mirrored.append("length_controlled_win_rate")
        same += ["length_controlled_standard_error", "length_coefficient"]
    for a, b in zip(leaderboard(here), leaderboard(there), strict=True):
        for name in mirrored:
            assert a[name] + b[name] == pytest.approx(100, abs=1e-7), name
        for name in same:
            assert a[name] == pytest.approx(b[name], abs=1e-7), name
        assert (a["n_wins"], a["n_losses"]) == (b["n_losses"], b["n_wins"])
        assert a["win_rate_low"] + b["win_rate_high"] == pytest.approx(100)
        lengths = a["mean_length"], a["baseline_mean_length"]
        assert lengths == (b["baseline_mean_length"], b["mean_length"])
        assert abs(a["win_rate"] - 50) > 1 and a["n_missing"] > 0 and a["flip_rate"] > 0


@pytest.mark.parametrize("preference", [1, 1.5, 2])
def test_equal_scores_have_no_standard_error(tmp_path, preference):
    entries = judged(7, 50, 0, 1.3) + judged(8, 50, 0, generator_2="other")
    entries = [one | {"preference": preference} for one in entries]
    row, _ = leaderboard([write(tmp_path / "a.json", entries)])
    rate = 100 * (preference - 1)
    assert row["win_rate"] == rate and row["standard_error"] == 0
    assert row["length_controlled_win_rate"] == pytest.approx(rate, abs=1e-6)
    assert row["length_controlled_standard_error"] == pytest.approx(0, abs=1e-6)
    assert row["win_rate_high"] - row["win_rate_low"] > 5  # 50 of 50 is not certainty


def test_files_are_fitted_together_in_any_order_of_lines(tmp_path):
    files = [judged(n, 60, 0.3, 1 + n / 2, generator_2=f"model {n}") for n in range(3)]
    here = leaderboard([write(tmp_path / f"{n}.json", e) for n, e in enumerate(files)])
    for entries in files[1:]:
        random.Random(0).shuffle(entries)
    there = leaderboard([write(tmp_path / f"{n}.json", e) for n, e in enumerate(files)])
    for a, b in zip(here, there, strict=True):
        numbers = {k: v for k, v in a.items() if isinstance(v, float)}
        assert numbers == pytest.approx({k: b[k] for k in numbers})
    assert len({row["length_coefficient"] for row in here}) == 1


def test_judges_in_one_file_are_fitted_apart(tmp_path):
    first, second = judged(1, 80, 0.2, 1.4), judged(2, 80, 0.9, 1.4, annotator="another")
    together = leaderboard([write(tmp_path / "both.json", [*first, *second])])
    assert together == [only(tmp_path, first), only(tmp_path, second)]
    assert [row["annotator"] for row in together] == ["judge", "another"]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (entry(2, 2.5), "preference 2.5: 1 .* to 2 .* was expected"),
        (entry(2, 0.5), "preference 0.5"),
        (entry(2, math.inf), "preference inf"),
        (entry(2, "2"), "preference '2'"),
        (entry(2, True), "preference True"),
        (entry(1, 2), "'instruction 1' again in the same order: keep one"),
        (entry(1, 2, swapped=True, output_2="else"), "'instruction 1' has other outputs"),
        (entry(2, 2, swapped="yes"), 'swapped is "yes", true or false or null was expected'),
        (entry(2, 2, output_2=None), "output_2 is missing, a string was expected"),
        ({"instruction": "no more"}, "generator_2 is missing, a string was expected"),
        ([1, 2], r"is \[1, 2\], an object was expected"),
    ],
)
def test_an_error_in_annotations_is_one_line_naming_the_place(tmp_path, second, message):
    file = tmp_path / "annotations.json"
    file.write_text(f"[\n{json.dumps(entry(1, 2))},\n{json.dumps(second)}\n]")
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}, record 2:? {message}") as caught:
        leaderboard([file])
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- significance


@pytest.mark.parametrize("n", [1, 2, 5, 6, 11])
def test_sign_test_counts_all_tosses_of_a_coin(n):
    tosses = [sum(toss) for toss in product([0, 1], repeat=n)]
    for wins in range(n + 1):
        uneven = abs(2 * wins - n)
        share = Fraction(sum(abs(2 * heads - n) >= uneven for heads in tosses), len(tosses))
        assert sign_test(wins, n - wins) == pytest.approx(float(share), abs=1e-15)
    assert sign_test(0, 0) == 1 and sign_test(5000, 5200) == pytest.approx(0.0488, abs=3e-4)


@pytest.mark.parametrize(("wins", "n"), [(0, 1), (0, 20), (7, 9), (89.5, 179), (20, 20)])
def test_wilson_bounds_just_allow_what_was_seen(wins, n):
    for bound, sign in zip(wilson(wins, n), (1, -1), strict=True):
        reach = bound + sign * Z * math.sqrt(bound * (1 - bound) / n)
        assert reach == pytest.approx(wins / n, abs=1e-7)
    assert wilson(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((5, 0), "too few to tell"), ((6, 0), "better"),
        ((0, 6), "worse"), ((3, 3, 200), "too few to tell"), ((90, 89), "too few to tell"),
        ((500, 500), "about equal"), ((500, 500, 5000), "about equal"), ((560, 440), "better"),
        ((440, 560), "worse"),
    ],
)  # fmt: skip
def test_describe_difference(counts, words):
    assert describe_difference(*counts) == words


def test_agreement_by_brute_force():
    rng = random.Random(10)
    raters = [{i: rng.choice("AABt") for i in range(30) if rng.random() < 0.8} for _ in range(3)]
    items = [[rater[i] for rater in raters if i in rater] for i in range(30)]
    items = [labels for labels in items if len(labels) > 1]
    pairs = [(a, b) for labels in items for a, b in permutations(labels, 2)]
    percent = pytest.approx(100 * statistics.mean(a == b for a, b in pairs))
    assert agreement(raters) == (percent, len(items)) and len(items) < 30


def test_agreement_at_its_limits():
    same, other = {1: "A", 2: "B", 3: "tie"}, {1: "B", 2: "A", 3: "tie"}
    assert agreement([same, same]) == (100, 3)
    assert agreement([same, other]) == (pytest.approx(100 / 3), 3)
    assert agreement([same]) == agreement([]) == agreement([{1: "A"}, {2: "A"}]) == (None, 0)
