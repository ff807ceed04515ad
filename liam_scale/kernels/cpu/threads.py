"""Threads and memory of the CPU kernels.

A kernel cuts its work into as many tasks as `torch.get_num_threads()` says; each runs on its own thread with
single-threaded matrix products, so that a tile stays in one core's cache and no thread waits for another between
the parts of a tile. numba's own parallel loops are not used: their default layer must not be entered from two
threads at once, and a loader decodes on threads of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

_lock = threading.Lock()
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_local = threading.local()


def num_workers() -> int:
    return torch.get_num_threads()


def run(tasks: Sequence[Callable[[], None]]) -> None:
    """Run every task to its end, side by side; the first error is raised here."""
    if len(tasks) == 1:
        with torch.no_grad():
            tasks[0]()
        return
    futures = [_pool(len(tasks)).submit(_without_grad, task) for task in tasks]
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error


def workspace(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor whose memory this thread keeps under this name from call to call.

    Fresh pages cost more than the work done in them: 60 MB of page faults take 15 to 200 ms.
    """
    buffers: dict[str, Tensor] = _local.__dict__.setdefault("buffers", {})
    count = 1
    for size in shape:
        count *= size
    num_bytes = count * dtype.itemsize
    if name not in buffers or buffers[name].numel() < num_bytes:
        buffers.pop(name, None)
        buffers[name] = torch.empty(num_bytes, dtype=torch.uint8)
    return buffers[name][:num_bytes].view(dtype).view(*shape)


def _without_grad(task: Callable[[], None]) -> None:
    with torch.no_grad():
        task()


def _pool(workers: int) -> ThreadPoolExecutor:
    key = (os.getpid(), workers)  # threads do not survive a fork
    with _lock:
        if key not in _pools:
            _pools[key] = _start_pool(workers)
        return _pools[key]


def _start_pool(workers: int) -> ThreadPoolExecutor:
    """Threads whose matrix products use one thread each; the caller's own setting is put back."""
    threads = torch.get_num_threads()
    everyone = threading.Barrier(workers + 1)

    def start() -> None:
        torch.set_num_threads(1)
        everyone.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix="liam-kernel")
    for _ in range(workers):
        pool.submit(start)
    everyone.wait()
    torch.set_num_threads(threads)
    return pool


@contextmanager
def threads_kept() -> Iterator[None]:
    """Put torch's number of threads back: numba's parallel loops, such as umap's, set it for all of OpenMP."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
