"""What the experiments of the paper share: data, runs over seeds, the table beside published values, the verdict.

Every experiment takes the user's own MuData (raw counts in `rna`, `atac`, `adt`, columns in obs); without one it runs
on a simulated stand-in whose truth is known, in minutes. Published values are of the paper's data, all cells, scib's
measures: comparable on those data alone, of a stand-in only the order of the methods.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mudata
import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

from ablation import MODELS, PUBLISHED  # noqa: E402, F401  handed on
from harness import describe_machine, table  # noqa: E402
from quality import SHARED  # noqa: E402

import liam_scale  # noqa: E402
from liam_scale.evaluate import EvaluateConfig, evaluate  # noqa: E402
from liam_scale.evaluation.found import Evaluation  # noqa: E402
from liam_scale.evaluation.imputation import MEAN_PROFILE  # noqa: E402
from liam_scale.evaluation.measures import MEASURES as evaluated  # noqa: E402
from liam_scale.evaluation.recommendation import ranks  # noqa: E402
from loaders.ingest import ingest  # noqa: E402
from loaders.synthetic import simulate_mudata  # noqa: E402

STAND_IN = {"num_genes": 400, "num_peaks": 800, "genes_per_cell": 100, "peaks_per_cell": 160, "num_types": 8}
"""Shape of the simulated data."""

CUT = {"lr": 1e-2, "patience_steps": 200}
"""What trainings on the simulated data are spared, the same for all of a table: ten times the learning rate and a
third of the patience. They end after some 1,100 steps, at the validation loss of one with 3e-3. With an alpha above 1
such steps lose all structure: a table that has one trains as the command does."""

THREADS = torch.get_num_threads()
"""Libraries that score may change it for the trainings that follow."""

MEASURES = {"leiden_nmi": "NMI", "label_accuracy": "label across samples", "ilisi": "iLISI of {}"}
"""Measures that tables show, of those that are computed."""

EPOCHS, SECONDS = "epochs", "CPU s"


def parse(doc: str | None, **columns: str) -> argparse.Namespace:
    """Options of every experiment, and further ones with their defaults, such as obs columns; prints the machine."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, help="a MuData; default: the simulated stand-in")
    for name, default in {"batch_key": "sample", "label_key": "cell_type", **columns}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default)
    parser.add_argument("--cells", type=int, default=1_200, help="of the stand-in")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-epochs", type=int, default=None, help="default: as the training command")
    parser.add_argument("--out", type=Path, default=None, help="folder for stores and runs; default: a temporary one")
    options = parser.parse_args()
    options.out = options.out or Path(tempfile.mkdtemp(prefix="liam-experiment-"))
    options.out.mkdir(parents=True, exist_ok=True)
    describe_machine()
    return options


def load(options: argparse.Namespace, **stand_in: Any) -> mudata.MuData:
    """The user's data, or what is simulated in its place."""
    if options.data is not None:
        return mudata.read_h5mu(options.data)
    return simulate_mudata(num_cells=options.cells, **{**STAND_IN, "num_samples": 6, "sample_effect": 0.6, **stand_in})


def ingested(data: mudata.MuData, store: Path) -> Path:
    """A store of the data; one that is there is taken as it is."""
    if not store.exists():
        file = store.with_suffix(".h5mu")
        data.write(file)
        ingest(file, out=store)
        file.unlink()
    return store


def thinned(data: mudata.MuData, share: float, seed: int = 0) -> mudata.MuData:
    """The data with so large a share of the peaks, drawn at random, as the paper subsamples ATAC by features."""
    rng = np.random.default_rng(seed)
    peaks = data["atac"].n_vars
    kept = np.sort(rng.choice(peaks, round(share * peaks), replace=False))
    mods = {name: modality[:, kept].copy() if name == "atac" else modality for name, modality in data.mod.items()}
    made = mudata.MuData(mods)
    made.obs = data.obs
    return made


def without(data: mudata.MuData, batch_key: str, lost: Mapping[str, Sequence[str]]) -> mudata.MuData:
    """The data as a mosaic: samples lose the modalities named for them."""
    samples = data.obs[batch_key].astype(str)
    mods = {}
    for name, modality in data.mod.items():
        lacking = samples.isin([sample for sample, names in lost.items() if name in names])
        mods[name] = modality[modality.obs_names.isin(data.obs_names[~lacking])].copy()
    made = mudata.MuData(mods)
    made.obs = data.obs.loc[made.obs_names]
    return made


def measured(
    store: Path,
    runs: Mapping[str, Mapping[str, Any]],
    options: argparse.Namespace,
    *,
    covariates: Sequence[str] = (),
    truth: Path | None = None,
) -> pd.DataFrame:
    """A row for each run, by name with its training options, and seed: all that `evaluate` says of the embedding, as
    `measure:column`, epochs and CPU seconds. What is finished in `--out` is not run again."""
    rows: list[dict[str, Any]] = []
    is_cut = options.data is None and max(map(_alpha_of, runs.values())) <= 1
    for name, training in runs.items():
        for seed in options.seeds:
            own = re.sub(r"\W+", "-", f"{store.stem}-{name}-{seed}")
            file = options.out / f"{own}.json"
            if not file.exists():
                given = {"batch_key": options.batch_key, "max_epochs": options.max_epochs, "seed": seed}
                chosen = {**given, **(CUT if is_cut else {}), **training}
                found = _measured_once(store, options.out / own, chosen, options, covariates, truth)
                file.write_text(json.dumps(found))
            rows.append({"run": name, "seed": seed, **json.loads(file.read_text())})
            print(json.dumps(rows[-1]), flush=True)
    return pd.DataFrame(rows)


def _alpha_of(training: Mapping[str, Any]) -> float:
    """The largest weight of an adversary."""
    return max(
        training.get("alpha", 1.0), *(float(text.rpartition("=")[2]) for text in training.get("alphas", ("=0",)))
    )


def _measured_once(
    store: Path,
    out: Path,
    training: Mapping[str, Any],
    options: argparse.Namespace,
    covariates: Sequence[str],
    truth: Path | None,
) -> dict[str, float]:
    torch.set_num_threads(THREADS)
    began, key = time.process_time(), f"X_{out.name}"
    run = liam_scale.train(store, out=out, **training)
    seconds = time.process_time() - began
    run.embed(store, key=key, overwrite=True)
    columns = {"batch_key": (options.batch_key, *covariates), "label_key": (options.label_key,)}
    imputed = {} if truth is None else {"run": run.path, "truth": str(truth)}
    asked = EvaluateConfig(str(store), embedding=key, baseline=False, scib="quick", **columns, **imputed)
    epochs = [int(pd.read_csv(file)["epoch"].iloc[-1]) + 1 for file in out.rglob("history.csv")]
    return {**_values(evaluate(asked), key), EPOCHS: max(epochs), SECONDS: seconds}


def _values(found: Evaluation, embedding: str) -> dict[str, float]:
    """Every measure, and those of imputation beside those of the mean profile."""
    table = found.table
    row = {f"{key}:{of}": float(v) for key, of, v in zip(table.index, table["of"], table[embedding], strict=True)}
    if found.imputation is not None:
        for key, one in found.imputation.iterrows():
            for column, what in ((embedding, ""), (MEAN_PROFILE, ", mean profile")):
                row[f"imputed {one['of']} {key}{what}"] = float(one[column])
    return row


def means(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns="seed").groupby("run", sort=False).mean()


def show(title: str, frame: pd.DataFrame, published: Mapping[str, str] | None = None) -> None:
    """Mean and standard deviation over seeds, beside the published NMI and iLISI of the model named for a run."""
    titles = {column: text for column in frame if (text := _title(str(column)))}
    grouped = frame[["run", *titles]].groupby("run", sort=False)
    mean, spread = grouped.mean(), grouped.std()
    known, rows = published_scores(), []
    for name in mean.index:
        own = [_shown(*both) for both in zip(mean.loc[name], spread.loc[name], strict=True)]
        entry = known.get((published or {}).get(str(name), ""), {})
        shown = " / ".join(f"{float(entry[key]):.3f}" for key in ("nmi", "iLISI_batch") if entry.get(key)) or "-"
        rows.append((name, *own, shown))
    print(f"\n{title}\n\n{table(('run', *titles.values(), 'published NMI / iLISI'), rows)}\n", flush=True)


def _title(column: str) -> str:
    """Of a column that is shown; empty: it is not."""
    if column in (EPOCHS, SECONDS) or (column.startswith("imputed") and "deviance" in column):
        return column
    key, _, of = column.partition(":")
    return MEASURES.get(key, "").format(of)


def _shown(mean: float, spread: float) -> str:
    if np.isnan(mean):
        return "-"
    digits = 0 if mean > 10 else 3
    return f"{mean:.{digits}f}" + ("" if np.isnan(spread) else f" ± {spread:.{digits}f}")


def ranked(frame: pd.DataFrame, options: argparse.Namespace, *, remove: Sequence[str] = ()) -> pd.DataFrame:
    """The runs as a sweep ranks its configurations: columns `overall`, `removal`, `conservation`, best first."""
    own = frame[[column for column in frame if ":" in column]]
    configured = own.assign(model=frame["run"], batch_key=options.batch_key, alpha=0.0)
    better = {key: measure.better for key, measure in evaluated.items()}
    found = ranks(configured, better=better, remove=remove)
    return found[["overall", "removal", "conservation"]].droplevel(["batch_key", "alpha"])


def published_scores() -> dict[str, dict[str, str]]:
    """Published scores by model; empty where the table does not stand beside the checkout."""
    path = SHARED.parent / "reference" / "published-scores.csv"
    if not path.exists():
        return {}
    with path.open() as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def verdict(conclusion: str, came_out: bool, figures: str) -> None:
    print(f"{conclusion}: {'came out' if came_out else 'did not come out'} ({figures})", flush=True)
