"""The hidden folder in which a store is built, and which a killed ingest leaves for the next one to go on with."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from loaders import durable
from loaders.formats.root import HDF5_SUFFIXES

_PLAN = "plan.json"

RECORD = "record.json"
"""What a task has made, in its folder within `spill`; written last."""


def _hidden(out: Path) -> Path:
    return out.with_name(f"{out.name}.ingest-")


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse an `out` that exists, or that is not a Zarr store and may therefore not be overwritten."""
    if out.suffix in HDF5_SUFFIXES:
        raise ValueError(f"out: got {out}, a store is a Zarr folder; name {out.with_suffix('.zarr')}")
    durable.remove_leftovers(out, hidden=_hidden(out), keep=lambda folder: read_plan(folder) is not None)
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise ValueError(f"out: {out} exists; name another path, or give overwrite=True to replace it")
    is_store = out.is_dir() and any((out / name).exists() for name in ("zarr.json", ".zgroup"))
    if not is_store:
        raise ValueError(f"overwrite: {out} is not a Zarr store and is left alone; name another path")


def read_plan(folder: Path) -> dict[str, Any] | None:
    """What the ingest of a hidden folder was about; None where it had not begun, or was replacing a store."""
    try:
        plan = json.loads((folder / "spill" / _PLAN).read_text())
    except (OSError, ValueError):
        return None
    return plan if isinstance(plan, dict) and not (folder / durable.REPLACED).exists() else None


class Staging(durable.Staging):
    """The folder in which a store is built, at `path`; what is in its folder `spill` is gone when it is published.

    Parameters
    ----------
    plan
        What the ingest is about, `key` among it; None: no other may go on with this one.
    resume
        Go on with the folder of a killed ingest of the same key, unless it needs more `memory`.

    Attributes
    ----------
    plan
        What was given, or what stands in the folder that goes on.
    done
        Tasks that the killed ingest had finished.
    """

    def __init__(
        self, out: Path, *, overwrite: bool = False, plan: dict[str, Any] | None = None, resume: bool = False
    ) -> None:
        check_out(out, overwrite=overwrite)
        self._overwrite = overwrite
        own = plan or {}
        with explain_disk_errors(out):
            adopt = (lambda folder: _fits(read_plan(folder), own)) if resume else None
            super().__init__(out, hidden=_hidden(out), alone=True, adopt=adopt)
            try:
                self._begin(plan)
            except BaseException:
                self.discard()
                raise

    def _begin(self, plan: dict[str, Any] | None) -> None:
        self.spill = self.folder / "spill"
        self.spill.mkdir(exist_ok=True)
        found = read_plan(self.folder)
        self.plan, self.done = found or plan or {}, len(list(self.spill.glob(f"*/{RECORD}")))
        for unfinished in self.spill.glob(".*"):
            shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
        if plan is not None and found is None:
            (self.spill / ".plan").write_text(json.dumps(plan))
            os.replace(self.spill / ".plan", self.spill / _PLAN)

    def publish(self) -> None:
        check_out(self.target, overwrite=self._overwrite)
        super().publish()
        self.discard()


def _fits(found: dict[str, Any] | None, plan: dict[str, Any]) -> bool:
    return found is not None and found.get("key") == plan["key"] and found["memory"] <= plan["memory"]


def explain_disk_errors(out: Path) -> AbstractContextManager[None]:
    """Turn a full disk into a message that names the disk and the cure."""
    cure = (
        ", or write to another disk: an ingest needs 5 (RNA) to 8 (ATAC) bytes a non-zero count while it runs, of "
        "which a third stays"
    )
    return durable.writing(out, cure=cure, only_full=True)
