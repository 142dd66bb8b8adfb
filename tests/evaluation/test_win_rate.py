"""Win rates with a truth built in, statistics by brute force, and the evaluation instructions."""

import json
import math
import random
import re
import statistics
import unicodedata
from fractions import Fraction
from itertools import permutations, product

import numpy as np
import pytest
from helpers.annotations import entry, write
from helpers.commands import ROOT

from alpaca.datagen import lint
from alpaca.datagen.formats import normalize_record
from alpaca.evaluation.annotations import read_annotations
from alpaca.evaluation.length_control import fit_logistic, length_controlled
from alpaca.evaluation.win_rate import (
    Z,
    agreement,
    describe_difference,
    leaderboard,
    sign_test,
    wilson,
)
from rougel import Pool

MIRRORED = ("win_rate", "length_controlled_win_rate")
SAME = (
    "standard_error",
    "length_controlled_standard_error",
    "n",
    "n_missing",
    "n_draws",
    "sign_test",
    "flip_rate",
    "length_coefficient",
)


def text(length: float) -> str:
    return "w" * max(1, round(length))


def only(path, entries: list) -> dict:
    (row,) = leaderboard([write(path / "annotations.json", entries)])
    return row


def mirror(entries: list[dict]) -> list[dict]:
    sides = {"output_1": "output_2", "output_2": "output_1"}
    sides |= {"generator_1": "generator_2", "generator_2": "generator_1"}
    turned = [{sides.get(name, name): value for name, value in one.items()} for one in entries]
    for one in turned:
        if one["preference"]:
            one["preference"] = 3 - one["preference"]
    return turned


def judged(seed: int, n: int, merit: float, stretch: float = 1.0, **names) -> list[dict]:
    """A judge who likes merit, and also length: 1 for each doubling, or so. The instructions and
    the baseline's answers are the same for every seed."""
    shared, rng, entries = random.Random(0), random.Random(seed), []
    for number in range(n):
        base, kindness = 200 * shared.lognormvariate(0, 0.5), shared.gauss(0, 1)
        length = base * stretch * rng.lognormvariate(0, 0.4)
        chance = 1 / (1 + math.exp(-(merit + 1.5 * math.log(length / base) + kindness)))
        outputs = {"output_1": text(base), "output_2": text(length)}
        entries.append(entry(number, 1 + (rng.random() < chance), **outputs, **names))
    return entries


# ---------------------------------------------------------------- constructed truths


def test_the_published_arithmetic(tmp_path):
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
    assert row["n"] == len(y) == 206 and row["n_missing"] == 3
    assert row["n_draws"] == y.count(0.5) >= 3
    assert row["n_wins"] == sum(v > 0.5 for v in y)
    assert row["n_losses"] == sum(v < 0.5 for v in y)
    lengths = [len(one["output_2"]) for one in entries]
    assert row["mean_length"] == pytest.approx(statistics.mean(lengths))
    assert row["baseline_mean_length"] == len("baseline")
    assert row["flip_rate"] is None and row["model"] == "tuned" and row["annotator"] == "judge"
    nobody = [one | {"annotator": None} for one in entries]
    assert only(tmp_path, nobody) == row | {"annotator": ""}, "null is as absent"


def test_the_discrete_rate_is_alpaca_evals(tmp_path):
    """Whoever is ahead has won, by however little; 1.5 and the old 0 are half a win."""
    lost, drawn, won = (1, 1.49, 1.0000002), (1.5, 0, 1.5), (1.51, 2)
    row = only(tmp_path, [entry(n, p) for n, p in enumerate((*lost, *drawn, *won))])
    assert (row["n_losses"], row["n_draws"], row["n_wins"]) == (3, 3, 2)
    assert row["discrete_win_rate"] == 100 * (2 + 3 / 2) / 8


def test_a_published_annotation_is_read_as_it_is(tmp_path):
    """With fields of no interest here, an escaped slash, and one object to several lines."""
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


def test_equal_lengths_control_changes_nothing(tmp_path):
    rng = random.Random(2)
    entries = [entry(n, rng.choice([1, 1.2, 1.5, 1.9, 2, None])) for n in range(120)]
    alone = only(tmp_path, entries)
    others = [judged(seed, 120, 0.5, 1.5, generator_2=f"other {seed}") for seed in (3, 4)]
    company = [others[0], entries, others[1]]
    files = [write(tmp_path / f"{n}.json", some) for n, some in enumerate(company)]
    in_company = leaderboard(files)
    assert [row["model"] for row in in_company] == ["other 3", "tuned", "other 4"]
    for row in (alone, in_company[1]):
        assert row["length_controlled_win_rate"] == pytest.approx(row["win_rate"], abs=1e-8)
        error = row["standard_error"]
        assert row["length_controlled_standard_error"] == pytest.approx(error, abs=1e-8)
    assert abs(in_company[0]["length_controlled_win_rate"] - in_company[0]["win_rate"]) > 5


@pytest.mark.parametrize("n", [100, 800])
def test_a_judge_of_length_alone_is_seen_through(tmp_path, n):
    drawn_from = statistics.NormalDist(600 + 120, 150)
    entries = []
    for number in range(n):
        length = drawn_from.inv_cdf((number + 0.5) / n)
        outputs = {"output_1": text(600), "output_2": text(length)}
        entries.append(entry(number, 2 if round(length) > 600 else 1, **outputs))
    row = only(tmp_path, entries)
    assert row["win_rate"] > 75
    controlled, error = (
        row[f"length_controlled_{what}"] for what in ("win_rate", "standard_error")
    )
    assert abs(controlled - 50) < error < 80 / n**0.5 + 1.2
    assert row["length_coefficient"] > 3


def test_padding_or_cutting_answers_on_purpose_moves_it_less_than_half_as_far(tmp_path):
    ways = {"plain": 1.0, "wordy": 1.8, "brief": 0.55}
    files = []
    for seed, (name, stretch) in enumerate(ways.items()):
        entries = judged(seed, 400, -0.5, stretch, generator_2=name)
        files.append(write(tmp_path / f"{name}.json", entries))
    plain, wordy, brief = leaderboard(files)
    assert wordy["win_rate"] - brief["win_rate"] > 25
    controlled = [row["length_controlled_win_rate"] for row in (plain, wordy, brief)]
    assert max(controlled) - min(controlled) < (wordy["win_rate"] - brief["win_rate"]) / 2
    alone = [leaderboard([file])[0]["length_controlled_win_rate"] for file in files]
    assert abs(alone[1] - alone[2]) < (wordy["win_rate"] - brief["win_rate"]) / 2


def test_a_judge_who_takes_the_first_in_both_orders_says_nothing(tmp_path):
    lengths = random.Random(4).choices(range(1, 300), k=40)
    entries = []
    for number, length in enumerate(lengths):
        for swapped in (number % 2 == 0, number % 2 == 1):
            preference = 2 if swapped else 1  # swapped: the model's answer is read first
            entries.append(entry(number, preference, swapped=swapped, output_2=text(length)))
    row = only(tmp_path, entries)
    assert (row["win_rate"], row["standard_error"], row["flip_rate"]) == (50, 0, 1)
    assert (row["n"], row["n_wins"], row["n_losses"], row["n_draws"]) == (40, 0, 0, 40)
    assert row["length_controlled_win_rate"] == pytest.approx(50, abs=1e-9)
    assert row["length_controlled_standard_error"] == pytest.approx(0, abs=1e-9)
    assert row["verdict"] == "too few to tell"


def test_both_orders_are_one_observation_and_half_a_pair_is_none(tmp_path):
    pairs = [(2, 2), (2, 1), (1, 2), (1.5, 2), (1, 1), (2, None), (None, None)]
    entries = [entry(n, p[0]) for n, p in enumerate(pairs)]
    entries += [entry(n, p[1], swapped=True) for n, p in enumerate(pairs)]
    entries += [entry(99, 2)]  # was never asked in the other order
    row = only(tmp_path, entries)
    y = [1, 0.5, 0.5, 0.75, 0]
    assert row["win_rate"] == 100 * statistics.mean(y)
    assert row["standard_error"] == pytest.approx(100 * statistics.stdev(y) / 5**0.5)
    assert (row["n"], row["n_missing"], row["flip_rate"]) == (5, 3, 2 / 5)
    assert (row["n_wins"], row["n_losses"], row["n_draws"]) == (2, 1, 2)


def test_one_order_a_line_drawn_by_lot_is_not_half_a_pair(tmp_path):
    row = only(tmp_path, [entry(n, 1 + n % 2, swapped=n % 3 == 0) for n in range(12)])
    assert (row["n"], row["n_missing"], row["flip_rate"], row["win_rate"]) == (12, 0, None, 50)


def test_identical_outputs_are_even(tmp_path):
    rng = random.Random(5)
    outputs = [text(rng.randrange(1, 500)) for _ in range(30)]
    entries = [entry(n, 1.5, output_1=o, output_2=o) for n, o in enumerate(outputs)]
    row = only(tmp_path, entries)
    assert row["win_rate"] == 50 and row["standard_error"] == 0 and row["n_draws"] == 30
    assert row["length_controlled_win_rate"] == pytest.approx(50, abs=1e-9)


@pytest.mark.parametrize("models", [1, 3])
def test_the_other_model_s_view_is_the_mirror_image(tmp_path, models):
    """In both orders, with soft preferences and missing ones; with company the others turn too."""
    rng, here, there = random.Random(6), [], []
    for model in range(models):
        name = f"model {model}"
        entries = judged(model, 90, 0.3 * model, 1 + 0.3 * model, generator_2=name)
        for one in entries:
            one["preference"] = rng.choice([None, one["preference"], rng.uniform(1, 2)])
        entries += [
            one | {"swapped": True, "preference": rng.choice([1, 1.5, 2])} for one in entries
        ]
        here.append(write(tmp_path / f"{model}.json", entries))
        turned = [one | {"generator_1": "base", "generator_2": name} for one in mirror(entries)]
        there.append(write(tmp_path / f"{model} mirrored.json", turned))
    for a, b in zip(leaderboard(here), leaderboard(there), strict=True):
        for name in MIRRORED:
            assert a[name] + b[name] == pytest.approx(100, abs=1e-7), name
        for name in SAME:
            assert a[name] == pytest.approx(b[name], abs=1e-7), name
        assert (a["n_wins"], a["n_losses"]) == (b["n_losses"], b["n_wins"])
        assert a["win_rate_low"] + b["win_rate_high"] == pytest.approx(100)
        assert (a["mean_length"], a["baseline_mean_length"]) == (
            b["baseline_mean_length"],
            b["mean_length"],
        )
        assert abs(a["win_rate"] - 50) > 1 and a["n_missing"] > 0 and a["flip_rate"] > 0


@pytest.mark.parametrize("preference", [1, 2])
def test_nothing_but_wins_or_losses_is_no_accident(tmp_path, preference):
    entries = [one | {"preference": preference} for one in judged(7, 50, 0, 1.3)]
    row = only(tmp_path, entries)
    wanted = 100 * (preference - 1)
    assert row["win_rate"] == wanted
    assert row["length_controlled_win_rate"] == pytest.approx(wanted, abs=1e-6)
    assert row["length_controlled_standard_error"] == pytest.approx(0, abs=1e-6)
    assert row["win_rate_high"] - row["win_rate_low"] > 5  # 50 of 50 is not certainty


# ---------------------------------------------------------------- the fit


def drawn(seed: int, models: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    longer = rng.normal(60, 200, (models, n))
    z = np.linspace(-0.5, 0.7, models)[:, None] + np.tanh(longer / 200) + rng.normal(0, 1, n)
    won = (rng.random((models, n)) < 1 / (1 + np.exp(-z))).astype(float)
    won[rng.random((models, n)) < 0.05] = np.nan
    return won, longer


@pytest.mark.parametrize("models", [1, 3])
def test_the_fit_maximises_what_the_docstring_says(models):
    won, longer = drawn(8, models, 25)
    n = 25 if models > 1 else 0
    s = math.sqrt(np.mean([longer[tuple(place)] ** 2 for place in np.argwhere(~np.isnan(won))]))

    def objective(b) -> float:
        total = -(b[models] ** 2) / 20 - sum(h * h for h in b[models + 1 :]) / 2
        for m, i in product(range(models), range(25)):
            if not math.isnan(won[m, i]):
                h = b[models + 1 + i] if n else 0
                p = 1 / (1 + math.exp(-(b[m] + b[models] * math.tanh(longer[m, i] / s) + h)))
                total += won[m, i] * math.log(p) + (1 - won[m, i]) * math.log(1 - p)
        return total

    seen = ~np.isnan(won)
    b, _, _ = fit_logistic(np.where(seen, won, 0), np.tanh(longer / s) * seen, seen)
    assert len(b) == models + 1 + n
    for place in range(len(b)):
        for change in (-1e-3, 1e-3):
            assert objective(b) > objective([v + change * (k == place) for k, v in enumerate(b)])
    rates, _, f = length_controlled(won, longer)
    h = b[models + 1 :] if n else np.zeros(25)
    wanted = [np.mean(1 / (1 + np.exp(-(b[m] + h[seen[m]])))) for m in range(models)]
    assert rates == pytest.approx(wanted, abs=1e-12) and f == b[models]


@pytest.mark.parametrize("models", [1, 2])
def test_the_error_is_that_of_leaving_one_out_at_a_time(models):
    """An infinitesimal jackknife and a real one agree, and both with how rates really scatter."""
    won, longer = drawn(9, models, 150)
    longer[longer == np.abs(longer).max()] = 0  # the scale is held, in fact and in the formula
    _, errors, _ = length_controlled(won, longer)
    kept = [np.delete(np.arange(150), i) for i in range(150)]
    left_out = np.array([length_controlled(won[:, k], longer[:, k])[0] for k in kept])
    jackknife = np.sqrt(149 / 150 * ((left_out - left_out.mean(0)) ** 2).sum(0))
    assert errors == pytest.approx(jackknife, rel=0.05)


def test_errors_tell_how_rates_scatter():
    found = [length_controlled(*drawn(100 + seed, 2, 100))[:2] for seed in range(150)]
    rates, errors = map(np.array, zip(*found, strict=True))
    assert errors.mean(0) == pytest.approx(rates.std(0), rel=0.15)


# ---------------------------------------------------------------- users' mistakes


@pytest.mark.parametrize(
    ("second", "told"),
    [
        (entry(2, 2.5), "record 2: preference 2.5: 1 .* to 2 .* was expected"),
        (entry(2, 0.5), "record 2: preference 0.5"),
        (entry(2, -1), "record 2: preference -1"),
        (entry(2, math.inf), "record 2: preference inf"),
        (entry(2, "2"), "record 2: preference '2'"),
        (entry(2, True), "record 2: preference True"),
        (entry(1, 2), "record 2: 'instruction 1' again in the same order: keep one"),
        (entry(1, 2, swapped=True, output_2="else"), "record 2: 'instruction 1' .* other outputs"),
        (entry(2, 2, swapped="yes"), "record 2: swapped 'yes': true or false was expected"),
        (entry(2, 2, output_2=None), "record 2: output_2: a string was expected"),
        (entry(2, 2, generator_2=7), "record 2: generator_2: a string was expected"),
        ([1, 2], "record 2: an object with instruction"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line_naming_the_place(tmp_path, second, told):
    file = tmp_path / "annotations.json"
    file.write_text(f"[\n{json.dumps(entry(1, 2))},\n{json.dumps(second)}\n]")
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}, {told}") as caught:
        leaderboard([file])
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_named(tmp_path):
    one = entry(1, 2)
    del one["generator_1"]
    with pytest.raises(ValueError, match="record 1: generator_1: a string was expected"):
        leaderboard([write(tmp_path / "a.json", [one])])


def test_files_that_do_not_belong_together(tmp_path):
    five = [entry(n, 2) for n in range(5)]
    a = write(tmp_path / "a.json", five)
    fewer = write(tmp_path / "b.json", [one | {"generator_2": "new"} for one in five[1:]])
    told = f"^{fewer}: new against base has other instructions than tuned in {a}: 1 .*"
    told += rf"'instruction 0' in {a}"
    with pytest.raises(ValueError, match=told):
        leaderboard([a, fewer])
    with pytest.raises(ValueError, match=r"'instruction 0' in .*a.json"):
        leaderboard([fewer, a])
    with pytest.raises(ValueError, match=f"^{a}: tuned against base is already in {a}"):
        leaderboard([a, a])
    silent = write(tmp_path / "c.json", [one | {"preference": None} for one in five])
    with pytest.raises(ValueError, match=f"^{silent}: tuned against base: no preference"):
        leaderboard([silent])
    empty = write(tmp_path / "d.json", [])
    with pytest.raises(ValueError, match=f"^{empty}: no annotations in it"):
        leaderboard([empty])


def test_files_are_fitted_together_in_whatever_order_their_lines_are(tmp_path):
    files = [judged(n, 60, 0.3, 1 + n / 2, generator_2=f"model {n}") for n in range(3)]
    here = leaderboard([write(tmp_path / f"{n}.json", e) for n, e in enumerate(files)])
    for entries in files[1:]:
        random.Random(0).shuffle(entries)
    there = leaderboard([write(tmp_path / f"{n}.json", e) for n, e in enumerate(files)])
    for a, b in zip(here, there, strict=True):
        assert {k: v for k, v in a.items() if isinstance(v, float)} == pytest.approx(
            {k: v for k, v in b.items() if isinstance(v, float)}
        )
    assert len({row["length_coefficient"] for row in here}) == 1


def test_several_comparisons_in_a_file_and_judges_who_are_not_fitted_together(tmp_path):
    """A second judge's opinion leaves the first one's row as it was."""
    first, second = judged(1, 80, 0.2, 1.4), judged(2, 80, 0.9, 1.4, annotator="another")
    together = leaderboard([write(tmp_path / "both.json", [*first, *second])])
    assert together == [only(tmp_path, first), only(tmp_path, second)]
    assert [row["annotator"] for row in together] == ["judge", "another"]


# ---------------------------------------------------------------- is it a difference?


@pytest.mark.parametrize("n", [1, 2, 5, 6, 11])
def test_the_sign_test_counts_all_throws_of_a_coin(n):
    throws = [sum(throw) for throw in product([0, 1], repeat=n)]
    for wins in range(n + 1):
        uneven = abs(2 * wins - n)
        share = Fraction(sum(abs(2 * heads - n) >= uneven for heads in throws), len(throws))
        assert sign_test(wins, n - wins) == pytest.approx(float(share), abs=1e-15)


def test_the_sign_test_of_alpaca_s_own_comparison():
    assert sign_test(0, 0) == 1
    assert sign_test(90, 89) == sign_test(89, 90) == 1
    assert sign_test(5000, 5200) == pytest.approx(0.0488, abs=3e-4)


@pytest.mark.parametrize(("wins", "n"), [(0, 1), (0, 20), (7, 9), (89.5, 179), (20, 20)])
def test_wilson_s_bounds_are_the_rates_that_just_allow_what_was_seen(wins, n):
    for bound, sign in zip(wilson(wins, n), (1, -1), strict=True):
        reach = bound + sign * Z * math.sqrt(bound * (1 - bound) / n)
        assert reach == pytest.approx(wins / n, abs=1e-7)


def test_wilson_s_bounds_of_a_half_of_hundred():
    assert wilson(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert wilson(0, 0) == (0, 1)


def test_too_few_to_tell():
    assert [describe_difference(n, 0) for n in (0, 5, 6)] == [
        "too few to tell",
        "too few to tell",
        "better",
    ]
    assert (
        describe_difference(0, 6) == "worse" and describe_difference(3, 3, 200) == "too few to tell"
    )
    assert describe_difference(90, 89) == "too few to tell"
    assert (
        describe_difference(500, 500) == "about equal"
        and describe_difference(500, 500, 5000) == "about equal"
    )
    assert describe_difference(560, 440) == "better" and describe_difference(440, 560) == "worse"


def test_agreement_by_brute_force():
    rng = random.Random(10)
    raters = []
    for _ in range(3):
        raters.append({i: rng.choice("AABt") for i in range(30) if rng.random() < 0.8})
    items = [[rater[i] for rater in raters if i in rater] for i in range(30)]
    items = [labels for labels in items if len(labels) > 1]
    pairs = [(a, b) for labels in items for a, b in permutations(labels, 2)]
    urn = list(enumerate(label for labels in items for label in labels))
    expected = statistics.mean(a != b for (_, a), (_, b) in permutations(urn, 2))
    # Each label once, against the others of its item.
    apart = [[a != b for a, b in permutations(labels, 2)] for labels in items]
    observed = sum(sum(d) / (len(labels) - 1) for d, labels in zip(apart, items, strict=True))
    observed /= len(urn)
    found = agreement(raters)
    assert found.items == len(items) < 30
    assert found.percent == pytest.approx(100 * statistics.mean(a == b for a, b in pairs))
    assert found.alpha == pytest.approx(1 - observed / expected)


def test_agreement_at_its_limits():
    same, other = {1: "A", 2: "B", 3: "tie"}, {1: "B", 2: "A", 3: "tie"}
    assert agreement([same, same]) == (100, 1, 3)
    assert agreement([{1: "A", 2: "B"}, {1: "B", 2: "A"}]).alpha < 0
    assert agreement([same, other]).percent == pytest.approx(100 / 3)
    assert agreement([{1: "A", 2: "A"}, {1: "A", 2: "A"}]) == (100, None, 2)
    assert agreement([same]) == agreement([]) == agreement([{1: "A"}, {2: "A"}]) == (None, None, 0)


# ---------------------------------------------------------------- data/eval_instructions.jsonl

TASKS = [json.loads(line) for line in (ROOT / "data/eval_instructions.jsonl").open("rb")]
SEEDS = [json.loads(line) for line in (ROOT / "data/seed_tasks.jsonl").open("rb")]


def answer(opening: str) -> tuple[str, str]:
    (task,) = [task for task in TASKS if task["instruction"].startswith(opening)]
    return task["instances"][0]["input"], task["instances"][0]["output"]


def test_evaluation_instructions_have_the_published_schema():
    assert len(TASKS) >= 120
    for number, task in enumerate(TASKS):
        assert list(task) == ["id", "motivation_app", "instruction", "instances"]
        assert task["id"] == f"user_oriented_task_{number}"
        assert task["instances"] and all(set(i) == {"input", "output"} for i in task["instances"])
        assert task["motivation_app"] and task["instruction"]
        assert all(one["output"] for one in task["instances"])
        assert normalize_record(task)[0]["instruction"] == task["instruction"]
    given = sum(bool(one["input"]) for task in TASKS for one in task["instances"])
    assert 50 <= given <= len(TASKS) - 50
    assert len({task["motivation_app"] for task in TASKS}) >= 50


def test_evaluation_instructions_are_clean_text():
    for task in TASKS:
        for one in task["instances"]:
            for part in (task["motivation_app"], task["instruction"], one["input"], one["output"]):
                assert part == part.strip() == unicodedata.normalize("NFC", part)
                assert all(c.isascii() or c in "áèßóú¿" for c in part), part
                assert all(c.isprintable() or c == "\n" for c in part.replace("\t", "?"))
                assert not re.search(r"https?:|www\.", part)


def test_evaluation_instructions_are_all_different_and_none_is_a_seed():
    asked = [task["instruction"] for task in TASKS]
    pool, seeds = Pool(asked), Pool([seed["instruction"] for seed in SEEDS])
    for number, text in enumerate(asked):
        scores = pool.scores(text)
        scores[number] = 0
        assert scores.max() < 0.6, (text, asked[scores.argmax()])
        assert seeds.scores(text).max() < 0.7, text


def test_evaluation_instructions_have_no_known_defect():
    earlier: set = set()
    flagged = {task["id"]: lint.flags_of(normalize_record(task), earlier) for task in TASKS}
    assert not {name: flags for name, flags in flagged.items() if flags}


def test_references_keep_to_the_length_asked_for():
    limit = re.compile(r"(?:at most|no more than|fewer than) (\d+) words|(\d+) words at most")
    checked = 0
    for task in TASKS:
        if found := limit.search(task["instruction"]):
            words = len(task["instances"][0]["output"].split())
            assert words <= int(found[1] or found[2]), (task["id"], words)
            checked += 1
    assert checked >= 7
    assert len(answer("Make a post of no more than 200")[1]) <= 200
    assert len(answer("Summarise the change as a commit")[1].splitlines()[0]) <= 50


def test_code_in_references_does_what_was_asked(capsys):
    def run(opening: str, part: int = 1, upto: str = "\n\n\n") -> dict:
        names: dict = {}
        exec(answer(opening)[part].split(upto)[0], names)  # our own file
        return names

    busy = run("Write a Python function busy", upto="\n\nSorting")["busy"]
    assert (busy([(1, 4), (3, 6), (8, 9)]), busy([(4, 5), (1, 4), (2, 3)]), busy([])) == (6, 4, 0)
    code = answer("This search sometimes never returns")[1]
    names: dict = {}
    exec(code[code.index("def ") :], names)
    assert [names["find"]([2, 4, 4, 7], x) for x in range(9)] == [0, 0, 0, 1, 1, 3, 3, 3, 4]
    code = answer("Code a function gap")[1]
    exec(code[code.index("def ") : code.index("\n\ngap(")], names)
    assert names["gap"]("22:40", "06:15") == 455 and names["gap"]("06:00", "22:01") == 961
    count = run("Rewrite the function without recursion")["count"]
    before = run("Rewrite the function without recursion", 0)["count"]
    assert [count(n) for n in range(20)] == [before(n) for n in range(20)] and count(100_000) > 0
    run("What does this program print", 0)
    printed = answer("What does this program print")[1].split("\n\n")[0]
    assert capsys.readouterr().out == printed + "\n"
    version = answer("I need a regular expression for version")[1].split("\n")[0]
    assert all(re.search(version, text) for text in ("0.0.1", "1.4.12"))
    for text in ("1.04.2", "1.4", "1.4.12.3", "01.1.1", "1.1.02"):
        assert not re.search(version, text)


def test_sums_in_references():
    payment = 12_000 * 0.005 / (1 - 1.005**-36)
    assert f"{payment:.2f}" in answer("How much do I pay a month for a loan")[1]
    monthly = 10_000 * (1 + 0.031 / 12) ** 12
    assert f"{monthly:,.2f}" in answer("Which account pays more")[1]
    assert f"{monthly - 10_312:.2f} more" in answer("Which account pays more")[1]
    tasks = {"A": (90, 6), "B": (60, 5), "C": (120, 9), "D": (45, 3), "E": (75, 4)}
    fits = []
    for taken in product([0, 1], repeat=5):
        chosen = [name for name, yes in zip(tasks, taken, strict=True) if yes]
        minutes, value = (sum(tasks[name][k] for name in chosen) for k in (0, 1))
        fits += [(value, chosen, minutes)] if minutes <= 240 else []
    best = sorted(fits)[-2:]
    assert best[1] == (17, ["B", "C", "D"], 225) and best[0][0] < 17
    codes = []
    for number in range(1000, 10_000):
        a, b, c, d = map(int, str(number))
        if len({a, b, c, d}) == 4 and 0 not in (b, c, d) and a == 2 * d and b == a + d:
            codes += [number] if a + b + c + d == 19 else []
    assert codes == [4672, 6913]
    assert "4672 and 6913" in answer("Crack the four-digit code")[1]
