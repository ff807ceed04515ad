"""Features that are chosen by streaming: equal to scanpy's, and what other commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import liam_scale
from liam_scale.cli import main
from loaders.stores import open_store, read_store
from loaders.synthetic import simulate
from loaders.variation import variable_features


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """900 cells of three donors, one of which lacks RNA."""
    path = tmp_path_factory.mktemp("features") / "a.zarr"
    sizes = {"num_genes": 300, "num_peaks": 200, "genes_per_cell": 90, "peaks_per_cell": 30, "num_types": 4}
    simulate(path, num_cells=900, num_samples=3, mosaic=[("rna", "atac"), ("rna",), ("atac",)], **sizes)
    return path


@pytest.mark.parametrize("flavor", ["seurat_v3", "seurat_v3_paper"])
@pytest.mark.parametrize("batch_key", [None, "donor", "cell_type"])
def test_variable_genes_are_those_of_scanpy(store: Path, flavor: Any, batch_key: str | None) -> None:
    scanpy = pytest.importorskip("scanpy", reason="an extra: pip install liam-scale[evaluate]")
    pytest.importorskip("skmisc", reason="an extra: pip install liam-scale[features]")
    rna = read_store(store)["rna"]
    rna.obs["donor"] = rna.obs["donor"].cat.remove_unused_categories()
    options = {"n_top_genes": 80, "flavor": flavor, "batch_key": batch_key, "inplace": False}
    expected = scanpy.pp.highly_variable_genes(rna, **options)
    found = variable_features(open_store(store), 80, flavor=flavor, batch_key=batch_key, is_shown=False)
    assert found.index.tolist() == expected.index.tolist()
    assert found["highly_variable"].tolist() == expected["highly_variable"].tolist()
    np.testing.assert_allclose(found["variances_norm"], expected["variances_norm"], rtol=1e-9)
    np.testing.assert_array_equal(found["highly_variable_rank"], expected["highly_variable_rank"])
    if batch_key is not None:
        assert found["highly_variable_nbatches"].tolist() == expected["highly_variable_nbatches"].tolist()


def test_genes_are_compared_among_the_cells_chosen(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("skmisc", reason="an extra: pip install liam-scale[features]")
    liam_scale.ingest(store, out=tmp_path / "part.zarr", where="donor == 'donor1'", progress=False)
    expected = liam_scale.features(tmp_path / "part.zarr", hvg=50, progress=False)
    assert liam_scale.features(store, hvg=50, where="donor == 'donor1'", progress=False) == expected
    assert len(expected["rna"]) == 50
    assert list(expected) == ["rna"]


def test_peaks_of_few_cells_go(store: Path, tmp_path: Path, capsys: Any) -> None:
    peaks = open_store(store).feature_names("atac").tolist()
    atac = read_store(store)["atac"]
    share = pd.Series(np.asarray((atac.X > 0).mean(axis=0)).ravel(), index=peaks)
    least = float(share.median())
    out = tmp_path / "peaks.txt"
    assert main(["features", str(store), "--min-cells-fraction", str(least), "--out", str(out)]) == 0
    kept = share.index[share >= least].tolist()
    assert out.read_text().split() == kept
    assert f"{len(kept)} of 200 of atac (all of rna stay)" in capsys.readouterr().out
    assert main(["features", str(store), "--min-cells-fraction", "0.1", "--out", str(out)]) == 2
    assert f"--out: {out} exists; name a new file, or give --overwrite" in capsys.readouterr().err


@pytest.fixture
def peaks(tmp_path: Path) -> Path:
    """20 cells with ATAC; peak 7 is chr1:700-750."""
    data = anndata.AnnData(scipy.sparse.csr_matrix(np.ones((20, 10), np.float32)))
    data.var_names = [f"chr1:{100 * f}-{100 * f + 50}" for f in range(10)]
    data.write_h5ad(tmp_path / "peaks.h5ad")
    return tmp_path / "peaks.h5ad"


def test_peaks_on_a_blacklist_go(peaks: Path, tmp_path: Path) -> None:
    bed = tmp_path / "b.bed"
    bed.write_text("chr1\t749\t751\tHigh Signal Region\nchr1\t50\t100\n")
    found = liam_scale.features(peaks, blacklist=bed, progress=False)
    assert found == {"atac": [f"chr1:{100 * f}-{100 * f + 50}" for f in range(10) if f != 7]}
    bed.write_text("1\t749\t751\n")
    with pytest.raises(ValueError, match=r"has no chromosome of the peaks \(it has 1, peaks are named 'chr1:0-50'\)"):
        liam_scale.features(peaks, blacklist=bed, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--hvg, --min-cells-fraction, --blacklist: got none"),
        (["--hvg", "301"], "--hvg: got 301; "),
        (["--hvg", "10", "--batch-key", "nobody"], "--batch-key: obs column: got 'nobody'"),
        (["--min-cells-fraction", "0.9999"], "no peak of"),
        (["--min-cells-fraction", "0.1", "--batch-key", "donor"], "--batch-key: got a column but no --hvg"),
        (["--blacklist", "other.bed"], "got a feature 'peak0'; peaks are named like chr1:100-600"),
        (["--hvg", "10", "--where", "donor == 'donor2'"], "--hvg: "),
    ],
)
def test_what_cannot_be_chosen_is_refused_and_writes_nothing(
    store: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, options: list[str], message: str
) -> None:
    pytest.importorskip("skmisc", reason="an extra: pip install liam-scale[features]")
    monkeypatch.chdir(tmp_path)
    Path("other.bed").write_text("1\t5\t9\n")
    assert main(["features", str(store), "--out", "f.txt", *options]) == 2
    assert message in capsys.readouterr().err
    assert not Path("f.txt").exists()
