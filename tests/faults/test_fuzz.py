"""Files that are wrong in any way are refused by name with a cure, or read rightly: no crash, no hang, no silence."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

INPUTS = {
    "schema": 600,
    "run": 500,
    "features": 200,
    "run options": 400,
    "options": 400,
    "history": 400,
    "manifest": 200,
    "state": 500,
    "h5ad": 700,
    "h5mu": 300,
    "10x": 400,
    "zarr": 500,
    "blocks": 600,
}

CORPUS = {
    "schema": (9, 17, 20, 54, 63, 80, 109, 447),
    "run": (6, 19, 38, 66, 90, 193, 417),
    "run options": (2, 6, 8, 33),
    "options": (257, 337, 344),
    "history": (0, 10, 17, 40),
    "state": (8, 11, 13, 21, 42, 44, 60, 72, 93),
    "h5ad": (0, 10, 31, 52, 90, 173, 257, 374),
    "h5mu": (38,),
    "10x": (120, 337),
    "zarr": (226, 334),
    "blocks": (3, 4, 5, 21, 45),
}
"""Seeds of inputs that once ended a process or met an error which named neither the file nor a cure."""

SECONDS = 60

ENDLESS = "endless_within_libhdf5"
"""The C library of HDF5 goes round in circles in a file whose metadata say so, where nothing in Python can end it."""


class Worker:
    """A process that reads wrong files, started again when one of them ends it."""

    def __init__(self, folder: Path) -> None:
        self._command = [sys.executable, str(Path(__file__).with_name("fuzz_worker.py")), str(folder)]
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._stack = folder.with_name("stack")
        self._start()

    def _start(self) -> None:
        pipe = subprocess.PIPE
        with self._stack.open("wb") as stack:
            self._process = subprocess.Popen(
                self._command, stdin=pipe, stdout=pipe, stderr=stack, env=self._environment, cwd=ROOT
            )
        assert self._line(10 * SECONDS) == b"ready\n"

    def _line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        is_ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return self._process.stdout.readline() if is_ready else b""

    def feed(self, target: str, seed: int) -> tuple[str, str]:
        """What became of an input, and the text of the error."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seed} {target}\n".encode())
        self._process.stdin.flush()
        if line := self._line(SECONDS):
            told = json.loads(line)
            return told["outcome"], told["text"]
        outcome = "crash" if self._process.poll() is not None else ENDLESS if self._is_in_hdf5() else "hang"
        self.close()
        text = f"ended with code {self._process.returncode}"
        self._start()
        return outcome, text

    def _is_in_hdf5(self) -> bool:
        """Whether the innermost line of Python is one of h5py's; the worker writes its stack at this signal."""
        self._process.send_signal(signal.SIGUSR2)
        time.sleep(1)
        lines = [line for line in self._stack.read_text().splitlines() if line.lstrip().startswith("File ")]
        return bool(lines) and f"{os.sep}h5py{os.sep}" in lines[0]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """In memory where the system has such a place: each input is some files, written and removed."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as path:
        yield Path(path) / "base"


def feed(folder: Path, inputs: Mapping[str, Iterable[int]]) -> dict[tuple[str, int], tuple[str, str]]:
    """By kind of file and seed: the outcome, and the text of the error."""
    worker = Worker(folder)
    try:
        return {(target, seed): worker.feed(target, seed) for target, seeds in inputs.items() for seed in seeds}
    finally:
        worker.close()


def bad(found: Mapping[tuple[str, int], tuple[str, str]]) -> dict[tuple[str, int], tuple[str, str]]:
    return {which: told for which, told in found.items() if told[0] not in ("clear", "right", ENDLESS)}


def test_what_was_once_read_wrongly_is_refused_or_right(folder: Path) -> None:
    found = feed(folder, CORPUS)
    assert not bad(found)


@pytest.mark.slow
@pytest.mark.parametrize("target", INPUTS)
def test_no_wrong_file_crashes_hangs_or_passes_in_silence(
    folder: Path, target: str, record_property: Callable[[str, object], None]
) -> None:
    found = feed(folder, {target: range(INPUTS[target])})
    counts = Counter(outcome for outcome, _ in found.values())
    record_property("inputs", len(found))
    for outcome in ("clear", "right", "unnamed", "unexplained", "silent", "crash", "hang", ENDLESS):
        record_property(outcome, counts[outcome])
    assert not bad(found)
    assert counts[ENDLESS] <= len(found) / 100
    assert counts["clear"] > len(found) / 4
