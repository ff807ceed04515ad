"""Quality of the embedding: ingest, train on 2 ranks, embed and evaluate once per seed; mean and spread.

    python benchmarks/quality.py pbmc --seeds 0 1 2
    python benchmarks/quality.py my.h5mu --batch-key donor --label-key cell_type -- --alpha 5 --max-epochs 100

What follows `--` goes to the training. Data sets by name stand in a folder `shared/data` beside the checkout (or
$LIAM_SHARED/data); `pbmc` is the mosaic that comes with the package.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from liam_scale.evaluate import EvaluateConfig, describe, evaluate

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LIAM_SHARED", ROOT.parent / "shared")) / "data"


@dataclass(frozen=True)
class DataSet:
    """A source file and its columns; `bar` holds values that the original reached on it (alpha 1, 20 dimensions)."""

    file: Path
    batch_key: str | None
    label_key: str
    bar: dict[str, float]


ORIGINAL_ON_PBMC = {"label_accuracy": 0.831, "same_sample_ratio": 2.01, "asw_label": 0.642}

DATA_SETS = {
    "pbmc": DataSet(ROOT / "liam_scale" / "data" / "pbmc_mosaic.h5mu", "donor", "cell_type", ORIGINAL_ON_PBMC),
    "pbmc-wnn": DataSet(SHARED / "pbmc_wnn_mosaic.h5mu", "batch", "cell_type", ORIGINAL_ON_PBMC),
    "bmmc-multiome": DataSet(SHARED / "bmmc_multiome_A.h5mu", "batch", "cell_type", {}),
    "bmmc-cite": DataSet(SHARED / "bmmc_cite.h5mu", "batch", "cell_type", {}),
    "bmmc-trimodal": DataSet(SHARED / "bmmc_trimodal_mosaic.h5mu", "batch", "cell_type_coarse", {}),
    "a549": DataSet(SHARED / "a549_scicar_rna_atac.h5mu", "batch", "cell_type", {}),
    "pbmc-multiome-40": DataSet(SHARED / "pbmc_multiome_40c_fullwidth.h5mu", None, "cell_type", {}),
}


def main() -> None:
    arguments, training = parse_arguments()
    known = DATA_SETS.get(arguments.data)
    data = known or DataSet(Path(arguments.data), arguments.batch_key, arguments.label_key, {})
    if not data.file.exists():
        sys.exit(f"error: data: got {data.file}, which is not there; name one of {', '.join(DATA_SETS)} or a file")
    folder = Path(arguments.out or tempfile.mkdtemp(prefix="liam-quality-"))
    print(
        f"{data.file.name}, {arguments.ranks} ranks, training options: {' '.join(training) or 'defaults'}; in {folder}"
    )
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}"]
    tables: list[pd.DataFrame] = []
    for seed in arguments.seeds:
        store, run = folder / f"store-{seed}.zarr", folder / f"run-{seed}"
        began = time.monotonic()
        if not store.exists():
            python("-m", "liam_scale.cli", "ingest", data.file, "--out", store, "--seed", seed)
        columns = ["--batch-key", data.batch_key] if data.batch_key else []
        python(*ranks, "-m", "liam_scale.train", store, "--out", run, "--seed", seed, *columns, *training)
        python(*ranks, "-m", "liam_scale.embed", run)
        found = evaluate(
            EvaluateConfig(str(store), batch_key=data.batch_key, label_key=data.label_key, scib="none", published=True)
        )
        epochs = pd.read_csv(run / "history.csv")["epoch"].iloc[-1] + 1
        print(f"\nseed {seed}: {time.monotonic() - began:.0f} s, {epochs} epochs\n{describe(found)}", flush=True)
        tables.append(found.table.drop(columns="of"))
    print(f"\n{summary(tables, data.bar)}")


def summary(tables: Sequence[pd.DataFrame], bar: dict[str, float]) -> str:
    """Mean and standard deviation over seeds of the baseline and of the embedding, beside the original's values."""
    together = pd.concat(tables, keys=range(len(tables)), names=["seed"])
    mean, spread = together.groupby("measure", sort=False).mean(), together.groupby("measure", sort=False).std()
    lines = [
        f"{'mean ± sd of ' + str(len(tables)) + ' seeds':<22}" + "".join(f"{c:>18}" for c in mean) + f"{'original':>12}"
    ]
    for key in mean.index:
        values = "".join(f"{mean.loc[key, c]:>10.3f} ± {spread.loc[key, c]:.3f}" for c in mean)
        lines.append(f"{key:<22}{values}" + (f"{bar[key]:>12.3f}" if key in bar else ""))
    return "\n".join(lines)


def python(*arguments: object) -> None:
    """Run this interpreter on this checkout; its output is shown only when it fails."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{done.stderr}\nerror: {' '.join(command)} ended with exit code {done.returncode}")


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    own, training = sys.argv[1:], []
    if "--" in own:
        own, training = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="pbmc", help=f"{', '.join(DATA_SETS)}, or a source file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch-key", default=None, help="of a source file")
    parser.add_argument("--label-key", default="cell_type", help="of a source file")
    parser.add_argument("--out", default=None, help="folder for stores and runs; default: a temporary one")
    return parser.parse_args(own), training


if __name__ == "__main__":
    main()
