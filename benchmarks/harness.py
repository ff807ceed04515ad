"""What all benchmarks share: peers as long-lived processes that take turns, medians with quartiles, JSON lines.

A peer is a Python program that prints a JSON line when it is ready, then for every line on its standard input does one
round of work and prints one JSON line with `wall`, `cpu` (seconds, of all its threads) and what else it measured.
Peers wait while another works, and their order rotates from round to round, so that a noisy minute hits all alike.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Peer:
    """A program under measurement."""

    name: str
    command: Sequence[str]
    threads: int = 1


class Process:
    """A running peer."""

    def __init__(self, peer: Peer) -> None:
        self.name = peer.name
        threads = str(peer.threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
        }
        self._process = subprocess.Popen(
            list(peer.command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ready = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.name}: ended with code {self._process.wait()} without an answer")

    def round(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("round\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def peak_rss_mb(process: int | str = "self") -> float:
    """Peak resident memory of a process; `ru_maxrss` carries the parent's through fork and exec."""
    status = Path(f"/proc/{process}/status").read_text()
    return next(float(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def serve(work: Callable[[], dict[str, Any]], **ready: Any) -> None:
    """The peer's side: do `work` once for every line on standard input."""
    print(json.dumps({"ready": True, **ready}), flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        measured = work()
        result = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, **measured}
        result["peak_rss_mb"] = peak_rss_mb()
        print(json.dumps(result), flush=True)


def take_turns(peers: Iterable[Peer], *, rounds: int, warmup: int = 1) -> dict[str, list[dict[str, Any]]]:
    """Results of every peer, `rounds` each, interleaved with a rotating order."""
    processes = [Process(peer) for peer in peers]
    results: dict[str, list[dict[str, Any]]] = {process.name: [] for process in processes}
    for turn in range(warmup + rounds):
        for place in range(len(processes)):
            process = processes[(turn + place) % len(processes)]
            result = process.round()
            if turn >= warmup:
                results[process.name].append(result)
                print(json.dumps({"peer": process.name, "round": turn - warmup, **result}), flush=True)
    for process in processes:
        process.close()
    return results


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def spread(values: Sequence[float], digits: int = 1) -> str:
    middle, low, high = quartiles(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(map(str, header)) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def describe_machine(*packages: str) -> dict[str, Any]:
    """Processor, cores, and versions; printed at the head of every benchmark."""
    cpu = "unknown"
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    versions = {}
    for package in ("torch", "numpy", "numba", "zarr", "numcodecs", *packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    machine = {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), **versions}
    print(json.dumps(machine), flush=True)
    return machine
