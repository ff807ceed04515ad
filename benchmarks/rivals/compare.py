"""Rivals on the same cells by the same measures: quality, wall and CPU time, memory, epochs.

    python benchmarks/rivals/compare.py bmmc-cite --rival pca --rival harmony=/venvs/harmony/bin/python \
        --rival totalvi=/venvs/scvi/bin/python --rival liam --rival "liam --alpha 25" --seeds 0 1 2 --out rivals

Data sets by name as in quality.py, or a MuData with --batch-key and --label-key. A rival is a program of this folder
with its options, and after `=` the interpreter of its environment; what is finished in --out is not run again. --cells
draws as many cells for all. Each run has the threads of OMP_NUM_THREADS (default 1).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Literal

import anndata
import mudata
import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from harness import describe_machine, table  # noqa: E402
from quality import DATA_SETS, DataSet  # noqa: E402

from liam_scale.evaluate import EvaluateConfig, evaluate  # noqa: E402

COLUMNS = {
    "leiden_nmi": "NMI",
    "leiden_ari": "ARI",
    "label_accuracy": "label across batches",
    "macro_recall": "macro recall",
    "same_sample_ratio": "same-batch / expected",
    "ilisi": "iLISI",
    "kbet": "kBET",
    "bras": "BRAS",
    "cpu": "CPU s",
    "peak_rss_mb": "RSS MB",
    "epochs": "epochs",
}


def compete(rival: str, file: Path, data: DataSet, seed: int, folder: Path) -> Path | None:
    """Run one rival with one seed; its latent, or None where it failed."""
    program, python = _parts(rival)
    name, *options = shlex.split(program)
    out = folder / f"{'_'.join([name, *options]).replace('/', '_')}-{seed}.csv"
    report = out.with_suffix(".json")
    if report.exists():
        return out
    command = [python or sys.executable, str(HERE / f"{name}.py"), str(file), "--out", str(out)]
    command += ["--batch-key", str(data.batch_key), "--seed", str(seed), *options]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    environment["PYTHONPATH"] = str(HERE.parents[1]) if name == "liam" else ""
    with out.with_suffix(".log").open("w") as log:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        print(f"{rival}, seed {seed}: failed, see {out.with_suffix('.log')}", flush=True)
        return None
    report.write_text(lines[-1])
    return out


def _parts(rival: str) -> tuple[str, str | None]:
    """The program with its options, and its interpreter, a path."""
    found = re.fullmatch(r"(.*?)(?:=(\S*/\S+))?", rival)
    assert found is not None
    return found[1], found[2]


def scores(latent: Path, obs: pd.DataFrame, data: DataSet, scib: Literal["quick", "all"]) -> dict[str, float]:
    """What `evaluate` says of a latent, and what the rival said of itself."""
    points = pd.read_csv(latent, index_col=0, dtype={0: str}).loc[obs.index].to_numpy(np.float32)
    cells = anndata.AnnData(obs=obs, obsm={"X": points})
    keys = {"batch_key": (str(data.batch_key),), "label_key": (data.label_key,)}
    found = evaluate(EvaluateConfig("cells", embedding="X", baseline=False, scib=scib, **keys), data=cells).table["X"]
    return {**found.to_dict(), **json.loads(latent.with_suffix(".json").read_text())}


def main() -> None:
    arguments = parse_arguments()
    data = DATA_SETS.get(arguments.data) or DataSet(Path(arguments.data), arguments.batch_key, arguments.label_key, {})
    folder = arguments.out / data.file.stem
    folder.mkdir(parents=True, exist_ok=True)
    whole, file = mudata.read_h5mu(data.file), data.file
    if arguments.cells and arguments.cells < len(whole):
        rows = np.random.default_rng(0).choice(len(whole), arguments.cells, replace=False)
        whole, file = whole[np.sort(rows)].copy(), folder / f"{arguments.cells}-cells.h5mu"
        whole.write(file)
    describe_machine()
    rows = []
    for rival in arguments.rival:
        seeds = arguments.seeds[:1] if rival.startswith("pca") else arguments.seeds
        latents = [compete(rival, file, data, seed, folder) for seed in seeds]
        found = pd.DataFrame([scores(one, whole.obs, data, arguments.scib) for one in latents if one is not None])
        if len(found):
            print(json.dumps({"rival": rival, "results": found.to_dict("records")}), flush=True)
            rows.append((_parts(rival)[0], len(found), *(shown(found.get(key)) for key in COLUMNS)))
        else:
            rows.append((_parts(rival)[0], 0, *["failed"] * len(COLUMNS)))
    print(f"\n{data.file.stem}, {len(whole):,} cells\n\n{table(('method', 'seeds', *COLUMNS.values()), rows)}")


def shown(values: pd.Series | None) -> str:
    if values is None or values.isna().all():
        return "-"
    if values.mean() > 10:
        return f"{values.mean():,.0f}"
    return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help=f"{', '.join(DATA_SETS)}, or a MuData")
    parser.add_argument("--rival", action="append", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scib", choices=["quick", "all"], default="all", help="quick: without BRAS and kBET")
    parser.add_argument("--cells", type=int, default=None)
    parser.add_argument("--batch-key", default=None)
    parser.add_argument("--label-key", default="cell_type")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
