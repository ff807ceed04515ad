"""Sums of loss terms between two evaluations, on the device and without waiting for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from liam_scale.training.distributed import World


class Meter:
    """Adds up terms over this rank's cells; `totals` adds them up over ranks."""

    def __init__(self, world: World, sums: Mapping[str, float] | None = None, *, cells: int = 0) -> None:
        self._world = world
        self.cells = cells
        """Cells of all ranks since the last evaluation."""
        self.sums: dict[str, Tensor] = {
            name: torch.tensor(value, dtype=torch.float64, device=world.device) for name, value in (sums or {}).items()
        }

    def add(self, terms: Mapping[str, Tensor], *, cells: int = 0) -> None:
        self.cells += cells
        for name, value in terms.items():
            self.sums[name] = self.sums[name] + value.double() if name in self.sums else value.double()

    def totals(self) -> dict[str, float]:
        """Sums over all ranks; every rank calls it."""
        names = self._names()
        zero = torch.zeros((), dtype=torch.float64, device=self._world.device)
        stacked = torch.stack([self.sums.get(name, zero) for name in names]) if names else zero[None][:0]
        return dict(zip(names, self._world.sum(stacked.clone()).tolist(), strict=True))

    def _names(self) -> list[str]:
        """All terms, in an order that all ranks share: a rank that has just resumed has none of its own."""
        return sorted({name for names in self._world.gather(list(self.sums)) for name in names})
