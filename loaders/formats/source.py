"""A source of cells: its modalities and what is known of the cells, whatever file or object holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from loaders.formats.frame import ObsTable
from loaders.formats.matrix import StoredMatrix
from loaders.modalities import Kind, Kinds, modality_of, ordered, saying

Say = Callable[[str], None]
"""Takes remarks on what was assumed."""


def unsaid(remark: str) -> None:
    """A `Say` for what is said elsewhere."""


@dataclass(frozen=True)
class Part:
    """One modality of a source.

    Attributes
    ----------
    modality, kind
        Its name, and what it is.
    matrix
        Its counts.
    var
        Its features, those of other modalities in the same matrix left out.
    columns
        (features of the matrix,) int64 row of `var` each belongs to, -1 for other modalities; None: column i is row i.
    rows
        (cells of the source,) int64 row of the matrix, -1 where the cell lacks the modality; None: cell i is row i.
    layers
        Other layers of the file, to name in messages.
    """

    modality: str
    kind: Kind
    matrix: StoredMatrix
    var: pd.DataFrame
    columns: npt.NDArray[np.int64] | None = None
    rows: npt.NDArray[np.int64] | None = None
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Cells with their modalities and obs columns."""

    label: str
    """The path or address as given, for messages."""
    paths: tuple[Path, ...]
    """Files it was read from; the end of the first names the source."""
    cell_ids: npt.NDArray[Any]
    """(n,) unique ids as compact strings."""
    parts: Mapping[str, Part]
    obs: ObsTable
    sample: str | None = None
    """The sample of all its cells, where the user named it."""

    @property
    def kinds(self) -> dict[str, Kind]:
        """What each modality is."""
        return {name: part.kind for name, part in self.parts.items()}

    def at(self, cells: npt.NDArray[np.int64]) -> Source:
        """The source with these of its cells, ascending; rows of its matrices that belong to none of them stay."""
        parts = {
            name: replace(part, rows=cells if part.rows is None else part.rows[cells])
            for name, part in self.parts.items()
        }
        return replace(self, cell_ids=self.cell_ids[cells], parts=parts, obs=self.obs.at(cells))

    def only(self, modality: str) -> Source:
        """The source without its other modalities; its cells stay."""
        if modality not in self.parts:
            raise ValueError(
                f"{self.label}: {modality} was asked for, the file has {', '.join(self.parts)}; name one of them"
            )
        return replace(self, parts={modality: self.parts[modality]})


def split_by_type(
    label: str,
    matrix: StoredMatrix,
    var: pd.DataFrame,
    types: npt.NDArray[Any],
    layers: tuple[str, ...],
    *,
    kinds: Kinds,
    say: Say,
) -> dict[str, Part]:
    """One part per modality of a matrix whose features have types."""
    of_feature = {name: modality_of(name, kinds) for name in set(types.tolist())}
    unknown = sorted(name for name, modality in of_feature.items() if modality is None)
    if unknown:
        say(
            f"{label}: features of the type {', '.join(unknown)} are left out; known are {', '.join(ordered(kinds))};"
            f" to take them, {saying(unknown[0])}"
        )
    parts = {}
    for modality in ordered(found for found in of_feature.values() if found is not None):
        chosen = np.array([of_feature[name] == modality for name in types.tolist()], bool)
        columns = np.where(chosen, np.cumsum(chosen) - 1, -1).astype(np.int64)
        own = None if chosen.all() else columns
        parts[modality] = Part(modality, kinds[modality], matrix, var[chosen], own, layers=layers)
    if not parts:
        raise ValueError(
            f"{label}: var['feature_types'] has {', '.join(sorted(of_feature)) or 'nothing'}, expected 'Gene "
            "Expression', 'Peaks' or 'Antibody Capture'; correct it, write rna=, atac= or adt= before the path, or"
            f" {saying(unknown[0] if unknown else '')}"
        )
    return parts
