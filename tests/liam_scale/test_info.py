"""Info: what a store holds, of every kind of store, as text and as JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from liam_scale.info import describe, info, main
from loaders.stores import open_store


def test_a_mosaic_says_which_cells_have_what_and_who_embedded_them(trimodal: Path, tmp_path: Path) -> None:
    store = open_store(shutil.copytree(trimodal, tmp_path / "own.zarr"))
    values = np.zeros((store.schema.num_cells, 3), np.float32)
    store.write_embedding("X_liam", values, {"liam_scale_run": "a-1"})
    found = info(store)
    assert sum(found["cells_with"].values()) == found["cells"] == 400
    assert set(found["cells_with"]) == {"rna + atac + adt", "rna + adt", "atac"}
    assert found["embeddings"] == {"X_liam": {"dimensions": 3, "run": "a-1"}}
    assert sum(found["obs"]["sample"].values()) == 400
    assert found["obs"]["own_weight"] is None
    assert found["made_by"]["num_samples"] == 3
    assert found["bytes"] > sum(held["bytes"] for held in found["modalities"].values()) > 0
    text = describe(found)
    assert "cells with " in text
    assert "embedding X_liam: 3 dimensions, by run a-1" in text


def test_json_is_the_same_and_the_command_takes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = scipy.sparse.random(30, 20, 0.3, "csr", random_state=0)
    counts.data[:] = 1
    obs = pd.DataFrame({"donor": ["a", None, "b"] * 10, "id": [f"i{i}" for i in range(30)]})
    data = anndata.AnnData(counts, obs=obs.set_index(pd.Index([f"c{i}" for i in range(30)])))
    data.obsm["X_pca"] = np.zeros((30, 2), np.float32)
    data.write_h5ad(tmp_path / "a.h5ad")
    assert main([str(tmp_path / "a.h5ad"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["obs"]["donor"] == {"a": 10, "b": 10, "missing": 10}
    assert found["embeddings"] == {"X_pca": {"dimensions": 2, "run": None}}
    assert found["made_by"] is None
    assert main([str(tmp_path / "a.h5ad")]) == 0
    assert "id: 30 values\n" in capsys.readouterr().out


def test_what_is_no_store_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.zarr")]) == 2
    assert "none.zarr" in capsys.readouterr().err


def test_a_file_whose_modalities_have_other_names_is_told_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = scipy.sparse.csr_matrix(np.ones((30, 20), np.float32))
    obs = pd.DataFrame(index=[f"c{n}" for n in range(30)])
    parts = {name: anndata.AnnData(counts, obs=obs) for name in ("rna", "h3k27ac")}
    for name, part in parts.items():
        part.var_names = [f"{name}:{n}" for n in range(20)]
    mudata.MuData(parts).write_h5mu(tmp_path / "a.h5mu")
    found = info(open_store(tmp_path / "a.h5mu"))
    # Which cells have the modality that was left out is no embedding.
    assert (list(found["modalities"]), found["embeddings"]) == (["rna"], {})
    assert main([str(tmp_path / "a.h5mu"), "--modality", "h3k27ac=NM"]) == 0
    assert "h3k27ac: 30 cells x 20 features" in capsys.readouterr().out
