"""A store read into memory is what scanpy expects."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType

import mudata
import numpy as np
import pytest

from loaders.stores import open_store, read_store
from loaders.synthetic import simulate


@pytest.fixture(scope="module")
def mosaic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 simulated cells of two samples, one of which lacks ATAC, with an embedding of two far clouds."""
    path = tmp_path_factory.mktemp("whole") / "mosaic.zarr"
    sizes = {"num_genes": 300, "num_peaks": 400, "genes_per_cell": 60, "peaks_per_cell": 50}
    simulate(path, num_cells=300, num_samples=2, num_types=3, mosaic=[["rna"], ["rna", "atac"]], **sizes)
    points = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    points[::2] += 30.0
    open_store(path).write_embedding("X_liam", points)
    return path


def test_counts_are_floats_and_every_modality_stands_alone(mosaic: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="indices array has non-integer dtype")
        stored = mudata.read_zarr(mosaic)
    store = open_store(mosaic)
    whole = read_store(mosaic)
    assert whole.obs_names.tolist() == store.cell_ids(0, 300).tolist()
    assert 0 < whole["atac"].n_obs < 300 == whole["rna"].n_obs
    for name in ("rna", "atac"):
        assert stored[name].X.dtype == np.uint8
        assert whole[name].X.dtype == np.float32
        assert whole[name].X.indices.dtype == np.int32
        np.testing.assert_array_equal(whole[name].X.toarray(), stored[name].X.toarray())
        cells = whole.obs_names.get_indexer(whole[name].obs_names)
        np.testing.assert_array_equal(whole[name].obsm["X_liam"], whole.obsm["X_liam"][cells])
        assert whole[name].obs["sample"].tolist() == whole.obs["sample"].iloc[cells].tolist()
        np.testing.assert_array_equal(whole[name].obs["total_counts"], whole[name].X.sum(axis=1).A1)
    np.testing.assert_array_equal(whole.obsm["X_liam"], store.read_embedding("X_liam", 0, 300))
    assert (whole["rna"].X * 1000).max() == 1000 * int(stored["rna"].X.max()) > 255


@pytest.mark.slow  # scanpy's and umap's kernels compile for 20 seconds and more
def test_scanpy_works_on_what_is_read(mosaic: Path) -> None:
    scanpy = pytest.importorskip("scanpy")
    pytest.importorskip("igraph")
    whole = read_store(mosaic)
    rna = whole["rna"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scanpy's own
        scanpy.pp.calculate_qc_metrics(rna, percent_top=None, inplace=True)
        totals = np.asarray(rna.X.sum(axis=1)).ravel()
        scanpy.pp.normalize_total(rna, target_sum=1e4)
        np.testing.assert_allclose(rna.X.sum(axis=1), 1e4, rtol=1e-4)
        scanpy.pp.log1p(rna)
        scanpy.pp.pca(rna, n_comps=5)
        for data in (rna, whole):
            scanpy.pp.neighbors(data, n_neighbors=10, use_rep="X_liam")
            scanpy.tl.leiden(data, flavor="igraph", n_iterations=2, directed=False, resolution=0.05)
            assert list(data.obs["leiden"].iloc[::2].unique()) != list(data.obs["leiden"].iloc[1::2].unique())
            assert data.obs["leiden"].nunique() == 2
    np.testing.assert_allclose(rna.obs["total_counts"], totals)
    assert rna.obsm["X_pca"].shape == (300, 5)


def test_what_ingest_did_not_make_is_refused_with_the_reader_to_take(tmp_path: Path, toy: ModuleType) -> None:
    toy.write_mudata(tmp_path / "a.zarr", toy.make_mudata(rna=toy.cells_of("rna")), 3)
    with pytest.raises(ValueError, match=r"read_store: got .*a.zarr, which no ingest made; read it with mudata.read"):
        read_store(tmp_path / "a.zarr")
    with pytest.raises(ValueError, match="got no such file or folder"):
        read_store(tmp_path / "missing.zarr")
