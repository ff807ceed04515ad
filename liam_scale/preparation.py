"""From options and a store to what a run needs: resolved models, library priors, checked choices."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from liam_scale.command import flag_of
from liam_scale.config import LOCKED, UNLOCKED, TrainConfig
from liam_scale.model import ModelConfig, ModelData, library_priors, resolve
from liam_scale.run_directory import RunDirectory, RunRecord
from liam_scale.samples import check_batch_key
from liam_scale.tables import to_table, to_toml
from liam_scale.training.distributed import World
from loaders.loader import Loader
from loaders.minibatch import Minibatch
from loaders.stores import Store, cell_totals, open_store

VALIDATION_CELLS = 512
"""Cells scored at once at least; there is no backward pass to hold memory for."""


IN_MEMORY = " in memory"
"""How a run calls the store that it was trained on where that is an AnnData or MuData: "MuData in memory"."""


def open_stores(uris: Sequence[str]) -> Store:
    """One store, or several chained as one data set."""
    if uris[0].endswith(IN_MEMORY):
        raise ValueError(
            f"store: the run was trained on {uris[0]}; give the object again, run.embed(data) or liam_scale.train(data,"
            f" ...), or a store made of it"
        )
    return open_store(uris[0]) if len(uris) == 1 else open_store(list(uris))


def sample_column(store: Store, batch_key: str | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Codes (n,) and categories of the sample of each cell; one category where no column is named.

    Raises
    ------
    ValueError
        There is no such column, or cells without a value.
    """
    if batch_key is None:
        return np.zeros(store.schema.num_cells, dtype=np.int32), ("all",)
    if batch_key not in store.schema.obs_columns:
        raise ValueError(
            f"--batch-key: got {batch_key}, but obs of {store.uri} has no such column; "
            f"choose one of {', '.join(store.schema.obs_columns) or 'none'}"
        )
    column = store.obs_column(batch_key)
    missing = int((column.codes < 0).sum())
    if missing:
        raise ValueError(
            f"--batch-key: {batch_key} has no value for {missing:,} of {len(column.codes):,} cells of {store.uri}; "
            "fill the column or drop these cells before ingest"
        )
    return column.codes, column.categories


def model_data(store: Store, model: ModelConfig, batch_key: str | None, transforms: dict[str, str]) -> ModelData:
    """Features, samples and library priors of the modalities of a (resolved) model."""
    codes, categories = sample_column(store, batch_key)
    means: dict[str, tuple[float, ...]] = {}
    variances: dict[str, tuple[float, ...]] = {}
    for name in model.modalities:
        totals = np.zeros(len(codes), dtype=np.float64)
        rows = store.modality_rows(name)
        own = cell_totals(store, name, transforms.get(name))
        if rows is None:
            totals[:] = own
        else:
            totals[rows >= 0] = own[rows[rows >= 0]]
        means[name], variances[name] = library_priors(totals, codes, num_samples=len(categories), priors=model.priors)
    features = {name: store.schema.modalities[name].num_features for name in model.modalities}
    return ModelData(num_features=features, samples=categories, prior_mean=means, prior_variance=variances)


def resolved(config: TrainConfig, store: Store) -> tuple[ModelConfig, ...]:
    """The models of a run; refuses what does not fit the store before any work."""
    _, categories = sample_column(store, config.batch_key)
    if config.batch_key is not None:
        check_batch_key(store, config.batch_key, len(categories))
    models = resolve(config.model, modalities=tuple(store.schema.modalities), num_samples=len(categories))
    if config.loader.balance is not None and config.loader.balance not in store.schema.obs_columns:
        raise ValueError(
            f"--loader.balance: got {config.loader.balance}, but obs of {store.uri} has no such column; "
            f"choose one of {', '.join(store.schema.obs_columns)}"
        )
    return models


@contextmanager
def training_loaders(
    store: Store, config: TrainConfig, modalities: Sequence[str], world: World
) -> Iterator[tuple[Loader, Loader | None]]:
    """Loaders of this rank's training and validation cells; None where no cell validates."""
    chosen = config.loader
    assert chosen.streams is not None
    with ExitStack() as stack:

        def loader(subset: Literal["train", "validation"]) -> Loader:
            is_training = subset == "train"
            own = Loader(
                store,
                minibatch=chosen.minibatch if is_training else max(chosen.minibatch, VALIDATION_CELLS),
                sample_key=config.batch_key,
                modalities=tuple(modalities),
                seed=config.seed,
                streams=chosen.streams,
                rank=world.rank,
                world=world.size,
                memory=chosen.memory,
                subset=subset,
                validation_share=chosen.validation_share,
                shuffle=is_training,
                transpose=is_training,
                transforms=chosen.transforms,
                threads=chosen.threads,
                weights=chosen.balance if is_training else None,
            )
            return stack.enter_context(own)

        validation = loader("validation")
        yield loader("train"), validation if validation.num_cells else None


def settle(config: TrainConfig, store: Store, models: tuple[ModelConfig, ...], ranks: int) -> TrainConfig:
    """The effective options: flags of the model and number of streams filled in, those of the run where it exists.

    Raises
    ------
    ValueError
        `out` holds something else, a run that this one would overwrite, or one made with other options;
        or there are more ranks than streams.
    """
    directory = RunDirectory(config.out)
    streams = config.loader.streams_for(ranks)
    model = models[0] if len(models) == 1 else replace(config.model, modalities=tuple(m.modalities[0] for m in models))
    if directory.is_run:
        if config.resume == "never":
            raise ValueError(
                f"--out: {config.out} holds a run and --resume is never; name another folder, or use --resume auto"
            )
        streams = int(directory.saved_options()["loader"]["streams"])
    else:
        directory.check_free()
    settled = replace(config, model=model, loader=replace(config.loader, streams=streams))
    if ranks > streams:
        raise ValueError(
            f"ranks: got {ranks}, but {'the run has' if directory.is_run else 'there are'} {streams} streams, "
            f"and every rank needs one; start at most {streams} processes"
            + ("" if directory.is_run else ", or raise --loader.streams")
        )
    if directory.is_run:
        _check_same_run(settled, directory, store)
    return settled


def _lookup(table: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        table = table.get(part, {}) if isinstance(table, dict) else {}
    return table


def _differences(before: Any, now: Any, key: str) -> list[tuple[str, Any, Any]]:
    """Keys under which two tables differ, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(before.keys() | now.keys())
        return [found for name in names for found in _differences(before.get(name), now.get(name), f"{key}.{name}")]
    before, now = (None if value == {} else value for value in (before, now))
    return [] if before == now else [(key, before, now)]


def changed_options(config: TrainConfig, directory: RunDirectory, keys: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """Options (or sections) that differ from those of the run, with the run's value and the new one."""
    saved, now = directory.saved_options(), tomllib.loads(to_toml(config))
    return [found for key in keys for found in _differences(_lookup(saved, key), _lookup(now, key), key)]


def _check_same_run(config: TrainConfig, directory: RunDirectory, store: Store) -> None:
    lines = [
        f"{flag_of(key)}: got {now}, the run has {before}"
        for key, before, now in changed_options(config, directory, LOCKED)
        if key not in UNLOCKED
    ]
    if lines:
        raise ValueError(
            f"--out: the run in {directory.path} was made with other options:\n  "
            + "\n  ".join(lines)
            + "\n  name another --out, or give the run's own options"
        )
    fingerprint = directory.record().fingerprint
    if fingerprint != store.schema.fingerprint:
        raise ValueError(
            f"store: {store.uri} is not the one that {directory.path} was trained on (schema fingerprint "
            f"{store.schema.fingerprint[:12]}, the run has {fingerprint[:12]}: cells, features or counts differ); "
            "give the run's store, or name another --out"
        )


def record_of(
    config: TrainConfig, store: Store, model: ModelConfig, data: ModelData, parts: tuple[str, ...] = ()
) -> RunRecord:
    """What a run remembers of its data."""
    modalities = store.schema.modalities
    return RunRecord(
        stores=config.store,
        batch_key=config.batch_key,
        seed=config.seed,
        model=model,
        data=data,
        fingerprint=store.schema.fingerprint,
        features_sha256={name: modalities[name].features_sha256 for name in data.num_features},
        parts=parts,
    )


def options_table(config: TrainConfig) -> dict[str, Any]:
    """Effective options as JSON values, for checkpoints."""
    return to_table(config)


def sample_table(store: Store, batch_key: str | None, samples: Sequence[str]) -> np.ndarray:
    """(categories of the store,) int64 code of each among the samples of a trained model.

    Raises
    ------
    ValueError
        The store has samples that the model was not trained on.
    """
    _, categories = sample_column(store, batch_key)
    known = {name: code for code, name in enumerate(samples)}
    unknown = [name for name in categories if name not in known]
    if unknown:
        raise ValueError(
            f"store: {batch_key} of {store.uri} holds {', '.join(unknown[:8])}, which the model was not trained "
            "on; `liam-scale map` places new samples into a trained model"
        )
    return np.array([known[name] for name in categories], dtype=np.int64)


class RecodedSamples:
    """A loader whose minibatches carry the sample codes of a trained model instead of the store's."""

    def __init__(self, loader: Loader, table: np.ndarray) -> None:
        self._loader, self._table = loader, torch.from_numpy(table)

    def __iter__(self) -> Iterator[Minibatch]:
        for minibatch in self._loader:
            yield replace(minibatch, sample=self._table[minibatch.sample])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
