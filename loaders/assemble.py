"""From windows to minibatches: several steps are gathered in one go and handed out as views.

Shapes: S steps, B cells of this rank in all of them, V' streams of this rank, N entries, F features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loaders.buffers import Pool
from loaders.csr import centred_log_ratio, gather_rows, offsets_of, transpose_rows
from loaders.device_rows import ABSENT, Arrival, DeviceRows
from loaders.minibatch import Minibatch, SparseCounts
from loaders.plan import Epoch, Rows
from loaders.windows import ModalityInput, WindowRows

TRANSFORMS = ("clr", "none")
VALUES = ("float32", "stored")

Wanted = dict[tuple[str, str], tuple[int, npt.DTypeLike]]
"""Length and type of arrays, by modality and part."""


@dataclass(frozen=True)
class OutputFormat:
    """How one modality leaves the loader."""

    num_features: int
    value_dtype: np.dtype[np.generic]
    transpose: bool
    is_clr: bool


def output_formats(
    sources: Mapping[str, ModalityInput], transforms: Mapping[str, str], *, transpose: bool, values: str
) -> dict[str, OutputFormat]:
    """Format of each modality; refuses a transform or a type of values it does not know."""
    for name, transform in transforms.items():
        if transform not in TRANSFORMS:
            raise ValueError(f"transforms: got {transform!r} for {name}; choose from {', '.join(TRANSFORMS)}")
    if values not in VALUES:
        raise ValueError(f"values: got {values!r}; choose from {', '.join(VALUES)}")
    formats = {}
    for name, source in sources.items():
        is_clr = transforms.get(name) == "clr"
        dtype = source.matrix.window_dtypes[1] if values == "stored" and not is_clr else np.dtype(np.float32)
        formats[name] = OutputFormat(source.matrix.num_features, dtype, transpose, is_clr)
    return formats


def output_bytes(sources: Mapping[str, ModalityInput], outputs: Mapping[str, OutputFormat], *, minibatch: int) -> float:
    """Mean bytes of a cell in a finished minibatch."""
    total = 64.0
    for name, output in outputs.items():
        entries = (4 + output.value_dtype.itemsize) * sources[name].nonzeros_per_cell
        total += entries + output.transpose * (entries + 4 * output.num_features / minibatch)
    return total


@dataclass(frozen=True)
class Group:
    """Steps [first, stop) of an epoch that are gathered together, as this rank sees them.

    Attributes
    ----------
    cell_edges
        (S + 1,) cells of this rank before each step.
    target
        (B,) place among this rank's cells, step by step, of each cell in the order stream by stream.
    place
        (B,) place in its global minibatch of each cell, in the order step by step.
    num_global
        (S,) cells of each global minibatch.
    spans
        (V', 2) cells of each of this rank's streams.
    """

    first: int
    stop: int
    cell_edges: npt.NDArray[np.int64]
    target: npt.NDArray[np.int64]
    place: npt.NDArray[np.int64]
    num_global: npt.NDArray[np.int64]
    spans: npt.NDArray[np.int64]


def plan_group(epoch: Epoch, first: int, stop: int, *, rank: int, world: int) -> Group:
    """Where the cells of every stream go in the steps [first, stop)."""
    edges = epoch.positions(np.arange(first, stop + 1))
    counts = np.diff(edges, axis=0)
    global_begin = np.cumsum(counts, axis=1) - counts
    mine = counts[:, rank::world]
    begin = (np.cumsum(mine) - mine.ravel()).reshape(mine.shape)
    sizes = mine.T.ravel()
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    target = np.repeat(begin.T.ravel(), sizes) + within
    place = np.empty(len(target), np.int64)
    place[target] = np.repeat(global_begin[:, rank::world].T.ravel(), sizes) + within
    spans = np.stack((edges[0, rank::world], edges[-1, rank::world]), axis=1)
    cell_edges = offsets_of(mine.sum(axis=1))
    return Group(first, stop, cell_edges, target, place, counts.sum(axis=1), spans)


@dataclass(frozen=True)
class Slice:
    """Cells [start, stop) of a window, counted within it."""

    rows: Rows
    parts: Mapping[str, WindowRows]
    start: int
    stop: int


def _step_views(array: npt.NDArray[np.generic], edges: npt.NDArray[np.int64]) -> Sequence[torch.Tensor]:
    """Tensors that share the memory of array[edges[k]:edges[k + 1]]."""
    return torch.from_numpy(array[: int(edges[-1])]).split_with_sizes(np.diff(edges).tolist())


def _spans(slices: Sequence[Slice], group: Group) -> Iterator[tuple[Slice, npt.NDArray[np.int64]]]:
    """Each slice, and where its cells go."""
    done = 0
    for piece in slices:
        yield piece, group.target[done : done + piece.stop - piece.start]
        done += piece.stop - piece.start


@dataclass(frozen=True)
class Layout:
    """Where the entries of a group's cells stand, step by step, in one modality.

    Attributes
    ----------
    offsets
        (B + 1,) entries before each cell.
    sent
        (B + 1,) of them those that are not on a device.
    starts
        (B,) where the row of each cell begins on the device, as `Arrival` has it; None where none is there.
    """

    offsets: npt.NDArray[np.int64]
    sent: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64] | None


def _layout(name: str, slices: Sequence[Slice], group: Group) -> Layout:
    lengths, there = (np.zeros(len(group.target), np.int64) for _ in range(2))
    starts = np.full(len(group.target), ABSENT, np.int64)
    for piece, where in _spans(slices, group):
        part, span = piece.parts[name], slice(piece.start, piece.stop)
        lengths[where] = part.lengths[span]
        if part.device_starts is not None and part.device_lengths is not None:
            starts[where], there[where] = part.device_starts[span], part.device_lengths[span]
    sent = offsets_of(lengths)
    if (starts < 0).all():
        return Layout(sent, sent, None)
    return Layout(offsets_of(lengths + there), sent, np.where(starts < 0, -1 - sent[:-1], starts))


def _wanted(name: str, layout: Layout, group: Group, output: OutputFormat) -> Wanted:
    """Lengths and types of the arrays of one modality."""
    cells, entries, steps = len(group.target), int(layout.sent[-1]), group.stop - group.first
    wanted: dict[str, tuple[int, npt.DTypeLike]] = {
        "present": (cells, np.bool_),
        "indptr": (cells + steps, np.int32),
        "indices": (entries, np.int32),
        "values": (entries, output.value_dtype),
    }
    if output.transpose:
        wanted["features"] = (steps * (output.num_features + 1), np.int32)
        wanted["cells"], wanted["feature_values"] = wanted["indices"], wanted["values"]
    if layout.starts is not None:
        wanted["starts"], wanted["offsets"] = (cells, np.int64), (cells + 1, np.int64)
    return {(name, part): form for part, form in wanted.items()}


def gather_counts(
    name: str,
    slices: Sequence[Slice],
    group: Group,
    output: OutputFormat,
    layout: Layout,
    memory: Mapping[tuple[str, str], npt.NDArray[Any]],
) -> tuple[list[SparseCounts], Sequence[torch.Tensor]]:
    """Counts and presence of one modality in every step of a group, written into the memory of its arrays.

    Where rows are on a device, indices and values are empty until they arrive there.
    """
    offsets, sent = layout.offsets, layout.sent
    indices, values, present = (memory[name, part] for part in ("indices", "values", "present"))
    present[:] = True
    for piece, where in _spans(slices, group):
        part, span = piece.parts[name], slice(piece.start, piece.stop)
        if part.present is not None:
            present[where] = part.present[span]
        gather_rows(part.indices, part.values, part.starts[span], part.lengths[span], sent[where], indices, values)
    if output.is_clr:
        centred_log_ratio(sent, values, output.num_features)
    entry_edges, cells = offsets[group.cell_edges], np.diff(group.cell_edges) + 1
    if np.diff(entry_edges).max(initial=0) >= 1 << 31:
        raise ValueError(
            f"minibatch: got {int(cells.max()) - 1} cells with {int(np.diff(entry_edges).max())} {name} entries;"
            f" a minibatch holds at most 2^31: choose a smaller one"
        )
    indptr_edges, step_of = offsets_of(cells), np.repeat(np.arange(len(cells)), cells)
    memory[name, "indptr"][:] = offsets[np.arange(indptr_edges[-1]) - step_of] - entry_edges[step_of]
    here = entry_edges if layout.starts is None else np.zeros_like(entry_edges)
    edges = {"indptr": indptr_edges, "indices": here, "values": here}
    if output.transpose:
        _transpose(name, indptr_edges, entry_edges, output, memory)
        by_step = np.arange(len(cells) + 1) * (output.num_features + 1)
        edges |= {"features": by_step, "cells": entry_edges, "feature_values": entry_edges}
    columns = [_step_views(memory[name, part], own) for part, own in edges.items()]
    counts = [
        SparseCounts(i, x, v, output.num_features, *by_feature) for i, x, v, *by_feature in zip(*columns, strict=True)
    ]
    return counts, _step_views(present, group.cell_edges)


def _transpose(
    name: str,
    indptr_edges: npt.NDArray[np.int64],
    entry_edges: npt.NDArray[np.int64],
    output: OutputFormat,
    memory: Mapping[tuple[str, str], npt.NDArray[Any]],
) -> None:
    width = output.num_features + 1
    for k in range(len(entry_edges) - 1):
        own = slice(int(entry_edges[k]), int(entry_edges[k + 1]))
        transpose_rows(
            memory[name, "indptr"][indptr_edges[k] : indptr_edges[k + 1]],
            memory[name, "indices"][own],
            memory[name, "values"][own],
            memory[name, "features"][k * width : (k + 1) * width],
            memory[name, "cells"][own],
            memory[name, "feature_values"][own],
        )


def leave_out(slices: Sequence[Slice], group: Group) -> tuple[Sequence[Slice], Group, list[npt.NDArray[np.int64]]]:
    """Slices and group without the cells that are lost in a modality, and those of each step; places stay."""
    if all(part.lost is None for piece in slices for part in piece.parts.values()):
        return slices, group, [np.zeros(0, np.int64)] * (group.stop - group.first)
    pieces = [np.zeros(piece.stop - piece.start, np.bool_) for piece in slices]
    for own, piece in zip(pieces, slices, strict=True):
        for part in piece.parts.values():
            if part.lost is not None:
                own |= part.lost[piece.start : piece.stop]
    rows, lost = np.empty(len(group.target), np.int64), np.concatenate(pieces)
    rows[group.target] = np.concatenate([piece.rows[piece.start : piece.stop] for piece in slices])
    kept = np.empty(len(lost), np.bool_)
    kept[group.target] = ~lost
    before = offsets_of(kept.view(np.uint8))
    edges = before[group.cell_edges]
    sound = [
        replace(piece, start=piece.start + int(begin), stop=piece.start + int(end))
        for own, piece in zip(pieces, slices, strict=True)
        for begin, end in np.flatnonzero(np.diff(np.r_[True, own, True])).reshape(-1, 2)
    ]
    of_step = np.split(rows[~kept], (group.cell_edges - edges)[1:-1])
    return sound, replace(group, cell_edges=edges, target=before[group.target[~lost]], place=group.place[kept]), of_step


def _arrival(
    name: str, layout: Layout, group: Group, rows: DeviceRows, memory: Mapping[tuple[str, str], npt.NDArray[Any]]
) -> Arrival:
    """What a device needs to put the entries of a modality together."""
    cells, lengths, starts, offsets = memory["", "rows"].copy(), np.diff(layout.sent), None, None
    if layout.starts is not None:
        cells, lengths = cells[layout.starts < 0], lengths[layout.starts < 0]
        memory[name, "starts"][:], memory[name, "offsets"][:] = layout.starts, layout.offsets
        starts, offsets = (torch.from_numpy(memory[name, part]) for part in ("starts", "offsets"))
    indices, values = (torch.from_numpy(memory[name, part]) for part in ("indices", "values"))
    return Arrival(rows, cells, lengths, indices, values, starts, offsets, layout.offsets[group.cell_edges])


def assemble(
    slices: Sequence[Slice],
    group: Group,
    outputs: Mapping[str, OutputFormat],
    pool: Pool,
    *,
    epoch: int,
    sample: npt.NDArray[np.integer] | None,
    obs: Mapping[str, npt.NDArray[np.generic]],
    on_device: Mapping[str, DeviceRows],
) -> tuple[list[Minibatch], dict[str, Arrival], npt.NDArray[np.uint8]]:
    """Minibatches of a group's steps, what a device adds to them, and the one block of memory of all their arrays.

    Parameters
    ----------
    slices
        The windows' parts that hold the group's cells, stream by stream.
    pool
        Where that memory comes from.
    sample, obs
        (n,) codes of every cell of the store; of `obs` also numbers, float32.
    on_device
        Where rows of modalities stay.
    """
    slices, group, lost = leave_out(slices, group)
    layouts = {name: _layout(name, slices, group) for name in outputs}
    columns = [("", part) for part in ("rows", "place", "sample")] + [("obs", name) for name in obs]
    wanted: Wanted = {column: (len(group.target), np.int64) for column in columns}
    wanted |= {("obs", name): (len(group.target), np.float32) for name in obs if obs[name].dtype.kind == "f"}
    for name, output in outputs.items():
        wanted |= _wanted(name, layouts[name], group, output)
    block, memory = pool.take_all(wanted)
    rows = memory["", "rows"]
    for piece, where in _spans(slices, group):
        rows[where] = piece.rows[piece.start : piece.stop]
    memory["", "place"][:] = group.place
    memory["", "sample"][:] = 0 if sample is None else sample[rows]
    for name, codes in obs.items():
        memory["obs", name][:] = codes[rows]
    counts, present = {}, {}
    for name, output in outputs.items():
        counts[name], present[name] = gather_counts(name, slices, group, output, layouts[name], memory)
    by_cell = {column: _step_views(memory[column], group.cell_edges) for column in columns}
    minibatches = [
        Minibatch(
            counts={name: steps[k] for name, steps in counts.items()},
            present={name: steps[k] for name, steps in present.items()},
            sample=by_cell["", "sample"][k],
            place=by_cell["", "place"][k],
            rows=by_cell["", "rows"][k],
            num_global=int(group.num_global[k]),
            epoch=epoch,
            step=group.first + k,
            obs={name: by_cell["obs", name][k] for name in obs},
            lost=torch.from_numpy(lost[k]),
        )
        for k in range(group.stop - group.first)
    ]
    arrivals = {name: _arrival(name, layouts[name], group, rows, memory) for name, rows in on_device.items()}
    return minibatches, arrivals, block
