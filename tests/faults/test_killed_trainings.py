"""Killed at random moments, from its first instant on, a training goes on with the same command to the same bytes."""

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from liam_scale.run import RunDirectory
from loaders.synthetic import simulate

OPTIONS = ("--batch-key", "sample", "--model.n-hidden", "8", "--n-latent", "3", "--minibatch", "32")
LENGTH = ("--max-steps", "150", "--training.checkpoint-steps", "3", "--loader.streams", "4")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "a.zarr"
    simulate(path, num_cells=300, num_genes=20, num_peaks=30, genes_per_cell=8, peaks_per_cell=8, num_samples=2)
    return path


def arguments(store: Path, out: Path, model: str) -> list[str]:
    return [str(store), "--out", str(out), "--model", model, *OPTIONS, *LENGTH]


def start(command: list[str], ranks: int) -> list[subprocess.Popen[bytes]]:
    """Ranks as a scheduler starts them: nobody ends the others when one is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    started = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **sizes, **address} if ranks > 1 else {}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "liam_scale.train", *command, "--timeout", "60"],
                env={**os.environ, **own},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        )
    return started


def reached(out: Path) -> dict[str, int]:
    """Step of the newest checkpoint of each part."""
    steps: dict[str, int] = {}
    for path in out.rglob("checkpoints/step-*"):
        part = str(path.parent)
        steps[part] = max(steps.get(part, 0), int(path.name[-9:]))
    return steps


def ends(ranks: list[subprocess.Popen[bytes]], victims: list[int], moment: float) -> list[int]:
    """Kill some ranks at a moment after their start; the codes with which all end."""
    deadline = time.monotonic() + moment
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(0.005)
    for victim in victims:
        ranks[victim].kill()
    for rank in ranks:
        _, said = rank.communicate(timeout=90)
        assert b"Traceback" not in said, said.decode()
    return [rank.returncode for rank in ranks]


def weights(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("model.safetensors"))}


def kill(store: Path, folder: Path, *, kills: int, ranks: int, model: str, seed: int, longest: float) -> int:
    """Train to the end again and again until there were so many kills; how many runs that took."""
    chance, done, runs = random.Random(seed), 0, 0
    straight = folder / "straight"
    assert set(ends(start(arguments(store, straight, model), ranks), [], 600)) == {0}
    while done < kills:
        out = folder / f"run{runs}"
        runs += 1
        while not (RunDirectory(out).is_run and RunDirectory(out).is_finished):
            before = reached(out)
            is_last = done >= kills
            victims = chance.choice([*([rank] for rank in range(ranks)), list(range(ranks))])
            moment = 600 if is_last else chance.uniform(0, longest)
            codes = ends(start(arguments(store, out, model), ranks), victims, moment)
            assert set(codes) <= {0, 1, -9}, codes
            assert not is_last or set(codes) == {0}
            done += -9 in codes
            after = reached(out)
            assert all(after[part] >= step for part, step in before.items()), "no checkpoint is lost"
        assert weights(out) == weights(straight)
        assert not [path for path in out.rglob(".*") if path.name.endswith(".partial")]
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "ranks", "kills", "longest"),
    [("concat", 1, 8, 6.0), ("bavae", 2, 60, 12.0), ("concat", 2, 20, 12.0), ("concat", 1, 20, 12.0)],
)
def test_kills_of_any_rank_or_all(
    store: Path,
    tmp_path: Path,
    model: str,
    ranks: int,
    kills: int,
    longest: float,
    record_property: Callable[[str, object], None],
) -> None:
    runs = kill(store, tmp_path, kills=kills, ranks=ranks, model=model, seed=kills, longest=longest)
    record_property("kills", kills)
    record_property("runs", runs)
