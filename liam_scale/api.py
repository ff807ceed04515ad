"""The Python interface: thin functions over the same rooms as the commands.

>>> import liam_scale
>>> liam_scale.ingest(["donor1.h5mu", "donor2.h5mu"], out="atlas.zarr")
>>> run = liam_scale.train("atlas.zarr", batch_key="sample", out="runs/a")
>>> run.embed()
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from liam_scale.config import TrainConfig
from liam_scale.decode import DecodeConfig, decode
from liam_scale.elbo import elbo
from liam_scale.embed import EmbedConfig, compute, embed
from liam_scale.map import MapConfig, map_store
from liam_scale.model import Liam
from liam_scale.run_directory import RunDirectory, RunRecord
from liam_scale.train import train as train_run
from loaders.ingest import ingest

__all__ = ["Run", "ingest", "load_run", "train"]


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
        with self.directory.parts()[0].history.open() as file:
            rows = list(csv.DictReader(file))
        return pd.DataFrame(rows).apply(pd.to_numeric)

    def model(self) -> Liam:
        """The trained module, on the CPU, in evaluation mode."""
        return self.directory.load_model()

    def embed(self, store: str | Path | None = None, **options: Any) -> str:
        """Write `obsm["X_liam"]`; options are the fields of `liam_scale.embed.EmbedConfig`. Returns where it stands."""
        return embed(EmbedConfig(run=self.path, store=_uris(store), **_paths(options)))

    def decode(self, out: str | Path, **options: Any) -> Path:
        """Write decoded values; options are the fields of `liam_scale.decode.DecodeConfig`."""
        return decode(DecodeConfig(run=self.path, out=Path(out), **_paths(options)))

    def map(self, store: str | Path, **options: Any) -> Run:
        """Place the cells of new samples into this model; options are the fields of `liam_scale.map.MapConfig`."""
        return Run(map_store(MapConfig(run=self.path, store=str(store), **_paths(options))))

    def elbo(self, store: str | Path | None = None, **options: Any) -> pd.DataFrame:
        """Per-cell loss terms (nats), indexed by cell id; options are the keywords of `liam_scale.elbo.elbo`."""
        return elbo(self.directory, store=_uris(store), **options)

    def embedding(self, store: str | Path | None = None) -> npt.NDArray[np.float32]:
        """(cells, latent) embedding in memory, computed here and written nowhere."""
        return compute(EmbedConfig(run=self.path, store=_uris(store)))


def _uris(store: str | Path | None) -> tuple[str, ...]:
    return () if store is None else (str(store),)


def _paths(options: dict[str, Any]) -> dict[str, Any]:
    return {name: Path(value) if name == "out" and value is not None else value for name, value in options.items()}


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
    store: str | Path | Sequence[str | Path], *, out: str | Path, batch_key: str | None = None, **options: Any
) -> Run:
    """Train liam on a store, in this process, or go on with the run in `out`.

    Parameters
    ----------
    store
        A store, or several that are chained as one data set.
    out
        Folder of the run.
    batch_key
        Obs column with the sample of each cell, the covariate to remove.
    **options
        Any option of the command line under its field's name: `alpha=5`, `max_epochs=50`, `n_latent=10`,
        `minibatch=1024`, `memory="2GiB"`, `seed=1`, ... A name that no option has is a ValueError.

    Raises
    ------
    ValueError
        The options do not fit the store or the folder; the message says what to change.
    """
    stores = [store] if isinstance(store, str | Path) else list(store)
    config = TrainConfig(store=tuple(map(str, stores)), out=Path(out), batch_key=batch_key)
    directory, _ = train_run(_with_options(config, options))
    return Run(directory)


def _with_options(config: TrainConfig, options: dict[str, Any]) -> TrainConfig:
    """Put each option into the section that has a field of its name."""
    sections: dict[str, dict[str, Any]] = {"": {}, "model": {}, "loader": {}, "optim": {}, "training": {}}
    names = {section: {f.name for f in fields(getattr(config, section) if section else config)} for section in sections}
    names[""] -= set(sections)
    for name, value in options.items():
        section = "model" if name == "model" else next((s for s, own in names.items() if name in own), None)
        if section is None:
            known = sorted(set().union(*names.values()))
            raise ValueError(f"train: got unknown option {name!r}; choose among {', '.join(known)}")
        sections[section][name] = value
    top = sections.pop("")
    return replace(config, **top, **{s: replace(getattr(config, s), **values) for s, values in sections.items()})
