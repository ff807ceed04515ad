"""This project's loader under measurement, and the floor beneath it; run by benchmarks/loader.py."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
from harness import serve
from page_cache import drop_from_page_cache

from loaders.loader import Loader
from loaders.stores import sharded
from loaders.stores.open import open_store


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Peak:
    """Largest resident memory within a block, read every 2 ms."""

    def __enter__(self) -> Peak:
        self.mib, self._is_over = resident_mib(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._is_over.wait(0.002):
            self.mib = max(self.mib, resident_mib())

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        self._thread.join()


class Epochs:
    """Epochs over all cells of a store."""

    def __init__(self, options: dict) -> None:
        self.options = options
        if not options.get("checksum", True):
            sharded.verify_chunk = lambda packed: None
        self.store = self.open()
        self.loader = self.make()

    def open(self):
        source = self.options["paths"][0]
        return open_store(source, **self.options.get("open", {}))

    def make(self) -> Loader:
        chosen = {key: self.options[key] for key in ("minibatch", "memory", "transpose", "threads", "modalities")}
        if self.options.get("obs"):
            chosen |= {"sample_key": "sample", "obs": ("cell_type",)}
        return Loader(self.store, subset="all", **chosen)

    def __call__(self) -> dict:
        if self.options["cold"]:
            drop_from_page_cache(self.options["paths"])
        waited, start, cpu, cells, first = self.loader.waited_seconds, time.perf_counter(), time.process_time(), 0, None
        for minibatch in self.loader:
            first = time.perf_counter() - start if first is None else first
            cells += minibatch.num_cells
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        waited = self.loader.waited_seconds - waited
        return {"cells": cells, "wall": wall, "cpu": cpu, "first_seconds": first, "waited": waited}


class FirstEpoch(Epochs):
    """A new store and loader every time: seconds to the first minibatch, and the peak of memory over an epoch."""

    def __call__(self) -> dict:
        base = resident_mib()
        with Peak() as peak:
            start = time.perf_counter()
            self.store = self.open()
            self.loader = self.make()
            iterator = iter(self.loader)
            cells = next(iterator).num_cells
            first = time.perf_counter() - start
            cells += sum(minibatch.num_cells for minibatch in iterator)
        wall = time.perf_counter() - start
        sizes = self.loader.window_cells * self.loader.streams
        return {"cells": cells, "wall": wall, "first_seconds": first, "added_mib": peak.mib - base, "window": sizes}

    def __init__(self, options: dict) -> None:
        self.options = options


class Floor:
    """Read every array from its beginning to its end and decode it: what no loader can be faster than."""

    def __init__(self, options: dict) -> None:
        self.folders = [Path(options["paths"][0]) / "mod" / name / "X" for name in options["modalities"]]
        self.cells = json.loads((Path(options["paths"][0]) / "zarr.json").read_text())["attributes"]["liam_scale"][
            "num_cells"
        ]

    def __call__(self) -> dict:
        for folder in self.folders:
            for name in ("data", "indices"):
                array = sharded.ShardedArray(folder / name)
                step = array.layout.chunk * 16
                out = np.empty(step, array.layout.dtype)
                for start in range(0, array.layout.length, step):
                    array.read_into(start, out[: min(step, array.layout.length - start)])
        return {"cells": self.cells}


if __name__ == "__main__":
    chosen = json.loads(sys.argv[1])
    serve({"epochs": Epochs, "first": FirstEpoch, "floor": Floor}[chosen["kind"]](chosen))
