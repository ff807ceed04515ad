"""The peer annbatch, run by benchmarks/loader.py in an interpreter that has it; imports nothing of the project."""

from __future__ import annotations

import json
import sys
import time
import warnings

from harness import serve
from process_memory import drop_from_page_cache, peak_of_process

warnings.filterwarnings("ignore")


def prepare(source: str, out: str, dtype: str) -> None:
    """Write annbatch's own collection of an AnnData group with its defaults; only the type of the counts is chosen."""
    import anndata
    import numpy as np
    import zarr
    from annbatch import DatasetCollection

    def load(group: zarr.Group) -> anndata.AnnData:
        adata = anndata.AnnData(anndata.io.read_elem(group["X"]).astype(dtype), var=anndata.io.read_elem(group["var"]))
        adata.obs["number"] = np.arange(adata.n_obs)
        return adata

    collection = DatasetCollection(zarr.open_group(out, mode="w"))
    collection.add_adatas([zarr.open_group(source, mode="r")], load_adata=load, rng=np.random.default_rng(0))


def ingest(source: str, out: str) -> None:
    """Make its collection of an h5ad file, with its defaults."""
    import numpy as np
    import zarr
    from annbatch import DatasetCollection

    start, cpu = time.perf_counter(), time.process_time()
    collection = DatasetCollection(zarr.open_group(out, mode="w"))
    collection.add_adatas([source], rng=np.random.default_rng(0))
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak_of_process() * 2**20}))


class Epochs:
    """Epochs over one collection, or over several in lock-step."""

    def __init__(self, options: dict) -> None:
        import zarr

        # Its documentation's advice for speed: the Rust codec pipeline instead of zarr-python's.
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
        self.options, self.number = options, 0

    def loader(self, path: str):
        import numpy as np
        import zarr
        from annbatch import DatasetCollection, Loader

        loader = Loader(
            shuffle=True,
            batch_size=self.options["minibatch"],
            chunk_size=self.options["chunk"],
            preload_nchunks=self.options["preload"],
            rng=np.random.default_rng(self.number),
        )
        return loader.use_collection(DatasetCollection(zarr.open_group(path, mode="r")))

    def __call__(self) -> dict:
        if self.options["cold"]:
            drop_from_page_cache(self.options["paths"])
        self.number += 1
        start, cpu, cells, first = time.perf_counter(), time.process_time(), 0, None
        for minibatches in zip(*(self.loader(path) for path in self.options["paths"]), strict=True):
            first = time.perf_counter() - start if first is None else first
            cells += minibatches[0]["X"].shape[0]
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        return {"cells": cells, "wall": wall, "cpu": cpu, "first_seconds": first, "rss_mib": peak_of_process()}


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "prepare":
        prepare(*arguments)
    elif command == "ingest":
        ingest(*arguments)
    elif command == "probe":
        import annbatch
        import zarrs  # noqa: F401

        print(json.dumps({"annbatch": annbatch.__version__}))
    else:
        serve(Epochs(json.loads(arguments[0])))
