"""Genomic intervals: read from the names of peaks and from BED files, and which of them overlap."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from loaders.modalities import Kind

NAME = re.compile(r"^([\w.]+)[:\-_](\d+)[\-_](\d+)$")
"""How peaks are named: chr1:100-600, chr1-100-600, chr1_100_600."""


@dataclass(frozen=True)
class Intervals:
    """Half-open intervals, as BED has them.

    Attributes
    ----------
    chromosome
        (n,) names.
    start, end
        (n,) int64.
    """

    chromosome: npt.NDArray[np.object_]
    start: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.start)

    def names(self) -> list[str]:
        """As peaks are named, chr1:100-600."""
        parts = zip(self.chromosome, self.start.tolist(), self.end.tolist(), strict=True)
        return [f"{chromosome}:{start}-{end}" for chromosome, start, end in parts]

    def best(self, others: Intervals) -> npt.NDArray[np.int64]:
        """(n,) which of the others shares most bases with each, the first of several; -1 where none shares any."""
        found = np.full(len(self), -1, np.int64)
        for name, rows in _by_chromosome(self):
            order = np.flatnonzero(others.chromosome == name)
            order = order[np.argsort(others.start[order], kind="stable")]
            start, end = others.start[order], others.end[order]
            # Only those can overlap that begin before its end, from the first on that reaches beyond its start.
            stop = np.searchsorted(start, self.end[rows], side="left")
            first = np.searchsorted(np.maximum.accumulate(end), self.start[rows], side="right")
            most = np.zeros(len(rows), np.int64)
            for step in range(int((stop - first).max(initial=0))):
                place = np.flatnonzero(first + step < stop)
                other = (first + step)[place]
                shared = np.minimum(self.end[rows[place]], end[other]) - np.maximum(
                    self.start[rows[place]], start[other]
                )
                is_more = shared > most[place]
                most[place[is_more]] = shared[is_more]
                found[rows[place[is_more]]] = order[other[is_more]]
        return found

    def overlaps(self, others: Intervals) -> npt.NDArray[np.bool_]:
        """(n,) whether each shares a base with one of the others."""
        return self.best(others) >= 0


def _by_chromosome(intervals: Intervals) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """Names of chromosomes in the order of their appearance, and the intervals on each."""
    codes, names = pd.factorize(intervals.chromosome)
    for code, name in enumerate(names):
        yield str(name), np.flatnonzero(codes == code)


def united(parts: Sequence[Intervals]) -> Intervals:
    """The intervals of several sets, those that overlap made one; by chromosome and start."""
    whole = Intervals(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("chromosome", "start", "end"))
    )
    found = []
    for name, rows in _by_chromosome(whole):
        order = rows[np.argsort(whole.start[rows], kind="stable")]
        furthest = np.maximum.accumulate(whole.end[order])
        begins = np.flatnonzero(np.append(True, whole.start[order][1:] >= furthest[:-1]))
        ends = furthest[np.append(begins[1:] - 1, len(order) - 1)]
        found.append((np.full(len(begins), name, dtype=object), whole.start[order][begins], ends))
    return Intervals(*(np.concatenate(column) for column in zip(*found, strict=True)))


def are_peaks(modality: str, kind: Kind, *names: Iterable[str]) -> bool:
    """Whether features can be matched by the intervals that they are named after.

    ATAC is always taken so, and a peak that names none is then an error; of the other negative multinomials those are
    (histone marks, not methylation of genes) of which every feature names one.
    """
    return modality == "atac" or (kind.likelihood == "NM" and all(NAME.match(str(name)) for name in chain(*names)))


def intervals_of(names: Sequence[str], where: str) -> Intervals:
    """The intervals that peaks are named after; ValueError where one is not."""
    matches = [NAME.match(name) for name in names]
    if None in matches:
        raise ValueError(f"{where}: got a feature {names[matches.index(None)]!r}; peaks are named like chr1:100-600")
    parts = [match.groups() for match in matches if match is not None]
    chromosome = np.array([part[0] for part in parts], dtype=object)
    start, end = (np.array([int(part[place]) for part in parts], dtype=np.int64) for place in (1, 2))
    return Intervals(chromosome, start, end)


def read_bed(path: Path, *, option: str) -> Intervals:
    """The first three columns of a BED file, of which `#`, `track` and `browser` lines are none; .gz is unpacked."""
    try:
        table = pd.read_csv(path, sep="\t", header=None, usecols=[0, 1, 2], comment="#", dtype=str)
        is_interval = ~table[0].str.match(r"(track|browser)\b")
        chromosome, start, end = (table.loc[is_interval, column] for column in range(3))
        return Intervals(chromosome.to_numpy(object), start.to_numpy(np.int64), end.to_numpy(np.int64))
    except (OSError, ValueError, TypeError) as error:
        cure = "give chromosome, start and end in columns that tabs part"
        raise ValueError(f"{option}: {path} is no BED file that can be read ({error}); {cure}") from None
