"""The fits of length: their objectives, their errors, and AlpacaEval's file for length control."""

import json
import math
from itertools import product

import numpy as np
import pytest
from helpers.annotations import difficulties, gamed_lines, judged_with, write, write_csv
from helpers.commands import assert_refused

from alpaca.evaluation.length_control import (
    STRENGTHS,
    fit_cross_validated,
    fit_jointly,
    fit_l1,
    length_controlled,
    length_controlled_v1,
    read_lc_file,
)

# ---------------------------------------------------------------- several models


def make_scores(seed: int, models: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    longer = rng.normal(60, 200, (models, n))
    z = np.linspace(-0.5, 0.7, models)[:, None] + np.tanh(longer / 200) + rng.normal(0, 1, n)
    scores = (rng.random((models, n)) < 1 / (1 + np.exp(-z))).astype(float)
    scores[rng.random((models, n)) < 0.05] = np.nan
    return scores, longer


@pytest.mark.parametrize("models", [2, 3])
def test_the_fit_maximises_the_docstrings_objective(models):
    scores, longer = make_scores(8, models, 25)
    seen = ~np.isnan(scores)
    s = math.sqrt(np.mean([longer[tuple(place)] ** 2 for place in np.argwhere(seen)]))

    def objective(b) -> float:
        total = -(b[models] ** 2) / 20 - sum(h * h for h in b[models + 1 :]) / 2
        for m, i in np.argwhere(seen):
            h = b[models + 1 + i]
            p = 1 / (1 + math.exp(-(b[m] + b[models] * math.tanh(longer[m, i] / s) + h)))
            total += scores[m, i] * math.log(p) + (1 - scores[m, i]) * math.log(1 - p)
        return total

    b, _, _ = fit_jointly(np.where(seen, scores, 0), np.tanh(longer / s) * seen, seen)
    assert len(b) == models + 1 + 25
    for place, change in product(range(len(b)), (-1e-3, 1e-3)):
        assert objective(b) > objective([v + change * (k == place) for k, v in enumerate(b)])
    rates, _, f = length_controlled(scores, longer)
    h = b[models + 1 :]
    wanted = [np.mean(1 / (1 + np.exp(-(b[m] + h[seen[m]])))) for m in range(models)]
    assert rates == pytest.approx(wanted, abs=1e-12) and f == b[models]


@pytest.mark.parametrize("models", [2, 3])
def test_the_error_is_that_of_leaving_one_instruction_out(models):
    """The infinitesimal jackknife agrees with the ordinary one."""
    n = 80
    scores, longer = make_scores(9, models, n)
    longer[longer == np.abs(longer).max()] = 0  # the scale s is held, as in the formula
    _, errors, _ = length_controlled(scores, longer)
    others = [np.delete(np.arange(n), i) for i in range(n)]
    left_out = np.array([length_controlled(scores[:, k], longer[:, k])[0] for k in others])
    jackknife = np.sqrt((n - 1) / n * ((left_out - left_out.mean(0)) ** 2).sum(0))
    assert errors == pytest.approx(jackknife, rel=0.05)


# ---------------------------------------------------------------- one model and a file


@pytest.fixture
def lc_file(tmp_path):
    return write_csv(tmp_path / "df_gamed.csv", gamed_lines(difficulties(60)))


def test_the_l1_fit_minimises_the_docstrings_objective(lc_file):
    file, rng = read_lc_file(lc_file), np.random.default_rng(0)
    weight = rng.uniform(0.1, 1, len(file.y))
    x = np.c_[file.x[:, :2], rng.normal(0, 1, len(file.y))]  # the third explains nothing
    zeros = set()
    for C in STRENGTHS:
        b = fit_l1(x, file.y, weight, C)

        def objective(b, C=C):
            p = 1 / (1 + np.exp(-(x @ b)))
            terms = file.y * np.log(p) + (1 - file.y) * np.log(1 - p)
            return sum(map(abs, b)) - C * (weight * terms).sum()

        for place, change in product(range(3), (-1e-3, 1e-3)):
            assert objective(b) < objective([v + change * (k == place) for k, v in enumerate(b)])
        zeros.add(int((b == 0).sum()))
    assert {0, 1, 3} <= zeros, "a stronger penalty sets more to 0"


def test_the_v1_error_is_that_of_leaving_one_instruction_out(lc_file, monkeypatch):
    """With C held."""
    held = "alpaca.evaluation.length_control.fit_cross_validated"
    monkeypatch.setattr(held, lambda x, y, weight: fit_l1(x, y, weight, 2.8))
    file, entries = read_lc_file(lc_file), judged_with(difficulties(60), 1, quality=1.5)
    scores = np.array([one["preference"] - 1 for one in entries])
    longer = np.array([len(one["output_2"]) - len(one["output_1"]) for one in entries], float)
    rate, error, _ = length_controlled_v1(scores, longer, file)
    left_out = []
    for i in range(60):
        keep = np.arange(60) != i
        fewer = file._replace(difficulty=file.difficulty[keep])
        left_out.append(length_controlled_v1(scores[keep], longer[keep], fewer)[0])
    jackknife = math.sqrt(59 / 60 * np.sum((np.array(left_out) - np.mean(left_out)) ** 2))
    assert error == pytest.approx(jackknife, rel=0.08) and 0.6 < rate < 0.8


def test_score_reads_the_file_for_a_model_alone_and_among_others(command, tmp_path, lc_file):
    """Each model is fitted alone, so others change nothing; a rate needs no verdict on all."""
    files = []
    for seed, name in enumerate(("one", "two")):
        entries = judged_with(difficulties(60), seed, generator_2=name)
        entries[7]["preference"] = None
        files.append(write(tmp_path / f"{name}.json", entries))
    alone = json.loads(command("score", files[0], "--lc-file", lc_file, "--json")[1])
    both = json.loads(command("score", *files, "--lc-file", lc_file, "--json")[1])
    assert both[:1] == alone and both[0]["n_missing"] == 1
    assert alone[0]["length_control"] == "length_controlled_v1"
    plain = json.loads(command("score", files[0], "--json")[1])[0]
    changed = {name for name in plain if plain[name] != alone[0][name]}
    assert changed == {
        "length_control", "length_controlled_win_rate", "length_controlled_standard_error",
        "length_coefficient",
    }  # fmt: skip
    assert alone[0]["length_coefficient"] > 0.3, "this judge likes long answers"
    out = command("score", *files, "--lc-file", lc_file)[1]
    assert out.splitlines()[-1].endswith("length control: length_controlled_v1")
    assert "no length-controlled rate" not in out


def test_a_file_of_difficulties_gives_the_rate_called_noreg(command, tmp_path, lc_file):
    """As AlpacaEval writes it, the column of numbers has a name or none."""
    hardness = difficulties(60)
    file = write(tmp_path / "a.json", judged_with(hardness, 0))
    rows = []
    for name in ("index", ""):
        lines = [{name: n, "instruction_difficulty": h} for n, h in enumerate(hardness)]
        path = write_csv(tmp_path / "instruction_difficulty.csv", lines)
        rows += json.loads(command("score", file, "--lc-file", path, "--json")[1])
    assert rows[0] == rows[1] and rows[0]["length_control"] == "noreg"
    (v1,) = json.loads(command("score", file, "--lc-file", lc_file, "--json")[1])
    assert v1["length_controlled_win_rate"] != rows[0]["length_controlled_win_rate"]


def test_folds_are_dealt_from_the_end_as_group_k_fold_does(monkeypatch):
    seen = []

    def fit(x, y, weight, C):
        seen.append(set(range(12)) - set(y.astype(int)))
        return np.ones(3)

    monkeypatch.setattr("alpaca.evaluation.length_control.fit_l1", fit)
    fit_cross_validated(np.ones((12, 3)), np.arange(12.0), np.ones(12))
    assert seen[:: len(STRENGTHS)] == [{1, 6, 11}, {0, 5, 10}, {4, 9}, {3, 8}, {2, 7}, set()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction_difficulty": "hard"}, "df_gamed.csv, line 4: AlpacaEval's df_gamed.csv was"),
        ({"instruction_difficulty": "nan"}, "line 4: "),
        ({"not_gamed_baseline": "no"}, "line 4: "),
        ({"index": 2.5}, "line 4: "),
        ({"index": 99}, "column index must have all numbers from 0"),
    ],
)
def test_a_damaged_lc_file_is_one_line_that_names_its_line(command, tmp_path, change, message):
    lines = gamed_lines(difficulties(6))
    lines[2] |= change
    path = write_csv(tmp_path / "df_gamed.csv", lines[:6])
    file = write(tmp_path / "a.json", judged_with(difficulties(6), 0))
    assert_refused(command("score", file, "--lc-file", path), str(path), message)


def test_an_lc_file_of_other_instructions_is_refused(command, tmp_path, lc_file):
    entries = judged_with(difficulties(60), 0)
    fewer = write(tmp_path / "fewer.json", entries[:-1])
    words = f"{fewer}: 59 instructions by tuned, but {lc_file} has difficulties for 60"
    assert_refused(command("score", fewer, "--lc-file", lc_file), words)
    whole = write(tmp_path / "whole.json", entries)
    turned = [one | {"generator_2": "other"} for one in entries[::-1]]
    other = write(tmp_path / "other.json", turned)
    assert_refused(
        command("score", whole, other, "--lc-file", lc_file),
        f"{other}: 60 instructions by other, but",
    )
    code, _, err = command("score", other, "--lc-file", lc_file)
    assert code == 0 and f"{other}: difficulties and preferences do not correlate" in err
    assert command("score", whole, "--lc-file", lc_file)[2] == ""
    table = tmp_path / "table.csv"
    table.write_text("a,b\n1,2\n")
    assert_refused(command("score", whole, "--lc-file", table), f"{table}, line 2: AlpacaEval")
    table.write_text("index,instruction_difficulty,preference\n0,1,1\n")
    assert_refused(command("score", whole, "--lc-file", table), "KeyError: 'std_delta_len'")
