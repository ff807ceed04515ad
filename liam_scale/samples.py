"""Samples, the covariate to remove: codes for a model, and what it learns of each."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from liam_scale.columns import possible_keys
from liam_scale.continuous import described
from liam_scale.model import ModelConfig, ModelData, library_priors
from loaders.options import LoaderConfig
from loaders.selection import encode_column
from loaders.stores import Store, cell_totals

_log = logging.getLogger(__name__)

RARE = 20
"""Cells of a combination of several covariates below which its library priors are those of all cells."""


@dataclass(frozen=True)
class Samples:
    """The samples of a store: the values of one column, or the combinations of the values of several.

    Attributes
    ----------
    codes
        (n,) of each cell.
    names
        Of the samples.
    covariates
        Of several columns the value that each sample has.
    """

    codes: np.ndarray
    names: tuple[str, ...]
    covariates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def check_samples(store: Store, batch_key: Sequence[str], samples: Samples) -> None:
    """Refuse columns of which (nearly) every cell has a value of its own; warn where all cells have the same.

    Raises
    ------
    ValueError
        More than one value, or combination, for two cells; a column that is named twice.
    """
    if len(set(batch_key)) < len(batch_key):
        raise ValueError(f"--batch-key: got {' '.join(batch_key)}; name each column once")
    for key in batch_key:
        _check_key(store, key, len(set(samples.covariates.get(key, samples.names))))
    if samples.covariates:
        _check_key(store, " and ".join(batch_key), len(samples.names))


def _check_key(store: Store, batch_key: str, num_samples: int) -> None:
    num_cells = store.schema.num_cells
    if 2 <= num_samples <= num_cells / 2:
        return
    others = [name for name in possible_keys(store) if name != batch_key][:8]
    listed = f"; columns that could serve: {', '.join(others)}" if others else "; no other column could serve"
    if num_samples > num_cells / 2 and num_cells > 1:
        raise ValueError(
            f"--batch-key: {batch_key} has {num_samples:,} values in {num_cells:,} cells of {store.uri}, (nearly) one "
            f"for each cell, so that removing it would remove all there is{listed}"
        )
    _log.warning("--batch-key: %s has one value in all cells, so nothing is removed%s", batch_key, listed)


def samples_of(store: Store, batch_key: Sequence[str]) -> Samples:
    """The samples by some columns; one sample where no column is named.

    Raises
    ------
    ValueError
        There is no such column, or cells without a value.
    """
    if not batch_key:
        return Samples(np.zeros(store.schema.num_cells, dtype=np.int32), ("all",))
    try:
        columns = {key: encode_column(store, key, allow_missing=False) for key in batch_key}
    except ValueError as error:
        raise ValueError(f"--batch-key: {error}") from None
    if len(columns) == 1:
        column = columns[batch_key[0]]
        return Samples(column.codes, column.categories)
    sizes = tuple(len(column.categories) for column in columns.values())
    together = np.ravel_multi_index([column.codes.astype(np.int64) for column in columns.values()], sizes)
    found, codes = np.unique(together, return_inverse=True)
    places = np.unravel_index(found, sizes)
    values = {
        key: tuple(column.categories[code] for code in own)
        for (key, column), own in zip(columns.items(), places, strict=True)
    }
    combinations = zip(*values.values(), strict=True)
    names = [", ".join(f"{key}={value}" for key, value in zip(values, own, strict=True)) for own in combinations]
    return Samples(codes.astype(np.int32), tuple(names), values)


def sample_codes(store: Store, batch_key: Sequence[str], samples: Sequence[str]) -> np.ndarray:
    """(n,) int64 code of the sample of each cell among those of a trained model.

    Raises
    ------
    ValueError
        The store has samples that the model was not trained on.
    """
    own = samples_of(store, batch_key)
    known = {name: code for code, name in enumerate(samples)}
    unknown = [name for name in own.names if name not in known]
    if unknown:
        raise ValueError(
            f"store: {' and '.join(batch_key)} of {store.uri} holds {', '.join(unknown[:8])}, which the model was not "
            "trained on; `liam-scale map` places new samples into a trained model"
        )
    return np.array([known[name] for name in own.names], dtype=np.int64)[own.codes]


def model_data(
    store: Store,
    model: ModelConfig,
    batch_key: Sequence[str],
    loader: LoaderConfig,
    continuous_key: Sequence[str] = (),
) -> ModelData:
    """Features, samples and library priors of the modalities of a (resolved) model; means of the columns of numbers."""
    samples = samples_of(store, batch_key)
    codes, kinds = samples.codes, store.schema.kinds
    transforms = loader.transforms(kinds)
    # Combinations may be rare: so few cells say little of a mean.
    rare = RARE if samples.covariates else 0
    means: dict[str, tuple[float, ...]] = {}
    variances: dict[str, tuple[float, ...]] = {}
    for name in model.modalities:
        totals = np.zeros(len(codes), dtype=np.float64)
        rows = store.modality_rows(name)
        own = cell_totals(store, name, transforms.get(name))
        if rows is None:
            totals[:] = own
        else:
            totals[rows >= 0] = own[rows[rows >= 0]]
        means[name], variances[name] = library_priors(
            totals, codes, num_samples=len(samples.names), priors=model.priors, rare=rare
        )
    features = {name: store.schema.modalities[name].num_features for name in model.modalities}
    return ModelData(
        num_features=features,
        samples=samples.names,
        prior_mean=means,
        prior_variance=variances,
        covariates=samples.covariates,
        kinds=kinds,
        continuous=described(store, continuous_key),
    )
