"""Totals of cells, plain and after the centred log-ratio."""

import numpy as np
import pytest
from identifying import identifying_counts, identifying_store

from loaders.stores import cell_totals
from loaders.stores.open import open_store


def test_totals_are_sums_of_the_rows(tmp_path):
    identifying_store(tmp_path / "cells.zarr", num_cells=300, num_features={"rna": 40, "adt": 10}, absent={"adt": [1]})
    store = open_store(tmp_path / "cells.zarr")
    counts = {name: identifying_counts(300, size, modality=name) for name, size in {"rna": 40, "adt": 10}.items()}
    has_adt = np.arange(300) % 3 != 1
    np.testing.assert_array_equal(cell_totals(store, "rna"), counts["rna"].sum(axis=1).A1)
    np.testing.assert_array_equal(cell_totals(store, "adt", "none"), counts["adt"][has_adt].sum(axis=1).A1)
    dense = counts["adt"][has_adt].toarray().astype(np.float64)
    centred = np.log1p(dense / np.exp(np.log1p(dense).sum(axis=1) / 10)[:, None])
    np.testing.assert_allclose(cell_totals(store, "adt", "clr"), centred.sum(axis=1), rtol=1e-6)


def test_unknown_names_are_refused(tmp_path):
    identifying_store(tmp_path / "cells.zarr", num_cells=30, num_features={"rna": 40})
    store = open_store(tmp_path / "cells.zarr")
    with pytest.raises(ValueError, match=r"modality: got 'adt'.*holds rna"):
        cell_totals(store, "adt")
    with pytest.raises(ValueError, match="transform: got 'log'"):
        cell_totals(store, "rna", "log")
