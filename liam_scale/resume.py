"""The effective options of a run: what the user left open is settled, and what makes a run what it is stays."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from liam_scale.command import flag_of
from liam_scale.config import LOCKED, UNLOCKED, TrainConfig
from liam_scale.contents import differences
from liam_scale.continuous import described
from liam_scale.model import ModelConfig, resolve
from liam_scale.run import RunDirectory
from liam_scale.samples import check_samples, samples_of
from liam_scale.tables import to_toml
from loaders.stores import Store


def resolved(config: TrainConfig, store: Store) -> tuple[ModelConfig, ...]:
    """The models of a run; refuses what does not fit the store before any work."""
    samples = samples_of(store, config.batch_key)
    check_samples(store, config.batch_key, samples)
    described(store, config.continuous_key)  # refuses what decoders cannot read
    models = resolve(config.model, modalities=tuple(store.schema.modalities), num_samples=len(samples.names))
    if config.loader.balance is not None and config.loader.balance not in store.schema.obs_columns:
        raise ValueError(
            f"--loader.balance: got {config.loader.balance}, but obs of {store.uri} has no such column; "
            f"choose one of {', '.join(store.schema.obs_columns)}"
        )
    return models


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


def labels_of(config: TrainConfig) -> list[str]:
    """Obs columns that training rests on."""
    return [name for name in (*config.batch_key, config.loader.balance) if name is not None]


def changed_options(config: TrainConfig, directory: RunDirectory, keys: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """Options (or sections) that differ from those of the run, with the run's value and the new one."""
    saved, now = directory.saved_options(), tomllib.loads(to_toml(config))
    return [found for key in keys for found in _differences(_lookup(saved, key), _lookup(now, key), key)]


def _differences(before: Any, now: Any, key: str) -> list[tuple[str, Any, Any]]:
    """Keys under which two tables differ, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(before.keys() | now.keys())
        return [found for name in names for found in _differences(before.get(name), now.get(name), f"{key}.{name}")]
    before, now = _plain(before), _plain(now)
    return [] if before == now else [(key, before, now)]


def _plain(value: Any) -> Any:
    """An option that takes several values, as one where it has one: older files of options hold that."""
    if isinstance(value, list) and len(value) < 2:
        value = value[0] if value else None
    return None if value == {} else value


def _lookup(table: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        table = table.get(part, {}) if isinstance(table, dict) else {}
    return table


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
    record = directory.record()
    if record.contents is not None:
        features = {name: own for part in directory.parts() for name, own in part.features().items()}
        lines = differences(record.contents, store, features)
    else:
        found, own = store.schema.fingerprint, record.fingerprint
        lines = [f"its fingerprint is {found[:12]}, the run has {own[:12]}"] if found != own else []
    lines += _other_numbers(config, directory, store)
    if lines:
        raise ValueError(
            f"store: {store.uri} is not what {directory.path} was trained on:\n  "
            + "\n  ".join(lines)
            + "\n  give the run's own store (and its own --features), or name another --out"
        )


def _other_numbers(config: TrainConfig, directory: RunDirectory, store: Store) -> list[str]:
    """Continuous covariates whose values are not those of the training."""
    now, before = described(store, config.continuous_key), directory.record().data.continuous
    return [
        f"{name} of obs has mean {now[name][0]:g} and deviation {now[name][1]:g}, the run {mean:g} and {sd:g}"
        for name, (mean, sd) in before.items()
        if not np.allclose(now[name], (mean, sd), rtol=1e-9, atol=0)
    ]
