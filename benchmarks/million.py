"""A million cells from simulation to metrics, killed on the way: a mosaic of 40 samples in the paper's shape.

    python benchmarks/million.py [--cells 1000000] [--epochs 3] [--ranks 2]
    python benchmarks/million.py --cells 500000 --paired --epochs 1 --kills 0 --only train

20 samples have RNA and ATAC, 10 only RNA, 10 only ATAC (13,431 genes, 116,490 peaks). All is done by the commands of
a user: `torchrun -m liam_scale.train`, all of whose processes are killed (SIGKILL) once in each of the first two epochs
and started again by the same command, then embed and evaluate. A process's memory is the peak that the kernel counts.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import ROOT, describe_machine, peak_rss_mb, table
from scale import size_of

MOSAIC = (("rna", "atac"), ("rna",), ("rna", "atac"), ("atac",))
"""Of samples 0, 1, 2, 3 and so on."""

TICK = os.sysconf("SC_CLK_TCK")


class Family:
    """A command and the processes that it starts: their peak memory (MB) and CPU seconds, looked at while they run."""

    def __init__(self, command: list[str]) -> None:
        # Torch and numba take as many threads as a rank's share of the cores, as for a user who sets nothing.
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(command, env=environment, start_new_session=True)
        self._peaks: dict[int, float] = {}
        self._seconds: dict[int, float] = {}
        self._start = time.perf_counter()

    def wait(self, enough: Callable[[], bool] = lambda: False) -> bool:
        """Whether the command ended by itself; else all of its processes were killed, because it was enough."""
        while self._process.poll() is None:
            if enough():
                os.killpg(self._process.pid, signal.SIGKILL)
                for pid in self._members():
                    # Ranks of torchrun are sessions of their own.
                    os.kill(pid, signal.SIGKILL)
                self._process.wait()
                return False
            self._look()
            time.sleep(0.5)
        if self._process.returncode:
            sys.exit(f"ended with code {self._process.returncode}: {self._process.args}")
        return True

    def _members(self) -> list[int]:
        parents = {}
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has just ended
                continue
        found = [self._process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found

    def _look(self) -> None:
        for pid in self._members():
            try:
                peak = peak_rss_mb(pid)
                times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except (OSError, StopIteration):  # it has just ended
                continue
            self._peaks[pid] = max(self._peaks.get(pid, 0.0), peak)
            self._seconds[pid] = (int(times[11]) + int(times[12])) / TICK

    def measured(self) -> dict[str, Any]:
        """Of the processes that do the work: torchrun itself has less than a third of a rank's memory."""
        wall = time.perf_counter() - self._start
        peak = max(self._peaks.values())
        return {
            "wall": wall,
            "cpu": sum(self._seconds.values()),
            "peak_rss_mb": [round(p) for p in self._peaks.values() if p > peak / 3],
        }


def run(command: list[str], **about: Any) -> dict[str, Any]:
    family = Family(command)
    family.wait()
    print(json.dumps({**about, **family.measured()}), flush=True)
    return family.measured()


def last_step(out: Path) -> int:
    return max((int(path.name.rpartition("-")[2]) for path in (out / "checkpoints").glob("step-*")), default=0)


def train(command: list[str], out: Path, steps: int, kills: int, interval: float) -> list[dict[str, Any]]:
    """The command until it ends by itself; killed some time after the first checkpoint past 0.3 of an epoch."""
    pieces = []
    for number in range(kills + 1):
        family, due = Family(command), float("inf")

        def enough(after: float = (number + 0.3) * steps, patience: float = interval * random.random() / 5) -> bool:
            nonlocal due
            if last_step(out) >= after:
                due = min(due, time.perf_counter() + patience)
            return time.perf_counter() >= due

        begun = last_step(out)
        ended = family.wait(enough) if number < kills else family.wait()
        found = {"piece": number, "from_step": begun, "checkpoint": last_step(out), "killed": not ended}
        pieces.append({**found, **family.measured()})
        print(json.dumps(pieces[-1]), flush=True)
        if ended:
            return pieces
    return pieces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--minibatch", type=int, default=1_024)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--checkpoint-seconds", type=float, default=300.0)
    parser.add_argument("--paired", action="store_true", help="all samples have RNA and ATAC")
    parser.add_argument("--only", choices=["simulate", "train"], help="end after that")
    parser.add_argument("--memory", default="512MiB", help="of the loader of a rank")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "liam-scale-benchmarks")
    options = parser.parse_args()
    describe_machine()
    options.folder.mkdir(parents=True, exist_ok=True)
    name = f"million-{options.cells}{'-paired' * options.paired}"
    store, out = options.folder / f"{name}.zarr", options.folder / f"{name}.run"
    if not store.exists():
        code = f"from loaders.synthetic import simulate; simulate({str(store)!r}, num_cells={options.cells}, "
        run(
            [sys.executable, "-c", f"{code}num_samples=40, mosaic={None if options.paired else MOSAIC})"],
            part="simulate",
        )
    if options.only == "simulate":
        return
    size = size_of(store)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={options.ranks}",
        "-m",
    ]
    command = [*torchrun, "liam_scale.train", str(store), "--batch-key", "sample", "--out", str(out)]
    command += ["--minibatch", str(options.minibatch), "--precision", "bf16", "--memory", options.memory]
    command += ["--max-epochs", str(options.epochs)]
    command += ["--training.checkpoint-seconds", str(options.checkpoint_seconds)]
    steps = options.cells // options.minibatch
    pieces = train(command, out, steps, options.kills, options.checkpoint_seconds)
    with (out / "history.csv").open() as file:
        history = list(csv.DictReader(file))
    after: list[tuple[str, str]] = []
    if options.only is None:
        embed = run([*torchrun, "liam_scale.embed", str(out)], part="embed")
        scores = [sys.executable, "-m", "liam_scale.cli", "evaluate", str(store), "--batch-key", "sample"]
        scores += ["--label-key", "cell_type", "--out", str(out / "evaluation")]
        evaluate = run(scores, part="evaluate")
        after = [
            ("embed", f"{embed['wall']:,.0f} s, {max(embed['peak_rss_mb']) / 1e3:.2f} GB a rank"),
            ("evaluate", f"{evaluate['wall']:,.0f} s, {max(evaluate['peak_rss_mb']) / 1e3:.2f} GB"),
        ]

    rows = [
        (
            f"epoch {row['epoch']}",
            f"{float(row['cells_per_second']):,.0f}",
            f"{float(row['waiting_share']):.2%}",
            f"{float(row['train_loss']):,.1f}",
            f"{float(row['validation_loss']):,.1f}",
        )
        for row in history
    ]
    print(table(("", "cells / s", "waiting for data", "training loss", "validation loss"), rows))
    hours, cpu = (sum(piece[what] for piece in pieces) / 3600 for what in ("wall", "cpu"))
    trained = len(history) * options.cells
    print(
        table(
            ("what", "measured"),
            [
                ("store", f"{size / 1e9:.2f} GB, {size / options.cells:,.0f} bytes a cell"),
                (
                    "training, kills included",
                    f"{hours:.2f} h, {cpu:.2f} CPU h, {3.6e9 * cpu / trained:,.0f} us a cell",
                ),
                ("peak RSS of a rank", f"{max(max(piece['peak_rss_mb']) for piece in pieces) / 1e3:.2f} GB"),
                *after,
                ("30 epochs, extrapolated", f"{30 / len(history) * hours:.1f} h"),
            ],
        )
    )


if __name__ == "__main__":
    main()
