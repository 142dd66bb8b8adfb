"""Win rates as they would be if the model's answers were as long as the baseline's.

Judges favour long answers. Following AlpacaEval 2 (arXiv:2404.04475), a logistic model separates
length from quality. For model m and instruction i, with y the score from 0 to 1, d the characters
by which the model's answer is longer, and s the size of such differences,

    P(y_mi) = sigmoid(q_m + f tanh(d_mi / s) + h_i)

q_m is the model's quality, f the judge's preference for length, h_i how easy instruction i is for
every model. Setting d to 0 gives the length-controlled win rate, mean_i sigmoid(q_m + h_i). Its
standard error is an infinitesimal jackknife: how much it moves when one instruction weighs a little
more. That all answers are longer by as much cannot be detected. h comes from either of two sources:

length_controlled fits it to all models before one judge, with one f. All parameters maximise
Σ y log P + (1 - y) log (1 - P) - f² / 20 - Σ h_i² / 2. As q has no penalty, Σ (P - y) = 0 for each
model: where lengths are equal, rate and error are exactly the raw ones. A rate depends a little on
the models it is scored with, the less the more they are; a single model has no h.

length_controlled_v1 is AlpacaEval's estimator, for each model alone. A file has instruction i's
difficulty, fitted once over many models, and answers of two models that only gamed the length; they
keep f from explaining too much. With β = (f, g, q) and g the factor of the difficulty, it minimises
‖β‖₁ - C Σ weight (y log P + (1 - y) log (1 - P)), C from five-fold cross-validation.
"""

import csv
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alpaca.common.cli import finite
from alpaca.common.errors import UserError
from alpaca.common.files import read_text

PRECISION_F, PRECISION_H = 0.1, 1.0  # f and h have normal priors around 0, variances 10 and 1
STRENGTHS = np.logspace(-4, 4, 10)  # C
FOLDS = 5
GAMED_WEIGHT = 0.2 / 2  # of an answer by either of the two gamed models


def sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))


def standard_error(influence: np.ndarray, n: np.ndarray | int) -> np.ndarray:
    """From how n · rate moves with each instruction's weight, (…, N)."""
    return np.sqrt((influence**2).sum(-1) / n / np.maximum(n - 1, 1))


# ---------------------------------------------------------------- several models


def length_controlled(
    scores: np.ndarray, longer: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Rates (M), standard errors (M) and f, for M > 1 models on N instructions. `scores` (M, N) may
    hold nan; `longer` (M, N) is by how many characters the model's answer is longer."""
    M, N = scores.shape
    seen = ~np.isnan(scores)
    n, y = seen.sum(1), np.where(seen, scores, 0.0)
    s = math.sqrt(np.mean(longer[seen] ** 2)) or 1.0
    t = np.tanh(longer / s) * seen
    b, residuals, hessian = fit_jointly(y, t, seen)
    p = sigmoid(b[:M, None] + b[M + 1 :]) * seen  # (M, N), with d = 0
    w = p * (1 - p)
    rates = p.sum(1) / n
    # The jackknife. If instruction i weighs more, n · rate moves by p - rate, and because the
    # parameters move by hessian^-1 @ (gradient of i's terms of the objective). That gradient is
    # the residuals for q, those times t for f, and 0 for h_i, where the terms are at a maximum.
    rate_gradient = np.c_[np.diag(w.sum(1)), np.zeros(M), w]  # (M, parameters)
    gradient = np.zeros((len(b), N))
    gradient[:M], gradient[M] = residuals, (residuals * t).sum(0)
    influence = (p - rates[:, None]) * seen + rate_gradient @ np.linalg.solve(hessian, gradient)
    return rates, standard_error(influence, n), float(b[M])


def fit_jointly(
    y: np.ndarray, t: np.ndarray, seen: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The parameters b = (q, f, h) (M + 1 + N) at the maximum, the residuals y - P (M, N) and the
    negative Hessian there, by Newton's method."""
    M, N = y.shape
    precision = np.r_[np.zeros(M), PRECISION_F, np.full(N, PRECISION_H)]

    def sum_by_parameter(x: np.ndarray) -> np.ndarray:
        """Σ x dz/db for each parameter, z being the argument of the sigmoid; x (M, N)."""
        return np.r_[x.sum(1), (x * t).sum(), x.sum(0)]

    b = np.zeros(M + 1 + N)
    for _ in range(200):
        p = sigmoid(b[:M, None] + b[M] * t + b[M + 1 :]) * seen  # (M, N)
        w = p * (1 - p)
        hessian = np.diag(sum_by_parameter(w))
        hessian[:M, M + 1 :], hessian[M + 1 :, :M] = w, w.T
        hessian[M] = hessian[:, M] = sum_by_parameter(w * t)
        hessian += np.diag(precision)
        gradient = sum_by_parameter(y - p) - precision * b
        if np.abs(gradient).max() < 1e-11 * N:
            return b, y - p, hessian
        b += np.linalg.solve(hessian, gradient)
    raise AssertionError("Newton's method did not reach the maximum of a concave function")


# ---------------------------------------------------------------- one model and a file


class LengthControlFile(NamedTuple):
    difficulty: np.ndarray  # (N) of instruction 0, 1, … of the set
    x: np.ndarray  # (G, 3) tanh of lengths, difficulty, 0: answers of the gamed models
    y: np.ndarray  # (G) their scores

    @property
    def estimator(self) -> str:
        """Without gamed answers the rate differs: by 2.2 points on average, 13.7 at most."""
        return "length_controlled_v1" if len(self.y) else "noreg"


def read_lc_file(path: Path) -> LengthControlFile:
    """AlpacaEval's df_gamed.csv, or its instruction_difficulty.csv, which has difficulties only."""
    difficulty: dict[int, float] = {}
    gamed = []
    for number, record in enumerate(csv.DictReader(read_text(path).splitlines()), 2):
        try:
            index = int(record["index"] if "index" in record else record[""])
            hardness = finite(record["instruction_difficulty"])
            difficulty.setdefault(index, hardness)
            if "preference" in record:
                length = math.tanh(finite(record["std_delta_len"]))
                ours = {"True": 1.0, "False": 0.0}[record["not_gamed_baseline"]]
                gamed.append((length, hardness, ours, float(record["preference"] or "nan")))
        except (ValueError, KeyError, TypeError) as error:
            what = f"AlpacaEval's df_gamed.csv was expected ({type(error).__name__}: {error})"
            raise UserError(f"{path}, line {number}: {what}") from None
    if sorted(difficulty) != list(range(len(difficulty) or 1)):
        raise UserError(f"{path}: column index must have all numbers from 0: its instructions'")
    answers = np.array(gamed).reshape(-1, 4)
    hardness = np.array([difficulty[index] for index in range(len(difficulty))])
    return LengthControlFile(hardness, answers[:, :3], answers[:, 3])


def length_controlled_v1(
    scores: np.ndarray, longer: np.ndarray, file: LengthControlFile
) -> tuple[float, float, np.ndarray]:
    """Rate, standard error and β for one model's scores (N), which may hold nan."""
    N, ones = len(scores), np.ones(len(scores))
    s = float(longer.std(ddof=1)) if N > 1 else 0.0
    x = np.r_[file.x, np.c_[np.tanh(-longer / (s or 1.0)), file.difficulty, ones]]
    y = np.r_[file.y, scores]
    seen = ~np.isnan(y)
    weight = np.where(x[:, 2] == 1, 1.0, GAMED_WEIGHT)
    b = fit_cross_validated(x[seen], y[seen], weight[seen])
    equal = x[-N:] * (0, 1, 1)  # (N, 3), with d = 0
    p = sigmoid(equal @ b)
    rate = p.mean()
    # The jackknife again, of the parameters that are not 0. C stays, and cancels out.
    free = b != 0
    P = sigmoid(x @ b)
    residuals = np.where(seen, y - P, 0) * weight
    hessian = (x.T * (weight * seen * P * (1 - P))) @ x
    rate_gradient = (p * (1 - p)) @ equal
    moves = np.linalg.solve(hessian[free][:, free], rate_gradient[free])  # (free)
    influence = p - rate + residuals[-N:] * (x[-N:, free] @ moves)
    return float(rate), float(standard_error(influence, N)), b


def fit_cross_validated(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """β for the C whose fits have the least log loss on the fold that they were not fitted to."""
    fold = np.arange(len(y))[::-1] % FOLDS  # as scikit-learn's GroupKFold deals them
    losses = np.zeros(len(STRENGTHS))
    for k in range(FOLDS):
        train, test = fold != k, fold == k
        for n, C in enumerate(STRENGTHS):
            b = fit_l1(x[train], y[train], weight[train], C)
            losses[n] += np.mean(cross_entropy(x[test] @ b, y[test]) * weight[test])
    return fit_l1(x, y, weight, STRENGTHS[np.argmin(losses)])


def cross_entropy(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """-y log P - (1 - y) log (1 - P) with P = sigmoid(z)."""
    return np.logaddexp(0, z) - y * z


def fit_l1(x: np.ndarray, y: np.ndarray, weight: np.ndarray, C: float) -> np.ndarray:
    """β that minimises ‖β‖₁ + C Σ weight · cross entropy, by proximal Newton steps: the sum is
    replaced by its quadratic approximation, which is minimised over one coordinate at a time."""

    def objective(b: np.ndarray) -> float:
        return np.abs(b).sum() + C * (weight * cross_entropy(x @ b, y)).sum()

    b = np.zeros(x.shape[1])
    for _ in range(200):
        p = sigmoid(x @ b)
        gradient = C * x.T @ (weight * (p - y))
        hessian = C * (x.T * (weight * p * (1 - p))) @ x + 1e-12 * np.eye(len(b))
        step = minimise_quadratic(hessian, gradient, b) - b
        while objective(b + step) > objective(b) + 1e-12:  # too far for the approximation
            step = step / 2
        b = b + step
        if np.abs(step).max() < 1e-9:
            return b
    raise AssertionError("proximal Newton steps did not reach the minimum of a convex function")


def minimise_quadratic(hessian: np.ndarray, gradient: np.ndarray, b: np.ndarray) -> np.ndarray:
    """v that minimises ‖v‖₁ + gradient · (v - b) + (v - b) · hessian · (v - b) / 2."""
    v = b.copy()
    for _ in range(1000):
        before = v.copy()
        for j, curvature in enumerate(hessian.diagonal()):
            slope = gradient[j] + hessian[j] @ (v - b) - curvature * v[j]  # at v_j = 0
            v[j] = -math.copysign(max(abs(slope) - 1, 0), slope) / curvature
        if np.abs(v - before).max() < 1e-12:
            break
    return v
