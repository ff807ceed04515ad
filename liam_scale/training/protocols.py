"""What the trainer needs of a loader and of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor

from loaders.minibatch import Minibatch


class MinibatchSource(Protocol):
    """What the trainer needs of a loader. Iterating yields the rest of the current epoch, then moves to the next."""

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def num_cells(self) -> int: ...

    @property
    def waited_seconds(self) -> float: ...

    def __iter__(self) -> Iterator[Minibatch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ByCell(Protocol):
    """A model that says how many cells enter the terms of each modality, and what each cell gives to each term."""

    def num_cells_with(self, minibatch: Minibatch) -> dict[str, Tensor]: ...

    def terms_by_cell(
        self, minibatch: Minibatch, *, step: int, seed: int, num_global_with: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]: ...
