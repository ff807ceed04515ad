"""The loader on a store behind a server that takes 30 ms to answer: zarr-python, our requests, the cache, a local disk.

    python benchmarks/remote.py [--cells 20000] [--milliseconds 30]

The server is a process on this machine that answers ranges of files over HTTP after a pause; bandwidth is not limited.
`zarr-python` is what fsspec and zarr-python read of the same store, a request a chunk.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from harness import ROOT, Peer, describe_machine, serve, table, take_turns

NAMES = {
    "local": "on a local disk",
    "cached": "remote, second epoch, from the cache",
    "first": "remote, first epoch, into an empty cache",
    "requests": "remote, without a cache",
    "zarr-python": "remote, through zarr-python",
}


class Files(SimpleHTTPRequestHandler):
    """Ranges of files, after a pause."""

    protocol_version = "HTTP/1.1"
    seconds = 0.03

    def do_GET(self) -> None:
        time.sleep(self.seconds)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        size, asked = path.stat().st_size, self.headers.get("Range")
        start, _, stop = (asked or "bytes=0-").removeprefix("bytes=").partition("-")
        first, last = (int(start), min(int(stop or size - 1), size - 1)) if start else (size - int(stop), size - 1)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last + 1 - first))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if self.command == "GET":
            with path.open("rb") as file:
                file.seek(first)
                self.wfile.write(file.read(last + 1 - first))

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


def serve_files(folder: str, milliseconds: float) -> None:
    Files.seconds = milliseconds / 1e3
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *given: Files(*given, directory=folder))
    print(server.server_port, flush=True)
    server.serve_forever()


def epochs(kind: str, path: str, address: str, cache: str, minibatch: int, threads: int) -> None:
    from zarr.storage import FsspecStore

    from loaders import Loader, LoaderConfig, open_store, use_cache

    if kind in ("cached", "first"):
        use_cache(cache)
    backend = FsspecStore.from_url(address, read_only=True) if kind == "zarr-python" else address
    store = open_store(path if kind == "local" else backend)
    loader = Loader(store, LoaderConfig(minibatch=minibatch, threads=threads), subset="all", transpose=False)

    def epoch() -> dict[str, float]:
        if kind == "first":
            shutil.rmtree(cache, ignore_errors=True)
            Path(cache).mkdir()
        return {"cells": sum(minibatch.num_cells for minibatch in loader)}

    serve(epoch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--milliseconds", type=float, default=30)
    parser.add_argument("--minibatch", type=int, default=1_024)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    describe_machine()
    from loaders.synthetic import simulate

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store" / "paper.zarr"
        path.parent.mkdir()
        simulate(path, num_cells=options.cells, num_samples=13)
        server = subprocess.Popen(
            [sys.executable, __file__, "--files", str(path.parent), str(options.milliseconds)],
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": str(ROOT)},
        )
        try:
            assert server.stdout is not None
            address = f"http://127.0.0.1:{int(server.stdout.readline())}/{path.name}"
            given = {kind: [str(path), address, f"{folder}/cache-{kind}"] for kind in NAMES}
            sizes = [str(options.minibatch), str(options.threads)]
            peers = {k: Peer(k, [sys.executable, __file__, "--serve", k, *g, *sizes]) for k, g in given.items()}
            slow = take_turns([peers.pop("zarr-python")], rounds=1, warmup=0)
            found = {**take_turns(peers.values(), rounds=options.rounds), **slow}
        finally:
            server.terminate()
    rates = {kind: [r["cells"] / r["wall"] for r in results] for kind, results in found.items()}
    middle = {kind: statistics.median(values) for kind, values in rates.items()}
    rows = [
        [
            NAMES[kind],
            f"{middle[kind]:,.0f}",
            f"{min(values):,.0f} to {max(values):,.0f}",
            f"{middle[kind] / middle['local']:.2f}",
        ]
        for kind, values in rates.items()
    ]
    print(table(["", "cells/s", "of the rounds", "of local"], rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--files"]:
        serve_files(sys.argv[2], float(sys.argv[3]))
    elif sys.argv[1:2] == ["--serve"]:
        kind, path, address, cache, minibatch, threads = sys.argv[2:]
        epochs(kind, path, address, cache, int(minibatch), int(threads))
    else:
        main()
