"""Samples, the covariate to remove: obs columns that could serve, codes for a model, and what it learns of each."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import numpy as np

from liam_scale.model import ModelConfig, ModelData, library_priors
from loaders.selection import encode_column
from loaders.stores import Store, cell_totals

_log = logging.getLogger(__name__)

_USUAL_NAME = re.compile(
    r"(^|[^a-z])(sample|batch|donor|replicate|library|lane|plate|pool|site|patient|individual|subject)s?(id)?([^a-z]|$)"
)
"""How people call the column of the sample."""


def possible_keys(store: Store) -> list[str]:
    """Obs columns with at least two values and ten cells a value, those first that are named like a sample's."""
    return sorted(filter(lambda name: _could_serve(store, name), store.schema.obs_columns), key=is_unusual)


def is_unusual(name: str) -> bool:
    return _USUAL_NAME.search(name.lower()) is None


def _could_serve(store: Store, name: str) -> bool:
    try:
        column = store.obs_column(name)
    except ValueError:
        # Neither labels nor integers, such as a share.
        return False
    return 2 <= len(column.categories) <= store.schema.num_cells / 10 and int(column.codes.min()) >= 0


def check_batch_key(store: Store, batch_key: str, num_samples: int) -> None:
    """Refuse a column of which (nearly) every cell has a value of its own; warn where all cells have the same.

    Raises
    ------
    ValueError
        More than one value for two cells.
    """
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


def sample_column(store: Store, batch_key: str | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Codes (n,) and categories of the sample of each cell; one category where no column is named.

    Raises
    ------
    ValueError
        There is no such column, or cells without a value.
    """
    if batch_key is None:
        return np.zeros(store.schema.num_cells, dtype=np.int32), ("all",)
    try:
        column = encode_column(store, batch_key, allow_missing=False)
    except ValueError as error:
        raise ValueError(f"--batch-key: {error}") from None
    return column.codes, column.categories


def sample_codes(store: Store, batch_key: str | None, samples: Sequence[str]) -> np.ndarray:
    """(n,) int64 code of the sample of each cell among those of a trained model.

    Raises
    ------
    ValueError
        The store has samples that the model was not trained on.
    """
    codes, categories = sample_column(store, batch_key)
    known = {name: code for code, name in enumerate(samples)}
    unknown = [name for name in categories if name not in known]
    if unknown:
        raise ValueError(
            f"store: {batch_key} of {store.uri} holds {', '.join(unknown[:8])}, which the model was not trained "
            "on; `liam-scale map` places new samples into a trained model"
        )
    return np.array([known[name] for name in categories], dtype=np.int64)[codes]


def model_data(store: Store, model: ModelConfig, batch_key: str | None, transforms: dict[str, str]) -> ModelData:
    """Features, samples and library priors of the modalities of a (resolved) model."""
    codes, categories = sample_column(store, batch_key)
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
        means[name], variances[name] = library_priors(totals, codes, num_samples=len(categories), priors=model.priors)
    features = {name: store.schema.modalities[name].num_features for name in model.modalities}
    return ModelData(num_features=features, samples=categories, prior_mean=means, prior_variance=variances)
