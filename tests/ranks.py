"""Commands on some ranks as a scheduler starts them: nobody ends the others when one has ended.

Processes are forked from one that has imported what they need: a start takes 2 s of a core instead of 12, and what
happens to them after a random time meets the command at work.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from unittest import mock

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
NEEDED = ["liam_scale.train", "liam_scale.embed", "torch._dynamo", "torch.nn.parallel", "safetensors.torch"]
"""The optimizer imports torch._dynamo, which takes as long as all the rest."""
SECONDS = 600
"""For what takes ten on a machine that does nothing else."""

_TELL_STACKS = signal.SIGUSR2

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(NEEDED)


def main_of(module: str) -> str:
    """Code that runs a module's command."""
    return f"import sys; from {module} import main; sys.exit(main(sys.argv[1:]))"


TRAIN = main_of("liam_scale.train")


_alive: list[Rank] = []
"""All that were started since the last `end_all`."""


@dataclass
class Rank:
    """A process, and the files of what it says."""

    process: BaseProcess
    port: int
    out: Path
    err: Path
    reserved: socket.socket = field(repr=False)
    """Holds the port, which another process might else be given before rank 0 listens there."""

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid or 0, number)

    def is_alive(self) -> bool:
        return self.process.is_alive()

    def ends(self, seconds: float = SECONDS) -> tuple[int, str]:
        """Its code, and what it said on stderr."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            raise AssertionError(f"still at work after {seconds:.0f} s:\n{end_all()}")
        return self.process.exitcode, self.err.read_text()


def start_ranks(
    arguments: Sequence[object], size: int, *, only: Iterable[int] | None = None, code: str = TRAIN
) -> list[Rank]:
    """Start `python -c code *arguments` on the ranks of a world of a size: all of them, or those named."""
    reserved = socket.socket()
    reserved.bind(("127.0.0.1", 0))
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # As torch asks for it, and hardly anyone else.
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port := reserved.getsockname()[1])}
    world |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    started = []
    for rank in range(size) if only is None else only:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), **world} if size > 1 else {}
        folder = Path(tempfile.mkdtemp(dir=_folder()))
        files = folder / "out", folder / "err"
        for file in files:  # A rank may be killed before it has opened them.
            file.touch()
        process = _FORKS.Process(target=_run, args=(code, [str(each) for each in arguments], own, files), daemon=True)
        # What torch reads once, in the process that is forked; ranks have it in their environment. They would import
        # pytest again if it were told to be the program.
        with (
            mock.patch.dict(os.environ, {"TORCH_CPP_LOG_LEVEL": "FATAL", "OMP_NUM_THREADS": "1"}),
            mock.patch.dict(sys.modules, {"__main__": ModuleType("__main__")}),
        ):
            process.start()
        started.append(Rank(process, port, *files, reserved))
        _alive.append(started[-1])
    return started


def end_all() -> str:
    """Kill every rank that is still at work; what they have said, at last where their threads stood."""
    stuck = [rank for rank in _alive if rank.is_alive()]
    for rank in _alive:
        rank.reserved.close()
    _alive.clear()
    for rank in stuck:
        rank.kill(_TELL_STACKS)
    time.sleep(0.5 if stuck else 0.0)
    for rank in stuck:
        rank.kill()
        rank.process.join()
    return "\n".join(rank.err.read_text() for rank in stuck if rank.err.exists())


def run_ranks(arguments: Sequence[object], size: int, *, code: str = TRAIN) -> subprocess.CompletedProcess[str]:
    """`start_ranks`, and what all have said when all have ended; the code is that of the first that has failed."""
    started = start_ranks(arguments, size, code=code)
    codes = [rank.ends()[0] for rank in started]
    out, err = (
        "".join(file.read_text() for file in files) for files in zip(*((r.out, r.err) for r in started), strict=True)
    )
    return subprocess.CompletedProcess([*map(str, arguments)], next((c for c in codes if c), 0), out, err)


def wait_for(there: Callable[[], bool], ranks: Sequence[Rank]) -> None:
    """Until something is there; that a rank ends before is an error."""
    deadline = time.monotonic() + SECONDS
    while not there():
        if time.monotonic() > deadline:
            raise AssertionError(f"what was waited for has not come in {SECONDS} s:\n{end_all()}")
        assert all(rank.is_alive() for rank in ranks), [rank.err.read_text() for rank in ranks]
        time.sleep(0.02)


@cache
def _folder() -> str:
    """Of what ranks say, as long as this process lives."""
    path = tempfile.mkdtemp(prefix="ranks")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def heed_interrupts() -> None:
    """Also where the tests run in the background of a shell, which has them ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def seconds(number: float) -> float:
    """So many seconds of a machine that does nothing else, by the load of this one."""
    return number * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def _run(code: str, arguments: list[str], environment: dict[str, str], files: tuple[Path, Path]) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    heed_interrupts()
    # Also while the main thread stands in torch, and no handler of Python would run.
    faulthandler.register(_TELL_STACKS, file=2, all_threads=True)
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})
