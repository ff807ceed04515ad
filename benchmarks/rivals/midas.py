"""MIDAS (He 2024, scmidas) on any modalities and mosaics; 1,000 epochs, of the 1,000 to 2,000 that it advises."""

import argparse
import tempfile
from typing import Any

from contract import compete


def fit(data: Any, arguments: argparse.Namespace) -> tuple[Any, int]:
    import lightning
    import scmidas

    lightning.seed_everything(arguments.seed, verbose=False)
    for modality in data.mod.values():
        modality.obs["batch"] = data.obs.loc[modality.obs_names, arguments.batch_key].astype(str).to_numpy()
    scmidas.MIDAS.setup_mudata(data, batch_key="batch")
    epochs = arguments.max_epochs or 1_000
    with tempfile.TemporaryDirectory() as folder:
        model = scmidas.MIDAS(data, save_model_path=folder, n_save=epochs + 1)
        model.train(max_epochs=epochs, accelerator="cpu", devices=1, enable_progress_bar=False, logger=False)
        return model.get_latent_representation(), epochs


if __name__ == "__main__":
    compete(fit, "scmidas", "torch")
