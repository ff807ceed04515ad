"""Two revisions against each other, interleaved: training step, loader with and without transposes, saved checkpoints.

    git worktree add /tmp/before REVISION
    python benchmarks/revisions.py --before /tmp/before

Each revision reads a store that it wrote itself, of the same simulated cells in the paper's shape, and serves its own
benchmark programs; a refactor should find nothing slower by more than 3 %.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import ROOT, Peer, describe_machine, quartiles, spread, table, take_turns

SHAPE = "num_genes=13_431, num_peaks=116_490, num_samples=13"

LOADER = {
    "kind": "epochs",
    "modalities": ["rna", "atac"],
    "memory": "512MiB",
    "values": "float32",
    "streams": None,
    "threads": 1,
    "cold": False,
    "obs": True,
}


CHECKPOINT = """
import json, sys, tempfile, time
from pathlib import Path
import torch
from liam_scale.training.checkpoint import Checkpoint, save_checkpoint

sizes = {"model": [16_000_000], "optimizer": [16_000_000, 8_000_000], "best": [200_000, 200_000]}
tensors = {group: {f"w{i}": torch.randn(n) for i, n in enumerate(own)} for group, own in sizes.items()}
with tempfile.TemporaryDirectory() as folder:
    print(json.dumps({}), flush=True)
    for step, _ in enumerate(sys.stdin):
        wall, cpu = time.perf_counter(), time.process_time()
        save_checkpoint(Path(folder), Checkpoint(tensors, {}), step=step)
        found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "cells": 1}
        print(json.dumps(found), flush=True)
"""
"""Saves 160 MB, one in the place of the one before the last."""


def store_of(checkout: Path, folder: Path, cells: int) -> str:
    path = folder / "paper.zarr"
    if not path.exists():
        code = f"from loaders.synthetic import simulate; simulate({str(path)!r}, num_cells={cells}, {SHAPE})"
        subprocess.run([*in_checkout(checkout), "-c", code], check=True, cwd=checkout)
    return str(path)


def in_checkout(checkout: Path) -> list[str]:
    return ["env", f"PYTHONPATH={checkout}", sys.executable]


def peer(name: str, checkout: Path, store: str, what: str, minibatch: int, precision: str, steps: int) -> Peer:
    if what == "checkpoint":
        return Peer(name, [*in_checkout(checkout), "-P", "-c", CHECKPOINT])
    programs = checkout / "benchmarks"
    if what == "step":
        arguments = [str(programs / "step.py"), "--serve", "liam", "--store", store, "--minibatch", str(minibatch)]
        arguments += ["--steps", str(max(1, steps * 128 // minibatch)), "--precision", precision]
    else:
        options = {**LOADER, "paths": [store], "minibatch": minibatch, "transpose": what == "loader with transposes"}
        arguments = [str(programs / "loader_ours.py"), json.dumps(options)]
    return Peer(name, [*in_checkout(checkout), *arguments])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="checkout of the earlier revision")
    parser.add_argument("--after", type=Path, default=ROOT, help="checkout of the later revision")
    parser.add_argument("--cells", type=int, default=8_000)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="steps of 128 cells in a round")
    parser.add_argument("--only", choices=("step", "loader", "checkpoint"))
    options = parser.parse_args()
    describe_machine()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkouts = {"before": options.before.resolve(), "after": options.after.resolve()}
        stores = {}
        for name, checkout in checkouts.items():
            (Path(folder) / name).mkdir()
            if options.only != "checkpoint":
                stores[name] = store_of(checkout, Path(folder) / name, options.cells)
        works = [("step", 128, "float32"), ("step", 1_024, "float32"), ("step", 128, "bf16")]
        works += [(f"loader with{out} transposes", 1_024, "float32") for out in ("", "out")]
        works += [("checkpoint", 1, "float32")]
        for what, minibatch, precision in works:
            if options.only not in (None, what.split()[0]):
                continue
            peers = [
                peer(name, checkout, stores.get(name, ""), what, minibatch, precision, options.steps)
                for name, checkout in checkouts.items()
            ]
            found = take_turns(peers, rounds=options.rounds)
            costs = {name: [1e6 * r["cpu"] / r["cells"] for r in results] for name, results in found.items()}
            walls = {name: [1e6 * r["wall"] / r["cells"] for r in results] for name, results in found.items()}
            ratios = [a / b for b, a in zip(costs["before"], costs["after"], strict=True)]
            middle, low, high = quartiles(ratios)
            name = f"{what}, minibatch {minibatch}" + (f", {precision}" if what == "step" else "")
            name = "a checkpoint of 160 MB (instead of a cell)" if what == "checkpoint" else name
            cells = [spread(values[side]) for values in (costs, walls) for side in ("before", "after")]
            rows.append([name, *cells, f"{middle:.3f} ({low:.3f}-{high:.3f})"])
    header = ["", "CPU us a cell, before", "after", "wall us a cell, before", "after", "CPU, after / before"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
