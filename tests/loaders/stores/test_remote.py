"""Remote stores give the same cells as local ones, and the log says that they are slower."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import fsspec
import numpy as np
import obstore
import pytest
from zarr.storage import ObjectStore

from loaders import use_cache
from loaders.stores import open_store

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have a Zarr V3 specification"),
    pytest.mark.filterwarnings("ignore:zarr v3 autosharding:UserWarning"),
]


class QuietHandler(SimpleHTTPRequestHandler):
    """Files of a folder, with byte ranges (which sharded arrays are read by), and no lists of folders."""

    def do_GET(self, share: float = 1.0) -> None:
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
        if self.command != "HEAD":
            self.wfile.write(content[first : last + 1][: math.ceil(share * (last + 1 - first))])

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(folder: Path, handler: type[QuietHandler] = QuietHandler) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
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
    assert "every chunk is a request" in caplog.text
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


def test_http_server(own_store: Path, toy: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    with serving(own_store.parent) as address:
        with caplog.at_level(logging.INFO):
            store = open_store(f"{address}/own.zarr")
        assert "cache='DIR' keeps it" in caplog.text
        for modality in toy.FEATURES:
            toy.check_counts(store, modality)
        toy.check_obs(store)
        with pytest.raises(RuntimeError, match=r"cannot be written"):
            store.write_embedding("X_liam", np.zeros((toy.NUM_CELLS, 2), np.float32))
        with pytest.raises(ValueError, match=r"/other.zarr: got nothing that Zarr can open"):
            open_store(f"{address}/other.zarr")


def test_an_object_of_zarr(own_store: Path, toy: ModuleType) -> None:
    with serving(own_store.parent) as address:
        backend = obstore.store.HTTPStore.from_url(f"{address}/own.zarr", client_options={"allow_http": True})
        store = open_store(ObjectStore(backend, read_only=True))
        for modality in toy.FEATURES:
            toy.check_counts(store, modality)


class FaultyHandler(QuietHandler):
    """Answers the first, third ... of ten requests for shards wrongly: by an error, half of it, nothing for a while."""

    faults: ClassVar = itertools.cycle(("error", "half", "stall"))
    number: ClassVar = itertools.count(1)
    asleep: ClassVar = threading.Event()

    def do_GET(self) -> None:
        number = 0 if "/c/" not in self.path or self.command == "HEAD" else next(self.number)
        if number % 2 == 0 or number > 10:
            super().do_GET()
            return
        fault = next(self.faults)
        if fault == "error":
            self.send_error(503)
        elif fault == "half":
            super().do_GET(0.5)
            self.close_connection = True
        else:
            self.asleep.wait(3)
            self.close_connection = True

    do_HEAD = QuietHandler.do_GET


def test_a_server_that_fails_stalls_and_breaks_off_is_asked_again(own_store: Path, toy: ModuleType) -> None:
    with serving(own_store.parent, FaultyHandler) as address:
        store = open_store(f"{address}/own.zarr", storage_options={"client_options": {"timeout": "1 second"}})
        for modality in toy.FEATURES:
            toy.check_counts(store, modality)
        assert next(FaultyHandler.number) > 6
        FaultyHandler.asleep.set()


def test_a_server_that_is_gone_is_named_with_what_was_read(own_store: Path, toy: ModuleType) -> None:
    with serving(own_store.parent) as address:
        store = open_store(f"{address}/own.zarr", storage_options={"retry_config": {"max_retries": 1}})
    with pytest.raises(RuntimeError, match=rf"{address}/own.zarr/mod/rna/X.* cannot be fetched") as raised:
        store.matrix("rna").read(0, toy.NUM_CELLS)
    assert "\n" not in str(raised.value)


class ClosedHandler(QuietHandler):
    """Refuses what lies behind a part of a path."""

    closed: ClassVar = ""

    def do_GET(self) -> None:
        if self.closed in self.path:
            self.send_error(403)
        else:
            super().do_GET()

    do_HEAD = do_GET


@pytest.mark.parametrize("closed", ["/own.zarr", "/mod/rna/X/data/c/"])
def test_a_bucket_without_permission_is_named(
    own_store: Path, toy: ModuleType, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClosedHandler, "closed", closed)
    with serving(own_store.parent, ClosedHandler) as address:
        match = rf"{address}/own.zarr.* cannot be fetched .*403.* lets you read"
        with pytest.raises(RuntimeError, match=match) as raised:
            open_store(f"{address}/own.zarr").matrix("rna").read(0, toy.NUM_CELLS)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Options of obstore for the bucket `atlas` of an S3 server, a process of its own."""
    pytest.importorskip("moto.server", reason="a server of S3 for tests: pip install moto[server]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (tmp_path_factory.mktemp("s3") / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=log, stderr=log)
    options = {"endpoint": f"http://127.0.0.1:{port}", "region": "us-east-1"}
    keys = {"access_key_id": "a", "secret_access_key": "b"}
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        request = urllib.request.Request(f"{options['endpoint']}/atlas", method="PUT")
        request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=a/20200101/us-east-1/s3/aws4_request")
        urllib.request.urlopen(request).close()
        yield {**options, **keys}
    finally:
        process.terminate()
        process.wait()


def upload(folder: Path, address: str, options: dict[str, str]) -> str:
    target = obstore.store.from_url(address, **options, client_options={"allow_http": True})
    for file in folder.rglob("*"):
        if file.is_file():
            obstore.put(target, str(file.relative_to(folder)), file.read_bytes())
    return address


def test_a_bucket_of_s3_reads_takes_an_embedding_and_is_cached(
    own_store: Path, toy: ModuleType, s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = upload(own_store, "s3://atlas/a/own.zarr", s3)
    use_cache(tmp_path / "cache", "1GB")
    monkeypatch.delenv("LIAM_SCALE_CACHE", raising=True)
    monkeypatch.setenv("LIAM_SCALE_CACHE", str(tmp_path / "cache"))
    store = open_store(address, storage_options=s3)
    for modality in toy.FEATURES:
        toy.check_counts(store, modality)
    toy.check_obs(store)
    blocks = {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*.block")}
    assert len(blocks) >= 2 * len(toy.FEATURES)
    values = np.arange(toy.NUM_CELLS * 2, dtype=np.float32).reshape(-1, 2)
    store.write_embedding("X_liam", values)
    again = open_store(address, storage_options=s3)
    np.testing.assert_array_equal(again.read_embedding("X_liam", 0, toy.NUM_CELLS), values)
    for modality in toy.FEATURES:
        toy.check_counts(again, modality)
    assert {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*.block")} == blocks


def test_a_bucket_that_is_not_there_or_not_allowed_is_named(s3: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"s3://other/a.zarr: got nothing that Zarr can open"):
        open_store("s3://other/a.zarr", storage_options=s3)
    with pytest.raises(
        ValueError,
        match=r"s3://atlas/a.zarr: cannot be addressed so .*key: 'anon'",
    ):
        open_store("s3://atlas/a.zarr", storage_options={"anon": True})


def test_mudata_of_others_over_http(tmp_path: Path, toy: ModuleType) -> None:
    toy.write_mudata(tmp_path / "a.zarr", toy.make_mudata(rna=toy.cells_of("rna"), adt=toy.cells_of("adt")), 3)
    with serving(tmp_path) as address:
        store = open_store(f"{address}/a.zarr")
        for modality in ("rna", "adt"):
            toy.check_counts(store, modality)
        toy.check_obs(store)


def test_unknown_scheme_says_what_is_not_installed() -> None:
    with pytest.raises(ValueError, match=r"ftps://host/a.zarr: got an address whose file system is not installed"):
        open_store("ftps://host/a.zarr")
