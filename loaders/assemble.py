"""From windows to minibatches: several steps are gathered in one go and handed out as views.

Shapes: S steps, B cells of this rank in all of them, V' streams of this rank, N entries, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from loaders.buffers import Pool
from loaders.csr import centred_log_ratio, gather_rows, offsets_of, transpose_rows
from loaders.minibatch import Minibatch, SparseCounts
from loaders.plan import Epoch, Rows
from loaders.windows import ModalityInput, WindowRows

TRANSFORMS = ("clr", "none")
VALUES = ("float32", "stored")


@dataclass(frozen=True)
class OutputFormat:
    """How one modality leaves the loader."""

    num_features: int
    value_dtype: np.dtype[np.generic]
    transpose: bool
    is_clr: bool
    pools: tuple[Pool, Pool, Pool]
    """Memory of indices, values and feature offsets."""


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
        formats[name] = OutputFormat(source.matrix.num_features, dtype, transpose, is_clr, (Pool(), Pool(), Pool()))
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
    return torch.from_numpy(array).split_with_sizes(np.diff(edges).tolist())


def gather_counts(
    name: str, slices: Sequence[Slice], group: Group, output: OutputFormat
) -> tuple[list[SparseCounts], Sequence[torch.Tensor]]:
    """Counts and presence of one modality in every step of a group."""
    parts = [piece.parts[name] for piece in slices]
    count, steps = len(group.target), group.stop - group.first
    lengths = np.zeros(count, np.int64)
    present = np.ones(count, np.bool_)
    done = 0
    for piece, part in zip(slices, parts, strict=True):
        where = group.target[done : done + piece.stop - piece.start]
        lengths[where] = part.lengths[piece.start : piece.stop]
        if part.present is not None:
            present[where] = part.present[piece.start : piece.stop]
        done += len(where)
    offsets = offsets_of(lengths)
    total = int(offsets[-1])
    pool_indices, pool_values, pool_features = output.pools
    indices, values = pool_indices.take(total, np.int32), pool_values.take(total, output.value_dtype)
    done = 0
    for piece, part in zip(slices, parts, strict=True):
        where = group.target[done : done + piece.stop - piece.start]
        span = slice(piece.start, piece.stop)
        gather_rows(part.indices, part.values, part.starts[span], part.lengths[span], offsets[where], indices, values)
        done += len(where)
    if output.is_clr:
        centred_log_ratio(offsets, values, output.num_features)
    entry_edges = offsets[group.cell_edges]
    cells = np.diff(group.cell_edges) + 1
    if np.diff(entry_edges).max(initial=0) >= 1 << 31:
        raise ValueError(
            f"minibatch: got {int(cells.max()) - 1} cells with {int(np.diff(entry_edges).max())} {name} entries;"
            f" a minibatch holds at most 2^31: choose a smaller one"
        )
    indptr_edges = offsets_of(cells)
    step_of = np.repeat(np.arange(steps), cells)
    indptr = (offsets[np.arange(indptr_edges[-1]) - step_of] - entry_edges[step_of]).astype(np.int32)
    columns = [_step_views(indptr, indptr_edges), _step_views(indices, entry_edges), _step_views(values, entry_edges)]
    if output.transpose:
        width = output.num_features + 1
        features = pool_features.take(steps * width, np.int32)
        by_feature = pool_indices.take(total, np.int32), pool_values.take(total, output.value_dtype)
        for k in range(steps):
            low, high = int(entry_edges[k]), int(entry_edges[k + 1])
            transpose_rows(
                indptr[indptr_edges[k] : indptr_edges[k + 1]],
                indices[low:high],
                values[low:high],
                features[k * width : (k + 1) * width],
                by_feature[0][low:high],
                by_feature[1][low:high],
            )
        columns.append(_step_views(features, np.arange(steps + 1) * width))
        columns += [_step_views(array, entry_edges) for array in by_feature]
        counts = [
            SparseCounts(i, x, v, output.num_features, f, c, w) for i, x, v, f, c, w in zip(*columns, strict=True)
        ]
    else:
        counts = [SparseCounts(i, x, v, output.num_features) for i, x, v in zip(*columns, strict=True)]
    return counts, _step_views(present, group.cell_edges)


def assemble(
    slices: Sequence[Slice],
    group: Group,
    outputs: Mapping[str, OutputFormat],
    *,
    epoch: int,
    sample: npt.NDArray[np.integer] | None,
    obs: Mapping[str, npt.NDArray[np.integer]],
) -> list[Minibatch]:
    """Minibatches of a group's steps.

    Parameters
    ----------
    slices
        The windows' parts that hold the group's cells, stream by stream.
    sample, obs
        (n,) codes of every cell of the store.
    """
    rows = np.empty(len(group.target), np.int64)
    if slices:
        rows[group.target] = np.concatenate([piece.rows[piece.start : piece.stop] for piece in slices])
    codes = np.zeros(len(rows), np.int64) if sample is None else sample[rows].astype(np.int64)
    counts, present = {}, {}
    for name, output in outputs.items():
        counts[name], present[name] = gather_counts(name, slices, group, output)
    edges = group.cell_edges
    samples, places, all_rows = (_step_views(array, edges) for array in (codes, group.place, rows))
    columns = {name: _step_views(values[rows].astype(np.int64), edges) for name, values in obs.items()}
    return [
        Minibatch(
            counts={name: steps[k] for name, steps in counts.items()},
            present={name: steps[k] for name, steps in present.items()},
            sample=samples[k],
            place=places[k],
            rows=all_rows[k],
            num_global=int(group.num_global[k]),
            epoch=epoch,
            step=group.first + k,
            obs={name: steps[k] for name, steps in columns.items()},
        )
        for k in range(group.stop - group.first)
    ]
