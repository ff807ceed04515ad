"""Embeddings in obsm of a measurement of a TileDB-SOMA experiment: sparse arrays (joinid, dimension) of every value."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

CREATION_PAUSES = (0.0, 0.0, 0.1, 0.3, 1.0, 3.0)
"""Seconds before each attempt to find or create an embedding that other processes may be creating too."""


def write(
    soma: Any,
    context: Any,
    measurement: str,
    name: str,
    joinids: npt.NDArray[np.int64],
    values: npt.NDArray[np.float32],
    attributes: Mapping[str, str],
) -> None:
    """Put (m, d) values at the cells of (m,) joinids; the array, whose metadata take attributes, is made when missing.

    Parameters
    ----------
    soma, context
        The module tiledbsoma and the context of the store.
    measurement
        Address of the measurement.

    Raises
    ------
    ValueError
        obsm[name] exists with another width, or for fewer cells.
    """
    import pyarrow

    width = values.shape[1]
    uri = _open_or_create(soma, context, measurement, name, width)
    with soma.open(uri, context=context) as array:
        shape = array.shape
    if len(joinids) and (shape[0] <= joinids[-1] or shape[1] != width):
        raise ValueError(
            f"{measurement}/obsm[{name!r}]: got an embedding of width {width} for joinids up to {joinids[-1]}, where"
            f" one of shape {shape} stands; use another name"
        )
    entries = {
        "soma_dim_0": np.repeat(joinids, width),
        "soma_dim_1": np.tile(np.arange(width, dtype=np.int64), len(values)),
        "soma_data": np.ascontiguousarray(values, np.float32).ravel(),
    }
    with soma.open(uri, "w", context=context) as array:
        array.write(pyarrow.table(entries))
        array.metadata.update(attributes)


def read(
    soma: Any, context: Any, measurement: str, name: str, joinids: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """(m, d) values at ascending joinids; a cell that was never written is NaN.

    Raises
    ------
    ValueError
        There is no such embedding.
    """
    with soma.open(measurement, context=context) as group:
        held = list(group["obsm"].keys()) if "obsm" in group else []
        if name not in held:
            raise ValueError(
                f"{measurement}/obsm: got {name!r}, it holds {', '.join(sorted(held)) or 'nothing'};"
                f" write the embedding first: python -m liam_scale.embed RUN"
            )
        array = group["obsm"][name]
        values = np.full((len(joinids), array.shape[1]), np.nan, np.float32)
        if not len(joinids):
            return values
        for table in array.read((slice(int(joinids[0]), int(joinids[-1])),)).tables():
            cells, dimensions = table["soma_dim_0"].to_numpy(), table["soma_dim_1"].to_numpy()
            rows = np.searchsorted(joinids, cells)
            wanted = joinids[rows] == cells
            values[rows[wanted], dimensions[wanted]] = table["soma_data"].to_numpy()[wanted]
    return values


def attributes(soma: Any, context: Any, measurement: str, name: str) -> list[dict[str, Any]]:
    """Metadata of obsm[name]; none where there is no such array."""
    with soma.open(measurement, context=context) as group:
        if "obsm" not in group or name not in group["obsm"]:
            return []
        return [dict(group["obsm"][name].metadata)]


def drop(soma: Any, context: Any, measurement: str, name: str) -> None:
    """Remove obsm[name] where it exists."""
    with soma.open(measurement, context=context) as group:
        if "obsm" not in group or name not in group["obsm"]:
            return
        obsm = str(group["obsm"].uri)
    with soma.open(obsm, "w", context=context) as group:
        del group[name]


def _open_or_create(soma: Any, context: Any, measurement: str, name: str, width: int) -> str:
    """Address of the array obsm[name]."""
    import pyarrow

    for pause in CREATION_PAUSES:
        time.sleep(pause)
        with soma.open(measurement, context=context) as group:
            if "obsm" in group and name in group["obsm"]:
                return str(group["obsm"][name].uri)
            num_rows = max(int(group["X"][layer].shape[0]) for layer in group["X"])
        # Another process may be making it at this moment: then tiledbsoma raises one or the other.
        with (
            contextlib.suppress(soma.AlreadyExistsError, KeyError),
            soma.open(measurement, "w", context=context) as group,
        ):
            obsm = group["obsm"] if "obsm" in group else group.add_new_collection("obsm")
            obsm.add_new_sparse_ndarray(name, type=pyarrow.float32(), shape=(num_rows, width))
    raise RuntimeError(f"{measurement}/obsm: got no array {name!r} though it was created; run the same command again")
