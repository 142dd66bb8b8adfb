"""Length-controlled win rates equal scikit-learn's on files of the published form."""

import csv
import json

import numpy as np
import pytest
from helpers.annotations import difficulties, gamed_lines, judged_with, write, write_csv
from helpers.parity import apart

from alpaca.evaluation.annotations import read_annotations
from alpaca.evaluation.length_control import length_controlled_v1, read_lc_file
from alpaca.evaluation.win_rate import leaderboard

sklearn = pytest.importorskip("sklearn", reason="the package scikit-learn is not installed")
from sklearn.linear_model import LogisticRegressionCV  # noqa: E402
from sklearn.metrics import make_scorer  # noqa: E402
from sklearn.model_selection import GroupKFold  # noqa: E402

N = 805


def log_loss(label, p, target, weight):
    """Labels are 0 or 1; `target` is the probability of the label."""
    target = np.where(label == 1, target, 1 - target)
    return -np.mean(weight * (target * np.log(p) + (1 - target) * np.log(1 - p)))


def peer_fit(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Every annotation twice, with label 1 and weight y, and with label 0 and weight 1 - y."""
    twice = np.tile(np.arange(len(y)), 2)
    label, target = np.repeat([1, 0], len(y)), np.r_[y, 1 - y]
    scorer = make_scorer(log_loss, response_method="predict_proba", greater_is_better=False)
    with sklearn.config_context(enable_metadata_routing=True):
        model = LogisticRegressionCV(
            cv=GroupKFold(5), scoring=scorer.set_score_request(target=True, weight=True),
            l1_ratios=(1,), solver="liblinear", fit_intercept=False, random_state=123,
            use_legacy_attributes=False,
        ).set_fit_request(sample_weight=True)  # fmt: skip
        model.fit(
            x[twice], label, sample_weight=target * weight[twice],
            groups=twice, target=target, weight=weight[twice],
        )  # fmt: skip
    return model.coef_[0]


def peer_rate(annotations, table) -> tuple[float, np.ndarray]:
    """AlpacaEval's length_controlled_v1 from the two files."""
    entries, lines = json.loads(annotations.read_text()), list(csv.DictReader(table.open()))
    hardness = {int(line["index"]): float(line["instruction_difficulty"]) for line in lines}
    gamed = [line for line in lines if line.get("preference")]
    x = [[float(g["std_delta_len"]), float(g["instruction_difficulty"]), 0] for g in gamed]
    y = [float(g["preference"]) for g in gamed]
    delta = np.array([len(e["output_1"]) - len(e["output_2"]) for e in entries])
    x += [[d, hardness[n], 1] for n, d in enumerate(delta / delta.std(ddof=1))]
    y += [np.nan if (p := e["preference"]) is None else (p or 1.5) - 1 for e in entries]
    x, y = np.array(x), np.array(y)
    weight, seen = np.where(x[:, 2], 1, 0.2 / 2), ~np.isnan(y)
    coefficients = peer_fit(np.c_[np.tanh(x[:, 0]), x[:, 1:]][seen], y[seen], weight[seen])
    equal = x[-N:] * [0, 1, 1]
    return 100 * np.mean(1 / (1 + np.exp(-equal @ coefficients))), coefficients


@pytest.mark.parametrize("noreg", [False, True], ids=["v1", "noreg"])
@pytest.mark.parametrize(("quality", "seed"), [(-4, 0), (-2, 1), (-0.5, 2), (0.3, 3), (1.5, 4)])
def test_length_controlled_v1_equals_scikit_learns(tmp_path, quality, seed, noreg):
    hardness = difficulties(N)
    lines = gamed_lines(hardness)
    if noreg:
        lines = [{"index": n, "instruction_difficulty": h} for n, h in enumerate(hardness)]
    entries = judged_with(hardness, seed, quality)
    for n, preference in ((3, None), (400, None), (80, 0), (90, 1.5), (100, 1), (110, 2)):
        entries[n]["preference"] = preference
    table = write_csv(tmp_path / "df_gamed.csv", lines)
    file = write(tmp_path / "annotations.json", entries)
    rate, coefficients = peer_rate(file, table)
    (row,) = leaderboard([file], table)
    (one,) = read_annotations(file)
    lc_file = read_lc_file(table)
    longer = one.lengths[1] - one.lengths[0]
    _, _, ours = length_controlled_v1(one.scores, longer, lc_file)
    far = abs(row["length_controlled_win_rate"] - rate)
    apart("length-controlled rate, in points: scikit-learn", far, 0.05)
    apart("its coefficients: scikit-learn", np.abs(ours - coefficients).max(), 0.005)
    assert abs(row["length_controlled_win_rate"] - row["win_rate"]) > 0.3
    turned = lc_file._replace(difficulty=lc_file.difficulty[::-1])
    _, _, control = length_controlled_v1(one.scores, longer, turned)
    assert np.abs(control - coefficients).max() > 0.05, "difficulties in another order"
