"""What a user chooses about the length of training and what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from loaders.options import Range, check_options

Graph = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class TrainingConfig:
    """How long to train, when to look, what to keep."""

    max_epochs: Annotated[int | None, Range(least=1), tyro.conf.arg(aliases=["--max-epochs"])] = None
    """Default: min(round(20,000 / cells x 400), 400), as the original."""
    max_steps: Annotated[int | None, Range(least=1), tyro.conf.arg(aliases=["--max-steps"])] = None
    """Stop after this many optimizer steps, whatever the epoch."""
    early_stopping: bool = True
    """Stop when the validation loss has not improved for `patience` evaluations."""
    patience: Annotated[int, Range(least=1)] = 10
    """Evaluations without improvement before training stops."""
    patience_steps: Annotated[int, Range(least=0)] = 600
    """And at least so many steps: ten epochs of a small data set are too short to tell an end from noise."""
    min_delta: Annotated[float, Range(least=0)] = 0.0
    """Smallest decrease of the validation loss that counts as an improvement, nats per cell."""
    validate_every: Annotated[int | None, Range(least=1)] = None
    """Steps between evaluations; default: one at the end of every epoch."""
    checkpoint_seconds: Annotated[float, Range(least=0)] = 300.0
    """Time between checkpoints."""
    checkpoint_steps: Annotated[int | None, Range(least=1)] = None
    """Steps between checkpoints, instead of a time."""
    keep_checkpoints: Annotated[int, Range(least=1)] = 2
    """Newest checkpoints kept."""
    max_rollbacks: Annotated[int, Range(least=0)] = 2
    """Times in a row that training returns to its last checkpoint, and goes on with other noise, from a number that is
    not finite."""
    on_bad_chunk: Annotated[Literal["stop", "skip"], tyro.conf.arg(aliases=["--on-bad-chunk"])] = "stop"
    """What a chunk of the store that is damaged does: stop training, or leave its cells out, which are counted in the
    history and listed in run.json."""
    timeout_seconds: Annotated[float, Range(above=0), tyro.conf.arg(aliases=["--timeout"])] = 600.0
    """Time without a step on any rank after which the ranks that are missing or asleep are named, and all end."""
    graph: Graph = "off"
    """Record a step once as a graph of the GPU and replay it, one launch instead of hundreds: `auto` where that is
    possible (one rank on an NVIDIA GPU, likelihood per cell, no batch norm), `on` there or an error, `off` nowhere."""
    tensorboard: bool = False
    """Also write the history as TensorBoard events."""

    def __post_init__(self) -> None:
        check_options(self, "--training.")
