"""A look at a whole store finds whatever is wrong with it, and lists all of it."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import zarr
from anndata.io import write_elem

from loaders.check import Report, check_store
from loaders.ecosystem import quiet_anndata
from loaders.stores import open_store
from loaders.synthetic import simulate


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 cells, of which some lack a modality, with an embedding; RNA stands in two shards."""
    path = tmp_path_factory.mktemp("stores") / "a.zarr"
    sizes = {"num_genes": 600, "num_peaks": 50, "num_proteins": 6, "genes_per_cell": 300, "peaks_per_cell": 12}
    mosaic = [("rna", "atac", "adt"), ("rna", "adt"), ("atac",)]
    simulate(path, num_cells=400, num_samples=3, num_types=3, mosaic=mosaic, **sizes)
    values = np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    open_store(path).write_embedding("X_liam", values, {"liam_scale_run": "a-1"})
    return path


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store, tmp_path / "copy.zarr"))


def flip(file: Path, place: int, bit: int = 0) -> bytes:
    whole = file.read_bytes()
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
    return whole


def told(report: Report) -> list[str]:
    return [str(damage) for damage in report.damages]


def test_a_whole_store_is_sound_and_nothing_of_it_is_unchecked(store: Path) -> None:
    report = check_store(store)
    assert told(report) == []
    assert report.unchecked == []
    assert report.bytes > 50_000


@pytest.mark.parametrize("number", [20, pytest.param(1200, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found(copy: Path, number: int, record_property: Callable[[str, object], None]) -> None:
    files = sorted(file for file in copy.rglob("*") if file.is_file() and file.stat().st_size)
    draw, missed = np.random.default_rng(number), []
    for _ in range(number):
        file = files[int(draw.integers(len(files)))]
        place, bit = int(draw.integers(file.stat().st_size)), int(draw.integers(8))
        whole = flip(file, place, bit)
        if check_store(copy, threads=1).is_sound:
            missed.append((str(file.relative_to(copy)), place, bit, whole[max(0, place - 9) : place + 9]))
        file.write_bytes(whole)
    record_property("flips", number)
    assert missed == []


def test_every_lost_chunk_is_named(copy: Path, tmp_path: Path) -> None:
    chunks = [file for file in copy.rglob("*") if file.is_file() and "c" in file.relative_to(copy).parts]
    missed = []
    for file in chunks:
        hidden = file.rename(tmp_path / "hidden")
        array = str(file.relative_to(copy)).split("/c/")[0].removesuffix("/c")
        if array not in {damage.array for damage in check_store(copy, threads=1).damages}:
            missed.append(array)
        hidden.rename(file)
    assert len(chunks) > 40
    assert missed == []


def test_all_damages_are_listed_with_their_cells(copy: Path) -> None:
    counts, chunk = copy / "mod/rna/X/data/c/0", copy / "obsm/X_liam/c/0/0"
    flip(counts, 50)
    flip(counts, counts.stat().st_size - 2_000)
    (copy / "mod/adt/X/indptr/c/0").unlink()
    (copy / "obs/sample/codes/c/0").unlink()
    flip(chunk, 9)
    flip(copy / "mod/atac/X/data/c/0", 30)
    lines = "\n".join(told(check_store(copy)))
    for expected in (
        "mod/rna/X/data: chunk 0 (the cells 0 to ",
        "mod/rna/X/data: chunk 1 (the cells ",
        "mod/adt/X/indptr: chunk 0 (the cells 0 to ",
        "obs/sample/codes: chunk 0 (the cells 0 to 399): its file is missing",
        "obsm/X_liam: chunk 0/0 (the cells 0 to 399): its checksum is",
        "mod/atac/X/data: chunk 0",
    ):
        assert expected in lines, lines


def test_whole_chunks_in_the_place_of_others_are_found(copy: Path) -> None:
    shutil.copy(copy / "mod/rna/X/data/c/0", copy / "mod/rna/X/indices/c/0")
    assert any("mod/rna/X/indices: " in line for line in told(check_store(copy)))


def rewrite(store: Path, name: str, values: pd.Categorical) -> None:
    with quiet_anndata():
        write_elem(zarr.open_group(store, mode="r+")["obs"], name, values)


def test_a_column_of_another_program_is_said_to_be_unchecked_and_its_codes_are_looked_at(copy: Path) -> None:
    rewrite(copy, "sample", pd.Categorical(["x", "y"] * 200))
    report = check_store(copy)
    assert report.is_sound
    assert {finding.array for finding in report.unchecked} == {"obs/sample/codes", "obs/sample/categories"}
    zarr.open_group(copy, mode="r+")["obs/sample/codes"][7] = 5
    (damage,) = told(check_store(copy))
    assert damage == "obs/sample/codes: 1 codes name no category, the first that of cell 7: 5 of 2"


def test_an_embedding_that_is_not_finite_or_of_other_cells_is_found(copy: Path) -> None:
    values = np.zeros((400, 2), np.float32)
    values[5] = np.nan
    open_store(copy).write_embedding("X_bad", values)
    assert told(check_store(copy)) == ["obsm/X_bad: values of 1 cells are not finite, the first those of cell 5"]


def foreign() -> Iterator[tuple[str, anndata.AnnData]]:
    counts = scipy.sparse.csr_matrix(np.random.default_rng(0).poisson(1.0, (30, 8)).astype(np.float32))
    yield "sound", anndata.AnnData(counts)
    broken = counts.copy()
    broken.data[3] = np.nan
    yield "broken", anndata.AnnData(broken)


def test_of_a_file_of_others_all_is_read_and_what_cannot_be_known_is_said(tmp_path: Path) -> None:
    reports = {}
    for name, data in foreign():
        data.write_h5ad(tmp_path / f"{name}.h5ad")
        reports[name] = check_store(tmp_path / f"{name}.h5ad")
    assert reports["sound"].is_sound
    assert "without checksums" in str(reports["sound"].unchecked[0])
    assert told(reports["broken"]) == ["rna: values of the rows 0 to 29 are not all finite and at least 0"]


def test_where_there_is_no_store_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        check_store(tmp_path / "absent.zarr")
    with pytest.raises(ValueError, match="threads: got 0; give at least 1"):
        check_store(tmp_path, threads=0)
