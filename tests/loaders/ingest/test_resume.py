"""An ingest that was killed goes on where it stood, and its store is that of one that was not."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loaders.ingest import ingest

ROOT = Path(__file__).resolve().parents[3]

OPTIONS: dict[str, Any] = {"memory": "32MiB", "sample_key": "donor"}


def killed_ingest(sources: list[str], out: Path) -> Path:
    """The hidden folder of an ingest that was killed when three of its tasks were done."""
    command = [sys.executable, "-W", "ignore", "-m", "liam_scale.cli", "ingest", *sources, "--out", str(out)]
    process = subprocess.Popen([*command, "--memory", "32MiB", "--sample-key", "donor"], cwd=ROOT)
    while not (done := list(out.parent.glob(f".{out.name}.ingest-*/spill/*/record.json"))) or len(done) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    return sorted(out.parent.glob(f".{out.name}.ingest-*"))[0]


def test_a_killed_ingest_goes_on_where_it_stood(
    sources: list[str], expected: dict[str, bytes], bytes_of: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.zarr"
    left = killed_ingest(sources, out)
    assert not out.exists()
    # What a crash of the machine may do to a file that was not flushed yet.
    run = sorted(left.glob("spill/rna.scan.*/0"))[0]
    held = run.read_bytes()
    run.write_bytes(held[:-100] + bytes(100))
    capfd.readouterr()
    ingest(sources, out=out, **{**OPTIONS, "progress": True})
    assert "goes on where a killed ingest of the same counts stood" in capfd.readouterr().err
    assert bytes_of(out) == expected
    assert not left.exists()


def test_what_was_left_is_not_taken_where_the_counts_differ_or_nobody_wants_it(
    sources: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.zarr"
    killed_ingest(sources, out)
    ingest(sources, out=out, **{**OPTIONS, "progress": True, "resume": "never"})
    first = killed_ingest(sources, tmp_path / "p.zarr")
    ingest(sources[1], out=tmp_path / "p.zarr", **{**OPTIONS, "progress": True})
    assert "goes on" not in capfd.readouterr().err
    assert not first.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.zarr", "p.zarr"]


def test_resume_is_auto_or_never(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"resume: got 'yes'; choose auto or never"):
        ingest("a.h5mu", out=tmp_path / "o.zarr", resume="yes")  # type: ignore[arg-type]
