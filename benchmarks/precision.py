"""Where training ends with bf16 products instead of float32: loss curves on real data side by side.

    python benchmarks/precision.py a549 --max-epochs 40

Data sets by name as in quality.py. The same seed, so that cells, noise and first weights are the same.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
import tempfile
from pathlib import Path

from harness import ROOT, describe_machine, table
from quality import DATA_SETS, python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", choices=list(DATA_SETS), default="a549")
    parser.add_argument("--max-epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    describe_machine()
    data = DATA_SETS[options.data]
    folder = Path(tempfile.mkdtemp(prefix="liam-precision-"))
    store = folder / "store.zarr"
    python("-m", "liam_scale.cli", "ingest", data.file, "--out", store)
    curves: dict[tuple[int, str], list[dict[str, str]]] = {}
    for seed in options.seeds:
        for precision in ("float32", "bf16"):
            run = folder / f"{precision}-{seed}"
            columns = ["--batch-key", data.batch_key] if data.batch_key else []
            length = ["--max-epochs", options.max_epochs, "--training.no-early-stopping"]
            python(
                "-m",
                "liam_scale.train",
                store,
                "--out",
                run,
                "--seed",
                seed,
                "--precision",
                precision,
                *columns,
                *length,
            )
            with (run / "history.csv").open() as file:
                curves[seed, precision] = list(csv.DictReader(file))
    rows = []
    for seed in options.seeds:
        exact, coarse = curves[seed, "float32"], curves[seed, "bf16"]
        for epoch in sorted({0, 1, 4, 9, 19, 29, options.max_epochs - 1} & set(range(len(exact)))):
            losses = [float(curve[epoch]["validation_loss"]) for curve in (exact, coarse)]
            row = (seed, epoch, *(f"{loss:,.2f}" for loss in losses), f"{losses[1] / losses[0] - 1:+.3%}")
            print(json.dumps({"seed": seed, "epoch": epoch, "float32": losses[0], "bf16": losses[1]}), flush=True)
            rows.append(row)
    print(f"\n{options.data}, validation loss, nats per cell\n")
    print(table(("seed", "epoch", "float32", "bf16", "difference"), rows))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
