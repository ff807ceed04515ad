"""Peaks of several sources matched by the intervals that they are named after, not by name alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd

from loaders.formats.features import Joined, storable
from loaders.formats.root import HDF5_SUFFIXES
from loaders.formats.source import Say, unsaid
from loaders.ingest.sources import open_source, parse_source
from loaders.intervals import Intervals, intervals_of, read_bed, united
from loaders.schema import check_unique

NAMES, UNION, REFERENCE = "names", "union", "reference"


def check_peaks(peaks: str) -> None:
    """Refuse what is none of the ways to match peaks, and no path."""
    if peaks not in (NAMES, UNION, REFERENCE) and not Path(peaks).exists():
        raise ValueError(
            f"peaks: got {peaks!r}; choose {NAMES}, {UNION} or {REFERENCE} (the first source), or give a store or a BED"
            f" file that is there"
        )


def _reference(path: Path, modality: str) -> pd.DataFrame | None:
    """The peaks of a BED file, or of a store or file; None where that lacks the modality."""
    if path.is_dir() or path.suffix in HDF5_SUFFIXES:
        with ExitStack() as files:
            parts = open_source(parse_source(str(path)), layer=None, files=files, say=unsaid).parts
        return parts[modality].var if modality in parts else None
    names = pd.Index(read_bed(path, option="peaks").names(), dtype=object)
    check_unique(f"peaks: {path}", names, "leave one of them out")
    return pd.DataFrame(index=names)


def join_peaks(
    modality: str,
    sources: Sequence[tuple[str, pd.DataFrame]],
    peaks: str,
    say: Say,
    *,
    ignore_genome: bool = False,
) -> Joined | None:
    """Peaks of the store, and where those of each source go: to the one with which they share most bases.

    Parameters
    ----------
    sources
        Name of each source, for messages, and its var.
    peaks
        "union": overlapping peaks of all sources are one; "reference": those of the first source; or the path of
        a store or a BED file.
    ignore_genome
        Take peaks of a store that names another genome.

    Returns
    -------
    None where the store of `peaks` lacks the modality.

    Raises
    ------
    ValueError
        A peak that is not named after an interval; a store of another genome; a source of which no peak overlaps.
    """
    held = [intervals_of(var.index.astype(str).tolist(), f"{modality} of {where}") for where, var in sources]
    if peaks == UNION:
        var, what = pd.DataFrame(index=pd.Index(united(held).names(), dtype=object)), "those of the union"
    else:
        found = sources[0][1] if peaks == REFERENCE else _reference(Path(peaks), modality)
        if found is None:
            return None
        var = found
        what = f"those of {sources[0][0] if peaks == REFERENCE else peaks}"
        if not ignore_genome:
            check_genomes([(peaks, var), *sources])
    target = intervals_of(var.index.astype(str).tolist(), what)
    columns = []
    for number, ((where, _), own) in enumerate(zip(sources, held, strict=True)):
        # A reference need not be free of overlaps: each of its peaks is itself.
        is_itself = peaks == REFERENCE and number == 0
        column = np.arange(len(own)) if is_itself else own.best(target)
        columns.append(column)
        _tell(f"{modality} of {where}", what, own, target, column, say)
    return Joined(storable(var), tuple(columns))


def _tell(where: str, what: str, own: Intervals, target: Intervals, column: np.ndarray, say: Say) -> None:
    lost = int((column < 0).sum())
    if lost == len(own) and len(own):
        raise ValueError(
            f"peaks: no peak of {where} overlaps one of {what} (for example {own.names()[0]} and {target.names()[0]});"
            f" give data of the same genome, with the same names of chromosomes"
        )
    shared = len(own) - lost - len(np.unique(column[column >= 0]))
    if lost or shared:
        say(
            f"{where}: {lost:,} of {len(own):,} peaks overlap none of {what} and are left out; {shared:,} share one"
            f" with another, and their counts are added up"
        )


def check_genomes(sources: Sequence[tuple[str, pd.DataFrame]]) -> None:
    """Refuse sources that name different genomes, as 10x files do."""
    given = [(where, var["genome"].dropna().astype(str)) for where, var in sources if "genome" in var.columns]
    named = [(where, set(genomes) - {""}) for where, genomes in given if genomes.any()]
    for where, genomes in named[1:]:
        if not genomes & named[0][1]:
            raise ValueError(
                f"peaks: {where} is of the genome {', '.join(sorted(genomes))}, {named[0][0]} of"
                f" {', '.join(sorted(named[0][1]))}; lift one over, or if they are the same go on with"
                f" ignore_genome=True"
            )
