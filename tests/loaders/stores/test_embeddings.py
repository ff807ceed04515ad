"""Embeddings written by several processes at once are complete, and the store stays what it was."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import anndata
import mudata
import numpy as np
import pytest
import zarr

from loaders.ecosystem import quiet_anndata
from loaders.schema import SCHEMA_KEY
from loaders.stores import EMBEDDING_CHUNK_CELLS, open_store

pytestmark = [
    pytest.mark.filterwarnings("ignore:Consolidated metadata:zarr.errors.ZarrUserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have a Zarr V3 specification"),
    pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning"),
    pytest.mark.filterwarnings("ignore:From 0.4 .update:FutureWarning"),
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding:UserWarning"),
]


def embedding_of(cells: np.ndarray, width: int = 3) -> np.ndarray:
    return (cells[:, None] + np.arange(width) / 8).astype(np.float32)


WRITE_RANGE = """
import sys
import numpy as np
import zarr
from loaders.stores.embeddings import write

path, start, stop, num_cells = sys.argv[1], *map(int, sys.argv[2:])
root = zarr.open_group(path, mode="r+", use_consolidated=False)
for first in range(start, stop, 1000):
    cells = np.arange(first, min(first + 1000, stop))
    write(root, path, "X_liam", first, (cells[:, None] + np.arange(3) / 8).astype(np.float32), num_cells)
"""
"""One process: its cells in small pieces, most of which share a chunk with other pieces, some with another process."""


@pytest.mark.parametrize("consolidated", [False, True])
def test_written_store_opens_in_mudata_and_keeps_its_schema(
    own_store: Path, toy: ModuleType, consolidated: bool
) -> None:
    if consolidated:
        zarr.consolidate_metadata(str(own_store))
    store = open_store(own_store)
    fingerprint = store.schema.fingerprint
    expected = embedding_of(np.arange(toy.NUM_CELLS))
    for start in (30, 0, 10):
        store.write_embedding("X_liam", start, expected[start : start + 20], toy.NUM_CELLS)
    data = mudata.read_zarr(own_store)
    np.testing.assert_array_equal(data.obsm["X_liam"], expected)
    np.testing.assert_array_equal(data.mod["rna"].X.toarray(), toy.counts_of("rna", np.arange(toy.NUM_CELLS)))
    reopened = open_store(own_store)
    assert reopened.schema.fingerprint == fingerprint
    assert bool(zarr.open_group(own_store, mode="r").metadata.consolidated_metadata) == consolidated
    toy.check_counts(reopened, "atac")


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_embedding_of_an_anndata_that_others_wrote(tmp_path: Path, toy: ModuleType, zarr_format: int) -> None:
    with quiet_anndata(zarr_format):
        toy.make_anndata("rna", np.arange(toy.NUM_CELLS)).write_zarr(tmp_path / "a.zarr")
    store = open_store(tmp_path / "a.zarr")
    expected = embedding_of(np.arange(toy.NUM_CELLS))
    store.write_embedding("X_liam", 0, expected, toy.NUM_CELLS)
    np.testing.assert_array_equal(anndata.read_zarr(tmp_path / "a.zarr").obsm["X_liam"], expected)


def test_processes_that_share_chunks_lose_nothing(tmp_path: Path) -> None:
    num_cells = 2 * EMBEDDING_CHUNK_CELLS + 4321
    zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=3)
    bounds = [0, 5_001, 11_003, num_cells]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE_RANGE, *map(str, (tmp_path / "a.zarr", start, stop, num_cells))],
            cwd=Path(__file__).resolve().parents[3],
        )
        for start, stop in itertools.pairwise(bounds)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    array = zarr.open_group(tmp_path / "a.zarr", mode="r")["obsm/X_liam"]
    assert array.chunks == (EMBEDDING_CHUNK_CELLS, 3)
    np.testing.assert_array_equal(array[:], embedding_of(np.arange(num_cells)))


def test_another_width_is_refused_until_the_old_one_is_dropped(own_store: Path, toy: ModuleType) -> None:
    store = open_store(own_store)
    cells = np.arange(toy.NUM_CELLS)
    store.write_embedding("X_liam", 0, embedding_of(cells), toy.NUM_CELLS)
    with pytest.raises(ValueError, match=r"obsm\['X_liam'\].*width 5.*\(50, 3\).*drop_embedding"):
        store.write_embedding("X_liam", 0, embedding_of(cells, 5), toy.NUM_CELLS)
    store.drop_embedding("X_liam")
    store.write_embedding("X_liam", 0, embedding_of(cells, 5), toy.NUM_CELLS)
    assert zarr.open_group(own_store, mode="r")["obsm/X_liam"].shape == (toy.NUM_CELLS, 5)
    assert SCHEMA_KEY in zarr.open_group(own_store, mode="r").attrs


def test_wrong_number_of_cells_is_refused(own_store: Path, toy: ModuleType) -> None:
    store = open_store(own_store)
    with pytest.raises(ValueError, match=r"51 cells .* of 50"):
        store.write_embedding("X_liam", 0, embedding_of(np.arange(51)), 51)
    with pytest.raises(ValueError, match=r"at cell 49"):
        store.write_embedding("X_liam", 49, embedding_of(np.arange(2)), toy.NUM_CELLS)
