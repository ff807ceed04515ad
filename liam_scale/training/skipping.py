"""Training on a store of which some chunks are damaged: their cells are left out, and all ranks know which."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from liam_scale.training.distributed import AgreedError, World
from liam_scale.training.protocols import MinibatchSource
from loaders.minibatch import Minibatch

_log = logging.getLogger(__name__)


def lost_rows(*sources: MinibatchSource | None) -> list[int]:
    """Rows of the store of all cells that these have left out."""
    return sorted({row for source in sources if isinstance(source, SkippingSource) for row in source.lost})


class SkippingSource:
    """A loader that leaves out lost cells; every global minibatch says how many of its cells could be read.

    All ranks iterate at the same pace, and agree at every step.

    Attributes
    ----------
    lost
        Rows of the store of all cells that were left out so far, on any rank.
    """

    def __init__(self, source: MinibatchSource, world: World) -> None:
        self._source, self._world = source, world
        self.lost: set[int] = set()

    @property
    def steps_per_epoch(self) -> int:
        return self._source.steps_per_epoch

    @property
    def num_cells(self) -> int:
        return self._source.num_cells - len(self.lost)

    @property
    def waited_seconds(self) -> float:
        return self._source.waited_seconds

    def __iter__(self) -> Iterator[Minibatch]:
        for minibatch in self._source:
            counts = torch.tensor([minibatch.num_cells, len(minibatch.lost)], device=self._world.device)
            read, lost = self._world.sum(counts).tolist()
            if read == 0:
                raise AgreedError(
                    f"store: none of the {lost} cells of epoch {minibatch.epoch}, step {minibatch.step} can be read; "
                    "see whether the store is still there, and what `liam-scale check STORE` says of it"
                )
            if lost:
                before = len(self.lost)
                self.lost.update(*self._world.gather(minibatch.lost.tolist()))
                if self._world.is_main and len(self.lost) > before:
                    _log.warning("%s cells in damaged chunks are left out until now", f"{len(self.lost):,}")
            yield replace(minibatch, num_global=read)

    def state_dict(self) -> dict[str, Any]:
        return {**self._source.state_dict(), "lost": sorted(self.lost)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lost = set(state.get("lost", ()))
        self._source.load_state_dict(state)
