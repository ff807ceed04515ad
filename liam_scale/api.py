"""The Python interface: thin functions over the same rooms as the commands.

>>> import liam_scale
>>> liam_scale.ingest(["donor1.h5mu", "donor2.h5mu"], out="atlas.zarr")
>>> run = liam_scale.train("atlas.zarr", batch_key="sample", out="runs/a")
>>> run.embed()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from anndata import AnnData
from mudata import MuData

from liam_scale.attach import Missing, attach
from liam_scale.config import TrainConfig
from liam_scale.decode import DecodeConfig, Decoding, decode, normalized
from liam_scale.elbo import elbo
from liam_scale.embed import EmbedConfig, compute, embed
from liam_scale.evaluate import EvaluateConfig, Evaluation
from liam_scale.evaluate import evaluate as evaluate_cells
from liam_scale.kernels.options import Impl
from liam_scale.kernels.precision import Precision
from liam_scale.map import MapConfig, map_store
from liam_scale.model import Liam, ModelConfig
from liam_scale.model.config import ModelName
from liam_scale.run import IN_MEMORY, RunDirectory, RunRecord, attributes_of, open_stores
from liam_scale.train import train as train_run
from liam_scale.training.devices import Device
from liam_scale.training.history import read_history
from liam_scale.training.optim import OptimConfig
from liam_scale.training.options import TrainingConfig
from loaders.check import check_store as check
from loaders.formats.root import addresses
from loaders.ingest import ingest
from loaders.options import LoaderConfig
from loaders.stores import Store, open_store, read_store

__all__ = ["Run", "check", "evaluate", "ingest", "load_run", "read_store", "train"]


@dataclass(frozen=True)
class Run:
    """A trained (or interrupted) run on disk."""

    directory: RunDirectory

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
        samples = f"{record.data.num_samples} samples of {record.batch_key!r}" if record.batch_key else "no samples"
        latent = sum(part.record().model.n_latent or 0 for part in self.directory.parts())
        sizes = ", ".join(f"{name}: {size:,}" for name, size in record.data.num_features.items())
        lines = [
            f"Run {self.path}: {record.model.model}, {state}",
            f"stores: {', '.join(record.stores)}",
            f"features: {sizes}",
            f"{samples}, {latent} latent dimensions, id {record.id}",
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
        return embed(EmbedConfig(run=self.path, store=_uris(store), **options))

    def embedding(self, store: str | Path | AnnData | MuData | None = None, **options: Any) -> pd.DataFrame:
        """The embedding in memory, a row for each cell, indexed by cell id; written nowhere.

        `adata.obsm["X_liam"] = run.embedding().loc[adata.obs_names].to_numpy()` is what `run.embed(adata)` does.
        """
        config = EmbedConfig(run=self.path, **options)
        opened = self._open(store)
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
        opened = self._open(target if store is None and is_held else store)
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

    def _open(self, store: Any) -> Store:
        """A store that was given, data in memory included, or those of the training."""
        if isinstance(store, AnnData | MuData):
            return open_store(store)
        return open_stores(_uris(store) or self.record.stores)

    def decode(self, out: str | Path, **options: Any) -> Path:
        """Write decoded values; options are the fields of `liam_scale.decode.DecodeConfig`."""
        return decode(DecodeConfig(run=self.path, out=Path(out), **options))

    def normalized(
        self,
        features: str | Sequence[str] = (),
        *,
        modality: str | None = None,
        groupby: str | None = None,
        target_sample: str = "own",
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
        chosen = (features,) if isinstance(features, str) else tuple(features)
        own = {"modality": modality, "groupby": groupby, "target_sample": target_sample, "num_samples": num_samples}
        opened, asked = self._open(store), {"run": self.path, "features": chosen, **own, **options}
        if out is not None:
            return decode(DecodeConfig(out=Path(out), **asked), opened)
        mean, sd = normalized(Decoding(**asked), opened)
        return mean if return_mean or sd is None else pd.concat({"mean": mean, "sd": sd}, axis=1)

    def map(self, store: str | Path, **options: Any) -> Run:
        """Place the cells of new samples into this model; options are the fields of `liam_scale.map.MapConfig`."""
        return Run(map_store(MapConfig(run=self.path, store=_uris(store)[0], **options)))

    def elbo(self, store: str | Path | None = None, **options: Any) -> pd.DataFrame:
        """Per-cell loss terms (nats), indexed by cell id; options are the keywords of `liam_scale.elbo.elbo`."""
        return elbo(self.directory, store=_uris(store), **options)


def _uris(store: str | Path | None) -> tuple[str, ...]:
    return () if store is None else tuple(addresses(store, "store"))


def load_run(path: str | Path) -> Run:
    """Open the folder of a run.

    Raises
    ------
    ValueError
        There is no run in it.
    """
    run = Run(RunDirectory(Path(path)))
    run.directory.record()
    return run


def train(
    store: str | Path | AnnData | MuData | Sequence[str | Path],
    *,
    out: str | Path,
    batch_key: str | None = None,
    seed: int = 0,
    resume: Literal["auto", "never"] = "auto",
    device: Device = "auto",
    dry_run: bool = False,
    model: ModelName = "bavae",
    modalities: Sequence[str] = (),
    alpha: float | None = None,
    adversarial: bool | None = None,
    conditional_encoder: bool | None = None,
    conditional_decoder: bool | None = None,
    n_latent: int | None = None,
    n_hidden: int = 128,
    dropout_rate: float = 0.1,
    dispersion_rna: Literal["gene", "gene-batch"] | None = None,
    dispersion_atac: Literal["constant", "batch"] | None = None,
    dispersion_adt: Literal["ADT", "ADT-batch"] | None = None,
    use_atac_libsize: bool = True,
    use_batch_norm_encoder: bool = False,
    use_batch_norm_decoder: bool = False,
    use_layer_norm_encoder: bool = True,
    use_layer_norm_decoder: bool = True,
    likelihood: Literal["per-cell", "original"] = "per-cell",
    priors: Literal["present", "original"] = "present",
    impl: Impl = "auto",
    precision: Precision = "float32",
    minibatch: int = 128,
    memory: str = "1GiB",
    streams: int | None = None,
    threads: int | None = None,
    resident: Literal["auto", "on", "off"] = "off",
    validation_share: float = 0.05,
    adt_transform: Literal["clr", "none"] = "clr",
    balance: str | None = None,
    lr: float = 1e-3,
    eps: float = 0.01,
    weight_decay: float = 1e-6,
    kl_warmup: Literal["auto", "epochs", "steps"] = "auto",
    kl_warmup_epochs: int = 400,
    kl_weight_min: float = 1e-3,
    max_epochs: int | None = None,
    max_steps: int | None = None,
    early_stopping: bool = True,
    patience: int = 10,
    patience_steps: int = 600,
    min_delta: float = 0.0,
    validate_every: int | None = None,
    checkpoint_seconds: float = 300.0,
    checkpoint_steps: int | None = None,
    keep_checkpoints: int = 2,
    max_rollbacks: int = 2,
    on_bad_chunk: Literal["stop", "skip"] = "stop",
    timeout_seconds: float = 600.0,
    graph: Literal["auto", "on", "off"] = "auto",
    tensorboard: bool = False,
) -> Run:
    """Train liam on a store, in this process, or go on with the run in `out`.

    Parameters
    ----------
    store
        A store, or several that are chained as one data set; or an AnnData or MuData in memory, which is given again to
        go on with the run.
    out
        Folder of the run.
    batch_key
        Obs column with the sample of each cell, the covariate to remove. Without it nothing is removed.
    dry_run
        Print configuration, model size, and estimates of memory and time; train nothing.
    model
        A model of the paper by name; the options down to `precision` are those of `liam_scale.model.ModelConfig`.
    minibatch
        Cells of an optimizer step; the options down to `balance` are those of `loaders.options.LoaderConfig`.
    lr
        Learning rate; the options down to `kl_weight_min` are those of `liam_scale.training.optim.OptimConfig`.
    max_epochs
        Epochs; the options from here on are those of `liam_scale.training.options.TrainingConfig`.

    Raises
    ------
    ValueError
        The options do not fit the store or the folder; the message says what to change.
    """
    held = open_store(store) if isinstance(store, AnnData | MuData) else None
    directory, _ = train_run(_config(locals()), held)
    return Run(directory)


def _config(options: dict[str, Any]) -> TrainConfig:
    """Keywords as sections: each takes those that are its fields."""
    sections = {"model": ModelConfig, "loader": LoaderConfig, "optim": OptimConfig, "training": TrainingConfig}
    made = {name: kind(**{f.name: options[f.name] for f in fields(kind)}) for name, kind in sections.items()}
    own = {f.name: options[f.name] for f in fields(TrainConfig) if f.name in options and f.name not in made}
    store = options["store"]
    is_held = isinstance(store, AnnData | MuData)
    named = [f"{type(store).__name__}{IN_MEMORY}"] if is_held else addresses(store, "store")
    return TrainConfig(**{**own, "store": tuple(named)}, **made)


def evaluate(
    data: Any, *, batch_key: str | Sequence[str] = (), label_key: str | Sequence[str] = (), **options: Any
) -> Evaluation:
    """Score an embedding by every covariate and every label column.

    Parameters
    ----------
    data
        Path of a store, h5ad or h5mu; an open store; an AnnData or MuData in memory.
    batch_key, label_key
        Obs columns, one or several.
    options
        The other options of `liam-scale evaluate`, such as `embedding`, `max_cells` or `published`.

    Raises
    ------
    ValueError
        An option names what is not there.
    """
    is_name = isinstance(data, str | Path)
    keys = [(key,) if isinstance(key, str) else tuple(key) for key in (batch_key, label_key)]
    config = EvaluateConfig(str(data) if is_name else "data in memory", batch_key=keys[0], label_key=keys[1], **options)
    return evaluate_cells(config, data=None if is_name else data)
