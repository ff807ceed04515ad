"""A file or folder is the old one or the new one, whatever happens while it is written."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loaders import durable
from loaders.durable import Staging, holding, remove_leftovers, replacing, write_text

ROOT = Path(__file__).resolve().parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make(path: Path, kind: str, text: str) -> None:
    if kind == "folder":
        path.mkdir()
        path = path / "inside"
    path.write_text(text)


def content(path: Path) -> str:
    return (path / "inside" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("can_exchange", [True, False])
def test_the_new_replaces_the_old_whole(
    tmp_path: Path, kind: str, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(durable, "_exchange", lambda one, other: False)
    for text in ("one", "two"):
        with replacing(tmp_path / "a") as path:
            make(path, kind, text)
        assert content(tmp_path / "a") == text
        assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_leaves_the_old_and_nothing_else(tmp_path: Path, kind: str) -> None:
    with replacing(tmp_path / "a") as path:
        make(path, kind, "old")

    def fail() -> None:
        with replacing(tmp_path / "a") as path:
            make(path, kind, "new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert content(tmp_path / "a") == "old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "fill",
    [lambda path: path.write_bytes(bytes(2**21)), lambda path: save_file({"w": torch.zeros(2**19)}, path)],
    ids=["python", "safetensors"],
)
def test_a_full_disk_is_said_with_the_path_and_the_old_file_stays(
    disk_of: Callable[[str], Path], fill: Callable[[Path], None]
) -> None:
    disk = disk_of("1m")
    write_text(disk / "a", "old")

    def overfill() -> None:
        with replacing(disk / "a") as path:
            fill(path)

    with pytest.raises(RuntimeError, match=rf"writing {disk}/a: disk full.*0.00 GB free.*same command again"):
        overfill()
    assert (disk / "a").read_text() == "old"
    assert names(disk) == ["a"]


def test_a_disk_on_which_not_even_the_lock_has_room_keeps_nothing_of_it(disk_of: Callable[[str], Path]) -> None:
    disk = disk_of("1m")
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free)
    with pytest.raises(RuntimeError, match=rf"writing {disk}/a: disk full"):
        write_text(disk / "a", "new")
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_a_folder_that_cannot_be_written_is_said_in_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match=r"writing .*file/a: could not be written .*File exists"):
        write_text(tmp_path / "file" / "a", "text")


def test_files_are_for_those_whom_the_umask_lets_in(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "weights") as path:
            save_file({"w": torch.zeros(3)}, path)
    finally:
        os.umask(before)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o640


def run_and_die(tmp_path: Path, body: str) -> None:
    """Run lines with the module alone, in a process that ends without cleaning up."""
    # The package without its face, which would import torch and zarr.
    script = (
        "import os, sys, types\nfrom pathlib import Path\nsys.modules['loaders'] = types.ModuleType('loaders')\n"
        f"sys.modules['loaders'].__path__ = ['{ROOT}/loaders']\nfrom loaders import durable\n"
    )
    done = subprocess.run([sys.executable, "-c", script + body, str(tmp_path / "a")], check=False)
    assert done.returncode == 9


def test_what_a_killed_process_left_goes_with_the_next_write_and_the_living_keep_theirs(tmp_path: Path) -> None:
    run_and_die(tmp_path, "with durable.replacing(Path(sys.argv[1])) as path:\n    path.touch()\n    os._exit(9)")
    (dead,) = tmp_path.iterdir()
    living = Staging(tmp_path / "a")
    assert not dead.exists()
    assert remove_leftovers(tmp_path / "a") == []
    assert names(tmp_path) == [living.folder.name]
    living.discard()
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["a", "*"])
def test_a_kill_between_two_renames_never_loses_the_old(tmp_path: Path, name: str) -> None:
    """Where a file system cannot exchange two folders in one step."""
    make(tmp_path / "a", "folder", "old")
    run_and_die(
        tmp_path,
        "durable._exchange = lambda one, other: False\nrename, count = os.rename, iter(range(9))\n"
        "os.rename = lambda *paths: os._exit(9) if next(count) == 1 else rename(*paths)\n"
        "with durable.replacing(Path(sys.argv[1])) as path:\n    path.mkdir()",
    )
    assert not (tmp_path / "a").exists()
    remove_leftovers(tmp_path / name)
    assert content(tmp_path / "a") == "old"
    assert names(tmp_path) == ["a"]


def test_a_folder_killed_before_it_was_locked_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".a.x1234567.partial").mkdir()
    write_text(tmp_path / "a", "new")
    assert names(tmp_path) == ["a"]


def test_a_folder_killed_while_it_was_removed_goes_with_the_next_write(tmp_path: Path) -> None:
    """Of what is in it the lock may be gone first."""
    leftover = tmp_path / ".a.x1234567.partial"
    (leftover / "spill").mkdir(parents=True)
    (leftover / "spill" / "plan.json").touch()
    write_text(tmp_path / "a", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_of_two_that_write_one_thing_the_second_says_who_is_at_it(tmp_path: Path) -> None:
    with holding(tmp_path / "a"):
        with holding(tmp_path / "b"):
            pass
        with pytest.raises(RuntimeError, match=rf"/a: process {os.getpid()} on .* since 20"), holding(tmp_path / "a"):
            pass
    with holding(tmp_path / "a"):
        pass
    assert names(tmp_path) == []
