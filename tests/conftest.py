"""What all tests share."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata
import pytest
import ranks
import torch

from loaders.ecosystem import plain_mudata
from loaders.formats.cache import use_cache

if not torch.cuda.is_available():
    # Triton reads it when it is imported, which torch does now and then.
    os.environ["TRITON_INTERPRET"] = "1"

# What a shell without job control starts by `&` ignores Ctrl-C, and so does all that it starts itself.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small products gain nothing from threads, and sums keep one order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_rank_outlives_its_test() -> Iterator[None]:
    yield
    ranks.end_all()


@pytest.fixture(scope="session", autouse=True)
def _plain_mudata() -> Iterator[None]:
    """mudata before 0.4 warns on every object made until its coming default is chosen."""
    with plain_mudata():
        yield


@pytest.fixture(autouse=True)
def _no_cache() -> Iterator[None]:
    """A cache of remote stores is of the process, and would serve the tests that follow."""
    yield
    use_cache(None)


@pytest.fixture(scope="session")
def write_soma() -> Callable[[Path, anndata.AnnData], None]:
    """Writes an AnnData as the RNA of a TileDB-SOMA experiment."""
    soma_io = pytest.importorskip("tiledbsoma.io", reason="tiledbsoma is an extra: pip install liam-scale[soma]")

    def write(path: Path, data: anndata.AnnData) -> None:
        # tiledbsoma 2.3 stumbles over X where anndata 0.13 lists it, without a name, among the layers.
        apart = anndata.AnnData(obs=data.obs, var=data.var, layers={"data": data.X})
        soma_io.from_anndata(str(path), apart, measurement_name="RNA")

    return write


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes disks of a size ("3m"), to be filled up; skips where none can be mounted."""
    disks: list[Path] = []

    def mount(size: str) -> Path:
        disk = tmp_path / f"disk{len(disks)}"
        disk.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
        disks.append(disk)
        return disk

    yield mount
    for disk in disks:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
