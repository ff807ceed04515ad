"""The quadrature of E softmax(N(m, v)) against the golden values, closed forms and an independent integral."""

import os
from pathlib import Path

import numpy as np
import pytest
import scipy.integrate
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

from liam_scale.model import logistic_normal_mean

GOLDEN = Path(
    os.environ.get("LIAM_GOLDEN", Path(__file__).resolve().parents[3] / ".." / "shared" / "reference" / "golden")
)


def cells(*, num: int = 50, dims: int = 20, deviation: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean = 1.5 * torch.randn(num, dims, generator=generator, dtype=torch.float64)
    variance = deviation**2 * torch.rand(num, dims, generator=generator, dtype=torch.float64)
    return mean, variance


def sigmoid_mean(mean: float, deviation: float) -> float:
    """E sigmoid(N(mean, deviation^2)) by adaptive quadrature: the first of two dimensions."""

    def integrand(x: float) -> float:
        return np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi) / (1 + np.exp(-(mean + deviation * x)))

    return float(scipy.integrate.quad(integrand, -12, 12, epsabs=1e-12, limit=500, points=[-mean / deviation])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_mean_of_200_thousand_draws(dtype: torch.dtype) -> None:
    """The golden values are draws themselves, with standard errors up to 0.9e-3: the exact answer is 1.6e-3 away."""
    path = GOLDEN / "logistic_normal_mean.npz"
    if not path.exists():
        pytest.skip(f"no {path} (set LIAM_GOLDEN)")
    with np.load(path) as golden:
        mean, variance = (torch.from_numpy(golden[name]).to(dtype) for name in ("qz_m", "qz_v"))
        ours = logistic_normal_mean(mean, variance).double().numpy()
        difference = ours - golden["mean_200k"]
        drawn = np.abs(golden["orig_mc5000_seed0"] - ours).max()
        stderr = golden["stderr_200k"]
    assert np.abs(difference).max() <= 1e-3 + stderr.max()
    assert np.abs(difference / stderr).max() < 4.5
    assert np.sqrt(np.mean((difference / stderr) ** 2)) < 1.1
    assert drawn > 5e-3


@pytest.mark.parametrize("deviation", [0.05, 0.5, 1.0, 1.99, 3.0, 7.0, 15.0, 30.0])
@pytest.mark.parametrize("mean", [0.0, 1.3, -6.0])
def test_two_dimensions_are_a_sigmoid(mean: float, deviation: float) -> None:
    means = torch.tensor([[mean, 0.0]], dtype=torch.float64)
    half = torch.full((1, 2), deviation**2 / 2, dtype=torch.float64)
    expected = sigmoid_mean(mean, deviation)
    assert logistic_normal_mean(means, half)[0, 0].item() == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("deviation", [0.3, 1.0, 2.0])
def test_three_dimensions_by_tensor_product_quadrature(deviation: float) -> None:
    mean, variance = cells(num=5, dims=3, deviation=deviation)
    nodes, weights = hermegauss(60)
    weights = weights / weights.sum()
    grid = torch.from_numpy(np.stack(np.meshgrid(nodes, nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 3))
    joint = torch.from_numpy(np.einsum("i,j,k->ijk", weights, weights, weights).ravel())
    for k in range(5):
        expected = joint @ torch.softmax(mean[k] + variance[k].sqrt() * grid, dim=1)
        torch.testing.assert_close(logistic_normal_mean(mean, variance)[k], expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("dims", [2, 5, 20, 100])
@pytest.mark.parametrize("deviation", [0.1, 1.0, 5.0, 50.0, 1000.0])
def test_rows_sum_to_one_and_follow_permutations(dims: int, deviation: float) -> None:
    mean, variance = cells(num=4, dims=dims, deviation=deviation)
    result = logistic_normal_mean(mean.float(), variance.float())
    assert torch.isfinite(result).all()
    assert (result >= 0).all()
    torch.testing.assert_close(result.sum(dim=1), torch.ones(len(mean)), atol=1e-5, rtol=0)
    order = torch.randperm(dims, generator=torch.Generator().manual_seed(1))
    permuted = logistic_normal_mean(mean[:, order].float(), variance[:, order].float())
    torch.testing.assert_close(permuted, result[:, order], atol=1e-5, rtol=0)


def test_no_variance_is_the_softmax() -> None:
    mean, _ = cells()
    tiny = torch.full_like(mean, 1e-12)
    torch.testing.assert_close(logistic_normal_mean(mean, tiny), torch.softmax(mean, dim=1), atol=1e-6, rtol=0)


def test_a_common_shift_changes_nothing() -> None:
    mean, variance = cells()
    torch.testing.assert_close(
        logistic_normal_mean(mean + 300.0, variance), logistic_normal_mean(mean, variance), atol=1e-6, rtol=0
    )


def test_a_row_does_not_depend_on_the_others() -> None:
    mean, variance = cells(num=40, deviation=1.5)
    variance[7] *= 400
    whole = logistic_normal_mean(mean, variance)
    for k in (0, 7, 39):
        torch.testing.assert_close(logistic_normal_mean(mean[k : k + 1], variance[k : k + 1]), whole[k : k + 1])


def test_a_row_that_is_not_finite_is_nan_and_spoils_no_other() -> None:
    mean, variance = cells(num=3)
    mean[1, 4] = torch.nan
    result = logistic_normal_mean(mean, variance)
    assert torch.isnan(result[1]).all()
    assert torch.isfinite(result[[0, 2]]).all()


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got shapes \(3, 2\) and \(3, 1\)"):
        logistic_normal_mean(torch.zeros(3, 2), torch.ones(3, 1))


def test_no_cells_give_no_rows() -> None:
    assert logistic_normal_mean(torch.zeros(0, 4), torch.ones(0, 4)).shape == (0, 4)
