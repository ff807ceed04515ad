"""The Python interface: thin functions over the same rooms as the commands.

>>> import liam_scale
>>> liam_scale.ingest(["donor1.h5mu", "donor2.h5mu"], out="atlas.zarr")
>>> run = liam_scale.train("atlas.zarr", batch_key="sample", out="runs/a")
>>> run.embed()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from anndata import AnnData
from mudata import MuData

from liam_scale.config import TrainConfig
from liam_scale.evaluate import EvaluateConfig, Evaluation
from liam_scale.evaluate import evaluate as evaluate_cells
from liam_scale.features import features
from liam_scale.finding import IN_MEMORY, chosen, opened
from liam_scale.kernels.options import Impl, Precision
from liam_scale.model import ModelConfig
from liam_scale.model.config import ModelName
from liam_scale.run import RunDirectory
from liam_scale.tables import as_tuple
from liam_scale.train import train as train_run
from liam_scale.trained import Run
from liam_scale.training.callbacks import Callback, check_callbacks
from liam_scale.training.devices import Device
from liam_scale.training.optim import OptimConfig
from liam_scale.training.options import TrainingConfig
from loaders.check import check_store as check
from loaders.formats.root import addresses
from loaders.ingest import append, ingest, merge
from loaders.modalities import Declared, declared
from loaders.options import LoaderConfig, checked
from loaders.stores import choose, open_store, read_store

__all__ = [
    "Callback",
    "Run",
    "append",
    "check",
    "evaluate",
    "features",
    "ingest",
    "load_run",
    "merge",
    "open_store",
    "read_store",
    "train",
]


def load_run(path: str | Path, *, store: str | Path | Sequence[str | Path] | None = None) -> Run:
    """Open the folder of a run.

    Parameters
    ----------
    store
        Store (or several, chained) that its methods use. Default: those of the training; where the run was moved, they
        are looked for in its folder and in those above it.

    Raises
    ------
    ValueError
        There is no run in it, or what is given is no path.
    """
    run = Run(RunDirectory(checked("path", path, Path)), () if store is None else tuple(addresses(store, "store")))
    run.directory.record()
    return run


def train(
    store: str | Path | AnnData | MuData | Sequence[str | Path],
    *,
    out: str | Path,
    batch_key: str | Sequence[str] | None = (),
    continuous_key: str | Sequence[str] = (),
    where: str | None = None,
    features: str | Path | Sequence[str] | None = None,
    modality: Declared = (),
    layer: str | None = None,
    seed: int = 0,
    resume: Literal["auto", "never"] = "auto",
    device: Device = "auto",
    dry_run: bool = False,
    model: ModelName = "bavae",
    modalities: Sequence[str] = (),
    alpha: float | None = None,
    alphas: Sequence[str] | Mapping[str, float] = (),
    weights: Sequence[str] | Mapping[str, float] = (),
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
    shard: bool = True,
    moments: Literal["float32", "bf16"] = "float32",
    reduce_bf16: bool = False,
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
    graph: Literal["auto", "on", "off"] = "off",
    tensorboard: bool = False,
    callbacks: Sequence[Callback] = (),
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
        Obs column with the sample of each cell, the covariate to remove; or several, each with an adversary of its own.
        Without it nothing is removed.
    continuous_key
        Obs columns of numbers, such as age or log depth, that the decoders read beside the embedding.
    where
        Cells to train on, an expression over obs columns as `pandas.DataFrame.query` takes it.
    features
        Features to train on: their names, or a text file with a name on each line. A modality of which none is named
        keeps all.
    modality
        What modalities of other names than rna, atac and adt are, as for `ingest`: {"h3k27ac": "NM"}; a store that
        ingest made knows it.
    layer
        Layer that holds the counts, such as "counts", of an object in memory or of a store that no ingest made; "raw"
        also means AnnData's raw. Default: X. What embeds and decodes afterwards reads the same layer.
    dry_run
        Print configuration, model size, and estimates of memory and time; train nothing.
    model
        A model of the paper by name; the options down to `precision` are those of `liam_scale.model.ModelConfig`.
    minibatch
        Cells of an optimizer step; the options down to `balance` are those of `loaders.options.LoaderConfig`.
    lr
        Learning rate; the options down to `kl_weight_min` are those of `liam_scale.training.optim.OptimConfig`.
    max_epochs
        Epochs; the options from here to `tensorboard` are those of `liam_scale.training.options.TrainingConfig`.
    callbacks
        Objects of subclasses of `liam_scale.Callback`, which are told when training starts, what each evaluation found,
        and how it ended.

    Raises
    ------
    ValueError
        The options do not fit the store or the folder; the message says what to change.
    """
    config = _config(locals())
    check_callbacks(callbacks)
    is_held = isinstance(store, AnnData | MuData)
    held = open_store(store, modality=config.modality, layer=config.layer) if is_held else None
    if not isinstance(features, str | Path | None):
        held = choose(held or opened(config), where=where, features=[str(name) for name in features])
    elif held is not None:
        held = chosen(held, config)
    directory, _ = train_run(config, held, callbacks)
    return Run(directory)


def _config(options: dict[str, Any]) -> TrainConfig:
    """Keywords as sections: each takes those that are its fields."""
    for name in ("alphas", "weights"):
        if isinstance(options[name], Mapping):
            options[name] = tuple(f"{key}={value!r}" for key, value in options[name].items())
    sections = {"model": ModelConfig, "loader": LoaderConfig, "optim": OptimConfig, "training": TrainingConfig}
    made = {name: kind(**{f.name: options[f.name] for f in fields(kind)}) for name, kind in sections.items()}
    own = {f.name: options[f.name] for f in fields(TrainConfig) if f.name in options and f.name not in made}
    for name in ("batch_key", "continuous_key"):
        own[name] = as_tuple(own[name])
    store = options["store"]
    is_held = isinstance(store, AnnData | MuData)
    named = [f"{type(store).__name__}{IN_MEMORY}"] if is_held else addresses(store, "store")
    file = Path(own["features"]) if isinstance(own["features"], str | Path) else None
    own["modality"] = tuple(f"{name}={kind}" for name, kind in declared(options["modality"]).items())
    return TrainConfig(**{**own, "store": tuple(named), "features": file}, **made)


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
    keys = [as_tuple(key) for key in (batch_key, label_key)]
    config = EvaluateConfig(str(data) if is_name else "data in memory", batch_key=keys[0], label_key=keys[1], **options)
    return evaluate_cells(config, data=None if is_name else data)
