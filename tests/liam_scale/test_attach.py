"""The embedding in the user's own objects and files: every cell gets its own, by its id."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import mudata
import numpy as np
import pandas as pd
import pytest
import zarr

import liam_scale
from liam_scale.api import Run
from liam_scale.run import RUN_ATTRIBUTE
from loaders import open_store
from loaders.ecosystem import quiet_anndata


@pytest.fixture(scope="module")
def run(trained: Path) -> Run:
    return liam_scale.load_run(trained)


@pytest.fixture(scope="module")
def embedding(run: Run) -> pd.DataFrame:
    return run.embedding()


@pytest.fixture
def cells(embedding: pd.DataFrame) -> pd.DataFrame:
    """Obs of some of the cells, in another order than the store's."""
    names = embedding.index.to_numpy()[np.random.default_rng(0).permutation(600)[:500]]
    return pd.DataFrame({"note": pd.Categorical(np.arange(500) % 3)}, index=pd.Index(names, name=None))


def make(cells: pd.DataFrame, feature: str = "gene") -> anndata.AnnData:
    values = np.arange(len(cells) * 4, dtype=np.float32).reshape(-1, 4)
    features = pd.DataFrame(index=[f"{feature}{i}" for i in range(4)])
    return anndata.AnnData(values, obs=cells.copy(), var=features, obsm={"X_pca": values[:, :2]})


def in_memory(cells: pd.DataFrame, kind: str) -> Any:
    return make(cells) if kind == "AnnData" else mudata.MuData({"rna": make(cells), "atac": make(cells, "peak")})


def written(cells: pd.DataFrame, name: str, folder: Path) -> Path:
    path = folder / name
    with quiet_anndata(2 if "v2" in name else 3):
        data = in_memory(cells, "MuData" if "mu" in name else "AnnData")
        data.write_zarr(path) if path.suffix == ".zarr" else data.write(path)
    return path


def read(path: Path) -> Any:
    readers: dict[str, Callable[[Path], Any]] = {".h5ad": anndata.read_h5ad, ".h5mu": mudata.read_h5mu}
    is_mudata = path.suffix == ".zarr" and "mod" in zarr.open_group(path, mode="r")
    return readers.get(path.suffix, mudata.read_zarr if is_mudata else anndata.read_zarr)(path)


def test_the_embedding_is_indexed_by_cell_id_in_the_order_of_the_store(
    run: Run, embedding: pd.DataFrame, multiome: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(multiome, tmp_path / "store.zarr"))
    run.embed(store)
    atlas = mudata.read_zarr(store)
    assert embedding.index.tolist() == atlas.obs_names.tolist()
    assert embedding.columns.tolist() == ["liam_1", "liam_2", "liam_3", "liam_4"]
    np.testing.assert_allclose(embedding.to_numpy(), atlas.obsm["X_liam"], atol=1e-6)


@pytest.mark.parametrize("kind", ["AnnData", "MuData"])
def test_an_object_gets_the_embedding_of_its_own_cells(
    run: Run, embedding: pd.DataFrame, cells: pd.DataFrame, kind: str
) -> None:
    data = in_memory(cells, kind)
    assert run.embed(data) is None
    np.testing.assert_allclose(data.obsm["X_liam"], embedding.loc[cells.index], atol=1e-6)
    assert data.uns["X_liam"] == {RUN_ATTRIBUTE: run.record.id}


@pytest.mark.parametrize("name", ["a.h5ad", "mu.h5mu", "a.zarr", "a-v2.zarr", "mu.zarr"])
def test_a_file_gets_the_embedding_and_nothing_else_in_it_changes(
    run: Run, embedding: pd.DataFrame, cells: pd.DataFrame, name: str, tmp_path: Path
) -> None:
    path = written(cells, name, tmp_path)
    path.chmod(0o750)
    before = read(path)
    run.write_to(path)
    run.write_to(path)
    after = read(path)
    np.testing.assert_allclose(after.obsm["X_liam"], embedding.loc[cells.index], atol=1e-6)
    assert path.stat().st_mode & 0o777 == 0o750
    assert [p.name for p in tmp_path.iterdir()] == [name]
    del after.obsm["X_liam"]
    pd.testing.assert_frame_equal(after.obs, before.obs)
    assert set(after.obsm) == set(before.obsm)
    for one in ("rna", "atac") if "mu" in name else [None]:
        old, new = (data if one is None else data[one] for data in (before, after))
        np.testing.assert_array_equal(new.X, old.X)
        np.testing.assert_array_equal(new.obsm["X_pca"], old.obsm["X_pca"])


def test_a_failure_while_writing_leaves_the_file_as_it_was(
    run: Run, cells: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(cells, "a.h5ad", tmp_path)
    before = path.read_bytes()

    def fails(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(h5py.Group, "create_dataset", fails)
    with pytest.raises(RuntimeError, match=re.escape(str(path))):
        run.write_to(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5ad"]


def test_cells_without_an_embedding_are_named_or_left_missing_on_request(
    run: Run, embedding: pd.DataFrame, cells: pd.DataFrame, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    changed = cells.rename(index={cells.index[0]: "unknown-1", cells.index[7]: "unknown-2"})
    data = make(changed)
    with pytest.raises(ValueError, match=r"2 of 500 cells that .* does not have \('unknown-1', 'unknown-2'\); .*'nan'"):
        run.write_to(data)
    assert "X_liam" not in data.obsm
    run.write_to(data, missing="nan")
    is_missing = changed.index.str.startswith("unknown")
    np.testing.assert_array_equal(np.isnan(data.obsm["X_liam"]).all(axis=1), is_missing)
    np.testing.assert_allclose(data.obsm["X_liam"][~is_missing], embedding.loc[changed.index[~is_missing]], atol=1e-6)
    assert "lacks 102 cells of" in caplog.text
    with pytest.raises(ValueError, match="500 of 500 cells"):
        run.write_to(make(cells.rename(index=lambda name: f"x{name}")), missing="nan")
    data.obs_names = ["twice", "twice", *changed.index[2:]]
    with pytest.raises(ValueError, match=r"more than once \('twice'"):
        run.write_to(data)


@pytest.mark.parametrize("name", [None, "a.h5ad", "a.zarr"])
def test_another_runs_embedding_is_replaced_only_when_asked_to(
    run: Run, cells: pd.DataFrame, name: str | None, tmp_path: Path
) -> None:
    other = make(cells)
    other.obsm["X_liam"], other.uns["X_liam"] = np.zeros((500, 2)), {RUN_ATTRIBUTE: "runs-of-old"}
    target: Any = other
    if name is not None:
        target = tmp_path / name
        with quiet_anndata():
            other.write_zarr(target) if name == "a.zarr" else other.write(target)
    with pytest.raises(ValueError, match=r"that run runs-of-old made, not run multiome-\w+; .* overwrite=True"):
        run.write_to(target)
    run.write_to(target, key="X_new")
    run.write_to(target, overwrite=True)
    run.write_to(target)
    assert (target if name is None else read(target)).obsm["X_liam"].shape == (500, 4)


def test_what_is_no_file_of_cells_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.h5ad").write_text("no HDF5")
    with pytest.raises(ValueError, match=r"notes\.h5ad: got a file that is not HDF5"):
        run.write_to(tmp_path / "notes.h5ad")
    with pytest.raises(ValueError, match=r"absent\.h5ad: got no such file"):
        run.write_to(tmp_path / "absent.h5ad")


@pytest.mark.parametrize("has_barcode", [False, True])
def test_barcodes_of_one_source_find_their_cells_where_ingest_prefixed_them(tmp_path: Path, has_barcode: bool) -> None:
    names = {"one": [f"B{i}" for i in range(40)], "two": [f"B{i}" for i in range(20, 60)]}
    for source, ids in names.items():
        counts = np.random.default_rng(len(source)).poisson(1.0, (40, 30)).astype(np.float32) + 1
        data = anndata.AnnData(
            counts, obs=pd.DataFrame(index=ids), var=pd.DataFrame(index=[f"g{i}" for i in range(30)])
        )
        if has_barcode:
            data.obs["barcode"] = "the sources' own"
        data.write(tmp_path / f"{source}.h5ad")
    liam_scale.ingest([tmp_path / "one.h5ad", tmp_path / "two.h5ad"], out=tmp_path / "store.zarr", progress=False)
    kept = mudata.read_zarr(tmp_path / "store.zarr").obs
    barcodes = kept["source_barcode" if has_barcode else "barcode"].astype(str)
    assert kept.index.tolist() == (kept["sample"].astype(str) + "_" + barcodes).tolist()
    run = liam_scale.train(tmp_path / "store.zarr", out=tmp_path / "run", max_steps=1, n_hidden=8, n_latent=3)
    embedding = run.embedding()
    own = anndata.read_h5ad(tmp_path / "two.h5ad")
    run.embed(own)
    np.testing.assert_allclose(own.obsm["X_liam"], embedding.loc[[f"two_{name}" for name in names["two"]]], atol=1e-6)
    shared = own[own.obs_names.isin(names["one"])].copy()
    with pytest.raises(ValueError, match=r"barcodes that are cells of one and two .*data\.obs_names = 'one_' \+"):
        run.write_to(shared)
    shared.obs_names = "one_" + shared.obs_names
    run.write_to(shared)
    np.testing.assert_allclose(shared.obsm["X_liam"], embedding.loc[shared.obs_names], atol=1e-6)
    assert "barcode" in open_store(tmp_path / "store.zarr").schema.obs_columns
