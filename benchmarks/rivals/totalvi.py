"""totalVI (Gayoso 2021, scvi-tools) on RNA and ADT, with its own early stopping unless --max-epochs cuts it."""

import argparse
from typing import Any

from contract import compete


def fit(data: Any, arguments: argparse.Namespace) -> tuple[Any, int]:
    import scvi

    scvi.settings.seed = arguments.seed
    for modality in data.mod.values():
        modality.X = modality.X.toarray() if hasattr(modality.X, "toarray") else modality.X  # proteins must be dense
    data.obs["batch"] = data.obs[arguments.batch_key].astype(str).astype("category")
    scvi.model.TOTALVI.setup_mudata(data, batch_key="batch", modalities={"rna_layer": "rna", "protein_layer": "adt"})
    model = scvi.model.TOTALVI(data, n_latent=20)
    model.train(max_epochs=arguments.max_epochs, accelerator="cpu", enable_progress_bar=False)
    return model.get_latent_representation(), len(model.history["elbo_train"])


if __name__ == "__main__":
    compete(fit, "scvi-tools", "torch")
