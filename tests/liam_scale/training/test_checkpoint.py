"""Checkpoints are whole or not there, and damage is found before it is used."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from liam_scale.training.checkpoint import (
    Checkpoint,
    load_weights,
    newest_checkpoint,
    save_checkpoint,
    save_weights,
    taking_up,
    verify,
)


def make(step: int) -> Checkpoint:
    weights = {"w": torch.full((3, 2), float(step))}
    return Checkpoint({"model": weights, "optimizer": {"w/exp_avg": torch.ones(3)}, "best": weights}, {"step": step})


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(7), step=7)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.state == {"step": 7}
    assert torch.equal(found.tensors["model"]["w"], torch.full((3, 2), 7.0))
    assert set(found.tensors) == {"model", "optimizer", "best"}


def test_a_checkpoint_that_was_found_takes_no_memory_until_it_is_read(tmp_path: Path) -> None:
    """Four times the weights, held while training goes on, were a quarter of a rank's memory."""
    path = save_checkpoint(tmp_path, make(7), step=7)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    with pytest.raises(KeyError):
        found.tensors["model"]["another"]
    shutil.rmtree(path)
    state = {"at": {}, "sums": {}, "loader": {}, "cells_seen": 0, "history": []}
    told = r"step-000000007: cannot be read .* run the same command again"
    with pytest.raises(RuntimeError, match=told), taking_up(replace(found, state=state)) as (tensors, _):
        dict(tensors["model"])


def test_the_newest_are_kept_and_none_is_half_written(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, make(step), step=step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000003", "step-000000010"]


def test_without_checkpoints_there_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "absent") is None


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_to_itself(path: Path) -> None:
    """Reading fails as it does without permission, which root always has."""
    path.unlink()
    path.symlink_to(path.name)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flip": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "empty": lambda path: path.write_bytes(b""),
    "delete": Path.unlink,
    "folder": become_a_folder,
    "unreadable": link_to_itself,
}
FILES = ["model.safetensors", "optimizer.safetensors", "best.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_is_used(
    tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, make(1), step=1)
    DAMAGE[damage](save_checkpoint(tmp_path, make(2), step=2) / file)
    with pytest.raises(RuntimeError, match=file):
        verify(tmp_path / "step-000000002")
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.state == {"step": 1}
    assert file in caplog.text


@pytest.mark.parametrize("text", ["[]", "null", "{}", "7", '{"../model.safetensors": "0"}', '"model.safetensors"'])
def test_a_manifest_that_lists_nothing_is_not_believed(tmp_path: Path, text: str) -> None:
    save_checkpoint(tmp_path, make(1), step=1)
    (save_checkpoint(tmp_path, make(2), step=2) / "manifest.json").write_text(text)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.state == {"step": 1}


def test_a_state_that_is_no_table_is_skipped_though_its_hash_is_right(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(1), step=1)
    save_checkpoint(tmp_path, replace(make(2), state=[]), step=2)  # type: ignore[arg-type]
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.state == {"step": 1}


def test_a_file_in_the_place_of_a_checkpoint_is_skipped_and_overwritten(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(1), step=1)
    (tmp_path / "step-000000002").write_text("")
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.state == {"step": 1}
    verify(save_checkpoint(tmp_path, make(2), step=2))


def test_a_copy_that_the_user_made_is_neither_used_nor_removed(tmp_path: Path) -> None:
    shutil.copytree(save_checkpoint(tmp_path, make(1), step=1), tmp_path / "step-000000009.bak")
    for step in (2, 3):
        save_checkpoint(tmp_path, make(step), step=step, keep=1)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.state == {"step": 3}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000003", "step-000000009.bak"]


def test_a_sound_checkpoint_is_never_purged_for_a_damaged_one(tmp_path: Path) -> None:
    flip(save_checkpoint(tmp_path, make(40), step=40) / "optimizer.safetensors")
    save_checkpoint(tmp_path, make(36), step=36, keep=1)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.state == {"step": 36}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_as_many_sound_checkpoints_as_are_wanted_stay(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, make(step), step=step, keep=5)
    for step in (3, 5):
        flip(tmp_path / f"step-{step:09d}" / "model.safetensors")
    save_checkpoint(tmp_path, make(6), step=6, keep=keep)
    left = sorted(int(p.name[-9:]) for p in tmp_path.iterdir())
    assert left == {1: [6], 2: [4, 5, 6], 3: [2, 3, 4, 5, 6]}[keep]


def test_damage_everywhere_is_an_error_and_nothing_is_deleted(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make(1), step=1) / "model.safetensors"
    path.write_bytes(b"x")
    with pytest.raises(RuntimeError, match="none of the 1 checkpoints"):
        newest_checkpoint(tmp_path)
    assert path.exists()


def test_leftovers_of_a_killed_write_are_ignored_and_go_with_the_next(tmp_path: Path) -> None:
    leftover = tmp_path / ".step-000000002.x1234567.partial"
    leftover.mkdir()
    (leftover / "lock").touch()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, make(3), step=3)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000003"]


def test_a_full_disk_leaves_the_earlier_checkpoints_and_nothing_else(disk_of: Callable[[str], Path]) -> None:
    disk = disk_of("1m")
    save_checkpoint(disk, make(1), step=1)
    large = Checkpoint({"model": {"w": torch.zeros(2**19)}, "optimizer": {}}, {"step": 2})
    with pytest.raises(RuntimeError, match=r"writing .*step-000000002: disk full"):
        save_checkpoint(disk, large, step=2)
    assert [p.name for p in disk.iterdir()] == ["step-000000001"]


def test_a_folder_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="could not be written"):
        save_checkpoint(tmp_path / "file" / "checkpoints", make(1), step=1)


@pytest.mark.parametrize("damage", [d for d in DAMAGE if d != "delete"])
def test_damaged_weights_are_named(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "model.safetensors"
    weights = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}
    save_weights(file, weights)
    found = load_weights(file)
    assert {name: value.tolist() for name, value in found.items()} == {"w": [[0, 1, 2], [3, 4, 5]], "n": 3}
    DAMAGE[damage](file)
    with pytest.raises(RuntimeError, match=rf"weights {file}: .*run the training command again"):
        load_weights(file)


def test_no_flipped_bit_of_the_weights_is_silent(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_weights(file, {"w": torch.arange(3.0)})
    content = file.read_bytes()
    for byte in range(len(content)):
        file.write_bytes(content[:byte] + bytes([content[byte] ^ 1 << byte % 8]) + content[byte + 1 :])
        try:
            found = load_weights(file)
        except RuntimeError:
            continue
        assert list(found) == ["w"]
        assert found["w"].tolist() == [0, 1, 2]
