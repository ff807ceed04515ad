"""Noise is a pure function with the right distribution."""

import numpy as np
import pytest
import scipy.stats
import torch

from liam_scale.kernels.device import noise as plain
from liam_scale.kernels.device.noise import signed, step_key
from liam_scale.model.noise import Noise, hash_bits

FROZEN = [[1666083870, 4127905055], [4173138772, 548154276], [82272926, 2469955294]]


def noise(*, seed: int = 0, step: int = 0, cells: int = 512) -> Noise:
    return Noise(seed=seed, step=step, place=torch.arange(cells))


def test_values_are_frozen() -> None:
    """A checkpoint of today must draw tomorrow what it draws today: these numbers never change."""
    bits = hash_bits(seed=7, step=3, place=torch.tensor([0, 1, 127]), layer="z", units=2)
    assert bits.tolist() == FROZEN


def test_a_cell_draws_the_same_on_any_rank() -> None:
    place = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    whole = noise(cells=300).normal("z", 20, dtype=torch.float32)
    for part in (place[:7], place[7:150], place[150:]):
        alone = Noise(seed=0, step=0, place=part).normal("z", 20, dtype=torch.float32)
        assert torch.equal(alone, whole[part])


@pytest.mark.parametrize("column", [0, 7, 19])
def test_each_unit_is_standard_normal(column: int) -> None:
    steps = [noise(step=step).normal("z", 20, dtype=torch.float64)[:, column] for step in range(60)]
    sample = torch.cat(steps).numpy()
    assert scipy.stats.kstest(sample, "norm").pvalue > 1e-3
    assert abs(scipy.stats.kurtosis(sample)) < 0.15


def test_tails_reach_as_far_as_a_normal_does() -> None:
    sample = noise(cells=20_000).normal("rna", 100, dtype=torch.float32).numpy().ravel()
    assert np.isfinite(sample).all()
    for bound in (3.0, 4.0, 4.5):
        expected = 2 * scipy.stats.norm.sf(bound) * sample.size
        observed = np.sum(np.abs(sample) > bound)
        assert abs(observed - expected) < 5 * np.sqrt(expected)


@pytest.mark.parametrize("other", [{"step": 1}, {"seed": 1}, {"layer": "rna"}, {"shift": 1}])
def test_draws_of_different_keys_are_uncorrelated(other: dict[str, int | str]) -> None:
    layer = str(other.pop("layer", "z"))
    shift = int(other.pop("shift", 0))
    one = noise(cells=4000).normal("z", 20, dtype=torch.float64).numpy()
    two = noise(cells=4000, **other).normal(layer, 20, dtype=torch.float64).numpy()  # type: ignore[arg-type]
    two = np.roll(two, shift, axis=0)
    assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 5 / np.sqrt(one.size)
    assert abs(np.corrcoef(np.abs(one).ravel(), np.abs(two).ravel())[0, 1]) < 5 / np.sqrt(one.size)


def test_units_and_cells_are_independent() -> None:
    sample = noise(cells=20_000).normal("z", 30, dtype=torch.float64).numpy()
    between_units = np.corrcoef(sample.T) - np.eye(30)
    assert np.abs(between_units).max() < 5.5 / np.sqrt(len(sample))
    between_cells = np.corrcoef(noise(cells=64).normal("z", 20_000, dtype=torch.float64).numpy()) - np.eye(64)
    assert np.abs(between_cells).max() < 5.5 / np.sqrt(20_000)


def test_bits_are_uniform_and_avalanche() -> None:
    one = hash_bits(seed=0, step=0, place=torch.arange(4096), layer="z", units=64).numpy()
    for bit in range(32):
        share = ((one >> bit) & 1).mean()
        assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(one.size), bit
    neighbours = one[0::2] ^ one[1::2]
    for bit in range(32):
        share = ((neighbours >> bit) & 1).mean()
        assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(neighbours.size), bit


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(rate: float) -> None:
    hidden = torch.ones(2000, 128)
    dropout = noise(cells=2000).dropout("rna.encoder", rate)
    assert dropout is not None
    dropped = dropout.of(hidden)
    share = (dropped == 0).double().mean().item()
    assert abs(share - rate) < 5 * np.sqrt(rate * (1 - rate) / hidden.numel())
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)])


def test_no_dropout_takes_no_hash() -> None:
    assert noise(cells=3).dropout("z", 0.0) is None


@pytest.mark.parametrize("step", [0, 1, 10**6, -1])
def test_a_key_on_the_device_draws_what_the_number_draws(step: int) -> None:
    """Where a step is recorded, the host writes its key into a tensor; int64 has no room for 64 bits without a sign."""
    place, key = torch.tensor([0, 1, 2**31, 2**32 - 1]), step_key(seed=7, step=step)
    held = torch.tensor(signed(key, 64))
    for layer in (0, 77, 2**32 - 1):
        assert torch.equal(plain.hash_bits(place, held, layer, 9), plain.hash_bits(place, key, layer, 9))


def test_given_noise_takes_the_place_of_drawn() -> None:
    given = torch.full((5, 3), 2.0)
    source = Noise(seed=0, step=0, place=torch.arange(5), given={"z": given})
    assert torch.equal(source.normal("z", 3, dtype=torch.float32), given)
    assert not torch.equal(source.normal("rna", 3, dtype=torch.float32), given)
