"""Rows that stay in memory give the minibatches that are streamed, bit for bit, without reading."""

import logging
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from loaders import Loader, LoaderConfig, open_store, resident
from loaders.formats.compressed import CompressedRows
from loaders.minibatch import Minibatch
from loaders.synthetic import simulate

SIZES = {"num_genes": 50, "num_peaks": 90, "num_proteins": 8, "genes_per_cell": 15, "peaks_per_cell": 20}


@pytest.fixture(scope="module")
def mosaic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "mosaic.zarr"
    modalities = [("rna", "atac", "adt"), ("rna", "adt"), ("atac",)]
    simulate(path, num_cells=500, num_samples=3, num_types=3, mosaic=modalities, **SIZES)
    return path


def loader(path: Path, residence: str, **options: object) -> Loader:
    chosen = {"minibatch": 60, "memory": "8MiB", "streams": 4, "resident": residence}
    config = LoaderConfig(**{**chosen, **options.pop("config", {})})
    return Loader(open_store(path), config, sample="sample", **options)


def tensors(minibatch: Minibatch) -> list[torch.Tensor]:
    counts = [getattr(c, f.name) for c in minibatch.counts.values() for f in fields(c)]
    held = [*counts, *minibatch.present.values(), minibatch.sample, minibatch.place, minibatch.rows]
    return [tensor for tensor in held if isinstance(tensor, torch.Tensor)]


def assert_same(found: list[Minibatch], expected: list[Minibatch]) -> None:
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.epoch, ours.step, ours.num_global) == (theirs.epoch, theirs.step, theirs.num_global)
        for a, b in zip(tensors(ours), tensors(theirs), strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each window that is read from a store."""
    counted: list[int] = []
    prepare = CompressedRows.prepare

    def counting(matrix: CompressedRows, rows: np.ndarray) -> object:
        counted.append(len(rows))
        return prepare(matrix, rows)

    monkeypatch.setattr(CompressedRows, "prepare", counting)
    return counted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"transpose": False, "values": "stored"},
        {"config": {"balance": "cell_type"}},
        {"subset": "validation", "shuffle": False},
        {"rank": 1, "world": 3},
    ],
)
def test_epochs_are_those_of_streaming(options: dict[str, object], mosaic: Path, reads: list[int]) -> None:
    with loader(mosaic, "on", **dict(options)) as kept, loader(mosaic, "off", **dict(options)) as streamed:
        for epoch in range(3):
            before = len(reads)
            found = list(kept)
            has_read = len(reads) > before
            assert_same(found, list(streamed))
            assert has_read or epoch > 0
            if options.get("world", 1) == 1 and "config" not in options:
                assert has_read == (epoch == 0)


def test_a_position_is_taken_up_exactly(mosaic: Path) -> None:
    """By one that holds no rows, from one that does, and the other way round."""
    with loader(mosaic, "on") as kept, loader(mosaic, "off") as streamed:
        list(kept)
        minibatches = iter(kept)
        for _ in range(3):
            next(minibatches)
        state = kept.state_dict()
        rest = [*minibatches, *kept]
        with loader(mosaic, "on") as again:
            for other in (again, streamed):
                other.load_state_dict(state)
                assert_same([*other, *other], rest)
        kept.load_state_dict(state)
        assert_same([*kept, *kept], rest)


def test_where_memory_is_short_rows_are_streamed_again_and_it_is_said(
    mosaic: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reads: list[int]
) -> None:
    free = iter([resident.SPARE * 2] * 5)
    monkeypatch.setattr(resident, "available_memory", lambda: next(free, resident.SPARE - 1))
    with loader(mosaic, "on") as kept, loader(mosaic, "off") as streamed, caplog.at_level(logging.WARNING):
        for _ in range(3):
            before = len(reads)
            found = list(kept)
            assert len(reads) > before
            assert_same(found, list(streamed))
    told = [record.message for record in caplog.records]
    assert len(told) == 3
    assert all("streamed from here on" in message for message in told)


def test_auto_keeps_what_takes_half_of_the_free_memory(
    mosaic: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reads: list[int]
) -> None:
    for free, is_kept in ((1 << 40, True), (20_000, False)):
        monkeypatch.setattr(resident, "available_memory", lambda free=free: free)
        with caplog.at_level(logging.INFO), loader(mosaic, "auto") as kept:
            list(kept)
            before = len(reads)
            list(kept)
        assert (len(reads) == before) == is_kept
    assert "more than half of the free memory" in caplog.text
