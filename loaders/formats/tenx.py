"""The 10x Genomics HDF5 matrix of Cell Ranger 3 and later: one sparse matrix of all modalities, cells in columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from loaders.formats.compressed import CompressedRows
from loaders.formats.frame import Frame, ObsTable, View, read_strings
from loaders.formats.source import Say, Source, split_by_type
from loaders.schema import check_unique


def is_tenx(root: Any) -> bool:
    """Whether an open HDF5 file is a 10x matrix, of whatever version."""
    return "matrix" in root or any("barcodes" in root[key] for key in root if hasattr(root[key], "keys"))


def open_tenx(label: str, path: Path, root: Any, *, say: Say) -> Source:
    """The cells and modalities of a 10x file; feature names repeated in it get -1, -2, ... as scanpy gives them."""
    if "matrix" not in root or "features" not in root["matrix"]:
        raise ValueError(
            f"{label}: a 10x matrix of Cell Ranger 2 or older (no matrix/features); read it with scanpy.read_10x_h5 "
            "and save an .h5ad"
        )
    group = root["matrix"]
    features = group["features"]
    ids = read_strings(group["barcodes"])
    check_unique(
        f"{label}: barcodes", pd.Index(ids.astype(object)), "the file is damaged: write it again with Cell Ranger"
    )
    names = _make_unique(label, read_strings(features["name"]).astype(object), say)
    columns = {"gene_ids": read_strings(features["id"]).astype(object)}
    for key in ("feature_type", "genome", "interval"):
        if key in features and features[key].shape == features["name"].shape:
            columns["feature_types" if key == "feature_type" else key] = read_strings(features[key]).astype(object)
    num_features, num_cells = (int(n) for n in group["shape"][:])
    if (num_features, num_cells) != (len(names), len(ids)):
        raise ValueError(
            f"{label}: matrix/shape is {num_features} x {num_cells}, the file names {len(names)} features and "
            f"{len(ids)} barcodes; it is damaged: write it again with Cell Ranger"
        )
    var = pd.DataFrame(columns, index=names)
    # Compressed by barcode: read as cells x features it is CSR.
    matrix = CompressedRows(f"{label}: matrix", (num_cells, num_features), group)
    types = var["feature_types"].to_numpy() if "feature_types" in var else np.full(len(var), "Gene Expression", object)
    parts = split_by_type(label, matrix, var, types, (), say)
    return Source(label, (path,), ids, parts, ObsTable(View(Frame(pd.DataFrame(index=ids.astype(object))), None), {}))


def _make_unique(label: str, names: np.ndarray, say: Say) -> pd.Index:
    index = pd.Index(names)
    repeated = index.duplicated()
    if not repeated.any():
        return index
    taken, unique = set(names.tolist()), names.copy()
    count: dict[str, int] = {}
    for place in np.flatnonzero(repeated):
        name = names[place]
        while True:
            count[name] = count.get(name, 0) + 1
            new = f"{name}-{count[name]}"
            if new not in taken:
                break
        taken.add(new)
        unique[place] = new
    first = int(np.flatnonzero(repeated)[0])
    say(
        f"{label}: {int(repeated.sum())} feature names repeat another and got a number ({names[first]!r}: "
        f"{unique[first]!r})"
    )
    return pd.Index(unique)
