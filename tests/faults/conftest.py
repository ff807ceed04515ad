"""A small store to train on while something breaks."""

from pathlib import Path

import pytest

from loaders.synthetic import simulate


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 cells, RNA and ATAC, two samples in the column `sample`; nobody writes to it."""
    path = tmp_path_factory.mktemp("stores") / "a.zarr"
    simulate(path, num_cells=300, num_genes=20, num_peaks=30, genes_per_cell=8, peaks_per_cell=8, num_samples=2)
    return path
