"""The Python of the pages for those who come from elsewhere runs, block after block, on small data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import anndata
import matplotlib
import numpy as np
import pandas as pd
import pytest

import liam_scale
from loaders.synthetic import simulate_mudata

DOCS = Path(__file__).resolve().parents[2] / "docs"
TINY = {"num_genes": 40, "num_peaks": 80, "genes_per_cell": 20, "peaks_per_cell": 30, "num_samples": 2, "num_types": 3}


@pytest.fixture
def scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pages say that there is, in an empty folder; default epochs are two."""
    pytest.importorskip("scanpy", reason="scanpy is an extra: pip install liam-scale[evaluate]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("liam_scale.fitting.default_max_epochs", lambda num_cells: 2)
    matplotlib.use("agg")
    data = simulate_mudata(num_cells=200, **TINY)
    query = simulate_mudata(num_cells=80, seed=1, **TINY)
    query.obs["sample"] = query.obs["sample"].astype(str) + "_new"
    query.write("query.h5mu")
    data.obs["site"] = pd.Categorical(np.where(np.arange(200) % 3, "north", "south"))
    single = anndata.AnnData(data["rna"].X, obs=data.obs[["sample"]], var=data["rna"].var)
    single.obsm["ATAC"] = data["atac"].X
    return {"mdata": data, "adata": single, "peaks": list(data["atac"].var_names)}


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize(
    "page",
    [
        # scanpy's neighbours compile for 20 seconds.
        pytest.param("from-scvi-tools.md", marks=pytest.mark.slow),
        "from-liam.md",
        "covariates.md",
    ],
)
def test_every_line_of_the_page_runs(page: str, scope: dict[str, Any]) -> None:
    scope["liam_scale"] = liam_scale
    for number, block in enumerate(blocks(page), start=1):
        exec(compile(block, f"{page}, block {number}", "exec"), scope)
    if page == "from-scvi-tools.md":
        assert scope["mdata"].obsm["X_liam"].shape == (200, 20)
        assert set(scope["labels"]["label"]) <= {*scope["mdata"].obs["cell_type"], "unknown"}
        assert Path("loss.png").stat().st_size > 5_000
        assert scope["run"].path == Path("copy")
        assert "PCA" in scope["scores"].table
    if page == "from-liam.md":
        assert scope["run"].record.model.likelihood == "per-cell"
        assert liam_scale.load_run("runs/as-published").record.model.priors == "original"


def test_every_column_of_a_history_has_its_line(trimodal: Path, tmp_path: Path) -> None:
    """And every line its column."""
    options = {"batch_key": "sample", "max_epochs": 1, "n_hidden": 8, "on_bad_chunk": "skip"}
    history = liam_scale.train(trimodal, out=tmp_path / "run", **options).history
    rows = [line for line in (DOCS / "history.md").read_text().splitlines() if line.startswith("| `")]
    told = {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    ends = ("train", "validation")
    assert {full for name in told for full in {name.replace("*", end) for end in ends}} == set(history)
