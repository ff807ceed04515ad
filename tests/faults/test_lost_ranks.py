"""A rank that is killed, asleep or missing: the others name it, its machine and what it was last at, and all end."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loaders.durable import holding
from loaders.synthetic import simulate

TIMEOUT = 10.0
"""A start on a busy machine takes some seconds, too."""
ENDLESS = ("--batch-key", "sample", "--max-epochs", "100000", "--training.no-early-stopping", "--model.n-hidden", "8")
Ranks = list[subprocess.Popen[str]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "a.zarr"
    simulate(path, num_cells=300, num_genes=20, num_peaks=30, genes_per_cell=8, peaks_per_cell=8, num_samples=2)
    return path


@pytest.fixture
def start(store: Path, tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    """Start ranks as a scheduler does, without torchrun; nobody else ends them."""
    started: Ranks = []

    def begin(ranks: list[int], size: int, *options: str) -> Ranks:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        command = [sys.executable, "-m", "liam_scale.train", str(store), "--out", str(tmp_path / "run"), *ENDLESS]
        for rank in ranks:
            environment = {**os.environ, **address, "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
            started.append(
                subprocess.Popen(
                    [*command, "--timeout", str(TIMEOUT), *options],
                    env={**environment, "LOCAL_WORLD_SIZE": str(size)},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return started

    yield begin
    for process in started:
        with process:
            process.kill()


def wait_for(path: Path, ranks: Ranks) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        assert all(rank.poll() is None for rank in ranks), ranks[0].communicate()
        time.sleep(0.02)


def told(rank: subprocess.Popen[str]) -> str:
    """The one message on a rank's screen, with the connections' internals nowhere on it."""
    _, said = rank.communicate(timeout=60)
    assert rank.returncode == 1, said
    assert not re.search(r"gloo|nccl|Traceback|\.cc|c10d|TCPStore", said, re.IGNORECASE), said
    assert said.count("error: ") == 1
    return said


PHASE = r"(the update|reading the cells|the evaluation) after step \d+|making the model and reading the first cells"
"""A rank tells what it is at every second, and these start in less."""


@pytest.mark.parametrize("sleeper", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_sleeping_rank_is_named_within_the_timeout_and_no_orphan_holds_the_lock(
    start: Callable[..., Ranks], tmp_path: Path, sleeper: int
) -> None:
    ranks = start([0, 1], 2)
    wait_for(tmp_path / "run" / "history.csv", ranks)
    began = time.monotonic()
    ranks[sleeper].send_signal(signal.SIGSTOP)
    said = told(ranks[1 - sleeper])
    assert time.monotonic() - began < 2 * TIMEOUT + 5
    name = socket.gethostname()
    assert re.search(rf"rank {sleeper} on {name} has not gone on for 10 s; it was last at: ({PHASE})", said), said
    assert "--timeout gives more time" in said
    ranks[sleeper].kill()
    ranks[sleeper].wait()
    with holding(tmp_path / "run"):
        pass


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_is_named_by_the_other_at_once(start: Callable[..., Ranks], tmp_path: Path, victim: int) -> None:
    ranks = start([0, 1], 2, "--training.timeout-seconds", "600")
    wait_for(tmp_path / "run" / "history.csv", ranks)
    ranks[victim].kill()
    said = told(ranks[1 - victim])
    assert re.search(rf"rank {victim} on {socket.gethostname()} is gone; it was last at: ({PHASE})", said), said
    with holding(tmp_path / "run"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("missing", [1, 0])
def test_a_rank_that_never_comes_is_named(start: Callable[..., Ranks], tmp_path: Path, missing: int) -> None:
    [rank] = start([1 - missing], 2)
    assert f"rank {missing} has not come" in told(rank)
    with holding(tmp_path / "run"):
        pass
