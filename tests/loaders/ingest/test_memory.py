"""Peak memory is set by the option, not by the number of cells."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loaders.synthetic import simulate

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import sys
from loaders.ingest import ingest
ingest(sys.argv[1], out=sys.argv[2], memory="64MiB", overwrite=True, progress=False)
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024)
"""


@pytest.mark.slow
def test_ten_times_the_cells_need_the_same_memory(tmp_path):
    peaks = []
    for cells in (20_000, 200_000):
        store = tmp_path / f"{cells}.zarr"
        simulate(store, num_cells=cells, num_genes=4000, num_peaks=9000, genes_per_cell=300, peaks_per_cell=500)
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(store), str(tmp_path / "o.zarr")]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True)
        peaks.append(int(done.stdout))
    assert max(peaks) / min(peaks) < 1.1, peaks
