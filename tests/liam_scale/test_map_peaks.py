"""Cells of another cohort, whose peaks have other names, are placed by overlap as by their own names."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse

import liam_scale
from liam_scale.cli import main
from loaders.stores import open_store


def test_peaks_of_another_cohort_are_mapped_by_overlap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = np.random.default_rng(0).poisson(1.0, (200, 40)).astype(np.float32)
    stores = {"old": (0, 0), "new": (0, 0), "moved": (3, -4)}
    for name, (start, end) in stores.items():
        data = anndata.AnnData(scipy.sparse.csr_matrix(counts))
        data.obs_names = [f"cell{c}" for c in range(200)]
        data.var_names = [f"chr1:{100 * f + start}-{100 * f + 50 + end}" for f in range(40)]
        data.obs["donor"] = "d0" if name == "old" else "d1"
        data.write_h5ad(tmp_path / f"{name}.h5ad")
        liam_scale.ingest(tmp_path / f"{name}.h5ad", out=tmp_path / f"{name}.zarr", sample_key="donor", progress=False)
    options = {"n_hidden": 8, "n_latent": 4, "memory": "64MiB", "model": "atac-only", "max_epochs": 1}
    liam_scale.train(tmp_path / "old.zarr", out=tmp_path / "run", batch_key="sample", **options)
    run, shared = str(tmp_path / "run"), ["--max-epochs", "1"]
    assert main(["map", run, str(tmp_path / "new.zarr"), *shared]) == 0
    assert main(["map", run, str(tmp_path / "moved.zarr"), *shared]) == 2
    assert "has no feature name in common" in capsys.readouterr().err
    assert main(["map", run, str(tmp_path / "moved.zarr"), "--peaks", "overlap", *shared]) == 0
    by_name, by_overlap = (
        open_store(tmp_path / f"{name}.zarr").read_embedding("X_liam", 0, 200) for name in ("new", "moved")
    )
    np.testing.assert_allclose(by_overlap, by_name, atol=1e-6)
