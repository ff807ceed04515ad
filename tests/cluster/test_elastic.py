"""The elastic command of docs/running.md: a node comes, one is called back, one is lost, and training goes on."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest

from loaders.durable import Held, holding
from loaders.synthetic import simulate

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
MARK = "LIAM_TEST_NODE"
ENDLESS = "--max-epochs 100000 --training.no-early-stopping --model.n-hidden 8 --n-latent 3 --minibatch 32"
SOON = "--rdzv-conf=last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"


class Node:
    """A machine of its own, as far as a process can be one: what runs on it bears its mark."""

    def __init__(self, name: str, script: str, folder: Path) -> None:
        self.name, self.log = f"{folder}/{name}", folder / f"{name}.log"
        environment = {**os.environ, MARK: self.name, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        with self.log.open("wb") as log:
            command = ["bash", "-euo", "pipefail", "-c", script]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)

    def processes(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"{MARK}={self.name}\0".encode() in (path / "environ").read_bytes():
                    found.append(int(path.name))
        return found

    def lost(self) -> None:
        """As when its power fails: all at once, and without a word."""
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in self.processes():
                with suppress(ProcessLookupError):
                    os.kill(process, number)
        self.process.wait()

    def called_back(self) -> None:
        """As a spot instance is: torchrun is told, and has some seconds."""
        self.process.send_signal(signal.SIGTERM)

    def said(self, pattern: str) -> list[str]:
        return re.findall(pattern, self.log.read_text())


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Node]]:
    """Starts the script of the page on a node."""
    store = tmp_path / "a.zarr"
    simulate(store, num_cells=300, num_genes=20, num_peaks=30, genes_per_cell=8, peaks_per_cell=8, num_samples=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    page = (ROOT / "docs" / "running.md").read_text()
    [script] = re.findall(r"```bash\n([^`]*--nnodes=1:4.*?)```", page, flags=re.DOTALL)
    script = script.replace("node1:29500", f"{endpoint} {SOON}").replace("--nproc-per-node=4", "--nproc-per-node=1")
    script = script.replace("torchrun", "exec torchrun").replace("/shared/atlas.zarr", f"{store} {ENDLESS}")
    script = script.replace("/shared/runs/a", str(tmp_path / "run"))
    assert "/shared" not in script
    nodes: list[Node] = []

    def begin(name: str) -> Node:
        nodes.append(Node(name, script, tmp_path))
        return nodes[-1]

    yield begin
    for node in nodes:
        node.lost()


def is_free(run: Path) -> bool:
    with suppress(Held), holding(run):
        return True
    return False


def until(is_so: Callable[[], object], *nodes: Node) -> None:
    deadline = time.monotonic() + 200
    while not is_so():
        assert time.monotonic() < deadline, "\n".join(node.log.read_text() for node in nodes)
        time.sleep(0.2)


def test_nodes_come_are_called_back_and_are_lost_while_training_goes_on(
    start: Callable[[str], Node], tmp_path: Path
) -> None:
    run, nodes = tmp_path / "run", []

    def said(pattern: str) -> list[str]:
        """By any node, as rank 0 may be on each."""
        return [found for node in nodes for found in node.said(pattern)]

    def goes_on(alone: int, together: int) -> None:
        """There were so many starts of one and of two ranks, and epochs are trained since."""
        until(
            lambda: (len(said(r"device .*, 1 rank,")), len(said(r"device .*, 2 ranks "))) == (alone, together), *nodes
        )
        before = epochs()
        until(lambda: epochs() > before, *nodes)

    def epochs() -> int:
        return len(pd.read_csv(run / "history.csv")) if (run / "history.csv").exists() else 0

    nodes.append(start("first"))
    goes_on(1, 0)
    nodes.append(start("second"))
    goes_on(1, 1)
    nodes[1].called_back()
    assert nodes[1].process.wait(60) != 0
    goes_on(2, 1)
    nodes.append(start("third"))
    goes_on(2, 2)
    saved, resumed = said(r"stopped at .*? step ([\d,]+);"), said(r"resuming .* step ([\d,]+)")
    assert sorted(saved) == sorted(resumed), "what was trained before a node came or was called back is not done again"
    nodes[2].lost()
    goes_on(3, 2)
    [phase] = nodes[0].said("error: ranks: rank [01] on [^ ]+ is gone; it was last at: ([^;]+);")
    assert phase != "joining the other ranks", "it counted fewer starts than the first, which heard of it all the same"
    assert nodes[0].process.poll() is None
    nodes[0].lost()
    assert pd.read_csv(run / "history.csv")["epoch"].tolist() == list(range(epochs()))
    until(lambda: is_free(run), *nodes)
