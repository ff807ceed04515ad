"""Weighted nearest neighbours of Seurat (Hao 2021), RNA beside ADT or ATAC; the latent is the supervised PCA of RNA on
their graph. Nothing of the batch is removed. Needs Rscript and its package Seurat."""

import argparse
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from contract import compete


def fit(data: Any, arguments: argparse.Namespace) -> tuple[Any, None]:
    import pandas
    import scipy.io
    import scipy.sparse

    program = Path(__file__).with_suffix(".R")
    with tempfile.TemporaryDirectory() as folder:
        for name, modality in data.mod.items():
            scipy.io.mmwrite(Path(folder) / f"{name}.mtx", scipy.sparse.coo_matrix(modality.X).T)
        subprocess.run(["Rscript", str(program), folder, str(arguments.seed)], check=True)
        arguments.versions["Seurat"] = (Path(folder) / "version.txt").read_text().strip()
        return pandas.read_csv(Path(folder) / "latent.csv", index_col=0).to_numpy(), None


if __name__ == "__main__":
    compete(fit)
