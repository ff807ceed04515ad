"""Features called by another column than their names: identifiers where sources name theirs by symbols."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from loaders.formats.source import Part, Say, Source

NAMED_BEFORE = "feature_name"
"""Column of var that keeps the names that a source had."""

_VERSIONED = re.compile(r"^(ENS[A-Z]*\d{6,})\.\d+$")
"""An Ensembl identifier with its version, ENSG00000141510.17."""


def renamed(sources: Sequence[Source], key: str, say: Say) -> list[Source]:
    """The sources with genes and proteins called by a column of their var; peaks keep their names.

    Versions of Ensembl identifiers are left out. A modality without the column keeps its names, which may be such
    identifiers already.

    Raises
    ------
    ValueError
        No source has the column; values are missing in it, or stand there more than once.
    """
    named = [part for source in sources for name, part in source.parts.items() if name != "atac"]
    if not any(key in part.var.columns for part in named):
        known = ", ".join(dict.fromkeys(str(column) for part in named for column in part.var.columns)) or "none"
        raise ValueError(f"feature_key: got {key!r}, a column that var of no source has; columns are: {known}")
    return [
        replace(source, parts={name: _renamed(source, part, key, say) for name, part in source.parts.items()})
        for source in sources
    ]


def _renamed(source: Source, part: Part, key: str, say: Say) -> Part:
    if part.modality == "atac":
        return part
    before = part.var.index
    if key in part.var.columns:
        values = part.var[key]
        if values.isna().any():
            lacking = str(before[values.isna()][0])
            raise ValueError(
                f"feature_key: {key!r} of {source.label} is missing for {int(values.isna().sum())} features of"
                f" {part.modality}, such as {lacking!r}; fill it in, or name another column"
            )
        names = values.astype(str)
    else:
        say(f"{source.label}: {part.modality} has no column {key!r} and keeps its names, such as {str(before[0])!r}")
        names = pd.Series(before.astype(str))
    index = pd.Index([_VERSIONED.sub(r"\1", name) for name in names], dtype=object)
    var = part.var.set_axis(index)
    if NAMED_BEFORE not in var.columns and not index.equals(before):
        var = var.assign(**{NAMED_BEFORE: before.to_numpy()})
    return replace(part, var=var)
