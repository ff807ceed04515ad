"""The acceptance of the GPU path in one command: PASS, FAIL or NOT RUN a line, and exit code 1 if one failed.

    python benchmarks/gpu.py                     # with two or more GPUs it starts torchrun itself
    python benchmarks/gpu.py --only kernels step --json gpu.json

On a machine without a GPU it runs what can run there (Triton's interpreter, ptxas, the pretend device, gloo in the
place of NCCL) and lists the rest as NOT RUN. `--complete` makes NOT RUN fail too: for the machine that accepts.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness import ROOT, describe_machine, table

PRECISIONS = ("float32", "tf32", "bf16")

MEMORY_BYTES = 0.85 * 3.35e12
"""Bytes a second that an H100 moves at best."""
FLOPS = {"float32": 0.6 * 990e12 / 6, "tf32": 0.6 * 495e12, "bf16": 0.6 * 990e12}
"""Operations a second; float32 is six products of bfloat16."""
SPEED_GATES = {128: 60_000, 1_024: 400_000, 4_096: 700_000}
"""Cells a second in bf16 with the minibatches on the device."""
LIKELIHOOD_GATES = {"bf16": 0.36, "tf32": 0.55}
"""Milliseconds of the multinomial's loss and gradients on an H100, 1,024 x 116,490."""
MOST_KERNELS = 60
"""Kernels a step, once a step is one CUDA graph."""


@dataclass(frozen=True)
class Line:
    part: str
    what: str
    got: str
    gate: str
    verdict: str


class Report:
    """Lines as they are found, printed at once."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.part = ""

    def add(self, what: str, got: object, *, gate: str = "", holds: bool = True) -> None:
        self._add(Line(self.part, what, str(got), gate, "PASS" if holds else "FAIL"))

    def not_run(self, what: str, reason: str, *, gate: str = "") -> None:
        self._add(Line(self.part, what, reason, gate, "NOT RUN"))

    def _add(self, line: Line) -> None:
        self.lines.append(line)
        print(
            f"{line.verdict:8}{line.part}: {line.what}: {line.got}{f' ({line.gate})' if line.gate else ''}", flush=True
        )

    def code(self, *, is_complete: bool) -> int:
        bad = ("FAIL", "NOT RUN") if is_complete else ("FAIL",)
        return int(any(line.verdict in bad for line in self.lines) or not self.lines)


@dataclass(frozen=True)
class Place:
    """Where this runs."""

    device: Any
    num_gpus: int
    has_interpreter: bool
    folder: Path

    @property
    def is_gpu(self) -> bool:
        return self.num_gpus > 0

    @property
    def kernels(self) -> str | None:
        """The impl whose kernels are under test here: Triton's on a GPU, or interpreted."""
        return "triton" if self.is_gpu or self.has_interpreter else None


def environment(place: Place, report: Report) -> None:
    import torch

    machine = describe_machine("triton")
    report.add("machine", ", ".join(f"{k} {v}" for k, v in machine.items()))
    if not place.is_gpu:
        report.not_run("card, driver, copies", "no GPU", gate="capability >= 8.0, pinned copy >= 10 GB/s")
        return
    from gpu_measures import seconds_a_call

    properties = torch.cuda.get_device_properties(place.device)
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    query = ["nvidia-smi", "--query-gpu=driver_version,pcie.link.gen.current,pcie.link.width.current", "--format=csv"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().replace("\n", " | ")
    report.add("card", f"{place.num_gpus} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB; {driver}")
    report.add("software", f"torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl}")
    report.add("cores a GPU", len(os.sched_getaffinity(0)) // place.num_gpus)
    capability = properties.major + properties.minor / 10
    report.add("capability", capability, gate=">= 8.0", holds=capability >= 8.0)
    host, here = torch.empty(2**28, dtype=torch.uint8).pin_memory(), torch.empty(2**28, dtype=torch.uint8).cuda()
    other = torch.empty_like(here)
    rate = 2**28 / seconds_a_call(lambda: here.copy_(host, non_blocking=True), place.device, calls=5) / 1e9
    report.add("pinned copy, GB/s", f"{rate:.1f}", gate=">= 10", holds=rate >= 10)
    rate = 2 * 2**28 / seconds_a_call(lambda: other.copy_(here), place.device, calls=20) / 1e9
    report.add("device copy, GB/s read and written", f"{rate:,.0f}")


def compiled(place: Place, report: Report) -> None:
    """All kernels through ptxas."""
    if find_spec("triton") is None:
        report.not_run("registers, spills, shared memory", "Triton is not installed: pip install liam-scale[gpu]")
        return
    results = place.folder / "kernels.json"
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_compile.py"), "--json", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean, check=False)
    found = json.loads(results.read_text()) if results.exists() else []
    for target in sorted({row["target"] for row in found}):
        rows = [row for row in found if row["target"] == target]
        worst = max(row["registers"] for row in rows), max(row["shared"] for row in rows)
        bad = [row["kernel"] for row in rows if not row["fits"]]
        got = f"{len(rows)} kernels, at most {worst[0]} registers and {worst[1]:,} B shared"
        got += "".join(f", {name}" for name in bad)
        report.add(f"sm_{target}", got, gate="no spill, memories fit", holds=not bad)
    if done.returncode and not any(not row["fits"] for row in found):
        report.add("gpu_compile.py", done.stderr.strip()[-300:], gate="exit code 0", holds=False)


def tests(place: Place, report: Report) -> None:
    """The suite's own: interpreted kernels and the pretend device everywhere, those marked gpu on a GPU."""
    pages = {
        "kernels by Triton's interpreter": ["tests/liam_scale/kernels", "-k", "triton or cuda"],
        "the pretend device": ["tests/liam_scale/pretend_device"],
        "pytest -m gpu": ["-m", "gpu"],
    }
    for what, options in pages.items():
        if what == "pytest -m gpu" and not place.is_gpu:
            report.not_run(what, "no GPU", gate="no failure")
            continue
        command = [sys.executable, "-m", "pytest", "-q", "-n0", "-rs", "-p", "no:cacheprovider", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        last = (done.stdout.strip().splitlines() or [done.stderr[-200:]])[-1].strip("= ")
        if done.returncode == 0 and " passed" not in last:
            report.not_run(what, last, gate="no failure")
        else:
            report.add(what, last, gate="no failure", holds=done.returncode == 0)


def kernels(place: Place, report: Report) -> None:
    """Each precision against float64: shapes, sizes of cells, both likelihoods, weight 0, runs compared."""
    from gpu_measures import CELL_GATE, DEEP, GRADIENT_GATES, SHALLOW_CELL_GATE, Problem, kernel_errors

    gates = ", ".join(f"{most:g} {precision}" for precision, most in GRADIENT_GATES.items())
    shallow = f"{SHALLOW_CELL_GATE:g} in tf32 and bf16 below {DEEP} non-zeros"
    gate = f"gradients {gates}, where float32 amplifies nothing; cells {CELL_GATE:g}, {shallow}; two runs equal"
    if place.kernels is None:
        report.not_run("against float64", "no GPU, and no Triton for its interpreter", gate=gate)
        return
    if place.is_gpu:
        cells, features, hidden = (0, 1, 7, 128, 1_024), ((1, 1), (13_431, 800), (116_490, 3_600)), 128
    else:
        cells, features, hidden = (0, 1, 7), ((1, 1), (300, 150)), 16
    for precision in PRECISIONS:
        for name in ("per-cell", "original", "negative_binomial"):
            for size in (1.0, 100.0, 8_000.0):
                problems = [Problem(name, b, f, found, hidden, size) for b in cells for f, found in features]
                errors = [kernel_errors(p, place.device, precision, place.kernels) for p in problems]
                pairs = list(zip(problems, errors, strict=True))
                bad = [(p, e) for p, e in pairs if not e.holds(precision, is_deep=p.found >= DEEP)]
                sound = [e.gradient for e in errors if e.plain_gradient <= 1e-6]
                got = f"worst gradient {max(sound):.1e}, worst cell {max(e.cell for e in errors):.1e}"
                got += f"; {len(errors) - len(sound)} of {len(errors)} amplify rounding" + (
                    f"; {bad[0]}" if bad else ""
                )
                report.add(f"{name}, {precision}, library {size:g}", got, gate=gate, holds=not bad)


def step(place: Place, report: Report) -> None:
    """A step of the model against the kernels of the CPU."""
    from gpu_measures import SMALL, Shape, step_errors

    if place.kernels is None:
        report.not_run("a step against the CPU", "no GPU, and no Triton for its interpreter", gate="1e-6, 1e-5, 0 bits")
        return
    middle = Shape(1_300, 11_600, 80, 360)
    cases: dict[str, dict[str, Any]] = {"as a rule": {}, "the original's likelihood": {"likelihood": "original"}}
    for what, options in cases.items():
        for cells in (1, 128) if place.is_gpu else (1, 9):
            found = step_errors(middle if place.is_gpu else SMALL, cells, place.device, place.kernels, **options)
            holds = found["loss"] <= 1e-6 and found["gradient"] <= 1e-5 and found["bits"] == 0
            got = f"loss {found['loss']:.1e}, gradient {found['gradient']:.1e}, {found['bits']} bits of noise differ"
            report.add(f"{what}, {cells} cells", got, gate="1e-6, 1e-5, 0", holds=holds)


@contextmanager
def no_waiting(is_gpu: bool) -> Iterator[None]:
    """On a GPU an error where the host would wait for the device."""
    import torch

    if is_gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if is_gpu:
            torch.cuda.set_sync_debug_mode("default")


def launches(place: Place, report: Report) -> None:
    """20 steps without a wait, and what the profiler counts; without a GPU operators of plain torch."""
    from gpu_measures import PAPER, SMALL, make_minibatch, make_model, make_trainer, profile_steps, wait_for

    shape, cells, steps = (PAPER, 1_024, 20) if place.is_gpu else (SMALL, 9, 2)
    options = {"precision": "bf16"} if place.is_gpu else {"impl": "plain"}
    trainer = make_trainer(
        make_model(shape, place.device, **options),
        [make_minibatch(cells, shape, place.device)],
        place.device,
        place.folder,
    )
    minibatches = iter(trainer.train_source)
    for _ in range(3):
        trainer.step(next(minibatches))
    wait_for(place.device)
    with no_waiting(place.is_gpu):
        for _ in range(steps):
            trainer.step(next(minibatches))
    if not place.is_gpu:
        found, _ = profile_steps(trainer, steps)
        number = sum(count for count, _ in found.values()) / steps
        report.not_run(
            "waits, kernels, pageable copies", f"no GPU; {number:,.0f} operators a small step of plain torch"
        )
        return
    report.add("waits for the device in 20 steps", 0, gate="0")
    found, pageable = profile_steps(trainer, steps)
    number = sum(count for count, _ in found.values()) / steps
    report.add("kernels a step", f"{number:,.0f}", gate=f"<= {MOST_KERNELS}", holds=number <= MOST_KERNELS)
    report.add("copies of pageable memory", pageable, gate="0", holds=pageable == 0)
    total = sum(spent for _, spent in found.values())
    for name, (count, spent) in sorted(found.items(), key=lambda item: -item[1][1])[:5]:
        report.add(f"kernel {name[:60]}", f"{spent / steps:.3f} ms, {spent / total:.0%}, {count / steps:.0f} a step")


def bound_seconds(cells: int, precision: str) -> float:
    """What an H100 needs for a step of the paper's shape: Adam's traffic, and the products over all features."""
    from gpu_measures import PAPER

    features = PAPER.genes + PAPER.peaks
    parameters = 3 * 128 * features
    traffic = parameters * (28 + 4) / MEMORY_BYTES
    products = 2 * cells * 128 * (features * 4 + PAPER.genes * 7 + PAPER.peaks * 5)
    return traffic + products / FLOPS[precision]


def speed(place: Place, report: Report) -> None:
    """Minibatches on the device, each precision, against the bounds; without a GPU the same code on a small shape."""
    from gpu_measures import PAPER, SMALL, likelihood_seconds, step_seconds

    if not place.is_gpu:
        seconds = step_seconds(SMALL, 9, place.device, place.folder, calls=2, impl="plain")
        for cells in SPEED_GATES:
            bounds = ", ".join(f"{cells / bound_seconds(cells, p):,.0f} {p}" for p in PRECISIONS)
            report.not_run(
                f"{cells:,} cells", f"no GPU; bound of an H100, cells/s: {bounds}", gate=">= 50 % of the bound"
            )
        report.not_run("the same code on the CPU", f"a small step of plain torch takes {seconds * 1e3:.0f} ms here")
        return
    for cells, gate in SPEED_GATES.items():
        for precision in PRECISIONS:
            seconds = step_seconds(PAPER, cells, place.device, place.folder, precision=precision)
            share, rate = bound_seconds(cells, precision) / seconds, cells / seconds
            got = f"{seconds * 1e3:.2f} ms, {rate:,.0f} cells/s, {share:.0%} of the bound of an H100"
            needs = f">= 50 %{f', >= {gate:,} cells/s' if precision == 'bf16' else ''}"
            holds = share >= 0.5 and (precision != "bf16" or rate >= gate)
            report.add(f"{cells:,} cells, {precision}", got, gate=needs, holds=holds)
    for precision, most in LIKELIHOOD_GATES.items():
        for impl in ("triton", "plain"):
            spent = 1e3 * likelihood_seconds(1_024, PAPER.peaks, PAPER.peaks_found, place.device, precision, impl=impl)
            is_gated = impl == "triton"
            what = f"multinomial alone, {precision}, {'kernels' if is_gated else 'torch.compile'}"
            gate = f"<= {most} ms" if is_gated else ""
            report.add(what, f"{spent:.3f} ms", gate=gate, holds=not is_gated or spent <= most)


def fallbacks(place: Place, report: Report) -> None:
    """Without Triton's kernels, without a compiler: a warning at most, the same numbers."""
    if not place.is_gpu:
        report.not_run("LIAM_SCALE_TRITON=0, LIAM_SCALE_COMPILE=0, CC=/bin/false", "no GPU", gate="same loss to 1e-6")
        return
    code = """
import time, torch, gpu_measures as g
start, device, shape = time.time(), torch.device("cuda"), g.Shape(1_300, 11_600, 80, 360)
model, minibatch = g.make_model(shape, device), g.make_minibatch(128, shape, device)
objective = model(minibatch, step=0, seed=0, kl_weight=1.0, cell_weight=1 / 128)
objective.loss.backward()
print(objective.loss.item(), time.time() - start)
"""
    losses = {}
    plain = {"LIAM_SCALE_TRITON": "0"}
    for change in ({}, plain, {**plain, "LIAM_SCALE_COMPILE": "0"}, {"CC": "/bin/false"}):
        cache = {"TRITON_CACHE_DIR": tempfile.mkdtemp(dir=place.folder)}
        settings = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}", **cache, **change}
        done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=False)
        what = ", ".join(f"{k}={v}" for k, v in change.items()) or "as a rule"
        if done.returncode:
            report.add(what, done.stderr.strip()[-200:], gate="runs", holds=False)
            continue
        loss, seconds = map(float, done.stdout.split())
        losses[what] = loss
        wanted = losses.get("as a rule", loss)
        holds = math.isclose(loss, wanted, rel_tol=1e-6)
        report.add(what, f"loss {loss!r}, {seconds:.0f} s to the first step", gate="same loss to 1e-6", holds=holds)


def memory(place: Place, report: Report) -> None:
    """2,000 steps of differing size."""
    from gpu_measures import PAPER, make_minibatch, make_model, make_trainer, peak_growth

    if not place.is_gpu:
        report.not_run("peak over 2,000 steps", "no GPU", gate="no growth after 200")
        return
    minibatches = [make_minibatch(1_024 - 3 * k, PAPER, place.device, seed=k) for k in range(4)]
    trainer = make_trainer(make_model(PAPER, place.device, precision="bf16"), minibatches, place.device, place.folder)
    first, last, unused = peak_growth(trainer, steps=2_000, after=200)
    got = f"{first / 2**30:.2f} then {last / 2**30:.2f} GiB, {unused / 2**30:.2f} GiB reserved and unused"
    report.add("peak over 2,000 steps", got, gate="no growth after 200", holds=last <= first * 1.01)


class Runs:
    """Trainings by the command, on a small store."""

    def __init__(self, place: Place) -> None:
        from loaders.synthetic import simulate

        self.place, self.store = place, place.folder / "small.zarr"
        sparse = {"genes_per_cell": 60.0, "peaks_per_cell": 100.0}
        if not self.store.exists():
            simulate(self.store, num_cells=1_500, num_genes=300, num_peaks=1_000, num_samples=2, **sparse)

    def command(self, out: str, *options: str, ranks: int = 1, device: str = "") -> list[str]:
        launch = [sys.executable, "-m"]
        if ranks > 1:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
        device = device or ("cuda" if self.place.is_gpu else "cpu")
        names = [str(self.store), "--out", str(self.place.folder / out), "--batch-key", "sample", "--device", device]
        return [*launch, "liam_scale.train", *names, "--minibatch", "128", "--training.no-early-stopping", *options]

    def run(self, command: list[str]) -> None:
        settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[2:5])} ... ended with code {done.returncode}: {done.stderr[-500:]}")

    def stopped(self, command: list[str], sent: int, out: str) -> int:
        """Start a training, send it a signal once it has saved, and return its exit code."""
        settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < until and not self.checkpoints(out):
            time.sleep(0.1)
        process.send_signal(sent)
        return process.wait(timeout=300)

    def checkpoints(self, out: str) -> list[Path]:
        return [path for path in (self.place.folder / out).glob("checkpoints/*") if not path.name.startswith(".")]

    def curve(self, out: str) -> list[float]:
        with (self.place.folder / out / "history.csv").open() as file:
            return [float(row["validation_loss"]) for row in csv.DictReader(file)]


def apart(found: list[float], wanted: list[float]) -> float:
    if len(found) != len(wanted):
        return math.inf
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def ranks(place: Place, report: Report) -> None:
    """Two ranks against one: NCCL on two GPUs, gloo without a GPU."""
    gate, epochs = "curve to 1e-4", ("--max-epochs", "3")
    if place.num_gpus == 1:
        report.not_run("two ranks by NCCL", "one GPU", gate=gate)
        return
    runs, through = Runs(place), "NCCL" if place.is_gpu else "gloo"
    if not place.is_gpu:
        report.not_run("two ranks by NCCL", "no GPU", gate=gate)
    runs.run(runs.command("one", *epochs))
    runs.run(runs.command("two", *epochs, ranks=2))
    worst = apart(runs.curve("two"), runs.curve("one"))
    report.add(f"two ranks by {through} against one, 3 epochs", f"{worst:.1e}", gate=gate, holds=worst <= 1e-4)
    often = (*epochs, "--training.checkpoint-steps", "5")
    code = runs.stopped(runs.command("ended", *often, ranks=2), signal.SIGTERM, "ended")
    runs.run(runs.command("ended", *often, ranks=1))
    worst = apart(runs.curve("ended"), runs.curve("one"))
    what = f"SIGTERM to two ranks by {through} (code {code}), gone on with one"
    report.add(what, f"{worst:.1e}", gate=gate, holds=code != 0 and worst <= 1e-4)


def whole(place: Place, report: Report) -> None:
    """train, kill -9, train again, embed: against the run on the CPU."""
    import numpy as np

    runs, options = Runs(place), ("--max-epochs", "3", "--training.checkpoint-steps", "5")
    code = runs.stopped(runs.command("killed", *options), signal.SIGKILL, "killed")
    runs.run(runs.command("killed", *options))
    runs.run(runs.command("on the cpu", *options, device="cpu"))
    worst = apart(runs.curve("killed"), runs.curve("on the cpu"))
    where = "GPU" if place.is_gpu else "CPU"
    report.add(
        f"killed (code {code}) and gone on, {where} against CPU", f"{worst:.1e}", gate="1e-3", holds=worst <= 1e-3
    )
    if not place.is_gpu:
        report.not_run("the same on a GPU", "no GPU", gate="1e-3")
    import liam_scale

    found, wanted = (
        liam_scale.load_run(place.folder / name).embedding(str(runs.store)) for name in ("killed", "on the cpu")
    )
    worst = float(np.abs(np.asarray(found) - np.asarray(wanted)).max())
    report.add("embeddings", f"{worst:.1e}", gate="1e-3", holds=worst <= 1e-3)


def resident(place: Place, report: Report) -> None:
    """Rows that stay on the card against minibatches that are sent."""
    if not place.is_gpu:
        report.not_run("second epoch of rows that stay", "no GPU", gate="bit for bit, nothing waited for")
        return
    import torch
    from gpu_measures import seconds_a_call

    from loaders import Loader, LoaderConfig, open_store

    store, options = open_store(Runs(place).store), {"transpose": False, "values": "stored", "device": place.device}
    kept, sent = (Loader(store, LoaderConfig(resident=word), **options) for word in ("on", "off"))
    for loader in (kept, sent):
        list(loader)
    is_same = True
    for found, wanted in zip(kept, sent, strict=True):
        for name, counts in found.counts.items():
            is_same &= torch.equal(counts.indices, wanted.counts[name].indices)
            is_same &= counts.values.cpu().numpy().tobytes() == wanted.counts[name].values.cpu().numpy().tobytes()
    report.add("second epoch of rows that stay", is_same, gate="bit for bit", holds=is_same and bool(kept._on_device))
    for word, loader in (("kept", kept), ("sent", sent)):
        rate = loader.num_cells / seconds_a_call(lambda loader=loader: list(loader), place.device, calls=3)
        report.add(f"small cells a second, {word}", f"{rate:,.0f}")
        loader.close()


def sanitizers(place: Place, report: Report) -> None:
    """Memory that kernels touch, and streams that do not wait for each other."""
    gate, tool = "no error", shutil.which("compute-sanitizer")
    if not place.is_gpu:
        report.not_run("compute-sanitizer, TORCH_CUDA_SANITIZER", "no GPU", gate=gate)
        return
    code = "import torch; from liam_scale.kernels.cuda import trial; trial.run(torch.device('cuda'))"
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    checked = {"TORCH_CUDA_SANITIZER": ([], {"TORCH_CUDA_SANITIZER": "1"})}
    if tool is None:
        report.not_run("compute-sanitizer", "not installed: it comes with the CUDA toolkit", gate=gate)
    else:
        checked["compute-sanitizer"] = ([tool, "--tool", "memcheck", "--error-exitcode", "9"], {})
    for what, (prefix, change) in checked.items():
        command = [*prefix, sys.executable, "-c", code]
        done = subprocess.run(command, env={**settings, **change}, capture_output=True, text=True, check=False)
        got = done.stdout.strip().splitlines()[-1:] or ["no message"]
        report.add(what, got[0] if not done.returncode else done.stderr[-200:], gate=gate, holds=done.returncode == 0)


PARTS: dict[str, Callable[[Place, Report], None]] = {
    part.__name__: part
    for part in (
        environment,
        compiled,
        kernels,
        step,
        launches,
        speed,
        fallbacks,
        memory,
        ranks,
        whole,
        resident,
        sanitizers,
        tests,
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="parts to run; default: all")
    parser.add_argument("--skip", nargs="+", choices=list(PARTS), default=[], help="parts to leave out")
    parser.add_argument("--json", type=Path, help="also write the lines to a file")
    parser.add_argument("--complete", action="store_true", help="what could not be run fails too")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    has_gpu = shutil.which("nvidia-smi") is not None and Path("/dev/nvidia0").exists()
    if not has_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device, report = torch.device("cuda", 0) if num_gpus else torch.device("cpu"), Report()
    with tempfile.TemporaryDirectory(prefix="liam-scale-gpu-") as folder:
        interpreted = not num_gpus and find_spec("triton") is not None and platform.system() == "Linux"
        place = Place(device, num_gpus, interpreted, Path(folder))
        for name in options.only or [name for name in PARTS if name not in options.skip]:
            report.part = name
            try:
                PARTS[name](place, report)
            except Exception as error:
                traceback.print_exc()
                report.add("ended early", f"{type(error).__name__}: {error}"[:300], gate="no error", holds=False)
    print()
    print(table(("part", "what", "got", "gate", "verdict"), [list(asdict(line).values()) for line in report.lines]))
    counts = {verdict: sum(line.verdict == verdict for line in report.lines) for verdict in ("PASS", "FAIL", "NOT RUN")}
    print(", ".join(f"{number} {verdict}" for verdict, number in counts.items()))
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in report.lines], indent=1))
    return report.code(is_complete=options.complete)


if __name__ == "__main__":
    sys.exit(main())
