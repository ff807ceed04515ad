"""An embedding put into the user's own object or file, by cell id."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import anndata
import h5py
import mudata
import numpy as np
import numpy.typing as npt
import pandas as pd
import zarr

from liam_scale.run import check_maker
from loaders.durable import replacing
from loaders.formats.frame import Frame
from loaders.formats.root import open_root, reading
from loaders.schema import BARCODE_COLUMNS
from loaders.stores import Store, embeddings

_log = logging.getLogger(__name__)

Target: TypeAlias = anndata.AnnData | mudata.MuData | str | Path
Missing = Literal["refuse", "nan"]

_SHOWN = 5
"""Cell ids named in a message."""


def attach(
    target: Target,
    compute: Callable[[], npt.NDArray[np.float32]],
    store: Store,
    *,
    key: str,
    attributes: Mapping[str, str],
    run: str | None,
    overwrite: bool,
    missing: Missing,
) -> None:
    """Put the embedding of a store's cells into obsm[key] of an object or file, in the order of its own cells.

    Parameters
    ----------
    target
        An AnnData or MuData; or the path of an h5ad or h5mu, which is copied beside itself and replaced at once, or of
        a Zarr folder, in which the one array is replaced at once. Nothing else in it changes.
    compute
        Gives the (cells, latent) embedding; called when all checks are done.
    attributes
        What says which run made it: kept with the array in a file, in uns[key] of an object.
    missing
        What to do with cells of the target that the store lacks: refuse them, or fill their rows with NaN.

    Raises
    ------
    ValueError
        Cells cannot be found by their ids, another run's embedding stands there, or the target is something else.
    """
    if missing not in ("refuse", "nan"):
        raise ValueError(f"missing: got {missing!r}; choose refuse or nan")
    if isinstance(target, anndata.AnnData | mudata.MuData):
        what, ids = f"{type(target).__name__} in memory", target.obs_names
        held = embeddings.HeldEmbeddings(target).attributes(key)
    else:
        target = Path(target)
        what, (ids, held) = str(target), _look(target, key)
    if not overwrite:
        check_maker(held, run, what=f"obsm[{key!r}] of {what}", cure="name another key, or give overwrite=True")
    rows = _rows_of(pd.Index(ids), store, what, missing)
    known = compute()
    values = np.full((len(rows), known.shape[1]), np.nan, dtype=np.float32)
    values[rows >= 0] = known[rows[rows >= 0]]
    if not isinstance(target, Path):
        embeddings.HeldEmbeddings(target).write(key, values, attributes)
    elif target.is_dir():
        embeddings.write(zarr.open_group(target, mode="r+", use_consolidated=False), key, values, attributes)
    else:
        _replace_in_hdf5(target, key, values, attributes)


def _rows_of(ids: pd.Index, store: Store, what: str, missing: Missing) -> npt.NDArray[np.int64]:
    """(n,) row in the store of each cell of the target, -1 where it has none and that is allowed."""
    cells = pd.Index(store.cell_ids(0, store.schema.num_cells))
    for index, where in ((ids, what), (cells, store.uri)):
        if not index.is_unique:
            raise ValueError(
                f"{where}: got cell ids that stand there more than once ({_some(index[index.duplicated()])}), so that "
                "cells cannot be told apart; make them unique, as they are in a store made by liam-scale ingest"
            )
    rows = cells.get_indexer(ids)
    if (rows < 0).any():
        found = _rows_by_barcode(ids, cells, store, what)
        rows = rows if found is None else found
    absent = ids[rows < 0]
    if len(absent) and (missing == "refuse" or len(absent) == len(ids)):
        raise ValueError(
            f"{what}: got {len(absent):,} of {len(ids):,} cells that {store.uri} does not have ({_some(absent)}); its "
            f"cells have ids such as {cells[0]!r}: give the cells those ids, leave out cells that were not embedded, "
            "or fill their rows with missing='nan'"
        )
    extra = len(cells) - len(ids) + len(absent)
    if extra:
        left_out = cells[~np.isin(np.arange(len(cells)), rows)]
        _log.info("%s: lacks %s cells of %s (%s)", what, f"{extra:,}", store.uri, _some(left_out))
    return rows.astype(np.int64)


def _rows_by_barcode(ids: pd.Index, cells: pd.Index, store: Store, what: str) -> npt.NDArray[np.int64] | None:
    """Rows of the one source of an ingest that has all these barcodes, where ingest put the source before each id."""
    name = next((name for name in BARCODE_COLUMNS if name in store.schema.obs_columns), None)
    if name is None:
        return None
    column = store.obs_column(name)
    barcodes = pd.Series([*column.categories, ""], dtype=object).to_numpy()[column.codes]
    sources = pd.Series([cell.removesuffix(f"_{code}") for cell, code in zip(cells, barcodes, strict=True)])
    candidates: dict[str, npt.NDArray[np.int64]] = {}
    for source, rows in sources.groupby(sources).indices.items():
        if len(rows) < len(ids) or not (found := pd.Index(barcodes[rows])).is_unique:
            continue
        places = found.get_indexer(ids)
        if places.min() >= 0:
            candidates[str(source)] = np.asarray(rows)[places]
    if len(candidates) > 1:
        names = " and ".join(candidates)
        raise ValueError(
            f"{what}: got barcodes that are cells of {names} in {store.uri}; say which, for example "
            f"data.obs_names = {next(iter(candidates)) + '_'!r} + data.obs_names"
        )
    return next(iter(candidates.values()), None)


def _some(ids: pd.Index) -> str:
    return ", ".join(map(repr, ids[:_SHOWN].tolist())) + (", ..." if len(ids) > _SHOWN else "")


def _look(path: Path, key: str) -> tuple[npt.NDArray[Any], list[dict[str, Any]]]:
    """Cell ids of an AnnData or MuData file, and the attributes of obsm[key]."""
    root = open_root(path)
    try:
        with reading(str(path)):
            return Frame(root["obs"], str(path)).index().astype(object), embeddings.attributes(root, str(path), key)
    finally:
        if isinstance(root, h5py.File):
            root.close()


def _replace_in_hdf5(path: Path, key: str, values: npt.NDArray[np.float32], attributes: Mapping[str, str]) -> None:
    mode = path.stat().st_mode
    with replacing(path) as copy:
        shutil.copyfile(path, copy)
        with h5py.File(copy, "r+") as file:
            obsm = file.require_group("obsm")
            if key in obsm:
                del obsm[key]
            array = obsm.create_dataset(key, data=values)
            array.attrs.update({**attributes, "encoding-type": "array", "encoding-version": "0.2.0"})
    path.chmod(mode)
