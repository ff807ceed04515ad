"""Lightning: a data module over the loader that trains MULTIVI and TOTALVI of scvi-tools out of core.

These two models ask for a MuData in memory and, unlike SCVI, take no data module. What they need of the data before
training (names, samples, which proteins a sample lacks, a prior of the background) a few hundred cells tell; so a model
is made of an *example*, and trained, with its own `train`, on minibatches of the whole store.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata
import mudata
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse
from torch import Tensor

from loaders.ecosystem import plain_mudata
from loaders.loader import Loader, Subset
from loaders.minibatch import Minibatch
from loaders.options import LoaderConfig
from loaders.selection import encode_column
from loaders.stores import Store, open_store

try:
    from lightning.pytorch import LightningDataModule
except ImportError as error:
    raise ImportError("loaders.lightning needs Lightning; pip install 'liam-scale[lightning]'") from error

KEYS = {"rna": "X", "atac": "atac", "adt": "proteins"}
"""Of the modalities in a minibatch of scvi-tools."""

DECIDED_HERE = ("train_size", "validation_size", "shuffle_set_split", "batch_size", "datasplitter_kwargs")
"""Options of scvi-tools' splitter, in whose place the data module stands."""


class Minibatches:
    """A loader as an iterable of what a model of scvi-tools takes."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(tensors_of, self.loader)


class StoreDataModule(LightningDataModule):
    """The cells of a store for MULTIVI and TOTALVI of scvi-tools.

    Parameters
    ----------
    store
        A store, or where one stands.
    batch_key
        Obs column with the sample of each cell, which the model corrects for.
    modalities
        Those that the model takes; default: all of the store.
    config
        How cells are read: `minibatch`, `memory`, `validation_share`. Proteins stay counts, whatever it says.
    seed
        Of the example, of the validation cells and of the order of cells.
    example_cells
        Cells of each sample in the example.

    Examples
    --------
    >>> data = StoreDataModule("atlas.zarr", batch_key="sample")
    >>> MULTIVI.setup_mudata(data.example, batch_key="sample", modalities={"rna_layer": "rna", "atac_layer": "atac"})
    >>> model = MULTIVI(data.example)
    >>> data.train(model, max_epochs=20)
    >>> latent = data.latent(model)
    """

    def __init__(
        self,
        store: str | Path | Store,
        *,
        batch_key: str,
        modalities: Sequence[str] | None = None,
        config: LoaderConfig | None = None,
        seed: int = 0,
        example_cells: int = 256,
    ) -> None:
        super().__init__()
        self.store = open_store(store) if isinstance(store, str | Path) else store
        self.batch_key, self.seed, self.example_cells = batch_key, seed, example_cells
        self.config = replace(config or LoaderConfig(), adt_transform="none")
        self.samples = encode_column(self.store, batch_key, allow_missing=False)
        self.modalities = [n for n in KEYS if n in (modalities or self.store.schema.modalities)]
        if unknown := {*(modalities or ())} - {*self.store.schema.modalities}:
            held = ", ".join(self.store.schema.modalities)
            raise ValueError(f"modalities: got {', '.join(sorted(unknown))}; {self.store.uri} holds {held}")
        self._loaders: list[Loader] = []

    @property
    def n_obs(self) -> int:
        """Cells of the store."""
        return self.store.schema.num_cells

    @cached_property
    def example(self) -> mudata.MuData:
        """Cells of every sample in memory, with all features: what a model is made of.

        For each protein that a sample has, some cell of that sample with a count of it is among them, as scvi-tools
        takes a protein without any count in a sample for one that was not measured there.
        """
        chosen = np.zeros(self.n_obs, bool)
        generator = np.random.default_rng(self.seed)
        codes = np.asarray(self.samples.codes)
        for code in range(len(self.samples.categories)):
            own = np.flatnonzero(codes == code)
            chosen[generator.choice(own, min(len(own), self.example_cells), replace=False)] = True
        if "adt" in self.modalities:
            chosen |= self._with_every_protein(codes)
        parts: dict[str, list[scipy.sparse.csr_matrix]] = {name: [] for name in self.modalities}
        rows = []
        for minibatch in self._loader("all", drop=~chosen):
            rows.append(minibatch.rows.numpy().copy())
            for name, counts in minibatch.counts.items():
                parts[name].append(counts.to_scipy().copy())
        return self._mudata(
            np.concatenate(rows), {name: scipy.sparse.vstack(own, "csr") for name, own in parts.items()}
        )

    def _with_every_protein(self, codes: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """(n,) cells that are the first of their sample with a count of some protein; one pass over the proteins."""
        found = np.zeros((len(self.samples.categories), self.store.schema.modalities["adt"].num_features), bool)
        first = np.zeros(self.n_obs, bool)
        for minibatch in self._loader("all", modalities=["adt"]):
            rows, counts = minibatch.rows.numpy(), minibatch.counts["adt"].to_scipy()
            for row, start, stop in zip(rows, counts.indptr[:-1], counts.indptr[1:], strict=True):
                own = counts.indices[start:stop][counts.data[start:stop] > 0]
                if not found[codes[row], own].all():
                    found[codes[row], own] = True
                    first[row] = True
        return first

    def _mudata(self, rows: npt.NDArray[np.int64], counts: dict[str, scipy.sparse.csr_matrix]) -> mudata.MuData:
        column = pd.Categorical.from_codes(np.asarray(self.samples.codes)[rows], pd.Index(self.samples.categories))
        obs = pd.DataFrame({self.batch_key: column}, index=[f"cell{row}" for row in rows])
        mods = {}
        for name in self.modalities:
            var = pd.DataFrame(index=self.store.feature_names(name).astype(object))
            # scvi-tools takes proteins dense alone
            values = counts[name].toarray() if name == "adt" else counts[name]
            mods[name] = anndata.AnnData(values, obs=obs.copy(), var=var)
        with plain_mudata():
            together = mudata.MuData(mods)
            together.obs[self.batch_key] = column
        return together

    def _loader(self, subset: Subset, **options: Any) -> Loader:
        asked: dict[str, Any] = {
            "modalities": self.modalities,
            "sample": self.samples.codes,
            "seed": self.seed,
        } | options
        own = Loader(self.store, self.config, subset=subset, shuffle=subset == "train", transpose=False, **asked)
        self._loaders.append(own)
        return own

    def train_dataloader(self) -> Minibatches:
        if self.trainer is not None and self.trainer.world_size > 1:
            raise ValueError(f"devices: got {self.trainer.world_size} processes; the data module feeds one")
        return Minibatches(self._loader("train"))

    def val_dataloader(self) -> Minibatches:
        return Minibatches(self._loader("validation"))

    def predict_dataloader(self) -> Minibatches:
        """All cells, in the order of the store."""
        return Minibatches(self._loader("all"))

    def teardown(self, stage: str | None = None) -> None:
        """Stop the reader threads."""
        while self._loaders:
            self._loaders.pop().close()

    def train(self, model: Any, **options: Any) -> None:
        """`model.train(**options)` on the cells of the store, with what scvi-tools derives from their number.

        Raises
        ------
        ValueError
            The model was not made of `example`, or an option is one of `config`.
        """
        self._check(model)
        if taken := [name for name in DECIDED_HERE if name in options]:
            raise ValueError(
                f"{taken[0]}: got {options[taken[0]]!r}, which the data module decides; give it "
                "config=LoaderConfig(minibatch=..., validation_share=...)"
            )
        known = {name: p.default for name, p in inspect.signature(model.train).parameters.items()} | options
        if known["max_epochs"] is None:
            options["max_epochs"] = max(1, min(round(20_000 / self.n_obs * 400), 400))
        if known["n_epochs_kl_warmup"] is None and known["n_steps_kl_warmup"] is None:
            options["n_steps_kl_warmup"] = int(0.75 * self.n_obs)
        with _in_place_of(model, "_data_splitter_cls", lambda *_, **__: self):
            model.train(**options)

    def latent(self, model: Any, **options: Any) -> npt.NDArray[np.float32]:
        """(n, d) `model.get_latent_representation(**options)` of all cells, in the order of the store."""
        self._check(model)
        try:
            with _in_place_of(model, "_make_data_loader", lambda *_, **__: self.predict_dataloader()):
                return model.get_latent_representation(**options)
        finally:
            self.teardown()

    def _check(self, model: Any) -> None:
        if getattr(model, "adata", None) is not self.example:
            raise ValueError(
                f"model: got {type(model).__name__} of other data; make it of this object's example: "
                f"{type(model).__name__}.setup_mudata(data.example, ...), {type(model).__name__}(data.example)"
            )
        found = model.adata_manager.get_state_registry("batch").get("original_key")
        if found != self.batch_key:
            raise ValueError(
                f"batch_key: got {found!r} in setup_mudata and {self.batch_key!r} here; give both the same"
            )
        if getattr(model.module, "modality_weights", None) == "cell":
            raise ValueError("modality_weights: got 'cell', a weight for each cell in memory; give equal or universal")


def tensors_of(minibatch: Minibatch) -> dict[str, Tensor]:
    """Dense float32 counts and codes under the names of scvi-tools; a modality that a cell lacks is zeros."""
    found = {KEYS[name]: counts.to_dense() for name, counts in minibatch.counts.items()}
    sample = minibatch.sample.unsqueeze(1)
    return {**found, "batch": sample, "labels": sample.new_zeros(sample.shape), "ind_x": minibatch.rows.unsqueeze(1)}


@contextmanager
def _in_place_of(model: Any, name: str, own: Callable[..., object]) -> Iterator[None]:
    """A method or class that the model looks up on itself, replaced for a while."""
    if not hasattr(model, name):
        raise ValueError(f"model: got {type(model).__name__} without {name}; give MULTIVI or TOTALVI of scvi-tools 1.4")
    setattr(model, name, own)
    try:
        yield
    finally:
        delattr(model, name)
