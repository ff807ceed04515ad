"""Differential analysis: false discoveries and power where the truth is known, memory and time by number of cells, and
the genes that others put first on real data.

python benchmarks/differential.py [--simulations 20] [--cells 10000 100000 1000000] [--epochs 60] \
    [--real cells.h5mu --batch-key donor --label-key cell_type [--modality rna | atac]]

--real compares each label with the rest: the genes (or peaks) that are up and most probable here, with those of
scanpy's Wilcoxon test of highest score, and where scvi-tools is installed with those of its TOTALVI (of cells with
proteins) or MULTIVI (with peaks) in change mode.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata
import mudata
import numpy as np
import pandas as pd
import scanpy
import torch
from harness import peak_rss_mb, table

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


def agreement(given: argparse.Namespace) -> None:
    """Share of the first features of each label that two methods have in common; beside it, what chance would give."""
    data = mudata.read_h5mu(given.real)
    data = data[np.all([data.obs_names.isin(held.obs_names) for held in data.mod.values()], axis=0)].copy()
    for held in data.mod.values():
        held.obs = held.obs.drop(columns=held.obs.columns.intersection(data.obs.columns)).join(data.obs)
    sizes = data.obs[given.label_key].value_counts()
    labels = data.obs[given.label_key].astype(str)
    kept = [str(name) for name, size in sizes.items() if size >= given.least]
    with tempfile.TemporaryDirectory() as folder:
        run = liam_scale.train(data, batch_key=given.batch_key, out=Path(folder) / "run", max_epochs=given.real_epochs)
        run.embed(data)
        ours = run.differential(data, groupby=labels, group=kept, modality=given.modality)
    first = {"here": {name: list(own[own["lfc_mean"] > 0].index) for name, own in ours.groupby("group1")}}
    first["Wilcoxon"] = by_wilcoxon(data[given.modality].copy(), labels, kept)
    if (found := by_scvi(data, given, kept)) is not None:
        first["TOTALVI" if "adt" in data.mod else "MULTIVI"] = found
    num_features, rows = data[given.modality].n_vars, []
    print(f"{given.real.name}: {data.n_obs:,} cells, {num_features:,} of {given.modality}, {len(kept)} labels")
    for number in (20, 100):
        for one, two in itertools.combinations(first, 2):
            shares = [len({*first[one][k][:number]} & {*first[two][k][:number]}) / number for k in kept]
            told = f"{statistics.mean(shares):.2f} ({min(shares):.2f}-{max(shares):.2f})"
            rows.append((number, f"{one}, {two}", told, f"{number / num_features:.2f}"))
    print(table(("first features", "methods", "in common", "by chance"), rows), flush=True)


def by_wilcoxon(held: anndata.AnnData, labels: pd.Series, kept: list[str]) -> dict[str, list[str]]:
    held.obs["label"] = labels.astype("category")
    held.X = held.X.astype(np.float32)
    scanpy.pp.normalize_total(held)
    scanpy.pp.log1p(held)
    scanpy.tl.rank_genes_groups(held, "label", groups=kept, method="wilcoxon")
    return {name: list(scanpy.get.rank_genes_groups_df(held, name)["names"]) for name in kept}


def by_scvi(data: mudata.MuData, given: argparse.Namespace, kept: list[str]) -> dict[str, list[str]] | None:
    try:
        import scvi
    except ImportError:
        print("scvi-tools is not installed: left out")
        return None
    scvi.settings.seed = 0
    second = "adt" if "adt" in data.mod else "atac"
    own = mudata.MuData({name: data[name].copy() for name in ("rna", second)})
    for held in own.mod.values():
        held.X = held.X.astype(np.float32)
    if second == "adt":
        own["adt"].X = own["adt"].X.toarray()
    own.obs = data.obs[[given.batch_key]].assign(label=data.obs[given.label_key].astype(str))
    kind, layer = {"adt": (scvi.model.TOTALVI, "protein"), "atac": (scvi.model.MULTIVI, "atac")}[second]
    modalities = {"rna_layer": "rna", f"{layer}_layer": second}
    kind.setup_mudata(own, batch_key=given.batch_key, modalities=modalities)
    model = kind(own)
    # MULTIVI's own, 1e-4, is for atlases: on a few hundred cells it learns nothing in that time.
    model.train(max_epochs=given.real_epochs, lr=4e-3, accelerator="cpu", enable_progress_bar=False)
    found = {}
    for name in kept:
        cells = {"idx1": (own.obs["label"] == name).to_numpy(), "idx2": (own.obs["label"] != name).to_numpy()}
        asked = {**cells, "mode": "change", "batch_correction": True, "silent": True}
        if given.modality == "atac":
            told = model.differential_accessibility(**asked)
            told = told.assign(proba_de=told["prob_da"], lfc_mean=-told["effect_size"])  # of the second over the first
        else:
            told = model.differential_expression(**asked, delta=0.25)
        told = told[told.index.isin(own[given.modality].var_names) & (told["lfc_mean"] > 0)]
        found[name] = list(told.sort_values(["proba_de", "lfc_mean"], ascending=False).index)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=20)
    parser.add_argument("--cells", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--modality", default="rna", choices=("rna", "atac"))
    parser.add_argument("--batch-key")
    parser.add_argument("--label-key")
    parser.add_argument("--real-epochs", type=int, default=200)
    parser.add_argument("--least", type=int, default=30, help="cells that a label must have")
    parser.add_argument("--compare", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.compare:
        compare(given.compare)
        return
    if given.real:
        agreement(given)
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
