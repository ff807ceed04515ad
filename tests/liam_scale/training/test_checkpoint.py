"""Checkpoints are whole or not there, and damage is found before it is used."""

from pathlib import Path

import pytest
import torch

from liam_scale.training.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    save_checkpoint,
    verify,
    write_text_atomically,
)


def make(step: int) -> Checkpoint:
    return Checkpoint(
        {"model": {"w": torch.full((3, 2), float(step))}, "optimizer": {"w/exp_avg": torch.ones(3)}}, {"step": step}
    )


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(7), step=7)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.state == {"step": 7}
    assert torch.equal(found.tensors["model"]["w"], torch.full((3, 2), 7.0))
    assert set(found.tensors) == {"model", "optimizer"}


def test_the_newest_are_kept_and_none_is_half_written(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, make(step), step=step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000003", "step-000000010"]


def test_without_checkpoints_there_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_is_used(
    tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, make(1), step=1)
    path = save_checkpoint(tmp_path, make(2), step=2) / file
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        content[-3] ^= 16
        path.write_bytes(content if damage == "flip" else content[:-5])
    with pytest.raises(RuntimeError, match=file):
        verify(tmp_path / "step-000000002")
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.state == {"step": 1}
    assert file in caplog.text


def test_damage_everywhere_is_an_error_and_nothing_is_deleted(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make(1), step=1) / "model.safetensors"
    path.write_bytes(b"x")
    with pytest.raises(RuntimeError, match="none of the 1 checkpoints"):
        newest_checkpoint(tmp_path)
    assert path.exists()


def test_leftovers_of_a_killed_write_are_ignored_and_replaced(tmp_path: Path) -> None:
    leftover = tmp_path / ".step-000000002.partial"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, make(1), step=1)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.state["step"] == 1
    save_checkpoint(tmp_path, make(2), step=2)
    assert not leftover.exists()


def test_a_folder_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="could not be written"):
        save_checkpoint(tmp_path / "file" / "checkpoints", make(1), step=1)


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "a.txt", "one")
    write_text_atomically(tmp_path / "a.txt", "two")
    assert (tmp_path / "a.txt").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
