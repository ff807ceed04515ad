"""The hidden folder in which ingest builds a store, with room for what it spills."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from loaders import durable
from loaders.formats.root import HDF5_SUFFIXES


def _hidden(out: Path) -> Path:
    return out.with_name(f"{out.name}.ingest-")


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse an `out` that exists, or that is not a Zarr store and may therefore not be overwritten."""
    if out.suffix in HDF5_SUFFIXES:
        raise ValueError(f"out: got {out}, a store is a Zarr folder; name {out.with_suffix('.zarr')}")
    durable.remove_leftovers(out, hidden=_hidden(out))
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise ValueError(f"out: {out} exists; name another path, or give overwrite=True to replace it")
    is_store = out.is_dir() and any((out / name).exists() for name in ("zarr.json", ".zgroup"))
    if not is_store:
        raise ValueError(f"overwrite: {out} is not a Zarr store and is left alone; name another path")


class Staging(durable.Staging):
    """The folder in which a store is built, at `path`; what is in its folder `spill` is gone when it is published."""

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        check_out(out, overwrite=overwrite)
        self._overwrite = overwrite
        with explain_disk_errors(out):
            super().__init__(out, hidden=_hidden(out), alone=True)
            self.spill = self.folder / "spill"
            self.spill.mkdir()

    def publish(self) -> None:
        check_out(self.target, overwrite=self._overwrite)
        super().publish()
        self.discard()


def explain_disk_errors(out: Path) -> AbstractContextManager[None]:
    """Turn a full disk into a message that names the disk and the cure."""
    cure = (
        ", or write to another disk: an ingest needs 5 (RNA) to 8 (ATAC) bytes a non-zero count while it runs, of "
        "which a third stays"
    )
    return durable.writing(out, cure=cure, only_full=True)
