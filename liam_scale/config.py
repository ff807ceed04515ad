"""The options of a training run: composes what the rooms own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from liam_scale.model import ModelConfig
from liam_scale.training.devices import Device, check_device
from liam_scale.training.optim import OptimConfig
from liam_scale.training.options import TrainingConfig
from loaders.modalities import declared
from loaders.options import LoaderConfig, Range, check_options

LOCKED = (
    "seed",
    "batch_key",
    "continuous_key",
    "where",
    "modality",
    "layer",
    "model",
    "optim",
    "loader.minibatch",
    "loader.validation_share",
    "loader.adt_transform",
    "loader.balance",
)
"""Options that make a run what it is: resuming with another value is refused by name."""

UNLOCKED = ("optim.lr", "model.precision", "model.impl")
"""Among these, what changes neither the model nor the order of its cells; as all other options, it may change."""


@dataclass(frozen=True)
class TrainConfig:
    """Train liam on a store. Under torchrun every process is a rank of the same run."""

    store: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="STORE ...")]
    """Store to train on, or several that are chained as one data set."""
    out: Path
    """Folder of the run: configuration, history, checkpoints, weights."""
    batch_key: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN ...")] = ()
    """Obs column with the sample of each cell, the covariate to remove; several have an adversary each."""
    continuous_key: Annotated[tuple[str, ...], tyro.conf.arg(metavar="COLUMN ...")] = ()
    """Obs columns of numbers, such as age or log depth, that the decoders read beside the embedding, standardised."""
    where: Annotated[str | None, tyro.conf.arg(metavar="EXPRESSION")] = None
    """Cells to train on, an expression over obs columns as pandas takes it: "tissue == 'blood' and n_counts > 500"."""
    features: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Text file with the features to train on, a name on each line; a modality of which none is named keeps all."""
    modality: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=NM|NB ...")] = ()
    """What modalities of other names than rna, atac and adt are, where no ingest made the store: `h3k27ac=NM`."""
    layer: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Layer that holds the counts, where no ingest made the store; `raw` also means AnnData's raw. Default: X."""
    seed: Annotated[int, Range(least=0)] = 0
    """Seed of weights, split, order and noise."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on with the newest sound checkpoint in `out`; never: refuse a folder that holds a run."""
    device: Device = "auto"
    """auto: CUDA where there is one, else CPU."""
    dry_run: bool = False
    """Print configuration, model size, and estimates of memory and time; train nothing."""
    model: ModelConfig = field(default_factory=ModelConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        check_options(self, "--")
        check_device(self.device)
        declared(self.modality)
        if not self.store:
            raise ValueError(
                "store: got none; name a store, e.g. atlas.zarr (liam-scale ingest makes one), before the options"
            )
        if self.model.alphas and len(self.batch_key) < 2:
            raise ValueError(
                f"--model.alphas: got {' '.join(self.model.alphas)} with {len(self.batch_key)} columns to remove; give "
                "--alpha, or several columns of --batch-key"
            )
        if unknown := sorted(self.model.alpha_by_column().keys() - set(self.batch_key)):
            raise ValueError(
                f"--model.alphas: got {', '.join(unknown)}; --batch-key names {', '.join(self.batch_key)}: give weights"
                " of these"
            )
