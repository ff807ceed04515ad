"""The contract of a rival: one program, MuData in, latent out, in the rival's environment, without this project.

    PYTHON benchmarks/rivals/NAME.py DATA.h5mu --out latent.csv --batch-key batch --seed 0 [--max-epochs 50]

The MuData has raw counts in `rna`, `atac`, `adt`, and the batch in `obs`. `latent.csv` gets a row a cell, its id first.
One JSON line tells seconds of wall and CPU (of all threads, without reading the data), peak RSS in MB (of the largest
process), epochs (None where there are none), and versions.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

Fit = Callable[[Any, argparse.Namespace], tuple[Any, "int | None"]]
"""From the MuData and the options: (n, d) latent in the order of the cells, and epochs."""


def compete(
    fit: Fit, *packages: str, options: Callable[[argparse.ArgumentParser], object] = lambda parser: None
) -> None:
    """Run `fit` as the contract says; `options` adds some of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch-key", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-epochs", type=int, default=None)
    options(parser)
    arguments = parser.parse_args()
    arguments.versions = {}  # of what is no package of Python
    warnings.simplefilter("ignore")
    import mudata
    import numpy
    import pandas

    if hasattr(mudata, "set_options"):
        mudata.set_options(pull_on_update=False)
    data = mudata.read_h5mu(arguments.data)
    numpy.random.seed(arguments.seed)  # noqa: NPY002  rivals draw from it
    wall, cpu = time.perf_counter(), time.process_time()
    latent, epochs = fit(data, arguments)
    measured: dict[str, Any] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    children = os.times()
    measured["cpu"] += children.children_user + children.children_system
    pandas.DataFrame(numpy.asarray(latent), index=data.obs_names).to_csv(arguments.out)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    measured["peak_rss_mb"] = max(peak, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024
    measured["epochs"] = epochs
    measured["versions"] = {name: importlib.metadata.version(name) for name in packages} | arguments.versions
    print(json.dumps(measured), flush=True)


def normalized(name: str, counts: Any) -> Any:
    """Counts of one modality, dense: log RNA, log TF-IDF of ATAC, centred log-ratios of ADT."""
    import numpy
    import scipy.sparse

    counts = scipy.sparse.csr_matrix(counts, dtype=numpy.float64)
    if name == "adt":
        logs = numpy.log1p(counts.toarray())
        return logs - logs.mean(axis=1, keepdims=True)
    shares = scipy.sparse.diags(1 / numpy.maximum(counts.sum(axis=1).A1, 1)) @ counts
    if name == "atac":
        shares = shares @ scipy.sparse.diags(counts.shape[0] / (1 + counts.getnnz(axis=0)))
    shares.data = numpy.log1p(1e4 * shares.data)
    return shares.toarray()


def components(data: Any, width: int = 20) -> Any:
    """(n, d) SVD of log RNA, LSI of ATAC and SVD of the log-ratios of ADT side by side, of equal variance."""
    import numpy
    from sklearn.decomposition import PCA

    blocks = []
    for name, modality in data.mod.items():
        values = normalized(name, modality.X)
        own = PCA(min(width, min(values.shape) - 1), random_state=0).fit_transform(values)
        rows = data.obs_names.get_indexer(modality.obs_names)
        block = numpy.zeros((len(data), own.shape[1]))
        block[rows] = own / numpy.sqrt((own**2).sum(axis=1).mean())
        blocks.append(block)
    return numpy.concatenate(blocks, axis=1)
