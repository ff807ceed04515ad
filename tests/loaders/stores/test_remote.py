"""Remote stores give the same cells as local ones, and the log says that they are slower."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec
import numpy as np
import pytest
from zarr.storage import ObjectStore

from loaders.stores import open_store

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have a Zarr V3 specification"),
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding:UserWarning"),
]


class QuietHandler(SimpleHTTPRequestHandler):
    """Files of a folder, with byte ranges (which sharded arrays are read by), and no lists of folders."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        first, last = 0, len(content) - 1
        asked = self.headers.get("Range")
        if asked:
            start, _, stop = asked.removeprefix("bytes=").partition("-")
            first, last = (int(start), min(int(stop or last), last)) if start else (len(content) - int(stop), last)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.write(content[first : last + 1])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def copy_to_memory(folder: Path, name: str) -> str:
    memory = fsspec.filesystem("memory")
    for file in folder.rglob("*"):
        if file.is_file():
            memory.pipe(f"/{name}/{file.relative_to(folder)}", file.read_bytes())
    return f"memory://{name}"


def test_in_memory_store_reads_and_takes_an_embedding(
    own_store: Path, toy: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        store = open_store(copy_to_memory(own_store, "taken.zarr"))
    assert "slower than a local copy" in caplog.text
    for modality in toy.FEATURES:
        toy.check_counts(store, modality)
    toy.check_obs(store)
    values = np.arange(toy.NUM_CELLS * 2, dtype=np.float32).reshape(-1, 2)
    for shown in (values[:, :1], values):
        store.write_embedding("X_liam", shown)
    np.testing.assert_array_equal(open_store("memory://taken.zarr").read_embedding("X_liam", 0, toy.NUM_CELLS), values)


def test_missing_file_of_a_remote_store_is_named(own_store: Path, toy: ModuleType) -> None:
    uri = copy_to_memory(own_store, "holed.zarr")
    fsspec.filesystem("memory").rm("/holed.zarr/mod/rna/X/data/c/1")
    with pytest.raises(
        RuntimeError, match=r"holed.zarr/mod/rna/X/data: got damaged data: rows 0:50 .*file c/1 is missing"
    ):
        open_store(uri).matrix("rna").read(0, toy.NUM_CELLS)


def test_http_server_by_fsspec(own_store: Path, toy: ModuleType) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http:// with aiohttp")
    with serving(own_store.parent) as address:
        store = open_store(f"{address}/own.zarr")
        for modality in toy.FEATURES:
            toy.check_counts(store, modality)
        toy.check_obs(store)
        with pytest.raises(RuntimeError, match=r"cannot be written"):
            store.write_embedding("X_liam", np.zeros((toy.NUM_CELLS, 2), np.float32))
        with pytest.raises(ValueError, match=r"/other.zarr: got nothing that Zarr can open"):
            open_store(f"{address}/other.zarr")


def test_http_server_by_obstore(own_store: Path, toy: ModuleType) -> None:
    obstore = pytest.importorskip("obstore", reason="another way to remote stores")
    with serving(own_store.parent) as address:
        backend = obstore.store.HTTPStore.from_url(f"{address}/own.zarr", client_options={"allow_http": True})
        store = open_store(ObjectStore(backend, read_only=True))
        for modality in toy.FEATURES:
            toy.check_counts(store, modality)
        toy.check_obs(store)


def test_mudata_of_others_over_http(tmp_path: Path, toy: ModuleType) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http:// with aiohttp")
    toy.write_mudata(tmp_path / "a.zarr", toy.make_mudata(rna=toy.cells_of("rna"), adt=toy.cells_of("adt")), 3)
    with serving(tmp_path) as address:
        store = open_store(f"{address}/a.zarr")
        for modality in ("rna", "adt"):
            toy.check_counts(store, modality)
        toy.check_obs(store)


def test_unknown_scheme_says_what_to_install() -> None:
    with pytest.raises(ValueError, match=r"gs://bucket/a.zarr: got an address whose file system is not installed"):
        open_store("gs://bucket/a.zarr")
