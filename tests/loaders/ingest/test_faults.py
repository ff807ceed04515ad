"""Whatever happens while ingesting, nothing that opens is left behind."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import mudata
import numpy as np
import pytest

from loaders import durable
from loaders.ingest import ingest
from loaders.ingest.writer import Staging

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def source(make, tmp_path):
    """An h5ad that takes a second to ingest with little memory."""
    adata = make.anndata(400, 2000)
    adata = adata[np.arange(40_000) % 400].copy()
    adata.obs_names = [f"c{n}" for n in range(40_000)]
    adata.write_h5ad(tmp_path / "a.h5ad")
    return tmp_path / "a.h5ad"


def start(source, out):
    arguments = [f"rna={source}", "--out", str(out), "--memory", "32MiB", "--overwrite"]
    return subprocess.Popen(
        [sys.executable, "-m", "liam_scale.cli", "ingest", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


def wait_for_spill(out, process):
    """Until a task has written rows to the temporary folder."""
    for _ in range(6000):
        for folder in out.parent.glob(f".{out.name}.ingest-*"):
            if any(file.stat().st_size for file in (folder / "spill").glob("*.scan.*/*")):
                return folder
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    raise AssertionError("no spill within a minute")


@pytest.mark.filterwarnings("ignore:Observation names are not unique:UserWarning")
def test_kill_leaves_nothing_that_opens_and_the_next_ingest_clears_up(source, tmp_path):
    out = tmp_path / "o.zarr"
    process = start(source, out)
    folder = wait_for_spill(out, process)
    process.kill()
    process.communicate()
    assert folder.exists()
    assert not out.exists()
    assert not (folder / "store" / "mod" / "rna" / "X" / "data" / "zarr.json").exists()
    small = source.parent / "small.h5ad"
    mudata.read_h5ad(source, None)[:100].copy().write_h5ad(small)
    ingest(f"rna={small}", out=out, progress=False)
    assert not folder.exists()
    assert mudata.read_zarr(out).n_obs == 100


@pytest.mark.filterwarnings("ignore:Observation names are not unique:UserWarning")
def test_interrupt_removes_everything(source, tmp_path):
    out = tmp_path / "o.zarr"
    process = start(source, out)
    wait_for_spill(out, process)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode != 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]


@pytest.mark.filterwarnings("ignore:Observation names are not unique:UserWarning")
def test_disk_full_is_said_and_nothing_is_left(source, disk_of):
    disk = disk_of("3m")
    with pytest.raises(RuntimeError, match=r"o.zarr: disk full, or a quota is reached \(0.\d\d GB"):
        ingest(f"rna={source}", out=disk / "o.zarr", memory="32MiB", progress=False)
    assert not list(disk.iterdir())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Observation names are not unique:UserWarning")
def test_a_file_size_limit_reads_like_a_full_disk(source, tmp_path):
    out = tmp_path / "o.zarr"

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    arguments = [
        sys.executable,
        "-m",
        "liam_scale.cli",
        "ingest",
        f"rna={source}",
        "--out",
        str(out),
        "--memory",
        "32MiB",
    ]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)
    assert result.returncode == 1
    assert "error: writing" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5ad"]


def test_of_two_ingests_into_one_path_the_second_says_who_is_at_it(tmp_path):
    living = Staging(tmp_path / "o.zarr")
    other = Staging(tmp_path / "p.zarr")
    with pytest.raises(RuntimeError, match=rf"o.zarr: process {os.getpid()} on .* since 20.*wait until it has ended"):
        Staging(tmp_path / "o.zarr")
    assert living.spill.exists()
    living.discard()
    other.discard()
    assert not list(tmp_path.iterdir())


def test_a_kill_while_the_old_store_is_replaced_loses_neither(make, tmp_path, monkeypatch):
    """On a file system that cannot exchange folders: the old one is back when the next ingest starts."""
    make.anndata(30, 10).write_h5ad(tmp_path / "a.h5ad")
    out = tmp_path / "o.zarr"
    ingest(f"rna={tmp_path / 'a.h5ad'}", out=out, progress=False)
    rename = os.rename

    def dies_at_the_second(*paths):
        if not out.exists():
            raise SystemExit
        rename(*paths)

    with monkeypatch.context() as context:
        context.setattr(durable, "_exchange", lambda one, other: False)
        context.setattr(os, "rename", dies_at_the_second)
        context.setattr(durable.Staging, "discard", lambda self: self._lock.close())
        with pytest.raises(SystemExit):
            ingest(f"rna={tmp_path / 'a.h5ad'}", out=out, progress=False, overwrite=True)
    assert not out.exists()
    with pytest.raises(ValueError, match="exists; name another path"):
        ingest(f"rna={tmp_path / 'a.h5ad'}", out=out, progress=False)
    assert mudata.read_zarr(out).n_obs == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5ad", "o.zarr"]


def test_a_store_is_replaced_only_when_the_new_one_is_complete(make, tmp_path):
    make.anndata(30, 10).write_h5ad(tmp_path / "good.h5ad")
    bad = make.anndata(5000, 10)
    bad.X.data[-1] = -1
    bad.write_h5ad(tmp_path / "bad.h5ad")
    out = tmp_path / "o.zarr"
    ingest(f"rna={tmp_path / 'good.h5ad'}", out=out, progress=False)
    with pytest.raises(ValueError, match="not negative"):
        ingest(f"rna={tmp_path / 'bad.h5ad'}", out=out, overwrite=True, progress=False)
    assert mudata.read_zarr(out).n_obs == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.h5ad", "good.h5ad", "o.zarr"]
