"""Two ranks against one at the same global minibatch, through the training command, and what joins them takes.

    python benchmarks/ranks.py

The paper's shape, as in step.py.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import ROOT, describe_machine, quartiles, spread, table
from step import make_store

STEPS = 32
SHARED = "two ranks"


def timed_training(arguments: list[str]) -> None:
    """The training command with a clock around averaging and update; waiting for the other ranks counts."""
    from liam_scale.train import main as train
    from liam_scale.training.shared_adam import SharedAdam

    seconds: dict[str, list[float]] = {"average": [], "step": []}

    def clock(name: str) -> None:
        inner = getattr(SharedAdam, name)

        def timed(self: SharedAdam, *arguments: Any) -> Any:
            start = time.perf_counter()
            result = inner(self, *arguments)
            seconds[name].append(time.perf_counter() - start)
            return result

        setattr(SharedAdam, name, timed)

    for name in seconds:
        clock(name)
    code = train(arguments)
    if os.environ.get("RANK") == "0":
        # The first half is warming up.
        late = {name: 1e3 * statistics.mean(own[len(own) // 2 :]) for name, own in seconds.items() if own}
        (Path(arguments[arguments.index("--out") + 1]) / "clocks").write_text(json.dumps(late))
    sys.exit(code)


def train_command(store: Path, out: Path, *, ranks: int, minibatch: int, shard: bool = True) -> list[str]:
    command = [sys.executable, "-m", "liam_scale.train"]
    if ranks > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [__file__, "--serve"]
    command += [str(store), "--batch-key", "sample", "--max-steps", str(STEPS)]
    command += ["--out", str(out), "--minibatch", str(minibatch), "--training.validate-every", "8"]
    command += [] if shard else ["--optim.no-shard"]
    return [*command, "--loader.validation-share", "0", "--training.checkpoint-seconds", "1e9"]


def compare(store: Path, turns: int) -> None:
    """Two ranks of one thread against one, the same global minibatch, through the training command.

    Two processes that train on their own, side by side, show what of the difference to 2 is the machine's.
    """
    two_alone = "two processes on their own, minibatch 512 each"
    plans = {
        "one rank": [(1, 1024, True)],
        SHARED: [(2, 1024, True)],
        "two ranks, `--optim.no-shard`": [(2, 1024, False)],
        two_alone: [(1, 512, True), (1, 512, True)],
    }
    rates: dict[str, list[float]] = {name: [] for name in plans}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    clocks: dict[str, list[float]] = {"average": [], "step": []}
    for turn in range(turns):
        for place in range(len(plans)):
            name = list(plans)[(turn + place) % len(plans)]
            folder = Path(tempfile.mkdtemp())
            outs = [folder / str(k) for k in range(len(plans[name]))]
            commands = [
                train_command(store, out, ranks=ranks, minibatch=minibatch, shard=shard)
                for out, (ranks, minibatch, shard) in zip(outs, plans[name], strict=True)
            ]
            running = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for command in commands]
            codes = [process.wait() for process in running]
            if any(codes):
                raise RuntimeError(f"{name}: training failed")
            own = [[float(row["cells_per_second"]) for row in read_history(out)] for out in outs]
            # The first window compiles and fills the loader.
            rates[name] += [sum(window) for window in list(zip(*own, strict=True))[1:]]
            if name == SHARED:
                for what, milliseconds in json.loads((outs[0] / "clocks").read_text()).items():
                    clocks[what].append(milliseconds)
            shutil.rmtree(folder)
    one = quartiles(rates["one rank"])[0]
    rows = [(name, spread(own, 0), f"{quartiles(own)[0] / one:.2f}") for name, own in rates.items()]
    print("\nglobal minibatch 1,024, one thread a rank\n")
    print(table(("what", "cells / s", "x one rank"), rows))
    for what, milliseconds in clocks.items():
        print(f"\n{what} of two ranks: {spread(milliseconds)} ms a step")


def read_history(run: Path) -> list[dict[str, str]]:
    with (run / "history.csv").open() as file:
        return list(csv.DictReader(file))


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        timed_training(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "liam-scale-benchmarks")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    describe_machine()
    options.folder.mkdir(parents=True, exist_ok=True)
    compare(make_store(options.folder, options.cells), options.turns)


if __name__ == "__main__":
    main()
