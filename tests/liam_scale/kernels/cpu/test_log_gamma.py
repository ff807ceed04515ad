import numpy as np
import scipy.special

from liam_scale.kernels.cpu.vector_math import count_terms, log_gamma_and_digamma


def test_differences_of_log_gamma():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.integers(1, 40, 2000), rng.uniform(0, 6, 2000)]).astype(float)
    theta = np.exp(rng.uniform(-9, 9, 4000))
    found = np.array([count_terms(a, b) for a, b in zip(x, theta, strict=True)])
    gamma = scipy.special.gammaln(x + theta) - scipy.special.gammaln(theta) - scipy.special.gammaln(x + 1)
    slope = scipy.special.digamma(x + theta) - scipy.special.digamma(theta)
    np.testing.assert_allclose(found[:, 0], gamma, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(found[:, 1], slope, rtol=1e-11, atol=1e-11)


def test_log_gamma_and_digamma():
    z = np.exp(np.linspace(-12, 18, 500))
    found = np.array([log_gamma_and_digamma(v) for v in z])
    np.testing.assert_allclose(found[:, 0], scipy.special.gammaln(z), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(found[:, 1], scipy.special.digamma(z), rtol=1e-13, atol=1e-13)
