"""Small simulated stores, and commands run as a user runs them."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import main_of, run_ranks

import liam_scale
from loaders.synthetic import simulate

ROOT = Path(__file__).resolve().parents[2]
TINY = {"num_genes": 60, "num_peaks": 150, "genes_per_cell": 20, "peaks_per_cell": 40, "num_samples": 3, "num_types": 4}

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def multiome(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 cells, RNA and ATAC, three samples in the column `sample`."""
    path = tmp_path_factory.mktemp("stores") / "multiome.zarr"
    simulate(path, num_cells=600, **TINY)
    return path


@pytest.fixture(scope="session")
def trimodal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mosaic: one sample with everything, one RNA and ADT, one ATAC alone."""
    path = tmp_path_factory.mktemp("stores") / "trimodal.zarr"
    simulate(path, num_cells=400, num_proteins=12, mosaic=[("rna", "atac", "adt"), ("rna", "adt"), ("atac",)], **TINY)
    return path


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Environment of a command: this checkout, one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}


@pytest.fixture(scope="session")
def launch() -> Command:
    """Run a module's command on some ranks, as a scheduler starts them."""

    def start(module: str, *arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
        return run_ranks(arguments, ranks, code=main_of(module))

    return start


@pytest.fixture
def on_ranks(tmp_path: Path) -> Callable[[str, int], list[Any]]:
    """Run a script on some ranks; each saves `{its first argument}/{rank}.pt`, which are what is returned."""

    def start(script: str, ranks: int) -> list[Any]:
        run_ranks([tmp_path], ranks, code=script).check_returncode()
        return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(ranks)]

    return start


@pytest.fixture(scope="session")
def trained(multiome: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on `multiome`; tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "multiome"
    options = {"n_hidden": 16, "n_latent": 4, "minibatch": 64, "memory": "64MiB"}
    liam_scale.train(multiome, out=out, batch_key="sample", max_epochs=3, **options)
    return out
