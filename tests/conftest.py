"""What all tests share."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import mudata
import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small products gain nothing from threads, and sums keep one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _mudata_of_tomorrow() -> None:
    """mudata warns on every object made until its coming default is chosen."""
    mudata.set_options(pull_on_update=False)


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes disks of a size ("3m"), to be filled up; skips where none can be mounted."""
    disks: list[Path] = []

    def mount(size: str) -> Path:
        disk = tmp_path / f"disk{len(disks)}"
        disk.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
        disks.append(disk)
        return disk

    yield mount
    for disk in disks:
        subprocess.run(["umount", str(disk)], check=True)
