"""Which cells take part: subsets, filters, weights, and obs columns as codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from loaders.plan import Rows, split
from loaders.schema import ObsColumn, hash_names
from loaders.stores.base import ROWS_PER_READ, Store


def encode_column(store: Store, name: str, *, allow_missing: bool) -> ObsColumn:
    """An obs column, its codes in the narrowest signed type.

    Raises
    ------
    ValueError
        There is no such column, or it holds missing values where it may not.
    """
    column = store.obs_column(name)
    missing = int(np.count_nonzero(column.codes < 0))
    if missing and not allow_missing:
        raise ValueError(
            f"obs column {name!r}: got {missing:,} of {len(column.codes):,} cells without a value in {store.uri};"
            f" every cell needs one: fill them in before ingest, leave these cells out, or name another column"
            f" ({', '.join(store.schema.obs_columns)})"
        )
    return ObsColumn(column.codes.astype(np.min_scalar_type(-len(column.categories) - 1)), column.categories)


def columns_of(
    store: Store, obs: Sequence[str] | Mapping[str, npt.NDArray[np.floating]]
) -> dict[str, npt.NDArray[np.generic]]:
    """(n,) codes of obs columns, by name; or the numbers that are given by name, as float32."""
    if not isinstance(obs, Mapping):
        return {name: encode_column(store, name, allow_missing=True).codes for name in obs}
    for name, values in obs.items():
        if values.shape != (store.schema.num_cells,):
            raise ValueError(
                f"obs: got {name} of shape {values.shape}; give one number for each of {store.schema.num_cells} cells"
            )
    return {name: values.astype(np.float32, copy=False) for name, values in obs.items()}


def sample_codes(store: Store, sample: str | npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    """(n,) code of each cell's sample, of a column or as given, in the narrowest signed type."""
    if isinstance(sample, str):
        return encode_column(store, sample, allow_missing=False).codes
    if sample.shape != (store.schema.num_cells,) or sample.dtype.kind not in "iu" or sample.min(initial=0) < 0:
        raise ValueError(
            f"sample: got {sample.dtype} of shape {sample.shape}; give one code from 0 on for each of"
            f" {store.schema.num_cells} cells"
        )
    return sample.astype(np.min_scalar_type(-int(sample.max(initial=0)) - 1))


_keys: WeakKeyDictionary[Store, npt.NDArray[np.uint64]] = WeakKeyDictionary()


def cell_keys(store: Store) -> npt.NDArray[np.uint64]:
    """(n,) hash of each cell's id, the same wherever the cell stands. Read once: that of ten million takes seconds."""
    if store not in _keys:
        _keys[store] = _read_keys(store)
    return _keys[store]


def _read_keys(store: Store) -> npt.NDArray[np.uint64]:
    count = store.schema.num_cells
    starts = range(0, count, ROWS_PER_READ)
    keys = [hash_names(store.cell_ids(start, min(count, start + ROWS_PER_READ))) for start in starts]
    return np.concatenate([np.zeros(0, np.uint64), *keys])


def select_rows(
    store: Store,
    sample: npt.NDArray[np.integer] | None,
    *,
    subset: str,
    share: float,
    seed: int,
    drop: npt.NDArray[np.bool_] | Mapping[str, Sequence[str]] | None,
) -> Rows:
    """Rows of a subset, ascending, without those dropped; none where no cell validates."""
    if subset not in ("train", "validation", "all"):
        raise ValueError(f"subset: got {subset!r}; choose train, validation or all")
    count = store.schema.num_cells
    rows = np.arange(count, dtype=np.uint32)
    if drop is not None:
        rows = rows[~_dropped(store, drop)]
    if subset != "all":
        keys = cell_keys(store)[rows] if share else rows.astype(np.uint64)
        chosen = split(keys, None if sample is None else sample[rows], seed=seed, share=share)
        rows = rows[chosen if subset == "validation" else ~chosen]
    if not len(rows) and subset != "validation":
        raise ValueError(f"subset {subset!r}: got no cells of {count} in {store.uri}; drop fewer cells")
    return rows


def _dropped(store: Store, drop: npt.NDArray[np.bool_] | Mapping[str, Sequence[str]]) -> npt.NDArray[np.bool_]:
    count = store.schema.num_cells
    if isinstance(drop, np.ndarray):
        if drop.dtype != np.bool_ or drop.shape != (count,):
            raise ValueError(f"drop: got {drop.dtype} of shape {drop.shape}; give one bool for each of {count} cells")
        return drop
    dropped = np.zeros(count, np.bool_)
    for name, values in drop.items():
        column = store.obs_column(name)
        unknown = [value for value in values if value not in column.categories]
        if unknown:
            raise ValueError(
                f"drop: got {name} = {', '.join(map(repr, unknown))}; values are: {', '.join(column.categories[:20])}"
            )
        dropped |= np.isin(column.codes, [column.categories.index(value) for value in values])
    return dropped


def weights_of(
    store: Store, weights: npt.NDArray[np.floating] | str, rows: Rows, *, is_allowed: bool
) -> npt.NDArray[np.float32]:
    """(len(rows),) expected copies of each row in an epoch.

    The name of an obs column stands for weights with which its categories come equally often in an epoch
    as long as before; cells without a value form a category of their own.
    """
    if not is_allowed:
        raise ValueError("weights: got weights for a fixed order; leave them out, or shuffle")
    count = store.schema.num_cells
    if isinstance(weights, str):
        codes = store.obs_column(weights).codes[rows] + 1
        sizes = np.bincount(codes)
        return (len(rows) / np.count_nonzero(sizes) / np.maximum(sizes, 1)).astype(np.float32)[codes]
    if weights.shape != (count,):
        raise ValueError(f"weights: got shape {weights.shape}; give one number for each of {count} cells")
    chosen = weights[rows].astype(np.float32)
    if not np.isfinite(chosen).all() or (chosen < 0).any() or chosen.sum(dtype=np.float64) < 0.5:
        raise ValueError("weights: got negative, infinite or only zero weights; give expected copies, such as 0.5 or 2")
    return chosen
