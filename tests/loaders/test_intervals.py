"""Intervals: names of peaks, BED files, and overlaps against the definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loaders.intervals import Intervals, intervals_of, read_bed


def test_overlaps_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)

    def some(number: int) -> Intervals:
        start = rng.integers(0, 300, number)
        chromosome = np.array([f"chr{c}" for c in rng.integers(0, 3, number)], dtype=object)
        return Intervals(chromosome, start, start + rng.integers(1, 30, number))

    one, other = some(200), some(20)
    expected = [
        any(
            other.chromosome[j] == one.chromosome[i] and one.start[i] < other.end[j] and other.start[j] < one.end[i]
            for j in range(20)
        )
        for i in range(200)
    ]
    assert one.overlaps(other).tolist() == expected
    assert 0 < sum(expected) < 200


def test_names_and_bed_files_say_where_intervals_are(tmp_path: Path) -> None:
    peaks = intervals_of(["chr1:100-600", "chrX-5-9", "GL000.1_7_8"], "atac of a.zarr")
    assert peaks.chromosome.tolist() == ["chr1", "chrX", "GL000.1"]
    assert [*zip(peaks.start.tolist(), peaks.end.tolist(), strict=True)] == [(100, 600), (5, 9), (7, 8)]
    with pytest.raises(ValueError, match=r"atac of a.zarr: got a feature 'CD4'; peaks are named like chr1:100-600"):
        intervals_of(["chr1:1-2", "CD4"], "atac of a.zarr")
    bed = tmp_path / "a.bed"
    bed.write_text("#made by hand\ntrack name=x\t\t\nchr1\t599\t700\tHigh Signal\nchrX\t9\t12\tlow\n")
    assert peaks.overlaps(read_bed(bed, option="blacklist")).tolist() == [True, False, False]
    bed.write_text("no bed at all\n")
    with pytest.raises(ValueError, match=r"blacklist: .*a.bed is no BED file that can be read"):
        read_bed(bed, option="blacklist")
