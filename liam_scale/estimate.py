"""What a run will cost, before it starts: size of the model, memory, time."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from liam_scale.config import TrainConfig
from liam_scale.kernels.options import TILE_BYTES
from liam_scale.model import Liam, ModelConfig, ModelData
from liam_scale.tables import to_toml
from liam_scale.training.distributed import launched_ranks
from liam_scale.training.optim import default_max_epochs
from loaders.memory import parse_memory
from loaders.stores import Store

BASE_BYTES = 450 * 2**20
"""Interpreter, torch, numba and zarr of one process, measured."""

BYTES_PER_PARAMETER = 4 * 5
"""float32 weight, gradient, Adam's two moments, and the copy of the best weights."""

LOSS_OVER_PRODUCTS = 2.2
"""Time of a whole step over that of its matrix products (benchmarks/step.py)."""


def count_parameters(model: ModelConfig, data: ModelData) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Liam(model, data).parameters())


def _products_per_second() -> float:
    """float32 multiply-adds a second of this process, measured for 0.1 s on a tile of a decoder."""
    left, right = torch.randn(128, 128), torch.randn(2048, 128)
    torch.mm(left, right.T)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        torch.mm(left, right.T)
        done += left.numel() * len(right)
    return done / (time.perf_counter() - start)


def _amount(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def describe_plan(config: TrainConfig, store: Store, models: tuple[ModelConfig, ...]) -> str:
    """Effective options, data, model size, and estimates of memory and time, as text."""
    ranks = launched_ranks()[1]
    schema = store.schema
    num_samples = 1
    if config.batch_key is not None:
        num_samples = len(store.obs_column(config.batch_key).categories)
    lines = [
        to_toml(replace(config, dry_run=False)).rstrip(),
        "",
        f"store       {store.uri}: {schema.num_cells:,} cells",
    ]
    for m in schema.modalities.values():
        lines.append(
            f"  {m.name:<5}     {m.num_cells:,} cells x {m.num_features:,} features, "
            f"{m.nonzeros_per_cell:,.0f} non-zeros a cell"
        )
    num_train = round(schema.num_cells * (1 - config.loader.validation_share))
    epochs = config.training.max_epochs or default_max_epochs(schema.num_cells)
    steps = epochs * -(-num_train // config.loader.minibatch)
    steps = min(steps, config.training.max_steps or steps)
    rate = _products_per_second()
    memory, seconds, parameters = 0, 0.0, 0
    for model in models:
        sizes = {name: schema.modalities[name].num_features for name in model.modalities}
        size = count_parameters(model, ModelData(num_features=sizes, samples=tuple(map(str, range(num_samples)))))
        parameters += size
        memory = max(memory, BASE_BYTES + size * BYTES_PER_PARAMETER + parse_memory(config.loader.memory) + TILE_BYTES)
        products = 3 * sum(sizes.values()) * model.n_hidden * config.loader.minibatch / ranks
        seconds += steps * (LOSS_OVER_PRODUCTS * products / rate + size * 28 / 20e9)
    lines += [
        f"model       {models[0].model if len(models) == 1 else 'concat'}: {parameters:,} parameters, "
        f"{_amount(parameters * 4)} of weights",
        f"memory      about {_amount(memory)} a process (weights, gradients, Adam, best copy, loader, tile), "
        f"{ranks} process{'es' if ranks > 1 else ''}",
        f"time        at most {epochs:,} epochs = {steps:,} steps of {config.loader.minibatch} cells; "
        f"about {_duration(seconds)} on this CPU if early stopping does not end it before",
        "dry run: nothing was trained or written",
    ]
    return "\n".join(lines)
