"""This project's loader under measurement, and the floor beneath it; run by benchmarks/loader.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from itertools import chain, count
from pathlib import Path

import numpy as np
from harness import serve
from process_memory import drop_from_page_cache, peak_of_process

from loaders.formats import sharded
from loaders.loader import Loader
from loaders.options import LoaderConfig
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
        chosen = {key: self.options[key] for key in ("transpose", "modalities", "values")}
        config = LoaderConfig(**{key: self.options[key] for key in ("minibatch", "memory", "streams", "threads")})
        if self.options.get("obs"):
            chosen |= {"sample": "sample", "obs": ("cell_type",)}
        return Loader(self.store, config, subset="all", **chosen)

    def __call__(self) -> dict:
        if self.options["cold"]:
            drop_from_page_cache(self.options["paths"])
        waited, start, cpu, cells, first = self.loader.waited_seconds, time.perf_counter(), time.process_time(), 0, None
        for minibatch in self.loader:
            first = time.perf_counter() - start if first is None else first
            cells += minibatch.num_cells
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        waited = self.loader.waited_seconds - waited
        result = {"cells": cells, "wall": wall, "cpu": cpu, "first_seconds": first, "waited": waited}
        return {**result, "rss_mib": peak_of_process()}


class Fresh:
    """A new process every round, as memory that was used once stays with a process."""

    def __init__(self, options: dict) -> None:
        self.command = [sys.executable, __file__, json.dumps({**options, "kind": "once"})]

    def __call__(self) -> dict:
        done = subprocess.run(self.command, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.strip().rsplit("\n", 1)[-1])


def once(options: dict) -> dict:
    """Seconds from the path to the first minibatch; then speed and memory over a fixed number of cells."""
    small = {**options, "minibatch": 16, "memory": "100MiB"}
    next(iter(Epochs(small).loader))  # loads the kernels
    base = resident_mib()
    with Peak() as peak:
        start = time.perf_counter()
        epochs = Epochs(options)
        iterator = iter(epochs.loader)
        next(iterator)
        first = time.perf_counter() - start
        # What the first windows and fresh memory cost is not the speed.
        minibatches = chain(iterator, chain.from_iterable(epochs.loader for _ in count()))
        warm, cells, limit = 0, 0, options["cells"]
        while warm < limit / 2:
            warm += next(minibatches).num_cells
        start, cpu = time.perf_counter(), time.process_time()
        while cells < limit:
            cells += next(minibatches).num_cells
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    window = epochs.loader.window_cells * epochs.loader.streams
    epochs.loader.close()
    result = {"cells": cells, "wall": wall, "cpu": cpu, "first_seconds": first, "window": window}
    return {**result, "added_mib": peak.mib - base, "rss_mib": peak.mib}


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
    if chosen["kind"] == "once":
        print(json.dumps(once(chosen)))
    else:
        serve({"epochs": Epochs, "fresh": Fresh, "floor": Floor}[chosen["kind"]](chosen))
