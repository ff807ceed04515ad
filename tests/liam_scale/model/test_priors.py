"""Library priors: from the cells that have the modality, or as the original has them."""

import numpy as np
import pytest

from liam_scale.model.priors import library_priors

TOTALS = np.array([1.0, np.e, 0.0, np.e**2, 0.0, 0.0])
SAMPLE = np.array([0, 0, 0, 1, 1, 2])


def test_cells_without_the_modality_do_not_count() -> None:
    mean, variance = library_priors(TOTALS, SAMPLE, num_samples=4)
    np.testing.assert_allclose(mean[:2], [0.5, 2.0])
    np.testing.assert_allclose(variance[0], 0.25)


def test_samples_without_the_modality_get_the_pooled_prior() -> None:
    mean, variance = library_priors(TOTALS, SAMPLE, num_samples=4)
    logs = np.array([0.0, 1.0, 2.0])
    np.testing.assert_allclose(mean[2:], logs.mean())
    np.testing.assert_allclose(variance[1:], logs.var(), err_msg="one cell has no variance of its own")


def test_the_original_takes_the_log_of_an_empty_cell_as_zero() -> None:
    mean, variance = library_priors(TOTALS, SAMPLE, num_samples=4, priors="original")
    np.testing.assert_allclose(mean, [1 / 3, 1.0, 0.0, 0.0])
    np.testing.assert_allclose(variance, [2 / 9, 1.0, 0.0, 1.0])


def test_no_cell_at_all_gives_the_neutral_prior() -> None:
    assert library_priors(np.zeros(3), np.zeros(3, dtype=int), num_samples=1) == ((0.0,), (1.0,))


def test_codes_outside_the_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="got codes 0 to 2 for 2 samples"):
        library_priors(TOTALS, SAMPLE, num_samples=2)
    with pytest.raises(ValueError, match="got 5 cells, sample has 6"):
        library_priors(TOTALS[:5], SAMPLE, num_samples=3)


def test_rare_samples_have_the_prior_of_all_cells() -> None:
    totals = np.exp(np.concatenate([np.full(30, 1.0), np.full(30, 3.0), [9.0, 9.0]]))
    sample = np.repeat([0, 1, 2], [30, 30, 2])
    mean, variance = library_priors(totals, sample, num_samples=3, rare=20)
    logs = np.log(totals)
    np.testing.assert_allclose(mean, (1.0, 3.0, logs.mean()))
    np.testing.assert_allclose(variance, (0.0, 0.0, logs.var()), atol=1e-12)
