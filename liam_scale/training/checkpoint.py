"""Checkpoints: a directory of safetensors and JSON that is either whole or not there.

Layout of `<run>/checkpoints/step-000000120/`:
`model.safetensors`, `optimizer.safetensors`, `best.safetensors` (when there is a best), `state.json`,
and `manifest.json` with the sha256 of every other file. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: tensors by group, and plain values."""

    tensors: dict[str, dict[str, Tensor]]
    """Groups `model`, `optimizer`, and `best` when there is one."""
    state: dict[str, Any]
    """Position, seed, streams, configuration, history, fingerprint of the schema: JSON values."""
    path: Path | None = field(default=None, compare=False)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def save_checkpoint(directory: Path, checkpoint: Checkpoint, *, step: int, keep: int = 2) -> Path:
    """Write a checkpoint beside the others, then drop all but the newest `keep`.

    Raises
    ------
    RuntimeError
        The disk is full or cannot be written; the earlier checkpoints stay.
    """
    target = directory / f"step-{step:09d}"
    partial = directory / f".{target.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for group, tensors in checkpoint.tensors.items():
            save_file(
                {name: t.detach().contiguous().cpu() for name, t in tensors.items()}, partial / f"{group}.safetensors"
            )
        (partial / "state.json").write_text(json.dumps(checkpoint.state, indent=1))
        files = sorted(partial.iterdir())
        (partial / MANIFEST).write_text(json.dumps({f.name: sha256_of(f) for f in files}, indent=1))
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _sync(directory)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RuntimeError(
            f"checkpoint {target}: could not be written ({error}); free some space or name another --out"
        ) from error
    for old in _candidates(directory)[keep:]:
        shutil.rmtree(old)
    return target


def _candidates(directory: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    return sorted(directory.glob("step-*"), reverse=True)


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises
    ------
    RuntimeError
        A file is missing or its sha256 differs; the message names it.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise RuntimeError(f"checkpoint {path}: {MANIFEST} cannot be read ({error})") from error
    for name, expected in manifest.items():
        file = path / name
        if not file.exists():
            raise RuntimeError(f"checkpoint {path}: {name} is missing")
        found = sha256_of(file)
        if found != expected:
            raise RuntimeError(f"checkpoint {path}: {name} is damaged (sha256 {found[:12]}, expected {expected[:12]})")


def newest_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, None where there is none at all.

    A damaged one is named in a warning and skipped.

    Raises
    ------
    RuntimeError
        There are checkpoints, but none verifies.
    """
    candidates = _candidates(directory)
    for path in candidates:
        try:
            verify(path)
        except RuntimeError as error:
            logger.warning("%s; going back to the one before it", error)
            continue
        tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
        return Checkpoint(tensors, json.loads((path / "state.json").read_text()), path)
    if candidates:
        raise RuntimeError(
            f"resume: none of the {len(candidates)} checkpoints in {directory} verifies; "
            "restore one from a copy, or start again with another --out"
        )
    return None
