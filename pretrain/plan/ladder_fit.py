"""Fits the laws of `pretrain.plan.loss` to the runs of a ladder. Needs scipy, which the extra `eval` brings.

The law of the loss is fitted as in Hoffmann et al. (2022): the sum of Huber losses of the residuals of log(loss), by
L-BFGS. The sum is not divided by the number of runs, since the optimizer would stop too early (Besiroglu et al., 2024).
Instead of their thousands of starts, the best of a grid of exponents is the start: for given exponents the other three
parameters are a linear problem.

The interval comes from a bootstrap: residuals of the runs, drawn with replacement, are added to the fitted losses, and
the law is fitted again. So every resampling keeps all sizes and lengths, without which five parameters could not be
determined. The residuals are scaled up for the degrees of freedom that the fit has used, and by a random factor for how
little as few residuals say of their own size: what makes Student's t wider than a normal distribution.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
from scipy.optimize import minimize, nnls  # type: ignore[import-untyped]

from pretrain.files import write_atomically
from pretrain.plan.ladder import LAW_PARAMETERS, LadderFit, Resampled, RungResult, check_design
from pretrain.plan.loss import LossLaw, PowerLaw

HUBER_DELTA = 1e-3
"""Residuals of log(loss) above this count linearly, as in Hoffmann et al. (2022)."""
EXPONENTS = (0.05, 0.15, 0.3, 0.5, 0.8, 1.3)
"""The grid of exponents. Its ends bound the fit: no published exponent comes near them, and a few runs with noise would
otherwise be fitted by a step."""
LARGEST_LOG = 20.0
"""Bound of the logarithms of the other parameters, so that no step of the optimizer overflows."""
STARTS = 3
"""Number of points of the grid, the best ones, that the optimizer starts from."""
RESAMPLINGS = 200
SEED = 1234
TINY = 1e-12


def fit_ladder(
    rungs: list[RungResult], metric: str, vocab_size: int, resamplings: int = RESAMPLINGS
) -> LadderFit:
    """Fit all laws. Raises ConfigError where the runs are too few."""
    best = best_rungs(rungs)
    check_design([(rung.n_parameters, rung.tokens) for rung in best])
    sizes = np.array([rung.n_parameters for rung in best], dtype=float)
    tokens = np.array([rung.tokens for rung in best], dtype=float)
    losses = np.array([rung.loss for rung in best])
    law = fit_law(sizes, tokens, losses)
    return LadderFit(
        format_version=1,
        metric=metric,
        vocab_size=vocab_size,
        rungs=rungs,
        law=law,
        resampled=resample(law, sizes, tokens, losses, resamplings),
        lr=fit_power([(rung.n_parameters, rung.lr) for rung in best]),
        batch_tokens=fit_power([(rung.n_parameters, rung.batch_tokens) for rung in best]),
    )


def write_fit(fit: LadderFit, path: Path) -> None:
    """Write the file that `read_fit` reads."""
    write_atomically(path, (json.dumps(asdict(fit), indent=1) + "\n").encode())


def best_rungs(rungs: list[RungResult]) -> list[RungResult]:
    """Of the runs with the same size and length, which differ in their learning rates, the one with the lowest loss."""
    ordered = sorted(rungs, key=lambda rung: (rung.n_parameters, rung.tokens, rung.loss))
    groups = itertools.groupby(ordered, key=lambda rung: (rung.n_parameters, rung.tokens))
    return [next(group) for _, group in groups]


def fit_power(points: list[tuple[int, float]]) -> PowerLaw:
    """The power law through points (size, value), by least squares of the logarithms."""
    x, y = np.log(np.array(points, dtype=float)).T
    exponent, intercept = np.polyfit(x, y, 1)
    return PowerLaw(coefficient=math.exp(intercept), exponent=float(exponent))


def fit_law(sizes: np.ndarray, tokens: np.ndarray, losses: np.ndarray, n_starts: int = STARTS) -> LossLaw:
    """The law of the loss that fits the runs best."""
    # Sizes and tokens are divided by their geometric means, so that no parameter hangs on another so strongly.
    x, y, target = np.log(sizes), np.log(tokens), np.log(losses)
    x_mean, y_mean = x.mean(), y.mean()
    x, y = x - x_mean, y - y_mean
    starts = sorted(
        (_linear_start(x, y, losses, alpha, beta) for alpha, beta in itertools.product(EXPONENTS, EXPONENTS)),
        key=lambda start: _objective(start, x, y, target)[0],
    )
    bounds = [*[(-LARGEST_LOG, LARGEST_LOG)] * 3, *[(EXPONENTS[0], EXPONENTS[-1])] * 2]
    found = min(
        (
            minimize(
                _objective,
                start,
                (x, y, target),
                "L-BFGS-B",
                jac=True,
                bounds=bounds,
                options={"maxiter": 2000},
            )
            for start in starts[:n_starts]
        ),
        key=lambda result: result.fun,
    )
    log_e, log_a, log_b, alpha, beta = (float(value) for value in found.x)
    return LossLaw(
        e=math.exp(log_e),
        a=math.exp(log_a + alpha * x_mean),
        alpha=alpha,
        b=math.exp(log_b + beta * y_mean),
        beta=beta,
    )


def _linear_start(x: np.ndarray, y: np.ndarray, losses: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """log e, log a, log b, alpha and beta with the best values that none of e, a and b is negative for."""
    terms = np.stack([np.ones_like(x), np.exp(-alpha * x), np.exp(-beta * y)], axis=1)
    values, _ = nnls(terms / losses[:, None], np.ones_like(losses))
    return np.array([*np.log(np.maximum(values, 1e-3 * losses.min())), alpha, beta])


def _objective(
    theta: np.ndarray, x: np.ndarray, y: np.ndarray, target: np.ndarray
) -> tuple[float, np.ndarray]:
    """The sum of Huber losses in units of HUBER_DELTA squared, and its gradient."""
    log_e, log_a, log_b, alpha, beta = theta
    terms = np.exp(np.stack([np.full_like(x, log_e), log_a - alpha * x, log_b - beta * y]))
    total = terms.sum(axis=0)
    residual = (np.log(total) - target) / HUBER_DELTA
    inside = np.abs(residual) <= 1
    value = np.where(inside, 0.5 * residual**2, np.abs(residual) - 0.5).sum()
    slope = np.clip(residual, -1, 1) / HUBER_DELTA
    e, a, b = slope * terms / total
    return float(value), np.array([e.sum(), a.sum(), b.sum(), -(a * x).sum(), -(b * y).sum()])


def resample(
    law: LossLaw, sizes: np.ndarray, tokens: np.ndarray, losses: np.ndarray, resamplings: int
) -> list[Resampled]:
    """Laws that the runs could have given as well, each with the noise of one more run."""
    generator = np.random.default_rng(SEED)
    fitted = np.array([law.loss(size, length) for size, length in zip(sizes, tokens, strict=True)])
    residuals = np.log(losses / fitted)
    freedom = len(losses) - LAW_PARAMETERS
    scaled = (residuals - residuals.mean()) * math.sqrt(len(losses) / freedom)
    found = []
    for _ in range(resamplings):
        factor = math.sqrt(freedom / max(generator.chisquare(freedom), TINY))
        noise = factor * generator.choice(scaled, len(losses))
        again = fit_law(sizes, tokens, fitted * np.exp(noise), n_starts=1)
        one_more = math.exp(np.clip(factor * generator.choice(scaled), -5, 5))
        found.append(Resampled(law=again, noise_factor=one_more))
    return found
