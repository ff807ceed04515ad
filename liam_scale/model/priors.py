"""Priors of the library sizes: mean and variance of the log total of each sample."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt


def library_priors(
    totals: npt.NDArray[np.floating],
    sample: npt.NDArray[np.integer],
    *,
    num_samples: int,
    priors: Literal["present", "original"] = "present",
    rare: int = 0,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population variance of the log totals of one modality, by sample.

    Parameters
    ----------
    totals
        (cells,) row sums of the modality over *all* cells of the store, 0 for a cell that lacks it.
    sample
        (cells,) codes of the samples, 0 .. num_samples - 1.
    num_samples
        Samples; one may have no cells.
    priors
        `present`: over cells with a positive total. A sample without such a cell gets the prior of all the others
        together: no term of the objective reads it, and where the modality is imputed for that sample, its sizes are
        those of the data. A sample with one such cell gets their variance: its own, 0, would weigh that cell's
        divergence by 10^7. `original`: over all cells, the log of an empty cell taken as 0, as the published code has
        it; a sample without cells gets (0, 1).
    rare
        With `present`, a sample with fewer such cells gets the prior of all cells together.

    Returns
    -------
    mean, variance
        One value per sample, natural logarithm.
    """
    if len(totals) != len(sample):
        raise ValueError(f"totals: got {len(totals)} cells, sample has {len(sample)}; give both for all cells")
    if len(sample) and not 0 <= sample.min() <= sample.max() < num_samples:
        raise ValueError(
            f"sample: got codes {sample.min()} to {sample.max()} for {num_samples} samples; code them from 0"
        )
    is_counted = np.asarray(totals) > 0
    logs = np.log(totals, where=is_counted, out=np.zeros(len(totals), dtype=np.float64))
    if priors == "original":
        return _by_sample(logs, sample, num_samples, absent=(0.0, 1.0), fewest=(1, 1))
    logs, sample = logs[is_counted], sample[is_counted]
    pooled = (float(logs.mean()), float(logs.var())) if len(logs) > 1 else (float(logs.sum()), 1.0)
    return _by_sample(logs, sample, num_samples, absent=pooled, fewest=(max(1, rare), max(2, rare)))


def _by_sample(
    logs: npt.NDArray[np.float64],
    sample: npt.NDArray[np.integer],
    num_samples: int,
    *,
    absent: tuple[float, float],
    fewest: tuple[int, int],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    size = np.bincount(sample, minlength=num_samples)
    some = np.maximum(size, 1)
    mean = np.bincount(sample, weights=logs, minlength=num_samples) / some
    variance = np.bincount(sample, weights=(logs - mean[sample]) ** 2, minlength=num_samples) / some
    mean, variance = (
        np.where(size >= least, own, other) for least, own, other in zip(fewest, (mean, variance), absent, strict=True)
    )
    return tuple(mean.tolist()), tuple(variance.tolist())
