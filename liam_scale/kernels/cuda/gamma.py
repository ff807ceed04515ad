"""Differences of log-gamma and digamma in float32 that keep their digits where the two values would not."""

import triton
import triton.language as tl

from liam_scale.kernels.cuda.launch import log1p

_SHIFT: tl.constexpr = tl.constexpr(8)
"""The series below are used from here on; what they leave out is below 1e-7."""


@triton.jit
def log_gamma_difference(theta, x):
    """log |gamma(theta + x) / gamma(theta)|, 0 for x = 0: Stirling's series of both, subtracted on paper."""
    near, far = x * 0.0 + 1.0, x * 0.0 + 1.0
    for k in tl.static_range(4):
        near *= 1.0 + x / (theta + k)
        far *= 1.0 + x / (theta + (k + 4))
    a = theta + _SHIFT
    b = a + x
    series = x * tl.log(b) + (a - 0.5) * log1p(x / a) - x + _remainder(b) - _remainder(a)
    # in two halves, as a product of eight ratios would leave float32
    return series - tl.log(tl.abs(near)) - tl.log(tl.abs(far))


@triton.jit
def _remainder(z):
    inverse = 1.0 / z
    return inverse * (1.0 / 12.0 - inverse * inverse * (1.0 / 360.0))


@triton.jit
def digamma_difference(theta, x):
    """digamma(theta + x) - digamma(theta), 0 for x = 0."""
    near = x * 0.0
    for k in tl.static_range(8):
        near += x / (theta + k) / (theta + x + k)
    a = theta + _SHIFT
    inverse_a, inverse_b = 1.0 / a, 1.0 / (a + x)
    apart, both = x * inverse_a * inverse_b, inverse_a + inverse_b
    squares = inverse_a * inverse_a + inverse_b * inverse_b
    return near + log1p(x / a) + apart * (0.5 + both * (1.0 / 12.0 - squares * (1.0 / 120.0)))
