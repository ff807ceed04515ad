"""An ingest by the workers of a Dask cluster is the ingest of threads, byte by byte; and what is lost is done again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loaders.ingest import ingest

distributed = pytest.importorskip("distributed")

ROOT = Path(__file__).resolve().parents[3]

OPTIONS: dict[str, Any] = {"memory": "32MiB", "progress": False, "sample_key": "donor"}

pytestmark = [
    # Of its own sockets and event loops, when a worker is killed.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Two worker processes of a thread each."""
    options = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": 0, "dashboard_address": ":0"}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        yield client


def test_the_bytes_are_those_of_threads_whoever_does_the_work(
    sources: list[str], expected: dict[str, bytes], bytes_of: Any, tmp_path: Path, client: Any
) -> None:
    ingest(sources, out=tmp_path / "two.zarr", client=client, **OPTIONS)
    assert bytes_of(tmp_path / "two.zarr") == expected
    # The tasks of another number of processes and of another memory are cut otherwise.
    ingest(sources, out=tmp_path / "one.zarr", dask="local:1", **{**OPTIONS, "memory": "64MiB"})
    assert bytes_of(tmp_path / "one.zarr") == expected


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_costs_its_task_alone(
    sources: list[str], expected: dict[str, bytes], bytes_of: Any, tmp_path: Path, client: Any
) -> None:
    killed = []

    def kill_one_at_work() -> None:
        while not killed:
            # A folder of a task that is not done: somebody writes it.
            if list(tmp_path.glob(".o.zarr.ingest-*/spill/.task-*")):
                killed.append(next(iter(client.run(os.getpid).values())))
                os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.002)

    watch = threading.Thread(target=kill_one_at_work, daemon=True)
    watch.start()
    ingest(sources, out=tmp_path / "o.zarr", client=client, **OPTIONS)
    watch.join(5)
    assert killed
    assert bytes_of(tmp_path / "o.zarr") == expected


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dask": "slurm"}, ValueError, r"dask: got 'slurm'; give the address of a scheduler, for example tcp://"),
        ({"dask": "local:0"}, ValueError, r"dask: got 'local:0'; give the address"),
        ({"dask": "local:2", "client": 3}, ValueError, r"dask: got dask='local:2' and a client; leave one"),
        ({"client": 3}, ValueError, r"client: got int; give a dask.distributed.Client"),
    ],
)
def test_what_cannot_be_a_cluster_is_refused(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ingest("a.h5mu", out=tmp_path / "o.zarr", **options)
    assert not list(tmp_path.iterdir())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_a_scheduler_that_is_not_there_or_of_another_version_is_named(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loaders.ingest.workers._SECONDS_TO_CONNECT", 2)
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    with pytest.raises(RuntimeError, match=rf"dask: no scheduler answers at {address} \(.*start one"):
        ingest(sources, out=tmp_path / "o.zarr", dask=address, **OPTIONS)
    # A scheduler of its own process, which is what it says but for the number.
    program = (
        "import asyncio, sys, distributed; distributed.__version__ = '2020.1.0'\n"
        "async def main():\n"
        f"    async with distributed.Scheduler(port={port}, host='127.0.0.1', dashboard=False) as s:\n"
        "        print('up', flush=True); await s.finished()\n"
        "asyncio.run(main())"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        monkeypatch.setattr("loaders.ingest.workers._SECONDS_TO_CONNECT", 30)
        with pytest.raises(
            RuntimeError,
            match=r"dask: got distributed 2020.1.0 \(Python .* of the scheduler at tcp.*, expected",
        ):
            ingest(sources, out=tmp_path / "o.zarr", dask=address, **OPTIONS)
    finally:
        process.kill()
        process.communicate()
    assert not list(tmp_path.iterdir())
