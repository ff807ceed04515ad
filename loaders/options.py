"""What a user chooses about loading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from loaders.option_checks import Range, check_options
from loaders.sizing import parse_memory


@dataclass(frozen=True)
class LoaderConfig:
    """How cells are read, shuffled and grouped into minibatches."""

    minibatch: Annotated[int, Range(least=1), tyro.conf.arg(aliases=["--minibatch"])] = 128
    """Cells of one optimizer step, over all ranks."""
    memory: Annotated[str, tyro.conf.arg(aliases=["--memory"], metavar="SIZE")] = "1GiB"
    """Memory of windows and read-ahead of all modalities together, over all ranks of this machine's process."""
    streams: Annotated[int | None, Range(least=1)] = None
    """Virtual ranks; fixed when a run is created. Default 16, or twice the ranks if that is more."""
    threads: Annotated[int | None, Range(least=1)] = None
    """Reader threads of one process; default: the cores of this process, at most 4."""
    validation_share: Annotated[float, Range(least=0, below=1)] = 0.05
    """Share of every sample's cells held out for validation."""
    adt_transform: Literal["clr", "none"] = "clr"
    """Transform of ADT counts, made while reading: centred log-ratio per cell, or the values as they are."""
    balance: Annotated[str | None, tyro.conf.arg(metavar="COLUMN")] = None
    """Obs column whose categories are drawn equally often in an epoch."""

    def __post_init__(self) -> None:
        check_options(self)
        parse_memory(self.memory)

    @property
    def transforms(self) -> dict[str, str]:
        return {"adt": "clr"} if self.adt_transform == "clr" else {}

    def streams_for(self, ranks: int) -> int:
        """Number of streams of a new run on `ranks` ranks."""
        return self.streams if self.streams is not None else max(16, 2 * ranks)
