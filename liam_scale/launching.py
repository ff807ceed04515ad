"""How one command starts another: as a user of this environment would type it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from liam_scale.training.signals import StopRequest


def python() -> list[str]:
    """`python` where that is the interpreter that runs this, else its full path: what is printed is what runs."""
    found = shutil.which("python")
    is_ours = found is not None and _is_ours("python") and Path(found).samefile(sys.executable)
    return ["python" if is_ours else sys.executable]


def liam_scale() -> list[str]:
    return ["liam-scale"] if _is_ours("liam-scale") else [*python(), "-m", "liam_scale.cli"]


def ranks(number: int) -> list[str]:
    """What starts a module (its name follows) on so many ranks of this machine.

    They meet at the loopback address: by torchrun's default at the name of the host, which does not resolve in every
    container and on every laptop, and they would wait for it for minutes.
    """
    torchrun = ["torchrun"] if _is_ours("torchrun") else [*python(), "-m", "torch.distributed.run"]
    return [*torchrun, "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={number}", "-m"]


def environment(threads: int = 1) -> dict[str, str]:
    """torchrun asks for a number of threads per process and takes 1, with a warning, where none is set."""
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


@contextmanager
def none_outlives_this(commands: Collection[subprocess.Popen[bytes]]) -> Iterator[Callable[[float], None]]:
    """While commands are at work: whatever ends this process asks them to save and end, and waits until they have.

    Yields a `time.sleep` for between two looks at them. The signals by which a training saves and ends interrupt it:
    SIGTERM is passed on, as torchrun passes on no other. A second Ctrl-C ends this process at once.

    Raises
    ------
    KeyboardInterrupt
        In the wait, after a signal.
    """
    stop = StopRequest()

    def wait(seconds: float) -> None:
        time.sleep(seconds)
        if stop.wish:
            raise KeyboardInterrupt("; the same command goes on")

    with stop.listening():
        try:
            yield wait
        except BaseException:
            if commands:
                print("waiting for what is at work to save and end", file=sys.stderr, flush=True)
            for command in commands:
                command.terminate()
            for command in commands:
                command.wait()
            raise


def _is_ours(script: str) -> bool:
    """Whether the script on PATH is that of this interpreter's environment."""
    found = shutil.which(script)
    return found is not None and Path(found).parent.resolve() == Path(sys.executable).parent.resolve()
