"""`append` and `merge` as a user types them, and what a run says of a store that has grown."""

from __future__ import annotations

import shutil
from pathlib import Path

import anndata
import numpy as np
import pytest

import liam_scale
from liam_scale.cli import main
from liam_scale.info import describe, info
from loaders.stores import open_store


@pytest.fixture
def further(multiome: Path, tmp_path: Path) -> Path:
    """100 cells of a new donor with RNA alone."""
    genes = open_store(multiome).feature_names("rna")
    counts = np.random.default_rng(0).poisson(0.5, (100, len(genes))).astype(np.float32)
    data = anndata.AnnData(counts)
    data.var_names, data.obs_names = genes.tolist(), [f"new{c}" for c in range(100)]
    data.obs["batch"] = "donor9"
    data.write_h5ad(tmp_path / "new.h5ad")
    return tmp_path / "new.h5ad"


def test_a_run_does_not_go_on_with_a_store_that_has_grown_but_embeds_all_of_it(
    multiome: Path, further: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(multiome, "a.zarr")
    options = {"n_hidden": 8, "n_latent": 4, "minibatch": 64, "memory": "64MiB"}
    run = liam_scale.train("a.zarr", out="run", batch_key="sample", max_epochs=1, **options)
    run.embed()
    assert main(["append", "a.zarr", str(further), "--sample-key", "batch"]) == 0
    said = capsys.readouterr()
    assert "wrote a.zarr: 700 cells\n  rna: 700 cells x 60 features" in said.out
    assert "a.zarr: left out, as not of all cells: X_liam; embed again" in said.err
    store = open_store("a.zarr")
    assert store.obs_column("sample").categories == ("donor0", "donor1", "donor2", "donor9")
    assert "700 cells, shuffled in 2 parts" in describe(info(store))
    assert info(store)["cells_with"] == {"rna": 100, "rna + atac": 600}
    with pytest.raises(ValueError, match=r"a.zarr is not what run was trained on:\n  cells: it has 700, the run 600"):
        liam_scale.train("a.zarr", out="run", batch_key="sample", max_epochs=2, **options)
    run.embed()
    assert np.isfinite(open_store("a.zarr").read_embedding("X_liam", 0, 700)).all()
    liam_scale.train("a.zarr", out="run2", batch_key="sample", max_epochs=1, **options)
    assert main(["append", "s3://bucket/a.zarr", str(further)]) == 2
    assert "store: got s3://bucket/a.zarr; give a store on a local disk" in capsys.readouterr().err
    assert main(["append", "a.zarr", str(further)]) == 2
    assert "error: sources: got 100 cells that stand in a.zarr already, such as 'new0'" in capsys.readouterr().err


def test_stores_merge_into_one(multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(multiome, tmp_path / "b.zarr")
    command = ["merge", str(multiome), str(tmp_path / "b.zarr"), "--out", str(tmp_path / "both.zarr")]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "both.zarr: 1,200 cells" in said.out
    assert "600 cell ids stand in more than one source: every id is prefixed" in said.err
    with pytest.raises(ValueError, match="name another path"):
        liam_scale.merge([multiome, tmp_path / "b.zarr"], out=tmp_path / "both.zarr")
    assert main(command) == 2
    assert "both.zarr exists" in capsys.readouterr().err
