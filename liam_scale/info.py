"""Info: `liam-scale info atlas.zarr` says on one screen what a store holds; only obs is read, no counts."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
import zarr
from anndata.io import read_elem

from liam_scale.command import Answer, Command
from liam_scale.run import RUN_ATTRIBUTE
from loaders.check import bytes_of
from loaders.formats.root import local_path, open_root
from loaders.modalities import PRESETS, Kind
from loaders.schema import SCHEMA_KEY, ObsColumn
from loaders.sizing import describe_memory
from loaders.stores import Store, open_store
from loaders.stores.chosen import WHERE_ATTRIBUTE

_SHOWN = 6
"""Values of a column, or embeddings, on one line."""


@dataclass(frozen=True)
class InfoConfig:
    """Say what a store holds: cells, modalities, samples, obs columns, embeddings, and what made it."""

    store: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]
    """Any store that streams, or a file."""
    modality: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=NM|NB ...")] = ()
    """What modalities of other names are where no ingest has said it, such as `h3k27ac=NM`."""


def info(store: Store) -> dict[str, Any]:
    """What `liam-scale info` prints, as JSON values.

    Returns
    -------
    `uri`, `cells`, `is_shuffled`, `parts` (cells of each, where there are several), `bytes` (None where the store is
    not local), `modalities` by name, `cells_with` (number of cells by the modalities that they have), `obs` (by
    column the cells of each value, or None where a column is no category), `embeddings` by name, `made_by` (None where
    ingest did not make the store).
    """
    schema, path = store.schema, local_path(store.uri)
    rows = {name: store.modality_rows(name) for name in schema.modalities}
    bits = sum(
        (np.full(schema.num_cells, 1 << i) if held is None else (held >= 0) * (1 << i))
        for i, held in enumerate(rows.values())
    )
    found, counts = np.unique(bits, return_counts=True)
    kinds = [" + ".join(name for i, name in enumerate(rows) if code >> i & 1) or "none" for code in found.tolist()]
    modalities = {
        name: {**asdict(held), "bytes": None if path is None else bytes_of(path / "mod" / name)}
        for name, held in schema.modalities.items()
    }
    return {
        "uri": store.uri,
        "cells": schema.num_cells,
        "is_shuffled": schema.is_shuffled,
        "parts": schema.parts,
        "bytes": None if path is None else bytes_of(path),
        "modalities": modalities,
        "cells_with": dict(zip(kinds, counts.tolist(), strict=True)),
        "obs": {name: _values(store, name) for name in schema.obs_columns},
        "embeddings": {name: _embedding(store, name) for name in store.embedding_names()},
        "made_by": _made_by(store.uri),
    }


def _values(store: Store, name: str) -> dict[str, int] | None:
    try:
        column: ObsColumn = store.obs_column(name)
    except ValueError:
        return None
    counts = np.bincount(column.codes[column.codes >= 0], minlength=len(column.categories))
    values = dict(zip(column.categories, counts.tolist(), strict=True))
    missing = int((column.codes < 0).sum())
    return values | ({"missing": missing} if missing else {})


def _embedding(store: Store, name: str) -> dict[str, Any]:
    attributes = store.embedding_attributes(name)
    makers = sorted({str(entry[RUN_ATTRIBUTE]) for entry in attributes if RUN_ATTRIBUTE in entry})
    cells = next((str(entry[WHERE_ATTRIBUTE]) for entry in attributes if WHERE_ATTRIBUTE in entry), None)
    found = {"dimensions": store.read_embedding(name, 0, 1).shape[1], "run": ", ".join(makers) or None}
    return found | ({"where": cells} if cells else {})


def _made_by(uri: str) -> dict[str, Any] | None:
    if local_path(uri) is None or not Path(uri).is_dir():
        return None
    root = open_root(uri)
    if not isinstance(root, zarr.Group) or SCHEMA_KEY not in root.attrs or "liam_scale" not in root.get("uns", {}):
        return None
    kept = read_elem(root["uns"]["liam_scale"])
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in kept.items()}


def describe(found: dict[str, Any]) -> str:
    """One screen of text of what `info` found."""
    size = "" if found["bytes"] is None else f", {describe_memory(found['bytes'])}"
    order = "shuffled" if found["is_shuffled"] else "in the order of its source"
    order += f" in {len(found['parts'])} parts" if found["parts"] else ""
    lines = [f"{found['uri']}: {found['cells']:,} cells, {order}{size}"]
    for name, held in found["modalities"].items():
        per_cell = held["num_nonzeros"] / max(1, held["num_cells"])
        own = "" if not held["bytes"] else f", {held['bytes'] / max(1, held['num_cells']) / 1e3:.1f} kB a cell"
        own += "" if name in PRESETS else f", {Kind(held['likelihood'], held['transform'])}"
        lines.append(
            f"  {name}: {held['num_cells']:,} cells x {held['num_features']:,} features, {per_cell:,.0f} non-zeros a"
            f" cell, {held['value_dtype']}{own}"
        )
    if len(found["cells_with"]) > 1:
        lines.append("cells with " + ", ".join(f"{name}: {count:,}" for name, count in found["cells_with"].items()))
    lines.append("obs:" if found["obs"] else "obs: no columns")
    for name, values in found["obs"].items():
        lines.append(f"  {name}: {'numbers' if values is None else _shown_values(values, found['cells'])}")
    for name, held in found["embeddings"].items():
        maker = "" if held["run"] is None else f", by run {held['run']}"
        maker += f", of the cells with {held['where']}" if "where" in held else ""
        lines.append(f"embedding {name}: {held['dimensions']} dimensions{maker}")
    if made := found["made_by"]:
        lines.append("made by: " + ", ".join(f"{name} {_shown_one(value)}" for name, value in made.items() if value))
    return "\n".join(lines)


def _shown_values(values: dict[str, int], num_cells: int) -> str:
    if len(values) > max(_SHOWN, num_cells // 2):
        return f"{len(values):,} values"
    most = sorted(values.items(), key=lambda entry: -entry[1])[:_SHOWN]
    listed = ", ".join(f"{name} {count:,}" for name, count in most) + (", ..." if len(values) > _SHOWN else "")
    return f"{len(values)} values ({listed})"


def _shown_one(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return ", ".join(map(str, value[:_SHOWN])) + (", ..." if len(value) > _SHOWN else "")


def _info(config: InfoConfig) -> Answer:
    found = info(open_store(config.store, modality=config.modality))
    return Answer(describe(found), found)


main = Command(
    InfoConfig, _info, prog="liam-scale info", description="What a store holds, on one screen.", answers=True
)

if __name__ == "__main__":
    sys.exit(main())
