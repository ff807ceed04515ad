"""Peak memory and speed of ingest as the sources grow: MuData files of simulated RNA + ATAC, 20,000 and 200,000 cells.

    python benchmarks/ingest.py [--cells 20000 200000] [--memory 256MiB]
    python benchmarks/ingest.py --cells 40000 --dask local:1 local:2
    python benchmarks/ingest.py --cells 100000 --annbatch-python /path/to/venv/bin/python

Peak RSS is VmHWM of the ingesting process (ru_maxrss would be its parent's, which simulates: Linux keeps it over exec).
The source is plain HDF5 (float32 values, int32 indices, as scanpy writes counts). With --dask the workers of a cluster
of this machine, a thread each, take turns instead, and the bytes that they write are compared. With --annbatch-python
RNA alone, an h5ad file, is ingested, and made into its collection by annbatch with its defaults.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import zarr
from anndata.io import read_elem, write_elem
from harness import ROOT, describe_machine, quartiles, spread, table

STEP = 2**22


def copy_as_h5mu(store: Path, out: Path) -> None:
    """A MuData store as an h5mu file, matrix by matrix in pieces."""
    source = zarr.open_group(store, mode="r")
    with h5py.File(out, "w", userblock_size=512) as file:
        for name in ("obs", "var", "obsmap", "varmap", "obsm", "varm"):
            write_elem(file, name, read_elem(source[name]))
        file.attrs.update({"axis": 0, "encoding-type": "MuData", "encoding-version": "0.1.0"})
        for modality in source["mod"]:
            copy_modality(source["mod"][modality], file.require_group(f"mod/{modality}"))


def copy_modality(group: zarr.Group, target: h5py.Group) -> None:
    target.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    for name in ("obs", "var"):
        write_elem(target, name, read_elem(group[name]))
    matrix = target.create_group("X")
    matrix.attrs.update(dict(group["X"].attrs))
    for name, dtype in (("data", "f4"), ("indices", "i4"), ("indptr", "i8")):
        values = group["X"][name]
        array = matrix.create_dataset(name, shape=values.shape, dtype=dtype, chunks=(min(2**17, *values.shape),))
        for start in range(0, values.shape[0], STEP):
            array[start : start + STEP] = values[start : start + STEP]


def copy_rna_as_h5ad(store: Path, out: Path) -> None:
    with h5py.File(out, "w") as file:
        copy_modality(zarr.open_group(store, mode="r")["mod/rna"], file)


def measure(source: Path, out: Path, memory: str, dask: str | None = None) -> dict[str, float]:
    """Seconds and peak memory of one ingest in a process of its own."""
    program = (
        "import json, resource, sys, time; from loaders.ingest import ingest; start = time.time(); "
        "ingest(sys.argv[1], out=sys.argv[2], memory=sys.argv[3], dask=sys.argv[4] or None, overwrite=True, "
        "progress=False); "
        "wall = time.time() - start; usage = resource.getrusage(resource.RUSAGE_SELF); "
        "cpu = usage.ru_utime + usage.ru_stime; "
        "peak = next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')); "
        "print(json.dumps({'wall': wall, 'cpu': cpu, 'peak': peak * 1024}))"
    )
    return run([sys.executable, "-c", program, str(source), str(out), memory, dask or ""])


def run(command: list[str]) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def digest(store: Path) -> str:
    """Of all that stands in a folder."""
    found = hashlib.sha256()
    for file in sorted(path for path in store.rglob("*") if path.is_file()):
        found.update(str(file.relative_to(store)).encode() + file.read_bytes())
    return found.hexdigest()


def compare_workers(source: Path, out: Path, options: argparse.Namespace, cells: int) -> None:
    """Numbers of Dask workers in turn."""
    seconds: dict[str, list[float]] = {dask: [] for dask in options.dask}
    digests = set()
    for turn in range(options.rounds):
        for place in range(len(options.dask)):
            dask = options.dask[(turn + place) % len(options.dask)]
            result = measure(source, out, options.memory, dask)
            print(json.dumps({"cells": cells, "dask": dask, **result}), flush=True)
            seconds[dask].append(result["wall"])
            digests.add(digest(out))
    first = quartiles(seconds[options.dask[0]])[0]
    rows = [
        (dask, spread(own), f"{cells / quartiles(own)[0]:,.0f}", f"{first / quartiles(own)[0]:.2f}")
        for dask, own in seconds.items()
    ]
    print(table((f"{cells:,} cells", "seconds", "cells/s", f"x {options.dask[0]}"), rows))
    print("all wrote the same bytes" if len(digests) == 1 else f"{len(digests)} different stores were written")


def compare_annbatch(source: Path, folder: Path, options: argparse.Namespace, cells: int) -> None:
    """Its writer and ours in turn, on the same h5ad."""
    program = [str(options.annbatch_python), str(ROOT / "benchmarks" / "loader_annbatch.py"), "ingest", str(source)]
    found: dict[str, list[dict[str, float]]] = {"liam-scale": [], "annbatch": []}
    for turn in range(options.rounds):
        for name in list(found)[:: 1 if turn % 2 else -1]:
            out = folder / f"{name}.zarr"
            ours = name == "liam-scale"
            found[name].append(measure(source, out, options.memory) if ours else run([*program, str(out)]))
            print(json.dumps({"cells": cells, "who": name, **found[name][-1]}), flush=True)
            shutil.rmtree(out)
    rows = [
        (
            name,
            spread([r["wall"] for r in own]),
            spread([r["cpu"] for r in own]),
            f"{max(r['peak'] for r in own) / 1e6:,.0f}",
        )
        for name, own in found.items()
    ]
    print(table((f"{cells:,} cells of RNA", "seconds", "CPU seconds", "peak RSS MB"), rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--genes", type=int, default=13_431)
    parser.add_argument("--peaks", type=int, default=116_490)
    parser.add_argument("--genes-per-cell", type=float, default=800)
    parser.add_argument("--peaks-per-cell", type=float, default=3_600)
    parser.add_argument("--memory", default="256MiB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dask", nargs="+", help="clusters to compare, such as local:1 local:2")
    parser.add_argument("--annbatch-python", type=Path)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "liam-scale-benchmarks" / "ingest")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from loaders.synthetic import simulate

    options.folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps(describe_machine("anndata", "h5py", "zarr", "numba")), flush=True)
    sources = {}
    copy = copy_as_h5mu if options.annbatch_python is None else copy_rna_as_h5ad
    peaks, suffix = (options.peaks, "h5mu") if options.annbatch_python is None else (0, "h5ad")
    for cells in options.cells:
        sources[cells] = options.folder / f"{cells}-{options.genes}-{peaks}.{suffix}"
        if not sources[cells].exists():
            store = options.folder / "simulated.zarr"
            simulate(
                store, num_cells=cells, num_genes=options.genes, num_peaks=peaks,
                genes_per_cell=options.genes_per_cell, peaks_per_cell=options.peaks_per_cell, overwrite=True,
            )  # fmt: skip
            copy(store, sources[cells].with_suffix(".part"))
            sources[cells].with_suffix(".part").rename(sources[cells])
            shutil.rmtree(store)
    if options.annbatch_python is not None:
        for cells, source in sources.items():
            compare_annbatch(source, options.folder, options, cells)
        return
    if options.dask:
        for cells, source in sources.items():
            compare_workers(source, options.folder / "out.zarr", options, cells)
        return
    best: dict[int, dict[str, float]] = {}
    for _ in range(options.rounds):
        for cells, source in sources.items():
            result = measure(source, options.folder / "out.zarr", options.memory)
            print(json.dumps({"cells": cells, **result}), flush=True)
            kept = best.setdefault(cells, result)
            # The quickest of noisy times, the highest of peaks.
            best[cells] = {name: (max if name == "peak" else min)(kept[name], result[name]) for name in result}
    shutil.rmtree(options.folder / "out.zarr")
    rows = []
    for cells, result in best.items():
        size = sources[cells].stat().st_size
        rows.append([
            f"{cells:,}", f"{size / 1e9:.2f}", f"{result['wall']:.1f}", f"{cells / result['wall']:,.0f}",
            f"{size / 1e6 / result['wall']:,.0f}", f"{result['cpu']:.1f}", f"{result['peak'] / 1e6:,.0f}",
        ])  # fmt: skip
    header = ["cells", "source GB", "seconds", "cells/s", "source MB/s", "CPU seconds", "peak RSS MB"]
    print(table(header, rows))
    peaks = [result["peak"] for result in best.values()]
    print(f"largest over smallest peak: {max(peaks) / min(peaks):.3f} (memory={options.memory})")


if __name__ == "__main__":
    main()
