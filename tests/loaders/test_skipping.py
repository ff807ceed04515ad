"""Cells of damaged chunks are left out of their minibatches where that is asked for, and nothing else changes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from loaders.formats.damage import Damaged
from loaders.loader import Loader
from loaders.minibatch import Minibatch
from loaders.options import LoaderConfig
from loaders.stores import open_store
from loaders.synthetic import simulate


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "a.zarr"
    sizes = {"num_genes": 600, "num_peaks": 80, "genes_per_cell": 20, "peaks_per_cell": 8}
    simulate(path, num_cells=900, num_samples=3, num_types=3, mosaic=[("rna", "atac"), ("rna",), ("atac",)], **sizes)
    return path


@pytest.fixture
def damaged(store: Path, tmp_path: Path) -> Path:
    """The store with a flipped bit in a chunk of RNA, and another in one of ATAC."""
    copy = Path(shutil.copytree(store, tmp_path / "copy.zarr"))
    for file, place in (("mod/rna/X/data/c/0", 60), ("mod/atac/X/indices/c/0", 2_000)):
        whole = (copy / file).read_bytes()
        (copy / file).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    return copy


def lost_cells(path: Path) -> set[int]:
    """Cells that cannot be read, found one by one."""
    opened, lost = open_store(path), set()
    for name in opened.schema.modalities:
        rows, matrix = opened.modality_rows(name), opened.matrix(name)
        assert rows is not None
        for cell in np.flatnonzero(rows >= 0):
            try:
                matrix.read(int(rows[cell]), int(rows[cell]) + 1)
            except Damaged:
                lost.add(int(cell))
    return lost


def epoch(path: Path, *, rank: int = 0, world: int = 1, step: int = 0, skip: bool = True) -> list[Minibatch]:
    config = LoaderConfig(minibatch=64, memory="64MiB", streams=4, threads=2)
    with Loader(open_store(path), config, sample="sample", rank=rank, world=world, skip_damaged=skip) as loader:
        loader.seek(1, step)
        return list(loader)


def test_the_cells_of_damaged_chunks_are_left_out_and_all_else_is_as_it_was(store: Path, damaged: Path) -> None:
    expected, lost = epoch(store, skip=False), lost_cells(damaged)
    assert 100 < len(lost) < 600
    found = epoch(damaged)
    assert len(found) == len(expected)
    for whole, part in zip(expected, found, strict=True):
        kept = torch.tensor([row not in lost for row in whole.rows.tolist()])
        assert part.rows.tolist() == whole.rows[kept].tolist()
        assert part.lost.tolist() == whole.rows[~kept].tolist()
        assert part.place.tolist() == whole.place[kept].tolist()
        assert part.sample.tolist() == whole.sample[kept].tolist()
        assert (part.step, part.num_global) == (whole.step, whole.num_global)
        for name, counts in part.counts.items():
            torch.testing.assert_close(counts.to_dense(), whole.counts[name].to_dense()[kept])
            by_feature = counts.map_tensors(torch.clone)
            assert by_feature.feature_indptr is not None
            assert int(by_feature.feature_indptr[-1]) == len(counts.values)


@pytest.mark.parametrize(("world", "step"), [(2, 0), (3, 5)])
def test_ranks_and_a_start_in_mid_epoch_leave_out_the_same_cells(damaged: Path, world: int, step: int) -> None:
    whole = epoch(damaged)[step:]
    shares = [epoch(damaged, rank=rank, world=world, step=step) for rank in range(world)]
    for number, minibatch in enumerate(whole):
        for of in ("lost", "rows"):
            found = torch.cat([getattr(share[number], of) for share in shares]).sort().values
            assert found.tolist() == getattr(minibatch, of).sort().values.tolist()


def test_without_being_asked_to_the_loader_stops(damaged: Path) -> None:
    with pytest.raises(Damaged, match="got damaged data: chunk"):
        epoch(damaged, skip=False)


def test_a_store_that_another_has_replaced_is_not_skipped_but_told(store: Path, tmp_path: Path) -> None:
    path, other = tmp_path / "s.zarr", tmp_path / "other.zarr"
    for copy in (path, other):
        shutil.copytree(store, copy)
    with Loader(open_store(path), LoaderConfig(minibatch=64), sample="sample", skip_damaged=True) as loader:
        path.rename(tmp_path / "old.zarr")
        other.rename(path)
        with pytest.raises(RuntimeError, match="another store has taken the place"):
            list(loader)
