"""Genomic intervals: read from the names of peaks and from BED files, and which of them overlap."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

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

    def overlaps(self, others: Intervals) -> npt.NDArray[np.bool_]:
        """(n,) whether each overlaps one of the others by a base or more."""
        found = np.zeros(len(self), bool)
        for name, rows in pd.Series(self.chromosome).groupby(self.chromosome).indices.items():
            theirs = np.flatnonzero(others.chromosome == name)
            if not len(theirs):
                continue
            order = theirs[np.argsort(others.start[theirs], kind="stable")]
            # Of all that begin before an interval's end, the one that reaches furthest decides.
            furthest = np.maximum.accumulate(others.end[order])
            before = np.searchsorted(others.start[order], self.end[rows], side="left")
            found[rows] = (before > 0) & (furthest[np.maximum(before - 1, 0)] > self.start[rows])
        return found


def intervals_of(names: Sequence[str], where: str) -> Intervals:
    """The intervals that peaks are named after; ValueError where one is not."""
    matches = [NAME.match(name) for name in names]
    if None in matches:
        raise ValueError(f"{where}: got a feature {names[matches.index(None)]!r}; peaks are named like chr1:100-600")
    parts = [match.groups() for match in matches if match is not None]
    chromosome = np.array([part[0] for part in parts], dtype=object)
    start, end = (np.array([int(part[place]) for part in parts], dtype=np.int64) for place in (1, 2))
    return Intervals(chromosome, start, end)


def read_bed(path: Path) -> Intervals:
    """The first three columns of a BED file, of which `#`, `track` and `browser` lines are none; .gz is unpacked."""
    try:
        table = pd.read_csv(path, sep="\t", header=None, usecols=[0, 1, 2], comment="#", dtype=str)
        is_interval = ~table[0].str.match(r"(track|browser)\b")
        chromosome, start, end = (table.loc[is_interval, column] for column in range(3))
        return Intervals(chromosome.to_numpy(object), start.to_numpy(np.int64), end.to_numpy(np.int64))
    except (OSError, ValueError, TypeError) as error:
        cure = "give chromosome, start and end in columns that tabs part"
        raise ValueError(f"blacklist: {path} is no BED file that can be read ({error}); {cure}") from None
