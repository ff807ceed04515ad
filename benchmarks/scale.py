"""Memory and speed as the store grows: 100 training steps at the paper's shape on 20,000 and 200,000 cells.

    python benchmarks/scale.py [--cells 20000 200000]

Peak RSS is that of the whole training process (interpreter, model, optimizer, loader), as the kernel counts it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import ROOT, describe_machine, table


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def train(store: Path, steps: int, memory: str) -> dict[str, float]:
    """Peak memory, speed and waiting of a run of the training command."""
    out = Path(tempfile.mkdtemp()) / "run"
    arguments = [str(store), "--batch-key", "sample", "--out", str(out), "--max-steps", str(steps), "--memory", memory]
    # The last row leaves out the first half: imports, compilation, first windows.
    arguments += ["--training.validate-every", str(steps // 2), "--loader.validation-share", "0"]
    program = (
        "import json, sys; from harness import peak_rss_mb; from liam_scale.train import main; "
        "code = main(sys.argv[1:]); print(json.dumps({'peak': peak_rss_mb() * 2**20})); sys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    with (out / "history.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    shutil.rmtree(out)
    peak = json.loads(done.stdout.strip().splitlines()[-1])["peak"]
    return {
        "peak_gb": peak / 1e9,
        "cells_per_second": float(last["cells_per_second"]),
        "waiting": float(last["waiting_share"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "liam-scale-benchmarks")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from loaders.synthetic import simulate

    describe_machine()
    options.folder.mkdir(parents=True, exist_ok=True)
    stores = {}
    for cells in options.cells:
        stores[cells] = options.folder / f"paper-{cells}.zarr"
        if not stores[cells].exists():
            simulate(stores[cells], num_cells=cells, num_samples=13)
    results: dict[int, list[dict[str, float]]] = {cells: [] for cells in stores}
    for _ in range(options.rounds):
        for cells, store in stores.items():
            results[cells].append(train(store, options.steps, options.memory))
            print(json.dumps({"cells": cells, **results[cells][-1]}), flush=True)
    rows = []
    for cells, own in results.items():
        middle = sorted(own, key=lambda r: r["peak_gb"])[len(own) // 2]
        rows.append(
            (
                f"{cells:,}",
                f"{size_of(stores[cells]) / 1e9:.2f}",
                f"{middle['cells_per_second']:,.0f}",
                f"{middle['waiting']:.1%}",
                f"{middle['peak_gb']:.2f}",
            )
        )
    print(table(("cells", "store GB", "cells / s", "waiting for data", "peak RSS GB"), rows))


if __name__ == "__main__":
    main()
