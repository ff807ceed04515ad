"""Per-cell reconstruction and ELBO of a trained model, which the original leaves unimplemented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from liam_scale.continuous import standardised
from liam_scale.finding import stores_of
from liam_scale.model import Liam
from liam_scale.model.noise import Noise
from liam_scale.run import RunDirectory, check_features
from liam_scale.samples import sample_codes
from liam_scale.training.devices import Device, device_of
from loaders.loader import Loader
from loaders.minibatch import Minibatch
from loaders.stores import Store

CELLS_PER_STEP = 512


def elbo(
    directory: RunDirectory,
    *,
    store: Sequence[str] | Store = (),
    draws: int = 1,
    seed: int = 0,
    memory: str = "512MiB",
    device: Device = "auto",
) -> pd.DataFrame:
    """Loss terms of every cell, averaged over draws of the posterior.

    Parameters
    ----------
    directory
        A finished run of one model.
    store
        Store (or several, chained; or an open one) whose cells are scored; default: those of the training. Its samples
        must be those of the model.
    draws
        Posterior draws that are averaged.
    seed
        Of the draws: the same seed gives the same numbers.
    device
        auto: CUDA where there is one, else CPU.

    Returns
    -------
    DataFrame indexed by cell id, in nats: `elbo` (negative evidence lower bound, lower is better, scvi-tools' sign),
    `reconstruction_loss_<modality>`, `kl_divergence_z`, `kl_divergence_l_<modality>`. Terms of a modality that a cell
    lacks are NaN and do not enter its `elbo`.

    Raises
    ------
    ValueError
        The run is a late integration of several models, or the store does not fit it.
    """
    record = directory.record()
    if record.parts:
        raise ValueError(
            f"run: {directory.path} holds {len(record.parts)} models side by side, which have no common ELBO; "
            f"name one of {', '.join(str(directory.path / part) for part in record.parts)}"
        )
    used = device_of(device)
    model = directory.load_model().to(used)
    opened = stores_of(directory, store) if isinstance(store, Sequence) else store
    check_features(opened, record)
    frames = []
    loader = Loader(
        opened,
        replace(
            directory.loader_config(), minibatch=CELLS_PER_STEP, streams=1, memory=memory, threads=None, resident="off"
        ),
        sample=sample_codes(opened, record.batch_key, record.data.samples),
        obs=standardised(opened, record.data.continuous),
        modalities=record.model.modalities,
        subset="all",
        shuffle=False,
        transpose=False,
    )
    with loader, torch.no_grad():
        for minibatch in loader:
            frames.append(_terms(model, minibatch.to(used), draws=draws, seed=seed))
    frame = pd.concat(frames).sort_index()
    frame.index = pd.Index(opened.cell_ids(0, opened.schema.num_cells), name="cell")
    return frame


def _terms(model: Liam, minibatch: Minibatch, *, draws: int, seed: int) -> pd.DataFrame:
    """Mean terms of the cells of a minibatch, indexed by row of the store."""
    total: dict[str, np.ndarray] = {}
    for draw in range(draws):
        inference = model.infer(minibatch, Noise(seed=seed, step=draw, place=minibatch.rows))
        terms = model.cell_terms(minibatch, inference)
        columns = {"elbo": terms.elbo}
        for name, mask in terms.masks.items():
            absent = torch.where(mask, 0.0, torch.nan)
            columns[f"reconstruction_loss_{name}"] = terms.reconstruction[name] + absent
            if name in terms.kl_library:
                columns[f"kl_divergence_l_{name}"] = terms.kl_library[name] + absent
        columns["kl_divergence_z"] = terms.kl_z
        for name, value in columns.items():
            total[name] = total.get(name, 0.0) + value.cpu().numpy() / draws
    return pd.DataFrame(total, index=minibatch.rows.cpu().numpy())
