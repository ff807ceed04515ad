"""What systems lack: macOS does not tell a process's cores, Windows has no file locks either."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from identifying import identifying_store

from loaders.durable import lock
from loaders.sizing import default_threads, num_cores

WINDOWS = """
import os, sys
sys.modules["fcntl"] = None
for name in ("sched_getaffinity", "preadv", "memfd_create", "O_CLOEXEC"):
    delattr(os, name)
import liam_scale.api
from loaders import Loader, LoaderConfig, open_store
from loaders.ingest import ingest
for name in ("sched_getaffinity", "preadv", "memfd_create", "O_CLOEXEC"):
    assert not hasattr(os, name)
with Loader(open_store(sys.argv[1]), LoaderConfig(minibatch=64), subset="all") as loader:
    print(sum(len(minibatch.rows) for minibatch in loader))
print(ingest(sys.argv[1], out=sys.argv[2], progress=False).num_cells)
"""


def test_cores_are_those_of_the_machine_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert num_cores() == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert num_cores() == default_threads() == 1
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert default_threads() == 4


def test_a_lock_is_held_until_its_file_is_closed(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "wb") as first, open(tmp_path / "lock", "rb") as second:
        lock(first.fileno())
        with pytest.raises(BlockingIOError):
            lock(second.fileno(), wait=False)
        first.close()
        lock(second.fileno(), wait=False)


def test_a_system_without_posix_calls_imports_everything_reads_stores_and_makes_one(tmp_path: Path) -> None:
    identifying_store(tmp_path / "cells.zarr", num_cells=150, num_features={"rna": 40})
    command = [sys.executable, "-c", WINDOWS, str(tmp_path / "cells.zarr"), str(tmp_path / "again.zarr")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["150", "150"]
