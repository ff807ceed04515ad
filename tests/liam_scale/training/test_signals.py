"""Signals save and end a run: real ones, to this process, through a terminal, and through torchrun."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from liam_scale.train import main
from liam_scale.training import signals
from liam_scale.training.signals import StopRequest
from loaders.progress import tell

SHORT = ("--model.n-hidden", "16", "--n-latent", "4", "--minibatch", "64", "--memory", "64MiB")
ENDLESS = ("--batch-key", "sample", "--max-epochs", "100000", "--training.no-early-stopping", *SHORT)


def wait_for(path: Path, process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process is None or process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def saved_step(run: Path) -> int:
    return int(sorted((run / "checkpoints").glob("step-*"))[-1].name[-9:])


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 0), ("SIGUSR1", 0), ("SIGHUP", 0), ("SIGINT", 130)])
def test_a_signal_saves_and_ends_with_one_line(
    multiome: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, code: int
) -> None:
    number, out = getattr(signal, name), tmp_path / "run"
    before = signal.getsignal(number)
    if before is signal.SIG_IGN:
        pytest.skip(f"{name} is ignored here, as under nohup")

    def send() -> None:
        wait_for(out / "history.csv")
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    assert main([str(multiome), "--out", str(out), *ENDLESS]) == code
    sender.join()
    said = capsys.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if not line.startswith(("device", "epoch"))]
    assert len(lines) == 1
    assert lines[0].startswith("interrupted at epoch" if code else "stopped at epoch")
    assert lines[0].endswith(f"step {saved_step(out):,}; the same command goes on from there")
    assert signal.getsignal(number) is before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As `nohup` has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest()
        with stop.listening():
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.wish == 0
    finally:
        signal.signal(signal.SIGHUP, before)


WAITING = """
import runpy, sys, time
with runpy.run_path(sys.argv[1])["StopRequest"]().listening():
    print("listening", flush=True)
    while True:
        time.sleep(0.01)
"""


def test_a_second_interrupt_ends_at_once_and_says_nothing() -> None:
    command = [sys.executable, "-c", WAITING, signals.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGINT
    assert said == b""


IMPORTING = """
import os, signal, sys
class Interrupts:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupts)
from liam_scale.cli import main
sys.exit(main(["train", "--help"]))
"""


def test_ctrl_c_while_torch_is_imported_says_nothing(environment: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTING], env=environment, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


LOGIN = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has ignored, where the tests run under it
os.login_tty(int(sys.argv[1]))
os.execv(sys.argv[2], sys.argv[2:])
"""


def in_own_terminal(command: list[str], environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], int]:
    """A process whose controlling terminal is a new one, and the end of it that a person would type at."""
    master, slave = os.openpty()
    command = [sys.executable, "-c", LOGIN, str(slave), *command]
    process = subprocess.Popen(command, env=environment, pass_fds=(slave,))
    os.close(slave)
    return process, master


def test_a_terminal_that_is_closed_saves(multiome: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "liam_scale.train", str(multiome), "--out", str(out), *ENDLESS]
    process, master = in_own_terminal(command, environment)
    reader = threading.Thread(target=swallow, args=(master,), daemon=True)
    reader.start()
    wait_for(out / "history.csv", process)
    os.close(master)
    assert process.wait(timeout=60) == 0
    assert saved_step(out) > 0


def test_a_line_for_a_terminal_that_is_gone_stops_no_save() -> None:
    """Writing may fail before the handler of SIGHUP has run."""
    master, slave = os.openpty()
    os.close(master)
    gone = os.fdopen(slave, "w")
    with pytest.raises(OSError, match="Input/output error"):
        print("epoch 1", file=gone, flush=True)
    tell("epoch 2", gone)
    with suppress(OSError):
        gone.close()


def swallow(master: int, into: list[bytes] | None = None) -> None:
    try:
        while chunk := os.read(master, 65536):
            if into is not None:
                into.append(chunk)
    except OSError:
        pass


def test_ctrl_c_at_torchrun_reaches_every_rank_once_and_saves(
    multiome: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    """torchrun itself then ends with code 1 and a traceback of its own, which a rank cannot prevent."""
    out = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    process, master = in_own_terminal(
        [*launcher, "liam_scale.train", str(multiome), "--out", str(out), *ENDLESS], environment
    )
    said: list[bytes] = []
    reader = threading.Thread(target=swallow, args=(master, said))
    reader.start()
    wait_for(out / "history.csv", process)
    os.write(master, b"\x03")
    assert process.wait(timeout=60) == 1
    reader.join()
    os.close(master)
    text = b"".join(said).decode()
    assert text.count("interrupted at epoch") == 1
    assert f"step {saved_step(out):,}; the same command goes on from there" in text
    assert "KeyboardInterrupt" not in text
