"""Genes that sources call differently are matched by a column of var, and by identifiers without their version."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse

from loaders.ingest import append, ingest
from loaders.stores import read_store

IDS = [f"ENSG0000000{number:04d}" for number in range(4)]
SYMBOLS = ["CD3E", "CD4", "CD8A", "MS4A1"]


def source(path: Path, names: list[str], ids: list[str | None] | None, order: list[int]) -> Path:
    """10 cells whose gene g has 10 g + cell, in an order of the genes."""
    counts = np.array([[10 * (gene + 1) + cell for gene in order] for cell in range(10)], np.float32)
    data = anndata.AnnData(scipy.sparse.csr_matrix(counts))
    data.obs_names, data.var_names = [f"{path.stem}{c}" for c in range(10)], [names[gene] for gene in order]
    if ids is not None:
        data.var["gene_ids"] = [ids[gene] for gene in order]
    data.write_h5ad(path)
    return path


def check(store: Path, names: list[str]) -> None:
    data = read_store(store)["rna"]
    for name in names:
        cells = data[[f"{name}{c}" for c in range(10)]]
        for gene, own in enumerate(IDS):
            np.testing.assert_array_equal(cells[:, own].X.toarray()[:, 0], 10 * (gene + 1) + np.arange(10))


def test_symbols_with_identifiers_and_identifiers_with_versions_are_the_same_genes(tmp_path: Path) -> None:
    one = source(tmp_path / "a.h5ad", SYMBOLS, [*IDS], [0, 1, 2, 3])
    other = source(tmp_path / "b.h5ad", [f"{name}.{k + 3}" for k, name in enumerate(IDS)], None, [3, 1, 0, 2])
    third = source(tmp_path / "c.h5ad", SYMBOLS[::-1], [f"{name}.2" for name in IDS], [2, 3, 0, 1])
    ingest([one, other], out=tmp_path / "s.zarr", feature_key="gene_ids", progress=False)
    check(tmp_path / "s.zarr", ["a", "b"])
    assert read_store(tmp_path / "s.zarr")["rna"].var["feature_name"].tolist() == SYMBOLS
    append(tmp_path / "s.zarr", third, feature_key="gene_ids", progress=False)
    check(tmp_path / "s.zarr", ["a", "b", "c"])


@pytest.mark.parametrize(
    ("key", "ids", "message"),
    [
        ("symbol", [*IDS], r"feature_key: got 'symbol', a column that var of no source has; columns are: gene_ids"),
        (
            "gene_ids",
            [*IDS[:3], None],
            r"feature_key: 'gene_ids' of .*a.h5ad is missing for 1 features of rna",
        ),
        ("gene_ids", [*IDS[:3], IDS[0]], r"feature names of rna: got 'ENSG00000000000' more than once"),
    ],
)
def test_a_column_that_names_no_feature_is_refused(
    tmp_path: Path, key: str, ids: list[str | None], message: str
) -> None:
    path = source(tmp_path / "a.h5ad", SYMBOLS, ids, [0, 1, 2, 3])
    with pytest.raises(ValueError, match=message):
        ingest(path, out=tmp_path / "s.zarr", feature_key=key, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["a.h5ad"]
