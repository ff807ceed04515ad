"""The peer tiledbsoma-ml, and the experiment that it and this project's loader read; run by benchmarks/loader.py."""

from __future__ import annotations

import json
import sys
import time

from harness import serve
from process_memory import peak_of_process


def prepare(store: str, out: str) -> None:
    """Write the RNA of a store as a SOMA experiment with the tiles that `tiledbsoma.io` makes by default."""
    import anndata
    import numpy as np
    import scipy.sparse
    import tiledbsoma.io
    import zarr

    group = zarr.open_group(store, mode="r")["mod/rna"]
    stored = anndata.io.read_elem(group["X"])
    # With indices and indptr of different types scipy copies the whole matrix for every row it is asked for.
    matrix = scipy.sparse.csr_matrix(
        (stored.data.astype(np.float32), stored.indices.astype(np.int32), stored.indptr.astype(np.int32)), stored.shape
    )
    adata = anndata.AnnData(matrix, obs=anndata.io.read_elem(group["obs"]), var=anndata.io.read_elem(group["var"]))
    # Its default of 100 million entries at a time takes more than 10 GB.
    pieces = {"tiledb": {"create": {"goal_chunk_nnz": 16_000_000}}}
    tiledbsoma.io.from_anndata(out, adata, measurement_name="RNA", platform_config=pieces)


class Epochs:
    """Epochs of sparse minibatches with the best setting known for tiledbsoma-ml."""

    def __init__(self, options: dict) -> None:
        import tiledbsoma
        from tiledbsoma_ml import ExperimentDataset

        query = tiledbsoma.Experiment.open(options["paths"][0]).axis_query("RNA")
        self.dataset = ExperimentDataset(
            query,
            layer_name="data",
            batch_size=options["minibatch"],
            io_batch_size=16_384,
            shuffle_chunk_size=2_048,
            shuffle=True,
            seed=0,
            return_sparse_X=True,
        )

    def __call__(self) -> dict:
        cells, first, start = 0, None, time.perf_counter()
        for matrix, _ in self.dataset:
            first = time.perf_counter() - start if first is None else first
            cells += matrix.shape[0]
        return {"cells": cells, "first_seconds": first, "rss_mib": peak_of_process()}


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "prepare":
        prepare(*arguments)
    elif command == "probe":
        import tiledbsoma_ml

        print(json.dumps({"tiledbsoma-ml": tiledbsoma_ml.__version__}))
    else:
        serve(Epochs(json.loads(arguments[0])))
