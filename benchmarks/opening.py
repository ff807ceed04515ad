"""From launch to the first step on a store of ten million cells, of a new run and of one resumed near the epoch's end.

    python benchmarks/opening.py [--cells 10000000]

The store holds four non-zeros a cell: what grows with the number of cells is in it, what grows with the counts is not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from harness import ROOT, describe_machine, table

GENES, NONZEROS, AT_ONCE = 2_000, 4, 250_000


def make(path: Path, cells: int) -> None:
    from loaders.csr import SparseRows
    from loaders.ingest.writer import ModalityLayout, StoreWriter

    draw, of = np.random.default_rng(0), GENES // NONZEROS
    layout = ModalityLayout(pd.DataFrame(index=[f"g{i}" for i in range(GENES)]), np.uint8, NONZEROS)
    with StoreWriter(path, modalities={"rna": layout}) as writer:
        for start in range(0, cells, AT_ONCE):
            number = min(AT_ONCE, cells - start)
            columns = draw.integers(0, of, (number, NONZEROS), dtype=np.uint16)
            columns += np.arange(NONZEROS, dtype=np.uint16) * np.uint16(of)
            values = draw.integers(1, 6, number * NONZEROS, dtype=np.uint8)
            writer.append("rna", SparseRows(np.arange(number + 1) * NONZEROS, columns.ravel(), values, GENES))
        ids = np.char.add("cell-", np.arange(cells).astype("U8")).astype(np.dtypes.StringDType())
        samples = pd.Categorical.from_codes(draw.integers(0, 8, cells), [f"s{i}" for i in range(8)])
        writer.finish(cell_ids=ids, obs=[("sample", samples)], is_shuffled=True)


def move(checkpoints: Path, step: int) -> None:
    """Say that the newest checkpoint was made at another step of the epoch."""
    from liam_scale.training.checkpoint import Checkpoint, newest_checkpoint, save_checkpoint

    saved = newest_checkpoint(checkpoints)
    assert saved is not None
    state = dict(saved.state)
    state["at"], state["loader"] = {**state["at"], "global_step": step}, {**state["loader"], "step": step}
    save_checkpoint(checkpoints, Checkpoint(saved.tensors, state), step=step, keep=2)


def first_step(store: Path, out: Path, step: int) -> tuple[float, float, float]:
    """Wall and CPU seconds from launch to the checkpoint after a step, and peak RSS in GB till then."""
    options = ["--batch-key", "sample", "--model.n-hidden", "64", "--training.checkpoint-steps", "1"]
    command = [sys.executable, "-m", "liam_scale.train", str(store), "--out", str(out), *options]
    start, made = time.perf_counter(), out / "checkpoints" / f"step-{step:09d}"
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    while not made.exists():
        if process.poll() is not None:
            raise RuntimeError(f"training ended with code {process.returncode} before {made}")
        time.sleep(0.02)
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    status = Path(f"/proc/{process.pid}/status").read_text().split("VmHWM:")[1]
    cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    seen = time.perf_counter() - start, cpu, int(status.split()[0]) * 1024 / 1e9
    process.send_signal(signal.SIGTERM)
    process.wait()
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=10_000_000)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    folder = Path(tempfile.mkdtemp(prefix="liam-scale-opening-"))
    try:
        store, out = folder / "a.zarr", folder / "run"
        make(store, options.cells)
        rows = [("a new run", *first_step(store, out, 1))]
        for step in (int(share * options.cells / 128) for share in (0.1, 0.9)):
            move(out / "checkpoints", step)
            rows.append((f"resumed at step {step:,}", *first_step(store, out, step + 1)))
    finally:
        shutil.rmtree(folder)
    describe_machine()
    print(table(["", "wall s", "CPU s", "RSS GB"], [[name, *(f"{v:.1f}" for v in own)] for name, *own in rows]))


if __name__ == "__main__":
    main()
