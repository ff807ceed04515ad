"""A minibatch: the counts of some cells in every modality, on the host or on a device.

Shapes: B cells of this rank, F features, N non-zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from loaders.csr import sound_csr


def owners(indptr: Tensor, num_entries: int) -> Tensor:
    """(N,) row of each entry; the number of entries is given, since asking for it would wait for the device."""
    rows = torch.arange(len(indptr) - 1, device=indptr.device)
    return torch.repeat_interleave(rows, (indptr[1:] - indptr[:-1]).long(), output_size=num_entries)


@dataclass(frozen=True)
class SparseCounts:
    """Counts of one modality by cell (CSR) and, for training, also by feature (the transpose).

    Attributes
    ----------
    indptr
        (B + 1,) int32; cell i holds the entries indptr[i]:indptr[i + 1]. A cell without the modality is empty.
    indices
        (N,) int32, feature of each entry, ascending within a cell.
    values
        (N,) float32, or the type they are stored in where that was asked for.
    num_features
        F.
    feature_indptr, cells, feature_values
        The transpose: (F + 1,) int32, (N,) int32 cell of each entry (ascending within a feature), (N,) as values.
        None where it was not asked for.
    is_padded
        The last cell is none: to it belong entries of value 0, which fill memory of a fixed size.
    """

    indptr: Tensor
    indices: Tensor
    values: Tensor
    num_features: int
    feature_indptr: Tensor | None = None
    cells: Tensor | None = None
    feature_values: Tensor | None = None
    is_padded: bool = False

    @property
    def num_cells(self) -> int:
        return len(self.indptr) - 1

    def totals(self) -> Tensor:
        """(B,) sum of the values of each cell, float32 or the values' wider dtype; computed once."""
        return self._totals

    @cached_property
    def _totals(self) -> Tensor:
        values = self._floating_values()
        if self.num_cells == 0:
            return values.new_zeros(0)
        lengths = (self.indptr[1:] - self.indptr[:-1]).long()
        return torch.segment_reduce(values, "sum", lengths=lengths, initial=0.0, unsafe=True)

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """The transpose without its values, where they lie: offsets (F + 1,), cells (N,) and the order of entries (N,).

        Sorted once, without waiting for the device, as a bincount would.
        """
        indices, order = torch.sort(self.indices, stable=True)
        features = torch.arange(self.num_features + 1, dtype=indices.dtype, device=indices.device)
        cells = owners(self.indptr, len(indices)).to(torch.int32)
        return torch.searchsorted(indices, features, out_int32=True), cells[order], order

    def _floating_values(self) -> Tensor:
        return self.values if self.values.is_floating_point() else self.values.float()

    def to_dense(self) -> Tensor:
        """(B, F) dense counts, floating. For tests and small data: training never makes them."""
        rows = owners(self.indptr, len(self.indices))
        values = self._floating_values()
        dense = torch.zeros(self.num_cells, self.num_features, dtype=values.dtype, device=values.device)
        dense[rows, self.indices.long()] = values
        return dense

    def to_torch_csr(self) -> Tensor:
        """(B, F) as a torch sparse CSR tensor that shares this memory."""
        shape = (self.num_cells, self.num_features)
        return torch.sparse_csr_tensor(self.indptr, self.indices, self.values, size=shape, check_invariants=False)

    def to_scipy(self) -> scipy.sparse.csr_matrix:
        """(B, F) as a SciPy CSR matrix that shares this memory."""
        parts = tuple(tensor.cpu().numpy() for tensor in (self.values, self.indices, self.indptr))
        return scipy.sparse.csr_matrix(parts, shape=(self.num_cells, self.num_features))

    @classmethod
    def from_scipy(cls, matrix: scipy.sparse.spmatrix, *, transpose: bool = True) -> SparseCounts:
        """Counts from any SciPy sparse matrix (B, F), for tests and data already in memory."""
        rows = sound_csr(matrix)
        rows.sort_indices()
        by_feature = rows.tocsc()
        by_feature.sort_indices()
        dtype = np.float64 if rows.dtype == np.float64 else np.float32

        def tensor(array: np.ndarray, kind: type) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, dtype=kind))

        counts = cls(
            tensor(rows.indptr, np.int32), tensor(rows.indices, np.int32), tensor(rows.data, dtype), rows.shape[1]
        )
        if not transpose:
            return counts
        return replace(
            counts,
            feature_indptr=tensor(by_feature.indptr, np.int32),
            cells=tensor(by_feature.indices, np.int32),
            feature_values=tensor(by_feature.data, dtype),
        )

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> SparseCounts:
        held: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {k: function(v) if isinstance(v, Tensor) else v for k, v in held.items()}
        return SparseCounts(**changed)


@dataclass(frozen=True)
class Minibatch:
    """This rank's share of the cells of one optimizer step.

    Attributes
    ----------
    counts
        Per modality; every modality holds all B cells, a cell that lacks it as an empty row.
    present
        Per modality (B,) bool: the cell has the modality in the store.
    sample
        (B,) int64 code of the cell's sample (the covariate to remove); zeros where no column was named.
    place
        (B,) int64 place of the cell in the *global* minibatch; the key of its noise.
    rows
        (B,) int64 row of the cell in the store.
    num_global
        Cells of the global minibatch, over all ranks; those that are lost are among them.
    epoch, step
        Position of this minibatch; step counts from 0 within the epoch.
    obs
        Further obs columns as (B,) int64 codes (-1: missing), or the numbers that were given for them, float32.
    lost
        Rows of the store, cells of this rank's share that stand in damaged chunks and were left out; see `Loader`.
    counted
        (B,) bool: which are cells, where others pad the minibatch to a fixed size and count nowhere; None: all.
    """

    counts: Mapping[str, SparseCounts]
    present: Mapping[str, Tensor]
    sample: Tensor
    place: Tensor
    rows: Tensor
    num_global: int
    epoch: int = 0
    step: int = 0
    obs: Mapping[str, Tensor] = field(default_factory=dict)
    lost: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    counted: Tensor | None = None

    @property
    def num_cells(self) -> int:
        return len(self.sample)

    def __repr__(self) -> str:
        lines = [f"Minibatch of {self.num_cells:,} of {self.num_global:,} cells, epoch {self.epoch}, step {self.step}"]
        for name, counts in self.counts.items():
            size, values = f"{int(self.present[name].sum()):,} cells × {counts.num_features:,} features", counts.values
            lines.append(f"{name}: {size}, {len(values):,} non-zeros, {values.dtype} on {values.device}")
        if self.obs:
            lines.append(f"obs: {', '.join(map(repr, self.obs))}")
        return "\n    ".join(lines)

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Minibatch:
        """The same with every tensor changed."""
        return replace(
            self,
            counts={name: counts.map_tensors(function) for name, counts in self.counts.items()},
            present={name: function(present) for name, present in self.present.items()},
            sample=function(self.sample),
            place=function(self.place),
            rows=function(self.rows),
            obs={name: function(codes) for name, codes in self.obs.items()},
            counted=None if self.counted is None else function(self.counted),
        )

    def to(self, device: torch.device | str) -> Minibatch:
        """Copy every tensor to a device; to a GPU from page-locked memory, so that the copies overlap with compute."""
        if self.sample.device == torch.device(device):
            return self
        if torch.device(device).type in ("cpu", "mps"):
            return self.map_tensors(lambda tensor: tensor.to(device))
        return self.map_tensors(lambda tensor: _pinned(tensor).to(device, non_blocking=True))


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if tensor.device.type == "cpu" else tensor
