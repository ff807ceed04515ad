"""Counts in a layer, as scanpy's users keep them beside normalised values: a run reads them wherever it reads cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mudata
import numpy as np
import pandas as pd
import pytest

import liam_scale
from liam_scale.embed import main as embed_main
from liam_scale.train import main as train_main
from loaders.synthetic import simulate_mudata

OPTIONS: dict[str, Any] = {"batch_key": "sample", "max_epochs": 2, "n_latent": 4, "n_hidden": 8}
SHAPE = {"num_genes": 40, "num_peaks": 60, "genes_per_cell": 15, "peaks_per_cell": 20, "num_samples": 2}


@pytest.fixture(scope="module")
def plain() -> mudata.MuData:
    return simulate_mudata(num_cells=200, **SHAPE)


@pytest.fixture
def layered(plain: mudata.MuData) -> mudata.MuData:
    """The same counts in a layer; X is normalised, with a value below zero, which no training takes."""
    data = plain.copy()
    for modality in data.mod.values():
        modality.layers["counts"] = modality.X.copy()
        modality.X = modality.X.astype(np.float32).log1p()
        modality.X.data[0] = -1.0
    return data


@pytest.fixture(scope="module")
def expected(plain: mudata.MuData, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    run = liam_scale.train(plain, out=tmp_path_factory.mktemp("plain") / "run", **OPTIONS)
    return run.embedding(plain)


def test_an_object_is_trained_on_and_embedded_by_its_layer(
    layered: mudata.MuData, expected: pd.DataFrame, tmp_path: Path
) -> None:
    run = liam_scale.train(layered, layer="counts", out=tmp_path / "run", **OPTIONS)
    pd.testing.assert_frame_equal(run.embedding(layered), expected)
    run.embed(layered)
    np.testing.assert_array_equal(layered.obsm["X_liam"], expected.loc[layered.obs_names])
    values = run.normalized(modality="rna", store=layered, groupby="cell_type", return_mean=True)
    assert np.isfinite(values).all(axis=None)
    assert np.isfinite(run.elbo(layered)["elbo"]).all()
    with pytest.raises(ValueError, match="--layer: "):
        liam_scale.train(layered, out=tmp_path / "run", **{**OPTIONS, "max_epochs": 3})
    with pytest.raises(ValueError, match=r"layer: .* has no layer 'none'.*; it has X, counts"):
        liam_scale.train(layered, layer="none", out=tmp_path / "other", **OPTIONS)
    assert not (tmp_path / "other").exists()


def test_a_file_is_trained_on_and_embedded_by_its_layer_and_a_store_of_the_same_cells_by_its_counts(
    layered: mudata.MuData, expected: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "cells.h5mu", tmp_path / "run"
    layered.write(file)
    arguments = ["--batch-key", "sample", "--max-epochs", "2", "--n-latent", "4", "--model.n-hidden", "8"]
    assert train_main([str(file), "--out", str(out), "--layer", "counts", *arguments]) == 0
    assert embed_main([str(out), "--out", str(tmp_path / "embedding.h5ad")]) == 0
    run = liam_scale.load_run(out)
    pd.testing.assert_frame_equal(run.embedding(), expected)
    copy = liam_scale.load_run(run.save_to(tmp_path / "copy").path)
    pd.testing.assert_frame_equal(copy.embedding(layered), expected)
    liam_scale.ingest(file, layer="counts", out=tmp_path / "store.zarr", progress=False)
    own = run.embedding(tmp_path / "store.zarr").loc[expected.index]
    np.testing.assert_allclose(own, expected, atol=1e-6)
    capsys.readouterr()
    code = train_main([str(tmp_path / "store.zarr"), "--out", str(tmp_path / "own"), "--layer", "counts", *arguments])
    assert code == 2
    assert "--layer counts for " in (said := capsys.readouterr().err)
    assert "whose modalities and counts are fixed; leave that out" in said
