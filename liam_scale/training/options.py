"""What a user chooses about the length of training and what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True)
class TrainingConfig:
    """How long to train, when to look, what to keep."""

    max_epochs: Annotated[int | None, tyro.conf.arg(aliases=["--max-epochs"])] = None
    """Default: min(round(20,000 / cells x 400), 400), as the original."""
    max_steps: Annotated[int | None, tyro.conf.arg(aliases=["--max-steps"])] = None
    """Stop after this many optimizer steps, whatever the epoch."""
    early_stopping: bool = True
    """Stop when the validation loss has not improved for `patience` evaluations."""
    patience: int = 10
    """Evaluations without improvement before training stops."""
    patience_steps: int = 600
    """And at least so many steps: ten epochs of a small data set are too short to tell an end from noise."""
    min_delta: float = 0.0
    """Smallest decrease of the validation loss that counts as an improvement, nats per cell."""
    validate_every: int | None = None
    """Steps between evaluations; default: one at the end of every epoch."""
    checkpoint_seconds: float = 300.0
    """Time between checkpoints."""
    checkpoint_steps: int | None = None
    """Steps between checkpoints, instead of a time."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    tensorboard: bool = False
    """Also write the history as TensorBoard events."""

    def __post_init__(self) -> None:
        for name in ("max_epochs", "max_steps", "patience", "validate_every", "checkpoint_steps", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--training.{name.replace('_', '-')}: got {value}; give at least 1")
