"""Cost of the kernels against the matrix products that no method avoids, and against the plain formulas.

    python benchmarks/likelihood.py [--rounds 15] [--threads 1 2] [--output likelihood.jsonl]

All candidates run once in every round, in turn, so that a slow minute of the machine falls on all of them; printed are
medians and quartiles of CPU seconds and wall time, and of ratios formed within each round. The paper's shape:
128 cells, 116,490 peaks with 3,600 non-zeros a cell, 13,431 genes with 800, hidden 128 (+ 1 for the size of the cell).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from harness import ROOT, describe_machine, quartiles, spread, table
from torch import Tensor

sys.path.insert(0, str(ROOT))

from liam_scale.kernels.cpu.softmax_tiles import has_onednn, multiply_transposed
from liam_scale.kernels.negative_binomial import negative_binomial
from liam_scale.kernels.negative_multinomial import negative_multinomial
from liam_scale.kernels.options import has_bf16
from liam_scale.kernels.sparse_linear import sparse_linear
from loaders.minibatch import SparseCounts

CELLS, PEAKS, PEAKS_OPEN, GENES, GENES_SEEN, SAMPLES, HIDDEN = 128, 116_490, 3_600, 13_431, 800, 13, 128
TILES = (1024, 2048, 4096)
Candidate = Callable[[], Any]


def make_counts(cells: int, features: int, per_cell: int, *, top: int = 1, seed: int = 0) -> SparseCounts:
    """Counts whose features differ in frequency as peaks do (gamma-distributed weights, shape 0.5)."""
    rng = np.random.default_rng(seed)
    weights = np.cumsum(rng.gamma(0.5, size=features))
    rows = []
    for _ in range(cells):
        drawn = np.searchsorted(weights, rng.uniform(0, weights[-1], 2 * per_cell))
        rows.append(np.sort(rng.permutation(np.unique(drawn))[:per_cell]))
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    values = rng.integers(1, top + 1, indptr[-1]).astype(np.float32)
    matrix = scipy.sparse.csr_matrix((values, np.concatenate(rows), indptr), shape=(cells, features))
    return SparseCounts.from_scipy(matrix)


def products(
    tile: int, hidden: Tensor, weight: Tensor, *, onednn: bool, dtype: torch.dtype = torch.float32
) -> Candidate:
    """The three products of an output layer (logits, weight's gradient, hidden state's gradient), and nothing else."""
    left, table = hidden.detach().to(dtype), weight.detach().to(dtype)
    slopes = torch.rand(min(tile, len(weight)), len(hidden)).to(dtype)
    gradient = torch.zeros(len(weight), weight.shape[1], dtype=dtype)
    logits, part = torch.empty_like(slopes), torch.empty_like(left)
    left_T = left.T.contiguous()

    def with_mm() -> None:
        for first in range(0, len(table), tile):
            rows = table[first : first + tile]
            torch.mm(rows, left.T, out=logits[: len(rows)])
            torch.mm(slopes[: len(rows)], left, out=gradient[first : first + tile])
            torch.mm(slopes[: len(rows)].T, rows, out=part)

    def with_onednn() -> None:
        for first in range(0, len(table), tile):
            rows = table[first : first + tile]
            multiply_transposed(rows, left)
            gradient[first : first + tile] = multiply_transposed(slopes[: len(rows)], left_T)
            multiply_transposed(rows.T, slopes[: len(rows)].T)

    return with_onednn if onednn else with_mm


def multinomial(counts: SparseCounts, hidden: Tensor, weight: Tensor, **options: Any) -> Candidate:
    bias, r = torch.zeros(len(weight), requires_grad=True), torch.ones(len(hidden), requires_grad=True)
    cell_weight = torch.full((len(hidden),), 1 / len(hidden))
    is_fused = options.get("impl") != "reference"
    buffers = {"weight": torch.zeros_like(weight), "bias": torch.zeros_like(bias)} if is_fused else None

    def run() -> None:
        for parameter in (hidden, weight, bias, r):
            parameter.grad = None
        arguments = {"cell_weight": cell_weight, "grad_buffers": buffers, **options}
        negative_multinomial(counts, hidden, weight, bias, r, **arguments)[0].backward()

    return run


def binomial(counts: SparseCounts, **options: Any) -> Candidate:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(CELLS, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(GENES, HIDDEN, generator=generator).mul_(0.05).requires_grad_()
    bias, library = torch.zeros(GENES, requires_grad=True), torch.full((CELLS,), 2000.0, requires_grad=True)
    log_theta = torch.randn(GENES, SAMPLES, generator=generator).requires_grad_()
    sample = torch.randint(SAMPLES, (CELLS,), generator=generator)
    parameters = {"weight": weight, "bias": bias, "log_theta": log_theta}
    is_fused = options.get("impl") != "reference"
    buffers = {name: torch.zeros_like(p) for name, p in parameters.items()} if is_fused else None
    cell_weight = torch.full((CELLS,), 1 / CELLS)

    def run() -> None:
        for parameter in (hidden, library, *parameters.values()):
            parameter.grad = None
        arguments = {"cell_weight": cell_weight, "grad_buffers": buffers, **options}
        negative_binomial(counts, hidden, weight, bias, library, log_theta, sample, **arguments)[0].backward()

    return run


def first_layer(counts: SparseCounts, *, dense: bool) -> Candidate:
    """128 x 116,490 -> 256, forward and gradient of the weight; both adopt a persistent buffer as the gradient."""
    upstream = torch.rand(CELLS, 256)
    weight = torch.randn(PEAKS, 256).mul_(0.05).requires_grad_()
    buffer = torch.zeros_like(weight)
    linear = weight.detach().T.contiguous().requires_grad_()
    rows = counts.to_dense() if dense else torch.empty(0)

    def run_dense() -> None:
        linear.grad = None
        torch.nn.functional.linear(rows, linear).backward(upstream)

    def run_sparse() -> None:
        weight.grad = None
        sparse_linear(counts, [weight], log1p=[False], grad_buffers={"weight0": buffer})[0].backward(upstream)

    return run_dense if dense else run_sparse


def candidates() -> dict[str, Candidate]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(CELLS, HIDDEN + 1, generator=generator).requires_grad_()
    weight = torch.randn(PEAKS, HIDDEN + 1, generator=generator).mul_(0.05).requires_grad_()
    peaks, genes = make_counts(CELLS, PEAKS, PEAKS_OPEN), make_counts(CELLS, GENES, GENES_SEEN, top=6)
    empty = SparseCounts.from_scipy(scipy.sparse.csr_matrix((CELLS, PEAKS), dtype=np.float32))
    shape = {"hidden": hidden, "weight": weight}
    found: dict[str, Candidate] = {}
    for tile in TILES:
        found[f"products torch.mm {tile}"] = products(tile, **shape, onednn=False)
        if has_onednn():
            found[f"products oneDNN {tile}"] = products(tile, **shape, onednn=True)
    if has_bf16():
        found["products bf16 2048"] = products(2048, **shape, onednn=False, dtype=torch.bfloat16)
    found |= {
        "nm": multinomial(peaks, **shape),
        "nm without non-zeros": multinomial(empty, **shape),
        "nm bf16": multinomial(peaks, **shape, precision="bf16"),
        "nm original": multinomial(peaks, **shape, likelihood="original"),
        "nm tile 8 MiB": multinomial(peaks, **shape, tile_bytes=2**23),
        "nm reference": multinomial(peaks, **shape, impl="reference"),
        "nb": binomial(genes),
        "nb bf16": binomial(genes, precision="bf16"),
        "nb reference": binomial(genes, impl="reference"),
        "sparse_linear": first_layer(peaks, dense=False),
        "F.linear": first_layer(peaks, dense=True),
    }
    return found


def measure(found: dict[str, Candidate], rounds: int) -> dict[str, dict[str, list[float]]]:
    times: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in found}
    for k in range(rounds + 2):
        for name, run in found.items():
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if k >= 2:  # two rounds to compile and to touch memory
                times[name]["cpu"].append(cpu)
                times[name]["wall"].append(wall)
    return times


def ratio(times: dict[str, dict[str, list[float]]], name: str, base: str, kind: str = "cpu") -> list[float]:
    return [a / b for a, b in zip(times[name][kind], times[base][kind], strict=True)]


def best(times: dict[str, dict[str, list[float]]], prefix: str) -> str:
    return min((name for name in times if name.startswith(prefix)), key=lambda name: np.median(times[name]["cpu"]))


def bars(times: dict[str, dict[str, list[float]]]) -> list[tuple[str, list[float], str]]:
    mm = best(times, "products torch.mm")
    rows = [
        (f"nm / {mm}", ratio(times, "nm", mm), "<= 1.7"),
        (f"nm without non-zeros / {mm}", ratio(times, "nm without non-zeros", mm), "<= 1.5"),
        (f"nm bf16 / {mm}", ratio(times, "nm bf16", mm), "<= 0.9"),
        ("F.linear / sparse_linear", ratio(times, "F.linear", "sparse_linear"), ">= 6"),
        ("nm reference / nm", ratio(times, "nm reference", "nm"), ""),
        ("nb reference / nb", ratio(times, "nb reference", "nb"), ""),
    ]
    if has_onednn():
        own = best(times, "products oneDNN")
        rows += [
            (f"nm / {own}", ratio(times, "nm", own), "<= 1.7"),
            (f"nm without non-zeros / {own}", ratio(times, "nm without non-zeros", own), "<= 1.5"),
            (f"nm bf16 / {own}", ratio(times, "nm bf16", own), ""),
        ]
    return rows


def resident(key: str) -> float:
    """MiB of resident memory now (VmRSS) or at its highest (VmHWM)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) / 1024


def extra_memory(cells: int, features: int, precision: str, likelihood: str) -> float:
    """MiB that one evaluation with all gradients takes beyond inputs and gradients."""
    counts, hidden = make_counts(cells, features, PEAKS_OPEN), torch.rand(cells, HIDDEN + 1, requires_grad=True)
    weight = torch.randn(features, HIDDEN + 1).mul_(0.05).requires_grad_()
    run = multinomial(counts, hidden, weight, precision=precision, likelihood=likelihood)
    # Compiles, and writes every page of the buffers of gradients; the thread's own buffers go with it.
    warm = threading.Thread(target=run)
    warm.start()
    warm.join()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    run()
    return resident("VmHWM") - before


def memory_rows() -> list[dict[str, Any]]:
    """Each in a process of its own."""
    rows = []
    for precision, likelihood in (("float32", "per-cell"), ("bf16", "per-cell"), ("float32", "original")):
        command = [sys.executable, __file__, "--memory", "1024", "1000000", precision, likelihood]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows.append({"precision": precision, "likelihood": likelihood, "extra_mib": float(found)})
    return rows


def show(times: dict[str, dict[str, list[float]]], threads: int) -> None:
    print(f"\n{threads} thread(s): milliseconds, median (quartiles)\n")
    rows = [
        [name, *(spread([1000 * x for x in kinds[kind]]) for kind in ("cpu", "wall"))] for name, kinds in times.items()
    ]
    print(table(["", "CPU", "wall"], rows))
    print("\nCPU time, ratio within a round, median (quartiles)\n")
    print(
        table(["", "ratio", "bar"], [[name, spread(ratios, 2), bar] for name, ratios, bar in bars(times)]), flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=None, help="JSON lines: one per candidate and number of threads")
    parser.add_argument("--skip-memory", action="store_true", help="leave out 1,024 cells x 1,000,000 features")
    parser.add_argument("--memory", nargs=4, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory is not None:
        cells, features, precision, likelihood = options.memory
        print(extra_memory(int(cells), int(features), precision, likelihood))
        return
    about = {**describe_machine(), "onednn": has_onednn(), "bf16": has_bf16()}
    lines: list[dict[str, Any]] = []
    found = candidates()
    for threads in options.threads:
        torch.set_num_threads(threads)
        times = measure(found, options.rounds)
        show(times, threads)
        for name, kinds in times.items():
            values = {f"{kind}_seconds": quartiles(kinds[kind]) for kind in kinds}
            lines.append({"candidate": name, "threads": threads, "rounds": options.rounds, **values, **about})
        lines += [
            {"ratio": name, "threads": threads, "cpu_ratio": quartiles(r), "bar": bar, **about}
            for name, r, bar in bars(times)
        ]
    found.clear()
    if not options.skip_memory:
        print("\nextra memory of nm at 1,024 x 1,000,000 (bar <= 64 MiB)")
        for row in memory_rows():
            print(f"  {row['precision']:8} {row['likelihood']:9} {row['extra_mib']:6.1f} MiB")
            lines.append({**row, **about})
    if options.output is not None:
        options.output.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
