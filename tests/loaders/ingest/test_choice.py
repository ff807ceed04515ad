"""Cells and features that are kept: the same counts, whatever the source, and expressions that cannot be taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from identifying import identifying_counts

from loaders.ingest import ingest
from loaders.stores import open_store, read_store
from loaders.synthetic import simulate


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """90 cells with 25 genes and 30 peaks in one matrix; `n` counts cells up, `tissue` and `donor` repeat."""
    counts = identifying_counts(90, 55)
    obs = pd.DataFrame({"tissue": ["blood", "bone marrow", None] * 30, "n": range(90), "my donor": ["a", "b"] * 45})
    obs["tissue"] = obs["tissue"].astype("category")
    data = anndata.AnnData(counts, obs=obs.set_index(pd.Index([f"cell{c}" for c in range(90)])))
    data.var_names = [f"gene{f}" if f < 25 else f"chr1:{f}-{f + 1}" for f in range(55)]
    data.var["feature_types"] = ["Gene Expression"] * 25 + ["Peaks"] * 30
    data.write_h5ad(tmp_path / "a.h5ad")
    return tmp_path / "a.h5ad"


@pytest.mark.parametrize(
    ("where", "keeps"),
    [
        ("tissue == 'blood' and n > 30", lambda obs: (obs.tissue == "blood") & (obs.n > 30)),
        ("`my donor` == 'b' or n < 5", lambda obs: (obs["my donor"] == "b") | (obs.n < 5)),
        ("tissue in ['blood', 'n']", lambda obs: obs.tissue == "blood"),
        ("not tissue.isna()", lambda obs: ~obs.tissue.isna()),
    ],
)
def test_the_cells_kept_are_those_of_pandas_with_their_counts(
    source: Path, tmp_path: Path, where: str, keeps: Callable[[Any], Any]
) -> None:
    ingest(source, out=tmp_path / "s.zarr", where=where, progress=False)
    data, kept = anndata.read_h5ad(source), read_store(tmp_path / "s.zarr")
    expected = data[keeps(data.obs)]
    assert sorted(kept.obs_names) == sorted(expected.obs_names)
    for modality, columns in (("rna", slice(25)), ("atac", slice(25, None))):
        own = kept[modality][expected.obs_names]
        np.testing.assert_array_equal(own.X.toarray(), expected.X[:, columns].toarray())
    pd.testing.assert_series_equal(kept.obs["n"].loc[expected.obs_names], expected.obs["n"], check_dtype=False)


def test_a_subset_of_a_mosaic_keeps_its_samples_and_no_empty_category(tmp_path: Path) -> None:
    options = {"num_genes": 40, "num_peaks": 60, "genes_per_cell": 10, "peaks_per_cell": 15, "num_samples": 3}
    whole = tmp_path / "a.zarr"
    simulate(whole, num_cells=200, mosaic=[("rna", "atac"), ("rna",), ("atac",)], **options)
    ingest(whole, out=tmp_path / "b.zarr", where="donor != 'donor0'", progress=False)
    store, kept = read_store(whole), open_store(tmp_path / "b.zarr")
    assert kept.obs_column("donor").categories == kept.obs_column("sample").categories == ("donor1", "donor2")
    found = read_store(tmp_path / "b.zarr")
    for modality in ("rna", "atac"):
        ids = found[modality].obs_names
        np.testing.assert_array_equal(found[modality].X.toarray(), store[modality][ids].X.toarray())
    assert set(found["atac"].obs["donor"]) == {"donor2"}
    ingest(whole, out=tmp_path / "c.zarr", where="donor == 'donor1'", progress=False)
    assert list(open_store(tmp_path / "c.zarr").schema.modalities) == ["rna"], "no cell is left that has atac"


def test_features_named_are_kept_and_modalities_without_any_stay_whole(source: Path, tmp_path: Path) -> None:
    ingest(source, out=tmp_path / "s.zarr", features=["gene7", "gene3", "nothing"], progress=False)
    kept = read_store(tmp_path / "s.zarr")
    assert kept["rna"].var_names.tolist() == ["gene3", "gene7"]
    assert kept["atac"].n_vars == 30
    data = anndata.read_h5ad(source)
    np.testing.assert_array_equal(kept["rna"][data.obs_names].X.toarray(), data.X[:, [3, 7]].toarray())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "organ == 'x'"}, r"where: got .*, which names no obs column .* columns are: tissue, n, my donor"),
        ({"where": "n > @np.inf"}, "where: .* names no obs column"),
        ({"where": "n >"}, r"where: got 'n >', which cannot be evaluated"),
        ({"where": "n > 'a'"}, r"where: .* cannot be evaluated"),
        ({"where": "n + 1"}, r"where: got 'n \+ 1', which is no comparison"),
        ({"where": "n < 0"}, r"where: got 'n < 0', for which no cell is left"),
        ({"features": ["zz"]}, r"features: got 1 names such as 'zz', none of which is there \(there are .gene0."),
    ],
)
def test_what_keeps_nothing_is_refused_and_leaves_nothing(
    source: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ingest(source, out=tmp_path / "s.zarr", progress=False, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]


def test_stores_are_sources_too_and_merge_with_their_samples(tmp_path: Path) -> None:
    options = {"num_genes": 40, "num_peaks": 0, "genes_per_cell": 10, "num_samples": 2}
    for seed in (0, 1):
        simulate(tmp_path / f"{seed}.zarr", num_cells=50, seed=seed, **options)
    ingest([tmp_path / "0.zarr", tmp_path / "1.zarr"], out=tmp_path / "both.zarr", progress=False)
    both = read_store(tmp_path / "both.zarr")
    assert both.n_obs == 100
    one = read_store(tmp_path / "1.zarr")
    own = both[[f"1_{cell}" for cell in one.obs_names]]
    np.testing.assert_array_equal(own["rna"].X.toarray(), one["rna"].X.toarray())
    assert own.obs["donor"].tolist() == one.obs["donor"].tolist()


def test_sums_of_counts_that_a_store_keeps_for_a_modality_are_no_column_of_its_cells(tmp_path: Path) -> None:
    """They would be wrong as soon as features are left out."""
    simulate(tmp_path / "a.zarr", num_cells=50, num_genes=40, num_peaks=0, genes_per_cell=10)
    before = open_store(tmp_path / "a.zarr").schema.obs_columns
    ingest(tmp_path / "a.zarr", out=tmp_path / "b.zarr", features=["gene1", "gene2"], progress=False)
    assert open_store(tmp_path / "b.zarr").schema.obs_columns == before
