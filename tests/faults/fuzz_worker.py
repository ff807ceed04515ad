"""Feeds wrong files to the readers and says what became of each: `python tests/faults/fuzz_worker.py FOLDER`.

For every line of its standard input, a seed and a kind of file, it makes one wrong file, reads it as users do, and
prints a line of JSON. A process of its own, as HDF5 and compiled loops can end one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import io
import json
import logging
import re
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import mudata
import numpy as np
import pandas as pd
import scipy.sparse
import torch
from mutations import Draw, wrong_bytes, wrong_hdf5, wrong_json, wrong_toml

import liam_scale
from liam_scale.command import Command
from liam_scale.config import TrainConfig
from liam_scale.kernels.sparse_linear import sparse_linear
from liam_scale.training.checkpoint import MANIFEST
from loaders import Loader, LoaderConfig
from loaders.csr import SparseRows
from loaders.ecosystem import plain_mudata, quiet_anndata
from loaders.ingest import ingest
from loaders.minibatch import SparseCounts
from loaders.schema import SCHEMA_KEY, sha256_of_json
from loaders.stores import open_store
from loaders.synthetic import simulate

MOSAIC = [("rna", "atac", "adt"), ("rna", "adt"), ("atac",)]
SIZES = {"num_genes": 20, "num_peaks": 30, "num_proteins": 5, "genes_per_cell": 6, "peaks_per_cell": 8}
OPTIONS: dict[str, Any] = {
    "batch_key": "sample",
    "model": "rna-only",
    "n_hidden": 4,
    "n_latent": 2,
    "minibatch": 16,
    "max_steps": 2,
    "checkpoint_steps": 1,
    "memory": "32MiB",
    "threads": 1,
}
CURE = re.compile(
    r"\b(again|name|give|choose|rename|correct|replace|remove|look for|add|read it|call|write|store integer|bring|leave"
    r"|restore|update|lower|expected|save|make|use|drop|split|put|raise|columns are|map|Missing from)\b"
)
MEMORY = 12 << 30


class Silent(Exception):
    """What was read differs from what stands in the file."""


class Names:
    """What an error must name: one of these."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def judge(self, error: Exception) -> str:
        if isinstance(error, Silent):
            return "silent"
        if not isinstance(error, ValueError | RuntimeError) or isinstance(error, RecursionError | UnicodeError):
            return "unexplained"
        text = str(error)
        return "clear" if any(name in text for name in self.names) and CURE.search(text) else "unnamed"


def all_of(path: Any) -> dict[str, Any]:
    """Whatever training, embedding and decoding may ask a store for; by what it belongs to."""
    store = open_store(path)
    try:
        held: dict[str, Any] = {"cells": store.cell_ids(0, store.schema.num_cells).tolist()}
        for name in store.schema.obs_columns:
            try:
                column = store.obs_column(name)
            except ValueError as error:
                if "got values of type" not in str(error):
                    raise
                continue
            held[f"obs {name}"] = [None if code < 0 else column.categories[code] for code in column.codes]
        for name in store.schema.modalities:
            rows, matrix = store.modality_rows(name), store.matrix(name)
            part = matrix.read(0, matrix.num_rows)
            held[f"{name} rows"] = None if rows is None else rows.tolist()
            held[f"{name} totals"] = store.totals(name).tolist()
            held[f"{name} names"] = store.feature_names(name).tolist()
            held[f"{name} counts"] = [array.tolist() for array in (part.indptr, part.indices, part.values)]
            held[f"{name} as a window"] = _through_a_loader(store, name)
        return held
    finally:
        store.close()


def _through_a_loader(store: Any, name: str) -> float:
    options = LoaderConfig(minibatch=16, memory="32MiB", threads=1, validation_share=0.0)
    with Loader(store, options, modalities=(name,), shuffle=False, transpose=True) as loader:
        return float(sum(float(minibatch.counts[name].values.double().sum()) for minibatch in loader))


def same_parts(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse to pass over anything that differs; a part that is not there was not read."""
    for name, value in found.items():
        if name not in expected or expected[name] != value:
            raise Silent(f"{name} differs")


# Targets: each makes one wrong file in a folder and reads it. -------------------------------------------------------


def sealed_schema(entry: Any) -> Any:
    schema = entry.get("attributes", {}).get(SCHEMA_KEY) if isinstance(entry.get("attributes"), dict) else None
    if isinstance(schema, dict) and "sha256" in schema:
        schema.pop("sha256")
        schema["sha256"] = sha256_of_json(schema)
    return entry


def schema(base: Path, folder: Path, draw: Draw) -> None:
    shutil.copytree(base / "a.zarr", folder / "a.zarr")
    file = folder / "a.zarr" / "zarr.json"
    file.write_bytes(wrong_json(file.read_text(), draw, seal=sealed_schema))
    same_parts(all_of(folder / "a.zarr"), json.loads((base / "expected.json").read_text()))


def sealed_record(entry: Any) -> Any:
    if isinstance(entry, dict) and "sha256" in entry:
        entry = {key: value for key, value in entry.items() if key != "sha256"}
        entry["sha256"] = sha256_of_json(entry)
    return entry


def run_file(base: Path, folder: Path, draw: Draw, name: str = "run.json") -> None:
    shutil.copytree(base / "run", folder / "run")
    file = folder / "run" / name
    is_sealed = bool(draw.integers(2))
    wrong = (
        (wrong_json(file.read_text(), draw, seal=sealed_record if is_sealed else lambda e: e))
        if (name.endswith(".json"))
        else wrong_toml(file.read_text(), draw)
    )
    file.write_bytes(wrong)
    run = liam_scale.load_run(folder / "run")
    run.embedding(base / "a.zarr")
    liam_scale.train(base / "a.zarr", out=folder / "run", **{**OPTIONS, "max_steps": 3})


def features(base: Path, folder: Path, draw: Draw) -> None:
    shutil.copytree(base / "run", folder / "run")
    file = folder / "run" / "features.json"
    file.write_bytes(wrong_json(file.read_text(), draw))
    found = liam_scale.load_run(folder / "run").directory.features()
    if found != json.loads((base / "run" / "features.json").read_text()):
        raise Silent("other names")


def run_options(base: Path, folder: Path, draw: Draw) -> None:
    run_file(base, folder, draw, "config.toml")


def history(base: Path, folder: Path, draw: Draw) -> None:
    shutil.copytree(base / "run", folder / "run")
    file = folder / "run" / "history.csv"
    text = file.read_text()
    file.write_bytes(wrong_bytes(text.encode(), draw) if draw.integers(2) else _wrong_csv(text, draw).encode())
    found = liam_scale.load_run(folder / "run").history
    if not all(np.issubdtype(kind, np.number) for kind in found.dtypes):
        raise Silent(f"columns of {set(map(str, found.dtypes))}")


def _wrong_csv(text: str, draw: Draw) -> str:
    lines = text.splitlines()
    number = int(draw.integers(len(lines)))
    cells = lines[number].split(",")
    place = int(draw.integers(len(cells)))
    odd = ("", "x", "nan", "1e999", '"', "1,2", "\0", "-", "9" * 5000, "step", "\n", "0x1")
    cells[place] = odd[int(draw.integers(len(odd)))]
    lines[number] = ",".join(cells)
    return "\n".join([*lines, *(lines[number:] if draw.integers(4) == 0 else ())])


def checkpoint(base: Path, folder: Path, draw: Draw, name: str) -> None:
    shutil.copytree(base / "run", folder / "run")
    newest = max((folder / "run" / "checkpoints").iterdir())
    for older in (folder / "run" / "checkpoints").iterdir():
        if older != newest:
            shutil.rmtree(older)
    file = newest / name
    text = file.read_text()
    file.write_bytes(wrong_json(text, draw))
    manifest = newest / MANIFEST
    if file != manifest:
        entry = json.loads(manifest.read_text())
        entry[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(entry))
    liam_scale.train(base / "a.zarr", out=folder / "run", **{**OPTIONS, "max_steps": 3})


def manifest(base: Path, folder: Path, draw: Draw) -> None:
    checkpoint(base, folder, draw, MANIFEST)


def state(base: Path, folder: Path, draw: Draw) -> None:
    checkpoint(base, folder, draw, "state.json")


def options(base: Path, folder: Path, draw: Draw) -> None:
    """What a user gives to --config, through the command as it is started."""
    file = folder / "given.toml"
    file.write_bytes(wrong_toml((base / "run" / "config.toml").read_text(), draw))
    command = Command(TrainConfig, lambda _: None, prog="train", description="")
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            code = command(["--config", str(file)])
        except SystemExit as stop:
            code = int(stop.code or 0)
    text = said.getvalue()
    if "Traceback" in text or (code and re.search(r"^error: \w+Error", text)):
        raise TypeError(text)
    if code:
        raise ValueError(text)


def hdf5(base: Path, folder: Path, draw: Draw, name: str) -> None:
    file = shutil.copy(base / name, folder / name)
    if draw.integers(4) == 0:
        file.write_bytes(wrong_bytes(file.read_bytes(), draw))
    else:
        with h5py.File(file, "a") as opened:
            wrong_hdf5(opened, draw)
    found = all_of(file)
    # Writing a store takes a second; what it reads it reads through the same rooms.
    if draw.integers(4) == 0 and ingest(file, out=folder / "o.zarr", progress=False).num_cells != len(found["cells"]):
        raise Silent("ingest keeps other cells")
    _as_others_read_it(file, found)


def _as_others_read_it(file: Path, found: dict[str, Any]) -> None:
    """Hold what was read against anndata, mudata, or the plain arrays of a 10x matrix, where those read it at all."""
    try:
        if file.suffix == ".h5mu":
            with plain_mudata():
                parts = {name: (part.X, part.var_names) for name, part in mudata.read_h5mu(file).mod.items()}
        elif file.suffix == ".h5ad":
            whole = anndata.read_h5ad(file)
            parts = {"rna": (whole.X, whole.var_names)}
        else:
            with h5py.File(file) as opened:
                group = opened["matrix"]
                arrays = tuple(group[name][:] for name in ("data", "indices", "indptr"))
                whole = scipy.sparse.csr_matrix(arrays, shape=tuple(group["shape"][:])[::-1])
            parts = {"rna": (whole, None)}
        sums = {
            name: (scipy.sparse.csr_matrix(matrix).astype(np.float64), names) for name, (matrix, names) in parts.items()
        }
    except Exception:
        return
    for name, (rows, names) in sums.items():
        if f"{name} counts" not in found or rows.shape[1] != len(found[f"{name} names"]):
            continue  # it was taken for another modality, or split by type
        rows.sum_duplicates()
        rows.eliminate_zeros()
        indptr, indices, values = found[f"{name} counts"]
        own = scipy.sparse.csr_matrix((np.array(values, np.float64), indices, indptr), shape=rows.shape)
        own.sum_duplicates()
        own.eliminate_zeros()
        pairs = ((getattr(own, part), getattr(rows, part)) for part in ("data", "indices", "indptr"))
        same = all(np.array_equal(*pair, equal_nan=True) for pair in pairs)
        if not same or (names is not None and list(map(str, names)) != found[f"{name} names"]):
            raise Silent(f"{name} differs from what others read")


def h5ad(base: Path, folder: Path, draw: Draw) -> None:
    hdf5(base, folder, draw, "a.h5ad")


def h5mu(base: Path, folder: Path, draw: Draw) -> None:
    hdf5(base, folder, draw, "a.h5mu")


def tenx(base: Path, folder: Path, draw: Draw) -> None:
    hdf5(base, folder, draw, "a.h5")


def foreign_zarr(base: Path, folder: Path, draw: Draw) -> None:
    """Of others, without checksums: metadata and chunks."""
    shutil.copytree(base / f"foreign{draw.integers(2, 4)}.zarr", folder / "a.zarr")
    files = sorted(path for path in (folder / "a.zarr").rglob("*") if path.is_file() and path.stat().st_size)
    documents = [path for path in files if path.suffix == ".json" or path.name.startswith(".z")]
    chosen = documents if draw.integers(3) else files
    file = chosen[int(draw.integers(len(chosen)))]
    whole = file.read_bytes()
    file.write_bytes(wrong_json(whole.decode(), draw) if file in documents else wrong_bytes(whole, draw))
    if file.name != ".zmetadata":  # which would hide what stands in the folders
        (folder / "a.zarr" / ".zmetadata").unlink(missing_ok=True)
    all_of(folder / "a.zarr")


def blocks(base: Path, folder: Path, draw: Draw) -> None:
    """The three arrays of a matrix in memory, where nothing has looked at them before."""
    whole = anndata.read_h5ad(base / "a.h5ad")
    layout = ("csr", "csc")[int(draw.integers(2))]
    matrix = whole.X.asformat(layout)
    name = ("indptr", "indices", "data")[int(draw.integers(3))]
    array = getattr(matrix, name)
    place = int(draw.integers(len(array)))
    odd = (-1, -(2**31), 2**31 - 1, len(matrix.data) + 1, 10**6, *matrix.shape)
    if draw.integers(3):
        array[place] = odd[int(draw.integers(len(odd)))]
    else:
        setattr(matrix, name, array[:place])
    kind = draw.integers(4)
    if kind == 0:
        SparseRows.from_scipy(matrix)
    elif kind == 1:
        counts = SparseCounts.from_scipy(matrix)
        sparse_linear(counts, [torch.ones(counts.num_features, 3)], log1p=[False])
    else:
        whole._X = matrix  # the setter would look at it
        all_of(whole)


TARGETS: dict[str, tuple[Callable[[Path, Path, Draw], None], Names]] = {
    "schema": (schema, Names("a.zarr")),
    "run": (run_file, Names("run.json", "/run", "a.zarr")),
    "features": (features, Names("features.json")),
    "run options": (run_options, Names("config.toml", "/run")),
    "options": (options, Names("given.toml")),
    "history": (history, Names("history.csv")),
    "manifest": (manifest, Names("/checkpoints")),
    "state": (state, Names("/checkpoints")),
    "h5ad": (h5ad, Names("a.h5ad")),
    "h5mu": (h5mu, Names("a.h5mu")),
    "10x": (tenx, Names("a.h5")),
    "zarr": (foreign_zarr, Names("a.zarr")),
    "blocks": (blocks, Names("in memory", "matrix", "counts", "rows")),
}


def make_base(folder: Path) -> None:
    """Sound files of every kind, and what is read from the store."""
    if (folder / "expected.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    simulate(folder / "a.zarr", num_cells=60, num_samples=3, num_types=2, mosaic=MOSAIC, **SIZES)
    liam_scale.train(folder / "a.zarr", out=folder / "run", **OPTIONS)
    with plain_mudata():
        whole = mudata.read_zarr(folder / "a.zarr")
        whole.write_h5mu(folder / "a.h5mu")
    rna = whole["rna"]
    numbers = pd.Series(np.arange(rna.n_obs) % 3, index=rna.obs_names)
    rna.obs = pd.DataFrame(
        {"donor": pd.Categorical(numbers.map("d{}".format)), "number": numbers, "is_odd": numbers == 1}
    )
    rna.var = pd.DataFrame({"length": np.arange(rna.n_vars)}, index=rna.var_names)
    plain = anndata.AnnData(scipy.sparse.csr_matrix(rna.X).astype(np.float32), obs=rna.obs, var=rna.var)
    plain.layers["counts"] = plain.X.copy()
    plain.write_h5ad(folder / "a.h5ad")
    for version in (2, 3):
        with quiet_anndata(version):
            plain.write_zarr(folder / f"foreign{version}.zarr")
    document = folder / "foreign3.zarr" / "zarr.json"
    entry = json.loads(document.read_text())
    entry.pop("consolidated_metadata", None)
    document.write_text(json.dumps(entry))
    _write_tenx(folder / "a.h5", plain)
    (folder / "expected.json").write_text(json.dumps(all_of(folder / "a.zarr")))


def _write_tenx(path: Path, plain: anndata.AnnData) -> None:
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = plain.obs_names.to_numpy().astype("S")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(plain.X, name).astype(np.int32 if name != "indptr" else np.int64)
        group["shape"] = np.array(plain.shape[::-1])
        features = group.create_group("features")
        features["name"] = features["id"] = plain.var_names.to_numpy().astype("S")
        features["feature_type"] = np.array(["Gene Expression"] * plain.n_vars, "S")


def try_one(base: Path, target: str, seed: int) -> tuple[str, str]:
    feed, names = TARGETS[target]
    folder = base.parent / f"input-{target.replace(' ', '-')}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            feed(base, folder, np.random.default_rng([seed, *target.encode()]))
    except Exception as error:
        return names.judge(error), f"{type(error).__name__}: {error}"
    return "right", ""


def main() -> None:
    base = Path(sys.argv[1])
    faulthandler.register(signal.SIGUSR2, all_threads=False)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        make_base(base)
    print("ready", flush=True)
    for line in sys.stdin:
        seed, target = line.rstrip("\n").split(" ", 1)
        outcome, text = try_one(base, target, int(seed))
        print(json.dumps({"seed": int(seed), "outcome": outcome, "text": text[:600]}), flush=True)


if __name__ == "__main__":
    main()
