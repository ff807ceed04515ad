"""An embedding is the old one or the new one, and the store stays what it was."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import anndata
import mudata
import numpy as np
import pytest
import zarr

from loaders.durable import replacing
from loaders.ecosystem import quiet_anndata
from loaders.stores import embeddings, open_store

pytestmark = [
    pytest.mark.filterwarnings("ignore:Consolidated metadata:zarr.errors.ZarrUserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have a Zarr V3 specification"),
    pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning"),
    pytest.mark.filterwarnings("ignore:From 0.4 .update:FutureWarning"),
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding:UserWarning"),
]


def embedding_of(cells: np.ndarray, width: int = 3) -> np.ndarray:
    return (cells[:, None] + np.arange(width) / 8).astype(np.float32)


@pytest.mark.parametrize("consolidated", [False, True])
def test_written_store_opens_in_mudata_and_keeps_its_schema(
    own_store: Path, toy: ModuleType, consolidated: bool
) -> None:
    if consolidated:
        zarr.consolidate_metadata(str(own_store))
    store = open_store(own_store)
    fingerprint = store.schema.fingerprint
    expected = embedding_of(np.arange(toy.NUM_CELLS))
    for values in (expected[:, :2], expected + 1, expected):
        store.write_embedding("X_liam", values)
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
    store.write_embedding("X_liam", expected)
    np.testing.assert_array_equal(anndata.read_zarr(tmp_path / "a.zarr").obsm["X_liam"], expected)


def test_a_reader_finds_the_old_embedding_or_the_new_and_no_remark(own_store: Path, toy: ModuleType) -> None:
    store, expected = open_store(own_store), embedding_of(np.arange(toy.NUM_CELLS))
    store.write_embedding("X_liam", expected)
    is_done, found = threading.Event(), set()

    def read() -> None:
        while not is_done.is_set():
            values = store.read_embedding("X_liam", 0, toy.NUM_CELLS) - expected
            assert (values == values[0, 0]).all()
            found.add(float(values[0, 0]))
            assert set(zarr.open_group(own_store, mode="r")["obsm"].keys()) >= {"X_liam"}

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(read)
        for number in range(1, 21):
            store.write_embedding("X_liam", expected + number)
        is_done.set()
        reader.result()
    assert len(found) > 1
    assert found <= set(range(21))


def test_a_full_disk_leaves_the_old_embedding(own_store: Path, disk_of: Callable[[str], Path], toy: ModuleType) -> None:
    disk = disk_of("2m")
    shutil.copytree(own_store, disk / "a.zarr")
    store, expected = open_store(disk / "a.zarr"), embedding_of(np.arange(toy.NUM_CELLS))
    store.write_embedding("X_liam", expected)
    before = sorted(path.name for path in disk.rglob("*"))
    large = np.random.default_rng(0).random((toy.NUM_CELLS, 20_000), np.float32)
    with pytest.raises(RuntimeError, match=r"writing .*a.zarr/obsm/X_liam: disk full"):
        store.write_embedding("X_liam", large)
    np.testing.assert_array_equal(mudata.read_zarr(disk / "a.zarr").obsm["X_liam"], expected)
    assert sorted(path.name for path in disk.rglob("*")) == before


def test_in_a_folder_that_is_not_the_users_it_is_made_within_the_store(
    own_store: Path, toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings.os, "access", lambda path, mode: False)
    made = []
    monkeypatch.setattr(embeddings, "replacing", lambda target, hidden: made.append(hidden) or replacing(target))
    expected = embedding_of(np.arange(toy.NUM_CELLS))
    open_store(own_store).write_embedding("X_liam", expected)
    assert made == [own_store.resolve() / "obsm" / "X_liam"]
    np.testing.assert_array_equal(mudata.read_zarr(own_store).obsm["X_liam"], expected)


def test_a_flipped_bit_of_an_embedding_is_found(own_store: Path, toy: ModuleType) -> None:
    store, expected = open_store(own_store), embedding_of(np.arange(toy.NUM_CELLS))
    store.write_embedding("X_liam", expected)
    (chunk,) = (path for path in (own_store / "obsm/X_liam/c").rglob("*") if path.is_file())
    content = chunk.read_bytes()
    for byte in range(0, len(content), 5):
        chunk.write_bytes(content[:byte] + bytes([content[byte] ^ 1 << byte % 8]) + content[byte + 1 :])
        with pytest.raises(
            RuntimeError, match=r"own.zarr/obsm/X_liam: got damaged data: chunk 0/0 \(the cells 0 to 49\)"
        ):
            store.read_embedding("X_liam", 0, toy.NUM_CELLS)


def test_wrong_number_of_cells_is_refused(own_store: Path) -> None:
    with pytest.raises(ValueError, match=r"shape \(51, 3\) .* of 50"):
        open_store(own_store).write_embedding("X_liam", embedding_of(np.arange(51)))
