"""Export: the file holds what the store holds, for readers of others."""

from __future__ import annotations

import shutil
from pathlib import Path

import anndata
import mudata
import numpy as np
import pytest

from liam_scale.export import main
from loaders.stores import open_store, read_store
from loaders.synthetic import simulate


def test_a_mosaic_with_an_embedding_comes_back_from_h5mu(trimodal: Path, tmp_path: Path) -> None:
    own = shutil.copytree(trimodal, tmp_path / "own.zarr")
    store = open_store(own)
    values = np.random.default_rng(0).random((store.schema.num_cells, 4), np.float32)
    store.write_embedding("X_exported", values)
    assert main([str(own), "--out", str(tmp_path / "a.h5mu")]) == 0
    found, expected = mudata.read_h5mu(tmp_path / "a.h5mu"), read_store(own)
    np.testing.assert_array_equal(found.obsm["X_exported"], values)
    assert list(found.mod) == ["rna", "atac", "adt"]
    for name, modality in found.mod.items():
        assert (modality.X != expected[name].X).nnz == 0
        assert modality.obs_names.equals(expected[name].obs_names)
        assert "cell_type" in modality.obs


def test_one_modality_becomes_h5ad_beside_the_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulate(tmp_path / "a.zarr", num_cells=60, num_genes=30, num_peaks=0, genes_per_cell=9)
    assert main([str(tmp_path / "a.zarr"), "--to", "h5ad"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'a.h5ad'}\n"
    assert anndata.read_h5ad(tmp_path / "a.h5ad").shape == (60, 30)
    assert main([str(tmp_path / "a.zarr"), "--to", "h5ad"]) == 2
    assert "a.h5ad exists; name a new file, or give --overwrite" in capsys.readouterr().err
    assert main([str(tmp_path / "a.zarr"), "--to", "h5ad", "--overwrite"]) == 0


def test_several_modalities_and_wrong_suffixes_are_refused(
    trimodal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(trimodal), "--to", "h5ad", "--out", str(tmp_path / "a.h5ad")]) == 2
    assert "--to: got h5ad for rna, atac, adt" in capsys.readouterr().err
    assert main([str(trimodal), "--out", str(tmp_path / "a.zarr")]) == 2
    assert f"name {tmp_path / 'a.h5mu'}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
