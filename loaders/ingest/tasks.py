"""The steps of an ingest that may run anywhere, and more than once: scan a part of a source, write a shard.

A task works in a folder of its own and gives it its name in one step, with a record of what it made. A second attempt
(its worker was lost, the ingest was killed) finds the record, looks whether the files are whole, and is done.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from loaders.formats.source import Part, Source, unsaid
from loaders.ingest.checks import Place, check_and_map
from loaders.ingest.runs import Run, RunWriter, crc_of, merge_runs
from loaders.ingest.shards import ShardWriter
from loaders.ingest.sources import Named, open_source
from loaders.ingest.staging import RECORD

Record = dict[str, Any]
"""What a task returns, as it stands beside its files."""


@dataclass(frozen=True)
class Job:
    """What every task of an ingest knows."""

    spill: Path
    """Folder that all processes see: the arrays of `save_array`, and a folder for each task that is done."""
    sources: tuple[Named, ...]
    layer: str | None
    memory: int
    """Bytes that one task may take."""
    slots: int
    """Tasks at a time in one process."""

    def save_array(self, name: str, values: npt.NDArray[np.int64]) -> None:
        """Put an array where tasks find it."""
        self.save(name, values.astype(np.int64, copy=False).tobytes())

    def save(self, name: str, content: bytes) -> None:
        """Write a file that tasks read; whole, as one of a killed ingest may still be read."""
        with tempfile.NamedTemporaryFile(dir=self.spill, prefix=".", delete=False) as file:
            file.write(content)
        os.replace(file.name, self.spill / name)

    def array(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int64]:
        """Elements [start, stop) of an array of `save_array`."""
        return np.fromfile(self.spill / name, np.int64, -1 if stop is None else stop - start, offset=8 * start)


@dataclass(frozen=True)
class Shard:
    """One shard of a modality: the entries that it holds, and the rows they belong to."""

    modality: str
    number: int
    rows: tuple[int, int]
    skipped: int
    """Entries of the first row that belong to the shard before."""
    num_entries: int
    chunk_length: int
    dtypes: dict[str, str]
    """Of `data` and `indices`."""


def scan(job: Job, modality: str, source: int, part: tuple[int, int], num_features: int) -> Record:
    """Read and check some rows of a source and sort them into runs.

    The job's arrays `<modality>.<source>.columns` and `.places` say where columns and rows belong, -1 where nowhere.
    """

    def work(folder: Path) -> Record:
        own = here.source(source).parts[modality]
        place = place_of(here.source(source), own)
        columns = job.array(f"{modality}.{source}.columns")
        writer = RunWriter(folder, num_features=num_features, memory=job.memory // 2)
        seen: Record = {"num_nonzeros": 0, "maximum": 0, "num_empty": 0, "num_duplicates": 0}
        for start, raw in own.matrix.chunks(part, memory=job.memory // 4, spill=folder):
            counted = check_and_map(raw, columns, num_features, place, start=start)
            of_rows = job.array(f"{modality}.{source}.places", start, start + raw.num_rows)
            if (of_rows < 0).any():
                counted, of_rows = counted.only(of_rows >= 0), of_rows[of_rows >= 0]
            writer.add(of_rows, counted.rows)
            seen["num_nonzeros"] += len(counted.rows.indices)
            seen["maximum"] = max(seen["maximum"], counted.maximum)
            seen["num_empty"] += counted.num_empty
            seen["num_duplicates"] += counted.num_duplicates
        writer.write()
        return {**seen, "runs": [asdict(run) for run in writer.runs]}

    with _working(job) as here:
        name = f"{modality}.scan.{source}.{part[0]}-{part[1]}"
        return _once(job, name, work, lambda folder, record: all(run.is_whole(folder) for run in scanned(record)))


def scanned(record: Record) -> list[Run]:
    """The runs that a scan wrote."""
    return [Run.from_json(entry) for entry in record["runs"]]


def write_shard(job: Job, shard: Shard) -> Record:
    """Merge the runs of a modality, which its file of runs names, into one shard of values and one of columns."""

    def work(folder: Path) -> Record:
        runs = read_runs(job, shard.modality)
        writers = {
            part: ShardWriter(
                folder / part, dtype=dtype, chunk_length=shard.chunk_length, pool=here.encoders, first=shard.number
            )
            for part, dtype in shard.dtypes.items()
        }
        checksums, skipped, left = dict.fromkeys(writers, 0), shard.skipped, shard.num_entries
        value_dtype = shard.dtypes["data"]
        try:
            for rows in merge_runs(runs, *shard.rows, value_dtype=value_dtype, memory=job.memory // 4):
                own = slice(skipped, min(len(rows.indices), skipped + left))
                for part, values in (("data", rows.values[own]), ("indices", rows.indices[own])):
                    writers[part].append(values)
                    checksums[part] = int(google_crc32c.extend(checksums[part], values))
                skipped, left = 0, left - (own.stop - own.start)
            for writer in writers.values():
                writer.close()
        finally:
            for writer in writers.values():
                writer.abort()
        assert not left, (shard, left)
        return {"checksums": checksums, "files": {part: writer.files for part, writer in writers.items()}}

    with _working(job) as here:
        return _once(job, f"{shard.modality}.shard.{shard.number}", work, _shards_are_whole)


def _shards_are_whole(folder: Path, record: Record) -> bool:
    for part, files in record["files"].items():
        for name, (size, checksum) in files.items():
            with open(folder / part / name, "rb") as file:
                if crc_of(file, size) != checksum or file.read(1):
                    return False
    return True


def save_runs(job: Job, modality: str, runs: Sequence[tuple[Path, Run]]) -> None:
    """Write which runs a modality has."""
    entries = [[folder.name, asdict(run)] for folder, run in runs]
    job.save(f"{modality}.runs.json", json.dumps(entries).encode())


def read_runs(job: Job, modality: str) -> list[tuple[Path, Run]]:
    """The folder of each run of a modality, and what it holds."""
    entries = json.loads((job.spill / f"{modality}.runs.json").read_text())
    return [(job.spill / folder, Run.from_json(entry)) for folder, entry in entries]


def place_of(source: Source, part: Part) -> Place:
    """How messages name the cells and features of a matrix."""

    def cell_name(row: int) -> str:
        cells = [row] if part.rows is None else np.flatnonzero(part.rows == row)
        return str(source.cell_ids[cells[0]]) if len(cells) else f"of row {row}, which is not kept"

    def feature_name(column: int) -> str:
        place = column if part.columns is None else int(part.columns[column])
        return str(part.var.index[place]) if place >= 0 else f"number {column}"

    return Place(part.matrix.where, cell_name, feature_name, part.layers)


def _once(job: Job, name: str, work: Callable[[Path], Record], is_whole: Callable[[Path, Record], bool]) -> Record:
    """What the task made: now, or in an attempt before."""
    place = job.spill / name
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((place / RECORD).read_text())
        if is_whole(place, record):
            return record
    shutil.rmtree(place, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=".task-", dir=job.spill))
    try:
        record = work(made)
        (made / RECORD).write_text(json.dumps(record))
        try:
            os.rename(made, place)
        except OSError:
            # A worker that was taken for lost has finished the same task meanwhile.
            if not (place / RECORD).exists():
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return record


class _Here:
    """What a process keeps of an ingest while it works at it."""

    def __init__(self, job: Job, opened: Sequence[Source] = ()) -> None:
        self._job, self._lock, self._files = job, threading.Lock(), ExitStack()
        self._sources = dict(enumerate(opened))
        self.users = 0
        self.slots = threading.BoundedSemaphore(job.slots)
        # Where tasks are few, as for a small store, encoders keep the other cores busy.
        self.encoders: Executor = _Inline()
        if job.slots > 1:
            self.encoders = self._files.enter_context(ThreadPoolExecutor(job.slots, thread_name_prefix="encode"))

    def source(self, number: int) -> Source:
        with self._lock:
            if number not in self._sources:
                named, layer = self._job.sources[number], self._job.layer
                self._sources[number] = open_source(named, layer=layer, files=self._files, say=unsaid)
            return self._sources[number]

    def close(self) -> None:
        self._files.close()


class _Inline(Executor):
    """Runs at once what is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


_lock = threading.Lock()
_here: dict[Path, _Here] = {}


@contextmanager
def keeping(job: Job, opened: Sequence[Source]) -> Iterator[None]:
    """Let tasks that run in this process use what it has opened."""
    with _lock:
        here = _here[job.spill] = _Here(job, opened)
        here.users += 1
    try:
        yield
    finally:
        with _lock:
            del _here[job.spill]
        here.close()


async def quiet(spill: Path) -> None:
    """Wait until no task of an ingest runs in this process."""
    while (here := _here.get(spill)) is not None and here.users:
        await asyncio.sleep(0.02)


@contextmanager
def _working(job: Job) -> Iterator[_Here]:
    """Wait for a slot, so that the tasks of a process share its memory; files of ingests that are over are closed."""
    with _lock:
        for spill in [spill for spill, other in _here.items() if not other.users and spill != job.spill]:
            _here.pop(spill).close()
        here = _here[job.spill] = _here.get(job.spill) or _Here(job)
        here.users += 1
    try:
        with here.slots:
            yield here
    finally:
        with _lock:
            here.users -= 1
