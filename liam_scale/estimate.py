"""What a run will cost, before it starts: size of the model, memory, time."""

from __future__ import annotations

from dataclasses import replace

import torch

from liam_scale.config import TrainConfig
from liam_scale.continuous import described
from liam_scale.fitting import seconds_a_step, trainer_of
from liam_scale.kernels.options import TILE_BYTES
from liam_scale.model import Liam, ModelConfig, ModelData
from liam_scale.run import RunDirectory, record_of
from liam_scale.samples import samples_of
from liam_scale.tables import to_toml
from liam_scale.training.devices import device_of
from liam_scale.training.distributed import World
from liam_scale.training.optim import default_max_epochs
from liam_scale.training.ranks import launched_ranks
from loaders.sizing import describe_memory, parse_memory
from loaders.stores import Store

BASE_BYTES = 450 * 2**20
"""Interpreter, torch, numba and zarr of one process, measured."""

BYTES_PER_PARAMETER = {"float32": 4 * 5, "bf16": 4 * 3 + 2 * 2}
"""float32 weight, gradient, and the copy of the best weights; Adam's two moments in either type."""

SECONDS_MEASURED = 3.0
"""Training that an estimate of time rests on, for each model of the run."""


def count_parameters(model: ModelConfig, data: ModelData) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Liam(model, data).parameters())


def _seconds_a_step(config: TrainConfig, store: Store, model: ModelConfig, data: ModelData, ranks: int) -> float:
    """Of this process's share of a minibatch, measured: built and trained as a run is, in memory alone."""
    share = replace(config.loader, minibatch=-(-config.loader.minibatch // ranks))
    config = replace(config, model=model, loader=share, training=replace(config.training, tensorboard=False))
    record = record_of(config, store, model, data)
    with trainer_of(RunDirectory(config.out), record, config, store, World(device=device_of(config.device))) as trainer:
        return seconds_a_step(trainer, at_least=SECONDS_MEASURED)


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def describe_plan(config: TrainConfig, store: Store, models: tuple[ModelConfig, ...]) -> str:
    """Effective options, data, model size, and estimates of memory and time, as text."""
    ranks = launched_ranks()[1]
    schema = store.schema
    samples = samples_of(store, config.batch_key)
    lines = [
        to_toml(replace(config, dry_run=False)).rstrip(),
        "",
        f"store       {store.uri}: {schema.num_cells:,} cells",
    ]
    width = max(5, *map(len, schema.modalities))
    for m in schema.modalities.values():
        lines.append(
            f"  {m.name:<{width}}     {m.num_cells:,} cells x {m.num_features:,} features, "
            f"{m.nonzeros_per_cell:,.0f} non-zeros a cell"
        )
    num_train = round(schema.num_cells * (1 - config.loader.validation_share))
    epochs = config.training.max_epochs or default_max_epochs(schema.num_cells)
    steps = epochs * -(-num_train // config.loader.minibatch)
    steps = min(steps, config.training.max_steps or steps)
    evaluations = steps / config.training.validate_every if config.training.validate_every else epochs
    scored = evaluations * (schema.num_cells - num_train) / config.loader.minibatch
    memory, seconds, parameters = 0, 0.0, 0
    for model in models:
        sizes = {name: schema.modalities[name].num_features for name in model.modalities}
        names, covariates = samples.names, samples.covariates
        read = described(store, config.continuous_key)
        data = ModelData(num_features=sizes, samples=names, covariates=covariates, kinds=schema.kinds, continuous=read)
        size = count_parameters(model, data)
        parameters += size
        held = BASE_BYTES + size * BYTES_PER_PARAMETER[config.optim.moments] + TILE_BYTES
        memory = max(memory, held + parse_memory(config.loader.memory))
        seconds += _seconds_a_step(config, store, model, data, ranks)
    lines += [
        f"model       {models[0].model if len(models) == 1 else 'concat'}: {parameters:,} parameters, "
        f"{describe_memory(parameters * 4)} of weights",
        f"memory      about {describe_memory(memory)} a process (weights, gradients, Adam, best copy, loader, tile), "
        f"{ranks} process{'es' if ranks > 1 else ''}",
        f"time        at most {epochs:,} epochs = {steps:,} steps of {config.loader.minibatch} cells; "
        f"{_duration(steps * seconds)} to {_duration(1.3 * (steps + scored) * seconds)} by the {seconds * 1e3:.0f} ms "
        "that a step takes here and now, if early stopping does not end it before",
        "dry run: nothing was trained or written",
    ]
    return "\n".join(lines)
