"""Real files through the whole road: ingest, train on two ranks, embed."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import mudata
import numpy as np
import pandas as pd
import pytest

import liam_scale

Command = Callable[..., subprocess.CompletedProcess[str]]

SHARED = Path(os.environ.get("LIAM_SHARED", Path(__file__).resolve().parents[2] / ".." / "shared")) / "data"

FILES = {
    "bmmc_multiome_A": "batch",
    "bmmc_cite": "batch",
    "bmmc_trimodal_mosaic": "batch",
    "pbmc_wnn_mosaic": "batch",
    "a549_scicar_rna_atac": "batch",
    "pbmc_multiome_40c_fullwidth": None,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:var_names are not unique")
@pytest.mark.parametrize("name", FILES)
def test_real_data_get_an_embedding_on_two_ranks(name: str, tmp_path: Path, launch: Command) -> None:
    source = SHARED / f"{name}.h5mu"
    if not source.exists():
        pytest.skip(f"{source} is not there (folder shared/data beside the checkout, or LIAM_SHARED)")
    store, out = tmp_path / "store.zarr", tmp_path / "run"
    schema = liam_scale.ingest([source], out=store, progress=False)
    key = FILES[name]
    columns = ["--batch-key", key] if key else []
    done = launch("liam_scale.train", store, "--out", out, *columns, "--max-epochs", 2, "--max-steps", 12, ranks=2)
    assert done.returncode == 0, done.stderr
    losses = pd.read_csv(out / "history.csv")[["train_loss", "elbo_train"]]
    assert np.isfinite(losses).all().all()
    done = launch("liam_scale.embed", out, ranks=2)
    assert done.returncode == 0, done.stderr
    embedding = mudata.read_zarr(store).obsm["X_liam"]
    assert embedding.shape == (schema.num_cells, 20)
    np.testing.assert_allclose(embedding.sum(axis=1), 1.0, atol=1e-4)
