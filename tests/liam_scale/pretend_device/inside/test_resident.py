"""Rows that stay on the pretend device: the minibatches of streaming bit for bit, read and sent once."""

import logging
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pretend
import pytest
import torch

import liam_scale
from liam_scale.training.trainer import Trainer
from loaders import Loader, LoaderConfig, device_rows, open_store
from loaders.formats.compressed import CompressedRows
from loaders.minibatch import Minibatch

OPTIONS = {"n_hidden": 16, "n_latent": 4, "minibatch": 64, "memory": "64MiB", "batch_key": "sample", "max_epochs": 3}
LAUNCHES = 8
"""Of the gather of one modality in a group of minibatches."""


def loader(path: Path, residence: str, **options: object) -> Loader:
    chosen = {"minibatch": 60, "memory": "8MiB", "streams": 4, "resident": residence, **options.pop("config", {})}
    fixed = {"sample": "sample", "transpose": False, "values": "stored", "device": pretend.DEVICE}
    return Loader(open_store(path), LoaderConfig(**chosen), **{**fixed, **options})


def tensors(minibatch: Minibatch) -> list[torch.Tensor]:
    counts = [getattr(c, f.name) for c in minibatch.counts.values() for f in fields(c)]
    held = [*counts, *minibatch.present.values(), minibatch.sample, minibatch.place, minibatch.rows]
    return [tensor for tensor in held if isinstance(tensor, torch.Tensor)]


def assert_same(found: list[Minibatch], expected: list[Minibatch]) -> None:
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.epoch, ours.step, ours.num_global) == (theirs.epoch, theirs.step, theirs.num_global)
        assert list(ours.counts) == list(theirs.counts)
        for a, b in zip(tensors(ours), tensors(theirs), strict=True):
            assert a.device == b.device == pretend.DEVICE
            assert a.dtype == b.dtype
            assert torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each window that is read from a store."""
    counted: list[int] = []
    prepare = CompressedRows.prepare

    def counting(matrix: CompressedRows, rows: np.ndarray) -> object:
        counted.extend([len(rows)] * bool(len(rows)))
        return prepare(matrix, rows)

    monkeypatch.setattr(CompressedRows, "prepare", counting)
    return counted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"values": "float32"},
        {"config": {"adt_transform": "none"}},
        {"modalities": ("atac",)},
        {"subset": "validation", "shuffle": False},
        {"subset": "all", "shuffle": False},
    ],
)
def test_epochs_are_those_of_streaming_and_only_the_first_is_read_and_sent(
    options: dict[str, object], trimodal: Path, reads: list[int]
) -> None:
    with loader(trimodal, "on", **dict(options)) as kept, loader(trimodal, "off", **dict(options)) as streamed:
        assert kept._on_device
        assert all(source.resident is None for source in kept._sources.values())
        sent = []
        for epoch in range(3):
            reads.clear()
            with pretend.noting(refuse_waits=True) as noted:
                found = list(kept)
            assert bool(reads) == (epoch == 0)
            sent.append(noted.copies["pinned"])
            assert set(noted.copies) == {"pinned", "to the device"}
            assert noted.copies["to the device"] <= len(found)
            if epoch > 0:
                assert noted.num_launches <= LAUNCHES * len(kept._outputs) * noted.copies["to the device"]
            assert_same(found, list(streamed))
        assert sent[1] == sent[2] < sent[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_keeps_what_other_ranks_had_before(rank: int, trimodal: Path, reads: list[int]) -> None:
    """Streams are dealt anew in each epoch: a minibatch holds rows that are there and rows that come."""
    options = {"rank": rank, "world": 2}
    with loader(trimodal, "on", **options) as kept, loader(trimodal, "off", **options) as streamed:
        rows = []
        for _ in range(4):
            reads.clear()
            found = list(kept)
            rows.append(sum(reads))
            assert_same(found, list(streamed))
        assert 0 < rows[1] < rows[0]
        assert rows[3] < rows[1]


def test_a_position_is_taken_up_exactly(trimodal: Path, reads: list[int]) -> None:
    """By one that holds nothing, from one that does, and the other way round."""
    with loader(trimodal, "on") as kept, loader(trimodal, "off") as streamed, loader(trimodal, "on") as again:
        list(kept)
        minibatches = iter(kept)
        for _ in range(3):
            next(minibatches)
        state = kept.state_dict()
        rest = [*minibatches, *kept]
        for other in (again, streamed):
            other.load_state_dict(state)
            assert_same([*other, *other], rest)
        reads.clear()
        kept.load_state_dict(state)
        assert_same([*kept, *kept], rest)
        assert not reads
        list(again)
        assert not reads


@pytest.mark.parametrize("options", [{"transpose": True}, {"config": {"balance": "cell_type"}}])
def test_what_does_not_stay_there_stays_on_the_host(options: dict[str, object], trimodal: Path) -> None:
    with loader(trimodal, "on", **dict(options)) as kept:
        assert not kept._on_device
        assert all(source.resident is not None for source in kept._sources.values())


@pytest.mark.parametrize(("residence", "free"), [("auto", 100_000), ("on", device_rows.SPARE)])
def test_what_has_no_room_there_stays_on_the_host_and_it_is_said(
    residence: str, free: int, trimodal: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device_rows, "free_bytes", lambda device: free)
    with caplog.at_level(logging.INFO), loader(trimodal, residence) as kept:
        assert not kept._on_device
        assert all(source.resident is not None for source in kept._sources.values())
    assert "do not stay on pretend:0" in caplog.text


def test_memory_that_is_not_given_is_said_and_training_streams(
    trimodal: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(device_rows, "DeviceRows", refuse)
    with loader(trimodal, "on") as kept:
        assert not kept._on_device
    assert caplog.text.count("do not stay on pretend:0") == 1


def test_where_memory_is_short_rows_are_streamed_again_and_it_is_said_once(
    trimodal: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reads: list[int]
) -> None:
    with loader(trimodal, "on") as kept, loader(trimodal, "off") as streamed:
        for epoch in range(4):
            if epoch == 2:
                monkeypatch.setattr(device_rows, "free_bytes", lambda device: device_rows.SPARE - 1)
            reads.clear()
            found = list(kept)
            assert bool(reads) == (epoch != 1)
            assert_same(found, list(streamed))
    (told,) = (record.message for record in caplog.records if record.levelno >= logging.WARNING)
    assert "streamed from here on" in told


def weights(run: liam_scale.Run) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in run.model().state_dict().values()])


@pytest.mark.parametrize("graph", ["off", "auto"])
def test_training_is_that_of_streaming_bit_for_bit(
    graph: str, trimodal: Path, tmp_path: Path, gpu: torch.device, steps: list[pretend.Noted], reads: list[int]
) -> None:
    options = {**OPTIONS, "graph": graph}
    streamed = liam_scale.train(trimodal, out=tmp_path / "streamed", **options)
    steps.clear(), reads.clear()
    liam_scale.train(trimodal, out=tmp_path / "once", resident="on", **{**options, "max_epochs": 1})
    once = sum(reads)
    kept = liam_scale.train(trimodal, out=tmp_path / "kept", resident="on", **options)
    assert sum(reads) == 2 * once
    assert not any(noted.waits or "pageable" in noted.copies for noted in steps)
    ours, theirs = (run.history.drop(columns=["cells_per_second", "waiting_share"]) for run in (kept, streamed))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    assert torch.equal(weights(kept), weights(streamed))


def test_training_goes_on_in_the_middle_of_an_epoch(trimodal: Path, tmp_path: Path, gpu: torch.device) -> None:
    whole = liam_scale.train(trimodal, out=tmp_path / "whole", **OPTIONS)
    steps = int(whole.history["step"].iloc[0])
    options = {**OPTIONS, "out": tmp_path / "run", "resident": "on"}
    liam_scale.train(trimodal, max_steps=steps + steps // 2, **options)
    assert torch.equal(weights(liam_scale.train(trimodal, **options)), weights(whole))


def test_a_step_from_rows_that_stay_waits_for_nothing(
    multiome: Path, tmp_path: Path, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gathers in between included."""
    noted: list[pretend.Noted] = []
    step, noting = Trainer.step, pretend.noting(refuse_waits=True)

    def watched(trainer: Trainer, minibatch: Minibatch) -> None:
        if (minibatch.epoch, minibatch.step) == (1, 1):
            noted.append(noting.__enter__())
        step(trainer, minibatch)
        if (minibatch.epoch, minibatch.step) == (1, 7):
            noting.__exit__(None, None, None)

    monkeypatch.setattr(Trainer, "step", watched)
    liam_scale.train(multiome, out=tmp_path / "run", resident="on", **OPTIONS)
    assert noted[0].num_launches > 1_000
    assert not noted[0].waits
