"""The cells of all sources together: their samples, unique ids and obs columns."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from loaders.formats.frame import join_columns, take
from loaders.formats.source import Say, Source
from loaders.schema import BARCODE_COLUMNS, LONGEST_NAME, hash_names, is_folder_name

SAMPLE = "sample"
"""Obs column of the store that holds the sample."""

COUNTED = "total_counts"
"""Column of a modality's own obs that is counted anew from what is stored."""

_KEPT_SAMPLE = "source_sample"


def source_names(sources: Sequence[Source]) -> list[str]:
    """A short distinct name per source: the file's stem, or as many folders above it as tell the sources apart."""
    tails = [(*(part for part in source.paths[0].resolve().parent.parts), _stem(source.paths[0])) for source in sources]
    for depth in range(1, max(map(len, tails)) + 1):
        names = ["_".join(tail[-depth:]) for tail in tails]
        if len(set(names)) == len(names):
            break
    else:
        raise ValueError(f"sources: {_first_repeated(names)} is given twice; give every file once")
    if depth == 1:
        return names
    # What all have in common (outs/filtered_feature_bc_matrix) tells nothing.
    columns = [level for level in range(-depth, 0) if len({tail[level] for tail in tails}) > 1]
    short = ["_".join(tail[level] for level in columns) for tail in tails]
    return short if len(set(short)) == len(short) else names


_TENX_NAME = re.compile(r"_?(sample_)?(filtered|raw)_(feature|peak|gene)_bc_matri(x|ces)(_h5)?$")
_TENX_FOLDERS = ("outs", "count", "multi")
"""What Cell Ranger calls its files, and the folders it puts between a sample's own and the file."""


def _stem(path: Path) -> str:
    name = path.name
    for suffix in (".h5ad", ".h5mu", ".h5", ".zarr"):
        name = name.removesuffix(suffix)
    own = _TENX_NAME.sub("", name)
    folders = (folder.name for folder in path.resolve().parents if folder.name not in _TENX_FOLDERS)
    return own or next(folders, "") or path.name


def _first_repeated(names: Sequence[str]) -> str:
    return next(name for place, name in enumerate(names) if name in names[:place])


@dataclass(frozen=True)
class Cells:
    """All cells in the order of the sources.

    Attributes
    ----------
    ids
        (n,) unique ids as compact strings.
    sample
        (n,) categorical without missing values.
    sample_from
        Obs column the sample was taken from, or None where it is the source's name.
    starts
        (sources + 1,) first cell of each source.
    barcodes
        (n,) ids of the cells in their sources where `ids` had to be prefixed, else None.
    """

    ids: npt.NDArray[Any]
    sample: pd.Categorical
    sample_from: str | None
    starts: npt.NDArray[np.int64]
    barcodes: npt.NDArray[Any] | None = None

    @property
    def num_cells(self) -> int:
        return len(self.ids)


def _check_column_names(source: Source) -> None:
    """Refuse columns that cannot become folders before the first matrix is read, which may take hours."""
    tables = {"obs": source.obs.columns} | {f"{name}.var": part.var.columns for name, part in source.parts.items()}
    for table, columns in tables.items():
        for name in map(str, columns):
            if not is_folder_name(name):
                shown = name if len(name) <= 40 else f"{name[:40]}... ({len(name.encode())} bytes)"
                raise ValueError(
                    f"{source.label}: the column {shown!r} of {table} cannot be a folder of a store (no '/', no '..', "
                    f"not zarr.json, at most {LONGEST_NAME} bytes); rename or drop it in the source"
                )


def gather_cells(
    sources: Sequence[Source], sample_key: str | None, say: Say, *, sample_from_file: bool = False
) -> Cells:
    """Unique ids and the sample of every cell.

    Raises
    ------
    ValueError
        `sample_key` is in none or not in all of the sources, or has missing values; there are no cells; a column has a
        name that a store cannot hold.
    """
    if sample_from_file and sample_key is not None:
        raise ValueError(f"sample_from_file: got sample_key={sample_key!r} too; leave one of the two out")
    for source in sources:
        _check_column_names(source)
    names = source_names(sources)
    starts = np.cumsum([0, *(len(source.cell_ids) for source in sources)]).astype(np.int64)
    if not starts[-1]:
        raise ValueError(f"sources: got no cells in {', '.join(source.label for source in sources)}; give other files")
    unnamed = [source for source in sources if source.sample is None]
    if sample_key is None and not sample_from_file and any(SAMPLE in source.obs.columns for source in unnamed):
        sample_key = SAMPLE
        say(f"the obs column {SAMPLE!r} of the sources is the sample; another sample key changes that")
    own = [source.sample or name for source, name in zip(sources, names, strict=True)]
    if sample_key is None or not unnamed:
        sample_key = None
        sizes = [len(source.cell_ids) for source in sources]
        categories = list(dict.fromkeys(own))
        codes = np.repeat([categories.index(name) for name in own], sizes)
        sample = pd.Categorical.from_codes(codes, pd.Index(categories, dtype=object))
        say(
            f"sample = the name of the file: {', '.join(own)}; write NAME=FILE to name one, or give an obs "
            "column as the sample key"
        )
    else:
        sample = _sample_column(sources, sample_key)
    _check_look_alikes(sample.categories.tolist(), sample_key or "the names of the files", say)
    given = np.concatenate([source.cell_ids for source in sources])
    ids = _unique_ids(sources, given, names, say)
    return Cells(ids, sample, sample_key, starts, None if ids is given else given)


def _check_look_alikes(samples: Sequence[str], key: str, say: Say) -> None:
    """Refuse samples whose names nobody can tell apart; remark on one that another data set will hardly repeat."""
    seen: dict[str, str] = {}
    for name in map(str, samples):
        plain = " ".join(unicodedata.normalize("NFC", name).split())
        if plain in seen:
            raise ValueError(
                f"sample_key: {seen[plain]!r} and {name!r} of {key} differ only in blanks or in how unicode writes"
                f" them; give them one name in the sources, or take another column"
            )
        seen[plain] = name
        if plain != name:
            what = "blanks" if plain == " ".join(name.split()) else "letters in pieces (unicode NFD)"
            say(f"the sample {name!r} has {what} where {plain!r} has none; it is kept as it is")


def _sample_column(sources: Sequence[Source], key: str) -> pd.Categorical:
    parts: list[pd.Series] = []
    for source in sources:
        if source.sample is not None:
            parts.append(pd.Series(pd.Categorical([source.sample]).take(np.zeros(len(source.cell_ids), int))))
        elif key in source.obs.columns:
            parts.append(source.obs.column(key))
        else:
            raise ValueError(
                f"sample_key: {source.label} has no obs column {key!r}; it has "
                f"{', '.join(source.obs.columns) or 'none'}: name a column that all sources have, "
                f"the source's own sample by writing NAME={source.label}, or take the files' names with "
                "sample_from_file=True"
            )
    column = join_columns(parts)
    missing = column.isna().to_numpy()
    if missing.any():
        start = 0
        for source in sources:
            own = missing[start : start + len(source.cell_ids)]
            if own.any():
                cell = str(source.cell_ids[int(np.flatnonzero(own)[0])])
                raise ValueError(
                    f"sample_key: {key!r} of {source.label} is missing in {int(own.sum())} cells, for example "
                    f"{cell!r}; fill it in, remove the cells, or name another column"
                )
            start += len(source.cell_ids)
    if not isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(str)
    return pd.Categorical(column).remove_unused_categories()


def _unique_ids(sources: Sequence[Source], ids: npt.NDArray[Any], names: Sequence[str], say: Say) -> npt.NDArray[Any]:
    if len(sources) == 1:
        return ids
    hashes = _hash(ids)
    if len(np.unique(hashes)) == len(hashes):
        return ids
    strings = np.dtypes.StringDType()
    prefixed = [
        np.strings.add(np.full(len(source.cell_ids), f"{name}_", dtype=strings), source.cell_ids)
        for source, name in zip(sources, names, strict=True)
    ]
    collisions = len(hashes) - len(np.unique(hashes))
    say(
        f"{collisions} cell ids stand in more than one source: every id is prefixed by its source's name "
        f"({names[0]}_...), and the ids of the sources are kept in an obs column"
    )
    together = np.concatenate(prefixed)
    assert len(np.unique(_hash(together))) == len(together), "prefixed cell ids are not unique"
    return together


def _hash(ids: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """(n,) 64-bit hashes, piece by piece: a million cells collide with a probability of 3e-8."""
    pieces = [hash_names(ids[start : start + 100_000]) for start in range(0, len(ids), 100_000)]
    return np.concatenate([np.zeros(0, np.uint64), *pieces])


def obs_columns(
    sources: Sequence[Source], cells: Cells, order: npt.NDArray[np.int64], say: Say
) -> Iterator[tuple[str, Any]]:
    """The store's obs, one column at a time: `sample`, then those of the sources; order[i] is the cell at place i."""
    yield SAMPLE, pd.Categorical.from_codes(cells.sample.codes[order], cells.sample.categories)
    if cells.barcodes is not None:
        kept = BARCODE_COLUMNS[0 if any("barcode" in source.obs.columns for source in sources) else 1]
        yield kept, pd.Series(cells.barcodes[order].astype(object))
    apart = {name for source in sources for name in source.obs.disagreeing}
    if not any(source.obs.is_common(COUNTED) for source in sources):
        apart.add(COUNTED)
    for name in dict.fromkeys(name for source in sources for name in source.obs.columns):
        if name in apart or (name == SAMPLE and cells.sample_from == SAMPLE and all(s.sample is None for s in sources)):
            continue
        stored = name
        if name == SAMPLE:
            stored = _KEPT_SAMPLE
            kept = repr(cells.sample_from) if cells.sample_from else "the names of the files"
            say(f"the sources' obs column {SAMPLE!r} is kept as {stored!r}: {SAMPLE!r} holds {kept}")
        parts: list[pd.Series | int] = [
            source.obs.column(name) if name in source.obs.columns else len(source.cell_ids) for source in sources
        ]
        yield stored, take(join_columns(parts), order)


def modality_columns(
    sources: Sequence[Source], modality: str, order: npt.NDArray[np.int64]
) -> Iterator[tuple[str, Any]]:
    """Columns in which modalities disagree, for a modality's own obs; order[i] is the cell of its row i."""
    apart = dict.fromkeys(name for source in sources for name in sorted(source.obs.disagreeing))
    for name in apart:
        if name == COUNTED:
            continue
        parts: list[pd.Series | int] = []
        for source in sources:
            column = source.obs.modality_column(modality, name)
            parts.append(len(source.cell_ids) if column is None else column)
        if any(not isinstance(part, int) for part in parts):
            yield name, take(join_columns(parts), order)
