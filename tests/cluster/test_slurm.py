"""The Slurm script of docs/running.md in a real Slurm of two nodes on this machine: time limit, requeue, scancel."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from loaders.durable import holding
from loaders.synthetic import simulate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("slurmctld") or not shutil.which("slurmd") or os.getuid() != 0,
        reason="needs slurmctld and slurmd (Debian: slurm-wlm), and root to start them",
    ),
]

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/linear
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES State=UP
"""
ENDLESS = "--max-epochs 100000 --training.no-early-stopping --model.n-hidden 8 --n-latent 3 --minibatch 32"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Runs a command of Slurm; its daemons live as long as the module's tests."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "n1", "n2"):
        (folder / name).mkdir()
    ports = {"port": free_port(), "port1": free_port(), "port2": free_port()}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=socket.gethostname(), **ports))
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"

    def call(*command: object) -> str:
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    try:
        call("slurmctld", "-c")
        call("slurmd", "-N", "n1")
        call("slurmd", "-N", "n2")
        yield call
    finally:
        for file in folder.glob("*.pid"):
            os.kill(int(file.read_text()), signal.SIGTERM)
        with suppress(AssertionError):
            until(lambda: not started_with(environment["SLURM_CONF"]), seconds=30)
        left = started_with(environment["SLURM_CONF"])
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        assert not left, left.values()


def started_with(configuration: str) -> dict[int, str]:
    """Processes of a Slurm and of its jobs, and their commands."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"SLURM_CONF={configuration}\0".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # It has ended.
            continue
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "a.zarr"
    simulate(path, num_cells=300, num_genes=20, num_peaks=30, genes_per_cell=8, peaks_per_cell=8, num_samples=2)
    return path


@pytest.fixture
def submit(slurm: Callable[..., str], store: Path, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Submits the script of the page for two nodes with a process each; the job's number."""
    jobs: list[str] = []

    def start(*options: str, training: str = ENDLESS) -> str:
        page = (ROOT / "docs" / "running.md").read_text()
        [script] = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", page, flags=re.DOTALL)
        script = script.replace("--ntasks-per-node=4", "--ntasks-per-node=1").replace("#SBATCH --gpus-per-node=4\n", "")
        script = script.replace("--cpus-per-task=8", "--cpus-per-task=1").replace("29500", str(free_port()))
        script = script.replace("/shared/atlas.zarr", f"{store} {training}").replace(
            "/shared/runs/a", str(tmp_path / "run")
        )
        assert "/shared" not in script
        file = tmp_path / "job.sh"
        file.write_text(script)
        said = slurm("sbatch", "--parsable", f"--output={tmp_path}/log", f"--chdir={tmp_path}", *options, file)
        jobs.append(said.strip())
        return jobs[-1]

    yield start
    for job in jobs:
        if state(slurm, job) in ("RUNNING", "PENDING", "COMPLETING"):
            slurm("scancel", "--signal=KILL", "--full", job)
            slurm("scancel", job)
            until(lambda job=job: state(slurm, job) not in ("RUNNING", "PENDING", "COMPLETING"))


def state(slurm: Callable[..., str], job: str) -> str:
    return re.findall(r"JobState=(\w+)", slurm("scontrol", "show", "job", job))[0]


def until(is_so: Callable[[], object], *, seconds: float = 150) -> float:
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < seconds
        time.sleep(0.2)
    return time.monotonic() - began


def said(tmp_path: Path) -> str:
    return (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""


def saved_steps(tmp_path: Path) -> list[str]:
    return re.findall(r"stopped at epoch \d+, step ([\d,]+);", said(tmp_path))


def resumed_steps(tmp_path: Path) -> list[str]:
    return re.findall(r"resuming .* step ([\d,]+)", said(tmp_path))


def assert_clean(tmp_path: Path) -> None:
    """No traceback, no process of the training left, the lock free."""
    assert "Traceback" not in said(tmp_path)
    left = subprocess.run(["pgrep", "-f", f"liam_scale.train.*{tmp_path}"], capture_output=True, text=True)
    assert left.stdout == ""
    with holding(tmp_path / "run"):
        pass


def test_a_signal_before_the_time_limit_saves_and_the_job_goes_on_until_it_has_finished(
    slurm: Callable[..., str], submit: Callable[..., str], tmp_path: Path
) -> None:
    job = submit("--time=1", "--signal=USR1@10")
    until(lambda: saved_steps(tmp_path), seconds=200)
    until(lambda: "Restarts=1" in slurm("scontrol", "show", "job", job), seconds=60)
    # Not at once: Slurm may take it for the start that it has just revoked, and end the job.
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now+5", "TimeLimit=30")
    until(lambda: resumed_steps(tmp_path), seconds=300)
    assert resumed_steps(tmp_path) == saved_steps(tmp_path)
    slurm("scancel", job)
    until(lambda: state(slurm, job) == "CANCELLED", seconds=60)
    last = int(saved_steps(tmp_path)[-1].replace(",", ""))
    assert_clean(tmp_path)
    job = submit(training=ENDLESS.replace("--max-epochs 100000", f"--max-epochs 100000 --max-steps {last + 5}"))
    until(lambda: state(slurm, job) == "COMPLETED")
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert "Restarts=0" in slurm("scontrol", "show", "job", job)


def test_requeue_saves_and_goes_on(slurm: Callable[..., str], submit: Callable[..., str], tmp_path: Path) -> None:
    job = submit()
    until((tmp_path / "run" / "history.csv").exists)
    slurm("scontrol", "requeue", job)
    until(lambda: saved_steps(tmp_path), seconds=20)
    until(lambda: "Restarts=1" in slurm("scontrol", "show", "job", job), seconds=60)
    until(lambda: state(slurm, job) in ("PENDING", "RUNNING"), seconds=60)
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now+5")
    until(lambda: resumed_steps(tmp_path), seconds=300)
    assert resumed_steps(tmp_path) == saved_steps(tmp_path)[:1]


def test_scancel_saves_within_twenty_seconds_leaves_nothing_and_one_node_goes_on(
    slurm: Callable[..., str], submit: Callable[..., str], tmp_path: Path
) -> None:
    job = submit()
    until((tmp_path / "run" / "history.csv").exists)
    slurm("scancel", job)
    assert until(lambda: state(slurm, job) == "CANCELLED") < 20
    until(lambda: saved_steps(tmp_path), seconds=20)
    assert_clean(tmp_path)
    last = int(saved_steps(tmp_path)[-1].replace(",", ""))
    job = submit("--nodes=1", training=f"{ENDLESS} --max-steps {last + 5}")
    until(lambda: state(slurm, job) == "COMPLETED")
    assert resumed_steps(tmp_path) == saved_steps(tmp_path)
    assert re.findall(r"device .*?, (1 rank|2 ranks)", said(tmp_path)) == ["2 ranks", "1 rank"]


def test_the_runs_of_a_sweep_are_the_tasks_of_an_array_job(
    slurm: Callable[..., str], store: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny.toml").write_text("[model]\nn_hidden = 8\nn_latent = 3\n")
    out, options = tmp_path / "sweep", ["--options", str(tmp_path / "tiny.toml"), "--max-epochs", "1"]
    command = [sys.executable, "-m", "liam_scale.cli", "sweep", str(store), "--out", str(out), "--batch-key", "sample"]
    command += ["--alpha", "1", "25", "--seeds", "0", *options, "--slurm"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"2 runs are to be trained: sbatch {out / 'sweep.sbatch'}" in done.stdout
    job = slurm("sbatch", "--parsable", out / "sweep.sbatch").strip()
    until(lambda: len([*out.glob("runs/*/model.safetensors")]) == 2)
    until(lambda: not slurm("squeue", "--noheader").strip(), seconds=60)
    logs = [file.read_text() for file in (out / "runs").glob(f"slurm-{job}_*.log")]
    assert len(logs) == 2
    assert not any("Traceback" in log for log in logs)
