"""Checkpoints: a directory of safetensors and JSON that is either whole or not there.

Layout of `<run>/checkpoints/step-000000120/`:
`model.safetensors`, `optimizer.safetensors`, `best.safetensors` (when there is a best), `state.json`,
and `manifest.json` with the sha256 of every other file. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from loaders.durable import remove, remove_leftovers, replacing, sha256_of
from loaders.options import checked, read_table

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"

SEEN_WITHIN = 90.0
"""Seconds within which NFS shows all machines what one wrote; a name once missed stays missing for up to 60."""

_REQUIRED = {"model.safetensors", "optimizer.safetensors", "state.json"}

_sound: dict[Path, tuple[object, ...]] = {}
"""Checkpoints that this process wrote or verified, with sizes and times of their files: hashing 200 MB takes 0.2 s."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: tensors by group, and plain values."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    """Groups `model`, `optimizer`, and `best` when there is one; one that was read holds files, not their tensors."""
    state: dict[str, Any]
    """Position in the run and of the loader, sums since the last evaluation, history: JSON values."""
    path: Path | None = None
    """Where it was read."""

    @property
    def step(self) -> int:
        return 0 if self.path is None else _step_of(self.path)


class _Stored(Mapping[str, Tensor]):
    """Tensors of a file, read one by one when they are asked for: all of a checkpoint are four times the weights."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, "pt") as file:
            self._names = tuple(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        # Opened anew each time: the file is mapped, and its pages count for this process while it is open.
        with safe_open(self._path, "pt") as file:
            return file.get_tensor(name).clone()

    def __contains__(self, name: object) -> bool:
        return name in self._names  # `Mapping` would read the tensor to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class State(TypedDict):
    """What the trainer keeps besides tensors."""

    at: dict[str, Any]
    sums: dict[str, float]
    cells_seen: int
    history: tuple[dict[str, Any], ...]
    loader: dict[str, Any]


@contextmanager
def taking_up(checkpoint: Checkpoint) -> Iterator[tuple[Mapping[str, Mapping[str, Tensor]], State]]:
    """Tensors and state of a checkpoint for a trainer to take up; RuntimeError where they are not those of its run."""
    try:
        yield checkpoint.tensors, checked("state", checkpoint.state, State)
    except (OSError, SafetensorError) as error:
        raise RuntimeError(
            f"checkpoint {checkpoint.path}: cannot be read ({error}); run the same command again"
        ) from error
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"checkpoint {checkpoint.path}: is not one of this run ({type(error).__name__}: {error}); remove it to go"
            f" on from the one before it, or start again with another --out"
        ) from error


def save_checkpoint(directory: Path, checkpoint: Checkpoint, *, step: int, keep: int = 2) -> Path:
    """Write a checkpoint beside the others, then drop those that are older than `keep` sound ones.

    Raises
    ------
    RuntimeError
        The disk is full or cannot be written; the earlier checkpoints stay.
    """
    target = directory / f"step-{step:09d}"
    remove_leftovers(directory / "step-*")
    with replacing(target) as path:
        path.mkdir()
        for group, tensors in checkpoint.tensors.items():
            save_file(_on_cpu(tensors), path / f"{group}.safetensors")
        (path / "state.json").write_text(json.dumps(checkpoint.state, indent=1))
        files = sorted(path.iterdir())
        with ThreadPoolExecutor() as pool:
            hashes = pool.map(sha256_of, files)
        (path / MANIFEST).write_text(json.dumps({f.name: h for f, h in zip(files, hashes, strict=True)}, indent=1))
    _sound[target] = _signature(target)
    kept = 1
    for old in _candidates(directory):
        if _step_of(old) >= step:
            continue
        if kept >= keep:
            remove(old)
        elif _is_sound(old):
            kept += 1
    return target


def set_aside(directory: Path, *, step: int) -> Path | None:
    """Rename the checkpoint of a step, if it is there, so that no run goes on from it; its new path."""
    path = directory / f"step-{step:09d}"
    if not path.is_dir():
        return None
    aside = directory / f"unsound-{path.name}"
    if aside.exists():
        remove(aside)
    return path.rename(aside)


def save_weights(target: Path, weights: Mapping[str, Tensor]) -> None:
    """Write tensors with the sha256 of their names, types, shapes and values."""
    tensors = _on_cpu(weights)
    with replacing(target) as path:
        save_file(tensors, path, metadata={"sha256": _digest(tensors)})


def load_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a file that `save_weights` wrote.

    Raises
    ------
    RuntimeError
        The file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            expected = (file.metadata() or {}).get("sha256")
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RuntimeError(f"weights {path}: cannot be read ({error}); {_WEIGHTS_CURE}") from error
    found = _digest(tensors)
    if expected is None:
        logger.info("weights %s: hold no sha256, so that nothing says whether they are whole", path)
    elif found != expected:
        raise RuntimeError(f"weights {path}: damaged (sha256 {found[:12]}, expected {expected[:12]}); {_WEIGHTS_CURE}")
    return tensors


_WEIGHTS_CURE = "run the training command again, it writes them from the newest checkpoint, or restore a copy"


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous().cpu() for name, value in tensors.items()}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _candidates(directory: Path) -> list[Path]:
    """Checkpoints, newest first; `step-000000120.bak` is a user's own copy and none."""
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted((p for p in paths if re.fullmatch(r"step-\d{9,}", p.name)), key=_step_of, reverse=True)


def _signature(path: Path) -> tuple[object, ...]:
    return tuple(sorted((f.name, s.st_size, s.st_mtime_ns, s.st_ino) for f in path.iterdir() for s in [f.stat()]))


def _is_sound(path: Path) -> bool:
    try:
        if _sound.get(path) != _signature(path):
            verify(path)
            _sound[path] = _signature(path)
    except (OSError, RuntimeError):
        return False
    return True


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises
    ------
    RuntimeError
        A file is missing or its sha256 differs; the message names it.
    """
    try:
        manifest = read_table(path / MANIFEST)
        if not manifest.keys() >= _REQUIRED:
            raise ValueError(f"it must list {', '.join(sorted(_REQUIRED))}")
    except (OSError, ValueError) as error:
        raise RuntimeError(f"checkpoint {path}: {MANIFEST} cannot be used ({error})") from error
    for file in sorted({*path.glob("*.safetensors"), *(path / Path(name).name for name in manifest)}):
        try:
            found = sha256_of(file)
        except OSError as error:
            raise RuntimeError(f"checkpoint {path}: {file.name} cannot be read ({error})") from error
        if found != manifest.get(file.name):
            raise RuntimeError(
                f"checkpoint {path}: {file.name} is damaged (sha256 {found[:12]}, expected "
                f"{str(manifest.get(file.name))[:12]})"
            )


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
            return _load(path)
        except RuntimeError as error:
            logger.warning("%s; going back to the one before it", error)
    if candidates:
        raise RuntimeError(
            f"resume: none of the {len(candidates)} checkpoints in {directory} verifies; "
            "restore one from a copy, or start again with another --out"
        )
    return None


def load_checkpoint(directory: Path, step: int) -> Checkpoint:
    """The checkpoint of a step, which another process has seen whole: it is waited for.

    Raises
    ------
    RuntimeError
        It does not verify within `SEEN_WITHIN`.
    """
    end = time.monotonic() + SEEN_WITHIN
    while True:
        try:
            return _load(directory / f"step-{step:09d}")
        except RuntimeError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def _load(path: Path) -> Checkpoint:
    verify(path)
    try:
        tensors = {file.stem: _Stored(file) for file in path.glob("*.safetensors")}
        state = read_table(path / "state.json")
        _sound[path] = _signature(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise RuntimeError(f"checkpoint {path}: cannot be read ({error})") from error
    return Checkpoint(tensors, state, path)
