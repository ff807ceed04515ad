"""Sparse products in plain torch, for devices without kernels of their own (CUDA).

On a GPU torch's CSR products (cuSPARSE) split long rows among many threads; `embedding_bag`, whose bag per cell walks
thousands of rows one after another, serves on the CPU and where torch was told to be deterministic: it has no atomics.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor
from torch.nn import functional

from loaders.minibatch import SparseCounts, owners


@dataclass(frozen=True)
class Entries(SparseCounts):
    """Counts with other values.

    Attributes
    ----------
    origin
        Counts with the same indices, which are sorted by feature once for all that share them.
    """

    origin: SparseCounts = field(kw_only=True)


def entries(counts: SparseCounts, dtype: torch.dtype, *, log1p: bool = False) -> Entries:
    """The counts in another dtype, or their log(1 + counts)."""

    def changed(values: Tensor) -> Tensor:
        return torch.log1p(values.to(dtype)) if log1p else values.to(dtype)

    by_feature = None if counts.feature_values is None else changed(counts.feature_values)
    held = {f.name: getattr(counts, f.name) for f in fields(SparseCounts)}
    return Entries(**{**held, "values": changed(counts.values), "feature_values": by_feature}, origin=counts)


def product(counts: SparseCounts, table: Tensor) -> Tensor:
    """(B, O) = counts table, with a table of shape (F, O)."""
    return _multiply(counts.indptr, counts.indices, counts.values, table)


def transposed_product(counts: SparseCounts, table: Tensor) -> Tensor:
    """(F, O) = counts^T table, with a table of shape (B, O)."""
    counts = with_transpose(counts)
    assert counts.feature_indptr is not None
    assert counts.cells is not None
    assert counts.feature_values is not None
    return _multiply(counts.feature_indptr, counts.cells, counts.feature_values, table)


def write_gradient(counts: SparseCounts, upstream: Tensor, gradient: Tensor) -> None:
    """gradient (F, O) = counts^T upstream."""
    gradient.copy_(transposed_product(counts, upstream))


def subtract_transposed_product(result: Tensor, counts: SparseCounts, table: Tensor, max_bytes: int) -> None:
    """result (F, O) -= counts^T table, by so many columns at a time that the temporary stays below max_bytes."""
    columns = max(1, max_bytes // max(1, result.shape[0] * result.element_size()))
    for first in range(0, table.shape[1], columns):
        part = table[:, first : first + columns].contiguous()
        result[:, first : first + columns] -= transposed_product(counts, part)


def cell_of_entries(counts: SparseCounts) -> Tensor:
    """(N,) cell of each entry of the counts by cell."""
    return owners(counts.indptr, len(counts.indices))


def with_transpose(counts: SparseCounts) -> SparseCounts:
    """The counts with their transpose, made here where the loader has not brought it."""
    if counts.feature_values is not None:
        return counts
    origin = counts.origin if isinstance(counts, Entries) else counts
    feature_indptr, cells, order = origin.by_feature
    return replace(counts, feature_indptr=feature_indptr, cells=cells, feature_values=counts.values[order])


def feature_of_entries(counts: SparseCounts) -> Tensor:
    """(N,) feature of each entry of the transpose."""
    assert counts.feature_indptr is not None
    return owners(counts.feature_indptr, len(counts.indices))


def _multiply(indptr: Tensor, indices: Tensor, values: Tensor, table: Tensor) -> Tensor:
    """(R, O) = the sparse (R, C) matrix of these entries times a table (C, O)."""
    if table.device.type == "cpu" or torch.are_deterministic_algorithms_enabled() or len(indices) == 0:
        return _bags(indptr, indices, values, table)
    shape = (len(indptr) - 1, len(table))
    return torch.sparse_csr_tensor(indptr, indices, values, size=shape, check_invariants=False) @ table


def _bags(indptr: Tensor, indices: Tensor, values: Tensor, table: Tensor) -> Tensor:
    if len(indices) == 0:
        return torch.zeros(len(indptr) - 1, table.shape[1], dtype=table.dtype, device=table.device)
    return functional.embedding_bag(
        indices, table, indptr, mode="sum", per_sample_weights=values, include_last_offset=True
    )
