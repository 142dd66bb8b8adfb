"""Win rates as they would be if the model's answers were as long as the baseline's.

Judges favour long answers. Following AlpacaEval 2 (arXiv:2404.04475), a logistic model separates
length from quality. For model m and instruction i, with y the score from 0 to 1, d the characters
by which the model's answer is longer, and s the root mean square of d over all models,

    P(y_mi) = sigmoid(q_m + f tanh(d_mi / s) + h_i)

q_m is the model's quality, f the judge's preference for length, h_i how easy instruction i is for
every model. They maximise  Σ y log P + (1 - y) log (1 - P) - f² / 20 - Σ h_i² / 2  (Newton's
method). Setting d to 0 gives the length-controlled win rate, mean_i sigmoid(q_m + h_i). Its
standard error is an infinitesimal jackknife: how much it moves when one instruction weighs a little
more. As q has no penalty, Σ (P - y) = 0 for each model: where lengths are equal, rate and error are
exactly the raw ones. Answers cut to 0.55 or padded to 1.8 times their length moved the raw rate
from 24 to 57, this one from 33 to 40. That all answers are longer by as much cannot be detected.

AlpacaEval's estimator differs, so its published rates differ by some points. It reads h from a file
fitted once over many models, with a factor per model; ours fits h to the models at hand (and has
none for a single model), so a rate depends a little on the models it is scored with. Its f is the
model's own; ours is shared by all models before one judge. Its s is a standard deviation; ours does
not saturate tanh where all answers are long. Its penalty is L1, tuned by cross-validation.
"""

import math

import numpy as np

PRECISION_F, PRECISION_H = 0.1, 1.0  # f and h have normal priors around 0, variances 10 and 1


def length_controlled(
    scores: np.ndarray, longer: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Rates (M), standard errors (M) and f, for M models on N instructions. `scores` (M, N) may
    hold nan; `longer` (M, N) is by how many characters the model's answer is longer."""
    M, N = scores.shape
    seen = ~np.isnan(scores)
    n, y = seen.sum(1), np.where(seen, scores, 0.0)
    s = math.sqrt(np.mean(longer[seen] ** 2)) or 1.0
    t = np.tanh(longer / s) * seen
    b, residuals, hessian = fit_logistic(y, t, seen)
    q, h = b[:M, None], b[M + 1 :] if M > 1 else 0.0
    p = sigmoid(q + h) * seen  # (M, N), with d = 0
    w = p * (1 - p)
    rates = p.sum(1) / n
    # The jackknife. If instruction i weighs more, n · rate moves by p - rate, and because the
    # parameters move by hessian^-1 @ (gradient of i's terms of the objective). That gradient is
    # the residuals for q, those times t for f, and 0 for h_i, where the terms are at a maximum.
    rate_gradient = np.c_[np.diag(w.sum(1)), np.zeros(M), w[:, : len(b) - M - 1]]  # (M, parameters)
    gradient = np.zeros((len(b), N))
    gradient[:M], gradient[M] = residuals, (residuals * t).sum(0)
    influence = (p - rates[:, None]) * seen + rate_gradient @ np.linalg.solve(hessian, gradient)
    return rates, np.sqrt((influence**2).sum(1) / n / np.maximum(n - 1, 1)), float(b[M])


def fit_logistic(
    y: np.ndarray, t: np.ndarray, seen: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The parameters b = (q, f, h) (M + 1 + N) at the maximum, the residuals y - P (M, N) and the
    negative Hessian there. A single model has no h: there would be one per observation."""
    M, N = y.shape
    N = N if M > 1 else 0
    precision = np.r_[np.zeros(M), PRECISION_F, np.full(N, PRECISION_H)]

    def sum_by_parameter(x: np.ndarray) -> np.ndarray:
        """Σ x dz/db for each parameter, z being the argument of the sigmoid; x (M, N)."""
        return np.r_[x.sum(1), (x * t).sum(), x.sum(0)[:N]]

    b = np.zeros(M + 1 + N)
    for _ in range(200):
        p = sigmoid(b[:M, None] + b[M] * t + (b[M + 1 :] if N else 0)) * seen  # (M, N)
        w = p * (1 - p)
        hessian = np.diag(sum_by_parameter(w))
        hessian[:M, M + 1 :], hessian[M + 1 :, :M] = w[:, :N], w.T[:N]
        hessian[M] = hessian[:, M] = sum_by_parameter(w * t)
        hessian += np.diag(precision)
        gradient = sum_by_parameter(y - p) - precision * b
        if np.abs(gradient).max() < 1e-11 * y.shape[1]:
            return b, y - p, hessian
        b += np.linalg.solve(hessian, gradient)
    raise AssertionError("Newton's method did not reach the maximum of a concave function")


def sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))
