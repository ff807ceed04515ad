"""Stores that grow: every count stays that of its cell, old shards are linked, and a minibatch is as mixed as anew."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
from identifying import identifying_counts

from loaders.check import check_store
from loaders.ingest import append, growing, ingest, merge, writer
from loaders.loader import Loader
from loaders.options import LoaderConfig
from loaders.stores import Store, open_store, read_store

GENES, PEAKS = 200, 40
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of the least length, so that some hundred cells fill shards."""
    monkeypatch.setattr(writer, "CELLS_PER_CHUNK", 1)
    monkeypatch.setattr(growing, "CELLS_PER_CHUNK", 1)


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Path]:
    """Writes an h5ad of the cells [start, stop) with genes and peaks, or of genes alone, each donor's `size` cells."""

    def write(name: str, start: int, stop: int, *, size: int = 50, genes: int = GENES, maximum: int = 200) -> Path:
        cells = np.arange(start, stop)
        counts = [identifying_counts(stop - start, width, modality=modality, maximum=maximum, first_cell=start)
                  for modality, width in (("rna", genes), ("atac", PEAKS))]  # fmt: skip
        obs = pd.DataFrame(
            {"donor": [f"d{c // size}" for c in cells], "number": cells}, index=[f"cell{c}" for c in cells]
        )
        data = anndata.AnnData(scipy.sparse.hstack(counts, format="csr"), obs=obs)
        data.var_names = [*(f"gene{f}" for f in range(genes)), *(f"chr1:{f}-{f + 1}" for f in range(PEAKS))]
        data.var["feature_types"] = ["Gene Expression"] * genes + ["Peaks"] * PEAKS
        path = tmp_path / f"{name}.h5ad"
        data.write_h5ad(path)
        return path

    return write


def check_counts(path: Path, *, genes: int = GENES, maximum: int = 200) -> Store:
    """Every cell holds its own counts in every modality, and the store is sound."""
    assert check_store(path).is_sound, check_store(path)
    data = read_store(path)
    cells = np.array([int(name[4:]) for name in data.obs_names])
    assert data.obs["number"].tolist() == cells.tolist()
    for modality, width in (("rna", genes), ("atac", PEAKS)):
        whole = identifying_counts(cells.max() + 1, width, modality=modality, maximum=maximum)
        np.testing.assert_array_equal(data[modality].X.toarray(), whole[cells].toarray())
        totals = data[modality].obs["total_counts"]
        np.testing.assert_array_equal(totals, np.asarray(whole[cells].sum(axis=1)).ravel())
    return open_store(path)


def files_of(path: Path) -> dict[str, int]:
    return {str(file.relative_to(path)): file.stat().st_ino for file in path.rglob("*") if file.is_file()}


def shards_kept(path: Path, before: dict[str, int]) -> list[str]:
    now = files_of(path)
    return sorted(name for name, inode in before.items() if "/c/" in name and now.get(name) == inode)


@pytest.mark.parametrize("reshuffle", [False, True])
def test_cells_that_are_added_stand_behind_the_old_ones_whose_shards_are_linked(
    source: Callable[..., Path], tmp_path: Path, reshuffle: bool
) -> None:
    path, quiet = tmp_path / "s.zarr", {"progress": False}
    ingest(source("a", 0, 1500), out=path, sample_key="donor", **quiet)
    ids, before = open_store(path).cell_ids(0, 1500), files_of(path)
    append(path, source("b", 1500, 2000), sample_key="donor", reshuffle=reshuffle, **quiet)
    store = check_counts(path)
    assert store.schema.num_cells == 2000
    assert store.schema.is_shuffled
    assert len(store.obs_column("sample").categories) == 40
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".h5ad"] == ["s.zarr"]
    if reshuffle:
        assert store.schema.parts == ()
        return
    assert store.schema.parts == (1500, 500)
    np.testing.assert_array_equal(store.cell_ids(0, 1500), ids)
    entries = store.schema.modalities["rna"].num_nonzeros * 3 // 4
    assert len([name for name in shards_kept(path, before) if "rna/X/data" in name]) >= entries // 65536 >= 1
    append(path, source("c", 2000, 2100), sample_key="donor", **quiet)
    assert check_counts(path).schema.parts == (1500, 500, 100)


def test_wider_counts_and_features_of_either_side_are_taken(
    source: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s.zarr"
    ingest(source("a", 0, 400, genes=180), out=path, progress=False)
    append(path, source("b", 400, 600, maximum=60_000), join="outer")
    assert f"rna: {path} lacks 20 of 200 features" in capsys.readouterr().err
    assert check_store(path).is_sound
    data = read_store(path)
    assert data["rna"].n_vars == GENES
    cells = np.array([int(name[4:]) for name in data.obs_names])
    old, new = cells[cells < 400], cells[cells >= 400]
    before = identifying_counts(400, 180, maximum=200)
    np.testing.assert_array_equal(data["rna"].X[: len(old), :180].toarray(), before[old].toarray())
    assert data["rna"].X[: len(old), 180:].nnz == 0
    after = identifying_counts(600, GENES, maximum=60_000)
    np.testing.assert_array_equal(data["rna"].X[len(old) :].toarray(), after[new].toarray())
    assert open_store(path).schema.modalities["rna"].value_dtype == "uint16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 350}, r"sources: got 50 cells that stand in .*s.zarr already, such as 'cell350'"),
        (
            {"genes": 190},
            r"sources: rna of .*b.h5ad lacks 10 of the 200 features of .* \(such as 'gene190'; .*join='outer'",
        ),
        ({"sample_key": "nobody"}, r"sample_key: .* has no obs column 'nobody'"),
        ({"join": "left"}, r"join: got 'left'; choose inner or outer"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_store_stays_as_it_is(
    source: Callable[..., Path], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    path = tmp_path / "s.zarr"
    ingest(source("a", 0, 400), out=path, progress=False)
    new = source("b", options.pop("start", 400), 500, genes=options.pop("genes", GENES))
    before = files_of(path)
    with pytest.raises(ValueError, match=message):
        append(path, new, progress=False, **options)
    assert files_of(path) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.h5ad", "b.h5ad", "s.zarr"]


def test_embeddings_are_not_of_the_new_cells_and_are_left_out_with_a_remark(
    source: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s.zarr"
    ingest(source("a", 0, 500), out=path, progress=False)
    open_store(path).write_embedding("X_liam", np.zeros((500, 3), np.float32))
    append(path, source("b", 500, 600))
    assert "left out, as not of all cells: X_liam; embed again" in capsys.readouterr().err
    assert open_store(path).embedding_names() == []


KILLED = """
import os, sys
from pathlib import Path
from loaders import durable
from loaders.ingest import append, growing, writer

writer.CELLS_PER_CHUNK = growing.CELLS_PER_CHUNK = 1
publish, left = durable.Staging.publish, [int(sys.argv[1])]

def killed(self):
    left[0] -= 1
    if left[0] == 0:
        os._exit(9)
    publish(self)

durable.Staging.publish = killed
append(sys.argv[2], sys.argv[3], sample_key="donor", progress=False)
"""


@pytest.mark.parametrize("publication", [1, 2])
def test_killed_at_any_moment_the_store_is_the_old_one_and_the_same_call_goes_on(
    source: Callable[..., Path], tmp_path: Path, publication: int
) -> None:
    path, new = tmp_path / "s.zarr", source("b", 500, 600)
    ingest(source("a", 0, 500), out=path, sample_key="donor", progress=False)
    before = files_of(path)
    command = [sys.executable, "-c", KILLED, str(publication), str(path), str(new)]
    assert subprocess.run(command, cwd=ROOT, timeout=100, check=False).returncode == 9
    assert files_of(path) == before
    append(path, new, sample_key="donor", progress=False)
    assert check_counts(path).schema.parts == (500, 100)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.h5ad", "b.h5ad", "s.zarr"]


def entropies(path: Path, minibatch: int) -> np.ndarray:
    """Of the samples in each minibatch of three epochs of training."""
    store, found = open_store(path), []
    with Loader(store, LoaderConfig(minibatch=minibatch, memory="64MiB"), sample="sample") as loader:
        for _ in range(3):
            for minibatch_ in loader:
                shares = np.bincount(minibatch_.sample.numpy()) / minibatch_.num_cells
                found.append(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())
    return np.array(found)


@pytest.mark.parametrize(("size", "added"), [(500, [(2000, 4000)]), (250, [(3000, 3250), (3250, 3300), (3300, 4000)])])
def test_a_minibatch_is_as_mixed_after_cells_were_added_as_after_a_fresh_ingest(
    source: Callable[..., Path], tmp_path: Path, size: int, added: list[tuple[int, int]]
) -> None:
    options: dict[str, Any] = {"sample_key": "donor", "progress": False}
    grown, fresh = tmp_path / "grown.zarr", tmp_path / "fresh.zarr"
    ingest(source("all", 0, 4000, size=size, genes=20), out=fresh, **options)
    ingest(source("old", 0, added[0][0], size=size, genes=20), out=grown, **options)
    for start, stop in added:
        append(grown, source(f"new{start}", start, stop, size=size, genes=20), **options)
    mixed, anew = entropies(grown, 256), entropies(fresh, 256)
    assert abs(mixed.mean() / anew.mean() - 1) < 0.01
    assert abs(mixed.min() / anew.min() - 1) < 0.02


def test_stores_merge_with_what_fits_linked_and_stay_as_they_are(source: Callable[..., Path], tmp_path: Path) -> None:
    parts = [tmp_path / "0.zarr", tmp_path / "1.zarr"]
    for number, part in enumerate(parts):
        ingest(source(f"{number}", 1500 * number, 1500 + 500 * number), out=part, sample_key="donor", progress=False)
    before = [files_of(part) for part in parts]
    merge(parts, out=tmp_path / "both.zarr", progress=False)
    assert check_counts(tmp_path / "both.zarr").schema.parts == (1500, 500)
    assert shards_kept(tmp_path / "both.zarr", before[0])
    assert [files_of(part) for part in parts] == before
    merge(parts, out=tmp_path / "shuffled.zarr", reshuffle=True, progress=False)
    assert check_counts(tmp_path / "shuffled.zarr").schema.parts == ()
    with pytest.raises(ValueError, match="stores: got 1; name at least two"):
        merge(parts[:1], out=tmp_path / "c.zarr")
    with pytest.raises(ValueError, match=r"store: got .*0.h5ad; give a store on a local disk that an ingest made"):
        merge([parts[0], tmp_path / "0.h5ad"], out=tmp_path / "c.zarr")
