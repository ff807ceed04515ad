"""Whole commands on the pretend device: what they write is what they write on the CPU."""

import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pretend
import pytest
import torch

import liam_scale
from liam_scale.api import Run
from loaders.synthetic import simulate

OPTIONS = {"n_hidden": 16, "n_latent": 4, "minibatch": 64, "memory": "64MiB", "batch_key": "sample", "max_epochs": 3}
SAME = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def trained(multiome: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return liam_scale.train(multiome, out=tmp_path_factory.mktemp("runs") / "cpu", device="cpu", **OPTIONS)


def assert_same_history(found: Run, expected: Run) -> None:
    ours, theirs = (run.history.drop(columns=["cells_per_second", "waiting_share"]) for run in (found, expected))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-5)


def test_training_is_that_of_the_cpu_and_no_step_waits(
    trained: Run, multiome: Path, tmp_path: Path, gpu: torch.device, steps: list[pretend.Noted]
) -> None:
    run = liam_scale.train(multiome, out=tmp_path / "run", **OPTIONS)
    assert_same_history(run, trained)
    assert len(steps) == 27
    assert not any(noted.waits or "pageable" in noted.copies for noted in steps)
    pd.testing.assert_frame_equal(run.embedding(), trained.embedding(device="cpu"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("likelihood", ["per-cell", "original"])
def test_a_run_goes_on_from_one_device_to_the_other(
    likelihood: str, trimodal: Path, tmp_path: Path, gpu: torch.device, steps: list[pretend.Noted]
) -> None:
    options = {**OPTIONS, "likelihood": likelihood, "modalities": ("rna", "atac")}
    whole = liam_scale.train(trimodal, out=tmp_path / "cpu", device="cpu", **options)
    liam_scale.train(trimodal, out=tmp_path / "run", **{**options, "max_epochs": 1})
    assert steps
    liam_scale.train(trimodal, out=tmp_path / "run", device="cpu", **{**options, "max_epochs": 2})
    assert_same_history(liam_scale.train(trimodal, out=tmp_path / "run", **options), whole)


def test_what_is_made_of_a_run_is_that_of_the_cpu(
    trained: Run, multiome: Path, tmp_path: Path, gpu: torch.device
) -> None:
    """`--device auto` against `--device cpu`: embedding, decoding, scores, and new samples."""
    new, sizes = tmp_path / "new.zarr", {"num_genes": 60, "num_peaks": 150, "genes_per_cell": 20, "peaks_per_cell": 40}
    simulate(new, num_cells=80, num_samples=4, num_types=4, **sizes)
    made: dict[str, dict[str, np.ndarray]] = {}
    for device in ("cpu", "auto"):
        store = str(shutil.copytree(multiome, tmp_path / f"{device}.zarr"))
        run = Run(type(trained.directory)(Path(shutil.copytree(trained.path, tmp_path / f"run-{device}"))))
        with pretend.noting() as noted:
            run.embed(store, device=device)
            decoded = run.decode(tmp_path / f"{device}-values", modality="atac", store=(store,), device=device)
            mapped = run.map(new, max_epochs=2, device=device, overwrite=True)
            made[device] = {
                "embedding": liam_scale.read_store(store).obsm["X_liam"],
                "values": anndata.read_zarr(decoded).X,
                "elbo": run.elbo(store, device=device).to_numpy(),
                "mapped": liam_scale.read_store(new).obsm["X_liam"],
                "mapped elbo": mapped.elbo(device="cpu").to_numpy(),
            }
        assert (noted.num_launches > 0) == (device == "auto")
    for name, expected in made["cpu"].items():
        np.testing.assert_allclose(made["auto"][name], expected, rtol=1e-4, atol=1e-5, err_msg=name)
