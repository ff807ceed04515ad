"""The loader against its peers and against its own floor: cells per second, CPU, memory, first minibatch.

    python benchmarks/loader.py --annbatch-python /path/to/venv/bin/python --soma-path /path/with/tiledbsoma_ml

annbatch (>= 0.3.1, with zarrs) wants Python 3.12, so it runs in an interpreter of its own; tiledbsoma-ml is found on
--soma-path beside this interpreter's tiledbsoma. A peer that is not there is left out, with a message. Every row is
one set of peers that take turns in rotating order; JSON lines first, then a table. --quick is for trying it out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness import ROOT, Peer, describe_machine, quartiles, spread, table, take_turns

HERE = Path(__file__).resolve().parent
SETTINGS = {"512x32": (512, 32), "2048x8": (2_048, 8)}
"""annbatch's chunk size and number of chunks preloaded: its default, and a better one for large stores."""

WINDOW_16K = {"rna": "190MiB", "atac": "580MiB"}
"""Memory with which the windows hold about 16,000 cells."""


Row = Callable[[], list[Peer]]
"""One comparison: the first of its peers is the one the others are compared with. Stores are made when it is called."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "liam-scale-loader-benchmark")
    parser.add_argument("--rna-cells", type=int, default=300_000)
    parser.add_argument("--atac-cells", type=int, default=100_000)
    parser.add_argument("--soma-cells", type=int, default=60_000)
    parser.add_argument("--flat-cells", type=int, nargs=2, default=(100_000, 2_000_000))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rows", nargs="+", help="only rows whose name contains one of these")
    parser.add_argument("--annbatch-python", type=Path)
    parser.add_argument("--soma-path", type=Path)
    parser.add_argument("--quick", action="store_true", help="small stores and three rounds")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.rna_cells, chosen.atac_cells, chosen.soma_cells, chosen.rounds = 40_000, 15_000, 10_000, 3
        chosen.flat_cells = (20_000, 100_000)
    return chosen


def store(folder: Path, name: str, *, cells: int, genes: int = 0, peaks: int = 0, genes_per_cell: float = 1_200) -> str:
    """Path of a simulated store, made when it is missing."""
    from loaders.synthetic import simulate

    path = folder / f"{name}-{cells}.zarr"
    if not path.exists():
        print(f"simulating {path}", file=sys.stderr)
        simulate(
            path, num_cells=cells, num_genes=genes, num_peaks=peaks, genes_per_cell=genes_per_cell, peaks_per_cell=3_000
        )
    return str(path)


class Peers:
    """Makes peers and what they read, each once."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.folder: Path = chosen.data
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cores = len(os.sched_getaffinity(0))
        self.annbatch_python = _probe([chosen.annbatch_python, HERE / "loader_annbatch.py"], "--annbatch-python")
        if chosen.soma_path is not None:
            os.environ["LOADER_SOMA_PATH"] = str(chosen.soma_path)
        self.has_soma = _probe([sys.executable, *_soma_script()], "--soma-path") is not None

    def ours(self, name: str, path: str, modalities: list[str] | None, **options: Any) -> Peer:
        chosen = {
            "kind": "epochs",
            "paths": [path],
            "modalities": modalities,
            "minibatch": 4_096,
            "memory": "1GiB",
            "transpose": False,
            "values": "float32",
            "streams": None,
            "threads": None,
            "cold": False,
            "obs": True,
            **options,
        }
        return Peer(name, [sys.executable, str(HERE / "loader_ours.py"), json.dumps(chosen)], threads=self.cores)

    def collection(self, path: str, modality: str, dtype: str) -> str:
        out = Path(path).with_suffix(f".{modality}.{dtype}.annbatch.zarr")
        if not out.exists():
            print(f"annbatch writes {out}", file=sys.stderr)
            source = str(Path(path) / "mod" / modality)
            command = [str(self.annbatch_python), str(HERE / "loader_annbatch.py"), "prepare", source, str(out), dtype]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return str(out)

    def annbatch(
        self, label: str, path: str, modalities: list[str], dtype: str, *, minibatch: int = 4_096, cold: bool = False
    ) -> list[Peer]:
        """annbatch with each of its settings; empty where it is not installed."""
        if self.annbatch_python is None:
            return []
        paths = [self.collection(path, modality, dtype) for modality in modalities]
        peers = []
        for name, (chunk, preload) in SETTINGS.items():
            options = {"paths": paths, "minibatch": minibatch, "chunk": chunk, "preload": preload, "cold": cold}
            command = [str(self.annbatch_python), str(HERE / "loader_annbatch.py"), "serve", json.dumps(options)]
            peers.append(Peer(f"annbatch ({label}) {name}", command, threads=self.cores))
        return peers


def _soma_script() -> list[str]:
    """A program that runs loader_soma.py with tiledbsoma_ml's folder on the path."""
    program = (
        "import os, runpy, sys; sys.path[:0] = filter(None, [os.environ.get('LOADER_SOMA_PATH')]);"
        f" sys.path.insert(0, {str(HERE)!r}); sys.argv[0] = 'loader_soma.py';"
        f" runpy.run_path({str(HERE / 'loader_soma.py')!r}, run_name='__main__')"
    )
    return ["-c", program]


def _probe(command: list[Any], option: str) -> str | None:
    """First word of the command if the peer answers, else None with a message."""
    if command[0] is not None:
        done = subprocess.run([*map(str, command), "probe"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            print(done.stdout.strip(), flush=True)
            return str(command[0])
        print(done.stderr.strip().rsplit("\n", 1)[-1], file=sys.stderr)
    print(f"a peer is left out: give {option} to compare with it", file=sys.stderr)
    return None


def warm(peers: Peers, name: str, path: str) -> list[Peer]:
    """Minibatch sizes, transposes, the floor, and annbatch on both of its collections."""
    one = [name]
    return [
        peers.ours("ours", path, one),
        peers.ours("ours, counts as stored", path, one, values="stored"),
        peers.ours("ours, minibatch 1024", path, one, minibatch=1_024),
        peers.ours("ours, minibatch 128", path, one, minibatch=128),
        peers.ours("ours, minibatch 128, transposed", path, one, minibatch=128, transpose=True),
        peers.ours("floor: sequential read and decode, one thread", path, one, kind="floor"),
        *peers.annbatch("b", path, one, "uint8"),
        *peers.annbatch("a", path, one, "float32"),
    ]


def foreign(peers: Peers, name: str, path: str) -> list[Peer]:
    """Both read the collection that annbatch writes by default."""
    if peers.annbatch_python is None:
        return []
    collection = peers.collection(path, name, "float32")
    ours = peers.ours("ours", collection, None, open={"modality": name}, obs=False)
    return [ours, *peers.annbatch("a", path, [name], "float32")]


def cold(peers: Peers, name: str, path: str) -> list[Peer]:
    return [peers.ours("ours", path, [name], cold=True), *peers.annbatch("b", path, [name], "uint8", cold=True)]


def first(peers: Peers, paths: dict[str, str], cells: int) -> list[Peer]:
    options = {"kind": "fresh", "cells": cells}
    return [
        peers.ours(f"ours, {name}, 16k-cell window", path, [name], memory=WINDOW_16K[name], **options)
        for name, path in paths.items()
    ]


def threads(peers: Peers) -> list[Peer]:
    """Reader threads, fewer and more than there are cores, at the paper's shape."""
    path = store(peers.folder, "paper", cells=20_000, genes=13_431, peaks=116_490, genes_per_cell=800)
    return [
        peers.ours(f"{name}, threads={number}", path, ["rna", "atac"], minibatch=1_024, threads=number, **options)
        for name, options in {"counts as stored": {"values": "stored"}, "transposed": {"transpose": True}}.items()
        for number in (1, 2, 4, 8)
    ]


def flat(peers: Peers, sizes: Sequence[int]) -> list[Peer]:
    """The same number of cells out of stores of different size."""
    result = []
    for cells in sizes:
        path = store(peers.folder, "flat", cells=cells, genes=4_000, genes_per_cell=200)
        result.append(peers.ours(f"ours, {cells} cells", path, None, kind="fresh", cells=2 * sizes[0]))
    return result


def soma(peers: Peers, cells: int) -> list[Peer]:
    if not peers.has_soma:
        return []
    source = store(peers.folder, "rna", cells=cells, genes=20_000)
    out = Path(source).with_suffix(".soma")
    script = [sys.executable, *_soma_script()]
    if not out.exists():
        subprocess.run([*script, "prepare", source, str(out)], check=True, stdout=subprocess.DEVNULL)
    options = json.dumps({"paths": [str(out)], "minibatch": 4_096})
    theirs = Peer("tiledbsoma-ml", [*script, "serve", options], threads=peers.cores)
    # Eight blocks of 2,048 cells mixed at a time, as tiledbsoma-ml's setting does.
    return [peers.ours("ours", str(out), ["rna"], obs=False, streams=8, memory="320MiB"), theirs]


def rows_of(chosen: argparse.Namespace, peers: Peers) -> dict[str, Row]:
    paths = {
        "rna": store(peers.folder, "rna", cells=chosen.rna_cells, genes=20_000),
        "atac": store(peers.folder, "paired", cells=chosen.atac_cells, genes=20_000, peaks=100_000),
    }
    rows: dict[str, Row] = {}
    for name, path in paths.items():
        rows[f"{name}, warm"] = partial(warm, peers, name, path)
        rows[f"{name}, annbatch's default collection"] = partial(foreign, peers, name, path)
        rows[f"{name}, cold page cache"] = partial(cold, peers, name, path)
    paired, both = paths["atac"], ["rna", "atac"]
    rows["paired"] = lambda: [
        peers.ours("ours", paired, both),
        peers.ours("ours, counts as stored", paired, both, values="stored"),
        *peers.annbatch("b", paired, both, "uint8"),
    ]
    rows["first minibatch and memory"] = partial(first, peers, paths, chosen.atac_cells)
    rows["cost of checksums and obs"] = lambda: [
        peers.ours("ours", paths["rna"], ["rna"]),
        peers.ours("ours without checksums, obs, sample", paths["rna"], ["rna"], checksum=False, obs=False),
    ]
    rows["threads"] = partial(threads, peers)
    rows["size of the store"] = partial(flat, peers, chosen.flat_cells)
    rows["soma"] = partial(soma, peers, chosen.soma_cells)
    return rows


def report(title: str, results: dict[str, list[dict[str, Any]]]) -> str:
    speeds = {name: [r["cells"] / r["wall"] / 1e3 for r in rounds] for name, rounds in results.items()}
    first_name = next(iter(results))
    ours = quartiles(speeds[first_name])[0]
    lines = []
    for name, rounds in results.items():
        lines.append(
            (
                name,
                spread(speeds[name], 0),
                f"{ours / quartiles(speeds[name])[0]:.2f}",
                spread([1e6 * r["cpu"] / r["cells"] for r in rounds], 2),
                spread([r["first_seconds"] for r in rounds], 3) if "first_seconds" in rounds[0] else "",
                spread([r["added_mib"] for r in rounds], 0) if "added_mib" in rounds[0] else "",
                spread([r["rss_mib"] for r in rounds], 0) if "rss_mib" in rounds[0] else "",
            )
        )
    header = (
        title,
        "thousand cells/s",
        f"{first_name} is x times as fast",
        "CPU µs a cell",
        "first minibatch s",
        "MiB added",
        "peak MiB",
    )
    return table(header, lines)


def main() -> None:
    chosen = arguments()
    sys.path.insert(0, str(ROOT))
    describe_machine()
    tables = []
    for name, row in rows_of(chosen, Peers(chosen)).items():
        if chosen.rows and not any(part in name for part in chosen.rows):
            continue
        row_peers = row()
        if not row_peers:
            continue
        print(json.dumps({"row": name, "peers": [peer.name for peer in row_peers]}), flush=True)
        tables.append(report(name, take_turns(row_peers, rounds=chosen.rounds)))
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
