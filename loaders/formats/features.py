"""Features of one modality over several sources: which stay, in which order, and where each source's columns go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from loaders.schema import check_unique

Join = Literal["inner", "outer"]


@dataclass(frozen=True)
class Joined:
    """The store's features of one modality.

    Attributes
    ----------
    var
        One row per feature of the store.
    columns
        Per source (features of the source,) int64: the store's column of each, -1 where it is left out.
    """

    var: pd.DataFrame
    columns: tuple[npt.NDArray[np.int64], ...]


def join_features(modality: str, sources: Sequence[tuple[str, pd.DataFrame]], join: Join) -> Joined:
    """Join the features of sources that have the modality, by name.

    Parameters
    ----------
    sources
        Name of each source, for messages, and its var.
    join
        "inner": features that all have, in the first one's order; "outer": all, new ones after the known ones. A
        feature that a source lacks counts zero in its cells.

    Raises
    ------
    ValueError
        Names repeated within a source; nothing in common.
    """
    if join == "inner":
        names = shared_names(modality, [(where, var.index) for where, var in sources])
        var = sources[0][1].loc[names]
    else:
        _check_names(modality, [(where, var.index) for where, var in sources])
        frames = []
        known: pd.Index = pd.Index([], dtype=object)
        for _, var in sources:
            new = var[~var.index.isin(known)]
            frames.append(new)
            known = known.append(new.index)
        var = pd.concat([frame for frame in frames if len(frame)]) if sum(map(len, frames)) else frames[0]
        names = known
    if not len(names):
        raise ValueError(f"{modality}: {sources[0][0]} has no features; leave the modality out or give another file")
    return Joined(storable(var), tuple(names.get_indexer(own.index).astype(np.int64) for _, own in sources))


def shared_names(modality: str, sources: Sequence[tuple[str, pd.Index]]) -> pd.Index:
    """Names of features that all sources have, in the order of the first; ValueError as for `join_features`."""
    _check_names(modality, sources)
    names = sources[0][1]
    for where, own in sources[1:]:
        common = names[names.isin(own)]
        if not len(common):
            raise ValueError(
                f"{modality}: no feature of {where} (for example {_first(own)}) is in all of the sources before it "
                f"(for example {_first(sources[0][1])}); bring the names to one kind (symbols or identifiers, the same "
                "peak set), or ingest them with join='outer' if they really measure different features"
            )
        names = common
    return names


def _check_names(modality: str, sources: Sequence[tuple[str, pd.Index]]) -> None:
    for where, names in sources:
        cure = "use unique identifiers, or call var_names_make_unique() and save it again"
        check_unique(f"{where}: feature names of {modality}", names, cure)


def _first(names: pd.Index) -> str:
    return repr(str(names[0])) if len(names) else "none: it is empty"


def storable(var: pd.DataFrame) -> pd.DataFrame:
    """The same table with mixed columns as text, which is what an anndata file can hold."""
    columns = {}
    for name in var.columns:
        values = var[name]
        if values.dtype == object:
            values = values.where(values.isna(), values.map(str)).astype("category")
        columns[str(name)] = values.array
    return pd.DataFrame(columns, index=pd.Index(var.index.to_numpy(), dtype=object))
