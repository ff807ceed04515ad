"""The kernels as they are shipped pass ptxas: in a process of its own, since what is interpreted cannot be compiled."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[4] / "benchmarks" / "gpu_compile.py"


def compile_kernels(folder, *options):
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install liam-scale[gpu]")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    results = folder / "kernels.json"
    command = [sys.executable, str(SCRIPT), "--json", str(results), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert results.exists(), done.stderr
    return done.returncode, json.loads(results.read_text())


@pytest.mark.parametrize(("registers", "code"), [(255, 0), (24, 1)])
def test_a_kernel_that_spills_fails_the_gate(tmp_path, registers, code):
    options = ("--only", "gather_product", "--target", "90", "--processes", "1", "--registers", str(registers))
    found, rows = compile_kernels(tmp_path, *options)
    assert found == code
    assert {row["kernel"] for row in rows} == {"gather_product"}
    for row in rows:
        assert 0 < row["registers"] <= registers
        assert (row["spilled"] == 0) == row["fits"] == (code == 0)


@pytest.mark.slow
def test_no_kernel_spills_or_asks_for_more_shared_memory_than_an_a100_an_h100_or_a_b200_has(tmp_path):
    code, found = compile_kernels(tmp_path)
    assert [row for row in found if not row["fits"]] == []
    assert code == 0
    products = {row["target"]: {r["products"] for r in found if r["target"] == row["target"]} for row in found}
    assert "mma.sync" in products[80]
    assert "wgmma.mma_async" in products[90]
    assert products.keys() == {80, 90, 100}
