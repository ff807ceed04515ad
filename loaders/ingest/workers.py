"""Who runs the tasks of an ingest: threads of this process, or the workers of a Dask cluster."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loaders.ingest.tasks import quiet
from loaders.sizing import default_threads

_LEAST_SHARE = 2**24
"""16 MiB: with less memory for each, fewer tasks run at a time."""

_SECONDS_TO_CONNECT = 10


class WorkersLost(RuntimeError):
    """The cluster is gone or its workers die; what was done stands."""


@dataclass(frozen=True)
class Workers:
    """Where tasks run.

    Attributes
    ----------
    executor
        Takes tasks.
    processes
        Of the cluster, as there are now; 0: it is this one.
    slots
        Tasks at a time in each process, which share its memory.
    check
        Called with the folder in which tasks work, before the first of them.
    settle
        Called with it after an error: waits for the tasks that cannot be called off.
    """

    executor: Executor
    processes: int
    slots: int
    check: Callable[[Path], None] = lambda folder: None
    settle: Callable[[Path], None] = lambda folder: None


@contextmanager
def open_workers(dask: str | None, client: Any, *, memory: int) -> Iterator[Workers]:
    """Threads of this process, or the cluster at an address or of a client.

    Parameters
    ----------
    dask
        Address of a scheduler, or `local:N` for N processes of this machine.
    client
        A client of `dask.distributed`, which stays open.
    memory
        Bytes of each process.

    Raises
    ------
    ValueError
        Neither an address nor `local:N`; both given; Dask is not installed.
    RuntimeError
        No scheduler answers, or it or a worker has other versions.
    WorkersLost
        On leaving: the cluster was lost.
    """
    most = max(1, memory // _LEAST_SHARE)
    if dask is None and client is None:
        slots = min(default_threads(), most)
        pool = ThreadPoolExecutor(slots, thread_name_prefix="ingest")
        try:
            yield Workers(pool, 0, slots)
        finally:
            pool.shutdown(cancel_futures=True)
        return
    if dask is not None and client is not None:
        raise ValueError(f"dask: got dask={dask!r} and a client; leave one of the two out")
    with ExitStack() as stack:
        if client is None:
            client = stack.enter_context(_connect(str(dask), stack))
        elif not hasattr(client, "get_executor"):
            raise ValueError(f"client: got {type(client).__name__}; give a dask.distributed.Client")
        where = f"the scheduler at {client.scheduler.address}"
        _check_versions(client, where)
        if not client.scheduler_info(n_workers=-1)["workers"]:
            print(f"note: {where} has no worker yet; waiting for one", file=sys.stderr, flush=True)
            client.wait_for_workers(1)
        workers = client.scheduler_info(n_workers=-1)["workers"]
        slots = min(most, max(worker["nthreads"] for worker in workers.values()))
        executor = client.get_executor(pure=False)
        try:
            yield Workers(
                executor,
                len(workers),
                slots,
                lambda folder: _check_folder(client, folder),
                lambda folder: client.run(quiet, folder, on_error="ignore"),
            )
        except CancelledError:
            raise WorkersLost(
                f"dask: {where} was lost; what was done is kept: run the same command again and it goes on"
            ) from None
        except Exception as error:
            if type(error).__name__ != "KilledWorker":
                raise
            raise WorkersLost(
                f"dask: workers died, several of them at the same task ({error}); they may have been killed for their"
                f" memory: give them more or a smaller memory here; what was done is kept: run the same command again"
            ) from None
        finally:
            executor.shutdown(wait=False)


@contextmanager
def _connect(dask: str, stack: ExitStack) -> Iterator[Any]:
    local = re.fullmatch(r"local:(\d+)", dask)
    if (local and not int(local[1])) or not (local or re.match(r"(tcp|tls|ws|wss|ucx)://", dask)):
        raise ValueError(
            f"dask: got {dask!r}; give the address of a scheduler, for example tcp://host:8786, or local:2 for two"
            " processes of this machine"
        )
    try:
        import distributed
    except ImportError:
        raise ValueError(
            f'dask: got {dask!r}, but dask is not installed; install it: pip install "liam-scale[dask]"'
        ) from None
    address: Any = dask
    with warnings.catch_warnings():
        # What differs is said below, as an error.
        warnings.simplefilter("ignore")
        if local:
            # Tasks bound their memory themselves: a nanny that kills at a share of the machine's would only lose them.
            options = {"n_workers": int(local[1]), "threads_per_worker": 1, "memory_limit": 0}
            cluster = distributed.LocalCluster(**options, dashboard_address=":0", silence_logs=logging.ERROR)
            address = stack.enter_context(cluster)
        try:
            client = distributed.Client(address, timeout=_SECONDS_TO_CONNECT, set_as_default=False)
        except (OSError, ValueError, ImportError) as error:
            raise RuntimeError(
                f"dask: no scheduler answers at {dask} ({error}); start one (`dask scheduler`), or correct the address"
            ) from None
    with client:
        yield client


def _check_versions(client: Any, where: str) -> None:
    """Refuse a cluster that has another distributed, or workers of another Python."""
    found = client.get_versions()
    own = _versions(found["client"])
    members = {where: found["scheduler"], **{f"the worker at {key}": told for key, told in found["workers"].items()}}
    for name, told in members.items():
        if _versions(told) != own:
            raise RuntimeError(
                f"dask: got {_versions(told)} of {name}, expected {own} as here; install the same there, or run this"
                " command in its environment"
            )


def _versions(told: Any) -> str:
    packages = told["packages"]
    python = ".".join(str(packages.get("python")).split(".")[:2])
    return f"distributed {packages.get('distributed')} (Python {python})"


def _check_folder(client: Any, folder: Path) -> None:
    """Refuse workers that lack this package or do not see the folder."""
    try:
        sees = client.run(_sees, folder)
    except ImportError as error:
        raise RuntimeError(f"dask: a worker cannot run ingest's tasks ({error}); install this package there") from None
    blind = [address for address, is_there in sees.items() if not is_there]
    if blind:
        raise RuntimeError(
            f"dask: the worker at {blind[0]} does not see {folder}; write to storage that all workers and this"
            " process share, under the same path"
        )


def _sees(folder: Path) -> bool:
    return folder.is_dir()
