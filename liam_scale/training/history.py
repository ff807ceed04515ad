"""Loss terms from sums over minibatches to the history of a run: one row an evaluation, under scvi-tools' key names."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from liam_scale.training.distributed import World
from loaders.durable import write_text


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


Row = dict[str, float]


def summarise(terms: dict[str, float], num_cells: float, subset: str) -> Row:
    """Means per cell of summed loss terms, with the totals that scvi-tools reports.

    `elbo` is the negative evidence lower bound, as scvi-tools logs it: reconstruction plus every KL at weight 1.
    """
    means = {name: value / max(1.0, num_cells) for name, value in terms.items()}
    reconstruction = sum(v for name, v in means.items() if name.startswith("reconstruction_loss"))
    divergence = sum(v for name, v in means.items() if name.startswith("kl_divergence"))
    totals = {"elbo": reconstruction + divergence, "reconstruction_loss": reconstruction, "kl_local": divergence}
    return {f"{name}_{subset}": value for name, value in (totals | means).items()}


class History:
    """Rows in memory and, on the main rank, in `history.csv` (rewritten whole: it stays small)."""

    def __init__(self, path: Path | None, *, tensorboard: Path | None = None) -> None:
        self.rows: list[Row] = []
        self._path = path
        self._board: Any = None
        if tensorboard is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError(
                    "--training.tensorboard: tensorboard is not installed; pip install 'liam-scale[tensorboard]'"
                ) from error
            self._board = SummaryWriter(str(tensorboard))

    def append(self, row: Row) -> None:
        self.rows.append(row)
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, int(row["step"]))
            self._board.flush()
        self.write()

    def write(self) -> None:
        if self._path is None or not self.rows:
            return
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _number(value) for name, value in row.items()} for row in self.rows)
        write_text(self._path, buffer.getvalue())

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 2**53 else f"{value:.8g}"
