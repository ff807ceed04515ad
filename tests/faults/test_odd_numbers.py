"""Any number of cells, samples of one cell and absent modalities: it trains to finite numbers, or says why not."""

from pathlib import Path

import numpy as np
import pytest

import liam_scale
from loaders.synthetic import simulate

OPTIONS = {"n_hidden": 4, "n_latent": 2, "minibatch": 8, "max_steps": 2, "memory": "32MiB", "threads": 1}


@pytest.mark.parametrize("num_cells", [1, 2, 9, 17])
def test_few_cells_train_or_are_refused(tmp_path: Path, num_cells: int) -> None:
    mosaic = [("rna", "atac"), ("rna",)][: min(2, num_cells)]
    sizes = {"num_genes": 10, "num_peaks": 12, "genes_per_cell": 4, "peaks_per_cell": 4}
    simulate(tmp_path / "a.zarr", num_cells=num_cells, num_samples=len(mosaic), num_types=2, mosaic=mosaic, **sizes)
    try:
        run = liam_scale.train(tmp_path / "a.zarr", out=tmp_path / "run", batch_key="sample", **OPTIONS)
    except ValueError as error:
        assert "--batch-key" in str(error)  # noqa: PT017
        assert num_cells == 2
        return
    assert np.isfinite(run.embedding().to_numpy()).all()
