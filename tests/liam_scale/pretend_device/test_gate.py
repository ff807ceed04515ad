"""What a GPU would do with the wiring of this package, on a pretend device (pretend.cpp) that needs none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

INSIDE = Path(__file__).with_name("inside")


PAGES = [
    pytest.param(path.name, marks=pytest.mark.slow if path.name in ("test_ranks.py", "test_commands.py") else ())
    for path in sorted(INSIDE.glob("test_*.py"))
]


@pytest.mark.parametrize("page", PAGES)
def test_on_a_pretend_device_all_is_as_on_the_cpu(page: str, environment: dict[str, str]) -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None or shutil.which("ninja") is None:
        pytest.skip(f"the pretend device is built by {compiler} and ninja, which are not both here")
    paths = os.pathsep.join((environment["PYTHONPATH"], str(INSIDE.parent)))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(INSIDE / page)],
        env={**environment, "PYTHONPATH": paths, "LIAM_SCALE_PRETEND": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
