"""MultiVI (Ashuach 2023, scvi-tools) on RNA and ATAC, with its own early stopping unless --max-epochs cuts it."""

import argparse
from typing import Any

from contract import compete


def fit(data: Any, arguments: argparse.Namespace) -> tuple[Any, int]:
    import scvi

    scvi.settings.seed = arguments.seed
    data.obs["batch"] = data.obs[arguments.batch_key].astype(str).astype("category")
    scvi.model.MULTIVI.setup_mudata(data, batch_key="batch", modalities={"rna_layer": "rna", "atac_layer": "atac"})
    model = scvi.model.MULTIVI(data, n_genes=data["rna"].n_vars, n_regions=data["atac"].n_vars, n_latent=20)
    model.train(max_epochs=arguments.max_epochs or 500, accelerator="cpu", enable_progress_bar=False)
    return model.get_latent_representation(), len(model.history["elbo_train"])


if __name__ == "__main__":
    compete(fit, "scvi-tools", "torch")
