"""A trained run as Python sees it: thin methods over the same rooms as the commands."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from anndata import AnnData
from mudata import MuData

from liam_scale.archetypes import Archetypes, ArchetypesConfig, archetypes
from liam_scale.attach import Missing, attach
from liam_scale.decode import DecodeConfig, Decoding, decode, normalized
from liam_scale.differential import DifferentialConfig, differential
from liam_scale.elbo import elbo
from liam_scale.embed import EmbedConfig, compute, embed
from liam_scale.finding import IN_MEMORY, kinds_of, seen_by, stores_of
from liam_scale.labels import transfer_labels
from liam_scale.map import MapConfig, map_store
from liam_scale.model import Liam
from liam_scale.run import RunDirectory, RunRecord, attributes_of
from liam_scale.tables import as_tuple
from liam_scale.training.history import read_history
from loaders.durable import SUFFIX, replacing
from loaders.formats.root import addresses
from loaders.stores import Store, open_known


@dataclass(frozen=True)
class Run:
    """A trained (or interrupted) run on disk."""

    directory: RunDirectory
    stores: tuple[str, ...] = ()
    """Stores to use where none is given; none: those of the training."""

    @property
    def path(self) -> Path:
        return self.directory.path

    @property
    def record(self) -> RunRecord:
        """Options of the model, samples, priors, and the schema's fingerprint."""
        return self.directory.record()

    @property
    def history(self) -> pd.DataFrame:
        """One row an evaluation, columns under scvi-tools' names (`elbo_validation`, ...)."""
        return read_history(self.directory.parts()[0].history)

    def __repr__(self) -> str:
        if not self.directory.is_run:
            return f"Run {self.path}: nothing trained there yet"
        record, state = self.record, "finished" if self.directory.is_finished else "not finished"
        keys = " x ".join(map(repr, record.batch_key))
        samples = f"{record.data.num_samples} samples of {keys}" if keys else "no samples"
        read = f", decoders read {', '.join(record.data.continuous)}" if record.data.continuous else ""
        latent = sum(part.record().model.n_latent or 0 for part in self.directory.parts())
        sizes = ", ".join(f"{name}: {size:,}" for name, size in record.data.num_features.items())
        lines = [
            f"Run {self.path}: {record.model.model}, {state}",
            f"stores: {', '.join(record.stores)}",
            f"features: {sizes}",
            f"{samples}, {latent} latent dimensions{read}, id {record.id}",
        ]
        return "\n    ".join(lines)

    def model(self) -> Liam:
        """The trained module, on the CPU, in evaluation mode."""
        return self.directory.load_model()

    def embed(self, store: str | Path | AnnData | MuData | None = None, **options: Any) -> str | None:
        """Write `obsm["X_liam"]` of a store, and return where it stands; or that of an object in memory.

        Options are the fields of `liam_scale.embed.EmbedConfig`, or for an object the keywords of `write_to`.
        """
        if isinstance(store, AnnData | MuData):
            self.write_to(store, **options)
            return None
        return embed(EmbedConfig(run=self.path, store=_uris(store) or self.stores, **options))

    def embedding(self, store: str | Path | AnnData | MuData | None = None, **options: Any) -> pd.DataFrame:
        """The embedding in memory, a row for each cell, indexed by cell id; written nowhere.

        `adata.obsm["X_liam"] = run.embedding().loc[adata.obs_names].to_numpy()` is what `run.embed(adata)` does.
        """
        config = EmbedConfig(run=self.path, **options)
        opened = self.open_store(store)
        values = compute(config, opened)
        cells = pd.Index(opened.cell_ids(0, len(values)), name="cell")
        return pd.DataFrame(values, index=cells, columns=[f"liam_{i + 1}" for i in range(values.shape[1])])

    def write_to(
        self,
        target: AnnData | MuData | str | Path,
        *,
        store: str | Path | AnnData | MuData | None = None,
        key: str = "X_liam",
        overwrite: bool = False,
        missing: Missing = "refuse",
        **options: Any,
    ) -> None:
        """Put the embedding into your own object or file, by cell id and in its order of cells.

        Parameters
        ----------
        target
            An AnnData or MuData, or an h5ad, h5mu or Zarr file, in which nothing else changes. It may lack cells of
            the store. Its ids are those of the store; or, where ingest put the name of the source before them, the
            barcodes of one source.
        store
            Store with the counts of these cells; default: that of the training, or the target itself where that was an
            object in memory.
        key
            Name in obsm.
        overwrite
            Replace an embedding of that name that another run made.
        missing
            Cells that the store lacks: "refuse" them, or fill their rows with "nan".
        **options
            Fields of `liam_scale.embed.EmbedConfig`: `kind`, `memory`, `threads`, `seed`.

        Raises
        ------
        ValueError
            Cells cannot be found, or another run's embedding stands there.
        """
        config, run = EmbedConfig(run=self.path, **options), self.record.id
        is_held = self.record.stores[0].endswith(IN_MEMORY) and isinstance(target, AnnData | MuData)
        opened = self.open_store(target if store is None and is_held else store)
        attach(
            target,
            lambda: compute(config, opened),
            opened,
            key=key,
            attributes=attributes_of(run),
            run=run,
            overwrite=overwrite,
            missing=missing,
        )

    def open_store(self, store: Any = None) -> Store:
        """A store that is given, data in memory included, or that of the run."""
        if isinstance(store, AnnData | MuData):
            held = open_known(store, kinds_of(self.directory), foreign_layer=self.record.layer)
            return seen_by(self.directory, held)
        return stores_of(self.directory, _uris(store) or self.stores)

    def decode(self, out: str | Path, **options: Any) -> Path:
        """Write decoded values; options are the fields of `liam_scale.decode.DecodeConfig`."""
        return decode(DecodeConfig(run=self.path, out=Path(out), **{"store": self.stores, **options}))

    def normalized(
        self,
        features: str | Sequence[str] = (),
        *,
        modality: str | None = None,
        groupby: str | None = None,
        target_sample: str = "own",
        at: str | Sequence[str] = (),
        num_samples: int = 25,
        return_mean: bool = False,
        out: str | Path | None = None,
        store: str | Path | AnnData | MuData | None = None,
        **options: Any,
    ) -> pd.DataFrame | Path:
        """Normalised expression, accessibility and protein; what `decode` writes.

        Parameters
        ----------
        features
            Names of features; `adt:CD4` names the modality where names coincide. None: all of `modality`.
        groupby
            Obs column: a row for each group of cells, their mean, instead of one for each cell.
        target_sample
            Sample that all cells are decoded as; own: that of each cell; mean: average over all samples.
        at
            Values of continuous covariates that all cells are decoded for, such as "age=40"; default: its own.
        num_samples
            Posterior draws of each cell, reproducible by `seed`; 0: decode the embedding in the store, once.
        return_mean
            Return the mean over draws alone.
        out
            AnnData Zarr to write, chunk by chunk, instead of returning values: X is the mean, the layer `sd` the
            standard deviation over draws.
        store
            Store with the cells; default: that of the training.
        **options
            The other fields of `liam_scale.decode.DecodeConfig`: `library_size`, `key`, `memory`, `seed`, `device`.

        Returns
        -------
        DataFrame of cells (or groups) x features; of several draws with columns (`mean` or `sd`, feature), where the
        standard deviation is that over draws: of the value of a cell, or of the mean of a group. With `out`: its path.
        """
        chosen = as_tuple(features)
        own = {"modality": modality, "groupby": groupby, "target_sample": target_sample, "num_samples": num_samples}
        asked = {"run": self.path, "features": chosen, "at": as_tuple(at), **own, **options}
        if out is not None:
            return decode(DecodeConfig(out=Path(out), **asked), self.open_store(store))
        mean, sd = normalized(Decoding(**asked), self.open_store(store))
        return mean if return_mean or sd is None else pd.concat({"mean": mean, "sd": sd}, axis=1)

    def differential(
        self,
        store: str | Path | AnnData | MuData | None = None,
        *,
        groupby: str | pd.Series,
        group: str | Sequence[str] = (),
        out: str | Path | None = None,
        **options: Any,
    ) -> pd.DataFrame:
        """Features that change between groups of cells; see `liam_scale.differential.differential` for the columns.

        Parameters
        ----------
        store
            Store, or data in memory, with the embedding; default: that of the training.
        groupby
            Obs column; or labels indexed by cell id, such as `adata.obs["leiden"]`.
        group
            Groups to compare with the reference; none: each in turn.
        out
            CSV to write as well.
        **options
            The other fields of `liam_scale.differential.DifferentialConfig`, such as `reference="rest"`,
            `modality="rna"`, `delta=0.25`, `fdr=0.05`.
        """
        labels = groupby if isinstance(groupby, pd.Series) else None
        name = groupby if isinstance(groupby, str) else str(groupby.name)
        groups = as_tuple(group)
        asked: dict[str, Any] = {"groupby": name, "group": groups, "out": None if out is None else Path(out)}
        return differential(DifferentialConfig(run=self.path, **asked, **options), self.open_store(store), labels)

    def archetypes(self, store: str | Path | AnnData | MuData | None = None, **options: Any) -> Archetypes:
        """What the corners of the latent simplex stand for; options are the fields of `ArchetypesConfig`."""
        return archetypes(ArchetypesConfig(run=self.path, **options), self.open_store(store))

    def map(
        self,
        store: str | Path | AnnData | MuData,
        *,
        reference: str | Path | AnnData | MuData | None = None,
        **options: Any,
    ) -> Run:
        """Place the cells of new samples into this model, and return the run that is extended by them.

        Parameters
        ----------
        store
            Store with the new cells, or data in memory, which then have `obsm["X_liam"]` and need `out`, the folder of
            the extended run.
        reference
            With `label_key`: the labelled cells; default: the store of the training.
        **options
            Fields of `liam_scale.map.MapConfig`, such as `out`, `layer="counts"`, `peaks="overlap"` or `label_key`.
        """
        is_held = isinstance(store, AnnData | MuData)
        name = f"{type(store).__name__}{IN_MEMORY}" if is_held else _uris(store)[0]
        config = MapConfig(run=self.path, store=name, **options)
        is_labelling = reference is not None or config.label_key is not None
        labelled = self.open_store(reference) if is_labelling else None
        return Run(map_store(config, store if is_held else None, labelled))

    def labels(
        self,
        store: str | Path | AnnData | MuData,
        *,
        label_key: str,
        reference: str | Path | AnnData | MuData | None = None,
        key: str = "X_liam",
        neighbors: int = 50,
        unknown: float = 0.5,
    ) -> pd.DataFrame:
        """Labels of embedded cells from their neighbours in the reference, which has them in an obs column.

        The reference is the store of the training, or a store or data in memory that are given.
        See `liam_scale.labels.transfer_labels` for what is returned; `map(store, label_key=...)` writes the same.
        """
        return transfer_labels(
            self.directory,
            self.open_store(store),
            reference=self.open_store(reference),
            label_key=label_key,
            key=key,
            neighbors=neighbors,
            unknown=unknown,
        )

    def elbo(self, store: str | Path | AnnData | MuData | None = None, **options: Any) -> pd.DataFrame:
        """Per-cell loss terms (nats), indexed by cell id; options are the keywords of `liam_scale.elbo.elbo`."""
        return elbo(self.directory, store=self.open_store(store), **options)

    def save_to(self, folder: str | Path, *, checkpoints: bool = False) -> Run:
        """Copy the run to a new folder, without its stores, and return it there.

        The copy is all that embedding, decoding and the other methods need; it finds its store as any run that was
        moved does (`load_run`). With `checkpoints` training can go on in it.

        Raises
        ------
        ValueError
            The run has not finished and is copied without checkpoints, or the folder exists.
        """
        folder = Path(folder)
        if folder.exists():
            raise ValueError(f"folder: {folder} exists; name a new one")
        if not (checkpoints or self.directory.is_finished):
            raise ValueError(f"run: {self.path} has not finished; copy it with checkpoints=True to go on elsewhere")
        left_out = [f".*{SUFFIX}", "embedding-*", "mapped-*", *([] if checkpoints else ["checkpoints"])]
        with replacing(folder, alone=True) as path:
            shutil.copytree(self.path, path, ignore=shutil.ignore_patterns(*left_out))
        return Run(RunDirectory(folder), self.stores)


def _uris(store: str | Path | None) -> tuple[str, ...]:
    return () if store is None else tuple(addresses(store, "store"))
