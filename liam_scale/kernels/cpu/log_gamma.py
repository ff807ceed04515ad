"""Differences of log-gamma and digamma at a non-zero, in float64, for numba.

scvi-tools subtracts two values of lgamma, which in float32 loses 100 nats where theta is 10^8. For a count x the
difference is a sum over x terms, log(theta) + log(theta + 1) + ...: exact, and cheaper for the small counts that
most non-zeros are.
"""

from __future__ import annotations

import math

import numpy as np

from loaders.csr import compiled

MAX_TERMS = 16
"""Largest count whose difference is summed term by term."""

_LOG_FACTORIALS = np.array([math.lgamma(x + 1.0) for x in range(MAX_TERMS + 1)])
_HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)
_SHIFT = 12.0
"""The series below are used from here on; their error is below 1e-16."""


@compiled
def log_gamma_and_digamma(z: float) -> tuple[float, float]:
    """lgamma(z) and its derivative for z > 0: recurrence up to 12, then Stirling's series."""
    product, slope = 1.0, 0.0
    while z < _SHIFT:
        product *= z
        slope += 1.0 / z
        z += 1.0
    inverse = 1.0 / z
    square = inverse * inverse
    series = 1 / 12 - square * (1 / 360 - square * (1 / 1260 - square * (1 / 1680 - square * (1 / 1188))))
    log_gamma = (z - 0.5) * math.log(z) - z + _HALF_LOG_2_PI + inverse * series - math.log(product)
    tail = 1 / 120 - square * (1 / 252 - square * (1 / 240 - square * (1 / 132)))
    digamma = math.log(z) - 0.5 * inverse - square * (1 / 12 - square * tail) - slope
    return log_gamma, digamma


@compiled
def count_terms(x: float, theta: float) -> tuple[float, float]:
    """lgamma(x + theta) - lgamma(theta) - lgamma(x + 1), and its derivative in theta."""
    if x <= MAX_TERMS and x == math.floor(x):
        product, slope = 1.0, 0.0
        for k in range(int(x)):
            product *= theta + k
            slope += 1.0 / (theta + k)
        # theta up to 1e19 keeps a product of 16 terms below the largest float64
        return math.log(product) - _LOG_FACTORIALS[int(x)], slope
    above, above_slope = log_gamma_and_digamma(x + theta)
    below, below_slope = log_gamma_and_digamma(theta)
    return above - below - log_gamma_and_digamma(x + 1.0)[0], above_slope - below_slope
