"""A rank that is killed, asleep or missing: the others name it, its machine and what it was last at, and all end."""

import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import Rank, start_ranks, wait_for

from loaders.durable import holding

TIMEOUT = 10.0
"""A start on a busy machine takes some seconds, too."""
ENDLESS = ("--batch-key", "sample", "--max-epochs", "100000", "--training.no-early-stopping", "--model.n-hidden", "8")


@pytest.fixture
def start(store: Path, tmp_path: Path) -> Iterator[Callable[..., list[Rank]]]:
    """Start ranks of a world of two; nobody else ends them."""
    started: list[Rank] = []

    def begin(ranks: list[int], *options: str) -> list[Rank]:
        arguments = [store, "--out", tmp_path / "run", *ENDLESS, "--timeout", TIMEOUT, *options]
        started.extend(start_ranks(arguments, 2, only=ranks))
        return started

    yield begin
    for rank in started:
        rank.kill()


def told(rank: Rank) -> str:
    """The one message on a rank's screen, with the connections' internals nowhere on it."""
    code, said = rank.ends()
    assert code == 1, said
    assert not re.search(r"gloo|nccl|Traceback|\.cc|c10d|TCPStore", said, re.IGNORECASE), said
    assert said.count("error: ") == 1
    return said


PHASE = (
    r"(the update|reading the cells|the evaluation) after step \d+"
    r"|joining the other ranks|laying down the folder of the run|making the model and reading the first cells"
)
"""A rank tells what it is at every second, and what comes before these takes less."""


@pytest.mark.parametrize("sleeper", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_sleeping_rank_is_named_within_the_timeout_and_no_orphan_holds_the_lock(
    start: Callable[..., list[Rank]], tmp_path: Path, sleeper: int
) -> None:
    ranks = start([0, 1])
    wait_for((tmp_path / "run" / "history.csv").exists, ranks)
    began = time.monotonic()
    ranks[sleeper].kill(signal.SIGSTOP)
    said = told(ranks[1 - sleeper])
    assert time.monotonic() - began < 2 * TIMEOUT + 5
    name = socket.gethostname()
    assert re.search(rf"rank {sleeper} on {name} has not gone on for 10 s; it was last at: ({PHASE})", said), said
    assert "--timeout gives more time" in said
    ranks[sleeper].kill()
    ranks[sleeper].ends()
    with holding(tmp_path / "run"):
        pass


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_is_named_by_the_other_at_once(
    start: Callable[..., list[Rank]], tmp_path: Path, victim: int
) -> None:
    ranks = start([0, 1], "--training.timeout-seconds", "600")
    wait_for((tmp_path / "run" / "history.csv").exists, ranks)
    ranks[victim].kill()
    said = told(ranks[1 - victim])
    assert re.search(rf"rank {victim} on {socket.gethostname()} is gone; it was last at: ({PHASE})", said), said
    with holding(tmp_path / "run"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("missing", [1, 0])
def test_a_rank_that_never_comes_is_named(start: Callable[..., list[Rank]], tmp_path: Path, missing: int) -> None:
    [rank] = start([1 - missing])
    assert f"rank {missing} has not come" in told(rank)
    with holding(tmp_path / "run"):
        pass
