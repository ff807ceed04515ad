"""Signals to one rank or to all: all agree, save and end within 20 s, and the same command goes on."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import TORCHRUN, seconds, start_ranks, wait_for

from loaders.durable import holding

ENDLESS = ("--batch-key", "sample", "--training.no-early-stopping", "--model.n-hidden", "8", "--minibatch", "32")
ENDLESS = (*ENDLESS, "--max-epochs", "100000")


def steps(out: Path) -> list[int]:
    return sorted(int(path.name[-9:]) for path in (out / "checkpoints").glob("step-*"))


def test_ctrl_c_while_a_rank_waits_for_the_others_ends_it_at_once(store: Path, tmp_path: Path) -> None:
    [rank] = start_ranks([store, "--out", tmp_path / "run", *ENDLESS, "--timeout", "500"], 2, only=[0])
    port = 0
    while not port:  # torch is imported: it listens for the other
        assert rank.is_alive()
        with open("/proc/net/tcp") as tcp, open("/proc/net/tcp6") as tcp6:
            listening = {line.split()[1].rsplit(":")[-1] for line in [*tcp, *tcp6] if line.split()[3] == "0A"}
        port = rank.port if f"{rank.port:04X}" in listening else 0
        time.sleep(0.05)
    began = time.monotonic()
    rank.kill(signal.SIGINT)
    code, said = rank.ends()
    assert time.monotonic() - began < seconds(5)
    assert code in (-signal.SIGINT, 130)
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("target", ["one", "all"])
@pytest.mark.parametrize(
    ("name", "code"), [("SIGTERM", 0), ("SIGUSR1", 0), ("SIGHUP", 0), ("SIGINT", 130)], ids=lambda each: str(each)
)
def test_all_ranks_save_and_end_within_twenty_seconds(
    store: Path, tmp_path: Path, name: str, code: int, target: str, size: int
) -> None:
    out = tmp_path / "run"
    ranks = start_ranks([store, "--out", out, *ENDLESS], size)
    wait_for((out / "history.csv").exists, ranks)
    began = time.monotonic()
    for rank in ranks if target == "all" else ranks[-1:]:
        rank.kill(getattr(signal, name))
    ended = [rank.ends() for rank in ranks]
    assert time.monotonic() - began < seconds(20)
    assert [each for each, _ in ended] == [code] * size
    assert not any("Traceback" in said for _, said in ended)
    with holding(out):
        saved, before = steps(out), (out / "history.csv").read_bytes()
    assert saved[-1] > 0
    again = start_ranks([store, "--out", out, *ENDLESS], size)
    wait_for(lambda: len((out / "history.csv").read_bytes()) > len(before), again)
    for rank in again:
        rank.kill(signal.SIGTERM)
    assert [rank.ends()[0] for rank in again] == [0] * size
    assert steps(out)[-1] > saved[-1]
    assert (out / "history.csv").read_bytes().startswith(before)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_all_ranks_at_once_and_leaves_no_lock(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ranks = start_ranks([store, "--out", out, *ENDLESS], 2)
    wait_for((out / "history.csv").exists, ranks)
    ranks[1].kill(signal.SIGSTOP)  # so that the other waits for it after the first
    time.sleep(1)
    began = time.monotonic()
    ranks[0].kill(signal.SIGINT)
    time.sleep(1)
    ranks[0].kill(signal.SIGINT)
    assert ranks[0].ends()[0] == 130
    assert time.monotonic() - began < seconds(10)
    ranks[1].kill(signal.SIGKILL)
    ranks[1].ends()
    with holding(out):
        pass


@pytest.mark.slow
def test_a_rank_asleep_under_torchrun_is_named_and_nothing_is_left(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [*TORCHRUN, "--nproc-per-node=2", "-m", "liam_scale.train", str(store), "--out", str(out), *ENDLESS]
    with subprocess.Popen([*command, "--timeout", "10"], stderr=subprocess.PIPE, text=True) as launcher:
        deadline = time.monotonic() + 300
        while not (out / "history.csv").exists():
            assert launcher.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        listed = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        ranks = {rank_of(int(each)): int(each) for each in listed if rank_of(int(each)) is not None}
        os.kill(ranks[1], signal.SIGSTOP)
        _, said = launcher.communicate(timeout=seconds(120))
    assert launcher.returncode == 1
    assert f"rank 1 on {socket.gethostname()} has not gone on for 10 s" in said
    assert not [each for each in ranks.values() if Path(f"/proc/{each}").exists()]
    with holding(out):
        pass


def rank_of(process: int) -> int | None:
    entries = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return next((int(entry[5:]) for entry in entries if entry.startswith(b"RANK=")), None)


if sys.platform != "linux":
    pytest.skip("processes are looked at through /proc", allow_module_level=True)
