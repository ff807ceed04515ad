"""Peaks of several sources matched by overlap: counts of what comes together add up, and what is lost is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from loaders.check import check_store
from loaders.ingest import append, ingest, merge
from loaders.stores import MatchedStore, open_store, read_store

ONE = ["chr1:100-200", "chr1:300-400", "chr2:100-200"]
OTHER = ["chr1:150-180", "chr1:190-320", "chr1:380-390", "chr2:500-600", "chr9:1-5"]


def source(path: Path, peaks: Sequence[str], *, genome: str | None = None) -> Path:
    """30 cells of counts up to 200, so that sums need a wider type."""
    counts = np.random.default_rng(len(peaks)).integers(0, 200, (30, len(peaks))).astype(np.float32)
    data = anndata.AnnData(scipy.sparse.csr_matrix(counts))
    data.obs_names, data.var_names = [f"{path.stem}{c}" for c in range(30)], list(peaks)
    if genome is not None:
        data.var["genome"] = genome
    data.write_h5ad(path)
    return path


def counts_of(path: Path, name: str) -> np.ndarray:
    """Counts of the cells of a source, in the order of the source, as a store holds them."""
    atac = read_store(path)["atac"]
    return atac[[f"{name}{c}" for c in range(30)]].X.toarray()


@pytest.fixture
def both(tmp_path: Path) -> list[Path]:
    return [source(tmp_path / "a.h5ad", ONE), source(tmp_path / "b.h5ad", OTHER)]


def test_peaks_of_a_reference_take_the_counts_of_those_that_overlap_them_most(
    both: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ingest(both, out=tmp_path / "s.zarr", peaks="reference")
    one, other = (anndata.read_h5ad(path).X.toarray() for path in both)
    assert open_store(tmp_path / "s.zarr").feature_names("atac").tolist() == ONE
    np.testing.assert_array_equal(counts_of(tmp_path / "s.zarr", "a"), one)
    # 190-320 shares 10 bases with 100-200 and 20 with 300-400.
    expected = np.stack([other[:, 0], other[:, 1] + other[:, 2], np.zeros(30)], axis=1)
    np.testing.assert_array_equal(counts_of(tmp_path / "s.zarr", "b"), expected)
    assert check_store(tmp_path / "s.zarr").is_sound
    said = capsys.readouterr().err
    assert "2 of 5 peaks overlap none of" in said
    assert "1 share one with another, and their counts are added up" in said


def test_overlapping_peaks_of_all_sources_are_one_in_their_union(both: list[Path], tmp_path: Path) -> None:
    ingest(both, out=tmp_path / "s.zarr", peaks="union", progress=False)
    one, other = (anndata.read_h5ad(path).X.toarray() for path in both)
    names = ["chr1:100-400", "chr2:100-200", "chr2:500-600", "chr9:1-5"]
    assert open_store(tmp_path / "s.zarr").feature_names("atac").tolist() == names
    zeros = np.zeros(30)
    expected = np.stack([one[:, 0] + one[:, 1], one[:, 2], zeros, zeros], axis=1)
    np.testing.assert_array_equal(counts_of(tmp_path / "s.zarr", "a"), expected)
    expected = np.stack([other[:, :3].sum(axis=1), zeros, other[:, 3], other[:, 4]], axis=1)
    np.testing.assert_array_equal(counts_of(tmp_path / "s.zarr", "b"), expected)


def test_the_reference_may_be_a_bed_file_or_a_store_to_which_cells_are_added(both: list[Path], tmp_path: Path) -> None:
    bed = tmp_path / "r.bed"
    bed.write_text("chr1\t0\t1000\nchr2\t0\t150\n")
    ingest(both[0], out=tmp_path / "bed.zarr", peaks=str(bed), progress=False)
    one, other = (anndata.read_h5ad(path).X.toarray() for path in both)
    expected = np.stack([one[:, 0] + one[:, 1], one[:, 2]], axis=1)
    np.testing.assert_array_equal(counts_of(tmp_path / "bed.zarr", "a"), expected)
    ingest(both[0], out=tmp_path / "s.zarr", progress=False)
    with pytest.raises(ValueError, match=r"lacks 3 of the 3 features of"):
        append(tmp_path / "s.zarr", both[1], progress=False)
    append(tmp_path / "s.zarr", both[1], peaks="reference", progress=False)
    expected = np.stack([other[:, 0], other[:, 1] + other[:, 2], np.zeros(30)], axis=1)
    np.testing.assert_array_equal(counts_of(tmp_path / "s.zarr", "b"), expected)
    np.testing.assert_array_equal(counts_of(tmp_path / "s.zarr", "a"), one)
    assert check_store(tmp_path / "s.zarr").is_sound


def test_other_modalities_are_matched_so_where_all_of_their_features_name_intervals(tmp_path: Path) -> None:
    files, kinds = [], ["h3k27ac=NM", "methylation=NM"]
    for name, peaks in (("a", ONE), ("b", OTHER)):
        marks = anndata.read_h5ad(source(tmp_path / f"{name}.h5ad", peaks))
        genes = anndata.AnnData(marks.X[:, :3], obs=marks.obs, var=pd.DataFrame(index=["GATA1", "CD4", f"of {name}"]))
        data = mudata.MuData({"h3k27ac": marks, "methylation": genes})
        files.append(tmp_path / f"{name}.h5mu")
        data.write_h5mu(files[-1])
    ingest(files, out=tmp_path / "s.zarr", peaks="reference", modality=kinds, progress=False)
    whole = open_store(tmp_path / "s.zarr")
    assert whole.feature_names("h3k27ac").tolist() == ONE
    assert whole.feature_names("methylation").tolist() == ["GATA1", "CD4"]
    other = anndata.read_h5ad(tmp_path / "b.h5ad").X.toarray()
    expected = np.stack([other[:, 0], other[:, 1] + other[:, 2], np.zeros(30)], axis=1)
    held = read_store(tmp_path / "s.zarr")["h3k27ac"][[f"b{c}" for c in range(30)]].X.toarray()
    np.testing.assert_array_equal(held, expected)

    ingest(files[0], out=tmp_path / "a.zarr", modality=kinds, progress=False)
    append(tmp_path / "a.zarr", files[1], peaks="reference", modality=kinds, join="outer", progress=False)
    grown = read_store(tmp_path / "a.zarr")["h3k27ac"][[f"b{c}" for c in range(30)]].X.toarray()
    np.testing.assert_array_equal(grown, expected)

    lacks = source(tmp_path / "other.h5ad", ONE)
    with pytest.raises(ValueError, match=r"peaks: .*other.h5ad has no h3k27ac; give a store that has, or a BED file"):
        ingest(files[0], out=tmp_path / "x.zarr", peaks=str(lacks), modality=kinds, progress=False)
    asked = {"h3k27ac": ONE, "methylation": ["CD4"]}
    matched = MatchedStore(open_store(files[1], modality=kinds), asked, by_overlap=True)
    np.testing.assert_array_equal(matched.matrix("h3k27ac").sums(), expected.sum(axis=1))
    with pytest.raises(ValueError, match=r"no feature in common .* or match peaks by overlap"):
        MatchedStore(open_store(files[1], modality=kinds), {"h3k27ac": ["chr7:1-2"]}, by_overlap=True)


@pytest.mark.parametrize(
    ("peaks", "genomes", "message"),
    [
        (
            ["chr7:1-9"],
            (None, None),
            r"peaks: no peak of .*b.h5ad overlaps one of those of .*a.h5ad .*chr7:1-9 and",
        ),
        (OTHER, ("GRCh38", "mm10"), r"peaks: .*b.h5ad is of the genome mm10, .*a.h5ad of GRCh38; lift one over"),
        (["peakA", *OTHER[1:]], (None, None), r"atac of .*b.h5ad: got a feature 'peakA'; peaks are named like"),
    ],
)
def test_cohorts_that_do_not_go_together_are_refused(
    tmp_path: Path, peaks: list[str], genomes: tuple[str | None, str | None], message: str
) -> None:
    one = source(tmp_path / "a.h5ad", ONE, genome=genomes[0])
    other = source(tmp_path / "b.h5ad", peaks, genome=genomes[1])
    with pytest.raises(ValueError, match=message):
        ingest([f"atac={one}", f"atac={other}"], out=tmp_path / "s.zarr", peaks="reference", progress=False)
    with pytest.raises(ValueError, match=r"peaks: got 'nowhere'; choose names, union or reference"):
        ingest(one, out=tmp_path / "s.zarr", peaks="nowhere", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5ad", "b.h5ad"]


@pytest.mark.parametrize("peaks", ["names", "union", "reference", "store"])
def test_sources_of_different_genomes_go_together_only_when_that_is_forced(tmp_path: Path, peaks: str) -> None:
    one = source(tmp_path / "a.h5ad", ONE, genome="GRCh38")
    other = source(tmp_path / "b.h5ad", ONE if peaks == "names" else OTHER, genome="hg38")
    ingest(f"atac={one}", out=tmp_path / "a.zarr", progress=False)
    given = [f"atac={path}" for path in ([other] if peaks == "store" else [one, other])]
    options = {"peaks": str(tmp_path / "a.zarr") if peaks == "store" else peaks, "progress": False}
    match = r"peaks: .*b.h5ad is of the genome hg38, .*a\.(h5ad|zarr) of GRCh38; lift one over, .*ignore_genome=True"
    with pytest.raises(ValueError, match=match):
        ingest(given, out=tmp_path / "s.zarr", **options)
    assert not list(tmp_path.glob("*s.zarr*"))
    ingest(given, out=tmp_path / "s.zarr", ignore_genome=True, **options)
    assert open_store(tmp_path / "s.zarr").schema.num_cells == 30 * len(given)


def test_a_store_grows_by_another_genome_only_when_that_is_forced(tmp_path: Path) -> None:
    for name, genome in (("a", "GRCh38"), ("b", "hg38")):
        file = source(tmp_path / f"{name}.h5ad", ONE, genome=genome)
        ingest(f"atac={file}", out=tmp_path / f"{name}.zarr", progress=False)
    match = r"peaks: .*b.(h5ad|zarr) is of the genome hg38, .*a.zarr of GRCh38; lift one over"
    stores, before = [tmp_path / "a.zarr", tmp_path / "b.zarr"], (tmp_path / "a.zarr" / "zarr.json").read_bytes()
    for peaks in ("names", "reference"):
        with pytest.raises(ValueError, match=match):
            append(tmp_path / "a.zarr", f"atac={tmp_path / 'b.h5ad'}", peaks=peaks, progress=False)
    with pytest.raises(ValueError, match=match):
        merge(stores, out=tmp_path / "m.zarr", progress=False)
    assert (tmp_path / "a.zarr" / "zarr.json").read_bytes() == before
    assert merge(stores, out=tmp_path / "m.zarr", ignore_genome=True, progress=False).num_cells == 60
    grown = append(tmp_path / "a.zarr", f"atac={tmp_path / 'b.h5ad'}", ignore_genome=True, progress=False)
    assert grown.parts == (30, 30)
