"""What a run remembers of its store, part by part: a store that has changed is refused with what differs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from liam_scale.run import Cells, Contents, Labels
from loaders.schema import hash_names
from loaders.selection import cell_keys
from loaders.stores import Store

SAMPLED_PLACES, SAMPLED_ROWS = 16, 32
"""Rows that stand for the counts of a store without checksums of its own: a pass over all of it would take as long as
an epoch."""


def contents_of(store: Store, columns: Sequence[str]) -> Contents:
    """Digests of cells, counts and labels, as JSON values; of labels also the number of cells of each.

    Parameters
    ----------
    columns
        Obs columns that training rests on.
    """
    keys = cell_keys(store)
    any_order = int(keys.sum(dtype=np.uint64))
    return {
        "cells": {"number": len(keys), "in_order": _digest(keys), "in_any_order": f"{any_order:016x}"},
        "labels": {name: _labels(store, name) for name in columns},
        "counts": {name: _counts(store, name) for name in store.schema.modalities},
    }


def _labels(store: Store, column: str) -> Labels:
    held = store.obs_column(column)
    # By name, so that the order of categories does not matter.
    names = np.append(hash_names(np.array(held.categories, dtype=np.str_)), np.uint64(0))
    numbers = np.bincount(held.codes + 1, minlength=len(names))[1:]
    cells = {name: int(number) for name, number in zip(held.categories, numbers, strict=True) if number}
    return {"in_order": _digest(names[held.codes]), "cells": cells}


def _counts(store: Store, modality: str) -> str:
    """Of the counts and of the cells that have the modality."""
    rows, matrix = store.modality_rows(modality), store.matrix(modality)
    parts = [b"" if rows is None else np.packbits(rows >= 0).tobytes()]
    checksum = store.schema.modalities[modality].counts_crc32c
    if checksum is not None:
        parts.append(checksum.encode())
    else:
        parts.append(matrix.lengths().astype(np.int64).tobytes())
        step = max(SAMPLED_ROWS, matrix.num_rows // SAMPLED_PLACES)
        for start in range(0, matrix.num_rows, step):
            held = matrix.read(start, min(matrix.num_rows, start + SAMPLED_ROWS))
            parts += [held.indices.astype(np.int64).tobytes(), held.values.astype(np.float64).tobytes()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _digest(array: npt.NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def differences(before: Contents, store: Store, features: Mapping[str, Sequence[str]]) -> list[str]:
    """In words, each part of a store that is not what it was.

    Parameters
    ----------
    before
        What `contents_of` gave.
    features
        Names of the features of each modality at that time.
    """
    now = contents_of(store, list(before["labels"]))
    found = [_of_features(name, own, store) for name, own in features.items()]
    if now["cells"] != before["cells"]:
        found.append(_of_cells(before["cells"], now["cells"]))
    else:
        # Where the cells differ all that follows them does.
        found += [_of_labels(name, was, now["labels"][name]) for name, was in before["labels"].items()]
        modalities = dict.fromkeys([*before["counts"], *now["counts"]])
        pairs = [(name, before["counts"].get(name), now["counts"].get(name)) for name in modalities]
        found += [_of_counts(name, was, is_now) for name, was, is_now in pairs]
    return [line for line in found if line]


def _of_features(modality: str, before: Sequence[str], store: Store) -> str:
    if modality not in store.schema.modalities:
        return ""  # which is told of its counts
    before, now = [*before], store.feature_names(modality).tolist()
    if before == now:
        return ""
    if len(before) != len(now):
        return f"features of {modality}: it has {len(now):,}, the run {len(before):,}"
    if sorted(before) == sorted(now):
        return f"features of {modality}: the same ones stand in another order"
    places = [place for place, (was, is_now) in enumerate(zip(before, now, strict=True)) if was != is_now]
    more = f", and {len(places) - 1:,} more" if len(places) > 1 else ""
    return f"features of {modality}: {now[places[0]]!r} stands where {before[places[0]]!r} stood{more}"


def _of_cells(before: Cells, now: Cells) -> str:
    if before["number"] != now["number"]:
        return f"cells: it has {now['number']:,}, the run {before['number']:,}"
    if before["in_any_order"] == now["in_any_order"]:
        return "cells: the same ones stand in another order"
    return "cells: it has others (the ids differ)"


def _of_labels(column: str, before: Labels, now: Labels) -> str:
    if before == now:
        return ""
    was, has = before["cells"], now["cells"]
    gone = {name: number for name, number in was.items() if name not in has}
    changed = {name: (was.get(name, 0), number) for name, number in has.items() if number != was.get(name, 0)}
    if not gone and not changed:
        return f"{column}: cells belong to others than they did; the number of cells of each is the same"
    if gone and len(changed) == 1:
        ((name, (old, new)),) = changed.items()
        merged = ", ".join(f"{label!r} ({number:,} cells)" for label, number in gone.items())
        return f"{column}: {merged} went into {name!r}, which had {old:,} cells and has {new:,}"
    changed |= {name: (number, 0) for name, number in gone.items()}
    moved = sum(max(0, new - old) for old, new in changed.values())
    listed = ", ".join(f"{name!r} has {new:,} cells and had {old:,}" for name, (old, new) in list(changed.items())[:4])
    return f"{column}: {moved:,} cells or more were relabelled ({listed}{', ...' if len(changed) > 4 else ''})"


def _of_counts(modality: str, before: str | None, now: str | None) -> str:
    if before == now:
        return ""
    if before is None or now is None:
        return (
            f"{modality}: it {'lacks it' if now is None else 'has it'}, the run {'has' if now is None else 'lacks'} it"
        )
    return f"counts of {modality} differ"
