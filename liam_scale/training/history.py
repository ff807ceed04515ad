"""Loss terms from sums over minibatches to the history of a run: one row an evaluation, under scvi-tools' key names."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from liam_scale.training.distributed import World
from loaders.durable import write_text
from loaders.options import check_size


class Meter:
    """Adds up terms over this rank's cells; `totals` adds them up over ranks."""

    def __init__(self, world: World, sums: Mapping[str, float] | None = None, *, cells: int = 0) -> None:
        self._world = world
        self.cells = cells
        """Cells of all ranks since the last evaluation."""
        # What the main rank carries on from a checkpoint is of the cells of all ranks.
        self._carried, self._carried_cells = dict(sums or {}), cells
        self._names = tuple(sums or ())
        self._sums = torch.tensor(list((sums or {}).values()), dtype=torch.float64).to(world.device)

    def add(self, terms: Mapping[str, Tensor], *, cells: int = 0) -> None:
        """All terms at once: three launches, whatever their number."""
        self.cells += cells
        known, fresh = self._names, tuple(name for name in terms if name not in self._names)
        zero = torch.zeros_like(next(iter(terms.values())))
        values = torch.stack([terms.get(name, zero) for name in (*known, *fresh)]).double()
        self._sums = values + functional.pad(self._sums, (0, len(fresh))) if known else values
        self._names = (*known, *fresh)

    def own(self) -> dict[str, float]:
        """Sums of this rank, with what it carries on. Waits for the device, once."""
        return dict(zip(self._names, self._sums.tolist(), strict=True))

    def glance(self) -> dict[str, float]:
        """Means over this rank's cells of this process: of half of them all with two ranks."""
        cells = max(1.0, (self.cells - self._carried_cells) / self._world.size)
        return {name: (value - self._carried.get(name, 0.0)) / cells for name, value in self.own().items()}

    def totals(self) -> dict[str, float]:
        """Sums over all ranks; every rank calls it."""
        # In an order that all ranks share: a rank that has just resumed has no terms of its own.
        names, own = sorted({name for part in self._world.gather(self._names) for name in part}), self.own()
        sums = torch.tensor([own.get(name, 0.0) for name in names], dtype=torch.float64).to(self._world.device)
        return dict(zip(names, self._world.sum(sums).tolist(), strict=True))


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


RISE = 0.01
"""Share by which a modality's held-out loss rises before it is said to be memorised."""


def memorised(rows: Sequence[Row], step: int) -> dict[str, tuple[float, int, float]]:
    """Modalities that the weights of an evaluation have learnt by heart, of several that share a latent space.

    Early stopping looks at the sum, in which the modality with the most likelihood hides the others.

    Returns
    -------
    By modality the lowest held-out loss of an earlier evaluation, its epoch, and the loss at this one, which is more
    than 1 % above it; nats per cell.
    """
    until = [row for row in rows if row["step"] <= step]
    columns = [re.fullmatch("reconstruction_loss_(.+)_validation", name) for name in (until[-1] if until else {})]
    parts = {column[1]: column[0] for column in columns if column}
    found = {}
    for modality, column in parts.items() if len(parts) > 1 else ():
        lowest, kept = min(until, key=lambda row: row[column]), until[-1][column]
        if kept > (1 + RISE) * lowest[column] > 0:
            found[modality] = lowest[column], int(lowest["epoch"]), kept
    return found


def read_history(path: Path) -> pd.DataFrame:
    """The rows of a `history.csv`.

    Raises
    ------
    RuntimeError
        It is not as it was written.
    """
    try:
        check_size(path)
        table = pd.read_csv(path, encoding_errors="strict", on_bad_lines="error", index_col=False)
        if not all(pd.api.types.is_numeric_dtype(kind) for kind in table.dtypes) or not len(table):
            raise ValueError("not all of it is numbers")
        return table
    except (OSError, ValueError, OverflowError) as error:
        raise RuntimeError(
            f"run: {path} cannot be read ({error}); run the training command again, it is written anew from the"
            " checkpoint, or restore a copy"
        ) from error


class History:
    """Rows in memory and, on the main rank, in `history.csv` (rewritten whole: it stays small); `tell` hears each."""

    def __init__(
        self, path: Path | None, *, tensorboard: Path | None = None, tell: Callable[[Row], None] | None = None
    ) -> None:
        self.rows: list[Row] = []
        self._tell = tell
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
        if self._tell is not None:
            self._tell(row)

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
