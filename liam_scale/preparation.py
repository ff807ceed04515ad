"""The loaders of a training, and minibatches with the sample codes of a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from liam_scale.config import TrainConfig
from liam_scale.training.distributed import World
from loaders.loader import Loader
from loaders.minibatch import Minibatch
from loaders.stores import Store

VALIDATION_CELLS = 512
"""Cells scored at once at least; there is no backward pass to hold memory for."""


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


class RecodedSamples:
    """A loader whose minibatches carry the sample codes of a trained model instead of the store's."""

    def __init__(self, loader: Loader, table: np.ndarray) -> None:
        self._loader, self._table = loader, torch.from_numpy(table)

    def __iter__(self) -> Iterator[Minibatch]:
        for minibatch in self._loader:
            yield replace(minibatch, sample=self._table[minibatch.sample])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
