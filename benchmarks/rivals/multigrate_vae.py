"""Multigrate (Litinetskaya 2022, package multigrate) on any modalities and mosaics."""

import argparse
from typing import Any

from contract import compete


def fit(data: Any, arguments: argparse.Namespace) -> tuple[Any, int]:
    import multigrate
    import numpy

    adatas, losses = [], []
    for name, modality in data.mod.items():
        modality.X = modality.X.toarray() if hasattr(modality.X, "toarray") else modality.X
        if name == "adt":
            logs = numpy.log1p(modality.X)
            modality.X = logs - logs.mean(axis=1, keepdims=True)
        modality.obs["batch"] = data.obs.loc[modality.obs_names, arguments.batch_key].astype(str).to_numpy()
        adatas.append([modality])
        losses.append("nb" if name == "rna" else "mse")
    together = multigrate.data.organize_multimodal_anndatas(adatas=adatas, layers=[[None]] * len(adatas))
    multigrate.model.MultiVAE.setup_anndata(
        together, categorical_covariate_keys=["batch"], rna_indices_end=data["rna"].n_vars
    )
    model = multigrate.model.MultiVAE(together, losses=losses, z_dim=20)
    epochs = arguments.max_epochs or 200
    model.train(max_epochs=epochs, accelerator="cpu", enable_progress_bar=False)
    model.get_model_output()
    return together.obsm["X_multigrate"], epochs


if __name__ == "__main__":
    compete(fit, "multigrate", "scvi-tools", "torch")
