"""The loaders of a training, and minibatches with the sample codes of a trained model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Literal

from liam_scale.config import TrainConfig
from liam_scale.model import ModelData
from liam_scale.samples import sample_codes
from liam_scale.training.distributed import World
from loaders.loader import Loader
from loaders.stores import Store

VALIDATION_CELLS = 512
"""Cells scored at once at least; there is no backward pass to hold memory for."""


@contextmanager
def training_loaders(
    store: Store, config: TrainConfig, data: ModelData, world: World
) -> Iterator[tuple[Loader, Loader | None]]:
    """Loaders of this rank's training and validation cells; None where no cell validates."""
    sample = sample_codes(store, config.batch_key, data.samples)
    chosen = config.loader
    assert chosen.streams is not None
    scored = replace(chosen, minibatch=max(chosen.minibatch, VALIDATION_CELLS))
    with ExitStack() as stack:

        def loader(subset: Literal["train", "validation"]) -> Loader:
            is_training = subset == "train"
            own = Loader(
                store,
                chosen if is_training else scored,
                sample=sample,
                modalities=tuple(data.num_features),
                seed=config.seed,
                rank=world.rank,
                world=world.size,
                subset=subset,
                shuffle=is_training,
                transpose=is_training,
            )
            return stack.enter_context(own)

        validation = loader("validation")
        yield loader("train"), validation if validation.num_cells else None
