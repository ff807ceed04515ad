"""Differential analysis: false discoveries and power where the truth is known, and memory and time by number of cells.

python benchmarks/differential.py [--simulations 20] [--cells 10000 100000] [--epochs 60]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from harness import peak_rss_mb

import liam_scale
from liam_scale.differential import DifferentialConfig, differential
from liam_scale.run import attributes_of
from loaders import open_store
from loaders.synthetic import archetype_shares, simulate

SMALL = {"num_genes": 400, "num_peaks": 0, "genes_per_cell": 120, "num_samples": 3, "num_types": 5}
WIDE = {"num_genes": 2_000, "num_peaks": 0, "genes_per_cell": 200, "num_samples": 4, "num_types": 12}
TRAINING = {"n_hidden": 64, "n_latent": 10, "lr": 5e-3, "kl_warmup_epochs": 30, "early_stopping": False}


def true_changes(obs: pd.DataFrame, shares: np.ndarray) -> np.ndarray:
    """(K, F) log2 fold change of the mean share of the cells of each type over that of all other cells."""
    own, other = obs["cell_type"].cat.codes, obs["mixed_with"].cat.codes
    weights = np.zeros((len(shares), len(shares)))
    np.add.at(weights, (own, own), obs["own_weight"])
    np.add.at(weights, (own, other), 1.0 - obs["own_weight"])
    sums = weights @ shares
    sizes = np.bincount(own)[:, None]
    rest = (sums.sum(axis=0) - sums) / (sizes.sum() - sizes)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(np.log2(sums / sizes / rest), posinf=30.0, neginf=-30.0)


def discoveries(seed: int, folder: Path, *, cells: int, epochs: int) -> dict[str, float]:
    """Simulate, train, compare each type with the rest: share of false ones among what is called, and power."""
    store, options = folder / f"{seed}.zarr", {**SMALL, "seed": seed}
    simulate(store, num_cells=cells, **options)
    run = liam_scale.train(store, out=folder / str(seed), batch_key="sample", max_epochs=epochs, **TRAINING)
    run.embed()
    opened, found = open_store(store), {}
    truth = true_changes(opened.obs_frame(), archetype_shares("rna", **options))
    for name, posterior in (("embedding", False), ("posterior", True)):
        config = DifferentialConfig(run=run.path, groupby="cell_type", posterior=posterior)
        table = differential(config, opened)
        wide = table.pivot(columns="group1").loc[opened.feature_names("rna")]
        called = wide["is_de_fdr_0.05"].to_numpy().T
        is_true = (np.abs(truth) > config.delta) & (np.sign(truth) == np.sign(wide["lfc_mean"].to_numpy().T))
        found |= {
            f"{name}_called": int(called.sum()),
            f"{name}_false": float((called & ~is_true).sum() / max(1, called.sum())),
            f"{name}_power": float((called & is_true).sum() / (np.abs(truth) > config.delta).sum()),
            f"{name}_power_twofold": float((called & is_true)[np.abs(truth) > 1].mean()),
        }
    return {"seed": seed, **found}


def measured(cells: int) -> None:
    """Seconds and memory of a comparison of twelve groups, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store.zarr"
        program = [sys.executable, __file__, "--compare", folder]
        simulate(store, num_cells=cells, **WIDE)
        run = liam_scale.train(store, out=Path(folder) / "run", batch_key="sample", max_steps=5, memory="64MiB")
        opened = open_store(store)
        z = np.random.default_rng(0).dirichlet(np.ones(run.model().num_latent), cells).astype(np.float32)
        opened.write_embedding("X_liam", z, attributes_of(run.record.id))
        print(subprocess.run(program, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


def compare(folder: Path) -> None:
    before, start, cpu = peak_rss_mb(), time.perf_counter(), time.process_time()
    differential(DifferentialConfig(run=folder / "run", groupby="cell_type"))
    seconds = {"wall": round(time.perf_counter() - start, 1), "cpu": round(time.process_time() - cpu, 1)}
    num_cells = open_store(folder / "store.zarr").schema.num_cells
    print(json.dumps({"cells": num_cells, **seconds, "imports_mb": round(before), "peak_mb": round(peak_rss_mb())}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=20)
    parser.add_argument("--cells", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--compare", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.compare:
        compare(given.compare)
        return
    for cells in given.cells:
        measured(cells)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(given.simulations):
            rows.append(discoveries(seed, Path(folder), cells=2_000, epochs=given.epochs))
            print(json.dumps(rows[-1]), flush=True)
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        print(f"{name}: mean {statistics.mean(values):.3f}, from {min(values):.3f} to {max(values):.3f}")


if __name__ == "__main__":
    main()
